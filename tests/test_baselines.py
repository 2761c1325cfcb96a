"""CHORD, LUFFY, SRFT and HPT: numbers of the published loss functions, and what follows from their formulas."""

import json
import math

import pytest
import torch
from conftest import lines
from test_loop import boxed, make_run, sample
from test_run import assert_identical, refused, run
from test_update import assert_close, fresh, gradients, settings

import baselines
import bridge
import grpo
from logprob import response_logprobs
from rollout import Rollouts
from settings import SettingError, Settings
from tasks.functions import load_reward
from tasks.task import DataError, Demonstration, Problem, Task, pair

PAIRED = ("luffy", "srft", "hpt")
# One group: three samples, then the demonstration. L_max is 6 and the batch is one sequence, so a weight is 1/6.
LOGP = [-0.1, -0.7, -0.3, -1.2, -0.4, -0.2, -0.9, -0.5, -0.6, -2.3, -0.05, -1.1]
LENGTHS, REWARD, ENTROPY = [3, 2, 4, 3], [[1.0, 0.0, 0.0, 1.0]], [[0.5, 0.9, 0.3, 1.2]]


def exactly(numbers):
    return pytest.approx(numbers, rel=1e-12, abs=1e-14)


def published_batch(method):
    """(log-probs with a gradient, the batch above as rollouts) in float64."""
    reward, entropy = (torch.tensor(x, dtype=torch.float64) for x in (REWARD, ENTROPY))
    lengths = torch.tensor(LENGTHS)
    A = grpo.group_advantages(reward, divide_by_std=False)
    if method == "srft":
        A = baselines.srft_advantages(A, reward == 1, entropy)
    rollouts = Rollouts(
        rows=[([1], list(range(10 * i, 10 * i + n))) for i, n in enumerate(LENGTHS)], reward=reward,
        advantage=A.flatten().repeat_interleave(lengths),
        weight=torch.full((12,), 1 / 6, dtype=torch.float64), sampler_logp=torch.zeros(12), stats={}, records=[],
        is_demonstration=torch.arange(12) >= 9,
    )  # fmt: skip
    return torch.tensor(LOGP, dtype=torch.float64, requires_grad=True), rollouts


def rl_gradient(monkeypatch, method):
    """∂L_RL/∂log π of the batch above, from bridge.rl_pass."""
    logp, rollouts = published_batch(method)
    monkeypatch.setattr(bridge, "response_logprobs", lambda *a: (logp, torch.zeros_like(logp)))
    bridge.rl_pass(None, rollouts, None, None, Settings(method=method))
    return logp.grad.tolist()


def sft_gradient(monkeypatch, entropy=(0.9, 1.2, 1.5), **changes):
    """(∂L_SFT/∂log π, the logged number) of the demonstration above, from bridge.sft_pass."""
    logp = torch.tensor(LOGP[9:], dtype=torch.float64, requires_grad=True)
    found = logp, torch.tensor(entropy, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(bridge, "response_logprobs", lambda *a, **k: found)
    nll = bridge.sft_pass(None, [([1], [7, 8, 9])], 1.0, Settings(**changes))
    assert found[1].grad is None, "the entropy is a constant"
    return logp.grad.tolist(), nll.mean().item()


def test_chord_s_weight_of_sft_falls_along_a_cosine_after_a_linear_rise():
    falls = [baselines.chord_mu(k, 0, 200, 0.9, 0.05) for k in (0, 50, 100, 199, 200)]
    assert falls == pytest.approx([0.9, 0.77552, 0.475, 0.050052, 0.05], abs=5e-7)
    rises = [baselines.chord_mu(k, 200, 400, 0.5, 0.02) for k in (0, 100, 200, 400, 600)]
    assert rises == exactly([0, 0.25, 0.5, 0.26, 0.02])
    assert baselines.chord_mu(0, 0, 0, 0.9, 0.05) == 0.05, "without warm-up and decay there is no peak"


def test_chord_s_sft_loss_and_its_gradient_are_the_published_ones(monkeypatch):
    gradient, nll = sft_gradient(monkeypatch, method="chord")
    assert (gradient, nll) == (exactly([-1 / 3] * 3), exactly(1.15))
    gradient, nll = sft_gradient(monkeypatch, method="chord", chord_phi=True)
    assert gradient == exactly([-0.030069002659390054, -0.015464002154918142, -0.0740226417785819])
    assert nll == exactly(1.15), "the log has the plain loss"
    logp = torch.tensor(LOGP[9:], dtype=torch.float64, requires_grad=True)
    phi = baselines.chord_phi(logp)
    assert not phi.requires_grad
    assert -(phi * logp).mean().item() == exactly(0.15135681218078312)


def test_luffy_s_loss_and_its_gradient_are_the_published_ones(monkeypatch):
    logp, rollouts = published_batch("luffy")
    assert [A.item() for A in rollouts.advantage[[0, 3, 5, 9]]] == [0.5, -0.5, -0.5, 0.5]
    surrogate = torch.where(
        rollouts.is_demonstration, baselines.shaped_surrogate(logp, rollouts.advantage), rollouts.advantage
    )
    assert -surrogate.sum().item() / 6 == exactly(0.06879134186898726)
    gradient = rl_gradient(monkeypatch, "luffy")
    assert gradient[:9] == exactly([-0.5 / 6] * 3 + [0.5 / 6] * 6)
    assert gradient[9:] == exactly([-0.020833298527612783, -0.007173135138118757, -0.014803952163246696])


def test_srft_s_loss_and_its_gradient_are_the_published_ones(monkeypatch):
    logp, rollouts = published_batch("srft")
    A = rollouts.advantage
    surrogate = torch.where(rollouts.is_demonstration, baselines.shaped_surrogate(logp, A), A * logp)
    assert -surrogate.sum().item() / 6 == exactly(-0.7843154348348437)
    entropy = torch.tensor([0.9, 1.2, 1.5], dtype=torch.float64)
    weights = baselines.srft_sft_weights(entropy, [3])
    assert -(weights * logp[9:]).mean().item() == exactly(0.17318667184951622)
    rl, (sft, _) = rl_gradient(monkeypatch, "srft"), sft_gradient(monkeypatch, method="srft")
    assert rl[:9] == exactly([-0.02747868784500214] * 3 + [1 / 6] * 6)
    total = [a + b for a, b in zip(rl[9:], sft, strict=True)]
    assert total == exactly([-0.07103233384631313, -0.05737217045681911, -0.06500298748194705])


def test_srft_weighs_each_demonstration_by_its_own_entropy():
    entropy = torch.tensor([1.0, 3.0, 0.5])
    weights = baselines.srft_sft_weights(entropy, [2, 1])
    assert weights.tolist() == pytest.approx([0.5 * math.exp(-2)] * 2 + [0.5 * math.exp(-0.5)])
    assert baselines.srft_sft_weights(entropy[:0], []).shape == (0,)


def test_srft_s_advantage_is_positive_exactly_for_right_samples():
    is_right = torch.tensor([[True, False, False, False, True]])
    advantage = baselines.srft_advantages(torch.full((1, 5), 0.7), is_right, torch.zeros(1, 5))
    assert advantage.tolist() == [pytest.approx([0.1, -1, -1, -1, 0.7])], "the last is the demonstration"


def test_every_other_method_weighs_demonstration_tokens_alike():
    logp = torch.tensor([-0.1, -1.0, -3.0])
    for method in ("sft", "mix", "bridge", "chord", "hpt", "luffy"):
        weights = bridge.sft_token_weights(Settings(method=method), logp, -logp, [([], [1, 2, 3])])
        assert weights.tolist() == [1, 1, 1]


def test_chord_with_a_constant_weight_of_one_half_is_mix_with_mu_one():
    chord, mix = settings(method="chord", chord_peak=0.5, chord_valley=0.5), settings(method="mix", mu=1.0)
    assert all(bridge.updates(chord, k) == bridge.updates(mix, k) for k in (0, 7, 200))
    ours, expected = gradients(fresh(chord), chord)[0], gradients(fresh(mix), mix)[0]
    assert all(torch.equal(a, b) for a, b in zip(ours["theta"], expected["theta"], strict=True))


def odd(response, problem):
    """A reward that an untrained model often earns."""
    return float(sum(map(ord, response)) % 2)


def sampled(tmp_path, method, reward=odd, **changes):
    """(a run of 4 prompts and 4 samples, its first rollouts)."""
    run = make_run(tmp_path, **(dict(method=method, prompts_per_step=4, group_size=4, grad_clip=1e9) | changes))
    run.env.reward = reward
    reward.right_from = 1.0
    return run, sample(run)


def theta_gradient(run, rollouts, demonstrations, mu, lam):
    stats = gradients(run.m, run.s, mu, lam, rollouts, demos=demonstrations)
    return stats[0]["theta"], stats[1]


def test_hpt_without_imitation_is_rl_with_the_weights_of_dr_grpo(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "GATE", -1)
    run, rollouts = sampled(tmp_path, "hpt")
    assert rollouts.demonstrations == []
    ours, stats = theta_gradient(run, rollouts, run.demonstrations_of_update(rollouts)[0], 1.0, 1.0)
    assert "sft_nll" not in stats, "a mean over no demonstration is no number"
    rl = make_run(tmp_path, method="rl", aggregation="dr_grpo", prompts_per_step=4, group_size=4)
    rl.env.task, rl.env.reward = run.env.task, odd
    rl.prompt_order.count = run.prompt_order.count
    of_rl = sample(rl)
    assert of_rl.rows == rollouts.rows
    expected, _ = theta_gradient(rl, of_rl, [], 0.0, 1.0)
    assert any(g.any() for g in ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_hpt_with_imitation_everywhere_is_sft_on_the_prompts_of_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "GATE", 4)
    run, rollouts = sampled(tmp_path, "hpt")
    assert [prompt for prompt, _ in rollouts.demonstrations] == [prompt for prompt, _ in rollouts.rows[::4]]
    assert all(trace in run.demonstrations for trace in rollouts.demonstrations)
    ours, _ = theta_gradient(run, rollouts, run.demonstrations_of_update(rollouts)[0], 1.0, 1.0)
    expected, _ = theta_gradient(run, rollouts, rollouts.demonstrations, 1.0, 0.0)
    assert_close(ours, expected)


def test_hpt_imitates_where_no_sample_is_right():
    right = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 1]]).bool()
    assert baselines.hpt_imitates(right).tolist() == [True, False, False]


@pytest.mark.parametrize(
    "scale", [(10, 0, 10), (0.9, 0, 0.9), (1, -1, 0.5), (-2, -5, -2), (0.3, 0.1, 0.2), (2, 1, 1.5)]
)
@pytest.mark.parametrize("method", ["srft", "hpt"])
def test_rewards_of_another_scale_leave_what_is_right_to_srft_and_hpt(tmp_path, method, scale):
    best, worst, right_from = scale

    def scaled(response, problem):
        return best if is_odd(response, problem) else worst

    # One whole group is wrong, so that hpt imitates.
    def is_odd(response, problem):
        return problem.question != first and odd(response, problem) == 1

    def binary(response, problem):
        return float(is_odd(response, problem))

    first = ""
    run, _ = sampled(tmp_path, method, reward=binary)
    first = run.env.task.problems[run.prompt_order.take(1)[0][1]].question
    run.prompt_order.position = 4
    expected = sample(run)
    run.prompt_order.position = 4
    run.env.reward = scaled
    scaled.right_from = right_from
    found = sample(run)
    assert found.demonstrations == expected.demonstrations
    assert bool(found.demonstrations)
    assert found.weight.tolist() == expected.weight.tolist()
    samples = ~found.is_demonstration
    if method == "srft":
        assert found.advantage[samples].tolist() == expected.advantage[samples].tolist()
        assert {-1.0} < set(found.advantage[samples].tolist())
    assert found.stats["right_frac"] == expected.stats["reward"] == expected.stats["right_frac"]
    assert [r["right"] for r in found.records] == [r["reward"] == 1 for r in expected.records]


def test_hpt_has_rl_only_where_it_does_not_imitate(tmp_path):
    _, rollouts = sampled(tmp_path, "hpt", reward=lambda response, problem: odd(problem.question, problem))
    imitates = (rollouts.reward < 1).all(1)
    assert imitates.any()
    assert not imitates.all()
    weight = rollouts.weight[rollouts.offsets[:-1]].view(4, 4)
    assert (weight == 0).all(1).tolist() == imitates.tolist()
    assert [prompt for prompt, _ in rollouts.demonstrations] == [
        rollouts.rows[4 * i][0] for i, yes in enumerate(imitates) if yes
    ]


def test_hpt_with_a_kl_term_has_none_on_the_prompts_that_it_imitates(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "GATE", 4)  # all of them
    run, rollouts = sampled(tmp_path, "hpt", kl_coef=1.0)
    for p in run.m.parameters["theta"]:
        p.data.mul_(1.05)  # away from the reference
    assert not any(g.any() for g in theta_gradient(run, rollouts, [], 0.0, 1.0)[0])


def test_srft_s_samples_have_no_ratio_in_later_updates_either(tmp_path):
    run, rollouts = sampled(tmp_path, "srft", updates_per_rollout=2)
    _, stats = theta_gradient(run, rollouts, rollouts.demonstrations, 1.0, 1.0)
    bridge.clip_and_step(run.m, stats, run.s)
    later, _ = theta_gradient(run, rollouts, [], 0.0, 1.0)
    rollouts.old_logp = None  # as in a first update
    expected, _ = theta_gradient(run, rollouts, [], 0.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(later, expected, strict=True))


def test_luffy_has_no_gradient_if_samples_and_expert_are_all_right(tmp_path):
    run, rollouts = sampled(tmp_path, "luffy", reward=lambda *_: 1.0)
    assert not any(g.any() for g in theta_gradient(run, rollouts, [], 0.0, 1.0)[0])
    run, rollouts = sampled(tmp_path, "luffy", reward=odd)
    assert any(g.any() for g in theta_gradient(run, rollouts, [], 0.0, 1.0)[0])


def test_the_expert_is_graded_like_a_sample_and_stands_last_in_its_group(tmp_path):
    run, rollouts = sampled(tmp_path, "luffy", reward=lambda response, problem: 0.0)
    assert rollouts.reward.shape == (4, 5)
    assert not rollouts.reward.any(), "an expert that is graded wrong has no reward"
    run = make_run(tmp_path, method="luffy", prompts_per_step=4, group_size=4)  # the built-in reward
    for question, [(prompt, _)] in list(run.env.demonstrations_of.items())[::2]:
        run.env.demonstrations_of[question] = [(prompt, boxed(run, "x", 0).ids)]
    rollouts = sample(run)
    wrong = [rollouts.rows[5 * i + 4][1] == boxed(run, "x", 0).ids for i in range(4)]
    assert any(wrong) != all(wrong), "the case must have both"
    assert rollouts.reward[:, 4].tolist() == [float(not w) for w in wrong]
    assert [record["finish_reason"] for record in rollouts.records][4] == "demonstration"
    is_expert = rollouts.is_demonstration[rollouts.offsets[:-1]].view(4, 5)
    assert is_expert[:, 4].all() and not is_expert[:, :4].any()  # noqa: PT018


def test_statistics_are_those_of_samples_alone(tmp_path):
    run, rollouts = sampled(tmp_path, "srft", reward=lambda response, problem: float(problem.answer in response))
    samples = [row[1] for i, row in enumerate(rollouts.rows) if i % 5 < 4]
    assert rollouts.stats["reward"] == pytest.approx(rollouts.reward[:, :4].mean().item())
    assert rollouts.stats["sampled_tokens"] == sum(map(len, samples))
    _, stats = theta_gradient(run, rollouts, rollouts.demonstrations, 1.0, 1.0)
    assert stats["logp_gap_max"] < 1e-3
    assert stats["entropy"] == pytest.approx(-rollouts.sampler_logp[~rollouts.is_demonstration].mean().item())
    assert rollouts.sampler_logp[rollouts.is_demonstration].isnan().all()


def test_srft_s_samples_are_weighted_by_the_estimated_entropy_of_their_sequence(tmp_path):
    _, rollouts = sampled(tmp_path, "srft")
    offsets, reward = rollouts.offsets, rollouts.reward.flatten()
    for i in (i for i in range(20) if i % 5 < 4):
        tokens = slice(offsets[i], offsets[i + 1])
        right = 0.1 * (-rollouts.sampler_logp[tokens]).mean().exp().item()
        assert rollouts.advantage[tokens].tolist() == pytest.approx(
            [right if reward[i] == 1 else -1.0] * len(rollouts.rows[i][1]), rel=1e-5
        )


@pytest.mark.parametrize("method", ["luffy", "srft"])
@pytest.mark.parametrize("tokens", [16384, 60, 1])
def test_the_gradient_is_that_of_the_formula_on_all_rows_in_any_micro_batches(tmp_path, method, tokens):
    run, rollouts = sampled(tmp_path, method, tokens_per_micro_batch=tokens)
    rollouts.rows[3] = rollouts.rows[4]  # a sample equal to its prompt's expert: each has its own term
    lengths = torch.tensor([len(response) for _, response in rollouts.rows])
    of_row = torch.tensor([-1.0, 0.3, 0.5, 0.7, 0.7] * 4)  # equal advantages, too
    rollouts.reward[0, 3:] = 1.0
    rollouts.advantage, rollouts.weight = of_row.repeat_interleave(lengths), torch.ones(int(lengths.sum())) / 500
    rollouts.is_demonstration = torch.tensor([False] * 4 + [True]).repeat(4).repeat_interleave(lengths)
    rollouts.sampler_logp = torch.zeros(len(rollouts.weight))
    assert {3, 4} <= set(rollouts.rows_to_run(has_kl=False)[0])
    ours, _ = theta_gradient(run, rollouts, [], 0.0, 1.0)
    logp, _ = response_logprobs(run.m.policy, rollouts.rows)
    p, A = logp.exp(), rollouts.advantage
    loss = -torch.where(rollouts.is_demonstration, p / (p + 0.1) * A, (logp - logp.detach()).exp() * A).sum() / 500
    assert_close(ours, torch.autograd.grad(loss, run.m.parameters["theta"]))


@pytest.mark.parametrize("method", PAIRED)
def test_the_ratio_is_not_clipped_and_the_weights_are_dr_grpo_s(tmp_path, method):
    run, rollouts = sampled(tmp_path, method)
    assert rollouts.weight.tolist() == pytest.approx([1 / (rollouts.reward.numel() * 80)] * len(rollouts.weight))
    rollouts.old_logp = torch.full_like(rollouts.weight, -9.0)  # ratios far above 1
    rollouts.old_logp[::2] = 0.0  # and below
    assert theta_gradient(run, rollouts, [], 0.0, 1.0)[1]["clip_frac"] == 0
    for setting in ("aggregation", "clip_high", "overlong_mask", "dynamic_sampling", "sft_batch"):
        flags = {"aggregation": ["dapo"], "overlong_mask": []}.get(setting, ["3"])
        text = refused("--method", method, f"--{setting.replace('_', '-')}", *flags, "--out", tmp_path / "no")
        assert f"{setting} does nothing with method {method}" in text


def demonstration(question, answer="1"):
    return Demonstration(question, f"\\boxed{{{answer}}}", answer)


def test_prompts_are_those_with_a_demonstration_and_else_the_demonstrations_own():
    shown = [demonstration("a", "1"), demonstration("b", "2"), demonstration("b", "2")]
    rows = [([0], [i]) for i in range(3)]
    task = Task([Problem("b", "2"), Problem("c", "3")], shown, [])
    assert pair(task, rows, "hpt") == {"a": [rows[0]], "b": [rows[1], rows[2]]}
    assert task.problems == [Problem("b", "2")]
    assert task.notes == ["method hpt: 1 of 2 prompts have a demonstration: kept"]
    task = Task([Problem("c", "3")], shown, [])
    pair(task, rows, "luffy")
    assert task.problems == [Problem("a", "1"), Problem("b", "2")]
    assert task.notes == ["method luffy: no prompt has a demonstration; the 2 questions of sft_data replace them"]
    with pytest.raises(DataError, match="method srft needs demonstrations of its prompts"):
        pair(Task([Problem("c", "3")], [Demonstration("a", "no box")], []), rows[:1], "srft")


def test_every_prompt_of_the_built_in_task_has_its_demonstration_even_if_long_ones_are_dropped(tmp_path):
    run = make_run(tmp_path, method="hpt", max_new_tokens=20)
    env, kept = run.env, len(run.demonstrations)
    assert 0 < kept < 256
    assert len(env.task.problems) == run.prompt_order.count == kept
    assert {tuple(env.encode(p.question)) for p in env.task.problems} == {
        tuple(prompt) for prompt, _ in run.demonstrations
    }
    for p in env.task.problems:
        [(prompt, _)] = env.demonstrations_of[p.question]
        assert prompt == env.encode(p.question)


@pytest.mark.parametrize("method", PAIRED)
def test_several_demonstrations_of_a_question_are_drawn_in_turn(tmp_path, method):
    run = make_run(tmp_path, method=method, prompts_per_step=4, group_size=2)
    run.env.task.problems = run.env.task.problems[:4]
    run.prompt_order.count = 4  # a step is a pass over D_RL
    run.env.reward = lambda response, problem: 0.0
    run.env.reward.right_from = 1.0
    counts = [1, 2, 3, 3]
    for p, count in zip(run.env.task.problems, counts, strict=True):
        run.env.demonstrations_of[p.question] = [
            (run.env.encode(p.question), boxed(run, str(i), 0).ids) for i in range(count)
        ]
    drawn = {tuple(run.env.encode(p.question)): [] for p in run.env.task.problems}
    for _ in range(6):
        for prompt, response in sample(run).demonstrations:
            drawn[tuple(prompt)].append(tuple(response))
    for seen, count in zip(drawn.values(), counts, strict=True):
        assert len(seen) == 6
        assert [seen.count(response) for response in set(seen)] == [6 // count] * count
    firsts = [seen[0] for seen in drawn.values()]
    assert len(set(firsts)) > 1, "one pass takes the first demonstration of some questions and later ones of others"


@pytest.mark.parametrize("stated", ["'1'", "float('nan')", "[1, 2]", "1j"])
def test_what_is_right_must_be_stated_as_a_number(tmp_path, stated):
    file = tmp_path / f"stated_{len(stated)}.py"  # a module is imported once per process
    file.write_text(f"def f(response, problem):\n    return 1\n\n\nf.right_from = {stated}\n")
    with pytest.raises(SettingError, match=r"py:f\.right_from must be a finite number, it is"):
        load_reward(f"{file}:f")


@pytest.mark.parametrize("stated", ["np.float64(0.5)", "torch.tensor([0.5])", "True"])
def test_what_is_right_may_be_a_number_of_another_library(tmp_path, stated):
    file = tmp_path / f"other_{len(stated)}.py"
    file.write_text(f"import numpy as np\nimport torch\n\n\ndef f(*_):\n    return 1\n\n\nf.right_from = {stated}\n")
    right_from = load_reward(f"{file}:f").right_from
    assert type(right_from) is float
    assert json.dumps(right_from <= 1.0) == "true"


@pytest.mark.parametrize("method", ["rl", "bridge", *PAIRED])
def test_a_reward_without_a_statement_of_what_is_right_is_refused_by_the_methods_that_ask(tmp_path, method):
    file = tmp_path / "scale.py"
    file.write_text("def f(response, problem):\n    return 10 * len(response)\n")
    flags = ["--preset", "smoke", "--method", method, "--steps", "1", "--out", tmp_path / "run", "--eval-problems", "1"]
    flags += ["--reward", f"{file}:f"]
    if method in ("srft", "hpt"):
        text = refused(*flags)
        assert f"method {method} asks which responses are right: state in the file of reward {file}:f" in text
        assert "f.right_from = 1" in text
    else:
        bridge.main([str(flag) for flag in flags])
        (metrics,) = lines(tmp_path / "run" / "metrics.jsonl")
        assert metrics["right_frac"] is None
        assert all(sample["right"] is None for sample in lines(tmp_path / "run" / "samples.jsonl"))


@pytest.mark.parametrize("method", PAIRED)
def test_each_baseline_resumes_bit_for_bit(tmp_path, method):
    flags = ["--method", method, "--save-every", "5", "--eval-every", "1"]
    run(tmp_path / "through", *flags, steps=3)
    run(tmp_path / "resumed", *flags, steps=1)
    run(tmp_path / "resumed", *flags, "--resume", steps=3)
    assert_identical(tmp_path / "through", tmp_path / "resumed")
    metrics = lines(tmp_path / "through" / "metrics.jsonl")
    assert all((m["sft_nll"] is None) == (method == "luffy") for m in metrics)
    assert all(m["skipped_in_a_row"] == 0 and m["entropy"] > 0 for m in metrics)
