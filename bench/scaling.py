"""Markdown tables of plan.py for the paper's models on 1, 4 and 8 GPUs: computed memory, estimated seconds.

python bench/scaling.py > docs/scaling_tables.md
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from infra import memory as plan
from settings import PAPER, Settings


def main() -> None:
    print("<!-- python bench/scaling.py > docs/scaling_tables.md -->\n")
    print("BRIDGE, 64 prompts x 5 samples of at most 3,000 tokens, 64 demonstrations, bf16, all layers checkpointed, ")
    print("320 slots. GiB are of each GPU, computed; seconds of a step are estimated, not measured.\n")
    print("| model | GPU | GPUs | sharded | state, GiB | peak, GiB | fits | s per step | what would fit |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model in plan.PUBLISHED:
        m = plan.shapes(plan.config_of(model))
        for name in ("h100", "h200"):
            gpu = plan.GPUS[name]
            for world, shard in ((1, False), (4, False), (4, True), (8, False), (8, True)):
                s = Settings(**PAPER | dict(model=model, sampler_slots=320, shard=shard))
                state, *_, peak = plan.memory(s, m, world)
                fits = peak <= gpu.memory
                time = f"{sum(plan.seconds(s, m, gpu, world).values()):.0f}" if fits else ""
                ways = "" if fits else "; ".join(plan.remedies(s, m, world, gpu.memory))
                cells = [model, name, world, "yes" if shard else "no", f"{sum(state.values()) / plan.GiB:.1f}"]
                cells += [f"{peak / plan.GiB:.1f}", "yes" if fits else "no", time, ways]
                print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
