"""Several ranks that compute the result of one: started by torchrun, one process per GPU (or, with gloo, per CPU).

All ranks draw the same prompts and demonstrations, each computes its share, and collectives combine the results, so all
take the same decisions. Every rank must enter every collective, whatever its data.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from infra.files import printable
from infra.model import pick_device
from ops.packed import Row, pads, response_offsets
from settings import SettingError, Settings


def start(timeout: timedelta = timedelta(hours=1)) -> bool:
    """Joins the ranks that torchrun started. Returns whether torchrun restarted them after a failure.

    Raises SettingError if the ranks do not meet.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        return restarted
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        count = torch.cuda.device_count()
        if local >= count:
            fail(f"there is no GPU {local} on this machine, which has {count}: lower --nproc-per-node")
        torch.cuda.set_device(local)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    except (dist.DistError, ValueError) as error:  # ValueError: a variable of torchrun is missing
        reason = str(error).splitlines()[0]
        raise SettingError(f"the ranks that torchrun started do not meet: {reason}") from error
    attempt = agree_on_attempt(store, rank, world)
    store = dist.PrefixStore(f"attempt {attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    return attempt != "1" or any(all_gather([restarted]))


def agree_on_attempt(store: dist.Store, rank: int, world: int) -> str:
    """The number of this attempt to run, from 1: rank 0 answers a fresh token of every other rank with it."""
    # torchrun's store survives restarts, and the agent of each machine counts its own failures only
    if rank > 0:
        token = uuid4().hex
        store.set(f"rank {rank}", token)
        attempt = store.get(token).decode()  # blocks until rank 0 answers
        store.set(f"rank {rank}", attempt)
        return attempt
    attempt = str(store.add("attempts", 1))
    for other in range(1, world):
        token = store.get(f"rank {other}").decode()
        while token != attempt:
            store.set(token, attempt)  # no rank reads the answer to a token of an earlier attempt
            time.sleep(0.02)
            token = store.get(f"rank {other}").decode()
    return attempt


def end() -> None:
    """Waits for all ranks: an early exit can abort the others' pending collectives."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def fail(text: str) -> NoReturn:
    """Ends the process with a message in one line, which torchrun repeats below its own report."""
    text = printable(text, kept="")
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": text, "extraInfo": {"timestamp": int(time.time())}}
        Path(path).write_text(json.dumps({"message": message}))
    sys.exit(text)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def rank0_first() -> Iterator[None]:
    """A block that makes or downloads files: the other ranks run it after rank 0."""
    if rank() > 0:
        dist.barrier()
    yield
    if world_size() > 1 and rank() == 0:
        dist.barrier()


def all_gather(values: list) -> list:
    """The values of all ranks in one list, in the order of ranks."""
    if world_size() == 1:
        return values
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def broadcast(value):
    """Rank 0's value, on every rank."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor in place by its sum over ranks; all ranks get the same bits."""
    if world_size() > 1:
        works = [dist.all_reduce(t, async_op=True) for t in tensors]  # all at once, then wait
        for work in works:
            work.wait()


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums gradients over ranks. FSDP2 has summed those of sharded parameters already."""
    all_reduce(p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor))


def take_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Moves gradients out of .grad and sums them over ranks."""
    parameters = list(parameters)
    gradients = [p.grad for p in parameters]
    all_reduce(gradients)
    for p in parameters:
        p.grad = None
    return gradients


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, sharded or not."""
    norm = torch.nn.utils.get_total_norm(list(tensors))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def batches(rows: list[Row], s: Settings, chosen: list[int] | None = None) -> Iterator[tuple[list[Row], Tensor]]:
    """This rank's micro-batches of the rows `chosen`, by default of all.

    Yields (rows, t): t [t] are the places of their response tokens in [0, T), T response tokens of all rows.
    """
    if chosen is None:
        chosen = list(range(len(rows)))
    if not chosen:
        return
    offsets = response_offsets(rows)  # [N+1]
    rows = [rows[i] for i in chosen]
    sizes = [len(prompt) + len(response) for prompt, response in rows]
    share = shares(sizes, world_size())[rank()]
    device = pick_device()
    ranges = micro_batches(rows, share, s.tokens_per_micro_batch, pads(device, getattr(torch, s.dtype)))
    # every rank gets the same number, the last ones of some empty: the passes of a sharded model are collectives
    most = max(all_gather([len(ranges)]))
    while len(ranges) < most:
        ranges.append(range(share.stop, share.stop))
    for r in ranges:
        tokens = [torch.arange(offsets[i], offsets[i + 1]) for i in chosen[r.start : r.stop]]
        t = torch.cat(tokens) if tokens else torch.arange(0)
        yield rows[r.start : r.stop], t.to(device)


def shares(sizes: list[int], parts: int) -> list[range]:
    """Consecutive ranges of items, one per part, of about equal total size; some may be empty."""
    total = sum(sizes)
    owners = []  # of each item: the part in which the item's middle lies
    end = 0
    for size in sizes:
        end += size
        twice_the_middle = 2 * end - size
        owners.append(min(twice_the_middle * parts // (2 * total), parts - 1))
    ranges = []
    start = 0
    for part in range(parts):
        stop = start + owners.count(part)
        ranges.append(range(start, stop))
        start = stop
    return ranges


def micro_batches(rows: list[Row], share: range, tokens: int, padded: bool) -> list[range]:
    """Consecutive ranges of `share`: at most `tokens` tokens (rows times longest row if attention pads) or one row.

    A token that rows share counts in each of them.
    """
    ranges = []
    first = share.start
    longest = 0
    total = 0
    for i in share:
        prompt, response = rows[i]
        length = len(prompt) + len(response)
        longest = max(longest, length)
        total += length
        size = (i + 1 - first) * longest if padded else total
        if size > tokens and i > first:  # row i begins the next micro-batch
            ranges.append(range(first, i))
            first = i
            longest = length
            total = length
    if share:
        ranges.append(range(first, share.stop))
    return ranges


def shard(model: nn.Module, w: Iterable[nn.Parameter], train: bool = True) -> None:
    """Cuts the model's parameters, in place, into a slice per rank. w stays whole, since both θ and θ̂ use it."""
    if world_size() == 1:
        return
    mesh = dist.init_device_mesh(pick_device().type, (world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=set(w))
    fully_shard(model, mesh=mesh, ignored_params=set(w), reshard_after_forward=not train)
    for module in (model, *model.model.layers):
        module.set_force_sum_reduction_for_comms(True)  # FSDP2's default is the mean over ranks
        module.set_gradient_divide_factor(1.0)
    model.run_forward = MethodType(lambda self, function: function(self), model)  # see ops.packed.run_forward
    register_fsdp_forward_method(model, "run_forward")
