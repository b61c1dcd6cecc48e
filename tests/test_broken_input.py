"""What a person gets wrong, end to end: one message with place and fix, the right exit code, no traceback."""

# ruff: noqa: E501  # a table reads best with a case to a line

import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import write_toy_model
from sft_models import write_base

from trueup.app.cli import main

PRETRAIN = {
    "stage": "pretrain", "output_dir": "runs/x/base", "dataset_name": "data.jsonl", "vocab_size": 300, "max_length": 16,
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_steps": 1, "max_eval_tokens": 100,
}  # fmt: skip
SFT = {
    "stage": "sft",
    "output_dir": "runs/x/sft",
    "model_name_or_path": "parent",
    "dataset_name": "lab/chat",
    "max_steps": 1,
}


def recipe(base: dict[str, object], extra: str = "", **keys: object) -> list[str]:
    """Write recipe.yaml and return the command that runs it."""
    merged = {**base, **keys}
    lines = [f"{key}: {json.dumps(value)}" for key, value in merged.items() if value is not ...]
    Path("recipe.yaml").write_text("\n".join([*lines, extra]) + "\n", encoding="utf-8")
    return [str(merged["stage"]), "--config", "recipe.yaml"]


def data(content: str | bytes, name: str = "data.jsonl") -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = lines(*({"text": f"A line of text, number {n}, long enough to be cut."} for n in range(60)))


def half_written() -> list[str]:
    write_toy_model(Path("parent"))
    Path("parent/model.safetensors").unlink()
    return recipe(SFT)


def cut_weights() -> list[str]:
    path = write_toy_model(Path("parent")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    return recipe(SFT)


def tampered() -> list[str]:
    write_toy_model(Path("parent"))
    Path("parent/trueup.json").write_text(
        '{"identity": "0123456789abcdef", "stage": "pretrain", "parents": {}}'
    )
    return recipe(SFT)


def wrong_parent() -> list[str]:
    write_toy_model(Path("parent"), architecture="GPTForSequenceClassification")
    return recipe(SFT)


def precious() -> list[str]:
    data("years of work", "runs/x/base/thesis.tex")
    data(GOOD)
    return recipe(PRETRAIN)


def blocked() -> list[str]:
    data("a file where a folder should be", "runs")
    data(GOOD)
    return recipe(PRETRAIN)


def cut_gzip() -> list[str]:
    return recipe(PRETRAIN, dataset_name=data(gzip.compress(GOOD.encode())[:-20], "cut.jsonl.gz"))


# name: (what makes it and returns the command, exit code, what the message must say)
CASES: dict[str, tuple[Callable[[], list[str]], int, list[str]]] = {
    # recipes
    "misspelt key": (
        lambda: recipe(PRETRAIN, "lerning_rate: 1e-3"), 2, ["recipe.yaml:11", "did you mean learning_rate?"],
    ),
    "wrong type": (lambda: recipe(PRETRAIN, seed="many"), 2, ["recipe.yaml:11: seed takes a whole number"]),
    "yes for true": (lambda: recipe(PRETRAIN, "torch_compile: yes"), 2, ["recipe.yaml:11", "only true and false"]),
    "retired key": (lambda: recipe(SFT, "max_prompt_length: 9"), 2, ["recipe.yaml:6", "retired", "max_length"]),
    "contradictory keys": (
        lambda: recipe(PRETRAIN, "num_train_epochs: 2"), 2, ["recipe.yaml:11: num_train_epochs and max_steps"],
    ),
    "duplicate key": (lambda: recipe(PRETRAIN, "max_steps: 2"), 2, ["recipe.yaml:11: max_steps stands twice", ":9"]),
    "missing recipe": (lambda: ["pretrain", "--config", "recipe.yml"], 2, ["recipe.yml: no such recipe"]),
    "not YAML": (lambda: recipe(PRETRAIN, "seed: [1"), 2, ["recipe.yaml:", "not valid YAML"]),
    "missing required key": (lambda: recipe(SFT, output_dir=...), 2, ["recipe.yaml: output_dir is missing"]),
    "unknown stage": (lambda: ["run", data("stage: stf\n", "r.yaml")], 2, ["r.yaml:1", "did you mean sft?"]),
    "unknown budget": (lambda: [*recipe(PRETRAIN), "--budget", "smok"], 2, ["no budget 'smok'"]),
    "unknown flag": (lambda: [*recipe(PRETRAIN), "--max_stepz", "3"], 2, ["--max_stepz", "did you mean max_steps?"]),
    "impossible shape": (
        lambda: recipe(PRETRAIN, num_attention_heads=3), 2, ["num_attention_heads", "does not divide"],
    ),
    # data
    "missing data file": (
        lambda: (data(GOOD, "date.jsonl"), recipe(PRETRAIN))[1], 2, ["recipe.yaml:3", "data.jsonl", "date.jsonl"],
    ),
    "bad JSON line": (
        lambda: (data(GOOD + '{"text": \n'), recipe(PRETRAIN))[1], 1, ["data.jsonl:61", "not JSON", "skip_bad_rows"],
    ),
    "empty text": (lambda: (data(GOOD + lines({"text": " "})), recipe(PRETRAIN))[1], 1, ["data.jsonl:61", "empty"]),
    "not UTF-8": (
        lambda: (data(GOOD.encode() + b'{"text": "caf\xe9"}\n'), recipe(PRETRAIN))[1], 1, ["data.jsonl:61", "UTF-8"],
    ),
    "unknown columns": (
        lambda: (data(lines({"txet": "a"})), recipe(PRETRAIN))[1], 1, ["data.jsonl", "txet", "text"],
    ),
    "no answers in chat data": (
        lambda: (write_base(Path("parent")), recipe(SFT, dataset_name=data(lines({"prompt": "Hi"}))))[1],
        1, ["data.jsonl", "prompt"],
    ),
    "zero rows": (lambda: (data(""), recipe(PRETRAIN))[1], 1, ["data.jsonl"]),
    "cut gzip": (cut_gzip, 1, ["cut.jsonl.gz", "damaged"]),
    "empty folder": (lambda: (Path("books").mkdir(), recipe(PRETRAIN, dataset_name="books"))[1], 2, ["books: no data"]),
    "unknown lab set": (lambda: recipe(PRETRAIN, dataset_name="lab/txt"), 2, ["recipe.yaml:3", "lab/txt", "lab/text"]),
    "unknown lab option": (
        lambda: recipe(PRETRAIN, dataset_name="lab/text", dataset_options={"documnts": 9}), 2, ["documnts", "documents"],
    ),
    "Hub id offline": (lambda: recipe(PRETRAIN, dataset_name="nobody/nothing"), 1, ["nobody/nothing", "local"]),
    # directories
    "missing parent": (lambda: recipe(SFT), 2, ["recipe.yaml:3: model_name_or_path: parent: no such model directory"]),
    "half-written parent": (half_written, 1, ["recipe.yaml:3", "parent", "incomplete"]),
    "cut weights": (cut_weights, 1, ["model.safetensors", "cut short"]),
    "tampered parent": (tampered, 1, ["parent: changed after it was written"]),
    "wrong parent": (wrong_parent, 2, ["parent: is a reward model", "needs a language model"]),
    "output not ours": (precious, 2, ["runs/x/base: exists and was not written by trueup"]),
    "output below a file": (blocked, 1, ["runs", "Not a directory"]),
}  # fmt: skip


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what was printed to stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(words)
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_broken_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, code, said = CASES[name]
    got, message = run(make(), capsys)
    assert message.startswith("trueup: ")
    assert message.count("trueup: ") == 1
    for part in said:
        assert part in message
    assert "Traceback" not in message
    assert "internal error" not in message
    assert got == code, message
    assert not list(tmp_path.rglob(".*.partial-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)], check=False
    ).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_and_then_room(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pretraining runs into a full disk: one message; with room again, the same command ends well."""
    monkeypatch.chdir(tmp_path)
    data(GOOD)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 50_000))
    words = recipe(PRETRAIN, output_dir=str(small_disk / "runs/base"))
    code, message = run(words, capsys)
    assert (code, "the disk is full" in message) == (1, True), message
    assert not (small_disk / "runs/base").exists()
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert run(words, capsys)[0] == 0
    assert (small_disk / "runs/base/trueup.json").exists()


def test_a_read_only_place(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data(GOOD)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, message = run(recipe(PRETRAIN, output_dir=str(small_disk / "runs/base")), capsys)
    assert code == 1
    assert "cannot be written" in message
