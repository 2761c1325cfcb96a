"""Figures from run folders: python plot.py RUN [RUN ...] --out FILE.png, or --html for RUN/report.html"""

import argparse
import sys
from pathlib import Path

from infra import report
from infra.files import DataError, printable, read_log
from settings import expand, start_program


def curve(ax, metrics: list[dict], name: str, label: str, color: str, window: int = 10) -> None:
    """One metric over steps: its values faint, the mean of the last `window` values strong."""
    points = [(m["step"], m[name]) for m in metrics if isinstance(m.get(name), int | float)]
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
    evaluated = [e for e in evals if policy in e]
    if evaluated:
        steps = [e["step"] for e in evaluated]
        ax.plot(steps, [e[policy]["average"] for e in evaluated], color, **style)


def draw(runs: list[Path], out: Path) -> None:
    """Six panels: accuracy over steps and by group, reward, response length, cooperative gain, seconds by phase."""
    import matplotlib  # here, because training imports this file and draws only at its end
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a $ in the name of a run or group is a $
    all_metrics = [read_log(run / "metrics.jsonl") for run in runs]
    all_evals = [read_log(run / "evals.jsonl") for run in runs]
    names = [printable(run.resolve().name) for run in runs]
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    accuracy, by_group, reward, length, gain, seconds = figure.subplots(2, 3).flat
    accuracy.set(title="accuracy, mean over groups", xlabel="step", ylim=(0, 1))
    by_group.set(title="accuracy by group, at the end", ylim=(0, 1))
    reward.set(title="reward of the rollouts", xlabel="step", ylim=(0, 1))
    length.set(title="response length, tokens", xlabel="step")
    gain.set(title="cooperative gain, reward", xlabel="step")
    gain.axhline(0, color="0.6", lw=0.8)
    seconds.set(title="seconds per step, by phase", ylim=(len(runs) - 0.4, -0.6 - 0.3 * len(runs)))

    # One color per run.
    width = 0.8 / len(runs)
    for i, name in enumerate(names):
        color = f"C{i}"
        curve(reward, all_metrics[i], "reward", name, color)
        curve(length, all_metrics[i], "response_tokens", name, color)
        curve(gain, all_metrics[i], "cooperative_gain", name, color)
        accuracies(accuracy, all_evals[i], "policy", color, marker="o", ms=3, label=name)
        accuracies(accuracy, all_evals[i], "shadow", color, ls="--", lw=1, label=f"{name}: its shadow θ̂")
        if all_evals[i]:
            last = dict(all_evals[i][-1]["policy"])
            del last["average"]
            positions = range(len(last))
            by_group.bar([x + i * width for x in positions], list(last.values()), width, color=color)
            by_group.set_xticks([x + 0.4 - width / 2 for x in positions], list(last))

    # One color per phase; the phases of a run form one bar.
    phases = dict.fromkeys(phase for metrics in all_metrics for m in metrics for phase in m["seconds"])
    left = [0.0] * len(runs)
    for i, phase in enumerate(phases):
        for run, metrics in enumerate(all_metrics):
            mean = sum(m["seconds"].get(phase, 0.0) for m in metrics) / max(len(metrics), 1)
            seconds.barh(names[run], mean, left=left[run], height=0.5, label=phase if run == 0 else None, color=f"C{i}")
            left[run] += mean
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False, ncols=3 if ax is seconds else 1)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=expand, metavar="RUN", help="run folders of bridge.py")
    parser.add_argument("--out", type=expand, help="the picture to write (default: figures.png)")
    parser.add_argument("--html", action="store_true", help="write report.html, a look inside, to each run folder")
    args = parser.parse_args()
    if args.html and args.out is not None:
        parser.error("--out does nothing with --html, which writes RUN/report.html: omit it")
    try:
        runs = [Path(run) for run in args.runs]
        for run in runs:
            if not (run / "metrics.jsonl").exists():
                raise DataError(f"{run} is no run folder: it has no metrics.jsonl")
        if args.html:
            written = [report.write(run) for run in runs]
        else:
            written = [Path(args.out or "figures.png")]
            draw(runs, written[0])
        print(*(printable(path) for path in written), sep="\n", flush=True)
    except (OSError, ValueError) as error:  # ValueError: damaged data, or a format that matplotlib cannot write
        sys.exit(printable(f"plot.py: {error}", kept=""))


if __name__ == "__main__":
    start_program()
    main()
