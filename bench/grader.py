"""Verdicts per second of the grader and of math-verify, and the slowest verdict on a hostile string.

    python bench/grader.py [--quick] [--data MATH500.jsonl] [--out FILE.jsonl]

Rows of --data have `problem`, `solution` (with a box) and `answer`. Without --data, tests/grader_cases.py supplies the
cases. Half of the responses are correct, the others contain another problem's answer. The caches are emptied first.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hostile  # noqa: E402
from grader_cases import CASES  # noqa: E402

import rewards  # noqa: E402
from grading import answers, expression, notation  # noqa: E402


def responses(rows: list[tuple[str, str]], length: int) -> list[tuple[str, str]]:
    """[(response, gold)]; a response has about `length` characters, and every second one the next problem's answer."""
    pairs = []
    for i, (text, gold) in enumerate(rows):
        answer = rows[(i + i % 2) % len(rows)][1]
        body = (text.replace("\\boxed", "") + "\n") * (1 + length // (len(text) + 1))
        pairs.append((f"{body[:length]}\nThe answer is $\\boxed{{{answer}}}$.", gold))
    return pairs


def clear_caches() -> None:
    for cached in (answers._read, notation.normalise, notation.canonical_unit, expression.letter):
        cached.cache_clear()


def per_second(grade, pairs: list[tuple[str, str]]) -> float:
    start = time.perf_counter()
    for response, gold in pairs:
        grade(response, gold)
    return len(pairs) / (time.perf_counter() - start)


def timed(response: str, answer: str) -> tuple[float, rewards.Verdict]:
    start = time.process_time()
    verdict = rewards.is_correct(response, answer)
    return time.process_time() - start, verdict


def fuzz(count: int, golds: list[str]) -> dict:
    """Grades every hostile string as a response and, without its box, as a gold."""
    slowest, slowest_text, accepted = 0.0, "", 0
    start = time.perf_counter()
    for i, text in enumerate(hostile.strings(0, count, golds)):
        gold = golds[i % len(golds)]
        for response, answer in ((text, gold), (f"\\boxed{{{gold}}}", text.removeprefix("\\boxed{")[:-1])):
            seconds, verdict = timed(response, answer)
            if seconds > 0.02:  # again with empty caches: other processes or garbage collection may have interfered
                clear_caches()
                seconds = min(seconds, timed(response, answer)[0])
            accepted += verdict.correct
            if seconds > slowest:
                slowest, slowest_text = seconds, text
    return dict(
        what="fuzz", strings=count, seconds=round(time.perf_counter() - start, 1), slowest_ms=round(1e3 * slowest, 1),
        slowest_starts=slowest_text[:60], paid_by_chance=accepted,
    )  # fmt: skip


def echoes(rows: list[tuple[str, str]]) -> dict:
    """Counts problems for which a formula copied from the question, $…$ or \\[…\\], earns a reward.

    Formulas that equal the gold as text do not count.
    """
    accepted = 0
    for problem, gold in rows:
        formulas = re.findall(r"\$\$?([^$]+)\$|\\\[(.*?)\\\]", problem, re.DOTALL)
        formulas = [(a or b).strip(" .,\n") for a, b in formulas if len(a or b) < 200]
        formulas = [f for f in formulas if re.search(r"[+*^!|-]|\\[a-z]", f)]  # with an operation to be carried out
        accepted += any(
            answers.equivalent(f, gold) and notation.normalise(f) != notation.normalise(gold) for f in formulas
        )
    return dict(what="echo", problems=len(rows), paid_for_a_formula_of_the_question=accepted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer responses and strings")
    parser.add_argument("--data", type=Path, help="a .jsonl file with solution and answer")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    rows = [(f"We find {answer} after some work. " * 20, gold) for gold, answer, right, _ in CASES if right]
    if args.data:
        rows = [(r["solution"], r["answer"]) for r in map(json.loads, args.data.open(encoding="utf-8"))]
    rows = rows[:60] if args.quick else rows

    results = []
    for length in (1_000, 8_000, 32_000):
        pairs = responses(rows, length)
        clear_caches()
        cold = per_second(rewards.is_correct, pairs)
        warm = per_second(rewards.is_correct, [(" " + response, gold) for response, gold in pairs])
        row = dict(what="speed", characters=length, responses=len(pairs), cold=round(cold), golds_cached=round(warm))
        try:
            from math_verify import parse, verify
        except ImportError:
            print("math-verify is not installed: pip install -r tests/requirements.txt")
        else:
            sample = pairs[: 50 if args.quick else 250]
            oracle = per_second(lambda r, g: verify(parse(f"\\boxed{{{g}}}"), parse(r)), sample)
            row |= dict(math_verify=round(oracle))
        results.append(row)
        print(row)
    clear_caches()
    results.append(fuzz(2_000 if args.quick else 200_000, [gold for _, gold in rows]))
    print(results[-1])
    if args.data:
        problems = [json.loads(line) for line in args.data.open(encoding="utf-8")]
        results.append(echoes([(r["problem"], r["answer"]) for r in problems]))
        print(results[-1])
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        where = dict(commit=commit.stdout.strip(), python=platform.python_version(), machine=platform.machine())
        with args.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row | where) + "\n" for row in results)


if __name__ == "__main__":
    main()
