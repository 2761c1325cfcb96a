"""From logits to tokens: the sampling kernel beside other ways.

    python bench/sampling.py [--quick] [--out FILE.jsonl]

GB/s counts the logits once, 4 bytes each; "% of copy" is that over the rate of a large copy. "p-value" is of a χ² test
of 20,000 draws from 50 logits, 0 if any lies outside the nucleus: near 0 means the wrong distribution. All return the
tokens' log-probs in the whole distribution, too; "logp error" is the largest against fp64, in nats.
"""

import math
from functools import partial

import torch
from measure import DEVICE, arguments, attempt, ceilings, interleaved, write
from transformers import TopPLogitsWarper

import sampler

COLUMNS = ["impl", "n", "V", "top_p", "logits", "ms", "GB/s", "% of copy", "logp error", "p-value"]


def ours(logits, u, top_p):
    return sampler.choose(logits, u, 1.0, top_p)


def twin(logits, u, top_p):
    return sampler.choose_torch(logits, u, 1.0, top_p)


def nucleus(logits, top_p):
    """p, and p within the nucleus, by sorting; multinomial and the race do not ask for a sum of 1."""
    p = logits.softmax(-1)
    return p, p if top_p == 1 else p.masked_fill(TopPLogitsWarper(top_p)(None, logits) == float("-inf"), 0.0)


def sort_and_draw(logits, u, top_p):
    p, pool = nucleus(logits, top_p)
    token = pool.multinomial(1)
    return token[:, 0], p.gather(-1, token).log()[:, 0]


def race(logits, u, top_p):
    """The first of n exponential clocks to ring, at rates p (nano-vllm, vLLM)."""
    p, pool = nucleus(logits, top_p)
    token = (pool / torch.empty_like(p).exponential_(1)).argmax(-1, keepdim=True)
    return token[:, 0], p.gather(-1, token).log()[:, 0]


def p_value(draw, top_p: float) -> float:
    """Of a χ² test, by the Wilson–Hilferty approximation."""
    g = torch.Generator(DEVICE).manual_seed(1)
    logits = torch.randn(50, generator=g, device=DEVICE) * 1.5
    n = 20_000
    u = torch.rand(n, generator=g, device=DEVICE, dtype=torch.float64)
    tokens, _ = draw(logits.expand(n, -1).contiguous(), u, top_p)
    p, order = logits.double().softmax(-1).sort(descending=True)
    inside = p.cumsum(-1) - p < top_p
    expected = n * p * inside / (p * inside).sum()
    observed = tokens.bincount(minlength=50)[order]
    if observed[~inside].sum():
        return 0.0
    chi2, freedom = ((observed - expected)[inside] ** 2 / expected[inside]).sum().item(), int(inside.sum()) - 1
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def bench(n: int, V: int, top_p: float, peaked: bool, seconds: float) -> list[dict]:
    g = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(n, V, generator=g, device=DEVICE) * (2.0 if peaked else 0.1)
    if peaked:  # a few candidates hold most of the mass, as in a trained model
        logits[:, :: V // 20] += math.log(V) + 4
    u = torch.rand(n, generator=g, device=DEVICE, dtype=torch.float64)
    peers = {"ours": ours, "twin": twin, "multinomial": sort_and_draw, "race": race}
    if DEVICE.type == "cuda":
        peers |= {f"{name}, compiled": torch.compile(peers[name]) for name in ("multinomial", "race")}
    runs, tested = {}, {}
    for name, function in peers.items():
        run = partial(function, logits, u, top_p)
        if (drawn := attempt(name, run)) is not None:
            tokens, logp = drawn
            exact = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            error = (logp.double() - exact).abs().max().item()
            runs[name], tested[name] = run, {"logp error": error, "p-value": p_value(function, top_p)}
    rows = []
    for name, (low, ms, high) in interleaved(runs, seconds).items():
        rate = 4 * n * V / ms / 1e6
        rows.append({"impl": name, "n": n, "V": V, "top_p": top_p, "logits": "peaked" if peaked else "flat", "ms": ms,
                     "ms p20": low, "ms p80": high, "GB/s": rate, "% of copy": 100 * rate / ceilings()["copy_gbps"],
                     **tested[name]})  # fmt: skip
    return rows


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    ceilings()
    small = args.quick or DEVICE.type == "cpu"
    sizes = [(16, 1003)] if small else [(n, V) for V in (151936, 128256) for n in (64, 256, 1024)]
    for n, V in sizes:
        for top_p in (1.0, 0.95):
            for peaked in (True, False):
                write(bench(n, V, top_p, peaked, 0.05), COLUMNS, args.out)


if __name__ == "__main__":
    main()
