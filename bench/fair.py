"""Equal tuning: successive halving of random settings, the same number of trials for every row.

12 settings run on one seed, the best 4 of them on two more, the best 2 on three more: 26 trials. The settings are a
Latin hypercube: each range has 12 equal parts, and one trial in each. Trials are scored on evaluation problems that no
table uses (bench/variants.py:spare). A winner in the outer part of a range is at an edge: widen the range, run again.
"""

import json
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

STAGES = ((1000,), (1001, 1002), (1003, 1004, 1005))  # seeds that each stage adds
ALIVE = (12, 4, 2)  # settings of each stage
Flags = dict[str, str]  # of bridge.py
Score = Callable[[str, Flags, int], float]  # of a row's trial on a seed; raises KeyError if it has not run


class Range(NamedTuple):
    """Values of a setting, evenly spread over the logarithm, or else over the value itself."""

    low: float
    high: float
    log: bool = True
    whole: bool = False

    def at(self, share: float) -> str:
        """The value at a share from 0 to 1 of the range, to two digits.

        >>> Range(1e-4, 1e-2).at(0.5), Range(25, 400, whole=True).at(0.5), Range(0.2, 0.8, log=False).at(0.5)
        ('0.001', '100', '0.5')
        """
        value = self.low + (self.high - self.low) * share
        if self.log:
            value = self.low * (self.high / self.low) ** share
        return str(round(value)) if self.whole else f"{value:.2g}"

    def share(self, value: str) -> float:
        if self.log:
            return math.log(float(value) / self.low) / math.log(self.high / self.low)
        return (float(value) - self.low) / (self.high - self.low)


ALPHA = {"alpha": Range(5e-5, 3.2e-3)}
WITH_W = ALPHA | {"beta": Range(2e-4, 2e-2), "lam": Range(0.2, 0.9, log=False)}
COLD_START = ALPHA | {"sft-steps": Range(20, 320, whole=True)}


class Row(NamedTuple):
    """What is tuned: a method, its settings with their ranges, the kind of its runs (a name in compare.KINDS)."""

    method: str
    ranges: dict[str, Range]
    kind: str = "final"
    draws: str = ""  # the row whose random settings it tries; "" for its own
    against: str = "bridge"  # the row that its difference refers to

    @property
    def trial(self) -> str:
        """The kind of its trials, which are evaluated at the end only."""
        return "tuning" if self.kind == "final" else f"{self.kind} trial"


ROWS = {
    "bridge": Row("bridge", WITH_W),
    "mix_lora": Row("mix_lora", WITH_W, against="bridge, mix_lora's draws"),
    "bridge, mix_lora's draws": Row("bridge", WITH_W, draws="mix_lora"),
    "mix_lora, bridge's draws": Row("mix_lora", WITH_W, draws="bridge"),
    "mix": Row("mix", ALPHA | {"mu": Range(0.1, 4)}),
    "sft_rl": Row("sft_rl", COLD_START),
    "rl": Row("rl", {"alpha": Range(1e-5, 8e-4)}),  # from 5e-5 the winner on chains was at that edge
    "chord": Row("chord", ALPHA | {"chord-peak": Range(0.1, 1, log=False)}),
    "split": Row("mix_lora", ALPHA | {"beta": Range(2e-4, 2e-2)}, "split"),
    "averaged": Row("alternating", ALPHA, "averaged"),
    "mix_lora, accepted": Row("mix_lora", WITH_W, "accepted", against="mix_lora"),
    "sft_rl, accepted": Row("sft_rl", COLD_START, "accepted", against="sft_rl"),
}


def candidates(row: str) -> list[Flags]:
    """The 12 settings of a row: each part of each range occurs once."""
    name = ROWS[row].draws or row
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    count = ALIVE[0]
    columns = {}
    for name, values in ROWS[row].ranges.items():
        shares = (rng.permutation(count) + rng.random(count)) / count
        columns[name] = [values.at(share) for share in shares]
    return [dict(zip(columns, point, strict=True)) for point in zip(*columns.values(), strict=True)]


def alive(row: str, stage: int, score: Score) -> list[Flags]:
    """The settings that a stage runs, best first; those of the last stage after all trials for stage = 3."""
    flags = candidates(row)
    seeds: tuple[int, ...] = ()
    for finished in range(stage):
        seeds += STAGES[finished]
        mean = {json.dumps(f): sum(score(row, f, seed) for seed in seeds) / len(seeds) for f in flags}
        flags = sorted(flags, key=lambda f: -mean[json.dumps(f)])
        if finished + 1 < len(ALIVE):
            flags = flags[: ALIVE[finished + 1]]
    return flags


def winner(row: str, score: Score) -> Flags:
    """The best setting of a row over the six seeds. Raises KeyError before all trials have run."""
    return alive(row, len(STAGES), score)[0]


def at_edge(row: str, flags: Flags) -> list[str]:
    """The settings that lie in the first or last part of their range."""
    part = 1 / ALIVE[0]
    ranges = ROWS[row].ranges
    return [name for name, value in flags.items() if not part < ranges[name].share(value) < 1 - part]
