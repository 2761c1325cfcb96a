"""track.py: what trackers and traces are given, with stand-ins for the packages and with TensorBoard itself."""

import gzip
import importlib
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

import bridge
import settings
from infra import run as track
from plot import read
from settings import SettingError


def package(monkeypatch, name):
    """An empty module that can be imported as `name`."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def tensorboard(monkeypatch):
    """A stand-in for TensorBoard; returns what its writers are told."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append(("open", folder.name, purge_step))

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def close(self):
            told.append(("close",))

    package(monkeypatch, "tensorboard")
    package(monkeypatch, "torch.utils.tensorboard").SummaryWriter = SummaryWriter
    return told


def wandb(monkeypatch, refuses=False):
    """A stand-in for W&B; returns what it is told."""
    told = []
    module = package(monkeypatch, "wandb")
    module.Error = type("Error", (Exception,), {})

    class Run:
        def log(self, values, step):
            told.append((values, step))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            told.append("finished")

    def init(**options):
        if refuses:
            raise module.Error("no API key configured\nlog in")
        told.append(options)
        return Run()

    module.init = init
    return told


def test_tensorboard_gets_each_number_and_drops_the_steps_that_are_done_again(tmp_path, monkeypatch):
    told = tensorboard(monkeypatch)
    with track.tracked("tensorboard", tmp_path, {}, 7) as log:
        log(8, {"step": 8, "reward": 0.5, "kl": None, "seconds": {"rl": 2}})
    assert told == [("open", "tensorboard", 8), ("reward", 0.5, 8), ("seconds/rl", 2, 8), ("close",)]


def test_tensorboard_is_closed_when_a_run_breaks_off(tmp_path, monkeypatch):
    told = tensorboard(monkeypatch)
    with pytest.raises(SystemExit), track.tracked("tensorboard", tmp_path, {}, 0):
        raise SystemExit(1)
    assert told == [("open", "tensorboard", 0), ("close",)]


def test_wandb_gets_the_settings_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    told = wandb(monkeypatch)
    for start in (0, 2):
        with track.tracked("wandb", tmp_path, {"lam": 0.5}, start) as log:
            log(start + 1, {"step": start + 1, "policy": {"n=3": 0.25}})
    first, *rest = told
    assert (first["config"], first["name"], first["resume"]) == ({"lam": 0.5}, tmp_path.name, "allow")
    assert first["id"]
    assert rest == [({"policy/n=3": 0.25}, 1), "finished", first, ({"policy/n=3": 0.25}, 3), "finished"]


def test_wandb_s_refusal_is_one_line(tmp_path, monkeypatch):
    wandb(monkeypatch, refuses=True)
    with pytest.raises(SettingError, match=r"^track: wandb refuses: no API key configured$"):
        track.tracked("wandb", tmp_path, {}, 0).__enter__()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        bridge.main(["--preset", "smoke", "--out", str(tmp_path / "run"), "--track", name])
    assert f"track: the package {name} is not installed: pip install {name}" in str(stopped.value)
    assert not (tmp_path / "run").exists()


def test_a_run_sends_what_it_writes_and_traces_the_steps_it_is_asked_for(tmp_path, monkeypatch):
    told = tensorboard(monkeypatch)
    flags = ["--preset", "smoke", "--out", str(tmp_path / "run"), "--track", "tensorboard", "--profile-steps", "2-3"]
    bridge.main([*flags, "--steps", "3"])
    records = read(tmp_path / "run" / "metrics.jsonl") + read(tmp_path / "run" / "evals.jsonl")
    written = [(name, value, r["step"]) for r in records for name, value in track.numbers(r).items()]
    assert sorted(told[1:-1]) == sorted(written)
    traces = sorted((tmp_path / "run").glob("profile-*"))
    assert [t.name for t in traces] == ["profile-step-000002.json.gz", "profile-step-000003.json.gz"]
    with gzip.open(traces[0]) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"sample", "rl", "shadow", "sft", "optimizer"} <= names
    assert any(name.startswith("aten::") for name in names if name)


def test_a_step_that_breaks_off_leaves_no_trace_and_no_profiler_running(tmp_path):
    def loop():
        for _ in track.profiled(range(3), range(1, 2), tmp_path):
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        loop()
    assert not list(tmp_path.iterdir())
    assert list(track.profiled(range(2), range(2, 3), tmp_path)) == [0, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["profile-step-000002.json.gz"]


@pytest.mark.parametrize("text", ["0", "4-3", "x", "3-", "-3", "1,2", "٣", "0-2"])
def test_profile_steps_that_are_no_steps_are_refused(text):
    with pytest.raises(SettingError, match="profile_steps must be a step or a range of steps"):
        settings.profile_range(text)


def test_profile_steps_beyond_the_run_are_refused():
    settings.parse(["--steps", "5", "--profile-steps", "5-9"])
    settings.parse(["--steps", "5", "--profile-steps", "6", "--method", "sft_rl"])
    with pytest.raises(SettingError, match="profile_steps begins after the last step; got 6"):
        settings.parse(["--steps", "5", "--profile-steps", "6"])


def test_tensorboard_itself_reads_back_the_curves_of_a_resumed_run(tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    for start, stop, value in ((0, 5, 0.25), (3, 6, 0.5)):  # killed after step 5, resumed at step 3
        with track.tracked("tensorboard", tmp_path, {}, start) as log:
            for step in range(start + 1, stop + 1):
                log(step, {"step": step, "reward": value})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward")
    assert [(e.step, e.value) for e in events] == [(1, 0.25), (2, 0.25), (3, 0.25), (4, 0.5), (5, 0.5), (6, 0.5)]
