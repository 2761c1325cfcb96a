"""What a run will need, worked out before anything is loaded: memory of each GPU, tokens, FLOPs, seconds.

    python bridge.py --model Qwen/Qwen2.5-3B --rl-data R.jsonl --sft-data S.jsonl --dtype bfloat16 --dry-run --gpu h200

Needs the model's config only. Memory is computed from shapes, as the code allocates it, at its worst: every response
runs to max_new_tokens. Seconds are *estimated*, never measured: FLOPs and bytes of a step in which responses have an
assumed mean length, over the data sheet's rates times an assumed efficiency. All assumptions stand below.

Shapes: N sequences of this rank at a time, T tokens of a micro-batch; H hidden, I intermediate, V vocabulary, d head
size, h and h_kv heads; K = max_new_tokens; P parameters; b bytes of a number in `dtype`. Bytes unless named otherwise.
"""

import math
import os
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from logprob import CHUNK
from sampler import PREFILL_TOKENS, STEPS
from settings import SettingError, Settings
from tasks import arithmetic as toy

GiB = 2**30
PROMPT = 200  # assumed: tokens of every prompt
MEAN_RESPONSE, MEAN_DEMONSTRATION = 0.33, 0.8  # assumed, for seconds: mean length as a part of max_new_tokens
COMPUTE, BANDWIDTH, LINK = 0.5, 0.55, 0.7  # assumed: what a step reaches of the data sheet's rates
# By whether it is a GPU: what libraries take, and the share that is lost between allocations. On a GPU, with CUDA's
# context and graphs, assumed; on a CPU seen in bench/plan.py: glibc keeps freed pieces of up to 32 MiB for later use.
LIBRARIES, LOST = {True: 1.5 * GiB, False: 0.45 * GiB}, {True: 0.05, False: 0.12}


@dataclass(frozen=True)
class GPU:
    """Dense rates of NVIDIA's data sheets (A100 80GB SXM, H100 SXM, H200, L40S, RTX 4090 in the Ada whitepaper).

    `memory` is what torch reports of the data sheet's 80, 80, 141, 48 and 24 GB, in GiB; `link` is one way: NVLink,
    or PCIe 4.0 x16 for the last two.
    """

    bf16: float  # FLOP/s, sums in fp32
    fp32: float  # FLOP/s, without TF32, which torch does not use unless told to
    bandwidth: float  # bytes/s
    memory: float
    link: float  # bytes/s


GPUS = {
    "a100": GPU(312e12, 19.5e12, 2.04e12, 79 * GiB, 300e9),
    "h100": GPU(989e12, 67e12, 3.35e12, 79 * GiB, 450e9),
    "h200": GPU(989e12, 67e12, 4.8e12, 139 * GiB, 450e9),
    "l40s": GPU(362e12, 91.6e12, 0.864e12, 44 * GiB, 32e9),
    "4090": GPU(165e12, 82.6e12, 1.008e12, 23.5 * GiB, 32e9),
}
QWEN = dict(vocab_size=151936, max_position_embeddings=32768)
PUBLISHED = {  # the paper's models without a network, from their config.json on the hub
    "Qwen/Qwen2.5-3B": QWEN | dict(
        model_type="qwen2", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B-Instruct": dict(
        model_type="llama", hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, vocab_size=128256,
        max_position_embeddings=131072),
    "Qwen/Qwen3-8B-Base": QWEN | dict(
        model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The model


def config_of(model: str, trust_remote_code: bool = False):
    """The config of a built-in model, a published one, a folder or a hub name. Raises SettingError without one."""
    if model in toy.RECIPES:
        return toy.config(toy.RECIPES[model], toy.make_tokenizer())
    if model in PUBLISHED:
        return AutoConfig.for_model(**PUBLISHED[model])
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"model {model!r}: no config found; put its config.json into a folder and give that folder as --model"
        ) from error


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model. `linears` are those of all layers, by last name: (out, in) of each."""

    parameters: int
    tensors: int
    root: int  # parameters outside the layers: embedding, head, final norm
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    head_norms: bool
    linears: dict[str, list[tuple[int, int]]]

    @property
    def linear(self) -> int:  # parameters of all linears of all layers
        return sum(out * into for sizes in self.linears.values() for out, into in sizes)

    @property
    def layer(self) -> float:  # parameters of one layer
        return (self.parameters - self.root) / self.layers


def shapes(config) -> Shapes:
    """Counts a model built without memory. Raises SettingError if it is not built like Llama, Qwen2 or Qwen3."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers, c = model.model.layers, model.config
        linears: dict[str, list[tuple[int, int]]] = {}
        for name, module in layers.named_modules():
            if isinstance(module, nn.Linear):
                linears.setdefault(name.split(".")[-1], []).append(tuple(module.weight.shape))
        total, inside = (sum(p.numel() for p in m.parameters()) for m in (model, layers))
        return Shapes(
            total, len(list(model.parameters())), total - inside, len(layers), c.hidden_size, c.intermediate_size,
            c.num_attention_heads, c.num_key_value_heads,
            getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads, c.vocab_size,
            model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            hasattr(layers[0].self_attn, "q_norm"), linears,
        )  # fmt: skip
    except (AttributeError, ValueError) as error:
        raise SettingError(f"model of type {config.model_type!r} is not built like Llama, Qwen2 or Qwen3") from error


def adapter(s: Settings, m: Shapes) -> tuple[int, int]:
    """(parameters, tensors) of w."""
    if s.method not in ("mix_lora", "bridge"):
        return 0, 0
    sizes = [size for name in s.lora_targets.split(",") for size in m.linears.get(name, [])]
    return s.lora_rank * sum(map(sum, sizes)), 2 * len(sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def state(s: Settings, m: Shapes, world: int) -> dict[str, float]:
    """Weights, gradients (which are freed when the optimizers have stepped) and Adam's two moments."""
    share, b = world if s.shard else 1, getattr(torch, s.dtype).itemsize
    (w, w_tensors), out = adapter(s, m), {}
    for name in ("θ", "θ̂") if s.method == "bridge" else ("θ",):
        out[f"{name} weights"] = out[f"{name} gradients"] = 4 * m.parameters / share
        out[f"{name} moments"] = 8 * m.parameters / share + 4 * m.tensors  # and a count of steps for each tensor
    if w:
        out["w weights"] = out["w gradients"] = 4 * w
        out["w moments"] = 8 * w + 4 * w_tensors
    if s.kl_coef > 0:
        out["reference"] = 4 * m.parameters / share
    return out | {"sampler's merged copy": b * m.parameters}


def cache(s: Settings, m: Shapes, world: int, prompt: int = PROMPT) -> tuple[int, int, int]:
    """(samples of a rank, slots, bytes of the sampler's keys and values)."""
    b = getattr(torch, s.dtype).itemsize
    samples = math.ceil(s.prompts_per_step / world) * s.group_size
    slots = max(min(s.sampler_slots, samples), s.group_size)
    return samples, slots, m.layers * 2 * slots * (prompt + s.max_new_tokens) * m.kv_heads * m.head_dim * b


def sampling(s: Settings, m: Shapes, world: int, cuda: bool, prompt: int = PROMPT) -> dict[str, float]:
    """What the sampler needs while it samples; evaluation is taken to need no more."""
    b, K = getattr(torch, s.dtype).itemsize, s.max_new_tokens
    samples, slots, kv = cache(s, m, world, prompt)
    moved = min(0.5, (STEPS if cuda else 1) / max(1, MEAN_RESPONSE * K))  # slots that end at one time: they are copied
    fed = max(min(PREFILL_TOKENS, samples // s.group_size * prompt), slots)
    widths = 3 * m.hidden + 2 * (m.heads + m.kv_heads) * m.head_dim + 3 * m.mlp
    logits = slots * m.vocabulary * (4 if cuda else 4 + 3 * 8)  # the twin computes in fp64
    attention = 0 if cuda else 3 * 4 * slots * m.heads * m.kv_heads * (prompt + K)
    return {
        "KV cache": kv,
        "KV of ended slots, moved": moved * kv,
        "sampling buffers": (samples + 1) * (K + 1) * (8 + 8 + 4) + logits + attention,
        "prefill activations": fed * widths * b,
    }


def kept(m: Shapes, b: int, padded: bool) -> int:
    """Bytes per token of what autograd keeps of one layer that is not checkpointed."""
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    if b == 4:
        norms, head_norms = 4 * 6 * m.hidden, 8 * (q + kv)  # x, x̂ and their product, twice
    else:  # x in fp32 and x̂ of two norms; autocast casts the product for each of five linears
        norms, head_norms = (2 * (4 + 2) + 5 * 2) * m.hidden, 6 * (q + kv)
    attention = b * (2 * q + 2 * kv + q * padded) + 4 * m.heads  # q, output, k, v, log-sum-exp
    head_norms = (head_norms + 4 * (m.heads + m.kv_heads)) * m.head_norms
    return norms + 8 + head_norms + attention + b * 4 * m.mlp


def training(s: Settings, m: Shapes, world: int, cuda: bool, prompt: int = PROMPT) -> dict[str, float]:
    """The largest moment of a micro-batch's forward and backward, by part."""
    b, (w, _), row = getattr(torch, s.dtype).itemsize, adapter(s, m), prompt + s.max_new_tokens
    rows = max(
        math.ceil(s.prompts_per_step * s.group_size / world) * (s.method != "sft"),
        math.ceil(s.sft_batch / world) * (s.method != "rl"),
    )
    T = max(row, min(s.tokens_per_micro_batch, rows * row))  # a row that is longer stands alone
    responses, n = T * s.max_new_tokens // row, min(s.checkpoint_layers, m.layers)
    C, VH = min(CHUNK, responses), m.vocabulary * m.hidden
    full = kept(m, b, padded=not cuda or b == 4) * T
    inputs, final = n * b * m.hidden * T, (4 * 2 if b == 4 else 4 + 2) * m.hidden * T
    # fp32: only the sums θ + s·B·A are new; bf16: autocast keeps a cast copy of every linear's weight
    adapted = m.linear if b == 2 else sum(o * i for t in s.lora_targets.split(",") for o, i in m.linears.get(t, ()))
    copies = b * adapted if w or b == 2 else 0
    largest = max((out * into for sizes in m.linears.values() for out, into in sizes), default=0)
    passing = b * (3 * m.mlp + 2 * m.hidden) * T + (4 + b) * largest  # gradients on their way: of the MLP, of a weight
    rest, layer = (m.layers - n) / m.layers * copies, copies / m.layers
    own = 4 * VH  # gradient of the head's weight; of a tied one until the embedding's is added to it
    live = full + layer if n else 0
    word = 4 + b if cuda else 7 * 4  # of a logit and its gradient; the twins hold seven tensors at a time
    moments = {
        "head": ((m.layers - n) * full + inputs + final, rest,
                 own + 2 * b * responses * m.hidden + VH * (2 if b == 2 else 0) + C * m.vocabulary * word),
        "last layer": ((m.layers - n) * full + inputs + passing, rest, own * m.tied),
        "first layers": (inputs + live + passing, layer, own * m.tied),
        "forward": ((m.layers - n) * full + inputs + full * (n > 0), copies if not w else rest, 0),
        "embedding": (0, 0, 2 * own),
    }  # fmt: skip
    activations, merged, head = max(moments.values(), key=sum)
    out = {"activations": activations, "merged weights": merged, "vocabulary head": head}
    if s.method == "bridge":
        out["w's gradients, apart"] = 4 * w  # θ's and θ̂'s parts are summed apart
    if s.shard and world > 1:
        # weights of the root and two layers, gradients of the root and one layer, and the reference's root
        out["FSDP, gathered"] = 4 * (2 * m.root + 3 * m.layer + m.root * (s.kl_coef > 0))
    return out


def memory(
    s: Settings, m: Shapes, world: int, cuda: bool = True, prompt: int = PROMPT
) -> tuple[dict[str, float], dict[str, float], dict[str, float], float]:
    """(state, sampling, training, peak) of one GPU, or of the process on a CPU: bytes by part, and the largest sum."""
    everything = state(s, m, world)
    gradients = {name: size for name, size in everything.items() if "gradients" in name}
    always = {name: size for name, size in everything.items() if name not in gradients}
    parts = always, sampling(s, m, world, cuda, prompt), gradients | training(s, m, world, cuda, prompt)
    resident, sampled, trained = (sum(part.values()) for part in parts)
    most = resident + max(sampled * (s.method != "sft"), trained)
    return *parts, most * (1 + LOST[cuda]) + LIBRARIES[cuda]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens, FLOPs, seconds of one step


def work(s: Settings, m: Shapes, prompt: int = PROMPT) -> dict[str, dict[str, float]]:
    """Tokens and FLOPs of a step by phase, all ranks together, at the assumed mean lengths. sft_rl does either of its
    two stages in a step; dynamic sampling is taken to draw all the batches it may."""
    response, solution = MEAN_RESPONSE * s.max_new_tokens, MEAN_DEMONSTRATION * s.max_new_tokens
    N, head, width = s.prompts_per_step * s.group_size, m.vocabulary * m.hidden, m.heads * m.head_dim
    body = m.linear  # weights that every token is multiplied by
    recomputed = min(s.checkpoint_layers, m.layers) / m.layers

    def trained(rows: float, length: float, passes: float, recomputed: float = 0.0) -> dict[str, float]:
        """passes: 3 of forward and backward, 1 of scoring."""
        tokens = rows * (prompt + length)
        one = 2 * body * tokens + 4 * m.layers * width * rows * (prompt + length) ** 2 / 2
        return dict(tokens=tokens, flops=(passes + recomputed) * one + passes * 2 * head * rows * length)

    out: dict[str, dict[str, float]] = {}
    if s.method != "sft":
        times = (1 + s.dynamic_sampling) * (1 + (s.shadow_rollouts == "own"))
        filled = trained(s.prompts_per_step, 0, 1)  # one prefill per prompt
        filled["tokens"], filled["flops"] = (times * filled[key] for key in ("tokens", "flops"))
        made = times * N * response
        context = prompt + response  # long responses are seen by more of the tokens: the mean over tokens
        flops = made * (2 * (body + head) + 4 * m.layers * width * context)
        out |= {"prefill": filled, "sample": dict(tokens=made, flops=flops, rounds=times, context=context)}
        passes = {"rl": 1, "shadow": s.method == "bridge"}
        passes["reference"] = s.kl_coef > 0 and sum(passes.values())
        for name, count in passes.items():
            if count:
                row = trained(N * count, response, 1 if name == "reference" else 3, recomputed * (name != "reference"))
                out[name] = {key: s.updates_per_rollout * value for key, value in row.items()}
    if s.method != "rl":
        row = trained(s.sft_batch, solution, 3, recomputed)
        out["sft"] = {key: s.updates_per_rollout * value for key, value in row.items()}
    return out


def seconds(
    s: Settings,
    m: Shapes,
    gpu: GPU,
    world: int,
    compute=COMPUTE,
    bandwidth=BANDWIDTH,
    prompt: int = PROMPT,
) -> dict[str, float]:
    """Estimated seconds by phase; communication is counted in full, as if none were hidden behind computing."""
    b = getattr(torch, s.dtype).itemsize
    phases, rate, wide = work(s, m, prompt), compute * (gpu.bf16 if b == 2 else gpu.fp32), bandwidth * gpu.bandwidth
    out = {name: phase["flops"] / world / rate for name, phase in phases.items()}
    if "sample" in phases:
        samples, slots, _ = cache(s, m, world, prompt)
        sample, mean = phases["sample"], MEAN_RESPONSE * s.max_new_tokens
        steps = sample["rounds"] * (samples * mean / slots + s.max_new_tokens - mean)  # slots refill; the last run out
        weights = steps * b * (m.linear + m.vocabulary * m.hidden) / wide
        kv = sample["tokens"] / world * sample["context"] * m.layers * 2 * m.kv_heads * m.head_dim * b / wide
        multiply = 2 * (m.linear + m.vocabulary * m.hidden) * sample["tokens"] / world / rate
        out["sample"] = out.pop("prefill") + max(weights, multiply) + kv
    share, sets = world if s.shard else 1, 2 if s.method == "bridge" else 1
    updates = s.updates_per_rollout * (2 if s.method == "alternating" else 1)
    out["optimizer"] = updates * sets * 28 * m.parameters / share / wide  # reads w, g, m, v and writes w, m, v, fp32
    if world > 1:
        passes = {
            name: phases[name]["tokens"] / world for name in ("rl", "shadow", "sft", "reference") if name in phases
        }
        if s.shard:  # fp32 weights twice and gradients once for each micro-batch; the merged copy once
            batches = {name: math.ceil(tokens / s.tokens_per_micro_batch) for name, tokens in passes.items()}
            sent = 4 + sum(count * (4 if name == "reference" else 12) for name, count in batches.items())
        else:  # the gradients of every set, summed once for each update
            sent = 8 * updates * sets
        out["communication"] = sent * m.parameters * (world - 1) / world / (LINK * gpu.link)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees


def remedies(s: Settings, m: Shapes, world: int, limit: float, cuda: bool = True) -> list[str]:
    """Changes that make the run fit, tried by the same formulas: each alone, else the memory settings together, and the
    smallest number of GPUs."""

    def fits(world: int = world, **changed) -> bool:
        return memory(replace(s, **changed), m, world, cuda)[-1] <= limit

    row, (_, slots, kv) = PROMPT + s.max_new_tokens, cache(s, m, world)
    candidates = {
        "tokens_per_micro_batch": [t for i in range(1, 20) if (t := s.tokens_per_micro_batch >> i) >= row],
        "checkpoint_layers": range(s.checkpoint_layers + 1, m.layers + 1),
        "sampler_slots": range(slots - 1, s.group_size - 1, -1),
    }
    ways = []
    for name, values in candidates.items():
        best = next((value for value in values if fits(**{name: value})), None)
        if best is not None:
            ways.append(f"{name} {best}" + f" ({slots} slots need {kv / GiB:.1f} GiB)" * (name == "sampler_slots"))
    least = {name: values[-1] for name, values in candidates.items() if values}
    if not ways and fits(**least):
        ways.append(" with ".join(["", *(f"{name} {value}" for name, value in least.items())])[6:])
    if world > 1 and not s.shard and fits(shard=True):
        ways.append("--shard")
    for changed in ({}, least) if cuda and "--shard" not in ways else ():
        n = next((n for n in (2, 4, 8, 16, 32, 64) if n > world and fits(n, shard=True, **changed)), None)
        if n:
            return [*ways, " with ".join([f"{n} GPUs with --shard", *(f"{k} {v}" for k, v in changed.items())])]
    return ways


def check(s: Settings, m: Shapes, world: int, limit: float, cuda: bool = True) -> None:
    """Raises SettingError if `limit` bytes, of each GPU or of a computer without one, are too few."""
    need = memory(s, m, world, cuda)[-1]
    if need > limit:
        ways = "; or ".join(remedies(s, m, world, limit, cuda)) or "a smaller model"
        where = "of each GPU" if cuda else "of memory"
        raise SettingError(f"{need / GiB:.1f} GiB {where} needed, {limit / GiB:.1f} there; it would fit with {ways}")


def machine(name: str | None) -> tuple[GPU | None, float, bool]:
    """(GPU if known, memory of one in bytes, whether it is a GPU) by name, else here. Raises SettingError."""
    if name:
        if name not in GPUS:
            raise SettingError(f"gpu must be one of {', '.join(GPUS)}; got {name!r}")
        return GPUS[name], GPUS[name].memory, True
    if torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        known = next((gpu for key, gpu in GPUS.items() if key in here.name.lower()), None)
        return known, here.total_memory, True
    return None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), False


def report(s: Settings, m: Shapes, gpu: GPU | None, world: int, limit: float, cuda: bool) -> str:
    """Tables of memory, tokens and, for a known GPU, seconds. "estimated" rests on the assumptions above."""
    *groups, peak = memory(s, m, world, cuda)
    what = (
        f"{world} GPU{'s' * (world > 1)}, {'sharded' if s.shard and world > 1 else 'nothing sharded'}"
        if cuda
        else "this computer's CPU"
    )
    lines = [f"{s.method} on {what}: {m.parameters:,} parameters, w {adapter(s, m)[0]:,} (computed)", ""]
    lines += [f"memory {'of one GPU' if cuda else 'of the process'}, GiB, if every response runs to max_new_tokens"]
    for title, parts in zip(("always", "while sampling", "while training"), groups, strict=True):
        lines.append(f"  {title:<28}{sum(parts.values()) / GiB:8.2f}  computed")
        lines += [f"    {name:<26}{value / GiB:8.2f}" for name, value in parts.items()]
    computed = (peak - LIBRARIES[cuda]) / (1 + LOST[cuda])
    title = f"{'CUDA, ' * cuda}libraries, {LOST[cuda]:.0%} lost"
    lines.append(f"  {title:<28}{(peak - computed) / GiB:8.2f}  assumed")
    lines.append(f"  {'peak':<28}{peak / GiB:8.2f}  of {limit / GiB:.1f}")
    lines.append(f"  host memory while loading: {4 * m.parameters * world / GiB:.1f} GiB" * cuda)
    phases = work(s, m)
    lines += [f"a step of all ranks: {PROMPT} tokens in a prompt, responses of {MEAN_RESPONSE * s.max_new_tokens:.0f} "
              f"and demonstrations of {MEAN_DEMONSTRATION * s.max_new_tokens:.0f} on average (assumed)"]  # fmt: skip
    times = seconds(s, m, gpu, world) if gpu else {}
    for name in [*phases, *(n for n in times if n not in phases)]:
        phase = phases.get(name)
        counts = f"{phase['tokens']:14,.0f} tokens {phase['flops'] / 1e12:12,.2f} TFLOP" if phase else " " * 40
        lines.append(f"  {name:<14}{counts}" + (f" {times[name]:10.2f} s" if name in times else ""))
    if gpu:
        total = sum(t for name, t in times.items() if not (s.method == "sft_rl" and name == "sft"))
        lines.append(f"  {'step':<54}{total:11.2f} s  estimated, not measured: {COMPUTE:.0%} of data sheet FLOP/s, "
                     f"{BANDWIDTH:.0%} of its bandwidth, {LINK:.0%} of its link")  # fmt: skip
    else:
        lines.append("  no seconds: this machine's speed is not in the table; --gpu names one of " + ", ".join(GPUS))
    return "\n".join(lines)


def dry_run(s: Settings, name: str | None, gpus: int) -> None:
    """Prints the report of a run on `gpus` GPUs of that name, or if None of this machine. Raises SettingError if the
    model has no config, or the run does not fit."""
    gpu, limit, cuda = machine(name)
    m = shapes(config_of(s.model, s.trust_remote_code))
    print(report(s, m, gpu, gpus, limit, cuda))
    check(s, m, gpus, limit, cuda)
