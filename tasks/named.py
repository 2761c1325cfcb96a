"""The tasks that --task and --rl-data name; docs/data.md explains how to add one."""

import json
from importlib import import_module
from types import ModuleType

from infra.files import DataError
from rewards import is_gold
from settings import METHODS, TASKS, SettingError, Settings
from tasks.benchmarks import BENCHMARKS, read_benchmark
from tasks.functions import guarded_verifier, load_function, user_code
from tasks.sources import first_correct, keep_readable, listed, read_demonstrations, read_problems, rows_of
from tasks.task import Demonstration, Problem, Task

MATH_LEVEL3TO5 = "hkust-nlp/SimpleRL-Zoo-Data:simplelr_qwen_level3to5/train.parquet"
DEEPMATH = "zwhe99/DeepMath-103K"
GSM8K = "openai/gsm8k:main:train"


def module_of(task: str) -> ModuleType:
    """tasks/NAME.py of a built-in task; see settings.BuiltinTask for what it has."""
    return import_module(f"tasks.{task}")


def task_of(model: str) -> str:
    """The task that a model is evaluated on by default: the one of a built-in model, else arithmetic."""
    for task, row in TASKS.items():
        if model in row.models:
            return task
    return "arithmetic"


def load_task(s: Settings) -> Task:
    """The task that the settings name; a given `template` replaces its own. Raises DataError or SettingError."""
    if s.rl_data:
        task = from_files(s.rl_data, s.sft_data, s.eval_data, s.eval_problems, bool(s.reward))
    elif s.task in TASKS:
        task = module_of(s.task).task(s.seed, s.eval_problems)
    elif s.task in NAMED:
        task = NAMED[s.task](s)
    else:
        task = from_function(s.task, s)
    task.template = s.template or task.template
    unreadable = [p for p in task.evaluation if not is_gold(p.answer)]
    if unreadable and task.verifier is None:
        task.notes.append(f"evaluation: no answer is right for {len(unreadable)} golds, which the grader cannot read")
    return task


def limr(s: Settings) -> Task:
    """D_RL of the paper's Qwen2.5-3B, 1,389 problems, with DeepMath's demonstrations."""
    notes: list[str] = []
    problems = read_problems("GAIR/LIMR", "rl_data", notes, bool(s.reward))
    task = Task(problems, deepmath(s, notes), [], notes=notes)
    return with_evaluation(task, s.eval_data, s.eval_problems)


def math_level3to5(s: Settings) -> Task:
    """SimpleRL's levels 3 to 5 of MATH, 8,523 problems: our reading of the paper's "MATH hard, 8.5K"."""
    notes: list[str] = []
    problems = [Problem(row["question"], row["gt_answer"], extra=row) for row in rows_of(MATH_LEVEL3TO5, "rl_data")]
    problems = keep_readable(problems, MATH_LEVEL3TO5, "rl_data", notes, bool(s.reward))
    task = Task(problems, deepmath(s, notes), [], notes=notes)
    return with_evaluation(task, s.eval_data, s.eval_problems)


def gsm8k(s: Settings) -> Task:
    """Grade-school word problems with worked solutions; 7,473 for training, 1,319 for evaluation."""
    return from_files(GSM8K, s.sft_data or GSM8K, s.eval_data or "gsm8k", s.eval_problems, bool(s.reward))


def deepmath(s: Settings, notes: list[str]) -> list[Demonstration]:
    """R1's solutions of DeepMath's problems, or those of `sft_data`; the paper's own R1 traces were not published."""
    if s.sft_data:
        return read_demonstrations(s.sft_data, "sft_data", notes, bool(s.reward))
    if not METHODS[s.method].sft:
        return []
    demonstrations = []
    for row in rows_of(DEEPMATH, "sft_data"):
        if 3 <= row["difficulty"] <= 6:
            solutions = [row["r1_solution_1"], row["r1_solution_2"], row["r1_solution_3"]]
            response = first_correct(solutions, row["final_answer"])
            demonstrations.append(Demonstration(row["question"], response, row["final_answer"]))
    return keep_readable(demonstrations, DEEPMATH, "sft_data", notes)


NAMED = {"limr": limr, "math_level3to5": math_level3to5, "gsm8k": gsm8k}  # besides settings.TASKS


def from_files(rl_data: str, sft_data: str, eval_data: str, eval_problems: int, any_gold: bool = False) -> Task:
    """The task of comma lists of sources (see sources.py); `sft_data` and `eval_data` may be empty."""
    notes: list[str] = []
    demonstrations = read_demonstrations(sft_data, "sft_data", notes, any_gold) if sft_data else []
    problems = read_problems(rl_data, "rl_data", notes, any_gold)
    return with_evaluation(Task(problems, demonstrations, [], notes=notes), eval_data, eval_problems)


def with_evaluation(task: Task, eval_data: str, eval_problems: int) -> Task:
    """Gives the task the first `eval_problems` problems of each group in `eval_data` and returns it.

    `eval_data` is a comma list of benchmarks and sources. If it is empty, questions are held out of training.
    """
    if not eval_data:
        hold_out(task, eval_problems)
        return task
    groups: dict[str, list[Problem]] = {}
    for source in listed(eval_data):
        if source in BENCHMARKS:
            problems = read_benchmark(source, "benchmarks", "eval_data")
        else:
            problems = read_problems(source, "eval_data", task.notes)
        for problem in problems:
            groups.setdefault(problem.group, []).append(problem)
    for problems in groups.values():
        task.evaluation += problems[:eval_problems]
        task.kept_apart += [p.question for p in problems[eval_problems:]]
    return task


def hold_out(task: Task, eval_problems: int) -> None:
    """Moves the last `eval_problems` questions to evaluation. Raises DataError if those are half of the questions."""
    problem_of = {p.question: p for p in task.problems}
    if 2 * eval_problems >= len(problem_of):
        too_few = f"holding out eval_problems={eval_problems} of {len(problem_of)} questions keeps too few"
        notes = "".join(f" ({note})" for note in task.notes)
        raise DataError(f"rl_data: {too_few}: lower eval_problems or give eval_data{notes}")
    task.evaluation = list(problem_of.values())[-eval_problems:]
    held_out = {p.question for p in task.evaluation}
    task.problems = [p for p in task.problems if p.question not in held_out]
    task.notes.append(f"no eval_data: the last {eval_problems} questions of rl_data are held out of training")


def from_function(spec: str, s: Settings) -> Task:
    """The task that the user's FILE.py:FUNCTION returns. Raises SettingError if it returns none."""
    if ":" not in spec:
        raise SettingError(f"task: {spec!r} must be one of {', '.join([*TASKS, *NAMED])}, or FILE.py:FUNCTION")
    function = load_function("task", spec)
    with user_code("task", spec):
        task = function(s)
    if not isinstance(task, Task):
        raise SettingError(f"task: {spec} must return a Task, it returned a {type(task).__name__}")
    if task.verifier is not None:
        task.verifier = guarded_verifier(spec, task.verifier)
        for p in task.evaluation:
            check_extra(spec, p)
    return task


def check_extra(spec: str, p: Problem) -> None:
    """Raises SettingError unless a result file can hold what the verifier reads, for --regrade."""
    try:
        is_kept = json.loads(json.dumps(p.extra)) == p.extra  # a tuple would become a list, a number as a key a text
    except TypeError:
        is_kept = False
    if not is_kept:
        text = f"extra of an evaluation problem must hold JSON values, it is {p.extra!r:.200}"
        raise SettingError(f"task: {spec}: {text}: convert it by json.loads(json.dumps(…))")
