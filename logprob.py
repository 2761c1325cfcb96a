"""Token log-probabilities and entropies from hidden states and the vocabulary head, and losses of them.

SFT, GRPO and the shadow loss all need the same two numbers per trained token: log π(y|x) and the entropy of π(·|x).
Logits for every token are what exhausts memory in RL training (16k tokens x 152k words in fp32 are 10 GB), so here at
most CHUNK rows of them ever exist. Three ways to the same numbers:

    token_logprobs   the definition, in plain PyTorch; differentiable; its backward computes the logits again
    head_loss        for training: a loss whose gradient is taken in the forward pass, while the logits are there
    score            without gradients: on a GPU one fused matmul and online softmax, with no logits in memory

FLOPs of the head, trained: 8NHV for the definition (two matmuls forward, since it recomputes, and two backward), 6NHV
for head_loss; 2NHV to score. Every kernel stands below its twin in PyTorch, which is what runs on a CPU.

Shapes: N tokens, H hidden size, V vocabulary size, C tokens of one chunk. All log-probs and entropies are in nats.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for this system: the twins do all the work
    triton = tl = None

jit = triton.jit if triton else (lambda function: function)
# Triton's interpreter, with which the tests run the kernels on a CPU, multiplies bf16 as if it were integers
UPCAST = os.environ.get("TRITON_INTERPRET") == "1"

CHUNK = 2048  # C: a matmul of this many rows keeps a GPU busy; their fp32 logits take 1.2 GB at V = 152k


def use_kernels(x: Tensor) -> bool:
    """Whether x is where Triton's kernels run; elsewhere their PyTorch twins do."""
    return x.is_cuda and triton is not None


# ---------------------------------------------------------------------------------------------------------------------
# The definition


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy of π = softmax(hidden·weightᵀ / temperature), differentiable.

    hidden [N, H] and weight [V, H] in any float type, targets [N] int64 in [0, V), temperature > 0.
    Returns (logp [N], entropy [N]), both fp32. Products are formed in fp32: logits rounded to bf16 move log-probs by up
    to 0.1 nats, half of a 0.2 PPO clip. Raises ValueError for a temperature ≤ 0 or unequal N.

    >>> token_logprobs(torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([0]))
    (tensor([-0.6931]), tensor([0.6931]))
    """
    _check(hidden, targets, temperature)
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    parts = [checkpoint(_chunk_logprobs, h, weight, y, temperature, use_reentrant=False) for h, y in chunks]
    logp, entropy = zip(*parts, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def _chunk_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.float() @ weight.float().T  # [C, V]
    return row_stats_torch(logits, targets, temperature)[:2]


def _check(hidden: Tensor, targets: Tensor, temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0 for log-probabilities, got {temperature}")
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states but {targets.shape[0]} targets")


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits hidden·weightᵀ [N, V], always in fp32, from hidden [N, H] and weight [V, H] of one dtype."""
    if hidden.dtype == torch.float32 or not hidden.is_cuda:
        return hidden.float() @ weight.float().T
    return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # bf16 tensor cores; the sums are fp32 and stay so


# ---------------------------------------------------------------------------------------------------------------------
# Training: matmul, row statistics, per-token loss, row gradients, two matmuls; chunk by chunk


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: Callable[[Tensor, Tensor, slice], Tensor],
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Tensor:
    """Σ over chunks of loss_fn(logp [C], entropy [C], tokens), with gradients for hidden [N, H] and weight [V, H].

    `tokens` is the slice of [0, N) that a chunk covers; loss_fn returns a scalar that depends on these tokens only.
    That is what allows the gradient to be taken in the forward pass: ∂L/∂logp and ∂L/∂entropy of a chunk are known as
    soon as its logits are, so they are used once and thrown away. Equals
    loss_fn(*token_logprobs(hidden, weight, targets, temperature), slice(0, N)), which a test holds it to.

    The head's weight is rounded to hidden's dtype, as the sampler does; its gradient is summed over chunks in fp32.
    Raises ValueError like token_logprobs. The result can be differentiated once.
    """
    _check(hidden, targets, temperature)
    return _HeadLoss.apply(hidden, weight, targets, loss_fn, temperature, chunk)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_fn, temperature, chunk):
        W = weight.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), chunk):
            tokens = slice(start, min(start + chunk, len(hidden)))
            h, y = hidden[tokens], targets[tokens]
            logits = project(h, W)  # [C, V] fp32
            logp, entropy, lse = row_stats(logits, y, temperature)  # [C] each
            loss, g_logp, g_entropy = _loss_and_gradients(loss_fn, logp, entropy, tokens)
            d_logits = row_gradients(logits, y, lse, entropy, g_logp, g_entropy, temperature, hidden.dtype)
            d_hidden[tokens] = d_logits @ W
            if d_weight is not None:
                _accumulate(d_weight, d_logits, h)
            total += loss
        ctx.gradients = d_hidden, d_weight
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.gradients
        del ctx.gradients  # scaled in place below: they are gone after one backward
        d_weight = None if d_weight is None else d_weight.mul_(grad).to(ctx.weight_dtype)
        return d_hidden.mul_(grad), d_weight, None, None, None, None


def _loss_and_gradients(loss_fn, logp: Tensor, entropy: Tensor, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a chunk, and its derivatives by each token's log-prob and entropy."""
    inputs = logp.requires_grad_(), entropy.requires_grad_()
    with torch.enable_grad():
        loss = loss_fn(*inputs, tokens)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return loss.detach(), *grads


def _accumulate(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """d_weight [V, H] += d_logitsᵀ·hidden, summed in fp32: in bf16 the sum over chunks would drift."""
    if d_logits.dtype == torch.float32 or not d_logits.is_cuda:
        d_weight.addmm_(d_logits.float().T, hidden.float())
    else:
        torch.addmm(d_weight, d_logits.T, hidden, out_dtype=torch.float32, out=d_weight)


def row_stats_torch(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    z = logits / temperature  # [C, V]
    lse = z.logsumexp(-1)  # [C]
    logp = z.gather(-1, targets[:, None])[:, 0] - lse
    entropy = lse - ((z - lse[:, None]).exp() * z).sum(-1)  # H = lse − E[z]
    return logp, entropy, lse


@jit
def row_stats_kernel(Z, Y, LOGP, ENTROPY, LSE, V, stride, temperature, BLOCK: tl.constexpr):
    """One program per row: log-sum-exp, target logit and Σ p·z in one reading of the row, 4V bytes.

    Z [C, V] fp32 logits with `stride` between rows, Y [C] int64 -> LOGP, ENTROPY, LSE [C] fp32.
    """
    row = tl.program_id(0).to(tl.int64)  # row·V passes 2³¹ at 14,135 rows of 151,936
    m, s, sz = -1e30, 0.0, 0.0  # running max of z, Σ exp(z−m), Σ exp(z−m)·z
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        z = tl.load(Z + row * stride + column, mask=inside, other=-1e30) / temperature
        larger = tl.maximum(m, tl.max(z, 0))
        e = tl.where(inside, tl.exp(z - larger), 0.0)
        shrink = tl.exp(m - larger)  # what was summed so far was relative to the old max
        s = s * shrink + tl.sum(e, 0)
        sz = sz * shrink + tl.sum(e * z, 0)
        m = larger
    lse = m + tl.log(s)
    z_target = tl.load(Z + row * stride + tl.load(Y + row)) / temperature
    tl.store(LOGP + row, tl.minimum(z_target - lse, 0.0))  # rounding could leave a certain token above 0
    tl.store(ENTROPY + row, lse - sz / s)
    tl.store(LSE + row, lse)


def row_stats(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log π(target), entropy, log-sum-exp), each [C], of π = softmax(logits [C, V] / temperature)."""
    if not use_kernels(logits):
        return row_stats_torch(logits, targets, temperature)
    C, V = logits.shape
    logp, entropy, lse = (logits.new_empty(C) for _ in range(3))
    row_stats_kernel[(C,)](
        logits, targets, logp, entropy, lse, V, logits.stride(0), temperature, BLOCK=4096, num_warps=8
    )
    return logp, entropy, lse


def row_gradients_torch(logits, targets, lse, entropy, g_logp, g_entropy, temperature, dtype) -> Tensor:
    logp = logits / temperature - lse[:, None]  # [C, V] of every word
    p = logp.exp()
    d = -(g_logp[:, None] * p) - g_entropy[:, None] * p * (logp + entropy[:, None])
    d.scatter_add_(1, targets[:, None], g_logp[:, None])  # in fp32: 1 − p of a likely target must not cancel
    return (d / temperature).to(dtype)


@jit
def row_gradients_kernel(
    Z, Y, LSE, ENTROPY, G_LOGP, G_ENTROPY, D, V, z_stride, d_stride, temperature, BLOCK: tl.constexpr
):
    """One program per row: ∂L/∂z = [g_logp·(1[y] − p) − g_entropy·p·(log p + entropy)] / T.

    Z [C, V] fp32 logits, the rest [C] -> D [C, V]. Reads 4V bytes and writes 2V (bf16). All of it is computed in fp32
    and rounded once: 1 − p of a likely target, read back from bf16, would be mostly rounding.
    """
    row = tl.program_id(0).to(tl.int64)
    y, lse, entropy = tl.load(Y + row), tl.load(LSE + row), tl.load(ENTROPY + row)
    g_logp, g_entropy = tl.load(G_LOGP + row), tl.load(G_ENTROPY + row)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        logp = tl.load(Z + row * z_stride + column, mask=inside, other=0.0) / temperature - lse
        p = tl.exp(logp)
        d = g_logp * ((column == y).to(tl.float32) - p) - g_entropy * p * (logp + entropy)
        tl.store(D + row * d_stride + column, (d / temperature).to(D.dtype.element_ty), mask=inside)


def row_gradients(logits, targets, lse, entropy, g_logp, g_entropy, temperature, dtype) -> Tensor:
    """∂L/∂logits [C, V] in `dtype`, from the loss's derivatives by logp and entropy, each [C]."""
    if not use_kernels(logits):
        return row_gradients_torch(logits, targets, lse, entropy, g_logp, g_entropy, temperature, dtype)
    C, V = logits.shape
    out = torch.empty(C, V, device=logits.device, dtype=dtype)
    row_gradients_kernel[(C,)](
        logits, targets, lse, entropy, g_logp, g_entropy, out, V, logits.stride(0), out.stride(0), temperature,
        BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Scoring: one matmul whose epilogue keeps four numbers per row and tile, instead of the logits

TOKENS, WORDS, DEPTH, GROUP = 128, 256, 64, 8  # a tile; GROUP tiles of tokens share one tile of W in the L2 cache


@torch.no_grad()
def score(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """token_logprobs without gradients, and on a GPU without logits in memory: (logp [N], entropy [N])."""
    _check(hidden, targets, temperature)
    W = weight.to(hidden.dtype)
    if use_kernels(hidden) and hidden.shape[1] % 8 == 0 and hidden.dtype in (torch.bfloat16, torch.float16):
        return score_triton(hidden.contiguous(), W.contiguous(), targets, temperature)
    return token_logprobs(hidden, W, targets, temperature)


@jit
def score_kernel(
    HIDDEN, WEIGHT, Y, MAX, SUM, SUM_Z, TARGET, N, H, V, inverse_temperature,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per tile of TOKENS x WORDS logits, which live and die in registers.

    HIDDEN [N, H], WEIGHT [V, H] as TMA descriptors, Y [N] int64 -> per token and tile of words, [N, ⌈V/WORDS⌉] fp32:
    MAX of z, SUM of e = exp(z − max), SUM_Z = Σ e·z, and TARGET, the target's z if it is in this tile, else 0.
    2NHV FLOPs; of memory only HIDDEN, WEIGHT and 16 bytes per token and tile are needed, so the tensor cores are the
    floor. One tile per program and no loop over the vocabulary: with one, the accumulators spill out of the registers.
    """
    program, token_tiles, word_tiles = tl.program_id(0), tl.cdiv(N, TOKENS), tl.cdiv(V, WORDS)
    band = program // (GROUP * word_tiles)  # programs go down GROUP token tiles, then to the next tile of words
    height = tl.minimum(token_tiles - band * GROUP, GROUP)
    within = program % (GROUP * word_tiles)
    token_tile, word_tile = band * GROUP + within % height, within // height

    z = tl.zeros((TOKENS, WORDS), tl.float32)
    for depth in range(0, H, DEPTH):
        h = HIDDEN.load([token_tile * TOKENS, depth])  # rows past the end are read as zeros
        w = WEIGHT.load([word_tile * WORDS, depth])
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        z = tl.dot(h, w.T, z)

    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    word = word_tile * WORDS + tl.arange(0, WORDS)
    target = tl.load(Y + token, mask=token < N, other=-1)
    z = tl.where((word < V)[None, :], z * inverse_temperature, -1e30)
    m = tl.max(z, 1)
    e = tl.exp(z - m[:, None])
    cell = token.to(tl.int64) * word_tiles + word_tile
    tl.store(MAX + cell, m, mask=token < N)
    tl.store(SUM + cell, tl.sum(e, 1), mask=token < N)
    tl.store(SUM_Z + cell, tl.sum(e * z, 1), mask=token < N)
    tl.store(TARGET + cell, tl.sum(tl.where(word[None, :] == target[:, None], z, 0.0), 1), mask=token < N)


def score_triton(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    (N, H), V = hidden.shape, weight.shape[0]
    tiles = triton.cdiv(V, WORDS)
    largest, total, total_z, target = hidden.new_empty(4, N, tiles, dtype=torch.float32)
    score_kernel[(triton.cdiv(N, TOKENS) * tiles,)](
        TensorDescriptor.from_tensor(hidden, [TOKENS, DEPTH]), TensorDescriptor.from_tensor(weight, [WORDS, DEPTH]),
        targets, largest, total, total_z, target, N, H, V, 1 / temperature,
        TOKENS=TOKENS, WORDS=WORDS, DEPTH=DEPTH, GROUP=GROUP, UPCAST=UPCAST, num_warps=8, num_stages=4,
    )  # fmt: skip
    m = largest.amax(1, keepdim=True)  # [N, 1]
    shrink = (largest - m).exp()  # [N, tiles]
    s = (total * shrink).sum(1)  # [N]
    lse = m[:, 0] + s.log()
    return (target.sum(1) - lse).clamp(max=0.0), lse - (total_z * shrink).sum(1) / s
