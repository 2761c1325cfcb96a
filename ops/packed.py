"""Packed sequences: several sequences as one row of tokens without padding, and causal attention within each.

The hidden state of a token depends only on the tokens before it, so sequences that begin alike share these tokens. The
packed row is a tree: the samples of a prompt branch off where they differ. All but attention runs on its T tokens.
Attention needs each sequence as a whole. On a GPU in half precision variable-length kernels take the sequences end to
end. Elsewhere attention runs on a right-padded [B, L] rectangle, where the causal mask hides the padding.

Shapes: F tokens of all sequences; T of the tree; A of the B sequences that attention runs on; L longest sequence,
H hidden size, h and h_kv heads, d head size.
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
SHORT = 256  # tokens: the longest sequence whose attention on a CPU keeps an [L, L] matrix; the memory grows with L²
# Since torch 2.12 grouped-query attention must be enabled explicitly.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class ModelError(ValueError):
    """A model that cannot be used; the message names it and the reason."""


def response_offsets(rows: list[Row]) -> list[int]:
    """Where the response of each of N rows starts among all response tokens, end to end, and their number.  [N+1]"""
    return [0, *accumulate(len(response) for _, response in rows)]


@dataclass
class Packed:
    """A tree of tokens, and where each of them stands in the sequences that attention runs on."""

    ids: Tensor  # [1, T]
    positions: Tensor  # [1, T] in their sequences
    node: Tensor  # [F] on the host: the tree's token for each token of the sequences, end to end
    attended: Tensor  # [A] the same of the B sequences alone
    place: Tensor  # [T] the first place of a token in [0, A)
    cu_seqlens: Tensor  # [B+1] int32: where each of the B sequences starts, and A
    cells: Tensor  # [B·L] the token in each cell of the rectangle, any one where it is padding
    cell: Tensor  # [T] the first cell of a token
    max_seqlen: int  # L

    def to_padded(self, x: Tensor) -> Tensor:  # [T, h, d] -> [B, h, L, d]
        return x.index_select(0, self.cells).unflatten(0, (-1, self.max_seqlen)).transpose(1, 2)

    def to_packed(self, x: Tensor) -> Tensor:  # [B, h, L, d] -> [T, h, d]
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.cell)

    @property
    def options(self) -> dict:
        """The keywords with which a transformers model runs packed attention."""
        return dict(position_ids=self.positions, packed=self, use_cache=False)


def pack(sequences: list[list[int]], device: torch.device) -> Packed:
    """The tree of some sequences.

    >>> p = pack([[5, 6, 7], [5, 8], [5, 6]], torch.device("cpu"))
    >>> p.ids.tolist(), p.positions.tolist(), p.node.tolist(), p.attended.tolist()
    ([[5, 6, 7, 8]], [[0, 1, 2, 1]], [0, 1, 2, 0, 3, 0, 1], [0, 1, 2, 0, 3])
    """
    tree: dict[tuple[int, int], int] = {}  # (the token of the tree before, id) -> token of the tree
    node = []
    whole = []  # the B sequences, as tokens of the tree
    for sequence in sequences:
        known = len(tree)
        last = -1
        path = []
        for id in sequence:
            last = tree.setdefault((last, id), len(tree))
            path.append(last)
        node += path
        if len(tree) > known:  # else all of its tokens stand in the sequences before it
            whole.append(path)

    lengths = [len(path) for path in whole]
    longest = max(lengths)
    attended = torch.tensor([token for path in whole for token in path])  # [A]
    position = torch.cat([torch.arange(length) for length in lengths])  # [A]
    row = torch.arange(len(whole)).repeat_interleave(torch.tensor(lengths))  # [A] of the rectangle
    cell = row * longest + position  # [A]
    cells = torch.zeros(len(whole) * longest, dtype=torch.long).index_copy_(0, cell, attended)
    place = torch.full((len(tree),), len(attended))
    place.scatter_reduce_(0, attended, torch.arange(len(attended)), "amin")
    ids = torch.tensor([id for _, id in tree])
    return Packed(
        ids=ids[None].to(device),
        positions=position[place][None].to(device),
        node=torch.tensor(node),
        attended=attended.to(device),
        place=place.to(device),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        cells=cells.to(device),
        cell=cell[place].to(device),
        max_seqlen=longest,
    )


def pads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention pads its sequences: variable-length kernels need half precision and an Ampere GPU."""
    return device.type != "cuda" or dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> Tensor:
    """Causal attention within each sequence. query [T, h, d], key and value [T, h_kv, d] -> [T, h, d]."""
    longest = packed.max_seqlen
    if not pads(query.device, query.dtype):
        ends = packed.cu_seqlens
        q, k, v = (x.index_select(0, packed.attended) for x in (query, key, value))
        out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), **GQA)
        return out.index_select(0, packed.place)
    q = packed.to_padded(query)
    k = packed.to_padded(key)
    v = packed.to_padded(value)
    if not q.is_cuda and longest <= SHORT:
        return packed.to_packed(attend_by_matmuls(q, k, v, scale))
    if q.is_cuda:  # the fp32 kernel without an [L, L] matrix needs equal numbers of heads
        groups = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return packed.to_packed(out)


def attend_by_matmuls(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention with the [L, L] matrix in memory. q [B, h, L, d], k and v [B, h_kv, L, d] -> [B, h, L, d].

    On a CPU in bf16 forward and backward take a fifth of the time of torch's kernel, which has no such matrix
    (24 sequences of 85 tokens). The g query heads that share keys are the rows of one matmul.
    """
    # No softmax changes if all keys do by the same vector. Without their mean, bf16 rounds smaller logits.
    k = k - k.mean(2, keepdim=True)
    L, d = q.shape[2:]
    groups = q.shape[1] // k.shape[1]
    rows = q.reshape(-1, groups * L, d)  # [B·h_kv, g·L, d]
    k = k.reshape(-1, L, d)  # [B·h_kv, L, d]
    v = v.reshape(-1, L, d)
    future = q.new_full((L, L), float("-inf")).triu(1).repeat(groups, 1)  # [g·L, L]
    p = torch.baddbmm(future, rows, k.transpose(1, 2), alpha=scale).softmax(-1)
    return torch.bmm(p, v).view_as(q)


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
