"""rewards.py and grading/: what earns a reward and what does not; no text can raise, hang or run as code."""

import json
import math
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import hostile
import pytest
import sympy
from grader_cases import CASES, RESPONSES, WITH_OPTIONS
from grader_heldout import CASES as HELD_OUT
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from grading import answers, expression, notation
from grading.answers import MAX_ANSWER, compare, equivalent, read
from grading.expression import TooComplex, letter, parse, proportional, same
from grading.notation import normalise
from rewards import extract, is_correct, is_gold
from tasks.task import Problem, Task

DATA = Path(__file__).parents[2] / "shared" / "data"
boxed = "\\boxed{{{}}}".format


def rows(name: str) -> list[dict]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"shared/data/{name} is absent")
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@pytest.fixture(scope="module")
def golds() -> dict[str, list[str]]:
    return {
        "math500": [r["answer"] for r in rows("math500.jsonl")],
        "olympiadbench": [", ".join(r["final_answer"]) for r in rows("olympiadbench.jsonl")],
        "minerva": [extract(r["solution"]) for r in rows("minerva_math.jsonl")],
        "aime24": [r["answer"] for r in rows("aime24.jsonl")],
        "amc23": [str(r["answer"]) for r in rows("amc23.jsonl")],
    }


# The tables


def check(cases: list[tuple]) -> None:
    """cases: (gold, response, expected verdict, why[, options of is_correct]). Reports every wrong verdict."""
    wrong = []
    for gold, response, correct, why, *options in cases:
        verdict = is_correct(response, gold, **(options[0] if options else {}))
        if verdict.correct != correct:
            wrong.append(f"{why}: gold {gold[:80]!r}, expected {correct}, {verdict}")
    assert not wrong, f"{len(wrong)} of {len(cases)} verdicts are wrong:\n" + "\n".join(wrong)


def test_the_grader_agrees_with_the_table_of_answers():
    check([(gold, boxed(answer), correct, why) for gold, answer, correct, why in CASES])


def test_the_grader_agrees_with_the_table_of_whole_responses():
    check(RESPONSES)


def test_the_grader_agrees_with_the_table_of_tolerances_and_units():
    check([(gold, boxed(answer), correct, why, options) for gold, answer, options, correct, why in WITH_OPTIONS])


def test_the_grader_agrees_with_authors_who_had_not_seen_it():
    check(HELD_OUT)


def test_the_grader_agrees_with_labelled_outputs_of_models():
    """p05 is graded with the tolerance of its benchmark."""
    cases = rows("grader_cases_public.jsonl") + rows("grader_cases_public_2.jsonl")
    options = {"p05": dict(tolerance=1e-4)}
    check([(c["gold"], c["response"], c["expected"], c["id"], options.get(c["id"], {})) for c in cases])


def test_at_least_half_of_the_table_are_wrong_answers():
    expected = [case[2] for case in CASES + RESPONSES] + [case[3] for case in WITH_OPTIONS]
    assert len(expected) >= 300
    assert expected.count(False) >= len(expected) / 2


def test_a_verdict_has_the_reason_that_applies():
    reason = lambda response, gold="4": is_correct(response, gold).reason  # noqa: E731
    assert reason(boxed("4")) == "equal"
    assert reason(boxed("5")) == "different"
    assert reason("4") == reason(r"\boxed{4") == reason(r"\boxed{}") == "no_answer"
    assert reason(boxed(r"\sum_{k=1}^4 1")) == "unparseable"
    assert reason(boxed("1" * (MAX_ANSWER + 1))) == "too_long"
    assert reason(boxed("10^{10^{10}}")) == reason(boxed("(" * 50 + "4" + ")" * 50)) == "too_complex"
    for gold in ("", "  ", "$$", r"\frac{1}{", "5+", "1" * (MAX_ANSWER + 1)):
        assert reason(boxed(gold), gold) == reason(boxed("4"), gold) == reason("no box", gold) == "bad_gold"
        assert not is_gold(gold)
    assert len(is_correct(boxed("1" * 2 * MAX_ANSWER), "4").extracted) == MAX_ANSWER


def test_compare_gives_the_verdict_and_reason_for_texts_without_a_box():
    assert compare("0.5", r"\frac{1}{2}") == (True, "equal")
    assert compare("0.51", r"\frac{1}{2}") == (False, "different")
    assert compare("0.51", r"\frac{1}{2}", tolerance=0.02) == (True, "equal")
    assert compare(r"5 \text{ m}", "5", unit="cm") == (False, "different")
    assert compare(r"\sum k", "5") == (False, "unparseable")
    assert compare("5", "5+") == (False, "bad_gold")


def test_an_undefined_value_with_a_percent_sign_is_compared_without_an_error():
    text = r"\sin(2^{7t})"
    assert parse(text).points[0] is None  # too large there, but not at every point
    assert is_correct(boxed(text + r"\%"), text).correct


# The built-in reward


def test_the_built_in_reward_is_one_for_a_correct_response_and_zero_for_any_other():
    reward = Task([], [], []).reward
    problem = Problem("How long?", "5", tolerance=0.01, unit="cm")
    assert [reward(r, problem) for r in (boxed("5.04"), boxed("5.06"), "5", boxed(r"5 \text{ m}"))] == [1.0, 0, 0, 0]
    assert type(reward(boxed("5"), problem)) is float


# The data


def test_every_boxed_math500_solution_earns_its_own_answer():
    assert [r["answer"] for r in rows("math500.jsonl") if not is_correct(r["solution"], r["answer"]).correct] == []


def test_the_verdicts_on_5276_graded_gsm8k_solutions_agree():
    """In these data the answer is the text after the last "A:"."""
    wrong, tried = [], 0
    for row in rows("gsm8k_graded_solutions.jsonl"):
        gold = row["ground_truth"].rpartition("A:")[2]
        for solution in (v for v in row.values() if isinstance(v, dict)):
            tried += 1
            verdict = is_correct(boxed(solution["solution"].rpartition("A:")[2]), gold)
            if verdict.correct != solution["is_correct"]:
                wrong.append((gold, verdict))
    assert (tried, wrong) == (5276, [])


def test_every_benchmark_answer_but_two_is_readable_and_equal_to_itself(golds):
    """OlympiadBench's answers include a sentence and a misprint (t(0,4] for t ∈ (0,4])."""
    unreadable = [gold for texts in golds.values() for gold in texts if not is_gold(gold)]
    assert "where $b$ is an arbitrary integer" in unreadable[0]
    assert unreadable[1:] == ["$t(0,4]$"]
    for texts in golds.values():
        for gold in set(texts) - set(unreadable):
            assert is_correct(boxed(gold), gold).correct, gold


def test_shuffled_answers_earn_only_true_coincidences(golds):
    """Two accepted answers of different problems differ in spelling, or in a unit or name that one of them omits."""
    oracle = pytest.importorskip("math_verify")
    texts = sorted({g for answers in golds.values() for g in answers if is_gold(g)})
    rng = random.Random(0)
    accepted = [(a, b) for a, b in (rng.sample(texts, 2) for _ in range(40_000)) if equivalent(a, b)]
    argument = lambda t: re.sub(r"^f\((\w)\)=(.*)", lambda m: m[2].replace(m[1], "x"), t.strip("$"))  # noqa: E731
    bare = lambda t: boxed(re.sub(r"\^\{?\\circ\}?|\\mbox.*|\\?[%$]|_9|^\w(\(\w\))?=", "", argument(t)))  # noqa: E731
    for a, b in accepted:
        assert oracle.verify(oracle.parse(bare(a)), oracle.parse(bare(b))), (a, b)
    assert 0 < len(accepted) < 12


def test_math_verify_agrees_on_the_benchmarks_answers(golds):
    """On 100 answers, each against itself and against another problem's answer."""
    oracle = pytest.importorskip("math_verify")
    texts = [g for group in golds.values() for g in group if is_gold(g)]
    texts = [re.sub(r"\s+", " ", re.sub(r"(?<!\\)\$", "", g)) for g in random.Random(1).sample(texts, 100)]
    parsed = [oracle.parse(boxed(text)) for text in texts]
    differ = []
    for i, gold in enumerate(texts):
        for j in (i, i - 1):
            expected = bool(oracle.verify(parsed[i], parsed[j]))
            if expected != equivalent(texts[j], gold):
                differ.append((gold, texts[j], expected))
    assert differ == []


# Robustness


def test_no_hostile_string_raises_or_earns_a_reward_beyond_chance():
    texts = [case[0] for case in CASES if is_gold(case[0])]
    accepted = []
    for i, text in enumerate(hostile.strings(1, 3_000, texts)):
        gold = texts[i % len(texts)]
        if is_correct(text, gold).correct:
            accepted.append((text, gold))
        assert not is_correct(boxed("123456789.25"), text.removeprefix("\\boxed{")[:-1]).correct
    assert all(len(normalise(extract(text))) < 40 for text, _ in accepted), accepted
    assert len(accepted) < 18  # short texts such as "1" equal a gold by chance


TEX = st.lists(
    st.one_of(st.characters(), st.sampled_from([*"0123456789xne^_{}()[]|,.=<+-*/!", *hostile.ATOMS])), max_size=25
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(TEX.map("".join), TEX.map("".join))
def test_no_text_raises(response, gold):
    is_correct(response, gold)
    verdict = is_correct("\\boxed{" + response + "}", gold)
    assert not verdict.correct or is_gold(gold)
    json.dumps(verdict.__dict__)


def test_megabytes_and_deep_nesting_are_refused():
    for text in ("{" * 2_000_000, r"\boxed{" * 300_000, r"\boxed{" + "{}" * 1_000_000, "\\boxed{1}" * 200_000 + "{",
                 r"\boxed{" + "(" * 100_000 + ")" * 100_000 + "}", "<think>" * 500_000, "\\" * 1_000_000):  # fmt: skip
        assert not is_correct(text, "7").correct
        assert not is_gold(text)


def test_one_budget_and_no_clock_bounds_the_work_of_a_verdict(monkeypatch):
    """Every reading of the answer and of the gold and every comparison spends units of one budget."""
    spent, spend = [], expression.Work.spend
    monkeypatch.setattr(expression.Work, "spend", lambda work, units: spent.append(units) or spend(work, units))
    atoms = ["1e4999+", r"\sin(x)^x", "x!+", "2^{9999}:", r"2^{9999}\pm", r"\sqrt{x},", "C_1x+", r"\lfloor n/7\rfloor+",
             "A x ", r"\frac{dx}{dt}+", "i^x+", r"\zeta(x!)+",
             r"\vec{u}\times", r"x\hat{k}+", r"\pi", "(x,y),", "x=", "f(x,y)+", "1,", "x<"]  # fmt: skip
    most = 0
    for atom in atoms:
        for count in (20, 40, 900 // len(atom)):
            text = atom * count + "1"
            for response, gold in ((text, "7"), (text, "n+x"), (text, text + "+C"), ("x+n", text), ("c+" + text, text)):
                answers._read.cache_clear()
                spent.clear()
                is_correct(boxed(response), gold)
                most = max(most, sum(spent))
    assert expression.BUDGET < most < 5 * expression.BUDGET  # the units of a reading count again in the total
    with expression.Work() as work, pytest.raises(TooComplex):
        parse("+".join(["x"] * 199))
    assert -100 < work.left < 0


def test_repetitions_do_not_make_another_reading_slow():
    for atom in (
        r"\theta_",
        r"\dot x",
        "m^-1 ",
        "m/s ",
        "for ",
        "x and ",
        "x>",
        r"\frac{f(x)}",
        "(x>0) ",
        ", (",
        "Yes, ",
    ):
        for start in ("", "x^2, ", "5 ", "x for "):
            before = time.process_time()
            for gold in ("5", "x^2+C"):
                assert not is_correct(boxed(start + atom * ((140 - len(start)) // len(atom)) + "=6"), gold).correct
            assert time.process_time() - before < 0.2, (start, atom)


def test_a_verdict_does_not_depend_on_what_was_graded_before():
    text = r"\sqrt{x+1}," * 10 + "2"
    answers._read.cache_clear()
    for _ in range(2):
        assert [compare(a, text)[0] for a in (text, r"2, " + r"\sqrt{1+x}," * 10, text + "+x")] == [True, True, False]


def test_numbers_and_nesting_beyond_the_limits_are_refused():
    for text in ("(" * 31 + "1" + ")" * 31, "10^{5000}" + " " * 99 + "*10^{5000}", "2^{30000}", "2101!",
                 r"\binom{5001}{2}", "1e5001"):  # fmt: skip
        with pytest.raises(TooComplex):
            parse(text)
    assert parse("(" * 29 + "1" + ")" * 29).exact == 1


def test_text_of_a_model_never_runs_as_code(tmp_path):
    sentinel = tmp_path / "ran"
    calls = [f"open('{sentinel}','w')", f"__import__('os').system('touch {sentinel}')", f"eval(open('{sentinel}','w'))",
             f"(lambda: open('{sentinel}','w'))()", f"open('{sentinel}','w').write('x')*0*\\pi"]  # fmt: skip
    for call in calls:
        for text in (call, boxed(call), boxed(rf"\text{{{call}}}"), boxed(f"{call}+0")):
            assert not is_correct(text, "0").correct
            is_gold(text)
    assert not sentinel.exists()
    source = "".join(Path(module.__file__).read_text() for module in (rewards, answers, notation, expression))
    assert not re.search(r"\b(?:eval|exec|sympify|parse_expr|parse_latex|lambdify|pickle|signal)\b\(", source)


# sympy as an oracle. No sympy parser sees the text of a model: these tests only build sympy trees and print them.

X, Y = sympy.symbols("x y", real=True)


def random_tree(rng: random.Random, depth: int, leaves: list, functions: list) -> sympy.Expr:
    """A random expression. sympy may simplify it while it is built."""
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(leaves)
    kind, a = rng.random(), random_tree(rng, depth - 1, leaves, functions)
    if functions and kind < 0.3:
        return rng.choice(functions)(a)
    if kind < 0.45:
        return a ** rng.choice([-2, -1, 2, 3])
    b = random_tree(rng, depth - 1, leaves, functions)
    return a + b if kind < 0.65 else a - b if kind < 0.75 else a * b if kind < 0.9 or b == 0 else a / b


def random_trees(seed: int, count: int, depth: int, leaves: list, functions: list) -> list[sympy.Expr]:
    rng = random.Random(seed)
    trees = (random_tree(rng, depth, leaves, functions) for _ in range(3 * count))
    return [t for t in trees if not t.has(sympy.zoo, sympy.nan, sympy.oo) and sympy.count_ops(t) < 30][:count]


RATIONALS = [sympy.Rational(n, d) for n in (-7, -1, 2, 3, 10) for d in (1, 3, 4)]
OPERATIONS = [  # the same operation in Python and in TeX
    (lambda a, b: a + b, r"({}+{})"), (lambda a, b: a - b, r"\left({}-({})\right)"), (lambda a, b: a * b, r"({})({})"),
    (lambda a, b: a * b, r"{}\cdot ({})"), (lambda a, b: a / b, r"\frac{{{}}}{{{}}}"), (lambda a, b: a**2, "({})^2"),
    (lambda a, b: a**-3, "({})^{{-3}}"), (lambda a, b: abs(a), r"\left|{}\right|"),
]  # fmt: skip


def random_rational(rng: random.Random, depth: int) -> tuple[sympy.Rational, str]:
    """A random rational number and a TeX expression for it. sympy prints the numbers in the expression."""
    if depth == 0:
        value = rng.choice(RATIONALS)
        return value, f"({sympy.latex(value)})"
    (a, text_a), (b, text_b) = random_rational(rng, depth - 1), random_rational(rng, depth - 1)
    operation, template = rng.choice([pair for pair in OPERATIONS if a != 0 and b != 0] or OPERATIONS[:4])
    return operation(a, b), template.format(text_a, text_b)


def test_rational_expressions_have_exactly_the_value_that_sympy_computes():
    rng = random.Random(1)
    for _ in range(300):
        value, text = random_rational(rng, rng.randrange(4))
        assert parse(normalise(text)).exact == Fraction(value.p, value.q), text


def test_expressions_have_the_values_that_sympy_computes():
    leaves = [*RATIONALS[6:10], X, X, Y, sympy.pi, sympy.E, sympy.I, sympy.factorial(Y), sympy.binomial(Y, X)]
    functions = [sympy.sin, sympy.cos, sympy.tan, sympy.exp, sympy.log, sympy.sqrt, sympy.Abs, sympy.floor,
                 sympy.ceiling, sympy.cosh, lambda a: sympy.log(a) / sympy.log(2)]  # fmt: skip
    compared = 0
    for tree in random_trees(2, 150, 3, leaves, functions):
        value = parse(normalise(sympy.latex(tree)))
        for i in (0, 3, 5) if tree.free_symbols else (0,):  # a positive rational, an integer, a negative rational
            point = value.points[i]
            if point is None or abs(expression.mp.mag(point)) > 100:
                continue
            letters = {s: sympy.Float(str(letter(s.name).points[i]), 60) for s in tree.free_symbols}
            expected = expression.mp.mpmathify(tree.evalf(40, subs=letters))
            assert abs(point - expected) <= 1e-30 * max(1, abs(expected)), (sympy.latex(tree), letters)
            compared += 1
    assert compared > 200


def test_equivalence_agrees_with_sympy_s_equality():
    """On rewritings of random expressions, and on changed ones: a term, a sign, a coefficient, a letter."""
    rng = random.Random(3)
    equal = unequal = 0
    roots = [sympy.Integer(1), sympy.Integer(2), sympy.sqrt(2), sympy.sqrt(3), sympy.sqrt(6), sympy.Rational(1, 2)]
    polynomials = random_trees(4, 80, 3, [X, X, Y, Y, *RATIONALS[6:10]], [])
    for tree in [*polynomials, *random_trees(5, 30, 3, roots, [])]:
        if tree.is_Rational:
            continue
        rewritten = rng.choice([sympy.expand, sympy.factor, sympy.together, sympy.cancel])(tree)
        changes = [rewritten, rewritten + rng.choice([X, Y, 1, sympy.sqrt(2)]), -tree, 2 * tree, tree**2,
                   tree.subs(X, Y), tree.subs({X: Y, Y: X}, simultaneous=True)]  # fmt: skip
        for other in (rewritten, rng.choice(changes)):
            expected = sympy.radsimp(sympy.cancel(tree - other)).expand() == 0
            text, other_text = sympy.latex(tree), sympy.latex(other)
            assert same(parse(normalise(other_text)), parse(normalise(text))) == expected, (text, other_text)
            if not other.is_Rational:  # a number must be evaluated, an expression in letters need not
                assert equivalent(other_text, text) == expected, (text, other_text)
            equal, unequal = equal + expected, unequal + (not expected)
    assert min(equal, unequal) > 40


# Properties

NUMBERS = [Fraction(n, d) for n in (-7, -1, 2, 3, 12, 1234567) for d in (1, 3, 8, 100)]
SPELLINGS = [  # of a fraction n/d
    lambda n, d: rf"\frac{{{n}}}{{{d}}}", lambda n, d: rf"\dfrac{{{n}}}{{{d}}}", lambda n, d: f"{n}/{d}",
    lambda n, d: rf"{'-' * (n < 0)}\frac{{{abs(n)}}}{{{d}}}", lambda n, d: rf"-\frac{{{-n}}}{{{d}}}",
    lambda n, d: rf"\frac{{{-n}}}{{{-d}}}", lambda n, d: rf" $ \left( \tfrac{{{n}}} {{{d}}} \right) $ ",
    lambda n, d: rf"\frac{{{3 * n}}}{{{3 * d}}}", lambda n, d: rf"x = \frac{{{n}}}{{{d}}}.",
    lambda n, d: rf"\mathbf{{{n}/{d}}}", lambda n, d: rf"{n}/{d} \text{{ units}}",
]  # fmt: skip


def test_spelling_spacing_and_signs_keep_the_verdict_and_another_value_changes_it():
    for i, spelling in enumerate(SPELLINGS):
        for value in NUMBERS:
            gold = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
            assert equivalent(spelling(value.numerator, value.denominator), gold), (value, i)
            for other in (value + Fraction(1, 1000), -value, value + 1, 1 / value if abs(value) != 1 else value + 2):
                assert not equivalent(spelling(other.numerator, other.denominator), gold), (value, other, i)


EXPRESSIONS = [r"3\sqrt{13}", r"x^2-2x+1", r"\frac{\pi}{4}", r"\sin^2 x - \cos 2y", r"2^{n}-n-1",
               r"\frac{-1+\sqrt{5}}{2}", r"6-5i", r"e^{-2t}+C_1", r"\log_2 5", r"\binom{2n}{n}", r"n!+3", r"|x-1|",
               r"\lfloor n/2\rfloor+1"]  # fmt: skip


def test_rewriting_an_expression_keeps_its_value_and_a_change_does_not():
    for text in EXPRESSIONS:
        kept = [f"({text})", f"1\\cdot({text})", f"({text})+y-y", f"-(-({text}))", f"\\frac{{2({text})}}{{2}}",
                f"\\left[{text}\\right]", text.replace("\\", " \\"),
                f"\\frac{{1}}{{\\frac{{1}}{{{text}}}}}"]  # fmt: skip
        changed = [f"-({text})", f"({text})+1", f"2({text})", f"({text})^2", f"({text})+10^{{-20}}",
                   f"\\frac{{1}}{{{text}}}"]  # fmt: skip
        for other in kept:
            assert equivalent(other, text), other
        for other in changed:
            assert not equivalent(other, text), other


def test_the_order_in_a_set_or_list_does_not_matter_and_in_a_tuple_it_does():
    items = ["1", r"\frac{1}{2}", r"\sqrt{3}", "x+1"]
    gold = ", ".join(items)
    for seed in range(10):
        shuffled = random.Random(seed).sample(items, 4)
        assert equivalent(", ".join(shuffled), gold)
        assert equivalent(rf"\{{{', '.join(shuffled)}\}}", gold)
        assert equivalent(f"({', '.join(shuffled)})", f"({gold})") == (shuffled == items)
        assert not equivalent(", ".join(shuffled[1:]), gold)
        assert not equivalent(", ".join([*shuffled, "1"]), gold)


def test_equality_is_reflexive_and_symmetric_for_exact_values():
    texts = sorted({case[0] for case in CASES if is_gold(case[0])})
    for a in texts:
        assert equivalent(a, a), a
    exact = [t for t in texts if isinstance(read(t)[0], answers.Quantity) and read(t)[0].value.exact is not None]
    exact = [t for t in exact if not read(t)[0].value.flags and not read(t)[0].unit][:60]
    for a in exact:
        for b in exact:
            assert equivalent(a, b) == equivalent(b, a) == (read(a)[0].value.exact == read(b)[0].value.exact)


def test_expressions_have_the_values_that_python_computes():
    for text, value in (
        (r"\frac{3}{4}\cdot 2^5-1", 23), (r"\sqrt[3]{-8}", -2), (r"\log_{10} 1000", 3), ("7!/5!", 42), ("0.1e2", 10),
        (r"\cos 60^\circ", 0.5), (r"\sin^2\frac{\pi}{3}", 0.75), (r"|3-4i|", 5), ("2^3^2", 512), ("-2^2", -4),
        (r"\tan^{-1} 1", math.pi / 4), (r"\binom{10}{3}", 120), ("1 1/2", 1.5), (r"\ln e^2", 2), ("e^{i\\pi}", -1),
        (r"\lceil 2.1\rceil+\lfloor -2.1\rfloor", 0), (r"2\frac{1}{2}", 2.5), (r"0.1\overline{6}", 1 / 6),
    ):  # fmt: skip
        assert abs(complex(parse(normalise(text)).points[0]) - value) < 1e-12, text


def test_exact_numbers_are_compared_exactly_and_others_to_35_digits():
    assert not same(parse("10^{50}+1"), parse("10^{50}"))
    assert same(parse("\\sqrt{2}\\sqrt{3}"), parse("\\sqrt{6}"))
    assert not same(parse("\\sqrt{2}"), parse("\\frac{886731088897}{627013566048}"))  # equal to 24 digits
    assert proportional(parse("2x-4y"), parse("2y-x"))
    assert not proportional(parse("2x-4y"), parse("2y-x"), positive=True)
    assert not proportional(parse("x-y"), parse("x+y"))
