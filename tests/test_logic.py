"""The built-in task logic: its problems, demonstrations, base model and preset."""

import random
import re
from itertools import islice, product
from pathlib import Path

import pytest

import rewards
from evaluate import evaluate, find_task, parse
from infra.model import load
from sampler import Sampler
from settings import PRESETS, SettingError, Settings, check
from settings import parse as parse_settings
from tasks import builtin, logic, named
from tasks.task import encode_demonstration, ngrams, prepare

LIMIT = PRESETS["logic"]["max_new_tokens"]


@pytest.fixture(scope="module")
def tokenizer():
    return logic.make_tokenizer()


@pytest.fixture(scope="module")
def task():
    return logic.task(0, 300)


def as_python(text):
    """A statement as an expression over A, B, C and D, by text replacement alone."""
    text = re.sub(r"(\w) knight", r"\1", re.sub(r"(\w) knave", r"(not \1)", text))
    return text.replace("same", "==").replace("unlike", "!=")


def truths(question, knights):
    """For each statement of a question, whether it is true."""
    parts = [part.split(": ") for part in question.rstrip(".").split(". ")]
    assert [speaker for speaker, _ in parts] == list(knights)
    return [bool(eval(as_python(text), {}, knights)) for _, text in parts]


def people(digits):
    return {person: digit == "1" for person, digit in zip("ABCD", digits, strict=False)}


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


def test_every_demonstration_tries_the_assignments_in_order_and_marks_each_statement_rightly(task):
    for d in task.demonstrations:
        steps, box, answer = d.response.partition("\\boxed{")
        tried = [(digits, marks) for digits, marks, _ in re.findall(r"([01]+)(([A-D][+-])+)", steps)]
        assert "".join(digits + marks for digits, marks in tried) == steps
        assert [digits for digits, _ in tried] == assignments(d.question.count(":"))[: len(tried)]
        for digits, marks in tried:
            signs = [
                person + "-+"[truth] for person, truth in zip("ABCD", truths(d.question, people(digits)), strict=False)
            ]
            wrong = [i for i, fitting in enumerate(fits(d.question, digits)) if not fitting]
            assert marks == "".join(signs[: wrong[0] + 1] if wrong else signs)
            assert bool(wrong) == (digits != d.answer)
        assert (box, answer) == ("\\boxed{", tried[-1][0] + "}")


def test_every_demonstration_earns_its_reward_fits_and_decodes_to_itself(task, tokenizer):
    for d in task.demonstrations:
        assert rewards.is_correct(d.response, d.answer).correct
        prompt, response = encode_demonstration(tokenizer, d, "", "", None)
        assert len(response) <= LIMIT
        assert tokenizer.decode(prompt) == f"Q: {d.question}?"
        assert tokenizer.decode(response) == d.response + tokenizer.eos_token
        assert tokenizer.unk_token_id not in (*prompt, *response)


@pytest.mark.parametrize("size", logic.EVAL_SIZES)
def test_the_grader_accepts_the_right_assignment_alone(size):
    for gold, answer in product(assignments(size), repeat=2):
        assert rewards.is_correct(f"\\boxed{{{answer}}}", gold).correct == (answer == gold)


def test_there_are_240_problems_of_two_people():
    rng = random.Random(0)
    found = {logic.puzzle(rng, 2)[0] for _ in range(10_000)}
    assert len(found) == 240


def test_the_task_is_a_function_of_its_seed_with_a_demonstration_for_every_prompt(task):
    again, other = logic.task(0, 300), logic.task(1, 300)
    assert task == again
    assert task.problems != other.problems
    assert task.evaluation == other.evaluation
    assert [p.question for p in task.problems] == [d.question for d in task.demonstrations]
    assert [p.answer for p in task.problems] == [d.answer for d in task.demonstrations]
    assert len({p.question for p in task.problems}) == logic.PROMPTS
    assert len(logic.task(0, 1, demonstrations=10).demonstrations) == 10
    assert [len([p for p in task.evaluation if p.group == f"n={n}"]) for n in (2, 3, 4)] == [100, 300, 300]


def test_no_evaluation_problem_occurs_in_training(task, tokenizer):
    questions = {p.question for p in task.evaluation}
    assert len(questions) == len(task.evaluation)
    grams = {g for q in questions for g in ngrams(q)}
    assert all(grams.isdisjoint(ngrams(p.question)) for p in task.problems)
    rows = list(islice(logic.documents(0, tokenizer), 3000))
    asked = {tokenizer.decode(prompt) for prompt, _ in rows}
    assert not {f"Q: {q}?" for q in questions} & asked
    assert 0.4 < sum(not text.startswith("Q") for text in asked) / len(rows) < 0.5
    prepared = prepare(logic.task(0, 300), tokenizer, LIMIT, 256)
    assert len(prepared) == logic.PROMPTS, "the checks before training drop nothing"


def test_useless_demonstrations_are_wrong_answers_at_once_and_their_share_is_exact(task):
    half = logic.task(0, 300, useless=0.5)
    assert half.problems == task.problems
    changed = [(a, b) for a, b in zip(half.demonstrations, task.demonstrations, strict=True) if a != b]
    assert len(changed) == logic.PROMPTS / 2
    for useless, good in changed:
        assert (useless.question, useless.answer) == (good.question, good.answer)
        assert re.fullmatch(rf"\\boxed{{[01]{{{len(good.answer)}}}}}", useless.response)
        assert not rewards.is_correct(useless.response, useless.answer).correct
    assert all(d.response.startswith("\\boxed") for d in logic.task(3, 1, useless=1.0).demonstrations)


def test_the_shipped_base_model_is_small_and_solves_the_smallest_problems_only(monkeypatch):
    monkeypatch.setattr(builtin, "train_base", None)  # nothing is trained
    folder = Path(builtin.resolve("logic-laptop"))
    assert sum(f.stat().st_size for f in folder.iterdir()) < 1_000_000
    model, tokenizer = load(str(folder))
    accuracy, _ = evaluate(Sampler(model, [tokenizer.eos_token_id]), tokenizer, logic.task(0, 100), LIMIT)
    for group, expected in BASE.items():
        assert accuracy[group] == pytest.approx(expected, abs=0.03), "a rounding of the kernels may turn a few answers"


BASE = {"n=2": 0.5, "n=3": 0.3, "n=4": 0.1}


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
    assert [builtin.task_of(name) for name in ("logic-laptop", "arithmetic-smoke", "x")] == [
        "logic", "arithmetic", "arithmetic",
    ]  # fmt: skip
    found = find_task(parse(["logic-laptop", "--problems", "3"]), Settings(task="logic"))
    assert found.evaluation == logic.evaluation(3)
    assert found.instruction == ""
