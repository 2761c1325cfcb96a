"""Variants of a built-in task and of the reward, for --task and --reward; bench/compare.py runs them."""

import random
import zlib
from dataclasses import replace
from functools import partial
from itertools import count

from rewards import is_correct
from tasks import arithmetic, chains, logic

calls = count()


def task(s, **changes):
    make = logic.task if s.model == "logic-laptop" else chains.task
    return make(s.seed, s.eval_problems, **changes)


useless_0, useless_20, useless_60, useless_75 = (partial(task, useless=share) for share in (0.0, 0.2, 0.6, 0.75))
demonstrations_16, demonstrations_1024 = (partial(task, useless=0.0, demonstrations=n) for n in (16, 1024))


def spare(s):
    """The task with evaluation problems that no table uses: those after the first eval_problems of each group."""
    made = task(s)
    module = logic if s.model == "logic-laptop" else chains
    most = logic.EVAL_MAX if module is logic else arithmetic.EVAL_MAX
    made.evaluation = [p for p in module.evaluation(most) if p not in made.evaluation]
    return made


def without_a_step(response: str, rng: random.Random) -> str:
    """A worked chain that leaves out one of its steps; its answer is right."""
    *steps, answer = response.split(";")
    del steps[rng.randrange(len(steps))]
    return ";".join([*steps, answer])


def left_out(s, useless: float):
    """chains, whose useless demonstrations leave out a step."""
    made = chains.task(s.seed, s.eval_problems, useless=0.0)
    rng = random.Random(s.seed)
    for i in rng.sample(range(len(made.demonstrations)), round(useless * len(made.demonstrations))):
        d = made.demonstrations[i]
        made.demonstrations[i] = replace(d, response=without_a_step(d.response, rng), extra={"useless": True})
    return made


def sources(s):
    """chains, with demonstrations of four annotators: two are right, one answers at once and wrongly, one skips steps.

    RL has chains of 3 to 5 operands alone, so on those of 6 and 7 it cannot repair what SFT spoils.
    """
    made = chains.task(s.seed, s.eval_problems, useless=0.0)
    rng = random.Random(s.seed)
    for i, d in enumerate(made.demonstrations):
        annotator = i // len(chains.TRAIN_LENGTHS) % 4  # each has all lengths
        response = d.response
        if annotator == 2:
            response = chains.wrong_at_once(d.answer, rng)
        elif annotator == 3:
            response = without_a_step(response, rng)
        useless = {"useless": annotator > 1}
        made.demonstrations[i] = replace(d, response=response, extra=useless, source=str(annotator))
    made.problems = [p for p in made.problems if p.group in ("n=3", "n=4", "n=5")]
    return made


left_out_50, left_out_75 = (partial(left_out, useless=share) for share in (0.5, 0.75))


def noisy(response, problem, p: float) -> float:
    """The reward 1 or 0, flipped with probability p: each call draws anew, from a sequence that every run repeats."""
    draw = zlib.crc32(f"{next(calls)} {response}".encode()) / 2**32
    return float(is_correct(response, problem.answer).correct != (draw < p))


noise_10, noise_20 = partial(noisy, p=0.1), partial(noisy, p=0.2)
