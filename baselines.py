"""The published baselines that join demonstrations and RL, as pure functions: CHORD, LUFFY, SRFT, HPT.

Shapes: P prompts, G sequences in the group of each, T response tokens of all sequences, end to end. p: probability of
a token; A: advantage; H: mean entropy of a sequence, nats; sg: without a gradient.

Where this code differs from the published ones:
  1. They normalise in each micro-batch, by L_max = max_new_tokens or by tokens. Here the batch has one denominator: RL
     is Dr.GRPO's Σ/(N·L_max) over all N sequences, SFT is a mean over tokens. Their RL loss sums some 64 sequences
     without dividing by N. In SRFT and HPT --mu 0.005 gives about their ratio of SFT to RL on the built-in tasks.
  2. The demonstration joins G samples. LUFFY and SRFT replace one: 7 + 1.
  3. Their entropy bonus of 0.001 is omitted.
"""

import math

import torch
from torch import Tensor

SHAPING = 0.1  # LUFFY's γ
GATE = 0  # HPT imitates where at most so many samples of a prompt are right


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


def srft_advantages(group_advantages: Tensor, is_right: Tensor, entropy: Tensor) -> Tensor:
    """SRFT: ±REINFORCE on samples, 0.1·e^H where the sample is right, −1 elsewhere.  [P, G] each -> [P, G]

    The demonstration, the last of each group, keeps its advantage in the group, as in LUFFY. arXiv 2506.19767; the
    authors' code is unpublished: Unify-Post-Training, hpt/verl/verl/mix_src/mix_core_alg.py. H is estimated as
    the mean of −log π, which is unbiased; e^H of it is a little too large.
    """
    advantages = torch.where(is_right, 0.1 * entropy.exp(), -1.0)
    advantages[:, -1] = group_advantages[:, -1]
    return advantages


def srft_sft_weights(entropy: Tensor, lengths: list[int]) -> Tensor:
    """SRFT's weight ½·e^(−H) of each demonstration token, H the exact mean entropy of the demonstration.  [T]

    entropy [T] at temperature 1, of whole demonstrations of these lengths; the weight has no gradient.
    """
    if not lengths:
        return torch.ones_like(entropy)
    means = [of_one.mean().expand_as(of_one) for of_one in entropy.detach().split(lengths)]
    return 0.5 * (-torch.cat(means)).exp()


def hpt_imitates(is_right: Tensor) -> Tensor:
    """Whether HPT imitates the prompt's demonstration instead of RL: at most GATE samples are right.  [P, G] -> [P]

    arXiv 2509.04419; Unify-Post-Training, hpt/verl/verl/mix_src/mix_trainer.py.
    """
    return is_right.sum(-1) <= GATE
