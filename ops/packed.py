"""Packed sequences: several sequences laid end to end as one row of tokens, and causal attention within each.

A tokenizer never pads. On a GPU in half precision attention runs on the packed tokens, by variable-length kernels.
Elsewhere it runs on a right-padded [B, L] rectangle, where the causal mask hides the padding from every real token.

Shapes: B sequences, T packed tokens, L longest sequence, H hidden size, h and h_kv heads, d head size.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

Row = tuple[list[int], list[int]]  # token ids of a prompt and of its response
# Since torch 2.12 grouped-query attention must be enabled explicitly.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class ModelError(ValueError):
    """A model that cannot be used; the message names it and the reason."""


def response_offsets(rows: list[Row]) -> list[int]:
    """Where the response of each of N rows starts among all response tokens, end to end, and their number.  [N+1]"""
    return [0, *accumulate(len(response) for _, response in rows)]


@dataclass
class Packed:
    """Sequences laid end to end, and the place of every token in the [B, L] rectangle."""

    ids: Tensor  # [1, T]
    positions: Tensor  # [1, T], restarting at 0 with each sequence
    cu_seqlens: Tensor  # [B+1] int32: where each sequence starts, and T
    index: Tensor  # [T] sequence·L + position
    max_seqlen: int  # L

    def to_padded(self, x: Tensor) -> Tensor:  # [T, h, d] -> [B, h, L, d]
        batch = len(self.cu_seqlens) - 1
        out = x.new_zeros(batch * self.max_seqlen, *x.shape[1:])
        out[self.index] = x
        return out.unflatten(0, (batch, self.max_seqlen)).transpose(1, 2)

    def to_packed(self, x: Tensor) -> Tensor:  # [B, h, L, d] -> [T, h, d]
        return x.transpose(1, 2).flatten(0, 1)[self.index]

    @property
    def options(self) -> dict:
        """The keywords with which a transformers model runs packed attention."""
        return dict(position_ids=self.positions, packed=self, use_cache=False)


def pack(sequences: list[list[int]], device: torch.device) -> Packed:
    """Lays sequences end to end.

    >>> p = pack([[5, 6, 7], [8]], torch.device("cpu"))
    >>> p.ids.tolist(), p.positions.tolist(), p.index.tolist()
    ([[5, 6, 7, 8]], [[0, 1, 2, 0]], [0, 1, 2, 3])
    """
    lengths = [len(s) for s in sequences]
    longest = max(lengths)
    ids = torch.tensor([i for s in sequences for i in s])  # [T]
    positions = torch.cat([torch.arange(length) for length in lengths])  # [T]
    first_cells = torch.arange(len(sequences)) * longest  # [B] of the rectangle's rows
    index = first_cells.repeat_interleave(torch.tensor(lengths)) + positions  # [T]
    return Packed(
        ids=ids[None].to(device),
        positions=positions[None].to(device),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        index=index.to(device),
        max_seqlen=longest,
    )


def pads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention pads its sequences: variable-length kernels need half precision and an Ampere GPU."""
    return device.type != "cuda" or dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> Tensor:
    """Block-diagonal causal attention of packed tokens. query [T, h, d], key and value [T, h_kv, d] -> [T, h, d].

    On two CPU cores the rectangle takes half the time of one call per sequence (128 sequences of 15 to 60 tokens).
    """
    if not pads(query.device, query.dtype):
        ends = packed.cu_seqlens
        longest = packed.max_seqlen
        return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), **GQA)
    q = packed.to_padded(query)
    k = packed.to_padded(key)
    v = packed.to_padded(value)
    if q.is_cuda:  # the fp32 kernel without an [L, L] matrix needs equal numbers of heads
        groups = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return packed.to_packed(out)


def packed_attention(module, query, key, value, attention_mask, scaling, packed: Packed, dropout=0.0, **kwargs):
    """`causal_attention` in transformers' signature: query [1, h, T, d], key, value [1, h_kv, T, d] -> [1, T, h, d]."""
    refuse_other_attention(packed.max_seqlen, **kwargs)
    # Under autocast Qwen3's head norms turn bf16 queries and keys into fp32 ones.
    dtype = value.dtype
    q = query[0].transpose(0, 1).to(dtype)
    k = key[0].transpose(0, 1).to(dtype)
    v = value[0].transpose(0, 1)
    return causal_attention(q, k, v, packed, scaling)[None], None


def refuse_other_attention(max_seqlen: int, sliding_window=None, softcap=None, s_aux=None, **kwargs) -> None:
    """Raises ModelError for attention that is not plain causal, which this code would compute wrongly."""
    if softcap or s_aux is not None or (sliding_window is not None and sliding_window < max_seqlen):
        windowed = f"a window of {sliding_window} tokens for sequences of {max_seqlen}"
        asked = windowed if sliding_window else "soft caps or sinks"
        raise ModelError(f"this model's attention has {asked}; only full causal attention is supported")


AttentionInterface.register("packed", packed_attention)


def hidden_states(model: nn.Module, packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """Final hidden states of packed tokens, [T, H]; the residual stream has `dtype`, by default the weights'."""
    embedded = model.get_input_embeddings()(packed.ids)  # [1, T, H]
    return model.model(inputs_embeds=embedded.to(dtype or embedded.dtype), **packed.options).last_hidden_state[0]


def run_forward(model: nn.Module, function: Callable):
    """function(model). A sharded model runs it as FSDP2's forward pass, which gathers weights (parallel.shard)."""
    if not hasattr(model, "run_forward"):
        return function(model)
    result = model.run_forward(function)
    # The root module keeps its gathered weights for the backward pass, which frees them. Without gradients none
    # follows: the optimizer would step the slices, and the next pass would read the old gathered weights.
    if not torch.is_grad_enabled():
        model.reshard()
    return result
