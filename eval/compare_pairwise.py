"""Outcomes pair by pair: by scores, or by whoever says which of two answers is better.

Scores make an outcome of every pair of arms. A judge or people are asked pair by pair; as a score beside
others they then give the outcome against the baseline, whose own is a half.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

import numpy as np

from trueup.eval.compare_samples import BASELINE, Answers, Arm, Bench, Measures, Row
from trueup.eval.compare_statistics import duel
from trueup.eval.judge import JudgeScorer
from trueup.eval.rendering import as_completions
from trueup.recipes.directory import ModelDirectory

Pair = tuple[str, str]


@dataclass(frozen=True)
class Side:
    """One side of a duel in one repetition: what was said, by which model, and the arm's name for it."""

    name: str
    model: ModelDirectory
    answers: Answers


class PairScorer(Protocol):
    """Says of two answers to each prompt which is better."""

    name: str

    def duel(self, bench: Bench, ours: Side, theirs: Side) -> list[Row]:
        """Per prompt {"row", "outcome": 1, 0.5, 0 or None, ...}; "length", ours - theirs in characters, where
        other answers than these were judged."""
        ...

    def account(self) -> dict[str, float]:
        """Figures on the duels so far, for the report."""
        ...


@dataclass(frozen=True)
class Duels:
    """What came of the pairs (a, b), from a's side: tables (repetitions, prompts).

    Args:
        outcomes: 1, 0.5, 0, or nan.
        lengths: how much longer a's answer was, in characters.
    """

    outcomes: dict[Pair, np.ndarray] = field(default_factory=dict)
    lengths: dict[Pair, np.ndarray] = field(default_factory=dict)

    def unjudged(self) -> list[Pair]:
        """Pairs without a single outcome."""
        return [pair for pair, table in self.outcomes.items() if np.isnan(table).all()]


def every_pair(arms: Sequence[Arm]) -> list[Pair]:
    """Each arm over those before it."""
    return [(a.name, b.name) for b, a in combinations(arms, 2)]


def by_scores(arms: Sequence[Arm], tables: Mapping[str, Measures], measure: str) -> Duels:
    """The higher score wins."""
    found = Duels()
    for a, b in every_pair(arms):
        found.outcomes[a, b] = duel(tables[a][measure], tables[b][measure])
        found.lengths[a, b] = tables[a]["characters"] - tables[b]["characters"]
    return found


def by_pairs(
    scorer: PairScorer,
    bench: Bench,
    arms: Sequence[Arm],
    answers: Mapping[str, Sequence[Answers]],
    pairs: Sequence[Pair],
) -> Duels:
    """Each pair as the scorer says, repetition by repetition."""
    by_name = {arm.name: arm for arm in arms}

    def side(name: str, repetition: int) -> Side:
        said = answers[name][repetition % len(answers[name])]
        return Side(name, by_name[name].directory(repetition), said)

    found = Duels()
    for a, b in pairs:
        repetitions = range(max(len(answers[a]), len(answers[b])))
        sides = [(side(a, repetition), side(b, repetition)) for repetition in repetitions]
        rows = [scorer.duel(bench, *one) for one in sides]
        found.outcomes[a, b] = _table(rows, lambda row: row["outcome"])
        longer = [_longer(ours.answers, theirs.answers) for ours, theirs in sides]
        found.lengths[a, b] = np.array(
            [
                [row.get("length", usual[row["row"]]) for row in one]
                for one, usual in zip(rows, longer, strict=True)
            ],
            float,
        )
    return found


def as_scores(
    duels: Duels, arms: Sequence[Arm], answers: Mapping[str, Sequence[Answers]]
) -> dict[str, np.ndarray]:
    """Arm -> its outcomes against the baseline, (repetitions, prompts); the baseline's own are a half."""
    prompts = len(answers[BASELINE][0].rows)
    found = {}
    for arm in arms:
        count = len(answers[arm.name])
        table = np.full((count, prompts), 0.5)
        found[arm.name] = table if arm.name == BASELINE else duels.outcomes[arm.name, BASELINE][:count]
    return found


def _table(rows: Sequence[Sequence[Row]], value: Callable[[Row], Any]) -> np.ndarray:
    return np.array([[math.nan if value(row) is None else value(row) for row in one] for one in rows], float)


def _longer(ours: Answers, theirs: Answers) -> list[int]:
    both = zip(ours.rows, theirs.rows, strict=True)
    return [len(one["completion"]) - len(other["completion"]) for one, other in both]


# ------------------------------------------------------------------------------------------------ a judge


class JudgedPairs:
    """A judge's duels, kept on disk beside the samples: no pair is paid for twice.

    Args:
        judge: asked in both orders.
    """

    def __init__(self, judge: JudgeScorer) -> None:
        self.judge, self.name = judge, judge.name
        self.rows: list[Row] = []

    def duel(self, bench: Bench, ours: Side, theirs: Side) -> list[Row]:
        """See `PairScorer`; the rows also hold what was said in either order."""
        prompts = [row["prompt"] for row in bench.prompts]

        def make() -> list[Row]:
            said = [
                as_completions(prompts, [row["completion"] for row in side.answers.rows])
                for side in (ours, theirs)
            ]
            judgements = self.judge.judgements(prompts, *said)
            return [{"row": place, **judgement} for place, judgement in enumerate(judgements)]

        inputs = [self.name, ours.answers.file, theirs.answers.file]
        rows = bench.kept(f"judged-{ours.name}-{theirs.name}", inputs, make)[1]
        self.rows += rows
        return rows

    def account(self) -> dict[str, float]:
        """Pairs judged; in how many the orders disagreed; replies without a verdict."""
        orders = [(row["straight"], row["swapped"]) for row in self.rows]
        return {
            "pairs": len(self.rows),
            "disagreed": sum(row["disagreed"] for row in self.rows),
            "malformed": sum(one is None for pair in orders for one in pair),
        }
