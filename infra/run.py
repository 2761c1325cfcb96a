"""Watching a run: its numbers in TensorBoard or W&B as well as in the log files, and traces of single steps.

Neither package is needed; the one that --track names is imported, and nothing else.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from settings import SettingError

Log = Callable[[int, dict], None]  # step and its record, as in metrics.jsonl and evals.jsonl


def nowhere(step: int, record: dict) -> None:
    """The log of a run that nobody tracks."""


def numbers(record: dict, prefix: str = "") -> dict[str, float]:
    """A record's numbers under one level of names; `step`, text and null are left out.

    >>> numbers({"step": 3, "reward": 0.5, "kl": None, "seconds": {"sample": 1.5}})
    {'reward': 0.5, 'seconds/sample': 1.5}
    """
    out: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            out |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and prefix + name != "step":
            out[prefix + name] = value
    return out


@contextmanager
def tracked(package: str, out: Path, settings: dict, start: int) -> Iterator[Log]:
    """A `Log` that sends what it is given to `package` ("", "tensorboard" or "wandb"), closed at the end.

    A run resumed at step `start` continues its curves. TensorBoard drops what lies beyond `start`; W&B keeps what it
    has and ignores those steps when they come again, with the same numbers. Raises SettingError if W&B refuses.
    """
    match package:
        case "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out / "tensorboard", purge_step=start + 1 if start else 0)

            def log(step: int, record: dict) -> None:
                for name, value in numbers(record).items():
                    writer.add_scalar(name, value, step)

            try:
                yield log
            finally:
                writer.close()
        case "wandb":
            import wandb

            id_file = out / "wandb-id.txt"
            if not id_file.exists():
                id_file.write_text(secrets.token_hex(8))
            id = id_file.read_text()
            try:
                run = wandb.init(project="bridge", name=out.name, id=id, resume="allow", dir=out, config=settings)
            except wandb.Error as error:
                raise SettingError(f"track: wandb refuses: {str(error).splitlines()[0]}") from error
            with run:
                yield lambda step, record: run.log(numbers(record), step=step)
        case _:
            yield nowhere


def profiled(iterations: Iterable[int], steps: range, out: Path) -> Iterator[int]:
    """The iterations k, with a trace of what is done in those whose step k+1 is in `steps`.

    The trace goes to OUT/profile-step-000003.json.gz, which ui.perfetto.dev and chrome://tracing show; the phases of
    the step's clock are ranges in it. Tracing slows a step down.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    for k in iterations:
        if k + 1 not in steps:
            yield k
            continue
        with profile(activities=activities) as trace:
            yield k
        trace.export_chrome_trace(str(out / f"profile-step-{k + 1:06d}.json.gz"))
