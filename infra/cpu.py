"""How a process computes on a CPU: by which library it multiplies, and where its memory comes from."""

import ctypes
import sys
from time import perf_counter

import torch

WIDE = 512  # hidden size from which oneDNN is used: it compiles a kernel for each new shape
# Parameters of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def tune(hidden_size: int) -> None:
    """Sets the library for a model of this width, and the memory for any."""
    if hidden_size >= WIDE:
        multiply_by_onednn()
    keep_freed_memory()


def multiply_by_onednn() -> None:
    """Lets oneDNN multiply fp32 matrices, if it does so in fp32.

    On an AMD processor it took less than half of the time of MKL, torch's default. The setting permits bf16, which
    oneDNN uses on processors with matrix units for it (AMX); there MKL stays.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    x = torch.full((64, 64), 1 + 2**-20)  # bf16 rounds it to 1
    if not torch.equal(x @ torch.eye(64), x):
        matmul.fp32_precision = before


def slowdown_of_bf16() -> float:
    """The time of a bf16 matmul divided by that of an fp32 one: about 8 without instructions for it, else below 1."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        x @ x  # the first call prepares
        start = perf_counter()
        x @ x
        seconds[dtype] = perf_counter() - start
    return seconds[torch.bfloat16] / seconds[torch.float32]


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory: the system would clear each page again. Other C libraries have no mallopt.

    Each step frees and allocates large tensors of the same sizes.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
