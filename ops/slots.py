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

    def __init__(
        self,
        keys: list[tuple[int, ...]],  # P; sample i of prompt p draws from (*keys[p], i)
        prompt_lengths: list[int],  # P
        group_size: int,  # G
        size: int,  # S
        limit: int,  # K
        device: torch.device,
    ):
        N = len(keys) * group_size
        u = np.zeros((N + 1, limit + 1))
        for p, key in enumerate(keys):
            for i in range(group_size):
                u[p * group_size + i, :limit] = uniforms((*key, i), limit)
        self.group_size = group_size
        self.limit = limit

        # Of every sample; the dummy has ended with one token
        self.u = torch.from_numpy(u).to(device)  # [N+1, K+1] fp64
        self.ids = torch.zeros(N + 1, limit + 1, dtype=torch.long, device=device)
        self.logps = torch.zeros(N + 1, limit + 1, device=device)
        self.prompt_length = torch.zeros(N + 1, dtype=torch.long, device=device)
        self.prompt_length[:N] = torch.tensor(prompt_lengths).repeat_interleave(group_size)
        self.length = torch.zeros(N + 1, dtype=torch.long, device=device)  # tokens until now, or until the end
        self.length[N] = 1
        self.active = torch.ones(N + 1, dtype=torch.bool, device=device)  # not ended
        self.active[N] = False

        self.sample = torch.full((size,), N, device=device)  # [S] of a row
        self.slot = torch.arange(size, device=device)  # [S] of a row
        self.first_row = torch.arange(size, device=device)  # [S] of a slot
        self.rows = 0  # in use
        self.slots = 0  # in use

    def admit(self, prompts: list[int]) -> tuple[slice, Tensor]:
        """Adds the samples of some prompts, each prompt's in one new slot; returns their rows and the slots."""
        G = self.group_size
        device = self.slot.device
        rows = slice(self.rows, self.rows + len(prompts) * G)
        slots = torch.arange(self.slots, self.slots + len(prompts), device=device)
        first_sample = torch.tensor(prompts, device=device) * G
        self.sample[rows] = (first_sample[:, None] + torch.arange(G, device=device)).flatten()
        self.slot[rows] = slots.repeat_interleave(G)
        self.first_row[slots] = torch.arange(rows.start, rows.stop, G, device=device)
        self.rows = rows.stop
        self.slots += len(prompts)
        return rows, slots

    def last_tokens(self, slots: int) -> tuple[Tensor, Tensor]:
        """(last token, its position) of the samples in each of the first slots, [slots] each."""
        sample = self.sample[self.first_row[:slots]]
        last = self.length[sample] - 1
        return self.ids[sample, last], self.prompt_length[sample] + last

    def append(self, rows: slice, token: Tensor, logp: Tensor, is_stop: Tensor) -> None:
        """Adds a token to each of some rows.  token, logp [rows]; is_stop [V]"""
        sample = self.sample[rows]
        length = self.length[sample]
        active = self.active[sample]
        self.ids[sample, length] = token
        self.logps[sample, length] = logp
        length += active
        self.length[sample] = length
        self.active[sample] = active & ~(is_stop[token] | (length >= self.limit))

    def retire(self, kv: Tensor, share: bool) -> None:
        """Drops the rows whose samples have ended, and gives the others slots.

        Rows of one slot keep sharing it if their last tokens are equal, too; without `share` none do.
        kv [layers, 2, S, L, h_kv, d] keys and values, which are copied where a slot gets several branches.
        """
        in_use = self.sample[: self.rows]
        going = self.active[in_use].nonzero()[:, 0]  # rows; the host waits for the device
        if len(going) == self.rows == self.slots:
            return
        sample = in_use[going]
        slot = self.slot[going]

        # A branch is the rows of one slot that stay together. Branches are in the order of slots.
        differs_by = self.ids[sample, self.length[sample] - 1] if share else going
        pairs, branch = torch.unique(slot << 32 | differs_by, return_inverse=True)  # one number for both
        count = len(pairs)
        if len(going) == self.rows and count == self.slots:  # nothing ended, and no slot has two branches
            return
        length = int((self.prompt_length + self.length)[in_use].max())
        order, slot = place_branches(slot, branch, count, kv, length)

        self.sample[: len(going)] = sample[order]
        self.sample[len(going) : self.rows] = len(self.u) - 1
        self.slot[: len(going)] = slot
        self.first_row[:count] = torch.searchsorted(slot, torch.arange(count, device=slot.device))
        self.rows = len(going)
        self.slots = count


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
