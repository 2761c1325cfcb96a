"""Runs bridge.py over a grid of settings and seeds, one after another; resumable, one JSON line per finished run.

python bench/sweep.py --out bench/results/NAME.jsonl --seeds 10,11 method=bridge,mix_lora alpha=3e-4,5e-4
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(settings: dict[str, str], keep: Path | None) -> dict:
    """One run of bridge.py: its settings, accuracies over steps, mean reward of the last 10 steps and seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
        start = time.time()
        command = [sys.executable, ROOT / "bridge.py", *flags, "--out", out]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.time() - start
        evals = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        reward = [m["reward"] for m in metrics[-10:] if m["reward"] is not None]
        if keep:
            name = "-".join(settings.values())
            shutil.copytree(
                out, keep / name, ignore=shutil.ignore_patterns("checkpoint", "model", "adapter"), dirs_exist_ok=True
            )
    return dict(
        settings=settings,
        average={e["step"]: e["policy"]["average"] for e in evals},
        shadow={e["step"]: e["shadow"]["average"] for e in evals if "shadow" in e},
        final=evals[-1]["policy"],
        reward=sum(reward) / len(reward) if reward else None,
        seconds=round(seconds, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", nargs="*", metavar="SETTING=VALUE[,VALUE…]")
    parser.add_argument("--seeds", default="10", help="comma-separated")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; runs that are in it already are skipped")
    parser.add_argument("--keep", type=Path, help="copy the logs and figures of every run into this folder")
    args = parser.parse_args()
    names = [g.partition("=")[0] for g in args.grid]
    values = [g.partition("=")[2].split(",") for g in args.grid]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line)["settings"] for line in args.out.read_text().splitlines()] if args.out.exists() else []
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    for *point, seed in itertools.product(*values, args.seeds.split(",")):
        settings = dict(zip(names, point, strict=True)) | {"seed": seed}
        if settings not in done:
            record = run(settings, args.keep) | {"commit": commit, "threads": os.environ.get("OMP_NUM_THREADS", "all")}
            with open(args.out, "a") as file:
                file.write(json.dumps(record) + "\n")
            print(settings, f"average {record['final']['average']:.3f}, {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
