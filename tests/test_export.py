"""infra/export.py: an exported folder holds the trained policy with its stop tokens and a true card."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import shipped_tokenizer, tensors_in, tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

import bridge
import lora
from infra import export
from infra.files import atomic_folder, read_log
from infra.model import load
from sampler import Sampler
from settings import METHODS, Settings
from tasks import arithmetic

ROOT = Path(__file__).parents[1]

TARGETS = ["q_proj", "o_proj", "down_proj"]


def exported(folder, dtype, tied=True, stop=(0, 5)):
    """A policy with an adapter that has moved, and the folder that export makes of it."""
    base = tiny_model(tied=tied)
    base.generation_config.update(temperature=0.3, top_p=0.8, do_sample=True, repetition_penalty=1.1)
    sampler = Sampler(base, list(stop), dtype=dtype)
    w = lora.create(base, TARGETS, 4, 0)
    generator = torch.Generator().manual_seed(1)
    for p in w.values():
        p.data = torch.randn(p.shape, generator=generator) * 0.1
    lora.attach(base, w, 2.0)
    sampler.refresh(base)
    export.save_model(folder, sampler.model, shipped_tokenizer(), sampler.stop, "a card\n")
    return base, sampler


@pytest.mark.parametrize("tied", [True, False])
def test_the_exported_weights_are_the_fp32_sum_rounded_once(tmp_path, tied):
    policy, _ = exported(tmp_path / "model", torch.bfloat16, tied)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    for name, p in lora.base_parameters(policy).items():
        A, B = (policy.get_parameter(f"{name.removesuffix('.weight')}.lora_{x}")
                if name.split(".")[-2] in TARGETS and name.endswith(".weight") else None for x in "AB")  # fmt: skip
        exact = p if A is None else torch.addmm(p, B, A, alpha=2.0)
        assert torch.equal(weights[name], exact.bfloat16()), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_files_have_standard_names_and_tied_weights_once_and_name_no_attention_of_ours(tmp_path, tied):
    exported(tmp_path / "model", torch.bfloat16, tied)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    plain = set(dict(tiny_model(tied=tied).named_parameters()))
    assert names == plain
    assert ("lm_head.weight" in names) != tied
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] == tied
    assert all("packed" not in path.read_text() for path in (tmp_path / "model").glob("*.json"))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == shipped_tokenizer().chat_template


def test_a_model_whose_flag_says_tied_while_its_heads_differ_is_exported_as_what_it_is(tmp_path):
    original, tokenizer = tiny_model(tied=False), shipped_tokenizer()
    original.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model, _ = load(str(tmp_path / "base"), torch.device("cpu"))
    export.save_model(tmp_path / "model", Sampler(model, [0]).model, tokenizer, [0], "")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    ids, exported_model = torch.tensor([[1, 5, 3, 9]]), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    original.set_attn_implementation("sdpa")
    assert torch.equal(exported_model(ids).logits, original(ids).logits)


LETTERS = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|x|>", "<|y|>", *"Q:1+2*3=0456789 ▁Ġa", "he"]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SCALED = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
IDS = torch.tensor([[1, 5, 3, 9, 2, 7, 4, 6] * 12])


def letters_tokenizer(family):
    """A tokenizer of a family's own class; Llama's begins texts with BOS or, "qwen3", does not."""
    options = dict(vocab={c: i for i, c in enumerate(LETTERS)}, merges=[], unk_token="<unk>", eos_token="</s>")
    if family == "qwen2":
        return Qwen2Tokenizer(**options, pad_token="<|im_end|>", extra_special_tokens=["<|x|>", "<|y|>"])
    return LlamaTokenizer(**options, bos_token="<s>", add_bos_token=family != "qwen3", extra_special_tokens=["<|x|>"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (exported folder, the model's logits, the run's tokenizer)} of each way to scale positions."""
    made = {}
    root = tmp_path_factory.mktemp("folders")
    for name, scaling in SCALED.items():
        base = tiny_model(name if name in ("qwen2", "qwen3") else "llama")
        base.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5} | scaling
        model = AutoModelForCausalLM.from_config(base.config)
        model.load_state_dict(base.state_dict())
        model.save_pretrained(root / "base")
        letters_tokenizer(name).save_pretrained(root / "base")
        model, tokenizer = load(str(root / "base"), torch.device("cpu"))
        export.save_model(root / name, model, tokenizer, [2], "")
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(root / "base")(IDS).logits
        made[name] = root / name, logits, tokenizer
        shutil.rmtree(root / "base")
    return made


@pytest.mark.parametrize("name", SCALED)
def test_a_folder_has_the_keys_of_transformers_4_and_loads_and_exports_again_as_what_it_is(folders, tmp_path, name):
    folder, logits, tokenizer = folders[name]
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"] == (SCALED[name] or None)
    assert config["torch_dtype"] == config["dtype"] == "float32"
    names = json.loads((folder / "tokenizer_config.json").read_text())
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert names["model_input_names"] == ["input_ids", "attention_mask"]
    assert names["additional_special_tokens"] == (["<|x|>", "<|y|>"] if name == "qwen2" else ["<|x|>"])
    assert "extra_special_tokens" not in names  # transformers 4 needs an object there

    model, again = load(str(folder), torch.device("cpu"))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    model.set_attn_implementation("packed")
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    for what in ("special_tokens_map", "padding_side", "model_max_length", "clean_up_tokenization_spaces"):
        assert getattr(again, what) == getattr(tokenizer, what)
    assert again("Q:1+2<|x|>a").input_ids == tokenizer("Q:1+2<|x|>a").input_ids
    export.save_model(tmp_path / "again", model, again, [2], "")
    assert contents(tmp_path / "again") == contents(folder)


def test_a_folder_says_nothing_of_the_machine_it_was_made_on(folders):
    written = [file for folder, _, _ in folders.values() for file in folder.iterdir()]
    assert len(written) == 6 * len(folders)
    for file in written:
        text = file.read_bytes()
        assert str(file.parents[1]).encode() not in text, file
        for key in (b"is_local", b"local_files_only", b"name_or_path", b"_commit_hash", b"/tmp", os.getcwd().encode()):
            assert key not in text, (file, key)


READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
read = {}
for folder in sys.argv[2:]:
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(json.loads(sys.argv[1]))).logits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read[folder] = logits.tolist(), dict(tokenizer("Q:1+2<|x|>a")), tokenizer.padding_side
print(json.dumps(read))
"""


@pytest.mark.skipif(
    "TRANSFORMERS_4" not in os.environ,
    reason="TRANSFORMERS_4 names no folder of pip install --target FOLDER transformers==4.57.6",
)
def test_transformers_4_reads_the_same_tokens_and_logits(folders):
    command = [
        sys.executable,
        "-c",
        READ,
        json.dumps(IDS.tolist()),
        *(str(folder) for folder, _, _ in folders.values()),
    ]
    environment = os.environ | {"PYTHONPATH": os.environ["TRANSFORMERS_4"]}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    read = json.loads(finished.stdout.splitlines()[-1])
    for folder, logits, tokenizer in folders.values():
        got, ids, side = read[str(folder)]
        torch.testing.assert_close(torch.tensor(got), logits, rtol=0, atol=1e-5)
        assert (ids, side) == (dict(tokenizer("Q:1+2<|x|>a")), tokenizer.padding_side)


def test_generation_stops_at_every_stop_token_and_inherits_no_sampling_settings(tmp_path):
    exported(tmp_path / "model", torch.float32)
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert set(config) <= {"eos_token_id", "transformers_version"}
    assert config["eos_token_id"] == [0, 5]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ended = 0
    for first in range(1, 37, 3):
        ids = torch.tensor([[first, 7, 3]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)[0, 3:].tolist()
        assert not {0, 5} & set(out[:-1])
        ended += out[-1] in (0, 5)
    assert ended > 0


def test_weights_that_are_not_finite_are_refused_and_the_model_of_before_stays(tmp_path):
    _, sampler = exported(tmp_path / "model", torch.bfloat16)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    sampler.model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match=r"model.layers.1.mlp.up_proj.weight holds a value that is not finite"):
        export.save_model(tmp_path / "model", sampler.model, shipped_tokenizer(), [0], "")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_export_that_is_cut_off_leaves_the_old_folder_and_the_next_one_replaces_it(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")

    def write_half():
        with atomic_folder(folder) as scratch:
            (scratch / "half").write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert [p.name for p in folder.iterdir()] == ["old"]
    with atomic_folder(folder) as scratch:
        assert not list(scratch.iterdir())
        (scratch / "new").write_text("new")
        assert [p.name for p in folder.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in folder.iterdir()] == ["new"]


def test_the_card_names_method_and_results_and_its_code_answers_a_prompt_of_the_training(
    finished_run, monkeypatch, capsys
):
    out = finished_run("--method", "bridge", "--steps", "2")
    card = (out / "model" / "README.md").read_text()
    assert "tags: [bridge]" in card.split("---")[1]
    assert METHODS["bridge"].text in card
    assert "licence" not in card  # the model is built in
    assert export.accuracies(Settings(), read_log(out / "evals.jsonl"), 2) in card
    monkeypatch.chdir(out / "model")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.startswith(f"Q:{arithmetic.evaluation(1)[0].question}=")


def test_the_card_points_to_the_licence_of_the_published_model():
    evals = [{"step": 3, "policy": {"average": 0.5}}]
    card = export.card(Settings(model="Qwen/Qwen2.5-3B"), "run", {"question": "1+1", "prompt": "Q:1+1="}, evals, 3)
    assert "The licence of `Qwen/Qwen2.5-3B` applies." in card
    assert f"tried with transformers {export.TRIED}." in card


def test_the_card_names_a_base_model_in_a_folder_without_the_path_to_it():
    facts = {"question": "1+1", "prompt": "Q:1+1="}
    card = export.card(Settings(model="/home/ada/models/own"), "run", facts, [], 3)
    assert "ada" not in card
    assert "`own`, trained for 3 steps" in card


def test_the_adapter_on_the_trained_theta_gives_the_logits_of_the_exported_model(finished_run):
    """By the code of docs/run.md."""
    pytest.importorskip("peft")
    out = finished_run("--steps", "2", "--beta", "0.01")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "run.md").read_text(), re.DOTALL)
    scope = {"run": str(out)}
    exec(code, scope)
    ids = torch.tensor([[1, 5, 3, 9, 2]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out / "model")(ids).logits
        torch.testing.assert_close(scope["model"](ids).logits, merged, rtol=1e-4, atol=1e-5)
        with scope["model"].disable_adapter():
            assert not torch.allclose(scope["model"](ids).logits, merged, rtol=1e-4, atol=1e-5)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("flags", [["--save-every", "1"], ["--method", "sft", "--dtype", "bfloat16"]])
def test_a_checkpoint_exports_as_the_run_itself_does_with_and_without_the_model_of_the_run(
    finished_run, tmp_path, flags, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(finished_run("--steps", "2", *flags), out)
    made = contents(out / "model")
    for gone in (None, "model", "evals.jsonl"):
        if gone == "model":
            shutil.rmtree(out / "model")
        elif gone:
            (out / gone).unlink()
            made.pop("README.md")
        monkeypatch.setattr(sys, "argv", ["export", str(out), "--step", "2"])
        export.main()  # replaces what the last call wrote
        assert contents(out / "model-step-2").items() >= made.items()


def test_an_export_of_an_earlier_step_has_its_weights_and_names_no_accuracy_of_another(finished_run, tmp_path):
    one = finished_run("--steps", "1")
    two = tmp_path / "run"
    shutil.copytree(finished_run("--steps", "2", "--save-every", "1"), two)
    folder = export.save_checkpoint(two, 1)
    assert contents(folder)["model.safetensors"] == contents(one / "model")["model.safetensors"]
    assert contents(folder)["model.safetensors"] != contents(two / "model")["model.safetensors"]
    card = contents(folder)["README.md"].decode()
    assert "for 1 steps with the method `bridge`" in card
    assert "none: step 1 was not evaluated" in card and "| before" not in card  # noqa: PT018


def test_what_cannot_be_exported_is_named_in_one_line(finished_run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(finished_run("--steps", "2", "--save-every", "1"), out)

    def refused(*flags):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            export.main()
        assert "\n" not in str(stopped.value)
        return str(stopped.value)

    assert f"no such checkpoint in {tmp_path}/nowhere/checkpoint: its steps are none" in refused(tmp_path / "nowhere")
    assert f"no such checkpoint in {out}/checkpoint: its steps are 1, 2" in refused(out, "--step", 7)
    file = out / "checkpoint" / "step-000001" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])
    assert f"no checkpoint in {out}/checkpoint is intact" in refused(out, "--step", 1)
    facts = out / "checkpoint" / "step-000002" / "facts.json"
    facts.write_text(facts.read_text().replace('"lora_rank": 4', '"lora_rank": 5'))
    (facts.parent / "digests.json").write_text("{}")
    assert "its shapes differ from those in" in refused(out)
    assert not list(out.glob("*model-step*"))


def test_bfloat16_exports_theta_rounded_where_the_adapter_never_moved(tmp_path):
    out = tmp_path / "run"
    flags = ["--preset", "smoke", "--out", str(out), "--dtype", "bfloat16", "--method", "mix_lora", "--beta", "0"]
    for steps in ("1", "2"):  # the second replaces the first one's model
        bridge.main([*flags, "--steps", steps, "--resume", "--eval-problems", "1"])
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    theta = tensors_in(out / "checkpoint")
    assert all(torch.equal(p, theta[f"theta.{i}"].bfloat16()) for i, p in enumerate(model.parameters()))
    assert not list(out.glob("model.*"))
