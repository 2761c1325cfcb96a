"""All benchmarks in turn, into one file, within ten minutes. On an H200:

    python bench/all.py --out bench/results/h200.jsonl [--quick]

Each is stopped at its limit below, having kept what it had measured until then. The exit status is 1 if any failed or
was stopped; the others run all the same.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

LIMITS = dict(head=150, attention=60, sampling=40, decode=140, train=100, step=105)  # seconds, 595 together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--out", type=Path, help="append all rows to this file")
    args = parser.parse_args()
    flags = ["--quick"] * args.quick + (["--out", str(args.out)] if args.out else [])
    outcomes = {}
    for name, limit in LIMITS.items():
        print(f"\n## {name}.py, at most {limit} s\n", flush=True)
        start = time.perf_counter()
        try:
            done = subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), *flags], timeout=limit)
            outcome = "done" if done.returncode == 0 else f"FAILED, exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"STOPPED at its limit of {limit} s"
        outcomes[name] = f"{outcome} after {time.perf_counter() - start:.0f} s"
    print("\n## summary\n\n" + "\n".join(f"{name}.py {outcome}" for name, outcome in outcomes.items()))
    sys.exit(0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1)


if __name__ == "__main__":
    main()
