"""Rows of files and hub data sets, and the problems and demonstrations in rows with the usual field names.

A source is a local .jsonl, .ndjson, .json, .parquet or .csv file (the first two also as .gz), or a data set on the
hub: owner/name, owner/name:split, owner/name:config:split, or owner/name:folder/file.parquet for one of its files.
What exists is a local file, whatever the letters of its name. No code of a source is executed.
"""

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import rewards
from infra.files import DataError, read_lines, refuse_pointer
from tasks.task import Demonstration, Problem, note_dropped

QUESTION = ("question", "problem", "prompt")  # the usual field names; the first one that is not empty is read
ANSWER = ("answer", "final_answer")
SOLUTION = ("solution", "response", "demonstration")
FILES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv")  # in small or capital letters
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[^:]+){0,2}")
# GSM8K's steps and the gold answer in the last line, "#### 42"; a heading of words or of another level is none
GSM8K = re.compile(r"(?s)(.*)(?<!#)####[ \t]*((?!#)[^\n]*[\d\\][^\n]*|\w{,3})")
csv.field_size_limit(2**31 - 1)  # the module refuses cells of more than 131,072 characters otherwise


def listed(text: str) -> list[str]:
    """The parts of a comma list; the name of an existing file is one part."""
    if os.path.isfile(text):
        return [text]
    return [part.strip() for part in text.split(",")]


def rows_of(sources: str, setting: str = "task") -> Iterator[dict]:
    """The rows of a comma list of sources. Raises DataError if one is missing, unreadable or empty."""
    return (row for _, row in read_rows(sources, setting))


def read_rows(sources: str, setting: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row; place and DataErrors name setting, source and line."""
    try:
        for source in listed(sources):
            is_empty = True
            for place, row in _rows(source):
                is_empty = False
                yield f"{setting}: {place}", row
            if is_empty:
                raise DataError(f"{source} holds no row")
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error


def _rows(source: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row of one source. Any error of another library becomes one line of DataError."""
    kind = Path(source.lower().removesuffix(".gz")).suffix
    exists = os.path.isfile(source)
    on_hub = not exists and HUB.fullmatch(source) and (":" in source or kind not in FILES)
    if not on_hub:
        if kind not in FILES:
            hub = "a data set on the hub: owner/name, owner/name:split or owner/name:config:split"
            raise DataError(f"{source!r} is neither a {', '.join(FILES)} file nor {hub}")
        if not exists:
            raise DataError(f"there is no file {source!r}")
        refuse_pointer(Path(source))
        if kind in (".jsonl", ".ndjson"):
            return read_lines(Path(source))
    try:
        rows = _hub_rows(source) if on_hub else _file_rows(source, kind)
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise DataError(f"cannot read {source!r} ({reason}): save its rows as a .jsonl file and name that") from error
    return ((f"{source}, row {i}", dict(row)) for i, row in enumerate(rows))


def _hub_rows(source: str) -> Iterable[dict]:
    import datasets  # slow to import

    name, *parts = source.split(":")
    if parts and Path(parts[0]).suffix in FILES:
        return datasets.load_dataset(name, split="train", data_files={"train": parts[0]})
    config = parts[0] if len(parts) == 2 else None
    split = parts[-1] if parts else "train"
    return datasets.load_dataset(name, name=config, split=split)


def _file_rows(source: str, kind: str) -> Iterable[dict]:
    # The package datasets would turn texts of .json and .csv files into numbers and dates.
    if kind == ".json":
        text = Path(source).read_text(encoding="utf-8-sig")
        return [dict(row) for row in json.loads(text)]
    if kind == ".csv":
        return _csv_rows(source)
    import datasets  # slow to import

    return datasets.load_dataset("parquet", split="train", data_files=source)


def _csv_rows(source: str) -> list[dict]:
    """The rows of a .csv file; every cell is the text that is written there."""
    rows = []
    with open(source, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"line {reader.line_num} has another number of cells than the first line")
            rows.append(row)
    return rows


def read_problems(sources: str, setting: str, notes: list[str], any_gold: bool = False) -> list[Problem]:
    """The problems of a comma list of sources; `keep_readable` drops some."""
    problems = []
    for place, row in read_rows(sources, setting):
        question_field, question = text_field(row, QUESTION, place)
        gold_field, text = text_field(row, ANSWER + SOLUTION, place, may_be_empty=True)
        solution, gold = worked(text)
        if gold_field in SOLUTION and not solution:
            gold = ""  # a solution without a box states no gold
        extra = {name: value for name, value in row.items() if name not in (question_field, gold_field)}
        problems.append(Problem(question, gold, label(row, "level") or "all", extra=extra))
    return keep_readable(problems, sources, setting, notes, any_gold)


def read_demonstrations(sources: str, setting: str, notes: list[str], any_gold: bool = False) -> list[Demonstration]:
    """The demonstrations of a comma list of sources, each with its row's field `source`, or else its file."""
    demonstrations = []
    files = listed(sources)
    for file in files:
        origin = file if len(files) > 1 else ""
        demonstrations += [_demonstration(place, row, origin) for place, row in read_rows(file, setting)]
    return keep_readable(demonstrations, sources, setting, notes, any_gold)


def _demonstration(place: str, row: dict, origin: str) -> Demonstration:
    """The demonstration of a row; a solution field takes precedence over a solution in the answer."""
    _, question = text_field(row, QUESTION, place)
    answer = ""
    if any(name in row for name in ANSWER):
        _, answer = text_field(row, ANSWER, place, may_be_empty=True)
    response, gold = worked(answer)
    text = ""
    if response == "" or any(name in row for name in SOLUTION):
        _, text = text_field(row, SOLUTION, place, may_be_empty=response != "")
    if text:
        solution, boxed = worked(text)
        agrees = solution != "" and gold in ("", boxed)
        response = solution if agrees else text
        if gold == "":
            gold = boxed if solution else None
    named = label(row, "source").removeprefix("source ")
    return Demonstration(question, response, gold, source=named or origin)


def worked(text: str) -> tuple[str, str]:
    """(solution that boxes its answer, gold) of a text with a box or in GSM8K's form; ("", text) of a bare answer."""
    boxed = rewards.extract(text)
    if boxed:
        return text, boxed
    match = GSM8K.fullmatch(text)
    if match:
        steps = match[1].strip()
        gold = match[2].strip()
        return f"{steps}\nThe answer is \\boxed{{{gold}}}.".lstrip(), gold
    return "", text


def is_missing(value: object) -> bool:
    """Whether a field has no value: null, or NaN or infinity, which some programs write for it."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def label(row: dict, field: str) -> str:
    """The group FIELD VALUE of a row, such as "level 3"; empty without a value."""
    value = row.get(field)
    if is_missing(value):
        return ""
    text = str(value).strip().removeprefix("Level ")
    return f"{field} {text}" if text else ""


def first_correct(responses: list[str], gold: str) -> str:
    """The first response that the grader accepts for the gold answer; the first one if it accepts none."""
    return next((response for response in responses if rewards.is_correct(response, gold).correct), responses[0])


def keep_readable(items: list, sources: str, setting: str, notes: list[str], any_gold: bool = False) -> list:
    """The items whose gold is None, readable for the grader or, with `any_gold`, not empty; notes the others."""
    kept = []
    for item in items:
        gold = item.answer
        if gold is None or rewards.is_gold(gold) or (any_gold and gold != ""):
            kept.append(item)
    note_dropped(notes, setting, items, kept, f"rows of {sources} have no gold answer the grader can read")
    return kept


def text_field(row: dict, names: tuple[str, ...], place: str, may_be_empty: bool = False) -> tuple[str, str]:
    """(name, text) of the first of the fields `names` that has a value. Raises DataError without one."""
    present = [name for name in names if name in row]
    if not present:
        needed = f"needs a field named {' or '.join(names)}, has {', '.join(row) or 'none'}"
        raise DataError(f"{place}: {needed}; --task FILE.py:FUNCTION reads rows of any shape")
    for name in present:
        value = row[name]
        if is_missing(value):
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise DataError(f"{place}: field {name} must be a number or text, it is {value!r:.80}")
        text = str(value).strip()
        if text:
            return name, text
    if not may_be_empty:
        raise DataError(f"{place}: field {present[0]} is empty")
    return present[0], ""
