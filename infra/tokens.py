"""What a step leaves for infra/report.py: completions and demonstrations as pieces of text, with numbers per token."""

import math
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from grpo import RLPass
from ops.packed import Row

DEMONSTRATIONS = 8  # that are kept of a step unless all are
DIGITS = dict(logp=4, logp_hat=4, entropy=3, ratio_hat=5, slope=4, gain=4, nll=3)  # significant ones; 1 is no ratio


def kept_rows(advantage: Tensor, group_size: int, keep: str) -> range:
    """All rows, or with keep "first" those of the first group with an advantage.  advantage [N], in group order"""
    if keep == "all":
        return range(len(advantage))
    has_advantage = (advantage.view(-1, group_size) != 0).any(1)  # [P]
    first = int(has_advantage.int().argmax())
    return range(first * group_size, (first + 1) * group_size)


def numbers_of_tokens(sampler_logp: Tensor, policy: RLPass | None, shadow: RLPass | None) -> dict[str, Tensor]:
    """What report.html shows of every response token, [T] each; nan where no pass ran the token's row.

    gain is the token's part in the gradient of the cooperative gain: the policy's slope minus the shadow's.
    """
    numbers = {}
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
    of: str, rows: list[Row], samples: list[dict], group_size: int, advantage: Tensor, weight: Tensor,
    numbers: dict[str, Tensor], kept: range, tokenizer: object,
) -> list[dict]:  # fmt: skip
    """The kept rows, whole groups of completions, as plain JSON.

    of: "policy" or "shadow", which sampled them; samples: their N records in samples.jsonl; advantage, weight and
    numbers: [T] of the response tokens of all N rows. A weight is logged as a multiple of an average token's, 1/T.
    """
    offsets = [0, *accumulate(len(response) for _, response in rows)]
    tokens = slice(offsets[kept.start], offsets[kept.stop])
    numbers_of_rows = split(rows[kept.start : kept.stop], {name: x[tokens] for name, x in numbers.items()})
    groups = []
    for i, row_numbers in zip(kept, numbers_of_rows, strict=True):
        prompt, response = rows[i]
        sample = samples[i]
        if i % group_size == 0:
            question = {"question": sample["question"], "answer": sample["answer"]}
            groups.append({"of": of} | question | {"prompt": tokenizer.decode(prompt), "rows": []})
        row = {
            "reward": sample["reward"],
            "A": round(advantage[offsets[i]].item(), 4),
            "finish": sample["finish_reason"],
            "weight": round(weight[offsets[i]].item() * len(weight), 4),
            "pieces": pieces(tokenizer, tuple(response)),
        }
        groups[-1]["rows"].append(row | row_numbers)
    return groups


def demonstration_records(demonstrations: list[Row], nll: Tensor, keep: str, tokenizer: object) -> list[dict]:
    """Demonstrations with nll [T], −log π of their tokens, as plain JSON: all, or the first DEMONSTRATIONS."""
    shown = demonstrations if keep == "all" else demonstrations[:DEMONSTRATIONS]
    records = []
    for (prompt, response), numbers in zip(shown, split(shown, {"nll": nll}), strict=True):
        text = {"prompt": tokenizer.decode(prompt), "pieces": pieces(tokenizer, tuple(response))}
        records.append(text | numbers)
    return records


def split(rows: list[Row], columns: dict[str, Tensor]) -> list[dict[str, list | float]]:
    """The numbers of each row's response tokens, rounded to DIGITS; None (JSON's null) if they are not finite.

    If all of a row are equal, there is one number instead of a list.
    """
    if not columns or not rows:
        return [{} for _ in rows]
    lengths = [len(response) for _, response in rows]
    x = torch.stack([column[: sum(lengths)].double() for column in columns.values()]).cpu()  # [columns, t]

    # Rounds to significant digits: scales so that they stand before the point, rounds, scales back.
    digits = torch.tensor([DIGITS[name] for name in columns])[:, None]
    magnitude = x.abs().clamp(min=1e-12).log10().floor()
    scale = 10 ** (digits - 1 - magnitude)
    x = (x * scale).round() / scale

    result = []
    all_finite = bool(x.isfinite().all())
    for of_row in x.split(lengths, dim=1):
        lists = of_row.tolist()
        if not all_finite:
            lists = [[v if math.isfinite(v) else None for v in numbers] for numbers in lists]
        row = {}
        for name, values in zip(columns, lists, strict=True):
            row[name] = values[0] if len(set(values)) == 1 else values
        result.append(row)
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
    parts = [_piece(tokenizer, i) for i in ids]
    if "".join(parts) == tokenizer.decode(ids):
        return parts
    parts = []
    start = 0  # tokens from here are decoded together
    done = 0  # tokens before this one have their text
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[start:end])
        if now.endswith("\ufffd") and end < len(ids) and end - done < 4:  # a character has at most four bytes
            parts.append("")
        else:
            parts.append(now[len(tokenizer.decode(ids[start:done])) :])
            start = done
            done = end
    return parts
