"""log π and entropy of every response token: the two numbers that SFT, GRPO and the shadow's loss are made of.

`response_logprobs` is the one way to them. Logits of all tokens would exhaust memory (16k tokens times 152k words in
fp32 take 10 GB), so at most head.CHUNK rows of logits exist at a time. The forward pass stores the hidden states and
three numbers per token; the backward pass computes each chunk's logits again. FLOPs of the head: 8NHV trained (the
logits once forward and once again backward, then two matmuls for the gradients), 2NHV without gradients.

Shapes: F tokens fed, T of them in the tree of ops/packed.py; R response tokens of all rows, N of them different in the
same sense; H hidden size, V vocabulary size. Log-probs and entropies are in nats.
"""

import torch
from torch import Tensor, nn

from ops import head
from ops.packed import Row, hidden_states, pack, run_forward

IDLE: Row = ([0], [0])  # fed by a rank that has no rows in a pass


def response_logprobs(
    model: nn.Module,
    rows: list[Row],  # (prompt ids, response ids)
    temperature: float = 1.0,  # > 0, divides the logits
    dtype: torch.dtype = torch.float32,  # of the forward pass
) -> tuple[Tensor, Tensor]:
    """(log π(y_t | x, y_<t), entropy of π(· | x, y_<t)), each [R] fp32, of all response tokens, in row order.

    The results are differentiable unless gradients are off. Without rows both are empty and still depend on every
    parameter, since all ranks of a sharded model must run the same passes. Raises ValueError for a temperature ≤ 0.
    """

    # One function, so that FSDP gathers the head's weight for the same pass as the layers'.
    def forward(m: nn.Module) -> tuple[Tensor, Tensor]:
        hidden, weight, targets, source = response_hidden(m, rows or [IDLE], dtype)
        logp, entropy = token_logprobs(hidden, weight, targets, temperature)
        return logp[source], entropy[source]

    logp, entropy = run_forward(model, forward)
    if not rows:  # empty, but with the graph of the pass
        return logp[:0], entropy[:0]
    return logp, entropy


def response_hidden(model: nn.Module, rows: list[Row], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden states [N, H] that predict a response token, weight of the head [V, H], these tokens [N], source [R]).

    The last response token predicts nothing and is not fed; prompt tokens never reach the head:
        prompt a b, response c d   ->   fed a b c,   hidden(b) predicts c, hidden(c) predicts d
    Responses that begin alike have N < R such pairs in common; source is the pair of each response token.
    """
    device = next(model.parameters()).device
    fed = [prompt + response[:-1] for prompt, response in rows]
    predicts_response = []  # [F] of each token that is fed
    targets = []
    for prompt, response in rows:
        predicts_response += [False] * (len(prompt) - 1) + [True] * len(response)
        targets += response

    packed = pack(fed, device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        hidden = hidden_states(model, packed, dtype)  # [T, H]
    # On the host, so that it does not wait for the GPU
    predicts = packed.node[torch.tensor(predicts_response)]  # [R]
    number = (predicts << 32) | torch.tensor(targets)  # of the pair of a token of the tree and its next one
    pairs, source = torch.unique(number, return_inverse=True)  # [N], [R]
    chosen = (pairs >> 32).to(device)  # [N]
    target = (pairs & (2**32 - 1)).to(device)  # [N]
    return hidden[chosen].to(dtype), model.get_output_embeddings().weight, target, source.to(device)


def token_logprobs(
    hidden: Tensor,  # [N, H] of any float type
    weight: Tensor,  # [V, H] of any float type, rounded to hidden's as in the sampler
    targets: Tensor,  # [N] int64 in [0, V)
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy of π = softmax(hidden·weightᵀ / temperature), each [N] fp32.

    Logits are fp32: logits rounded to bf16 move log-probs by up to 0.1 nats, half of a 0.2 PPO clip. Raises ValueError
    for a temperature ≤ 0 or unequal N.

    >>> token_logprobs(torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([0]))
    (tensor([-0.6931]), tensor([0.6931]))
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0 for log-probabilities, got {temperature}")
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states but {targets.shape[0]} targets")
    # Without gradients one kernel computes both numbers, and no logits are stored.
    if not torch.is_grad_enabled() and head.can_score(hidden):
        return head.score(hidden.contiguous(), weight.to(hidden.dtype).contiguous(), targets, temperature)
    return _TokenLogprobs.apply(hidden, weight, targets, temperature)


def token_logprobs_naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0):
    """The definition of `token_logprobs`, with all logits in memory at once."""
    logits = hidden @ weight.T / temperature  # [N, V]
    log_pi = logits.log_softmax(-1)
    logp = log_pi.gather(-1, targets[:, None])[:, 0]  # [N]
    entropy = -(log_pi.exp() * log_pi).sum(-1)  # [N]
    return logp, entropy


class _TokenLogprobs(torch.autograd.Function):
    """token_logprobs chunk by chunk; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        W = head.rounded_weight(weight, hidden.dtype)  # [V, H], as in the sampler
        N = len(hidden)
        logps = []
        entropies = []
        lses = []  # log-sum-exp of the logits divided by the temperature
        for rows in head.blocks(N, len(W), hidden.device):
            logits = head.project(hidden[rows], W)  # [C, V] fp32
            logp, entropy, lse = head.row_stats(logits, targets[rows], temperature)  # [C] each
            logps.append(logp)
            entropies.append(entropy)
            lses.append(lse)
        entropy = torch.cat(entropies)  # [N]
        ctx.save_for_backward(hidden, weight, targets, entropy, torch.cat(lses))
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # a loss without the entropy has None as its gradient
        return torch.cat(logps), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_logp, g_entropy):
        hidden, weight, targets, entropy, lse = ctx.saved_tensors
        W = head.rounded_weight(weight, hidden.dtype)
        if g_logp is None:  # a loss of the entropy alone
            g_logp = torch.zeros_like(lse)
        d_hidden = torch.empty_like(hidden)
        d_logits = hidden.new_empty(min(len(hidden), head.CHUNK), len(W))  # [C, V] of one chunk after another
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        # With z the logits divided by the temperature, ∂log π(y)/∂z = onehot(y) − π; row_gradients has the entropy's.
        for start in range(0, len(hidden), head.CHUNK):
            chunk = slice(start, start + head.CHUNK)
            h = hidden[chunk]
            d = d_logits[: len(h)]
            for rows in head.blocks(len(h), len(W), h.device):
                numbers = targets, lse, entropy, g_logp, g_entropy
                of_rows = [x if x is None else x[chunk][rows] for x in numbers]
                head.row_gradients(head.project(h[rows], W), *of_rows, ctx.temperature, out=d[rows])
            d_hidden[chunk] = d @ W.to(h.dtype)
            # The sum over chunks is kept in fp32, whatever the weight's type.
            if d_weight is not None:
                head.accumulate_weight_gradient(d_weight, d, h)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None
