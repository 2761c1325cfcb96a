"""The files in examples/ run, and their verifiers accept nothing but right answers."""

import ast
import sys
from importlib.util import find_spec
from itertools import permutations, product
from pathlib import Path

import pytest
from conftest import lines
from hypothesis import given, settings
from hypothesis import strategies as st

import bridge
import evaluate
import rewards
from settings import Settings
from tasks.functions import load_function
from tasks.named import load_task
from tasks.task import Problem

EXAMPLES = Path(__file__).parents[1] / "examples"
COUNTDOWN = f"{EXAMPLES}/countdown.py:countdown"
GYM = f"{EXAMPLES}/gym.py:gym"
SMOKE = ("--preset", "smoke", "--steps", "1", "--prompts-per-step", "2", "--max-new-tokens", "16")
PUZZLE = Problem("14;3;8:9", "14+3-8")
needs_gym = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning_gym is not installed")

solves = load_function("task", f"{EXAMPLES}/countdown.py:solves")


@pytest.fixture(scope="module")
def puzzles():
    return load_task(Settings(task=COUNTDOWN))


def boxed(expression):
    return f"\\boxed{{{expression}}}"


def evaluated(text):
    """(value, sorted numbers) of a sum of integers, by Python's parser. Raises ValueError for anything else."""

    def visit(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value, [node.value]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
            left, of_left = visit(node.left)
            right, of_right = visit(node.right)
            return left + right if isinstance(node.op, ast.Add) else left - right, of_left + of_right
        raise ValueError(f"{ast.unparse(node)} is no sum of integers")

    value, numbers = visit(ast.parse(text, mode="eval").body)
    return value, sorted(numbers)


def is_right(response, problem):
    """What solves() must return for a response that consists of one box."""
    numbers, target = problem.question.split(":")
    expected = int(target), sorted(map(int, numbers.split(";")))
    try:
        return evaluated(response.removeprefix("\\boxed{").removesuffix("}")) == expected
    except (ValueError, SyntaxError):
        return False


joined = st.builds(
    lambda numbers, signs: (
        numbers[0] + "".join(sign + number for sign, number in zip(signs, numbers[1:], strict=False))
    ),
    st.permutations(["14", "3", "8", "9", "1"]).map(lambda numbers: numbers[:3]) | st.permutations(["14", "3", "8"]),
    st.tuples(*[st.sampled_from(["+", "-", "*", "**", "+-", ""])] * 2) | st.tuples(*[st.sampled_from("+-")] * 2),
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(joined | st.text("0123456789+-*/()_ .eE;:=", max_size=12))
def test_the_verifier_of_countdown_accepts_an_expression_if_it_gives_the_target_with_the_numbers(expression):
    assert solves(boxed(expression), PUZZLE) == is_right(boxed(expression), PUZZLE)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text() | st.text("\\boxed{}0123456789+-;:", max_size=30).map(lambda text: "\\boxed{" + text), st.text())
def test_the_verifier_of_countdown_raises_for_no_response_and_no_question(response, question):
    assert solves(response, Problem(question, "")) in (False, True)
    assert solves(response, PUZZLE) in (False, True)


@pytest.mark.parametrize("text", [
    "9", "17-8", "14+3-8+0", "14+3-8+8-8", "14+3", "14+3+8", "8+3-14", "14+03-8", "14+3-8=9", "-8+14+3", "14+3-(8)",
    "14 + 3 - 8", "14+3-8 or 8+3-14", "1_4+3-8", "١٤+٣-٨", "１４+3-8", "14+3−8", "9" * 10_000, "14+3-8+" + "9" * 10_000,
    "9**9**9**9", "(" * 10_000, "14+3-8" + "+1-1" * 10_000, "__import__('os')", "\x00", "\ud800", "{" * 10_000,
    "\\boxed{" * 10_000,
])  # fmt: skip
def test_the_verifier_of_countdown_refuses(text):
    assert solves(boxed(text), PUZZLE) is False
    assert solves(text, PUZZLE) is False
    assert solves("14+3-8", PUZZLE) is False, "no box"


@pytest.mark.parametrize(
    "question",
    [
        "",
        ":",
        "14;3;8",
        "14;3;8:",
        ";:9",
        "a;b:c",
        "9" * 10_000 + ":9",
        "8:" + "9" * 10_000,
        "8;" + "9" * 10_000 + ":9",
    ],
)
def test_a_question_that_is_no_puzzle_has_no_right_answer(question):
    numbers = question.partition(":")[0]
    texts = ("14+3-8", question, numbers, numbers.replace(";", "+"), "8", "")
    assert not any(solves(boxed(text), Problem(question, "")) for text in texts)


def test_every_demonstration_of_countdown_is_right_and_no_evaluation_puzzle_is_trained_in_another_order(puzzles):
    assert all(puzzles.verdict(d.response, Problem(d.question, "")).correct for d in puzzles.demonstrations)

    def unordered(row):
        numbers, target = row.question.split(":")
        return *sorted(numbers.split(";")), target

    trained = {unordered(row) for row in (*puzzles.problems, *puzzles.demonstrations)}
    assert len(puzzles.evaluation) == 200
    assert not trained & {unordered(p) for p in puzzles.evaluation}


def test_the_grader_would_fail_on_every_puzzle_as_docs_data_md_says(puzzles):
    right = 0
    differ = 0  # from the gold in their text
    for p in puzzles.evaluation:
        numbers, target = p.question.split(":")
        orders = permutations(numbers.split(";"))
        candidates = {f"{a}{x}{b}{y}{c}" for (a, b, c), x, y in product(orders, "+-", "+-")}
        found = [text for text in candidates if solves(boxed(text), p)]
        assert sorted(found) == sorted(text for text in candidates if is_right(boxed(text), p))
        right += len(found)
        differ += sum(text != p.answer for text in found)
        assert not any(rewards.is_correct(boxed(text), target).correct for text in found)
        assert rewards.is_correct(boxed(target), p.answer).correct
        assert not solves(boxed(target), p)
    assert differ / right == pytest.approx(0.77, abs=0.005)


def test_countdown_trains_and_grades_a_question_of_the_reader(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bridge.main([*SMOKE, "--task", COUNTDOWN, "--out", "run"])
    assert [r["step"] for r in lines("run/metrics.jsonl")] == [1]
    assert not [
        r for r in lines("run/samples.jsonl") if r["right"] != is_right(r["response"], Problem(r["question"], ""))
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run", "--ask", "2;9;4:7"])
    capsys.readouterr()
    evaluate.main()
    assert capsys.readouterr().out.count("(wrong)") == 3, "base, policy and shadow have not learned it in one step"


@needs_gym
def test_gym_trains_and_its_verifier_counts_a_part_of_the_score_as_wrong(tmp_path):
    bridge.main([*SMOKE, "--task", GYM, "--template", "plain", "--out", str(tmp_path / "run")])
    assert [r["step"] for r in lines(tmp_path / "run" / "metrics.jsonl")] == [1]
    task = load_task(Settings(task=GYM))
    assert all(task.verifier(d.response, Problem(d.question, "", extra=d.extra)) for d in task.demonstrations)
    problem = task.evaluation[0]
    assert task.verifier(boxed(problem.answer), problem)
    assert not task.verifier(boxed(f"5{problem.answer}"), problem), (
        "reasoning-gym pays a part for a text with the answer"
    )
    assert not task.verifier(problem.answer, problem), "no box"
    with pytest.raises(ValueError, match="only questions that the task has drawn"):
        task.verifier(boxed("7"), Problem("3 + 4 =", ""))
