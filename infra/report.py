"""RUN/report.html, a look inside a run: one page without a server or network. infra/report.html is its template."""

import json
import math
from pathlib import Path

from infra.files import read_log, read_object, write_atomically

POINTS = 500  # of a curve
ANSWERS = 1_250_000  # bytes of the evaluations' answers in the page
TOKENS = 3_500_000  # bytes of the tokens in the page
SHOWN = ("method", "task", "model", "steps", "seed", "lam", "eta", "shadow_rollouts", "shadow_ratio_cap", "kl_coef")


def write(run: Path) -> Path:
    """Writes the page and returns its path. Raises DataError for a log that is no file of JSON lines, and OSError."""
    settings = read_object(run / "config.json")["settings"]
    metrics = read_log(run / "metrics.jsonl")
    steps = read_log(run / "tokens.jsonl.gz")
    evaluations = read_log(run / "answers.jsonl.gz")
    notes = []

    every = math.ceil(size(steps) / TOKENS)
    if every > 1:
        notes.append(f"The page shows every {every}. of the {len(steps)} steps with kept rollouts, to stay small.")
        steps = every_nth(steps, every)

    every = math.ceil(size(evaluations) / ANSWERS)
    if every > 1:
        notes.append(f"Answers are shown for every {every}. evaluation problem, to keep this page small.")
        evaluations = [every_nth_problem(evaluation, every) for evaluation in evaluations]

    data = {
        "name": run.resolve().name,
        "settings": {name: settings[name] for name in SHOWN if name in settings},
        "metrics": every_nth(metrics, 1 + len(metrics) // POINTS),
        "evals": read_log(run / "evals.jsonl"),
        "answers": evaluations,
        "rollouts": steps,
        "notes": notes,
    }
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    write_atomically(run / "report.html", page.replace("DATA", dump(data)))
    return run / "report.html"


def dump(data: object) -> str:
    """JSON that ends no <script>: ASCII without "<"."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def size(data: object) -> int:
    """Bytes of the data in the page."""
    return len(dump(data))


def every_nth(records: list[dict], n: int) -> list[dict]:
    """Every n-th record, counted from the end: the last one always stays."""
    kept = records[::-n]
    kept.reverse()
    return kept


def every_nth_problem(evaluation: dict, n: int) -> dict:
    """A record of answers.jsonl.gz, whose lists have one entry per problem, with every n-th problem."""
    thinned = {}
    for name, value in evaluation.items():
        thinned[name] = value[::n] if isinstance(value, list) else value
    return thinned
