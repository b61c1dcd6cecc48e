"""How much arithmetic a token costs: the numerator of model FLOPs utilisation (MFU)."""

from trueup.base.configuration_gpt import GPTConfig


def flops_per_token(config: GPTConfig, seq_len: int) -> int:
    """Training FLOPs per token, forward and backward, of rows of `seq_len` tokens.

    6 N + 12 L H D T, as in PaLM (https://arxiv.org/abs/2204.02311, appendix B) and nanoGPT: a multiply-add is
    two FLOPs and the backward pass costs twice the forward; N counts the weights that multiply (the output
    matrix, but not the embedding look-up); every token is taken to attend to all T, although the causal mask
    halves that.
    """
    heads_width = config.num_attention_heads * config.head_dim
    key_value_width = 2 * config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (heads_width + key_value_width) + heads_width * config.hidden_size
    mlp = (3 if config.mlp == "swiglu" else 2) * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * (attention + mlp) + config.vocab_size * config.hidden_size
    return 6 * weights + 12 * config.num_hidden_layers * heads_width * seq_len
