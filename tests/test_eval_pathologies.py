"""Pathologies of text, against their closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueup.eval.pathologies import distinct, longest_repeat, pathologies, repetition, token_entropy
from trueup.eval.sampler import Sample


def test_distinct_counts_over_all_sequences() -> None:
    texts = [["a", "b", "a"], ["a", "b"]]
    assert distinct(texts, 1) == 2 / 5
    assert distinct(texts, 2) == 2 / 3  # ab, ba, ab
    assert distinct(texts, 3) == 1
    assert math.isnan(distinct(texts, 4))


def test_repetition_is_the_share_of_ngrams_seen_before() -> None:
    assert repetition("abcdefgh") == 0
    assert repetition("aaaaaaaa") == pytest.approx(4 / 5)
    assert repetition("abcdabcd") == pytest.approx(1 / 5)
    assert repetition("abc") == 0
    assert repetition([1, 2, 1, 2, 1], n=2) == 2 / 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), ("a", 0), ("abc", 0), ("aaaa", 2), ("abcXabc", 3), ("abababab", 4), ("abcbcd", 2)],
)
def test_longest_repeat(text: str, expected: int) -> None:
    assert longest_repeat(text) == expected


@given(st.text(alphabet="ab", max_size=14))
def test_longest_repeat_by_trying_everything(text: str) -> None:
    repeats = [
        size
        for size in range(1, len(text) // 2 + 1)
        for start in range(len(text) - size)
        if text[start : start + size] in text[start + size :]
    ]
    assert longest_repeat(text) == max(repeats, default=0)


def test_entropy_of_tokens_sampled_uniformly_is_the_log_of_their_number() -> None:
    assert token_entropy([[math.log(1 / 8)] * 3, [math.log(1 / 8)]]) == pytest.approx(math.log(8))
    probabilities = np.array([0.7, 0.2, 0.1])
    drawn = np.random.default_rng(0).choice(3, size=20_000, p=probabilities)
    exact = -(probabilities * np.log(probabilities)).sum()
    assert token_entropy([np.log(probabilities)[drawn].tolist()]) == pytest.approx(exact, abs=0.02)


def test_all_of_it_for_samples() -> None:
    samples = [
        Sample([1], [7, 7, 7, 7, 7], "go go go", True, [-1.0] * 5),
        Sample([1], [5, 6, 8], "a b", False, [-3.0] * 3),
    ]
    assert pathologies(samples) == pytest.approx(
        {
            "completions/mean_length": 4.0,
            "mean_words": 2.5,
            "repetition": (0.5 + 0) / 2,
            "longest_repeat": (2 + 0) / 2,
            "eos_rate": 0.5,
            "distinct_1": 3 / 5,
            "distinct_2": 2 / 3,
            "distinct_3": 1.0,
            "entropy": 14 / 8,
        }
    )
    assert "entropy" not in pathologies([Sample([1], [5], "a", True)])
