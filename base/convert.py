"""The GPT in other people's forms, and back: Llama, Qwen3, GPT-2, nanoGPT, LLMs-from-scratch.

What a form cannot express is refused by name: a converted model computes the same function or does not exist.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trueup.base.configuration_gpt import GPTConfig
from trueup.base.convert_layouts import (
    GPT2,
    LLAMA,
    LLMS_FROM_SCRATCH,
    NANOGPT,
    QWEN3,
    Layout,
    Weights,
    from_layout,
    to_layout,
    with_own_keys,
    without_logit_scale,
)
from trueup.base.modeling_gpt import GPTForCausalLM
from trueup.recipes.errors import UsageError

# ---------------------------------------------------------------- forms with a class in Transformers


@dataclass(frozen=True)
class Form:
    """A class of Transformers that computes what some of our configurations do.

    missing: what a configuration of ours has that the form has not; empty if it can be exported.
    write: our configuration as theirs.
    read: theirs as keyword arguments of ours.
    """

    model_class: type[PreTrainedModel]
    layout: Layout
    missing: Callable[[GPTConfig], list[str]]
    write: Callable[[GPTConfig], PreTrainedConfig]
    read: Callable[[Any], dict[str, Any]]


CLASSIC = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "initializer_range", "tie_word_embeddings", *_TOKENS,
)  # fmt: skip
_SHARED_LLAMA = (
    *_SHARED, "num_key_value_heads", "head_dim", "intermediate_size", "attention_dropout", "rope_parameters"
)  # fmt: skip


def _copied(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in names}
    return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}


def _differences(config: GPTConfig, **needed: Any) -> list[str]:
    """`field: value` where a configuration is not as needed."""
    return [f"{name}: {getattr(config, name)}" for name, value in needed.items()
            if getattr(config, name) not in (value if isinstance(value, tuple) else (value,))]  # fmt: skip


def _missing_in_llama(config: GPTConfig) -> list[str]:
    found = _differences(config, norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=False)
    if config.hidden_size % config.num_attention_heads:
        found.append(
            f"hidden_size: {config.hidden_size} that {config.num_attention_heads} heads do not divide"
        )
    return found


def _missing_in_qwen3(config: GPTConfig) -> list[str]:
    return _differences(config, norm="rmsnorm", position="rope", mlp="swiglu", qk_norm=True, bias=False)


def _missing_in_gpt2(config: GPTConfig) -> list[str]:
    found = _differences(
        config, norm="layernorm", position="learned", mlp=("gelu", "gelu_exact"), qk_norm=False
    )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        found.append(f"head_dim: {config.head_dim} other than hidden_size / num_attention_heads")
    return found


def _write_llama(config: GPTConfig) -> PreTrainedConfig:
    return LlamaConfig(
        **_copied(config, _SHARED_LLAMA),
        rms_norm_eps=config.norm_eps, attention_bias=config.bias, mlp_bias=config.bias,
    )  # fmt: skip


def _write_qwen3(config: GPTConfig) -> PreTrainedConfig:
    return Qwen3Config(**_copied(config, _SHARED_LLAMA), rms_norm_eps=config.norm_eps)


def _write_gpt2(config: GPTConfig) -> PreTrainedConfig:
    return GPT2Config(
        **_copied(config, _SHARED),
        n_inner=config.intermediate_size,
        activation_function="gelu" if config.mlp == "gelu_exact" else "gelu_new",
        layer_norm_epsilon=config.norm_eps,
        attn_pdrop=config.attention_dropout,
        resid_pdrop=config.residual_dropout,
        embd_pdrop=config.embedding_dropout,
    )


def _read_llama(config: LlamaConfig) -> dict[str, Any]:
    _refuse(config, hidden_act=("silu",))
    bias = config.attention_bias or config.mlp_bias
    return _copied(config, _SHARED_LLAMA) | {"norm_eps": config.rms_norm_eps, "bias": bias}


def _read_qwen3(config: Qwen3Config) -> dict[str, Any]:
    _refuse(config, hidden_act=("silu",), attention_bias=(False,), sliding_window=(None,))
    return _copied(config, _SHARED_LLAMA) | {"norm_eps": config.rms_norm_eps, "qk_norm": True}


# GPT-2's names of the two ways to compute GELU.
_GELUS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}


def _read_gpt2(config: GPT2Config) -> dict[str, Any]:
    _refuse(
        config,
        activation_function=tuple(_GELUS),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    return _copied(config, _SHARED) | {
        **CLASSIC,
        "intermediate_size": config.n_inner or 4 * config.hidden_size,
        "mlp": _GELUS[config.activation_function],
        "norm_eps": config.layer_norm_epsilon,
        "attention_dropout": config.attn_pdrop,
        "residual_dropout": config.resid_pdrop,
        "embedding_dropout": config.embd_pdrop,
    }


def _refuse(config: Any, **allowed: tuple[Any, ...]) -> None:
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise UsageError(
                f"config.json: {name}: {getattr(config, name)} is nothing trueup's GPT computes; it takes "
                f"{' or '.join(map(str, values))}"
            )


FORMS: dict[str, Form] = {
    "llama": Form(LlamaForCausalLM, LLAMA, _missing_in_llama, _write_llama, _read_llama),
    "qwen3": Form(Qwen3ForCausalLM, QWEN3, _missing_in_qwen3, _write_qwen3, _read_qwen3),
    "gpt2": Form(GPT2LMHeadModel, GPT2, _missing_in_gpt2, _write_gpt2, _read_gpt2),
}


def form_of(config: GPTConfig) -> str | None:
    """The form that expresses a configuration; None if none does."""
    return next((name for name, form in FORMS.items() if not form.missing(config)), None)


def plain_weights(model: GPTForCausalLM, name: str) -> tuple[Weights, GPTConfig]:
    """A model's weights and configuration, rewritten to what a form has.

    Raises:
        UsageError: the form cannot express the model.
    """
    config = model.config
    if missing := FORMS[name].missing(config):
        other = form_of(config)
        instead = f"; use --to {other}" if other else ", nor does any other form"
        raise UsageError(f"--to {name}: cannot express {', '.join(missing)}{instead}")
    weights, config = without_logit_scale(model.state_dict(), config)
    return with_own_keys(weights, config) if name == "gpt2" else (weights, config)


@torch.no_grad()
def export_model(model: GPTForCausalLM, name: str) -> PreTrainedModel:
    """The same function as a LlamaForCausalLM, Qwen3ForCausalLM or GPT2LMHeadModel, in evaluation mode.

    Args:
        model: its weights are copied; reward calibrations have no place in a language model and are not.
        name: llama, qwen3 or gpt2. GPT-2 has no grouped queries: keys and values are copied to each head.

    Raises:
        UsageError: the form cannot express the model; names why, and the form that can.
    """
    weights, config = plain_weights(model, name)
    form = FORMS[name]
    theirs = form.model_class(form.write(config)).to(model.dtype)
    state = to_layout(weights, form.layout, config)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    for left in missing:  # GPT-2 always has biases
        theirs.get_parameter(left).zero_()
    assert not unexpected
    assert all(left.endswith("bias") for left in missing)
    theirs.generation_config = model.generation_config
    return theirs.eval()


@torch.no_grad()
def import_model(theirs: PreTrainedModel) -> GPTForCausalLM:
    """A LlamaForCausalLM, Qwen3ForCausalLM or GPT2LMHeadModel as our GPT, in evaluation mode.

    Raises:
        UsageError: another architecture, or an option of one of these that ours has not.
    """
    name = theirs.config.model_type
    if name not in FORMS:
        raise UsageError(f"model_type: {name} cannot be imported; {', '.join(FORMS)} can")
    form = FORMS[name]
    config = GPTConfig(**form.read(theirs.config))
    model = _filled(from_layout(theirs.state_dict(), form.layout, config), config, theirs.dtype)
    model.generation_config = theirs.generation_config
    return model


def _filled(weights: Weights, config: GPTConfig, dtype: torch.dtype) -> GPTForCausalLM:
    model = GPTForCausalLM(config).to(dtype)
    model.load_state_dict(weights)
    return model.eval()


# ---------------------------------------------------------------- bare state dicts

# Buffers that hold a causal mask, and the prefix that torch.compile leaves.
_MASKS = (".attn.bias", ".attn.masked_bias", ".att.mask")
_COMPILED = "_orig_mod."


def import_state_dict(theirs: Weights, num_attention_heads: int | None = None) -> GPTForCausalLM:
    """A nanoGPT or LLMs-from-scratch (`GPTModel`) state dict as our GPT, in evaluation mode.

    The shapes say everything but the number of heads, on which they do not depend.

    Args:
        num_attention_heads: default: hidden_size / 64, as in every GPT-2.

    Raises:
        UsageError: the names are neither's, the heads do not divide the width, or weights are missing.
    """
    theirs = {
        name.removeprefix(_COMPILED): tensor for name, tensor in theirs.items() if not name.endswith(_MASKS)
    }
    if "transformer.wte.weight" in theirs:
        layout, mlp = NANOGPT, "gelu_exact"
    elif "tok_emb.weight" in theirs:
        layout, mlp = LLMS_FROM_SCRATCH, "gelu"
    else:
        raise UsageError(
            f"the weights begin with {next(iter(theirs), 'nothing')}: neither nanoGPT's "
            "(transformer.wte.weight) nor LLMs-from-scratch's (tok_emb.weight)"
        )
    config = _read_shapes(theirs, layout, num_attention_heads, mlp)
    dtype = theirs[f"{layout.modules['model.embed_tokens'][0]}.weight"].dtype
    return _filled(from_layout(theirs, layout, config), config, dtype)


def _read_shapes(theirs: Weights, layout: Layout, heads: int | None, mlp: str) -> GPTConfig:
    """The configuration behind a state dict's shapes."""

    def shape(module: str) -> torch.Size:
        name = f"{layout.modules[module][0].format(0)}.weight"
        if name not in theirs:
            raise UsageError(f"the weights lack {name}")
        return theirs[name].shape

    block = layout.modules["model.layers.{}.mlp.up_proj"][0]
    vocabulary, width = shape("model.embed_tokens")
    heads = heads or max(1, width // 64)
    if width % heads:
        raise UsageError(f"num_attention_heads: {heads} does not divide the width {width}; name the model's")
    embedding, head = (layout.modules[name][0] + ".weight" for name in ("model.embed_tokens", "lm_head"))
    return GPTConfig(
        **CLASSIC
        | {
            "mlp": mlp,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": sum(f"{block.format(i)}.weight" in theirs for i in range(len(theirs))),
            "num_attention_heads": heads,
            "intermediate_size": shape("model.layers.{}.mlp.up_proj")[0],
            "max_position_embeddings": shape("model.embed_positions")[0],
            "bias": any(name.endswith(("bias", "shift")) for name in theirs),
            "tie_word_embeddings": head not in theirs or torch.equal(theirs[head], theirs[embedding]),
        }
    )
