"""KV-cached generation from the sampler's own merged weights.

The sampler holds a plain copy of the model; `refresh` writes θ + s·B·A into it, so decoding pays
nothing for the adapter. The cache is a pool of slots. A group's prompt is run once and its keys and values
copied to the group's samples; when a sequence ends, the last active slot moves into its place, so the
active slots are always the first n and attention reads a slice; waiting prompts take the freed ones.

Each sample owns its randomness: one uniform number per token, drawn from (seed, step, prompt, sample). Neither the
batch it shares nor the number of slots changes what is sampled.

Shapes: P prompts, G samples each, N = P·G; S slots, n active ones; L cache length; h heads, g = h/h_kv, d head size.
"""

import copy
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

import lora
from model import Packed, hidden_states, pack, packed_attention, refuse_other_attention


@dataclass
class Completion:
    ids: list[int]  # response tokens, with the stop token if it was reached
    logps: list[float]  # log-probs under the distribution sampled from; for greedy decoding, at temperature 1
    finish_reason: str  # "stop" or "length"


@dataclass
class Slots:
    """The KV cache, and which slots and positions the tokens now in the model belong to."""

    keys: Tensor  # [layers, S, h_kv, L, d]
    values: Tensor  # [layers, S, h_kv, L, d]
    slot: Tensor  # [T] slot of each token fed
    position: Tensor  # [T] its position
    mask: Tensor | None = None  # [n, 1, 1, L'] bool, True where a key is seen, while decoding; None while prefilling


def slot_attention(module, query, key, value, attention_mask, scaling, slots: Slots | None = None, **kwargs):
    """Writes this layer's keys and values to their slots, then attends. query [1, h, T, d] -> [1, T, h, d]."""
    if slots is None:  # no cache: whole sequences
        return packed_attention(module, query, key, value, None, scaling, **kwargs)
    layer = module.layer_idx
    slots.keys[layer][slots.slot, :, slots.position] = key[0].transpose(0, 1)  # [T, h_kv, d]
    slots.values[layer][slots.slot, :, slots.position] = value[0].transpose(0, 1)
    if slots.mask is None:
        return packed_attention(module, query, key, value, None, scaling, **kwargs)
    n, length = slots.mask.shape[0], slots.mask.shape[-1]
    refuse_other_attention(length, **kwargs)
    k, v = slots.keys[layer, :n, :, :length], slots.values[layer, :n, :, :length]  # [n, h_kv, L', d]
    q = query[0].transpose(0, 1).unflatten(1, (k.shape[1], -1))  # [n, h_kv, g, d]: heads sharing k, v become rows
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=slots.mask, scale=scaling)
    return out.flatten(1, 2)[None], None


AttentionInterface.register("slots", slot_attention)


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that belong to one sample, whatever batch it is in."""
    return np.random.default_rng(key).random(count)


def choose(logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probs. logits [n, V], u [n] in [0, 1) -> tokens [n], logp [n].

    Inverse CDF: the first token at which the cumulative probability exceeds u. The sum runs in fp64, since in
    fp32 the tail of a 150k vocabulary would drown in rounding. Temperature 0 takes the largest logit. With
    top_p < 1 only the nucleus is sampled from (Holtzman et al. 2020): the likeliest tokens that together reach top_p,
    and whatever ties with the last of them; logp stays that of the whole distribution. Raises
    FloatingPointError if a row holds NaN or +inf: no distribution, so nothing to sample.
    """
    if not logits.amax(-1).isfinite().all():
        raise FloatingPointError("the sampler's logits are not finite: the model's weights have diverged")
    if temperature == 0:
        tokens, temperature = logits.argmax(-1), 1.0
    else:
        p = (logits.double() / temperature).softmax(-1)  # [n, V]
        if top_p < 1:
            ranked = p.sort(-1, descending=True).values
            before = ranked.cumsum(-1) - ranked  # mass of the likelier tokens
            least = ranked.masked_fill(before >= top_p, 1.0).amin(-1, keepdim=True)  # [n, 1] of those in the nucleus
            p = p.masked_fill(p < least, 0.0)
        cdf = p.cumsum(-1)
        tokens = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    logp = (logits.float() / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens, logp


class Sampler:
    """Owns a merged copy of the policy's weights and generates with it."""

    def __init__(self, model: nn.Module, stop: list[int], slots: int = 256, dtype: torch.dtype = torch.float32):
        """`model` carries no adapter; `stop` are the ids that end a completion."""
        self.model = copy.deepcopy(model).to(dtype).requires_grad_(False).eval()
        self.model.set_attn_implementation("slots")
        self.stop, self.slots = stop, slots

    def refresh(self, policy: nn.Module) -> None:
        """Takes over θ + s·B·A of `policy` (or θ̂ + s·B·A of the shadow)."""
        lora.merge_into(self.model, policy)

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        keys: list[tuple[int, ...]],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        progress=None,
    ) -> list[list[Completion]]:
        """`group_size` completions of every prompt.

        prompts: P lists of token ids; keys: P tuples, sample i of prompt p draws from (*keys[p], i);
        progress: called with the number of completions finished since the last call.
        Raises ValueError for an empty prompt or one that leaves no room within the model's positions.
        """
        self._check(prompts, max_new_tokens)
        device, N, G = self.model.device, len(prompts) * group_size, group_size
        size, L = max(min(self.slots, N), G), max(map(len, prompts)) + max_new_tokens
        c = self.model.config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        pool = torch.zeros(
            2, c.num_hidden_layers, size, c.num_key_value_heads, L, head_dim, dtype=self.model.dtype, device=device
        )
        u = np.stack([uniforms((*key, i), max_new_tokens) for key in keys for i in range(G)])
        u = torch.from_numpy(u).to(device)  # [N, max_new]
        ids = torch.zeros(N, max_new_tokens, dtype=torch.long, device=device)
        logps = torch.zeros(N, max_new_tokens, device=device)
        length = torch.zeros(N, dtype=torch.long, device=device)  # tokens generated so far
        owner = torch.zeros(size, dtype=torch.long, device=device)  # slot -> sample
        position = torch.zeros(size, dtype=torch.long, device=device)  # slot -> where its next token goes
        stop = torch.tensor(self.stop, device=device)
        waiting, n = deque(range(len(prompts))), 0

        while n or waiting:
            fresh = [waiting.popleft() for _ in range(min(len(waiting), (size - n) // G))]
            if fresh:  # prefill, then one first token for each sample of the new groups
                logits = self._prefill(pool, [prompts[p] for p in fresh], n, G)  # [len(fresh), V]
                new = torch.arange(n, n + len(fresh) * G, device=device)
                owner[new] = torch.tensor([p * G + i for p in fresh for i in range(G)], device=device)
                position[new] = torch.tensor([len(prompts[p]) for p in fresh for _ in range(G)], device=device)
                n, logits = n + len(new), logits.repeat_interleave(G, 0)
            else:  # one decode step for every active slot
                new = torch.arange(n, device=device)
                logits = self._decode(pool, ids[owner[:n], length[owner[:n]] - 1], position[:n])
                position[:n] += 1
            samples = owner[new]
            tokens, logp = choose(logits, u[samples, length[samples]], temperature, top_p)
            ids[samples, length[samples]], logps[samples, length[samples]] = tokens, logp
            length[samples] += 1

            ended = torch.zeros(n, dtype=torch.bool, device=device)
            ended[new] = torch.isin(tokens, stop) | (length[samples] == max_new_tokens)
            if ended.any():  # move the last active slots into the holes
                m = n - int(ended.sum())
                hole = ended[:m].nonzero()[:, 0]
                last = (~ended[m:]).nonzero()[:, 0] + m
                pool[:, :, hole] = pool[:, :, last]
                owner[hole], position[hole] = owner[last], position[last]
                if progress:
                    progress(n - m)
                n = m
        return self._completions(ids, logps, length, G)

    def _check(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        limit = self.model.config.max_position_embeddings
        for p, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {p} is empty")
            if len(prompt) + max_new_tokens > limit:
                raise ValueError(
                    f"prompt {p} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} it exceeds the model's "
                    f"{limit} positions: lower max_new_tokens or drop the prompt"
                )

    def _prefill(self, pool: Tensor, prompts: list[list[int]], n: int, G: int) -> Tensor:
        """Runs each prompt once into the first slot of its group and copies the cache to the others. -> [P, V]"""
        device = self.model.device
        packed = pack(prompts, device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        first = n + G * torch.arange(len(prompts), device=device)  # slots n, n+G, n+2G, …
        slots = Slots(*pool, slot=first.repeat_interleave(lengths), position=packed.positions[0])
        hidden = hidden_states(self.model, packed, slots=slots)  # [T, H]
        group = pool[:, :, n : n + G * len(prompts), :, : int(lengths.max())].unflatten(2, (len(prompts), G))
        group[:, :, :, 1:] = group[:, :, :, :1]
        return self._logits(hidden[lengths.cumsum(0) - 1])

    def _decode(self, pool: Tensor, tokens: Tensor, position: Tensor) -> Tensor:
        """One more token for each active slot. tokens, position [n] -> [n, V]"""
        n, L = len(tokens), int(position.max()) + 1
        seen = torch.arange(L, device=tokens.device) <= position[:, None]  # [n, L]
        slots = Slots(*pool, slot=torch.arange(n, device=tokens.device), position=position, mask=seen[:, None, None])
        return self._logits(hidden_states(self.model, Packed(tokens[None], position[None]), slots=slots))

    def _logits(self, hidden: Tensor) -> Tensor:  # [n, H] -> [n, V]
        return hidden.float() @ self.model.get_output_embeddings().weight.float().T

    def _completions(self, ids: Tensor, logps: Tensor, length: Tensor, G: int) -> list[list[Completion]]:
        rows = []
        for row, lp, k in zip(ids.tolist(), logps.tolist(), length.tolist(), strict=True):
            reason = "stop" if row[k - 1] in self.stop else "length"
            rows.append(Completion(row[:k], lp[:k], reason))
        return [rows[i : i + G] for i in range(0, len(rows), G)]


@torch.inference_mode()
def generate_naive(
    sampler: Sampler, prompt: list[int], key: tuple[int, ...], max_new_tokens: int, temperature: float
) -> Completion:
    """One completion with no cache and no batch: the definition of what `Sampler.generate` returns."""
    u = torch.from_numpy(uniforms(key, max_new_tokens))
    ids: list[int] = []
    logps: list[float] = []
    for t in range(max_new_tokens):
        hidden = hidden_states(sampler.model, pack([prompt + ids], sampler.model.device))  # [T, H]
        logits = sampler._logits(hidden[-1:])
        token, logp = choose(logits, u[t : t + 1].to(logits.device), temperature)
        ids.append(int(token))
        logps.append(float(logp))
        if ids[-1] in sampler.stop:
            return Completion(ids, logps, "stop")
    return Completion(ids, logps, "length")
