"""The published baselines that join demonstrations and RL, as pure functions: CHORD, LUFFY, SRFT, HPT.

Shapes: P prompts, G sequences in the group of each, T response tokens of all sequences, end to end. p: probability of
a token; r: reward; A: advantage; H: mean entropy of a sequence, nats; sg: without a gradient.

Where this code differs from the published ones:
  1. They normalise in each micro-batch, by L_max = max_new_tokens or by tokens. Here the batch has one denominator: RL
     is Dr.GRPO's Σ/(N·L_max) over all N sequences, SFT is a mean over tokens. Theirs sums some 64 sequences without N:
     in SRFT and HPT --mu 0.005 gives SFT about their weight beside RL on the built-in tasks.
  2. The demonstration joins G samples. LUFFY and SRFT replace one: 7 + 1.
  3. Their entropy bonus of 0.001 is omitted.
"""

import math

import torch
from torch import Tensor

import grpo
from settings import Settings

SHAPING = 0.1  # LUFFY's γ
GATE = 0  # HPT imitates where at most so many samples are right


def chord_mu(step: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    """CHORD's weight μ of SFT: a linear rise to `peak` for `warmup` steps, then a cosine to `valley` for `decay` steps.

    arXiv 2508.11408; Trinity-RFT, trinity/algorithm/policy_loss_fn/chord_policy_loss.py. Here warmup is 0 and decay is
    `steps`. Without both, step 0 has the valley, as in theirs.

    >>> [round(chord_mu(k, 0, 200, 0.9, 0.05), 4) for k in (0, 100, 200)]
    [0.9, 0.475, 0.05]
    """
    if step < warmup:
        return peak * step / warmup
    if step >= warmup + decay:
        return valley
    return valley + (peak - valley) * (1 + math.cos(math.pi * (step - warmup) / decay)) / 2


def chord_phi(logp: Tensor) -> Tensor:
    """CHORD-φ's weight sg(p·(1−p)) of a demonstration token, largest at p = ½.  [T]

    Same sources as chord_mu. With a gradient through φ, tokens of p < ½ would get an extra term of the opposite sign.
    """
    p = logp.detach().exp()
    return p * (1 - p)


def shaped_surrogate(logp: Tensor, advantage: Tensor) -> Tensor:
    """LUFFY's surrogate f(p)·A of a demonstration token, f(p) = p/(p + γ).  [T]

    arXiv 2504.14945; LUFFY, luffy/verl/verl/mix_src/mix_core_alg.py. The behaviour policy counts as 1, so the ratio is
    p. The gradient, A·γp/(p + γ)²·∇log π, is largest at p = γ: it favours rare tokens of the demonstration.
    """
    p = logp.exp()
    return p / (p + SHAPING) * advantage


def srft_advantages(reward: Tensor, entropy: Tensor) -> Tensor:
    """SRFT's ±REINFORCE on samples: 0.1·e^H where the reward is exactly 1, −1 elsewhere.  [P, G] each

    arXiv 2506.19767; the authors' code is unpublished: Unify-Post-Training, hpt/verl/verl/mix_src/mix_core_alg.py. The
    rollouts know H as the mean of −log π, which is unbiased; e^H of it is a little too large.
    """
    return torch.where(reward == 1, 0.1 * entropy.exp(), -1.0)


def advantages(s: Settings, reward: Tensor, entropy: Tensor) -> Tensor:
    """The advantage of every sequence by the method.  reward, entropy [P, G] -> [P, G]

    LUFFY and SRFT have the demonstration as the last of a group and in its mean. HPT (arXiv 2509.04419;
    Unify-Post-Training, hpt/verl/verl/mix_src/mix_trainer.py) has no RL for the groups that it imitates.
    """
    A = grpo.group_advantages(reward, divide_by_std=s.aggregation_of_method != "dr_grpo")
    match s.method:
        case "srft":
            A[:, :-1] = srft_advantages(reward[:, :-1], entropy[:, :-1])
        case "hpt":
            A[imitated(s, reward)] = 0.0
    return A


def imitated(s: Settings, reward: Tensor) -> Tensor:
    """Whether the SFT term has the prompt's demonstration: HPT asks for at most GATE right samples.  [P, G] -> [P]"""
    right = (reward == 1).sum(-1)
    return right <= GATE if s.method == "hpt" else right >= 0


def sft_weights(s: Settings, logp: Tensor, entropy: Tensor, lengths: list[int]) -> Tensor:
    """Weight of each demonstration token in L_SFT = −(1/T)·Σ weight·log π, without a gradient.  [T]

    CHORD-φ: sg(p·(1−p)). SRFT: ½·e^(−H) with H the exact mean entropy of the demonstration. Any other method: 1.
    logp, entropy [T] at temperature 1, of whole sequences of these lengths.
    """
    match s.method:
        case "chord" if s.chord_phi:
            return chord_phi(logp)
        case "srft" if lengths:
            H = torch.cat([of_one.mean().expand_as(of_one) for of_one in entropy.detach().split(lengths)])
            return 0.5 * (-H).exp()
    return torch.ones_like(logp)
