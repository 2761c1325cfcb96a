"""Kinds of runs of bench/compare.py: what is measured, or done otherwise, beside bridge.py's own training.

Each function changes bridge.py in this process only, which then makes one run.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from measure import ROOT  # noqa: F401  puts the project's modules on the path
from torch import nn

import bridge
from evaluate import Sampling, answer
from grading.scores import by_problem, verdicts
from tasks.task import Problem


def sampled_rewards(run: bridge.Run, model: nn.Module, per_group: int, samples: int) -> list[list[int]]:
    """The right answers among `samples` at temperature 1, for the first problems of each group: [groups][problems]."""
    run.env.sampler.refresh(model)
    groups: dict[str, list[Problem]] = {}
    for problem in run.env.task.evaluation:
        groups.setdefault(problem.group, []).append(problem)
    chosen = [problem for problems in groups.values() for problem in problems[:per_group]]
    sampling = Sampling(temperature=1.0, samples=samples, max_new_tokens=run.s.max_new_tokens)
    keys = [(1, i) for i in range(len(chosen))]  # equal for all models, so that their differences vary less
    graded = answer(run.env.sampler, run.env.tokenizer, run.env.task, chosen, keys, sampling)
    return [[int(row.sum()) for row in verdicts(problems)] for problems in by_problem(graded).values()]


def probe(measure: Callable[[bridge.Run, int], dict | None]) -> None:
    """Lets each evaluation of the run measure something too, for the record."""
    evaluate = bridge.evaluate_policies

    def both(run: bridge.Run, step: int) -> None:
        evaluate(run, step)
        if measured := measure(run, step):
            run.folder.log("probe", step, measured)

    bridge.evaluate_policies = both


def right_of_many(run: bridge.Run, step: int) -> dict | None:
    """For pass@k: of 16 answers to each of 20 problems of every group, the right ones, at the last step."""
    return dict(right=sampled_rewards(run, run.m.policy, 20, 16)) if step == run.s.total_steps else None


def effect_of_w() -> None:
    """Measures J_RL of θ and of θ̂ with w, with the w of the evaluation before, and without w."""
    before: dict[str, list[torch.Tensor]] = {}

    def measure(run: bridge.Run, step: int) -> dict:
        now, rewards = [p.detach().clone() for p in run.m.w.values()], {}
        adapters = dict(w=now, w_before=before.get("w", now), none=[torch.zeros_like(p) for p in now])
        for name, values in adapters.items():
            for p, value in zip(run.m.w.values(), values, strict=True):
                p.data.copy_(value)
            for base, model in (("theta", run.m.policy), ("theta_hat", run.m.shadow)):
                right = sampled_rewards(run, model, 100, 2)
                rewards[f"{base},{name}"] = sum(map(sum, right)) / sum(map(len, right)) / 2
        for p, value in zip(run.m.w.values(), now, strict=True):
            p.data.copy_(value)
        before["w"] = now
        return rewards

    probe(measure)


def gauss_seidel() -> None:
    """w's gradient is taken at θ^{k+1} and θ̂^{k+1}, the other reading of Algorithm 2."""
    gradients, step = bridge.bilevel_gradients, bridge.clip_and_step
    given: list = []

    def remember(*args) -> dict:
        given[:] = args
        return gradients(*args)

    def in_turn(m: bridge.Policies, stats: dict, s: bridge.Settings, lam: float = 1.0) -> dict:
        others = {name: optimizer for name, optimizer in m.optimizers.items() if name != "w"}
        norms = step(replace(m, optimizers=others), stats, s, lam)
        gradients(*given)
        norms |= step(replace(m, optimizers={"w": m.optimizers["w"]}), stats, s, lam)
        for optimizer in others.values():
            optimizer.zero_grad()
        return norms

    bridge.bilevel_gradients, bridge.clip_and_step = remember, in_turn
    probe(right_of_many)


KINDS: dict[str, Callable[[], None] | None] = {
    "tuning": None,
    "final": lambda: probe(right_of_many),
    "effect": effect_of_w,
    "gauss_seidel": gauss_seidel,
}
