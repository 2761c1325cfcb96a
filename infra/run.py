"""One run: its folder and logs, the timer of its steps, its signals, and its errors in one line."""

import json
import math
import os
import secrets
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from infra import cpu, parallel
from infra.files import (
    DataError,
    append_line,
    cut_back,
    printable,
    read_log,
    read_object,
    write_atomically,
    write_json,
)
from infra.model import pick_device
from ops.packed import ModelError, Row
from settings import SettingError, Settings, check

LOGS = ("metrics.jsonl", "evals.jsonl", "samples.jsonl", "tokens.jsonl.gz", "answers.jsonl.gz")  # lines with a "step"
ANSWER = ("group", "question", "answer", "response", "extracted", "correct", "finish_reason")  # what is kept of it
STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # signals that save and end a run
METRICS = (
    "reward", "right_frac", "response_tokens", "truncated_frac", "zero_std_groups", "entropy", "kl", "clip_frac",
    "sft_nll", "cooperative_gain", "gain_grad_norm", "grad_norm_theta", "grad_norm_w", "grad_norm_theta_hat",
    "ratio_hat_mean", "ratio_hat_max", "ratio_hat_limited", "logp_gap_mean", "logp_gap_max", "lora_norm",
    "sampled_tokens", "tokens_per_second", "skipped_in_a_row",
)  # fmt: skip

MAX_SKIPPED = 5  # updates with a loss or gradient that is not finite, without a clean step between, end the run
WINDOW = 10  # steps over which the groups without signal are counted
MAX_WITHOUT_SIGNAL = 0.75  # of the groups of a window; more than that is said once
MAX_LOGP_GAP = 0.1  # nats per token between sampler and trainer on the same weights end the run


class Diverged(RuntimeError):
    """Training that makes no sense to continue."""


@dataclass
class RunFolder:
    """The folder of a run. Rank 0 writes it; on other ranks the methods write nothing."""

    path: Path
    keep: str = "first"  # settings.KEEP, of the groups of a step
    keep_best: bool = False  # the checkpoint of the best evaluation
    tracker: Callable[[int, dict], object] | None = None  # gets a step and its record of metrics or accuracies
    # (zero_std_groups, right_frac) of the last steps
    signals: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    advised: bool = False  # that most groups have no signal

    def refuse_existing(self, unless: bool) -> None:
        """Raises SettingError on all ranks if the folder holds a run, unless this one resumes.

        Raises OSError if there can be no such folder, and DataError if it is not a run's.
        """
        files = set()
        with suppress(FileNotFoundError):  # any other error says why there can be no such folder
            files = {p.name for p in self.path.iterdir()} - {".lock", "config.json.tmp"}
        if parallel.broadcast(bool(files) and not unless):
            raise SettingError(f"{self.path} exists: --resume continues it, --out names another folder")
        if files:
            settings_of(self.path / "config.json")

    def begin(self, s: Settings, argv: list[str], step: int) -> None:
        """Prepares the folder for training from `step`, and writes config.json. Raises OSError, DataError."""
        if parallel.rank() > 0:
            return
        self.set_aside_model(s, step)
        for name in LOGS:
            cut_back(self.path / name, step)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        config = {"settings": asdict(s), "command": ["bridge.py", *argv], "versions": versions}
        write_json(self.path / "config.json", config)

    def set_aside_model(self, s: Settings, step: int) -> None:
        """Renames model/ and adapter/ to …-step-N, unless a finished run resumes at its end.

        So there is a model/ only if the run has finished at the steps in config.json.
        """
        if not (self.path / "model").exists():
            return
        finished = settings_of(self.path / "config.json").total_steps
        if step == finished == s.total_steps:
            return
        for folder in (self.path / "adapter", self.path / "model"):
            if folder.exists():
                aside = folder.with_name(f"{folder.name}-step-{finished}")
                shutil.rmtree(aside, ignore_errors=True)  # of infra.export, the same weights
                folder.rename(aside)

    def evaluations(self) -> dict[int, float]:
        """The accuracy of the policy at each evaluated step; the same on all ranks."""
        logged = read_log(self.path / "evals.jsonl") if parallel.rank() == 0 else []
        return parallel.broadcast({record["step"]: record["policy"]["average"] for record in logged})

    def best_step(self) -> int:
        """The evaluated step at which the policy is best, the earliest of equals; -1 if there is none."""
        accuracies = self.evaluations()
        return max(accuracies, key=accuracies.get, default=-1)

    def log(self, name: str, step: int, record: dict) -> None:
        """Appends a record to NAME.jsonl and sends metrics and evaluations to the tracker."""
        if parallel.rank() > 0:
            return
        append_line(self.path / f"{name}.jsonl", {"step": step} | record)
        if self.tracker and name != "samples":
            self.tracker(step, record)

    def log_evaluation(self, step: int, accuracies: dict[str, dict], answers: dict[str, list[dict]]) -> None:
        """Appends the accuracies and the graded answers of each model, answers as one column per field."""
        if parallel.rank() == 0:
            for model, records in answers.items():
                columns = {name: [record[name] for record in records] for name in ANSWER}
                append_line(self.path / "answers.jsonl.gz", {"step": step, "model": model} | columns)
        self.log("evals", step, accuracies)

    def log_metrics(self, step: int, metrics: dict[str, float], seconds: dict[str, float]) -> None:
        """Appends a step's metrics and its seconds by phase. A metric that the method lacks, or nan, becomes null."""
        record = {}
        for name in dict.fromkeys((*METRICS, *metrics)):
            value = metrics.get(name, math.nan)
            record[name] = float(f"{value:.6g}") if math.isfinite(value) else None
        self.log("metrics", step, record | {"seconds": {phase: round(t, 4) for phase, t in seconds.items()}})

    def watch_signal(self, step: int, metrics: dict[str, float], group_size: int) -> None:
        """Prints advice once, at the end of WINDOW steps of which most groups have no signal."""
        self.signals.append((metrics["zero_std_groups"], metrics["right_frac"]))
        if self.advised or len(self.signals) < WINDOW:
            return
        without_signal, right = (sum(shares) / WINDOW for shares in zip(*self.signals, strict=True))
        if without_signal > MAX_WITHOUT_SIGNAL:
            print0(f"step {step}: {advice_on_signal(without_signal, right, group_size)}")
            self.advised = True

    def log_samples(self, step: int, samples: list[dict]) -> None:
        """Appends completions with their rewards to samples.jsonl."""
        for sample in samples:
            self.log("samples", step, sample)

    def log_tokens(self, step: int, record: dict) -> None:
        """Appends completions and demonstrations with numbers per token, which report.html shows. Rank 0 calls it."""
        append_line(self.path / "tokens.jsonl.gz", {"step": step} | record)

    def dump_skipped(self, name: str, stats: dict, rollouts: list[Row], demonstrations: list[Row]) -> None:
        """Keeps the rows of a skipped update in skipped-NAME.json."""
        path = self.path / f"skipped-{name}.json"
        if parallel.rank() == 0:
            numbers = {name: str(value) for name, value in stats.items()}
            batch = {"rollouts": rollouts, "demonstrations": demonstrations}
            write_atomically(path, json.dumps({"stats": numbers, **batch}))
        print0(f"update {name}: a loss or gradient is not finite; no parameter was changed, the batch is in {path}")


@contextmanager
def alone(path: Path, lock: Path) -> Iterator[None]:
    """Refuses the block to a second process for the same `path`, by a lock that the kernel frees if a process dies.

    Raises SettingError on all ranks. Where there are no locks, on Windows and some network disks, it refuses nobody.
    """
    is_first = parallel.rank() == 0
    is_taken = False
    made = False
    if is_first:
        made = not lock.parent.exists()
        lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock if is_first else os.devnull, "a") as file:
        try:
            import fcntl

            os.register_at_fork(after_in_child=file.close)  # a child may outlive this process
            if is_first:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_taken = os.fstat(file.fileno()).st_nlink == 0  # its owner has just deleted it
        except BlockingIOError:
            is_taken = True
        except (ImportError, OSError):
            pass
        if parallel.broadcast(is_taken):
            raise SettingError(f"{path} is in use by another process: wait for its end, or choose another --out")
        try:
            yield
        finally:
            if is_first:
                with suppress(OSError):
                    lock.unlink()
                    if made:
                        lock.parent.rmdir()  # a failed set-up has left nothing else in it


def advice_on_signal(without_signal: float, right: float, group_size: int) -> str:
    """Why a share of the groups has no RL gradient, and what to change.

    right: the share of right samples, nan if unknown. If each prompt had this chance p of a right sample, all G would
    be equal with probability p^G + (1−p)^G.
    """
    text = f"in the last {WINDOW} steps {without_signal:.0%} of the groups had equal rewards, so no RL gradient"
    if right == 0:
        return f"{text}: no sample was right. Begin with SFT (--method sft_rl), or with easier problems"
    if right > 0:
        expected = right**group_size + (1 - right) ** group_size
        formula = f"p^G + (1−p)^G at p = {right:.2f}, G = {group_size}"
        text += f"; with prompts of equal difficulty it would be {expected:.0%}, {formula}"
    return f"{text}. Raise --group-size, draw other prompts by --dynamic-sampling, or choose problems near p = 0.5"


def stop_if_diverged(metrics: dict[str, float], step: int, folder: Path) -> None:
    """Prints advice where most completions are truncated. Raises Diverged where going on makes no sense."""
    truncated = metrics.get("truncated_frac", 0.0)
    if truncated > 0.5:
        print0(f"step {step}: {truncated:.0%} of the completions were truncated; raise max_new_tokens?")
    skipped = metrics["skipped_in_a_row"]
    if skipped >= MAX_SKIPPED:
        raise Diverged(
            f"{skipped} updates had a loss or gradient that is not finite, with no clean step between: look into "
            f"{folder}/skipped-*.json, or start again with a lower alpha or beta and another --out"
        )
    gap = metrics.get("logp_gap_mean", 0.0)
    if gap > MAX_LOGP_GAP:
        raise Diverged(
            f"sampler and trainer disagree by {gap:.3f} nats per token on the same weights (logp_gap_mean): the "
            "rollouts would be off-policy"
        )


def settings_of(path: Path) -> Settings:
    """The settings in a run's config.json or facts.json. Raises DataError, naming file and setting, and OSError."""
    try:
        s = Settings(**read_object(path)["settings"])
        check(replace(s, track=""))  # the tracker's package is not needed any more
    except (KeyError, TypeError, SettingError) as error:
        raise DataError(f"{path}: no settings of this version ({error})") from error
    return s


def numbers(record: dict) -> dict[str, float]:
    """The numbers of a record without null, those of an inner object under joined names.

    >>> numbers({"reward": 0.5, "kl": None, "seconds": {"sample": 1.5}})
    {'reward': 0.5, 'seconds/sample': 1.5}
    """
    flat = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": number for inner, number in value.items()}
        elif value is not None:
            flat[name] = value
    return flat


@contextmanager
def tracked(folder: RunFolder, s: Settings, start: int) -> Iterator[None]:
    """Sends the folder's records to the package `s.track` ("", "tensorboard" or "wandb") during the block.

    A run that resumes at step `start` continues its curves: TensorBoard drops the steps beyond `start`. W&B keeps its
    first record of them, which has the same numbers.
    """
    if parallel.rank() > 0 or not s.track:
        yield
    elif s.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder.path / "tensorboard", purge_step=start + 1) as writer:

            def add_scalars(step: int, record: dict) -> None:
                for name, value in numbers(record).items():
                    writer.add_scalar(name, value, step)

            folder.tracker = add_scalars
            yield
    else:
        import wandb

        id_file = folder.path / "wandb-id.txt"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        names = dict(project="bridge", name=folder.path.name, id=id_file.read_text(), resume="allow")
        with wandb.init(**names, dir=folder.path, config=asdict(s)) as run:
            folder.tracker = lambda step, record: run.log(numbers(record), step=step)
            yield


class Timer:
    """Seconds of one step by phase. Adds rank, step and phase to any exception."""

    def __init__(self, step: int):
        self.step = step
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with torch.profiler.record_function(phase):
                yield
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        except BaseException as error:
            error.add_note(f"rank {parallel.rank()} of {parallel.world_size()}, step {self.step}, phase {phase}")
            raise
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class StopSignal:
    """The signals STOPS end the loop after the current step; a second SIGINT or SIGTERM ends the process at once.

    Under torchrun a second one changes nothing, since torchrun repeats a signal that the terminal sent to all ranks.
    Nor does a second SIGHUP: shell and kernel each send one when a terminal closes.
    """

    def __init__(self):
        self.requested: signal.Signals | None = None
        self.before: dict[int, object] = {}  # the handlers to restore
        with suppress(ValueError):  # a thread can install none
            for number in signal.Signals:
                is_nohup = number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
                if number.name in STOPS and not is_nohup:
                    self.before[number] = signal.signal(number, self._handle)

    def release(self) -> None:
        """Restores the handlers: a signal after the last step ends the process, or reaches a notebook's own."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        self.requested = signal.Signals(number)
        if number in (signal.SIGINT, signal.SIGTERM) and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        text = f"\n{self.requested.name}: finishing this step, then saving\n".encode()
        for stream, line in ((1, text), (2, b"")):
            try:
                os.write(stream, line)  # print is not reentrant
            except OSError:  # the terminal has closed: what the step prints must not end the run
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def on_any_rank(self) -> bool:
        """Whether some rank received a signal; then all have it as `requested`. All ranks call it after every step."""
        number = max(parallel.all_gather([self.requested or 0]))
        if number > 0:
            self.requested = signal.Signals(number)
        return number > 0

    def exit(self, step: int) -> NoReturn:
        print0(f"stopped by {self.requested.name} after step {step}; everything is saved, --resume continues")
        parallel.end()  # torchrun ends all ranks when the first one exits
        sys.exit(128 + self.requested)


def print0(text: str) -> None:
    """Prints on rank 0, above the progress bar."""
    if parallel.rank() == 0:
        tqdm.write(printable(text))
        sys.stdout.flush()


def progress(items: list, text: str) -> tqdm:
    """The items, with a bar on rank 0 if reading them takes more than a second and a terminal shows it."""
    return tqdm(items, text, leave=False, delay=1, disable=parallel.rank() > 0 or None)


def empty_cache() -> None:
    """Returns free GPU memory to the driver: blocks cached by one stream or graph pool do not serve another."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe(s: Settings, parameters: dict[str, list[nn.Parameter]], data: dict[str, str]) -> str:
    """What the run is about to do. parameters: by set; data: titled lines about the task."""
    changed = []
    for f in fields(s):
        value = getattr(s, f.name)
        if value != f.default:
            changed.append(f"{f.name}={value}")

    sizes = []
    for name, tensors in parameters.items():
        size = sum(p.numel() for p in tensors)
        sizes.append(f"{name} {size:,}")
    world = parallel.world_size()
    gpus = torch.cuda.device_count()
    place = f"{pick_device()} with {torch.get_num_threads()} threads"
    if world > 1:
        sharded = ", sharded" if s.shard else ""
        place = f"{world} ranks{sharded}, each {place}"
    elif gpus > 1:
        place += f"; torchrun --standalone --nproc-per-node {gpus} would use all {gpus} GPUs"

    lines = {
        "settings": f"the defaults, but {' '.join(changed)}" if changed else "the defaults",
        "trainable": f"{', '.join(sizes)} parameters, on {place}",
        **data,
    }
    if s.dtype == "bfloat16" and pick_device().type == "cpu":
        slowdown = cpu.slowdown_of_bf16()
        if slowdown > 2:
            times = f"{slowdown:.0f} times as long in bfloat16 as in float32"
            lines["dtype"] = f"this CPU takes {times}: --dtype float32 saves time"
    return "\n".join(f"{title:<10}{text}" for title, text in lines.items())


MEMORY_SETTINGS = "in sampling lower --sampler-slots, else --tokens-per-micro-batch, or raise --checkpoint-layers"
EXPECTED = (SettingError, DataError, ModelError, Diverged, FloatingPointError, SafetensorError, OSError)


@contextmanager
def one_line_errors(program: str, when_full: str = MEMORY_SETTINGS) -> Iterator[None]:
    """Ends the process with one line for an error that the user can mend, for full GPU memory and for Ctrl-C.

    when_full: what to change when a GPU is out of memory.
    """
    name = program
    if "RANK" in os.environ:
        name = f"{program}, rank {os.environ['RANK']}"
    try:
        yield
        sys.stdout.flush()  # a full disk or a closed pipe shows here
    except (*EXPECTED, torch.OutOfMemoryError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            text = f"out of GPU memory: {when_full}: {text}"
        notes = getattr(error, "__notes__", [])  # of Timer
        if notes:
            text += f" ({'; '.join(notes)})"
        parallel.fail(f"{name}: {text}")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command continues, of bridge.py with --resume")
        sys.exit(128 + signal.SIGINT)
