"""Variants of a built-in task and of the reward, for --task and --reward; bench/compare.py runs them."""

import zlib
from itertools import count

from rewards import is_correct
from tasks import arithmetic

calls = count()


def _task(s, **changes):
    return arithmetic.chains(s.seed, s.eval_problems, **changes)


def useless_0(s):
    return _task(s, useless=0.0)


def useless_20(s):
    return _task(s, useless=0.2)


def useless_40(s):
    return _task(s, useless=0.4)


def useless_60(s):
    return _task(s, useless=0.6)


def demonstrations_16(s):
    return _task(s, useless=0.0, demonstrations=16)


def demonstrations_64(s):
    return _task(s, useless=0.0, demonstrations=64)


def demonstrations_256(s):
    return _task(s, useless=0.0, demonstrations=256)


def demonstrations_1024(s):
    return _task(s, useless=0.0, demonstrations=1024)


def _noisy(response, problem, p: float) -> float:
    """The reward 1 or 0, flipped with probability p: each call draws anew, from a sequence that every run repeats."""
    draw = zlib.crc32(f"{next(calls)} {response}".encode()) / 2**32
    return float(is_correct(response, problem.answer).correct != (draw < p))


def noise_10(response, problem):
    return _noisy(response, problem, 0.1)


def noise_20(response, problem):
    return _noisy(response, problem, 0.2)
