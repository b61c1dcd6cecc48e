"""Outcomes pair by pair: by scores, or by whoever says which of two answers is better.

Scores make an outcome of every pair of arms. A judge or people are asked pair by pair; as a score beside
others they then give the outcome against the baseline, whose own is a half.
"""

import hashlib
import json
import math
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trueup.eval.compare_samples import BASELINE, Answers, Arm, Bench, Measures, Row
from trueup.eval.compare_statistics import duel
from trueup.eval.judge import JudgeScorer
from trueup.eval.rendering import as_completions
from trueup.recipes.directory import ModelDirectory
from trueup.recipes.errors import UsageError

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

    def knows(self, a: Arm, b: Arm) -> bool:
        """Whether it has anything to say of two arms."""
        ...

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
    """Each pair as the scorer says, repetition by repetition; those that it knows nothing of are left out."""
    by_name = {arm.name: arm for arm in arms}

    def side(name: str, repetition: int) -> Side:
        said = answers[name][repetition % len(answers[name])]
        return Side(name, by_name[name].directory(repetition), said)

    found = Duels()
    for a, b in pairs:
        if not scorer.knows(by_name[a], by_name[b]):
            continue
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
        even = np.full((count, prompts), 0.5)
        unknown = np.full((count, prompts), math.nan)
        pair = (arm.name, BASELINE)
        found[arm.name] = even if arm.name == BASELINE else duels.outcomes.get(pair, unknown)[:count]
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

    def knows(self, a: Arm, b: Arm) -> bool:
        """See `PairScorer`: anybody may be asked."""
        return True

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


# ------------------------------------------------------------------------------------------------ people


class VotedPairs:
    """The votes that people gave in `trueup app`, blind: on the same models, by content, and the same prompt.

    The answers they saw are not those of the comparison: models were sampled for each of them.

    Args:
        path: the app's SQLite file.

    Raises:
        UsageError: it holds no votes.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.votes: dict[tuple[str, str, str], list[tuple[float, int]]] = defaultdict(list)
        self.counted = 0
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
                rows = connection.execute(
                    "SELECT choice, left_identity, left, right_identity, right FROM votes ORDER BY time, id"
                ).fetchall()
        except sqlite3.Error as error:
            raise UsageError(f"scorers: {path}: holds no votes of `trueup app` ({error})") from error
        for choice, left, ours, right, theirs in rows:
            outcome = {"left": 1.0, "right": 0.0}.get(choice, 0.5)
            mine, yours = json.loads(ours), json.loads(theirs)
            both = takewhile(lambda turns: turns[0] == turns[1], zip(mine[:-1], yours[:-1], strict=False))
            asked = _key([turn for turn, _ in both])
            longer = len(mine[-1]["content"]) - len(yours[-1]["content"])
            self.votes[left, right, asked].append((outcome, longer))
            self.votes[right, left, asked].append((1 - outcome, -longer))

    def fingerprint(self) -> dict[str, str]:
        """What identifies the votes, as of a data set."""
        told = json.dumps(sorted(map(list, self.votes.items())))
        return {"name": self.name, "split": "votes", "sha256": hashlib.sha256(told.encode()).hexdigest()}

    def knows(self, a: Arm, b: Arm) -> bool:
        """See `PairScorer`. Best-of-n is no model that anybody could have met."""
        met = {(left, right) for left, right, _ in self.votes}
        pairs = ((one.identity, other.identity) for one in a.directories for other in b.directories)
        return not a.best_of and not b.best_of and any(pair in met for pair in pairs)

    def duel(self, bench: Bench, ours: Side, theirs: Side) -> list[Row]:
        """See `PairScorer`: of several votes on one prompt the mean."""
        found = []
        for place, row in enumerate(bench.prompts):
            asked = row["prompt"]
            messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            cast = self.votes.get((ours.model.identity, theirs.model.identity, _key(messages)), [])
            self.counted += len(cast)
            outcome, length = np.mean(cast, axis=0).tolist() if cast else (None, 0)
            found.append({"row": place, "outcome": outcome, "length": length})
        return found

    def account(self) -> dict[str, float]:
        """Votes counted, and all that the file holds."""
        return {"votes": self.counted, "recorded": sum(map(len, self.votes.values())) // 2}


def _key(messages: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps([[turn["role"], turn["content"]] for turn in messages], ensure_ascii=False)
