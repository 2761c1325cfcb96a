r"""A task in English for a pretrained model: how many legs, wheels or sides one or two kinds of things have together.

    How many legs do 3 spiders and 1 duck have?
    Spiders have 8 legs, ducks 2: 3*8 + 1*2 = 24 + 2 = \boxed{26}

The model has to know the things and to calculate. A pretrained model boxes no answer by itself, so RL alone has no
reward. Demonstrations show a third of the things, D_RL asks for a second third, too, and evaluation for all.
"""

import random

from tasks.task import BOX, EVAL_SEED, Demonstration, Drawn, Problem, Task, check_eval_problems, draw_distinct

THINGS: dict[str, tuple[dict[str, int], ...]] = {  # in demonstrations and D_RL; in D_RL; in neither
    "legs": (
        dict(spider=8, ant=6, cow=4, dog=4, frog=4, duck=2, owl=2),
        dict(beetle=6, cat=4, horse=4, lion=4, scorpion=8, parrot=2, hen=2),
        dict(bee=6, rabbit=4, tiger=4, eagle=2, chicken=2),
    ),
    "wheels": (
        dict(unicycle=1, bicycle=2, tricycle=3, car=4),
        dict(wheelbarrow=1, motorcycle=2, taxi=4, scooter=2),
        dict(motorbike=2, van=4, skateboard=4),
    ),
    "sides": (
        dict(triangle=3, square=4, hexagon=6),
        dict(pentagon=5, rectangle=4, octagon=8),
        dict(heptagon=7, parallelogram=4),
    ),
}
SHOWN = slice(0, 1)  # the tables whose things demonstrations show
ASKED = slice(0, 2)  # those that D_RL asks for
NEW = slice(2, 3)  # those that only evaluation asks for
MOST = 9  # of one thing
KINDS = (1, 2, 2, 2)  # of things in a question of training
DEMONSTRATIONS = 256
PROMPTS = 512
GROUPS = {"one thing": (ASKED, (1,)), "two things": (ASKED, (2,)), "new things": (NEW, (1, 2))}  # of evaluation
EVAL_MAX = 100  # evaluation problems of each group; training excludes all of them


def question(rng: random.Random, tables: slice, kinds: int) -> Drawn:
    """(question, worked line, answer) about one or two kinds of things from some of the tables."""
    part = rng.choice(list(THINGS))
    number_of: dict[str, int] = {}
    for table in THINGS[part][tables]:
        number_of |= table
    things = rng.sample(sorted(number_of), kinds)
    counts = [rng.randint(1, MOST) for _ in things]

    asked = " and ".join(with_count(thing, count) for thing, count in zip(things, counts, strict=True))
    verb = "does" if counts == [1] else "do"

    # "Spiders have 8 legs, ducks 2: 3*8 + 1*2 = 24 + 2 = "
    facts = [f"{things[0].capitalize()}s have {number_of[things[0]]} {part}"]
    facts += [f"{thing}s {number_of[thing]}" for thing in things[1:]]
    terms = [f"{count}*{number_of[thing]}" for thing, count in zip(things, counts, strict=True)]
    products = [count * number_of[thing] for thing, count in zip(things, counts, strict=True)]
    sums = [" + ".join(terms)]
    if kinds > 1:
        sums.append(" + ".join(map(str, products)))
    answer = str(sum(products))
    line = f"{', '.join(facts)}: {' = '.join(sums)} = {BOX}{answer}}}"
    return f"How many {part} {verb} {asked} have?", line, answer


def with_count(thing: str, count: int) -> str:
    return f"1 {thing}" if count == 1 else f"{count} {thing}s"


def distinct(rng: random.Random, tables: slice, kinds: tuple[int, ...], count: int, taken: set[str]) -> list[Drawn]:
    """`count` different questions with lines and answers, none of them in `taken`."""
    return draw_distinct(lambda _: question(rng, tables, rng.choice(kinds)), count, taken.__contains__)


def evaluation(per_group: int) -> list[Problem]:
    """The first `per_group` evaluation problems of each group. Raises DataError for more than EVAL_MAX."""
    check_eval_problems(per_group, EVAL_MAX)
    problems = []
    for i, (group, (tables, kinds)) in enumerate(GROUPS.items()):
        rows = distinct(random.Random(EVAL_SEED + i), tables, kinds, EVAL_MAX, set())
        problems += [Problem(q, answer, group) for q, _, answer in rows[:per_group]]
    return problems


def task(seed: int, eval_per_group: int) -> Task:
    """Problems and demonstrations, a function of the seed, and evaluation problems; a demonstration is no problem."""
    rng = random.Random(seed)
    taken = {p.question for p in evaluation(EVAL_MAX)}
    shown = distinct(rng, SHOWN, KINDS, DEMONSTRATIONS, taken)
    demonstrations = [Demonstration(q, line, answer) for q, line, answer in shown]
    taken |= {d.question for d in demonstrations}
    asked = distinct(rng, ASKED, KINDS, PROMPTS, taken)
    problems = [Problem(q, answer, "2 thing" if " and " in q else "1 thing") for q, _, answer in asked]
    return Task(problems, demonstrations, evaluation(eval_per_group), instruction="")
