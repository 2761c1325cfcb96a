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
    groups: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record["group"]][record["id"]].append(record)
    in_order = {}
    for group, problems in groups.items():
        in_order[group] = [problems[i] for i in sorted(problems)]
    return in_order


def verdicts(problems: list[list[dict]]) -> np.ndarray:
    """[n, s], 1 for a correct answer and 0 for a wrong one."""
    return np.array([[record["correct"] for record in problem] for problem in problems], float)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the chance that one of k answers is correct, per problem: [n, s] -> [n].

    It is 1 − C(s−c, k)/C(s, k) for c correct answers (Chen et al. 2021, eq. 1). Raises ValueError unless 1 ≤ k ≤ s.

    >>> pass_at_k(np.array([[1, 0, 0, 0], [1, 1, 0, 0]]), 2)
    array([0.5       , 0.83333333])
    """
    s = correct.shape[1]
    if not 1 <= k <= s:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, there are {s}")
    c = correct.sum(1, keepdims=True)
    i = np.arange(k)
    return 1 - np.prod(np.clip(s - c - i, 0, None) / (s - i), 1)


def majority(extracted: list[str | None], correct: list[bool]) -> float:
    """1.0 if the most frequent answer is correct, else 0.0; of a tie the correct share. Equivalent answers are one.

    >>> majority(["0.5", "1/2", "3", None], [True, True, False, False]), majority(["4", "5"], [True, False])
    (1.0, 0.5)
    """
    votes: list[list] = []  # [answer, count, is correct]
    for text, right in zip(extracted, correct, strict=True):
        if text is None:  # no answer, no vote
            continue
        for vote in votes:
            if is_same_answer(text, right, vote[0], vote[2]):
                vote[1] += 1
                break
        else:
            votes.append([text, 1, right])
    if not votes:
        return 0.0
    most = max(count for _, count, _ in votes)
    winners = [right for _, count, right in votes if count == most]
    return sum(winners) / len(winners)


def is_same_answer(a: str, a_is_correct: bool, b: str, b_is_correct: bool) -> bool:
    """Whether two extracted answers count as one: equal texts, two correct answers, or two equivalent wrong ones."""
    if a == b:
        return True
    if a_is_correct != b_is_correct:
        return False
    return a_is_correct or equivalent(a, b)


def wilson(share: float, n: int) -> tuple[float, float]:
    """(low, high), Wilson's 95 % interval of a share of n problems: at 0 and 1 it has a width, and stays in [0, 1].

    >>> "%.3f %.3f" % wilson(0.0, 30)
    '0.000 0.114'
    """
    z = 1.959964
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low = (middle - half) / (1 + z * z / n)
    high = (middle + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def interval(columns: list[np.ndarray], draws: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), the 95 % bootstrap interval of the mean over columns of each column's mean.

    columns: one array [n] of per-problem values for each benchmark, or [n, m] of m numbers that are drawn together.
    A draw resamples problems with all their samples: it covers sampling and the choice of problems. The seed is fixed.
    """
    rng = np.random.default_rng(0)
    means = 0.0
    for values in columns:
        n = len(values)
        # Problems with equal values are drawn together: a draw only counts how many of each kind it has.
        values, times = np.unique(values, axis=0, return_counts=True)
        drawn = []
        for _ in range(draws):
            counts = rng.multinomial(n, times / n)  # [kinds]
            drawn.append(counts @ values / n)
        means = means + np.array(drawn)
    low, high = np.percentile(means / len(columns), [2.5, 97.5], axis=0)
    return low, high


def paired_test(a: list[np.ndarray], b: list[np.ndarray], draws: int = 10_000) -> tuple[float, float, float, float]:
    """(difference b − a, low, high, p) for two models on the same problems; columns as in `interval`.

    low and high bound the bootstrap interval of the difference. p belongs to a sign-flip permutation test: under the
    null hypothesis both signs of a problem's difference are equally likely.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    observed = np.mean([d.mean() for d in differences])
    rng = np.random.default_rng(1)
    null = np.zeros(draws)
    for d in differences:
        nonzero = d[d != 0]
        for i in range(draws):
            signs = rng.choice([-1.0, 1.0], len(nonzero))
            null[i] += signs @ nonzero / len(d)
    as_large = np.sum(np.abs(null / len(differences)) >= abs(observed) - 1e-12)
    p = (1 + as_large) / (1 + draws)
    low, high = interval(differences)
    return float(observed), float(low), float(high), float(p)


def per_problem(problems: list[list[dict]]) -> dict[str, np.ndarray]:
    """{name of a number: [n], its value for each problem}."""
    correct = verdicts(problems)
    values = {"accuracy": correct.mean(1)}
    for k in range(1, correct.shape[1] + 1):
        values[f"pass@{k}"] = pass_at_k(correct, k)
    rows = []
    for problem in problems:
        vote = majority([r["extracted"] for r in problem], [r["correct"] for r in problem])
        cut_off = np.mean([r["finish_reason"] == "length" for r in problem])
        no_box = np.mean([r["reason"] == "no_answer" for r in problem])
        tokens = np.mean([r["tokens"] for r in problem])
        rows.append([vote, cut_off, no_box, tokens])
    columns = zip(*rows, strict=True)
    for name, column in zip(("majority", "cut off", "no box", "tokens"), columns, strict=True):
        values[name] = np.array(column)
    return values


def with_intervals(values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """{name: [n]} -> {name: [mean, low, high]}: Wilson's interval for 0/1 values of problems, else the bootstrap's."""
    matrix = np.stack(list(values.values()), 1)  # [n, m]
    means = matrix.mean(0).tolist()  # [m]
    lows, highs = interval([matrix])  # [m], [m]
    numbers = {}
    for i, (name, column) in enumerate(values.items()):
        is_share = name != "tokens" and np.isin(column, (0, 1)).all()
        if is_share:
            low, high = wilson(means[i], len(matrix))
        else:
            low, high = float(lows[i]), float(highs[i])
        numbers[name] = [means[i], low, high]
    return numbers


def summarise(records: list[dict]) -> dict:
    """{group: its numbers as [mean, low, high], and its accuracy by label; "average": the mean of the accuracies}."""
    summary = {}
    accuracy = {}
    for group, problems in by_problem(records).items():
        values = per_problem(problems)
        accuracy[group] = values["accuracy"]
        summary[group] = {"problems": len(problems), "samples": len(problems[0]), **with_intervals(values)}
        summary[group]["labels"] = by_label(problems, values["accuracy"])
    chosen = averaged(list(accuracy))
    summary["average"] = {"of": chosen, "accuracy": plain_mean([accuracy[group] for group in chosen])}
    return summary


def by_label(problems: list[list[dict]], accuracy: np.ndarray) -> dict[str, dict]:
    """{label: number and accuracy of the problems that have it}."""
    chosen = defaultdict(list)
    for problem, value in zip(problems, accuracy, strict=True):
        for label in problem[0]["labels"]:
            chosen[label].append(value)
    numbers = {}
    for label, values in sorted(chosen.items()):
        numbers[label] = {"problems": len(values), "accuracy": plain_mean([np.array(values)])}
    return numbers


def plain_mean(columns: list[np.ndarray]) -> list[float]:
    """[mean, low, high] of the mean over columns of each column's mean; a single column is one benchmark."""
    if len(columns) == 1:
        return with_intervals({"accuracy": columns[0]})["accuracy"]
    low, high = interval(columns)
    mean = np.mean([column.mean() for column in columns])
    return [float(mean), float(low), float(high)]


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
    head, *rest = rows
    lines = []
    for row in (head, ["---"] * len(head), *rest):
        lines.append(f"| {' | '.join(str(cell) for cell in row)} |")
    return "\n".join(lines)


def table(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table, in percent, of {row title: {group: accuracy}}."""
    groups = list(next(iter(columns.values())))
    rows = [["", *groups]]
    for title, accuracy in columns.items():
        rows.append([title, *(percent(accuracy[group]) for group in groups)])
    return markdown(rows)


def report(header: dict, summary: dict) -> str:
    """The tables of one result file: numbers by benchmark, then accuracies by label (level, subject, …)."""
    groups = {group: numbers for group, numbers in summary.items() if group != "average"}
    most = max(numbers["samples"] for numbers in groups.values())
    shown = [f"pass@{k}" for k in (2, 4, 8, 16, 32, 64, 128, 256) if k <= most]  # the summary file has all k
    if most > 1:
        shown.append("majority")
    name = "pass@1, greedy" if header["sampling"]["temperature"] == 0 else "avg@n"

    rows = [["", "problems", "n", name, *shown, "cut off", "no box", "tokens"]]
    labels = [["", "label", "problems", name]]
    for group, numbers in groups.items():
        row = [group, numbers["problems"], numbers["samples"]]
        for column in ("accuracy", *shown):
            row.append(percent(numbers[column]) if column in numbers else "")
        for column in ("cut off", "no box"):
            mean, _, _ = numbers[column]
            row.append(percent(mean))
        row.append(round(numbers["tokens"][0]))
        rows.append(row)
        for label, of_label in numbers["labels"].items():
            labels.append([group, label, of_label["problems"], percent(of_label["accuracy"])])
    average = summary["average"]
    empty = [""] * (len(shown) + 3)
    rows.append([f"average of {len(average['of'])}", "", "", percent(average["accuracy"]), *empty])

    tables = [markdown(rows)]
    if len(labels) > 1:
        tables.append(markdown(labels))
    return "\n\n".join(tables)


def compare(results: list[tuple[str, dict, list[dict]]]) -> str:
    """Tables of accuracies and of paired differences to the first result.

    results: (name, header, records) of each, for the same problems.
    """
    first_name, first_header, first_records = results[0]
    first_cells = cells_of(first_records)
    rows = [["", *first_cells]]
    for name, _, records in results:
        accuracies = [percent(plain_mean(cell)) for cell in cells_of(records).values()]
        rows.append([name, *accuracies])

    differences = [["", *first_cells]]
    notes = []
    for name, header, records in results[1:]:
        row = [f"{name} − {first_name}"]
        for title, cell in cells_of(records).items():
            row.append(difference(first_cells[title], cell))
        differences.append(row)
        for key in ("prompt", "sampling", "seed", "grader", "dtype"):
            if header.get(key) != first_header.get(key):
                notes.append(f"{name} and {first_name} differ in {key}: {header.get(key)} and {first_header.get(key)}")
    tables = [markdown(rows)]
    if len(results) > 1:
        tables += [P_NOTE, markdown(differences)]
    return "\n\n".join([*tables, *notes])


def cells_of(records: list[dict]) -> dict[str, list[np.ndarray]]:
    """{column of the tables: the accuracies [n] of the problems of its groups}: each group, then their average."""
    accuracy = {}
    for group, problems in by_problem(records).items():
        accuracy[group] = verdicts(problems).mean(1)
    cells = {group: [values] for group, values in accuracy.items()}
    chosen = averaged(list(accuracy))
    cells[f"average of {len(chosen)}"] = [accuracy[group] for group in chosen]
    return cells


def difference(first: list[np.ndarray], second: list[np.ndarray]) -> str:
    """The paired difference of two cells in percentage points, with its interval and p."""
    d, low, high, p = paired_test(first, second)
    significance = f"p={p:.3f}" if p >= 0.001 else "p<0.001"
    return f"{100 * d:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] {significance}"
