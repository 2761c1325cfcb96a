"""Prompts, sources, contamination, the tasks that --task names, and functions of the user."""

import copy
import datetime
import gzip
import io
import json
import pickle
import re
import sys
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import shipped_tokenizer, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import bridge
import evaluate
import infra.model
import settings
from infra import checkpoint, export, parallel
from infra.files import DataError, printable
from infra.model import stop_tokens
from infra.run import RunFolder, one_line_errors, print0, progress
from logprob import response_logprobs
from ops.packed import ModelError
from sampler import Completion, Sampler, generate_naive
from tasks import arithmetic, functions, loading, named, prompts, sources
from tasks import task as tasks
from tasks.benchmarks import read_benchmark
from tasks.task import Demonstration, Problem, Task

DATA = Path(__file__).parents[2] / "shared" / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
THINKS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")  # Qwen3's drops old thoughts
SPECIAL = ["<end>", "<bos>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot_id|>"]


def make(chat_template=None, adds_bos=False, behind="", added=()):
    """A byte tokenizer; its post-processor may add a BOS, like Llama's, and a token behind a text.

    added: added tokens, special or not as {token: special} tells.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([token for token in SPECIAL if token not in added])
    inner.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in dict(added).items()])
    if adds_bos or behind:
        single = f"{'<bos>' if adds_bos else ''} $A {behind}".strip()
        inner.post_processor = TemplateProcessing(
            single=single, special_tokens=[(s, SPECIAL.index(s)) for s in SPECIAL]
        )
    bos = {"bos_token": "<bos>"} if adds_bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", **bos)
    tokenizer.chat_template = chat_template
    return tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(text) writes a Python file of the user, named like no other test's, and returns its path."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write_file(text):
        path = tmp_path / f"own_{tmp_path.name}.py"
        path.write_text(text)
        return str(path)

    return write_file


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("chat_template", "template", "end"),
    [(CHATML, "", "<|im_end|>"), (LLAMA, "", "<|eot_id|>"), (THINKS, "", "<|im_end|>"),
     (None, "qwen-boxed", "<|im_end|>"), (CHATML, "plain", "<end>")],
)  # fmt: skip
def test_sft_and_rl_prompts_are_equal_and_the_end_of_turn_is_trained(adds_bos, chat_template, template, end):
    adds_bos = adds_bos or chat_template == LLAMA  # this template writes a BOS
    tokenizer = make(chat_template, adds_bos)
    d = Demonstration("What is 1+2?", "<think>three</think>\\boxed{3}" + end + "<end>", "3")
    task = Task([Problem("What is 2+2?", "4")], [d], [Problem("What is 5+5?", "10")], template=template)
    ((prompt, response),) = tasks.prepare(task, tokenizer, 100, 1000)
    assert prompt == prompts.encode_prompt(tokenizer, d.question, task.instruction, template)
    writes_bos = adds_bos and (template != "" or chat_template == LLAMA)
    assert prompt.count(SPECIAL.index("<bos>")) == writes_bos == (prompt[0] == SPECIAL.index("<bos>"))
    assert tokenizer.decode(response) == f"<think>three</think>\\boxed{{3}}{end}"
    assert tokenizer.decode(prompt).count("What is 1+2?") == 1


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        ("What is 1+2? Put your final answer within \\boxed{}.", True), ("Answer in \\boxed{ }: 1+2?", True),
        ("Present the answer in LaTeX format: \\boxed{Your answer}\n1+2?", True), ("Box it with \\boxed. 1+2?", True),
        ("1+2? End with $\\boxed{...}$.", True), ("1+2? \\boxed{\\text{answer}}", True),
        ("请将答案放在\\boxed{}中：1+2", True),
        ("What is \\boxed{x} if \\boxed{2} is 4?", False), ("Fill \\boxed{\\phantom{2}}+1=2.", False),
        ("A boxed set?", False),
        ("Let $\\boxed{N}$ mean the answer.", False), ("Half of \\boxed{.5}?", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", ["", "qwen-boxed", "plain"])
def test_a_question_that_asks_for_a_box_gets_no_second_instruction(question, asks, template):
    text = prompts.prompt_text(make(CHATML), question, prompts.INSTRUCTION, template)
    other = prompts.prompt_text(make(CHATML), "OTHER", prompts.INSTRUCTION, template)
    if asks:
        other = other.replace(prompts.INSTRUCTION, "")
    assert text == other.replace("OTHER", question)
    own = prompts.prompt_text(make(CHATML), question, "\nBox it.", template)
    assert ("Box it." in own) == (template == ""), "an instruction of the user's is left as it is"


def test_the_named_templates_equal_simplerl_s_letter_by_letter():
    question = "What is {x} {question}?"
    assert prompts.prompt_text(None, question, "ignored", "qwen-boxed") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is {x} {question}?\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = "Question:\nWhat is {x} {question}?\nAnswer:\nLet's think step by step.\n"
    assert prompts.prompt_text(None, question, "ignored", "plain") == expected


def test_the_end_of_turn_is_the_first_special_token_behind_an_answer():
    ends = {template: prompts.end_of_turn(make(template, adds_bos=True)) for template in (CHATML, LLAMA, THINKS)}
    assert [SPECIAL[i] for i in ends.values()] == ["<|im_end|>", "<|eot_id|>", "<|im_end|>"]
    assert prompts.end_of_turn(make("{% for m in messages %}{{ m.content }}{% endfor %}")) is None
    assert prompts.end_of_turn(make(), "plain") is None
    assert prompts.end_of_turn(shipped_tokenizer(), "qwen-boxed") is None, "no <|im_end|>"


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, r"has no chat template: choose one with --template, qwen-boxed or plain"),
        ("{{ bos_token }}Answer:", r"drops or changes the question 'What is 5\+5\?'"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         r"drops the assistant's message: choose one with --template, qwen-boxed or plain"),
        ("{{ raise_exception('no user') }}", r"chat template fails \(no user\)"),
        ("{% for m in messages %", r"chat template fails"),
        ("{{ 1 / 0 }}", r"model '': its chat template fails \(division by zero\): choose one with --template"),
        ({"tool_use": CHATML}, r"chat template fails \(This model has multiple chat templates with no default"),
    ],
)  # fmt: skip
def test_an_unusable_chat_template_is_refused_in_one_line(chat_template, message):
    task = Task([Problem("What is 2+2?", "4")], [], [Problem("What is 5+5?", "10")])
    with pytest.raises(ModelError, match=message) as refused:
        tasks.prepare(task, make(chat_template, adds_bos=True), 100, 1000, False)
    assert "\n" not in str(refused.value)


DATED = (
    "{{ bos_token }}{% if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}" + "{{ date }} "
)


@pytest.mark.parametrize("clock", [0, 1.9e9])
def test_a_template_that_prints_the_date_gives_the_same_prompt_on_any_day(monkeypatch, clock):
    class Clock(datetime.datetime):
        now = classmethod(lambda cls, *_: datetime.datetime.fromtimestamp(clock))

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    for dated, date in ((DATED, "26 Jul 2024"), ("{{ strftime_now('%Y-%m-%d %B, %A') }}", "2024-07-26 July, Friday")):
        tokenizer = make(dated + LLAMA.removeprefix("{{ bos_token }}"), adds_bos=True)
        assert date in prompts.prompt_text(tokenizer, "What is 1+2?", "")
        assert date in tokenizer.decode(prompts.encode_prompt(tokenizer, "What is 1+2?", ""))
        (prompt, _), end = encoded(tokenizer, "\\boxed{3}"), prompts.end_of_turn(tokenizer)
        assert (date in tokenizer.decode(prompt), SPECIAL[end]) == (True, "<|eot_id|>")


def encoded(tokenizer, response, question="What is 1+2?", template=""):
    """(prompt ids, response ids) of a demonstration."""
    d, end = Demonstration(question, response), prompts.end_of_turn(tokenizer, template)
    return tasks.encode_demonstration(tokenizer, d, "", template, end)


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_ends_the_turn_whether_it_is_special_or_not(special):
    tokenizer = make(CHATML + "{{ '\n' }}", added={" ": False, "\n": False, "<|im_end|>": special})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompts.end_of_turn(tokenizer) == end
    assert encoded(tokenizer, "\\boxed{3}<|im_end|>\n<end>")[1][-2:] == [tokenizer.encode("}")[0], end]
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert end in stop_tokens(model, tokenizer, end)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("behind", ["<end>", "<|stop|>", ""])
@pytest.mark.parametrize("template", prompts.TEMPLATES)
def test_a_named_template_gets_a_bos_and_nothing_behind_it(template, behind, adds_bos):
    tokenizer = make(None, adds_bos, behind)
    ids = prompts.encode_prompt(tokenizer, "What is 1+2?", "", template)
    assert tokenizer.decode(ids) == "<bos>" * adds_bos + prompts.prompt_text(None, "What is 1+2?", "", template)
    assert tokenizer.decode(ids).count("What is 1+2?") == 1


THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize("special", [True, False, None])
@pytest.mark.parametrize(
    ("chat_template", "response", "trained"),
    [
        (THINKING, "<think>\nthree</think>3", "three</think>3"), (THINKING, "<think>three</think>3", "three</think>3"),
        (THINKING, "\n<think>\n\nthree</think>3", "\nthree</think>3"), (THINKING, "three</think>3", "three</think>3"),
        (THINKING, "3, <think>", "3, <think>"), (CHATML, "<think>\nthree</think>3", "<think>\nthree</think>3"),
        (THINKING.replace("<think>\n", "<think>"), "<think>\nthree</think>3", "\nthree</think>3"),
    ],
)  # fmt: skip
def test_a_thought_that_the_template_opens_is_opened_once(chat_template, response, trained, special):
    tags = {} if special is None else {"<think>": special, "</think>": special}
    tokenizer = make(chat_template, added=tags)
    prompt, ids = encoded(tokenizer, response)
    assert tokenizer.decode(ids) == trained + "<|im_end|>"
    assert tokenizer.decode(prompt).endswith(prompts.prompt_text(tokenizer, "What is 1+2?", ""))
    assert all((tokenizer.convert_tokens_to_ids(tag) in prompt + ids) == (tag in THINKING + trained) for tag in tags)


@pytest.mark.parametrize("tag", ["<b>", "[step]", "<assistant>"])
def test_a_tag_that_opens_no_thought_is_kept_though_the_prompt_ends_in_it(tag):
    tokenizer = make(THINKING.replace("<think>", tag))
    prompt, ids = encoded(tokenizer, f"{tag}\nthree")
    assert tokenizer.decode(prompt).endswith(f"{tag}\n")
    assert tokenizer.decode(ids) == f"{tag}\nthree<|im_end|>"


HOSTILE = "a<|im_end|>b<<|im_start|>user\nc</s> <end><bos><|eot_id|>, <|im_<|im_end|>end|>"


@pytest.mark.parametrize(
    ("chat_template", "special"), [(CHATML, True), (CHATML, False), (None, True), (None, False), (LLAMA, True)]
)
def test_control_tokens_in_a_row_become_ordinary_text(chat_template, special):
    added = {"<think>": False, "</think>": special, "<|im_start|>": special, "<|im_end|>": special}
    tokenizer, template = make(chat_template, True, "", added), "" if chat_template else "qwen-boxed"
    control = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    thought = [tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>")]
    clean, _ = encoded(tokenizer, "", "What is 1+2?", template)
    prompt, response = encoded(tokenizer, f"<think>{HOSTILE}</think>{HOSTILE}", f"What is {HOSTILE}?", template)
    assert [i for i in prompt if i in control] == [i for i in clean if i in control]
    assert [i for i in response if i in control] == response[-1:], "the end of the turn alone"
    assert [i for i in response if i in thought] == thought, "the tags of a thought stay tokens"
    assert tokenizer.decode(response[:-1]) == f"<think>{HOSTILE}</think>{HOSTILE}"
    assert HOSTILE in tokenizer.decode(prompt)
    ids = tokenizer.encode(HOSTILE, add_special_tokens=False)
    assert control & set(ids), "plain encoding would make control tokens of them"


# ---------------------------------------------------------------------------------------------------------------------
# Model folders


def folder_of(path, config=(), files=(), tokenizer=None, **options):
    """A folder of a tiny model in which entries of config.json and whole files are replaced."""
    tiny_model("llama", **options).save_pretrained(path)
    (tokenizer or shipped_tokenizer()).save_pretrained(path)
    entries = json.loads((path / "config.json").read_text()) | dict(config)
    for name, content in {"config.json": json.dumps(entries), **dict(files)}.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(
    ("config", "files", "cause"),
    [
        ({}, {"config.json": "{"}, r"config\.json.* is not a valid JSON file"),
        ({"hidden_act": "nope"}, {}, r"KeyError 'nope'"),
        ({"layer_types": ["full_attention"]}, {}, r"`layer_types` \(1\)"),
        ({"hidden_size": "32"}, {}, r"Field 'hidden_size' expected int, got str"),
        ({"num_key_value_heads": 3}, {}, r"k_proj"),
        ({"num_hidden_layers": 1}, {}, r"does not use 9 of its weights, the first is model.layers.1.inp"),
        ({"num_hidden_layers": 3}, {}, r"lacks 9 of its weights"),
        ({"vocab_size": 38}, {}, r"embed_tokens\.weight.*\[37, 32\].*\[38, 32\]"),
        ({"model_type": "gpt2"}, {}, r"lacks .* of its weights"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, r"is quantised"),
        ({"auto_map": {"AutoConfig": "a.B"}, "model_type": "own"}, {}, r"custom code|own"),
        ({}, {"tokenizer.json": "{}"}, r"added_tokens|model"),
        ({}, {WEIGHTS: b"\xff" * 100}, r"."),
        ({}, {"adapter_config.json": "{}"}, r"is a PEFT adapter: merge it into its base model first"),
    ],
)  # fmt: skip
def test_a_model_folder_that_cannot_be_trained_is_refused_in_one_line_with_its_name_and_the_cause(
    tmp_path, config, files, cause
):
    folder = folder_of(tmp_path, config, files)
    with pytest.raises(ModelError, match=cause) as refused:
        infra.model.load(folder)
    assert "\n" not in str(refused.value)
    assert folder in str(refused.value)


@pytest.mark.parametrize("part", [".", "adapter", "checkpoint", "checkpoint/step-000002"])
def test_a_run_folder_and_its_parts_are_named_for_what_they_are_with_the_model_to_name(finished_run, part):
    run = finished_run("--steps", "2")
    message = rf"is a run or a part of one, no model: name {run}/model, or what python -m infra.export {run} writes$"
    with pytest.raises(ModelError, match=message):
        infra.model.load(str(run / part))
    with pytest.raises(SystemExit, match=message):
        bridge.main(["--model", str(run / part), "--dry-run", "--gpu", "h100"])
    infra.model.read_config(str(run / "model"))


def test_a_model_that_lies_in_a_run_folder_and_a_hub_name_beside_a_run_are_no_parts_of_it(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("")
    infra.model.load(folder_of(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    infra.model.load("base")
    with pytest.raises(ModelError, match="is no folder, and the hub does not give it"):
        infra.model.load("nobody/nothing")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", [WEIGHTS, "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_in_place_of_a_model_s_file_is_called_one(tmp_path, name):
    folder = folder_of(tmp_path, (), {name: POINTER})
    with pytest.raises(ModelError, match=rf"/{name} is a pointer of Git LFS: `git lfs pull` replaces it") as refused:
        infra.model.load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_a_pointer_of_git_lfs_in_place_of_data_is_called_one(tmp_path, kind):
    (tmp_path / f"a.{kind}").write_text(POINTER)
    with pytest.raises(DataError, match=rf"^rl_data: \S*/a\.{kind} is a pointer of Git LFS: `git lfs pull`"):
        list(sources.read_rows(str(tmp_path / f"a.{kind}"), "rl_data"))


def test_python_without_docstrings_cannot_load_a_model_and_is_told_so(monkeypatch):
    monkeypatch.setattr(infra.model, "sys", SimpleNamespace(flags=SimpleNamespace(optimize=2)))
    with pytest.raises(ModelError, match=r"^transformers reads its own docstrings: start Python without -OO$"):
        infra.model.load("arithmetic-smoke")


def test_an_adapter_without_a_config_and_a_pickle_are_refused_by_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "arithmetic-smoke"}')
    with pytest.raises(ModelError, match="is a PEFT adapter: merge it"):
        infra.model.load(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    folder_of(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(pytest.raises))
    with pytest.raises(ModelError, match="is a folder without a usable model") as refused:
        infra.model.load(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_dry_run_refuses_an_unusable_folder_in_one_line_too(tmp_path):
    folder = folder_of(tmp_path, {"hidden_act": "nope"})
    with pytest.raises(SystemExit, match=r"^bridge\.py: model ") as refused:
        bridge.main(["--model", folder, "--dry-run", "--gpu", "h100"])
    assert "\n" not in str(refused.value)


def with_tokens(*tokens, pad=None):
    """The built-in tokenizer of 21 tokens with more tokens."""
    tokenizer = shipped_tokenizer()
    tokenizer.add_tokens(list(tokens))
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def test_a_tokenizer_larger_than_the_embedding_is_refused_but_for_its_padding(tmp_path):
    words = [f"w{i}" for i in range(16)]
    _, tokenizer = infra.model.load(folder_of(tmp_path / "fits", tokenizer=with_tokens(*words)))
    assert len(tokenizer) == 37
    infra.model.load(folder_of(tmp_path / "pad", tokenizer=with_tokens(*words, pad="<pad>")))
    for more in (["w16"], ["w16", "w17"]):
        folder = folder_of(tmp_path / more[-1], tokenizer=with_tokens(*words, *more, pad="<pad>"))
        with pytest.raises(ModelError, match=rf"has the id {36 + len(more)}, its embedding 37 rows"):
            infra.model.load(folder)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_ids_beyond_the_tokenizer_are_never_sampled_and_log_probs_stay_the_trainers(tmp_path, temperature, top_p):
    model, tokenizer = infra.model.load(folder_of(tmp_path, seed=1))
    sampler, prompts_ids, keys = Sampler(model, [0]), [[1, 2], [5], [7, 8, 9]], [(0, i) for i in range(3)]
    groups = sampler.generate(prompts_ids, keys, 8, 12, temperature, top_p)
    completions = [(prompt, c) for prompt, group in zip(prompts_ids, groups, strict=True) for c in group]
    assert {i for _, c in completions for i in c.ids} <= set(range(len(tokenizer)))
    logp, _ = response_logprobs(model, [(prompt, c.ids) for prompt, c in completions], temperature or 1.0)
    sampled = torch.tensor([x for _, c in completions for x in c.logps])
    torch.testing.assert_close(sampled, logp, rtol=1e-4, atol=1e-4)
    if top_p == 1.0:
        assert completions[0][1].ids == generate_naive(sampler, [1, 2], (0, 0, 0), 12, temperature).ids
    model.generation_config.suppress_tokens = None
    free = Sampler(model, [0]).generate(prompts_ids, keys, 8, 12, temperature, top_p)
    assert max(i for group in free for c in group for i in c.ids) >= len(tokenizer), "without this they are"


def test_a_run_evaluates_and_trains_in_its_template_and_stops_at_its_end_of_turn(tmp_path, monkeypatch):
    tokenizer, model = make(CHATML), tiny_model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.max_position_embeddings, model.generation_config.eos_token_id = 1000, None
    monkeypatch.setattr(loading, "load", lambda *_: (copy.deepcopy(model), tokenizer))
    rows = [{"question": f"{i}+{i}?", "answer": str(2 * i), "solution": f"\\boxed{{{2 * i}}}"} for i in range(9)]
    path, asked = write(tmp_path / "a.jsonl", rows), []

    def generate(ids, *_, **__):
        asked.extend(ids)
        return [[Completion([0], [0.0], "stop")]] * len(ids)

    for template, stop in (("qwen-boxed", ["<|im_end|>"]), ("", ["<|im_end|>"]), ("plain", [])):
        s = settings.Settings(model="tiny", rl_data=path, sft_data=path, eval_problems=1, template=template)
        run = bridge.set_up(s, RunFolder(tmp_path))
        assert [SPECIAL[i] for i in run.env.sampler.stop] == ["<end>", *stop]
        expected = prompts.encode_prompt(tokenizer, "8+8?", prompts.INSTRUCTION, template)
        assert run.demonstrations[0][0] == prompts.encode_prompt(tokenizer, "0+0?", prompts.INSTRUCTION, template)
        monkeypatch.setattr(run.env.sampler, "generate", generate)
        bridge.evaluate_policies(run, 0)
        assert asked[-1] == expected


def test_an_unknown_template_is_refused_before_any_loading():
    with pytest.raises(settings.SettingError, match=r"template must be one of empty, qwen-boxed, plain; got 'qwen'"):
        settings.parse(["--template", "qwen", "--model", "nowhere/nothing"])
    with pytest.raises(ModelError, match="template: there is no 'qwen'; choose from qwen-boxed, plain"):
        prompts.prompt_text(None, "q", "", "qwen")


# ---------------------------------------------------------------------------------------------------------------------
# Sources


ROWS = [
    {"problem": "one and one?", "final_answer": "2", "level": "Level 3", "source": "a"},
    {"problem": "one and two?", "final_answer": "3", "level": "Level 4", "source": "b"},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_yields_the_same_problems(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "csv":
        path.write_text("\n".join(",".join(cells) for cells in (ROWS[0], *(row.values() for row in ROWS))))
    else:
        pytest.importorskip("datasets").Dataset.from_list(ROWS).to_parquet(path)
    problems = sources.read_problems(f"{path}, {path}", "rl_data", [])
    assert [(p.question, p.answer, p.group) for p in problems] == 2 * [
        ("one and one?", "2", "level 3"),
        ("one and two?", "3", "level 4"),
    ]
    assert problems[0].extra == {"level": "Level 3", "source": "a"}
    assert list(sources.rows_of(str(path)))[1]["source"] == "b"


def test_the_rest_of_a_row_changes_neither_equality_nor_hash_nor_text():
    plain, rich = Problem("q", "1"), Problem("q", "1", extra={"tests": ["a"]})
    assert plain == rich
    assert hash(plain) == hash(rich)
    assert repr(plain) == repr(rich)
    assert plain.extra == {}


def test_a_row_without_a_usual_field_is_refused_with_its_fields_and_a_way_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"ask": "one and one?", "gold": "2"}])
    for row_reader, setting in ((sources.read_problems, "rl_data"), (sources.read_demonstrations, "sft_data")):
        with pytest.raises(DataError) as refused:
            row_reader(path, setting, [])
        assert str(refused.value) == (
            f"{setting}: {path}, line 1: needs a field named question or problem or prompt, has ask, gold; "
            "--task FILE.py:FUNCTION reads rows of any shape"
        )
    write(tmp_path / "a.jsonl", [{"question": "one and one?", "gold": "2"}])
    with pytest.raises(DataError, match=r"line 1: needs a field named answer or final_answer or solution .* has quest"):
        sources.read_problems(path, "rl_data", [])
    with pytest.raises(DataError, match=r"line 1: needs a field named solution or response or demonstration, has q"):
        sources.read_demonstrations(path, "sft_data", [])


GOOD = {"question": "q", "answer": "1"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"question": "q", '], r"rl_data: .*a.jsonl, line 2: not valid JSON"),
        ([GOOD, "[1, 2]"], r"rl_data: .*line 2: a JSON object is needed, this is a list"),
        ([], r"rl_data: .*a.jsonl holds no row"),
        ([GOOD, GOOD | {"question": " "}], r"line 2: field question is empty"),
        ([GOOD, GOOD | {"question": ["a"]}], r"line 2: field question must be a number or text, it is \['a'\]"),
        ([GOOD, GOOD | {"answer": True}], r"line 2: field answer must be a number or text, it is True"),
        ([GOOD], r"rl_data: holding out eval_problems=1 of 1 questions keeps too few"),
    ],
)
def test_an_error_names_the_file_its_line_and_the_field(tmp_path, lines, message):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "a.jsonl").write_text("".join(f"{text}\n" for text in texts))
    with pytest.raises(DataError, match=message):
        named.from_files(str(tmp_path / "a.jsonl"), "", "", 1)


def test_text_that_is_not_utf8_is_reported(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 1: not valid JSON \('utf-8' codec"):
        list(sources.read_rows(str(tmp_path / "a.jsonl"), "rl_data"))


def test_the_first_correct_response_is_chosen_or_else_the_first():
    assert sources.first_correct(["\\boxed{3}", "\\boxed{2}", "2: \\boxed{2}"], "2") == "\\boxed{2}"
    assert sources.first_correct(["\\boxed{3}", "\\boxed{4}"], "2") == "\\boxed{3}"


def test_a_boxed_solution_is_its_gold_answer_and_a_solution_without_a_box_is_dropped(tmp_path):
    rows = [{"problem": "1+1?", "solution": "two, \\boxed{2}."}, {"problem": "1+2?", "solution": "3"}]
    notes = []
    assert sources.read_problems(write(tmp_path / "a.jsonl", rows), "rl_data", notes) == [Problem("1+1?", "2")]
    assert "1 of 2 rows" in notes[0]
    boxed = write(tmp_path / "b.jsonl", [{"problem": "1+1?", "answer": "so \\boxed{2}"}])
    assert sources.read_problems(boxed, "rl_data", []) == [Problem("1+1?", "2")]


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("owner/name", dict(path="owner/name", name=None, split="train")),
        ("owner/name:test", dict(path="owner/name", name=None, split="test")),
        ("owner/name:main:test[:5]", None),
        ("owner/name:main:test", dict(path="owner/name", name="main", split="test")),
        ("owner/name:hard/a.parquet", dict(path="owner/name", data_files={"train": "hard/a.parquet"}, split="train")),
    ],
)
def test_a_hub_name_selects_configuration_split_and_file(monkeypatch, source, called):
    datasets, calls = pytest.importorskip("datasets"), []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **o: calls.append(dict(path=path, **o)) or ROWS)
    if called is None:
        with pytest.raises(DataError, match=r"rl_data: .* is neither a"):
            list(sources.read_rows(source, "rl_data"))
    else:
        rows = list(sources.read_rows(source, "rl_data"))
        assert calls == [called]
        assert rows[1] == (f"rl_data: {source}, row 1", ROWS[1])


def raises(error):
    def load_dataset(path, **options):
        raise error

    return load_dataset


def test_an_error_of_the_hub_becomes_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    offline = ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)\nand more")
    for error, reason in (
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "Dataset 'a/b' doesn't exist"),
        (ValueError("Unknown split \"tset\". Should be one of ['train', 'test']."), r"Unknown .* \['train', 'test'\]."),
        (offline, r"Couldn't reach 'a/b' on the Hub \(OfflineModeIsEnabled\)"),
        (RuntimeError(), "RuntimeError"),
    ):
        monkeypatch.setattr(datasets, "load_dataset", raises(error))
        with pytest.raises(DataError) as refused:
            list(sources.read_rows("a/b", "sft_data"))
        advice = "save its rows as a .jsonl file and name that"
        assert re.fullmatch(rf"sft_data: cannot read 'a/b' \({reason}\): {advice}", str(refused.value))


def test_the_real_loader_gives_a_way_out_without_network(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # no connection attempts, which it would repeat
    with pytest.raises(DataError, match=r"rl_data: cannot read 'nobody/nothing' .*: save its rows"):
        list(sources.read_rows("nobody/nothing", "rl_data"))


@pytest.mark.parametrize("source", ["data.txt", "name", "a/b/c", "owner/", "", "owner/name:", "a/b:c:d:e"])
def test_a_source_that_is_neither_file_nor_hub_name_is_refused(source):
    with pytest.raises(DataError, match=r"rl_data: .*is neither a .jsonl, .ndjson, .json, .parquet, .csv file nor a"):
        list(sources.read_rows(source, "rl_data"))


NAMES = ["no.jsonl", "no.json", "no.parquet", "no.csv", "no.ndjson", "no.jsonl.gz", "NO.JSONL", "run 10:30.jsonl",
         "data/run 10:30.jsonl", r"C:\data\rl.jsonl", "C:/data/rl.jsonl", "/data/10:30/rl.jsonl"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_of_any_kind_is_named(name):
    with pytest.raises(DataError, match=re.escape(f"rl_data: there is no file {name!r}")):
        list(sources.read_rows(name, "rl_data"))


@pytest.mark.parametrize("name", [*NAMES, "a,b.jsonl", "~a, ~b.jsonl", "a/b:c.jsonl", "a, b/c:d/e,f.JSON", "é😀?*.csv"])
def test_what_exists_is_a_file_whatever_its_letters(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = name.lower().removesuffix(".gz").rpartition(".")[2]
    text = {"json": json.dumps(ROWS), "csv": "problem,final_answer\none?,2\n"}.get(kind, json.dumps(ROWS[0]) + "\n")
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    if kind == "parquet":
        pytest.importorskip("datasets").Dataset.from_list(ROWS).to_parquet(path)
    name = name.lstrip("/")
    s, _ = settings.parse(["--rl-data", name, "--sft-data", name, "--eval-data", name])
    assert (s.rl_data, s.sft_data, s.eval_data) == (name, name, name)
    assert evaluate.parse(["model", "--data", name]).data == name
    problems = sources.read_problems(s.rl_data, "rl_data", [])
    task = named.with_evaluation(Task([], [], []), s.eval_data, 5)
    assert [p.answer for p in problems] == [p.answer for p in task.evaluation] == ["2", "3"][: len(problems)]


def test_a_list_of_files_is_split_at_commas_and_a_folder_of_benchmarks_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b:1.NDJSON", "x,y/aime24.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{"problem": "q", "answer": "2"}])
    places = [place for place, _ in sources.read_rows("a.jsonl, b:1.NDJSON", "rl_data")]
    assert places == ["rl_data: a.jsonl, line 1", "rl_data: b:1.NDJSON, line 1"]
    assert len(read_benchmark("aime24", "x,y")) == 1
    assert len(named.with_evaluation(Task([], [], []), "a.jsonl,b:1.NDJSON", 5).evaluation) == 2


def test_a_folder_keeps_the_spaces_and_commas_of_its_name():
    for name in ("my runs, second/a ", " b", "c,d"):
        assert evaluate.parse([name]).source == name
        assert settings.parse(["--model", name])[0].model == name


def test_a_long_list_of_names_is_no_error_of_the_disk():
    with pytest.raises(DataError, match=r"^rl_data: there is no file 'a{90}.jsonl'$"):
        list(sources.read_rows(",".join(["a" * 90 + ".jsonl"] * 5), "rl_data"))


def test_a_compressed_file_that_is_cut_off_or_damaged_is_refused_and_not_read_in_part(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in 200 * ROWS).encode())
    for content in (
        whole[:-1],
        whole[:-8],
        whole[: len(whole) // 2],
        whole[:40],
        b"plain",
        whole + b"plain",
        whole + b"\x1f",
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^rl_data: \S*a\.jsonl\.gz: damaged \("):
            list(sources.read_rows(str(path), "rl_data"))
    path.write_bytes(whole)
    assert len(list(sources.read_rows(str(path), "rl_data"))) == 400


def test_a_json_file_of_another_shape_is_refused(tmp_path):
    for text, message in (
        ('{"a": 1}\n{"a": 2}', r"cannot read .*a\.json' \(Extra data: line 2 .*\): save its rows as a \.jsonl file"),
        ("[" + "1" * 5000 + "]", "cannot read"),
        ('["\xff"]', "cannot read .*utf-8"),
        ('{"a": 1}', "cannot read"),
        ("[1]", "cannot read"),
        ("[]", "holds no row"),
    ):
        (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=message):
            list(sources.read_rows(str(tmp_path / "a.json"), "rl_data"))


def read(path, text, reader=sources.read_problems, **options):
    """(rows, notes) of a file with this text."""
    path.write_bytes(text.encode())
    notes = []
    return reader(str(path), "rl_data", notes, **options), notes


def test_a_csv_cell_is_the_text_that_is_written_there(tmp_path):
    cells = ["9007199254740993", "None", "NA", "nan", "1e5", "007", "true", '"1,004"', "null", "2024-01-01"]
    text = "\ufeffquestion,answer,level\r\n" + "".join(f"q{i},{cell},\r\n" for i, cell in enumerate(cells))
    problems, notes = read(tmp_path / "a.csv", text + '"two\nlines, ""quoted""",1,\r\n\r\nempty,,\r\n')
    assert [p.answer for p in problems] == [*(cell.strip('"') for cell in cells), "1"]
    assert problems[-1].question == 'two\nlines, "quoted"'
    assert {p.group for p in problems} == {"all"}
    assert problems[0].extra == {"level": ""}
    assert notes == [f"rl_data: 1 of 12 rows of {tmp_path}/a.csv have no gold answer the grader can read: dropped"]
    (problem,), _ = read(tmp_path / "a.csv", f"question,answer\n{'long ' * 40_000},1\n")
    assert len(problem.question) == 199_999


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "question,answer\na,1\nb,2,3\n",
            r"a\.csv' \(line 3 has another number of cells than the first line\)",
        ),
        ("question,answer\nb\n", r"a\.csv' \(line 2 has another number of cells"),
        ('question,answer\na,1\n"b,2\n', r"a\.csv' \(unexpected end of data\)"),
        ("question,answer\n", r"a\.csv holds no row"),
        ("question;answer\na;1\n", r"a\.csv, row 0: needs a field named question .*, has question;answer"),
    ],
)
def test_a_damaged_csv_file_is_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(DataError, match=f"rl_data: .*{message}"):
        read(tmp_path / "a.csv", text)


def test_integers_of_any_size_are_exact_and_a_number_that_is_not_finite_is_no_gold(tmp_path):
    big = ["9007199254740993", "123456789012345678901234567890"]
    rows = [f'{{"question": "q", "answer": {n}}}' for n in [*big, "NaN", "Infinity", "-Infinity", "1e999"]]
    for name, text in (("a.jsonl", "\n".join(rows) + "\n"), ("a.json", f"[{','.join(rows)}]")):
        problems, notes = read(tmp_path / name, text)
        assert [p.answer for p in problems] == big
        assert "4 of 6 rows" in notes[0]
        with pytest.raises(DataError, match=r"a\.json.*Exceeds the limit \(4300"):
            read(tmp_path / name, text.replace("NaN", "1" * 5000))
    with pytest.raises(DataError, match="line 1: field question is empty"):
        read(tmp_path / "a.jsonl", '{"question": NaN, "answer": 1}\n')
    datasets = pytest.importorskip("datasets")
    rows = [{"question": "q", "answer": 2**53 + 1, "level": 3}, {"question": "q", "answer": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert sources.read_problems(str(tmp_path / "a.parquet"), "x", []) == [Problem("q", str(2**53 + 1), "level 3")]


HEADINGS = "#### Step 1\nAdd: \\boxed{2}\n#### Check\nDone."


@pytest.mark.parametrize(
    ("row", "response", "gold"),
    [
        ({"answer": "so \\boxed{2}"}, "so \\boxed{2}", "2"),
        ({"answer": HEADINGS}, HEADINGS, "2"),
        ({"solution": HEADINGS}, HEADINGS, "2"),
        ({"answer": "2", "solution": "#### Step 1\n1+1\n#### Part 2: 2"}, "#### Step 1\n1+1\n#### Part 2: 2", "2"),
        ({"answer": "2", "solution": "1+1\n##### 2"}, "1+1\n##### 2", "2"),
        ({"answer": "1+1\n#### 2"}, "1+1\nThe answer is \\boxed{2}.", "2"),
        ({"answer": "1+1\n#### 2\n\n"}, "1+1\nThe answer is \\boxed{2}.", "2"),
        ({"solution": "1+1\n#### 2"}, "1+1\nThe answer is \\boxed{2}.", "2"),
        ({"answer": "half\n#### \\frac{1}{2}"}, "half\nThe answer is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ({"answer": "1+1\n#### 2", "solution": "mine: \\boxed{2}"}, "mine: \\boxed{2}", "2"),
        ({"answer": "", "solution": "so \\boxed{2}"}, "so \\boxed{2}", "2"),
        ({"answer": None, "final_answer": 2, "response": "two"}, "two", "2"),
        ({"answer": "2", "final_answer": "3", "solution": None, "response": "two"}, "two", "2"),
    ],
)
def test_sft_and_rl_read_the_same_gold_of_a_row(tmp_path, row, response, gold):
    text = json.dumps({"problem": "q", "question": ""} | row) + "\n"
    assert read(tmp_path / "a.jsonl", text) == ([Problem("q", gold)], [])
    (demonstration,), _ = read(tmp_path / "a.jsonl", text, sources.read_demonstrations)
    assert demonstration == Demonstration("q", response, gold)


def test_an_empty_gold_behind_four_hashes_drops_the_row_from_both(tmp_path):
    for reader in (sources.read_problems, sources.read_demonstrations):
        rows, notes = read(tmp_path / "a.jsonl", '{"question": "q", "answer": "steps ####"}\n', reader)
        assert (rows, len(notes)) == ([], 1)


def test_a_level_is_the_group_of_a_row_and_a_label_of_a_benchmark_s_problem(tmp_path):
    values = [2, "4", "Level 5", 3.5, "Grade 6-8", None, float("nan"), ""]
    groups = ["level 2", "level 4", "level 5", "level 3.5", "level Grade 6-8"]
    rows = [{"problem": "q", "answer": "1", "level": value} for value in values]
    problems = sources.read_problems(write(tmp_path / "a.jsonl", rows), "rl_data", [])
    assert [p.group for p in problems] == [*groups, "all", "all", "all"]
    write(tmp_path / "math500.jsonl", rows)
    labels = [p.labels for p in read_benchmark("math500", str(tmp_path))]
    assert labels == [*((group,) for group in groups), (), (), ()]


def test_a_reward_of_the_user_keeps_golds_that_only_the_grader_cannot_read(tmp_path):
    rows = [{"question": f"q{i}", "answer": "assert f(1) == [1, 2]", "solution": f"s{i}"} for i in range(8)]
    rows[3:3] = [{"question": "none", "answer": "", "solution": "s"}, {"question": "v", "answer": "7", "solution": "s"}]
    path = write(tmp_path / "a.jsonl", rows)
    own = settings.Settings(rl_data=path, sft_data=path, eval_problems=2, reward="own.py:f")
    task = named.load_task(own)
    assert [p.question for p in task.problems] == ["q0", "q1", "q2", "v", "q3", "q4", "q5"]
    assert len(task.demonstrations) == 10, "a demonstration without a gold can be imitated"
    assert "1 of 10 rows" in task.notes[0]
    assert [p.question for p in task.evaluation] == ["q6", "q7"]
    assert task.notes[-1] == "evaluation: no answer is right for 2 golds, which the grader cannot read"
    with pytest.raises(DataError, match="of 1 questions"):
        named.load_task(replace(own, reward=""))


@pytest.mark.parametrize(
    ("row", "answer"),
    [({"answer": 0, "solution": "\\boxed{5}"}, "0"), ({"answer": None, "solution": "\\boxed{5}"}, "5"),
     ({"solution": "\\boxed{5}"}, "5"), ({"answer": 2**53 + 1}, "9007199254740993")],
)  # fmt: skip
def test_the_gold_of_a_benchmark_is_its_first_field_that_is_not_empty(tmp_path, row, answer):
    write(tmp_path / "minerva_math.jsonl", [{"question": "q", "problem": None} | row])
    (problem,) = read_benchmark("minerva_math", str(tmp_path))
    assert (problem.question, problem.answer) == ("q", answer)


@pytest.mark.parametrize("answer", [None, "", float("nan"), ["1"], True])
def test_a_benchmark_row_without_a_gold_is_refused_with_its_line(tmp_path, answer):
    write(tmp_path / "math500.jsonl", [{"problem": "q", "answer": "1"}, {"problem": "q", "answer": answer}])
    with pytest.raises(DataError, match=r"math500\.jsonl, line 2 is no row of math500: .*field answer"):
        read_benchmark("math500", str(tmp_path))


def test_an_absolute_tolerance_becomes_a_relative_one_and_text_becomes_none(tmp_path):
    rows = [{"question": "q", "final_answer": ["2"], "error": error} for error in ("x", "0.1")]
    write(tmp_path / "olympiadbench.jsonl", rows)
    assert [p.tolerance for p in read_benchmark("olympiadbench", str(tmp_path))] == [None, 0.05]


# ---------------------------------------------------------------------------------------------------------------------
# What is printed and written


CONTROLS = "\x1b[2J\r\b\x07\x9b\u202e\u2066\u2028\ud800\x00"
ESCAPED = "\\x1b[2J\\r\\x08\\x07\\x9b\\u202e\\u2066\\u2028\\ud800\\x00"


def test_text_that_could_rewrite_a_terminal_is_printed_with_escapes(capsys, monkeypatch):
    assert printable(f"θ π̂ é 中 🙂\n\t{CONTROLS}") == f"θ π̂ é 中 🙂\n\t{ESCAPED}"
    print0(CONTROLS)
    monkeypatch.setattr(evaluate.results, "table", lambda paths: CONTROLS)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--table", "x"])
    evaluate.main()
    assert capsys.readouterr().out == f"{ESCAPED}\n{ESCAPED}\n"
    with pytest.raises(SystemExit) as ended, one_line_errors("bridge.py"):
        raise DataError(f"a\n{CONTROLS}")
    assert ended.value.code == f"bridge.py: a\\n{ESCAPED}"


def test_names_of_fields_and_of_stop_tokens_are_printed_with_escapes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{CONTROLS: "q"}])
    with pytest.raises(SystemExit) as ended:
        bridge.main(
            ["--model", "arithmetic-smoke", "--method", "rl", "--rl-data", path, "--out", str(tmp_path / "run")]
        )
    assert ended.value.code.isprintable()
    assert ESCAPED in ended.value.code


def test_a_model_card_holds_escapes_instead_of_text_that_utf8_cannot_encode(tmp_path):
    export.save_model(tmp_path / "model", tiny_model(), shipped_tokenizer(), [0], CONTROLS)
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == ESCAPED


def test_a_file_of_json_lines_may_begin_with_a_byte_order_mark(tmp_path):
    problems, _ = read(tmp_path / "windows.jsonl", '\ufeff{"question": "1+1", "answer": "2"}\r\n')
    assert [(p.question, p.answer) for p in problems] == [("1+1", "2")]


@pytest.mark.parametrize(("is_terminal", "rank", "shown"), [(True, 0, True), (False, 0, False), (True, 1, False)])
def test_long_work_has_a_bar_on_rank_0_of_a_terminal_and_nothing_in_a_log(monkeypatch, is_terminal, rank, shown):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    bar = progress([1, 2, 3], "reading")
    assert bar.disable != shown
    assert list(bar) == [1, 2, 3]
    assert stream.getvalue().strip() == ""  # a second has not passed


# ---------------------------------------------------------------------------------------------------------------------
# Contamination and evaluation sets


def test_thirteen_shared_words_are_contamination_and_twelve_are_not():
    words = [f"w{i}" for i in range(20)]
    evaluation = [Problem(" ".join(words), "1"), Problem("Is 1+2 odd?", "yes")]
    asked = [
        "before, W3 w4-w5 " + " ".join(words[6:16]) + " after", "before " + " ".join(words[3:15]) + " after",
        "is 1+2  odd?", "Is 1-2 odd?", "Tell me: Is 1+2 odd?",
    ]  # fmt: skip
    task = Task([Problem(q, "1") for q in asked], [Demonstration(q, "\\boxed{1}") for q in asked], evaluation)
    tasks.decontaminate(task)
    assert [p.question for p in task.problems] == [d.question for d in task.demonstrations] == [*asked[1:2], *asked[3:]]
    shared = " ".join(words[3:16])
    assert task.notes == [
        f"{name}: 2 of 5 share 13 words in a row, or all, with an evaluation problem, first '{shared}': dropped"
        for name in ("rl_data", "sft_data")
    ]


def test_a_question_of_just_thirteen_words_is_compared_by_words():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert set(tasks.marks(words + ".")) == set(tasks.marks(words.upper())) == {words, f"[{words}]"}


def clean(trained, evaluated):
    """(questions that decontamination keeps, its note or "")."""
    task = Task([Problem(q, "1") for q in trained], [], [Problem(q, "1") for q in evaluated])
    tasks.decontaminate(task)
    return [p.question for p in task.problems], "".join(task.notes)


ASK = "Solve the following problem step by step. The last line of your response should be of the form Answer: $Answer "
ASK += "(without quotes) where $Answer is the answer to the problem."
SUMS = [f"What is {i} plus {i * 7 % 11}?" for i in range(36)]
STORY = "A farmer has {} cows in a big barn near the river and each of them gives {} litres of milk on every day of "
STORIES = [(STORY + "the long week. How many litres of milk does he sell?").format(i, i % 5 + 2) for i in range(36)]
STYLES = {
    "in front": lambda i, q: f"{ASK}\n\n{q}", "on the same line": lambda i, q: f"{ASK} {q}",
    "behind": lambda i, q: f"{q}\n{ASK}", "of some": lambda i, q: f"{ASK}\n\n{q}" if i % 6 == 0 or i > 31 else q,
    "around": lambda i, q: f'{ASK}\n\n{q}\n\nRemember to put your answer on its own line after "Answer:".',
    "of the evaluation": lambda i, q: f"{ASK}\n\n{q}" if i > 31 else q,
    "of the training": lambda i, q: f"{ASK}\n\n{q}" if i < 32 else q,
}  # fmt: skip


@pytest.mark.parametrize("questions", [SUMS, STORIES])
@pytest.mark.parametrize("style", STYLES)
def test_an_instruction_or_a_story_that_many_questions_share_is_no_contamination_and_hides_none(style, questions):
    asked = [STYLES[style](i, q) for i, q in enumerate(questions)]
    assert clean(asked[:32], asked[32:]) == (asked[:32], "")
    repeated = [STYLES[style](0, q) for q in questions[32:]]  # behind the instruction if some of the training are
    kept, note = clean(asked[:32] + repeated, asked[32:])
    assert kept == asked[:32]
    own = " ".join(tasks.sentences(questions[32]))[:90]
    assert note.startswith("rl_data: 4 of 36 share 13 words in a row, or all, with an evaluation problem, first")
    assert own in note or style == "of some"


TOM = (
    "Tom has {} apples in a basket and walks to the big market with his friend. The weather is very nice on that day. "
)
TOM += "He buys more apples there and then comes home again with {} apples more."


def test_a_sentence_that_all_stories_share_joins_no_words_before_it_to_those_behind_it():
    trained = [TOM.format(i, i + 20) for i in range(100)]
    assert clean(trained, [TOM.format(i, i + 31) for i in range(20)]) == (trained, "")


def test_short_questions_about_other_passages_are_kept():
    ask = ("What is the total?", "How many are left?", "Who has the most?", "How many are red?", "What is the mean?")
    passages = [f"Passage {i} tells of things that only it has, such as {'x' * i}." for i in range(1, 7)]
    questions = [[f"{passage} {q}" for q in ask] for passage in passages]
    trained = [q for of_passage in questions[1:] for q in of_passage]
    assert clean(trained, questions[0]) == (trained, "")
    assert clean([*trained, questions[0][1]], questions[0])[0] == trained


def test_an_evaluated_question_with_a_few_other_endings_is_dropped_from_a_small_set():
    asked = "Ann and Ben share seven red and nine green apples with two of their friends in the park."
    copies = [f"{asked} {end}" for end in ("Explain.", "Answer briefly.", "Think first.")]
    others = [f"Name the {i}th prime." for i in range(20)]
    assert clean([*others, *copies], [asked, "another"])[0] == others


def test_an_instruction_of_few_rows_is_named_and_no_data_set_is_emptied_by_one_of_most(tmp_path):
    other = [f"Name the {i}th prime." for i in range(90)]
    kept, note = clean([f"{ASK} {SUMS[0]}", *other], [f"{ASK} {SUMS[1]}"])
    assert kept == other
    assert "1 of 91 share 13 words in a row, or all, with an evaluation problem, first 'solve the foll" in note
    rows = [{"question": f"{ASK}\n{q}", "answer": "1"} for q in SUMS]
    task = named.from_files(write(tmp_path / "a.jsonl", rows), "", "", 4)
    tasks.prepare(task, make(CHATML), 32, 1000, False)
    assert len(task.problems) == 32


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("What is 3 plus 4", "What is 3 plus 4 ?", True), ("what is  3 plus 4?", "What is 3 plus 4.", True),
        ("1 + 2", "1+2", True), ("1+2", "1-2", False), ("What is 3.4?", "What is 34?", False),
        ("What is 1 2/3?", "What is 12/3?", False), ("What is 5!?", "What is 5?", False),
        ("What is 5² + 1?", "What is 52 + 1?", False), ("x² + 1 = 0", "x^2+1=0", True),
        ("小明有３个苹果，又买了4个，一共有几个？", "小明有3个苹果,又买了4个,一共有几个?", True),
        ("小明有3个苹果。", "小明有4个苹果。", False),
        ("听着：" + "小明在商店里买了三个又大又红的苹果。", "小明在商店里买了三个又大又红的苹果。多少钱？", True),
        ("りんごを三つとみかんを四つ買いました。いくつ？", "昨日、りんごを三つとみかんを四つ買いました。", True),
        ("สมชายมีแอปเปิลสามผลในตะกร้า", "เมื่อวานสมชายมีแอปเปิลสามผล", True),
        ("한 상자에 사과가 세 개 있다", "한 상자에 사과가 네 개 있다", False),
        ("एक टोकरी में तीन सेब हैं और राम खाता है", "एक टोकरी में तीन सेब हैं और मोहन खाता है", False),
        ("Cafe\u0301 ouvert ?", "Café ouvert?", True),
    ],
)  # fmt: skip
def test_short_questions_and_every_script_are_compared_without_spaces_and_case_but_with_signs(one, other, equal):
    assert clean([one, "another"], [other])[0] == (["another"] if equal else [one, "another"])
    assert clean([other, "another"], [one])[0] == (["another"] if equal else [other, "another"])


def test_the_built_in_task_shares_no_words_with_its_evaluation():
    task = arithmetic.task(0, 100)
    before = len(task.problems), len(task.demonstrations)
    tasks.decontaminate(task)
    assert (len(task.problems), len(task.demonstrations), task.notes) == (*before, [])


def test_decontamination_removes_the_evaluated_rows_among_a_thousand_and_no_others():
    questions = [" ".join(f"word{i}x{j}" for j in range(60)) for i in range(1000)]
    task = Task([Problem(q, "1") for q in questions], [], [Problem(q, "1") for q in questions[:400]])
    tasks.decontaminate(task)
    assert [p.question for p in task.problems] == questions[400:]


def test_eval_problems_limits_each_group_and_training_excludes_the_complete_set(tmp_path):
    rows = [{"question": f"What is {i} plus 1?", "answer": str(i + 1), "level": i % 2} for i in range(10)]
    train = [*rows, {"question": "What is 99 plus 1?", "answer": "100"}]
    paths = write(tmp_path / "a.jsonl", train), "", write(tmp_path / "b.jsonl", rows)
    task = named.from_files(*paths, 2)
    assert [p.question for p in task.evaluation] == [f"What is {i} plus 1?" for i in (0, 2, 1, 3)]
    tasks.prepare(task, make(CHATML), 20, 1000, False)
    assert [p.question for p in task.problems] == ["What is 99 plus 1?"]


def test_benchmarks_are_evaluation_sets_under_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    for name in ("math500", "aime24"):
        write(tmp_path / "benchmarks" / f"{name}.jsonl", [{"problem": f"{name} {i}", "answer": "1"} for i in range(3)])
    train = write(tmp_path / "a.jsonl", [{"question": q, "answer": "1"} for q in ("math500 2", "another")])
    task = named.from_files(train, "", "math500, aime24", 2)
    assert [(p.group, p.question) for p in task.evaluation] == [
        (name, f"{name} {i}") for name in ("math500", "aime24") for i in range(2)
    ]
    tasks.decontaminate(task)
    assert [p.question for p in task.problems] == ["another"]
    with pytest.raises(DataError, match=r"eval_data: .*or put the rows into benchmarks/amc23\.jsonl"):
        named.from_files(train, "", "amc23", 2)


def test_sft_alone_needs_no_rl_data(tmp_path):
    rows = [{"question": f"What is {i} plus {i}?", "solution": f"\\boxed{{{2 * i}}}"} for i in range(12)]
    path = write(tmp_path / "a.jsonl", rows)
    chats = write(tmp_path / "b.jsonl", [{"question": "Who is he?", "response": "He is a bird."}])
    test = write(tmp_path / "c.jsonl", [{"question": "What is 77 plus 1?", "answer": "78"}])
    for flags, counts in (
        (["--sft-data", path, "--eval-problems", "4"], (8, 8, 4)),
        (["--sft-data", path, "--eval-data", test], (12, 12, 1)),
        (["--sft-data", chats, "--eval-data", test], (0, 1, 1)),
    ):  # fmt: skip
        s, _ = settings.parse(["--method", "sft", "--model", "m", *flags])
        task = named.load_task(s)
        method = settings.METHODS[s.method]
        encoded = tasks.prepare(task, make(CHATML), 80, 1000, method.sft, method.rl)
        assert (len(task.problems), len(encoded), len(task.evaluation)) == counts
        lines = loading.describe_data(task, make(CHATML), [0], encoded)
        assert f"{counts[0]} prompts, {counts[1]} demonstrations, {counts[2]} evaluation problems" in lines["data"]
    for flags in (
        ["--method", "sft_rl", "--sft-data", path],
        ["--sft-data", path],
        ["--method", "sft", "--eval-data", test],
    ):
        with pytest.raises(settings.SettingError, match="_data needs rl_data"):
            settings.parse(flags)


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"shared/data/{name} is absent")
    return str(DATA / name)


@pytest.fixture(scope="module")
def math_problems():
    return sources.read_problems(real("math_test_solutions.jsonl"), "rl_data", [])


def test_decontamination_finds_math_500_in_the_test_set_that_contains_it(math_problems):
    demonstrations = sources.read_demonstrations(real("math_test_solutions.jsonl"), "sft_data", [])
    math_500 = [p.question for p in sources.read_problems(real("math500.jsonl"), "eval_data", [])]
    task = Task(math_problems, demonstrations, [], kept_apart=math_500)
    held_out = {" ".join(q.split()) for q in math_500}
    tasks.decontaminate(task)
    assert not held_out & {" ".join(r.question.split()) for r in (*task.problems, *task.demonstrations)}
    for before, after in ((math_problems, task.problems), (demonstrations, task.demonstrations)):
        assert len(before) - len(after) == 588, "500 and their variants"


def test_math_s_levels_are_groups_and_its_other_fields_are_kept(math_problems):
    levels = Counter(p.group for p in math_problems)
    assert set(levels) == {f"level {n}" for n in range(1, 6)}
    assert 3660 <= levels["level 3"] + levels["level 4"] + levels["level 5"] <= 3669
    assert {p.extra["type"] for p in math_problems} >= {"Algebra", "Geometry", "Number Theory"}


def test_gsm8k_files_named_by_flags_form_a_task_that_shares_nothing_with_its_test_set():
    flags = ["--rl-data", real("gsm8k_train.jsonl"), "--sft-data", real("gsm8k_train.jsonl")]
    s, _ = settings.parse([*flags, "--eval-data", real("gsm8k_test.jsonl")])
    task = named.load_task(s)
    assert (len(task.problems), len(task.demonstrations)) == (7473, 7473)
    assert len(task.evaluation) + len(task.kept_apart) == 1319
    tasks.decontaminate(task)
    assert 7300 < len(task.problems) < 7473, "a few share the words of their story"


# ---------------------------------------------------------------------------------------------------------------------
# The tasks that --task names


HUB = {  # made-up rows with the fields of the published data
    "GAIR/LIMR": [{"id": str(i), "prompt": f"limr {i}?", "answer": "2", "source": "math"} for i in range(5)],
    "hkust-nlp/SimpleRL-Zoo-Data": [
        {"prompt": [{"role": "user", "content": "x"}], "question": f"zoo {i}?", "gt_answer": answer, "level": 3}
        for i, answer in enumerate(["2", "2", "2", ""])
    ],
    "zwhe99/DeepMath-103K": [
        {"question": f"deep {difficulty}?", "final_answer": gold, "difficulty": difficulty, "topic": "t",
         "r1_solution_1": "\\boxed{4}", "r1_solution_2": "a</think>\\boxed{3}", "r1_solution_3": "\\boxed{3}"}
        for difficulty, gold in ((2.5, "3"), (3.0, "3"), (5.5, "7"), (6.0, "3"), (6.5, "3"), (4.0, ""))
    ],
    "openai/gsm8k": [{"question": f"How many {i}?", "answer": f"1+1=2\n#### {i}"} for i in range(5)],
}  # fmt: skip
DEEP = [
    Demonstration("deep 3.0?", "a</think>\\boxed{3}", "3"),
    Demonstration("deep 5.5?", "\\boxed{4}", "7"),
    Demonstration("deep 6.0?", "a</think>\\boxed{3}", "3"),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Replaces the hub by HUB; the sources that were asked for."""
    datasets, asked = pytest.importorskip("datasets"), []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **o: asked.append((path, o)) or HUB[path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    for name in settings.PAPER["eval_data"].split(","):
        row = {"problem": f"{name}?", "answer": "1", "final_answer": ["1"]}
        write(tmp_path / "benchmarks" / f"{name}.jsonl", [row])
    return asked


@pytest.mark.parametrize("preset", ["qwen2.5-3b", "llama-3.2-3b-instruct", "qwen3-8b-base"])
def test_the_presets_of_the_paper_need_no_other_flag(preset, hub):
    s, args = settings.parse(["--preset", preset])
    assert args.out == Path(f"runs/bridge-{preset}-0")
    assert (s.prompts_per_step, s.lora_rank, s.lora_alpha) == (64, 16, 16)
    sampled = (8, 8000) if preset == "qwen3-8b-base" else (5, 3000)
    assert (s.group_size, s.max_new_tokens) == sampled
    assert (s.alpha, s.lam, s.dtype) == (5e-7, 0.5, "bfloat16")
    assert 10 <= s.beta / s.alpha <= 200
    rows = 1389 if preset == "qwen2.5-3b" else 8523
    assert s.steps == round(6 * rows / 64)
    task = named.load_task(s)
    questions = [f"limr {i}?" for i in range(5)] if rows == 1389 else [f"zoo {i}?" for i in range(3)]
    assert [(p.question, p.answer) for p in task.problems] == [(question, "2") for question in questions]
    assert task.demonstrations == DEEP
    assert [p.group for p in task.evaluation] == s.eval_data.split(",")
    assert (task.instruction, task.template) == (prompts.INSTRUCTION, s.template)
    dropped = [note for note in task.notes if "no gold answer the grader can read" in note]
    assert len(dropped) == 1 + (rows == 8523), "a row of DeepMath, and one of SimpleRL's"
    assert [path for path, _ in hub][-1] == "zwhe99/DeepMath-103K"


def test_limr_reads_deepmath_only_for_methods_with_sft_and_without_sft_data(hub, tmp_path):
    own = write(tmp_path / "own.jsonl", [{"question": "own?", "solution": "\\boxed{1}"}])
    for flags, demonstrations in (
        (["--method", "rl"], []),
        (["--sft-data", own], [Demonstration("own?", "\\boxed{1}", "1")]),
    ):
        s, _ = settings.parse(["--task", "limr", "--eval-problems", "2", *flags])
        task = named.load_task(s)
        assert task.demonstrations == demonstrations
        assert [p.question for p in task.evaluation] == ["limr 3?", "limr 4?"], "held out without eval_data"
    assert {path for path, _ in hub} == {"GAIR/LIMR"}


def test_gsm8k_is_evaluated_on_its_test_split_or_on_eval_data(hub):
    task = named.load_task(settings.Settings(task="gsm8k"))
    assert hub == [("openai/gsm8k", {"name": "main", "split": split}) for split in ("train", "train", "test")]
    assert task.problems[1] == Problem("How many 1?", "1")
    assert task.demonstrations[1].response == "1+1=2\nThe answer is \\boxed{1}."
    assert {p.group for p in task.evaluation} == {"gsm8k"}
    task = named.load_task(settings.Settings(task="gsm8k", eval_data="aime24"))
    assert [p.question for p in task.evaluation] == ["aime24?"]


def test_the_built_in_task_comes_from_seed_and_eval_problems():
    assert named.load_task(settings.Settings(seed=3, eval_problems=2)) == arithmetic.task(3, 2)


CHAT_ROWS = [
    {"prompt": [{"role": "user", "content": f"{i}+1?"}], "reward_model": {"ground_truth": str(i + 1)}, "tests": [i]}
    for i in range(5)
]
CHAT_TASK = """from tasks.named import with_evaluation
from tasks.sources import rows_of
from tasks.task import Demonstration, Problem, Task

def chat(s):
    rows = rows_of("chat.jsonl")
    problems = [Problem(r["prompt"][-1]["content"], r["reward_model"]["ground_truth"], extra=r) for r in rows]
    demonstrations = [Demonstration(p.question, f"\\\\boxed{{{p.answer}}}", p.answer) for p in problems]
    return with_evaluation(Task(problems, demonstrations, [], " Box it.", "plain"), s.eval_data, s.eval_problems)
"""


def test_a_function_of_the_user_makes_a_task_of_rows_in_chat_format(tmp_path, own, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chat.jsonl", CHAT_ROWS)
    spec = Path(own(CHAT_TASK)).name + ":chat"
    for template in ("", "qwen-boxed"):
        task = named.load_task(settings.Settings(task=spec, eval_problems=1, template=template))
        assert task.problems == [Problem(f"{i}+1?", str(i + 1)) for i in range(4)]
        assert task.problems[2].extra["tests"] == [2]
        assert task.demonstrations[0] == Demonstration("0+1?", "\\boxed{1}", "1")
        assert task.evaluation == [Problem("4+1?", "5")]
        assert (task.instruction, task.template) == (" Box it.", template or "plain")
    (tmp_path / "chat.jsonl").unlink()
    with pytest.raises(DataError, match=r"^task: there is no file 'chat\.jsonl'$"):
        named.load_task(settings.Settings(task=spec))


def test_a_function_that_returns_no_task_and_an_unknown_task_are_refused(own):
    with pytest.raises(settings.SettingError, match=r"^task: .*\.py:f must return a Task, it returned a NoneType$"):
        named.load_task(settings.Settings(task=f"{own('f = lambda s: None')}:f"))
    known = r"arithmetic, chains, logic, legs, limr, .* or FILE\.py:F"
    with pytest.raises(settings.SettingError, match=rf"^task: 'gsm' must be one of {known}"):
        named.load_task(settings.Settings(task="gsm"))


# ---------------------------------------------------------------------------------------------------------------------
# Python files of the user


PROBLEM = Problem("How long?", "1", extra={"limit": 3})
MAKES = "from tasks.task import Demonstration, Problem, Task\nP, D = Problem('q', '1'), Demonstration('q', 'r')\n"


def test_a_file_with_task_and_reward_is_one_module_that_finds_helpers_and_pickle(tmp_path, own):
    name = f"helper_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("LENGTH = 3\n")
    path = own(
        "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n"
        f"from {name} import LENGTH\n{MAKES}\n"
        "@dataclass\nclass Point:\n    x: int\n"
        "def task(s):\n    return Task([Problem('q', '1', extra={'point': Point(LENGTH)})], [D], [P])\n"
        "def of_task(response, problem):\n"
        "    point = pickle.loads(pickle.dumps(problem.extra['point']))\n"
        "    return point.x + isinstance(point, Point)\n"
    )
    task = named.load_task(settings.Settings(task=f"{path}:task"))
    assert functions.load_reward(f"{path}:of_task")("text", task.problems[0]) == 4.0


def put(folder, **files):
    """Writes files of Python; `a__b` is a/b.py. Returns the folder."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/", 1) + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def reward_of(folder, name="own"):
    return functions.load_reward(f"{folder}/{name}.py:f")("text", PROBLEM)


F = "def f(response, problem):\n    "
DATACLASS = "from __future__ import annotations\nfrom dataclasses import dataclass\n"


@pytest.mark.parametrize(
    "files",
    [
        dict(own="import rewards\n" + F + "return rewards.SEVEN", rewards="SEVEN = 7"),
        dict(own=F + "import settings\n    return settings.SEVEN", settings="SEVEN = 7"),
        dict(own=F + "from evaluate import SEVEN\n    return SEVEN", evaluate="SEVEN = 7"),
        dict(own="from helping import f", rewards="SEVEN = 7",
             helping="from rewards import SEVEN\n" + F + "return SEVEN"),
        dict(own="import tasks.mine\n" + F + "return tasks.mine.SEVEN", tasks____init__="", tasks__mine="SEVEN = 7"),
        dict(own="from tasks import mine\nfrom tasks.task import Problem as P\n" + F
             + "return 7 * isinstance(problem, P)",
             tasks____init__="from . import mine", tasks__mine="from .other import S", tasks__other="S = 1"),
        dict(own="from plot import *\n" + F + "return SEVEN", plot="import lora\nSEVEN = 7", lora="import plot"),
        dict(own="from random import SEVEN\n" + F + "return SEVEN", random="SEVEN = 7"),
        dict(own="from infra.a import SEVEN\n" + F + "return SEVEN", infra____init__="",
             infra__a="from infra.b import SEVEN", infra__b="SEVEN = 7"),
        dict(own=DATACLASS + "import pickle\nfrom rewards import P\n@dataclass\nclass Q(P):\n    y: int\n" + F
             + "q = pickle.loads(pickle.dumps(Q(3, 4)))\n    return q.x + q.y",
             rewards=DATACLASS + "@dataclass\nclass P:\n    x: int"),
    ],
)  # fmt: skip
def test_a_module_beside_a_user_s_file_may_have_the_name_of_the_project_s_or_of_python_s(tmp_path, own, files):
    before = {
        name: sys.modules.get(name) for name in ("rewards", "settings", "evaluate", "plot", "tasks.task", "random")
    }
    name = f"own_{tmp_path.name}"
    put(tmp_path, **{name if key == "own" else key: text for key, text in files.items()})
    assert reward_of(tmp_path, name) == 7
    assert {key: sys.modules.get(key) for key in before} == before
    import rewards

    assert rewards.is_correct("\\boxed{2}", "2").correct


def test_the_project_s_documented_modules_can_be_imported_where_no_file_beside_has_their_name(tmp_path, own):
    text = "from settings import Settings\nfrom tasks.task import Problem\nimport settings as conf\n" + F
    put(
        tmp_path, documented=text + "from rewards import is_correct\n    return is_correct('\\\\boxed{1}', '1').correct"
    )
    assert reward_of(tmp_path, "documented") == 1
    put(tmp_path, tasks__notes="no Python", relative="from . import documented\n" + F + "return 1")
    with pytest.raises(ImportError, match="attempted relative import with no known parent package"):
        reward_of(tmp_path, "relative")


@pytest.mark.parametrize("name", ["rewards", "evaluate", "settings", "bridge", "json", "same"])
def test_user_files_and_helpers_of_one_name_in_two_folders_are_two_modules(tmp_path, own, name):
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(folders):
        late = F + f"import same_helper\n    from {name} import NUMBER\n    return 2 * same_helper.NUMBER + NUMBER"
        put(folder, **{name: f"NUMBER = {number}\n" + late, "same_helper": f"NUMBER = {number}"})
    rewards_of = [functions.load_reward(f"{folder}/{name}.py:f") for folder in folders]
    assert [reward("text", PROBLEM) for reward in rewards_of * 2] == [0, 3, 0, 3]


@pytest.mark.parametrize("files", [["helpers__util"], ["h__sub/__init__"], ["h____init__", "h__sub/deep"]])
def test_packages_of_one_name_in_two_folders_are_two_packages_with_or_without_init(tmp_path, own, files):
    module = files[-1].replace("/__init__", "").replace("__", ".").replace("/", ".")
    for number, folder in enumerate((tmp_path / "a", tmp_path / "b")):
        put(folder, **dict.fromkeys(files, f"NUMBER = {number}"))
        put(folder, own_file=f"import {module} as p\n" + F + "return p.NUMBER")
    rewards_of = [functions.load_reward(f"{folder}/own_file.py:f") for folder in (tmp_path / "a", tmp_path / "b")]
    assert [reward("text", PROBLEM) for reward in rewards_of] == [0, 1]


def test_a_helper_with_the_name_of_an_installed_package_does_not_reach_the_project(tmp_path, own):
    for name in ("datasets", "wandb"):
        sys.modules.pop(name, None)
    put(tmp_path, datasets="SEVEN = 7", own_file="from datasets import SEVEN\n" + F + "return SEVEN")
    assert reward_of(tmp_path, "own_file") == 7
    import datasets

    assert hasattr(datasets, "load_dataset")
    assert reward_of(tmp_path, "own_file") == 7


def test_task_and_reward_of_one_folder_share_the_modules_beside_them(tmp_path, own):
    helper = "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n"
    makes = (
        MAKES
        + "from rewards import Point\ndef t(s):\n    return Task([Problem('q', '1', extra={'p': Point(3)})], [D], [P])"
    )
    put(
        tmp_path,
        rewards=helper,
        a_task=makes,
        a_reward=F + "import rewards\n    return isinstance(problem.extra['p'], rewards.Point)",
    )
    task = named.load_task(settings.Settings(task=f"{tmp_path}/a_task.py:t"))
    assert functions.load_reward(f"{tmp_path}/a_reward.py:f")("text", task.problems[0]) == 1


def test_an_installed_package_takes_precedence_over_a_module_of_the_project_that_no_page_promises(tmp_path, own):
    site = put(
        tmp_path / "site", evaluate____init__="from .loading import load", evaluate__loading="load = 7", settings=""
    )
    sys.path.append(str(site))
    imports = "import evaluate\nfrom settings import Settings\n"
    put(tmp_path / "own", metric=imports + F + "from evaluate import loading\n    return evaluate.load + loading.load")
    assert reward_of(tmp_path / "own", "metric") == 14
    assert sys.modules["evaluate"] is evaluate


def test_an_error_in_a_helper_with_a_name_of_the_project_s_shows_its_file_and_line(tmp_path, own):
    put(tmp_path, own_error="import plot\n" + F + "return 1", plot="\n1 / 0\n")
    with pytest.raises(ZeroDivisionError) as raised:
        reward_of(tmp_path, "own_error")
    assert f'File "{tmp_path}/plot.py", line 2' in "".join(traceback.format_exception(raised.value))
    put(tmp_path, plot="")
    assert reward_of(tmp_path, "own_error") == 1


SPAWNS = """import multiprocessing
import helper_of_spawned
class Point:
    x = 3
def double(point):
    from rewards import is_correct
    return 2 * point.x + helper_of_spawned.ONE
def f(response, problem):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(double, [Point()])[0]
"""


def test_another_process_unpickles_classes_and_functions_of_a_user_s_file(tmp_path, own, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", None, raising=False)
    put(tmp_path, own_spawns=SPAWNS, helper_of_spawned="ONE = 1")
    assert reward_of(tmp_path, "own_spawns") == 7


CODE = dict(
    own="import helping\nfrom pack import inner\nimport json\n" + F + "from late import g\n    return g()",
    helping="A = 1", late="import later, math\ndef g():\n    return 1", later="C = 1", unused="D = 1",
    pack____init__="from .inner import E", pack__inner="import deep\nE = 1", deep="G = 1", loose__text="H = 1",
)  # fmt: skip


def test_the_fingerprint_of_a_function_covers_what_its_file_imports_from_beside_it(tmp_path):
    spec = f"{put(tmp_path / 'a', **CODE)}/own.py:f"
    first = functions.code_fingerprint(spec)
    assert first == functions.code_fingerprint(f"{put(tmp_path / 'moved', **CODE)}/own.py:f")
    (tmp_path / "moved" / "own.py").rename(tmp_path / "moved" / "renamed.py")
    assert first == functions.code_fingerprint(f"{tmp_path}/moved/renamed.py:f")
    for number, name in enumerate(CODE):
        changed = put(tmp_path / f"b{number}", **CODE | {name: CODE[name] + "\n"})
        is_used = name not in ("unused", "loose__text")
        assert (functions.code_fingerprint(f"{changed}/own.py:f") != first) == is_used, name
    swapped = put(tmp_path / "swapped", **CODE | {"later": CODE["deep"], "deep": CODE["later"]})
    assert functions.code_fingerprint(f"{swapped}/own.py:f") != first
    assert functions.code_fingerprint(f"{tmp_path}/a/own.py:g") != first
    without_init = put(tmp_path / "c", own="from loose.text import H\nimport data", loose__text="H = 1")
    (without_init / "data").mkdir()
    first = functions.code_fingerprint(f"{without_init}/own.py:f")
    put(without_init, loose__text="H = 2")
    assert functions.code_fingerprint(f"{without_init}/own.py:f") != first
    assert functions.code_fingerprint("") == functions.code_fingerprint("arithmetic") == ""
    ways = [
        "try: import h\nexcept ImportError: pass",
        "import math, \\\n    h",
        "from h import (\n    H)",
        "import h as g",
    ]
    for number, way in enumerate(ways):
        folder = put(tmp_path / f"way{number}", own=f'"""from notes of mine"""\n{way}', h="H = 1", notes="")
        first = functions.code_fingerprint(f"{folder}/own.py:f")
        put(folder, notes="other = 1")
        assert functions.code_fingerprint(f"{folder}/own.py:f") == first, "a text imports nothing"
        put(folder, h="H = 2")
        assert functions.code_fingerprint(f"{folder}/own.py:f") != first, way


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("ValueError", "    raise ValueError('no')"), ("TypeError", "    return len(3)"),
        ("KeyError", "    return {}['k']"), ("FileNotFoundError", "    return open('nowhere.txt')"),
        ("FloatingPointError", "    raise FloatingPointError"),
    ],
)  # fmt: skip
def test_an_error_of_the_user_s_code_ends_in_a_traceback_with_its_file_and_line(own, error, line):
    path = own(f"\ndef f(response, problem=None):\n{line}\n")
    calls = [
        lambda: functions.load_reward(f"{path}:f")("text", PROBLEM),
        lambda: named.load_task(settings.Settings(task=f"{path}:f")),
    ]
    for call in calls:
        with pytest.raises(Exception) as raised, one_line_errors("bridge.py"):  # noqa: PT011
            call()
        text = "".join(traceback.format_exception(raised.value))
        assert f'File "{path}", line 3, in f' in text
        assert f"\n{error}" in text


def test_an_error_while_the_user_s_file_is_loaded_ends_in_a_traceback_too(own):
    path = own("\nopen('nowhere.txt')\n")
    with pytest.raises(RuntimeError) as raised, one_line_errors("bridge.py"):
        functions.load_reward(f"{path}:f")
    assert f'File "{path}", line 2' in "".join(traceback.format_exception(raised.value))


def test_a_function_that_cannot_be_loaded_is_refused_in_one_line_that_names_the_setting(tmp_path, own):
    path = own("f = 3\n")
    for spec, message in (
        ("own", "'own' must be FILE.py:FUNCTION"), ("own.py", "'own.py' must be FILE.py:FUNCTION"),
        ("own.txt:f", "'own.txt:f' must be FILE.py:FUNCTION"), ("own.py:", "'own.py:' must be FILE.py:FUNCTION"),
        ("nowhere.py:f", "there is no file 'nowhere.py'"), (f"{path}:g", f"{path} has no function 'g'"),
        (f"{path}:f", f"{path} has no function 'f'"),
    ):  # fmt: skip
        with pytest.raises(settings.SettingError, match=f"^reward: {re.escape(message)}$"):
            functions.load_reward(spec)


@pytest.mark.parametrize(
    "value",
    ["None", "float('nan')", "'1'", "[1.0]", "1j", "numpy.ones(2)", "torch.ones(2)"],
)  # fmt: skip
def test_a_reward_that_is_no_finite_number_is_refused_with_function_and_question(own, value):
    path = own(f"import numpy, torch\ndef f(response, problem):\n    return {value}\n")
    with pytest.raises(
        settings.SettingError, match=rf"^reward: {path}:f must return a finite number, .* 'How long\?'$"
    ):
        functions.load_reward(f"{path}:f")("text", PROBLEM)


@pytest.mark.parametrize(
    "value",
    ["True", "Fraction(3, 3)", "Decimal(1)", "numpy.float16(1)", "numpy.bool_(True)", "numpy.array(1)",
     "torch.tensor(1)", "torch.tensor(1.0, dtype=torch.bfloat16)", "torch.tensor(True)"],
)  # fmt: skip
def test_a_real_number_of_any_library_is_a_reward(own, value):
    imports = "import numpy, torch\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
    path = own(f"{imports}def f(response, problem):\n    return {value}\n")
    reward = functions.load_reward(f"{path}:f")("text", PROBLEM)
    assert (reward, type(reward)) == (1.0, float)


def test_a_run_uses_its_reward_function_and_prints_its_first_prompt(tmp_path, own, capsys, monkeypatch):
    monkeypatch.setattr(arithmetic, "PROMPTS", 64)
    path = own("def limit(response, problem):\n    return 0.25\ndef none(response, problem):\n    return None\n")
    flags = ["--preset", "smoke", "--steps", "1", "--eval-problems", "1", "--max-new-tokens", "16"]
    bridge.main([*flags, "--reward", f"{path}:limit", "--out", str(tmp_path / "run")])
    (metrics,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert metrics["reward"] == 0.25
    printed = capsys.readouterr().out
    assert "the first prompt: 'Q:" in printed
    assert "trained tokens in ⟦ ⟧: 'Q:" in printed
    with pytest.raises(SystemExit, match=r"bridge\.py: reward: .*\.py:none must return a finite number"):
        bridge.main([*flags, "--reward", f"{path}:none", "--out", str(tmp_path / "other")])


CHANGES = {
    "the text": (dict(own=F + "return -len(response)"), "", r"reward: the code of .*own\.py:f changed since the run"),
    "a helper": (dict(helping="ONE = 2"), "", r"reward: the code of .*own\.py:f changed since the run in .* began"),
    "a helper of the task": (dict(asking="COLUMN = 'other'"), "", r"task: the code of .*ask\.py:t changed since"),
    "a column": (dict(), "weight", r"task, rl_data, sft_data or eval_data changed since the run in .* began"),
    "another function": (dict(reward="own.py:g"), "", r"reward is '.*own\.py:g', the run in .* has '.*own\.py:f'"),
    "the built-in one": (dict(reward=""), "", r"reward is '', the run in .* has '.*own\.py:f': use that"),
    "moved": (dict(moved="yes"), "", ""), "nothing": (dict(), "", ""), "a file beside": (dict(unused="1"), "", ""),
}  # fmt: skip
ASKS = (
    MAKES
    + """from asking import COLUMN
def t(s):
    import json
    from pathlib import Path
    rows = json.loads((Path(__file__).parent / "rows.json").read_text())
    return Task([Problem(r["q"], r["a"], extra=r) for r in rows], [], [Problem("9+9", "18")], "")
"""
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_resumed_run_notices_that_its_reward_or_what_this_reads_changed(tmp_path, own, monkeypatch, change):
    files, column, message = CHANGES[change]
    code = dict(own="from helping import ONE\n" + F + "return ONE\ng = f", helping="ONE = 1", asking="COLUMN = 'w'")
    rows = [{"q": f"{i}+1", "a": str(i + 1), "weight": i} for i in range(8)]

    def begin(folder, reward="own.py:f", moved="", **changed):
        """(settings, fingerprints) of a run, whose process imports the files anew."""
        folder = put(tmp_path / (moved or folder), ask=ASKS, **code | changed)
        (folder / "rows.json").write_text(json.dumps(rows))
        functions.modules_beside.cache_clear()
        for name in ("own", "ask", *code):
            sys.modules.pop(name, None)
        reward = reward and f"{folder}/{reward}"
        s = settings.Settings(model="arithmetic-smoke", method="rl", task=f"{folder}/ask.py:t", reward=reward)
        return s, loading.load_training(s).fingerprints

    s, fingerprints = begin("a")
    facts = json.loads(json.dumps({"step": 1, "settings": vars(s)} | fingerprints))
    for row in rows:
        row |= {column: 3} if column else {}
    s, fingerprints = begin("a", **files)
    if message:
        with pytest.raises(settings.SettingError, match=f"^{message}"):
            checkpoint.refuse_other_run(facts, s, fingerprints, tmp_path)
    else:
        checkpoint.refuse_other_run(facts, s, fingerprints, tmp_path)
