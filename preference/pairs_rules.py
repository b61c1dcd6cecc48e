"""From scored completions to pairs: which two are compared, and what the labeller says of them.

The two are independent choices. A *rule* orders the comparisons of one prompt; a `Labeller` says which side
is chosen, and may err as people do. Pure functions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Literal, get_args

from trueup.recipes.lab.preferences import label_probability

Rule = Literal["best_worst", "random", "margin"]
RULES: tuple[Rule, ...] = get_args(Rule)

# Sums of weighted parts, in another order, differ by about this much though they mean the same.
EQUAL = 1e-9


@dataclass(frozen=True)
class Labeller:
    """Who compares two completions, knowing their scores.

    Args:
        temperature: it prefers the higher score with probability sigmoid(difference / temperature), after
            Bradley and Terry; None: always.
        flip: the probability that its label is then turned round.
    """

    temperature: float | None = None
    flip: float = 0.0

    @property
    def noisy(self) -> bool:
        return self.temperature is not None or self.flip > 0

    def p_higher(self, difference: float) -> float:
        """The probability that the completion whose score is higher by `difference` (> 0) is chosen."""
        if self.temperature is None:
            return label_probability(math.inf, 1.0, self.flip)
        return label_probability(difference, self.temperature, self.flip)


@dataclass(frozen=True)
class Pair:
    """Places of the two among a prompt's completions, and the labeller's probability of this very label."""

    chosen: int
    rejected: int
    p_label: float


@dataclass
class Compared:
    """What came of one prompt: pairs, comparisons dropped as ties, and those below the margin."""

    pairs: list[Pair] = field(default_factory=list)
    ties: int = 0
    close: int = 0


def comparisons(scores: Sequence[float], rule: Rule, count: int, rng: Random) -> list[tuple[int, int]]:
    """Whom a rule compares with whom, in its order, for `count` pairs.

    best_worst: the best with the worst, the second best with the second worst, and so on. The others: all
    comparisons there are, shuffled, so that there is another in place of one that is dropped.
    """
    if rule == "best_worst":
        ranked = sorted(range(len(scores)), key=lambda place: -scores[place])
        return [(ranked[rank], ranked[-1 - rank]) for rank in range(min(count, len(ranked) // 2))]
    found = list(combinations(range(len(scores)), 2))
    rng.shuffle(found)
    return found


def make_pairs(
    scores: Sequence[float], rule: Rule, labeller: Labeller, count: int, min_margin: float, rng: Random
) -> Compared:
    """Up to `count` pairs of one prompt's completions.

    Args:
        scores: of its completions, all finite.
        min_margin: the least difference of scores; equal scores are ties whatever it is.
        rng: decides the order of comparisons, then the labels.
    """
    found = Compared()
    for one, other in comparisons(scores, rule, count, rng):
        if len(found.pairs) == count:
            break
        difference = abs(scores[one] - scores[other])
        if difference <= EQUAL:
            found.ties += 1
        elif difference < min_margin - EQUAL:
            found.close += 1
        else:
            higher, lower = (one, other) if scores[one] > scores[other] else (other, one)
            p_higher = labeller.p_higher(difference)
            turned = rng.random() >= p_higher
            found.pairs.append(Pair(lower, higher, 1 - p_higher) if turned else Pair(higher, lower, p_higher))
    return found
