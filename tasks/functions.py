"""The user's own Python: `--task FILE.py:FUNCTION` and `--reward FILE.py:FUNCTION`.

While it runs, an import means what it means in a script: a module beside the file, or else an installed one. The
project's `rewards`, `settings` and `tasks` can be imported as well, where no module beside the file has their name.
"""

import ast
import hashlib
import importlib
import math
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from settings import SettingError
from tasks.task import Problem

ROOT = Path(__file__).resolve().parents[1]
FOR_USERS = {"rewards", "settings", "tasks"}  # the project's modules that users' files import: see docs/data.md


@contextmanager
def user_code(setting: str, spec: str) -> Iterator[None]:
    """A block that runs the user's code with its own modules. Its errors end the program with Python's traceback.

    `infra/run.py:one_line_errors` prints OSError and FloatingPointError in one line. Those of the user become the
    cause of a RuntimeError, so that the traceback with the user's file and line is printed.
    """
    folder = Path(spec.rpartition(":")[0]).resolve().parent
    path = [*sys.path]
    sys.path[:] = [str(folder), *(entry for entry in path if os.path.abspath(entry) != str(ROOT))]
    names, taken, modules = modules_beside(folder)
    sys.path.append(str(ROOT))
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    except (OSError, FloatingPointError) as error:
        raise RuntimeError(f"{setting}: {spec} raised {type(error).__name__}") from error
    finally:
        modules.update({name: sys.modules[name] for name in names if name in sys.modules})
        for name in taken:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
        # Pickle, also in another process, finds modules of the user's whose name is free.
        sys.path[:] = dict.fromkeys([*path, *sys.path])


@lru_cache
def modules_beside(folder: Path) -> tuple[set[str], set[str], dict[str, ModuleType]]:
    """Names that mean modules of a folder of the user's, those of them that are taken, and the modules once imported.

    A name is taken if an installed module has it, too.
    """
    if folder == ROOT:
        return set(), set(), {}
    # The project's name of an installed package, such as evaluate of PyPI, means the package.
    names = {module.name for module in pkgutil.iter_modules([str(ROOT)]) if PathFinder.find_spec(module.name)}
    names -= FOR_USERS
    # Three levels of packages, with or without __init__.py: the folder may be a home
    for pattern in ("*.py", "*/*.py", "*/*/*.py", "*/*/*/*.py"):
        for source in folder.glob(pattern):
            parts = source.relative_to(folder).with_suffix("").parts
            names.update(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    elsewhere = [entry for entry in sys.path if entry != str(folder)]
    taken = {name for name in names if PathFinder.find_spec(name.partition(".")[0], elsewhere)}
    return names, taken, {}


def load_function(setting: str, spec: str) -> Callable:
    """The function that `spec` names as FILE.py:FUNCTION. Imports the file, once per process.

    Raises SettingError, which names `setting`, for another form and a missing file or function.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name:
        raise SettingError(f"{setting}: {spec!r} must be FILE.py:FUNCTION")
    path = Path(file).resolve()
    if not path.is_file():
        raise SettingError(f"{setting}: there is no file {file!r}")
    with user_code(setting, spec):
        module = importlib.import_module(path.stem)
    function = getattr(module, name, None)
    if not callable(function):
        raise SettingError(f"{setting}: {file} has no function {name!r}")
    return function


def code_fingerprint(spec: str) -> str:
    """A hash of FUNCTION, of the text of FILE.py, and of what it imports from beside it. Empty for no FILE.py."""
    file, _, function = spec.rpartition(":")
    if not file:
        return ""
    path = Path(file).resolve()
    texts: dict[Path, str] = {}
    waiting = [path]
    while waiting:
        source = waiting.pop()
        if source in texts or not source.is_file():
            continue
        texts[source] = source.read_text(errors="replace")
        for node in ast.walk(ast.parse(texts[source])):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name in re.findall(r"\w+", ast.unparse(node)):
                    waiting += [path.with_name(f"{name}.py"), *path.parent.glob(f"{name}/**/*.py")]
    own = texts.pop(path)  # without its name: the file may have moved
    helpers = sorted((str(source.relative_to(path.parent)), text) for source, text in texts.items())
    return hashlib.sha256(repr((function, own, helpers)).encode()).hexdigest()


def load_reward(spec: str) -> Callable[[str, Problem], float] | None:
    """The reward r(response, problem) of the function FILE.py:FUNCTION; None if `spec` is empty.

    Its attribute right_from is the function's: the least reward of a right response, None if the function has none.
    Raises SettingError if this is no finite number; so does the reward if the function returns none.
    """
    if not spec:
        return None
    function = load_function("reward", spec)
    right_from = getattr(function, "right_from", None)
    if right_from is not None and not is_finite_number(right_from):
        raise SettingError(f"reward: {spec}.right_from must be a finite number, it is {right_from!r:.200}")

    def reward(response: str, problem: Problem) -> float:
        return returned_number("reward", spec, function, response, problem)

    reward.right_from = None if right_from is None else float(right_from)
    return reward


def guarded_verifier(spec: str, verifier: Callable[[str, Problem], bool]) -> Callable[[str, Problem], bool]:
    """The verifier of a user's task, which imports its own modules and raises SettingError for a partial score."""

    def verify(response: str, problem: Problem) -> bool:
        value = returned_number("verifier", spec, verifier, response, problem)
        if value not in (0.0, 1.0):
            text = f"must return True or False, it returned {value} for {problem.question[:80]!r}"
            raise SettingError(f"verifier: {spec} {text}: compare a score with a threshold")
        return value == 1.0

    return verify


def returned_number(setting: str, spec: str, function: Callable, response: str, problem: Problem) -> float:
    """What the user's reward or verifier returns for a response. Raises SettingError unless it is a finite number."""
    with user_code(setting, spec):
        value = function(response, problem)
    if not is_finite_number(value):
        returned = f"it returned {value!r:.200} for {problem.question[:80]!r}"
        raise SettingError(f"{setting}: {spec} must return a finite number, {returned}")
    return float(value)


def is_finite_number(value: object) -> bool:
    """Whether float(value) is a finite number and `value` is no text; an array of one element counts."""
    if not hasattr(value, "__float__"):  # text: float("3") would accept it
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):
        return False  # a longer array or tensor
