"""RUN/report.html, a look inside a run: one page without a server or network. infra/report.html is its template."""

import json
import os
from functools import lru_cache
from pathlib import Path

from infra.files import DataError, printable, read_log, read_object, write_atomically

LIMIT = 5_000_000  # bytes of the page; a single step may exceed it
POINTS = 1000  # of a curve
SHOWN = ("method", "task", "model", "steps", "seed", "lam", "shadow_rollouts", "shadow_ratio_cap", "kl_coef")


def write(run: Path) -> Path:
    """Writes the page and returns its path. Raises DataError for damaged logs, OSError."""
    config = read_object(run / "config.json").get("settings", {}) if os.path.lexists(run / "config.json") else {}
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    notes: list[str] = []
    evals = read_log(run / "evals.jsonl")
    data = {"name": printable(run.resolve().name), "settings": {}, "metrics": curves(read_log(run / "metrics.jsonl"))}
    if isinstance(config, dict):
        data["settings"] = {name: printable(config[name], "")[:200] for name in SHOWN if name in config}
    data["evals"] = [{k: rounded(r[k], 4) for k in ("step", "policy", "shadow") if k in r} for r in evals]
    data["answers"] = of(run / "answers.jsonl.gz", answers, LIMIT // 4, notes)
    room = LIMIT - len(page.encode()) - len(dump(data))
    data["rollouts"] = of(run / "tokens.jsonl.gz", rollouts, room, notes)
    data["notes"] = notes
    head, tail = page.split("DATA")
    write_atomically(run / "report.html", head + dump(data) + tail)
    return run / "report.html"


def of(path: Path, make, *arguments):
    """What `make` returns for the records of a log. Raises DataError, naming the file, if they have another form."""
    records = read_log(path)
    try:
        return make(records, *arguments)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a record that no run writes ({error!r:.80})") from error


def dump(data: object) -> str:
    """JSON that ends no <script>: ASCII without "<"."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def rounded(x, digits: int):
    """Numbers with so many significant digits, inside lists and objects, too; whole ones as integers."""
    if isinstance(x, dict):
        return {name: rounded(value, digits) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value, digits) for value in x]
    if type(x) is float:
        x = float(f"{x:.{digits}g}")
        return int(x) if x == int(x) else x
    return x


def curves(metrics: list[dict]) -> dict[str, list]:
    """A column of each metric, null where it has no value, at POINTS steps at most."""
    kept = metrics[:: -(-len(metrics) // POINTS) or 1]
    names = dict.fromkeys(name for m in kept for name in m if name != "seconds")
    return {name: [rounded(m.get(name), 4) for m in kept] for name in names}


@lru_cache(1 << 16)
def shown(text: str) -> str:
    """Text with escapes for control characters. The page shows it as text, never as HTML."""
    return printable(text)


def rollouts(records: list[dict], room: int, notes: list[str]) -> list[dict]:
    """The kept steps with their tokens: without entropy, or every n-th step, if all do not fit into `room` bytes."""
    steps = [step_of(record) for record in records]
    sizes = [len(dump(step)) + 1 for step in steps]
    if sum(sizes) > room:
        for row in (row for step in steps for group in step["groups"] for row in group["rows"]):
            row.pop("entropy", None)
        notes.append("The entropy of the tokens is omitted, to keep this page small.")
        sizes = [len(dump(step)) + 1 for step in steps]
    every = 1
    while sum(sizes[::-every]) > room and every < len(steps):
        every += 1
    if every > 1:
        notes.append(f"The page shows every {every}. of the {len(steps)} steps with kept rollouts, to stay small.")
    return steps[::-every][::-1]


def step_of(record: dict) -> dict:
    """A record of tokens.jsonl.gz with printable texts and short numbers."""
    step: dict = {"step": record["step"], "groups": [], "demonstrations": []}
    for group in record["groups"]:
        texts = {name: shown(group[name]) for name in ("of", "question", "answer", "prompt")}
        rows = [rounded(row, 4) | {"pieces": [shown(piece) for piece in row["pieces"]]} for row in group["rows"]]
        step["groups"].append(texts | {"rows": rows})
    for d in record["demonstrations"]:
        parts = [shown(piece) for piece in d["pieces"]]
        step["demonstrations"].append({"prompt": shown(d["prompt"]), "pieces": parts, "nll": rounded(d["nll"], 3)})
    return step


def answers(records: list[dict], room: int, notes: list[str]) -> dict:
    """{problems: [[group, question, answer]], evaluations: [{step, model, answers: [[response, extracted, right]]}]}.

    Only the first and the last evaluation, then only every n-th problem, if all do not fit into `room` bytes.
    """
    last = {(r["step"], r["model"]): r for r in records}  # of two evaluations of a step the later one
    steps = sorted({step for step, _ in last})
    columns = [records[-1][name] for name in ("group", "question", "answer")] if records else []
    problems, found = [[shown(text) for text in row] for row in zip(*columns, strict=True)], []
    for (step, model), r in sorted(last.items()):
        of_one = zip(r["response"], r["extracted"], r["correct"], r["finish_reason"], strict=True)
        rows = [[shown(text), shown(str(got or "")), int(right), end[:1]] for text, got, right, end in of_one]
        if len(rows) != len(problems):
            raise ValueError("evaluations of unequal problems")
        found.append({"step": step, "model": shown(model), "answers": rows})
    if len(steps) > 2 and len(dump(found)) > room:
        found = [e for e in found if e["step"] in (steps[0], steps[-1])]
        notes.append("Answers are those of the first and the last evaluation, to keep this page small.")
    every = -(-len(dump([problems, found])) // room)
    if every > 1:
        problems, found = problems[::every], [e | {"answers": e["answers"][::every]} for e in found]
        notes.append(f"Answers are shown for every {every}. evaluation problem, to keep this page small.")
    return {"problems": problems, "evaluations": found}
