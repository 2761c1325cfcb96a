r"""One spelling for what looks the same, before an answer is parsed: Unicode signs, TeX commands, spacing, units.

Everything here rewrites strings of at most a thousand characters; what an answer means is for `answers.py`. The order
matters: delimiters and spacing first, then commands one by one, then what is built of several of them.
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

_COMMANDS = {  # TeX commands: what another spelling stands for, and what only changes the looks
    command: sign
    for commands, sign in (
        ("boxed fbox left right displaystyle textstyle limits underline", ""),
        ("mathbf boldsymbol bm mathit mathcal bf it rm", ""),
        ("big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr", ""), ("quad qquad", " "),
        ("dfrac tfrac cfrac", r"\frac"), ("dbinom tbinom", r"\binom"), ("circ degree degrees", "°"), ("prime", "'"),
        ("leqslant leq le", "≤"), ("geqslant geq ge", "≥"), ("lt", "<"), ("gt", ">"), ("neq ne", "≠"),
        ("approx simeq", "≈"), ("in", "∈"), ("cup", "∪"), ("pm", "±"), ("mp", "∓"), ("times cdot ast", "*"),
        ("div", "÷"), ("vert lvert rvert mid", "|"), ("langle", "("), ("rangle", ")"), ("lbrace", r"\{"),
        ("rbrace", r"\}"), ("colon", ":"), ("emptyset varnothing", r"\{\}"), ("R", r"(-\infty ,\infty )"),
        ("varepsilon", r"\epsilon "), ("varphi", r"\phi "), ("vartheta", r"\theta "),
        ("varrho", r"\rho "), ("varsigma", r"\sigma "),
        ("textbf textrm textit textnormal textsf texttt mbox operatorname emph", r"\text"),
        ("mathrm mathsf mathtt mathnormal", r"\text"),
    )
    for command in commands.split()
}  # fmt: skip
_COMMAND = re.compile(rf"\\({'|'.join(sorted(_COMMANDS, key=len, reverse=True))})(?![A-Za-z])")
_TEXT, _ONE_LETTER = re.compile(r"\\text\*? *\{([^{}]*)\}"), re.compile(" *[A-Za-z] *")
_WORDLESS = re.compile(r"(?:[^{}A-Za-z]|\b(?:and|or|[A-Z])\b)*")  # separators and choices, which may be set as text
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
_THOUSANDS = re.compile(
    r"(?<![0-9.,])(?<![0-9.,] )[0-9]{1,3}(?:(?:,[0-9]{3})+(?![0-9]|,[0-9])|(?: [0-9]{3})+(?! ?[0-9]))"
)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*) *\\overline *\{ *([0-9]{1,50}) *\}")
_MIXED = re.compile(
    r"\\[A-Za-z]+ *[0-9]*|"  # \sqrt2\frac12 and \frac12\frac34 are products
    r"(?<![0-9.^_])([0-9]{1,50}) *"
    r"(?:\\frac *(?:\{ *([0-9]+) *\}|([0-9])) *(?:\{ *([0-9]+) *\}|([0-9]))| ([0-9]+)/([0-9]+))"
)


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """One spelling for what looks the same: signs, spacing, TeX commands, thousands separators; no final full stop."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
        text = re.sub("(?<=[0-9])(?=[½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", " ", text)  # 3½ is not 31/2
        text = _WIDE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text.translate(_SIGNS)).translate(_SIGNS)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    text = _COMMAND.sub(lambda m: _COMMANDS[m[1]], text)
    text = _TEXT.sub(_without_text, text)
    for pattern, new in _REWRITES_AFTER:
        text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):  # within brackets a comma separates
        text = _THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)
    text = _MIXED.sub(_fraction_of_mixed, _REPEATING.sub(_fraction_of_period, text))
    return re.sub("  +", " ", text).rstrip(" .,;:\\").lstrip(" ,;:")


def _without_text(match: re.Match) -> str:
    r"""\text{ and }, \text{(C)} and \text{B, C} without \text; words keep it."""
    wordless = _WORDLESS.fullmatch(match[1]) and not _ONE_LETTER.fullmatch(match[1])
    return f" {match[1]} " if wordless else match[0]


def _fraction_of_mixed(match: re.Match) -> str:
    r"""1\frac{4}{5} and 1 4/5 as \frac{9}{5}; only a proper fraction can follow a whole number."""
    if match[1] is None:
        return match[0]
    whole, above, below = (int(digits) for digits in match.groups() if digits)
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if 0 < above < below else match[0]


def _fraction_of_period(match: re.Match) -> str:
    r"""0.1\overline{6} as (16 − 1)/90."""
    whole, fixed, period = match.groups()
    without = int(whole + fixed or "0")
    return rf"\frac{{{int(whole + fixed + period) - without}}}{{{(10 ** len(period) - 1) * 10 ** len(fixed)}}}"


UNITS = {  # spelling -> unit; other words after a number are kept, to be compared with each other only
    word: unit
    for unit, words in {
        "$": "dollar dollars usd", "cent": "cent cents ¢", "%": "percent", "°": "degree degrees deg", "rad": "radians",
        "mm": "mm millimeters", "cm": "cm centimeter centimeters", "m": "m meter meters",
        "km": "km kilometer kilometers", "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yards",
        "mi": "mi mile miles", "g": "g gram grams", "kg": "kg kilogram kilograms",
        "lb": "lb lbs pound pounds", "oz": "oz ounce ounces",
        "s": "s sec second seconds", "min": "min minute minutes", "h": "h hr hour hours", "day": "day days",
        "week": "week weeks", "month": "month months", "year": "year years",
        "L": "l liter liters", "mL": "ml milliliters", "mi/h": "mph",
        "N": "newton newtons", "J": "joule joules", "K": "kelvin", "Hz": "hz", "V": "volts", "W": "watts",
    }.items()
    for word in words.split()
}  # fmt: skip


def canonical_unit(text: str) -> str:
    """One name for one unit: "square cm" and "centimeters^{2}" are "cm^2". Unknown words are marked: "?apple"."""
    text = re.sub(r"\\text|[{}() ]|\\(?=\$)", " ", text).strip().lower()
    text = re.sub(r"\bsq(?:uare)? +([a-z]+)", r"\1^2", re.sub(r"\bcu(?:bic)? +([a-z]+)", r"\1^3", text))
    names, known = "", True
    for part in re.findall(r"[a-z]+|[^a-z ]", re.sub(r"\bper\b", "/", text)):
        known &= not part.isalpha() or part in UNITS
        names += UNITS.get(part, part)
    if not known:
        return "" if "unit" in text else "?" + text.rstrip("s.")
    return names
