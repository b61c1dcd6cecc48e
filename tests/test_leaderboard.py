"""What votes come to: the comparison's own statistics, on votes."""

import math
from typing import Any

import numpy as np
import pytest
from test_votes import vote

from trueup.app.leaderboard import FEWEST, leaderboard
from trueup.app.votes import Vote
from trueup.eval.compare_statistics import ELO, compare
from trueup.eval.statistics import prompts_to_settle


def votes_of(*results: tuple[str, str, str, int]) -> list[Vote]:
    """(left, right, choice, how many) as votes."""
    found: list[Vote] = []
    for left, right, choice, count in results:
        for _ in range(count):
            names = {"left_name": left, "left_identity": left * 8}
            names |= {"right_name": right, "right_identity": right * 8}
            found.append(vote(len(found), choice, **names))
    return found


def test_wins_count_on_either_side() -> None:
    board = leaderboard(
        votes_of(
            ("a", "b", "left", 30), ("b", "a", "right", 20), ("a", "b", "right", 10), ("b", "a", "tie", 4)
        )
    )
    first, last = board.standings
    assert (first.name, first.votes, first.wins, first.ties, first.losses) == ("a", 64, 50, 4, 10)
    assert (last.name, last.votes, last.wins, last.ties, last.losses) == ("b", 64, 10, 4, 50)
    [pair] = board.pairs
    assert (pair.wins, pair.ties, pair.losses, pair.winner, pair.more) == (50, 4, 10, "a", None)
    assert pair.rate == compare([[1.0] * 30 + [1.0] * 20 + [0.0] * 10 + [0.5] * 4]).rate
    assert pair.text.startswith("a beats b: 81.2 %")


def test_two_models_have_the_rating_of_their_win_rate() -> None:
    board = leaderboard(votes_of(("a", "b", "left", 60), ("a", "b", "right", 39)))
    [first, last] = [one.elo for one in board.standings]
    assert first
    assert last
    assert first.estimate == pytest.approx(
        ELO * math.log(60.5 / 39.5), rel=1e-3
    )  # one tie is added to each pair
    assert (last.estimate, last.low, last.high) == (0, 0, 0)
    assert first.low < first.estimate < first.high


def test_ratings_go_through_common_opponents_and_no_further() -> None:
    found = votes_of(
        ("a", "b", "left", 40), ("a", "b", "right", 20), ("b", "c", "left", 40), ("b", "c", "right", 20),
        ("x", "y", "left", 12),
    )  # fmt: skip
    board = leaderboard(found)
    elo: dict[str, Any] = {one.name: one.elo for one in board.standings}
    step = ELO * math.log(40.5 / 20.5)
    assert [elo[name].estimate for name in "abc"] == pytest.approx([2 * step, step, 0], rel=2e-3)
    assert elo["x"] is elo["y"] is None


def test_all_won_is_finite_and_not_certain() -> None:
    board = leaderboard(votes_of(("a", "b", "left", 20)))
    elo = board.standings[0].elo
    assert elo is not None
    assert math.isfinite(elo.estimate)
    assert elo.high - elo.low > 50


def test_how_many_more_votes_a_verdict_needs() -> None:
    few = leaderboard(votes_of(("a", "b", "left", 3))).pairs[0]
    assert (few.winner, few.more) == (None, FEWEST - 3)
    assert [one.elo for one in leaderboard(votes_of(("a", "b", "left", 3))).standings] == [None, None]
    assert "too early" in few.text
    close = leaderboard(votes_of(("a", "b", "left", 22), ("a", "b", "right", 18))).pairs[0]
    assert close.winner is None
    assert close.more == (prompts_to_settle(0.55) or 0) - 40
    even = leaderboard(votes_of(("a", "b", "left", 10), ("a", "b", "right", 10))).pairs[0]
    assert (even.winner, even.more) == (None, None)


def test_models_are_told_apart_by_content() -> None:
    one, other = votes_of(("a", "b", "left", 1), ("a", "b", "left", 1))
    other = vote(9, left_name="a", left_identity="f" * 64, right_name="b", right_identity=one.right_identity)
    names = {standing.name for standing in leaderboard([one, other]).standings}
    assert names == {"a (aaaaaa)", "a (ffffff)", "b"}


def test_nothing_and_a_model_against_itself() -> None:
    assert leaderboard([]).standings == []
    assert leaderboard(votes_of(("a", "a", "left", 2))).pairs == []


@pytest.mark.slow
def test_intervals_of_ratings_cover_what_they_promise() -> None:
    """Simulated voters of known strengths, three models, 40 votes a pair."""
    rng = np.random.default_rng(0)
    strengths = {"a": 0.8, "b": 0.4, "c": 0.0}
    hits = trials = 0
    for _ in range(300):
        found = []
        for left, right in (("a", "b"), ("b", "c"), ("a", "c")):
            won = rng.binomial(40, 1 / (1 + math.exp(strengths[right] - strengths[left])))
            found += [(left, right, "left", int(won)), (left, right, "right", int(40 - won))]
        elo = {one.name: one.elo for one in leaderboard(votes_of(*found)).standings}
        lowest = next(name for name, one in elo.items() if one and one.low == one.high)
        for name, one in elo.items():
            if one and name != lowest:
                trials += 1
                hits += one.low <= ELO * (strengths[name] - strengths[lowest]) <= one.high
    assert 0.91 < hits / trials < 0.985
