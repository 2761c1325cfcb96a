"""Samples in progress: their tokens, and the slots of the cache that they share.

A slot holds the keys and values of one sequence of tokens. Samples of a group share a slot while their tokens are
equal; one that draws another token gets a copy. The first slots are always those in use.

Shapes: P prompts, G samples each, N = P·G; S rows and slots at most, a row for each sample in progress;
K = tokens of a sample at most.
"""

import numpy as np
import torch
from torch import Tensor


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for one sample, a function of its key."""
    return np.random.default_rng(key).random(count)


class Samples:
    """N samples, and a row for each one in progress.

    Rows of one slot have the same tokens so far; rows are sorted by slot. Unused rows point to a dummy sample N. A
    sample that has ended is decoded on until it is retired: its extra tokens are ignored, and column K takes those
    beyond the limit.
    """

    def __init__(self, keys: list[tuple[int, ...]], group_size: int, size: int, limit: int, device: torch.device):
        """keys: P, sample i of prompt p draws from (*keys[p], i); size: S; limit: K."""
        N = len(keys) * group_size
        u = np.zeros((N + 1, limit + 1))
        for p, key in enumerate(keys):
            for i in range(group_size):
                u[p * group_size + i, :limit] = uniforms((*key, i), limit)
        self.group_size = group_size
        self.limit = limit
        self.u = torch.from_numpy(u).to(device)  # [N+1, K+1] fp64
        self.ids = torch.zeros(N + 1, limit + 1, dtype=torch.long, device=device)
        self.logps = torch.zeros(N + 1, limit + 1, device=device)
        self.logp_sum = torch.zeros((), device=device)  # of all tokens: not finite if one is not
        self.length = torch.zeros(N + 1, dtype=torch.long, device=device)  # of the samples that have ended

        # What is known of a row, [S] each; here the values of unused rows
        self.sample = torch.full((size,), N, device=device)
        self.last_token = torch.zeros(size, dtype=torch.long, device=device)  # the next input
        self.num_generated = torch.full((size,), limit, device=device)
        self.position = torch.zeros(size, dtype=torch.long, device=device)  # of the last token
        self.active = torch.zeros(size, dtype=torch.long, device=device)  # 1 until the sample ends
        self.slot = torch.arange(size, device=device)

        self.first_row = torch.arange(size, device=device)  # [S] of a slot
        self.rows = 0  # in use
        self.slots = 0  # in use

    def admit(self, prompts: list[int], lengths: list[int]) -> slice:
        """Adds the samples of some prompts, each prompt's in one new slot; returns their rows."""
        G = self.group_size
        device = self.slot.device
        rows = slice(self.rows, self.rows + len(prompts) * G)
        slots = torch.arange(self.slots, self.slots + len(prompts), device=device)
        first_sample = torch.tensor(prompts, device=device) * G
        self.sample[rows] = (first_sample[:, None] + torch.arange(G, device=device)).flatten()
        self.last_token[rows] = 0
        self.num_generated[rows] = 0
        self.position[rows] = torch.tensor(lengths, device=device).repeat_interleave(G) - 1
        self.active[rows] = 1
        self.slot[rows] = slots.repeat_interleave(G)
        self.first_row[slots] = torch.arange(rows.start, rows.stop, G, device=device)
        self.rows = rows.stop
        self.slots += len(prompts)
        return rows

    def append(self, rows: slice, token: Tensor, logp: Tensor, is_stop: Tensor) -> None:
        """Adds a token to each of some rows.  token, logp [rows]; is_stop [V]"""
        sample = self.sample[rows]
        num_generated = self.num_generated[rows]  # a view, as the next two: changed in place
        position = self.position[rows]
        active = self.active[rows]
        self.ids[sample, num_generated] = token
        self.logps[sample, num_generated] = logp
        self.logp_sum += logp.sum()
        self.last_token[rows] = token
        num_generated += active
        position += active
        active *= ~(is_stop[token] | (num_generated >= self.limit))

    def some_ended(self) -> bool:
        """Whether a row has ended since `retire`; notes the lengths. The host waits for the device."""
        in_use = slice(self.rows)
        ended = bool((self.active[in_use] == 0).any())
        if ended:
            self.length[self.sample[in_use]] = self.num_generated[in_use]
        return ended

    def retire(self, kv: Tensor, share: bool) -> None:
        """Drops the rows whose samples have ended, and gives the others slots.

        Rows of one slot keep sharing it if their last tokens are equal, too; without `share` none do.
        kv [layers, 2, S, L, h_kv, d] keys and values, which are copied where a slot gets several branches.
        """
        going = self.active[: self.rows].nonzero()[:, 0]  # rows
        branches, count = branch(self.slot[going], self.last_token[going], share)
        if (len(going), count) == (self.rows, self.slots):  # nothing ended, and no slot has two branches
            return
        length = int(self.position[going].max()) + 1 if len(going) else 0
        order, slot = place_branches(self.slot[going], branches, count, kv, length)

        kept = slice(len(going))
        dropped = slice(len(going), self.rows)
        dummy = len(self.u) - 1
        unused = (self.sample, dummy), (self.last_token, 0), (self.num_generated, self.limit), (self.position, 0)
        for of_row, value in (*unused, (self.active, 0)):
            of_row[kept] = of_row[going[order]]
            of_row[dropped] = value
        self.slot[kept] = slot
        self.first_row[:count] = torch.searchsorted(slot, torch.arange(count, device=slot.device))
        self.rows = len(going)
        self.slots = count


def branch(slot: Tensor, token: Tensor, share: bool) -> tuple[Tensor, int]:
    """(number of the branch of each row [n], count of branches): rows of one slot with equal last tokens are a branch.

    slot, token [n]. Branches are in the order of slots. Without `share` every row is a branch of its own.
    """
    if not share:
        return torch.arange(len(slot), device=slot.device), len(slot)
    pairs = slot << 32 | token  # one number for both
    branches = torch.unique(pairs, return_inverse=True)[1]
    return branches, int(branches.max()) + 1 if len(branches) else 0


def place_branches(slot: Tensor, branch_of_row: Tensor, count: int, kv: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Gives every branch a slot below `count`, copying keys and values where it changes.

    slot [n] of the rows until now; kv as in `retire`, of which `length` positions are in use.
    Returns (order [n] that sorts the rows by their new slots, new slots in this order [n]).
    """
    source = slot.new_empty(count).index_copy_(0, branch_of_row, slot)  # [count] the slot that a branch comes from

    # The first branch of a slot keeps it, if it lies below `count`. The others take the free slots.
    stays = source < count
    stays[1:] &= source[1:] != source[:-1]
    free = torch.ones_like(stays)
    free[source[stays]] = False
    target = source.clone()
    target[~stays] = free.nonzero()[:, 0]

    if not stays.all():
        old = source[~stays]
        new = target[~stays]
        for layer in kv:  # one by one, since torch makes a copy in between
            layer[:, new, :length] = layer[:, old, :length]
    new_slot, order = target[branch_of_row].sort(stable=True)
    return order, new_slot
