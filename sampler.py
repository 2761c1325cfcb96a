"""KV-cached generation from the sampler's own merged weights.

The sampler holds a decoder with its own weights; `refresh` writes θ + s·B·A into them, so decoding pays nothing for
the adapter. The cache is a pool of slots. A group's prompt is run once and its keys and values copied to the group's
samples; when a sequence ends, the last active slot moves into its place, so the active slots are always the first n;
waiting prompts take the freed ones. On a GPU a step of all n is one CUDA graph, replayed STEPS times before the host
looks at what has ended.

Each sample owns its randomness: one uniform number per token, drawn from (seed, step, prompt, sample). Neither the
batch it shares nor the number of slots changes what is sampled.

Shapes: P prompts, G samples each, N = P·G; S slots, n active ones; K = max_new_tokens; L cache length; V vocabulary.
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
from infra.model import hidden_states, pack
from logprob import jit, project, tl, use_kernels
from ops.decoder import Cache, Decoder

STEPS = 8  # decode steps on a GPU between looks of the host; a sequence that ends in between runs on, unread
PREFILL_TOKENS = 16384  # prompts are run in batches of about so many tokens


@dataclass
class Completion:
    ids: list[int]  # response tokens, with the stop token if it was reached
    logps: list[float]  # log-probs under the distribution sampled from; for greedy decoding, at temperature 1
    finish_reason: str  # "stop" or "length"


# ---------------------------------------------------------------------------------------------------------------------
# From logits to a token


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """`count` numbers in [0, 1) that belong to one sample, whatever batch it is in."""
    return np.random.default_rng(key).random(count)


def choose_torch(logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    p = (logits.double() / (temperature or 1.0)).softmax(-1)  # [n, V]
    pool, u = p, u[:, None]  # what is drawn from: at first, all of p
    while True:
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)  # [n, 1]
            break
        cdf = pool.cumsum(-1)
        mark = u * cdf[:, -1:]
        token = torch.searchsorted(cdf, mark, right=True).clamp_(max=p.shape[1] - 1)  # the first with cdf > mark
        if top_p >= 1:
            break
        mass = pool.gather(1, token)
        likelier = torch.where(pool > mass, pool, 0.0)
        outside = likelier.sum(-1, keepdim=True) >= top_p
        if not outside.any():
            break
        u = torch.where(outside, ((mark - (cdf.gather(1, token) - mass)) / mass).clamp(0, 1 - 2**-53), u)
        pool = torch.where(outside, likelier, pool)
    return token[:, 0], p.gather(1, token).log()[:, 0].float()


@jit
def choose_kernel(
    Z, U, TOKEN, LOGP, V, stride, temperature, top_p, GREEDY: tl.constexpr, NUCLEUS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row: log-sum-exp, then the first token whose cumulative mass exceeds u's share of the total.

    Z [n, V] fp32 logits, U [n] fp64 -> TOKEN [n] int64, LOGP [n] fp32. Reads 4V bytes, then on average half of them
    again, from the L2 cache if they are still there. Masses are summed in fp64: in fp32 the tail of a large vocabulary
    would drown in rounding. NUCLEUS draws again, among the likelier tokens only, from a token outside the nucleus; at
    top_p = 0.95 one draw in twenty.
    """
    row = tl.program_id(0).to(tl.int64)
    m, s, token = -1e30, tl.zeros((), tl.float64), 0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(Z + row * stride + column, mask=column < V, other=float("-inf")) / temperature
        largest, where = tl.max(z, 0, return_indices=True)
        token = tl.where(largest > m, start + where, token)
        larger = tl.maximum(m, largest)
        s = s * tl.exp(m - larger) + tl.sum(tl.exp(z - larger).to(tl.float64), 0)
        m = larger
    lse = m + tl.log(s).to(tl.float32)

    if not GREEDY:
        u, total, ceiling, undecided = tl.load(U + row), s, float("-inf"), True
        while undecided:
            mark, before = u * total, tl.zeros((), tl.float64)  # before: mass of the blocks passed
            start, searching, mass = 0, True, tl.zeros((), tl.float64)
            while searching:
                column = start + tl.arange(0, BLOCK)
                z = tl.load(Z + row * stride + column, mask=column < V, other=float("-inf")) / temperature
                e = tl.where(z > ceiling, tl.exp(z - m), 0.0).to(tl.float64)
                block = tl.sum(e, 0)
                last = start + BLOCK >= V  # where a mark beyond the rounded total ends, too
                if (before + block > mark) | last:
                    cdf = before + tl.cumsum(e, 0)
                    possible = (e > 0.0) & ((cdf > mark) | (cdf >= before + block))
                    at = tl.min(tl.where(possible, tl.arange(0, BLOCK), BLOCK - 1), 0)
                    token = tl.minimum(start + at, V - 1)
                    mass = tl.sum(tl.where(tl.arange(0, BLOCK) == at, e, 0.0), 0)
                    before = tl.sum(tl.where(tl.arange(0, BLOCK) == at, cdf, 0.0), 0) - mass
                    searching = False
                else:
                    before += block
                start += BLOCK
            undecided = False
            if NUCLEUS:
                threshold = tl.load(Z + row * stride + token) / temperature
                likelier = tl.zeros((), tl.float64)
                for start in range(0, V, BLOCK):
                    column = start + tl.arange(0, BLOCK)
                    z = tl.load(Z + row * stride + column, mask=column < V, other=float("-inf")) / temperature
                    likelier += tl.sum(tl.where(z > threshold, tl.exp(z - m), 0.0).to(tl.float64), 0)
                if likelier >= top_p * s:
                    u = tl.minimum(tl.maximum((mark - before) / mass, 0.0), 1.0 - 1.1102230246251565e-16)
                    total, ceiling, undecided = likelier, threshold, True
    tl.store(TOKEN + row, token)
    tl.store(LOGP + row, tl.load(Z + row * stride + token) / temperature - lse)


def choose(logits: Tensor, u: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probs. logits [n, V] fp32, u [n] fp64 in [0, 1) -> tokens [n], logp [n] fp32.

    Inverse CDF: the first token at which the cumulative probability exceeds u. Temperature 0 takes the largest logit.
    With top_p < 1 only the nucleus is sampled from (Holtzman et al. 2020): tokens such that all likelier ones together
    have less than top_p. Without sorting, by rejection: a draw outside the nucleus is followed by one from the tokens
    likelier than it, which still hold the nucleus. What u says beyond the rejected token, where in that token's share
    of the mass it fell, is uniform again, so one u per token is enough. logp stays that of the whole distribution. A
    row with NaN or +inf among its logits gets the log-prob NaN.
    """
    if not use_kernels(logits):
        return choose_torch(logits, u, temperature, top_p)
    n, V = logits.shape
    token = torch.empty(n, dtype=torch.long, device=logits.device)
    logp = torch.empty(n, device=logits.device)
    choose_kernel[(n,)](
        logits, u, token, logp, V, logits.stride(0), temperature or 1.0, top_p,
        GREEDY=temperature == 0, NUCLEUS=top_p < 1, BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return token, logp


# ---------------------------------------------------------------------------------------------------------------------
# From prompts to completions


@dataclass
class Samples:
    """Samples in the making, and the slots that work on them.

    Row N belongs to slots without work: it has ended, and what is written to it does not matter. A sample that has
    ended between two looks of the host is decoded on, and what it says then goes beyond its end, at most to column K.
    """

    u: Tensor  # [N+1, K+1] fp64, the uniforms
    ids: Tensor  # [N+1, K+1]
    logps: Tensor  # [N+1, K+1]
    owner: Tensor  # [S] sample of a slot
    token: Tensor  # [S] its last token, which is fed next
    made: Tensor  # [S] how many tokens it has
    position: Tensor  # [S] where the last token stands
    going: Tensor  # [S] int64, 1 until it ends
    check: Tensor  # [] sum of all log-probs: not finite if one is not

    @property
    def slots(self) -> tuple[Tensor, ...]:
        return self.owner, self.token, self.made, self.position, self.going


class Sampler:
    """Owns a merged copy of the policy's weights and generates with it."""

    def __init__(self, model: nn.Module, stop: list[int], slots: int = 256, dtype: torch.dtype = torch.float32):
        """`model` carries no adapter; `stop` are the ids that end a completion. Raises ModelError as Decoder does."""
        self.decoder = Decoder(model, dtype)
        self.model = self.decoder.model
        self.stop, self.slots = stop, slots
        self.graphs = self.model.device.type == "cuda"
        self.is_stop = torch.isin(torch.arange(len(self.decoder.head)), torch.tensor(stop)).to(self.model.device)

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
        Raises ValueError for an empty prompt or one that leaves no room within the model's positions, and
        FloatingPointError if logits are not finite: then there is no distribution to sample from.
        """
        self._check(prompts, max_new_tokens)
        N, G, K = len(prompts) * group_size, group_size, max_new_tokens
        size = max(min(self.slots, N), G)
        cache = self.decoder.new_cache(size, max(map(len, prompts)) + K)
        b = self._samples(keys, size, G, K)
        lengths = torch.zeros(N, dtype=torch.long, device=self.model.device)

        def emit(slots: slice, logits: Tensor) -> None:
            """The next token of each of n slots, from logits [n, V]."""
            owner, token, made, position, going = (x[slots] for x in b.slots)  # views
            chosen, logp = choose(logits, b.u[owner, made], temperature, top_p)
            b.ids[owner, made], b.logps[owner, made] = chosen, logp
            b.check += logp.sum()
            token.copy_(chosen)
            made += going
            position += going
            going *= ~(self.is_stop[chosen] | (made >= K))

        def step(n: int) -> None:
            """One more token for each of the first n slots."""
            emit(slice(n), self.decoder.decode(cache, b.token[:n], b.position[:n]))

        decode = _graphed(step, size) if self.graphs else step
        waiting, n = deque(range(len(prompts))), 0
        while n or waiting:
            fresh = _admit(waiting, prompts, (size - n) // G)
            if fresh:  # prefill, then one first token for each sample of the new groups
                logits = self._prefill(cache, [prompts[p] for p in fresh], n, G)  # [len(fresh), V]
                new = slice(n, n + len(fresh) * G)
                b.owner[new] = torch.tensor([p * G + i for p in fresh for i in range(G)])
                b.position[new] = torch.tensor([len(prompts[p]) - 1 for p in fresh for _ in range(G)])
                b.made[new], b.going[new], n = 0, 1, new.stop
                emit(new, logits.repeat_interleave(G, 0))
            else:
                decode(n)
            m = int(b.going[:n].sum())  # the host waits for the device
            if m < n:  # move the last active slots into the holes
                if not b.check.isfinite():
                    raise FloatingPointError("the sampler's logits are not finite: the model's weights have diverged")
                ended = b.going[:n] == 0
                lengths[b.owner[:n][ended]] = b.made[:n][ended]
                hole = ended[:m].nonzero()[:, 0]
                last = (~ended[m:]).nonzero()[:, 0] + m
                cache.kv[:, :, hole] = cache.kv[:, :, last]
                for x in b.slots:
                    x[hole] = x[last]
                b.owner[m:n], b.made[m:n] = N, K
                b.position[m:n], b.going[m:n] = 0, 0
                if progress:
                    progress(n - m)
                n = m
        return self._completions(b, lengths, G)

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

    def _samples(self, keys: list, size: int, G: int, K: int) -> Samples:
        device, N = self.model.device, len(keys) * G
        u = np.zeros((N + 1, K + 1))
        for row, key in enumerate((*key, i) for key in keys for i in range(G)):
            u[row, :K] = uniforms(key, K)

        def full(value: int, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return Samples(
            u=torch.from_numpy(u).to(device),
            ids=full(0, N + 1, K + 1),
            logps=full(0, N + 1, K + 1, dtype=torch.float32),
            owner=full(N, size),
            token=full(0, size),
            made=full(K, size),
            position=full(0, size),
            going=full(0, size),
            check=full(0, dtype=torch.float32),
        )

    def _prefill(self, cache: Cache, prompts: list[list[int]], n: int, G: int) -> Tensor:
        """Runs each prompt once into the first slot of its group and copies the cache to the others. -> [P, V]"""
        first = n + G * torch.arange(len(prompts), device=self.model.device)  # slots n, n+G, n+2G, …
        logits = self.decoder.prefill(cache, prompts, first)
        longest = max(map(len, prompts))
        group = cache.kv[:, :, n : n + G * len(prompts), :longest].unflatten(2, (len(prompts), G))
        group[:, :, :, 1:] = group[:, :, :, :1]
        return logits

    def _completions(self, b: Samples, lengths: Tensor, G: int) -> list[list[Completion]]:
        ids, logps, rows = b.ids.cpu(), b.logps.cpu(), []
        for sample, k in enumerate(lengths.tolist()):
            tokens = ids[sample, :k].tolist()
            reason = "stop" if tokens[-1] in self.stop else "length"
            rows.append(Completion(tokens, logps[sample, :k].tolist(), reason))
        return [rows[i : i + G] for i in range(0, len(rows), G)]


def _admit(waiting: deque, prompts: list[list[int]], room: int) -> list[int]:
    """Takes the prompts that come next: at most `room`, and about PREFILL_TOKENS tokens."""
    fresh, tokens = [], 0
    while waiting and len(fresh) < room and (not fresh or tokens + len(prompts[waiting[0]]) <= PREFILL_TOKENS):
        fresh.append(waiting.popleft())
        tokens += len(prompts[fresh[-1]])
    return fresh


@cache
def _side_stream() -> torch.cuda.Stream:
    """The stream of all captures: libraries keep a workspace for every stream they have met, 32 MiB on H100s."""
    return torch.cuda.Stream()


def _graphed(step: Callable[[int], None], size: int) -> Callable[[int], None]:
    """`step` for CUDA: STEPS of them, replayed from a graph that is captured for each bucket of n when first met.

    A graph repeats the same kernels on the same memory: everything that changes between steps is in tensors that
    live as long as the call of `generate`, and so do the graphs. Unused slots of a bucket work on row N.
    """
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    memory = torch.cuda.graph_pool_handle()

    def steps(n: int) -> None:
        bucket = min(size, 1 << (n - 1).bit_length() if n <= 64 else -(-n // 64) * 64)
        remaining = STEPS
        if bucket not in graphs:
            side = _side_stream()  # a first step outside the graph compiles kernels and makes workspaces
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step(bucket)
            torch.cuda.current_stream().wait_stream(side)
            graphs[bucket] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[bucket], pool=memory, stream=side):
                step(bucket)  # recorded, not run
            remaining -= 1
        for _ in range(remaining):
            graphs[bucket].replay()

    return steps


@torch.inference_mode()
def generate_naive(
    sampler: Sampler, prompt: list[int], key: tuple[int, ...], max_new_tokens: int, temperature: float
) -> Completion:
    """One completion by transformers' own modules, no cache and no batch: what `Sampler.generate` is defined by."""
    u = torch.from_numpy(uniforms(key, max_new_tokens))
    ids: list[int] = []
    logps: list[float] = []
    for t in range(max_new_tokens):
        hidden = hidden_states(sampler.model, pack([prompt + ids], sampler.model.device))  # [T, H]
        logits = project(hidden[-1:], sampler.decoder.head)
        token, logp = choose_torch(logits, u[t : t + 1].to(logits.device), temperature)
        ids.append(int(token))
        logps.append(float(logp))
        if ids[-1] in sampler.stop:
            return Completion(ids, logps, "stop")
    return Completion(ids, logps, "length")
