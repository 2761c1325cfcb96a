"""What the built-in tasks with a base model of their own share: its tokenizer and its recipe."""

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

from tasks.task import BOX

EOS = "<eos>"
UNK = "<unk>"


@dataclass(frozen=True)
class Recipe:
    """Size and training of a base model; tasks/builtin.py trains it."""

    hidden: int = 96
    layers: int = 3
    mlp: int = 288
    steps: int = 1200
    batch: int = 96
    lr: float = 3e-3
    seed: int = 0
    kind: str = "qwen2"  # transformers reads a tokenizer of whole words only beside models of other kinds


def word_level(words: list[str], pattern: str, chat_template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of EOS, UNK, BOX and `words`; the regular expression `pattern` matches a word."""
    vocabulary = {token: i for i, token in enumerate([EOS, UNK, BOX, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    inner.decoder = Fuse()
    inner.add_tokens([AddedToken(BOX, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, unk_token=UNK, chat_template=chat_template)
