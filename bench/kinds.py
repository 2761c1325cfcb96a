"""Kinds of runs of bench/compare.py: extra measurements, and changes of bridge.py's update.

Each function replaces functions of bridge.py in this process, which then makes one run.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from measure import ROOT  # noqa: F401  puts the project's modules on the path
from torch import Tensor, nn

import bridge
from evaluate import Sampling, answer
from grading.scores import by_problem, verdicts
from logprob import response_logprobs
from ops.packed import Row
from rewards import is_correct
from tasks.task import Problem

SHIFT = 0.05  # length of the small step of w
KINDS_OF_ROWS = {"useful": True, "useless": False}


def sampled_rewards(run: bridge.Run, model: nn.Module, per_group: int, samples: int) -> list[list[int]]:
    """Right answers among `samples` at temperature 1, for the first problems of each group: [groups][problems]."""
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
    """Adds a measurement to each evaluation of the run. The results go to probe.jsonl."""
    evaluate = bridge.evaluate_policies

    def both(run: bridge.Run, step: int) -> None:
        evaluate(run, step)
        if measured := measure(run, step):
            run.folder.log("probe", step, measured)

    bridge.evaluate_policies = both


def right_of_many(run: bridge.Run, step: int) -> dict | None:
    """Counts right answers at the last step, for pass@k: 16 samples, 20 problems of every group."""
    return dict(right=sampled_rewards(run, run.m.policy, 20, 16)) if step == run.s.total_steps else None


def effect_of_w() -> None:
    """Measures J_RL of θ and of θ̂ at each evaluation: with w, with the last evaluation's w, and with w = 0."""
    before: dict[str, list[Tensor]] = {}

    def set_w(run: bridge.Run, values: list[Tensor]) -> None:
        for p, value in zip(run.m.w.values(), values, strict=True):
            p.data.copy_(value)

    def measure(run: bridge.Run, step: int) -> dict:
        now, rewards = [p.detach().clone() for p in run.m.w.values()], {}
        adapters = dict(w=now, w_before=before.get("w", now), none=[torch.zeros_like(p) for p in now])
        for name, values in adapters.items():
            set_w(run, values)
            for base, model in (("theta", run.m.policy), ("theta_hat", run.m.shadow)):
                right = sampled_rewards(run, model, 100, 2)
                rewards[f"{base},{name}"] = sum(map(sum, right)) / sum(map(len, right)) / 2
        set_w(run, now)
        before["w"] = now
        return rewards

    probe(measure)


def gauss_seidel() -> None:
    """Takes w's gradient at θ^{k+1} and θ̂^{k+1}, not at iterate k: the other reading of Algorithm 2."""
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


def selected(direction: Callable[[list[Tensor], list[Tensor]], list[Tensor]] | None, visits: bool = False) -> None:
    """SFT, of θ and of w, takes only demonstrations that a small step of w along `direction` makes more likely.

    direction: function of (∇_w L_RL(θ,w), ∇_w L_RL(θ̂,w)); w steps against its result. None takes the demonstrations
        whose answer is right.
    visits: sum the changes over all visits of a demonstration instead of using the change of this step.

    To first order the change of log π is the inner product of the demonstration's gradient of w with the direction. Two
    forward passes measure it for all demonstrations. If no demonstration is chosen, all are taken.
    """
    take, sft_pass, taken, w, kept = bridge.parallel.take_gradients, bridge.sft_pass, [], [], []

    def remember(parameters) -> list[Tensor]:
        w[:] = parameters
        taken.append(take(w))
        return taken[-1]

    def shift(step: list[Tensor], sign: float) -> None:
        for p, d in zip(w, step, strict=True):
            p.data.add_(d, alpha=sign)

    def sft_pass_of_some(model: nn.Module, demonstrations: list[Row], weight: float, s: bridge.Settings) -> float:
        if direction is None:
            useful = [useful_rows[str(row)] for row in demonstrations]
        else:
            step = direction(*taken[-2:])
            scale = SHIFT / max(torch.nn.utils.get_total_norm(step).item(), 1e-12)
            lengths, logps = [len(response) for _, response in demonstrations], []
            for sign in (0.0, -scale):
                shift(step, sign)
                with torch.no_grad():
                    logps.append(response_logprobs(model, demonstrations)[0].split(lengths))
                shift(step, -sign)
            for row, before, after in zip(demonstrations, *logps, strict=True):
                change[str(row)] = change[str(row)] * visits + (after.mean() - before.mean()).item()
            useful = [change[str(row)] > 0 for row in demonstrations]
        chosen = [row for row, yes in zip(demonstrations, useful, strict=True) if yes]
        kept.extend((useful_rows[str(row)], yes) for row, yes in zip(demonstrations, useful, strict=True))
        return sft_pass(model, chosen or demonstrations, weight, s)

    useful_rows: dict[str, bool] = {}
    change: dict[str, float] = defaultdict(float)

    def shares(run: bridge.Run, step: int) -> dict:
        """Of the useful and of the useless demonstrations since the last evaluation: the share that was taken."""
        if not useful_rows:  # at step 0
            pairs = zip(run.demonstrations, run.env.task.demonstrations, strict=True)
            useful_rows.update((str(row), is_correct(d.response, d.answer).correct) for row, d in pairs)
        of_kind = {name: [yes for useful, yes in kept if useful == kind] for name, kind in KINDS_OF_ROWS.items()}
        kept.clear()
        return {f"{name} taken": sum(y) / len(y) for name, y in of_kind.items() if y}

    bridge.parallel.take_gradients, bridge.sft_pass = remember, sft_pass_of_some
    probe(shares)


def gain(g_rl: list[Tensor], g_rl_hat: list[Tensor]) -> list[Tensor]:
    """The gradient of −(J_RL(θ,w) − J_RL(θ̂,w))."""
    return [a - b for a, b in zip(g_rl, g_rl_hat, strict=True)]


KINDS: dict[str, Callable[[], None] | None] = {
    "tuning": None,  # no evaluation but the last
    "cost": None,  # the same, one run at a time
    "final": lambda: probe(right_of_many),
    "effect": effect_of_w,
    "gauss_seidel": gauss_seidel,
    "by_gain": lambda: selected(gain),
    "by_gain_over_visits": lambda: selected(gain, visits=True),
    "by_reward": lambda: selected(lambda g_rl, _: g_rl),
    "by_truth": lambda: selected(None),
}
