"""Benchmarks: answers of a model, their grades, and numbers with their uncertainty.

    python evaluate.py RUN_OR_MODEL [--benchmarks paper] [--protocol sampled] [--out FILE]
    torchrun --nproc-per-node 4 evaluate.py MODEL --benchmarks math500,aime24
    python evaluate.py --regrade FILE            grade the answers of a result file again, without generating
    python evaluate.py --table FILE FILE ...     compare result files; differences are against the first

Without --benchmarks or --data a run is evaluated on the problems it was configured with, a model on the built-in
arithmetic. A result file has a header line (model, prompt, sampling, seed, grader, data) and then one line per answer,
so every number can be looked into and computed again. An interrupted evaluation continues where it stopped.
"""

import argparse
import hashlib
import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import rewards
from grading.scores import by_problem, compare, report, summarise, verdicts
from infra import checkpoint, parallel
from infra.model import ModelError, load, stop_tokens
from sampler import Sampler
from tasks import arithmetic as toy
from tasks import prompts
from tasks import task as tasks
from tasks.benchmarks import BENCHMARKS, OPTIONS_SEED, PAPER, read_benchmark


@dataclass(frozen=True)
class Protocol:
    """How answers are sampled. `samples` None: as many as the benchmark's entry says."""

    temperature: float
    top_p: float
    samples: int | None
    max_new_tokens: int


PROTOCOLS = {"paper": Protocol(0.0, 1.0, 1, 5000), "sampled": Protocol(0.6, 0.95, None, 8192)}


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def answer(
    sampler: Sampler,
    tokenizer,
    problems: list[tasks.Problem],
    instruction: str,
    max_new_tokens: int,
    keys: list[tuple[int, ...]] | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    template: str = "",
) -> list[dict]:
    """One graded record per problem and sample; sample i of a problem draws from (*key, i), whatever else there is."""
    if not problems:  # a rank may have none
        return []
    texts = [prompts.prompt_text(tokenizer, p.question, instruction, template) for p in problems]
    encoded = [prompts.encode_text(tokenizer, text, template) for text in texts]
    keys = keys or [(0, i) for i in range(len(problems))]
    quiet = parallel.rank() > 0
    with tqdm(total=samples * len(encoded), desc="answering", leave=False, disable=quiet) as bar:
        groups = sampler.generate(encoded, keys, samples, max_new_tokens, temperature, top_p, progress=bar.update)
    records = []
    for problem, text, completions in zip(problems, texts, groups, strict=True):
        for i, completion in enumerate(completions):
            record = dict(
                group=problem.group, labels=problem.labels, sample=i, question=problem.question, prompt=text,
                answer=problem.answer, tolerance=problem.tolerance, unit=problem.unit,
                response=tokenizer.decode(completion.ids, skip_special_tokens=True), tokens=len(completion.ids),
                finish_reason=completion.finish_reason,
            )  # fmt: skip
            records.append(record | grade(record))
    return records


def grade(record: dict) -> dict:
    """correct, extracted and reason of a record's response. A response that was cut off may still hold its answer."""
    verdict = rewards.is_correct(
        record["response"], record["answer"], tolerance=record["tolerance"], unit=record["unit"]
    )
    return dict(correct=verdict.correct, extracted=verdict.extracted, reason=verdict.reason)


def evaluate(
    sampler: Sampler,
    tokenizer,
    problems: list[tasks.Problem],
    instruction: str,
    max_new_tokens: int,
    template: str = "",
) -> tuple[dict[str, float], list[dict]]:
    """Greedy pass@1 of the sampler's weights: ({group: accuracy, "average": …}, one record per problem).

    "average" is the plain mean over the groups, as the paper averages over benchmarks.
    """
    mine = range(parallel.rank(), len(problems), parallel.world())
    records = answer(sampler, tokenizer, [problems[i] for i in mine], instruction, max_new_tokens, template=template)
    records = parallel.gather([record | {"id": i} for i, record in zip(mine, records, strict=True)])
    accuracy = {group: float(verdicts(rows).mean()) for group, rows in sorted(by_problem(records).items())}
    return {**accuracy, "average": sum(accuracy.values()) / len(accuracy)}, records


# ---------------------------------------------------------------------------------------------------------------------
# Result files


def read_results(path: Path) -> tuple[dict, list[dict]]:
    """(header, records) of a result file, up to a torn last line. Raises tasks.DataError if it is none."""
    if not path.is_file():
        raise tasks.DataError(f"there is no result file {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        header, records = rows[0]["header"], rows[1:]
        return header, list({(r["group"], r["id"], r["sample"]): r for r in records}.values())
    except (UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError) as error:
        raise tasks.DataError(f"{path} is no result file of evaluate.py: {error!r}") from error


def whole(header: dict, records: list[dict]) -> list[dict]:
    """The records of the problems of which every sample is there."""
    count = Counter((r["group"], r["id"]) for r in records)
    return [r for r in records if count[r["group"], r["id"]] == header["sampling"]["samples"][r["group"]]]


def read_finished(path: Path) -> tuple[dict, list[dict]]:
    """As `read_results`. Raises tasks.DataError if answers are missing."""
    header, records = read_results(path)
    asked = sum(header["sampling"]["samples"][g] * data["problems"] for g, data in header["data"].items())
    if len(whole(header, records)) < asked:
        raise tasks.DataError(
            f"{path} holds {len(records)} of {asked} answers: the command that made it will finish it"
        )
    return header, records


def write_results(path: Path, header: dict, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.rewrite(path, "".join(json.dumps(r) + "\n" for r in ({"header": header}, *records)))


def write_summary(path: Path, header: dict, records: list[dict]) -> str:
    """Writes all numbers beside a result file, as NAME.summary.json; returns the printed report."""
    summary = summarise(records)
    named = path.with_name(path.name.removesuffix(".jsonl") + ".summary.json")
    named.write_text(json.dumps(header | summary, indent=1), encoding="utf-8")
    return report(header, summary)


def regrade(path: Path, out: str) -> str:
    """Grades the answers of a result file again and writes them to `out`, by default NAME.regraded.jsonl beside it."""
    header, records = read_finished(path)
    graded = [record | grade(record) for record in records]
    changed = [(old, new) for old, new in zip(records, graded, strict=True) if old["correct"] != new["correct"]]
    header |= dict(grader=rewards.VERSION)
    target = Path(out or path.with_name(path.name.removesuffix(".jsonl") + ".regraded.jsonl"))
    write_results(target, header, graded)
    shown = [f"  {new['correct']!s:5} now: {new['extracted']!r} for {new['answer']!r}" for _, new in changed[:20]]
    counted = f"{len(changed)} of {len(records)} verdicts changed, written to {target}"
    return "\n".join([write_summary(target, header, graded), counted, *shown])


def data_hash(problems: list[tasks.Problem]) -> str:
    text = json.dumps([(p.question, p.answer, p.tolerance, p.unit) for p in problems])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_hash(folder: str) -> str:
    """A hash of a folder's weight files and configuration."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json":
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def find_problems(args: argparse.Namespace, settings: dict) -> tuple[list[tasks.Problem], str]:
    """(problems, instruction): benchmarks, a file, what the run was configured with, or the built-in arithmetic."""
    if args.benchmarks:
        names = list(dict.fromkeys(args.benchmarks.replace("paper", ",".join(PAPER)).split(",")))
        if unknown := [n for n in names if n not in BENCHMARKS]:
            raise tasks.DataError(f"--benchmarks: no {unknown[0]!r}; there are paper, {', '.join(BENCHMARKS)}")
        problems = [p for n in names for p in read_benchmark(n, args.benchmark_dir)[: args.problems or None]]
        return problems, prompts.INSTRUCTION
    if args.data:
        problems = tasks.read_problems(args.data, "--data", notes := [])
        print(*notes, sep="\n", end="\n" * bool(notes))
        return problems[: args.problems or None], prompts.INSTRUCTION
    if rl_data := settings.get("rl_data", ""):
        names = {name: settings.get(name, "") for name in ("rl_fields", "rl_filter")}
        task = tasks.from_files(rl_data, "", settings.get("eval_data", ""), settings["eval_problems"], **names)
        return task.evaluation[: args.problems or None], prompts.INSTRUCTION
    return toy.evaluation(args.problems or settings.get("eval_problems", 100)), ""


def run(args: argparse.Namespace) -> None:
    """Answers what is still unanswered, appends it to the result file, and prints the report."""
    parallel.start(timedelta(days=1))  # only texts travel; a rank may have the long answers
    rank, world = parallel.rank(), parallel.world()
    folder, settings = Path(args.source), {}
    if (folder / "evals.jsonl").exists():  # a run of bridge.py
        if not (folder / "model").is_dir():
            raise tasks.DataError(f"{folder} has no model/ yet: the run has not finished, --resume continues it")
        settings = json.loads((folder / "config.json").read_text()).get("settings", {})
    problems, instruction = find_problems(args, settings)
    groups = {g: [p for p in problems if p.group == g] for g in dict.fromkeys(p.group for p in problems)}
    with parallel.in_turns():  # a built-in model is built, another may be downloaded
        source = str(folder / "model") if settings else toy.resolve(args.source)
        model, tokenizer = load(source)
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32  # of weights; rotations stay fp32

    own = not (args.benchmarks or args.data)
    sampling = choose_sampling(args, list(groups), settings.get("max_new_tokens", 96) if own else None)
    limit = sampling["max_new_tokens"]
    template = settings.get("template", "") if args.template is None else args.template
    tasks.check_evaluation(problems, tokenizer, instruction, limit, model.config.max_position_embeddings, template)
    header = dict(
        model=os.path.normpath(args.source), dtype=str(dtype),
        weights=getattr(model.config, "_commit_hash", None) or weights_hash(source),
        prompt=prompts.prompt_text(tokenizer, "{question}", instruction, template), sampling=sampling,
        seed=args.seed, options_seed=OPTIONS_SEED, grader=rewards.VERSION, torch=torch.__version__,
        transformers=transformers.__version__,
        data={g: dict(problems=len(p), sha256=data_hash(p)) for g, p in groups.items()},
    )  # fmt: skip
    what = "" if own else "-" + (args.benchmarks or Path(args.data).stem).replace(",", "+")
    name = f"answers{what}-{args.protocol}.jsonl"
    out = Path(args.out or (folder / name if settings else Path("evals") / folder.name / name))
    records = open_results(out, header) if rank == 0 else []

    stop = stop_tokens(model, tokenizer, prompts.end_of_turn(tokenizer, template))
    sampler = Sampler(model, stop, slots=args.slots, dtype=dtype)
    del model
    done = parallel.first({(r["group"], r["id"]) for r in records})
    for group, of_group in groups.items():
        samples = sampling["samples"][group]
        todo = [i for i in range(len(of_group)) if (group, i) not in done]
        size = world * max(1, 2 * args.slots // samples)  # problems between two writes
        for start in range(0, len(todo), size):
            mine = todo[start : start + size][rank::world]
            keys = [(args.seed, zlib.crc32(group.encode()), i) for i in mine]
            fresh = answer(
                sampler, tokenizer, [of_group[i] for i in mine], instruction, limit, keys, samples,
                sampling["temperature"], sampling["top_p"], template,
            )  # fmt: skip
            fresh = parallel.gather([record | {"id": mine[n // samples]} for n, record in enumerate(fresh)])
            fresh.sort(key=lambda r: (r["group"], r["id"], r["sample"]))
            for record in fresh if rank == 0 else []:
                checkpoint.append(out, record)
            records += fresh
    if rank == 0:
        print(write_summary(out, header, records))
        print(f"\n{sampling} · seed {args.seed} · grader {rewards.VERSION} · answers in {out}")
    parallel.end()


def choose_sampling(args: argparse.Namespace, groups: list[str], own_limit: int | None) -> dict:
    """temperature, top_p, max_new_tokens and {group: samples}: the flags', else the protocol's."""
    protocol = PROTOCOLS[args.protocol]
    temperature = protocol.temperature if args.temperature is None else args.temperature
    if temperature == 0 and args.samples > 1:
        raise tasks.DataError(f"--samples {args.samples} greedy answers would be the same: set --temperature too")
    samples = {g: protocol.samples or (BENCHMARKS[g].samples if g in BENCHMARKS else 4) for g in groups}
    return dict(
        temperature=temperature,
        top_p=protocol.top_p if args.top_p is None else args.top_p,
        max_new_tokens=args.max_new_tokens or own_limit or protocol.max_new_tokens,
        samples={g: args.samples or (n if temperature else 1) for g, n in samples.items()},
    )


def open_results(out: Path, header: dict) -> list[dict]:
    """The records that are already there, for problems all of whose samples are; or a new file. Rank 0 only.

    Raises tasks.DataError when the file was made in another way.
    """
    if not out.exists():
        write_results(out, header, [])
        return []
    before, records = read_results(out)
    if changed := [key for key in header if before.get(key) != header[key]]:
        raise tasks.DataError(f"{out} exists and was made with another {', '.join(changed)}: choose another --out")
    records = whole(header, records)
    write_results(out, header, records)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("source", nargs="?", metavar="RUN_OR_MODEL", help="a run folder of bridge.py, a model folder or a hub name")
    add("--benchmarks", default="", help=f"paper (the first five) or a list of {','.join(BENCHMARKS)}")
    add("--benchmark-dir", default="benchmarks", help="where NAME.jsonl is looked for before the hub is asked")
    add("--data", default="", help="problems to evaluate on, .jsonl with question and answer")
    add("--problems", type=int, default=0, help="only the first N of each (for the built-in task: N per length)")
    add("--template", help="prompt: qwen-boxed or plain instead of the chat template (default: the run's)")
    add("--protocol", choices=PROTOCOLS, default="paper", help="paper: greedy, one answer; sampled: T 0.6, top-p 0.95")
    add("--samples", type=int, default=0, help="answers per problem (default: the protocol's, by benchmark)")
    add("--temperature", type=float, help="0 is greedy (default: the protocol's)")
    add("--top-p", type=float, help="sample from the likeliest tokens that reach this mass (default: the protocol's)")
    add("--max-new-tokens", type=int, default=0, help="tokens per answer (default: the protocol's; a run's own)")
    add("--seed", type=int, default=0, help="of the samples, and of the order of options")
    add("--slots", type=int, default=64, help="answers decoded at once per process; lower it when memory runs out")
    add("--out", default="", help="the result file; an existing one is continued (default: beside the run, or evals/)")
    add("--regrade", metavar="FILE", help="grade a result file's answers again")
    add("--table", nargs="+", metavar="FILE", help="compare result files")
    args = parser.parse_args()
    if sum(map(bool, (args.source, args.regrade, args.table))) != 1:
        parser.error("give a run or model, or --regrade FILE, or --table FILE ...")
    if min(args.samples, args.problems, args.max_new_tokens, args.seed) < 0 or args.slots < 1:
        parser.error("--samples, --problems, --max-new-tokens, --seed and --slots cannot be negative")
    if not (args.temperature in (None, 0) or 1e-3 <= args.temperature < float("inf")) or not (
        0 < (1 if args.top_p is None else args.top_p) <= 1
    ):
        parser.error("--temperature must be 0 or at least 0.001, --top-p above 0 and at most 1")
    if args.benchmarks and args.data:
        parser.error("--benchmarks and --data are two kinds of problems: give one")
    try:
        if args.table:
            print(
                compare([("/".join(Path(f).with_suffix("").parts[-2:]), *read_finished(Path(f))) for f in args.table])
            )
        elif args.regrade:
            print(regrade(Path(args.regrade), args.out))
        else:
            run(args)
    except (tasks.DataError, ModelError) as error:
        parallel.fail(f"evaluate.py: {error}")
    except torch.cuda.OutOfMemoryError as error:
        parallel.fail(
            f"evaluate.py: out of memory, lower --slots {args.slots} (but not below the samples per problem): {error}"
        )
    except OSError as error:
        parallel.fail(f"evaluate.py: {error}; what was answered before is kept")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
