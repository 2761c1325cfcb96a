"""Compares methods over settings and seeds: makes the runs that are missing, then prints a table with intervals.

python bench/compare.py --table main --preset quick           # every method, two seeds, minutes
python bench/compare.py --tune --preset chains                # six trials of every method's own rates
python bench/compare.py --table noise --preset chains         # one of the tables below
python bench/compare.py --table main --preset chains --no-runs --figure docs/chains.png

Two runs at a time, one thread each. A finished run is one JSON line of bench/results/PRESET.jsonl.gz; the same command
goes on after a kill. Every method has the settings that won its trials on the tuning seeds (1000 to 1002), else the
defaults; the tables are of other seeds. Accuracies are greedy, in percent; ± is the 95 % interval of the mean over
seeds (Student's t), and differences are paired by seed: equal data, prompts and evaluation problems.
"""

import argparse
import gzip
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported
import mpmath
from measure import ROOT, commit

import bridge
from infra.files import read_log, read_object
from infra.run import settings_of
from settings import METHODS

TUNING_SEEDS = (1000, 1001, 1002)
SEEDS = tuple(range(10))
BLOCK = 5  # steps whose metrics are stored as one mean
METRICS = ("reward", "response_tokens", "entropy", "sft_nll", "cooperative_gain", "gain_grad_norm", "lora_norm")


class Preset(NamedTuple):
    """A task to compare on: flags of bridge.py, the groups of its evaluation that no training set contains."""

    flags: dict[str, str]
    out_of_distribution: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS


SHORT = {"steps": "24", "prompts-per-step": "8", "eval-problems": "20", "eval-every": "8", "sft-steps": "12"}
PRESETS = {
    "chains": Preset({"preset": "chains"}, ("n=8", "n=9")),
    "quick": Preset({"preset": "chains"} | SHORT, ("n=8", "n=9"), (0, 1)),
}

# ---------------------------------------------------------------------------------------------------------------------
# Cells: what a table runs


class Cell(NamedTuple):
    """One row of a table: a method with settings, run on every seed."""

    label: str
    flags: dict[str, str]  # of bridge.py, without seed
    against: str = "bridge"  # label of the row that the differences refer to


def grid(**values: str) -> list[dict[str, str]]:
    """All combinations of comma lists: grid(alpha="1e-3,2e-3", mu="1") has two."""
    names = [name.replace("_", "-") for name in values]
    return [dict(zip(names, point, strict=True)) for point in product(*(v.split(",") for v in values.values()))]


SIX = grid(alpha="1e-4,2e-4,4e-4,8e-4,1.6e-3,3.2e-3")
WITH_ADAPTER = grid(alpha="2e-4,4e-4,8e-4", beta="5e-4,2e-3")
TRIALS = {  # six for every method, over its own rates, weights and stage lengths
    "sft": SIX,
    "rl": SIX,
    "alternating": SIX,
    "sft_rl": grid(alpha="2e-4,4e-4,8e-4", sft_steps="50,150"),
    "mix": grid(alpha="2e-4,4e-4,8e-4", mu="0.5,1"),
    "mix_lora": WITH_ADAPTER,
    "no_meta": WITH_ADAPTER,
    "bridge": WITH_ADAPTER,
}


def tuned(preset: str, method: str) -> dict[str, str]:
    """The settings that won the method's trials; the defaults before there are any."""
    scores: dict[str, list[float]] = {}
    for run in records(preset):
        if run["method"] == method and run["seed"] in TUNING_SEEDS and run["tuning"]:
            scores.setdefault(json.dumps(run["flags"]), []).append(trained(run, preset))
    most = max(map(len, scores.values()), default=0)
    finalists = {flags: sum(s) / len(s) for flags, s in scores.items() if len(s) == most}
    return json.loads(max(finalists, key=finalists.get)) if finalists else {}


def cell(preset: str, label: str, method: str, against: str = "bridge", **flags: str) -> Cell:
    given = {name.replace("_", "-"): value for name, value in flags.items()}
    return Cell(label, {"method": method} | tuned(preset, method) | given, against)


def main_cells(preset: str) -> list[Cell]:
    return [cell(preset, method, method) for method in METHODS]


def shadow_cells(preset: str) -> list[Cell]:
    estimators = {"own rollouts": dict(shadow_rollouts="own"), "θ̂ = θ + one step": dict(shadow_rollouts="one_step"),
                  "shared, PPO's clip": dict(shadow_ratio_cap="0")}  # fmt: skip
    bounds = [cell(preset, "bridge", "bridge"), cell(preset, "w on SFT (no_meta)", "no_meta", **rates(preset)),
              cell(preset, "w on SFT + RL (mix_lora)", "mix_lora", **rates(preset)),
              cell(preset, "no w (mix)", "mix", alpha=rates(preset)["alpha"], mu="1")]  # fmt: skip
    return bounds + [cell(preset, f"bridge, {name}", "bridge", **flags) for name, flags in estimators.items()]


def rates(preset: str) -> dict[str, str]:
    """bridge's α and β, for methods that are compared at equal rates."""
    won = tuned(preset, "bridge")
    return dict(alpha=won.get("alpha", "3e-4"), beta=won.get("beta", "2e-3"))


def sweep_cells(preset: str, flag: str, values: tuple[str, ...], against: str) -> list[Cell]:
    return [cell(preset, f"bridge, {flag} {v}", "bridge", f"bridge, {flag} {against}", **{flag: v}) for v in values]


def lambda_cells(preset: str) -> list[Cell]:
    """bridge, and the mix that gives θ the same update."""
    weights = {"0.1": "9", "0.3": "2.3333", "0.5": "1", "0.7": "0.42857", "0.9": "0.11111"}
    cells = sweep_cells(preset, "lam", tuple(weights), "0.5")
    return cells + [cell(preset, f"mix, lam {lam}", "mix", f"bridge, lam {lam}", mu=mu) for lam, mu in weights.items()]


def lora_cells(preset: str) -> list[Cell]:
    sizes = [("2", "4"), ("8", "16"), ("32", "64"), ("8", "4"), ("8", "64")]
    return [
        cell(preset, f"bridge, rank {r}, alpha {a}", "bridge", "bridge, rank 8, alpha 16", lora_rank=r, lora_alpha=a)
        for r, a in sizes
    ]


def variant_cells(preset: str, flag: str, names: tuple[str, ...], methods: tuple[str, ...], against: str) -> list[Cell]:
    """Methods on variants of the task or the reward, functions of bench/variants.py."""
    return [
        cell(preset, f"{m}, {v}", m, f"{against}, {v}", **({flag: f"bench/variants.py:{v}"} if v != "clean" else {}))
        for v in names for m in methods
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Columns: numbers of one run


def trained(run: dict, preset: str, at: float = 1.0) -> float:
    """Accuracy in percent on the groups that training has, at a fraction of the steps."""
    policy = min(run["evals"], key=lambda e: abs(e["step"] - at * run["evals"][-1]["step"]))["policy"]
    groups = [g for g in policy if g != "average" and g not in PRESETS[preset].out_of_distribution]
    return 100 * sum(policy[g] for g in groups) / len(groups)


def out_of_distribution(run: dict, preset: str) -> float:
    groups = PRESETS[preset].out_of_distribution
    return 100 * sum(run["evals"][-1]["policy"][g] for g in groups) / len(groups)


def shadow_end(run: dict, preset: str) -> float | None:
    shadow = run["evals"][-1].get("shadow")
    return None if shadow is None else trained(dict(evals=[dict(step=0, policy=shadow)]), preset)


def curve(run: dict, name: str) -> list[float]:
    return [value for value in run["curves"].get(name, []) if value is not None]


def dip(run: dict, preset: str) -> float | None:
    """How far the reward falls below its first value, at its lowest: points."""
    reward = curve(run, "reward")
    return 100 * (reward[0] - min(reward)) if reward else None


def mean_of(name: str, part: slice, run: dict, preset: str) -> float | None:
    values = curve(run, name)[part]
    return sum(values) / len(values) if values else None


ACCURACY = {"trained": trained, "out of distribution": out_of_distribution}
COST = {
    "trained": trained,
    "seconds": lambda run, preset: run["seconds"],
    "seconds per step": lambda run, preset: run["step_seconds"],
    "peak MiB": lambda run, preset: run["peak_mib"],
    "sampled tokens": lambda run, preset: run["sampled_tokens"],
}
EPOCHS = {f"after {f} of the steps": partial(trained, at=at) for f, at in (("1/6", 1 / 6), ("1/2", 0.5), ("1", 1.0))}
DYNAMICS = {
    "trained": trained,
    "dip of the reward": dip,
    "tokens, first steps": partial(mean_of, "response_tokens", slice(0, 2)),
    "tokens, last steps": partial(mean_of, "response_tokens", slice(-2, None)),
    "entropy, last steps": partial(mean_of, "entropy", slice(-2, None)),
}
GAIN = {
    "trained": trained,
    "the shadow": shadow_end,
    "logged gain, last steps": partial(mean_of, "cooperative_gain", slice(-2, None)),
}
BOUNDS = ("mix", "no_meta", "mix_lora", "bridge")
USELESS = ("useless_0", "useless_20", "useless_40", "useless_60")
DEMONSTRATIONS = ("demonstrations_16", "demonstrations_64", "demonstrations_256", "demonstrations_1024")


class Table(NamedTuple):
    cells: Callable[[str], list[Cell]]
    columns: dict[str, Callable[[dict, str], float | None]]
    seeds: int = len(SEEDS)


TABLES = {
    "main": Table(main_cells, ACCURACY),
    "epochs": Table(main_cells, EPOCHS),
    "ood": Table(main_cells, {"out of distribution": out_of_distribution}),
    "cost": Table(main_cells, COST),
    "dynamics": Table(main_cells, DYNAMICS),
    "shadow": Table(shadow_cells, GAIN, 5),
    "beta": Table(partial(sweep_cells, flag="beta", values=("1e-4", "4e-4", "1e-3", "4e-3"), against="1e-3"), GAIN, 5),
    "lambda": Table(lambda_cells, ACCURACY, 5),
    "lora": Table(lora_cells, ACCURACY, 5),
    "noise": Table(
        partial(variant_cells, flag="reward", names=("clean", "noise_10", "noise_20"),
                methods=("rl", "mix", "mix_lora", "bridge"), against="rl"), ACCURACY, 5,
    ),
    "supervision": Table(
        partial(variant_cells, flag="task", names=USELESS + DEMONSTRATIONS, methods=BOUNDS, against="mix"), ACCURACY, 5
    ),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Runs


def results(preset: str) -> Path:
    return ROOT / "bench" / "results" / f"{preset}.jsonl.gz"


@cache
def records(preset: str) -> list[dict]:
    path = results(preset)
    return [json.loads(line) for line in gzip.open(path, "rt")] if path.exists() else []


def key(run: dict) -> str:
    return json.dumps([run["method"], run["flags"], run["seed"], run["tuning"]], sort_keys=True)


def blocks(metrics: list[dict], name: str) -> list[float | None]:
    """The means of BLOCK consecutive values, to four digits; None where the method lacks the metric."""
    values = [m.get(name) for m in metrics]
    parts = [[v for v in values[i : i + BLOCK] if v is not None] for i in range(0, len(values), BLOCK)]
    return [float(f"{sum(part) / len(part):.4g}") if part else None for part in parts]


def start(preset: str, job: dict, folder: str) -> int:
    """Starts one run of bridge.py in a forked process, which has the imports already; returns its process id."""
    flags = PRESETS[preset].flags | {"method": job["method"], "seed": str(job["seed"])} | job["flags"]
    idle = {"sft-steps": job["method"] != "sft_rl", "prompts-per-step": not METHODS[job["method"]].rl}
    flags = {name: value for name, value in flags.items() if not idle.get(name)}  # idle settings are refused
    if job["tuning"]:
        flags |= {"eval-every": "100000"}  # at the end only
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(f"{folder}/output", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            words = [f"--{name}={value}" for name, value in flags.items()]
            bridge.plot.draw = lambda *_: None  # no figures of single runs
            bridge.main([*words, "--save-every=100000", f"--out={folder}/run"])
            status = 0
    finally:
        os._exit(status)  # the parent's files and exit handlers are not this process's


def record_of(job: dict, folder: str, peak_kib: int) -> dict:
    """The record of a finished run: accuracies, curves, seconds of training without evaluation."""
    metrics, evals = (read_log(Path(folder, "run", f"{name}.jsonl")) for name in ("metrics", "evals"))
    s = settings_of(read_object(Path(folder, "run/config.json")), "config.json")
    seconds = [sum(v for phase, v in m["seconds"].items() if phase not in ("evaluate", "save")) for m in metrics]
    sampled = s.prompts_per_step * s.group_size * sum(m["response_tokens"] or 0 for m in metrics)
    return job | dict(
        evals=evals, curves={name: blocks(metrics, name) for name in METRICS if metrics[-1].get(name) is not None},
        seconds=round(sum(seconds), 1), step_seconds=round(sum(seconds) / len(seconds), 4),
        sampled_tokens=round(sampled), peak_mib=peak_kib // 1024, commit=commit(),
    )  # fmt: skip


def make(preset: str, jobs: list[dict], workers: int) -> None:
    """Makes the runs that the results lack and appends each as it ends. Raises RuntimeError if one fails."""
    done, running, made = {key(r) for r in records(preset)}, {}, 0
    todo = [job for job in {key(job): job for job in jobs}.values() if key(job) not in done]
    count = len(todo)
    with tempfile.TemporaryDirectory() as scratch:
        while todo or running:
            while todo and len(running) < workers:
                folder = tempfile.mkdtemp(dir=scratch)
                job = todo.pop(0)
                running[start(preset, job, folder)] = job, folder
            pid, status, usage = os.wait4(-1, 0)
            job, folder = running.pop(pid)
            name = " ".join([job["method"], *(f"{k}={v}" for k, v in job["flags"].items()), f"seed={job['seed']}"])
            if status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
                raise RuntimeError(f"{name} fails:\n{Path(folder, 'output').read_text()[-2000:]}")
            record, made = record_of(job, folder, usage.ru_maxrss), made + 1
            with gzip.open(results(preset), "at") as file:
                file.write(json.dumps(record) + "\n")
            print(f"[{made}/{count}] {name}: {trained(record, preset):.1f} %, {record['seconds']:.0f} s", flush=True)
            shutil.rmtree(folder)
    records.cache_clear()


def tune(preset: str, methods: list[str], workers: int) -> None:
    """All trials on one tuning seed, then the best two of each method on the others."""
    jobs = [dict(method=m, flags=flags, seed=TUNING_SEEDS[0], tuning=True) for m in methods for flags in TRIALS[m]]
    make(preset, jobs, workers)
    finals = []
    for method in methods:
        first = [r for r in records(preset) if r["method"] == method and r["tuning"] and r["seed"] == TUNING_SEEDS[0]]
        best = sorted(first, key=lambda r: -trained(r, preset))[:2]
        finals += [dict(method=method, flags=r["flags"], seed=s, tuning=True) for r in best for s in TUNING_SEEDS[1:]]
    make(preset, finals, workers)
    for method in methods:
        print(method, tuned(preset, method))


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def half_width(values: list[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t with n − 1 degrees of freedom; infinite for one value."""
    n = len(values)
    if n < 2:
        return float("inf")
    mean = sum(values) / n
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    return student(n - 1) * deviation / n**0.5


@cache
def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t.

    >>> round(student(9), 3)
    2.262
    """
    tail = lambda t: mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - 0.05  # noqa: E731
    return float(mpmath.findroot(tail, (1.9, 13), solver="anderson"))


def with_interval(values: list[float], sign: str = "") -> str:
    mean, half = sum(values) / len(values), half_width(values)
    digits = 0 if abs(mean) >= 1000 else 1 if abs(mean) >= 10 or sign else 2
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}" if half < float("inf") else f"{mean:{sign}.{digits}f}"


def table(preset: str, name: str) -> str:
    """Markdown: one row for each cell, means with intervals, and the paired difference of the first column."""
    spec, by_cell = TABLES[name], {}
    for c in spec.cells(preset):
        flags = {k: v for k, v in c.flags.items() if k != "method"}
        runs = [
            r for r in records(preset) if (r["method"], r["flags"], r["tuning"]) == (c.flags["method"], flags, False)
        ]
        by_cell[c.label] = c, {r["seed"]: r for r in runs if r["seed"] in PRESETS[preset].seeds[: spec.seeds]}
    first = next(iter(spec.columns.values()))
    lines = [f"| | {' | '.join(spec.columns)} | difference | to | seeds |", "|---" * (len(spec.columns) + 4) + "|"]
    for label, (c, runs) in by_cell.items():
        cells = []
        for column in spec.columns.values():
            values = [v for v in (column(r, preset) for r in runs.values()) if v is not None]
            cells.append(with_interval(values) if values else "–")
        other = by_cell.get(c.against, (c, {}))[1]
        paired = [first(runs[s], preset) - first(other[s], preset) for s in runs if s in other and c.against != label]
        difference = with_interval(paired, "+") if paired else "–"
        lines.append(f"| {label} | {' | '.join(cells)} | {difference} | {c.against if paired else ''} | {len(runs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="chains")
    parser.add_argument("--table", choices=TABLES, help="make its runs, print it")
    parser.add_argument("--tune", action="store_true", help="make the trials of every method first")
    parser.add_argument("--methods", default="", help="only these, comma-separated (default: all)")
    parser.add_argument("--no-runs", action="store_true", help="of finished runs only")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    methods = args.methods.split(",") if args.methods else list(METHODS)
    if args.tune:
        tune(args.preset, methods, args.workers)
    if args.table:
        spec = TABLES[args.table]
        cells = [c for c in spec.cells(args.preset) if c.flags["method"] in methods]
        jobs = [
            dict(method=c.flags["method"], flags={k: v for k, v in c.flags.items() if k != "method"}, seed=seed,
                 tuning=False)
            for seed in PRESETS[args.preset].seeds[: spec.seeds] for c in cells
        ]  # fmt: skip
        if not args.no_runs:
            make(args.preset, jobs, args.workers)
        print(table(args.preset, args.table))


if __name__ == "__main__":
    main()
