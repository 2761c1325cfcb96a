r"""The second built-in task, knights and knaves, with demonstrations for all of its prompts.

Each of 2 to 4 people is a knight, whose statements are true, or a knave, whose statements are false. Everybody makes
one statement, and exactly one assignment fits all of them. A digit stands for each person: 1 a knight, 0 a knave. A
demonstration tries the assignments from 11…1 to 00…0. It marks statement after statement with + for true and - for
false, turns to the next assignment at the first that its speaker cannot have made, and boxes the one that fits:

    A: B same C. B: A knight or C knave. C: B unlike A.        EXAMPLE

The base model checks statements, enumerates for two people, and prefers to answer at once. Its weights lie in
tasks/base; tasks/builtin.py trains it.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

from transformers import PreTrainedTokenizerFast

from infra.files import DataError
from ops.packed import Row
from tasks.arithmetic import BOX, word_level
from tasks.prompts import encode_prompt
from tasks.task import Demonstration, Problem, Task, ngrams

PEOPLE, KINDS = "ABCD", ("knave", "knight")
TRAIN_SIZES, EVAL_SIZES = (3, 4), (2, 3, 4)
PROMPTS = 256  # each with its demonstration
EVAL_MAX = {2: 100, 3: 300, 4: 300}  # evaluation problems by size; there are only 240 different ones of two people
EVAL_SEED = 2509_06948  # the evaluation problems are the same for every run
CHECKS = 6  # assignments in a row that a document of the base model checks
LONGEST = 89  # digits and marks of a demonstration; problems with longer ones are left out
CHAT_TEMPLATE = "{% for m in messages %}{{ 'Q: ' + m.content + '?' if m.role == 'user' else m.content }}{% endfor %}"


def statement(rng: random.Random, speaker: int, size: int) -> str:
    """A random statement about one person, not the speaker, or about two."""
    people, form = PEOPLE[:size], rng.randrange(5)
    if form == 0:
        return f"{rng.choice(people.replace(PEOPLE[speaker], ''))} {rng.choice(KINDS)}"
    p, q = rng.sample(people, 2)
    if form < 3:
        return f"{p} {('same', 'unlike')[form - 1]} {q}"
    return f"{p} {rng.choice(KINDS)} {('and', 'or')[form - 3]} {q} {rng.choice(KINDS)}"


def holds(statement: str, assignment: str) -> bool:
    """Whether a statement is true under an assignment.

    >>> holds("A knave or C knight", "110"), holds("A same B", "110")
    (False, True)
    """

    def is_knight(person: str) -> bool:
        return assignment[PEOPLE.index(person)] == "1"

    match statement.split():
        case p, ("same" | "unlike") as word, q:
            return (is_knight(p) == is_knight(q)) == (word == "same")
        case p, kind:
            return is_knight(p) == (kind == "knight")
        case p, kind, word, q, other:
            both = is_knight(p) == (kind == "knight"), is_knight(q) == (other == "knight")
            return all(both) if word == "and" else any(both)


def check(statements: list[str], assignment: str) -> str:
    """Speaker and + for a true or - for a false statement, up to the first that does not fit the speaker's digit.

    >>> check(["B knave", "A same C", "B knight"], "101")
    'A+B+'
    """
    marks = ""
    for speaker, text, digit in zip(PEOPLE, statements, assignment, strict=False):
        marks += speaker + ("+" if holds(text, assignment) else "-")
        if marks[-1] != "-+"[int(digit)]:
            break
    return marks


def assignments(size: int) -> list[str]:
    """All assignments, from 11…1 to 00…0."""
    return ["".join(digits) for digits in product("10", repeat=size)]


def ask(statements: list[str]) -> str:
    return " ".join(f"{person}: {text}." for person, text in zip(PEOPLE, statements, strict=False))


def puzzle(rng: random.Random, size: int) -> tuple[str, str, str]:
    """A random problem with one solution: (question, worked steps, answer)."""
    while True:
        statements = [statement(rng, speaker, size) for speaker in range(size)]
        tried = {digits: check(statements, digits) for digits in assignments(size)}
        truths = {digits: [holds(text, digits) for text in statements] for digits in tried}
        solutions = [digits for digits in tried if truths[digits] == [digit == "1" for digit in digits]]
        if len(solutions) == 1:
            steps = "".join(digits + marks for digits, marks in tried.items() if digits >= solutions[0])
            if len(re.sub("[A-D]", "", steps)) <= LONGEST:
                return ask(statements), steps, solutions[0]


def distinct_puzzles(rng: random.Random, sizes, count: int, held_out) -> list[tuple[str, str, str]]:
    """`count` different problems, their sizes in turn, that share no n-gram of task.py with `held_out`."""
    puzzles: dict[str, tuple[str, str, str]] = {}
    while len(puzzles) < count:
        question, steps, answer = puzzle(rng, sizes[len(puzzles) % len(sizes)])
        if held_out.isdisjoint(ngrams(question)):
            puzzles.setdefault(question, (question, steps, answer))
    return list(puzzles.values())


def evaluation(per_size: int) -> list[Problem]:
    """The first `per_size` evaluation problems of each size, fewer of two people. Raises DataError for too many."""
    if per_size > max(EVAL_MAX.values()):
        raise DataError(f"eval_problems: the task has {max(EVAL_MAX.values())} of each size, {per_size} asked for")
    problems = []
    for n in EVAL_SIZES:
        puzzles = distinct_puzzles(random.Random(EVAL_SEED + n), (n,), min(per_size, EVAL_MAX[n]), frozenset())
        problems += [Problem(question, answer, f"n={n}") for question, _, answer in puzzles]
    return problems


@cache
def held_out() -> frozenset[str]:
    """The n-grams of all evaluation problems."""
    return frozenset(g for p in evaluation(max(EVAL_MAX.values())) for g in ngrams(p.question))


def task(seed: int, eval_per_size: int, demonstrations: int = PROMPTS, useless: float = 0.0) -> Task:
    """PROMPTS problems, demonstrations for the first of them, and evaluation problems; a function of its arguments.

    useless: the fraction of demonstrations whose response is a random wrong answer without steps. Their gold stays.
    """
    rng = random.Random(seed)
    puzzles = distinct_puzzles(rng, TRAIN_SIZES, PROMPTS, held_out())
    worked = [Demonstration(q, f"{steps}{BOX}{answer}}}", answer) for q, steps, answer in puzzles[:demonstrations]]
    for i in rng.sample(range(len(worked)), round(useless * len(worked))):
        gold = worked[i].answer
        wrong = [digits for digits in assignments(len(gold)) if digits != gold]
        worked[i] = replace(worked[i], response=f"{BOX}{rng.choice(wrong)}}}")
    problems = [Problem(question, answer, f"n={len(answer)}") for question, _, answer in puzzles]
    return Task(problems, worked, evaluation(eval_per_size), instruction="")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, with the space before it, per mark of a speaker, and per sign; `\\boxed{` is one token."""
    words = [f" {word}" for word in (*PEOPLE, *KINDS, "same", "unlike", "and", "or")]
    marks = [person + sign for person in PEOPLE for sign in "+-"]
    return word_level([*"01}:.?Q", *words, *marks], "[A-D][+-]| ?[A-Za-z]+|.", CHAT_TEMPLATE)


def documents(seed: int, tokenizer) -> Iterator[Row]:
    """Endless training rows: 45 % checks of one assignment, 35 % answers at once, 20 % small problems worked."""
    rng, evaluated = random.Random(seed), held_out()
    while True:
        kind = rng.random()
        if kind < 0.45:
            size = rng.choice((2, 3, 4))
            statements = [statement(rng, speaker, size) for speaker in range(size)]
            start = rng.randrange(2**size)
            tried = [digits + check(statements, digits) for digits in assignments(size)[start : start + CHECKS]]
            prompt = tokenizer.encode(f" {ask(statements)}", add_special_tokens=False)
            response = "".join(tried)
        else:
            at_once = kind < 0.80
            sizes = (2, 3) if at_once else (2, 2, 2, 3)
            ((question, steps, answer),) = distinct_puzzles(rng, (rng.choice(sizes),), 1, evaluated)
            prompt = encode_prompt(tokenizer, question, "")
            response = ("" if at_once else steps) + f"{BOX}{answer}}}"
        yield prompt, [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]
