"""Whole runs of bridge.py on the smoke preset: outputs, exact resume, and what happens when things go wrong."""

import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import lines, tensors_in
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
import plot
from infra import checkpoint
from settings import CHOICES, Settings
from tasks import arithmetic as toy

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(autouse=True)
def _signals():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
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
    logs = metrics, lines(out / "evals.jsonl"), lines(out / "samples.jsonl"), state["streams"], state["step"]
    return logs, [*tensors.values(), *weights.values()]


def assert_identical(a, b):
    (logs_a, tensors_a), (logs_b, tensors_b) = results(a), results(b)
    assert logs_a == logs_b
    assert len(tensors_a) == len(tensors_b)
    assert all(torch.equal(x, y) for x, y in zip(tensors_a, tensors_b, strict=True))


@pytest.mark.parametrize("method", CHOICES["method"])
def test_every_method_runs_and_leaves_a_complete_folder(tmp_path, method, capsys):
    run(tmp_path / "run", "--method", method, "--sft-steps", "2", steps=3)
    out, folder = capsys.readouterr().out, tmp_path / "run"
    for said in ("trainable theta", "an update takes", str(folder), "greedy accuracy"):
        assert said in out
    metrics = lines(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 4 if method != "sft_rl" else 6))
    promised = (
        "step", "reward", "response_tokens", "truncated_frac", "dead_groups", "entropy", "kl", "sft_nll",
        "cooperative_gain", "gain_grad_norm", "grad_norm_theta", "grad_norm_w", "grad_norm_theta_hat", "lora_norm",
        "ratio_hat_mean", "logp_gap_mean", "logp_gap_max", "tokens_per_second", "seconds",
    )  # fmt: skip
    assert all(name in m for m in metrics for name in promised)
    if method == "bridge":
        assert all(m[name] is not None for m in metrics for name in promised)
        assert metrics[0]["gain_grad_norm"] == 0 < metrics[-1]["gain_grad_norm"]
        assert metrics[-1]["lora_norm"] > 0
    assert all(m["logp_gap_max"] < 1e-3 for m in metrics if m["logp_gap_max"] is not None)
    assert (folder / "adapter" / "adapter_model.safetensors").exists() == (method in ("mix_lora", "bridge"))
    assert (folder / "figures.png").stat().st_size > 10_000
    assert json.loads((folder / "config.json").read_text())["settings"]["method"] == method
    model, tokenizer = (c.from_pretrained(folder / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([tokenizer.encode("Q:1+2*3=")])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4).shape[1] > ids.shape[1]


def test_the_exported_model_is_the_merged_policy(tmp_path):
    run(tmp_path / "run", steps=2)
    s = Settings(**json.loads((tmp_path / "run" / "config.json").read_text())["settings"])
    again = bridge.set_up(s, tmp_path / "run")
    bridge.restore(again, checkpoint.newest(tmp_path / "run" / "checkpoint"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    ids = torch.tensor([again.tokenizer.encode("Q:1+2*3=")])
    again.m.policy.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, again.m.policy(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--shadow-rollouts", "own", "--resync-every", "2", "--kl-coef", "0.01"],
        ["--dynamic-sampling", "2", "--updates-per-rollout", "2", "--lam-ramp-steps", "5", "--shadow-ratio-cap", "0"],
        ["--method", "sft_rl", "--sft-steps", "2"],
        ["--method", "alternating", "--aggregation", "dapo", "--no-divide-by-std", "--overlong-mask"],
    ],
)
def test_stopping_and_resuming_equals_running_through_bit_for_bit(tmp_path, flags):
    run(tmp_path / "through", *flags, "--save-every", "5", "--eval-every", "1")
    run(tmp_path / "resumed", *flags, "--save-every", "5", "--eval-every", "1", steps=3 if "sft_rl" not in flags else 1)
    run(tmp_path / "resumed", *flags, "--save-every", "5", "--eval-every", "1", "--resume")
    assert_identical(tmp_path / "through", tmp_path / "resumed")


def launch(out, *flags):
    command = [
        sys.executable,
        ROOT / "bridge.py",
        "--preset",
        "smoke",
        "--out",
        out,
        "--steps",
        "8",
        "--save-every",
        "1",
    ]
    return subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


def test_killed_at_random_moments_it_resumes_to_the_same_result_bit_for_bit(tmp_path):
    assert launch(tmp_path / "through").wait() == 0
    rng, out, kills = random.Random(0), tmp_path / "killed", 0
    for _ in range(4):
        process = launch(out, "--resume")
        if kills % 2:  # while a checkpoint is being written
            process.poll()
            while process.poll() is None and not list((out / "checkpoint").glob("*.tmp")):
                time.sleep(0.0005)
        else:  # anywhere in the loop
            wait_for(out / "config.json", process)
            time.sleep(rng.uniform(0.1, 0.8))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    assert launch(out, "--resume").wait() == 0
    assert_identical(tmp_path / "through", out)
    assert not list((out / "checkpoint").glob("*.tmp"))
    assert len(list((out / "checkpoint").glob("step-??????"))) == checkpoint.KEEP


def test_sigterm_finishes_the_step_saves_and_says_so(tmp_path):
    process = launch(tmp_path / "run", "--steps", "500", "--eval-every", "500", "--save-every", "500")
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "everything is saved, --resume continues" in said
    state, metrics = checkpoint.newest(tmp_path / "run" / "checkpoint"), lines(tmp_path / "run" / "metrics.jsonl")
    assert state.facts["step"] == metrics[-1]["step"] < 500


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(tmp_path, capsys):
    run(tmp_path / "run", "--save-every", "1")
    first, last = sorted((tmp_path / "run" / "checkpoint").iterdir())
    capsys.readouterr()
    whole, rng = tensors_in(first.parent), random.Random(0)
    for name in ("__0_0.distcp", ".metadata", "facts.json", "checksum"):
        file = last / name
        content = bytearray(file.read_bytes())
        for position in [len(content) // 2, *(rng.randrange(len(content)) for _ in range(20))]:
            damaged = content.copy()
            damaged[position] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            step, said = checkpoint.newest(first.parent).facts["step"], capsys.readouterr().out
            assert (step, f"{last} is damaged" in said) in ((3, True), (4, False))
            assert step == 3 or name == "__0_0.distcp"
            if step == 4:  # some bits of an archive carry nothing
                assert all(torch.equal(t, whole[n]) for n, t in tensors_in(first.parent).items())
        file.write_bytes(content[: len(content) // 3])
        assert checkpoint.newest(first.parent).facts["step"] == 3
        file.unlink()
        assert checkpoint.newest(first.parent).facts["step"] == 3
        file.write_bytes(content)
    assert checkpoint.newest(first.parent).facts["step"] == 4
    for folder in (first, last):
        (folder / "facts.json").unlink()
    with pytest.raises(OSError, match=r"every checkpoint in .* is damaged"):
        checkpoint.newest(first.parent)


def test_a_checkpoint_that_would_call_something_is_not_opened(tmp_path, capsys):
    class Call:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/called",)

    checkpoint.save(tmp_path, 1, {"step": 1}, {"x": torch.ones(2)})
    folder = tmp_path / "step-000001"
    (folder / ".metadata").write_bytes(pickle.dumps(Call()))
    (folder / "checksum").write_text(str(checkpoint._checksum(folder)))
    with pytest.raises(OSError, match="damaged"):
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
        with pytest.raises(OSError, match=r"could not write .*step-000002.*Earlier checkpoints are intact"):
            checkpoint.save(tmp_path, 2, {"step": 2}, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert torch.equal(tensors_in(tmp_path)["tensor"], state["tensor"])


def test_logs_are_cut_back_to_the_checkpoint_and_a_torn_line_goes(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "rew')
    checkpoint.cut_back(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
    checkpoint.cut_back(tmp_path / "absent.jsonl", 2)


def refused(*flags):
    with pytest.raises(SystemExit) as stopped:
        bridge.main([str(f) for f in flags])
    return str(stopped.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lam", "1.5"], "lam must be in [0, 1]; got 1.5"),
        (["--lam", "nan"], "lam must be at least 0; got nan"),
        (["--method", "ppo"], "method must be one of sft, rl, sft_rl, alternating, mix, mix_lora, bridge; got 'ppo'"),
        (["--alpha", "inf"], "alpha must be a finite number"),
        (["--shadow-ratio-cap", "0.5"], "shadow_ratio_cap must be 0 or at least 1"),
        (["--eval-data", "x.jsonl"], "eval_data needs rl_data"),
        (["--lora-targets", "lm_head"], "no linear layer is named ['lm_head']"),
        (["--group-size", "1"], "group_size must be at least 2; got 1"),
        (["--temperature", "0"], "temperature must be greater than 0; got 0.0"),
        (["--aggregation", "mean"], "aggregation must be one of grpo, dapo, dr_grpo"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--method", "rl", "--shadow-rollouts", "own"], "only --method bridge"),
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


@pytest.mark.parametrize("flag", ["--lambda", "--learning-rate", "--step"])
def test_an_unknown_flag_is_refused_by_name(flag, capsys):
    with pytest.raises(SystemExit):
        bridge.main([flag, "1"])
    assert flag in capsys.readouterr().err


def test_every_setting_is_a_flag_and_there_are_few():
    assert len(Settings.__dataclass_fields__) <= 56


def test_an_existing_run_is_not_overwritten_and_other_settings_do_not_resume_it(tmp_path):
    run(tmp_path / "run", steps=2)
    flags = ("--preset", "smoke", "--out", tmp_path / "run", "--steps", "2")
    assert "exists: --resume continues it" in refused(*flags)
    assert "lam is 0.4, the run in" in refused(*flags, "--resume", "--lam", "0.4")
    assert "is at step 2 already" in refused(*flags, "--resume", "--steps", "1")
    bridge.main([str(f) for f in (*flags, "--resume", "--tokens-per-micro-batch", "100")])


def test_a_step_that_is_not_finite_is_skipped_and_five_in_a_row_end_the_run(tmp_path, monkeypatch):
    real, bad = bridge.grpo.grpo_loss, {2}
    calls = []

    def loss(logp, *rest):
        calls.append(None)
        value, terms = real(logp, *rest)
        return (value * math.nan if (len(calls) + 1) // 2 in bad else value), terms  # policy and shadow: 2 calls a step

    monkeypatch.setattr(bridge.grpo, "grpo_loss", loss)
    run(tmp_path / "once", "--save-every", "1", steps=3)
    metrics = lines(tmp_path / "once" / "metrics.jsonl")
    assert [m["skipped_in_a_row"] for m in metrics] == [0, 1, 0]
    dumped = json.loads((tmp_path / "once" / "skipped-000002-1.json").read_text())
    assert len(dumped["rollouts"]) == 64
    calls.clear()
    bad.update(range(3, 20))
    message = refused("--preset", "smoke", "--out", tmp_path / "five", "--steps", "9", "--save-every", "1")
    assert "5 updates had a loss or gradient" in message
    assert all(tensor.isfinite().all() for tensor in tensors_in(tmp_path / "five" / "checkpoint").values())


def test_updates_that_are_not_finite_end_the_run_though_others_beside_them_are(tmp_path, monkeypatch):
    real = bridge.grpo.grpo_loss
    monkeypatch.setattr(bridge.grpo, "grpo_loss", lambda *a: (real(*a)[0] * math.nan, real(*a)[1]))
    message = refused("--preset", "smoke", "--out", tmp_path / "run", "--method", "alternating", "--steps", "9")
    assert "5 updates" in message
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["skipped_in_a_row"] == 5


def test_resuming_on_other_data_is_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [json.dumps({"question": f"{i}+{j}", "answer": str(i + j), "solution": f"\\boxed{{{i + j}}}"}) + "\n"
            for i in range(5) for j in range(5)]  # fmt: skip
    data.write_text("".join(rows))
    text_model(tmp_path / "model", rows)
    flags = ["--preset", "smoke", "--out", tmp_path / "run", "--steps", "1", "--model", tmp_path / "model",
             "--rl-data", data, "--sft-data", data, "--max-new-tokens", "40", "--template", "plain"]  # fmt: skip
    bridge.main([str(f) for f in flags])
    data.write_text("".join(rows[:20]))
    assert "has changed since the run" in refused(*flags, "--resume")


def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(bridge.Sampler, "refresh", lambda self, policy: None)
    run(tmp_path / "same", steps=1)  # at step 0 the weights are equal anyway
    scramble = lambda self, policy: self.model.get_output_embeddings().weight.data.mul_(1.5)  # noqa: E731
    monkeypatch.setattr(bridge.Sampler, "refresh", scramble)
    assert "sampler and trainer disagree" in refused("--preset", "smoke", "--out", tmp_path / "other", "--steps", "1")


def test_evaluate_and_plot_work_on_their_own(tmp_path, capsys, monkeypatch):
    run(tmp_path / "run", steps=2)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "run")])
    evaluate.main()
    assert "| average of 6 |" in capsys.readouterr().out
    final = lines(tmp_path / "run" / "evals.jsonl")[-1]["policy"]
    answers = lines(tmp_path / "run" / "answers-paper.jsonl")[1:]
    assert len(answers) == 24
    assert sum(a["reason"] == "equal" for a in answers) / 24 == pytest.approx(final["average"])
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "run"), "--out", str(tmp_path / "f.png")])
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


@pytest.mark.parametrize(
    ("family", "options"),
    [(LlamaConfig, dict(attention_bias=True)), (Qwen2Config, {}), (Qwen3Config, dict(tie_word_embeddings=False))],
)
def test_models_of_three_families_train_on_real_mathematics(tmp_path, family, options):
    source = DATA / "math_test_solutions.jsonl"
    if not source.exists():
        pytest.skip("shared/data/math_test_solutions.jsonl is absent")
    rows = [json.loads(line) for line in source.open()][:200]
    text_model(tmp_path / "model", [r["problem"] + r["solution"] for r in rows], family, **options)
    run(tmp_path / "run", "--model", str(tmp_path / "model"), "--template", "plain", "--rl-data",
        str(DATA / "math_train_problems.json"), "--rl-filter", "difficulty=1..3", "--sft-data", str(source),
        "--sft-filter", "level=Level 1|Level 2", "--eval-data", str(DATA / "math500.jsonl"), "--eval-problems", "4",
        "--max-new-tokens", "48", "--sft-batch", "4", "--prompts-per-step", "2", "--group-size", "2",
        steps=3)  # fmt: skip
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 3
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
    bridge.main([str(f) for f in ("--preset", "smoke", "--out", out, "--steps", "3", *flags)])
    metrics, evals, samples = (lines(out / f"{n}.jsonl") for n in ("metrics", "evals", "samples"))
    assert metrics[-1]["sft_nll"] < metrics[0]["sft_nll"] < math.log(600) + 1
    assert all(m["logp_gap_max"] < 1e-3 for m in metrics)
    assert set(evals[-1]["policy"]) == {"all", "average"}
    asked = {r["question"]: r["answer"].rpartition("#### ")[2] for r in rows}
    assert all(asked[sample["question"]] == sample["answer"] for sample in samples)
    assert all(sample["reward"] in (0, 1) for sample in samples)


def test_a_model_folder_that_lacks_weights_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(toy.build_base("arithmetic-smoke"), folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused("--preset", "smoke", "--out", tmp_path / "run", "--model", folder)
    assert "lacks 1 of its weights, the first is model.layers.1.mlp.up_proj.weight" in message
