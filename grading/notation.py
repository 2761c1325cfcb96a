r"""One spelling for texts that look the same: Unicode signs, TeX commands, spacing, thousands separators, units.

The functions rewrite strings of at most a thousand characters; `answers.py` parses the result. The order of the
rewrites matters: delimiters and spacing, then single commands, then constructs of several commands.
"""

import functools
import re
import unicodedata

_SIGNS = {  # Unicode look-alikes
    **dict.fromkeys("−–—‐‑﹣", "-"), "∗": "*", **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("×⨯", r"\times "), **dict.fromkeys("⁄∕", "/"), "∶": ":", "∣": "|",
    **dict.fromkeys("′’", "'"), **dict.fromkeys("⟨〈", "("), **dict.fromkeys("⟩〉", ")"), "⩽": "≤", "⩾": "≥", "º": "°",
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∅": r"\{\}", "ℝ": r"\R ", "∠": r"\angle ",
    "Å": " angstrom ", "\u212b": " angstrom ", "\u00b5": r"\mu ", "…": r"\ldots ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    **dict.fromkeys("✓✔✅∴", " "), "٫": ".", "٬": ",", "٪": "%", "⌈": r"\lceil ", "⌉": r"\rceil ",
}  # fmt: skip
for _letter in "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩ":
    _name = unicodedata.name(_letter).split()[-1]
    _SIGNS[_letter] = f"\\{_name.lower() if _letter.islower() else _name.title()} "
_SIGNS = str.maketrans(_SIGNS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_WIDE = re.compile("[\uff01-\uff5e\U0001d400-\U0001d7ff½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞\u3000\xa0\u2000-\u200a]")  # full-width, bold, …

# Commands of the same spelling, and that spelling; "" for an appearance.
_COMMANDS_BY_SPELLING = {
    "": "boxed fbox left right displaystyle textstyle limits underline mathbf boldsymbol bm mathit mathcal bf it rm "
        "big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr",
    " ": "quad qquad checkmark therefore",
    r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom", "°": "circ degree degrees", "'": "prime",
    "≤": "leqslant leq le", "≥": "geqslant geq ge", "<": "lt", ">": "gt", "≠": "neq ne", "≈": "approx simeq", "∈": "in",
    "∪": "cup", "±": "pm", "∓": "mp", "*": "times cdot ast", "⨯": "vtimes", "•": "vcdot", "÷": "div", ":": "colon",
    "|": "vert lvert rvert mid",
    "(": "langle", ")": "rangle", r"\{": "lbrace", r"\}": "rbrace", r"\{\}": "emptyset varnothing",
    " angstrom ": "AA", r"\ldots ": "dots cdots dotsc", r"\setminus ": "backslash", r"(-\infty ,\infty )": "R",
    r"\epsilon ": "varepsilon", r"\phi ": "varphi", r"\theta ": "vartheta", r"\rho ": "varrho", r"\sigma ": "varsigma",
    r"\text": "textbf textrm textit textnormal textsf texttt mbox operatorname emph mathrm mathsf mathtt mathnormal",
}  # fmt: skip
_COMMANDS = {command: spelling for spelling, names in _COMMANDS_BY_SPELLING.items() for command in names.split()}
_COMMAND = re.compile(rf"\\({'|'.join(sorted(_COMMANDS, key=len, reverse=True))})(?![A-Za-z])")
SYMBOL = r"(?:[A-Za-z]|\\[a-z]+)(?: *_ *(?:\{[^{}]*\}|[A-Za-z0-9]))?"
_OF_SYMBOL = rf" *(?:\{{ *({SYMBOL}) *\}}|({SYMBOL}))"
_TH = r"(?:st|nd|rd|th)"
_SQUARE = r" *\^ *\{? *2 *\}?"


def _compiled(*rewrites: tuple[str, str]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(pattern), new) for pattern, new in rewrites]


_VECTOR = (
    r"\\(?:nabla|(?:mathbf|vec|hat|overrightarrow) *(?:\{ *(?:\\[a-z]+|[A-Za-z])[A-Za-z' ]*\}|[A-Za-z]|\\[a-z]+))"
    r"(?: *_ *(?:\{[^{}]*\}|\w))?'*"
)
_MATRICES = re.compile(  # capitals side by side, one of them inverted or transposed
    r"(?<![A-Za-z\\])(?<![A-Z] )(?=(?:[A-Z] *)*[A-Z] *\^ *(?:T\b|\\top|\{ *(?:-1|T|\\top) *\}))"
    r"(?:[A-Z](?: *\^ *(?:[T0-9]|\\top|\{[^{}]*\}))? *){2,}"
)
# Before all other rewrites, if a text has vectors: their products, products of bold matrices, unit vectors.
_OF_VECTORS = _compiled(
    (r"\\(?:boldsymbol|bm)(?![a-z])|\\textbf(?= *\{ *[a-z] *\})", r"\\mathbf"),
    (rf"({_VECTOR}[ )}}]*)\\(times|cdot)(?= *[({{]*-?[0-9]*d? *{_VECTOR})", r"\1\\v\2"),
    (r"(\\mathbf *\{ *[A-Za-z] *\}(?: *\^ *(?:T|\\top|\{[^{}]*\}))?) *(?=\\mathbf *\{ *[A-Za-z] *\})", r"\1⊗"),
    (r"\{ *\\mathbf *\{ *([ijk]) *\} *\}", r"{\1}"),
    (r"\\mathbf *\{ *(\\(?:hat|vec) *\{[^{}]*\}) *\}", r"\1"),
    (r"\\mathbf *\{ *(i(?= *\}.*\\mathbf *\{ *[jk] *\})|[jk]) *\}", r"\\hat{\1}"),
    (r"\\(?:hat|vec|widehat) *(?:\{ *\\?([ijk])(?:math)? *\}|([ijk])(?![A-Za-z]))", r"\\hat{\1\2}"),
)
# Before single commands are replaced: delimiters and spacing.
_REWRITES = _compiled(
    (r"(?s)^\s*\$?(\*\*|__|\*|`)([^*`]*[^*`\\])\1\$?\s*$", r"\2"),  # Markdown
    (r"\\(?:mathrm|text|operatorname) *\{ *d *\}(?= *[A-Za-z\\])", "d "),  # dy
    (r"(?<![\\A-Za-z])([A-Za-z]) *\\circ *(?=[A-Za-z])", r"\1⊗"),  # f after g
    (r"\\(?:mathbf|mathcal|mathit) *\{ *([A-Za-z]) *\}", r" \1 "),
    (r"\\(?:text)?color *\{[^{}]*\}|\bm *(?=\\angle)", ""),
    (r"\\phantom *(?:\{[^{}]*\}|[^{}\\ ])|\\hspace\{[^{}]*\}|np\.|(?<=\\\\)\[[-0-9. a-z]*\]", ""),  # \\[4pt] ends a row
    (r"(?<=[0-9])(?:,\\! ?|\{,\})(?=[0-9]{3})|(?<!\\)\\!", ""),  # 10,\!080 and 10{,}080
    (r"(?<!\\)(?:\\[()\[\]]|\$)", ""),  # \( \) \[ \] and $ delimit
    (r"(?<!\\)((?:\\\\)*)\\[,;:> \n]", r"\1 "),
    (r"~|[\s\u200b]+", " "),
    (r"\\%", "%"),
    (r"\*\*", "^"),
    (r"\\mathbb *(?:\{ *R *\}|R)", r"\\R "),
)
# After that: constructs of several commands.
_EXPONENT_IN_TEXT = (r"(\\text *\{[^{}]*)\^ *\{ *(-?[0-9]) *\}", r"\1^\2")  # \text{m s^{-2}}
_REWRITES_AFTER = _compiled(
    # text that is no word, exponents inside text, and text that is the whole answer
    (r"\\text\*? *\{(?! *[A-Za-z] *\})((?:[^{}A-Za-z]|\b(?:and|or|[A-Z])\b)*)\}", r" \1 "),  # \text{ and }, \text{(C)}
    _EXPONENT_IN_TEXT,
    _EXPONENT_IN_TEXT,
    _EXPONENT_IN_TEXT,
    (r"^ *\\text *\{([^{}]*[0-9][^{}]*)\} *$", r"\1"),
    # ordinals: 12^{th}, 12th, 12\text{th grade}
    (rf"(?<=[0-9])(?: *\^)? *\{{ *(?:\\text *\{{ *{_TH} *\}}|{_TH}) *\}}", ""),
    (rf"(?<=[0-9])(?: *\^)?( *\\text *\{{) *{_TH}\b", r"\1"),
    (rf"(?<=[0-9]){_TH}(?= *$| *\\text| +[a-z]{{3}})", ""),
    # units
    (r"\\frac *\{ *(\\text *\{[^{}]*\}) *\} *\{ *(\\text *\{[^{}]*\}(?: *\^ *[0-9])?) *\}", r"\1 / \2"),
    (r"\\mu *\\text *\{", r"\\text{μ"),
    # derivatives: \dot{x}, dy/dt, also of the second order
    (rf"\\dot{_OF_SYMBOL}", r"\1\2'"),
    (rf"\\ddot{_OF_SYMBOL}", r"\1\2''"),
    (rf"\\frac *\{{ *d *({SYMBOL})(?: *\( *[a-z] *\))? *\}} *\{{ *d *{SYMBOL} *\}}", r"\1' "),
    (rf"\\frac *\{{ *d{_SQUARE} *({SYMBOL}) *\}} *\{{ *d *{SYMBOL}{_SQUARE} *\}}", r"\1'' "),
    (rf"\bd *({SYMBOL}) */ *d *{SYMBOL}(?![A-Za-z])", r"\1' "),
    # Γ^2(1/4) and J_0^2(2)
    (r"(f|\\(?:zeta|Gamma)) *(\^ *(?:\{ *[0-9n] *\}|[0-9n])) *(\([^()]*\))", r"\1\3\2"),
    (r"([A-Za-z]) *(\^ *(?:\{[^{}]*\}|[0-9a-z])) *(_ *(?:\{[^{}]*\}|[0-9A-Za-z]))", r"\1\3\2"),  # v^2_0
    # names in text: functions, points, numerals with a base, constants
    (r"\\text\*? *\{ *(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp) *\}", r"\\\1 "),
    (r"(?<![0-9])(?<![0-9] )\\text *\{ *([A-Z]{2,}) *\}", r"\1 "),
    (r"\\text *\{ *([0-9A-F]+) *\}(?= *_)", r"\1"),
    (r"_ *\{ *\\text *\{([^{}]*)\} *\}", r"_{\1}"),
    (r"\\text *\{ *\(? *base[ -]*(\w+) *\)? *\}", r"_{\1}"),
    (r"\\text *\{ *([ie]) *\}", r"\1 "),
    # signs
    (r"\^ *\{ *(°|'+) *\}|\^ *(°|')", r"\1\2"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    (r"<=", "≤"),
    (r">=", "≥"),
    (r"(?<= )!=", "≠"),
    (r"\+/?-(?=[ 0-9.\\(])", "±"),
    (r"(?<![\\A-Za-z])\{ *\}", ""),
)
_DIGITS_IN_THREES = r"(?:(?:,[0-9]{3})+(?![0-9]|,[0-9])|(?: [0-9]{3})+(?! ?[0-9]))"
_THOUSANDS = re.compile(r"(?<![0-9.,])(?<![0-9.,] )[0-9]{1,3}" + _DIGITS_IN_THREES)
_REPEATING = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*) *\\overline *\{ *([0-9]{1,50}) *\}")
_FRACTION = r"(?:\\frac *(?:\{ *([0-9]+) *\}|([0-9])) *(?:\{ *([0-9]+) *\}|([0-9]))| ([0-9]+)/([0-9]+))"
_MIXED = re.compile(r"\\[A-Za-z]+ *[0-9]*|(?<![0-9.^_])([0-9]{1,50}) *" + _FRACTION)  # \sqrt2\frac12 is a product
_SPELLINGS = {  # of a unit, besides itself
    "$": "dollar dollars usd", "cent": "cents ¢", "€": "euro euros", "£": "", "%": "percent", "rad": "radian radians",
    "°": "degree degrees deg", "°C": "celsius", "°F": "fahrenheit", "unit": "units", "angstrom": "angstroms",
    "mm": "millimeter millimeters", "cm": "centimeter centimeters", "m": "meter meters metre metres",
    "km": "kilometer kilometers", "in": "inch inches", "ft": "foot feet", "yd": "yard yards", "mi": "mile miles",
    "g": "gram grams", "kg": "kilogram kilograms", "lb": "lbs pound pounds", "oz": "ounce ounces", "erg": "ergs",
    "s": "sec secs second seconds", "min": "mins minute minutes", "h": "hr hrs hour hours", "day": "days",
    "week": "weeks", "month": "months", "year": "years yr yrs", "L": "l liter liters", "mL": "ml milliliters",
    "N": "newton newtons", "J": "joule joules", "K": "kelvin", "M": "molar", "Hz": "hz hertz", "V": "volt volts",
    "W": "watt watts", "Pa": "pascal pascals", "mol": "mole moles", "pc": "parsec parsecs", "arcsec": "arcseconds",
    "mi/h": "mph",
}  # fmt: skip
UNITS = {word: unit for unit, words in _SPELLINGS.items() for word in (unit, *words.split())}  # spelling -> unit
NAMES = "|".join(word for word in UNITS if len(word) > 1 and word not in ("Pa", "pc", "°C", "°F"))  # also without \text
POWER = r"(?: ?\^ ?(?:\{ ?-?[0-9] ?\}|-?[0-9]))?"
SI = r"(?:[kMGTdcmnpfμ]?(?:eV|mol|Hz|Pa|cal|pc|bar|ohm|[msgAKNJWCVFTHLlB]))"  # with a prefix
_UNIT_REWRITES = _compiled(
    (r"\\mu *", "μ"),
    (r"\\Omega", "ohm"),
    (r"\\text|\\(?=\$)|[{}()~*]|\bU\.?S\.?(?= )", " "),
    (r"\bper\b", "/"),
    (r"(?i)(?:°|\bdegrees?) *(c|f)(?:elsius|ahrenheit)?\b", r"°\1"),
    (r"\bmph\b", "mi/h"),
    (r"(?i)\bsq(?:uare|\.)? +([a-z]+)|\b([a-z]+) squared", r"\1\2^2"),
    (r"(?i)\bcu(?:bic|\.)? +([a-z]+)|\b([a-z]+) cubed", r"\1\2^3"),
    (" +", " "),
)
SPELLED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
CHANGES = re.compile(  # words that change the value of the number before them
    rf"\b(?:{'|'.join(SPELLED)}|\w+teen|\w+ty|not|no|or|and|mod|modulo|to|if|when|where|for|with|is|isn|are|but|than|"
    r"half|halves|[ap]\.m|quarters?|\w+ths?|thirds?|squared|cubed|factorial|times|maybe|perhaps|plus|minus|negative|"
    r"below|above|at|of|about|wrong|incorrect|false|except|unless|over|choose|tens|scores?|pairs?|(?:hundred|thousand|"
    r"million|billion|trillion|dozen)s?|lakhs?|crores?|myriads?|minimum|maximum|more|fewer|less|"
    r"bn|mn|tn|trn|mil|mill|mio|mln|thou|grand|gross|lac|bps|always|has|was|does|fails?|inverses?|reciprocals?|"
    r"opposites?|negatives?|complements?|conjugates?|halves|doubles|triples|logs|roots?|powers?|inclusive|exclusive)\b|"
    r"\b[kmb] [a-z]{3}|[$€£] [kmbt]\b"
)
# The last word behind a number counts things: a noun in the plural, or one of these. A compound of units has / or ^.
COUNTS = re.compile(
    r"(?i)[/^]|(?:[a-z][a-z][^aisu]s|[a-z]{4}as|people|persons?|child(?:ren)?|m[ae]n|wom[ae]n|mice|geese|teeth|sheep|fish|"
    r"deer|dice|total|each|apiece|altogether|left|remaining|only|exactly|way|solution|integer|number|value|point|digit|"
    r"student|teacher|player|ticket|triangle|piece|side|edge|page|book|coin|box|ball|dog|cat|car|apple|egg|tree|meal|game|"
    r"question|multiple|grade|acre|gallon|quart|pint|ton|tonne|gm|sq|bit|byte|degree|"
    r"old|tall|long|wide|high|deep|away|apart|later|ago|yen|yuan|won|au|ly|rpm|bpm|psi|atm|mmhg|torr|kwh|btu|dyn|gauss|amu|"
    r"hp|kph|kmh|fps|mag|dex|jy|dbm?)[ .)]*$"
)
_TITLE_WORDS = re.compile(  # words that an answer may leave out before "="
    r"(?:(?:an?|the|of|for|in|is|final|total|correct|answer|result|solution|value|amount|number|ways|sum|difference|product|"
    r"quotient|remainder|ratio|rate|fraction|percent|percentage|probability|expected|expectation|average|mean|median|mode|"
    r"range|variance|max|maximum|min|minimum|largest|smallest|greatest|least|length|width|height|depth|side|base|hypotenuse|"
    r"radius|diameter|circumference|perimeter|area|surface|volume|capacity|slope|degree|distance|speed|velocity|time|period|"
    r"frequency|hours?|days?|years?|age|mass|weight|density|force|energy|power|pressure|temperature|population|people|"
    r"students|cost|price|profit|revenue|salary|savings|earnings|interest|money|change|tax|score)\b *)+"
)
_NO_POINTS = re.compile(
    "N(?:OT?|ON?E?|OR|AY|OPE|ULL)|OR|AND|BUT|IF|ANY|ALL|VOID|LESS|MORE|OVER|THAN|HALF|FAKE|FAIL|LIE|BAD"
)


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """The normal spelling of an answer: plain signs, single spaces, few TeX commands, no final full stop."""
    if text.isdigit() and text.isascii():
        return text
    if not text.isascii():
        text = re.sub(r"\d", lambda m: str(unicodedata.digit(m[0])), text)  # of any script
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
        text = re.sub("(?<=[0-9])(?=[½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", " ", text)  # 3½ is not 31/2
        text = _WIDE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text.translate(_SIGNS)).translate(_SIGNS)
    vectors = re.search("bf|bm|bold|vec|hat|overright|nabla", text)
    for pattern, new in _OF_VECTORS + _REWRITES if vectors else _REWRITES:
        text = pattern.sub(new, text)
    text = _COMMAND.sub(lambda m: _COMMANDS[m[1]], text)
    for pattern, new in _REWRITES_AFTER:
        text = pattern.sub(new, text)
    text = _MATRICES.sub(lambda m: re.sub("(?<=[A-Zp}]) *(?=[A-Z])", "⊗", m[0]), text)
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


@functools.lru_cache(maxsize=4096)
def canonical_unit(text: str) -> str:
    """The name of a unit: "cm^2" for "square cm" and "centimeters^{2}", "?apple" for the unknown word "apples"."""
    for pattern, new in _UNIT_REWRITES:
        text = pattern.sub(new, text)
    powers = {}
    sign = 1
    for word, power, slash in re.findall(r"([^\W\d_]+|[°%$€£¢][CFcf]?)(?: ?\^ ?(-?[0-9]))?|(/)", text):
        if slash:
            sign = -1
            continue
        unit = UNITS.get(word)
        if not unit and re.fullmatch(SI, word):
            unit = word
        if not unit and len(word) > 1:
            unit = UNITS.get(word.lower())
        if not unit:
            return "?" + text.strip().lower().rstrip("s.")
        powers[unit] = powers.get(unit, 0) + sign * int(power or 1)
    return "*".join(unit if power == 1 else f"{unit}^{power}" for unit, power in sorted(powers.items()) if power)


def may_omit(name: str) -> bool:
    """Whether a name before "=" may be left out: of a symbol, of points like AB, or words like "total area"."""
    points = name.isupper() and len(name) < 5 and not _NO_POINTS.fullmatch(name)
    return points or not re.fullmatch("[A-Za-z ]{2,}", name) or bool(_TITLE_WORDS.fullmatch(name.lower()))
