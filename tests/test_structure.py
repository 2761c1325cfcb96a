"""The structure of the project: which file may import which, how long files are, what loads when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from settings import BUILTIN_TASKS, CHOICES, PRESETS, Settings, readers

ROOT = Path(__file__).parents[1]
FOLDERS = ("ops", "grading", "tasks", "infra")
FLOORS = [
    {"settings", "grpo", "lora", "grading", "ops"},
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


def test_eleven_files_and_four_folders_lie_at_the_top():
    assert {p.stem for p in ROOT.glob("*.py")} == set(FLOOR) - set(FOLDERS)
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == set(FOLDERS)


def test_the_method_fits_on_a_few_pages():
    def length(path):
        return len(path.read_text().splitlines())

    method = ("bridge", "rollout", "grpo", "lora", "logprob", "sampler")
    assert length(ROOT / "bridge.py") <= 350
    assert sum(length(ROOT / f"{name}.py") for name in method) <= 1250
    assert max(map(length, FILES)) <= 500
    assert sum(map(length, FILES)) <= 8050


def test_there_are_few_settings_and_each_is_read_by_a_method():
    assert len(Settings.__dataclass_fields__) <= 45
    assert all(readers(name) for name in Settings.__dataclass_fields__)


def test_choices_of_the_settings_are_those_of_the_code():
    import grpo
    from tasks import builtin, named, prompts

    assert CHOICES["aggregation"] == grpo.AGGREGATIONS
    assert CHOICES["template"] == ("", *prompts.TEMPLATES)
    assert {Settings().model, PRESETS["smoke"]["model"], PRESETS["logic"]["model"]} == set(builtin.RECIPES)
    assert set(BUILTIN_TASKS) == set(builtin.EVALUATION) <= set(named.NAMED)


@pytest.mark.parametrize("file", ["bridge.py", "evaluate.py"])
def test_help_loads_no_torch(file):
    command = [sys.executable, "-X", "importtime", file, "--help"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "usage:" in finished.stdout
    assert "argparse" in imported
    assert not {"torch", "transformers", "numpy", "matplotlib"} & imported


def test_importing_the_trainer_loads_no_matplotlib():
    code = "import sys, bridge; assert 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
