"""Tiny random models on the CPU. Every test is deterministic."""

import contextlib
import json
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; read when transformers is imported

import pytest
import torch

if not torch.cuda.is_available():  # kernels that a test asks for run on the CPU; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import ops.packed  # noqa: F401  registers the packed attention
from infra import checkpoint

torch.set_num_threads(1)  # the models are tiny: two threads only get in each other's way
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
VOCABULARY = 37


def tiny_model(family: str = "qwen2", seed: int = 0, tied: bool = True):
    """Two layers, 4 heads on 2 key-value heads, weights large enough for attention and next tokens to be peaked."""
    torch.manual_seed(seed)
    config = CONFIGS[family](
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, head_dim=8,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    model.set_attn_implementation("packed")
    return model


def rows(count: int, seed: int = 0, longest: int = 9):
    """Random (prompt, response) pairs of unequal lengths."""
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        n = int(torch.randint(low, high, (), generator=g))
        return torch.randint(1, VOCABULARY, (n,), generator=g).tolist()

    return [(ids(1, 6), ids(1, longest)) for _ in range(count)]


def lines(path):
    """The objects of a file with one JSON object per line."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def tensors_in(folder):
    """All tensors of the newest checkpoint in `folder`, by name."""
    saved = checkpoint.newest(folder)
    tensors = {name: torch.zeros(shape) for name, shape in saved.shapes.items()}
    saved.load(tensors)
    return tensors


def exact(hidden, weight, targets, temperature=1.0):
    """logprob.token_logprobs in fp64."""
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.fixture(params=CONFIGS)
def any_model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """finished_run(*flags) is the folder of a smoke run with these flags, made once and shared: read it only.

    The file `stdout` beside the folder holds what the run printed.
    """
    import bridge

    folders = {}

    def folder_of(*flags: str) -> Path:
        if flags not in folders:
            folders[flags] = tmp_path_factory.mktemp("runs") / "run"
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            with open(folders[flags].parent / "stdout", "w") as file, contextlib.redirect_stdout(file):
                bridge.main(["--preset", "smoke", "--out", str(folders[flags]), *flags])
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return folders[flags]

    return folder_of
