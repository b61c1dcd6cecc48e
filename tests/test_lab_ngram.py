"""Kneser-Ney: against a slow dictionary implementation, as a distribution, and on data with structure."""

import math
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from trueup.recipes.lab.ngram import KneserNey, ngram_bits


def slow_probability(train: list[int], history: list[int], token: int, vocab: int, order: int) -> float:
    """The textbook recursion, with dictionaries."""
    grams = {
        n: Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1)) for n in range(1, order + 1)
    }

    def counts(n: int) -> Counter[tuple[int, ...]]:
        if n == order:
            return grams[n]
        return Counter(gram[1:] for gram in grams[n + 1])

    def recurse(n: int, context: tuple[int, ...]) -> float:
        if n == 0:
            return 1 / vocab
        lower = recurse(n - 1, context[1:])
        table = counts(n)
        values = list(table.values())
        once, twice = values.count(1), values.count(2)
        discount = 0.5 if not once else 0.75 if not twice else once / (once + 2 * twice)
        following = {gram[-1]: count for gram, count in table.items() if gram[:-1] == context}
        if not following:
            return lower
        total = sum(following.values())
        kept = max(following.get(token, 0) - discount, 0)
        return (kept + discount * len(following) * lower) / total

    context = tuple(history[-(order - 1) :]) if order > 1 else ()
    return recurse(len(context) + 1, context)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_slow_implementation(order: int) -> None:
    rng = np.random.default_rng(order)
    train = rng.integers(0, 4, 60).tolist()
    held_out = rng.integers(0, 5, 25).tolist()
    fast = KneserNey(train, vocab_size=5, order=order).probabilities(held_out)
    slow = [slow_probability(train, held_out[:i], token, 5, order) for i, token in enumerate(held_out)]
    # A slow table of order n for a shorter context is the lower order's, as at the start of a stream.
    assert fast == pytest.approx(slow, rel=1e-12)


def test_sums_to_one_over_the_vocabulary_in_any_context() -> None:
    rng = np.random.default_rng(0)
    model = KneserNey(rng.integers(0, 6, 300), vocab_size=7, order=4)  # token 6 never occurs
    for _ in range(20):
        history = rng.integers(0, 7, 5).tolist()
        total = math.fsum(model.probabilities([*history, token])[-1] for token in range(7))
        assert total == pytest.approx(1)


def test_longer_orders_win_where_the_data_have_structure() -> None:
    rng = np.random.default_rng(1)
    follow: dict[tuple[int, int], int] = defaultdict(lambda: int(rng.integers(0, 20)))
    tokens = [0, 1]
    for _ in range(40_000):  # the next token follows from the last two, nine times in ten
        sure = rng.random() < 0.9
        tokens.append(follow[tokens[-2], tokens[-1]] if sure else int(rng.integers(0, 20)))
    train, held_out = tokens[:35_000], tokens[35_000:]
    bits = [ngram_bits(train, held_out, 20, order) / len(held_out) for order in (1, 2, 3)]
    entropy = -(0.905 * math.log2(0.905) + 19 * 0.005 * math.log2(0.005))
    assert bits[0] > bits[1] > bits[2]
    assert entropy < bits[2] < entropy + 0.15


def test_is_fast_enough_for_the_lab() -> None:
    rng = np.random.default_rng(2)
    tokens = (rng.zipf(1.3, 500_000) % 1024).astype(np.int64)
    began = time.process_time()
    ngram_bits(tokens[:450_000], tokens[450_000:], 1024)
    assert time.process_time() - began < 6


@pytest.mark.parametrize("tokens", [[], [0, 8], [-1]])
def test_streams_outside_the_vocabulary_are_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="from 0 to 7"):
        KneserNey(tokens, vocab_size=8)
