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
import grpo
import rollout
from evaluate import Sampling, answer, evaluate
from grading.scores import by_problem, verdicts
from logprob import response_logprobs
from ops.packed import Row
from rewards import is_correct
from tasks.task import Problem, Stream

SHIFT = 0.05  # length of the small step of w
HELD_OUT = 10  # every tenth demonstration validates SFT
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


def without_w() -> None:
    """Measures the greedy accuracy of θ and of θ̂ without w at the end."""

    def measure(run: bridge.Run, step: int) -> dict:
        measured = {}
        if run.m.w and step == run.s.total_steps:
            with_w = [p.detach().clone() for p in run.m.w.values()]
            for p in run.m.w.values():
                p.data.zero_()  # as in effect_of_w
            for name, model in (("theta", run.m.policy), ("theta_hat", run.m.shadow)):
                if model is not None:
                    run.env.sampler.refresh(model)
                    sets = run.env.sampler, run.env.tokenizer, run.env.task, run.s.max_new_tokens
                    measured[f"{name} without w"] = evaluate(*sets)[0]["average"]
            for p, value in zip(run.m.w.values(), with_w, strict=True):
                p.data.copy_(value)
        return measured

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


def gradients_of_w(shadow_steps: int = 1, shuffled: bool = False) -> None:
    """Measures w's gradients, and gives θ̂ more steps of RL, or w a θ̂ whose rewards carry no information.

    shadow_steps: RL steps of θ̂ per iteration, each on rollouts of its own. shuffled: w's term of θ̂ has the rewards of
    each group in another order; θ̂ itself has the true ones.
    """
    policies: dict[str, bridge.Policies] = {}
    seen: dict[str, list[Tensor]] = {}
    make_policies = bridge.make_policies
    sample_rollouts = bridge.sample_rollouts
    rl_pass = bridge.rl_pass
    bilevel_gradients = bridge.bilevel_gradients
    order = torch.Generator().manual_seed(0)

    def remember(model: nn.Module, s: bridge.Settings, *rest) -> bridge.Policies:
        policies["m"] = make_policies(model, s, *rest)
        return policies["m"]

    def w_gradients() -> list[Tensor]:
        return [p.grad.clone() for p in policies["m"].w.values()]

    def more_steps(env, prompt_order, policy, shadow, k, timer):
        """θ̂'s steps before its last one of the iteration, on prompts from an order of their own."""
        m = policies["m"]
        count = len(env.task.problems)
        extra = Stream(count, (env.s.seed, 2))
        extra.position = k * (shadow_steps - 1) * env.s.prompts_per_step
        for _ in range(shadow_steps - 1):
            env.sampler.refresh(shadow)
            draws = extra.take(env.s.prompts_per_step)
            groups = rollout.sample_groups(env, draws, k + 1_000_000)  # other random numbers than the policy's
            own = rollout.make_rollouts(groups, env.s, rollout.statistics(groups))
            for optimizer in m.optimizers.values():
                optimizer.zero_grad()
            rl_pass(shadow, own, None, None, env.s)
            theta_hat = m.parameters["theta_hat"]
            torch.nn.utils.clip_grad_norm_(theta_hat, env.s.grad_clip)
            m.optimizers["theta_hat"].step()
        return sample_rollouts(env, prompt_order, policy, shadow, k, timer)

    def pass_and_gradients(model: nn.Module, rollouts, *rest) -> bridge.RLPass:
        m = policies["m"]
        if model is not m.shadow:
            results = rl_pass(model, rollouts, *rest)
            seen["policy"] = w_gradients()
            return results
        of_w = None
        if shuffled:
            rl_pass(model, with_shuffled_rewards(rollouts, order), *rest)
            of_w = w_gradients()
            for p in [*m.parameters["theta_hat"], *m.w.values()]:
                p.grad = None
        results = rl_pass(model, rollouts, *rest)
        if of_w is not None:
            for p, gradient in zip(m.w.values(), of_w, strict=True):
                p.grad = gradient
        seen["shadow"] = w_gradients()
        return results

    def with_numbers(m: bridge.Policies, rollouts, rollouts_hat, demonstrations, sft_weight, rl_weight, *rest):
        update = bilevel_gradients(m, rollouts, rollouts_hat, demonstrations, sft_weight, rl_weight, *rest)
        norm = torch.nn.utils.get_total_norm
        ours = [p.grad for p in m.w.values()]  # eq. (11)
        without = [p + rl_weight * hat for p, hat in zip(ours, seen["shadow"], strict=True)]  # mix_lora's
        inner = sum((a * b).sum() for a, b in zip(ours, without, strict=True))
        update.stats["w_norm_policy"] = norm(seen["policy"]).item()
        update.stats["w_norm_shadow"] = norm(seen["shadow"]).item()
        update.stats["w_cosine"] = (inner / (norm(ours) * norm(without))).item()
        return update

    bridge.make_policies = remember
    bridge.sample_rollouts = more_steps
    bridge.rl_pass = pass_and_gradients
    bridge.bilevel_gradients = with_numbers
    probe(right_of_many)


def with_shuffled_rewards(rollouts: rollout.Rollouts, order: torch.Generator) -> rollout.Rollouts:
    """The rollouts with the rewards of each group in a random order, and the advantages of these rewards."""
    places = torch.rand(rollouts.reward.shape, generator=order).argsort(1)  # [P, G]
    reward = rollouts.reward.gather(1, places)
    lengths = torch.tensor([len(response) for _, response in rollouts.rows])
    advantage = grpo.group_advantages(reward).flatten().repeat_interleave(lengths)
    return replace(rollouts, reward=reward, advantage=advantage.to(rollouts.advantage))


def split() -> None:
    """θ takes RL alone and w SFT alone, without θ̂: the parameters as LSPO splits them (arXiv 2607.27787)."""
    gradients = bridge.bilevel_gradients

    def one_loss_each(m, rollouts, rollouts_hat, demonstrations, sft_weight, rl_weight, *rest) -> bridge.Update:
        update = gradients(m, rollouts, rollouts_hat, [], 0.0, rl_weight, *rest)
        of_theta = [p.grad for p in m.parameters["theta"]]
        of_sft = gradients(m, None, None, demonstrations, sft_weight, 0.0, *rest)
        for p, gradient in zip(m.parameters["theta"], of_theta, strict=True):
            p.grad = gradient
        stats = update.stats | of_sft.stats
        return replace(update, stats=stats, demonstrations=demonstrations, nll=of_sft.nll)

    bridge.bilevel_gradients = one_loss_each


def averaged() -> None:
    """θ takes the mean of an update by RL and one by SFT, each with its own Adam state (arXiv 2606.04272).

    Changes the method `alternating`: both gradients are taken at the same θ, and each optimizer has the rate α/2.
    """
    make_optimizer = bridge.make_optimizer
    of_rl: list[Tensor] = []

    def with_half_rate(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        return make_optimizer(parameters, rate / 2)

    def step_both(m: bridge.Policies, stats: dict, s: bridge.Settings, rl_weight: float = 1.0):
        theta = m.parameters["theta"]
        norm = torch.nn.utils.clip_grad_norm_(theta, s.grad_clip)
        if rl_weight:  # the first update of a step: θ waits for the second
            of_rl[:] = [p.grad.clone() for p in theta]
        else:
            m.optimizers["theta_sft"].step()
            for p, gradient in zip(theta, of_rl, strict=True):
                p.grad = gradient
            m.optimizers["theta"].step()  # without weight decay its step does not depend on θ
        for optimizer in m.optimizers.values():
            optimizer.zero_grad()
        return {"grad_norm_theta": norm.item()}, True

    bridge.make_optimizer = with_half_rate
    bridge.clip_and_step = step_both


def switched() -> None:
    """Lets sft_rl begin RL at the first step whose SFT loss on held-out demonstrations is within 2 % of its minimum.

    The rule of RETU (arXiv 2512.11470). A stage of sft_steps finds that step; then the run begins anew and repeats it.
    """
    set_up = bridge.set_up

    def held_out(run: bridge.Run) -> list[Row]:
        """Takes every tenth demonstration out of D_SFT."""
        rows = run.demonstrations[::HELD_OUT]
        run.demonstrations = [row for i, row in enumerate(run.demonstrations) if i % HELD_OUT]
        run.demonstration_order = Stream(len(run.demonstrations), (run.s.seed, 1))
        return rows

    def with_switch(s: bridge.Settings, folder: bridge.RunFolder) -> bridge.Run:
        run = set_up(s, folder)
        validation = held_out(run)
        losses = []
        for k in range(s.sft_steps):
            demonstrations, _ = run.demonstrations_of_update(None)
            update = bridge.bilevel_gradients(run.m, None, None, demonstrations, 1.0, 0.0, s, bridge.Timer(k + 1))
            bridge.clip_and_step(run.m, update.stats, s)
            with torch.no_grad():
                logp, _ = response_logprobs(run.m.policy, validation)
            losses.append(-logp.mean().item())
        run = set_up(replace(s, sft_steps=switch_step(losses)), folder)
        held_out(run)
        return run

    def measure(run: bridge.Run, step: int) -> dict | None:
        right = right_of_many(run, step)
        return right and right | {"sft steps": run.s.sft_steps}

    bridge.set_up = with_switch
    probe(measure)


def switch_step(losses: list[float]) -> int:
    """The number of SFT steps after which the validation loss is first within 2 % of its minimum.

    >>> switch_step([2.0, 1.1, 1.01, 1.0, 1.3])
    3
    """
    return next(step for step, loss in enumerate(losses, 1) if loss <= 1.02 * min(losses))


def two_threads() -> None:
    """Computes with two threads: sums have another order, so rounding differs."""
    torch.set_num_threads(2)
    probe(right_of_many)


def measured(change: Callable[[], None]) -> Callable[[], None]:
    """A kind of run that counts right answers at the end, too."""

    def changed() -> None:
        change()
        probe(right_of_many)

    return changed


def disjoint() -> None:
    """θ and θ̂ lack the matrices that w adapts, so θ cannot undo w."""
    base_parameters = bridge.lora.base_parameters

    def not_adapted(model: nn.Module) -> dict[str, nn.Parameter]:
        adapted = set()
        for name, module in model.named_modules():
            if isinstance(module, bridge.lora.LoRALinear):
                module.base.weight.requires_grad_(False)
                adapted.add(f"{name}.weight")
        return {name: p for name, p in base_parameters(model).items() if name not in adapted}

    bridge.lora.base_parameters = not_adapted
    probe(right_of_many)


def gain(g_rl: list[Tensor], g_rl_hat: list[Tensor]) -> list[Tensor]:
    """The gradient of −(J_RL(θ,w) − J_RL(θ̂,w))."""
    return [a - b for a, b in zip(g_rl, g_rl_hat, strict=True)]


KINDS: dict[str, Callable[[], None] | None] = {
    "tuning": None,  # no evaluation but the last
    "cost": None,  # the same, one run at a time
    "final": lambda: probe(right_of_many),
    "effect": effect_of_w,
    "without_w": without_w,
    "gauss_seidel": gauss_seidel,
    "by_gain": lambda: selected(gain),
    "by_gain_over_visits": lambda: selected(gain, visits=True),
    "by_reward": lambda: selected(lambda g_rl, _: g_rl),
    "by_truth": lambda: selected(None),
    "inner_1": gradients_of_w,
    "inner_4": lambda: gradients_of_w(shadow_steps=4),
    "inner_8": lambda: gradients_of_w(shadow_steps=8),
    "inner_shuffled": lambda: gradients_of_w(shuffled=True),
    "disjoint": disjoint,
    "split": measured(split),
    "split trial": split,
    "averaged": measured(averaged),
    "averaged trial": averaged,
    "switched": switched,
    "two_threads": two_threads,
}
