"""Graded answers in, numbers with their uncertainty and tables out.

A record is one answer: group (the benchmark), id (the problem), sample, correct, extracted, reason, finish_reason,
tokens, labels. n problems, s samples of each.
"""

import json
from collections import defaultdict

import numpy as np

import rewards
from benchmarks import PAPER
from tasks import DataError


def by_group(records: list[dict]) -> dict[str, np.ndarray]:
    """{group: [problems, samples] of 0 and 1}, groups sorted by name; problems keep their order."""
    rows = defaultdict(lambda: defaultdict(list))
    for i, record in enumerate(records):
        rows[record["group"]][record.get("id", i)].append(float(record["correct"]))
    return {group: np.array(list(problems.values())) for group, problems in sorted(rows.items())}


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Chance that one of k answers is right, per problem, without bias (Chen et al. 2021, eq. 1). [n, samples] -> [n]

    1 − C(s−c, k)/C(s, k) for c right ones of s, as a product. Raises ValueError for k above s.

    >>> pass_at_k(np.array([[1, 0, 0, 0], [1, 1, 0, 0]]), 2)
    array([0.5       , 0.83333333])
    """
    s = correct.shape[1]
    if not 1 <= k <= s:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, there are {s}")
    c = correct.sum(1)
    miss = np.ones(len(correct))
    for i in range(k):
        miss *= np.clip(s - c - i, 0, None) / (s - i)
    return 1 - miss


def majority(extracted: list[str | None], correct: list[bool]) -> float:
    """Whether the most frequent answer is right; answers count as one if they are equivalent. A tie is shared.

    >>> majority(["0.5", "1/2", "3", None], [True, True, False, False]), majority(["4", "5"], [True, False])
    (1.0, 0.5)
    """
    votes: list[list] = []  # [answer, count, right]
    for text, right in zip(extracted, correct, strict=True):
        if text is None:
            continue
        for vote in votes:
            if vote[0] == text or (vote[2] == right and (right or rewards.equivalent(text, vote[0]))):
                vote[1] += 1
                break
        else:
            votes.append([text, 1, right])
    most = max((count for _, count, _ in votes), default=0)
    winners = [right for _, count, right in votes if count == most]
    return sum(winners) / len(winners) if winners else 0.0


def interval(columns: list[np.ndarray], draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over columns of each column's mean, in which problems are drawn.

    columns: one array [n] of per-problem values for each benchmark. Drawing problems with all their samples covers both
    the luck of sampling and that of which problems a benchmark happens to hold. The seed is fixed.
    """
    rng = np.random.default_rng(0)
    means = np.zeros(draws)
    for values in columns:
        means += rng.multinomial(len(values), np.full(len(values), 1 / len(values)), draws) @ values / len(values)
    low, high = np.percentile(means / len(columns), [2.5, 97.5])
    return float(low), float(high)


def paired_test(a: list[np.ndarray], b: list[np.ndarray], draws: int = 10_000) -> tuple[float, float, float, float]:
    """(difference b − a, low, high, p) for two models on the same problems, columns as in `interval`.

    The interval is a bootstrap of per-problem differences; p comes from a sign-flip permutation test: under the null
    hypothesis each problem's difference is as likely to have the other sign.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    observed = float(np.mean([d.mean() for d in differences]))
    rng = np.random.default_rng(1)
    null = np.zeros(draws)
    for d in differences:
        null += rng.choice([-1.0, 1.0], (draws, len(d))) @ d / len(d)
    p = (1 + np.sum(np.abs(null / len(differences)) >= abs(observed) - 1e-12)) / (1 + draws)
    return observed, *interval(differences), float(p)


def summarise(records: list[dict]) -> dict:
    """{group or "average": its numbers}. "average" is over the paper's five if all are there, else over all groups."""
    groups = by_group(records)
    of_group = defaultdict(list)
    for record in records:
        of_group[record["group"]].append(record)
    summary = {}
    for group, correct in groups.items():
        rows, samples = of_group[group], correct.shape[1]
        by_problem = defaultdict(list)
        for record in rows:
            by_problem[record["id"]].append(record)
        votes = [majority([r["extracted"] for r in p], [r["correct"] for r in p]) for p in by_problem.values()]
        summary[group] = dict(
            problems=len(correct), samples=samples, accuracy=correct.mean(), interval=interval([correct.mean(1)]),
            pass_at={k: pass_at_k(correct, k).mean() for k in range(1, samples + 1)}, majority=float(np.mean(votes)),
            truncated=np.mean([r["finish_reason"] == "length" for r in rows]),
            no_answer=np.mean([r["reason"] == "no_answer" for r in rows]), tokens=np.mean([r["tokens"] for r in rows]),
            labels=by_label(rows),
        )  # fmt: skip
    chosen = averaged(list(groups))
    summary["average"] = dict(
        accuracy=np.mean([summary[g]["accuracy"] for g in chosen]), of=chosen,
        interval=interval([groups[g].mean(1) for g in chosen]),
    )  # fmt: skip
    return json.loads(json.dumps(summary, default=float))


def averaged(groups: list[str]) -> list[str]:
    return list(PAPER) if set(PAPER) <= set(groups) else groups


def by_label(records: list[dict]) -> dict[str, dict]:
    """Accuracy by level, subject and so on, with the interval over the problems that carry the label."""
    correct = defaultdict(lambda: defaultdict(list))
    for record in records:
        for label in record["labels"]:
            correct[label][record["id"]].append(float(record["correct"]))
    rows = {label: np.array([np.mean(c) for c in problems.values()]) for label, problems in sorted(correct.items())}
    return {label: dict(problems=len(v), accuracy=v.mean(), interval=interval([v])) for label, v in rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def with_interval(numbers: dict) -> str:
    return f"{percent(numbers['accuracy'])} [{', '.join(map(percent, numbers['interval']))}]"


def markdown(head: list[str], rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def table(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table of {column title: {group: accuracy}}, in percent."""
    groups = list(next(iter(columns.values())))
    return markdown(["", *groups], [[title, *(percent(a[g]) for g in groups)] for title, a in columns.items()])


def report(header: dict, summary: dict) -> str:
    """The table of one result file: a line per benchmark, then the accuracy by level, subject, …"""
    greedy = header["sampling"]["temperature"] == 0
    most = max(s["samples"] for g, s in summary.items() if g != "average")
    ks = [] if most == 1 else [k for k in (2, 4, 8, 16, 32, 64, 128, 256) if k <= most]
    name = "pass@1, greedy" if greedy else "avg@n"
    head = ["", "problems", "n", f"{name} [95 %]", *(f"pass@{k}" for k in ks), *(["maj@n"] if most > 1 else []),
            "cut off", "no box", "tokens"]  # fmt: skip
    rows = []
    for group, s in summary.items():
        if group == "average":
            rows.append([f"average of {len(s['of'])}", "", "", with_interval(s), *[""] * (len(head) - 4)])
            continue
        passes = [percent(s["pass_at"][str(k)]) if k <= s["samples"] else "" for k in ks]
        rows.append([group, s["problems"], s["samples"], with_interval(s), *passes,
                     *([percent(s["majority"])] if most > 1 else []), percent(s["truncated"]), percent(s["no_answer"]),
                     round(s["tokens"])])  # fmt: skip
    labels = [[g, label, n["problems"], with_interval(n)] for g, s in summary.items() if g != "average"
              for label, n in s["labels"].items()]  # fmt: skip
    text = markdown(head, rows)
    return text + ("\n\n" + markdown(["", "label", "problems", "accuracy [95 %]"], labels) if labels else "")


def compare(runs: list[tuple[str, dict, list[dict]]]) -> str:
    """The Markdown table of several (name, header, records), and their paired differences to the first.

    Raises DataError when two of them are not about the same problems.
    """
    columns = [by_group(records) for _, _, records in runs]
    for (name, header, _), groups in zip(runs[1:], columns[1:], strict=True):
        if header["data"] != runs[0][1]["data"]:
            raise DataError(f"--table: {name} and {runs[0][0]} were evaluated on different data: {header['data']}")
        if groups.keys() != columns[0].keys() or any(len(groups[g]) != len(columns[0][g]) for g in groups):
            raise DataError(f"--table: {name} and {runs[0][0]} hold different problems; is one unfinished?")
    groups = list(columns[0])
    head = ["", *groups, f"average of {len(averaged(groups))}"]
    rows = [[name, *(with_interval(s[g]) for g in (*groups, "average"))]
            for (name, _, records) in runs for s in [summarise(records)]]  # fmt: skip
    text = markdown(head, rows)
    differences = []
    for (name, *_), column in zip(runs[1:], columns[1:], strict=True):
        cells = []
        for chosen in (*([g] for g in groups), averaged(groups)):
            first, other = ([c[g].mean(1) for g in chosen] for c in (columns[0], column))
            difference, low, high, p = paired_test(first, other)
            cells.append(f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] p={p:.3f}")
        differences.append([f"{name} − {runs[0][0]}", *cells])
    return text + ("\n\n" + markdown(head, differences) if differences else "")
