"""The GPT as one GGUF file, for llama.cpp and what is built on it: weights, tokenizer and chat template.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The architecture is llama.cpp's llama,
qwen3 or gpt2, whichever computes the model.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from trueup.base.configuration_gpt import GPTConfig
from trueup.base.convert import form_of, plain_weights
from trueup.base.convert_layouts import Layout, Weights, from_layout, to_layout
from trueup.base.modeling_gpt import GPTForCausalLM, GPTRotaryEmbedding
from trueup.base.tokenizer import PRETOKEN
from trueup.recipes.errors import UsageError

OutType = Literal["f32", "f16", "q8_0"]

_FILE_TYPES: dict[str, Any] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
Q8_BLOCK = 32  # weights that share one scale

# Largest |difference| of a logit that rounding to the type explains, as a share of the largest logit.
TOLERANCES: dict[str, float] = {"f32": 1e-5, "f16": 2e-2, "q8_0": 2e-1}

_OURS, _THEIRS = "model.layers.{}", "blk.{}"
_BOTH: dict[str, tuple[str, ...]] = {
    "model.embed_tokens": ("token_embd",),
    f"{_OURS}.input_norm": (f"{_THEIRS}.attn_norm",),
    f"{_OURS}.attention.o_proj": (f"{_THEIRS}.attn_output",),
    f"{_OURS}.post_norm": (f"{_THEIRS}.ffn_norm",),
    f"{_OURS}.mlp.down_proj": (f"{_THEIRS}.ffn_down",),
    "model.norm": ("output_norm",),
    "lm_head": ("output",),
}
_MODERN: dict[str, tuple[str, ...]] = {
    f"{_OURS}.attention.qkv_proj": tuple(f"{_THEIRS}.attn_{part}" for part in "qkv"),
    f"{_OURS}.attention.q_norm": (f"{_THEIRS}.attn_q_norm",),
    f"{_OURS}.attention.k_norm": (f"{_THEIRS}.attn_k_norm",),
    f"{_OURS}.mlp.gate_up_proj": (f"{_THEIRS}.ffn_gate", f"{_THEIRS}.ffn_up"),
}
_CLASSIC: dict[str, tuple[str, ...]] = {
    "model.embed_positions": ("position_embd",),
    f"{_OURS}.attention.qkv_proj": (f"{_THEIRS}.attn_qkv",),
    f"{_OURS}.mlp.up_proj": (f"{_THEIRS}.ffn_up",),
}


def _layout(architecture: str) -> Layout:
    return Layout(_BOTH | (_CLASSIC if architecture == "gpt2" else _MODERN))


# ---------------------------------------------------------------- writing


@torch.no_grad()
def write_gguf(
    model: GPTForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path, outtype: OutType = "f16"
) -> None:
    """Write one file.

    Args:
        outtype: how matrices are stored; vectors and learned positions are f32. q8_0 falls back to f16 where
            a matrix is not a multiple of 32 wide.

    Raises:
        UsageError: llama.cpp cannot compute the model, or does not know its tokenizer.
    """
    architecture = form_of(model.config)
    if architecture is None:
        raise UsageError("--to gguf: llama.cpp has no architecture for this mixture of options")
    weights, config = plain_weights(model, architecture)
    writer = gguf.GGUFWriter(path, architecture)
    _write_shape(writer, config, architecture)
    writer.add_file_type(_FILE_TYPES[outtype])
    _write_tokenizer(writer, tokenizer, config)
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for name, tensor in _tensors(weights, config, architecture).items():
        data = tensor.float().contiguous().numpy()
        kind = _type_of(name, data, outtype)
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: gguf.GGUFWriter, config: GPTConfig, architecture: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    _write_rope(writer, config, architecture)


def _write_rope(writer: gguf.GGUFWriter, config: GPTConfig, architecture: str) -> None:
    """The kinds of scaling that are metadata; llama3's is a tensor (`rope_factors`)."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn" and not {"attention_factor", "mscale", "beta_fast", "beta_slow"} & set(rope):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
    elif kind != "default" and not (kind == "llama3" and architecture == "llama"):
        raise UsageError(
            f"--to gguf: rope_parameters {rope} cannot be written for llama.cpp's {architecture}; linear and "
            "plain yarn can, and llama3 without qk_norm"
        )


def _tensors(weights: Weights, config: GPTConfig, architecture: str) -> Weights:
    theirs = to_layout(weights, _layout(architecture), config)
    if architecture == "gpt2":  # it always has biases
        for name in [name for name in theirs if "embd" not in name and name != "output.weight"]:
            theirs.setdefault(name.replace("weight", "bias"), torch.zeros(theirs[name].shape[0]))
    if architecture == "llama":
        theirs = {name: _interleaved(name, tensor, config) for name, tensor in theirs.items()}
        if config.rope_parameters["rope_type"] == "llama3":
            theirs["rope_freqs.weight"] = rope_factors(config)
    return theirs


def _interleaved(name: str, tensor: torch.Tensor, config: GPTConfig, back: bool = False) -> torch.Tensor:
    """Queries' and keys' rows in llama.cpp's order: it turns channels (2i, 2i + 1), we (i, i + D/2)."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return tensor
    pairs = (config.head_dim // 2, 2) if back else (2, config.head_dim // 2)
    return tensor.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


def rope_factors(config: GPTConfig) -> torch.Tensor:
    """What each rotary frequency (head_dim / 2,) is divided by."""
    plain, _ = GPTRotaryEmbedding.compute_default_rope_parameters(config)
    return plain / GPTRotaryEmbedding(config).inv_freq


def _type_of(name: str, data: np.ndarray, outtype: OutType) -> gguf.GGMLQuantizationType:
    if outtype == "f32" or data.ndim == 1 or name == "position_embd.weight":
        return gguf.GGMLQuantizationType.F32
    if outtype == "q8_0" and data.shape[-1] % Q8_BLOCK == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


# ---------------------------------------------------------------- tokenizer

_GENERATION_MARK = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: GPTConfig) -> None:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special, names = set(tokenizer.all_special_ids), {i: t for t, i in tokenizer.get_vocab().items()}
    spare = [i for i in range(config.vocab_size) if i not in names]
    kinds = {i: gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in names}
    kinds |= dict.fromkeys(spare, gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(_pretokenizer(backend))
    writer.add_token_list([names.get(i, f"<|unused_{i}|>") for i in range(config.vocab_size)])
    writer.add_token_types([kinds[i] for i in range(config.vocab_size)])
    merges = backend["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(first == [tokenizer.bos_token_id])
    if tokenizer.chat_template:  # the marks of what is trained are not for llama.cpp; their trimming stays
        writer.add_chat_template(_GENERATION_MARK.sub("{{- '' -}}", tokenizer.chat_template))


def _pretokenizer(backend: dict[str, Any]) -> str:
    """llama.cpp's name of how text is cut before the merges: it has each one built in."""
    if backend["model"]["type"] == "BPE":
        pre = backend["pre_tokenizer"] or {}
        if PRETOKEN in json.dumps(pre, ensure_ascii=False).replace("\\\\", "\\"):
            return "qwen2"  # the very pattern
        if pre.get("type") == "ByteLevel" and pre.get("use_regex", True):
            return "gpt-2"
    raise UsageError(
        "--to gguf: llama.cpp has its pre-tokenisers built in, and this tokenizer's is not among those known "
        "here (trueup's and GPT-2's); use --to llama, qwen3 or gpt2 and llama.cpp's own converter"
    )


# ---------------------------------------------------------------- reading back


@torch.no_grad()
def read_gguf(path: Path, like: GPTConfig) -> GPTForCausalLM:
    """The model that a file written from `like` holds, rounding included: to compare with the original."""
    architecture = form_of(like)
    assert architecture is not None
    heads = like.num_attention_heads if architecture == "gpt2" else like.num_key_value_heads
    mlp = "gelu" if architecture == "gpt2" else like.mlp  # llama.cpp computes GPT-2's by tanh
    bias = like.bias or architecture == "gpt2"
    changes = {"num_key_value_heads": heads, "mlp": mlp, "logit_scale": 1.0, "bias": bias}
    config = GPTConfig(**(like.to_dict() | changes))
    theirs: Weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name != "rope_freqs.weight":
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            back = architecture == "llama"
            theirs[tensor.name] = _interleaved(tensor.name, values, config, back=True) if back else values
    model = GPTForCausalLM(config)
    model.load_state_dict(from_layout(theirs, _layout(architecture), config))
    return model.eval()
