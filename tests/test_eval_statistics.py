"""Intervals that cover what they say, and closed forms."""

import math

import numpy as np
import pytest

from trueup.eval import statistics
from trueup.eval.statistics import (
    bootstrap_mean,
    crossed_interval,
    hierarchical_bootstrap,
    normal_interval,
    outcomes,
    prompts_to_settle,
    wilson_interval,
    win_rate,
)


def draw(
    rng: np.random.Generator, shape: tuple[int, ...], rate: float | np.ndarray, ties: float
) -> np.ndarray:
    """Outcomes whose mean is `rate`, a share of them ties."""
    wins = (rate - ties / 2) / (1 - ties)
    won = (rng.random(shape) < wins).astype(float)
    return np.where(rng.random(shape) < ties, 0.5, won)


def test_outcomes_are_win_tie_loss_or_no_verdict() -> None:
    found = outcomes([1.0, 2.0, 3.0, math.nan, 1.0], [1.0, 1.0, 4.0, 0.0, 1.05], tie_within=0.1)
    np.testing.assert_array_equal(found, [0.5, 1, 0, np.nan, 0.5])


def test_a_win_rate_says_what_it_is_made_of() -> None:
    found = win_rate([1] * 60 + [0.5] * 20 + [0] * 20 + [math.nan] * 5)
    assert (found.wins, found.ties, found.losses) == (0.6, 0.2, 0.2)
    assert (found.prompts, found.missing, found.rate.estimate) == (100, 5, 0.7)
    # Ties half: variance .6 + .2/4 - .7^2 = .16, so +-1.96 * .4 / 10.
    assert found.rate.low == pytest.approx(0.7 - 0.0784, abs=0.006)
    assert found.rate.high == pytest.approx(0.7 + 0.0784, abs=0.006)
    assert found.rate.excludes(0.5)
    assert found == win_rate([1] * 60 + [0.5] * 20 + [0] * 20 + [math.nan] * 5)  # seeded


def test_samples_of_one_prompt_count_as_one_prompt() -> None:
    once = np.array([1.0] * 55 + [0.0] * 45)
    repeated = np.repeat(once[:, None], 20, axis=1)
    assert win_rate(repeated).rate == win_rate(once).rate
    partly = np.array([[1.0, math.nan], [math.nan, math.nan], [0.0, 1.0]])
    assert (win_rate(partly).rate.estimate, win_rate(partly).missing) == (0.75, 1)


def test_all_alike_is_not_certainty() -> None:
    assert win_rate([1.0] * 10).rate == wilson_interval(10, 10)
    assert win_rate([1.0] * 3).rate.low < 0.5  # three wins settle nothing
    same = win_rate([0.5] * 10).rate
    assert (same.low, same.high, same.excludes(0.5)) == (0.5, 0.5, False)
    with pytest.raises(ValueError, match="at least one"):
        win_rate([math.nan])


def test_wilson_and_normal_intervals() -> None:
    found = wilson_interval(8, 10)  # Wilson's formula with z = 1.959964
    assert (found.estimate, found.low, found.high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)
    values = np.random.default_rng(0).normal(0.7, 0.1, 400)
    found = normal_interval(values)
    assert found.high - found.estimate == pytest.approx(1.959964 * values.std(ddof=1) / 20)


def test_prompts_that_would_settle_a_difference() -> None:
    assert prompts_to_settle(0.55) == prompts_to_settle(0.45) == 783
    assert prompts_to_settle(0.6) == 194
    assert prompts_to_settle(0.5) is None
    assert (prompts_to_settle(0.55, ties=0.4) or 0) < 783 * 0.65


def test_that_many_prompts_do_settle_it() -> None:
    """Power 80 % in simulation, with ties."""
    rng = np.random.default_rng(0)
    count = prompts_to_settle(0.58, ties=0.3)
    assert count is not None
    results = draw(rng, (4000, count), 0.58, 0.3)
    reach = 1.96 * results.std(axis=1, ddof=1) / math.sqrt(count)
    assert np.mean(results.mean(axis=1) - reach > 0.5) == pytest.approx(0.8, abs=0.03)


def test_more_seeds_and_prompts_make_the_intervals_narrower() -> None:
    rng = np.random.default_rng(1)
    table = draw(rng, (8, 400), 0.56, 0.2)
    for interval in (crossed_interval, hierarchical_bootstrap):
        wide, narrow = interval(table[:4, :100]), interval(table)
        assert narrow.estimate == pytest.approx(table.mean())
        assert narrow.high - narrow.low < 0.6 * (wide.high - wide.low)


def test_the_crossed_interval_of_seeds_alone_is_a_t_interval_of_their_means() -> None:
    table = np.repeat([[0.5], [0.6], [0.7]], 50, axis=1)  # prompts and chance add nothing
    found = crossed_interval(table)
    assert found.high - found.estimate == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)


def _coverage(interval: object, tables: list[np.ndarray], truth: float) -> float:
    found = [interval(table) for table in tables]  # type: ignore[operator]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "ties"), [(0.5, 0.0), (0.55, 0.3), (0.7, 0.1)])
def test_the_bootstrap_covers_the_truth_in_95_of_100(
    rate: float, ties: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    tables = [draw(rng, (200,), rate, ties) for _ in range(1000)]
    assert 0.93 <= _coverage(bootstrap_mean, tables, rate) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize(("seed_effect", "prompt_effect"), [(0.0, 0.1), (0.03, 0.1), (0.08, 0.1), (0.1, 0.0)])
def test_the_crossed_interval_covers_the_truth_whatever_varies(
    seeds: int, seed_effect: float, prompt_effect: float
) -> None:
    rng = np.random.default_rng(0)
    tables = []
    for _ in range(1000):
        shift = rng.normal(0, seed_effect, (seeds, 1)) + rng.normal(0, prompt_effect, (1, 200))
        tables.append(draw(rng, (seeds, 200), 0.55 + shift, 0.2))
    assert 0.92 <= _coverage(crossed_interval, tables, 0.55) <= 0.985
