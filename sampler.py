"""KV-cached generation from the sampler's own merged weights.

The sampler holds a decoder with its own weights. `refresh` writes θ + s·B·A into them, so the adapter costs nothing
during decoding. The cache is a pool of slots. Samples of a group share a slot while their tokens are equal; one that
draws another token gets a copy (ops/slots.py). Waiting prompts take the slots of finished samples. On a GPU each sample
has a slot of its own after the prompt, and a decoding step is a CUDA graph (ops/graphs.py).

Each sample has its own random numbers: one uniform per token, from (seed, step, draw, sample). Therefore neither its
batch nor the number of slots changes a sample.

Shapes: P prompts, G samples each, N = P·G; S rows and slots at most, a row for each sample in progress;
K = max_new_tokens; V vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lora
from infra.model import pick_device
from ops.decoder import Decoder
from ops.graphs import graphed
from ops.head import project
from ops.packed import hidden_states, pack
from ops.sample import sample_without
from ops.slots import Samples, uniforms

PREFILL_TOKENS = 16384  # prompt tokens of one prefill, about


@dataclass
class Completion:
    ids: list[int]  # response tokens; the last one is a stop token unless the completion was truncated
    logps: list[float]  # log-probs under the sampled distribution; under temperature 1 for greedy decoding
    finish_reason: str  # "stop" or "length"; "demonstration" for one in a group, whose logps are nan

    def text(self, tokenizer, stop: list[int]) -> str:
        """What rewards, grader and logs read: all tokens, special ones like </think> too, but a final one of `stop`."""
        ids = self.ids[:-1] if self.ids[-1] in stop else self.ids
        return tokenizer.decode(ids)


class Sampler:
    """Owns a merged copy of the policy's weights and generates with it."""

    def __init__(self, model: nn.Module, stop: list[int], slots: int = 256, dtype: torch.dtype = torch.float32):
        """`model` has no adapter; `stop` are the ids that end a completion. Raises ModelError like Decoder."""
        self.decoder = Decoder(model, dtype, pick_device())
        self.model = self.decoder.model
        self.stop = stop
        self.slots = slots
        self.graphs = self.model.device.type == "cuda"
        excluded = self.model.generation_config.suppress_tokens or []  # ids that are no token, see infra.model.load
        self.excluded = torch.tensor(excluded, device=self.model.device).long()
        vocabulary = torch.arange(len(self.decoder.lm_head))  # [V]
        self.is_stop = torch.isin(vocabulary, torch.tensor(stop)).to(self.model.device)

    def refresh(self, policy: nn.Module) -> None:
        """Overwrites the weights by θ + s·B·A of `policy` (or θ̂ + s·B·A of the shadow)."""
        lora.merge_into(self.model, policy)

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],  # P lists of token ids
        keys: list[tuple[int, ...]],  # P; sample i of prompt p draws from the seed (*keys[p], i)
        group_size: int,  # G
        max_new_tokens: int,  # K
        temperature: float,  # 0 is greedy
        top_p: float = 1.0,
    ) -> list[list[Completion]]:
        """G completions of every prompt.

        Raises ValueError for an empty prompt or one that leaves no room within the model's positions, and
        FloatingPointError if a logit is not finite.
        """
        check_prompts(prompts, max_new_tokens, self.model.config.max_position_embeddings)
        # S slots: a group must fit
        size = max(min(self.slots, len(prompts) * group_size), group_size)
        lengths = [len(prompt) for prompt in prompts]
        cache = self.decoder.new_cache(size, max(lengths) + max_new_tokens)
        samples = Samples(keys, lengths, group_size, size, max_new_tokens, self.model.device)

        def draw(rows: slice, logits: Tensor) -> None:
            """Draws the next token of some rows.  logits [rows, V]"""
            sample = samples.sample[rows]
            u = samples.u[sample, samples.length[sample]]  # a uniform number for each
            token, logp = sample_without(self.excluded, logits, u, temperature, top_p)
            samples.append(rows, token, logp, self.is_stop)

        def decode(slots: int) -> None:
            """One more token for each row of the first slots. A graph's slots may exceed those in use."""
            logits = self.decoder.decode(cache, *samples.last_tokens(slots))  # [slots, V]
            if slots < samples.rows:  # rows share slots
                logits = logits[samples.slot[: samples.rows]]
            draw(slice(len(logits)), logits)

        # A graph has a fixed number of rows for its slots, one each, so samples share slots without graphs only.
        share = not self.graphs
        if self.graphs:
            decode = graphed(decode, size)
        waiting = deque(range(len(prompts)))
        while waiting or samples.rows:
            # Admit waiting prompts: each is run once, in a slot that its samples share. Else decode.
            admitted = take_prompts(waiting, prompts, (size - samples.rows) // group_size)
            if admitted:
                rows, slots = samples.admit(admitted)
                logits = self.decoder.prefill(cache, [prompts[p] for p in admitted], slots)  # [admitted, V]
                draw(rows, logits.repeat_interleave(group_size, 0))
            else:
                decode(samples.slots)

            # Retire the samples that have ended. Samples of a slot that drew different tokens get slots of their own.
            samples.retire(cache.kv, share)
        if not samples.logps.isfinite().all():
            raise FloatingPointError("the sampler's logits are not finite: the model's weights have diverged")
        return self._completions(samples)

    def _completions(self, samples: Samples) -> list[list[Completion]]:
        """The finished samples as lists, by prompt."""
        ids = samples.ids.cpu()
        logps = samples.logps.cpu()
        completions = []
        for i, length in enumerate(samples.length[:-1].tolist()):  # without the dummy
            tokens = ids[i, :length].tolist()
            reason = "stop" if tokens[-1] in self.stop else "length"
            completions.append(Completion(tokens, logps[i, :length].tolist(), reason))
        G = samples.group_size
        return [completions[i : i + G] for i in range(0, len(completions), G)]


def check_prompts(prompts: list[list[int]], max_new_tokens: int, positions: int) -> None:
    """Raises ValueError, with the number of the prompt, for an empty one and one without room for a completion."""
    for p, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {p} is empty")
        if len(prompt) + max_new_tokens > positions:
            raise ValueError(
                f"prompt {p} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} it exceeds the model's "
                f"{positions} positions: lower max_new_tokens or drop the prompt"
            )


def take_prompts(waiting: deque, prompts: list[list[int]], room: int) -> list[int]:
    """Takes the next prompts from the queue: at most `room`, and about PREFILL_TOKENS tokens."""
    admitted = []
    tokens = 0
    while waiting and len(admitted) < room:
        length = len(prompts[waiting[0]])
        if admitted and tokens + length > PREFILL_TOKENS:
            break
        admitted.append(waiting.popleft())
        tokens += length
    return admitted


@torch.inference_mode()
def generate_naive(
    sampler: Sampler, prompt: list[int], key: tuple[int, ...], max_new_tokens: int, temperature: float
) -> Completion:
    """One completion by transformers' own modules, without cache and batch: the definition of `Sampler.generate`."""
    u = torch.from_numpy(uniforms(key, max_new_tokens)).to(sampler.model.device)
    ids = []
    logps = []
    for t in range(max_new_tokens):
        hidden = hidden_states(sampler.model, pack([prompt + ids], sampler.model.device))  # [T, H]
        logits = project(hidden[-1:], sampler.decoder.lm_head)  # [1, V]
        token, logp = sample_without(sampler.excluded, logits, u[t : t + 1], temperature)
        ids.append(int(token))
        logps.append(float(logp))
        if ids[-1] in sampler.stop:
            return Completion(ids, logps, "stop")
    return Completion(ids, logps, "length")
