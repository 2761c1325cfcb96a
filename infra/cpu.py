"""How a process computes on a CPU: by which library it multiplies, and where its memory comes from."""

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


WIDE = 512  # hidden size from which oneDNN is faster: it compiles a kernel for each new shape


def tune(hidden_size: int) -> None:
    """Sets both for a model of this width. Computing on a GPU is not affected."""
    if hidden_size >= WIDE:
        multiply_by_onednn()
    keep_freed_memory()


def multiply_by_onednn() -> None:
    """Lets oneDNN multiply fp32 matrices, if it does so exactly.

    MKL, torch's default, uses half of an AMD processor's vector width. The setting permits bf16, which oneDNN uses on
    processors with matrix units for it (AMX) only. MKL stays there.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    x = torch.full((64, 64), 1 + 2**-20)  # bf16 rounds it to 1
    if not torch.equal(x @ torch.eye(64), x):
        matmul.fp32_precision = before


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory instead of returning it to the system, which would map and clear it again.

    Each step frees and allocates the same large tensors. The peak of memory stays, other C libraries have no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
