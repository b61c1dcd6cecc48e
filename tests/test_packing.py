"""Packing: no token lost, none predicted twice, documents kept apart; order a function of seed and step."""

import copy
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trueup.base.batches import PackedBatches, Shares, StreamBatches, held_out_batches
from trueup.base.loss import IGNORED
from trueup.base.packing import (
    Batch,
    Documents,
    best_fit,
    cached_documents,
    check_special_tokens,
    pack,
    tokenize,
)
from trueup.base.tokenizer import encode_documents, train_tokenizer
from trueup.recipes.errors import TrueupError

TEXTS = [
    "The cat sat on the mat.",
    "A dog!",
    "",
    "Ünïcödé 🎈 and <|end|> as plain text.",
    "Long, long ago. " * 20,
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300, model_max_length=32)


def documents_of(lengths: list[int]) -> Documents:
    """Documents whose tokens are all different, so that each can be recognised in the rows."""
    ends = np.cumsum(lengths)
    return Documents(np.arange(1, ends[-1] + 1, dtype=np.uint32), ends, np.array(lengths))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=40), st.integers(2, 40))
def test_every_token_but_the_first_of_a_document_is_predicted_once_from_the_one_before(
    lengths: list[int], max_length: int
) -> None:
    documents = documents_of(lengths)
    packed = pack(documents, max_length, pad_token_id=0)
    batch = packed.batch(range(len(packed)), len(packed))
    predicted = batch.labels != IGNORED
    firsts = set((np.concatenate([[0], documents.ends[:-1]]) + 1).tolist())
    assert Counter(batch.labels[predicted].tolist()) == Counter(set(documents.tokens.tolist()) - firsts)
    assert (batch.labels[predicted] == batch.input_ids[predicted] + 1).all()
    assert packed.targets == batch.targets == sum(lengths) - len(lengths)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_best_fit_fills_rows_as_the_textbook_algorithm_does(lengths: list[int]) -> None:
    capacity = 30
    order, rows = best_fit(np.array(lengths), capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in order[a:b]) for a, b in itertools.pairwise(rows)]
    assert max(filled) <= capacity
    rooms: list[int] = []  # the definition, in O(n^2)
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda index: rooms[index])] -= length
        else:
            rooms.append(capacity - length)
    assert sorted(capacity - room for room in rooms) == sorted(filled)


def test_positions_begin_again_with_every_segment() -> None:
    packed = pack(documents_of([4, 6]), max_length=10, pad_token_id=0)
    batch = packed.batch([0], 2)
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]  # two documents, then padding
    assert batch.labels[0].tolist() == [2, 3, 4, 6, 7, 8, 9, 10, IGNORED, IGNORED]
    assert (batch.labels[1] == IGNORED).all()
    assert (batch.input_ids[1] == 0).all()
    assert sorted(batch.documents) == [0, 1]


def test_documents_are_bos_text_eos_and_bytes_are_those_of_the_text(tokenizer: Any) -> None:
    documents = tokenize(TEXTS, tokenizer)
    whole = [text for text in TEXTS if text]
    assert documents.text_bytes == sum(len(text.encode()) for text in whole)
    assert documents.tokens.tolist() == [t for ids in encode_documents(tokenizer, whole) for t in ids]
    first = documents.tokens[: documents.ends[0]]
    assert (first[0], first[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(first[1:-1]) == TEXTS[0]


def test_a_tokenizer_that_adds_no_bos_gets_one(tokenizer: Any) -> None:
    from tokenizers import processors

    foreign = copy.deepcopy(tokenizer)
    foreign.backend_tokenizer.post_processor = processors.ByteLevel()
    assert (tokenize(TEXTS, foreign).tokens == tokenize(TEXTS, tokenizer).tokens).all()


def test_a_limit_keeps_documents_whole(tokenizer: Any) -> None:
    limited = tokenize(TEXTS, tokenizer, max_tokens=5)
    assert len(limited.ends) == 1
    assert limited.tokens[-1] == tokenizer.eos_token_id


def test_the_cache_holds_the_same_and_is_read_again(tokenizer: Any, tmp_path: Path) -> None:
    direct = tokenize(TEXTS, tokenizer)
    first = cached_documents(TEXTS, tokenizer, {"sha256": "a"}, tmp_path)
    again = cached_documents(iter(()), tokenizer, {"sha256": "a"}, tmp_path)  # the texts are not read again
    for found in (first, again):
        assert (found.tokens == direct.tokens).all()
        assert (found.ends == direct.ends).all()
        assert found.text_bytes == direct.text_bytes
    assert len(cached_documents(TEXTS[:1], tokenizer, {"sha256": "b"}, tmp_path).ends) == 1
    other = train_tokenizer(TEXTS, 290)
    assert len(cached_documents(TEXTS[:2], other, {"sha256": "a"}, tmp_path).ends) == 2


def test_a_half_written_cache_is_written_again(tokenizer: Any, tmp_path: Path) -> None:
    cached_documents(TEXTS, tokenizer, {}, tmp_path)
    [mark] = tmp_path.rglob("documents.npy")
    mark.unlink()
    assert len(cached_documents(TEXTS[:1], tokenizer, {}, tmp_path).ends) == 1


@pytest.mark.parametrize(("name", "value"), [("eos_token", None), ("pad_token", "<|end|>")])
def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer: Any, name: str, value: Any) -> None:
    broken = copy.deepcopy(tokenizer)
    setattr(broken, name, value)
    with pytest.raises(TrueupError, match=name.split("_")[0]):
        check_special_tokens(broken, "here")


def rows_of(batches: list[Batch]) -> list[bytes]:
    return [row.tobytes() for batch in batches for row in batch.input_ids]


def test_each_epoch_sees_every_row_once_in_another_order() -> None:
    packed = pack(documents_of([9] * 24), max_length=8, pad_token_id=0)
    batches = PackedBatches(packed, Shares(size=2, micro=3), seed=1)
    seen = [rows_of(batches.step(step)) for step in range(8)]
    epochs = [list(itertools.chain(*seen[:4])), list(itertools.chain(*seen[4:]))]
    assert len(set(epochs[0])) == 24
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]
    assert rows_of(PackedBatches(packed, Shares(size=2, micro=3), seed=1).step(5)) == seen[5]
    assert rows_of(PackedBatches(packed, Shares(size=2, micro=3), seed=2).step(5)) != seen[5]


def test_processes_share_out_what_one_process_would_see() -> None:
    packed = pack(documents_of([9] * 24), max_length=8, pad_token_id=0)
    one = PackedBatches(packed, Shares(size=8), seed=1).step(1)
    parts = [PackedBatches(packed, Shares(2, micro=2, rank=rank, world=2), 1).step(1) for rank in (0, 1)]
    assert Counter(rows_of(one)) == Counter(rows_of(parts[0] + parts[1]))


def test_held_out_rows_are_read_once_and_alike_often_by_every_process() -> None:
    packed = pack(documents_of([9] * 7), max_length=8, pad_token_id=0)
    parts = [list(held_out_batches(packed, Shares(2, rank=rank, world=2))) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == 2
    assert sum(batch.targets for part in parts for batch in part) == packed.targets


def test_a_stream_is_resumed_where_it_was_and_begins_again_at_its_end(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueup.base.batches.WINDOW", 7)
    texts = [f"Document number {number}. " * (1 + number % 4) for number in range(30)]
    stream = Dataset.from_dict({"text": texts}).to_iterable_dataset()

    def batches(state: dict[str, Any] | None = None) -> StreamBatches:
        return StreamBatches(stream, tokenizer, 32, Shares(size=3, micro=2), seed=0, state=state)

    through, states = batches(), []
    seen = []
    for step in range(20):
        states.append(through.state())
        seen.append(through.step(step))
    assert max(number for batch in seen[-1] for number in batch.documents) >= 30  # a second pass
    resumed = batches(states[11])
    assert [rows_of(resumed.step(step)) for step in range(11, 20)] == [rows_of(b) for b in seen[11:]]


def test_an_empty_stream_is_an_error_and_not_a_wait(tokenizer: Any) -> None:
    with pytest.raises(TrueupError, match="no documents"):
        StreamBatches([], tokenizer, 32, Shares(size=1), seed=0)
