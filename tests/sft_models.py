"""A base model small enough to train in a second, and recipes that start from it: shared by the SFT tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trueup.base import GPTConfig, GPTForCausalLM
from trueup.base.tokenizer import default_generation_config, train_tokenizer
from trueup.recipes.reader import Recipe, read_recipe
from trueup.recipes.run import open_run

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"what is {i} times {i}?"},
            {"role": "assistant", "content": f"it is {i * i}" + " indeed" * (i % 5)},
        ]
    }
    for i in range(60)
]


def write_base(path: Path, **shape: Any) -> Path:
    """A model of 2 layers, as pretraining would write it."""
    tokenizer = train_tokenizer([m["content"] for row in ROWS for m in row["messages"]], 320)
    torch.manual_seed(0)
    usual = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "residual_dropout": 0.1,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = GPTForCausalLM(GPTConfig(**usual | shape))
    model.generation_config = default_generation_config(tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def recipe_maker(folder: Path, base: Path) -> Callable[..., Recipe]:
    """make(rows, name, **keys): a recipe on a few conversations, with some keys of its own."""

    def make(rows: list[dict[str, Any]] | None = None, name: str = "out", **keys: Any) -> Recipe:
        data = folder / "rows.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in rows or ROWS))
        values = {
            "stage": "sft",
            "model_name_or_path": str(base),
            "dataset_name": str(data),
            "output_dir": str(folder / name),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_steps": 2,
            "use_cpu": True,
            "bf16": False,
            "eval_strategy": "no",
            "disable_tqdm": True,
        } | keys
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(values))
        return read_recipe(path)

    return make


def run(recipe: Recipe) -> Path:
    """Run a recipe in this process; its model directory."""
    ready, stage = open_run(recipe)
    with ready.working():
        stage.run(ready)
    return ready.output_dir
