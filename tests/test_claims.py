"""docs/results.md: its tables are those that are printed, and a second computation from the raw rows agrees."""

import gzip
import json
import re
import sys
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import claims  # noqa: E402

PAGE = (ROOT / "docs/results.md").read_text()
OUT_OF_DISTRIBUTION = {"chains": ("n=8", "n=9"), "logic": ()}
STUDENT = {4: 2.776445, 9: 2.262157}  # 97.5 % quantiles by degrees of freedom
FIRST = range(10)  # seeds of the table main
FRESH = range(10, 20)


@cache
def rows(preset):
    with gzip.open(ROOT / f"bench/results/{preset}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def groups(evaluation, preset):
    return [g for g in evaluation if g != "average" and g not in OUT_OF_DISTRIBUTION[preset]]


def endpoint(run, preset):
    """The mean over trained groups, of the last three evaluations after step 0."""
    last = [e["policy"] for e in run["evals"] if e["step"] > 0][-3:]
    return mean(100 * mean(e[g] for g in groups(e, preset)) for e in last)


def last(run, preset):
    """The same at the last evaluation alone."""
    policy = run["evals"][-1]["policy"]
    return 100 * mean(policy[g] for g in groups(policy, preset))


def pass_at(k, run, preset):
    """1 − C(n−c, k)/C(n, k) of 16 samples, as a product, by problem and then by group."""
    policy = run["evals"][-1]["policy"]
    right = dict(zip(sorted(set(policy) - {"average"}), run["probes"][-1]["right"], strict=True))

    def of_problem(c):
        return 1.0 if 16 - c < k else 1 - np.prod([1 - k / i for i in range(16 - c + 1, 17)])

    return 100 * mean(mean(of_problem(c) for c in right[g]) for g in groups(policy, preset))


NUMBERS = {
    "": endpoint,
    "pass@1": lambda run, preset: pass_at(1, run, preset),
    "pass@16": lambda run, preset: pass_at(16, run, preset),
}
IS_TRIAL = {  # of a row, where the trials of its method are of several rows
    "bridge": lambda flags: flags["beta"] == "2e-3",
    "bridge, λ 0.5": lambda flags: "lam" not in flags,
    "chord": lambda flags: "chord-phi" not in flags,
    "chord, φ": lambda flags: "chord-phi" in flags,
}


def winner(preset, row):
    """The settings of the best mean among those with all three tuning seeds."""
    scores = {}
    for run in rows(preset):
        wanted = IS_TRIAL.get(row, lambda flags: True)
        if run["kind"] == "tuning" and run["method"] == row.split(",")[0] and wanted(run["flags"]):
            scores.setdefault(json.dumps(run["flags"]), []).append(endpoint(run, preset))
    complete = {flags: mean(values) for flags, values in scores.items() if len(values) == 3}
    return json.loads(max(complete, key=complete.get))


def settings_of(preset, label):
    """(method, flags) of a row by the name that the tables give it."""
    half = winner(preset, "bridge, λ 0.5")
    method, *changes = label.split(", ")
    if label == "w on SFT + RL (mix_lora)":
        return "mix_lora", half
    if label in ("bridge, rank 8, alpha 16", "bridge, lam 0.5"):
        return "bridge", half
    if changes and changes[0].startswith("rank"):
        rank, alpha = (change.split()[1] for change in changes)
        return "bridge", half | {"lora-rank": rank, "lora-alpha": alpha}
    if changes and changes[0].startswith("lam "):
        return "bridge", half | {"lam": changes[0].split()[1]}
    if changes and "_" in changes[0]:
        flag = "reward" if "noise" in changes[0] else "task"
        return method, winner(preset, method) | {flag: f"bench/variants.py:{changes[0]}"}
    return method, winner(preset, label)


def values(preset, label, number=endpoint, seeds=FIRST):
    method, flags = settings_of(preset, label)
    chosen = [r for r in rows(preset) if (r["method"], r["flags"], r["kind"]) == (method, flags, "final")]
    return {r["seed"]: number(r, preset) for r in chosen if r["seed"] in seeds}


def difference(a, b):
    d = [a[seed] - b[seed] for seed in sorted(set(a) & set(b))]
    assert len(d) in (5, 10)
    return d, mean(d), STUDENT[len(d) - 1] * stdev(d) / len(d) ** 0.5


def printed(title):
    """The rows of the table of the page that has this title."""
    (body,) = re.findall(rf"^\| {re.escape(title)}.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [line.strip("| ").split(" | ") for line in body.splitlines()]


def test_the_tables_of_the_page_are_those_that_claims_py_prints():
    assert claims.primary_table() in PAGE
    assert claims.claims_table() in PAGE
    assert claims.equal_table() in PAGE


def test_every_claim_s_difference_lead_and_verdict_follow_from_the_raw_rows():
    contrasts = []
    for claim, contrast, leads, *of_tasks in printed("claim"):
        for preset, text, excluded in zip(("chains", "logic"), of_tasks[::2], of_tasks[1::2], strict=True):
            if text != "–":
                contrasts.append((claim, preset, contrast, *text.split(", "), leads, excluded))
    assert len(contrasts) >= 38
    corrected = {}
    for row in printed("task | bridge minus"):
        for seeds, column in ((FIRST, 3), (FRESH, 5)):
            corrected[f"bridge − {row[1][1:-1]}", row[0], seeds] = float(row[column])
    for claim, preset, contrast, text, verdict, leads, excluded in contrasts:
        names, _, column = re.match(r"(.*?)(, (pass@\d+))?$", contrast).groups()
        seeds = FRESH if claim.endswith("on fresh seeds") else FIRST
        ours, other = (values(preset, label, NUMBERS[column or ""], seeds) for label in names.split(" − "))
        _, middle, half = difference(ours, other)
        assert text == f"{middle:+.1f} ± {half:.1f}", contrast
        if leads == "–":
            assert excluded == "–"
        else:
            above = [lead for lead in leads.split(", ") if float(lead) > middle + half]
            assert excluded == (", ".join(above) or "none")
        if claim in ("rank", "alpha", "λ from 0.3 to 0.7"):
            inside = max(abs(middle - half), abs(middle + half)) < 2
            outside = middle - half > 2 or middle + half < -2
            assert verdict == ("supported" if inside else "contradicted" if outside else "undecided"), contrast
        elif corrected.get((contrast, preset, seeds), 0) >= 0.05:
            assert verdict == "undecided", "a primary contrast needs Holm's p"
        else:
            above, below = middle - half > 0, middle + half < 0
            assert verdict == ("supported" if above else "contradicted" if below else "undecided"), contrast


def test_the_primary_contrasts_follow_from_the_raw_rows_of_both_sets_of_seeds():
    table = printed("task | bridge minus")
    assert [row[:2] for row in table] == [
        [p, f"`{o}`"] for p in ("chains", "logic") for o in ("mix_lora", "sft_rl", "rl")
    ]
    ps = {FIRST: [], FRESH: []}
    for preset, other, text, _, text_fresh, _, last_text, last_fresh in table:
        sets = (
            (FIRST, endpoint, text),
            (FRESH, endpoint, text_fresh),
            (FIRST, last, last_text),
            (FRESH, last, last_fresh),
        )
        for seeds, number, printed_text in sets:
            d, middle, half = difference(*(values(preset, r, number, seeds) for r in ("bridge", other.strip("`"))))
            assert len(d) == 10
            assert printed_text == f"{middle:+.1f} ± {half:.1f}"
            if number == endpoint:
                flips = [
                    abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in product((1, -1), repeat=10)
                ]
                ps[seeds].append(mean(total >= abs(sum(d)) - 1e-9 for total in flips))
    # Holm: the i-th smallest p times the number of tests that are left, never falling
    for column, of_set in ((3, ps[FIRST]), (5, ps[FRESH])):
        order = np.argsort(of_set, kind="stable")
        corrected = np.maximum.accumulate([min(1, (6 - rank) * of_set[i]) for rank, i in enumerate(order)])
        assert [table[i][column] for i in order] == [f"{p:.3f}" for p in corrected]


@pytest.mark.parametrize(
    ("p", "corrected"), [([0.01], [0.01]), ([0.04, 0.01, 0.03], [0.06, 0.03, 0.06]), ([0.9, 0.8], [1, 1])]
)
def test_holm_multiplies_the_smallest_p_most_and_never_reverses_their_order(p, corrected):
    assert claims.holm(p) == pytest.approx(corrected)


def test_the_sign_flip_p_of_normal_differences_is_uniform():
    draws = np.random.default_rng(0).normal(size=(400, 8))
    ps = np.array([claims.sign_flip(list(d)) for d in draws])
    assert (ps <= 0.05).mean() == pytest.approx(0.05, abs=0.025)
    assert (ps <= 0.5).mean() == pytest.approx(0.5, abs=0.06)


def test_the_iqm_is_the_mean_of_the_middle_half_and_improvement_counts_pairs():
    scores = np.array([[0.0, 1, 2, 3], [4, 5, 6, 100]])
    assert claims.iqm(scores) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert claims.improvement(scores, scores) == 0.5
    assert claims.improvement(scores + 1000, scores) == 1
    assert claims.improvement(np.array([[1.0, 3], [0, 0]]), np.array([[2.0, 2], [0, 1]])) == pytest.approx(
        (0.5 + 0.25) / 2
    )


def test_a_bootstrap_draw_keeps_the_number_of_runs_of_each_task():
    scores = np.array([[0.0] * 10, [1.0] * 10])
    draws = claims.resampled(scores, 0)
    assert draws.shape == (claims.DRAWS, 2, 10)
    assert (draws == scores).all(), "runs of one task never stand in for runs of the other"


TABLES = (ROOT / "bench/results/tables.md").read_text()


def table_of(preset, name):
    """{label: cells} of a table of bench/results/tables.md, and the titles of its columns."""
    (body,) = re.findall(rf"^## {preset}: {name}\n.*?\n(\| \|.*?)\n(?:\n|\Z)", TABLES, re.MULTILINE | re.DOTALL)
    head, _, *lines = body.splitlines()
    titles = [title.strip() for title in head.strip("|").split("|")][1:]
    table = {}
    for line in lines:
        label, *cells = line.strip("| ").split(" | ")
        table[label] = dict(zip(titles, cells, strict=True))
    return table


def shown(numbers, sign=""):
    """A mean and its interval as the tables print them."""
    middle, half = mean(numbers), STUDENT[len(numbers) - 1] * stdev(numbers) / len(numbers) ** 0.5
    digits = 1 if abs(middle) >= 10 or sign else 2
    return f"{middle:{sign}.{digits}f} ± {half:.{digits}f}"


@pytest.mark.parametrize("preset", ["chains", "logic"])
def test_the_main_table_follows_from_the_raw_rows(preset):
    table = table_of(preset, "main")
    assert len(table) == 14
    ours = values(preset, "bridge")
    for label, cells in table.items():
        accuracy = values(preset, label)
        assert cells["trained"] == shown(list(accuracy.values()))
        assert cells["pass@1"] == shown(list(values(preset, label, NUMBERS["pass@1"]).values()))
        if label != "bridge":
            assert cells["difference"] == shown([accuracy[seed] - ours[seed] for seed in accuracy], "+")


@pytest.mark.parametrize("preset", ["chains", "logic"])
def test_the_table_of_shadows_follows_from_the_raw_rows(preset):
    half = winner(preset, "bridge, λ 0.5")
    rows_of_table = {
        "bridge, λ 0.5": ("bridge", half), "w on SFT (no_meta)": ("no_meta", half),
        "w on SFT + RL (mix_lora)": ("mix_lora", half), "no w (mix)": ("mix", {"alpha": half["alpha"], "mu": "1"}),
        "bridge, own rollouts": ("bridge", half | {"shadow-rollouts": "own"}),
        "bridge, θ̂ = θ + one step": ("bridge", half | {"shadow-rollouts": "one_step"}),
        "bridge, shared, PPO's clip": ("bridge", half | {"shadow-ratio-cap": "0"}),
    }  # fmt: skip

    def of(label, number):
        method, flags = rows_of_table[label]
        chosen = [r for r in rows(preset) if (r["method"], r["flags"], r["kind"]) == (method, flags, "final")]
        return {r["seed"]: number(r, preset) for r in chosen if r["seed"] < 10}

    def shadow(run, preset):
        last = run["evals"][-1]["shadow"]
        return 100 * mean(last[g] for g in groups(last, preset))

    table = table_of(preset, "shadow")
    assert list(table) == list(rows_of_table)
    reference = of("bridge, λ 0.5", endpoint)
    for label, cells in table.items():
        accuracy = of(label, endpoint)
        assert cells["trained"] == shown(list(accuracy.values()))
        if label != "bridge, λ 0.5":
            assert cells["difference"] == shown([accuracy[s] - reference[s] for s in accuracy], "+")
        if rows_of_table[label][0] == "bridge":
            assert cells["the shadow"] == shown(list(of(label, shadow).values()))
            gain = of(label, lambda run, _: mean(run["curves"]["cooperative_gain"][-2:]))
            assert cells["logged gain, last steps"] == shown(list(gain.values()))


def test_both_tasks_together_follow_from_the_raw_rows():
    def scores(label):
        of_tasks = []
        for preset in ("chains", "logic"):
            method, flags = settings_of(preset, label)
            run = next(r for r in rows(preset) if (r["method"], r["flags"], r["kind"]) == (method, flags, "final"))
            start = run["evals"][0]["policy"]
            base = 100 * mean(start[g] for g in groups(start, preset))
            of_tasks.append([(x - base) / (100 - base) for x in values(preset, label).values()])
        return of_tasks

    ours = scores("bridge")
    lines = [line.strip("| ").split(" | ") for line in claims.both_table().splitlines()[2:]]
    assert len(lines) == 14
    for label, iqm, better in lines:
        theirs = scores(label)
        middle = sorted(x for of_task in theirs for x in of_task)[5:15]
        assert float(iqm.split()[0]) == pytest.approx(mean(middle), abs=0.00501)
        if label != "bridge":
            pairs = [mean((a > b) + (a == b) / 2 for a in ours[t] for b in theirs[t]) for t in (0, 1)]
            assert float(better.split()[0]) == pytest.approx(mean(pairs), abs=0.00501)
