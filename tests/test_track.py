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
from settings import SettingError, Settings


def package(monkeypatch, name):
    """An empty module that can be imported as `name`."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def tensorboard(monkeypatch):
    """A stand-in for TensorBoard; returns what its writers receive."""
    received = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            received.append(("open", folder.name, purge_step))

        def add_scalar(self, name, value, step):
            received.append((name, value, step))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            received.append(("close",))

    package(monkeypatch, "tensorboard")
    package(monkeypatch, "torch.utils.tensorboard").SummaryWriter = SummaryWriter
    return received


def wandb(monkeypatch, refuses=False):
    """A stand-in for W&B; returns what it receives."""
    received = []
    module = package(monkeypatch, "wandb")
    module.Error = type("Error", (Exception,), {})

    class Run:
        def log(self, values, step):
            received.append((values, step))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            received.append("finished")

    def init(**options):
        if refuses:
            raise module.Error("no API key configured\nlog in")
        received.append(options)
        return Run()

    module.init = init
    return received


def tracked(out, package, start, **settings):
    """(the context manager of a tracked run, its folder)."""
    folder = RunFolder(out)
    return run.tracked(folder, Settings(track=package, **settings), start), folder


def test_tensorboard_gets_each_number_and_drops_the_steps_that_are_repeated(tmp_path, monkeypatch):
    received = tensorboard(monkeypatch)
    context, folder = tracked(tmp_path, "tensorboard", 7)
    with context:
        folder.log("metrics", 8, {"reward": 0.5, "kl": None, "seconds": {"rl": 2}})
        folder.log("samples", 8, {"reward": 1.0})
    assert received == [("open", "tensorboard", 8), ("reward", 0.5, 8), ("seconds/rl", 2, 8), ("close",)]


def test_tensorboard_is_closed_when_a_run_breaks_off(tmp_path, monkeypatch):
    received = tensorboard(monkeypatch)
    with pytest.raises(SystemExit), tracked(tmp_path, "tensorboard", 0)[0]:
        raise SystemExit(1)
    assert received == [("open", "tensorboard", 0), ("close",)]


def test_wandb_gets_the_settings_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    received = wandb(monkeypatch)
    for start in (0, 2):
        context, folder = tracked(tmp_path, "wandb", start, lam=0.4)
        with context:
            folder.log("evals", start + 1, {"policy": {"n=3": 0.25}})
    first, *rest = received
    assert (first["config"]["lam"], first["name"], first["resume"]) == (0.4, tmp_path.name, "allow")
    assert first["id"]
    assert rest == [({"policy/n=3": 0.25}, 1), "finished", first, ({"policy/n=3": 0.25}, 3), "finished"]


def test_wandb_s_refusal_is_one_line(tmp_path, monkeypatch):
    wandb(monkeypatch, refuses=True)
    with pytest.raises(SettingError, match=r"^track: wandb refuses: no API key configured$"):
        tracked(tmp_path, "wandb", 0)[0].__enter__()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        bridge.main(["--preset", "smoke", "--out", str(tmp_path / "run"), "--track", name])
    assert f"track: the package {name} is not installed: pip install {name}" in str(stopped.value)
    assert not (tmp_path / "run").exists()


def test_a_run_sends_the_numbers_that_it_writes(tmp_path, monkeypatch):
    received = tensorboard(monkeypatch)
    flags = ["--preset", "smoke", "--out", str(tmp_path / "run"), "--track", "tensorboard"]
    bridge.main([*flags, "--steps", "1", "--eval-problems", "1"])
    records = read_log(tmp_path / "run" / "metrics.jsonl") + read_log(tmp_path / "run" / "evals.jsonl")
    written = [(n, value, r["step"]) for r in records for n, value in run.numbers(r).items() if n != "step"]
    assert sorted(received[1:-1]) == sorted(written)


def test_an_error_names_the_step_and_phase_in_which_it_occurred():
    timer = run.Timer(7)
    with pytest.raises(ValueError, match="no good") as error, timer("shadow"):
        raise ValueError("no good")
    assert error.value.__notes__ == ["rank 0 of 1, step 7, phase shadow"]


def test_tensorboard_itself_reads_back_the_curves_of_a_resumed_run(tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    for start, stop, value in ((0, 5, 0.25), (3, 6, 0.5)):  # killed after step 5, resumed at step 3
        context, folder = tracked(tmp_path, "tensorboard", start)
        with context:
            for step in range(start + 1, stop + 1):
                folder.log("metrics", step, {"reward": value})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward")
    assert [(e.step, e.value) for e in events] == [(1, 0.25), (2, 0.25), (3, 0.25), (4, 0.5), (5, 0.5), (6, 0.5)]
