"""TRL's SFTTrainer as trueup uses it: prepared data is measured, packed rows stay rows, and on a CPU the loss
looks only at the tokens that are trained.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset, IterableDataset, concatenate_datasets
from trl.trainer.utils import pad

from trueup.base import GPTForCausalLM
from trueup.base.loss import IGNORED, linear_cross_entropy
from trueup.base.trainer import StageTrainer
from trueup.recipes.errors import TrueupError
from trueup.sft.replay import replay_rows

STREAM_SAMPLE = 1000  # rows of a stream that are measured before training


@dataclass
class TokenReport:
    """What became of one data set's tokens: how many are trained, and what truncation took away."""

    name: str
    rows: int
    tokens: int
    trained: int
    longest: int
    max_length: int | None
    truncated: int = 0  # rows longer than max_length
    lost: int = 0  # tokens cut off
    emptied: int = 0  # rows left out because no trained token was left
    replayed: int = 0  # tokens of replayed text beside them
    sampled: bool = False  # of a stream, only the first rows are known

    @property
    def fraction(self) -> float:
        """Trained tokens over all, of the rows that are kept."""
        return self.trained / max(1, self.tokens)

    def lines(self) -> list[str]:
        """For people."""
        rows = f"the first {self.rows:,} rows" if self.sampled else f"{self.rows:,} rows"
        each = self.tokens / max(1, self.rows)
        shape = f"{each:.0f} per row, longest {self.longest:,}"
        lines = [
            f"{self.name}: {rows}, {self.tokens:,} tokens ({shape}), {self.fraction:.1%} of them trained"
        ]
        if self.truncated:
            lines.append(
                f"  truncated to {self.max_length:,}: {self.truncated:,} rows, {self.lost:,} tokens lost"
            )
        if self.emptied:
            lines.append(f"  left out: {self.emptied:,} rows whose answer begins beyond max_length")
        if self.replayed:
            share = self.replayed / (self.replayed + self.tokens)
            lines.append(f"  replayed text: {self.replayed:,} tokens, {share:.1%} of all")
        return lines

    def check(self, masked: bool) -> None:
        """Raises TrueupError where training would be pointless.

        Args:
            masked: whether only answers are to be trained.
        """
        if not self.trained:
            raise TrueupError(
                f"{self.name}: not one token is trained ({self.rows + self.emptied:,} rows, longest "
                f"{self.longest:,} tokens, max_length {self.max_length}): "
                + (
                    "raise max_length"
                    if self.emptied
                    else "check the data and the chat template's generation marks"
                )
            )
        if masked and self.trained == self.tokens:
            raise TrueupError(
                f"{self.name}: every token is trained, prompts included, although only answers are to be. "
                "The chat template's generation marks enclose too much: correct them, or set "
                "assistant_only_loss: false"
            )


def measure(
    dataset: Dataset | IterableDataset, name: str, max_length: int | None, keep_end: bool, packing: str | None
) -> tuple[TokenReport, np.ndarray]:
    """Count tokens of tokenised rows (`input_ids`, `labels`), whole and as they are after truncation.

    Args:
        packing: the packing strategy; `bfd_split` and `wrapped` cut rows but lose nothing.

    Returns:
        The report, and for each row whether a trained token is left.
    """
    whole, kept, trained, useful = [], [], [], []
    stream = isinstance(dataset, IterableDataset)
    rows = dataset.take(STREAM_SAMPLE) if stream else dataset
    cuts = packing in (None, "bfd")
    window = slice(None)
    if max_length is not None and cuts:
        window = slice(-max_length, None) if keep_end and packing is None else slice(0, max_length)
    for batch in rows.select_columns(["labels"]).with_format("numpy").iter(batch_size=1000):
        for labels in batch["labels"]:
            answer = labels[window] != IGNORED
            whole.append(len(labels))
            kept.append(len(answer))
            trained.append(int(answer.sum()))
            useful.append(bool(answer[1:].any()))  # a row's first token is never predicted
    lost = np.array(whole) - np.array(kept)
    good = np.array(useful)
    report = TokenReport(
        name=name,
        rows=int(good.sum()),
        tokens=int(np.array(kept)[good].sum()),
        trained=int(np.array(trained)[good].sum()),
        longest=max(whole, default=0),
        max_length=max_length,
        truncated=int((lost > 0).sum()),
        lost=int(lost.sum()),
        emptied=int((~good).sum()),
        sampled=stream,
    )
    return report, good


@dataclass
class PackedRows:
    """Collates packed rows as rows (B, T) with positions that restart at each document.

    TRL lays a batch out as one row of B * T tokens, for flash attention's varlen kernel. Any other attention
    then builds a mask of (B * T)^2, and packing makes training slower instead of faster. By rows the mask is
    B * T^2, and the documents are told apart by their positions all the same.
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(example["input_ids"]) for example in examples]
        positions = [
            torch.cat([torch.arange(length) for length in example.get("seq_lengths", [len(row)])])
            for example, row in zip(examples, rows, strict=True)
        ]
        labels = pad([torch.tensor(example["labels"]) for example in examples], padding_value=IGNORED)
        position_ids = pad(positions, padding_value=0)
        labels[position_ids == 0] = (
            IGNORED  # the first token of a document does not follow from the one before
        )
        return {
            "input_ids": pad(rows, padding_value=self.pad_token_id),
            "labels": labels,
            "position_ids": position_ids,
        }


class SFTTrainer(StageTrainer, trl.SFTTrainer):
    """TRL's trainer; `reports` says what its preparation did, by data set name (`train`, `eval`)."""

    def __init__(self, *args: Any, replay: tuple[Dataset, float] | None = None, **kwargs: Any) -> None:
        """Arguments: TRL's, and `replay`: rows of `text` to mix in, and their share of the tokens."""
        self.replay = replay
        self.reports: dict[str, TokenReport] = {}
        super().__init__(*args, **kwargs)
        if self.padding_free and "flash" not in str(self.model.config._attn_implementation):
            self.data_collator = PackedRows(self.processing_class.pad_token_id)
        self.lean_loss = self._lean_loss_applies()

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """TRL's preparation in two halves, tokenising and then truncating or packing, measured in between."""
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        tokens = super()._prepare_dataset(
            dataset, processing_class, whole, False, formatting_func, dataset_name
        )
        tokens = tokens.select_columns(["input_ids", "labels"])
        strategy = args.packing_strategy if packing else None
        keep_end = args.truncation_mode == "keep_end"
        report, useful = measure(tokens, dataset_name, args.max_length, keep_end, strategy)
        self.reports[dataset_name] = report
        report.check(masked=args.assistant_only_loss or self.completion_only_loss)
        if isinstance(tokens, Dataset) and not useful.all():
            tokens = tokens.select(np.flatnonzero(useful))
        if self.replay is not None and dataset_name == "train":
            tokens = self._with_replay(tokens, report, processing_class, args.max_length)
        return super()._prepare_dataset(tokens, processing_class, args, packing, None, dataset_name)

    def _with_replay(
        self, tokens: Dataset, report: TokenReport, tokenizer: Any, max_length: int | None
    ) -> Dataset:
        assert self.replay is not None
        texts, share = self.replay
        rows = list(replay_rows((row["text"] for row in texts), tokenizer, share, report.tokens, max_length))
        report.replayed = sum(len(row["input_ids"]) for row in rows)
        return concatenate_datasets([tokens, Dataset.from_list(rows, features=tokens.features)])

    def _lean_loss_applies(self) -> bool:
        """Where TRL's fused loss is slow and ours means the same: its kernel for CPUs scores masked positions
        too, and computes every position's entropy."""
        args = self.args
        return (
            args.device.type == "cpu"
            and args.world_size == 1
            and not args.torch_compile
            and args.loss_type == "nll"
            and args.label_smoothing_factor == 0
            and self.compute_loss_func is None
            and isinstance(self._bare_model(), GPTForCausalLM)
        )

    def _bare_model(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.lean_loss and self.model.training and not return_outputs:
            return self._lean_loss(dict(inputs), num_items_in_batch)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        for metrics in self._metrics.values():
            metrics.pop(
                "num_tokens", None
            )  # counts a batch of packed rows as one; Trainer's own count is right
        return loss

    def _lean_loss(self, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        """The mean cross-entropy (nats) of the trained tokens: the same as TRL's, without its figures."""
        bare = self._bare_model()
        targets = inputs.pop("labels")[:, 1:]
        trained = targets != IGNORED
        with self.accelerator.autocast():
            hidden = bare.model(**inputs, use_cache=False).last_hidden_state[:, :-1][trained]
            weight = bare.get_output_embeddings().weight
            loss = linear_cross_entropy(hidden * bare.config.logit_scale, weight, targets[trained])
        count = trained.sum() if num_items_in_batch is None else num_items_in_batch
        return loss / torch.as_tensor(count).clamp(min=1)
