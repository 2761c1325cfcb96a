"""The train loop and its rollouts: what goes where, step by step, seen through spies on the functions it calls."""

import copy
import json
import sys
from itertools import cycle

import pytest
import torch
from conftest import lines

import bridge
import grpo
import rollout
import settings
from infra import checkpoint, export
from infra.run import RunFolder, Timer
from logprob import response_logprobs
from rewards import is_correct
from sampler import Completion
from settings import METHODS, Method

SMOKE = settings.PRESETS["smoke"]


def make_run(tmp_path, **changes):
    """A smoke run, set up but not started."""
    s = settings.check(settings.Settings(**(SMOKE | changes)))
    tmp_path.mkdir(exist_ok=True)
    return bridge.set_up(s, RunFolder(tmp_path))


def sample(run, prompts=None, step=0):
    """The policy's rollouts on the next prompts."""
    prompts = prompts or run.prompt_order
    return rollout.sample_rollouts(run.env, prompts, run.m.policy, None, step, Timer(step))[0]


def train_spying(run, monkeypatch, observe):
    """Trains and records `observe(run, rollouts, rollouts_hat, demonstrations)` before each bilevel_gradients."""
    seen, real = [], bridge.bilevel_gradients

    def spy(m, rollouts, rollouts_hat, demonstrations, *rest):
        seen.append(observe(run, rollouts, rollouts_hat, demonstrations))
        return real(m, rollouts, rollouts_hat, demonstrations, *rest)

    monkeypatch.setattr(bridge, "bilevel_gradients", spy)
    bridge.train(run, 0)
    return seen


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def boxed(run, answer, extra, reason="stop"):
    ids = run.env.tokenizer.encode("1+1=2;" * extra + f"\\boxed{{{answer}}}", add_special_tokens=False)
    return Completion(ids, [-0.01 * i - extra for i in range(len(ids))], reason)


def test_rewards_advantages_and_weights_belong_to_the_tokens_of_their_own_sequence(tmp_path, monkeypatch):
    run = make_run(tmp_path, prompts_per_step=3, group_size=4, overlong_mask=True)
    problems = [run.env.task.problems[i] for _, i in copy.deepcopy(run.prompt_order).take(3)]
    right = [[True, False, False, False], [True, True, True, False], [False] * 4]
    groups = [
        [boxed(run, p.answer if r else "x", g + i, "length" if (i, g) == (1, 2) else "stop") for g, r in enumerate(row)]
        for i, (p, row) in enumerate(zip(problems, right, strict=True))
    ]
    monkeypatch.setattr(run.env.sampler, "generate", lambda *a, **k: groups)
    rollouts = sample(run)
    assert rollouts.reward.tolist() == [[float(r) for r in row] for row in right]
    advantages, flat, at = grpo.group_advantages(rollouts.reward), [c for g in groups for c in g], 0
    for i, completion in enumerate(flat):
        tokens = slice(at, at + len(completion.ids))
        at = tokens.stop
        assert rollouts.rows[i][1] == completion.ids
        assert run.env.tokenizer.decode(rollouts.rows[i][0]) == f"Q:{problems[i // 4].question}="
        assert rollouts.advantage[tokens].tolist() == [advantages[i // 4, i % 4].item()] * len(completion.ids)
        assert rollouts.sampler_logp[tokens].tolist() == pytest.approx(completion.logps)
        assert rollouts.weight[tokens].any() == (completion.finish_reason == "stop"), "overlong sequences weigh nothing"
    assert at == len(rollouts.advantage) == len(rollouts.weight)
    assert rollouts.stats["truncated_frac"] == 1 / 12
    assert rollouts.stats["zero_std_groups"] == 1 / 3


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_aggregation_and_mask_reach_the_weights_and_dr_grpo_omits_the_std(tmp_path, aggregation):
    run = make_run(tmp_path, aggregation=aggregation, overlong_mask=True)
    completions = [boxed(run, "1", n, "length" if n == 1 else "stop") for n in range(3)]
    group = rollout.Group(
        0, run.env.task.problems[0], [1, 2], completions, ["a", "b", "c"], [0.9, 0.1, 0.2], [None] * 3
    )
    rollouts = rollout.make_rollouts([group], run.s, {})
    lengths, keep = torch.tensor([len(c.ids) for c in completions]), torch.tensor([True, False, True])
    expected = grpo.token_weights(lengths, aggregation, run.s.max_new_tokens, keep)
    assert torch.equal(rollouts.weight, expected)
    advantage = grpo.group_advantages(torch.tensor([[0.9, 0.1, 0.2]]), divide_by_std=aggregation != "dr_grpo")
    assert rollouts.advantage.tolist() == pytest.approx(advantage[0].repeat_interleave(lengths).tolist(), rel=1e-5)


@pytest.mark.parametrize("rewards", [[0.3] * 6, [1000.1] * 6, [1000.1] * 5 + [1000.1 + 1e-9], [0.1 + 0.2, 0.3] * 3])
def test_a_group_has_a_signal_exactly_if_it_has_an_advantage(tmp_path, rewards):
    run = make_run(tmp_path)
    group = rollout.Group(0, run.env.task.problems[0], [1], [boxed(run, "1", 0)] * 6, ["a"] * 6, rewards, [None] * 6)
    assert group.has_signal == bool(rollout.make_rollouts([group], run.s, {}).advantage.any())


def test_rewards_and_logs_read_special_tokens_but_not_the_final_stop_token(tmp_path, monkeypatch):
    run = make_run(tmp_path, prompts_per_step=1, group_size=2)
    tokenizer, seen = run.env.tokenizer, []
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>", "<|im_start|>"]})
    thought = tokenizer.encode("\\boxed{7}</think>\\boxed{1<|im_start|>2}", add_special_tokens=False)
    stopped = Completion([*thought, tokenizer.eos_token_id], [0.0] * (len(thought) + 1), "stop")
    completions = [stopped, Completion(thought, stopped.logps, "length")]
    monkeypatch.setattr(run.env.sampler, "generate", lambda *a: [completions])
    run.env.reward = lambda response, problem: seen.append(response) or float("</think>" in response)
    (group,) = rollout.sample_groups(run.env, [(0, 0)], 0)
    assert group.responses == seen == ["\\boxed{7}</think>\\boxed{1<|im_start|>2}"] * 2
    assert group.rewards == [1.0, 1.0]
    assert not is_correct(group.responses[0], "12").correct
    assert not is_correct(group.responses[0], "7").correct


def test_groups_stand_as_their_prompts_were_drawn_whichever_rank_has_sampled_them(tmp_path, monkeypatch):
    run = make_run(tmp_path, prompts_per_step=5, group_size=2)
    again = copy.deepcopy(run.prompt_order)
    alone = sample(run)
    of_two_ranks = lambda groups: [*groups[::2], *groups[1::2]]  # noqa: E731
    monkeypatch.setattr(rollout.parallel, "all_gather", of_two_ranks)
    several = sample(run, again, 0)
    assert several.rows == alone.rows
    assert same([several.reward, several.sampler_logp], [alone.reward, alone.sampler_logp])


def test_a_sample_is_drawn_from_seed_step_and_number_of_its_draw(tmp_path, monkeypatch):
    run, keys = make_run(tmp_path, prompts_per_step=3, group_size=2, seed=5, steps=9, save_every=10), []
    monkeypatch.setattr(bridge, "evaluate_policies", lambda *_: None)
    generate = run.env.sampler.generate
    monkeypatch.setattr(run.env.sampler, "generate", lambda p, k, *rest: keys.append(k) or generate(p, k, *rest))
    bridge.train(run, 7)
    assert keys == [[(5, 7, draw) for draw in range(3)], [(5, 8, draw) for draw in range(3, 6)]]


def test_prompts_and_demonstrations_are_drawn_in_orders_of_their_own_which_the_seed_decides(tmp_path):
    orders = set()
    for seed in (0, 1):
        run = make_run(tmp_path / str(seed), seed=seed)
        for stream in (run.prompt_order, run.demonstration_order):
            stream.count = 50  # equal numbers of rows
            orders.add(tuple(i for _, i in stream.take(50)))
    assert len(orders) == 4


@pytest.mark.parametrize("cap", [0, 1, 5])
def test_dynamic_sampling_replaces_zero_std_groups_up_to_its_cap(tmp_path, monkeypatch, cap):
    run = make_run(tmp_path, prompts_per_step=2, group_size=2, dynamic_sampling=cap)
    stream, calls = copy.deepcopy(run.prompt_order), []

    def generate(prompts, *rest):  # one live group in the second batch, one in the fourth
        problems = [run.env.task.problems[i] for _, i in stream.take(2)]
        calls.append(problems)
        live = len(calls) in (2, 4)
        return [
            [boxed(run, problems[0].answer if live else "x", 0), boxed(run, "x", 0)],
            [boxed(run, "x", 1), boxed(run, "x", 1)],
        ]

    monkeypatch.setattr(run.env.sampler, "generate", generate)
    rollouts = sample(run)
    assert len(calls) == {0: 1, 1: 2, 5: 4}[cap]
    assert rollouts.stats["zero_std_groups"] == {0: 1, 1: 3 / 4, 5: 6 / 8}[cap], "counted before the choice"
    assert (rollouts.reward.sum(1) == 1).tolist() == {0: [False, False], 1: [True, False], 5: [True, True]}[cap]


def test_with_dynamic_sampling_policy_and_own_shadow_keep_the_prompts_with_a_signal_in_both(tmp_path, monkeypatch):
    run = make_run(tmp_path, prompts_per_step=2, group_size=2, dynamic_sampling=2, shadow_rollouts="own")
    asked = [run.env.task.problems[i].question for _, i in copy.deepcopy(run.prompt_order).take(6)]
    draws_with_signal, models = {"policy": {1, 2, 4}, "shadow": {0, 2, 4}}, cycle(("policy", "shadow"))

    def sample_groups(env, draws, step):
        signal, completions = draws_with_signal[next(models)], [boxed(run, "1", 0)] * 2
        rewards = {draw: [float(draw in signal), 0.0] for draw, _ in draws}
        return [
            rollout.Group(d, env.task.problems[i], [1], completions, ["a"] * 2, rewards[d], [None] * 2)
            for d, i in draws
        ]

    monkeypatch.setattr(rollout, "sample_groups", sample_groups)
    both = rollout.sample_rollouts(run.env, run.prompt_order, run.m.policy, run.m.shadow, 0, Timer(1))
    for rollouts in both:
        assert [record["question"] for record in rollouts.records[::2]] == [asked[2], asked[4]]


def test_shared_rollouts_are_the_policy_s_and_own_ones_the_shadow_s(tmp_path, monkeypatch):
    def gaps(run, rollouts, rollouts_hat, _):
        with torch.no_grad():
            pairs = (rollouts, run.m.policy), (rollouts_hat, run.m.shadow)
            return [(r.sampler_logp - response_logprobs(m, r.rows)[0]).abs().max().item() for r, m in pairs]

    run = make_run(tmp_path / "own", shadow_rollouts="own", steps=2)
    assert all(gap < 1e-3 for step in train_spying(run, monkeypatch, gaps) for gap in step)
    run = make_run(tmp_path / "same", shadow_rollouts="own", steps=1)
    (same_rows,) = train_spying(run, monkeypatch, lambda run, a, b, _: a.rows == b.rows and a is not b)
    assert same_rows, "while θ̂ = θ, the same prompts and random numbers give the same samples"
    run = make_run(tmp_path / "shared", steps=2)
    assert all(train_spying(run, monkeypatch, lambda run, a, b, _: a is b))


@pytest.mark.parametrize(
    ("changes", "scored"), [({}, True), (dict(shadow_rollouts="own"), False), (dict(method="mix_lora"), False)]
)
def test_rewarded_rows_without_a_gradient_are_scored_only_for_the_gain_on_shared_rollouts(tmp_path, changes, scored):
    run = make_run(tmp_path, prompts_per_step=1, group_size=2, **changes)
    run.env.reward = lambda response, problem: 1.0
    rollouts = sample(run)
    assert bool(rollouts.rows_to_run(has_kl=False)[1]) == scored


def test_the_shadow_starts_as_theta_and_is_never_set_back(tmp_path, monkeypatch):
    run = make_run(tmp_path, steps=3)
    names = ("theta", "theta_hat")
    seen = train_spying(run, monkeypatch, lambda run, *_: same(*(run.m.parameters[n] for n in names)))
    assert seen == [True, False, False]


def test_cold_start_gives_rl_a_fresh_optimizer(tmp_path, monkeypatch):
    run = make_run(tmp_path, method="sft_rl", sft_steps=2, steps=2)
    seen = train_spying(run, monkeypatch, lambda run, r, *_: (r is None, len(run.m.optimizers["theta"].state) > 0))
    assert seen == [(True, False), (True, True), (False, False), (False, True)]


def test_each_of_alternating_s_two_optimizers_steps_once_in_a_step(tmp_path):
    run = make_run(tmp_path, method="alternating", steps=2)
    bridge.train(run, 0)
    steps = {name: {int(state["step"]) for state in o.state.values()} for name, o in run.m.optimizers.items()}
    assert steps == {"theta": {2}, "theta_sft": {2}}


def test_batch_sizes_and_dtype_of_the_settings_are_those_of_a_step(tmp_path, monkeypatch):
    sizes = dict(sft_batch=5, prompts_per_step=3, group_size=4)
    run = make_run(tmp_path, **sizes, dtype="bfloat16", kl_coef=0.1, steps=1)
    real, dtypes = bridge.response_logprobs, []

    def spy(model, rows, temperature=1.0, dtype=torch.float32):
        dtypes.append(dtype)
        return real(model, rows, temperature, dtype)

    monkeypatch.setattr(bridge, "response_logprobs", spy)
    monkeypatch.setattr(bridge, "evaluate_policies", lambda *_: None)
    seen = train_spying(run, monkeypatch, lambda run, r, _, demos: (len(demos), len(r.rows), r.reward.shape))
    assert seen == [(5, 12, (3, 4))]
    assert len(dtypes) >= 5, "policy, shadow, two references and SFT"
    assert {*dtypes, run.env.sampler.decoder.lm_head.dtype} == {torch.bfloat16}
    assert {p.dtype for of_set in run.m.parameters.values() for p in of_set} == {torch.float32}


def test_each_update_sees_iterate_k_once_and_updates_per_rollout_reuse_the_rollouts(tmp_path, monkeypatch):
    run = make_run(tmp_path, steps=2, updates_per_rollout=3)
    seen = train_spying(run, monkeypatch, lambda run, r, _, demos: (id(r), r, demos, r.old_logp is None))
    assert len(seen) == 6
    assert [i for i, *_ in seen[:3]] == [seen[0][0]] * 3
    assert [is_first for *_, is_first in seen] == [True, False, False] * 2, "log π_old is that before the first"
    assert seen[3][0] != seen[0][0]
    assert seen[0][2] != seen[1][2], "each update draws its own demonstrations"


def test_updates_per_rollout_repeats_updates_on_rollouts_and_not_the_sft_steps_of_a_cold_start(tmp_path, monkeypatch):
    run = make_run(tmp_path, method="sft_rl", sft_steps=2, steps=1, updates_per_rollout=3)
    assert train_spying(run, monkeypatch, lambda run, r, *_: r is None) == [True, True, False, False, False]


def test_the_logged_clip_frac_is_the_mean_over_the_updates_on_the_same_rollouts(tmp_path, monkeypatch):
    run = make_run(tmp_path, method="rl", steps=1, updates_per_rollout=4, alpha=1e-2, group_size=32)
    seen, real = [], bridge.clip_and_step

    def spy(m, stats, *rest):
        seen.append(stats["clip_frac"])
        return real(m, stats, *rest)

    monkeypatch.setattr(bridge, "clip_and_step", spy)
    bridge.train(run, 0)
    assert seen[0] == 0 < seen[-1], "the first update's ratios are 1"
    assert lines(tmp_path / "metrics.jsonl")[0]["clip_frac"] == pytest.approx(sum(seen) / 4)


def test_the_trainer_uses_the_sampling_temperature(tmp_path):
    run = make_run(tmp_path, steps=2, temperature=0.6)
    bridge.train(run, 0)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(m["logp_gap_max"] < 1e-3 for m in metrics)


def test_the_logged_entropy_estimates_that_of_all_sampled_tokens(tmp_path):
    run = make_run(tmp_path, prompts_per_step=8, group_size=32, temperature=0.8)
    rollouts = sample(run)
    seen = bridge.rl_pass(run.m.policy, rollouts, None, None, run.s)
    with torch.no_grad():
        logp, entropy = response_logprobs(run.m.policy, rollouts.rows, 0.8)
    error = (-logp - entropy).std() / len(logp) ** 0.5
    estimate = rollout.rl_statistics(seen, rollouts)["entropy"]
    assert abs(estimate - entropy.mean()) < 4 * error < 0.1 * entropy.mean()


def test_policy_and_shadow_are_each_evaluated_with_their_own_weights(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    with torch.no_grad():
        run.m.parameters["theta_hat"][0].add_(1.0)
    fingerprint = lambda m: next(m.parameters()).sum().item()  # noqa: E731
    monkeypatch.setattr(bridge, "evaluate", lambda sampler, *_: ({"average": fingerprint(sampler.model)}, []))
    bridge.evaluate_policies(run, 0)
    record = json.loads((tmp_path / "evals.jsonl").read_text())
    assert record["policy"]["average"] == pytest.approx(fingerprint(run.m.policy))
    assert record["shadow"]["average"] == pytest.approx(fingerprint(run.m.shadow))
    assert record["shadow"] != record["policy"]


def test_a_checkpoint_holds_the_positions_and_the_skipped_count(tmp_path):
    run = make_run(tmp_path)
    run.prompt_order.position, run.demonstration_order.position, run.skipped = 3, 7, 2
    again = make_run(tmp_path)
    bridge.save(run, 5)
    assert bridge.restore(again, checkpoint.newest(tmp_path / "checkpoint")) == 5
    assert (again.prompt_order.position, again.demonstration_order.position, again.skipped) == (3, 7, 2)


@pytest.mark.parametrize(
    ("averages", "flags", "kept"),
    [
        ([0.1, 0.5, 0.3, 0.5, 0.2], ["--keep-best", "--save-every", "9"], [1, 3, 4]),  # the earliest of equals
        ([0.6, 0.5, 0.3, 0.5, 0.2], ["--keep-best", "--save-every", "2"], [0, 3, 4]),  # the initial model
        ([0.1, 0.5, 0.3, 0.5, 0.2], ["--save-every", "1"], [3, 4]),
    ],
)
def test_the_best_checkpoint_by_evaluation_is_kept_over_a_resume_and_exported_by_name(
    tmp_path, monkeypatch, averages, flags, kept
):
    out = tmp_path / "run"
    left = iter(averages)
    monkeypatch.setattr(bridge, "evaluate", lambda *_: ({"average": next(left)}, []))
    for steps in (3, 4):  # resumed once
        always = ("--preset", "smoke", "--method", "sft", "--eval-every", "1", "--resume", "--out", str(out))
        bridge.main([*always, *flags, "--steps", str(steps)])
    assert list(checkpoint.steps_in(out / "checkpoint")) == kept
    monkeypatch.setattr(sys, "argv", ["export", str(out), "--step", "best"])
    if "--keep-best" not in flags:
        known = (
            r"^infra\.export: no such checkpoint in .*: its steps are 3, 4; --keep-best keeps that of the best evalu"
        )
        with pytest.raises(SystemExit, match=known):
            export.main()
    else:
        export.main()
        assert f"for {kept[0]} steps" in (out / f"model-step-{kept[0]}" / "README.md").read_text()


@pytest.mark.parametrize("value", [0.25, float("nan")])
def test_a_metric_is_logged_from_the_place_that_computes_it_and_stops_no_update(tmp_path, monkeypatch, value):
    statistics = bridge.rl_statistics
    monkeypatch.setattr(bridge, "rl_statistics", lambda *args: statistics(*args) | {"mine": value})
    run = make_run(tmp_path, steps=2)
    before = [p.clone() for p in run.m.parameters["theta"]]
    bridge.train(run, 0)
    logged = lines(tmp_path / "metrics.jsonl")
    assert [m["mine"] for m in logged] == [0.25 if value == 0.25 else None] * 2
    assert [m["skipped_in_a_row"] for m in logged] == [0, 0]
    assert not same(before, run.m.parameters["theta"])


def test_a_new_method_is_one_row_and_one_case_and_trains_through_export(tmp_path, monkeypatch):
    """The row is an entry of METHODS, the case a line of `updates`; memory, help, card and export read the table."""
    monkeypatch.setitem(METHODS, "sft_twice", Method("w and θ take SFT twice as much as RL", adapter=True))
    cases = bridge.updates
    monkeypatch.setattr(bridge, "updates", lambda s, k: [(2.0, 1.0)] if s.method == "sft_twice" else cases(s, k))
    out = tmp_path / "run"
    bridge.main(["--preset", "smoke", "--method", "sft_twice", "--steps", "2", "--out", str(out)])
    metrics = lines(out / "metrics.jsonl")
    assert metrics[-1]["lora_norm"] > 0 and metrics[-1]["cooperative_gain"] is None  # noqa: PT018
    assert "w and θ take SFT twice as much as RL" in (out / "model" / "README.md").read_text()
    assert (out / "adapter" / "adapter_config.json").exists()
    with pytest.raises(SystemExit, match="shadow_ratio_cap does nothing with method sft_twice"):
        bridge.main(["--method", "sft_twice", "--shadow-ratio-cap", "3", "--out", str(out)])
