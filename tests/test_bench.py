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
from conftest import VOCABULARY, Forked, lines, tiny_model

import logprob
from ops.packed import pack
from sampler import Sampler
from settings import Settings

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


@pytest.fixture
def limit(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import limit

    return limit


def test_the_flops_of_a_pass_are_those_counted_by_hand(limit):
    # Rows of 4 and 1 tokens, without their last ones; 3 response tokens; 1+2+3+4 and 1 pairs of a query and a key
    rows = [([1, 2, 3], [4, 5]), ([6], [7])]
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48  # weights: queries, keys, values; output; gate, up and down
    by_hand = 6 * (2 * layer * 5 + VOCABULARY * 32 * 3) + 12 * 2 * 32 * 11  # attention's 32 channels in 2 layers
    s = Settings(tokens_per_micro_batch=4)
    trained = limit.work_of_pass(rows, s, None, [])
    assert len(trained) == 2, "micro-batches"
    assert limit.flops_and_bytes(tiny_model(), trained)[0] == by_hand
    scored = limit.work_of_pass(rows, s, [], [0, 1])
    assert limit.flops_and_bytes(tiny_model(), scored)[0] == by_hand / 3


def test_rows_that_a_pass_skips_and_tokens_that_rows_share_are_no_work(limit):
    rows = [([1, 2], [3, 4, 5]), ([1, 2], [3, 4, 5]), ([1, 2], [6]), ([7, 8, 9], [1])]
    (work,) = limit.work_of_pass(rows, Settings(), [0, 1, 2], [])
    assert (work.tokens, work.responses) == (4, 3 + 1), "fed 1 2 3 4; 3, 4, 5 and 6 are predicted"
    assert work.pairs == 1 + 2 + 3 + 4


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_sampling_counts_a_prefix_that_samples_share_once(limit, temperature):
    sampler = Sampler(tiny_model(), [VOCABULARY])  # none ends
    with limit.recorded(sampler.decoder) as works:
        (group,) = sampler.generate([[1, 2, 3]], [(0,)], 4, 6, temperature)
    prefixes = {tuple(completion.ids[:n]) for completion in group for n in range(1, 6)}  # the last token is not fed
    if temperature == 0:
        assert len(prefixes) == 5, "greedy samples are equal"
    else:
        assert 5 < len(prefixes) < 4 * 5, "the samples part after some tokens"
    assert [work.tokens for work in works] == [3, *(sum(len(p) == n for p in prefixes) for n in range(1, 6))]
    assert sum(work.responses for work in works) == 1 + len(prefixes)
    assert sum(work.pairs for work in works) == 1 + 2 + 3 + sum(3 + len(p) for p in prefixes)


def test_the_limit_of_every_phase_is_measured_beside_peers(limit, tmp_path, monkeypatch, capsys):
    fed = []  # tokens of each micro-batch of ours

    def counted(sequences, device):
        fed.append(len(pack(sequences, device).ids[0]))
        return pack(sequences, device)

    monkeypatch.setattr(logprob, "pack", counted)
    program = tmp_path / "llama-batched-bench"
    program.write_text("""#!/bin/sh\necho loading\necho '{"t": 0.5}'\n""")
    program.chmod(0o755)
    out = tmp_path / "rows.jsonl"
    words = ["limit.py", "--quick", "--out", out, "--llama-bench", program, "--gguf", "tiny.gguf", "--group-size", "2"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    monkeypatch.setattr(sys, "path", [*sys.path])
    limit.main()
    rows = {(row["phase"], row["implementation"]): row for row in lines(out)}
    peers = {("rl", "transformers"), ("sft", "transformers"), ("decode", "transformers"), ("decode", "llama.cpp, tiny")}
    phases = ("rl", "shadow", "sft", "sample", "decode")
    assert rows.keys() == peers | {(phase, name) for phase in phases for name in ("ours", "matmuls")}
    assert rows["decode", "llama.cpp, tiny"]["ms"] == 500, "the program's own time"
    assert rows["decode", "ours"]["tokens"] == 8 * 2 * 80, "no completion ends"
    counts = [rows[phase, "ours"]["tokens"] for phase in ("rl", "shadow", "sft")]
    assert sum(fed) == 2 * sum(counts), "two turns; groups of equal rewards and shared tokens are not fed"
    for (phase, _), row in rows.items():
        assert row["floor ms"] == rows[phase, "matmuls"]["ms"]
        assert row["GFLOP"] >= rows[phase, "matmuls"]["GFLOP"], "attention is in no matmul of the floor"
    assert "omitted" not in capsys.readouterr().out


def test_a_checkout_beside_itself_makes_the_same_steps(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import pair

    out = tmp_path / "rows.jsonl"
    words = ["pair.py", BENCH.parent, "--out", out, "--steps", "1", "--preset", "smoke"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    pair.main()
    old, new = lines(out)
    assert (old["checkout"], new["checkout"], old["x old"]) == ("old", "new", 1)
    assert old["tokens"] == new["tokens"] > 0
    phases = [name for name in new if name.endswith(" ms")]
    assert phases == ["sample ms", "rl ms", "shadow ms", "sft ms", "reduce ms", "optimizer ms"]
    assert all(row["ms"] > max(row[name] for name in phases) and row["peak GiB"] > 0.1 for row in (old, new))
