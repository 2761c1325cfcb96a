"""Line 1 of Algorithm 2: prompts from D_RL, completions from the policy, their rewards and advantages.

Shapes: P prompts, G samples of each, N = P·G completions in group order, T response tokens of all of them end to end.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

import baselines
import grpo
from infra import parallel
from infra.model import pick_device
from infra.run import Timer, empty_cache
from ops.packed import Row
from sampler import Completion, Sampler
from settings import METHODS, Settings
from tasks.prompts import encode_prompt
from tasks.task import Problem, Stream, Task


@dataclass
class Environment:
    """What the policy acts in: problems as token ids, the sampler that completes them, the reward that grades them."""

    s: Settings
    task: Task
    tokenizer: object
    sampler: Sampler
    reward: Callable[[str, Problem], float]
    traces: dict[str, Row] = field(default_factory=dict)  # question -> its demonstration, for methods with pairs

    def encode(self, question: str) -> list[int]:
        return encode_prompt(self.tokenizer, question, self.task.instruction, self.task.template)


@dataclass
class Group:
    """The G completions of one prompt; for methods with an expert, its demonstration is the last of them."""

    draw: int  # number of the prompt's draw from D_RL
    problem: Problem
    prompt: list[int]  # token ids
    completions: list[Completion]  # G
    responses: list[str]  # G, the completions as text
    rewards: list[float]  # G
    trace: Row | None = None  # the demonstration of the prompt, for methods with pairs

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ: equal rewards have zero advantages and no RL gradient."""
        return min(self.rewards) < max(self.rewards)


@dataclass
class Rollouts:
    """Sampled completions as GRPO needs them: the whole batch, on every rank."""

    rows: list[Row]  # N
    reward: Tensor  # [P, G]
    advantage: Tensor  # [T]
    weight: Tensor  # [T] of a token in the loss
    sampler_logp: Tensor  # [T] log π in the sampler, nan for expert tokens
    expert: Tensor  # [T] bool, whether the token is of a demonstration
    stats: dict[str, float]  # over everything sampled, before dynamic sampling chooses
    records: list[dict]  # N, as in samples.jsonl
    traces: list[Row] = field(default_factory=list)  # demonstrations of these prompts for the SFT term
    score_rewarded: bool = False  # the cooperative gain needs log-probs of rewarded completions without a gradient, too
    old_logp: Tensor | None = None  # [T] log π of the policy that sampled; None before its first update: the ratio is 1

    @property
    def offsets(self) -> list[int]:  # [N+1] start of each row's response in [0, T), and T
        return [0, *accumulate(len(response) for _, response in self.rows)]

    def distinct(self, kl: bool) -> tuple[list[int], list[int], Tensor, Tensor]:
        """(rows with a gradient, rows to score, weight [T], source [T]): what a pass over the rollouts must run.

        Equal completions of a prompt run once, with the sum of their weights; token t has the results of source[t].
        Without an advantage or a KL term a row has no gradient. If `score_rewarded`, those with a reward are scored. If
        no row has a gradient, the first one stands for all.
        """
        *starts, T = offsets = self.offsets
        per_row = self.advantage[starts], self.weight[starts], self.reward.flatten(), self.expert[starts]
        facts = [x.tolist() for x in per_row]  # 4 x N
        source, first, trained, scored = torch.arange(T), {}, [], []
        for i, ((prompt, response), *of_row) in enumerate(zip(self.rows, *facts, strict=True)):
            original = first.setdefault((*prompt, -1, *response, -1, *of_row), i)
            advantage, weight, reward, _ = of_row
            if original != i:
                source[starts[i] : offsets[i + 1]] = torch.arange(starts[original], offsets[original + 1])
            elif weight and (advantage or kl):
                trained.append(i)
            elif self.score_rewarded and reward:
                scored.append(i)
        source = source.to(self.weight.device)
        trained = trained or [0]
        scored = [i for i in scored if i != trained[0]]
        return trained, scored, torch.zeros_like(self.weight).index_add(0, source, self.weight), source

    def batches(self, chosen: list[int], s: Settings) -> Iterator[tuple[list[Row], Tensor]]:
        """This rank's micro-batches of some rows: (rows, places [t] of their response tokens in [0, T))."""
        if chosen:
            offsets = self.offsets
            places = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in chosen]).to(self.weight.device)
            for rows, t in parallel.batches([self.rows[i] for i in chosen], s):
                yield rows, places[t]


def sample_rollouts(
    env: Environment, prompts: Stream, policy: nn.Module, shadow: nn.Module | None, step: int, timer: Timer
) -> tuple[Rollouts, Rollouts]:
    """(the policy's rollouts, the shadow's): the same ones or, with shadow_rollouts own, two sets on equal prompts.

    Draws P prompts, samples G completions of each from every model that samples, and grades them. With dynamic
    sampling up to `dynamic_sampling` more batches of prompts replace those without a signal. A prompt has a signal if
    the rewards of every model's group of it differ, so policy and shadow keep the same prompts.
    """
    s = env.s
    models = {"sample": policy}  # phase of the step -> the model that samples in it
    if shadow is not None and s.shadow_rollouts == "own":
        models["sample_shadow"] = shadow
    sampled: dict[str, list[Group]] = {phase: [] for phase in models}
    empty_cache()  # training's free memory goes to the sampler
    for _ in range(1 + s.dynamic_sampling):
        draws = prompts.take(s.prompts_per_step)
        for phase, model in models.items():
            with timer(phase):
                env.sampler.refresh(model)
                sampled[phase] += sample_groups(env, draws, step)
        groups_of_prompts = list(zip(*sampled.values(), strict=True))  # per prompt, one group of each model
        signals = [all(group.has_signal for group in groups) for groups in groups_of_prompts]
        if sum(signals) >= s.prompts_per_step:
            break
    empty_cache()  # the sampler's free memory goes to training
    kept = list(range(len(signals)))
    if s.dynamic_sampling:
        kept.sort(key=lambda prompt: not signals[prompt])  # those with signal first, each kind in the order of draws
    kept = kept[: s.prompts_per_step]
    rollouts = [make_rollouts([groups[i] for i in kept], s, statistics(groups)) for groups in sampled.values()]
    return rollouts[0], rollouts[-1]


def sample_groups(env: Environment, draws: list[tuple[int, int]], step: int) -> list[Group]:
    """One group for each (number of the draw, index of the problem), sampled with the sampler's weights.

    Every rank samples for its share and receives the groups of the others.
    """
    own_share = draws[parallel.rank() :: parallel.world_size()]
    groups = parallel.all_gather(sample_share(env, own_share, step))
    return sorted(groups, key=lambda group: group.draw)


def sample_share(env: Environment, draws: list[tuple[int, int]], step: int) -> list[Group]:
    """The groups of this rank. The key of a sample's random numbers is (seed, step, draw, i)."""
    s = env.s
    problems = [env.task.problems[i] for _, i in draws]
    prompts = [env.encode(problem.question) for problem in problems]
    keys = [(s.seed, step, draw) for draw, _ in draws]
    sampled = env.sampler.generate(prompts, keys, s.group_size, s.max_new_tokens, s.temperature)
    groups = []
    for (draw, _), problem, prompt, completions in zip(draws, problems, prompts, sampled, strict=True):
        trace = env.traces.get(problem.question)
        if METHODS[s.method].joins_group:
            completions = [*completions, Completion(trace[1], [math.nan] * len(trace[1]), "expert")]
        responses = [c.text(env.tokenizer, env.sampler.stop) for c in completions]
        rewards = [env.reward(response, problem) for response in responses]
        groups.append(Group(draw, problem, prompt, completions, responses, rewards, trace))
    return groups


def make_rollouts(groups: list[Group], s: Settings, stats: dict[str, float]) -> Rollouts:
    """Lays the completions of P groups end to end, each token with its advantage and its weight in the loss."""
    completions = [c for group in groups for c in group.completions]  # N
    reward = torch.tensor([group.rewards for group in groups], dtype=torch.float64)  # [P, G] as in has_signal
    lengths = torch.tensor([len(c.ids) for c in completions])  # [N]
    keep = torch.tensor([c.finish_reason != "length" or not s.overlong_mask for c in completions])  # [N]
    if s.method == "hpt":  # a prompt whose demonstration is imitated has no RL loss, no KL term either
        keep &= ~baselines.imitated(s, reward).repeat_interleave(reward.shape[1])
    expert = torch.tensor([c.finish_reason == "expert" for c in completions])  # [N]
    entropy = torch.tensor([-sum(c.logps) / len(c.logps) for c in completions]).view_as(reward)  # estimated
    advantage = baselines.advantages(s, reward, entropy).float()  # [P, G]
    device = pick_device()
    return Rollouts(
        rows=[(group.prompt, c.ids) for group in groups for c in group.completions], reward=reward.float(),
        stats=stats, score_rewarded=METHODS[s.method].shadow and s.shadow_rollouts != "own",
        advantage=advantage.flatten().repeat_interleave(lengths).to(device),
        weight=grpo.token_weights(lengths, s.aggregation_of_method, s.max_new_tokens, keep).to(device),
        expert=expert.repeat_interleave(lengths).to(device),
        traces=[group.trace for group, imitated in zip(groups, baselines.imitated(s, reward), strict=True) if imitated],
        sampler_logp=torch.tensor([logp for c in completions for logp in c.logps], device=device),
        records=[
            dict(question=group.problem.question, answer=group.problem.answer, response=response, reward=reward,
                 finish_reason=c.finish_reason)
            for group in groups
            for c, response, reward in zip(group.completions, group.responses, group.rewards, strict=True)
        ],
    )  # fmt: skip


def statistics(groups: list[Group]) -> dict[str, float]:
    """Means over all samples, and the fraction of groups without signal."""
    graded = [pair for group in groups for pair in zip(group.completions, group.rewards, strict=True)]
    completions, rewards = zip(*[(c, r) for c, r in graded if c.finish_reason != "expert"], strict=True)
    tokens = sum(len(c.ids) for c in completions)
    return dict(
        reward=sum(rewards) / len(completions), response_tokens=tokens / len(completions),
        truncated_frac=sum(c.finish_reason == "length" for c in completions) / len(completions),
        zero_std_groups=sum(not group.has_signal for group in groups) / len(groups),
        sampled_tokens=tokens,
    )  # fmt: skip


def rl_statistics(tokens: dict[str, Tensor], rollouts: Rollouts) -> dict[str, float]:
    """Over sampled tokens with a gradient; entropy over all sampled: the mean of −log π estimates it without bias."""
    sampled = ~rollouts.expert  # [T]
    trained, entropy = sampled & (tokens["trained"] > 0), -rollouts.sampler_logp[sampled].mean().item()
    gap = (tokens["logp"] - rollouts.sampler_logp)[trained].abs()
    kl, limited = (tokens[name][trained].mean().item() for name in ("kl", "limited"))
    gaps = dict(logp_gap_mean=gap.mean().item(), logp_gap_max=gap.max().item())
    return rollouts.stats | dict(entropy=entropy, kl=kl, clip_frac=limited) | gaps


def gain_statistics(tokens_hat: dict[str, Tensor], rollouts: Rollouts, rollouts_hat: Rollouts) -> dict[str, float]:
    """The cooperative gain J_RL(θ,w) − J_RL(θ̂,w) in units of reward, and how far θ̂ is from θ.

    With own rollouts the gain is a difference of mean rewards. On shared ones each sequence has the importance weight
    π(θ̂,w)/π(θ,w) for θ̂, at most 10, which estimates θ̂'s reward from below and the gain from above.
    """
    reward = rollouts.reward.flatten()  # [N]
    reward_hat = rollouts_hat.reward.mean()
    if rollouts_hat is rollouts:
        log_ratio = (tokens_hat["logp"] - rollouts.old_logp).cpu().split([len(ids) for _, ids in rollouts.rows])
        weight = torch.stack([of_sequence.sum() for of_sequence in log_ratio]).exp().clamp(max=10)  # [N]
        reward_hat = (weight * reward).mean()
    ratio, limited = (tokens_hat[name][tokens_hat["trained"] > 0] for name in ("ratio", "limited"))
    return dict(
        cooperative_gain=(reward.mean() - reward_hat).item(), ratio_hat_mean=ratio.mean().item(),
        ratio_hat_max=ratio.max().item(), ratio_hat_limited=limited.mean().item(),
    )  # fmt: skip
