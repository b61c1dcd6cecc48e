"""TRL's RewardTrainer as trueup uses it: a pair is rendered as the scorer will render it, and counted."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import trl
from datasets import Dataset, IterableDataset
from torch.utils.data import SequentialSampler

from trueup.base.trainer import LengthGroups, StageTrainer
from trueup.eval.rendering import encode_pair
from trueup.preference.pairs_clean import clean_pairs
from trueup.preference.value import disable_dropout
from trueup.recipes.errors import TrueupError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class PairTokens:
    """What became of one data set's pairs.

    Args:
        tokens: of both sides of the pairs that were kept, the prompt counted in each.
        too_long: pairs left out because a side is longer than `max_length`: cut, it would have no end to be
            read at.
        with_margin: whether the rows bring a `margin`, by which chosen must win.
    """

    name: str
    pairs: int
    tokens: int
    longest: int
    max_length: int | None
    too_long: int
    with_margin: bool
    left_out: list[str]  # a line per other reason

    def lines(self) -> list[str]:
        """For people."""
        each_side = f"{self.tokens / (2 * self.pairs):.0f} tokens per side, longest {self.longest:,}"
        margin = ", each with its margin" if self.with_margin else ""
        lines = [f"{self.name}: {self.pairs:,} pairs, {each_side}{margin}"]
        if self.too_long:
            lines.append(f"  left out: {self.too_long:,} pairs longer than max_length {self.max_length:,}")
        return lines + [f"  {line}" for line in self.left_out]


class RewardTrainer(StageTrainer, trl.RewardTrainer):
    """TRL's trainer; `reports` says what its preparation did, by data set name (`train`, `eval`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.reports: dict[str, PairTokens] = {}
        super().__init__(*args, **kwargs)
        if self.args.disable_dropout:
            disable_dropout(self.model)  # TRL turns off the modules alone, not attention's own

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: "PreTrainedTokenizerBase",
        args: trl.RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """The pairs as TRL's columns `chosen_ids`, `rejected_ids`, `margin`, and `length` for the batches.

        By our own rendering, that of `RewardModelScorer`: TRL's ends plain text with its eos too, but after
        conversations it leaves the end to the template, and of rows that are too long it says nothing.
        """
        first = next(iter(dataset))
        if "chosen_ids" in first:  # evaluate() hands over what is prepared already
            return dataset
        rows, cleaned = clean_pairs(dataset, processing_class, None, dataset_name)
        encode = partial(_encode, tokenizer=processing_class)
        if isinstance(rows, IterableDataset):
            length = args.max_length or float("inf")
            return rows.map(encode, remove_columns=[*first]).filter(lambda row: row["length"] <= length)
        with args.main_process_first(desc="tokenizing pairs"):
            tokens = rows.map(
                encode,
                remove_columns=rows.column_names,
                num_proc=args.dataset_num_proc,
                desc=f"Tokenizing {dataset_name}",
            )
        lengths = np.array(tokens["length"])
        kept = np.flatnonzero(lengths <= (args.max_length or lengths.max()))
        if not len(kept):
            raise TrueupError(
                f"{dataset_name}: all {len(lengths):,} pairs have a side of over {args.max_length:,} tokens: "
                "raise max_length"
            )
        tokens = tokens.select(kept if dataset_name == "train" else kept[lengths[kept].argsort()])
        self.reports[dataset_name] = PairTokens(
            name=dataset_name,
            pairs=len(kept),
            tokens=sum(map(len, tokens["chosen_ids"])) + sum(map(len, tokens["rejected_ids"])),
            longest=int(lengths[kept].max()),
            max_length=args.max_length,
            too_long=len(lengths) - len(kept),
            with_margin="margin" in tokens.column_names,
            left_out=cleaned.lines(),
        )
        return tokens

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset  # what is handed over has lost its lengths
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroups(dataset["length"][:], self.args.train_batch_size, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)  # they lie in order of length

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        for metrics in self._metrics.values():
            metrics.pop("num_tokens", None)  # forgets what was before a resume; Trainer's own count does not
        return loss


def _encode(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    chosen, rejected = (encode_pair(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected"))
    margin = {"margin": row["margin"]} if "margin" in row else {}
    return {
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "length": max(len(chosen), len(rejected)),
    } | margin
