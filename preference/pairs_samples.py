"""Several completions of every prompt with their scores: chunk by chunk, each on disk before the next begins.

A completion depends on the model, the seed and its place (prompt, number) alone; chunks are cut the same way
whenever the recipe is the same. So a run that was killed goes on after its last whole chunk, to the same
bits. Under a launcher the processes share the chunks out.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from trueup.base.interrupt import Interrupted, StopRequest
from trueup.base.progress import TrainingProgress
from trueup.eval.judge import JudgeScorer
from trueup.eval.rendering import Text, as_completions
from trueup.eval.sampler import SamplingSettings, sample
from trueup.eval.scorers import Scorer
from trueup.recipes.directory import read_json, write_json
from trueup.recipes.run import is_main_process

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]

CHUNK_BATCHES = 8  # batches in a chunk: what a kill can cost, and what lengths are sorted over


@dataclass(frozen=True)
class Candidates:
    """The completions of one prompt, in the order of their numbers.

    Args:
        texts: without special tokens.
        lengths: in tokens, the end of turn included.
        ended: False for one that was cut.
        scores: nan where a scorer had no verdict.
    """

    texts: list[str]
    lengths: list[int]
    ended: list[bool]
    scores: list[float]

    def usable(self) -> list[int]:
        """Places of those that are an answer: ended, not empty, and scored."""
        return [
            place
            for place, text in enumerate(self.texts)
            if self.ended[place] and text.strip() and math.isfinite(self.scores[place])
        ]


def split_seed(seed: int, split: str) -> int:
    """The seed of a split's random numbers: splits do not share their luck."""
    return Random(f"{seed} sampling {split}").getrandbits(32)


class Labels:
    """The score of completions: scorers' weighted sum. A judge's score is the share of its duels it wins."""

    def __init__(self, scorers: Sequence[Scorer], weights: Sequence[float] | None = None) -> None:
        self.scorers = scorers
        self.weights = weights or [1.0] * len(scorers)

    def __call__(
        self, prompts: list[Text], completions: list[list[Text]], columns: dict[str, list[Any]]
    ) -> list[list[float]]:
        """Scores (prompts, k).

        Args:
            prompts: one for each group of k completions.
            columns: of the prompts; `ended` of the completions, (prompts, k).
        """
        totals = np.zeros((len(prompts), len(completions[0])))
        for scorer, weight in zip(self.scorers, self.weights, strict=True):
            if isinstance(scorer, JudgeScorer):
                totals += weight * duels(scorer, prompts, completions)
            else:
                scores = scorer(*_flat(prompts, completions), **_flat_columns(columns, totals.shape[1]))
                totals += weight * np.reshape(scores, totals.shape)
        found: list[list[float]] = totals.tolist()
        return found


def duels(judge: JudgeScorer, prompts: list[Text], completions: list[list[Text]]) -> np.ndarray:
    """The mean outcome (prompts, k) of each completion against the others; nan without any verdict."""
    count = len(completions[0])
    ones, others = np.triu_indices(count, 1)
    outcomes = judge.compare(
        [prompt for prompt in prompts for _ in ones],
        [group[place] for group in completions for place in ones],
        [group[place] for group in completions for place in others],
    )
    table = np.full((len(prompts), count, count), np.nan)
    table[:, ones, others] = np.reshape(outcomes, (len(prompts), -1))
    table[:, others, ones] = 1 - table[:, ones, others]
    met = (~np.isnan(table)).sum(axis=2)
    return np.where(met > 0, np.nansum(table, axis=2) / np.maximum(met, 1), np.nan)


def _flat(prompts: list[Text], completions: list[list[Text]]) -> tuple[list[Text], list[Text]]:
    """Prompts repeated, and completions in one list beside them."""
    repeated = [prompt for prompt, group in zip(prompts, completions, strict=True) for _ in group]
    return repeated, [one for group in completions for one in group]


def _flat_columns(columns: dict[str, list[Any]], count: int) -> dict[str, list[Any]]:
    flat = {name: [value for value in values for _ in range(count)] for name, values in columns.items()}
    return flat | {"ended": [one for group in columns["ended"] for one in group]}


@dataclass
class CandidateSampler:
    """Draws and scores `num_generations` completions per prompt.

    Args:
        folder: where chunks are kept.
        settings: its seed is the recipe's; each split has one of its own, made from it.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    labels: Labels
    settings: SamplingSettings
    num_generations: int
    folder: Path
    autocast: "torch.dtype | None" = None

    def draw(self, splits: dict[str, list[Row]]) -> dict[str, list[Candidates]]:
        """Candidates of every row (`prompt`, and columns for the scorers) of every split, in order.

        Raises:
            Interrupted: it was asked to stop, and has finished its chunk.
        """
        from accelerate import PartialState

        state = PartialState()
        chunks = [(split, number) for split, rows in splits.items() for number in range(self._count(rows))]
        mine = chunks[state.process_index :: state.num_processes]
        missing = [chunk for chunk in mine if not self._path(*chunk).exists()]
        first = len(mine) - len(missing)
        if first and is_main_process():
            print(f"{first:,} of {len(mine):,} chunks of samples are there: going on", flush=True)
        with (
            StopRequest() as stop,
            TrainingProgress("Sampling", len(mine), first, is_main_process()) as progress,
        ):
            for done, (split, number) in enumerate(missing, start=first + 1):
                drawn = self._draw_chunk(split, self._part(splits[split], number), number)
                write_json(self._path(split, number), [asdict(one) for one in drawn])
                progress.advance(done)
                progress.report(done, {"split": split, "score": _mean_score(drawn)})
                if stop.number and done < len(mine):
                    raise Interrupted(stop.number, done, len(mine))
        state.wait_for_everyone()
        return {split: self._read(split, self._count(rows)) for split, rows in splits.items()}

    @property
    def _prompts_per_chunk(self) -> int:
        return max(1, CHUNK_BATCHES * self.settings.batch_size // self.num_generations)

    def _count(self, rows: list[Row]) -> int:
        return math.ceil(len(rows) / self._prompts_per_chunk)

    def _part(self, rows: list[Row], number: int) -> list[Row]:
        return rows[number * self._prompts_per_chunk :][: self._prompts_per_chunk]

    def _path(self, split: str, number: int) -> Path:
        return self.folder / f"{split}-{number:05}.json"

    def _read(self, split: str, count: int) -> list[Candidates]:
        return [Candidates(**one) for number in range(count) for one in read_json(self._path(split, number))]

    def _draw_chunk(self, split: str, rows: list[Row], number: int) -> list[Candidates]:
        first = number * self._prompts_per_chunk
        count = self.num_generations
        prompts = [row["prompt"] for row in rows]
        samples = sample(
            self.model,
            self.tokenizer,
            [prompt for prompt in prompts for _ in range(count)],
            replace(self.settings, seed=split_seed(self.settings.seed, split)),
            # So that a completion keeps its random numbers when more are drawn for each prompt.
            keys=[((first + place) << 16) + one for place in range(len(rows)) for one in range(count)],
            autocast=self.autocast,
        )
        groups = [samples[start : start + count] for start in range(0, len(samples), count)]
        completions = [
            as_completions([prompt] * count, [one.text for one in group])
            for prompt, group in zip(prompts, groups, strict=True)
        ]
        columns: dict[str, list[Any]] = {
            name: [row[name] for row in rows] for name in rows[0] if name != "prompt"
        }
        columns["ended"] = [[one.ended for one in group] for group in groups]
        scores = self.labels(prompts, completions, columns)
        return [
            Candidates(
                texts=[one.text for one in group],
                lengths=[len(one.ids) for one in group],
                ended=[one.ended for one in group],
                scores=scored,
            )
            for group, scored in zip(groups, scores, strict=True)
        ]


def _mean_score(drawn: list[Candidates]) -> float:
    scores = [score for one in drawn for score in one.scores if math.isfinite(score)]
    return sum(scores) / len(scores) if scores else math.nan
