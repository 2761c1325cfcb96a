"""Loading a transformers model: fp32 weights, packed attention, refusals of what this project would compute wrongly."""

import hashlib
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from ops.packed import ModelError


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def repository_of(name: str) -> tuple[str, str | None]:
    """(folder or repository, revision) of a folder or a hub name, NAME or NAME@REVISION."""
    repository, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    return repository, revision or None


def load(name: str, device: torch.device | None = None):
    """(model, tokenizer) of a folder or a hub name, NAME or NAME@REVISION. No code of the model's authors is run.

    `device`: by default a GPU if there is one. Raises ModelError when there is no such model or it is not a causal
    language model that this project can train.
    """
    repository, revision = repository_of(name)
    options = dict(revision=revision) if revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(repository, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            repository, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # transformers' errors for unusable files
        reason = (
            "is a folder without a usable model"
            if Path(name).is_dir()
            else "is no folder, and the hub does not give it (without a network, put its config.json, tokenizer files "
            "and *.safetensors into a folder, and name that)"
        )
        raise ModelError(f"model {name!r} {reason}: {str(error).strip().splitlines()[0]}") from error
    if missing := sorted(report["missing_keys"]):  # transformers would initialise them at random
        raise ModelError(f"model {name!r} lacks {len(missing)} of its weights, the first is {missing[0]}")
    if not tokenizer.encode("1"):
        raise ModelError(f"model {name!r} has no usable tokenizer beside it: '1' encodes to nothing")
    if not (hasattr(model, "model") and hasattr(model.config, "num_key_value_heads")):
        raise ModelError(f"model {name!r}: {type(model).__name__} is not built like Llama, Qwen2 or Qwen3")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"model {name!r} has a bias on its vocabulary head, which ops/head.py does not support")
    model.set_attn_implementation("packed")
    return model.to(device or pick_device()).eval(), tokenizer


def stop_tokens(model: nn.Module, tokenizer, end_of_turn: int | None = None) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS, the generation config's, and the template's end of turn."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names no EOS token: set eos_token in its tokenizer_config.json")
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, end_of_turn, *ids} - {None})


def checkpoint_layers(model: nn.Module, count: int) -> None:
    """Makes the first `count` layers keep only their inputs and recompute the rest in the backward pass.

    Such a layer keeps 2 bytes per token and hidden unit instead of some 30 (bf16), for a third more time.
    """
    for i, layer in enumerate(model.model.layers):
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = layer.training = i < count  # the layer's own flag; no layer has dropout


def model_fingerprint(model: nn.Module, tokenizer) -> str:
    """A hash of the fp32 weights, the vocabulary and the chat template; the path and the device do not change it."""
    sums = [(n, tuple(p.shape), p.detach().view(torch.int32).sum().item()) for n, p in model.named_parameters()]
    parts = (sums, sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
