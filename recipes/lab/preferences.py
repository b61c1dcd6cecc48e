"""Preference pairs of the lab: two candidate answers, judged by gold through a noisy labeller that is known.

The labeller prefers A to B with probability sigmoid((gold A - gold B) / temperature) (Bradley and Terry), and
then turns the label round with probability `flip`. Both dials imply a ceiling: the accuracy, against these
labels, of the best predictor there can be, which knows gold itself.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from trueup.recipes.lab import style
from trueup.recipes.lab.desk import Task
from trueup.recipes.lab.gold import WEIGHTS, gold_parts
from trueup.recipes.lab.tasks import task
from trueup.recipes.lab.world import seeded

# What candidates are drawn from. Most pairs differ in substance: style alone is learnt soon enough.
MIXTURE = {
    "right": 0.36,
    "wrong": 0.26,  # a near miss; the unsafe answer where something must be refused
    "refusing": 0.08,  # of what may be answered; ignorance where something must be refused
    "broken": 0.14,  # right but for a constraint; wrong where there is none
    "rude": 0.04,
    "padded": 0.04,
    "repeated": 0.04,
    "cut off": 0.04,
}


@dataclass(frozen=True)
class Pair:
    """A labelled pair. `p_label` is the labeller's probability of having chosen as it did."""

    task: Task
    chosen: str
    rejected: str
    gold_chosen: float
    gold_rejected: float
    p_label: float
    differs: tuple[str, ...]  # the parts of gold in which the two differ
    ties: int  # pairs of equal gold that were drawn before this one and dropped


def candidate(drawn: Task, rng: Random) -> str:
    """One answer from the mixture."""
    kind = rng.choices([*MIXTURE], weights=[*MIXTURE.values()])[0]
    if kind == "right":
        return rng.choice(drawn.right)
    if kind == "refusing":
        return rng.choice(style.IGNORANCE if drawn.expects == "refuse" else style.REFUSALS)
    if kind == "broken" and drawn.broken:
        return rng.choice(drawn.broken)
    if kind in {"wrong", "broken"}:
        return rng.choice(drawn.wrong)
    if kind == "cut off":
        return style.cut_off(rng.choice(drawn.right), rng)
    return style.BLEMISHES[kind](rng.choice(drawn.right), rng)


def label_probability(difference: float, temperature: float, flip: float) -> float:
    """The labeller's probability of preferring an answer whose gold is higher by `difference`."""
    clean = 1 / (1 + math.exp(-difference / temperature))
    return clean * (1 - flip) + (1 - clean) * flip


def pair(
    split: str, index: int, seed: int = 0, temperature: float = 0.15, flip: float = 0.1, world_seed: int = 0
) -> Pair:
    """Pair number `index` of a split. Pairs of equal gold are dropped and drawn again."""
    drawn = task(split, index, f"pairs {seed}", world_seed)
    truth = drawn.truth(world_seed)
    rng = seeded("pair", seed, split, index)
    ties = -1
    golds = (0.0, 0.0)
    while golds[0] == golds[1]:
        ties += 1
        answers = candidate(drawn, rng), candidate(drawn, rng)
        parts = gold_parts(["", ""], answers, **{key: [value] * 2 for key, value in truth.items()})
        golds = _total(parts, 0), _total(parts, 1)
    p_first = label_probability(golds[0] - golds[1], temperature, flip)
    best, worst, p_label = (0, 1, p_first) if rng.random() < p_first else (1, 0, 1 - p_first)
    return Pair(
        task=drawn,
        chosen=answers[best],
        rejected=answers[worst],
        gold_chosen=golds[best],
        gold_rejected=golds[worst],
        p_label=p_label,
        differs=tuple(name for name in WEIGHTS if parts[name][0] != parts[name][1]),
        ties=ties,
    )


def _total(parts: dict[str, list[float]], side: int) -> float:
    return math.fsum(weight * parts[name][side] for name, weight in WEIGHTS.items())


def expected_accuracy(prefers_chosen: Sequence[bool], p_label: Sequence[float]) -> float:
    """A predictor's accuracy on fresh labels of the same pairs by the same labeller.

    Its variance is that of the pairs alone: the noise of the labels that happened to be drawn is gone.
    """
    agreements = [p if right else 1 - p for right, p in zip(prefers_chosen, p_label, strict=True)]
    return math.fsum(agreements) / len(agreements)


def label_ceiling(differences: Sequence[float], temperature: float, flip: float) -> float:
    """The expected accuracy of the best predictor, which prefers the higher gold on every pair.

    Args:
        differences: gold of one answer less gold of the other, one for each pair; the sign does not matter.
    """
    p = [label_probability(abs(difference), temperature, flip) for difference in differences]
    return math.fsum(max(one, 1 - one) for one in p) / len(p)


def differences(
    split: str, rows: int, seed: int = 0, world_seed: int = 0
) -> tuple[list[float], Counter[str], int]:
    """Gold differences of a split's pairs, how many differ in each part, and how many ties were dropped.

    None of the three depends on temperature or flip.
    """
    pairs = [pair(split, index, seed, world_seed=world_seed) for index in range(rows)]
    differing = Counter(name for one in pairs for name in one.differs)
    return [one.gold_chosen - one.gold_rejected for one in pairs], differing, sum(one.ties for one in pairs)
