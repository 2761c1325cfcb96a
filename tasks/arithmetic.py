r"""The built-in task, chain arithmetic, and its small base model.

A problem is a chain of one-digit operands with + - *, evaluated from left to right modulo 100. A demonstration
computes one step at a time and ends with the answer in the box that the grader reads:

    Q:7*7+9*4=        7*7=49;49+9=58;58*4=32;\boxed{32}

The base model computes single steps, prefers to answer at once, and solves almost no chain of five. So RL alone finds
little reward, and imitation alone forgets some of its skills. tasks/builtin.py trains it.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

from infra.files import DataError
from ops.packed import Row
from tasks.prompts import encode_prompt
from tasks.task import Demonstration, Drawn, Problem, Task, draw_distinct

MODULUS = 100
TRAIN_LENGTHS, EVAL_LENGTHS = range(3, 7), range(3, 9)
PROMPTS, DEMONSTRATIONS = 4096, 256
CHAINS_LENGTHS, CHAINS_EVAL_LENGTHS, CHAINS_PROMPTS = range(3, 8), range(3, 10), 1024  # of the harder task, `chains`
EVAL_MAX = 200  # evaluation problems of each length; training excludes all of them
EVAL_SEED = 2509_06948  # the evaluation problems are the same for every run
EOS, UNK, BOX = "<eos>", "<unk>", "\\boxed{"
CHAT_TEMPLATE = "{% for m in messages %}{{ 'Q:' + m.content + '=' if m.role == 'user' else m.content }}{% endfor %}"


def chain(rng: random.Random, length: int, start: int | None = None) -> Drawn:
    """A random problem of `length` operands: (question, worked steps, answer). `start` fixes the first operand.

    >>> chain(random.Random(1), 3)
    ('2*1-1', '2*1=2;2-1=1;', '1')
    """
    value = rng.randrange(10) if start is None else start
    question, steps = str(value), ""
    for _ in range(length - 1):
        op, operand = rng.choice("+-*"), rng.randrange(10)
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
    if per_length > EVAL_MAX:
        raise DataError(f"eval_problems: the built-in task has {EVAL_MAX} of each length, {per_length} asked for")
    problems = []
    for n in lengths:
        chains = distinct_chains(random.Random(EVAL_SEED + n), range(n, n + 1), per_length, set())
        problems += [Problem(question, answer, f"n={n}") for question, _, answer in chains]
    return problems


def task(seed: int, eval_per_length: int) -> Task:
    """Problems and demonstrations, a function of the seed, and evaluation problems; no question occurs twice."""
    rng, taken = random.Random(seed), {p.question for p in evaluation(EVAL_MAX)}
    worked = distinct_chains(rng, TRAIN_LENGTHS, DEMONSTRATIONS, taken)
    demonstrations = [Demonstration(question, f"{steps}{BOX}{answer}}}", answer) for question, steps, answer in worked]
    asked = distinct_chains(rng, TRAIN_LENGTHS, PROMPTS, taken)
    problems = [Problem(question, answer, f"n={steps.count(';') + 1}") for question, steps, answer in asked]
    return Task(problems, demonstrations, evaluation(eval_per_length), instruction="")


def chains(seed: int, eval_per_length: int, demonstrations: int = 256, useless: float = 0.5) -> Task:
    """The harder task: longer chains, and a fraction `useless` of the demonstrations answers at once, and wrongly.

    The demonstrations' questions are the first ones of D_RL, so that methods can put them beside samples of theirs. The
    right answer stays their gold: a verifier can tell which ones are useless, imitation cannot.
    """
    rng, taken = random.Random(seed), {p.question for p in evaluation(EVAL_MAX, CHAINS_EVAL_LENGTHS)}
    asked = distinct_chains(rng, CHAINS_LENGTHS, max(CHAINS_PROMPTS, demonstrations), taken)
    worked = [Demonstration(q, f"{steps}{BOX}{answer}}}", answer) for q, steps, answer in asked[:demonstrations]]
    for i in sorted(rng.sample(range(demonstrations), round(useless * demonstrations))):
        other = (int(worked[i].answer) + rng.randrange(1, MODULUS)) % MODULUS
        worked[i] = replace(worked[i], response=f"{BOX}{other}}}")
    problems = [Problem(question, answer, f"n={steps.count(';') + 1}") for question, steps, answer in asked]
    return Task(problems, worked, evaluation(eval_per_length, CHAINS_EVAL_LENGTHS), instruction="")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `\\boxed{` and the end of a completion are one token each."""
    return word_level([*"0123456789+-*=;}Q:"], ".", CHAT_TEMPLATE)


def word_level(words: list[str], pattern: str, chat_template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of EOS, UNK, BOX and `words`; the regular expression `pattern` matches a word."""
    vocabulary = {token: i for i, token in enumerate([EOS, UNK, BOX, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    inner.decoder = Fuse()
    inner.add_tokens([AddedToken(BOX, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, unk_token=UNK, chat_template=chat_template)


def documents(seed: int, tokenizer) -> Iterator[Row]:
    """Endless training rows: 45 % single steps, 35 % problems answered at once, 20 % worked step by step."""
    rng, held_out = random.Random(seed), {p.question for p in evaluation(EVAL_MAX)}
    while True:
        kind = rng.random()
        if kind < 0.45:
            start = rng.randrange(MODULUS)
            _, steps, _ = chain(rng, rng.randrange(3, 8), start)
            ids = tokenizer.encode(steps, add_special_tokens=False)
            yield ids[:1], [*ids[1:], tokenizer.eos_token_id]
            continue
        at_once, question = kind < 0.80, None
        while question is None or question in held_out:
            question, steps, answer = chain(rng, rng.choice((2, 3) if at_once else (2, 3, 4)))
        ids = tokenizer.encode(("" if at_once else steps) + f"{BOX}{answer}}}", add_special_tokens=False)
        yield encode_prompt(tokenizer, question, ""), [*ids, tokenizer.eos_token_id]
