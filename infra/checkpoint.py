"""What makes a run folder survive kill -9 and a full disk: checkpoints that appear whole, logs cut back to them.

A checkpoint is a folder, filled under a temporary name and then renamed, so a folder called step-* is complete unless
the disk has damaged it; then its checksums tell. Tensors are written by torch.distributed.checkpoint, each rank its
slices, and can be read by any number of ranks. What else there is to know is in facts.json, so that nothing but tensors
is ever unpickled. The log files hold one JSON object per line with a "step"; resuming drops the lines of steps that the
checkpoint does not know.
"""

import io
import json
import os
import pickle
import shutil
import signal
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor

from infra import parallel

KEEP = 2  # checkpoints that are kept
FILE = 2**30  # bytes


def save(folder: Path, step: int, facts: dict, tensors: dict[str, Tensor]) -> None:
    """Writes the checkpoint of `step`: `facts` of JSON's types and tensors, sharded or the same on all ranks.

    All ranks call it; with several machines, `folder` must be on a disk that they share. Raises OSError when it cannot,
    the disk being full for one; earlier checkpoints are then untouched.
    """
    final = folder / f"step-{step:06d}"
    scratch = final.with_suffix(".tmp")
    try:
        if parallel.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)  # left by a kill
            scratch.mkdir(parents=True)
        parallel.first(None)  # rank 0's folder is there
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is but one process
            dcp.save(tensors, storage_writer=_Writer(scratch, tensors), no_dist=parallel.world() == 1)
        if parallel.rank() == 0:
            (scratch / "facts.json").write_text(json.dumps(facts))
            (scratch / "checksum").write_text(str(_checksum(scratch)))
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:  # torch reports a failed write in three ways
        shutil.rmtree(scratch, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]  # of torch's report, which has a traceback in it
        raise OSError(
            f"could not write {final}: {reason} Earlier checkpoints are intact; free space and --resume"
        ) from error
    if parallel.rank() == 0:
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved before a restart from an earlier one
        os.replace(scratch, final)
        for old in sorted(folder.glob("step-??????"))[:-KEEP]:
            shutil.rmtree(old)
    parallel.first(None)  # no rank goes on before the checkpoint is there


@dataclass
class Saved:
    """A checkpoint that is whole: its facts, and the shapes of its tensors, which are still on the disk."""

    folder: Path
    facts: dict
    shapes: dict[str, torch.Size]

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fills `tensors`, of the same names and shapes, in place, each rank its slices. All ranks call it."""
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            dcp.load(tensors, storage_reader=_Reader(self.folder), no_dist=parallel.world() == 1)


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint that is whole, or None if there is none at all; says which ones are damaged.

    Raises OSError when there are checkpoints and every one of them is damaged. All ranks get the same.
    """
    paths = parallel.first(sorted(folder.glob("step-??????"), reverse=True))
    for path in paths:
        problem = saved = None
        try:
            saved = _look_into(path)
        except Exception as error:  # damaged bytes fail in a dozen ways: zip, zlib, pickle, json, unicode, …
            problem = f"{type(error).__name__}: {error}"
        problems = [p for p in parallel.gather([problem]) if p]  # each rank has checked some of the files
        if not problems:
            return saved
        if parallel.rank() == 0:
            print(f"checkpoint {path} is damaged ({problems[0]}); trying the one before")
    if paths:
        raise OSError(f"every checkpoint in {folder} is damaged: start again with another --out")
    return None


def _look_into(path: Path) -> Saved:
    """Reads facts and names, and checks this rank's share of the tensors, each a small archive with a checksum."""
    if int((path / "checksum").read_text()) != _checksum(path):
        raise ValueError("the checksum of facts.json and .metadata does not match")
    facts = json.loads((path / "facts.json").read_text())
    metadata = _Reader(path).read_metadata()
    pieces = sorted(metadata.storage_data.values(), key=lambda piece: (piece.relative_path, piece.offset))
    for piece in pieces[parallel.rank() :: parallel.world()]:
        with open(path / piece.relative_path, "rb") as file:
            file.seek(piece.offset)
            content = io.BytesIO(file.read(piece.length))
        with zipfile.ZipFile(content) as archive:
            if (broken := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"checksum of {broken} in {piece.relative_path} does not match")
        content.seek(0)
        torch.load(content, weights_only=True)  # torch is stricter than zipfile
    return Saved(path, facts, {name: entry.size for name, entry in metadata.state_dict_metadata.items()})


def _checksum(path: Path) -> int:
    return zlib.crc32((path / "facts.json").read_bytes() + (path / ".metadata").read_bytes())


class _Writer(FileSystemWriter):
    """Writes a rank's tensors in files of about FILE bytes, one after the other.

    torch keeps in host memory what goes into a file until the file is complete, and with its default of one file and
    of copying ahead that is the whole checkpoint, in pinned memory if it comes from a GPU.
    """

    def __init__(self, path: Path, tensors: dict[str, Tensor]):
        mine = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors.values())
        super().__init__(path, sync_files=True, thread_count=-(-mine // FILE), per_thread_copy_ahead=0)

    def _write_data(self, planner, files):
        self.thread_count = 1  # there are as many files as were threads; these would hold all of them at a time
        return super()._write_data(planner, files)


class _Reader(FileSystemReader):
    """Reads a checkpoint's table of contents, a pickle, and lets it call nothing but what such a table needs."""

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = None
        return metadata


ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "_MEM_FORMAT_ENCODING", "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "bfloat16", "int64"},
    "pathlib": {"Path", "PosixPath"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def append(path: Path, record: dict) -> None:
    """Adds one line to a log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def cut_back(path: Path, step: int) -> None:
    """Keeps the lines of a log up to and including `step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            break  # torn by a kill: nothing follows it
    rewrite(path, "".join(kept))


def rewrite(path: Path, text: str) -> None:
    """The whole file at once: under a temporary name, then renamed, so that a kill leaves the old one or the new."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


class StopSignal:
    """SIGINT and SIGTERM ask the loop to end after this step; a second one ends the process at once.

    Not under torchrun: it passes on what the ranks have got from the terminal already, and kills them after 30 s.
    """

    def __init__(self):
        self.requested: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame) -> None:
        self.requested = signal.Signals(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(f"\n{self.requested.name}: finishing this step, then saving", flush=True)
