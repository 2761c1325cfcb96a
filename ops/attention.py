"""The work between the matmuls of a decoder layer: rotation and cache write, SwiGLU, attention of one new token.

Each Triton kernel follows its PyTorch twin, which runs on a CPU and defines the result.

Shapes: T tokens fed, n sequences; S slots of the cache, L positions each; h query heads, h_kv key-value heads,
g = h/h_kv, d head size; I intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.head import UPCAST, jit, tl, triton, use_kernels

# attend_kernel's keys per block and warps, by bytes per number: the largest block that does not spill registers.
BLOCKS = {2: dict(BLOCK=64, num_warps=4), 4: dict(BLOCK=32, num_warps=8)}
PROGRAMS = 264  # programs of one attend_kernel launch: two per multiprocessor of an H100 or H200


def rope_and_store_torch(qkv, cos, sin, head_norms, eps, kv, cells):
    kv_heads, d = kv.shape[-2:]
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    if head_norms is not None:
        q.copy_(F.rms_norm(q, (d,), head_norms[0], eps))
        k.copy_(F.rms_norm(k, (d,), head_norms[1], eps))
    rotated = qkv[:, : heads + kv_heads]
    x = rotated.float()
    swapped = x.roll(d // 2, -1).mul_(sin)  # (x₁, x₂) → (−x₂·s, x₁·s)
    rotated.copy_(swapped.addcmul_(x, cos))
    kv.view(-1, d)[cells] = qkv[:, heads:]
    return q, k, v


@jit
def rope_and_store_kernel(
    QKV, COS, SIN, NORMS, KV, CELLS, HEADS, KV_HEADS, eps, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr
):
    """One program per token and head, query, key or value: normalises (Qwen3), rotates, and caches keys and values.

    QKV [T, h + 2·h_kv, d] is rotated in place; COS, SIN [T, d], NORMS [2, d], CELLS [T, 2·h_kv] -> KV [cells, d].
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK)  # element i of the first half of a head rotates with element i of the second
    half = D // 2
    inside = i < half
    here = QKV + (token * (HEADS + 2 * KV_HEADS) + head) * D + i
    x1 = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(here + half, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if NORM:
            shrink = tl.rsqrt((tl.sum(x1 * x1, 0) + tl.sum(x2 * x2, 0)) / D + eps)
            norm = NORMS + (head >= HEADS).to(tl.int32) * D + i
            x1 = x1 * shrink * tl.load(norm, mask=inside, other=0.0).to(tl.float32)
            x2 = x2 * shrink * tl.load(norm + half, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(COS + token * D + i, mask=inside, other=0.0)
        s = tl.load(SIN + token * D + half + i, mask=inside, other=0.0)
        x1, x2 = x1 * c - x2 * s, x2 * c + x1 * s
        tl.store(here, x1.to(QKV.dtype.element_ty), mask=inside)
        tl.store(here + half, x2.to(QKV.dtype.element_ty), mask=inside)
    if head >= HEADS:
        cell = KV + tl.load(CELLS + token * 2 * KV_HEADS + head - HEADS) * D + i
        tl.store(cell, x1.to(KV.dtype.element_ty), mask=inside)
        tl.store(cell + half, x2.to(KV.dtype.element_ty), mask=inside)


def rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, head_norms: Tensor | None, eps: float, kv: Tensor, cells: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotates queries and keys by their positions, in place, and writes keys and values to the cache.

    qkv [T, h + 2·h_kv, d]; cos and sin [T, 1, d] with sin's first half negated; head_norms [2, d] or None;
    kv [2, S, L, h_kv, d]; cells [T, 2·h_kv] int64 -> q [T, h, d], k and v [T, h_kv, d], views of qkv.
    """
    if not use_kernels(qkv):
        return rope_and_store_torch(qkv, cos, sin, head_norms, eps, kv, cells)
    T, all_heads, d = qkv.shape
    kv_heads = kv.shape[-2]
    heads = all_heads - 2 * kv_heads
    has_norms = head_norms is not None
    norms = head_norms if has_norms else qkv  # any tensor: the kernel does not read it
    rope_and_store_kernel[(T, all_heads)](
        qkv, cos, sin, norms, kv, cells, heads, kv_heads, eps,
        D=d, BLOCK=triton.next_power_of_2(d // 2), NORM=has_norms, num_warps=1,
    )  # fmt: skip
    return qkv.split([heads, kv_heads, kv_heads], 1)


def swiglu_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@jit
def swiglu_kernel(GATE_UP, OUT, width, BLOCK: tl.constexpr):
    """One program per token and BLOCK columns: silu(gate)·up. GATE_UP [T, 2·I] -> OUT [T, I].

    It moves 6·I bytes per token in bf16.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE_UP + token * 2 * width + i, mask=i < width, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + token * 2 * width + width + i, mask=i < width, other=0.0).to(tl.float32)
    tl.store(OUT + token * width + i, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty), mask=i < width)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate)·up of gate_up [T, 2·I] -> [T, I]."""
    if not use_kernels(gate_up):
        return swiglu_torch(gate_up)
    T, both = gate_up.shape
    width = both // 2
    out = gate_up.new_empty(T, width)
    swiglu_kernel[(T, triton.cdiv(width, 1024))](gate_up, out, width, BLOCK=1024, num_warps=4)
    return out


def attention_mask(length: Tensor, heads: int, kv_heads: int) -> Tensor:
    """attend_torch's mask [n, h, L'·h_kv], L' the longest length: 0 at a head's keys before length [n], else −1e30."""
    key = torch.arange(int(length.max()) * kv_heads, device=length.device)  # [L'·h_kv]
    kv_head = torch.arange(heads, device=length.device) // (heads // kv_heads)  # [h]
    far = torch.where(key < kv_heads * length[:, None], 0.0, -1e30)  # [n, L'·h_kv]
    foreign = torch.where(key % kv_heads == kv_head[:, None], 0.0, -1e30)  # [h, L'·h_kv]
    return far[:, None] + foreign


def attend_torch(q, keys, values, length, scale, mask=None):
    n, heads, _ = q.shape
    kv_heads = keys.shape[2]
    if mask is None:
        mask = attention_mask(length, heads, kv_heads)
    longest = mask.shape[2] // kv_heads
    k = keys[:n, :longest].flatten(1, 2)  # [n, L'·h_kv, d]
    v = values[:n, :longest].flatten(1, 2)
    if q.dtype != torch.float32:  # oneDNN multiplies a batch with gaps slowly
        k = k.contiguous()
        v = v.contiguous()
    # The matmul multiplies each query head by the keys of all heads; the mask removes those of other heads.
    # One large matmul is faster than many small ones.
    logits = torch.bmm(q, k.transpose(1, 2))  # [n, h, L'·h_kv]
    p = torch.add(mask, logits, alpha=scale).softmax(-1).to(q.dtype)
    return torch.bmm(p, v)


@jit
def attend_kernel(
    Q, KEYS, VALUES, LENGTH, OUT, LSE, scale, q_stride, slot_stride, SPLITS, KV_HEADS: tl.constexpr,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per sequence, key-value head and split: online softmax over its share of the sequence's keys.

    Q [n, h, d] with q_stride between sequences, KEYS and VALUES [S, L, h_kv, d], LENGTH [n] -> OUT [n, h, SPLITS, d],
    normalised within the split, and LSE [n, h, SPLITS] fp32, the split's weight in attend_merge_kernel.
    The g query heads that share keys are the rows of one small matmul, so the cache is read once. A batch of few
    sequences is split over the keys, so that all multiprocessors have work.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.arange(0, ROWS)
    i = tl.arange(0, WIDTH)
    head = kv_head * G + row
    real = (row < G)[:, None] & (i < D)[None, :]
    q = tl.load(Q + sequence * q_stride + head[:, None] * D + i[None, :], mask=real, other=0.0)  # [ROWS, WIDTH]
    if UPCAST:
        q = q.to(tl.float32)
    length = tl.load(LENGTH + sequence)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    cached = sequence * slot_stride + kv_head * D
    m = tl.full((ROWS,), -1e30, tl.float32)  # running max
    s = tl.zeros((ROWS,), tl.float32)  # Σ exp(logit − m)
    sv = tl.zeros((ROWS, WIDTH), tl.float32)  # Σ exp(logit − m)·v
    for start in range(split * share, tl.minimum(length, (split + 1) * share), BLOCK):
        position = start + tl.arange(0, BLOCK)
        here = cached + position[:, None].to(tl.int64) * (KV_HEADS * D) + i[None, :]
        seen = (position < length)[:, None] & (i < D)[None, :]
        k = tl.load(KEYS + here, mask=seen, other=0.0)  # [BLOCK, WIDTH]
        v = tl.load(VALUES + here, mask=seen, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        logit = tl.dot(q, k.T, input_precision="ieee") * scale  # [ROWS, BLOCK]
        logit = tl.where((position < length)[None, :], logit, -1e30)
        larger = tl.maximum(m, tl.max(logit, 1))
        p = tl.exp(logit - larger[:, None])
        shrink = tl.exp(m - larger)  # the sums so far are relative to the old max
        s = s * shrink + tl.sum(p, 1)
        sv = sv * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = larger
    empty = s == 0.0  # a split beyond the sequence's end
    cell = (sequence * KV_HEADS * G + head) * SPLITS + split
    out = sv / tl.where(empty, 1.0, s)[:, None]
    tl.store(OUT + cell[:, None] * D + i[None, :], out.to(OUT.dtype.element_ty), mask=real)
    tl.store(LSE + cell, tl.where(empty, -1e30, m + tl.log(tl.where(empty, 1.0, s))), mask=row < G)


@jit
def attend_merge_kernel(PARTS, LSE, OUT, SPLITS, D: tl.constexpr, WIDTH: tl.constexpr, PADDED_SPLITS: tl.constexpr):
    """One program per sequence and head: Σ over splits of softmax(LSE)·PARTS. [n, h, SPLITS, d] -> OUT [n, h, d]."""
    cell = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, PADDED_SPLITS)
    i = tl.arange(0, WIDTH)
    lse = tl.load(LSE + cell * SPLITS + split, mask=split < SPLITS, other=-1e30)
    weight = tl.where(split < SPLITS, tl.exp(lse - tl.max(lse, 0)), 0.0)
    weight = weight / tl.sum(weight, 0)
    real = (split < SPLITS)[:, None] & (i < D)[None, :]
    parts = tl.load(PARTS + (cell * SPLITS + split)[:, None] * D + i[None, :], mask=real, other=0.0)
    tl.store(OUT + cell * D + i, tl.sum(weight[:, None] * parts, 0).to(OUT.dtype.element_ty), mask=i < D)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, scale: float, mask: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q [n, h, d] over the first length[i] ≥ 1 positions of slot i of keys and values [S, L, h_kv, d].

    -> [n, h, d]. `mask` is attention_mask(length, h, h_kv); the twin computes it if it is not given. The number of
    splits depends on the shapes only, so a captured CUDA graph serves any lengths.
    """
    if not use_kernels(q):
        return attend_torch(q, keys, values, length, scale, mask)
    n, h, d = q.shape
    L = keys.shape[1]
    kv_heads = keys.shape[2]
    g = h // kv_heads
    rows = max(16, triton.next_power_of_2(g))  # a matmul on tensor cores has at least 16
    width = triton.next_power_of_2(d)
    if splits is None:
        splits = min(triton.cdiv(PROGRAMS, n * kv_heads), triton.cdiv(L, 256))
    # A single part is the result itself, so it has the result's dtype.
    dtype = q.dtype if splits == 1 else torch.float32
    parts = torch.empty(n, h, splits, d, device=q.device, dtype=dtype)
    lse = torch.empty(n, h, splits, device=q.device)
    attend_kernel[(n, kv_heads, splits)](
        q, keys, values, length, parts, lse, scale, q.stride(0), keys.stride(0), splits, KV_HEADS=kv_heads,
        G=g, ROWS=rows, D=d, WIDTH=width, UPCAST=UPCAST, num_stages=3,
        **BLOCKS[q.element_size()],
    )  # fmt: skip
    if splits == 1:
        return parts[:, :, 0]
    out = torch.empty(n, h, d, device=q.device, dtype=q.dtype)
    padded = triton.next_power_of_2(splits)
    attend_merge_kernel[(n * h,)](parts, lse, out, splits, D=d, WIDTH=width, PADDED_SPLITS=padded, num_warps=4)
    return out
