"""Other readings of an answer that fails as it stands: without its condition, with other names for constants."""

import itertools
import re
from collections.abc import Iterator

from grading.notation import NAMES, POWER, SI, SYMBOL

MAX_LENGTH = 150  # characters of an answer that has other readings
_SI = rf"(?:[kM]?\\Omega|[MLR] *_ *\{{? *\\odot *\}}?|(?:\\mu *)?(?:{SI}|{NAMES})(?![A-Za-z]){POWER})"
_BARE = re.compile(
    rf"(.*[0-9)}}]) +(?=.*(?:[/\\-]|[a-z][A-Z]))({_SI}(?: *(?:[*/] *)?{_SI})*)"
)  # 1.55 eV, 3 m/s, but not 3 m
_LETTER = re.compile(rf"(?:arc)?(?:sin|cos|tan|cot|sec|csc)|exp|ln|log|[A-Za-z]{{4,}}|(?P<name>{SYMBOL})")
_DEFINED = re.compile(rf"({SYMBOL}'*) *\( *([a-z]|\\[a-z]+) *\) *=")
_OF_ARGUMENT = re.compile(rf"({SYMBOL})(?: *\( *([a-z]|\\[a-z]+) *\)|('+))")
_F = rf"{SYMBOL}'* *\( *[a-z] *\)"
_LEFT = re.compile(  # what may stand before an answer: yes, "Answer:", or a name that no expression has
    r"\(?[A-J][).:]+ +(?=[A-Za-z0-9$\\(]|-[0-9])"  # (D) 18
    r"|(?:\\text *\{ *)?(?:[Yy]es|(?:Final )?[Aa]nswer) *(?:[,.:;] *\}?|\} *[,.:;]?)"
    rf"|(?:(?:{_F} *= *)?(?:\\frac *\{{ *{_F} *\}} *\{{ *{_F} *\}}|{_F} */ *{_F})"
    rf"|{SYMBOL} *\^ *(?:\{{ *\* *\}}|\*)|[fgh] *(?:'+|\^ *\{{ *-1 *\}}) *\([^()=]*\)"
    r"|(?:\\(?:lim|i+nt|oint|sum|prod)(?![a-z])|lim(?![A-Za-z])|[∫∑∏])(?: *_ *(?:\{[^{}]*\}|\w))?[^=]*"
    r"|[(|]?[A-Z]{2,3}[)|]? *\^ *\{? *[0-9] *\}?|(?:\\?(?:det|gcd|lcm|max|min|deg|dim|sup|inf|arg|Var|Pr)"
    r"|\\text *\{ *(?:lcm|gcd|det|rank|tr|ord|deg|dim|[Aa]rea|[Vv]ol) *\})"
    r"(?: *_ *\{[^{}]*\})? *(?:[A-Za-z]? *\([^=]*\)|\\\{[^=]*\\\}|\\begin[^=]*\}|[A-Za-z]) *"
    r"|(?:\\mathbb *\{ *[EP] *\}|[EP]|\\text *\{ *(?:Var|Cov|Pr|[EP]) *\}) *[(\[][^()\[\]]*[)\]]) *="
)
_KIND = r"(?: +(?:an?|is|are|any|arbitrary|real|complex|positive|non-?zero|integers?|constants?|numbers?))"
_NUMBERS = r"(?:(?:real|integers?|natural|numbers?|complex|positive integers?|non-?negative integers?) +)*"
_SIDE = r"(?:[^\\=,;A-Za-z≠<>≤≥∈]|\\?[A-Za-z](?![A-Za-z])|\\[A-Za-z]{2,}(?![A-Za-z]))+"  # without words
_CONDITION = re.compile(  # x^2 for x > 0; πk, k ∈ Z; C e^x, where C is a constant
    r"(?P<answer>.*?[^,;( ])(?:[,; ]+(?P<open>\()|(?: *[,;]| +(?=(?:for|where|when|if|with)\b)))"
    r" *(?:(?:for|where|when|if|with|and|all|any|every|each) +)*"
    rf"(?:(?P<integer>[a-z]) *∈ *\\(?:mathbb)? *\{{? *[ZN]\b *\}}?(?: *[_^] *(?:\{{[^{{}}]*\}}|[+0-9]))?"
    rf"|{SYMBOL} *∈ *\(-\\infty ,\\infty *\)"
    rf"|{_SIDE}≠{_SIDE}|[i-nt] *[>≥] *[01]|[01] *[<≤] *[i-nt]|(?<=all |any |ery |ach ){_NUMBERS}{SYMBOL}"
    rf"|{SYMBOL}(?:(?: *,| and) +{SYMBOL})*{_KIND}{{2,}})(?(open) *\))"
)


def readings(answer: str, gold: str, definite: bool) -> Iterator[str]:
    """Other readings of a normalised answer. definite: whether a condition or another name would change the gold."""
    if len(answer) > MAX_LENGTH:
        return
    if "\\hat{" in answer:
        yield answer + r"+{0}\hat{k}"
    left = _LEFT.match(answer)
    if left and not ("=" in left[0] and "=" in gold):
        yield answer[left.end() :]
    if definite:
        bare = _BARE.fullmatch(answer)
        if bare:
            unit = re.sub("[{}]", "", bare[2])
            yield rf"{bare[1]} \text{{{unit}}}"
        return
    integers = set()  # the letters of which the answer says that they are integers
    in_words = re.sub(r"\\text *\{([^{}]*)\}", r" \1 ", answer)
    conditioned = _CONDITION.fullmatch(" ".join(in_words.split()))
    if conditioned:
        answer = conditioned["answer"]
        yield answer
        if conditioned["integer"]:
            integers.add(conditioned["integer"])
    in_answer = letters(answer)
    in_gold = letters(gold)
    a = _DEFINED.match(answer)
    g = _DEFINED.match(gold)
    if a and g and a[1] == g[1] and g[2] not in in_answer:  # f(t) = t^2 for f(x) = x^2
        yield _renamed(answer, {a[2]: g[2]})
    mine = in_answer - in_gold
    theirs = in_gold - in_answer
    if integers and mine == integers and len(theirs) == 1 and theirs <= {"k", "m", "n"}:  # πn, n ∈ Z, for πk
        yield _renamed(answer, dict(zip(mine, theirs, strict=True)))
    functions = {name: argument for name, argument, _ in _OF_ARGUMENT.findall(answer) if argument}
    bare = letters(_OF_ARGUMENT.sub(" ", answer))
    if functions and functions.keys() <= in_gold - bare and not in_gold & set(functions.values()):  # kx(t) for kx
        yield _OF_ARGUMENT.sub(r"\1\3 ", answer)
    # C e^x for c e^x: the constants of a solution, which has a variable, may have other names, or be exchanged.
    if re.search(r"e *\^|\\(?:exp|sin|cos|ln|log)", gold):
        exchanged = {name for name in in_answer & in_gold if re.fullmatch("[cC]_[0-9]", name)}
        mine |= exchanged
        theirs |= exchanged
    mine = _constants(answer, mine)
    theirs = _constants(gold, theirs)
    same_number = 0 < len(mine) == len(theirs)
    if not same_number or "," in answer or not re.search("[cC]", "".join(mine + theirs)):
        return
    if in_answer & in_gold & {"x", "y", "z", "t", "r", "s", "\\theta"}:
        orders = itertools.permutations(theirs) if len(mine) < 4 else [theirs]
        for names in orders:
            yield _renamed(answer, dict(zip(mine, names, strict=True)))


def _constants(text: str, names: set[str]) -> list[str]:
    """Those of the names that may be constants and occur behind the last "=" of a text, ordered by their factors."""
    text = text.rpartition("=")[2]
    used = [name for name in sorted(letters(text) & names) if re.fullmatch("[cCkKABD](?:_[0-9])?", name)]
    plain = re.sub("[{} ()]", "", text)
    return sorted(used, key=lambda name: re.match(r"(?:\^-|[^-+])*", plain.partition(name)[2])[0])


def letters(text: str) -> set[str]:
    """The letters of a normalised text, with their indices."""
    return {re.sub("[{ }]", "", match[0]) for match in _LETTER.finditer(text) if match["name"]}


def _renamed(text: str, names: dict[str, str]) -> str:
    def new(match: re.Match) -> str:
        name = match[0]
        if match["name"]:
            name = names.get(re.sub("[{ }]", "", name), name)
        before = text[match.start() - 1 : match.start()]
        return f" {name}" if before.isalpha() else name  # \sin x, not \sinx

    return _LETTER.sub(new, text)
