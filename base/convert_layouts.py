"""Which of other people's weights each of ours is made of: one table per form, read in both directions.

What is one matrix here (queries, keys and values; gate and up) is stacked from theirs along the rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trueup.base.configuration_gpt import GPTConfig
from trueup.base.modeling_gpt import GPTForCausalLM
from trueup.recipes.errors import UsageError

Weights = dict[str, torch.Tensor]

# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Layout:
    """Their modules by ours; `{}` is a block's number."""

    modules: dict[str, tuple[str, ...]]
    transposed: bool = False  # the blocks' matrices lie (in, out), as in GPT-2's Conv1D
    norm_parameters: tuple[str, str] = ("weight", "bias")  # what theirs are called


def _llama(modules: dict[str, tuple[str, ...]]) -> Layout:
    block = "model.layers.{}"
    return Layout(
        {
            "model.embed_tokens": ("model.embed_tokens",),
            f"{block}.input_norm": (f"{block}.input_layernorm",),
            f"{block}.attention.qkv_proj": tuple(f"{block}.self_attn.{part}_proj" for part in "qkv"),
            f"{block}.attention.o_proj": (f"{block}.self_attn.o_proj",),
            f"{block}.post_norm": (f"{block}.post_attention_layernorm",),
            f"{block}.mlp.gate_up_proj": (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"),
            f"{block}.mlp.down_proj": (f"{block}.mlp.down_proj",),
            "model.norm": ("model.norm",),
            "lm_head": ("lm_head",),
            **modules,
        }
    )


def _gpt2(transposed: bool) -> Layout:
    ours, theirs = "model.layers.{}", "transformer.h.{}"
    return Layout(
        {
            "model.embed_tokens": ("transformer.wte",),
            "model.embed_positions": ("transformer.wpe",),
            f"{ours}.input_norm": (f"{theirs}.ln_1",),
            f"{ours}.attention.qkv_proj": (f"{theirs}.attn.c_attn",),
            f"{ours}.attention.o_proj": (f"{theirs}.attn.c_proj",),
            f"{ours}.post_norm": (f"{theirs}.ln_2",),
            f"{ours}.mlp.up_proj": (f"{theirs}.mlp.c_fc",),
            f"{ours}.mlp.down_proj": (f"{theirs}.mlp.c_proj",),
            "model.norm": ("transformer.ln_f",),
            "lm_head": ("lm_head",),
        },
        transposed,
    )


def _llms_from_scratch() -> Layout:
    ours, theirs = "model.layers.{}", "trf_blocks.{}"
    return Layout(
        {
            "model.embed_tokens": ("tok_emb",),
            "model.embed_positions": ("pos_emb",),
            f"{ours}.input_norm": (f"{theirs}.norm1",),
            f"{ours}.attention.qkv_proj": tuple(
                f"{theirs}.att.W_{part}" for part in ("query", "key", "value")
            ),
            f"{ours}.attention.o_proj": (f"{theirs}.att.out_proj",),
            f"{ours}.post_norm": (f"{theirs}.norm2",),
            f"{ours}.mlp.up_proj": (f"{theirs}.ff.layers.0",),
            f"{ours}.mlp.down_proj": (f"{theirs}.ff.layers.2",),
            "model.norm": ("final_norm",),
            "lm_head": ("out_head",),
        },
        norm_parameters=("scale", "shift"),
    )


LLAMA = _llama({})
QWEN3 = _llama(
    {
        f"model.layers.{{}}.attention.{part}_norm": (f"model.layers.{{}}.self_attn.{part}_norm",)
        for part in "qk"
    }
)
GPT2, NANOGPT = _gpt2(transposed=True), _gpt2(transposed=False)
LLMS_FROM_SCRATCH = _llms_from_scratch()


def _entries(weights: Weights, layout: Layout) -> Iterator[tuple[str, torch.Tensor, tuple[str, ...], bool]]:
    """(our name, our tensor, their names, whether theirs lie transposed) of each of our weights."""
    for name, tensor in weights.items():
        module, _, parameter = name.rpartition(".")
        number = next((part for part in module.split(".") if part.isdigit()), "")
        pattern = module.replace(f".{number}.", ".{}.") if number else module
        parts = tuple(part.format(number) for part in layout.modules[pattern])
        if "norm" in pattern:
            parameter = layout.norm_parameters[parameter == "bias"]
        transposed = layout.transposed and tensor.ndim == 2 and bool(number)
        yield name, tensor, tuple(f"{part}.{parameter}" for part in parts), transposed


def part_sizes(config: GPTConfig, name: str, parts: int) -> list[int]:
    """Rows of each part of one of our stacked matrices."""
    if "qkv_proj" in name and parts == 3:
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        return [count * config.head_dim for count in heads]
    return [config.intermediate_size] * parts


def to_layout(weights: Weights, layout: Layout, config: GPTConfig) -> Weights:
    """Our weights under their names. Tensors may share memory with ours."""
    theirs: Weights = {}
    for name, tensor, names, transposed in _entries(weights, layout):
        sizes = part_sizes(config, name, len(names))
        parts = tensor.split(sizes) if len(names) > 1 else (tensor,)
        theirs |= {
            n: part.T.contiguous() if transposed else part for n, part in zip(names, parts, strict=True)
        }
    return theirs


def from_layout(theirs: Weights, layout: Layout, config: GPTConfig) -> Weights:
    """Their weights under our names. A bias they lack is zero, a head they lack is tied.

    Raises:
        UsageError: a weight is missing, has another shape than the configuration says, or is left over.
    """
    with torch.device("meta"):
        wanted = GPTForCausalLM(config).state_dict()
    ours, used = {}, set()
    for name, expected, names, transposed in _entries(wanted, layout):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            used |= set(names)
            continue
        sizes = part_sizes(config, name, len(names)) if len(names) > 1 else [expected.shape[0]]
        parts = []
        for part, rows in zip(names, sizes, strict=True):
            if part not in theirs and not part.endswith(("bias", "shift")):
                raise UsageError(f"the weights lack {part}")
            tensor = theirs.get(part, expected.new_zeros(rows, device="cpu"))
            parts.append(tensor.T if transposed else tensor)
        ours[name] = torch.cat(parts)
        used |= set(names)
        if ours[name].shape != expected.shape:
            raise UsageError(
                f"{names[0]} is {tuple(theirs[names[0]].shape)}, which does not fit {tuple(expected.shape)}"
            )
    if left := sorted(set(theirs) - used):
        raise UsageError(f"the weights hold {', '.join(left[:3])}, which trueup's GPT has no place for")
    if config.tie_word_embeddings:
        ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    return ours


# ---------------------------------------------------------------- the same function, written otherwise


def without_logit_scale(weights: Weights, config: GPTConfig) -> tuple[Weights, GPTConfig]:
    """`logit_scale` moved into the last norm, for forms that have no such factor; the tie stays."""
    scaled = {
        name: tensor * config.logit_scale if name.startswith("model.norm.") else tensor
        for name, tensor in weights.items()
    }
    return scaled, _changed(config, logit_scale=1.0)


def with_own_keys(weights: Weights, config: GPTConfig) -> tuple[Weights, GPTConfig]:
    """Each query head with keys and values of its own, copied from its group, for forms without groups."""
    repeats = config.num_attention_heads // config.num_key_value_heads

    def expanded(tensor: torch.Tensor) -> torch.Tensor:
        query, *rest = tensor.split(part_sizes(config, "qkv_proj", 3))
        heads = (part.unflatten(0, (-1, config.head_dim)) for part in rest)
        return torch.cat([query, *(part.repeat_interleave(repeats, 0).flatten(0, 1) for part in heads)])

    copied = {name: expanded(t) if ".qkv_proj." in name else t for name, t in weights.items()}
    return copied, _changed(config, num_key_value_heads=config.num_attention_heads)


def _changed(config: GPTConfig, **changes: Any) -> GPTConfig:
    return GPTConfig(**(config.to_dict() | changes))
