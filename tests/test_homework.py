"""homework/: a blank loses nothing, its tests notice a missing and a wrong body, and --grade counts the points."""

import ast
import gc
import os
import re
import sys
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
from conftest import Forked

from homework import __main__ as homework

ROOT = Path(__file__).parents[1]
BLANKS = {blank.name: blank for blank in homework.BLANKS}
WRONG = {  # a body with one mistake of a student
    "advantages": """
        # the population's standard deviation
        centred = rewards - rewards.mean(-1, keepdim=True)
        if not divide_by_std:
            return centred
        return centred / (rewards.std(-1, keepdim=True, unbiased=False) + STD_EPS)
    """,
    "weights": """
        # "grpo" as a mean over all tokens
        keep = torch.ones_like(lengths) if keep is None else keep
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation must be one of {AGGREGATIONS}")
        size = len(lengths) * max_length if aggregation == "dr_grpo" else (lengths * keep).sum()
        return (keep / size).repeat_interleave(lengths)
    """,
    "clip": """
        # without the minimum
        clipped = ratio.clamp(1 - low, 1 + high)
        return clipped * advantage, clipped != ratio
    """,
    "truncate": """
        # a gradient through ρ, too
        return ratio.clamp(max=cap) * advantage * logp, ratio > cap
    """,
    "k3": """
        # k1
        return -log_ratio(ref_logp, logp, weight)
    """,
    "loss": """
        # k3 without ρ
        ratio = log_ratio(logp, old_logp, weight).exp()
        if ratio_cap is None:
            surrogate, limited = clipped_surrogate(ratio, advantage, *clip)
        else:
            logp = torch.where(weight != 0, logp, 0.0)
            surrogate, limited = truncated_surrogate(logp, ratio, advantage, ratio_cap)
        kl = torch.zeros_like(ratio) if ref_logp is None else k3(logp, ref_logp, weight)
        return (weight * (kl_coef * kl - surrogate)).sum(), LossTerms(ratio.detach(), limited, kl.detach())
    """,
    "gradient": """
        # by the logits divided by the temperature, not by the logits
        log_pi = logits / temperature - lse[:, None]
        pi = log_pi.exp()
        d = -g_logp[:, None] * pi
        if g_entropy is not None:
            d -= g_entropy[:, None] * pi * (log_pi + entropy[:, None])
        out.copy_(d.scatter_add(1, targets[:, None], g_logp[:, None]))
    """,
    "logp": """
        # all logits at once
        logits = head.project(hidden, head.rounded_weight(weight, hidden.dtype))
        logp, entropy, lse = head.row_stats(logits, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logp, entropy
    """,
    "adapter": """
        # A in [0, 1/√in)
        generator = torch.Generator().manual_seed(seed)
        w = {}
        for name, linear in model.named_modules():
            if last_name(name) in targets:
                A = torch.rand(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
                w[f"{name}.lora_A.weight"] = nn.Parameter(A)
                w[f"{name}.lora_B.weight"] = nn.Parameter(torch.zeros(linear.out_features, rank))
        return w
    """,
    "merged": """
        # without s
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.base.weight + self.lora_B @ self.lora_A
    """,
    "sample": """
        # a cdf in fp32
        p = (logits / (temperature or 1.0)).softmax(-1)
        ordered, place = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= top_p] = 0
        cdf = torch.zeros_like(p).scatter(1, place, ordered).cumsum(-1)
        token = torch.searchsorted(cdf, (u[:, None] * cdf[:, -1:]).float(), right=True).clamp(max=p.shape[1] - 1)
        if temperature == 0:
            token = p.argmax(-1, keepdim=True)
        return token[:, 0], p.gather(1, token).log()[:, 0]
    """,
    "slots": """
        # keys and values of the branch's number, not of its slot
        source = slot.new_empty(count)
        source[branch_of_row] = slot
        new_slot, order = branch_of_row.sort(stable=True)
        return order, new_slot
    """,
    "updates": """
        # the weights of eq. (7), exchanged
        match s.method:
            case "sft":
                return [(1.0, 0.0)]
            case "rl" | "luffy":
                return [(0.0, 1.0)]
        return [(s.lam, 1 - s.lam)]
    """,
    "bilevel": """
        # a plus before the shadow's term
        update = Update()
        for optimizer in m.optimizers.values():
            optimizer.zero_grad()
        zeros = [torch.zeros_like(p) for p in m.w.values()]
        rl, rl_hat, sft = zeros, zeros, zeros
        if rl_weight:
            cap = s.shadow_ratio_cap if m.shadow is not None else None
            update.policy = rl_pass(m.policy, rollouts, rollouts.old_logp, m.reference, s, cap)
            taken = parallel.take_gradients(m.w.values())
            rl = taken if METHODS[s.method].w_takes_rl else zeros
            for p in m.parameters["theta"]:
                p.grad.mul_(rl_weight)
            if m.shadow is not None:
                update.shadow = rl_pass(m.shadow, rollouts_hat, update.policy.logp, m.reference, s, cap)
                rl_hat = parallel.take_gradients(m.w.values())
        if sft_weight and demonstrations:
            update.nll = sft_pass(m.policy, demonstrations, sft_weight, s)
            sft = parallel.take_gradients(m.w.values())
        for p, a, b, c in zip(m.w.values(), sft, rl, rl_hat):
            p.grad = a + rl_weight * (b + c)
        return update
    """,
    "pass_at_k": """
        # biased
        if not 1 <= k <= correct.shape[1]:
            raise ValueError(f"pass@{k} needs at least {k} samples per problem, there are {correct.shape[1]}")
        return 1 - (1 - correct.mean(1)) ** k
    """,
    "wilson": """
        # Wald's interval
        half = 1.959964 * math.sqrt(share * (1 - share) / n)
        return max(0.0, share - half), min(1.0, share + half)
    """,
}


MISTAKES = (  # one mistake more: blank, a line of the body, the line with the mistake
    ("weights", "int((lengths * keep).sum())", "int(lengths.sum())"),
    (
        "weights",
        "kept = per_sequence.to(lengths.device) * keep",
        "kept = per_sequence * (keep | (aggregation == 'grpo'))",
    ),
    ("clip", "torch.minimum(unclipped, clipped)", "torch.minimum(unclipped, clipped).detach()"),
    ("truncate", "clamp(max=cap)", "clamp(1 / cap, cap)"),
    ("k3", "log_ratio(ref_logp, logp, weight)", "ref_logp - logp"),
    ("k3", "d.exp() - d - 1", "weight * (d.exp() - d - 1)"),
    ("k3", "d.exp() - d - 1", "(d.exp() - d - 1).detach()"),
    ("loss", "kl_coef * kl_ratio * kl", "kl_ratio * kl"),
    ("loss", "kl_coef * kl_ratio * kl", "kl_coef**2 * kl_ratio * kl"),
    ("loss", "*clip)", "*clip[::-1])"),
    ("loss", "log_ratio(logp, old_logp, weight).exp()", "torch.where(weight != 0, logp - old_logp, 0.0).exp()"),
    ("loss", "kl_ratio = ratio * (ratio_cap / ratio.detach()).clamp(max=1)", "kl_ratio = ratio.clamp(max=ratio_cap)"),
    ("loss", "LossTerms(ratio.detach()", "LossTerms(ratio"),
    ("adapter", "if missing or not targets:", "if False:"),
    ("updates", "[(s.mu, 1.0)]", "[(1.0, 1.0)]"),
    ("updates", "chord_mu(k, 0, s.steps,", "chord_mu(k, 0, 200,"),
    ("bilevel", "rl_pass(m.shadow, rollouts_hat,", "rl_pass(copy.deepcopy(m.shadow), rollouts_hat,"),
    ("bilevel", "rollouts.old_logp, m.reference, s, ratio_cap)", "rollouts.old_logp, m.reference, s)"),
    (
        "bilevel",
        "old_logp, m.reference, s, ratio_cap)\n                g",
        "old_logp, None, s, ratio_cap)\n                g",
    ),
    ("bilevel", "p.grad.mul_(rl_weight)", "p.grad.mul_(1)"),
    ("wilson", "max(0.0, low)", "low - 1e-3"),
)


@pytest.mark.parametrize("name", BLANKS)
def test_a_blank_keeps_signature_and_docstring_and_its_body_put_back_gives_the_original_text(name):
    blank = BLANKS[name]
    source = (ROOT / blank.file).read_text()
    blanked = homework.with_blank(source, blank)
    before, after = (homework.find(text, blank) for text in (source, blanked))
    assert ast.unparse(after.args) == ast.unparse(before.args)
    assert ast.get_docstring(after) == ast.get_docstring(before)
    body = after.body[ast.get_docstring(after) is not None :]
    assert [ast.unparse(line) for line in body] == [f"raise NotImplementedError('homework: {name}')"]
    assert homework.with_answer(blanked, source, blank) == source


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("homework") / "project"
    homework.copy_project(folder)
    return folder


def run_pytest(folder, tests, *flags):
    """Runs tests of a copy of the project, in a process that has loaded torch and the modules of ROOT."""
    ours = {path.stem for place in (ROOT, ROOT / "tests") for path in place.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    gc.freeze()  # collections then skip what was loaded before the fork
    sys.dont_write_bytecode = True  # a file changes several times in a second
    os.chdir(folder)
    plugins = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]  # the latter collects torch's garbage
    sys.exit(pytest.main(["-q", *plugins, "-o", "addopts=", *flags, *(f"tests/{test}" for test in tests)]))


def outcome(project, changes, tests, *flags):
    """(exit status of pytest, its output) on tests of the copy after some changes, {file: function of its text}."""
    originals = {file: (ROOT / file).read_text() for file, _ in changes}
    for file, change in changes:
        (project / file).write_text(change((project / file).read_text()))
    try:
        command = partial(run_pytest, project, tests, *flags)
        status, output, errors = Forked(command, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1").finish()
    finally:
        for file, text in originals.items():
            (project / file).write_text(text)
    return status, output + errors


def blanked(blanks):
    return [(blank.file, partial(homework.with_blank, blank=blank)) for blank in blanks]


@pytest.mark.parametrize("name", BLANKS)
def test_all_tests_of_a_blank_fail_while_it_is_blank(name, project):
    blank = BLANKS[name]
    status, output = outcome(project, blanked([blank]), blank.tests, "--tb=no")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert not re.search(r"\d+ passed", output), output


@pytest.mark.parametrize("name", BLANKS)
def test_the_tests_of_a_blank_fail_with_a_wrong_body(name, project):
    blank = BLANKS[name]
    body = dedent(WRONG[name]).strip().split("\n")
    wrong = [(blank.file, partial(homework.with_body, blank=blank, body=body))]
    status, output = outcome(project, wrong, blank.tests, "-x", "--tb=short")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert re.search(r"^E +(Assert|assert)", output, re.MULTILINE), output


@pytest.mark.parametrize(("name", "line", "mistake"), MISTAKES)
def test_the_tests_of_a_blank_notice_one_wrong_line(name, line, mistake, project):
    blank = BLANKS[name]

    def with_mistake(source):
        body = ast.get_source_segment(source, homework.find(source, blank))
        assert body.count(line) == 1
        return source.replace(body, body.replace(line, mistake))

    status, output = outcome(project, [(blank.file, with_mistake)], blank.tests, "-x", "--tb=short")
    assert status == pytest.ExitCode.TESTS_FAILED, output


@pytest.mark.parametrize("name", BLANKS)
def test_the_tests_of_a_blank_pass_while_all_later_ones_are_blank(name, project):
    later = homework.BLANKS[homework.NAMES.index(name) + 1 :]
    status, output = outcome(project, blanked(later), BLANKS[name].tests)
    assert status == pytest.ExitCode.OK, output


def test_a_copy_has_the_chosen_blanks_and_the_program_says_how_to_test_the_first(tmp_path, capsys):
    folder = tmp_path / "copy"
    homework.main([str(folder), "--only", "k3", "--only", "clip"])
    assert "Begin with clipped_surrogate in grpo.py" in capsys.readouterr().out
    assert re.findall(r'"homework: (\w+)"', (folder / "grpo.py").read_text()) == ["clip", "k3"]
    assert (folder / "lora.py").read_text() == (ROOT / "lora.py").read_text()
    assert not any((folder / name).exists() for name in (".git", "tests/mutants.py", "tests/test_homework.py"))


@pytest.mark.parametrize(("arguments", "message"), [
    ([str(ROOT.parent)], "exists: choose another FOLDER"),
    ([str(ROOT / "docs/copy")], "lies in the project: choose a FOLDER outside"),
    (["copy", "--only", "k1"], "invalid choice: 'k1' (choose from"),
    (["--grade"], "--grade needs the FOLDER with a student's files"),
    (["copy", "--grade"], "there is no folder copy"),
    (["--check", "k3"], "is the project, where nothing is blank: call --check in a copy"),
])  # fmt: skip
def test_a_command_that_makes_no_sense_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        homework.main(arguments)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_check_of_a_copy_runs_the_tests_of_a_blank_there_and_has_their_status(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(homework, "ROOT", tmp_path)
    monkeypatch.setattr(homework.subprocess, "call", lambda command, cwd: calls.append((command, cwd)) or 7)
    with pytest.raises(SystemExit) as ended:
        homework.main(["--check", "k3"])
    assert ended.value.code == 7
    assert calls == [(homework.command(BLANKS["k3"]), tmp_path)]


def test_the_list_names_every_blank_and_the_points_sum_to_100(capsys):
    homework.main([])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == homework.NAMES
    assert sum(blank.points for blank in homework.BLANKS) == 100


def test_grading_gives_points_to_a_solved_function_and_the_reason_to_each_that_cannot_be_read(tmp_path, capsys):
    for blank in homework.BLANKS:
        (tmp_path / blank.file).parent.mkdir(exist_ok=True)
    (tmp_path / "bridge.py").write_text((ROOT / "bridge.py").read_text())
    (tmp_path / "logprob.py").write_text("def forward(:\n")
    (tmp_path / "lora.py").write_text("class LoRALinear:\n    pass\n")
    (tmp_path / "ops/slots.py").write_bytes(b"\xff")
    names = ("updates", "logp", "merged", "slots", "wilson")
    homework.main(["--grade", str(tmp_path), *(word for name in names for word in ("--only", name))])
    table = capsys.readouterr().out
    assert re.search(r"^updates +3 of  3  passed$", table, re.MULTILINE)
    assert re.search(r"^logp +0 of  8  SyntaxError: .*\(logprob.py, line 1\)$", table, re.MULTILINE)
    assert "LookupError: lora.py has no function LoRALinear.merged_weight" in table
    assert re.search(r"^slots +0 of  8  UnicodeDecodeError", table, re.MULTILINE)
    assert re.search(r"^wilson +0 of  4  FileNotFoundError", table, re.MULTILINE)
    assert re.search(r"^sum +3 of 29$", table, re.MULTILINE)


def test_a_file_that_does_not_compile_is_named_before_anything_is_graded(tmp_path, monkeypatch, capsys):
    for blank in homework.BLANKS:
        (tmp_path / blank.file).parent.mkdir(exist_ok=True)
        (tmp_path / blank.file).write_text((ROOT / blank.file).read_text())
    (tmp_path / "lora.py").write_text("w = {\n")
    monkeypatch.setattr(homework, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        homework.main(["--grade", str(tmp_path), "--only", "wilson"])
    assert "lora.py, line 1: '{' was never closed: no blank can be graded" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "reason"), [
    ("print('1 passed')", ""),
    ("print('E   assert 1 == 2'); print('E   assert 3'); exit(1)", "assert 1 == 2"),
    ("print('1 passed'); exit(3)", "pytest ended with status 3"),
    ("print('E   assert 3\\nFAILED tests/test_a.py::test_b[1-2] - x'); exit(1)", "test_b: assert 3"),
    ("exit(0)", "pytest ended with status 0"),  # before the tests ran
    ("while True: pass", "stopped after 0.5 s"),
    ("import os; os.fork()\nwhile True: pass", "stopped after 0.5 s"),
])  # fmt: skip
def test_the_reason_is_the_first_error_of_the_tests_and_tests_that_hang_are_stopped(code, reason, monkeypatch):
    monkeypatch.setattr(homework, "SECONDS", 0.5)
    monkeypatch.setattr(homework, "command", lambda blank: [sys.executable, "-c", code])
    assert homework.why_it_fails(ROOT, BLANKS["k3"]) == reason
