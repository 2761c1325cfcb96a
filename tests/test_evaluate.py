"""evaluate.py: the numbers are what their definitions say, and a result file survives interruption and more ranks."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import lines

import evaluate
import rewards
from grading.scores import interval, majority, paired_test, pass_at_k, summarise
from tasks import arithmetic as toy
from tasks import benchmarks
from tasks import task as tasks
from tasks.benchmarks import BENCHMARKS, PAPER, read_benchmark

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def call(*flags) -> None:
    sys.argv = ["evaluate.py", *map(str, flags)]
    evaluate.main()


@pytest.fixture(autouse=True)
def _command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def model():
    return str(toy.build_base("arithmetic-smoke"))


def record(group="g", problem=0, sample=0, correct=True, **more):
    return dict(group=group, id=problem, sample=sample, correct=correct, extracted="1" if correct else "2",
                reason="equal", finish_reason="stop", tokens=5, labels=()) | more  # fmt: skip


# Numbers


def test_pass_at_k_is_the_share_of_k_subsets_that_hold_a_right_answer():
    rng = np.random.default_rng(0)
    correct = (rng.random((20, 6)) < 0.3).astype(float)
    for k in range(1, 7):
        subsets = [[max(row[list(s)]) for s in itertools.combinations(range(6), k)] for row in correct]
        np.testing.assert_allclose(pass_at_k(correct, k), np.mean(subsets, axis=1), atol=1e-12)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples per problem, there are 6"):
            pass_at_k(correct, k)


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


def test_the_paired_test_sees_a_small_steady_difference_and_not_noise():
    rng = np.random.default_rng(5)
    difficulty = rng.random(200)
    a = (difficulty > 0.5).astype(float)
    better = (difficulty > 0.42).astype(float)
    difference, low, high, p = paired_test([a], [better])
    assert 0 < low < difference < high
    assert p < 0.001
    assert paired_test([better], [a])[0] == pytest.approx(-difference)
    assert paired_test([a], [a]) == (0, 0, 0, 1)
    p_values = [paired_test([rng.random(50)], [rng.random(50)], 500)[3] for _ in range(100)]
    assert sum(p < 0.05 for p in p_values) <= 12  # about 5 of 100 by chance


def test_the_average_is_the_plain_mean_of_the_paper_s_five_where_all_five_are_there():
    records = [record(g, i, correct=i < n) for n, g in enumerate(PAPER) for i in range(4)]
    records += [record("gsm8k", i) for i in range(4)]
    assert summarise(records)["average"]["accuracy"][0] == pytest.approx((0 + 1 + 2 + 3 + 4) / 4 / 5)
    assert summarise(records)["average"]["of"] == list(PAPER)
    fewer = [r for r in records if r["group"] in ("math500", "gsm8k")]
    assert summarise(fewer)["average"]["accuracy"][0] == pytest.approx(0.5)


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


def test_problems_are_paired_by_their_id_whatever_order_they_were_answered_in():
    records = [record(problem=i, correct=i % 3 == 0) for i in range(30)]
    shuffled = random.Random(0).sample(records, 30)
    table = evaluate.compare([("a", {"data": 0, "seed": 0}, records), ("b", {"data": 0, "seed": 1}, shuffled)])
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


def test_a_benchmark_that_is_not_there_says_where_to_put_it(tmp_path, capsys):
    with pytest.raises(tasks.DataError, match=r"or put the rows into .*math500\.jsonl"):
        read_benchmark("math500", str(tmp_path))
    (tmp_path / "aime24.jsonl").write_text('{"problem": "1+1?"}\n')
    with pytest.raises(tasks.DataError, match=r"aime24\.jsonl, line 1 is no row of aime24: KeyError\('answer'\)"):
        read_benchmark("aime24", str(tmp_path))
    with pytest.raises(SystemExit, match="no 'aime25'; there are paper, math500"):
        call("arithmetic-smoke", "--benchmarks", "aime25")


# Result files


def test_a_result_file_names_all_that_its_numbers_depend_on_and_holds_every_answer(model, tmp_path, capsys):
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
    assert len(records) == 6 * 2 * 3
    for r in records:
        assert r["prompt"] == f"Q:{r['question']}="
        verdict = rewards.is_correct(r["response"], r["answer"])
        assert (verdict.correct, verdict.extracted, verdict.reason) == (r["correct"], r["extracted"], r["reason"])
    summary = json.loads(out.with_suffix(".summary.json").read_text())
    assert summary["n=3"]["accuracy"][0] == np.mean([r["correct"] for r in records if r["group"] == "n=3"])


def test_settings_reach_the_sampler_and_the_file(model, tmp_path, capsys):
    def answers(*flags):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        call(model, "--problems", 2, "--max-new-tokens", 12, "--out", out, *flags)
        header, *records = lines(out)
        return header["header"], [r["response"] for r in records]

    greedy, sampled = answers(), answers("--temperature", 1)
    assert answers("--temperature", 1, "--top-p", 1e-9)[1] == greedy[1] != sampled[1]  # a nucleus of one token
    assert answers("--temperature", 1, "--seed", 1)[1] != sampled[1]
    assert greedy[0]["grader"] == rewards.VERSION
    named = "model weights dtype prompt sampling seed options_seed grader torch transformers data"
    assert set(greedy[0]) == set(named.split())
    with pytest.raises(SystemExit, match="--samples 4 greedy answers would be the same: set --temperature too"):
        answers("--samples", 4)
    assert answers("--protocol", "sampled", "--temperature", 0)[0]["sampling"]["samples"]["n=3"] == 1


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
    assert evaluate.PROTOCOLS["paper"] == evaluate.Protocol(0.0, 1.0, 1, 5000)
    assert evaluate.PROTOCOLS["sampled"] == evaluate.Protocol(0.6, 0.95, None, 8192)
    assert {n: b.samples for n, b in BENCHMARKS.items()} == dict(
        math500=4, minerva_math=4, olympiadbench=4, aime24=32, amc23=32, gsm8k=1, gpqa=8, mmlu_pro=1
    )
    assert {n for n, b in BENCHMARKS.items() if b.tolerance} == {"minerva_math"}


def test_hashes_change_with_any_problem_and_any_weight(tmp_path):
    problems = [tasks.Problem("q", "1"), tasks.Problem("r", "2")]
    changed = [tasks.Problem("q", "1"), tasks.Problem("r", "3")]
    assert evaluate.data_hash(problems) != evaluate.data_hash(changed)
    hashes = set()
    for name, content in (
        ("a.safetensors", "x"),
        ("a.safetensors", "y"),
        ("pytorch_model.bin", "x"),
        ("config.json", "x"),
    ):
        (tmp_path / name).write_text(content)
        hashes.add(evaluate.weights_hash(str(tmp_path)))
    assert len(hashes) == 4


def test_every_cell_of_the_report_is_what_the_records_say():
    records = [record("g", p, s, correct=(p + s) % 4 == 0, tokens=10 * p + s, reason="no_answer" if p == 3 else "equal",
                      finish_reason="length" if s else "stop") for p in range(4) for s in range(2)]  # fmt: skip
    text = evaluate.report({"sampling": {"temperature": 1}}, summarise(records))
    assert text.splitlines()[0] == "|  | problems | n | avg@n | pass@2 | majority | cut off | no box | tokens |"
    cells = [c.strip().split(" [")[0] for c in text.splitlines()[2].split("|")[1:-1]]
    assert cells == ["g", "4", "2", "25.0", "50.0", "25.0", "50.0", "25.0", "16"]
    assert text.splitlines()[3].startswith("| average of 1 |")


def test_the_compared_average_is_over_the_five(tmp_path):
    a = [record(g, i, correct=True) for g in PAPER for i in range(4)] + [
        record("gsm8k", i, correct=False) for i in range(4)
    ]
    b = [r | dict(correct=not r["correct"]) for r in a]
    last = evaluate.compare([("a", {"data": 0}, a), ("b", {"data": 0}, b)]).splitlines()[-1]
    assert "+100.0" in last
    assert last.rpartition("| -100.0")[0]  # the average, without gsm8k, is the last column


def test_answers_written_twice_count_once(model, tmp_path, capsys):
    flags = (model, "--problems", 2, "--max-new-tokens", 8, "--out", tmp_path / "a.jsonl")
    call(*flags)
    header, *records = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join([header, *records, *records]))
    call(*flags)
    assert (tmp_path / "a.jsonl").read_text().splitlines(keepends=True) == [header, *records]


def test_an_interrupted_evaluation_continues_and_ends_with_the_same_file(model, tmp_path, capsys):
    flags = ("--problems", 3, "--protocol", "sampled", "--samples", 2, "--max-new-tokens", 16, "--slots", 2)
    call(model, *flags, "--out", tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_text()
    for cut in (len(whole) // 3, 2 * len(whole) // 3):
        (tmp_path / "cut.jsonl").write_text(whole[:cut])  # in the middle of a line, of a problem's samples
        call(model, *flags, "--out", tmp_path / "cut.jsonl")
        assert sorted(map(str, lines(tmp_path / "cut.jsonl"))) == sorted(map(str, lines(tmp_path / "whole.jsonl")))
    with pytest.raises(SystemExit, match=r"exists and was made with another sampling, seed: choose another --out"):
        call(model, *flags, "--seed", 1, "--samples", 4, "--out", tmp_path / "whole.jsonl")
    assert (tmp_path / "whole.jsonl").read_text() == whole


def test_two_ranks_write_what_one_writes(model, tmp_path):
    flags = [model, "--problems", "3", "--protocol", "sampled", "--samples", "4", "--max-new-tokens", "16"]
    flags += ["--slots", "1"]  # one problem per rank at a time, so that for the third one rank has none
    call(*flags, "--out", tmp_path / "one.jsonl")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "evaluate.py"), *flags, "--out", str(tmp_path / "two.jsonl")]  # fmt: skip
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert lines(tmp_path / "two.jsonl") == lines(tmp_path / "one.jsonl")
    assert (tmp_path / "two.summary.json").read_text() == (tmp_path / "one.summary.json").read_text()


def test_regrading_needs_no_model_and_repairs_the_verdicts(model, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    call(model, "--problems", 2, "--max-new-tokens", 16, "--out", out)
    header, *records = lines(out)
    records[0] |= dict(response=rf"so \boxed{{{records[0]['answer']}}}", correct=False, reason="different")
    out.write_text("".join(json.dumps(r) + "\n" for r in (header, *records)))
    call("--regrade", out)
    assert "1 of 12 verdicts changed" in capsys.readouterr().out
    assert lines(tmp_path / "a.regraded.jsonl")[1]["correct"]
    assert not lines(out)[1]["correct"]  # the old file stays


def test_the_table_compares_runs_problem_by_problem(tmp_path, capsys):
    rng = random.Random(0)
    header = dict(data={"g": dict(problems=80, sha256="x")}, sampling=dict(temperature=0.0, samples={"g": 1}))
    for name, chance in (("weak", 0.3), ("strong", 0.8)):
        records = [record(problem=i, correct=rng.random() < chance) for i in range(80)]
        evaluate.write_results(tmp_path / f"{name}.jsonl", header, records)
    call("--table", tmp_path / "weak.jsonl", tmp_path / "strong.jsonl")
    printed = capsys.readouterr().out
    assert "/weak |" in printed
    assert "/strong − " in printed and "p<0.001" in printed  # noqa: PT018
    evaluate.write_results(tmp_path / "other.jsonl", header | dict(data={"g": dict(problems=80, sha256="y")}), records)
    with pytest.raises(SystemExit, match=r"other and .*/weak were evaluated on different data"):
        call("--table", tmp_path / "weak.jsonl", tmp_path / "other.jsonl")
    evaluate.write_results(tmp_path / "short.jsonl", header, records[:-1])
    with pytest.raises(
        SystemExit, match=r"short\.jsonl holds 79 of 80 answers: the command that made it will finish it"
    ):
        call("--table", tmp_path / "weak.jsonl", tmp_path / "short.jsonl")
    with pytest.raises(SystemExit, match=r"is no result file of evaluate\.py"):
        call("--table", ROOT / "README.md")


@pytest.mark.parametrize(
    "flags",
    ["", "m --regrade x", "m --seed -1", "m --temperature 1e-300", "m --data x --benchmarks paper",
     "m --slots 0", "m --problems -1", "m --top-p 0", "m --top-p 1.1", "m --temperature -1", "m --temperature nan"],
)  # fmt: skip
def test_a_command_that_makes_no_sense_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        call(*flags.split())
    assert "error: " in capsys.readouterr().err
