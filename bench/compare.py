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
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import stdev
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported
import mpmath
import numpy as np
from kinds import KINDS
from measure import ROOT, commit

import bridge
from grading.scores import pass_at_k
from infra.files import read_lines, read_log, read_object
from infra.run import settings_of
from settings import METHODS

TUNING_SEEDS = (1000, 1001, 1002)
SEEDS = tuple(range(10))
ON = ""  # the value of a flag that takes none
BLOCK = 5  # steps whose metrics are stored as one mean
METRICS = ("reward", "response_tokens", "entropy", "sft_nll", "cooperative_gain", "gain_grad_norm", "lora_norm")


class Preset(NamedTuple):
    """A task to compare on: flags of bridge.py, the groups of its evaluation that D_RL and D_SFT lack."""

    flags: dict[str, str]
    out_of_distribution: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS


SHORT = {"steps": "24", "prompts-per-step": "8", "eval-problems": "20", "eval-every": "8", "sft-steps": "12"}
PRESETS = {
    "chains": Preset({"preset": "chains"}, ("n=8", "n=9")),
    "logic": Preset({"preset": "logic"}, ()),
    "quick": Preset({"preset": "chains"} | SHORT, ("n=8", "n=9"), (0, 1)),
}

# ---------------------------------------------------------------------------------------------------------------------
# Cells: what a table runs


class Cell(NamedTuple):
    """One row of a table: a method with settings, run on every seed."""

    label: str
    method: str
    flags: dict[str, str]  # of bridge.py, without method and seed
    against: str = "bridge"  # label of the row that the differences refer to
    kind: str = "final"  # a name in KINDS

    def job(self, seed: int) -> dict:
        return dict(method=self.method, flags=self.flags, seed=seed, kind=self.kind)


def grid(**values: str) -> list[dict[str, str]]:
    """All combinations of comma lists: grid(alpha="1e-3,2e-3", mu="1") has two."""
    names = [name.replace("_", "-") for name in values]
    return [dict(zip(names, point, strict=True)) for point in product(*(v.split(",") for v in values.values()))]


HALF = "bridge, λ 0.5"  # with the paper's λ; the tables that change one thing in bridge start from it
SIX = grid(alpha="1e-4,2e-4,4e-4,8e-4,1.6e-3,3.2e-3")
RATES = grid(alpha="2e-4,4e-4,8e-4", beta="5e-4,2e-3")  # at the default λ of 0.5


def with_lambda(beta: str) -> list[dict[str, str]]:
    """Trials of a method with an adapter: three α at the default λ of 0.5 and at 0.7."""
    at_half = grid(alpha="2e-4,4e-4,8e-4", beta=beta)
    return at_half + [flags | {"lam": "0.7"} for flags in at_half]


TRIALS = {  # six for every row of the table main, over its own rates, weights and stage lengths
    "sft": SIX,
    "rl": SIX,
    "sft_rl": grid(alpha="2e-4,4e-4,8e-4", sft_steps="50,150"),
    "alternating": SIX,
    "mix": grid(alpha="2e-4,4e-4,8e-4", mu="0.5,1"),
    "chord": grid(alpha="2e-4,4e-4,8e-4", chord_peak="0.5,0.9"),
    "chord, φ": [
        flags | {"chord-phi": ON, "chord-valley": flags["chord-peak"]}  # φ has a constant μ
        for flags in grid(alpha="2e-4,4e-4,8e-4", chord_peak="0.1,0.5")
    ],
    "luffy": SIX,
    "srft": grid(alpha="2e-4,4e-4,8e-4", mu="0.005,0.1"),  # a token's RL weight beside its SFT weight is as published
    "hpt": grid(alpha="2e-4,4e-4,8e-4", mu="0.005,0.1"),  # at mu = 0.005: see baselines.py
    "mix_lora": with_lambda("2e-3"),  # these β won on chains at λ = 0.5
    "no_meta": with_lambda("5e-4"),
    "bridge": with_lambda("2e-3"),
    HALF: RATES,
}


def method_of(row: str) -> str:
    return row.partition(",")[0]


def trials(preset: str, row: str) -> list[dict]:
    """The finished trials of a row of the table main."""
    known = (r for r in records(preset) if (r["method"], r["kind"]) == (method_of(row), "tuning"))
    return [r for r in known if r["flags"] in TRIALS[row]]


def tuned(preset: str, row: str) -> dict[str, str]:
    """The settings that won the row's trials; before there are any, those that all its trials share."""
    scores: dict[str, list[float]] = {}
    for run in trials(preset, row):
        scores.setdefault(json.dumps(run["flags"]), []).append(trained(run, preset))
    most = max(map(len, scores.values()), default=0)
    finalists = {flags: sum(s) / len(s) for flags, s in scores.items() if len(s) == most}
    shared = set.intersection(*(set(flags.items()) for flags in TRIALS[row]))
    return json.loads(max(finalists, key=finalists.get)) if finalists else dict(shared)


def cell(preset: str, label: str, row: str, against: str = "bridge", kind: str = "final", **flags: str) -> Cell:
    """A cell with the tuned settings of a row of the table main; `flags` replace them."""
    given = {name.replace("_", "-"): value for name, value in flags.items()}
    return Cell(label, method_of(row), tuned(preset, row) | given, against, kind)


def main_cells(preset: str) -> list[Cell]:
    return [cell(preset, row, row) for row in TRIALS]


def cost_cells(preset: str) -> list[Cell]:
    return [cell(preset, row, row, kind="cost", steps="50") for row in TRIALS]


def shadow_cells(preset: str) -> list[Cell]:
    estimators = {"own rollouts": dict(shadow_rollouts="own"), "θ̂ = θ + one step": dict(shadow_rollouts="one_step"),
                  "shared, PPO's clip": dict(shadow_ratio_cap="0")}  # fmt: skip
    equal = rates(preset)
    bounds = [
        cell(preset, "bridge", HALF),
        Cell("w on SFT (no_meta)", "no_meta", equal),
        Cell("w on SFT + RL (mix_lora)", "mix_lora", equal),
        Cell("no w (mix)", "mix", dict(alpha=equal["alpha"], mu="1")),
    ]
    return bounds + [cell(preset, f"bridge, {name}", HALF, **flags) for name, flags in estimators.items()]


def effect_cells(preset: str) -> list[Cell]:
    kinds = {"shared rollouts": {}, "own rollouts": dict(shadow_rollouts="own")}
    return [cell(preset, name, HALF, "own rollouts", kind="effect", **flags) for name, flags in kinds.items()]


def order_cells(preset: str) -> list[Cell]:
    return [cell(preset, "bridge", HALF), cell(preset, "Gauss-Seidel", HALF, kind="gauss_seidel")]


def selection_cells(preset: str) -> list[Cell]:
    """SFT on a choice of the demonstrations: by the gain's gradient of w, by the reward's, by the truth."""
    kinds = {"all": "final", "raise the gain": "by_gain", "raise the gain, all visits": "by_gain_over_visits",
             "raise J_RL(θ,w)": "by_reward", "are right": "by_truth"}  # fmt: skip
    choice = partial(cell, preset, row=HALF, against="demonstrations: all")
    cells = [choice(f"demonstrations: {name}", kind=kind) for name, kind in kinds.items()]
    return [*cells, choice("own rollouts, those that raise the gain", kind="by_gain", shadow_rollouts="own")]


def rates(preset: str) -> dict[str, str]:
    """bridge's α and β at λ = 0.5, for methods that are compared at equal rates."""
    won = tuned(preset, HALF)
    return dict(alpha=won.get("alpha", "3e-4"), beta=won.get("beta", "2e-3"))


def sweep_cells(preset: str, flag: str, values: tuple[str, ...], against: str) -> list[Cell]:
    """bridge with values of one flag; `against` is the one that bridge has in the table main: those runs serve both."""
    row = "bridge, {} {}".format
    return [cell(preset, row(flag, v), HALF, row(flag, against), **({flag: v} if v != against else {})) for v in values]


def lambda_cells(preset: str) -> list[Cell]:
    """bridge, and the mix that gives θ the same update at the same rate."""
    weights = {"0.1": "9", "0.3": "2.3333", "0.5": "1", "0.7": "0.42857", "0.9": "0.11111"}
    cells = sweep_cells(preset, "lam", tuple(weights), "0.5")
    alpha = rates(preset)["alpha"]
    return cells + [
        cell(preset, f"mix, lam {lam}", "mix", f"bridge, lam {lam}", alpha=alpha, mu=mu) for lam, mu in weights.items()
    ]


def lora_cells(preset: str) -> list[Cell]:
    default, sizes = "bridge, rank 8, alpha 16", (("2", "4"), ("32", "64"), ("8", "4"), ("8", "64"))
    return [cell(preset, default, HALF, default)] + [
        cell(preset, f"bridge, rank {r}, alpha {a}", HALF, default, lora_rank=r, lora_alpha=a) for r, a in sizes
    ]


def variant_cells(preset: str, flag: str, names: tuple[str, ...], methods: tuple[str, ...], against: str) -> list[Cell]:
    """Methods on variants of the task or the reward, functions of bench/variants.py."""
    return [
        cell(preset, f"{m}, {v}", m, f"{against}, {v}", **({flag: f"bench/variants.py:{v}"} if v != "clean" else {}))
        for v in names for m in methods
    ]  # fmt: skip


def supervision_cells(preset: str) -> list[Cell]:
    """Two ends, bridge and mix with more or fewer, better or worse demonstrations; RL needs none."""
    cells = variant_cells(preset, "task", SUPERVISION, BOUNDS, "mix_lora")
    return [*cells, cell(preset, "rl", "rl", "mix, demonstrations_16")]


# ---------------------------------------------------------------------------------------------------------------------
# Columns: numbers of one run


def trained_groups(accuracies: dict[str, float], preset: str) -> list[str]:
    """The groups of an evaluation that training has."""
    return [g for g in accuracies if g != "average" and g not in PRESETS[preset].out_of_distribution]


def percent(accuracies: dict[str, float], preset: str) -> float:
    """The mean accuracy on the groups that training has."""
    groups = trained_groups(accuracies, preset)
    return 100 * sum(accuracies[g] for g in groups) / len(groups)


def trained(run: dict, preset: str, at: float = 1.0) -> float:
    """The policy's accuracy in percent on the groups that training has, at a fraction of the steps."""
    last = run["evals"][-1]["step"]
    return percent(min(run["evals"], key=lambda e: abs(e["step"] - at * last))["policy"], preset)


def out_of_distribution(run: dict, preset: str) -> float | None:
    if not (groups := PRESETS[preset].out_of_distribution):
        return None
    return 100 * sum(run["evals"][-1]["policy"][g] for g in groups) / len(groups)


def shadow_end(run: dict, preset: str) -> float | None:
    shadow = run["evals"][-1].get("shadow")
    return None if shadow is None else percent(shadow, preset)


def curve(run: dict, name: str) -> list[float]:
    return [value for value in run["curves"].get(name, []) if value is not None]


def dip(run: dict, preset: str) -> float | None:
    """How far the reward falls below its first value, at its lowest: points."""
    reward = curve(run, "reward")
    return 100 * (reward[0] - min(reward)) if reward else None


def mean_of(name: str, part: slice, run: dict, preset: str) -> float | None:
    values = curve(run, name)[part]
    return sum(values) / len(values) if values else None


def passed(run: dict, preset: str, k: int) -> float | None:
    """pass@k on the trained groups, of 16 samples at temperature 1."""
    if not run["probes"] or "right" not in run["probes"][-1]:
        return None
    policy = run["evals"][-1]["policy"]
    of_group = dict(zip(sorted(policy.keys() - {"average"}), run["probes"][-1]["right"], strict=True))
    known = [of_group[g] for g in trained_groups(policy, preset)]
    matrices = [np.array([[1] * c + [0] * (16 - c) for c in right]) for right in known]
    return 100 * float(np.mean([pass_at_k(matrix, k).mean() for matrix in matrices]))


def change_by_w(run: dict, preset: str, base: str) -> float:
    """What w's updates between two evaluations did to the reward of π(base, w), summed over the run: points."""
    return 100 * sum(p[f"{base},w"] - p[f"{base},w_before"] for p in run["probes"])


def share_taken(run: dict, preset: str, name: str) -> float | None:
    """Percent of the demonstrations of one kind that SFT took, over the whole run."""
    shares = [p[name] for p in run["probes"] if name in p]
    return 100 * sum(shares) / len(shares) if shares else None


def sampled_reward(run: dict, preset: str, base: str, adapter: str) -> float:
    """The reward of π(base, adapter) at the end: points."""
    return 100 * run["probes"][-1][f"{base},{adapter}"]


ACCURACY = {"trained": trained, "out of distribution": out_of_distribution}
COST = {
    "seconds per step": lambda run, preset: run["step_seconds"],
    "peak MiB": lambda run, preset: run["peak_mib"],
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
PASS = {f"pass@{k}": partial(passed, k=k) for k in (1, 4, 16)}
EFFECT = {
    "J(θ,w) by w": partial(change_by_w, base="theta"),
    "J(θ̂,w) by w": partial(change_by_w, base="theta_hat"),
    "J(θ,w)": partial(sampled_reward, base="theta", adapter="w"),
    "J(θ,0)": partial(sampled_reward, base="theta", adapter="none"),
    "J(θ̂,w)": partial(sampled_reward, base="theta_hat", adapter="w"),
    "J(θ̂,0)": partial(sampled_reward, base="theta_hat", adapter="none"),
}
SELECTION = {
    "trained": trained,
    "useful taken, %": partial(share_taken, name="useful taken"),
    "useless taken, %": partial(share_taken, name="useless taken"),
}
BOUNDS = ("mix", "no_meta", "mix_lora", "bridge")
SUPERVISION = ("useless_0", "useless_20", "clean", "useless_60", "demonstrations_16", "demonstrations_1024")


class Table(NamedTuple):
    cells: Callable[[str], list[Cell]]
    columns: dict[str, Callable[[dict, str], float | None]]
    seeds: int = len(SEEDS)  # that its command makes; a table shows every seed that has a run
    workers: int | None = None  # runs at a time, where it matters


TABLES = {
    "main": Table(main_cells, ACCURACY),
    "epochs": Table(main_cells, EPOCHS),
    "cost": Table(cost_cells, COST, 2, workers=1),
    "dynamics": Table(main_cells, DYNAMICS),
    "pass_at_k": Table(main_cells, PASS),
    "shadow": Table(shadow_cells, GAIN, 5),
    "effect": Table(effect_cells, EFFECT, 5),
    "order": Table(order_cells, GAIN, 5),
    "selection": Table(selection_cells, SELECTION, 5),
    "beta": Table(partial(sweep_cells, flag="beta", values=("2e-4", "5e-4", "2e-3", "8e-3"), against="2e-3"), GAIN, 5),
    "lambda": Table(lambda_cells, ACCURACY, 5),
    "lora": Table(lora_cells, ACCURACY, 5),
    "noise": Table(
        partial(variant_cells, flag="reward", names=("clean", "noise_10", "noise_20"),
                methods=("rl", "mix", "mix_lora", "bridge"), against="rl"), ACCURACY, 5,
    ),
    "supervision": Table(supervision_cells, ACCURACY, 5),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Runs


def results(preset: str) -> Path:
    return ROOT / "bench" / "results" / f"{preset}.jsonl.gz"


@cache
def records(preset: str) -> list[dict]:
    if not results(preset).exists():
        return []
    with gzip.open(results(preset), "rt") as file:
        return [json.loads(line) for line in file]


def key(run: dict) -> str:
    return json.dumps([run[name] for name in ("method", "flags", "seed", "kind")], sort_keys=True)


def runs_of(preset: str, c: Cell, seeds: tuple[int, ...]) -> dict[int, dict]:
    """{seed: record} of the finished runs of a cell."""
    finished = {key(r): r for r in records(preset)}
    keys = {seed: key(c.job(seed)) for seed in seeds}
    return {seed: finished[k] for seed, k in keys.items() if k in finished}


def blocks(values: list[float | None]) -> list[float | None]:
    """The means of BLOCK consecutive values, to four digits; None where the method lacks the metric."""
    parts = [[v for v in values[i : i + BLOCK] if v is not None] for i in range(0, len(values), BLOCK)]
    return [float(f"{sum(part) / len(part):.4g}") if part else None for part in parts]


def start(preset: str, job: dict, folder: str) -> int:
    """Starts one run of bridge.py in a forked process, which has the imports already; returns its process id."""
    flags = PRESETS[preset].flags | {"method": job["method"], "seed": str(job["seed"])} | job["flags"]
    idle = {"sft-steps": job["method"] != "sft_rl", "prompts-per-step": not METHODS[job["method"]].rl}
    flags = {name: value for name, value in flags.items() if not idle.get(name)}  # idle settings are refused
    if KINDS[job["kind"]] is None:
        flags |= {"eval-every": "100000"}  # at the end only
    if pid := os.fork():
        return pid
    status = 1
    with open(f"{folder}/output", "w", buffering=1) as output:
        try:
            sys.stdout = sys.stderr = output
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            bridge.plot.draw = bridge.report.write = lambda *_: None  # no figures of single runs
            if change := KINDS[job["kind"]]:
                change()
            words = [f"--{name}" + f"={value}" * (value != ON) for name, value in flags.items()]
            bridge.main([*words, "--save-every=100000", "--keep-rollouts=none", f"--out={folder}/run"])
            status = 0
        except BaseException:  # also SystemExit, which has the message of a wrong setting
            traceback.print_exc()
        finally:
            output.flush()
            os._exit(status)  # the parent's files and exit handlers are not this process's


def record_of(job: dict, folder: str, peak_kib: int, source: str) -> dict:
    """The record of a finished run: accuracies, curves, seconds of training without evaluation."""
    metrics, evals = (read_log(Path(folder, "run", f"{name}.jsonl")) for name in ("metrics", "evals"))
    probes = [record for _, record in read_lines(Path(folder, "run/probe.jsonl"))] if KINDS[job["kind"]] else []
    s = settings_of(read_object(Path(folder, "run/config.json")), "config.json")
    seconds = [sum(v for phase, v in m["seconds"].items() if phase not in ("evaluate", "save")) for m in metrics]
    curves = {name: blocks([m[name] for m in metrics]) for name in METRICS if metrics[-1][name] is not None}
    sampled = s.prompts_per_step * s.group_size * sum(m["response_tokens"] or 0 for m in metrics)
    return job | dict(
        evals=evals, probes=probes, curves=curves | dict(seconds=blocks(seconds)),
        seconds=round(sum(seconds), 2), step_seconds=round(sum(seconds) / len(seconds), 4),
        sampled_tokens=round(sampled), peak_mib=peak_kib // 1024, commit=source,
    )  # fmt: skip


def make(preset: str, jobs: list[dict], workers: int) -> None:
    """Makes the runs that the results lack and appends each as it ends. Raises RuntimeError if one fails."""
    done, running, made = {key(r) for r in records(preset)}, {}, 0
    todo = [job for job in {key(job): job for job in jobs}.values() if key(job) not in done]
    count, source = len(todo), commit()  # the commit that was imported, whatever the folder has later
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
            record, made = record_of(job, folder, usage.ru_maxrss, source), made + 1
            with gzip.open(results(preset), "at") as file:
                file.write(json.dumps(record) + "\n")
            print(f"[{made}/{count}] {name}: {trained(record, preset):.1f} %, {record['seconds']:.0f} s", flush=True)
            shutil.rmtree(folder)
    records.cache_clear()


def tune(preset: str, rows: list[str], workers: int) -> None:
    """All trials on one tuning seed, then the best two of each row on the others."""
    first, *others = TUNING_SEEDS
    jobs = [(row, flags) for row in rows for flags in TRIALS[row]]
    make(preset, [dict(method=method_of(row), flags=f, seed=first, kind="tuning") for row, f in jobs], workers)
    finals = []
    for row in rows:
        best = sorted((r for r in trials(preset, row) if r["seed"] == first), key=lambda r: -trained(r, preset))[:2]
        finals += [
            dict(method=r["method"], flags=r["flags"], seed=seed, kind="tuning") for r in best for seed in others
        ]
    make(preset, finals, workers)
    for row in rows:
        print(row, tuned(preset, row))


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def seeds(preset: str, name: str) -> tuple[int, ...]:
    return PRESETS[preset].seeds[: TABLES[name].seeds]


def half_width(values: list[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t with n − 1 degrees of freedom; infinite for one value."""
    n = len(values)
    if n < 2:
        return float("inf")
    return student(n - 1) * stdev(values) / n**0.5


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
    """Markdown: a row for each cell with runs, means with intervals, and the paired difference of the first column.

    A row has every finished run of its cell, also those that were made for another table. A difference is of the
    seeds that both rows have.
    """
    spec, by_cell = TABLES[name], {}
    for c in spec.cells(preset):
        by_cell[c.label] = c, runs_of(preset, c, PRESETS[preset].seeds)
    first = next(iter(spec.columns.values()))
    lines = [f"| | {' | '.join(spec.columns)} | difference | to | seeds |", "|---" * (len(spec.columns) + 4) + "|"]
    for label, (c, runs) in by_cell.items():
        if not runs:
            continue
        cells = []
        for column in spec.columns.values():
            values = [v for v in (column(r, preset) for r in runs.values()) if v is not None]
            cells.append(with_interval(values) if values else "–")
        other = by_cell.get(c.against, (c, {}))[1]
        paired = [first(runs[s], preset) - first(other[s], preset) for s in runs if s in other and c.against != label]
        difference = with_interval(paired, "+") if paired else "–"
        to = c.against if paired else ""
        count = f"{len(runs)}, {len(paired)} of them paired" if 0 < len(paired) < len(runs) else str(len(runs))
        lines.append(f"| {label} | {' | '.join(cells)} | {difference} | {to} | {count} |")
    return "\n".join(lines)


def spent(run: dict, total: str, name: str, step: int) -> float:
    """The part of run[total] until a step, in proportion to a stored curve."""
    values = [value or 0.0 for value in run["curves"][name]]
    return run[total] * sum(values[: step // BLOCK]) / sum(values)


def band(ax, xs: list[float], series: list[list[float]], **style) -> None:
    """The mean over seeds of curves of equal length, and its 95 % interval."""
    columns = list(zip(*series, strict=True))
    means, halves = [sum(c) / len(c) for c in columns], [half_width(list(c)) for c in columns]
    ax.plot(xs, means, **style)
    if len(series) > 1:
        low, high = zip(*((m - h, m + h) for m, h in zip(means, halves, strict=True)), strict=True)
        ax.fill_between(xs, low, high, color=style["color"], alpha=0.12, lw=0)


def draw(preset: str, out: Path) -> None:
    """Accuracy over steps, sampled tokens and seconds; response length, cooperative gain, the shadow's accuracy."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    steps, tokens, seconds, length, gain, shadow = figure.subplots(2, 3).flat
    for ax, name in ((steps, "step"), (tokens, "sampled tokens, thousands"), (seconds, "seconds of training")):
        ax.set(title="accuracy on trained lengths, %", xlabel=name)
    length.set(title="response length, tokens", xlabel="step")
    gain.set(title="logged cooperative gain, reward", xlabel="step")
    shadow.set(title="accuracy of the shadow (θ̂, w), and of rl, %", xlabel="step")
    cells = [*main_cells(preset), cell(preset, "bridge, own rollouts", HALF, shadow_rollouts="own")]
    colors = matplotlib.colormaps["tab20"].colors
    for c, color in zip(cells, (*colors[::2], *colors[1::2]), strict=False):
        runs = list(runs_of(preset, c, PRESETS[preset].seeds).values())
        if not runs:
            continue
        style = dict(
            color="black" if c.label == "bridge" else color, lw=2.2 if c.label == "bridge" else 1.2, label=c.label
        )
        at = [e["step"] for e in runs[0]["evals"]]
        accuracy = [[percent(e["policy"], preset) for e in r["evals"]] for r in runs]
        band(steps, at, accuracy, **style)
        for ax, total, name, unit in (
            (tokens, "sampled_tokens", "response_tokens", 1000),
            (seconds, "seconds", "seconds", 1),
        ):
            if runs[0][total]:
                xs = [[spent(r, total, name, step) / unit for r in runs] for step in at]
                band(ax, [sum(x) / len(x) for x in xs], accuracy, **style)
        for ax, name in ((length, "response_tokens"), (gain, "cooperative_gain")):
            curves = [r["curves"].get(name, []) for r in runs]
            middle = [BLOCK * i + BLOCK / 2 for i, value in enumerate(curves[0]) if value is not None]
            if middle:
                band(ax, middle, [[v for v in values if v is not None] for values in curves], **style)
        if "shadow" in runs[0]["evals"][-1] or c.method == "rl":
            kind = "policy" if c.method == "rl" else "shadow"
            band(shadow, at, [[percent(e[kind], preset) for e in r["evals"]] for r in runs], **style)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    steps.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(out, dpi=120)


def draw_finals(out: Path) -> None:
    """For every preset with ten seeds: the final accuracy of each row of the table main, and its 95 % interval."""
    from matplotlib.figure import Figure

    presets = [preset for preset, spec in PRESETS.items() if spec.seeds == SEEDS and records(preset)]
    figure = Figure(figsize=(4.5 * len(presets), 3.6), layout="constrained")
    for ax, preset in zip(figure.subplots(1, len(presets), squeeze=False).flat, presets, strict=True):
        runs = {c.label: runs_of(preset, c, SEEDS).values() for c in main_cells(preset)}
        scores = {label: [trained(run, preset) for run in of_label] for label, of_label in runs.items() if of_label}
        ordered = sorted(scores, key=lambda label: sum(scores[label]) / len(scores[label]))
        for y, label in enumerate(ordered):
            mean, half = sum(scores[label]) / len(scores[label]), half_width(scores[label])
            color = "tab:red" if label == "bridge" else "tab:blue"
            ax.errorbar(mean, y, xerr=half, fmt="o", color=color, capsize=3)
            if label == "bridge":
                ax.axvspan(mean - half, mean + half, color=color, alpha=0.1, lw=0)
        ax.set_yticks(range(len(ordered)), ordered)
        ax.set(title=f"{preset}: accuracy, %, ten seeds", xlim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="chains")
    parser.add_argument("--table", choices=TABLES, help="make its runs, print it")
    parser.add_argument("--tune", action="store_true", help="make the trials of every method first")
    parser.add_argument("--rows", default="", help="only these of the table main, separated by ;")
    parser.add_argument("--figure", type=Path, help="draw the runs of the table main")
    parser.add_argument("--finals", type=Path, help="draw the final accuracies of the table main, of all presets")
    parser.add_argument("--no-runs", action="store_true", help="of finished runs only")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    rows = args.rows.split(";") if args.rows else list(TRIALS)
    if unknown := set(rows) - set(TRIALS):
        parser.error(f"--rows: no {unknown.pop()!r}; there are {', '.join(TRIALS)}")
    if args.tune:
        tune(args.preset, rows, args.workers)
    if args.table:
        spec = TABLES[args.table]
        cells = [c for c in spec.cells(args.preset) if not args.rows or c.label in rows]
        if not args.no_runs:
            jobs = [c.job(seed) for seed in seeds(args.preset, args.table) for c in cells]
            make(args.preset, jobs, spec.workers or args.workers)
        print(table(args.preset, args.table))
    if args.figure:
        draw(args.preset, args.figure)
    if args.finals:
        draw_finals(args.finals)


if __name__ == "__main__":
    main()
