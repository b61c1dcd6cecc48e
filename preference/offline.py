"""What the stages dpo and kto share: both learn from answers that are there already, against a reference."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from trl import ModelConfig

from trueup.base import adapters
from trueup.base.data import DataArguments, Split, data_fingerprint, load_data
from trueup.base.stage import (
    StageArguments,
    check_template,
    held_length,
    key,
    load_model,
    load_tokenizer,
    set_up,
    start_model,
    template_errors,
    trainer_config,
)
from trueup.eval.validation import ValidationArguments, scorer_parents, validation_contradictions
from trueup.recipes.directory import Kind
from trueup.recipes.errors import UsageError
from trueup.recipes.run import Run, is_main_process

if TYPE_CHECKING:
    from trueup.preference.offline_trainer import OfflineTrainer


@dataclass
class OfflineArguments(StageArguments, ValidationArguments, DataArguments, ModelConfig):
    """Keys and work of both stages; a stage adds TRL's config."""

    FORM: ClassVar[str]  # that load_data is asked for
    CONFIG: ClassVar[type]  # TRL's

    ref_model_name_or_path: str | None = key(
        None, "Another model directory as the reference; default: the one that training starts from."
    )
    max_new_tokens: int = key(256, "A completion sampled for validation is cut after so many tokens.")
    # A model that has seen its pairs once knows them: the margins of a second pass are memory.
    num_train_epochs: float = key(1.0, "Passes over the data.")
    eval_strategy: str = key(
        "steps",
        "When validation prompts are sampled and held-out rows scored.",
        choices=["no", "steps", "epoch"],
    )
    eval_steps: float | None = key(0.1, "Evaluate every so many steps; below 1 a share of all.")
    save_steps: float = key(0.1, "Write a checkpoint every so many steps; below 1 a share of all.")

    def __post_init__(self) -> None:
        set_up(self, self.CONFIG)

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        found = StageArguments.contradictions({"eval_strategy": "steps", **given})
        found = [(name, message) for name, message in found if name in given]
        found += _about_the_reference(given)
        if given.get("disable_dropout") is False:
            found.append(("disable_dropout", "must be true: with dropout, margins begin as noise; delete it"))
        if given.get("lora_dropout"):
            found.append(("lora_dropout", "is turned off with all other dropout; delete it"))
        for name in ("model_init_kwargs", "pad_token"):
            if given.get(name):
                found.append(
                    (name, "is ignored; the model's directory and dtype, attn_implementation decide")
                )
        if given.get("eval_strategy") == "no" or given.get("max_eval_prompts") == 0:
            because = "eval_strategy is no" if given.get("eval_strategy") == "no" else "max_eval_prompts is 0"
            found += [
                (name, f"is for evaluations on prompts, and {because}")
                for name in ("scorers", "max_new_tokens")
                if given.get(name)
            ]
        return [*found, *validation_contradictions(given)]

    def parents(self) -> dict[str, tuple[str, Kind | None]]:
        """The model it starts from, another reference, reward models that score, data that stages wrote."""
        found = super().parents() | scorer_parents(self.scorers)
        if self.ref_model_name_or_path:
            found["ref_model_name_or_path"] = (self.ref_model_name_or_path, "causal-lm")
        return found

    def data(self) -> list[dict[str, Any]]:
        """Fingerprints of the rows, and of the held-out ones if they are scored."""
        return [data_fingerprint(self, split) for split in self._splits()]

    def run(self, run: Run) -> None:
        """Train, and publish the model directory."""
        from trueup.base.trainer import fit, publish
        from trueup.eval.frontier import FRONTIER, FrontierCallback
        from trueup.eval.guard_callback import GuardCallback
        from trueup.preference.offline_trainer import FallingChosen

        reference = run.parents.get("ref_model_name_or_path", run.parents["model_name_or_path"])
        _say(f"reference: {reference.name} ({reference.identity[:12]})")
        start = run.parents["model_name_or_path"]
        trainer = self.trainer(
            run.recipe.values,
            run.work_dir,
            chosen_length=run.recipe.origin["max_length"] != "default",
            reference_is_start=reference.identity == start.identity,
        )
        _say(*(line for report in trainer.reports.values() for line in report.lines()))
        guard = GuardCallback(on_alarm="stop" if self.on_alarm == "stop" else "warn")
        for callback in (guard, FrontierCallback(run.work_dir), FallingChosen()):
            trainer.add_callback(callback)
        metrics = fit(trainer, run) | {"alarms": float(len(guard.alarms))}
        adapters.assert_reference(trainer.accelerator.unwrap_model(trainer.model), start)
        row = next(iter(trainer.train_dataset))["prompt_ids"]
        probe = {"input_ids": torch.tensor([row[:64]])}
        keep = self.keep_checkpoints == "evaluated"
        publish(trainer, run, metrics, probe, beside=[run.work_dir / FRONTIER], keep_models=keep)

    def trainer(
        self,
        values: Mapping[str, Any],
        work_dir: Path,
        chosen_length: bool = True,
        reference_is_start: bool = True,
    ) -> "OfflineTrainer":
        """The trainer, its data prepared and its validation attached.

        Args:
            values: the recipe's values.
            chosen_length: whether the recipe names max_length, rather than leaving TRL's default.
            reference_is_start: whether the reference is the model that training starts from.

        Raises:
            TrueupError: model, data or chat template do not fit.
        """
        tokenizer, model = load_tokenizer(self), load_model(self)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = held_length(values["max_length"], model.config, chosen_length)
        left_out: dict[str, list[str]] = {}
        rows = {}
        for split, name in zip(self._splits(), ("train", "eval"), strict=False):
            reports: list[Any] = []
            loaded = load_data(self, split, self.FORM, reports)
            _say(*reports)
            rows[name], left_out[name] = self.prepared(loaded, tokenizer, length, name)
        if isinstance(next(iter(rows["train"]))["prompt"], list):
            check_template(tokenizer, masked=False)
        shared = {
            "args": trainer_config(
                self.CONFIG, values, work_dir, max_length=length, **self.checkpoints_kept()
            ),
            "processing_class": tokenizer,
            "train_dataset": rows["train"],
            "eval_dataset": rows.get("eval"),
            "peft_config": adapters.lora_config(self, model),
            "left_out": left_out,
            "reference_is_start": reference_is_start,
        }
        with template_errors((row for part in rows.values() for row in part), tokenizer):
            trainer = self.trainer_class()(model, self._reference(values), **shared)
        self._validate_with(trainer, rows.get("eval"), context)
        return trainer

    def trainer_class(self) -> type["OfflineTrainer"]:
        """The stage's own."""
        raise NotImplementedError

    def prepared(self, rows: Any, tokenizer: Any, max_length: int | None, name: str) -> tuple[Any, list[str]]:
        """The rows that can teach something, and a line per reason for those that cannot."""
        raise NotImplementedError

    def _splits(self) -> tuple[Split, ...]:
        return ("train",) if self.eval_strategy == "no" else ("train", "validation")

    def _reference(self, values: Mapping[str, Any]) -> Any:
        """A model of its own; None where the trainer needs none: under LoRA, or precomputed."""
        if not self.ref_model_name_or_path and (self.use_peft or values["precompute_ref_log_probs"]):
            return None
        named = self.ref_model_name_or_path or self.model_name_or_path
        other = copy.copy(self)
        other.model_name_or_path = named
        if self.ref_model_name_or_path:
            other.model_revision = "main"  # that key is about the start model
        if load_tokenizer(other).get_vocab() != load_tokenizer(self).get_vocab():
            raise UsageError(
                f"ref_model_name_or_path: {named} has another vocabulary than the model, so their "
                "probabilities cannot be compared; name a model with the same tokenizer"
            )
        return load_model(other).eval()

    def _validate_with(self, trainer: "OfflineTrainer", rows: Any, context: int | None) -> None:
        from trueup.eval.validation import Validation, ValidationCallback, frozen_prompts, open_scorers

        if rows is None or not self.max_eval_prompts:
            return
        tokenizer = trainer.processing_class
        prompts = frozen_prompts(rows, self.max_eval_prompts, tokenizer, context, self.max_new_tokens)
        scorers = open_scorers(self.scorers, trainer.args)
        validation = Validation(prompts, tokenizer, scorers, self.max_new_tokens, trainer.args.seed)
        reference = trainer.ref_model
        if trainer.args.sync_ref_model or (reference is None and not self.use_peft):
            # Where the reference moves or is not kept, the KL is still measured from where it was.
            reference = self.ref_model_name_or_path or start_model(self)
        trainer.add_callback(ValidationCallback(trainer, validation, reference, self.log_completions))


def _about_the_reference(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if given.get("sync_ref_model"):
        why = {
            "use_peft": "under LoRA the reference is the model without its adapter, and cannot move",
            "precompute_ref_log_probs": "what is precomputed is of a reference that stays",
            "deepspeed": "a moving reference is not kept in sharded checkpoints",
            "fsdp": "a moving reference is not kept in sharded checkpoints",
        }
        for name, reason in why.items():
            if given.get(name):
                yield "sync_ref_model", f"excludes {name}: {reason}; delete one"
    else:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            if name in given:
                yield name, "is read with sync_ref_model: true alone; add that, or delete it"
    if "precompute_ref_batch_size" in given and not given.get("precompute_ref_log_probs"):
        yield "precompute_ref_batch_size", "is read with precompute_ref_log_probs: true alone; delete it"
    if given.get("precompute_ref_log_probs") and given.get("dataset_streaming"):
        yield "precompute_ref_log_probs", "cannot be for a stream; delete one of the two"


def _say(*lines: Any) -> None:
    if is_main_process():
        for line in lines:
            print(line, flush=True)
