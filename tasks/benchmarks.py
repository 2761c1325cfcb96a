"""The benchmarks: their sources and the way from a row to a problem. A further benchmark is one more entry."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

import numpy as np

import rewards
from infra.files import DataError
from tasks.sources import label, read_rows, text_field, worked
from tasks.task import Problem


@dataclass(frozen=True)
class Benchmark:
    hub: str  # the source on the hub, see sources.py
    samples: int  # per problem in the protocol "sampled"
    gold: Callable[[dict], object] = lambda row: row["answer"]  # of a row
    question: tuple[str, ...] = ("problem", "question")  # field names; the first one present is read
    labels: tuple[str, ...] = ()  # fields of finer groups
    tolerance: float | None = None  # relative
    options: Callable[[dict], list[str]] | None = None  # the choices of a row, the right one first


BENCHMARKS = {
    "math500": Benchmark("HuggingFaceH4/MATH-500:test", 4, labels=("level", "subject")),
    # the solutions box the golds, many of them rounded; the tolerance is that of the harness that the paper uses
    "minerva_math": Benchmark("math-ai/minervamath:test", 4, labels=("type",), tolerance=1e-4,
                              gold=lambda row: worked(text_field(row, ("answer", "solution"), "")[1])[1]),
    "olympiadbench": Benchmark("Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", 4, labels=("subfield", "answer_type"),
                               gold=lambda row: ", ".join(row["final_answer"])),
    "aime24": Benchmark("HuggingFaceH4/aime_2024:train", 32),
    "amc23": Benchmark("math-ai/amc23:test", 32),
    "gsm8k": Benchmark("openai/gsm8k:main:test", 1, lambda row: worked(row["answer"])[1]),
    "gpqa": Benchmark("Idavidrein/gpqa:gpqa_diamond:train", 8, question=("Question",), labels=("High-level domain",),
                      options=lambda row: [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]),
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro:test", 1, labels=("category",),
                          options=lambda row: [row["options"].pop(row["answer_index"]), *row["options"]]),
}  # fmt: skip
OPTIONS_SEED = 0  # fixed: every sampling seed gets the same order of choices


def read_benchmark(name: str, folder: str, setting: str = "--benchmarks") -> list[Problem]:
    """All problems of a benchmark, read from FOLDER/NAME.jsonl if this file exists, else from the hub."""
    benchmark = BENCHMARKS[name]
    local = Path(folder) / f"{name}.jsonl"
    source = str(local) if local.exists() else benchmark.hub
    try:
        rows = list(read_rows(source, setting))
    except DataError as error:
        raise DataError(f"{error}; or put the rows into {local}") from error
    problems = []
    for i, (place, row) in enumerate(rows):
        try:
            question = next(row[field] for field in benchmark.question if row.get(field))
            if benchmark.options:
                lettered, gold = shuffled_options(benchmark.options(row), i)
                question += f"\n{lettered}\n\nAnswer with the letter of the right option."
            else:
                _, gold = text_field({"answer": benchmark.gold(row)}, ("answer",), place)
            tolerance = relative_tolerance(row["error"], gold) if row.get("error") else benchmark.tolerance
            finer = tuple(label(row, field) for field in benchmark.labels if label(row, field))
            problems.append(Problem(question, gold, name, finer, tolerance, row.get("unit") or None))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
            raise DataError(f"{place} is no row of {name}: {error!r}") from error
    return problems


def shuffled_options(options: list[str], row: int) -> tuple[str, str]:
    """(the options with letters, a line each; the letter of the first option) in the order of a benchmark's row."""
    order = np.random.default_rng((OPTIONS_SEED, row)).permutation(len(options))
    lines = [f"\n({ascii_uppercase[n]}) {options[j]}" for n, j in enumerate(order)]
    return "".join(lines), ascii_uppercase[order.argmin()]


def relative_tolerance(error: str, gold: str) -> float | None:
    """error / |gold|, or None unless both are numbers. OlympiadBench has absolute tolerances in the field "error"."""
    try:
        return abs(float(error) / float(rewards.read(gold)[0].value.exact))
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        return None
