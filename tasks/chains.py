"""The harder built-in task of chain arithmetic: longer chains, and half of the demonstrations are useless."""

import random
from dataclasses import replace

from tasks import arithmetic
from tasks.task import BOX, Problem, Task

TRAIN_LENGTHS = range(3, 8)
EVAL_LENGTHS = range(3, 10)
PROMPTS = 1024


def evaluation(per_length: int) -> list[Problem]:
    """The first `per_length` evaluation problems of each length. Raises DataError for more than EVAL_MAX."""
    return arithmetic.evaluation(per_length, EVAL_LENGTHS)


def wrong_at_once(answer: str, rng: random.Random) -> str:
    """A response without steps, with any other number than the answer."""
    wrong = (int(answer) + rng.randrange(1, arithmetic.MODULUS)) % arithmetic.MODULUS
    return f"{BOX}{wrong}}}"


def task(seed: int, eval_per_length: int, demonstrations: int = 256, useless: float = 0.5) -> Task:
    """Problems and demonstrations, a function of the seed, and evaluation problems.

    A fraction `useless` of the demonstrations answers at once, and wrongly. Their questions are the first ones of D_RL,
    so that methods can put them beside their own samples. The right answer stays their gold: a verifier can tell which
    ones are useless, imitation cannot.
    """
    rng = random.Random(seed)
    taken = {p.question for p in evaluation(arithmetic.EVAL_MAX)}
    drawn = arithmetic.distinct_chains(rng, TRAIN_LENGTHS, max(PROMPTS, demonstrations), taken)
    worked = arithmetic.worked_demonstrations(drawn[:demonstrations])
    for i in sorted(rng.sample(range(demonstrations), round(useless * demonstrations))):
        worked[i] = replace(worked[i], response=wrong_at_once(worked[i].answer, rng))
    return Task(arithmetic.asked_problems(drawn), worked, evaluation(eval_per_length), instruction="")
