"""The built-in task logic: its problems, demonstrations, base model and preset."""

import re
from itertools import product

import pytest
from conftest import shipped_tokenizer

import rewards
from evaluate import evaluate, find_task, parse
from infra.model import load
from sampler import Sampler
from settings import PRESETS, SettingError, Settings, check
from settings import parse as parse_settings
from tasks import logic, named
from tasks.task import encode_demonstration, marks, prepare

LIMIT = PRESETS["logic"]["max_new_tokens"]


@pytest.fixture(scope="module")
def tokenizer():
    return shipped_tokenizer("logic-laptop")


@pytest.fixture(scope="module")
def task():
    return logic.task(0, 100, useless=0.0)


def as_python(text):
    """A statement as an expression over the people, by text replacement alone."""
    text = re.sub(r"(\w) knight", r"\1", re.sub(r"(\w) knave", r"(not \1)", text))
    return text.replace("same", "==").replace("unlike", "!=")


def truths(question, knights):
    """For each statement of a question, whether it is true."""
    parts = [part.split(": ") for part in question.rstrip(".").split(". ")]
    assert [speaker for speaker, _ in parts] == list(knights)
    return [bool(eval(as_python(text), {}, knights)) for _, text in parts]


def people(digits):
    return {person: digit == "1" for person, digit in zip("ABCDE", digits, strict=False)}


def fits(question, digits):
    knights = people(digits)
    return [truth == knight for truth, knight in zip(truths(question, knights), knights.values(), strict=True)]


def assignments(size):
    return [f"{number:0{size}b}" for number in reversed(range(2**size))]


def test_every_problem_has_exactly_one_solution(task):
    for problem in (*task.problems, *task.evaluation):
        size = problem.question.count(":")
        assert [d for d in assignments(size) if all(fits(problem.question, d))] == [problem.answer]
        assert problem.group == f"n={size}"


def checked(question, digits):
    """The steps that check one assignment, written from the question's text."""
    label = dict(zip("ABCDE", digits, strict=False))
    steps = "".join(person + digit for person, digit in label.items())
    texts, knights = question.split("."), people(digits)
    for text, truth, fitting in zip(texts, truths(question, knights), fits(question, digits), strict=False):
        speaker, said = text.strip().split(": ")
        steps += speaker + "".join(word + label[word] for word in said.split() if word in label) + "-+"[truth]
        if not fitting:
            break
    return steps


def test_every_demonstration_tries_the_assignments_in_order_and_marks_each_statement_rightly(task):
    for d in task.demonstrations:
        tried = [digits for digits in assignments(d.question.count(":")) if digits >= d.answer]
        steps = "".join(checked(d.question, digits) for digits in tried)
        assert d.response == f"{steps}\\boxed{{{d.answer}}}"


def test_every_demonstration_earns_its_reward_fits_and_decodes_to_itself(task, tokenizer):
    for d in task.demonstrations:
        assert rewards.is_correct(d.response, d.answer).correct
        prompt, response = encode_demonstration(tokenizer, d, "", "", None)
        assert len(response) <= LIMIT
        assert tokenizer.decode(prompt) == f"Q: {d.question}?"
        assert tokenizer.decode(response) == d.response + tokenizer.eos_token
        assert tokenizer.unk_token_id not in (*prompt, *response)


@pytest.mark.parametrize("size", logic.SIZES)
def test_the_grader_accepts_the_right_assignment_alone(size):
    for gold, answer in product(assignments(size), repeat=2):
        assert rewards.is_correct(f"\\boxed{{{answer}}}", gold).correct == (answer == gold)


def test_the_task_is_a_function_of_its_seed_with_a_demonstration_for_every_prompt(task):
    again = logic.task(0, 100, useless=0.0)
    other = logic.task(1, 100, useless=0.0)
    assert task == again
    assert task.problems != other.problems
    assert task.evaluation == other.evaluation
    assert [p.question for p in task.problems] == [d.question for d in task.demonstrations]
    assert [p.answer for p in task.problems] == [d.answer for d in task.demonstrations]
    assert len({p.question for p in task.problems}) == logic.PROMPTS
    assert len(logic.task(0, 1, demonstrations=10).demonstrations) == 10
    assert [len([p for p in task.evaluation if p.group == f"n={n}"]) for n in (3, 4, 5)] == [100, 100, 100]


def test_no_evaluation_problem_occurs_in_training(task, tokenizer):
    questions = {p.question for p in task.evaluation}
    assert len(questions) == len(task.evaluation)
    grams = {g for q in questions for g in marks(q)}
    assert all(grams.isdisjoint(marks(p.question)) for p in task.problems)
    prepared = prepare(logic.task(0, 100), tokenizer, LIMIT, 256)
    assert len(prepared) == logic.PROMPTS, "the checks before training drop nothing"


def test_useless_demonstrations_are_wrong_answers_at_once_and_their_share_is_exact(task):
    half = logic.task(0, 100)
    assert half.problems == task.problems
    changed = [(a, b) for a, b in zip(half.demonstrations, task.demonstrations, strict=True) if a != b]
    assert len(changed) == logic.PROMPTS / 2
    for useless, good in changed:
        assert (useless.question, useless.answer) == (good.question, good.answer)
        assert re.fullmatch(rf"\\boxed{{[01]{{{len(good.answer)}}}}}", useless.response)
        assert not rewards.is_correct(useless.response, useless.answer).correct
    assert all(d.response.startswith("\\boxed") for d in logic.task(3, 1, useless=1.0).demonstrations)


def test_the_shipped_base_model_solves_few_problems():
    model, tokenizer = load("logic-laptop")
    accuracy, _ = evaluate(Sampler(model, [tokenizer.eos_token_id]), tokenizer, logic.task(0, 100), LIMIT)
    for group, expected in BASE.items():
        assert accuracy[group] == pytest.approx(expected, abs=0.04), "a rounding of the kernels may turn a few answers"


BASE = {"n=3": 0.66, "n=4": 0.0, "n=5": 0.0}  # of 100 problems each


def test_the_preset_names_task_and_model_and_models_of_another_task_are_refused():
    s, _ = parse_settings(["--preset", "logic"])
    assert named.load_task(s) == logic.task(0, s.eval_problems)
    with pytest.raises(SettingError, match="arithmetic-laptop has no tokens for the task logic: use --preset logic"):
        check(Settings(task="logic"))
    with pytest.raises(SettingError, match="logic-laptop has no tokens for the task arithmetic: use --preset laptop"):
        check(Settings(model="logic-laptop"))
    with pytest.raises(SettingError, match="eval_data needs rl_data: the built-in logic has its own"):
        check(Settings(model="logic-laptop", task="logic", eval_data="x.jsonl"))


def test_evaluation_of_a_built_in_model_takes_the_problems_of_its_task():
    assert [named.task_of(name) for name in ("logic-laptop", "arithmetic-smoke", "x")] == [
        "logic", "arithmetic", "arithmetic",
    ]  # fmt: skip
    found = find_task(parse(["logic-laptop", "--problems", "3"]), Settings(task="logic"))
    assert found.evaluation == logic.evaluation(3)
    assert found.instruction == ""
