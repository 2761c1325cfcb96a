"""Decode attention: one new token per sequence over its cached keys and values.

    python bench/attention.py [--quick] [--out FILE.jsonl]

GB/s counts the keys and values that are needed, each once; "% of copy" is that over the rate of a large copy. Lengths
are all `context` (uniform) or lognormal about half of it, cut at it (ragged). The error is the largest against fp64 on
the first four sequences.
"""

from functools import partial

import torch
import torch.nn.functional as F
from measure import DEVICE, arguments, attempt, ceilings, interleaved, write

from ops import decoder

MODELS = {"Qwen2.5-3B": (16, 2, 128), "Llama-3.2-3B": (24, 8, 128), "Qwen3-8B": (32, 8, 128)}  # h, h_kv, d
COLUMNS = ["impl", "model", "n", "context", "lengths", "ms", "GB/s", "% of copy", "error"]


def sdpa(q, keys, values, length, scale):
    """torch's, with a mask: it reads whole slots."""
    seen = torch.arange(keys.shape[1], device=q.device) < length[:, None]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    options = dict(attn_mask=seen[:, None, None], scale=scale, enable_gqa=True)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, **options)[:, :, 0]


def flash(q, keys, values, length, scale):
    """The flash attention inside torch, over slots as packed sequences of which the first length[i] tokens are used."""
    n, L = keys.shape[:2]
    q_ends = torch.arange(n + 1, dtype=torch.int32, device=q.device)
    k, v = keys.flatten(0, 1), values.flatten(0, 1)
    options = dict(scale=scale, seqused_k=length.int())
    arguments = (q, k, v, q_ends, q_ends * L, 1, L, 0.0, False, False)
    return torch.ops.aten._flash_attention_forward(*arguments, **options)[0]


def flex(length, L: int):
    """With its block mask made beforehand: it is that of all layers of a decode step."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # past its limit of 8 shapes per function it would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, i, j: j < length[b], len(length), None, 1, L, device=length.device)

    def run(q, keys, values, length, scale):
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        return compiled(q[:, :, None], k, v, block_mask=mask, scale=scale, enable_gqa=True)[:, :, 0]

    return run


def exact(q, keys, values, length, scale):
    out = []
    for i in range(min(4, len(q))):
        k, v = (x[i, : length[i]].double().transpose(0, 1) for x in (keys, values))  # [h_kv, length, d]
        k, v = (x.repeat_interleave(q.shape[1] // len(k), 0) for x in (k, v))
        out.append(((q[i, :, None].double() @ k.transpose(1, 2) * scale).softmax(-1) @ v)[:, 0])
    return torch.stack(out)


def bench(model: str, shape: tuple, n: int, context: int, ragged: bool, dtype: torch.dtype, seconds: float) -> list:
    h, kv_heads, d = shape
    g = torch.Generator(DEVICE).manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=g, device=DEVICE).to(dtype)

    q, keys, values = random(n, h, d), random(n, context, kv_heads, d), random(n, context, kv_heads, d)
    spread = torch.randn(n, generator=g, device=DEVICE).mul(0.5 * ragged).exp()
    length = (spread * (context // 2 if ragged else context)).long().clamp(1, context)
    scale, runs, found = d**-0.5, {}, {}
    peers = {"ours": decoder.attend, "twin": decoder.attend_torch, "sdpa": sdpa, "flash": flash}
    if DEVICE.type == "cuda":
        del peers["twin"]  # its matmul is for a CPU
        if model == "Qwen2.5-3B" and n == 256 and (compiled := attempt("flex", partial(flex, length, context))):
            peers["flex, compiled"] = compiled  # each shape takes seconds to compile
    for name, function in peers.items():
        run = partial(function, q, keys, values, length, scale)
        if (out := attempt(name, run)) is not None:
            error = (out[:4].double() - exact(q, keys, values, length, scale)).abs().max().item()
            runs[name], found[name] = run, error
    needed = 2 * int(length.sum()) * kv_heads * d * keys.element_size()
    case = {"model": model, "n": n, "context": context, "lengths": "ragged" if ragged else "uniform"}
    rows = []
    for name, (low, ms, high) in interleaved(runs, seconds).items():
        rate = needed / ms / 1e6
        rows.append({"impl": name, **case, "ms": ms, "ms p20": low, "ms p80": high, "GB/s": rate,
                     "% of copy": 100 * rate / ceilings()["copy_gbps"], "error": found[name]})  # fmt: skip
    return rows


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    ceilings()
    if args.quick or DEVICE.type == "cpu":
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
        write(bench("small", (4, 2, 32), 32, 100, True, dtype, 0.1), COLUMNS, args.out)
        return
    for model, shape in MODELS.items():
        for n, context in ((64, 1024), (256, 1024), (1024, 1024), (64, 4096), (256, 4096)):
            if 4 * n * context * shape[1] * shape[2] > 0.6 * torch.cuda.mem_get_info()[0]:  # bytes of bf16 K and V
                continue
            for ragged in (False, True):
                write(bench(model, shape, n, context, ragged, torch.bfloat16, 0.1), COLUMNS, args.out)


if __name__ == "__main__":
    main()
