"""Every setting of a run with its default and the paper's value, the tables of methods and tasks, the command line.

The defaults are the preset `laptop`. "paper:" gives the value of arXiv 2509.06948 where it is known. This file imports
the standard library only, so `python bridge.py --help` answers before torch is loaded.
"""

import argparse
import atexit
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
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
    shadow_imitates: bool = False  # θ̂ takes SFT instead of RL, and ω weighs demonstrations: weighed.py
    two_optimizers: bool = False  # of θ: one for updates by RL, one for updates by SFT
    paired: bool = False  # needs the demonstrations of its prompts
    joins_group: bool = False  # the demonstration of a prompt is one more member of the prompt's group
    asks_right: bool = False  # treats right responses differently, whatever their rewards
    loss: str = ""  # of RL: empty (by aggregation and clip), dr_grpo (no clip) or reinforce (no clip, no ratio)
    own_settings: tuple[str, ...] = ()  # settings used only by the methods that list them
    schedule: str = ""  # what changes over all steps of the method: a resumed run needs the same number of steps

    @property
    def shadow_of_rl(self) -> bool:
        """Has a θ̂ that takes RL."""
        return self.shadow and not self.shadow_imitates

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
    "sft_rl": Method("SFT for sft_steps, then GRPO: a cold start", own_settings=("sft_steps",)),
    "alternating": Method("a GRPO update, then an SFT update (the paper's Algorithm 1)", two_optimizers=True),
    "mix": Method("(GRPO + mu·SFT) / (1 + mu) in one update of θ", own_settings=("mu",)),
    "chord": Method(
        "CHORD: (1−μ)·GRPO + μ·SFT, μ falls from chord_peak to chord_valley along a cosine over all steps",
        own_settings=("chord_peak", "chord_valley", "chord_phi"), schedule="μ",
    ),
    "luffy": Method(
        "LUFFY: the demonstration of a prompt joins its group; shaped gradient",
        paired=True, joins_group=True, loss="dr_grpo",
    ),
    "srft": Method(
        "SRFT: ±REINFORCE on LUFFY's groups + mu·SFT, both weighted by entropy",
        paired=True, joins_group=True, asks_right=True, loss="reinforce", own_settings=("mu",),
    ),
    "hpt": Method(
        "HPT: mu·SFT on the demonstrations of prompts without a right sample + RL on the others",
        paired=True, asks_right=True, loss="dr_grpo", own_settings=("mu",),
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
    "weighed": Method(
        "ours, the levels swapped: θ takes (1−λ)·SFT + λ·GRPO, θ̂ SFT alone; ω weighs the sources of demonstrations",
        shadow=True, shadow_imitates=True, own_settings=("lam", "eta"),
    ),
}  # fmt: skip


class BuiltinTask(NamedTuple):
    """One row of the table of built-in tasks, each a module tasks/NAME.py.

    The module has task(seed, eval_problems) -> Task and evaluation(eval_problems) -> list[Problem].
    """

    preset: str  # the preset with a model that can learn it
    models: tuple[str, ...] = ()  # the built-in models that have its words: folders tasks/base/NAME


ARITHMETIC = ("arithmetic-laptop", "arithmetic-smoke")
TASKS = {
    "arithmetic": BuiltinTask("laptop", ARITHMETIC),
    "chains": BuiltinTask("chains", ARITHMETIC),
    "logic": BuiltinTask("logic", ("logic-laptop",)),
    "legs": BuiltinTask("smollm2"),
}


def opt(
    default, help: str, only: str = "", *, least: float = 0, most: float = math.inf, positive: bool = False,
    choices: Iterable[str] = (), resume: bool = False,
):  # fmt: skip
    """A setting and what its value may be. In `help`, {methods}, {tasks} and {models} are replaced by the known names.

    only: the column of METHODS without which the setting does nothing. least, most: the range of a number.
    positive: a number must not be 0. resume: a resumed run may change it.
    """
    rule = dict(help=help, only=only, least=least, most=most, positive=positive, choices=choices, resume=resume)
    return field(default=default, metadata=rule)


@dataclass(frozen=True)
class Settings:
    # model, data and code; a resumed run compares their fingerprints, since files may have moved
    model: str = opt(
        "arithmetic-laptop", "folder, hub name (NAME or NAME@REVISION) or {models} (paper: Qwen2.5-3B)",
        resume=True,
    )  # fmt: skip
    template: str = opt(
        "", "prompt template: qwen-boxed, plain, or empty for the chat template of the model (paper: SimpleRL's)",
        choices=("", "qwen-boxed", "plain"),
    )  # fmt: skip
    task: str = opt("arithmetic", "{tasks}, limr, math_level3to5, gsm8k or FILE.py:FUNCTION (paper: LIMR)", resume=True)
    rl_data: str = opt(
        "", "D_RL instead of a task: comma list of files or hub names, whose rows have question and answer",
        resume=True,
    )  # fmt: skip
    sft_data: str = opt(
        "", "D_SFT, beside rl_data or alone for method sft: files or hub names, with question and solution", "sft",
        resume=True,
    )  # fmt: skip
    eval_data: str = opt(
        "", "evaluation: comma list of benchmarks (math500,aime24,…), files or hub names; empty: held out of rl_data",
        resume=True,
    )  # fmt: skip
    reward: str = opt(
        "", "FILE.py:FUNCTION that returns the reward of (response, problem) and runs as your code; empty: the grader",
        "rl",
    )  # fmt: skip
    seed: int = opt(0, "seed of the order of data, of the initial adapter and of all samples")
    # method
    method: str = opt("bridge", "{methods}", choices=METHODS)
    steps: int = opt(200, "iterations; sft_rl has sft_steps before them (paper: 6 epochs)", least=1, resume=True)
    lam: float = opt(0.5, "λ in [0, 1]: weight of RL; the weight of SFT is 1−λ (paper: 0.5)", most=1)
    mu: float = opt(1.0, "weight of SFT relative to RL; (1−λ)/λ gives θ the update of BRIDGE (paper: unknown)")
    sft_steps: int = opt(100, "steps of SFT before RL starts (paper: unknown)")
    chord_peak: float = opt(0.9, "CHORD's μ at the first step: the weight of SFT; that of RL is 1−μ", most=1)
    chord_valley: float = opt(0.05, "CHORD's μ after the last step", most=1)
    chord_phi: bool = opt(False, "CHORD-φ: weights each token of a demonstration by p(1−p)")
    # the shadow θ̂
    shadow_rollouts: str = opt(
        "shared", "rollouts that train θ̂: shared (the policy's), own (samples of θ̂) or one_step (the policy's, and θ̂ "
        "is θ after one step of RL)", "shadow_of_rl", choices=("shared", "own", "one_step"),
    )  # fmt: skip
    shadow_ratio_cap: float = opt(
        2.0, "with the policy's rollouts: cap of the token ratios of θ and θ̂; 0: PPO's clip instead", "shadow_of_rl"
    )  # fmt: skip
    # learning rates
    alpha: float = opt(3e-4, "α: learning rate of θ and θ̂ (paper: 5e-7)")
    beta: float = opt(2e-3, "β: learning rate of w; with β = α B·A hardly moves (paper: not stated)", "adapter")
    eta: float = opt(3.0, "η: step of ω, the weights of sources of demonstrations; 0 leaves all at 1")
    grad_clip: float = opt(1.0, "largest norm of a gradient, for each of θ, w and θ̂ (paper: unknown)", positive=True)
    # adapter
    lora_rank: int = opt(8, "rank r of w (paper: 16)", "adapter", least=1)
    lora_alpha: float = opt(16.0, "scale of w: ΔW = lora_alpha/r·B·A (paper: 16)", "adapter", positive=True)
    lora_targets: str = opt(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "linear layers that have w, a comma list", "adapter"
    )
    # batches
    prompts_per_step: int = opt(16, "prompts per step, the paper's P (paper: 64)", "rl", least=1)
    group_size: int = opt(8, "samples per prompt, the paper's G, at least 2 (paper: 5)", "rl", least=2)
    sft_batch: int = opt(32, "demonstrations per update (paper: unknown)", "draws_sft", least=1)
    updates_per_rollout: int = opt(1, "updates on the same rollouts (paper: 1)", "rl", least=1)
    max_new_tokens: int = opt(
        80, "largest number of tokens of a completion; longer demonstrations are dropped (paper: 3000)", least=1
    )
    temperature: float = opt(
        1.0, "temperature of sampling and log-probs, above 0 (paper: unknown, SimpleRL: 1.0)", "rl", positive=True
    )
    tokens_per_micro_batch: int = opt(
        16384, "tokens of one forward and backward pass; changes memory, not results", least=1, resume=True
    )
    checkpoint_layers: int = opt(
        0, "layers recomputed in the backward pass; each saves memory and takes a third more time", resume=True
    )
    sampler_slots: int = opt(256, "sequences generated at a time; changes memory, not samples", least=1, resume=True)
    shard: bool = opt(False, "shards θ, θ̂ and the reference over the ranks (FSDP2)", resume=True)
    dtype: str = opt(
        "float32", "float32 or bfloat16 for forward passes and sampling; weights stay float32",
        choices=("float32", "bfloat16"),
    )  # fmt: skip
    # GRPO
    aggregation: str = opt(
        "grpo", "weights of tokens: grpo, dapo, or dr_grpo, which also omits the division of rewards by their std",
        "grpo", choices=("grpo", "dapo", "dr_grpo"),
    )  # fmt: skip
    clip_low: float = opt(0.2, "clips the ratio below 1 − clip_low (paper: unknown, verl: 0.2)", "grpo", most=1)
    clip_high: float = opt(0.2, "clips the ratio above 1 + clip_high (DAPO: 0.28)", "grpo")
    kl_coef: float = opt(
        0.0, "weight of KL(π ‖ initial model); above 0, a copy of the initial model is kept (paper: unknown)", "rl"
    )
    overlong_mask: bool = opt(False, "leaves truncated completions out of the RL loss", "grpo")
    dynamic_sampling: int = opt(
        0, "number of further batches drawn at most to replace groups of equal rewards (DAPO)", "grpo"
    )
    # evaluation and files
    eval_every: int = opt(25, "steps between evaluations", least=1, resume=True)
    eval_problems: int = opt(100, "evaluation problems per group (benchmark, level or length of a chain)", least=1)
    save_every: int = opt(25, "steps between checkpoints", least=1, resume=True)
    track: str = opt(
        "", "sends metrics to tensorboard or wandb, too; the package must be installed",
        choices=("", "tensorboard", "wandb"), resume=True,
    )  # fmt: skip

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
                    sft_steps=20, dtype="bfloat16", sampler_slots=64),
    "logic": dict(model="logic-laptop", task="logic", steps=75, max_new_tokens=96, eval_problems=250),
}  # fmt: skip
KEEP = ("first", "all", "none")  # groups of each step whose tokens a run keeps; it changes no result


class SettingError(ValueError):
    """A setting that is unknown, out of range, inconsistent or idle; the message names it."""


def check_value(name: str, value: str | int | float | bool) -> None:
    """Raises SettingError if no run can use this value of a setting."""
    rule = Settings.__dataclass_fields__[name]
    choices = rule.metadata["choices"]
    least = rule.metadata["least"]
    most = rule.metadata["most"]
    if choices and value not in choices:
        known = ", ".join(choice or "empty" for choice in choices)
        raise SettingError(f"{name} must be one of {known}; got {value!r}")
    if rule.type not in (int, float):
        return
    if not least <= value <= most:  # also true of nan
        allowed = f"at least {least}" if most == math.inf else f"in [{least}, {most}]"
        raise SettingError(f"{name} must be {allowed}; got {value}")
    if value == 0 and rule.metadata["positive"]:
        raise SettingError(f"{name} must be greater than 0; got {value}")


def check(s: Settings) -> Settings:
    """Returns `s`; for SFT alone its rl_data are the sft_data. Raises SettingError for a value that no run can use."""
    for rule in fields(Settings):
        check_value(rule.name, getattr(s, rule.name))
    if 0 < s.shadow_ratio_cap < 1:
        raise SettingError(f"shadow_ratio_cap must be 0 or at least 1; got {s.shadow_ratio_cap}")
    if s.sft_data and not s.rl_data and s.task in TASKS and not METHODS[s.method].rl:
        s = replace(s, rl_data=s.sft_data)  # its questions are held out for evaluation
    if s.rl_data and s.task not in TASKS:
        raise SettingError(f"rl_data and task {s.task} both name the problems: give one of them")
    if s.task in TASKS and not s.rl_data:
        if s.sft_data or s.eval_data:
            given = "sft_data" if s.sft_data else "eval_data"
            raise SettingError(f"{given} needs rl_data: the built-in {s.task} has its own demonstrations and problems")
        task = TASKS[s.task]
        if s.model in builtin_models() and s.model not in task.models:
            raise SettingError(f"model {s.model} has no tokens for the task {s.task}: use --preset {task.preset}")
    if s.rl_data and not s.sft_data and METHODS[s.method].sft:
        raise SettingError(f"method {s.method} needs demonstrations: give sft_data, or choose --method rl")
    if s.track and find_spec(s.track) is None:
        raise SettingError(f"track: the package {s.track} is not installed: pip install {s.track}")
    return s


def builtin_models() -> list[str]:
    """The names of the built-in models, each once."""
    return list(dict.fromkeys(model for task in TASKS.values() for model in task.models))


def may_change_on_resume(name: str) -> bool:
    return Settings.__dataclass_fields__[name].metadata["resume"]


def readers(name: str) -> list[str]:
    """The methods that use a setting."""
    owners = [method for method, row in METHODS.items() if name in row.own_settings]
    if owners:
        return owners
    column = Settings.__dataclass_fields__[name].metadata["only"]
    return [method for method, row in METHODS.items() if not column or getattr(row, column)]


def refuse_idle(s: Settings, given: set[str]) -> None:
    """Raises SettingError if the user gave a setting that does nothing with the chosen method."""
    for name in sorted(given):
        users = readers(name)
        if s.method not in users:
            only = ", ".join(users)
            raise SettingError(f"{name} does nothing with method {s.method}, only with {only}: omit it")
    if "shadow_ratio_cap" in given and s.shadow_rollouts == "own":
        raise SettingError("shadow_ratio_cap does nothing with shadow_rollouts own: omit it")
    # On a shared batch θ and θ̂ have the same surrogate loss: the ratio cap replaces the clip in both.
    shared = METHODS[s.method].shadow_of_rl and s.shadow_rollouts != "own"
    for name in sorted({"clip_low", "clip_high"} & given):
        if shared and s.shadow_ratio_cap > 0:
            raise SettingError(f"{name} does nothing beside shadow_ratio_cap {s.shadow_ratio_cap}: omit one")
        if not shared and s.updates_per_rollout == 1:
            raise SettingError(f"{name} does nothing with updates_per_rollout 1, since every ratio is 1: omit it")


def start_program(parse: Callable | None = None) -> None:
    """Prepares the standard streams; then `parse` answers --help and exits, before torch is loaded."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # those of a notebook have no encoding
            stream.reconfigure(errors="replace")  # a terminal without θ must not end the run
    atexit.register(flush)
    if parse and {"-h", "--help"} & set(sys.argv):
        parse(sys.argv[1:])


def flush() -> None:
    """Drops output that a closed pipe (`| head`) did not take. Python would report it after the end of the program."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def expand(text: str) -> str:
    """A text of the command line; ~ at the start of a path in a comma list stands for the home folder."""
    return ",".join(os.path.expanduser(part) for part in text.split(","))


def add_setting(parser: argparse.ArgumentParser, setting, default) -> None:
    """Adds the flag of one field of Settings. A flag that is not given is absent from the parsed arguments."""
    if setting.type is bool:
        action = {"action": argparse.BooleanOptionalAction}
    else:
        action = {"type": expand if setting.type is str else setting.type}
    text = setting.metadata["help"].format(
        methods="; ".join(f"{name}: {method.text}" for name, method in METHODS.items()),
        tasks=", ".join(TASKS),
        models=", ".join(builtin_models()),
    )
    text += f" (default: {'empty' if default == '' else default})"
    flag = "--" + setting.name.replace("_", "-")
    parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **action)


def parse(argv: list[str]) -> tuple[Settings, argparse.Namespace]:
    """(settings, the other flags: preset, out, resume, keep_…, dry_run, gpu, gpus). Raises SettingError."""
    parser = argparse.ArgumentParser(
        description="Trains a language model with BRIDGE or a baseline.", allow_abbrev=False
    )
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="the defaults of all other flags")
    parser.add_argument("--out", type=expand, help="run folder (default: runs/METHOD-PRESET-SEED)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its newest checkpoint")
    parser.add_argument(
        "--keep-rollouts", choices=KEEP, default="first", help="groups of each step that report.html shows"
    )
    parser.add_argument(
        "--keep-best", action="store_true", help="keep the checkpoint of the best evaluation, too, beside the last two"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the memory of a GPU by part, load nothing, stop")
    parser.add_argument(
        "--gpu", help="with --dry-run: does it fit in a100, h100, h200, l40s or 4090? (default: this machine's)"
    )
    parser.add_argument("--gpus", type=int, default=1, help="with --dry-run: number of GPUs that share the run")
    # The preset decides the defaults that --help prints, so it is read first.
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    preset = PRESETS[known.preset]
    defaults = {}
    for setting in fields(Settings):
        defaults[setting.name] = preset.get(setting.name, setting.default)
        add_setting(parser, setting, defaults[setting.name])
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in defaults}
    if (args.gpu or args.gpus != 1) and not args.dry_run:
        raise SettingError("gpu and gpus describe the machine of a --dry-run; a run uses the machine it is started on")
    if args.gpus < 1:
        raise SettingError(f"gpus must be at least 1; got {args.gpus}")
    s = check(Settings(**defaults | given))
    refuse_idle(s, set(given))
    args.out = Path(args.out or f"runs/{s.method}-{args.preset}-{s.seed}")
    return s, args
