r"""The built-in task, chain arithmetic, and its small base model.

A problem is a chain of one-digit operands with + - *, evaluated from left to right modulo 100. A demonstration
computes one step at a time and ends with the answer in the box that the grader reads:

    Q:7*7+9*4=        7*7=49;49+9=58;58*4=32;\boxed{32}

The base model computes single steps, prefers to answer at once, and solves almost no chain of five. So RL alone finds
little reward, and imitation alone forgets some of its skills. Its weights lie in tasks/base, rounded to bfloat16;
a smaller model for tests lies beside it. `python -m tasks.arithmetic` trains both from scratch, in five minutes.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from infra.files import DataError, atomic_folder
from infra.model import MODELS, pick_device
from logprob import response_logprobs
from ops.packed import Row
from tasks.prompts import encode_prompt
from tasks.task import Demonstration, Problem, Task

MODULUS = 100
TRAIN_LENGTHS, EVAL_LENGTHS = range(3, 7), range(3, 9)
PROMPTS, DEMONSTRATIONS = 4096, 256
CHAINS_LENGTHS, CHAINS_EVAL_LENGTHS, CHAINS_PROMPTS = range(3, 8), range(3, 10), 1024  # of the harder task, `chains`
EVAL_MAX = 200  # evaluation problems of each length; training excludes all of them
EVAL_SEED = 2509_06948  # the evaluation problems are the same for every run
EOS, UNK, BOX = "<eos>", "<unk>", "\\boxed{"
CHAT_TEMPLATE = "{% for m in messages %}{{ 'Q:' + m.content + '=' if m.role == 'user' else m.content }}{% endfor %}"


def chain(rng: random.Random, length: int, start: int | None = None) -> tuple[str, str, str]:
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


def distinct_chains(rng: random.Random, lengths: range, count: int, taken: set[str]) -> list[tuple[str, str, str]]:
    """`count` chains, their lengths in turn, whose questions are not in `taken`; adds the questions to `taken`."""
    chains = []
    while len(chains) < count:
        question, steps, answer = chain(rng, lengths[len(chains) % len(lengths)])
        if question not in taken:
            taken.add(question)
            chains.append((question, steps, answer))
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
    wrong = set(rng.sample(range(demonstrations), round(useless * demonstrations)))
    worked = []
    for i, (question, steps, answer) in enumerate(asked[:demonstrations]):
        if i in wrong:
            steps, boxed = "", str((int(answer) + rng.randrange(1, MODULUS)) % MODULUS)
        else:
            boxed = answer
        worked.append(Demonstration(question, f"{steps}{BOX}{boxed}}}", answer))
    problems = [Problem(question, answer, f"n={steps.count(';') + 1}") for question, steps, answer in asked]
    return Task(problems, worked, evaluation(eval_per_length, CHAINS_EVAL_LENGTHS), instruction="")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `\\boxed{` and the end of a completion are one token each."""
    vocabulary = {token: i for i, token in enumerate([EOS, UNK, BOX, *"0123456789+-*=;}Q:"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = Fuse()
    inner.add_tokens([AddedToken(BOX, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, unk_token=UNK, chat_template=CHAT_TEMPLATE)


@dataclass(frozen=True)
class Recipe:  # size and training of a base model
    hidden: int = 96
    layers: int = 3
    mlp: int = 288
    steps: int = 1200
    batch: int = 96
    lr: float = 3e-3
    seed: int = 0


RECIPES = {"arithmetic-laptop": Recipe(), "arithmetic-smoke": Recipe(hidden=32, layers=2, mlp=64, steps=200, batch=32)}


def config(recipe: Recipe, tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def builtin_config(model: str) -> Qwen2Config | None:
    """The config of a built-in model, None for any other name."""
    return config(RECIPES[model], make_tokenizer()) if model in RECIPES else None


def resolve(model: str) -> str:
    """The folder of a built-in model; any other name unchanged."""
    return str(build_base(model)) if model in RECIPES else model


def documents(recipe: Recipe, tokenizer) -> Iterator[list[Row]]:
    """Endless training batches: 45 % single steps, 35 % problems answered at once, 20 % worked step by step."""
    rng, held_out = random.Random(recipe.seed), {p.question for p in evaluation(EVAL_MAX)}

    def document() -> Row:
        kind = rng.random()
        if kind < 0.45:
            start = rng.randrange(MODULUS)
            _, steps, _ = chain(rng, rng.randrange(3, 8), start)
            ids = tokenizer.encode(steps, add_special_tokens=False)
            return ids[:1], [*ids[1:], tokenizer.eos_token_id]
        at_once, question = kind < 0.80, None
        while question is None or question in held_out:
            question, steps, answer = chain(rng, rng.choice((2, 3) if at_once else (2, 3, 4)))
        ids = tokenizer.encode(("" if at_once else steps) + f"{BOX}{answer}}}", add_special_tokens=False)
        return encode_prompt(tokenizer, question, ""), [*ids, tokenizer.eos_token_id]

    while True:
        yield [document() for _ in range(recipe.batch)]


def train_base(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """(model, tokenizer) of a recipe: AdamW on the mean negative log-probability of response tokens."""
    tokenizer = make_tokenizer()
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config(recipe, tokenizer)).to(pick_device())
    model.set_attn_implementation("packed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps)
    batches = islice(documents(recipe, tokenizer), recipe.steps)
    for batch in tqdm(batches, total=recipe.steps, desc="building the base model (once)"):
        logp, _ = response_logprobs(model, batch)
        optimizer.zero_grad()
        (-logp.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model, tokenizer


def build_base(name: str, again: bool = False) -> Path:
    """The folder of a base model below MODELS; trained, and written there, if its recipe has changed or if `again`."""
    recipe, folder = RECIPES[name], MODELS / name
    record, file = json.dumps(asdict(recipe)) + "\n", folder / "recipe.json"
    if not again and file.exists() and file.read_text() == record:
        return folder
    model, tokenizer = train_base(recipe)
    if again or not (file.exists() and file.read_text() == record):  # another process may have built it meanwhile
        with atomic_folder(folder) as scratch:
            small = model.num_parameters() < 10**5  # a larger one is rounded, for less than a megabyte
            (model if small else model.bfloat16()).save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            (scratch / file.name).write_text(record)
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums, and so the weights, do not depend on the number of cores
    for name in RECIPES:
        build_base(name, again=True)
