"""The levels swapped, an extension of ours: RL above, SFT below, and a weight ω of each source of demonstrations.

θ can undo w (docs/theory.md), but not the weights of the demonstrations that it trains on. With them as the upper
variable, and the mean log-likelihood of the weighed tokens of D_SFT

    J_SFT(θ; ω) = Σ_t ω_t log π_θ(t) / Σ_t ω_t,        ω_t: the weight of the source of token t

the bilevel problem is max_ω J_RL(θ) subject to θ ∈ argmax J_SFT(·; ω). The penalty max J_SFT(·; ω) − J_SFT(θ; ω)
replaces the lower level, as in eq. (7). A shadow θ̂ that takes SFT alone follows the maximiser. One iteration is

    θ ← θ + α∇[(1−λ) J_SFT(θ; ω) + λ J_RL(θ)]
    θ̂ ← θ̂ + α∇ J_SFT(θ̂; ω)
    ω_i ← ω_i + η(ḡ_i − ḡ),        g_t = log π_θ(t) − log π_θ̂(t)

ḡ_i is the mean of g over the tokens of source i in the batch, ḡ that over all of its tokens, weighed by ω. In words: a
source counts as far as training with the reward makes it likelier than imitation alone does. The step of ω is, by
Danskin's theorem, the gradient of J_SFT(θ; ω) − J_SFT(θ̂; ω), times the weighed tokens per token of the source.
"""

import torch
from torch import Tensor

LEAST = 0.02  # of ω, so that no source is lost for good; the largest is 1
NAMED = 100  # sources whose weights are logged, at most


def step_of_omega(g: Tensor, omega: Tensor, source: Tensor) -> Tensor:
    """ḡ_i − ḡ of every source; 0 for one that has no token here.

    g [T] log π under θ minus that under θ̂, omega [S] weights, source [T] the number of each token's source -> [S]

    >>> step_of_omega(torch.tensor([0.5, 0.1, -0.3]), torch.ones(3), torch.tensor([0, 0, 2]))
    tensor([ 0.2000,  0.0000, -0.4000])
    """
    tokens = torch.zeros_like(omega).index_add_(0, source, torch.ones_like(g))  # [S]
    sums = torch.zeros_like(omega).index_add_(0, source, g)  # [S]
    mean = (omega * sums).sum() / (omega * tokens).sum()  # ḡ
    return torch.where(tokens > 0, sums / tokens.clamp(min=1) - mean, 0.0)
