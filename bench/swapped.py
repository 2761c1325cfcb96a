"""The levels swapped: RL above, SFT below. The upper variable ω weighs the demonstrations, which θ and w cannot undo.

With W = (θ, w), demonstration i of T_i tokens, and the mean log-likelihood of the weighed demonstrations

    J_SFT(W; ω) = Σ_i ω_i log π_W(y_i|x_i) / Σ_i ω_i T_i

the problem is max_ω J_RL(W) subject to W ∈ argmax J_SFT(·; ω). The penalty max_S J_SFT(S; ω) − J_SFT(W; ω) replaces
the lower level, as in eq. (7). The policy W takes both gradients, the shadow S imitates only, and by Danskin's theorem
ω ascends the difference of their likelihoods:

    W ← W + α∇[(1−λ) J_SFT(W; ω) + λ J_RL(W)]
    S ← S + α∇ J_SFT(S; ω)
    ω ← ω + η·Σω_j T_j·∇_ω [J_SFT(W; ω) − J_SFT(S; ω)]

In words: a demonstration counts as far as training with the reward makes it likelier than imitation alone does.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from kinds import probe
from torch import Tensor, nn

import bridge
from logprob import response_logprobs
from ops.packed import Row
from rewards import is_correct

LEAST = 0.02  # of ω, so that no demonstration is lost for good
WARM_UP = 20  # steps before ω moves: W and S are equal at first


def ascent(logp: Tensor, logp_shadow: Tensor, omega: Tensor, lengths: Tensor) -> Tensor:
    """Σω_j T_j·∇_ω [J_SFT(W; ω) − J_SFT(S; ω)], the direction in which ω moves.

    logp, logp_shadow [N] log π of whole demonstrations under W and S, omega [N], lengths [N] their T -> [N]. With
    g = log π_W − log π_S it is g_i − T_i·ḡ, where ḡ is the mean of g over the weighed tokens.

    >>> ascent(torch.tensor([-1.0, -4.0]), torch.tensor([-2.0, -2.0]), torch.ones(2), torch.tensor([2, 2]))
    tensor([ 1.5000, -1.5000])
    """
    g = logp - logp_shadow
    mean = (omega * g).sum() / (omega * lengths).sum()
    return g - lengths * mean


@dataclass
class Weights:
    """ω of the demonstrations of a run, and the shadow that imitates with them; a fixed ω has no shadow."""

    rate: float  # η; 0 for a fixed ω
    omega: dict[str, float] = field(default_factory=dict)  # by the key of a demonstration
    key_of: dict[str, str] = field(default_factory=dict)  # by row: a demonstration or its source
    is_useless: dict[str, bool] = field(default_factory=dict)  # by row
    shadow: bridge.Policies | None = None  # S
    steps: int = 0

    def of_rows(self, rows: list[Row]) -> Tensor:  # [N]
        return torch.tensor([self.omega.get(self.key_of[str(row)], 1.0) for row in rows])

    def move(self, rows: list[Row], nll: Tensor, nll_shadow: Tensor) -> None:
        """One step of ω on a batch.  nll [T] of the tokens of the rows under W and under S"""
        lengths = [len(response) for _, response in rows]
        logp = -torch.stack([tokens.sum() for tokens in nll.float().split(lengths)])  # [N]
        logp_shadow = -torch.stack([tokens.sum() for tokens in nll_shadow.float().split(lengths)])  # [N]
        moved = self.rate * ascent(logp, logp_shadow, self.of_rows(rows), torch.tensor(lengths))
        changes: dict[str, float] = {}  # demonstrations of one source have one ω
        for row, change in zip(rows, moved.tolist(), strict=True):
            key = self.key_of[str(row)]
            changes[key] = changes.get(key, 0.0) + change
        for key, change in changes.items():
            self.omega[key] = min(1.0, max(LEAST, self.omega.get(key, 1.0) + change))

    def means(self, run: bridge.Run, step: int) -> dict:
        """The mean ω of the useful and of the useless demonstrations."""
        omega = self.of_rows(run.demonstrations).tolist()
        measured = {}
        for name, kind in (("useful", False), ("useless", True)):
            values = [x for row, x in zip(run.demonstrations, omega, strict=True) if self.is_useless[str(row)] == kind]
            if values:
                measured[f"weight {name}"] = sum(values) / len(values)
        return measured


def install(weights: Weights, start: Callable[[bridge.Run, Weights], list[bool]] | None = None) -> None:
    """Replaces functions of bridge.py, so that SFT weighs its demonstrations.

    start: says at step 0 which demonstrations, in their order, have ω = 1; the others have 0. None: all have 1.
    """
    make_policies = bridge.make_policies
    sft_pass = bridge.sft_pass

    def with_shadow(model: nn.Module, s: bridge.Settings, *rest) -> bridge.Policies:
        if weights.rate:
            weights.shadow = make_policies(copy.deepcopy(model), s)  # with an adapter of its own
        return make_policies(model, s, *rest)

    def weighed_pass(model: nn.Module, rows: list[Row], weight: float, s: bridge.Settings) -> Tensor:
        """sft_pass for J_SFT(·; ω)."""
        lengths = torch.tensor([len(response) for _, response in rows])
        omega = weights.of_rows(rows)
        # sft_pass divides by the number of tokens, J_SFT by the weighed tokens
        scale = lengths.sum() / (omega * lengths).sum().clamp(min=1e-6)

        def token_weights(s, logp: Tensor, entropy: Tensor, part: list[Row]) -> Tensor:
            of_part = scale * weights.of_rows(part)
            return of_part.repeat_interleave(torch.tensor([len(response) for _, response in part])).to(logp)

        bridge.sft_token_weights = token_weights
        return sft_pass(model, rows, weight, s)

    def both_passes(model: nn.Module, rows: list[Row], weight: float, s: bridge.Settings, *_) -> Tensor:
        nll = weighed_pass(model, rows, weight, s)
        if weights.shadow is not None:
            for optimizer in weights.shadow.optimizers.values():
                optimizer.zero_grad()
            nll_shadow = weighed_pass(weights.shadow.policy, rows, 1.0, s)
            bridge.clip_and_step(weights.shadow, {}, s)
            weights.steps += 1
            if weights.steps > WARM_UP:
                weights.move(rows, nll, nll_shadow)
        return nll

    def measure(run: bridge.Run, step: int) -> dict:
        if not weights.key_of:
            for row, d in zip(run.demonstrations, run.env.task.demonstrations, strict=True):
                key = str(row)
                if weights.rate:  # demonstrations of one source share a learned ω
                    key = d.source or key
                weights.key_of[str(row)] = key
                useless = not is_correct(d.response, d.answer).correct
                weights.is_useless[str(row)] = d.extra.get("useless", useless)
            if start is not None:
                chosen = start(run, weights)
                weights.omega = {str(row): float(yes) for row, yes in zip(run.demonstrations, chosen, strict=True)}
        return weights.means(run, step)

    bridge.make_policies = with_shadow
    bridge.sft_pass = both_passes
    probe(measure)


def useful_ones(run: bridge.Run, weights: Weights) -> list[bool]:
    """The useful demonstrations: the most that any choice can bring."""
    return [not weights.is_useless[str(row)] for row in run.demonstrations]


def likelihoods(run: bridge.Run) -> np.ndarray:
    """[N] log π per token of each demonstration under the base model, which the policy is at step 0."""
    rows = run.demonstrations
    with torch.no_grad():
        logp, _ = response_logprobs(run.m.policy, rows)
    return np.array([x.mean().item() for x in logp.split([len(response) for _, response in rows])])


def likely_ones(run: bridge.Run, weights: Weights, by_source: bool = False) -> list[bool]:
    """The demonstrations that the base model finds likely.

    by_source: all demonstrations of a source have the mean of its scores. The threshold needs no gold: of all
    thresholds it leaves the least variance within the two sets (Otsu 1979).
    """
    score = likelihoods(run)
    if by_source:
        source = np.array([d.source for d in run.env.task.demonstrations])
        score = np.array([score[source == own].mean() for own in source])
    thresholds = np.unique(score)[1:]
    within = []
    for threshold in thresholds:
        low = score[score < threshold]
        high = score[score >= threshold]
        within.append(len(low) * low.var() + len(high) * high.var())
    return (score >= thresholds[np.argmin(within)]).tolist()


def likelier_half(run: bridge.Run, weights: Weights) -> list[bool]:
    """The likelier half of the demonstrations: the filter is told how many are useless."""
    score = likelihoods(run)
    return (score >= np.median(score)).tolist()


SWAPPED: dict[str, Callable[[], None]] = {  # kinds of runs of bench/compare.py, for --method mix_lora
    "weighed": lambda: install(Weights(rate=0.3)),
    "weighed_0.03": lambda: install(Weights(rate=0.03)),
    "weighed_0.1": lambda: install(Weights(rate=0.1)),
    "weighed_1": lambda: install(Weights(rate=1.0)),
    "useful": lambda: install(Weights(rate=0.0), useful_ones),
    "likely": lambda: install(Weights(rate=0.0), likely_ones),
    "likelier_half": lambda: install(Weights(rate=0.0), likelier_half),
    "likely_sources": lambda: install(Weights(rate=0.0), partial(likely_ones, by_source=True)),
}
