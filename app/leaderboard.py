"""What the votes come to, by the statistics of `trueup compare`: ratings, pairs, how far a verdict is."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trueup.app.votes import Vote
from trueup.eval.compare_statistics import ELO, bradley_terry, compare, percent
from trueup.eval.statistics import Interval, prompts_to_settle

FEWEST = 10  # votes on a model or a pair before which nothing is said of it: fewer give no fair interval


@dataclass(frozen=True)
class Standing:
    """One model among the votes.

    Args:
        elo: over the lowest; None: too few votes, or no chain of votes leads to the other models.
    """

    name: str
    identity: str
    votes: int
    wins: int
    ties: int
    losses: int
    elo: Interval | None


@dataclass(frozen=True)
class Pair:
    """Two models that met; wins and losses are a's.

    Args:
        rate: of a, ties half.
        winner: where the interval of the rate leaves out one half.
        more: votes that are still wanted; None where there is a winner, or no difference was seen.
        text: the same in words.
    """

    a: str
    b: str
    wins: int
    ties: int
    losses: int
    rate: Interval
    winner: str | None
    more: int | None
    text: str


@dataclass(frozen=True)
class Leaderboard:
    """The standings, best first, and the pairs, those with the most votes first."""

    votes: int
    both_bad: int
    standings: list[Standing]
    pairs: list[Pair]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def leaderboard(votes: Sequence[Vote]) -> Leaderboard:
    """The state of things after these votes. Models are told apart by content, not by name."""
    names = _names(votes)
    met: dict[tuple[str, str], list[float]] = defaultdict(list)
    for vote in votes:
        left, right, outcome = vote.left_identity, vote.right_identity, vote.outcome
        if (right, left) in met:
            left, right, outcome = right, left, 1 - outcome
        met[left, right].append(outcome)
    met = {pair: found for pair, found in met.items() if pair[0] != pair[1]}
    ratings = _ratings(met)
    standings = [_standing(identity, names[identity], met, ratings.get(identity)) for identity in names]
    standings.sort(key=lambda one: (one.elo is None, -one.elo.estimate if one.elo else 0, -one.votes))
    pairs = [_pair(names[a], names[b], found) for (a, b), found in met.items()]
    pairs.sort(key=lambda pair: -(pair.wins + pair.ties + pair.losses))
    both_bad = sum(vote.choice == "both_bad" for vote in votes)
    return Leaderboard(len(votes), both_bad, standings, pairs)


def _names(votes: Sequence[Vote]) -> dict[str, str]:
    """Identity -> the name it was last given; with the hash where two models had one name."""
    latest = {}
    for vote in votes:
        latest[vote.left_identity], latest[vote.right_identity] = vote.left_name, vote.right_name
    shared = Counter(latest.values())
    return {key: name if shared[name] == 1 else f"{name} ({key[:6]})" for key, name in latest.items()}


def _ratings(met: dict[tuple[str, str], list[float]]) -> dict[str, Interval]:
    """Elo over the weakest of the largest group of models that votes connect.

    Every pair that met is given one tie, so that who has won each time has a rating that is finite, and an
    interval that is not nothing.
    """
    group = _connected(met)
    known = {pair: [*found, 0.5] for pair, found in met.items() if pair[0] in group}
    if not known:
        return {}
    columns = np.cumsum([0, *map(len, known.values())])
    table = {}
    for place, (pair, found) in enumerate(known.items()):
        table[pair] = np.full(columns[-1], np.nan)
        table[pair][columns[place] : columns[place + 1]] = found
    strengths = bradley_terry(table, anchor=next(iter(known))[0])
    weakest = min(strengths, key=lambda name: strengths[name].estimate)
    return {name: _elo(one) for name, one in bradley_terry(table, anchor=weakest).items()}


def _elo(strength: Interval) -> Interval:
    return Interval(ELO * strength.estimate, ELO * strength.low, ELO * strength.high)


def _connected(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """The largest group of models that are joined by votes, directly or through others."""
    groups: list[set[str]] = []
    for pair in pairs:
        joined = set(pair).union(*(group for group in groups if group & set(pair)))
        groups = [group for group in groups if not group & joined] + [joined]
    return max(groups, key=len, default=set())


def _standing(
    identity: str, name: str, met: dict[tuple[str, str], list[float]], elo: Interval | None
) -> Standing:
    results = [outcome for (a, _), found in met.items() if a == identity for outcome in found]
    results += [1 - outcome for (_, b), found in met.items() if b == identity for outcome in found]
    counts = Counter(results)
    shown = elo if len(results) >= FEWEST else None
    return Standing(name, identity, len(results), counts[1.0], counts[0.5], counts[0.0], shown)


def _pair(a: str, b: str, results: list[float]) -> Pair:
    counts, count = Counter(results), len(results)
    outcome = compare([results])
    rate = outcome.rate
    winner = more = None
    said = f"{percent(rate)}, {count} vote{'s' * (count != 1)}"
    if count < FEWEST:
        more, text = FEWEST - count, f"too early to say: {said}"
    elif rate.excludes(0.5):
        winner, loser = (a, b) if rate.estimate > 0.5 else (b, a)
        text = f"{winner} beats {loser}: {said}"
    else:
        needed = prompts_to_settle(rate.estimate, outcome.ties)
        more = None if needed is None else max(needed - count, 1)
        text = f"not distinguishable: {said}"
    return Pair(a, b, counts[1.0], counts[0.5], counts[0.0], rate, winner, more, text)
