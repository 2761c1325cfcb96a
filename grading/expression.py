r"""The value of one expression in TeX or plain text.

A recursive-descent parser computes while it reads: rational numbers exactly, other numbers to 50 digits. A letter has
fixed values at six sample points, and at more integers where ⌊ ⌋ or ⌈ ⌉ is compared. Two expressions are equal when
they agree at every point where one of them is defined. The text is untrusted: there is no `eval`, `sympify` or
`parse_latex`, and limits on tokens, depth, digits and the cost of all operations bound the work. A sum, integral or
limit is not in the grammar: it restates the task.

    sum      = ["-"] product {("+" | "-") product}
    product  = power {["*" | "/" | "÷"] power}                  adjacent factors multiply
    power    = postfixed {("⨯" | "•" | "⊗") postfixed}          products of vectors and matrices
    postfixed = primary {"!" | "°" | "^" exponent}
    primary  = number | letter ["(" sum ")"] | f argument | \frac | \sqrt | \binom | "|" sum "|" | ⌊ sum ⌋
             | "(" sum ")"
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

MAX_TOKENS = 400
MAX_DEPTH = 30
MAX_BITS = 20_000  # numerator and denominator of an exact number; 1000! has 8,530
BUDGET = 1_200  # units of work to read one answer, of about 4 µs each; the golds of the benchmarks take up to 1,000

mp = mpmath.mp.clone()  # a separate context: the precision of mpmath.mp stays as it is
mp.dps = 50
EPSILON = mp.mpf(10) ** -35  # two 50-digit numbers are equal up to this relative difference
TINY = mp.mpf(10) ** -45

# The sample points: two positive rationals, three integers, a negative rational.
POINTS = 6
RATIONAL = (0, 1)
INTEGER = (2, 3, 4)
NEGATIVE = (5,)

# The flags of a Scalar, see there.
UNEVALUATED = frozenset(["unevaluated"])
ROUNDED = frozenset(["rounded"])
ABSOLUTE = frozenset(["absolute"])
FUNCTION = frozenset(["function"])
EXPONENTIAL = frozenset(["exponential"])
REAL = frozenset(["real"])
INFINITE = frozenset(["infinite"])


class Unreadable(ValueError):
    """The text is outside the grammar, or its value is undefined."""


class TooComplex(ValueError):
    """The text has more tokens, levels, digits or operations than the limits allow."""


class Work:
    """A budget of work, and more integers at which letters have a value. `with` makes it the current budget."""

    def __init__(self, left: float = BUDGET, steps: tuple[int, ...] = ()):
        self.left = left  # units of work
        self.steps = steps
        self.letters = set()  # those read so far

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
        # Only the first bits: mpmath takes 0.3 ms to strip the zero bits of 2^9999.
        n, d = self.exact.as_integer_ratio()
        below_n = max(0, n.bit_length() - 400)
        below_d = max(0, d.bit_length() - 400)
        ratio = mp.mpf(n >> below_n) / (d >> below_d)
        return (mp.ldexp(ratio, below_n - below_d),)


def number(value: Fraction | int, flags: frozenset = frozenset()) -> Scalar:
    """A rational constant."""
    return Scalar(Fraction(value), flags=flags)


@functools.lru_cache(maxsize=1024)
def letter(name: str, steps: tuple[int, ...] = ()) -> Scalar:
    """A symbol. A hash of the name determines its values, and the order in which it takes those of `steps`."""
    h = hashlib.sha256(name.encode("utf-8", "replace")).digest()
    rational = [mp.mpf(1000 + 256 * h[2 * i] + h[2 * i + 1]) / 7919 for i in range(3)]  # 0.13 … 8.4
    integers = [mp.mpf(3 + byte % 23) for byte in h[6:9]]
    more = map(mp.mpf, random.Random(h).sample(steps, len(steps)))
    points = (*rational[:2], *integers, -rational[2], *more)
    return Scalar(None, points, name, REAL if name[:1] in tuple("rtuvwxyz\\") else frozenset())


def close(x, y) -> bool:
    """Whether two mpmath numbers agree to 35 digits."""
    difference = x - y
    return not difference or abs(difference) <= max(EPSILON * max(abs(x), abs(y)), TINY)


def _pairs(a: Scalar, b: Scalar) -> list[tuple]:
    """The values of a and b at the sample points that count for them; None where one of the two is undefined."""
    if a.constant and b.constant:
        return [(a.points[0], b.points[0])]
    flags = a.flags | b.flags
    steps = "rounded" in a.flags & b.flags
    count = max(len(a.points), len(b.points)) if steps else POINTS
    indices = [*INTEGER, *range(POINTS, count)]
    if not steps or "real" in flags:
        indices += RATIONAL
    if "absolute" in flags:
        indices += NEGATIVE
    WORK.get().spend(len(indices))
    x = a.points * count if a.constant else a.points
    y = b.points * count if b.constant else b.points
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
    if len(pairs) < 2:
        return False
    ratios = []
    for x, y in pairs:
        if x is None or y is None or (abs(x) < EPSILON) != (abs(y) < EPSILON):
            return False  # undefined, or only one of the two is zero
        if abs(y) >= EPSILON:
            ratios.append(x / y)
    if not ratios or (positive and mp.re(ratios[0]) < 0):
        return False
    if all(close(r, ratios[0]) for r in ratios):
        return True
    # The ratios vary like a product of two letters or their inverses: a sum of two rows of logarithms.
    order = INTEGER + RATIONAL  # of _pairs
    if not 0 < len(scales) < 8 or len(ratios) != len(order):
        return False
    WORK.get().spend(20 * len(scales))
    logs = [[float(mp.log(s.points[i] / s.points[order[0]])) for i in order] for s in scales]
    inverses = [[-x for x in row] for row in logs]
    rows = [*logs, *inverses, [0.0] * len(order)]
    targets = [complex(mp.log(r / ratios[0])) for r in ratios]  # complex where a ratio has another sign
    for first, second in itertools.combinations_with_replacement(rows, 2):
        if all(abs(x + y - t) < 1e-12 for x, y, t in zip(first, second, targets, strict=True)):
            return True
    return False


CONSTANTS = {"pi": Scalar(None, (+mp.pi,)), "e": Scalar(None, (+mp.e,)), "i": Scalar(None, (mp.mpc(0, 1),))}
CONSTANTS["infty"] = replace(letter("\\infty"), name="", flags=INFINITE)  # equal to itself only
_NAMES = "sin cos tan cot sec csc asin acos atan sinh cosh tanh log exp"
FUNCTIONS = {name: getattr(mp, name) for name in _NAMES.split()}
FUNCTIONS |= {"arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "ln": mp.log, "lg": mp.log10}
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
CLOSING = {"(": ")", "[": "]", "{": "}"}
ROUND = {"lfloor": lambda x: mp.floor(mp.mpf(x) + EPSILON), "lceil": lambda x: mp.ceil(mp.mpf(x) - EPSILON)}
_RATIONAL_OPERATIONS = (operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, abs)
_WEIGHTS = dict.fromkeys(_RATIONAL_OPERATIONS, 1) | dict.fromkeys((mp.sqrt, mp.log, mp.log10, *ROUND.values()), 3)
_OTHER_WEIGHT = 6  # units of work at one point for a sine and the like
TOKEN = re.compile(
    r" *(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|\\?(?P<word>sqrt|pi|infinity|infty|inf|" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)) + r")(?![A-Za-z])"
    r"|(?P<symbol>(?:(?:[fghFG]|\\(?:Phi|phi|Gamma)) *\^ *\{ *-1 *\}(?= *\()"  # an inverse function
    r"|d *(?:[mp-zA-Z]|\\(?:alpha|theta|lambda|mu|xi|rho|sigma|tau|phi|omega)(?![A-Za-z]))"  # x dy
    r"|(?<![^ ])d[a-cf-hj-ln](?![A-Za-z])|\\text *\{ *[A-Za-z]{2,} *\}(?= *(?:_ *\{?\w\}? *)?\()"  # db, Li_2(x)
    r"|\\(?:angle|triangle) *(?:[A-Z] *(?:_ *(?:\{[^{}]*\}|\w))? *){1,4}"  # ∠ABC is one symbol
    r"|\\(?:dot|ddot|hat|bar|vec|overrightarrow|tilde|overline|widehat) *(?:\{[^{}]*\}|[A-Za-z]|\\[a-z]+)"
    r"|\\text *\{ *[A-Za-z] *\}|[A-Z]{4,}|[A-Za-z]|\\(?:hbar|ell|alpha|beta|gamma|delta|epsilon|zeta|eta|"
    r"theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|"
    r"Upsilon|Phi|Psi|Omega)(?![A-Za-z]))"
    r"(?: *_ *(?:\{[^{}]*\}|[A-Za-z0-9]|\\[a-z]+)| *')*)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<sign>[-+*/÷⨯•⊗^_!|()\[\]{}°]))"
)
_ARGUMENT = re.compile(
    r" *\( *(?:(?P<letter>[A-Za-z]|\\[a-z]+)|0|(?:[A-Za-z0-9.-]+|\\[a-z]+)"
    r"(?: *, *(?:[A-Za-z0-9.-]+|\\[a-z]+))+) *\)"
)
_CALL = re.compile(  # of a symbol, "@" and the text behind it, whose bracket holds its argument; h(a+b) is a product
    r"(?:[fu]|\\zeta|\\Gamma|\\delta|[A-Za-z]{2,}|[^@]*\^-1)(?:_[^@]*|'*)@ *\("
    r"|(?![ei]@)(?P<any>[^@]*)@ *\( *-?[0-9.]+ *(?:(?!(?P=any))[a-z])? *\)"  # a(2) and p(2x)
    r"|(?P<name>(?:[ghFGHIJKPQVWYvyLTUB]|\\)[^@]*)@ *\((?![^()]*(?P=name)) *-?[^()+-]+\)"
)
_LONG_WORD = re.compile(r"(?=[A-Z]*[a-z])[A-Za-z]{4}")


def tokenize(text: str) -> list[tuple[str, str]]:
    """[(kind, text)], where kind is number, symbol, command or the sign itself. Raises Unreadable or TooComplex."""
    tokens = []
    i = 0
    text = text.rstrip()
    while i < len(text):
        match = TOKEN.match(text, i)
        if not match:
            raise Unreadable(f"unknown: {text[i : i + 10]!r}")
        if len(tokens) == MAX_TOKENS:
            raise TooComplex("too many tokens")
        kind = match.lastgroup
        value = match[kind]
        i = match.end()
        if kind == "word":
            kind = "command"
            if value in ("inf", "infinity"):
                value = "infty"
        elif kind == "symbol":
            if _LONG_WORD.match(text, match.start(kind)):
                raise Unreadable("a word")
            value = re.sub(r"\\text|[{} ]", "", value)
            value = value.replace("'", "") + "'" * value.count("'")
            argument = _ARGUMENT.match(text, i)
            if argument and argument["letter"] != value:  # f(x), C(5,2) and I(0); x(x) is a product
                i = argument.end()
                shown = argument[0].replace(" ", "")
                if shown == "(0)":
                    value += "_0"  # I(0) is I_0
                elif value[-1] != "'" or not argument["letter"]:  # x'(t) is x'
                    value += shown
            elif _CALL.match(value + "@" + text[i:]):
                kind = "call"
        elif kind == "sign" or value in ("rfloor", "rceil"):
            kind = value
        tokens.append((kind, value))
    return tokens


class Parser:
    """Reads one expression. Every method named after a part of the grammar reads that part and returns its value."""

    def __init__(self, text: str):
        self.tokens = [*tokenize(text), ("end", "")]
        self.i = 0
        self.depth = 0
        self.work = WORK.get()
        self.in_bars = False  # inside |…|
        self.in_angle = False  # inside the argument of a trigonometric function

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
            value = apply(operation, value, self.signed(self.product), flags=UNEVALUATED)
        return value

    def signed(self, part) -> Scalar:
        """A part that may have its own minus sign, as in 3*-2, 2^-1 and 1--2."""
        return apply(operator.neg, part()) if self.accept("-") else part()

    def product(self) -> Scalar:
        value = self.power()
        while True:
            if self.kind in ("/", "÷"):
                flags = UNEVALUATED if self.next()[0] == "÷" else frozenset()
                value = apply(operator.truediv, value, self.signed(self.power), flags=flags)
            elif self.accept("*") or self.starts_factor():
                value = times(value, self.signed(self.power))
            else:
                return value

    def starts_factor(self) -> bool:
        if self.kind == "number":  # (n-2) 2^n, but not 3 5
            return self.tokens[self.i - 1][0] in (")", "]", "symbol")
        return self.kind in ("symbol", "call", "(", "[", "{", "command") or (self.kind == "|" and not self.in_bars)

    def power(self) -> Scalar:
        value = self.postfixed()
        while self.kind in "⨯•⊗":
            value = multiplied(self.next()[0], value, self.postfixed())
        return value

    def postfixed(self) -> Scalar:
        value = self.primary()
        while True:
            if self.accept("!"):
                value = of_naturals(math.factorial, _factorial, 2100, value)
            elif self.accept("°"):
                value = apply(mp.radians, value) if self.in_angle else value
            elif self.accept("^"):
                value = raised(value, self.argument(self.exponent))
            else:
                return value

    def exponent(self) -> Scalar:  # 2^3^2 is 2^9
        value = self.signed(self.primary)
        return raised(value, self.argument(self.exponent)) if self.accept("^") else value

    def argument(self, unbraced) -> Scalar:
        """A braced group, or the part that the method `unbraced` reads."""
        return self.closed("}") if self.accept("{") else unbraced()

    def closed(self, closing: str, in_bars: bool = False) -> Scalar:
        """A sum and the closing bracket, bar or end of text after it."""
        before = self.in_bars
        self.in_bars = in_bars
        value = self.sum()
        self.in_bars = before
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
            value = rational(Fraction(text), frozenset())
        elif kind == "symbol":
            value = CONSTANTS[text] if text in ("e", "i") else letter(text, self.work.steps)
            self.work.letters.add(text)
        elif kind == "call":
            value = self.called(text)
        elif kind in CLOSING:
            value = self.closed(CLOSING[kind])
        elif kind == "|":
            value = self.closed("|", in_bars=True)
            value = apply(abs, value, flags=UNEVALUATED | FUNCTION if value.constant else ABSOLUTE)
        elif text in ("pi", "infty"):
            value = CONSTANTS[text]
        elif text == "frac":
            value = apply(operator.truediv, self.argument(self.digit), self.argument(self.digit))
        elif text == "binom":
            value = of_naturals(math.comb, _binomial, 5000, self.argument(self.digit), self.argument(self.digit))
        elif text == "sqrt":
            degree = self.closed("]") if self.accept("[") else number(2)
            value = root(self.argument(self.primary), degree)
        elif text in ROUND:
            value = self.closed("r" + text[1:], self.in_bars)
            value = apply(ROUND[text], value, flags=UNEVALUATED if value.constant else ROUNDED)
        elif text in FUNCTIONS:
            value = self.call(text)
        else:
            raise Unreadable(f"unexpected {kind} {text}")
        if kind == "command" and text not in ("pi", "infty", "frac"):
            value = replace(value, flags=value.flags | UNEVALUATED)
        self.depth -= 1
        return value

    def called(self, name: str) -> Scalar:
        """ζ(3) or f(2x): a symbol for the name and the value of the argument, so it equals ζ(6/2) and no multiple."""
        self.next()
        argument = self.closed(")")
        self.work.spend(10 * len(argument.points))
        shown = argument.exact or [mp.nstr(point, 30) for point in argument.points]
        value = letter(f"{name}({shown})", self.work.steps)
        return value if argument.constant else replace(value, name="")

    def call(self, name: str) -> Scalar:
        r"""\sin^2 x, \log_2 8, \cos 2\pi t, \ln(x). An argument without brackets ends at the next sign or function."""
        f = FUNCTIONS[name]
        base = self.argument(self.primary) if name == "log" and self.accept("_") else None
        power = self.argument(self.exponent) if self.accept("^") else None
        if power and power.exact == -1 and name in TRIGONOMETRIC:  # the inverse function
            power = None
            f = FUNCTIONS.get("arc" + name)
            if f is None:
                raise Unreadable(f"\\{name}^{{-1}}")
        before = self.in_angle
        self.in_angle = before or name in TRIGONOMETRIC
        bracketed = self.kind in ("(", "[", "{", "|")
        value = self.primary() if bracketed else self.power()
        while not bracketed and (self.kind == "symbol" or self.tokens[self.i][1] in ("pi", "frac", "sqrt")):
            value = times(value, self.power())
        self.in_angle = before
        value = apply(f, value, flags=EXPONENTIAL if name == "exp" else FUNCTION)
        if base:
            value = apply(operator.truediv, value, apply(mp.log, base))
        return raised(value, power) if power else value


def times(a: Scalar, b: Scalar) -> Scalar:
    """a·b, which is "unevaluated" unless one factor is a power of ten, as in 4.5 * 10^{33}."""
    if a.exact is not None and b.exact is not None:
        low, high = sorted((abs(b.exact.numerator), b.exact.denominator))
        if low == 1 < high == 10 ** round(math.log10(high)):
            return apply(operator.mul, a, b)
    return apply(operator.mul, a, b, flags=UNEVALUATED)


def multiplied(sign: str, a: Scalar, b: Scalar) -> Scalar:
    """a⨯b, a•b or a⊗b, the products of vectors and of matrices: no products of values, but bilinear.

    ⨯ is antisymmetric, • is symmetric, and ⊗ is neither: the values of one factor belong to the next sample point.
    """
    if a.constant or b.constant:
        raise Unreadable("a number in a product of vectors")
    turned = [replace(factor, values=factor.values[1:] + factor.values[:1]) for factor in (a, b)]
    product = apply(operator.mul, a, turned[1])
    swapped = apply(operator.mul, turned[0], b)
    if sign == "⊗":
        return product
    return apply(operator.sub if sign == "⨯" else operator.add, product, swapped)


def apply(f, *args: Scalar, flags: frozenset = frozenset()) -> Scalar:
    """f of scalars, with `flags` and the arguments' flags; exact on rationals. Raises Unreadable or TooComplex."""
    flags = flags.union(*(a.flags for a in args))
    if "infinite" in flags and f is not operator.neg:
        raise Unreadable("arithmetic with infinity")
    work = WORK.get()
    if f in _RATIONAL_OPERATIONS and all(a.exact is not None for a in args):
        return rational(f(*(a.exact for a in args)), flags)
    count = max(len(a.points) for a in args)
    weight = _WEIGHTS.get(f, _OTHER_WEIGHT)
    work.spend(2 + count * weight)
    columns = zip(*(a.points * count if a.constant else a.points for a in args), strict=True)
    points = tuple(_at_point(f, column, weight >= _OTHER_WEIGHT) for column in columns)
    work.spend(sum(2 * weight for p in points if isinstance(p, mp.mpc)))
    if all(p is None for p in points):
        raise Unreadable("undefined")
    return Scalar(None, points, flags=flags)


def rational(value: Fraction, flags: frozenset) -> Scalar:
    """A rational constant with its flags. Raises TooComplex if it has more than MAX_BITS."""
    bits = value.numerator.bit_length()
    below = value.denominator.bit_length()
    if bits + below > MAX_BITS:
        raise TooComplex("too many digits")
    WORK.get().spend(2 + bits // 2000 + bits * below // 10**6)  # the greatest common divisor
    return number(value, flags)


def raised(a: Scalar, b: Scalar) -> Scalar:
    """a^b. Raises Unreadable or TooComplex."""
    if a.exact is not None and b.exact is not None and b.exact.denominator == 1:
        bits = max(a.exact.numerator.bit_length(), a.exact.denominator.bit_length())
        if abs(b.exact) * bits > MAX_BITS:
            raise TooComplex("too many digits")
        return rational(a.exact**b.exact, a.flags | b.flags)
    flags = UNEVALUATED
    if a == CONSTANTS["e"] or not b.constant:
        flags |= EXPONENTIAL
    if b.constant and abs(mp.im(b.points[0])) > 2.001 * mp.pi:
        flags |= FUNCTION  # e^{11πi/2} is not worked out
    return apply(_power, a, b, flags=flags)


def root(a: Scalar, degree: Scalar) -> Scalar:
    """The root of a; an odd root of a negative rational is the real one, so ∛-8 is -2."""
    if degree.exact == 2:
        return apply(mp.sqrt, a)
    inverse = apply(operator.truediv, number(1), degree)
    if a.exact is None or a.exact >= 0 or degree.exact is None or degree.exact % 2 != 1:
        return raised(a, inverse)
    return apply(operator.neg, raised(apply(abs, a), inverse))


def of_naturals(exact, approximate, limit: int, *args: Scalar) -> Scalar:
    """n! or a binomial coefficient: exact for natural numbers up to a limit, else at every sample point."""
    if any(a.exact is None for a in args):
        return apply(approximate, *args, flags=UNEVALUATED)
    if any(a.exact.denominator != 1 or a.exact < 0 for a in args):
        raise Unreadable("not a natural number")
    if args[0].exact > limit:
        raise TooComplex("too many digits")
    naturals = [int(a.exact) for a in args]
    if exact is math.comb:
        WORK.get().spend(naturals[0] // 10)
    flags = UNEVALUATED.union(*(a.flags for a in args))
    return rational(Fraction(exact(*naturals)), flags)


def _at_point(f, arguments: tuple, costly: bool):
    """f(*arguments), or None where an argument is None, or the value is undefined or too large."""
    try:
        if costly and mp.mag(arguments[-1]) > 50:
            return None
        value = f(*arguments)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError):  # TypeError: None, or an order of complex numbers
        return None
    # Each part must have an ordinary size: log(1 + 10^{-10^8} i) would take long. ∞ has no digits, and an exponent.
    parts = (value._mpf_,) if isinstance(value, mp.mpf) else value._mpc_
    for _, digits, exponent, bits in parts:
        ordinary = abs(exponent + bits) < MAX_BITS if digits else not exponent
        if not ordinary:
            return None
    return value


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


def parse(text: str) -> Scalar:
    r"""The value of a normalised expression (see `notation.normalise`). Raises Unreadable or TooComplex.

    >>> parse(r"\frac{1}{2}+0.25").exact, same(parse(r"(\sqrt{3}-1)(\sqrt{3}+1)"), parse("2"))
    (Fraction(3, 4), True)
    """
    try:
        return Parser(text).closed("end")
    except ZeroDivisionError as error:
        raise Unreadable("division by zero") from error
