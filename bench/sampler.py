"""Tokens per second of the sampler, its cache-free definition and transformers' generate, on the built-in model.

    python bench/sampler.py [--quick] [--out FILE.jsonl]

All sample at temperature 1 and never stop early, so every sequence has the same length.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import tasks  # noqa: E402
import toy  # noqa: E402
from model import load  # noqa: E402
from sampler import Sampler, generate_naive  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smoke model and 4 prompts")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    prompts, group, tokens, name = (4, 4, 16, "arithmetic-smoke") if args.quick else (32, 8, 48, "arithmetic-laptop")
    model, tokenizer = load(str(toy.build_base(name)))
    never = [len(tokenizer)]  # no such token: nothing stops
    sampler = Sampler(model, never, slots=prompts * group)
    encoded = [tasks.encode_prompt(tokenizer, p.question, "") for p in toy.evaluation(prompts)[:prompts]]

    def ours() -> int:
        keys = [(0, i) for i in range(prompts)]
        return sum(len(c.ids) for g in sampler.generate(encoded, keys, group, tokens, 1.0) for c in g)

    def naive() -> int:  # one group is enough: it does the same work for each
        return sum(len(generate_naive(sampler, encoded[0], (0, 0, i), tokens, 1.0).ids) for i in range(group))

    plain, _ = load(str(toy.build_base(name)))
    plain.set_attn_implementation("sdpa")
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in encoded for _ in range(group)])  # left-padded, as it asks
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in encoded for _ in range(group)])

    def generate() -> int:
        out = plain.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,
        )
        return out[:, width:].numel()

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    paths = {"naive": naive, "transformers generate": generate, "sampler": ours}
    best = dict.fromkeys(paths, 0.0)
    for _ in range(3):  # interleaved: a slow moment of the machine hits all
        for title, run in paths.items():
            start = time.perf_counter()
            best[title] = max(best[title], run() / (time.perf_counter() - start))
    print(f"{prompts * group} sequences x {tokens} tokens, {name}, {torch.get_num_threads()} threads, best of 3")
    print("| path | tokens/s | x generate |\n|---|---|---|")
    for title, speed in best.items():
        print(f"| {title} | {speed:,.0f} | {speed / best['transformers generate']:.2f} |")
        row = dict(path=title, tokens_per_second=round(speed), sequences=prompts * group, tokens=tokens, model=name,
                   threads=torch.get_num_threads(), cores=os.cpu_count(), torch=torch.__version__,
                   transformers=transformers.__version__, commit=commit.stdout.strip())  # fmt: skip
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
