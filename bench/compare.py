"""Compares methods over settings and seeds: makes the runs that are missing, then prints a table with intervals.

python bench/compare.py --table main --preset quick           # every method, two seeds, minutes
python bench/compare.py --tune --preset chains                # six trials of every method's own rates
python bench/compare.py --tune-fairly --preset chains         # 26 trials, by halving, of the rows of bench/fair.py
python bench/compare.py --table noise --preset chains         # one of the tables below
python bench/compare.py --tables > bench/results/tables.md    # every table whose runs are finished
python bench/compare.py --table main --preset chains --no-runs --figure docs/chains.png

Two runs are made at a time, with one thread each. A finished run is one JSON line of bench/results/PRESET.jsonl.gz. The
same command continues after a kill. Every method has the settings that won its trials on the tuning seeds (1000 to
1002), or the defaults if it has no trials. The tables use other seeds. Accuracies are greedy, in percent. ± is the 95 %
interval of the mean over seeds (Student's t). Differences are paired by seed: the two runs of a pair have equal data,
prompts and evaluation problems. The endpoint, "trained", is the mean of a run's last three evaluations.
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
import fair
import kinds
import mpmath
import numpy as np
from measure import ROOT, sources
from swapped import SWAPPED

import bridge
from grading.scores import pass_at_k
from infra.files import read_lines, read_log
from infra.run import settings_of
from settings import METHODS

KINDS = kinds.KINDS | SWAPPED
TUNING_SEEDS = (1000, 1001, 1002)
SEEDS = tuple(range(10))
FRESH = tuple(range(10, 20))  # of the table fair: no choice was made on them
ON = ""  # the value of a flag that takes none
FEWEST = 5  # runs of a row; a table shows no row with fewer, unless the preset has fewer seeds
LAST = 3  # evaluations whose mean is a run's accuracy
BLOCK = 5  # steps whose metrics are stored as one mean
METRICS = (
    "reward", "response_tokens", "entropy", "sft_nll", "cooperative_gain", "gain_grad_norm", "lora_norm",
    "w_norm_policy", "w_norm_shadow", "w_cosine",
)  # fmt: skip


class Preset(NamedTuple):
    """A task to compare on."""

    flags: dict[str, str]  # of bridge.py
    out_of_distribution: tuple[str, ...]  # groups of the evaluation that occur in no training data
    seeds: tuple[int, ...] = SEEDS


# chains on another base model: python bench/base_models.py arithmetic-laptop --seed 1 --out models/base1
BASE = f"{ROOT}/models/base{{}}/arithmetic-laptop"
SHORT = {"steps": "24", "prompts-per-step": "8", "eval-problems": "20", "eval-every": "8", "sft-steps": "12"}
PRESETS = {
    "chains": Preset({"preset": "chains"}, ("n=8", "n=9")),
    "logic": Preset({"preset": "logic"}, ()),
    "smollm2": Preset({"preset": "smollm2", "eval-problems": "100", "eval-every": "30"}, (), (1, 2, 3)),
    "base1": Preset({"preset": "chains", "model": BASE.format(1)}, ("n=8", "n=9"), (0, 1, 2, 3, 4)),
    "base2": Preset({"preset": "chains", "model": BASE.format(2)}, ("n=8", "n=9"), (0, 1, 2, 3, 4)),
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
    names = [flag_name(name) for name in values]
    lists = [text.split(",") for text in values.values()]
    return [dict(zip(names, point, strict=True)) for point in product(*lists)]


def flag_name(name: str) -> str:
    return name.replace("_", "-")


HALF = "bridge, λ 0.5"  # with the paper's λ; the tables that change one thing in bridge start from it
SIX = grid(alpha="1e-4,2e-4,4e-4,8e-4,1.6e-3,3.2e-3")
RATES = grid(alpha="2e-4,4e-4,8e-4", beta="5e-4,2e-3")  # at the default λ of 0.5


def with_lambda(beta: str) -> list[dict[str, str]]:
    """Trials of a method with an adapter: three α at the default λ of 0.5 and at 0.7."""
    at_half = grid(alpha="2e-4,4e-4,8e-4", beta=beta)
    return at_half + [flags | {"lam": "0.7"} for flags in at_half]


def with_phi() -> list[dict[str, str]]:
    """Trials of CHORD-φ, whose μ is constant."""
    trials = grid(alpha="2e-4,4e-4,8e-4", chord_peak="0.1,0.5")
    return [flags | {"chord-phi": ON, "chord-valley": flags["chord-peak"]} for flags in trials]


TRIALS = {  # six for every row of the table main, over its own rates, weights and stage lengths
    "sft": SIX,
    "rl": SIX,
    "sft_rl": grid(alpha="2e-4,4e-4,8e-4", sft_steps="50,150"),
    "alternating": SIX,
    "mix": grid(alpha="2e-4,4e-4,8e-4", mu="0.5,1"),
    "chord": grid(alpha="2e-4,4e-4,8e-4", chord_peak="0.5,0.9"),
    "chord, φ": with_phi(),
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
    method = method_of(row)
    known = [r for r in records(preset) if r["method"] == method and r["kind"] == "tuning"]
    return [r for r in known if r["flags"] in TRIALS[row]]


def tuned(preset: str, row: str) -> dict[str, str]:
    """The settings that won the row's trials; before there are any, those that all its trials share."""
    scores: dict[str, list[float]] = {}
    for run in trials(preset, row):
        settings = json.dumps(run["flags"])
        scores.setdefault(settings, []).append(trained(run, preset))
    if not scores:
        return dict(set.intersection(*(set(flags.items()) for flags in TRIALS[row])))
    # Only the best two settings of the first seed have trials on the other tuning seeds.
    most = max(len(values) for values in scores.values())
    means = {settings: sum(values) / most for settings, values in scores.items() if len(values) == most}
    return json.loads(max(means, key=means.get))


def cell(preset: str, label: str, row: str, against: str = "bridge", kind: str = "final", **flags: str) -> Cell:
    """A cell with the tuned settings of a row of the table main; `flags` replace them."""
    given = {flag_name(name): value for name, value in flags.items()}
    return Cell(label, method_of(row), tuned(preset, row) | given, against, kind)


def main_cells(preset: str) -> list[Cell]:
    return [cell(preset, row, row) for row in TRIALS]


def cost_cells(preset: str) -> list[Cell]:
    return [cell(preset, row, row, kind="cost", steps="50") for row in TRIALS]


def rates(preset: str) -> dict[str, str]:
    """bridge's α and β at λ = 0.5, for methods that are compared at equal rates."""
    won = tuned(preset, HALF)
    return dict(alpha=won.get("alpha", "3e-4"), beta=won.get("beta", "2e-3"))


def shadow_cells(preset: str) -> list[Cell]:
    equal = rates(preset)
    changed = partial(cell, preset, row=HALF, against=HALF)
    return [
        changed(HALF),
        Cell("w on SFT (no_meta)", "no_meta", equal, HALF),
        Cell("w on SFT + RL (mix_lora)", "mix_lora", equal, HALF),
        Cell("no w (mix)", "mix", dict(alpha=equal["alpha"], mu="1"), HALF),
        changed("bridge, own rollouts", shadow_rollouts="own"),
        changed("bridge, θ̂ = θ + one step", shadow_rollouts="one_step"),
        changed("bridge, shared, PPO's clip", shadow_ratio_cap="0"),
    ]


def effect_cells(preset: str) -> list[Cell]:
    own = "own rollouts"
    return [
        cell(preset, "shared rollouts", HALF, own, kind="effect"),
        cell(preset, own, HALF, own, kind="effect", shadow_rollouts="own"),
    ]


def order_cells(preset: str) -> list[Cell]:
    return [cell(preset, HALF, HALF, HALF), cell(preset, "Gauss-Seidel", HALF, HALF, kind="gauss_seidel")]


def selection_cells(preset: str) -> list[Cell]:
    """SFT on a choice of the demonstrations: by the gain's gradient of w, by the reward's, by the truth."""
    choice = partial(cell, preset, row=HALF, against="demonstrations: all")
    return [
        choice("demonstrations: all"),
        choice("demonstrations: raise the gain", kind="by_gain"),
        choice("demonstrations: raise the gain, all visits", kind="by_gain_over_visits"),
        choice("demonstrations: raise J_RL(θ,w)", kind="by_reward"),
        choice("demonstrations: are right", kind="by_truth"),
        choice("own rollouts, those that raise the gain", kind="by_gain", shadow_rollouts="own"),
    ]


def inner_cells(preset: str) -> list[Cell]:
    """θ̂ with more steps of RL per iteration, and with rewards that carry no information for w."""
    against = "mix_lora"
    own = partial(cell, preset, row=HALF, against=against, shadow_rollouts="own")
    return [
        Cell(against, "mix_lora", rates(preset), against),
        own("θ̂: 1 step", kind="inner_1"),
        own("θ̂: 4 steps", kind="inner_4"),
        own("θ̂: 8 steps", kind="inner_8"),
        own("θ̂: 1 step, its rewards shuffled for w", kind="inner_shuffled"),
    ]


def disjoint_cells(preset: str) -> list[Cell]:
    """w has the four projections of attention, θ all else: θ cannot undo w."""
    against = "mix_lora"
    equal = rates(preset) | {"lora-targets": "q_proj,k_proj,v_proj,o_proj"}
    own = equal | {"shadow-rollouts": "own"}
    return [
        Cell(against, "mix_lora", equal, against, "disjoint"),
        Cell("bridge, shared rollouts", "bridge", equal, against, "disjoint"),
        Cell("bridge, own rollouts", "bridge", own, against, "disjoint"),
        Cell("no_meta", "no_meta", equal, against, "disjoint"),
    ]


def sweep_cells(preset: str, flag: str, values: tuple[str, ...], default: str) -> list[Cell]:
    """bridge with values of one flag. The row of `default` has the runs that bridge has in the other tables."""
    against = f"bridge, {flag} {default}"
    cells = []
    for value in values:
        changed = {} if value == default else {flag: value}
        cells.append(cell(preset, f"bridge, {flag} {value}", HALF, against, **changed))
    return cells


MU_OF = {"0.1": "9", "0.3": "2.3333", "0.5": "1", "0.7": "0.42857", "0.9": "0.11111"}  # λ: μ = (1 − λ)/λ of mix


def lambda_cells(preset: str) -> list[Cell]:
    """bridge, and the mix that gives θ the same update at the same rate."""
    cells = sweep_cells(preset, "lam", tuple(MU_OF), "0.5")
    alpha = rates(preset)["alpha"]
    for lam, mu in MU_OF.items():
        cells.append(cell(preset, f"mix, lam {lam}", "mix", f"bridge, lam {lam}", alpha=alpha, mu=mu))
    return cells


def lora_cells(preset: str) -> list[Cell]:
    default = "bridge, rank 8, alpha 16"
    cells = [cell(preset, default, HALF, default)]
    for rank, alpha in (("2", "4"), ("32", "64"), ("8", "4"), ("8", "64")):
        label = f"bridge, rank {rank}, alpha {alpha}"
        cells.append(cell(preset, label, HALF, default, lora_rank=rank, lora_alpha=alpha))
    return cells


def variant_cells(preset: str, flag: str, names: tuple[str, ...], methods: tuple[str, ...], against: str) -> list[Cell]:
    """Methods on variants of the task or the reward: functions of bench/variants.py, or "clean" for none."""
    cells = []
    for name in names:
        changed = {} if name == "clean" else {flag: f"bench/variants.py:{name}"}
        for method in methods:
            cells.append(cell(preset, f"{method}, {name}", method, f"{against}, {name}", **changed))
    return cells


def supervision_cells(preset: str) -> list[Cell]:
    """Two ends, bridge and mix with more or fewer, better or worse demonstrations; RL needs none."""
    methods = ("mix", "no_meta", "mix_lora", "bridge")
    cells = variant_cells(preset, "task", SUPERVISION, methods, "mix_lora")
    return [*cells, cell(preset, "rl", "rl", "mix, demonstrations_16")]


def weighed_cells(preset: str, fault: str, name: str, lam: str = "0.5") -> list[Cell]:
    """mix with all demonstrations, with the useful ones, with filtered ones, and the method weighed (weighed.py).

    fault: a name in FAULTS. name: begins the labels.
    """
    changed, filters, eta = FAULTS[fault]
    alpha = tuned(preset, "mix").get("alpha", "4e-4")
    flags = dict(alpha=alpha, mu=MU_OF[lam]) | changed
    weighed = dict(alpha=alpha, lam=lam, eta=eta) | changed
    against = f"{name}: all"
    cells = [Cell(against, "mix", flags, against)]
    for kind in ("useful", *filters):
        cells.append(Cell(f"{name}: {kind}", "mix", flags, against, kind))
    cells.append(Cell(f"{name}: weighed", "weighed", weighed, against, "omega"))
    for kind in filters:
        cells.append(Cell(f"{name}: weighed, to {kind}", "weighed", weighed, f"{name}: {kind}", "omega"))
    return cells


def swapped_cells(preset: str) -> list[Cell]:
    """RL above, SFT below: the faults of half of the demonstrations, at λ = 0.5, with bridge beside."""
    faults = WITHOUT_AUTHORS[preset]
    if preset != "logic":
        faults += (AUTHORS,)
    cells = []
    for fault in faults:
        cells += weighed_cells(preset, fault, fault)
        changed = FAULTS[fault][0]
        flags = rates(preset)
        if changed:
            flags |= {"lam": "0.5"} | changed
        cells.append(Cell(f"{fault}: bridge, at its own rates", "bridge", flags, f"{fault}: all"))
    return cells


def swapped_lambda_cells(preset: str) -> list[Cell]:
    """The same at other λ."""
    cells = []
    for fault in WITHOUT_AUTHORS[preset]:
        for lam in ("0.3", "0.7"):
            cells += weighed_cells(preset, fault, f"{fault}, λ {lam}", lam)
    return cells


def swapped_75_cells(preset: str) -> list[Cell]:
    """The same with three useless demonstrations of four."""
    cells = []
    for fault in WITHOUT_AUTHORS[preset]:
        cells += weighed_cells(preset, f"{fault}, 75 %", f"{fault}, 75 %")
    return cells


def annotator_cells(preset: str) -> list[Cell]:
    """weighed with two bad annotators of four: without a trained shadow, and beside methods at their own settings."""
    if preset != "chains":
        return []
    of_label = {c.label: c for c in weighed_cells(preset, AUTHORS, AUTHORS)}
    every = of_label[f"{AUTHORS}: all"]
    weighed = of_label[f"{AUTHORS}: weighed"]
    own = [tuned(preset, row) | FAULTS[AUTHORS][0] for row in ("mix_lora", "sft_rl")]
    return [
        weighed._replace(label="weighed", against="weighed"),
        weighed._replace(label="weighed, θ̂ stays at the base model", against="weighed", kind="frozen"),
        every._replace(label="mix", against="weighed"),
        Cell("mix_lora, at its own settings", "mix_lora", own[0], "weighed"),
        Cell("sft_rl, at its own settings", "sft_rl", own[1], "weighed"),
    ]


def fair_job(row: str, flags: dict[str, str], seed: int) -> dict:
    """A trial of bench/fair.py."""
    spec = fair.ROWS[row]
    spare = {"task": "bench/variants.py:spare"}
    return dict(method=spec.method, flags=flags | spare, seed=seed, kind=spec.trial)


def fair_score(preset: str) -> fair.Score:
    """The accuracies of the finished trials of bench/fair.py."""
    finished = {key(run): trained(run, preset) for run in records(preset) if "spare" in run["flags"].get("task", "")}
    return lambda row, flags, seed: finished[key(fair_job(row, flags, seed))]


def tune_fairly(preset: str, rows: list[str], workers: int) -> None:
    """The trials of bench/fair.py, stage after stage; prints each row's winner, and whether it lies at an edge."""
    for stage, seeds in enumerate(fair.STAGES):
        jobs = []
        score = fair_score(preset)
        for row in rows:
            settings = fair.alive(row, stage, score)
            jobs += [fair_job(row, flags, seed) for seed in seeds for flags in settings]
        make(preset, jobs, workers)
    score = fair_score(preset)
    for row in rows:
        flags = fair.winner(row, score)
        edges = ", ".join(fair.at_edge(row, flags))
        print(f"{row} {flags}" + (f", at an edge: {edges}" if edges else ""), flush=True)


def fair_cells(preset: str) -> list[Cell]:
    """Every row of bench/fair.py whose trials have all run, with its winner."""
    winners = {}
    score = fair_score(preset)
    for row in fair.ROWS:
        try:
            winners[row] = fair.winner(row, score)
        except KeyError:  # a trial is missing
            continue
    cells = []
    for row, flags in winners.items():
        spec = fair.ROWS[row]
        against = spec.against
        if against not in winners:
            against = row  # nothing to compare with
        cells.append(Cell(row, spec.method, flags, against, spec.kind))
    return cells


def fresh_cells(preset: str) -> list[Cell]:
    """The rows of the primary contrasts, with the settings of the table main."""
    return [cell(preset, row, row) for row in ("bridge", "mix_lora", "sft_rl", "rl")]


def of_fair(preset: str, labels: tuple[str, ...]) -> list[Cell]:
    """Rows of the table fair."""
    return [c for c in fair_cells(preset) if c.label in labels]


def switch_cells(preset: str) -> list[Cell]:
    """sft_rl with the tuned number of SFT steps, and with the number that a rule finds, at the same α."""
    cells = []
    for c in of_fair(preset, ("sft_rl",)):
        longest = {"sft-steps": str(fair.ROWS[c.label].ranges["sft-steps"].high)}
        cells.append(c._replace(against=c.label))
        cells.append(Cell("by its validation loss", c.method, c.flags | longest, c.label, "switched"))
    return cells


def time_cells(preset: str) -> list[Cell]:
    """The rows of the table fair with as many steps as fit into bridge's seconds."""
    cells = []
    for c in fair_cells(preset):
        if c.label == "bridge":
            cells.append(c)
        elif c.label in EQUAL_TIME.get(preset, {}):
            steps = EQUAL_TIME[preset][c.label]
            cells.append(Cell(f"{c.label}, {steps} steps", c.method, c.flags | {"steps": steps}))
    return cells


def base_cells(preset: str) -> list[Cell]:
    """The settings that won on chains, on base models of other seeds."""
    if preset not in ("base1", "base2"):
        return []
    return of_fair("chains", ("bridge", "mix_lora", "bridge, mix_lora's draws", "mix", "sft_rl", "rl"))


def thread_cells(preset: str) -> list[Cell]:
    """The same runs with one thread and with two: what rounding alone changes."""
    cells = []
    for c in of_fair(preset, ("bridge", "mix")):
        cells.append(c._replace(against=c.label))
        cells.append(Cell(f"{c.label}, two threads", c.method, c.flags, c.label, "two_threads"))
    return cells


SHORT_RUNS = {  # of 20 steps with RL, that choose the settings on the pretrained model
    "mix": grid(alpha="5e-5,1e-4,2e-4"),
    # In the RL stage of a cold start a larger α breaks the model within ten steps: three runs at the rates above did.
    "sft_rl": grid(alpha="1e-5,2e-5,4e-5", sft_steps="20,60"),
    "mix_lora": [
        {"alpha": "5e-5", "beta": "5e-4"},
        {"alpha": "1e-4", "beta": "1e-3"},
        {"alpha": "2e-4", "beta": "2e-3"},
    ],
}
SHORT_RUNS["bridge"] = SHORT_RUNS["mix_lora"]


def short_runs(method: str) -> list[dict]:
    """Jobs of the trials of a method on the pretrained model, all on one tuning seed."""
    steps = {"steps": "20"}
    return [dict(method=method, flags=f | steps, seed=TUNING_SEEDS[0], kind="tuning") for f in SHORT_RUNS[method]]


def pretrained_cells(preset: str) -> list[Cell]:
    """The pretrained model, each method with the settings of its best short run."""
    if preset != "smollm2":
        return []
    cells = []
    score = {key(run): trained(run, preset) for run in records(preset)}
    for label, changed in PRETRAINED.items():
        jobs = short_runs(method_of(label))
        best = max(jobs, key=lambda job: score.get(key(job), 0.0))  # the first without trials: --tune makes them
        flags = {name: value for name, value in best["flags"].items() if name != "steps"}
        cells.append(Cell(label, method_of(label), flags | changed, kind="without_w"))
    return cells


# ---------------------------------------------------------------------------------------------------------------------
# Columns: numbers of one run


def trained_groups(accuracies: dict[str, float], preset: str) -> list[str]:
    """The groups of an evaluation that training has."""
    return [g for g in accuracies if g != "average" and g not in PRESETS[preset].out_of_distribution]


def percent(accuracies: dict[str, float], preset: str) -> float:
    """The mean accuracy on the groups that training has."""
    groups = trained_groups(accuracies, preset)
    return 100 * sum(accuracies[g] for g in groups) / len(groups)


def trained(run: dict, preset: str) -> float:
    """The endpoint: the policy's accuracy in percent on the groups that training has, mean of the last evaluations."""
    evaluations = [e for e in run["evals"] if e["step"] > 0][-LAST:]
    return sum(percent(e["policy"], preset) for e in evaluations) / len(evaluations)


def trained_at(run: dict, preset: str, at: float) -> float:
    """The policy's accuracy in percent on the groups that training has, at a fraction of the steps."""
    step = at * run["evals"][-1]["step"]
    nearest = min(run["evals"], key=lambda evaluation: abs(evaluation["step"] - step))
    return percent(nearest["policy"], preset)


def out_of_distribution(run: dict, preset: str) -> float | None:
    """The policy's accuracy in percent on the groups that training lacks, if the task has such groups."""
    groups = PRESETS[preset].out_of_distribution
    if not groups:
        return None
    return 100 * sum(run["evals"][-1]["policy"][g] for g in groups) / len(groups)


def shadow_end(run: dict, preset: str) -> float | None:
    """The shadow's accuracy in percent at the end."""
    shadow = run["evals"][-1].get("shadow")
    return None if shadow is None else percent(shadow, preset)


def curve(run: dict, name: str) -> list[float]:
    return [value for value in run["curves"].get(name, []) if value is not None]


def dip(run: dict, preset: str) -> float | None:
    """How far the reward falls below its first value, at its lowest: points."""
    reward = curve(run, "reward")
    return 100 * (reward[0] - min(reward)) if reward else None


def mean_of(name: str, part: slice, run: dict, preset: str) -> float | None:
    """The mean of a part of a stored curve."""
    values = curve(run, name)[part]
    return sum(values) / len(values) if values else None


def passed(run: dict, preset: str, k: int) -> float | None:
    """pass@k in percent on the trained groups, of 16 samples at temperature 1."""
    if not run["probes"] or "right" not in run["probes"][-1]:
        return None
    policy = run["evals"][-1]["policy"]
    names = sorted(policy.keys() - {"average"})
    right_of_group = dict(zip(names, run["probes"][-1]["right"], strict=True))  # right samples of each problem
    means = []
    for name in trained_groups(policy, preset):
        verdicts = np.array([[1] * right + [0] * (16 - right) for right in right_of_group[name]])
        means.append(pass_at_k(verdicts, k).mean())
    return 100 * float(np.mean(means))


def change_by_w(run: dict, preset: str, base: str) -> float:
    """What w's updates between two evaluations did to the reward of π(base, w), summed over the run: points."""
    return 100 * sum(p[f"{base},w"] - p[f"{base},w_before"] for p in run["probes"])


def gain_by_w(run: dict, preset: str) -> float:
    """What w's updates did to the measured gain J_RL(θ,w) − J_RL(θ̂,w), summed over the run: points."""
    return change_by_w(run, preset, "theta") - change_by_w(run, preset, "theta_hat")


def measured_gain(run: dict, preset: str) -> float:
    """J_RL(θ,w) − J_RL(θ̂,w) at the end, each on samples of its own: points."""
    return sampled_reward(run, preset, "theta", "w") - sampled_reward(run, preset, "theta_hat", "w")


def logged_gain(run: dict, preset: str) -> float:
    """The metric cooperative_gain over the last steps: points."""
    return 100 * mean_of("cooperative_gain", slice(-2, None), run, preset)


def share_taken(run: dict, preset: str, name: str) -> float | None:
    """Percent of the demonstrations of one kind that SFT took, over the whole run."""
    shares = [p[name] for p in run["probes"] if name in p]
    return 100 * sum(shares) / len(shares) if shares else None


def last_probe(run: dict, preset: str, name: str) -> float | None:
    """A number of the last probe."""
    return run["probes"][-1].get(name) if run["probes"] else None


def without_w(run: dict, preset: str, base: str) -> float | None:
    """The accuracy of θ or of θ̂ without w at the end: percent."""
    fraction = last_probe(run, preset, f"{base} without w")
    return None if fraction is None else 100 * fraction


def sft_steps(run: dict, preset: str) -> float:
    """The steps of a cold start: those that the rule chose, or else those of the settings."""
    chosen = last_probe(run, preset, "sft steps")
    return float(run["flags"]["sft-steps"]) if chosen is None else chosen


def sampled_reward(run: dict, preset: str, base: str, adapter: str) -> float:
    """The reward of π(base, adapter) at the end: points."""
    return 100 * run["probes"][-1][f"{base},{adapter}"]


def shadow_s_share(run: dict, preset: str) -> float | None:
    """‖∇_w J_RL(θ̂,w)‖ / ‖∇_w J_RL(θ,w)‖ of the means over the last two thirds of the steps."""
    last = slice(len(curve(run, "w_norm_policy")) // 3, None)
    policy = mean_of("w_norm_policy", last, run, preset)
    return mean_of("w_norm_shadow", last, run, preset) / policy if policy else None


def cosine(run: dict, preset: str) -> float | None:
    """The cosine between w's gradient of eq. (11) and mix_lora's, over the last two thirds of the steps."""
    last = slice(len(curve(run, "w_cosine")) // 3, None)
    return mean_of("w_cosine", last, run, preset)


ACCURACY = {"trained": trained, "pass@1": partial(passed, k=1), "out of distribution": out_of_distribution}
COST = {
    "seconds per step": lambda run, preset: run["step_seconds"],
    "peak MiB": lambda run, preset: run["peak_mib"],
}
SWITCH = ACCURACY | {
    "steps of SFT": sft_steps,
}
TIME = ACCURACY | {"seconds of training": lambda run, preset: run["seconds"]}
EPOCHS = {
    "after 1/6 of the steps": partial(trained_at, at=1 / 6),
    "after 1/2 of the steps": partial(trained_at, at=1 / 2),
    "after 1 of the steps": partial(trained_at, at=1),
}
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
    "gain by w": gain_by_w,
    "gain": measured_gain,
    "logged gain, last steps": logged_gain,
    "J(θ,w)": partial(sampled_reward, base="theta", adapter="w"),
    "J(θ,0)": partial(sampled_reward, base="theta", adapter="none"),
    "J(θ̂,w)": partial(sampled_reward, base="theta_hat", adapter="w"),
    "J(θ̂,0)": partial(sampled_reward, base="theta_hat", adapter="none"),
}
INNER = {
    "trained": trained,
    "the shadow": shadow_end,
    "‖∇_w J(θ̂,w)‖ / ‖∇_w J(θ,w)‖": shadow_s_share,
    "cosine to mix_lora's gradient": cosine,
}
SELECTION = {
    "trained": trained,
    "useful taken, %": partial(share_taken, name="useful taken"),
    "useless taken, %": partial(share_taken, name="useless taken"),
}
SWAPPED_COLUMNS = {
    "trained": trained,
    "mean ω, useful": partial(last_probe, name="weight useful"),
    "mean ω, useless": partial(last_probe, name="weight useless"),
}
PRETRAINED: dict[str, dict[str, str]] = {  # rows of the table pretrained: flags besides those of the trials
    "sft_rl": {},
    "mix": {},
    "mix_lora": {},
    "bridge": {},
    "bridge, own rollouts": {"shadow-rollouts": "own"},
}
AUTHORS = "two bad annotators"
FAULTS = {  # what is wrong with the useless demonstrations: flags of bridge.py, filters, η by runs on two tuning seeds
    "wrong answers": ({}, ("likely",), "10"),
    "a step left out": ({"task": "bench/variants.py:left_out_50"}, ("likely",), "10"),
    AUTHORS: ({"task": "bench/variants.py:sources"}, ("likely", "likely_sources"), "3"),
    "wrong answers, 75 %": ({"task": "bench/variants.py:useless_75"}, ("likely",), "10"),  # η as at 50 %
    "a step left out, 75 %": ({"task": "bench/variants.py:left_out_75"}, ("likely",), "10"),
}
WITHOUT_AUTHORS = dict.fromkeys(PRESETS, ("wrong answers", "a step left out")) | {"logic": ("wrong answers",)}
WITHOUT_W = {
    "at the end": partial(trained_at, at=1),
    "halfway": partial(trained_at, at=0.5),
    "the shadow": shadow_end,
    "θ without w": partial(without_w, base="theta"),
    "θ̂ without w": partial(without_w, base="theta_hat"),
    "minutes of training": lambda run, preset: run["seconds"] / 60,
    "peak GiB": lambda run, preset: run["peak_mib"] / 1024,
}
EQUAL_TIME = {"chains": {"rl": "585", "mix": "206", "sft_rl": "327"}}  # by the table fair's seconds, seeds 15 to 19
NOISE = ("clean", "noise_10", "noise_20")
SUPERVISION = ("useless_0", "useless_20", "clean", "useless_60", "demonstrations_16", "demonstrations_1024")

noise_cells = partial(
    variant_cells, flag="reward", names=NOISE, methods=("rl", "mix", "mix_lora", "bridge"), against="rl"
)
beta_cells = partial(sweep_cells, flag="beta", values=("2e-4", "5e-4", "2e-3", "8e-3"), default="2e-3")


class Table(NamedTuple):
    caption: str  # what bench/results/tables.md says of it
    cells: Callable[[str], list[Cell]]
    columns: dict[str, Callable[[dict, str], float | None]]
    seeds: int = len(SEEDS)  # that its command makes; a table shows every seed that has a run
    workers: int | None = None  # runs at a time, where it matters
    fresh: bool = False  # its runs have the seeds FRESH

    def seeds_of(self, preset: str) -> tuple[int, ...]:
        """The seeds that the table shows."""
        return FRESH if self.fresh else PRESETS[preset].seeds


TABLES = {
    "main": Table("The final accuracy, each method at its own tuned settings.", main_cells, ACCURACY),
    "epochs": Table("The accuracy on trained groups in the course of training.", main_cells, EPOCHS),
    "cost": Table("Time and memory of 50 steps, one run at a time, nothing else running.", cost_cells, COST, 5, 1),
    "dynamics": Table(
        "How far the sampled reward falls below its first value (points), response length, entropy in nats.",
        main_cells,
        DYNAMICS,
    ),
    "pass_at_k": Table("pass@k of 16 samples at temperature 1, on trained groups.", main_cells, PASS),
    "shadow": Table(
        "Both ends between which every shadow lies, at equal rates and λ = 0.5, and other estimates of θ̂.",
        shadow_cells,
        GAIN,
        5,
    ),
    "effect": Table(
        "Points of sampled reward on all groups. The columns “by w” sum the changes by w's updates between two "
        "evaluations, at a fixed θ or θ̂.",
        effect_cells,
        EFFECT,
        5,
    ),
    "order": Table("The other reading of Algorithm 2: w moves after θ and θ̂.", order_cells, GAIN, 5),
    "selection": Table(
        "SFT takes only the demonstrations that a small step of w, along the gradient of the gain, makes more likely.",
        selection_cells,
        SELECTION,
        5,
    ),
    "inner": Table(
        "θ̂ takes more steps of RL per iteration, on rollouts of its own; λ = 0.5. The two last columns are means over "
        "the last two thirds of the steps.",
        inner_cells,
        INNER,
    ),
    "disjoint": Table(
        "w adapts the projections of attention, θ and θ̂ have all other weights; λ = 0.5.", disjoint_cells, GAIN
    ),
    "swapped": Table(
        "The levels swapped: `weighed` learns a weight ω of each source of demonstrations. The others are `mix` with "
        "all demonstrations, with the `useful` ones, and with those that the base model finds `likely`; λ = 0.5.",
        swapped_cells,
        SWAPPED_COLUMNS,
    ),
    "swapped_lambda": Table(
        "The table swapped at other λ, with the same α and η.", swapped_lambda_cells, SWAPPED_COLUMNS, 5
    ),
    "swapped_75": Table("The table swapped with 75 % useless ones.", swapped_75_cells, SWAPPED_COLUMNS, 5),
    "annotators": Table(
        "`weighed` with two bad annotators of four, without a trained shadow, and beside other methods.",
        annotator_cells,
        SWAPPED_COLUMNS,
    ),
    "fresh": Table(
        "The rows of the primary contrasts again, on ten seeds on which no choice was made.",
        fresh_cells,
        ACCURACY,
        fresh=True,
    ),
    "fair": Table(
        "Equal trials for every row, by halving (bench/fair.py), and ten seeds on which no choice was made.",
        fair_cells,
        ACCURACY,
        fresh=True,
    ),
    "switch": Table("When RL begins in `sft_rl`: arXiv 2512.11470.", switch_cells, SWITCH, fresh=True),
    "time": Table("The table fair at equal time of training: as `bridge` takes.", time_cells, TIME, fresh=True),
    "bases": Table("Two other base models of chains, by the same recipe.", base_cells, ACCURACY, 5),
    "threads": Table(
        "What rounding changes: the same runs with one thread and with two.", thread_cells, ACCURACY, 5, 1, fresh=True
    ),
    "pretrained": Table(
        "SmolLM2-135M-Instruct on the task of legs, 300 evaluation problems, 60 steps with RL.",
        pretrained_cells,
        WITHOUT_W,
        workers=1,
    ),
    "beta": Table("The learning rate β of w, at λ = 0.5.", beta_cells, GAIN, 5),
    "lambda": Table("λ, and `mix` with the same update of θ.", lambda_cells, ACCURACY, 5),
    "lora": Table("Rank and alpha of the adapter, at λ = 0.5.", lora_cells, ACCURACY, 5),
    "noise": Table("A reward that is flipped with probability 0, 0.1 or 0.2.", noise_cells, ACCURACY, 5),
    "supervision": Table(
        "More, fewer, better and worse demonstrations. `useless_20` has 20 % useless ones among 256, `clean` has the "
        "50 % of the other tables; `demonstrations_16` has 16, all right.",
        supervision_cells,
        ACCURACY,
        5,
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# Runs


def results(preset: str) -> Path:
    return ROOT / "bench" / "results" / f"{preset}.jsonl.gz"


@cache
def records(preset: str) -> list[dict]:
    """Every finished run of a preset."""
    if not results(preset).exists():
        return []
    with gzip.open(results(preset), "rt") as file:
        return [json.loads(line) for line in file]


def key(run: dict) -> str:
    return json.dumps([run[name] for name in ("method", "flags", "seed", "kind")], sort_keys=True)


def runs_of(preset: str, c: Cell, seeds: tuple[int, ...]) -> dict[int, dict]:
    """{seed: record} of the finished runs of a cell."""
    cell_of = lambda run: (run["method"], run["flags"], run["kind"])  # noqa: E731
    finished = {r["seed"]: r for r in records(preset) if cell_of(r) == (c.method, c.flags, c.kind)}
    return {seed: finished[seed] for seed in seeds if seed in finished}


def blocks(values: list[float | None]) -> list[float | None]:
    """The means of BLOCK consecutive values, to four digits; None where the method lacks the metric."""
    means = []
    for i in range(0, len(values), BLOCK):
        part = [v for v in values[i : i + BLOCK] if v is not None]
        means.append(float(f"{sum(part) / len(part):.4g}") if part else None)
    return means


def flags_of(preset: str, job: dict) -> list[str]:
    """The command line of a run. Idle settings are left out, since bridge.py refuses them."""
    flags = PRESETS[preset].flags | {"method": job["method"], "seed": str(job["seed"])} | job["flags"]
    if job["method"] != "sft_rl":
        flags.pop("sft-steps", None)
    if not METHODS[job["method"]].rl:
        flags.pop("prompts-per-step", None)
    if KINDS[job["kind"]] is None or job["kind"].endswith(" trial"):
        flags["eval-every"] = "100000"  # at the end only
    words = [f"--{name}" if value == ON else f"--{name}={value}" for name, value in flags.items()]
    return [*words, "--save-every=100000", "--keep-rollouts=none"]


def start(preset: str, job: dict, folder: str) -> int:
    """Starts one run of bridge.py in a forked process, which has the imports already; returns its process id."""
    words = flags_of(preset, job)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    with open(f"{folder}/output", "w", buffering=1) as output:
        try:
            sys.stdout = output
            sys.stderr = output
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            bridge.plot.draw = bridge.report.write = lambda *_: None  # no figures of single runs
            change = KINDS[job["kind"]]
            if change is not None:
                change()
            bridge.main([*words, f"--out={folder}/run"])
            status = 0
        except BaseException:  # also SystemExit, which has the message of a wrong setting
            traceback.print_exc()
        finally:
            output.flush()
            os._exit(status)  # the parent's files and exit handlers are not this process's


def record_of(job: dict, folder: str, peak_kib: int, source: str) -> dict:
    """The record of a finished run: accuracies, curves, seconds of training without evaluation."""
    run = Path(folder, "run")
    metrics = read_log(run / "metrics.jsonl")
    evals = read_log(run / "evals.jsonl")
    probes = []
    if (run / "probe.jsonl").exists():
        probes = [record for _, record in read_lines(run / "probe.jsonl")]
    s = settings_of(run / "config.json")
    seconds = []  # of each step
    for m in metrics:
        seconds.append(sum(v for phase, v in m["seconds"].items() if phase not in ("evaluate", "save")))
    curves = {name: blocks([m[name] for m in metrics]) for name in METRICS if metrics[-1].get(name) is not None}
    curves["seconds"] = blocks(seconds)
    mean_tokens = sum(m["response_tokens"] or 0 for m in metrics)
    return job | dict(
        evals=evals,
        probes=probes,
        curves=curves,
        seconds=round(sum(seconds), 2),
        step_seconds=round(sum(seconds) / len(seconds), 4),
        sampled_tokens=round(s.prompts_per_step * s.group_size * mean_tokens),
        peak_mib=peak_kib // 1024,
        sources=source,
    )


def make(preset: str, jobs: list[dict], workers: int) -> None:
    """Makes the runs that the results lack and appends each as it ends. Raises RuntimeError if one fails."""
    done = {key(r) for r in records(preset)}
    different = {key(job): job for job in jobs}
    todo = [job for name, job in different.items() if name not in done]
    count = len(todo)
    made = 0
    running = {}  # process id: job, folder
    source = sources()  # of the code that was imported; a later change in the folder changes no run
    with tempfile.TemporaryDirectory() as scratch:
        while todo or running:
            while todo and len(running) < workers:
                folder = tempfile.mkdtemp(dir=scratch)
                job = todo.pop(0)
                running[start(preset, job, folder)] = job, folder
            pid, status, usage = os.wait4(-1, 0)
            job, folder = running.pop(pid)
            flags = [f"{name}={value}" for name, value in job["flags"].items()]
            name = " ".join([job["method"], *flags, f"seed={job['seed']}"])
            if status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
                raise RuntimeError(f"{name} fails:\n{Path(folder, 'output').read_text()[-2000:]}")
            record = record_of(job, folder, usage.ru_maxrss, source)
            made += 1
            with gzip.open(results(preset), "at") as file:
                file.write(json.dumps(record) + "\n")
            print(f"[{made}/{count}] {name}: {trained(record, preset):.1f} %, {record['seconds']:.0f} s", flush=True)
            shutil.rmtree(folder)
    records.cache_clear()


def tune(preset: str, rows: list[str], workers: int) -> None:
    """All trials on one tuning seed, then the best two of each row on the others."""
    first, *others = TUNING_SEEDS
    trial = partial(dict, kind="tuning")
    jobs = [trial(method=method_of(row), flags=flags, seed=first) for row in rows for flags in TRIALS[row]]
    make(preset, jobs, workers)
    finals = []
    for row in rows:
        of_first = [r for r in trials(preset, row) if r["seed"] == first]
        best = sorted(of_first, key=lambda r: -trained(r, preset))[:2]
        finals += [trial(method=r["method"], flags=r["flags"], seed=seed) for r in best for seed in others]
    make(preset, finals, workers)
    for row in rows:
        print(row, tuned(preset, row))


# ---------------------------------------------------------------------------------------------------------------------
# Tables


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
    return float(mpmath.findroot(tail, (0.3, 13), solver="bisect", tol=1e-14, maxsteps=200))


def with_interval(values: list[float], sign: str = "") -> str:
    """The mean and half of its interval. One or two values give no interval: they are printed themselves."""
    mean = sum(values) / len(values)
    if len(values) < 3:
        digits = 1 if max(map(abs, values)) >= 10 else 2
        return ", ".join(f"{value:{sign}.{digits}f}" for value in values)
    digits = 1 if abs(mean) >= 10 or sign else 2
    return f"{mean:{sign}.{digits}f} ± {half_width(values):.{digits}f}"


def table(preset: str, name: str) -> str:
    """Markdown: a row for each cell with runs, means with intervals, and the paired difference of the first column.

    A row has every finished run of its cell, also those that were made for another table, and is left out if it has
    too few. A difference is of the seeds that both rows have.
    """
    spec = TABLES[name]
    cells = spec.cells(preset)
    seeds = spec.seeds_of(preset)
    fewest = min(FEWEST, len(seeds))
    runs = {c.label: runs_of(preset, c, seeds) for c in cells}
    lines = [f"| | {' | '.join(spec.columns)} | difference | to | seeds |", "|---" * (len(spec.columns) + 4) + "|"]
    for c in cells:
        if len(runs[c.label]) >= fewest:
            other = {} if c.against == c.label else runs[c.against]
            lines.append(row_of(preset, spec, c, runs[c.label], other))
    return "\n".join(lines)


def row_of(preset: str, spec: Table, c: Cell, runs: dict[int, dict], other: dict[int, dict]) -> str:
    """One line of a table. runs, other: {seed: record} of the cell and of the cell that it is compared with."""
    texts = [c.label]
    for column in spec.columns.values():
        known = [column(run, preset) for run in runs.values()]
        values = [value for value in known if value is not None]
        texts.append(with_interval(values) if values else "–")
    first = next(iter(spec.columns.values()))
    paired = [first(run, preset) - first(other[seed], preset) for seed, run in runs.items() if seed in other]
    if not paired:
        texts += ["–", "", str(len(runs))]
    elif len(paired) < len(runs):
        texts += [with_interval(paired, "+"), c.against, f"{len(runs)}, {len(paired)} of them paired"]
    else:
        texts += [with_interval(paired, "+"), c.against, str(len(runs))]
    return f"| {' | '.join(texts)} |"


PAGE = """# Tables of the study

`python bench/compare.py --tables > bench/results/tables.md` writes this page, of finished runs only.
[docs/results.md](../../docs/results.md) says what the numbers mean. A number is a mean over seeds with its 95 %
interval (Student's t). The column "difference" is the first column minus that of the row named under "to", paired by
the seeds that both rows have. "trained", in percent, is the mean of the last three greedy evaluations on problems like
those of training; "pass@1" is of 16 samples at temperature 1 at the end. Each method has the settings that won its
trials. The row `bridge, λ 0.5` and the tables that change one setting of `bridge` have the paper's λ."""


def page() -> str:
    """Markdown: every table of which each row has enough finished runs, with the command that makes and prints it."""
    parts = [PAGE]
    for preset in PRESETS:
        for name, spec in TABLES.items():
            seeds = spec.seeds_of(preset)
            counts = [len(runs_of(preset, c, seeds)) for c in spec.cells(preset)]
            if counts and min(counts) >= min(FEWEST, len(seeds)):
                command = f"python bench/compare.py --preset {preset} --table {name}"
                parts.append(f"## {preset}: {name}\n\n{spec.caption}\n\n```bash\n{command} --no-runs\n```")
                parts.append(table(preset, name))
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def spent(run: dict, total: str, name: str, step: int) -> float:
    """The part of run[total] until a step, in proportion to a stored curve."""
    values = [value or 0.0 for value in run["curves"][name]]
    return run[total] * sum(values[: step // BLOCK]) / sum(values)


def band(ax, xs: list[float], series: list[list[float]], **style) -> None:
    """The mean over seeds of curves of equal length, and its 95 % interval."""
    columns = [list(column) for column in zip(*series, strict=True)]
    means = [sum(column) / len(column) for column in columns]
    ax.plot(xs, means, **style)
    if len(series) > 1:
        halves = [half_width(column) for column in columns]
        low = [mean - half for mean, half in zip(means, halves, strict=True)]
        high = [mean + half for mean, half in zip(means, halves, strict=True)]
        ax.fill_between(xs, low, high, color=style["color"], alpha=0.12, lw=0)


def draw(preset: str, out: Path) -> None:
    """Accuracy over steps, sampled tokens and seconds; response length, cooperative gain, the shadow's accuracy."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    titles = (
        ("accuracy on groups of the training, %", "step"),
        ("accuracy on groups of the training, %", "sampled tokens, thousands"),
        ("accuracy on groups of the training, %", "seconds of training"),
        ("response length, tokens", "step"),
        ("logged cooperative gain, reward", "step"),
        ("accuracy of the shadow (θ̂, w), and of rl, %", "step"),
    )
    for ax, (title, label) in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    cells = pretrained_cells(preset)
    if not cells:
        cells = [*main_cells(preset), cell(preset, "bridge, own rollouts", HALF, shadow_rollouts="own")]
    colors = matplotlib.colormaps["tab20"].colors
    for c, color in zip(cells, (*colors[::2], *colors[1::2]), strict=False):
        runs = list(runs_of(preset, c, PRESETS[preset].seeds).values())
        if runs:
            style = dict(color="black", lw=2.2) if c.label == "bridge" else dict(color=color, lw=1.2)
            draw_curves(axes, preset, c.method, runs, style | dict(label=c.label))
    axes[-1].set_ylim(-2, 102)  # a shadow may stay at 0
    axes[0].legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(out, dpi=120)


def draw_curves(axes: list, preset: str, method: str, runs: list[dict], style: dict) -> None:
    """The curves of one row of the table main in all six axes of `draw`."""
    over_steps, over_tokens, over_seconds, length, gain, shadow = axes
    steps = [e["step"] for e in runs[0]["evals"]]
    accuracy = [[percent(e["policy"], preset) for e in r["evals"]] for r in runs]
    band(over_steps, steps, accuracy, **style)

    def mean_spent(total: str, name: str, step: int) -> float:
        return sum(spent(r, total, name, step) for r in runs) / len(runs)

    if runs[0]["sampled_tokens"]:
        thousands = [mean_spent("sampled_tokens", "response_tokens", step) / 1000 for step in steps]
        band(over_tokens, thousands, accuracy, **style)
    band(over_seconds, [mean_spent("seconds", "seconds", step) for step in steps], accuracy, **style)
    for ax, name in ((length, "response_tokens"), (gain, "cooperative_gain")):
        stored = runs[0]["curves"].get(name, [])
        middle = [BLOCK * i + BLOCK / 2 for i, value in enumerate(stored) if value is not None]
        if middle:
            band(ax, middle, [curve(r, name) for r in runs], **style)
    if "shadow" in runs[0]["evals"][-1]:
        band(shadow, steps, [[percent(e["shadow"], preset) for e in r["evals"]] for r in runs], **style)
    if method == "rl":
        band(shadow, steps, accuracy, **style)


def draw_finals(out: Path) -> None:
    """For every preset with ten seeds: the final accuracy of each row of the table main, and its 95 % interval."""
    from matplotlib.figure import Figure

    presets = [preset for preset, spec in PRESETS.items() if spec.seeds == SEEDS and records(preset)]
    figure = Figure(figsize=(4.5 * len(presets), 3.6), layout="constrained")
    for ax, preset in zip(figure.subplots(1, len(presets), squeeze=False).flat, presets, strict=True):
        scores = {}
        for c in main_cells(preset):
            runs = runs_of(preset, c, SEEDS)
            if runs:
                scores[c.label] = [trained(run, preset) for run in runs.values()]
        ordered = sorted(scores, key=lambda label: sum(scores[label]) / len(scores[label]))
        for y, label in enumerate(ordered):
            mean = sum(scores[label]) / len(scores[label])
            half = half_width(scores[label])
            color = "tab:red" if label == "bridge" else "tab:blue"
            ax.errorbar(mean, y, xerr=half, fmt="o", color=color, capsize=3)
            if label == "bridge":
                ax.axvspan(mean - half, mean + half, color=color, alpha=0.1, lw=0)
        ax.set_yticks(range(len(ordered)), ordered)
        ax.set(title=f"{preset}: accuracy, %, ten seeds", xlim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)


def draw_weights(out: Path) -> None:
    """The mean ω of useful and of useless demonstrations over the steps, for each fault of the table swapped."""
    from matplotlib.figure import Figure

    cases = []
    for preset in ("chains", "logic"):
        for c in swapped_cells(preset):
            runs = list(runs_of(preset, c, PRESETS[preset].seeds).values())
            if c.label.endswith(": weighed") and runs:
                cases.append((f"{preset}, {c.label.removesuffix(': weighed')}", runs))
    if not cases:
        raise SystemExit("no run of the method weighed is finished: make the table swapped first")
    figure = Figure(figsize=(3.6 * len(cases), 3.2), layout="constrained")
    for ax, (title, runs) in zip(figure.subplots(1, len(cases), squeeze=False, sharey=True).flat, cases, strict=True):
        steps = [p["step"] for p in runs[0]["probes"]]
        for kind, color in (("useful", "tab:blue"), ("useless", "tab:red")):
            weights = [[p[f"weight {kind}"] for p in run["probes"]] for run in runs]
            band(ax, steps, weights, color=color, label=kind)
        ax.set(title=title, xlabel="step", ylim=(0, 1.03))
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("mean ω of the demonstrations")
    figure.axes[0].legend(frameon=False)
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="chains")
    parser.add_argument("--table", choices=TABLES, help="make its runs, print it")
    parser.add_argument("--tables", action="store_true", help="print every table whose runs are finished; make none")
    parser.add_argument("--tune", action="store_true", help="make the trials of every method first")
    parser.add_argument("--tune-fairly", action="store_true", help="make the trials of bench/fair.py")
    parser.add_argument("--rows", default="", help="only these of the table main or of bench/fair.py, separated by ;")
    parser.add_argument("--figure", type=Path, help="draw the runs of the table main")
    parser.add_argument("--finals", type=Path, help="draw the final accuracies of the table main, of all presets")
    parser.add_argument("--weights", type=Path, help="draw ω over the steps, of the table swapped")
    parser.add_argument("--model", help="folder of the pretrained model of the preset smollm2")
    parser.add_argument("--no-runs", action="store_true", help="of finished runs only")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    if args.model:
        PRESETS[args.preset].flags["model"] = args.model
    known = TRIALS
    if args.tune_fairly:
        known = fair.ROWS
    elif args.table == "fair":
        known = [c.label for c in fair_cells(args.preset)]
    rows = args.rows.split(";") if args.rows else list(known)
    unknown = [row for row in rows if row not in known]
    if unknown:
        parser.error(f"--rows: no {unknown[0]!r}; there are {', '.join(known)}")
    if args.tune_fairly:
        tune_fairly(args.preset, rows, args.workers)
    if args.tune and args.preset == "smollm2":
        make(args.preset, [job for row in PRETRAINED for job in short_runs(method_of(row))], args.workers)
    elif args.tune:
        tune(args.preset, rows, args.workers)
    if args.table:
        spec = TABLES[args.table]
        if not args.no_runs:
            cells = [c for c in spec.cells(args.preset) if not args.rows or c.label in rows]
            seeds = spec.seeds_of(args.preset)[: spec.seeds]
            make(args.preset, [c.job(seed) for seed in seeds for c in cells], spec.workers or args.workers)
        print(table(args.preset, args.table))
    if args.tables:
        print(page())
    if args.figure:
        draw(args.preset, args.figure)
    if args.finals:
        draw_finals(args.finals)
    if args.weights:
        draw_weights(args.weights)


if __name__ == "__main__":
    main()
