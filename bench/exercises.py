"""The longer runs of docs/exercises.md, exercises 13 to 16: their rows, the page's tables and its figure.

    python bench/exercises.py           # makes the runs that bench/results/exercises.jsonl lacks; prints the tables
    python bench/exercises.py --figure  # draws docs/exercises.png

Each run is `python bridge.py` in a copy of the code, with the change that the page prints. A row of the file has the
metrics of every step of one run, and the accuracy on all evaluation problems every ten steps.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_exercises import LEFT_OUT, apply, blocks  # noqa: E402

from infra.files import append_line, read_log  # noqa: E402

ROWS = ROOT / "bench/results/exercises.jsonl"
METRICS = ("reward", "entropy", "clip_frac", "zero_std_groups", "grad_norm_theta")
COLUMNS = {  # of the page's tables
    "13": ("entropy", "grad_norm_theta"),
    "14": ("entropy", "clip_frac"),
    "15": ("entropy", "clip_frac"),
    "16": ("zero_std_groups", "grad_norm_theta"),
}
MAIN_RATE = {"13": "3e-4", "14": "1e-4", "15": "1e-4", "16": "3e-4"}  # α of the figure
COLORS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#000000")  # of Okabe and Ito: distinct for the colour-blind
BASELINE = "--preset chains --steps 100 --aggregation dr_grpo"
REUSE = "--steps 40 --updates-per-rollout 16"
NO_CLIP = "--clip-low 1 --clip-high inf"
GSPO = "--clip-low 3e-4 --clip-high 4e-4"
DEAD = "--steps 100 --grad-clip 100"


class Variant(NamedTuple):
    """A line of the page's tables: some runs that differ in their seeds alone."""

    exercise: str
    name: str
    flags: str
    alpha: str
    seeds: int = 4
    changed: bool = False  # by the diff of the exercise
    instead: tuple[str, str] = ("", "")  # a text of the diff, and the one in its place


OTHER_REWARD = ("return rewards", "return rewards - 1")
VARIANTS = [
    Variant("13", "minus the group's mean", BASELINE, "3e-4"),
    Variant("13", "rewards 0 and 1", BASELINE, "3e-4", changed=True),
    Variant("13", "rewards −1 and 0", BASELINE, "3e-4", changed=True, instead=OTHER_REWARD),
    Variant("13", "minus the group's mean", BASELINE, "1e-4", seeds=2),
    Variant("13", "rewards 0 and 1", BASELINE, "1e-4", seeds=2, changed=True),
    Variant("13", "rewards −1 and 0", BASELINE, "1e-4", seeds=2, changed=True, instead=OTHER_REWARD),
    Variant("14", "one update", "--steps 40", "1e-4"),
    Variant("14", "16 updates, clip", REUSE, "1e-4"),
    Variant("14", "16 updates, no clip", f"{REUSE} {NO_CLIP}", "1e-4"),
    Variant("14", "16 updates, clip", REUSE, "3e-5", seeds=2),
    Variant("14", "16 updates, no clip", f"{REUSE} {NO_CLIP}", "3e-5", seeds=2),
    Variant("14", "16 updates, clip", REUSE, "3e-4", seeds=2),
    Variant("14", "16 updates, no clip", f"{REUSE} {NO_CLIP}", "3e-4", seeds=2),
    Variant("15", "16 updates, GSPO", f"{REUSE} {GSPO}", "1e-4", changed=True),
    Variant("15", "16 updates, narrow clip", f"{REUSE} {GSPO}", "1e-4"),
    Variant("15", "16 updates, GSPO", f"{REUSE} {GSPO}", "3e-5", seeds=2, changed=True),
    Variant("15", "16 updates, GSPO", f"{REUSE} {GSPO}", "3e-4", seeds=2, changed=True),
    Variant("15", "16 updates, narrow clip", f"{REUSE} {GSPO}", "3e-4", seeds=2),
    Variant("16", "all groups", DEAD, "3e-4"),
    Variant("16", "groups with signal", DEAD, "3e-4", changed=True),
]


def command(variant: Variant, seed: int) -> str:
    return f"python bridge.py --method rl {variant.flags} --alpha {variant.alpha} --eval-every 10 --seed {seed}"


def rows_of(variant: Variant, rows: list[dict]) -> list[dict]:
    """The variant's rows, in the order of the seeds."""
    found = []
    for seed in range(variant.seeds):
        wanted = variant.exercise, variant.name, command(variant, seed)
        found += [row for row in rows if (row["exercise"], row["variant"], row["command"]) == wanted]
    return found


def run(variant: Variant, seed: int) -> dict:
    """One run in a copy of the code; returns its row."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        shutil.copytree(ROOT, code, ignore=shutil.ignore_patterns(*LEFT_OUT))
        if variant.changed:
            (diff,) = blocks(variant.exercise, "diff")
            apply(diff.replace(*variant.instead) if variant.instead[0] else diff, code)
        words = command(variant, seed).split()[1:]
        subprocess.run([sys.executable, *words, "--out", "run"], cwd=code, check=True, stdout=subprocess.DEVNULL)
        metrics = read_log(code / "run/metrics.jsonl")
        evals = read_log(code / "run/evals.jsonl")
    row = dict(exercise=variant.exercise, variant=variant.name, seed=seed, command=command(variant, seed))
    row["accuracy"] = {record["step"]: round(record["policy"]["average"], 3) for record in evals}
    for name in METRICS:
        row[name] = [round(record[name], 4) for record in metrics]
    return row


def make_missing_runs() -> None:
    """Makes the runs without a row, those of the first seeds first, and appends their rows."""
    for seed in range(max(variant.seeds for variant in VARIANTS)):
        for variant in VARIANTS:
            known = [row["seed"] for row in rows_of(variant, read_log(ROWS))]
            if seed < variant.seeds and seed not in known:
                print(variant.exercise, variant.name, command(variant, seed), flush=True)
                append_line(ROWS, run(variant, seed))


def last_accuracy(row: dict) -> float:
    return list(row["accuracy"].values())[-1]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(exercise: str, rows: list[dict]) -> list[str]:
    """The lines of an exercise's table: accuracies at the end, and means of metrics over all steps and seeds."""
    lines = []
    for variant in VARIANTS:
        if variant.exercise != exercise:
            continue
        of_variant = rows_of(variant, rows)
        ends = [last_accuracy(row) for row in of_variant]
        each = " ".join(f"{end:.3f}" for end in ends)
        numbers = [mean([x for row in of_variant for x in row[name]]) for name in COLUMNS[exercise]]
        cells = " | ".join(f"{number:.3f}" for number in numbers)
        lines.append(f"| {variant.name} | {variant.alpha} | {each} | {mean(ends):.3f} | {cells} |")
    return lines


def running_mean(values: list[float], window: int = 10) -> list[float]:
    return [mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def curves(ax, variant: Variant, rows: list[dict], metric: str, color: str) -> None:
    """Each seed as a thin line, their mean as a thick one: the accuracy, or the running mean of a metric."""
    lines = []
    for row in rows_of(variant, rows):
        if metric == "accuracy":
            steps = [int(step) for step in row["accuracy"]]
            values = list(row["accuracy"].values())
        else:
            steps = range(1, len(row[metric]) + 1)
            values = running_mean(row[metric])
        ax.plot(steps, values, color=color, lw=0.9, alpha=0.5)
        lines.append(values)
    means = [mean(at_step) for at_step in zip(*lines, strict=True)]
    ends = [last_accuracy(row) for row in rows_of(variant, rows)]
    label = variant.name if metric == "accuracy" else f"{variant.name} (final accuracy {mean(ends):.2f})"
    ax.plot(steps, means, color=color, lw=3.5, label=label)


def draw(rows: list[dict], out: Path) -> None:
    """Three panels: exercise 13, exercises 14 and 15, exercise 16; the runs at the main rate."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 16}):
        figure = Figure(figsize=(18, 7.2), layout="constrained")
        baseline, reuse, dead = figure.subplots(1, 3)
        baseline.set(title="13. REINFORCE without a baseline", ylabel="accuracy")
        reuse.set(title="14, 15. Many updates on each batch", ylabel="accuracy")
        dead.set(title="16. Groups without signal in N", ylabel="gradient norm, mean of 10 steps")
        panels = {"13": (baseline, "accuracy"), "14": (reuse, "accuracy"), "15": (reuse, "accuracy")}
        panels["16"] = (dead, "grad_norm_theta")
        for variant in VARIANTS:
            ax, metric = panels[variant.exercise]
            if variant.alpha == MAIN_RATE[variant.exercise]:
                color = COLORS[len(ax.get_legend_handles_labels()[1])]
                curves(ax, variant, rows, metric, color)
        for ax in figure.axes:
            ax.set(xlabel="step", ylim=(0, None))
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.15))
        figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", action="store_true", help="draw docs/exercises.png from the rows; run nothing")
    args = parser.parse_args()
    if args.figure:
        draw(read_log(ROWS), ROOT / "docs/exercises.png")
        return
    make_missing_runs()
    rows = read_log(ROWS)
    for exercise in dict.fromkeys(variant.exercise for variant in VARIANTS):
        print(f"\n{exercise}", *table(exercise, rows), sep="\n")


if __name__ == "__main__":
    main()
