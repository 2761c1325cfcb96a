"""Two ranks on a CPU, joined by gloo: the same run as one, uneven data, kills and other numbers of ranks."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import HANGS, fork_ranks, free_port, lines, rows, tensors_in, tiny_model
from torch.distributed.tensor import DTensor

import bridge
import infra.run
from infra import checkpoint, export, parallel
from logprob import response_logprobs
from sampler import Sampler
from settings import Settings
from tasks import loading

ROOT = Path(__file__).parents[1]
SMOKE = ["--preset", "smoke", "--alpha", "1e-4", "--save-every", "1", "--eval-every", "3"]


def run(out, ranks, *flags, steps=2, before=lambda: None):
    """A run on so many ranks; each rank calls `before` first. Returns what rank 0 printed."""

    def command():
        before()
        bridge.main([str(word) for word in (*SMOKE, "--out", out, "--steps", steps, *flags)])

    results = fork_ranks(command, ranks)
    assert all(status == 0 for status, *_ in results), results[-1][2][-3000:]
    return results[0][1]


def start(out, ranks, *flags, restarts=0, meet=("--standalone",), steps=3):
    """A run under torchrun, as a process."""
    launcher = ["-m", "torch.distributed.run", *meet, f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    command = [sys.executable, *launcher, ROOT / "bridge.py", *SMOKE, "--out", out, "--steps", steps, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    return process.returncode, out, err


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process, which the others must equal."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(out, 1, steps=3)
    return out


def assert_equal(a, b, tolerance):
    """Same samples, and every parameter the same to within `tolerance`."""
    assert lines(a / "samples.jsonl") == lines(b / "samples.jsonl")
    for m, n in zip(lines(a / "metrics.jsonl"), lines(b / "metrics.jsonl"), strict=True):
        rounding, times = ("logp_gap_mean", "logp_gap_max"), ("seconds", "tokens_per_second")
        known = [k for k, value in m.items() if value is not None and k not in rounding + times]
        assert [m[k] for k in known] == pytest.approx([n[k] for k in known], rel=1e-4, abs=1e-5), known
        assert max(x[k] or 0.0 for x in (m, n) for k in rounding) < 1e-3  # differences of equal log-probs: no two agree
    x, y = tensors_in(a / "checkpoint"), tensors_in(b / "checkpoint")
    assert x.keys() == y.keys()
    for name in x:
        torch.testing.assert_close(x[name], y[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("flags", [[], ["--shard", "--checkpoint-layers", "2", "--kl-coef", "0.01"]])
def test_two_ranks_draw_the_samples_of_one_and_have_its_parameters_after_three_steps(tmp_path, one, flags):
    if len(flags) > 1:
        one = tmp_path / "one"
        run(one, 1, *flags[1:], steps=3)
    assert "2 ranks" in run(tmp_path / "two", 2, *flags, steps=3)
    assert_equal(one, tmp_path / "two", 1e-5)  # Adam turns rounded gradients near 0 into steps of up to 3e-4
    assert lines(one / "evals.jsonl") == lines(tmp_path / "two" / "evals.jsonl")


def test_ranks_without_a_variable_of_torchrun_or_with_a_port_in_use_are_refused_in_one_line(tmp_path, monkeypatch):
    with socket.socket() as used:
        used.bind(("localhost", 0))
        used.listen()
        launch = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="")
        for port, reason in (("", "MASTER_PORT expected"), (str(used.getsockname()[1]), "")):
            for name, value in (launch | dict(MASTER_PORT=port)).items():
                monkeypatch.setenv(name, value)
            message = rf"^bridge\.py, rank 0: the ranks that torchrun started do not meet: [^\n]*{reason}[^\n]*$"
            with pytest.raises(SystemExit, match=message):
                bridge.main([*SMOKE, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    ["--shadow-rollouts one_step --dynamic-sampling 1", "--method srft", "--method weighed"],
)
def test_other_methods_too_are_the_same_on_two_ranks(tmp_path, flags):
    run(tmp_path / "one", 1, *flags.split())
    run(tmp_path / "two", 2, *flags.split(), "--shard")
    assert_equal(tmp_path / "one", tmp_path / "two", 1e-5)


def make_some_groups_all_right():
    """Every other question pays for any answer: its rows have a reward but no gradient, so they are only scored."""

    def reward(response, problem):
        if sum(map(ord, problem.question)) % 2:
            return 1.0
        return float(sum(map(ord, response)) % 2)

    loading.load_reward = lambda name: reward


def test_two_sharded_ranks_equal_one_where_rows_are_scored_without_gradients_in_every_step(tmp_path):
    run(tmp_path / "one", 1, steps=3, before=make_some_groups_all_right)
    run(tmp_path / "two", 2, "--shard", steps=3, before=make_some_groups_all_right)
    assert all(0 < m["zero_std_groups"] < 1 and m["reward"] > 0 for m in lines(tmp_path / "one" / "metrics.jsonl"))
    assert_equal(tmp_path / "one", tmp_path / "two", 1e-5)  # weights that are not gathered again: 3e-3


def test_after_a_pass_without_gradients_every_parameter_of_a_sharded_model_is_a_slice():
    def command():
        parallel.start()
        model = tiny_model()
        parallel.shard(model, [])
        with torch.no_grad():
            response_logprobs(model, rows(3))
        whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        parallel.end()
        sys.exit(", ".join(whole) or 0)

    for status, _, err in fork_ranks(command, 2):
        assert status == 0, f"whole on this rank: {err[-300:]}"


def test_a_run_saved_by_two_ranks_is_resumed_by_one_and_by_two_sharded_ones(tmp_path, one):
    run(tmp_path / "run", 2, "--shard", steps=1)
    exported = export.save_checkpoint(tmp_path / "run", 1) / "model.safetensors"  # from the slices of two ranks
    assert exported.read_bytes() == (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert "1 ranks" not in run(tmp_path / "run", 1, "--resume", steps=2)
    run(tmp_path / "run", 2, "--resume", "--shard", steps=3)
    assert_equal(one, tmp_path / "run", 1e-5)


def of(process):
    """The ids of the ranks that a torchrun has started."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in children.stdout.split()]


def kill_one(processes, out):
    """SIGKILL for the last rank of the last torchrun, when there is a checkpoint; waits for the end of all."""
    while not (out / "checkpoint" / "step-000001").exists() and processes[0].poll() is None:
        time.sleep(0.01)
    os.kill(of(processes[-1])[-1], signal.SIGKILL)
    ended = [finish(process) for process in processes]
    assert [code for code, *_ in ended] == [0] * len(processes), ended[-1][-1][-3000:]
    assert "exitcode: -9" in ended[-1][-1]


def test_a_killed_rank_of_two_machines_is_started_again_and_the_result_is_exactly_that_of_an_undisturbed_run(tmp_path):
    # only one of the two torchruns counts a failure, and all ranks must resume
    run(tmp_path / "undisturbed", 2, steps=3)
    port = free_port()
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-id={port}"]
    kill_one([start(tmp_path / "run", 1, restarts=1, meet=meet) for _ in range(2)], tmp_path / "run")
    assert_equal(tmp_path / "undisturbed", tmp_path / "run", 0)


def test_a_signal_to_one_rank_lets_both_finish_the_step_and_save(tmp_path):
    out = tmp_path / "run"
    real = bridge.sft_pass

    def interrupted(*args):
        if parallel.rank() == 1:
            for _ in range(2):  # as torchrun does when it has got the signal, too
                os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    def command():
        os.environ["TORCHELASTIC_RUN_ID"] = "of torchrun"
        bridge.sft_pass = interrupted
        bridge.main([*SMOKE, "--out", str(out), "--save-every", "500", "--eval-every", "500", "--steps", "500"])

    results = fork_ranks(command, 2)
    assert [status for status, *_ in results] == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM after step 1;" in results[0][1]
    assert checkpoint.newest(out / "checkpoint").facts["step"] == lines(out / "metrics.jsonl")[-1]["step"] == 1


def make_uneven():
    """Rank 0 finishes no sample, rank 1 ends each after a token; in the second update rank 1's loss is NaN."""
    real_loss, real_generate, step = bridge.grpo.grpo_loss, Sampler.generate, 0

    def loss(*args):
        value, terms = real_loss(*args)
        return (value * float("nan") if parallel.rank() == 1 and step == 2 else value), terms

    def generate(self, prompts, keys, *rest, **options):
        nonlocal step
        groups = real_generate(self, prompts, keys, *rest, **options)
        if len(keys[0]) == 3:  # (seed, step, draw): in training, not in evaluation
            step = keys[0][1] + 1
            for completion in (c for group in groups for c in group):
                if parallel.rank() == 0:
                    completion.finish_reason = "length"
                else:
                    completion.ids, completion.logps = completion.ids[:1], completion.logps[:1]
        return groups

    def reward(response, problem):  # equal rewards would leave rows without a loss
        return sum(map(ord, response)) % 2

    bridge.grpo.grpo_loss, Sampler.generate, infra.run.MAX_LOGP_GAP = loss, generate, 1e9
    loading.load_reward = lambda name: reward


@pytest.mark.parametrize("flags", [[], ["--shard"]])
def test_ranks_with_uneven_data_do_not_hang_and_decide_the_same(tmp_path, flags):
    # one rank has all the long rows, the other none or empty micro-batches; both skip the same updates
    uneven = ["--overlong-mask", "--tokens-per-micro-batch", "60", "--sft-batch", "1", "--prompts-per-step", "2"]
    run(tmp_path / "run", 2, *uneven, *flags, steps=3, before=make_uneven)
    assert [m["skipped_in_a_row"] for m in lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 0]
    assert all(t.isfinite().all() for t in tensors_in(tmp_path / "run" / "checkpoint").values())


def test_all_ranks_resume_if_the_launcher_of_one_of_them_has_counted_a_failure():
    def command():
        os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]
        resumes = parallel.start()
        parallel.end()
        sys.exit(not resumes)

    assert [status for status, *_ in fork_ranks(command, 2)] == [0, 0]


def test_an_error_on_one_rank_names_rank_phase_and_step(tmp_path):
    def fail_on_rank_1(*args):
        if parallel.rank() == 1:
            raise FloatingPointError("no good")
        os._exit(3)  # rank 0 would wait for rank 1, which torchrun would end

    def command():
        bridge.sft_pass = fail_on_rank_1
        bridge.main([str(word) for word in (*SMOKE, "--out", tmp_path / "run", "--steps", 1)])

    _, (status, _, err) = fork_ranks(command, 2)
    assert status == 1
    assert "bridge.py, rank 1: no good (rank 1 of 2, step 1, phase sft)" in err


def test_more_ranks_than_prompts_are_refused_in_one_line_that_torchrun_gets_too(tmp_path):
    def command():
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(tmp_path / f"error-{os.environ['RANK']}.json")
        bridge.main([*SMOKE, "--out", str(tmp_path / "run"), "--prompts-per-step", "1"])

    message = "prompts_per_step is 1, but each of 2 ranks samples for at least one prompt"
    for rank, (status, _, err) in enumerate(fork_ranks(command, 2)):
        assert status == 1
        assert message in err
        assert message in json.loads((tmp_path / f"error-{rank}.json").read_text())["message"]["message"]
    assert not (tmp_path / "run").exists()


def test_a_rank_without_a_gpu_of_its_own_is_told(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="no GPU 2 on this machine, which has 2: lower --nproc-per-node"):
        parallel.start()


def test_shares_are_consecutive_complete_and_end_at_most_half_a_row_from_an_equal_division():
    """A share ends at the row's end nearest to its place: it has half of the row at each of its two cuts too much."""
    rng = random.Random(0)
    for _ in range(300):
        sizes = [rng.randint(1, rng.choice((3, 30, 3000))) for _ in range(rng.randint(1, 40))]
        parts = rng.randint(1, 64)
        ends = [0, *accumulate(sizes)]
        ranges = parallel.shares(sizes, parts)
        assert [i for r in ranges for i in r] == list(range(len(sizes)))
        assert len(ranges) == parts
        for part, r in enumerate(ranges):
            equal = (part + 1) * ends[-1]  # where the share would end, in units of 1/parts
            off = abs(ends[r.stop] * parts - equal)
            assert off == min(abs(end * parts - equal) for end in ends)
            assert 2 * off <= parts * max(sizes)
            assert abs(ends[r.stop] - ends[r.start] - ends[-1] / parts) <= max(sizes)


def test_micro_batches_cover_every_share_once():
    batch = rows(20, seed=2)
    for share in parallel.shares([len(p) + len(r) for p, r in batch], 3):
        parts = parallel.micro_batches(batch, share, 20, padded=True)
        assert [i for part in parts for i in part] == list(share)


@pytest.mark.parametrize("tokens", [1, 20, 10_000])
@pytest.mark.parametrize("chosen", [None, [0, 3, 4, 19]])
def test_batches_give_every_chosen_row_once_with_the_places_of_its_response_tokens(tokens, chosen):
    data, s = rows(20, seed=2), Settings(tokens_per_micro_batch=tokens)
    everything = [token for _, response in data for token in response]
    seen = []
    for batch, t in parallel.batches(data, s, chosen):
        seen += batch
        assert [token for _, response in batch for token in response] == [everything[place] for place in t]
    assert seen == (data if chosen is None else [data[i] for i in chosen])
