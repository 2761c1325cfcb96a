"""A question as token ids: by the model's chat template, or by one that --template names."""

import jinja2

from ops.packed import ModelError

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
TEMPLATES = {  # SimpleRL's, which the paper uses; the question is inserted and no instruction is added
    "qwen-boxed": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{question}"
    f"{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n",
    "plain": "Question:\n{question}\nAnswer:\nLet's think step by step.\n",  # the demonstrations must contain a box
}
ADVICE = f"choose one with --template, {' or '.join(TEMPLATES)}"
PROBE = "PROBE"  # text of a message that no template contains


def prompt_text(tokenizer, question: str, instruction: str, template: str = "") -> str:
    """The prompt by a template in TEMPLATES or, if `template` is empty, by the chat template with the instruction."""
    if template:
        if template not in TEMPLATES:
            raise ModelError(f"template: there is no {template!r}; choose from {', '.join(TEMPLATES)}")
        return TEMPLATES[template].replace("{question}", question)
    text = _chat(tokenizer, [{"role": "user", "content": question + instruction}], add_generation_prompt=True)
    if question.strip() not in text:
        raise ModelError(f"the model's chat template drops or changes the question {question[:40]!r}: {ADVICE}")
    return text


def encode_prompt(tokenizer, question: str, instruction: str, template: str = "") -> list[int]:
    """The token ids of `prompt_text`, for SFT, RL and evaluation alike. Raises ModelError for an unusable template."""
    return encode_text(tokenizer, prompt_text(tokenizer, question, instruction, template), template)


def encode_text(tokenizer, text: str, template: str = "") -> list[int]:
    """The token ids of a prompt. A chat template contains the BOS, for TEMPLATES the tokenizer adds it."""
    ids = tokenizer.encode(text, add_special_tokens=bool(template))
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ModelError(f"the prompt begins with {tokenizer.bos_token!r} twice: remove one from the chat template")
    return ids


def end_of_turn(tokenizer, template: str = "") -> int | None:
    """The first special token behind an assistant's message, such as <|im_end|> for Qwen; None if only EOS ends it."""
    if template:
        return tokenizer.get_vocab().get("<|im_end|>") if template == "qwen-boxed" else None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    _, probe, after = _chat(tokenizer, messages).rpartition(PROBE)
    if not probe:
        raise ModelError(f"the model's chat template drops the assistant's message: {ADVICE}")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    return next((i for i in tokenizer.encode(after, add_special_tokens=False) if i in special), None)


def _chat(tokenizer, messages: list[dict], **options) -> str:
    if not tokenizer.chat_template:
        raise ModelError(f"the model has no chat template: {ADVICE}")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError as error:
        raise ModelError(f"the model's chat template fails ({error}): {ADVICE}") from error
