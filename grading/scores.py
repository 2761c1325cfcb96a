"""Graded answers in, numbers with their uncertainty and tables out.

A record is one answer: group (the benchmark), id (the problem), sample, correct, extracted, reason, finish_reason,
tokens, labels. n problems, s samples of each.
"""

from collections import defaultdict

import numpy as np

import rewards
from tasks.benchmarks import PAPER
from tasks.task import DataError


def by_problem(records: list[dict]) -> dict[str, list[list[dict]]]:
    """{group: [the records of each problem]}, groups in order of appearance, problems in order of their id."""
    groups = defaultdict(lambda: defaultdict(list))
    for i, record in enumerate(records):
        groups[record["group"]][record.get("id", i)].append(record)
    return {group: [problems[i] for i in sorted(problems)] for group, problems in groups.items()}


def verdicts(problems: list[list[dict]]) -> np.ndarray:  # [n, s] of 0 and 1
    return np.array([[record["correct"] for record in problem] for problem in problems], float)


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


def interval(columns: list[np.ndarray], draws: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean over columns of each column's mean, in which problems are drawn.

    columns: for each benchmark one array [n] of per-problem values, or [n, m] of m numbers, then drawn together.
    Drawing problems with all their samples covers both the luck of sampling and that of which problems a benchmark
    happens to hold. The seed is fixed.
    """
    rng = np.random.default_rng(0)
    means = 0.0
    for values in columns:
        n = len(values)
        values, times = np.unique(values, axis=0, return_counts=True)  # problems with the same numbers are drawn as one
        blocks = np.diff([*range(0, draws, 1 + 10**7 // len(values)), draws])  # a block of counts has about 80 MB
        counts = (rng.multinomial(n, times / n, block) for block in blocks)
        means = means + np.concatenate([c @ values / n for c in counts])
    return tuple(np.percentile(means / len(columns), [2.5, 97.5], axis=0))


def paired_test(a: list[np.ndarray], b: list[np.ndarray], draws: int = 10_000) -> tuple[float, float, float, float]:
    """(difference b − a, low, high, p) for two models on the same problems, columns as in `interval`.

    The interval is a bootstrap of per-problem differences; p comes from a sign-flip permutation test: under the null
    hypothesis each problem's difference is as likely to have the other sign.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    observed = np.mean([d.mean() for d in differences])
    rng = np.random.default_rng(1)
    null = np.zeros(draws)
    for d in differences:
        nonzero = d[d != 0]
        null += [rng.choice([-1.0, 1.0], len(nonzero)) @ nonzero / len(d) for _ in range(draws)]
    p = (1 + np.sum(np.abs(null / len(differences)) >= abs(observed) - 1e-12)) / (1 + draws)
    return float(observed), *map(float, interval(differences)), float(p)


def per_problem(problems: list[list[dict]]) -> dict[str, np.ndarray]:
    """{number: [n] its value for each problem}."""
    correct = verdicts(problems)

    def mean(value) -> np.ndarray:
        return np.array([np.mean([value(record) for record in problem]) for problem in problems])

    votes = [majority([r["extracted"] for r in p], [r["correct"] for r in p]) for p in problems]
    return {
        "accuracy": correct.mean(1), **{f"pass@{k + 1}": pass_at_k(correct, k + 1) for k in range(correct.shape[1])},
        "majority": np.array(votes), "cut off": mean(lambda r: r["finish_reason"] == "length"),
        "no box": mean(lambda r: r["reason"] == "no_answer"), "tokens": mean(lambda r: r["tokens"]),
    }  # fmt: skip


def with_intervals(values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """{number: [mean, low, high]}."""
    matrix = np.stack(list(values.values()), 1)  # [n, m]
    rows = np.stack([matrix.mean(0), *interval([matrix])], 1)  # [m, 3]
    return dict(zip(values, rows.tolist(), strict=True))


def summarise(records: list[dict]) -> dict:
    """{group: its numbers, each as [mean, low, high], also by label; "average": …} (see `averaged`)."""
    summary, accuracy = {}, {}
    for group, problems in by_problem(records).items():
        values = per_problem(problems)
        accuracy[group] = values["accuracy"]
        of_label = defaultdict(list)
        for i, problem in enumerate(problems):
            for label in problem[0]["labels"]:
                of_label[label].append(i)
        labels = {
            label: dict(problems=len(i), **with_intervals({"accuracy": values["accuracy"][i]}))
            for label, i in sorted(of_label.items())
        }
        summary[group] = dict(problems=len(problems), samples=len(problems[0]), **with_intervals(values), labels=labels)
    chosen = averaged(list(accuracy))
    return summary | {"average": dict(of=chosen, accuracy=plain_mean([accuracy[g] for g in chosen]))}


def plain_mean(columns: list[np.ndarray]) -> list[float]:
    """[mean, low, high] of the mean over columns of each column's mean."""
    return [np.mean([c.mean() for c in columns]).item(), *map(float, interval(columns))]


def averaged(groups: list[str]) -> list[str]:
    """What the average is over: the paper's five benchmarks if all of them are there, else all groups."""
    return list(PAPER) if set(PAPER) <= set(groups) else groups


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def bracketed(number: list[float]) -> str:
    """Percent, with the interval."""
    return f"{percent(number[0])} [{percent(number[1])}, {percent(number[2])}]"


def markdown(head: list[str], rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def table(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table of {column title: {group: accuracy}}, in percent."""
    groups = list(next(iter(columns.values())))
    return markdown(["", *groups], [[title, *(percent(a[g]) for g in groups)] for title, a in columns.items()])


def report(header: dict, summary: dict) -> str:
    """The table of one result file: a line per benchmark, then the accuracy by level, subject, …"""
    groups = {g: s for g, s in summary.items() if g != "average"}
    most = max(s["samples"] for s in groups.values())
    shown = ["accuracy"]  # all k are in the summary file
    if most > 1:
        shown += [*(f"pass@{k}" for k in (2, 4, 8, 16, 32, 64, 128, 256) if k <= most), "majority"]
    name = "pass@1, greedy" if header["sampling"]["temperature"] == 0 else "avg@n"
    rows = [
        [g, s["problems"], s["samples"], *(bracketed(s[k]) if k in s else "" for k in shown),
         percent(s["cut off"][0]), percent(s["no box"][0]), round(s["tokens"][0])]
        for g, s in groups.items()
    ]  # fmt: skip
    average = summary["average"]
    rows.append([f"average of {len(average['of'])}", "", "", bracketed(average["accuracy"]), *[""] * (len(shown) + 2)])
    text = markdown(["", "problems", "n", name, *shown[1:], "cut off", "no box", "tokens"], rows)
    labels = [[g, label, n["problems"], bracketed(n["accuracy"])] for g, s in groups.items()
              for label, n in s["labels"].items()]  # fmt: skip
    return text + ("\n\n" + markdown(["", "label", "problems", name], labels) if labels else "")


def compare(runs: list[tuple[str, dict, list[dict]]]) -> str:
    """The Markdown table of several (name, header, records), and their paired differences to the first.

    Raises DataError when two of them are not about the same problems.
    """
    first = runs[0]
    columns = [{g: verdicts(p).mean(1) for g, p in by_problem(records).items()} for _, _, records in runs]
    for name, header, _ in runs[1:]:
        if header["data"] != first[1]["data"]:
            raise DataError(f"--table: {name} and {first[0]} were evaluated on different data: {header['data']}")
    groups = list(columns[0])
    choices = [*([g] for g in groups), averaged(groups)]  # each benchmark, and the average
    head = ["", *groups, f"average of {len(averaged(groups))}"]
    rows, differences = [], []
    for i, (name, *_) in enumerate(runs):
        cells = [[columns[i][g] for g in chosen] for chosen in choices]
        rows.append([name, *(bracketed(plain_mean(cell)) for cell in cells)])
        if i == 0:
            continue
        differences.append([f"{name} − {first[0]}"])
        for chosen, cell in zip(choices, cells, strict=True):
            d, low, high, p = paired_test([columns[0][g] for g in chosen], cell)
            significance = f"p={p:.3f}" if p >= 0.001 else "p<0.001"
            differences[-1].append(f"{100 * d:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] {significance}")
    unlike = [
        f"{name} and {first[0]} differ in {key}: {header.get(key)} and {first[1].get(key)}"
        for name, header, _ in runs[1:] for key in ("prompt", "sampling", "seed", "grader", "dtype")
        if header.get(key) != first[1].get(key)
    ]  # fmt: skip
    tables = [markdown(head, rows), *([markdown(head, differences)] if differences else [])]
    return "\n\n".join([*tables, *unlike])
