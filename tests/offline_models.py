"""Pairs and recipes small enough to train on in a second: shared by the tests of DPO and KTO."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sft_models import write_base

from trueup.recipes.reader import Recipe, read_recipe
from trueup.recipes.run import open_run

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"what is {i} times {i % 7}?"}],
        "chosen": [{"role": "assistant", "content": f"it is {i * (i % 7)}" + " indeed" * (i % 4)}],
        "rejected": [{"role": "assistant", "content": "what is it?" * (1 + i % 3) + str(i)}],
        "wanted": "indeed",
    }
    for i in range(60)
]


def says(prompts: Any, completions: Any, wanted: list[str], **columns: Any) -> list[float]:
    """A scorer that needs a column of the data: how often the wanted letters stand in an answer."""
    texts = [one[0]["content"] for one in completions]
    return [sum(letter in text for letter in word) / 6 for text, word in zip(texts, wanted, strict=True)]


def wanes(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A scorer that finds less at each look, whatever it sees."""
    wanes.looks = getattr(wanes, "looks", 0) + 1  # type: ignore[attr-defined]
    return [-float(wanes.looks)] * len(completions)  # type: ignore[attr-defined]


def write_start(path: Path, **shape: Any) -> Path:
    """The model that training starts from; it has dropout of both kinds."""
    return write_base(path, attention_dropout=0.1, **shape)


def recipe_maker(folder: Path, start: Path, stage: str) -> Callable[..., Recipe]:
    """make(rows, name, **keys): a recipe on a few pairs, with some keys of its own."""

    def make(rows: list[dict[str, Any]] | None = None, name: str = "out", **keys: Any) -> Recipe:
        data = folder / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows or PAIRS))
        values = {
            "stage": stage,
            "model_name_or_path": str(start),
            "dataset_name": str(data),
            "output_dir": str(folder / name),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "eval_steps": 2,
            "max_eval_prompts": 4,
            "max_new_tokens": 8,
            "scorers": ["offline_models:says"],
            "validation_split_size": 0.2,
            "use_cpu": True,
            "bf16": False,
            "log_completions": False,
            "disable_tqdm": True,
        } | keys
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "unset"}))
        return read_recipe(path)

    return make


def run(recipe: Recipe) -> Path:
    """Run a recipe in this process; its model directory."""
    ready, stage = open_run(recipe)
    with ready.working():
        stage.run(ready)
    return ready.output_dir


def prepared(recipe: Recipe, **options: Any) -> Any:
    """The stage's trainer with its data prepared, not yet trained."""
    work_dir = Path(f"{recipe.values['output_dir']}.work")
    return recipe.build().trainer(recipe.values, work_dir, **{"chosen_length": False} | options)


def first_batch(trainer: Any) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def shake(model: Any, seed: int = 0, size: float = 0.02) -> None:
    """Move all weights a little, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def log_probs(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """log p of each answer's tokens, row by row without padding, in fp64."""
    model.eval()
    found = []
    with torch.no_grad():
        for ids, real, answer in zip(
            batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
        ):
            logits = model(input_ids=ids[real][None]).logits[0].double().log_softmax(-1)
            all_tokens = logits[:-1].gather(1, ids[real][1:, None])[:, 0]
            found.append(all_tokens[answer[real][1:]])
    return found
