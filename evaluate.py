"""Greedy accuracy of a model or a finished run, by group of problems.

    python evaluate.py RUN_OR_MODEL [--data FILE] [--problems N] [--answers FILE]

A run is evaluated on the evaluation problems it was configured with, a model folder on the built-in
arithmetic or on --data. Every answer can be written to a JSON-lines file, so that a number can be looked into.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

import rewards
import tasks
import toy
from model import ModelError, load, stop_tokens
from sampler import Sampler


def evaluate(
    sampler: Sampler, tokenizer, problems: list[tasks.Problem], instruction: str, max_new_tokens: int
) -> tuple[dict[str, float], list[dict]]:
    """Greedy pass@1 of the sampler's weights: ({group: accuracy, "average": …}, one record per problem).

    "average" is the plain mean over the groups, as the paper averages over benchmarks.
    """
    prompts = [tasks.encode_prompt(tokenizer, p.question, instruction) for p in problems]
    keys = [(0, i) for i in range(len(prompts))]  # greedy draws nothing from them
    with tqdm(total=len(prompts), desc="evaluating", leave=False) as bar:
        groups = sampler.generate(prompts, keys, 1, max_new_tokens, temperature=0, progress=bar.update)
    records, by_group = [], defaultdict(list)
    for problem, (completion,) in zip(problems, groups, strict=True):
        response = tokenizer.decode(completion.ids, skip_special_tokens=True)
        verdict = rewards.is_correct(response, problem.answer)
        by_group[problem.group].append(verdict.correct)
        records.append(
            dict(group=problem.group, question=problem.question, answer=problem.answer, response=response,
                 extracted=verdict.extracted, reason=verdict.reason, finish_reason=completion.finish_reason)
        )  # fmt: skip
    accuracy = {g: sum(v) / len(v) for g, v in sorted(by_group.items())}
    return {**accuracy, "average": sum(accuracy.values()) / len(accuracy)}, records


def table(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table of {column title: {group: accuracy}}, in percent."""
    groups = list(next(iter(columns.values())))
    lines = [f"| {' | '.join(['', *groups])} |", "|---" * (len(groups) + 1) + "|"]
    for title, accuracy in columns.items():
        lines.append(f"| {title} | {' | '.join(f'{100 * accuracy[g]:.1f}' for g in groups)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", metavar="RUN_OR_MODEL", help="a run folder of bridge.py, a model folder or a hub name"
    )
    parser.add_argument("--data", default="", help="problems to evaluate on, .jsonl with question and answer")
    parser.add_argument("--problems", type=int, default=0, help="how many (per length for the built-in task)")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="tokens per answer (default: the run's, else 96)")
    parser.add_argument("--answers", default="", help="write every answer with its verdict to this .jsonl file")
    args = parser.parse_args()

    folder, settings = args.source, {}
    if (Path(folder) / "evals.jsonl").exists():  # a run of bridge.py
        if not (Path(folder) / "model").is_dir():
            sys.exit(f"evaluate.py: {folder} has no model/ yet: the run has not finished, --resume continues it")
        settings = json.loads((Path(folder) / "config.json").read_text())["settings"]
        folder = str(Path(folder) / "model")
    eval_data, rl_data = settings.get("eval_data", ""), settings.get("rl_data", "")
    limit = args.max_new_tokens or settings.get("max_new_tokens", 96)
    try:
        if args.data:
            problems, instruction = tasks.read_problems(args.data, "--data", []), tasks.INSTRUCTION
        elif rl_data:
            problems = tasks.from_files(rl_data, "", eval_data, settings["eval_problems"]).evaluation
            instruction = tasks.INSTRUCTION
        else:
            problems, instruction = toy.evaluation(args.problems or settings.get("eval_problems", 100)), ""
        if args.data or rl_data:
            problems = problems[: args.problems or None]
        model, tokenizer = load(toy.resolve(folder))
        tasks.check_evaluation(problems, tokenizer, instruction, limit, model.config.max_position_embeddings)
        sampler = Sampler(model, stop_tokens(model, tokenizer))
        accuracy, records = evaluate(sampler, tokenizer, problems, instruction, limit)
    except (tasks.DataError, ModelError) as error:
        sys.exit(f"evaluate.py: {error}")
    cut = sum(r["finish_reason"] == "length" for r in records) / len(records)
    print(table({args.source: accuracy}))
    print(f"{len(records)} problems, greedy, at most {limit} tokens, {100 * cut:.1f} % cut off")
    if args.answers:
        try:
            Path(args.answers).write_text("".join(json.dumps(r) + "\n" for r in records))
        except OSError as error:
            sys.exit(f"evaluate.py: --answers: {error}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
