"""From logits to the next token: inverse CDF from one uniform number, top-p by rejection, without sorting.

The Triton kernel follows its PyTorch twin, which runs on a CPU. Both draw the same tokens from the same uniforms.

Shapes: n rows of logits, V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops.head import jit, tl, use_kernels

CACHED = 2**19  # probabilities that the twin handles at a time; their sums take 4 MiB in fp64


def sample_tokens_torch(logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    p = (logits / (temperature or 1.0)).softmax(-1)  # [n, V]
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)  # [n, 1]
        return token[:, 0], p.gather(1, token).log()[:, 0]
    u = u[:, None]
    pool = p  # [n, V] the masses of the tokens that the next draw may take: at first all of them
    while True:
        cdf = pool.cumsum(-1, dtype=torch.float64)  # in fp32 the tail of a large vocabulary would be lost
        mark = u * cdf[:, -1:]
        token = torch.searchsorted(cdf, mark, right=True).clamp_(max=p.shape[1] - 1)  # the first with cdf > mark
        if top_p >= 1:
            break
        # A token is outside the nucleus if the tokens likelier than it have at least top_p together.
        mass = pool.gather(1, token)
        likelier = torch.where(pool > mass, pool, 0.0)
        outside = likelier.sum(-1, keepdim=True, dtype=torch.float64) >= top_p
        if not outside.any():
            break
        # The place of the mark within the token's mass is the next uniform number.
        u = torch.where(outside, ((mark - (cdf.gather(1, token) - mass)) / mass).clamp(0, 1 - 2**-53), u)
        pool = torch.where(outside, likelier, pool)
    return token[:, 0], p.gather(1, token).log()[:, 0]


@jit
def sample_tokens_kernel(
    Z, U, TOKEN, LOGP, V, stride, temperature, top_p, GREEDY: tl.constexpr, NUCLEUS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row: log-sum-exp, then the first token whose cumulative mass exceeds u's share of the total.

    Z [n, V] fp32 logits, U [n] fp64 -> TOKEN [n] int64, LOGP [n] fp32. Masses are summed in fp64: in fp32 the tail of
    a large vocabulary would be lost to rounding. With NUCLEUS a token outside the nucleus is drawn again from the
    likelier tokens.
    """
    row = tl.program_id(0).to(tl.int64)
    m = -1e30  # running max of z
    s = tl.zeros((), tl.float64)  # Σ exp(z − m)
    token = 0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(Z + row * stride + column, mask=column < V, other=float("-inf")) / temperature
        if GREEDY:
            largest, where = tl.max(z, 0, return_indices=True)
            token = tl.where(largest > m, start + where, token)
        else:
            largest = tl.max(z, 0)
        larger = tl.maximum(m, largest)
        s = s * tl.exp(m - larger) + tl.sum(tl.exp(z - larger).to(tl.float64), 0)
        m = larger
    lse = m + tl.log(s).to(tl.float32)

    if not GREEDY:
        u = tl.load(U + row)
        total = s  # mass of the tokens that the next draw may take
        floor = float("-inf")  # their logits are above it
        undecided = True
        while undecided:
            mark = u * total
            before = tl.zeros((), tl.float64)  # mass of the blocks passed
            mass = tl.zeros((), tl.float64)
            start = 0
            searching = True
            while searching:
                column = start + tl.arange(0, BLOCK)
                z = tl.load(Z + row * stride + column, mask=column < V, other=float("-inf")) / temperature
                e = tl.where(z > floor, tl.exp(z - m), 0.0).to(tl.float64)
                block = tl.sum(e, 0)
                last = start + BLOCK >= V  # a mark above the rounded total ends in the last block
                if (before + block > mark) | last:
                    cdf = before + tl.cumsum(e, 0)
                    possible = (e > 0.0) & ((cdf > mark) | (cdf >= before + block))
                    at = tl.min(tl.where(possible, tl.arange(0, BLOCK), BLOCK - 1), 0)
                    token = tl.minimum(start + at, V - 1)
                    mass = tl.sum(tl.where(tl.arange(0, BLOCK) == at, e, 0.0), 0)
                    before = tl.sum(tl.where(tl.arange(0, BLOCK) == at, cdf, 0.0), 0) - mass
                    searching = False
                else:
                    before += block
                start += BLOCK
            undecided = False
            if NUCLEUS:
                threshold = tl.load(Z + row * stride + token) / temperature
                likelier = tl.zeros((), tl.float64)
                for start in range(0, V, BLOCK):
                    column = start + tl.arange(0, BLOCK)
                    z = tl.load(Z + row * stride + column, mask=column < V, other=float("-inf")) / temperature
                    likelier += tl.sum(tl.where(z > threshold, tl.exp(z - m), 0.0).to(tl.float64), 0)
                if likelier >= top_p * s:
                    u = tl.minimum(tl.maximum((mark - before) / mass, 0.0), 1.0 - 1.1102230246251565e-16)
                    total = likelier
                    floor = threshold
                    undecided = True
    tl.store(TOKEN + row, token)
    tl.store(LOGP + row, tl.load(Z + row * stride + token) / temperature - lse)


def sample_tokens(logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probs. logits [n, V] fp32, u [n] fp64 in [0, 1) -> tokens [n], logp [n] fp32.

    Inverse CDF: the first token at which the cumulative probability exceeds u. Temperature 0 takes the largest logit.
    top_p < 1 restricts the draw to the nucleus (Holtzman et al. 2020): the tokens whose likelier tokens together have
    less than top_p. Rejection replaces sorting: a draw outside the nucleus is repeated among the tokens likelier than
    it, which contain the nucleus. The place of u within the rejected token's mass is uniform again, so one u per token
    is enough. logp refers to the whole distribution. A row with NaN or +inf among its logits gets the log-prob NaN.
    """
    if not use_kernels(logits):
        # A few rows at a time, whose probabilities stay in the cache of a CPU
        rows = max(1, CACHED // logits.shape[1])
        tokens = []
        logps = []
        for logits_of_rows, u_of_rows in zip(logits.split(rows), u.split(rows), strict=True):
            token, logp = sample_tokens_torch(logits_of_rows, u_of_rows, temperature, top_p)
            tokens.append(token)
            logps.append(logp)
        return torch.cat(tokens), torch.cat(logps)
    n, V = logits.shape
    token = torch.empty(n, dtype=torch.long, device=logits.device)
    logp = torch.empty(n, device=logits.device)
    sample_tokens_kernel[(n,)](
        logits, u, token, logp, V, logits.stride(0), temperature or 1.0, top_p,
        GREEDY=temperature == 0, NUCLEUS=top_p < 1, BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return token, logp


def sample_without(
    excluded: Tensor, logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`sample_tokens` that never draws the ids `excluded`; changes logits.

    The log-probs are still those of the whole distribution, like the trainer's.
    """
    if not len(excluded):
        return sample_tokens(logits, u, temperature, top_p)
    temperature_or_one = temperature or 1.0
    excluded_mass = (logits[:, excluded] / temperature_or_one).logsumexp(-1)  # [n] log of it
    logits[:, excluded] = float("-inf")
    token, logp = sample_tokens(logits, u, temperature, top_p)
    # log p is z − log Σ exp over the kept ids; here the excluded ids join the sum again.
    z = logits.gather(1, token[:, None])[:, 0] / temperature_or_one
    return token, z - torch.logaddexp(z - logp, excluded_mass)
