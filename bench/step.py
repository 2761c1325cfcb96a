"""A step of bridge.py by phase (seconds, peak memory beside infra/memory.py), and the training pass alone.

    python bench/step.py [--quick] [--out FILE.jsonl] [--trace FILE.json.gz]
    python bench/step.py --size Qwen2.5-0.5B --never-stop --steps 3 [flags of bridge.py]
    torchrun --standalone --nproc-per-node 2 bench/step.py --size Qwen2.5-0.5B --never-stop --shard
    python bench/step.py --peer trl [--run RUN] [flags of bridge.py]
    python bench/step.py --sweep --out FILE.jsonl && python bench/step.py --figure FILE.jsonl --out docs/speed.png

step, without a GPU: the preset `laptop` (--quick: a tiny random model), medians of five steps after the first.
With a GPU: the paper's 64 prompts x 5 completions of at most 3,000 tokens and 64 demonstrations of at most 2,500, on
Qwen2.5-3B (below 120 GiB: Qwen2.5-1.5B) with random weights; an eighth of that first. Such a model differs from a run:
    lengths   A completion ends at V/950 of the V token ids. Random weights draw almost uniformly, so lengths are about
              geometric with a mean of 950. With --never-stop all have max_new_tokens, as infra/memory.py assumes.
    rewards   The parity of a completion's token ids: random, so nearly every group has a gradient.
--size measures such a model with other flags; those that are not given are SMALL. Memory of libraries is not counted:
    peak GiB      on rank 0. On a GPU that of torch's allocator. On a CPU the process's peak RSS, less the RSS before
                  the model was loaded. With --size glibc returns freed memory, which costs time.
    computed GiB  infra/memory.py's worst case; the three passes have one number, their largest.

training: forward and backward of packed rows, with a GPU about 16k tokens with fp32 weights and bf16 compute.
    recomputed    layers that keep only their inputs and run again in the backward pass
    compiled      torch.compile of every layer, for changing shapes
    MFU, HFU      FLOPs over the measured matmul rate: those of the model (6 per weight and token, of the head per
                  response token; attention's 12·layers·width·length/2 per token), and all that are computed
    head ms       forward and backward of the head alone, included in ms

peer: steps of TRL's GRPOTrainer and ours in turn, on one thread (or OMP_NUM_THREADS), from `early`, the base model, and
from `late`, the model of the finished RUN. Model, prompts, reward, settings and torch's fused AdamW are the same, each
step starts from the policy's weights, and no step logs. BRIDGE also trains θ̂, w and on demonstrations.
    sample %      of the median step: prompts to advantages. train %: forward and backward passes. The rest: optimizers
    tokens        sampled ones of the median step
    equal %       completions in groups of equal rewards, among TRL's: they have no gradient
    x TRL         TRL's median over this one

sweep: what the time grows with, on the same threads, for completions of exactly `length` tokens from random weights.
train ms are those of all passes: the demonstrations, 32 by default, are a constant part.
"""

import copy
import ctypes
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import ClassVar

import torch
from base_models import Recipe, arithmetic_tokenizer, config_of
from measure import DEVICE, GPU, SIZES, Table, attempt, build, ceilings, parser, sizes_of, time_ms
from torch import nn
from transformers import AutoModelForCausalLM

import bridge
from infra import memory, parallel
from infra.model import checkpoint_layers, load, repository_of
from infra.run import RunFolder, Timer
from logprob import response_logprobs, token_logprobs
from ops.packed import Row
from rollout import Environment, sample_rollouts
from sampler import Sampler
from settings import PAPER, Settings, parse
from tasks.prompts import prompt_text
from tasks.task import Problem, Sources, Stream, Task

GiB, MEAN_LENGTH, LONGEST_DEMONSTRATION = 2**30, 950, 2500
SMALL = dict(prompts_per_step=4, group_size=2, sft_batch=8, max_new_tokens=32, dtype="bfloat16" if GPU else "float32")


# ---------------------------------------------------------------------------------------------------------------------
# A step


class Watch(Timer):
    """A timer that also takes each phase's peak memory, in GiB."""

    peaks: ClassVar[dict[str, float]] = {}

    @contextmanager
    def __call__(self, phase: str):
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        with super().__call__(phase):
            yield
        peak = torch.cuda.max_memory_allocated() / GiB if GPU else resident_gib("VmHWM")
        self.peaks[phase] = max(peak, self.peaks.get(phase, 0.0))


def resident_gib(key: str) -> float:
    """VmRSS of this process, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / GiB


class RandomText(Environment):
    """A question is the seed of a random prompt. A response is the parity of the sum of its token ids, as text."""

    def encode(self, question: str) -> list[int]:
        rng, V = random.Random(question), self.sampler.model.config.vocab_size
        return rng.choices(range(V), k=rng.randint(100, 200))

    def decode(self, ids: list[int], **options) -> str:
        return str(sum(ids) % 2)


def random_run(size: str, s: Settings, mean: int | None) -> bridge.Run:
    """A run of a random model whose completions have about `mean` tokens, or max_new_tokens without it."""
    model = build(size, torch.float32, "cpu" if s.shard and parallel.world_size() > 1 else DEVICE)
    V, rng = model.config.vocab_size, random.Random(0)
    stop = list(range(max(1, round(V / mean)))) if mean else [V]
    sampler = Sampler(model, stop, s.sampler_slots, getattr(torch, s.dtype))  # before w is attached
    task = Task([Problem(f"question {i}", "") for i in range(200)], [], [])
    env = RandomText(s, task, None, sampler, lambda response, problem: float(response))
    env.tokenizer = env
    longest = min(s.max_new_tokens, LONGEST_DEMONSTRATION)
    lengths = [rng.randint(longest // 5, longest) if mean else longest for _ in range(200)]
    demonstrations = [(env.encode(f"demonstration {i}"), rng.choices(range(V), k=n)) for i, n in enumerate(lengths)]
    orders = Stream(200, (0, 0)), Stream(200, (0, 1))
    policies = bridge.make_policies(model, s, 200)
    sources = Sources([""] * 200, list(range(200)))
    return bridge.Run(s, RunFolder(Path()), policies, env, demonstrations, sources, *orders, "")


def one_step(run: bridge.Run, k: int) -> dict[str, dict[str, float]]:
    """Lines 1 to 6 of bridge.train without logs: seconds and tokens by phase."""
    s, m, timer, rollouts, rollouts_hat, rows = run.s, run.m, Watch(k), None, None, {}
    plan = bridge.updates(s, k)
    if any(lam for _, lam in plan):
        rollouts, rollouts_hat = sample_rollouts(run.env, run.prompt_order, m.policy, m.shadow, k, timer)
        rows |= {"sample": [([], response) for _, response in rollouts.rows], "rl": rollouts.rows}
        rows["shadow"] = rollouts_hat.rows
    for mu, lam in plan:
        rows["sft"], sources = run.demonstrations_of_update(rollouts) if mu else ([], [])
        update = bridge.bilevel_gradients(m, rollouts, rollouts_hat, rows["sft"], mu, lam, s, timer, sources)
        bridge.keep_old_logp(update, rollouts, rollouts_hat, s)
        with timer("optimizer"):
            norms, stepped = bridge.clip_and_step(m, update.stats, s, lam)
        if not stepped:
            raise FloatingPointError(f"a number is not finite: {update.stats | norms}")
    tokens = {phase: sum(len(prompt) + len(ids) for prompt, ids in of_phase) for phase, of_phase in rows.items()}
    return {phase: {"s": t, "tokens": tokens.get(phase, 0)} for phase, t in timer.seconds.items()}


def step_rows(table: Table, title: str, run: bridge.Run, steps: int, before: float = 0.0) -> float:
    """A row for each phase, medians over `steps`, and one for the step; returns its seconds."""
    Watch.peaks.clear()
    measured, world = [one_step(run, k) for k in range(1, 1 + steps)], parallel.world_size()
    prompt = max(len(run.env.encode(problem.question)) for problem in run.env.task.problems[:1000])
    parts = memory.memory(run.s, memory.shapes(run.m.policy.config), world, GPU, prompt)[:3]
    state, sampling, training = (sum(sizes.values()) for sizes in parts)
    gradients = sum(size for name, size in parts[2].items() if "gradients" in name)
    computed = {"sample": sampling, "sample_shadow": sampling, "optimizer": gradients}
    rows = {}
    for phase in measured[0]:
        s, tokens = (median(step[phase][key] for step in measured) for key in ("s", "tokens"))
        rows[phase] = {"s": s, "tokens": tokens, "tokens/s": tokens / s, "peak GiB": Watch.peaks[phase] - before,
                       "computed GiB": (state + computed.get(phase, training)) / GiB}  # fmt: skip
    total = {key: max(row[key] for row in rows.values()) for key in ("peak GiB", "computed GiB")}
    total |= {"s": sum(row["s"] for row in rows.values()), "tokens": None, "tokens/s": None}
    for phase, row in (rows | {"step": total}).items():
        if parallel.rank() == 0:
            case = {"workload": title, "ranks": world, "steps": steps, "phase": phase}
            table.add(case | {name: row[name] for name in rows["optimizer"]})
    return total["s"]


def write_trace(run: bridge.Run, path: Path) -> None:
    """A trace of one step for chrome://tracing or Perfetto; Timer names a range after each phase."""
    with torch.profiler.profile() as profile:  # of CPU and, if there is one, GPU
        one_step(run, 1)
    if parallel.rank() == 0:
        profile.export_chrome_trace(str(path))
        print(f"the trace of a step is in {path}")


def paper_steps(table: Table) -> bridge.Run:
    """An eighth of the paper's batches, then all of them if the eighth took less than 20 s."""
    size = "Qwen2.5-3B" if torch.cuda.get_device_properties(0).total_memory > 120 * GiB else "Qwen2.5-1.5B"
    full = Settings(**PAPER | dict(eval_data="", sampler_slots=256))
    eighth = replace(full, prompts_per_step=8, sft_batch=8)
    run = random_run(size, eighth, MEAN_LENGTH)
    run.s = run.env.s = replace(eighth, max_new_tokens=64)
    one_step(run, 0)  # compiles kernels, creates the optimizers' moments
    run.s = run.env.s = eighth
    if step_rows(table, f"{size}, 1/8 of the paper's batches", run, 1) < 20:
        run.s = run.env.s = full
        attempt("the paper's batches", lambda: step_rows(table, f"{size}, the paper's batches", run, 1))
        run.s = run.env.s = eighth
    return run


# ---------------------------------------------------------------------------------------------------------------------
# The training pass


def random_rows(vocabulary: int, count: int, prompt: int, response: int, spread: float) -> list[Row]:
    """Rows with `prompt` tokens each; lengths of responses are lognormal about `response`, like rollouts'."""
    rng, words = random.Random(0), range(vocabulary)
    lengths = [max(2, round(response * rng.lognormvariate(0, spread))) for _ in range(count)]
    return [(rng.choices(words, k=prompt), rng.choices(words, k=length)) for length in lengths]


def training_row(model: nn.Module, name: str, rows: list[Row], dtype: torch.dtype, recomputed: int, compiled: bool):
    checkpoint_layers(model, recomputed)
    c, layers, lengths = model.config, model.config.num_hidden_layers, [len(p) + len(r) - 1 for p, r in rows]
    tokens, responses, weight = sum(lengths), sum(len(r) for _, r in rows), model.get_output_embeddings().weight
    hidden = torch.randn(responses, c.hidden_size, device=DEVICE).to(dtype).requires_grad_()
    targets = torch.randint(c.vocab_size, (responses,), device=DEVICE)
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ms = time_ms(lambda: response_logprobs(model, rows, 1.0, dtype)[0].mean().backward())
    peak = torch.cuda.max_memory_allocated() / GiB if GPU else None
    P, head_size = sizes_of(model)
    attention = 4 * layers * c.num_attention_heads * head_size * sum(n * n / 2 for n in lengths)
    body = 2 * (P - weight.numel()) * tokens + attention  # FLOPs of a forward pass
    head = 2 * weight.numel() * responses
    per_ms, needed = ceilings()["matmul_tflops"] * 1e9, 3 * (body + head)
    return {
        "model": name, "recomputed": f"{recomputed}/{layers}", "compiled": compiled, "tokens": tokens,
        "responses": responses, "ms": ms,
        "head ms": time_ms(lambda: token_logprobs(hidden, weight, targets)[0].mean().backward()),
        "tokens/s": 1e3 * tokens / ms, "MFU %": 100 * needed / ms / per_ms,
        "HFU %": 100 * (needed + body * recomputed / layers + head) / ms / per_ms, "peak GiB": peak,
    }  # fmt: skip


def training_rows(table: Table, quick: bool) -> None:
    if GPU:
        name, dtype = "tiny" if quick else "Qwen2.5-3B", torch.bfloat16
        model, sizes = build(name, torch.float32), (6, 20, 60, 0.5) if quick else (16, 150, 700, 0.7)
    else:
        name, dtype = "arithmetic-smoke" if quick else "arithmetic-laptop", torch.float32
        model, sizes = load(name)[0], (7 if quick else 256, 12, 46, 0.3)
    rows, layers = random_rows(model.config.vocab_size, *sizes), model.config.num_hidden_layers
    for compiled in (False, True) if GPU else (False,):
        for layer in model.model.layers if compiled else ():
            layer.compile(dynamic=True)
        for recomputed in (layers, layers // 2, 0):
            measure = partial(training_row, model, name, rows, dtype, recomputed, compiled)
            if row := attempt(f"{recomputed} recomputed layers, compiled {compiled}", measure):
                table.add(row)


# ---------------------------------------------------------------------------------------------------------------------
# Beside TRL

OURS = {"ours, GRPO": "rl", "ours, BRIDGE": "bridge"}


def trl_step(model: nn.Module, run: bridge.Run, folder: str):
    """one_step of TRL's trainer, with the settings, the reward and the prompts of `run`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    s, env, prompts = run.s, run.env, copy.copy(run.prompt_order)
    tokenizer = copy.deepcopy(env.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token  # AutoTokenizer's own lies outside the embedding
    config = GRPOConfig(
        folder, per_device_train_batch_size=s.prompts_per_step * s.group_size, num_generations=s.group_size,
        gradient_accumulation_steps=1, num_iterations=1, max_completion_length=s.max_new_tokens, beta=0.0,
        temperature=s.temperature, loss_type=s.aggregation, learning_rate=s.alpha, optim="adamw_torch_fused",
        gradient_checkpointing=False, bf16=False, use_cpu=not GPU, report_to="none",
    )  # fmt: skip

    def reward(completions: list[str], problem: list[Problem], **others) -> list[float]:
        return list(map(env.reward, completions, problem))

    dataset = Dataset.from_dict({"prompt": [""]})  # not read: step draws its own prompts
    trainer = GRPOTrainer(model, reward, config, train_dataset=dataset, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps, optimizer = 1, trainer.create_optimizer()
    model.train()

    def step(k: int) -> dict[str, dict[str, float]]:
        timer, problems = Timer(k), [env.task.problems[i] for _, i in prompts.take(s.prompts_per_step)]
        with timer("sample"):
            texts = [prompt_text(env.tokenizer, p.question, env.task.instruction, env.task.template) for p in problems]
            pairs = [pair for pair in zip(texts, problems, strict=True) for _ in range(s.group_size)]
            batch = trainer._prepare_inputs([{"prompt": text, "problem": problem} for text, problem in pairs])
        with timer("train"):
            trainer.accelerator.backward(trainer.compute_loss(model, batch))
        with timer("optimizer"):
            trainer.accelerator.clip_grad_norm_(model.parameters(), s.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        equal = (batch["advantages"] == 0).float().mean().item()
        phases = {phase: {"s": seconds} for phase, seconds in timer.seconds.items()}
        phases["sample"] |= {"tokens": int(batch["completion_mask"].sum()), "equal": equal}
        return phases

    return step


def measure_in_turn(paths: dict[str, Callable], steps: int, weights: list[nn.Parameter]) -> dict[str, dict[str, float]]:
    """Medians over `steps` steps of each path after the first, which warms up; all start from the same weights."""
    initial, measured = [p.detach().clone() for p in weights], {name: [] for name in paths}
    for k in range(1 + steps):
        for name, step in paths.items():
            start = time.perf_counter()
            phases = step(k)
            ms, sample = 1e3 * (time.perf_counter() - start), phases["sample"]
            train = sum(values["s"] for phase, values in phases.items() if phase not in ("sample", "optimizer"))
            measured[name].append({"ms": ms, "sample ms": 1e3 * sample["s"], "train ms": 1e3 * train} | sample)
        for p, values in zip(weights, initial, strict=True):
            p.data.copy_(values)
    best = {name: min(step["ms"] for step in of_path[1:]) for name, of_path in measured.items()}
    return {name: {key: median(step[key] for step in of_path[1:]) for key in of_path[0]} | {"best ms": best[name]}
            for name, of_path in measured.items()}  # fmt: skip


def weights_of(run: bridge.Run) -> list[nn.Parameter]:
    return [p for parameters in run.m.parameters.values() for p in parameters]


def peer_rows(table: Table, policy: str, s: Settings, steps: int, folder: str) -> None:
    runs = {name: bridge.set_up(replace(s, method=method), RunFolder(Path())) for name, method in OURS.items()}
    model = AutoModelForCausalLM.from_pretrained(s.model, dtype=torch.float32).to(DEVICE)
    paths = {"TRL": trl_step(model, runs["ours, GRPO"], folder)}
    paths |= {name: partial(one_step, run) for name, run in runs.items()}
    weights = [*model.parameters(), *(p for run in runs.values() for p in weights_of(run))]
    medians = measure_in_turn(paths, steps, weights)
    trl = medians["TRL"]
    for name, m in medians.items():
        share = {f"{phase} %": 100 * m[f"{phase} ms"] / m["ms"] for phase in ("sample", "train")}
        table.add({"policy": policy, "implementation": name, "threads": torch.get_num_threads(), "steps": steps,
                   "median ms": m["ms"], "best ms": m["best ms"], **share, "other %": 100 - sum(share.values()),
                   "tokens": m["tokens"], "tokens/s": 1e3 * m["tokens"] / m["ms"], "equal %": 100 * trl["equal"],
                   "x TRL": trl["ms"] / m["ms"]})  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# How the time grows

BASE, QUICK_BASE = dict(prompts=16, length=64, width=96), dict(prompts=2, length=8, width=16)
POINTS = dict(prompts=(4, 8, 16, 32, 64), length=(16, 32, 64, 128), width=(64, 96, 192, 384))
QUICK_POINTS = dict(prompts=(2, 4), length=(8, 12), width=(16, 32))
PANELS = {  # what varies: title, key of the rows on the x axis, its label
    "prompts": ("more prompts", "tokens", "sampled tokens in a step"),
    "length": ("longer completions", "tokens", "sampled tokens in a step"),
    "width": ("wider model", "parameters", "parameters"),
}


def endless_run(s: Settings, width: int) -> bridge.Run:
    """A run of random weights whose completions never end; nearly every group has a gradient."""
    tokenizer = arithmetic_tokenizer()
    config = config_of(Recipe(hidden=width, mlp=3 * width), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        run = bridge.set_up(replace(s, model=folder), RunFolder(Path()))
    run.env.sampler.is_stop.zero_()
    run.env.reward = lambda response, problem: float(sum(response.encode()) % 2)
    return run


def sweep_rows(table: Table, s: Settings, steps: int, quick: bool) -> None:
    base, points = (QUICK_BASE, QUICK_POINTS) if quick else (BASE, POINTS)
    for varied, point in [(name, base | {name: value}) for name, values in points.items() for value in values]:
        run = endless_run(s, point["width"])  # before max_new_tokens changes: it drops longer demonstrations
        run.s = run.env.s = replace(s, prompts_per_step=point["prompts"], max_new_tokens=point["length"])
        m = measure_in_turn({"": partial(one_step, run)}, steps, weights_of(run))[""]
        parameters = sum(p.numel() for p in run.m.parameters["theta"])
        table.add({"varied": varied, **point, "parameters": parameters, "steps": steps, "tokens": m["tokens"],
                   "sample ms": m["sample ms"], "train ms": m["train ms"], "ms": m["ms"],
                   "ms per 1,000 tokens": 1e3 * m["ms"] / m["tokens"]})  # fmt: skip


def draw(file: Path, out: Path) -> None:
    """A panel for each quantity of the newest sweep in `file`; grey lines grow in proportion.

    Beside the newest commit's sweep that of the commit before it is drawn, pale.
    """
    from matplotlib.figure import Figure

    rows = [row for row in map(json.loads, file.read_text().splitlines()) if row["part"] == "sweep"]
    commits = list(dict.fromkeys(row["commit"] for row in rows))[-2:]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for ax, (varied, (title, key, label)) in zip(figure.subplots(1, 3, sharey=True), PANELS.items(), strict=True):
        for commit in commits:
            of_commit = [row for row in rows if (row["varied"], row["commit"]) == (varied, commit)]
            points = {row[key]: row for row in of_commit}  # the last row of a point counts
            xs = sorted(points)
            is_newest = commit == commits[-1]
            for phase, marker, colour in (("train", "o", "C0"), ("sample", "s", "C1")):
                ys = [points[x][f"{phase} ms"] for x in xs]
                if not is_newest:
                    ax.plot(xs, ys, color=colour, linewidth=2, alpha=0.35, label=f"{phase}, before")
                    continue
                ax.plot(xs, ys, color=colour, linewidth=2, marker=marker, markersize=7, label=phase)
                ax.plot(xs, [ys[-1] * x / xs[-1] for x in xs], color="0.6", linestyle="--", zorder=0)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(xs, [f"{x / 1e6:.2g} M" if x >= 1e6 else f"{x / 1e3:.3g} k" for x in xs])
        ax.minorticks_off()
        ax.set_title(title, fontsize=14)
        ax.set_xlabel(label, fontsize=13)
        ax.tick_params(labelsize=12)
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("milliseconds", fontsize=13)
    figure.axes[0].plot([], [], color="0.6", linestyle="--", label="in proportion")
    figure.axes[0].legend(fontsize=13)
    figure.savefig(out, dpi=110)


def compare(args, flags: list[str]) -> None:
    """The parts that --peer and --sweep choose, on one thread."""
    if args.peer and find_spec("trl") is None:
        sys.exit("step.py: trl is not installed: pip install -r tests/requirements.txt")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    ceilings()
    s, steps = parse(["--preset", "smoke"] * args.quick + flags)[0], 1 if args.quick else args.steps
    policies = {"early": repository_of(s.model)[0]} | ({"late": str(args.run / "model")} if args.run else {})
    table = Table("peer", args.out)
    with tempfile.TemporaryDirectory() as folder:
        for policy, model in policies.items() if args.peer else ():
            peer_rows(table, policy, replace(s, model=model), steps, folder)
    if args.sweep:
        sweep_rows(Table("sweep", args.out), s, steps, args.quick)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--size", choices=SIZES, help="measure only steps of this random model")
    options.add_argument("--steps", type=int, default=5, help="measured steps, after the first")
    options.add_argument("--never-stop", action="store_true", help="all completions have max_new_tokens")
    options.add_argument("--trace", type=Path, help="write a trace of one step to this file, NAME.json.gz")
    options.add_argument("--peer", choices=["trl"], help="measure only steps beside those of TRL's trainer")
    options.add_argument("--run", type=Path, help="with --peer: a finished run, whose model is the late policy")
    options.add_argument("--sweep", action="store_true", help="measure only how the time grows")
    options.add_argument("--figure", type=Path, metavar="FILE.jsonl", help="draw the sweep in this file to --out")
    args, flags = options.parse_known_args()
    if args.figure:
        return draw(args.figure, args.out or Path("speed.png"))
    if args.peer or args.sweep:
        return compare(args, flags)
    if args.size and not GPU:  # for the peak; without --size the seconds count, which this about doubles
        ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD: freed memory returns to the system
    parallel.start()
    ceilings()
    before, table = 0.0 if GPU else resident_gib("VmRSS"), Table("step", args.out)
    with tempfile.TemporaryDirectory() as folder:
        if GPU and not (args.size or args.quick):
            run = paper_steps(table)
        else:
            if size := args.size or ("tiny" if args.quick else ""):
                given = {flag.partition("=")[0][2:].replace("-", "_") for flag in flags}
                s = replace(parse(flags)[0], **{name: value for name, value in SMALL.items() if name not in given})
                run = random_run(size, s, None if args.never_stop else min(MEAN_LENGTH, s.max_new_tokens // 3))
            else:
                run = bridge.set_up(parse(flags)[0], RunFolder(Path(folder)))
            one_step(run, 0)  # compiles kernels, creates the optimizers' moments
            step_rows(table, size or "preset laptop", run, 1 if args.quick else args.steps, before)
        if args.trace:
            write_trace(run, args.trace)
    if not args.size:
        del run
        training_rows(Table("training", args.out), args.quick)
    parallel.end()


if __name__ == "__main__":
    main()
