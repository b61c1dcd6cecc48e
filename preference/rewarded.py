"""What recipes that train on a reward share: where the reward comes from, prompts with room."""

from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig

from trueup.base.data import DataArguments, Split, data_fingerprint, load_data
from trueup.base.stage import StageArguments, key
from trueup.eval.rendering import encode_prompt
from trueup.eval.scorers import RewardModelScorer, Scorer
from trueup.eval.validation import ValidationArguments, scorer_parents, validation_contradictions
from trueup.recipes.directory import Kind
from trueup.recipes.errors import TrueupError
from trueup.recipes.run import is_main_process


@dataclass
class RewardArguments:
    """Keys that say what is rewarded; `reward_weights` is the trainer's own."""

    reward_model_name_or_path: str | None = key(None, "Reward model directory that gives the reward.")
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Further rewards: reward model directories, module:function, or registered names."},
    )


@dataclass
class RewardedRecipe(RewardArguments, ValidationArguments, StageArguments, DataArguments, ModelConfig):
    """Keys and protocol of the stages that sample answers and learn from their reward; a stage adds its
    trainer's config."""

    # By the epoch, as StageArguments has it, would be once: pass after pass over the prompts is one stream.
    eval_strategy: str = key(
        "steps", "When held-out prompts are sampled; no: never.", choices=["no", "steps", "epoch"]
    )
    eval_steps: float | None = key(0.1, "Evaluate every so many steps; below 1 a share of all.")
    save_steps: float = key(0.1, "Write a checkpoint every so many steps; below 1 a share of all.")
    num_train_epochs: float = key(1.0, "Passes over the prompts.")

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        found = super().contradictions({"eval_strategy": "steps", **given})
        return [*found, *reward_contradictions(given), *validation_contradictions(given)]

    def parents(self) -> dict[str, tuple[str, Kind | None]]:
        """The model it starts from, which is its reference too, and the reward models."""
        return super().parents() | reward_parents(self)

    def data(self) -> list[dict[str, Any]]:
        """Fingerprints of the prompts, and of the held-out ones if they are sampled."""
        return [data_fingerprint(self, split) for split in self._splits()]

    def _splits(self) -> tuple[Split, ...]:
        sampled = self.eval_strategy != "no" and self.max_eval_prompts > 0
        return ("train", "validation") if sampled else ("train",)


def rewards_of(values: dict[str, Any]) -> list[str]:
    """What a recipe names as reward, in the order of reward_weights."""
    model, functions = values.get("reward_model_name_or_path"), values.get("reward_funcs")
    return [*([model] if model else []), *(functions or [])]


def reward_contradictions(given: dict[str, Any]) -> list[tuple[str, str]]:
    """See `trueup.recipes.stages.Stage`."""
    rewards, weights = rewards_of(given), given.get("reward_weights")
    found = []
    if not rewards:
        found.append(("reward_funcs", "is missing: name a reward, here or by reward_model_name_or_path"))
    if weights is not None and len(weights) != len(rewards):
        found.append(("reward_weights", f"has {len(weights)} weights for {len(rewards)} rewards"))
    return found


def reward_parents(recipe: Any) -> dict[str, tuple[str, Kind | None]]:
    """The reward models that a recipe trains on or measures by, as a stage's `parents` names them."""
    found: dict[str, tuple[str, Kind | None]] = {}
    if recipe.reward_model_name_or_path:
        found["reward_model_name_or_path"] = (recipe.reward_model_name_or_path, "reward")
    return found | scorer_parents(recipe.reward_funcs, "reward_funcs") | scorer_parents(recipe.scorers)


def say_if_uncalibrated(scorers: list[Scorer], coefficient: str) -> None:
    """A line for each reward model whose scores have a scale of their own.

    Args:
        coefficient: the key that weighs the KL against the reward.
    """
    for scorer in scorers:
        if not isinstance(scorer, RewardModelScorer) or not is_main_process():
            continue
        if getattr(scorer.model.config, "reward_std", None) is None and scorer.calibration is None:
            print(
                f"{scorer.name}: not calibrated, so {coefficient} stands against raw scores; its mean and "
                "standard deviation on samples of the start model belong in calibration.json beside it",
                flush=True,
            )


def prompts_with_room(recipe: Any, split: Split, tokenizer: Any, model: Any, limit: str) -> Any:
    """The prompts of a split, without those that leave no room for a completion of full length.

    Args:
        limit: the key that says how long a completion may be.

    Raises:
        TrueupError: none leaves room.
    """
    from datasets import IterableDataset

    rows = load_data(recipe, split, "prompt")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 31
    length = getattr(recipe, limit)
    room = context - length

    def fits(row: dict[str, Any]) -> bool:
        return len(encode_prompt(tokenizer, row["prompt"])) <= room

    if isinstance(rows, IterableDataset):
        return rows.filter(fits)
    kept = [place for place, row in enumerate(rows) if fits(row)]
    if not kept:
        raise TrueupError(
            f"{split}: no prompt leaves room for {length} tokens in the model's context of {context}; "
            f"lower {limit}, or choose shorter prompts"
        )
    if len(kept) < len(rows) and is_main_process():
        print(f"{split}: left out {len(rows) - len(kept):,} prompts of over {room:,} tokens", flush=True)
    return rows.select(kept)
