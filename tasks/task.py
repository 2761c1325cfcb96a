"""The task: problems for RL, demonstrations for SFT, and evaluation problems that occur in neither."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

import rewards
from grading.answers import MAX_ANSWER
from infra.files import DataError
from infra.run import progress
from ops.packed import Row
from tasks.prompts import INSTRUCTION, encode_prompt, encode_response, end_of_turn, prompt_text, unknown_characters

Drawn = tuple[str, str, str]  # (question, worked steps, answer) of a built-in task
BOX = "\\boxed{"  # begins the answer of a built-in task's demonstration
EVAL_SEED = 2509_06948  # of the evaluation problems of the built-in tasks, which are the same for every run
NGRAM = 13  # consecutive words that a training question may not share with an evaluation question
SENTENCE = re.compile(r"\n|(?<=[.:])\s|(?<=[!?。])")  # where one ends
# A word, a character of a script without spaces, or a sign, but none that ends a sentence
CHARACTER = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"  # of Thai to Khmer, Japanese, Chinese
WORD = re.compile(rf"{CHARACTER}|(?:(?!{CHARACTER})\w)+|[^\w\s.?。]|\.(?=\d)")


def _check_text(**fields) -> None:
    for name, value in fields.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be text, it is {value!r:.80}")


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer. Raises TypeError unless both are text."""

    question: str
    answer: str
    group: str = "all"  # evaluation reports one accuracy per group: benchmark, chain length, level
    labels: tuple[str, ...] = ()  # finer groups, such as "subject Algebra"
    tolerance: float | None = None  # see rewards.is_correct
    unit: str | None = None
    extra: dict = field(default_factory=dict, compare=False, repr=False)  # its data row's other fields, for rewards

    def __post_init__(self):
        _check_text(question=self.question, answer=self.answer, group=self.group)


@dataclass(frozen=True)
class Demonstration:
    """A question with a response to imitate. Raises TypeError unless these and the source are text."""

    question: str
    response: str
    answer: str | None = None  # gold: the data row's answer, else the boxed answer of the response
    extra: dict = field(default_factory=dict, compare=False, repr=False)  # as in Problem
    source: str = field(default="", repr=False)  # annotator or file: its demonstrations share a weight in weighed

    def __post_init__(self):
        _check_text(question=self.question, response=self.response, source=self.source)


@dataclass
class Task:
    problems: list[Problem]  # D_RL
    demonstrations: list[Demonstration]  # D_SFT
    evaluation: list[Problem]
    instruction: str = INSTRUCTION  # follows every question in a chat template
    template: str = ""  # a name in prompts.TEMPLATES; empty: the model's chat template
    verifier: Callable[[str, Problem], bool] | None = None  # whether a response is right; None: the grader
    kept_apart: list[str] = field(default_factory=list)  # questions of the evaluation sets beyond `evaluation`
    notes: list[str] = field(default_factory=list)  # dropped rows and warnings, printed before training

    def verdict(self, response: str, problem: Problem) -> rewards.Verdict:
        """Whether a response is right: by the task's own verifier, or else by the grader and the gold answer."""
        if self.verifier is None:
            return rewards.is_correct(response, problem.answer, tolerance=problem.tolerance, unit=problem.unit)
        answer = rewards.extract(response) or response
        return rewards.Verdict(self.verifier(response, problem), answer[:MAX_ANSWER], "verifier")

    def reward(self, response: str, problem: Problem) -> float:
        """r(ŷ, y) of eq. (3): 1.0 for a right response, else 0.0."""
        return float(self.verdict(response, problem).correct)

    reward.right_from = 1.0  # a reward of at least this much is that of a right response


def draw_distinct(draw: Callable[[int], Drawn], count: int, taken: Callable[[str], bool]) -> list[Drawn]:
    """`count` rows with different questions, none of them `taken`. draw(i) makes a candidate for row i."""
    rows: dict[str, Drawn] = {}
    while len(rows) < count:
        row = draw(len(rows))
        if not taken(row[0]):
            rows.setdefault(row[0], row)
    return list(rows.values())


def check_eval_problems(asked: int, most: int) -> None:
    """Raises DataError if a built-in task has fewer evaluation problems than are asked for."""
    if asked > most:
        raise DataError(f"eval_problems: the task has {most} of each group, {asked} asked for")


def note_dropped(notes: list[str], setting: str, rows: list, kept: list, reason: str) -> None:
    """Adds a note if `kept` has fewer rows than `rows`."""
    dropped = len(rows) - len(kept)
    if dropped > 0:
        notes.append(f"{setting}: {dropped} of {len(rows)} {reason}: dropped")


def encode_demonstration(tokenizer, row: Demonstration, instruction: str, template: str, end: int | None) -> Row:
    """(prompt ids, response ids); the response ends with exactly one `end`, the end of turn; None: EOS."""
    if end is None:
        end = tokenizer.eos_token_id
    prompt = prompt_text(tokenizer, row.question, instruction, template)
    response_ids = encode_response(tokenizer, row.response, prompt, template, end)
    prompt_ids = encode_prompt(tokenizer, row.question, instruction, template)
    return prompt_ids, response_ids


def decontaminate(task: Task) -> None:
    """Drops problems and demonstrations with a question of the evaluation, or with NGRAM words of one; adds notes.

    What many questions share, such as an instruction or a story with other numbers, does not count.
    """
    evaluated = [*(p.question for p in task.evaluation), *task.kept_apart]
    trained = [row.question for row in [*task.problems, *task.demonstrations]]
    common = frequent(evaluated, least=3) | frequent(trained, least=5)
    known = {mark for question in evaluated for mark in marks(question, common)}

    def without_evaluated(rows: list, setting: str) -> list:
        clean = []
        shared = ""
        for row in rows:
            found = next((mark for mark in marks(row.question, common) if mark in known), "")
            shared = shared or found
            if not found:
                clean.append(row)
        reason = f"share {NGRAM} words in a row, or all, with an evaluation problem, first {shared!r:.99}"
        note_dropped(task.notes, setting, rows, clean, reason)
        return clean

    task.problems = without_evaluated(task.problems, "rl_data")
    task.demonstrations = without_evaluated(task.demonstrations, "sft_data")


def marks(question: str, common: Collection[str] = ()) -> list[str]:
    """All runs of NGRAM words between sentences that are common; in brackets the whole text, and without those."""
    pieces = sentences(question)
    stretches: list[list[str]] = [[]]
    for sentence in pieces:
        if sentence in common:
            stretches.append([])
        else:
            stretches[-1].append(sentence)
    found = [run for stretch in stretches for run in runs(stretch) if without_numbers(run) not in common]
    own = " ".join(sentence for stretch in stretches for sentence in stretch)
    if not is_short(own):
        found.append(f"[{own}]")
    return [*found, f"[{' '.join(pieces)}]"]


def frequent(questions: list[str], least: int) -> set[str]:
    """The sentences of 5 words, and runs with any numbers, of `least` and more than a tenth of the questions."""
    distinct = list(dict.fromkeys(questions))
    sample = distinct[:: 1 + len(distinct) // 1000]
    count = Counter()
    for question in sample:
        pieces = sentences(question)
        long = {sentence for sentence in pieces if not is_short(sentence)}
        count.update(long | {without_numbers(run) for run in runs(pieces)})
    return {part for part, number in count.items() if number >= max(least, len(sample) / 10)}


def runs(pieces: list[str]) -> list[str]:
    """All NGRAM words in a row of sentences, without signs."""
    words = [word for word in " ".join(pieces).split() if word[0].isalnum()]
    return [" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]


def sentences(text: str) -> list[str]:
    """The words and signs of each sentence, with spaces between: 1 + 2 equals 1+2 and differs from 1-2."""
    text = re.sub("(?<=\\w)(?=[²³¹⁰-₉])", "^", text)  # 5² is no 52
    pieces = SENTENCE.split(normalize("NFKC", text).lower())
    return [sentence for piece in pieces if (sentence := " ".join(WORD.findall(piece)))]


def is_short(words: str) -> bool:
    """Whether a text has fewer than 5 words and signs: "what is the total" is no question of one problem alone."""
    return words.count(" ") < 4


def without_numbers(text: str) -> str:
    return re.sub(r"\d+", "0", text)


def check_evaluation(
    problems: list[Problem], tokenizer, instruction: str, max_new_tokens: int, positions: int, template: str = ""
) -> None:
    """Raises DataError without problems, or if a prompt and `max_new_tokens` more exceed the model's `positions`.

    Also if the tokenizer loses characters of every question, as that of a built-in model does on another's task.
    """
    if not problems:
        raise DataError("eval_data: no usable row is left")
    # Stops at the first question that is whole, usually the first of all.
    if all(unknown_characters(tokenizer, p.question) for p in problems):
        unknown = set.union(*(unknown_characters(tokenizer, p.question) for p in problems))
        some = ", ".join(repr(character) for character in sorted(unknown)[:8])
        raise DataError(f"the model's tokenizer has no token for {some} of the questions: choose another model")
    room = positions - max_new_tokens  # tokens a prompt may have
    lengths = [len(encode_prompt(tokenizer, p.question, instruction, template)) for p in problems]
    too_long = sum(length > room for length in lengths)
    if too_long > 0:
        limit = f"{room} tokens, the model's {positions} positions less max_new_tokens={max_new_tokens}"
        raise DataError(f"eval_data: {too_long} prompts exceed {limit}: lower max_new_tokens or remove them")


def prepare(
    task: Task, tokenizer, max_new_tokens: int, positions: int, with_demonstrations: bool = True,
    with_problems: bool = True,
) -> list[Row]:  # fmt: skip
    """Drops contaminated and too long rows of the task; returns its demonstrations as (prompt ids, response ids).

    Nothing is shortened. Raises DataError if an evaluation prompt is too long, or no row is left of what is trained.
    """
    check_evaluation(task.evaluation, tokenizer, task.instruction, max_new_tokens, positions, task.template)
    decontaminate(task)
    room = positions - max_new_tokens  # tokens a prompt may have

    problems = []
    for p in progress(task.problems, "encoding prompts"):
        if len(encode_prompt(tokenizer, p.question, task.instruction, task.template)) <= room:
            problems.append(p)
    note_dropped(
        task.notes, "rl_data", task.problems, problems, f"prompts exceed {room} tokens, {positions} less max_new_tokens"
    )

    end = end_of_turn(tokenizer, task.template)
    demonstrations = []
    encoded = []
    for d in progress(task.demonstrations, "encoding demonstrations"):
        prompt, response = encode_demonstration(tokenizer, d, task.instruction, task.template, end)
        if len(prompt) <= room and len(response) <= max_new_tokens:
            demonstrations.append(d)
            encoded.append((prompt, response))
    reason = f"demonstrations exceed max_new_tokens={max_new_tokens}"
    note_dropped(task.notes, "sft_data", task.demonstrations, demonstrations, reason)

    # Wrong demonstrations are kept, since some tasks test whether a method can ignore them.
    wrong = []
    for d in task.demonstrations:
        if not task.verdict(d.response, Problem(d.question, d.answer or "", extra=d.extra)).correct:
            wrong.append(d)
    if wrong:
        first = f"the first ends {wrong[0].response[-60:]!r}, its gold answer is {wrong[0].answer!r}"
        judge = "grader" if task.verifier is None else "verifier"
        refused = f"the {judge} refuses {len(wrong)} of {len(task.demonstrations)} demonstrations"
        task.notes.append(f"sft_data: WARNING, {refused}; {first}")

    task.problems = problems
    task.demonstrations = demonstrations
    note_several_golds(task)
    empty = ""
    if with_problems and not problems:
        empty = "rl_data"
    elif with_demonstrations and not demonstrations:
        empty = "sft_data"
    if empty:
        reasons = "".join(f" ({note})" for note in task.notes if note.startswith(empty))
        raise DataError(f"{empty}: no usable row is left{reasons}")
    return encoded


def note_several_golds(task: Task) -> None:
    """Adds a note on questions of D_RL with several golds."""
    different = {(p.question, p.answer) for p in task.problems}
    golds = Counter(question for question, _ in different)
    several = [p.question for p in task.problems if golds[p.question] > 1]
    if several:
        text = f"{len(set(several))} questions have several golds, all are trained"
        task.notes.append(f"rl_data: {text}: first {several[0]!r:.99}")


def pair(task: Task, demonstrations: list[Row], method: str) -> dict[str, list[Row]]:
    """Drops problems without a demonstration of their question; returns the demonstrations of each question.

    If none is left, the problems are made of the demonstrations, whose `answer` is the gold. `demonstrations` are the
    task's, encoded. Adds a note. Raises DataError if no demonstration has an answer.
    """
    demonstrations_of: dict[str, list[Row]] = {}
    problem_of = {}  # made of the demonstration of a question
    for d, row in zip(task.demonstrations, demonstrations, strict=True):
        demonstrations_of.setdefault(d.question, []).append(row)
        if d.answer is not None:
            problem_of[d.question] = Problem(d.question, d.answer, extra=d.extra)
    paired = [p for p in task.problems if p.question in demonstrations_of]
    if paired:
        task.notes.append(f"method {method}: {len(paired)} of {len(task.problems)} prompts have a demonstration: kept")
    elif problem_of:
        paired = list(problem_of.values())
        own = f"the {len(paired)} questions of sft_data"
        task.notes.append(f"method {method}: no prompt has a demonstration; {own} replace them")
    else:
        raise DataError(f"method {method} needs demonstrations of its prompts: no question of rl_data is in sft_data")
    task.problems = paired
    return demonstrations_of


class Sources(NamedTuple):
    """Where demonstrations come from."""

    names: list[str]  # [S] empty for a demonstration that names none, which is a source of its own
    number: list[int]  # [N] the source of each demonstration


def sources_of(task: Task) -> Sources:
    """Numbers the sources of the task's demonstrations in the order of their first ones."""
    names: list[str] = []
    number_of: dict[str | int, int] = {}
    numbers = []
    for i, d in enumerate(task.demonstrations):
        key = d.source or i  # without a name, a demonstration is a source of its own
        if key not in number_of:
            number_of[key] = len(names)
            names.append(d.source)
        numbers.append(number_of[key])
    return Sources(names, numbers)


class Stream:
    """Endless shuffled passes over `count` items. Draws depend on `seed` and `position` only, so a run can resume."""

    def __init__(self, count: int, seed: tuple[int, ...]):
        self.count = count
        self.seed = seed
        self.position = 0

    def take(self, n: int) -> list[tuple[int, int]]:
        """The next n draws as (number of the draw, index of the item)."""
        order_of = {}  # epoch -> the order of its items
        taken = []
        for draw in range(self.position, self.position + n):
            epoch, place = divmod(draw, self.count)
            if epoch not in order_of:
                order_of[epoch] = np.random.default_rng((*self.seed, epoch)).permutation(self.count).tolist()
            taken.append((draw, order_of[epoch][place]))
        self.position += n
        return taken


def fingerprint(task: Task, with_extra: bool = False) -> str:
    """A hash of the text of problems, demonstrations, evaluation problems and prompts, and of each one's `extra`."""
    # Of the sources their numbers, since names of files may change.
    rows = task.problems, task.demonstrations, task.evaluation
    text = repr((*rows, task.instruction, task.template, sources_of(task).number))
    if with_extra or task.verifier is not None:
        # Of an object that is no JSON value its type: its text may have an address, which differs between processes.
        extra = [row.extra for row in (*task.problems, *task.demonstrations, *task.evaluation)]
        text += json.dumps(extra, skipkeys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()
