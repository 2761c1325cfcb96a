"""infra/run.py: the numbers that trackers get, with stand-ins for the packages and with TensorBoard itself."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

import bridge
from infra import run
from infra.files import read_log
from infra.run import RunFolder
from settings import Settings


class StandIn(ModuleType):
    """A package that is also its own writer or run; `received` has what it was given."""

    def __init__(self, monkeypatch, *names):
        super().__init__(names[0])
        self.__spec__ = ModuleSpec(names[0], None)
        self.received = []
        for name in names:
            monkeypatch.setitem(sys.modules, name, self)

    def open(self, *arguments, **options):
        self.received.append((*arguments, options))
        return self

    SummaryWriter = init = open

    def add_scalar(self, name, value, step):
        self.received.append((name, value, step))

    def log(self, values, step):
        self.received.append((values, step))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.received.append("closed")


def test_a_run_sends_the_numbers_that_it_writes_to_tensorboard(tmp_path, monkeypatch):
    tensorboard = StandIn(monkeypatch, "tensorboard", "torch.utils.tensorboard")
    out = tmp_path / "run"
    flags = ["--preset", "smoke", "--method", "sft", "--out", str(out), "--track", "tensorboard"]
    bridge.main([*flags, "--steps", "1", "--eval-problems", "1"])
    first, *numbers, last = tensorboard.received
    assert (first, last) == ((out / "tensorboard", {"purge_step": 1}), "closed")
    records = read_log(out / "metrics.jsonl") + read_log(out / "evals.jsonl")
    written = [(n, value, r["step"]) for r in records for n, value in run.numbers(r).items() if n != "step"]
    assert sorted(numbers) == sorted(written)


def test_wandb_gets_settings_and_numbers_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    wandb = StandIn(monkeypatch, "wandb")
    for start in (0, 2):
        folder = RunFolder(tmp_path)
        with run.tracked(folder, Settings(track="wandb", lam=0.4), start):
            folder.log("evals", start + 1, {"policy": {"n=3": 0.25}})
            folder.log("samples", start + 1, {"reward": 1.0})  # the text of a sample is not sent
    first, *rest = wandb.received
    (options,) = first
    assert (options["config"]["lam"], options["name"], options["resume"]) == (0.4, tmp_path.name, "allow")
    assert options["id"]
    assert rest == [({"policy/n=3": 0.25}, 1), "closed", first, ({"policy/n=3": 0.25}, 3), "closed"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        bridge.main(["--preset", "smoke", "--out", str(tmp_path / "run"), "--track", name])
    assert f"track: the package {name} is not installed: pip install {name}" in str(stopped.value)
    assert not (tmp_path / "run").exists()


def test_tensorboard_itself_reads_back_the_curves_of_a_resumed_run(tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    for start, stop, value in ((0, 5, 0.25), (3, 6, 0.5)):  # killed after step 5, resumed at step 3
        folder = RunFolder(tmp_path)
        with run.tracked(folder, Settings(track="tensorboard"), start):
            for step in range(start + 1, stop + 1):
                folder.log("metrics", step, {"reward": value})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward")
    assert [(e.step, e.value) for e in events] == [(1, 0.25), (2, 0.25), (3, 0.25), (4, 0.5), (5, 0.5), (6, 0.5)]


def test_an_error_names_the_step_and_phase_in_which_it_occurred():
    timer = run.Timer(7)
    with pytest.raises(ValueError, match="no good") as error, timer("shadow"):
        raise ValueError("no good")
    assert error.value.__notes__ == ["rank 0 of 1, step 7, phase shadow"]
