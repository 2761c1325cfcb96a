r"""The value of one expression in TeX or plain text.

A recursive-descent parser computes while it reads: rational numbers exactly, other numbers to 50 digits. A letter has
fixed values at six sample points, and at more integers where ⌊ ⌋ or ⌈ ⌉ is compared. Two expressions are equal when
they agree at every point where one of them is defined. The text is untrusted: there is no `eval`, `sympify` or
`parse_latex`, and limits on tokens, depth, digits and the cost of all operations bound the work. A sum, integral or
limit is not in the grammar: it restates the task.

    sum      = ["-"] product {("+" | "-") product}
    product  = power {["*" | "/" | "÷"] power}                  adjacent factors multiply
    power    = primary {"!" | "°" | "^" exponent}
    primary  = number | letter | f argument | \frac | \sqrt | \binom | "|" sum "|" | ⌊ sum ⌋ | "(" sum ")"
"""

import functools
import hashlib
import itertools
import math
import operator
import random
import re
from contextvars import ContextVar
from dataclasses import dataclass, replace
from fractions import Fraction

import mpmath  # sympy's numeric engine

MAX_TOKENS, MAX_DEPTH = 400, 30
MAX_BITS = 20_000  # numerator and denominator of an exact number; 1000! has 8,530
BUDGET = 1_200  # units of work to read one answer, of about 4 µs each; the golds of the benchmarks take up to 1,000

mp = mpmath.mp.clone()  # a separate context: the precision of mpmath.mp stays as it is
mp.dps = 50
EPSILON = mp.mpf(10) ** -35  # two 50-digit numbers are equal up to this relative difference
TINY = mp.mpf(10) ** -45

POINTS = 6  # sample points: two positive rationals, three integers, a negative rational
RATIONAL, INTEGER, NEGATIVE = (0, 1), (2, 3, 4), (5,)
_FLAGS = ("unevaluated", "rounded", "absolute", "function", "exponential", "real")
UNEVALUATED, ROUNDED, ABSOLUTE, FUNCTION, EXPONENTIAL, REAL = (frozenset([flag]) for flag in _FLAGS)


class Unreadable(ValueError):
    """The text is outside the grammar, or its value is undefined."""


class TooComplex(ValueError):
    """The text has more tokens, levels, digits or operations than the limits allow."""


class Work:
    """The units of work left, and more integers at which letters have a value. `with` makes it the current one."""

    def __init__(self, left: float = BUDGET, steps: tuple[int, ...] = ()):
        self.left, self.steps, self.letters = left, steps, set()  # letters: those read so far

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise TooComplex("too many operations")

    def __enter__(self):
        self.token = WORK.set(self)
        return self

    def __exit__(self, *error):
        WORK.reset(self.token)


WORK = ContextVar("work", default=Work(math.inf))  # noqa: B039  (outside `with` nothing bounds the work)


@dataclass(frozen=True)
class Scalar:
    """The value of an expression. Letters stand for positive numbers, so √x² equals x, unless |…| is applied.

    flags: "unevaluated" (an operation is still to be done: 2+2, 5!, √16), "rounded" (⌊ ⌋ or ⌈ ⌉ of letters: two of
    these are compared at the integers only, unless a letter like x is "real"), "absolute" (|…|: the negative point
    counts too), "function" (sin, log, …), "exponential" (e^…, or letters in an exponent), "infinite" (∞).
    """

    exact: Fraction | None  # None for an irrational or complex constant and for an expression in letters
    values: tuple = ()  # one value for a constant, else POINTS values and more; None where undefined; () if exact
    name: str = ""  # the symbol, if the expression is a single symbol
    flags: frozenset = frozenset()

    @property
    def constant(self) -> bool:
        return len(self.values) < 2

    @functools.cached_property
    def points(self) -> tuple:
        """`values`, or the rational number as one mpmath number, from its first 400 bits."""
        if self.values:
            return self.values
        n, d = self.exact.as_integer_ratio()
        i, k = (max(0, x.bit_length() - 400) for x in (n, d))  # mpmath takes 0.3 ms to strip the zero bits of 2^9999
        return (mp.ldexp(mp.mpf(n >> i) / (d >> k), i - k),)


def number(value: Fraction | int, flags: frozenset = frozenset()) -> Scalar:
    """A rational constant."""
    return Scalar(Fraction(value), flags=flags)


@functools.lru_cache(maxsize=1024)
def letter(name: str, steps: tuple[int, ...] = ()) -> Scalar:
    """A symbol. A hash of the name determines its values, and the order in which it takes those of `steps`."""
    h = hashlib.sha256(name.encode("utf-8", "replace")).digest()
    rational = [mp.mpf(1000 + 256 * h[2 * i] + h[2 * i + 1]) / 7919 for i in range(3)]  # 0.13 … 8.4
    more = map(mp.mpf, random.Random(h).sample(steps, len(steps)))
    points = (*rational[:2], *(mp.mpf(3 + b % 23) for b in h[6:9]), -rational[2], *more)
    return Scalar(None, points, name, REAL if name[:1] in tuple("rtuvwxyz\\") else frozenset())


def close(x, y) -> bool:
    """Whether two mpmath numbers agree to 35 digits."""
    difference = x - y
    return not difference or abs(difference) <= max(EPSILON * max(abs(x), abs(y)), TINY)


def _pairs(a: Scalar, b: Scalar) -> list[tuple]:
    """The values of a and b at the sample points that count for them; None where one of the two is undefined."""
    if a.constant and b.constant:
        return [(a.points[0], b.points[0])]
    steps = "rounded" in a.flags & b.flags
    count = max(len(a.points), len(b.points)) if steps else POINTS
    indices = INTEGER + tuple(range(POINTS, count))
    indices += () if steps and "real" not in a.flags | b.flags else RATIONAL
    indices += NEGATIVE if "absolute" in a.flags | b.flags else ()
    x, y = (s.points * count if s.constant else s.points for s in (a, b))
    WORK.get().spend(len(indices))
    return [(x[i], y[i]) for i in indices if x[i] is not None or y[i] is not None]


def same(a: Scalar, b: Scalar, tolerance: float = 0.0) -> bool:
    """Whether a = b: exactly for rationals, else to 35 digits. For constants |a − b| ≤ tolerance·|b| suffices."""
    if tolerance and a.constant and b.constant:
        return abs(a.points[0] - b.points[0]) <= mp.mpf(tolerance) * abs(b.points[0])
    if a.exact is not None and b.exact is not None:
        return a.exact == b.exact
    pairs = _pairs(a, b)
    return bool(pairs) and all(x is not None and y is not None and close(x, y) for x, y in pairs)


def proportional(a: Scalar, b: Scalar, positive: bool = False, scales: tuple[Scalar, ...] = ()) -> bool:
    """Whether a = c·b at all points, with one c ≠ 0 (c > 0 if `positive`). Then a = 0 and b = 0 are equivalent.

    c may have two of the letters `scales` as factors or divisors.
    """
    pairs = _pairs(a, b)
    if len(pairs) < 2 or any(None in p or (abs(p[0]) < EPSILON) != (abs(p[1]) < EPSILON) for p in pairs):
        return False
    ratios = [x / y for x, y in pairs if abs(y) >= EPSILON]
    if not ratios or (positive and mp.re(ratios[0]) < 0):
        return False
    if all(close(r, ratios[0]) for r in ratios):
        return True
    order = INTEGER + RATIONAL  # of _pairs
    if not 0 < len(scales) < 8 or len(ratios) != len(order):
        return False
    WORK.get().spend(20 * len(scales))
    logs = [[float(mp.log(s.points[i] / s.points[order[0]])) for i in order] for s in scales]
    logs += [[-x for x in row] for row in logs] + [[0.0] * len(order)]
    targets = [complex(mp.log(r / ratios[0])) for r in ratios]  # complex where a ratio has another sign
    pairs = itertools.combinations_with_replacement(logs, 2)
    return any(all(abs(x + y - t) < 1e-12 for x, y, t in zip(*pair, targets, strict=True)) for pair in pairs)


CONSTANTS = {"pi": Scalar(None, (+mp.pi,)), "e": Scalar(None, (+mp.e,)), "i": Scalar(None, (mp.mpc(0, 1),))}
CONSTANTS["infty"] = replace(letter("\\infty"), name="", flags=frozenset(["infinite"]))  # equal to itself only
_NAMES = "sin cos tan cot sec csc asin acos atan sinh cosh tanh log exp"
FUNCTIONS = {name: getattr(mp, name) for name in _NAMES.split()}
FUNCTIONS |= {"arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "ln": mp.log, "lg": mp.log10}
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
CLOSING = {"(": ")", "[": "]", "{": "}"}
ROUND = {"lfloor": lambda x: mp.floor(mp.mpf(x) + EPSILON), "lceil": lambda x: mp.ceil(mp.mpf(x) - EPSILON)}
_RATIONAL_OPERATIONS = (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, abs)
_WEIGHTS = dict.fromkeys(_RATIONAL_OPERATIONS, 1) | dict.fromkeys((mp.sqrt, mp.log, mp.log10, *ROUND.values()), 3)
_OTHER_WEIGHT = 6  # units of work at one point for a sine and the like
_TOKEN = re.compile(
    r" *(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|\\?(?P<word>sqrt|pi|infinity|infty|inf|" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)) + r")(?![A-Za-z])"
    r"|(?P<symbol>(?:\\(?:angle|triangle) *(?:[A-Z] *(?:_ *(?:\{[^{}]*\}|\w))? *){1,4}"  # ∠ABC is one symbol
    r"|\\(?:dot|ddot|hat|bar|vec|overrightarrow|tilde|overline|widehat) *(?:\{[^{}]*\}|[A-Za-z]|\\[a-z]+)"
    r"|\\text *\{ *[A-Za-z] *\}|[A-Z]{4,}|[A-Za-z]|\\(?:hbar|ell|alpha|beta|gamma|delta|epsilon|zeta|eta|"
    r"theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|"
    r"Upsilon|Phi|Psi|Omega)(?![A-Za-z]))"
    r"(?: *_ *(?:\{[^{}]*\}|[A-Za-z0-9]|\\[a-z]+)| *')*)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<sign>[-+*/÷^_!|()\[\]{}°]))"
)
_ARGUMENT = re.compile(
    r" *\( *(?:(?P<letter>[A-Za-z]|\\[a-z]+)|(?P<number>[0-9]+)|(?:[A-Za-z0-9.-]+|\\[a-z]+)"
    r"(?: *, *(?:[A-Za-z0-9.-]+|\\[a-z]+))+) *\)"
)
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
            value = value.replace("'", "") + "'" * value.count("'")
            argument = _ARGUMENT.match(text, i)  # f(x) and I(0) are symbols; x(x+1), n(n) and a(2) are products
            if (
                argument
                and (argument["number"] in (None, "0") or value in "fghFGHIPVQuvy")
                and argument["letter"] != value
            ):
                shown = "" if value[-1] == "'" and argument["letter"] else argument[0].replace(" ", "")  # x'(t) is x'
                value, i = value + ("_0" if shown == "(0)" else shown), argument.end()  # I(0) is I_0
        elif kind == "sign" or value in ("rfloor", "rceil"):
            kind = value
        tokens.append((kind, value))
    return tokens


class Parser:
    """Reads one expression. Every method named after a part of the grammar reads that part and returns its value."""

    def __init__(self, text: str = ""):
        self.tokens, self.i, self.depth = [*tokenize(text), ("end", "")], 0, 0
        self.work = WORK.get()
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
        self.work.spend(1)
        if self.depth > MAX_DEPTH:
            raise TooComplex("too deeply nested")
        kind, text = self.next()
        if kind == "number":  # 12, 1.25, .5 or 3e-8
            exponent = text.lower().partition("e")[2]
            if len(exponent) > 5 or abs(int(exponent or 0)) > 5000:
                raise TooComplex("too many digits")
            value = self.rational(Fraction(text), frozenset())
        elif kind == "symbol":
            value = CONSTANTS[text] if text in ("e", "i") else letter(text, self.work.steps)
            self.work.letters.add(text)
        elif kind in CLOSING:
            value = self.closed(CLOSING[kind])
        elif kind == "|":
            value = self.closed("|", in_bars=True)
            value = self.apply(abs, value, flags=UNEVALUATED | FUNCTION if value.constant else ABSOLUTE)
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
        value = self.apply(f, value, flags=EXPONENTIAL if name == "exp" else FUNCTION)
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
        weight = _WEIGHTS.get(f, _OTHER_WEIGHT)
        self.work.spend(2 + count * weight)
        columns = zip(*(a.points * count if a.constant else a.points for a in args), strict=True)
        points = tuple(_at_point(f, column, weight >= _OTHER_WEIGHT) for column in columns)
        self.work.spend(sum(2 * weight for p in points if isinstance(p, mp.mpc)))
        if all(p is None for p in points):
            raise Unreadable("undefined")
        return Scalar(None, points, flags=flags)

    def rational(self, value: Fraction, flags: frozenset) -> Scalar:
        bits, below = value.numerator.bit_length(), value.denominator.bit_length()
        if bits + below > MAX_BITS:
            raise TooComplex("too many digits")
        self.work.spend(2 + bits // 2000 + bits * below // 10**6)  # the greatest common divisor
        return number(value, flags)

    def raised(self, a: Scalar, b: Scalar) -> Scalar:
        if a.exact is not None and b.exact is not None and b.exact.denominator == 1:
            if abs(b.exact) * max(a.exact.numerator.bit_length(), a.exact.denominator.bit_length()) > MAX_BITS:
                raise TooComplex("too many digits")
            return self.rational(a.exact**b.exact, a.flags | b.flags)
        flags = UNEVALUATED | (EXPONENTIAL if a == CONSTANTS["e"] or not b.constant else frozenset())
        turns = b.constant and abs(mp.im(b.points[0])) > 2.001 * mp.pi  # e^{11πi/2} is not worked out
        return self.apply(_power, a, b, flags=flags | FUNCTION if turns else flags)

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
        self.work.spend(int(args[0].exact) // 10 if exact is math.comb else 0)
        flags = UNEVALUATED.union(*(a.flags for a in args))
        return self.rational(Fraction(exact(*(int(a.exact) for a in args))), flags)


def _at_point(f, arguments: tuple, costly: bool):
    """f(*arguments), or None where an argument is None, or the value is undefined or too large."""
    try:
        if costly and mp.mag(arguments[-1]) > 50:
            return None
        value = f(*arguments)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError):  # TypeError: None, or an order of complex numbers
        return None
    parts = (value._mpf_,) if isinstance(value, mp.mpf) else value._mpc_
    # each must have an ordinary size: log(1 + 10^{-10^8} i) would take long; ∞ has no digits, and an exponent
    return value if all(abs(e + bits) < MAX_BITS if digits else not e for _, digits, e, bits in parts) else None


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


_WEIGHTS |= {_factorial: 15, _binomial: 40}


def apply(f, *args: Scalar) -> Scalar:
    """f of parsed values, within the current budget. Raises Unreadable or TooComplex."""
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
