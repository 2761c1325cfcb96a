"""Variants of a built-in task and of the reward, for --task and --reward; bench/compare.py runs them."""

import random
import zlib
from dataclasses import replace
from functools import partial
from itertools import count

from rewards import is_correct
from tasks import chains, logic

calls = count()


def task(s, **changes):
    make = logic.task if s.model == "logic-laptop" else chains.task
    return make(s.seed, s.eval_problems, **changes)


useless_0, useless_20, useless_60 = (partial(task, useless=share) for share in (0.0, 0.2, 0.6))  # of 256
demonstrations_16, demonstrations_1024 = (partial(task, useless=0.0, demonstrations=n) for n in (16, 1024))


def left_out(s, useless: float):
    """chains, with useless demonstrations that leave out one of their steps; their answer is right."""
    made = chains.task(s.seed, s.eval_problems, useless=0.0)
    rng = random.Random(s.seed)
    for i in rng.sample(range(len(made.demonstrations)), round(useless * len(made.demonstrations))):
        *steps, answer = made.demonstrations[i].response.split(";")
        del steps[rng.randrange(len(steps))]
        response = ";".join([*steps, answer])
        made.demonstrations[i] = replace(made.demonstrations[i], response=response, extra={"useless": True})
    return made


useless_75 = partial(task, useless=0.75)
left_out_50, left_out_75 = (partial(left_out, useless=share) for share in (0.5, 0.75))


def noisy(response, problem, p: float) -> float:
    """The reward 1 or 0, flipped with probability p: each call draws anew, from a sequence that every run repeats."""
    draw = zlib.crc32(f"{next(calls)} {response}".encode()) / 2**32
    return float(is_correct(response, problem.answer).correct != (draw < p))


noise_10, noise_20 = partial(noisy, p=0.1), partial(noisy, p=0.2)
