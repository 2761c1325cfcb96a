"""Answer extraction and equivalence: untrusted text in, verdict out.

RL pays for whatever this file accepts, so it accepts little: the last \\boxed{…}, compared as an exact
rational number, or as a plain string. Model text is never evaluated, and no string raises or hangs: every
pattern is anchored and every number bounded.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_RESPONSE = 200_000  # characters searched for a box, from the end
MAX_ANSWER = 200  # characters of an answer that is still compared
BOX = "\\boxed{"

_DECIMAL = r"\d+(?:\.\d+)?|\.\d+"
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_NUMBER = re.compile(rf"([+-]?)({_DECIMAL})(?:/({_DECIMAL}))?")
_FRACTION = re.compile(rf"([+-]?)\\[dt]?frac\{{([+-]?(?:{_DECIMAL}))\}}\{{([+-]?(?:{_DECIMAL}))\}}")


@dataclass(frozen=True)
class Verdict:
    correct: bool
    extracted: str | None  # what stood in the box
    reason: str  # equal, different, no_answer, too_long or bad_gold


def is_correct(response: str, answer: str) -> Verdict:
    """Whether the response's boxed answer equals the gold answer. Never raises."""
    if not is_gold(answer):
        return Verdict(False, None, "bad_gold")
    extracted = extract(response)
    if extracted is None:
        return Verdict(False, None, "no_answer")
    if len(extracted) > MAX_ANSWER:
        return Verdict(False, extracted[:MAX_ANSWER], "too_long")
    correct = equivalent(extracted, answer)
    return Verdict(correct, extracted, "equal" if correct else "different")


def is_gold(answer: str) -> bool:
    """A gold answer that can be compared: something between 1 and MAX_ANSWER characters."""
    return bool(normalise(answer)) and len(answer) <= MAX_ANSWER


def extract(response: str) -> str | None:
    """What stands in the last \\boxed{…}, found by counting braces.

    None without a box, and also when the last box is unfinished: an answer cut off is no answer, and
    falling back to an earlier box would pay for hedging.

    >>> extract(r"so \\boxed{\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    response = response[-MAX_RESPONSE:]
    start = response.rfind(BOX)
    if start < 0:
        return None
    depth = 0
    for i in range(start + len(BOX) - 1, len(response)):
        depth += {"{": 1, "}": -1}.get(response[i], 0)
        if depth == 0:
            return response[start + len(BOX) : i]
    return None


def equivalent(a: str, b: str) -> bool:
    """Equal as exact rational numbers if both are numbers, else equal as normalised, non-empty strings."""
    x, y = to_number(a), to_number(b)
    if x is not None and y is not None:
        return x == y
    return normalise(a) == normalise(b) != ""


def normalise(text: str) -> str:
    """Without dollar signs, TeX spacing, an outer \\text{…}, a final full stop, and blanks except between digits."""
    text = re.sub(r"\\[,;! ]|\\left|\\right|\$", "", text).strip()
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text).rstrip(".")  # "1 1/2" is not 11/2
    if match := re.fullmatch(r"\\text\{([^{}]*)\}", text):
        text = match[1]
    return text


def to_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal, a/b or \\frac{a}{b}; None for anything else.

    >>> to_number("1,234.5"), to_number("-\\\\frac{3}{4}"), to_number("2+2")
    (Fraction(2469, 2), Fraction(-3, 4), None)
    """
    text = normalise(text)
    if len(text) > MAX_ANSWER or not text.isascii():
        return None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    match = _NUMBER.fullmatch(text) or _FRACTION.fullmatch(text)
    if not match:
        return None
    sign, above, below = match.groups()
    divisor = Fraction(below or 1)
    if divisor == 0:
        return None
    return (-1 if sign == "-" else 1) * Fraction(above) / divisor
