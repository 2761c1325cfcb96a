"""Result files of evaluations: a line {"header": {...}} of what the numbers depend on, then one RECORD per line."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from grading.scores import compare, report, summarise
from infra.files import DataError, is_count, is_number, read_lines, write_atomically, write_lines

RECORD = dict(group=str, id=int, sample=int, labels=list, answer=str, tolerance=int | float | None, unit=str | None,
              response=str, tokens=int, finish_reason=str, correct=bool, extracted=str | None,
              reason=str)  # fmt: skip


def read_results(path: Path, finished: bool = False) -> tuple[dict, list[dict]]:
    """(header, records) of a result file, without a torn last line. Raises DataError, naming file and line.

    finished: every answer is there.
    """
    lines = read_lines(path, torn=True)
    place, first = next(lines, (f"{path}, line 1", {}))
    try:
        header, sampling = first["header"], first["header"]["sampling"]
        sizes = {g: (data["problems"], sampling["samples"][g]) for g, data in header["data"].items() if g != "average"}
        known = is_number(sampling["temperature"]) and all(is_count(n) and n for size in sizes.values() for n in size)
    except (LookupError, TypeError, AttributeError):
        known, sizes = False, {}
    if not (known and sizes):
        text = "a header with sampling and data is needed; this is no result file of evaluate.py"
        raise DataError(f"{place}: {text}")
    records, asked = {}, sum(problems * samples for problems, samples in sizes.values())
    for place, record in lines:
        wrong = [name for name, kind in RECORD.items() if name not in record or not _fits(record[name], kind)]
        if not wrong:
            problems, samples = sizes.get(record["group"], (0, 0))
            inside = dict(group=samples > 0, id=0 <= record["id"] < problems, sample=0 <= record["sample"] < samples)
            wrong = [name for name, is_inside in inside.items() if not is_inside][:1]
        if wrong:
            raise DataError(f"{place}: no answer to a problem of the header; wrong or missing: {wrong}")
        records[record["group"], record["id"], record["sample"]] = record
    if finished and len(records) < asked:
        raise DataError(f"{path} holds {len(records)} of {asked} answers: the command that made it will finish it")
    return header, list(records.values())


def _fits(value: object, kind: type) -> bool:
    """Whether a value of a record has its type; labels are texts, numbers finite."""
    if kind is list:
        return isinstance(value, list) and all(isinstance(label, str) for label in value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, int | float) or is_number(value))


def complete(header: dict, records: list[dict]) -> list[dict]:
    """The records of the problems that have all their samples."""
    count = Counter((r["group"], r["id"]) for r in records)
    return [r for r in records if count[r["group"], r["id"]] == header["sampling"]["samples"][r["group"]]]


def write_results(path: Path, header: dict, records: list[dict]) -> None:
    """Replaces a result file as a whole; makes its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [{"header": header}, *records])


def open_results(path: Path, header: dict) -> list[dict]:
    """Cuts a result file back to its complete problems and returns their records, or begins a new file."""
    before, records = read_results(path) if path.exists() else (header, [])
    if changed := [key for key in header if before.get(key) != header[key]]:
        raise DataError(f"{path} exists and was made with another {', '.join(changed)}: choose another --out")
    records = complete(header, records)
    write_results(path, header, records)
    return records


def write_summary(path: Path, header: dict, records: list[dict]) -> str:
    """Writes all numbers beside a result file, as NAME.summary.json. Returns the report to print."""
    summary = summarise(records)
    name = path.name.removesuffix(".jsonl") + ".summary.json"
    write_atomically(path.with_name(name), json.dumps(header | summary, indent=1))
    return report(header, summary)


def table(paths: list[Path]) -> str:
    """The comparison of result files to print. Raises DataError like `read_results`, and if their problems differ."""
    read = [(path, *read_results(path, finished=True)) for path in paths]
    results = [("/".join(path.with_suffix("").parts[-2:]), header, records) for path, header, records in read]
    try:
        return compare(results)
    except ValueError as error:
        raise DataError(str(error)) from error


def weights_hash(folder: str) -> str:
    """16 hex digits that change with any weight file in a model folder and with its config.json."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json":
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
