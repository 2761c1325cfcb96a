"""The levels swapped (weighed.py): filters of demonstrations to compare the method `weighed` with, and its weights.

A filter chooses once, before training: SFT of the method `mix` then gives the demonstrations that it refuses the weight
0. A run of `weighed` measures the mean ω of the useful and of the useless demonstrations at each evaluation.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from kinds import measured, probe
from torch import Tensor, nn

import bridge
from logprob import response_logprobs
from ops.packed import Row
from rewards import is_correct
from settings import Settings
from tasks.task import Problem


def is_useless(run: bridge.Run) -> list[bool]:
    """Of each demonstration: what its task states, or whether its answer is wrong."""
    useless = []
    for d in run.env.task.demonstrations:
        stated = d.extra.get("useless")
        useless.append(not is_correct(d.response, d.answer).correct if stated is None else stated)
    return useless


def mean_weights(run: bridge.Run, omega: list[float]) -> dict[str, float]:
    """The mean of the weights of the useful, and of the useless demonstrations."""
    means = {}
    useless = is_useless(run)
    for name, kind in (("useful", False), ("useless", True)):
        values = [value for value, of_kind in zip(omega, useless, strict=True) if of_kind == kind]
        if values:
            means[f"weight {name}"] = sum(values) / len(values)
    return means


def measure_omega() -> None:
    """Measures the weights of the method `weighed` at each evaluation."""

    def measure(run: bridge.Run, step: int) -> dict:
        omega = run.m.omega.tolist()
        return mean_weights(run, [omega[source] for source in run.sources.number])

    probe(measure)


def frozen_shadow() -> None:
    """Leaves θ̂ at the base model: ω then compares θ with the model before training, which has imitated nothing."""
    clip_and_step = bridge.clip_and_step

    def without_theta_hat(m: bridge.Policies, *rest) -> tuple[dict[str, float], bool]:
        for group in m.optimizers["theta_hat"].param_groups:
            group["lr"] = 0.0
        return clip_and_step(m, *rest)

    bridge.clip_and_step = without_theta_hat
    measure_omega()


def keep_only(choose: Callable[[bridge.Run], list[bool]]) -> None:
    """SFT gives the weight 0 to the demonstrations that `choose`, called at step 0, refuses."""
    sft_pass = bridge.sft_pass
    chosen: dict[str, float] = {}

    def on_chosen(model: nn.Module, rows: list[Row], weight: float, s: Settings, *_) -> Tensor:
        lengths = torch.tensor([len(response) for _, response in rows])
        omega = torch.tensor([chosen[str(row)] for row in rows])
        return sft_pass(model, rows, weight, s, omega.repeat_interleave(lengths))

    def measure(run: bridge.Run, step: int) -> dict | None:
        if step > 0:
            return None
        weights = [float(yes) for yes in choose(run)]
        chosen.update(zip(map(str, run.demonstrations), weights, strict=True))
        return mean_weights(run, weights)

    bridge.sft_pass = on_chosen
    probe(measure)


def useful_ones(run: bridge.Run) -> list[bool]:
    """The useful demonstrations: the most that a choice can bring."""
    return [not useless for useless in is_useless(run)]


def accepted_ones(run: bridge.Run) -> list[bool]:
    """The demonstrations whose own answer the verifier accepts: what a user can do without a method."""
    task = run.env.task
    return [task.verdict(d.response, Problem(d.question, d.answer or "")).correct for d in task.demonstrations]


def likelihoods(run: bridge.Run) -> np.ndarray:
    """[N] log π per token of each demonstration under the base model, which the policy is at step 0."""
    rows = run.demonstrations
    with torch.no_grad():
        logp, _ = response_logprobs(run.m.policy, rows)
    return np.array([x.mean().item() for x in logp.split([len(response) for _, response in rows])])


def likely_ones(run: bridge.Run, by_source: bool = False) -> list[bool]:
    """The demonstrations that the base model finds likely.

    by_source: all demonstrations of a source have the mean of its scores. The threshold needs no gold: of all
    thresholds it leaves the least variance within the two sets (Otsu 1979).
    """
    score = likelihoods(run)
    if by_source:
        source = np.array(run.sources.number)
        score = np.array([score[source == own].mean() for own in source])
    thresholds = np.unique(score)[1:]
    within = []
    for threshold in thresholds:
        low = score[score < threshold]
        high = score[score >= threshold]
        within.append(len(low) * low.var() + len(high) * high.var())
    return (score >= thresholds[np.argmin(within)]).tolist()


SWAPPED: dict[str, Callable[[], None]] = {  # kinds of runs of bench/compare.py
    "omega": measure_omega,  # of weighed
    "frozen": frozen_shadow,  # of weighed
    "useful": partial(keep_only, useful_ones),  # of mix
    "accepted": measured(partial(keep_only, accepted_ones)),  # of any method
    "accepted trial": partial(keep_only, accepted_ones),
    "likely": partial(keep_only, likely_ones),
    "likely_sources": partial(keep_only, partial(likely_ones, by_source=True)),
}
