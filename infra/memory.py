"""Memory of each GPU, tokens, FLOPs and estimated seconds of a step, computed before anything is loaded.

Memory assumes that every response has max_new_tokens tokens; tokens, FLOPs and seconds assume mean lengths.
T: tokens of a micro-batch; R: response tokens among them; H: hidden size; b: bytes of a number in `dtype`.
"""

import math
import os
from collections import namedtuple
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from infra.model import is_builtin, read_config, reading, repository_of
from settings import METHODS, SettingError, Settings

GiB = 2**30
Parts = dict[str, float]  # part -> bytes
CHUNK, PREFILL_TOKENS = 2048, 16384  # as in ops/head.py and sampler.py
PROMPT = 200  # assumed: tokens of every prompt
MEAN_RESPONSE, MEAN_DEMONSTRATION = 0.33, 0.8  # assumed: mean lengths as fractions of max_new_tokens
COMPUTE, BANDWIDTH = 0.5, 0.55  # assumed: fractions of the data sheet's rates that a step reaches
RESERVE = {"GPU": (1.5 * GiB, 0.05), "CPU": (0.45 * GiB, 0.12)}  # libraries, fraction lost between allocations

GPU = namedtuple("GPU", "memory bf16 bandwidth")  # bytes; FLOP/s of dense matmuls and bytes/s, by the data sheets
GPUS = {
    "a100": GPU(79 * GiB, 312e12, 2.04e12),
    "h100": GPU(79 * GiB, 989e12, 3.35e12),
    "h200": GPU(139 * GiB, 989e12, 4.8e12),
    "l40s": GPU(44 * GiB, 362e12, 0.864e12),
    "4090": GPU(23.5 * GiB, 165e12, 1.008e12),
}
# root: parameters outside the layers (embedding, vocabulary head, final norm); hidden: H; q, kv: widths of all query
# and of all key heads; head_norms: queries and keys are normalised, as in Qwen3; tied: the vocabulary head is the
# embedding; linears: (last name, out, in) of every linear of the layers; linear: their parameters.
Shapes = namedtuple("Shapes", "parameters tensors root layers hidden mlp heads kv_heads vocabulary "
                              "q kv head_norms tied linears linear")  # fmt: skip
FIELDS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings")  # fmt: skip
PUBLISHED = {  # these fields of the paper's models, from their config.json: no network is needed
    "Qwen/Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "Qwen/Qwen3-8B-Base": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
}


def config_of(model: str) -> PretrainedConfig:
    """The config of a published model, a folder or a hub name, NAME or NAME@REVISION. Raises ModelError."""
    if (name := repository_of(model)[0]) in PUBLISHED:
        return AutoConfig.for_model(**dict(zip(FIELDS, PUBLISHED[name], strict=True)))
    return read_config(model)


def shapes(config: PretrainedConfig) -> Shapes:
    """Counts a model without allocating it. Raises ModelError if it is not built like Llama, Qwen2 or Qwen3."""
    with reading(f"model of type {config.model_type!r} is not built like Llama, Qwen2 or Qwen3"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers, c, attention = model.model.layers, model.config, model.model.layers[0].self_attn
        total, inside = (sum(p.numel() for p in module.parameters()) for module in (model, layers))
        linears = [(n.split(".")[-1], *x.weight.shape) for n, x in layers.named_modules() if isinstance(x, nn.Linear)]
        return Shapes(
            total, len(list(model.parameters())), total - inside, len(layers), c.hidden_size, c.intermediate_size,
            c.num_attention_heads, c.num_key_value_heads, c.vocab_size, attention.q_proj.out_features,
            attention.k_proj.out_features, hasattr(attention, "q_norm"),
            model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            linears, sum(out * into for _, out, into in linears),
        )  # fmt: skip


def state(s: Settings, m: Shapes, world: int) -> tuple[Parts, Parts]:
    """(kept for the whole run, gradients), in fp32; only the sampler's copy of the weights is in `dtype`."""
    method, share = METHODS[s.method], world if s.shard else 1
    sets = {"θ": (m.parameters / share, m.tensors, 1)}  # name -> (parameters, tensors, sets of gradients)
    if method.shadow:
        sets["θ̂"] = sets["θ"]
    if method.adapter:  # w has gradients for each of g_sft, g_rl and g_rl_hat
        adapted = [out + into for name, out, into in m.linears if name in s.lora_targets.split(",")]
        losses = [method.sft, method.rl, method.shadow].count(True)
        sets["w"] = s.lora_rank * sum(adapted), 2 * len(adapted), losses
    kept = {f"{name} weights": 4 * size for name, (size, _, _) in sets.items()}
    kept |= {f"{name} moments": 8 * size + 4 * tensors for name, (size, tensors, _) in sets.items()}  # and a step count
    kept["θ moments"] *= 2 if method.two_optimizers else 1
    if s.kl_coef > 0:
        kept["reference"] = 4 * m.parameters / share
    kept["sampler's merged copy"] = getattr(torch, s.dtype).itemsize * m.parameters
    return kept, {f"{name} gradients": 4 * size * count for name, (size, _, count) in sets.items()}


def kv_cache(s: Settings, m: Shapes, world: int, prompt: int = PROMPT) -> tuple[int, int]:
    """(slots, bytes) of the keys and values of a rank's rollouts. Evaluation is assumed to need no more."""
    slots = max(min(s.sampler_slots, math.ceil(s.prompts_per_step / world) * s.group_size), s.group_size)
    return slots, m.layers * 2 * slots * (prompt + s.max_new_tokens) * m.kv * getattr(torch, s.dtype).itemsize


def sampling(s: Settings, m: Shapes, world: int, prompt: int = PROMPT) -> Parts:
    """Bytes that the sampler allocates besides its weights."""
    (slots, kv), prompts = kv_cache(s, m, world, prompt), math.ceil(s.prompts_per_step / world)
    samples = prompts * s.group_size * (s.max_new_tokens + 1) * (8 + 8 + 4)  # uniforms, ids, log-probs
    widths = (3 * m.hidden + 2 * (m.q + m.kv) + 3 * m.mlp) * getattr(torch, s.dtype).itemsize
    prefill = max(min(PREFILL_TOKENS, prompts * prompt), slots) * widths
    return {"KV cache": kv, "samples and logits": samples + 4 * slots * m.vocabulary, "prefill activations": prefill}


def saved_by_layer(m: Shapes, b: int, padded: bool) -> int:
    """Bytes per token that autograd saves in one layer; `padded` attention also copies its output."""
    # fp32: x, x̂ and their product of two norms. bf16: x in fp32 and x̂, and a cast of the product for five linears
    norms = 8 + (4 * 6 if b == 4 else 2 * (4 + 2) + 5 * 2) * m.hidden
    if m.head_norms:
        norms += 4 * (m.heads + m.kv_heads) + (8 if b == 4 else 6) * (m.q + m.kv)
    attention = 4 * m.heads + b * (2 * m.q + 2 * m.kv)  # log-sum-exp, queries, outputs, keys, values
    return norms + attention + (b * m.q if padded else 0) + b * 4 * m.mlp


def training(s: Settings, m: Shapes, world: int, cuda: bool, prompt: int = PROMPT) -> Parts:
    """Bytes at the largest moment of a micro-batch's forward and backward pass, without state and gradients."""
    method, b, H, row = METHODS[s.method], getattr(torch, s.dtype).itemsize, m.hidden, prompt + s.max_new_tokens
    rollouts = math.ceil(s.prompts_per_step * (s.group_size + method.joins_group) / world) if method.rl else 0
    rows = max(rollouts, math.ceil(s.demonstrations / world) if method.sft else 0)
    T = max(row, min(s.tokens_per_micro_batch, rows * row))  # a longer row is a micro-batch of its own
    R, checkpointed = T * s.max_new_tokens // row, min(s.checkpoint_layers, m.layers)
    stored = m.layers - checkpointed  # layers that keep all activations
    recomputed = max(stored, 1)  # a checkpointed layer has its activations during its backward pass
    layer = saved_by_layer(m, b, padded=not cuda or b == 4) * T
    inputs, final_norm = checkpointed * b * H * T, (8 if b == 4 else 6) * H * T
    # per layer: autocast's bf16 copies of the linears; in fp32 only the sums θ + s·B·A are new
    copies = b * m.linear / m.layers if b == 2 or method.adapter else 0
    # gradients of the MLP's activations, and of the largest weight in `dtype` and fp32
    in_flight = b * (3 * m.mlp + 2 * H) * T + (4 + b) * max(out * into for _, out, into in m.linears)
    # head: hidden and d_hidden [R, H], the weight's cast, its gradient in fp32, logits and their gradients
    d_weight, cast = 4 * m.vocabulary * H, b * m.vocabulary * H if b == 2 else 0
    waiting = d_weight if m.tied else 0  # until the embedding's gradient is added
    logits = min(CHUNK, R) * m.vocabulary * (4 + b if cuda else 7 * 4)  # PyTorch's version makes seven tensors
    # the three largest moments, each as (activations, copies of weights, vocabulary head)
    end_of_forward = stored * layer + inputs + final_norm, 0 if method.adapter else m.layers * copies, 0
    in_head = stored * layer + inputs + final_norm, stored * copies, 2 * b * R * H + cast + d_weight + logits
    in_layer = recomputed * layer + inputs + in_flight, recomputed * copies, waiting
    largest = max(end_of_forward, in_head, in_layer, key=sum)
    parts = dict(zip(("activations", "copies of weights", "vocabulary head"), largest, strict=True))
    if s.shard and world > 1:  # weights of root and two layers, gradients of root and one, the reference's root
        parts["gathered by FSDP"] = 4 * ((3 if s.kl_coef else 2) * m.root + 3 * (m.parameters - m.root) / m.layers)
    return parts


def memory(s: Settings, m: Shapes, world: int, cuda: bool = True, prompt=PROMPT) -> tuple[Parts, Parts, Parts, float]:
    """(state, sampling, training, peak): bytes of one GPU or, without `cuda`, of one process."""
    (kept, gradients), sampled = state(s, m, world), sampling(s, m, world, prompt)
    trained = gradients | training(s, m, world, cuda, prompt)
    libraries, lost = RESERVE["GPU" if cuda else "CPU"]
    largest = sum(kept.values()) + max(sum(sampled.values()), sum(trained.values()))
    return kept, sampled, trained, largest * (1 + lost) + libraries


def work(s: Settings, m: Shapes) -> dict[str, tuple[float, float]]:
    """phase -> (tokens, FLOPs) of a step, all ranks together; a step of sft_rl has only one of its two stages."""
    method, response, samples = METHODS[s.method], MEAN_RESPONSE * s.max_new_tokens, s.prompts_per_step * s.group_size
    rounds = (1 + s.dynamic_sampling) * (2 if s.shadow_rollouts == "own" else 1)
    # forward passes of the layers (3, and again where checkpointed) and of the head (4: it computes its logits twice)
    trained = 3 + min(s.checkpoint_layers, m.layers) / m.layers, 4

    def phase(rows: float, prompt: float, answer: float, layers: float, heads: int) -> tuple[float, float]:
        attention = 2 * m.layers * m.q * (prompt + answer)  # a token attends to half of its row
        flops = layers * (prompt + answer) * (2 * m.linear + attention) + heads * answer * 2 * m.vocabulary * m.hidden
        return rows * (prompt + answer), rows * flops

    phases, rollouts, demonstrations = {}, s.updates_per_rollout * samples, s.updates_per_rollout * s.demonstrations
    demonstrations *= 2 if s.method == "srft" else 1  # in the RL and in the SFT term; LUFFY's RL counts as sft
    if method.rl:
        phases["sample"] = phase(rounds * samples, PROMPT / s.group_size, response, 1, 1)  # one prefill for a group
        phases["rl"] = phase(rollouts, PROMPT, response, *trained)
        if method.shadow:
            phases["shadow"] = phases["rl"]
        if s.kl_coef > 0:
            phases["reference"] = phase(rollouts * (2 if method.shadow else 1), PROMPT, response, 1, 1)
    if method.sft:
        phases["sft"] = phase(demonstrations, PROMPT, MEAN_DEMONSTRATION * s.max_new_tokens, *trained)
    return phases


def seconds(s: Settings, m: Shapes, gpu: GPU, world: int) -> dict[str, float]:
    """phase -> estimated seconds in bfloat16, without communication and optimizer."""
    phases, response = work(s, m), MEAN_RESPONSE * s.max_new_tokens
    out = {name: flops / world / (COMPUTE * gpu.bf16) for name, (_, flops) in phases.items()}
    if "sample" in out:  # a decode step reads all weights; a token reads the keys and values before it
        (slots, kv), tokens = kv_cache(s, m, world), phases["sample"][0] / world
        steps = tokens / slots + s.max_new_tokens - response  # ended samples are replaced, except the last ones
        weights = steps * 2 * (m.linear + m.vocabulary * m.hidden)
        keys_and_values = tokens * kv / slots * (PROMPT + response) / (PROMPT + s.max_new_tokens)
        out["sample"] = max(out["sample"], (weights + keys_and_values) / (BANDWIDTH * gpu.bandwidth))
    return out


def check(s: Settings, m: Shapes, world: int, limit: float, cuda: bool = True) -> None:
    """Raises SettingError if a GPU needs more than `limit` bytes; the message gives a setting that fits."""
    peak = memory(s, m, world, cuda)[-1]
    if peak <= limit:
        return
    text = f"the run does not fit: it needs {peak / GiB:.1f} of {limit / GiB:.1f} GiB"
    trials = [(world, "tokens_per_micro_batch", s.tokens_per_micro_batch >> i) for i in range(1, 20)]
    trials += [(world, "sampler_slots", max(s.sampler_slots >> i, s.group_size)) for i in range(1, 20)]
    trials.append((world, "checkpoint_layers", m.layers))
    trials += [(n, "shard", True) for n in (2, 4, 8, 16, 32, 64) if n >= world]
    for n, name, value in trials:  # the cheapest change first
        if memory(replace(s, **{name: value}), m, n, cuda)[-1] <= limit:
            raise SettingError(f"{text}; it fits with {name} {value}, gpus {n}")
    raise SettingError(f"{text}; choose a smaller model, shorter responses or a GPU with more memory")


def predictions(s: Settings, m: Shapes) -> str:
    """A table: a step's time and the peak of each GPU, for 1 to 8 GPUs of each kind; nothing of it is measured."""
    counts = [n for n in (1, 2, 4, 8) if n <= s.prompts_per_step]
    lines = ["GPU     GiB" + "".join(f"{n:>15} GPU{'s' * (n > 1):1}" for n in counts)]
    for name, gpu in GPUS.items():
        cells = []
        for n in counts:
            peak, step = memory(s, m, n)[-1], sum(seconds(s, m, gpu, n).values())
            time = f"{step:.1f} s, " if s.dtype == "bfloat16" else ""  # the data sheets' rates are those of bfloat16
            cells.append(f"{time}{peak / GiB:.0f} GiB" if peak <= gpu.memory else "does not fit")
        lines.append(f"{name:<6}{gpu.memory / GiB:5.0f}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def dry_run(s: Settings, config: PretrainedConfig, gpu: str | None, gpus: int) -> None:
    """Prints the needs of a run on GPUs of a kind, else of this machine. Raises SettingError if it does not fit.

    On a machine without a GPU, only built-in models have its needs. Others have a table of kinds and numbers of GPUs.
    """
    if gpu and gpu not in GPUS:
        raise SettingError(f"gpu must be one of {', '.join(GPUS)}; got {gpu!r}")
    cuda, m = bool(gpu) or torch.cuda.is_available(), shapes(config)
    if not cuda and not is_builtin(s.model):
        if gpus > 1:
            raise SettingError("gpus: this computer has no GPU; name a kind with --gpu, or omit --gpus for a table")
        print(f"{s.method}, {m.parameters:,} parameters, {s.total_steps} steps. Predicted, not measured:")
        print(
            "seconds of a step, without communication and optimizer, and GiB of each GPU; --gpu shows the parts of one."
        )
        print(predictions(s, m))
        return
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / gpus  # of this computer's CPU
    if cuda:
        limit = GPUS[gpu].memory if gpu else torch.cuda.get_device_properties(0).total_memory
    *groups, peak = memory(s, m, gpus, cuda)
    here = "this computer's GPU" if cuda else "this computer's CPU"
    print(f"{s.method}, {m.parameters:,} parameters; GiB of each of {gpus} x {gpu or here}")
    for title, parts in zip(("state", "sampling", "training"), groups, strict=True):
        print(f"  {title:<26}{sum(parts.values()) / GiB:8.2f}")
        for part, value in parts.items():
            print(f"    {part:<24}{value / GiB:8.2f}")
    print(f"  {'peak, with libraries':<26}{peak / GiB:8.2f} of {limit / GiB:.1f}")
    saved = sum(size for part, size in groups[0].items() if part.endswith(("weights", "moments")))
    print(f"  {'a checkpoint, on disk':<26}{saved * (gpus if s.shard else 1) / GiB:8.2f}; the last two are kept")
    for phase, (tokens, flops) in work(s, m).items():
        print(f"  {phase:<10}{tokens:14,.0f} tokens {flops / 1e12:12,.2f} TFLOP in a step of all ranks")
    if gpu and s.dtype == "bfloat16":
        times = seconds(s, m, GPUS[gpu], gpus)
        text = " + ".join(f"{phase} {value:.1f}" for phase, value in times.items())
        print(f"estimated, not measured, without communication: {text} = {sum(times.values()):.1f} seconds")
    check(s, m, gpus, limit, cuda)
