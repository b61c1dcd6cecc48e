"""The stages there are. Each is named here as a string and imported only when it is asked for."""

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from trueup.recipes.directory import Kind
from trueup.recipes.errors import TrueupError, UsageError

if TYPE_CHECKING:
    from trueup.recipes.run import Run

# verb -> (module:class, what `trueup --help` says of it)
STAGES: dict[str, tuple[str, str]] = {
    "pretrain": ("trueup.base.pretrain:PretrainRecipe", "Train a GPT from scratch on raw text."),
    "sft": ("trueup.sft.train:SFTRecipe", "Fine-tune it on examples of good answers (TRL; full or LoRA)."),
    "pairs": (
        "trueup.preference.pairs:PairsRecipe",
        "Sample answers, score them, and write pairs of them, or the best ones.",
    ),
    "reward": (
        "trueup.preference.reward:RewardRecipe",
        "Train a reward model on pairs of answers (TRL; full or LoRA), and examine it.",
    ),
    "dpo": ("trueup.preference.dpo:DPORecipe", "Learn from pairs of answers directly (TRL; full or LoRA)."),
    "kto": ("trueup.preference.kto:KTORecipe", "Learn from answers that are each good or bad (TRL)."),
    "rloo": ("trueup.preference.online:RLOORecipe", "Optimise it against a reward by RLOO (TRL; no critic)."),
    "grpo": ("trueup.preference.online:GRPORecipe", "Optimise it against a reward by GRPO (TRL; no critic)."),
    "ppo": (
        "trueup.preference.ppo:PPORecipe",
        "Optimise it against a reward by PPO (trueup's own; full or LoRA).",
    ),
    "compare": (
        "trueup.eval.compare:CompareRecipe",
        "Compare models that began as one: win rates with intervals, KL, and a verdict.",
    ),
    "versus": (
        "trueup.app.versus:VersusRecipe",
        "Train methods from one start with equal budgets, choose their settings, and compare them.",
    ),
}


class Stage(Protocol):
    """What the runner asks of a stage's dataclass. Its fields are the recipe's keys."""

    output_dir: Any

    @classmethod
    def contradictions(cls, values: dict[str, Any]) -> list[tuple[str, str]]:
        """(key, message) for keys that are each right and wrong together."""

    # Optional: a classmethod `derived(values)`, key -> (value, why) of keys that follow from those given.

    def parents(self) -> dict[str, tuple[str, Kind | None]]:
        """Recipe key -> (directory it names, kind the stage needs there)."""

    def data(self) -> list[dict[str, Any]]:
        """Fingerprints of the data it reads."""

    def run(self, run: "Run") -> None:
        """Train, and write the model directory through `run.publish`."""


def stage_class(name: str) -> type:
    """The dataclass behind a stage.

    Raises:
        UsageError: no such stage.
        TrueupError: a package it needs is not installed.
    """
    if name not in STAGES:
        raise UsageError(f"there is no stage '{name}'; the stages are: {', '.join(STAGES)}")
    module, _, attribute = STAGES[name][0].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("trueup"):
            raise
        raise TrueupError(
            f"stage '{name}' needs the package {error.name}: pip install {error.name}"
        ) from error
