r"""Countdown: join three numbers by + and - so that they give a target. Most puzzles have several right answers.

    Q:14;3;8:9=        \boxed{14+3-8}        \boxed{3-8+14} is right, too

A comparison with one gold answer cannot grade this, so the task brings a verifier. Questions and responses consist of
tokens of the built-in model arithmetic-laptop, which has seen neither such a question nor such an answer.

    python bridge.py --task examples/countdown.py:countdown --steps 600 --out runs/countdown
    python evaluate.py runs/countdown --ask "3;14;8:9"
"""

import random
import re
from collections.abc import Iterator
from itertools import permutations, product

from rewards import extract
from tasks.task import Demonstration, Problem, Task

QUESTION = re.compile("([0-9]{1,3}(?:;[0-9]{1,3})*):([0-9]{1,4})")


def solves(response: str, problem: Problem) -> bool:
    """Whether the box has an expression with each number of the question once that gives its target. Never raises."""
    question = QUESTION.fullmatch(problem.question)
    expression = extract(response) or ""
    # Text is compared: what is no number of the question, or a longer one, is never converted.
    if question is None or sorted(re.split("[+-]", expression)) != sorted(question[1].split(";")):
        return False
    return value(expression) == int(question[2])


def value(expression: str) -> int:
    """Of "14+3-8" 9: the sum of the numbers with their signs."""
    return sum(int(number) for number in re.findall("[+-]?[0-9]+", expression))


def expressions(numbers: list[str]) -> Iterator[str]:
    """All expressions that have each number once."""
    for first, *others in permutations(numbers):
        for signs in product("+-", repeat=len(others)):
            yield first + "".join(sign + number for sign, number in zip(signs, others, strict=True))


def countdown(s) -> Task:
    """1,800 problems, 512 demonstrations with one of the solutions that a search finds, 200 evaluation problems."""
    rng = random.Random(s.seed)
    puzzles = {}
    while len(puzzles) < 2512:
        numbers = [str(rng.randint(1, 20)) for _ in range(3)]
        target = value(rng.choice(list(expressions(numbers))))
        if target >= 0:
            solutions = [found for found in expressions(numbers) if value(found) == target]
            # The same numbers in another order would be the same puzzle.
            puzzles[*sorted(numbers), target] = Problem(f"{';'.join(numbers)}:{target}", rng.choice(solutions))
    problems = list(puzzles.values())
    worked = [Demonstration(p.question, f"\\boxed{{{p.answer}}}", p.answer) for p in problems[1800:2312]]
    return Task(problems[:1800], worked, problems[2312:], instruction="", verifier=solves)
