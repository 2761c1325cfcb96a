"""The small base models of the built-in tasks, trained from scratch on the documents of each task.

Their weights lie in tasks/base; those above 100,000 are rounded to bfloat16. `python -m tasks.builtin [NAME …]` trains
them again, about five minutes each.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from infra.files import atomic_folder
from infra.model import MODELS, pick_device
from logprob import response_logprobs
from tasks import arithmetic, legs, logic

EVALUATION = {  # of each built-in task, a function of the number of problems in a group
    "arithmetic": arithmetic.evaluation,
    "chains": partial(arithmetic.evaluation, lengths=arithmetic.CHAINS_EVAL_LENGTHS),
    "logic": logic.evaluation,
    "legs": legs.evaluation,
}


@dataclass(frozen=True)
class Recipe:  # size and training of a base model
    hidden: int = 96
    layers: int = 3
    mlp: int = 288
    steps: int = 1200
    batch: int = 96
    lr: float = 3e-3
    seed: int = 0
    kind: str = "qwen2"  # transformers reads a tokenizer of whole words beside other kinds of models only


RECIPES: dict[str, tuple[Recipe, ModuleType]] = {  # the module has make_tokenizer() and documents(seed, tokenizer)
    "arithmetic-laptop": (Recipe(), arithmetic),
    "arithmetic-smoke": (Recipe(hidden=32, layers=2, mlp=64, steps=200, batch=32), arithmetic),
    "logic-laptop": (Recipe(hidden=64, layers=4, mlp=192, steps=2000, batch=64, kind="llama"), logic),
}


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
    return "logic" if model in RECIPES and RECIPES[model][1] is logic else "arithmetic"


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
    (recipe, task), folder = RECIPES[name], MODELS / name
    record, file = json.dumps(asdict(recipe)) + "\n", folder / "recipe.json"
    if not again and file.exists() and file.read_text() == record:
        return folder
    model, tokenizer = train_base(recipe, task)
    if again or not (file.exists() and file.read_text() == record):  # another process may have built it meanwhile
        with atomic_folder(folder) as scratch:
            (model if model.num_parameters() < 10**5 else model.bfloat16()).save_pretrained(scratch)  # below 1 MB
            tokenizer.save_pretrained(scratch)
            (scratch / file.name).write_text(record)
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums, and so the weights, do not depend on the number of cores
    for name in sys.argv[1:] or RECIPES:
        build_base(name, again=True)
