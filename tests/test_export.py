"""export.py: what others load is the trained policy, whole, with the tokens it stops at and a card that is true."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import tensors_in, tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import bridge
import lora
import plot
from grading.scores import table
from infra import export
from sampler import Sampler
from tasks import arithmetic as toy

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
    export.save_model(folder, sampler.model, toy.make_tokenizer(), sampler.stop, "a card\n")
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


def test_what_rounding_does_to_logits_is_nothing_in_fp32_and_in_bf16_what_transformers_sees(tmp_path):
    sequences = [[3, 1, 4, 1, 5], [9, 2, 6]]
    policy, sampler = exported(tmp_path / "exact", torch.float32)
    assert export.rounding_change(policy, sampler.model, sequences) == (0.0, 0.0)
    policy, sampler = exported(tmp_path / "rounded", torch.bfloat16)
    exact, rounded = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype="auto") for n in ("exact", "rounded"))
    with torch.no_grad():
        pairs = [[m(torch.tensor([ids])).logits[0].float() for m in (exact, rounded)] for ids in sequences]
    largest, other = export.rounding_change(policy, sampler.model, sequences)
    assert 0 < largest == pytest.approx(max((a - b).abs().max().item() for a, b in pairs), rel=0.1)
    assert other == sum((a.argmax(-1) != b.argmax(-1)).sum().item() for a, b in pairs) / 8


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
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == toy.CHAT_TEMPLATE


def test_generation_stops_at_every_stop_token_and_inherits_no_sampling_settings(tmp_path):
    exported(tmp_path / "model", torch.float32)
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert set(config) <= {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version"}
    assert config["eos_token_id"] == [0, 5]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ended = 0
    for first in range(1, 37):
        ids = torch.tensor([[first, 7, 3]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)[0, 3:].tolist()
        assert not {0, 5} & set(out[:-1])
        ended += out[-1] in (0, 5)
    assert ended > 0


def test_a_pad_token_is_exported_only_if_the_model_has_an_embedding_for_it(tmp_path):
    tokenizer = toy.make_tokenizer()
    for pad, expected in (("+", tokenizer.convert_tokens_to_ids("+")), ("<a new token>", 21)):
        tokenizer.add_special_tokens({"pad_token": pad})
        for vocabulary in (21, 37):
            model = tiny_model()
            model.config.vocab_size = vocabulary
            export.save_model(tmp_path / "model", model, tokenizer, [0], "")
            config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
            assert config.get("pad_token_id") == (expected if expected < vocabulary else None)


def test_weights_that_are_not_finite_are_refused_and_the_model_of_before_stays(tmp_path):
    _, sampler = exported(tmp_path / "model", torch.bfloat16)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    sampler.model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = float("nan")
    with pytest.raises(FloatingPointError, match=r"model.layers.1.mlp.up_proj.weight holds a value that is not finite"):
        export.save_model(tmp_path / "model", sampler.model, toy.make_tokenizer(), [0], "")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_export_that_is_cut_off_leaves_the_old_folder_and_the_next_one_replaces_it(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("old")

    def write_half():
        with export.whole(folder) as scratch:
            (scratch / "half").write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert [p.name for p in folder.iterdir()] == ["old"]
    with export.whole(folder) as scratch:
        assert not list(scratch.iterdir())
        (scratch / "new").write_text("new")
        assert [p.name for p in folder.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in folder.iterdir()] == ["new"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of three steps, and what its end printed."""
    out = tmp_path_factory.mktemp("runs") / "tried"
    bridge.main(["--preset", "smoke", "--out", str(out), "--steps", "3", "--beta", "0.01"])
    return out


def code(card, number):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)[number]


def test_the_card_says_what_was_done_and_what_came_out(finished):
    card = (finished / "model" / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: transformers" in front
    assert "- bridge" in front
    assert "base_model" not in front  # the built-in model is not on the hub
    assert "license" not in front
    assert "arxiv.org/abs/2509.06948" in card
    evals = plot.read(finished / "evals.jsonl")
    assert table({"step 0": evals[0]["policy"], "step 3": evals[-1]["policy"]}) in card
    assert "On 8 evaluation prompts that changed a logit by 0 at most" in card  # it ran in fp32
    bold = re.findall(r"\| \*\*(\w+)\*\* \| \*\*(.*?)\*\* \|", card)
    assert ("beta", "0.01") in bold
    assert ("steps", "3") in bold
    assert "lam" not in dict(bold)
    assert "| lam | 0.5 |" in card
    assert "| demonstrations | built-in chain arithmetic | 256 |" in card
    assert f"torch {torch.__version__}" in card
    assert "--beta 0.01" in card


def test_only_a_name_on_the_hub_is_a_base_model(tmp_path):
    s = bridge.Settings
    assert "base_model: Qwen/Qwen2.5-3B\n" in export.front_matter(s(model="Qwen/Qwen2.5-3B"))
    assert "base_model" not in export.front_matter(s(model=str(tmp_path)))


def test_the_card_s_code_loads_the_model_and_asks_it_as_it_was_trained(finished, capsys):
    scope = {"folder": str(finished / "model"), "question": "1+2*3"}
    exec(code((finished / "model" / "README.md").read_text(), 0), scope)
    assert capsys.readouterr().out.strip()
    assert scope["inputs"].input_ids[0].tolist() == bridge.prompts.encode_prompt(scope["tokenizer"], "1+2*3", "")


def test_the_adapter_on_the_trained_theta_gives_the_logits_of_the_exported_model(finished):
    pytest.importorskip("peft")
    newest = max((finished / "checkpoint").glob("step-??????"))
    scope = {"folder": str(finished / "model"), "checkpoint": newest, "adapter": str(finished / "adapter")}
    exec(code((finished / "model" / "README.md").read_text(), 1), scope)
    ids = torch.tensor([[1, 5, 3, 9, 2]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(finished / "model")(ids).logits
        torch.testing.assert_close(scope["model"](ids).logits, merged, rtol=1e-4, atol=1e-5)
        with scope["model"].disable_adapter():
            assert not torch.allclose(scope["model"](ids).logits, merged, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_never_moved_is_said_to_be_zero(tmp_path, capsys):
    flags = ["--preset", "smoke", "--out", str(tmp_path / "run"), "--steps", "1", "--method", "mix_lora", "--beta", "0"]
    bridge.main(flags)
    assert "WARNING: w is zero (beta is 0)" in capsys.readouterr().out
    assert "Here it is zero: it never moved." in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_run_in_bfloat16_exports_bfloat16_and_finishing_again_replaces_it(tmp_path):
    flags = ["--preset", "smoke", "--out", str(tmp_path / "run"), "--dtype", "bfloat16", "--method", "sft"]
    for steps in ("1", "2"):
        bridge.main([*flags, "--steps", steps, "--resume"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    theta = tensors_in(tmp_path / "run" / "checkpoint")
    assert all(torch.equal(p, theta[f"theta.{i}"].bfloat16()) for i, p in enumerate(model.parameters()))
    assert not list((tmp_path / "run").glob("model.*"))


def test_with_a_named_template_the_card_spells_the_prompt_out_and_the_tokenizer_adds_its_bos():
    tokenizer, scope = toy.make_tokenizer(), {"question": "1+2"}
    tokenizer.chat_template = None
    task, sampler = SimpleNamespace(instruction="\nThink.", template="plain"), SimpleNamespace(stop=[0])
    text = export.usage(SimpleNamespace(task=task, tokenizer=tokenizer, s=bridge.Settings(), sampler=sampler))
    exec(re.search("^prompt = .*", text, re.MULTILINE)[0], scope)
    assert scope["prompt"] == bridge.prompts.prompt_text(tokenizer, "1+2", "\nThink.", "plain")
    assert "add_special_tokens=True" in text
