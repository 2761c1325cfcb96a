"""What a step leaves for infra/report.py: completions and demonstrations as pieces of text, with numbers per token."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ops.packed import Row

DEMONSTRATIONS = 8  # that are kept of a step unless all are
DIGITS = dict(logp=4, logp_hat=4, entropy=3, ratio_hat=5, slope=4, gain=4, nll=3)  # significant ones; 1 is no ratio


def record_of_step(seen: dict, keep: str, tokenizer: object) -> dict:
    """The prompts, completions and demonstrations of a step with numbers per token, as plain JSON.

    seen: "policy" and "shadow": (Rollouts, what bridge.py:rl_pass returns); "sft": (demonstrations, −log π of their
    tokens [T]). keep: "first" keeps the first group with an advantage (or the first of all) and DEMONSTRATIONS, "all"
    everything. On shared rollouts a row has the shadow's numbers beside the policy's. slope is ∂J_RL/∂log π of a token
    by its weight, gain the policy's slope minus the shadow's. A number is null where its pass did not run the row.
    """
    record: dict = {"groups": [], "demonstrations": []}
    policy, shadow = seen.get("policy"), seen.get("shadow")
    if policy:
        P, G = policy[0].reward.shape
        advantage = policy[0].advantage[policy[0].offsets[:-1]].view(P, G)
        first = int((advantage != 0).any(1).int().argmax())
        kept = range(P * G) if keep == "all" else range(first * G, (first + 1) * G)
        shared = shadow is not None and shadow[0] is policy[0]
        record["groups"] = groups_of(policy[0], policy[1], shadow[1] if shared else None, kept, tokenizer)
        if shadow and not shared:
            record["groups"] += groups_of(shadow[0], None, shadow[1], kept, tokenizer)
    if "sft" in seen:
        demonstrations, nll = seen["sft"]
        shown = demonstrations if keep == "all" else demonstrations[:DEMONSTRATIONS]
        for row, numbers in zip(shown, split(shown, {"nll": nll}), strict=True):
            text = {"prompt": tokenizer.decode(row[0]), "pieces": pieces(tokenizer, tuple(row[1]))}
            record["demonstrations"].append(text | numbers)
    return record


def groups_of(rollouts, tokens: dict | None, tokens_hat: dict | None, kept: range, tokenizer: object) -> list[dict]:
    """The groups of the kept rows, each row with the numbers of `tokens`, of the policy, and of `tokens_hat`, of θ̂."""
    offsets, rows = rollouts.offsets, rollouts.rows[kept.start : kept.stop]
    columns, slope = {}, rollouts.weight.new_zeros(len(rollouts.weight))
    if tokens:
        run = tokens["ratio"] > 0  # of a row that no pass ran all numbers are 0
        columns["logp"] = tokens["logp"].where(run, rollouts.sampler_logp)
        columns["entropy"] = tokens["entropy"].where(run, math.nan)
        columns["slope"] = slope = tokens["slope"]
    if tokens_hat:
        run = tokens_hat["ratio"] > 0
        columns["logp_hat"], columns["ratio_hat"] = (tokens_hat[n].where(run, math.nan) for n in ("logp", "ratio"))
        columns["gain"] = slope - tokens_hat["slope"]
    t = slice(offsets[kept.start], offsets[kept.stop])
    numbers, groups = split(rows, {name: x[t] for name, x in columns.items()}), []
    for i, (prompt, response), of_row in zip(kept, rows, numbers, strict=True):
        record = rollouts.records[i]
        if i % rollouts.reward.shape[1] == 0:
            facts = {"of": "policy" if tokens else "shadow", "question": record["question"], "answer": record["answer"]}
            groups.append(facts | {"prompt": tokenizer.decode(prompt), "rows": []})
        A, weight = (x[offsets[i]].item() for x in (rollouts.advantage, rollouts.weight))
        row = {"reward": record["reward"], "A": round(A, 4), "finish": record["finish_reason"]}
        row["weight"] = round(weight * len(rollouts.weight), 4)  # 1 is that of an average token
        groups[-1]["rows"].append(row | {"pieces": pieces(tokenizer, tuple(response))} | of_row)
    return groups


def split(rows: list[Row], columns: dict[str, Tensor]) -> list[dict[str, list | float]]:
    """The numbers of each row's response tokens, rounded to DIGITS; None (JSON's null) if they are not finite.

    If all of a row are equal, there is one number instead of a list.
    """
    lengths = [len(response) for _, response in rows]
    if not columns or not rows:
        return [{} for _ in rows]
    x = torch.stack([x[: sum(lengths)].double() for x in columns.values()]).cpu()  # [numbers of a token, t]
    digits = torch.tensor([DIGITS[name] for name in columns])[:, None]
    scale = 10 ** (digits - 1 - x.abs().clamp(min=1e-12).log10().floor())
    x, result = (x * scale).round() / scale, []
    finite = bool(x.isfinite().all())
    for lists in (of_row.tolist() for of_row in x.split(lengths, dim=1)):
        if not finite:
            lists = [[v if math.isfinite(v) else None for v in numbers] for numbers in lists]
        result.append({name: v[0] if len(set(v)) == 1 else v for name, v in zip(columns, lists, strict=True)})
    return result


@lru_cache(1 << 16)
def _piece(tokenizer: object, token: int) -> str:
    return tokenizer.decode([token])


@lru_cache(512)  # equal completions, and demonstrations of earlier steps
def pieces(tokenizer: object, ids: tuple[int, ...]) -> list[str]:
    """The text of each token; joined they are the text of all.

    A token that ends inside a character has no text; the token that completes the character has all of it.
    """
    ids = list(ids)
    text, parts = tokenizer.decode(ids), [_piece(tokenizer, i) for i in ids]
    if "".join(parts) == text:
        return parts
    parts, start, done = [], 0, 0  # tokens from `start` are decoded, those before `done` have their text
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[start:end])
        if now.endswith("\ufffd") and end < len(ids) and end - done < 4:  # a character has at most four bytes
            parts.append("")
        else:
            parts.append(now[len(tokenizer.decode(ids[start:done])) :])
            start, done = done, end
    return parts
