"""Rules and labellers by closed form: which answers are compared, and which is chosen."""

import math
from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueup.preference.pairs_card import label_ceiling
from trueup.preference.pairs_rows import best_rows, preference_rows
from trueup.preference.pairs_rules import RULES, Labeller, Rule, comparisons, make_pairs
from trueup.preference.pairs_samples import Candidates
from trueup.recipes.lab.preferences import label_ceiling as lab_ceiling

EXACT = Labeller()


def made(scores: list[float], rule: Rule, count: int = 1, min_margin: float = 0.0, seed: int = 0) -> Any:
    """Pairs as scores, with the ties and the close ones."""
    found = make_pairs(scores, rule, EXACT, count, min_margin, Random(seed))
    return [(scores[p.chosen], scores[p.rejected]) for p in found.pairs], found.ties, found.close


def test_best_with_worst_and_then_inwards() -> None:
    scores = [0.2, 0.9, 0.1, 0.5, 0.7]
    assert made(scores, "best_worst") == ([(0.9, 0.1)], 0, 0)
    assert made(scores, "best_worst", 2) == ([(0.9, 0.1), (0.7, 0.2)], 0, 0)
    assert made([1.0, 1.0, 1.0], "best_worst") == ([], 1, 0)
    assert made([1.0, 0.0, 0.0, 0.0], "best_worst", 2) == ([(1.0, 0.0)], 1, 0)


def test_random_takes_every_comparison_alike_and_another_for_a_tie() -> None:
    drawn = Counter(made([0.0, 1.0, 2.0], "random", seed=seed)[0][0] for seed in range(3000))
    assert set(drawn) == {(1.0, 0.0), (2.0, 0.0), (2.0, 1.0)}
    assert all(abs(count - 1000) < 4 * math.sqrt(3000 * 2 / 9) for count in drawn.values())
    for seed in range(20):
        pairs, ties, _ = made([1.0, 1.0, 0.0], "random", 3, seed=seed)
        assert (pairs, ties) == ([(1.0, 0.0)] * 2, 1)


def test_margin_keeps_what_differs_enough() -> None:
    pairs, ties, close = made([0.0, 0.0, 0.3, 1.0], "margin", 6, min_margin=0.7)
    assert sorted(pairs) == [(1.0, 0.0), (1.0, 0.0), (1.0, 0.3)]
    assert (ties, close) == (1, 2)


def test_sums_in_another_order_are_ties() -> None:
    assert made([0.1 + 0.2, 0.3], "best_worst") == ([], 1, 0)


@given(
    scores=st.lists(st.floats(-5, 5), max_size=6),
    rule=st.sampled_from(RULES),
    count=st.integers(1, 4),
    margin=st.floats(0, 2),
)
def test_what_holds_for_every_rule(scores: list[float], rule: Rule, count: int, margin: float) -> None:
    found = make_pairs(scores, rule, EXACT, count, margin, Random(0))
    assert len(found.pairs) <= count
    assert len({frozenset((p.chosen, p.rejected)) for p in found.pairs}) == len(found.pairs)
    for one in found.pairs:
        assert scores[one.chosen] - scores[one.rejected] >= margin - 2e-9
        assert one.p_label == 1
    met = len(found.pairs) + found.ties + found.close
    assert met <= len(comparisons(scores, rule, count, Random(0)))


# ---------------------------------------------------------------- the labeller


@pytest.mark.parametrize(
    ("labeller", "difference", "p"),
    [
        (Labeller(), 1e-6, 1.0),
        (Labeller(flip=0.1), 5.0, 0.9),
        (Labeller(temperature=0.5), 0.5, 1 / (1 + math.exp(-1))),
        (Labeller(temperature=0.5, flip=0.2), 0.5, 0.2 + 0.6 / (1 + math.exp(-1))),
        (Labeller(temperature=0.001), 1e6, 1.0),  # far beyond what exp can hold
    ],
)
def test_the_labellers_probability(labeller: Labeller, difference: float, p: float) -> None:
    assert labeller.p_higher(difference) == pytest.approx(p)


@pytest.mark.parametrize("rule", RULES)
def test_labels_come_as_often_as_they_say_under_every_rule(rule: Rule) -> None:
    """Rule and labeller are independent: noise applies to best_worst as well."""
    labeller = Labeller(temperature=0.3, flip=0.1)
    margin = 0.2 if rule == "margin" else 0.0
    pairs = [make_pairs([0.0, 0.4], rule, labeller, 1, margin, Random(seed)).pairs[0] for seed in range(4000)]
    p = labeller.p_higher(0.4)
    right = [one for one in pairs if one.chosen == 1]
    assert abs(len(right) / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    assert {one.p_label for one in right} == {p}
    assert {one.p_label for one in pairs if one.chosen == 0} == {1 - p}


def test_the_ceiling_is_that_of_the_lab() -> None:
    labeller, differences = Labeller(0.15, 0.1), [0.03, 0.42, 0.3, 1.0, 0.05]
    pairs = [
        make_pairs([0.0, one], "random", labeller, 1, 0, Random(seed)).pairs[0]
        for seed in range(20)
        for one in differences
    ]
    assert any(one.chosen == 0 for one in pairs)
    expected = lab_ceiling(differences, 0.15, 0.1)
    assert label_ceiling([one.p_label for one in pairs]) == pytest.approx(expected)


# ---------------------------------------------------------------- rows

PROMPTS = [
    {"prompt": "one", "truth": [1], "score_chosen": 7.0},
    {"prompt": [{"role": "user", "content": "two"}], "truth": []},
]
DRAWN = [
    Candidates(["a", " ", "cut", "b", "nan"], [1, 1, 9, 2, 1], [True, True, False, True, True],
               [0.5, 0.9, 0.8, 0.1, math.nan]),
    Candidates(["c", "d", "e", "f", "g"], [3, 4, 5, 6, 7], [True] * 5, [1.0, 2.0, 3.0, 2.0, 2.5]),
]  # fmt: skip


def test_pairs_are_made_of_answers_alone_and_carry_the_prompts_columns() -> None:
    found = preference_rows(PROMPTS, DRAWN, "best_worst", EXACT, 1, 0.0, "seed")
    assert found.rows == [
        {"prompt": "one", "chosen": "a", "rejected": "b", "score_chosen": 0.5, "score_rejected": 0.1,
         "truth": [1]},
        {"prompt": PROMPTS[1]["prompt"], "chosen": [{"role": "assistant", "content": "e"}],
         "rejected": [{"role": "assistant", "content": "c"}], "score_chosen": 3.0, "score_rejected": 1.0,
         "truth": []},
    ]  # fmt: skip
    assert found.lengths == [(1, 2), (5, 3)]
    assert (found.prompts, found.completions, found.cut, found.empty, found.unscored) == (2, 10, 1, 1, 1)
    assert found.best == [0.5, 3.0]
    noisy = preference_rows(PROMPTS, DRAWN, "best_worst", Labeller(flip=0.25), 2, 0.0, "seed")
    assert {row["p_label"] for row in noisy.rows} <= {0.75, 0.25}
    assert len(noisy.rows) == 3
    assert noisy.without == 0


def test_the_best_answers_are_examples_for_sft() -> None:
    found = best_rows(PROMPTS, DRAWN, None)
    assert [(row["completion"], row["score"]) for row in found.rows] == [
        ("a", 0.5),
        ([{"role": "assistant", "content": "e"}], 3.0),
    ]
    assert found.rows[0] == {"prompt": "one", "completion": "a", "score": 0.5, "truth": [1]}
    strict = best_rows(PROMPTS, DRAWN, 0.6)
    assert (len(strict.rows), strict.without) == (1, 1)
