r"""What earns a reward: the answer in the last \boxed{…} of a response, if it equals the gold.

RL reinforces every response that is_correct accepts. It accepts no list of candidates, no unfinished box, and nothing
for a gold that breaks off. A gold outside the grammar, like mn/gcd(m,n), pays its own text. No text raises an error,
runs as code, or takes long. Every form of a value counts: factored or expanded, fraction or exact decimal. The
exceptions are:
- a plain number must be evaluated: 2+2, 5!, √16 and x+1=3 restate the task; a fraction, a power and a·10ⁿ do not;
- a sine, logarithm or the like is evaluated, too, unless the gold has one;
- a rounded decimal differs from its fraction, unless a tolerance is given; 132_5 is neither 132_7 nor 42;
- brackets and order matter in tuples and intervals: [1,4) is not (1,4), and (1,500) is not 1500;
- ζ(3), f(2x), dx and products of vectors are equal to themselves only; a word like "halved" is no unit;
- two stated units must agree; 7 % is 7 % or 0.07, while 0.07 and 700 are not 7.
"""

import re
from dataclasses import dataclass

from grading.answers import MAX_ANSWER, MAX_ITEMS, compare, read

VERSION = "5"  # of the grader, recorded with every result; increase it whenever a verdict may change
MAX_RESPONSE = 50_000  # only this many last characters are searched for a box
_BOX = re.compile(r"(?s)\\(?:boxed|fbox)(?: *\{| +(?P<bare>[-+]?[0-9.][^\s{}$\\]*|[A-Za-z](?![A-Za-z])))|\\[{}\\]|[{}]")
_BETWEEN = re.compile(r"(?:[\s$,;.]|\\[,;: ]|\\q?quad|\\\(|\\\)|and|or|\\text *\{ *(?:and|or) *\})*")


@dataclass(frozen=True)
class Verdict:
    """reason: equal, different, no_answer, unparseable, too_long, too_complex or bad_gold; of a verifier: verifier."""

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
    """Whether the grader can read a gold answer, at least as its own text; if not, every response to it is wrong."""
    return read(answer)[0] is not None


def extract(response: str) -> str | None:
    r"""The content of the last \boxed{…} after the thought; boxes with only a comma, "and" or "or" between form a list.

    None without a box, and if the last box is unfinished: an earlier box would reward hedging.

    >>> extract(r"so \boxed{\frac{1}{2}}."), extract(r"\boxed{1}, no: \boxed{2}"), extract(r"\boxed{7} or \boxed{8}")
    ('\\frac{1}{2}', '2', '7 or 8')
    """
    thought, _, text = response.rpartition("</think>")
    if not text.strip():
        text = thought
    text = text[-MAX_RESPONSE:]
    spans, unfinished = _boxes(text)
    boxes = []  # (start, end, content) of the last boxes that are not empty
    for start, content_start, content_end, end in spans[-MAX_ITEMS - 1 :]:
        content = text[content_start:content_end].strip()
        if content:
            boxes.append((start, end, content))
    if not boxes or unfinished > boxes[-1][0]:
        return None
    # The last box, and the boxes before it that only a separator parts from it.
    first = len(boxes) - 1
    while first > 0 and _BETWEEN.fullmatch(text, boxes[first - 1][1], boxes[first][0]):
        first -= 1
    joined = boxes[first:]
    between = text[joined[0][1] : joined[-1][0]]
    is_list = re.search("and|,", between) and "or" not in between
    contents = dict.fromkeys(content for _, _, content in joined)  # equal contents count once
    return (" and " if is_list else " or ").join(contents)


def _boxes(text: str) -> tuple[list[tuple[int, int, int, int]], int]:
    """(start, start of content, end of content, end) of every box that lies in no other, and where a box is unfinished.

    The second value is the start of the last box without a closing brace, or -1.
    """
    boxes: list[tuple[int, int, int, int]] = []
    open_braces: list[tuple[int, int, bool]] = []  # (start, start of content, whether it begins a box)
    first = re.search(r"\\(?:boxed|fbox)", text)
    if first is None:
        return boxes, -1
    for match in _BOX.finditer(text, first.start()):
        found = match[0]
        if match["bare"] is not None:  # \boxed 5, without braces
            boxes.append((match.start(), match.start("bare"), match.end(), match.end()))
        elif found.endswith("{") and found != "\\{":
            is_box = len(found) > 1
            open_braces.append((match.start(), match.end(), is_box))
        elif found == "}" and open_braces:
            start, content_start, is_box = open_braces.pop()
            if not is_box:
                continue
            while boxes and boxes[-1][0] > start:  # a box inside this one
                boxes.pop()
            boxes.append((start, content_start, match.start(), match.end()))
    unfinished = [start for start, _, is_box in open_braces if is_box]
    return boxes, max(unfinished, default=-1)
