"""log π and entropy of every response token: the two numbers that SFT, GRPO and the shadow's loss are made of.

`response_logprobs` is the one way to them. Logits of all tokens would exhaust memory (16k tokens times 152k words in
fp32 take 10 GB), so at most CHUNK rows of logits exist at a time. The forward pass stores three numbers per token; the
backward pass computes each chunk's logits again. FLOPs of the head: 8NHV trained (two matmuls with the head forward and
again backward, two for the gradients), 2NHV without gradients.

Shapes: R response tokens of all rows, H hidden size, V vocabulary size. Log-probs and entropies are in nats.
"""

import torch
from torch import Tensor, nn

from ops import head
from ops.packed import Row, hidden_states, pack, run_forward

IDLE: Row = ([0], [0])  # fed by a rank that has no rows in a pass


def response_logprobs(
    model: nn.Module, rows: list[Row], temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(log π(y_t | x, y_<t), entropy of π(· | x, y_<t)), each [R] fp32, of all response tokens, in row order.

    rows: (prompt ids, response ids) pairs; temperature > 0 divides the logits; dtype: of the forward pass. The results
    are differentiable unless gradients are off. Without rows both are empty and still depend on every parameter, since
    all ranks of a sharded model must run the same passes. Raises ValueError for a temperature ≤ 0.
    """

    def forward(m: nn.Module) -> tuple[Tensor, Tensor]:
        hidden, weight, targets = response_hidden(m, rows or [IDLE], dtype)
        return token_logprobs(hidden, weight, targets, temperature)

    logp, entropy = run_forward(model, forward)
    return (logp, entropy) if rows else (logp[:0], entropy[:0])


def response_hidden(model: nn.Module, rows: list[Row], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states [R, H] that predict a response token, weight of the head [V, H], the response tokens [R]).

    The last response token predicts nothing and is not fed; prompt tokens never reach the head:
        prompt a b, response c d   ->   fed a b c,   hidden(b) predicts c, hidden(c) predicts d
    """
    device = next(model.parameters()).device
    packed = pack([prompt + response[:-1] for prompt, response in rows], device)
    predicts = [i >= len(p) - 1 for p, r in rows for i in range(len(p) + len(r) - 1)]  # [T]
    targets = torch.tensor([token for _, response in rows for token in response], device=device)  # [R]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        hidden = hidden_states(model, packed, dtype)  # [T, H]
    chosen = torch.tensor(predicts).nonzero()[:, 0].to(device)  # [R], found on the host: no wait for the GPU
    return hidden[chosen].to(dtype), model.get_output_embeddings().weight, targets


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy of π = softmax(hidden·weightᵀ / temperature), each [N] fp32.

    hidden [N, H] and weight [V, H] in any float type, targets [N] int64 in [0, V). The weight is rounded to hidden's
    dtype, as in the sampler. Logits are fp32: logits rounded to bf16 move log-probs by up to 0.1 nats, half of a 0.2
    PPO clip. Raises ValueError for a temperature ≤ 0 or unequal N.

    >>> token_logprobs(torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([0]))
    (tensor([-0.6931]), tensor([0.6931]))
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0 for log-probabilities, got {temperature}")
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states but {targets.shape[0]} targets")
    if not torch.is_grad_enabled() and head.can_score(hidden):
        return head.score(hidden.contiguous(), weight.to(hidden.dtype).contiguous(), targets, temperature)
    return _TokenLogprobs.apply(hidden, weight, targets, temperature)


def token_logprobs_naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0):
    """The definition of `token_logprobs`, with all logits in memory at once."""
    log_pi = (hidden @ weight.T / temperature).log_softmax(-1)  # [N, V]
    return log_pi.gather(-1, targets[:, None])[:, 0], -(log_pi.exp() * log_pi).sum(-1)


class _TokenLogprobs(torch.autograd.Function):
    """token_logprobs chunk by chunk; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        W = weight.to(hidden.dtype)
        chunks = zip(hidden.split(head.CHUNK), targets.split(head.CHUNK), strict=True)
        stats = [head.row_stats(head.project(h, W), y, temperature) for h, y in chunks]
        logp, entropy, lse = (torch.cat(parts) for parts in zip(*stats, strict=True))  # [N] each
        ctx.save_for_backward(hidden, weight, targets, entropy, lse)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        W = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        per_token = (hidden, targets, lse, entropy, g_logp, g_entropy, d_hidden)
        for h, y, lse_, entropy_, g_l, g_e, d_h in zip(*(x.split(head.CHUNK) for x in per_token), strict=True):
            logits = head.project(h, W)  # [C, V]
            d_logits = head.row_gradients(logits, y, lse_, entropy_, g_l, g_e, ctx.temperature, h.dtype)  # [C, V]
            d_h.copy_(d_logits @ W)
            if d_weight is not None:
                head.accumulate_weight_gradient(d_weight, d_logits, h)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None
