"""Every data set of the test folder through the loader: row counts, layouts, splits."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from trueup.base.data import DataArguments, data_fingerprint, load_data
from trueup.base.data_rows import DataReport
from trueup.recipes.errors import TrueupError

DATA = Path(os.environ.get("TRUEUP_DATA", Path(__file__).resolve().parent.parent.parent / "shared" / "data"))

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no test data at {DATA} (TRUEUP_DATA names the folder)"
)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def load(name: str, form: str, split: Any = "train", **keys: Any) -> tuple[Any, DataReport]:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in {DATA}")
    reports: list[DataReport] = []
    return load_data(DataArguments(dataset_name=str(DATA / name), **keys), split, form, reports), reports[0]


EDITIONS = "dedup/editions_paragraphs_dev.jsonl.gz"
WHOLE = {"validation_split_size": 0.0, "test_split_size": 0.0}

# file, form, rows read, rows given, layout
SETS = [
    ("pretrain/classics_children_dev.jsonl.gz", "text", 41, 41, "text"),
    ("pretrain/gutenberg_children.jsonl.gz", "text", 4, 4, "text"),
    ("pretrain/tinyshakespeare.txt", "text", 1, 1, "text"),
    ("pretrain/wikitext2_valid.txt", "text", 1, 1, "text"),
    ("pretrain/tinystories_train_head_625.jsonl", "text", 625, 625, "text"),
    ("pretrain/c4_demo.jsonl", "text", 300, 300, "text"),
    ("dedup/editions_chapters.jsonl.gz", "text", 164, 164, "text"),
    (EDITIONS, "text", 1683, 1683, "text"),
    ("sft/rasbt_instruction_data.jsonl", "messages", 1100, 1100, "Alpaca"),
    ("sft/dolly_hhrlhf_small.jsonl", "prompt_completion", 1000, 1000, "responses"),
    ("sft/gsm8k_train.jsonl", "prompt", 7473, 7473, "questions and answers"),
    ("sft/self_instruct_seed_tasks.jsonl", "messages", 175, 175, "self-instruct"),
    ("preference/hh_harmless_dev.jsonl.gz", "preference", 1729, 1727, "pairs of dialogues"),
    ("preference/rasbt_instruction_with_preference.jsonl", "preference", 1100, 1094, "Alpaca pairs"),
    ("preference/rasbt_instruction_with_preference.jsonl", "unpaired_preference", 1100, 2188, "Alpaca pairs"),
    ("preference/rasbt_instruction_with_preference.jsonl", "messages", 1100, 1100, "Alpaca"),
    ("preference/llamafactory_dpo_en_demo.jsonl", "preference", 300, 300, "ShareGPT pairs"),
    ("preference/llamafactory_kto_en_demo.jsonl", "unpaired_preference", 300, 300, "rated messages"),
]


@pytest.mark.parametrize(("name", "form", "read", "given", "layout"), SETS)
def test_sets(name: str, form: str, read: int, given: int, layout: str) -> None:
    rows, report = load(name, form, skip_bad_rows=True, **WHOLE)
    assert (report.read, report.rows, len(rows)) == (read, given, given)
    assert list(report.layouts) == [layout]


@pytest.mark.parametrize(("name", "form"), [row[:2] for row in SETS])
def test_sets_stream_the_same_rows(name: str, form: str) -> None:
    stored, _ = load(name, form, skip_bad_rows=True)
    streamed, _ = load(name, form, skip_bad_rows=True, dataset_streaming=True)
    assert all(one == other for one, other in zip(stored, streamed, strict=True))


@pytest.mark.parametrize("name", ["pretrain/tinyshakespeare.txt", "pretrain/gutenberg_children.jsonl.gz"])
def test_few_long_documents_still_give_every_split_its_share(name: str) -> None:
    sizes = {}
    for split in ("train", "validation", "test"):
        rows, _ = load(name, "text", split)
        sizes[split] = sum(len(row["text"]) for row in rows)
    whole, _ = load(name, "text", **WHOLE)
    assert sum(sizes.values()) == sum(len(row["text"]) for row in whole)
    assert all(0.01 < sizes[split] / sum(sizes.values()) < 0.12 for split in ("validation", "test"))


def test_a_prompt_falls_into_one_split_in_the_sft_and_the_preference_file() -> None:
    prompts: dict[str, dict[str, set[str]]] = {}
    for name in ("sft/rasbt_instruction_data.jsonl", "preference/rasbt_instruction_with_preference.jsonl"):
        prompts[name] = {
            split: {row["prompt"][0]["content"] for row in load(name, "prompt", split)[0]}
            for split in ("train", "validation", "test")
        }
    one, other = prompts.values()
    assert one == other
    assert sum(map(len, one.values())) == 1075
    assert not one["train"] & (one["validation"] | one["test"])


def test_bad_rows_of_hh_are_named() -> None:
    """Two chosen answers are empty: silence was preferred to an unsafe answer."""
    with pytest.raises(
        TrueupError, match=r"hh_harmless_dev\.jsonl\.gz:67: 'chosen' has an empty turn"
    ) as caught:
        load("preference/hh_harmless_dev.jsonl.gz", "preference")
    assert ".jsonl.gz:826:" in str(caught.value)
    _, report = load("preference/hh_harmless_dev.jsonl.gz", "preference", skip_bad_rows=True, **WHOLE)
    assert [count for count, _ in report.skipped.values()] == [2]


def test_hh_dialogues_alternate() -> None:
    rows, _ = load("preference/hh_harmless_dev.jsonl.gz", "preference", skip_bad_rows=True, **WHOLE)
    for row in rows:
        for dialogue in (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]):
            roles = [turn["role"] for turn in dialogue]
            assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
            assert roles[-1] == "assistant"


def test_the_equal_pairs_are_counted() -> None:
    _, report = load("preference/rasbt_instruction_with_preference.jsonl", "preference", **WHOLE)
    count, first = report.skipped["chosen and rejected are equal"]
    assert (count, first.rsplit(":", 1)[1]) == (6, "123")


def test_dollys_page_is_unwrapped() -> None:
    rows, _ = load("sft/dolly_hhrlhf_small.jsonl", "prompt_completion", **WHOLE)
    assert rows[0]["prompt"] == [{"role": "user", "content": "what is kangen water?"}]
    assert not any("### " in row["prompt"][0]["content"] for row in rows)


def test_answers_stay_beside_prompts_for_the_scorers() -> None:
    rows, _ = load("sft/gsm8k_train.jsonl", "prompt", **WHOLE)
    assert rows[0]["answer"].endswith("#### 72")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("eval/lmeval_arc_easy.jsonl", "messages"),
        ("eval/lmeval_piqa.jsonl", "text"),
        ("eval/raw_copa.jsonl", "prompt"),
        ("eval/blimp", "preference"),
        ("dedup/editions_chapters.gold.jsonl", "text"),
        ("dedup/editions_paragraphs_dev.gold.jsonl", "text"),
        ("preference/llamafactory_kto_en_demo.jsonl", "messages"),
    ],
)
def test_what_is_no_training_data_is_refused_by_its_columns(name: str, form: str) -> None:
    with pytest.raises(TrueupError, match=rf"its columns \(.*\) cannot be read as {form}"):
        load(name, form)


def test_fingerprints_tell_the_sets_apart() -> None:
    names = [DATA / name for name in dict.fromkeys(row[0] for row in SETS) if (DATA / name).exists()]
    prints = [data_fingerprint(DataArguments(dataset_name=str(name)), "train") for name in names]
    assert len({one["sha256"] for one in prints}) == len(names)
    assert [one["bytes"] for one in prints] == [name.stat().st_size for name in names]
