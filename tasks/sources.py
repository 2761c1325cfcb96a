"""Rows of files and hub data sets, and the problems and demonstrations in rows with the usual field names.

A source is a local .jsonl, .json, .parquet or .csv file, or a data set on the hub: owner/name, owner/name:split,
owner/name:config:split, or owner/name:folder/file.parquet for one of its files. No code of a source is executed.
"""

import csv
import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import rewards
from infra.files import DataError, read_lines
from tasks.task import SURROGATE, Demonstration, Problem, note_dropped

QUESTION = ("question", "problem", "prompt")  # the usual field names; the first one that is not empty is read
ANSWER = ("answer", "final_answer")
SOLUTION = ("solution", "response", "demonstration")
FILES = (".jsonl", ".json", ".parquet", ".csv")
# GSM8K's steps and the gold answer in the last line, "#### 42"; a heading of words or of another level is none
GSM8K = re.compile(r"(?s)(.*)(?<!#)####[ \t]*((?!#)[^\n]*[\d\\][^\n]*|\w{,3})")
MAX_LABELS, MAX_WIDTH = 20, 500  # different values of a field that forms groups, and their characters together
LABEL = re.compile(  # an integer, half a step of a scale, or words; no measurement such as 0.731
    r"[-+]?\d+(\.5)?|(?![-+]?(\d*\.?\d+(e[-+]?\d+)?|nan|inf)$)[\w ,:;.+/&()'-]{1,60}"
)
csv.field_size_limit(2**31 - 1)  # the module refuses cells of more than 131,072 characters otherwise


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
        if kind == ".csv":
            return _csv_rows(source)
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
            rows = [dict(row) for row in json.loads(Path(source).read_text(encoding="utf-8-sig"))]
        else:
            import datasets  # slow to import

            rows = datasets.load_dataset(path, split=split, **options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot read {source!r} ({reason}): save its rows as a .jsonl file and name that") from error
    return ((f"{source}, row {i}", dict(row)) for i, row in enumerate(rows))


def _csv_rows(source: str) -> Iterator[tuple[str, dict]]:
    """The rows of a .csv file; every cell is the text that is written there."""
    with open(source, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise csv.Error(f"the first line has {len(reader.fieldnames)} cells, this line another number")
                yield f"{source}, line {reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{source}, near line {reader.reader.line_num}: {error}") from error


def read_problems(sources: str, setting: str, notes: list[str], any_gold: bool = False) -> list[Problem]:
    """The problems of a comma list of sources; `keep_readable` drops some."""
    problems, rows = [], list(read_rows(sources, setting))
    levels, difficulties = (labels([row for _, row in rows], field) for field in ("level", "difficulty"))
    for (place, row), level, difficulty in zip(rows, levels, difficulties, strict=True):
        question_field, question = text_field(row, QUESTION, place)
        gold_field, text = text_field(row, ANSWER + SOLUTION, place, may_be_empty=True)
        solution, gold = worked(text)
        extra = {name: value for name, value in row.items() if name not in (question_field, gold_field)}
        gold = gold if solution or gold_field in ANSWER else ""
        problems.append(Problem(question, gold, level or difficulty or "all", extra=extra))
    return keep_readable(problems, sources, setting, notes, any_gold)


def read_demonstrations(sources: str, setting: str, notes: list[str], any_gold: bool = False) -> list[Demonstration]:
    """The demonstrations of a comma list of sources; a solution field goes before a solution in the answer."""
    demonstrations = []
    for place, row in read_rows(sources, setting):
        _, question = text_field(row, QUESTION, place)
        answer = text_field(row, ANSWER, place, may_be_empty=True)[1] if set(ANSWER) & set(row) else ""
        response, gold = worked(answer)
        is_optional = response != ""
        text = "" if is_optional and not set(SOLUTION) & set(row) else text_field(row, SOLUTION, place, is_optional)[1]
        if text:
            solution, boxed = worked(text)
            response = solution if solution and gold in ("", boxed) else text
            gold = gold or (boxed if solution else None)
        demonstrations.append(Demonstration(question, response, gold))
    return keep_readable(demonstrations, sources, setting, notes, any_gold)


def worked(text: str) -> tuple[str, str]:
    """(solution that boxes its answer, gold) of a text with a box or in GSM8K's form; ("", text) of a bare answer."""
    if boxed := rewards.extract(text):
        return text, boxed
    if match := GSM8K.fullmatch(text):
        return f"{match[1].strip()}\nThe answer is \\boxed{{{match[2].strip()}}}.".lstrip(), match[2].strip()
    return "", text


def labels(rows: list[dict], field: str) -> list[str]:
    """The text FIELD VALUE of every row, or "" without a value; all are "" if the values are many, long or measured."""
    values = [row.get(field) for row in rows]
    texts = ["" if v is None or v != v else str(v).strip().removeprefix("Level ").removesuffix(".0") for v in values]
    different = set(texts) - {""}
    forms_groups = len(different) <= MAX_LABELS and sum(map(len, different)) <= MAX_WIDTH
    forms_groups &= all(map(LABEL.fullmatch, different))
    return [f"{field} {text}" if forms_groups and text else "" for text in texts]


def first_correct(responses: list[str], gold: str) -> str:
    """The first response that the grader accepts for the gold answer; the first one if it accepts none."""
    return next((response for response in responses if rewards.is_correct(response, gold).correct), responses[0])


def keep_readable(items: list, sources: str, setting: str, notes: list[str], any_gold: bool = False) -> list:
    """The items whose gold is None, readable for the grader or, with `any_gold`, not empty; notes the others."""
    kept = [i for i in items if i.answer is None or rewards.is_gold(i.answer) or (any_gold and i.answer)]
    note_dropped(notes, setting, items, kept, f"rows of {sources} have no gold answer the grader can read")
    return kept


def text_field(row: dict, names: tuple[str, ...], place: str, may_be_empty: bool = False) -> tuple[str, str]:
    """(name, text) of the first of the fields `names` that is not empty, null, nan or inf. Raises DataError without."""
    present = [name for name in names if name in row]
    if not present:
        needed = f"needs a field named {' or '.join(names)}, has {', '.join(row) or 'none'}"
        raise DataError(f"{place}: {needed}; --task FILE.py:FUNCTION reads rows of any shape")
    for name in present:
        value = "" if row[name] is None else row[name]
        is_text = isinstance(value, str | int | float | Decimal) and not isinstance(value, bool)
        if not is_text or SURROGATE.search(str(value)):
            must = "must be a number or text that UTF-8 can encode, it is"
            raise DataError(f"{place}: field {name} {must} {value!r:.80}")
        text = str(value).strip()
        if text and not (isinstance(value, float) and not math.isfinite(value)):
            return name, text
    if not may_be_empty:
        raise DataError(f"{place}: field {present[0]} is empty")
    return present[0], ""
