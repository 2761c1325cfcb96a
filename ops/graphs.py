"""CUDA graphs of decoding steps: recorded once for each number of slots, then replayed without Python."""

from collections.abc import Callable
from functools import cache

import torch

STEPS = 8  # decode steps on a GPU between two checks for finished samples


@cache
def side_stream() -> torch.cuda.Stream:
    """One stream for all captures: libraries keep a workspace for every stream, 32 MiB on an H100."""
    return torch.cuda.Stream()


def bucket_of(count: int) -> int:
    """The number of slots of the graph that serves `count` slots: a power of 2 up to 64, then a multiple of 64."""
    if count > 64:
        return -(-count // 64) * 64
    return 1 << (count - 1).bit_length()


def graphed(step: Callable[[int], None], size: int) -> Callable[[int], None]:
    """STEPS calls of step(number of slots) on CUDA, replayed from a graph that is captured at the bucket's first use.

    A graph repeats the same kernels on the same memory: tensors and graphs live as long as the call of `generate`.
    size: slots of the cache, which bounds a bucket.
    """
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    memory = torch.cuda.graph_pool_handle()

    def steps(count: int) -> None:
        bucket = min(size, bucket_of(count))
        remaining = STEPS
        if bucket not in graphs:
            # The first step runs outside a graph: it compiles kernels and allocates workspaces.
            side = side_stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step(bucket)
            torch.cuda.current_stream().wait_stream(side)
            graphs[bucket] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[bucket], pool=memory, stream=side, capture_error_mode="thread_local"):
                step(bucket)  # recorded, not run
            remaining -= 1
        for _ in range(remaining):
            graphs[bucket].replay()

    return steps
