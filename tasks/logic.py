r"""A built-in task of another kind, knights and knaves, with demonstrations for all of its prompts.

Each of 2 to 5 people is a knight (digit 1), whose statements are true, or a knave (0), whose statements are false.
Everybody makes one statement; exactly one assignment fits all of them. A demonstration tries the assignments from 11…1
to 00…0: it checks statement after statement (speaker, digits of the people in it, + if true and - if false) up to the
first that does not fit its speaker. It boxes the assignment that fits:

    Q: A: B knave. B: A same B.?        A1B1AB1-A1B0AB0+BA1B0-\boxed{10}

The base model of bench/base_models.py checks statements, enumerates for two people, and prefers to answer at once.
"""

import random
import re
from dataclasses import replace
from functools import cache
from itertools import product

from tasks.task import BOX, EVAL_SEED, Demonstration, Drawn, Problem, Task, check_eval_problems, draw_distinct, marks

PEOPLE = "ABCDE"
KINDS = ("knave", "knight")
SIZES = (3, 4, 5)  # of training and evaluation
PROMPTS = 128  # each with its demonstration
EVAL_MAX = 300  # evaluation problems of each size; training excludes all of them
LONGEST = 72  # tokens of the worked steps; problems with more are left out
WORD = "[A-E][01]|[A-E]| ?[A-Za-z]+|."  # a token of the base model


def statement(rng: random.Random, speaker: int, size: int) -> str:
    """A random statement about one person, not the speaker, or about two."""
    people = PEOPLE[:size]
    form = rng.randrange(4)
    if form < 2:
        others = people.replace(PEOPLE[speaker], "")
        return f"{rng.choice(others)} {KINDS[form]}"
    p, q = rng.sample(people, 2)
    relation = "same" if form == 2 else "unlike"
    return f"{p} {relation} {q}"


@cache
def holds(statement: str, assignment: str) -> bool:
    """Whether a statement is true under an assignment.

    >>> holds("C knight", "110"), holds("A same B", "110")
    (False, True)
    """
    digit_of = dict(zip(PEOPLE, assignment, strict=False))
    person, said, *other = statement.split()
    if not other:
        return digit_of[person] == str(KINDS.index(said))
    return (digit_of[person] == digit_of[other[0]]) == (said == "same")


def check(statements: list[str], assignment: str) -> str:
    """An assignment and its statements, up to the first whose truth does not fit the speaker's digit.

    >>> check(["B knave", "A same C", "B knight"], "101")
    'A1B0C1AB0+BA1C1+'
    """
    digit_of = dict(zip(PEOPLE, assignment, strict=False))
    steps = "".join(person + digit for person, digit in digit_of.items())
    for (speaker, digit), text in zip(digit_of.items(), statements, strict=True):
        steps += speaker + "".join(word + digit_of[word] for word in text.split() if word in digit_of)
        true = holds(text, assignment)
        steps += "+" if true else "-"
        if true != (digit == "1"):
            break
    return steps


def assignments(size: int) -> list[str]:
    """All assignments, from 11…1 to 00…0."""
    return ["".join(digits) for digits in product("10", repeat=size)]


def ask(statements: list[str]) -> str:
    return " ".join(f"{person}: {text}." for person, text in zip(PEOPLE, statements, strict=False))


def puzzle(rng: random.Random, size: int) -> Drawn:
    """A random problem with one solution: (question, worked steps, answer)."""
    while True:
        statements = [statement(rng, speaker, size) for speaker in range(size)]
        solutions = [digits for digits in assignments(size) if fits(statements, digits)]
        if len(solutions) == 1:
            tried = [digits for digits in assignments(size) if digits >= solutions[0]]
            steps = "".join(check(statements, digits) for digits in tried)
            if len(re.findall(WORD, steps)) <= LONGEST:
                return ask(statements), steps, solutions[0]


def fits(statements: list[str], assignment: str) -> bool:
    """Whether knights alone make true statements."""
    return all(holds(text, assignment) == (digit == "1") for text, digit in zip(statements, assignment, strict=True))


def distinct_puzzles(rng: random.Random, sizes: tuple[int, ...], count: int, held_out: frozenset) -> list[Drawn]:
    """`count` different problems, their sizes in turn, that share no n-gram of task.py with `held_out`."""

    def draw(i: int) -> Drawn:
        return puzzle(rng, sizes[i % len(sizes)])

    def taken(question: str) -> bool:
        return not held_out.isdisjoint(marks(question))

    return draw_distinct(draw, count, taken)


@cache
def evaluation_puzzles(size: int) -> list[Drawn]:
    return distinct_puzzles(random.Random(EVAL_SEED + size), (size,), EVAL_MAX, frozenset())


def evaluation(per_size: int) -> list[Problem]:
    """The first `per_size` evaluation problems of each size. Raises DataError for more than EVAL_MAX."""
    check_eval_problems(per_size, EVAL_MAX)
    return [Problem(q, answer, f"n={n}") for n in SIZES for q, _, answer in evaluation_puzzles(n)[:per_size]]


@cache
def held_out() -> frozenset[str]:
    """The n-grams of all evaluation problems."""
    return frozenset(g for p in evaluation(EVAL_MAX) for g in marks(p.question))


def task(seed: int, eval_per_size: int, demonstrations: int = PROMPTS, useless: float = 0.5) -> Task:
    """PROMPTS problems or more, demonstrations for the first of them, and evaluation problems: a function of the seed.

    useless: the fraction of demonstrations whose response is a random wrong answer without steps. Their gold stays.
    """
    rng = random.Random(seed)
    puzzles = distinct_puzzles(rng, SIZES, max(PROMPTS, demonstrations), held_out())
    worked = [Demonstration(q, f"{steps}{BOX}{answer}}}", answer) for q, steps, answer in puzzles[:demonstrations]]
    for i in rng.sample(range(len(worked)), round(useless * len(worked))):
        answer = worked[i].answer
        wrong = [digits for digits in assignments(len(answer)) if digits != answer]
        worked[i] = replace(worked[i], response=f"{BOX}{rng.choice(wrong)}}}")
    problems = [Problem(q, answer, f"n={len(answer)}") for q, _, answer in puzzles]
    return Task(problems, worked, evaluation(eval_per_size), instruction="")
