"""bench/swapped.py: weights of the demonstrations find the right annotator, where mixing provably cannot."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from swapped import LEAST, ascent

CONTEXTS = 8
REWARDED = torch.arange(CONTEXTS) < 4


def likelihood(logits, omega):
    """J_SFT(·; ω) of two annotators, who choose action 0 and action 1 in every context.  logits [contexts, 2]"""
    logp = logits.log_softmax(1).sum(0)  # [2] of each annotator's demonstrations
    return (omega * logp).sum() / (omega * CONTEXTS).sum()


def trained(lam, rate):
    """(P(action 0) in each context, ω) after gradient ascent; RL rewards action 0 in half of the contexts."""
    policy = torch.zeros(CONTEXTS, 2, dtype=torch.float64, requires_grad=True)
    shadow = torch.zeros(CONTEXTS, 2, dtype=torch.float64, requires_grad=True)
    omega = torch.ones(2, dtype=torch.float64)
    for _ in range(400):
        reward = policy.softmax(1)[REWARDED, 0].mean()
        (of_policy,) = torch.autograd.grad((1 - lam) * likelihood(policy, omega) + lam * reward, policy)
        (of_shadow,) = torch.autograd.grad(likelihood(shadow, omega), shadow)
        with torch.no_grad():
            logp, logp_shadow = (x.log_softmax(1).sum(0) for x in (policy, shadow))
            omega = (omega + rate * ascent(logp, logp_shadow, omega, torch.tensor([CONTEXTS] * 2))).clamp(LEAST, 1)
            policy += 8 * of_policy
            shadow += 8 * of_shadow
    return policy.detach().softmax(1)[:, 0], omega


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9])
def test_without_reward_mixing_leaves_two_annotators_even_and_learned_weights_find_the_right_one(lam):
    """Where no reward reaches, the two annotators cancel for every λ; the contexts with one tell who is right."""
    mixed, _ = trained(lam, rate=0.0)
    torch.testing.assert_close(mixed[~REWARDED], torch.full((4,), 0.5, dtype=torch.float64))
    weighed, omega = trained(lam, rate=0.02)
    assert omega.tolist() == [1.0, LEAST]
    assert (weighed[~REWARDED] > 0.95).all()
    assert (weighed[REWARDED] > mixed[REWARDED]).all()


def test_the_step_of_the_weights_is_the_derivative_of_the_penalised_objective():
    generator = torch.Generator().manual_seed(0)
    logp, logp_shadow = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([3, 1, 4, 1, 5])
    omega = torch.rand(5, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = (omega * lengths).sum()
    (expected,) = torch.autograd.grad((omega * (logp - logp_shadow)).sum() / tokens, omega)
    torch.testing.assert_close(ascent(logp, logp_shadow, omega.detach(), lengths), expected * tokens.detach())
