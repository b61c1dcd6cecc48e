"""Data that a stage wrote: named by content, read by its splits, a parent, ordered by the runner."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import write_toy_model

from trueup.app.runner import order, read_folder
from trueup.base.data import DataArguments, data_fingerprint, data_parents, load_data
from trueup.recipes.directory import RECORD, identity, open_directory, write_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.run import open_run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def talk(number: int) -> dict[str, Any]:
    """A row of pairs."""
    return {
        "prompt": [{"role": "user", "content": f"what is {number}?"}],
        "chosen": [{"role": "assistant", "content": f"it is {number}"}],
        "rejected": [{"role": "assistant", "content": "who knows"}],
        "score_chosen": 1.0,
    }


def write_set(path: Path, sizes: dict[str, int], record: bool = True) -> Path:
    """A directory as the pairs stage leaves it: rows by split, a card, a record."""
    path.mkdir()
    first = 0
    for split, size in sizes.items():
        rows = [talk(number) for number in range(first, first + size)]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        first += size
    (path / "card.json").write_text('{"pairs": 3}')
    (path / "card.md").write_text("# Pairs")
    if record:
        write_json(path / RECORD, {"stage": "pairs", "identity": identity(path), "parents": {}})
    return path


def test_it_is_named_by_its_rows_alone(tmp_path: Path) -> None:
    first = write_set(tmp_path / "a", {"train": 3, "test": 1})
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    (copy / "card.md").write_text("another")
    assert open_directory(copy, "data").identity == identity(first) == open_directory(copy).identity
    shutil.move(copy / "test.jsonl", copy / "validation.jsonl")
    assert identity(copy) != identity(first)
    (first / "train.jsonl").write_text("{}\n")
    with pytest.raises(TrueupError, match="changed after it was written"):
        open_directory(first, "data")


def test_a_model_is_no_data_and_data_no_model(tmp_path: Path) -> None:
    rows, model = write_set(tmp_path / "rows", {"train": 1}), write_toy_model(tmp_path / "model")
    with pytest.raises(UsageError, match="rows: is a data set, and this needs a language model; name the"):
        open_directory(rows, "causal-lm")
    with pytest.raises(UsageError, match="is a data set, and this needs a reward model"):
        open_directory(rows, "reward")
    with pytest.raises(UsageError, match="model: is a language model, and this needs a data set"):
        open_directory(model, "data")
    (model / "config.json").write_text("{}")  # says nothing of what it is: a model all the same
    with pytest.raises(UsageError, match="model: is a model, and this needs a data set"):
        open_directory(model, "data")
    assert open_directory(model, "causal-lm").path == model


def test_it_is_read_by_its_own_splits_without_its_card(tmp_path: Path) -> None:
    path = write_set(tmp_path / "rows", {"train": 30, "validation": 4, "test": 5})
    args = DataArguments(dataset_name=str(path))
    for split, size in (("train", 30), ("validation", 4), ("test", 5)):
        rows: Any = load_data(args, split, "preference")  # type: ignore[arg-type]
        assert len(rows) == size
        assert data_fingerprint(args, split)["files"] == 1  # type: ignore[arg-type]
    assert rows[0] == talk(34)
    without = DataArguments(dataset_name=str(write_set(tmp_path / "one", {"train": 60})))
    parts = [len(load_data(without, s, "preference")) for s in ("train", "validation", "test")]  # type: ignore
    assert sum(parts) == 60
    assert min(parts) > 0


def test_only_what_a_stage_wrote_is_a_parent(tmp_path: Path) -> None:
    made, found = write_set(tmp_path / "a", {"train": 1}), write_set(tmp_path / "b", {"train": 1}, False)
    assert data_parents(DataArguments(dataset_name=str(found))) == {}
    assert data_parents(DataArguments(dataset_name="lab/prompts")) == {}
    assert data_parents(DataArguments(dataset_name=str(made))) == {"dataset_name": (str(made), "data")}
    mixture = [{"path": str(found)}, {"path": str(made), "weight": 0.5}]
    assert data_parents(DataArguments(datasets=mixture)) == {"datasets[1]": (str(made), "data")}


def test_a_run_names_the_data_by_content(tmp_path: Path, recipe: Callable[..., Any]) -> None:
    path = write_set(tmp_path / "rows", {"train": 3})
    run, _ = open_run(recipe(dataset_name=str(path)))
    assert run.parents["dataset_name"].lineage["identity"] == identity(path)
    assert run.parents["dataset_name"].lineage["stage"] == "pairs"
    before = run.inputs
    shutil.rmtree(path)
    write_set(path, {"train": 4})
    assert open_run(recipe(dataset_name=str(path)))[0].inputs != before
    model = write_toy_model(tmp_path / "toy")
    write_json(model / RECORD, {"identity": identity(model)})
    with pytest.raises(UsageError, match=r"out\.yaml:1: dataset_name: .*toy: is a language model, and this"):
        open_run(recipe(dataset_name=str(model)))


def test_what_reads_the_data_comes_after_what_writes_it(tmp_path: Path, base: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    keys = f"stage: sft\nmodel_name_or_path: {base}\n"
    (folder / "a.yaml").write_text(f"{keys}output_dir: runs/a\ndataset_name: runs/b\n")
    (folder / "b.yaml").write_text(f"{keys}output_dir: runs/b\ndatasets: [{{path: runs/c}}]\n")
    (folder / "c.yaml").write_text(f"{keys}output_dir: runs/c\ndataset_name: lab/chat\n")
    assert [one.source.name for one in order(read_folder(folder, None)) if one.source] == [
        "c.yaml",
        "b.yaml",
        "a.yaml",
    ]
