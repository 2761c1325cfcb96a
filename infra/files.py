"""Files that survive kill -9 and a full disk: written under a temporary name, then renamed; logs of JSON lines.

A log named .jsonl.gz has one gzip member for each line, so that a kill can damage the last line only.
"""

import gzip
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LFS = b"version https://git-lfs.github.com/spec/"  # begins a pointer


class DataError(ValueError):
    """A file that cannot be used as it is; the message names file, line and field."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to an OSError of the block that names no file: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole: a kill leaves the old one or the new one."""
    if isinstance(content, str):
        content = content.encode()
    scratch = path.with_name(path.name + ".tmp")
    with naming(path):
        scratch.write_bytes(content)
    os.replace(scratch, path)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An empty scratch folder that replaces `folder` at the end of the block; an exception discards it.

    A kill leaves the old folder, the new one or, between two renames, neither; never a part of one.
    """
    scratch = folder.with_name(f".{folder.name}.tmp")
    old = folder.with_name(f".{folder.name}.old")
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
    if path.suffix == ".gz":
        return gzip.compress(line, 6, mtime=0)
    return line


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def append_line(path: Path, record: dict) -> None:
    """Adds one object to a file of JSON lines."""
    with naming(path), open(path, "ab") as file:
        file.write(_line(path, record))


def write_lines(path: Path, records: list[dict]) -> None:
    """Replaces a file of JSON lines as a whole."""
    write_atomically(path, b"".join(_line(path, record) for record in records))


def _gzip_lines(content: bytes, path: Path, torn: bool) -> Iterator[bytes]:
    """The lines of a compressed file; `torn`: without those of a torn last member. Raises DataError for damage."""
    # gzip calls a torn member damaged if only its first byte, 1f, was written. No whole member of a log ends with this
    # byte: it would hold half a gigabyte of text.
    if torn:
        content = content.removesuffix(b"\x1f")
    try:
        with gzip.open(io.BytesIO(content)) as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        if not (torn and isinstance(error, EOFError)):
            raise DataError(f"{path}: damaged ({error})") from error


def read_lines(path: Path, torn: bool = False) -> Iterator[tuple[str, dict]]:
    """(place, object) of every line of a file of JSON lines; the place names file and line.

    `torn`: a kill may have cut the last line, which has no newline then and is left out. Raises DataError, naming the
    place, for a missing file and a line that is no JSON object.
    """
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}")
    with open(path, "rb") as file:
        lines = _gzip_lines(file.read(), path, torn) if path.suffix.lower() == ".gz" else file
        for number, line in enumerate(lines, 1):
            place = f"{path}, line {number}"
            is_torn = torn and not line.endswith(b"\n")
            if line.strip() and not is_torn:
                yield place, json_object(line, place)


def refuse_pointer(path: Path) -> None:
    """Raises DataError if Git LFS has left its pointer in place of a file."""
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise DataError(f"{path} is a pointer of Git LFS: `git lfs pull` replaces it by the file")


def json_object(text: bytes, place: str) -> dict:
    """The JSON object in a text, with or without a byte order mark. Raises DataError, naming the place."""
    try:
        row = json.loads(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise DataError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON object is needed, this is a {type(row).__name__}")
    return row


def read_object(path: Path) -> dict:
    """The JSON object that a file contains. Raises OSError and DataError."""
    return json_object(path.read_bytes(), str(path))


def read_log(path: Path) -> list[dict]:
    """The records of a run's log, without a torn last line; none if there is no such file. Raises DataError."""
    if not path.exists():
        return []
    return [record for _, record in read_lines(path, torn=True)]


def cut_back(path: Path, step: int) -> None:
    """Keeps the lines of a log up to and including `step`; a torn last line goes too. Raises DataError."""
    if path.exists():
        kept = [record for record in read_log(path) if record["step"] <= step]
        write_lines(path, kept)


def printable(text: object, kept: str = "\n\t") -> str:
    r"""The text with escapes for control characters, which could rewrite a terminal, and for what UTF-8 cannot encode.

    >>> printable("a\x1b[2J\u202eb")
    'a\\x1b[2J\\u202eb'
    """
    shown = []
    for c in str(text):
        if c.isprintable() or c in kept:
            shown.append(c)
        else:
            shown.append(c.encode("unicode_escape").decode())
    return "".join(shown)
