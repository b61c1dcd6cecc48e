"""Sizes by name: a shape, and the batch, learning rate and horizon that follow from it, each with its source.

    FLOPs per token  6 N + 12 L H D T                      base/flops.py
    tokens           20 per parameter                      Hoffmann et al., https://arxiv.org/abs/2203.15556
    compute C        FLOPs per token x tokens
    learning rate    0.3118 C^-0.1250                      DeepSeek, https://arxiv.org/abs/2401.02954, eq. 1
    batch            0.2920 C^0.3271 tokens                the same
    memory           16 bytes per parameter                Rajbhandari et al., https://arxiv.org/abs/1910.02054
                     + 34 bytes x tokens x width x layers  Korthikanti et al., https://arxiv.org/abs/2205.05198

The last line leaves the attention's weights out, which SDPA never stores. Everything can be overridden: what
a recipe says itself is taken as it stands, and what follows from it follows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trueup.base.configuration_gpt import GPTConfig
from trueup.base.flops import flops_per_token

TOKENS_PER_PARAMETER = 20
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, each in fp32
FORWARD_TOKENS = 16384  # in one forward pass: what keeps a GPU busy; more rows are accumulated

SIZES: dict[str, dict[str, Any]] = {
    # The lab: two million parameters, minutes on a CPU.
    "lab": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "vocab_size": 1024,
            "max_length": 128},
    "12M": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 4096,
            "max_length": 512},
    "30M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 8192,
            "max_length": 512},
    # GPT-2 small and medium, in width and depth.
    "124M": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50304,
             "max_length": 1024},
    "350M": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50304,
             "max_length": 1024},
    "1B": {"hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 8,
           "vocab_size": 50304, "max_length": 2048},
    # Llama 7B, to the parameter.
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
           "max_length": 2048, "intermediate_size": 11008, "tie_word_embeddings": False},
}  # fmt: skip


def parameter_count(config: GPTConfig) -> int:
    """Parameters of a GPTForCausalLM, a tied matrix once."""
    width, inner, bias = config.hidden_size, config.intermediate_size, int(config.bias)
    queries = config.num_attention_heads * config.head_dim
    heads = queries + 2 * config.num_key_value_heads * config.head_dim
    norm_bias = bias if config.norm == "layernorm" else 0
    up = 2 * inner if config.mlp == "swiglu" else inner
    block = (width + bias) * heads + (queries + bias) * width + (width + bias) * up + (inner + bias) * width
    block += 2 * width * (1 + norm_bias)
    block += 2 * config.head_dim * (1 + norm_bias) if config.qk_norm else 0
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    embeddings += config.max_position_embeddings * width if config.position == "learned" else 0
    return config.num_hidden_layers * block + width * (1 + norm_bias) + embeddings


@dataclass(frozen=True)
class Derivation:
    """What follows from a shape, for rows of `length` tokens."""

    config: GPTConfig
    length: int

    @property
    def parameters(self) -> int:
        return parameter_count(self.config)

    @property
    def flops_per_token(self) -> int:
        return flops_per_token(self.config, self.length)

    @property
    def tokens(self) -> int:
        """Compute-optimal; for a model that is used much, more are worth it."""
        return TOKENS_PER_PARAMETER * self.parameters

    @property
    def compute(self) -> float:
        """FLOPs of the whole training."""
        return float(self.flops_per_token) * self.tokens

    @property
    def learning_rate(self) -> float:
        """AdamW's peak, to two digits."""
        return float(f"{0.3118 * self.compute**-0.1250:.1e}")

    @property
    def rows(self) -> int:
        """Of one step: the power of two nearest to the best batch."""
        return 2 ** max(0, round(math.log2(0.2920 * self.compute**0.3271 / self.length)))

    @property
    def micro_rows(self) -> int:
        """Of one forward pass."""
        return min(self.rows, 2 ** max(0, int(math.log2(FORWARD_TOKENS / self.length))))

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.rows * self.length))

    def memory(self, rows: int) -> int:
        """Bytes while training in bf16 autocast with AdamW, without activation checkpointing."""
        activations = 34 * rows * self.length * self.config.hidden_size * self.config.num_hidden_layers
        return BYTES_PER_PARAMETER * self.parameters + activations

    def lines(self) -> Iterator[str]:
        """The derivation, to be printed."""
        yield f"parameters  {self.parameters:,}"
        yield f"FLOPs       {self.flops_per_token:,} per token in rows of {self.length:,} (6 N + 12 L H D T)"
        yield f"tokens      {self.tokens:,} = {TOKENS_PER_PARAMETER} per parameter (arXiv 2203.15556)"
        yield f"compute     {self.compute:.3g} FLOPs in all"
        yield f"rate        {self.learning_rate:g} = 0.3118 C^-0.1250 (arXiv 2401.02954)"
        yield (
            f"batch       {self.rows:,} rows = {self.rows * self.length:,} tokens, near "
            f"{0.2920 * self.compute**0.3271:,.0f} = 0.2920 C^0.3271 (arXiv 2401.02954)"
        )
        yield f"steps       {self.steps:,}"
        yield (
            f"memory      {self.memory(self.micro_rows) / 2**30:.1f} GiB in forward passes of "
            f"{self.micro_rows} rows (arXiv 1910.02054, 2205.05198)"
        )


def derive(size: str, given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Recipe key -> (value, why) of all that a size decides and the recipe does not.

    Args:
        given: the recipe's own keys; they win, and what follows from the shape follows from them.

    Raises:
        ValueError: shape and given keys do not fit together.
    """
    own = {key: value for key, value in given.items() if value is not None}
    shape = SIZES[size] | {key: value for key, value in own.items() if key in GPTConfig.__dataclass_fields__}
    length = int(own.get("max_length", SIZES[size]["max_length"]))
    context = own.get("max_position_embeddings", length)
    names = {key: value for key, value in shape.items() if key in GPTConfig.__dataclass_fields__}
    found = Derivation(GPTConfig(**names | {"max_position_embeddings": context}), length)
    derived: dict[str, tuple[Any, str]] = {key: (value, "the shape") for key, value in SIZES[size].items()}
    if "tokenizer_name_or_path" in own:
        del derived["vocab_size"]
    derived["learning_rate"] = (found.learning_rate, "0.3118 C^-0.1250, arXiv 2401.02954")
    micro = int(own.get("per_device_train_batch_size", found.micro_rows))
    batch = (
        f"a step of {found.rows * length:,} tokens, 0.2920 C^0.3271, arXiv 2401.02954; divide by your GPUs"
    )
    derived["per_device_train_batch_size"] = (micro, f"{micro * length:,} tokens in a forward pass")
    accumulated = int(own.get("gradient_accumulation_steps", max(1, found.rows // micro)))
    derived["gradient_accumulation_steps"] = (accumulated, batch)
    if "num_train_epochs" not in own:
        steps = math.ceil(found.tokens / (micro * accumulated * length))
        derived["max_steps"] = (steps, f"{found.tokens:,} tokens, 20 per parameter, arXiv 2203.15556")
    return {key: value for key, value in derived.items() if key not in own}
