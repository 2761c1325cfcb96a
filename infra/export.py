"""What a run leaves for others to load: the merged policy as a transformers folder with a card, and w for PEFT.

`model/` is the sampler's copy of the policy: θ + s·B·A, added in fp32 and rounded once, to the run's dtype; the card
says what the rounding does to logits. A folder is written under a temporary name and renamed, so that `model/` is whole
or absent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import GenerationConfig

import lora
import plot
from grading.scores import markdown, table
from infra import parallel
from infra.model import logits
from settings import Settings
from tasks import arithmetic as toy
from tasks import prompts

if TYPE_CHECKING:
    from bridge import Run

PROBES = 8  # evaluation prompts on which the card's change of logits is taken
METHODS = {  # what happened to the weights, for the card
    "sft": "The baseline `sft`: supervised fine-tuning alone.",
    "rl": "The baseline `rl`: reinforcement learning (GRPO) alone, without demonstrations.",
    "sft_rl": "The baseline `sft_rl`: supervised fine-tuning, then reinforcement learning (GRPO).",
    "alternating": "The baseline `alternating`: updates of reinforcement learning (GRPO) and of supervised fine-tuning "
    "in turn.",
    "mix": "The baseline `mix`: reinforcement learning (GRPO) and supervised fine-tuning in one update.",
    "mix_lora": "The baseline `mix_lora`: reinforcement learning (GRPO) and supervised fine-tuning in one update of "
    "the base weights θ and of a LoRA adapter w. This is θ with w merged.",
    "bridge": "BRIDGE: the base weights θ take the gradients of supervised fine-tuning and of reinforcement learning "
    "(GRPO), while a LoRA adapter w also climbs the cooperative gain, the reward of joint training over that of a "
    "copy of θ that takes RL steps only. This is θ with w merged.",
}


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` when everything is written.

    A kill leaves the old folder, the new one or, between two renames, neither; never a part of one.
    """
    scratch, old = (folder.with_name(f"{folder.name}.{end}") for end in ("tmp", "old"))
    for left_by_a_kill in (scratch, old):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save(run: Run) -> None:
    """Writes model/ and adapter/ of a run, on rank 0; all ranks call it. The sampler must hold the policy's weights
    (`Sampler.refresh`).

    Raises FloatingPointError if a weight is not finite; nothing is written then.
    """
    s, w = run.s, run.m.w
    questions = [p.question for p in run.task.evaluation[:PROBES]]
    sequences = [prompts.encode_prompt(run.tokenizer, q, run.task.instruction, run.task.template) for q in questions]
    rounding = rounding_change(run.m.policy, run.sampler.model, sequences)
    if parallel.rank() > 0:
        return
    save_model(run.out / "model", run.sampler.model, run.tokenizer, run.sampler.stop, card(run, rounding))
    if w:
        with whole(run.out / "adapter") as folder:
            lora.save(folder, w, s.lora_rank, s.lora_alpha, s.lora_targets.split(","))
        if lora.delta_norm(w, 1.0) == 0:
            print(f"WARNING: w is zero (beta is {s.beta:g}): {run.out}/adapter changes nothing")


def rounding_change(policy: nn.Module, rounded: nn.Module, sequences: list[list[int]]) -> tuple[float, float]:
    """(largest change of a logit, share of positions at which another token becomes the likeliest) from the fp32 policy
    to its rounded copy, over token sequences. All ranks call it, since a sharded policy needs them."""
    largest, other = 0.0, []
    for ids in sequences:
        exact, after = logits(policy, ids), logits(rounded, ids)  # [T, V]
        largest = max(largest, (after - exact).abs().max().item())
        other += (after.argmax(-1) != exact.argmax(-1)).tolist()
    return largest, sum(other) / len(other)


def save_model(folder: Path, model: nn.Module, tokenizer, stop: list[int], readme: str) -> None:
    """A folder that from_pretrained and inference servers load, with every token that ends a completion in its
    generation_config.json. What the base model's held besides, such as a temperature, was advice about another model.

    Raises FloatingPointError if a weight is not finite.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name} holds a value that is not finite: {folder} is not written")
    bos, pad = model.generation_config.bos_token_id, tokenizer.pad_token_id
    if pad is not None and pad >= model.config.vocab_size:  # a token that some tokenizers add beyond the embedding
        pad = None
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=stop, pad_token_id=pad)
    with whole(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(readme, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The card


def card(run: Run, rounding: tuple[float, float]) -> str:
    """model/README.md: what was done to which model with which data, what came out, how to load it."""
    s, config = run.s, json.loads((run.out / "config.json").read_text())
    parts = [
        front_matter(s),
        f"# {run.out.resolve().name}",
        f"{METHODS[s.method]} The method is that of *Beyond Two-Stage Training: Cooperative SFT and RL for LLM "
        "Reasoning* ([arXiv 2509.06948](https://arxiv.org/abs/2509.06948)).",
        "## Use",
        usage(run),
        "## Results",
        results(run),
        f"The weights were added up in fp32 and rounded to {s.dtype}. On {min(PROBES, len(run.task.evaluation))} "
        f"evaluation prompts that changed a logit by {rounding[0]:.2g} at most, and the likeliest token at "
        f"{rounding[1]:.2%} of the positions.",
        "## Data",
        data(run),
        "## Settings",
        f"Training began with `{s.model}`. In bold what differs from the defaults.",
        settings_table(s),
        f"Command: `{' '.join(config['command'])}`; "
        + ", ".join(f"{package} {version}" for package, version in config["versions"].items())
        + ".",
    ]
    if run.m.w:
        parts += ["## The adapter alone", adapter(run)]
    return "\n\n".join(parts) + "\n"


def front_matter(s: Settings) -> str:
    """What the hub reads. It knows the base model by its hub name only; the license is not ours to name."""
    on_hub = s.model not in toy.RECIPES and not Path(s.model).exists()
    lines = [f"base_model: {s.model}"] * on_hub + ["library_name: transformers", "pipeline_tag: text-generation"]
    return "\n".join(["---", *lines, "tags:", f"- {s.method}", "---"])


def usage(run: Run) -> str:
    instruction, tokenizer = run.task.instruction, run.tokenizer
    if not run.task.template:
        content = f"question + {instruction!r}" if instruction else "question"
        prompt = f"""messages = [{{"role": "user", "content": {content}}}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"""
    else:
        before, after = prompts.prompt_text(tokenizer, "\0", instruction, run.task.template).split("\0")
        prompt = f"prompt = {before!r} + question + {after!r}"
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
{prompt}
inputs = tokenizer(prompt, add_special_tokens={bool(run.task.template)}, return_tensors="pt")
output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens={run.s.max_new_tokens})
print(tokenizer.decode(output[0, inputs.input_ids.shape[1]:]))
```

It was trained on prompts of this form and no other, sampled at temperature {run.s.temperature:g}; an answer ends at
{", ".join(f"`{tokenizer.decode([i])}`" for i in run.sampler.stop)}."""


def results(run: Run) -> str:
    """The first and the last evaluation."""
    evals = plot.read(run.out / "evals.jsonl")
    columns = {f"step {e['step']}": e["policy"] for e in (evals[0], evals[-1])}
    return (
        f"Greedy accuracy, %, on {len(run.task.evaluation)} problems that are in no training set, answers of at most "
        f"{run.s.max_new_tokens} tokens:\n\n{table(columns)}"
    )


def data(run: Run) -> str:
    s, task, built_in = run.s, run.task, "built-in chain arithmetic"
    rows = [["evaluation", s.eval_data or s.rl_data or built_in, len(task.evaluation)]]
    if s.method != "rl":
        rows.insert(0, ["demonstrations", s.sft_data or built_in, len(run.demonstrations)])
    if s.method != "sft":
        rows.insert(0, ["prompts with gold answers", s.rl_data or built_in, len(task.problems)])
    return "\n".join([markdown(["", "source", "used"], rows), "", *(f"- {note}" for note in task.notes)]).strip()


def settings_table(s: Settings) -> str:
    """Those that differ from the defaults first, in bold."""
    defaults, values = asdict(Settings()), asdict(s)
    changed = [[f"**{name}**", f"**{value}**"] for name, value in values.items() if value != defaults[name]]
    same = [[name, value] for name, value in values.items() if value == defaults[name]]
    return markdown(["setting", "value"], changed + same)


def adapter(run: Run) -> str:
    s = run.s
    zero = " Here it is zero: it never moved." if lora.delta_norm(run.m.w, 1.0) == 0 else ""
    return f"""`../adapter` is w in PEFT's format, with s = {s.lora_alpha:g}/{s.lora_rank}.{zero} It belongs
on the trained θ, which only the run's checkpoints hold; on this model, which has it already, it would count twice.

```python
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
theta = {{f"theta.{{i}}": p.data for i, p in enumerate(model.parameters())}}
dcp.load(theta, checkpoint_id=checkpoint, no_dist=True)  # a folder checkpoint/step-*, read in place
model = PeftModel.from_pretrained(model, adapter)
```"""
