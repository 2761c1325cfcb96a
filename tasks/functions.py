"""The user's own Python: `--task FILE.py:FUNCTION` and `--reward FILE.py:FUNCTION`."""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rewards import built_in_reward
from settings import SettingError
from tasks.task import Problem


@contextmanager
def user_code(setting: str, spec: str) -> Iterator[None]:
    """A block that runs the user's code, whose errors end the program with Python's traceback.

    `infra/run.py:one_line_errors` prints OSError and FloatingPointError in one line. Those of the user become the
    cause of a RuntimeError, so that the traceback with the user's file and line is printed.
    """
    try:
        yield
    except (OSError, FloatingPointError) as error:
        raise RuntimeError(f"{setting}: {spec} raised {type(error).__name__}") from error


def load_function(setting: str, spec: str) -> Callable:
    """The function that `spec` names as FILE.py:FUNCTION. Imports the file, once per process.

    The module has the file's name, so pickle finds it. Its folder is appended to sys.path, so it can import helpers.
    Raises SettingError, which names `setting`, for another form, a missing file or function, and a name that is taken.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name:
        raise SettingError(f"{setting}: {spec!r} must be FILE.py:FUNCTION")
    path = Path(file).resolve()
    if not path.is_file():
        raise SettingError(f"{setting}: there is no file {file!r}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    with user_code(setting, spec):
        module = importlib.import_module(path.stem)
    # The folder is the last in sys.path: a module of the project, of a package or of Python takes precedence.
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != path:
        raise SettingError(f"{setting}: another module is named {path.stem!r}: rename {file}")
    function = getattr(module, name, None)
    if not callable(function):
        raise SettingError(f"{setting}: {file} has no function {name!r}")
    return function


def load_reward(spec: str) -> Callable[[str, Problem], float]:
    """The reward r(response, problem) of the function FILE.py:FUNCTION, or the built-in one if `spec` is empty.

    Its attribute right_from is the function's: the least reward of a right response, None if the function has none.
    Raises SettingError if this is no finite number; so does the reward if the function returns none.
    """
    if not spec:
        return built_in_reward
    function = load_function("reward", spec)
    right_from = getattr(function, "right_from", None)
    if right_from is not None and not is_finite_number(right_from):
        raise SettingError(f"reward: {spec}.right_from must be a finite number, it is {right_from!r:.200}")

    def reward(response: str, problem: Problem) -> float:
        with user_code("reward", spec):
            value = function(response, problem)
        if not is_finite_number(value):
            returned = f"it returned {value!r:.200} for {problem.question[:80]!r}"
            raise SettingError(f"reward: {spec} must return a finite number, {returned}")
        return float(value)

    reward.right_from = right_from
    return reward


def is_finite_number(value: object) -> bool:
    """Whether float(value) is a finite number and `value` is no text; an array of one element counts."""
    if not hasattr(value, "__float__"):  # text: float("3") would accept it
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):
        return False  # a longer array or tensor
