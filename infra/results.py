"""Result files of evaluations: a line {"header": {...}} of what the numbers depend on, then one RECORD per line."""

import hashlib
import json
from collections import Counter
from pathlib import Path

from grading.scores import compare, report, summarise
from infra.files import DataError, read_lines, write_atomically, write_lines

RECORD = dict(group=str, id=int, sample=int, labels=list, answer=str, tolerance=int | float | None, unit=str | None,
              response=str, tokens=int, finish_reason=str, correct=bool, extracted=str | None, reason=str)  # fmt: skip


def read_results(path: Path, finished: bool = False) -> tuple[dict, list[dict]]:
    """(header, records) of a result file, without a torn last line. Raises DataError, naming file and line."""
    lines = read_lines(path, torn=True)
    place, first = next(lines, (f"{path}, line 1", {}))
    try:
        header = first["header"]
        asked = sum(header["sampling"]["samples"][g] * data["problems"] for g, data in header["data"].items())
    except (LookupError, TypeError, AttributeError) as error:
        text = "a header with sampling and data is needed; this is no result file of evaluate.py"
        raise DataError(f"{place}: {text}") from error
    records = {}
    for place, record in lines:
        wrong = [name for name, kind in RECORD.items() if name not in record or not isinstance(record[name], kind)]
        if wrong or record["group"] not in header["data"]:
            raise DataError(f"{place}: no answer to a problem of the header; wrong or missing: {wrong or ['group']}")
        records[record["group"], record["id"], record["sample"]] = record
    everything = list(records.values())
    if finished and len(complete(header, everything)) < asked:
        raise DataError(f"{path} holds {len(records)} of {asked} answers: the command that made it will finish it")
    return header, everything


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
    results = [("/".join(path.with_suffix("").parts[-2:]), *read_results(path, finished=True)) for path in paths]
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
