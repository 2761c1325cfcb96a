"""grpo.py against TRL's loss and advantages, and against facts that follow from the formulas."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import grpo

MAX_LENGTH = 10
LENGTHS = torch.tensor([3, 7, 1, 10])


def padded_batch(seed=0):
    """logp, old, ref [B, T] in fp64, advantages [B], mask [B, T]: ratios on both sides of the clip."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), MAX_LENGTH)
    logp, noise, ref = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))
    mask = (torch.arange(MAX_LENGTH) < LENGTHS[:, None]).double()
    advantages = torch.tensor([1.5, -0.5, 0.7, -1.2], dtype=torch.float64)
    return (logp - 3).requires_grad_(), logp - 3 + 0.4 * noise, ref - 3, advantages, mask


def trl_loss(logp, old, ref, advantages, mask, loss_type, beta):
    trl = pytest.importorskip("trl")
    t = object.__new__(trl.GRPOTrainer)
    t._get_per_token_logps_and_entropies = lambda *a, **k: (logp, torch.zeros_like(logp), None)
    t.loss_type, t.beta, t.epsilon_low, t.epsilon_high = loss_type, beta, 0.2, 0.28
    t.importance_sampling_level, t.top_entropy_quantile, t.off_policy_mask_threshold = "token", 1.0, None
    t.aux_loss_enabled = t.use_vllm = t.vllm_importance_sampling_correction = t._entropy_bonus_enabled = False
    t.max_completion_length, t.current_gradient_accumulation_steps = MAX_LENGTH, 1
    t.model = SimpleNamespace(training=True)
    t.args = SimpleNamespace(delta=None, use_bias_correction_kl=True, steps_per_generation=1)
    t.accelerator = SimpleNamespace(num_processes=1, reduce=lambda x, reduction=None: x, gather=lambda x: x)
    t._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids[:, :1], prompt_mask=ids[:, :1] + 1, completion_ids=ids, completion_mask=mask,
        advantages=advantages, num_items_in_batch=mask.sum(), old_per_token_logps=old, ref_per_token_logps=ref,
    )  # fmt: skip
    return t._compute_loss(t.model, inputs)


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("on_policy", [False, True])
def test_loss_and_gradient_equal_trl(aggregation, kl_coef, on_policy):
    logp, old, ref, advantages, mask = padded_batch()
    old = logp.detach() if on_policy else old
    theirs = trl_loss(logp, old, ref, advantages, mask, aggregation, kl_coef)
    (their_gradient,) = torch.autograd.grad(theirs, logp)

    keep = mask.bool()
    flat = logp.detach()[keep].requires_grad_()
    weight = grpo.token_weights(LENGTHS, aggregation, MAX_LENGTH).double()
    advantage = advantages.repeat_interleave(LENGTHS)
    loss, terms = grpo.grpo_loss(flat, old[keep], advantage, weight, (0.2, 0.28), None, ref[keep], kl_coef)
    (gradient,) = torch.autograd.grad(loss, flat)

    assert on_policy or terms.limited.any(), "the case must exercise the clip"
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=1e-8)  # weights are fp32 numbers
    torch.testing.assert_close(gradient, their_gradient[keep], rtol=1e-6, atol=1e-9)


def test_on_fresh_rollouts_the_loss_is_zero_and_its_gradient_is_not():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    lengths = LENGTHS.repeat(2)
    logp = torch.randn(int(lengths.sum()), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logp.requires_grad_()
    advantage = grpo.group_advantages(rewards).flatten().repeat_interleave(lengths)
    weight = grpo.token_weights(lengths, "grpo", MAX_LENGTH).double()
    loss, _ = grpo.grpo_loss(logp, logp.detach(), advantage, weight)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert abs(loss.item()) < 1e-7  # weights are fp32 numbers
    torch.testing.assert_close(gradient, -weight * advantage)


def test_advantages_equal_trl():
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    r = torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    theirs = (r - r.mean(1, keepdim=True)) / (nanstd(r, 1, True) + 1e-4)
    torch.testing.assert_close(grpo.group_advantages(r), theirs)


def test_advantages_are_divided_by_the_standard_deviation_of_the_sample():
    r = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1]])
    std = torch.tensor([[(1 / 3) ** 0.5], [(1 / 4) ** 0.5]])  # √(Σ(r − mean)² / (G − 1)); the sums are 1 and 3/4
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75]]) / (std + 1e-4)
    torch.testing.assert_close(grpo.group_advantages(r), expected)


def test_advantages_without_std_are_centred_rewards():
    r = torch.tensor([[1.0, 0, 0, 0]])
    assert grpo.group_advantages(r, divide_by_std=False).tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_rewards_of_plus_minus_one_and_of_one_zero_give_the_same_normalised_advantages():
    r = torch.tensor([[1.0, 0, 0, 1, 0]])
    torch.testing.assert_close(grpo.group_advantages(2 * r - 1), grpo.group_advantages(r), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divide_by_std", [True, False])
def test_groups_of_equal_rewards_have_no_advantage(divide_by_std, dtype):
    for value in (0.0, 1.0, 0.3, -0.7, 1 / 3, 1000.1, 1e-9, 1e30):
        for size in (1, 2, 3, 5, 6, 7, 64):
            rewards = torch.full((1, size), value, dtype=dtype)
            assert not grpo.group_advantages(rewards, divide_by_std).any(), (value, size)


def test_a_constant_added_to_all_rewards_changes_no_advantage():
    r = torch.tensor([[0.3, 0.1, 0.7, 0.1, 0.3, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(grpo.group_advantages(r + 1000.1), grpo.group_advantages(r))


def test_a_group_of_one_has_no_advantage_and_is_finite():
    assert grpo.group_advantages(torch.tensor([[1.0]])).tolist() == [[0.0]]


def test_token_weights_of_each_aggregation():
    lengths = torch.tensor([1, 3])
    assert grpo.token_weights(lengths, "grpo", 8).tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])
    assert grpo.token_weights(lengths, "dapo", 8).tolist() == pytest.approx([1 / 4] * 4)
    assert grpo.token_weights(lengths, "dr_grpo", 8).tolist() == pytest.approx([1 / 16] * 4)
    with pytest.raises(ValueError):  # noqa: PT011  the text is free
        grpo.token_weights(lengths, "mean", 8)


def test_an_unknown_aggregation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"aggregation must be one of .*grpo.*dapo.*dr_grpo"):
        grpo.token_weights(torch.tensor([1]), "mean", 8)


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_masked_sequences_weigh_nothing_and_their_infinities_stay_out(aggregation):
    lengths, keep = torch.tensor([2, 3]), torch.tensor([True, False])
    weight = grpo.token_weights(lengths, aggregation, 8, keep)
    assert weight[2:].tolist() == [0, 0, 0]
    logp = torch.tensor([-1.0, -2, -1, -1, float("-inf")], requires_grad=True)
    old = torch.tensor([-1.0, -2, -200, float("-inf"), float("nan")])
    for ratio_cap in (None, 2.0):
        loss, terms = grpo.grpo_loss(logp, old, torch.ones(5), weight, ratio_cap=ratio_cap, ref_logp=old, kl_coef=0.1)
        (gradient,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient[2:].tolist() == [0, 0, 0]
        assert terms.kl.isfinite().all()


def test_a_log_ratio_is_clamped_at_twenty_on_both_sides():
    assert grpo.log_ratio(torch.tensor([0.0, -1000]), torch.tensor([-1000.0, 0]), torch.ones(2)).tolist() == [20, -20]
    inside = torch.tensor([19.5, -19.5])
    assert torch.equal(grpo.log_ratio(inside, torch.zeros(2), torch.ones(2)), inside)
    logp, old = torch.tensor([0.0], requires_grad=True), torch.tensor([-1000.0])
    loss, _ = grpo.grpo_loss(logp, old, torch.tensor([-1.0]), torch.tensor([1.0]))
    assert loss.isfinite()


def test_the_clipped_surrogate_is_the_smaller_of_two_products():
    ratio = torch.tensor([0.5, 1.5, 0.5, 1.5, 1.3], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    surrogate, stopped = grpo.clipped_surrogate(ratio, advantage, 0.2, 0.4)
    assert surrogate.tolist() == pytest.approx([0.5, 1.4, -0.8, -1.5, 1.3])
    assert stopped.tolist() == [False, True, True, False, False], "the clip stops the gradient where it is smaller"
    (gradient,) = torch.autograd.grad(surrogate.sum(), ratio)
    assert gradient.tolist() == [1, 0, 0, -1, 1], "A where the clip does not stop it"


def test_the_truncated_surrogate_has_a_gradient_by_log_pi_alone():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    ratio = torch.tensor([3.0, 0.25]) * (logp - logp.detach()).exp()
    surrogate, truncated = grpo.truncated_surrogate(logp, ratio, torch.tensor([2.0, -1.0]), cap=2.0)
    (gradient,) = torch.autograd.grad(surrogate.sum(), logp)
    assert surrogate.tolist() == [2 * 2 * -1, 0.25 * -1 * -2]
    assert gradient.tolist() == [2 * 2, 0.25 * -1]
    assert truncated.tolist() == [True, False]


def test_clip_stops_the_gradient_only_where_it_would_go_further():
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)  # ratio 1.65 and 0.61
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, terms = grpo.grpo_loss(logp, torch.zeros(4), advantage, torch.ones(4), (0.2, 0.2))
    (gradient,) = torch.autograd.grad(loss, logp)
    assert (gradient == 0).tolist() == [True, False, False, True] == terms.limited.tolist()
    assert not any(x.requires_grad for x in (terms.ratio, terms.limited, terms.kl))
    _, terms = grpo.grpo_loss(
        torch.tensor([1.25, 0.75]).log(), torch.zeros(2), advantage[:2], torch.ones(2), (0.2, 0.3)
    )
    assert terms.limited.tolist() == [False, True], "1.25 is not above 1 + 0.3, 0.75 is below 1 − 0.2"


def test_on_policy_the_truncated_and_the_clipped_surrogate_have_the_same_gradient_bit_for_bit():
    logp = torch.randn(9, requires_grad=True)
    advantage, weight = torch.randn(9), torch.rand(9)
    gradients = []
    for ratio_cap in (None, 2.0):
        loss, _ = grpo.grpo_loss(logp, logp.detach(), advantage, weight, ratio_cap=ratio_cap)
        gradients.append(torch.autograd.grad(loss, logp)[0])
    assert torch.equal(*gradients)


def test_truncation_bounds_the_weight_and_keeps_the_gradient():
    logp = torch.tensor([3.0, -3.0], requires_grad=True)
    loss, terms = grpo.grpo_loss(logp, torch.zeros(2), torch.ones(2), torch.ones(2), ratio_cap=2.0)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.tolist() == pytest.approx([-2.0, -torch.tensor(-3.0).exp().item()])
    assert terms.limited.tolist() == [True, False]


def distributions(seed, size=6):
    """Logits with a gradient, and the log-probs of an old and of a reference distribution over `size` tokens, fp64."""
    g = torch.Generator().manual_seed(seed)
    logits, old, ref = (torch.randn(size, generator=g, dtype=torch.float64) for _ in range(3))
    return logits.requires_grad_(), old.log_softmax(0), ref.log_softmax(0)


@pytest.mark.parametrize("ratio_cap", [None, float("inf")])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_the_kl_term_is_that_of_the_exact_kl(seed, on_policy, ratio_cap):
    """In expectation over tokens sampled from π_old; with ∇k3 alone it would be the gradient of KL(π_ref ‖ π)."""
    logits, old, ref = distributions(seed)
    logp = logits.log_softmax(0)
    old = logp.detach() if on_policy else old
    none = torch.zeros_like(old)
    loss, _ = grpo.grpo_loss(logp, old, none, old.exp(), (0.2, 0.2), ratio_cap, ref, 0.3)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits)
    torch.testing.assert_close(gradient, 0.3 * exact)
    assert (exact - reverse).norm() > 0.1 * exact.norm(), "the case must tell the two directions apart"


def test_a_cap_on_the_ratio_bounds_the_weight_of_the_kl_term():
    logits, old, ref = distributions(0)
    logp, none = logits.log_softmax(0), torch.zeros_like(old)
    ratio = (logp - old).exp().detach()
    cap = ratio.max().item() / 2
    loss, _ = grpo.grpo_loss(logp, old, none, old.exp(), (0.2, 0.2), cap, ref, 1.0)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    k3 = grpo.k3(logp, ref, torch.ones_like(old))
    per_token = k3.detach() * logp + k3  # its gradient is that of ρ·k3 at ρ = 1
    (expected,) = torch.autograd.grad((old.exp() * ratio.clamp(max=cap) * per_token).sum(), logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("aggregation", "kept"), [("grpo", 1 / 4), ("dapo", 1 / 2), ("dr_grpo", 1 / 16)])
def test_a_masked_sequence_weighs_nothing_and_dapo_alone_does_not_count_it(aggregation, kept):
    weight = grpo.token_weights(torch.tensor([2, 6]), aggregation, 8, torch.tensor([True, False]))
    assert weight.tolist() == [kept, kept, 0, 0, 0, 0, 0, 0]


def test_k3_is_zero_at_equality_never_negative_and_unbiased():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    kl = (p * (p / q).log()).sum()
    logp = p.log().requires_grad_()
    k3 = grpo.k3(logp, q.log(), torch.full((3,), 0.2))  # the weight only masks
    torch.testing.assert_close((p * k3).sum(), kl)
    assert (grpo.k3(p.log(), q.log(), torch.ones(3)) >= 0).all()
    assert not grpo.k3(p.log(), p.log(), torch.ones(3)).any()
    torch.testing.assert_close(torch.autograd.grad(k3.sum(), logp)[0], 1 - q / p)
    assert grpo.k3(torch.tensor([-1.0]), torch.tensor([float("-inf")]), torch.zeros(1)).item() == 0, "a masked token"


def test_the_reward_of_another_policy_is_the_mean_of_importance_weights_of_at_most_ten_times_rewards():
    ratio = torch.tensor([2.0, 0.5, 3.0, 100.0])  # of sequences with 2, 1 and 1 tokens: 1, 3 and 100
    estimate = grpo.importance_weighted_reward(ratio.log(), [2, 1, 1], torch.tensor([1.0, 0.5, 0.2]))
    assert estimate.item() == pytest.approx((1 * 1.0 + 3 * 0.5 + 10 * 0.2) / 3)
