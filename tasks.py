"""Where prompts, demonstrations and gold answers come from, and how a question becomes token ids.

One `encode_prompt` serves SFT, RL and evaluation, so that the three never see different prompts. Demonstrations are
never cut, and no evaluation problem may stand in the training data.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import rewards

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PLAIN_TEMPLATE = "Question:\n{}\nAnswer:\nLet's think step by step.\n"  # for tokenizers without a chat template

QUESTION = ("question", "problem", "prompt")  # field names a data row may use, the first present wins
ANSWER = ("answer", "final_answer")
SOLUTION = ("solution", "response", "demonstration")


class DataError(ValueError):
    """Data that cannot be used as it is; the message says which file, line and field."""


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # gold
    group: str = "all"  # evaluation reports accuracy by group: benchmark, chain length, level
    labels: tuple[str, ...] = ()  # and breaks it down by these
    tolerance: float | None = None  # see rewards.is_correct
    unit: str | None = None


@dataclass(frozen=True)
class Demonstration:
    question: str
    response: str
    answer: str | None = None  # gold: the data's, else what the response itself boxes


@dataclass
class Task:
    problems: list[Problem]  # D_RL
    demonstrations: list[Demonstration]  # D_SFT
    evaluation: list[Problem]
    instruction: str = INSTRUCTION  # stands after every question
    notes: list[str] = field(default_factory=list)  # what was dropped or looks odd, to be printed


def prompt_text(tokenizer, question: str, instruction: str) -> str:
    """A question up to where the answer begins: the model's chat template, or a plain one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question + instruction}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return PLAIN_TEMPLATE.format(question + instruction)


def encode_prompt(tokenizer, question: str, instruction: str) -> list[int]:
    """The token ids of `prompt_text`."""
    return encode_text(tokenizer, prompt_text(tokenizer, question, instruction))


def encode_text(tokenizer, text: str) -> list[int]:
    """The token ids of a prompt. A chat template has written BOS if there is one, else the tokenizer adds it."""
    return tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template)


def encode_demonstration(tokenizer, demonstration: Demonstration, instruction: str) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids); the response ends with exactly one EOS, which is trained."""
    response = tokenizer.encode(demonstration.response, add_special_tokens=False)
    while response and response[-1] == tokenizer.eos_token_id:
        response.pop()
    return encode_prompt(tokenizer, demonstration.question, instruction), [*response, tokenizer.eos_token_id]


def from_files(rl_data: str, sft_data: str, eval_data: str, eval_problems: int) -> Task:
    """The task of three data files.

    Without `eval_data` the last `eval_problems` questions of `rl_data` are held out, of the demonstrations too. Raises
    DataError when that would be half of them or more.
    """
    task = Task([], [], [])
    task.problems = read_problems(rl_data, "rl_data", task.notes)
    task.demonstrations = _demonstrations(sft_data, task.notes) if sft_data else []
    if eval_data:
        task.evaluation = read_problems(eval_data, "eval_data", task.notes)[:eval_problems]
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


def check_evaluation(problems: list[Problem], tokenizer, instruction: str, max_new_tokens: int, positions: int) -> None:
    """Raises DataError when there is no evaluation problem or the model has no room for one and its answer."""
    if not problems:
        raise DataError("eval_data: no usable row is left")
    room = positions - max_new_tokens  # tokens a prompt may have
    if room < 1:
        raise DataError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's {positions} positions"
        )
    if long := sum(len(encode_prompt(tokenizer, p.question, instruction)) > room for p in problems):
        raise DataError(
            f"eval_data: {long} prompts exceed {room} tokens, what max_new_tokens={max_new_tokens} leaves of the "
            f"model's {positions} positions: lower max_new_tokens or remove them"
        )


def prepare(
    task: Task, tokenizer, max_new_tokens: int, positions: int, with_demonstrations: bool = True
) -> list[tuple[list[int], list[int]]]:
    """Checks the task and returns the demonstrations that training can use, as (prompt ids, response ids).

    Dropped, with a count in `task.notes`: prompts that leave no room for an answer within the model's `positions`, and
    demonstrations longer than `max_new_tokens`, which the policy could never finish either. Raises DataError when a set
    is empty, when evaluation occurs in training, or when an evaluation prompt is too long.
    """
    check_evaluation(task.evaluation, tokenizer, task.instruction, max_new_tokens, positions)
    questions, room = {p.question for p in task.evaluation}, positions - max_new_tokens
    for name, rows in (("rl_data", task.problems), ("sft_data", task.demonstrations)):
        if shared := [r.question for r in rows if r.question in questions]:
            raise DataError(
                f"{name}: {len(shared)} evaluation problems occur in training, the first is {shared[0][:80]!r}; "
                "remove them from one of the two"
            )
    problems = [p for p in task.problems if len(encode_prompt(tokenizer, p.question, task.instruction)) <= room]
    if dropped := len(task.problems) - len(problems):
        task.notes.append(f"rl_data: {dropped} of {len(task.problems)} prompts exceed {room} tokens: dropped")
    encoded = [encode_demonstration(tokenizer, d, task.instruction) for d in task.demonstrations]
    kept = [row for row in encoded if len(row[0]) <= room and len(row[1]) <= max_new_tokens]
    if dropped := len(encoded) - len(kept):
        task.notes.append(
            f"sft_data: {dropped} of {len(encoded)} demonstrations exceed {max_new_tokens} tokens: dropped"
        )
    wrong = [d for d in task.demonstrations if not rewards.is_correct(d.response, d.answer or "").correct]
    if wrong:
        task.notes.append(
            f"sft_data: WARNING, the grader refuses {len(wrong)} of {len(encoded)} demonstrations; the first ends "
            f"{wrong[0].response[-60:]!r}, its gold answer is {wrong[0].answer!r}"
        )
    task.problems = problems
    for name, rows in (("rl_data", problems), ("sft_data", kept)):
        if not rows and (name != "sft_data" or with_demonstrations):
            raise DataError(f"{name}: no usable row is left; is max_new_tokens={max_new_tokens} right?")
    return kept


def read_rows(source: str, setting: str, config: str | None = None, split: str = "train") -> list[tuple[str, dict]]:
    """[(where it stands, row)] of a .jsonl file, of another data file, or of a split of a hub data set."""
    if Path(source).suffix != ".jsonl":
        return _read_with_datasets(source, setting, config, split)
    rows = []
    try:
        with open(source, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{source}, line {number}"
                    try:
                        row = json.loads(line)
                    except (json.JSONDecodeError, RecursionError) as error:
                        raise DataError(f"{setting}: {where}: not valid JSON ({error})") from error
                    if not isinstance(row, dict):
                        raise DataError(f"{setting}: {where}: a JSON object is needed, this is a {type(row).__name__}")
                    rows.append((where, row))
    except FileNotFoundError as error:
        raise DataError(f"{setting}: there is no file {source!r}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{setting}: {source} is not UTF-8 text") from error
    if not rows:
        raise DataError(f"{setting}: {source} holds no row")
    return rows


def _read_with_datasets(source: str, setting: str, config: str | None, split: str) -> list[tuple[str, dict]]:
    try:
        import datasets  # here, since it is slow to import and .jsonl files do not need it
    except ImportError as error:
        raise DataError(f"{setting}: reading {source!r} needs the package datasets; .jsonl files do not") from error
    kind = Path(source).suffix[1:]
    try:
        if kind in ("parquet", "json", "csv"):
            rows = datasets.load_dataset(kind, data_files=source, split="train")
        else:
            rows = datasets.load_dataset(source, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{setting}: cannot read {source!r}: {str(error).splitlines()[0]}") from error
    return [(f"{source}, row {i}", dict(row)) for i, row in enumerate(rows)]


def _field(row: dict, names: tuple[str, ...], where: str, setting: str, may_be_empty: bool = False) -> str:
    """The first of the named fields, as stripped text; only a gold answer may be empty, which drops the row."""
    name = next((name for name in names if name in row), None)
    if name is None:
        has = ", ".join(map(str, row)) or "none"
        raise DataError(f"{setting}: {where}: needs a field named {' or '.join(names)}, has {has}")
    value = "" if row[name] is None else row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{setting}: {where}: field {name} must be text or a number, it is a {type(value).__name__}")
    text = str(value).strip()
    if not text and not may_be_empty:
        raise DataError(f"{setting}: {where}: field {name} is empty")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(f"{setting}: {where}: field {name} holds half a surrogate pair, which is no text")
    return text


def read_problems(source: str, setting: str, notes: list[str]) -> list[Problem]:
    """The problems of a data file; rows whose gold the grader cannot read are dropped, and counted in `notes`."""
    problems, bad = [], 0
    for where, row in read_rows(source, setting):
        answer = _field(row, ANSWER, where, setting, may_be_empty=True)
        gold = answer.rpartition("####")[2].strip()  # GSM8K writes "worked solution #### 42"
        if not rewards.is_gold(gold):
            bad += 1
            continue
        group = next((f"{k} {row[k]}" for k in ("level", "difficulty") if row.get(k) is not None), "all")
        problems.append(Problem(_field(row, QUESTION, where, setting), gold, group))
    if bad:
        notes.append(f"{setting}: {bad} rows of {source} have no gold answer the grader can read: dropped")
    return problems


def _demonstrations(source: str, notes: list[str]) -> list[Demonstration]:
    demonstrations = []
    for where, row in read_rows(source, "sft_data"):
        question = _field(row, QUESTION, where, "sft_data")
        answer = _field(row, ANSWER, where, "sft_data", may_be_empty=True) if "answer" in row else None
        if answer is not None and "####" in answer:  # GSM8K: the worked solution is the answer's first part
            steps, _, gold = (part.strip() for part in answer.rpartition("####"))
            demonstrations.append(Demonstration(question, f"{steps}\nThe answer is \\boxed{{{gold}}}.", gold))
        else:
            response = _field(row, SOLUTION, where, "sft_data")
            demonstrations.append(Demonstration(question, response, answer or rewards.extract(response)))
    kept = [d for d in demonstrations if d.answer is None or rewards.is_gold(d.answer)]
    if bad := len(demonstrations) - len(kept):
        notes.append(f"sft_data: {bad} rows of {source} have no gold answer the grader can read: dropped")
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
