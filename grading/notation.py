r"""One spelling for texts that look the same: Unicode signs, TeX commands, spacing, thousands separators, units.

The functions rewrite strings of at most a thousand characters; `answers.py` parses the result. The order of the
rewrites matters: delimiters and spacing, then single commands, then constructs of several commands.
"""

import functools
import re
import unicodedata

_SIGNS = {  # Unicode look-alikes
    **dict.fromkeys("−–—‐‑﹣", "-"), **dict.fromkeys("×·⋅∙∗", "*"), **dict.fromkeys("⁄∕", "/"), "∶": ":", "∣": "|",
    **dict.fromkeys("′’", "'"), **dict.fromkeys("⟨〈", "("), **dict.fromkeys("⟩〉", ")"), "⩽": "≤", "⩾": "≥", "º": "°",
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∅": r"\{\}", "ℝ": r"\R ", "∠": r"\angle ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
}  # fmt: skip
for _letter in "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩ":
    _name = unicodedata.name(_letter).split()[-1]
    _SIGNS[_letter] = f"\\{_name.lower() if _letter.islower() else _name.title()} "
_SIGNS = str.maketrans(_SIGNS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_WIDE = re.compile("[\uff01-\uff5e\U0001d400-\U0001d7ff½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞\u3000\xa0\u2000-\u200a]")  # full-width, bold, …

_COMMANDS = {command: sign for commands, sign in (  # TeX command -> its normal spelling, "" for an appearance
    ("boxed fbox left right displaystyle textstyle limits underline mathbf boldsymbol bm mathit mathcal bf it rm", ""),
    ("big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr", ""), ("quad qquad", " "),
    ("dfrac tfrac cfrac", r"\frac"), ("dbinom tbinom", r"\binom"), ("circ degree degrees", "°"), ("prime", "'"),
    ("leqslant leq le", "≤"), ("geqslant geq ge", "≥"), ("lt", "<"), ("gt", ">"), ("neq ne", "≠"), ("in", "∈"),
    ("approx simeq", "≈"), ("cup", "∪"), ("pm", "±"), ("mp", "∓"), ("times cdot ast", "*"), ("div", "÷"),
    ("vert lvert rvert mid", "|"), ("langle", "("), ("rangle", ")"), ("lbrace", r"\{"), ("rbrace", r"\}"),
    ("colon", ":"), ("emptyset varnothing", r"\{\}"), ("R", r"(-\infty ,\infty )"), ("varepsilon", r"\epsilon "),
    ("varphi", r"\phi "), ("vartheta", r"\theta "), ("varrho", r"\rho "), ("varsigma", r"\sigma "),
    ("textbf textrm textit textnormal textsf texttt mbox operatorname emph mathrm mathsf mathtt mathnormal", r"\text"),
) for command in commands.split()}  # fmt: skip
_COMMAND = re.compile(rf"\\({'|'.join(sorted(_COMMANDS, key=len, reverse=True))})(?![A-Za-z])")
_REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\(?:mathbf|boldsymbol|bm|mathcal|mathit) *\{ *([A-Za-z]) *\}", r"\1 "),
    (r"\\(?:text)?color *\{[^{}]*\}|\bm *(?=\\angle)", ""),
    (r"\\phantom *(?:\{[^{}]*\}|[^{}\\ ])|\\hspace\{[^{}]*\}|np\.|(?<=\\\\)\[[-0-9. a-z]*\]", ""),  # \\[4pt] ends a row
    (r"(?<=[0-9])(?:,\\! ?|\{,\})(?=[0-9]{3})|(?<!\\)\\!", ""),  # 10,\!080 and 10{,}080
    (r"(?<!\\)(?:\\[()\[\]]|\$)", ""),  # \( \) \[ \] and $ delimit
    (r"(?<!\\)((?:\\\\)*)\\[,;:> \n]", r"\1 "), (r"~|[\s\u200b]+", " "), (r"\\%", "%"), (r"\*\*", "^"),
    (r"\\mathbb *(?:\{ *R *\}|R)", r"\\R "),
)]  # fmt: skip
_REWRITES_AFTER = [(re.compile(pattern), new) for pattern, new in (
    (r"\\text\*? *\{(?! *[A-Za-z] *\})((?:[^{}A-Za-z]|\b(?:and|or|[A-Z])\b)*)\}", r" \1 "),  # \text{ and }, \text{(C)}
    *[(r"(\\text *\{[^{}]*)\^ *\{ *(-?[0-9]) *\}", r"\1^\2")] * 3, (r"^ *\\text *\{([^{}]*[0-9][^{}]*)\} *$", r"\1"),
    (r"\\text\*? *\{ *(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp) *\}", r"\\\1 "),
    (r"(?<![0-9])(?<![0-9] )\\text *\{ *([A-Z]{2,}) *\}", r"\1 "),
    (r"\\text *\{ *([0-9A-F]+) *\}(?= *_)", r"\1"), (r"_ *\{ *\\text *\{([^{}]*)\} *\}", r"_{\1}"),
    (r"\\text *\{ *\(? *base[ -]*(\w+) *\)? *\}", r"_{\1}"),
    (r"\\text *\{ *([ie]) *\}", r"\1 "), (r"\^ *\{ *(°|'+) *\}|\^ *(°|')", r"\1\2"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"<=", "≤"), (r">=", "≥"), (r"(?<= )!=", "≠"), (r"\+/?-(?=[ 0-9.\\(])", "±"), (r"(?<![\\A-Za-z])\{ *\}", ""),
)]  # fmt: skip
_DIGITS_IN_THREES = r"(?:(?:,[0-9]{3})+(?![0-9]|,[0-9])|(?: [0-9]{3})+(?! ?[0-9]))"
_THOUSANDS = re.compile(r"(?<![0-9.,])(?<![0-9.,] )[0-9]{1,3}" + _DIGITS_IN_THREES)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*) *\\overline *\{ *([0-9]{1,50}) *\}")
_FRACTION = r"(?:\\frac *(?:\{ *([0-9]+) *\}|([0-9])) *(?:\{ *([0-9]+) *\}|([0-9]))| ([0-9]+)/([0-9]+))"
_MIXED = re.compile(r"\\[A-Za-z]+ *[0-9]*|(?<![0-9.^_])([0-9]{1,50}) *" + _FRACTION)  # \sqrt2\frac12 is a product
UNITS = {word: unit for unit, words in {  # spelling -> unit
    "$": "dollar dollars usd", "cent": "cent cents ¢", "%": "percent", "°": "degree degrees deg", "rad": "radians",
    "mm": "mm millimeters", "cm": "cm centimeter centimeters", "m": "m meter meters", "km": "km kilometer kilometers",
    "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yards", "mi": "mi mile miles", "mi/h": "mph",
    "g": "g gram grams", "kg": "kg kilogram kilograms", "lb": "lb lbs pound pounds", "oz": "oz ounce ounces",
    "s": "s sec second seconds", "min": "min minute minutes", "h": "h hr hour hours", "day": "day days",
    "week": "week weeks", "month": "month months", "year": "year years", "L": "l liter liters", "mL": "ml milliliters",
    "N": "newton newtons", "J": "joule joules", "K": "kelvin", "Hz": "hz", "V": "volts", "W": "watts",
}.items() for word in words.split()}  # fmt: skip


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """The normal spelling of an answer: plain signs, single spaces, few TeX commands, no final full stop."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
        text = re.sub("(?<=[0-9])(?=[½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", " ", text)  # 3½ is not 31/2
        text = _WIDE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text.translate(_SIGNS)).translate(_SIGNS)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _COMMAND.sub(lambda m: _COMMANDS[m[1]], text)
    for pattern, new in _REWRITES_AFTER:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):  # within brackets a comma separates
        text = _THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)
    text = _MIXED.sub(_fraction_of_mixed, _REPEATING.sub(_fraction_of_period, text))
    return re.sub("  +", " ", text).rstrip(" .,;:\\").lstrip(" ,;:")


def _fraction_of_mixed(match: re.Match) -> str:
    r"""1\frac{4}{5} and 1 4/5 become \frac{9}{5}. The fraction must be proper."""
    whole, numerator, denominator = [int(digits) for digits in match.groups() if digits] or (0, 0, 0)
    if not 0 < numerator < denominator:
        return match[0]
    return rf"\frac{{{whole * denominator + numerator}}}{{{denominator}}}"


def _fraction_of_period(match: re.Match) -> str:
    r"""0.1\overline{6} becomes (16 − 1)/90."""
    whole, fixed, period = match.groups()
    numerator = int(whole + fixed + period) - int(whole + fixed or "0")
    return rf"\frac{{{numerator}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


def canonical_unit(text: str) -> str:
    """The name of a unit: "cm^2" for "square cm" and "centimeters^{2}", "?apple" for the unknown word "apples"."""
    text = re.sub(r"\\text|[{}() ]|\\(?=\$)", " ", text).strip().lower()
    text = re.sub(r"\bsq(?:uare)? +([a-z]+)", r"\1^2", re.sub(r"\bcu(?:bic)? +([a-z]+)", r"\1^3", text))
    parts = re.findall(r"[a-z]+|[^a-z ]", re.sub(r"\bper\b", "/", text))
    if all(part in UNITS or not part.isalpha() for part in parts):
        return "".join(UNITS.get(part, part) for part in parts)
    return "" if "unit" in text else "?" + text.rstrip("s.")
