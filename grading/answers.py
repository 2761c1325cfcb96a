r"""What an answer says: lists, tuples, intervals, equations, units and words around expressions; and when two agree.

answer   = item {("," | ";" | "and" | "or") item}      ± stands for two items
item     = operand {("=" | "<" | "≤" | "∈" | …) operand}   name = value; a condition on a name is an interval
operand  = set {"∪" set} | number {":" number} | matrix | tuple | numeral in a base | expression [unit]
"""

import functools
import operator
import re
from dataclasses import dataclass
from fractions import Fraction

from grading.expression import (
    INFINITY,
    MAX_DEPTH,
    Scalar,
    TooComplex,
    Unreadable,
    apply,
    letter,
    number,
    parse,
    proportional,
    same,
)
from grading.notation import UNITS, canonical_unit, normalise

MAX_ANSWER = 1_000  # characters of an answer that is still read; the longest gold of the benchmarks has 210
MAX_ITEMS = 40  # of a list, a tuple or a matrix


@dataclass(frozen=True)
class Quantity:
    """A scalar, and the unit said with it."""

    value: Scalar
    unit: str = ""


@dataclass(frozen=True)
class Group:
    """kind: "list" (the order does not matter), "union", "ratio", "matrix", "row", or the two brackets of a tuple."""

    kind: str
    items: tuple
    name: str = ""  # of what an inequality was about; "or" unites such sets


@dataclass(frozen=True)
class Relation:
    """left = right, left ≠ right, left < right or left ≤ right."""

    sign: str
    left: "Quantity | Group"
    right: "Quantity | Group"


@dataclass(frozen=True)
class Words:
    """What is compared as text: words, a time of day, digits in a base ("132_5")."""

    text: str


_MINUS, _PLUS, _HUNDREDTH = Quantity(parse("-\\infty")), Quantity(INFINITY), number(Fraction(1, 100))
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
SPELLED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_NAMES = "|".join(word for word in UNITS if len(word) > 1)
_WORD = (  # \text{…}, a listed unit, or a longer word, and perhaps a power
    rf"(?:\\text *\{{(?:[^{{}}0-9^]|\^ ?-?[0-9])*\}}|(?<![A-Za-z\\])(?:{_NAMES}|[a-z]{{4,}}))(?![A-Za-z])"
    r"(?: ?\^ ?(?:\{ ?-?[0-9] ?\}|-?[0-9]))?"
)
_UNIT = re.compile(
    r"(?P<value>.*[0-9)}!ia-z]) *"
    rf"(?P<unit>%|°(?: ?(?:[CF]|\\text *\{{[CF]\}}))?|\\\$|[€£]|¢|{_WORD}(?: *(?:[*/] *)?{_WORD})*)"
)
_TRIGONOMETRIC = re.compile("sin|cos|tan|cot|sec|csc")
_CHANGES = re.compile(  # words that make another number, or no number, of the one before them
    rf"\b(?:{'|'.join(SPELLED)}|\w+teen|\w+ty|not|no|or|and|mod|modulo|to|if|when|where|for|with|is|isn|are|but|than|half|"
    r"halves|[ap]\.m|quarters?|\w+ths?|thirds?|squared|cubed|factorial|times|maybe|perhaps|plus|minus|negative|below|above|at|of|"
    r"about|wrong|incorrect|false|except|unless|over|choose|tens|scores?|pairs?|(?:hundred|thousand|million|billion|"
    r"trillion|dozen)s?|lakh|crore|minimum|maximum|more|fewer|less)\b"
)

_DEPTH = re.compile(r"\\begin|\\end|\\[lr]floor|\\[lr]ceil|\\.|[()\[\]{}]")
_OPENS, _CLOSES = (
    ("(", "[", "{", "\\{", "\\begin", "\\lfloor", "\\lceil"),
    (")", "]", "}", "\\}", "\\end", "\\rfloor", "\\rceil"),
)
_LIST, _RELATION, _UNION, _RATIO = (
    re.compile(rf"{_DEPTH.pattern}|(?P<separator>{p})")
    for p in (r"[,;] *(?:and\b|or\b)?|\b(?:and|or)\b", "[=<>≤≥≠≈∈]", "∪", ":")
)
_TITLE = re.compile(r" *(?:\\text *\{)?[\[|]?([A-Z]{2,}|[A-Za-z ]{4,}|P *\([^()=]*\))[\]|]?\}? *")  # AB = 12, Area = 12
_CAPITALS = re.compile(r" *[\[|]?([A-Z]{2,})[\]|]? *")
_MATRIX = re.compile(
    r"(?P<factor>[^&]*?) *\\begin *\{ *(?P<kind>[pb]matrix|matrix|array) *\}(?: *\{[lcr| ]*\})?"
    r"(?P<body>.*)\\end *\{ *(?P=kind) *\}"
)
_NUMERAL = re.compile(r"\(?(-?(?=[A-F]*[0-9])[0-9A-F]+)\)? *_ *(?:\{ *\(?([0-9]{1,2}|[a-z]+)\)? *\}|([0-9]{1,2}))")
_PUNCTURED = re.compile(r"\(-\\infty ,\\infty *\) *\\setminus *\\\{(.*)\\\}")  # all real numbers but one
_WORDS = re.compile(r"(?=.*(?:[A-Za-z]{2}|[AaPp]\.[Mm]))[A-Za-z0-9][A-Za-z0-9 ,.'’:;()/%&+!?\"-]*")


def _split(text: str, pattern: re.Pattern) -> tuple[list[str], list[str]]:
    """(parts, separators) at brace and bracket depth 0. Raises Unreadable when brackets do not balance."""
    parts, separators, depth, start = [], [], 0, 0
    for match in pattern.finditer(text):
        if match["separator"] is None:
            depth += (match[0] in _OPENS) - (match[0] in _CLOSES)
            if depth > MAX_DEPTH:
                raise TooComplex("too deeply nested")
        elif depth == 0:
            parts.append(text[start : match.start()])
            separators.append(match["separator"].strip(",; ") or ",")
            start = match.end()
    if depth or len(parts) > MAX_ITEMS:
        raise Unreadable("unbalanced" if depth else "a long list")
    return [*parts, text[start:]], separators


def _list(text: str):
    parts, separators = _split(text, _LIST)
    items = []
    for part in parts:
        if ("±" in part or "∓" in part) and not part.strip().startswith("\\{"):
            items += [_item(part.replace("±", a).replace("∓", b)) for a, b in ("+-", "-+")]
        else:
            items.append(_item(part))
    if len(items) == 1:
        return items[0]
    if set(separators) == {"or"}:
        if all(isinstance(i, Group) and i.name for i in items):
            return _union(items)
        if all(matches(i, items[0]) and matches(items[0], i) for i in items):  # 3/5 or 0.6
            return items[0]
    return Group(
        "list", tuple(p for i in items for p in (i.items if isinstance(i, Group) and i.kind == "list" else (i,)))
    )


def _union(parts: list) -> Group:
    if not all(isinstance(p, Group) and (len(p.kind) == 2 or p.kind in ("list", "union")) for p in parts):
        raise Unreadable("a union of other things than sets")
    return Group("union", tuple(i for p in parts for i in (p.items if p.kind == "union" else (p,))))


def _item(text: str):
    """An operand, or a chain of relations between operands."""
    parts, signs = _split(text, _RELATION)
    if signs and signs[0] in "=≈" and not parts[0].strip():  # "= 5"
        parts, signs = parts[1:], signs[1:]
    if not signs:
        return _operand(parts[0])
    words = (_TITLE.fullmatch(parts[0]), *(_CAPITALS.fullmatch(p) for p in parts[1:]))
    sides = [Quantity(letter(w[1].strip())) if w else _operand(p) for w, p in zip(words, parts, strict=True)]
    if signs == ["∈"] and _name(sides[0]) and isinstance(sides[1], Group):
        return sides[1]
    return _equation(sides, signs) if set(signs) <= {"=", "≈"} else _inequality(sides, signs)


def _name(side) -> str:
    """What may stand to the left of "=" without being part of the answer: a symbol, f(x), or a tuple of symbols."""
    if isinstance(side, Group):
        return "".join(map(_name, side.items)) if side.kind == "()" and all(map(_name, side.items)) else ""
    return side.value.name if isinstance(side, Quantity) else ""


def _equation(sides: list, signs: list[str]):
    if len(sides) == 2 and _name(sides[1]) and not _name(sides[0]):
        sides = sides[::-1]
    name, links = (sides[:1], sides[1:]) if _name(sides[0]) else ([], sides)
    if not all(isinstance(link, Quantity) for link in links):
        if len(links) > 1 or not name:
            raise Unreadable("a chain of other things than numbers")
        return Relation("=", name[0], links[0])
    signs = signs[len(name) :]
    if len(links) == 2 and not name and not (links[0].value.constant and links[1].value.constant):
        return Relation("=", *links)
    for a, b, sign in zip(links, links[1:], signs, strict=False):
        if not matches(b, a, 1e-2 if sign == "≈" else 0.0):
            raise Unreadable("the links of the chain disagree")
    value = links[signs.index("≈")] if "≈" in signs else links[-1]
    return Relation("=", name[0], value) if name else value


def _inequality(sides: list, signs: list[str]):
    """A condition on one name as the interval or union that it describes, else a Relation."""
    if not all(isinstance(s, Quantity) for s in sides):
        raise Unreadable("an inequality of other things than numbers")
    if signs[0] in ">≥":  # turned round, to read < or ≤
        sides, signs = sides[::-1], [{">": "<", "≥": "≤"}.get(s, "?") for s in signs[::-1]]
    names, constant = [_name(s) for s in sides], [s.value.constant for s in sides]
    if len(signs) == 2 and names[1] and set(signs) <= {"<", "≤"}:  # 2 < x ≤ 5
        return Group("(["[signs[0] == "≤"] + ")]"[signs[1] == "≤"], (sides[0], sides[2]), names[1])
    if len(signs) > 1 or signs[0] not in "<≤≠":
        raise Unreadable("relations that do not chain")
    if signs == ["≠"] and names[0] and constant[1]:
        return Group("union", (Group("()", (_MINUS, sides[1])), Group("()", (sides[1], _PLUS))), names[0])
    if signs != ["≠"] and names[0] and constant[1]:
        return Group("(" + ")]"[signs == ["≤"]], (_MINUS, sides[1]), names[0])
    if signs != ["≠"] and names[1] and constant[0]:
        return Group("(["[signs == ["≤"]] + ")", (sides[0], _PLUS), names[1])
    return Relation(signs[0], *sides)


def _operand(text: str):
    """A union, ratio, matrix, tuple, set, numeral or quantity."""
    text = text.strip()
    if text.startswith("{") and _closes_at_end(text):
        return _list(text[1:-1])
    if re.fullmatch("[0-9]{1,2}:[0-5][0-9]", text):  # a time of day
        return Words(text)
    if match := _PUNCTURED.fullmatch(text):
        return _inequality([Quantity(letter("x")), _quantity(match[1])], ["≠"])
    for pattern, build in ((_UNION, _union), (_RATIO, _ratio)):
        parts, separators = _split(text, pattern)
        if separators:
            return build([_operand(p) for p in parts])
    if match := _MATRIX.fullmatch(text):
        return _matrix(**match.groupdict())
    if text.startswith("\\{") and text.endswith("\\}"):
        inner = text[2:-2].strip()
        value = _list(inner) if inner else Group("list", ())
        return value if isinstance(value, Group) and value.kind == "list" else Group("list", (value,))
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        parts, separators = _split(text[1:-1], _LIST) if _closes_at_end(text) else ([], [])
        if separators and set(separators) == {","}:
            return Group(text[0] + text[-1], tuple(_item(p) for p in parts))
        if parts and not separators and ("\\begin" in parts[0] or _split(parts[0], _RELATION)[1]):
            return _item(parts[0])
    if match := _NUMERAL.fullmatch(text):
        return _numeral(match[1], match[2] or match[3])
    return _quantity(text)


def _matrix(factor: str, kind: str, body: str) -> Group:
    rows = [[_operand(cell) for cell in row.split("&")] for row in body.split("\\\\") if row.strip()]
    if sum(map(len, rows)) > MAX_ITEMS:
        raise TooComplex("a large matrix")
    if factor:
        if not all(isinstance(cell, Quantity) for row in rows for cell in row):
            raise Unreadable("a matrix of other things than numbers")
        times = parse("-1" if factor == "-" else factor)
        rows = [[Quantity(apply(operator.mul, times, cell.value)) for cell in row] for row in rows]
    return Group("matrix", tuple(Group("row", tuple(row)) for row in rows))


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens a text is closed by its last character: so in (1,2), not so in (1)+(2)."""
    depth = 0
    for match in _DEPTH.finditer(text):
        depth += (match[0] in _OPENS) - (match[0] in _CLOSES)
        if depth == 0:
            return match.end() == len(text)
    return False


def _ratio(parts: list) -> Group:
    if not all(isinstance(p, Quantity) and not p.unit for p in parts):
        raise Unreadable("a ratio of other things than numbers")
    return Group("ratio", tuple(parts))


def _numeral(digits: str, base: str) -> Words:
    if base in SPELLED:
        base = str(SPELLED.index(base))
    if not base.isdigit() or not 2 <= int(base) <= 16 or any(int(d, 16) >= int(base) for d in digits[1:]):
        raise Unreadable("digits that the base does not have")
    return Words(f"{digits}_{base}")


def _quantity(text: str) -> Quantity:
    """A scalar with its unit: 5.4 \text{ cents}, \\$18.90, 62.5%, 36°, 3 \text{ million dollars}."""
    if plain(text) in SPELLED:
        return Quantity(number(SPELLED.index(plain(text))))
    unit, scale = "", None
    if match := re.fullmatch(r"(-?) *(\\\$|[€£]) *(.+)", text):
        text, unit = match[1] + match[3], canonical_unit(match[2])
    match = _UNIT.fullmatch(text)
    if match and not (match["unit"][0] == "°" and _TRIGONOMETRIC.search(text)):
        words = re.sub(r"\\text|[{}]", " ", match["unit"]).split()
        scale = SCALES.get(words[0].lower()) if words else None
        rest = " ".join(words[1:] if scale else words)
        if _CHANGES.search(rest.lower()):
            raise Unreadable(f"words after a number: {rest}")
        text, unit = match["value"], unit or canonical_unit(rest)
    value = parse(text)
    if scale:
        value = number(value.exact * scale) if value.exact is not None else value
    return Quantity(value, unit)


def plain(text: str) -> str:
    r"""A normalised answer in words, case-folded, without \text and article; "" if it is anything else."""
    text = re.sub(" +", " ", re.sub(r"\\text *\{([^{}]*)\}", r" \1 ", text)).strip(" .,;:\"'{}")
    return re.sub("^(?:an?|the) ", "", text.casefold()) if _WORDS.fullmatch(text) else ""


def read(text: str) -> tuple[object, str]:
    """(value, "") of an answer, or (None, why not): "unparseable", "too_long" or "too_complex". Never raises."""
    if len(text) > MAX_ANSWER:
        return None, "too_long"
    try:
        return _read(text)
    except RecursionError:  # hundreds of brackets, or a caller who has used up the stack
        return None, "too_complex"


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> tuple[object, str]:
    text = normalise(text)
    try:
        return _list(text), ""
    except TooComplex:
        return None, "too_complex"
    except Unreadable:
        words = plain(text)
        return (Words(words), "") if words else (None, "unparseable")


def by_letters(answer: str, gold: str) -> bool | None:
    """The verdict where letters are no algebra: a choice like (C), also with its text, or a word (no anagram of it)."""
    a, g = (re.sub(r"\\text *\{([^{}]*)\}", r"\1", normalise(t)).strip("{} ") for t in (answer, gold))
    if re.fullmatch(r"\(?[A-J]\)?", g):
        choice = re.match(r"\(?([A-J])[).:](?!.*\b(?:[A-J]|or|not)\b)", a)
        return choice[1] == g.strip("()") if choice else None
    a, g = plain(a), plain(g)
    return a == g if a.isalpha() and g.isalpha() else None


def matches(a, g, tolerance: float = 0.0, unit: str = "") -> bool:
    """Whether the answer a says what the gold g says."""
    if isinstance(a, Relation) and a.sign == "=" and _name(a.left) and not isinstance(g, Relation):
        return matches(a.right, g, tolerance, unit)  # x = 5 for 5
    if isinstance(g, Relation):
        return _matches_relation(a, g, tolerance, unit)
    if isinstance(g, Words) and isinstance(a, Quantity) and a.value.exact is not None:
        digits, _, base = g.text.partition("_")  # which base may go without saying
        return bool(base) and digits.isdigit() and not a.value.flags and a.value.exact == int(digits)
    if isinstance(a, Group) and a.kind == "list" and len(a.items) == 1 and isinstance(g, Quantity):  # {5} for 5
        return matches(a.items[0], g, tolerance, unit)
    if isinstance(g, Group) and g.kind == "list" and len(g.items) == 1 and isinstance(a, Quantity):
        return matches(a, g.items[0], tolerance, unit)
    if type(a) is not type(g):
        return False
    if isinstance(g, Quantity):
        return _matches_quantity(a, g, tolerance, unit)
    if not isinstance(g, Group):
        return a == g
    if a.kind != g.kind or len(a.items) != len(g.items) or (a.name and g.name and a.name != g.name):
        return False
    if g.kind == "ratio":
        pairs = [(p.value, q.value) for p, q in zip(a.items, g.items, strict=True)]
        (x, y), zero = pairs[0], number(0)
        crossed = all(same(apply(operator.mul, p, y), apply(operator.mul, q, x)) for p, q in pairs)
        return crossed and all(same(p, zero) == same(q, zero) for p, q in pairs)
    if g.kind not in ("list", "union"):
        return all(matches(p, q, tolerance, unit) for p, q in zip(a.items, g.items, strict=True))
    names = {_name(q.left) for q in g.items if isinstance(q, Relation)}
    if len(names) == len(g.items) and not any(isinstance(p, Relation) for p in a.items):  # 9, 4 for AB = 9, CD = 4
        return all(matches(p, q, tolerance, unit) for p, q in zip(a.items, g.items, strict=True))
    left = list(a.items)
    for q in g.items:
        found = next((i for i, p in enumerate(left) if matches(p, q, tolerance, unit)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _matches_quantity(a: Quantity, g: Quantity, tolerance: float, unit: str) -> bool:
    units = {a.unit, g.unit or unit} - {""}
    if len(units) == 2 and len({u.startswith("?") for u in units}) == 1:  # two known units, or two unknown words
        return False
    exact = g.value.exact is not None and (a.value.exact is not None or not tolerance)
    if exact and "task" in a.value.flags - g.value.flags:
        return False
    a_number, g_number = (
        apply(operator.mul, v, _HUNDREDTH) if u == "%" else v for v, u in ((a.value, a.unit), (g.value, g.unit or unit))
    )
    # the sign of 62.5 % may go without saying; but 0.5 % for 0.5 is another number
    if same(a.value, g.value, tolerance) and not (a.unit == "%" and not g.unit and abs(g.value.points[0]) < 1):
        return True
    return "%" in units and a.unit != (g.unit or unit) and same(a_number, g_number, tolerance)


def _matches_relation(a, g: Relation, tolerance: float, unit: str) -> bool:
    named = g.sign == "=" and _name(g.left)
    if not isinstance(a, Relation):
        bare = named and not _CAPITALS.fullmatch(_name(g.right))  # 5 for x = 5, but not MC for MR = MC
        return bool(bare) and matches(a, g.right, tolerance, unit)
    if a.sign != g.sign:
        return False
    if named and _name(a.left) == named and matches(a.right, g.right, tolerance, unit):
        return True
    sides = (a.left, a.right, g.left, g.right)
    if not all(isinstance(s, Quantity) for s in sides) or (named and g.right.value.constant):
        return False  # x + 1 = 3 is not yet x = 2
    left, right = (apply(operator.sub, r.right.value, r.left.value) for r in (a, g))
    return proportional(left, right, positive=g.sign in "<≤")
