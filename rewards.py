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
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

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


def load_function(setting: str, spec: str) -> Callable:
    """The user's function `spec`, FILE.py:FUNCTION; executes the file. `setting` begins the text of a FunctionError."""
    file, colon, name = spec.rpartition(":")
    if not (file.endswith(".py") and colon and name):
        raise FunctionError(f"{setting}: {spec!r} must be FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise FunctionError(f"{setting}: there is no file {file!r}")
    module = module_from_spec(spec_from_file_location(Path(file).stem, file))
    try:
        module.__spec__.loader.exec_module(module)
    except Exception as error:
        raise FunctionError(f"{setting}: {where_in(error, file)} while loading: {error!r}") from error
    function = getattr(module, name, None)
    if function is None:
        raise FunctionError(f"{setting}: {file} has no function {name!r}")
    if not callable(function):
        raise FunctionError(f"{setting}: {name} in {file} is a {type(function).__name__}, not a function")
    return function


def where_in(error: Exception, file: str) -> str:
    """The last line of the user's `file` in an exception's traceback, as "FILE.py, line N,"; else just "FILE.py"."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno},"
    frames = traceback.extract_tb(error.__traceback__)  # frames hold absolute paths
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(file).resolve()]
    return f"{file}, line {lines[-1]}," if lines else file


def load_reward(spec: str) -> Callable[[str, object], float]:
    """The reward r(response, problem) of FILE.py:FUNCTION, or for "" 1.0 if correct, else 0.0. Raises FunctionError."""
    if not spec:
        return lambda response, p: float(is_correct(response, p.answer, tolerance=p.tolerance, unit=p.unit).correct)
    function = load_function("reward", spec)
    file, _, name = spec.rpartition(":")

    def reward(response: str, problem) -> float:
        try:
            value = function(response, problem)
            is_finite = hasattr(value, "__float__") and math.isfinite(value)
        except Exception as error:
            raise FunctionError(f"reward: {where_in(error, file)} in {name}: {error!r}") from error
        if not is_finite:
            returned = f"it returned {value!r} for {problem.question[:80]!r}"
            raise FunctionError(f"reward: {spec} must return a finite number, {returned}")
        return float(value)

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
