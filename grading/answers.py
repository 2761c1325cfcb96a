r"""The structure of an answer (lists, tuples, intervals, equations, units, words) and the comparison of two answers.

answer   = item {("," | ";" | "and" | "or") item}      ± stands for two items
item     = operand {("=" | "<" | "≤" | "∈" | …) operand}   name = value; a condition on a name is an interval
operand  = set {"∪" set} | number {":" number} | matrix | tuple | numeral in a base | expression [unit]
"""

import functools
import itertools
import operator
import re
from dataclasses import dataclass, replace
from fractions import Fraction

from grading import expression
from grading.expression import Scalar, TooComplex, Unreadable, Work, apply, letter, number, parse, proportional, same
from grading.notation import CHANGES, COUNTS, NAMES, POWER, SPELLED, canonical_unit, may_omit, normalise
from grading.readings import readings

MAX_ANSWER = 1_000  # characters; a longer answer is refused, the longest gold of the benchmarks has 210
MAX_UNIT = 200  # characters of a number and its unit
MAX_ITEMS = 40  # of a list, a tuple or a matrix
MAX_NESTING = 30  # brackets within brackets


@dataclass(frozen=True)
class Quantity:
    """A scalar with its unit, "" without one."""

    value: Scalar
    unit: str = ""


@dataclass(frozen=True)
class Collection:
    """kind: "list" (in any order), "sequence", "union", "ratio", "matrix", "row", or the brackets of a tuple."""

    kind: str
    items: tuple
    name: str = ""  # the symbol of the inequality that describes this interval


@dataclass(frozen=True)
class Relation:
    """left = right, left ≠ right, left < right or left ≤ right."""

    sign: str
    left: "Quantity | Collection"
    right: "Quantity | Collection"
    scales: frozenset = frozenset()  # letters by which an equation may be multiplied


Value = Quantity | Collection | Relation | str  # str: compared as text, like words, a time of day, or "132_5" in a base

_MINUS_INFINITY = Quantity(parse("-\\infty"))
_INFINITY = Quantity(parse("\\infty"))
_HUNDREDTH = parse("0.01")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_WORD = rf"(?:\\text *\{{(?:[^{{}}0-9^]|\^ ?-?[0-9])*\}}|(?<![A-Za-z\\])(?:{NAMES}|[a-z]{{4,}}))(?![A-Za-z]){POWER}"
_DEGREE = r"°(?: ?(?:[CF]|\\text *\{[CF]\}))?"
_UNIT = re.compile(rf"(?P<value>.*?[0-9)}}!ia-z]) *(?P<unit>%|{_DEGREE}|\\\$|[€£]|¢|{_WORD}(?: *(?:[*/] *)?{_WORD})*)")
_TEXT = re.compile(r"\\text *\{([^{}]*)\}")
_SQUARED = re.compile(rf"\b({NAMES}) (?:squared|cubed)\b")  # seconds squared
_BRACKET = r"\\begin|\\end|\\[lr]floor|\\[lr]ceil|\\.|[()\[\]{}]"
_NESTING = dict.fromkeys(["(", "[", "{", "\\{", "\\begin", "\\lfloor", "\\lceil"], 1)
_NESTING |= dict.fromkeys([")", "]", "}", "\\}", "\\end", "\\rfloor", "\\rceil"], -1)
_LIST = re.compile(rf"{_BRACKET}|(?P<separator>[,;] *(?:and\b|or\b)?|\b(?:and|or)\b)")
_RELATION = re.compile(rf"{_BRACKET}|(?P<separator>[=<>≤≥≠≈∈])")
_UNION = re.compile(rf"{_BRACKET}|(?P<separator>∪)")
_RATIO = re.compile(rf"{_BRACKET}|(?P<separator>:)")
_TITLE = re.compile(r" *(?:\\text *\{)?[\[|]?([A-Z]{2,}|[A-Za-z ]{4,}|P *\([^()=]*\))[\]|]?\}? *")  # AB = 12, Area = 12
_CAPITALS = re.compile(r" *[\[|]?([A-Z]{2,})[\]|]? *")
_MATRIX_KIND = r"\{ *(?P<kind>[pb]matrix|matrix|array) *\}(?: *\{[lcr| ]*\})?"
_MATRIX = re.compile(rf"(?P<factor>[^&]*?) *\\begin *{_MATRIX_KIND}(?P<body>.*)\\end *\{{ *(?P=kind) *\}}")
_AXIS = re.compile(r"\\hat\{[ijk]\}")
_NUMERAL = re.compile(
    r"\(?(-?(?=[A-F]*[0-9])[0-9A-F]+(?:\.[0-9A-F]+)?)\)? *_ *(?:\{ *\(?([0-9]{1,2}|[a-z]+)\)? *\}|([0-9]{1,2}))"
)
_PUNCTURED = re.compile(r"\(-\\infty ,\\infty *\) *(?:\\setminus|-) *\\\{(.*)\\\}")  # all real numbers but some
_OUTSIDE = re.compile(  # a command outside the grammar, no words and no operator at the end
    r"(?!.*(?:(?<![\\A-Za-z{])[A-Za-z]{4}|[-+*/^_=<>≤≥(,]$))"
    r".*\\(?!(?:begin *\{ *.?(?:matrix|array)|end|[lr]floor|[lr]ceil|"
    r"frac|sqrt|binom|text|pi|infty|arc|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|angle|triangle|ell|hbar|ldots|setminus|d?dot|"
    r"hat|bar|vec|tilde|over|wide|alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|"
    r"upsilon|phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega))[A-Za-z]{2}"
)
_WORDS = re.compile(r"(?=.*(?:[A-Za-z]{2}|[AaPp]\.[Mm]))[A-Za-z0-9][A-Za-z0-9 ,.'’:;()/%&+!?\"-]*")


def _split(text: str, pattern: re.Pattern) -> tuple[list[str], list[str]]:
    """(parts, separators) outside all brackets. Raises Unreadable when brackets do not balance."""
    parts = []
    separators = []
    depth = 0
    start = 0
    for match in pattern.finditer(text):
        if match["separator"] is None:
            depth += _NESTING.get(match[0], 0)
            if depth > MAX_NESTING:
                raise TooComplex("too deeply nested")
        elif depth == 0:
            parts.append(text[start : match.start()])
            separators.append(match["separator"].strip(",; ") or ",")
            start = match.end()
    if depth:
        raise Unreadable("unbalanced")
    if len(parts) > MAX_ITEMS:
        raise Unreadable("a long list")
    return [*parts, text[start:]], separators


def _closes_at_end(text: str) -> bool:
    """Whether the last character closes the first bracket: true for (1,2), false for (1)+(2)."""
    depth = 0
    for match in re.finditer(_BRACKET, text):
        depth += _NESTING.get(match[0], 0)
        if depth == 0:
            return match.end() == len(text)
    return False


def _list(text: str) -> Value:
    parts, separators = _split(text, _LIST)
    items = []
    for part in parts:
        if ("±" in part or "∓" in part) and "\\{" not in part:
            items.append(_item(part.replace("±", "+").replace("∓", "-")))
            items.append(_item(part.replace("±", "-").replace("∓", "+")))
        else:
            items.append(_item(part))
    if "…" in items:
        if len(items) < 3:
            raise Unreadable("a number that goes on")
        return Collection("sequence", tuple(items))
    if len(items) == 1:
        return items[0]
    if set(separators) == {"or"}:
        if all(isinstance(item, Collection) and item.name for item in items):  # x < 2 or x > 3
            return _union(items)
        if all(matches(item, items[0]) and matches(items[0], item) for item in items):  # 3/5 or 0.6
            return items[0]
    return Collection("list", _flat(items, "list"))


def _flat(items: list, kind: str) -> tuple:
    """The items, with those of a collection of that kind instead of the collection."""
    flat = []
    for item in items:
        if isinstance(item, Collection) and item.kind == kind:
            flat += item.items
        else:
            flat.append(item)
    return tuple(flat)


def _union(sets: list) -> Collection:
    if not all(isinstance(s, Collection) and (len(s.kind) == 2 or s.kind in ("list", "union")) for s in sets):
        raise Unreadable("a union of other things than sets")
    return Collection("union", _flat(sets, "union"))


def _item(text: str) -> Value:
    """An operand, or a chain of relations between operands."""
    parts, signs = _split(text, _RELATION)
    if signs and signs[0] in "=≈" and not parts[0].strip():  # "= 5"
        parts = parts[1:]
        signs = signs[1:]
    if not signs:
        return _operand(parts[0])
    sides = []
    for part in parts:
        title = _CAPITALS.fullmatch(part) if sides else _TITLE.fullmatch(part)
        sides.append(Quantity(letter(title[1].strip())) if title else _operand(part))
    if signs == ["∈"] and _name(sides[0]) and isinstance(sides[1], Collection):
        return sides[1]
    return _equation(sides, signs) if set(signs) <= {"=", "≈"} else _inequality(sides, signs)


def _name(side: Value) -> str:
    """The name of a symbol, of f(x), of a tuple or of a ratio of symbols, else "". An answer may omit it before "="."""
    if isinstance(side, Collection):
        return ":".join(map(_name, side.items)) if side.kind in ("()", "ratio") and all(map(_name, side.items)) else ""
    return side.value.name if isinstance(side, Quantity) else ""


def _equation(sides: list, signs: list[str]) -> Value:
    """Returns name = value, the value of a chain like 10/4 = 5/2, or an equation between expressions."""
    # A solved equation is not multiplied; any other one by a letter that is no function with derivatives.
    symbols = set() if _name(sides[0]) else expression.WORK.get().letters
    scales = frozenset(s for s in symbols if re.match("[A-SU-Wa-dghklm]", s) and not {s + "'", s + "''"} & symbols)
    if len(sides) == 2 and _name(sides[1]) and not _name(sides[0]):
        sides = sides[::-1]
    name = None
    if _name(sides[0]):
        name = sides[0]
        if len(sides) == 2:
            return Relation("=", name, sides[1], scales)
        sides = sides[1:]
        signs = signs[1:]
    if not all(isinstance(side, Quantity) for side in sides):
        raise Unreadable("a chain of other things than numbers")
    if len(sides) == 2 and not name and not (sides[0].value.constant and sides[1].value.constant):
        return Relation("=", *sides, scales)
    for (a, b), sign in zip(itertools.pairwise(sides), signs, strict=True):
        if not matches(b, a, 1e-2 if sign == "≈" else 0.0):
            raise Unreadable("the links of the chain disagree")
    value = sides[signs.index("≈")] if "≈" in signs else sides[-1]
    return Relation("=", name, value, scales) if name else value


def _inequality(sides: list, signs: list[str]) -> Value:
    """Returns the interval or union that a condition on one name describes, else a Relation."""
    if not all(isinstance(side, Quantity) for side in sides):
        raise Unreadable("an inequality of other things than numbers")
    if signs[0] in ">≥":  # reversed, so that it reads < or ≤
        sides = sides[::-1]
        signs = [{">": "<", "≥": "≤"}.get(sign, "?") for sign in signs[::-1]]
    names = [_name(side) for side in sides]
    constant = [side.value.constant for side in sides]
    # The brackets at the ends of the interval.
    lower = {"<": "(", "≤": "["}
    upper = {"<": ")", "≤": "]"}
    if len(signs) == 2 and set(signs) <= {"<", "≤"}:
        if names[1]:  # 2 < x ≤ 5
            return Collection(lower[signs[0]] + upper[signs[1]], (sides[0], sides[2]), names[1])
        if not constant[1]:  # 2 < |z| ≤ 5
            return Collection("list", tuple(map(Relation, signs, sides, sides[1:])))
    if len(signs) > 1 or signs[0] not in "<≤≠":
        raise Unreadable("relations that do not chain")
    left, right = sides
    sign = signs[0]
    if sign == "≠" and names[0] and constant[1]:
        below = Collection("()", (_MINUS_INFINITY, right))
        above = Collection("()", (right, _INFINITY))
        return Collection("union", (below, above), names[0])
    if sign != "≠" and names[0] and constant[1]:
        return Collection("(" + upper[sign], (_MINUS_INFINITY, right), names[0])
    if sign != "≠" and names[1] and constant[0]:
        return Collection(lower[sign] + ")", (left, _INFINITY), names[1])
    return Relation(sign, left, right)


def _operand(text: str) -> Value:
    """A union, ratio, matrix, tuple, set, numeral or quantity."""
    text = text.strip()
    if text.startswith("{") and _closes_at_end(text):
        return _list(text[1:-1])
    if re.fullmatch("[0-9]{1,2}:[0-5][0-9]", text):  # a time of day
        return text
    if text == "\\ldots":
        return "…"
    if match := _PUNCTURED.fullmatch(text):
        points = _operand(rf"\{{{match[1]}\}}").items
        if not all(isinstance(p, Quantity) and p.value.constant for p in points):
            raise Unreadable("a set of other things than numbers")
        ends = [_MINUS_INFINITY, *sorted(points, key=lambda p: p.value.points[0].real), _INFINITY]
        return Collection("union", tuple(Collection("()", pair) for pair in itertools.pairwise(ends)))
    parts, separators = _split(text, _UNION)
    if separators:
        return _union([_operand(part) for part in parts])
    parts, separators = _split(text, _RATIO)
    if separators:
        terms = tuple(_operand(part) for part in parts)
        if not all(isinstance(term, Quantity) and not term.unit for term in terms):
            raise Unreadable("a ratio of other things than numbers")
        return Collection("ratio", terms)
    if _AXIS.search(text):
        return _vector(text)
    if match := _MATRIX.fullmatch(text):
        return _matrix(**match.groupdict())
    if text.startswith("\\{") and text.endswith("\\}"):
        inner = text[2:-2].strip()
        return Collection("list", _flat([_list(inner)], "list") if inner else ())
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        parts, separators = _split(text[1:-1], _LIST) if _closes_at_end(text) else ([], [])
        if set(separators) == {","}:
            return Collection(text[0] + text[-1], tuple(_item(part) for part in parts))
        if len(parts) == 1 and ("\\begin" in parts[0] or _split(parts[0], _RELATION)[1]):
            return _item(parts[0])
    if match := _NUMERAL.fullmatch(text):
        digits = match[1]
        base = match[2] or match[3]
        if base in SPELLED:
            base = str(SPELLED.index(base))
        largest = max(int(d, 16) for d in digits if d.isalnum())
        if not base.isdigit() or not max(1, largest) < int(base) <= 16:
            raise Unreadable("digits that the base does not have")
        return f"{digits}_{base}"
    return _quantity(text)


def _matrix(factor: str, kind: str, body: str) -> Collection:
    rows = [[_operand(cell) for cell in row.split("&")] for row in body.split("\\\\") if row.strip()]
    if sum(map(len, rows)) > MAX_ITEMS:
        raise TooComplex("a large matrix")
    if factor:
        if not all(isinstance(cell, Quantity) for row in rows for cell in row):
            raise Unreadable("a matrix of other things than numbers")
        scalar = parse("-1" if factor == "-" else factor)
        rows = [[Quantity(apply(operator.mul, scalar, cell.value)) for cell in row] for row in rows]
    return Collection("matrix", tuple(Collection("row", tuple(row)) for row in rows))


def _vector(text: str) -> Collection | Quantity:
    r"""The tuple of a sum of unit vectors: (1,0,-2) of \hat{i} - 2\hat{k}."""
    if not same(parse(_AXIS.sub("{0}", text)), number(0)):
        return _quantity(text)
    items = []
    for axis in "ijk" if "\\hat{k}" in text else "ij":
        value = parse(_AXIS.sub("{0}", text.replace(f"\\hat{{{axis}}}", "{1}")))
        items.append(Quantity(replace(value, flags=value.flags - expression.UNEVALUATED)))
    return Collection("()", tuple(items))


def _quantity(text: str) -> Quantity:
    r"""A scalar with its unit: 5.4 \text{ cents}, \$18.90, 62.5%, 36°, 3 \text{ million dollars}."""
    if _plain(text) in SPELLED:
        return Quantity(number(SPELLED.index(_plain(text))))
    unit = ""
    scale = None
    if match := re.fullmatch(r"(-?) *(\\\$|[€£]) *(.+)", text):
        text = match[1] + match[3]
        unit = canonical_unit(match[2])
    match = _UNIT.fullmatch(text) if len(text) <= MAX_UNIT else None
    if match and not (match["unit"][0] == "°" and re.search("sin|cos|tan|cot|sec|csc", text)):
        words = re.sub(r"\\text|[{}]", " ", match["unit"]).split()
        scale = _SCALES.get(words[0].lower()) if words else None
        unit_words = " ".join(words[1:] if scale else words)
        stated = canonical_unit(unit_words)
        uncounted = stated.startswith("?") and not COUNTS.search(unit_words)
        if uncounted or CHANGES.search(_SQUARED.sub(r"\1", f"{unit} {unit_words}".lower())):
            raise Unreadable(f"words after a number: {unit_words}")
        text = match["value"]
        unit = unit or stated
    value = parse(text)
    if scale and value.exact is not None:
        value = number(value.exact * scale)
    return Quantity(value, unit)


def _plain(text: str) -> str:
    r"""A normalised answer in words, case-folded, without \text and article; "" for any other answer."""
    text = re.sub(" +", " ", _TEXT.sub(r" \1 ", text)).strip(" .,;:\"'{}")
    return re.sub("^(?:an?|the) ", "", text.casefold()) if _WORDS.fullmatch(text) else ""


def read(text: str) -> tuple[Value | None, str]:
    """(value, "") of an answer, or (None, reason): "unparseable", "too_long" or "too_complex". Never raises.

    A whole text outside the grammar is a value, equal to the same text only. Its reason is "unparseable".
    """
    if len(text) > MAX_ANSWER:
        return None, "too_long"
    try:
        return _read(normalise(text), (), expression.BUDGET)[:2]
    except RecursionError:  # hundreds of brackets, or a deep stack of the caller
        return None, "too_complex"


@functools.lru_cache(maxsize=4096)
def _read(text: str, steps: tuple[int, ...], limit: int) -> tuple[Value | None, str, int]:
    """`read` for a normalised text, within `limit` units of work, and the units used. For `steps` see `Work`."""
    value = None
    reason = ""
    with Work(limit, steps) as work:
        try:
            value = _list(text)
        except Unreadable:
            value = _plain(text) or None
            reason = "" if value else "unparseable"
            if not value and _OUTSIDE.match(text) and _closes_at_end("(" + text + ")"):
                value = text.replace(" ", "")
        except TooComplex:
            reason = "too_complex"
    return value, reason, limit - work.left


@functools.lru_cache(maxsize=4096)  # samples of a group often agree
def compare(answer: str, gold: str, tolerance: float = 0.0, unit: str = "") -> tuple[bool, str]:
    """(correct, reason) for the text of an answer and of a gold, both without a box. Never raises.

    tolerance: how far a number may be from the gold, relative to the gold. unit: the gold's unit, if the gold lacks it.
    reason: equal, different, bad_gold (the gold is not readable), or the reason why `read` refuses the answer.
    """
    gold_value, _ = read(gold)
    if gold_value is None:
        return False, "bad_gold"
    reason = read(answer)[1]
    if reason.startswith("too_"):
        return False, reason
    try:
        answer = normalise(answer)
        gold = normalise(gold)
        unit = canonical_unit(normalise(unit)) if unit else ""
        with Work(2 * expression.BUDGET) as budget:  # for all readings and comparisons of this answer
            correct = answer == gold or _compare_letters(answer, gold)
            if correct is None:
                texts = itertools.chain([answer], readings(answer, gold, _is_definite(gold_value)))
                correct = any(_earns(text, gold, tolerance, unit, budget) for text in texts)
    except (Unreadable, TooComplex, RecursionError):  # the comparison computes too, with ∞ or with huge numbers
        correct = False
    return correct, "equal" if correct else reason or "different"


def _earns(answer: str, gold: str, tolerance: float, unit: str, budget: Work) -> bool:
    """Whether an answer as it stands equals a gold. Functions with ⌊ ⌋ or ⌈ ⌉ are compared at more integers, too."""
    stepped = [()]
    if all("\\lfloor" in text or "\\lceil" in text for text in (answer, gold)):
        stepped.append(_more_integers(answer + " " + gold))
    for steps in stepped:
        values = []
        for text in (answer, gold):
            value, _, used = _read(text, steps, min(budget.left, expression.BUDGET))
            budget.spend(used)
            values.append(value)
        if None in values or not matches(*values, tolerance, unit):
            return False
    return True


def _more_integers(text: str) -> tuple[int, ...]:
    """3 to 49, and integers near the largest numbers of a text and near their differences: a step may lie there."""
    numbers = sorted({int(n) for n in re.findall("[0-9]{1,6}", text)}, reverse=True)[:6]
    near = set()
    for m, n in itertools.product(numbers, [0, *numbers]):
        distance = abs(m - n)
        near |= {distance - 1, distance, distance + 1}
    nearest = sorted(n for n in near if n > 2)[:40]
    return tuple(sorted({*range(3, 50), *nearest}))


def _is_definite(gold: Value) -> bool:
    """Whether a condition or another name would change a gold: a number, an interval or an inequality."""
    if isinstance(gold, Collection):
        return gold.kind != "list" or all(map(_is_definite, gold.items))
    if isinstance(gold, Relation):
        return gold.sign != "=" or _is_definite(gold.right)
    return isinstance(gold, str) or gold.value.constant


def equivalent(answer: str, gold: str) -> bool:
    """Whether an answer equals a gold, both without a box. Never raises."""
    return compare(answer, gold)[0]


def _compare_letters(answer: str, gold: str) -> bool | None:
    """The verdict if the gold is a choice like (C) or both are single words and no products; None otherwise."""
    answer = _TEXT.sub(r"\1", normalise(answer)).strip("{} ")
    gold = _TEXT.sub(r"\1", normalise(gold)).strip("{} ")
    if re.fullmatch(r"\(?[A-J]\)?", gold):
        option = r"(?!.*\b(?:[A-J]|or|and|but|not)\b)(?:[A-Za-z0-9$.]|-[0-9]|\\[a-z])[^,;&=+]*"  # (C), or (C) Plane
        choice = re.fullmatch(rf"\(?([A-J])(?:[).:]*|[).:]+ +{option})", answer)
        return bool(choice) and choice[1] == gold.strip("()")
    if re.search(r"[\\0-9]", gold):
        return None
    answer = _plain(answer)
    gold = _plain(gold)
    words = answer.isalpha() and gold.isalpha() and not re.fullmatch("[a-df-hj-np-tvx-z]{2,3}", gold)
    return answer == gold if words else None


def matches(answer: Value, gold: Value, tolerance: float = 0.0, unit: str = "") -> bool:
    """Whether two values are equal as answers; see `compare`. Raises Unreadable or TooComplex."""
    if isinstance(gold, Quantity):
        answer = _unwrapped(answer)  # {5} for 5
    if isinstance(answer, Quantity):
        gold = _unwrapped(gold)
    if isinstance(answer, Relation) and answer.sign == "=" and _name(answer.left) and not isinstance(gold, Relation):
        left = answer.left.items if isinstance(answer.left, Collection) else ()
        right = answer.right.items if isinstance(answer.right, Collection) else ()
        if left and len(left) == len(right) and isinstance(gold, Collection) and gold.kind == "list":  # (a,b) = (1,2)
            named = tuple(Relation("=", name, value) for name, value in zip(left, right, strict=True))
            return matches(Collection("list", named), gold, tolerance, unit)
        return may_omit(_name(answer.left)) and matches(answer.right, gold, tolerance, unit)  # x = 5 for 5
    if isinstance(gold, Relation):
        return _matches_relation(answer, gold, tolerance, unit)
    if isinstance(answer, Quantity) and isinstance(gold, Quantity):
        return _matches_quantity(answer, gold, tolerance, unit)
    if isinstance(answer, Collection) and isinstance(gold, Collection):
        return _matches_collection(answer, gold, tolerance, unit)
    if isinstance(answer, Quantity) and isinstance(gold, str) and answer.value.exact is not None:
        digits, _, base = gold.partition("_")  # an answer may omit the base
        decimal = base.isdigit() and re.fullmatch("[0-9.]+", digits) and not answer.value.flags
        return bool(decimal) and answer.value.exact == Fraction(digits)
    return answer == gold


def _unwrapped(value: Value) -> Value:
    """The item of a list of one, else the value."""
    single = isinstance(value, Collection) and value.kind == "list" and len(value.items) == 1
    return value.items[0] if single else value


def _matches_collection(answer: Collection, gold: Collection, tolerance: float, unit: str) -> bool:
    same_name = not answer.name or not gold.name or answer.name == gold.name
    if gold.kind == "list" and answer.kind in ("()", "[]") and len(answer.items) == len(gold.items):
        return _matches_in_order(answer, gold, tolerance, unit)
    if answer.kind != gold.kind or len(answer.items) != len(gold.items) or not same_name:
        return False
    pairs = list(zip(answer.items, gold.items, strict=True))
    if gold.kind == "ratio":  # 3:4 = 6:8, because 3·8 = 6·4; the zeros must agree too
        a, g = pairs[0]
        zero = number(0)
        product = functools.partial(apply, operator.mul)
        crossed = all(same(product(p.value, g.value), product(q.value, a.value)) for p, q in pairs)
        zeros = all(same(p.value, zero) == same(q.value, zero) for p, q in pairs)
        return zeros and crossed and all(_worked_out(p.value, q.value) for p, q in pairs)
    named = _item_names(answer)
    gold_named = _item_names(gold)
    if named and not any(isinstance(item, Relation) for item in gold.items) and named != sorted(named):
        return False  # y = 1, x = 2 for 1, 2
    unnamed = gold_named and not any(isinstance(item, Relation) for item in answer.items)
    if gold.kind not in ("list", "union") or unnamed or (named and not gold_named):  # 9, 4 for AB = 9, CD = 4
        return all(matches(p, q, tolerance, unit) for p, q in pairs)
    unmatched = list(answer.items)
    for item in gold.items:
        index = next((i for i, p in enumerate(unmatched) if matches(p, item, tolerance, unit)), None)
        if index is None:
            return False
        unmatched.pop(index)
    return True


def _item_names(collection: Collection) -> list[str]:
    """The names of items x = 1, y = 2; [] if they are not distinct."""
    names = [_name(item.left).strip("\\") for item in collection.items if isinstance(item, Relation)]
    return names if len(set(names) - {""}) == len(collection.items) > 1 else []


def _matches_in_order(answer: Collection, gold: Collection, tolerance: float, unit: str) -> bool:
    """Whether the tuple (1,2,3) equals the list 1, 2, 3. A pair in ascending order may be an interval."""
    if len(gold.items) == 2 and not _item_names(gold):
        ends = [i.value.points[0].real for i in answer.items if isinstance(i, Quantity) and i.value.constant]
        if len(ends) < 2 or ends[0] < ends[1]:
            return False
    return all(matches(p, q, tolerance, unit) for p, q in zip(answer.items, gold.items, strict=True))


def _worked_out(answer: Scalar, gold: Scalar) -> bool:
    """Whether an answer has no sine, logarithm or the like, unless the gold has one."""
    return "function" not in answer.flags or bool(gold.flags & {"function", "exponential"})


def _matches_quantity(answer: Quantity, gold: Quantity, tolerance: float, unit: str) -> bool:
    gold_unit = gold.unit or unit
    expression.WORK.get().spend(1)
    special, general = sorted((answer.unit, gold_unit), key=lambda u: u.startswith("unit"))  # cm^2, unit^2
    stands_for = "*" not in special and general == "unit" + "".join(special.partition("^")[1:])
    if special and general and special != general and not stands_for:
        return False
    ambiguous = answer.unit in {*"KMBT"} and not gold_unit  # 5 kelvin or 5 thousand
    if ambiguous and answer.value.exact and 1 <= abs(answer.value.exact) < 1000:
        return False
    if not _worked_out(answer.value, gold.value):
        return False
    exact = gold.value.exact is not None and (answer.value.exact is not None or not tolerance)
    if exact and "unevaluated" in answer.value.flags - gold.value.flags:
        return False
    answer_value = apply(operator.mul, answer.value, _HUNDREDTH) if answer.unit == "%" else answer.value
    gold_value = apply(operator.mul, gold.value, _HUNDREDTH) if gold_unit == "%" else gold.value
    if same(answer.value, gold.value, tolerance):  # 62.5 for 62.5%, but not 0.5% for 0.5
        first = gold.value.points[0]
        if answer.unit != "%" or gold.unit or first is None or abs(first) >= 1:
            return True
    return same(answer_value, gold_value, tolerance)


def _matches_relation(answer: Value, gold: Relation, tolerance: float, unit: str) -> bool:
    name = _name(gold.left) if gold.sign == "=" else ""
    if not isinstance(answer, Relation):  # 5 for x = 5, but not MC for MR = MC
        is_value = bool(name) and not _CAPITALS.fullmatch(_name(gold.right))
        return is_value and matches(answer, gold.right, tolerance, unit)
    if answer.sign != gold.sign:
        return False
    if name and _name(answer.left) == name and matches(answer.right, gold.right, tolerance, unit):
        return True
    sides = (answer.left, answer.right, gold.left, gold.right)
    if not all(isinstance(side, Quantity) for side in sides) or (name and gold.right.value.constant):
        return False  # x + 1 = 3 is not solved for x
    a = apply(operator.sub, answer.right.value, answer.left.value)
    b = apply(operator.sub, gold.right.value, gold.left.value)
    scales = tuple(letter(name) for name in sorted(gold.scales))
    return _worked_out(a, b) and proportional(a, b, gold.sign in "<≤", scales)
