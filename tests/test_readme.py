"""README and docs are true: their commands run, and the functions, flags, metrics and numbers they name exist."""

import ast
import contextlib
import doctest
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import lines

from infra.run import METRICS
from settings import METHODS, PRESETS, Settings

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
EVERYTHING = "\n".join(PAGES.values())
OTHERS = {  # flags of torchrun, pip, srun and other evaluators, of bench/, and those beside the settings of bridge.py
    "--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--max-restarts",
    "--shutdown-timeout", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--signal",
    "--signals-to-handle", "--preset", "--out", "--resume", "--dry-run", "--gpu", "--gpus", "--help", "--seeds",
    "--quick", "--size", "--only", "--step", "--trace", "--heap", "--iterations", "--table", "--tune", "--methods",
    "--no-runs", "--rows", "--no-deps", "--keep-rollouts", "--keep-best", "--html", "--dataset", "--backend",
    "--greedy", "--tasks", "--confirm", "--batch", "--target",
}  # fmt: skip


def test_the_pages_have_their_size():
    assert len(PAGES["README.md"].splitlines()) <= 110
    assert len(PAGES["README.md"].encode()) <= 7168
    assert len(PAGES["results.md"].splitlines()) <= 216
    pages = "paper results run data evaluation speed scaling exercises theory derivations lecture"
    assert set(PAGES) == {"README.md", *(f"{name}.md" for name in pages.split())}


def test_the_lecture_has_its_length_at_130_words_a_minute():
    total = 0.0
    parts = re.findall(r"^## .*? \((\d+) minutes\)\n(.*?)(?=^## |\Z)", PAGES["lecture.md"], re.DOTALL | re.MULTILINE)
    for title, body in parts:
        activities = re.findall(r"^\*(?:Show|Ask|Run)\b.*?\*$", body, re.DOTALL | re.MULTILINE)
        spoken = body
        for activity in activities:
            spoken = spoken.replace(activity, "")
        in_brackets = re.findall(r"^\*\w+ \((\d+) minutes?\)", "\n".join(activities), re.MULTILINE)
        minutes = len(spoken.split()) / 130 + sum(map(int, in_brackets))
        assert minutes == pytest.approx(int(title), abs=0.5)
        total += minutes
    assert len(parts) == 8
    assert total == pytest.approx(45, abs=2)


@cache
def names_in(path):
    """The functions, classes and variables that a file defines."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_every_function_test_and_file_that_a_page_names_exists():
    named = set(re.findall(r"`((?:\w+/)*\w+\.py):(\w+)`", EVERYTHING))
    assert len(named) > 50
    for file, name in named:
        folder = ROOT / "tests" if file.startswith("test_") else ROOT
        assert name in names_in(folder / file), f"{file}:{name}"
    for file in re.findall(r"`((?:bench|examples|tests|infra|ops|tasks|grading|docs)/[\w/.]+\.\w+)`", EVERYTHING):
        assert (ROOT / file).exists(), file
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([\w/.-]+\.(?:md|png))", text):
            assert (ROOT / ("" if page == "README.md" else "docs") / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("module", [
    "baselines", "grading.expression", "grading.scores", "grpo", "infra.run", "logprob", "ops.packed", "rewards",
    "tasks.arithmetic", "tasks.logic", "weighed",
])  # fmt: skip
def test_the_examples_in_the_docstrings_are_true(module):
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0 == failed


def test_every_flag_that_a_page_names_exists():
    known = OTHERS | {f"--{name.replace('_', '-')}" for name in Settings.__dataclass_fields__}
    known |= set(re.findall(r'add\("(--[a-z-]+)"', (ROOT / "evaluate.py").read_text()))
    for name in ("step", "limit", "pair"):
        known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', (ROOT / f"bench/{name}.py").read_text()))
    assert set(re.findall(r"--[a-z][a-z-]+", EVERYTHING)) <= known


def test_the_pages_name_every_file_method_preset_metric_and_log():
    assert all(f"`{path.name}`" in PAGES["README.md"] for path in ROOT.glob("*.py"))
    assert all(f"| `{method}` |" in PAGES["README.md"] for method in METHODS)
    assert all(f"`{preset}`" in PAGES["run.md"] for preset in PRESETS)
    for metric in (*METRICS, "seconds"):
        prefix = next((p for p in ("grad_norm_", "ratio_hat_", "logp_gap_") if metric.startswith(p)), None)
        assert f"`{metric}`" in PAGES["run.md"] or (prefix and f"`_{metric.removeprefix(prefix)}`" in PAGES["run.md"])


def command(line, tmp_path, monkeypatch):
    """Runs `python FILE ARGUMENTS` in this process, from another folder; returns what it printed."""
    script, *arguments = shlex.split(line)[1:]
    if script == "bridge.py" and "--preset" not in arguments:
        arguments = ["--preset", "smoke", *arguments]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with torch.enable_grad(), open(tmp_path / "printed", "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return (tmp_path / "printed").read_text()


def commands(*pages):
    blocks = "\n".join(block for page in pages for block in re.findall(r"```bash\n(.*?)```", PAGES[page], re.DOTALL))
    stripped = [re.sub(r"\s+#.*", "", line).rpartition("&& ")[2] for line in blocks.splitlines()]
    return [line for line in stripped if re.match(r"python (bridge|evaluate|plot)\.py", line)]


def test_the_commands_of_readme_and_docs_run_on_the_smoke_preset(tmp_path, monkeypatch, finished_run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = [line for page in ("README.md", "run.md", "evaluation.md") for line in commands(page)]
    distinct = {re.sub(r'(--ask "[^"]*" ?)+', "--ask", line): line for line in run if line != "python bridge.py"}
    assert len(distinct) >= 9
    shutil.copytree(finished_run("--method", "bridge", "--steps", "2"), "runs/bridge-smoke-0")  # --resume ends it
    for line in distinct.values():
        command(line.replace("laptop", "smoke"), tmp_path, monkeypatch)
    assert Path("compare.png").exists()


def test_the_dry_runs_of_the_docs_run(tmp_path, monkeypatch):
    dry = [line for line in commands(*PAGES) if "--dry-run" in line]
    assert dry
    for line in dry:
        assert "peak" in command(line, tmp_path, monkeypatch)


def test_the_page_on_data_trains_with_its_task_and_its_reward(tmp_path, monkeypatch):
    import bridge

    task, reward = re.findall(r"```python\n(.*?)```", PAGES["data.md"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": [{"role": "user", "content": f"{i % 10}+{i // 10}"}], "label": {"gold": str(i % 10 + i // 10)},
             "response": f"\\boxed{{{i % 10 + i // 10}}}"} for i in range(100)]  # fmt: skip
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("own.py").write_text(task + "\n\n" + reward)
    flags = ["--task", "own.py:my_task", "--reward", "own.py:weighted", "--template", "plain"]
    sizes = ["--steps", "1", "--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "12"]
    bridge.main(["--preset", "smoke", "--out", "run", *flags, *sizes])
    (metrics,) = lines("run/metrics.jsonl")
    assert metrics["reward"] < 1
    assert os.path.exists("run/model/config.json")


@pytest.mark.parametrize(("method", "per_prompt"), [("bridge", 8), ("srft", 9)])
def test_the_reward_of_the_page_on_data_logs_its_parts(method, per_prompt, tmp_path, monkeypatch):
    import bridge

    _, reward = re.findall(r"```python\n(.*?)```", PAGES["data.md"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(reward)
    sizes = ["--steps", "2", "--prompts-per-step", "4", "--group-size", "8", "--eval-problems", "1"]
    bridge.main(["--preset", "smoke", "--method", method, "--reward", "own.py:weighted", "--out", "run", *sizes])
    assert len(lines("parts.jsonl")) == 2 * 4 * per_prompt
    (means,) = re.findall(r"`(pandas\..*)`", PAGES["data.md"])
    mean = eval(means, {"pandas": importlib.import_module("pandas"), "P": 4, "G": per_prompt})
    assert list(mean.index) == [0, 1]
    assert list(mean.columns) == ["right", "box", "short"]
    if method == "bridge":  # the metrics leave demonstrations out
        metrics = lines("run/metrics.jsonl")
        weighted = mean["right"] + 0.2 * mean["box"] + 0.1 * mean["short"]
        assert list(weighted) == pytest.approx([step["reward"] for step in metrics])
        assert list(mean["right"]) == pytest.approx([step["right_frac"] for step in metrics])
