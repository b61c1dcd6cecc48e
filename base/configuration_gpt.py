"""`GPTConfig`: every choice of architecture, and nothing else.

This file travels to the Hub with every checkpoint: it imports transformers and what transformers requires.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils.type_validators import interval

# All four entries, always: save_pretrained alone writes only the class being saved, and a reward model saved
# from a policy directory could then no longer be opened by its own Auto class.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt.GPTConfig",
    "AutoModel": "modeling_gpt.GPTModel",
    "AutoModelForCausalLM": "modeling_gpt.GPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gpt.GPTForSequenceClassification",
}

CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "position": ("rope", "learned"),
    "mlp": ("swiglu", "gelu", "gelu_exact"),
    "init": ("gpt2", "mup"),
}

positive = interval(min=1)
probability = interval(min=0, max=1, exclude_max=True)

if TYPE_CHECKING:  # None only means "derive it": once __post_init__ has run, these are never None
    DerivedInt = Any
    DerivedRope = Any
else:
    DerivedInt = int | None
    DerivedRope = RopeParameters | dict | None


@strict
class GPTConfig(PreTrainedConfig):
    """Architecture of the trueup GPT.

    Two dialects share these fields: the modern one (`rope`, `rmsnorm`, `swiglu`; as Llama, with `qk_norm` as
    Qwen3), and the classic one (`learned`, `layernorm`, `gelu`, `bias`; as GPT-2). Any mixture works too.

    Args:
        vocab_size: rows of the embedding; the tokenizer's length, special tokens included.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads (grouped-query attention); default: as many as query heads.
        head_dim: width of a head; default `hidden_size / num_attention_heads`.
        intermediate_size: width of the MLP; default 8/3 (swiglu) or 4 (gelu) times `hidden_size`, rounded up
            to a multiple of 64; either gives the MLP about the same number of parameters.
        max_position_embeddings: the context in tokens; with learned positions there are no more.
        norm, norm_eps: `rmsnorm`, or `layernorm`, which has a bias where `bias` is set.
        position, rope_parameters: `learned`, or `rope` with Transformers' own parameters (`rope_theta`,
            `rope_type` default | linear | dynamic | yarn | llama3 and what these need).
        mlp: `swiglu`; `gelu` as GPT-2 computes it, by tanh; `gelu_exact` as nanoGPT does, by erf.
        bias: in every linear layer of the blocks.
        qk_norm: normalise queries and keys per head (https://arxiv.org/abs/2302.05442, section 2).
        attention_dropout, residual_dropout, embedding_dropout: probabilities, 0 to switch off.
        tie_word_embeddings: one matrix for `embed_tokens` and `lm_head`.
        initializer_range: standard deviation of the initial weights.
        init: `gpt2` scales the projections onto the residual stream by 1/sqrt(2 * layers). `mup` is the
            maximal update parametrisation (https://arxiv.org/abs/2203.03466, table 8), with which a learning
            rate found at one width holds at another: set `logit_scale` to (width it was found at) /
            `hidden_size`, and add heads rather than widen them. The blocks' matrices then begin with
            `initializer_range` * sqrt(logit_scale), and pretraining lowers their rate by `logit_scale`.
        logit_scale: multiplies the logits; TRL's fused losses read it here.
        reward_mean, reward_std: calibration of a reward model, both or neither: the head returns
            (raw - mean) / std.
        use_cache: whether a forward returns the key/value cache unless told otherwise. A run-time switch:
            saved configurations always have it on (see `to_dict`).

    Raises:
        StrictDataclassError: a field of the wrong type, or fields that do not fit together.
    """

    model_type = "trueup_gpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    _auto_class: ClassVar[str] = "AutoConfig"  # save_pretrained copies this file into the checkpoint
    # Queries, keys and values lie in one matrix, gate and up in another: each rank multiplies its share of
    # the rows, all gather the product, and the next matrix takes its share of that.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.attention.qkv_proj": "colwise_gather_output",
        "layers.*.attention.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_up_proj": "colwise_gather_output",
        "layers.*.mlp.up_proj": "colwise_gather_output",
        "layers.*.mlp.down_proj": "rowwise_split_input",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]] | None] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = positive(default=4096)
    hidden_size: int = positive(default=384)
    num_hidden_layers: int = positive(default=6)
    num_attention_heads: int = positive(default=6)
    num_key_value_heads: DerivedInt = None
    head_dim: DerivedInt = None
    intermediate_size: DerivedInt = None
    max_position_embeddings: int = positive(default=1024)
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    position: str = "rope"
    rope_parameters: DerivedRope = None
    mlp: str = "swiglu"
    bias: bool = False
    qk_norm: bool = False
    attention_dropout: int | float = probability(default=0.0)
    residual_dropout: int | float = probability(default=0.0)
    embedding_dropout: int | float = probability(default=0.0)
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    init: str = "gpt2"
    logit_scale: int | float = 1.0
    reward_mean: int | float | None = None
    reward_std: int | float | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads={self.num_attention_heads} does not divide "
                    f"hidden_size={self.hidden_size}: change one of them, or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            width = 8 * self.hidden_size // 3 if self.mlp == "swiglu" else 4 * self.hidden_size
            self.intermediate_size = -(-width // 64) * 64
        unused = "up_proj" if self.mlp == "swiglu" else "gate_up_proj"  # a plan names what is there, no more
        plan = type(self).base_model_tp_plan
        self.base_model_tp_plan = {key: how for key, how in plan.items() if f"mlp.{unused}" not in key}  # type: ignore[misc]
        if self.position == "learned":  # a pipeline would add them again at the start of every stage
            self.base_model_pp_plan = None  # type: ignore[misc]
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by `@strict` after construction. Every message names the field and the way out."""
        for field, choices in CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field}={value!r}: must be one of {', '.join(choices)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary positions turn channels in pairs"
            )
        if self.position == "learned" and self.rope_parameters["rope_type"] != "default":
            raise ValueError(f"rope_parameters={self.rope_parameters} mean nothing with position='learned'")
        if self.logit_scale <= 0:
            raise ValueError(f"logit_scale={self.logit_scale} must be above 0")
        if (self.reward_mean is None) != (self.reward_std is None):
            raise ValueError(
                "reward_mean and reward_std calibrate a reward model together: set both or neither"
            )
        if self.reward_std is not None and self.reward_std <= 0:
            raise ValueError(f"reward_std={self.reward_std} must be above 0")

    def to_dict(self) -> dict[str, Any]:
        """As saved. Trainer turns `use_cache` off while it trains; that is a state of the run, and saved with
        the model it would make generation slow and change the identity of the architecture."""
        return super().to_dict() | {"use_cache": True}


__all__ = ["GPTConfig"]
