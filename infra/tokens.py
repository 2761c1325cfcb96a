"""What a step leaves for infra/report.py: completions and demonstrations as pieces of text, with numbers per token."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from grpo import RLPass
from ops.packed import Row, response_offsets

DEMONSTRATIONS = 8  # that are kept of a step unless all are
DIGITS = 4  # significant ones of every number


def kept_rows(reward: Tensor, keep: str) -> range:
    """All rows, or with keep "first" those of the first group with unequal rewards.  reward [P, G]"""
    if keep == "all":
        return range(reward.numel())
    group_size = reward.shape[1]
    is_unequal = (reward != reward[:, :1]).any(1)  # [P]
    first = int(is_unequal.int().argmax())
    return range(first * group_size, (first + 1) * group_size)


def numbers_of_tokens(
    advantage: Tensor, weight: Tensor, sampler_logp: Tensor, policy: RLPass | None, shadow: RLPass | None
) -> dict[str, Tensor]:
    """What report.html shows of every response token, [T] each; nan where no pass ran the token's row.

    The weight is a multiple of an average token's, 1/T. gain is the token's part in the gradient of the cooperative
    gain: the policy's slope minus the shadow's.
    """
    numbers = {"A": advantage, "weight": weight * len(weight)}
    slope = torch.zeros_like(sampler_logp)
    if policy is not None:
        was_run = policy.ratio > 0
        slope = policy.slope
        numbers["logp"] = policy.logp.where(was_run, sampler_logp)
        numbers["entropy"] = policy.entropy.where(was_run, math.nan)
        numbers["slope"] = slope
    if shadow is not None:
        was_run = shadow.ratio > 0
        numbers["logp_hat"] = shadow.logp.where(was_run, math.nan)
        numbers["ratio_hat"] = shadow.ratio.where(was_run, math.nan)
        numbers["gain"] = slope - shadow.slope
    return numbers


def group_records(
    of: str, rows: list[Row], samples: list[dict], group_size: int, numbers: dict[str, Tensor], kept: range,
    tokenizer: object,
) -> list[dict]:  # fmt: skip
    """The kept rows, whole groups of completions, as plain JSON.

    of: "policy" or "shadow", which sampled them; samples: their N records in samples.jsonl; numbers: [T] of the
    response tokens of all N rows.
    """
    offsets = response_offsets(rows)
    tokens = slice(offsets[kept.start], offsets[kept.stop])
    numbers_of_kept = {name: column[tokens] for name, column in numbers.items()}
    numbers_of_rows = split(rows[kept.start : kept.stop], numbers_of_kept)
    groups = []
    for i, row_numbers in zip(kept, numbers_of_rows, strict=True):
        prompt, response = rows[i]
        sample = samples[i]
        if i % group_size == 0:
            group = {"of": of, "question": sample["question"], "answer": sample["answer"]}
            groups.append(group | {"prompt": tokenizer.decode(prompt), "rows": []})
        row = {
            "reward": sample["reward"],
            "right": sample["right"],
            "finish": sample["finish_reason"],
            "pieces": pieces(tokenizer, response),
        }
        groups[-1]["rows"].append(row | row_numbers)
    return groups


def demonstration_records(demonstrations: list[Row], nll: Tensor, keep: str, tokenizer: object) -> list[dict]:
    """Demonstrations with nll [T], −log π of their tokens, as plain JSON: all, or the first DEMONSTRATIONS."""
    shown = demonstrations if keep == "all" else demonstrations[:DEMONSTRATIONS]
    records = []
    for (prompt, response), numbers in zip(shown, split(shown, {"nll": nll}), strict=True):
        text = {"prompt": tokenizer.decode(prompt), "pieces": pieces(tokenizer, response)}
        records.append(text | numbers)
    return records


def split(rows: list[Row], columns: dict[str, Tensor]) -> list[dict[str, list | float]]:
    """The numbers of each row's response tokens, rounded to DIGITS; None (JSON's null) if they are not finite.

    If all of a row are equal, there is one number instead of a list.
    """
    lengths = [len(response) for _, response in rows]
    result = [{} for _ in rows]
    for name, column in columns.items():
        # Rounds to significant digits: scales so that they stand before the point, rounds, scales back.
        x = column[: sum(lengths)].double().cpu()
        magnitude = x.abs().clamp(min=1e-12).log10().floor()
        scale = 10 ** (DIGITS - 1 - magnitude)
        x = (x * scale).round() / scale

        for of_row, part in zip(result, x.split(lengths), strict=True):
            values = [value if math.isfinite(value) else None for value in part.tolist()]
            of_row[name] = values[0] if len(set(values)) == 1 else values
    return result


@lru_cache(1 << 16)
def piece(tokenizer: object, token: int) -> str:
    """The text of a token alone."""
    return tokenizer.decode([token])


def pieces(tokenizer: object, ids: list[int]) -> list[str]:
    """The text of each token; joined they are the text of all.

    A token that ends inside a character has no text; the token that completes the character has all of it.
    """
    parts = [piece(tokenizer, token) for token in ids]
    if "".join(parts) == tokenizer.decode(ids):
        return parts

    parts = []
    start = 0  # tokens from here are decoded together
    done = 0  # tokens before this one have their text
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[start:end])
        is_open = now.endswith("\ufffd") and end < len(ids)
        if is_open and end - done < 4:  # a character has at most four bytes
            parts.append("")
            continue
        before = tokenizer.decode(ids[start:done])
        parts.append(now[len(before) :])
        start = done
        done = end
    return parts
