"""The training step: forward and backward through packed tokens, and apart from them the optimizer.

    python bench/train.py [--quick] [--out FILE.jsonl]

With a GPU: Qwen2.5-3B with random weights, fp32 master weights and bf16 compute, 16k packed tokens. Without one: the
built-in model in fp32, 256 sequences of some 60 tokens. The loss is weighted log-probs, as in RL and SFT; only
response tokens reach the vocabulary head. Gradients are added to those that are there, as with several micro-batches.

    head        fused: model.response_loss, whose gradient is taken in the forward pass. definition: plain autograd over
                model.response_logprobs, which computes the logits twice.
    recomputed  layers that keep only their input, and run again in the backward pass (model.checkpoint_layers)
    compiled    torch.compile of every layer, for shapes that change, as micro-batches do
    MFU         model FLOPs over the matmul rate measured in this process: 6 per weight and token (of the head: per
                response token), and attention's 12·layers·width·length/2 per token
    HFU         the same with what is computed twice: 8 per weight and token where layers are recomputed
    head ms     forward and backward of the head alone, included in ms
"""

import random
from functools import partial

import torch
from measure import DEVICE, arguments, attempt, ceilings, time_ms, write
from random_models import build, head_size, matmul_parameters
from torch import nn

from infra.model import Row, checkpoint_layers, load, response_logprobs, response_loss
from logprob import head_loss, token_logprobs
from tasks import arithmetic as toy


def milliseconds(run) -> float:
    """Median of a few calls, which are long."""
    return time_ms(run, seconds=0, least=5)[1]


def random_rows(vocabulary: int, tokens: int, prompt: int, response: int, spread: float) -> list[Row]:
    """Sequences of `tokens` fed tokens in all, their responses lognormal about `response`, as rollouts are."""
    rng, rows = random.Random(0), []
    while tokens > prompt:
        length = min(tokens - prompt + 1, max(2, round(response * rng.lognormvariate(0, spread))))
        ids = [rng.randrange(vocabulary) for _ in range(prompt + length)]
        rows.append((ids[:prompt], ids[prompt:]))
        tokens -= prompt + length - 1  # the last token is never fed
    return rows


def flops(model: nn.Module, rows: list[Row], recomputed: int, definition: bool) -> tuple[float, float]:
    """(of the model, of what is computed) for one forward and backward; see the docstring above."""
    c, layers = model.config, model.config.num_hidden_layers
    lengths = [len(p) + len(r) - 1 for p, r in rows]
    head = c.vocab_size * c.hidden_size  # weights
    attention = layers * 4 * c.num_attention_heads * head_size(model) * sum(n * n / 2 for n in lengths)
    body = 2 * (matmul_parameters(model) - head) * sum(lengths) + attention  # forward
    top = 2 * head * sum(len(r) for _, r in rows)
    return 3 * (body + top), 3 * (body + top) + body * recomputed / layers + top * definition


def compile_layers(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.compile(dynamic=True)


def head_milliseconds(model: nn.Module, count: int, dtype: torch.dtype, loss_fn, definition: bool) -> float:
    """Of the head alone, on `count` random hidden states."""
    weight, generator = model.get_output_embeddings().weight, torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(count, weight.shape[1], generator=generator, device=DEVICE).to(dtype).requires_grad_()
    targets = torch.randint(weight.shape[0], (count,), generator=generator, device=DEVICE)

    def run() -> None:
        if definition:
            loss_fn(*token_logprobs(hidden, weight, targets), slice(0, count)).backward()
        else:
            head_loss(hidden, weight, targets, loss_fn).backward()

    return milliseconds(run)


def measure(
    model: nn.Module, name: str, rows: list[Row], dtype: torch.dtype, definition: bool, recomputed: int, compiled: bool
) -> dict:
    checkpoint_layers(model, recomputed)
    tokens, responses = sum(len(p) + len(r) - 1 for p, r in rows), sum(len(r) for _, r in rows)
    weights = torch.randn(responses, generator=torch.Generator().manual_seed(0)).to(DEVICE) / responses

    def loss_fn(logp, entropy, tokens: slice):
        return -(weights[tokens] * logp).sum()

    def run() -> None:
        if definition:
            loss_fn(*response_logprobs(model, rows, 1.0, dtype), slice(0, responses)).backward()
        else:
            response_loss(model, rows, loss_fn, 1.0, dtype).backward()

    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(run)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
    useful, done = flops(model, rows, recomputed, definition)
    per_ms = ceilings()["matmul_tflops"] * 1e9  # FLOPs in a millisecond at best
    return {
        "model": name, "head": "definition" if definition else "fused",
        "recomputed": f"{recomputed}/{model.config.num_hidden_layers}", "compiled": compiled, "tokens": tokens,
        "responses": responses, "ms": ms, "head ms": head_milliseconds(model, responses, dtype, loss_fn, definition),
        "tokens/s": 1e3 * tokens / ms, "MFU %": 100 * useful / ms / per_ms, "HFU %": 100 * done / ms / per_ms,
        "peak GiB": peak,
    }  # fmt: skip


def try_all(model: nn.Module, name: str, rows: list[Row], dtype: torch.dtype, variants: list[dict], out) -> None:
    """A table of the variants; those that fail are left out."""
    table = []
    for variant in variants:
        title = ", ".join(f"{key} {value}" for key, value in variant.items())
        if row := attempt(title, partial(measure, model, name, rows, dtype, **variant)):
            table.append(row)
    if table:
        print()
        write(table, list(table[0]), out)


def optimizer_row(model: nn.Module, name: str) -> dict:
    """AdamW as bridge.make_policies has it: reads weight, gradient and two moments, writes all but the gradient."""
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(parameters, lr=5e-7, weight_decay=0.0, fused=True)
    ms = milliseconds(optimizer.step)
    count = sum(p.numel() for p in parameters)
    return {"model": name, "optimizer": "AdamW, fused", "parameters": count, "ms": ms, "GB/s": 28 * count / ms / 1e6,
            "copy GB/s": ceilings()["copy_gbps"]}  # fmt: skip


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    if DEVICE.type == "cuda":
        name, dtype = "tiny" if args.quick else "Qwen2.5-3B", torch.bfloat16
        model = build(name, torch.float32, DEVICE)
        rows = random_rows(model.config.vocab_size, *((512, 20, 60, 0.5) if args.quick else (16384, 150, 800, 0.7)))
    else:
        name, dtype = "arithmetic-smoke" if args.quick else "arithmetic-laptop", torch.float32
        model, _ = load(str(toy.build_base(name)))
        rows = random_rows(model.config.vocab_size, 16 * 60 if args.quick else 256 * 60, 12, 46, 0.3)
    ceilings()  # while the memory is free
    layers = model.config.num_hidden_layers
    variants = [dict(definition=False, recomputed=n, compiled=False) for n in (layers, layers // 2, 0)]
    variants += [dict(definition=True, recomputed=layers, compiled=False)]
    try_all(model, name, rows, dtype, variants, args.out)
    if DEVICE.type == "cuda":
        compile_layers(model)
        variants = [dict(definition=False, recomputed=n, compiled=True) for n in (layers, layers // 2, 0)]
        try_all(model, name, rows, dtype, variants, args.out)
    model.zero_grad()
    row = optimizer_row(model, name)
    print()
    write([row], list(row), args.out)


if __name__ == "__main__":
    main()
