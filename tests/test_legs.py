"""The task legs in English, and the converter of GGUF files."""

import gzip
import json
import re
import sys
from pathlib import Path

import gguf as writer
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import rewards
from infra import gguf, model
from infra.files import DataError
from ops.packed import ModelError
from settings import SettingError, Settings, check
from settings import parse as parse_settings
from tasks import legs, named

NUMBER_OF = {  # written again, apart from the task
    "legs": "ant bee beetle 6; spider scorpion 8; cow dog frog cat horse lion rabbit tiger 4; "
    "duck owl parrot hen eagle chicken 2",
    "wheels": "unicycle wheelbarrow 1; bicycle motorcycle scooter motorbike 2; tricycle 3; car taxi van skateboard 4",
    "sides": "triangle 3; square rectangle parallelogram 4; pentagon 5; hexagon 6; heptagon 7; octagon 8",
}
NUMBER_OF = {
    (part, thing): int(row.split()[-1])
    for part, rows in NUMBER_OF.items() for row in rows.split(";") for thing in row.split()[:-1]
}  # fmt: skip


def read(question):
    """(part, {thing: count}) of a question, by its grammar."""
    part, asked = re.fullmatch(r"How many (\w+) do(?:es)? (.+) have\?", question).groups()
    counts = {}
    for one in asked.split(" and "):
        count, thing = one.split()
        assert (count == "1") != thing.endswith("s")
        counts[thing.removesuffix("s")] = int(count)
    return part, counts


def things(questions):
    return {(part, thing) for part, counts in map(read, questions) for thing in counts}


@pytest.fixture(scope="module")
def task():
    return legs.task(0, legs.EVAL_MAX)


def test_every_answer_is_the_sum_of_counts_times_parts(task):
    for row in (*task.problems, *task.demonstrations, *task.evaluation):
        part, counts = read(row.question)
        assert sum(count * NUMBER_OF[part, thing] for thing, count in counts.items()) == int(row.answer)


def test_a_demonstration_states_the_facts_calculates_and_boxes_what_the_grader_accepts(task):
    assert len(task.demonstrations) == legs.DEMONSTRATIONS
    for d in task.demonstrations:
        facts, _, sums = d.response.partition(": ")
        part, counts = read(d.question)
        numbers = [NUMBER_OF[part, thing] for thing in counts]
        assert facts.count(part) == 1
        assert [int(n) for n in re.findall(r"\d+", facts)] == numbers
        *steps, boxed = sums.split(" = ")
        products = [[int(n) for n in term.split("*")] for term in steps[0].split(" + ")]
        assert products == [[count, n] for count, n in zip(counts.values(), numbers, strict=True)]
        if len(counts) == 2:
            assert steps[1] == " + ".join(str(a * b) for a, b in products)
        assert boxed == f"\\boxed{{{d.answer}}}"
        assert rewards.is_correct(d.response, d.answer).correct


def test_demonstrations_know_fewer_things_than_problems_and_evaluation_knows_all(task):
    shown, asked = (things(row.question for row in rows) for rows in (task.demonstrations, task.problems))
    new = things(p.question for p in task.evaluation if p.group == "new things")
    assert shown < asked
    assert not asked & new
    assert asked | new == set(NUMBER_OF)


def test_no_question_occurs_twice_and_the_evaluation_is_the_same_for_every_seed(task):
    questions = [row.question for row in (*task.problems, *task.demonstrations)]
    evaluated = {p.question for p in task.evaluation}
    assert len(set(questions)) == len(questions) == legs.PROMPTS + legs.DEMONSTRATIONS
    assert evaluated.isdisjoint(questions)
    other = legs.task(1, legs.EVAL_MAX)
    assert other.evaluation == task.evaluation
    assert other.problems != task.problems
    assert legs.evaluation(7) == [p for g in legs.GROUPS for p in [p for p in task.evaluation if p.group == g][:7]]
    with pytest.raises(DataError, match=r"^eval_problems: the task has 100 of each group, 101 asked for"):
        legs.evaluation(101)


def test_the_preset_names_the_task_and_a_small_model_is_refused():
    s, _ = parse_settings(["--preset", "smollm2"])
    assert (s.model, s.task) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "legs")
    assert named.load_task(s) == legs.task(0, s.eval_problems)
    for small in ("arithmetic-laptop", "logic-laptop"):
        with pytest.raises(SettingError, match=f"{small} has no tokens for the task legs: use --preset smollm2"):
            check(Settings(model=small, task="legs"))


def byte_tokens():
    """The 256 printable characters that stand for bytes in byte-level BPE."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]


@pytest.fixture
def file(tmp_path):
    """A GGUF file of a tiny Llama with fp32 weights, as llama.cpp lays them out, and the rule smollm for digits."""
    torch.manual_seed(0)
    tokens = ["<|endoftext|>", "<|im_end|>", *byte_tokens(), "ĠĠ", "Ġ1"]
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    llama = AutoModelForCausalLM.from_config(config)
    path = tmp_path / "tiny.gguf"
    w = writer.GGUFWriter(path, "llama")
    w.add_context_length(64)
    w.add_embedding_length(32)
    w.add_block_count(1)
    w.add_feed_forward_length(48)
    w.add_head_count(4)
    w.add_head_count_kv(2)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_dimension_count(8)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    w.add_token_merges(["Ġ Ġ", "Ġ 1"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_unk_token_id(0)
    w.add_pad_token_id(1)
    w.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    places = dict(zip(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True,
    ))  # fmt: skip
    for name, p in llama.named_parameters():
        x, part = p.detach().numpy(), name.split(".")[-2]
        if part in ("q_proj", "k_proj"):  # llama.cpp rotates neighbours, transformers halves
            heads = 4 if part == "q_proj" else 2
            x = x.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(x.shape)
        place = f"blk.0.{places[part]}" if part in places else {
            "embed_tokens": "token_embd", "input_layernorm": "blk.0.attn_norm",
            "post_attention_layernorm": "blk.0.ffn_norm", "norm": "output_norm",
        }[part]  # fmt: skip
        w.add_tensor(f"{place}.weight", np.ascontiguousarray(x))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path, llama


def test_a_gguf_file_becomes_a_folder_with_its_weights_and_digits_split_one_by_one(file, tmp_path, monkeypatch, capsys):
    path, llama = file
    monkeypatch.setattr(sys, "argv", ["infra.gguf", str(path), str(tmp_path / "folder")])
    gguf.main()
    assert capsys.readouterr().out == f"{tmp_path}/folder\n"
    loaded, tokenizer = model.load(str(tmp_path / "folder"))
    for (name, p), q in zip(llama.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  12", add_special_tokens=False)) == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("a  12 θ", add_special_tokens=False)) == "a  12 θ"
    names = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast"  # as infra/export.py writes it
    assert str(tmp_path) not in str(names)
    assert not {"is_local", "local_files_only"} & set(names)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["rope_theta"] == 10000.0
    with pytest.raises(SystemExit, match=r"^infra\.gguf: .*folder exists: name another folder$"):
        gguf.main()


def test_what_is_no_gguf_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"^there is no file and no installed package 'missing\.gguf'$"):
        gguf.find_file("missing.gguf")
    with pytest.raises(ModelError, match=r"^the package numpy contains no GGUF file$"):
        gguf.find_file("numpy")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(ModelError, match=r"damaged\.gguf is no GGUF file that transformers can read"):
        gguf.convert(damaged, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_shadow_that_earns_nothing_leaves_every_committed_run_as_it_is_without_one():
    """theory.md, fact 2: what the page says of own rollouts and mix_lora."""
    with gzip.open(Path(__file__).parents[1] / "bench/results/smollm2.jsonl.gz", "rt") as file:
        finals = [run for run in map(json.loads, file) if run["kind"] == "without_w"]
    own = {run["seed"]: run for run in finals if run["flags"].get("shadow-rollouts") == "own"}
    without = {run["seed"]: run for run in finals if run["method"] == "mix_lora"}
    assert own.keys() == without.keys() == {1, 2, 3}
    for seed, run in own.items():
        assert {e["shadow"]["average"] for e in run["evals"]} == {0.0}
        for name in ("reward", "response_tokens", "entropy", "sft_nll", "lora_norm"):
            assert run["curves"][name] == without[seed]["curves"][name]
        assert [e["policy"] for e in run["evals"]] == [e["policy"] for e in without[seed]["evals"]]
