r"""Answer extraction and equivalence: untrusted text in, verdict out.

RL pays for whatever this file accepts, so it accepts an answer, not a task: the last complete \boxed{…} must say what
the gold says. Nothing is paid for one of several candidates, for an unfinished box, or when the gold cannot be read.
No string raises, hangs or runs: `notation.py` finds one spelling, `answers.py` the structure, `expression.py` values.

Any form of the same value counts (factored or expanded, fraction or exact decimal: the grader cannot see what was asked
for), except where the form is the answer:
- a plain number must be worked out: 2+2, 3·4, 12÷3, 5!, √16 or x+1=3 restate a task; a fraction, a power or a·10ⁿ may
  stay. Otherwise "Compute \binom{8}{4}" would be answered by copying it;
- a rounded decimal is another number than the fraction it comes from, unless a tolerance is given;
- digits in a base are those digits in that base: 132_5 is neither 132_7 nor 42;
- brackets are part of tuples and intervals: [1,4) is not (1,4), (1,500) is not 1500; the order within them counts;
- two stated units must agree, and 7 % is 7 % or 0.07, while 0.07 and 700 are not 7.
"""

import importlib.util
import math
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grading.answers import MAX_ANSWER, MAX_ITEMS, by_letters, matches, read
from grading.expression import TooComplex, Unreadable
from grading.notation import canonical_unit, normalise

VERSION = "2"  # of the grader; raise it whenever a verdict may change, results name it
MAX_RESPONSE = 50_000  # characters searched for a box, from the end


@dataclass(frozen=True)
class Verdict:
    correct: bool
    extracted: str | None  # what stood in the box
    reason: str  # equal, different, no_answer, unparseable, too_long, too_complex or bad_gold


def is_correct(response: str, answer: str, *, tolerance: float | None = None, unit: str | None = None) -> Verdict:
    """Whether the response's boxed answer equals the gold `answer`. Never raises.

    tolerance: how far a number may be from the gold, relative to it (1e-2 is one percent); by default not at all.
    unit: the gold's unit where the data keep it apart; an answer may leave it out, but not state another.
    """
    gold, _ = read(answer)
    if gold is None:
        return Verdict(False, None, "bad_gold")
    extracted = extract(response)
    if extracted is None:
        return Verdict(False, None, "no_answer")
    value, reason = read(extracted)
    if value is None:
        return Verdict(False, extracted[:MAX_ANSWER], reason)
    try:
        correct = by_letters(extracted, answer)
        if correct is None:
            correct = matches(value, gold, tolerance or 0.0, canonical_unit(normalise(unit or "")))
    except (Unreadable, TooComplex):  # comparing computes too, with ∞ or with huge numbers
        correct = False
    return Verdict(correct, extracted, "equal" if correct else "different")


def is_gold(answer: str) -> bool:
    """A gold answer that can be compared."""
    return read(answer)[0] is not None


def equivalent(a: str, b: str) -> bool:
    """Whether `a` is an answer for the gold `b`, both without a box."""
    return is_correct("\\boxed{" + a + "}", b).correct


def score(verdict: Verdict, response: str = "", *, wrong: float = 0.0, format_weight: float = 0.0) -> float:
    """The reward of a verdict: 1 or `wrong` (0 or −1, eq. (2) and section 4.1 of the paper print one each).

    With a format weight w < 1/2 it is (1−w) of that and w for a response that is well formed: a box outside of at most
    one, closed, thought. A right answer always earns more than a wrong one. Raises ValueError for other weights.
    """
    if not 0 <= format_weight < 0.5:
        raise ValueError(f"format_weight={format_weight} must be at least 0 and below 0.5")
    reward = 1.0 if verdict.correct else float(wrong)
    opened, closed = response.count("<think>"), response.count("</think>")
    formed = verdict.extracted is not None and closed <= 1 and opened <= closed
    return (1 - format_weight) * reward + format_weight * formed if format_weight else reward


class RewardError(ValueError):
    """A reward function of the user's that cannot be used; the message names it and says why."""


def load_reward(spec: str) -> Callable[[str, object], float]:
    """The reward as a function of (response, problem): the built-in grader, or `spec`'s FILE.py:FUNCTION.

    Loading runs the file: it is the user's own code, named on the command line. Raises RewardError when it cannot be
    loaded, and so does every call whose result is not a finite number.
    """
    if not spec:
        return lambda response, problem: score(
            is_correct(response, problem.answer, tolerance=problem.tolerance, unit=problem.unit)
        )
    file, colon, name = spec.rpartition(":")
    if not (file.endswith(".py") and colon and name):
        raise RewardError(f"reward: {spec!r} must be FILE.py:FUNCTION")
    if not Path(file).is_file():
        raise RewardError(f"reward: there is no file {file!r}")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"reward: {_place(error, file)} while loading: {error!r}") from error
    if not hasattr(module, name):
        raise RewardError(f"reward: {file} has no function {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise RewardError(f"reward: {name} in {file} is a {type(function).__name__}, not a function")

    def reward(response: str, problem) -> float:
        try:
            value = function(response, problem)
        except Exception as error:
            raise RewardError(f"reward: {_place(error, file)} in {name}: {error!r}") from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"reward: {spec} must return a finite number, it returned {value!r} for {problem.question[:80]!r}"
            )
        return number

    return reward


def _place(error: Exception, file: str) -> str:
    """The file and line of the user's code an exception comes from."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno},"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}, line {lines[-1]}," if lines else file


# ---------------------------------------------------------------------------------------------------------------------
# Extraction

_BOX = re.compile(
    r"\\(?:boxed|fbox) *\{|\\(?:boxed|fbox) +(?P<bare>[-+]?[0-9.][^\s{}$\\]*|[A-Za-z](?![A-Za-z]))|\\.|[{}]", re.DOTALL
)
_FIRST_BOX = re.compile(r"\\(?:boxed|fbox)")
_BETWEEN = re.compile(r"(?:[\s$,;.]|\\[,;: ]|\\q?quad|\\\(|\\\)|and|or|\\text *\{ *(?:and|or) *\})*")


def extract(response: str) -> str | None:
    r"""What stands in the last \boxed{…} after the thought, found by counting braces.

    None without a box, and also when the last box is unfinished: an answer cut off is no answer, and falling back to an
    earlier box would pay for hedging. Boxes with nothing but a comma, "and" or "or" between them are one list.

    >>> extract(r"so \boxed{\frac{1}{2}}."), extract(r"\boxed{1}, no: \boxed{2}"), extract(r"\boxed{7} or \boxed{8}")
    ('\\frac{1}{2}', '2', '7 or 8')
    """
    thought, _, text = response.rpartition("</think>")
    text = (text if text.strip() else thought)[-MAX_RESPONSE:]
    open_braces, boxes = [], []  # boxes: (start, start of content, end of content, end)
    first = _FIRST_BOX.search(text)
    for match in _BOX.finditer(text, first.start()) if first else ():
        if match["bare"] is not None:
            boxes.append((match.start(), match.start("bare"), match.end(), match.end()))
        elif match[0][-1] == "{" and match[0] != "\\{":
            open_braces.append((match.start(), match.end(), len(match[0]) > 1))
        elif match[0] == "}" and open_braces:
            start, content, is_box = open_braces.pop()
            if is_box:
                boxes = [b for b in boxes[-MAX_ITEMS:] if b[0] < start]  # what it encloses is part of it
                boxes.append((start, content, match.start(), match.end()))
    unfinished = max((start for start, _, is_box in open_braces if is_box), default=-1)
    boxes = [(text[b[1] : b[2]].strip(), b[0], b[3]) for b in boxes]
    boxes = [b for b in boxes if b[0]]
    if not boxes or unfinished > boxes[-1][1]:
        return None
    glued = [boxes.pop()]
    while boxes and _BETWEEN.fullmatch(text, boxes[-1][2], glued[0][1]):
        glued.insert(0, boxes.pop())
    between = text[glued[0][2] : glued[-1][1]]
    joint = " and " if re.search("and|,", between) and "or" not in between else " or "
    return joint.join(dict.fromkeys(content for content, _, _ in glued))  # an answer said twice is one answer
