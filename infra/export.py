"""What a run exports: the policy θ + s·B·A, merged in fp32, as a transformers folder with a card, and w for PEFT."""

import json
from dataclasses import asdict
from pathlib import Path

from torch import nn
from transformers import GenerationConfig

import lora
from grading.scores import table
from infra.files import atomic_folder, read_log
from infra.model import repository_of
from settings import METHODS, Settings


def save_run(out: Path, s: Settings, env, w: lora.Adapter) -> None:
    """Writes model/ and adapter/ and prints the accuracies; the sampler of `env`, an Environment, has the policy."""
    evals, question = read_log(out / "evals.jsonl"), env.task.evaluation[0].question
    readme = card(s, out, question, env.tokenizer.decode(env.encode(question)), evals, env.task.notes)
    save_model(out / "model", env.sampler.model, env.tokenizer, env.sampler.stop, readme)
    if w:  # its base is the trained θ of a checkpoint, not model/, which contains w already
        with atomic_folder(out / "adapter") as scratch:
            lora.save(scratch, w, s.lora_rank, s.lora_alpha, s.lora_targets.split(","))
        if lora.delta_norm(w, 1.0) == 0:
            print(f"WARNING: w is zero (beta is {s.beta:g}): {out / 'adapter'} changes nothing")
    print(f"\ngreedy accuracy, %\n{accuracies(s, evals)}")


def save_model(folder: Path, model: nn.Module, tokenizer, stop: list[int], readme: str) -> None:
    """A folder for from_pretrained. Raises FloatingPointError, before it is changed, if a weight is not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name} holds a value that is not finite: {folder} is not written")
    bos, pad = model.generation_config.bos_token_id, tokenizer.pad_token_id
    pad = pad if pad is not None and pad < model.config.vocab_size else None  # without an embedding it is of no use
    model.config.tie_word_embeddings = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=stop, pad_token_id=pad)
    with atomic_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(readme, encoding="utf-8")


def accuracies(s: Settings, evals: list[dict]) -> str:
    """A Markdown table of the first and the last line of evals.jsonl."""
    first, last = evals[0], evals[-1]
    columns = {"before": first["policy"], f"{s.method}, step {last['step']}": last["policy"]}
    if "shadow" in last:
        columns["its shadow (θ̂, w)"] = last["shadow"]
    return table(columns)


def card(s: Settings, out: Path, question: str, prompt: str, evals: list[dict], notes: list[str]) -> str:
    """model/README.md: method, an evaluation question with its prompt text, accuracies, data and notes, settings."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    changed = [f"{name}={value}" for name, value in asdict(s).items() if value != getattr(Settings, name)]
    versions = ", ".join(f"{package} {version}" for package, version in config["versions"].items())
    on_hub = not s.model.startswith("arithmetic-") and not Path(s.model).exists()
    base = f"base_model: {repository_of(s.model)[0]}\n" if on_hub else ""
    return f"""---
{base}library_name: transformers
pipeline_tag: text-generation
tags: [{s.method}]
---
# {out.resolve().name}

Trained from `{s.model}` with `{s.method}` of [arXiv 2509.06948](https://arxiv.org/abs/2509.06948):
{METHODS[s.method].text}.

Training sampled at temperature {s.temperature:g} and had prompts of this form only, here for {question!r}:

    {prompt!r}

Greedy accuracy, %, on problems in no training set, answers of at most {s.max_new_tokens} tokens:

{accuracies(s, evals)}

Notes on the data: {"; ".join(notes) or "none"}.
Settings other than the defaults: {", ".join(changed) or "none"}.
Command: `{" ".join(config["command"])}`; {versions}.
"""
