"""What a run exports: the policy θ + s·B·A, merged in fp32, as a transformers folder with a card, and w for PEFT.

python -m infra.export RUN [--step N or best] writes RUN/model-step-N from a checkpoint, without training or data.
"""

import argparse
import copy
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig

import lora
from grading.scores import table
from infra import checkpoint
from infra.files import DataError, atomic_folder, printable, read_log, write_json
from infra.model import load, write_model
from infra.run import RunFolder, one_line_errors, print0, settings_of
from settings import METHODS, Settings, builtin_models, expand, start_program

TRIED = "4.51.3, 4.57.6 and 5.24.0"  # versions that read a folder alike: tokens, and logits to 1e-5


def save_run(out: Path, s: Settings, merged: nn.Module, tokenizer, facts: dict, w: lora.Adapter) -> None:
    """Writes model/, the merged policy, and adapter/, and prints the accuracies. facts: see tasks/loading.py."""
    evals = read_log(out / "evals.jsonl")
    readme = card(s, out.resolve().name, facts, evals, s.total_steps)
    save_model(out / "model", merged, tokenizer, facts["stop"], readme)
    if w:  # its base is the trained θ of a checkpoint, not model/, which contains w already
        with atomic_folder(out / "adapter") as scratch:
            save_adapter(scratch, w, s.lora_rank, s.lora_alpha, s.lora_targets.split(","))
    print0(f"\ngreedy accuracy, %\n{accuracies(s, evals, s.total_steps)}")


def save_adapter(folder: Path, w: lora.Adapter, rank: int, alpha: float, targets: list[str]) -> None:
    """Writes w in PEFT's file format, for PeftModel.from_pretrained(base, folder).

    It names no base model, since the right base is the trained θ and not the initial model.
    """
    tensors = {f"base_model.model.{name}": p.detach().cpu().contiguous() for name, p in w.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=None,
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )
    write_json(folder / "adapter_config.json", config)


def save_checkpoint(run: Path, step: int | str | None) -> Path:
    """Writes the policy of a run's checkpoint, by default the newest, to RUN/model-step-N; returns that folder.

    step: "best" is that of the evaluation with the highest accuracy.

    Raises DataError, ModelError and OSError.
    """
    steps = checkpoint.steps_in(run / "checkpoint")
    if step == "best":
        step = RunFolder(run).best_step()
    if not steps or step not in (None, *steps):
        known = ", ".join(map(str, steps)) or "none"
        text = "; --keep-best keeps that of the best evaluation"
        raise DataError(f"no such checkpoint in {run}/checkpoint: its steps are {known}{text}")
    saved = checkpoint.newest(run / "checkpoint", step)
    s = settings_of(saved.folder / "facts.json")
    step = saved.facts["step"]
    facts = saved.facts["export"]
    readme = card(s, run.resolve().name, facts, read_log(run / "evals.jsonl"), step)
    model, tokenizer = merged_policy(run, saved, s)
    folder = run / f"model-step-{step}"
    save_model(folder, model, tokenizer, facts["stop"], readme)
    return folder


def merged_policy(run: Path, saved: checkpoint.Saved, s: Settings, base: str = "theta"):
    """(model, tokenizer) of a checkpoint: θ + s·B·A, or θ̂ + s·B·A for the base "theta_hat", on the CPU in `s.dtype`.

    The weights come from the checkpoint, however many ranks wrote it. Architecture and tokenizer come from RUN/model,
    else from the model that the run began with. Raises DataError, ModelError and OSError.
    """
    source = str(run / "model") if (run / "model").is_dir() else s.model
    model, tokenizer = load(source, torch.device("cpu"))
    merged = copy.deepcopy(model).to(getattr(torch, s.dtype))
    w = {}
    if METHODS[s.method].adapter:
        w = lora.create(model, s.lora_targets.split(","), s.lora_rank, s.seed)
    lora.attach(model, w, s.lora_alpha / s.lora_rank)

    tensors = {f"{base}.{i}": p.data for i, p in enumerate(lora.base_parameters(model).values())}
    tensors |= {f"w.{i}": p.data for i, p in enumerate(w.values())}
    weights = {name: shape for name, shape in saved.shapes.items() if re.fullmatch(rf"({base}|w)\.\d+", name)}
    if {name: tensor.shape for name, tensor in tensors.items()} != weights:
        raise DataError(
            f"model {s.model!r}: its shapes differ from those in {saved.folder}: the run began with another"
        )
    saved.load(tensors)
    lora.merge_into(merged, model)
    return merged, tokenizer


def save_model(folder: Path, model: nn.Module, tokenizer, stop: list[int], readme: str) -> None:
    """A folder for from_pretrained. Raises FloatingPointError, before it is changed, if a weight is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name} holds a value that is not finite: {folder} is not written")
    model.config.tie_word_embeddings = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.generation_config = GenerationConfig(eos_token_id=stop)
    with atomic_folder(folder) as scratch:
        write_model(scratch, model, tokenizer)
        (scratch / "README.md").write_text(printable(readme), encoding="utf-8")


def accuracies(s: Settings, evals: list[dict], step: int) -> str:
    """A Markdown table of the accuracies in evals.jsonl before training and at `step`."""
    by_step = {record["step"]: record for record in evals}
    if step not in by_step:
        return f"none: step {step} was not evaluated"
    columns = {}
    if 0 in by_step:
        columns["before"] = by_step[0]["policy"]
    columns[f"{s.method}, step {step}"] = by_step[step]["policy"]
    if "shadow" in by_step[step]:
        name = "its shadow (θ̂, w)" if METHODS[s.method].adapter else "its shadow θ̂"
        columns[name] = by_step[step]["shadow"]
    return table(columns)


def card(s: Settings, name: str, facts: dict, evals: list[dict], step: int) -> str:
    """README.md: model, method, how to load it, a prompt as in training, accuracies. facts: of tasks/loading.py."""
    base = Path(s.model).name if Path(s.model).is_absolute() else s.model  # no path of this machine
    licence = "" if s.model in builtin_models() else f" The licence of `{base}` applies."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{s.method}]
---
# {name}

`{base}`, trained for {step} steps with the method `{s.method}` of an implementation of
[arXiv 2509.06948](https://arxiv.org/abs/2509.06948): {METHODS[s.method].text}.{licence}

All prompts of the training had the form of this one, for {facts["question"]!r}:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(".")
prompt = {facts["prompt"]!r}
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens={s.max_new_tokens})[0]))
```

Such folders were tried with transformers {TRIED}.

Greedy accuracy, %, on problems in no training set, answers of at most {s.max_new_tokens} tokens:

{accuracies(s, evals, step)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.export", description="A model folder from a checkpoint of a run."
    )
    parser.add_argument("run", type=expand, metavar="RUN", help="a run folder of bridge.py")
    parser.add_argument("--step", type=number_or_best, help="of the checkpoint, or best (default: the newest)")
    args = parser.parse_args()
    with one_line_errors("infra.export"):
        print(save_checkpoint(Path(args.run), args.step))


def number_or_best(text: str) -> int | str:
    """A value of --step."""
    return text if text == "best" else int(text)


if __name__ == "__main__":
    start_program()
    main()
