"""Accuracies with their uncertainty, and tables of them, from graded answers.

A record is a graded answer: a dict with group (the benchmark), id (the problem), sample, correct, extracted, reason,
finish_reason, tokens and labels. In shapes, n is the number of problems, s the number of samples of each problem.
"""

import math
from collections import defaultdict

import numpy as np

from grading.answers import equivalent

PAPER = ("math500", "minerva_math", "olympiadbench", "aime24", "amc23")  # the benchmarks of the paper's average
P_NOTE = "Differences, with p for these two models on these problems, not for two methods: a run is one seed."


def by_problem(records: list[dict]) -> dict[str, list[list[dict]]]:
    """{group: [the records of each problem]}; groups in order of appearance, problems in order of their id."""
    groups = defaultdict(lambda: defaultdict(list))
    for i, record in enumerate(records):
        groups[record["group"]][record.get("id", i)].append(record)
    return {group: [problems[i] for i in sorted(problems)] for group, problems in groups.items()}


def verdicts(problems: list[list[dict]]) -> np.ndarray:
    """[n, s], 1 for a correct answer and 0 for a wrong one."""
    return np.array([[record["correct"] for record in problem] for problem in problems], float)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the chance that one of k answers is correct, per problem: [n, s] -> [n].

    It is 1 − C(s−c, k)/C(s, k) for c correct answers (Chen et al. 2021, eq. 1). Raises ValueError for k above s.

    >>> pass_at_k(np.array([[1, 0, 0, 0], [1, 1, 0, 0]]), 2)
    array([0.5       , 0.83333333])
    """
    s = correct.shape[1]
    if not 1 <= k <= s:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, there are {s}")
    c, i = correct.sum(1, keepdims=True), np.arange(k)
    return 1 - np.prod(np.clip(s - c - i, 0, None) / (s - i), 1)


def majority(extracted: list[str | None], correct: list[bool]) -> float:
    """1.0 if the most frequent answer is correct, else 0.0; of a tie the correct share. Equivalent answers are one.

    >>> majority(["0.5", "1/2", "3", None], [True, True, False, False]), majority(["4", "5"], [True, False])
    (1.0, 0.5)
    """
    votes: list[list] = []  # [answer, count, is correct]
    for text, right in ((t, r) for t, r in zip(extracted, correct, strict=True) if t is not None):
        equal = (v for v in votes if v[0] == text or (v[2] == right and (right or equivalent(text, v[0]))))
        if vote := next(equal, None):
            vote[1] += 1
        else:
            votes.append([text, 1, right])
    most = max((count for _, count, _ in votes), default=0)
    winners = [right for _, count, right in votes if count == most]
    return sum(winners) / len(winners) if winners else 0.0


def wilson(share: float, n: int) -> tuple[float, float]:
    """(low, high), Wilson's 95 % interval of a share of n problems; at 0 and 1 it still has a width.

    >>> "%.3f %.3f" % wilson(0.0, 30)
    '0.000 0.114'
    """
    z = 1.959964
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def interval(columns: list[np.ndarray], draws: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), the 95 % bootstrap interval of the mean over columns of each column's mean.

    columns: one array [n] of per-problem values for each benchmark, or [n, m] of m numbers that are drawn together.
    A draw resamples problems with all their samples: it covers sampling and the choice of problems. The seed is fixed.
    """
    rng, means = np.random.default_rng(0), 0.0
    for values in columns:
        n = len(values)
        values, times = np.unique(values, axis=0, return_counts=True)  # draws count problems with equal values together
        blocks = np.diff([*range(0, draws, 1 + 10**7 // len(values)), draws])  # one block takes at most 80 MB
        counts = (rng.multinomial(n, times / n, block) for block in blocks)
        means = means + np.concatenate([c @ values / n for c in counts])
    return tuple(np.percentile(means / len(columns), [2.5, 97.5], axis=0))


def paired_test(a: list[np.ndarray], b: list[np.ndarray], draws: int = 10_000) -> tuple[float, float, float, float]:
    """(difference b − a, low, high, p) for two models on the same problems; columns as in `interval`.

    low and high bound the bootstrap interval of the difference. p belongs to a sign-flip permutation test: under the
    null hypothesis both signs of a problem's difference are equally likely.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    observed = np.mean([d.mean() for d in differences])
    rng, null = np.random.default_rng(1), np.zeros(draws)
    for d in differences:
        nonzero = d[d != 0]
        null += [rng.choice([-1.0, 1.0], len(nonzero)) @ nonzero / len(d) for _ in range(draws)]
    p = (1 + np.sum(np.abs(null / len(differences)) >= abs(observed) - 1e-12)) / (1 + draws)
    return float(observed), *map(float, interval(differences)), float(p)


def per_problem(problems: list[list[dict]]) -> dict[str, np.ndarray]:
    """{name of a number: [n], its value for each problem}."""
    correct = verdicts(problems)
    means = {"cut off": lambda r: r["finish_reason"] == "length", "no box": lambda r: r["reason"] == "no_answer",
             "tokens": lambda r: r["tokens"]}  # fmt: skip
    votes = [majority([r["extracted"] for r in p], [r["correct"] for r in p]) for p in problems]
    return {
        "accuracy": correct.mean(1), **{f"pass@{k + 1}": pass_at_k(correct, k + 1) for k in range(correct.shape[1])},
        "majority": np.array(votes),
        **{name: np.array([np.mean([of(r) for r in p]) for p in problems]) for name, of in means.items()},
    }  # fmt: skip


def with_intervals(values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """{name: [n]} -> {name: [mean, low, high]}: Wilson's interval for 0/1 values of problems, else the bootstrap's."""
    matrix = np.stack(list(values.values()), 1)  # [n, m]
    rows = np.stack([matrix.mean(0), *interval([matrix])], 1)  # [m, 3]
    counts = {name: name != "tokens" and np.isin(column, (0, 1)).all() for name, column in values.items()}
    return {name: [mean, *(wilson(mean, len(matrix)) if counts[name] else bootstrap)]
            for name, (mean, *bootstrap) in zip(values, rows.tolist(), strict=True)}  # fmt: skip


def summarise(records: list[dict]) -> dict:
    """{group: its numbers as [mean, low, high], and its accuracy by label; "average": the mean of the accuracies}."""
    summary, accuracy = {}, {}
    for group, problems in by_problem(records).items():
        values = per_problem(problems)
        accuracy[group] = values["accuracy"]
        summary[group] = dict(problems=len(problems), samples=len(problems[0]), **with_intervals(values), labels={})
        for label in sorted({label for problem in problems for label in problem[0]["labels"]}):
            chosen = accuracy[group][[label in problem[0]["labels"] for problem in problems]]
            summary[group]["labels"][label] = dict(problems=len(chosen), **with_intervals({"accuracy": chosen}))
    of = averaged(list(accuracy))
    return summary | {"average": dict(of=of, accuracy=plain_mean([accuracy[g] for g in of]))}


def plain_mean(columns: list[np.ndarray]) -> list[float]:
    """[mean, low, high] of the mean over columns of each column's mean; a single column is one benchmark."""
    if len(columns) == 1:
        return with_intervals({"accuracy": columns[0]})["accuracy"]
    return [np.mean([c.mean() for c in columns]).item(), *map(float, interval(columns))]


def averaged(groups: list[str]) -> list[str]:
    """The groups of the average: the paper's five benchmarks if all of them were evaluated, else all groups."""
    return list(PAPER) if set(PAPER) <= set(groups) else groups


def percent(number: float | list[float]) -> str:
    """25.0 for 0.25, and 25.0 [20.1, 30.2] for [mean, low, high]."""
    if isinstance(number, list):
        return f"{percent(number[0])} [{percent(number[1])}, {percent(number[2])}]"
    return f"{100 * number:.1f}"


def markdown(rows: list[list]) -> str:
    """A Markdown table; the first row is its head."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def table(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table, in percent, of {row title: {group: accuracy}}."""
    groups = list(next(iter(columns.values())))
    return markdown([["", *groups], *([title, *(percent(a[g]) for g in groups)] for title, a in columns.items())])


def report(header: dict, summary: dict) -> str:
    """The tables of one result file: numbers by benchmark, then accuracies by label (level, subject, …)."""
    groups = {g: numbers for g, numbers in summary.items() if g != "average"}
    most = max(numbers["samples"] for numbers in groups.values())
    shown = [f"pass@{k}" for k in (2, 4, 8, 16, 32, 64, 128, 256) if k <= most]  # the summary file has all k
    shown += ["majority"] if most > 1 else []
    name = "pass@1, greedy" if header["sampling"]["temperature"] == 0 else "avg@n"
    rows = [["", "problems", "n", name, *shown, "cut off", "no box", "tokens"]]
    labels = [["", "label", "problems", name]]
    for g, n in groups.items():
        cells = [percent(n[k]) if k in n else "" for k in ("accuracy", *shown)]
        rows.append([g, n["problems"], n["samples"], *cells, *(percent(n[k][0]) for k in ("cut off", "no box")),
                     round(n["tokens"][0])])  # fmt: skip
        labels += [[g, label, m["problems"], percent(m["accuracy"])] for label, m in n["labels"].items()]
    average = summary["average"]
    rows.append([f"average of {len(average['of'])}", "", "", percent(average["accuracy"]), *[""] * (len(shown) + 3)])
    return "\n\n".join(markdown(table) for table in (rows, labels) if len(table) > 1)


def compare(results: list[tuple[str, dict, list[dict]]]) -> str:
    """Tables of accuracies and of paired differences to the first result. Raises ValueError if the problems differ."""
    first_name, first_header, first_records = results[0]
    groups = list(by_problem(first_records))
    choices = [*([g] for g in groups), averaged(groups)]  # one cell for each benchmark, one for the average
    head = ["", *groups, f"average of {len(choices[-1])}"]
    rows, differences, notes, first_cells = [head], [head], [], []
    for name, header, records in results:
        if header["data"] != first_header["data"]:
            raise ValueError(f"{name} and {first_name} were evaluated on different data: {header['data']}")
        accuracy = {g: verdicts(problems).mean(1) for g, problems in by_problem(records).items()}
        cells = [[accuracy[g] for g in chosen] for chosen in choices]
        rows.append([name, *(percent(plain_mean(cell)) for cell in cells)])
        if not first_cells:
            first_cells = cells
            continue
        differences.append([f"{name} − {first_name}"])
        for first, cell in zip(first_cells, cells, strict=True):
            d, low, high, p = paired_test(first, cell)
            significance = f"p={p:.3f}" if p >= 0.001 else "p<0.001"
            differences[-1].append(f"{100 * d:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] {significance}")
        for key in ("prompt", "sampling", "seed", "grader", "dtype"):
            if header.get(key) != first_header.get(key):
                notes.append(f"{name} and {first_name} differ in {key}: {header.get(key)} and {first_header.get(key)}")
    tables = [markdown(rows), P_NOTE, markdown(differences)] if len(results) > 1 else [markdown(rows)]
    return "\n\n".join([*tables, *notes])
