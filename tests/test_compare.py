"""bench/compare.py: its statistics, its tables, its runs."""

import gzip
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import lines, rows, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import claims
import compare
import kinds
import measure
import variants
from measure import ROOT

import bridge
import grpo
import lora
import rewards
import rollout
from settings import METHODS, Settings, parse
from tasks import loading
from tasks.task import Problem

GROUPS = ("n=3", "n=7", "n=8", "n=9")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A results folder of its own, with a preset of the smallest runs."""
    flags = {"preset": "smoke", "steps": "2", "eval-every": "1", "sft-steps": "1", "prompts-per-step": "2"}
    monkeypatch.setitem(compare.PRESETS, "tiny", compare.Preset(flags, ("n=7", "n=8"), (0, 1)))
    monkeypatch.setattr(compare, "results", lambda preset: tmp_path / f"{preset}.jsonl.gz")
    compare.records.cache_clear()
    yield tmp_path / "tiny.jsonl.gz"
    compare.records.cache_clear()


def record(method, seed, percent, flags=None, kind="final"):
    policy = {g: percent / 100 if g in ("n=3", "n=7") else 0.0 for g in GROUPS} | {"average": 0.0}
    evals = [dict(step=10, policy=policy)]
    return dict(method=method, flags=flags or {}, seed=seed, kind=kind, evals=evals, probes=[], curves={})


def write(path, records):
    with gzip.open(path, "at") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    compare.records.cache_clear()


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (29, 2.0452)])
def test_the_interval_s_quantile_is_student_s_t(freedom, quantile):
    assert compare.student(freedom) == pytest.approx(quantile, abs=1e-4)


def test_the_interval_of_a_mean_covers_it_in_19_of_20_draws():
    draws = torch.randn(2000, 5, generator=torch.manual_seed(0)).tolist()
    covered = sum(abs(sum(values) / 5) <= compare.half_width(values) for values in draws) / 2000
    assert covered == pytest.approx(0.95, abs=0.02)


def test_a_table_has_means_over_seeds_and_differences_paired_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "results", lambda preset: tmp_path / "r.gz")
    monkeypatch.setattr(compare, "FEWEST", 3)
    noisy = [10.0, 30.0, 50.0]
    shared = {"beta": "2e-3"}  # of all trials, and so of the row before there are any
    runs = [record("bridge", seed, percent, shared) for seed, percent in enumerate(noisy)]
    runs += [record("mix", seed, percent - 4 - seed) for seed, percent in enumerate(noisy)]
    runs += [record("hpt", seed, 20.0, {}) for seed in (0, 1)]
    write(tmp_path / "r.gz", [*runs, record("mix", 1000, 99.0), record("mix", 3, 99.0)])
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in compare.table("chains", "main").splitlines()}
    compare.records.cache_clear()
    assert rows["bridge"][1] == "30.0 ± 49.7"
    assert rows["bridge"][3] == "0.00 ± 0.00", "of n=8 and n=9"
    assert rows["mix"][4] == "-5.0 ± 2.5", "of seeds 0 to 2: seed 3 has no partner and seed 1000 is for tuning"
    assert rows["mix"][-1] == "4, 3 of them paired |"
    assert "hpt" not in rows, "two runs are no row"
    assert "rl" not in rows, "it has no runs"


def test_the_endpoint_is_the_mean_of_the_last_three_evaluations_of_trained_groups_after_step_0():
    values = {0: 0.9, 10: 0.1, 20: 0.2, 30: 0.3, 40: 0.7}
    evals = [dict(step=step, policy={"n=3": x, "n=4": x + 0.1, "n=8": 1.0}) for step, x in values.items()]
    assert compare.trained(dict(evals=evals), "chains") == pytest.approx(45.0)
    assert compare.trained(dict(evals=[evals[0], evals[-1]]), "chains") == pytest.approx(75.0), "not step 0"
    assert compare.trained_at(dict(evals=evals), "chains", 1 / 2) == pytest.approx(25.0)


def test_the_hash_of_a_row_s_code_changes_with_every_source_file_but_not_with_results(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    hashes = set()
    for name in ("bridge.py", "bench/compare.py"):
        (tmp_path / name).write_text("x = 1\n")
        hashes.add(measure.sources())
        (tmp_path / name).write_text("x = 2\n")
        hashes.add(measure.sources())
    assert len(hashes) == 4
    (tmp_path / "bench" / "chains.jsonl.gz").write_text("results")
    assert measure.sources() in hashes


@pytest.mark.parametrize("preset", [name for name in compare.PRESETS if compare.results(name).exists()])
@pytest.mark.parametrize("name", compare.TABLES)
def test_every_committed_run_of_a_cell_that_a_table_shows_is_in_that_table(preset, name):
    known = compare.records(preset)
    seeds = {r["seed"] for r in known} - {*compare.TUNING_SEEDS, *compare.FRESH}
    if compare.TABLES[name].fresh:
        seeds = {*compare.FRESH}
    committed = [(r["method"], r["flags"], r["kind"]) for r in known if r["seed"] in seeds]
    rows = [row.strip("| ").split(" | ") for row in compare.table(preset, name).splitlines()[2:]]
    shown = {row[0]: int(row[-1].split(",")[0]) for row in rows}
    for c in compare.TABLES[name].cells(preset):
        count = committed.count((c.method, c.flags, c.kind))
        fewest = min(compare.FEWEST, len(compare.TABLES[name].seeds_of(preset)))
        assert shown.get(c.label, 0) == (count if count >= fewest else 0), c.label


def test_the_page_of_tables_is_what_the_finished_runs_print():
    assert (ROOT / "bench/results/tables.md").read_text() == compare.page() + "\n"


def test_every_table_and_every_interval_of_the_other_pages_is_one_of_the_printed_ones():
    tables = (ROOT / "bench/results/tables.md").read_text() + claims.primary_table() + claims.claims_table()
    pages = {
        name: (ROOT / name).read_text() for name in ("README.md", "docs/results.md", "docs/paper.md", "docs/theory.md")
    }
    shown = re.findall(r"^python bench/compare\.py .* --no-runs\n```\n\n((?:\|.*\n)+)", pages["docs/results.md"], re.M)
    assert shown
    assert all(table in tables for table in shown)
    intervals = {text for page in pages.values() for text in re.findall(r"[\d.]+ ± [\d.]+\d", page)}
    assert len(intervals) > 20
    assert intervals <= set(re.findall(r"[\d.]+ ± [\d.]+\d", tables)), "the sign of a difference may be turned"


def test_the_settings_that_win_the_trials_are_those_of_most_seeds_and_the_best_mean(study):
    one, two, three, *_ = compare.TRIALS["mix"]
    tried = [(one, 1000, 60), (two, 1000, 50), (three, 1000, 55), (one, 1001, 40), (three, 1001, 50)]
    write(study, [record("mix", seed, percent, flags, "tuning") for flags, seed, percent in tried])
    write(study, [record("mix", 1000, 99, two), record("mix", 1002, 99, {"alpha": "7"}, "tuning")])
    assert compare.tuned("tiny", "mix") == three
    assert compare.tuned("tiny", "rl") == {}, "without trials: the defaults"


def accepted(method, flags):
    words = [f"--{flag}" if value == compare.ON else f"--{flag}={value}" for flag, value in flags.items()]
    parse([f"--method={method}", *words])


@pytest.mark.parametrize("name", compare.TABLES)
def test_bridge_accepts_the_settings_of_every_row_of_every_table(name):
    cells = compare.TABLES[name].cells("chains")
    assert len({c.label for c in cells}) == len(cells)
    assert {c.against for c in cells} <= {c.label for c in cells}
    for c in cells:
        accepted(c.method, c.flags)


def test_every_method_has_equally_many_trials():
    assert {compare.method_of(row) for row in compare.TRIALS} == set(METHODS) - {"weighed"}, "it has a table of its own"
    assert {len({json.dumps(flags) for flags in trials}) for trials in compare.TRIALS.values()} == {6}
    for row, trials in compare.TRIALS.items():
        for flags in trials:
            accepted(compare.method_of(row), flags)


def test_runs_are_made_once_and_their_tables_and_figure_can_be_drawn(study, tmp_path):
    bridge_cell = next(c for c in compare.main_cells("tiny") if c.label == "bridge")
    cost_of_rl = next(c for c in compare.cost_cells("tiny") if c.label == "rl")
    compare.make("tiny", [bridge_cell.job(0)], workers=1)
    compare.make("tiny", [bridge_cell.job(0), cost_of_rl.job(0)], workers=2)
    made = compare.records("tiny")
    assert [r["method"] for r in made] == ["bridge", "rl"], "the first one was not made again"
    assert all(r["peak_mib"] > 0 and r["seconds"] > 0 for r in made)
    write(study, [record | {"seed": 1} for record in made])
    for name in ("main", "epochs", "dynamics", "pass_at_k"):
        assert "| bridge | " in compare.table("tiny", name)
    assert "| rl | " in compare.table("tiny", "cost")
    compare.draw("tiny", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_fails_ends_the_study_with_its_message(study):
    with pytest.raises(RuntimeError, match="alpha must be at least 0"):
        compare.make("tiny", [dict(method="sft", flags={"alpha": "-1"}, seed=0, kind="final")], workers=2)
    assert compare.records("tiny") == []


def smoke(folder, *flags):
    """The metrics of two steps with a reward that differs between samples."""
    reward = lambda response, problem: float(len(response) % 3)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_reward", lambda spec: reward)
        bridge.main(["--preset=smoke", "--steps=2", "--eval-every=1", f"--out={folder}/run", *flags])
    metrics = lines(folder / "run/metrics.jsonl")
    return [{k: v for k, v in m.items() if k not in ("seconds", "tokens_per_second")} for m in metrics]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return smoke(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def unchanged(plain, monkeypatch):
    """Undoes what a kind of run changes in bridge.py."""
    changed = ("evaluate_policies", "bilevel_gradients", "clip_and_step", "rl_pass", "sft_pass", "make_policies")
    for name in (*changed, "sample_rollouts"):
        monkeypatch.setattr(bridge, name, getattr(bridge, name))
    monkeypatch.setattr(lora, "base_parameters", lora.base_parameters)


def test_measuring_the_effect_of_w_changes_no_training(plain, tmp_path, unchanged):
    kinds.effect_of_w()
    assert smoke(tmp_path) == plain
    first, *_, last = lines(tmp_path / "run/probe.jsonl")
    assert first["theta,w"] == first["theta,none"] == first["theta_hat,w"], "w and θ̂ − θ are 0 before the first step"
    assert set(last) == {"step"} | {f"{b},{a}" for b in ("theta", "theta_hat") for a in ("w", "w_before", "none")}


def test_in_gauss_seidel_order_the_gain_moves_w_at_the_first_step_already(plain, tmp_path, unchanged):
    assert plain[0]["gain_grad_norm"] == 0.0
    seen = []
    gradients = bridge.bilevel_gradients

    def spy(*args):
        update = gradients(*args)
        seen.append(update.stats["gain_grad_norm"])
        return update

    bridge.bilevel_gradients = spy
    kinds.gauss_seidel()
    smoke(tmp_path)
    assert seen[0] == 0.0, "the step of θ and θ̂"
    assert seen[1] > 0.0, "the step of w"


def test_sft_takes_the_chosen_demonstrations_alone_and_a_choice_by_the_truth_takes_the_right_ones(tmp_path, unchanged):
    kinds.KINDS["by_truth"]()
    smoke(tmp_path, "--task=chains", "--keep-rollouts=none")
    shares = [record for record in lines(tmp_path / "run/probe.jsonl") if len(record) > 1]
    assert shares
    assert all(record["useful taken"] == 1.0 and record["useless taken"] == 0.0 for record in shares)


def test_a_choice_by_the_gain_takes_what_a_step_of_w_along_its_gradient_makes_more_likely(tmp_path, unchanged):
    kinds.KINDS["by_gain"]()
    smoke(tmp_path, "--task=chains", "--keep-rollouts=none")
    last = lines(tmp_path / "run/probe.jsonl")[-1]
    assert 0 < last["useful taken"] + last["useless taken"] < 2, "some are taken, some are not"


OWN = "--shadow-rollouts=own"
OF_W = ("w_norm_policy", "w_norm_shadow", "w_cosine")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return smoke(tmp_path_factory.mktemp("own"), OWN)


def test_measuring_w_s_gradients_changes_no_training(own, tmp_path, unchanged):
    kinds.KINDS["inner_1"]()
    measured = smoke(tmp_path, OWN)
    numbers = [[m.pop(name) for name in OF_W] for m in measured]
    assert measured == own
    for policy, shadow, cosine in numbers:
        assert policy > 0
        assert shadow > 0
        assert -1 <= cosine < 1
    policy, shadow, _ = numbers[0]
    assert policy == shadow, "at the first step θ̂ = θ, and equal prompts have equal samples"


def test_a_shadow_with_more_steps_has_them_on_prompts_of_its_own(own, tmp_path, unchanged):
    kinds.KINDS["inner_4"]()
    steps = []
    clip_and_step = bridge.clip_and_step

    def count(m, *rest):
        result = clip_and_step(m, *rest)
        optimizers = (m.optimizers[name] for name in ("theta", "theta_hat"))
        steps.append([int(optimizer.state_dict()["state"][0]["step"]) for optimizer in optimizers])
        return result

    bridge.clip_and_step = count
    measured = smoke(tmp_path, OWN)
    assert steps == [[1, 4], [2, 8]]
    assert measured[0]["grad_norm_theta"] == own[0]["grad_norm_theta"], "the policy's prompts are the same"
    assert measured[0]["grad_norm_theta_hat"] != own[0]["grad_norm_theta_hat"]


def test_shuffled_rewards_reach_w_s_term_alone(own, tmp_path, unchanged):
    kinds.KINDS["inner_shuffled"]()
    measured = smoke(tmp_path, OWN)
    for name in ("grad_norm_theta", "grad_norm_theta_hat", "cooperative_gain"):
        assert measured[0][name] == own[0][name]
    assert measured[0]["grad_norm_w"] != own[0]["grad_norm_w"]


def test_shuffled_rewards_are_those_of_the_group():
    reward = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 1]])
    responses = [[1] * (1 + i % 3) for i in range(8)]
    A = grpo.group_advantages(reward).flatten().repeat_interleave(torch.tensor([len(r) for r in responses]))
    given = rollout.Rollouts(
        [([1], r) for r in responses], reward, A, torch.ones_like(A), A, torch.zeros_like(A).bool(), {}, []
    )
    shuffled = kinds.with_shuffled_rewards(given, torch.Generator().manual_seed(1))
    assert not torch.equal(shuffled.reward, reward)
    assert torch.equal(shuffled.reward.sort(1).values, reward.sort(1).values)
    expected = grpo.group_advantages(shuffled.reward).flatten()
    assert torch.equal(shuffled.advantage[given.offsets[:-1]], expected)


def test_disjoint_matrices_are_trained_by_w_alone_and_all_others_by_theta_alone(unchanged):
    kinds.disjoint()
    s = Settings(method="mix_lora", lora_targets="q_proj,v_proj", alpha=0.01, beta=0.02)
    m = bridge.make_policies(tiny_model(), s)
    before = {name: p.clone() for name, p in m.policy.named_parameters()}
    demonstrations = rows(4)
    for _ in range(2):  # B is 0 at first, so A has a gradient at the second step only
        update = bridge.bilevel_gradients(m, None, None, demonstrations, 1.0, 0.0, s, lambda phase: nullcontext())
        bridge.clip_and_step(m, update.stats, s)
    for name, p in m.policy.named_parameters():
        is_adapted = "_proj.base.weight" in name
        assert torch.equal(p, before[name]) == is_adapted, name


@pytest.mark.parametrize(("reward", "p"), [(variants.noise_10, 0.1), (variants.noise_20, 0.2)])
def test_the_noisy_reward_is_flipped_with_its_probability(reward, p):
    problem = Problem("1+1", "2")
    flips = sum(reward("\\boxed{2}", problem) == 0.0 for _ in range(2000)) / 2000
    assert flips == pytest.approx(p, abs=0.03)
    assert sum(reward("\\boxed{3}", problem) for _ in range(2000)) / 2000 == pytest.approx(p, abs=0.03)


CASES = [("chains", 256, name) for name in compare.SUPERVISION if name != "clean"] + [("logic", 128, "useless_60")]


@pytest.mark.parametrize(("preset", "all_of_them", "name"), CASES)
def test_a_variant_of_the_task_has_the_number_and_share_in_its_name(preset, all_of_them, name):
    s, _ = parse([f"--preset={preset}", "--eval-problems=2"])
    task = getattr(variants, name)(s)
    kind, number = name.split("_")
    wrong = sum(not rewards.is_correct(d.response, d.answer).correct for d in task.demonstrations)
    if kind == "useless":
        assert len(task.demonstrations) == all_of_them
        assert wrong == round(int(number) / 100 * all_of_them)
    else:
        assert len(task.demonstrations) == int(number)
        assert wrong == 0
