"""Benchmarks: answers of a model, their grades, and numbers with their uncertainty.

    python evaluate.py RUN_OR_MODEL [--benchmarks paper] [--protocol sampled] [--out FILE]
    python evaluate.py RUN_OR_MODEL --ask "How many legs have 3 cats?"      print the answers of base, policy and shadow
    python evaluate.py RUN_OR_MODEL --task TASK  the evaluation problems of a task, by name or FILE.py:FUNCTION
    python evaluate.py --regrade FILE            grade the answers of a result file again, without generating
    python evaluate.py --table FILE FILE ...     compare result files; differences are against the first

Without --benchmarks, --data or --task, a run is evaluated on its own evaluation problems and a model on those of a
built-in task. The same command continues an interrupted evaluation.
"""
# ruff: noqa: E402  (--help prints before the imports that load torch)

import argparse
import os
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from settings import METHODS, TASKS, Settings, builtin_models, expand, start_program


@dataclass(frozen=True, kw_only=True)
class Sampling:
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    max_new_tokens: int
    samples: int | None = 1  # answers per problem; None: each benchmark's own number


PROTOCOLS = {
    "paper": Sampling(max_new_tokens=5000),
    "sampled": Sampling(temperature=0.6, top_p=0.95, max_new_tokens=8192, samples=None),
}
NAMES = "math500,minerva_math,olympiadbench,aime24,amc23,gsm8k,gpqa,mmlu_pro"  # see tasks/benchmarks.py
BUILTIN_LIMIT = 96  # tokens per answer of a model on the problems of a built-in task
EXPORTED = re.compile(r"model-step-(\d+)")  # the name of a model that infra/export.py wrote, with its step
SAMPLES = 4  # answers per problem by the protocol "sampled", for problems of no benchmark


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Exits with status 2 and a message if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("source", nargs="?", type=expand, metavar="RUN_OR_MODEL", help="a folder of a run or a model, or a hub name")
    add("--benchmarks", default="", help=f"paper (the first five) or a list of {NAMES}")
    add("--benchmark-dir", type=expand, default="benchmarks", help="folder of NAME.jsonl, else the hub's")
    add("--data", type=expand, default="", help="a .jsonl file with a question and an answer in each row")
    add("--task", type=expand, default="", help="the evaluation problems of a task, by name or FILE.py:FUNCTION")
    add("--problems", type=int, default=0, help="only the first N of each (of a built-in task: N per group)")
    add("--template", help="prompt: qwen-boxed or plain instead of the chat template (default: the run's)")
    add("--protocol", choices=PROTOCOLS, default="paper", help="paper: greedy, one answer; sampled: T 0.6, top-p 0.95")
    add("--samples", type=int, help="answers per problem (default: the protocol's, by benchmark)")
    add("--temperature", type=float, help="0 is greedy (default: the protocol's)")
    add("--top-p", type=float, help="sample from the likeliest tokens that reach this mass (default: the protocol's)")
    add("--max-new-tokens", type=int, help="tokens per answer (default: the protocol's; a run's own)")
    add("--seed", type=int, default=0, help="seed of the sampled answers")
    add("--ask", action="append", metavar="QUESTION", help="print the answers of a run's base, policy and shadow to it")
    add("--slots", type=int, default=64, help="answers decoded at once per process; lower it if memory runs out")
    add("--out", type=expand, help="the result file; an existing one is continued (default: in the run, or in evals/)")
    add("--regrade", type=expand, metavar="FILE", help="grade a result file's answers again")
    add("--table", nargs="+", type=expand, metavar="FILE", help="compare result files")
    args = parser.parse_args(argv)
    check(args, parser)
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exits with status 2 and a message if flags are out of range or have no effect."""
    modes = [mode for mode in (args.source, args.regrade, args.table) if mode]
    if len(modes) != 1:
        parser.error("give a run or model, or --regrade FILE, or --table FILE ...")
    if sum(map(bool, (args.benchmarks, args.data, args.task))) > 1:
        parser.error("--benchmarks, --data and --task are three kinds of problems: give one")
    if args.problems < 0 or args.seed < 0:
        parser.error("--problems and --seed cannot be negative")
    for name in ("samples", "max_new_tokens", "slots"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.temperature is not None and args.temperature < 0:
        parser.error("--temperature cannot be negative")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")

    # A flag without an effect is a mistake.
    if args.table:
        mode, used = "--table", {"table"}
    elif args.regrade:
        mode, used = "--regrade", {"regrade", "out"}
    elif args.ask:
        mode, used = "--ask", {"source", "ask", "task", "template", "temperature", "top_p", "max_new_tokens", "seed"}
    else:
        return
    for name, value in vars(args).items():
        if value != parser.get_default(name) and name not in used:
            parser.error(f"--{name.replace('_', '-')} does nothing with {mode}: omit it")


if __name__ == "__main__":
    start_program(parse)  # prints the help and exits, before the imports below load torch

import torch
import transformers
from torch import nn
from tqdm import tqdm

import rewards
from grading.scores import PAPER, by_problem, verdicts
from infra import checkpoint, export, parallel, results
from infra.files import DataError, append_line
from infra.model import repository_of, stop_tokens
from infra.run import alone, one_line_errors, print0, settings_of
from sampler import Sampler
from tasks.benchmarks import BENCHMARKS, OPTIONS_SEED, read_benchmark
from tasks.functions import code_fingerprint
from tasks.loading import load_model
from tasks.named import NAMED, from_function, load_task, module_of, task_of
from tasks.prompts import encode_prompt, end_of_turn, prompt_text
from tasks.sources import read_problems
from tasks.task import Problem, Task, check_evaluation, fingerprint

# Answers and grades


def answer(
    sampler: Sampler, tokenizer, task: Task, problems: list[Problem], keys: list[tuple[int, ...]], sampling: Sampling
) -> list[dict]:
    """One graded record per problem and sample, of all ranks; each rank answers its share.

    keys: one per problem; the last number is the problem's id, and sample i is drawn from the seed (*key, i).
    """
    share = slice(parallel.rank(), None, parallel.world_size())
    problems = problems[share]
    keys = keys[share]
    texts = []
    prompts = []
    for problem in problems:  # side by side, so that each prompt is rendered once
        prompt = problem.question, task.instruction, task.template
        texts.append(prompt_text(tokenizer, *prompt))
        prompts.append(encode_prompt(tokenizer, *prompt))
    completions = []
    if problems:  # a rank has none if there are fewer problems than ranks
        completions = sampler.generate(
            prompts, keys, sampling.samples, sampling.max_new_tokens, sampling.temperature, sampling.top_p
        )
    records = []
    for problem, key, text, samples in zip(problems, keys, texts, completions, strict=True):
        for i, completion in enumerate(samples):
            record = {
                "group": problem.group,
                "id": key[-1],
                "labels": problem.labels,
                "sample": i,
                "question": problem.question,
                "prompt": text,
                "answer": problem.answer,
                "tolerance": problem.tolerance,
                "unit": problem.unit,
                "response": completion.text(tokenizer, sampler.stop),
                "tokens": len(completion.ids),
                "finish_reason": completion.finish_reason,
            }
            if task.verifier is not None:
                record["extra"] = problem.extra
            # A truncated response may still contain its answer.
            records.append(record | asdict(task.verdict(record["response"], problem)))
    return sorted(parallel.all_gather(records), key=lambda r: (r["group"], r["id"], r["sample"]))


def grader_of(task: Task, spec: str) -> str:
    """The name of what grades: the version of the grader, or FILE.py:FUNCTION of a verifier with a hash of its code."""
    if task.verifier is None:
        return rewards.VERSION
    return f"{spec} {code_fingerprint(spec)[:16]}"


def evaluate(sampler: Sampler, tokenizer, task: Task, max_new_tokens: int) -> tuple[dict[str, float], list[dict]]:
    """({group: greedy pass@1, "average": their plain mean}, records) of task.evaluation. All ranks call it."""
    keys = [(0, i) for i in range(len(task.evaluation))]
    greedy = Sampling(max_new_tokens=max_new_tokens)
    records = answer(sampler, tokenizer, task, task.evaluation, keys, greedy)
    accuracy = {}
    for group, problems in sorted(by_problem(records).items()):
        accuracy[group] = float(verdicts(problems).mean())
    accuracy["average"] = sum(accuracy.values()) / len(accuracy)
    return accuracy, records


def regrade(path: Path, out: str | None) -> str:
    """Grades a result file's answers again and writes them to `out` or NAME.regraded.jsonl. Returns the report.

    A verifier is loaded from the file that the header names. Raises DataError, and SettingError without that file.
    """
    header, records = results.read_results(path, finished=True)
    spec, _, _ = header["grader"].rpartition(" ")  # FILE.py:FUNCTION of a verifier
    task = Task([], [], [])
    if spec:
        task = from_function(spec, Settings(task=spec))
    header["grader"] = grader_of(task, spec)
    regraded = []
    for record in records:
        facts = {name: record[name] for name in ("question", "answer", "tolerance", "unit")}
        problem = Problem(**facts, extra=record.get("extra", {}))
        regraded.append(record | asdict(task.verdict(record["response"], problem)))
    changed = 0
    for old, new in zip(records, regraded, strict=True):
        if old["correct"] != new["correct"]:
            changed += 1
    target = Path(out or path.with_name(f"{path.name.removesuffix('.jsonl')}.regraded.jsonl"))
    results.write_results(target, header, regraded)
    report = results.write_summary(target, header, regraded)
    return f"{report}\n{changed} of {len(records)} verdicts changed, written to {target}"


# What is evaluated


def is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists()


def load_settings(source: Path) -> Settings | None:
    """The settings of a finished run, or of the run whose model/ or model-step-N/ this is; None for another model.

    Raises DataError for an unfinished or damaged run.
    """
    if (source.name == "model" or EXPORTED.fullmatch(source.name)) and is_run(source.parent):
        return settings_of(source.parent / "config.json")
    if not is_run(source):
        return None
    if not (source / "model").is_dir():
        exported = ", ".join(map(str, sorted(source.glob("model-step-*")))) or "none"
        text = "the run has not finished, --resume continues it; models of earlier steps, to evaluate"
        raise DataError(f"{source} has no model/ yet: {text}: {exported}")
    return settings_of(source / "config.json")


def find_task(args: argparse.Namespace, s: Settings | None) -> Task:
    """The problems to answer, with their instruction and template. Raises DataError.

    They are those of --ask, of the benchmarks, of the file, of --task, of the run, or of the model's built-in task.
    s: the settings of a run; None for a model.
    """
    count = args.problems or None  # None: all
    task = Task(problems=[], demonstrations=[], evaluation=[])
    own = s or Settings(task=task_of(args.source))
    if args.task and (own.rl_data or own.task != args.task):
        own = replace(own, task=args.task, rl_data="", eval_data="")
    is_own_builtin = own.task in TASKS and not own.rl_data
    if args.ask:
        # Only the user's own function can have an instruction and a verifier, which needs the problem of a question.
        if (s or args.task) and not own.rl_data and own.task not in NAMED:
            task = load_task(replace(own, sft_data="", method="rl"))
        elif is_own_builtin and args.source in builtin_models():
            task.instruction = ""
        known = {p.question: p for p in [*task.problems, *task.evaluation]}
        task.evaluation = [known.get(question) or Problem(question, "") for question in args.ask]
    elif args.benchmarks:
        for name in benchmark_names(args.benchmarks):
            task.evaluation += read_benchmark(name, args.benchmark_dir)[:count]
    elif args.data:
        task.evaluation = read_problems(args.data, "--data", task.notes)[:count]
    elif is_own_builtin:
        task.instruction = ""
        task.evaluation = module_of(own.task).evaluation(count or own.eval_problems)
    else:
        task = load_task(replace(own, sft_data="", method="rl"))  # reads no demonstrations
        task.evaluation = task.evaluation[:count]
    if args.template is not None:
        task.template = args.template
    elif s and s.template:
        task.template = s.template
    return task


def benchmark_names(text: str) -> list[str]:
    """The benchmarks of a comma list, each once; "paper" stands for the paper's five. Raises DataError."""
    names = text.replace("paper", ",".join(PAPER)).split(",")
    for name in names:
        if name not in BENCHMARKS:
            raise DataError(f"--benchmarks: no {name!r}; there are paper, {', '.join(BENCHMARKS)}")
    return list(dict.fromkeys(names))


def choose_sampling(args: argparse.Namespace, s: Settings | None) -> Sampling:
    """The protocol, with the values of the flags in its place. Raises DataError for flags that do nothing if greedy."""
    sampling = PROTOCOLS[args.protocol]
    own_problems = not (args.benchmarks or args.data)
    if s and own_problems:
        sampling = replace(sampling, max_new_tokens=s.max_new_tokens)
    elif own_problems and not args.ask and args.task in ("", *TASKS):
        sampling = replace(sampling, max_new_tokens=BUILTIN_LIMIT)
    for name in ("max_new_tokens", "temperature", "top_p", "samples"):
        value = getattr(args, name)
        if value is not None:
            sampling = replace(sampling, **{name: value})
    if sampling.temperature > 0:
        return sampling
    if args.samples not in (None, 1):
        raise DataError(f"--samples {args.samples} greedy answers would be the same: set --temperature too")
    if args.seed or args.top_p is not None:
        raise DataError("--seed and --top-p do nothing at temperature 0, which is greedy: set --temperature too")
    return replace(sampling, samples=1)


def pick_dtype() -> torch.dtype:
    """The precision of the sampler's weights."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


# Questions of one's own


def policies(source: str, s: Settings | None, template: str) -> Iterator[tuple[str, nn.Module, object, list[int]]]:
    """(title, model, tokenizer, stop ids) of a run's base model, policy and shadow, or of one model."""
    if not is_run(Path(source)):
        yield source, *load_model(source, template)
        return
    yield f"base model {s.model}", *load_model(s.model, template)
    yield f"policy after {s.total_steps} steps of {s.method}", *load_model(f"{source}/model", template)
    folder = Path(source, "checkpoint")
    if not METHODS[s.method].shadow:
        return
    if not checkpoint.steps_in(folder):
        print0(f"no shadow: {folder} has no checkpoint, and nothing else holds θ̂\n")
        return
    saved = checkpoint.newest(folder)
    model, tokenizer = export.merged_policy(Path(source), saved, s, "theta_hat")
    stop = stop_tokens(model, tokenizer, end_of_turn(tokenizer, template))
    yield f"shadow at step {saved.facts['step']}", model, tokenizer, stop


def ask(args: argparse.Namespace) -> None:
    """Prints the answers to the questions of --ask one under another, greedy by default. Raises DataError."""
    s = load_settings(Path(args.source))
    sampling = choose_sampling(args, s)
    task = find_task(args, s)
    answers = []  # (title, one text per question) of each model
    for title, model, tokenizer, stop in policies(args.source, s, task.template):
        answers.append((title, replies(task, model, tokenizer, stop, sampling, args.seed)))
    for i, question in enumerate(args.ask):
        print0(question)
        for title, texts in answers:
            print0(f"--- {title}\n{texts[i]}".rstrip())
        print0("")


def replies(task: Task, model: nn.Module, tokenizer, stop: list[int], sampling: Sampling, seed: int) -> list[str]:
    """One model's answer to each question. Raises DataError if a question is too long."""
    prompts = [encode_prompt(tokenizer, p.question, task.instruction, task.template) for p in task.evaluation]
    positions = model.config.max_position_embeddings
    room = positions - max(len(prompt) for prompt in prompts)
    limit = max(1, min(sampling.max_new_tokens, room))
    check_evaluation(task.evaluation, tokenizer, task.instruction, limit, positions, task.template)
    sampler = Sampler(model, stop, dtype=pick_dtype())
    keys = [(seed, i) for i in range(len(prompts))]  # equal for all models
    groups = sampler.generate(prompts, keys, 1, limit, sampling.temperature, sampling.top_p)
    texts = []
    for problem, (completion,) in zip(task.evaluation, groups, strict=True):
        response = completion.text(tokenizer, stop)
        text = response
        if completion.finish_reason == "length":
            text += " … (cut off)"
        if task.verifier is not None:
            is_right = task.verifier(response, problem)
            text += "\n(right)" if is_right else "\n(wrong)"
        texts.append(text)
    return texts


# Benchmarks


def run(args: argparse.Namespace) -> None:
    """Answers the problems that the result file lacks, appends the records to it, and prints the report."""
    parallel.start(timedelta(days=1))  # the timeout of collectives: one rank may generate much longer than another
    s = load_settings(Path(args.source))  # None: a model, not a run
    task = find_task(args, s)
    for note in task.notes:
        print0(note)
    with parallel.rank0_first():  # rank 0 downloads the model, then the other ranks read it from the disk
        source = f"{args.source}/model" if is_run(Path(args.source)) else args.source
        model, tokenizer, stop = load_model(source, task.template)

    sampling = choose_sampling(args, s)
    positions = model.config.max_position_embeddings
    check_evaluation(task.evaluation, tokenizer, task.instruction, sampling.max_new_tokens, positions, task.template)
    problems, samplings = by_group(task.evaluation, sampling)
    samples = {group: own.samples for group, own in samplings.items()}
    header = {
        "model": os.path.normpath(args.source),
        "dtype": str(pick_dtype()),
        "weights": getattr(model.config, "_commit_hash", None) or results.weights_hash(repository_of(source)[0]),
        "prompt": prompt_text(tokenizer, "{question}", task.instruction, task.template),
        "sampling": asdict(sampling) | {"samples": samples},
        "seed": args.seed,
        "options_seed": OPTIONS_SEED,
        "grader": grader_of(task, args.task or (s.task if s else "")),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "data": {group: describe(own, task) for group, own in problems.items()},
    }
    if s:
        exported = EXPORTED.fullmatch(Path(args.source).name)
        header["step"] = int(exported[1]) if exported else s.total_steps
    out = result_file(args, s)
    with alone(out, out.with_name(f".{out.name}.lock")):
        records = results.open_results(out, header) if parallel.rank() == 0 else None
        records = parallel.broadcast(records)

        sampler = Sampler(model, stop, slots=args.slots, dtype=pick_dtype())
        del model  # the sampler has its own copy
        records += answer_missing(args, sampler, tokenizer, task, problems, samplings, records, out)
        if parallel.rank() == 0:
            print0(results.write_summary(out, header, records))
            print0(f"\n{header['sampling']} · seed {args.seed} · grader {header['grader']} · answers in {out}")
    parallel.end()


def by_group(problems: list[Problem], sampling: Sampling) -> tuple[dict[str, list[Problem]], dict[str, Sampling]]:
    """The problems of each group, and their sampling: if it has no number of samples, each benchmark has its own."""
    of_group = defaultdict(list)
    samplings = {}
    for problem in problems:
        group = problem.group
        of_group[group].append(problem)
        usual = BENCHMARKS[group].samples if group in BENCHMARKS else SAMPLES
        samplings[group] = replace(sampling, samples=sampling.samples or usual)
    return of_group, samplings


def describe(problems: list[Problem], task: Task) -> dict:
    """The number of the problems and a hash of what the grader or the task's verifier reads."""
    of_group = Task(problems, demonstrations=[], evaluation=[], verifier=task.verifier)
    return {"problems": len(problems), "sha256": fingerprint(of_group)}


def result_file(args: argparse.Namespace, s: Settings | None) -> Path:
    """--out, or a name that says data and protocol: in the run's folder, or in evals/ for a model."""
    if args.out:
        return Path(args.out)
    # Empty for the run's own problems or the built-in task
    data = args.benchmarks or Path(args.data).stem or args.task.rpartition(":")[2]
    name = f"answers-{data.replace(',', '+')}-{args.protocol}.jsonl" if data else f"answers-{args.protocol}.jsonl"
    folder = Path(args.source)
    if is_run(folder):
        return folder / name
    of_run = folder.resolve().parent.name if s else ""  # the models of all runs have the same names
    return Path("evals", of_run, folder.name, name)


def answer_missing(
    args: argparse.Namespace, sampler: Sampler, tokenizer, task: Task, problems: dict[str, list[Problem]],
    samplings: dict[str, Sampling], records: list[dict], out: Path,
) -> list[dict]:  # fmt: skip
    """Answers the problems without a record and appends the new records to the file `out`. Returns them."""
    parts = unanswered(problems, samplings, records, args.slots)
    answers = 0
    tokens = 0
    for group, ids in parts:
        sampling = samplings[group]
        count = len(ids) * sampling.samples
        answers += count
        tokens += count * sampling.max_new_tokens
    print0(f"{answers} answers, {args.slots * parallel.world_size()} at once: at most {tokens:,} tokens")
    new = []
    with tqdm(total=answers, unit="answer", leave=False, disable=parallel.rank() > 0) as bar:
        for group, ids in parts:
            chosen = [problems[group][i] for i in ids]
            keys = [(args.seed, zlib.crc32(group.encode()), i) for i in ids]
            graded = answer(sampler, tokenizer, task, chosen, keys, samplings[group])
            if parallel.rank() == 0:
                for record in graded:
                    append_line(out, record)
            new += graded
            bar.update(len(graded))
    return new


def unanswered(
    problems: dict[str, list[Problem]], samplings: dict[str, Sampling], records: list[dict], slots: int
) -> list[tuple[str, list[int]]]:
    """(group, ids of problems without an answer) of each part of the work.

    The answers of a part are written at its end. Each rank answers about two times `slots` samples in it, so that most
    slots are in use most of the time.
    """
    answered = {(record["group"], record["id"]) for record in records}
    parts = []
    for group in problems:
        ids = [i for i in range(len(problems[group])) if (group, i) not in answered]
        size = parallel.world_size() * max(1, 2 * slots // samplings[group].samples)
        for start in range(0, len(ids), size):
            parts.append((group, ids[start : start + size]))
    return parts


def main() -> None:
    args = parse(sys.argv[1:])
    with one_line_errors("evaluate.py", f"lower --slots {args.slots}, but not below the samples per problem"):
        if args.table:
            print0(results.table([Path(name) for name in args.table]))
        elif args.regrade:
            print0(regrade(Path(args.regrade), args.out))
        elif args.ask:
            ask(args)
        else:
            run(args)


if __name__ == "__main__":
    with torch.no_grad():  # a notebook may go on to train
        main()
