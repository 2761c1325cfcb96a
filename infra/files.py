"""Files that survive kill -9 and a full disk: written under a temporary name, then renamed; logs of JSON lines.

A log named .jsonl.gz has one gzip member for each line, so that a kill can damage the last line only.
"""

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class DataError(ValueError):
    """A file that cannot be used as it is; the message names file, line and field."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole: a kill leaves the old one or the new one."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(scratch, path)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An empty scratch folder that replaces `folder` at the end of the block; an exception discards it.

    A kill leaves the old folder, the new one or, between two renames, neither; never a part of one.
    """
    scratch, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for left_by_a_kill in (scratch, old):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
    finally:
        for unneeded in (scratch, old):
            shutil.rmtree(unneeded, ignore_errors=True)


def _line(path: Path, record: dict) -> bytes:
    line = json.dumps(record).encode() + b"\n"
    return gzip.compress(line, 6, mtime=0) if path.suffix == ".gz" else line


def append_line(path: Path, record: dict) -> None:
    """Adds one object to a file of JSON lines."""
    with open(path, "ab") as file:
        file.write(_line(path, record))


def write_lines(path: Path, records: list[dict]) -> None:
    """Replaces a file of JSON lines as a whole."""
    write_atomically(path, b"".join(_line(path, record) for record in records))


def _members(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The texts of the gzip members of a file, without a torn last one. Raises DataError."""
    inflate, parts, chunk = zlib.decompressobj(31), [], b""
    try:
        while chunk := chunk or file.read(1 << 16):
            parts.append(inflate.decompress(chunk))
            chunk = inflate.unused_data
            if inflate.eof:
                yield b"".join(parts)
                inflate, parts = zlib.decompressobj(31), []
    except zlib.error as error:
        raise DataError(f"{path}: damaged ({error})") from error


def read_lines(path: Path, torn: bool = False) -> Iterator[tuple[str, dict]]:
    """(place, object) of every line of a file of JSON lines; the place names file and line.

    `torn`: a kill may have cut the last line, which has no newline then and is left out. Raises DataError, naming the
    place, for a missing file, a line that is no JSON object, and text that is not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"{str(path)!r} is a folder" if path.is_dir() else f"there is no file {str(path)!r}")
    with open(path, "rb") as file:
        for number, line in enumerate(_members(file, path) if path.suffix == ".gz" else file, 1):
            if line.strip() and (line.endswith(b"\n") or not torn):
                yield f"{path}, line {number}", json_object(line, f"{path}, line {number}")


def json_object(text: str | bytes, place: str) -> dict:
    """The JSON object in a text. Raises DataError, naming the place."""
    try:
        row = json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))  # Windows begins files with a BOM
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or an integer of thousands of digits
        raise DataError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON object is needed, this is a {type(row).__name__}")
    return row


def read_object(path: Path) -> dict:
    """The JSON object that a file contains. Raises OSError and DataError."""
    return json_object(path.read_bytes(), str(path))


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 10**15


def is_number(value: object) -> bool:
    """Whether it is a finite number; True and an integer that no float can hold are none."""
    return type(value) in (int, float) and abs(value) < 1e100


def _are_numbers(value: object, low: float = -1e100, high: float = 1e100) -> bool:
    return isinstance(value, dict) and all(is_number(x) and low <= x <= high for x in value.values())


ACCURACIES = "accuracies in [0, 1] and their average", lambda x: _are_numbers(x, 0, 1) and {"average"} < x.keys()
FIELDS = {"step": ("a whole number", is_count), "seconds": ("numbers", _are_numbers), "policy": ACCURACIES,
          "shadow": ACCURACIES}  # fmt: skip
METRIC = "a number or null", lambda x: x is None or is_number(x)
NEEDED = {"metrics.jsonl": ("step", "seconds"), "evals.jsonl": ("step", "policy")}


def read_log(path: Path) -> list[dict]:
    """The records of a run's log; none if there is no such file. Raises DataError for one that no run writes."""
    records, needed = [], NEEDED.get(path.name, ("step",))
    for place, record in read_lines(path, torn=True) if os.path.lexists(path) else ():
        if missing := [name for name in needed if name not in record]:
            raise DataError(f"{place}: lacks {', '.join(missing)}")
        for name in record if path.name in NEEDED else needed:
            kind, fits = FIELDS.get(name, METRIC)
            if not fits(record[name]):
                raise DataError(f"{place}: {name} must be {kind}, it is {record[name]!r:.40}")
        records.append(record)
    return records


def cut_back(path: Path, step: int) -> None:
    """Keeps the lines of a log up to and including `step`; a torn last line goes too. Raises DataError."""
    if os.path.lexists(path):
        write_lines(path, [record for record in read_log(path) if record["step"] <= step])


def printable(text: object, kept: str = "\n\t") -> str:
    r"""The text with escapes for control characters, which could rewrite a terminal, and for what UTF-8 cannot encode.

    >>> printable("a\x1b[2J\u202eb")
    'a\\x1b[2J\\u202eb'
    """
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in str(text))
