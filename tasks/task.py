"""The task: problems for RL, demonstrations for SFT, evaluation problems that stand in neither.

Demonstrations are never cut, and what training shares with an evaluation set is dropped and counted.
"""

import re
from dataclasses import dataclass, field

import numpy as np

import rewards
from tasks.benchmarks import BENCHMARKS, read_benchmark
from tasks.prompts import INSTRUCTION, encode_prompt, last_token
from tasks.sources import DataError, Demonstration, Problem, kept_rows, parse_fields, text_of, texts_of

NGRAM = 13  # words in a row that training may not share with evaluation


@dataclass
class Task:
    problems: list[Problem]  # D_RL
    demonstrations: list[Demonstration]  # D_SFT
    evaluation: list[Problem]
    instruction: str = INSTRUCTION  # stands after every question
    template: str = ""  # see prompts.py
    kept_apart: list[str] = field(default_factory=list)  # questions of the evaluation sets beyond `evaluation`
    notes: list[str] = field(default_factory=list)  # what was dropped or looks odd, to be printed


def encode_demonstration(
    tokenizer, demonstration: Demonstration, instruction: str, template: str = "", end: int | None = None
) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids); the response ends with exactly one end-of-turn or else EOS, which is trained.

    `end` is prompts.last_token's answer, found here if it is not given.
    """
    end = last_token(tokenizer, template) if end is None else end
    response = tokenizer.encode(demonstration.response, add_special_tokens=False)
    while response and response[-1] in (tokenizer.eos_token_id, end):
        response.pop()
    return encode_prompt(tokenizer, demonstration.question, instruction, template), [*response, end]


def from_files(
    rl_data: str,
    sft_data: str,
    eval_data: str,
    eval_problems: int,
    rl_fields: str = "",
    sft_fields: str = "",
    rl_filter: str = "",
    sft_filter: str = "",
) -> Task:
    """The task of data files, hub data sets and benchmarks; the first `eval_problems` of each group are evaluated.

    Without `eval_data` the last `eval_problems` questions of `rl_data` are held out, of the demonstrations too. Raises
    DataError when that would be half of them or more.
    """
    task = Task([], [], [])
    task.problems = read_problems(rl_data, "rl_data", task.notes, rl_fields, rl_filter)
    task.demonstrations = _demonstrations(sft_data, task.notes, sft_fields, sft_filter) if sft_data else []
    if eval_data:
        whole = read_evaluation(eval_data, task.notes)
        groups = {p.group: [q for q in whole if q.group == p.group] for p in whole}
        task.evaluation = [p for group in groups.values() for p in group[:eval_problems]]
        task.kept_apart = [p.question for group in groups.values() for p in group[eval_problems:]]
        return task
    unique = list({p.question: p for p in task.problems}.values())
    if 2 * eval_problems >= len(unique):
        raise DataError(
            f"rl_data: {rl_data} has {len(unique)} questions; holding out eval_problems={eval_problems} of them leaves "
            "too few: lower eval_problems or give eval_data"
        )
    task.evaluation = unique[-eval_problems:]
    held_out, before = {p.question for p in task.evaluation}, len(task.demonstrations)
    task.problems = [p for p in task.problems if p.question not in held_out]
    task.demonstrations = [d for d in task.demonstrations if d.question not in held_out]
    task.notes.append(
        f"no eval_data: the last {eval_problems} questions of {rl_data} are held out of training, with their "
        f"{before - len(task.demonstrations)} demonstrations"
    )
    return task


def read_evaluation(eval_data: str, notes: list[str]) -> list[Problem]:
    """The problems of a comma list of benchmarks, files and hub data sets."""
    problems = []
    for source in (part.strip() for part in eval_data.split(",")):
        if source in BENCHMARKS:
            problems += read_benchmark(source, "benchmarks", "eval_data")
        else:
            problems += read_problems(source, "eval_data", notes)
    return problems


def read_problems(sources: str, setting: str, notes: list[str], fields: str = "", condition: str = "") -> list[Problem]:
    """The problems of data files; rows whose gold the grader cannot read are dropped, and counted in `notes`."""
    problems, bad, names = [], 0, parse_fields(fields, setting.replace("data", "fields"))
    for where, row in kept_rows(sources, setting, condition, notes):
        answer = text_of(row, names["answer"], where, setting, may_be_empty=True)
        gold = answer.rpartition("####")[2].strip()  # GSM8K writes "worked solution #### 42"
        if "\\boxed" in gold:  # MATH's solution is its answer, too
            gold = rewards.extract(gold) or ""
        if not rewards.is_gold(gold):
            bad += 1
            continue
        level = next((k for k in ("level", "difficulty") if row.get(k) is not None), None)
        group = f"{level} {str(row[level]).removeprefix('Level ')}" if level else "all"
        problems.append(Problem(text_of(row, names["question"], where, setting), gold, group))
    if bad:
        notes.append(f"{setting}: {bad} rows of {sources} have no gold answer the grader can read: dropped")
    return problems


def _demonstrations(sources: str, notes: list[str], fields: str = "", condition: str = "") -> list[Demonstration]:
    """Of several solutions of a row, the first that the grader accepts; if it accepts none, the first."""
    demonstrations, names = [], parse_fields(fields, "sft_fields")
    for where, row in kept_rows(sources, "sft_data", condition, notes):
        question = text_of(row, names["question"], where, "sft_data")
        has_answer = any(name in row for name in names["answer"])
        answer = text_of(row, names["answer"], where, "sft_data", may_be_empty=True) if has_answer else None
        if answer is not None and "####" in answer:  # GSM8K: the worked solution is the answer's first part
            steps, _, gold = (part.strip() for part in answer.rpartition("####"))
            demonstrations.append(Demonstration(question, f"{steps}\nThe answer is \\boxed{{{gold}}}.", gold))
        else:
            responses = texts_of(row, names["solution"], where, "sft_data")
            if not responses:
                raise DataError(f"sft_data: {where}: fields {' and '.join(names['solution'])} are empty")
            right = (r for r in responses if len(responses) > 1 and rewards.is_correct(r, answer or "").correct)
            response = next(right, responses[0])
            demonstrations.append(Demonstration(question, response, answer or rewards.extract(response)))
    kept = [d for d in demonstrations if d.answer is None or rewards.is_gold(d.answer)]
    if bad := len(demonstrations) - len(kept):
        notes.append(f"sft_data: {bad} rows of {sources} have no gold answer the grader can read: dropped")
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Checks before training


def decontaminate(task: Task) -> None:
    """Drops problems and demonstrations that share NGRAM words in a row with an evaluation question, and counts them.

    A question of fewer words counts as a whole, signs included: 1+2 is not 1-2.
    """
    grams = {g for text in [*(p.question for p in task.evaluation), *task.kept_apart] for g in ngrams(text)}
    for name in ("problems", "demonstrations"):
        rows = getattr(task, name)
        clean = [row for row in rows if grams.isdisjoint(ngrams(row.question))]
        if dropped := len(rows) - len(clean):
            task.notes.append(
                f"{'rl' if name == 'problems' else 'sft'}_data: {dropped} of {len(rows)} share {NGRAM} words in a row "
                "with an evaluation problem: dropped"
            )
        setattr(task, name, clean)


def ngrams(text: str) -> list[tuple[str, ...]]:
    """All runs of NGRAM words; of a shorter text, all of it.

    >>> ngrams("Find 1+2."), len(ngrams("word " * 15))
    ([('find', '1+2.')], 3)
    """
    words = re.findall(r"\w+", text.lower())
    if len(words) < NGRAM:
        return [tuple(text.lower().split())]
    return list(zip(*(words[i:] for i in range(NGRAM)), strict=False))


def check_evaluation(
    problems: list[Problem], tokenizer, instruction: str, max_new_tokens: int, positions: int, template: str = ""
) -> None:
    """Raises DataError when there is no evaluation problem or the model has no room for one and its answer."""
    if not problems:
        raise DataError("eval_data: no usable row is left")
    room = positions - max_new_tokens  # tokens a prompt may have
    if room < 1:
        raise DataError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's {positions} positions: "
            f"lower max_new_tokens"
        )
    if long := sum(len(encode_prompt(tokenizer, p.question, instruction, template)) > room for p in problems):
        raise DataError(
            f"eval_data: {long} prompts exceed {room} tokens, what max_new_tokens={max_new_tokens} leaves of the "
            f"model's {positions} positions: lower max_new_tokens or remove them"
        )


def prepare(
    task: Task, tokenizer, max_new_tokens: int, positions: int, with_demonstrations: bool = True
) -> list[tuple[list[int], list[int]]]:
    """Checks the task and returns the demonstrations that training can use, as (prompt ids, response ids).

    Dropped, with a count in `task.notes`: what shares its words with evaluation, prompts that leave no room for an
    answer within the model's `positions`, and demonstrations longer than `max_new_tokens`, which the policy could never
    finish either. Raises DataError when a set is empty or when an evaluation prompt is too long.
    """
    prompt = task.instruction, task.template
    check_evaluation(task.evaluation, tokenizer, task.instruction, max_new_tokens, positions, task.template)
    room = positions - max_new_tokens
    decontaminate(task)
    problems = [p for p in task.problems if len(encode_prompt(tokenizer, p.question, *prompt)) <= room]
    if dropped := len(task.problems) - len(problems):
        task.notes.append(f"rl_data: {dropped} of {len(task.problems)} prompts exceed {room} tokens: dropped")
    end, kept, wrong = last_token(tokenizer, task.template), [], []
    for d in task.demonstrations:
        row = encode_demonstration(tokenizer, d, *prompt, end)
        if len(row[0]) <= room and len(row[1]) <= max_new_tokens:
            kept.append(row)
        if not rewards.is_correct(d.response, d.answer or "").correct:
            wrong.append(d)
    if dropped := len(task.demonstrations) - len(kept):
        task.notes.append(
            f"sft_data: {dropped} of {len(task.demonstrations)} demonstrations exceed {max_new_tokens} tokens: dropped"
        )
    if wrong:
        task.notes.append(
            f"sft_data: WARNING, the grader refuses {len(wrong)} of {len(task.demonstrations)} demonstrations; the "
            f"first ends {wrong[0].response[-60:]!r}, its gold answer is {wrong[0].answer!r}"
        )
    task.problems = problems
    for name, rows in (("rl_data", problems), ("sft_data", kept)):
        if not rows and (name != "sft_data" or with_demonstrations):
            of_it = [note for note in task.notes if note.startswith(name)]
            raise DataError(
                f"{name}: no usable row is left; is max_new_tokens={max_new_tokens} right?"
                + "".join(f" ({note})" for note in of_it)
            )
    return kept


class Stream:
    """Endless shuffled passes over `count` items. `position` is all the state there is: draws are a function of it."""

    def __init__(self, count: int, seed: tuple[int, ...]):
        self.count, self.seed, self.position = count, seed, 0

    def take(self, n: int) -> list[tuple[int, int]]:
        """The next n draws as (number of the draw, index of the item)."""
        draws = range(self.position, self.position + n)
        self.position += n
        order = {e: self._order(e) for e in {d // self.count for d in draws}}
        return [(d, int(order[d // self.count][d % self.count])) for d in draws]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((*self.seed, epoch)).permutation(self.count)
