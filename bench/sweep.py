"""Runs bridge.py over a grid of settings and seeds; resumable, one JSON line per finished run.

python bench/sweep.py --out bench/results/NAME.jsonl --seeds 10,11 method=bridge,mix_lora alpha=3e-4,5e-4
python bench/sweep.py --out bench/results/NAME.jsonl --table      # a table of the file, averaged over seeds
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
from collections import defaultdict
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
            folder = keep / "-".join(settings.values())
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("evals.jsonl", "metrics.jsonl"):
                shutil.copy(out / name, folder)
            config = json.loads((out / "config.json").read_text()) | {"command": ["bridge.py", *flags]}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return dict(
        settings=settings,
        average={e["step"]: e["policy"]["average"] for e in evals},
        shadow={e["step"]: e["shadow"]["average"] for e in evals if "shadow" in e},
        final=evals[-1]["policy"],
        reward=sum(reward) / len(reward) if reward else None,
        seconds=round(seconds, 1),
    )


def table(records: list[dict]) -> str:
    """Markdown: greedy accuracy in percent at the last step: mean over seeds, and the range of the average."""
    by_point = defaultdict(list)
    for record in records:
        point = [f"{k}={v}" for k, v in record["settings"].items() if k != "seed"]
        by_point[" ".join(point)].append(record)
    groups = [g for g in records[0]["final"] if g != "average"]
    lines = [f"| | {' | '.join(groups)} | average | range | seeds |", "|---" * (len(groups) + 4) + "|"]
    for point, runs in by_point.items():
        cells = [sum(r["final"][g] for r in runs) / len(runs) for g in [*groups, "average"]]
        averages = sorted(100 * r["final"]["average"] for r in runs)
        numbers = " | ".join(f"{100 * c:.1f}" for c in cells)
        lines.append(f"| {point} | {numbers} | {averages[0]:.1f} to {averages[-1]:.1f} | {len(runs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", nargs="*", metavar="SETTING=VALUE[,VALUE…]")
    parser.add_argument("--seeds", default="10", help="comma-separated")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; finished runs in this file are skipped")
    parser.add_argument("--keep", type=Path, help="copy config, evals and metrics of every run into this folder")
    parser.add_argument("--table", action="store_true", help="print a table of --out, run nothing")
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(table(done))
        return
    names = [g.partition("=")[0] for g in args.grid]
    values = [g.partition("=")[2].split(",") for g in args.grid]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for seed, *point in itertools.product(args.seeds.split(","), *values):
        settings = dict(zip(names, point, strict=True)) | {"seed": seed}
        if settings not in [d["settings"] for d in done]:
            machine = {"commit": commit.stdout.strip(), "threads": os.environ.get("OMP_NUM_THREADS", "all")}
            record = run(settings, args.keep) | machine
            with open(args.out, "a") as file:
                file.write(json.dumps(record) + "\n")
            print(settings, f"average {record['final']['average']:.3f}, {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
