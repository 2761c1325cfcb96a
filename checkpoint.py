"""What makes a run folder survive kill -9 and a full disk: checkpoints that appear whole, logs cut back to them.

A checkpoint is one file, written under a temporary name and renamed, so a file called step-*.pt is complete
unless the disk has damaged it; then its checksums tell. The log files hold one JSON object per line with a "step";
resuming drops the lines of steps that the checkpoint does not know.
"""

import json
import os
import signal
import zipfile
from pathlib import Path

import torch

KEEP = 2  # checkpoints that are kept


def save(folder: Path, step: int, state: dict) -> None:
    """Writes `state` (tensors, numbers, strings and containers of them) as the checkpoint of `step`.

    Raises OSError when it cannot, the disk being full for one; earlier checkpoints are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}.pt"
    scratch = final.with_suffix(".tmp")
    try:
        with open(scratch, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        scratch.unlink(missing_ok=True)
        raise OSError(
            f"could not write {final}: {error}. Earlier checkpoints are intact; free space and --resume"
        ) from error
    os.replace(scratch, final)
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink()


def load_newest(folder: Path) -> dict | None:
    """The newest state that is whole, or None if there is no checkpoint at all; says which files are damaged.

    Raises OSError when there are checkpoints and every one of them is damaged.
    """
    paths = sorted(folder.glob("step-*.pt"), reverse=True)
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                if (broken := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"checksum of {broken} does not match")
            return torch.load(path, weights_only=True, map_location="cpu")
        except OSError:
            raise  # the disk's own trouble, not a damaged file
        except Exception as error:  # damaged bytes fail in a dozen ways: zip, zlib, pickle, unicode, …
            print(f"checkpoint {path} is damaged ({type(error).__name__}: {error}); trying the one before")
    if paths:
        raise OSError(f"every checkpoint in {folder} is damaged: start again with another --out")
    return None


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
    """SIGINT and SIGTERM ask the loop to end after this step; a second one ends the process at once."""

    def __init__(self):
        self.requested: signal.Signals | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame) -> None:
        self.requested = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(f"\n{self.requested.name}: finishing this step, then saving", flush=True)
