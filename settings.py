"""Every setting of a run with its default and the paper's value, the table of methods, and the command line.

The defaults are the preset `laptop`. "paper:" gives the value of arXiv 2509.06948 where it is known. This file imports
the standard library only, so `python bridge.py --help` answers before torch is loaded.
"""

import argparse
import atexit
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Method(NamedTuple):
    """One row of the table of methods. `bridge.py:updates` gives the weights of its two losses."""

    text: str  # one line for --help and the model card
    sft: bool = True  # trains on demonstrations
    rl: bool = True  # trains on rollouts
    adapter: bool = False  # has w
    w_takes_rl: bool = True  # w takes the gradient of RL, too
    shadow: bool = False  # has θ̂
    two_optimizers: bool = False  # of θ: one for updates by RL, one for updates by SFT
    paired: bool = False  # needs the demonstrations of its prompts
    joins_group: bool = False  # the demonstration of a prompt is one more member of the prompt's group
    loss: str = ""  # of RL: by aggregation and clip, or dr_grpo (no clip), or reinforce (no clip, no ratio)
    own_settings: tuple[str, ...] = ()  # used only by the methods that list them

    @property
    def grpo(self) -> bool:
        """Reads GRPO's settings."""
        return self.rl and not self.loss

    @property
    def draws_sft(self) -> bool:
        """Draws its demonstrations independently of the prompts."""
        return self.sft and not self.paired


METHODS = {
    "sft": Method("supervised fine-tuning alone", rl=False),
    "rl": Method("GRPO alone (RL-zero)", sft=False),
    "sft_rl": Method("SFT for sft_steps, then GRPO: cold start, two stages", own_settings=("sft_steps",)),
    "alternating": Method("a GRPO update, then an SFT update (the paper's Algorithm 1)", two_optimizers=True),
    "mix": Method("(GRPO + mu·SFT) / (1 + mu) in one update of θ", own_settings=("mu",)),
    "chord": Method(
        "CHORD: (1−μ)·GRPO + μ·SFT, μ falls from chord_peak to chord_valley along a cosine over all steps",
        own_settings=("chord_peak", "chord_valley", "chord_phi"),
    ),
    "luffy": Method(
        "LUFFY: the demonstration of a prompt joins its group; shaped gradient",
        paired=True, joins_group=True, loss="dr_grpo",
    ),
    "srft": Method(
        "SRFT: ±REINFORCE on LUFFY's groups + mu·SFT, both weighted by entropy",
        paired=True, joins_group=True, loss="reinforce", own_settings=("mu",),
    ),
    "hpt": Method(
        "HPT: mu·SFT on the demonstrations of prompts without a right sample + RL on the others",
        paired=True, loss="dr_grpo", own_settings=("mu",),
    ),
    "mix_lora": Method(
        "(1−λ)·SFT + λ·GRPO on θ and on w: BRIDGE without the shadow",
        adapter=True, own_settings=("lam",),
    ),
    "no_meta": Method(
        "BRIDGE without J_meta: θ takes (1−λ)·SFT + λ·GRPO, w takes (1−λ)·SFT alone",
        adapter=True, w_takes_rl=False, own_settings=("lam",),
    ),
    "bridge": Method(
        "BRIDGE: θ takes (1−λ)·SFT + λ·GRPO; w also ascends the cooperative gain over the RL-only shadow θ̂",
        adapter=True, shadow=True, own_settings=("lam",),
    ),
}  # fmt: skip


def opt(default, help: str, only: str = ""):
    """A setting; `only` names the column of METHODS without which it does nothing."""
    return field(default=default, metadata={"help": help, "only": only})


@dataclass(frozen=True)
class Settings:
    # model and data
    model: str = opt("arithmetic-laptop", "folder, hub name (NAME@REVISION) or built-in (paper: Qwen2.5-3B)")
    template: str = opt("", "prompt: qwen-boxed, plain, or empty for the model's chat template (paper: SimpleRL's)")
    task: str = opt(
        "arithmetic", "arithmetic, chains, logic, legs, limr, math_level3to5, gsm8k or FILE.py:FUNCTION (paper: LIMR)"
    )
    rl_data: str = opt("", "D_RL instead of a task: comma list of files or hub names, rows with question and answer")
    sft_data: str = opt("", "D_SFT beside rl_data: the same kinds of sources, rows with question and solution", "sft")
    eval_data: str = opt("", "evaluation: benchmarks (math500,aime24,…) or sources; empty: held out of rl_data")
    reward: str = opt("", "FILE.py:FUNCTION of (response, problem), run as your code; empty: the grader", "rl")
    seed: int = opt(0, "of data order, adapter and samples")
    # method
    method: str = opt("bridge", "; ".join(f"{name}: {method.text}" for name, method in METHODS.items()))
    steps: int = opt(200, "iterations k; sft_rl puts its sft_steps before them (paper: 6 epochs)")
    lam: float = opt(0.5, "λ in [0, 1]: weight of RL; 1−λ is that of SFT (paper: 0.5)")
    mu: float = opt(1.0, "SFT's weight relative to RL's; (1−λ)/λ gives θ BRIDGE's update (paper: unknown)")
    sft_steps: int = opt(100, "SFT steps before RL starts (paper: unknown)")
    chord_peak: float = opt(0.9, "in [0, 1]: CHORD's weight of SFT at the first step; that of RL is 1 − it")
    chord_valley: float = opt(0.05, "in [0, 1]: CHORD's weight of SFT after the last step")
    chord_phi: bool = opt(False, "CHORD-φ: each demonstration token has the weight p(1−p)")
    # the shadow θ̂
    shadow_rollouts: str = opt("shared", "of θ̂: the policy's (v3), own, or one_step: θ̂ is θ^k + one step", "shadow")
    shadow_ratio_cap: float = opt(2.0, "not own: cap of token ratios of θ and θ̂; 0: PPO's clip", "shadow")
    # learning rates
    alpha: float = opt(3e-4, "α, learning rate of θ and θ̂ (paper: 5e-7)")
    beta: float = opt(2e-3, "β, learning rate of w; B·A hardly moves at β = α (paper: not stated)", "adapter")
    grad_clip: float = opt(1.0, "largest gradient norm, for each of θ, w and θ̂ (paper: unknown)")
    # adapter
    lora_rank: int = opt(8, "rank r of w (paper: 16)", "adapter")
    lora_alpha: float = opt(16.0, "ΔW = lora_alpha/r·B·A (paper: 16)", "adapter")
    lora_targets: str = opt("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "layers with w", "adapter")
    # batches
    prompts_per_step: int = opt(16, "P (paper: 64)", "rl")
    group_size: int = opt(8, "G, samples of a prompt, at least 2 (paper: 5)", "rl")
    sft_batch: int = opt(32, "demonstrations of an update (paper: unknown)", "draws_sft")
    updates_per_rollout: int = opt(1, "updates on the same rollouts (paper: 1)", "rl")
    max_new_tokens: int = opt(80, "tokens of a completion; longer demonstrations are dropped (paper: 3000)")
    temperature: float = opt(1.0, "of sampling and of log-probs, > 0 (paper: unknown, SimpleRL 1.0)", "rl")
    tokens_per_micro_batch: int = opt(16384, "tokens of a forward and backward pass; changes memory, not results")
    checkpoint_layers: int = opt(0, "layers recomputed in the backward pass: less memory, each a third slower")
    sampler_slots: int = opt(256, "sequences generated at a time; changes memory, not samples")
    shard: bool = opt(False, "one slice of θ, θ̂ and the reference per rank (FSDP2)")
    dtype: str = opt("float32", "of forward passes and sampler: float32 or bfloat16; weights stay float32")
    # GRPO
    aggregation: str = opt("grpo", "token weights: grpo, dapo or dr_grpo, which omits the division by the std", "grpo")
    clip_low: float = opt(0.2, "the ratio is clipped below 1 − clip_low (paper: unknown, verl 0.2)", "grpo")
    clip_high: float = opt(0.2, "the ratio is clipped above 1 + clip_high (DAPO: 0.28)", "grpo")
    kl_coef: float = opt(0.0, "weight of KL(π ‖ initial model); a reference is kept if > 0 (paper: unknown)", "rl")
    overlong_mask: bool = opt(False, "truncated completions have no RL loss", "grpo")
    dynamic_sampling: int = opt(0, "up to n more batches replace groups of equal rewards (DAPO)", "grpo")
    # evaluation and files
    eval_every: int = opt(25, "steps between evaluations")
    eval_problems: int = opt(100, "evaluation problems of each group: benchmark, level, chain length")
    save_every: int = opt(25, "steps between checkpoints")
    track: str = opt("", "also send metrics to tensorboard or wandb; the package must be installed")

    @property
    def total_steps(self) -> int:
        return self.steps + (self.sft_steps if self.method == "sft_rl" else 0)

    @property
    def demonstrations(self) -> int:
        """Demonstrations of an update; HPT has fewer."""
        return self.prompts_per_step if METHODS[self.method].paired else self.sft_batch

    @property
    def aggregation_of_method(self) -> str:
        return "dr_grpo" if METHODS[self.method].loss else self.aggregation

    @property
    def clip_of_method(self) -> tuple[float, float]:
        """How far the ratio may be below and above 1. (1, ∞) is no clip."""
        return (1.0, math.inf) if METHODS[self.method].loss else (self.clip_low, self.clip_high)


PAPER = dict(
    prompts_per_step=64, group_size=5, max_new_tokens=3000, alpha=5e-7, beta=2.5e-5, lora_rank=16, lora_alpha=16.0,
    lam=0.5, sft_batch=64, sft_steps=65, dtype="bfloat16", shard=True, checkpoint_layers=99, sampler_slots=64,
    eval_data="math500,minerva_math,olympiadbench,aime24,amc23",
)  # fmt: skip
PRESETS: dict[str, dict] = {
    "laptop": {},  # the defaults: minutes on two cores
    "chains": dict(task="chains", steps=150),  # harder: longer chains, and half of the demonstrations are useless
    # The paper's three models. From the paper: 64 prompts, 5 samples of 3000 tokens (8B: 8 of 8000), α, rank, alpha, λ,
    # the benchmarks, 6 epochs (steps = 6·rows/64), LIMR for Qwen2.5-3B. Ours: β (the paper states none), sft_batch,
    # sft_steps and the memory settings. Llama's template is not stated.
    "qwen2.5-3b": PAPER | dict(model="Qwen/Qwen2.5-3B", template="qwen-boxed", task="limr", steps=130,
                               sampler_slots=128),
    "llama-3.2-3b-instruct": PAPER | dict(model="meta-llama/Llama-3.2-3B-Instruct", task="math_level3to5", steps=799),
    "qwen3-8b-base": PAPER | dict(model="Qwen/Qwen3-8B-Base", template="qwen-boxed", task="math_level3to5", steps=799,
                                  group_size=8, max_new_tokens=8000, sampler_slots=24, tokens_per_micro_batch=8192),
    "smoke": dict(model="arithmetic-smoke", steps=6, sft_steps=3, prompts_per_step=8, group_size=8, sft_batch=8,
                  eval_every=3, eval_problems=4, save_every=2, lora_rank=4, lora_alpha=8.0),
    # A pretrained model of 135M parameters on two cores: see docs/results.md.
    "smollm2": dict(model="HuggingFaceTB/SmolLM2-135M-Instruct", task="legs", steps=60,
                    prompts_per_step=8, group_size=8, sft_batch=8,
                    alpha=1e-4, beta=1e-3, max_new_tokens=48, eval_problems=50, eval_every=20, save_every=30,
                    sft_steps=20, dtype="bfloat16", sampler_slots=64, tokens_per_micro_batch=2048),
    "logic": dict(model="logic-laptop", task="logic", steps=75, max_new_tokens=96, eval_problems=250),
}  # fmt: skip
BUILTIN_TASKS = {  # name: the preset with its model
    "arithmetic": "laptop", "chains": "chains", "logic": "logic", "legs": "smollm2",
}  # fmt: skip
CHOICES = {
    "method": METHODS,
    "template": ("", "qwen-boxed", "plain"),
    "shadow_rollouts": ("shared", "own", "one_step"),
    "dtype": ("float32", "bfloat16"),
    "aggregation": ("grpo", "dapo", "dr_grpo"),
    "track": ("", "tensorboard", "wandb"),
}
MINIMUM = dict(  # of other numbers: 0
    steps=1, lora_rank=1, prompts_per_step=1, group_size=2, sft_batch=1, updates_per_rollout=1, max_new_tokens=1,
    tokens_per_micro_batch=1, sampler_slots=1, eval_every=1, eval_problems=1, save_every=1,
)  # fmt: skip
KEEP = ("first", "all", "none")  # groups of each step whose tokens a run keeps; it changes no result
PATHS = ("model", "task", "rl_data", "sft_data", "eval_data", "reward")
POSITIVE = ("temperature", "grad_clip", "lora_alpha")
AT_MOST_ONE = ("lam", "clip_low", "chord_peak", "chord_valley")
MAY_BE_INFINITE = ("shadow_ratio_cap", "clip_high", "grad_clip")
MAY_CHANGE_ON_RESUME = (  # of model and data, fingerprints are compared: they may have moved
    "model", "task", "rl_data", "sft_data", "eval_data", "steps", "eval_every", "save_every", "tokens_per_micro_batch",
    "sampler_slots", "checkpoint_layers", "shard", "track",
)  # fmt: skip


class SettingError(ValueError):
    """A setting that is unknown, out of range, inconsistent or idle; the message names it."""


def check(s: Settings) -> Settings:
    """Returns `s`. Raises SettingError for a value that no run can use."""
    for name, values in CHOICES.items():
        if getattr(s, name) not in values:
            known = ", ".join(value or "empty" for value in values)
            raise SettingError(f"{name} must be one of {known}; got {getattr(s, name)!r}")
    for name, value in ((f.name, getattr(s, f.name)) for f in fields(Settings) if f.type in (int, float)):
        if not value >= MINIMUM.get(name, 0):  # "not >=" also catches nan
            raise SettingError(f"{name} must be at least {MINIMUM.get(name, 0)}; got {value}")
        if value == math.inf and name not in MAY_BE_INFINITE:
            raise SettingError(f"{name} must be a finite number; got {value}")
        if value == 0 and name in POSITIVE:
            raise SettingError(f"{name} must be greater than 0; got {value}")
        if value > 1 and name in AT_MOST_ONE:
            raise SettingError(f"{name} must be in [0, 1]; got {value}")
    if 0 < s.shadow_ratio_cap < 1:
        raise SettingError(f"shadow_ratio_cap must be 0 or at least 1; got {s.shadow_ratio_cap}")
    if s.rl_data and s.task not in BUILTIN_TASKS:
        raise SettingError(f"rl_data and task {s.task} both name the problems: give one of them")
    if s.task in BUILTIN_TASKS and not s.rl_data:
        if s.sft_data or s.eval_data:
            given = "sft_data" if s.sft_data else "eval_data"
            raise SettingError(f"{given} needs rl_data: the built-in {s.task} has its own demonstrations and problems")
        preset = BUILTIN_TASKS[s.task]
        its_model = PRESETS[preset].get("model", Settings.model)
        small, own = s.model.startswith(("arithmetic-", "logic-")), its_model.partition("-")[0]
        if small and not s.model.startswith(own):
            raise SettingError(f"model {s.model} has no tokens for the task {s.task}: use --preset {preset}")
    if s.rl_data and not s.sft_data and METHODS[s.method].sft:
        raise SettingError(f"method {s.method} needs demonstrations: give sft_data, or choose --method rl")
    if s.track and find_spec(s.track) is None:
        raise SettingError(f"track: the package {s.track} is not installed: pip install {s.track}")
    return s


def readers(name: str) -> list[str]:
    """The methods that read a setting."""
    column = Settings.__dataclass_fields__[name].metadata["only"]
    owners = [method for method, row in METHODS.items() if name in row.own_settings]
    return owners or [method for method, row in METHODS.items() if not column or getattr(row, column)]


def refuse_idle(s: Settings, given: set[str]) -> None:
    """Raises SettingError if the user gave a setting that does nothing with the chosen method."""
    for name in sorted(given):
        if s.method not in readers(name):
            only = ", ".join(readers(name))
            raise SettingError(f"{name} does nothing with method {s.method}, only with {only}: omit it")
    if "shadow_ratio_cap" in given and s.shadow_rollouts == "own":
        raise SettingError("shadow_ratio_cap does nothing with shadow_rollouts own: omit it")
    capped = METHODS[s.method].shadow and s.shadow_rollouts != "own"  # θ and θ̂ have one surrogate for one batch
    if clips := sorted({"clip_low", "clip_high"} & given):
        if capped and s.shadow_ratio_cap > 0:
            raise SettingError(f"{clips[0]} does nothing beside shadow_ratio_cap {s.shadow_ratio_cap}: omit one")
        if not capped and s.updates_per_rollout == 1:
            raise SettingError(f"{clips[0]} does nothing with updates_per_rollout 1, since every ratio is 1: omit it")


def start_program(parse: Callable | None = None) -> None:
    """Makes the standard streams usable; then `parse` answers --help and exits, before torch is loaded."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed at the start: a data file would get its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without θ must not end the run
    atexit.register(_flush)
    if parse and {"-h", "--help"} & set(sys.argv):
        parse(sys.argv[1:])


def _flush() -> None:
    """Drops what a closed pipe (`| head`) did not take; Python would report it after the program's end."""
    try:
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):  # ValueError: the user's code closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def expand(text: str) -> str:
    """A path of the command line, or a comma list of them, where ~ stands for the home folder, as in a shell."""
    if "\0" in text or text.encode("utf-8", "ignore").decode() != text:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no name of a file")
    return re.sub("(?:^|(?<=,))~[^,]*", lambda part: os.path.expanduser(part[0]), text)


def parse(argv: list[str]) -> tuple[Settings, argparse.Namespace]:
    """(settings, the other flags: preset, out, resume, keep_rollouts, dry_run, gpu, gpus). Raises SettingError."""
    parser = argparse.ArgumentParser(
        description="Trains a language model with BRIDGE or a baseline.", allow_abbrev=False
    )
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="the defaults of all other flags")
    parser.add_argument("--out", type=expand, help="run folder (default: runs/METHOD-PRESET-SEED)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    parser.add_argument("--keep-rollouts", choices=KEEP, default="first", help="groups of each step in report.html")
    parser.add_argument("--dry-run", action="store_true", help="print the memory of a GPU by part, load nothing, stop")
    parser.add_argument(
        "--gpu", help="with --dry-run: does it fit in a100, h100, h200, l40s or 4090? (default: this machine's)"
    )
    parser.add_argument("--gpus", type=int, default=1, help="with --dry-run: number of GPUs that share the run")
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    defaults = {f.name: f.default for f in fields(Settings)} | PRESETS[known.preset]
    for f in fields(Settings):
        kind = expand if f.name in PATHS else f.type
        action = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": kind}
        text = f"{f.metadata['help']} (default: {defaults[f.name] if defaults[f.name] != '' else 'empty'})"
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **action)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in defaults}
    if (args.gpu or args.gpus != 1) and not args.dry_run:
        raise SettingError("gpu and gpus describe the machine of a --dry-run; a run uses the machine it is started on")
    if args.gpus < 1:
        raise SettingError(f"gpus must be at least 1; got {args.gpus}")
    if args.out == "":
        raise SettingError("out is empty: name a folder, or omit it")
    if large := [n for n, x in given.items() if isinstance(x, int | float) and 2**63 <= x < math.inf]:
        raise SettingError(f"{large[0]} must be below 2^63, which numpy and torch can hold")
    s = check(Settings(**defaults | given))
    refuse_idle(s, set(given))
    args.out = Path(args.out or f"runs/{s.method}-{args.preset}-{s.seed}")
    return s, args
