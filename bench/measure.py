"""What all benchmarks share: timing, the machine's two ceilings, tables and JSON lines.

Times on a GPU are between CUDA events, each with the L2 cache flushed before it, as triton.testing.do_bench does. What
is compared is run in turn, so that a slow moment of the machine hits all alike.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the project's own modules
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAILURES = (
    ImportError, RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError, TimeoutError, AssertionError,
)  # fmt: skip
try:  # of a peer's kernel that does not compile, or wants more shared memory than there is
    from triton.errors import TritonError

    FAILURES += (TritonError,)
except ImportError:
    pass


def parser(description: str) -> argparse.ArgumentParser:
    """With the flags that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="small sizes: does everything run, is everything right?")
    options.add_argument("--out", type=Path, help="append the rows to this file")
    return options


def arguments(description: str) -> argparse.Namespace:
    return parser(description).parse_args()


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device=DEVICE)  # larger than any L2


def _once(run) -> float:
    """Milliseconds of one call."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    _flush_buffer().zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def interleaved(runs: dict, seconds: float = 1.0, least: int = 7) -> dict[str, tuple[float, float, float]]:
    """(20 %, median, 80 %) of the milliseconds of each call, after two to warm up.

    Takes turns until about `seconds` for each have passed, and never fewer than `least` calls of each.
    """
    warm = {name: min(_once(run), _once(run)) for name, run in runs.items()}
    turns = max(least, min(200, int(1e3 * seconds * len(runs) / sum(warm.values()))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(_once(run))
    return {name: tuple(sorted(t)[round(q * (turns - 1))] for q in (0.2, 0.5, 0.8)) for name, t in times.items()}


def time_ms(run, seconds: float = 1.0, least: int = 7) -> tuple[float, float, float]:
    """(20 %, median, 80 %) of the milliseconds of one call."""
    return interleaved({"": run}, seconds, least)[""]


@cache
def ceilings() -> dict[str, float]:
    """What this machine can do at best: a large copy, bytes read and written, and a large matmul on random data."""
    gpu = DEVICE.type == "cuda"
    n = 2**32 if gpu and torch.cuda.mem_get_info()[0] > 16 * 2**30 else 2**27  # bytes
    source = torch.empty(n, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy_ms = time_ms(lambda: target.copy_(source))[0]
    side, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    matmul_ms = time_ms(lambda: a @ b)[0]
    return dict(copy_gbps=2 * n / copy_ms / 1e6, matmul_tflops=2 * side**3 / matmul_ms / 1e9)


def peak_mib(run) -> float | None:
    """Memory that a call takes above what is allocated before it; None on a CPU."""
    if DEVICE.type == "cpu":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def attempt(name: str, run):
    """run(), or None after a line that says why it is left out: a peer may be absent, or fail on this machine."""
    try:
        return run()
    except FAILURES as error:  # torch's out-of-memory is a RuntimeError
        reason = (str(error).strip() or "no message").splitlines()[0]
        print(f"left out: {name}: {type(error).__name__}: {reason[:200]}", flush=True)
        return None


@cache
def _machine() -> dict:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        import triton
    except ImportError:
        triton = None
    return dict(
        device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine(),
        cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
        triton=triton and triton.__version__, transformers=transformers.__version__, python=platform.python_version(),
        commit=git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no")),
    )  # fmt: skip


def write(rows: list[dict], columns: list[str], out: Path | None) -> None:
    """Prints the columns as a table; appends whole rows, with what identifies the run, to `out`."""

    def cell(value) -> str:
        return "–" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)

    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(cell(row.get(c)) for c in columns) + " |", flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        known = dict(bench=Path(sys.argv[0]).stem, quick="--quick" in sys.argv) | _machine() | ceilings()
        with open(out, "a") as file:
            file.writelines(json.dumps(row | known) + "\n" for row in rows)
