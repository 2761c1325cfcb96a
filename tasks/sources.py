"""Rows of files and hub data sets, and the problems and demonstrations in rows with the usual field names.

A source is a local .jsonl, .json, .parquet or .csv file, or a data set on the hub: owner/name, owner/name:split,
owner/name:config:split, or owner/name:folder/file.parquet for one of its files. No code of a source is executed.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import rewards
from infra.files import DataError, read_lines
from tasks.task import SURROGATE, Demonstration, Problem, note_dropped

QUESTION = ("question", "problem", "prompt")  # the usual field names; the first one present is read
ANSWER = ("answer", "final_answer")
SOLUTION = ("solution", "response", "demonstration")
FILES = (".jsonl", ".json", ".parquet", ".csv")


def rows_of(sources: str, setting: str = "task") -> Iterator[dict]:
    """The rows of a comma list of sources. Raises DataError if one is missing, unreadable or empty."""
    return (row for _, row in read_rows(sources, setting))


def read_rows(sources: str, setting: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row; place and DataErrors name setting, source and line."""
    try:
        for source in (part.strip() for part in sources.split(",")):
            place = None
            for place, row in _rows(source):
                yield f"{setting}: {place}", row
            if place is None:
                raise DataError(f"{source} holds no row")
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error


def _rows(source: str) -> Iterator[tuple[str, dict]]:
    kind = Path(source).suffix
    if kind in FILES and ":" not in source:
        if not Path(source).is_file():
            raise DataError(f"there is no file {source!r}")
        return read_lines(Path(source)) if kind == ".jsonl" else _load(source, kind[1:], data_files=source)
    if not re.fullmatch("[^/:]+/[^/:]+(:[^:]+){0,2}", source):
        hub = "a data set on the hub: owner/name, owner/name:split or owner/name:config:split"
        raise DataError(f"{source!r} is neither a {', '.join(FILES)} file nor {hub}")
    name, *parts = source.split(":")
    if parts and Path(parts[0]).suffix in FILES:
        return _load(source, name, data_files={"train": parts[0]})
    *config, split = parts or ["train"]
    return _load(source, name, split, name=config[0] if config else None)


def _load(source: str, path: str, split: str = "train", **options) -> Iterator[tuple[str, dict]]:
    """The rows of a .json file, or else of datasets.load_dataset. Any error becomes one line of DataError."""
    try:
        if path == "json":  # not by the package, which would turn text into numbers and dates
            rows = [dict(row) for row in json.loads(Path(source).read_text(encoding="utf-8"))]
        else:
            import datasets  # slow to import

            rows = datasets.load_dataset(path, split=split, **options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot read {source!r} ({reason}): save its rows as a .jsonl file and name that") from error
    return ((f"{source}, row {i}", dict(row)) for i, row in enumerate(rows))


def read_problems(sources: str, setting: str, notes: list[str]) -> list[Problem]:
    """The problems of a comma list of sources. A note counts dropped rows, whose gold answer the grader cannot read."""
    problems = []
    for place, row in read_rows(sources, setting):
        question_field, question = text_field(row, QUESTION, place)
        answer_field, answer = text_field(row, ANSWER + SOLUTION, place, may_be_empty=True)
        gold = _gold(answer, answer_field in SOLUTION)
        level = next((name for name in ("level", "difficulty") if row.get(name) is not None), None)
        group = f"{level} {str(row[level]).removeprefix('Level ')}" if level else "all"
        extra = {name: value for name, value in row.items() if name not in (question_field, answer_field)}
        problems.append(Problem(question, gold, group, extra=extra))
    return keep_readable(problems, sources, setting, notes)


def read_demonstrations(sources: str, setting: str, notes: list[str]) -> list[Demonstration]:
    """The demonstrations of a comma list of sources; drops rows like `read_problems`."""
    demonstrations = []
    for place, row in read_rows(sources, setting):
        _, question = text_field(row, QUESTION, place)
        has_answer = any(name in row for name in ANSWER)
        answer = text_field(row, ANSWER, place, may_be_empty=True)[1] if has_answer else ""
        gold = _gold(answer)
        steps, separator, _ = answer.rpartition("####")
        if separator:  # GSM8K: the worked solution precedes the gold answer
            response = f"{steps.strip()}\nThe answer is \\boxed{{{gold}}}."
        else:
            _, response = text_field(row, SOLUTION, place)
            gold = gold or rewards.extract(response)
        demonstrations.append(Demonstration(question, response, gold))
    return keep_readable(demonstrations, sources, setting, notes)


def first_correct(responses: list[str], gold: str) -> str:
    """The first response that the grader accepts for the gold answer; the first one if it accepts none."""
    return next((response for response in responses if rewards.is_correct(response, gold).correct), responses[0])


def keep_readable(items: list, sources: str, setting: str, notes: list[str]) -> list:
    """The items whose gold answer is None or readable for the grader; adds a note that counts the others."""
    kept = [item for item in items if item.answer is None or rewards.is_gold(item.answer)]
    note_dropped(notes, setting, items, kept, f"rows of {sources} have no gold answer the grader can read")
    return kept


def text_field(row: dict, names: tuple[str, ...], place: str, may_be_empty: bool = False) -> tuple[str, str]:
    """(name, stripped text) of the first of the fields `names` that the row has. Raises DataError without such text."""
    name = next((name for name in names if name in row), None)
    if name is None:
        needed = f"needs a field named {' or '.join(names)}, has {', '.join(row) or 'none'}"
        raise DataError(f"{place}: {needed}; --task FILE.py:FUNCTION reads rows of any shape")
    value = "" if row[name] is None else row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or SURROGATE.search(str(value)):
        raise DataError(f"{place}: field {name} must be a number or text that UTF-8 can encode, it is {value!r:.80}")
    text = str(value).strip()
    if not text and not may_be_empty:
        raise DataError(f"{place}: field {name} is empty")
    return name, text


def _gold(text: str, is_solution: bool = False) -> str:
    """The gold answer in a text: its box or, except in a solution, what follows GSM8K's ####, or all of it."""
    text = text.rpartition("####")[2].strip()
    return rewards.extract(text) or ("" if is_solution else text)
