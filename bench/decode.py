"""Tokens per second of generation, the sampler beside transformers' generate, and from logits to the next token.

    python bench/decode.py [--quick] [--out FILE.jsonl]

With a GPU first models of real sizes with random weights:

    steps     one decode step of a full batch that never stops. ms per step is the time of 2n new tokens less that of n,
              divided by n, so prefill and graph capture cancel (transformers' steps have time stamps). "% of floor" is
              the floor over the measured time. The floor reads all weights or multiplies by them, whichever takes
              longer, and reads the cache once, at the rates measured in this process. Eager has no CUDA graphs.
    rollouts  320 ragged completions with prefill and refill. They stop at V/300 of the V token ids: random weights
              draw almost uniformly, so lengths are about geometric with a mean of 300, cut at 1,024.
    gap       |log-prob of the sampler − of the trainer| per token on the same weights, in nats: the rounding of bf16.
              The final norm is multiplied by 4, since peaked distributions show rounding.
    peers     transformers' generate with both of its caches.

On every machine then:

    sampling  from logits to tokens. GB/s counts the logits once. "logp error" is the largest against fp64; "p-value" is
              of a χ² test of 20,000 draws, 0 if one is outside the nucleus: near 0 the distribution is wrong.
    built-in  256 rollouts of 48 tokens of the built-in model, and as many that may end earlier. The paths take turns;
              "x generate" is the best of a path over generate's best.
"""

import math
import random
import time
from functools import partial

import torch
from measure import DEVICE, GPU, Table, attempt, build, ceilings, interleaved, parser, sizes_of
from transformers import StoppingCriteriaList, TopPLogitsWarper

from infra.model import load
from infra.parallel import micro_batches
from logprob import response_logprobs
from ops.graphs import STEPS
from ops.packed import pads
from ops.sample import sample_tokens
from sampler import Sampler, generate_naive
from tasks import arithmetic
from tasks.prompts import encode_prompt

PROMPTS, SHAPES = 8, [(256, 1024), (256, 4096), (64, 1024), (64, 4096)]  # prompts of a full batch; (batch, context)
KEYS = [(0, i) for i in range(max(batch for batch, _ in SHAPES))]  # of prompts: their samples depend on them


def random_prompts(model, count: int, length: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(model.config.vocab_size) for _ in range(length)] for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Decode steps of a full batch


def floor_ms(model, batch: int, context: int) -> float:
    """Reading all weights or multiplying by them, whichever takes longer, then reading the cache."""
    c, (P, head_size) = model.config, sizes_of(model)
    bandwidth, flops = ceilings()["copy_gbps"] * 1e9, ceilings()["matmul_tflops"] * 1e12
    size = model.dtype.itemsize  # bytes
    kv = batch * context * c.num_hidden_layers * 2 * c.num_key_value_heads * head_size * size
    return 1e3 * (max(size * P / bandwidth, 2 * P * batch / flops) + kv / bandwidth)


def sampler_step(sampler: Sampler, batch: int, context: int, steps: int, graphs: bool) -> float:
    """ms of a step; `context` is the mean length during the steps in the difference."""
    prompts = random_prompts(sampler.model, min(PROMPTS, batch), context - 3 * steps // 2)
    sampler.slots, sampler.graphs = batch, graphs and GPU

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        sampler.generate(prompts, KEYS[: len(prompts)], batch // len(prompts), 1 + tokens, 1.0)
        return time.perf_counter() - start  # the completions are on the host

    seconds(STEPS)  # compiles kernels
    return 1e3 * (seconds(2 * steps) - seconds(steps)) / steps


def generate_step(model, batch: int, context: int, steps: int, **options) -> float:
    """ms of a step of transformers' generate, the mean of `steps` after as many."""
    ids, stamps = torch.tensor(random_prompts(model, batch, context - 3 * steps // 2), device=DEVICE), []

    def stamp(ids, scores, **kwargs):  # called after every token
        if GPU:
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    limits = dict(do_sample=True, top_k=0, max_new_tokens=1 + 2 * steps, pad_token_id=0)
    criteria = StoppingCriteriaList([stamp])
    model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria, **limits, **options)
    return 1e3 * (stamps[2 * steps] - stamps[steps]) / steps


def step_row(table: Table, model, name: str, path: str, shape: tuple[int, int], measure) -> None:
    """A row, or none if measure() fails; it returns ms per step."""
    batch, context = shape
    ms = attempt(f"{path}, {name}, {batch} x {context}", measure)
    if GPU:
        torch.cuda.empty_cache()
    if ms is not None:
        speed = {"ms/step": ms, "tokens/s": 1e3 * batch / ms, "% of floor": 100 * floor_ms(model, batch, context) / ms}
        table.add({"model": name, "batch": batch, "context": context, "path": path} | speed)


def step_rows(table: Table, name: str, shapes: list[tuple[int, int]], steps: int) -> None:
    sampler = random_sampler(name, None)
    for shape in shapes:
        run = partial(sampler_step, sampler, *shape)
        step_row(table, sampler.model, name, "sampler", shape, partial(run, steps, True))
        step_row(table, sampler.model, name, "sampler, eager", shape, partial(run, max(STEPS, steps // 8), False))


def peer_rows(table: Table, name: str, shape: tuple[int, int], steps: int) -> None:
    model = build(name, torch.bfloat16)
    model.set_attn_implementation("sdpa")
    for path, options in {"generate": {}, "generate, static cache": dict(cache_implementation="static")}.items():
        step_row(table, model, name, path, shape, partial(generate_step, model, *shape, steps, **options))


# ---------------------------------------------------------------------------------------------------------------------
# Ragged rollouts; sampler against trainer


def random_sampler(name: str, mean: int | None) -> Sampler:
    """Completions have about `mean` tokens; they never end without one."""
    model = build(name, torch.bfloat16)
    V = model.config.vocab_size
    return Sampler(model, list(range(V // mean)) if mean else [V], dtype=torch.bfloat16)


def rollout_rows(
    table: Table, name: str, prompts: int, group: int, limit: int, mean: int, all_slots: list[int]
) -> None:
    sampler, rng = random_sampler(name, mean), random.Random(0)
    V = sampler.model.config.vocab_size
    ragged = [[rng.randrange(V) for _ in range(rng.randint(100, 200))] for _ in range(prompts)]
    sampler.generate(ragged[:2], KEYS[:2], group, 16, 1.0)  # compiles kernels
    for slots in all_slots:
        sampler.slots, start = slots, time.perf_counter()
        groups = sampler.generate(ragged, KEYS[:prompts], group, limit, 1.0)
        seconds, lengths = time.perf_counter() - start, [len(c.ids) for g in groups for c in g]
        table.add({"model": name, "rollouts": len(lengths), "slots": slots, "longest": max(lengths),
                   "mean length": sum(lengths) / len(lengths), "seconds": seconds,
                   "tokens/s": sum(lengths) / seconds})  # fmt: skip


@torch.no_grad()
def gap_rows(table: Table, name: str, prompts: int, tokens: int, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    model.model.norm.weight.mul_(4)
    sampler = Sampler(model, [model.config.vocab_size], dtype=dtype)
    encoded = random_prompts(model, prompts, 100)
    completions = [group[0] for group in sampler.generate(encoded, KEYS[:prompts], 1, tokens, 1.0)]
    rows = [(prompt, c.ids) for prompt, c in zip(encoded, completions, strict=True)]
    model.float()  # the trainer's weights are fp32; these have the sampler's values
    ranges = micro_batches(rows, range(len(rows)), 16384, pads(DEVICE, dtype))
    parts = [response_logprobs(model, rows[r.start : r.stop], 1.0, dtype) for r in ranges]
    trainer, entropy = (torch.cat(part).double().cpu() for part in zip(*parts, strict=True))
    gap = (trainer - torch.tensor([logp for c in completions for logp in c.logps]).double()).abs()
    quantiles = {f"p{q}": gap.quantile(q / 100).item() for q in (50, 90, 99)}
    table.add({"model": name, "tokens": len(gap), "mean entropy": entropy.mean().item(),
               "mean gap": gap.mean().item(), **quantiles, "max gap": gap.max().item()})  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# From logits to tokens: (logits [n, V], u [n], top_p) -> (tokens [n], logp [n])


def nucleus(logits, top_p):
    """p, and p within the nucleus by sorting; the sum of the latter need not be 1."""
    p = logits.softmax(-1)
    return p, p if top_p == 1 else p.masked_fill(TopPLogitsWarper(top_p)(None, logits) == float("-inf"), 0.0)


def multinomial(logits, u, top_p):
    p, pool = nucleus(logits, top_p)
    token = pool.multinomial(1)
    return token[:, 0], p.gather(-1, token).log()[:, 0]


def race(logits, u, top_p):
    """The first of V exponential clocks with rates p (nano-vllm, vLLM)."""
    p, pool = nucleus(logits, top_p)
    token = (pool / torch.empty_like(p).exponential_(1)).argmax(-1, keepdim=True)
    return token[:, 0], p.gather(-1, token).log()[:, 0]


def p_value(draw, top_p: float) -> float:
    """Of a χ² test on 50 logits, by the Wilson–Hilferty approximation."""
    g, n = torch.Generator(DEVICE).manual_seed(1), 20_000
    logits = torch.randn(50, generator=g, device=DEVICE) * 1.5
    u = torch.rand(n, generator=g, device=DEVICE, dtype=torch.float64)
    tokens, _ = draw(logits.expand(n, -1).contiguous(), u, top_p=top_p)
    p, order = logits.double().softmax(-1).sort(descending=True)
    inside = p.cumsum(-1) - p < top_p
    expected = n * p * inside / (p * inside).sum()
    observed = tokens.bincount(minlength=50)[order]
    if observed[~inside].sum():
        return 0.0
    chi2, freedom = ((observed - expected)[inside] ** 2 / expected[inside]).sum().item(), int(inside.sum()) - 1
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def sampling_rows(table: Table, n: int, V: int, top_p: float, compiled: bool) -> None:
    g = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(n, V, generator=g, device=DEVICE) * 2
    logits[:, :: V // 20] += math.log(V) + 4  # a few tokens have most of the probability, as in a trained model
    u = torch.rand(n, generator=g, device=DEVICE, dtype=torch.float64)
    ours = partial(sample_tokens, temperature=1.0)
    peers, functions, facts = {"ours": ours, "multinomial": multinomial, "race": race}, {}, {}
    if compiled:
        peers |= {f"{name}, compiled": torch.compile(peers[name]) for name in ("multinomial", "race")}
    for name, function in peers.items():
        run = partial(function, logits, u, top_p=top_p)
        if (drawn := attempt(name, run)) is not None:
            tokens, logp = drawn
            exact = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            error = (logp.double() - exact).abs().max().item()
            functions[name], facts[name] = run, {"logp error": error, "p-value": p_value(function, top_p)}
    for name, times in interleaved(functions, 0.05).items():
        rate = 4 * n * V / times["ms"] / 1e6
        speed = {"GB/s": rate, "% of copy": 100 * rate / ceilings()["copy_gbps"]}
        table.add({"impl": name, "n": n, "V": V, "top_p": top_p} | times | speed | facts[name])


# ---------------------------------------------------------------------------------------------------------------------
# The built-in model


def built_in_rows(table: Table, quick: bool, may_end: bool) -> None:
    prompts, group, tokens, name = (4, 4, 8, "arithmetic-smoke") if quick else (32, 8, 48, "arithmetic-laptop")
    model, tokenizer = load(name)
    sampler = Sampler(model, [tokenizer.eos_token_id if may_end else len(tokenizer)], slots=prompts * group)
    model.set_attn_implementation("sdpa")  # for generate; the sampler has its own copy
    encoded = [encode_prompt(tokenizer, p.question, "") for p in arithmetic.evaluation(prompts)[:prompts]]
    pad, width = tokenizer.unk_token_id, max(map(len, encoded))
    padded = [[pad] * (width - len(p)) + p for p in encoded for _ in range(group)]  # generate needs padding on the left
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in encoded for _ in range(group)], device=DEVICE)
    ids = torch.tensor(padded, device=DEVICE)

    def naive() -> int:  # one group is enough: all take equally long
        return sum(len(generate_naive(sampler, encoded[0], (0, 0, i), tokens, 1.0).ids) for i in range(group))

    def generate() -> int:
        limits = dict(max_new_tokens=tokens, eos_token_id=sampler.stop[0], pad_token_id=pad, do_sample=True, top_k=0)
        out = model.generate(ids, attention_mask=mask, **limits)[:, width:]
        return int((out != pad).sum()) if may_end else out.numel()

    def sample() -> int:
        return sum(len(c.ids) for g in sampler.generate(encoded, KEYS[:prompts], group, tokens, 1.0) for c in g)

    paths = {"naive": naive, "generate": generate, "sampler": sample}
    paths = {path: run for path, run in paths.items() if attempt(path, run)}  # warms up, too
    speeds: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(1 if quick else 5):
        for path, run in paths.items():
            start = time.perf_counter()
            speeds[path].append(run() / (time.perf_counter() - start))
    for path, speed in speeds.items():
        table.add({"model": name, "rollouts": prompts * group, "tokens": f"up to {tokens}" if may_end else tokens,
                   "path": path, "best tokens/s": max(speed), "median tokens/s": sorted(speed)[len(speed) // 2],
                   "x generate": max(speed) / max(speeds["generate"])})  # fmt: skip


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    ceilings()
    parts = ("steps", "rollouts", "gap", "peers", "sampling", "built-in")
    steps, rollouts, gap, peers, sampling, built_in = (Table(part, args.out) for part in parts)
    if args.quick:  # the same functions on a CPU, at small sizes
        step_rows(steps, "tiny", [(8, 40)], 8)
        rollout_rows(rollouts, "tiny", 4, 4, 16, 8, [8])
        gap_rows(gap, "tiny", 4, 16, torch.bfloat16 if GPU else torch.float32)
        peer_rows(peers, "tiny", (8, 40), 4)
    elif GPU:  # each part builds its own model, so none holds memory of another
        step_rows(steps, "Qwen2.5-3B", SHAPES, 128)
        rollout_rows(rollouts, "Qwen2.5-3B", 64, 5, 1024, 300, [320, 128])
        gap_rows(gap, "Qwen2.5-3B", 32, 256, torch.bfloat16)
        step_rows(steps, "Qwen3-8B", SHAPES[:1], 128)
        peer_rows(peers, "Qwen2.5-3B", (256, 1024), 32)
    small = args.quick or not GPU
    for i, (n, V) in enumerate([(16, 1003)] if small else [(256, 151936), (64, 151936), (1024, 151936)]):
        for top_p in (1.0, 0.95):
            sampling_rows(sampling, n, V, top_p, compiled=GPU and i == 0)
    for may_end in (True,) if args.quick else (False, True):
        built_in_rows(built_in, args.quick, may_end)


if __name__ == "__main__":
    main()
