"""What goes wrong in generated text, as numbers: pure functions of tokens, words and flags.

Tokens are any hashable units: token ids, or the words of `text.split()`.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from trueup.eval.sampler import Sample

REPEAT_N = 4  # seq-rep-4 of https://arxiv.org/abs/1908.04319


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All runs of n neighbouring tokens, in order."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def distinct(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams of all sequences together; nan if there are none.

    distinct-n of https://arxiv.org/abs/1510.03055. It falls as there is more text, so compare equal numbers
    of sequences only.
    """
    found = [gram for sequence in sequences for gram in ngrams(sequence, n)]
    return len(set(found)) / len(found) if found else float("nan")


def repetition(tokens: Sequence[Hashable], n: int = REPEAT_N) -> float:
    """The share of a sequence's n-grams that repeat an earlier one; 0 if it is shorter than n."""
    found = ngrams(tokens, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def longest_repeat(tokens: Sequence[Hashable]) -> int:
    """The length of the longest run of tokens that occurs twice without overlap.

    Compares the sequence with itself at every shift: quadratic, in numpy.
    """
    codes = {token: code for code, token in enumerate(dict.fromkeys(tokens))}
    ids = np.array([codes[token] for token in tokens])
    longest = 0
    for shift in range(1, len(ids)):
        if min(shift, len(ids) - shift) > longest:
            longest = max(longest, min(shift, _longest_run(ids[shift:] == ids[:-shift])))
    return longest


def _longest_run(flags: np.ndarray) -> int:
    """The most neighbouring Trues."""
    gaps = np.flatnonzero(np.concatenate(([True], ~flags, [True])))
    return int(np.diff(gaps).max()) - 1


def token_entropy(log_probs: Sequence[Sequence[float]]) -> float:
    """Mean entropy of the next token, in nats, from the log-probabilities of tokens sampled at temperature 1.

    Minus their mean: the expectation of -log p under p is the entropy.
    """
    return -float(np.mean([value for row in log_probs for value in row]))


def pathologies(samples: Sequence["Sample"]) -> dict[str, float]:
    """All of it for one arm's samples: `completions/mean_length` (tokens) and `mean_words`,
    `distinct_{1,2,3}` over words, `repetition` and `longest_repeat` (means over samples, in tokens),
    `eos_rate`, and `entropy` if the samples carry log-probabilities."""
    words = [one.text.split() for one in samples]
    figures: dict[str, Any] = {
        "completions/mean_length": np.mean([len(one.ids) for one in samples]),
        "mean_words": np.mean([len(one) for one in words]),
        "repetition": np.mean([repetition(one.ids) for one in samples]),
        "longest_repeat": np.mean([longest_repeat(one.ids) for one in samples]),
        "eos_rate": np.mean([one.ended for one in samples]),
    } | {f"distinct_{n}": distinct(words, n) for n in (1, 2, 3)}
    if all(one.log_probs is not None for one in samples):
        figures["entropy"] = token_entropy([one.log_probs or [] for one in samples])
    return {name: float(value) for name, value in figures.items()}
