"""Tiny random models on the CPU. Every test is deterministic."""

import contextlib
import copy
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; read when transformers is imported

import pytest
import torch

if not torch.cuda.is_available():  # kernels that a test asks for run on the CPU; read when triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

import bridge
import plot
from infra import checkpoint
from infra.model import MODELS
from infra.run import STOPS
from tasks import loading

torch.set_num_threads(1)  # the models are tiny: two threads only get in each other's way
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))  # renews the pool before threads race for it
HANGS = 120  # seconds after which a process counts as hanging
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


def shipped_tokenizer(name: str = "arithmetic-laptop"):
    """A copy of the tokenizer of a built-in model. AutoTokenizer would add a padding token to those beside Qwen2."""
    return PreTrainedTokenizerFast.from_pretrained(MODELS / name)


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


class Forked:
    """A process that runs `command` and, forked from this one, has loaded everything already."""

    def __init__(self, command, **environment):
        self.logs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self.status, self.pid = None, os.fork()
        if self.pid:
            return
        for stream, log in enumerate(self.logs, 1):
            os.dup2(log.fileno(), stream)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
        os.environ |= environment
        status = 1
        try:
            command()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            print(ended.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self):
        """The exit status, minus the number of the signal that ended the process; None while it runs."""
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if ended else None
        return self.status

    def send(self, number):
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def finish(self):
        """(exit status, standard output, standard error) after the end."""
        deadline = time.monotonic() + HANGS
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                pytest.fail(f"process {self.pid} hangs")
            time.sleep(0.01)
        for log in self.logs:
            log.seek(0)
        return self.status, *(log.read() for log in self.logs)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def fork_ranks(command, ranks):
    """Runs `command` on several ranks; returns (exit status, standard output, standard error) of each."""
    world = dict(WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    processes = [Forked(command, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(ranks)]
    try:
        return [process.finish() for process in processes]
    finally:  # ranks wait for one that hangs
        for process in processes:
            process.send(signal.SIGKILL)


@pytest.fixture(params=CONFIGS)
def any_model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="session", autouse=True)
def _light_runs():
    """Runs draw no figures, and equal large tasks are encoded once: both take as long as the steps of a smoke run."""
    real, known = loading.prepare, {}

    def prepare(task, tokenizer, *limits):
        if len(task.problems) < 1000:
            return real(task, tokenizer, *limits)
        extras, encoder = [p.extra for p in task.problems], tokenizer.backend_tokenizer.to_str()
        key = repr((task, extras, encoder, tokenizer.chat_template, tokenizer.special_tokens_map, limits))
        if key not in known:
            known[key] = real(task, tokenizer, *limits), vars(task).copy()
        rows, fields = known[key]
        vars(task).update({name: copy.copy(value) for name, value in fields.items()})
        return list(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "prepare", prepare)
        patch.setattr(bridge, "plot", SimpleNamespace(draw=lambda runs, out: None))
        yield


@pytest.fixture(autouse=True)
def _forget_files_of_users(tmp_path_factory):
    """A process loads one user's file of a name; each test is a user of its own."""
    path = sys.path.copy()
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path_factory.getbasetemp())):
            del sys.modules[name]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """finished_run(*flags) is the folder of a smoke run with these flags, made once and shared: read it only.

    The run draws its figures. The file `stdout` beside the folder holds what it printed.
    """
    folders = {}

    def folder_of(*flags: str) -> Path:
        if flags not in folders:
            folders[flags] = tmp_path_factory.mktemp("runs") / "run"
            handlers = {number: signal.getsignal(number) for number in signal.Signals if number.name in STOPS}
            with (
                open(folders[flags].parent / "stdout", "w") as file,
                contextlib.redirect_stdout(file),
                pytest.MonkeyPatch.context() as patch,
            ):
                patch.setattr(bridge, "plot", plot)
                bridge.main(["--preset", "smoke", "--out", str(folders[flags]), *flags])
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return folders[flags]

    return folder_of
