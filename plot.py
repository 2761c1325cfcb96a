"""Figures from run folders.

python plot.py RUN [RUN ...] --out FILE.png
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(path: Path) -> list[dict]:
    """The lines of a log; one torn by a kill is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def smooth(values: list[float], window: int = 10) -> list[float]:
    """Mean over the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / (i - max(0, i - window + 1) + 1) for i in range(len(values))]


def curve(ax, metrics: list[dict], name: str, label: str, color: str) -> None:
    """One metric over steps: the values faint, their running mean strong."""
    points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
    if points:
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=color, alpha=0.2, lw=0.8)
        ax.plot(x, smooth(list(y)), color=color, lw=1.6, label=label)


def labels(runs: list[Path]) -> list[str]:
    """The method of each run, with its seed where runs share a method; the folder's name where it has no config."""
    configs = [json.loads(c.read_text())["settings"] if (c := run / "config.json").exists() else None for run in runs]
    methods = [c["method"] if c else run.name for c, run in zip(configs, runs, strict=True)]
    return [
        f"{m}, seed {c['seed']}" if c and methods.count(m) > 1 else m for m, c in zip(methods, configs, strict=True)
    ]


def draw(runs: list[Path], out: Path) -> None:
    """Six panels: accuracy over steps and by group, reward, response length, cooperative gain, seconds by phase."""
    names = labels(runs)
    colors = [f"C{i}" for i in range(len(runs))]
    metrics = [read(run / "metrics.jsonl") for run in runs]
    evals = [read(run / "evals.jsonl") for run in runs]
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5), layout="constrained")
    accuracy, by_group, reward, length, gain, seconds = axes.flat

    for name, color, e in zip(names, colors, evals, strict=True):
        steps = [r["step"] for r in e]
        accuracy.plot(steps, [r["policy"]["average"] for r in e], color=color, marker="o", ms=3, label=name)
        if e and "shadow" in e[0]:
            accuracy.plot(
                steps, [r["shadow"]["average"] for r in e], color=color, ls="--", lw=1, label=f"{name}: its shadow θ̂"
            )
    accuracy.set(title="accuracy, mean over groups", xlabel="step", ylim=(0, 1))

    bars = [("before", "0.75", evals[0][0]["policy"])] if evals and evals[0] else []
    bars += [(n, c, e[-1]["policy"]) for n, c, e in zip(names, colors, evals, strict=True) if e]
    width = 0.8 / max(len(bars), 1)
    for i, (name, color, values) in enumerate(bars):
        groups, label = [g for g in values if g != "average"], name if name == "before" else None
        left = [x + i * width for x in range(len(groups))]
        by_group.bar(left, [values[g] for g in groups], width, color=color, label=label)
        by_group.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))], groups)
    by_group.set(title="accuracy by group, at the end", ylim=(0, 1))

    for name, color, m in zip(names, colors, metrics, strict=True):
        curve(reward, m, "reward", name, color)
        curve(length, m, "response_tokens", name, color)
        curve(gain, m, "cooperative_gain", name, color)
    reward.set(title="reward of the rollouts", xlabel="step", ylim=(0, 1))
    length.set(title="response length, tokens", xlabel="step")
    gain.set(title="cooperative gain, reward", xlabel="step")
    gain.axhline(0, color="0.6", lw=0.8)

    phases = list(dict.fromkeys(p for m in metrics for r in m for p in r["seconds"]))
    for i, phase in enumerate(phases):
        mean = [sum(r["seconds"].get(phase, 0.0) for r in m) / max(len(m), 1) for m in metrics]
        below = [sum(r["seconds"].get(p, 0.0) for r in m for p in phases[:i]) / max(len(m), 1) for m in metrics]
        seconds.barh(names, mean, left=below, height=0.5, label=phase, color=plt.cm.tab10(i))
    seconds.set(title="seconds per step, by phase", ylim=(len(runs) - 0.4, -0.6 - 0.3 * len(runs)))

    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False, ncols=3 if ax is seconds else 1)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of bridge.py")
    parser.add_argument("--out", type=Path, default=Path("figures.png"), help="the picture to write")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "metrics.jsonl").exists():
            sys.exit(f"plot.py: {run} is no run folder: it has no metrics.jsonl")
    try:
        draw(args.runs, args.out)
    except (OSError, ValueError) as error:  # no such folder, or a kind of picture matplotlib does not write
        sys.exit(f"plot.py: --out {args.out}: {error}")
    print(args.out)


if __name__ == "__main__":
    main()
