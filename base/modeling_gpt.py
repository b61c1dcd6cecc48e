"""The GPT from the attention up, on Transformers' base classes, so that `generate`, Trainer, TRL, PEFT work.

    tokens -> embed_tokens -> N x [norm -> attention -> +, norm -> mlp -> +] -> norm -> lm_head | score

Positions enter as rotations in the attention (rope), or are added to the embeddings (learned).

Shapes are written with B rows, T positions, H query heads, G key/value heads, D channels per head, K keys (T
without a cache). This file travels to the Hub with every checkpoint: it imports torch, transformers and
configuration_gpt.py.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt import GPTConfig

# -------------------------------------------------------------------------------------------------- attention


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: the reference that every fast back end is tested against.

    Args:
        query: (B, H, T, D), after the rotation.
        key, value: (B, G, K, D), the cache included.
        attention_mask: (B or 1, 1, T, K), what each query may look at, as `additive_mask` reads it.
        dropout: probability of dropping an attention weight.

    Returns:
        The mixed values (B, T, H, D), and the weights (B, H, T, K).
    """
    (batch, heads, queries, width), (groups, keys) = query.shape, key.shape[1:3]
    # The H / G query heads that share a key head stand in line as more queries to it: no key is copied.
    query = query.reshape(batch, groups, -1, width) * scaling
    scores = (query @ key.transpose(-1, -2)).view(batch, heads, queries, keys)
    scores = scores + additive_mask(attention_mask, scores)
    weights = F.softmax(scores, dim=-1)  # summed in fp32 inside the kernel, whatever the scores are stored in
    weights = F.dropout(weights, p=dropout)
    mixed = weights.view(batch, groups, -1, keys) @ value
    return mixed.view(batch, heads, queries, width).transpose(1, 2), weights


def additive_mask(attention_mask: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    """A mask (B or 1, 1, T, K) to be added to scores (B, H, T, K), from any form Transformers hands down.

    None is purely causal: a single query is the newest token and sees every key; of several, the i-th sees
    the keys 0 to i. Boolean is True where visible. Hidden scores get a huge negative number rather than -inf,
    or a row of nothing but padding would become NaN.
    """
    hidden = torch.finfo(scores.dtype).min / 2  # half, so that adding a score cannot overflow
    if attention_mask is None:
        queries, keys = scores.shape[-2:]
        everything = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=scores.device)
        attention_mask = everything if queries == 1 else everything.tril()
    if attention_mask.dtype == torch.bool:
        return torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill(~attention_mask, hidden)
    return attention_mask.clamp(min=hidden).to(scores.dtype)


# Measured on one core of a CPU with AVX512-BF16, 12M parameters, 4,096 tokens a step in bf16: with
# eager_attention a training step is 1.1 to 1.2 times as fast as with SDPA at 256 keys, 1.2 to 1.3 at 512,
# 0.95 to 1.2 at 1,024 (the more, the less the allocator hands back to the system). Attention of one new token
# to a cache: 1.2 to 4 times. In fp32 SDPA wins everywhere.
MATMUL_MAX_KEYS = 1024


def sdpa_or_matmul(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `attn_implementation="sdpa"`, the default, means here: SDPA, except on a CPU in bf16, where the
    plain matrix products above are faster. `sdpa_only` is the switch that turns them off.
    """
    short = query.shape[2] == 1 or key.shape[2] <= MATMUL_MAX_KEYS
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and short:
        return eager_attention(module, query, key, value, attention_mask, scaling, dropout)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


AttentionInterface.register("sdpa_only", sdpa_attention_forward)
AttentionMaskInterface.register("sdpa_only", sdpa_mask)


def attention_function(name: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The back end that `attn_implementation` names."""
    return sdpa_or_matmul if name == "sdpa" else ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)


# -------------------------------------------------------------------------------------------------- positions


class GPTRotaryEmbedding(nn.Module):
    """Rotary positions: the i-th pair of a head's channels turns by position * theta^(-2i/D).

    https://arxiv.org/abs/2104.09864

    The frequencies are non-persistent buffers, which from_pretrained leaves uninitialised; Transformers fills
    them again for classes that are called *RotaryEmbedding and have these attributes.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: GPTConfig, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """The frequencies (D/2,) of unscaled RoPE, and the factor on cos and sin (1)."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update  # recomputes the frequencies where rope_type makes them depend on the length
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B or 1, T, D/2) of positions (B or 1, T), in fp32: bf16 blurs far ones."""
        angles = position_ids[..., None].float() * self.inv_freq.float()
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the channel pairs (i, i + D/2) of heads (B, H, T, D), in x's dtype: fp32 would cost twice bf16."""
    turned: torch.Tensor = _Rotation.apply(x, cos.to(x.dtype), sin.to(x.dtype))
    return turned


class _Rotation(torch.autograd.Function):
    """Its gradient is turned back: half the operations that autograd would find, on rows of D channels."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        return torch.addcmul(x * torch.cat((cos, cos), dim=-1), swapped, torch.cat((-sin, sin), dim=-1))

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(slope, cos, -sin), None, None


# ----------------------------------------------------------------------------------------------------- blocks


class GPTRMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (https://arxiv.org/abs/1910.07467), in the weights' dtype: fp32 under autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


class GPTLayerNorm(nn.LayerNorm):
    """(x - mean(x)) / std(x) * weight + bias (https://arxiv.org/abs/1607.06450), in the weights' dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


def build_norm(config: GPTConfig, width: int) -> nn.Module:
    if config.norm == "layernorm":
        return GPTLayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return GPTRMSNorm(width, eps=config.norm_eps)


class InitLinear(nn.Linear):
    """A Linear that carries the standard deviation of its initial weights."""

    def __init__(self, in_features: int, out_features: int, bias: bool, init_std: float) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.init_std = init_std


def hidden_std(config: GPTConfig) -> float:
    """Spread of a block's initial weights. muP: the wider the input, the smaller, so that sums over it keep
    their size; there logit_scale is the width that was tuned over this one."""
    return config.initializer_range * (math.sqrt(config.logit_scale) if config.init == "mup" else 1.0)


def inner_projection(width: int, config: GPTConfig) -> InitLinear:
    """A projection from the residual stream into a block."""
    return InitLinear(config.hidden_size, width, bias=config.bias, init_std=hidden_std(config))


def residual_projection(width: int, config: GPTConfig) -> InitLinear:
    """A projection onto the residual stream, where 2 * layers of them add up: each starts smaller by the root
    of that, so that the sum begins at the scale of one (GPT-2, section 2.3)."""
    init_std = hidden_std(config) / math.sqrt(2 * config.num_hidden_layers)
    return InitLinear(width, config.hidden_size, bias=config.bias, init_std=init_std)


class GPTAttention(nn.Module):
    """Causal self-attention with grouped key/value heads (https://arxiv.org/abs/2305.13245)."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        # The next three are read by Transformers' attention functions.
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True

        self.qkv_proj = inner_projection(sum(self.heads) * config.head_dim, config)
        self.q_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.o_proj = residual_projection(config.num_attention_heads * config.head_dim, config)
        # A module although only its p is used: TRL turns dropout off by setting p of every nn.Dropout.
        self.attention_dropout = nn.Dropout(config.attention_dropout)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, T, hidden_size) -> the same, and the weights (B, H, T, K) if the back end has them."""
        batch, length, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query, key, value = qkv.split(self.heads, dim=1)
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        mixed, weights = attention_function(self.config._attn_implementation)(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout.p if self.training else 0.0,
            **kwargs,
        )
        return self.residual_dropout(self.o_proj(mixed.reshape(batch, length, -1))), weights


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202), gate and up in one product."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_up_proj = inner_projection(2 * config.intermediate_size, config)
        self.down_proj = residual_projection(config.intermediate_size, config)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.residual_dropout(self.down_proj(F.silu(gate) * up))


class GELU(nn.Module):
    """down(gelu(up(x))) (https://arxiv.org/abs/1606.08415)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.approximate = "none" if config.mlp == "gelu_exact" else "tanh"
        self.up_proj = inner_projection(config.intermediate_size, config)
        self.down_proj = residual_projection(config.intermediate_size, config)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        activated = F.gelu(self.up_proj(hidden_states), approximate=self.approximate)
        return self.residual_dropout(self.down_proj(activated))


class GPTBlock(GradientCheckpointingLayer):
    """One layer: attention and MLP, each normalised before and added after."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_norm = build_norm(config, config.hidden_size)
        self.attention = GPTAttention(config, layer_idx)
        self.post_norm = build_norm(config, config.hidden_size)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, T, hidden_size) -> the same. Positional, so that re-entrant checkpointing sees that it needs a
        gradient."""
        attended, _ = self.attention(self.input_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_norm(hidden_states))


# ----------------------------------------------------------------------------------------------------- models


class GPTPreTrainedModel(PreTrainedModel):
    """What the three models share: how Transformers is to treat them, and how their weights begin."""

    config_class = GPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["GPTBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type]] = {"hidden_states": GPTBlock, "attentions": GPTAttention}

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Split by the plans. Transformers cuts a pipeline without asking for a plan; with learned positions,
        which every stage would add once more, it would compute something else.

        Raises:
            ValueError: a pipeline is asked for, and the positions are learned.
        """
        if distributed_config is not None and distributed_config.pp_size > 1 and not model.supports_pp_plan:
            raise ValueError("a model with learned positions has no pipeline: use tp_size or fsdp_size")
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range), or what an InitLinear asks for. A rule on the attention or MLP as a whole
        would silently not fire: for custom code Transformers skips modules that have no parameters of their
        own."""
        if not isinstance(module, InitLinear):
            super()._init_weights(module)
            return
        init.normal_(module.weight, std=module.init_std)
        if module.bias is not None:
            init.zeros_(module.bias)


class GPTModel(GPTPreTrainedModel):
    """The trunk: tokens to normalised hidden states."""

    _auto_class = "AutoModel"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = GPTRotaryEmbedding(config)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([GPTBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = build_norm(config, config.hidden_size)
        self.gradient_checkpointing = (
            False  # switched by activation_checkpointing_enable; turns the cache off too
        )
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, hidden_size) of tokens (B, T).

        Args:
            attention_mask: (B, T, or with a cache all that was seen): 0 on padding, left or right.
            position_ids: (B, T). Where they restart, a new document of a packed row begins, and attention
                stays inside it; for that `attention_mask` and `past_key_values` must be None.
            kwargs: handed to the attention function, such as flash attention's `cu_seq_lens_q`.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # The mask comes before the cache: with one, even empty, packed documents are no longer told apart.
        # And before the default positions: to search those for packing would wait for the GPU and, compiled,
        # give up SDPA's causal kernel for a mask.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            position_ids = self.default_positions(inputs_embeds, attention_mask, past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        rotation = None
        if self.config.position == "learned":
            hidden_states = self.embedding_dropout(inputs_embeds + self.embed_positions(position_ids))
        else:
            hidden_states = self.embedding_dropout(inputs_embeds)
            cos, sin = self.rotary_emb(hidden_states, position_ids)
            rotation = cos[:, None], sin[:, None]  # the same for all heads
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                rotation=rotation,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def default_positions(
        self, embeddings: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Positions (B or 1, T), counted on from the cache.

        A rotation sees distances alone, so padding on the left moves nothing. To learned positions it would,
        and they count attended tokens.

        Raises:
            ValueError: the row is longer than the learned positions.
        """
        length, context = embeddings.shape[1], self.config.max_position_embeddings
        learned = self.config.position == "learned"
        if learned and length > context:
            raise ValueError(f"{length} tokens are more than the model's {context} learned positions")
        if learned and attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        return torch.arange(length, device=embeddings.device)[None] + seen


class GPTForCausalLM(GPTPreTrainedModel, GenerationMixin):
    """The language model: the trunk and a projection onto the vocabulary."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    # The trunk's plans are the configuration's.
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}  # where backward begins

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.model = GPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if config.base_model_pp_plan is None:
            self.pp_plan = None  # an output layer alone is no pipeline

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocab_size), and with `labels` (B, T) the mean next-token cross-entropy in nats.

        Args:
            labels: the tokens themselves, -100 where nothing is to be learned; shifted here.
            logits_to_keep: only the last so many positions, or those of an index tensor; 0 keeps all.
            kwargs: `num_items_in_batch` divides the summed loss instead of this batch's own count (gradient
                accumulation); the rest goes to the trunk.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Scaling the hidden states scales the logits, on a tensor vocab_size / hidden_size times smaller.
        logits = self.lm_head(outputs.last_hidden_state[:, kept] * self.config.logit_scale)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GPTForSequenceClassification(GPTPreTrainedModel):
    """The reward model: the trunk and a linear score of each text's last token."""

    _auto_class = "AutoModelForSequenceClassification"
    accepts_loss_kwargs = (
        False  # the loss is a mean over rows: Trainer is to average it over accumulation steps
    )

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GPTModel(config)
        # First scores of about unit size: https://arxiv.org/abs/1909.08593, section 2.1
        init_std = 1 / math.sqrt(config.hidden_size + 1)
        self.score = InitLinear(config.hidden_size, config.num_labels, bias=False, init_std=init_std)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores `logits` (B, num_labels) at the last token that `attention_mask` attends to, or at the last
        one without a mask. Never found by comparing ids with the pad token, which text may contain.

        A calibrated reward model (`reward_mean`, `reward_std` in the configuration) returns (raw - mean) /
        std.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(last_attended(outputs.last_hidden_state, attention_mask)).float()
        if self.config.reward_std is not None:
            logits = (logits - self.config.reward_mean) / self.config.reward_std
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def last_attended(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T, hidden_size) -> (B, hidden_size): each row at its last position with a mask of 1, padded left or
    right."""
    if attention_mask is None:
        return hidden_states[:, -1]
    rows, length = hidden_states.shape[:2]
    positions = torch.arange(length, device=hidden_states.device)
    last = (attention_mask[:, -length:].to(positions) * positions).argmax(dim=-1)
    return hidden_states[torch.arange(rows, device=hidden_states.device), last]


__all__ = ["GPTForCausalLM", "GPTForSequenceClassification", "GPTModel", "GPTPreTrainedModel"]
