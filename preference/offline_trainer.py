"""What DPO and KTO share as trainers: counted rows, no dropout, a checked start, a reference that resumes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trueup.base import GPTForCausalLM
from trueup.base.trainer import LengthGroups, StageTrainer, whole
from trueup.preference.dpo_checks import (
    ROUNDING,
    answer_log_probs,
    check_dropout,
    check_log_probs,
    check_loss,
    check_margins,
    check_tokens,
)
from trueup.preference.lean_head import add_lean_head
from trueup.preference.value import disable_dropout, language_model

MEASURED = 1000  # rows of a data set whose tokens are counted
REFERENCE = "reference.safetensors"  # in a checkpoint, where the reference moves
_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class AnswerTokens:
    """What became of one data set's rows.

    Args:
        answer, total: mean tokens of an answer, and of a prompt with it, before they are cut.
        cut: rows longer than `max_length`; where the set is large, as many as its first rows let expect.
    """

    name: str
    rows: int | None  # None: a stream
    answer: float
    total: float
    max_length: int | None
    cut: float  # share
    left_out: list[str]

    def lines(self) -> list[str]:
        """For people."""
        rows = "a stream" if self.rows is None else f"{self.rows:,} rows"
        share = self.answer / self.total
        lines = [
            f"{self.name}: {rows}, {self.total:.0f} tokens per answer with its prompt, {share:.0%} its own"
        ]
        if self.cut:
            lines.append(f"  cut to {self.max_length:,}: {self.cut:.1%} of the rows, which then have no end")
        return lines + [f"  {line}" for line in self.left_out]


def count_tokens(
    tokens: Dataset | IterableDataset, name: str, max_length: int | None, left_out: list[str]
) -> AnswerTokens:
    """Of prepared rows: `prompt_ids` and one or several of `chosen_ids`, `rejected_ids`, `completion_ids`."""
    prompts, answers = [], []
    for row in tokens.take(MEASURED):
        for side in ("chosen_ids", "rejected_ids", "completion_ids"):
            if side in row:
                prompts.append(len(row["prompt_ids"]))
                answers.append(len(row[side]))
    total = np.array(prompts) + np.array(answers)
    return AnswerTokens(
        name=name,
        rows=len(tokens) if isinstance(tokens, Dataset) else None,
        answer=float(np.mean(answers)),
        total=float(np.mean(total)),
        max_length=max_length,
        cut=float(np.mean(total > (max_length or math.inf))),
        left_out=left_out,
    )


class OfflineTrainer(StageTrainer):
    """Put it before TRL's DPOTrainer or KTOTrainer.

    Attributes:
        reports: what the preparation did, by data set name (`train`, `eval`).
        left_out: lines about rows that were dropped before, by the same names.
        reference_is_start: whether policy and reference are the same model at step 0.
    """

    _metrics: dict[str, Any]
    _total_train_tokens: float

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        *,
        left_out: Mapping[str, list[str]] | None = None,
        reference_is_start: bool = True,
        **kwargs: Any,
    ) -> None:
        self.reports: dict[str, AnswerTokens] = {}
        self.left_out = left_out or {}
        self.reference_is_start = reference_is_start
        self.start_checked = False
        # TRL turns off nn.Dropout alone; an attention hands its number to a functional one. Set on the
        # modules, not in the config: that is published as it was.
        for part in (model, ref_model):
            if part is not None:
                disable_dropout(part)
        super().__init__(model, ref_model, **kwargs)
        disable_dropout(self.model)  # of the adapter, which TRL has made
        if self._lean_head_applies():
            for part in (self.model, self.ref_model):
                if part is not None:
                    add_lean_head(language_model(part))

    def _lean_head_applies(self) -> bool:
        args = self.args
        return (
            args.device.type == "cpu"
            and not args.torch_compile
            and not getattr(args, "use_weighting", False)  # needs a figure that this head does not have
            and isinstance(language_model(self.model), GPTForCausalLM)
        )

    @property
    def loss_name(self) -> str:
        """For people."""
        raise NotImplementedError

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Dataset | IterableDataset:
        tokens = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        left_out = self.left_out.get(dataset_name, [])
        self.reports[dataset_name] = count_tokens(tokens, dataset_name, args.max_length, left_out)
        return tokens

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        sides = [
            side for side in ("chosen_ids", "rejected_ids", "completion_ids") if side in dataset.column_names
        ]
        lengths = [
            len(prompt) + max(map(len, answers))
            for prompt, *answers in zip(*(dataset[name] for name in ("prompt_ids", *sides)), strict=True)
        ]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroups(lengths, self.args.train_batch_size, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """In order: Transformers' groups look for `input_ids`, and these rows have several."""
        return SequentialSampler(eval_dataset) if isinstance(eval_dataset, Dataset) else None

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        for metrics in self._metrics.values():
            metrics.pop("num_tokens", None)  # forgets what was before a resume; Trainer's own count does not
        return loss

    # --------------------------------------------------------------------------------------------- the start

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if self.state.global_step == 0 and not self.start_checked:
            self.start_checked = True
            self.check_start(model, self._prepare_inputs(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def check_start(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        """Check the first batch as it will be trained, and say so in one line; see dpo_checks.py.

        Raises:
            TrueupError: something is wrong, with its cause and the fix.
        """
        check_dropout(model)
        eos = self.processing_class.eos_token_id
        fraction = check_tokens(inputs, eos, self.args.max_length)
        precision = _PRECISION.get(self.args.mixed_precision, next(model.parameters()).dtype)
        allowed = ROUNDING[precision]
        with whole(self, model) as bare:
            answers = answer_log_probs(bare, inputs, _PRECISION.get(self.args.mixed_precision))
        model.train()
        loss, figures = self._first_loss(model, inputs)
        expected = self.mean_log_probs(answers, inputs)
        check_log_probs({side: figures[f"logps/{side}"] for side in expected}, expected, allowed)
        said = f"{fraction:.0%} of the tokens trained, one end of turn for each answer, dropout off"
        if self.reference_is_start:
            ratios = {side: figures[f"rewards/{side}"] / self.beta for side in expected}
            check_margins(ratios, [*expected.values()], allowed)
            value = self.loss_at_start(answers, inputs)
            moved = 4 * max(self.beta, 1 / self.beta) * max(map(abs, ratios.values()))
            check_loss(loss, value, allowed.loss * max(1.0, abs(value)) + moved, self.loss_name)
            said = f"loss {loss:.4f} ({self.loss_name}) as it must be, margins 0, {said}"
        else:
            said = f"{said}; the reference is another model, so margins do not begin at 0"
        if self.is_world_process_zero():
            print(f"first batch checked: {said}", flush=True)

    def _first_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[float, dict[str, float]]:
        """Loss and figures of a batch, of this process, and no trace of it in the log.

        Without what no closed form has: the weights of WPO, and the balance of a mixture of experts.
        """
        kept = {
            name: getattr(self, name) for name in ("use_weighting", "aux_loss_enabled") if hasattr(self, name)
        }
        tokens = self._total_train_tokens
        for name in kept:
            setattr(self, name, False)
        with self.compute_loss_context_manager():
            loss = float(self.compute_loss(model, inputs))
        figures = {name: values[-1] for name, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        self._total_train_tokens = tokens
        for name, value in kept.items():
            setattr(self, name, value)
        return loss, figures

    def mean_log_probs(
        self, answers: list[torch.Tensor], inputs: dict[str, torch.Tensor]
    ) -> dict[str, float]:
        """The mean log-probability of the answers by side, over all processes, as TRL logs them."""
        raise NotImplementedError

    def loss_at_start(self, answers: list[torch.Tensor], inputs: dict[str, torch.Tensor]) -> float:
        """The loss of a batch where policy and reference are equal."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------- a reference that moves

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.sync_ref_model and self.args.should_save:
            reference = self.accelerator.unwrap_model(self.ref_model)
            save_file(dict(reference.named_parameters()), Path(output_dir) / REFERENCE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.args.sync_ref_model and checkpoint is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            reference.load_state_dict(load_file(Path(checkpoint) / REFERENCE), strict=False)


class FallingChosen(TrainerCallback):
    """Explains once, in words, that the chosen answers have become less likely: it looks like a fault, and is
    what the loss asks for. The guards speak where it does harm."""

    def __init__(self) -> None:
        self.said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was said before a resume is not said again."""
        self.said = any(map(_chosen_falls, state.log_history))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.said or not _chosen_falls(logs or {}) or not state.is_world_process_zero:
            return
        self.said = True
        chosen, rejected = (logs or {})["rewards/chosen"], (logs or {})["rewards/rejected"]
        print(
            f"step {state.global_step}: the chosen answers are now less likely than under the reference "
            f"(rewards/chosen {chosen:+.2f}), the rejected ones even less ({rejected:+.2f}). That is usual: "
            "only the margin between them is trained. It does no harm while the validation score holds; if "
            "that falls too, lower learning_rate, raise beta, or hold the chosen ones up by an SFT term: "
            "loss_type [sigmoid, sft] with loss_weights [1, 0.1]",
            flush=True,
        )


def _chosen_falls(line: Mapping[str, Any]) -> bool:
    """Both fall, the chosen ones by more than the noise of a batch."""
    chosen = line.get("rewards/chosen", 0.0)
    return bool(chosen < -0.1 and line.get("rewards/rejected", 0.0) < chosen)
