"""BRIDGE: supervised fine-tuning and reinforcement learning in one bilevel problem (arXiv 2509.06948).

Three sets of parameters: θ, the base model, trained in full; w, a LoRA adapter; θ̂, a copy of θ that only ever takes
RL steps. The policy is π(·|x; θ, w). w is to make joint training better than RL alone, so it climbs the cooperative
gain J_RL(θ,w) − J_RL(θ̂,w). One iteration k, every gradient taken at iterate k (Algorithm 2 of the paper):

    1   sample a batch of demonstrations from D_SFT and of prompts from D_RL; rollouts from π(θ,w); rewards
    2-3 ∇J_SFT(θ,w) and ∇J_RL(θ,w), for θ and w at once; ∇J_RL(θ̂,w), for θ̂ and w at once
    4   θ ← θ + α[(1−λ)∇_θ J_SFT + λ∇_θ J_RL]                                                            (7)
    5   θ̂ ← θ̂ + α ∇_θ̂ J_RL(θ̂,w)                                                                         (9)
    6   w ← w + β[(1−λ)∇_w J_SFT + λ(∇_w J_RL(θ,w) − ∇_w J_RL(θ̂,w))]                                     (8)

On several ranks each samples for its share of the prompts and takes its share of every gradient; rollouts, gradients
and statistics are those of the whole batch on all of them (`parallel.py`).

The code minimises L = −J. The other methods (--method) are the same loop with other coefficients: see `updates`.

Shapes: P prompts, G samples of each, N = P·G sequences, T response tokens of all of them, end to end.
"""

import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

import grpo
import lora
import plot
import rewards
from evaluate import evaluate
from grading.scores import table
from infra import checkpoint, export, parallel
from infra import run as track
from infra.memory import dry_run
from infra.model import (
    ModelError,
    Row,
    checkpoint_layers,
    load,
    micro_batches,
    offsets,
    pads,
    pick_device,
    response_loss,
    response_scores,
    stop_tokens,
    twin,
)
from sampler import Sampler
from settings import MAY_CHANGE_ON_RESUME, SettingError, Settings, parse, profile_range
from tasks import arithmetic as toy
from tasks import prompts
from tasks import task as tasks

MAX_SKIPPED = 5  # updates with a non-finite loss or gradient, no clean step between them, before the run stops
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
MAX_LOGP_GAP = 0.1  # nats per token between sampler and trainer, on the same weights, before the run stops


def updates(s: Settings, k: int) -> list[tuple[float, float]]:
    """The method at step k: its updates in order, each as (weight of L_SFT, weight of L_RL)."""
    lam = s.lam * min(1.0, (k + 1) / s.lam_ramp_steps) if s.lam_ramp_steps else s.lam
    match s.method:
        case "sft":
            return [(1.0, 0.0)]
        case "rl":
            return [(0.0, 1.0)]
        case "sft_rl":  # cold start: two stages, with a fresh optimizer for the second
            return [(1.0, 0.0)] if k < s.sft_steps else [(0.0, 1.0)]
        case "alternating":  # Algorithm 1 of the paper: one RL update, then one SFT update
            return [(0.0, 1.0), (1.0, 0.0)]
        case "mix":  # both in one update, on θ only
            return [(s.mu, 1.0)]
        case _:  # mix_lora and bridge: eqs. (7) and (8); bridge's shadow takes its share off w's RL gradient
            return [(1 - lam, lam)]


def total_steps(s: Settings) -> int:
    return s.steps + (s.sft_steps if s.method == "sft_rl" else 0)


@dataclass
class Policies:
    """π(θ,w), its shadow π(θ̂,w) on the same w, and one optimizer for each set of parameters."""

    policy: nn.Module
    shadow: nn.Module | None  # only BRIDGE has one
    reference: nn.Module | None  # the initial model, if KL is asked for
    w: lora.Adapter  # empty for methods without an adapter
    optimizers: dict[str, torch.optim.Optimizer]

    @property
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """By set: theta, and w and theta_hat where the method has them."""
        return {name: optimizer.param_groups[0]["params"] for name, optimizer in self.optimizers.items()}

    def reset_optimizers(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.state.clear()

    @torch.no_grad()
    def resync(self) -> None:
        """θ̂ := θ, with fresh Adam moments, since θ's have seen SFT."""
        for p_hat, p in zip(self.parameters["theta_hat"], self.parameters["theta"], strict=True):
            p_hat.copy_(p)
        self.optimizers["theta_hat"].state.clear()


def make_policies(model: nn.Module, s: Settings) -> Policies:
    """θ̂ starts as θ, and both wear the same w. Raises SettingError if lora_targets match no layer.

    `model` may be on the CPU if it is to be sharded: then each rank's slices go to its device.
    """
    checkpoint_layers(model, s.checkpoint_layers)
    another = twin if s.shard and parallel.world() > 1 else copy.deepcopy  # slices are new memory
    shadow = another(model) if s.method == "bridge" else None
    reference = another(model).requires_grad_(False) if s.kl_coef > 0 else None
    w: lora.Adapter = {}
    if s.method in ("mix_lora", "bridge"):
        try:
            w = lora.create(model, s.lora_targets.split(","), s.lora_rank, s.seed, pick_device())
        except ValueError as error:
            raise SettingError(str(error)) from error
        lora.attach(model, w, s.lora_alpha / s.lora_rank)
    if shadow is not None:
        lora.attach(shadow, w, s.lora_alpha / s.lora_rank, sign=-1.0)  # the minus of eq. (8)
    if s.shard:
        for m in filter(None, (model, shadow, reference)):
            parallel.shard(m, w.values(), train=m is not reference)
    sets = {"theta": (lora.base_parameters(model).values(), s.alpha)}
    if w:
        sets["w"] = (w.values(), s.beta)
    if shadow is not None:
        sets["theta_hat"] = (lora.base_parameters(shadow).values(), s.alpha)
    adam = {n: torch.optim.AdamW(list(ps), lr=lr, weight_decay=0.0, fused=True) for n, (ps, lr) in sets.items()}
    return Policies(model, shadow, reference, w, adam)


@dataclass
class Rollouts:
    """Sampled completions and what GRPO needs of them: the whole batch, on every rank."""

    rows: list[Row]  # N
    reward: Tensor  # [P, G]
    advantage: Tensor  # [T]
    weight: Tensor  # [T]
    sampler_logp: Tensor  # [T]
    stats: dict[str, float]  # of everything sampled, before dynamic sampling chose
    records: list[dict]  # the first group, for samples.jsonl
    old_logp: Tensor | None = None  # [T] log π of the policy that sampled, set by its first update


def collect(run: "Run", prompts: tasks.Stream, step: int) -> Rollouts:
    """Draws prompts, samples G completions of each with the sampler's weights, and grades them.

    Every rank draws all prompts, samples for its share, and gets the groups of the others. With dynamic sampling,
    groups of equal rewards (which have no gradient) are replaced by groups of further prompts, as far as
    `dynamic_sampling` more batches provide them.
    """
    s, groups = run.s, []
    give_back()  # what training held is the sampler's now
    for _ in range(1 + s.dynamic_sampling):
        draws = prompts.take(s.prompts_per_step)[parallel.rank() :: parallel.world()]
        problems = [run.task.problems[i] for _, i in draws]
        prompt_ids = [encode(run, p.question) for p in problems]
        keys = [(s.seed, step, draw) for draw, _ in draws]
        sampled = run.sampler.generate(prompt_ids, keys, s.group_size, s.max_new_tokens, s.temperature)
        mine = []
        for (draw, _), problem, prompt, group in zip(draws, problems, prompt_ids, sampled, strict=True):
            responses = [run.tokenizer.decode(c.ids, skip_special_tokens=True) for c in group]
            reward = [run.reward(r, problem) for r in responses]
            mine.append((draw, (problem, prompt, group, responses, reward)))
        groups += [group for _, group in sorted(parallel.gather(mine), key=lambda pair: pair[0])]  # as drawn
        if sum(map(is_live, groups)) >= s.prompts_per_step:
            break
    stats = sampling_statistics(groups)
    if s.dynamic_sampling:
        groups.sort(key=is_live, reverse=True)  # the live ones first, else as drawn
    groups = groups[: s.prompts_per_step]
    completions = [c for _, _, group, _, _ in groups for c in group]  # N
    reward = torch.tensor([reward for *_, reward in groups])  # [P, G]
    lengths = torch.tensor([len(c.ids) for c in completions])  # [N]
    keep = torch.tensor([c.finish_reason == "stop" or not s.overlong_mask for c in completions])  # [N]
    advantage = grpo.group_advantages(reward, s.divide_by_std).flatten().repeat_interleave(lengths)  # [T]
    problem, _, group, responses, first_reward = groups[0]
    device = pick_device()
    give_back()  # what the sampler held is training's now
    return Rollouts(
        rows=[(prompt, c.ids) for _, prompt, group, _, _ in groups for c in group],
        reward=reward,
        advantage=advantage.to(device),
        weight=grpo.token_weights(lengths, s.aggregation, s.max_new_tokens, keep).to(device),
        sampler_logp=torch.tensor([logp for c in completions for logp in c.logps], device=device),
        stats=stats,
        records=[
            {"question": problem.question, "answer": problem.answer, "response": text, "reward": r,
             "finish_reason": c.finish_reason}
            for c, text, r in zip(group, responses, first_reward, strict=True)
        ],
    )  # fmt: skip


def encode(run: "Run", question: str) -> list[int]:
    return prompts.encode_prompt(run.tokenizer, question, run.task.instruction, run.task.template)


def is_live(group: tuple) -> bool:
    """Whether a group's rewards differ, so that it has a gradient."""
    *_, reward = group
    return min(reward) < max(reward)


def sampling_statistics(groups: list[tuple]) -> dict[str, float]:
    completions = [c for _, _, group, _, _ in groups for c in group]
    tokens = sum(len(c.ids) for c in completions)
    return dict(
        reward=sum(sum(reward) for *_, reward in groups) / len(completions),
        response_tokens=tokens / len(completions),
        truncated_frac=sum(c.finish_reason == "length" for c in completions) / len(completions),
        dead_groups=sum(not is_live(group) for group in groups) / len(groups),
        sampled_tokens=tokens,
    )


def rl_backward(
    model: nn.Module, rollouts: Rollouts, reference: nn.Module | None, s: Settings, truncate: float | None = None
) -> dict[str, Tensor]:
    """Adds this rank's part of ∇L_RL to .grad, micro-batch by micro-batch.

    Returns logp, entropy, ratio, cut (0 or 1) and kl of all tokens, each [T], on every rank. The first call on fresh
    rollouts is made by the policy that sampled them: its log-probs become `old_logp`, so that one update per rollout
    needs no extra pass, and the ratio there is exactly 1.
    """
    parts, at, dtype = [], offsets(rollouts.rows), getattr(torch, s.dtype)
    mine, batches = my_batches(rollouts.rows, s)

    def token_loss(first: int, ref_logp: Tensor | None, logp: Tensor, entropy: Tensor, tokens: slice) -> Tensor:
        """The loss of some tokens of a micro-batch whose response tokens begin at `first`."""
        here = slice(first + tokens.start, first + tokens.stop)
        old = logp.detach() if rollouts.old_logp is None else rollouts.old_logp[here]
        ref = None if ref_logp is None else ref_logp[tokens]
        advantage, weight, clip = rollouts.advantage[here], rollouts.weight[here], (s.clip_low, s.clip_high)
        loss, terms = grpo.grpo_loss(logp, old, advantage, weight, clip, truncate, ref, s.kl_coef)
        parts.append(torch.stack([logp.detach(), entropy.detach(), terms["ratio"], terms["cut"], terms["kl"]]))
        return loss

    for batch in batches:
        rows, ref = rollouts.rows[batch.start : batch.stop], None
        if reference is not None:
            ref, _ = response_scores(reference, rows, s.temperature, dtype)
        response_loss(model, rows, partial(token_loss, at[batch.start], ref), s.temperature, dtype).backward()
    tokens = rollouts.weight.new_zeros(5, at[-1])
    tokens[:, at[mine.start] : at[mine.stop]] = torch.cat([tokens[:, :0], *parts], 1)
    parallel.add([tokens])
    out = dict(zip(("logp", "entropy", "ratio", "cut", "kl"), tokens, strict=True))
    if rollouts.old_logp is None:
        rollouts.old_logp = out["logp"]
    return out


def sft_backward(model: nn.Module, demonstrations: list[Row], weight: float, s: Settings) -> float:
    """Adds this rank's part of weight·∇L_SFT to .grad, L_SFT = −mean log π over all response tokens.

    Returns L_SFT in nats per token.
    """
    count, dtype = sum(len(response) for _, response in demonstrations), getattr(torch, s.dtype)
    total = torch.zeros((), dtype=torch.float64)
    for batch in my_batches(demonstrations, s)[1]:
        rows = demonstrations[batch.start : batch.stop]
        loss = response_loss(model, rows, lambda logp, *_: -logp.sum() / count, 1.0, dtype)
        (weight * loss).backward()
        total += loss.item()
    parallel.add([total])
    return total.item()


def my_batches(rows: list[Row], s: Settings) -> tuple[range, list[range]]:
    """This rank's rows and their micro-batches, as many as every other rank has (the last ones may be empty)."""
    mine = parallel.shares([len(prompt) + len(response) for prompt, response in rows], parallel.world())[
        parallel.rank()
    ]
    padded = pads(pick_device(), getattr(torch, s.dtype))
    batches = micro_batches(rows[mine.start : mine.stop], s.tokens_per_micro_batch, padded) if mine else []
    return mine, parallel.as_many([range(mine.start + b.start, mine.start + b.stop) for b in batches])


def bilevel_gradients(
    m: Policies,
    rollouts: Rollouts | None,
    rollouts_hat: Rollouts | None,
    demonstrations: list[Row],
    sft: float,
    rl: float,
    s: Settings,
    clock: "Clock",
) -> dict[str, float]:
    """Leaves the gradients of eqs. (7), (8) and (9), of losses, in the .grad of θ, w and θ̂; returns what to log.

    The losses are sums over the batch, so each rank adds up its own part of all this, and the sum over ranks is last.

    `sft` and `rl` are (1−λ) and λ. `rollouts_hat` are θ̂'s rollouts: the same object as `rollouts` if they are shared.
    """
    for optimizer in m.optimizers.values():
        optimizer.zero_grad()
    stats: dict[str, float] = {}
    if rl:
        with clock("rl"):
            joint = rl_backward(m.policy, rollouts, m.reference, s)  # θ, w: ∇L_RL(θ,w)
            stats |= rl_statistics(joint, rollouts)
        if m.shadow is not None:
            with clock("shadow"):
                truncate = s.shadow_ratio_cap if rollouts_hat is rollouts and s.shadow_ratio_cap else None
                joint_w = [p.grad for p in m.w.values()]
                m.optimizers["w"].zero_grad()  # summed apart, so that at θ̂ = θ the difference is 0 (on a CPU, exactly)
                solo = rl_backward(m.shadow, rollouts_hat, m.reference, s, truncate)  # θ̂: ∇L_RL(θ̂,w)   w: − that
                for p, joint_grad in zip(m.w.values(), joint_w, strict=True):
                    p.grad += joint_grad  # w: ∇L_RL(θ,w) − ∇L_RL(θ̂,w)
                stats |= gain_statistics(solo, rollouts, rollouts_hat)
                gain = [p.grad.clone() for p in m.w.values()]
                parallel.add(gain)
                stats["gain_grad_norm"] = rl * parallel.norm(gain).item()
        for p in [*m.parameters["theta"], *m.w.values()]:
            if p.grad is not None:
                p.grad.mul_(rl)  # θ: λ∇L_RL(θ,w)   w: λ(∇L_RL(θ,w) − ∇L_RL(θ̂,w))
    if sft:
        with clock("sft"):
            stats["sft_nll"] = sft_backward(m.policy, demonstrations, sft, s)  # θ, w: + (1−λ)∇L_SFT(θ,w)
    with clock("reduce"):
        for parameters in m.parameters.values():
            parallel.add_gradients(parameters)
    return stats


def rl_statistics(joint: dict[str, Tensor], rollouts: Rollouts) -> dict:
    gap = (joint["logp"] - rollouts.sampler_logp).abs()
    return rollouts.stats | dict(
        entropy=joint["entropy"].mean().item(),
        kl=joint["kl"].mean().item(),
        clip_frac=joint["cut"].float().mean().item(),
        logp_gap_mean=gap.mean().item(),
        logp_gap_max=gap.max().item(),
    )


def gain_statistics(solo: dict[str, Tensor], rollouts: Rollouts, rollouts_hat: Rollouts) -> dict:
    """The cooperative gain J_RL(θ,w) − J_RL(θ̂,w) in units of reward, and how far θ̂ is from θ.

    With own rollouts it is the difference of two mean rewards. On shared ones each sequence counts for θ̂ with
    its importance weight π(θ̂,w)/π(θ,w), cut at 10, so θ̂'s reward is estimated from below and the gain from above.
    """
    reward = rollouts.reward.flatten()
    if rollouts_hat is rollouts:
        at = offsets(rollouts.rows)
        log_ratio = (solo["logp"] - rollouts.old_logp).cpu()
        weight = torch.stack([log_ratio[a:b].sum() for a, b in pairwise(at)]).exp().clamp(max=10)  # [N]
        reward_hat = (weight * reward).mean()
    else:
        reward_hat = rollouts_hat.reward.mean()
    return dict(
        cooperative_gain=(reward.mean() - reward_hat).item(),
        ratio_hat_mean=solo["ratio"].mean().item(),
        ratio_hat_max=solo["ratio"].max().item(),
        ratio_hat_cut=solo["cut"].float().mean().item(),
    )


def clip_and_step(m: Policies, stats: dict, s: Settings) -> dict[str, float]:
    """Clips each set's gradient and steps all optimizers from iterate k, or none if anything is not finite."""
    norms = {}
    for name, parameters in m.parameters.items():
        if parameters[0].grad is not None:
            norm = parallel.norm(p.grad for p in parameters)
            torch.nn.utils.clip_grads_with_norm_(parameters, s.grad_clip, norm)
            norms[f"grad_norm_{name}"] = norm.item()
    if all_finite(stats | norms):
        for optimizer in m.optimizers.values():
            optimizer.step()
    for optimizer in m.optimizers.values():
        optimizer.zero_grad()  # their memory is the sampler's now
    return norms


def give_back() -> None:
    """Lets go of GPU memory that is free: FSDP2's streams and the sampler's graphs keep theirs from each other."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def all_finite(stats: dict[str, float]) -> bool:
    return all(math.isfinite(v) for v in stats.values())


class Clock:
    """Seconds by phase of one step; the phases are ranges in a trace of --profile-steps, too.

    An exception on its way through learns where it happened.
    """

    def __init__(self, step: int):
        self.step, self.seconds = step, {}

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        try:
            with torch.profiler.record_function(phase):
                yield
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        except BaseException as error:
            error.add_note(f"rank {parallel.rank()} of {parallel.world()}, step {self.step}, phase {phase}")
            raise
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class Run:
    """Everything a step needs, and the folder it writes to."""

    s: Settings
    out: Path
    m: Policies
    task: tasks.Task
    demonstrations: list[Row]
    tokenizer: object
    sampler: Sampler
    prompts: tasks.Stream
    demos: tasks.Stream
    data: str  # fingerprint of prompts, demonstrations and evaluation problems
    reward: Callable[[str, tasks.Problem], float]
    skipped: int = 0  # updates that were skipped since the last step without one
    log: track.Log = track.nowhere  # where metrics and evaluations go besides the files


def train(run: Run, start: int) -> None:
    """Algorithm 2, from iterate `start`; every other method is the same loop with other weights."""
    s, m, stop, total = run.s, run.m, checkpoint.StopSignal(), total_steps(run.s)
    if start == 0:
        evaluate_policies(run, 0)
    bar = tqdm(range(start, total), initial=start, total=total, desc=s.method, disable=parallel.rank() > 0)
    for k in track.profiled(bar, profile_range(s.profile_steps) if parallel.rank() == 0 else range(0), run.out):
        clock, log, rollouts, rollouts_hat = Clock(k + 1), {}, None, None
        plan = updates(s, k)
        if s.method == "sft_rl" and k == s.sft_steps:
            m.reset_optimizers()

        # 1  rollouts from π(θ,w); θ̂ learns from the same ones, or from its own on the same prompts
        if any(rl for _, rl in plan):
            prompts_hat = copy.copy(run.prompts)
            with clock("sample"):
                run.sampler.refresh(m.policy)
                rollouts = rollouts_hat = collect(run, run.prompts, k)
            if s.shadow_rollouts == "own":
                with clock("sample_shadow"):
                    run.sampler.refresh(m.shadow)
                    rollouts_hat = collect(run, prompts_hat, k)

        skipped = 0
        for sft, rl in plan * s.updates_per_rollout:
            # 2-3  the gradients of θ, w and θ̂, all at iterate k
            demonstrations = [run.demonstrations[i] for _, i in run.demos.take(s.sft_batch)] if sft else []
            stats = bilevel_gradients(m, rollouts, rollouts_hat, demonstrations, sft, rl, s, clock)
            # 4-6  θ, θ̂ and w step
            with clock("optimizer"):
                stats |= clip_and_step(m, stats, s)
            if not all_finite(stats):
                skipped += 1
                dump_skipped(run, f"{k + 1:06d}-{skipped}", rollouts, demonstrations, stats)
            log = stats | log  # of several updates, the first is logged
        run.skipped = run.skipped + skipped if skipped else 0
        if s.resync_every and (k + 1) % s.resync_every == 0:
            m.resync()

        last = k + 1 == total
        if (k + 1) % s.eval_every == 0 or last:
            with clock("evaluate"):
                evaluate_policies(run, k + 1)
        write_logs(run, k + 1, log, rollouts, clock)
        bar.set_postfix({name: f"{log[name]:.3f}" for name in ("reward", "sft_nll", "cooperative_gain") if name in log})
        if run.skipped >= MAX_SKIPPED or log.get("logp_gap_mean", 0.0) > MAX_LOGP_GAP:
            raise Diverged(run, log)
        stopped_by = max(parallel.gather([stop.requested or 0]))  # a signal may have reached some ranks only, or first
        if (k + 1) % s.save_every == 0 or last or stopped_by:
            with clock("save"):
                checkpoint.save(run.out / "checkpoint", k + 1, *state_of(run, k + 1))
        if stopped_by and not last:
            bar.close()
            name = signal.Signals(stopped_by).name
            say(f"stopped by {name} after step {k + 1}; everything is saved, --resume continues")
            sys.exit(128 + stopped_by)


# ---------------------------------------------------------------------------------------------------------------------
# Around the loop: set-up, logs, checkpoints, export


def say(text: str) -> None:
    """Prints once, whatever the number of ranks."""
    if parallel.rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def log_line(run: "Run", name: str, record: dict) -> None:
    """One line of a log in the run folder, whatever the number of ranks."""
    if parallel.rank() == 0:
        checkpoint.append(run.out / name, record)


class Diverged(RuntimeError):
    """Training that makes no sense to continue."""

    def __init__(self, run: Run, log: dict):
        if run.skipped >= MAX_SKIPPED:
            text = (
                f"{run.skipped} updates had a loss or gradient that is not finite, with no clean step between: look "
                f"into {run.out}/skipped-*.json, or start again with a lower alpha or beta and another --out"
            )
        else:
            text = (
                f"sampler and trainer disagree by {log['logp_gap_mean']:.3f} nats per token on the same weights "
                "(logp_gap_mean): the rollouts would be off-policy without anyone noticing"
            )
        super().__init__(text)


def set_up(s: Settings, out: Path) -> Run:
    """Loads task and model and makes the three sets of parameters. Raises DataError, ModelError or SettingError."""
    if s.prompts_per_step < parallel.world():
        raise SettingError(
            f"prompts_per_step is {s.prompts_per_step}, but there are {parallel.world()} ranks, each of which samples "
            "for one prompt at least: raise it, or start fewer"
        )
    with parallel.in_turns():
        if s.rl_data:
            fields_and_filters = s.rl_fields, s.sft_fields, s.rl_filter, s.sft_filter
            task = tasks.from_files(s.rl_data, s.sft_data, s.eval_data, s.eval_problems, *fields_and_filters)
        else:
            task = toy.task(s.seed, s.eval_problems)
        sharded = s.shard and parallel.world() > 1  # then slices go to their devices one by one
        model, tokenizer = load(
            toy.resolve(s.model), s.trust_remote_code, torch.device("cpu") if sharded else None, s.revision
        )
    task.template, reward = s.template, rewards.load_reward(s.reward)
    stop = stop_tokens(model, tokenizer, prompts.end_of_turn(tokenizer, s.template))
    demonstrations = tasks.prepare(
        task, tokenizer, s.max_new_tokens, model.config.max_position_embeddings, with_demonstrations=s.method != "rl"
    )
    sampler = Sampler(model, stop, s.sampler_slots, getattr(torch, s.dtype))
    streams = [tasks.Stream(len(rows), (s.seed, i)) for i, rows in enumerate((task.problems, demonstrations))]
    data = repr((task.problems, task.evaluation, demonstrations)).encode(errors="replace")
    data_hash = hashlib.sha256(data).hexdigest()  # resuming on other data would be another run
    return Run(s, out, make_policies(model, s), task, demonstrations, tokenizer, sampler, *streams, data_hash, reward)


def describe(run: Run) -> str:
    """What the run is about to do."""
    s, m = run.s, run.m
    sizes = ", ".join(f"{name} {sum(p.numel() for p in ps):,}" for name, ps in m.parameters.items())
    sequences = f"{s.prompts_per_step} prompts x {s.group_size} samples = {s.prompts_per_step * s.group_size} sequences"
    plan = [*updates(s, 0), *(updates(s, s.sft_steps) if s.method == "sft_rl" else [])]
    takes = [" and ".join([sequences] * (rl > 0) + [f"{s.sft_batch} demonstrations"] * (sft > 0)) for sft, rl in plan]
    ranks = "" if parallel.world() == 1 else f"{parallel.world()} ranks{', sharded' * s.shard}, each "
    wrapped = [name.removesuffix(".lora_A.weight") for name in m.w if name.endswith(".lora_A.weight")]
    lines = [
        f"trainable {sizes}, on {ranks}{pick_device()} with {torch.get_num_threads()} threads",
        f"data      {len(run.task.problems)} prompts, {len(run.demonstrations)} demonstrations, "
        f"{len(run.task.evaluation)} evaluation problems",
        *(f"          {note}" for note in run.task.notes),
        f"batch     an update takes {', the next '.join(takes)}; {s.updates_per_rollout} on the same rollouts, "
        f"{total_steps(s)} steps; at most {s.tokens_per_micro_batch} tokens in memory at a time",
        f"stop      at {', '.join(repr(run.tokenizer.decode([i])) for i in run.sampler.stop)}",
        f"files     {run.out}/",
    ]
    if wrapped:
        lines.insert(1, f"          w wraps {len(wrapped)} linears, {wrapped[0]} to {wrapped[-1]}: {s.lora_targets}")
    lines.insert(
        -3, f"          the first prompt: {run.tokenizer.decode(encode(run, run.task.problems[0].question))!r}"
    )
    if run.demonstrations:
        prompt, response = (run.tokenizer.decode(ids) for ids in run.demonstrations[0])
        lines.insert(-3, f"          the first demonstration, trained tokens in ⟦ ⟧: {prompt!r}⟦{response!r}⟧")
    if parallel.world() == 1 and (count := torch.cuda.device_count()) > 1:
        lines.append(f"idle      {count - 1} of {count} GPUs: torchrun --standalone --nproc-per-node {count} uses all")
    return "\n".join(lines)


def evaluate_policies(run: Run, step: int) -> None:
    """Greedy accuracy of (θ,w), and of (θ̂,w) where there is a shadow: one line of evals.jsonl."""
    record: dict = {"step": step}
    for name, model in (("policy", run.m.policy), ("shadow", run.m.shadow)):
        if model is not None:
            run.sampler.refresh(model)
            task, limit = run.task, run.s.max_new_tokens
            record[name], _ = evaluate(
                run.sampler, run.tokenizer, task.evaluation, task.instruction, limit, task.template
            )
    log_line(run, "evals.jsonl", record)
    run.log(step, record)
    averages = ", ".join(f"{name} {record[name]['average']:.3f}" for name in record if name != "step")
    say(f"step {step}: average accuracy {averages}")


METRICS = (
    "reward", "response_tokens", "truncated_frac", "dead_groups", "entropy", "kl", "clip_frac", "sft_nll",
    "cooperative_gain", "gain_grad_norm", "grad_norm_theta", "grad_norm_w", "grad_norm_theta_hat", "ratio_hat_mean",
    "ratio_hat_max", "ratio_hat_cut", "logp_gap_mean", "logp_gap_max",
)  # fmt: skip


def write_logs(run: Run, step: int, log: dict, rollouts: Rollouts | None, clock: Clock) -> None:
    """A line of metrics.jsonl, null where a method lacks the metric; the first group goes to samples.jsonl."""
    record = {"step": step} | {name: loggable(log.get(name)) for name in METRICS}
    norm = lora.delta_norm(run.m.w, run.s.lora_alpha / run.s.lora_rank) if run.m.w else None
    speed = rollouts.stats["sampled_tokens"] / clock.seconds["sample"] if rollouts else None
    record |= {"lora_norm": loggable(norm), "tokens_per_second": loggable(speed), "skipped_in_a_row": run.skipped}
    record["seconds"] = {phase: round(seconds, 4) for phase, seconds in clock.seconds.items()}
    log_line(run, "metrics.jsonl", record)
    run.log(step, record)
    for sample in rollouts.records if rollouts else []:
        log_line(run, "samples.jsonl", {"step": step} | sample)
    if rollouts and (cut := rollouts.stats["truncated_frac"]) > 0.5:
        say(f"step {step}: {cut:.0%} of the completions were cut off; raise max_new_tokens?")


def loggable(value: float | None) -> float | None:
    """Six digits; null for what JSON cannot hold."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def dump_skipped(run: Run, name: str, rollouts: Rollouts | None, demonstrations: list[Row], stats: dict) -> None:
    """Keeps the batch of a skipped update for inspection."""
    path = run.out / f"skipped-{name}.json"
    batch = {"rollouts": rollouts.rows if rollouts else [], "demonstrations": demonstrations}
    if parallel.rank() == 0:
        path.write_text(json.dumps({"stats": {name: str(value) for name, value in stats.items()}, **batch}))
    say(f"update {name}: a loss or gradient is not finite; no parameter was changed, the batch is in {path}")


def state_of(run: Run, step: int) -> tuple[dict, dict[str, Tensor]]:
    """All there is to resume from: facts, and tensors. Every random draw is a function of (seed, step, draw)."""
    facts = {
        "step": step,
        "skipped": run.skipped,
        "data": run.data,
        "settings": asdict(run.s),
        "streams": {name: getattr(run, name).position for name in ("prompts", "demos")},
    }
    return facts, tensors_of(run.m)


def tensors_of(m: Policies) -> dict[str, Tensor]:
    """Every parameter and every Adam moment, by name."""
    tensors = {}
    for name, parameters in m.parameters.items():
        for i, p in enumerate(parameters):
            tensors[f"{name}.{i}"] = p.detach()
            tensors |= {f"{name}.{i}.{moment}": x for moment, x in m.optimizers[name].state.get(p, {}).items()}
    return tensors


def restore(run: Run, saved: checkpoint.Saved) -> int:
    """Puts a checkpoint into the run; returns its step. Raises SettingError if its settings differ."""
    state = saved.facts
    for name, value in asdict(run.s).items():
        old = state["settings"].get(name)
        if value != old and name not in MAY_CHANGE_ON_RESUME:
            raise SettingError(f"{name} is {value!r}, the run in {run.out} has {old!r}: use that, or another --out")
    if state["data"] != run.data:
        raise SettingError(
            f"rl_data, sft_data or eval_data has changed since the run in {run.out} began: use another --out"
        )
    if state["step"] > total_steps(run.s):
        raise SettingError(f"steps is {run.s.steps}, but the run in {run.out} is at step {state['step']} already")
    for name, optimizer in run.m.optimizers.items():
        for i, p in enumerate(run.m.parameters[name]):
            if f"{name}.{i}.step" in saved.shapes:  # what AdamW makes in its first step
                step = torch.zeros((), device=p.device)
                optimizer.state[p] = {"step": step, **{m: torch.zeros_like(p) for m in MOMENTS}}
    tensors = tensors_of(run.m)
    if {name: tensor.shape for name, tensor in tensors.items()} != saved.shapes:
        raise SettingError(f"model {run.s.model} is not the one the run in {run.out} began with: its shapes differ")
    saved.load(tensors)
    for name, position in state["streams"].items():
        getattr(run, name).position = position
    run.skipped = state["skipped"]
    return state["step"]


def finish(run: Run) -> None:
    """Exports the trained policy and shows what it has become."""
    s, out = run.s, run.out
    run.sampler.refresh(run.m.policy)
    export.save(run)
    if parallel.rank() > 0:
        return
    evals = plot.read(out / "evals.jsonl")
    columns = {"before": evals[0]["policy"], f"{s.method}, step {evals[-1]['step']}": evals[-1]["policy"]}
    if "shadow" in evals[-1]:
        columns["its shadow (θ̂, w)"] = evals[-1]["shadow"]
    print("\ngreedy accuracy, %\n" + table(columns))
    plot.draw([out], out / "figures.png")
    print(f"\n{out}/model loads with from_pretrained; curves in {out}/figures.png; logs in {out}/*.jsonl")


def main(argv: list[str]) -> None:
    rank = f", rank {os.environ['RANK']}" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    try:
        s, args = parse(argv)
        if args.dry_run:
            return dry_run(s, args.gpu, args.gpus)
        restarted = parallel.start()
        out, resume = args.out, args.resume or restarted
        if parallel.first(not resume and out.exists() and any(out.iterdir())):
            raise SettingError(f"{out} exists: --resume continues it, --out names another folder")
        say(f"method {s.method}, settings " + " ".join(f"{k}={v}" for k, v in asdict(s).items() if v != ""))
        run = set_up(s, out)
        saved = checkpoint.newest(out / "checkpoint") if resume else None
        if resume and saved is None:
            say(f"no checkpoint in {out}: starting at step 0")
        start = restore(run, saved) if saved else 0
        if parallel.rank() == 0:
            begin_files(run, argv, start if saved else -1)
        say(describe(run))
        with track.tracked(s.track if parallel.rank() == 0 else "", out, asdict(s), start) as run.log:
            train(run, start)
        finish(run)
        parallel.end()
    except (SettingError, tasks.DataError, rewards.RewardError, ModelError, Diverged, FloatingPointError,
            SafetensorError, OSError) as error:  # fmt: skip
        parallel.fail(f"bridge.py{rank}: {error}{where(error)}")
    except torch.OutOfMemoryError as error:
        parallel.fail(
            f"bridge.py{rank}: out of GPU memory{where(error)}: in sampling lower --sampler-slots, in training lower "
            f"--tokens-per-micro-batch or raise --checkpoint-layers; --dry-run tells what takes how much ({error})"
        )
    except KeyboardInterrupt:
        print("\nbridge.py: interrupted; --resume continues from the last checkpoint, if there is one")
        sys.exit(128 + signal.SIGINT)


def begin_files(run: Run, argv: list[str], step: int) -> None:
    """Makes the run folder, or cuts its logs back to `step`, and writes config.json."""
    run.out.mkdir(parents=True, exist_ok=True)
    for log in ("metrics", "samples", "evals"):
        checkpoint.cut_back(run.out / f"{log}.jsonl", step)
    versions = {module.__name__: module.__version__ for module in (torch, transformers)}
    config = {"settings": asdict(run.s), "command": ["bridge.py", *argv], "versions": versions}
    checkpoint.rewrite(run.out / "config.json", json.dumps(config, indent=2) + "\n")


def where(error: BaseException) -> str:
    """The notes that Clock has left on an exception."""
    notes = getattr(error, "__notes__", [])
    return f" ({'; '.join(notes)})" if notes else ""


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without θ is no reason to stop
    main(sys.argv[1:])
