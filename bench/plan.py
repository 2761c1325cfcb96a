"""What a run takes, phase by phase, beside what plan.py says: peak memory, and on a GPU that it knows, seconds.

    python bench/plan.py [--quick] [--size laptop] [--shard] [--out FILE.jsonl]
    torchrun --standalone --nproc-per-node 2 bench/plan.py --size Qwen2.5-0.5B --shard

--size is the preset laptop (--quick: smoke) or a model of random_models.py with random weights, on a GPU by default
Qwen2.5-3B. Such a model never ends an answer: every response has max_new_tokens, which is what memory is computed for.

measured: of the second of two steps, on rank 0. On a GPU what torch's allocator held; on a CPU the process's peak RSS,
less what it was before the model was loaded, with glibc told to give back what is freed (--heap: not told). computed:
plan.memory, with the run's own longest prompt, without what it takes libraries and lost pieces to be. The three passes
have one number there, their largest.
"""

import ctypes
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from measure import DEVICE, parser, write
from random_models import SIZES, build
from step import one_step

import bridge
import parallel
import plan
import prompts
import toy
from settings import Settings, check, parse

SMALL = dict(prompts_per_step=4, group_size=2, sft_batch=8, max_new_tokens=32)  # what two cores can do of a large model
LARGE = dict(prompts_per_step=16, group_size=5, sft_batch=16, max_new_tokens=1024)
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
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        with super().__call__(phase):
            yield
        gpu = DEVICE.type == "cuda"
        self.peaks[phase] = torch.cuda.max_memory_allocated() / plan.GiB if gpu else resident("VmHWM")


def settings_of(size: str, shard: bool, folder: Path) -> Settings:
    """The settings of a run; of a random model it makes the folder first."""
    if size not in SIZES:
        return parse(["--preset", size, *["--shard"] * shard])[0]
    with parallel.in_turns():
        if not folder.exists():
            build(size, torch.bfloat16, "cpu").save_pretrained(folder)
            toy.make_tokenizer().save_pretrained(folder)
    batches = LARGE if DEVICE.type == "cuda" else SMALL
    layers = SIZES[size]["num_hidden_layers"]
    return check(Settings(model=str(folder), dtype="bfloat16", checkpoint_layers=layers, lora_rank=16, lora_alpha=16.0,
                          alpha=5e-7, beta=5e-5, shard=shard, **batches))  # fmt: skip


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--size", default="Qwen2.5-3B" if DEVICE.type == "cuda" else "laptop")
    options.add_argument("--shard", action="store_true", help="over the ranks that torchrun starts")
    options.add_argument("--heap", action="store_true", help="let glibc keep freed memory, as it does in a run")
    args = options.parse_args()
    if DEVICE.type == "cpu" and not args.heap:
        ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD
    parallel.start()
    size = "smoke" if args.quick else args.size
    bridge.Clock, before = Watched, resident("VmRSS") if DEVICE.type == "cpu" else 0.0
    with tempfile.TemporaryDirectory() as folder:
        s = settings_of(size, args.shard, Path(parallel.first(folder)) / "model")
        run = bridge.set_up(s, Path(folder))
        for k in range(2):
            row = one_step(run, k)
        m, *_ = parallel.gather([plan.shapes(plan.config_of(s.model))])  # then rank 0 takes its folder away
    questions = [p.question for p in run.task.problems]
    longest = max(len(prompts.encode_prompt(run.tokenizer, q, run.task.instruction)) for q in questions)
    world, gpu = parallel.world(), plan.machine(None)[0]
    always, sampling, training, _ = plan.memory(s, m, world, DEVICE.type == "cuda", longest)
    state, trained = sum(always.values()), sum(training.values())
    gradients = sum(size for name, size in training.items() if "gradients" in name)
    computed = {"sample": sum(sampling.values()), "optimizer": gradients}
    seconds = plan.seconds(s, m, gpu, world, prompt=longest) if gpu else {}
    rows = [
        {"size": size, "ranks": world, "sharded": s.shard, "heap": args.heap, "phase": phase,
         "peak GiB": Watched.peaks[phase] - before, "computed GiB": (state + computed.get(phase, trained)) / plan.GiB,
         "s": row[phase], "estimated s": seconds.get(phase)}
        for phase in PASSES
    ]  # fmt: skip
    if parallel.rank() == 0:
        write(rows, list(rows[0]), args.out)
    parallel.end()


if __name__ == "__main__":
    main()
