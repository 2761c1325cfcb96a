"""Token log-probabilities and entropies from hidden states and the vocabulary head.

SFT, GRPO and the shadow loss all need the same two numbers per trained token: log π(y|x) and the
entropy of π(·|x). Materialising logits for every token is what exhausts memory in RL training
(16k tokens x 152k words in fp32 are 10 GB), so at most CHUNK rows of logits ever exist; the
backward pass computes them again.

Shapes: N tokens, H hidden size, V vocabulary size, C tokens of one chunk.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # C: tokens whose logits exist at one time


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy of π = softmax(hidden·weightᵀ / temperature), differentiable.

    hidden [N, H] and weight [V, H] in any float type, targets [N] int64 in [0, V), temperature > 0.
    Returns (logp [N], entropy [N]), both fp32, in nats. Products are formed in fp32: logits rounded
    to bf16 move log-probs by up to 0.1 nats, half of a 0.2 PPO clip.

    >>> token_logprobs(torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([0]))
    (tensor([-0.6931]), tensor([0.6931]))
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0 for log-probabilities, got {temperature}")
    if hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"{hidden.shape[0]} hidden states but {targets.shape[0]} targets")
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    parts = [checkpoint(_chunk_logprobs, h, weight, y, temperature, use_reentrant=False) for h, y in chunks]
    logp, entropy = zip(*parts, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def _chunk_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.float() @ weight.float().T / temperature  # [C, V]
    lse = logits.logsumexp(-1)  # [C]
    logp = logits.gather(-1, targets[:, None])[:, 0] - lse  # [C]
    entropy = lse - ((logits - lse[:, None]).exp() * logits).sum(-1)  # [C]  H = lse − E[logit]
    return logp, entropy
