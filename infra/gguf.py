"""Writes the model in a GGUF file as a transformers folder, dequantised to fp32.

python -m infra.gguf FILE FOLDER; FILE may also name an installed package that contains a GGUF file.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from infra.files import atomic_folder
from infra.model import reading, write_model
from infra.run import one_line_errors
from ops.packed import ModelError
from settings import expand, start_program


def find_file(name: str) -> Path:
    """The GGUF file of this name, or the first one in the installed package of this name. Raises ModelError."""
    if Path(name).is_file():
        return Path(name)
    package = name.replace("-", "_")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ModelError(f"there is no file and no installed package {name!r}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelError(f"the package {name} contains no GGUF file")
    return files[0]


def split_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    """Splits digits one by one before byte-level BPE, as SmolLM's tokenizer does. GGUF files only name that rule."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)


def convert(file: Path, folder: Path) -> None:
    """Writes fp32 weights, config and tokenizer of a GGUF file into a new folder. Raises ModelError."""
    if folder.exists():
        raise ModelError(f"{folder} exists: name another folder")
    with reading(f"{file} is no GGUF file that transformers can read"):
        from gguf import GGUFReader

        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        rule = GGUFReader(file).get_field("tokenizer.ggml.pre")
        if rule is not None and rule.contents() == "smollm":
            split_digits(tokenizer)
        dequantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # transformers saves no model that it loaded from a GGUF file, so the weights move to a fresh one.
        config = dequantised.config
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(dequantised.state_dict())
    with atomic_folder(folder) as scratch:
        write_model(scratch, model, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.gguf", description="Writes the model in a GGUF file as a folder for --model."
    )
    parser.add_argument("file", type=expand, metavar="FILE", help="a GGUF file, or a package that contains one")
    parser.add_argument("folder", type=expand, metavar="FOLDER", help="the new folder")
    args = parser.parse_args()
    with one_line_errors("infra.gguf"):
        convert(find_file(args.file), Path(args.folder))
        print(args.folder)


if __name__ == "__main__":
    start_program()
    main()
