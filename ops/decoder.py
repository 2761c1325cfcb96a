"""One decoding step of the policy: a token per sequence, over a cache of keys and values.

transformers' modules launch dozens of small operations per layer and token, and their number limits the speed. Here a
layer launches ten. Weights with the same input form one matrix (Q, K, V; gate and up); the matmuls add the residuals:

    RMSNorm  →  QKV matmul  →  rope_and_store  →  attend (two kernels)  →  output matmul + residual
    RMSNorm  →  gate-up matmul  →  swiglu  →  down matmul + residual

It serves models built like Llama, Qwen2 and Qwen3. The constructor compares its logits with those of transformers: for
each layer with random weights in fp32, at the first and the last positions, and for the whole model in its own dtype.

Shapes: T tokens fed, n sequences; S slots of the cache, L positions each; h query heads, h_kv key-value heads,
d head size; H hidden, I intermediate size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.attention import attend, attention_mask, rope_and_store, swiglu
from ops.head import project, rounded_weight, use_kernels
from ops.packed import ModelError, causal_attention, pack, refuse_other_attention

# The sequence on which the decoder is compared with transformers.
PROBE_TOKENS = 24
PROBE_WORDS = 32  # vocabulary size of the random weights


@dataclass
class Cache:
    """Keys and values of S sequences of up to L tokens, the rotations of L positions, and the vocabulary head."""

    kv: Tensor  # [layers, 2, S, L, h_kv, d] keys, then values
    cos: Tensor  # [L, 1, d] fp32
    sin: Tensor  # [L, 1, d] fp32, the first half negated
    lm_head: Tensor  # [V, H], on a CPU in fp32: bf16 would be cast at every step

    def cells(self, slot: Tensor, position: Tensor) -> Tensor:
        """Rows for the keys and values of tokens [T] in a layer viewed as [2·S·L·h_kv, d].  [T, 2·h_kv]"""
        _, two, S, L, kv_heads, _ = self.kv.shape
        key_or_value = torch.arange(two, device=slot.device)
        head = torch.arange(kv_heads, device=slot.device)
        first = (key_or_value * S + slot[:, None]) * L + position[:, None]  # [T, 2]
        return (first[:, :, None] * kv_heads + head).flatten(1)


@dataclass
class Layer:
    """One decoder layer's weights; the model's own parameters are views of the fused matrices (see `fuse`)."""

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


def share_storage_copy(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters share the storage of the model's. Replace their data before writing to it."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()})


def fuse(parameters: list[nn.Parameter | None]) -> Tensor | None:
    """One matrix of several parameters, None without them. They become views of it: writing one updates the other."""
    if parameters[0] is None:
        return None
    fused = torch.cat([p.data for p in parameters])
    for p, part in zip(parameters, fused.split([len(p) for p in parameters]), strict=True):
        p.data = part
    return fused


class Decoder:
    """A copy of a model with its weights arranged for decoding. `model` is that copy: write its parameters in place."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device):
        """Raises ModelError if the model is not built like Llama, Qwen2 or Qwen3, or its logits differ."""
        kind = f"{type(model).__name__} is not built like Llama, Qwen2 or Qwen3"
        # These settings limit numbers that random weights may not reach: the comparison would miss them.
        for limit in ("clip_qkv", "final_logit_softcapping", "attn_logit_softcapping"):
            if getattr(model.config, limit, None):
                raise ModelError(f"{kind}: {limit} is {getattr(model.config, limit)}")
        try:
            self._read_shapes(model)
            self._compare_each_layer(model, device)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ModelError(f"{kind}: {error}") from error
        copied = share_storage_copy(model).requires_grad_(False).eval()
        # Only parameters change their dtype: the rotation frequencies, a buffer, stay fp32.
        for p in copied.parameters():
            p.data = p.data.to(device, dtype, copy=True)
        self._arrange(copied.to(device))
        self._compare_with_transformers(1e-3 if dtype == torch.float32 else 0.1)

    def _read_shapes(self, model: nn.Module) -> None:
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = model.model.norm.variance_epsilon
        rope = model.model.rotary_emb.rope_type
        if rope in ("dynamic", "longrope"):
            raise ModelError(f"rope type {rope!r}: its rotations depend on the length of the sequence")

    def _compare_each_layer(self, model: nn.Module, device: torch.device) -> None:
        """Compares models of one layer with random weights, one layer of `model` at a time to save memory."""
        single = share_storage_copy(model).requires_grad_(False).eval()
        last = max(model.config.max_position_embeddings - PROBE_TOKENS, 0)
        layers = list(single.model.layers)
        while layers:
            single.model.layers = nn.ModuleList([layers.pop()])
            _randomise(single, device)
            self._arrange(single)
            for first in (0, last):
                self._compare_with_transformers(1e-4, first)  # rounding on a CPU: 2e-6

    def _arrange(self, model: nn.Module) -> None:
        """Takes `model` as the decoder's own and fuses its weights."""
        self.model = model
        model.set_attn_implementation("packed")
        self.layers = [_layer(layer) for layer in model.model.layers]

    @property
    def lm_head(self) -> Tensor:  # [V, H]
        return self.model.get_output_embeddings().weight

    def new_cache(self, slots: int, length: int, first: int = 0) -> Cache:
        """An empty cache of `length` positions from `first` on. Raises ModelError if attention would not see all."""
        config = self.model.config
        windows = [getattr(layer.self_attn, "sliding_window", None) for layer in self.model.model.layers]
        # Mistral's window stands in the config only.
        if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
            windows.append(getattr(config, "sliding_window", None))
        windows = [window for window in windows if window is not None]
        refuse_other_attention(length, sliding_window=min(windows, default=None))
        device = self.model.device
        shape = (len(self.layers), 2, slots, length, self.kv_heads, self.head_dim)
        kv = torch.zeros(shape, dtype=self.model.dtype, device=device)
        fp32 = torch.empty(0, device=device)
        positions = torch.arange(first, first + length, device=device)[None]
        cos, sin = self.model.model.rotary_emb(fp32, positions)  # [1, L, d]
        cos = cos[0, :, None].contiguous()  # [L, 1, d]
        sin = sin[0, :, None].contiguous()
        sin[..., : self.head_dim // 2] *= -1
        return Cache(kv, cos, sin, rounded_weight(self.lm_head, self.model.dtype))

    def prefill(self, cache: Cache, prompts: list[list[int]], slots: Tensor) -> Tensor:
        """Runs whole prompts, prompt i into slot slots[i], and returns the logits of their next tokens, [P, V] fp32."""
        packed = pack(prompts, self.model.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=slots.device)  # [P]
        node = packed.node.to(slots.device)  # [F]
        slot = slots.repeat_interleave(lengths)  # [F]
        slot_of_node = torch.empty_like(packed.ids[0]).index_copy_(0, node, slot)  # [T] one of the slots that need it

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal_attention(q, k, v, packed, self.layers[layer].scale)

        hidden = self.forward(cache, packed.ids[0], packed.positions[0], slot_of_node, attention)  # [T, H]
        # Prompts that begin alike share these tokens: the other slots get copies of their keys and values.
        position = packed.positions[0, node]  # [F]
        source = slot_of_node[node]  # [F]
        for kv in cache.kv:
            kv[:, slot, position] = kv[:, source, position]
        return project(hidden[node[lengths.cumsum(0) - 1]], cache.lm_head)

    def decode(self, cache: Cache, ids: Tensor, position: Tensor) -> Tensor:
        """Feeds one token to each of the first n slots; ids, position [n] -> logits of the next tokens, [n, V] fp32."""
        length = position + 1  # [n] a token attends to itself, too
        mask = None if use_kernels(ids) else attention_mask(length, self.heads, self.kv_heads)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, *cache.kv[layer], length, self.layers[layer].scale, mask)

        slot = torch.arange(len(ids), device=ids.device)
        hidden = self.forward(cache, ids, position, slot, attention)
        return project(hidden, cache.lm_head)

    def forward(self, cache: Cache, ids: Tensor, position: Tensor, slot: Tensor, attention: Callable) -> Tensor:
        """Hidden states [T, H] of tokens `ids` at `position` of `slot`, each [T]; their keys and values are cached.

        attention(layer, q [T, h, d], k [T, h_kv, d], v [T, h_kv, d]) -> [T, h, d].
        """
        x = F.embedding(ids, self.model.get_input_embeddings().weight)  # [T, H] the residual stream
        cos = cache.cos[position]
        sin = cache.sin[position]
        cells = cache.cells(slot, position)
        for i, w in enumerate(self.layers):
            y = F.rms_norm(x, x.shape[1:], w.norm_1, self.eps)
            qkv = F.linear(y, w.qkv, w.qkv_bias).view(len(ids), -1, self.head_dim)  # [T, h + 2·h_kv, d]
            q, k, v = rope_and_store(qkv, cos, sin, w.head_norms, self.eps, cache.kv[i], cells)
            add_linear(x, attention(i, q, k, v).flatten(1), w.out)
            y = F.rms_norm(x, x.shape[1:], w.norm_2, self.eps)
            add_linear(x, swiglu(F.linear(y, w.gate_up, w.gate_up_bias)), w.down)
        return F.rms_norm(x, x.shape[1:], self.model.model.norm.weight, self.eps)

    @torch.inference_mode()
    def _compare_with_transformers(self, tolerance: float, first: int = 0) -> None:
        """Raises ModelError unless prefill and decode give the logits of transformers' own modules from `first` on."""
        V = len(self.lm_head)
        ids = [(7 * i + 1) % V for i in range(PROBE_TOKENS)]
        packed = pack([ids], self.model.device)
        options = packed.options | dict(position_ids=packed.positions + first)
        output = self.model(input_ids=packed.ids, **options)
        expected = output.logits[0, -3:].float()  # after the last three tokens
        # The decoder prefills all but two tokens and decodes these two.
        cache = self.new_cache(1, PROBE_TOKENS, first)
        slot = torch.zeros(1, dtype=torch.long, device=self.model.device)
        logits = [self.prefill(cache, [ids[:-2]], slot)]
        for i in (PROBE_TOKENS - 2, PROBE_TOKENS - 1):
            logits.append(self.decode(cache, slot + ids[i], slot + i))
        error = ((torch.cat(logits) - expected).norm() / expected.norm()).item()
        if not error < tolerance:
            cause = f"{type(self.model).__name__} computes something that Llama, Qwen2 and Qwen3 do not"
            raise ModelError(f"decoder.py's logits differ from transformers' by {error:.2g}: {cause}")


def _randomise(model: nn.Module, device: torch.device) -> None:
    """Gives a model new random fp32 weights with which every part affects the logits, and PROBE_WORDS words."""
    words = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    model.get_input_embeddings().padding_idx = None  # its id may lie outside the small vocabulary
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        shape = (PROBE_WORDS, p.shape[1]) if p in words else p.shape
        p.data = torch.empty(shape, device=device).uniform_(-1, 1, generator=generator)  # a variance of 1/3
        if p.dim() == 1:
            p.data += 1  # norms
        elif p not in words:
            p.data *= 2.5 / p.shape[1] ** 0.5  # outputs and attention's logits have deviations above 1
    model.to(device)


def _layer(layer: nn.Module) -> Layer:
    a = layer.self_attn
    mlp = layer.mlp
    qkv = (a.q_proj, a.k_proj, a.v_proj)
    gate_up = (mlp.gate_proj, mlp.up_proj)
    head_norms = None
    if hasattr(a, "q_norm"):
        head_norms = fuse([a.q_norm.weight, a.k_norm.weight]).view(2, -1)
    return Layer(
        norm_1=layer.input_layernorm.weight,
        qkv=fuse([linear.weight for linear in qkv]),
        qkv_bias=fuse([linear.bias for linear in qkv]),
        head_norms=head_norms,
        out=a.o_proj,
        norm_2=layer.post_attention_layernorm.weight,
        gate_up=fuse([linear.weight for linear in gate_up]),
        gate_up_bias=fuse([linear.bias for linear in gate_up]),
        down=mlp.down_proj,
        scale=a.scaling,
    )


def add_linear(x: Tensor, y: Tensor, linear: nn.Linear) -> None:
    """x [T, H] += linear(y): the matmul itself adds to the residual stream, with one rounding."""
    x.addmm_(y, linear.weight.T)
    if linear.bias is not None:
        x += linear.bias
