r"""Trains the base models of the built-in tasks from scratch: python bench/base_models.py [NAME …]

Each takes about five minutes and is written to tasks/base/NAME; a run only reads these folders. --seed N makes another
model by the same recipe, and --out FOLDER writes it to FOLDER/NAME. A model of 100,000 parameters or more is rounded to
bfloat16. One thread computes, so that the same machine gives the same bytes again.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from measure import ROOT  # noqa: F401  puts the project's modules on the path
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from infra.files import atomic_folder
from infra.model import MODELS, pick_device
from logprob import response_logprobs
from ops.packed import Row
from tasks import arithmetic, logic
from tasks.prompts import encode_prompt
from tasks.task import BOX

EOS = "<eos>"
UNK = "<unk>"
CHAT_TEMPLATE = "{% for m in messages %}{{ BEFORE + m.content + AFTER if m.role == 'user' else m.content }}{% endfor %}"


@dataclass(frozen=True)
class Recipe:
    """Size and training of a base model; recipe.json in its folder records it."""

    hidden: int = 96
    layers: int = 3
    mlp: int = 288
    steps: int = 1200
    batch: int = 96
    lr: float = 3e-3
    seed: int = 0
    kind: str = "qwen2"  # transformers reads a tokenizer of whole words only beside models of other kinds


class BaseModel(NamedTuple):
    recipe: Recipe
    make_tokenizer: Callable[[], PreTrainedTokenizerFast]
    documents: Callable[[int, PreTrainedTokenizerFast], Iterator[Row]]  # endless training rows of a seed


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def word_level(words: list[str], pattern: str, before: str, after: str) -> PreTrainedTokenizerFast:
    """A tokenizer of EOS, UNK, BOX and `words`; the regular expression `pattern` matches a word.

    Its chat template puts a question between `before` and `after`.
    """
    vocabulary = {token: i for i, token in enumerate([EOS, UNK, BOX, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    inner.decoder = Fuse()
    inner.add_tokens([AddedToken(BOX, normalized=False)])
    template = CHAT_TEMPLATE.replace("BEFORE", repr(before)).replace("AFTER", repr(after))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, unk_token=UNK, chat_template=template)


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    r"""One token per character; `\boxed{` and the end of a completion are one token each."""
    return word_level([*"0123456789+-*=;}Q:"], ".", "Q:", "=")


def logic_tokenizer() -> PreTrainedTokenizerFast:
    r"""One token per word, with the space before it, per person with a digit, and per sign; `\boxed{` is one token."""
    words = [f" {word}" for word in (*logic.PEOPLE, *logic.KINDS, "same", "unlike")]
    digits = [person + digit for person in logic.PEOPLE for digit in "01"]
    return word_level([*"01}:.?Q+-", *logic.PEOPLE, *words, *digits], logic.WORD, "Q: ", "?")


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def arithmetic_documents(seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[Row]:
    """Endless training rows: 45 % single steps, 35 % problems answered at once, 20 % worked step by step."""
    rng = random.Random(seed)
    held_out = {p.question for p in arithmetic.evaluation(arithmetic.EVAL_MAX)}
    while True:
        kind = rng.random()
        if kind < 0.45:
            start = rng.randrange(arithmetic.MODULUS)
            _, steps, _ = arithmetic.chain(rng, rng.randrange(3, 8), start)
            ids = tokenizer.encode(steps, add_special_tokens=False)
            yield ids[:1], [*ids[1:], tokenizer.eos_token_id]
            continue
        at_once = kind < 0.80
        question = None
        while question is None or question in held_out:
            length = rng.choice((2, 3) if at_once else (2, 3, 4))
            question, steps, answer = arithmetic.chain(rng, length)
        if at_once:
            steps = ""
        ids = tokenizer.encode(f"{steps}{BOX}{answer}}}", add_special_tokens=False)
        yield encode_prompt(tokenizer, question, ""), [*ids, tokenizer.eos_token_id]


def logic_documents(seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[Row]:
    """Endless training rows: 45 % checks of assignments, 35 % answers at once, 20 % small problems worked."""
    rng = random.Random(seed)
    held_out = logic.held_out()
    while True:
        kind = rng.random()
        if kind < 0.45:
            size = rng.choice((2, 3, 4, 5))
            statements = [logic.statement(rng, speaker, size) for speaker in range(size)]
            start = rng.randrange(2**size)
            checked = logic.assignments(size)[start : start + 4]
            response = "".join(logic.check(statements, digits) for digits in checked)
            prompt = tokenizer.encode(f" {logic.ask(statements)}", add_special_tokens=False)
        else:
            at_once = kind < 0.80
            size = rng.choice((2, 3) if at_once else (2, 2, 2, 3))
            ((question, steps, answer),) = logic.distinct_puzzles(rng, (size,), 1, held_out)
            prompt = encode_prompt(tokenizer, question, "")
            if at_once:
                steps = ""
            response = f"{steps}{BOX}{answer}}}"
        ids = tokenizer.encode(response, add_special_tokens=False)
        yield prompt, [*ids, tokenizer.eos_token_id]


# ---------------------------------------------------------------------------------------------------------------------
# Training

LAPTOP = Recipe()
SMOKE = Recipe(hidden=32, layers=2, mlp=64, steps=200, batch=32)
LOGIC = Recipe(hidden=64, layers=4, mlp=192, steps=2000, batch=64, kind="llama")
BASE_MODELS = {
    "arithmetic-laptop": BaseModel(LAPTOP, arithmetic_tokenizer, arithmetic_documents),
    "arithmetic-smoke": BaseModel(SMOKE, arithmetic_tokenizer, arithmetic_documents),
    "logic-laptop": BaseModel(LOGIC, logic_tokenizer, logic_documents),
}


def config_of(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    return AutoConfig.for_model(
        recipe.kind, vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def train(base: BaseModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """AdamW on the mean negative log-probability of the documents' response tokens."""
    recipe = base.recipe
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config_of(recipe, tokenizer)).to(pick_device())
    model.set_attn_implementation("packed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps)
    documents = base.documents(recipe.seed, tokenizer)
    for _ in tqdm(range(recipe.steps)):
        logp, _ = response_logprobs(model, list(islice(documents, recipe.batch)))
        optimizer.zero_grad()
        (-logp.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def write(base: BaseModel, folder: Path) -> None:
    """Trains a base model and writes it, its tokenizer and its recipe to `folder`."""
    tokenizer = base.make_tokenizer()
    model = train(base, tokenizer)
    if model.num_parameters() >= 10**5:
        model.bfloat16()  # keeps the folder below 1 MB
    with atomic_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "recipe.json").write_text(json.dumps(asdict(base.recipe)) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BASE_MODELS)}; without any: all")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the documents")
    parser.add_argument("--out", type=Path, default=MODELS)
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BASE_MODELS]
    if unknown:
        parser.error(f"no base model {unknown[0]!r}; there are {', '.join(BASE_MODELS)}")
    torch.set_num_threads(1)  # sums, and so the weights, do not depend on the number of cores
    for name in args.names or BASE_MODELS:
        base = BASE_MODELS[name]
        write(base._replace(recipe=replace(base.recipe, seed=args.seed)), args.out / name)
