r"""The value of one expression in TeX or plain text.

A recursive-descent parser computes while it reads: rational numbers exactly, other numbers to 50 digits. A letter has
fixed values at six sample points. Two expressions are equal when they agree at every point where one of them is
defined. The text is untrusted: there is no `eval`, `sympify` or `parse_latex`, and limits on tokens, depth, digits and
the cost of all operations bound the work. A sum, integral or limit is not in the grammar: it restates the task.

    sum      = ["-"] product {("+" | "-") product}
    product  = power {["*" | "/" | "÷"] power}                  adjacent factors multiply
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

import mpmath  # sympy's numeric engine

MAX_TOKENS, MAX_DEPTH = 400, 30
MAX_BITS = 20_000  # numerator and denominator of an exact number; 1000! has 8,530
BUDGET, BUDGET_PER_CHARACTER = 200, 8  # units of work for one expression; a unit takes about 3 µs

mp = mpmath.mp.clone()  # a separate context: the precision of mpmath.mp stays as it is
mp.dps = 50
EPSILON = mp.mpf(10) ** -35  # two 50-digit numbers are equal up to this relative difference
TINY = mp.mpf(10) ** -45

POINTS = 6  # sample points: two positive rationals, three integers, a negative rational
RATIONAL, INTEGER, NEGATIVE = (0, 1), (2, 3, 4), (5,)
UNEVALUATED, ROUNDED, ABSOLUTE = (frozenset([flag]) for flag in ("unevaluated", "rounded", "absolute"))


class Unreadable(ValueError):
    """The text is outside the grammar, or its value is undefined."""


class TooComplex(ValueError):
    """The text has more tokens, levels, digits or operations than the limits allow."""


@dataclass(frozen=True)
class Scalar:
    """The value of an expression. Letters stand for positive numbers, so √x² equals x, unless |…| is applied.

    flags: "unevaluated" (an operation is still to be done: 2+2, 5!, √16), "rounded" (⌊ ⌋ or ⌈ ⌉ of letters: two of
    these are compared at the integers only), "absolute" (|…|: the negative point counts too), "infinite" (∞).
    """

    exact: Fraction | None  # None for an irrational or complex constant and for an expression in letters
    points: tuple  # one value for a constant, else POINTS values; None where undefined
    name: str = ""  # the symbol, if the expression is a single symbol
    flags: frozenset = frozenset()

    @property
    def constant(self) -> bool:
        return len(self.points) == 1


def number(value: Fraction | int, flags: frozenset = frozenset()) -> Scalar:
    """A rational constant."""
    value = Fraction(value)
    return Scalar(value, (mp.mpf(value.numerator) / value.denominator,), flags=flags)


@functools.lru_cache(maxsize=1024)
def letter(name: str) -> Scalar:
    """A symbol. A hash of the name determines its values."""
    h = hashlib.sha256(name.encode("utf-8", "replace")).digest()
    rational = [mp.mpf(1000 + 256 * h[2 * i] + h[2 * i + 1]) / 7919 for i in range(3)]  # 0.13 … 8.4
    return Scalar(None, (*rational[:2], *(mp.mpf(3 + b % 23) for b in h[6:9]), -rational[2]), name)


def close(x, y) -> bool:
    """Whether two mpmath numbers agree to 35 digits."""
    return abs(x - y) <= max(EPSILON * max(abs(x), abs(y)), TINY)


def _pairs(a: Scalar, b: Scalar) -> list[tuple]:
    """The values of a and b at the sample points that count for them; None where one of the two is undefined."""
    if a.constant and b.constant:
        return [(a.points[0], b.points[0])]
    indices = INTEGER if "rounded" in a.flags & b.flags else RATIONAL + INTEGER
    indices += NEGATIVE if "absolute" in a.flags | b.flags else ()
    x, y = (s.points * POINTS if s.constant else s.points for s in (a, b))
    return [(x[i], y[i]) for i in indices if x[i] is not None or y[i] is not None]


def same(a: Scalar, b: Scalar, tolerance: float = 0.0) -> bool:
    """Whether a = b: exactly for rationals, else to 35 digits. For constants |a − b| ≤ tolerance·|b| suffices."""
    if tolerance and a.constant and b.constant:
        return abs(a.points[0] - b.points[0]) <= mp.mpf(tolerance) * abs(b.points[0])
    if a.exact is not None and b.exact is not None:
        return a.exact == b.exact
    pairs = _pairs(a, b)
    return bool(pairs) and all(None not in pair and close(*pair) for pair in pairs)


def proportional(a: Scalar, b: Scalar, positive: bool = False) -> bool:
    """Whether a = c·b at all points, with one c ≠ 0 (c > 0 if `positive`). Then a = 0 and b = 0 are equivalent."""
    pairs = _pairs(a, b)
    if len(pairs) < 2 or any(None in p or (abs(p[0]) < EPSILON) != (abs(p[1]) < EPSILON) for p in pairs):
        return False
    ratios = [x / y for x, y in pairs if abs(y) >= EPSILON]
    return bool(ratios) and all(close(r, ratios[0]) for r in ratios) and not (positive and mp.re(ratios[0]) < 0)


CONSTANTS = {"pi": Scalar(None, (+mp.pi,)), "e": Scalar(None, (+mp.e,)), "i": Scalar(None, (mp.mpc(0, 1),))}
CONSTANTS["infty"] = replace(letter("\\infty"), name="", flags=frozenset(["infinite"]))  # equal to itself only
_NAMES = "sin cos tan cot sec csc asin acos atan sinh cosh tanh log exp"
FUNCTIONS = {name: getattr(mp, name) for name in _NAMES.split()}
FUNCTIONS |= {"arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "ln": mp.log, "lg": mp.log10}
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
CLOSING = {"(": ")", "[": "]", "{": "}"}
ROUND = {"lfloor": lambda x: mp.floor(mp.mpf(x) + EPSILON), "lceil": lambda x: mp.ceil(mp.mpf(x) - EPSILON)}
_RATIONAL_OPERATIONS = (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, abs)
_CHEAP = (*_RATIONAL_OPERATIONS, mp.sqrt, mp.log, mp.log10)
_TOKEN = re.compile(
    r" *(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|\\?(?P<word>sqrt|pi|infinity|infty|inf|" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)) + r")(?![A-Za-z])"
    r"|(?P<symbol>(?:\\(?:angle|triangle) *(?:[A-Z] *(?:_ *(?:\{[^{}]*\}|\w))? *){1,4}"  # ∠ABC is one symbol
    r"|\\(?:dot|ddot|hat|bar|vec|tilde|overline|widehat) *(?:\{[^{}]*\}|[A-Za-z]|\\[a-z]+)"
    r"|\\text *\{ *[A-Za-z] *\}|[A-Z]{4,}|[A-Za-z]|\\(?:hbar|ell|alpha|beta|gamma|delta|epsilon|zeta|eta|"
    r"theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|"
    r"Upsilon|Phi|Psi|Omega)(?![A-Za-z]))"
    r"(?: *_ *(?:\{[^{}]*\}|[A-Za-z0-9]|\\[a-z]+)| *')*)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<sign>[-+*/÷^_!|()\[\]{}°]))"
)
_ARGUMENT = re.compile(r" *\( *(?:(?P<letter>[A-Za-z]|\\[a-z]+)|(?P<number>[0-9]+)) *\)")
_LONG_WORD = re.compile(r"(?=[A-Z]*[a-z])[A-Za-z]{4}")


def tokenize(text: str) -> list[tuple[str, str]]:
    """[(kind, text)], where kind is number, symbol, command or the sign itself. Raises Unreadable or TooComplex."""
    tokens, i, text = [], 0, text.rstrip()
    while i < len(text):
        match = _TOKEN.match(text, i)
        if not match:
            raise Unreadable(f"unknown: {text[i : i + 10]!r}")
        if len(tokens) == MAX_TOKENS:
            raise TooComplex("too many tokens")
        kind, value, i = match.lastgroup, match[match.lastgroup], match.end()
        if kind == "word":
            kind, value = "command", "infty" if value in ("inf", "infinity") else value
        elif kind == "symbol":
            if _LONG_WORD.match(text, match.start(kind)):
                raise Unreadable("a word")
            value = re.sub(r"\\text|[{} ]", "", value)
            argument = _ARGUMENT.match(text, i)  # f(x) and I(0) are symbols; x(x+1), n(n) and a(2) are products
            if argument and (argument["letter"] or value in "fghFGHIPVQuvy") and argument["letter"] != value:
                value, i = value + argument[0].replace(" ", ""), argument.end()
        elif kind == "sign" or value in ("rfloor", "rceil"):
            kind = value
        tokens.append((kind, value))
    return tokens


class Parser:
    """Reads one expression. Every method named after a part of the grammar reads that part and returns its value."""

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

    def accept(self, kind: str) -> bool:
        """Skips the next token if it is of that kind."""
        return self.kind == kind and bool(self.next())

    def sum(self) -> Scalar:
        value = self.product() if self.accept("+") else self.signed(self.product)
        while self.kind in ("+", "-"):
            operation = operator.add if self.next()[0] == "+" else operator.sub
            value = self.apply(operation, value, self.signed(self.product), flags=UNEVALUATED)
        return value

    def signed(self, part) -> Scalar:
        """A part that may have its own minus sign, as in 3*-2, 2^-1 and 1--2."""
        return self.apply(operator.neg, part()) if self.accept("-") else part()

    def product(self) -> Scalar:
        value = self.power()
        while True:
            if self.kind in ("/", "÷"):
                flags = UNEVALUATED if self.next()[0] == "÷" else frozenset()
                value = self.apply(operator.truediv, value, self.signed(self.power), flags=flags)
            elif self.accept("*") or self.starts_factor():
                value = self.times(value, self.signed(self.power))
            else:
                return value

    def starts_factor(self) -> bool:
        if self.kind == "number":  # (n-2) 2^n, but not 3 5
            return self.tokens[self.i - 1][0] in (")", "]", "symbol")
        return self.kind in ("symbol", "(", "[", "{", "command") or (self.kind == "|" and not self.in_bars)

    def times(self, a: Scalar, b: Scalar) -> Scalar:
        if a.exact is not None and b.exact is not None:
            low, high = sorted((abs(b.exact.numerator), b.exact.denominator))
            if low == 1 < high == 10 ** round(math.log10(high)):  # 4.5 * 10^{33} is evaluated
                return self.apply(operator.mul, a, b)
        return self.apply(operator.mul, a, b, flags=UNEVALUATED)

    def power(self) -> Scalar:
        value = self.primary()
        while True:
            if self.accept("!"):
                value = self.of_naturals(math.factorial, _factorial, 2100, value)
            elif self.accept("°"):
                value = self.apply(mp.radians, value) if self.in_angle else value
            elif self.accept("^"):
                value = self.raised(value, self.argument(self.exponent))
            else:
                return value

    def exponent(self) -> Scalar:  # 2^3^2 is 2^9
        value = self.signed(self.primary)
        return self.raised(value, self.argument(self.exponent)) if self.accept("^") else value

    def argument(self, unbraced) -> Scalar:
        """A braced group, or the part that the method `unbraced` reads."""
        return self.closed("}") if self.accept("{") else unbraced()

    def closed(self, closing: str, in_bars: bool = False) -> Scalar:
        """A sum and the closing bracket, bar or end of text after it."""
        before, self.in_bars = self.in_bars, in_bars
        value, self.in_bars = self.sum(), before
        if not self.accept(closing):
            raise Unreadable(f"{closing} expected")
        return value

    def digit(self) -> Scalar:
        r"""An unbraced argument of \frac, one digit or symbol: \frac12 is 1/2, \frac123 is unreadable."""
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
        if kind == "number":  # 12, 1.25, .5 or 3e-8
            exponent = text.lower().partition("e")[2]
            if len(exponent) > 5 or abs(int(exponent or 0)) > 5000:
                raise TooComplex("too many digits")
            value = self.rational(Fraction(text), frozenset())
        elif kind == "symbol":
            value = CONSTANTS[text] if text in ("e", "i") else letter(text)
        elif kind in CLOSING:
            value = self.closed(CLOSING[kind])
        elif kind == "|":
            value = self.apply(abs, self.closed("|", in_bars=True), flags=ABSOLUTE)
        elif text in ("pi", "infty"):
            value = CONSTANTS[text]
        elif text == "frac":
            value = self.apply(operator.truediv, self.argument(self.digit), self.argument(self.digit))
        elif text == "binom":
            value = self.of_naturals(math.comb, _binomial, 5000, self.argument(self.digit), self.argument(self.digit))
        elif text == "sqrt":
            degree = self.closed("]") if self.accept("[") else number(2)
            value = self.root(self.argument(self.primary), degree)
        elif text in ROUND:
            value = self.closed("r" + text[1:], self.in_bars)
            value = self.apply(ROUND[text], value, flags=UNEVALUATED if value.constant else ROUNDED)
        elif text in FUNCTIONS:
            value = self.call(text)
        else:
            raise Unreadable(f"unexpected {kind} {text}")
        if kind == "command" and text not in ("pi", "infty", "frac"):
            value = replace(value, flags=value.flags | UNEVALUATED)
        self.depth -= 1
        return value

    def call(self, name: str) -> Scalar:
        r"""\sin^2 x, \log_2 8, \cos 2\pi t, \ln(x). An argument without brackets ends at the next sign or function."""
        power, f = None, FUNCTIONS[name]
        base = self.argument(self.primary) if name == "log" and self.accept("_") else None
        if self.accept("^"):
            power = self.argument(self.exponent)
            if power.exact == -1 and name in TRIGONOMETRIC:
                power, f = None, FUNCTIONS.get("arc" + name)
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

    def apply(self, f, *args: Scalar, flags: frozenset = frozenset()) -> Scalar:
        """f of scalars, with `flags` and the arguments' flags; exact on rationals. Raises Unreadable or TooComplex."""
        flags = flags.union(*(a.flags for a in args))
        if "infinite" in flags and f is not operator.neg:
            raise Unreadable("arithmetic with infinity")
        if f in _RATIONAL_OPERATIONS and all(a.exact is not None for a in args):
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
            if abs(b.exact) * max(a.exact.numerator.bit_length(), a.exact.denominator.bit_length()) > MAX_BITS:
                raise TooComplex("too many digits")
            return self.rational(a.exact**b.exact, a.flags | b.flags)
        return self.apply(_power, a, b, flags=UNEVALUATED)

    def root(self, a: Scalar, degree: Scalar) -> Scalar:
        """The root of a; an odd root of a negative rational is the real one, so ∛-8 is -2."""
        if degree.exact == 2:
            return self.apply(mp.sqrt, a)
        inverse = self.apply(operator.truediv, number(1), degree)
        if a.exact is None or a.exact >= 0 or degree.exact is None or degree.exact % 2 != 1:
            return self.raised(a, inverse)
        return self.apply(operator.neg, self.raised(self.apply(abs, a), inverse))

    def of_naturals(self, exact, approximate, limit: int, *args: Scalar) -> Scalar:
        """n! or a binomial coefficient: exact for natural numbers up to a limit, else at every sample point."""
        if any(a.exact is None for a in args):
            return self.apply(approximate, *args, flags=UNEVALUATED)
        if any(a.exact.denominator != 1 or a.exact < 0 for a in args):
            raise Unreadable("not a natural number")
        if args[0].exact > limit:
            raise TooComplex("too many digits")
        self.spend(int(args[0].exact) // 10 if exact is math.comb else 0)
        flags = UNEVALUATED.union(*(a.flags for a in args))
        return self.rational(Fraction(exact(*(int(a.exact) for a in args))), flags)


def _at_point(f, arguments: tuple):
    """f(*arguments), or None where it is undefined or too large."""
    if f not in _CHEAP and mp.mag(arguments[-1]) > 50:
        return None
    try:
        value = f(*arguments)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError):  # TypeError: comparison of complex numbers
        return None
    parts = (value.real, value.imag)  # each must have an ordinary size: log(1 + 10^{-10^8} i) would take long
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


def apply(f, *args: Scalar) -> Scalar:
    """f of parsed values, within the budget of one expression. Raises Unreadable or TooComplex."""
    return Parser().apply(f, *args)


def parse(text: str) -> Scalar:
    r"""The value of a normalised expression (see `notation.normalise`). Raises Unreadable or TooComplex.

    >>> parse(r"\frac{1}{2}+0.25").exact, same(parse(r"(\sqrt{3}-1)(\sqrt{3}+1)"), parse("2"))
    (Fraction(3, 4), True)
    """
    try:
        return Parser(text).closed("end")
    except ZeroDivisionError as error:
        raise Unreadable("division by zero") from error
