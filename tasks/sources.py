"""Rows of files and hub data sets: which are read, which are kept, and which of their fields mean what.

A source is a local .jsonl, .json, .parquet or .csv file, or a data set on the hub: owner/name, owner/name:split,
owner/name:config:split, or owner/name:folder/file.parquet for one file of it. Everything here is text from strangers:
it is read, never run.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

QUESTION = ("question", "problem", "prompt")  # field names a data row may use, the first present wins
ANSWER = ("answer", "final_answer")
SOLUTION = ("solution", "response", "demonstration")
FIELDS = {"question": QUESTION, "answer": ANSWER, "solution": SOLUTION}
FILES = (".jsonl", ".json", ".parquet", ".csv")


class DataError(ValueError):
    """Data that cannot be used as it is; the message says which file, line and field."""


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # gold
    group: str = "all"  # evaluation reports accuracy by group: benchmark, chain length, level
    labels: tuple[str, ...] = ()  # and breaks it down by these
    tolerance: float | None = None  # see rewards.is_correct
    unit: str | None = None


@dataclass(frozen=True)
class Demonstration:
    question: str
    response: str
    answer: str | None = None  # gold: the data's, else what the response itself boxes


def read_rows(source: str, setting: str) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) of every row of a source; lazily, since solutions can be gigabytes.

    Raises DataError, naming the setting, for a source that is not there, cannot be read or is empty.
    """
    (name, *part), kind = source.split(":"), Path(source).suffix
    if kind in FILES and not part:
        if not Path(source).is_file():
            raise DataError(f"{setting}: there is no file {source!r}")
        if kind == ".jsonl":
            rows = _json_lines(source, setting)
        elif kind == ".json":
            rows = _json_list(source, setting)
        else:
            rows = _load(source, setting, kind[1:], data_files=source, split="train")
    elif name.count("/") == 1 and len(part) <= 2 and all((*name.split("/"), *part)):
        if part and Path(part[0]).suffix in FILES:
            rows = _load(source, setting, name, data_files={"train": part[0]}, split="train")
        else:
            *config, split = part or ["train"]
            rows = _load(source, setting, name, name=config[0] if config else None, split=split)
    else:
        raise DataError(
            f"{setting}: {source!r} is neither a {', '.join(FILES)} file nor a data set on the hub "
            "(owner/name, owner/name:split, owner/name:config:split)"
        )
    row = None
    try:
        for row in rows:
            yield row
    except UnicodeDecodeError as error:
        raise DataError(f"{setting}: {source} is not UTF-8 text") from error
    if row is None:
        raise DataError(f"{setting}: {source} holds no row")


def _json_lines(source: str, setting: str) -> Iterator[tuple[str, dict]]:
    with open(source, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{source}, line {number}"
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise DataError(f"{setting}: {where}: not valid JSON ({error})") from error
                yield where, _object(row, where, setting)


def _json_list(source: str, setting: str) -> Iterator[tuple[str, dict]]:
    try:
        rows = json.loads(Path(source).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{setting}: {source}: not valid JSON ({error}); a file with one object per line must be named .jsonl"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{setting}: {source}: a list of JSON objects is needed, this is a {type(rows).__name__}")
    for i, row in enumerate(rows):
        where = f"{source}, row {i}"
        yield where, _object(row, where, setting)


def _object(row, where: str, setting: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{setting}: {where}: a JSON object is needed, this is a {type(row).__name__}")
    return row


def _load(source: str, setting: str, path: str, **options) -> Iterator[tuple[str, dict]]:
    """The rows that datasets.load_dataset(path, **options) finds."""
    try:
        import datasets  # here, since it is slow to import and .jsonl files do not need it
    except ImportError as error:
        raise DataError(f"{setting}: reading {source!r} needs the package datasets; .jsonl files do not") from error
    try:
        rows = datasets.load_dataset(path, **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{setting}: there is no data set {source!r} on the hub, or it needs `hf auth login` first "
            f"({_first(error)})"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{setting}: no way to the hub for {source!r} ({_first(error)}): save its rows as a .jsonl or .parquet "
            f"file and give that as {setting}, or copy the HF_HOME cache of a machine that has read it and set "
            "HF_HUB_OFFLINE=1"
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:  # no such config, split or file
        raise DataError(f"{setting}: cannot read {source!r}: {_first(error)}") from error
    return ((f"{source}, row {i}", dict(row)) for i, row in enumerate(rows))


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Which rows, which fields


def kept_rows(sources: str, setting: str, condition: str, notes: list[str]) -> Iterator[tuple[str, dict]]:
    """The rows of a comma list of sources that meet `condition`, counted in `notes`.

    A condition is a comma list of FIELD=VALUE|VALUE… and FIELD=LOW..HIGH, both ends included; all must hold. Raises
    DataError when no row has the field, and when nothing is left.
    """
    asked_by = setting.replace("data", "filter")
    conditions = parse_condition(condition, asked_by)
    for source in (part.strip() for part in sources.split(",")):
        count, kept, fields, values = 0, 0, {}, {}
        for where, row in read_rows(source, setting):
            count += 1
            fields |= dict.fromkeys(row)
            for name in conditions:
                if len(of_field := values.setdefault(name, {})) < 8:
                    of_field[str(row.get(name))[:40]] = None
            if all(name in row and _meets(row[name], wanted) for name, wanted in conditions.items()):
                kept += 1
                yield where, row
        for name in conditions:
            if name not in fields:
                raise DataError(
                    f"{asked_by}: no row of {source} has a field {name!r}; there are {', '.join(map(str, fields))}"
                )
        if not kept:
            seen = "; ".join(f"{name} is {', '.join(of_field)}, …" for name, of_field in values.items())
            raise DataError(f"{asked_by}: {condition!r} keeps none of the {count} rows of {source}, where {seen}")
        if conditions:
            notes.append(f"{setting}: {condition} keeps {kept} of {count} rows of {source}")


def parse_condition(text: str, setting: str) -> dict[str, tuple[float, float] | set[str]]:
    """{field: (low, high) or the values it may have}.

    >>> parse_condition("difficulty=3..8", "rl_filter")
    {'difficulty': (3.0, 8.0)}
    """
    conditions: dict = {}
    for part in text.split(",") if text.strip() else ():
        name, equals, wanted = (piece.strip() for piece in part.partition("="))
        low, dots, high = wanted.partition("..")
        try:
            if not (name and equals and wanted):
                raise ValueError
            conditions[name] = (float(low), float(high)) if dots else {v.strip() for v in wanted.split("|")}
        except ValueError as error:
            raise DataError(
                f"{setting}: {part!r} is no condition; write FIELD=VALUE|VALUE or FIELD=LOW..HIGH, with commas between"
            ) from error
    return conditions


def _meets(value, wanted: tuple[float, float] | set[str]) -> bool:
    if isinstance(wanted, set):
        whole = isinstance(value, float) and value.is_integer()  # 3.0 is written 3
        return str(value).strip() in wanted or (whole and str(int(value)) in wanted)
    try:
        return wanted[0] <= float(value) <= wanted[1]
    except (TypeError, ValueError):
        return False


def parse_fields(text: str, setting: str) -> dict[str, tuple[str, ...]]:
    """FIELDS with the names that `text` gives, e.g. question=problem,solution=r1_solution_1|r1_solution_2.

    >>> parse_fields("answer=gold", "rl_fields")["answer"]
    ('gold',)
    """
    names = dict(FIELDS)
    for part in text.split(",") if text.strip() else ():
        meaning, _, fields = (piece.strip() for piece in part.partition("="))
        if meaning not in FIELDS or not all(map(str.strip, fields.split("|"))):
            raise DataError(
                f"{setting}: {part!r} names no field; write {'=NAME, '.join(FIELDS)}=NAME, with commas between"
            )
        names[meaning] = tuple(field.strip() for field in fields.split("|"))
    return names


def text_of(row: dict, names: tuple[str, ...], where: str, setting: str, may_be_empty: bool = False) -> str:
    """The first of the named fields, as stripped text; only a gold answer may be empty, which drops the row."""
    name = next((name for name in names if name in row), None)
    if name is None:
        has = ", ".join(map(str, row)) or "none"
        raise DataError(
            f"{setting}: {where}: needs a field named {' or '.join(names)}, has {has}; "
            f"{setting.replace('data', 'fields')} says which means what"
        )
    return as_text(row[name], name, where, setting, may_be_empty)


def texts_of(row: dict, names: tuple[str, ...], where: str, setting: str) -> list[str]:
    """All non-empty texts of the named fields, of which one may hold a list of them."""
    if not any(name in row for name in names):
        text_of(row, names, where, setting)  # raises
    values = [(name, row[name]) for name in names if name in row]
    several = [(name, v) for name, value in values for v in (value if isinstance(value, list) else [value])]
    texts = [as_text(value, name, where, setting, may_be_empty=len(several) > 1) for name, value in several]
    return [text for text in texts if text]


def as_text(value, name: str, where: str, setting: str, may_be_empty: bool) -> str:
    value = "" if value is None else value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{setting}: {where}: field {name} must be text or a number, it is a {type(value).__name__}")
    text = str(value).strip()
    if not text and not may_be_empty:
        raise DataError(f"{setting}: {where}: field {name} is empty")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(f"{setting}: {where}: field {name} holds half a surrogate pair, which is no text")
    return text
