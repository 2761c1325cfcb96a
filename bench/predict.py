"""A prediction, which no run has confirmed: tokens per second and GPU of a step of the paper's presets on H200s.

    python bench/predict.py

The unit is that of published steps of RL: prompt and response tokens of all samples / seconds of the step / GPUs.
Seconds are those of decoding and of forward and backward passes. Decoding reads the weights at every step, and all
cached keys and values for every token; with less than 180 slots this takes longer than its matmuls. Not counted:
optimizers, merged weights, grading, communication (with NVLink it can run beside the passes).
"""

import measure  # noqa: F401  finds the project's own modules

from infra import memory
from settings import METHODS, PRESETS, Settings

MATMUL, COPY = 790e12, 4.3e12  # FLOP/s and bytes/s of a large matmul and copy, measured on an H200
PASSES, DECODING = 0.56, 0.58  # assumed: fractions of these rates that a step reaches
RESPONSE, DEMONSTRATION = 0.33, 0.8  # assumed: mean lengths as fractions of max_new_tokens
CASES = [("qwen2.5-3b", 1), ("qwen2.5-3b", 4), ("qwen2.5-3b", 8), ("llama-3.2-3b-instruct", 4),
         ("llama-3.2-3b-instruct", 8), ("qwen3-8b-base", 8)]  # fmt: skip


def sampling(s: Settings, m: memory.Shapes, samples: float) -> float:
    """Seconds to decode the samples of one GPU in bf16."""
    mean = RESPONSE * s.max_new_tokens
    slots = min(s.sampler_slots, samples)
    # Slots are refilled as long as prompts wait; then the longest response decides.
    steps = samples * mean / slots + s.max_new_tokens - mean
    weights = 2 * (m.linear + m.vocabulary * m.hidden)  # bytes
    cached = 2 * m.layers * 2 * m.kv * (memory.PROMPT + mean / 2)  # bytes that a token reads, on average
    return (steps * weights + samples * mean * cached) / COPY / DECODING


def passes(s: Settings, m: memory.Shapes, rows: float, response: float) -> float:
    """Seconds of a forward and backward pass of rows on one GPU."""
    length = memory.PROMPT + response
    attention = 2 * m.layers * m.q * length  # a token attends to half of its row
    repeats = 3 + min(s.checkpoint_layers, m.layers) / m.layers  # forward, twice backward, recomputed
    body = repeats * length * (2 * m.linear + attention)
    head = 8 * response * m.vocabulary * m.hidden
    return rows * (body + head) / MATMUL / PASSES


def predict(preset: str, world: int) -> dict[str, float]:
    """Seconds of a step's parts, and tokens per second and GPU of the methods rl and bridge."""
    s = Settings(**PRESETS[preset])
    m = memory.shapes(memory.config_of(s.model))
    samples = s.prompts_per_step * s.group_size / world
    mean = RESPONSE * s.max_new_tokens
    tokens = samples * (memory.PROMPT + mean)
    decoding = sampling(s, m, samples)
    rollouts = passes(s, m, samples, mean)
    demonstrations = passes(s, m, s.sft_batch / world, DEMONSTRATION * s.max_new_tokens)
    return {
        "sampling s": decoding,
        "pass of rollouts s": rollouts,
        "pass of demonstrations s": demonstrations,
        "rl": tokens / (decoding + rollouts),
        "bridge": tokens / (decoding + 2 * rollouts + demonstrations),
    }


def main() -> None:
    for preset, world in CASES:
        seconds = predict(preset, world)
        cells = [f"{x:,.0f}" if name in METHODS else f"{x:.1f}" for name, x in seconds.items()]
        print(f"| `{preset}` | {world} H200 | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
