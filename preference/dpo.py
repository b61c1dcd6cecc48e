"""The DPO stage: a fine-tuned language model learns from pairs which answer is the better one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trl import DPOConfig

from trueup.base.stage import key
from trueup.preference.dpo_checks import loss_contradictions
from trueup.preference.offline import OfflineArguments

if TYPE_CHECKING:
    from trueup.preference.dpo_trainer import DPOTrainer


@dataclass
class DPORecipe(OfflineArguments, DPOConfig):
    """Make the better answers likelier than the worse ones, measured against a reference model."""

    FORM: ClassVar[str] = "preference"
    CONFIG: ClassVar[type] = DPOConfig

    # Both sides of a pair share a batch, and a batch is as wide as its longest row.
    train_sampling_strategy: str = key(
        "group_by_length",
        "How batches are drawn: random, sequential, or group_by_length (rows of like length together).",
        choices=["random", "sequential", "group_by_length"],
    )

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        found = super().contradictions(given) + list(loss_contradictions(given))
        if given.get("padding_free"):
            found.append(("padding_free", "is ignored by TRL's DPO; delete it"))
        if given.get("truncation_mode") == "keep_end":
            found.append(("truncation_mode", "keep_end is retired by TRL; delete it, or drop long prompts"))
        return found

    def trainer_class(self) -> "type[DPOTrainer]":
        from trueup.preference.dpo_trainer import DPOTrainer

        return DPOTrainer

    def prepared(self, rows: Any, tokenizer: Any, max_length: int | None, name: str) -> tuple[Any, list[str]]:
        from trueup.preference.pairs_clean import clean_pairs

        kept, report = clean_pairs(rows, tokenizer, max_length, name)
        return kept, report.lines()
