"""The built-in tasks, their base models, and the checks of a task before training."""

import json
import random
import re
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
from conftest import shipped_tokenizer
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from base_models import BASE_MODELS, Recipe, config_of, write

import rewards
from evaluate import evaluate
from infra.files import DataError
from infra.model import MODELS, load, repository_of
from sampler import Sampler
from tasks import arithmetic, chains, logic
from tasks import task as tasks
from tasks.prompts import encode_prompt, prompt_text
from tasks.task import Demonstration, Problem, Stream, Task


@pytest.fixture(scope="module")
def tokenizer():
    return shipped_tokenizer()


def test_chains_are_evaluated_left_to_right_modulo_100():
    question, steps, answer = arithmetic.chain(random.Random(3), 5)
    value = int(question[0])
    for step, op, operand in zip(steps.split(";"), question[1::2], question[2::2], strict=False):
        result = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[op] % 100
        assert step == f"{value}{op}{operand}={result}"
        value = result
    assert answer == str(value)


def test_the_built_in_task_is_a_function_of_its_seed_and_repeats_no_question():
    a, b, c = arithmetic.task(0, 100), arithmetic.task(0, 100), arithmetic.task(1, 100)
    assert a.problems == b.problems
    assert a.demonstrations == b.demonstrations
    assert a.problems != c.problems
    assert a.evaluation == c.evaluation
    held_out = {p.question for p in arithmetic.evaluation(arithmetic.EVAL_MAX)}
    questions = [r.question for r in (*a.problems, *a.demonstrations)]
    assert len(set(questions)) == len(questions)
    assert not held_out & set(questions)
    assert {p.group for p in a.evaluation} == {f"n={n}" for n in range(3, 9)}


@pytest.mark.parametrize("useless", [0.0, 0.5])
def test_the_harder_chains_have_the_stated_share_of_wrong_demonstrations_on_questions_of_d_rl(useless):
    task = chains.task(3, 10, demonstrations=64, useless=useless)
    right = [rewards.is_correct(d.response, d.answer).correct for d in task.demonstrations]
    assert sum(right) == 64 * (1 - useless)
    assert all(
        d.response.startswith(arithmetic.BOX) for d, ok in zip(task.demonstrations, right, strict=True) if not ok
    )
    golds = {p.question: p.answer for p in task.problems}
    assert all(golds[d.question] == d.answer for d in task.demonstrations)
    assert not {p.question for p in task.evaluation} & set(golds)
    assert {p.group for p in task.problems} < {p.group for p in task.evaluation} == {f"n={n}" for n in range(3, 10)}


def test_the_shipped_base_models_are_small_and_the_default_one_solves_short_chains_only():
    for folder in MODELS.iterdir():
        assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    model, tokenizer = load("arithmetic-laptop")
    sampler = Sampler(model, [tokenizer.eos_token_id])
    accuracy, _ = evaluate(sampler, tokenizer, arithmetic.task(0, 100), 80)
    assert accuracy["n=4"] > 0.9
    assert max(accuracy[f"n={n}"] for n in (5, 6, 7, 8)) < 0.15
    assert accuracy["average"] == pytest.approx(0.243, abs=0.02), "a rounding of the kernels may turn a few answers"


@pytest.mark.parametrize("name", BASE_MODELS)
def test_the_shipped_tokenizer_is_the_one_of_the_training_and_transformers_reads_it_so(name):
    base = BASE_MODELS[name]
    made = base.make_tokenizer()
    shipped = json.loads((MODELS / name / "tokenizer.json").read_text())
    assert shipped == json.loads(made.backend_tokenizer.to_str())
    _, read = load(name)
    assert read.chat_template == made.chat_template
    for row in islice(base.documents(0, made), 50):
        for ids in row:
            text = made.decode(ids)
            assert read.encode(text, add_special_tokens=False) == ids
            assert read.decode(ids) == text


@pytest.mark.parametrize("name", BASE_MODELS)
def test_the_recipe_beside_shipped_weights_is_that_of_the_training_and_makes_weights_of_their_shapes(name):
    base = BASE_MODELS[name]
    recorded = json.loads((MODELS / name / "recipe.json").read_text())
    assert recorded == asdict(base.recipe)
    shapes = {key: tuple(p.shape) for key, p in load(name)[0].named_parameters()}
    made = AutoModelForCausalLM.from_config(config_of(base.recipe, base.make_tokenizer()))
    assert shapes == {key: tuple(p.shape) for key, p in made.named_parameters()}


def test_a_built_in_name_stands_for_its_folder_and_another_name_for_itself():
    assert repository_of("arithmetic-smoke") == (str(MODELS / "arithmetic-smoke"), None)
    assert repository_of("owner/name@main") == ("owner/name", "main")


@pytest.mark.parametrize(("name", "task"), [("arithmetic-laptop", arithmetic), ("logic-laptop", logic)])
def test_a_base_model_is_trained_on_no_evaluation_problem(name, task):
    base = BASE_MODELS[name]
    tokenizer = base.make_tokenizer()
    held_out = {prompt_text(tokenizer, p.question, "") for p in task.evaluation(task.EVAL_MAX)}
    trained = [tokenizer.decode(prompt) for prompt, _ in islice(base.documents(0, tokenizer), 1000)]
    assert held_out.isdisjoint(trained)
    assert 0.4 < sum(not text.startswith("Q") for text in trained) / 1000 < 0.5, "prompts that are no questions"


def test_training_a_base_model_again_gives_the_same_bytes(tmp_path):
    recipe = Recipe(hidden=16, layers=1, mlp=16, steps=1, batch=2)
    contents = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        write(BASE_MODELS["arithmetic-smoke"]._replace(recipe=recipe), folder)
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert contents[0] == contents[1]
    assert load(str(tmp_path / "first"))[0].config.hidden_size == 16


def test_every_built_in_demonstration_is_correct_and_decodes_to_itself(tokenizer):
    for d in arithmetic.task(0, 1).demonstrations:
        assert rewards.is_correct(d.response, d.answer).correct
        prompt, response = tasks.encode_demonstration(tokenizer, d, "", "", None)
        assert tokenizer.decode(prompt) == f"Q:{d.question}="
        assert tokenizer.decode(response, skip_special_tokens=True) == d.response
        assert response.count(tokenizer.eos_token_id) == 1
        assert response[-1] == tokenizer.eos_token_id


def test_a_demonstration_and_an_rl_problem_have_equal_prompt_ids(tokenizer):
    d = Demonstration("1+2*3", "\\boxed{9}", "9")
    assert tasks.encode_demonstration(tokenizer, d, "", "", None)[0] == encode_prompt(tokenizer, "1+2*3", "")


def small_task(**changes):
    fields = dict(
        problems=[Problem("1+1", "2")], demonstrations=[Demonstration("1+2", "1+2=3;\\boxed{3}", "3")],
        evaluation=[Problem("3+3", "6")], instruction="",
    )  # fmt: skip
    return Task(**(fields | changes))


def test_evaluation_problems_in_training_are_dropped_and_an_empty_rest_is_refused(tokenizer):
    problem, demonstration = Problem("3+3", "6"), Demonstration("3+3", "\\boxed{6}", "6")
    task = small_task(
        problems=[problem, *small_task().problems], demonstrations=[demonstration, *small_task().demonstrations]
    )
    assert len(tasks.prepare(task, tokenizer, 20, 64, True)) == 1
    assert task.problems == small_task().problems
    for name, note in zip(("rl_data", "sft_data"), task.notes, strict=True):
        assert (
            note
            == f"{name}: 1 of 2 share 13 words in a row, or all, with an evaluation problem, first '[3 + 3]': dropped"
        )
    for name, leak in (("rl", {"problems": [problem]}), ("sft", {"demonstrations": [demonstration]})):
        with pytest.raises(DataError, match=rf"{name}_data: no usable row is left \({name}_data: 1 of 1 share 13 w"):
            tasks.prepare(small_task(**leak), tokenizer, 20, 64, True)


def test_long_demonstrations_are_counted_and_dropped_instead_of_shortened(tokenizer):
    long = Demonstration("1+3", "1+3=4;" * 10 + "\\boxed{4}", "4")
    task = small_task(demonstrations=[*small_task().demonstrations, long])
    (kept,) = tasks.prepare(task, tokenizer, 20, 64, True)
    assert tokenizer.decode(kept[1], skip_special_tokens=True) == "1+2=3;\\boxed{3}"
    assert "1 of 2 demonstrations exceed max_new_tokens=20: dropped" in task.notes[0]
    with pytest.raises(
        DataError, match=r"sft_data: no usable row is left \(sft_data: 1 of 1 .* exceed max_new_tokens=20"
    ):
        tasks.prepare(small_task(demonstrations=[long]), tokenizer, 20, 64, True)
    assert tasks.prepare(small_task(demonstrations=[long]), tokenizer, 20, 64, False) == []


def test_prompts_without_room_for_an_answer_are_dropped_in_training_and_refused_in_evaluation(tokenizer):
    endless = Problem("1+" * 30 + "1", "31")
    task = small_task(problems=[*small_task().problems, endless])
    tasks.prepare(task, tokenizer, 20, 64, True)
    assert task.problems == small_task().problems
    assert "1 of 2 prompts exceed 44 tokens, 64 less max_new_tokens: dropped" in task.notes[0]
    with pytest.raises(DataError, match=r"eval_data: 1 prompts exceed 44 tokens.*lower max_new_tokens"):
        tasks.prepare(small_task(evaluation=[endless]), tokenizer, 20, 64, True)


def test_demonstrations_that_the_grader_refuses_are_counted(tokenizer):
    task = small_task(demonstrations=[Demonstration("1+2", "\\boxed{4}", "3")])
    tasks.prepare(task, tokenizer, 20, 64, True)
    assert "refuses 1 of 1 demonstrations" in task.notes[0]


def test_a_solution_without_an_answer_is_counted_and_an_eos_in_a_solution_is_not_doubled(tokenizer):
    demonstrations = [Demonstration("1+2", "1+2=3;"), Demonstration("1+3", "\\boxed{4}<eos>", "4")]
    task = small_task(demonstrations=demonstrations)
    encoded = tasks.prepare(task, tokenizer, 20, 64, True)
    assert "refuses 1 of 2 demonstrations" in task.notes[0]
    assert [ids.count(tokenizer.eos_token_id) for _, ids in encoded] == [1, 1]


@pytest.mark.parametrize(
    ("name", "unknown", "named"),
    [
        ("arithmetic-smoke", "What is 3/4?", "'/', '?', 'W', 'a', 'h', 'i', 's', 't'"),
        ("logic-laptop", "hello?", "'e', 'h', 'l', 'o'"),
    ],
)
def test_questions_whose_characters_the_tokenizer_loses_are_refused(name, unknown, named):
    task = small_task(evaluation=[Problem(unknown, "1"), Problem(unknown, "2")])
    with pytest.raises(DataError, match=re.escape(f"no token for {named} of the questions")):
        tasks.prepare(task, shipped_tokenizer(name), 20, 64, True)


def test_one_question_that_the_tokenizer_keeps_whole_is_enough(tokenizer):
    evaluation = [Problem("What is 3/4?", "1"), Problem("3*4", "2")]
    assert tasks.prepare(small_task(evaluation=evaluation), tokenizer, 20, 64, True)


def test_empty_sets_are_refused(tokenizer):
    with pytest.raises(DataError, match="rl_data: no usable row"):
        tasks.prepare(small_task(problems=[]), tokenizer, 20, 64, True)
    with pytest.raises(DataError, match="1 prompts exceed 0 tokens, the model's 64 positions less max_new_tokens=64"):
        tasks.prepare(small_task(), tokenizer, 64, 64, True)
    with pytest.raises(DataError, match="eval_data: no usable row"):
        tasks.prepare(small_task(evaluation=[]), tokenizer, 20, 64, True)


def test_questions_with_several_golds_are_counted(tokenizer):
    rows = [("1+1", "2"), ("1+4", "5"), ("1+1", "2"), ("1+2", "3"), ("1+4", "6"), ("1+4", "5")]
    task = small_task(problems=[Problem(*row) for row in rows])
    tasks.prepare(task, tokenizer, 20, 64, True)
    assert task.notes == ["rl_data: 1 questions have several golds, all are trained: first '1+4'"]
    assert len(task.problems) == 6


def test_a_fingerprint_has_extra_only_if_a_reward_reads_it_and_no_address_of_an_object():
    def of(extra, **options):
        return tasks.fingerprint(small_task(problems=[Problem("1+1", "2", extra=extra)]), **options)

    first = of({"tests": [1, None, {"a": 2.5}]}, with_extra=True)
    for other in ({"tests": [1, None, {"a": 2.0}]}, {"cases": [1, None, {"a": 2.5}]}, {}, {"tests": "1"}):
        assert of(other, with_extra=True) != first
        assert of(other) == of({})
    assert of({"o": object(), "s": {1, 2}, (1, 2): 3}, with_extra=True) == of(
        {"o": object(), "s": set()}, with_extra=True
    )


def test_a_stream_visits_every_item_once_per_epoch_and_resumes_from_its_position():
    stream = Stream(7, (0, 1))
    draws = [d for n in (3, 5, 6) for d in stream.take(n)]
    assert [number for number, _ in draws] == list(range(14))
    assert sorted(i for _, i in draws[:7]) == sorted(i for _, i in draws[7:]) == list(range(7))
    assert [i for _, i in draws[:7]] != [i for _, i in draws[7:]]
    again = Stream(7, (0, 1))
    again.position = 3
    assert again.take(5) == draws[3:8]
    assert Stream(7, (1, 1)).take(7) != draws[:7]
