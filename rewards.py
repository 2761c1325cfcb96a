r"""What earns a reward: the answer in the last \boxed{…} of a response, if it equals the gold.

RL reinforces every response that is_correct accepts. It accepts no list of candidates, no unfinished box, and nothing
for a gold that it cannot read. No text raises an error, runs as code, or takes long. Every form of a value counts:
factored or expanded, fraction or exact decimal. The exceptions are:
- a plain number must be evaluated: 2+2, 5!, √16 and x+1=3 restate the task; a fraction, a power and a·10ⁿ do not;
- a sine, logarithm or the like is evaluated, too, unless the gold has one;
- a rounded decimal differs from its fraction, unless a tolerance is given; 132_5 is neither 132_7 nor 42;
- brackets and order matter in tuples and intervals: [1,4) is not (1,4), and (1,500) is not 1500;
- two stated units must agree; 7 % is 7 % or 0.07, while 0.07 and 700 are not 7.
"""

import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from grading.answers import MAX_ANSWER, MAX_ITEMS, compare, read
from settings import SettingError

VERSION = "3"  # of the grader, recorded with every result; increase it whenever a verdict may change
MAX_RESPONSE = 50_000  # only this many last characters are searched for a box
_BOX = re.compile(r"(?s)\\(?:boxed|fbox)(?: *\{| +(?P<bare>[-+]?[0-9.][^\s{}$\\]*|[A-Za-z](?![A-Za-z])))|\\[{}\\]|[{}]")
_BETWEEN = re.compile(r"(?:[\s$,;.]|\\[,;: ]|\\q?quad|\\\(|\\\)|and|or|\\text *\{ *(?:and|or) *\})*")


@dataclass(frozen=True)
class Verdict:
    """reason: equal, different, no_answer, unparseable, too_long, too_complex or bad_gold."""

    correct: bool
    extracted: str | None  # the text in the box
    reason: str


def is_correct(response: str, answer: str, *, tolerance: float | None = None, unit: str | None = None) -> Verdict:
    """Whether the response's boxed answer equals the gold `answer`. Never raises.

    tolerance: allowed distance of a number from the gold, relative to the gold (1e-2 is one percent); None: zero.
    unit: the gold's unit, if the data store it separately; an answer may omit it but not state another.
    """
    if not is_gold(answer):
        return Verdict(False, None, "bad_gold")
    extracted = extract(response)
    if extracted is None:
        return Verdict(False, None, "no_answer")
    correct, reason = compare(extracted, answer, tolerance or 0.0, unit or "")
    return Verdict(correct, extracted[:MAX_ANSWER], reason)


def is_gold(answer: str) -> bool:
    """Whether the grader can read a gold answer; if not, every response to it is wrong."""
    return read(answer)[0] is not None


class FunctionError(SettingError):
    """A user's function FILE.py:FUNCTION cannot be loaded or used. The message names the setting and the file."""


@contextmanager
def user_code(setting: str, file: str, doing: str, *passed: type[Exception]) -> Iterator[None]:
    """A block that runs the user's `file`: its exceptions, exit() included, become FunctionErrors, but for `passed`.

    Restores gradient mode, default dtype and device, threads, working folder, stdout and stderr. Forked children exit.
    """
    import torch  # slow, and needless in a process that only grades

    streams, leave, pid, folder = (sys.stdout, sys.stderr), os._exit, os.getpid(), os.getcwd()
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    closed = lambda: [s and s.closed for s in streams] + [os.path.exists(f"/dev/fd/{n}") for n in (1, 2)]  # noqa: E731
    before = closed()
    os._exit = lambda status: leave(status) if os.getpid() != pid else sys.exit(f"os._exit({status})")
    try:
        with torch.inference_mode(False):  # its end restores the modes of inference and gradients
            yield
        if closed() != before:
            raise OSError("stdout or stderr was closed; the run prints to them")
    except (FunctionError, KeyboardInterrupt, *passed):
        raise
    except BaseException as error:
        if os.getpid() != pid:
            raise
        raise FunctionError(f"{setting}: {where_in(error, file)} {doing}: {_shown(error)}") from error
    finally:
        os._exit, (sys.stdout, sys.stderr) = leave, streams
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        torch.set_num_threads(threads)


def _shown(value: object) -> str:
    """The repr of a value of the user in one line, at most 200 characters; its type if the repr fails."""
    try:
        return " ".join(f"{value!r:.200}".split())
    except (Exception, SystemExit):
        return f"{type(value).__name__}, whose repr fails"


_modules: dict[tuple[Path, bytes], ModuleType] = {}  # of the user, by path and content: each is executed once


def load_function(setting: str, spec: str) -> Callable:
    """The user's function `spec`, FILE.py:FUNCTION; executes the file. `setting` begins the text of a FunctionError."""
    file, colon, name = spec.rpartition(":")
    if not (file.endswith(".py") and colon and name):
        raise FunctionError(f"{setting}: {spec!r} must be FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise FunctionError(f"{setting}: there is no file {file!r}")
    with user_code(setting, file, "while loading"):
        path = Path(file).resolve()
        key = path, path.read_bytes()
        _modules[key] = _modules.get(key) or _execute(path)
        function = getattr(_modules[key], name, None)
    if function is None:
        raise FunctionError(f"{setting}: {file} has no function {name!r}")
    if not callable(function):
        raise FunctionError(f"{setting}: {name} in {file} is a {type(function).__name__}, not a function")
    return function


def _execute(path: Path) -> ModuleType:
    """Executes a file as a module in sys.modules, of its name or, if that is another module's, of its path.

    Its folder ends sys.path: it finds helpers there, and pickle in a spawned process finds the module.
    """
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = re.sub(r"\W|^__main__$", "_", path.stem)
    found = find_spec(name)
    if found and Path(found.origin or "").resolve() != path:
        name = re.sub(r"\W", "_", str(path))
    sys.modules[name] = module = module_from_spec(spec_from_file_location(name, path))
    module.__spec__.loader.exec_module(module)
    return module


def where_in(error: BaseException, file: str) -> str:
    """The last line of the user's `file` in an exception's traceback, as "FILE.py, line N,"; else just "FILE.py"."""
    frames = traceback.extract_tb(error.__traceback__)  # frames hold absolute paths
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(file).resolve()]
    if not lines and isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno},"
    return f"{file}, line {lines[-1]}," if lines else file


def load_reward(spec: str) -> Callable[[str, object], float]:
    """The reward r(response, problem) of FILE.py:FUNCTION, or for "" 1.0 if correct, else 0.0. Raises FunctionError."""
    if not spec:
        return lambda response, p: float(is_correct(response, p.answer, tolerance=p.tolerance, unit=p.unit).correct)
    function = load_function("reward", spec)
    file, _, name = spec.rpartition(":")

    def reward(response: str, problem) -> float:
        with user_code("reward", file, f"in {name}"):
            value = function(response, problem)
            dtype = str(getattr(value, "dtype", "float"))  # of numpy or torch; text and complex numbers are no reward
            is_real = hasattr(value, "__float__") and re.match(r"(torch\.)?(u?int|b?float|bool)", dtype)
            if not is_real or getattr(value, "requires_grad", False) or not math.isfinite(number := float(value)):
                returned = f"it returned {_shown(value)} for {problem.question[:80]!r}"
                raise FunctionError(f"reward: {spec} must return a finite number, {returned}")
        return number

    return reward


def extract(response: str) -> str | None:
    r"""The content of the last \boxed{…} after the thought; boxes with only a comma, "and" or "or" between form a list.

    None without a box, and if the last box is unfinished: an earlier box would reward hedging.

    >>> extract(r"so \boxed{\frac{1}{2}}."), extract(r"\boxed{1}, no: \boxed{2}"), extract(r"\boxed{7} or \boxed{8}")
    ('\\frac{1}{2}', '2', '7 or 8')
    """
    thought, _, text = response.rpartition("</think>")
    text = (text if text.strip() else thought)[-MAX_RESPONSE:]
    open_braces, boxes = [], []  # boxes: (start, start of content, end of content, end)
    first = re.search(r"\\(?:boxed|fbox)", text)
    for match in _BOX.finditer(text, first.start()) if first else ():
        if match["bare"] is not None:
            boxes.append((match.start(), match.start("bare"), match.end(), match.end()))
        elif match[0][-1] == "{" and match[0] != "\\{":
            open_braces.append((match.start(), match.end(), len(match[0]) > 1))
        elif match[0] == "}" and open_braces:
            start, content, is_box = open_braces.pop()
            if is_box:
                while boxes and boxes[-1][0] > start:  # drops the boxes inside this one
                    boxes.pop()
                boxes.append((start, content, match.start(), match.end()))
    unfinished = max((start for start, _, is_box in open_braces if is_box), default=-1)
    boxes = [(text[a:b].strip(), start, end) for start, a, b, end in boxes[-MAX_ITEMS - 1 :] if text[a:b].strip()]
    if not boxes or unfinished > boxes[-1][1]:
        return None
    glued = [boxes.pop()]
    while boxes and _BETWEEN.fullmatch(text, boxes[-1][2], glued[0][1]):
        glued.insert(0, boxes.pop())
    between = text[glued[0][2] : glued[-1][1]]
    joint = " and " if re.search("and|,", between) and "or" not in between else " or "
    return joint.join(dict.fromkeys(content for content, _, _ in glued))  # equal contents count once
