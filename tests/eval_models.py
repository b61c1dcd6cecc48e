"""Tiny models with random weights for the tests of the instruments."""

from functools import cache
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trueup.base import GPTConfig, GPTForCausalLM, GPTForSequenceClassification
from trueup.base.tokenizer import train_tokenizer

# Weights ten times as large as usual: differences between rows, seeds and models then show at once.
WIDE: dict[str, Any] = {"initializer_range": 0.3}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The chat tokenizer, over bytes alone."""
    return train_tokenizer(["a b c"], vocab_size=279)


def ids() -> dict[str, int]:
    """The special token ids that a config wants."""
    return {
        "bos_token_id": tokenizer().bos_token_id,
        "eos_token_id": tokenizer().eos_token_id,
        "pad_token_id": tokenizer().pad_token_id,
    }


def config(family: str, vocab_size: int | None = None, **changes: Any) -> Any:
    """The smallest configuration of a family that still has two layers and, where it can, grouped heads."""
    vocab = vocab_size or len(tokenizer())
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=128, **WIDE, **ids(), **changes
        )
    shared: dict[str, Any] = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **WIDE, **ids(),
    )  # fmt: skip
    return {"gpt": GPTConfig, "llama": LlamaConfig}[family](**shared | changes)


def policy(family: str = "gpt", seed: int = 0, **changes: Any) -> Any:
    """A language model."""
    torch.manual_seed(seed)
    classes = {"gpt": GPTForCausalLM, "llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}
    return classes[family](config(family, **changes)).eval()


def reward_model(family: str = "gpt", seed: int = 0, **changes: Any) -> Any:
    """A sequence classifier of one label."""
    torch.manual_seed(seed)
    classes = {
        "gpt": GPTForSequenceClassification,
        "llama": LlamaForSequenceClassification,
        "gpt2": GPT2ForSequenceClassification,
    }
    return classes[family](config(family, num_labels=1, **changes)).eval()
