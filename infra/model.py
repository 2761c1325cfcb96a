"""Loading a transformers model: fp32 weights, packed attention, refusals of what this project would compute wrongly."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import find_adapter_config_file

from infra import cpu
from infra.files import read_object, refuse_pointer, write_json
from ops.packed import ModelError
from settings import builtin_models

MODELS = Path(__file__).parents[1] / "tasks" / "base"  # the built-in models, which bench/base_models.py trains


@contextmanager
def reading(subject: str, advice: str = "") -> Iterator[None]:
    """Turns an error of a block that reads a model into a ModelError in one line: subject (cause): advice."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        words = str(error).split()
        if len(words) < 2:  # a KeyError holds the key alone
            words.insert(0, type(error).__name__)
        cause = " ".join(words)[:300]
        message = f"{subject} ({cause})"
        if advice:
            message += f": {advice}"
        raise ModelError(message) from error


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def repository_of(name: str) -> tuple[str, str | None]:
    """(folder or repository, revision or None) of a built-in model, a folder or a hub name, NAME or NAME@REVISION."""
    if name in builtin_models():
        return str(MODELS / name), None
    if Path(name).exists():
        return name, None
    repository, _, revision = name.partition("@")
    return repository, revision or None


def read_config(name: str) -> PretrainedConfig:
    """The config of a model by its name, see `repository_of`. Raises ModelError for adapters and quantised weights."""
    if sys.flags.optimize > 1:
        raise ModelError("transformers reads its own docstrings: start Python without -OO")
    repository, revision = repository_of(name)
    folder = Path(repository).absolute()
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        for run in (folder, *folder.parents[:2]):
            if (run / "metrics.jsonl").exists():
                advice = f"name {run}/model, or what python -m infra.export {run} writes"
                raise ModelError(f"model {name!r} is a run or a part of one, no model: {advice}")
    with _reading_model(name):
        if find_adapter_config_file(repository, revision=revision):
            raise ModelError(f"model {name!r} is a PEFT adapter: merge it into its base model first, and name that")
        config = AutoConfig.from_pretrained(repository, revision=revision, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model {name!r} is quantised (quantization_config in config.json): name the original weights")
    return config


def _reading_model(name: str):
    if Path(name).is_dir():
        return reading(f"model {name!r} is a folder without a usable model")
    return reading(
        f"model {name!r} is no folder, and the hub does not give it (without a network, put its config.json, "
        "tokenizer files and *.safetensors into a folder, and name that)"
    )


def load(name: str, device: torch.device | None = None):
    """(model, tokenizer) of a model by its name, see `repository_of`. No code of the model's authors is run.

    `device`: by default a GPU if there is one. Raises ModelError when there is no such model or it is not a causal
    language model that this project can train. Its generation config suppresses the ids that are no token.
    """
    config = read_config(name)
    repository, revision = repository_of(name)
    options = {"trust_remote_code": False, "revision": revision}
    with _reading_model(name):
        for kind in ("*.json", "*.safetensors"):
            for file in sorted(Path(repository).glob(kind)):
                refuse_pointer(file)
        tokenizer = AutoTokenizer.from_pretrained(repository, **options)
        digit = tokenizer.encode("1")
        known_ids = set(tokenizer.get_vocab().values())
        # The report lists what transformers would otherwise fill in or drop with a warning.
        model, report = AutoModelForCausalLM.from_pretrained(
            repository, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
            **options,
        )  # fmt: skip
    faults = {
        "lacks": report["missing_keys"],  # transformers initialises them at random
        "has in config.json another size than it stores for": report["mismatched_keys"],
        "does not use": [key for key in report["unexpected_keys"] if "layers." in key and "inv_freq" not in key],
    }
    for fault, weights in faults.items():
        if weights:
            raise ModelError(f"model {name!r} {fault} {len(weights)} of its weights, the first is {min(weights)}")
    if not digit:
        raise ModelError(f"model {name!r} has no usable tokenizer beside it: '1' encodes to nothing")
    if not (hasattr(model, "model") and hasattr(model.config, "num_key_value_heads")):
        raise ModelError(f"model {name!r}: {type(model).__name__} is not built like Llama, Qwen2 or Qwen3")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"model {name!r} has a bias on its vocabulary head, which ops/head.py does not support")
    rows = len(model.get_input_embeddings().weight)
    last = max(known_ids - {tokenizer.pad_token_id})  # padding is never fed to the model
    if last >= rows:
        raise ModelError(f"model {name!r}: its tokenizer has the id {last}, its embedding {rows} rows: resize that")
    without_token = set(range(rows)) - known_ids
    model.generation_config.suppress_tokens = sorted(without_token) or None
    model.set_attn_implementation("packed")
    device = device or pick_device()
    if device.type == "cpu":
        cpu.tune(config.hidden_size)
    return model.to(device).eval(), tokenizer


def write_model(folder: Path, model: nn.Module, tokenizer) -> None:
    """Writes weights, config and tokenizer, which transformers 4 and vLLM read as transformers 5 does."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    # transformers 4 knows no `rope_parameters` and no `dtype`: it would compute with other positions.
    config = read_object(folder / "config.json")
    config["torch_dtype"] = config["dtype"]
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    write_json(folder / "config.json", config)

    # Nor does it know `TokenizersBackend`. The class below takes all rules from tokenizer.json in both.
    names = read_object(folder / "tokenizer_config.json")
    for of_this_machine in ("is_local", "local_files_only"):
        names.pop(of_this_machine, None)
    if tokenizer.is_fast:
        names["tokenizer_class"] = "PreTrainedTokenizerFast"
    for default_of_a_class in ("model_input_names", "padding_side", "clean_up_tokenization_spaces"):
        names[default_of_a_class] = getattr(tokenizer, default_of_a_class)
    names["additional_special_tokens"] = names.pop("extra_special_tokens", [])
    write_json(folder / "tokenizer_config.json", dict(sorted(names.items())))


def stop_tokens(model: nn.Module, tokenizer, end_of_turn: int | None = None) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS, the generation config's, and the template's end of turn.

    Raises ModelError without an EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names no EOS token: set eos_token in its tokenizer_config.json")
    ids = [tokenizer.eos_token_id]
    if end_of_turn is not None:
        ids.append(end_of_turn)
    configured = model.generation_config.eos_token_id
    if isinstance(configured, list):
        ids += configured
    elif configured is not None:
        ids.append(configured)
    return sorted(set(ids))


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """Makes the first `count` layers keep only their inputs and recompute the rest in the backward pass.

    Such a layer keeps 2 bytes per token and hidden unit instead of some 30 (bf16), for a third more time.
    """
    for i, layer in enumerate(model.model.layers):
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        recomputes = i < count
        layer.gradient_checkpointing = recomputes
        layer.training = recomputes  # transformers recomputes in training mode only; no layer has dropout


def model_fingerprint(model: nn.Module, tokenizer) -> str:
    """A hash of the fp32 weights, the vocabulary and the chat template; the path and the device do not change it."""
    sums = []
    for name, parameter in model.named_parameters():
        bits = parameter.detach().view(torch.int32)  # sums of integers do not depend on their order
        sums.append((name, tuple(parameter.shape), bits.sum().item()))
    parts = (sums, sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
