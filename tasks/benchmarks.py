"""The benchmarks: where each comes from and how its rows become problems. Add your own as one more entry.

Rows are read from FOLDER/NAME.jsonl if there is such a file, else from the hub. Answers are graded by `rewards.py`.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import rewards
from tasks.sources import DataError, Problem, read_rows


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark comes from and how its rows are read.

    The local file NAME.jsonl is preferred to the hub. `gold` turns a row into the gold answer; `options` into the
    choices of a multiple-choice question, the right one first.
    """

    hub: tuple[str, str | None, str]  # data set, configuration, split
    samples: int  # per problem in the protocol "sampled"
    gold: Callable[[dict], object] = lambda row: row["answer"]
    question: tuple[str, ...] = ("problem", "question")  # the first field present
    labels: tuple[str, ...] = ()  # fields to break the accuracy down by
    tolerance: float | None = None  # relative
    options: Callable[[dict], list[str]] | None = None


BENCHMARKS = {
    "math500": Benchmark(("HuggingFaceH4/MATH-500", None, "test"), 4, labels=("level", "subject")),
    "minerva_math": Benchmark(  # golds are boxed in the solutions; many are rounded measurements
        ("math-ai/minervamath", None, "test"), 4, lambda row: row.get("answer") or rewards.extract(row["solution"]),
        labels=("type",), tolerance=1e-4,  # what the evaluation harness that the paper follows allows
    ),
    "olympiadbench": Benchmark(
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"), 4, lambda row: ", ".join(row["final_answer"]),
        labels=("subfield", "answer_type"),
    ),
    "aime24": Benchmark(("HuggingFaceH4/aime_2024", None, "train"), 32),
    "amc23": Benchmark(("math-ai/amc23", None, "test"), 32),
    "gsm8k": Benchmark(("openai/gsm8k", "main", "test"), 1, lambda row: row["answer"].rpartition("####")[2]),
    "gpqa": Benchmark(
        ("Idavidrein/gpqa", "gpqa_diamond", "train"), 8, question=("Question",), labels=("High-level domain",),
        options=lambda row: [row[f] for f in ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))],
    ),
    "mmlu_pro": Benchmark(
        ("TIGER-Lab/MMLU-Pro", None, "test"), 1, labels=("category",),
        options=lambda row: [row["options"][row["answer_index"]]]
        + [o for i, o in enumerate(row["options"]) if i != row["answer_index"]],
    ),
}  # fmt: skip
OPTIONS_SEED = 0  # not the sampling seed: the questions stay the same ones
PAPER = ("math500", "minerva_math", "olympiadbench", "aime24", "amc23")  # whose plain mean the paper calls average


def read_benchmark(name: str, folder: str, setting: str = "--benchmarks") -> list[Problem]:
    """The problems of a benchmark, from FOLDER/NAME.jsonl or else from the hub.

    Rows without a readable gold stay in and count as wrong: the denominator is the benchmark's. Options are shuffled
    by (OPTIONS_SEED, position). Raises DataError for a row that lacks a field, and without file and network.
    """
    entry, local = BENCHMARKS[name], Path(folder) / f"{name}.jsonl"
    try:
        source = str(local) if local.exists() else ":".join(part for part in entry.hub if part)
        rows = list(read_rows(source, setting))
    except DataError as error:
        raise DataError(f"{error}; or put the rows into {local}") from error
    problems = []
    for i, (where, row) in enumerate(rows):
        try:
            question = next(row[field] for field in entry.question if field in row)
            labels = tuple(f"{field} {row[field]}" for field in entry.labels if row.get(field) is not None)
            if entry.options:
                text, gold = lettered(entry.options(row), np.random.default_rng((OPTIONS_SEED, i)))
                question += text
            else:
                gold = str(entry.gold(row)).strip()
        except (KeyError, TypeError, IndexError, StopIteration) as error:
            raise DataError(f"{setting}: {where} is no row of {name}: {error!r}") from error
        tolerance, unit = entry.tolerance, (row.get("unit") or None)
        if row.get("error"):  # OlympiadBench's absolute tolerance, as a relative one
            tolerance = relative_tolerance(row["error"], gold)
        problems.append(Problem(question, gold, name, labels, tolerance, unit))
    return problems


def lettered(options: list[str], rng: np.random.Generator) -> tuple[str, str]:
    """(the shuffled options as text, the letter of the one that was first)."""
    order = rng.permutation(len(options))
    letters = string.ascii_uppercase
    text = "".join(f"\n({letters[i]}) {options[j]}" for i, j in enumerate(order))
    return f"\n{text}\n\nAnswer with the letter of the right option.", letters[int(np.argmin(order))]


def relative_tolerance(error: str, gold: str) -> float | None:
    """error / |gold| where both are one number; None else, which means exactly."""
    value = rewards.read(gold)[0]
    try:
        return abs(float(error) / float(value.value.exact))
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return None
