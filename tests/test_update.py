"""The bilevel update: facts that follow from eqs. (8), (10) and (11), checked on the functions training uses."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import rows, tiny_model

import bridge
import grpo
import lora
from logprob import response_logprobs
from rollout import Rollouts
from settings import METHODS, SettingError, Settings

RATES = dict(alpha=0.01, beta=0.02, lora_rank=4, lora_alpha=8.0)


def settings(**changes):
    return Settings(**(RATES | changes))


def make_rollouts(model, seed=0, groups=3, samples=4):
    """Random completions with random rewards; the sampler's log-probs are the policy's own."""
    batch = [
        (prompt, response) for prompt, _ in rows(groups, seed) for _, response in rows(samples, seed + len(prompt))
    ]
    g = torch.Generator().manual_seed(seed)
    reward = torch.rand(groups, samples, generator=g).round(decimals=1)
    lengths = torch.tensor([len(r) for _, r in batch])
    with torch.no_grad():
        logp, _ = response_logprobs(model, batch)
    return Rollouts(
        rows=batch, reward=reward, advantage=grpo.group_advantages(reward).flatten().repeat_interleave(lengths),
        weight=grpo.token_weights(lengths, "grpo", 16), sampler_logp=logp, stats={"reward": 0.5}, records=[],
        is_demonstration=torch.zeros(len(logp), dtype=torch.bool),
    )  # fmt: skip


def repetitive_rollouts(model):
    """Three groups of four: two completions occur twice or more; one group has no reward, one has all the reward."""
    rollouts = make_rollouts(model)
    for group, copies in enumerate(([0, 1, 0, 3], [0, 1, 1, 3], [0, 0, 0, 3])):
        rollouts.rows[4 * group : 4 * group + 4] = [rollouts.rows[4 * group + i] for i in copies]
    rollouts.reward = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    lengths = torch.tensor([len(r) for _, r in rollouts.rows])
    rollouts.advantage = grpo.group_advantages(rollouts.reward).flatten().repeat_interleave(lengths)
    rollouts.weight = grpo.token_weights(lengths, "grpo", 16)
    with torch.no_grad():
        rollouts.sampler_logp, _ = response_logprobs(model, rollouts.rows)
    rollouts.is_demonstration = torch.zeros_like(rollouts.weight, dtype=torch.bool)
    rollouts.score_rewarded = True
    return rollouts


def fresh(s, w_trained=False):
    """Policies at iterate 0; with `w_trained`, B is not zero, so that A has a gradient too."""
    m = bridge.make_policies(tiny_model(), s)
    if w_trained:
        g = torch.Generator().manual_seed(3)
        for p in m.w.values():
            p.data = torch.randn(p.shape, generator=g) * 0.1
    return m


def move_shadow(m, by=0.3):
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in m.parameters["theta_hat"]:
            p.add_(by * p.abs().mean() * torch.randn(p.shape, generator=g))


def update(m, s, rollouts, rollouts_hat=None, demos=(), sft=0.0, rl=1.0):
    """Writes the gradients of one update, as the train loop does; returns its metrics."""
    rollouts_hat = rollouts_hat or rollouts
    seen = bridge.bilevel_gradients(m, rollouts, rollouts_hat, demos, sft, rl, s, lambda phase: nullcontext())
    bridge.keep_old_logp(seen, rollouts, rollouts_hat, s)
    return seen.stats


def gradients(m, s, sft=None, rl=None, rollouts=None, rollouts_hat=None, demos=None):
    """.grad of θ, w, θ̂ after bilevel_gradients, and what it reports."""
    rollouts = rollouts or make_rollouts(m.policy)
    a, b = bridge.updates(s, 0)[0] if sft is None else (sft, rl)
    demos = rows(4, seed=9) if demos is None else demos
    stats = update(m, s, rollouts, rollouts_hat, demos, a, b)
    return {n: [p.grad.clone() if p.grad is not None else None for p in ps] for n, ps in m.parameters.items()}, stats


def assert_close(a, b, tolerance=2e-5):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=tolerance * max(1.0, y.abs().max().item()))


@pytest.mark.parametrize("tokens", [16384, 30])
@pytest.mark.parametrize(("cap", "kl"), [(None, 0.0), (2.0, 0.0), (2.0, 0.1)])
def test_work_that_changes_nothing_is_not_done_and_gradients_and_results_are_those_of_all_rows(tokens, cap, kl):
    s = settings(tokens_per_micro_batch=tokens, kl_coef=kl)
    m = fresh(s, w_trained=True)
    move_shadow(m)
    rollouts = repetitive_rollouts(m.policy)
    rollouts.old_logp = rollouts.sampler_logp
    ours = bridge.rl_pass(m.shadow, rollouts, rollouts.old_logp, m.reference, s, cap)
    gradients_of_ours = [p.grad.clone() for p in m.parameters["theta_hat"] + m.parameters["w"]]
    for p in m.parameters["theta_hat"] + m.parameters["w"]:
        p.grad = None
    logp, _ = response_logprobs(m.shadow, rollouts.rows, s.temperature)
    with torch.no_grad():
        ref_logp = response_logprobs(m.reference, rollouts.rows, s.temperature)[0] if kl else None
    loss, terms = grpo.grpo_loss(
        logp, rollouts.old_logp, rollouts.advantage, rollouts.weight, (0.2, 0.2), cap, ref_logp, kl
    )
    loss.backward()
    for a, b in zip(gradients_of_ours, [p.grad for p in m.parameters["theta_hat"] + m.parameters["w"]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    run = torch.tensor([bool(kl) or i not in (4, 5, 6, 7) for i in range(12)])  # all but the group without a reward
    run = run.repeat_interleave(torch.tensor([len(r) for _, r in rollouts.rows]))
    for name, expected in {"logp": logp, **vars(terms)}.items():
        torch.testing.assert_close(getattr(ours, name), expected.float() * run, rtol=1e-4, atol=1e-5, msg=name)


def test_only_rows_with_a_gradient_run_backward_and_those_without_reward_do_not_run(monkeypatch):
    s, fed = settings(), []
    m = fresh(s)
    rollouts = repetitive_rollouts(m.policy)
    real = bridge.response_logprobs
    monkeypatch.setattr(
        bridge,
        "response_logprobs",
        lambda model, rows, *rest: fed.append((rows, torch.is_grad_enabled())) or real(model, rows, *rest),
    )
    bridge.rl_pass(m.policy, rollouts, rollouts.old_logp, None, s)
    assert fed == [(rollouts.rows[:4], True), (rollouts.rows[8:], False)]
    fed.clear()
    rollouts.score_rewarded = False
    bridge.rl_pass(m.policy, rollouts, rollouts.old_logp, None, s)
    assert fed == [(rollouts.rows[:4], True)]


def test_a_row_whose_tokens_have_no_weight_has_no_gradient():
    rollouts = repetitive_rollouts(fresh(settings()).policy)
    lengths = [len(response) for _, response in rollouts.rows]
    rollouts.weight[: lengths[0]] = 0.0
    rollouts.weight[lengths[0] : lengths[0] + lengths[1] - 1] = 0.0  # all but the last token
    assert rollouts.rows_to_run(has_kl=False) == ([1, 2, 3], [0, 8, 9, 10, 11])
    assert rollouts.rows_to_run(has_kl=True) == ([1, 2, 3, *range(4, 12)], [0])


def test_without_any_signal_gradients_are_zero_and_all_numbers_finite():
    s = settings()
    m = fresh(s, w_trained=True)
    move_shadow(m)
    rollouts = repetitive_rollouts(m.policy)
    rollouts.reward[0] = 0
    rollouts.advantage.zero_()
    grads, stats = gradients(m, s, 0.0, 1.0, rollouts, demos=[])
    assert all(g is not None and not g.any() for name in grads for g in grads[name])
    assert all(math.isfinite(x) for x in stats.values())


@pytest.mark.parametrize("tokens", [16384, 60])
@pytest.mark.parametrize("lam", [0.5, 0.3])
def test_at_the_first_step_the_gain_part_of_w_s_gradient_is_exactly_zero(lam, tokens):
    s = settings(lam=lam, tokens_per_micro_batch=tokens)
    g, stats = gradients(fresh(s, w_trained=True), s)
    assert stats["gain_grad_norm"] == 0.0
    assert stats["cooperative_gain"] == pytest.approx(0, abs=1e-6)
    only_sft, _ = gradients(fresh(s, w_trained=True), s, sft=1 - lam, rl=0)
    assert all(torch.equal(a, b) for a, b in zip(g["w"], only_sft["w"], strict=True))


def test_once_the_shadow_has_moved_the_gain_has_a_gradient():
    s = settings()
    m = fresh(s, w_trained=True)
    move_shadow(m)
    _, stats = gradients(m, s)
    assert stats["gain_grad_norm"] > 1e-3


@pytest.mark.parametrize("cap", [0.0, 1.0, 2.0, float("inf")])
@pytest.mark.parametrize(("updates", "tokens"), [(1, 16384), (1, 60), (2, 16384), (3, 60)])
def test_with_lambda_one_and_shared_rollouts_shadow_and_base_stay_identical_and_w_never_moves(updates, tokens, cap):
    s = settings(lam=1.0, tokens_per_micro_batch=tokens, shadow_ratio_cap=cap, kl_coef=0.1)
    m = fresh(s)
    w = {n: p.clone() for n, p in m.w.items()}
    start = [p.clone() for p in m.parameters["theta"]]
    for step in range(3):
        rollouts = make_rollouts(m.policy, seed=step)
        for _ in range(updates):
            stats = update(m, s, rollouts)
            assert stats["gain_grad_norm"] == 0.0
            bridge.clip_and_step(m, stats, s)
        assert all(torch.equal(a, b) for a, b in zip(m.parameters["theta"], m.parameters["theta_hat"], strict=True))
    assert updates == 1 or stats["clip_frac"] > 0 or cap == float("inf"), "the case must exercise clip or cap"
    assert all(torch.equal(p, w[n]) for n, p in m.w.items())
    assert not all(torch.equal(a, b) for a, b in zip(m.parameters["theta"], start, strict=True))


def test_policy_and_shadow_have_one_surrogate_on_shared_rollouts_and_the_clip_on_own_ones(monkeypatch):
    caps, real = [], grpo.grpo_loss
    monkeypatch.setattr(grpo, "grpo_loss", lambda *a: caps.append(a[5]) or real(*a))
    for changes, expected in (
        (dict(), [2.0, 2.0]), (dict(shadow_ratio_cap=0.0), [None, None]), (dict(shadow_rollouts="own"), [None, None]),
        (dict(method="mix_lora"), [None]), (dict(shadow_rollouts="one_step", shadow_ratio_cap=3.0), [3.0, 3.0]),
    ):  # fmt: skip
        s, m = settings(**changes), fresh(settings(**changes))
        own = make_rollouts(m.policy, seed=5) if s.shadow_rollouts == "own" else None
        gradients(m, s, rollouts_hat=own)
        assert caps == expected, changes
        caps.clear()


@pytest.mark.parametrize("lam", [0.5, 0.2])
def test_with_w_frozen_theta_s_gradient_is_mix_s(lam):
    """Eq. (8) is the mixture J_RL + μ·J_SFT with μ = (1−λ)/λ, its weights scaled to sum to 1."""
    s, mix = settings(lam=lam), settings(method="mix", mu=(1 - lam) / lam)
    g, _ = gradients(fresh(s), s)
    expected, _ = gradients(fresh(mix), mix)
    assert_close(g["theta"], expected["theta"])


def test_without_j_meta_w_takes_sft_alone_and_theta_the_same_as_in_bridge():
    s, full = settings(method="no_meta", lam=0.3), settings(lam=0.3)
    m = fresh(s, w_trained=True)
    assert m.shadow is None
    g, _ = gradients(m, s)
    only_sft, _ = gradients(fresh(s, w_trained=True), s, sft=0.7, rl=0)
    assert all(torch.equal(a, b) for a, b in zip(g["w"], only_sft["w"], strict=True))
    of_bridge, _ = gradients(fresh(full, w_trained=True), full)
    assert all(torch.equal(a, b) for a, b in zip(g["theta"], of_bridge["theta"], strict=True))
    mixed, _ = gradients(fresh(s, w_trained=True), settings(method="mix_lora", lam=0.3))
    assert not all(torch.equal(a, b) for a, b in zip(g["w"], mixed["w"], strict=True)), "mix_lora's w takes RL, too"


@pytest.mark.parametrize("grad_clip", [1.0, 0.01])
def test_the_one_step_shadow_is_the_next_iterate_of_rl_alone_and_keeps_no_moments(grad_clip):
    """θ̂ = θ^k after the step that θ's optimizer would make with ∇J_RL only; then the gain has a gradient at once."""
    s = settings(shadow_rollouts="one_step", grad_clip=grad_clip)
    m = fresh(s, w_trained=True)
    for step in range(3):
        rl_alone = copy.deepcopy(m)
        rl_alone.shadow = None
        rollouts = make_rollouts(m.policy, seed=step)
        theta = [p.clone() for p in m.parameters["theta"]]
        stats = update(rl_alone, s, rollouts)
        del rl_alone.optimizers["w"], rl_alone.optimizers["theta_hat"]
        bridge.clip_and_step(rl_alone, stats, s)
        rollouts = make_rollouts(m.policy, seed=step)
        stats = update(m, s, rollouts, demos=rows(4), sft=0.5, rl=0.5)
        assert all(torch.equal(p, q) for p, q in zip(theta, m.parameters["theta"], strict=True)), "θ is still at k"
        expected = rl_alone.parameters["theta"]
        assert all(torch.equal(p, q) for p, q in zip(m.parameters["theta_hat"], expected, strict=True))
        assert stats["gain_grad_norm"] > 1e-5
        bridge.clip_and_step(m, stats, s)
        assert all(torch.equal(p, q) for p, q in zip(m.parameters["theta_hat"], expected, strict=True))
        assert not m.optimizers["theta_hat"].state


def test_a_gradient_that_is_not_finite_leaves_the_one_step_shadow_at_theta():
    s = settings(shadow_rollouts="one_step")
    m = fresh(s)
    for p in m.parameters["theta"]:
        p.grad = torch.full_like(p, math.nan)
    bridge.step_shadow_from_theta(m, s)
    assert all(torch.equal(p, q) for p, q in zip(m.parameters["theta_hat"], m.parameters["theta"], strict=True))


def test_the_one_step_gain_s_gradient_is_taken_at_the_stepped_shadow():
    lam, s = 0.3, settings(lam=0.3, shadow_rollouts="one_step")
    m = fresh(s, w_trained=True)
    rollouts = make_rollouts(m.policy)
    g, _ = gradients(m, s, rollouts=rollouts)
    rollouts.old_logp = rollouts.sampler_logp

    def alone(backward):
        for p in m.w.values():
            p.grad = None
        backward()
        return [p.grad for p in m.w.values()]

    sft = alone(lambda: bridge.sft_pass(m.policy, rows(4, seed=9), 1.0, s))
    rl = alone(lambda: bridge.rl_pass(m.policy, rollouts, rollouts.old_logp, None, s))
    rl_hat = alone(lambda: bridge.rl_pass(m.shadow, rollouts, rollouts.old_logp, None, s, ratio_cap=s.shadow_ratio_cap))
    assert_close(g["w"], [(1 - lam) * a + lam * (b - c) for a, b, c in zip(sft, rl, rl_hat, strict=True)])


def test_the_seed_decides_the_adapter_at_the_start():
    a, b, same_seed = (fresh(settings(seed=seed)).w for seed in (3, 4, 3))
    for name in a:
        assert torch.equal(a[name], same_seed[name])
        assert torch.equal(a[name], b[name]) == ("lora_B" in name)


def test_alternating_has_an_adam_state_for_each_of_its_two_updates():
    s = settings(method="alternating", alpha=0.001)
    m = fresh(s)
    for k in range(2):
        rollouts = make_rollouts(m.policy, seed=k)
        for mu, lam in bridge.updates(s, k):
            stats = update(m, s, rollouts, None, rows(4), mu, lam)
            before = [p.clone() for p in m.parameters["theta"]]
            bridge.clip_and_step(m, stats, s, lam)
            moved = max((p - q).abs().max().item() for p, q in zip(m.parameters["theta"], before, strict=True))
            assert moved == pytest.approx(s.alpha, rel=0.01) or k > 0, "Adam's first step moves by its rate"
    steps = {name: {int(state["step"]) for state in o.state.values()} for name, o in m.optimizers.items()}
    assert steps == {"theta": {2}, "theta_sft": {2}}


def test_a_constant_reward_moves_no_parameter():
    s = settings(method="rl")
    m = fresh(s)
    rollouts = make_rollouts(m.policy, samples=6)
    lengths = torch.tensor([len(r) for _, r in rollouts.rows])
    rollouts.advantage = grpo.group_advantages(torch.full((3, 6), 0.3)).flatten().repeat_interleave(lengths)
    before = [p.clone() for p in m.parameters["theta"]]
    _, stats = gradients(m, s, rollouts=rollouts)
    bridge.clip_and_step(m, stats, s)
    assert all(torch.equal(p, q) for p, q in zip(m.parameters["theta"], before, strict=True))


def test_the_sft_loss_is_taken_at_temperature_one_whatever_the_sampling_temperature():
    m = fresh(settings())
    losses = [bridge.sft_pass(m.policy, rows(4), 1.0, settings(temperature=t)).mean().item() for t in (0.5, 1.0)]
    expected = -torch.cat([response_logprobs(m.policy, [row])[0] for row in rows(4)]).mean()
    assert losses == pytest.approx([expected.item()] * 2, rel=1e-6)


@pytest.mark.parametrize("changes", [dict(), dict(clip_low=0.02), dict(clip_high=0.02), dict(temperature=0.7)])
def test_clips_and_temperature_reach_the_rl_loss(changes):
    s = settings(method="rl", **changes)
    m = fresh(s)
    rollouts = make_rollouts(m.policy)
    noise = torch.randn(len(rollouts.weight), generator=torch.Generator().manual_seed(0))
    rollouts.old_logp = rollouts.sampler_logp + 0.1 * noise
    bridge.rl_pass(m.policy, rollouts, rollouts.old_logp, None, s)
    taken = [p.grad.clone() for p in m.parameters["theta"]]
    logp, _ = response_logprobs(m.policy, rollouts.rows, s.temperature)
    clip = (changes.get("clip_low", 0.2), changes.get("clip_high", 0.2))
    loss, _ = grpo.grpo_loss(logp, rollouts.old_logp, rollouts.advantage, rollouts.weight, clip)
    assert_close(taken, torch.autograd.grad(loss, m.parameters["theta"]))


def test_theta_gets_nothing_from_the_shadow_s_loss():
    s, without = settings(), settings(method="mix_lora")
    m = fresh(s, w_trained=True)
    move_shadow(m)
    g, _ = gradients(m, s)
    expected, _ = gradients(fresh(without, w_trained=True), without)
    assert all(torch.equal(a, b) for a, b in zip(g["theta"], expected["theta"], strict=True))


def test_the_shadow_gets_nothing_from_sft_and_the_full_weight_of_rl():
    s = settings(lam=0.3)
    m = fresh(s, w_trained=True)
    move_shadow(m)
    rollouts = make_rollouts(m.policy)
    g, _ = gradients(copy.deepcopy(m), s, rollouts=copy.deepcopy(rollouts))
    other_demos, _ = gradients(copy.deepcopy(m), s, rollouts=copy.deepcopy(rollouts), demos=rows(7, seed=30))
    assert all(torch.equal(a, b) for a, b in zip(g["theta_hat"], other_demos["theta_hat"], strict=True))
    other_lam, _ = gradients(copy.deepcopy(m), s, 0.1, 0.9, rollouts=copy.deepcopy(rollouts))
    assert all(torch.equal(a, b) for a, b in zip(g["theta_hat"], other_lam["theta_hat"], strict=True)), "θ̂ has no λ"
    bridge.rl_pass(m.shadow, rollouts, rollouts.sampler_logp, None, s, ratio_cap=s.shadow_ratio_cap)
    assert_close(g["theta_hat"], [p.grad for p in m.parameters["theta_hat"]])


def test_theta_s_gradient_is_the_weighted_sum_of_two_separate_ones():
    """Eq. (8), each term by itself: (1−λ)∇L_SFT + λ∇L_RL(θ,w)."""
    lam, s = 0.3, settings(lam=0.3)
    m = fresh(s, w_trained=True)
    rollouts = make_rollouts(m.policy)
    g, _ = gradients(copy.deepcopy(m), s, rollouts=copy.deepcopy(rollouts))
    separate = []
    for backward in (
        lambda policy: bridge.sft_pass(policy, rows(4, seed=9), 1.0, s),
        lambda policy: bridge.rl_pass(policy, rollouts, None, None, s),
    ):
        copied = copy.deepcopy(m)
        backward(copied.policy)
        separate.append([p.grad for p in copied.parameters["theta"]])
    assert_close(g["theta"], [(1 - lam) * sft + lam * rl for sft, rl in zip(*separate, strict=True)])


def test_w_s_gradient_is_the_weighted_sum_of_three_separate_ones():
    """Eq. (11), each term by itself: (1−λ)∇L_SFT + λ(∇L_RL(θ,w) − ∇L_RL(θ̂,w))."""
    lam, s = 0.3, settings(lam=0.3)
    m = fresh(s, w_trained=True)
    move_shadow(m)
    rollouts = make_rollouts(m.policy)
    g, _ = gradients(copy.deepcopy(m), s, rollouts=copy.deepcopy(rollouts))

    def alone(backward):
        copied = copy.deepcopy(m)
        backward(copied)
        return [p.grad for p in copied.w.values()]

    rollouts.old_logp = rollouts.sampler_logp
    sft = alone(lambda c: bridge.sft_pass(c.policy, rows(4, seed=9), 1.0, s))
    rl = alone(lambda c: bridge.rl_pass(c.policy, rollouts, rollouts.old_logp, None, s))
    rl_hat = alone(
        lambda c: bridge.rl_pass(c.shadow, rollouts, rollouts.old_logp, None, s, ratio_cap=s.shadow_ratio_cap)
    )
    assert_close(g["w"], [(1 - lam) * a + lam * (b - c) for a, b, c in zip(sft, rl, rl_hat, strict=True)])


@pytest.mark.parametrize("loss", ["sft", "rl", "shadow"])
def test_gradients_of_a_and_b_are_projections_of_the_merged_weight_s(loss):
    """∇_B = s·G·Aᵀ and ∇_A = s·Bᵀ·G with G the gradient of the merged weight."""
    s = settings()
    m = fresh(s, w_trained=True)
    move_shadow(m)
    rollouts = make_rollouts(m.policy)
    rollouts.old_logp = rollouts.sampler_logp
    adapted = m.shadow if loss == "shadow" else m.policy
    merged = tiny_model()
    lora.merge_into(merged, adapted)
    for model in (adapted, merged):
        if loss == "sft":
            bridge.sft_pass(model, rows(4, seed=9), 1.0, s)
        else:
            bridge.rl_pass(model, rollouts, rollouts.old_logp, None, s, ratio_cap=2.0 if loss == "shadow" else None)
    scale, checked = s.lora_alpha / s.lora_rank, 0
    for name, module in adapted.named_modules():
        if isinstance(module, lora.LoRALinear):
            G = merged.get_submodule(name).weight.grad
            expected = scale * G @ module.lora_A.T, scale * module.lora_B.T @ G, G
            assert_close([module.lora_B.grad, module.lora_A.grad, module.base.weight.grad], expected)
            checked += 1
    assert checked == 14


@pytest.mark.parametrize("tokens", [1, 30, 60])
def test_the_split_into_micro_batches_changes_no_gradient(tokens):
    whole, split = settings(kl_coef=0.1), settings(kl_coef=0.1, tokens_per_micro_batch=tokens)
    results = []
    for s in (whole, split):
        m = fresh(s, w_trained=True)
        move_shadow(m)
        results.append(gradients(m, s)[0])
    for name in results[0]:
        assert_close(results[1][name], results[0][name])


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("varies", ["advantage", "weight"])
def test_advantages_and_weights_may_differ_between_the_tokens_of_a_row(varies, kl_coef):
    s = settings(method="rl", kl_coef=kl_coef)
    m = fresh(s)
    rollouts = repetitive_rollouts(m.policy)
    T = len(rollouts.weight)
    numbers = getattr(rollouts, varies)
    for i in range(4):  # one group: rows 0 and 2 have equal tokens
        tokens = slice(rollouts.offsets[i], rollouts.offsets[i + 1])
        numbers[tokens] = torch.linspace(0, 1 + i, tokens.stop - tokens.start)  # that of the first token is 0
    g, _ = gradients(m, s, rollouts=rollouts)
    logp, _ = response_logprobs(m.policy, rollouts.rows)
    loss = -(rollouts.weight * rollouts.advantage * (logp - logp.detach()).exp()).sum()  # KL is 0 at the reference
    assert_close(g["theta"], torch.autograd.grad(loss, m.parameters["theta"]))
    assert len(logp) == T


def test_the_order_of_rows_changes_no_gradient():
    s = settings()
    m = fresh(s, w_trained=True)
    r = make_rollouts(m.policy)
    lengths = [len(response) for _, response in r.rows]
    order = [7, 2, 11, 0, 5, 1, 10, 3, 9, 4, 8, 6]
    parts = {n: getattr(r, n).split(lengths) for n in ("advantage", "weight", "sampler_logp")}
    shuffled = Rollouts(
        rows=[r.rows[i] for i in order], reward=r.reward, stats={"reward": 0.5}, records=[],
        is_demonstration=r.is_demonstration,
        **{n: torch.cat([part[i] for i in order]) for n, part in parts.items()},
    )  # fmt: skip
    for name, values in gradients(copy.deepcopy(m), s, rollouts=shuffled)[0].items():
        assert_close(values, gradients(copy.deepcopy(m), s, rollouts=copy.deepcopy(r))[0][name])


@pytest.mark.parametrize("method", ["sft", "rl", "mix", "mix_lora", "no_meta"])
def test_each_term_moves_the_parameters_it_owns_and_no_others(method):
    s = settings(method=method)
    m = fresh(s)
    assert m.shadow is None
    assert bool(m.w) == (method in ("mix_lora", "no_meta"))
    g, stats = gradients(m, s)
    assert all(p is not None and p.any() for p in g["theta"])
    assert ("sft_nll" in stats) == (method != "rl")
    assert ("reward" in stats) == (method != "sft")


def test_update_weights_of_every_method():
    def of(method, k=0, **changes):
        return bridge.updates(settings(method=method, **changes), k)

    assert of("sft") == [(1, 0)]
    assert of("rl") == [(0, 1)]
    assert of("sft_rl", 4, sft_steps=5) == [(1, 0)]
    assert of("sft_rl", 5, sft_steps=5) == [(0, 1)]
    assert of("alternating") == [(0, 1), (1, 0)]
    assert of("mix", mu=0.25) == [(0.2, 0.8)]
    assert of("mix_lora", lam=0.25) == of("no_meta", lam=0.25) == of("bridge", lam=0.25) == [(0.75, 0.25)]
    assert of("chord", 0, chord_peak=0.75) == [(0.75, 0.25)]
    assert of("chord", 50, chord_valley=0.25, steps=50) == [(0.25, 0.75)]
    assert of("luffy") == [(0, 1)]
    assert of("srft", mu=0.25) == of("hpt", mu=0.25) == [(0.25, 1)]
    for method in METHODS.keys() - {"srft", "hpt"}:
        assert all(mu + lam == 1 for k in (0, 200) for mu, lam in of(method, k)), "no method has a larger gradient"
    with pytest.raises(SettingError):
        of("unheard-of")


def test_a_method_without_a_case_is_refused_with_the_place_where_it_belongs():
    with pytest.raises(SettingError, match=r"method unheard-of has no case in bridge\.py:updates"):
        bridge.updates(settings(method="unheard-of"), 0)


def test_the_reference_is_the_initial_model_and_its_kl_starts_at_zero():
    s = settings(kl_coef=0.1)
    m = fresh(s)
    assert gradients(m, s)[1]["kl"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in m.parameters["theta"]:
            p.mul_(1.05)
    assert gradients(m, s)[1]["kl"] > 1e-4
    assert fresh(settings()).reference is None


def test_the_shadow_s_loss_has_the_kl_term_too():
    s = settings(kl_coef=0.1)
    m = fresh(s)
    rollouts = make_rollouts(m.policy)
    rollouts.advantage.zero_()  # J_RL is then the KL term alone
    assert max(p.abs().max() for p in gradients(m, s, rollouts=copy.deepcopy(rollouts))[0]["theta_hat"]) < 1e-6
    move_shadow(m)
    assert any(p.abs().max() > 1e-4 for p in gradients(m, s, rollouts=rollouts)[0]["theta_hat"])


def test_gain_gradient_norm_is_that_of_the_gain_part_with_its_weight_lambda():
    s = settings(lam=0.3)
    m = fresh(s, w_trained=True)
    move_shadow(m)
    g, stats = gradients(m, s, sft=0.0, rl=0.3)
    assert stats["gain_grad_norm"] == pytest.approx(torch.cat([p.flatten() for p in g["w"]]).norm().item(), rel=1e-4)


@pytest.mark.parametrize("make", [make_rollouts, repetitive_rollouts])
def test_cooperative_gain_on_shared_rollouts_weights_each_sequence_by_its_importance(make):
    s = settings()
    m = fresh(s)
    move_shadow(m, by=0.3)
    rollouts = make(m.policy)
    with torch.no_grad():
        logp_hat, _ = response_logprobs(m.shadow, rollouts.rows)
    lengths = [len(response) for _, response in rollouts.rows]
    ratio = torch.stack([d.sum() for d in (logp_hat - rollouts.sampler_logp).split(lengths)]).exp()
    reward = rollouts.reward.flatten()
    expected = reward.mean() - (ratio.clamp(max=10) * reward).mean()
    assert gradients(m, s, rollouts=rollouts)[1]["cooperative_gain"] == pytest.approx(expected.item(), abs=1e-4)


def test_several_updates_of_one_batch_see_a_ratio_other_than_one():
    s = settings(updates_per_rollout=2)
    m = fresh(s)
    rollouts = make_rollouts(m.policy)
    for expected_cut in (False, True):
        stats = update(m, s, rollouts)
        assert (stats["clip_frac"] > 0) == expected_cut
        bridge.clip_and_step(m, stats, s)


def test_a_gradient_that_is_not_finite_moves_no_parameter_of_any_set():
    s = settings()
    m = fresh(s)
    rollouts = make_rollouts(m.policy)
    rollouts.advantage[0] = float("nan")
    before = {n: [p.clone() for p in ps] for n, ps in m.parameters.items()}
    _, stats = gradients(m, s, rollouts=rollouts)
    _, stepped = bridge.clip_and_step(m, stats, s)
    assert not stepped
    for name, parameters in m.parameters.items():
        assert all(torch.equal(p, b) for p, b in zip(parameters, before[name], strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_stops_no_set_and_a_loss_or_gradient_that_is_not_finite_stops_all_three(value):
    s = settings()
    m = fresh(s)

    def sets_moved(stats, bad=""):
        before = copy.deepcopy(m.parameters)
        for name, parameters in m.parameters.items():
            for p in parameters:
                p.grad = torch.ones_like(p)
            if name == bad:
                parameters[-1].grad[0] = value
        _, stepped = bridge.clip_and_step(m, stats, s)
        same = {n: all(map(torch.equal, parameters, before[n])) for n, parameters in m.parameters.items()}
        assert stepped == (not all(same.values()))
        return [name for name in same if not same[name]]

    metrics = dict(reward=value, kl=value, entropy=value, logp_gap_max=value, cooperative_gain=value)
    assert sets_moved(metrics) == sets_moved(metrics | {"sft_nll": 1.0}) == ["theta", "w", "theta_hat"]
    assert sets_moved({"sft_nll": value}) == []
    for name in m.parameters:
        assert sets_moved({"sft_nll": 1.0}, bad=name) == []


def test_own_rollouts_give_the_shadow_its_own_batch():
    s = settings(shadow_rollouts="own")
    m = fresh(s, w_trained=True)
    move_shadow(m)
    own = make_rollouts(m.shadow, seed=5)
    g, stats = gradients(m, s, rollouts_hat=own)
    assert stats["ratio_hat_mean"] == 1.0
    shared, _ = gradients(m, s)
    assert not all(torch.equal(a, b) for a, b in zip(g["theta_hat"], shared["theta_hat"], strict=True))
    expected = make_rollouts(m.policy).reward.mean() - own.reward.mean()
    assert stats["cooperative_gain"] == pytest.approx(expected.item(), abs=1e-6)


def test_own_rollouts_too_keep_the_policy_that_sampled_them_as_the_old_one_of_later_updates():
    s = settings(shadow_rollouts="own", updates_per_rollout=2)
    m = fresh(s, w_trained=True)
    move_shadow(m)
    rollouts, own = make_rollouts(m.policy), make_rollouts(m.shadow, seed=5)
    for _ in range(2):
        g, stats = gradients(m, s, rollouts=rollouts, rollouts_hat=own)
        before = copy.deepcopy(m)
        bridge.clip_and_step(m, stats, s)
    assert stats["ratio_hat_max"] > 1.1
    before.optimizers["w"].zero_grad()
    before.optimizers["theta_hat"].zero_grad()
    logp, _ = response_logprobs(before.shadow, own.rows)
    loss, _ = grpo.grpo_loss(logp, own.sampler_logp, own.advantage, own.weight)
    loss.backward()
    assert_close(g["theta_hat"], [p.grad for p in before.parameters["theta_hat"]])


def test_adam_s_first_step_moves_theta_and_its_shadow_by_alpha_and_w_by_beta():
    s = settings(alpha=0.001, beta=0.02)
    m = fresh(s, w_trained=True)
    move_shadow(m)
    before = {name: [p.clone() for p in of_set] for name, of_set in m.parameters.items()}
    _, stats = gradients(m, s)
    bridge.clip_and_step(m, stats, s)
    for name, rate in (("theta", s.alpha), ("theta_hat", s.alpha), ("w", s.beta)):
        moved = max((p - q).abs().max().item() for p, q in zip(m.parameters[name], before[name], strict=True))
        assert moved == pytest.approx(rate, rel=0.01), name


def test_each_set_s_gradient_is_clipped_by_its_own_norm():
    s = settings(grad_clip=0.01)
    m = fresh(s, w_trained=True)
    move_shadow(m)
    stepped = {}
    for name, optimizer in m.optimizers.items():
        optimizer.step = lambda name=name: stepped.update(
            {name: torch.cat([p.grad.flatten() for p in m.parameters[name]]).norm().item()}
        )
    _, stats = gradients(m, s)
    norms, _ = bridge.clip_and_step(m, stats, s)
    assert all(norm > s.grad_clip for norm in norms.values()), "the case must exercise the clip"
    assert stepped == pytest.approx(dict.fromkeys(("theta", "w", "theta_hat"), s.grad_clip), rel=1e-3)
