"""The pretraining stage: its recipe keys, and what contradicts what. The loop is in pretrain_loop.py."""

import hashlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.errors import StrictDataclassError

from trueup.base.data import DataArguments, data_fingerprint
from trueup.base.eval_tasks import EvalTasksArguments, eval_tasks_contradictions
from trueup.base.hub_keys import HubArguments, hub_contradictions
from trueup.base.schedule import SCHEDULE_DEFAULTS
from trueup.recipes.directory import Kind
from trueup.recipes.run import Run

if TYPE_CHECKING:
    from trueup.base.configuration_gpt import GPTConfig


def _key(default: Any, help_text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class GPTArguments:
    """The shape of the model: GPTConfig's fields, under the same names and with the same defaults."""

    hidden_size: int = _key(384, "Width of the residual stream.")
    num_hidden_layers: int = _key(6, "Number of blocks.")
    num_attention_heads: int = _key(6, "Query heads.")
    num_key_value_heads: int | None = _key(None, "Key/value heads (GQA); default: as many as query heads.")
    head_dim: int | None = _key(None, "Width of a head; default: hidden_size / num_attention_heads.")
    intermediate_size: int | None = _key(None, "Width of the MLP; default: 8/3 (gelu: 4) x hidden_size.")
    max_position_embeddings: int | None = _key(None, "Context of the model; default: max_length.")
    norm: Literal["rmsnorm", "layernorm"] = _key("rmsnorm", "Kind of normalisation.")
    norm_eps: float = _key(1e-5, "Added to the variance in a norm.")
    position: Literal["rope", "learned"] = _key("rope", "How positions are told apart.")
    rope_parameters: dict[str, Any] | None = field(
        default=None, metadata={"help": "Transformers' RoPE parameters (rope_theta, rope_type)."}
    )
    mlp: Literal["swiglu", "gelu", "gelu_exact"] = _key(
        "swiglu", "Kind of MLP; gelu by tanh, as GPT-2, gelu_exact by erf, as nanoGPT."
    )
    bias: bool = _key(False, "Biases in the linear layers.")
    qk_norm: bool = _key(False, "Normalise queries and keys per head.")
    attention_dropout: float = _key(0.0, "Dropout of attention weights.")
    residual_dropout: float = _key(0.0, "Dropout of what a block adds to the residual stream.")
    embedding_dropout: float = _key(0.0, "Dropout of the embeddings.")
    tie_word_embeddings: bool = _key(True, "One matrix for embedding and output.")
    initializer_range: float = _key(0.02, "Standard deviation of the initial weights.")
    init: Literal["gpt2", "mup"] = _key(
        "gpt2", "How the weights begin; mup: so that a learning rate found at one width holds at another."
    )
    logit_scale: float = _key(
        1.0, "Multiplies the logits; with init: mup, (width the rate was found at) / hidden_size."
    )

    def gpt_config(self, max_length: int, **special: int | None) -> "GPTConfig":
        """The model's configuration; `special` are vocab_size and the special tokens' ids.

        Raises:
            StrictDataclassError: the fields do not fit together.
        """
        from trueup.base.configuration_gpt import GPTConfig

        shape = {key.name: getattr(self, key.name) for key in fields(GPTArguments)}
        shape["max_position_embeddings"] = self.max_position_embeddings or max_length
        return GPTConfig(**shape, **special)


@dataclass
class PretrainRecipe(GPTArguments, EvalTasksArguments, HubArguments, DataArguments):
    """Train a GPT from scratch on raw text."""

    output_dir: str = _key("", "Model directory to write.", required=True)
    size: Literal["lab", "12M", "30M", "124M", "350M", "1B", "7B"] | None = _key(
        None, "A size by name: shape, batch, learning rate and horizon; each key of yours wins over it."
    )
    tokenizer_name_or_path: str | None = _key(
        None, "Tokenizer to use; without it one is trained on the training documents."
    )
    vocab_size: int = _key(4096, "Entries of the tokenizer that is trained.")
    max_length: int = _key(1024, "Tokens in a training row.")
    max_steps: int = _key(-1, "Optimizer steps; -1: num_train_epochs decides.")
    num_train_epochs: float = _key(1.0, "Passes over the training documents.")
    per_device_train_batch_size: int = _key(8, "Rows in one forward pass on each device.")
    per_device_eval_batch_size: int = _key(8, "The same for the held-out text.")
    gradient_accumulation_steps: int = _key(1, "Forward passes that make one step.")
    learning_rate: float = _key(1e-3, "Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["cosine", "warmup_stable_decay"] = _key(
        "cosine", "How the learning rate falls after the warm-up."
    )
    lr_scheduler_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "cosine: min_lr_rate; warmup_stable_decay: min_lr_ratio, num_decay_steps (or a share)."
        },
    )
    warmup_steps: float = _key(0.02, "Steps of linear warm-up; below 1 a share of all steps.")
    weight_decay: float = _key(0.1, "Decay of the matrices; norms, biases and embeddings are never decayed.")
    adam_beta1: float = _key(0.9, "AdamW's memory of the gradient.")
    adam_beta2: float = _key(0.95, "AdamW's memory of its square.")
    adam_epsilon: float = _key(1e-8, "Added to the root of AdamW's second moment.")
    max_grad_norm: float = _key(1.0, "Gradients are scaled down to this norm.")
    optim: Literal["adamw_torch_fused", "muon"] = _key(
        "adamw_torch_fused", "muon: Muon for the matrices inside the blocks, AdamW for the rest."
    )
    muon_learning_rate: float = _key(0.02, "Peak learning rate of Muon.")
    eval_steps: float = _key(0.1, "Measure held-out bits per byte every so many steps; below 1 a share.")
    max_eval_tokens: int = _key(1_000_000, "Held-out text is scored up to so many tokens, whole documents.")
    save_steps: float = _key(0.1, "Write a checkpoint every so many steps; below 1 a share of all steps.")
    save_total_limit: int | None = _key(
        2, "Checkpoints kept while training; with 1 there is none to fall back to when it is damaged."
    )
    logging_steps: float = _key(10, "Log loss and speed every so many steps; below 1 a share.")
    sample_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Openings continued at each evaluation; default: those of three held-out documents."
        },
    )
    seed: int = _key(42, "Decides initial weights, order and dropout.")
    use_cpu: bool = _key(False, "Train on the CPU even if there is an accelerator.")
    bf16: bool = _key(False, "Compute in bfloat16, keep weights and optimizer in float32.")
    fp16: bool = _key(False, "Compute in float16 with loss scaling, for GPUs without bfloat16.")
    attn_implementation: str | None = _key(
        None, "Attention back end: eager, sdpa, flash_attention_2, ...; default: the fastest for the device."
    )
    activation_checkpointing: bool = _key(
        False, "Keep no activations inside the blocks and compute them again: less memory, a third more time."
    )
    torch_compile: bool = _key(False, "Compile the model: faster, after some seconds at the start.")
    report_to: str | list[str] = field(
        default="none", metadata={"help": "Trackers: tensorboard, trackio, wandb, ..., all or none."}
    )
    run_name: str | None = _key(None, "The run's name in trackers; default: the name of output_dir.")
    resume_from_checkpoint: bool | str | None = _key(
        None, "Default: the newest whole checkpoint of this recipe; false: none; or a checkpoint's path."
    )

    @classmethod
    def derived(cls, given: dict[str, Any]) -> dict[str, tuple[Any, str]]:
        """See `trueup.recipes.stages.Stage`."""
        if not given.get("size"):
            return {}
        from trueup.base.presets import derive

        return derive(given["size"], given)

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        try:
            given = {key: value for key, (value, _) in cls.derived(given).items()} | given
        except (StrictDataclassError, ValueError) as error:
            return [("size", f"does not fit: {str(error).strip().splitlines()[-1].strip()}")]
        given = {key: value for key, value in given.items() if value is not None}
        found = [
            (key, f"must be at least {low}") for key, low in _LOWEST.items() if given.get(key, low) < low
        ]
        found += [(key, "must be above 0") for key in _POSITIVE if given.get(key, 1) <= 0]
        found += [(key, message) for key, message in _exclusive(given) if key in given]
        if given.get("max_steps") == 0:
            found.append(("max_steps", "must be at least 1, or -1 for num_train_epochs to decide"))
        if given.get("dataset_streaming") and given.get("max_steps", -1) < 1:
            found.append(("dataset_streaming", "needs max_steps: nobody knows how long a stream is"))
        found += eval_tasks_contradictions(given) + hub_contradictions(given)
        return found + _schedule_problems(given) + ([] if found else _shape_problems(given))

    def parents(self) -> dict[str, tuple[str, Kind | None]]:
        """The tokenizer's directory, where that is a model's."""
        path = self.tokenizer_name_or_path
        if path and (Path(path) / "config.json").exists():
            return {"tokenizer_name_or_path": (path, None)}
        return {}

    def data(self) -> list[dict[str, Any]]:
        """Fingerprints of the text, and of a tokenizer that lies in a directory of its own."""
        prints = [data_fingerprint(self, "train"), data_fingerprint(self, "validation")]
        tokenizer = Path(self.tokenizer_name_or_path or "") / "tokenizer.json"
        if self.tokenizer_name_or_path and not self.parents() and tokenizer.exists():
            sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
            prints.append({"name": self.tokenizer_name_or_path, "split": "tokenizer", "sha256": sha256})
        return prints

    def run(self, run: Run) -> None:
        """Train, and publish the model directory."""
        from trueup.base.pretrain_loop import pretrain

        pretrain(self, run)


_LOWEST = {
    "vocab_size": 279,  # the special tokens and the bytes
    "max_length": 2,
    "warmup_steps": 0,
    "weight_decay": 0,
    "seed": 0,
    **dict.fromkeys(
        (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "max_position_embeddings", "per_device_train_batch_size",
            "per_device_eval_batch_size", "gradient_accumulation_steps", "max_eval_tokens",
            "save_total_limit",
        ),
        1,
    ),
}  # fmt: skip
_POSITIVE = (
    "num_train_epochs", "learning_rate", "muon_learning_rate", "max_grad_norm", "adam_epsilon",
    "eval_steps", "save_steps", "logging_steps",
)  # fmt: skip


def _exclusive(given: dict[str, Any]) -> list[tuple[str, str]]:
    """Keys that mean nothing beside another one."""
    found = []
    if given.get("max_steps", -1) > 0:
        found.append(("num_train_epochs", "and max_steps both say how long to train; delete one"))
    if "tokenizer_name_or_path" in given:
        found.append(("vocab_size", "is the tokenizer's own with tokenizer_name_or_path; delete one"))
    if given.get("bf16") and given.get("fp16"):
        found.append(("fp16", "and bf16 exclude each other; bf16 needs no loss scaling: delete fp16"))
    if given.get("optim") != "muon":
        found.append(("muon_learning_rate", "is read with optim: muon alone; add that, or delete it"))
    elif given.get("fp16"):
        found.append(("optim", "muon works in bf16: replace fp16 by bf16, or take adamw_torch_fused"))
    return found


def _schedule_problems(given: dict[str, Any]) -> list[tuple[str, str]]:
    known = SCHEDULE_DEFAULTS[given.get("lr_scheduler_type", "cosine")]
    return [
        ("lr_scheduler_kwargs", f"has {name}: {value!r}; it takes numbers from 0 up, as {', '.join(known)}")
        for name, value in given.get("lr_scheduler_kwargs", {}).items()
        if name not in known or not isinstance(value, int | float) or value < 0
    ]


def _shape_problems(given: dict[str, Any]) -> list[tuple[str, str]]:
    """What GPTConfig finds wrong with the shape; its messages begin with `field=value`."""
    names = {key.name for key in fields(GPTArguments)}
    shape = GPTArguments(**{key: value for key, value in given.items() if key in names})
    try:
        shape.gpt_config(given.get("max_length", PretrainRecipe.max_length))
    except (StrictDataclassError, ValueError, TypeError) as error:  # the last line is the one that counts
        message = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        field_name, equals, rest = message.partition("=")
        return [(field_name, rest)] if equals and field_name in names else [("hidden_size", message)]
    if (shape.max_position_embeddings or 1 << 62) < given.get("max_length", PretrainRecipe.max_length):
        return [("max_position_embeddings", "is smaller than max_length")]
    return []
