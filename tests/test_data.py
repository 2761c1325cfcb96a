"""prompts.py and data.py: templates, sources, fields, filters, contamination, presets, the user's own reward."""

import copy
import json
import time
from pathlib import Path

import pytest
from conftest import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import bridge
import rewards
import settings
from infra.model import ModelError
from sampler import Completion
from tasks import arithmetic as toy
from tasks import prompts
from tasks import sources as data
from tasks import task as tasks
from tasks.sources import DataError, Demonstration, Problem
from tasks.task import Task

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
THINKS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")  # as Qwen3's does with old thoughts
SPECIAL = ["<end>", "<bos>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot_id|>"]


def make(chat_template=None, adds_bos=False):
    """A byte tokenizer; its BOS, if it adds one, comes from the post-processor, as in Llama's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    if adds_bos:
        inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))])
    bos = {"bos_token": "<bos>"} if adds_bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", **bos)
    tokenizer.chat_template = chat_template
    return tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    ("chat_template", "template", "end"),
    [
        (CHATML, "", "<|im_end|>"),
        (LLAMA, "", "<|eot_id|>"),
        (THINKS, "", "<|im_end|>"),
        (None, "qwen-boxed", "<|im_end|>"),
        (CHATML, "plain", "<end>"),
    ],
)
def test_sft_and_rl_share_prompt_ids_have_one_bos_and_a_trained_end_of_turn(adds_bos, chat_template, template, end):
    if chat_template == LLAMA and not adds_bos:
        pytest.skip("this template writes a BOS")
    tokenizer = make(chat_template, adds_bos)
    d = Demonstration("What is 1+2?", "<think>three</think>\\boxed{3}" + end + "<end>", "3")
    task = Task([Problem("What is 2+2?", "4")], [d], [Problem("What is 5+5?", "10")], template=template)
    ((prompt, response),) = tasks.prepare(task, tokenizer, 100, 1000)
    assert prompt == prompts.encode_prompt(tokenizer, d.question, task.instruction, template)
    writes_bos = adds_bos and (template != "" or chat_template == LLAMA)
    assert prompt.count(SPECIAL.index("<bos>")) == writes_bos == (prompt[0] == SPECIAL.index("<bos>"))
    assert tokenizer.decode(response) == f"<think>three</think>\\boxed{{3}}{end}"
    assert tokenizer.decode(prompt).count("What is 1+2?") == 1


def test_the_named_templates_are_simplerl_s_to_the_letter():
    question = "What is {x} {question}?"
    assert prompts.prompt_text(None, question, "ignored", "qwen-boxed") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is {x} {question}?\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = "Question:\nWhat is {x} {question}?\nAnswer:\nLet's think step by step.\n"
    assert prompts.prompt_text(None, question, "ignored", "plain") == expected


def test_the_end_of_turn_is_what_the_template_writes_behind_an_answer():
    ends = {template: prompts.end_of_turn(make(template, adds_bos=True)) for template in (CHATML, LLAMA, THINKS)}
    assert [SPECIAL[i] for i in ends.values()] == ["<|im_end|>", "<|eot_id|>", "<|im_end|>"]
    assert prompts.end_of_turn(make("{% for m in messages %}{{ m.content }}{% endfor %}")) is None
    assert prompts.end_of_turn(make(), "plain") is None
    assert prompts.end_of_turn(toy.make_tokenizer(), "qwen-boxed") is None, "its vocabulary has no <|im_end|>"


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, r"has no chat template: choose one with --template, qwen-boxed or plain"),
        ("{{ bos_token }}Answer:", r"drops or changes the question 'What is 5\+5\?'"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            r"drops what the assistant says.*choose a --template, qwen-boxed or plain",
        ),
        ("{{ bos_token + bos_token }}{{ messages[0].content }}", r"begins with '<bos>' twice"),
        ("{{ raise_exception('no user') }}", r"chat template fails \(no user\)"),
        ("{% for m in messages %", r"chat template fails"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused_in_one_line(chat_template, message):
    task = Task([Problem("What is 2+2?", "4")], [], [Problem("What is 5+5?", "10")])
    with pytest.raises(ModelError, match=message) as refused:
        tasks.prepare(task, make(chat_template, adds_bos=True), 100, 1000, False)
    assert "\n" not in str(refused.value)


def test_a_run_samples_and_evaluates_in_its_template_and_stops_at_its_end_of_turn(tmp_path, monkeypatch):
    tokenizer, model = make(CHATML), tiny_model()
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings, model.generation_config.eos_token_id = 1000, None
    monkeypatch.setattr(bridge, "load", lambda *_: (copy.deepcopy(model), tokenizer))
    rows = [{"question": f"{i}+{i}?", "answer": str(2 * i), "solution": f"\\boxed{{{2 * i}}}"} for i in range(9)]
    path, asked, answered = write(tmp_path / "a.jsonl", rows), [], Completion([0], [0.0], "stop")
    for template, stop in (
        ("qwen-boxed", ["<end>", "<|im_end|>"]),
        ("", ["<end>", "<|im_end|>"]),
        ("plain", ["<end>"]),
    ):
        s = settings.Settings(rl_data=path, sft_data=path, eval_problems=1, template=template)
        run = bridge.set_up(s, tmp_path)
        assert [SPECIAL[i] for i in run.sampler.stop] == stop
        expected = prompts.encode_prompt(tokenizer, "8+8?", prompts.INSTRUCTION, template)
        assert run.demonstrations[0][0] == prompts.encode_prompt(tokenizer, "0+0?", prompts.INSTRUCTION, template)
        monkeypatch.setattr(run.sampler, "generate", lambda ids, *_, **__: asked.extend(ids) or [[answered]] * len(ids))
        bridge.evaluate_policies(run, 0)
        assert asked[-1] == expected


def test_an_unknown_template_is_refused_before_anything_is_loaded():
    with pytest.raises(settings.SettingError, match=r"template must be qwen-boxed or plain, or empty.*got 'qwen'"):
        settings.parse(["--template", "qwen", "--model", "nowhere/nothing"])
    with pytest.raises(ModelError, match="template: there is no 'qwen'; choose from qwen-boxed, plain"):
        prompts.prompt_text(None, "q", "", "qwen")


# ---------------------------------------------------------------------------------------------------------------------
# Sources, fields, filters


ROWS = [
    {"ask": "one and one?", "gold": "2", "level": "Level 3", "hard": 3.0, "tries": ["\\boxed{3}", "\\boxed{2}"]},
    {"ask": "one and two?", "gold": "3", "level": "Level 4", "hard": "4.5", "tries": ["\\boxed{5}", "\\boxed{6}"]},
    {"ask": "one and three?", "gold": "4", "level": "Level 5", "hard": 8, "tries": ["\\boxed{4}"]},
    {"ask": "one and four?", "gold": "5", "level": "Level 1", "hard": None, "tries": ["\\boxed{5}", "5: \\boxed{5}"]},
]
FIELDS = "question=ask,answer=gold"


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_all_kinds_of_files_give_the_same_problems(tmp_path, kind):
    path, rows = tmp_path / f"a.{kind}", [{k: str(v) for k, v in row.items() if k != "tries"} for row in ROWS]
    if kind == "jsonl":
        write(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        datasets = pytest.importorskip("datasets")
        getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(path)
    problems = tasks.read_problems(str(path), "rl_data", [], FIELDS)
    assert [(p.question, p.answer, p.group) for p in problems] == [
        (row["ask"], row["gold"], row["level"].lower()) for row in ROWS
    ]


@pytest.mark.parametrize(
    ("condition", "kept"),
    [("level=Level 3|Level 5", [0, 2]), ("hard=3..4.5", [0, 1]), ("hard=3", [0]), ("hard=4..9, level=Level 4", [1])],
)
def test_a_filter_keeps_values_and_ranges_and_counts(tmp_path, condition, kept):
    path, notes = write(tmp_path / "a.jsonl", ROWS), []
    problems = tasks.read_problems(f"{path}, {path}", "rl_data", notes, FIELDS, condition)
    assert [p.question for p in problems] == [ROWS[i]["ask"] for i in kept] * 2
    assert notes == [f"rl_data: {condition} keeps {len(kept)} of 4 rows of {path}"] * 2


@pytest.mark.parametrize(
    ("fields", "condition", "message"),
    [
        (FIELDS, "grade=3", r"rl_filter: no row of .* has a field 'grade'; there are ask, gold, level, hard, tries"),
        (
            FIELDS,
            "level=Level 2",
            r"rl_filter: 'level=Level 2' keeps none of the 4 rows of .*level is Level 3, Level 4",
        ),
        (FIELDS, "level", r"rl_filter: 'level' is no condition; write FIELD=VALUE\|VALUE or FIELD=LOW\.\.HIGH"),
        (FIELDS, "hard=a..b", r"rl_filter: 'hard=a\.\.b' is no condition"),
        (FIELDS, "hard=", r"rl_filter: 'hard=' is no condition"),
        ("question:ask", "", r"rl_fields: 'question:ask' names no field; write question=NAME, answer=NAME, solution=N"),
        ("prompt=ask", "", r"rl_fields: 'prompt=ask' names no field"),
        ("question=ask,answer=", "", r"rl_fields: 'answer=' names no field"),
        ("question=asked", "", r"line 1: needs a field named answer or final_answer, has ask, gold.*; rl_fields says"),
        ("question=asked,answer=gold", "", r"line 1: needs a field named asked, has ask, gold"),
    ],
)
def test_bad_fields_and_filters_get_one_line_that_says_what_to_change(tmp_path, fields, condition, message):
    with pytest.raises(DataError, match=message):
        tasks.read_problems(write(tmp_path / "a.jsonl", ROWS), "rl_data", [], fields, condition)


def test_of_several_solutions_the_first_right_one_is_shown(tmp_path):
    rows = [{**row, "more": row["tries"][-1], "less": row["tries"][0]} for row in ROWS]
    path = write(tmp_path / "a.jsonl", rows)
    for several in ("tries", "less|more"):
        found = tasks._demonstrations(path, [], f"{FIELDS},solution={several}")
        assert [d.response for d in found] == ["\\boxed{2}", "\\boxed{5}", "\\boxed{4}", "\\boxed{5}"]
        assert [d.answer for d in found] == ["2", "3", "4", "5"]
    with pytest.raises(DataError, match=r"line 1: fields empty and none are empty"):
        tasks._demonstrations(write(tmp_path / "b.jsonl", [{**ROWS[0], "empty": "", "none": None}]), [],
                              f"{FIELDS},solution=empty|none")  # fmt: skip


def test_a_boxed_solution_may_serve_as_answer(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": "1+1?", "solution": "two, \\boxed{2}."}])
    assert tasks.read_problems(path, "rl_data", [], "answer=solution") == [Problem("1+1?", "2")]


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
def test_a_hub_name_is_read_by_config_and_split(monkeypatch, source, called):
    datasets, calls = pytest.importorskip("datasets"), []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **o: calls.append(dict(path=path, **o)) or ROWS)
    if called is None:
        with pytest.raises(DataError, match=r"rl_data: .* is neither a"):
            list(data.read_rows(source, "rl_data"))
    else:
        rows = list(data.read_rows(source, "rl_data"))
        assert calls == [called]
        assert rows[1] == (f"{source}, row 1", ROWS[1])


def raises(error):
    def load_dataset(path, **options):
        raise error

    return load_dataset


def test_what_the_hub_cannot_give_is_said_in_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    offline = ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)\nand more")
    for error, message in (
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"),
            r"no data set 'a/b' on the hub, or it",
        ),
        (
            ValueError("Unknown split \"tset\". Should be one of ['train', 'test']."),
            r"Should be one of \['train', 'test'",
        ),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['main']"),
            r"cannot read 'a/b': BuilderConfig 'x' not fo",
        ),
        (FileNotFoundError("Unable to find 'hard/a.parquet'"), r"cannot read 'a/b': Unable to find"),
        (
            offline,
            r"no way to the hub for 'a/b' .*save its rows as a \.jsonl or \.parquet file and give that as sft_data",
        ),
    ):
        monkeypatch.setattr(datasets, "load_dataset", raises(error))
        with pytest.raises(DataError, match=f"sft_data: .*{message}") as refused:
            list(data.read_rows("a/b", "sft_data"))
        assert "\n" not in str(refused.value)


def test_without_network_the_real_loader_says_which_files_to_give():
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"rl_data: .*'nobody/nothing'.*(HF_HOME|on the hub)"):
        list(data.read_rows("nobody/nothing", "rl_data"))


@pytest.mark.parametrize("source", ["data.txt", "name", "a/b/c", "owner/", "", "owner/name:", "a/b:c:d:e"])
def test_what_is_neither_file_nor_hub_name_is_refused(source):
    with pytest.raises(DataError, match=r"rl_data: .*is neither a .jsonl, .json, .parquet, .csv file nor a data set"):
        list(data.read_rows(source, "rl_data"))


@pytest.mark.parametrize("name", ["no.jsonl", "no.json", "no.parquet", "no.csv"])
def test_a_missing_file_of_any_kind_is_named(name):
    with pytest.raises(DataError, match=f"rl_data: there is no file '{name}'"):
        list(data.read_rows(name, "rl_data"))


def test_a_json_file_of_another_shape_is_refused(tmp_path):
    for text, message in (('{"a": 1}\n{"a": 2}', "must be named .jsonl"), ('{"a": 1}', "a list of JSON objects"),
                          ("[1]", "row 0: a JSON object is needed"), ("[]", "holds no row")):  # fmt: skip
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=message):
            list(data.read_rows(str(tmp_path / "a.json"), "rl_data"))


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
    assert task.notes == [
        f"{name}: 2 of 5 share 13 words in a row with an evaluation problem: dropped"
        for name in ("rl_data", "sft_data")
    ]


def test_a_question_of_just_thirteen_words_is_compared_by_words():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert tasks.ngrams(words + ".") == tasks.ngrams(words.upper()) == [tuple(words.split())]


def test_the_built_in_task_loses_nothing():
    task = toy.task(0, 100)
    before = len(task.problems), len(task.demonstrations)
    tasks.decontaminate(task)
    assert (len(task.problems), len(task.demonstrations), task.notes) == (*before, [])


def test_a_hundred_thousand_rows_take_seconds():
    questions = [" ".join(f"word{(7 * i + j * j) % 9973}" for j in range(60)) for i in range(100_000)]
    task = Task([Problem(q, "1") for q in questions], [], [Problem(q, "1") for q in questions[:1500]])
    start = time.perf_counter()
    tasks.decontaminate(task)
    assert time.perf_counter() - start < 60, "some 5 s on one core that nobody shares"
    assert len(task.problems) <= 98_500


def test_eval_problems_limits_each_group_but_all_of_the_set_is_kept_out_of_training(tmp_path):
    rows = [{"question": f"What is {i} plus 1?", "answer": str(i + 1), "level": i % 2} for i in range(10)]
    train = [*rows, {"question": "What is 99 plus 1?", "answer": "100"}]
    paths = write(tmp_path / "a.jsonl", train), "", write(tmp_path / "b.jsonl", rows)
    task = tasks.from_files(*paths, 2)
    assert [p.question for p in task.evaluation] == [f"What is {i} plus 1?" for i in (0, 2, 1, 3)]
    tasks.prepare(task, make(CHATML), 20, 1000, False)
    assert [p.question for p in task.problems] == ["What is 99 plus 1?"]


def test_benchmarks_are_evaluation_sets_under_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    for name in ("math500", "aime24"):
        write(tmp_path / "benchmarks" / f"{name}.jsonl", [{"problem": f"{name} {i}", "answer": "1"} for i in range(3)])
    train = write(tmp_path / "a.jsonl", [{"question": q, "answer": "1"} for q in ("math500 2", "another")])
    task = tasks.from_files(train, "", "math500, aime24", 2)
    assert [(p.group, p.question) for p in task.evaluation] == [
        (name, f"{name} {i}") for name in ("math500", "aime24") for i in range(2)
    ]
    tasks.decontaminate(task)
    assert [p.question for p in task.problems] == ["another"]
    with pytest.raises(DataError, match=r"eval_data: .*or put the rows into benchmarks/amc23\.jsonl"):
        tasks.from_files(train, "", "amc23", 2)


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"shared/data/{name} is absent")
    return str(DATA / name)


def test_math_500_is_found_in_the_test_set_it_was_drawn_from():
    notes = []
    problems = tasks.read_problems(real("math_test_solutions.jsonl"), "rl_data", notes, "answer=solution")
    demonstrations = tasks._demonstrations(real("math_test_solutions.jsonl"), notes)
    task = Task(problems, demonstrations, [], kept_apart=[
        p.question for p in tasks.read_problems(real("math500.jsonl"), "eval_data", notes)
    ])  # fmt: skip
    held_out = {" ".join(q.split()) for q in task.kept_apart}
    tasks.decontaminate(task)
    assert not held_out & {" ".join(r.question.split()) for r in (*task.problems, *task.demonstrations)}
    for before, after in ((problems, task.problems), (demonstrations, task.demonstrations)):
        assert 500 <= len(before) - len(after) <= 800
        assert len(after) > 4000


def test_math_s_levels_and_difficulties_are_filtered():
    notes = []
    hard = tasks.read_problems(
        real("math_test_solutions.jsonl"), "rl_data", notes, "answer=solution", "level=Level 3|Level 4|Level 5"
    )
    assert {p.group for p in hard} == {"level 3", "level 4", "level 5"}
    assert "keeps 3669 of 5000 rows" in notes[0]
    middle = tasks.read_problems(real("math_train_problems.json"), "rl_data", notes, "", "difficulty=3..4,type=Algebra")
    assert {p.group for p in middle} <= {"difficulty 3.0", "difficulty 3.5", "difficulty 4.0"}
    assert len(middle) > 100


def test_gsm8k_is_read_through_the_settings_and_shares_nothing_with_its_test_set():
    flags = ["--rl-data", real("gsm8k_train.jsonl"), "--sft-data", real("gsm8k_train.jsonl")]
    s, *_ = settings.parse([*flags, "--eval-data", real("gsm8k_test.jsonl")])
    names = s.rl_fields, s.sft_fields, s.rl_filter, s.sft_filter
    task = tasks.from_files(s.rl_data, s.sft_data, s.eval_data, s.eval_problems, *names)
    assert (len(task.problems), len(task.demonstrations)) == (7473, 7473)
    assert len(task.evaluation) + len(task.kept_apart) == 1319
    tasks.decontaminate(task)
    assert 7300 < len(task.problems) < 7473, "a few share the words of their story"


# ---------------------------------------------------------------------------------------------------------------------
# Presets and rewards


@pytest.mark.parametrize("preset", ["qwen2.5-3b", "llama-3.2-3b-instruct", "qwen3-8b-base"])
def test_the_presets_of_the_paper_need_no_other_flag(preset, tmp_path, monkeypatch):
    s, args = settings.parse(["--preset", preset])
    assert args.out == Path(f"runs/bridge-{preset}-0")
    assert (s.prompts_per_step, s.group_size, s.max_new_tokens, s.lora_rank, s.lora_alpha) == (64, 5, 3000, 16, 16)
    assert (s.alpha, s.lam, s.dtype) == (5e-7, 0.5, "bfloat16")
    assert 10 <= s.beta / s.alpha <= 200
    rows = 1389 if preset == "qwen2.5-3b" else 8523
    assert s.steps == round(6 * rows / 64)
    monkeypatch.chdir(tmp_path)  # the fields their sources have, as read in public loaders
    (tmp_path / "benchmarks").mkdir()
    for name in s.eval_data.split(","):
        row = {"problem": f"{name}?", "answer": "1", "final_answer": ["1"]}
        write(tmp_path / "benchmarks" / f"{name}.jsonl", [row])
    sources = {
        "GAIR/LIMR": [{"id": "0", "prompt": "limr?", "answer": "2", "source": "math"}],
        "hkust-nlp/SimpleRL-Zoo-Data": [
            {"prompt": [{"role": "user", "content": "x"}], "question": "zoo?", "gt_answer": "2", "level": 3}
        ],
        "zwhe99/DeepMath-103K": [
            {"question": "deep?", "final_answer": "3", "difficulty": d, "topic": "t", "r1_solution_1": "\\boxed{4}",
             "r1_solution_2": "a</think>\\boxed{3}", "r1_solution_3": "\\boxed{3}"} for d in (2.0, 5.5, 8.0)
        ],
    }  # fmt: skip
    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", lambda path, **options: sources[path])
    names = s.rl_fields, s.sft_fields, s.rl_filter, s.sft_filter
    task = tasks.from_files(s.rl_data, s.sft_data, s.eval_data, s.eval_problems, *names)
    assert [(p.question, p.answer) for p in task.problems] == [("limr?" if rows == 1389 else "zoo?", "2")]
    assert task.demonstrations == [Demonstration("deep?", "a</think>\\boxed{3}", "3")]
    assert [p.group for p in task.evaluation] == list(s.eval_data.split(","))


PROBLEM = Problem("How long?", "1")


def test_a_reward_of_one_s_own_sees_response_and_problem(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def length(response, problem):\n    return len(response) + len(problem.answer)\n")
    assert rewards.load_reward(f"{path}:length")("four", PROBLEM) == 5.0
    default = rewards.load_reward("")
    assert (default("\\boxed{1}", PROBLEM), default("\\boxed{2}", PROBLEM)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("", "f", r"mine\.py has no function 'f'"),
        ("f = 3", "f", r"f in .*mine\.py is a int, not a function"),
        ("def f(:", "f", r"mine\.py, line 1, while loading: SyntaxError"),
        ("\nimport nowhere", "f", r"mine\.py, line 2, while loading: ModuleNotFoundError"),
        ("f = lambda r, p: None", "f", r"mine\.py:f must return a finite number, it returned None for 'How long\?'"),
        ("f = lambda r, p: float('nan')", "f", r"it returned nan for"),
        ("f = lambda r, p: 'x'", "f", r"it returned 'x' for"),
        ("def g():\n    return {}['k']\ndef f(r, p):\n    return g()", "f", r"mine\.py, line 2, in f: KeyError\('k'\)"),
        ("f = lambda r: 1", "f", r"mine\.py in f: TypeError"),
    ],
)
def test_a_reward_that_fails_is_named_with_file_and_line(tmp_path, code, name, message):
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(rewards.RewardError, match=f"reward: .*{message}"):
        rewards.load_reward(f"{path}:{name}")("text", PROBLEM)


@pytest.mark.parametrize("spec", ["mine", "mine.py", ":f", "mine.txt:f", "mine.py:"])
def test_a_reward_that_names_no_function_is_refused(spec):
    with pytest.raises(rewards.RewardError, match=r"must be FILE\.py:FUNCTION"):
        rewards.load_reward(spec)
    with pytest.raises(rewards.RewardError, match=r"there is no file 'nowhere\.py'"):
        rewards.load_reward("nowhere.py:f")


def test_a_run_pays_the_reward_it_is_given_and_shows_its_first_prompt(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def f(response, problem):\n    return 0.25\n")
    flags = ["--preset", "smoke", "--steps", "1", "--out", str(tmp_path / "run")]
    bridge.main([*flags, "--reward", f"{tmp_path}/mine.py:f"])
    (metrics,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert metrics["reward"] == 0.25
    printed = capsys.readouterr().out
    assert "the first prompt: 'Q:" in printed
    assert "trained tokens in ⟦ ⟧: 'Q:" in printed
    (tmp_path / "mine.py").write_text("def f(response, problem):\n    return None\n")
    flags[-1] += "2"
    with pytest.raises(SystemExit, match=r"bridge\.py: reward: .*mine\.py:f must return a finite number"):
        bridge.main([*flags, "--reward", f"{tmp_path}/mine.py:f"])
