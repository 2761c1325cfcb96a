"""What a run exports: the policy θ + s·B·A, merged in fp32, as a transformers folder with a card, and w for PEFT.

python -m infra.export RUN [--step N] writes RUN/model-step-N from a checkpoint, without training and without data.
"""

import argparse
import copy
import re
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig

import lora
from grading.scores import table
from infra import checkpoint
from infra.files import DataError, atomic_folder, printable, read_log, read_object
from infra.model import MODELS, is_builtin, load, repository_of, stop_tokens
from infra.run import one_line_errors, print0, settings_of
from settings import METHODS, Settings, expand, start_program

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # no path


def save_run(out: Path, s: Settings, merged: nn.Module, tokenizer, facts: dict, w: lora.Adapter) -> None:
    """Writes model/, the merged policy, and adapter/, and prints the accuracies. facts: see tasks/loading.py."""
    evals = read_log(out / "evals.jsonl")
    readme = card(s, out, facts["question"], facts["prompt"], evals, facts["notes"])
    save_model(out / "model", merged, tokenizer, facts["stop"], readme)
    if w:  # its base is the trained θ of a checkpoint, not model/, which contains w already
        with atomic_folder(out / "adapter") as scratch:
            lora.save(scratch, w, s.lora_rank, s.lora_alpha, s.lora_targets.split(","))
        if lora.delta_norm(w, 1.0) == 0:
            print0(f"WARNING: w is zero (beta is {s.beta:g}): {out / 'adapter'} changes nothing")
    print0(f"\ngreedy accuracy, %\n{accuracies(s, evals, s.total_steps)}")


def save_checkpoint(run: Path, step: int | None) -> Path:
    """Writes the policy of a run's checkpoint, by default the newest, to RUN/model-step-N; returns that folder.

    Raises DataError, ModelError and OSError.
    """
    saved = checkpoint.of_step(run / "checkpoint", step)
    s, step = settings_of(saved.facts, f"{saved.folder}/facts.json"), saved.facts["step"]
    facts = dict(stop=[], question="", prompt="", notes=[]) | saved.facts.get("export", {})
    evals = read_log(run / "evals.jsonl")
    readme = card(s, run, facts["question"], facts["prompt"], evals, facts["notes"], step)
    model, tokenizer = merged_policy(run, saved, s)
    folder = run / f"model-step-{step}"
    save_model(folder, model, tokenizer, facts["stop"] or stop_tokens(model, tokenizer), readme)
    return folder


def merged_policy(run: Path, saved: checkpoint.Saved, s: Settings, base: str = "theta"):
    """(model, tokenizer) of a checkpoint: θ + s·B·A, or θ̂ + s·B·A for the base "theta_hat", on the CPU in `s.dtype`.

    The weights come from the checkpoint, however many ranks wrote it. Architecture and tokenizer come from RUN/model,
    else from the model that the run began with. Raises DataError, ModelError and OSError.
    """
    first = MODELS / s.model if is_builtin(s.model) else s.model
    model, tokenizer = load(str(run / "model" if (run / "model").is_dir() else first), torch.device("cpu"))
    merged = copy.deepcopy(model).to(getattr(torch, s.dtype))
    w = lora.create(model, s.lora_targets.split(","), s.lora_rank, s.seed) if METHODS[s.method].adapter else {}
    lora.attach(model, w, s.lora_alpha / s.lora_rank)
    sets = {base: lora.base_parameters(model), "w": w}
    tensors = {f"{name}.{i}": p.data for name, of_set in sets.items() for i, p in enumerate(of_set.values())}
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
    bos, pad = model.generation_config.bos_token_id, tokenizer.pad_token_id
    pad = pad if pad is not None and pad < model.config.vocab_size else None  # without an embedding it is of no use
    model.config.tie_word_embeddings = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=stop, pad_token_id=pad)
    with atomic_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(printable(readme), encoding="utf-8")


def accuracies(s: Settings, evals: list[dict], step: int | None = None) -> str:
    """A Markdown table of evals.jsonl before training and at `step`, by default the last one that was evaluated."""
    at_step = [e for e in evals if step is None or e["step"] == step]
    if not at_step:
        return f"none: step {step} was not evaluated"
    last = at_step[-1]
    columns = {"before": evals[0]["policy"]} if evals[0]["step"] == 0 else {}
    columns |= {f"{s.method}, step {last['step']}": last["policy"]}
    if "shadow" in last:
        columns["its shadow (θ̂, w)"] = last["shadow"]
    return table({title: column for title, column in columns.items() if column.keys() == last["policy"].keys()})


def card(
    s: Settings, run: Path, question: str, prompt: str, evals: list[dict], notes: list[str], step: int | None = None
) -> str:
    """README.md: method, step, an evaluation question with its prompt, accuracies of that step, notes, settings."""
    config, step = read_object(run / "config.json"), s.total_steps if step is None else step
    if not (isinstance(config.get("command"), list) and isinstance(config.get("versions"), dict)):
        raise DataError(f"{run}/config.json: lacks the command and the versions of a run")
    changed = [f"{name}={value}" for name, value in asdict(s).items() if value != getattr(Settings, name)]
    versions = ", ".join(f"{package} {version}" for package, version in config["versions"].items())
    published, _ = repository_of(s.model)
    local = is_builtin(s.model) or Path(s.model).exists()
    on_hub = not local and HUB_NAME.fullmatch(published)
    base = f"base_model: {published}\n" if on_hub else ""
    return f"""---
{base}library_name: transformers
pipeline_tag: text-generation
tags: [{s.method}]
---
# {run.resolve().name}

Trained from `{s.model}` for {step} steps with `{s.method}` of [arXiv 2509.06948](https://arxiv.org/abs/2509.06948):
{METHODS[s.method].text}.

Training sampled at temperature {s.temperature:g} and had prompts of this form only, here for {question!r}:

    {prompt!r}

Greedy accuracy, %, on problems in no training set, answers of at most {s.max_new_tokens} tokens:

{accuracies(s, evals, step)}

Notes on the data: {"; ".join(notes) or "none"}.
Settings other than the defaults: {", ".join(changed) or "none"}.
Command: `{" ".join(map(str, config["command"]))}`; {versions}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.export", description="A model folder from a checkpoint of a run."
    )
    parser.add_argument("run", type=expand, metavar="RUN", help="a run folder of bridge.py")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    args = parser.parse_args()
    with one_line_errors("infra.export"):
        print(save_checkpoint(Path(args.run), args.step))


if __name__ == "__main__":
    start_program()
    main()
