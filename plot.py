"""Figures from run folders: python plot.py RUN [RUN ...] --out FILE.png, or --html for RUN/report.html"""

import argparse
import sys
from pathlib import Path

from infra import report
from infra.files import DataError, read_log
from settings import expand, start_program


def curve(ax, metrics: list[dict], name: str, label: str, color: str, window: int = 10) -> None:
    """One metric over steps: its values faint, the mean of the last `window` values strong."""
    points = [(record["step"], record[name]) for record in metrics if record.get(name) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    means = []
    for i in range(len(values)):
        recent = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(recent) / len(recent))
    ax.plot(steps, values, color=color, alpha=0.2, lw=0.8)
    ax.plot(steps, means, color=color, lw=1.6, label=label)


def accuracies(ax, evals: list[dict], policy: str, color: str, **style) -> None:
    """The mean accuracy of "policy" or "shadow" over steps, where it was evaluated."""
    evaluated = [record for record in evals if policy in record]
    if evaluated:
        steps = [record["step"] for record in evaluated]
        averages = [record[policy]["average"] for record in evaluated]
        ax.plot(steps, averages, color=color, **style)


def labels(runs: list[Path]) -> list[str]:
    """The last name of each folder, or its whole path where two have the same."""
    names = [run.resolve().name for run in runs]
    return [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def draw(runs: list[Path], out: Path) -> None:
    """Six panels: accuracy over steps and by group, reward, response length, cooperative gain, seconds by phase."""
    from matplotlib.figure import Figure  # here, because training imports this file and draws only at its end

    figure = Figure(figsize=(14, 7.5), layout="constrained")
    accuracy, by_group, reward, length, gain, seconds = figure.subplots(2, 3).flat
    accuracy.set(title="accuracy, mean over groups", xlabel="step", ylim=(0, 1))
    by_group.set(title="accuracy by group, last evaluation", ylim=(0, 1))
    reward.set(title="reward of the rollouts", xlabel="step")
    length.set(title="response length, tokens", xlabel="step")
    gain.set(title="cooperative gain, reward", xlabel="step")
    gain.axhline(0, color="0.6", lw=0.8)
    seconds.set(title="seconds per step, by phase", ylim=(len(runs) - 0.4, -0.6 - 0.3 * len(runs)))

    # One color per run; in the last panel one color per phase, whose bars follow one another.
    width = 0.8 / len(runs)
    color_of_phase = {}
    place_of_group = {}  # runs may have other groups, or the same in another order
    names = labels(runs)
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        color = f"C{i}"
        metrics = read_log(run / "metrics.jsonl")
        evals = read_log(run / "evals.jsonl")
        curve(reward, metrics, "reward", name, color)
        curve(length, metrics, "response_tokens", name, color)
        curve(gain, metrics, "cooperative_gain", name, color)
        accuracies(accuracy, evals, "policy", color, marker="o", ms=3, label=name)
        accuracies(accuracy, evals, "shadow", color, ls="--", lw=1, label=f"{name}: its shadow θ̂")
        if evals:
            last = dict(evals[-1]["policy"])
            del last["average"]
            places = [place_of_group.setdefault(group, len(place_of_group)) for group in last]
            by_group.bar([place + i * width for place in places], list(last.values()), width, color=color)

        left = 0.0
        for phase in dict.fromkeys(phase for record in metrics for phase in record["seconds"]):
            mean = sum(record["seconds"].get(phase, 0.0) for record in metrics) / len(metrics)
            label = None if phase in color_of_phase else phase
            color = color_of_phase.setdefault(phase, f"C{len(color_of_phase)}")
            seconds.barh(i, mean, left=left, height=0.5, label=label, color=color)
            left += mean

    by_group.set_xticks([place + 0.4 - width / 2 for place in place_of_group.values()], place_of_group)
    seconds.set_yticks(range(len(runs)), names)
    lowest, highest = reward.dataLim.intervaly
    if lowest >= 0 and highest <= 1:  # rewards beyond have a scale of their own
        reward.set_ylim(0, 1)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False, ncols=3 if ax is seconds else 1)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=expand, metavar="RUN", help="run folders of bridge.py")
    parser.add_argument("--out", type=expand, default="figures.png", help="the picture to write (figures.png)")
    parser.add_argument("--html", action="store_true", help="write report.html, a look inside, to each run folder")
    args = parser.parse_args()
    runs = [Path(run) for run in args.runs]
    try:
        for run in runs:
            if not (run / "metrics.jsonl").exists():
                raise DataError(f"{run} is no run folder: it has no metrics.jsonl")
        if args.html:
            for run in runs:
                print(report.write(run))
        else:
            draw(runs, Path(args.out))
            print(args.out)
    except (OSError, ValueError) as error:  # ValueError: damaged data, or a format that matplotlib cannot write
        sys.exit(f"plot.py: {error}")


if __name__ == "__main__":
    start_program()
    main()
