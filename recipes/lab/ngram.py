"""Interpolated Kneser-Ney n-grams over token ids: the yardstick that a trained model has to leave behind.

After Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 3:
absolute discounting with one discount per order, lower orders counting in how many contexts a gram was seen.
Vectorised: a gram is a number, (number of the gram without its last token) * vocabulary + last token, so
every order is one `numpy.unique`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """The grams of one length. Gram g is keys[g] = (id of its context) * vocabulary + last token, sorted."""

    keys: Ints
    counts: Ints  # of occurrences in the highest order, of distinct left neighbours below it
    context_total: Ints  # by context id: the sum of its grams' counts
    context_types: Ints  # by context id: how many of its grams have a count
    discount: float


class KneserNey:
    """A model of `order` tokens, trained on one stream of ids below `vocab_size`.

    Raises ValueError for an empty stream or ids outside the vocabulary.
    """

    def __init__(self, train_tokens: Sequence[int] | Ints, vocab_size: int, order: int = 5) -> None:
        tokens = _checked(train_tokens, vocab_size)
        self.vocab_size = vocab_size
        self._orders: list[_Order] = []
        grams = []  # by length: (sorted keys, ids along the stream, first places, occurrences)
        ids = np.zeros(len(tokens) + 1, dtype=np.int64)  # the one empty gram, before every token
        for length in range(1, min(order, len(tokens)) + 1):
            keys = ids[:-1] * vocab_size + tokens[length - 1 :]
            unique, first, ids, occurrences = np.unique(
                keys, return_index=True, return_inverse=True, return_counts=True
            )
            grams.append((unique, ids, first, occurrences))
        for length, (keys, _, _, occurrences) in enumerate(grams, start=1):
            counts = occurrences
            if length < len(
                grams
            ):  # each longer gram is one left neighbour of the gram without its first token
                longer_first = grams[length][2]
                suffixes = grams[length - 1][1][longer_first + 1]
                counts = np.bincount(suffixes, minlength=len(keys))
            contexts = len(grams[length - 2][0]) if length > 1 else 1
            self._orders.append(_order(keys, counts, contexts, vocab_size))

    def probabilities(self, tokens: Sequence[int] | Ints) -> Floats:
        """The probability of every token of a stream given those before it; shape (len(tokens),)."""
        stream = _checked(tokens, self.vocab_size)
        result = np.full(len(stream), 1 / self.vocab_size)
        # ids[i]: the gram of the current context length that ends just before token i, -1 where never seen
        ids = np.zeros(len(stream), dtype=np.int64)
        for order in self._orders:
            found = np.full(len(stream), -1, dtype=np.int64)
            seen = ids >= 0
            keys = ids[seen] * self.vocab_size + stream[seen]
            places = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            found[seen] = np.where(order.keys[places] == keys, places, -1)
            total = np.where(seen, order.context_total[ids], 0)
            used = total > 0
            count = np.where(found >= 0, order.counts[found], 0)[used]
            backing_off = order.discount * order.context_types[ids[used]] * result[used]
            result[used] = (np.maximum(count - order.discount, 0) + backing_off) / total[used]
            ids = np.concatenate(([-1], found[:-1]))
        return result


def ngram_bits(
    train_tokens: Sequence[int] | Ints, heldout_tokens: Sequence[int] | Ints, vocab_size: int, order: int = 5
) -> float:
    """Total bits that a Kneser-Ney model of the training stream spends on the held-out stream.

    Divide by the held-out bytes for bits per byte. Put between documents the end token that a model pays for.
    """
    return float(-np.log2(KneserNey(train_tokens, vocab_size, order).probabilities(heldout_tokens)).sum())


def _checked(tokens: Sequence[int] | Ints, vocab_size: int) -> Ints:
    stream = np.asarray(tokens, dtype=np.int64)
    if stream.size == 0 or stream.min() < 0 or stream.max() >= vocab_size:
        raise ValueError(f"a stream of ids from 0 to {vocab_size - 1} is needed, and it must not be empty")
    return stream


def _order(keys: Ints, counts: Ints, contexts: int, vocab_size: int) -> _Order:
    context = keys // vocab_size
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    # n1 / (n1 + 2 n2) is Ney's estimate; without grams seen once there is nothing to estimate it from.
    discount = once / (once + 2 * twice) if once else 0.5
    if once and not twice:
        discount = 0.75  # the estimate would be 1: no count would be left at all
    return _Order(
        keys=keys,
        counts=counts,
        context_total=np.bincount(context, weights=counts, minlength=contexts).astype(np.int64),
        context_types=np.bincount(context, weights=counts > 0, minlength=contexts).astype(np.int64),
        discount=discount,
    )
