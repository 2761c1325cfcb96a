"""Every setting of a run, its default, the paper's value, and the command line made from them.

The defaults are the `laptop` preset. "paper" gives the paper's value (arXiv 2509.06948) where it is known.
"""

import argparse
import math
import re
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

import grpo
from tasks import prompts


def opt(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    # data and model
    model: str = opt(
        "arithmetic-laptop", "hub name, model folder, or a built-in arithmetic-* model (paper: Qwen2.5-3B)"
    )
    revision: str = opt("", "of the model on the hub: a branch, tag or commit; empty: its newest")
    template: str = opt(
        "",
        "prompt: empty is the model's chat template, which is asked to box the answer; qwen-boxed and plain are "
        "SimpleRL's (paper: SimpleRL's)",
    )
    rl_data: str = opt(
        "",
        "D_RL, question and answer: a comma list of .jsonl, .json, .parquet or .csv files and of hub names "
        "owner/name[:config][:split]; empty: the built-in arithmetic (paper: LIMR)",
    )
    sft_data: str = opt("", "D_SFT, question and solution, as rl_data; empty: the built-in arithmetic")
    eval_data: str = opt(
        "",
        "evaluation problems, as rl_data, or benchmarks: math500,aime24,…; empty: the last eval_problems of rl_data, "
        "held out. Training rows that share 13 words in a row with any of them are dropped",
    )
    rl_fields: str = opt("", "names of rl_data's fields, if they are unusual: question=NAME,answer=NAME")
    sft_fields: str = opt(
        "",
        "names of sft_data's: question=NAME,answer=NAME,solution=NAME|NAME (the first that is graded correct is used)",
    )
    rl_filter: str = opt("", "which rows of rl_data: FIELD=VALUE|VALUE,FIELD=LOW..HIGH; all must hold")
    sft_filter: str = opt("", "which rows of sft_data")
    reward: str = opt(
        "",
        "FILE.py:FUNCTION of (response, problem) giving a finite number, instead of the built-in grader; the file is "
        "run as your own code. Evaluation stays with the grader",
    )
    trust_remote_code: bool = opt(False, "run Python code that comes with the model")
    seed: int = opt(0, "of data order, adapter and samples")
    # method
    method: str = opt("bridge", "sft, rl, sft_rl, alternating, mix, mix_lora or bridge")
    steps: int = opt(200, "iterations k (paper: 6 epochs); sft_rl puts its sft_steps before them")
    lam: float = opt(0.5, "λ in [0, 1]: weight of RL against SFT (paper: 0.5)")
    lam_ramp_steps: int = opt(
        0, "λ rises linearly from 0 over this many steps; 0: constant (paper: runs constant, text rising)"
    )
    mu: float = opt(1.0, "mix: weight of SFT beside RL; (1−λ)/λ makes θ's update BRIDGE's (paper: unknown)")
    sft_steps: int = opt(100, "sft_rl: SFT steps before RL starts (paper: unknown)")
    # the shadow θ̂
    shadow_rollouts: str = opt(
        "shared", "θ̂ learns from the policy's rollouts (shared, paper v3) or samples its own (own)"
    )
    shadow_ratio_cap: float = opt(
        2.0,
        "shared rollouts are off-policy for θ̂: its ratio is truncated here (inf: never); 0: clipped as in PPO, which "
        "silences θ̂ where it has drifted (paper: unknown)",
    )
    resync_every: int = opt(0, "set θ̂ back to θ every n steps; 0: never (paper: never)")
    # learning rates
    alpha: float = opt(3e-4, "α, learning rate of θ and θ̂ (paper: 5e-7)")
    beta: float = opt(2e-3, "β, learning rate of w; well above α, else B·A hardly moves (paper: not stated)")
    grad_clip: float = opt(1.0, "largest gradient norm, of θ, θ̂ and w each (paper: unknown)")
    # adapter
    lora_rank: int = opt(8, "rank r of w (paper: 16)")
    lora_alpha: float = opt(16.0, "ΔW = lora_alpha/r·B·A (paper: 16)")
    lora_targets: str = opt(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "names of the linears that w adapts"
    )
    # batches
    prompts_per_step: int = opt(16, "P (paper: 64)")
    group_size: int = opt(8, "G, samples of a prompt, at least 2 (paper: 5)")
    sft_batch: int = opt(32, "demonstrations per update (paper: unknown)")
    updates_per_rollout: int = opt(1, "updates on the same rollouts (paper: 1)")
    max_new_tokens: int = opt(80, "tokens of a completion; longer demonstrations are dropped (paper: 3000)")
    temperature: float = opt(1.0, "of sampling and of log-probs, > 0 (paper: unknown, SimpleRL 1.0)")
    tokens_per_micro_batch: int = opt(
        16384,
        "tokens per forward and backward, padding counted where attention pads; changes memory, not the result",
    )
    checkpoint_layers: int = opt(
        0,
        "layers, from the first, whose activations are computed again in the backward pass: less memory, a third more "
        "time for each of them",
    )
    sampler_slots: int = opt(256, "sequences generated at one time; changes memory, not the samples")
    shard: bool = opt(
        False,
        "cut θ, θ̂ and the reference, with gradients and moments, into one slice per rank: for models that do "
        "not fit on every GPU",
    )
    dtype: str = opt("float32", "of the forward pass and the sampler; weights stay float32 (float32 or bfloat16)")
    # GRPO
    aggregation: str = opt("grpo", "token weights: grpo, dapo or dr_grpo (paper: unknown)")
    divide_by_std: bool = opt(True, "divide advantages by the group's standard deviation (off: Dr.GRPO)")
    clip_low: float = opt(0.2, "ratio is clipped below 1 − clip_low (paper: unknown, verl 0.2)")
    clip_high: float = opt(0.2, "ratio is clipped above 1 + clip_high; DAPO: 0.28")
    kl_coef: float = opt(
        0.0, "weight of KL(π ‖ initial model); the reference is only kept if > 0 (paper: unknown, SimpleRL 1e-3)"
    )
    overlong_mask: bool = opt(False, "leave sequences that were cut off out of the RL loss")
    dynamic_sampling: int = opt(0, "sample up to n more batches to replace groups of equal rewards; 0: off")
    # evaluation and files
    eval_every: int = opt(25, "steps between evaluations")
    eval_problems: int = opt(100, "evaluation problems of each group: benchmark, level, length of the arithmetic")
    save_every: int = opt(25, "steps between checkpoints")
    track: str = opt("", "also send the metrics to tensorboard or wandb, which must be installed; empty: files only")
    profile_steps: str = opt(
        "",
        "steps to trace with torch.profiler, as 3 or 3-4; empty: none. On a GPU lower max_new_tokens for it: long "
        "sampling fills the tracer's buffer, and the phases after it would be missing",
    )


PAPER = dict(
    prompts_per_step=64, group_size=5, max_new_tokens=3000, alpha=5e-7, beta=2.5e-5, lora_rank=16, lora_alpha=16.0,
    lam=0.5, sft_batch=64, sft_steps=65, dtype="bfloat16", shard=True, checkpoint_layers=99, sampler_slots=64,
    eval_data="math500,minerva_math,olympiadbench,aime24,amc23", sft_data="zwhe99/DeepMath-103K",
    sft_fields="answer=final_answer,solution=r1_solution_1|r1_solution_2|r1_solution_3", sft_filter="difficulty=3..6",
)  # fmt: skip
MATH_HARD = dict(
    rl_data="hkust-nlp/SimpleRL-Zoo-Data:simplelr_qwen_level3to5/train.parquet",
    rl_fields="question=question,answer=gt_answer",
)
PRESETS: dict[str, dict] = {
    "laptop": {},  # the defaults: minutes on two cores
    # The paper's three models. Its values: 64 prompts, 5 samples, 3000 tokens, α, rank and alpha 16, λ, the benchmarks,
    # 6 epochs (read for Qwen2.5-3B; steps = 6·rows/64) and Qwen2.5-3B's D_RL. Not its values: β (not stated; α itself
    # would hardly move B·A), sft_batch, sft_steps, the memory settings, and D_SFT: its R1 traces of the RL problems
    # were not published. DeepMath-103K, whose procedure they follow, stands in: R1 too, of three solutions the first
    # correct one. Names and fields were read in public cards and loaders, not tried on the hub.
    "qwen2.5-3b": PAPER | dict(model="Qwen/Qwen2.5-3B", template="qwen-boxed", steps=130, sampler_slots=128,
                               rl_data="GAIR/LIMR", rl_fields="question=prompt"),  # D_RL: the paper's, 1,389 rows
    # D_RL: the paper's "MATH hard, 8.5K", read as SimpleRL's levels 3 to 5, 8,523 rows. Llama's template is not stated.
    "llama-3.2-3b-instruct": PAPER | dict(model="meta-llama/Llama-3.2-3B-Instruct", steps=799) | MATH_HARD,
    "qwen3-8b-base": PAPER | dict(model="Qwen/Qwen3-8B-Base", template="qwen-boxed", steps=799, sampler_slots=32,
                                  tokens_per_micro_batch=8192) | MATH_HARD,
    "smoke": dict(model="arithmetic-smoke", steps=6, sft_steps=3, prompts_per_step=8, group_size=8, sft_batch=8,
                  eval_every=3, eval_problems=4, save_every=2, lora_rank=4, lora_alpha=8.0),
}  # fmt: skip
CHOICES = {
    "method": ("sft", "rl", "sft_rl", "alternating", "mix", "mix_lora", "bridge"),
    "shadow_rollouts": ("shared", "own"),
    "dtype": ("float32", "bfloat16"),
    "aggregation": grpo.AGGREGATIONS,
    "track": ("", "tensorboard", "wandb"),
}
MINIMUM = dict(
    steps=1, lam_ramp_steps=0, mu=0, sft_steps=0, shadow_ratio_cap=0, resync_every=0, alpha=0, beta=0, lora_rank=1,
    prompts_per_step=1, group_size=2, sft_batch=1, updates_per_rollout=1, max_new_tokens=1, tokens_per_micro_batch=1,
    sampler_slots=1, clip_low=0, clip_high=0, kl_coef=0, dynamic_sampling=0, eval_every=1, eval_problems=1,
    save_every=1, lam=0, seed=0, checkpoint_layers=0,
)  # fmt: skip
MAY_BE_INFINITE = {"shadow_ratio_cap", "clip_high", "grad_clip"}
MAY_CHANGE_ON_RESUME = {
    "steps", "eval_every", "save_every", "tokens_per_micro_batch", "sampler_slots", "checkpoint_layers",
    "shard", "track", "profile_steps",
}  # fmt: skip


class SettingError(ValueError):
    """A setting that is unknown, out of range or inconsistent; the message names it."""


def check(s: Settings) -> Settings:
    for name, values in CHOICES.items():
        if getattr(s, name) not in values:
            raise SettingError(
                f"{name} must be one of {', '.join(v or 'empty' for v in values)}; got {getattr(s, name)!r}"
            )
    for name, least in MINIMUM.items():
        if not getattr(s, name) >= least:  # "not >=" also catches nan
            raise SettingError(f"{name} must be at least {least}; got {getattr(s, name)}")
    for f in fields(Settings):
        if f.type is float and f.name not in MAY_BE_INFINITE and not math.isfinite(getattr(s, f.name)):
            raise SettingError(f"{f.name} must be a finite number; got {getattr(s, f.name)}")
    if 0 < s.shadow_ratio_cap < 1:
        raise SettingError(f"shadow_ratio_cap must be 0 or at least 1; got {s.shadow_ratio_cap}")
    if s.eval_data and not s.rl_data:
        raise SettingError("eval_data needs rl_data: the built-in arithmetic has its own evaluation problems")
    if s.template and s.template not in prompts.TEMPLATES:
        raise SettingError(
            f"template must be {' or '.join(prompts.TEMPLATES)}, or empty for the model's own; got {s.template!r}"
        )
    if s.lam > 1:
        raise SettingError(f"lam must be in [0, 1]; got {s.lam}")
    if s.clip_low > 1:
        raise SettingError(f"clip_low must be in [0, 1]; got {s.clip_low}")
    for name in ("temperature", "grad_clip", "lora_alpha"):
        if not getattr(s, name) > 0:
            raise SettingError(f"{name} must be greater than 0; got {getattr(s, name)}")
    if s.sft_data and not s.rl_data:
        raise SettingError(
            "sft_data needs rl_data, whose problems also serve evaluation; with neither, the arithmetic is used"
        )
    if s.rl_data and not s.sft_data and s.method != "rl":
        raise SettingError(f"method {s.method} needs demonstrations: give sft_data, or choose --method rl")
    if s.method != "bridge" and (s.shadow_rollouts != "shared" or s.resync_every):
        raise SettingError(
            f"shadow_rollouts and resync_every concern θ̂, which only --method bridge has (got {s.method})"
        )
    if s.track and find_spec(s.track) is None:
        raise SettingError(f"track: the package {s.track} is not installed: pip install {s.track}")
    if (steps := profile_range(s.profile_steps)) and steps[0] > s.steps + s.sft_steps * (s.method == "sft_rl"):
        raise SettingError(f"profile_steps begins after the last step; got {s.profile_steps}")
    return s


def profile_range(text: str) -> range:
    """The steps that `profile_steps` names, counted from 1 as in the logs.

    >>> profile_range("3"), profile_range("3-4"), profile_range("")
    (range(3, 4), range(3, 5), range(0, 0))
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise SettingError(f"profile_steps must be a step or a range of steps, as 3 or 3-4; got {text!r}")
    return range(first, last + 1)


def parse(argv: list[str]) -> tuple[Settings, argparse.Namespace]:
    """(settings, the other flags: out, resume, dry_run, gpu and gpus). Raises SettingError."""
    parser = argparse.ArgumentParser(
        description="Trains a language model with BRIDGE or one of its baselines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="sets the defaults of all other flags")
    parser.add_argument("--out", help="run folder; by default runs/METHOD-PRESET-SEED")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out from its newest good checkpoint"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what the run will need, load nothing and stop")
    parser.add_argument("--gpu", help="with --dry-run: a100, h100, h200, l40s or 4090; by default this machine's")
    parser.add_argument("--gpus", type=int, default=1, help="with --dry-run: their number")
    for f in fields(Settings):
        action = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        text = f.metadata["help"].replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **action)
    preset = parser.parse_known_args(argv)[0].preset
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args(argv)
    if (args.gpu or args.gpus != 1) and not args.dry_run:
        raise SettingError(
            "gpu and gpus describe the machine that a --dry-run asks about; a run takes the one it is on"
        )
    if args.gpus < 1:
        raise SettingError(f"gpus must be at least 1; got {args.gpus}")
    s = check(Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)}))
    args.out = Path(args.out or f"runs/{s.method}-{preset}-{s.seed}")
    return s, args
