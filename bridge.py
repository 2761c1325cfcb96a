"""BRIDGE: supervised fine-tuning and reinforcement learning as one bilevel problem (arXiv 2509.06948).

Three sets of parameters: θ, the base model, trained in full; w, a LoRA adapter; θ̂, a copy of θ that takes RL steps
only. The policy is π(·|x; θ, w). Beside SFT, w ascends the cooperative gain J_RL(θ,w) − J_RL(θ̂,w): how much more reward
w earns on θ than on θ̂. One iteration k, every gradient taken at iterate k (Algorithm 2 of the paper):

    1   sample demonstrations from D_SFT and prompts from D_RL; rollouts from π(θ,w); rewards
    2-3 ∇J_SFT(θ,w) and ∇J_RL(θ,w), for θ and w at once; ∇J_RL(θ̂,w), for θ̂ and w at once
    4   θ ← θ + α[(1−λ)∇_θ J_SFT + λ∇_θ J_RL]                                                            (8)
    5   θ̂ ← θ̂ + α ∇_θ̂ J_RL(θ̂,w)                                                                        (10)
    6   w ← w + β[(1−λ)∇_w J_SFT + λ(∇_w J_RL(θ,w) − ∇_w J_RL(θ̂,w))]                                    (11)

The code minimises L = −J. The other methods (--method) are the same loop with other weights, see `updates`; in the
method `weighed` θ̂ takes SFT alone, and its upper variable is no adapter but ω, see weighed.py. Ranks share
the work; every rank has rollouts, gradients and statistics of the whole batch. [T]: all response tokens of the batch,
in order; [t]: those of a micro-batch, which the index t selects.
"""

import sys

from settings import METHODS, SettingError, Settings, parse, start_program

if __name__ == "__main__":
    start_program(parse)  # answers --help before torch is loaded

import copy
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor, nn
from tqdm import tqdm

import baselines
import grpo
import lora
import plot
import weighed
from evaluate import evaluate
from grpo import RLPass
from infra import checkpoint, export, memory, parallel, report, tokens
from infra.model import checkpoint_layers, pick_device
from infra.run import (
    RunFolder,
    StopSignal,
    Timer,
    alone,
    describe,
    one_line_errors,
    print0,
    stop_if_diverged,
    tracked,
)
from logprob import response_logprobs
from ops.decoder import share_storage_copy
from ops.packed import Row
from rollout import Environment, Rollouts, cooperative_gain, rl_statistics, sample_rollouts, shadow_statistics
from sampler import Sampler
from tasks.loading import card_facts, describe_data, load_training
from tasks.task import Sources, Stream


def updates(s: Settings, k: int) -> list[tuple[float, float]]:
    """The updates of the method at step k, in order, each as (weight of L_SFT, weight of L_RL).

    Raises SettingError for a method without a case.
    """
    match s.method:
        case "sft":
            return [(1.0, 0.0)]
        case "rl" | "luffy":
            return [(0.0, 1.0)]
        case "srft" | "hpt":
            return [(s.mu, 1.0)]
        case "chord":
            mu = baselines.chord_mu(k, 0, s.steps, s.chord_peak, s.chord_valley)
            return [(mu, 1 - mu)]
        case "sft_rl":
            return [(1.0, 0.0)] if k < s.sft_steps else [(0.0, 1.0)]
        case "alternating":  # Algorithm 1
            return [(0.0, 1.0), (1.0, 0.0)]
        case "mix":
            return [(s.mu / (1 + s.mu), 1 / (1 + s.mu))]  # μ:1, as weights that sum to 1
        case "mix_lora" | "no_meta" | "bridge" | "weighed":  # the weights of eq. (7), in eqs. (8) and (11)
            return [(1 - s.lam, s.lam)]
    raise SettingError(f"method {s.method} has no case in bridge.py:updates")


def sft_token_weights(s: Settings, logp: Tensor, entropy: Tensor, rows: list[Row]) -> Tensor:
    """The weight of each demonstration token in L_SFT, without a gradient.  logp, entropy [T] of the rows -> [T]"""
    if s.method == "chord" and s.chord_phi:
        return baselines.chord_phi(logp)
    if s.method == "srft":
        return baselines.srft_sft_weights(entropy, [len(response) for _, response in rows])
    return torch.ones_like(logp)


@dataclass
class Policies:
    """π(θ,w), its shadow π(θ̂,w) on the same w, and the optimizers of the sets of parameters."""

    policy: nn.Module
    shadow: nn.Module | None
    reference: nn.Module | None  # the initial model, if there is a KL term
    w: lora.Adapter  # empty for methods without an adapter
    optimizers: dict[str, torch.optim.Optimizer]  # theta; w, theta_hat, omega if present; theta_sft: a second one of θ
    omega: nn.Parameter | None = None  # [S] weights of the sources of demonstrations, for the method weighed

    @property
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """The sets of parameters that are clipped, by name: theta, and w and theta_hat if present."""
        sets = {name: optimizer.param_groups[0]["params"] for name, optimizer in self.optimizers.items()}
        sets.pop("theta_sft", None)  # θ again
        sets.pop("omega", None)
        return sets


def make_policies(model: nn.Module, s: Settings, sources: int = 1) -> Policies:
    """θ̂ := θ, and both share the adapter w. Raises SettingError if lora_targets match no layer.

    sources: number of sources of demonstrations, whose weights ω begin at 1.
    """
    method = METHODS[s.method]
    checkpoint_layers(model, s.checkpoint_layers)

    # θ̂ and π_ref begin as copies of θ. Sharding copies every slice, so there a copy may share the model's storage.
    sharded = s.shard and parallel.world_size() > 1
    copy_model = share_storage_copy if sharded else copy.deepcopy
    shadow = None
    if method.shadow:
        shadow = copy_model(model)
        shadow.requires_grad_(s.shadow_rollouts != "one_step")  # there θ̂ is written, not trained
    reference = None
    if s.kl_coef > 0:
        reference = copy_model(model).requires_grad_(False)

    # One w: both models point to the same tensors.
    w: lora.Adapter = {}
    if method.adapter:
        try:
            w = lora.create(model, s.lora_targets.split(","), s.lora_rank, s.seed, pick_device())
        except ValueError as error:
            raise SettingError(str(error)) from error
        lora.attach(model, w, s.lora_alpha / s.lora_rank)
        if shadow is not None:
            lora.attach(shadow, w, s.lora_alpha / s.lora_rank)

    # After w is attached, so that it stays whole: both models need it.
    if s.shard:
        parallel.shard(model, w.values())
        if shadow is not None:
            parallel.shard(shadow, w.values())
        if reference is not None:
            parallel.shard(reference, w.values(), train=False)

    theta = list(lora.base_parameters(model).values())
    optimizers = {"theta": make_optimizer(theta, s.alpha)}
    if method.adapter:
        optimizers["w"] = make_optimizer(list(w.values()), s.beta)
    if shadow is not None:
        theta_hat = list(lora.base_parameters(shadow).values())
        optimizers["theta_hat"] = make_optimizer(theta_hat, s.alpha)
    if method.two_optimizers:
        optimizers["theta_sft"] = make_optimizer(theta, s.alpha)
    omega = None
    if method.shadow_imitates:
        omega = nn.Parameter(torch.ones(sources))  # on the CPU, where sums are the same on every rank
        optimizers["omega"] = torch.optim.SGD([omega], lr=s.eta)
    return Policies(model, shadow, reference, w, optimizers, omega)


def make_optimizer(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)


def rl_pass(
    model: nn.Module,  # π(θ,w) or π(θ̂,w)
    rollouts: Rollouts,
    old_logp: Tensor | None,  # [T] log π_old; None: the model itself is π_old, and every ratio is 1
    reference: nn.Module | None,  # π_ref of the KL term
    s: Settings,
    ratio_cap: float | None = None,  # of the truncated surrogate; None: the clipped one
) -> RLPass:
    """Adds this rank's part of ∇L_RL to .grad; all ranks receive the results of all tokens."""
    dtype = getattr(torch, s.dtype)

    # Rows whose gradient is zero run without one, or not at all.
    trained, scored = rollouts.rows_to_run(has_kl=s.kl_coef > 0)
    weight = rollouts.weight  # [T]
    results = weight.new_zeros(len(fields(RLPass)), len(weight))  # [fields of RLPass, T]: one all-reduce for all
    seen = RLPass(*results)
    for with_gradient, chosen in ((True, trained), (False, scored)):
        for rows, t in parallel.batches(rollouts.rows, s, chosen):
            ref_logp = None
            if reference is not None:
                with torch.no_grad():
                    ref_logp, _ = response_logprobs(reference, rows, s.temperature, dtype)  # [t]
            # The policy is the sampler's: its log-probs are those at the sampling temperature.
            with torch.set_grad_enabled(with_gradient):
                logp, entropy = response_logprobs(model, rows, s.temperature, dtype)  # [t]
            old = logp.detach() if old_logp is None else old_logp[t]

            advantage = rollouts.advantage[t]
            is_demonstration = rollouts.is_demonstration[t]
            sample_weight = weight[t] * ~is_demonstration
            loss, terms = grpo.grpo_loss(
                logp, old, advantage, sample_weight, s.clip_of_method, ratio_cap, ref_logp, s.kl_coef
            )
            # LUFFY and SRFT: the demonstration in a group has a surrogate of its own, since no policy sampled it.
            if METHODS[s.method].joins_group:
                shaped = baselines.shaped_surrogate(logp, advantage)
                loss = loss - (weight[t] * is_demonstration * shaped).sum()

            if with_gradient:
                logp.retain_grad()  # ∂L_RL/∂log π, for the report
                loss.backward()
                seen.slope[t] = -logp.grad / weight[t].clamp(min=1e-30)
            seen.logp[t] = logp.detach()
            seen.entropy[t] = entropy.detach()
            seen.ratio[t] = terms.ratio
            seen.limited[t] = terms.limited.to(weight)
            seen.kl[t] = terms.kl
            seen.trained[t] = float(with_gradient)

    parallel.all_reduce([results])
    return seen


def sft_pass(
    model: nn.Module,
    demonstrations: list[Row],
    weight: float,
    s: Settings,
    omega: Tensor | None = None,  # [T] ω of each token's source; None: all weigh the same
) -> Tensor:
    """Adds this rank's part of weight·∇L_SFT to .grad; returns −log π of all response tokens [T].

    L_SFT is −J_SFT of eq. (1), with a mean over the tokens of the whole batch, weighed by ω, instead of the sum.
    """
    lengths = [len(response) for _, response in demonstrations]
    if omega is None:
        omega = torch.ones(sum(lengths), device=pick_device())
    # All micro-batches and ranks divide by the batch's weight: their gradients add up to that of the mean.
    total = omega.sum()
    nll = torch.zeros(sum(lengths), dtype=torch.float64, device=pick_device())
    for rows, t in parallel.batches(demonstrations, s):
        # Demonstrations are imitated at temperature 1, whatever the sampling temperature.
        logp, entropy = response_logprobs(model, rows, dtype=getattr(torch, s.dtype))  # [t]
        token_weights = sft_token_weights(s, logp, entropy, rows)  # [t]
        loss = -(omega[t] * token_weights * logp).sum() / total
        (weight * loss).backward()
        nll[t] = -logp.detach().to(nll)
    parallel.all_reduce([nll])
    return nll


def step_shadow_from_theta(m: Policies, s: Settings) -> None:
    """θ̂ := θ^k + α∇_θ J_RL(θ^k,w), eq. (10) as printed: θ's RL gradient from .grad, and a copy of θ's moments."""
    theta_hat = m.parameters["theta_hat"]
    optimizer = m.optimizers["theta_hat"]
    moments = m.optimizers["theta"].state
    # The step that θ's optimizer would make with the RL gradient alone, made on a copy
    for p, p_hat in zip(m.parameters["theta"], theta_hat, strict=True):
        p_hat.data.copy_(p.data)
        p_hat.grad = p.grad.clone()
        optimizer.state[p_hat] = {name: x.clone() for name, x in moments.get(p, {}).items()}
    parallel.all_reduce_gradients(theta_hat)
    norm = parallel.total_norm(p.grad for p in theta_hat)
    torch.nn.utils.clip_grads_with_norm_(theta_hat, s.grad_clip, norm)
    if norm.isfinite():  # else this update will be skipped
        optimizer.step()
    optimizer.zero_grad()
    optimizer.state.clear()  # the next step copies θ's moments again


@dataclass
class Update:
    """Metrics of one update, and its passes with their numbers per token."""

    stats: dict[str, float] = field(default_factory=dict)
    policy: RLPass | None = None  # over the rollouts
    shadow: RLPass | None = None  # over θ̂'s rollouts
    demonstrations: list[Row] = field(default_factory=list)
    nll: Tensor | None = None  # [T] −log π of the demonstrations' tokens


def bilevel_gradients(
    m: Policies,
    rollouts: Rollouts | None,  # None: no RL in this update
    rollouts_hat: Rollouts | None,  # θ̂'s own, or `rollouts` itself if they are shared
    demonstrations: list[Row],
    sft_weight: float,  # 1−λ
    rl_weight: float,  # λ
    s: Settings,
    timer: Timer,
    sources: Sequence[int] = (),  # of each demonstration, for the method weighed
) -> Update:
    """Writes the gradients of eqs. (8), (10) and (11), of losses, to the .grad of θ, θ̂ and w (weighed.py: and of ω).

    θ's two terms add up in .grad. w's three are taken out of .grad one after another, and combined at the end.
    """
    for optimizer in m.optimizers.values():
        optimizer.zero_grad()
    update = Update()
    # w's three gradients, zero where the method has no such term
    zeros = [torch.zeros_like(p) for p in m.w.values()]
    g_sft = zeros
    g_rl = zeros
    g_rl_hat = zeros

    if rl_weight:
        # On shared rollouts policy and shadow have one surrogate: while θ̂ = θ, their gradients are equal.
        shadow_of_rl = m.shadow is not None and METHODS[s.method].shadow_of_rl
        shared = shadow_of_rl and rollouts_hat is rollouts
        ratio_cap = None
        if shared and s.shadow_ratio_cap > 0:
            ratio_cap = s.shadow_ratio_cap

        # ∇L_RL(θ,w): θ's stays in .grad, w's is taken out.
        with timer("rl"):
            update.policy = rl_pass(m.policy, rollouts, rollouts.old_logp, m.reference, s, ratio_cap)
            update.stats |= rl_statistics(update.policy, rollouts)
            taken = parallel.take_gradients(m.w.values())
            if METHODS[s.method].w_takes_rl:
                g_rl = taken

        # ∇L_RL(θ̂,w): θ̂'s stays in .grad, which is eq. (10); w's is taken out.
        if shadow_of_rl:
            with timer("shadow"):
                if s.shadow_rollouts == "one_step":
                    step_shadow_from_theta(m, s)
                # π_old of shared rollouts is the policy before its first update on them, for θ̂, too.
                old_logp = rollouts_hat.old_logp
                if shared and old_logp is None:
                    old_logp = update.policy.logp
                update.shadow = rl_pass(m.shadow, rollouts_hat, old_logp, m.reference, s, ratio_cap)
                g_rl_hat = parallel.take_gradients(m.w.values())

                # What the report and the metrics show of the cooperative gain, eq. (12), and of its gradient
                gain = cooperative_gain(update.shadow, old_logp, rollouts, rollouts_hat)
                gain_gradient = [rl_weight * (rl - rl_hat) for rl, rl_hat in zip(g_rl, g_rl_hat, strict=True)]
                update.stats |= shadow_statistics(update.shadow)
                update.stats["cooperative_gain"] = gain
                update.stats["gain_grad_norm"] = parallel.total_norm(gain_gradient).item()

        for p in m.parameters["theta"]:
            p.grad.mul_(rl_weight)  # λ∇_θ L_RL(θ,w)

    # (1−λ)∇L_SFT(θ,w), the loss having the weight: added to θ's .grad, which is then eq. (8); w's is taken out.
    if sft_weight and demonstrations:
        with timer("sft"):
            update.demonstrations = demonstrations
            omega = None
            if m.omega is not None:
                lengths = torch.tensor([len(response) for _, response in demonstrations])
                source = torch.tensor(sources).repeat_interleave(lengths)  # [T]
                omega = m.omega.detach()[source].to(pick_device())
            update.nll = sft_pass(m.policy, demonstrations, sft_weight, s, omega)
            update.stats["sft_nll"] = update.nll.mean().item()
            g_sft = parallel.take_gradients(m.w.values())

            # The levels swapped: θ̂ imitates, and ω ascends J_SFT(θ; ω) − J_SFT(θ̂; ω).
            if m.omega is not None:
                nll_hat = sft_pass(m.shadow, demonstrations, 1.0, s, omega)
                update.stats["sft_nll_hat"] = nll_hat.mean().item()
                g = (nll_hat - update.nll).float().cpu()  # [T] log π(θ) − log π(θ̂)
                m.omega.grad = -weighed.step_of_omega(g, m.omega.detach(), source)

    # Eq. (11), of losses: (1−λ)∇_w L_SFT + λ(∇_w L_RL(θ,w) − ∇_w L_RL(θ̂,w)). g_sft has its factor 1−λ already. On
    # shared rollouts the difference is exactly 0 while θ̂ = θ.
    for p, sft, rl, rl_hat in zip(m.w.values(), g_sft, g_rl, g_rl_hat, strict=True):
        p.grad = sft + rl_weight * (rl - rl_hat)

    with timer("reduce"):
        for name, parameters in m.parameters.items():
            if name != "w":  # take_gradients has summed w's over the ranks
                parallel.all_reduce_gradients(parameters)
    return update


def keep_old_logp(update: Update, rollouts: Rollouts | None, rollouts_hat: Rollouts | None, s: Settings) -> None:
    """Keeps the log-probs from before the first update on rollouts, as log π_old of the later updates."""
    if update.policy is None or METHODS[s.method].loss == "reinforce":  # REINFORCE has no ratio
        return
    if rollouts.old_logp is None:
        rollouts.old_logp = update.policy.logp
    if rollouts_hat.old_logp is None:  # own rollouts, which θ̂ sampled
        rollouts_hat.old_logp = update.shadow.logp


def clip_and_step(
    m: Policies, stats: dict[str, float], s: Settings, rl_weight: float = 1.0
) -> tuple[dict[str, float], bool]:
    """Clips the gradient of each set of parameters by its own norm, and steps all optimizers from iterate k.

    ω is not clipped, but stays in [LEAST, 1].
    Returns (the norms before, whether the optimizers stepped): a norm or an SFT loss that is not finite steps none.
    """
    norms = {}
    for name, parameters in m.parameters.items():
        # θ̂ has no gradient in an update without its loss, and in the one-step reading, where it has stepped already.
        if parameters[0].grad is not None:
            norm = parallel.total_norm(p.grad for p in parameters)
            torch.nn.utils.clip_grads_with_norm_(parameters, s.grad_clip, norm)
            norms[f"grad_norm_{name}"] = norm.item()
    # All ranks have the same numbers, so all take the same branch.
    losses_and_norms = [stats.get("sft_nll", 0.0), stats.get("sft_nll_hat", 0.0), *norms.values()]
    is_finite = all(math.isfinite(x) for x in losses_and_norms)

    # Algorithm 1 has two optimizers of θ, one for each loss; that of the other loss does not step.
    resting = "theta_sft"
    if rl_weight == 0 and "theta_sft" in m.optimizers:
        resting = "theta"
    for name, optimizer in m.optimizers.items():
        if is_finite and name != resting:
            optimizer.step()
    if m.omega is not None:
        m.omega.data.clamp_(weighed.LEAST, 1.0)
    for optimizer in m.optimizers.values():
        optimizer.zero_grad()  # frees the gradients before sampling
    return norms, is_finite


@dataclass
class Run:
    """Everything a step needs."""

    s: Settings
    folder: RunFolder
    m: Policies
    env: Environment
    demonstrations: list[Row]  # D_SFT
    sources: Sources  # of D_SFT
    prompt_order: Stream  # draws from D_RL
    demonstration_order: Stream  # draws from D_SFT
    fingerprints: dict[str, str]  # of the data, the initial weights and the tokenizer
    skipped: int = 0  # updates skipped since the last step without one

    def demonstrations_of_update(self, rollouts: Rollouts | None) -> tuple[list[Row], list[int]]:
        """The next ones of D_SFT and their sources; for methods that pair them those of the rollouts' prompts."""
        if METHODS[self.s.method].paired:
            return rollouts.demonstrations, []
        draws = [i for _, i in self.demonstration_order.take(self.s.sft_batch)]
        return [self.demonstrations[i] for i in draws], [self.sources.number[i] for i in draws]


def train(run: Run, start: int) -> None:
    """Algorithm 2 from iterate `start`; the other methods are the same loop with other weights."""
    s = run.s
    m = run.m
    total = s.total_steps
    stop = StopSignal()
    # Evaluates the initial model, or the final one if a run is resumed at its end.
    if start in (0, total) and start not in run.folder.evaluations():
        evaluate_policies(run, start)
        if run.folder.keep_best and start == 0:
            save(run, start)
    progress = tqdm(range(start, total), initial=start, total=total, desc=s.method, disable=parallel.rank() > 0)
    for k in progress:
        timer = Timer(k + 1)
        # A cold start gives RL a fresh optimizer.
        if s.method == "sft_rl" and k == s.sft_steps:
            m.optimizers["theta"] = make_optimizer(m.parameters["theta"], s.alpha)

        # Step 1: rollouts from π(θ,w). θ̂ trains on the same ones, or on its own on the same prompts.
        plan = updates(s, k)
        rollouts = None
        rollouts_hat = None
        if any(rl_weight for _, rl_weight in plan):
            rollouts, rollouts_hat = sample_rollouts(run.env, run.prompt_order, m.policy, m.shadow, k, timer)
            plan = plan * s.updates_per_rollout

        seen: list[Update] = []
        skipped = 0
        for sft_weight, rl_weight in plan:
            # Steps 1-3: demonstrations; the gradients of θ, w and θ̂, all at iterate k.
            demonstrations, sources = run.demonstrations_of_update(rollouts) if sft_weight else ([], [])
            update = bilevel_gradients(
                m, rollouts, rollouts_hat, demonstrations, sft_weight, rl_weight, s, timer, sources
            )
            keep_old_logp(update, rollouts, rollouts_hat, s)
            seen.append(update)

            # Steps 4-6: θ, θ̂ and w step, or none of them if a gradient or a loss is not finite.
            with timer("optimizer"):
                norms, stepped = clip_and_step(m, update.stats, s, rl_weight)
            update.stats |= norms
            if not stepped:
                skipped += 1
                rows = rollouts.rows if rollouts is not None else []
                run.folder.dump_skipped(f"{k + 1:06d}-{skipped}", update.stats, rows, demonstrations)

        # Counts skipped updates; a step without one resets the count.
        if skipped:
            run.skipped += skipped
        else:
            run.skipped = 0

        is_last = k + 1 == total
        if (k + 1) % s.eval_every == 0 or is_last:
            with timer("evaluate"):
                evaluate_policies(run, k + 1)
        metrics = log_step(run, k + 1, seen, rollouts, rollouts_hat, timer)
        shown = ("reward", "sft_nll", "cooperative_gain")
        progress.set_postfix({name: f"{metrics[name]:.3f}" for name in shown if name in metrics})
        stop_if_diverged(metrics, k + 1, run.folder.path)

        stopped = stop.on_any_rank()
        best = run.folder.best_step() if run.folder.keep_best else None
        if (k + 1) % s.save_every == 0 or is_last or best == k + 1 or stopped:
            with timer("save"):
                save(run, k + 1, best)
        if stopped and not is_last:  # not stop.requested, which a signal may have set since, on one rank
            stop.exit(k + 1)
    stop.release()


def log_step(
    run: Run,
    step: int,
    seen: list[Update],  # of the step
    rollouts: Rollouts | None,
    rollouts_hat: Rollouts | None,
    timer: Timer,
) -> dict[str, float]:
    """Logs metrics, the samples of one group and the numbers of tokens; returns the metrics, of the first update."""
    # The first of several updates counts: its ratios are those of the rollouts, and θ's gradient is at iterate k.
    metrics = {}
    for update in reversed(seen):
        metrics |= update.stats
    # The clip has no effect at the first update, where every ratio is 1: its fraction is the mean over all updates.
    limited = [update.stats["clip_frac"] for update in seen if update.policy is not None]
    if limited:
        metrics["clip_frac"] = sum(limited) / len(limited)
    metrics["skipped_in_a_row"] = run.skipped
    if run.m.w:
        metrics["lora_norm"] = lora.delta_norm(run.m.w, run.s.lora_alpha / run.s.lora_rank)
    if run.m.omega is not None:
        omega_of_source = zip(run.sources.names, run.m.omega.tolist(), strict=True)
        named = {f"omega_{name}": value for name, value in omega_of_source if name}
        if len(named) <= weighed.NAMED:
            metrics |= named
        metrics["omega_mean"] = run.m.omega.mean().item()
    if rollouts is not None:
        metrics["tokens_per_second"] = metrics["sampled_tokens"] / timer.seconds["sample"]
        run.folder.log_samples(step, rollouts.records[: rollouts.reward.shape[1]])
        if not METHODS[run.s.method].asks_right:  # srft and hpt train on groups of equal rewards, too
            run.folder.watch_signal(step, metrics, run.s.group_size)
    run.folder.log_metrics(step, metrics, timer.seconds)

    if run.folder.keep != "none" and parallel.rank() == 0:
        record: dict = {"groups": [], "demonstrations": []}
        of_rl = [update for update in seen if update.policy is not None]
        if of_rl:
            record["groups"] = groups_with_numbers(run, rollouts, rollouts_hat, of_rl[0])
        of_sft = [update for update in seen if update.nll is not None]
        if of_sft:
            shown = of_sft[0].demonstrations, of_sft[0].nll, run.folder.keep, run.env.tokenizer
            record["demonstrations"] = tokens.demonstration_records(*shown)
        run.folder.log_tokens(step, record)
    return metrics


def groups_with_numbers(run: Run, rollouts: Rollouts, rollouts_hat: Rollouts, update: Update) -> list[dict]:
    """Groups of a step for report.html. On shared rollouts a row has the numbers of policy and shadow."""
    group_size = rollouts.reward.shape[1]
    # The same groups of both
    kept = tokens.kept_rows(rollouts.reward, run.folder.keep)
    if rollouts_hat is rollouts:
        sets = [("policy", rollouts, update.policy, update.shadow)]
    else:
        sets = [("policy", rollouts, update.policy, None), ("shadow", rollouts_hat, None, update.shadow)]
    groups = []
    for of, r, policy, shadow in sets:
        numbers = tokens.numbers_of_tokens(r.advantage, r.weight, r.sampler_logp, policy, shadow)
        groups += tokens.group_records(of, r.rows, r.records, group_size, numbers, kept, run.env.tokenizer)
    return groups


def evaluate_policies(run: Run, step: int) -> None:
    """Greedy accuracy of (θ,w), and of (θ̂,w) if there is a shadow: one line of evals.jsonl."""
    env = run.env
    record = {}
    answers = {}
    for name, model in (("policy", run.m.policy), ("shadow", run.m.shadow)):
        if model is not None:
            env.sampler.refresh(model)
            record[name], answers[name] = evaluate(env.sampler, env.tokenizer, env.task, run.s.max_new_tokens)
    run.folder.log_evaluation(step, record, answers)
    print0(f"step {step}: accuracy " + ", ".join(f"{name} {record[name]['average']:.3f}" for name in record))


def save(run: Run, step: int, best: int | None = None) -> None:
    """Writes a checkpoint. Random draws are functions of (seed, step, draw), so positions are all their state.

    best: the step whose checkpoint is kept beside the newest.
    """
    facts = dict(
        step=step,
        skipped=run.skipped,
        prompts=run.prompt_order.position,
        demos=run.demonstration_order.position,
        settings=asdict(run.s),
        export=card_facts(run.env.task, run.env.tokenizer, run.env.sampler.stop),
    )
    tensors = checkpoint.state_tensors(run.m.optimizers)  # parameters and the optimizers' moments
    checkpoint.save(run.folder.path / "checkpoint", step, facts | run.fingerprints, tensors, best)


def restore(run: Run, saved: checkpoint.Saved) -> int:
    """Loads a checkpoint into the run; returns its step. Raises SettingError if it is another run's."""
    facts = saved.facts
    checkpoint.refuse_other_run(facts, run.s, run.fingerprints, run.folder.path)
    saved.restore(run.m.optimizers)
    run.prompt_order.position = facts["prompts"]
    run.demonstration_order.position = facts["demos"]
    run.skipped = facts["skipped"]
    return facts["step"]


def set_up(s: Settings, folder: RunFolder) -> Run:
    """Loads task and model. Raises DataError, ModelError or SettingError."""
    loaded = load_training(s)
    sampler = Sampler(loaded.model, loaded.stop, s.sampler_slots, getattr(torch, s.dtype))
    env = Environment(s, loaded.task, loaded.tokenizer, sampler, loaded.reward, loaded.demonstrations_of)
    return Run(
        s,
        folder,
        make_policies(loaded.model, s, len(loaded.sources.names)),
        env,
        loaded.demonstrations,
        loaded.sources,
        prompt_order=Stream(len(loaded.task.problems), (s.seed, 0)),
        demonstration_order=Stream(len(loaded.demonstrations), (s.seed, 1)),
        fingerprints=loaded.fingerprints,
    )


def main(argv: list[str]) -> None:
    with one_line_errors("bridge.py"), ExitStack() as held:
        s, args = parse(argv)
        if args.dry_run:
            config = memory.config_of(s.model)
            memory.dry_run(s, config, args.gpu, args.gpus)
            return
        was_restarted = parallel.start()  # torchrun --max-restarts resumes by itself
        resume = args.resume or was_restarted
        out = args.out
        folder = RunFolder(out, args.keep_rollouts, args.keep_best)
        held.enter_context(alone(out, out / ".lock"))
        folder.refuse_existing(unless=resume)

        run = set_up(s, folder)
        env = run.env
        saved = checkpoint.newest(out / "checkpoint") if resume else None
        start = restore(run, saved) if saved else 0
        folder.begin(s, argv, start if saved else -1)
        data = describe_data(env.task, env.tokenizer, env.sampler.stop, run.demonstrations)
        print0(describe(s, run.m.parameters, data))

        with tracked(folder, s, start):
            train(run, start)

        env.sampler.refresh(run.m.policy)
        if parallel.rank() == 0:
            facts = card_facts(env.task, env.tokenizer, env.sampler.stop)
            export.save_run(out, s, env.sampler.model, env.tokenizer, facts, run.m.w)
            plot.draw([out], out / "figures.png")
            page = report.write(out)
            print0(f"\n{out}/model loads with from_pretrained; a look inside: {page}; logs: {out}/*.jsonl")
        parallel.end()


if __name__ == "__main__":
    main(sys.argv[1:])
