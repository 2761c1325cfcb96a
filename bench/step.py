"""One whole step of BRIDGE, by the functions of bridge.py: seconds by phase, and peak memory.

    python bench/step.py [--quick] [--out FILE.jsonl]

Without a GPU: the preset `laptop` (--quick: `smoke`, after one step as below on a tiny model) as it runs, five steps; a
phase's seconds are their median.

With a GPU: a step of the paper's size, 64 prompts × 5 rollouts of at most 3,000 tokens and 64 demonstrations of at most
2,500, α = 5e-7, r = 16, on Qwen2.5-3B (on less than 120 GiB: Qwen2.5-1.5B) with random weights: an
eighth of the batches, then all of them if that took less than 20 s. It measures speed and memory only:
    lengths   Random weights never stop by themselves. Rollouts end at any of V/950 token ids; the next token is all but
              uniform, so lengths are about geometric with a mean of 950, cut at 3,000.
    rewards   A response is read as "0" or "1" by the parity of its token ids, and "1" is right: random rewards, so
              nearly every group has a gradient. Text of that length is neither decoded nor parsed.

sample: merging w, generation, rewards; rl and shadow: forward and backward of θ and of θ̂ on the rollouts; sft: of θ on
the demonstrations; optimizer: all three sets of parameters. trained/s is of all three passes, prompts counted.
"""

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from measure import DEVICE, arguments, attempt, write
from random_models import build

import bridge
import rewards
from sampler import Sampler
from settings import Settings, check, parse
from tasks.task import Problem, Stream, Task

MEAN_LENGTH = 950  # of a rollout
LONGEST_DEMONSTRATION = 2500


class Noise:
    """Stands in for a tokenizer: a question is the seed of a prompt of random tokens, a response says 0 or 1."""

    bos_token_id = None

    def __init__(self, vocabulary: int, scale: float):
        self.vocabulary, self.scale = vocabulary, scale

    def ids(self, seed: str, low: int, high: int) -> list[int]:
        rng = random.Random(seed)
        length = max(2, round(self.scale * rng.randint(low, high)))
        return [rng.randrange(self.vocabulary) for _ in range(length)]

    def encode(self, text: str, **kwargs) -> list[int]:
        return self.ids(text, 100, 200)

    def decode(self, ids: list[int], **kwargs) -> str:
        return f"\\boxed{{{sum(ids) % 2}}}"


def paper_run(model: torch.nn.Module, s: Settings, lengths: float = 1.0) -> bridge.Run:
    """A run on random text. `lengths` scales those of prompts and responses."""
    V = model.config.vocab_size
    noise = Noise(V, lengths)
    stop = list(range(max(1, round(V / (lengths * MEAN_LENGTH)))))
    problems = [Problem(f"question {i}", "1") for i in range(1000)]
    solutions = [noise.ids(f"solution {i}", 500, LONGEST_DEMONSTRATION - 200) for i in range(200)]
    demonstrations = [(noise.encode(f"question of solution {i}"), solution) for i, solution in enumerate(solutions)]
    sampler = Sampler(model, stop, s.sampler_slots, getattr(torch, s.dtype))  # before w is attached
    return bridge.Run(
        s, Path(), bridge.make_policies(model, s), Task(problems, [], [], template="plain"), demonstrations, noise,
        sampler, Stream(len(problems), (0, 0)), Stream(len(demonstrations), (0, 1)), "", rewards.load_reward(""),
    )  # fmt: skip


def one_step(run: bridge.Run, k: int) -> dict:
    """Steps 1 to 6 of bridge.train, without logs: seconds by phase, tokens sampled and trained, peak memory."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    s, clock = run.s, bridge.Clock(0)
    with clock("sample"):
        run.sampler.refresh(run.m.policy)
        rollouts = bridge.collect(run, run.prompts, k)
    [(sft, rl)] = bridge.updates(s, k)
    demonstrations = [run.demonstrations[i] for _, i in run.demos.take(s.sft_batch)]
    stats = bridge.bilevel_gradients(run.m, rollouts, rollouts, demonstrations, sft, rl, s, clock)
    with clock("optimizer"):
        stats |= bridge.clip_and_step(run.m, stats, s)
    if not bridge.all_finite(stats):
        raise FloatingPointError(f"not a step: {stats}")
    sizes = {
        "total": sum(clock.seconds.values()),
        "sampled": stats["sampled_tokens"],
        "trained": sum(len(p) + len(r) for p, r in [*rollouts.rows, *rollouts.rows, *demonstrations]),
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None,
    }
    return clock.seconds | sizes


def report(title: str, steps: list[dict], out) -> None:
    """One row: medians over steps."""
    row: dict = {"workload": title, "steps": len(steps)}
    row |= {key: None if value is None else median(step[key] for step in steps) for key, value in steps[0].items()}
    training = row["rl"] + row["shadow"] + row["sft"]
    row |= {"sampled/s": row["sampled"] / row["sample"], "trained/s": row["trained"] / training}
    print()
    write([row], list(row), out)


def paper_settings(scale: float, layers: int) -> Settings:
    """The paper's numbers, batches times `scale`; all layers recomputed, for θ and θ̂ fill the memory."""
    return check(
        Settings(
            alpha=5e-7, beta=5e-5, lora_rank=16, lora_alpha=16.0, prompts_per_step=round(64 * scale), group_size=5,
            sft_batch=round(64 * scale), max_new_tokens=3000, dtype="bfloat16", checkpoint_layers=layers,
        )
    )  # fmt: skip


def paper_steps(out) -> None:
    large = torch.cuda.get_device_properties(0).total_memory > 120 * 2**30
    name = "Qwen2.5-3B" if large else "Qwen2.5-1.5B"
    model = build(name, torch.float32, DEVICE)
    layers = model.config.num_hidden_layers
    eighth_settings = paper_settings(1 / 8, layers)
    run = paper_run(model, eighth_settings)
    run.s = replace(eighth_settings, max_new_tokens=64)
    one_step(run, 0)  # compiles kernels, makes the optimizers' moments
    run.s = eighth_settings
    eighth = one_step(run, 1)
    report(f"{name}, 1/8 of the paper's batches", [eighth], out)
    if eighth["total"] < 20:
        run.s = paper_settings(1, layers)
        if full := attempt("the paper's batches", lambda: one_step(run, 2)):
            report(f"{name}, the paper's batches", [full], out)


def tiny_step() -> None:
    """The paper's step as it is, but for its sizes: what is run on a GPU is tried on a CPU."""
    s = replace(paper_settings(1 / 16, 1), max_new_tokens=30)
    one_step(paper_run(build("tiny", torch.float32, DEVICE), s, lengths=0.02), 0)


def laptop_steps(preset: str, out) -> None:
    with tempfile.TemporaryDirectory() as folder:
        s, _ = parse(["--preset", preset])
        run = bridge.set_up(s, Path(folder))
        one_step(run, 0)
        report(f"preset {preset}", [one_step(run, k) for k in range(1, 6)], out)


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    if DEVICE.type == "cuda" and not args.quick:
        paper_steps(args.out)
    elif args.quick:
        tiny_step()
        laptop_steps("smoke", args.out)
    else:
        laptop_steps("laptop", args.out)


if __name__ == "__main__":
    main()
