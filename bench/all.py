"""The benchmarks in turn, into one file, in nine minutes: a step, decoding, the vocabulary head. On an H200:

    python bench/all.py --out bench/results/h200.jsonl [--quick] [--only step decode]

A benchmark that reaches its limit is stopped; the rows measured until then are in the file. The exit status is 1 if
one failed or was stopped; the others run all the same.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 540  # the limits' sum
SHARES = dict(step=4, decode=3, head=3)  # of SECONDS, among the chosen benchmarks; most important first


def limits(names: list[str]) -> dict[str, int]:
    """Seconds of each chosen benchmark, in the order in which they run."""
    chosen = [name for name in SHARES if name in names]
    return {name: SECONDS * SHARES[name] // sum(map(SHARES.get, chosen)) for name in chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--out", type=Path, help="append all rows to this file")
    parser.add_argument(
        "--only", nargs="+", choices=SHARES, default=list(SHARES), metavar="NAME", help="of these files"
    )
    args = parser.parse_args()
    flags = (["--quick"] if args.quick else []) + (["--out", str(args.out)] if args.out else [])
    outcomes = {}
    for name, limit in limits(args.only).items():
        print(f"\n## {name}.py, at most {limit} s", flush=True)
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
