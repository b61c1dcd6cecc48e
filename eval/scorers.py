"""Scorers: callables `(prompts, completions, **columns) -> list[float]`, TRL's signature for reward
functions.

So one scorer serves GRPO, RLOO and PPO as reward, and evaluation and comparison as measure. Prompts are
strings or conversations; completions strings or lists with the assistant's turn; columns are those of the
data set, one value per row. nan means "no verdict".
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from trueup.eval.rendering import Text, encode_pair, plain
from trueup.recipes.directory import ModelDirectory, read_json, write_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.hub import names_model, short_name
from trueup.recipes.machine import accelerator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REGISTERED = {
    "gold": "trueup.recipes.lab.gold:gold",
    "length": "trueup.eval.scorers:length",
}
SIDECAR = "calibration.json"


class Scorer(Protocol):
    """What every scorer is. `name` is how recipes, reports and TRL's metrics call it."""

    name: str

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """One score per row, higher is better."""
        ...


def resolve_scorer(name: str, place: str = "", **options: Any) -> Scorer:
    """The scorer of a name in a recipe.

    Args:
        name: a registered name (`gold`, `length`, or `judge`), `module:function`, or a reward model's
            directory or Hub id.
        place: where the name was written (`recipe.yaml:3: reward_funcs`), for messages.
        options: of `RewardModelScorer.open` (a directory) or `JudgeScorer` (`judge`); functions take none.

    Raises:
        UsageError: there is no such scorer.
        TrueupError: the directory's model is damaged or was never trained.
    """
    at = f"{place}: " if place else ""
    if name == "judge":
        from trueup.eval.judge import JudgeScorer

        if not {"base_url", "model"} <= set(options):
            raise UsageError(f"{at}judge: needs the base_url of an endpoint and the name of a model there")
        return JudgeScorer(**options)
    if name in REGISTERED:
        return FunctionScorer(_import(REGISTERED[name], at), name)
    if names_model(name):
        return RewardModelScorer.open(name, place=place, **options)
    if ":" in name:
        return FunctionScorer(_import(name, at), name)
    known = ", ".join([*REGISTERED, "judge"])
    raise UsageError(
        f"{at}{name}: no such scorer; give a reward model's directory or Hub id, module:function, or {known}"
    )


def _import(target: str, at: str) -> Callable[..., Any]:
    module_name, _, function_name = target.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does, and a console script does not: the current folder
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{at}{target}: cannot be imported ({error}); check module and function") from error
    if not callable(function):
        raise UsageError(f"{at}{target}: is not a function (prompts, completions, **columns) -> list[float]")
    return function


def length(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
    """Words per completion: what a reward model must not be measuring."""
    return [float(len(plain(completion).split())) for completion in completions]


class FunctionScorer:
    """A Python function as a scorer; None, which TRL allows for "no score", becomes nan."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.name = self.__name__ = name  # TRL names its metrics by __name__

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """What the function says, checked.

        Raises:
            UsageError: it did not return one number or None per completion.
        """
        scores = self.function(prompts=prompts, completions=completions, **columns)
        try:
            numbers = [math.nan if score is None else float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.name}: must return a list of numbers, not {scores!r:.80}") from error
        if len(numbers) != len(completions):
            raise UsageError(
                f"{self.name}: returned {len(numbers)} scores for {len(completions)} completions"
            )
        return numbers


# ---------------------------------------------------------------------------------------------- reward models


@dataclass(frozen=True)
class Calibration:
    """Scores are (raw - mean) / std, so that 0 is an ordinary reply and 1 a standard deviation better."""

    mean: float
    std: float

    @classmethod
    def of(cls, raw: Sequence[float]) -> "Calibration":
        """From raw scores of reference samples.

        Raises:
            TrueupError: they do not differ, so nothing can be told by them.
        """
        mean = math.fsum(raw) / len(raw)
        std = math.sqrt(math.fsum((score - mean) ** 2 for score in raw) / len(raw))
        if not std > 0:
            raise TrueupError(
                f"calibration: {len(raw)} scores have standard deviation {std}; check the model"
            )
        return cls(mean, std)

    def save(self, path: Path) -> None:
        """Write it as a sidecar file: foreign reward models are never modified."""
        write_json(path, asdict(self))


class RewardModelScorer:
    """A sequence classifier of one label, read at the end of the reply.

    A score is the same alone and in any batch, padded left or right, up to rounding. A column `ended`
    (bools) marks replies that were cut: they are scored without eos, as the model would have met them.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        name: str,
        *,
        calibration: Calibration | None = None,
        batch_size: int = 32,
        padding_side: Literal["left", "right"] = "right",
        autocast: "torch.dtype | None" = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name = self.__name__ = name
        self.calibration = calibration
        self.padding_side, self.autocast = padding_side, autocast
        # Transformers' own classifiers find the last token by comparing with this id, and have no other way.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        self.batch_size = 1 if model.config.pad_token_id is None else batch_size

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        place: str = "",
        calibration: Path | None = None,
        device: str | None = None,
        dtype: "torch.dtype | None" = None,
        **options: Any,
    ) -> "RewardModelScorer":
        """From a model directory.

        Args:
            calibration: a sidecar file; default `calibration.json` in the directory, then `trueup.json`.
                Our own reward models carry theirs in the config and apply it themselves.
            device: default: the accelerator if there is one.
            dtype: of the weights; default: as stored.
            options: of `RewardModelScorer`.

        Raises:
            UsageError: no such directory, another kind of model, or it would be calibrated twice.
            TrueupError: it is damaged, or was never trained.
        """
        from trueup.eval.loading import load_reward_model

        model, tokenizer, opened = load_reward_model(directory, dtype, place)
        found = _calibration(model, opened, calibration)
        return cls(
            model.to(device or accelerator()), tokenizer, short_name(directory), calibration=found, **options
        )

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """One score per row.

        Raises:
            UsageError: a row is longer than the model's context, or the tokenizer has no chat template.
        """
        ended = columns.get("ended") or [True] * len(prompts)
        rows = zip(prompts, completions, ended, strict=True)
        return self.score_tokens([encode_pair(self.tokenizer, *row) for row in rows])

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Scores of token sequences, prompt and reply together, in their order."""
        import torch

        from trueup.eval.sampler import evaluating

        self._check_lengths(rows)
        order = sorted(
            range(len(rows)), key=lambda row: -len(rows[row])
        )  # alike lengths together: little padding
        scores = torch.zeros(len(rows), dtype=torch.float64)
        with evaluating(self.model, self.autocast):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                logits = self.model(**self._padded([rows[row] for row in batch])).logits
                scores[batch] = logits[:, 0].double().cpu()
        if self.calibration:
            scores = (scores - self.calibration.mean) / self.calibration.std
        return scores.tolist()

    def _padded(self, rows: list[Sequence[int]]) -> dict[str, "torch.Tensor"]:
        import torch

        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.model.config.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(width - len(row), width) if self.padding_side == "left" else slice(0, len(row))
            ids[index, place] = torch.tensor(row)
            mask[index, place] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.padding_side == "left":  # not otherwise: some encoders count positions in a way of their own
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _check_lengths(self, rows: Sequence[Sequence[int]]) -> None:
        context = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        for index, row in enumerate(rows):
            if not 0 < len(row) <= context:
                raise UsageError(
                    f"{self.name}: row {index} has {len(row)} tokens, and the model's context is {context}; "
                    "drop such rows, or shorten prompts or replies"
                )


def _calibration(
    model: "PreTrainedModel", opened: ModelDirectory, sidecar: Path | None
) -> Calibration | None:
    beside = opened.path / SIDECAR
    path = sidecar or (beside if beside.exists() else None)
    if model.config.model_type == "trueup_gpt" and model.config.reward_std is not None:
        if path:
            raise UsageError(
                f"{path}: {opened.path} applies its own calibration; delete or do not name the file"
            )
        return None
    found = read_json(path) if path else opened.record.get("metrics", {})
    mean, std = ("mean", "std") if path else ("reward_mean", "reward_std")
    if path and not (isinstance(found, dict) and {mean, std} <= set(found)):
        raise TrueupError(f'{path}: must hold {{"mean": ..., "std": ...}}')
    return Calibration(float(found[mean]), float(found[std])) if {mean, std} <= set(found) else None
