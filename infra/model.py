"""Loading a transformers model: fp32 weights, packed attention, refusals of what this project would compute wrongly."""

import hashlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import find_adapter_config_file

from infra.files import json_object, printable
from ops.packed import ModelError

MODELS = Path(__file__).parents[1] / "tasks" / "base"  # the built-in base models, see tasks/builtin.py
SECONDS, BYTES = 2.0, 2**29  # CPU time and memory to read a config or to render a prompt; 10 ms are usual
STATM = Path("/proc/self/statm")  # its first number is this process's size in pages
SIZES = dict(hidden_size=2**17, intermediate_size=2**20, num_hidden_layers=1000, num_attention_heads=4096,
             num_key_value_heads=4096, head_dim=4096, vocab_size=2**24, max_position_embeddings=2**31)  # fmt: skip


@contextmanager
def reading(subject: str, advice: str = "") -> Iterator[None]:
    """Turns every error of a block that reads what strangers wrote into a ModelError: subject (cause): advice."""
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit, GeneratorExit, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        words = str(error).split()
        cause = " ".join(words if len(words) > 1 else [type(error).__name__, *words])[:300]
        raise ModelError(f"{subject} ({printable(cause, kept='')}){advice and ': '}{advice}") from error


@contextmanager
def bounded() -> Iterator[None]:
    """Stops a block after SECONDS of CPU time (TimeoutError) and at BYTES more (MemoryError).

    Linux counts both, and only the main thread receives signals; elsewhere the block runs unbounded.
    """
    if not STATM.exists() or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource  # no module of Windows

    def stop(number, frame) -> None:
        raise TimeoutError(f"it takes more than {SECONDS:g} seconds")

    (soft, hard), handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, stop)
    most = BYTES + resource.getpagesize() * int(STATM.read_text().split()[0])
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most if soft < 0 else min(soft, most), hard))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, handler)


def is_builtin(model: str) -> bool:
    return (MODELS / model / "recipe.json").exists()


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def repository_of(name: str) -> tuple[str, str | None]:
    """(folder or repository, revision) of a folder or a hub name, NAME or NAME@REVISION."""
    repository, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    return repository, revision or None


def read_config(name: str) -> PretrainedConfig:
    """The config of a folder or a hub name. Raises ModelError for adapters, quantised weights and impossible sizes."""
    (repository, revision), file = repository_of(name), Path(name, "config.json")
    with _reading_model(name):
        if find_adapter_config_file(repository, revision=revision):
            raise ModelError(f"model {name!r} is a PEFT adapter: merge it into its base model first, and name that")
        if file.parent.is_dir() and not file.exists():
            raise FileNotFoundError("no config found")
        raw = json_object(file.read_bytes(), file.name) if file.exists() else {}
        for field, most in SIZES.items():
            if (size := raw.get(field)) is not None and (type(size) is not int or not 1 <= size <= most):
                raise ModelError(f"model {name!r}: config.json has {field} {size!r:.40}, which must be 1 to {most}")
        with bounded() if raw else nullcontext():  # a download takes more, for its threads
            config = AutoConfig.from_pretrained(repository, revision=revision, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"model {name!r} is quantised (quantization_config in config.json): name the original weights")
    return config


def _reading_model(name: str):
    missing = "is no folder, and the hub does not give it (without a network, put its config.json, tokenizer files "
    missing += "and *.safetensors into a folder, and name that)"
    return reading(f"model {name!r} {'is a folder without a usable model' if Path(name).is_dir() else missing}")


def load(name: str, device: torch.device | None = None):
    """(model, tokenizer) of a folder or a hub name, NAME or NAME@REVISION. No code of the model's authors is run.

    `device`: by default a GPU if there is one. Raises ModelError when there is no such model or it is not a causal
    language model that this project can train. Its generation config suppresses the ids that are no token.
    """
    config, (repository, revision) = read_config(name), repository_of(name)
    options = dict(trust_remote_code=False, **(dict(revision=revision) if revision else {}))
    with _reading_model(name):
        tokenizer = AutoTokenizer.from_pretrained(repository, **options)
        digit, known = tokenizer.encode("1"), set(tokenizer.get_vocab().values())
        options |= dict(config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
        model, report = AutoModelForCausalLM.from_pretrained(repository, **options)
    if missing := sorted(report["missing_keys"]):  # transformers would initialise them at random
        raise ModelError(f"model {name!r} lacks {len(missing)} of its weights, the first is {missing[0]}")
    if wrong := sorted(report["mismatched_keys"]):
        raise ModelError(f"model {name!r}: the sizes (stored, by config.json) of a weight differ: {wrong[0]}")
    if unused := sorted(key for key in report["unexpected_keys"] if "layers." in key and "inv_freq" not in key):
        raise ModelError(f"model {name!r} has {len(unused)} weights that its config does not use: {unused[0]!r}")
    if not digit:
        raise ModelError(f"model {name!r} has no usable tokenizer beside it: '1' encodes to nothing")
    if not (hasattr(model, "model") and hasattr(model.config, "num_key_value_heads")):
        raise ModelError(f"model {name!r}: {type(model).__name__} is not built like Llama, Qwen2 or Qwen3")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ModelError(f"model {name!r} has a bias on its vocabulary head, which ops/head.py does not support")
    rows = len(model.get_input_embeddings().weight)
    if (last := max(known - {tokenizer.pad_token_id})) >= rows:  # padding is never fed to the model
        raise ModelError(f"model {name!r}: its tokenizer has the id {last}, its embedding {rows} rows: resize that")
    model.generation_config.suppress_tokens = sorted(set(range(rows)) - known) or None
    model.set_attn_implementation("packed")
    return model.to(device or pick_device()).eval(), tokenizer


def stop_tokens(model: nn.Module, tokenizer, end_of_turn: int | None = None) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS, the generation config's, and the template's end of turn."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names no EOS token: set eos_token in its tokenizer_config.json")
    configured, rows = model.generation_config.eos_token_id, len(model.get_input_embeddings().weight)
    ids = [tokenizer.eos_token_id, end_of_turn, *(configured if isinstance(configured, list) else [configured])]
    for i in ids:
        if i is not None and (type(i) is not int or not 0 <= i < rows):
            raise ModelError(f"eos_token_id {i!r:.40} in config.json or generation_config.json is none of {rows} ids")
    return sorted(set(ids) - {None})


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
