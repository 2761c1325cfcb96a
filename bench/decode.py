"""Tokens per second of generation: the sampler beside transformers' generate.

    python bench/decode.py [--quick] [--out FILE.jsonl]

Without a GPU, and first with one too: 256 rollouts of 48 tokens of the built-in model, and as many that may end before,
as they do in training. Only tokens up to the end count. The paths are run in turn, five times; "x generate" is the best
of a path over the best of transformers' `generate` in the same run.

With a GPU, models of real sizes with random weights, whose sequences never stop by themselves:

    steps     one decode step of a full batch. ms per step is a difference, the time of 2n new tokens less that of n,
              so prefill and graph capture fall out (transformers' steps are timed one by one, from the 32nd on).
              "% of floor" is max(2P/BW, 2P·B/F) + KV/BW over that: reading all weights or multiplying by them,
              whichever takes longer, then reading the cache once, at the bandwidth BW and the rate F measured in this
              process. The context is the mean one of the steps timed. Eager is the same code with no CUDA graph.
    rollouts  320 ragged ones, prefill and refill included. They stop at any of V/300 token ids: under random weights
              the next token is all but uniform, so lengths are about geometric with a mean of 300, cut at 1,024.
    gap       |log-prob of the sampler − of the trainer| per token on equal weights: bf16 noise, in nats. The final norm
              is scaled up by 4 there, because rounding shows where distributions are peaked.
"""

import random
import signal
import time
from contextlib import contextmanager
from functools import partial

import torch
from measure import DEVICE, arguments, attempt, ceilings, write
from random_models import build, head_size, matmul_parameters
from transformers import GenerationConfig, StoppingCriteriaList

from infra.model import load, micro_batches, response_scores
from sampler import STEPS, Sampler, generate_naive
from tasks import arithmetic as toy
from tasks import task as tasks

PROMPTS = 8  # that a full batch is sampled from
SHAPES = [(64, 1024), (64, 4096), (256, 1024), (256, 4096)]  # batch, context


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------------------------
# The built-in model


def built_in(quick: bool, may_end: bool) -> list[dict]:
    prompts, group, tokens, name = (4, 4, 16, "arithmetic-smoke") if quick else (32, 8, 48, "arithmetic-laptop")
    model, tokenizer = load(str(toy.build_base(name)))
    plain, _ = load(str(toy.build_base(name)))
    plain.set_attn_implementation("sdpa")
    encoded = [tasks.encode_prompt(tokenizer, p.question, "") for p in toy.evaluation(prompts)[:prompts]]
    stop, pad = tokenizer.eos_token_id if may_end else len(tokenizer), tokenizer.unk_token_id  # no such id: no end
    ours = Sampler(model, [stop], slots=prompts * group)
    width = max(map(len, encoded))
    padded = [[pad] * (width - len(p)) + p for p in encoded for _ in range(group)]  # on the left, as generate asks
    ids = torch.tensor(padded, device=DEVICE)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in encoded for _ in range(group)], device=DEVICE)

    def naive() -> int:  # one group is enough: the others would take as long
        return sum(len(generate_naive(ours, encoded[0], (0, 0, i), tokens, 1.0).ids) for i in range(group))

    def generate(**options) -> int:
        limits = dict(max_new_tokens=tokens, eos_token_id=stop, pad_token_id=pad)
        out = plain.generate(ids, attention_mask=mask, do_sample=True, top_k=0, **limits, **options)[:, width:]
        return int((out != pad).sum()) if may_end else out.numel()

    def sample() -> int:
        keys = [(0, i) for i in range(prompts)]
        return sum(len(c.ids) for g in ours.generate(encoded, keys, group, tokens, 1.0) for c in g)

    paths = {
        "naive": naive,
        "generate": generate,
        "generate, static cache": partial(generate, cache_implementation="static"),
        "sampler": sample,
    }
    paths = {path: run for path, run in paths.items() if attempt(path, run)}  # which warms up, too
    speeds: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(5):  # in turn: a slow moment of the machine hits all
        for path, run in paths.items():
            start = time.perf_counter()
            speeds[path].append(run() / (time.perf_counter() - start))
    return [
        {"model": name, "rollouts": prompts * group, "tokens": f"up to {tokens}" if may_end else tokens, "path": path,
         "best tokens/s": max(speed), "median tokens/s": sorted(speed)[2],
         "x generate": max(speed) / max(speeds["generate"])}
        for path, speed in speeds.items()
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Decode steps of a full batch


def random_prompts(model, count: int, length: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(model.config.vocab_size) for _ in range(length)] for _ in range(count)]


def floor_ms(model, batch: int, context: int) -> float:
    """What a step takes at the least: see the docstring above."""
    c, P, measured = model.config, matmul_parameters(model), ceilings()
    BW, F = measured["copy_gbps"] * 1e9, measured["matmul_tflops"] * 1e12
    size = model.dtype.itemsize
    kv = batch * context * c.num_hidden_layers * 2 * c.num_key_value_heads * head_size(model) * size  # bytes
    return 1e3 * (max(size * P / BW, 2 * P * batch / F) + kv / BW)


def sampler_step(ours: Sampler, batch: int, context: int, steps: int, graphs: bool) -> float:
    """ms of a step: 2·steps less `steps`, so that on average `context` tokens stand before a token."""
    prompts = random_prompts(ours.model, min(PROMPTS, batch), context - 3 * steps // 2)
    keys = [(0, i) for i in range(len(prompts))]
    ours.slots, ours.graphs = batch, graphs and DEVICE.type == "cuda"

    def new(tokens: int) -> float:
        return seconds(lambda: ours.generate(prompts, keys, batch // len(prompts), 1 + tokens, 1.0))

    new(STEPS)  # compiles kernels
    return 1e3 * (new(2 * steps) - new(steps)) / steps


def stamped_generate(model, ids, tokens: int, **options) -> list[float]:
    """transformers' generate; the time of each token, in ms."""
    stamps = []

    def stamp(ids, scores, **kwargs):  # called after every token
        if DEVICE.type == "cuda":
            stamps.append(torch.cuda.Event(enable_timing=True))
            stamps[-1].record()
        else:
            stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    sampling = dict(do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=0)
    criteria = StoppingCriteriaList([stamp])
    model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria, **sampling, **options)
    synchronize()
    first = stamps[0]
    return [first.elapsed_time(s) if DEVICE.type == "cuda" else 1e3 * (s - first) for s in stamps]


def generate_step(model, batch: int, context: int, steps: int, **options) -> float:
    """ms of a step of transformers' generate, the mean of `steps` after as many."""
    ids = torch.tensor(random_prompts(model, batch, context - 3 * steps // 2), device=DEVICE)
    times = stamped_generate(model, ids, 1 + 2 * steps, **options)
    return (times[2 * steps] - times[steps]) / steps


def generate_batch_step(model, batch: int, context: int, steps: int) -> float:
    """ms per token of every sequence in transformers' continuous batching, while all of them are being decoded.

    With no flash-attn installed it attends by SDPA over its pages, which is its slow path.
    """
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=2 * steps, eos_token_id=-1, pad_token_id=0)
    prompts = random_prompts(model, min(PROMPTS, batch), context - steps) * (batch // min(PROMPTS, batch))
    with time_limit(40):
        results = model.generate_batch(inputs=prompts, generation_config=config, record_timestamps=True)
    stamps = [r.timestamps for r in results.values() if r.timestamps]
    if len(stamps) < batch:
        raise RuntimeError(f"{len(stamps)} of {batch} sequences were generated")
    begin, end = max(s[0] for s in stamps), min(s[-1] for s in stamps)
    tokens = sum(begin < t <= end for s in stamps for t in s)
    if tokens < batch:
        raise RuntimeError("at no time were all sequences being decoded")
    return 1e3 * (end - begin) * batch / tokens


@contextmanager
def time_limit(limit: int):
    def stop(*_):
        raise TimeoutError(f"not done after {limit} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)


def step_rows(model, name: str, path: str, shape: tuple[int, int], measure) -> list[dict]:
    """One row, or none if it fails. `measure()` gives ms per step."""
    batch, context = shape
    ms = attempt(f"{path}, {name}, {batch} x {context}", measure)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    if ms is None:
        return []
    return [{"model": name, "batch": batch, "context": context, "path": path, "ms/step": ms,
             "tokens/s": 1e3 * batch / ms, "% of floor": 100 * floor_ms(model, batch, context) / ms}]  # fmt: skip


def sampler_rows(ours: Sampler, name: str, shapes: list[tuple[int, int]], steps: int) -> list[dict]:
    rows, fewer = [], max(STEPS, steps // 8)
    for shape in shapes:
        rows += step_rows(ours.model, name, "sampler", shape, partial(sampler_step, ours, *shape, steps, True))
        rows += step_rows(ours.model, name, "sampler, eager", shape, partial(sampler_step, ours, *shape, fewer, False))
    return rows


def generate_rows(model, name: str, shape: tuple[int, int], steps: int) -> list[dict]:
    model.set_attn_implementation("sdpa")
    dynamic = partial(generate_step, model, *shape, steps)
    static = partial(dynamic, cache_implementation="static")
    rows = step_rows(model, name, "generate", shape, dynamic)
    return rows + step_rows(model, name, "generate, static cache", shape, static)


def generate_batch_rows(model, name: str, shape: tuple[int, int], steps: int) -> list[dict]:
    model.set_attn_implementation("sdpa")
    return step_rows(model, name, "generate_batch", shape, partial(generate_batch_step, model, *shape, steps))


def kernel_rows(ours: Sampler, name: str, batch: int) -> list[dict]:
    """Kernels that a decode step launches, by the profiler; a graph launches all of its own at once."""
    prompts, few = random_prompts(ours.model, batch, 64), STEPS
    ours.slots = batch

    def sample(steps: int) -> None:
        ours.generate(prompts, [(0, i) for i in range(batch)], 1, 1 + steps, 1.0)

    def peer(steps: int) -> None:
        stamped_generate(ours.model, torch.tensor(prompts, device=DEVICE), 1 + steps)

    def count(run) -> float:
        run(few)
        return (count_kernels(lambda: run(2 * few)) - count_kernels(lambda: run(few))) / few

    ours.model.set_attn_implementation("sdpa")
    counts = {"sampler": count(sample), "generate": count(peer)}
    return [{"model": name, "path": path, "kernels/step": kernels} for path, kernels in counts.items()]


def count_kernels(run) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds(run)
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)


# ---------------------------------------------------------------------------------------------------------------------
# Ragged rollouts; sampler against trainer


def rollout_rows(model, name: str, prompts: int, group: int, limit: int, mean: int, all_slots: list[int]) -> list[dict]:
    V, rng, rows = model.config.vocab_size, random.Random(0), []
    ours = Sampler(model, list(range(V // mean)), dtype=model.dtype)
    ragged = [[rng.randrange(V) for _ in range(rng.randint(100, 200))] for _ in range(prompts)]
    keys = [(0, i) for i in range(prompts)]
    ours.generate(ragged[:2], keys[:2], group, 16, 1.0)  # compiles kernels
    for slots in all_slots:
        ours.slots = slots
        start = time.perf_counter()
        groups = ours.generate(ragged, keys, group, limit, 1.0)
        took = time.perf_counter() - start  # the completions are on the host
        lengths = [len(c.ids) for g in groups for c in g]
        rows.append({"model": name, "rollouts": len(lengths), "slots": slots, "longest": max(lengths),
                     "mean length": sum(lengths) / len(lengths), "seconds": took,
                     "tokens/s": sum(lengths) / took})  # fmt: skip
    return rows


@torch.no_grad()
def gap_rows(model, name: str, prompts: int, tokens: int) -> list[dict]:
    """Leaves the model in fp32, as the trainer has it: the same numbers as the sampler's, which are bf16."""
    model.model.norm.weight.mul_(4)
    ours = Sampler(model, [model.config.vocab_size], dtype=torch.bfloat16)
    encoded = random_prompts(model, prompts, 100)
    completions = [g[0] for g in ours.generate(encoded, [(0, i) for i in range(prompts)], 1, tokens, 1.0)]
    rows = [(p, c.ids) for p, c in zip(encoded, completions, strict=True)]
    model.float()
    parts = [response_scores(model, rows[b.start : b.stop], 1.0, torch.bfloat16) for b in micro_batches(rows, 16384)]
    trainer, entropy = (torch.cat(part).double().cpu() for part in zip(*parts, strict=True))
    gap = (trainer - torch.tensor([logp for c in completions for logp in c.logps]).double()).abs()
    quantiles = {f"p{q}": gap.quantile(q / 100).item() for q in (50, 90, 99)}
    return [{"model": name, "tokens compared": len(gap), "mean entropy": entropy.mean().item(),
             "mean gap": gap.mean().item(), **quantiles, "max gap": gap.max().item()}]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


def report(rows: list[dict] | None, out) -> None:
    if rows:
        print()
        write(rows, list(rows[0]), out)


def never_stopping(name: str) -> Sampler:
    model = build(name, torch.bfloat16, DEVICE)
    return Sampler(model, [model.config.vocab_size], dtype=torch.bfloat16)


def real_sizes(out, names, shapes, peer_shape: tuple[int, int], steps: int, limit: int) -> None:
    """Decode steps of all models, the rest of the first; each part builds its own, so that none holds memory longer."""
    ceilings()  # while the memory is free
    for name in names:
        report(sampler_rows(never_stopping(name), name, shapes, steps), out)
    name = names[0]
    report(generate_rows(build(name, torch.bfloat16, DEVICE), name, peer_shape, steps // 4), out)
    report(rollout_rows(build(name, torch.bfloat16, DEVICE), name, 64, 5, limit, 300, [320, 128]), out)
    report(gap_rows(build(name, torch.bfloat16, DEVICE), name, 32, 2 * steps), out)
    report(attempt("kernels", lambda: kernel_rows(never_stopping(name), name, peer_shape[0])), out)
    report(generate_batch_rows(build(name, torch.bfloat16, DEVICE), name, peer_shape, steps // 4), out)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    for may_end in (False, True):
        report(built_in(args.quick, may_end), args.out)
    if DEVICE.type == "cuda":
        if args.quick:
            real_sizes(args.out, ["tiny"], [(16, 64)], (16, 64), steps=16, limit=64)
        else:
            real_sizes(args.out, ["Qwen2.5-3B", "Qwen3-8B"], SHAPES, (256, 1024), steps=128, limit=1024)


if __name__ == "__main__":
    main()
