"""Kinds of runs of bench/compare.py: extra measurements, and changes of bridge.py's update.

Each function replaces functions of bridge.py in this process, which then makes one run.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

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
    gradients = bridge.bilevel_gradients
    step = bridge.clip_and_step
    given: list = []

    def remember(*args) -> bridge.Update:
        given[:] = args
        return gradients(*args)

    def in_turn(m: bridge.Policies, stats: dict, s: bridge.Settings, rl_weight: float = 1.0):
        of_w = {"w": m.optimizers["w"]}
        others = {name: optimizer for name, optimizer in m.optimizers.items() if name != "w"}
        norms, stepped = step(replace(m, optimizers=others), stats, s, rl_weight)
        gradients(*given)
        norms_of_w, w_stepped = step(replace(m, optimizers=of_w), stats, s, rl_weight)
        for optimizer in others.values():
            optimizer.zero_grad()
        return norms | norms_of_w, stepped and w_stepped

    bridge.bilevel_gradients = remember
    bridge.clip_and_step = in_turn
    probe(right_of_many)


@dataclass
class Selection:
    """SFT, of θ and of w, takes only demonstrations that a small step of w along `direction` makes more likely.

    To first order the change of log π is the inner product of the demonstration's gradient of w with the direction. Two
    forward passes measure it for all demonstrations. If no demonstration is chosen, all are taken.
    """

    # of (∇_w L_RL(θ,w), ∇_w L_RL(θ̂,w)); w steps against its result. None takes the demonstrations that are right.
    direction: Callable[[list[Tensor], list[Tensor]], list[Tensor]] | None
    visits: bool = False  # sum the changes over all visits of a demonstration instead of using that of this step
    m: bridge.Policies | None = None  # of the update in progress
    g_rl: dict[str, list[Tensor]] = field(default_factory=dict)  # ∇_w L_RL at the policy and at the shadow
    is_right: dict[str, bool] = field(default_factory=dict)  # by demonstration
    change: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # of log π, by demonstration
    taken: list[tuple[bool, bool]] = field(default_factory=list)  # (is right, was taken) since the last evaluation

    def change_of_logp(self, demonstrations: list[Row]) -> list[float]:
        """How much a small step of w raises the mean log π of each demonstration's tokens."""
        direction = self.direction(self.g_rl["policy"], self.g_rl["shadow"])
        scale = SHIFT / max(torch.nn.utils.get_total_norm(direction).item(), 1e-12)
        lengths = [len(response) for _, response in demonstrations]
        means = []
        for size in (0.0, -scale):
            self.shift_w(direction, size)
            with torch.no_grad():
                logp, _ = response_logprobs(self.m.policy, demonstrations)
            means.append([of_one.mean() for of_one in logp.split(lengths)])
            self.shift_w(direction, -size)
        before, after = means
        return [(b - a).item() for a, b in zip(before, after, strict=True)]

    def shift_w(self, direction: list[Tensor], size: float) -> None:
        for p, d in zip(self.m.w.values(), direction, strict=True):
            p.data.add_(d, alpha=size)

    def choose(self, demonstrations: list[Row]) -> list[Row]:
        if self.direction is None:
            useful = [self.is_right[str(row)] for row in demonstrations]
        else:
            for row, change in zip(demonstrations, self.change_of_logp(demonstrations), strict=True):
                before = self.change[str(row)] if self.visits else 0.0
                self.change[str(row)] = before + change
            useful = [self.change[str(row)] > 0 for row in demonstrations]
        self.taken += [(self.is_right[str(row)], yes) for row, yes in zip(demonstrations, useful, strict=True)]
        chosen = [row for row, yes in zip(demonstrations, useful, strict=True) if yes]
        return chosen or demonstrations

    def shares(self, run: bridge.Run, step: int) -> dict:
        """Of the useful and of the useless demonstrations since the last evaluation: the share that was taken."""
        if not self.is_right:  # at step 0
            for row, d in zip(run.demonstrations, run.env.task.demonstrations, strict=True):
                self.is_right[str(row)] = is_correct(d.response, d.answer).correct
        measured = {}
        for name, kind in KINDS_OF_ROWS.items():
            taken = [yes for is_right, yes in self.taken if is_right == kind]
            if taken:
                measured[f"{name} taken"] = sum(taken) / len(taken)
        self.taken.clear()
        return measured


def selected(direction, visits: bool = False) -> None:
    """Lets SFT choose among its demonstrations; see Selection."""
    selection = Selection(direction, visits)
    gradients = bridge.bilevel_gradients
    rl_pass = bridge.rl_pass
    sft_pass = bridge.sft_pass

    def with_policies(m: bridge.Policies, *rest) -> bridge.Update:
        selection.m = m
        return gradients(m, *rest)

    def remember_gradient(model: nn.Module, *rest) -> bridge.RLPass:
        seen = rl_pass(model, *rest)  # w's .grad is of this pass alone: each pass's is taken out
        of = "policy" if model is selection.m.policy else "shadow"
        selection.g_rl[of] = [p.grad.clone() for p in selection.m.w.values()]
        return seen

    def sft_pass_of_some(model: nn.Module, demonstrations: list[Row], *rest) -> Tensor:
        return sft_pass(model, selection.choose(demonstrations), *rest)

    bridge.bilevel_gradients = with_policies
    bridge.rl_pass = remember_gradient
    bridge.sft_pass = sft_pass_of_some
    probe(selection.shares)


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
