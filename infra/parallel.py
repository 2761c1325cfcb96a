"""Several ranks as one: started by torchrun, one process per GPU (or, with gloo, per CPU).

All ranks draw the same prompts and demonstrations, share out the work, and bring the results together again, so that
each knows the whole batch and decides the same. What is summed is gradients and numbers per token, divided before by
counts over the whole batch: the number of ranks changes rounding, and nothing else. No rank may leave out a collective
that another enters, whatever its data: that would be a hang.

If a model does not fit on every GPU, `shard` cuts its weights, gradients and moments into one slice per rank (FSDP2).
With one process all of this does nothing.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate, pairwise
from pathlib import Path
from types import MethodType
from typing import NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

TIMEOUT = timedelta(hours=1)  # in a collective, before a rank gives up: one may sample for long, while others wait


def start(timeout: timedelta = TIMEOUT) -> bool:
    """Joins the ranks that torchrun started; alone, does nothing. On GPUs, each rank of a machine takes its own.

    Returns whether torchrun has started these ranks before: with --max-restarts it does so after a failure.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return restarted
    if torch.cuda.is_available():
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            fail(f"there is no GPU {local} on this machine, which has {count}: lower --nproc-per-node")
        torch.cuda.set_device(local)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    attempt = agree(store, rank, world)
    store = dist.PrefixStore(f"attempt {attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    return attempt > 1 or any(gather([restarted]))


def agree(store: dist.Store, rank: int, world: int) -> int:
    """The number of this attempt to run, from 1, the same on all ranks.

    torchrun keeps its store over restarts, with the addresses of ranks that are gone, and its agents, one per machine,
    each count their own failures only. So rank 0 counts, and tells every rank that shows by a word of its own that it
    is there now.
    """
    if rank > 0:
        word = uuid4().hex
        store.set(f"rank {rank}", word)
        attempt = int(store.get(word))  # waits for it
        store.set(f"attempt {attempt}, rank {rank}", "")
        return attempt
    attempt, absent = store.add("attempts", 1), range(1, world)
    while absent:
        for other in absent:
            if store.check([f"rank {other}"]):  # perhaps from an earlier attempt: then nobody reads the answer
                store.set(store.get(f"rank {other}").decode(), str(attempt))
        time.sleep(0.02)
        absent = [other for other in absent if not store.check([f"attempt {attempt}, rank {other}"])]
    return attempt


def end() -> None:
    """Leaves together: a rank that goes while others still talk can bring them down."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def fail(text: str) -> NoReturn:
    """Ends the process with a message, which torchrun shows again below all that it has to say itself."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        error = {"message": text, "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": error}))
    sys.exit(text)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def in_turns() -> Iterator[None]:
    """For what is made or downloaded once: rank 0 first, then one rank of every other machine, then the rest."""
    mine = min(rank(), 1 + (os.environ.get("LOCAL_RANK") != "0"))
    for turn in range(3 if world() > 1 else 1):
        if turn == mine:
            yield
        if world() > 1:
            dist.barrier()


def gather(values: list) -> list:
    """The values of all ranks, rank 0's first."""
    if world() == 1:
        return values
    parts: list = [None] * world()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def first(value):
    """Rank 0's value, on every rank."""
    shared = [value]
    if world() > 1:
        dist.broadcast_object_list(shared, 0)
    return shared[0]


def add(tensors: Iterable[Tensor]) -> None:
    """Each becomes, in place, the sum over ranks; the same bits on all of them."""
    if world() > 1:
        for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()


def shares(sizes: list[int], parts: int) -> list[range]:
    """Consecutive ranges of items, one per part, of about equal total size; some are empty if items are few or unequal.

    >>> shares([5, 1, 1, 1, 2], 2)
    [range(0, 1), range(1, 5)]
    """
    ends = list(accumulate(sizes))
    owner = [min(parts - 1, (2 * end - size) * parts // (2 * ends[-1])) for end, size in zip(ends, sizes, strict=True)]
    starts = [sum(o < part for o in owner) for part in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def as_many(batches: list[range]) -> list[range]:
    """This rank's micro-batches and, where other ranks have more, empty ones: each is a forward and a backward pass,
    in which sharded models bring their slices together."""
    most = max(gather([len(batches)]))
    return [*batches, *[range(0)] * (most - len(batches))]


def shard(model: nn.Module, w: Iterable[nn.Parameter], train: bool = True) -> None:
    """Cuts the model's parameters into a slice per rank, in place; on GPUs it also moves them there, layer by layer.

    A layer is put together for as long as it computes; what belongs to no layer (embedding, head, last norm) from
    `model.run`'s beginning to the end of the backward pass. Gradients arrive as sums over ranks, cut in the same way.
    `w`, the adapter, is left whole: both θ and θ̂ wear it, and its gradient is summed by `add_gradients`.
    """
    if world() == 1:
        return
    mesh = dist.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=set(w))
    fully_shard(model, mesh=mesh, ignored_params=set(w), reshard_after_forward=not train)
    for module in (model, *model.model.layers):
        module.set_force_sum_reduction_for_comms(True)  # a sum over ranks, where FSDP2 by itself takes the mean
        module.set_gradient_divide_factor(1.0)
    model.run = MethodType(lambda self, function: function(self), model)  # see model.run
    register_fsdp_forward_method(model, "run")


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients become sums over ranks. Those of sharded parameters are already."""
    add(p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor))


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, whether they are sharded or not."""
    total = torch.nn.utils.get_total_norm(list(tensors))
    return total.full_tensor() if isinstance(total, DTensor) else total
