"""What recipes that train on a reward share: where the reward comes from, prompts with room."""

from dataclasses import dataclass, field
from typing import Any

from trueup.base.data import Split, load_data
from trueup.base.stage import key
from trueup.eval.rendering import encode_prompt
from trueup.eval.scorers import RewardModelScorer, Scorer
from trueup.eval.validation import scorer_parents
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
