"""The structure of the project: which file may import which, what loads when, how many places a new task needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import lines
from mutants import MUTANTS

import bridge
import evaluate
import grpo
import settings
import tasks
from infra.model import MODELS
from settings import PRESETS, TASKS, BuiltinTask, SettingError, Settings, check, readers
from tasks import named, prompts

ROOT = Path(__file__).parents[1]
FOLDERS = ("ops", "grading", "tasks", "infra")
FLOORS = [
    {"settings", "grpo", "lora", "weighed", "grading", "ops"},
    {"baselines", "logprob", "rewards", "infra"},
    {"sampler", "tasks", "plot"},
    {"rollout", "evaluate"},
    {"bridge"},
]
FLOOR = {place: number for number, places in enumerate(FLOORS) for place in places}
FILES = [p for folder in ("", *FOLDERS) for p in sorted((ROOT / folder).glob("*.py")) if p.name != "__init__.py"]


def place(path):
    return path.parent.name if path.parent != ROOT else path.stem


def imports(path):
    """The places of the project that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_floors_or_its_own_folder(path):
    for other in imports(path):
        if other in FLOOR and other != place(path):
            assert FLOOR[other] < FLOOR[place(path)], f"{path.name} imports {other}"


def test_twelve_files_and_four_folders_lie_at_the_top():
    assert {p.stem for p in ROOT.glob("*.py")} == set(FLOOR) - set(FOLDERS)
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == set(FOLDERS)


def test_there_are_few_settings_and_each_is_read_by_a_method():
    assert len(Settings.__dataclass_fields__) <= 46
    assert all(readers(name) for name in Settings.__dataclass_fields__)


def test_choices_of_the_settings_are_those_of_the_code():
    choices = {name: rule.metadata["choices"] for name, rule in Settings.__dataclass_fields__.items()}
    assert choices["aggregation"] == grpo.AGGREGATIONS
    assert choices["template"] == ("", *prompts.TEMPLATES)


def test_the_built_in_models_of_the_settings_are_the_folders_of_tasks_base():
    assert set(settings.builtin_models()) == {folder.name for folder in MODELS.iterdir()}


@pytest.mark.parametrize("task", TASKS)
def test_the_preset_of_a_built_in_task_has_a_model_for_it(task):
    s = check(Settings(**PRESETS[TASKS[task].preset]))
    assert s.task == task
    assert s.model in TASKS[task].models or not TASKS[task].models


DOUBLES = """
from tasks.task import BOX, Demonstration, Problem, Task

def evaluation(per_group):
    return [Problem(f"{n}+{n}", str(2 * n), "doubles") for n in range(per_group)]

def task(seed, eval_per_group):
    problems = [Problem(f"{n}+{n}", str(2 * n)) for n in range(20, 60)]
    worked = [Demonstration(p.question, f"{BOX}{p.answer}}}", p.answer) for p in problems]
    return Task(problems, worked, evaluation(eval_per_group), instruction="")
"""


def test_a_new_built_in_task_is_one_file_and_one_row(tmp_path, monkeypatch, capsys):
    """The file is tasks/doubles.py, the row an entry of TASKS; help, refusals, training and evaluation know both."""
    (tmp_path / "doubles.py").write_text(DOUBLES)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    monkeypatch.setitem(TASKS, "doubles", BuiltinTask("smoke", ("arithmetic-smoke",)))
    with pytest.raises(SystemExit):
        settings.parse(["--help"])
    assert "legs, doubles, limr" in capsys.readouterr().out
    with pytest.raises(SettingError, match="logic-laptop has no tokens for the task doubles: use --preset smoke"):
        check(Settings(task="doubles", model="logic-laptop"))
    with pytest.raises(SettingError, match=r"must be one of .* doubles"):
        named.load_task(Settings(task="unknown"))
    out = tmp_path / "run"
    bridge.main(["--preset", "smoke", "--task", "doubles", "--steps", "1", "--out", str(out)])
    assert lines(out / "metrics.jsonl")[-1]["step"] == 1
    assert set(lines(out / "evals.jsonl")[-1]["policy"]) == {"doubles", "average"}
    found = evaluate.find_task(evaluate.parse([str(out), "--problems", "3"]), Settings(task="doubles"))
    assert [p.answer for p in found.evaluation] == ["0", "2", "4"]


@pytest.mark.parametrize("file", ["bridge.py", "evaluate.py"])
def test_help_loads_no_torch(file):
    command = [sys.executable, "-X", "importtime", file, "--help"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "usage:" in finished.stdout
    assert "argparse" in imported
    assert not {"torch", "transformers", "numpy", "matplotlib"} & imported


def test_no_file_imports_matplotlib_before_it_draws():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "matplotlib" not in ast.unparse(node), f"{path.name} must import it inside a function"


def test_every_mutant_breaks_a_line_that_its_file_has_once():
    for file, line, _ in MUTANTS:
        assert (ROOT / file).read_text().count(line) == 1, f"{file}: {line}"
