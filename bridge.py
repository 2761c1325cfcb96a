"""BRIDGE: supervised fine-tuning and reinforcement learning in one bilevel problem (arXiv 2509.06948).

Three sets of parameters: θ, the base model, trained in full; w, a LoRA adapter; θ̂, a copy of θ that only ever takes
RL steps. The policy is π(·|x; θ, w). w is to make joint training better than RL alone, so it climbs the cooperative gain
J_RL(θ,w) − J_RL(θ̂,w). One iteration k, every gradient taken at iterate k (Algorithm 2 of the paper):

    1   sample a batch of demonstrations from D_SFT and of prompts from D_RL; rollouts from π(θ,w); rewards
    2-3 ∇J_SFT(θ,w) and ∇J_RL(θ,w), for θ and w at once; ∇J_RL(θ̂,w), for θ̂ and w at once
    4   θ ← θ + α[(1−λ)∇_θ J_SFT + λ∇_θ J_RL]                                                            (7)
    5   θ̂ ← θ̂ + α ∇_θ̂ J_RL(θ̂,w)                                                                         (9)
    6   w ← w + β[(1−λ)∇_w J_SFT + λ(∇_w J_RL(θ,w) − ∇_w J_RL(θ̂,w))]                                     (8)

The code minimises L = −J. The other methods (--method) are the same loop with other coefficients: see `updates`.

Shapes: P prompts, G samples of each, N = P·G sequences, T response tokens of all of them, end to end.
"""

import argparse
import copy
import json
import math
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import grpo
import lora
import plot
import rewards
import tasks
import toy
from evaluate import evaluate, table
from model import ModelError, Row, load, micro_batches, offsets, pick_device, response_logprobs, stop_tokens
from sampler import Sampler


def opt(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Every setting is a flag. Defaults are the `laptop` preset; "paper" gives the paper's value where it is known."""

    # data and model
    model: str = opt("arithmetic-laptop", "hub name, model folder, or a built-in arithmetic-* model (paper: Qwen2.5-3B)")
    rl_data: str = opt("", "D_RL: .jsonl with question and answer; empty: the built-in arithmetic (paper: LIMR)")
    sft_data: str = opt("", "D_SFT: .jsonl with question and solution; empty: the built-in arithmetic")
    eval_data: str = opt("", "evaluation problems; empty: the last eval_problems of rl_data, held out")
    trust_remote_code: bool = opt(False, "run Python code that comes with the model")
    seed: int = opt(0, "of data order, adapter and samples")
    # method
    method: str = opt("bridge", "sft, rl, sft_rl, alternating, mix, mix_lora or bridge")
    steps: int = opt(150, "iterations k (paper: 6 epochs); sft_rl puts its sft_steps before them")
    lam: float = opt(0.5, "λ in [0, 1]: weight of RL against SFT (paper: 0.5)")
    lam_ramp_steps: int = opt(0, "λ rises linearly from 0 over this many steps; 0: constant (paper: runs constant, text rising)")
    mu: float = opt(1.0, "mix: weight of SFT beside RL; (1−λ)/λ makes θ's update BRIDGE's (paper: unknown)")
    sft_steps: int = opt(100, "sft_rl: SFT steps before RL starts (paper: unknown)")
    # the shadow θ̂
    shadow_rollouts: str = opt("shared", "θ̂ learns from the policy's rollouts (shared, paper v3) or samples its own (own)")
    shadow_ratio: str = opt("truncate", "shared rollouts are off-policy for θ̂: truncate the ratio, or clip it as PPO does, "
                            "which silences θ̂ where it has drifted (paper: unknown)")  # fmt: skip
    shadow_ratio_cap: float = opt(2.0, "largest ratio under truncate; inf: plain importance weights")
    resync_every: int = opt(0, "set θ̂ back to θ every n steps; 0: never (paper: never)")
    # learning rates
    alpha: float = opt(5e-4, "α, learning rate of θ and θ̂ (paper: 5e-7)")
    beta: float = opt(2e-3, "β, learning rate of w; 10-200 times α, else B·A hardly moves (paper: not stated)")
    grad_clip: float = opt(1.0, "largest gradient norm, of θ, θ̂ and w each (paper: unknown)")
    # adapter
    lora_rank: int = opt(8, "rank r of w (paper: 16)")
    lora_alpha: float = opt(16.0, "ΔW = lora_alpha/r·B·A (paper: 16)")
    lora_targets: str = opt("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "names of the linears that w adapts")
    # batches
    prompts_per_step: int = opt(16, "P (paper: 64)")
    group_size: int = opt(8, "G, samples of a prompt, at least 2 (paper: 5)")
    sft_batch: int = opt(32, "demonstrations per update (paper: unknown)")
    updates_per_rollout: int = opt(1, "updates on the same rollouts (paper: 1)")
    max_new_tokens: int = opt(80, "tokens of a completion; longer demonstrations are dropped (paper: 3000)")
    temperature: float = opt(1.0, "of sampling and of log-probs, > 0 (paper: unknown, SimpleRL 1.0)")
    tokens_per_micro_batch: int = opt(8192, "tokens per forward and backward; changes memory, not the result")
    sampler_slots: int = opt(256, "sequences generated at one time; changes memory, not the samples")
    dtype: str = opt("float32", "of the forward pass and the sampler; weights stay float32 (float32 or bfloat16)")
    # GRPO
    aggregation: str = opt("grpo", "token weights: grpo, dapo or dr_grpo (paper: unknown)")
    divide_by_std: bool = opt(True, "divide advantages by the group's standard deviation (off: Dr.GRPO)")
    clip_low: float = opt(0.2, "ratio is clipped below 1 − clip_low (paper: unknown, verl 0.2)")
    clip_high: float = opt(0.2, "ratio is clipped above 1 + clip_high; DAPO: 0.28")
    kl_coef: float = opt(0.0, "weight of KL(π ‖ initial model); the reference is only kept if > 0 (paper: unknown, SimpleRL 1e-3)")
    overlong_mask: bool = opt(False, "leave sequences that were cut off out of the RL loss")
    dynamic_sampling: int = opt(0, "sample up to n more batches to replace groups of equal rewards; 0: off")
    # evaluation and files
    eval_every: int = opt(25, "steps between evaluations")
    eval_problems: int = opt(100, "evaluation problems (of each length, for the arithmetic)")
    save_every: int = opt(25, "steps between checkpoints")


PRESETS: dict[str, dict] = {
    "laptop": {},  # the defaults: minutes on two cores
    "smoke": dict(model="arithmetic-smoke", steps=6, sft_steps=3, prompts_per_step=4, group_size=4, sft_batch=8,
                  eval_every=3, eval_problems=4, save_every=2, lora_rank=4, lora_alpha=8.0),
}  # fmt: skip
CHOICES = {
    "method": ("sft", "rl", "sft_rl", "alternating", "mix", "mix_lora", "bridge"),
    "shadow_rollouts": ("shared", "own"),
    "shadow_ratio": ("truncate", "clip"),
    "dtype": ("float32", "bfloat16"),
    "aggregation": grpo.AGGREGATIONS,
}
MINIMUM = dict(
    steps=1, lam_ramp_steps=0, mu=0, sft_steps=0, shadow_ratio_cap=1, resync_every=0, alpha=0, beta=0, lora_rank=1,
    prompts_per_step=1, group_size=2, sft_batch=1, updates_per_rollout=1, max_new_tokens=1, tokens_per_micro_batch=1,
    sampler_slots=1, clip_low=0, clip_high=0, kl_coef=0, dynamic_sampling=0, eval_every=1, eval_problems=1, save_every=1,
    lam=0, seed=0,
)  # fmt: skip
MAY_CHANGE_ON_RESUME = {"steps", "eval_every", "save_every", "tokens_per_micro_batch", "sampler_slots"}
MAX_SKIPPED = 5  # steps in a row with a non-finite gradient before the run stops
MAX_LOGP_GAP = 0.1  # nats between sampler and trainer, on average over the first batch, before the run stops


class SettingError(ValueError):
    """A setting that is unknown, out of range or inconsistent; the message names it."""


def check(s: Settings) -> Settings:
    for name, values in CHOICES.items():
        if getattr(s, name) not in values:
            raise SettingError(f"{name} must be one of {', '.join(values)}; got {getattr(s, name)!r}")
    for name, least in MINIMUM.items():
        if not getattr(s, name) >= least:  # "not >=" also catches nan
            raise SettingError(f"{name} must be at least {least}; got {getattr(s, name)}")
    if s.lam > 1:
        raise SettingError(f"lam must be in [0, 1]; got {s.lam}")
    if s.clip_low > 1:
        raise SettingError(f"clip_low must be in [0, 1]; got {s.clip_low}")
    for name in ("temperature", "grad_clip", "lora_alpha"):
        if not getattr(s, name) > 0:
            raise SettingError(f"{name} must be greater than 0; got {getattr(s, name)}")
    if s.sft_data and not s.rl_data:
        raise SettingError("sft_data needs rl_data, whose problems also serve evaluation; with neither, the arithmetic is used")
    if s.rl_data and not s.sft_data and s.method != "rl":
        raise SettingError(f"method {s.method} needs demonstrations: give sft_data, or choose --method rl")
    if s.method != "bridge" and (s.shadow_rollouts != "shared" or s.resync_every):
        raise SettingError(f"shadow_rollouts and resync_every concern θ̂, which only --method bridge has (got {s.method})")
    return s


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
    """π(θ,w), its shadow π(θ̂,w) on the same w, and the optimizer of each set of parameters."""

    policy: nn.Module
    shadow: nn.Module | None
    reference: nn.Module | None
    w: lora.Adapter
    wrapped: list[str]
    optimizers: dict[str, torch.optim.Optimizer]

    @property
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {name: o.param_groups[0]["params"] for name, o in self.optimizers.items()}


def make_policies(model: nn.Module, s: Settings) -> Policies:
    """θ and θ̂ start as the same model and share w; methods without w or θ̂ do not have them."""
    shadow = copy.deepcopy(model) if s.method == "bridge" else None
    reference = copy.deepcopy(model).requires_grad_(False) if s.kl_coef > 0 else None
    w, wrapped, scale = {}, [], s.lora_alpha / s.lora_rank
    if s.method in ("mix_lora", "bridge"):
        w = lora.create(model, s.lora_targets.split(","), s.lora_rank, s.seed)
        wrapped = lora.attach(model, w, scale)
        if shadow is not None:
            lora.attach(shadow, w, scale, sign=-1.0)  # the minus of eq. (8)
    sets = {"theta": (lora.base_parameters(model).values(), s.alpha), "w": (w.values(), s.beta)}
    if shadow is not None:
        sets["theta_hat"] = (lora.base_parameters(shadow).values(), s.alpha)
    return Policies(model, shadow, reference, w, wrapped, {
        name: torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.0, fused=True)
        for name, (parameters, lr) in sets.items() if parameters
    })  # fmt: skip


@dataclass
class Rollouts:
    """Sampled completions and what GRPO needs of them."""

    rows: list[Row]  # N
    reward: Tensor  # [P, G]
    advantage: Tensor  # [T]
    weight: Tensor  # [T]
    sampler_logp: Tensor  # [T]
    truncated: float  # fraction of completions cut off
    records: list[dict]  # the first group, for samples.jsonl
    old_logp: Tensor | None = None  # [T] log π of the policy that sampled, set by its first update
    ref_logp: Tensor | None = None  # [T]


def collect(sampler: Sampler, tokenizer, task: tasks.Task, stream: tasks.Stream, s: Settings, step: int) -> Rollouts:
    """Draws prompts, samples G completions of each, grades them. With dynamic sampling, groups of equal rewards are
    replaced by live ones from further prompts, as far as `dynamic_sampling` more batches provide them."""
    live, dead = [], []
    for _ in range(1 + s.dynamic_sampling):
        draws = stream.take(s.prompts_per_step)
        problems = [task.problems[i] for _, i in draws]
        prompts = [tasks.encode_prompt(tokenizer, p.question, task.instruction) for p in problems]
        keys = [(s.seed, step, draw) for draw, _ in draws]
        groups = sampler.generate(prompts, keys, s.group_size, s.max_new_tokens, s.temperature)
        for problem, prompt, group in zip(problems, prompts, groups, strict=True):
            responses = [tokenizer.decode(c.ids, skip_special_tokens=True) for c in group]
            reward = [float(rewards.is_correct(r, problem.answer).correct) for r in responses]
            (dead if min(reward) == max(reward) else live).append((problem, prompt, group, responses, reward))
        if len(live) >= s.prompts_per_step:
            break
    batch = (live + dead)[: s.prompts_per_step]
    completions = [c for _, _, group, _, _ in batch for c in group]
    rows = [(prompt, c.ids) for _, prompt, group, _, _ in batch for c in group]
    reward = torch.tensor([r for *_, r in batch])  # [P, G]
    lengths = torch.tensor([len(c.ids) for c in completions])  # [N]
    keep = torch.tensor([not s.overlong_mask or c.finish_reason == "stop" for c in completions])
    problem, _, group, responses, _ = batch[0]
    records = [
        dict(step=step, question=problem.question, answer=problem.answer, response=r, reward=v, finish_reason=c.finish_reason)
        for c, r, v in zip(group, responses, batch[0][-1], strict=True)
    ]
    device = pick_device()
    return Rollouts(
        rows, reward,
        grpo.group_advantages(reward, s.divide_by_std).flatten().repeat_interleave(lengths).to(device),
        grpo.token_weights(lengths, s.aggregation, s.max_new_tokens, keep).to(device),
        torch.tensor([lp for c in completions for lp in c.logps], device=device),
        sum(c.finish_reason == "length" for c in completions) / len(completions), records,
    )  # fmt: skip


def rl_backward(model: nn.Module, rollouts: Rollouts, s: Settings, truncate: float | None = None) -> dict[str, Tensor]:
    """Adds ∇L_RL to .grad, micro-batch by micro-batch; returns logp, entropy, ratio, cut and kl, each [T].

    The first call on fresh rollouts is the policy that sampled them: its log-probs become `old_logp`, so that
    one update per rollout needs no extra pass, and the ratio there is exactly 1.
    """
    parts, at = [], offsets(rollouts.rows)
    for batch in micro_batches(rollouts.rows, s.tokens_per_micro_batch):
        tokens = slice(at[batch.start], at[batch.stop])
        rows = rollouts.rows[batch.start : batch.stop]
        logp, entropy = response_logprobs(model, rows, s.temperature, getattr(torch, s.dtype))
        old = logp.detach() if rollouts.old_logp is None else rollouts.old_logp[tokens]
        ref = None if rollouts.ref_logp is None else rollouts.ref_logp[tokens]
        loss, terms = grpo.grpo_loss(
            logp, old, rollouts.advantage[tokens], rollouts.weight[tokens],
            (s.clip_low, s.clip_high), truncate, ref, s.kl_coef,
        )  # fmt: skip
        loss.backward()
        parts.append({"logp": logp.detach(), "entropy": entropy.detach(), **terms})
    out = {key: torch.cat([p[key] for p in parts]) for key in parts[0]}
    if rollouts.old_logp is None:
        rollouts.old_logp = out["logp"]
    return out


def sft_backward(model: nn.Module, demonstrations: list[Row], weight: float, s: Settings) -> float:
    """Adds weight·∇L_SFT to .grad, L_SFT = −mean log π over all response tokens; returns L_SFT in nats per token."""
    tokens, total = sum(len(response) for _, response in demonstrations), 0.0
    for batch in micro_batches(demonstrations, s.tokens_per_micro_batch):
        logp, _ = response_logprobs(model, demonstrations[batch.start : batch.stop], 1.0, getattr(torch, s.dtype))
        loss = -logp.sum() / tokens
        (weight * loss).backward()
        total += loss.item()
    return total


def bilevel_gradients(
    m: Policies, rollouts: Rollouts | None, rollouts_hat: Rollouts | None, demonstrations: list[Row],
    sft: float, rl: float, s: Settings, clock: "Clock",
) -> dict:  # fmt: skip
    """Leaves the gradients of eqs. (7), (8) and (9), for losses, in the .grad of θ, w and θ̂. Returns what to log.

    `rollouts_hat` are θ̂'s rollouts: the same object as `rollouts` when they are shared.
    """
    for optimizer in m.optimizers.values():
        optimizer.zero_grad()
    stats: dict = {}
    if rl:
        with clock("rl"):
            if m.reference is not None and rollouts.ref_logp is None:
                with torch.no_grad():
                    rollouts.ref_logp = score(m.reference, rollouts.rows, s)
            joint = rl_backward(m.policy, rollouts, s)  # θ, w += ∇L_RL(θ,w)
            stats = rl_statistics(joint, rollouts)
        if m.shadow is not None:
            with clock("shadow"):
                shared = rollouts_hat is rollouts
                if m.reference is not None and rollouts_hat.ref_logp is None:
                    with torch.no_grad():
                        rollouts_hat.ref_logp = score(m.reference, rollouts_hat.rows, s)
                truncate = s.shadow_ratio_cap if shared and s.shadow_ratio == "truncate" else None
                solo = rl_backward(m.shadow, rollouts_hat, s, truncate)  # θ̂ += ∇L_RL(θ̂,w), w −= ∇L_RL(θ̂,w)
                stats |= gain_statistics(solo, rollouts, rollouts_hat)
                stats["gain_grad_norm"] = rl * grad_norm(m.w.values())
        for p in [*m.parameters["theta"], *m.w.values()]:
            if p.grad is not None:
                p.grad.mul_(rl)  # θ: λ∇L_RL(θ,w)    w: λ(∇L_RL(θ,w) − ∇L_RL(θ̂,w))
    if sft:
        with clock("sft"):
            stats["sft_nll"] = sft_backward(m.policy, demonstrations, sft, s)  # θ, w += (1−λ)∇L_SFT
    return stats


def score(model: nn.Module, rows: list[Row], s: Settings) -> Tensor:
    parts = [rows[b.start : b.stop] for b in micro_batches(rows, s.tokens_per_micro_batch)]
    return torch.cat([response_logprobs(model, part, s.temperature, getattr(torch, s.dtype))[0] for part in parts])


def grad_norm(parameters) -> float:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()


def rl_statistics(joint: dict[str, Tensor], rollouts: Rollouts) -> dict:
    gap = (joint["logp"] - rollouts.sampler_logp).abs()
    equal = rollouts.reward.amax(1) == rollouts.reward.amin(1)  # [P]
    return dict(
        reward=rollouts.reward.mean().item(),
        response_tokens=len(gap) / rollouts.reward.numel(),
        truncated_frac=rollouts.truncated,
        dead_groups=equal.float().mean().item(),
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
        weight = torch.stack([log_ratio[a:b].sum() for a, b in zip(at, at[1:], strict=False)]).exp().clamp(max=10)  # [N]
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
    norms = {
        f"grad_norm_{name}": torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip).item()
        for name, parameters in m.parameters.items() if parameters[0].grad is not None
    }  # fmt: skip
    if all_finite(stats | norms):
        for optimizer in m.optimizers.values():
            optimizer.step()
    return norms


def all_finite(stats: dict[str, float]) -> bool:
    return all(math.isfinite(v) for v in stats.values())



class Clock:
    """Seconds by phase of one step."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
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
    prompt_stream: tasks.Stream
    shadow_stream: tasks.Stream
    sft_stream: tasks.Stream


def set_up(s: Settings, out: Path) -> Run:
    """Loads the task and the model and makes the three sets of parameters. Raises DataError, ModelError, SettingError."""
    folder = s.model
    if s.model in toy.RECIPES:
        folder = str(toy.build_base(s.model))
    model, tokenizer = load(folder, s.trust_remote_code)
    if s.rl_data:
        task = tasks.from_files(s.rl_data, s.sft_data, s.eval_data, s.eval_problems)
    else:
        task = toy.task(s.seed, s.eval_problems)
    demonstrations = tasks.prepare(task, tokenizer, s.max_new_tokens, needs_demonstrations=s.method != "rl")
    sampler = Sampler(model, stop_tokens(model, tokenizer), s.sampler_slots, getattr(torch, s.dtype))
    try:
        m = make_policies(model, s)
    except ValueError as error:
        raise SettingError(str(error)) from error
    streams = [tasks.Stream(n, (s.seed, i)) for i, n in enumerate([len(task.problems), len(task.problems), len(demonstrations)])]
    return Run(s, out, m, task, demonstrations, tokenizer, sampler, *streams)


def describe(run: Run) -> str:
    """What the run is about to do."""
    s, m = run.s, run.m
    changed = {f.name: getattr(s, f.name) for f in fields(s)}
    counts = {n: f"{sum(p.numel() for p in ps):,}" for n, ps in m.parameters.items()}
    lines = [f"method {s.method}, model {s.model}, {pick_device()}, {torch.get_num_threads()} threads"]
    lines += ["settings  " + "  ".join(f"{k}={v}" for k, v in changed.items() if v != "")]
    lines += ["trainable " + ", ".join(f"{n} {c}" for n, c in counts.items())]
    if m.wrapped:
        lines += [f"w wraps {len(m.wrapped)} linears: {m.wrapped[0]} … {m.wrapped[-1]} ({s.lora_targets})"]
    lines += [
        f"data      {len(run.task.problems)} prompts, {len(run.demonstrations)} demonstrations, "
        f"{len(run.task.evaluation)} evaluation problems"
    ]
    lines += [f"          {note}" for note in run.task.notes]
    lines += [
        f"batch     {s.prompts_per_step} prompts x {s.group_size} samples = {s.prompts_per_step * s.group_size} sequences and "
        f"{s.sft_batch} demonstrations make one update; {s.updates_per_rollout} per step, {total_steps(s)} steps; "
        f"at most {s.tokens_per_micro_batch} tokens in memory at a time"
    ]
    lines += [f"files     {run.out}/"]
    return "\n".join(lines)


def evaluate_policies(run: Run, step: int) -> dict:
    """Greedy accuracy of (θ,w), and of (θ̂,w) where there is a shadow, appended to evals.jsonl."""
    s, record = run.s, {"step": step}
    for name, policy in (("policy", run.m.policy), ("shadow", run.m.shadow)):
        if policy is not None:
            run.sampler.refresh(policy)
            record[name], _ = evaluate(
                run.sampler, run.tokenizer, run.task.evaluation, run.task.instruction, s.max_new_tokens
            )
    checkpoint.append(run.out / "evals.jsonl", record)
    return record


def state_of(run: Run, step: int, skipped: int) -> dict:
    """All there is to resume from. Random draws are functions of (seed, step, draw), so positions suffice."""
    streams = {n: getattr(run, n).position for n in ("prompt_stream", "shadow_stream", "sft_stream")}
    parameters = {n: [p.detach() for p in ps] for n, ps in run.m.parameters.items()}
    optimizers = {n: o.state_dict() for n, o in run.m.optimizers.items()}
    return dict(step=step, skipped=skipped, settings=asdict(run.s), streams=streams, parameters=parameters, optimizers=optimizers)


def restore(run: Run, state: dict) -> None:
    """Puts a checkpoint's state into the run. Raises SettingError, naming the field, if its settings differ."""
    for name, value in asdict(run.s).items():
        old = state["settings"].get(name)
        if value != old and name not in MAY_CHANGE_ON_RESUME:
            raise SettingError(f"{name} is {value!r}, but the checkpoint in {run.out} was made with {old!r}; use the same or another --out")
    with torch.no_grad():
        for name, parameters in run.m.parameters.items():
            for p, saved in zip(parameters, state["parameters"][name], strict=True):
                p.copy_(saved)
    for name, optimizer in run.m.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    for name, position in state["streams"].items():
        getattr(run, name).position = position


def train(run: Run, start: int, skipped: int) -> None:
    """The loop: Algorithm 2, and every other method with other weights."""
    s, m, stop = run.s, run.m, StopSignal()
    if start == 0:
        evaluate_policies(run, 0)
    bar = tqdm(range(start, total_steps(s)), initial=start, total=total_steps(s), desc=s.method)
    for k in bar:
        clock, log, rollouts, rollouts_hat = Clock(), {}, None, None
        plan = updates(s, k)
        if s.method == "sft_rl" and k == s.sft_steps:
            reset_optimizers(m)

        # 1  rollouts from π(θ,w); θ̂ learns from the same ones, or from its own
        if any(rl for _, rl in plan):
            with clock("sample"):
                run.sampler.refresh(m.policy)
                rollouts = rollouts_hat = collect(run.sampler, run.tokenizer, run.task, run.prompt_stream, s, k)
            if s.shadow_rollouts == "own":
                with clock("sample_shadow"):
                    run.sampler.refresh(m.shadow)
                    rollouts_hat = collect(run.sampler, run.tokenizer, run.task, run.shadow_stream, s, k)

        for sft, rl in plan * s.updates_per_rollout:
            # 2-3  the gradients of θ, w and θ̂, all at iterate k
            demonstrations = [run.demonstrations[i] for _, i in run.sft_stream.take(s.sft_batch)] if sft else []
            stats = bilevel_gradients(m, rollouts, rollouts_hat, demonstrations, sft, rl, s, clock)
            # 4-6  θ, θ̂ and w step
            with clock("optimizer"):
                stats |= clip_and_step(m, stats, s)
            log = stats | log  # of several updates, the first is logged
            skipped = 0 if all_finite(stats) else skipped + 1
            if skipped:
                dump_batch(run, k, rollouts, demonstrations, stats, skipped)
        if m.shadow is not None and s.resync_every and (k + 1) % s.resync_every == 0:
            resync(m)

        if k == start and log.get("logp_gap_mean", 0.0) > MAX_LOGP_GAP:
            raise RuntimeError(f"sampler and trainer disagree by {log['logp_gap_mean']:.3f} nats per token on the same weights")
        last = k + 1 == total_steps(s)
        if (k + 1) % s.eval_every == 0 or last:
            with clock("evaluate"):
                average = {n: v["average"] for n, v in evaluate_policies(run, k + 1).items() if n != "step"}
            tqdm.write(f"step {k + 1}: average accuracy " + ", ".join(f"{n} {a:.3f}" for n, a in average.items()))
        write_logs(run, k + 1, log, rollouts, clock, skipped)
        bar.set_postfix({key: f"{log[key]:.3f}" for key in ("reward", "sft_nll", "cooperative_gain") if key in log})
        if (k + 1) % s.save_every == 0 or last or stop.requested:
            checkpoint.save(run.out / "checkpoint", k + 1, state_of(run, k + 1, skipped))
        if stop.requested and not last:
            bar.close()
            print(f"stopped by {stop.requested.name} after step {k + 1}; everything is saved, --resume continues")
            sys.exit(128 + stop.requested)


class StopSignal:
    """SIGINT and SIGTERM ask the loop to end after this step; a second one ends the process at once."""

    def __init__(self):
        self.requested: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame) -> None:
        self.requested = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(f"\n{self.requested.name}: finishing this step, then saving", flush=True)


def reset_optimizers(m: Policies) -> None:
    for optimizer in m.optimizers.values():
        optimizer.state.clear()


@torch.no_grad()
def resync(m: Policies) -> None:
    """θ̂ := θ, with fresh Adam moments: θ's have seen SFT."""
    for p_hat, p in zip(m.parameters["theta_hat"], m.parameters["theta"], strict=True):
        p_hat.copy_(p)
    m.optimizers["theta_hat"].state.clear()


def dump_batch(run: Run, step: int, rollouts: Rollouts | None, demonstrations: list[Row], log: dict, skipped: int) -> None:
    """Keeps the batch of a skipped update for inspection; ends the run after MAX_SKIPPED in a row."""
    path = run.out / f"skipped-{step + 1:06d}.json"
    rows = {"rollouts": rollouts.rows if rollouts else [], "demonstrations": demonstrations}
    path.write_text(json.dumps({"log": {k: str(v) for k, v in log.items()}, **rows}))
    tqdm.write(f"step {step + 1}: loss or gradient is not finite; no parameter was changed, the batch is in {path}")
    if skipped == MAX_SKIPPED:
        raise RuntimeError(
            f"{MAX_SKIPPED} updates in a row were not finite; lower alpha or beta, or look into {path}. "
            f"--resume continues from the last checkpoint in {run.out / 'checkpoint'}"
        )


METRICS = (
    "reward", "response_tokens", "truncated_frac", "dead_groups", "entropy", "kl", "clip_frac", "sft_nll", "cooperative_gain",
    "gain_grad_norm", "grad_norm_theta", "grad_norm_w", "grad_norm_theta_hat", "ratio_hat_mean", "ratio_hat_max",
    "ratio_hat_cut", "logp_gap_mean", "logp_gap_max",
)  # fmt: skip


def write_logs(run: Run, step: int, log: dict, rollouts: Rollouts | None, clock: Clock, skipped: int) -> None:
    """One line of metrics.jsonl; a metric that the method does not have is null. The first group goes to samples.jsonl."""
    record = {"step": step} | {n: log[n] if math.isfinite(log.get(n, math.nan)) else None for n in METRICS}
    record["lora_norm"] = lora.delta_norm(run.m.w, run.s.lora_alpha / run.s.lora_rank) if run.m.w else None
    sampled = len(rollouts.sampler_logp) if rollouts else 0
    record["tokens_per_second"] = sampled / clock.seconds["sample"] if rollouts else None
    record["skipped_in_a_row"] = skipped
    record["seconds"] = clock.seconds
    checkpoint.append(run.out / "metrics.jsonl", record)
    for sample in rollouts.records if rollouts else []:
        checkpoint.append(run.out / "samples.jsonl", sample | {"step": step})
    if (record["truncated_frac"] or 0) > 0.5:
        tqdm.write(f"step {step}: {record['truncated_frac']:.0%} of the completions were cut off; raise max_new_tokens?")


def finish(run: Run) -> None:
    """Exports the trained policy and shows what it has become."""
    s, out = run.s, run.out
    run.sampler.refresh(run.m.policy)
    run.sampler.model.save_pretrained(out / "model")
    run.tokenizer.save_pretrained(out / "model")
    if run.m.w:
        lora.save(out / "adapter", run.m.w, s.lora_rank, s.lora_alpha, s.lora_targets.split(","), s.model)
    evals = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    columns = {"before": evals[0]["policy"], f"{s.method}, {evals[-1]['step']} steps": evals[-1]["policy"]}
    if "shadow" in evals[-1]:
        columns["its shadow (θ̂, w)"] = evals[-1]["shadow"]
    print("\ngreedy accuracy, %\n" + table(columns))
    plot.draw([out], out / "figures.png")
    print(f"\n{out}/model loads with from_pretrained; curves in {out}/figures.png; logs in {out}/*.jsonl")


def parse(argv: list[str]) -> tuple[Settings, Path, bool]:
    parser = argparse.ArgumentParser(
        description="Trains a language model with BRIDGE or one of its baselines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="sets the defaults of all other flags")
    parser.add_argument("--out", help="run folder; by default runs/METHOD-PRESET-SEED")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its newest good checkpoint")
    for f in fields(Settings):
        action = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        text = f.metadata["help"].replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **action)
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS[preset])
    args = vars(parser.parse_args(argv))
    s = check(Settings(**{f.name: args[f.name] for f in fields(Settings)}))
    return s, Path(args["out"] or f"runs/{s.method}-{preset}-{s.seed}"), args["resume"]


def main(argv: list[str]) -> None:
    try:
        s, out, resume = parse(argv)
        if not resume and out.exists() and any(out.iterdir()):
            raise SettingError(f"{out} exists: --resume continues it, --out names another folder")
        run = set_up(s, out)
        state = checkpoint.load_newest(out / "checkpoint") if resume else None
        if state:
            restore(run, state)
        elif resume:
            print(f"there is no checkpoint in {out}; starting at step 0")
        start, skipped = (state["step"], state["skipped"]) if state else (0, 0)
        out.mkdir(parents=True, exist_ok=True)
        for log in ("metrics", "samples", "evals"):
            checkpoint.cut_back(out / f"{log}.jsonl", start if state else -1)
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
        config = {"settings": asdict(s), "command": ["bridge.py", *argv], "versions": versions}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        print(describe(run), flush=True)
        train(run, start, skipped)
        finish(run)
    except (SettingError, tasks.DataError, ModelError, OSError, RuntimeError) as error:
        sys.exit(f"bridge.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
