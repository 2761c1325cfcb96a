"""What a run takes, phase by phase, beside what plan.py says: peak memory, and on a GPU that it knows, seconds.

    python bench/plan.py [--quick] [--size laptop] [--out FILE.jsonl] [flags of bridge.py]
    torchrun --standalone --nproc-per-node 2 bench/plan.py --size Qwen2.5-0.5B --shard
    python bench/plan.py --iterations 20 --rl-data math.json --sft-data solutions.jsonl --template plain    (on a GPU)

--size is the preset laptop (--quick: smoke) or a model of random_models.py with random weights, on a GPU by default
Qwen2.5-3B. Such a model reads bytes and never ends an answer: every response has max_new_tokens, which is what memory
is computed for.

measured: peaks and median seconds of all steps but the first, on rank 0. On a GPU what torch's allocator held; on a CPU
the process's peak RSS, less what it was before anything was loaded, with glibc told to give back what is freed
(--heap: not told). computed: plan.memory, with the run's own longest prompt, without what it takes libraries and lost
pieces to be. The three passes have one number there, their largest.
"""

import ctypes
import tempfile
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import ClassVar

import torch
from measure import DEVICE, parser, write
from random_models import SIZES, build, byte_tokenizer
from step import one_step

import bridge
from infra import memory as plan
from infra import parallel
from settings import Settings, parse

PAPER = ["--dtype", "bfloat16", "--checkpoint-layers", "99", "--lora-rank", "16", "--alpha", "5e-7", "--beta", "5e-5"]
LARGE = ["--prompts-per-step", "16", "--group-size", "5", "--sft-batch", "16", "--max-new-tokens", "1024"]
SMALL = ["--prompts-per-step", "4", "--group-size", "2", "--sft-batch", "8", "--max-new-tokens", "32"]  # for two cores
PASSES = ("sample", "rl", "shadow", "sft", "optimizer")


def resident(key: str) -> float:
    """VmRSS, or VmHWM, its peak, of this process in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / plan.GiB


class Watched(bridge.Clock):
    """A clock that also takes the peak of each phase's memory, in GiB."""

    peaks: ClassVar[dict[str, float]] = {}

    @contextmanager
    def __call__(self, phase: str):
        gpu = DEVICE.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        with super().__call__(phase):
            yield
        peak = torch.cuda.max_memory_allocated() / plan.GiB if gpu else resident("VmHWM")
        self.peaks[phase] = max(peak, self.peaks.get(phase, 0.0))


def settings_of(size: str, folder: Path, flags: list[str]) -> Settings:
    """The settings of a run; of a random model it makes the folder first."""
    if size not in SIZES:
        return parse(["--preset", size, *flags])[0]
    with parallel.in_turns():
        if not folder.exists():
            build(size, torch.bfloat16, "cpu").save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
    return parse(["--model", str(folder), *PAPER, *(LARGE if DEVICE.type == "cuda" else SMALL), *flags])[0]


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--size", default="Qwen2.5-3B" if DEVICE.type == "cuda" else "laptop")
    options.add_argument("--iterations", type=int, default=2, help="steps; all are measured but the first")
    options.add_argument("--heap", action="store_true", help="let glibc keep freed memory, as it does in a run")
    args, flags = options.parse_known_args()
    if DEVICE.type == "cpu" and not args.heap:
        ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD
    parallel.start()
    size = "smoke" if args.quick else args.size
    bridge.Clock, before = Watched, resident("VmRSS") if DEVICE.type == "cpu" else 0.0
    with tempfile.TemporaryDirectory() as folder:
        s = settings_of(size, Path(parallel.first(folder)) / "model", flags)
        run = bridge.set_up(s, Path(folder))
        one_step(run, 0)  # makes the optimizers' moments, compiles kernels
        Watched.peaks.clear()
        steps = [one_step(run, k) for k in range(1, args.iterations)]
        m, *_ = parallel.gather([plan.shapes(plan.config_of(s.model))])  # then rank 0 takes its folder away
    lengths = [len(bridge.encode(run, problem.question)) for problem in run.task.problems]
    world, gpu, K = parallel.world(), plan.machine(None)[0], s.max_new_tokens
    always, sampling, training, _ = plan.memory(s, m, world, DEVICE.type == "cuda", max(lengths))
    gradients = sum(size for name, size in training.items() if "gradients" in name)
    more = {"sample": sum(sampling.values()), "optimizer": gradients}
    # what the plan must assume is known here
    plan.MEAN_RESPONSE = mean(step["sampled"] for step in steps) / (s.prompts_per_step * s.group_size * K)
    plan.MEAN_DEMONSTRATION = mean(len(response) for _, response in run.demonstrations) / K
    seconds = plan.seconds(s, m, gpu, world, prompt=round(mean(lengths))) if gpu else {}
    rows = [
        {"size": size, "ranks": world, "sharded": s.shard, "heap": args.heap, "phase": phase,
         "peak GiB": Watched.peaks[phase] - before,
         "computed GiB": (sum(always.values()) + more.get(phase, sum(training.values()))) / plan.GiB,
         "s": median(step[phase] for step in steps), "estimated s": seconds.get(phase), "flags": " ".join(flags)}
        for phase in PASSES
    ]  # fmt: skip
    if parallel.rank() == 0:
        write(rows, list(rows[0]), args.out)
    parallel.end()


if __name__ == "__main__":
    main()
