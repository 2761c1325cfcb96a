"""docs/exercises.md: every change is made in a copy of the code, and moves the number as the page says."""

import json
import os
import re
import shlex
import shutil
import sys
from functools import cache, partial
from pathlib import Path

import pytest
from conftest import Forked

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/exercises.md").read_text()
LEFT_OUT = (".*", "runs", "evals", "benchmarks", "tests", "bench", "models")  # of a copy; the last may be large
EXERCISES = dict(re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


def blocks(exercise, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", EXERCISES[exercise], re.DOTALL | re.MULTILINE)


def apply(diff, folder):
    """Makes the changes of a block of diffs: `# FILE` begins a file, `@@` the next place in it."""
    for name, body in re.findall(r"^# (\S+\.py)\n(.*?)(?=^# |\Z)", diff, re.DOTALL | re.MULTILINE):
        text = (folder / name).read_text()
        for place in body.split("@@\n"):
            lines = place.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in f" {sign}") for sign in "-+")
            assert text.count(old) == 1, f"{name} must contain once: {old}"
            text = text.replace(old, new)
        (folder / name).write_text(text)


def bridge_in(folder, flags):
    """Runs bridge.py of a copy, in a process that has loaded torch and the modules of ROOT; draws no figures."""
    ours = {path.stem for path in ROOT.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import bridge

    assert Path(bridge.__file__).parent == folder
    bridge.plot.draw = bridge.report.write = lambda *_: None
    bridge.main(flags)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """run(command, exercise): the folder of a run in a copy of the code, with the changes and files of an exercise."""

    @cache
    def folder_of(command, exercise=None):
        folder = tmp_path_factory.mktemp("exercise") / "code"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for diff in blocks(exercise, "diff") if exercise else ():
            apply(diff, folder)
        for code in blocks(exercise, "python") if exercise else ():
            (folder / re.match(r"# (\S+\.py)", code)[1]).write_text(code)
        flags = [*shlex.split(command.removeprefix("python bridge.py ")), "--out", "run"]
        status, output, errors = Forked(partial(bridge_in, folder, flags)).finish()
        assert status == 0, errors + output
        return folder / "run"

    return folder_of


def number(folder, name, step):
    file, field = ("evals", lambda r: r["policy"]["average"]) if name == "policy" else ("metrics", lambda r: r[name])
    records = [json.loads(line) for line in (folder / f"{file}.jsonl").read_text().splitlines()]
    return next(field(record) for record in records if record["step"] == step)


def measured(exercise, run):
    """[(metric, step, numbers on the page, numbers of the runs)] for each row of the exercise's table."""
    commands = blocks(exercise, "bash")[0].splitlines()
    rows = []
    for name, step, cells in re.findall(r"^\| `(\w+)` at step (\d+) \| (.*) \|$", EXERCISES[exercise], re.MULTILINE):
        page = [float(cell) for cell in cells.split(" | ")]
        before = [run(commands[0])] if len(page) == 2 else []
        runs = [*before, run(commands[-1], exercise)]
        rows.append((name, int(step), page, [number(folder, name, int(step)) for folder in runs]))
    return rows


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_change_of_an_exercise_moves_the_number_as_the_page_says(exercise, run):
    rows = measured(exercise, run)
    assert rows
    for name, step, page, seen in rows:
        close = dict(abs=0.1) if name == "policy" else dict(rel=0.15, abs=1e-6)
        assert seen == pytest.approx(page, **close), f"{name} at step {step}"


def test_the_tables_of_longer_runs_are_those_of_the_committed_rows(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import exercises

    rows = exercises.read_log(exercises.ROWS)
    assert len(rows) == sum(variant.seeds for variant in exercises.VARIANTS)
    for exercise in exercises.COLUMNS:
        assert "\n".join(exercises.table(exercise, rows)) in EXERCISES[exercise]
    exercises.draw(rows, tmp_path / "exercises.png")
    assert (tmp_path / "exercises.png").exists()


def test_a_change_that_does_not_fit_the_code_is_seen(tmp_path):
    (tmp_path / "x.py").write_text("a\nb\nc\n")
    apply("# x.py\n a\n-b\n+d\n+e\n@@\n-c\n", tmp_path)
    assert (tmp_path / "x.py").read_text() == "a\nd\ne\n"
    with pytest.raises(AssertionError, match="must contain once: b"):
        apply("# x.py\n-b\n+c\n", tmp_path)
