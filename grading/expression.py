r"""One expression, in TeX or plain text, to its value. Untrusted text in, a number out, nothing else.

A whitelist tokenizer and a recursive-descent parser that computes while it reads: rational numbers exactly, the rest to
50 digits. A letter has fixed values at six sample points, so an expression in letters is its values there, and two
expressions are equal when they agree at every point where either is defined. Nothing is handed to `eval`, `sympify` or
`parse_latex`. Work is bounded by construction, by limits on length, depth and digits and by a budget that every
operation pays into; there is no clock. Sums, integrals and limits are not in the grammar: a restated task is no value.

    sum      = ["-"] product {("+" | "-") product}
    product  = power {["*" | "/" | "÷"] power}                  nothing between two factors multiplies
    power    = primary {"!" | "°" | "^" exponent}
    primary  = number | letter | f argument | \frac | \sqrt | \binom | "|" sum "|" | ⌊ sum ⌋ | "(" sum ")"
"""

import functools
import hashlib
import math
import operator
import re
from dataclasses import dataclass, replace
from fractions import Fraction

import mpmath  # the numeric engine of sympy, installed with it

MAX_TOKENS = 400
MAX_DEPTH = 30
MAX_BITS = 20_000  # of an exact number; 1000! has 8,530
BUDGET, BUDGET_PER_CHARACTER = 200, 8  # units of work that an expression may cost, each about 3 µs

mp = mpmath.mp.clone()  # a context of our own: nobody else's precision changes
mp.dps = 50
EPSILON = mp.mpf(10) ** -35  # relative difference up to which two 50-digit numbers are the same
TINY = mp.mpf(10) ** -45

POINTS = 6  # sample points: two positive rationals, three integers, a negative rational
RATIONAL, INTEGER, NEGATIVE = (0, 1), (2, 3, 4), (5,)


class Unreadable(ValueError):
    """Not an expression of the grammar above."""


class TooComplex(ValueError):
    """An expression with more tokens, levels, digits or operations than an answer has."""


@dataclass(frozen=True)
class Scalar:
    """The value of an expression.

    flags: "task" when something is still to be computed (2+2, 5!, √16), "steps" when ⌊ ⌋ was taken of letters (an
    identity between two of these holds at the integers only), "sign" when |…| was (then the negative point counts:
    elsewhere letters stand for positive numbers, and √x² is x), "infinite" for ∞, which does not compute.
    """

    exact: Fraction | None
    points: tuple  # one value for a constant, else POINTS of them, None where undefined
    name: str = ""  # set when the expression is one symbol
    flags: frozenset = frozenset()

    @property
    def constant(self) -> bool:
        return len(self.points) == 1


def number(value: Fraction | int, flags: frozenset = frozenset()) -> Scalar:
    value = Fraction(value)
    return Scalar(value, (mp.mpf(value.numerator) / value.denominator,), flags=flags)


@functools.lru_cache(maxsize=1024)
def letter(name: str) -> Scalar:
    """A symbol; its values depend on nothing but its name."""
    h = hashlib.sha256(name.encode("utf-8", "replace")).digest()
    rational = [mp.mpf(1000 + 256 * h[2 * i] + h[2 * i + 1]) / 7919 for i in range(3)]  # 0.13 … 8.4
    return Scalar(None, (*rational[:2], *(mp.mpf(3 + b % 23) for b in h[6:9]), -rational[2]), name)


INFINITY = replace(letter("\\infty"), name="", flags=frozenset(["infinite"]))  # one more symbol, equal to itself


def close(x, y) -> bool:
    return abs(x - y) <= max(EPSILON * max(abs(x), abs(y)), TINY)


def _pairs(a: Scalar, b: Scalar) -> list[tuple]:
    """The values of a and b at the points that count for the two of them."""
    if a.constant and b.constant:
        return [(a.points[0], b.points[0])]
    which = INTEGER if "steps" in a.flags & b.flags else RATIONAL + INTEGER
    which += NEGATIVE if "sign" in a.flags | b.flags else ()
    x, y = (s.points * POINTS if s.constant else s.points for s in (a, b))
    return [(x[i], y[i]) for i in which if x[i] is not None or y[i] is not None]


def same(a: Scalar, b: Scalar, tolerance: float = 0.0) -> bool:
    """a = b exactly, or to 35 digits wherever one is defined. Constants: or |a − b| ≤ tolerance·|b|."""
    if tolerance and a.constant and b.constant:
        return abs(a.points[0] - b.points[0]) <= mp.mpf(tolerance) * abs(b.points[0])
    if a.exact is not None and b.exact is not None:
        return a.exact == b.exact
    pairs = _pairs(a, b)
    return bool(pairs) and all(None not in pair and close(*pair) for pair in pairs)


def proportional(a: Scalar, b: Scalar, positive: bool = False) -> bool:
    """a = c·b with one c ≠ 0 (c > 0) at all points: a = 0 and b = 0 (a > 0 and b > 0) say the same."""
    pairs = _pairs(a, b)
    if len(pairs) < 2 or any(None in p or (abs(p[0]) < EPSILON) != (abs(p[1]) < EPSILON) for p in pairs):
        return False
    ratios = [x / y for x, y in pairs if abs(y) >= EPSILON]
    return bool(ratios) and all(close(r, ratios[0]) for r in ratios) and not (positive and mp.re(ratios[0]) < 0)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

FUNCTIONS = {
    "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc, "arcsin": mp.asin,
    "arccos": mp.acos, "arctan": mp.atan, "asin": mp.asin, "acos": mp.acos, "atan": mp.atan, "sinh": mp.sinh,
    "cosh": mp.cosh, "tanh": mp.tanh, "ln": mp.log, "log": mp.log, "lg": mp.log10, "exp": mp.exp,
}  # fmt: skip
INVERSE = {"sin": mp.asin, "cos": mp.acos, "tan": mp.atan}
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
GREEK = (
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi|omega|"
    "Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|hbar|ell"
)
_TOKEN = re.compile(
    r" *(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|\\?(?P<word>sqrt|pi|infinity|infty|inf|" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)) + r")(?![A-Za-z])"
    r"|(?P<symbol>(?:\\(?:angle|triangle) *(?:[A-Z] *(?:_ *(?:\{[^{}]*\}|\w))? *){1,4}"  # a name of several letters
    r"|\\(?:dot|ddot|hat|bar|vec|tilde|overline|widehat) *(?:\{[^{}]*\}|[A-Za-z]|\\[a-z]+)"
    r"|\\text *\{ *[A-Za-z] *\}|[A-Z]{4,}|[A-Za-z]|\\(?:" + GREEK + r")(?![A-Za-z]))"
    r"(?: *_ *(?:\{[^{}]*\}|[A-Za-z0-9]|\\[a-z]+)| *')*)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<sign>[-+*/÷^_!|()\[\]{}°]))"
)
_ARGUMENT = re.compile(r" *\( *(?:(?P<letter>[A-Za-z]|\\[a-z]+)|(?P<number>[0-9]+)) *\)")
_LONG_WORD = re.compile(r"[A-Za-z]*[a-z][A-Za-z]*")


def tokenize(text: str) -> list[tuple[str, str]]:
    """[(kind, text)], kind: number, symbol, command, or the sign itself. Raises Unreadable at anything unknown."""
    tokens, i, text = [], 0, text.rstrip()
    while i < len(text):
        match = _TOKEN.match(text, i)
        if not match:
            raise Unreadable(f"unknown: {text[i : i + 10]!r}")
        if len(tokens) == MAX_TOKENS:
            raise TooComplex("too many tokens")
        kind, value, i = match.lastgroup, match[match.lastgroup], match.end()
        if kind == "word":
            kind, value = "command", {"inf": "infty", "infinity": "infty"}.get(value, value)
        elif kind == "symbol":
            word = _LONG_WORD.match(text, match.start(kind))
            if word and len(word[0]) > 3:
                raise Unreadable(f"a word: {word[0]!r}")
            value = re.sub(r"\\text|[{} ]", "", value)
            applied = _ARGUMENT.match(text, i)  # f(x) and I(0) are names; x(x+1), n(n) and a(2) are products
            if applied and (applied["letter"] not in (None, value) or (applied["number"] and value in "fghFGHIPVQuvy")):
                value, i = value + re.sub(" ", "", applied[0]), applied.end()
        elif kind == "sign":
            kind = value
        tokens.append((kind, value))
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Parser

CLOSING = {"(": ")", "[": "]", "{": "}"}
TASK, STEPS, SIGN = (frozenset([flag]) for flag in ("task", "steps", "sign"))
_CHEAP = (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, abs, mp.sqrt, mp.log, mp.log10)


class Parser:
    def __init__(self, text: str = ""):
        self.tokens, self.i, self.depth = [*tokenize(text), ("end", "")], 0, 0
        self.work, self.budget = 0, BUDGET + BUDGET_PER_CHARACTER * len(text)
        self.in_bars = self.in_angle = False  # inside |…|, inside the argument of a trigonometric function

    @property
    def kind(self) -> str:
        return self.tokens[self.i][0]

    def next(self) -> tuple[str, str]:
        self.i += 1
        return self.tokens[self.i - 1]

    def accept(self, kind: str, *texts: str) -> bool:
        found = self.kind == kind and (not texts or self.tokens[self.i][1] in texts)
        self.i += found and kind != "end"
        return found

    def expect(self, kind: str, *texts: str) -> None:
        if not self.accept(kind, *texts):
            raise Unreadable(f"{texts or kind} expected")

    # Grammar

    def expression(self) -> Scalar:
        value = self.sum()
        self.expect("end")
        return value

    def sum(self) -> Scalar:
        minus = self.accept("-")
        if not minus:
            self.accept("+")
        value = self.apply(operator.neg, self.product()) if minus else self.product()
        while self.kind in ("+", "-"):
            op = operator.add if self.next()[0] == "+" else operator.sub
            value = self.apply(op, value, self.signed(self.product), flags=TASK)
        return value

    def signed(self, part) -> Scalar:
        """A part that may carry a minus of its own: 3*-2, 2^-1, 1--2."""
        return self.apply(operator.neg, part()) if self.accept("-") else part()

    def product(self) -> Scalar:
        value = self.power()
        while True:
            if self.accept("/"):
                value = self.apply(operator.truediv, value, self.signed(self.power))
            elif self.accept("÷"):
                value = self.apply(operator.truediv, value, self.signed(self.power), flags=TASK)
            elif self.accept("*"):
                value = self.times(value, self.signed(self.power))
            elif self.starts_factor():
                value = self.times(value, self.power())
            else:
                return value

    def starts_factor(self) -> bool:
        kind, text = self.tokens[self.i]
        return (
            kind in ("symbol", "(", "[", "{")
            or (kind == "number" and self.tokens[self.i - 1][0] in (")", "]", "symbol"))  # (n-2) 2^n
            or (kind == "|" and not self.in_bars)
            or (kind == "command" and text not in ("rfloor", "rceil"))
        )

    def times(self, a: Scalar, b: Scalar) -> Scalar:
        scientific = a.exact is not None and b.exact is not None and _is_power_of_ten(b.exact)  # 4.5 * 10^{33}
        return self.apply(operator.mul, a, b, flags=frozenset() if scientific else TASK)

    def power(self) -> Scalar:
        value = self.primary()
        while True:
            if self.accept("!"):
                value = replace(self.factorial(value), flags=value.flags | TASK)
            elif self.accept("°"):
                value = self.apply(mp.radians, value) if self.in_angle else value
            elif self.accept("^"):
                value = self.raised(value, self.argument(self.exponent))
            else:
                return value

    def exponent(self) -> Scalar:  # 2^3^2 is 2^9
        value = self.signed(self.primary)
        return self.raised(value, self.argument(self.exponent)) if self.accept("^") else value

    def argument(self, otherwise) -> Scalar:
        """A braced group, else what `otherwise` reads."""
        if not self.accept("{"):
            return otherwise()
        return self.closed("}")

    def closed(self, closing: str) -> Scalar:
        before, self.in_bars = self.in_bars, False
        value, self.in_bars = self.sum(), before
        self.expect(closing)
        return value

    def digit(self) -> Scalar:
        r"""The unbraced argument of \frac is one digit or symbol: \frac12 is 1/2, \frac123 is nothing."""
        kind, text = self.tokens[self.i]
        if kind == "number" and len(text) > 1 and text.isdigit():
            self.tokens[self.i : self.i + 1] = [("number", text[0]), ("number", text[1:])]
        return self.primary()

    def primary(self) -> Scalar:
        self.depth += 1
        self.spend(1)
        if self.depth > MAX_DEPTH:
            raise TooComplex("too deeply nested")
        kind, text = self.next()
        if kind == "number":
            value = self.rational(_decimal(text), frozenset())
        elif kind == "symbol":
            value = {"e": _E, "i": _I}.get(text) or letter(text)
        elif kind in CLOSING:
            value = self.closed(CLOSING[kind])
        elif kind == "|":
            before, self.in_bars = self.in_bars, True
            value, self.in_bars = self.apply(abs, self.sum(), flags=SIGN), before
            self.expect("|")
        elif kind == "command":
            value = self.call(text) if text in FUNCTIONS else self.command(text)
            if text not in ("pi", "infty", "frac"):
                value = replace(value, flags=value.flags | TASK)
        else:
            raise Unreadable(f"unexpected {kind} {text}")
        self.depth -= 1
        return value

    def command(self, name: str) -> Scalar:
        if name == "pi":
            return _PI
        if name == "infty":
            return INFINITY
        if name == "frac":
            return self.apply(operator.truediv, self.argument(self.digit), self.argument(self.digit))
        if name == "binom":
            return self.binomial(self.argument(self.digit), self.argument(self.digit))
        if name == "sqrt":
            degree = self.closed("]") if self.accept("[") else number(2)
            value = self.argument(self.primary)
            if degree.exact == 2:
                return self.apply(mp.sqrt, value)
            odd = degree.exact is not None and degree.exact % 2 == 1 and value.exact is not None and value.exact < 0
            root = self.raised(
                self.apply(abs, value) if odd else value, self.apply(operator.truediv, number(1), degree)
            )
            return self.apply(operator.neg, root) if odd else root  # the real root: ∛-8 is -2
        if name in ("lfloor", "lceil"):
            value = self.sum()
            self.expect("command", "rfloor" if name == "lfloor" else "rceil")
            return self.apply(_floor if name == "lfloor" else _ceil, value, flags=TASK if value.constant else STEPS)
        raise Unreadable(f"\\{name}")

    def call(self, name: str) -> Scalar:
        r"""\sin^2 x, \log_2 8, \cos 2\pi t, \ln(x): without brackets the argument runs to the next sign or function."""
        power, base, f = None, None, FUNCTIONS[name]
        if name == "log" and self.accept("_"):
            base = self.argument(self.primary)
        if self.accept("^"):
            power = self.argument(self.exponent)
            if power.exact == -1 and name in TRIGONOMETRIC:
                power, f = None, INVERSE.get(name)
                if f is None:
                    raise Unreadable(f"\\{name}^{{-1}}")
        before, self.in_angle = self.in_angle, self.in_angle or name in TRIGONOMETRIC
        bracketed = self.kind in ("(", "[", "{", "|")
        value = self.primary() if bracketed else self.power()
        while not bracketed and (self.kind == "symbol" or self.tokens[self.i][1] in ("pi", "frac", "sqrt")):
            value = self.times(value, self.power())
        self.in_angle = before
        value = self.apply(f, value)
        if base:
            value = self.apply(operator.truediv, value, self.apply(mp.log, base))
        return self.raised(value, power) if power else value

    # Operations: exact while everything is rational, else at every point

    def apply(self, f, *args: Scalar, flags: frozenset = frozenset()) -> Scalar:
        """f of scalars. `flags` join those of the arguments."""
        flags = flags.union(*(a.flags for a in args))
        if "infinite" in flags and f is not operator.neg:
            raise Unreadable("arithmetic with infinity")
        if f in _CHEAP[:6] and all(a.exact is not None for a in args):
            return self.rational(f(*(a.exact for a in args)), flags)
        count = max(len(a.points) for a in args)
        self.spend(count * (1 if f in _CHEAP else 15 if f in (_factorial, _binomial) else 6))
        columns = zip(*(a.points * count if a.constant else a.points for a in args), strict=True)
        points = tuple(None if None in column else _at_point(f, column) for column in columns)
        if all(p is None for p in points):
            raise Unreadable("undefined")
        return Scalar(None, points, flags=flags)

    def spend(self, work: int) -> None:
        self.work += work
        if self.work > self.budget:
            raise TooComplex("too many operations")

    def rational(self, value: Fraction, flags: frozenset) -> Scalar:
        bits = value.numerator.bit_length() + value.denominator.bit_length()
        if bits > MAX_BITS:
            raise TooComplex("too many digits")
        self.spend(1 + (bits // 1000) ** 2 // 4)
        return number(value, flags)

    def raised(self, a: Scalar, b: Scalar) -> Scalar:
        if a.exact is not None and b.exact is not None and b.exact.denominator == 1:
            n = int(b.exact)
            if abs(n) * max(a.exact.numerator.bit_length(), a.exact.denominator.bit_length()) > MAX_BITS:
                raise TooComplex("too many digits")
            return self.rational(a.exact**n, a.flags | b.flags)
        return self.apply(_power, a, b, flags=TASK)

    def factorial(self, a: Scalar) -> Scalar:
        if a.exact is None:
            return self.apply(_factorial, a)
        if a.exact.denominator != 1 or a.exact < 0:
            raise Unreadable("factorial of something else than a natural number")
        if a.exact > 2100:
            raise TooComplex("too many digits")
        return self.rational(Fraction(math.factorial(int(a.exact))), a.flags)

    def binomial(self, n: Scalar, k: Scalar) -> Scalar:
        if n.exact is None or k.exact is None:
            return self.apply(_binomial, n, k)
        if n.exact.denominator != 1 or k.exact.denominator != 1 or min(n.exact, k.exact) < 0:
            raise Unreadable("binomial of something else than natural numbers")
        if n.exact > 5000:
            raise TooComplex("too many digits")
        self.spend(int(n.exact) // 10)
        return self.rational(Fraction(math.comb(int(n.exact), int(k.exact))), n.flags | k.flags)


_PI, _E, _I = Scalar(None, (+mp.pi,)), Scalar(None, (+mp.e,)), Scalar(None, (mp.mpc(0, 1),))


def _at_point(f, column):
    """f there, or None where it is undefined or larger than any answer."""
    if f not in _CHEAP and mp.mag(column[-1]) > 50:
        return None
    try:
        value = f(*column)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError):  # TypeError: order of complex numbers
        return None
    parts = (value.real, value.imag)  # each of ordinary size: log(1 + 10^{-10^8} i) would take long
    return value if mp.isfinite(value) and all(p == 0 or abs(mp.mag(p)) < MAX_BITS for p in parts) else None


def _power(x, y):
    if x == 0:
        return mp.mpf(0) if mp.re(y) > 0 else 1 / x
    return mp.power(x, y)


def _factorial(x):
    if isinstance(x, mp.mpc) or abs(x) > 10**4:
        raise OverflowError
    return mp.gamma(x + 1)


def _binomial(n, k):
    if isinstance(n + k, mp.mpc) or max(abs(n), abs(k)) > 10**4:
        raise OverflowError
    return mp.gamma(n + 1) * mp.rgamma(k + 1) * mp.rgamma(n - k + 1)


def _floor(x):
    return mp.floor(mp.mpf(x) + EPSILON)  # log_2 8 may come out as 2.999…


def _ceil(x):
    return mp.ceil(mp.mpf(x) - EPSILON)


def _is_power_of_ten(value: Fraction) -> bool:
    low, high = sorted((abs(value.numerator), value.denominator))
    digits = high.bit_length() * 30103 // 100_000  # log10 2 is 0.30103; str(high) would fail beyond 4,300 digits
    return low == 1 < high and high in (10**digits, 10 ** (digits + 1))


def _decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, fraction = mantissa.partition(".")
    if len(exponent) > 5 or abs(int(exponent or 0)) > 5000:
        raise TooComplex("too many digits")
    return Fraction(int(whole + fraction)) * Fraction(10) ** (int(exponent or 0) - len(fraction))


def apply(f, *args: Scalar) -> Scalar:
    """f of values that have been read. Raises Unreadable or TooComplex."""
    return Parser().apply(f, *args)


def parse(text: str) -> Scalar:
    r"""The value of a normalised expression (see `notation.normalise`). Raises Unreadable or TooComplex.

    >>> parse(r"\frac{1}{2}+0.25").exact, same(parse(r"(\sqrt{3}-1)(\sqrt{3}+1)"), parse("2"))
    (Fraction(3, 4), True)
    """
    try:
        return Parser(text).expression()
    except ZeroDivisionError as error:
        raise Unreadable("division by zero") from error
