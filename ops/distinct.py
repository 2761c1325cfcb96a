"""Which rows of a batch a pass must run: equal rows run once, rows without a gradient run without one or not at all.

A row is a pair (prompt, response) of token ids; N rows, T response tokens of all of them end to end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.packed import Row, response_offsets


@dataclass
class RowsToRun:
    """What a pass over rollouts runs, and where the results of every token are found."""

    trained: list[int]  # rows with a gradient
    scored: list[int]  # rows without one whose log-probs are wanted
    weight: Tensor  # [T] of a token in the loss; a row that runs has the weight of the rows equal to it, too
    source: Tensor  # [T] the token whose results are those of token t


def rows_to_run(
    rows: list[Row],
    advantage: Tensor,  # [T]
    weight: Tensor,  # [T]
    is_demonstration: Tensor,  # [T] equal for all tokens of a row
    reward: Tensor,  # [P, G], P·G = N
    has_kl: bool,
    score_rewarded: bool,
) -> RowsToRun:
    """What a pass over these rows must run.

    A row has a gradient if a token of it has a weight and an advantage or a KL term (`has_kl`). With `score_rewarded`,
    rows with a reward and no gradient are scored.
    """
    offsets = response_offsets(rows)  # [N+1]
    numbers = torch.stack([advantage, weight]).cpu()  # [2, T]
    has_gradient = numbers[1] != 0  # [T]
    if not has_kl:
        has_gradient &= numbers[0] != 0
    kinds = is_demonstration.cpu()[offsets[:-1]].tolist()
    rewards = reward.flatten().tolist()

    source = torch.arange(offsets[-1])
    first_with: dict[tuple, int] = {}  # content of a row -> the first row that has it
    trained = []
    scored = []
    for i, (prompt, response) in enumerate(rows):
        t = slice(offsets[i], offsets[i + 1])
        content = (*prompt, -1, *response, -1, numbers[:, t].numpy().tobytes(), rewards[i], kinds[i])
        first = first_with.setdefault(content, i)
        if first != i:
            source[t] = torch.arange(offsets[first], offsets[first + 1])
        elif has_gradient[t].any():
            trained.append(i)
        elif score_rewarded and rewards[i]:
            scored.append(i)

    # FSDP's ranks must all run a backward pass: if no row has a gradient, row 0 is run anyway.
    if not trained:
        trained = [0]
        scored = [i for i in scored if i > 0]

    source = source.to(weight.device)
    merged_weight = torch.zeros_like(weight).index_add(0, source, weight)
    return RowsToRun(trained, scored, merged_weight, source)
