"""The policy as the sampler runs it: one token per sequence, over a cache of keys and values.

transformers' modules spend dozens of small operations per layer and token, which decide how fast tokens come. Here a
layer is ten: weights that share an input are one matrix (Q, K, V; gate and up), residuals are added inside the matmuls
that make them, and what is left is fused into a few kernels, each below its twin in PyTorch, which runs on a CPU:

    RMSNorm  →  QKV matmul  →  rope_and_store  →  attend (two kernels)  →  output matmul + residual
    RMSNorm  →  gate-up matmul  →  swiglu  →  down matmul + residual

It serves models built like Llama, Qwen2 and Qwen3, and compares itself with transformers before it serves any.

Shapes: T tokens fed, n sequences; S slots of the cache, L positions each; h query heads, h_kv key-value heads,
g = h/h_kv, d head size; H hidden, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.model import ModelError, causal_attention, pack, pick_device, refuse_other_attention, twin
from logprob import UPCAST, jit, project, tl, triton, use_kernels


@dataclass
class Cache:
    """Keys and values of S sequences of up to L tokens, and the rotations of L positions."""

    kv: Tensor  # [layers, 2, S, L, h_kv, d] keys, then values
    cos: Tensor  # [L, 1, d] fp32
    sin: Tensor  # [L, 1, d] fp32, the first half negated

    def cells(self, slot: Tensor, position: Tensor) -> Tensor:
        """Where tokens [T] put their keys and values: rows of a layer seen as [2·S·L·h_kv, d].  [T, 2·h_kv]"""
        _, two, S, L, kv_heads, _ = self.kv.shape
        first = (torch.arange(two, device=slot.device) * S + slot[:, None]) * L + position[:, None]  # [T, 2]
        return (first[:, :, None] * kv_heads + torch.arange(kv_heads, device=slot.device)).flatten(1)


@dataclass
class Layer:
    """One decoder layer's weights; those of the fused matrices are views of them (see `fuse`)."""

    norm_1: Tensor  # [H]
    qkv: Tensor  # [(h + 2·h_kv)·d, H]
    qkv_bias: Tensor | None
    head_norms: Tensor | None  # [2, d] of query and key heads, in Qwen3
    out: nn.Linear
    norm_2: Tensor  # [H]
    gate_up: Tensor  # [2·I, H]
    gate_up_bias: Tensor | None
    down: nn.Linear
    scale: float  # of attention's logits


def fuse(parameters: list[nn.Parameter | None]) -> Tensor | None:
    """One tensor of several parameters that follow each other; they become views of it, so that whoever writes them,
    as lora.merge_into does after every update, writes it."""
    if parameters[0] is None:
        return None
    whole = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        p.data = part
    return whole


class Decoder:
    """A copy of a model, its weights arranged for decoding. `model` is that copy: write its parameters in place."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        """Raises ModelError if the model is not built like Llama, Qwen2 or Qwen3, or computes anything else."""
        self.model, device = twin(model).requires_grad_(False).eval(), pick_device()
        for p in self.model.parameters():  # the model's frequencies of rotation must stay fp32
            p.data = p.data.to(device, dtype, copy=True)
        self.model.to(device).set_attn_implementation("packed")
        c = model.config
        self.kv_heads = c.num_key_value_heads
        self.heads = c.num_attention_heads
        self.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        try:
            self.layers = [_layer(layer) for layer in self.model.model.layers]
            self.eps = self.model.model.norm.variance_epsilon
            rope = self.model.model.rotary_emb.rope_type
        except AttributeError as error:
            raise ModelError(f"{type(model).__name__} is not built like Llama, Qwen2 or Qwen3: {error}") from error
        if rope in ("dynamic", "longrope"):
            raise ModelError(f"rope type {rope!r} rotates by the length of the sequence, which decoder.py does not do")
        self._compare_with_transformers()

    @property
    def head(self) -> Tensor:  # [V, H]
        return self.model.get_output_embeddings().weight

    def new_cache(self, slots: int, length: int) -> Cache:
        """An empty cache. Raises ModelError if the model's attention would not see all of `length` positions."""
        for layer in self.model.model.layers:
            window = getattr(layer.self_attn, "sliding_window", None)
            refuse_other_attention(length, sliding_window=window)
        shape = (len(self.layers), 2, slots, length, self.kv_heads, self.head_dim)
        kv = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        fp32 = torch.empty(0, device=self.model.device)
        cos, sin = self.model.model.rotary_emb(fp32, torch.arange(length, device=self.model.device)[None])  # [1, L, d]
        cos, sin = cos[0, :, None].contiguous(), sin[0, :, None].contiguous()
        sin[..., : self.head_dim // 2] *= -1
        return Cache(kv, cos, sin)

    def prefill(self, cache: Cache, prompts: list[list[int]], slots: Tensor) -> Tensor:
        """Runs whole prompts, prompt i into slot slots[i], and returns the logits of their next tokens, [P, V] fp32."""
        packed = pack(prompts, self.model.device)
        starts = packed.segments.starts.long()  # [P+1] with the end

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal_attention(q, k, v, packed.segments, self.layers[layer].scale)

        slot = slots.repeat_interleave(starts.diff())  # [T]
        hidden = self.forward(cache, packed.ids[0], packed.positions[0], slot, attention)  # [T, H]
        return project(hidden[starts[1:] - 1], self.head)

    def decode(self, cache: Cache, ids: Tensor, position: Tensor) -> Tensor:
        """Feeds one token to each of the first n slots; ids, position [n] -> logits of the next tokens, [n, V] fp32."""
        length = position + 1  # [n] each token sees itself
        mask = None if use_kernels(ids) else attention_mask(length, self.heads, self.kv_heads)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, *cache.kv[layer], length, self.layers[layer].scale, mask)

        slot = torch.arange(len(ids), device=ids.device)
        return project(self.forward(cache, ids, position, slot, attention), self.head)

    def forward(
        self, cache: Cache, ids: Tensor, position: Tensor, slot: Tensor, attention: Callable[..., Tensor]
    ) -> Tensor:
        """Hidden states [T, H] of tokens `ids` at `position` of `slot`, each [T]; their keys and values are cached.

        attention(layer, q [T, h, d], k [T, h_kv, d], v [T, h_kv, d]) -> [T, h, d].
        """
        x = F.embedding(ids, self.model.get_input_embeddings().weight)  # [T, H] the residual stream
        cos, sin, cells = cache.cos[position], cache.sin[position], cache.cells(slot, position)
        for i, w in enumerate(self.layers):
            y = F.rms_norm(x, x.shape[1:], w.norm_1, self.eps)
            qkv = F.linear(y, w.qkv, w.qkv_bias).view(len(ids), -1, self.head_dim)  # [T, h + 2·h_kv, d]
            q, k, v = rope_and_store(qkv, cos, sin, w.head_norms, self.eps, cache.kv[i], cells)
            add_linear(x, attention(i, q, k, v).flatten(1), w.out)
            y = F.rms_norm(x, x.shape[1:], w.norm_2, self.eps)
            add_linear(x, swiglu(F.linear(y, w.gate_up, w.gate_up_bias)), w.down)
        return F.rms_norm(x, x.shape[1:], self.model.model.norm.weight, self.eps)

    @torch.inference_mode()
    def _compare_with_transformers(self) -> None:
        """Raises ModelError unless prefill and decode give the logits of transformers' own modules."""
        device, V = self.model.device, self.model.config.vocab_size
        ids = [(7 * i + 1) % V for i in range(9)]
        packed = pack([ids], device)
        where = dict(position_ids=packed.positions, segments=packed.segments, use_cache=False)
        expected = self.model(input_ids=packed.ids, **where).logits[0, -2:].float()  # after the last two tokens
        cache, slot = self.new_cache(1, len(ids)), torch.zeros(1, dtype=torch.long, device=device)
        before = self.prefill(cache, [ids[:-1]], slot)
        found = torch.cat([before, self.decode(cache, slot + ids[-1], slot + len(ids) - 1)])
        error = ((found - expected).norm() / expected.norm()).item()
        if not error < (1e-3 if self.model.dtype == torch.float32 else 0.1):
            raise ModelError(
                f"decoder.py's logits differ from transformers' by {error:.0%}: {type(self.model).__name__} has "
                "something that Llama, Qwen2 and Qwen3 have not"
            )


def _layer(layer: nn.Module) -> Layer:
    a, mlp = layer.self_attn, layer.mlp
    qkv, gate_up = (a.q_proj, a.k_proj, a.v_proj), (mlp.gate_proj, mlp.up_proj)
    return Layer(
        norm_1=layer.input_layernorm.weight,
        qkv=fuse([m.weight for m in qkv]),
        qkv_bias=fuse([m.bias for m in qkv]),
        head_norms=fuse([a.q_norm.weight, a.k_norm.weight]).view(2, -1) if hasattr(a, "q_norm") else None,
        out=a.o_proj,
        norm_2=layer.post_attention_layernorm.weight,
        gate_up=fuse([m.weight for m in gate_up]),
        gate_up_bias=fuse([m.bias for m in gate_up]),
        down=mlp.down_proj,
        scale=a.scaling,
    )


def add_linear(x: Tensor, y: Tensor, linear: nn.Linear) -> None:
    """x [T, H] += linear(y): the matmul adds to the residual stream as it writes, rounding once."""
    x.addmm_(y, linear.weight.T)
    if linear.bias is not None:
        x += linear.bias


# ---------------------------------------------------------------------------------------------------------------------
# Between the matmuls


def rope_and_store_torch(qkv, cos, sin, head_norms, eps, kv, cells):
    kv_heads, d = kv.shape[-2:]
    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    if head_norms is not None:
        for x, norm in zip((q, k), head_norms, strict=True):
            x.copy_(F.rms_norm(x, (d,), norm, eps))
    rotated = qkv[:, : heads + kv_heads]
    swapped = rotated.roll(d // 2, -1) * sin  # (x₁, x₂) → (−x₂·s, x₁·s)
    rotated.copy_((rotated * cos).add_(swapped))
    kv.view(-1, d)[cells] = qkv[:, heads:]
    return q, k, v


@jit
def rope_and_store_kernel(
    QKV, COS, SIN, NORMS, KV, CELLS, HEADS, KV_HEADS, eps, D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr
):
    """One program per token and head, query, key or value: normalises (Qwen3), rotates, and files keys and values.

    QKV [T, h + 2·h_kv, d] is rotated in place; COS, SIN [T, d], NORMS [2, d], CELLS [T, 2·h_kv] -> KV [cells, d].
    A few hundred bytes per program: what counts is that it is one kernel and not a dozen.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)  # element i of the first half of a head turns with element i of the second
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
    (T, all_heads, d), kv_heads = qkv.shape, kv.shape[-2]
    heads = all_heads - 2 * kv_heads
    rope_and_store_kernel[(T, all_heads)](
        qkv, cos, sin, qkv if head_norms is None else head_norms, kv, cells, heads, kv_heads, eps,
        D=d, BLOCK=triton.next_power_of_2(d // 2), NORM=head_norms is not None, num_warps=1,
    )  # fmt: skip
    return qkv.split([heads, kv_heads, kv_heads], 1)


def swiglu_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@jit
def swiglu_kernel(GATE_UP, OUT, width, BLOCK: tl.constexpr):
    """One program per token and BLOCK columns: silu(gate)·up. GATE_UP [T, 2·I] -> OUT [T, I]; 6I bytes each in bf16."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE_UP + token * 2 * width + i, mask=i < width, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + token * 2 * width + width + i, mask=i < width, other=0.0).to(tl.float32)
    tl.store(OUT + token * width + i, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty), mask=i < width)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate)·up of gate_up [T, 2·I] -> [T, I]."""
    if not use_kernels(gate_up):
        return swiglu_torch(gate_up)
    T, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(T, width)
    swiglu_kernel[(T, triton.cdiv(width, 1024))](gate_up, out, width, BLOCK=1024, num_warps=4)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Attention of one new token per sequence over its cached keys and values


def attention_mask(length: Tensor, heads: int, kv_heads: int) -> Tensor:
    """What attend_torch adds to its logits: 0 where a head's own keys stand before length [n], −1e30 elsewhere.

    -> [n, h, L'·h_kv], L' the longest length.
    """
    device = length.device
    position, head, kv_head = (torch.arange(n, device=device) for n in (int(length.max()), heads, kv_heads))
    far = torch.where(position < length[:, None], 0.0, -1e30)  # [n, L']
    foreign = torch.where(kv_head == head[:, None] // (heads // kv_heads), 0.0, -1e30)  # [h, h_kv]
    return (far[:, None, :, None] + foreign[:, None]).flatten(2)


def attend_torch(q, keys, values, length, scale, mask=None):
    mask = attention_mask(length, q.shape[1], keys.shape[2]) if mask is None else mask
    longest = mask.shape[2] // keys.shape[2]
    k, v = (x[: len(q), :longest].flatten(1, 2) for x in (keys, values))  # [n, L'·h_kv, d]
    # all heads with the keys of all: with few key-value heads one larger matmul is faster than many small ones
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

    Q [n, h, d] with q_stride between sequences, KEYS and VALUES [S, L, h_kv, d], LENGTH [n] -> OUT [n, h, SPLITS, d]
    fp32, normalised within the split, and LSE [n, h, SPLITS] fp32 by which attend_merge_kernel weighs it.
    The g heads that share keys and values are the rows of one small matmul, so the cache is read once: 4·length·d
    bytes per program and split, which is the floor. Splits keep all multiprocessors busy when sequences are few.
    """
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, i = tl.arange(0, ROWS), tl.arange(0, WIDTH)
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
            k, v = k.to(tl.float32), v.to(tl.float32)
        logit = tl.dot(q, k.T, input_precision="ieee") * scale  # [ROWS, BLOCK]
        logit = tl.where((position < length)[None, :], logit, -1e30)
        larger = tl.maximum(m, tl.max(logit, 1))
        p, shrink = tl.exp(logit - larger[:, None]), tl.exp(m - larger)
        s = s * shrink + tl.sum(p, 1)
        sv = sv * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = larger
    empty = s == 0.0  # a split beyond the sequence's end
    cell = (sequence * KV_HEADS * G + head) * SPLITS + split
    tl.store(OUT + cell[:, None] * D + i[None, :], sv / tl.where(empty, 1.0, s)[:, None], mask=real)
    tl.store(LSE + cell, tl.where(empty, -1e30, m + tl.log(tl.where(empty, 1.0, s))), mask=row < G)


@jit
def attend_merge_kernel(PARTS, LSE, OUT, SPLITS, D: tl.constexpr, WIDTH: tl.constexpr, PADDED_SPLITS: tl.constexpr):
    """One program per sequence and head: Σ over splits of softmax(LSE)·PARTS. [n, h, SPLITS, d] -> OUT [n, h, d]."""
    cell = tl.program_id(0).to(tl.int64)
    split, i = tl.arange(0, PADDED_SPLITS), tl.arange(0, WIDTH)
    lse = tl.load(LSE + cell * SPLITS + split, mask=split < SPLITS, other=-1e30)
    weight = tl.where(split < SPLITS, tl.exp(lse - tl.max(lse, 0)), 0.0)
    weight = weight / tl.sum(weight, 0)
    real = (split < SPLITS)[:, None] & (i < D)[None, :]
    parts = tl.load(PARTS + (cell * SPLITS + split)[:, None] * D + i[None, :], mask=real, other=0.0)
    tl.store(OUT + cell * D + i, tl.sum(weight[:, None] * parts, 0).to(OUT.dtype.element_ty), mask=i < D)


# keys at a time and warps, by the bytes of a number: as many as leave no register spilled
BLOCKS = {2: dict(BLOCK=64, num_warps=4), 4: dict(BLOCK=32, num_warps=8)}
PROGRAMS = 264  # two per multiprocessor of an H100 or H200


def attend(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, scale: float, mask: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q [n, h, d] over the first length[i] ≥ 1 positions of slot i of keys and values [S, L, h_kv, d].

    -> [n, h, d]. `mask` is attention_mask(length, h, h_kv), which the twin needs, if it is at hand. How the kernel's
    work is split depends on the shapes alone, so a captured CUDA graph fits any lengths.
    """
    if not use_kernels(q):
        return attend_torch(q, keys, values, length, scale, mask)
    (n, h, d), (_, L, kv_heads, _) = q.shape, keys.shape
    if splits is None:
        splits = max(1, min(triton.cdiv(PROGRAMS, n * kv_heads), triton.cdiv(L, 256)))
    parts = torch.empty(n, h, splits, d, device=q.device)
    lse = torch.empty(n, h, splits, device=q.device)
    g, width = h // kv_heads, triton.next_power_of_2(d)
    attend_kernel[(n, kv_heads, splits)](
        q, keys, values, length, parts, lse, scale, q.stride(0), keys.stride(0), splits, KV_HEADS=kv_heads,
        G=g, ROWS=max(16, triton.next_power_of_2(g)), D=d, WIDTH=width, UPCAST=UPCAST, num_stages=3,
        **BLOCKS[q.element_size()],
    )  # fmt: skip
    out = torch.empty(n, h, d, device=q.device, dtype=q.dtype)
    padded = triton.next_power_of_2(splits)
    attend_merge_kernel[(n * h,)](parts, lse, out, splits, D=d, WIDTH=width, PADDED_SPLITS=padded, num_warps=4)
    return out
