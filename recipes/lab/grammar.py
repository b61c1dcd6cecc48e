"""One definition of a document, used both ways: a Writer samples it, a Reader parses it back.

A document is a function of a *pen*. It emits fixed text with `pen.write` and takes every random decision
with `pen.choose`, whose options each emit a text of their own. Because the texts of one set of options are
prefix-free (no text begins another), a finished document can be read back along exactly one path. So the
generator's own log-probability of a document is exact, and its mean is the floor that no model can beat.
"""

import itertools
import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

# An option that ends the document, the one choice without visible text: a model pays for it at its end token.
END = "\0"


class Options:
    """A prefix-free set of texts with probabilities and labels.

    Several texts may share a label (wordings of one thing): a choice returns the label, and `without`
    excludes labels. Weights need not be normalised. Raises ValueError when the set is not prefix-free,
    since then the text could no longer be read back.
    """

    __slots__ = ("cumulative", "labels", "mass", "texts", "weights")

    def __init__(
        self,
        texts: Sequence[str],
        weights: Sequence[float] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        for shorter, longer in itertools.pairwise(sorted(texts)):
            if longer.startswith(shorter):
                raise ValueError(f"options are not prefix-free: {shorter!r} begins {longer!r}")
        raw = list(weights) if weights is not None else [1.0] * len(texts)
        total = math.fsum(raw)
        self.texts = tuple(texts)
        self.labels = tuple(labels) if labels is not None else self.texts
        self.weights = tuple(weight / total for weight in raw)
        self.cumulative = [*itertools.accumulate(self.weights)]
        self.cumulative[-1] = 1.0  # rounding must not leave a gap above the last option
        self.mass: dict[str, float] = {}
        for label, weight in zip(self.labels, self.weights, strict=True):
            self.mass[label] = self.mass.get(label, 0.0) + weight

    @classmethod
    def grouped(cls, wordings: Mapping[str, Sequence[str]]) -> "Options":
        """Every label equally likely, and every wording equally likely within its label."""
        return cls(
            texts=[text for texts in wordings.values() for text in texts],
            weights=[1 / len(texts) for texts in wordings.values() for _ in texts],
            labels=[label for label, texts in wordings.items() for _ in texts],
        )


class Pen(Protocol):
    """What a document function may do."""

    def write(self, text: str) -> None:
        """Emit fixed text."""

    def choose(self, options: Options, without: Collection[str] = ()) -> str:
        """Emit one option's text and return its label, which is none of `without` (one must be left)."""


class Writer:
    """A pen that samples."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng.random
        self._parts: list[str] = []

    def write(self, text: str) -> None:
        self._parts.append(text)

    def choose(self, options: Options, without: Collection[str] = ()) -> str:
        while True:  # rejection: exactly the distribution conditioned on what is left
            index = bisect_right(options.cumulative, self._random())
            label = options.labels[index]
            if label not in without:
                self._parts.append(options.texts[index])
                return label

    def text(self) -> str:
        return "".join(self._parts).removesuffix(END)


class NotInGrammar(Exception):
    """The text cannot have come from this document function."""


class Reader:
    """A pen that follows a given text and adds up `bits`, the exact -log2 probability of the path taken."""

    def __init__(self, text: str) -> None:
        self._text = text + END
        self._position = 0
        self.bits = 0.0

    def write(self, text: str) -> None:
        if not self._text.startswith(text, self._position):
            found = self._text[self._position : self._position + 40]
            raise NotInGrammar(f"expected {text!r} at character {self._position}, found {found!r}")
        self._position += len(text)

    def choose(self, options: Options, without: Collection[str] = ()) -> str:
        for text, label, weight in zip(options.texts, options.labels, options.weights, strict=True):
            if label not in without and self._text.startswith(text, self._position):
                left = 1.0 - math.fsum(options.mass.get(other, 0.0) for other in without)
                self.bits -= math.log2(weight / left)
                self._position += len(text)
                return label
        found = self._text[self._position : self._position + 40]
        raise NotInGrammar(f"no option matches at character {self._position}: {found!r}")

    def finish(self) -> float:
        """The bits of the whole text; raises NotInGrammar when something is left unread."""
        rest = self._text[self._position :]
        if rest not in ("", END):
            raise NotInGrammar(f"text left over at character {self._position}: {rest[:40]!r}")
        return self.bits


class Patterns:
    """Sentences with slots, "They saw a <animal>.", each known by its text before the first slot."""

    def __init__(self, sentences: Sequence[str], slots: Mapping[str, Options]) -> None:
        self._parts = {str(index): re.split(r"<(\w+)>", text) for index, text in enumerate(sentences)}
        self._heads = Options([parts[0] for parts in self._parts.values()], labels=[*self._parts])
        self._slots = slots

    def write(self, pen: Pen, without: Collection[str] = ()) -> str:
        """Emit one sentence with its slots filled; the label returned can be given as `without` next time."""
        label = pen.choose(self._heads, without)
        parts = self._parts[label]
        for slot, literal in zip(parts[1::2], parts[2::2], strict=True):
            pen.choose(self._slots[slot])
            pen.write(literal)
        return label


def sample(document: Callable[[Pen], object], rng: random.Random) -> str:
    """One text of a document function."""
    writer = Writer(rng)
    document(writer)
    return writer.text()


def read(document: Callable[[Pen], object], text: str) -> float:
    """-log2 probability of `text` under a document function; NotInGrammar when it cannot have written it."""
    reader = Reader(text)
    document(reader)
    return reader.finish()
