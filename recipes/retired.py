"""Keys that TRL, Transformers or the alignment-handbook once had: one table.

A key stands here only if it is gone. Where the meaning is the same it is translated, and said so; where it is
not, it is refused with the replacement named. So recipes written for other versions run, or say why not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Refused(ValueError):
    """The retired key cannot be translated; the message names the replacement."""


@dataclass(frozen=True)
class Retired:
    """What became of a key: `translate(value, given)` returns the keys that say the same today."""

    translate: Callable[[Any, dict[str, Any]], dict[str, Any]]
    why: str


def _renamed(new: str) -> Retired:
    return Retired(lambda value, given: {new: value}, f"now called {new}")


def _dropped(why: str) -> Retired:
    return Retired(lambda value, given: {}, why)


def _refused(why: str) -> Retired:
    def refuse(value: Any, given: dict[str, Any]) -> dict[str, Any]:
        if value is None or value is False:  # off, as today without the key
            return {}
        raise Refused(why)

    return Retired(refuse, why)


def _only(allowed: tuple[Any, ...], why: str) -> Retired:
    """A key that may go where its value is what happens anyway."""

    def check(value: Any, given: dict[str, Any]) -> dict[str, Any]:
        if value is not None and value not in allowed:
            raise Refused(why)
        return {}

    return Retired(check, why)


def _warmup_ratio(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    if given.get("warmup_steps"):
        raise Refused(
            "warmup_steps is given too, and takes its place: a value below 1 is a share of the steps"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise Refused(
            f"takes a share in [0, 1), not {value!r}; today: warmup_steps, below 1 a share of the steps"
        )
    return {"warmup_steps": float(value)}


def _rpo_alpha(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    if value is None:
        return {}
    if "loss_weights" in given or given.get("loss_type", "sigmoid") not in ("sigmoid", ["sigmoid"]):
        raise Refused(
            "today: loss_type: [sigmoid, sft] with loss_weights: [1, alpha]; put the SFT term there"
        )
    return {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, value]}


def _torch_dtype(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": "float32" if value is None else value}  # left empty, torch's default was meant


def _max_prompt_length(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Where max_length is named, nothing grows longer for want of it."""
    if value is None or given.get("max_length"):
        return {}
    raise Refused("TRL limits prompt and completion together today: max_length, with truncation_mode")


def _chat_template(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Handbook: the template itself. Those without marks trained every token, which TRL has to be told."""
    if value is None:
        return {}
    marked = "endgeneration" in str(value) or "assistant_only_loss" in given
    return {"chat_template_path": value} | ({} if marked else {"assistant_only_loss": False})


def _tokenizer(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    if value is not None and value != given.get("model_name_or_path"):
        raise Refused("the tokenizer is the one in the model's directory; save the other one there")
    return {}


def _use_reentrant(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"gradient_checkpointing_kwargs": {"use_reentrant": value}}


def _flash_attention(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"attn_implementation": "flash_attention_2"} if value else {}


def _use_cuda(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"use_cpu": bool(value)}


def _group_by_length(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"train_sampling_strategy": "group_by_length"} if value else {}


def _adafactor(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"optim": "adafactor"} if value else {}


def _dataset_splits(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Handbook, 2023: `dataset_splits: [train_sft, test_sft]`. Several of one kind go into `datasets`."""
    train, held = _splits(value)
    if len(train) > 1 or len(held) > 1:
        return {}
    names = {"dataset_train_split": train, "dataset_validation_split": held}
    return {key: found[0] for key, found in names.items() if found}


def _splits(value: Any) -> tuple[list[str], list[str]]:
    """(splits to train on, splits to score), told apart by their names as the handbook did."""
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    held = [name for name in names if "test" in name and "train" not in name]
    return [name for name in names if name not in held], held


def _dataset_mixer(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Handbook, 2023: `dataset_mixer: {id: share of its rows}`, beside dataset_splits and dataset_configs."""
    if not isinstance(value, dict):
        raise Refused("takes a mapping of data set to share; today: datasets: [{path: ..., weight: ...}]")
    configs = given.get("dataset_configs") or [None] * len(value)
    if not isinstance(configs, list) or len(configs) != len(value):
        raise Refused("needs as many dataset_configs as sets; today: datasets: [{path: ..., name: ...}]")
    train, held = _splits(given.get("dataset_splits") or [])
    splits = train if len(train) > 1 or len(held) > 1 else [None]
    entries = [
        {"path": path, "name": name, "weight": None if share == 1 else share, "split": split}
        for (path, share), name in zip(value.items(), configs, strict=True)
        for split in splits
    ]
    return {"datasets": [_present(entry) for entry in entries]}


def _dataset_mixture(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Handbook, 2025: nested `dataset_mixture: {datasets: [{id, config, split, columns, weight}], ...}`."""
    sets = value.get("datasets") if isinstance(value, dict) else None
    if not isinstance(sets, list) or not all(isinstance(entry, dict) for entry in sets):
        raise Refused("today: datasets: [{path: ..., name: ..., split: ..., columns: [...], weight: ...}]")
    if unknown := set(value) - {"datasets", "seed", "test_split_size"}:
        raise Refused(f"has {', '.join(sorted(unknown))}, which the handbook's did not; take it out")
    new = {"id": "path", "config": "name"}
    rows = [_present({new.get(key, key): found for key, found in entry.items()}) for entry in sets]
    held = value.get("test_split_size")
    if held is not None and not (isinstance(held, int | float) and 0 <= held < 1):
        raise Refused(
            f"holds out {held} rows; today: validation_split_size, a share of the prompts, say 0.05"
        )
    return {"datasets": rows} | ({} if held is None else {"validation_split_size": held})


def _present(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value is not None}


_DIRECTORY = "an output is replaced only when the new one is complete, and the old one is kept beside it"
_BATCHES = "today: per_device_train_batch_size x gradient_accumulation_steps, cut into num_mini_batches"
_REMOVED = "removed from Transformers and without effect here"
_SLICES = "today: a slice of the split, such as train[:1000], or weight in an entry of datasets"
_WANDB = "wandb reads it from the environment: WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP"

RETIRED: dict[str, Retired] = {
    # Transformers
    "torch_dtype": Retired(_torch_dtype, "now called dtype"),
    "evaluation_strategy": _renamed("eval_strategy"),
    "per_gpu_train_batch_size": _renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": _renamed("per_device_eval_batch_size"),
    "no_cuda": Retired(_use_cuda, "now called use_cpu"),
    "warmup_ratio": Retired(_warmup_ratio, "now warmup_steps, where a value below 1 is a share of the steps"),
    "group_by_length": Retired(_group_by_length, "now train_sampling_strategy: group_by_length"),
    "adafactor": Retired(_adafactor, "now optim: adafactor"),
    "use_flash_attention_2": Retired(_flash_attention, "now attn_implementation: flash_attention_2"),
    "push_to_hub_model_id": _renamed("hub_model_id"),
    "push_to_hub_token": _renamed("hub_token"),
    "push_to_hub_organization": _refused("today: hub_model_id: ORGANIZATION/NAME"),
    "dispatch_batches": _refused("today: accelerator_config: {dispatch_batches: ...}"),
    "split_batches": _refused("today: accelerator_config: {split_batches: ...}"),
    "mp_parameters": _dropped(_REMOVED),
    "overwrite_output_dir": _dropped(_DIRECTORY),
    "save_safetensors": _dropped("weights are always safetensors"),
    "logging_dir": _dropped("logs are written to the run's work directory"),
    "use_mps_device": _dropped("the device is chosen by itself"),
    "use_legacy_prediction_loop": _dropped(_REMOVED),
    "past_index": _dropped(_REMOVED),
    "tpu_num_cores": _dropped(_REMOVED),
    "tpu_metrics_debug": _dropped(_REMOVED),
    "jit_mode_eval": _dropped(_REMOVED),
    "use_ipex": _dropped(_REMOVED),
    "fp16_backend": _dropped(_REMOVED),
    "fp16_opt_level": _dropped(_REMOVED),
    "half_precision_backend": _dropped(_REMOVED),
    "ray_scope": _dropped(_REMOVED),
    "torchdynamo": _refused("today: torch_compile: true with torch_compile_backend"),
    "fsdp_min_num_params": _refused("today: fsdp_config: {min_num_params: ...}"),
    "fsdp_transformer_layer_cls_to_wrap": _refused(
        "today: fsdp_config: {transformer_layer_cls_to_wrap: ...}"
    ),
    "include_inputs_for_metrics": _refused("today: include_for_metrics: [inputs]"),
    "gradient_checkpointing": _renamed("activation_checkpointing"),
    "include_tokens_per_second": _dropped("tokens per second are always reported"),
    # TRL
    "max_seq_length": _renamed("max_length"),
    "num_of_sequences": _refused(
        "today: max_length and packing_strategy; a packed batch is sized by its rows"
    ),
    "chars_per_token": _dropped("packing counts tokens itself"),
    "dataset_batch_size": _dropped("packing chooses its own batches"),
    "max_prompt_length": Retired(
        _max_prompt_length,
        "max_length holds prompt and completion together; a prompt is no longer cut by itself, and a row "
        "without room for its answer is left out and counted",
    ),
    "max_completion_length": _refused("TRL limits prompt and completion together in this stage: max_length"),
    "max_target_length": _refused("TRL limits prompt and completion together today: max_length"),
    "rpo_alpha": Retired(_rpo_alpha, "now loss_type: [sigmoid, sft] with loss_weights: [1, alpha]"),
    "generate_during_eval": _refused("sample texts are shown every eval_steps; use eval_tasks for more"),
    "is_encoder_decoder": _refused("only decoder models are trained here"),
    "label_pad_token_id": _dropped("labels are masked with -100"),
    "force_use_ref_model": _dropped("the reference is always a directory, or the adapter switched off"),
    "ref_model_mixup_alpha": _refused("today: sync_ref_model with ref_model_sync_steps"),
    "reward_model_path": _renamed("reward_model_name_or_path"),
    "sft_model_path": _renamed("model_name_or_path"),
    "num_sample_generations": _dropped("completions are kept at every eval_steps"),
    "stop_token": _dropped("a completion always ends at eos"),
    "stop_token_id": _refused("today: eos_token_id in the model's generation_config.json"),
    "num_total_batches": _renamed("max_steps"),
    "local_batch_size": _refused(_BATCHES),
    "micro_batch_size": _refused(_BATCHES),
    "mini_batch_size": _refused(_BATCHES),
    "local_mini_batch_size": _refused(_BATCHES),
    "batch_size": _refused(_BATCHES),
    "model_adapter_name": _refused("the policy is the adapter that use_peft makes"),
    "ref_adapter_name": _refused("the reference is the adapter switched off"),
    "ds3_gather_for_generation": _dropped("weights are gathered where it is needed"),
    "dataset_num_proc": _dropped("prompts are encoded where they are sampled from"),
    "world_size": _dropped("the launcher says it"),
    "init_kl_coef": _renamed("kl_coef"),
    "ppo_epochs": _renamed("num_ppo_epochs"),
    "lora_task_type": _dropped("the task follows from the stage"),
    "use_unsloth": _refused("only TRL's own path is supported"),
    "use_liger": _renamed("use_liger_kernel"),
    "use_liger_loss": _renamed("use_liger_kernel"),
    "base_model_attribute_name": _dropped("found by itself"),
    "padding_value": _dropped("rows are padded with the tokenizer's pad token, and masked"),
    "ref_model_init_kwargs": _refused("the reference is loaded as the model is, by dtype and the like"),
    "reference_free": _refused("a loss is always against a reference here; take it out"),
    "tools": _refused("today: a column `tools` of the rows"),
    "use_logits_to_keep": _dropped("logits are computed where they are needed"),
    "use_num_logits_to_keep": _dropped("logits are computed where they are needed"),
    "gradient_checkpointing_use_reentrant": Retired(
        _use_reentrant, "now gradient_checkpointing_kwargs: {use_reentrant: ...}"
    ),
    "ignore_bias_buffers": _dropped("models of today have no such buffers"),
    "streaming": _renamed("dataset_streaming"),
    "sanity_check": _refused("today: max_steps, or a budget of the recipe"),
    "truncation_mode": _only(("keep_start",), "an answer is cut at its end; drop rows with long prompts"),
    # what `trl` reads from the same file, and does before it trains
    "env": _refused("set environment variables in the shell: NAME=value trueup ..."),
    "accelerate_config": _refused(
        'today: trueup run FILE --launcher "python -m accelerate.commands.launch --config_file CONFIG"'
    ),
    "num_processes": _refused('today: trueup run FILE --launcher "torchrun --nproc_per_node N"'),
    # alignment-handbook
    "dataset_mixer": Retired(_dataset_mixer, "now datasets: [{path: ..., weight: ...}]"),
    "dataset_mixture": Retired(
        _dataset_mixture, "now datasets: [{path: ..., ...}], not nested; rows are shuffled by seed"
    ),
    "dataset_splits": Retired(
        _dataset_splits, "now dataset_train_split and dataset_validation_split, or split in datasets"
    ),
    "dataset_configs": _dropped("each entry of datasets has its name"),
    "chat_template": Retired(
        _chat_template,
        "now chat_template_path, and a template that does not mark the assistant's turns needs "
        "assistant_only_loss: false",
    ),
    "hub_model_revision": _renamed("hub_revision"),
    "truncation_side": _only(("right",), "today: truncation_mode: keep_end"),
    "base_model_revision": _refused("an adapter is merged first: trueup merge"),
    "max_train_samples": _refused(_SLICES),
    "max_eval_samples": _refused(_SLICES),
    "wandb_project": _refused(_WANDB),
    "wandb_entity": _refused(_WANDB),
    "wandb_run_group": _refused(_WANDB),
    "preprocessing_num_workers": _renamed("dataset_num_proc"),
    "auto_insert_empty_system_msg": _dropped("the chat template decides on system messages"),
    "text_column": _renamed("dataset_text_field"),
    "model_code_revision": _renamed("model_revision"),
    "tokenizer_name": Retired(_tokenizer, "the tokenizer is the one in the model's directory"),
    "tokenizer_name_or_path": Retired(_tokenizer, "the tokenizer is the one in the model's directory"),
    "do_train": _dropped("a stage always trains"),
}

# Values of keys that are still there: (key, old) -> today's, the same by another name.
RETIRED_VALUES: dict[tuple[str, str], str] = {
    ("packing_strategy", "ffd"): "bfd",
    ("packing_strategy", "bfd-requeue"): "bfd_split",
    ("loss_type", "aot_pair"): "aot",
    ("optim", "adamw_hf"): "adamw_torch",
    ("optim", "adamw_apex_fused"): "adamw_torch_fused",
}
