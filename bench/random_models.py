"""Models of real sizes with random weights. The benchmarks measure speed and memory, which do not depend on the values,
and need no download."""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent))
from infra import model as _registers_the_packed_attention  # noqa: F401
from tasks import arithmetic as toy

SHARED = dict(vocab_size=151936, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None, pad_token_id=None)
SIZES = {
    "Qwen2.5-3B": dict(model_type="qwen2", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
                       num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2.5-1.5B": dict(model_type="qwen2", hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                         num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen2.5-0.5B": dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen3-8B": dict(model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                     num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False),
    "tiny": dict(model_type="qwen3", hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, vocab_size=512),
}  # fmt: skip


def build(size: str, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """A model of that size, initialised on the device, with packed attention as model.load gives it."""
    config = AutoConfig.for_model(**SHARED | SIZES[size])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation("packed")
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and <eos>."""
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=toy.CHAT_TEMPLATE)


def matmul_parameters(model: nn.Module) -> int:
    """P, the weights that a token is multiplied by: all but an embedding that is only looked up in."""
    total, embedding = sum(p.numel() for p in model.parameters()), model.get_input_embeddings().weight
    return total if model.config.tie_word_embeddings else total - embedding.numel()


def head_size(model: nn.Module) -> int:
    c = model.config
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
