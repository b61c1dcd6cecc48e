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
        raise Refused(why)

    return Retired(refuse, why)


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


def _flash_attention(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"attn_implementation": "flash_attention_2"} if value else {}


def _use_cuda(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"use_cpu": bool(value)}


def _group_by_length(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"train_sampling_strategy": "group_by_length"} if value else {}


def _adafactor(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"optim": "adafactor"} if value else {}


def _dataset_mixer(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Handbook, 2023: `dataset_mixer: {id: fraction}` beside `dataset_splits: [train_sft, test_sft]`."""
    if not isinstance(value, dict):
        raise Refused(
            "takes a mapping of data set to fraction; today: datasets: [{path: ..., fraction: ...}]"
        )
    splits = given.get("dataset_splits") or ["train"]
    entry = {"split": next((s for s in splits if str(s).startswith("train")), splits[0])}
    rows = [{"path": name, **entry} for name in value]
    if len(set(value.values())) > 1:  # equal fractions of whole sets are a plain concatenation
        rows = [{**row, "fraction": float(share)} for row, share in zip(rows, value.values(), strict=True)]
    return {"datasets": rows}


def _dataset_mixture(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Handbook, 2025: nested `dataset_mixture: {datasets: [{id, config, split, columns, weight}], ...}`."""
    if not isinstance(value, dict) or not isinstance(value.get("datasets"), list):
        raise Refused("today: datasets: [{path: ..., name: ..., split: ..., columns: [...], fraction: ...}]")
    new = {"id": "path", "config": "name", "weight": "fraction"}
    rows = [{new.get(k, k): v for k, v in row.items()} for row in value["datasets"]]
    out: dict[str, Any] = {"datasets": rows}
    if value.get("test_split_size") is not None:
        out["test_split_size"] = value["test_split_size"]
    return out


_DIRECTORY = "an output is replaced only when the new one is complete, and the old one is kept beside it"
_BATCHES = "today: per_device_train_batch_size x gradient_accumulation_steps, cut into num_mini_batches"
_REMOVED = "removed from Transformers and without effect here"

RETIRED: dict[str, Retired] = {
    # Transformers
    "torch_dtype": _renamed("dtype"),
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
    "max_prompt_length": _refused(
        "TRL limits prompt and completion together today: max_length, with truncation_mode"
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
    # alignment-handbook
    "dataset_mixer": Retired(_dataset_mixer, "now datasets: [{path: ..., fraction: ...}]"),
    "dataset_mixture": Retired(_dataset_mixture, "now datasets: [{path: ..., ...}], not nested"),
    "dataset_splits": _dropped("each entry of datasets names its split"),
    "dataset_configs": _refused("today: datasets: [{path: ..., name: CONFIG}]"),
    "preprocessing_num_workers": _renamed("dataset_num_proc"),
    "auto_insert_empty_system_msg": _dropped("the chat template decides on system messages"),
    "text_column": _renamed("dataset_text_field"),
    "model_code_revision": _renamed("model_revision"),
    "tokenizer_name": _renamed("tokenizer_name_or_path"),
    "do_train": _dropped("a stage always trains"),
}
