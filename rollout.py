"""Step 1 of bridge.py's docstring: prompts from D_RL, completions from the policy, their rewards and advantages.

Shapes: P prompts, G samples of each, N = P·G completions in group order, T response tokens of all of them end to end.
A row is a pair (token ids of a prompt, token ids of a response).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import baselines
import grpo
from infra import parallel
from infra.model import pick_device
from infra.run import Timer, empty_cache
from ops.packed import Row, response_offsets
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
    demonstrations_of: dict[str, list[Row]] = field(default_factory=dict)  # by question, for methods that pair them

    def encode(self, question: str) -> list[int]:
        return encode_prompt(self.tokenizer, question, self.task.instruction, self.task.template)

    def is_right(self, reward: float) -> bool | None:
        """Whether this is the reward of a right response; None if the reward function does not state right_from."""
        right_from = getattr(self.reward, "right_from", None)
        return None if right_from is None else reward >= right_from

    def demonstration(self, draw: int, i: int) -> Row | None:
        """The demonstration of problem i in one of its draws: each pass over D_RL takes the next of its question."""
        known = self.demonstrations_of.get(self.task.problems[i].question)
        if not known:
            return None
        epoch = draw // len(self.task.problems)
        return known[(epoch + i) % len(known)]


@dataclass
class Group:
    """The G completions of one prompt; for LUFFY and SRFT the last of them is the prompt's demonstration."""

    draw: int  # number of the prompt's draw from D_RL
    problem: Problem
    prompt: list[int]  # token ids
    completions: list[Completion]  # G
    responses: list[str]  # G, the completions as text
    rewards: list[float]  # G
    right: list[bool | None]  # G, None where the reward does not state what is right
    demonstration: Row | None = None  # of the prompt, for methods that pair them

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
    sampler_logp: Tensor  # [T] log π in the sampler, nan for tokens of demonstrations
    is_demonstration: Tensor  # [T] bool
    stats: dict[str, float]  # over everything sampled, before dynamic sampling chooses
    records: list[dict]  # N, as in samples.jsonl
    demonstrations: list[Row] = field(default_factory=list)  # of these prompts, for the SFT term
    score_rewarded: bool = False  # the cooperative gain needs log-probs of rewarded rows without a gradient, too
    old_logp: Tensor | None = None  # [T] log π_old; None: the policy of the first update is π_old, every ratio is 1

    @property
    def offsets(self) -> list[int]:  # [N+1] start of each row's response in [0, T), and T
        return response_offsets(self.rows)

    def rows_to_run(self, has_kl: bool) -> tuple[list[int], list[int]]:
        """(rows with a gradient, rows without one that are scored) of a pass; it need not run the others.

        A row has a gradient if a token of it has a weight and an advantage or a KL term (`has_kl`). With
        `score_rewarded`, the other rows with a reward are scored.
        """
        has_gradient = self.weight != 0  # [T]
        if not has_kl:
            has_gradient &= self.advantage != 0
        tokens_of_rows = has_gradient.cpu().tensor_split(self.offsets[1:-1])  # N tensors
        trained = [i for i, tokens in enumerate(tokens_of_rows) if tokens.any()]
        # FSDP's ranks must all run a backward pass: if no row has a gradient, row 0 is run anyway.
        if not trained:
            trained = [0]
        scored = []
        if self.score_rewarded:
            rewarded = self.reward.flatten().nonzero()[:, 0].tolist()
            scored = [i for i in rewarded if i not in trained]
        return trained, scored


def sample_rollouts(
    env: Environment,
    prompt_order: Stream,  # of D_RL
    policy: nn.Module,  # π(θ,w)
    shadow: nn.Module | None,  # π(θ̂,w)
    step: int,
    timer: Timer,
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
    in_sampler = None  # the model whose weights the sampler has

    empty_cache()  # training's free memory goes to the sampler
    for _ in range(1 + s.dynamic_sampling):
        draws = prompt_order.take(s.prompts_per_step)
        for phase, model in models.items():
            with timer(phase):
                if model is not in_sampler:
                    env.sampler.refresh(model)
                    in_sampler = model
                sampled[phase] += sample_groups(env, draws, step)
        groups_of_prompts = zip(*sampled.values(), strict=True)  # one group of each model
        signals = [all(group.has_signal for group in groups) for groups in groups_of_prompts]
        if sum(signals) >= s.prompts_per_step:
            break
    empty_cache()  # the sampler's free memory goes to training

    kept = list(range(len(signals)))
    if s.dynamic_sampling:
        kept.sort(key=lambda prompt: not signals[prompt])  # those with signal first, each kind in the order of draws
    kept = kept[: s.prompts_per_step]
    rollouts = []  # of the policy and, if they are its own, of the shadow
    for groups in sampled.values():
        kept_groups = [groups[i] for i in kept]
        rollouts.append(make_rollouts(kept_groups, s, statistics(groups)))
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
    for (draw, i), problem, prompt, completions in zip(draws, problems, prompts, sampled, strict=True):
        # Methods that pair prompts with demonstrations use it in the group, in the SFT term, or in both.
        demonstration = env.demonstration(draw, i)
        # LUFFY and SRFT: the demonstration is graded like a sample, and counts in the mean of its group.
        if METHODS[s.method].joins_group:
            ids = demonstration[1]
            completions = [*completions, Completion(ids, [math.nan] * len(ids), "demonstration")]
        responses = [c.text(env.tokenizer, env.sampler.stop) for c in completions]
        rewards = [env.reward(response, problem) for response in responses]
        right = [env.is_right(reward) for reward in rewards]
        groups.append(Group(draw, problem, prompt, completions, responses, rewards, right, demonstration))
    return groups


def make_rollouts(groups: list[Group], s: Settings, stats: dict[str, float]) -> Rollouts:
    """Lays the completions of P groups end to end, each token with its advantage and its weight in the loss."""
    method = METHODS[s.method]
    completions = [c for group in groups for c in group.completions]  # N
    lengths = torch.tensor([len(c.ids) for c in completions])  # [N]
    reward = torch.tensor([group.rewards for group in groups], dtype=torch.float64)  # [P, G] exact, as in has_signal

    advantage = grpo.group_advantages(reward, divide_by_std=s.aggregation_of_method != "dr_grpo")  # [P, G]
    if method.asks_right:
        is_right = torch.tensor([group.right for group in groups])  # [P, G]
    if s.method == "srft":
        entropy = torch.tensor([-sum(c.logps) / len(c.logps) for c in completions])  # [N] estimated
        advantage = baselines.srft_advantages(advantage, is_right, entropy.view_as(reward))

    # Sequences of weight 0 have no RL loss and no KL term.
    keep = torch.tensor([c.finish_reason != "length" or not s.overlong_mask for c in completions])  # [N]
    demonstrations = [group.demonstration for group in groups if method.paired]
    if s.method == "hpt":
        imitates = baselines.hpt_imitates(is_right)  # [P]
        keep &= ~imitates.repeat_interleave(reward.shape[1])
        demonstrations = [row for row, chosen in zip(demonstrations, imitates, strict=True) if chosen]
    weight = grpo.token_weights(lengths, s.aggregation_of_method, s.max_new_tokens, keep)  # [T]

    records = []
    for group in groups:
        columns = group.completions, group.responses, group.rewards, group.right
        for c, response, earned, right in zip(*columns, strict=True):
            record = dict(
                question=group.problem.question,
                answer=group.problem.answer,
                response=response,
                reward=earned,
                right=right,
                finish_reason=c.finish_reason,
            )
            records.append(record)

    device = pick_device()
    is_demonstration = torch.tensor([c.finish_reason == "demonstration" for c in completions])  # [N]
    return Rollouts(
        rows=[(group.prompt, c.ids) for group in groups for c in group.completions],
        reward=reward.float(),
        advantage=advantage.float().flatten().repeat_interleave(lengths).to(device),
        weight=weight.to(device),
        sampler_logp=torch.tensor([logp for c in completions for logp in c.logps], device=device),
        is_demonstration=is_demonstration.repeat_interleave(lengths).to(device),
        stats=stats,
        records=records,
        demonstrations=demonstrations,
        score_rewarded=method.shadow_of_rl and s.shadow_rollouts != "own",
    )


def statistics(groups: list[Group]) -> dict[str, float]:
    """Means over all samples, and the fraction of groups without signal."""
    rewards = []
    right = []
    samples = []
    for group in groups:
        for completion, reward, is_right in zip(group.completions, group.rewards, group.right, strict=True):
            if completion.finish_reason != "demonstration":
                samples.append(completion)
                rewards.append(reward)
                right.append(math.nan if is_right is None else is_right)
    tokens = sum(len(c.ids) for c in samples)
    truncated = [c for c in samples if c.finish_reason == "length"]
    without_signal = [group for group in groups if not group.has_signal]
    return dict(
        reward=sum(rewards) / len(samples),
        right_frac=sum(right) / len(samples),  # nan where the reward does not state what is right
        response_tokens=tokens / len(samples),
        truncated_frac=len(truncated) / len(samples),
        zero_std_groups=len(without_signal) / len(groups),
        sampled_tokens=tokens,
    )


def rl_statistics(policy: grpo.RLPass, rollouts: Rollouts) -> dict[str, float]:
    """Means over sampled tokens with a gradient; the entropy is the mean of −log π over all sampled tokens."""
    sampled = ~rollouts.is_demonstration  # [T]
    trained = sampled & (policy.trained > 0)  # [T]
    gap = (policy.logp - rollouts.sampler_logp)[trained].abs()
    return rollouts.stats | dict(
        entropy=-rollouts.sampler_logp[sampled].mean().item(),
        kl=policy.kl[trained].mean().item(),
        clip_frac=policy.limited[trained].mean().item(),
        logp_gap_mean=gap.mean().item(),
        logp_gap_max=gap.max().item(),
    )


def shadow_statistics(shadow: grpo.RLPass) -> dict[str, float]:
    """How far θ̂ is from the policy that sampled: π(θ̂,w)/π_old over tokens with a gradient."""
    trained = shadow.trained > 0
    ratio = shadow.ratio[trained]
    return dict(
        ratio_hat_mean=ratio.mean().item(),
        ratio_hat_max=ratio.max().item(),
        ratio_hat_limited=shadow.limited[trained].mean().item(),
    )


def cooperative_gain(shadow: grpo.RLPass, old_logp: Tensor, rollouts: Rollouts, rollouts_hat: Rollouts) -> float:
    """J_RL(θ,w) − J_RL(θ̂,w), the gain in eq. (12), in units of reward and without the KL term.

    With own rollouts it is a difference of mean rewards. On shared ones importance weights, capped at 10, estimate θ̂'s
    reward. Where no reward is negative, the cap makes that reward too low on average, and the gain too high.
    """
    reward = rollouts.reward.flatten()  # [N]
    if rollouts_hat is rollouts:
        log_ratio = (shadow.logp - old_logp).cpu()  # [T]
        lengths = [len(response) for _, response in rollouts.rows]
        reward_hat = grpo.importance_weighted_reward(log_ratio, lengths, reward)
    else:
        reward_hat = rollouts_hat.reward.mean()
    return (reward.mean() - reward_hat).item()
