"""Whole runs of bridge.py on the smoke preset: outputs, exact resume, and what happens when things go wrong."""

import errno
import fcntl
import io
import itertools
import json
import math
import os
import pickle
import pty
import random
import re
import resource
import select
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partialmethod
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import HANGS, Forked, fork_ranks, lines, tensors_in
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import bridge
import evaluate
import grpo
import plot
from infra import checkpoint, report
from infra.files import DataError, append_line, cut_back, read_log, write_atomically
from infra.model import MODELS
from infra.run import METRICS, STOPS, RunFolder, StopSignal, advice_on_signal, alone
from sampler import Sampler
from settings import METHODS, SettingError, Settings, parse

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(autouse=True)
def _signals():
    before = {number: signal.getsignal(number) for number in signal.Signals if number.name in STOPS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup of the tests would ignore it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(out, *flags, steps=4):
    bridge.main(["--preset", "smoke", "--out", str(out), "--steps", str(steps), *flags])


def results(out):
    """All that must not differ between two ways to the same step."""
    metrics = [{k: v for k, v in m.items() if k not in TIMES} for m in lines(out / "metrics.jsonl")]
    state, tensors = checkpoint.newest(out / "checkpoint").facts, tensors_in(out / "checkpoint")
    weights = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    position = [state[name] for name in ("step", "prompts", "demos")]
    names = "evals.jsonl", "samples.jsonl", "tokens.jsonl.gz", "answers.jsonl.gz"
    logs = metrics, position, *(read_log(out / name) for name in names)
    return logs, [*tensors.values(), *weights.values()]


def assert_identical(a, b):
    (logs_a, tensors_a), (logs_b, tensors_b) = results(a), results(b)
    assert logs_a == logs_b
    assert len(tensors_a) == len(tensors_b)
    assert all(torch.equal(x, y) for x, y in zip(tensors_a, tensors_b, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_leaves_a_complete_folder(method, tmp_path, capsys):
    flags = ("--sft-steps", "1") if method == "sft_rl" else ()
    folder = tmp_path / "run"
    run(folder, "--method", method, *flags, steps=2)
    out = capsys.readouterr().out
    for text in ("settings  the defaults, but model=arithmetic-smoke", "trainable theta", str(folder)):
        assert text in out
    assert "greedy accuracy" in out
    metrics = lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 3 if method != "sft_rl" else 4))
    of_weighed = {"omega_mean", "sft_nll_hat"} if method == "weighed" else set()
    assert all(set(m) == {"step", "seconds", *METRICS} | of_weighed for m in metrics)
    if method == "bridge":
        assert all(value is not None for m in metrics for value in m.values())
        assert metrics[0]["gain_grad_norm"] == 0 < metrics[-1]["gain_grad_norm"]
        assert metrics[-1]["lora_norm"] > 0
    assert all(m["logp_gap_max"] < 1e-3 for m in metrics if m["logp_gap_max"] is not None)
    assert (folder / "adapter" / "adapter_model.safetensors").exists() == METHODS[method].adapter
    assert json.loads((folder / "config.json").read_text())["settings"]["method"] == method
    model, tokenizer = (c.from_pretrained(folder / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([tokenizer.encode("Q:1+2*3=")])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4).shape[1] > ids.shape[1]


def test_the_exported_model_is_the_merged_policy(finished_run):
    folder = finished_run("--method", "bridge", "--steps", "2")
    s = Settings(**json.loads((folder / "config.json").read_text())["settings"])
    run = bridge.set_up(s, RunFolder(folder))
    bridge.restore(run, checkpoint.newest(folder / "checkpoint"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    ids = torch.tensor([run.env.tokenizer.encode("Q:1+2*3=")])
    run.m.policy.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, run.m.policy(ids).logits, rtol=1e-4, atol=1e-4)


def momentum(parameters, lr, **options):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adagrad(parameters, lr, **options):
    return torch.optim.Adagrad(parameters, lr=lr)


@pytest.mark.parametrize(
    ("flags", "optimizer"),
    [
        (["--shadow-rollouts", "own", "--kl-coef", "0.01"], torch.optim.AdamW),
        (["--dynamic-sampling", "2", "--updates-per-rollout", "2", "--shadow-rollouts", "one_step"], torch.optim.AdamW),
        (["--method", "sft_rl", "--sft-steps", "2"], momentum),
        (["--method", "weighed"], torch.optim.AdamW),
        (["--method", "alternating", "--aggregation", "dr_grpo", "--overlong-mask"], adagrad),
    ],
)
def test_stopping_and_resuming_equals_running_through_bit_for_bit(tmp_path, monkeypatch, flags, optimizer):
    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    flags = [*flags, "--save-every", "5", "--eval-every", "1"]
    run(tmp_path / "through", *flags, steps=2)
    run(tmp_path / "resumed", *flags, steps=1)
    run(tmp_path / "resumed", *flags, "--resume", steps=2)
    assert_identical(tmp_path / "through", tmp_path / "resumed")


def test_an_optimizer_is_restored_though_some_parameters_have_no_state_and_another_one_is_refused(tmp_path):
    def optimizers(make):
        parameters = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
        return {"theta": make(parameters, lr=0.1)}

    saved = optimizers(torch.optim.AdamW)
    trained, idle = saved["theta"].param_groups[0]["params"]
    trained.grad = torch.ones(2, 3)
    saved["theta"].step()
    checkpoint.save(tmp_path, 1, {"step": 1}, checkpoint.state_tensors(saved))
    restored = optimizers(torch.optim.AdamW)
    checkpoint.newest(tmp_path).restore(restored)
    tensors = checkpoint.state_tensors(restored)
    assert set(tensors) == {"theta.0", "theta.0.step", "theta.0.exp_avg", "theta.0.exp_avg_sq", "theta.1"}
    assert all(torch.equal(tensors[name], t) for name, t in checkpoint.state_tensors(saved).items())
    with pytest.raises(SettingError, match=r"model or optimizer: theta\.0\.exp_avg differs"):
        checkpoint.newest(tmp_path).restore(optimizers(momentum))
    saved["theta"].state[idle]["calls"] = 1
    with pytest.raises(TypeError, match="optimizer theta: its state 'calls' is no tensor"):
        checkpoint.state_tensors(saved)


def launch(out, *flags, steps=6):
    """A run as a process of its own."""
    return Forked(lambda: run(out, "--save-every", "1", *flags, steps=steps))


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


def test_killed_at_random_moments_it_resumes_to_the_same_result_bit_for_bit(tmp_path):
    rng, out, kills = random.Random(0), tmp_path / "killed", 0
    for saving in (False, True):
        process = launch(out, "--resume")
        if saving:  # while a checkpoint is being written
            while process.poll() is None and not list((out / "checkpoint").glob("*.tmp")):
                time.sleep(0.0005)
        else:  # anywhere in the loop
            wait_for(out / "config.json", process)
            time.sleep(rng.uniform(0.1, 0.8))
        process.send(signal.SIGKILL)
        kills += process.finish()[0] == -signal.SIGKILL
    assert kills >= 1
    run(out, "--save-every", "1", "--resume", steps=6)
    run(tmp_path / "through", "--save-every", "1", steps=6)
    assert_identical(tmp_path / "through", out)
    assert not list((out / "checkpoint").glob("*.tmp"))
    assert len(list((out / "checkpoint").glob("step-??????"))) == checkpoint.KEEP


LONG = ("--method", "sft", "--eval-problems", "1", "--eval-every", "5000", "--save-every", "5000")


def assert_all_is_saved(out):
    saved, metrics = checkpoint.newest(out / "checkpoint"), lines(out / "metrics.jsonl")
    assert saved.facts["step"] == metrics[-1]["step"] < 5000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_ends_jobs_finishes_the_step_saves_and_says_so(tmp_path, number):
    process = launch(tmp_path / "run", *LONG, steps=5000)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send(number)
    if number == signal.SIGHUP:  # shell and kernel each send one
        process.send(number)
    status, printed, _ = process.finish()
    assert status == 128 + number
    assert f"{number.name}: finishing this step, then saving" in printed
    assert "everything is saved, --resume continues" in printed
    assert_all_is_saved(tmp_path / "run")


def test_a_run_whose_terminal_closes_saves(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
        try:
            run(tmp_path / "run", *LONG, steps=5000)
        except SystemExit as ended:
            os._exit(ended.code)
        finally:
            os._exit(1)
    deadline = time.monotonic() + HANGS
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.01)[0]:
            os.read(terminal, 10_000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert_all_is_saved(tmp_path / "run")


def test_an_ignored_sighup_as_of_nohup_ends_no_run(tmp_path, monkeypatch):
    log_metrics = RunFolder.log_metrics

    def hang_up(self, *args):
        os.kill(os.getpid(), signal.SIGHUP)
        log_metrics(self, *args)

    monkeypatch.setattr(RunFolder, "log_metrics", hang_up)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run(tmp_path / "run", *LONG, steps=1)
    assert (tmp_path / "run" / "model").exists()


def test_a_run_in_a_thread_goes_on_without_handlers_of_signals(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run, args=(tmp_path / "run",), kwargs=dict(steps=1))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "model").is_dir()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"theta.{i}": torch.randn(7, 5, generator=generator) for i in range(4)}
    for step in (3, 4):
        checkpoint.save(tmp_path, step, {"step": step, "settings": {}}, tensors)
    first, last = sorted(tmp_path.iterdir())
    rng = random.Random(0)
    for name in ("__0_0.distcp", ".metadata", "facts.json", "digests.json"):
        file = last / name
        content = bytearray(file.read_bytes())
        for position in [len(content) // 2, *(rng.randrange(len(content)) for _ in range(20))]:
            damaged = content.copy()
            damaged[position] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            assert checkpoint.newest(tmp_path).facts["step"] == 3
            assert f"{last} is damaged" in capsys.readouterr().out
        file.write_bytes(content[: len(content) // 3])
        assert checkpoint.newest(tmp_path).facts["step"] == 3
        file.unlink()
        assert checkpoint.newest(tmp_path).facts["step"] == 3
        file.write_bytes(content)
    assert checkpoint.newest(tmp_path).facts["step"] == 4
    for folder in (first, last):
        (folder / "facts.json").unlink()
    with pytest.raises(OSError, match=r"no checkpoint in .* is intact"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_gets_its_name_when_all_of_it_is_written(tmp_path, monkeypatch):
    written = []
    replace_file = os.replace

    def interrupt(source, target):
        if source.is_file():
            return replace_file(source, target)
        written.extend(sorted(p.name for p in source.iterdir()))
        assert target == tmp_path / "step-000002"
        assert [*checkpoint.steps_in(tmp_path)] == [1], "until then no checkpoint of step 2 is seen"
        raise KeyboardInterrupt

    checkpoint.save(tmp_path, 1, {"step": 1}, {"x": torch.zeros(3)})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, {"step": 2}, {"x": torch.ones(3)})
    assert written == [".metadata", "__0_0.distcp", "digests.json", "facts.json"]
    assert checkpoint.newest(tmp_path).facts == {"step": 1}
    checkpoint.save(tmp_path, 2, {"step": 2}, {"x": torch.ones(3)})
    assert torch.equal(tensors_in(tmp_path)["x"], torch.ones(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("left", ["damaged", "partial", "empty", "more"])
def test_a_checkpoint_is_saved_over_what_an_earlier_attempt_left_of_the_same_step(tmp_path, left):
    for step in (1, 3):
        checkpoint.save(tmp_path, step, {"step": step}, {"x": torch.zeros(3)})
    old = tmp_path / "step-000003"
    if left == "damaged":
        (old / "__0_0.distcp").write_bytes(b"")
    elif left == "more":  # a file of a second rank
        (old / "__1_0.distcp").write_bytes((old / "__0_0.distcp").read_bytes())
    else:
        for file in old.iterdir():
            if left == "empty" or file.name != "facts.json":
                file.unlink()
    checkpoint.save(tmp_path, 3, {"step": 3}, {"x": torch.ones(3)})
    assert checkpoint.newest(tmp_path).facts == {"step": 3}
    assert torch.equal(tensors_in(tmp_path)["x"], torch.ones(3))
    assert sorted(p.name for p in old.iterdir()) == [".metadata", "__0_0.distcp", "digests.json", "facts.json"]


def test_a_fresh_checkpoint_is_kept_though_damaged_ones_of_later_steps_exist(tmp_path):
    for step in (3, 7, 8):
        checkpoint.save(tmp_path, step, {"step": step}, {"x": torch.full((3,), float(step))})
    for step in (7, 8):
        (tmp_path / f"step-{step:06d}" / "facts.json").unlink()
    checkpoint.save(tmp_path, 4, {"step": 4}, {"x": torch.full((3,), 4.0)})  # resumed at 3
    assert checkpoint.newest(tmp_path).facts == {"step": 4}
    assert not (tmp_path / "step-000008").exists()  # else the next run would cut its logs at 4 and resume at 8
    checkpoint.save(tmp_path, 1_000_000, {"step": 1_000_000}, {"x": torch.zeros(3)})
    assert checkpoint.newest(tmp_path).facts == {"step": 1_000_000}


def test_the_checkpoint_of_the_best_step_is_kept_beside_the_last_two(tmp_path):
    kept = []
    for step, best in enumerate([0, 1, 1, 1, 1, 5]):
        checkpoint.save(tmp_path, step, {"step": step}, {"x": torch.zeros(3)}, best)
        kept.append(list(checkpoint.steps_in(tmp_path)))
    assert kept == [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5]]


def test_getattr_in_a_checkpoint_names_a_memory_format_and_nothing_else():
    class Member:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            return getattr, self.arguments

    formats = checkpoint.dcp.metadata._MEM_FORMAT_ENCODING
    read = lambda member: checkpoint._Unpickler(io.BytesIO(pickle.dumps(member))).load()  # noqa: E731
    assert read(Member(formats, "TORCH_CONTIGUOUS_FORMAT")) is formats.TORCH_CONTIGUOUS_FORMAT
    with pytest.raises(KeyError):
        read(Member(Path, "home"))


def test_a_checkpoint_that_would_call_something_is_not_opened(tmp_path, capsys):
    class Call:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/called",)

    checkpoint.save(tmp_path, 1, {"step": 1}, {"x": torch.ones(2)})
    folder = tmp_path / "step-000001"
    (folder / ".metadata").write_bytes(pickle.dumps(Call()))
    (folder / "digests.json").write_text("{}")
    with pytest.raises(OSError, match=r"no checkpoint in .* is intact"):
        checkpoint.newest(tmp_path)
    assert "system has no place in a checkpoint" in capsys.readouterr().out
    assert not (tmp_path / "called").exists()


def test_a_large_checkpoint_is_written_in_several_files_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE", 1000)
    tensors = {f"{i}": torch.full((60 + i,), float(i)) for i in range(20)}  # 5,560 bytes
    threads, write = [], checkpoint.FileSystemWriter._write_data

    def watched(self, *args):
        threads.append(self.thread_count)
        return write(self, *args)

    monkeypatch.setattr(checkpoint.FileSystemWriter, "_write_data", watched)
    checkpoint.save(tmp_path, 1, {"step": 1}, tensors)
    assert threads == [1]
    assert len(list((tmp_path / "step-000001").glob("*.distcp"))) == 6
    again = {name: torch.zeros_like(t) for name, t in tensors.items()}
    checkpoint.newest(tmp_path).load(again)
    assert all(torch.equal(again[name], t) for name, t in tensors.items())


def test_a_checkpoint_that_cannot_be_written_leaves_the_previous_one_intact(tmp_path):
    state = {"tensor": torch.arange(100_000.0)}
    checkpoint.save(tmp_path, 1, {"step": 1}, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a disk with room for an eighth of it
    try:
        full = r"could not write .*step-000002: .*step-000002.tmp/__0_0\.distcp: .*File too large; "
        with pytest.raises(OSError, match=full + "earlier checkpoints are intact; free space and --resume"):
            checkpoint.save(tmp_path, 2, {"step": 2}, state)
        with pytest.raises(OSError, match=full + "there is no earlier checkpoint; free space and --resume"):
            checkpoint.save(tmp_path / "first", 2, {"step": 2}, state)
        full = r"could not write .*File too large: .*step-000002.tmp/facts.json'; there is no earlier checkpoint"
        with pytest.raises(OSError, match=full):
            checkpoint.save(tmp_path / "first", 2, {"step": "2" * 200_000}, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.glob("*/*") if p.is_dir()] == []
    assert [p.name for p in tmp_path.glob("step*")] == ["step-000001"]
    assert torch.equal(tensors_in(tmp_path)["tensor"], state["tensor"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_finite_number_is_logged_as_null(tmp_path, value):
    RunFolder(tmp_path).log_metrics(3, {"reward": 0.5, "kl": value, "mine": value}, {"sample": 1.5})
    (logged,) = lines(tmp_path / "metrics.jsonl")
    known = {"step": 3, "reward": 0.5, "seconds": {"sample": 1.5}}
    assert logged == dict.fromkeys((*METRICS, "mine")) | known


def test_a_full_disk_names_the_file_of_a_run_that_cannot_be_written(tmp_path):
    for name in ("log.jsonl", "log.jsonl.gz", "config.json.tmp"):
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*/config\.json'"):
        write_atomically(tmp_path / "config.json", "{}")
    for name in ("log.jsonl", "log.jsonl.gz"):
        with pytest.raises(OSError, match=rf"No space left on device: .*/{name}'"):
            append_line(tmp_path / name, {"step": 1})
    with pytest.raises(OSError, match=r"No such file or directory: .*absent/log\.jsonl'"):
        append_line(tmp_path / "absent" / "log.jsonl", {"step": 1})


def test_logs_are_cut_back_to_the_checkpoint_without_a_torn_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    cut_back(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_back(tmp_path / "absent.jsonl", 2)
    log.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(DataError, match=r"log\.jsonl, line 2: a JSON object is needed"):
        cut_back(log, 2)


def refused(*flags):
    with pytest.raises(SystemExit) as stopped:
        bridge.main([str(f) for f in flags])
    return str(stopped.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lam", "1.5"], "lam must be in [0, 1]; got 1.5"),
        (["--clip-low", "1.5"], "clip_low must be in [0, 1]; got 1.5"),
        (["--lam", "nan"], "lam must be in [0, 1]; got nan"),
        (["--method", "ppo"], "chord, luffy, srft, hpt, mix_lora, no_meta, bridge, weighed; got 'ppo'"),
        (["--shadow-ratio-cap", "0.5"], "shadow_ratio_cap must be 0 or at least 1"),
        (["--eval-data", "x.jsonl"], "eval_data needs rl_data"),
        (["--lora-targets", "lm_head"], "no linear layer is named ['lm_head']"),
        (["--group-size", "1"], "group_size must be at least 2; got 1"),
        (["--temperature", "0"], "temperature must be greater than 0; got 0.0"),
        (["--aggregation", "mean"], "aggregation must be one of grpo, dapo, dr_grpo"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (["--seed", "-1"], "seed must be at least 0; got -1"),
        (["--method", "rl", "--shadow-rollouts", "own"], "shadow_rollouts does nothing with method rl, only with b"),
        (["--method", "mix", "--lam", "0.9"], "lam does nothing with method mix, only with mix_lora, no_meta, b"),
        (["--method", "bridge", "--mu", "2"], "mu does nothing with method bridge, only with mix"),
        (["--method", "sft", "--group-size", "9"], "group_size does nothing with method sft, only with rl, sft_rl"),
        (["--method", "rl", "--sft-batch", "9"], "sft_batch does nothing with method rl, only with sft, sft_rl"),
        (["--method", "mix", "--beta", "1"], "beta does nothing with method mix, only with mix_lora, no_meta, bridge"),
        (["--method", "rl", "--mu", "5", "--beta", "1"], "beta does nothing with method rl"),
        (["--method", "sft", "--updates-per-rollout", "4"], "updates_per_rollout does nothing with method sft"),
        (["--method", "no_meta", "--shadow-ratio-cap", "3"], "shadow_ratio_cap does nothing with method no_meta"),
        (["--method", "rl", "--rl-data", "x.jsonl", "--sft-data", "y.jsonl"], "sft_data does nothing with method rl"),
        (["--method", "rl", "--clip-high", "0.3"], "clip_high does nothing with updates_per_rollout 1"),
        (["--clip-low", "0.3", "--updates-per-rollout", "2"], "clip_low does nothing beside shadow_ratio_cap 2.0"),
        (["--sft-steps", "2"], "sft_steps does nothing with method bridge, only with sft_rl"),
        (["--shadow-rollouts", "own", "--shadow-ratio-cap", "3"], "does nothing with shadow_rollouts own"),
        (["--rl-data", "x.jsonl", "--task", "limr"], "rl_data and task limr both name the problems"),
        (["--lora-targets", "qproj"], "no linear layer is named ['qproj']"),
        (["--sft-data", "x.jsonl"], "sft_data needs rl_data"),
        (["--rl-data", "x.jsonl"], "needs demonstrations: give sft_data"),
        (["--rl-data", "x.jsonl", "--method", "rl"], "rl_data: there is no file 'x.jsonl'"),
        (["--model", "./nowhere"], "model './nowhere' is no folder"),
        (["--model", str(ROOT / "tests")], "is a folder without a usable model"),
        (["--eval-problems", "1000"], "eval_problems"),
    ],
)
def test_a_bad_setting_is_refused_by_name(tmp_path, flags, message):
    assert message in refused("--preset", "smoke", "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--steps=1e3", "--alpha=x", "--steps="])
def test_a_value_that_cannot_be_read_is_refused_with_its_flag(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        bridge.main(["--preset", "smoke", flag])
    assert stopped.value.code == 2
    assert f"error: argument {flag.partition('=')[0]}: " in capsys.readouterr().err


def test_a_tilde_is_the_home_folder_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    s, args = parse(["--out=~/run", "--model=~/m", "--rl-data=~/a,~/b,c~", "--sft-data=~", "--reward=~/r.py:f"])
    assert str(args.out) == "/home/me/run"
    given = [s.model, s.rl_data, s.sft_data, s.reward]
    assert given == ["/home/me/m", "/home/me/a,/home/me/b,c~", "/home/me", "/home/me/r.py:f"]
    args = evaluate.parse(["~/run", "--data=~/d", "--out=~/o"])
    assert [args.source, args.data, args.out] == ["/home/me/run", "/home/me/d", "/home/me/o"]


def test_the_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in printed for name in Settings.__dataclass_fields__)


def test_a_folder_that_cannot_be_a_run_s_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(bridge, "set_up", None)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "config.json").write_text('{"model_type": "llama"}')
    for name, flags, message in (
        ("file", [], "File exists: .*/file'"), ("file/x", [], "Not a directory: .*/file/x'"),
        ("loop/x", [], "Too many levels of symbolic links: .*/loop/x'"), ("x" * 300, [], "File name too long"),
        ("others", [], "exists: --resume continues it"), ("", ["--resume"], r"No such file .*/config\.json"),
        ("others", ["--resume"], r"others/config\.json: no settings of this version \('settings'\)"),
    ):  # fmt: skip
        assert re.search(message, refused("--preset", "smoke", "--out", tmp_path / name, *flags))


@pytest.mark.parametrize("flag", ["--lambda", "--learning-rate", "--step"])
def test_an_unknown_flag_is_refused_by_name(flag, capsys):
    with pytest.raises(SystemExit):
        bridge.main([flag, "1"])
    assert flag in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten_and_other_settings_do_not_resume_it(tmp_path, finished_run):
    out = tmp_path / "run"
    shutil.copytree(finished_run("--method", "bridge", "--steps", "2"), out)
    flags = ("--preset", "smoke", "--out", out, "--steps", "2")
    assert "exists: --resume continues it" in refused(*flags)
    assert "lam is 0.4, the run in" in refused(*flags, "--resume", "--lam", "0.4")
    assert "is at step 2 already" in refused(*flags, "--resume", "--steps", "1")
    bridge.main([str(f) for f in (*flags, "--resume", "--tokens-per-micro-batch", "100")])


def weights_of_losses(method, steps):
    return [bridge.updates(Settings(method=method, steps=steps, sft_steps=2), k) for k in range(3)]


@pytest.mark.parametrize("method", METHODS)
def test_only_a_method_whose_updates_follow_the_number_of_steps_refuses_another_number_on_resume(method):
    follows = weights_of_losses(method, 4) != weights_of_losses(method, 8)
    assert follows == (method == "chord") == bool(METHODS[method].schedule)
    fingerprints = {"data": "d", "model": "m", "reward": "", "task": ""}
    s = Settings(method=method, steps=4)
    facts = {"step": 2, "settings": asdict(s)} | fingerprints
    checkpoint.refuse_other_run(facts, s, fingerprints, Path("out"))
    for steps in (3, 5):
        other = replace(s, steps=steps)
        if follows:
            message = rf"^steps is {steps}, the run in out has 4, and chord changes μ over all steps: use that, or ano"
            with pytest.raises(SettingError, match=message):
                checkpoint.refuse_other_run(facts, other, fingerprints, Path("out"))
        else:
            checkpoint.refuse_other_run(facts, other, fingerprints, Path("out"))


def test_an_interrupted_chord_run_resumes_with_its_number_of_steps_and_a_finished_one_with_no_other(tmp_path):
    flags = ("--method", "chord", "--chord-phi", "--save-every", "1", "--eval-every", "9", "--eval-problems", "1")
    run(tmp_path / "through", *flags, steps=2)
    shutil.copytree(tmp_path / "through", tmp_path / "resumed")
    for newest in ("checkpoint/step-000002", "model"):
        shutil.rmtree(tmp_path / "resumed" / newest)
    config = (tmp_path / "resumed" / "config.json").read_text()
    for out, steps in (("resumed", 1), ("through", 3)):
        other = refused("--preset", "smoke", "--out", tmp_path / out, *flags, "--resume", "--steps", steps)
        assert f"steps is {steps}, the run in {tmp_path / out} has 2, and chord changes μ over all steps" in other
    assert (tmp_path / "resumed" / "config.json").read_text() == config
    assert (tmp_path / "through" / "model").exists()
    run(tmp_path / "resumed", *flags, "--resume", steps=2)
    assert_identical(tmp_path / "through", tmp_path / "resumed")


def test_a_folder_has_one_process_at_a_time_and_a_killed_one_blocks_no_resume(tmp_path):
    out = tmp_path / "run"
    process = launch(out, *LONG, steps=5000)
    wait_for(out / "metrics.jsonl", process)
    for flags in ([], ["--resume"]):
        message = refused("--preset", "smoke", "--out", out, *LONG, *flags)
        assert message == f"bridge.py: {out} is in use by another process: wait for its end, or choose another --out"
    bridge.main(["--preset", "smoke", "--out", str(out), "--dry-run"])
    process.send(signal.SIGTERM)
    assert process.finish()[0] == 128 + signal.SIGTERM
    assert not (out / ".lock").exists()
    process = launch(out, *LONG, "--resume", steps=5000)
    steps = len(lines(out / "metrics.jsonl"))
    while len((out / "metrics.jsonl").read_text().splitlines()) <= steps and process.poll() is None:
        time.sleep(0.005)
    process.send(signal.SIGKILL)
    process.finish()
    assert (out / ".lock").exists()
    run(out, *LONG, "--resume", steps=checkpoint.newest(out / "checkpoint").facts["step"])
    assert (out / "model").exists()
    assert not (out / ".lock").exists()


def test_a_failed_set_up_keeps_a_folder_that_was_there_and_removes_one_that_it_made(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new/deep"):
        assert "there is no file" in refused("--preset", "smoke", "--rl-data", "no.jsonl", "--sft-data", "no.jsonl",
                                             "--out", tmp_path / name)  # fmt: skip
    assert (tmp_path / "mine").is_dir()
    assert not any((tmp_path / "mine").iterdir())
    assert not (tmp_path / "new" / "deep").exists()


def test_a_lock_that_its_owner_has_just_deleted_lets_nobody_in(tmp_path, monkeypatch):
    lock = tmp_path / ".lock"
    flock = fcntl.flock

    def deleted_meanwhile(file, how):
        lock.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", deleted_meanwhile)
    with pytest.raises(SettingError, match="is in use by another process"), alone(tmp_path, lock):
        pass


def test_the_handlers_of_signals_are_restored_after_the_last_step(tmp_path):
    def mine(number, frame):
        pass

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.signal(number, mine) for number in numbers}
    try:
        run(tmp_path / "run", "--eval-problems", "1", steps=1)
        assert [signal.getsignal(number) for number in numbers] == [mine] * 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_every_rank_of_a_second_start_is_refused_and_leaves_the_folder_to_the_first(tmp_path):
    out = tmp_path / "run"
    with alone(out, out / ".lock"):
        ended = fork_ranks(lambda: bridge.main(["--preset", "smoke", "--out", str(out)]), 2)
        for rank, (status, _, errors) in enumerate(ended):
            assert status == 1
            assert f"bridge.py, rank {rank}: {out} is in use by another process" in errors
        assert [p.name for p in out.iterdir()] == [".lock"]
    assert not out.exists()


def test_a_child_that_outlives_a_killed_process_does_not_hold_its_lock(tmp_path):
    children = tmp_path / "children"

    def killed():
        with alone(tmp_path, tmp_path / ".lock"):
            child = os.fork()
            if child == 0:
                time.sleep(HANGS)
                os._exit(0)
            children.write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)

    assert Forked(killed).finish()[0] == -signal.SIGKILL
    with alone(tmp_path, tmp_path / ".lock"):
        os.kill(int(children.read_text()), signal.SIGKILL)


def test_a_disk_without_locks_refuses_nobody(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(tmp_path, tmp_path / ".lock"), alone(tmp_path, tmp_path / ".lock"):
        pass


def interrupted(number):
    """What ends a run in its third step."""
    log_metrics = RunFolder.log_metrics

    def end(self, step, *args):
        log_metrics(self, step, *args)
        if step == 3 and number:
            os.kill(os.getpid(), number)
        if step == 3 and not number:
            raise FloatingPointError("as a diverged run")

    RunFolder.log_metrics = end


ENDS = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL, 0: 1}


@pytest.mark.parametrize("number", ENDS)
def test_a_model_is_of_the_last_step_of_its_run_and_an_interrupted_extension_has_none(
    finished_run, tmp_path, number, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(finished_run("--steps", "2", "--save-every", "1"), out)
    made = {name: (out / name).read_bytes() for name in ("model/model.safetensors", "model/README.md")}
    adapter = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    flags = ("--eval-problems", "4", "--eval-every", "500", "--resume")

    def extend():
        interrupted(number)
        run(out, "--save-every", "500", *flags, steps=400)

    assert Forked(extend).finish()[0] == ENDS[number]
    assert not (out / "model").exists() and not (out / "adapter").exists()  # noqa: PT018
    assert {name: (out / name.replace("model/", "model-step-2/", 1)).read_bytes() for name in made} == made
    assert (out / "adapter-step-2" / "adapter_model.safetensors").read_bytes() == adapter
    for asked in ([], ["--ask", "1+1"]):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", str(out), *asked])
        with pytest.raises(SystemExit, match=rf"the run has not finished, .*, to evaluate: {out}/model-step-2$"):
            evaluate.main()
    report.write(out)
    if number == signal.SIGTERM:  # finishes where it stands
        run(out, "--save-every", "500", *flags, steps=3)
        assert "for 3 steps" in (out / "model" / "README.md").read_text()
        assert "for 2 steps" in (out / "model-step-2" / "README.md").read_text()


def test_a_kill_between_the_renamed_model_and_the_new_config_leaves_a_true_state(finished_run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(finished_run("--steps", "2", "--save-every", "1"), out)
    s = evaluate.load_settings(out)
    folder = RunFolder(out)
    folder.set_aside_model(s, 2)  # the same steps again, and nothing to train
    assert (out / "model").exists()
    (out / "model-step-2").mkdir()
    (out / "model-step-2" / "old").write_text("of infra.export")
    for kill in ("adapter", "model"):  # before the rename of which
        monkeypatch.setattr(Path, "rename", partialmethod(rename_but, kill))
        with pytest.raises(KeyboardInterrupt):
            folder.set_aside_model(replace(s, steps=3), 2)
    monkeypatch.undo()
    assert evaluate.load_settings(out).total_steps == 2
    folder.set_aside_model(replace(s, steps=3), 2)
    assert sorted(p.name for p in out.glob("*-step-*")) == ["adapter-step-2", "model-step-2"]
    assert not (out / "model-step-2" / "old").exists()
    with pytest.raises(DataError, match="the run has not finished"):
        evaluate.load_settings(out)
    folder.set_aside_model(replace(s, steps=3), 2)


def rename_but(path, kill, target, rename=Path.rename):
    if path.name == kill:
        raise KeyboardInterrupt
    return rename(path, target)


@pytest.mark.parametrize(("start", "total"), [(1, 2), (-1, 2), (1, 1)])
def test_a_model_is_set_aside_too_if_the_newest_checkpoint_is_earlier_than_it(finished_run, tmp_path, start, total):
    out = tmp_path / "run"
    shutil.copytree(finished_run("--steps", "2", "--save-every", "1"), out)
    RunFolder(out).begin(replace(evaluate.load_settings(out), steps=total), [], start)
    assert not (out / "model").exists()
    assert "for 2 steps" in (out / "model-step-2" / "README.md").read_text()


def test_resuming_without_training_evaluates_the_step_that_it_exports(tmp_path):
    out, flags = tmp_path / "run", ("--eval-every", "2", "--save-every", "1", "--eval-problems", "1")
    run(out, *flags, steps=3)
    evals = (out / "evals.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in evals] == [0, 2, 3]
    (out / "evals.jsonl").write_text("".join(evals[:2]))  # as if the run were stopped at step 3 of more
    shutil.rmtree(out / "model")
    run(out, *flags, "--resume", steps=3)
    assert (out / "evals.jsonl").read_text() == "".join(evals)
    card = (out / "model" / "README.md").read_text()
    assert "for 3 steps" in card and "| bridge, step 3 |" in card  # noqa: PT018
    (out / "evals.jsonl").write_text("")
    run(out, *flags, "--resume", steps=3)
    assert (out / "evals.jsonl").read_text() == evals[2]
    assert "| before |" not in (out / "model" / "README.md").read_text()


def test_a_step_that_is_not_finite_is_skipped_and_five_in_a_row_end_the_run(tmp_path, monkeypatch):
    real, bad = bridge.grpo.grpo_loss, {2}
    calls = []

    def loss(logp, *rest):
        calls.append(None)
        value, terms = real(logp, *rest)
        return (value * math.nan if (len(calls) + 1) // 2 in bad else value), terms  # policy and shadow: 2 calls a step

    monkeypatch.setattr(bridge.grpo, "grpo_loss", loss)
    run(tmp_path / "once", "--save-every", "1", "--eval-every", "9", steps=3)
    metrics = lines(tmp_path / "once" / "metrics.jsonl")
    assert [m["skipped_in_a_row"] for m in metrics] == [0, 1, 0]
    dumped = json.loads((tmp_path / "once" / "skipped-000002-1.json").read_text())
    assert len(dumped["rollouts"]) == 64
    calls.clear()
    bad.update(range(3, 20))
    flags = ["--steps", "9", "--save-every", "1", "--eval-every", "9"]
    message = refused("--preset", "smoke", "--out", tmp_path / "five", *flags)
    assert "5 updates had a loss or gradient" in message
    assert all(tensor.isfinite().all() for tensor in tensors_in(tmp_path / "five" / "checkpoint").values())


def test_updates_that_are_not_finite_end_the_run_though_others_beside_them_are(tmp_path, monkeypatch):
    real = bridge.grpo.grpo_loss
    monkeypatch.setattr(bridge.grpo, "grpo_loss", lambda *a: (real(*a)[0] * math.nan, real(*a)[1]))
    message = refused("--preset", "smoke", "--out", tmp_path / "run", "--method", "alternating", "--steps", "9")
    assert "5 updates" in message
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["skipped_in_a_row"] == 5


def test_a_run_resumes_with_moved_data_and_model_and_refuses_changed_ones(tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [json.dumps({"question": f"{i}+{j}", "answer": str(i + j), "solution": f"\\boxed{{{i + j}}}"}) + "\n"
            for i in range(5) for j in range(5)]  # fmt: skip
    data.write_text("".join(rows))
    text_model(tmp_path / "model", rows)
    flags = ["--preset", "smoke", "--out", tmp_path / "run", "--steps", "1", "--model", tmp_path / "model",
             "--rl-data", data, "--sft-data", data, "--max-new-tokens", "40", "--template", "plain"]  # fmt: skip
    bridge.main([str(f) for f in flags])
    data = data.rename(tmp_path / "moved.jsonl")
    model = (tmp_path / "model").rename(tmp_path / "moved")
    flags = ["--preset", "smoke", "--out", tmp_path / "run", "--steps", "2", "--resume", "--model", model, "--rl-data",
             data, "--sft-data", data, "--max-new-tokens", "40", "--template", "plain"]  # fmt: skip
    bridge.main([str(f) for f in flags])
    assert [m["step"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]

    file, weights = model / "model.safetensors", safetensors.torch.load((model / "model.safetensors").read_bytes())
    save = lambda tensors: safetensors.torch.save_file(tensors, file, {"format": "pt"})  # noqa: E731
    save(weights | {"model.norm.weight": weights["model.norm.weight"] * 1.01})
    assert "model: its weights or its tokenizer changed since the run" in refused(*flags)
    save(weights)
    for changed in (rows[:20], [rows[0].replace("boxed", "fbox"), *rows[1:]]):
        data.write_text("".join(changed))
        assert "rl_data, sft_data or eval_data changed since the run" in refused(*flags)


def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Sampler, "refresh", lambda self, policy: None)
    run(tmp_path / "same", steps=1)  # at step 0 the weights are equal anyway
    scramble = lambda self, policy: self.model.get_output_embeddings().weight.data.mul_(1.5)  # noqa: E731
    monkeypatch.setattr(Sampler, "refresh", scramble)
    assert "sampler and trainer disagree" in refused("--preset", "smoke", "--out", tmp_path / "other", "--steps", "1")


@pytest.mark.parametrize(("p", "G"), [(0.1, 2), (0.3, 5), (0.05, 8)])
def test_a_group_has_no_signal_with_the_probability_that_the_advice_names(p, G):
    """The sum over all 2^G groups of samples that are right with probability p."""
    expected = 0.0
    for rewards in itertools.product((0.0, 1.0), repeat=G):
        if not grpo.group_advantages(torch.tensor([rewards])).any():
            expected += math.prod(p if r else 1 - p for r in rewards)
    assert f"would be {expected:.0%}, p^G + (1−p)^G at p = {p:.2f}, G = {G}" in advice_on_signal(0.9, p, G)


@pytest.mark.parametrize("G", [2, 5, 8])
def test_prompts_of_unequal_difficulty_have_more_groups_without_signal_than_their_mean_says(G):
    without_signal = lambda p: p**G + (1 - p) ** G  # noqa: E731
    difficulties = [0.0, 0.1, 0.2, 0.9]
    mean = sum(map(without_signal, difficulties)) / 4
    assert mean > without_signal(sum(difficulties) / 4)
    assert f"would be {without_signal(0.3):.0%}, " in advice_on_signal(mean, 0.3, G)


def test_a_run_of_groups_without_signal_says_so_once(tmp_path, capsys):
    constant = tmp_path / "constant.py"
    constant.write_text("def constant(response, problem):\n    return 0.5\nconstant.right_from = 1.0\n")
    small = ("--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "4", "--eval-problems", "1")
    run(tmp_path / "run", "--method", "rl", "--reward", f"{constant}:constant", *small, "--eval-every", "99", steps=12)
    advice = [line for line in capsys.readouterr().out.splitlines() if "equal rewards" in line]
    assert len(advice) == 1
    assert advice[0].startswith("step 10: in the last 10 steps 100% of the groups had equal rewards, so no RL gradient")
    assert advice[0].endswith("no sample was right. Begin with SFT (--method sft_rl), or with easier problems")


def test_the_advice_counts_the_last_ten_steps_and_needs_more_than_three_quarters(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    shares = [0.75] * 12 + [0.8] + [0.75] * 9  # step 13 passes the limit, and so do the nine steps after it
    for step, share in enumerate(shares, 1):
        folder.watch_signal(step, {"zero_std_groups": share, "right_frac": math.nan}, 8)
    printed = capsys.readouterr().out
    assert printed.startswith("step 13: in the last 10 steps 76% of the groups had equal rewards, so no RL gradient. R")
    assert printed.count("step ") == 1
    assert "p^G" not in printed, "nobody knows what is right"


def test_evaluate_and_plot_work_on_their_own(tmp_path, finished_run, capsys, monkeypatch):
    shutil.copytree(finished_run("--method", "bridge", "--steps", "2"), tmp_path / "run")
    assert (tmp_path / "run" / "figures.png").stat().st_size > 10_000
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "run")])
    evaluate.main()
    printed = capsys.readouterr().out
    assert printed.index(f"step 2 of {tmp_path}/run\n") < printed.index("| average of 6 |")
    final = lines(tmp_path / "run" / "evals.jsonl")[-1]["policy"]
    header, *answers = lines(tmp_path / "run" / "answers-paper.jsonl")
    assert header["header"]["step"] == 2
    assert json.loads((tmp_path / "run" / "answers-paper.summary.json").read_text())["step"] == 2
    assert len(answers) == 24
    assert sum(a["reason"] == "equal" for a in answers) / 24 == pytest.approx(final["average"])
    run(tmp_path / "sft", "--method", "sft", steps=1)  # without rollouts
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "sft"), "--out", str(tmp_path / "f.png")])
    plot.main()
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"is no run folder: it has no metrics.jsonl"):
        plot.main()


def text_model(folder, texts, config_class=Qwen2Config, **options):
    """A random two-layer model with a byte-pair tokenizer trained on the spot, no chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = config_class(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0,
        **dict(tie_word_embeddings=True) | options,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


EASY = f"""
from tasks.sources import rows_of
from tasks.task import Demonstration, Problem, Task

def easy(s):
    rows = [r for r in rows_of("{DATA}/math_train_problems.json") if float(r["difficulty"]) <= 3]
    solved = [r for r in rows_of("{DATA}/math_test_solutions.jsonl") if r["level"] in ("Level 1", "Level 2")]
    evaluation = [Problem(r["problem"], r["answer"], "math500") for r in rows_of("{DATA}/math500.jsonl")][:4]
    problems = [Problem(r["problem"], r["answer"], extra=r) for r in rows if r["answer"]]
    return Task(problems, [Demonstration(r["problem"], r["solution"]) for r in solved], evaluation)
"""


@pytest.mark.parametrize(
    ("family", "options"),
    [(LlamaConfig, dict(attention_bias=True)), (Qwen3Config, dict(tie_word_embeddings=False))],
)
def test_models_of_other_families_train_on_real_mathematics(tmp_path, family, options):
    source = DATA / "math_test_solutions.jsonl"
    if not source.exists():
        pytest.skip("shared/data/math_test_solutions.jsonl is absent")
    rows = [json.loads(line) for line in source.open()][:200]
    text_model(tmp_path / "model", [r["problem"] + r["solution"] for r in rows], family, **options)
    task = tmp_path / f"easy_{family.model_type}.py"  # a process has one module of each name
    task.write_text(EASY)
    run(tmp_path / "run", "--model", str(tmp_path / "model"), "--template", "plain", "--task", f"{task}:easy",
        "--max-new-tokens", "48", "--sft-batch", "4", "--prompts-per-step", "2", "--group-size", "2",
        steps=2)  # fmt: skip
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 2
    assert all(m["skipped_in_a_row"] == 0 and m["logp_gap_max"] < 1e-3 for m in metrics)
    assert metrics[-1]["lora_norm"] > 0


def test_real_text_takes_the_same_path(tmp_path):
    source = DATA / "gsm8k_train.jsonl"
    if not source.exists():
        pytest.skip("shared/data/gsm8k_train.jsonl is absent")
    rows = [json.loads(line) for line in source.open()][:60]
    data = tmp_path / "gsm8k.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    text_model(tmp_path / "model", [r["question"] + r["answer"] for r in rows])
    out = tmp_path / "run"
    flags = ["--model", tmp_path / "model", "--rl-data", data, "--sft-data", data, "--max-new-tokens", "200"]
    assert "choose one with --template, qwen-boxed or plain" in refused("--preset", "smoke", "--out", out, *flags)
    flags += ["--template", "plain"]
    assert "rl_data: no usable row is left" in refused("--preset", "smoke", "--out", out, *flags, "--eval-data", data)
    bridge.main([str(f) for f in ("--preset", "smoke", "--out", out, "--steps", "2", *flags)])
    metrics, evals, samples = (lines(out / f"{n}.jsonl") for n in ("metrics", "evals", "samples"))
    assert metrics[-1]["sft_nll"] < metrics[0]["sft_nll"] < math.log(600) + 1
    assert all(m["logp_gap_max"] < 1e-3 for m in metrics)
    assert set(evals[-1]["policy"]) == {"all", "average"}
    asked = {r["question"]: r["answer"].rpartition("#### ")[2] for r in rows}
    assert all(asked[sample["question"]] == sample["answer"] for sample in samples)
    assert all(sample["reward"] in (0, 1) for sample in samples)


def test_a_model_folder_that_lacks_weights_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "arithmetic-smoke", folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused("--preset", "smoke", "--out", tmp_path / "run", "--model", folder)
    assert "lacks 1 of its weights, the first is model.layers.1.mlp.up_proj.weight" in message


def test_a_signal_that_arrives_after_the_ranks_have_agreed_stops_all_at_the_next_step(tmp_path, monkeypatch):
    agree = StopSignal.on_any_rank

    def late(self):
        stopped = agree(self)
        self.requested = self.requested or signal.SIGTERM  # this rank alone knows it
        return stopped

    monkeypatch.setattr(StopSignal, "on_any_rank", late)
    with pytest.raises(SystemExit) as ended:
        bridge.main(["--preset", "smoke", "--out", str(tmp_path / "run")])
    assert ended.value.code == 128 + signal.SIGTERM
    assert [m["step"] for m in lines(tmp_path / "run/metrics.jsonl")] == [1, 2]
    assert checkpoint.newest(tmp_path / "run/checkpoint").facts["step"] == 2
