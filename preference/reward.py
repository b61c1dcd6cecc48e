"""The reward stage: a fine-tuned language model learns which of two answers people prefer."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging
from trl import ModelConfig, RewardConfig

from trueup.base import adapters
from trueup.base.data import DataArguments, Split, data_fingerprint, load_data
from trueup.base.stage import (
    StageArguments,
    held_length,
    key,
    load_model,
    load_tokenizer,
    read_template,
    set_up,
    template_errors,
    trainer_config,
)
from trueup.recipes.errors import UsageError
from trueup.recipes.run import Run, is_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trueup.eval.scorers import RewardModelScorer
    from trueup.preference.reward_trainer import RewardTrainer


@dataclass
class RewardRecipe(StageArguments, DataArguments, ModelConfig, RewardConfig):
    """Train a reward model on pairs of answers, one preferred to the other."""

    # A batch is as wide as its longest row: on the lab's pairs, padding makes random batches 2.1 times as
    # large as their tokens, grouped ones 1.1 times.
    train_sampling_strategy: str = key(
        "group_by_length",
        "How batches are drawn: random, sequential, or group_by_length (rows of like length together).",
        choices=["random", "sequential", "group_by_length"],
    )
    calibration_prompts: int = key(
        512,
        "Training prompts that the start model answers in the end: the scores of its answers get mean 0 and "
        "standard deviation 1; 0: scores stay as they are.",
    )
    max_new_tokens: int = key(256, "Longest answer sampled for the calibration.")
    exam: bool = key(True, "Examine the reward model at the end on the test split, else on validation.")
    on_alarm: str = key(
        "warn", "What a guard's alarm does: warn, or stop with a checkpoint.", choices=["warn", "stop"]
    )

    def __post_init__(self) -> None:
        set_up(self, RewardConfig)

    @classmethod
    def contradictions(cls, given: dict[str, Any]) -> list[tuple[str, str]]:
        """See `trueup.recipes.stages.Stage`."""
        found = super().contradictions(given)
        if "max_new_tokens" in given and given.get("calibration_prompts") == 0:
            found.append(
                ("max_new_tokens", "is for the calibration, and calibration_prompts is 0; delete it")
            )
        if given.get("dataset_streaming") and given.get("train_sampling_strategy") == "group_by_length":
            found.append(("train_sampling_strategy", "cannot group a stream by length; delete it"))
        if given.get("eval_tasks"):
            found.append(("eval_tasks", "are for language models, a reward model says nothing; delete it"))
        if "score" in (given.get("lora_target_modules") or []):
            found.append(("lora_target_modules", "score is trained whole in any case; take it out"))
        return found

    def data(self) -> list[dict[str, Any]]:
        """Fingerprints of the pairs, and of the held-out ones that are scored or examined."""
        return [data_fingerprint(self, split) for split in self._splits()]

    def run(self, run: Run) -> None:
        """Train, calibrate, examine, and publish the model directory."""
        from trueup.base.trainer import fit, publish
        from trueup.eval.exam_plots import save_exam
        from trueup.eval.guard_callback import GuardCallback
        from trueup.eval.guards import Guard, Limits

        trainer = self.trainer(run.recipe.values, run.recipe.origin, run.work_dir)
        for report in trainer.reports.values():
            _say(*report.lines())
        held_out = trainer.reports["eval"].pairs if "eval" in trainer.reports else 0
        guard = GuardCallback(
            Guard(Limits(eval_pairs=held_out)), on_alarm="stop" if self.on_alarm == "stop" else "warn"
        )
        trainer.add_callback(guard)
        metrics = fit(trainer, run) | {"alarms": float(len(guard.alarms))}
        scorer = _scorer(trainer, run.output_dir.name)
        if self.calibration_prompts:
            metrics |= self._calibrate(trainer, scorer)
        examined = self._examine(scorer) if self.exam else None
        row = next(iter(trainer.train_dataset))["chosen_ids"]
        directory = publish(trainer, run, metrics, probe={"input_ids": torch.tensor([row])})
        if examined is not None and directory is not None:
            save_exam(examined | {"identity": directory.identity}, directory.path)

    def trainer(self, values: dict[str, Any], origin: dict[str, str], work_dir: Path) -> "RewardTrainer":
        """The trainer, its pairs prepared.

        Args:
            values: the recipe's values.
            origin: where each comes from.

        Raises:
            TrueupError: model, data or chat template do not fit.
        """
        from trueup.preference.reward_trainer import RewardTrainer

        tokenizer = self._tokenizer()
        evaluated = self.eval_strategy != "no"
        train, validation = self._rows("train"), self._rows("validation") if evaluated else None
        model = open_with_head(self)
        _check_padding(model, tokenizer)
        adapter = adapters.lora_config(self, model, "SEQ_CLS")
        length = held_length(self.max_length, model.config, origin["max_length"] != "default")
        with template_errors(chain(train, validation or ()), tokenizer):
            return RewardTrainer(
                model=model,
                args=trainer_config(RewardConfig, values, work_dir, max_length=length),
                processing_class=tokenizer,
                train_dataset=train,
                eval_dataset=validation,
                peft_config=adapter,
            )

    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        tokenizer = load_tokenizer(self)
        if self.chat_template_path:
            template = read_template(self.chat_template_path)
            if template is None:
                raise UsageError(
                    f"chat_template_path: {self.chat_template_path}: no such file; another tokenizer's "
                    "folder will not do, because a reward model keeps the tokens of the one it starts from"
                )
            tokenizer.chat_template = template
        return tokenizer

    def _rows(self, split: Split) -> Any:
        reports: list[Any] = []
        rows = load_data(self, split, "preference", reports)
        _say(*reports)
        return rows

    def _splits(self) -> list[Split]:
        """The splits that are read, each once: the exam may be on that of the evaluations."""
        evaluated: list[Split] = [] if self.eval_strategy == "no" else ["validation"]
        splits: list[Split] = ["train", *evaluated, *self._exam_split()]
        return list(dict.fromkeys(splits))

    def _exam_split(self) -> list[Split]:
        if not self.exam:
            return []
        try:
            data_fingerprint(self, "test")
        except UsageError:  # it has none, and none is cut from it
            return ["validation"]
        return ["test"]

    def _calibrate(self, trainer: "RewardTrainer", scorer: "RewardModelScorer") -> dict[str, float]:
        """Set the scores of the start model's own answers to mean 0 and deviation 1; what that took.

        Our model applies it in its forward. A foreign architecture has no place for it: the figures stand in
        the directory's record, where the scorer finds them.
        """
        from trueup.eval.sampler import SamplingSettings, sample
        from trueup.eval.scorers import Calibration
        from trueup.eval.validation import frozen_prompts

        policy = load_model(self).to(trainer.args.device)
        tokenizer: Any = trainer.processing_class
        context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
        pairs = load_data(self, "train", "preference")
        rows = frozen_prompts(pairs, self.calibration_prompts, tokenizer, context, self.max_new_tokens)
        answers = sample(
            policy,
            tokenizer,
            [row["prompt"] for row in rows],
            SamplingSettings(max_new_tokens=self.max_new_tokens, seed=self.seed),
            autocast=torch.bfloat16 if trainer.args.bf16 else None,
            progress=is_main_process() and not self.disable_tqdm,
        )
        found = Calibration.of(scorer.score_tokens([[*answer.prompt_ids, *answer.ids] for answer in answers]))
        if _is_ours(scorer.model):
            scorer.model.config.reward_mean, scorer.model.config.reward_std = found.mean, found.std
        else:
            scorer.calibration = found
        _say(
            f"calibrated on {len(rows):,} answers of {self.model_name_or_path}: "
            f"score = (raw {-found.mean:+.3f}) / {found.std:.3f}"
        )
        return {"reward_mean": found.mean, "reward_std": found.std}

    def _examine(self, scorer: "RewardModelScorer") -> dict[str, Any]:
        from trueup.eval.exam import examine, summary

        (split,) = self._exam_split()
        report = examine(scorer, self._rows(split), seed=self.seed)
        report["data"] = data_fingerprint(self, split)
        _say(*summary(report))
        return report


# -------------------------------------------------------------------------------------------------- the model


def open_with_head(recipe: Any) -> "PreTrainedModel":
    """The start model with a new head that gives one score, drawn from N(0, 1 / (d + 1)).

    First scores then are of about unit size: https://arxiv.org/abs/1909.08593, section 2.1.

    Args:
        recipe: a stage's dataclass, built on ModelConfig, with a `seed`.

    Raises:
        UsageError: its architecture has no such head.
    """
    with _quiet():  # it would warn of a head that is not in the checkpoint, and of one that is not needed
        model = load_model(recipe, AutoModelForSequenceClassification, num_labels=1)
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise UsageError(
            f"model_name_or_path: {type(model).__name__} has no linear head `score` to be trained; start "
            "from a decoder-only language model"
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    drawn = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(drawn)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _is_ours(model: Any) -> bool:
    return bool(model.config.model_type == "trueup_gpt")


def _check_padding(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Ours finds the end by the attention mask; Transformers' classifiers by ids that are not padding."""
    if not _is_ours(model) and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise UsageError(
            f"model_name_or_path: the tokenizer's pad token must not be its eos token, "
            f"{tokenizer.eos_token}, or this architecture would read the score before the end. Give the "
            "tokenizer in the model's directory a pad token of its own: tokenizer.pad_token = '<|pad|>'"
        )


def _scorer(trainer: "RewardTrainer", name: str) -> "RewardModelScorer":
    """The trained model as it will be used: without autocast, as the published directory is."""
    from trueup.eval.scorers import RewardModelScorer

    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    return RewardModelScorer(model, trainer.processing_class, name)


def _say(*lines: Any) -> None:
    if is_main_process():
        for line in lines:
            print(line, flush=True)
