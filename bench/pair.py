"""Steps of two checkouts of this project in turn: what did a change bring?

    git worktree add ../old COMMIT && python bench/pair.py ../old [--out FILE.jsonl] [--steps 9] [flags of bridge.py]

Each checkout computes in a process of its own, on one thread (or OMP_NUM_THREADS), and the other one waits meanwhile.
Every step starts from the initial weights and draws the next prompts, the same in both. Milliseconds are medians after
a first step, by phase; peak GiB is the process's peak RSS.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median


def serve(root: str, flags: list[str]) -> None:
    """Makes a step of the checkout `root` for each line of the standard input; prints its phases as JSON."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever else is printed goes to the standard error
    sys.path[:0] = [f"{root}/bench", root]
    import step
    import torch

    import bridge
    from infra.run import RunFolder, Timer
    from settings import parse

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    step.Watch = Timer  # its peaks of each phase cost time
    run = bridge.set_up(parse(flags)[0], RunFolder(Path()))
    weights = step.weights_of(run)
    initial = [p.detach().clone() for p in weights]
    for k, _ in enumerate(sys.stdin):
        phases = step.one_step(run, k)
        for p, values in zip(weights, initial, strict=True):
            p.data.copy_(values)
        seconds = {phase: values["s"] for phase, values in phases.items()}
        tokens = phases.get("sample", {}).get("tokens")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        os.write(answers, json.dumps([seconds, tokens, peak]).encode() + b"\n")


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        return serve(sys.argv[2], sys.argv[3:])
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("old", type=Path, help="the folder of the other checkout")
    options.add_argument("--out", type=Path, help="append the rows to this file")
    options.add_argument("--steps", type=int, default=9, help="measured steps, after the first")
    args, flags = options.parse_known_args()
    from measure import ROOT, Table

    servers = {}
    for name, root in (("old", args.old), ("new", ROOT)):
        command = [sys.executable, __file__, "--serve", str(root.resolve()), *flags]
        servers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
    measured: dict[str, list] = {name: [] for name in servers}
    for _ in range(1 + args.steps):
        for name, server in servers.items():
            server.stdin.write("\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            if not answer:
                sys.exit(f"pair.py: the {name} checkout has failed, see above")
            measured[name].append(json.loads(answer))
    for server in servers.values():
        server.stdin.close()
        server.wait()

    table = Table("pair", args.out)
    totals = {name: median(sum(seconds.values()) for seconds, *_ in steps[1:]) for name, steps in measured.items()}
    for name, steps in measured.items():
        phases = {f"{phase} ms": 1e3 * median(seconds[phase] for seconds, *_ in steps[1:]) for phase in steps[1][0]}
        table.add({"checkout": name, "flags": " ".join(flags), "steps": args.steps, "ms": 1e3 * totals[name], **phases,
                   "tokens": median(tokens or 0 for _, tokens, _ in steps[1:]), "peak GiB": steps[-1][2],
                   "x old": totals[name] / totals["old"]})  # fmt: skip


if __name__ == "__main__":
    main()
