"""The KTO stage: a fine-tuned language model learns from answers that are each good or bad."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trl import KTOConfig

from trueup.base.stage import key
from trueup.eval.rendering import encode_prompt, plain
from trueup.preference.offline import OfflineArguments
from trueup.recipes.errors import TrueupError

if TYPE_CHECKING:
    from trueup.preference.kto_trainer import KTOTrainer


@dataclass
class KTORecipe(OfflineArguments, KTOConfig):
    """Make good answers likelier and bad ones less so; of a pair the chosen one is good, the other bad."""

    FORM: ClassVar[str] = "unpaired_preference"
    CONFIG: ClassVar[type] = KTOConfig

    # The KL of a batch is estimated on other rows of that batch, which TRL finds while it prepares the data.
    train_sampling_strategy: str = key(
        "sequential",
        "sequential: in an order that is shuffled once, at the start; apo_zero_unpaired may be random.",
        choices=["sequential", "random", "group_by_length"],
    )

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        found = super().contradictions(given)
        if given.get("loss_type", "kto") == "kto":
            if given.get("train_sampling_strategy", "sequential") != "sequential":
                found.append(("train_sampling_strategy", "must be sequential for loss_type: kto; delete it"))
            if given.get("per_device_train_batch_size", 8) < 2:
                found.append(
                    (
                        "per_device_train_batch_size",
                        "must be above 1: the KL is estimated on other rows of a batch",
                    )
                )
        for name in ("desirable_weight", "undesirable_weight"):
            if given.get(name, 1) <= 0:
                found.append((name, f"must be above 0, not {given[name]}"))
        if given.get("beta", 0.1) <= 0:
            found.append(("beta", f"must be above 0, not {given['beta']}"))
        return found

    def trainer_class(self) -> "type[KTOTrainer]":
        from trueup.preference.kto_trainer import KTOTrainer

        return KTOTrainer

    def prepared(self, rows: Any, tokenizer: Any, max_length: int | None, name: str) -> tuple[Any, list[str]]:
        """Usable rows, shuffled: of pairs that were taken apart one side would follow the other, and the
        rows of a batch must differ in their prompts."""
        from datasets import Dataset

        def usable(row: dict[str, Any]) -> bool:
            if not plain(row["completion"]).strip():
                return False
            prompt = encode_prompt(tokenizer, row["prompt"])
            return max_length is None or len(prompt) < max_length

        if not isinstance(rows, Dataset):
            return rows.filter(usable).shuffle(seed=self.seed), []
        kept = rows.select([place for place, row in enumerate(rows) if usable(row)])
        labels = set(kept["label"])
        if len(labels) < 2:
            missing = (
                "no rows" if not labels else "only good answers" if True in labels else "only bad answers"
            )
            raise TrueupError(f"{name}: {missing}, and KTO learns from both; check the column label")
        dropped = len(rows) - len(kept)
        line = f"left out {dropped:,} of {len(rows):,} rows: empty, or beyond max_length {max_length}"
        return kept.shuffle(seed=self.seed), [line] if dropped else []
