"""RUN/report.html, a look inside a run: one page without a server or network. infra/report.html is its template."""

import json
import math
from functools import lru_cache
from pathlib import Path

from infra.files import printable, read_log, read_object, write_atomically

LIMIT = 5_000_000  # bytes of the page; a single step may exceed it
POINTS = 1000  # of a curve
SHOWN = ("method", "task", "model", "steps", "seed", "lam", "shadow_rollouts", "shadow_ratio_cap", "kl_coef")


def write(run: Path) -> Path:
    """Writes the page and returns its path. Raises DataError for a log that is no file of JSON lines, and OSError."""
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    notes: list[str] = []
    data = {
        "name": printable(run.resolve().name),
        "settings": settings(run / "config.json"),
        "metrics": curves(read_log(run / "metrics.jsonl")),
        "evals": accuracies(read_log(run / "evals.jsonl")),
        "answers": answers(read_log(run / "answers.jsonl.gz"), LIMIT // 4, notes),
    }
    # The tokens of the rollouts get the room that is left.
    room = LIMIT - len(page.encode()) - len(dump(data))
    data["rollouts"] = rollouts(read_log(run / "tokens.jsonl.gz"), room, notes)
    data["notes"] = notes
    head, tail = page.split("DATA")
    write_atomically(run / "report.html", head + dump(data) + tail)
    return run / "report.html"


def dump(data: object) -> str:
    """JSON that ends no <script>: ASCII without "<"."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def rounded(x, digits: int):
    """Numbers with so many significant digits, inside lists and objects, too; whole ones as integers."""
    if isinstance(x, dict):
        return {name: rounded(value, digits) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value, digits) for value in x]
    if isinstance(x, float):
        x = float(f"{x:.{digits}g}")
        return int(x) if x == int(x) else x
    return x


@lru_cache(1 << 16)
def shown(text: str) -> str:
    """Text with escapes for control characters. The page shows it as text, never as HTML."""
    return printable(text)


def settings(config: Path) -> dict[str, str]:
    """The values of SHOWN in a run's config.json; none without that file."""
    if not config.exists():
        return {}
    values = read_object(config)["settings"]
    return {name: printable(values[name], "")[:200] for name in SHOWN if name in values}


def accuracies(evals: list[dict]) -> list[dict]:
    """{step, policy, shadow} of each evaluation; a method without a shadow has none."""
    rows = []
    for record in evals:
        row = {"step": record["step"], "policy": rounded(record["policy"], 4)}
        if "shadow" in record:
            row["shadow"] = rounded(record["shadow"], 4)
        rows.append(row)
    return rows


def curves(metrics: list[dict]) -> dict[str, list]:
    """A column of each metric, null where it has no value, at POINTS steps at most."""
    every = max(1, math.ceil(len(metrics) / POINTS))
    kept = metrics[::every]
    columns: dict[str, list] = {}
    for record in kept:
        for name in record:
            if name != "seconds":
                columns.setdefault(name, [])
    for name, column in columns.items():
        for record in kept:
            column.append(rounded(record.get(name), 4))
    return columns


def rollouts(records: list[dict], room: int, notes: list[str]) -> list[dict]:
    """The kept steps with their tokens: without entropy, or every n-th step, if all do not fit into `room` bytes."""
    steps = [step_of(record) for record in records]
    sizes = [len(dump(step)) + 1 for step in steps]
    if sum(sizes) > room:
        for step in steps:
            for group in step["groups"]:
                for row in group["rows"]:
                    row.pop("entropy", None)
        notes.append("The entropy of the tokens is omitted, to keep this page small.")
        sizes = [len(dump(step)) + 1 for step in steps]

    # Steps are counted from the end: the last one always stays.
    every = 1
    while sum(sizes[::-every]) > room and every < len(steps):
        every += 1
    if every > 1:
        notes.append(f"The page shows every {every}. of the {len(steps)} steps with kept rollouts, to stay small.")
    kept = steps[::-every]
    kept.reverse()
    return kept


def step_of(record: dict) -> dict:
    """A record of tokens.jsonl.gz with printable texts and short numbers."""
    step: dict = {"step": record["step"], "groups": [], "demonstrations": []}
    for group in record["groups"]:
        kept = {name: shown(group[name]) for name in ("of", "question", "answer", "prompt")}
        kept["rows"] = []
        for row in group["rows"]:
            short = rounded(row, 4)
            short["pieces"] = [shown(piece) for piece in row["pieces"]]
            kept["rows"].append(short)
        step["groups"].append(kept)
    for demonstration in record["demonstrations"]:
        step["demonstrations"].append(
            {
                "prompt": shown(demonstration["prompt"]),
                "pieces": [shown(piece) for piece in demonstration["pieces"]],
                "nll": rounded(demonstration["nll"], 3),
            }
        )
    return step


def answers(records: list[dict], room: int, notes: list[str]) -> dict:
    """{problems: [[group, question, answer]], evaluations: [{step, model, answers}]}.

    An answer is [response, extracted, 1 if right, "s" for stop or "l" for length]. If all do not fit into `room` bytes,
    only the first and the last evaluation remain, then only every n-th problem.
    """
    if not records:
        return {"problems": [], "evaluations": []}

    # All evaluations have the same problems.
    problems = []
    for i in range(len(records[-1]["question"])):
        problems.append([shown(records[-1][name][i]) for name in ("group", "question", "answer")])

    # Of two evaluations of a step, the later one counts: a resumed run repeated it.
    latest = {}
    for record in records:
        latest[record["step"], record["model"]] = record

    evaluations = []
    for (step, model), record in sorted(latest.items()):
        rows = []
        for i in range(len(problems)):
            response = shown(record["response"][i])
            extracted = shown(record["extracted"][i] or "")
            right = int(record["correct"][i])
            ending = record["finish_reason"][i][0]
            rows.append([response, extracted, right, ending])
        evaluations.append({"step": step, "model": shown(model), "answers": rows})

    first = evaluations[0]["step"]
    last = evaluations[-1]["step"]
    middle = [e for e in evaluations if first < e["step"] < last]
    if middle and len(dump(evaluations)) > room:
        evaluations = [e for e in evaluations if e["step"] in (first, last)]
        notes.append("Answers are those of the first and the last evaluation, to keep this page small.")
    every = math.ceil(len(dump([problems, evaluations])) / room)
    if every > 1:
        problems = problems[::every]
        for evaluation in evaluations:
            evaluation["answers"] = evaluation["answers"][::every]
        notes.append(f"Answers are shown for every {every}. evaluation problem, to keep this page small.")
    return {"problems": problems, "evaluations": evaluations}
