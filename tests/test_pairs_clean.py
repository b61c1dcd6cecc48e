"""Pairs that teach nothing are counted and left out, by the tokens TRL's trainers would see."""

from typing import Any

import eval_models
import pytest
from datasets import Dataset, IterableDataset

from trueup.eval.rendering import encode_prompt
from trueup.preference.pairs_clean import clean_pairs
from trueup.recipes.errors import TrueupError

TOKENIZER = eval_models.tokenizer()  # one token per byte


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A conversational pair."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


CHAT = [
    pair("a", "yes", "no"),
    pair("b", "same", "same"),
    pair("c", "yes", " \n"),
    pair("d" * 40, "yes", "no"),  # the prompt alone fills the length
    pair("e", "a long way in common, then this", "a long way in common, then that"),
]
START = len(encode_prompt(TOKENIZER, CHAT[0]["prompt"]))


def counts(report: Any) -> tuple[int, int, int, int]:
    return report.kept, report.identical, report.empty, report.truncated


def test_every_fault_is_counted_and_said() -> None:
    rows, report = clean_pairs(Dataset.from_list(CHAT), TOKENIZER, START + 10, "train")
    assert counts(report) == (1, 1, 1, 2)
    assert rows.to_list() == CHAT[:1]
    cut = f"within max_length {START + 10} an answer is cut away, or both are equal"
    assert report.lines() == [
        "train: left out 1 of 5 pairs: chosen and rejected are equal",
        "train: left out 1 of 5 pairs: an answer is empty",
        f"train: left out 2 of 5 pairs: {cut}",
    ]


def test_without_a_length_nothing_is_truncated_and_good_pairs_need_no_word() -> None:
    _, report = clean_pairs(Dataset.from_list(CHAT), TOKENIZER, None, "train")
    assert counts(report) == (3, 1, 1, 0)
    rows, report = clean_pairs(Dataset.from_list(CHAT[:1]), TOKENIZER, None, "train")
    assert (len(rows), report.lines()) == (1, [])


@pytest.mark.parametrize(("length", "kept"), [(START, False), (START + 1, True)])
def test_the_limit_is_exact(length: int, kept: bool) -> None:
    """One token of each answer is enough, where it tells them apart."""
    rows = Dataset.from_list([CHAT[0], pair("a", "yes", "no")])
    if not kept:
        with pytest.raises(TrueupError, match=r"train: no pair is left to learn from\ntrain: left out 2"):
            clean_pairs(rows, TOKENIZER, length, "train")
        return
    assert counts(clean_pairs(rows, TOKENIZER, length, "train")[1]) == (2, 0, 0, 0)


def test_plain_text_pairs_are_cut_where_trl_cuts_them() -> None:
    rows = [
        {"prompt": "ab", "chosen": "xyz", "rejected": "xyw"},
        {"prompt": "abcdef", "chosen": "x", "rejected": "y"},
    ]
    # A beginning-of-text token goes before the prompt.
    for length, kept in ((5, 0), (6, 1), (7, 1), (8, 2)):
        cleaned = clean_pairs(IterableDataset.from_generator(lambda: iter(rows)), TOKENIZER, length, "train")
        assert len(list(cleaned[0])) == kept
        assert counts(cleaned[1]) == (kept, 0, 0, 2 - kept)


def test_a_stream_is_cleaned_as_it_is_read() -> None:
    rows, report = clean_pairs(IterableDataset.from_generator(lambda: iter(CHAT)), TOKENIZER, START + 10, "x")
    assert counts(report) == (0, 0, 0, 0)
    assert list(rows) == CHAT[:1]
    assert counts(report) == (1, 1, 1, 2)
