"""The verdict's arithmetic: tables of scores in, win rates, length control, ratings and plain words out.

A table is (repetitions, prompts): one row per seed, all on the same prompts. `duel` makes outcomes of two
tables of scores; a judge or people give them outright. Every interval goes one way: the statistic is written
as a mean of one value per cell (for a fitted model: estimate + influence of the cell), and `mean_interval`
says how sure that mean is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from trueup.eval.statistics import (
    Interval,
    bootstrap_mean,
    crossed_interval,
    exactly,
    outcomes,
    prompts_to_settle,
    win_rate,
)

ELO = 400 / math.log(10)  # points of Elo per unit of a Bradley-Terry log-strength
SEEDS_WANTED, PROMPTS_WANTED = 5, 800  # below, a verdict is on these models, not on their methods


@dataclass(frozen=True)
class Outcome:
    """What came of one pair of arms on one measure: ties are half a win in `rate`.

    Args:
        wins, ties, losses: shares of the cells; their sum is 1.
        by_seed: the win rate of each repetition.
    """

    rate: Interval
    wins: float
    ties: float
    losses: float
    prompts: int
    missing: int
    by_seed: list[float]


@dataclass(frozen=True)
class PartDifference:
    """How the first arm of a pair differs from the second in one part of the score: a paired difference."""

    difference: Interval
    wins: float
    ties: float
    losses: float


@dataclass(frozen=True)
class Verdict:
    """The rule of a verdict: there is a winner when the interval of the mean win rate excludes 50 %.

    Args:
        winner: None where the arms are not distinguishable.
        text: the same in plain words.
        to_settle: prompts, with one answer each, that would show the observed difference at 80 % power; None
            where there is none, or more seeds are what is needed.
    """

    winner: str | None
    text: str
    to_settle: int | None


# ------------------------------------------------------------------------------------------------ intervals


def mean_interval(table: ArrayLike, share: bool = False) -> Interval:
    """The mean of a table with its 95 % interval: crossed random effects over seeds and prompts, or over
    prompts alone a bootstrap.

    A prompt that lacks a value (nan) in any repetition is left out.

    Args:
        share: the mean is one of zeros and ones: it lies between them, and all alike is not certainty.

    Raises:
        ValueError: no prompt is left.
    """
    cells = _complete(np.atleast_2d(np.asarray(table, float)))
    if (cells == cells.flat[0]).all():
        return bootstrap_mean(cells[0]) if share else exactly(float(cells.flat[0]))
    alone = len(cells) == 1 or cells.shape[1] == 1
    found = bootstrap_mean(cells.mean(axis=0)) if alone else crossed_interval(cells)
    return Interval(found.estimate, max(found.low, 0.0), min(found.high, 1.0)) if share else found


def _complete(cells: np.ndarray) -> np.ndarray:
    kept = cells[:, ~np.isnan(cells).any(axis=0)]
    if not kept.size:
        raise ValueError("no values: every prompt lacks a verdict")
    return kept


# ------------------------------------------------------------------------------------------------ pairs


def duel(ours: ArrayLike, theirs: ArrayLike) -> np.ndarray:
    """Outcomes of two tables of scores; one of a single row stands against every row of the other."""
    return outcomes(np.atleast_2d(ours), np.atleast_2d(theirs))


def compare(results: ArrayLike) -> Outcome:
    """What a table of outcomes comes to.

    Raises:
        ValueError: there is no verdict on any prompt.
    """
    table = np.atleast_2d(results)
    cells = _complete(table)
    counted = win_rate(cells.T)
    return Outcome(
        rate=mean_interval(cells, share=True),
        wins=counted.wins,
        ties=counted.ties,
        losses=counted.losses,
        prompts=cells.shape[1],
        missing=table.shape[1] - cells.shape[1],
        by_seed=cells.mean(axis=1).tolist(),
    )


def difference(ours: ArrayLike, theirs: ArrayLike) -> PartDifference:
    """The mean of ours - theirs, and how often which is the higher."""
    counted = win_rate(_complete(duel(ours, theirs)).T)
    change = mean_interval(np.atleast_2d(ours) - np.atleast_2d(theirs))
    return PartDifference(change, counted.wins, counted.ties, counted.losses)


def verdict(a: str, b: str, outcome: Outcome, equal_length: Interval | None = None) -> Verdict:
    """The verdict on a pair in plain words; also where the winner won by the length of its answers.

    Args:
        equal_length: a's rate over b by `length_controlled`.
    """
    size = f"n = {outcome.prompts:,} prompts"
    if len(outcome.by_seed) > 1:
        size += f" x {len(outcome.by_seed)} seeds"
    if outcome.rate.excludes(0.5):
        ahead = outcome.rate.estimate > 0.5
        winner, loser = (a, b) if ahead else (b, a)
        rate = outcome.rate if ahead else _mirrored(outcome.rate)
        text = f"{winner} beats {loser}: {percent(rate)}, {size}"
        if equal_length and math.isfinite(equal_length.estimate):
            controlled = equal_length if ahead else _mirrored(equal_length)
            if controlled.low <= 0.5:
                text += f"; at equal length it would not: {percent(controlled)}"
        return Verdict(winner, text, None)
    text = f"{a} and {b} are not distinguishable: {percent(outcome.rate)}, {size}"
    needed = prompts_to_settle(outcome.rate.estimate, outcome.ties)
    if needed is None:
        return Verdict(None, f"{text}; no difference was observed", None)
    if needed <= outcome.prompts:  # enough prompts there are: it is the seeds that differ
        return Verdict(
            None, f"{text}; the seeds differ: more of them would settle it, not more prompts", None
        )
    return Verdict(None, f"{text}; about {_rounded(needed):,} prompts would settle such a difference", needed)


def _rounded(count: int) -> int:
    """To two digits: it is an estimate from an estimate."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return round(count / unit) * unit


def _mirrored(rate: Interval) -> Interval:
    return Interval(1 - rate.estimate, 1 - rate.high, 1 - rate.low)


def percent(interval: Interval) -> str:
    """56.0 % [52.6, 59.4]"""
    return f"{interval.estimate:.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]".replace("%", " %")


def points(interval: Interval) -> str:
    """-2.1 points [-3.5, -0.7]"""
    low, high = 100 * interval.low, 100 * interval.high
    return f"{100 * interval.estimate:+.1f} points [{low:+.1f}, {high:+.1f}]"


def fallen_parts(differences: Mapping[str, PartDifference]) -> list[str]:
    """Parts in which the first arm of a pair is worse than the second, beyond chance."""
    return [name for name, found in differences.items() if found.difference.high < 0]


# ------------------------------------------------------------------------------------------------ length


def length_controlled(results: ArrayLike, lengths: ArrayLike) -> Interval:
    """The win rate at equal length.

    A logistic model of the outcome on tanh(difference of lengths / its standard deviation), with that term
    set to zero (https://arxiv.org/abs/2404.04475). A tie is half a win and half a loss.

    Args:
        lengths: ours - theirs.
    """
    results = np.atleast_2d(results)
    lengths = np.broadcast_to(np.atleast_2d(lengths), results.shape)
    spread = lengths.std()
    known = results[~np.isnan(results)]
    if spread == 0 or (known == known.flat[0]).all():  # nothing to control, or nothing to fit
        return mean_interval(results, share=True)
    design = np.stack([np.ones_like(lengths), np.tanh(lengths / spread)], axis=-1)
    coefficients, influence = _logistic(design, results)
    rate = _sigmoid(coefficients[0])
    return mean_interval(rate + rate * (1 - rate) * influence[..., 0], share=True)


def _logistic(design: np.ndarray, results: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A logistic regression without intercept on outcomes 0, 0.5 and 1.

    Args:
        design: (..., coefficients).
        results: (...); nan: no verdict.

    Returns:
        The coefficients, and how much each cell moves them, (..., coefficients): what a bootstrap would
        learn by fitting thousands of times, to first order. The mean over cells is zero.
    """
    from sklearn.linear_model import LogisticRegression

    flat, y = design.reshape(-1, design.shape[-1]), results.reshape(-1)
    known = ~np.isnan(y)
    x, labels = np.concatenate([flat[known]] * 2), np.repeat([1, 0], known.sum())
    weights = np.concatenate([y[known], 1 - y[known]])
    # Hardly any penalty: enough to stay finite where one side wins whenever it is the longer.
    model = LogisticRegression(C=1e4, fit_intercept=False, tol=1e-8, max_iter=1000)
    coefficients = model.fit(x, labels, weights).coef_[0]
    chance = _sigmoid(flat @ coefficients)
    curvature = (flat[known] * (chance * (1 - chance))[known, None]).T @ flat[known] / known.sum()
    influence = (y - chance)[:, None] * (flat @ np.linalg.inv(curvature))
    return coefficients, influence.reshape(design.shape)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(values)


# ------------------------------------------------------------------------------------------------ ratings


def bradley_terry(results: Mapping[tuple[str, str], ArrayLike], anchor: str) -> dict[str, Interval]:
    """Each arm's log-strength over the anchor's: P(a beats b) = sigmoid(a - b), ties half and half.

    Args:
        results: (a, b) -> outcomes of a over b; a cell need not hold an outcome of every pair (nan).
        anchor: the arm whose strength is 0; it has no interval.

    Returns:
        Arm -> strength with its interval; times `ELO` these are points of Elo.
    """
    names = list(dict.fromkeys(name for pair in results for name in pair))
    others = [name for name in names if name != anchor]
    outcomes_of_pairs = np.stack(np.broadcast_arrays(*map(np.atleast_2d, results.values())), axis=-1)
    signs = np.array([[float(name == a) - float(name == b) for name in others] for a, b in results])
    design = np.broadcast_to(signs, (*outcomes_of_pairs.shape, len(others)))
    strengths, influence = _logistic(design, outcomes_of_pairs)
    # A cell's outcomes belong together: its influence is that of all of them, and of none it knows nothing.
    known = ~np.isnan(outcomes_of_pairs)
    cells = known.any(axis=-1)
    moved = np.nansum(influence, axis=-2) * cells.sum() / known.sum()
    moved[~cells] = np.nan
    found = {name: mean_interval(strengths[place] + moved[..., place]) for place, name in enumerate(others)}
    return {name: found.get(name, Interval(0.0, 0.0, 0.0)) for name in names}


def size_note(seeds: int, prompts: int) -> str | None:
    """What a comparison of this size cannot say."""
    if seeds < SEEDS_WANTED:
        return (
            f"{seeds} seed{'s' * (seeds > 1)}: the verdicts are on these models; a verdict on their methods "
            f"takes at least {SEEDS_WANTED} seeds and {PROMPTS_WANTED} prompts"
        )
    if prompts < PROMPTS_WANTED:
        return f"{prompts} prompts: a verdict on methods takes at least {PROMPTS_WANTED}"
    return None


def family_means(table: ArrayLike, families: Sequence[str]) -> dict[str, Interval]:
    """The mean of a table of zeros and ones within each family of prompts."""
    cells = np.atleast_2d(np.asarray(table, float))
    names = np.array(families)
    return {name: mean_interval(cells[:, names == name], share=True) for name in sorted(set(families))}
