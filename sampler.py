"""KV-cached generation from the sampler's own merged weights.

The sampler holds a decoder with its own weights. `refresh` writes θ + s·B·A into them, so the adapter costs nothing
during decoding. The cache is a pool of slots. Samples of a group share a slot while their tokens are equal; one that
draws another token gets a copy. The first n slots are always those in use. Waiting prompts take the freed ones. On a
GPU each sample has a slot of its own after the prompt: one step of all n slots is a CUDA graph, replayed STEPS times
between two checks for finished samples.

Each sample has its own random numbers: one uniform per token, from (seed, step, prompt, sample). Therefore neither its
batch nor the number of slots changes a sample.

Shapes: P prompts, G samples each, N = P·G; S slots and rows, n slots and m rows in use; K = max_new_tokens; L cache
length; V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

import lora
from infra.model import pick_device
from ops.decoder import Decoder
from ops.head import project
from ops.packed import hidden_states, pack
from ops.sample import sample_tokens, sample_tokens_torch

STEPS = 8  # decode steps on a GPU between two checks for finished samples
PREFILL_TOKENS = 16384  # prompt tokens of one prefill, about


@dataclass
class Completion:
    ids: list[int]  # response tokens; the last one is a stop token unless the completion was truncated
    logps: list[float]  # log-probs under the sampled distribution; under temperature 1 for greedy decoding
    finish_reason: str  # "stop" or "length"; "demonstration" for one in a group, whose logps are nan

    def text(self, tokenizer, stop: list[int]) -> str:
        """What rewards, grader and logs read: all tokens, special ones like </think> too, but a final one of `stop`."""
        return tokenizer.decode(self.ids[:-1] if self.ids[-1] in stop else self.ids)


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for one sample, a function of its key."""
    return np.random.default_rng(key).random(count)


@dataclass
class Samples:
    """Samples in progress, a row for each, and the slots of the cache that decode them.

    Rows of one slot have the same tokens so far; rows are sorted by slot. Unused rows work on sample N, whose content
    is ignored. Finished samples keep decoding until the next check; their extra tokens are ignored, and column K takes
    those beyond the limit.
    """

    u: Tensor  # [N+1, K+1] fp64, the uniforms
    ids: Tensor  # [N+1, K+1]
    logps: Tensor  # [N+1, K+1]
    rows: Tensor  # [5, S] of a row: sample, last token (the next input), number of tokens, position, 1 until it ends
    slot: Tensor  # [S] slot of a row
    first: Tensor  # [S] first row of a slot
    unused: Tensor  # [5, 1] an unused row
    logp_sum: Tensor  # [] sum of all log-probs: not finite if one is not

    def regroup(self, kv: Tensor, m: int, n: int, share: bool) -> tuple[int, int]:
        """Drops those of the first m rows, in n slots, that ended. Returns the new m and n.

        Rows keep sharing a slot if their last tokens are equal, too. Others get a copy; without `share` all do.
        """
        _, token, _, position, active = self.rows
        going = active[:m].nonzero()[:, 0]  # rows
        branch, slot = torch.arange(len(going), device=kv.device), self.slot[going]
        if share:
            branch = torch.unique(slot << 32 | token[going], return_inverse=True)[1]  # in the order of slots
        before, n = n, int(branch.max()) + 1 if len(branch) else 0
        if (len(going), n) == (m, before):  # each slot has one branch
            return m, n
        source = slot.new_empty(n).index_copy_(0, branch, slot)  # the slot that a branch comes from
        stays = source < n
        stays[1:] &= source[1:] != source[:-1]  # the first branch keeps its slot
        target, free = source.clone(), torch.ones_like(stays)
        free[source[stays]] = False
        target[~stays] = free.nonzero()[:, 0]
        if not stays.all():
            old, new, longest = source[~stays], target[~stays], int(position[going].max()) + 1
            for layer in kv:  # one by one, since torch makes a copy in between
                layer[:, new, :longest] = layer[:, old, :longest]
        slot, order = target[branch].sort(stable=True)
        self.rows[:, : len(going)] = self.rows[:, going[order]]
        self.rows[:, len(going) : m] = self.unused
        self.slot[: len(going)], self.first[:n] = slot, torch.searchsorted(slot, torch.arange(n, device=kv.device))
        return len(going), n


def sample_known(sample: Callable, unknown: Tensor, logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0):
    """sample(logits [n, V], …) without `unknown` ids; log-probs of the whole distribution, like the trainer's."""
    if not len(unknown):
        return sample(logits, u, temperature, top_p)
    excluded = (logits[:, unknown] / (temperature or 1.0)).logsumexp(-1)  # [n]
    logits[:, unknown] = float("-inf")
    token, logp = sample(logits, u, temperature, top_p)
    z = logits.gather(1, token[:, None])[:, 0] / (temperature or 1.0)
    return token, z - torch.logaddexp(z - logp, excluded)


class Sampler:
    """Owns a merged copy of the policy's weights and generates with it."""

    def __init__(self, model: nn.Module, stop: list[int], slots: int = 256, dtype: torch.dtype = torch.float32):
        """`model` has no adapter; `stop` are the ids that end a completion. Raises ModelError like Decoder."""
        self.decoder = Decoder(model, dtype, pick_device())
        self.model = self.decoder.model
        self.stop, self.slots = stop, slots
        self.graphs = self.model.device.type == "cuda"
        unknown = self.model.generation_config.suppress_tokens or []  # see infra.model.load
        self.unknown = torch.tensor(unknown, device=self.model.device).long()
        self.is_stop = torch.isin(torch.arange(len(self.decoder.lm_head)), torch.tensor(stop)).to(self.model.device)

    def refresh(self, policy: nn.Module) -> None:
        """Overwrites the weights by θ + s·B·A of `policy` (or θ̂ + s·B·A of the shadow)."""
        lora.merge_into(self.model, policy)

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], keys: list[tuple[int, ...]], group_size: int, max_new_tokens: int,
        temperature: float, top_p: float = 1.0, progress: Callable[[int, list[int]], object] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        """`group_size` completions of every prompt.

        prompts: P lists of token ids; keys: P tuples, sample i of prompt p draws from (*keys[p], i);
        progress: called with the number of tokens since its last call and the lengths of the samples that ended.
        Raises ValueError for an empty prompt or one that leaves no room within the model's positions, and
        FloatingPointError if a logit is not finite.
        """
        self._check(prompts, max_new_tokens)
        N, G, K = len(prompts) * group_size, group_size, max_new_tokens
        size = max(min(self.slots, N), G)
        cache = self.decoder.new_cache(size, max(map(len, prompts)) + K)
        b = self._new_samples(keys, size, G, K)
        lengths = torch.zeros(N, dtype=torch.long, device=self.model.device)
        sample_index, _, num_generated, _, active = b.rows

        def append_token(rows: slice, logits: Tensor) -> None:
            """Samples the next token of some rows from their logits [rows, V]."""
            sample_index, token, num_generated, position, active = b.rows[:, rows]  # views
            options = logits, b.u[sample_index, num_generated], temperature, top_p
            sampled, logp = sample_known(sample_tokens, self.unknown, *options)
            b.ids[sample_index, num_generated], b.logps[sample_index, num_generated] = sampled, logp
            b.logp_sum += logp.sum()
            token.copy_(sampled)
            num_generated += active
            position += active
            active *= ~(self.is_stop[sampled] | (num_generated >= K))

        def step(n: int) -> None:
            """One more token for each row of the first n slots."""
            _, token, _, position, _ = b.rows[:, b.first[:n]]
            logits = self.decoder.decode(cache, token, position)  # [n, V]
            append_token(slice(max(m, n)), logits[b.slot[:m]] if n < m else logits)  # a graph's n may exceed m

        share = not self.graphs  # a graph has a fixed number of rows for its slots: one each
        decode = _graphed(step, size) if self.graphs else step
        waiting, m, n = deque(range(len(prompts))), 0, 0
        while m or waiting:
            admitted = _admit(waiting, prompts, (size - m) // G)
            if admitted:  # each prompt is run once, in a slot that its samples share
                slots = torch.arange(n, n + len(admitted), device=self.model.device)
                logits = self.decoder.prefill(cache, [prompts[p] for p in admitted], slots)  # [len(admitted), V]
                new = slice(m, m + len(admitted) * G)
                rows = [(p * G + i, 0, 0, len(prompts[p]) - 1, 1) for p in admitted for i in range(G)]
                b.rows[:, new], b.slot[new] = torch.tensor(rows).T, slots.repeat_interleave(G)
                b.first[slots] = torch.arange(m, new.stop, G, device=slots.device)
                append_token(new, logits.repeat_interleave(G, 0))
                m = new.stop
            else:
                decode(n)
            ended = active[:m] == 0
            count = int(ended.sum())  # the host waits for the device
            if count and not b.logp_sum.isfinite():
                raise FloatingPointError("the sampler's logits are not finite: the model's weights have diverged")
            if progress:
                new_tokens = int((num_generated[:m] - lengths[sample_index[:m]]).sum())
                progress(new_tokens, num_generated[:m][ended].tolist() if count else [])
            if count or progress:
                lengths[sample_index[:m]] = num_generated[:m]
            if count or admitted or n < m:
                m, n = b.regroup(cache.kv, m, n + len(admitted), share)
        ids, logps, completions = b.ids.cpu(), b.logps.cpu(), []
        for sample, k in enumerate(lengths.tolist()):
            tokens = ids[sample, :k].tolist()
            reason = "stop" if tokens[-1] in self.stop else "length"
            completions.append(Completion(tokens, logps[sample, :k].tolist(), reason))
        return [completions[i : i + G] for i in range(0, N, G)]

    def _check(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        limit = self.model.config.max_position_embeddings
        for p, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {p} is empty")
            if len(prompt) + max_new_tokens > limit:
                asked = f"{len(prompt)} tokens; with max_new_tokens={max_new_tokens}"
                advice = "lower max_new_tokens or drop the prompt"
                raise ValueError(f"prompt {p} has {asked} it exceeds the model's {limit} positions: {advice}")

    def _new_samples(self, keys: list[tuple[int, ...]], size: int, G: int, K: int) -> Samples:
        device, N = self.model.device, len(keys) * G
        u = np.zeros((N + 1, K + 1))
        for row, key in enumerate((*key, i) for key in keys for i in range(G)):
            u[row, :K] = uniforms(key, K)
        unused, slots = torch.tensor([N, 0, K, 0, 0], device=device)[:, None], torch.arange(size, device=device)
        return Samples(
            u=torch.from_numpy(u).to(device), ids=torch.zeros(N + 1, K + 1, dtype=torch.long, device=device),
            logps=torch.zeros(N + 1, K + 1, device=device), logp_sum=torch.zeros((), device=device),
            rows=unused.repeat(1, size), unused=unused, slot=slots, first=slots.clone(),
        )  # fmt: skip


def _admit(waiting: deque, prompts: list[list[int]], room: int) -> list[int]:
    """Takes the next prompts from the queue: at most `room`, and about PREFILL_TOKENS tokens."""
    admitted, tokens = [], 0
    while waiting and len(admitted) < room and (not admitted or tokens + len(prompts[waiting[0]]) <= PREFILL_TOKENS):
        admitted.append(waiting.popleft())
        tokens += len(prompts[admitted[-1]])
    return admitted


@cache
def _side_stream() -> torch.cuda.Stream:
    """One stream for all captures: libraries keep a workspace for every stream, 32 MiB on an H100."""
    return torch.cuda.Stream()


def _graphed(step: Callable[[int], None], size: int) -> Callable[[int], None]:
    """STEPS decode steps on CUDA, replayed from a graph that is captured at the first use of each bucket of n.

    A graph repeats the same kernels on the same memory: tensors and graphs live as long as the call of `generate`.
    """
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    memory = torch.cuda.graph_pool_handle()

    def steps(n: int) -> None:
        bucket = min(size, 1 << (n - 1).bit_length() if n <= 64 else -(-n // 64) * 64)
        remaining = STEPS
        if bucket not in graphs:
            side = _side_stream()  # the first step runs outside a graph: it compiles kernels and allocates workspaces
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step(bucket)
            torch.cuda.current_stream().wait_stream(side)
            graphs[bucket] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[bucket], pool=memory, stream=side, capture_error_mode="thread_local"):
                step(bucket)  # recorded, not run
            remaining -= 1
        for _ in range(remaining):
            graphs[bucket].replay()

    return steps


@torch.inference_mode()
def generate_naive(
    sampler: Sampler, prompt: list[int], key: tuple[int, ...], max_new_tokens: int, temperature: float
) -> Completion:
    """One completion by transformers' own modules, without cache and batch: the definition of `Sampler.generate`."""
    u = torch.from_numpy(uniforms(key, max_new_tokens))
    ids, logps = [], []
    for t in range(max_new_tokens):
        hidden = hidden_states(sampler.model, pack([prompt + ids], sampler.model.device))  # [T, H]
        logits = project(hidden[-1:], sampler.decoder.lm_head)
        options = logits, u[t : t + 1].to(logits.device), temperature
        token, logp = sample_known(sample_tokens_torch, sampler.unknown, *options)
        ids.append(int(token))
        logps.append(float(logp))
        if ids[-1] in sampler.stop:
            return Completion(ids, logps, "stop")
    return Completion(ids, logps, "length")
