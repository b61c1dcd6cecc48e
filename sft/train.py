"""The SFT stage: a base model learns to answer, from conversations, prompts and completions, or text."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import ModelConfig, SFTConfig

from trueup.base import adapters
from trueup.base.data import DataArguments, Split, data_fingerprint, load_data
from trueup.base.loss import IGNORED
from trueup.base.stage import (
    StageArguments,
    TokenPreview,
    check_template,
    held_length,
    key,
    load_model,
    load_tokenizer,
    read_template,
    set_up,
    start_model,
    template_errors,
    trainer_config,
)
from trueup.recipes.hub import local_directory
from trueup.recipes.run import Run, is_main_process

if TYPE_CHECKING:
    from trueup.sft.trainer import SFTTrainer

CONVERSATIONAL = "messages"


@dataclass
class SFTRecipe(StageArguments, DataArguments, ModelConfig, SFTConfig):
    """Fine-tune a language model on examples of how it should answer."""

    dataset_form: str = key(
        CONVERSATIONAL,
        "What the rows are read as: messages (any chat layout), prompt_completion, or text.",
        choices=[CONVERSATIONAL, "prompt_completion", "text"],
    )

    # Training the questions too teaches a chat model to ask them. TRL's default (False) does.
    assistant_only_loss: bool | None = key(
        None, "Train the assistant's turns only; default: yes where rows are messages."
    )

    replay_dataset_name: str | None = key(
        None, "Plain text mixed into training so that less is forgotten: what the base model was trained on."
    )
    replay_dataset_options: dict[str, Any] | None = field(
        default=None, metadata={"help": "Options of the replayed set, as dataset_options."}
    )
    replay_share: float = key(0.3, "Share of the tokens trained on that the replayed text makes up.")

    def __post_init__(self) -> None:
        if self.assistant_only_loss is None:
            self.assistant_only_loss = self.dataset_form == CONVERSATIONAL
        set_up(self, SFTConfig)

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        form = given.get("dataset_form", CONVERSATIONAL)
        found = super().contradictions(given)
        if given.get("assistant_only_loss") and form != CONVERSATIONAL:
            found.append(("assistant_only_loss", f"needs dataset_form: messages, not {form}"))
        if given.get("completion_only_loss") and form != "prompt_completion":
            found.append(("completion_only_loss", f"needs dataset_form: prompt_completion, not {form}"))
        if given.get("packing") and "max_length" in given and given["max_length"] is None:
            found.append(("packing", "needs a max_length to pack to"))
        if (
            given.get("padding_free")
            and not given.get("packing")
            and given.get("max_length", 1024) is not None
        ):
            found.append(("padding_free", "does not truncate: add packing: true, or max_length: null"))
        if not 0 < given.get("replay_share", 0.3) < 1:
            found.append(("replay_share", "is a share between 0 and 1, such as 0.3"))
        for name in ("replay_dataset_options", "replay_share"):
            if name in given and not given.get("replay_dataset_name"):
                found.append((name, "is read with replay_dataset_name; add that"))
        if given.get("replay_dataset_name") and given.get("dataset_streaming"):
            found.append(("replay_dataset_name", "does not mix into a stream; delete dataset_streaming"))
        return found

    def data(self) -> list[dict[str, Any]]:
        """Fingerprints of the examples, and of the held-out ones if they are scored."""
        prints = [data_fingerprint(self, split) for split in self._splits()]
        return prints + ([data_fingerprint(self._replayed(), "train")] if self.replay_dataset_name else [])

    def _replayed(self) -> DataArguments:
        return DataArguments(
            dataset_name=self.replay_dataset_name, dataset_options=self.replay_dataset_options
        )

    def run(self, run: Run) -> None:
        """Train, and publish the model directory."""
        from trueup.base.trainer import fit, publish

        tokenizer = load_tokenizer(self)
        model = load_model(self)
        length = held_length(self.max_length, model.config, run.recipe.origin["max_length"] != "default")
        values = run.recipe.values | {"max_length": length}
        adapter = adapters.lora_config(self, model)
        trainer = self.trainer(values, run.work_dir, model, tokenizer, adapter)
        _say(*(line for report in trainer.reports.values() for line in report.lines()))
        metrics = fit(trainer, run)
        metrics["trained_fraction"] = round(trainer.reports["train"].fraction, 4)
        row = next(iter(trainer.train_dataset))["input_ids"]
        publish(trainer, run, metrics, probe={"input_ids": torch.tensor([row[:64]])})

    def preview(self, values: dict[str, Any], origin: dict[str, str], rows: int) -> TokenPreview:
        """The first rows as they would be trained, by the same preparation; no weights are read."""
        from transformers import AutoConfig

        from trueup.base import GPTConfig, GPTForCausalLM

        tokenizer = load_tokenizer(self)
        directory = local_directory(start_model(self), "model_name_or_path")
        config = AutoConfig.from_pretrained(directory, trust_remote_code=self.trust_remote_code)
        values = values | {
            "max_length": held_length(self.max_length, config, origin["max_length"] != "default")
        }
        # The trainer wants a model, its preparation does not use it.
        model = GPTForCausalLM(GPTConfig(hidden_size=2, num_hidden_layers=1, num_attention_heads=1))
        trainer = self.trainer(values, Path(self.output_dir), model, tokenizer)
        shown = list(islice(iter(trainer.train_dataset), rows))
        notes = [line for report in trainer.reports.values() for line in report.lines()]
        return TokenPreview([document for row in shown for document in _documents(row)], tokenizer, notes)

    def trainer(
        self, values: dict[str, Any], work_dir: Path, model: Any, tokenizer: Any, adapter: Any = None
    ) -> "SFTTrainer":
        """The trainer, its data prepared.

        Args:
            values: the recipe's values.

        Raises:
            TrueupError: data or chat template do not fit, or no token would be trained.
        """
        from trueup.sft.trainer import SFTTrainer

        rows = {split: self._rows(split) for split in self._splits()}
        cloned = self.chat_template_path  # by TRL, from another tokenizer
        if template := read_template(cloned):
            tokenizer.chat_template, cloned = template, None
        if self._conversational(rows["train"]) and not cloned:
            check_template(tokenizer, masked=bool(self.assistant_only_loss))
        config = trainer_config(
            SFTConfig,
            values,
            work_dir,
            assistant_only_loss=self.assistant_only_loss,
            chat_template_path=cloned,
            dataset_text_field="text",  # load_data has renamed the column
        )
        with template_errors(chain(*rows.values()), tokenizer):
            return SFTTrainer(
                model=model,
                args=config,
                processing_class=tokenizer,
                train_dataset=rows["train"],
                eval_dataset=rows.get("validation"),
                peft_config=adapter,
                replay=(load_data(self._replayed(), "train", "text"), self.replay_share)
                if self.replay_dataset_name
                else None,
            )

    def _splits(self) -> tuple[Split, ...]:
        return ("train",) if self.eval_strategy == "no" else ("train", "validation")

    def _conversational(self, rows: Any) -> bool:
        """load_data sees to it that the rows of a set are all conversations or all strings."""
        first = next(iter(rows))
        return isinstance(first.get("messages", first.get("prompt")), list)

    def _rows(self, split: Split) -> Any:
        reports: list[Any] = []
        rows = load_data(self, split, self.dataset_form, reports)
        _say(*reports)
        return rows


def _documents(row: dict[str, Any]) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids, trained) of a prepared row, or of each document packed into it."""
    start = 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        part = slice(start, start + length)
        yield row["input_ids"][part], [label != IGNORED for label in row["labels"][part]]
        start += length


def _say(*lines: Any) -> None:
    if is_main_process():
        for line in lines:
            print(line, flush=True)
