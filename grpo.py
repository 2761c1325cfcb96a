"""GRPO as pure functions: rewards to advantages, log-probs to losses. Tensors in, tensors out.

Shapes: P prompts, G samples of each, N = P·G sequences in group order, T response tokens of all N
sequences laid end to end (no padding anywhere).

Where this differs from GRPO as first published (DeepSeekMath, arXiv 2402.03300):
  1. ε is added to the standard deviation, as in every code base; a group of equal rewards gives 0.
  2. The ratio's lower and upper clip are two numbers (DAPO, arXiv 2503.14476); equal by default.
  3. Log-ratios are clamped to ±20 before exp. Tokens of weight 0 are masked before exp, since 0·exp(large) is NaN.
  4. The three aggregations are three ways to weight tokens; the loss is always Σ weight·token loss. The weights are
     counted over the whole batch, so micro-batches and ranks do not change the loss.
  5. Where θ̂ trains on the policy's rollouts, which are off-policy for it, both have the `truncated_surrogate`.
  6. The KL term is ρ·k3: k3 alone has the right value, but its gradient is that of KL(π_ref ‖ π).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STD_EPS = 1e-4  # TRL's value; verl uses 1e-6
MAX_LOG_RATIO = 20.0
AGGREGATIONS = ("grpo", "dapo", "dr_grpo")


def group_advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """A = (r − mean) / (std + ε) within each group; Dr.GRPO (arXiv 2503.20783) omits the division.

    rewards [P, G] -> advantages [P, G]. std is the sample's (divided by G−1).

    >>> group_advantages(torch.tensor([[1., 0., 0., 1.], [0., 0., 0., 0.]]))
    tensor([[ 0.8659, -0.8659, -0.8659,  0.8659],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    r = rewards.double()  # a reward plus a tiny one must differ from it
    centred = r - r.mean(-1, keepdim=True)  # [P, G]

    # The rounded mean of equal rewards can differ from them. Adam would turn that into a step of full length.
    all_equal = r.amax(-1, keepdim=True) == r.amin(-1, keepdim=True)  # [P, 1]
    centred.masked_fill_(all_equal, 0.0)

    if divide_by_std and r.shape[-1] > 1:
        centred /= r.std(-1, keepdim=True) + STD_EPS
    return centred.to(rewards.dtype)


def token_weights(lengths: Tensor, aggregation: str, max_length: int, keep: Tensor | None = None) -> Tensor:
    """The weight of every token in the loss: the batch's loss is Σ weight·token loss.

    lengths [N] response tokens per sequence, keep [N] bool (False: weight 0, as for an overlong sequence).
    Returns [T], T = Σ lengths. With |o_i| the length of sequence i, kept tokens weigh
      "grpo"     1 / (N·|o_i|)           mean over tokens, then over sequences: long answers count less per token
      "dapo"     1 / Σ_kept |o_i|        mean over all tokens
      "dr_grpo"  1 / (N·max_length)      constant: no length bias at all
    Raises ValueError for another aggregation.

    >>> token_weights(torch.tensor([1, 2]), "grpo", 8)
    tensor([0.5000, 0.2500, 0.2500])
    """
    n = len(lengths)
    if keep is None:
        keep = torch.ones_like(lengths, dtype=torch.bool)
    if aggregation == "grpo":
        per_sequence = 1.0 / (n * lengths.clamp(min=1).float())  # [N]
    elif aggregation == "dapo":
        kept_tokens = int((lengths * keep).sum())
        per_sequence = torch.full((n,), 1.0 / max(kept_tokens, 1))
    elif aggregation == "dr_grpo":
        per_sequence = torch.full((n,), 1.0 / (n * max_length))
    else:
        raise ValueError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
    kept = per_sequence.to(lengths.device) * keep  # [N]
    return kept.repeat_interleave(lengths)  # [T]


def log_ratio(logp: Tensor, old_logp: Tensor, weight: Tensor) -> Tensor:
    """log π/π_old per token [T], 0 where the token has no weight, clamped to ±20."""
    return torch.where(weight != 0, logp - old_logp, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(min(ρ·A, clip(ρ, 1−low, 1+high)·A) per token [T], whether the clip stopped the gradient [T] bool)."""
    unclipped = ratio * advantage
    clipped = ratio.clamp(1 - low, 1 + high) * advantage
    return torch.minimum(unclipped, clipped), clipped < unclipped


def truncated_surrogate(logp: Tensor, ratio: Tensor, advantage: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(sg(min(ρ, cap))·A·log π per token [T], whether ρ was truncated [T] bool): truncated importance sampling.

    The surrogate of policy and shadow on shared rollouts. The clip would stop the gradient of tokens on which θ̂ has
    drifted from θ in the direction of A, and with it the difference that w ascends; truncation bounds the variance. At
    ρ = 1 its gradient equals the clipped surrogate's. cap = inf is plain importance weighting, token by token.
    """
    truncated = ratio.detach().clamp(max=cap)
    return truncated * advantage * logp, ratio.detach() > cap


def k3(logp: Tensor, ref_logp: Tensor, weight: Tensor) -> Tensor:
    """Unbiased, never negative estimate of KL(π ‖ π_ref) per token: e^d − d − 1 with d = log π_ref/π.  [T]

    Only its value: on samples of π, ∇k3 estimates ∇KL(π_ref ‖ π), and ∇(ρ·k3) estimates ∇KL(π ‖ π_ref).
    """
    d = log_ratio(ref_logp, logp, weight)
    return d.exp() - d - 1


@dataclass
class LossTerms:
    """What `grpo_loss` computed for every token, [T] each, without gradients."""

    ratio: Tensor  # ρ = π/π_old
    limited: Tensor  # bool: the clip stopped the gradient, or the cap truncated ρ
    kl: Tensor  # k3


def grpo_loss(
    logp: Tensor,  # [T] log π, with a gradient; the other tensors have none
    old_logp: Tensor,  # [T] log π_old
    advantage: Tensor,  # [T]
    weight: Tensor,  # [T] of `token_weights`
    clip: tuple[float, float] = (0.2, 0.2),  # how far ρ may be below and above 1
    ratio_cap: float | None = None,  # selects the truncated surrogate; the KL term's ρ is then min(ρ, cap)
    ref_logp: Tensor | None = None,  # [T] log π_ref; None: no KL term
    kl_coef: float = 0.0,
) -> tuple[Tensor, LossTerms]:
    """−J_RL of eq. (2) as GRPO estimates it: Σ_t weight_t·(kl_coef·ρ_t·k3_t − surrogate_t).

    Also a ρ that the cap bounds has a gradient in the KL term: min(ρ, cap)·∇log π.
    Only its gradient is informative. On-policy its value is about 0 with the clip and the weights "grpo", and
    Σ −weight·A·log π with the truncated surrogate.
    """
    ratio = log_ratio(logp, old_logp, weight).exp()  # [T] ρ
    if ratio_cap is None:
        surrogate, limited = clipped_surrogate(ratio, advantage, *clip)
        kl_ratio = ratio
    else:
        logp = torch.where(weight != 0, logp, 0.0)  # 0·(−∞) would be NaN
        surrogate, limited = truncated_surrogate(logp, ratio, advantage, ratio_cap)
        # A plain clamp would have no gradient beyond the cap.
        kl_ratio = ratio * (ratio_cap / ratio.detach()).clamp(max=1)

    kl = torch.zeros_like(ratio)
    if ref_logp is not None:
        kl = k3(logp, ref_logp, weight)
    loss = (weight * (kl_coef * kl_ratio * kl - surrogate)).sum()
    return loss, LossTerms(ratio.detach(), limited, kl.detach())


@dataclass
class RLPass:
    """What one pass of a model over rollouts gives for every response token, [T] each; 0 where its row was not run."""

    logp: Tensor  # log π
    entropy: Tensor  # of π(· | prompt and response so far), nats
    slope: Tensor  # ∂J_RL/∂log π, divided by the token's weight
    ratio: Tensor  # ρ = π/π_old
    limited: Tensor  # 1 where the clip or the cap limited ρ
    kl: Tensor  # k3
    trained: Tensor  # 1 where the row ran with a gradient


def importance_weighted_reward(log_ratio: Tensor, lengths: list[int], reward: Tensor, cap: float = 10.0) -> Tensor:
    """The mean of min(π(y)/π_old(y), cap)·r(y) over sequences: the reward of π, estimated on samples of π_old.

    log_ratio [T] log π/π_old of every token, lengths N numbers of tokens, reward [N] -> scalar. The cap bounds the
    variance, and makes the estimate one from below where rewards are not negative.
    """
    per_sequence = [tokens.sum() for tokens in log_ratio.split(lengths)]
    weight = torch.stack(per_sequence).exp().clamp(max=cap)  # [N]
    return (weight * reward).mean()
