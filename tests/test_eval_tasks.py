"""`eval_tasks:` in a recipe: measured at each evaluation of every stage, without effect on the training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval_models
import ppo_models
import pytest
from harness_models import quiz

from trueup.app.runner import run_stage
from trueup.base.trainer import Measuring
from trueup.eval.harness import TaskMeasure
from trueup.recipes.directory import RECORD, read_json
from trueup.recipes.errors import UsageError
from trueup.recipes.reader import RecipeError, read_recipe


def log(directory: Path) -> list[dict[str, Any]]:
    path = directory.with_name(f"{directory.name}.work") / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sft_measures_at_each_evaluation_and_trains_the_same_model(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    keys = {"eval_strategy": "steps", "eval_steps": 3, "validation_split_size": 0.2, "output_dir": ""}
    folders = []
    for name, tasks in (
        ("plain", {}),
        ("measured", {"eval_tasks": [str(quiz(tmp_path))], "eval_tasks_limit": 3}),
    ):
        run_stage(recipe(name=name, **keys | {"output_dir": str(tmp_path / name)} | tasks))
        folders.append(tmp_path / name)
    found = {line["step"]: line["eval_quiz/acc"] for line in log(folders[1]) if "eval_quiz/acc" in line}
    assert list(found) == [0, 3, 6]
    records = [read_json(folder / RECORD) for folder in folders]
    assert records[1]["metrics"]["eval_quiz/acc"] == found[6]
    assert records[0]["identity"] == records[1]["identity"]
    assert (
        records[0]["inputs"] == records[1]["inputs"]
    )  # so a trained model is not trained again for a benchmark


def test_pretraining_measures_at_each_evaluation(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"number {i} is not {i + 1}"}) + "\n" for i in range(200)))
    keys = {
        "stage": "pretrain", "dataset_name": str(text), "output_dir": str(tmp_path / "base"),
        "vocab_size": 300,
        "max_length": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "max_steps": 2,
        "eval_steps": 1, "use_cpu": True, "bf16": False, "validation_split_size": 0.1,
        "eval_tasks": [str(quiz(tmp_path))],
    }  # fmt: skip
    run_stage(read_recipe(write_recipe(json.dumps(keys))))
    measured = [line["quiz/acc"] for line in log(tmp_path / "base") if "quiz/acc" in line]
    assert len(measured) == 2
    assert all(0 <= value <= 1 for value in measured)


@pytest.mark.parametrize(
    "adapter", [None, ppo_models.lora(ensure_weight_tying=True, modules_to_save=["embed_tokens"])]
)
def test_ppo_measures_its_policy_with_its_adapter(adapter: Any, tmp_path: Path) -> None:
    """Also where the adapter has a copy of a tied matrix, which tying anew would break."""
    trainer = ppo_models.trainer(
        tmp_path, eval_dataset=ppo_models.prompts(), peft_config=adapter, max_steps=1
    )
    seen = []

    def measure(model: Any, tokenizer: Any) -> dict[str, float]:
        seen.append(model)
        return TaskMeasure([str(quiz(tmp_path))], None, "eval_tasks")(model, tokenizer)

    trainer.add_callback(Measuring(trainer, measure))
    trainer.train()
    trainer.evaluate()
    assert seen == [trainer.policy] * 2
    assert [line["step"] for line in trainer.state.log_history if "eval_quiz/acc" in line] == [0, 1]


def test_tasks_are_loaded_before_anything_is_trained(recipe: Callable[..., Any], tmp_path: Path) -> None:
    chosen = recipe(
        eval_strategy="epoch", validation_split_size=0.2, eval_tasks=[str(tmp_path / "none.yaml")]
    )
    with pytest.raises(UsageError, match=r"out\.yaml:1: eval_tasks: .*none\.yaml"):
        run_stage(chosen)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval_strategy": "no", "eval_tasks": ["lab"]}, "eval_strategy is no"),
        ({"eval_tasks_limit": 5}, "is read with eval_tasks"),
        ({"eval_tasks": ["lab"], "eval_tasks_limit": 0}, "at least 1"),
        ({"stage": "reward", "eval_tasks": ["lab"]}, "a reward model says nothing"),
    ],
)
def test_keys_that_contradict_one_another_are_refused(
    keys: dict[str, Any], message: str, write_recipe: Callable[..., Path]
) -> None:
    usual = {"stage": "sft", "model_name_or_path": "m", "dataset_name": "d", "output_dir": "o/p"}
    with pytest.raises(RecipeError, match=message):
        read_recipe(write_recipe(json.dumps(usual | keys)))


def test_figures_are_named_by_task_and_metric(tmp_path: Path) -> None:
    found = TaskMeasure([str(quiz(tmp_path))], 2, "eval_tasks")(eval_models.policy(), eval_models.tokenizer())
    assert set(found) == {"quiz/acc", "quiz/acc_norm"}
