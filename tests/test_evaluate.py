"""Evaluation: every number equals its definition; result files survive interruption, damage and more ranks."""

import contextlib
import io
import itertools
import json
import math
import os
import random
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fork_ranks, lines, tensors_in

import evaluate
import lora
import plot
import rewards
from grading import scores
from grading.scores import PAPER, interval, majority, paired_test, pass_at_k, report, summarise
from infra import checkpoint, export
from infra.files import DataError
from infra.model import MODELS, load, stop_tokens
from infra.results import weights_hash, write_results
from infra.run import alone
from sampler import Sampler
from settings import PRESETS, Settings, start_program
from tasks import arithmetic, benchmarks, named
from tasks.benchmarks import BENCHMARKS, read_benchmark
from tasks.prompts import INSTRUCTION
from tasks.task import Problem, Task, fingerprint

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
SAMPLED = ("--problems", 3, "--protocol", "sampled", "--samples", 4, "--max-new-tokens", 16, "--slots", 1)
SMOKE = PRESETS["smoke"]
GREEDY = ("--problems", 2, "--max-new-tokens", 16)


def run_main(module, *flags) -> None:
    """Calls the module's main() with a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        module.main()


def call(*flags) -> None:
    run_main(evaluate, *flags)


@pytest.fixture(scope="module")
def model():
    return str(MODELS / "arithmetic-smoke")


@pytest.fixture(scope="module")
def sampled(model, tmp_path_factory):
    """The result file of a sampled evaluation: 6 groups of 3 problems, 4 answers each."""
    path = tmp_path_factory.mktemp("sampled") / "one.jsonl"
    call(model, *SAMPLED, "--out", path)
    return path


@pytest.fixture(scope="module")
def greedy(model, tmp_path_factory):
    """The result file of a greedy evaluation: 6 groups of 2 problems."""
    path = tmp_path_factory.mktemp("greedy") / "one.jsonl"
    call(model, *GREEDY, "--out", path)
    return path


@pytest.fixture
def few_draws(monkeypatch):
    """1,500 draws of bootstrap and permutation test: enough for p < 0.001, a sixth of the time."""
    for function in (scores.interval, scores.paired_test):
        monkeypatch.setattr(function, "__defaults__", (1500,))


def record(group="g", problem=0, sample=0, correct=True, **more):
    extracted = "1" if correct else "2"
    return dict(group=group, id=problem, sample=sample, correct=correct, extracted=extracted, reason="equal",
                finish_reason="stop", tokens=5, labels=(), response=rf"\boxed{{{extracted}}}", answer="1",
                tolerance=None, unit=None) | more  # fmt: skip


# Numbers


def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_answer():
    rng = np.random.default_rng(0)
    correct = (rng.random((20, 6)) < 0.3).astype(float)
    for k in range(1, 7):
        subsets = [[max(row[list(s)]) for s in itertools.combinations(range(6), k)] for row in correct]
        np.testing.assert_allclose(pass_at_k(correct, k), np.mean(subsets, axis=1), atol=1e-12)
    for k in (0, 7):
        with pytest.raises(ValueError):  # noqa: PT011  the text is free
            pass_at_k(correct, k)


def test_a_k_above_the_number_of_samples_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="pass@7 needs at least 7 samples per problem, there are 6"):
        pass_at_k(np.zeros((20, 6)), 7)


def test_pass_at_1_is_the_mean_and_pass_at_k_never_falls_with_k():
    correct = (np.random.default_rng(1).random((50, 16)) < 0.2).astype(float)
    values = [pass_at_k(correct, k) for k in range(1, 17)]
    np.testing.assert_allclose(values[0], correct.mean(1))
    assert (np.diff(values, axis=0) >= -1e-12).all()
    np.testing.assert_allclose(values[-1], correct.max(1))


def test_the_majority_counts_equivalent_answers_together_and_shares_a_tie():
    assert majority(["0.5", r"\frac12", "3", "3", "1/2"], [True, True, False, False, True]) == 1
    assert majority(["0.25", r"\frac14", "3"], [False, False, True]) == 0
    assert majority(["4", "5", "6"], [True, False, False]) == pytest.approx(1 / 3)
    assert majority([None, None, "4"], [False, False, True]) == 1  # no answer, no vote
    assert majority([None, None], [False, False]) == 0


def test_the_interval_is_the_percentile_bootstrap_over_problems():
    rng = np.random.default_rng(3)
    values = rng.random(40)
    draws = np.sort([rng.choice(values, 40).mean() for _ in range(20_000)])
    np.testing.assert_allclose(interval([values]), np.percentile(draws, [2.5, 97.5]), atol=0.005)
    assert interval([values]) == interval([values])
    assert interval([np.ones(7)]) == pytest.approx((1, 1))


def test_the_interval_of_a_mean_over_benchmarks_covers_it_about_95_times_in_100():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        low, high = interval([(rng.random(60) < 0.4).astype(float), (rng.random(100) < 0.7).astype(float)], 1000)
        covered += low <= 0.55 <= high
    assert 180 <= covered <= 199


def coverage(n, p, interval_of):
    """The chance, summed over the binomial distribution, that the interval of x right answers among n covers p."""
    low, high = np.array([interval_of(x) for x in range(n + 1)]).T
    chance = np.array([math.comb(n, x) * p**x * (1 - p) ** (n - x) for x in range(n + 1)])
    return chance[(low <= p) & (p <= high)].sum()


def test_wilson_s_interval_covers_the_true_accuracy_where_the_bootstrap_does_not():
    def wilson(n):
        return lambda x: scores.wilson(x / n, n)

    exact = {(30, 0.05): 0.939, (30, 0.5): 0.957, (30, 0.95): 0.939, (40, 0.05): 0.952, (500, 0.6): 0.950}
    assert {case: round(coverage(*case, wilson(case[0])), 3) for case in exact} == exact
    for n in (30, 40):
        over_p = [coverage(n, p, wilson(n)) for p in np.arange(0.01, 1, 0.01)]
        assert min(over_p) > 0.925
        assert 0.95 < np.mean(over_p) < 0.955
    assert coverage(30, 0.05, lambda x: interval([np.arange(30) < x], 2000)) < 0.79
    for x in range(31):  # the interval is the set of p whose score test accepts x of 30, at 1.96 standard deviations
        for p in scores.wilson(x / 30, 30):
            assert 0 <= p <= 1
            assert abs(x / 30 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 30), abs=1e-5)


def test_every_share_of_problems_has_wilson_s_interval_and_every_other_number_the_bootstrap_s():
    def numbers(correct, **more):  # [n][s]
        records = [record(problem=i, sample=j, correct=bool(c), labels=("all",), **more)
                   for i, row in enumerate(correct) for j, c in enumerate(row)]  # fmt: skip
        return summarise(records)

    wrong, one, two = [0, *scores.wilson(0, 30)], [1 / 30, *scores.wilson(1 / 30, 30)], [1, *scores.wilson(1, 30)]
    assert wrong[2] == pytest.approx(0.1135, abs=1e-4)
    greedy = numbers([[i == 0] for i in range(30)], tokens=1)
    shares = [greedy["g"][name] for name in ("accuracy", "pass@1", "majority")]
    assert [*shares, greedy["g"]["labels"]["all"]["accuracy"], greedy["average"]["accuracy"]] == [one] * 5
    assert greedy["g"]["cut off"] == greedy["g"]["no box"] == wrong
    assert greedy["g"]["tokens"] == [1, 1, 1]  # no share, though all its values are 1
    assert numbers([[1]] * 30, finish_reason="length")["g"]["cut off"] == two
    for row in ([0, 0, 0, 0], [1, 1, 1, 1]):  # all answers alike: the bootstrap would be a point
        assert numbers([row] * 30)["g"]["accuracy"] == (two if row[0] else wrong)
    sampled = numbers([[1, 0, 0, 0]] * 3 + [[0] * 4] * 27)["g"]
    assert sampled["pass@4"] == [0.1, *scores.wilson(0.1, 30)]
    values = np.array([0.25] * 3 + [0] * 27)
    assert sampled["accuracy"] == pytest.approx([0.025, *interval([values])], abs=2e-3)
    assert scores.plain_mean([values > 0, values > 0])[1:] == pytest.approx(interval([values > 0] * 2))


def test_the_p_value_is_never_zero_and_the_table_says_what_it_compares(few_draws):
    assert paired_test([np.zeros(90)], [np.ones(90)], 99)[3] == 0.01
    records = {name: [record(problem=i, correct=i < n) for i in range(30)] for name, n in (("a", 3), ("b", 20))}
    tables = scores.compare([(name, {"data": 0}, of) for name, of in records.items()])
    assert "p for these two models on these problems, not for two methods: a run is one seed" in tables
    assert "10.0 [3.5, 25.6]" in tables
    assert scores.P_NOTE not in scores.compare([("a", {"data": 0}, records["a"])])


def test_the_paired_test_detects_a_small_steady_difference_and_ignores_noise(few_draws):
    rng = np.random.default_rng(5)
    difficulty = rng.random(200)
    a = (difficulty > 0.5).astype(float)
    better = (difficulty > 0.42).astype(float)
    difference, low, high, p = paired_test([a], [better])
    assert 0 < low < difference < high
    assert p < 0.001
    assert paired_test([better], [a])[::3] == pytest.approx((-difference, p)), "the test has two sides"
    assert paired_test([np.zeros(30)], [np.ones(30)], 99)[3] == 1 / 100, "no permutation test gives p = 0"
    assert paired_test([a], [a]) == (0, 0, 0, 1)
    p_values = [paired_test([rng.random(50)], [rng.random(50)], 100)[3] for _ in range(100)]
    assert sum(p < 0.05 for p in p_values) <= 12  # about 5 of 100 by chance


def test_the_average_is_the_plain_mean_of_the_paper_s_five_if_all_five_are_present():
    records = [record(g, i, correct=i < n) for n, g in enumerate(PAPER) for i in range(4)]
    records += [record("gsm8k", i) for i in range(4)]
    assert summarise(records)["average"]["accuracy"][0] == pytest.approx((0 + 1 + 2 + 3 + 4) / 4 / 5)
    assert summarise(records)["average"]["of"] == list(PAPER)
    fewer = [r for r in records if r["group"] in ("math500", "gsm8k")]
    assert summarise(fewer)["average"]["accuracy"][0] == pytest.approx(0.5)


def test_the_average_and_its_difference_weigh_groups_alike_whatever_their_sizes(few_draws):
    large, small = np.zeros(30), np.ones(2)
    assert scores.plain_mean([large, small])[0] == 0.5
    assert paired_test([large, 0 * small], [large, small])[0] == 0.5


def test_the_summary_counts_samples_truncation_and_labels():
    records = [record(problem=p, sample=s, correct=p == s, labels=(f"level {p}",), tokens=10 * p,
                      finish_reason="length" if p else "stop") for p in range(2) for s in range(2)]  # fmt: skip
    records.append(record("h", reason="no_answer", correct=False, extracted=None))
    s = summarise(records)
    assert (s["g"]["problems"], s["g"]["samples"]) == (2, 2)
    means = {name: number[0] for name, number in s["g"].items() if isinstance(number, list)}
    expected = {"accuracy": 0.5, "pass@1": 0.5, "pass@2": 1, "majority": 0.5, "cut off": 0.5, "no box": 0, "tokens": 5}
    assert means == expected
    assert s["g"]["tokens"] == [5, 0, 10]  # of two problems; every number has its interval
    assert s["h"]["no box"][0] == 1
    assert [(n, v["accuracy"]) for n, v in s["g"]["labels"].items()] == [("level 0", [0.5] * 3), ("level 1", [0.5] * 3)]


def test_comparisons_pair_problems_by_id_in_any_order_of_answers(few_draws):
    records = [record(problem=i, correct=i % 3 == 0) for i in range(30)]
    shuffled = random.Random(0).sample(records, 30)
    table = scores.compare([("a", {"data": 0, "seed": 0}, records), ("b", {"data": 0, "seed": 1}, shuffled)])
    assert "+0.0 [+0.0, +0.0] p=1.000" in table
    assert "b and a differ in seed: 1 and 0" in table


# Benchmarks


@pytest.mark.parametrize(("name", "count"), [("math500", 500), ("minerva_math", 272), ("olympiadbench", 675),
                                             ("aime24", 30), ("amc23", 40), ("gsm8k", 1319)])  # fmt: skip
def test_every_row_of_a_benchmark_is_read_and_its_gold_earns_a_reward(name, count, tmp_path):
    source = DATA / ("gsm8k_test.jsonl" if name == "gsm8k" else f"{name}.jsonl")
    if not source.exists():
        pytest.skip(f"shared/data/{source.name} is absent")
    (tmp_path / f"{name}.jsonl").symlink_to(source)
    problems = read_benchmark(name, str(tmp_path))
    assert len(problems) == count
    wrong = [
        p.answer
        for p in problems
        if not rewards.is_correct(rf"\boxed{{{p.answer}}}", p.answer, tolerance=p.tolerance, unit=p.unit).correct
    ]
    assert len(wrong) == (2 if name == "olympiadbench" else 0), wrong  # a sentence, and a misprint
    assert all(len(p.labels) == len(BENCHMARKS[name].labels) for p in problems)
    if name == "olympiadbench":
        (p,) = [p for p in problems if p.tolerance]
        assert rewards.is_correct(r"\boxed{4.29\%}", p.answer, tolerance=p.tolerance).correct
        assert not rewards.is_correct(r"\boxed{4.31\%}", p.answer, tolerance=p.tolerance).correct


def test_options_are_shuffled_by_the_seed_and_the_gold_is_the_right_option_s_letter(tmp_path, monkeypatch):
    gpqa = {"Question": "Which?", "Correct Answer": "right", "High-level domain": "Physics"}
    gpqa |= {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    mmlu = {"question": "Which?", "options": ["w1", "w2", "right", *"bcdefgh"], "answer_index": 2, "category": "law"}
    for name, row, options in (("gpqa", gpqa, 4), ("mmlu_pro", mmlu, 10)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 40)
        problems = read_benchmark(name, str(tmp_path))
        for p in problems:
            assert f"({p.answer}) right\n" in p.question
            assert p.question.count("\n(") == options
            assert rewards.is_correct(rf"so \boxed{{\text{{({p.answer})}}}}", p.answer).correct
        assert len({p.answer for p in problems}) == options
        assert problems == read_benchmark(name, str(tmp_path))
        monkeypatch.setattr(benchmarks, "OPTIONS_SEED", 1)
        assert problems != read_benchmark(name, str(tmp_path))
        monkeypatch.undo()


def test_the_error_for_an_absent_benchmark_names_the_file_to_provide(tmp_path):
    with pytest.raises(DataError, match=r"or put the rows into .*math500\.jsonl"):
        read_benchmark("math500", str(tmp_path))
    (tmp_path / "aime24.jsonl").write_text('{"problem": "1+1?"}\n')
    with pytest.raises(DataError, match=r"aime24\.jsonl, line 1 is no row of aime24: KeyError\('answer'\)"):
        read_benchmark("aime24", str(tmp_path))
    with pytest.raises(SystemExit, match="no 'aime25'; there are paper, math500"):
        call("arithmetic-smoke", "--benchmarks", "aime25")


# Result files


@pytest.mark.parametrize("name", ["model-step-2", "model"])
def test_a_model_in_a_run_folder_is_evaluated_on_the_problems_of_its_run(finished_run, tmp_path, monkeypatch, name):
    shutil.copytree(finished_run("--method", "bridge", "--steps", "2"), tmp_path / "mine")
    (tmp_path / "mine" / "model").rename(tmp_path / "mine" / name)
    monkeypatch.chdir(tmp_path)
    config = json.loads(Path("mine/config.json").read_text())
    config["settings"] |= {"task": "chains", "eval_problems": 3, "steps": 9}  # as of an extended run
    Path("mine/config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"mine/{name}"])
    evaluate.main()
    header, *answers = lines(tmp_path / "evals" / "mine" / name / "answers-paper.jsonl")
    assert {a["group"] for a in answers} == {f"n={n}" for n in range(3, 10)}, "chains"
    assert header["header"]["step"] == (2 if name == "model-step-2" else 9)


def test_a_result_file_names_everything_its_numbers_depend_on_and_holds_every_answer(model, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    call(model, "--problems", 2, "--protocol", "sampled", "--samples", 3, "--max-new-tokens", 24, "--out", out)
    printed = capsys.readouterr().out
    assert "| n=3 | 2 | 3 |" in printed
    assert "pass@2" in printed
    header, *records = lines(out)
    header = header["header"]
    assert header["prompt"] == "Q:{question}="
    assert header["sampling"] == dict(
        temperature=0.6, top_p=0.95, max_new_tokens=24, samples={f"n={n}": 3 for n in range(3, 9)}
    )
    assert header["grader"] == rewards.VERSION
    names = "model weights dtype prompt sampling seed options_seed grader torch transformers data"
    assert set(header) == set(names.split())
    assert len(records) == 6 * 2 * 3
    for r in records:
        assert r["prompt"] == f"Q:{r['question']}="
        verdict = rewards.is_correct(r["response"], r["answer"])
        assert (verdict.correct, verdict.extracted, verdict.reason) == (r["correct"], r["extracted"], r["reason"])
    summary = json.loads(out.with_suffix(".summary.json").read_text())
    assert summary["n=3"]["accuracy"][0] == np.mean([r["correct"] for r in records if r["group"] == "n=3"])


def test_flags_reach_the_sampler_and_the_header(model, greedy, tmp_path):
    def answers(*flags):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        call(model, *GREEDY, "--out", out, *flags)
        header, *records = lines(out)
        return header["header"], [r["response"] for r in records]

    first = [r["response"] for r in lines(greedy)[1:]]
    one_token = answers("--temperature", 1, "--top-p", 1e-9)[1]  # the nucleus is the likeliest token
    seed_0, seed_1 = answers("--temperature", 1)[1], answers("--temperature", 1, "--seed", 1)[1]
    assert one_token == first != seed_0 != seed_1
    with pytest.raises(SystemExit, match="--samples 4 greedy answers would be the same: set --temperature too"):
        answers("--samples", 4)
    for idle in ("--seed", "--top-p"):
        with pytest.raises(SystemExit, match="--seed and --top-p do nothing at temperature 0"):
            answers(idle, 1)
    assert answers("--protocol", "sampled", "--temperature", 0)[0]["sampling"]["samples"]["n=3"] == 1


def test_training_evaluates_greedily_and_averages_over_groups_of_any_size(model):
    network, tokenizer = load(model)
    task = Task(problems=[], demonstrations=[], evaluation=arithmetic.evaluation(4)[2:], instruction="")
    task.verifier = lambda response, problem: sum(map(ord, problem.question)) % 3 == 0
    sampler = Sampler(network, stop_tokens(network, tokenizer), slots=8)
    accuracy, records = evaluate.evaluate(sampler, tokenizer, task, 16)
    by_group = {g: [r["correct"] for r in records if r["group"] == g] for g in sorted(accuracy) if g != "average"}
    means = {group: np.mean(correct) for group, correct in by_group.items()}
    assert accuracy == pytest.approx(means | {"average": np.mean(list(means.values()))})
    assert accuracy["average"] != pytest.approx(np.mean([r["correct"] for r in records])), "the case must differ"
    assert [r["question"] for r in sorted(records, key=lambda r: r["id"])] == [p.question for p in task.evaluation]


def test_an_evaluation_says_before_it_starts_how_many_tokens_it_may_take(model, greedy, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    out.write_text("".join(greedy.read_text().splitlines(keepends=True)[:6]))  # the header and 5 of 12 answers
    call(model, *GREEDY, "--slots", 2, "--out", out)
    assert capsys.readouterr().out.startswith("7 answers, 2 at once: at most 112 tokens")


def test_a_benchmark_runs_from_its_file_to_its_report(model, tmp_path, capsys):
    rows = [dict(problem="1+1", answer="2", level=n % 2, subject="s") for n in range(3)]
    (tmp_path / "math500.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    row = dict(question="1+1", final_answer=["2"], unit="km", error="1e-1", subfield="a", answer_type="b")
    (tmp_path / "olympiadbench.jsonl").write_text((json.dumps(row) + "\n") * 3)
    out = tmp_path / "a.jsonl"
    flags = ["--benchmarks", "olympiadbench,math500", "--benchmark-dir", tmp_path, "--max-new-tokens", 4, "--out", out]
    call(model, *flags, "--problems", 2)
    records = lines(out)[1:]
    assert [r["group"] for r in records] == ["olympiadbench"] * 2 + ["math500"] * 2
    assert (records[0]["tolerance"], records[0]["unit"], records[0]["labels"]) == (
        0.05,
        "km",
        ["subfield a", "answer_type b"],
    )
    assert "| math500 | level 1 | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="made with another data"):  # the third problem is part of the hash
        call(model, *flags)


def test_the_paper_s_protocol_is_greedy_with_5000_tokens_and_the_sampled_one_as_customary():
    assert {
        "paper": evaluate.Sampling(temperature=0.0, top_p=1.0, samples=1, max_new_tokens=5000),
        "sampled": evaluate.Sampling(temperature=0.6, top_p=0.95, samples=None, max_new_tokens=8192),
    } == evaluate.PROTOCOLS
    assert {n: b.samples for n, b in BENCHMARKS.items()} == dict(
        math500=4, minerva_math=4, olympiadbench=4, aime24=32, amc23=32, gsm8k=1, gpqa=8, mmlu_pro=1
    )
    assert {n for n, b in BENCHMARKS.items() if b.tolerance} == {"minerva_math"}


def test_the_sampled_protocol_writes_four_answers_to_each_problem_of_no_benchmark(model, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"question": "1+2", "answer": "3"}\n{"question": "2+2", "answer": "4"}\n')
    flags = ("--protocol", "sampled", "--max-new-tokens", 4, "--template", "plain", "--out", tmp_path / "out.jsonl")
    call(model, "--data", tmp_path / "own.jsonl", *flags)
    answers = [(r["question"], r["sample"]) for r in lines(tmp_path / "out.jsonl")[1:]]
    assert answers == [(question, i) for question in ("1+2", "2+2") for i in range(4)]


def test_hashes_change_with_any_problem_and_any_weight(tmp_path):
    problems = [Problem("q", "1"), Problem("r", "2")]
    changed = [Problem("q", "1"), Problem("r", "3")]
    assert fingerprint(Task(problems, [], [])) != fingerprint(Task(changed, [], []))
    hashes = set()
    for name, content in (
        ("a.safetensors", "x"),
        ("a.safetensors", "y"),
        ("pytorch_model.bin", "x"),
        ("config.json", "x"),
    ):
        (tmp_path / name).write_text(content)
        hashes.add(weights_hash(str(tmp_path)))
    assert len(hashes) == 4


def test_every_cell_of_the_report_follows_from_the_records():
    records = [record("g", p, s, correct=(p + s) % 4 == 0, tokens=10 * p + s, reason="no_answer" if p == 3 else "equal",
                      finish_reason="length" if s else "stop") for p in range(4) for s in range(2)]  # fmt: skip
    text = report({"sampling": {"temperature": 1}}, summarise(records))
    assert text.splitlines()[0] == "|  | problems | n | avg@n | pass@2 | majority | cut off | no box | tokens |"
    cells = [c.strip().split(" [")[0] for c in text.splitlines()[2].split("|")[1:-1]]
    assert cells == ["g", "4", "2", "25.0", "50.0", "25.0", "50.0", "25.0", "16"]
    assert text.splitlines()[3].startswith("| average of 1 |")


def test_the_compared_average_is_over_the_five(few_draws):
    a = [record(g, i, correct=True) for g in PAPER for i in range(4)] + [
        record("gsm8k", i, correct=False) for i in range(4)
    ]
    b = [r | dict(correct=not r["correct"]) for r in a]
    last = scores.compare([("a", {"data": 0}, a), ("b", {"data": 0}, b)]).splitlines()[-1]
    assert "+100.0" in last
    assert last.rpartition("| -100.0")[0]  # the average, without gsm8k, is the last column


def test_an_answer_written_twice_counts_once(model, greedy, tmp_path):
    copy = tmp_path / "a.jsonl"
    header, *records = greedy.read_text().splitlines(keepends=True)
    copy.write_text("".join([header, *records, *records]))
    call(model, *GREEDY, "--out", copy)
    assert copy.read_text() == greedy.read_text()


def test_an_interrupted_evaluation_continues_and_ends_with_the_same_file(model, sampled, tmp_path):
    text, copy = sampled.read_text(), tmp_path / "cut.jsonl"
    for length in (len(text) // 3, 2 * len(text) // 3):
        copy.write_text(text[:length])  # ends within a line and within a problem's samples
        call(model, *SAMPLED, "--out", copy)
        assert sorted(map(str, lines(copy))) == sorted(map(str, lines(sampled)))
    with (
        alone(copy, copy.with_name(".cut.jsonl.lock")),
        pytest.raises(SystemExit, match=rf"^evaluate\.py: {copy} is in use by another process: wait for its end, "),
    ):
        call(model, *SAMPLED, "--out", copy)
    assert [p.name for p in tmp_path.iterdir() if p.name != "cut.summary.json"] == ["cut.jsonl"]
    with pytest.raises(SystemExit, match=r"exists and was made with another sampling, seed: choose another --out"):
        call(model, *SAMPLED, "--seed", 1, "--samples", 3, "--out", sampled)
    assert sampled.read_text() == text


def test_two_ranks_write_what_one_writes(model, sampled, tmp_path):
    """Slots of 1 give each rank one problem at a time, so one rank has none for the third."""
    for status, _, errors in fork_ranks(partial(call, model, *SAMPLED, "--out", tmp_path / "two.jsonl"), 2):
        assert status == 0, errors[-2000:]
    assert lines(tmp_path / "two.jsonl") == lines(sampled)
    assert (tmp_path / "two.summary.json").read_text() == sampled.with_suffix(".summary.json").read_text()


def test_regrading_needs_no_model_and_repairs_the_verdicts(greedy, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    header, *records = lines(greedy)
    records[0] |= dict(response=rf"so \boxed{{{records[0]['answer']}}}", correct=False, reason="different")
    out.write_text("".join(json.dumps(r) + "\n" for r in (header, *records)))
    call("--regrade", out)
    assert "1 of 12 verdicts changed" in capsys.readouterr().out
    assert lines(tmp_path / "a.regraded.jsonl")[1]["correct"]
    assert not lines(out)[1]["correct"]  # the old file is unchanged


def test_the_table_compares_runs_problem_by_problem(tmp_path, capsys, few_draws):
    rng = random.Random(0)
    header = dict(data={"g": dict(problems=80, sha256="x")}, sampling=dict(temperature=0.0, samples={"g": 1}))
    for name, chance in (("weak", 0.3), ("strong", 0.8)):
        records = [record(problem=i, correct=rng.random() < chance) for i in range(80)]
        write_results(tmp_path / f"{name}.jsonl", header, records)
    call("--table", tmp_path / "weak.jsonl", tmp_path / "strong.jsonl")
    printed = capsys.readouterr().out
    assert "/weak |" in printed
    assert "/strong − " in printed and "p<0.001" in printed  # noqa: PT018
    write_results(tmp_path / "other.jsonl", header | dict(data={"g": dict(problems=80, sha256="y")}), records)
    with pytest.raises(SystemExit, match=r"other and .*/weak were evaluated on different data"):
        call("--table", tmp_path / "weak.jsonl", tmp_path / "other.jsonl")
    write_results(tmp_path / "short.jsonl", header, records[:-1])
    with pytest.raises(
        SystemExit, match=r"short\.jsonl holds 79 of 80 answers: the command that made it will finish it"
    ):
        call("--table", tmp_path / "weak.jsonl", tmp_path / "short.jsonl")


DAMAGE = {  # a file and the end of the message
    '{"question": "1+1"}\n': "line 1: there is no header; this is no result file of evaluate.py",
    "": "line 1: there is no header; this is no result file of evaluate.py",
    "# BRIDGE\n": "line 1: not valid JSON",
    '{"header": {"data": {}, "sampling": {}}}\n[1]\n': "line 2: a JSON object is needed",
}


@pytest.mark.parametrize("text", DAMAGE)
def test_a_file_of_another_kind_ends_in_one_line_with_its_name_and_stays_as_it_is(text, greedy, model, tmp_path):
    other = tmp_path / "a.jsonl"
    other.write_text(text)
    for flags in (("--regrade", other), ("--table", greedy, other), (model, *GREEDY, "--out", other)):
        with pytest.raises(SystemExit, match=rf"^evaluate\.py: \S*a\.jsonl, {DAMAGE[text]}[^\n]*$"):
            call(*flags)
    assert other.read_text() == text


# Run folders


METRICS = '{"step": 1, "reward": 0.5, "response_tokens": 9, "cooperative_gain": null, "seconds": {"rl": 0.1}}\n'
EVALS = '{"step": 0, "policy": {"n=3": 0.5, "average": 0.5}, "shadow": {"n=3": 0.25, "average": 0.25}}\n'


@pytest.fixture
def run_folder(tmp_path):
    """A run of bridge.py as evaluate.py and plot.py read it, without weights."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"settings": {"method": "bridge", "seed": 0}}')
    (tmp_path / "run" / "metrics.jsonl").write_text(METRICS * 3)
    (tmp_path / "run" / "evals.jsonl").write_text(EVALS * 2)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not valid JSON"),
        ("[1]", "a JSON object is needed"),
        ("{}", r"no settings of this version \('settings'\)"),
        ('{"settings": {"seed": "0"}}', "no settings of this version "),
        ('{"settings": {"method": "ppo"}}', r"no settings of this version \(method must be one of"),
    ],
)
def test_a_damaged_config_ends_in_one_line_with_its_file(run_folder, text, message):
    (run_folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit, match=rf"^evaluate\.py: \S*config\.json: {message}[^\n]*$"):
        call(run_folder)


def test_evaluation_refuses_an_unfinished_run_and_unknown_settings(run_folder):
    (run_folder / "config.json").write_text('{"settings": {"method": "bridge", "seed": 0, "old": 1}}')
    with pytest.raises(SystemExit, match=r"config\.json: no settings of this version \(.*'old'\)$"):
        call(run_folder)
    (run_folder / "model").rmdir()
    with pytest.raises(SystemExit, match=r"has no model/ yet: the run has not finished, --resume continues it"):
        call(run_folder)


def test_problems_come_from_the_data_flag_the_run_s_files_or_the_built_in_task(tmp_path):
    for name in ("train", "eval"):
        rows = [dict(question=f"{name} {i}", answer=str(i)) for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    s = Settings(method="rl", rl_data=f"{tmp_path}/train.jsonl", eval_data=f"{tmp_path}/eval.jsonl", template="plain")

    def questions(s, *flags):
        task = evaluate.find_task(evaluate.parse(["run", "--problems", "2", *flags]), s)
        return [p.question for p in task.evaluation], task.template

    assert questions(s) == (["eval 0", "eval 1"], "plain")
    assert questions(s, "--data", s.rl_data, "--template", "") == (["train 0", "train 1"], "")
    assert questions(Settings())[0] == [p.question for p in arithmetic.evaluation(2)]
    with pytest.raises(DataError, match="eval_problems: the task has 200 of each group"):
        questions(Settings(), "--problems", "201")


def test_evaluation_of_a_run_on_a_named_task_reads_no_demonstrations(tmp_path, monkeypatch):
    (tmp_path / "eval.jsonl").write_text(json.dumps(dict(question="1+1", answer="2")))
    read = []
    monkeypatch.setattr(named, "rows_of", lambda source, setting: read.append(source) or [])
    s = Settings(task="math_level3to5", eval_data=f"{tmp_path}/eval.jsonl")
    task = evaluate.find_task(evaluate.parse(["run"]), s)
    assert [p.question for p in task.evaluation] == ["1+1"]
    assert read == [named.MATH_LEVEL3TO5]


def test_figures_need_no_evaluation_and_ignore_a_torn_line(run_folder, tmp_path, capsys):
    for name in ("metrics.jsonl", "evals.jsonl"):
        with open(run_folder / name, "a") as file:
            file.write('{"step": 2, "sec')
    run_main(plot, run_folder, run_folder, "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"^plot\.py: Format 'xyz' is not supported"):
        run_main(plot, run_folder, "--out", tmp_path / "a.xyz")
    with pytest.raises(SystemExit, match=r"is no run folder: it has no metrics\.jsonl"):
        run_main(plot, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", METRICS + "[1]\n", "line 2: a JSON object is needed"),
        ("metrics.jsonl", METRICS + '{"step": 2, "sec\n', "line 2: not valid JSON"),
        ("evals.jsonl", EVALS + "\udcff\n", "line 2: not valid JSON"),
    ],
)
def test_a_line_of_a_log_that_is_no_object_ends_in_one_line_with_file_and_line(run_folder, name, text, message):
    (run_folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit, match=rf"^plot\.py: \S*{name}, {message}[^\n]*$"):
        run_main(plot, run_folder, "--out", run_folder / "a.png")


# Questions of one's own


def test_a_run_answers_a_question_with_its_base_model_its_policy_and_its_shadow(finished_run, capsys):
    run, questions = finished_run("--steps", "2", "--save-every", "1"), ["7*7+9*4", "3+4"]
    call(run, *(word for question in questions for word in ("--ask", question)))
    printed = capsys.readouterr().out
    shadow = export.merged_policy(run, checkpoint.newest(run / "checkpoint"), Settings(**SMOKE), "theta_hat")
    titles = ("base model arithmetic-smoke", "policy after 2 steps of bridge", "shadow at step 2")
    models = (load("arithmetic-smoke"), load(str(run / "model")), shadow)
    for question in questions:
        lines_of = [question]
        for title, (network, tokenizer) in zip(titles, models, strict=True):
            stop = stop_tokens(network, tokenizer)
            prompt = tokenizer.encode(f"Q:{question}=", add_special_tokens=False)
            ((completion,),) = Sampler(network, stop).generate([prompt], [(0, 0)], 1, 80, 0.0)
            cut = " … (cut off)" * (completion.finish_reason == "length")
            lines_of += [f"--- {title}", completion.text(tokenizer, stop) + cut]
        assert "\n".join(lines_of) in printed


def test_the_shadow_of_a_checkpoint_is_theta_hat_with_the_adapter(finished_run):
    run = finished_run("--steps", "2", "--save-every", "1")
    tensors, saved = tensors_in(run / "checkpoint"), checkpoint.newest(run / "checkpoint")
    s = Settings(**SMOKE)
    model, _ = load(str(run / "model"))
    w = lora.create(model, s.lora_targets.split(","), s.lora_rank, 0)
    adapter = {name: tensors[f"w.{i}"] for i, name in enumerate(w)}
    for base in ("theta", "theta_hat"):
        merged, _ = export.merged_policy(run, saved, s, base)
        for i, (name, parameter) in enumerate(merged.named_parameters()):
            expected, layer = tensors[f"{base}.{i}"], name.removesuffix(".weight")
            if f"{layer}.lora_A.weight" in adapter:
                A, B = (adapter[f"{layer}.lora_{letter}.weight"] for letter in "AB")
                expected = expected + s.lora_alpha / s.lora_rank * B @ A
            torch.testing.assert_close(parameter.data, expected)
    assert not torch.equal(tensors["theta.0"], tensors["theta_hat.0"])


def test_a_run_without_a_checkpoint_says_so_in_one_line(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run("--steps", "2", "--save-every", "1"), run)
    shutil.rmtree(run / "checkpoint")
    call(run, "--ask", "1+1", "--max-new-tokens", 4)
    assert f"no shadow: {run}/checkpoint has no checkpoint" in capsys.readouterr().out


def test_a_model_answers_alone_and_temperature_and_seed_change_its_answer(model, capsys):
    def answers(*flags):
        call("arithmetic-smoke", "--ask", "1+1+1+1+1+1", *flags)
        return capsys.readouterr().out

    greedy, seed_0, seed_1 = answers(), answers("--temperature", 1.5), answers("--temperature", 1.5, "--seed", 1)
    assert greedy.startswith("1+1+1+1+1+1\n--- arithmetic-smoke\n")
    assert len({greedy, seed_0, seed_1}) == 3
    assert seed_0 == answers("--temperature", 1.5)
    with pytest.raises(SystemExit, match="--seed and --top-p do nothing at temperature 0"):
        answers("--seed", 1)


def test_questions_have_the_instruction_and_the_template_of_the_run(tmp_path):
    def prompt(source, s, *flags):
        task = evaluate.find_task(evaluate.parse([source, *flags]), s)
        return task.instruction, task.template

    (tmp_path / "go.py").write_text("from tasks.task import *\ndef f(s): return Task([], [], [], ' Go.', 'plain')")
    ask, own = ("--ask", "q"), Settings(task=f"{tmp_path}/go.py:f")
    assert prompt("run", Settings(), *ask) == prompt("logic-laptop", None, *ask) == ("", "")
    assert prompt("run", Settings(task="limr", template="qwen-boxed"), *ask) == (INSTRUCTION, "qwen-boxed")
    assert prompt("owner/name", None, "--template", "plain", *ask) == (INSTRUCTION, "plain")
    assert prompt("run", own, *ask) == prompt("run", own) == (" Go.", "plain")
    assert prompt("run", own, "--template", "", *ask) == (" Go.", "")


# The command line


@pytest.mark.parametrize(
    "flags",
    ["", "m --regrade x", "--ask q", "--ask q --regrade x", "m --seed -1", "m --slots 0",
     "m --data x --benchmarks paper", "m --data x --task legs", "--regrade x --task legs",
     "m --temperature -1", "m --top-p 0", "m --top-p 1.1",
     "--table a b --samples 4", "--table a b --out c", "--regrade a --seed 3", "m --ask q --problems 3"],
)  # fmt: skip
def test_a_command_that_makes_no_sense_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        call(*flags.split())
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("program", ["bridge.py", "evaluate.py", "plot.py"])
@pytest.mark.parametrize("stream", ["| true"])
def test_the_help_needs_no_terminal_and_no_encoding(program, stream):
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    command = ["bash", "-o", "pipefail", "-c", f"{sys.executable} {program} --help {stream}"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_reports_are_printed_in_any_encoding(greedy, monkeypatch, few_draws):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    start_program()
    call("--table", greedy, greedy)
    stream.flush()
    assert b" ? " in stream.buffer.getvalue()  # the minus sign of the differences


class NotebookStream:
    """A stream of a notebook, which has no encoding to change and no file descriptor."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def getvalue(self):
        return self.text


def cell(program, *flags, stream=NotebookStream):
    """What `%run PROGRAM FLAGS` prints in a notebook, or the message with which it exits."""
    out = stream()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(stream()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as ended:
            return ended.code or out.getvalue()
    return out.getvalue()


@pytest.mark.parametrize("stream", [NotebookStream, io.StringIO])
def test_every_program_runs_in_a_notebook_and_under_any_stream(finished_run, tmp_path, greedy, few_draws, stream):
    assert "usage: bridge.py" in cell("bridge.py", "--help", stream=stream)
    assert "GiB" in cell("bridge.py", "--dry-run", "--gpu", "h100", stream=stream)
    assert "n=3" in cell("evaluate.py", "--table", greedy, greedy, stream=stream)
    assert "verdicts changed" in cell("evaluate.py", "--regrade", greedy, "--out", tmp_path / "r", stream=stream)
    assert cell("plot.py", tmp_path, stream=stream) == f"plot.py: {tmp_path} is no run folder: it has no metrics.jsonl"
    run = finished_run("--steps", "2")
    assert cell("plot.py", run, "--out", tmp_path / "f.png", stream=stream) == f"{tmp_path / 'f.png'}\n"


def test_gradients_are_on_again_after_a_cell_that_evaluates(tmp_path):
    (tmp_path / "broken.py").write_text("def f(s): raise KeyError('mine')")
    (tmp_path / "m").mkdir()
    assert "answers in" in cell("evaluate.py", "arithmetic-smoke", *GREEDY, "--out", tmp_path / "one.jsonl")
    assert torch.is_grad_enabled()
    assert "without a usable model" in cell("evaluate.py", tmp_path / "m", *GREEDY)
    assert torch.is_grad_enabled()
    config = {"settings": {"task": f"{tmp_path}/broken.py:f"}}
    (tmp_path / "m/metrics.jsonl").write_text("")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/model").mkdir()
    with pytest.raises(KeyError, match="mine"):
        cell("evaluate.py", tmp_path / "m")
    assert torch.is_grad_enabled()


def test_a_closed_pipe_or_a_full_disk_ends_in_one_line(greedy, tmp_path):
    for text, file in (("Broken pipe", None), ("No space left", "/dev/full")):
        reader, writer = os.pipe()
        os.close(reader)
        with open(file or writer, "w") as stream, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit, match=rf"^evaluate\.py: [^\n]*{text}[^\n]*$"):
                call("--regrade", greedy, "--out", tmp_path / "r.jsonl")
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # takes what is left in the buffer


def test_the_help_names_every_benchmark():
    assert evaluate.NAMES.split(",") == list(BENCHMARKS)
