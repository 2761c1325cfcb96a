"""Result files of evaluations: a line {"header": {...}} of what the numbers depend on, then one answer per line."""

import hashlib
import json
from pathlib import Path

from grading.scores import by_problem, compare, report, summarise
from infra.files import DataError, read_lines, write_atomically, write_lines


def read_results(path: Path, finished: bool = False) -> tuple[dict, list[dict]]:
    """(header, records) of a result file, without a torn last line. Raises DataError, naming file and line.

    finished: refuse a file that lacks answers.
    """
    lines = read_lines(path, torn=True)
    _, first = next(lines, ("", {}))
    header = first.get("header")
    if not isinstance(header, dict) or not {"data", "sampling"} <= header.keys():
        raise DataError(f"{path}, line 1: there is no header; this is no result file of evaluate.py")

    # A kill can leave an answer that its continuation wrote again: the later one counts.
    records = {}
    for _, record in lines:
        records[record["group"], record["id"], record["sample"]] = record

    expected = 0
    for group, data in header["data"].items():
        expected += data["problems"] * header["sampling"]["samples"][group]
    if finished and len(records) < expected:
        raise DataError(f"{path} holds {len(records)} of {expected} answers: the command that made it will finish it")
    return header, list(records.values())


def write_results(path: Path, header: dict, records: list[dict]) -> None:
    """Replaces a result file as a whole; makes its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [{"header": header}, *records])


def open_results(path: Path, header: dict) -> list[dict]:
    """Cuts a result file back to its complete problems and returns their records, or begins a new file.

    Raises DataError if the file was made with another header.
    """
    complete = []
    if path.exists():
        before, records = read_results(path)
        changed = [key for key in header if before.get(key) != header[key]]
        if changed:
            raise DataError(f"{path} exists and was made with another {', '.join(changed)}: choose another --out")
        for group, problems in by_problem(records).items():
            for problem in problems:
                if len(problem) == header["sampling"]["samples"][group]:
                    complete += problem
    write_results(path, header, complete)
    return complete


def write_summary(path: Path, header: dict, records: list[dict]) -> str:
    """Writes all numbers beside a result file, as NAME.summary.json. Returns the report to print, of a run's step."""
    summary = summarise(records)
    name = path.name.removesuffix(".jsonl") + ".summary.json"
    write_atomically(path.with_name(name), json.dumps(header | summary, indent=1))
    of_step = f"step {header['step']} of {header['model']}\n\n" if "step" in header else ""
    return of_step + report(header, summary)


def table(paths: list[Path]) -> str:
    """The comparison of result files to print. Raises DataError like `read_results`, and if their problems differ."""
    results = []
    for path in paths:
        header, records = read_results(path, finished=True)
        title = "/".join(path.with_suffix("").parts[-2:])
        results.append((title, header, records))
        if header["data"] != results[0][1]["data"]:
            raise DataError(f"{title} and {results[0][0]} were evaluated on different data: {header['data']}")
    return compare(results)


def weights_hash(folder: str) -> str:
    """16 hex digits that change with any weight file in a model folder and with its config.json."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json":
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
