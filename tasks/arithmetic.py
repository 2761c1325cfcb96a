r"""The default built-in task, chain arithmetic.

A problem is a chain of one-digit operands with + - *, evaluated from left to right modulo 100. A demonstration
computes one step at a time and ends with the answer in the box that the grader reads:

    Q:7*7+9*4=        7*7=49;49+9=58;58*4=32;\boxed{32}

The base models of bench/base_models.py compute single steps, prefer to answer at once, and solve almost no chain of
five. So RL alone finds little reward, and imitation alone forgets some of their skills.
"""

import random

from tasks.task import BOX, EVAL_SEED, Demonstration, Drawn, Problem, Task, check_eval_problems, draw_distinct

MODULUS = 100
TRAIN_LENGTHS = range(3, 7)
EVAL_LENGTHS = range(3, 9)
PROMPTS = 4096
DEMONSTRATIONS = 256
EVAL_MAX = 200  # evaluation problems of each length; training excludes all of them


def chain(rng: random.Random, length: int, start: int | None = None) -> Drawn:
    """A random problem of `length` operands: (question, worked steps, answer). `start` fixes the first operand.

    >>> chain(random.Random(1), 3)
    ('2*1-1', '2*1=2;2-1=1;', '1')
    """
    value = rng.randrange(10) if start is None else start
    question = str(value)
    steps = ""
    for _ in range(length - 1):
        op = rng.choice("+-*")
        operand = rng.randrange(10)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[op] % MODULUS
        question += f"{op}{operand}"
        steps += f"{value}{op}{operand}={result};"
        value = result
    return question, steps, str(value)


def distinct_chains(rng: random.Random, lengths: range, count: int, taken: set[str]) -> list[Drawn]:
    """`count` chains, their lengths in turn, whose questions are not in `taken`; adds the questions to `taken`."""
    chains = draw_distinct(lambda i: chain(rng, lengths[i % len(lengths)]), count, taken.__contains__)
    taken |= {question for question, _, _ in chains}
    return chains


def evaluation(per_length: int, lengths: range = EVAL_LENGTHS) -> list[Problem]:
    """The first `per_length` evaluation problems of each length. Raises DataError for more than EVAL_MAX."""
    check_eval_problems(per_length, EVAL_MAX)
    problems = []
    for n in lengths:
        chains = distinct_chains(random.Random(EVAL_SEED + n), range(n, n + 1), per_length, set())
        problems += [Problem(question, answer, f"n={n}") for question, _, answer in chains]
    return problems


def worked_demonstrations(drawn: list[Drawn]) -> list[Demonstration]:
    return [Demonstration(question, f"{steps}{BOX}{answer}}}", answer) for question, steps, answer in drawn]


def asked_problems(drawn: list[Drawn]) -> list[Problem]:
    return [Problem(question, answer, f"n={steps.count(';') + 1}") for question, steps, answer in drawn]


def task(seed: int, eval_per_length: int) -> Task:
    """Problems and demonstrations, a function of the seed, and evaluation problems; no question occurs twice."""
    rng = random.Random(seed)
    taken = {p.question for p in evaluation(EVAL_MAX)}
    demonstrations = worked_demonstrations(distinct_chains(rng, TRAIN_LENGTHS, DEMONSTRATIONS, taken))
    problems = asked_problems(distinct_chains(rng, TRAIN_LENGTHS, PROMPTS, taken))
    return Task(problems, demonstrations, evaluation(eval_per_length), instruction="")
