"""The loader: every source and kind of file, splits, fingerprints, streams, and each way data can be
broken.
"""

import csv
import dataclasses
import gzip
import json
import multiprocessing
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from trueup.base import data_files
from trueup.base.data import DataArguments, data_fingerprint, load_data
from trueup.base.data_rows import DataReport
from trueup.base.data_splits import prompt_key, split_of, split_text, unit_hash
from trueup.recipes.errors import TrueupError, UsageError

FROZEN = {
    "What is 2+2?": 0.3234164338300741,
    "Why is the sky blue?": 0.03872909983625916,
    "Convert 45 kilometers to meters.": 0.2165282312877369,
    "": 0.8894159948913373,
}
FROZEN_SPLITS = ["train", "test", "test", "validation"]

WHOLE = {"validation_split_size": 0.0, "test_split_size": 0.0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, Any], str]:
    """Writes a file from its text, bytes or rows (JSON lines) and gives its name."""

    def write(name: str, content: str | bytes | list[dict[str, Any]]) -> str:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def load(
    name: str, form: str = "text", split: Any = "train", **keys: Any
) -> tuple[list[dict[str, Any]], DataReport]:
    reports: list[DataReport] = []
    rows = load_data(DataArguments(dataset_name=name, **keys), split, form, reports)
    return list(rows), reports[0]


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


ROWS = [{"text": f'Document {n}, "quoted", ünïcode.\nSecond line.', "id": n} for n in range(30)]


# ---------------------------------------------------------------------------------------------- kinds of file


def as_csv(path: Path, rows: list[dict[str, Any]]) -> bytes:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path.read_bytes()


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path.read_bytes()


def encoded(kind: str, path: Path) -> bytes:
    if kind == ".csv":
        return as_csv(path, ROWS)
    if kind == ".parquet":
        return as_parquet(path, ROWS)
    if kind == ".json":
        return json.dumps(ROWS, indent=1).encode()
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_kinds_of_file_hold_the_same_rows(
    kind: str, compression: str, tmp_path: Path, put: Callable[[str, Any], str]
) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[compression]
    name = put(f"rows{kind}{compression}", pack(encoded(kind, tmp_path / "draft")))
    rows, report = load(name, **WHOLE)
    assert texts(rows) == texts(ROWS)
    assert [int(row["id"]) for row in rows] == [row["id"] for row in ROWS]
    assert (report.read, report.rows) == (30, 30)


def test_archives_of_several_members_are_read_to_the_end(put: Callable[[str, Any], str]) -> None:
    halves = [b'{"text": "one"}\n', b'{"text": "two"}\n']
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        rows, _ = load(put(f"two.jsonl{suffix}", b"".join(map(pack, halves))), **WHOLE)
        assert texts(rows) == ["one", "two"]


def test_a_text_file_is_one_document(put: Callable[[str, Any], str]) -> None:
    rows, report = load(put("a.txt", "One.\r\n\r\nTwo.\r\n"), **WHOLE)
    assert texts(rows) == ["One.\n\nTwo.\n"]
    assert "CRLF line ends became LF" in str(report)


def test_text_files_are_cut_at_end_of_text_marks(put: Callable[[str, Any], str]) -> None:
    rows, _ = load(put("a.txt", "One.\n<|endoftext|>\nTwo.<|endoftext|>Three.\n<|endoftext|>\n"), **WHOLE)
    assert texts(rows) == ["One.\n", "Two.", "Three.\n"]


def test_an_endless_text_is_read_in_pieces(
    put: Callable[[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "PIECE", 100)
    text = "".join(f"line {n}\n" for n in range(100))
    rows, _ = load(put("a.txt", text), **WHOLE)
    assert "".join(texts(rows)) == text
    assert all(100 <= len(piece) < 110 for piece in texts(rows)[:-1])


def test_folders_are_read_whole_and_sorted_whatever_they_mix(put: Callable[[str, Any], str]) -> None:
    put("set/b.jsonl", [{"text": "b"}])
    put("set/a.txt", "a")
    put("set/sub/c.md", "c")
    put("set/README.md", "# About")
    put("set/.hidden.txt", "no")
    put("set/picture.png", b"\x89PNG")
    folder = Path(put("set/empty.jsonl", "")).parent
    rows, report = load(str(folder), **WHOLE)
    assert texts(rows) == ["a", "b", "c"]
    assert "3 files are not data (.hidden.txt, ...)" in str(report)
    assert "empty.jsonl: it holds no rows" in str(report)
    assert texts(load(f"{folder}/*.[jt]*", **WHOLE)[0]) == ["a", "b"]


def test_another_text_column_is_handed_on_as_text(put: Callable[[str, Any], str]) -> None:
    name = put("a.jsonl", [{"content": "x", "text": "not this"}])
    assert load(name, dataset_text_field="content", **WHOLE)[0] == [{"text": "x"}]


# -------------------------------------------------------------------------------------------------- broken da

GOOD = '{"text": "fine"}\n'
BROKEN: dict[str, tuple[str, bytes, str, str]] = {
    "bad JSON": (
        "a.jsonl",
        (GOOD + '{"text": "cut\n').encode(),
        r"a\.jsonl:2: not JSON \(Invalid control character",
        "text",
    ),
    "bad JSON in a list": ("a.json", b'[{"text": "x"},\n {"text": }]', r"a\.json:2: not JSON", "text"),
    "not an object": (
        "a.jsonl",
        (GOOD + "[1]\n").encode(),
        r"a\.jsonl:2: not a JSON object \(it is a list\)",
        "text",
    ),
    "not UTF-8": (
        "a.jsonl",
        GOOD.encode() + b'{"text": "caf\xe9"}\n',
        r"a\.jsonl:2: not UTF-8 \(byte 30 is 0xe9\)",
        "text",
    ),
    "not UTF-8 text": ("a.txt", b"one\ncaf\xe9\n", r"a\.txt:1: not UTF-8 \(byte 7 is 0xe9\)", "text"),
    "not UTF-8 CSV": ("a.csv", b"text\nfine\ncaf\xe9\n", r"a\.csv:3: not UTF-8 \(byte 13 is 0xe9\)", "text"),
    "UTF-16": (
        "a.jsonl",
        GOOD.encode("utf-16"),
        r"a\.jsonl:1: not UTF-8 .*UTF-16: convert it with iconv",
        "text",
    ),
    "half a character": ("a.jsonl", b'{"text": "\\ud83d"}\n', r"a\.jsonl:1: half a character", "text"),
    "empty text": (
        "a.jsonl",
        (GOOD + '{"text": ""}\n').encode(),
        r"a\.jsonl:2: field 'text' is empty",
        "text",
    ),
    "null text": (
        "a.jsonl",
        (GOOD + '{"text": null}\n').encode(),
        r"a\.jsonl:2: field 'text' is null",
        "text",
    ),
    "number": ("a.jsonl", (GOOD + '{"text": 3}\n').encode(), r"a\.jsonl:2: field 'text' is a number", "text"),
    "no text": (
        "a.jsonl",
        (GOOD + '{"id": 3}\n').encode(),
        r"a\.jsonl:2: field 'text' is missing \(it has id\)",
        "text",
    ),
    "empty file": ("a.txt", b"", r"a\.txt:1: the file is empty", "text"),
    "short line": (
        "a.csv",
        b"text,id\nfine,1\nshort\n",
        r"a\.csv:3: not as many cells as columns \(1 cells, 2",
        "text",
    ),
    "bad CSV": ("a.csv", b'text\n"a" b\nfine\n', r"a\.csv:2: not CSV", "text"),
    "chosen missing": (
        "a.jsonl",
        b'{"prompt": "a", "rejected": "c"}\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        r"a\.jsonl:1: field 'chosen' is missing \(it has prompt, rejected\)",
        "preference",
    ),
    "strings and chats": (
        "a.jsonl",
        b'{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "a"}]}\n',
        r"a\.jsonl:2: 'prompt' is of type conversation here, but string in the rows before",
        "prompt",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streaming"])
def test_a_bad_row_is_named_with_its_place_and_the_way_out(
    case: str, streaming: bool, put: Callable[[str, Any], str]
) -> None:
    name, content, message, form = BROKEN[case]
    with pytest.raises(TrueupError, match=message) as caught:
        load(put(name, content), form, dataset_streaming=streaming, **WHOLE)
    assert "skip_bad_rows: true" in str(caught.value)


@pytest.mark.parametrize(
    "case", sorted(BROKEN.keys() - {"bad JSON in a list", "not UTF-8 text", "empty file", "UTF-16"})
)
def test_bad_rows_are_skipped_and_counted_where_that_is_asked_for(
    case: str, put: Callable[[str, Any], str]
) -> None:
    name, content, _, form = BROKEN[case]
    path = put(name, content)
    if case == "half a character":
        put(name, content + GOOD.encode())
    rows, report = load(path, form, skip_bad_rows=True, **WHOLE)
    ((reason, (count, place)),) = report.skipped.items()
    assert (len(rows), report.read, count) == (1, 2, 1)
    assert f"left out: 1 x {reason} (first: {place})" in report.lines()[1]


def test_the_first_bad_rows_are_listed_together(put: Callable[[str, Any], str]) -> None:
    with pytest.raises(TrueupError) as caught:
        load(put("a.jsonl", [{"text": "ok"}] + [{"text": ""}] * 9))
    assert [line.split(":")[-2] for line in str(caught.value).splitlines()[1:-1]] == ["2", "3", "4", "5", "6"]


def test_rows_that_are_all_bad_leave_nothing(put: Callable[[str, Any], str]) -> None:
    with pytest.raises(TrueupError, match="all 2 rows were left out: 2 x field 'text' is empty"):
        load(put("a.jsonl", [{"text": ""}] * 2), skip_bad_rows=True)


@pytest.mark.parametrize("streaming", [False, True], ids=["on disk", "streaming"])
def test_zero_rows(streaming: bool, put: Callable[[str, Any], str]) -> None:
    with pytest.raises(TrueupError, match=r"a\.jsonl: nothing for split train: it holds no rows"):
        load(put("a.jsonl", "\n"), dataset_streaming=streaming)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_an_archive_cut_off_is_an_error_even_where_bad_rows_are_skipped(
    suffix: str, pack: Callable[[bytes], bytes], put: Callable[[str, Any], str]
) -> None:
    lines = "".join(json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(3000)).encode()
    with pytest.raises(TrueupError, match=r"damaged after row \d+: .*Fetch or write the file again"):
        load(put(f"a.jsonl{suffix}", pack(lines)[:-50]), skip_bad_rows=True, **WHOLE)
    with pytest.raises(TrueupError, match="damaged after row 0"):
        load(put(f"b.jsonl{suffix}", b"not an archive"), skip_bad_rows=True)


def test_a_parquet_that_is_none(put: Callable[[str, Any], str]) -> None:
    with pytest.raises(TrueupError, match=r"a\.parquet: damaged after row 0"):
        load(put("a.parquet", b"PAR1 but not really"))


def test_a_csv_without_a_readable_header(put: Callable[[str, Any], str]) -> None:
    for content, message in (
        (b"caf\xe9\nx\n", "its header is not UTF-8: byte 3"),
        (b'"a" b\nx\n', "not CSV"),
    ):
        with pytest.raises(TrueupError, match=rf"a\.csv: damaged after row 0: .*{message}"):
            load(put("a.csv", content), skip_bad_rows=True)


def test_a_byte_order_mark_is_passed_over_and_said(put: Callable[[str, Any], str]) -> None:
    rows, report = load(put("a.jsonl", b"\xef\xbb\xbf" + GOOD.encode()), **WHOLE)
    assert texts(rows) == ["fine"]
    assert "byte order mark" in str(report)


def test_equal_answers_are_left_out_and_counted(put: Callable[[str, Any], str]) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": "a", "rejected": "a" if n % 3 == 0 else "b"} for n in range(9)]
    rows, report = load(put("a.jsonl", pairs), "preference", **WHOLE)
    assert len(rows) == 6
    assert report.skipped["chosen and rejected are equal"][0] == 3
    assert report.skipped["chosen and rejected are equal"][1].endswith("a.jsonl:1")


def test_names_that_are_not_there(put: Callable[[str, Any], str], tmp_path: Path) -> None:
    name = put("stories.jsonl", [{"text": "x"}])
    for wrong, message in (
        (name.replace("stories", "storys"), r"no such file or folder; did you mean .*stories\.jsonl\?"),
        (str(tmp_path / "datta" / "x.jsonl"), r"there is no folder .*datta \(.* exists\)"),
        (str(tmp_path / "data" / "*.csv"), "no file matches this pattern"),
        (put("odd.xyz", "x"), r"unknown kind of file '\.xyz'\. Known kinds: \.txt"),
    ):
        with pytest.raises(UsageError, match=message):
            load(wrong)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match="no data file in this folder"):
        load(str(tmp_path / "nothing"))


def test_unknown_columns_name_the_file(put: Callable[[str, Any], str]) -> None:
    with pytest.raises(
        TrueupError, match=r"a\.jsonl: its columns \(prompt, choosen, rejected\).*Did you mean 'chosen'"
    ):
        load(put("a.jsonl", [{"prompt": "a", "choosen": "b", "rejected": "c"}]), "preference")


def test_a_cache_that_cannot_be_written(put: Callable[[str, Any], str], cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(TrueupError, match=r"the cache .* cannot be written: .*HF_DATASETS_CACHE"):
        load(put("a.jsonl", [{"text": "x"}]), **WHOLE)


def test_recipes_that_contradict_themselves(put: Callable[[str, Any], str]) -> None:
    name = put("a.jsonl", [{"text": "x"}])
    for keys, message in (
        ({}, "no data: set dataset_name"),
        ({"dataset_name": name, "datasets": [{"path": name}]}, "both set"),
        ({"dataset_name": name, "test_split_size": 5}, "test_split_size is 5: it is a share"),
        ({"dataset_name": name, "test_split_size": 0.5, "validation_split_size": 0.5}, "leave nothing"),
        (
            {"dataset_name": name, "dataset_config": "main"},
            r"a\.jsonl/main: no such folder \(from dataset_config",
        ),
        ({"dataset_name": name, "dataset_options": {"flip": 0.1}}, "dataset_options has flip"),
        ({"datasets": [{"pth": name}]}, "entry 1: it needs a path"),
        ({"datasets": [{"path": name, "colums": ["text"]}]}, "unknown key 'colums'. Did you mean 'columns'"),
        ({"datasets": [{"path": name, "weight": 2}]}, "weight is 2, not a share"),
        ({"datasets": [{"path": name, "columns": ["body"]}]}, "no column body; it has text"),
        ({"datasets": [{"path": name, "fraction": 0.5}, {"path": name}]}, "fraction must be set for all"),
    ):
        with pytest.raises(UsageError, match=message):
            load_data(DataArguments(**keys), "train", "text")


# -------------------------------------------------------------------------------------------------------- spl


def test_the_hash_is_for_ever() -> None:
    """These numbers must never change: a model's test prompts would become another's training prompts."""
    assert {prompt: unit_hash(prompt_key(prompt)) for prompt in FROZEN} == FROZEN
    assert [split_of(prompt, 0.3, 0.3) for prompt in FROZEN] == FROZEN_SPLITS


def test_spelling_and_format_do_not_move_a_prompt() -> None:
    key = prompt_key("Caf\u00e9 au lait?")
    assert prompt_key("  Cafe\u0301 au\n lait? ") == key
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Caf\u00e9 au lait?"}]
    assert prompt_key(turns) == key
    longer = [*turns, {"role": "assistant", "content": "Oui."}, {"role": "user", "content": "Why?"}]
    assert prompt_key(longer) == key


@given(
    st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0, 0.4)
)
def test_one_splits_size_never_moves_a_prompt_into_or_out_of_the_other(
    prompt: str, validation: float, test: float, other: float
) -> None:
    assert (split_of(prompt, validation, test) == "test") == (split_of(prompt, other, test) == "test")
    is_validation = split_of(prompt, validation, test) == "validation"
    assert is_validation == (split_of(prompt, validation, other) == "validation")


def test_long_documents_are_split_by_sections_and_nothing_is_lost() -> None:
    text = "".join(f"Paragraph {n} of the book.\n{'More of it. ' * (n % 40)}\n\n" for n in range(3000))
    pieces = list(split_text(text, 0.2, 0.2))
    assert "".join(piece for _, piece in pieces) == text
    size = {split: sum(len(piece) for part, piece in pieces if part == split) for split, _ in pieces}
    assert 0.1 < size["validation"] / len(text) < 0.3
    assert 0.1 < size["test"] / len(text) < 0.3
    assert all(piece.startswith("Paragraph") for _, piece in pieces)
    unbroken = "x" * 200_000
    assert "".join(piece for _, piece in split_text(unbroken, 0.2, 0.2)) == unbroken
    assert next(iter(split_text("A short one.\n\nWhole.", 0.2, 0.2)))[1] == "A short one.\n\nWhole."


@pytest.mark.parametrize("form", ["prompt_completion", "unpaired_preference"])
def test_the_three_splits_are_the_set(form: str, put: Callable[[str, Any], str]) -> None:
    pairs = [{"prompt": f"Question {n % 150}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(200)]
    name = put("a.jsonl", pairs)
    parts = [load(name, form, split, validation_split_size=0.2, test_split_size=0.1) for split in SPLITS]
    completions = [row["completion"] for rows, _ in parts for row in rows if row["completion"] != "no"]
    assert sorted(completions) == sorted(pair["chosen"] for pair in pairs)
    prompts = [{row["prompt"] for row in rows} for rows, _ in parts]
    assert not (prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2])
    assert {report.split: len(rows) for rows, report in parts} == parts[0][1].splits


SPLITS = ("train", "validation", "test")


def test_a_split_that_gets_nothing_says_why(put: Callable[[str, Any], str]) -> None:
    name = put("a.jsonl", [{"text": "only one"}])
    with pytest.raises(
        TrueupError, match=r"by prompt hash, 1 in train: too few .* Raise validation_split_size"
    ):
        load(name, split="validation")
    with pytest.raises(UsageError, match="no split 'test', and test_split_size is 0"):
        load(name, split="test", **WHOLE)


def test_a_set_with_splits_of_its_own_keeps_them(put: Callable[[str, Any], str]) -> None:
    put("set/train.jsonl", [{"text": f"t{n}"} for n in range(50)])
    put("set/more.jsonl", [{"text": f"m{n}"} for n in range(50)])
    folder = str(Path(put("set/stories-valid.jsonl", [{"text": f"v{n}"} for n in range(9)])).parent)
    validation, _ = load(folder, split="validation")
    assert texts(validation) == [f"v{n}" for n in range(9)]
    train, report = load(folder)
    test, _ = load(folder, split="test")
    assert sorted(texts(train) + texts(test)) == sorted(
        [f"t{n}" for n in range(50)] + [f"m{n}" for n in range(50)]
    )
    assert test
    assert "1 files are of split validation (stories-valid.jsonl)" in str(report)


def test_shards_of_a_hub_copy_are_splits_by_their_exact_names(
    put: Callable[[str, Any], str], tmp_path: Path
) -> None:
    for split in ("train_sft", "train_gen", "test_sft"):
        table = as_parquet(tmp_path / "draft", [{"text": split}])
        put(f"copy/data/{split}-00000-of-00001.parquet", table)
    keys = {
        "dataset_train_split": "train_sft",
        "dataset_test_split": "test_sft",
        "validation_split_size": 0.0,
    }
    name = str(tmp_path / "data" / "copy")
    assert texts(load(name, **keys)[0]) == ["train_sft"]
    assert texts(load(name, split="test", **keys)[0]) == ["test_sft"]
    with pytest.raises(UsageError, match="has no split 'train', but: test_sft, train_gen, train_sft"):
        load(name)


def test_data_files_name_splits(put: Callable[[str, Any], str]) -> None:
    files = {split: put(f"{split}_part.jsonl", [{"text": split}]) for split in SPLITS}
    for split in SPLITS:
        assert texts(load("json", split=split, dataset_options={"data_files": files})[0]) == [split]


# --------------------------------------------------------------------------------------- streams, cache, work


def test_a_stream_gives_the_same_rows(put: Callable[[str, Any], str]) -> None:
    rows = [
        {"question": f"q{n}", "answer": f"a{n}", "truth": {"n": n} if n % 2 else [n], "id": n}
        for n in range(99)
    ]
    folder = str(Path(put("set/a.jsonl", rows[:50])).parent)
    put("set/b.jsonl.gz", gzip.compress("".join(json.dumps(row) + "\n" for row in rows[50:]).encode()))
    streamed, _ = load(folder, "messages", dataset_streaming=True)
    stored, report = load(folder, "messages")
    assert streamed == stored
    assert report.rows == len(stored)


def test_a_streams_report_grows_and_it_deals_out_its_files(put: Callable[[str, Any], str]) -> None:
    folder = str(Path(put("set/a.jsonl", ROWS)).parent)
    put("set/b.jsonl", ROWS)
    reports: list[DataReport] = []
    args = DataArguments(dataset_name=folder, dataset_streaming=True, **WHOLE)
    rows = load_data(args, "train", "text", reports)
    assert isinstance(rows, datasets.IterableDataset)
    assert (rows.num_shards, reports[0].read) == (2, 0)
    assert sum(1 for _ in rows) == reports[0].rows == 60


def test_columns_that_come_late_or_change_their_type(
    put: Callable[[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueup.base.data_rows.BATCH", 10)
    rows: list[dict[str, Any]] = [{"text": "x", "n": 1, "truth": {"a": 1}, "tag": None} for _ in range(25)]
    rows += [
        {"text": "y", "n": 0.5, "truth": "1", "tag": "t", "late": True},
        {"text": "z", "truth": [1, "2"]},
    ]
    stored, report = load(put("a.jsonl", rows), **WHOLE)
    assert [row["truth"] for row in stored] == [row["truth"] for row in rows]
    assert [row["late"] for row in stored] == [None] * 25 + [True, None]
    assert [row["tag"] for row in stored] == [None] * 25 + ["t", None]
    assert [row["n"] for row in stored] == [1.0] * 25 + [0.5, None]
    assert report.rows == len(rows)  # counted once, though read twice


def test_the_cache_is_used_again_with_its_report(
    put: Callable[[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = put("a.jsonl", [*ROWS, {"text": ""}])
    first = load(name, skip_bad_rows=True)
    monkeypatch.setattr("trueup.base.data_rows._build", None)
    assert load(name, skip_bad_rows=True) == first
    # Another form, or the same file changed, is not what the cache holds.
    put("a.jsonl", [*ROWS, {"text": "new"}])
    with pytest.raises(TypeError):
        load(name, skip_bad_rows=True)


def _load_in_process(name: str, cache: str, queue: Any) -> None:
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    queue.put(len(load(name, **WHOLE)[0]))


def test_processes_that_start_together_build_once(put: Callable[[str, Any], str], cache: Path) -> None:
    name = put("a.jsonl", ROWS * 200)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_load_in_process, args=(name, str(cache), queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    assert [queue.get(timeout=60) for _ in ranks] == [6000] * 3
    for rank in ranks:
        rank.join()
    built = [path.name for path in (cache / "trueup").iterdir() if path.suffix != ".lock"]
    assert len(built) == 1


def test_an_interrupted_build_leaves_no_cache(
    put: Callable[[str, Any], str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = put("a.jsonl", ROWS)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trueup.base.data_rows.os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            load(name, **WHOLE)
    assert [path for path in (cache / "trueup").iterdir() if path.suffix != ".lock"] == []
    assert len(load(name, **WHOLE)[0]) == 30


# -------------------------------------------------------------------------------------------------- fingerpri


def test_the_fingerprint_is_of_the_content(put: Callable[[str, Any], str], tmp_path: Path) -> None:
    name = put("a/x.jsonl", ROWS)
    one = data_fingerprint(DataArguments(dataset_name=name), "train")
    assert json.loads(json.dumps(one)) == one
    assert one["shares"] == {"validation": 0.05, "test": 0.05}
    os.utime(name, (1, 1))
    shutil.copytree(tmp_path / "data" / "a", tmp_path / "elsewhere")
    os.rename(tmp_path / "elsewhere" / "x.jsonl", tmp_path / "elsewhere" / "y.jsonl")
    assert data_fingerprint(DataArguments(dataset_name=name), "train") == one
    copy = data_fingerprint(DataArguments(dataset_name=str(tmp_path / "elsewhere")), "train")
    assert copy["sha256"] == one["sha256"]
    put("a/x.jsonl", [*ROWS[:-1], ROWS[-1] | {"id": 31}])
    assert data_fingerprint(DataArguments(dataset_name=name), "train")["sha256"] != one["sha256"]


# ------------------------------------------------------------------------------------------------------ mixtu


def mixture(*entries: dict[str, Any], form: str = "text", **keys: Any) -> list[dict[str, Any]]:
    return list(load_data(DataArguments(datasets=list(entries), **WHOLE, **keys), "train", form))


def test_mixtures(put: Callable[[str, Any], str]) -> None:
    a = put("a.jsonl", [{"text": f"a{n}", "id": n} for n in range(100)])
    b = put("b.jsonl", [{"text": f"b{n}", "id": str(n)} for n in range(20)])
    with pytest.raises(TrueupError, match=r"'id' is of type integer in .*a\.jsonl, but string in .*b\.jsonl"):
        mixture({"path": a}, {"path": b})
    only = {"columns": ["text"]}
    assert len(mixture({"path": a, **only}, {"path": b, **only})) == 120
    assert len(mixture({"path": a, **only}, {"path": b, **only}, dataset_streaming=True)) == 120
    # TRL's fraction: as many rows as shares of one half allow.
    halves = texts(mixture({"path": a, **only, "fraction": 0.5}, {"path": b, **only, "fraction": 0.5}))
    assert halves == [f"a{n}" for n in range(20)] + [f"b{n}" for n in range(20)]
    with pytest.raises(UsageError, match="fraction needs the sets' sizes"):
        mixture({"path": a, "fraction": 1}, {"path": a, "fraction": 1}, dataset_streaming=True)
    # alignment-handbook's weight: a share of the set's rows, nested as it grows.
    some, more = (set(texts(mixture({"path": a, "weight": weight}))) for weight in (0.3, 0.6))
    assert some < more
    assert 20 < len(some) < 40 < len(more) < 75
    args = DataArguments(datasets=[{"path": a, "weight": 0.3}, {"path": b}])
    assert data_fingerprint(args, "train")["name"] == f"{a} + {b}"


def test_strings_and_chats_do_not_mix(put: Callable[[str, Any], str]) -> None:
    a = put("a.jsonl", [{"prompt": "x"}])
    b = put("b.jsonl", [{"question": "x", "answer": "y"}])
    for streaming in (False, True):
        with pytest.raises(TrueupError, match=r"'prompt' is of type string in .* but conversation in"):
            mixture({"path": a}, {"path": b}, form="prompt", dataset_streaming=streaming)


# ------------------------------------------------------------------------------------------- the lab and the


@pytest.fixture
def toy_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    lab: Any = types.ModuleType("trueup.recipes.lab.datasets")
    lab.NAMES = ("lab/text", "lab/chat")

    def rows(name: str, split: str, seed: int = 0) -> Iterator[dict[str, Any]]:
        for n in range(5):
            yield {"prompt": f"{split} {n} {seed}?", "completion": "yes", "truth": {"answer": n}}

    lab.rows = rows
    lab.fingerprint = lambda name, split, seed=0: f"{name}/{split}/{seed}"
    monkeypatch.setitem(sys.modules, "trueup.recipes.lab.datasets", lab)
    monkeypatch.setattr("trueup.recipes.lab.datasets", lab, raising=False)


@pytest.mark.usefixtures("toy_lab")
def test_the_labs_sets_have_their_own_splits_and_pass_the_truth_on() -> None:
    rows, report = load("lab/chat", "prompt", "validation", dataset_options={"seed": 3})
    assert rows[1] == {"prompt": "validation 1 3?", "truth": {"answer": 1}}
    assert report.splits == {"validation": 5}
    args = DataArguments(dataset_name="lab/chat", dataset_options={"seed": 3})
    assert data_fingerprint(args, "test") == {
        "name": "lab/chat",
        "split": "test",
        "sha256": "lab/chat/test/3",
    }
    with pytest.raises(UsageError, match=r"no such set, but: lab/text, lab/chat\. Did you mean lab/chat"):
        load("lab/chta", "prompt")


class ToyHub:
    """The two functions of `datasets` that reach the Hub."""

    def __init__(self, splits: dict[str, list[dict[str, Any]]]) -> None:
        self.splits = splits
        self.asked: list[dict[str, Any]] = []

    def load_dataset_builder(self, path: str, **_: Any) -> Any:
        info = types.SimpleNamespace(splits=dict.fromkeys(self.splits))
        return types.SimpleNamespace(info=info, hash="c0ffee")

    def load_dataset(self, path: str, split: str, **keys: Any) -> Any:
        self.asked.append({"path": path, "split": split, **keys})
        return datasets.Dataset.from_list(self.splits[split])


def test_a_hub_set(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = ToyHub(
        {
            "train_sft": [{"messages": CHAT, "prompt": f"{n}"} for n in range(4)],
            "test_sft": [{"messages": CHAT[:1]}],
        }
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    keys = {
        "dataset_train_split": "train_sft",
        "dataset_test_split": "test_sft",
        "validation_split_size": 0.0,
    }
    rows, report = load("org/chats", "messages", dataset_config="default", **keys)
    assert rows == [{"messages": CHAT}] * 4
    assert hub.asked[0]["name"] == "default"
    assert "columns not used for messages: prompt" in str(report)
    with pytest.raises(TrueupError, match="org/chats test_sft row 1: the conversation does not end"):
        load("org/chats", "messages", "test", **keys)
    with pytest.raises(UsageError, match="has no split 'train', but: test_sft, train_sft"):
        load("org/chats", "messages")
    one = data_fingerprint(DataArguments(dataset_name="org/chats", **keys), "train")
    assert one["revision"] == "c0ffee"


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_the_hub_out_of_reach_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        TrueupError, match="org/no-such-set: not a file or folder here, and not loaded"
    ) as caught:
        load("org/no-such-set")
    assert "HF_HUB_OFFLINE is set" in str(caught.value)
    assert "hf download --repo-type dataset org/no-such-set --local-dir DIR" in str(caught.value)


# -------------------------------------------------------------------------------------------------- the recip


def test_the_keys_mean_the_same_beside_trls() -> None:
    """A stage's schema inherits DataArguments and a TRL config: a name in both must mean, and default to, one
    thing.
    """
    from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig

    ours = {field.name: field for field in dataclasses.fields(DataArguments)}
    shared = {
        field.name: (field.default, ours[field.name].default)
        for config in (SFTConfig, DPOConfig, RewardConfig, GRPOConfig, KTOConfig, RLOOConfig)
        for field in dataclasses.fields(config)
        if field.name in ours
    }
    assert shared == {"dataset_text_field": ("text", "text")}
    stage = dataclasses.make_dataclass("Stage", [], bases=(DataArguments, SFTConfig))
    assert stage(output_dir="x", use_cpu=True, bf16=False).dataset_text_field == "text"
    assert all(field.metadata["help"].endswith(".") for field in ours.values())
