"""Homework: a copy of the project in which the bodies of some functions are blanks, and the points for filling them.

    python -m homework                  lists the blanks
    python -m homework FOLDER           writes such a copy; --only NAME leaves one blank
    python -m homework --check NAME     in the copy: runs the tests of one blank
    python -m homework --grade FOLDER   in the project: the points of a copy

No solution is stored: blanks are made from the source. --grade runs the code in FOLDER on your machine without a
sandbox: a folder from a stranger belongs in a container. Code that fakes the output of the tests is not detected.
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 100  # then the tests of a blank, which take less than ten, are stopped
LEFT_OUT = (
    ".*", "__pycache__", "runs", "evals", "benchmarks", "models", "venv",
    "test_homework.py", "mutants.py", "test_structure.py",  # they quote lines of the bodies, or import such a file
)  # fmt: skip


class Blank(NamedTuple):
    name: str
    points: int
    topic: str  # with the source
    file: str
    function: str  # or Class.method
    tests: tuple[str, ...]  # in tests/; none needs a later blank


BLANKS = (
    Blank("advantages", 5, "advantages of a group (arXiv 2402.03300)", "grpo.py", "group_advantages", (
        "test_grpo.py::test_advantages_are_divided_by_the_standard_deviation_of_the_sample",
        "test_grpo.py::test_advantages_without_std_are_centred_rewards",
        "test_grpo.py::test_a_constant_added_to_all_rewards_changes_no_advantage",
        "test_grpo.py::test_a_group_of_one_has_no_advantage_and_is_finite",
        "test_grpo.py::test_groups_of_equal_rewards_have_no_advantage",
    )),
    Blank("weights", 5, "weights of tokens: GRPO, DAPO, Dr.GRPO", "grpo.py", "token_weights", (
        "test_grpo.py::test_token_weights_of_each_aggregation",
        "test_grpo.py::test_a_masked_sequence_weighs_nothing_and_dapo_alone_does_not_count_it",
    )),
    Blank("clip", 5, "PPO's clipped surrogate (arXiv 1707.06347)", "grpo.py", "clipped_surrogate", (
        "test_grpo.py::test_the_clipped_surrogate_is_the_smaller_of_two_products",
    )),
    Blank("truncate", 5, "truncated importance sampling", "grpo.py", "truncated_surrogate", (
        "test_grpo.py::test_the_truncated_surrogate_has_a_gradient_by_log_pi_alone",
    )),
    Blank("k3", 5, "an estimate of the KL divergence", "grpo.py", "k3", (
        "test_grpo.py::test_k3_is_zero_at_equality_never_negative_and_unbiased",
    )),
    Blank("loss", 10, "the RL loss, eq. (2)", "grpo.py", "grpo_loss", (
        "test_grpo.py::test_clip_stops_the_gradient_only_where_it_would_go_further",
        "test_grpo.py::test_truncation_bounds_the_weight_and_keeps_the_gradient",
        "test_grpo.py::test_on_policy_the_truncated_and_the_clipped_surrogate_have_the_same_gradient_bit_for_bit",
        "test_grpo.py::test_the_gradient_of_the_kl_term_is_that_of_the_exact_kl",
        "test_grpo.py::test_a_cap_on_the_ratio_bounds_the_weight_of_the_kl_term",
        "test_grpo.py::test_masked_sequences_weigh_nothing_and_their_infinities_stay_out",
        "test_grpo.py::test_a_log_ratio_is_clamped_at_twenty_on_both_sides",
    )),
    Blank("gradient", 8, "gradient of log π and entropy by the logits", "ops/head.py", "row_gradients_torch", (
        "test_logprob.py::test_the_gradients_of_rows_of_logits_are_autograds",
    )),
    Blank("logp", 8, "log π with few logits in memory", "logprob.py", "_TokenLogprobs.forward", (
        "test_logprob.py::test_packed_logprobs_and_entropies_equal_transformers_one_by_one",
        "test_logprob.py::test_losses_have_the_value_and_gradients_of_the_definition_and_of_fp64",
        "test_logprob.py::test_no_logits_beyond_one_chunk_exist_and_none_wait_for_the_backward_pass",
    )),
    Blank("adapter", 4, "the start of w, LoRA (arXiv 2106.09685)", "lora.py", "create", (
        "test_lora.py::test_a_is_uniform_between_plus_and_minus_the_inverse_root_of_the_inputs",
        "test_lora.py::test_layers_of_one_shape_begin_with_different_random_numbers",
        "test_lora.py::test_the_same_seed_makes_the_same_adapter",
        "test_lora.py::test_initialisation_equals_pefts",
        "test_lora.py::test_an_unknown_target_is_refused_with_the_names_of_the_layers",
    )),
    Blank("merged", 6, "θ + s·B·A, and with it ∇A and ∇B", "lora.py", "LoRALinear.merged_weight", (
        "test_lora.py::test_a_fresh_adapter_changes_nothing_bit_for_bit",
        "test_lora.py::test_delta_norm_is_the_norm_of_the_merged_difference",
        "test_lora.py::test_merging_and_training_round_no_weight_under_autocast",
        "test_lora.py::test_two_bases_share_one_adapter_and_their_gradients_of_it_add_up",
        "test_update.py::test_gradients_of_a_and_b_are_projections_of_the_merged_weight_s",
    )),
    Blank("sample", 8, "the next token by its inverse CDF; top-p", "ops/sample.py", "sample_tokens_torch", (
        "test_sampler.py::test_temperature_zero_draws_the_largest_logit",
        "test_sampler.py::test_sampled_frequencies_follow_the_distribution",
        "test_sampler.py::test_extreme_uniforms_pick_the_ends_of_the_vocabulary",
        "test_sampler.py::test_tokens_whose_probability_is_lost_in_an_fp32_sum_are_drawn_from_their_place",
        "test_sampler.py::test_top_p_samples_the_smallest_set_that_reaches_it_in_proportion",
    )),
    Blank("slots", 8, "samples that share keys and values", "ops/slots.py", "place_branches", (
        "test_sampler.py::test_cached_sampling_equals_the_naive_definition_for_any_number_of_slots",
        "test_sampler.py::test_samples_of_a_group_with_equal_tokens_so_far_are_decoded_once",
        "test_sampler.py::test_waiting_prompts_take_the_slots_of_finished_samples",
    )),
    Blank("updates", 3, "the two weights of every method, eq. (7)", "bridge.py", "updates", (
        "test_update.py::test_update_weights_of_every_method",
    )),
    Blank("bilevel", 12, "the gradients of eqs. (8), (10) and (11)", "bridge.py", "bilevel_gradients", (
        "test_update.py::test_theta_s_gradient_is_the_weighted_sum_of_two_separate_ones",
        "test_update.py::test_theta_gets_nothing_from_the_shadow_s_loss",
        "test_update.py::test_w_s_gradient_is_the_weighted_sum_of_three_separate_ones",
        "test_update.py::test_without_j_meta_w_takes_sft_alone_and_theta_the_same_as_in_bridge",
        "test_update.py::test_the_shadow_gets_nothing_from_sft_and_the_full_weight_of_rl",
        "test_update.py::test_the_shadow_s_loss_has_the_kl_term_too",
        "test_update.py::test_policy_and_shadow_have_one_surrogate_on_shared_rollouts_and_the_clip_on_own_ones",
    )),
    Blank("pass_at_k", 4, "pass@k without bias (arXiv 2107.03374)", "grading/scores.py", "pass_at_k", (
        "test_evaluate.py::test_pass_at_k_is_the_share_of_k_subsets_with_a_right_answer",
        "test_evaluate.py::test_pass_at_1_is_the_mean_and_pass_at_k_never_falls_with_k",
    )),
    Blank("wilson", 4, "an interval of an accuracy (Wilson 1927)", "grading/scores.py", "wilson", (
        "test_evaluate.py::test_wilson_s_interval_covers_the_true_accuracy_where_the_bootstrap_does_not",
    )),
)  # fmt: skip
NAMES = [blank.name for blank in BLANKS]


def find(source: str, blank: Blank) -> ast.FunctionDef:
    """The blank's function in a source. Raises SyntaxError, or LookupError if the source does not have it."""
    node = ast.parse(source, blank.file)
    for name in blank.function.split("."):
        defined = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        if name not in defined:
            raise LookupError(f"{blank.file} has no function {blank.function}")
        node = defined[name]
    return node


def with_body(source: str, blank: Blank, body: list[str]) -> str:
    """The source with another body of the blank's function; signature and docstring stay."""
    node = find(source, blank)
    first = node.body[0]
    start = first.lineno - 1
    if ast.get_docstring(node) is not None:
        start = first.end_lineno
    lines = source.split("\n")
    lines[start : node.end_lineno] = [" " * first.col_offset + line for line in body]
    return "\n".join(lines)


def with_blank(source: str, blank: Blank) -> str:
    """The source without the body of the blank's function."""
    number = NAMES.index(blank.name) + 1
    return with_body(source, blank, [
        f"# Homework {number}, {blank.points} points. Its tests: python -m homework --check {blank.name}",
        f'raise NotImplementedError("homework: {blank.name}")',
    ])  # fmt: skip


def with_answer(source: str, answer: str, blank: Blank) -> str:
    """The source with the blank's function as it is in `answer`, the text of a student's file."""
    ours = find(source, blank)
    theirs = find(answer, blank)
    lines = source.split("\n")
    lines[ours.lineno - 1 : ours.end_lineno] = answer.split("\n")[theirs.lineno - 1 : theirs.end_lineno]
    return "\n".join(lines)


def copy_project(folder: Path) -> None:
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))


def make(folder: Path, blanks: list[Blank]) -> None:
    """Writes a copy of the project with these blanks."""
    copy_project(folder)
    for blank in blanks:
        path = folder / blank.file
        path.write_text(with_blank(path.read_text("utf-8"), blank), "utf-8")
    first = blanks[0]
    print(f"{folder}: a copy of the project, {len(blanks)} of its functions without a body")
    print(f"Begin with {first.function} in {first.file}. Its tests:")
    print(f"cd {folder} && python -m homework --check {first.name}")


def command(blank: Blank) -> list[str]:
    """pytest on the tests of a blank, until one fails, in one process; it shows the lines of that test."""
    tests = [f"tests/{test}" for test in blank.tests]
    return [sys.executable, "-m", "pytest", "-x", "-q", "--tb=long", "-o", "addopts=", *tests]


def why_it_fails(project: Path, blank: Blank) -> str:
    """The first of the blank's tests that fails in a copy of the project, and its error; empty if all pass."""
    with subprocess.Popen(
        command(blank), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the body has started
            return f"stopped after {SECONDS} s"
    if process.returncode == 0 and re.search(r"^\d+ passed", output, re.MULTILINE):
        return ""
    error = re.search(r"^E +(.+)", output, re.MULTILINE)
    if error is None:
        return f"pytest ended with status {process.returncode}"
    test = re.search(r"^FAILED tests/\S+?::(\w+)", output, re.MULTILINE)
    return f"{test[1]}: {error[1]}" if test else error[1]


def grade_blank(folder: Path, blank: Blank) -> str:
    """Puts one function of a student into a copy of the project, and runs the project's tests of it.

    Returns why there are no points; empty if there are.
    """
    source = (ROOT / blank.file).read_text("utf-8")
    try:
        answer = (folder / blank.file).read_text("utf-8")
        source = with_answer(source, answer, blank)
    except (OSError, ValueError, SyntaxError, LookupError) as error:  # ValueError: the file is not UTF-8
        return f"{type(error).__name__}: {error}"
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch) / "project"
        copy_project(project)
        (project / blank.file).write_text(source, "utf-8")
        return why_it_fails(project, blank)


def grade(folder: Path, blanks: list[Blank]) -> None:
    """Prints the points of each blank, and their sum. Raises SyntaxError if a file of this project does not compile.

    In a copy this project is the student's, and every test imports every file.
    """
    for blank in BLANKS:
        ast.parse((ROOT / blank.file).read_text("utf-8"), blank.file)
    total = 0
    for blank in blanks:
        reason = grade_blank(folder, blank)
        points = 0 if reason else blank.points
        total += points
        print(f"{blank.name:<12}{points:>3} of {blank.points:>2}  {reason[:200] or 'passed'}", flush=True)
    print(f"{'sum':<12}{total:>3} of {sum(blank.points for blank in blanks)}")


def show() -> None:
    """Prints a table of the blanks."""
    for number, blank in enumerate(BLANKS, 1):
        place = f"{blank.file}:{blank.function}"
        print(f"{number:>2}  {blank.name:<12}{blank.points:>2} points  {place:<38}{blank.topic}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m homework", description="Without arguments: lists the blanks.")
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="the copy to write, or to grade")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help="this blank; may be repeated")
    parser.add_argument("--check", choices=NAMES, metavar="NAME", help="run the tests of this blank here")
    parser.add_argument("--grade", action="store_true", help="run the code in FOLDER, without a sandbox")
    args = parser.parse_args(argv)
    blanks = [blank for blank in BLANKS if args.only is None or blank.name in args.only]

    if args.check:
        if (ROOT / "tests" / "test_homework.py").exists():
            parser.error(f"{ROOT} is the project, where nothing is blank: call --check in a copy")
        blank = BLANKS[NAMES.index(args.check)]
        print(f"Tests of {blank.function} in {ROOT / blank.file}", flush=True)
        sys.exit(subprocess.call(command(blank), cwd=ROOT))
    if args.grade:
        if args.folder is None:
            parser.error("--grade needs the FOLDER with a student's files")
        if not args.folder.is_dir():
            parser.error(f"there is no folder {args.folder}")
        try:
            grade(args.folder, blanks)
        except SyntaxError as error:
            parser.error(
                f"{error.filename}, line {error.lineno}: {error.msg}: no blank can be graded before this is mended"
            )
    elif args.folder is None:
        show()
    elif args.folder.exists():
        parser.error(f"{args.folder} exists: choose another FOLDER, or delete this one")
    elif args.folder.resolve().is_relative_to(ROOT):
        parser.error(f"{args.folder} lies in the project: choose a FOLDER outside, such as ../homework")
    else:
        make(args.folder.resolve(), blanks)


if __name__ == "__main__":
    main(sys.argv[1:])
