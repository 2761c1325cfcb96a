"""A task with a verifier of its own: reward, evaluation, --ask and --regrade all ask it, and result files name it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import lines

import bridge
import evaluate
import rewards
from infra.run import settings_of
from settings import SettingError, Settings
from tasks import arithmetic, chains, functions, named
from tasks.loading import load_training
from tasks.task import Demonstration, Problem, Task, fingerprint, pair

# Any boxed even or odd number is right, as `extra` says. The gold answers are those of the sums, so the built-in grader
# judges otherwise.
PARITY = """
from rewards import extract
from tasks import arithmetic
from tasks.task import Demonstration, Problem, Task

def verify(response, problem):
    answer = extract(response) or ""
    return answer.isdigit() and int(answer) % 2 == problem.extra["rest"]

def with_rest(problems):
    return [Problem(p.question, p.answer, extra={"rest": i % 2}) for i, p in enumerate(problems)]

def parity(s):
    task = arithmetic.task(s.seed, s.eval_problems)
    worked = [Demonstration(f"{i}+{i}", f"\\\\boxed{{{i}}}", "9", extra={"rest": i % 2}) for i in range(10)]
    evaluation = with_rest(task.evaluation)
    return Task(with_rest(task.problems[:64]), worked, evaluation, instruction="", verifier=verify)
"""
SMOKE = ("--preset", "smoke", "--steps", "1", "--eval-problems", "3")


def parity(response, rest):
    answer = rewards.extract(response) or ""
    return answer.isdigit() and int(answer) % 2 == rest


def call(*flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        evaluate.main()


def rewrite(text):
    """Changes parity.py, for a process that has imported it."""
    Path("parity.py").write_text(text)
    functions.modules_beside.cache_clear()
    sys.modules.pop("parity", None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with parity.py and the folder `run` of a run on its task."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "parity.py").write_text(PARITY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        bridge.main([*SMOKE, "--task", "parity.py:parity", "--out", "run"])
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of `trained` that is the working directory."""
    shutil.copytree(trained, tmp_path / "parity")
    monkeypatch.chdir(tmp_path / "parity")
    return tmp_path / "parity"


def test_the_reward_of_a_task_with_a_verifier_is_its_verdict(trained):
    samples = lines(trained / "run" / "samples.jsonl")
    task = named.load_task(Settings(task=f"{trained}/parity.py:parity"))
    problem_of = {p.question: p for p in task.problems}
    expected = [parity(r["response"], problem_of[r["question"]].extra["rest"]) for r in samples]
    assert [r["reward"] for r in samples] == expected
    assert [r["right"] for r in samples] == expected, "right_from is 1"
    assert expected != [rewards.is_correct(r["response"], r["answer"]).correct for r in samples], "the case must differ"


def test_evaluation_gives_the_accuracy_of_the_verifier_where_the_grader_is_wrong(folder):
    call("run")
    header, *records = lines("run/answers-paper.jsonl")
    expected = [parity(r["response"], r["extra"]["rest"]) for r in records]
    of_grader = [rewards.is_correct(r["response"], r["answer"]).correct for r in records]
    assert [r["correct"] for r in records] == expected != of_grader
    summary = json.loads(Path("run/answers-paper.summary.json").read_text())
    assert summary["average"]["accuracy"][0] == pytest.approx(np.mean(expected))
    during_training = lines("run/evals.jsonl")[-1]["policy"]["average"]
    assert during_training == pytest.approx(np.mean(expected))
    assert header["header"]["grader"].startswith("parity.py:parity ")


def test_a_result_file_of_one_verifier_is_refused_by_another(folder):
    call("run")
    call("run")  # the same one continues it
    rewrite(PARITY + "\n# another verifier\n")
    with pytest.raises(SystemExit, match=r"answers-paper\.jsonl exists and was made with another grader"):
        call("run")


def test_regrading_asks_the_verifier_that_the_file_names(folder, capsys):
    call("run")
    before = lines("run/answers-paper.jsonl")
    rewrite(PARITY.replace("== problem.extra", "!= problem.extra"))
    call("--regrade", "run/answers-paper.jsonl")
    after = lines("run/answers-paper.regraded.jsonl")
    expected = []
    for r in before[1:]:
        answer = rewards.extract(r["response"]) or ""
        expected.append(answer.isdigit() and int(answer) % 2 != r["extra"]["rest"])
    assert [r["correct"] for r in after[1:]] == expected
    assert before[0]["header"]["grader"] != after[0]["header"]["grader"]
    changed = sum(new != old["correct"] for new, old in zip(expected, before[1:], strict=True))
    assert f"{changed} of {len(expected)} verdicts changed" in capsys.readouterr().out
    Path("parity.py").rename("moved.py")
    with pytest.raises(SystemExit, match=r"task: there is no file 'parity\.py'"):
        call("--regrade", "run/answers-paper.jsonl")


def test_asked_questions_are_verified_with_the_problem_of_the_task(folder, capsys):
    task = named.load_task(settings_of(Path("run/config.json")))
    problems = task.evaluation[:4]
    call("run", *(word for p in problems for word in ("--ask", p.question)))
    printed = capsys.readouterr().out
    answers = [block.strip().split("\n") for block in printed.split("--- ")[1:]]
    assert len(answers) == 12, "base, policy and shadow"
    for i, (_, response, verdict, *_) in enumerate(answers):
        right = parity(response, problems[i // 3].extra["rest"])
        assert verdict == ("(right)" if right else "(wrong)")
    assert {verdict for _, _, verdict, *_ in answers} == {"(right)", "(wrong)"}


def test_a_model_is_evaluated_on_a_task_by_name_or_file(folder):
    call("arithmetic-smoke", "--task", "parity.py:parity", "--problems", 4, "--max-new-tokens", 48)
    header, *records = lines("evals/arithmetic-smoke/answers-parity-paper.jsonl")
    assert [r["correct"] for r in records] == [parity(r["response"], i % 2) for i, r in enumerate(records)]
    assert header["header"]["grader"].startswith("parity.py:parity ")
    assert not named.load_task(Settings(task="parity.py:parity")).notes, "no gold is read"
    legs = evaluate.find_task(evaluate.parse(["some/model", "--task", "legs", "--problems", "1"]), None)
    assert legs.evaluation[0].question.startswith("How many ")


def test_a_reward_of_the_user_replaces_the_verifier_in_training_alone(folder):
    rewrite(PARITY + "\ndef half(response, problem):\n    return 0.5\n")
    bridge.main([*SMOKE, "--task", "parity.py:parity", "--reward", "parity.py:half", "--out", "half"])
    assert {r["reward"] for r in lines("half/samples.jsonl")} == {0.5}
    first, _ = lines("half/evals.jsonl")
    assert first["policy"] == lines("run/evals.jsonl")[0]["policy"]


def test_a_run_says_how_many_demonstrations_the_verifier_refuses(folder):
    s = settings_of(Path("run/config.json"))
    assert not [note for note in load_training(s).task.notes if "refuses" in note]
    rewrite(PARITY.replace('"9", extra={"rest": i % 2}', '"9", extra={"rest": 0}'))
    assert "the verifier refuses 5 of 10 demonstrations" in " ".join(load_training(s).task.notes)


def test_problems_that_are_made_of_demonstrations_keep_what_the_verifier_reads():
    task = Task([], [Demonstration("1+1", "2", "2", extra={"rest": 0})], [])
    pair(task, [([1], [2])], "luffy")
    assert task.problems[0].extra == {"rest": 0}


@pytest.mark.parametrize(("task", "limit"), [("", 96), ("legs", 96), ("gsm8k", 5000), ("own.py:f", 5000)])
def test_only_answers_to_built_in_tasks_are_cut_at_96_tokens(task, limit):
    args = evaluate.parse(["some/model", *(["--task", task] if task else [])])
    assert evaluate.choose_sampling(args, None).max_new_tokens == limit


def test_another_task_of_a_run_has_the_run_s_seed_and_number_of_problems(folder):
    s = Settings(seed=1, eval_problems=2)
    own = evaluate.find_task(evaluate.parse(["run", "--task", "parity.py:parity"]), s)
    assert [p.question for p in own.evaluation] == [p.question for p in arithmetic.task(1, 2).evaluation]
    assert evaluate.find_task(evaluate.parse(["run", "--task", "chains"]), s).evaluation == chains.evaluation(2)
    of_files = Settings(rl_data="rows.jsonl", eval_problems=2)
    found = evaluate.find_task(evaluate.parse(["run", "--task", "arithmetic"]), of_files)
    assert found.evaluation == arithmetic.evaluation(2)


def test_a_run_resumes_with_no_other_extra_of_any_row():
    def of(problem, demonstration, evaluation):
        rows = [Problem("p", "1", extra={"x": problem})], [Demonstration("d", "r", extra={"x": demonstration})]
        return fingerprint(Task(*rows, [Problem("e", "1", extra={"x": evaluation})], verifier=lambda *_: True))

    assert len({of(0, 0, 0), of(1, 0, 0), of(0, 1, 0), of(0, 0, 1)}) == 4


def test_a_changed_extra_is_another_data_set_for_a_verifier_alone():
    problems = [[Problem("q", "1", extra={"rest": rest})] for rest in (0, 1)]
    verified = Task([], [], [], verifier=lambda *_: True)
    graded = Task([], [], [])
    assert evaluate.describe(problems[0], verified) != evaluate.describe(problems[1], verified)
    assert evaluate.describe(problems[0], graded) == evaluate.describe(problems[1], graded)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.3", r"must return True or False, it returned 0\.3 for '1\+1': compare a score with a threshold"),
        ("2", "must return True or False, it returned 2"),
        ("None", "must return a finite number, it returned None for"),
        ("'yes'", "must return a finite number, it returned 'yes' for"),
    ],
)
def test_a_verifier_that_returns_no_verdict_ends_with_the_value_and_the_question(tmp_path, value, message):
    path = tmp_path / "own.py"
    path.write_text(
        "from tasks.task import Problem, Task\n"
        f"def f(s): return Task([], [], [Problem('1+1', '2')], verifier=lambda response, problem: {value})"
    )
    task = named.load_task(Settings(task=f"{path}:f"))
    with pytest.raises(SettingError, match=rf"^verifier: .*own\.py:f {message}"):
        task.verdict("2", task.evaluation[0])


@pytest.mark.parametrize("extra", ["{'x': {1}}", "{1: 'x'}", "{'x': (1, 2)}"])
def test_a_result_file_can_hold_what_the_verifier_reads(tmp_path, extra):
    path = tmp_path / "own.py"
    path.write_text(
        "from tasks.task import Problem, Task\n"
        f"def f(s): return Task([], [], [Problem('1+1', '2', extra={extra})], verifier=lambda *_: True)"
    )
    with pytest.raises(
        SettingError, match=r"own\.py:f: extra of an evaluation problem must hold JSON values, it is \{"
    ):
        named.load_task(Settings(task=f"{path}:f"))


def test_a_verdict_of_a_verifier_has_the_box_or_the_text_as_its_answer():
    task = Task([], [], [], verifier=lambda response, problem: len(response) > 3)
    problem = Problem("q", "")
    assert task.verdict(r"so \boxed{7}", problem) == rewards.Verdict(True, "7", "verifier")
    assert task.verdict("7", problem) == rewards.Verdict(False, "7", "verifier")
