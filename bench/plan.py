"""Peak memory of the built-in model's run on a CPU, beside what plan.py computes of it.

    python bench/plan.py [--quick] [--out FILE.jsonl]

measured: the process's peak RSS after three steps of a preset (`laptop`, --quick: `smoke`), and what it was before the
model was loaded; computed: plan.memory with the run's own longest prompt, without its assumed share for Python.
"""

import resource
import tempfile
from pathlib import Path

from measure import arguments, write
from step import one_step

import bridge
import plan
import prompts
from settings import parse


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / plan.GiB  # Linux counts in KiB


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    preset = "smoke" if args.quick else "laptop"
    s, _ = parse(["--preset", preset])
    m, before = plan.shapes(plan.config_of(s.model)), peak()
    with tempfile.TemporaryDirectory() as folder:
        run = bridge.set_up(s, Path(folder))
        for k in range(3):
            one_step(run, k)
    longest = max(
        len(prompts.encode_prompt(run.tokenizer, p.question, run.task.instruction)) for p in run.task.problems
    )
    computed = (plan.memory(s, m, 1, cuda=False, prompt=longest)[-1] - plan.CPU_PROCESS) / plan.GiB
    row = {"preset": preset, "libraries GiB": before, "peak RSS GiB": peak(), "of the run GiB": peak() - before,
           "computed GiB": computed, "command": f"python bench/plan.py{' --quick' * args.quick}"}  # fmt: skip
    write([row], list(row), args.out)


if __name__ == "__main__":
    main()
