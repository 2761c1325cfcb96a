"""The paper's claims against the finished runs: every number of docs/results.md that bench/compare.py does not print.

python bench/claims.py                                   # the tables of docs/results.md
python bench/claims.py --figure docs/both_tasks.png      # both tasks in one figure

Fixed after the runs had been read once, by their last evaluation: the endpoint (compare.py:trained), the three primary
contrasts, Holm's correction over both tasks, and the margin. Differences are paired by seed.
"""

import argparse
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import compare
import fair
import numpy as np
from compare import HALF, SEEDS, passed, runs_of, trained, trained_at

TASKS = ("chains", "logic")
PRIMARY = ("mix_lora", "sft_rl", "rl")  # bridge minus each of them; all other contrasts are secondary
MARGIN = 2.0  # points on chains: settings whose interval lies within it make little difference
LEADS = {  # BRIDGE minus the other, points, averages of five benchmarks, single runs; docs/paper.md has the models
    "rl": (3.8, 2.9, 7.0),
    "sft": (8.1, 6.4, 12.3),
    "sft_rl": (3.8, 5.8, 4.4),
    "alternating": (2.6, 3.8, 3.0),
    "mix": (6.6,),
    "chord": (3.5, 4.0),
    "luffy": (2.8,),
    "no_meta": (9.6,),
}
DRAWS = 10_000  # of a bootstrap


class Claim(NamedTuple):
    """A statement of the paper as a contrast of two rows of a table of compare.py."""

    text: str
    preset: str
    row: str
    other: str
    table: str = "main"
    leads: tuple[float, ...] = ()  # the paper's
    differs: bool = True  # claims that row is above other; False: that they make little difference
    column: str = "trained"


def versus(text: str, other: str, row: str = "bridge", table: str = "main", column: str = "trained") -> list[Claim]:
    """A contrast on both tasks."""
    leads = LEADS.get(other, ()) if column == "trained" else ()
    return [Claim(text, preset, row, other, table, leads, column=column) for preset in TASKS]


LITTLE = partial(Claim, preset="chains", differs=False)
CLAIMS = [
    *versus("beats RL, on fresh seeds", "rl", table="fresh"),
    *versus("beats RL, on fresh seeds", "rl", table="fresh", column="pass@1"),
    Claim("beats RL", "chains", "bridge, demonstrations_16", "rl", "supervision"),
    *versus("beats SFT", "sft"),
    *versus("beats SFT→RL, on fresh seeds", "sft_rl", table="fresh"),
    *versus("beats SFT + RL in one objective", "mix"),
    *versus("beats naive alternation", "alternating"),
    *versus("beats naive alternation", "alternating", row=HALF),
    *versus("beats CHORD", "chord"),
    *versus("beats CHORD", "chord, φ"),
    *versus("beats LUFFY", "luffy"),
    *versus("beats SRFT", "srft"),
    *versus("beats HPT (ours)", "hpt"),
    *versus("the gain helps: w on SFT alone is worse", "no_meta"),
    *versus("the gain helps: w without θ̂ is worse, on fresh seeds", "mix_lora", table="fresh"),
    *versus("the gain helps: w without θ̂ is worse, on fresh seeds", "mix_lora", table="fresh", column="pass@1"),
    *(Claim("the same at equal rates", preset, HALF, "w on SFT + RL (mix_lora)", "shadow") for preset in TASKS),
    Claim("more answers within reach: pass@16 above RL", "chains", "bridge", "rl", column="pass@16"),
    Claim("more answers within reach, owed to θ̂", "chains", "bridge", "mix_lora", column="pass@16"),
    Claim("keeps its lead over RL, 10 % of rewards flipped", "chains", "bridge, noise_10", "rl, noise_10", "noise"),
    Claim("and 20 % flipped", "chains", "bridge, noise_20", "rl, noise_20", "noise", leads=(19.0,)),
    Claim("harmful supervision: SFT + RL below RL", "chains", "rl", "mix"),
    Claim("harmful supervision: SFT + RL below RL", "chains", "rl", "mix, demonstrations_16", "supervision"),
    LITTLE("λ from 0.3 to 0.7", row="bridge, lam 0.7", other="bridge, lam 0.3", table="lambda"),
    LITTLE("rank", row="bridge, rank 2, alpha 4", other="bridge, rank 8, alpha 16", table="lora"),
    LITTLE("rank", row="bridge, rank 32, alpha 64", other="bridge, rank 8, alpha 16", table="lora"),
    LITTLE("alpha", row="bridge, rank 8, alpha 4", other="bridge, rank 8, alpha 16", table="lora"),
    LITTLE("alpha", row="bridge, rank 8, alpha 64", other="bridge, rank 8, alpha 16", table="lora"),
]
EQUAL = {"chains": "fair", "logic": "fair", "base1": "bases", "base2": "bases"}  # preset: table of compare.py
LAST = "last evaluation"
COLUMNS = {
    "trained": trained,
    LAST: partial(trained_at, at=1),
    "pass@1": partial(passed, k=1),
    "pass@16": partial(passed, k=16),
}


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of paired differences


@cache
def cells_of(preset: str, table: str) -> dict[str, compare.Cell]:
    """{label: cell} of one of compare.py's tables."""
    return {c.label: c for c in compare.TABLES[table].cells(preset)}


def values_of(preset: str, table: str, row: str, column: str = "trained") -> dict[int, float]:
    """{seed: number} of a row of one of compare.py's tables."""
    runs = runs_of(preset, cells_of(preset, table)[row], compare.TABLES[table].seeds_of(preset))
    return {seed: COLUMNS[column](run, preset) for seed, run in runs.items()}


def paired(a: dict[int, float], b: dict[int, float]) -> list[float]:
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def interval(differences: list[float]) -> tuple[float, float]:
    half = compare.half_width(differences)
    return mean(differences) - half, mean(differences) + half


def sign_flip(differences: list[float]) -> float:
    """The exact two-sided p of the mean, if each difference is as likely as its negative: all 2^n signs.

    >>> sign_flip([1.0, 2.0, 3.0])
    0.25
    """
    signs = np.array(list(product((1, -1), repeat=len(differences))))
    means = np.abs(signs @ np.array(differences))
    return float((means >= abs(sum(differences)) - 1e-9).mean())


def holm(ps: list[float]) -> list[float]:
    """Holm's corrected p of each of a family of tests.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(ps)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def side(differences: list[float]) -> str:
    """On which side of zero the 95 % interval lies."""
    low, high = interval(differences)
    if low > 0:
        return "above"
    return "below" if high < 0 else "undecided"


def verdict(differences: list[float], differs: bool) -> str:
    """supported, contradicted or undecided, by the 95 % interval."""
    if differs:
        verdict_of_side = {"above": "supported", "below": "contradicted", "undecided": "undecided"}
        return verdict_of_side[side(differences)]
    low, high = interval(differences)
    if low > -MARGIN and high < MARGIN:
        return "supported"
    return "contradicted" if low > MARGIN or high < -MARGIN else "undecided"


def verdict_of(c: Claim, differences: list[float]) -> str:
    """A primary contrast must also be significant after Holm's correction."""
    is_primary = c.row == "bridge" and c.table in ("main", "fresh") and c.column == "trained" and c.other in PRIMARY
    if is_primary and primary(c.table)[c.preset, c.other][1] >= 0.05:
        return "undecided"
    return verdict(differences, c.differs)


def excluded(differences: list[float], leads: tuple[float, ...]) -> str:
    """Those of the paper's leads that lie above the interval."""
    _, high = interval(differences)
    if not leads:
        return "–"
    return ", ".join(f"{lead:.1f}" for lead in leads if lead > high) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# Both tasks together: definitions of arXiv 2108.13264 ("rliable")


def normalised(row: str) -> np.ndarray:
    """Scores [tasks, seeds]: 0 is the base model's accuracy, 1 is 100 %."""
    scores = []
    for preset in TASKS:
        runs = runs_of(preset, cells_of(preset, "main")[row], SEEDS)
        base = compare.percent(runs[0]["evals"][0]["policy"], preset)
        scores.append([(trained(runs[seed], preset) - base) / (100 - base) for seed in SEEDS])
    return np.array(scores)


def iqm(scores: np.ndarray) -> np.ndarray:
    """The mean of the middle half of all scores; leading dimensions are draws.  [..., tasks, seeds] -> [...]"""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    quarter = flat.shape[-1] // 4
    return flat[..., quarter : flat.shape[-1] - quarter].mean(-1)


def improvement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """P(a run of a beats one of b), ties half, mean over tasks.  [..., tasks, seeds] each -> [...]"""
    above = (a[..., :, None] > b[..., None, :]) + 0.5 * (a[..., :, None] == b[..., None, :])
    return above.mean((-1, -2, -3))


def resampled(scores: np.ndarray, seed: int) -> np.ndarray:
    """DRAWS bootstrap draws of the runs within each task.  [tasks, seeds] -> [DRAWS, tasks, seeds]"""
    places = np.random.default_rng(seed).integers(scores.shape[1], size=(DRAWS, *scores.shape))
    return np.take_along_axis(scores[None], places, axis=2)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@cache
def primary(table: str = "main") -> dict[tuple[str, str], tuple[list[float], float]]:
    """(task, other row) -> (bridge minus the other, p after Holm's correction). table: main or fresh."""
    contrasts = [(preset, other) for preset in TASKS for other in PRIMARY]
    differences = [paired(values_of(p, table, "bridge"), values_of(p, table, other)) for p, other in contrasts]
    corrected = holm([sign_flip(d) for d in differences])
    return dict(zip(contrasts, zip(differences, corrected, strict=True), strict=True))


def primary_table() -> str:
    """The primary contrasts on the seeds of the tables main and fresh; the same by the last evaluation alone."""
    head = ["task", "bridge minus", "first seeds", "p, Holm", "fresh seeds", "p, Holm"]
    lines = [f"| {' | '.join(head)} | last evaluation: first seeds | fresh seeds |", "|---" * 8 + "|"]
    for preset, other in primary():
        cells = [preset, f"`{other}`"]
        for table in ("main", "fresh"):
            d, p = primary(table)[preset, other]
            cells += [compare.with_interval(d, "+"), f"{p:.3f}"]
        for table in ("main", "fresh"):
            last = paired(values_of(preset, table, "bridge", LAST), values_of(preset, table, other, LAST))
            cells.append(compare.with_interval(last, "+"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def claims_table() -> str:
    """A row for each contrast: on each task difference, verdict, and the leads of the paper that it excludes."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}  # (claim, contrast, leads) -> {task: cells}
    for c in CLAIMS:
        d = paired(values_of(c.preset, c.table, c.row, c.column), values_of(c.preset, c.table, c.other, c.column))
        contrast = f"{c.row} − {c.other}" + ("" if c.column == "trained" else f", {c.column}")
        leads = ", ".join(f"{lead:.1f}" for lead in c.leads) or "–"
        cells = [f"{compare.with_interval(d, '+')}, {verdict_of(c, d)}", excluded(d, c.leads)]
        found.setdefault((c.text, contrast, leads), {})[c.preset] = cells
    columns = "| claim | contrast | the paper's leads | chains | leads excluded | logic | leads excluded |"
    lines = [columns, "|---" * 7 + "|"]
    for row, of_task in found.items():
        cells = [*row]
        for preset in TASKS:
            cells += of_task.get(preset, ["–", "–"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_table() -> str:
    """The rows of bench/fair.py on each task, and on other base models: differences and verdicts."""
    scores = {preset: scores_of(preset, table) for preset, table in EQUAL.items()}
    lines = [f"| equal trials | {' | '.join(scores)} |", "|---" * (len(scores) + 1) + "|"]
    for row, spec in fair.ROWS.items():
        cells = [row if row == spec.against else f"{row} − {spec.against}"]
        for of_row in scores.values():
            if row not in of_row:
                cells.append("–")
            elif row == spec.against:
                cells.append(f"{compare.with_interval(list(of_row[row].values()))} %")
            else:
                d = paired(of_row[row], of_row[spec.against])
                cells.append(f"{compare.with_interval(d, '+')}, {side(d)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scores_of(preset: str, table: str) -> dict[str, dict[int, float]]:
    """{row: {seed: endpoint}} of the rows of a table of compare.py that have finished runs."""
    scores = {label: values_of(preset, table, label) for label in cells_of(preset, table)}
    return {label: values for label, values in scores.items() if values}


Estimate = tuple[float, float, float]  # a value, and the ends of its 95 % bootstrap interval


def iqm_of(row: str) -> Estimate:
    scores = normalised(row)
    return float(iqm(scores)), *bootstrap(iqm(resampled(scores, 0)))


def improvement_on(row: str) -> Estimate:
    """Of the probability that a run of bridge is better."""
    ours = normalised("bridge")
    theirs = normalised(row)
    draws = improvement(resampled(ours, 1), resampled(theirs, 0))
    return float(improvement(ours, theirs)), *bootstrap(draws)


def both_table() -> str:
    """IQM of normalised scores, and the probability that bridge improves on each row."""
    lines = ["| | IQM | P(bridge is better) |", "|---" * 3 + "|"]
    for row in compare.TRIALS:
        estimates = [iqm_of(row)]
        if row != "bridge":
            estimates.append(improvement_on(row))
        cells = [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in estimates]
        if row == "bridge":
            cells.append("–")
        lines.append(f"| {' | '.join([row, *cells])} |")
    return "\n".join(lines)


def draw(out: Path) -> None:
    """IQM of every row, and the probability that bridge improves on it, with 95 % bootstrap intervals."""
    from matplotlib.figure import Figure

    rows = sorted(compare.TRIALS, key=lambda row: iqm(normalised(row)))
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for y, row in enumerate(rows):
        color = "tab:red" if row == "bridge" else "tab:blue"
        estimates = [(left, iqm_of(row))]
        if row != "bridge":
            estimates.append((right, improvement_on(row)))
        for ax, (value, low, high) in estimates:
            ax.plot([low, high], [y, y], color=color)
            ax.plot(value, y, "o", color=color)
    left.set(title="IQM of both tasks: 0 is the base model, 1 is all right", xlabel="normalised score")
    right.set(title="probability that a run of bridge is better", xlim=(-0.02, 1.02))
    right.axvline(0.5, color="0.6", lw=0.8)
    for ax in (left, right):
        ax.set_yticks(range(len(rows)), rows)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--figure", type=Path, help="draw both tasks together")
    args = parser.parse_args()
    if args.figure:
        draw(args.figure)
    else:
        print("\n\n".join([primary_table(), claims_table(), equal_table(), both_table()]))


if __name__ == "__main__":
    main()
