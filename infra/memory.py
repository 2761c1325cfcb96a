"""The memory of each GPU by part, computed before anything is loaded: `python bridge.py --dry-run` prints it.

It assumes that every prompt has PROMPT tokens and every response max_new_tokens tokens, and that no two share tokens.
T: tokens of a micro-batch; R: response tokens among them; H: hidden size; b: bytes of a number in `dtype`.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from infra.model import read_config, reading, repository_of
from ops import head, packed
from settings import METHODS, SettingError, Settings

GiB = 2**30
Parts = dict[str, float]  # part -> bytes
PREFILL_TOKENS = 16384  # as in sampler.py
PROMPT = 200  # assumed: tokens of every prompt
LIBRARIES = 1.5 * GiB
LOST = 0.05  # fraction of the memory that is lost between allocations
GPUS = {"a100": 79 * GiB, "h100": 79 * GiB, "h200": 139 * GiB, "l40s": 44 * GiB, "4090": 23.5 * GiB}  # usable bytes
FIELDS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings")  # fmt: skip
PUBLISHED = {  # these fields of the paper's models, from their config.json: no network is needed
    "Qwen/Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "Qwen/Qwen3-8B-Base": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
}


class Shapes(NamedTuple):
    """What the memory of a model depends on."""

    parameters: int
    root: int  # parameters outside the layers: embedding, vocabulary head, final norm
    layers: int
    hidden: int  # H
    mlp: int  # width of the MLP
    heads: int  # of queries
    kv_heads: int
    vocabulary: int
    q: int  # width of all query heads
    kv: int  # width of all key heads
    head_norms: bool  # queries and keys are normalised, as in Qwen3
    tied: bool  # the vocabulary head is the embedding
    linears: list[tuple[str, int, int]]  # (last name, out, in) of every linear of the layers
    linear: int  # parameters of these linears


def config_of(model: str) -> PretrainedConfig:
    """The config of a published model or of any name, see `repository_of`. Raises ModelError."""
    name = repository_of(model)[0]
    if name in PUBLISHED:
        return AutoConfig.for_model(**dict(zip(FIELDS, PUBLISHED[name], strict=True)))
    return read_config(model)


def shapes(config: PretrainedConfig) -> Shapes:
    """Counts a model without allocating it. Raises ModelError if it is not built like Llama, Qwen2 or Qwen3."""
    with reading(f"model of type {config.model_type!r} is not built like Llama, Qwen2 or Qwen3"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        config = model.config
        layers = model.model.layers
        attention = layers[0].self_attn
        parameters = sum(p.numel() for p in model.parameters())
        inside = sum(p.numel() for p in layers.parameters())
        linears = []
        for name, module in layers.named_modules():
            if isinstance(module, nn.Linear):
                linears.append((name.split(".")[-1], *module.weight.shape))
        return Shapes(
            parameters=parameters,
            root=parameters - inside,
            layers=len(layers),
            hidden=config.hidden_size,
            mlp=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            vocabulary=config.vocab_size,
            q=attention.q_proj.out_features,
            kv=attention.k_proj.out_features,
            head_norms=hasattr(attention, "q_norm"),
            tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            linears=linears,
            linear=sum(out * into for _, out, into in linears),
        )


def state(s: Settings, m: Shapes, world: int) -> tuple[Parts, Parts]:
    """(kept for the whole run, gradients), in fp32; only the sampler's copy of the weights is in `dtype`."""
    method = METHODS[s.method]
    base = m.parameters / (world if s.shard else 1)
    sizes = {"θ": base}  # parameters of each set
    if method.shadow:
        sizes["θ̂"] = base
    if method.adapter:
        adapted = [out + into for name, out, into in m.linears if name in s.lora_targets.split(",")]
        sizes["w"] = s.lora_rank * sum(adapted)

    kept = {}
    gradients = {}
    for name, size in sizes.items():
        kept[f"{name} weights"] = 4 * size
        kept[f"{name} moments"] = 8 * size  # AdamW's
        gradients[f"{name} gradients"] = 4 * size
    if method.adapter:  # w has g_sft, g_rl and g_rl_hat
        gradients["w gradients"] *= [method.sft, method.rl, method.shadow].count(True)
    if method.two_optimizers:
        kept["θ moments"] *= 2
    if s.kl_coef > 0:
        kept["reference"] = 4 * base
    kept["sampler's merged copy"] = getattr(torch, s.dtype).itemsize * m.parameters
    return kept, gradients


def sampling(s: Settings, m: Shapes, world: int, prompt: int = PROMPT) -> Parts:
    """Bytes that a rank's sampler allocates besides its weights. Evaluation is assumed to need no more."""
    b = getattr(torch, s.dtype).itemsize
    prompts = math.ceil(s.prompts_per_step / world)
    samples = prompts * s.group_size
    slots = max(min(s.sampler_slots, samples), s.group_size)
    prefilled = max(min(PREFILL_TOKENS, prompts * prompt), slots)  # tokens

    cached = slots * (prompt + s.max_new_tokens)  # tokens
    kept = samples * (s.max_new_tokens + 1) * (8 + 8 + 4)  # uniforms, ids, log-probs
    logits = 4 * slots * m.vocabulary
    widths = 3 * m.hidden + 2 * (m.q + m.kv) + 3 * m.mlp
    return {
        "KV cache": m.layers * 2 * cached * m.kv * b,
        "samples and logits": kept + logits,
        "prefill activations": prefilled * widths * b,
    }


def has_matrix(cuda: bool, row: int) -> bool:
    """Whether attention keeps the [L, L] matrix of each head (ops/packed.py), L being the tokens of a row."""
    return not cuda and row <= packed.SHORT


def saved_by_layer(m: Shapes, b: int, cuda: bool, row: int) -> int:
    """Bytes per token that autograd saves in one layer, in rows of so many tokens."""
    # two norms; fp32: x, x̂ and their product in each; bf16: x in fp32, x̂, and casts of the product for five linears
    channel = 4 * 6 if b == 4 else 2 * (4 + 2) + 5 * 2
    norms = 8 + channel * m.hidden
    if m.head_norms:
        norms += 4 * (m.heads + m.kv_heads) + (8 if b == 4 else 6) * (m.q + m.kv)
    attention = b * (2 * m.q + 2 * m.kv)  # queries, outputs, keys, values
    if has_matrix(cuda, row):
        attention += b * m.heads * row
    else:
        attention += 4 * m.heads + b * m.q  # log-sum-exp, and the outputs once more: the tree's
    return norms + attention + b * 4 * m.mlp


def logits_on_cpu(R: int, V: int, b: int, d_weight: int) -> int:
    """Bytes of logits, their gradients and the weight's, at the larger moment of the head's two passes on a CPU."""
    block = 4 * head.blocks(R, V, torch.device("cpu"))[0].stop * V  # bytes of a tensor in fp32
    chunk = min(head.CHUNK, R)
    forward = 5 * block  # PyTorch's statistics make five tensors
    # The weight's gradient takes an fp32 copy of those in bf16.
    copied = 4 * V * chunk if b == 2 else 0
    backward = d_weight + b * V * chunk + max(copied, 2 * block)
    return max(forward, backward)


def micro_batch(s: Settings, world: int, prompt: int) -> tuple[int, int]:
    """(T, R) of a rank's largest micro-batch."""
    method = METHODS[s.method]
    rows = 0
    if method.rl:
        rows = math.ceil(s.prompts_per_step * (s.group_size + method.joins_group) / world)
    if method.sft:
        rows = max(rows, math.ceil(s.demonstrations / world))
    row = prompt + s.max_new_tokens
    T = max(row, min(s.tokens_per_micro_batch, rows * row))  # a longer row is a micro-batch of its own
    return T, T * s.max_new_tokens // row


def training(s: Settings, m: Shapes, world: int, cuda: bool, prompt: int = PROMPT) -> Parts:
    """Bytes at the largest moment of a micro-batch's forward and backward pass, without state and gradients."""
    adapter = METHODS[s.method].adapter
    b = getattr(torch, s.dtype).itemsize
    H = m.hidden
    row = prompt + s.max_new_tokens
    T, R = micro_batch(s, world, prompt)

    # activations
    checkpointed = min(s.checkpoint_layers, m.layers)
    stored = m.layers - checkpointed  # layers that keep all activations
    recomputed = max(stored, 1)  # a checkpointed layer has its activations during its backward pass
    layer = saved_by_layer(m, b, cuda, row) * T
    inputs = checkpointed * b * H * T
    final_norm = (8 if b == 4 else 6) * H * T
    # gradients of the MLP's activations, and of the largest weight in `dtype` and fp32
    largest_weight = max(out * into for _, out, into in m.linears)
    in_flight = b * (3 * m.mlp + 2 * H) * T + (4 + b) * largest_weight
    if has_matrix(cuda, row):
        # or later, when the MLP's activations are freed: two gradients of the [L, L] matrix
        in_flight = max(in_flight, b * (2 * m.heads * row - 4 * m.mlp) * T)

    # copies of a layer's weights: autocast's bf16 ones; in fp32 only the sums θ + s·B·A are new
    copies = b * m.linear / m.layers if b == 2 or adapter else 0

    # vocabulary head: hidden and d_hidden [R, H], the weight's cast, its gradient in fp32, logits and their gradients
    d_weight = 4 * m.vocabulary * H
    if cuda:
        cast = b * m.vocabulary * H if b == 2 else 0
        logits = d_weight + min(head.CHUNK, R) * m.vocabulary * (4 + b)
    else:
        cast = 4 * m.vocabulary * H if b == 2 else 0  # rounded to bf16, in fp32
        logits = logits_on_cpu(R, m.vocabulary, b, d_weight)
    in_vocabulary_head = 2 * b * R * H + cast + logits
    waiting = d_weight if m.tied else 0  # until the embedding's gradient is added

    # the three largest moments
    end_of_forward = {
        "activations": stored * layer + inputs + final_norm,
        "copies of weights": 0 if adapter else m.layers * copies,
        "vocabulary head": 0,
    }
    in_head = {
        "activations": stored * layer + inputs + final_norm,
        "copies of weights": stored * copies,
        "vocabulary head": in_vocabulary_head,
    }
    in_layer = {
        "activations": recomputed * layer + inputs + in_flight,
        "copies of weights": recomputed * copies,
        "vocabulary head": waiting,
    }
    parts = max(end_of_forward, in_head, in_layer, key=lambda moment: sum(moment.values()))
    if s.shard and world > 1:
        parts["gathered by FSDP"] = gathered(m)
    return parts


def gathered(m: Shapes) -> float:
    """Bytes in fp32 that FSDP2 has gathered at the largest moment of a pass: the backward pass of a layer."""
    # Of the model that trains: the weights of its root, which stay from its forward to its backward pass, and of two
    # layers, since the next one is prefetched; the gradients of the root and of one layer, until they are reduced.
    # Nothing of the other models: policy, shadow and reference run one after another, and after a pass without
    # gradients the root is resharded, too.
    layer = (m.parameters - m.root) / m.layers
    return 4 * (2 * m.root + 3 * layer)


def memory(s: Settings, m: Shapes, world: int, cuda: bool = True, prompt=PROMPT) -> tuple[Parts, Parts, Parts, float]:
    """(state, sampling, training, peak): bytes of one GPU; without `cuda`, training is that of a process on a CPU."""
    kept, gradients = state(s, m, world)
    sampled = sampling(s, m, world, prompt)
    trained = gradients | training(s, m, world, cuda, prompt)
    largest = sum(kept.values()) + max(sum(sampled.values()), sum(trained.values()))
    return kept, sampled, trained, largest * (1 + LOST) + LIBRARIES


def check(s: Settings, m: Shapes, world: int, limit: float) -> None:
    """Raises SettingError if a GPU needs more than `limit` bytes; the message names a change that fits, if one does."""
    peak = memory(s, m, world)[-1]
    if peak <= limit:
        return
    changes: list[tuple[str, int, int]] = []  # (setting, value, GPUs), the cheapest change first
    for divisor in (2, 4, 8, 16, 32):
        for name in ("tokens_per_micro_batch", "sampler_slots"):
            changes.append((name, max(getattr(s, name) // divisor, 1), world))
    changes.append(("checkpoint_layers", m.layers, world))
    for factor in (1, 2, 4, 8):
        changes.append(("shard", True, factor * world))

    text = f"the run does not fit: it needs {peak / GiB:.1f} of {limit / GiB:.1f} GiB"
    for name, value, gpus in changes:
        if memory(replace(s, **{name: value}), m, gpus)[-1] <= limit:
            raise SettingError(f"{text}; it fits with {name} {value}, gpus {gpus}")
    raise SettingError(f"{text}; choose a smaller model, shorter responses or a GPU with more memory")


def dry_run(s: Settings, config: PretrainedConfig, gpu: str | None, gpus: int) -> None:
    """Prints the memory of a run by part. Raises SettingError if it does not fit.

    It describes GPUs of the kind `gpu`, else those of this machine. Without any, it compares with no limit.
    """
    place = gpu or "GPU"
    limit = math.inf
    if gpu:
        if gpu not in GPUS:
            raise SettingError(f"gpu must be one of {', '.join(GPUS)}; got {gpu!r}")
        limit = GPUS[gpu]
    elif torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(0).total_memory

    m = shapes(config)
    *groups, peak = memory(s, m, gpus)
    print(f"{s.method}, {m.parameters:,} parameters; GiB of each of {gpus} x {place}")
    for title, parts in zip(("state", "sampling", "training"), groups, strict=True):
        print(f"  {title:<26}{sum(parts.values()) / GiB:8.2f}")
        for part, value in parts.items():
            print(f"    {part:<24}{value / GiB:8.2f}")
    available = f" of {limit / GiB:.1f}" if limit < math.inf else ""
    print(f"  {'peak, with libraries':<26}{peak / GiB:8.2f}{available}")

    saved = 0.0
    for part, value in groups[0].items():
        if part.endswith(("weights", "moments")):
            # Ranks have parts of θ and θ̂; all have the whole w, which is written once.
            is_part = s.shard and not part.startswith("w ")
            saved += value * gpus if is_part else value
    print(f"  {'a checkpoint, on disk':<26}{saved / GiB:8.2f}; the last two are kept")
    check(s, m, gpus, limit)
