"""bench/fair.py: equal trials for every row; and the baselines that bench/kinds.py makes of other methods."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import rows, tiny_model
from test_update import fresh, make_rollouts

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import compare
import fair
import kinds
import variants

import bridge
from infra.files import read_log
from settings import PRESETS, Settings
from tasks import arithmetic, logic


@pytest.mark.parametrize("row", fair.ROWS)
def test_the_settings_of_a_row_cover_each_part_of_each_range_once_and_are_accepted(row):
    candidates = fair.candidates(row)
    assert candidates == fair.candidates(row)
    for name, values in fair.ROWS[row].ranges.items():
        parts = [12 * values.share(flags[name]) for flags in candidates]
        if not values.whole:  # rounding may move a whole number into the next part
            assert sorted(int(part + 0.02) for part in parts) == pytest.approx(range(12), abs=1)
        assert min(parts) < 1.1
        assert max(parts) > 10.9
    for flags in candidates:
        job = compare.fair_job(row, flags, 0)
        bridge.parse(compare.flags_of("chains", job))


def test_halving_keeps_the_best_by_the_mean_of_all_seeds_so_far_and_runs_26_trials():
    asked = []
    order = {str(flags): place for place, flags in enumerate(fair.candidates("rl"))}

    def score(row, flags, seed):
        asked.append((str(flags), seed))
        lucky = 20 if seed == 1000 and order[str(flags)] == 11 else 0  # the worst setting, on the first seed alone
        return lucky - order[str(flags)]

    first = [order[str(flags)] for flags in fair.alive("rl", 1, score)]
    assert first == [11, 0, 1, 2]
    assert [order[str(flags)] for flags in fair.alive("rl", 2, score)] == [0, 1]
    assert order[str(fair.winner("rl", score))] == 0
    assert len(set(asked)) == 26


def test_a_row_whose_trials_are_missing_has_no_winner():
    with pytest.raises(KeyError):
        fair.winner("rl", lambda row, flags, seed: {}[row])


def test_the_first_and_the_last_part_of_a_range_are_its_edges():
    assert fair.at_edge("mix", {"alpha": "6e-5", "mu": "0.6"}) == ["alpha"]
    assert fair.at_edge("mix", {"alpha": "4e-4", "mu": "3.9"}) == ["mu"]
    assert fair.at_edge("mix", {"alpha": "4e-4", "mu": "0.6"}) == []


@pytest.mark.parametrize(("preset", "most"), [("chains", arithmetic.EVAL_MAX), ("logic", logic.EVAL_MAX)])
def test_trials_are_scored_on_problems_that_no_table_and_no_training_uses(preset, most):
    s = Settings(**PRESETS[preset])
    spare = variants.spare(s)
    table = variants.task(s)
    assert spare.problems == table.problems
    questions = {p.question for p in spare.evaluation}
    assert len(questions) == len(spare.evaluation)
    assert questions.isdisjoint(row.question for row in (*table.evaluation, *table.problems, *table.demonstrations))
    groups = {p.group for p in table.evaluation}
    assert len(questions) == len(groups) * (most - s.eval_problems)


@pytest.fixture
def restored(monkeypatch):
    for name in ("bilevel_gradients", "clip_and_step", "make_optimizer", "set_up", "evaluate_policies"):
        monkeypatch.setattr(bridge, name, getattr(bridge, name))


def grads(parameters):
    return torch.cat([p.grad.flatten() for p in parameters])


@pytest.mark.usefixtures("restored")
def test_split_gives_theta_the_gradient_of_rl_alone_and_w_that_of_sft_alone():
    s = Settings(method="mix_lora", lam=0.25)
    m = fresh(s, w_trained=True)
    rollouts = make_rollouts(m.policy)
    timer = lambda phase: nullcontext()  # noqa: E731
    bridge.bilevel_gradients(m, rollouts, rollouts, [], 0.0, 0.25, s, timer)
    of_rl = grads(m.parameters["theta"])
    bridge.bilevel_gradients(m, None, None, rows(4, seed=9), 0.75, 0.0, s, timer)
    of_sft = grads(m.parameters["w"])
    kinds.split()
    update = bridge.bilevel_gradients(m, rollouts, rollouts, rows(4, seed=9), 0.75, 0.25, s, timer)
    assert torch.equal(grads(m.parameters["theta"]), of_rl)
    assert torch.equal(grads(m.parameters["w"]), of_sft)
    assert {"sft_nll", "reward"} <= set(update.stats)
    assert update.nll is not None


@pytest.mark.usefixtures("restored")
def test_an_averaged_update_is_the_mean_of_two_with_an_adam_state_each():
    s = Settings(method="alternating", alpha=1e-3)
    demonstrations = rows(4, seed=9)
    timer = lambda phase: nullcontext()  # noqa: E731

    def steps(m, rollouts, plan):
        for sft_weight, rl_weight in plan:
            of_sft = demonstrations if sft_weight else []
            update = bridge.bilevel_gradients(m, rollouts, rollouts, of_sft, sft_weight, rl_weight, s, timer)
            bridge.clip_and_step(m, update.stats, s, rl_weight)
        return torch.cat([p.detach().flatten() for p in m.parameters["theta"]])

    start = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    rollouts = make_rollouts(tiny_model())
    alone = [steps(fresh(s), rollouts, [part]) - start for part in ((0.0, 1.0), (1.0, 0.0))]
    kinds.averaged()
    both = steps(fresh(s), rollouts, [(0.0, 1.0), (1.0, 0.0)]) - start
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("restored")
def test_rl_begins_where_the_loss_of_held_out_demonstrations_is_near_its_minimum_and_those_are_never_trained_on(
    tmp_path, monkeypatch
):
    flags = ["--preset=smoke", "--method=sft_rl", "--alpha=0.02", "--steps=2", "--eval-every=100"]
    trained_on = []
    validated = []
    gradients = bridge.bilevel_gradients

    def spy(m, rollouts, rollouts_hat, demonstrations, *rest):
        trained_on.extend(map(str, demonstrations))
        return gradients(m, rollouts, rollouts_hat, demonstrations, *rest)

    def loss_of_step(model, rows):
        validated.append({str(row) for row in rows})
        loss = (3.0, 1.0, 0.5, 0.505, 0.8)[len(validated) - 1]
        return torch.full((sum(len(response) for _, response in rows),), -loss), None

    monkeypatch.setattr(bridge, "bilevel_gradients", spy)
    monkeypatch.setattr(kinds, "response_logprobs", loss_of_step)
    monkeypatch.setattr(kinds, "right_of_many", lambda run, step: {"right": []} if step == run.s.total_steps else None)
    kinds.switched()
    bridge.main([*flags, "--sft-steps=5", f"--out={tmp_path}/switched"])

    metrics = read_log(tmp_path / "switched/metrics.jsonl")
    assert [m["sft_nll"] is None for m in metrics] == [False] * 3 + [True] * 2, "three steps of SFT, two of RL"
    assert read_log(tmp_path / "switched/probe.jsonl")[-1]["sft steps"] == 3
    assert len(validated) == 5
    assert len(set(map(frozenset, validated))) == 1
    assert validated[0].isdisjoint(trained_on)
    s, _ = bridge.parse(flags)
    assert len(validated[0]) == len(variants.arithmetic.task(s.seed, s.eval_problems).demonstrations[::10])


def test_the_switch_is_the_first_step_within_two_percent_of_the_minimum():
    assert kinds.switch_step([2.0, 1.1, 1.01, 1.0, 1.3]) == 3
    assert kinds.switch_step([1.0, 1.5]) == 1
    assert kinds.switch_step([3.0, 1.021, 1.019, 1.0]) == 3
