"""Validation along the way: what a policy says on held-out prompts, scored by what it is not trained on.

    validation = Validation(frozen_prompts(...), tokenizer, open_scorers(["gold"], args), max_new_tokens=64)
    figures, table = validation(policy, reference)

    trainer.add_callback(ValidationCallback(trainer, validation, reference))

One instrument for all preference stages: always the same prompts, at temperature 1, each row with random
numbers of its own. So two evaluations differ by the policy alone, and two arms can be compared.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trueup.base.stage import key
from trueup.base.trainer import whole
from trueup.eval.kl import kl_of_samples
from trueup.eval.pathologies import pathologies
from trueup.eval.rendering import as_completions, encode_prompt
from trueup.eval.sampler import Sample, SamplingSettings, sample
from trueup.eval.scorers import RewardModelScorer, Scorer, resolve_scorer
from trueup.recipes.directory import Kind
from trueup.recipes.hub import names_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]

COMPLETIONS = "completions"
SHOWN = 3  # completions of an evaluation that are printed
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ValidationArguments:
    """Keys of every preference stage."""

    scorers: list[str] | None = field(
        default=None,
        metadata={"help": "What evaluations measure besides, never trained on; the first is eval_score."},
    )
    max_eval_prompts: int = key(256, "Held-out prompts sampled at each evaluation; 0: none.")
    log_completions: bool = key(True, f"Show {SHOWN} sampled completions at each evaluation.")
    on_alarm: str = key(
        "warn", "What a guard's alarm does: warn, or stop with a checkpoint.", choices=["warn", "stop"]
    )
    keep_checkpoints: str = key(
        "none",
        "Left in the work directory after publishing: none; or evaluated: the models of all evaluations.",
        choices=["none", "evaluated"],
    )

    def checkpoints_kept(self) -> dict[str, Any]:
        """What `keep_checkpoints` makes of the trainer's own arguments."""
        if self.keep_checkpoints == "none":
            return {}
        every: Any = self  # the trainer's keys are of the stages' own classes
        strategy = {"save_strategy": every.eval_strategy, "save_steps": every.eval_steps}
        return strategy | {"save_total_limit": None}


def validation_contradictions(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """See `trueup.recipes.stages.Stage`."""
    best = given.get("metric_for_best_model") or ""
    if best.removeprefix("eval_") == "score" and not given.get("scorers"):
        yield "metric_for_best_model", "is the first scorer's; name scorers, such as [gold]"
    if given.get("keep_checkpoints", "none") == "none":
        return
    if given.get("eval_strategy") == "no":
        yield "keep_checkpoints", "evaluated, and eval_strategy: no contradict each other; delete one"
    for name in ("save_strategy", "save_steps", "save_total_limit"):
        if name in given:
            yield name, "and keep_checkpoints: evaluated contradict each other; delete one"


def scorer_parents(names: Sequence[str] | None, role: str = "scorers") -> dict[str, tuple[str, Kind | None]]:
    """The reward models among scorers, as a stage's `parents` names them."""
    return {
        f"{role}[{place}]": (name, "reward") for place, name in enumerate(names or []) if names_model(name)
    }


def open_scorers(names: Sequence[str] | None, args: TrainingArguments) -> list[Scorer]:
    """The scorers of a recipe; reward models go to the run's device, in its precision.

    Raises:
        UsageError: there is no such scorer.
        TrueupError: a directory's model is damaged or was never trained.
    """
    model_options = {"device": str(args.device), "autocast": _AUTOCAST.get(args.mixed_precision)}
    return [
        resolve_scorer(name, "scorers", **(model_options if names_model(name) else {}))
        for name in names or []
    ]


def frozen_prompts(
    dataset: Any,
    count: int,
    tokenizer: "PreTrainedTokenizerBase",
    context: int | None,
    max_new_tokens: int,
) -> list[Row]:
    """Rows of different prompts, chosen at random but always the same ones; all columns ride along.

    Args:
        dataset: rows with a `prompt`, a string or a conversation. Of a stream the first are taken.
        context: the model's, in tokens; prompts that leave no room for a completion are passed over.
    """
    room = math.inf if context is None else context - min(max_new_tokens, context // 2)
    if hasattr(dataset, "__len__"):
        places = list(range(len(dataset)))
        Random(0).shuffle(places)
        rows: Iterator[Row] = (dataset[place] for place in places)
    else:
        rows = iter(dataset)
    seen: set[str] = set()

    def wanted(row: Row) -> bool:
        name = json.dumps(row["prompt"], sort_keys=True)
        if name in seen or len(encode_prompt(tokenizer, row["prompt"])) > room:
            return False
        seen.add(name)
        return True

    return list(islice(filter(wanted, rows), count))


# ---------------------------------------------------------------------------------------------- the measure


@dataclass(frozen=True)
class Validation:
    """Samples from a policy on frozen prompts, and what is measured on them.

    Args:
        rows: what is sampled, each with a `prompt`; their other columns are handed to the scorers.
        scorers: the first gives the figure `score`.
        max_new_tokens: a completion that long is cut.
    """

    rows: Sequence[Row]
    tokenizer: "PreTrainedTokenizerBase"
    scorers: Sequence[Scorer] = ()
    max_new_tokens: int = 256
    seed: int = 0

    def __call__(
        self,
        policy: "PreTrainedModel",
        reference: "PreTrainedModel | Path | str | None",
        autocast: torch.dtype | None = None,
    ) -> tuple[dict[str, float], list[Row]]:
        """Sample, score, measure. With several processes each samples a share and gets the whole.

        Args:
            reference: what the KL is measured from; None: the policy with its LoRA adapter switched off.

        Returns:
            Figures: `score` and `scorers/NAME` (means), `kl` and `kl_stderr` (nats per completion), those of
            `pathologies`, with the entropy as `completions/entropy`: TRL's own is that of the data set's
            text. A table of {"prompt", "completion", "scorers/NAME"...} in the order of the rows.
        """
        samples, table = self._samples(policy, autocast)
        names = [name for name in table[0] if name.startswith("scorers/")]
        figures = {name: _mean([entry[name] for entry in table]) for name in names}
        if names:
            figures = {"score": figures[names[0]], **figures}
        kl = kl_of_samples(policy, reference, samples, autocast=autocast)
        figures |= {"kl": kl.per_sequence, "kl_stderr": kl.stderr, **pathologies(samples)}
        figures["completions/entropy"] = figures.pop("entropy")
        return {name: value for name, value in figures.items() if not math.isnan(value)}, table

    def _samples(
        self, policy: "PreTrainedModel", autocast: torch.dtype | None
    ) -> tuple[list[Sample], list[Row]]:
        process = PartialState()
        mine = range(process.process_index, len(self.rows), process.num_processes)
        rows = [self.rows[row] for row in mine]
        settings = SamplingSettings(max_new_tokens=self.max_new_tokens, seed=self.seed)
        samples = sample(
            policy,
            self.tokenizer,
            [row["prompt"] for row in rows],
            settings,
            keys=mine,
            log_probs=True,
            autocast=autocast,
        )
        scores = {
            f"scorers/{s.name}": completion_scores(s, self.tokenizer, rows, samples) for s in self.scorers
        }
        found = [
            (
                place,
                samples[i],
                {"prompt": rows[i]["prompt"], "completion": samples[i].text}
                | {name: values[i] for name, values in scores.items()},
            )
            for i, place in enumerate(mine)
        ]
        everything = sorted(gather_object(found), key=lambda one: one[0])
        return [one for _, one, _ in everything], [entry for _, _, entry in everything]


def completion_scores(
    scorer: Scorer, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], samples: Sequence[Sample]
) -> list[float]:
    """What a scorer says of samples: a reward model that reads the same tokens, of these very tokens.

    Args:
        tokenizer: the policy's.
        rows: where the prompts come from; their other columns are handed on.
    """
    if not rows:
        return []
    if isinstance(scorer, RewardModelScorer) and same_tokens(scorer.tokenizer, tokenizer):
        return scorer.score_tokens([one.prompt_ids + one.ids for one in samples])
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    columns |= {"ended": [one.ended for one in samples], "completion_ids": [one.ids for one in samples]}
    prompts = [row["prompt"] for row in rows]
    return scorer(prompts, as_completions(prompts, [one.text for one in samples]), **columns)


def same_tokens(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> bool:
    """Whether two tokenizers give the same ids to the same text, as far as the vocabulary tells."""
    return one is other or (one.get_vocab() == other.get_vocab() and one.eos_token_id == other.eos_token_id)


def _mean(numbers: Sequence[float]) -> float:
    """Of those that are not nan: a scorer may have no verdict."""
    known = [number for number in numbers if not math.isnan(number)]
    return sum(known) / len(known) if known else math.nan


# ------------------------------------------------------------------------------------- along a training run


class ValidationCallback(TrainerCallback):
    """Validates before the first step and at each evaluation of a Trainer.

    The figures are logged with the prefix `eval_`, where guards and trackers see them, and join the metrics
    of the evaluation, where `metric_for_best_model` finds them. The completions go to
    `completions/step-N.jsonl` in the Trainer's `output_dir`.

    Args:
        reference: the model that the KL is measured from, or its directory, which is then opened each time;
            None: the policy with its adapter switched off.
        show: print the first few completions.
    """

    def __init__(
        self, trainer: Trainer, validation: Validation, reference: Any = None, show: bool = False
    ) -> None:
        self.trainer, self.validation = trainer, validation
        self.reference, self.show = reference, show

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where it all starts from; not at `on_train_begin`, when other callbacks are not ready for a log."""
        if state.global_step == 0:
            self._validate(args, state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        figures = self._validate(args, state)
        if metrics is not None:
            metrics |= figures

    def _validate(self, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        autocast = _AUTOCAST.get(args.mixed_precision)
        with contextlib.ExitStack() as stack:
            policy = stack.enter_context(whole(self.trainer, self.trainer.model_wrapped))
            reference = self.reference
            if isinstance(reference, torch.nn.Module):
                reference = stack.enter_context(whole(self.trainer, reference))
            figures, table = self.validation(policy, reference, autocast)
        logged = {f"eval_{name}": value for name, value in figures.items()}
        self.trainer.log(dict(logged))
        if state.is_world_process_zero:
            save_table(table, Path(args.output_dir), state.global_step, self.show)
        return logged


def save_table(table: list[Row], folder: Path, step: int, show: bool) -> None:
    """The completions of an evaluation as `completions/step-N.jsonl`; `show` prints the first few.

    Args:
        table: {"prompt", "completion", and numbers by name}.
    """
    path = folder / COMPLETIONS / f"step-{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in table), encoding="utf-8")
    if show:
        from rich.console import Console
        from rich.table import Table

        numbers = [name for name in table[0] if name not in ("prompt", "completion")]
        shown = Table("prompt", "completion", *numbers, title=f"step {step}", show_lines=True)
        for entry in table[:SHOWN]:
            asked = entry["prompt"]
            asked = asked if isinstance(asked, str) else asked[-1]["content"]
            shown.add_row(asked[-300:], entry["completion"], *(f"{entry[name]:.3f}" for name in numbers))
        Console().print(shown, markup=False)
