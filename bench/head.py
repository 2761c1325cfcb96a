"""The vocabulary head: log-probs and entropies of N tokens, and gradients, from hidden states and the head's weight.

    python bench/head.py [--quick] [--out FILE.jsonl]

    score     without gradients: 2NHV FLOPs are needed
    frozen    gradient of the hidden states only, as under LoRA alone: 4NHV
    trained   gradient of the head's weight, too: 6NHV (whoever computes logits twice does 8NHV, and is not excused)

"% of floor" is the FLOPs needed over what was spent at the measured matmul rate. Errors are against fp64 on 256 tokens
from the same inputs: of log-probs the largest in nats, of gradients ‖ours − exact‖ / ‖exact‖. Inputs are peaked, with
p(target) about a half and an entropy of one or two nats, as trained models are.
"""

import contextlib
import importlib.util
import math
import sys
import types
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import DEVICE, arguments, attempt, ceilings, interleaved, peak_mib, write

import logprob

HEADS = {"Qwen2.5-3B": (2048, 151936), "Llama-3.2-3B": (3072, 128256), "Qwen3-8B": (4096, 151936)}  # H, V
NEEDED = {"score": 2, "frozen": 4, "trained": 6}  # times NHV
COLUMNS = ["impl", "mode", "model", "N", "ms", "TFLOP/s", "% of floor", "peak MiB", "logp error", "logp > 0",
           "dH error", "dW error"]  # fmt: skip


def inputs(N: int, H: int, V: int, dtype: torch.dtype):
    g = torch.Generator(DEVICE).manual_seed(N)
    weight = torch.randn(V, H, generator=g, device=DEVICE).to(dtype)
    targets = torch.randint(0, V, (N,), generator=g, device=DEVICE)
    noise = torch.randn(N, H, generator=g, device=DEVICE)
    spread = 5.5  # the logits of other words are about N(0, spread²), so that few of them hold what the target leaves
    largest = spread * math.sqrt(2 * math.log(V))  # of V such logits, about; the target's logit, too
    hidden = spread * noise / H**0.5 + largest * weight[targets].float() / H
    return hidden.to(dtype), weight, targets


def nll(logp, entropy, tokens) -> torch.Tensor:  # a sum over tokens, as every peer can give it
    return -logp.sum()


# ---- implementations: (hidden, weight, targets) -> (sum of −logp, logp [N] or None)


def fused(h, w, y, chunk=logprob.CHUNK):
    kept = []
    loss = logprob.head_loss(h, w, y, lambda logp, *rest: kept.append(logp.detach()) or nll(logp, *rest), chunk=chunk)
    return loss, torch.cat(kept)


def definition(h, w, y):
    logp, entropy = logprob.token_logprobs(h, w, y)
    return nll(logp, entropy, None), logp


def scored(h, w, y):
    return None, logprob.score(h, w, y)[0]


def naive(h, w, y):
    loss = F.cross_entropy((h @ w.T).float(), y, reduction="none")
    return loss.sum(), -loss


def liger(h, w, y, chunk_mem_const=None):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    extra = {} if chunk_mem_const is None else {"chunk_mem_const": chunk_mem_const}
    loss = liger_fused_linear_cross_entropy(h, w, y, reduction="sum", accum_dtype=torch.float32, **extra)
    return (loss[0] if isinstance(loss, tuple) else loss), None


def cut_cross_entropy(h, w, y, **options):
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(h, w, y, reduction="none", **options)
    return loss.sum(), -loss


def bare(*packages: str) -> None:
    """Registers installed packages without running their __init__, which wants much more than the kernels do."""
    for name in packages:
        top, *rest = name.split(".")
        if name in sys.modules:
            continue
        if not rest and importlib.util.find_spec(top) is None:
            raise ImportError(f"{top} is not installed")
        module = types.ModuleType(name)
        where = sys.modules[top].__path__ if rest else importlib.util.find_spec(top).submodule_search_locations
        module.__path__ = [str(Path(folder, *rest)) for folder in where]
        sys.modules[name] = module


def trl(h, w, y):
    bare("trl", "trl.trainer")
    utils = sys.modules.setdefault("trl.trainer.utils", types.ModuleType("trl.trainer.utils"))
    utils.maybe_gather_lm_head_ctx = lambda *a: contextlib.nullcontext()  # all that the kernel asks of the trainer
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    out = ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ("entropy",))
    logp = out[0] if isinstance(out, tuple) else out
    return -logp.sum(), logp


def verl(h, w, y):
    bare("verl", "verl.utils", "verl.plugin")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logp, _ = linear_cross_entropy(h, w, y, 1.0, "none")
    return -logp.sum(), logp


def quack(h, w, y):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(h, w, y, reduction="sum"), None


def torch_linear_cross_entropy(h, w, y):
    return F.linear_cross_entropy(h, w, y, reduction="sum"), None  # torch ≥ 2.13


def implementations(mode: str, chunks: list[int], compiled: bool) -> dict:
    ours = {"ours, score": scored} if mode == "score" else {f"ours, C={c}": partial(fused, chunk=c) for c in chunks}
    peers = {
        "naive": naive,
        "liger": liger,
        "liger, chunk_mem_const=8": partial(liger, chunk_mem_const=8),
        "liger, chunk_mem_const=16": partial(liger, chunk_mem_const=16),
        "cut-cross-entropy": cut_cross_entropy,
        "cut-cross-entropy, no filter": partial(cut_cross_entropy, filter_eps=None),
        "trl": trl,
        "verl": verl,
        "quack": quack,
        "torch linear_cross_entropy": torch_linear_cross_entropy,
    }
    if compiled:
        peers["naive, compiled"] = torch.compile(naive)
    return ours | {"definition": definition} | peers


def call(function, mode: str, hidden, weight, targets) -> tuple:
    """(hidden, weight, logp), with the gradients that the mode asks for in .grad."""
    if mode == "score":
        with torch.no_grad():
            return hidden, weight, function(hidden, weight, targets)[1]
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(mode == "trained")
    loss, logp = function(h, w, targets)
    loss.backward()
    return h, w, logp


def runner(function, sets: list, mode: str):
    """A call that goes on to the next set of inputs each time; gradients are thrown away."""
    turn = iter(range(10**9))

    def run():
        call(function, mode, *sets[next(turn) % len(sets)])

    return run


def errors(function, mode: str, hidden, weight, targets) -> dict:
    """Against fp64 on 256 tokens. Raises what the implementation raises."""
    h, y = hidden[:256], targets[:256]
    h64, w64 = h.double().requires_grad_(), weight.double().requires_grad_(mode == "trained")
    exact = (h64 @ w64.T).log_softmax(-1).gather(-1, y[:, None])[:, 0]
    out: dict = {}
    h, w, logp = call(function, mode, h, weight, y)
    if mode != "score":
        (-exact.sum()).backward()
        out["dH error"] = ((h.grad.double() - h64.grad).norm() / h64.grad.norm()).item()
        if mode == "trained":
            out["dW error"] = ((w.grad.double() - w64.grad).norm() / w64.grad.norm()).item()
    if logp is not None:
        out |= {"logp error": (logp.double() - exact).abs().max().item(), "logp > 0": int((logp > 0).sum())}
    return out


def bench(model: str, N: int, mode: str, chunks: list[int], dtype: torch.dtype, seconds: float, size=None) -> list:
    """Rows of all implementations, but of few tokens for the slow fp32 definition, and of many for ours alone."""
    H, V = size or HEADS[model]
    sets = [inputs(N, H, V, dtype)]
    sets += [(h.flip(0), w, y.flip(0)) for h, w, y in sets] * (DEVICE.type == "cuda")  # another order, the same weight
    right = {}
    functions = implementations(mode, chunks, compiled=DEVICE.type == "cuda")
    for name, function in functions.items():
        if (N > 16384 and not name.startswith("ours")) or (N > 4096 and name == "definition"):
            continue
        if (found := attempt(f"{name}, {mode}", partial(errors, function, mode, *sets[0]))) is not None:
            right[name] = function, found
    runs, peaks = {}, {}
    for name, (function, _) in right.items():
        run = runner(function, sets, mode)
        if attempt(f"{name}, {mode}, N={N}", lambda run=run: (run(), True)):  # warms up; may run out of memory
            runs[name], peaks[name] = run, peak_mib(run)
    rows = []
    for name, (low, ms, high) in interleaved(runs, seconds).items():
        rate = NEEDED[mode] * N * H * V / ms / 1e9
        row = {
            "impl": name,
            "mode": mode,
            "model": model,
            "N": N,
            "ms": ms,
            "ms p20": low,
            "ms p80": high,
            "TFLOP/s": rate,
            "% of floor": 100 * rate / ceilings()["matmul_tflops"],
            "peak MiB": peaks[name],
        }
        rows.append(row | right[name][1])
    return rows


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    ceilings()  # while the memory is free
    if args.quick or DEVICE.type == "cpu":
        for mode in NEEDED:
            write(bench("small", 96, mode, [32, 4096], torch.float32, 0.1, size=(64, 1003)), COLUMNS, args.out)
        return
    others = [("Llama-3.2-3B", 16384), ("Qwen3-8B", 16384), ("Qwen2.5-3B", 4096), ("Qwen2.5-3B", 65536)]
    cases = [("Qwen2.5-3B", 16384, mode, [1024, 2048, 4096, 8192]) for mode in ("trained", "score", "frozen")]
    cases += [(model, N, mode, [2048, 4096]) for mode in ("trained", "score") for model, N in others]
    for model, N, mode, chunks in cases:
        write(bench(model, N, mode, chunks, torch.bfloat16, 0.3), COLUMNS, args.out)


if __name__ == "__main__":
    main()
