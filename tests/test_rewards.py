"""rewards.py: what earns a reward, what does not, and that no text can raise."""

import json
import random
from pathlib import Path

import pytest

from rewards import MAX_ANSWER, equivalent, extract, is_correct, is_gold

DATA = Path(__file__).parents[2] / "shared" / "data"

EXTRACTED = [
    (r"\boxed{42}", "42"),
    (r"first \boxed{1}, no, \boxed{2}.", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\text{a}{b}{{c}}} trailing }", r"\text{a}{b}{{c}}"),
    (r"\boxed{}", ""),
    (r"\boxed{\boxed{3}}", "3"),
    ("no box", None),
    ("42", None),
    (r"\boxed{1} and then \boxed{2", None),
    (r"\boxed 5", None),
    (r"boxed{5}", None),
    ("", None),
]

EQUAL = [
    ("42", "42"), ("42", "42.0"), ("42", "+42"), ("1/2", "0.5"), (r"\frac{1}{2}", ".5"), (r"\dfrac{-3}{4}", "-0.75"),
    (r"-\frac{3}{4}", "-3/4"), ("1,234", "1234"), ("1,234,567.50", "1234567.5"), ("$ 7 $", "7"), ("7.", "7"),
    ("0.1", "1/10"), ("-0", "0"), (r"\text{yes}", "yes"), ("x+1", "x + 1"), (r"\left(1,2\right)", "(1, 2)"),
]  # fmt: skip
DIFFERENT = [
    ("42", "43"), ("42", "4 2.5"), ("1/2", "2/1"), ("1,23", "123"), ("12,34,567", "1234567"), ("1/0", "1/0.0"),
    ("0.333", "1/3"), ("", ""), (" ", ""), ("$$", ""), ("1e2", "100"), ("²", "2"), ("٣", "3"), ("2+2", "4"),
    ("--4", "4"), ("4 or 5", "4"), ("4 2", "42"), ("1 1/2", "5.5"), ("yes", "Yes"), ("1__0", "10"), ("0x10", "16"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "answer"), EXTRACTED)
def test_the_last_complete_box_is_extracted(response, answer):
    assert extract(response) == answer


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal_answers(a, b):
    assert equivalent(a, b)
    assert equivalent(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_answers(a, b):
    assert not equivalent(a, b)
    assert not equivalent(b, a)


def test_the_verdict_says_why():
    assert is_correct(r"\boxed{4}", "4").reason == "equal"
    assert is_correct(r"\boxed{5}", "4").reason == "different"
    assert is_correct("4", "4").reason == "no_answer"
    assert is_correct(r"\boxed{" + "1" * 300 + "}", "4").reason == "too_long"
    assert is_correct(r"\boxed{}", "").reason == "bad_gold"
    assert is_correct(r"\boxed{5}", "4").extracted == "5"


def test_nothing_is_correct_for_an_empty_or_endless_gold():
    for gold in ("", "  ", "$$", "1" * (MAX_ANSWER + 1)):
        assert not is_gold(gold)
        assert not is_correct(r"\boxed{" + gold + "}", gold).correct


def test_no_text_raises_or_earns_a_reward_by_chance():
    rng = random.Random(0)
    pieces = [r"\boxed{", "}", "{", r"\frac",
              "9" * 5000, "1/", "/", ",", ".", "-", "$", "\0", "\ud800", "{0!r}", "__class__",
              r"\text{", "10^{10^{10}}", "٣", "%s", "\n", " ", "e99999"]  # fmt: skip
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 12)))
        assert not is_correct(text, "123456789").correct
        assert not is_correct(r"\boxed{" + text + "}", "123456789").correct
        is_correct(r"\boxed{4}", text)


def test_megabytes_of_braces_take_no_time_to_speak_of():
    for text in ("{" * 2_000_000, r"\boxed{" * 300_000, r"\boxed{" + "{}" * 1_000_000):
        assert not is_correct(text, "1").correct


def test_every_boxed_math500_solution_earns_its_own_answer():
    """Extraction alone: the reference solution's box against itself; the full equivalence is not asked here."""
    path = DATA / "math500.jsonl"
    if not path.exists():
        pytest.skip("shared/data/math500.jsonl is absent")
    rows = [json.loads(line) for line in path.open()]
    correct = sum(is_correct(row["solution"], row["answer"]).correct for row in rows)
    assert correct >= 480, correct
