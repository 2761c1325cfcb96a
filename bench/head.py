"""The vocabulary head, log-probs and entropies of N tokens with their gradients, and attention of decoding.

    python bench/head.py [--quick] [--out FILE.jsonl]

Head, in three modes:
    trained   gradients of hidden states and weight: 6NHV FLOPs are needed (ours needs 8: it computes logits twice)
    frozen    gradient of the hidden states only: 4NHV
    score     no gradients: 2NHV
"% of floor" is the needed FLOPs at the measured matmul rate, over the measured time. Errors are against fp64 on 256
tokens: of log-probs the largest in nats, of gradients ‖ours − exact‖ / ‖exact‖. Inputs are peaked like a trained
model's: p(target) is about a half, the entropy one or two nats.

Attention is that of one new token per sequence over its cached keys and values. GB/s counts the needed keys and values
once; "% of copy" is that rate over a large copy's. Lengths are `context` (uniform), or lognormal about half of it and
cut at it (ragged). The error is the largest against fp64 on four sequences.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from measure import DEVICE, GPU, Table, attempt, ceilings, interleaved, parser

import logprob
from ops import attention, head

HEADS = {"Qwen2.5-3B": (2048, 151936), "Llama-3.2-3B": (3072, 128256), "Qwen3-8B": (4096, 151936)}  # H, V
MODELS = {"Qwen2.5-3B": (16, 2, 128), "Llama-3.2-3B": (24, 8, 128), "Qwen3-8B": (32, 8, 128)}  # h, h_kv, d
NEEDED = {"trained": 6, "frozen": 4, "score": 2}  # times NHV


def head_inputs(N: int, H: int, V: int, dtype: torch.dtype):
    """(hidden [N, H], weight [V, H], targets [N])"""
    g = torch.Generator(DEVICE).manual_seed(N)
    weight = torch.randn(V, H, generator=g, device=DEVICE).to(dtype)
    targets = torch.randint(0, V, (N,), generator=g, device=DEVICE)
    noise = torch.randn(N, H, generator=g, device=DEVICE)
    spread = 5.5  # logits of other words are about N(0, spread²): a few of them share the rest of the probability
    largest = spread * math.sqrt(2 * math.log(V))  # about the largest of V such logits, and the target's logit
    hidden = spread * noise / H**0.5 + largest * weight[targets].float() / H
    return hidden.to(dtype), weight, targets


# ---------------------------------------------------------------------------------------------------------------------
# Implementations of the head: (hidden, weight, targets) -> (sum of −logp, logp [N] or None)


def ours(h, w, y, chunk=head.CHUNK):
    head.CHUNK = chunk  # read at every call
    logp, _ = logprob.token_logprobs(h, w, y)
    return -logp.sum(), logp.detach()


def definition(h, w, y, dtype=torch.float32):
    logp, _ = logprob.token_logprobs_naive(h.to(dtype), w.to(dtype), y)
    return -logp.sum(), logp.detach()


def cross_entropy(h, w, y):
    loss = F.cross_entropy((h @ w.T).float(), y, reduction="none")
    return loss.sum(), -loss.detach()


def liger(h, w, y):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss = liger_fused_linear_cross_entropy(h, w, y, reduction="sum", accum_dtype=torch.float32)
    return (loss[0] if isinstance(loss, tuple) else loss), None


def cut_cross_entropy(h, w, y):
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(h, w, y, reduction="none")
    return loss.sum(), -loss.detach()


def torch_linear_cross_entropy(h, w, y):
    return F.linear_cross_entropy(h, w, y, reduction="sum"), None  # torch ≥ 2.13


def implementations(mode: str, N: int, chunks: list[int], compiled: bool) -> dict:
    """By name: ours for any N, peers up to 16k tokens, the definition in fp32 up to 4k."""
    functions = {"ours": ours} if mode == "score" else {f"ours, C={c}": partial(ours, chunk=c) for c in chunks}
    if N <= 4096:
        functions["definition"] = definition
    if N <= 16384:
        functions |= {
            "cross_entropy": cross_entropy,
            "liger": liger,
            "cut-cross-entropy": cut_cross_entropy,
            "torch linear_cross_entropy": torch_linear_cross_entropy,
        }
    if compiled:
        functions["cross_entropy, compiled"] = torch.compile(cross_entropy)
    return functions


def call(function, mode: str, hidden, weight, targets) -> tuple:
    """(hidden, weight, logp), with the mode's gradients in .grad."""
    if mode == "score":
        with torch.no_grad():
            return hidden, weight, function(hidden, weight, targets)[1]
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(mode == "trained")
    loss, logp = function(h, w, targets)
    loss.backward()
    return h, w, logp


def head_errors(function, mode: str, hidden, weight, targets) -> dict:
    """Errors against fp64 on 256 tokens; None without a number. Raises the implementation's exceptions."""
    h, w, logp = call(function, mode, hidden[:256], weight, targets[:256])
    fp64 = partial(definition, dtype=torch.float64)
    h64, w64, exact = call(fp64, mode, hidden[:256].double(), weight.double(), targets[:256])
    out = dict.fromkeys(("logp error", "logp > 0", "dH error", "dW error"))
    if logp is not None:
        out |= {"logp error": (logp.double() - exact).abs().max().item(), "logp > 0": int((logp > 0).sum())}
    for name, x, x64 in (("dH error", h, h64), ("dW error", w, w64)):
        if x64.grad is not None:
            out[name] = ((x.grad.double() - x64.grad).norm() / x64.grad.norm()).item()
    return out


def peak_mib(function) -> float | None:
    """Memory that a call adds to what is allocated before it; None on a CPU."""
    if not GPU:
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def head_rows(
    table: Table, model: str, size: tuple[int, int], N: int, mode: str, chunks: list[int], dtype: torch.dtype,
    seconds: float, compiled: bool,
) -> None:  # fmt: skip
    (H, V), functions, facts, inputs = size, {}, {}, head_inputs(N, *size, dtype)
    for name, function in implementations(mode, N, chunks, compiled).items():
        run = partial(call, function, mode, *inputs)
        errors = attempt(f"{name}, {mode}", partial(head_errors, function, mode, *inputs))
        if errors and attempt(f"{name}, {mode}, N={N}", run):  # warms up; may run out of memory
            functions[name], facts[name] = run, {"peak MiB": peak_mib(run)} | errors
    for name, times in interleaved(functions, seconds).items():
        rate = NEEDED[mode] * N * H * V / times["ms"] / 1e9
        speed = {"TFLOP/s": rate, "% of floor": 100 * rate / ceilings()["matmul_tflops"]}
        table.add({"impl": name, "mode": mode, "model": model, "N": N} | times | speed | facts[name])


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def sdpa(q, keys, values, length, scale):
    """torch's attention with a mask, which reads every position of the cache."""
    visible = torch.arange(keys.shape[1], device=q.device) < length[:, None]
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    options = dict(attn_mask=visible[:, None, None], scale=scale, enable_gqa=True)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, **options)[:, :, 0]


def flash(q, keys, values, length, scale):
    """torch's flash attention: slots are packed sequences of which it uses the first length[i] tokens."""
    n, L = keys.shape[:2]
    q_ends = torch.arange(n + 1, dtype=torch.int32, device=q.device)
    k, v = keys.flatten(0, 1), values.flatten(0, 1)
    arguments = (q, k, v, q_ends, q_ends * L, 1, L, 0.0, False, False)
    return torch.ops.aten._flash_attention_forward(*arguments, scale=scale, seqused_k=length.int())[0]


def per_head(arranged, q, keys, values, length, scale):
    """One small matmul for each sequence and key-value head, from a cache arranged for it: `arranged` has L last."""
    k, v = arranged  # [n, h_kv, d, L], [n, h_kv, L, d]
    far = (torch.arange(k.shape[3], device=q.device) >= length[:, None])[:, None, None]
    logits = q.view(*k.shape[:2], -1, k.shape[2]) @ k * scale  # [n, h_kv, g, L]
    return (logits.masked_fill(far, -1e30).softmax(-1) @ v).view(q.shape)


def exact_attention(q, keys, values, length, scale):
    out = []
    for i in range(min(4, len(q))):
        k, v = (x[i, : length[i]].double().transpose(0, 1) for x in (keys, values))  # [h_kv, length, d]
        k, v = (x.repeat_interleave(q.shape[1] // len(k), 0) for x in (k, v))
        out.append(((q[i, :, None].double() @ k.transpose(1, 2) * scale).softmax(-1) @ v)[:, 0])
    return torch.stack(out)


def attention_rows(
    table: Table, model: str, shape: tuple, n: int, context: int, ragged: bool, dtype: torch.dtype
) -> None:
    h, kv_heads, d = shape
    g = torch.Generator(DEVICE).manual_seed(0)
    sizes = (n, h, d), (n, context, kv_heads, d), (n, context, kv_heads, d)
    q, keys, values = (torch.randn(size, generator=g, device=DEVICE).to(dtype) for size in sizes)
    length = torch.full((n,), context, device=DEVICE)
    if ragged:
        spread = torch.randn(n, generator=g, device=DEVICE).mul(0.5).exp()
        length = (spread * (context // 2)).long().clamp(1, context)
    exact, functions, errors = exact_attention(q, keys, values, length, d**-0.5), {}, {}
    peers = {"ours": attention.attend, "sdpa": sdpa}
    if GPU:
        peers["flash"] = flash
    else:
        arranged = keys.permute(0, 2, 3, 1).contiguous(), values.transpose(1, 2).contiguous()
        peers["per head"] = partial(per_head, arranged)
    for name, function in peers.items():
        run = partial(function, q, keys, values, length, d**-0.5)
        if (out := attempt(f"{name}, attention", run)) is not None:
            functions[name], errors[name] = run, (out[:4].double() - exact).abs().max().item()
    needed = 2 * int(length.sum()) * kv_heads * d * keys.element_size()
    case = {"model": model, "n": n, "context": context, "lengths": "ragged" if ragged else "uniform"}
    for name, times in interleaved(functions, 0.1).items():
        rate = needed / times["ms"] / 1e6
        speed = {"GB/s": rate, "% of copy": 100 * rate / ceilings()["copy_gbps"], "error": errors[name]}
        table.add({"impl": name} | case | times | speed)


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    ceilings()
    table, attention = Table("head", args.out), Table("attention", args.out)
    if args.quick or not GPU:
        dtype = torch.bfloat16 if GPU else torch.float32  # on a GPU the kernels' bf16 paths
        for mode in NEEDED:
            head_rows(table, "small", (64, 1003), 96, mode, [32, 4096], dtype, 0.05, compiled=False)
        attention_rows(attention, "small", (4, 2, 32), 32, 100, True, dtype)
        for n in () if args.quick else (32, 128, 512):
            attention_rows(attention, "arithmetic-laptop", (4, 2, 24), n, 48, True, dtype)
        return
    cases = [("Qwen2.5-3B", 16384, mode, [1024, 2048, 4096, 8192]) for mode in NEEDED]
    others = [("Llama-3.2-3B", 16384), ("Qwen3-8B", 16384), ("Qwen2.5-3B", 4096), ("Qwen2.5-3B", 65536)]
    cases += [(model, N, mode, [2048, 4096]) for mode in ("trained", "score") for model, N in others]
    for i, (model, N, mode, chunks) in enumerate(cases):
        head_rows(table, model, HEADS[model], N, mode, chunks, torch.bfloat16, 0.3, compiled=i == 0)
    for model, shape in MODELS.items():
        for n, context in ((64, 1024), (256, 1024), (1024, 1024), (64, 4096), (256, 4096)):
            if 4 * n * context * shape[1] * shape[2] < 0.6 * torch.cuda.mem_get_info()[0]:  # bytes of bf16 K and V
                for ragged in (False, True):
                    attention_rows(attention, model, shape, n, context, ragged, torch.bfloat16)


if __name__ == "__main__":
    main()
