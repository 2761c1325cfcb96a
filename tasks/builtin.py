"""The built-in tasks of settings.TASKS and their small base models, trained from scratch on the documents of each task.

The weights of these models lie in tasks/base; those of models above 100,000 parameters are rounded to bfloat16.
`python -m tasks.builtin [NAME …]` trains them again, about five minutes each.
"""

import json
import sys
from dataclasses import asdict
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from infra.files import atomic_folder
from infra.model import MODELS, pick_device
from logprob import response_logprobs
from settings import TASKS
from tasks.wordlevel import Recipe


def module_of(task: str) -> ModuleType:
    """tasks/NAME.py of a built-in task; see settings.BuiltinTask for what it has."""
    return import_module(f"tasks.{task}")


# The recipe of each built-in model, and the module of its task.
RECIPES: dict[str, tuple[Recipe, ModuleType]] = {}
for _task in TASKS:
    _module = module_of(_task)
    for _model, _recipe in getattr(_module, "RECIPES", {}).items():
        RECIPES[_model] = _recipe, _module


def config(recipe: Recipe, tokenizer) -> PretrainedConfig:
    return AutoConfig.for_model(
        recipe.kind, vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def builtin_config(model: str) -> PretrainedConfig | None:
    """The config of a built-in model, None for any other name."""
    if model not in RECIPES:
        return None
    recipe, task = RECIPES[model]
    return config(recipe, task.make_tokenizer())


def task_of(model: str) -> str:
    """The task that a model is evaluated on by default: the one of a built-in model, else arithmetic."""
    for task, row in TASKS.items():
        if model in row.models:
            return task
    return "arithmetic"


def resolve(model: str) -> str:
    """The folder of a built-in model, any other name unchanged."""
    return str(build_base(model)) if model in RECIPES else model


def train_base(recipe: Recipe, task: ModuleType) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """(model, tokenizer) of a recipe: AdamW on the mean negative log-probability of response tokens."""
    tokenizer = task.make_tokenizer()
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config(recipe, tokenizer)).to(pick_device())
    model.set_attn_implementation("packed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps)
    documents = task.documents(recipe.seed, tokenizer)
    for _ in tqdm(range(recipe.steps), desc="building the base model (once)"):
        logp, _ = response_logprobs(model, list(islice(documents, recipe.batch)))
        optimizer.zero_grad()
        (-logp.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model, tokenizer


def build_base(name: str, again: bool = False) -> Path:
    """The folder of a base model below MODELS; trained, and written there, if its recipe has changed or if `again`."""
    recipe, task = RECIPES[name]
    record = json.dumps(asdict(recipe)) + "\n"
    folder = MODELS / name
    file = folder / "recipe.json"
    if not again and file.exists() and file.read_text() == record:
        return folder
    model, tokenizer = train_base(recipe, task)
    if model.num_parameters() >= 10**5:
        model.bfloat16()  # keeps the folder below 1 MB
    with atomic_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / file.name).write_text(record)
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums, and so the weights, do not depend on the number of cores
    for name in sys.argv[1:] or RECIPES:
        build_base(name, again=True)
