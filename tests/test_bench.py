"""The benchmarks run at small sizes, their results are right, and every row has the facts of its run."""

import gzip
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Forked, lines

BENCH = Path(__file__).parents[1] / "bench"
PARTS = {"head", "attention", "steps", "rollouts", "gap", "peers", "sampling", "built-in", "step", "training"}


def run_step(*words):
    """Runs bench/step.py in this process, with everything loaded already."""
    sys.argv = ["step.py", *map(str, words)]
    sys.path.insert(0, str(BENCH))
    runpy.run_path(str(BENCH / "step.py"), run_name="__main__")


def test_every_benchmark_runs_at_small_sizes_with_right_results(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "BRIDGE_COMMIT": "abc123"}
    command = [sys.executable, BENCH / "all.py", "--quick", "--out", tmp_path / "rows.jsonl"]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stdout[-1000:] + finished.stderr[-2000:]
    rows = lines(tmp_path / "rows.jsonl")
    check_facts_of_the_run(rows)
    check_results(rows)
    check_phases_of_a_step([row for row in rows if row["part"] == "step"])


def check_facts_of_the_run(rows):
    assert {row["part"] for row in rows} == PARTS
    assert list(dict.fromkeys(row["bench"] for row in rows)) == ["step", "decode", "head"], "most important first"
    for row in rows:
        assert row["quick"] is True
        assert row["commit"] == "abc123"
        assert {"device", "torch", "triton", "transformers", "copy_gbps", "matmul_tflops"} <= set(row)


def check_results(rows):
    ours = [row for row in rows if row.get("impl", "").startswith("ours")]
    assert {row["part"] for row in ours} == {"head", "attention", "sampling"}
    assert all(row["logp error"] < 1e-5 and row["logp > 0"] == 0 for row in ours if row["part"] == "head")
    assert all(row["dH error"] < 1e-5 for row in ours if row["part"] == "head" and row["mode"] != "score")
    assert all(row["dW error"] < 1e-5 for row in ours if row["part"] == "head" and row["mode"] == "trained")
    assert all(row["error"] < 1e-5 for row in ours if row["part"] == "attention")
    assert all(row["p-value"] > 1e-4 for row in ours if row["part"] == "sampling")
    (gap,) = (row for row in rows if row["part"] == "gap")
    assert gap["max gap"] < 1e-4


def check_phases_of_a_step(step):
    assert [row["phase"] for row in step] == ["sample", "rl", "shadow", "sft", "reduce", "optimizer", "step"]
    assert all(row["s"] > 0 and row["peak GiB"] > 0 and row["computed GiB"] > 0 for row in step)
    assert all(row["tokens"] > 0 for row in step if row["phase"] in ("sample", "rl", "shadow", "sft"))


def test_a_trace_of_a_step_has_its_phases_as_ranges_and_flags_of_bridge_apply(tmp_path):
    trace, out = tmp_path / "trace.json.gz", tmp_path / "rows.jsonl"
    flags = ["--method", "rl", "--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "8"]
    measured = ["--size", "tiny", "--steps", "1", "--never-stop", "--trace", trace, "--out", out]
    status, _, err = Forked(lambda: run_step(*measured, *flags)).finish()  # --size changes malloc for the process
    assert status == 0, err[-2000:]
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {"sample", "rl", "optimizer"} <= {event["name"] for event in events if event.get("cat") == "user_annotation"}
    (sample,) = (row for row in lines(out) if row["phase"] == "sample")
    assert sample["tokens"] == 2 * 2 * 8, "no completion stops"
    assert "shadow" not in {row["phase"] for row in lines(out)}


def test_steps_beside_trl_and_the_growth_of_a_step_are_measured_and_drawn(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    out, figure = tmp_path / "rows.jsonl", tmp_path / "speed.png"
    run_step("--quick", "--peer", "trl", "--sweep", "--out", out)
    run_step("--figure", out, "--out", figure)
    peer, sweep = ([row for row in lines(out) if row["part"] == part] for part in ("peer", "sweep"))
    assert [row["implementation"] for row in peer] == ["TRL", "ours, GRPO", "ours, BRIDGE"]
    assert all(row["tokens"] > 0 and row["sample %"] + row["train %"] < 100 for row in peer)
    assert [row["tokens"] for row in sweep] == [128, 256, 128, 192, 128, 128], "no completion ends"
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("names", [["step", "decode", "head"], ["head", "step"], ["decode"]])
def test_the_limits_of_the_chosen_benchmarks_sum_to_nine_minutes(names):
    limits = runpy.run_path(BENCH / "all.py")["limits"](names)
    assert sorted(limits) == sorted(names)
    assert 535 < sum(limits.values()) <= 540


def test_without_git_the_commit_is_empty_and_the_environment_can_give_it(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCH)
    import measure

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("BRIDGE_COMMIT", raising=False)
    assert measure.commit() == ""
    monkeypatch.setenv("BRIDGE_COMMIT", "abc123")
    assert measure.commit() == "abc123"


def test_the_page_has_the_predicted_speeds(monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCH)
    import predict

    predict.main()
    page = (BENCH.parent / "docs" / "scaling.md").read_text()
    assert re.findall(r"^\| `.* H200 .*", page, re.MULTILINE) == capsys.readouterr().out.splitlines()
