"""The built-in task, chain arithmetic, and the small base model that goes with it.

A problem is a chain of one-digit operands with + - *, evaluated left to right modulo 100. A demonstration works it
one step at a time and ends with the answer in a box, where the grader of every other task looks for it too:

    Q:7*7+9*4=        7*7=49;49+9=58;58*4=32;\\boxed{32}

The base model is built from scratch in a couple of minutes. It knows the single steps and can work short chains, but
prefers to guess at once and hardly ever solves a chain of five: RL alone finds little reward there, while
demonstrations show the way and imitation alone unlearns part of what the base knew. That is the paper's
setting at the size of a laptop. It is saved as an ordinary transformers folder and loaded like any other model.
"""

import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from infra.model import pick_device, response_loss
from tasks.task import DataError, Demonstration, Problem, Task, encode_prompt

MODULUS = 100
TRAIN_LENGTHS, EVAL_LENGTHS = range(3, 7), range(3, 9)
PROMPTS, DEMONSTRATIONS = 4096, 256
EVAL_MAX = 200  # evaluation problems of each length; no training set holds any of them
EVAL_SEED = 2509_06948  # the evaluation problems are the same for every run
EOS, UNKNOWN, BOX = "<eos>", "<unk>", "\\boxed{"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q:{{ m['content'] }}={% else %}{{ m['content'] }}"
    "{% endif %}{% endfor %}"
)


def chain(rng: random.Random, length: int, start: int | None = None) -> tuple[str, str, str]:
    """A random problem of `length` operands: (question, worked steps, answer).

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


def _distinct(rng: random.Random, lengths: list[int], count: int, taken: set[str]) -> list[tuple[str, str, str]]:
    chains = []
    while len(chains) < count:
        c = chain(rng, lengths[len(chains) % len(lengths)])
        if c[0] not in taken:
            taken.add(c[0])
            chains.append(c)
    return chains


def evaluation(per_length: int) -> list[Problem]:
    """The fixed evaluation problems: the first `per_length` of each length 3…8.

    Raises DataError when that is more than the EVAL_MAX of each length that training leaves out.
    """
    if per_length > EVAL_MAX:
        raise DataError(f"eval_problems: the built-in task has {EVAL_MAX} of each length, {per_length} asked for")
    rng_of = {n: random.Random(EVAL_SEED + n) for n in EVAL_LENGTHS}
    return [Problem(q, a, f"n={n}") for n in EVAL_LENGTHS for q, _, a in _distinct(rng_of[n], [n], per_length, set())]


def task(seed: int, eval_per_length: int) -> Task:
    """Prompts, demonstrations and evaluation problems; a function of the seed, and no question occurs twice."""
    rng, taken = random.Random(seed), {p.question for p in evaluation(EVAL_MAX)}
    demonstrations = _distinct(rng, list(TRAIN_LENGTHS), DEMONSTRATIONS, taken)
    problems = _distinct(rng, list(TRAIN_LENGTHS), PROMPTS, taken)
    return Task(
        problems=[Problem(q, a, f"n={q.count('+') + q.count('-') + q.count('*') + 1}") for q, _, a in problems],
        demonstrations=[Demonstration(q, f"{steps}{BOX}{a}}}", a) for q, steps, a in demonstrations],
        evaluation=evaluation(eval_per_length),
        instruction="",
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `\\boxed{` and the end of a completion are one token each."""
    vocabulary = {token: i for i, token in enumerate([EOS, UNKNOWN, BOX, *"0123456789+-*=;}Q:"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_tokens([AddedToken(BOX, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token=UNKNOWN)
    fast.chat_template = CHAT_TEMPLATE
    return fast


@dataclass(frozen=True)
class Recipe:
    """How large the base model is and how long it is trained."""

    hidden: int = 96
    layers: int = 3
    mlp: int = 288
    steps: int = 1200
    batch: int = 96
    lr: float = 3e-3
    seed: int = 0


def config(recipe: Recipe, tokenizer) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def documents(recipe: Recipe, tokenizer):
    """Endless training batches of the base model as (prompt ids, response ids): 45 % chains of single steps,
    35 % short problems answered at once, 20 % problems of up to four operands worked step by step."""
    rng, held_out = random.Random(recipe.seed), {p.question for p in evaluation(EVAL_MAX)}

    def problem(lengths: tuple[int, ...]) -> tuple[str, str, str]:
        while True:
            c = chain(rng, rng.choice(lengths))
            if c[0] not in held_out:
                return c

    def document() -> tuple[list[int], list[int]]:
        kind = rng.random()
        if kind < 0.45:
            value = rng.randrange(MODULUS)
            _, text, _ = chain(rng, rng.randrange(3, 8), value)
            ids = tokenizer.encode(text, add_special_tokens=False)
            return ids[:1], [*ids[1:], tokenizer.eos_token_id]
        question, steps, answer = problem((2, 3) if kind < 0.80 else (2, 3, 4))
        text = ("" if kind < 0.80 else steps) + f"{BOX}{answer}}}"
        ids = tokenizer.encode(text, add_special_tokens=False)
        return encode_prompt(tokenizer, question, ""), [*ids, tokenizer.eos_token_id]

    while True:
        yield [document() for _ in range(recipe.batch)]


RECIPES = {
    "arithmetic-laptop": Recipe(),
    "arithmetic-smoke": Recipe(hidden=32, layers=2, mlp=64, steps=200, batch=32),
}
MODELS = Path(__file__).parents[1] / "models"


def resolve(model: str) -> str:
    """The folder of a built-in model, built if it is not there; any other name as it is."""
    return str(build_base(model)) if model in RECIPES else model


def build_base(name: str) -> Path:
    """Trains a base model and saves it as a transformers folder; reuses the folder if it is there already."""
    recipe, folder = RECIPES[name], MODELS / name
    done = folder / "recipe.json"
    if done.exists() and json.loads(done.read_text()) == asdict(recipe):
        return folder
    tokenizer = make_tokenizer()
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config(recipe, tokenizer)).to(pick_device())
    model.set_attn_implementation("packed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps)
    batches = documents(recipe, tokenizer)
    for _ in (bar := tqdm(range(recipe.steps), desc="building the base model (once)")):
        batch = next(batches)
        count = sum(len(response) for _, response in batch)
        loss = response_loss(model, batch, lambda logp, *_, count=count: -logp.sum() / count)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(nll=f"{loss.item():.3f}", refresh=False)
    scratch = folder.with_name(f"{name}-{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    (scratch / done.name).write_text(json.dumps(asdict(recipe)) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return folder
