"""docs/tour.ipynb: its cells run and print what the page stores.

`python tests/test_tour.py` runs the cells and stores their outputs anew.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tour.ipynb"
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?"


def executed():
    """The notebook with the outputs of a fresh kernel, started in docs/ as Jupyter does."""
    notebook = nbformat.read(PAGE, as_version=4)
    options = dict(kernel_name="python3", timeout=120, record_timing=False, coalesce_streams=True)
    client = NotebookClient(notebook, resources={"metadata": {"path": PAGE.parent}}, **options)
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    return notebook


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def kinds(cell):
    """The streams and the types of the pictures that a cell leaves."""
    return [output.get("name") or sorted(output.data) for output in cell.outputs]


def tolerance(number):
    """Five units of the last printed digit, and 1 %. An integer has to be equal."""
    mantissa, _, exponent = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    if not decimals and not exponent:
        return 0.0
    return 5 * 10.0 ** (int(exponent or 0) - decimals) + 0.01 * abs(float(number))


def test_every_cell_prints_what_the_page_stores():
    """Among it two zeros: the gain's gradient at θ̂ = θ, and the difference of eq. (11) by hand from the code's."""
    for stored, fresh in zip(code_of(nbformat.read(PAGE, as_version=4)), code_of(executed()), strict=True):
        page, seen = printed(stored), printed(fresh)
        assert kinds(fresh) == kinds(stored), f"{stored.id}: {seen}"
        words, expected_words = (re.sub(NUMBER, "#", text).split() for text in (seen, page))
        assert words == expected_words, f"{stored.id}: {seen}"
        for expected, number in zip(re.findall(NUMBER, page), re.findall(NUMBER, seen), strict=True):
            close = pytest.approx(float(expected), rel=0, abs=tolerance(expected))
            assert float(number) == close, f"{stored.id}: {seen}"


def test_the_page_is_short_and_has_its_outputs_and_one_picture():
    notebook = nbformat.read(PAGE, as_version=4)
    assert len(notebook.cells) <= 12
    assert PAGE.stat().st_size < 300_000
    set_up, *others, picture = code_of(notebook)
    assert kinds(set_up) == []
    assert all(kinds(cell) == ["stdout"] for cell in others)
    assert kinds(picture) == ["stdout", ["image/png", "text/plain"]]


def test_no_cell_defines_what_it_could_import():
    defined = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
    for cell in code_of(nbformat.read(PAGE, as_version=4)):
        assert not any(isinstance(node, defined) for node in ast.walk(ast.parse(cell.source))), cell.id


def test_the_picture_has_the_colours_of_the_report():
    page = (ROOT / "infra/report.html").read_text()
    source = code_of(nbformat.read(PAGE, as_version=4))[-1].source
    for name in ("BLUE", "ORANGE"):
        channels = re.search(rf"{name} = \[(\d+), (\d+), (\d+)\]", page).groups()
        assert "#" + "".join(f"{int(channel):02x}" for channel in channels) in source


@pytest.mark.parametrize("start", ["", "docs", "elsewhere"])
def test_the_first_cell_finds_the_project_or_clones_it(start, tmp_path, monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command[-4:])
        (tmp_path / "bridge").mkdir(exist_ok=True)
        (tmp_path / "bridge/bridge.py").touch()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    is_elsewhere = start == "elsewhere"
    monkeypatch.chdir(tmp_path if is_elsewhere else ROOT / start)
    source = code_of(nbformat.read(PAGE, as_version=4))[0].source
    for _ in range(2):  # the second time the clone is there
        names = {}
        exec(source, names)
        assert sys.path[0] == str(tmp_path / "bridge" if is_elsewhere else ROOT)
    clone = ["clone", "--quiet", names["REPOSITORY"], "bridge"]
    install = ["install", "--quiet", "-r", "bridge/requirements.txt"]
    assert commands == ([clone, install] if is_elsewhere else [])


if __name__ == "__main__":
    fresh = executed()
    del fresh.metadata["language_info"]  # the version of this Python
    nbformat.write(fresh, PAGE)
