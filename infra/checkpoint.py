"""Checkpoints that survive kill -9, a full disk and a damaged one, for any number of ranks.

A folder named step-* is complete; digests of its files detect later damage. torch writes the tensors, each rank its
slices.
"""

import hashlib
import io
import json
import math
import os
import pickle
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor

from infra import parallel
from infra.files import write_json
from infra.run import print0
from settings import METHODS, SettingError, Settings, may_change_on_resume

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended for a single process
KEEP = 2  # newest checkpoints of a run; older ones are deleted, but for the best
FILE = 2**30  # bytes
Optimizers = dict[str, torch.optim.Optimizer]  # by name: theta, w, theta_hat, omega, theta_sft


def save(folder: Path, step: int, facts: dict, tensors: dict[str, Tensor], best: int | None = None) -> None:
    """Writes `facts` of JSON's types, and tensors that are sharded or equal on all ranks. Raises OSError on failure.

    Deletes all checkpoints but the last two and that of the step `best`.
    """
    final = folder / f"step-{step:06d}"
    scratch = final.with_suffix(".tmp")
    try:
        if parallel.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)  # a kill can leave it behind
            scratch.mkdir(parents=True)
            write_json(scratch / "facts.json", facts)
        parallel.broadcast(None)  # a barrier: rank 0's folder exists
        dcp.save(tensors, storage_writer=_Writer(scratch, tensors), no_dist=parallel.world_size() == 1)
        # Each rank reads back what it has written.
        written = [*scratch.glob(f"__{parallel.rank()}_*")]
        if parallel.rank() == 0:
            written += [scratch / "facts.json", scratch / ".metadata"]
        digests = parallel.all_gather([(file.name, _digest(file)) for file in written])
        if parallel.rank() == 0:
            write_json(scratch / "digests.json", dict(digests))
            shutil.rmtree(final, ignore_errors=True)  # the same step of an earlier attempt
            os.replace(scratch, final)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:  # torch's three reports of a failed write
        shutil.rmtree(scratch, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]  # torch's report contains a traceback
        earlier = "earlier checkpoints are intact" if steps_in(folder) else "there is no earlier checkpoint"
        raise OSError(f"could not write {final}: {reason}; {earlier}; free space and --resume") from error
    if parallel.rank() == 0:
        saved = steps_in(folder)
        keep = [s for s in saved if s <= step][-KEEP:]  # a later one is damaged, or the run would have resumed there
        for s, path in saved.items():
            if s not in (*keep, best):
                shutil.rmtree(path, ignore_errors=True)
    parallel.broadcast(None)  # a barrier: the checkpoint is complete


def steps_in(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, in order, intact or not."""
    folders = {int(p.name[5:]): p for p in folder.glob("step-*") if p.name[5:].isdecimal()}
    return dict(sorted(folders.items()))


@dataclass
class Saved:
    """A complete checkpoint: its facts and the shapes of its tensors, which are still on the disk."""

    folder: Path
    facts: dict
    shapes: dict[str, torch.Size]

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fills `tensors`, with the names and shapes of the checkpoint, in place. All ranks call it."""
        dcp.load(tensors, storage_reader=_Reader(self.folder), no_dist=parallel.world_size() == 1)

    def restore(self, optimizers: Optimizers) -> None:
        """Overwrites the parameters and the state of their optimizers, of any class in torch.optim.

        Raises SettingError if names or shapes differ from the checkpoint's.
        """
        with_state = {".".join(name.split(".")[:2]) for name in self.shapes if name.count(".") > 1}
        for name, optimizer in optimizers.items():
            parameters = optimizer.param_groups[0]["params"]
            make_state(optimizer, [p for i, p in enumerate(parameters) if f"{name}.{i}" in with_state])
        tensors = state_tensors(optimizers)
        for name in sorted(tensors.keys() | self.shapes.keys()):
            if name not in tensors or tensors[name].shape != self.shapes.get(name):
                raise SettingError(f"model or optimizer: {name} differs from that in {self.folder}: use another --out")
        self.load(tensors)


def make_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Lets an optimizer allocate the state of these parameters, by a step with gradients of 0. It may change both."""
    for p in parameters:
        p.grad = torch.zeros_like(p)
    if parameters:
        optimizer.step()
    optimizer.zero_grad()


def state_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """Every parameter and state of an optimizer by name: theta.0, theta.0.exp_avg, …; a parameter of two only once.

    Raises TypeError if an optimizer has state that is not a tensor.
    """
    tensors = {}
    names = {}  # parameter -> its name
    for name, optimizer in optimizers.items():
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            names.setdefault(p, f"{name}.{i}")
            tensors[names[p]] = p.detach()
            for key, value in optimizer.state.get(p, {}).items():
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"optimizer {name}: its state {key!r} is no tensor, and a checkpoint has tensors only"
                    )
                tensors[f"{name}.{i}.{key}"] = value
    return tensors


def refuse_other_run(facts: dict, s: Settings, fingerprints: dict[str, str], out: Path) -> None:
    """Raises SettingError if a checkpoint belongs to a run with other settings, data, code or another initial model.

    `fingerprints` are those of "data", "model", "reward" and "task": all may have moved to another path since.
    """
    schedule = METHODS[s.method].schedule
    for name, value in asdict(s).items():
        saved = facts["settings"].get(name)
        reason = ""
        if name == "steps" and schedule:
            reason = f", and {s.method} changes {schedule} over all steps"
        is_moved = name == "reward" and value.rpartition(":")[2] == str(saved).rpartition(":")[2]  # by its function
        if value != saved and not is_moved and (reason or not may_change_on_resume(name)):
            values = f"{name} is {value!r}, the run in {out} has {saved!r}"
            raise SettingError(f"{values}{reason}: use that, or another --out")
    sources = {
        "data": "task, rl_data, sft_data or eval_data",
        "model": "model: its weights or its tokenizer",
        "reward": f"reward: the code of {s.reward}",
        "task": f"task: the code of {s.task}",
    }
    for kind, text in sources.items():
        if facts.get(kind, "") != fingerprints[kind]:
            raise SettingError(f"{text} changed since the run in {out} began: restore them, or use another --out")
    if facts["step"] > s.total_steps:
        last = f"the last step is {s.total_steps}"
        raise SettingError(f"steps is {s.steps}: {last}, but the run in {out} is at step {facts['step']} already")


def newest(folder: Path, step: int | None = None) -> Saved | None:
    """The newest intact checkpoint, or that of `step`, the same on all ranks; None without one.

    Raises OSError if all are damaged.
    """
    paths = parallel.broadcast(steps_in(folder))
    candidates = [paths[s] for s in reversed(paths) if step in (None, s)]
    for path in candidates:
        saved = None
        problem = ""
        try:
            saved = _verified(path)
        except Exception as error:  # damaged bytes raise many types: json, pickle, unicode, …
            problem = f"{type(error).__name__}: {error}"
        problems = [p for p in parallel.all_gather([problem]) if p]  # each rank has checked some of the files
        if not problems:
            return saved
        print0(f"checkpoint {path} is damaged ({problems[0]:.200})")
    if candidates:
        raise OSError(f"no checkpoint in {folder} is intact: start again with another --out")
    print0(f"no checkpoint in {folder}: starting at step 0")
    return None


def _verified(path: Path) -> Saved:
    """Reads facts and shapes, and compares the digests of this rank's share of the files."""
    digests = json.loads((path / "digests.json").read_text())
    for name in sorted(digests)[parallel.rank() :: parallel.world_size()]:
        if _digest(path / name) != digests[name]:
            raise ValueError(f"{name} is not as it was written")
    facts = json.loads((path / "facts.json").read_text())
    entries = _Reader(path).read_metadata().state_dict_metadata
    return Saved(path, facts, {name: entry.size for name, entry in entries.items()})


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Writer(FileSystemWriter):
    """Writes a rank's tensors in files of about FILE bytes, one after the other: torch keeps an open file in memory."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]):
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
        files = math.ceil(sum(t.nbytes for t in local) / FILE)
        super().__init__(path, sync_files=True, thread_count=files, per_thread_copy_ahead=0)
        self.fs = _Files()

    def _write_data(self, planner, files):
        self.thread_count = 1  # the thread count set the number of files; more threads would open all at once
        return super()._write_data(planner, files)


class _Files(FileSystem):
    """Names the file that cannot be written: torch's error would hide the system's."""

    @contextmanager
    def create_stream(self, path: Path, mode: str):
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except (OSError, RuntimeError) as error:
            raise OSError(f"{path}: {error.__context__ or error}") from error


class _Reader(FileSystemReader):
    """Reads a checkpoint's table of contents, a pickle, which may construct only the types in ALLOWED."""

    def read_metadata(self, *args, **kwargs):
        metadata = _Unpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        metadata.storage_meta = None
        return metadata


ALLOWED = {
    "torch.distributed.checkpoint.metadata": {"Metadata", "TensorStorageMetadata", "TensorProperties", "StorageMeta",
                                              "ChunkStorageMetadata", "MetadataIndex", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "bfloat16", "int64"},
    "pathlib": {"Path", "PosixPath"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11.0 to 3.11.3 pickle a member of an enumeration
            return lambda _, member: dcp.metadata._MEM_FORMAT_ENCODING[member]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
