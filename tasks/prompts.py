"""A question as token ids: by the model's chat template, or by one that --template names."""

import re
import string
from collections import Counter
from datetime import datetime
from functools import lru_cache

from transformers.utils.chat_template_utils import _compile_jinja_template

from infra.model import reading
from ops.packed import ModelError

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
TEMPLATES = {  # SimpleRL's, which the paper uses; the question is inserted and no instruction is added
    "qwen-boxed": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{question}"
    f"{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n",
    "plain": "Question:\n{question}\nAnswer:\nLet's think step by step.\n",  # the demonstrations must contain a box
}
# A question that asks for a box itself: \boxed alone, an empty box, or a box of "answer"
ASKS_FOR_BOX = re.compile(r"\\boxed(?!\s*\{)|\\boxed\s*\{([\s.…]*\}|[^}]*(answer|答案))", re.IGNORECASE)
ADVICE = f"choose one with --template, {' or '.join(TEMPLATES)}"
PROBE = "PROBE"  # text of a message that no template contains
TODAY = datetime(2024, 7, 26)  # in every template that prints a date: Llama-3.2's own where there is no clock
CUT = "\ufdd0"  # no character of any text, by Unicode
THOUGHT = re.compile("think|thought|reason|answer|solution", re.IGNORECASE)  # in a tag that a response may contain


def prompt_text(tokenizer, question: str, instruction: str, template: str = "") -> str:
    """The prompt by a template in TEMPLATES or, if `template` is empty, by the chat template with the instruction.

    INSTRUCTION is left out behind a question that asks for a box itself.
    """
    repeated = INSTRUCTION if ASKS_FOR_BOX.search(question) else ""
    if template:
        if template not in TEMPLATES:
            raise ModelError(f"template: there is no {template!r}; choose from {', '.join(TEMPLATES)}")
        return TEMPLATES[template].replace(repeated, "").replace("{question}", question)
    text = _chat(tokenizer, question + instruction.replace(repeated, ""), prompted=True)
    if question.strip() not in text:
        raise ModelError(f"the model's chat template drops or changes the question {question[:40]!r}: {ADVICE}")
    return text


def encode_prompt(tokenizer, question: str, instruction: str, template: str = "") -> list[int]:
    """The token ids of `prompt_text`, for SFT, RL and evaluation alike. Raises ModelError for an unusable template.

    A chat template contains the BOS; in front of TEMPLATES the tokenizer puts it.
    """
    text = prompt_text(tokenizer, _cut(tokenizer, question, template), instruction, template)
    ids = _encode(tokenizer, text)
    if template and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
        return [tokenizer.bos_token_id, *ids]
    return ids


def unknown_characters(tokenizer, text: str) -> set[str]:
    """The characters that are lost when the text becomes tokens: the built-in models know their task's only."""
    kept = tokenizer.decode(_encode(tokenizer, text), skip_special_tokens=True)
    return set((Counter(text) - Counter(kept)).elements()) - {*string.whitespace}


def encode_response(tokenizer, response: str, prompt: str, template: str, end: int) -> list[int]:
    """The token ids of a response, with exactly one `end` as the last.

    A tag that opens a thought is dropped if the prompt's text ends in the same one.
    """
    end_tokens = tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id, end])
    any_end = "|".join(re.escape(token) for token in end_tokens)
    response = re.sub(rf"(({any_end})\s*)+\Z", "", response)
    # The last tag of the prompt and the space behind it, such as "<think>\n".
    opened = re.search(r"([<\[][^<>\[\]\s]+[>\]])(\s*)$", prompt)
    if opened:
        tag, space = opened.groups()
        if THOUGHT.search(tag) and response.lstrip().startswith(tag):
            response = response.lstrip().removeprefix(tag).removeprefix(space)
    return [*_encode(tokenizer, _cut(tokenizer, response, template)), end]


def end_of_turn(tokenizer, template: str = "") -> int | None:
    """The first added token behind an assistant's message, such as <|im_end|> for Qwen; None if only EOS ends it."""
    if template:
        return tokenizer.get_vocab().get("<|im_end|>") if template == "qwen-boxed" else None
    _, probe, after = _chat(tokenizer, "?", PROBE).rpartition(PROBE)
    if not probe:
        raise ModelError(f"the model's chat template drops the assistant's message: {ADVICE}")
    ends = {tokenizer.eos_token_id}
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.content.strip():
            ends.add(i)
    return next((i for i in _encode(tokenizer, after) if i in ends), None)


def _cut(tokenizer, text: str, template: str) -> str:
    """A data row's text with a CUT in each control token. `_encode` makes ordinary tokens of the parts."""
    if template:
        written = prompt_text(tokenizer, "", "", template)
    else:
        answered = _chat(tokenizer, "?", PROBE)
        prompted = _chat(tokenizer, "?", prompted=True)
        written = answered + prompted
    return _control_tokens(tokenizer, written).sub(f"\\g<0>{CUT}", text)


@lru_cache(maxsize=8)
def _control_tokens(tokenizer, written: str) -> re.Pattern:
    """Matches the first letter of a control token: a special token, or an added tag that the template has `written`.

    Tags of thoughts are none, since responses consist of them. A token of one letter cannot be cut.
    """
    written_ids = {*_encode(tokenizer, written), tokenizer.eos_token_id}
    control = []
    for i, token in tokenizer.added_tokens_decoder.items():
        is_tag = i in written_ids and token.content.startswith(("<", "["))
        if (token.special or is_tag) and len(token.content) > 1 and not THOUGHT.search(token.content):
            control.append(re.escape(token.content))
    any_control = "|".join(control) or "(?!)"  # (?!) never matches
    return re.compile(f"(?={any_control}).", re.DOTALL)


def _encode(tokenizer, text: str) -> list[int]:
    """The token ids of a text, piece by piece between CUTs."""
    first, *pieces = text.split(CUT)
    ids = tokenizer.encode(first, add_special_tokens=False)
    if not pieces:
        return ids
    # Some tokenizers put a space before a text. Behind a newline they put none.
    newline = tokenizer.encode("\n", add_special_tokens=False)
    for piece in pieces:
        after_newline = tokenizer.encode("\n" + piece, add_special_tokens=False)
        if after_newline[: len(newline)] == newline:
            ids += after_newline[len(newline) :]
        else:
            ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids


def _chat(tokenizer, question: str, answer: str = "", prompted: bool = False) -> str:
    """The chat template's text of a question, with its answer or the generation prompt. Raises ModelError."""
    if not tokenizer.chat_template:
        raise ModelError(f"the model has no chat template: {ADVICE}")
    with reading(f"model {tokenizer.name_or_path!r}: its chat template fails", ADVICE):
        return _render(tokenizer, tokenizer.get_chat_template(), question, answer, prompted)


@lru_cache(maxsize=64)
def _render(tokenizer, chat_template: str, question: str, answer: str, prompted: bool) -> str:
    messages = [{"role": "user", "content": question}]
    if answer:
        messages.append({"role": "assistant", "content": answer})
    # transformers compiles a template once and keeps it: later renderings have this date, too.
    _compile_jinja_template(chat_template).globals["strftime_now"] = TODAY.strftime
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
