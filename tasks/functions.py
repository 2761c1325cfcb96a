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

    The reward raises SettingError if the function returns no finite number.
    """
    if not spec:
        return built_in_reward
    function = load_function("reward", spec)

    def reward(response: str, problem: Problem) -> float:
        with user_code("reward", spec):
            value = function(response, problem)
        try:
            # Text has no __float__; float("3") would accept it.
            number = float(value) if hasattr(value, "__float__") else math.nan
        except (TypeError, ValueError, RuntimeError):
            number = math.nan  # an array, a tensor
        if not math.isfinite(number):
            returned = f"it returned {value!r:.200} for {problem.question[:80]!r}"
            raise SettingError(f"reward: {spec} must return a finite number, {returned}")
        return number

    return reward
