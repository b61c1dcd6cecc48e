"""What each step trains on, as a function of the seed and the step: no loader state, so a resume is exact."""

import copy
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from trueup.base.packing import Batch, Packed, pack, tokenize
from trueup.recipes.errors import TrueupError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WINDOW = 4_096  # documents of a stream packed and shuffled together


@dataclass(frozen=True)
class Shares:
    """How a step's rows are shared out: `micro` batches of `size` rows on each of `world` processes."""

    size: int
    micro: int = 1
    rank: int = 0
    world: int = 1

    @property
    def rows_per_step(self) -> int:
        return self.size * self.micro * self.world


class Batches(Protocol):
    """Where the training loop gets its batches."""

    def step(self, step: int) -> list[Batch]:
        """This process's micro-batches of a step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of it."""


class PackedBatches:
    """Batches of a data set on disk: each epoch goes through all rows in an order of its own."""

    def __init__(self, packed: Packed, shares: Shares, seed: int):
        self.packed, self.shares, self.seed = packed, shares, seed
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def step(self, step: int) -> list[Batch]:
        shares = self.shares
        rows = [self.row(step * shares.rows_per_step + place) for place in range(shares.rows_per_step)]
        # Micro-batch m of all processes together is one slice: 2 processes see what a doubled batch does.
        firsts = [(m * shares.world + shares.rank) * shares.size for m in range(shares.micro)]
        return [self.packed.batch(rows[first : first + shares.size], shares.size) for first in firsts]

    def row(self, place: int) -> int:
        """The row that stands at a place of the endless sequence of epochs."""
        epoch, position = divmod(place, len(self.packed))
        return int(self._order(epoch)[position])

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.packed))

    def state(self) -> dict[str, Any]:
        return {}


class StreamBatches:
    """Batches of a stream, packed and shuffled a window of documents at a time; it is begun again at its end.

    Steps must be asked for in order. `state` says which documents were taken, and a resumed run skips them.
    """

    def __init__(
        self,
        texts: Iterable[dict[str, Any]],
        tokenizer: "PreTrainedTokenizerFast",
        max_length: int,
        shares: Shares,
        seed: int,
        state: dict[str, Any] | None = None,
    ):
        self.tokenizer = copy.deepcopy(
            tokenizer
        )  # its reader thread must not meet the one that decodes samples
        self.max_length = max_length
        self.shares, self.seed = shares, seed
        # `documents` were used up before the window at hand, of which `rows` are; `windows` is its number.
        self._state = {"documents": 0, "windows": 0, "rows": 0} | (state or {})
        self._documents = islice(_forever(texts), int(self._state["documents"]), None)
        self._reader = ThreadPoolExecutor(1)  # the next window is read and packed while this one trains
        self._window = self._read(self._state["documents"])
        self._ahead = self._reader.submit(self._read, self._used)

    def _read(self, first: int) -> Packed:
        documents = tokenize(islice(self._documents, WINDOW), self.tokenizer)
        return pack(documents, self.max_length, int(self.tokenizer.pad_token_id), first)

    @property
    def _used(self) -> int:
        return int(self._state["documents"]) + WINDOW

    def step(self, step: int) -> list[Batch]:
        return [self._take(self.shares.size) for _ in range(self.shares.micro)]

    def _take(self, count: int) -> Batch:
        parts = []
        while count:
            if self._state["rows"] == len(self._window):
                self._advance()
            order = np.random.default_rng([self.seed, self._state["windows"]]).permutation(len(self._window))
            rows = order[self._state["rows"] :][:count]
            parts.append(self._window.batch(rows, len(rows)))
            self._state["rows"] += len(rows)
            count -= len(rows)
        return Batch(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.position_ids for part in parts]),
            [number for part in parts for number in part.documents],
        )

    def _advance(self) -> None:
        self._window = self._ahead.result()
        self._state = {"documents": self._used, "windows": self._state["windows"] + 1, "rows": 0}
        self._ahead = self._reader.submit(self._read, self._used)

    def state(self) -> dict[str, Any]:
        return dict(self._state)


def _forever(texts: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Pass after pass. Raises TrueupError if there is nothing to pass over."""
    while True:
        empty = True
        for row in texts:
            empty = False
            yield row["text"]
        if empty:
            raise TrueupError("dataset_streaming: the stream has no documents for this process")


def held_out_batches(packed: Packed, shares: Shares) -> Iterator[Batch]:
    """This process's batches of one pass over all rows: equally many on every process, padded at the end."""
    rows = np.arange(len(packed))
    together = shares.size * shares.world
    for first in range(0, len(packed), together):
        begin = first + shares.rank * shares.size
        yield packed.batch(rows[begin : begin + shares.size], shares.size)
