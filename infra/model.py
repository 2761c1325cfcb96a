"""Loading a transformers model, and log-probs of packed sequences: what training and evaluation share.

Sequences are never padded by a tokenizer. A batch is one row of tokens, sequences laid end to end with
restarting positions. Attention is causal within each sequence: by variable-length kernels on a GPU; elsewhere over a
[B, L] rectangle, right-padded, where a causal mask alone keeps real tokens from seeing padding or their neighbours.

Shapes: B sequences, T packed tokens, L longest sequence, R response tokens, H hidden, h heads, d head size.
"""

import copy
import inspect
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from logprob import head_loss, score, token_logprobs

Row = tuple[list[int], list[int]]  # token ids of a prompt and of its response


# torch 2.12 began to ask for leave to have fewer key-value heads
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class ModelError(ValueError):
    """A model that cannot be used; the message says which and why."""


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(name_or_folder: str, trust_remote_code: bool = False, device: torch.device | None = None, revision: str = ""):
    """(model, tokenizer) of a hub name or folder: fp32 weights, packed attention, dropout off.

    Raises ModelError when there is no such folder or it is not a causal language model we can train.
    """
    options = dict(trust_remote_code=trust_remote_code, revision=revision or None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder, **options)
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_folder, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # what transformers raises for unusable files
        known = (
            "is a folder without a usable model"
            if Path(name_or_folder).is_dir()
            else "is no folder, nor to be had from the hub (without a network, put its config.json, tokenizer files "
            "and *.safetensors into a folder, and name that)"
        )
        raise ModelError(f"model {name_or_folder!r} {known}: {str(error).strip().splitlines()[0]}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would begin with random ones
        raise ModelError(f"model {name_or_folder!r} lacks {len(missing)} of its weights, the first is {missing[0]}")
    if not tokenizer.encode("1"):
        raise ModelError(f"model {name_or_folder!r} has no usable tokenizer beside it: '1' encodes to nothing")
    if not (hasattr(model, "model") and hasattr(model.config, "num_key_value_heads")):
        raise ModelError(f"model {name_or_folder!r}: {type(model).__name__} is not built like Llama, Qwen2 or Qwen3")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(
            f"model {name_or_folder!r} has a bias on its vocabulary head, which logprob.py does not support"
        )
    model.set_attn_implementation("packed")
    return model.to(device or pick_device()).eval(), tokenizer


def twin(model: nn.Module) -> nn.Module:
    """A copy whose parameters are still the model's memory: give each memory of its own before it is written to."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()})


def stop_tokens(model: nn.Module, tokenizer, end_of_turn: int | None = None) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS, the generation config's, and the template's end of turn."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names no EOS token: set eos_token in its tokenizer_config.json")
    ids = model.generation_config.eos_token_id
    several = ids if isinstance(ids, list) else [ids]
    return sorted({tokenizer.eos_token_id, end_of_turn, *several} - {None})


@dataclass
class Segments:
    """Where packed tokens belong: the starts of their sequences, and their places in the [B, L] rectangle."""

    starts: Tensor  # [B+1] int32, with the end
    index: Tensor  # [T] row·L + position
    batch: int  # B
    longest: int  # L

    def spread(self, x: Tensor) -> Tensor:  # [T, h, d] -> [B, h, L, d]
        out = x.new_zeros(self.batch * self.longest, *x.shape[1:])
        out[self.index] = x
        return out.view(self.batch, self.longest, *x.shape[1:]).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:  # [B, h, L, d] -> [T, h, d]
        return x.transpose(1, 2).flatten(0, 1)[self.index]


@dataclass
class Packed:
    ids: Tensor  # [1, T]
    positions: Tensor  # [1, T], restarting at 0 with each sequence
    segments: Segments


def pack(sequences: list[list[int]], device: torch.device) -> Packed:
    """Lays sequences end to end.

    >>> p = pack([[5, 6, 7], [8]], torch.device("cpu"))
    >>> p.ids.tolist(), p.positions.tolist(), p.segments.index.tolist()
    ([[5, 6, 7, 8]], [[0, 1, 2, 0]], [0, 1, 2, 3])
    """
    lengths = torch.tensor([len(s) for s in sequences])
    longest = int(lengths.max())
    start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)  # [T] where its sequence begins
    positions = torch.arange(int(lengths.sum())) - start  # [T]
    row = torch.arange(len(sequences)).repeat_interleave(lengths)  # [T]
    ids = torch.tensor([i for s in sequences for i in s])
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    segments = Segments(starts.to(device), (row * longest + positions).to(device), len(sequences), longest)
    return Packed(ids[None].to(device), positions[None].to(device), segments)


def pads(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention spreads its sequences over the [B, L] rectangle: where there are no variable-length kernels."""
    return device.type != "cuda" or dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Block-diagonal causal attention of packed tokens. query [T, h, d], key and value [T, h_kv, d] -> [T, h, d].

    On a GPU in half precision nothing is padded. Elsewhere the sequences are spread over the rectangle: on two cores
    that takes half the time of one call per sequence, forward and backward, 128 sequences of 15 to 60 tokens.
    """
    if not pads(query.device, query.dtype):
        ends, longest = segments.starts, segments.longest
        return varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), **GQA)
    q, k, v = (segments.spread(x) for x in (query, key, value))
    if q.is_cuda:  # its one fp32 kernel that keeps no [L, L] wants as many heads in k and v
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    several = k.shape[1] != q.shape[1]
    return segments.gather(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=several))


def packed_attention(module, query, key, value, attention_mask, scaling, segments: Segments, dropout=0.0, **kwargs):
    """`causal_attention` as transformers calls it: query [1, h, T, d], key, value [1, h_kv, T, d] -> [1, T, h, d]."""
    refuse_other_attention(segments.longest, **kwargs)
    # under autocast, norms of heads with fp32 weights (Qwen3) make fp32 queries and keys of bf16 ones
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return causal_attention(q, k, v, segments, scaling)[None], None


def refuse_other_attention(longest: int, sliding_window=None, softcap=None, s_aux=None, **kwargs) -> None:
    """Raises ModelError if the model asks for attention that is not plain causal: we would silently be wrong."""
    if softcap or s_aux is not None or (sliding_window is not None and sliding_window < longest):
        asked = f"a window of {sliding_window} tokens (here are {longest})" if sliding_window else "soft caps or sinks"
        raise ModelError(f"this model's attention has {asked}; only full causal attention is supported")


AttentionInterface.register("packed", packed_attention)


def response_logprobs(
    model: nn.Module, rows: list[Row], temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(log π(y_t | x, y_<t), entropy), each [R], of all response tokens of `rows`, in row order; differentiable."""
    return run(model, lambda m: token_logprobs(*_response_hidden(m, rows, dtype), temperature))


def response_loss(
    model: nn.Module, rows: list[Row], loss_fn, temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """loss_fn of the log-probs and entropies of all response tokens of `rows`: see logprob.head_loss.

    Without rows, 0, by way of all parameters: a rank that has no data left works along with those that have.
    """
    if not rows:
        rows, loss_fn = [IDLE], lambda logp, *_: 0 * logp.sum()
    return run(model, lambda m: head_loss(*_response_hidden(m, rows, dtype), loss_fn, temperature))


@torch.no_grad()
def response_scores(
    model: nn.Module, rows: list[Row], temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """response_logprobs without gradients, by the faster logprob.score; without rows, empty."""
    logp, entropy = run(model, lambda m: score(*_response_hidden(m, rows or [IDLE], dtype), temperature))
    return (logp, entropy) if rows else (logp[:0], entropy[:0])


IDLE: Row = ([0], [0])


def run(model: nn.Module, function):
    """function(model); of a sharded model, within what FSDP2 knows as its forward pass (see parallel.shard)."""
    return model.run(function) if hasattr(model, "run") else function(model)


def _response_hidden(model: nn.Module, rows: list[Row], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states [R, H] that predict a response token, head weight [V, H], those tokens [R]).

    The last response token is never fed (nothing follows it), and prompts never reach the vocabulary head:
        prompt a b, response c d   ->   fed a b c,   hidden(b) predicts c, hidden(c) predicts d
    """
    device = next(model.parameters()).device
    packed = pack([prompt + response[:-1] for prompt, response in rows], device)
    predicts = [i >= len(p) - 1 for p, r in rows for i in range(len(p) + len(r) - 1)]  # [T]
    targets = torch.tensor([t for _, r in rows for t in r], device=device)  # [R]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        hidden = hidden_states(model, packed, dtype)  # [T, H]
    chosen = torch.tensor(predicts).nonzero()[:, 0].to(device)  # [R]; found on the host, which need not wait for a GPU
    return hidden[chosen].to(dtype), model.get_output_embeddings().weight, targets


def hidden_states(model: nn.Module, packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """Final hidden states of packed tokens, [T, H]; the residual stream is kept in `dtype`, if given."""
    embedded = model.get_input_embeddings()(packed.ids)  # [1, T, H]
    where = dict(position_ids=packed.positions, segments=packed.segments, use_cache=False)
    return model.model(inputs_embeds=embedded.to(dtype or embedded.dtype), **where).last_hidden_state[0]


@torch.no_grad()
def logits(model: nn.Module, ids: list[int]) -> Tensor:
    """All logits of one sequence, computed in the precision of the model's weights: [T, V] fp32."""
    packed = pack([ids], next(model.parameters()).device)
    return run(model, lambda m: F.linear(hidden_states(m, packed), m.get_output_embeddings().weight).float())


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """Has the first `count` layers, and no others, keep only their inputs and compute the rest again in the backward.

    That takes 2 bytes per token and hidden unit of a layer instead of some 30 (bf16), and a third more time.
    """
    for i, layer in enumerate(model.model.layers):
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = layer.training = i < count  # the layer's own flag: nothing in it has dropout


def micro_batches(rows: list[Row], tokens: int, padded: bool = True) -> list[range]:
    """Consecutive ranges of rows that have at most `tokens` tokens, or if attention is `padded`, whose rectangle in
    attention, rows x longest, has. A row that is longer stands alone."""
    ranges, first, longest, total = [], 0, 0, 0
    for i, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        longest, total = max(longest, length), total + length
        if i > first and ((i + 1 - first) * longest if padded else total) > tokens:
            ranges.append(range(first, i))
            first, longest, total = i, length, length
    return [*ranges, range(first, len(rows))]


def offsets(rows: list[Row]) -> list[int]:
    """Where each row's response begins among all response tokens, with the total at the end."""
    return [0, *accumulate(len(response) for _, response in rows)]
