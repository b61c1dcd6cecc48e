"""Recipes in the layout of the alignment-handbook and of TRL's command run as they stand, or say why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from offline_models import PAIRS
from sft_models import ROWS, run

from trueup.app.cli import explain
from trueup.recipes.directory import read_json
from trueup.recipes.errors import UsageError
from trueup.recipes.reader import RecipeError, read_recipe
from trueup.recipes.retired import RETIRED
from trueup.recipes.schema import schema_of
from trueup.recipes.stages import stage_class

UNMARKED = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# The handbook of 2023: a mixer, splits by name, the template in the file, keys of Transformers 4.
SFT = """
# Model arguments
model_name_or_path: {base}
model_revision: main
tokenizer_name_or_path: {base}
torch_dtype: float32
use_flash_attention_2: false

# Data training arguments
chat_template: "{template}"
dataset_mixer:
  {data}: 1.0
dataset_splits:
- train_sft
- test_sft
preprocessing_num_workers: null

# SFT trainer config
bf16: false
do_eval: true
evaluation_strategy: epoch
gradient_accumulation_steps: 1
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
hub_model_id: tiny-sft
hub_model_revision: v1.0
hub_strategy: every_save
learning_rate: 2.0e-05
log_level: info
logging_steps: 5
logging_strategy: steps
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_seq_length: 64
max_steps: -1
num_train_epochs: 1
optim: adamw_torch
output_dir: {out}
overwrite_output_dir: true
packing: true
packing_strategy: ffd
per_device_eval_batch_size: 16
per_device_train_batch_size: 16
push_to_hub: false
remove_unused_columns: true
report_to:
- none
save_strategy: "no"
save_total_limit: null
seed: 42
use_liger: false
warmup_ratio: 0.1
"""

# The handbook of 2025: a nested mixture, columns, weights; LoRA.
DPO = """
model_name_or_path: {base}
torch_dtype: null

dataset_mixture:
  datasets:
  - id: {data}
    config: null
    split: train
    columns:
    - prompt
    - chosen
    - rejected
    weight: 0.5
  seed: 0
  test_split_size: 0.2
dataset_num_proc: null

use_peft: true
lora_r: 4
lora_alpha: 8
lora_dropout: 0.0
lora_target_modules:
- qkv_proj
- o_proj

bf16: false
beta: 0.05
do_eval: true
eval_strategy: steps
eval_steps: 100
generate_during_eval: false
gradient_accumulation_steps: 1
gradient_checkpointing: false
learning_rate: 5.0e-6
log_level: warning
logging_steps: 1
lr_scheduler_type: cosine
max_length: 64
max_prompt_length: 32
loss_type: sigmoid
num_train_epochs: 1
optim: adamw_torch
output_dir: {out}
per_device_train_batch_size: 8
per_device_eval_batch_size: 8
push_to_hub: false
reference_free: false
rpo_alpha: null
save_strategy: steps
save_steps: 100
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
"""

# What `trl sft --config` takes.
TRL = """
model_name_or_path: {base}
datasets:
- path: {data}
  split: train
  columns: [messages]
streaming: false
test_split_size: 0.2
learning_rate: 1.0e-4
lr_scheduler_type: cosine
max_steps: 2
max_length: 64
packing: false
eval_strategy: "no"
output_dir: {out}
report_to: none
bf16: false
use_liger_kernel: false
"""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def written(tmp_path: Path, base: Path, write_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """The file of a recipe above, about a data set of this test."""
    write(tmp_path / "chats" / "train_sft.jsonl", ROWS[:40])
    write(tmp_path / "chats" / "test_sft.jsonl", ROWS[40:])
    write(tmp_path / "pairs" / "train.jsonl", [{**row, "source": "x"} for row in PAIRS])

    def fill(text: str, data: str, **places: str) -> Path:
        usual = {"base": base, "data": tmp_path / data, "out": tmp_path / "out", "template": UNMARKED}
        return write_recipe(text.format(**usual | places))

    return fill


def noted(recipe: Any) -> list[str]:
    """The keys that were translated, in the file's order."""
    return [note.split(": ")[1].split(" is retired")[0] for note in recipe.notes]


def test_a_handbook_sft_recipe_runs_as_it_stands(
    written: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    recipe = read_recipe(written(SFT, "chats"), "sft")
    assert noted(recipe) == [
        "tokenizer_name_or_path", "torch_dtype", "use_flash_attention_2", "chat_template", "dataset_mixer",
        "dataset_splits", "preprocessing_num_workers", "evaluation_strategy", "hub_model_revision",
        "max_seq_length", "overwrite_output_dir", "packing_strategy", "use_liger", "warmup_ratio",
    ]  # fmt: skip
    out = run(recipe)
    record = read_json(out / "trueup.json")
    assert record["metrics"]["trained_fraction"] == 1.0, "the template marks nothing, so all is trained"
    assert (out / "chat_template.jinja").read_text() == UNMARKED
    held = next(part for part in record["data"] if part["split"] == "validation")
    assert "shares" not in held, "the set's own test_sft is what is scored"
    assert record["metrics"]["eval_loss"] > 0
    assert not [str(w.message) for w in recwarn if "gradient_checkpointing" in str(w.message)]


def test_a_handbook_dpo_recipe_runs_as_it_stands(written: Any) -> None:
    recipe = read_recipe(written(DPO, "pairs"), "dpo")
    assert recipe.values["dtype"] == "float32"
    assert recipe.values["validation_split_size"] == 0.2
    assert recipe.values["datasets"][0]["weight"] == 0.5
    out = run(recipe)
    record = read_json(out / "trueup.json")
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert record["metrics"]["eval_loss"] > 0


def test_a_recipe_of_trls_command_runs_as_it_stands(written: Any) -> None:
    recipe = read_recipe(written(TRL, "chats"), "sft")
    assert noted(recipe) == ["streaming"]
    assert (run(recipe) / "model.safetensors").exists()


def test_what_a_recipe_asks_of_another_machine_is_named(written: Any) -> None:
    """Many recipes name an attention that needs a GPU and a package."""
    path = written(TRL + "attn_implementation: flash_attention_2\n", "chats")
    with pytest.raises(UsageError, match=r"with attn_implementation: flash_attention_2: .*FlashAttention2"):
        run(read_recipe(path, "sft"))
    message, code = explain(ImportError("liger-kernel is not available: `pip install liger-kernel`"))
    assert (message, code) == ("liger-kernel is not available: `pip install liger-kernel`", 1)


KEYS = "model_name_or_path: m\noutput_dir: o/x\ndataset_name: d\n"
TRANSLATED = {
    "rows of each set": (
        "dataset_mixer: {a: 1.0, b: 0.3}\ndataset_configs: [null, en]\ndataset_splits: [train, test]",
        {"datasets": [{"path": "a"}, {"path": "b", "name": "en", "weight": 0.3}]}
        | {"dataset_train_split": "train", "dataset_validation_split": "test"},
    ),
    "several splits to train on": (
        "dataset_mixer: {a: 1}\ndataset_splits: [train_sft, train_gen, test_sft]",
        {"datasets": [{"path": "a", "split": "train_sft"}, {"path": "a", "split": "train_gen"}]},
    ),
    "a template with marks": (
        "chat_template: '{% generation %}{{ messages }}{% endgeneration %}'",
        {"assistant_only_loss": None},
    ),
    "a template without": ("chat_template: '{{ messages }}'", {"assistant_only_loss": False}),
    "an empty dtype": ("torch_dtype:", {"dtype": "float32"}),
    "long prompts": ("max_seq_length: 64", {"max_length": 64}),
    "reentrant": (
        "gradient_checkpointing_use_reentrant: false",
        {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "liger": ("use_liger: true", {"use_liger_kernel": True}),
    "packing": ("packing_strategy: bfd-requeue", {"packing_strategy": "bfd_split"}),
    "optimizer": ("optim: adamw_hf", {"optim": "adamw_torch"}),
    "the same tokenizer": ("tokenizer_name_or_path: m", {}),
    "switched off": ("env: null\ntruncation_side: right\nwandb_project: null", {}),
}
REFUSED = {
    "rows to hold out": (
        "dataset_mixture: {datasets: [{id: a}], test_split_size: 1000}",
        "holds out 1000 rows; today: validation_split_size, a share",
    ),
    "unknown part": (
        "dataset_mixture: {datasets: [{id: a}], sed: 1}",
        "has sed, which the handbook's did not",
    ),
    "other tokenizer": ("tokenizer_name_or_path: other", "the tokenizer is the one in the model's directory"),
    "cut at the left": ("truncation_side: left", "today: truncation_mode: keep_end"),
    "environment": ("env: {CUDA_VISIBLE_DEVICES: 0}", "set environment variables in the shell"),
    "processes": ("num_processes: 8", "torchrun --nproc_per_node N"),
    "accelerate": ("accelerate_config: zero3", "--config_file CONFIG"),
    "wandb": ("wandb_project: x", "WANDB_PROJECT"),
    "slices": ("max_train_samples: 100", "train[:1000]"),
    "prompts": ("max_prompt_length: 64", "today: max_length, with truncation_mode"),
}


@pytest.mark.parametrize(("lines", "expected"), TRANSLATED.values(), ids=TRANSLATED)
def test_old_keys_say_the_same_today(write_recipe: Any, lines: str, expected: dict[str, Any]) -> None:
    recipe = read_recipe(write_recipe(KEYS + lines), "sft")
    assert {key: recipe.values[key] for key in expected} == expected
    assert len(recipe.notes) == len(lines.splitlines())


@pytest.mark.parametrize(("line", "message"), REFUSED.values(), ids=REFUSED)
def test_or_are_refused_with_what_replaced_them(write_recipe: Any, line: str, message: str) -> None:
    path = write_recipe(KEYS + line)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, "sft")
    assert caught.value.problems[0].startswith(f"{path}:4: {line.split(':')[0]} is retired: ")
    assert message in str(caught.value)


# Every field that SFTConfig, DPOConfig, ModelConfig and ScriptArguments had since TRL 0.7, TrainingArguments
# since Transformers 4.36, and the handbook since its first release, and that is gone or that they often set.
COMMON = """
torch_dtype gradient_checkpointing_use_reentrant ignore_bias_buffers sanity_check streaming
base_model_revision tokenizer_name_or_path model_code_revision use_flash_attention_2 dataset_mixture
dataset_mixer dataset_splits dataset_configs chat_template max_train_samples max_eval_samples truncation_side
auto_insert_empty_system_msg preprocessing_num_workers text_column hub_model_revision wandb_project
wandb_entity wandb_run_group dispatch_batches split_batches mp_parameters evaluation_strategy warmup_ratio
group_by_length overwrite_output_dir no_cuda use_ipex fp16_backend half_precision_backend torchdynamo
push_to_hub_model_id push_to_hub_token push_to_hub_organization include_tokens_per_second adafactor
save_safetensors logging_dir per_gpu_train_batch_size per_gpu_eval_batch_size ray_scope jit_mode_eval
fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap tpu_metrics_debug past_index do_train do_eval
"""
FIELDS = {
    "sft": "max_seq_length num_of_sequences chars_per_token dataset_batch_size use_liger eos_token packing",
    "dpo": "max_prompt_length max_completion_length max_target_length rpo_alpha generate_during_eval "
    "is_encoder_decoder label_pad_token_id padding_value model_adapter_name ref_adapter_name "
    "force_use_ref_model reference_free ref_model_init_kwargs base_model_attribute_name tools "
    "use_liger_loss use_logits_to_keep use_num_logits_to_keep padding_free",
}


@pytest.mark.parametrize("stage", FIELDS)
def test_no_key_of_older_versions_is_unknown(stage: str) -> None:
    schema = schema_of(stage_class(stage))
    assert [k for k in (COMMON + FIELDS[stage]).split() if k not in schema and k not in RETIRED] == []
