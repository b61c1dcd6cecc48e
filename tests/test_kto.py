"""KTO: the loss is its paper's, pairs are taken apart and mixed, runs resume exactly."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import offline_models
import pytest
import torch
from offline_models import PAIRS, first_batch, log_probs, prepared, run, shake

from trueup.preference.offline_trainer import OfflineTrainer
from trueup.recipes.directory import identity, open_directory
from trueup.recipes.errors import TrueupError
from trueup.recipes.reader import RecipeError


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return offline_models.write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def recipe(tmp_path: Path, start: Path) -> Callable[..., Any]:
    return offline_models.recipe_maker(tmp_path, start, "kto")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_the_loss_is_that_of_the_paper(recipe: Any) -> None:
    """https://arxiv.org/abs/2402.01306, equations 7 and 8, with the KL from each prompt's wrong answers."""
    trainer = prepared(recipe(desirable_weight=1.5, undesirable_weight=0.5, beta=0.3))
    shake(trainer.model)
    batch = first_batch(trainer)
    mismatched = {key.removeprefix("KL_"): batch[key] for key in batch if key.startswith("KL_")}

    def log_ratios(rows: dict[str, torch.Tensor]) -> np.ndarray:
        both = zip(log_probs(trainer.model, rows), log_probs(trainer.ref_model, rows), strict=True)
        return np.array([float(ours.sum() - theirs.sum()) for ours, theirs in both])

    kl = max(0.0, log_ratios(mismatched).mean())
    good, ratio = batch["label"].bool().numpy(), log_ratios(batch)
    value = np.where(good, sigmoid(0.3 * (ratio - kl)), sigmoid(0.3 * (kl - ratio)))
    expected = (np.where(good, 1.5, 0.5) * (1 - value)).mean()
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected, rel=1e-4)
    assert not np.allclose(ratio, 0, atol=0.1)


def test_pairs_are_taken_apart_and_mixed(recipe: Any) -> None:
    trainer = prepared(recipe(validation_split_size=0.1))
    labels = trainer.train_dataset["label"][:]
    assert sum(labels) == len(labels) / 2
    batches = [labels[place : place + 4] for place in range(0, len(labels), 4)]
    assert len({sum(batch) for batch in batches}) > 2  # neither all of one side, nor each pair together
    rows = list(trainer.train_dataset)
    same = sum(a["prompt"] == b["prompt"] for a, b in pairwise(rows))
    assert same < len(rows) / 10
    assert prepared(recipe(validation_split_size=0.1)).train_dataset["label"][:] == labels


STARTS: dict[str, dict[str, Any]] = {
    "kto": {"desirable_weight": 2.0},
    "apo, LoRA": {"loss_type": "apo_zero_unpaired", "use_peft": True},
    "precomputed": {"precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("keys", STARTS.values(), ids=STARTS)
def test_a_right_start_is_checked(recipe: Any, keys: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = prepared(recipe(**keys))
    batch = first_batch(trainer)
    trainer.check_start(trainer.model, batch)
    assert f"({keys.get('loss_type', 'kto')}) as it must be, margins 0" in capsys.readouterr().out
    if trainer.ref_model is not None:
        shake(trainer.ref_model)
        with pytest.raises(TrueupError, match=r"nats from the reference, and it must be 0"):
            trainer.check_start(trainer.model, batch)


@pytest.mark.parametrize("keys", [{}, {"use_peft": True, "lora_r": 8}], ids=["full", "lora"])
def test_it_learns_from_labels_and_publishes(recipe: Any, start: Path, keys: dict[str, Any]) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "wanted": "indeed"}
        for row in PAIRS
        for side in ("chosen", "rejected")
    ]
    out = run(recipe(rows, max_steps=20, eval_steps=10, save_steps=10, **keys))
    record = open_directory(out, "causal-lm").record
    assert record["parents"]["model_name_or_path"]["identity"] == identity(start)
    assert record["metrics"]["eval_rewards/margins"] > 0.5
    assert record["metrics"]["eval_kl"] > 0
    points = [json.loads(line) for line in (out / "frontier.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [0, 10, 20]


def test_a_run_that_died_goes_on_to_the_same_bits(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(recipe(name="whole"))
    step = OfflineTrainer.training_step

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise RuntimeError("power cut")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OfflineTrainer, "training_step", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            run(recipe(name="broken"))
    assert identity(run(recipe(name="broken"))) == identity(whole)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "train_sampling_strategy": ({"train_sampling_strategy": "random"}, "must be sequential"),
    "per_device_train_batch_size": ({"per_device_train_batch_size": 1}, "must be above 1"),
    "desirable_weight": ({"desirable_weight": 0}, "above 0"),
    "beta": ({"beta": -1}, "above 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_keys_that_cannot_be_are_errors(recipe: Any, name: str) -> None:
    keys, message = WRONG[name]
    with pytest.raises(RecipeError, match=rf"out\.yaml:\d+: {name} .*{message}"):
        recipe(**keys)


def test_one_kind_of_answer_is_not_enough(recipe: Any) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in PAIRS]
    with pytest.raises(TrueupError, match="only good answers, and KTO learns from both"):
        prepared(recipe(rows, scorers="unset"))
