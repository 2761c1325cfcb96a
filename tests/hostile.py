"""Hostile strings for the grader: random atoms, mutated answers, random TeX of a grammar, repetitions."""

import random

ATOMS = [
    "10^{5000}", "*10^{5000}", "10^{-4000}", "2^{16000}", r"\frac{1}{1000!}", "*", "-1.5",
    "answer ", "wait ", "cm ", r"\text{a} ",
    "1", "7", "23", "0", ".5", "x", "n", "e", "i", "9" * 5000, "e99999", "1e9999", "1e4999", "10^{10^{10}}",
    "9^9^9^9", "(10^{9})!", "9!!!!", "1000!", "2^{1000}", r"\binom{5000}{2500}", r"\pi", r"\theta", r"\infty",
    r"\frac", r"\sqrt", r"\sqrt[3]", r"\log_", r"\sin", r"\cos^{-1}", r"\binom", r"\lfloor", r"\rfloor", r"\left",
    r"\right", r"\pm", r"\mp", "{", "}", "(", ")", "[", "]", r"\{", r"\}", "|", "^", "_", "!", "+", "-", "*", "/",
    "**", r"\cdot", ",", ";", ":", "'", "=", "<", r"\le", r"\ne", r"\in", r"\cup", r"\approx", "%", r"^\circ", r"\$",
    "$", "&", r"\\", "~", r"\,", r"\quad", r"\text{", r"\text{ or }", "or", "and", r"\text{ cm}^2", "million", "cm",
    "base", r"\overline{3}", "0.", "1,000", "12_5", r"\begin{pmatrix}", r"\end{pmatrix}", r"\mathbb{R}", r"\prime",
    "f(x)", "I(0)", r"\boxed{", r"}\boxed{", r"\boxed 5", "</think>", "<think>", "\0", "\ud800", "\u202e", "\n", " ",
    "½", "√", "²", "−", "π", "２", "٣", "𝟙", "{0!r}", "%s", "__class__", "__import__('os').system('x')", "lambda: 5",
    "(y:=5)", "eval(1)", "exit()", "open('x','w')", r"\input{x}",
]  # fmt: skip
TAILS = ["", "1", "?", "}", "\\", ")", "=5"]
LEAVES = ["1", "2", "3.5", "x", "n", r"\pi", "e", "i", "10", "99", "a_1", r"\infty"]
BRANCHES = [
    r"\frac{@}{@}", r"\sqrt[@]{@}", "{@}^{@}", "@+@", r"@ \cdot @", "(@)", "(@)!", r"\sin(@)", r"\exp(@)", r"\log_2(@)",
    r"\arcsin(@)", r"\tan(@)", "|@|", r"\binom{@}{@}", "-@", "@,@", "(@,@)", r"\lfloor @\rfloor", r"\{@,@\}", "@=@",
    "@<@", r"\begin{pmatrix}@&@\\@&@\end{pmatrix}", r"@\pm @", r"@ \cup @", r"\frac{@}{@} \text{ cm}",
]  # fmt: skip


def grow(rng: random.Random, depth: int = 8) -> str:
    """A random TeX expression of the grammar given by LEAVES and BRANCHES."""
    if depth == 0 or rng.random() < 0.25:
        return rng.choice(LEAVES)
    first, *rest = rng.choice(BRANCHES).split("@")
    return first + "".join(grow(rng, depth - 1) + part for part in rest)


def mutate(rng: random.Random, text: str) -> str:
    """Drops characters, inserts atoms and doubles tails, one to four times."""
    for _ in range(rng.randrange(1, 5)):
        i, kind = rng.randrange(len(text) + 1), rng.random()
        if kind < 0.4:
            text = text[:i] + text[i + 1 :]
        elif kind < 0.8:
            text = text[:i] + rng.choice(ATOMS) + text[i:]
        else:
            text += text[i:]
    return text


def strings(seed: int, count: int, answers: list[str]):
    """Yields `count` hostile strings. `answers` are ordinary answers, the starting points of mutations."""
    rng = random.Random(seed)
    for n in range(count):
        if n % 4 == 0:
            text = "".join(rng.choices(ATOMS, k=rng.randrange(1, 25)))
        elif n % 4 == 1:
            text = mutate(rng, rng.choice(answers))
        elif n % 4 == 2:
            text = grow(rng)
        else:
            many = rng.choice(ATOMS) * rng.choice([3, 20, 50, 300, 3000])  # the output of a degenerate policy
            text = mutate(rng, grow(rng)) if rng.random() < 0.5 else rng.choice(["", "x = "]) + many + rng.choice(TAILS)
        yield text if rng.random() < 0.1 else "\\boxed{" + text + "}"
