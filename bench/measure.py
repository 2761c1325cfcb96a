"""The benchmarks' common parts: timing, the machine's two ceilings, tables and JSON lines, models with random weights.

Times on a GPU are between CUDA events, and the L2 cache is flushed before each call, as in triton.testing.do_bench.
Competing implementations run in turn: a slow moment of the machine then slows all of them alike.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the project's own modules
import ops.packed  # noqa: E402, F401  registers the packed attention
from ops.head import triton  # noqa: E402  None if it is not installed

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of all benchmarks."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="small sizes: does everything run and is it right?")
    options.add_argument("--out", type=Path, help="append the rows to this file")
    return options


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device=DEVICE)  # larger than any L2


def _once(function: Callable) -> float:
    """Milliseconds of one call."""
    if not GPU:
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    _flush_buffer().zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def interleaved(functions: dict[str, Callable], seconds: float, least: int = 7) -> dict[str, dict[str, float]]:
    """The median, 20 % and 80 % quantiles of each function's milliseconds, after two calls that warm up.

    The functions take turns for about `seconds` each, and at least `least` times.
    """
    warm = {name: min(_once(function), _once(function)) for name, function in functions.items()}
    turns = max(least, min(200, int(1e3 * seconds * len(functions) / sum(warm.values()))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            times[name].append(_once(function))
    quantiles = {"ms": 0.5, "ms p20": 0.2, "ms p80": 0.8}
    return {n: {key: sorted(t)[round(q * (turns - 1))] for key, q in quantiles.items()} for n, t in times.items()}


def time_ms(function: Callable, seconds: float = 0.0, least: int = 5) -> float:
    """Median milliseconds of one call."""
    return interleaved({"": function}, seconds, least)[""]["ms"]


@cache
def ceilings() -> dict[str, float]:
    """The machine's largest rates: a long copy, bytes read and written, and a large matmul of random numbers.

    A benchmark calls it first, while memory is free.
    """
    seconds = 0.1 if "--quick" in sys.argv else 1.0
    n = 2**32 if GPU and torch.cuda.mem_get_info()[0] > 16 * 2**30 else 2**27  # bytes
    source = torch.zeros(n, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy_ms = time_ms(lambda: target.copy_(source), seconds)
    side, dtype = (8192, torch.bfloat16) if GPU else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    matmul_ms = time_ms(lambda: a @ b, seconds)
    return dict(copy_gbps=2 * n / copy_ms / 1e6, matmul_tflops=2 * side**3 / matmul_ms / 1e9)


def attempt(name: str, function: Callable):
    """function(), or None after a line with the reason: a peer may be absent, or fail on this machine."""
    try:
        return function()
    except Exception as error:  # missing packages, kernels that do not compile, full memory
        reason = (str(error).strip() or "no message").splitlines()[0]
        print(f"omitted: {name}: {type(error).__name__}: {reason[:200]}", flush=True)
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def commit() -> str:
    """BRIDGE_COMMIT from the environment, or git's commit with a + for changed files; empty without both."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    if given := os.environ.get("BRIDGE_COMMIT"):
        return given
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except OSError:  # git is not installed
        return ""


def sources() -> str:
    """A hash of the code that a run executes: every Python file but those of tests/."""
    digest = hashlib.sha256()
    for folder in ("", "bench", "grading", "infra", "ops", "tasks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def machine() -> dict:
    return dict(
        device=torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine(),
        cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
        triton=triton and triton.__version__, transformers=transformers.__version__, python=platform.python_version(),
        commit=commit(),
    )  # fmt: skip


class Table:
    """A Markdown table; each row is printed, and appended to `out` with the facts of its run, when it is added."""

    def __init__(self, part: str, out: Path | None):
        self.part, self.out, self.columns = part, out, None

    def add(self, row: dict) -> None:
        columns = [name for name in row if name not in ("ms p20", "ms p80")]
        if columns != self.columns:
            print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
            self.columns = columns
        cells = [f"{x:,.4g}" if isinstance(x, float) else "–" if x is None else str(x) for x in map(row.get, columns)]
        print(f"| {' | '.join(cells)} |", flush=True)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            source = dict(bench=Path(sys.argv[0]).stem, part=self.part, quick="--quick" in sys.argv)
            with open(self.out, "a") as file:
                file.write(json.dumps(row | source | machine() | ceilings()) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Models with random weights: speed and memory do not depend on the values, and nothing is downloaded

COMMON = dict(vocab_size=151936, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=None)
SIZES = {
    "Qwen2.5-3B": dict(model_type="qwen2", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                       num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2.5-1.5B": dict(model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                         num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2.5-0.5B": dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen3-8B": dict(model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
    "tiny": dict(model_type="qwen3", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, vocab_size=512),
}  # fmt: skip


def build(size: str, dtype: torch.dtype, device: torch.device | str = DEVICE) -> nn.Module:
    """A model of SIZES, initialised on the device, with packed attention as from infra.model.load."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**COMMON | SIZES[size]), dtype=dtype)
    model.set_attn_implementation("packed")
    return model.eval()


def sizes_of(model: nn.Module) -> tuple[int, int]:
    """(P, the weights that multiply a token: all except an embedding that is only a table; head size)"""
    total, embedding, c = sum(p.numel() for p in model.parameters()), model.get_input_embeddings().weight, model.config
    parameters = total if c.tie_word_embeddings else total - embedding.numel()
    return parameters, getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
