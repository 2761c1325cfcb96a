"""The vocabulary head: logits, their row statistics and gradients, and log-probs without logits in memory.

Each Triton kernel follows its PyTorch twin, which runs on a CPU and defines the result. One matmul with the head
takes 2NHV FLOPs.

Shapes: N tokens, H hidden size, V vocabulary size, C tokens of one chunk. Log-probs and entropies are in nats.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no wheel for this system: the PyTorch twins run
    triton = tl = None

jit = triton.jit if triton else (lambda function: function)
UPCAST = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter multiplies bf16 as if it were integers
CHUNK = 2048  # C: a matmul of this many rows keeps a GPU busy; their fp32 logits take 1.2 GB at V = 152k
CACHED = 2**23  # logits of one block on a CPU: 32 MiB in fp32 about stay in its cache
# score_kernel's tile of logits and its steps along H. GROUP tiles of tokens share one tile of the weight in L2 cache.
TILE = dict(TOKENS=128, WORDS=256, DEPTH=64, GROUP=8)


def use_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels can run on x's device; otherwise their PyTorch twins run."""
    return x.is_cuda and triton is not None


def blocks(rows: int, V: int, device: torch.device) -> list[slice]:
    """Rows of logits to compute at a time: CHUNK, fewer on a CPU, whose cache they should not leave."""
    block = CHUNK if device.type == "cuda" else min(CHUNK, max(CACHED // V, 64))
    return [slice(start, min(start + block, rows)) for start in range(0, rows, block)]


def rounded_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight for `project`, rounded to `dtype`; on a CPU in fp32, to which each call would convert it."""
    rounded = weight.to(dtype)
    return rounded if rounded.is_cuda else rounded.float()


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits hidden·weightᵀ [N, V] in fp32, from hidden [N, H] and weight [V, H] of one dtype."""
    if hidden.dtype == torch.float32 or not hidden.is_cuda:
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ weight.float().T
    return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # bf16 tensor cores with fp32 sums


def accumulate_weight_gradient(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """d_weight [V, H] += d_logitsᵀ·hidden, summed in fp32: in bf16 the sum over chunks would drift."""
    if d_logits.dtype == torch.float32 or not d_logits.is_cuda:
        d_weight.addmm_(d_logits.float().T, hidden.float())
    else:
        torch.addmm(d_weight, d_logits.T, hidden, out_dtype=torch.float32, out=d_weight)


def row_stats_torch(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    z = logits / temperature  # [C, V]
    log_pi = z.log_softmax(-1)
    logp = log_pi.gather(-1, targets[:, None])[:, 0]  # [C]
    lse = z.gather(-1, targets[:, None])[:, 0] - logp
    entropy = -torch.linalg.vecdot(log_pi.exp(), log_pi)
    return logp, entropy, lse


@jit
def row_stats_kernel(Z, Y, LOGP, ENTROPY, LSE, V, stride, temperature, BLOCK: tl.constexpr):
    """One program per row reads 4V bytes once. Z [C, V] fp32 logits, Y [C] int64 -> LOGP, ENTROPY, LSE [C] fp32."""
    row = tl.program_id(0).to(tl.int64)  # row·V passes 2³¹ at 14,135 rows of 151,936
    m = -1e30  # running max of z
    s = 0.0  # Σ exp(z−m)
    sz = 0.0  # Σ exp(z−m)·z
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        z = tl.load(Z + row * stride + column, mask=inside, other=-1e30) / temperature
        larger = tl.maximum(m, tl.max(z, 0))
        e = tl.where(inside, tl.exp(z - larger), 0.0)
        shrink = tl.exp(m - larger)  # the sums so far are relative to the old max
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
    logp, entropy, lse = logits.new_empty(3, C)
    stride = logits.stride(0)
    row_stats_kernel[(C,)](
        logits, targets, logp, entropy, lse, V, stride, temperature,
        BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return logp, entropy, lse


def row_gradients_torch(logits, targets, lse, entropy, g_logp, g_entropy, temperature, out) -> None:
    g_logp = (g_logp / temperature)[:, None]
    log_pi = (logits / temperature).sub_(lse[:, None])  # [C, V]
    factor = -g_logp  # of π
    if g_entropy is not None:
        factor = factor - (g_entropy / temperature)[:, None] * (log_pi + entropy[:, None])
    d = log_pi.exp_().mul_(factor)
    d.scatter_add_(1, targets[:, None], g_logp)  # in fp32: 1 − π of a likely target must not cancel
    out.copy_(d)


@jit
def row_gradients_kernel(
    Z, Y, LSE, ENTROPY, G_LOGP, G_ENTROPY, D, V, z_stride, d_stride, temperature, BLOCK: tl.constexpr
):
    """One program per row: ∂L/∂z = [g_logp·(1[y] − p) − g_entropy·p·(log p + entropy)] / T.

    Z [C, V] fp32 logits, the rest [C] -> D [C, V]. In bf16, 1 − p of a likely target would be mostly rounding.
    """
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(Y + row)
    lse = tl.load(LSE + row)
    entropy = tl.load(ENTROPY + row)
    g_logp = tl.load(G_LOGP + row)
    g_entropy = tl.load(G_ENTROPY + row)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        logp = tl.load(Z + row * z_stride + column, mask=inside, other=0.0) / temperature - lse
        p = tl.exp(logp)
        d = g_logp * ((column == y).to(tl.float32) - p) - g_entropy * p * (logp + entropy)
        tl.store(D + row * d_stride + column, (d / temperature).to(D.dtype.element_ty), mask=inside)


def row_gradients(logits, targets, lse, entropy, g_logp, g_entropy, temperature, out) -> None:
    """Writes ∂L/∂logits to out [C, V], from the loss's derivatives by logp and entropy, [C]; the latter may be None."""
    if not use_kernels(logits):
        row_gradients_torch(logits, targets, lse, entropy, g_logp, g_entropy, temperature, out)
        return
    if g_entropy is None:
        g_entropy = torch.zeros_like(g_logp)
    C, V = logits.shape
    # autograd gives the gradient of a plain sum as one number with stride 0
    g_logp = g_logp.contiguous()
    g_entropy = g_entropy.contiguous()
    row_gradients_kernel[(C,)](
        logits, targets, lse, entropy, g_logp, g_entropy, out, V, logits.stride(0), out.stride(0), temperature,
        BLOCK=4096, num_warps=8,
    )  # fmt: skip


@jit
def score_kernel(
    HIDDEN, WEIGHT, Y, MAX, SUM, SUM_Z, TARGET, N, H, V, inverse_temperature,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per tile of TOKENS x WORDS logits, which stay in registers.

    HIDDEN [N, H], WEIGHT [V, H] as TMA descriptors, Y [N] int64 -> per token and tile of words, [N, ⌈V/WORDS⌉] fp32:
    MAX of z, SUM of e = exp(z − max), SUM_Z = Σ e·z, and TARGET, the target's z if it is in this tile, else 0.
    A loop over the vocabulary would spill the accumulators, so each program computes one tile.
    """
    program = tl.program_id(0)
    token_tiles = tl.cdiv(N, TOKENS)
    word_tiles = tl.cdiv(V, WORDS)
    # Consecutive programs take GROUP token tiles of one tile of words, then those of the next tile of words.
    band = program // (GROUP * word_tiles)
    height = tl.minimum(token_tiles - band * GROUP, GROUP)
    within = program % (GROUP * word_tiles)
    token_tile = band * GROUP + within % height
    word_tile = within // height

    z = tl.zeros((TOKENS, WORDS), tl.float32)
    for depth in range(0, H, DEPTH):
        h = HIDDEN.load([token_tile * TOKENS, depth])  # rows past the end are read as zeros
        w = WEIGHT.load([word_tile * WORDS, depth])
        if UPCAST:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
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


def can_score(hidden: Tensor) -> bool:
    """Whether `score` can run: on a GPU, in half precision, with rows of a multiple of 16 bytes."""
    return use_kernels(hidden) and hidden.shape[1] % 8 == 0 and hidden.dtype in (torch.bfloat16, torch.float16)


def score(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log π(target), entropy), each [N] fp32, of contiguous hidden [N, H] and weight [V, H] of one dtype."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    N, H = hidden.shape
    V = len(weight)
    depth = TILE["DEPTH"]
    token_tiles = triton.cdiv(N, TILE["TOKENS"])
    word_tiles = triton.cdiv(V, TILE["WORDS"])
    largest, total, total_z, target = hidden.new_empty(4, N, word_tiles, dtype=torch.float32)
    score_kernel[(token_tiles * word_tiles,)](
        TensorDescriptor.from_tensor(hidden, [TILE["TOKENS"], depth]),
        TensorDescriptor.from_tensor(weight, [TILE["WORDS"], depth]),
        targets, largest, total, total_z, target, N, H, V, 1 / temperature,
        **TILE, UPCAST=UPCAST, num_warps=8, num_stages=4,
    )  # fmt: skip
    # Joins the tiles of words: the sums of a tile are relative to its own max.
    m = largest.amax(1, keepdim=True)  # [N, 1]
    shrink = (largest - m).exp()  # [N, ⌈V/WORDS⌉]
    s = (total * shrink).sum(1)  # [N]
    lse = m[:, 0] + s.log()
    return (target.sum(1) - lse).clamp(max=0.0), lse - (total_z * shrink).sum(1) / s
