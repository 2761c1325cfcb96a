"""Benchmarks: answers of a model, their grades, and numbers with their uncertainty.

    python evaluate.py RUN_OR_MODEL [--benchmarks paper] [--protocol sampled] [--out FILE]
    python evaluate.py RUN_OR_MODEL --ask "How many legs have 3 cats?"      print the answers of base, policy and shadow
    python evaluate.py --regrade FILE            grade the answers of a result file again, without generating
    python evaluate.py --table FILE FILE ...     compare result files; differences are against the first

Without --benchmarks or --data, a run is evaluated on its own evaluation problems and a model on those of a
built-in task. The same command continues an interrupted evaluation.
"""
# ruff: noqa: E402  (--help prints before the imports that load torch)

import argparse
import os
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from settings import METHODS, Settings, expand, start_program


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
SECONDS = 5.0  # of decoding, from which the time of an evaluation is estimated
NAMES = "math500,minerva_math,olympiadbench,aime24,amc23,gsm8k,gpqa,mmlu_pro"  # see tasks/benchmarks.py


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Exits with status 2 and a message if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("source", nargs="?", type=expand, metavar="RUN_OR_MODEL", help="a folder of a run or a model, or a hub name")
    add("--benchmarks", default="", help=f"paper (the first five) or a list of {NAMES}")
    add("--benchmark-dir", type=expand, default="benchmarks", help="folder of NAME.jsonl, else the hub's")
    add("--data", type=expand, default="", help="a .jsonl file with a question and an answer in each row")
    add("--problems", type=int, default=0, help="only the first N of each (of a built-in task: N per group)")
    add("--template", help="prompt: qwen-boxed or plain instead of the chat template (default: the run's)")
    add("--protocol", choices=PROTOCOLS, default="paper", help="paper: greedy, one answer; sampled: T 0.6, top-p 0.95")
    add("--samples", type=int, default=0, help="answers per problem (default: the protocol's, by benchmark)")
    add("--temperature", type=float, help="0 is greedy (default: the protocol's)")
    add("--top-p", type=float, help="sample from the likeliest tokens that reach this mass (default: the protocol's)")
    add("--max-new-tokens", type=int, default=0, help="tokens per answer (default: the protocol's; a run's own)")
    add("--seed", type=int, default=0, help="of the samples")
    add("--ask", action="append", metavar="QUESTION", help="print the answers of a run's base, policy and shadow to it")
    add("--slots", type=int, default=64, help="answers decoded at once per process; lower it if memory runs out")
    add("--out", type=expand, help="the result file; an existing one is continued (default: in the run, or in evals/)")
    add("--regrade", type=expand, metavar="FILE", help="grade a result file's answers again")
    add("--table", nargs="+", type=expand, metavar="FILE", help="compare result files")
    args = parser.parse_args(argv)
    if args.out is not None and not Path(args.out).name:
        parser.error(f"--out {args.out!r} names no file")
    if sum(map(bool, (args.source, args.regrade, args.table))) != 1:
        parser.error("give a run or model, or --regrade FILE, or --table FILE ...")
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    read = {"table": {"table"}, "regrade": {"regrade", "out"},
            "ask": {"ask", "source", "template", "temperature", "top_p", "max_new_tokens", "seed"}}  # fmt: skip
    for mode in (name for name in read if getattr(args, name)):
        if idle := sorted(given - read[mode]):
            parser.error(f"--{idle[0]} does nothing with --{mode}: omit it".replace("_", "-"))
    if min(args.samples, args.problems, args.max_new_tokens, args.seed) < 0 or args.slots < 1:
        parser.error("--samples, --problems, --max-new-tokens and --seed cannot be negative, --slots not below 1")
    temperature, top_p = args.temperature or 0, 1 if args.top_p is None else args.top_p
    if not (temperature == 0 or 1e-3 <= temperature < float("inf")) or not 0 < top_p <= 1:
        parser.error("--temperature must be 0 or at least 0.001, --top-p above 0 and at most 1")
    if any(question != question.encode("utf-8", "ignore").decode() for question in args.ask or ()):
        parser.error("--ask: the question is no text in UTF-8")
    if args.benchmarks and args.data:
        parser.error("--benchmarks and --data are two kinds of problems: give one")
    return args


if __name__ == "__main__":
    start_program(parse)

import torch
import transformers
from torch import nn
from tqdm import tqdm

import rewards
from grading.scores import PAPER, by_problem, verdicts
from infra import checkpoint, export, parallel, results
from infra.files import DataError, append_line, read_object
from infra.model import is_builtin, load, stop_tokens
from infra.run import one_line_errors, print0, settings_of
from sampler import Sampler
from tasks import builtin
from tasks.benchmarks import BENCHMARKS, OPTIONS_SEED, read_benchmark
from tasks.named import NAMED, load_task
from tasks.prompts import encode_prompt, end_of_turn, prompt_text
from tasks.sources import read_problems
from tasks.task import Problem, Task, check_evaluation, fingerprint


class Progress:
    """A bar over the tokens that this rank generates at most; it shrinks whenever an answer ends before its limit."""

    def __init__(self, answers: int, limit: int, announce: bool = False):
        """limit: tokens of an answer; announce: print speed and longest time once, after SECONDS of decoding."""
        most = answers * limit
        self.bar = tqdm(total=most, unit="tok", unit_scale=True, leave=False, disable=parallel.rank() > 0)
        self.answers, self.limit, self.announce = answers, limit, announce and parallel.rank() == 0
        self.calls = self.ended = 0

    def __call__(self, tokens: int, ended: list[int]) -> None:
        """Counts `tokens` new ones, and the answers that ended, by their lengths."""
        self.bar.total -= sum(self.limit - length for length in ended)
        self.ended += len(ended)
        self.bar.set_postfix_str(f"{self.ended} of {self.answers} answers", refresh=False)
        self.bar.update(tokens)
        self.calls += 1
        if self.calls == 2:  # the first call follows the prompts, the second one a step that may compile kernels
            self.start, self.before = time.monotonic(), self.bar.n
        elif self.announce and self.calls > 2 and (seconds := time.monotonic() - self.start) > SECONDS:
            self.announce, rate = False, (self.bar.n - self.before) / seconds
            longest = tqdm.format_interval((self.bar.total - self.bar.n) / rate)
            speed = f"{rate:,.0f} tokens/s in the first {seconds:.0f} s of decoding"
            print0(f"{speed}: {longest} more if no answer ends early; most do, but longer answers are slower")


def share_of(items: list) -> list:
    """The items of this rank."""
    return items[parallel.rank() :: parallel.world_size()]


def answer(
    sampler: Sampler, tokenizer, task: Task, problems: list[Problem], keys: list[tuple[int, ...]], sampling: Sampling,
    progress: Progress | None = None,
) -> list[dict]:  # fmt: skip
    """One graded record per problem and sample, of all ranks; each rank answers its share.

    keys: one per problem; the last number is the problem's id, and sample i is drawn from the seed (*key, i).
    """
    problems, keys = share_of(problems), share_of(keys)
    asked = [(tokenizer, p.question, task.instruction, task.template) for p in problems]
    prompts = [(prompt_text(*a), encode_prompt(*a)) for a in asked]  # side by side, so that each is rendered once
    completions = []
    if problems:  # a rank has none if there are fewer problems than ranks
        completions = sampler.generate(
            [ids for _, ids in prompts], keys, sampling.samples, sampling.max_new_tokens, sampling.temperature,
            sampling.top_p, progress,
        )  # fmt: skip
    records = []
    for problem, key, (text, _), samples in zip(problems, keys, prompts, completions, strict=True):
        for i, completion in enumerate(samples):
            record = dict(
                group=problem.group, id=key[-1], labels=problem.labels, sample=i, question=problem.question,
                prompt=text, answer=problem.answer, tolerance=problem.tolerance, unit=problem.unit,
                response=completion.text(tokenizer, sampler.stop), tokens=len(completion.ids),
                finish_reason=completion.finish_reason,
            )  # fmt: skip
            records.append(record | grade(record))
    return sorted(parallel.all_gather(records), key=lambda r: (r["group"], r["id"], r["sample"]))


def evaluate(sampler: Sampler, tokenizer, task: Task, max_new_tokens: int) -> tuple[dict[str, float], list[dict]]:
    """({group: greedy pass@1, "average": their plain mean}, records) of task.evaluation. All ranks call it."""
    keys = [(0, i) for i in range(len(task.evaluation))]
    progress = Progress(len(share_of(keys)), max_new_tokens)
    with progress.bar:
        greedy = Sampling(max_new_tokens=max_new_tokens)
        records = answer(sampler, tokenizer, task, task.evaluation, keys, greedy, progress)
    accuracy = {group: float(verdicts(rows).mean()) for group, rows in sorted(by_problem(records).items())}
    return accuracy | {"average": sum(accuracy.values()) / len(accuracy)}, records


def grade(record: dict) -> dict:
    """correct, extracted and reason of a record's response. A truncated response may still contain its answer."""
    gold = dict(tolerance=record["tolerance"], unit=record["unit"])
    return asdict(rewards.is_correct(record["response"], record["answer"], **gold))


def regrade(path: Path, out: str | None) -> str:
    """Grades a result file's answers again and writes them to `out` or NAME.regraded.jsonl. Returns the report.

    Raises DataError.
    """
    header, records = results.read_results(path, finished=True)
    graded = [record | grade(record) for record in records]
    changed = sum(old["correct"] != new["correct"] for old, new in zip(records, graded, strict=True))
    header |= dict(grader=rewards.VERSION)
    target = Path(out or path.with_name(f"{path.name.removesuffix('.jsonl')}.regraded.jsonl"))
    results.write_results(target, header, graded)
    report = results.write_summary(target, header, graded)
    return f"{report}\n{changed} of {len(records)} verdicts changed, written to {target}"


def load_settings(run: Path) -> Settings | None:
    """The settings of a finished run, None for another folder. Raises DataError for an unfinished or damaged run."""
    if not any(os.path.lexists(run / name) for name in ("evals.jsonl", "metrics.jsonl", "checkpoint")):
        return None
    if not (run / "model").is_dir():
        raise DataError(f"{run} has no model/ yet: the run has not finished, --resume continues it")
    return settings_of(read_object(run / "config.json"), f"{run}/config.json")


def find_task(args: argparse.Namespace, s: Settings) -> Task:
    """The problems of the benchmarks, the file, the run's task or the built-in one. Raises DataError."""
    count, task = args.problems or None, Task(problems=[], demonstrations=[], evaluation=[])
    if args.benchmarks:
        names = list(dict.fromkeys(args.benchmarks.replace("paper", ",".join(PAPER)).split(",")))
        if unknown := [n for n in names if n not in BENCHMARKS]:
            raise DataError(f"--benchmarks: no {unknown[0]!r}; there are paper, {', '.join(BENCHMARKS)}")
        task.evaluation = [p for n in names for p in read_benchmark(n, args.benchmark_dir)[:count]]
    elif args.data:
        task.evaluation = read_problems(args.data, "--data", task.notes)[:count]
    elif s.task in builtin.EVALUATION and not s.rl_data:
        task.evaluation, task.instruction = builtin.EVALUATION[s.task](count or s.eval_problems), ""
    else:
        task = load_task(replace(s, sft_data="", method="rl"))  # reads no demonstrations
        task.evaluation = task.evaluation[:count]
    task.template = s.template if args.template is None else args.template
    return task


def prompt_of(args: argparse.Namespace, s: Settings | None) -> Task:
    """A task with the instruction and the template of a run, or of a model (None). Raises DataError.

    Problems are loaded only for a function of the user's own, which alone has its instruction.
    """
    task = Task(problems=[], demonstrations=[], evaluation=[])
    if is_builtin(args.source) if s is None else s.task in builtin.EVALUATION and not s.rl_data:
        task.instruction = ""
    elif s and not s.rl_data and s.task not in NAMED:
        task = load_task(replace(s, sft_data="", method="rl"))
    task.template = (s.template if s else "") or task.template if args.template is None else args.template
    return task


def policies(source: str, s: Settings | None) -> Iterator[tuple[str, nn.Module | None, object]]:
    """(title, model, tokenizer) of a run's base model, policy and shadow, or of one model (None).

    The weights θ̂ exist in checkpoints only. The title says why there is no shadow; its model is None then.
    """
    if s is None:
        yield source, *load(builtin.resolve(source))
        return
    yield f"base model {s.model}", *load(builtin.resolve(s.model))
    yield f"policy after {s.total_steps} steps of {s.method}", *load(f"{source}/model")
    folder = Path(source, "checkpoint")
    if METHODS[s.method].shadow and checkpoint.steps_in(folder):
        saved = checkpoint.newest(folder)
        yield f"shadow at step {saved.facts['step']}", *export.merged_policy(Path(source), saved, s, "theta_hat")
    else:
        why = f"{folder} has no checkpoint" if METHODS[s.method].shadow else f"the method {s.method} has none"
        yield f"no shadow: {why}", None, None


def ask(args: argparse.Namespace) -> None:
    """Prints the answers to the questions of --ask one under another, greedy by default. Raises DataError."""
    refuse_idle(args, args.temperature or 0)
    s, top_p = load_settings(Path(args.source)), 1.0 if args.top_p is None else args.top_p
    task, columns = prompt_of(args, s), []  # columns: (title, an answer to each question)
    for title, model, tokenizer in policies(args.source, s):
        if model is None:
            columns.append((title, [""] * len(args.ask)))
            continue
        prompts = [encode_prompt(tokenizer, question, task.instruction, task.template) for question in args.ask]
        positions = model.config.max_position_embeddings
        most = min(PROTOCOLS["paper"].max_new_tokens, positions - max(map(len, prompts)))
        limit = args.max_new_tokens or (s.max_new_tokens if s else max(most, 1))
        asked = [Problem(question, "") for question in args.ask]
        check_evaluation(asked, tokenizer, task.instruction, limit, positions, task.template)
        stop = stop_tokens(model, tokenizer, end_of_turn(tokenizer, task.template))
        sampler = Sampler(model, stop, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        keys = [(args.seed, i) for i in range(len(prompts))]  # equal for all models
        groups = sampler.generate(prompts, keys, 1, limit, args.temperature or 0, top_p)
        texts = [c.text(tokenizer, stop) + " … (cut off)" * (c.finish_reason == "length") for (c,) in groups]
        columns.append((title, texts))
    for i, question in enumerate(args.ask):
        print0("\n".join([question, *(f"--- {title}\n{texts[i]}".rstrip() for title, texts in columns), ""]))


def refuse_idle(args: argparse.Namespace, temperature: float) -> None:
    """Raises DataError for settings of sampling beside a greedy temperature."""
    if temperature == 0 and args.samples > 1:
        raise DataError(f"--samples {args.samples} greedy answers would be the same: set --temperature too")
    if temperature == 0 and (args.seed or args.top_p is not None):
        raise DataError("--seed and --top-p do nothing at temperature 0, which is greedy: set --temperature too")


def run(args: argparse.Namespace) -> None:
    """Answers the problems that the result file lacks, appends the records to it, and prints the report."""
    parallel.start(timedelta(days=1))  # the timeout of collectives: one rank may generate much longer than another
    folder = Path(args.source)
    s = load_settings(folder)  # None: a model, not a run
    task = find_task(args, s or Settings(task=builtin.task_of(args.source)))
    for note in task.notes:
        print0(note)
    with parallel.rank0_first():  # rank 0 builds or downloads the model, then the other ranks read it from the disk
        source = str(folder / "model") if s else builtin.resolve(args.source)
        model, tokenizer = load(source)
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32  # of weights; rotations stay fp32

    named = (args.benchmarks or Path(args.data).stem).replace(",", "+")  # empty: the run's own or the built-in task
    own_limit = s.max_new_tokens if s else 96
    given = dict(temperature=args.temperature, top_p=args.top_p, samples=args.samples or None)
    given["max_new_tokens"] = args.max_new_tokens or (None if named else own_limit)
    sampling = replace(PROTOCOLS[args.protocol], **{flag: value for flag, value in given.items() if value is not None})
    refuse_idle(args, sampling.temperature)
    if sampling.temperature == 0:
        sampling = replace(sampling, samples=1)
    limit, positions = sampling.max_new_tokens, model.config.max_position_embeddings
    check_evaluation(task.evaluation, tokenizer, task.instruction, limit, positions, task.template)
    groups = {g: [p for p in task.evaluation if p.group == g] for g in dict.fromkeys(p.group for p in task.evaluation)}
    samples = {g: sampling.samples or (BENCHMARKS[g].samples if g in BENCHMARKS else 4) for g in groups}
    header = dict(
        model=os.path.normpath(args.source), dtype=str(dtype),
        weights=getattr(model.config, "_commit_hash", None) or results.weights_hash(source),
        prompt=prompt_text(tokenizer, "{question}", task.instruction, task.template),
        sampling=asdict(sampling) | {"samples": samples}, seed=args.seed, options_seed=OPTIONS_SEED,
        grader=rewards.VERSION,
        torch=torch.__version__, transformers=transformers.__version__,
        data={g: dict(problems=len(p), sha256=fingerprint(Task(p, [], []))) for g, p in groups.items()},
    )  # fmt: skip
    name = f"answers-{named}-{args.protocol}.jsonl" if named else f"answers-{args.protocol}.jsonl"
    out = Path(args.out or (folder / name if s else Path("evals") / folder.name / name))
    records = parallel.broadcast(results.open_results(out, header) if parallel.rank() == 0 else None)

    stop = stop_tokens(model, tokenizer, end_of_turn(tokenizer, task.template))
    sampler = Sampler(model, stop, slots=args.slots, dtype=dtype)
    del model
    answered = {(r["group"], r["id"]) for r in records}
    parts = []  # (group, ids of the problems that are answered between two writes)
    for group, problems in groups.items():
        todo = [i for i in range(len(problems)) if (group, i) not in answered]
        size = parallel.world_size() * max(1, 2 * args.slots // samples[group])
        parts += [(group, todo[start : start + size]) for start in range(0, len(todo), size)]
    count, own = (sum(len(of(ids)) * samples[group] for group, ids in parts) for of in (list, share_of))
    asked = f"{sum(len(ids) for _, ids in parts)} problems, {count} answers of at most {limit} tokens"
    print0(f"{asked}, {args.slots * parallel.world_size()} at once: at most {count * limit:,} tokens")
    progress = Progress(own, limit, announce=True)
    with progress.bar:
        for group, ids in parts:
            keys = [(args.seed, zlib.crc32(group.encode()), i) for i in ids]
            with_count = replace(sampling, samples=samples[group])
            chosen = [groups[group][i] for i in ids]
            graded = answer(sampler, tokenizer, task, chosen, keys, with_count, progress)
            records += graded
            if parallel.rank() == 0:
                for record in graded:
                    append_line(out, record)
    if parallel.rank() == 0:
        print0(results.write_summary(out, header, records))
        print0(f"\n{header['sampling']} · seed {args.seed} · grader {header['grader']} · answers in {out}")
    parallel.end()


def main() -> None:
    args = parse(sys.argv[1:])
    with one_line_errors("evaluate.py", f"lower --slots {args.slots}, but not below the samples per problem"):
        if args.table:
            print0(results.table([Path(name) for name in args.table]))
        elif args.ask:
            ask(args)
        elif args.regrade:
            print0(regrade(Path(args.regrade), args.out))
        else:
            run(args)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
