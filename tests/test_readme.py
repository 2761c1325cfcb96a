"""The README is true: its commands run, and what it points to exists."""

import ast
import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_function_and_test_named_in_the_readme_exists():
    named = re.findall(r"`(\w+\.py):(\w+)`", README)
    assert len(named) > 30
    for file, name in named:
        path = ROOT / "tests" / file if file.startswith("test_") else ROOT / file
        defined = {n.name for n in ast.walk(ast.parse(path.read_text())) if hasattr(n, "name") and n.name}
        assert name in defined, f"{file}:{name}"


@pytest.mark.parametrize(
    "module",
    [
        "grading.expression",
        "grpo",
        "logprob",
        "infra.model",
        "rewards",
        "grading.scores",
        "settings",
        "tasks.arithmetic",
        "infra.run",
    ],
)
def test_the_examples_in_the_docstrings_are_true(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0 == failed


def test_every_flag_named_in_the_readme_exists():
    from settings import Settings

    known = {f"--{name.replace('_', '-')}" for name in Settings.__dataclass_fields__}
    known |= set(re.findall(r'add\("(--[a-z-]+)"', (ROOT / "evaluate.py").read_text()))
    known |= {
        "--nproc-per-node",
        "--standalone",
        "--max-restarts",
        "--method",
        "--resume",
        "--help",
        "--out",
        "--preset",
        "--dry-run",
        "--seeds",
        "--keep",
        "--table",
        "--quick",
    }
    assert set(re.findall(r"--[a-z][a-z-]+", README)) <= known


def test_the_file_map_is_complete_and_its_line_counts_hold():
    rows = dict(re.findall(r"\| `(\w+\.py)` \| (\d+) \|", README))
    assert set(rows) == {p.name for p in ROOT.glob("*.py")}
    for file, count in rows.items():
        assert int(count) == pytest.approx(len((ROOT / file).read_text().splitlines()), rel=0.1), file


def test_every_metric_is_explained():
    import bridge

    for metric in (*bridge.METRICS, "lora_norm", "tokens_per_second", "seconds", "skipped_in_a_row"):
        prefix = next((p for p in ("grad_norm_", "ratio_hat_", "logp_gap_") if metric.startswith(p)), None)
        assert f"`{metric}`" in README or (prefix and f"`_{metric.removeprefix(prefix)}`" in README), metric


def test_the_results_table_is_what_the_logged_runs_say():
    finished = subprocess.run(
        [sys.executable, ROOT / "bench" / "sweep.py", "--out", ROOT / "bench" / "results" / "laptop.jsonl", "--table"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert finished.stdout.strip() in README


def commands():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    lines = [re.sub(r"\s+#.*", "", line).rpartition("&& ")[2] for line in blocks.splitlines()]
    return [line for line in lines if line.startswith("python ")]


def test_the_readme_s_commands_run_on_the_smoke_preset(tmp_path):
    assert len(commands()) >= 5
    for command in commands():
        _, script, *rest = shlex.split(command.replace("laptop", "smoke"))
        smoke = ["--preset", "smoke"] if script == "bridge.py" else []
        finished = subprocess.run(
            [sys.executable, ROOT / script, *smoke, *rest], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert finished.returncode == 0, f"{command}\n{finished.stderr[-2000:]}"
    assert (tmp_path / "compare.png").exists()
