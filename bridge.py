"""BRIDGE: supervised fine-tuning and reinforcement learning as one bilevel problem (arXiv 2509.06948).

Three sets of parameters: θ, the base model, trained in full; w, a LoRA adapter; θ̂, a copy of θ that takes RL steps
only. The policy is π(·|x; θ, w). w ascends the cooperative gain J_RL(θ,w) − J_RL(θ̂,w): how much more reward joint
training gets than RL alone. One iteration k, every gradient taken at iterate k (Algorithm 2 of the paper):

    1   sample demonstrations from D_SFT and prompts from D_RL; rollouts from π(θ,w); rewards
    2-3 ∇J_SFT(θ,w) and ∇J_RL(θ,w), for θ and w at once; ∇J_RL(θ̂,w), for θ̂ and w at once
    4   θ ← θ + α[(1−λ)∇_θ J_SFT + λ∇_θ J_RL]                                                            (7)
    5   θ̂ ← θ̂ + α ∇_θ̂ J_RL(θ̂,w)                                                                         (9)
    6   w ← w + β[(1−λ)∇_w J_SFT + λ(∇_w J_RL(θ,w) − ∇_w J_RL(θ̂,w))]                                     (8)

The code minimises L = −J. The other methods (--method) are the same loop with other weights, see `updates`. Ranks share
the work; every rank has rollouts, gradients and statistics of the whole batch. [T]: all its response tokens, in order.
"""

import sys

from settings import METHODS, SettingError, Settings, parse, start_program

if __name__ == "__main__":
    start_program(parse)

import copy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

import baselines
import grpo
import lora
import plot
from evaluate import evaluate
from infra import checkpoint, export, memory, parallel, report
from infra.model import checkpoint_layers, model_fingerprint, pick_device
from infra.run import RunFolder, StopSignal, Timer, all_finite, describe, one_line_errors, print0, tracked
from logprob import response_logprobs
from ops.decoder import share_storage_copy
from ops.packed import Row
from rollout import Environment, Rollouts, gain_statistics, rl_statistics, sample_rollouts
from sampler import Sampler
from tasks.builtin import builtin_config
from tasks.loading import describe_data, load_training
from tasks.task import Stream, fingerprint


def updates(s: Settings, k: int) -> list[tuple[float, float]]:
    """The updates of the method at step k, in order, each as (μ, λ): the weights of L_SFT and L_RL."""
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
        case "mix_lora" | "no_meta" | "bridge":  # eqs. (7) and (8)
            return [(1 - s.lam, s.lam)]
    raise SettingError(f"method {s.method} has no case in bridge.py:updates")


@dataclass
class Policies:
    """π(θ,w), its shadow π(θ̂,w) on the same w, and the optimizers of the three sets of parameters."""

    policy: nn.Module
    shadow: nn.Module | None
    reference: nn.Module | None  # the initial model, if there is a KL term
    w: lora.Adapter  # empty for methods without an adapter
    optimizers: dict[str, torch.optim.Optimizer]  # theta, and if the method has them w, theta_hat, theta_sft (θ's, too)

    @property
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        return {name: o.param_groups[0]["params"] for name, o in self.optimizers.items() if name != "theta_sft"}


def make_policies(model: nn.Module, s: Settings) -> Policies:
    """θ̂ := θ, and both share the adapter w. Raises SettingError if lora_targets match no layer."""
    checkpoint_layers(model, s.checkpoint_layers)
    method, sharded = METHODS[s.method], s.shard and parallel.world_size() > 1
    copy_of = share_storage_copy if sharded else copy.deepcopy  # sharding copies the slices anyway
    shadow = copy_of(model).requires_grad_(s.shadow_rollouts != "one_step") if method.shadow else None
    reference = copy_of(model).requires_grad_(False) if s.kl_coef > 0 else None
    try:
        w = lora.create(model, s.lora_targets.split(","), s.lora_rank, s.seed, pick_device()) if method.adapter else {}
    except ValueError as error:
        raise SettingError(str(error)) from error
    for base in filter(None, (model, shadow)):
        lora.attach(base, w, s.lora_alpha / s.lora_rank)
    for module in filter(None, (model, shadow, reference) if s.shard else ()):
        parallel.shard(module, w.values(), train=module is not reference)
    theta_hat = lora.base_parameters(shadow) if shadow is not None else {}
    sets = {"theta": (lora.base_parameters(model), s.alpha), "w": (w, s.beta), "theta_hat": (theta_hat, s.alpha)}
    sets |= {"theta_sft": sets["theta"]} if method.two_optimizers else {}
    optimizers = {
        name: torch.optim.AdamW(list(parameters.values()), lr=rate, weight_decay=0.0, fused=True)
        for name, (parameters, rate) in sets.items() if parameters
    }  # fmt: skip
    return Policies(model, shadow, reference, w, optimizers)


def rl_pass(
    model: nn.Module, rollouts: Rollouts, reference: nn.Module | None, s: Settings, ratio_cap: float | None = None
) -> dict[str, Tensor]:
    """Adds this rank's part of ∇L_RL to .grad. Returns logp, entropy, slope, ratio, limited, kl and trained, each [T].

    Only the rows of `Rollouts.distinct` are run. Every rank gets the results of all tokens, 0 of those that are not
    run. Without `rollouts.old_logp` the model's own log-probs are π_old. slope·weight is a token's ∂J_RL/∂log π.
    """
    dtype = getattr(torch, s.dtype)
    trained, scored, weight, source = rollouts.distinct(s.kl_coef > 0)
    tokens = weight.new_zeros(7, len(weight))
    for train, chosen in ((True, trained), (False, scored)):
        for rows, t in rollouts.batches(chosen, s):
            with torch.no_grad():
                ref_logp = None if reference is None else response_logprobs(reference, rows, s.temperature, dtype)[0]
            with torch.set_grad_enabled(train):
                logp, entropy = response_logprobs(model, rows, s.temperature, dtype)  # [t]
            old_logp = logp.detach() if rollouts.old_logp is None else rollouts.old_logp[t]
            A, expert = rollouts.advantage[t], rollouts.expert[t]
            loss, terms = grpo.grpo_loss(
                logp, old_logp, A, weight[t] * ~expert, s.clip_of_method, ratio_cap, ref_logp, s.kl_coef
            )
            if METHODS[s.method].joins_group:
                loss = loss - (weight[t] * expert * baselines.shaped_surrogate(logp, A)).sum()
            if train:
                logp.retain_grad()
                loss.backward()
            slope = -logp.grad / weight[t].clamp(min=1e-30) if train else torch.zeros_like(logp)
            tokens[:, t] = torch.stack([logp, entropy, slope, *terms.values(), torch.full_like(logp, train)]).detach()
    parallel.all_reduce([tokens])
    return dict(zip(("logp", "entropy", "slope", *terms, "trained"), tokens[:, source], strict=True))


def sft_pass(model: nn.Module, demonstrations: list[Row], weight: float, s: Settings) -> Tensor:
    """Adds this rank's part of weight·∇L_SFT to .grad; returns −log π of all response tokens [T]; L_SFT is its mean."""
    nll = torch.zeros(sum(len(response) for _, response in demonstrations), dtype=torch.float64)
    for rows, t in parallel.batches(demonstrations, s):
        logp, entropy = response_logprobs(model, rows, dtype=getattr(torch, s.dtype))
        weights = baselines.sft_weights(s, logp, entropy, [len(response) for _, response in rows])
        (weight * -(weights * logp).sum() / len(nll)).backward()
        nll[t] = -logp.detach().to(nll)
    parallel.all_reduce([nll])
    return nll


def step_shadow_from_theta(m: Policies, s: Settings) -> None:
    """θ̂ := θ^k + α∇_θ J_RL(θ^k,w), the one-step reading: θ's RL gradient from .grad, and a copy of θ's moments."""
    optimizer, theta_hat = m.optimizers["theta_hat"], m.parameters["theta_hat"]
    for p, p_hat in zip(m.parameters["theta"], theta_hat, strict=True):
        p_hat.data.copy_(p.data)
        p_hat.grad = p.grad.clone()
        optimizer.state[p_hat] = {name: x.clone() for name, x in m.optimizers["theta"].state.get(p, {}).items()}
    parallel.all_reduce_gradients(theta_hat)
    torch.nn.utils.clip_grads_with_norm_(theta_hat, s.grad_clip, parallel.total_norm(p.grad for p in theta_hat))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state.clear()


def bilevel_gradients(
    m: Policies, rollouts: Rollouts | None, rollouts_hat: Rollouts | None, demonstrations: list[Row], mu: float,
    lam: float, s: Settings, timer: Timer, seen: dict | None = None,
) -> dict[str, float]:  # fmt: skip
    """Writes the gradients of eqs. (7), (8) and (9), of losses, to the .grad of θ, w and θ̂; returns metrics.

    `mu` and `lam` weigh L_SFT and L_RL: 1−λ and λ. `rollouts_hat` are θ̂'s, or `rollouts` itself if they are shared.
    θ's two terms add up in .grad. w's three are taken out one after another. `seen` gets the numbers of all tokens.
    """
    for optimizer in m.optimizers.values():
        optimizer.zero_grad()
    stats, seen = {}, {} if seen is None else seen
    g_sft = g_rl = g_rl_hat = [torch.zeros_like(p) for p in m.w.values()]
    shared = m.shadow is not None and rollouts_hat is rollouts  # then both have one surrogate: equal θ̂, equal gradient
    ratio_cap = s.shadow_ratio_cap if shared and s.shadow_ratio_cap > 0 else None
    if lam:
        with timer("rl"):
            tokens = rl_pass(m.policy, rollouts, m.reference, s, ratio_cap)
            seen.setdefault("policy", (rollouts, tokens))
            # π_old is the policy before its first update on these rollouts. REINFORCE has no ratio.
            if rollouts.old_logp is None and METHODS[s.method].loss != "reinforce":
                rollouts.old_logp = tokens["logp"]
            g_w = parallel.take_gradients(m.w.values())  # ∇_w L_RL(θ,w)
            g_rl = g_w if METHODS[s.method].w_takes_rl else g_rl  # no_meta: w takes SFT alone
            stats |= rl_statistics(tokens, rollouts)
        if m.shadow is not None:
            with timer("shadow"):
                if s.shadow_rollouts == "one_step":
                    step_shadow_from_theta(m, s)
                tokens_hat = rl_pass(m.shadow, rollouts_hat, m.reference, s, ratio_cap)
                if rollouts_hat.old_logp is None:  # θ̂'s own rollouts: π_old is θ̂ before its first update on them
                    rollouts_hat.old_logp = tokens_hat["logp"]
                g_rl_hat = parallel.take_gradients(m.w.values())  # ∇_w L_RL(θ̂,w); θ̂.grad is now that of eq. (9)
                stats |= gain_statistics(tokens_hat, rollouts, rollouts_hat)
                seen.setdefault("shadow", (rollouts_hat, tokens_hat))
                gain = [lam * (rl - rl_hat) for rl, rl_hat in zip(g_rl, g_rl_hat, strict=True)]
                stats["gain_grad_norm"] = parallel.total_norm(gain).item()
        for p in m.parameters["theta"]:
            p.grad.mul_(lam)  # λ∇_θ L_RL(θ,w)
    if mu and demonstrations:
        with timer("sft"):
            nll = sft_pass(m.policy, demonstrations, mu, s)  # θ.grad is now that of eq. (7)
            stats["sft_nll"] = nll.mean().item()
            seen.setdefault("sft", (demonstrations, nll))
            g_sft = parallel.take_gradients(m.w.values())  # (1−λ)∇_w L_SFT(θ,w): the loss has the weight
    for p, sft, rl, rl_hat in zip(m.w.values(), g_sft, g_rl, g_rl_hat, strict=True):
        p.grad = sft + lam * (rl - rl_hat)  # eq. (8); while θ̂ = θ the difference is exactly 0
    with timer("reduce"):
        for name in [name for name in m.parameters if name != "w"]:  # take_gradients has summed w's
            parallel.all_reduce_gradients(m.parameters[name])
    return stats


def clip_and_step(m: Policies, stats: dict[str, float], s: Settings, lam: float = 1.0) -> dict[str, float]:
    """Clips each set's gradient and steps all optimizers from iterate k, or none if a number is not finite."""
    norms = {}
    for name, parameters in m.parameters.items():
        if parameters[0].grad is not None:
            norm = parallel.total_norm(p.grad for p in parameters)
            torch.nn.utils.clip_grads_with_norm_(parameters, s.grad_clip, norm)
            norms[f"grad_norm_{name}"] = norm.item()
    idle = "theta" if lam == 0 and "theta_sft" in m.optimizers else "theta_sft"  # Algorithm 1: one for each loss
    for optimizer in [o for name, o in m.optimizers.items() if name != idle]:
        if all_finite(stats | norms):
            optimizer.step()
        optimizer.zero_grad()  # free the gradients before sampling
    return norms


@dataclass
class Run:
    """Everything a step needs."""

    s: Settings
    folder: RunFolder
    m: Policies
    env: Environment
    demonstrations: list[Row]  # D_SFT
    prompts: Stream  # draws from D_RL
    demos: Stream  # draws from D_SFT
    fingerprints: dict[str, str]  # of the data, the initial weights and the tokenizer
    skipped: int = 0  # updates skipped since the last step without one

    def demonstrations_of_update(self, rollouts: Rollouts | None) -> list[Row]:
        """The next ones of D_SFT; for methods with pairs those of the rollouts' prompts."""
        own = METHODS[self.s.method].paired
        return rollouts.traces if own else [self.demonstrations[i] for _, i in self.demos.take(self.s.sft_batch)]


def train(run: Run, start: int) -> None:
    """Algorithm 2 from iterate `start`; the other methods are the same loop with other weights."""
    s, m, stop, total = run.s, run.m, StopSignal(), run.s.total_steps
    if start in (0, total) and not run.folder.is_evaluated(start):  # what is exported has its own accuracies
        evaluate_policies(run, start)
    for k in (bar := tqdm(range(start, total), initial=start, total=total, desc=s.method, disable=parallel.rank() > 0)):
        timer, log, seen, skipped, plan = Timer(k + 1), {}, {}, 0, updates(s, k)
        if s.method == "sft_rl" and k == s.sft_steps:  # a cold start gives RL fresh optimizers
            m.optimizers["theta"].state.clear()

        # 1  rollouts from π(θ,w); θ̂ trains on the same ones, or on its own on the same prompts
        rollouts = rollouts_hat = None
        if any(lam for _, lam in plan):
            rollouts, rollouts_hat = sample_rollouts(run.env, run.prompts, m.policy, m.shadow, k, timer)
        for mu, lam in plan * (s.updates_per_rollout if rollouts is not None else 1):
            # 2-3  the gradients of θ, w and θ̂, all at iterate k
            demonstrations = run.demonstrations_of_update(rollouts) if mu else []
            stats = bilevel_gradients(m, rollouts, rollouts_hat, demonstrations, mu, lam, s, timer, seen)
            # 4-6  θ, θ̂ and w step
            with timer("optimizer"):
                stats |= clip_and_step(m, stats, s, lam)
            if not all_finite(stats):
                skipped += 1
                run.folder.dump_skipped(f"{k + 1:06d}-{skipped}", stats, rollouts and rollouts.rows, demonstrations)
            log = stats | log  # the first of several updates is logged

        last, run.skipped = k + 1 == total, run.skipped + skipped if skipped else 0
        if (k + 1) % s.eval_every == 0 or last:
            with timer("evaluate"):
                evaluate_policies(run, k + 1)
        log["lora_norm"] = lora.delta_norm(m.w, s.lora_alpha / s.lora_rank) if m.w else None
        run.folder.log_step(k + 1, log, timer.seconds, run.skipped, seen, run.env.tokenizer)
        bar.set_postfix({name: f"{log[name]:.3f}" for name in ("reward", "sft_nll", "cooperative_gain") if name in log})
        if (stopped := stop.on_any_rank()) or (k + 1) % s.save_every == 0 or last:
            with timer("save"):
                save(run, k + 1)
        if stopped and not last:  # not stop.requested, which a signal may have set since, on one rank
            stop.exit(k + 1)


def evaluate_policies(run: Run, step: int) -> None:
    """Greedy accuracy of (θ,w), and of (θ̂,w) if there is a shadow: one line of evals.jsonl."""
    record, answers, env = {}, {}, run.env
    for name, model in (("policy", run.m.policy), ("shadow", run.m.shadow)):
        if model is not None:
            env.sampler.refresh(model)
            record[name], answers[name] = evaluate(env.sampler, env.tokenizer, env.task, run.s.max_new_tokens)
    run.folder.log_evaluation(step, record, answers)
    print0(f"step {step}: accuracy " + ", ".join(f"{name} {record[name]['average']:.3f}" for name in record))


def card_facts(env: Environment) -> dict:
    """What an export needs beside weights: the stop tokens, and for the card a question and its prompt."""
    question = env.task.evaluation[0].question
    prompt = env.tokenizer.decode(env.encode(question))
    return dict(stop=env.sampler.stop, question=question, prompt=prompt)


def save(run: Run, step: int) -> None:
    """Writes a checkpoint. Random draws are functions of (seed, step, draw), so positions are all their state."""
    facts = dict(step=step, skipped=run.skipped, prompts=run.prompts.position, demos=run.demos.position)
    facts |= dict(run.fingerprints, settings=asdict(run.s), export=card_facts(run.env))
    checkpoint.save(run.folder.path / "checkpoint", step, facts, checkpoint.state_tensors(run.m.optimizers))


def restore(run: Run, saved: checkpoint.Saved) -> int:
    """Loads a checkpoint into the run; returns its step. Raises SettingError if it is another run's."""
    checkpoint.refuse_other_run(facts := saved.facts, run.s, run.fingerprints, run.folder.path)
    saved.restore(run.m.optimizers)
    run.prompts.position, run.demos.position, run.skipped = facts["prompts"], facts["demos"], facts["skipped"]
    return facts["step"]


def set_up(s: Settings, folder: RunFolder) -> Run:
    """Loads task and model. Raises DataError, ModelError or SettingError."""
    loaded = load_training(s)
    sampler = Sampler(loaded.model, loaded.stop, s.sampler_slots, getattr(torch, s.dtype))
    env = Environment(s, loaded.task, loaded.tokenizer, sampler, loaded.reward, loaded.demonstration_of)
    fingerprints = dict(data=fingerprint(loaded.task), model=model_fingerprint(loaded.model, loaded.tokenizer))
    return Run(
        s, folder, make_policies(loaded.model, s), env, loaded.demonstrations,
        prompts=Stream(len(loaded.task.problems), (s.seed, 0)),
        demos=Stream(len(loaded.demonstrations), (s.seed, 1)), fingerprints=fingerprints,
    )  # fmt: skip


def main(argv: list[str]) -> None:
    with one_line_errors("bridge.py"):
        s, args = parse(argv)
        if args.dry_run:
            return memory.dry_run(s, builtin_config(s.model) or memory.config_of(s.model), args.gpu, args.gpus)
        resume = parallel.start() or args.resume  # torchrun --max-restarts resumes by itself
        folder = RunFolder(out := args.out, args.keep_rollouts)
        folder.refuse_existing(unless=resume)
        run = set_up(s, folder)
        saved = checkpoint.newest(out / "checkpoint") if resume else None
        start = restore(run, saved) if saved else 0
        folder.begin(s, argv, start if saved else -1)
        env = run.env
        data = describe_data(env.task, env.tokenizer, env.sampler.stop, run.demonstrations)
        print0(describe(s, run.m.parameters, data))
        with tracked(folder, s, start):
            train(run, start)
        run.env.sampler.refresh(run.m.policy)
        if parallel.rank() == 0:
            export.save_run(out, s, env.sampler.model, env.tokenizer, card_facts(env), run.m.w)
            plot.draw([out], out / "figures.png")
            print0(f"\n{out}/model loads with from_pretrained; a look inside: {report.write(out)}; logs: {out}/*.jsonl")
        parallel.end()


if __name__ == "__main__":
    main(sys.argv[1:])
