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
    if points:
        steps, values = zip(*points, strict=True)
        recent = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
        ax.plot(steps, values, color=color, alpha=0.2, lw=0.8)
        ax.plot(steps, [sum(r) / len(r) for r in recent], color=color, lw=1.6, label=label)


def draw(runs: list[Path], out: Path) -> None:
    """Six panels: accuracy over steps and by group, reward, response length, cooperative gain, seconds by phase."""
    import matplotlib  # here, because training imports this file and draws only at its end
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # a $ in the name of a run or group is a $
    metrics = [read_log(run / "metrics.jsonl") for run in runs]
    evals = [read_log(run / "evals.jsonl") for run in runs]
    names, colors = [printable(run.resolve().name) for run in runs], [f"C{i}" for i in range(len(runs))]
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    accuracy, by_group, reward, length, gain, seconds = figure.subplots(2, 3).flat
    accuracy.set(title="accuracy, mean over groups", xlabel="step", ylim=(0, 1))
    by_group.set(title="accuracy by group, at the end", ylim=(0, 1))
    reward.set(title="reward of the rollouts", xlabel="step", ylim=(0, 1))
    length.set(title="response length, tokens", xlabel="step")
    gain.set(title="cooperative gain, reward", xlabel="step")
    gain.axhline(0, color="0.6", lw=0.8)
    seconds.set(title="seconds per step, by phase", ylim=(len(runs) - 0.4, -0.6 - 0.3 * len(runs)))

    width = 0.8 / len(runs)
    for i, (name, color, m, e) in enumerate(zip(names, colors, metrics, evals, strict=True)):
        for ax, metric in ((reward, "reward"), (length, "response_tokens"), (gain, "cooperative_gain")):
            curve(ax, m, metric, name, color)
        accuracy.plot([r["step"] for r in e], [r["policy"]["average"] for r in e], color, marker="o", ms=3, label=name)
        if shadow := [r for r in e if "shadow" in r]:
            values = [r["shadow"]["average"] for r in shadow]
            accuracy.plot([r["step"] for r in shadow], values, color, ls="--", lw=1, label=f"{name}: its shadow θ̂")
        if e:
            groups = [g for g in e[-1]["policy"] if g != "average"]
            left = [x + i * width for x in range(len(groups))]
            by_group.bar(left, [e[-1]["policy"][g] for g in groups], width, color=color)
            by_group.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], groups)
    left = [0.0] * len(runs)
    for i, phase in enumerate(dict.fromkeys(p for m in metrics for r in m for p in r["seconds"])):
        mean = [sum(r["seconds"].get(phase, 0.0) for r in m) / max(len(m), 1) for m in metrics]
        seconds.barh(names, mean, left=left, height=0.5, label=phase, color=f"C{i}")
        left = [a + b for a, b in zip(left, mean, strict=True)]
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
        if others := [run for run in runs if not (run / "metrics.jsonl").exists()]:
            raise DataError(f"{others[0]} is no run folder: it has no metrics.jsonl")
        out = Path(args.out or "figures.png")
        written = [report.write(run) for run in runs] if args.html else [out]
        if not args.html:
            draw(runs, out)
        print(*(printable(path) for path in written), sep="\n", flush=True)
    except (OSError, ValueError) as error:  # ValueError: damaged data, or a format that matplotlib cannot write
        sys.exit(printable(f"plot.py: {error}", kept=""))


if __name__ == "__main__":
    start_program()
    main()
