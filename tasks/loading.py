"""What a run or an evaluation starts from: a model with its tokenizer and stop tokens, and a task as token ids."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from infra import parallel
from infra.model import load, model_fingerprint, stop_tokens
from ops.packed import Row
from settings import METHODS, SettingError, Settings
from tasks.functions import code_fingerprint, load_reward
from tasks.named import load_task
from tasks.prompts import encode_prompt, end_of_turn
from tasks.task import Problem, Sources, Task, fingerprint, pair, prepare, sources_of


def load_model(name: str, template: str, device: torch.device | None = None) -> tuple[nn.Module, object, list[int]]:
    """(model, tokenizer, ids that end a completion) of a built-in model, a folder or a hub name. Raises ModelError."""
    model, tokenizer = load(name, device)
    stop = stop_tokens(model, tokenizer, end_of_turn(tokenizer, template))
    return model, tokenizer, stop


@dataclass
class Loaded:
    """What training starts from."""

    task: Task
    model: nn.Module
    tokenizer: object
    stop: list[int]  # ids that end a completion
    reward: Callable[[str, Problem], float]
    demonstrations: list[Row]  # D_SFT as token ids
    sources: Sources  # of D_SFT
    demonstrations_of: dict[str, list[Row]]  # by question, for methods that pair prompts with them
    fingerprints: dict[str, str]  # of the data, of the initial weights and the tokenizer, and of the user's code


def load_training(s: Settings) -> Loaded:
    """Loads task, model and reward of a run. Raises DataError, ModelError or SettingError."""
    world = parallel.world_size()
    if s.prompts_per_step < world:
        raise SettingError(
            f"prompts_per_step is {s.prompts_per_step}, but each of {world} ranks samples for at least one prompt: "
            "raise it, or start fewer ranks"
        )
    reward = load_reward(s.reward)
    if reward and METHODS[s.method].asks_right and reward.right_from is None:
        function = s.reward.rpartition(":")[2]
        raise SettingError(
            f"method {s.method} asks which responses are right: state in the file of reward {s.reward} from which "
            f"reward on they are, such as {function}.right_from = 1"
        )
    # Rank 0 downloads files, then the other ranks read them from the disk.
    with parallel.rank0_first():
        task = load_task(s)
        # A model that will be sharded stays on the CPU: its slices go to their devices one by one.
        device = torch.device("cpu") if s.shard and world > 1 else None
        model, tokenizer, stop = load_model(s.model, task.template, device)
    positions = model.config.max_position_embeddings
    method = METHODS[s.method]
    demonstrations = prepare(task, tokenizer, s.max_new_tokens, positions, method.sft, method.rl)
    demonstrations_of = pair(task, demonstrations, s.method) if method.paired else {}
    fingerprints = dict(
        data=fingerprint(task, with_extra=bool(s.reward)),
        model=model_fingerprint(model, tokenizer),
        reward=code_fingerprint(s.reward),
        task=code_fingerprint(s.task),
    )
    sources = sources_of(task)
    reward = reward or task.reward
    return Loaded(task, model, tokenizer, stop, reward, demonstrations, sources, demonstrations_of, fingerprints)


def describe_data(task: Task, tokenizer, stop: list[int], demonstrations: list[Row]) -> dict[str, str]:
    """Titled lines: counts with the notes of the task, the first prompt and demonstration, the stop tokens."""
    decode = tokenizer.decode
    counts = f"{len(task.problems)} prompts, {len(demonstrations)} demonstrations, "
    counts += f"{len(task.evaluation)} evaluation problems"
    named = {d.source for d in task.demonstrations} - {""}
    if named:
        counts += f"; {len(named)} named sources of demonstrations"
    shown = (task.problems or task.demonstrations)[0]
    first = encode_prompt(tokenizer, shown.question, task.instruction, task.template)
    lines = {"data": "\n          ".join([counts, *task.notes]), "prompt": f"the first prompt: {decode(first)!r}"}
    if demonstrations:
        prompt, response = demonstrations[0]
        text = f"{decode(prompt)!r}⟦{decode(response)!r}⟧"
        lines["SFT"] = f"the first demonstration, trained tokens in ⟦ ⟧: {text}"
    lines["stop"] = "at " + ", ".join(repr(decode([i])) for i in stop)
    return lines


def card_facts(task: Task, tokenizer, stop: list[int]) -> dict:
    """What an export needs beside the weights: the stop tokens, and for the card a question and its prompt."""
    question = task.evaluation[0].question
    prompt = tokenizer.decode(encode_prompt(tokenizer, question, task.instruction, task.template))
    return dict(stop=stop, question=question, prompt=prompt)
