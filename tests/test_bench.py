"""The benchmarks run, in their small form, and say of every row where it comes from."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import lines

ROOT = Path(__file__).parents[1]


def test_the_plan_is_measured_phase_by_phase(tmp_path):
    command = [sys.executable, ROOT / "bench" / "plan.py", "--quick", "--out", tmp_path / "rows.jsonl"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = lines(tmp_path / "rows.jsonl")
    assert [row["phase"] for row in rows] == ["sample", "rl", "shadow", "sft", "optimizer"]
    assert all(row["peak GiB"] > 0 and row["computed GiB"] > 0 for row in rows)


def test_every_benchmark_runs_in_its_quick_form(tmp_path):
    out = tmp_path / "rows.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "bench" / "all.py", "--quick", "--out", out]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stdout[-1000:] + finished.stderr[-2000:]
    rows = lines(out)
    assert {row["bench"] for row in rows} == {"head", "attention", "sampling", "decode", "train", "step"}
    for row in rows:
        assert row["quick"] is True
        assert {"device", "torch", "triton", "transformers", "commit", "copy_gbps", "matmul_tflops"} <= set(row)
    ours = [row for row in rows if row.get("impl", "").startswith("ours")]
    assert all(row["logp error"] < 1e-5 and row["logp > 0"] == 0 for row in ours if row["bench"] == "head")
    assert all(row["error"] < 1e-5 for row in ours if row["bench"] == "attention")
    assert all(row["p-value"] > 1e-4 for row in ours if row["bench"] == "sampling")
