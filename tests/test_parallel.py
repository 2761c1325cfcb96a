"""Two ranks on a CPU, joined by gloo: the same run as one, uneven data, kills and other numbers of ranks."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import lines, rows, tensors_in

from infra import checkpoint, parallel
from infra.model import micro_batches

ROOT = Path(__file__).parents[1]
SMOKE = ["--preset", "smoke", "--steps", "3", "--alpha", "1e-4", "--beta", "5e-4", "--save-every", "1"]
KILLED = 60  # seconds after which a run counts as hanging


def start(out, ranks, *flags, restarts=0, script=ROOT / "bridge.py", meet=("--standalone",)):
    """A run on so many ranks, as a process."""
    launcher = ["-m", "torch.distributed.run", *meet, f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    command = [sys.executable, *(launcher if ranks > 1 or len(meet) > 1 else []), script, *SMOKE, "--out", out, *flags]
    return subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip


def finish(process):
    try:
        out, err = process.communicate(timeout=KILLED)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, out, err


def run(out, ranks, *flags, **options):
    code, said, err = finish(start(out, ranks, *flags, **options))
    assert code == 0, err[-3000:]
    return said


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process, which the others must equal."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(out, 1)
    return out


def assert_equal(a, b, tolerance):
    """Same samples, and every parameter the same to within `tolerance`."""
    assert lines(a / "samples.jsonl") == lines(b / "samples.jsonl")
    for m, n in zip(lines(a / "metrics.jsonl"), lines(b / "metrics.jsonl"), strict=True):
        known = [k for k, value in m.items() if value is not None and k not in ("seconds", "tokens_per_second")]
        assert [m[k] for k in known] == pytest.approx([n[k] for k in known], rel=1e-4, abs=1e-5), known
    x, y = tensors_in(a / "checkpoint"), tensors_in(b / "checkpoint")
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("flags", [[], ["--shard"], ["--shard", "--checkpoint-layers", "2", "--kl-coef", "0.01"]])
def test_two_ranks_draw_the_samples_of_one_and_have_its_parameters_after_three_steps(tmp_path, one, flags):
    if len(flags) > 1:
        one = tmp_path / "one"
        run(one, 1, *flags[1:])
    said = run(tmp_path / "two", 2, *flags)
    assert "2 ranks" in said
    assert_equal(one, tmp_path / "two", 1e-6)
    assert lines(one / "evals.jsonl") == lines(tmp_path / "two" / "evals.jsonl")


@pytest.mark.parametrize("method", ["alternating", "sft_rl"])
def test_other_methods_too_are_the_same_on_two_ranks(tmp_path, method):
    flags = ["--method", method, "--sft-steps", "1", "--steps", "2", "--dynamic-sampling", "1"]
    run(tmp_path / "one", 1, *flags)
    run(tmp_path / "two", 2, *flags, "--shard")
    assert_equal(tmp_path / "one", tmp_path / "two", 1e-6)


def test_a_run_saved_by_two_ranks_is_resumed_by_one_and_by_two_sharded_ones(tmp_path, one):
    run(tmp_path / "run", 2, "--shard", "--steps", "1")
    said = run(tmp_path / "run", 1, "--steps", "2", "--resume")
    assert "1 ranks" not in said
    run(tmp_path / "run", 2, "--steps", "3", "--resume", "--shard")
    assert_equal(one, tmp_path / "run", 1e-6)


def of(process):
    """The ids of the ranks that a torchrun has started."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in children.stdout.split()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    run(out, 2)
    return out


def kill_one(processes, out):
    """SIGKILL for the last rank of the last torchrun, when there is a checkpoint; waits for the end of all."""
    while not (out / "checkpoint" / "step-000001").exists() and processes[0].poll() is None:
        time.sleep(0.01)
    os.kill(of(processes[-1])[-1], signal.SIGKILL)
    ended = [finish(process) for process in processes]
    assert [code for code, *_ in ended] == [0] * len(processes), ended[-1][-1][-3000:]
    assert "exitcode: -9" in ended[-1][-1]


def test_a_killed_rank_is_started_again_and_the_result_is_exactly_that_of_an_undisturbed_run(tmp_path, undisturbed):
    kill_one([start(tmp_path / "run", 2, restarts=1)], tmp_path / "run")
    assert_equal(undisturbed, tmp_path / "run", 0)


def test_so_it_is_on_two_machines_of_which_only_one_has_counted_a_failure(tmp_path, undisturbed):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-id={port}"]
    kill_one([start(tmp_path / "run", 1, restarts=1, meet=meet) for _ in range(2)], tmp_path / "run")
    assert_equal(undisturbed, tmp_path / "run", 0)


def test_a_signal_to_one_rank_lets_both_finish_the_step_and_save(tmp_path):
    out = tmp_path / "run"
    process = start(out, 2, "--steps", "500", "--eval-every", "500", "--save-every", "500")
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    rank = of(process)[-1]
    for _ in range(2):  # as torchrun does when it has got the signal, too
        os.kill(rank, signal.SIGTERM)
        time.sleep(0.1)
    code, said, _ = finish(process)
    assert code != 0
    assert "stopped by SIGTERM after step" in said
    saved = checkpoint.newest(out / "checkpoint").facts
    assert saved["step"] == lines(out / "metrics.jsonl")[-1]["step"] < 500


UNEVEN = """
import sys
import torch
import bridge
from infra import parallel
from sampler import Sampler

real_loss, real_generate = bridge.grpo.grpo_loss, Sampler.generate

def loss(*args):  # in the second update one rank's loss is not finite
    value, terms = real_loss(*args)
    return (value * float("nan") if parallel.rank() == 1 and step == 2 else value), terms

def generate(self, prompts, keys, *rest, **options):  # in training one rank finishes nothing, the other at once
    global step
    groups = real_generate(self, prompts, keys, *rest, **options)
    if len(keys[0]) == 3:  # (seed, step, draw)
        step = keys[0][1] + 1
        for completion in (c for group in groups for c in group):
            if parallel.rank() == 0:
                completion.finish_reason = "length"
            else:
                completion.ids, completion.logps = completion.ids[:1], completion.logps[:1]
    return groups

step = 0
bridge.grpo.grpo_loss, Sampler.generate = loss, generate
bridge.MAX_LOGP_GAP = 1e9
bridge.main(sys.argv[1:])
"""


@pytest.mark.parametrize("flags", [[], ["--shard"]])
def test_ranks_with_uneven_data_do_not_hang_and_decide_the_same(tmp_path, flags):
    script = tmp_path / "uneven.py"
    script.write_text(UNEVEN)
    # one rank has all the long rows, the other none or empty micro-batches; some updates are skipped, by both
    uneven = ["--overlong-mask", "--tokens-per-micro-batch", "60", "--sft-batch", "1", "--prompts-per-step", "2"]
    run(tmp_path / "run", 2, *uneven, *flags, script=script)
    assert [m["skipped_in_a_row"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 0]
    assert all(t.isfinite().all() for t in tensors_in(tmp_path / "run" / "checkpoint").values())


def test_a_failing_rank_says_its_rank_phase_and_step(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(
        "import sys, bridge\nfrom infra import parallel\n"
        "real = bridge.sft_backward\n"
        "def fail(*args):\n"
        "    if parallel.rank() == 1: raise FloatingPointError('no good')\n"
        "    return real(*args)\n"
        "bridge.sft_backward = fail\n"
        "bridge.main(sys.argv[1:])\n"
    )
    code, _, err = finish(start(tmp_path / "run", 2, script=script))
    assert code != 0
    assert "bridge.py, rank 1: no good (rank 1 of 2, step 1, phase sft)" in err


def test_more_ranks_than_prompts_are_refused(tmp_path):
    code, _, err = finish(start(tmp_path / "run", 2, "--prompts-per-step", "1"))
    assert code != 0
    said = "prompts_per_step is 1, but there are 2 ranks"
    assert said in err
    assert said in err.rpartition("Root Cause")[2]  # of torchrun's own last words
    assert not (tmp_path / "run").exists()


def test_a_rank_without_a_gpu_of_its_own_is_told(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="no GPU 2 on this machine, which has 2: lower --nproc-per-node"):
        parallel.start()


def test_shares_are_consecutive_complete_and_balanced_to_within_one_row():
    sizes = [len(p) + len(r) for p, r in rows(40, seed=1)]
    for parts in (1, 2, 3, 7, 40, 64):
        ranges = parallel.shares(sizes, parts)
        assert [i for r in ranges for i in r] == list(range(40))
        assert len(ranges) == parts
        assert max(sum(sizes[i] for i in r) for r in ranges) <= sum(sizes) / parts + max(sizes)


def test_micro_batches_cover_every_share_once():
    batch = rows(20, seed=2)
    for share in parallel.shares([len(p) + len(r) for p, r in batch], 3):
        parts = micro_batches(batch[share.start : share.stop], 20)
        assert [share.start + i for part in parts for i in part] == list(share)
