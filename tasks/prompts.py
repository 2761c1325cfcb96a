"""How a question becomes token ids: the model's chat template, or one asked for by name.

One `encode_prompt` serves SFT, RL and evaluation, so that the three never see different prompts. A demonstration is a
prompt with a response behind it; no message of the assistant is ever rendered, so a template cannot change one.
"""

import jinja2

from infra.model import ModelError

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
TEMPLATES = {  # SimpleRL's, which the paper follows; each is whole: the question is all that is put in
    "qwen-boxed": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{question}"
    + INSTRUCTION
    + "<|im_end|>\n<|im_start|>assistant\n",
    # asks for no box: the demonstrations must show it
    "plain": "Question:\n{question}\nAnswer:\nLet's think step by step.\n",
}
PROBE = "PROBE"  # stands for the text of a message; no template writes it by itself


def prompt_text(tokenizer, question: str, instruction: str, template: str = "") -> str:
    """A question up to where the answer begins.

    `template` names one of TEMPLATES; empty, it is the model's chat template, with `instruction` behind the question.
    Raises ModelError when there is no such template, or when it drops the question.
    """
    if template:
        if template not in TEMPLATES:
            raise ModelError(f"template: there is no {template!r}; choose from {', '.join(TEMPLATES)}")
        return TEMPLATES[template].replace("{question}", question)
    text = _chat(tokenizer, [{"role": "user", "content": question + instruction}], add_generation_prompt=True)
    if question.strip() not in text:
        raise ModelError(
            f"the model's chat template drops or changes the question {question[:40]!r}: choose a --template, "
            f"{' or '.join(TEMPLATES)}"
        )
    return text


def encode_prompt(tokenizer, question: str, instruction: str, template: str = "") -> list[int]:
    """The token ids of `prompt_text`."""
    return encode_text(tokenizer, prompt_text(tokenizer, question, instruction, template), template)


def encode_text(tokenizer, text: str, template: str = "") -> list[int]:
    """The token ids of a prompt. A chat template writes BOS itself, before the others the tokenizer puts it.

    Raises ModelError for a second BOS, which the model has never seen.
    """
    ids = tokenizer.encode(text, add_special_tokens=bool(template))
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise ModelError(
            f"the prompt begins with {tokenizer.bos_token!r} twice: take it out of the chat template or of the question"
        )
    return ids


def end_of_turn(tokenizer, template: str = "") -> int | None:
    """The id that ends an answer in this template, None if nothing does: then an answer ends with EOS alone.

    It is the first special token that the chat template writes behind a message of the assistant: <|im_end|> for Qwen,
    <|eot_id|> for Llama 3. Raises ModelError when the template drops that message.
    """
    if template:
        return tokenizer.get_vocab().get("<|im_end|>") if template == "qwen-boxed" else None
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    _, found, after = _chat(tokenizer, talk).rpartition(PROBE)
    if not found:
        raise ModelError(
            "the model's chat template drops what the assistant says, so how an answer ends is unknown: choose a "
            f"--template, {' or '.join(TEMPLATES)}"
        )
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    return next((i for i in tokenizer.encode(after, add_special_tokens=False) if i in special), None)


def last_token(tokenizer, template: str = "") -> int:
    """The id that a demonstration ends with: the template's end of turn, or else EOS."""
    end = end_of_turn(tokenizer, template)
    return tokenizer.eos_token_id if end is None else end


def _chat(tokenizer, messages: list[dict], **options) -> str:
    if not tokenizer.chat_template:
        raise ModelError(f"the model has no chat template: choose one with --template, {' or '.join(TEMPLATES)}")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError as error:
        raise ModelError(
            f"the model's chat template fails ({error}): choose a --template, {' or '.join(TEMPLATES)}"
        ) from error
