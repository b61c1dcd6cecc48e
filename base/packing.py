"""Documents to rows: tokenised once, packed whole into rows of `max_length` tokens, none lost.

    document   <|bos|> text <|end|>
    segment    a document, or a piece of one longer than a row; the last token of a piece is repeated at the
               head of the next, so that every token but a document's first is predicted exactly once
    row        segments side by side, positions starting again at 0 with each: attention stays inside a
               segment, and no segment predicts the first token of the next

Rows are filled by best-fit decreasing: the longest segment first, each into the row with the least room that
still holds it (https://arxiv.org/abs/2404.10830). On real text well under 1 % of the positions are padding.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trueup.base.loss import IGNORED
from trueup.base.tokenizer import encode_documents
from trueup.recipes.directory import atomic_file, writing
from trueup.recipes.errors import TrueupError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Documents tokenised in one call: enough to keep every core busy, few enough to hold as Python lists.
CALL_DOCUMENTS = 1_000
CALL_CHARACTERS = 4_000_000

# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, one after the other.

    tokens: (tokens,) uint16, or uint32 for vocabularies above 65,536; memory-mapped if from the cache.
    ends: (documents,) where each document ends in `tokens`.
    sizes: (documents,) UTF-8 bytes of each text, special tokens not counted.
    """

    tokens: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray

    @property
    def text_bytes(self) -> int:
        return int(self.sizes.sum())


def tokenize(
    texts: Iterable[str], tokenizer: "PreTrainedTokenizerFast", max_tokens: int | None = None
) -> Documents:
    """Whole documents, in memory, until there are at least `max_tokens` tokens."""
    tokens, ends, sizes, total = [], [], [], 0
    for ids, size in _encoded(texts, tokenizer):
        tokens.append(ids)
        total += len(ids)
        ends.append(total)
        sizes.append(size)
        if max_tokens is not None and total >= max_tokens:
            break
    flat = np.concatenate(tokens) if tokens else np.empty(0, token_dtype(tokenizer))
    return Documents(flat, np.array(ends, np.int64), np.array(sizes, np.int64))


def cached_documents(
    texts: Iterable[str], tokenizer: "PreTrainedTokenizerFast", fingerprint: dict[str, Any], cache: Path
) -> Documents:
    """The same from a memory-mapped cache, filled on the first call.

    The cache is keyed by tokenizer and data, and holds for every `max_length`: packing takes seconds. Both
    files appear by a rename and hold the same bytes whoever writes them, so ranks may even write at once.

    Raises:
        TrueupError: the cache cannot be written.
    """
    key = [tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id, fingerprint]
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
    dtype = token_dtype(tokenizer)
    if not (folder / "documents.npy").exists():  # written last: the mark of a complete cache
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder, texts, tokenizer)
    ends, sizes = np.load(folder / "documents.npy")
    return Documents(np.memmap(folder / "tokens.bin", dtype, mode="r"), ends, sizes)


def _write(folder: Path, texts: Iterable[str], tokenizer: "PreTrainedTokenizerFast") -> None:
    ends, sizes, total = [], [], 0
    with atomic_file(folder / "tokens.bin") as partial, partial.open("wb") as file:
        for ids, size in _encoded(texts, tokenizer):
            file.write(ids.tobytes())
            total += len(ids)
            ends.append(total)
            sizes.append(size)
    with atomic_file(folder / "documents.npy") as partial, partial.open("wb") as file:
        np.save(file, np.array([ends, sizes], np.int64))


def _encoded(texts: Iterable[str], tokenizer: "PreTrainedTokenizerFast") -> Iterator[tuple[np.ndarray, int]]:
    """(tokens, UTF-8 bytes) of each document; one without text teaches nothing and is passed over."""
    dtype = token_dtype(tokenizer)
    for group in _calls(texts):
        for text, ids in zip(group, encode_documents(tokenizer, group), strict=True):
            # A foreign tokenizer may not add it, and generation has to start from something it has seen.
            head = [] if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id]
            yield np.array([*head, *ids], dtype), len(text.encode())


def _calls(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for text in texts:
        if not text:
            continue
        group.append(text)
        characters += len(text)
        if len(group) == CALL_DOCUMENTS or characters >= CALL_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def token_dtype(tokenizer: "PreTrainedTokenizerFast") -> type[np.unsignedinteger]:
    return np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model, each array (rows, max_length) int64.

    labels: the next token of the same segment, -100 in padding.
    position_ids: from 0 in every segment; the padding at the end of a row counts as a segment.
    documents: numbers of the documents the rows are made of.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    documents: list[int]

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class Packed:
    """Documents packed into rows.

    starts, lengths: (segments,) the first token of each segment in `documents.tokens`, and how many tokens it
        predicts; it reads one more.
    numbers: (segments,) the document each is from.
    rows: (rows + 1,) row i holds the segments rows[i] to rows[i + 1].
    """

    documents: Documents
    max_length: int
    pad_token_id: int
    starts: np.ndarray
    lengths: np.ndarray
    numbers: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def targets(self) -> int:
        """Tokens predicted in one pass over all rows."""
        return int(self.lengths.sum())

    @property
    def padding(self) -> float:
        """The share of all positions that is padding."""
        return 1 - self.targets / max(1, len(self) * self.max_length)

    def batch(self, rows: Iterable[int], size: int) -> Batch:
        """The given rows, and rows of nothing but padding up to `size`: shapes stay the same to the end."""
        shape = size, self.max_length
        input_ids, labels = np.full(shape, self.pad_token_id, np.int64), np.full(shape, IGNORED, np.int64)
        position_ids = np.tile(np.arange(self.max_length, dtype=np.int64), (size, 1))
        documents: list[int] = []
        for line, row in enumerate(rows):
            column = 0
            for segment in range(self.rows[row], self.rows[row + 1]):
                start, length = int(self.starts[segment]), int(self.lengths[segment])
                place = slice(column, column + length)
                input_ids[line, place] = self.documents.tokens[start : start + length]
                labels[line, place] = self.documents.tokens[start + 1 : start + length + 1]
                column += length
                position_ids[line, column:] -= position_ids[line, column : column + 1].copy()
                documents.append(int(self.numbers[segment]))
        return Batch(input_ids, labels, position_ids, documents)


def pack(documents: Documents, max_length: int, pad_token_id: int, first_number: int = 0) -> Packed:
    """Cut what is longer than a row, and pack.

    Args:
        first_number: the number of the first document, where these are a window of a stream.
    """
    begins = np.concatenate([[0], documents.ends[:-1]]).astype(np.int64)
    predicted = documents.ends - begins - 1
    pieces = -(-predicted // max_length)
    numbers = np.repeat(np.arange(len(predicted)), pieces)
    piece = np.arange(len(numbers)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = begins[numbers] + piece * max_length
    lengths = np.minimum(max_length, predicted[numbers] - piece * max_length)
    order, rows = best_fit(lengths, max_length)
    return Packed(
        documents,
        max_length,
        pad_token_id,
        starts[order],
        lengths[order],
        numbers[order] + first_number,
        rows,
    )


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing in O(segments): rows are kept by their room, a bit mask tells which rooms exist.

    Args:
        lengths: (segments,) each from 1 to `capacity`.

    Returns:
        The segments' order, row by row, and where each row begins in it (rows + 1,).
    """
    row_of = np.empty(len(lengths), np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set while by_room[r] holds a row
    rows = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for segment, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the tightest fit
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            row, room, rows = rows, capacity, rows + 1
        row_of[segment] = row
        if room > length:
            by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    order = np.argsort(row_of, kind="stable")
    return order, np.searchsorted(row_of[order], np.arange(rows + 1))


def check_special_tokens(tokenizer: "PreTrainedTokenizerFast", place: str) -> None:
    """Raises TrueupError unless the tokenizer has bos, eos and a pad token of its own."""
    missing = [name for name in ("bos_token", "eos_token", "pad_token") if getattr(tokenizer, name) is None]
    if missing:
        raise TrueupError(f"{place}: the tokenizer has no {' and no '.join(missing)}; add it, or train one")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise TrueupError(
            f"{place}: the tokenizer pads with its eos token, so no model could learn to stop; give it a "
            "pad token"
        )
