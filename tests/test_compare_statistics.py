"""Verdicts on simulated arms whose truth is known."""

import math
from itertools import combinations

import numpy as np
import pytest

from trueup.eval import statistics
from trueup.eval.compare_statistics import (
    ELO,
    bradley_terry,
    compare,
    difference,
    duel,
    fallen_parts,
    family_means,
    length_controlled,
    mean_interval,
    percent,
    size_note,
    verdict,
)
from trueup.eval.statistics import Interval


def scores(rng: np.random.Generator, strengths: list[float], shape: tuple[int, int]) -> list[np.ndarray]:
    """Tables of arms that beat one another as Bradley and Terry say: strength + Gumbel noise."""
    return [strength + rng.gumbel(size=shape) for strength in strengths]


def biased(
    rng: np.random.Generator, effect: float, shape: tuple[int, int], varied: float = 0.0
) -> tuple[np.ndarray, ...]:
    """Two arms of equal worth, the first longer, judged by one who likes length: scores and lengths.

    Args:
        varied: how much seeds and prompts favour an arm, either one alike.
    """
    longer, shorter = rng.normal(60, 15, shape), rng.normal(45, 15, shape)
    gap = longer - shorter
    favour = rng.normal(0, varied, (shape[0], 1)) + rng.normal(0, 3 * varied, (1, shape[1]))
    chance = 1 / (1 + np.exp(-effect * np.tanh(gap / gap.std()) - favour))
    return (rng.random(shape) < chance).astype(float), np.full(shape, 0.5), longer, shorter


def equal_length(
    ours: np.ndarray, theirs: np.ndarray, our_lengths: np.ndarray, their_lengths: np.ndarray
) -> Interval:
    """The length-controlled rate of two tables of scores."""
    return length_controlled(duel(ours, theirs), our_lengths - their_lengths)


def duels(tables: dict[str, np.ndarray]) -> dict[tuple[str, str], np.ndarray]:
    """Every arm against every other."""
    return {(a, b): duel(tables[a], tables[b]) for a, b in combinations(tables, 2)}


def test_a_verdict_is_a_rule() -> None:
    win = compare(duel(np.tile([1.0, 1.0, 0.0], 100), np.full(300, 0.5)))
    found = verdict("dpo", "sft", win)
    assert found.winner == "dpo"
    assert found.text.startswith("dpo beats sft: 66.7 % [")
    assert found.text.endswith("n = 300 prompts")
    lost = verdict("sft", "dpo", compare(duel(np.full(300, 0.5), np.tile([1.0, 1.0, 0.0], 100))))
    assert (lost.winner, lost.text) == ("dpo", found.text)
    close = verdict("a", "b", compare(duel(np.tile([1.0] * 11 + [0.0] * 9, 5), np.full(100, 0.5))))
    assert (close.winner, close.to_settle) == (None, 783)
    assert "about 780 prompts would settle" in close.text


def test_equal_arms_are_not_distinguishable() -> None:
    same = np.random.default_rng(0).random((5, 50))
    outcome = compare(duel(same, same))
    assert (outcome.wins, outcome.ties, outcome.losses) == (0, 1, 0)
    assert outcome.rate == Interval(0.5, 0.5, 0.5)
    assert verdict("a", "b", outcome).winner is None


def test_ties_count_half_and_are_shown() -> None:
    outcome = compare(duel([1, 1, 0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 1, 1, 1, 0]))
    assert (outcome.wins, outcome.ties, outcome.losses, outcome.rate.estimate) == (1 / 8, 6 / 8, 1 / 8, 0.5)


def test_a_prompt_without_a_verdict_is_left_out_of_every_seed() -> None:
    ours = np.array([[1.0, math.nan, 0.0], [1.0, 1.0, 0.0]])
    outcome = compare(duel(ours, np.array([[0.5, 0.5, 0.5]])))
    assert (outcome.prompts, outcome.missing, outcome.by_seed) == (2, 1, [0.5, 0.5])


def test_a_lone_baseline_stands_against_every_seed() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.random((5, 80)), rng.random((1, 80))
    assert compare(duel(ours, theirs)).by_seed == [compare(duel(row, theirs)).rate.estimate for row in ours]


def test_seeds_that_differ_ask_for_seeds_and_not_for_prompts() -> None:
    rng = np.random.default_rng(0)
    shift = np.array([[0.25], [-0.15], [0.15], [-0.1], [0.2]])
    outcome = compare(duel((rng.random((5, 2000)) < 0.5 + shift).astype(float), np.full((5, 2000), 0.5)))
    found = verdict("a", "b", outcome)
    assert (found.winner, found.to_settle) == (None, None)
    assert "the seeds differ" in found.text


def test_a_part_that_falls_is_named() -> None:
    rng = np.random.default_rng(0)
    correct = (rng.random((1, 600)) < 0.6).astype(float)
    worse = correct * (rng.random((1, 600)) < 0.9)
    found = {"correct": difference(worse, correct), "courteous": difference(correct + 1, correct)}
    assert fallen_parts(found) == ["correct"]
    assert found["correct"].difference.estimate == pytest.approx(worse.mean() - correct.mean())
    assert found["correct"].wins == 0


def test_families_are_averaged_apart() -> None:
    found = family_means([[1.0, 0.0, 1.0, 1.0]], ["sums", "facts", "sums", "facts"])
    assert (found["sums"].estimate, found["facts"].estimate) == (1.0, 0.5)
    assert found["sums"].low < 1  # two right answers are no proof


def test_length_control_removes_a_planted_effect_of_length() -> None:
    ours, theirs, longer, shorter = biased(np.random.default_rng(0), 2.0, (1, 4000))
    raw, controlled = compare(duel(ours, theirs)).rate, equal_length(ours, theirs, longer, shorter)
    assert raw.low > 0.6
    assert controlled.low < 0.5 < controlled.high
    assert controlled.high - controlled.low < 0.1
    outcome = compare(duel(ours, theirs))
    words = f"at equal length it would not: {percent(controlled)}"
    assert verdict("long", "short", outcome, controlled).text.endswith(words)
    assert "length" not in verdict("long", "short", outcome, outcome.rate).text
    lost, mirrored = compare(1 - duel(ours, theirs)), equal_length(1 - ours, theirs, shorter, longer)
    assert verdict("short", "long", lost, mirrored).text.startswith("long beats short: ")
    assert verdict("short", "long", lost, mirrored).text.endswith(words)


def test_length_control_leaves_alone_what_has_nothing_to_do_with_length() -> None:
    rng = np.random.default_rng(0)
    ours, longer, shorter = (rng.random((1, 4000)) < 0.6).astype(float), *rng.normal(50, 9, (2, 1, 4000))
    found = length_controlled(duel(ours, 0.5), longer - shorter)
    assert found.estimate == pytest.approx(ours.mean(), abs=2e-3)
    assert found.high - found.low == pytest.approx(4 * math.sqrt(0.24 / 4000), rel=0.05)
    even = length_controlled(duel(ours, 0.5), longer - longer)
    assert even == compare(duel(ours, 0.5)).rate


def test_bradley_terry_recovers_known_strengths() -> None:
    names, strengths = ["sft", "dpo", "ppo"], [0.0, 0.4, 1.0]
    tables = dict(zip(names, scores(np.random.default_rng(0), strengths, (4, 3000)), strict=True))
    found = bradley_terry(duels(tables), "sft")
    assert found["sft"] == Interval(0, 0, 0)
    for name, strength in zip(names[1:], strengths[1:], strict=True):
        assert found[name].low < strength < found[name].high
        assert found[name].high - found[name].low < 0.2
    assert ELO * math.log(10) == pytest.approx(400)  # 400 points are odds of ten to one


def test_of_two_arms_the_rating_is_the_odds_of_the_win_rate() -> None:
    rng = np.random.default_rng(3)
    tables = {"a": rng.integers(0, 3, (1, 500)), "b": rng.integers(0, 3, (1, 500))}
    rate = compare(duel(tables["a"], tables["b"])).rate
    rating = bradley_terry(duels(tables), "b")["a"]
    for strength, share in ((rating.estimate, rate.estimate), (rating.low, rate.low)):
        assert 1 / (1 + math.exp(-strength)) == pytest.approx(share, abs=3e-3)


def test_ratings_take_what_pairs_there_are() -> None:
    """People vote on few prompts and few pairs: strengths as from all, only less sure."""
    rng = np.random.default_rng(0)
    tables = dict(zip("abc", scores(rng, [0.0, 0.4, 1.0], (1, 6000)), strict=True))
    every = duels(tables)
    some = {pair: np.where(rng.random((1, 6000)) < 0.3, table, math.nan) for pair, table in every.items()}
    sure, voted = bradley_terry(every, "a"), bradley_terry(some, "a")
    for name in "bc":
        assert voted[name].low < sure[name].estimate < voted[name].high
        width = (voted[name].high - voted[name].low) / (sure[name].high - sure[name].low)
        assert 1.3 < width < 2


def test_all_alike_is_certain_of_a_quantity_and_not_of_a_share() -> None:
    zeros = np.zeros((3, 40))
    assert mean_interval(zeros) == Interval(0, 0, 0)
    assert mean_interval(zeros, share=True).high > 0.05
    nearly = np.ones((3, 40)) - np.eye(3, 40)
    assert mean_interval(nearly, share=True).high == 1 < mean_interval(nearly).high


def test_small_comparisons_say_so() -> None:
    assert "1 seed:" in (size_note(1, 900) or "")
    assert "200 prompts:" in (size_note(5, 200) or "")
    assert size_note(5, 800) is None
    assert percent(Interval(0.56, 0.5261, 0.594)) == "56.0 % [52.6, 59.4]"


# ------------------------------------------------------------------------------- coverage, in simulation


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand intervals need not each be smooth."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)


def _share_covered(found: list[Interval], truth: float) -> float:
    return float(np.mean([one.low <= truth <= one.high for one in found]))


@pytest.mark.slow
@pytest.mark.parametrize("seed_effect", [0.0, 0.05])
def test_win_rates_over_seeds_cover_the_truth(seed_effect: float) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        chance = 0.55 + rng.normal(0, seed_effect, (5, 1)) + rng.normal(0, 0.1, (1, 200))
        found.append(
            compare(duel((rng.random((5, 200)) < chance).astype(float), np.full((5, 200), 0.5))).rate
        )
    assert 0.93 <= _share_covered(found, 0.55) <= 0.98


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("seeds", "varied"), [(1, 0.0), (5, 0.2)])
def test_length_controlled_rates_cover_the_truth(seeds: int, varied: float) -> None:
    rng = np.random.default_rng(0)
    found = [equal_length(*biased(rng, 1.5, (seeds, 300), varied)) for _ in range(1000)]
    assert 0.93 <= _share_covered(found, 0.5) <= 0.97


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("seeds", "varied"), [(1, 0.0), (5, 0.2)])
def test_ratings_cover_the_truth(seeds: int, varied: float) -> None:
    """The truth is the rating over very many seeds."""
    rng = np.random.default_rng(0)

    def rating(shape: tuple[int, int]) -> Interval:
        tables = dict(zip("abc", scores(rng, [0.0, 0.3, 0.8], shape), strict=True))
        tables["c"] = tables["c"] + rng.normal(0, varied, (shape[0], 1)) + rng.normal(0, varied, shape[1])
        return bradley_terry(duels(tables), "a")["c"]

    truth = rating((2000, 300)).estimate
    assert truth == pytest.approx(0.8, abs=0.05)
    assert 0.93 <= _share_covered([rating((seeds, 300)) for _ in range(1000)], truth) <= 0.97


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
def test_equal_arms_are_told_apart_in_5_of_100() -> None:
    rng = np.random.default_rng(0)
    found = [compare(duel(*rng.integers(0, 5, (2, 1, 200)))).rate.excludes(0.5) for _ in range(1000)]
    assert 0.03 <= np.mean(found) <= 0.07


def test_one_row_is_a_bootstrap_and_several_are_crossed() -> None:
    row = np.random.default_rng(0).random(200)
    one, repeated = mean_interval(row), mean_interval(np.tile(row, (5, 1)))
    assert one.high - one.low == pytest.approx(repeated.high - repeated.low, rel=0.03)
