"""Model directories and runs: identity, atomicity, lineage, and what is said of broken ones."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import write_toy_model
from filelock import FileLock

from trueup.recipes.directory import (
    RECORD,
    atomic_directory,
    atomic_file,
    identity,
    open_directory,
    write_json,
    writing,
)
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import Entry, Recipe, read_recipe
from trueup.recipes.run import open_run

pytestmark = pytest.mark.usefixtures("toy_stage")


def toy_recipe(output: Path, **keys: Any) -> Recipe:
    entries = [Entry(key, value, f"--{key}") for key, value in {"output_dir": str(output), **keys}.items()]
    return read_recipe(None, stage="toy", flags=entries)


def train(output: Path, **keys: Any) -> Path:
    run, stage = open_run(toy_recipe(output, **keys))
    with run.working():
        stage.run(run)
    return output


# ---------------------------------------------------------------- identity


def test_identity_is_the_content_and_nothing_else(tmp_path: Path) -> None:
    first = write_toy_model(tmp_path / "a", 0.5)
    name = identity(first)
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    assert identity(copy) == name
    (copy / "eval").mkdir()
    (copy / "eval" / "arc.json").write_text("{}")  # a re-evaluation
    (copy / "generation_config.json").write_text("{}")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps({**config, "transformers_version": "6", "_name_or_path": "x"})
    )
    assert identity(copy) == name
    changes = {
        "config.json": json.dumps({**config, "hidden_size": 3}),
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "tokenizer_config.json": '{"eos_token": "x"}',
    }
    names = {name, identity(write_toy_model(tmp_path / "b", 0.25))}
    for file, text in changes.items():
        changed = Path(shutil.copytree(first, tmp_path / f"changed-{file}"))
        (changed / file).write_text(text)
        names.add(identity(changed))
    assert len(names) == 2 + len(changes)


def test_identity_does_not_depend_on_sharding(tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    one, two = write_toy_model(tmp_path / "one"), write_toy_model(tmp_path / "two")
    tensors = {"b": numpy.arange(6.0).reshape(2, 3), "a": numpy.ones(4, dtype="float16")}
    save_file(tensors, one / "model.safetensors")
    (two / "model.safetensors").unlink()
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, two / f"model-{number}.safetensors")
    assert identity(one) == identity(two)


def test_two_runs_of_one_recipe_have_one_identity(tmp_path: Path) -> None:
    first, second = train(tmp_path / "first"), train(tmp_path / "second")
    assert identity(first) == identity(second)
    assert identity(first) == json.loads((first / RECORD).read_text())["identity"]
    assert identity(train(tmp_path / "third", learning_rate=0.5)) != identity(first)


# ---------------------------------------------------------------- broken directories


def test_broken_directories_are_named(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"dpo\.yaml:3: .*nowhere: no such model directory; run the stage"):
        open_directory(tmp_path / "nowhere", place="dpo.yaml:3")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrueupError, match=r"half-written: config\.json is missing"):
        open_directory(tmp_path / "empty")
    (whole / "model.safetensors").rename(tmp_path / "kept")
    with pytest.raises(TrueupError, match=r"holds no \*\.safetensors"):
        open_directory(whole)
    (whole / "model.safetensors").write_bytes((tmp_path / "kept").read_bytes()[:-3])
    with pytest.raises(TrueupError, match="cut short"):
        open_directory(whole)
    (whole / "model.safetensors").write_bytes(b"")
    with pytest.raises(TrueupError, match="cut short"):
        open_directory(whole)
    write_toy_model(whole, 9.0)
    with pytest.raises(TrueupError, match="changed after it was written"):
        open_directory(whole)
    (whole / RECORD).write_text('{"identity": \n')
    with pytest.raises(TrueupError, match=r"trueup\.json:2: not JSON"):
        open_directory(whole)


def test_the_wrong_parent_is_refused_with_the_line(tmp_path: Path) -> None:
    reward = write_toy_model(tmp_path / "reward", architecture="ToyForSequenceClassification")
    recipe = toy_recipe(tmp_path / "out", model_name_or_path=str(reward))
    with pytest.raises(
        UsageError, match=r"--model_name_or_path: .*is a reward model .*needs a language model"
    ):
        open_run(recipe)


# ---------------------------------------------------------------- writing


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), atomic_directory(target) as staging:
        (staging / "half").write_text("x")
        assert not target.exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with atomic_directory(target) as staging:
            (staging / "file").write_text(text)
            (staging / "file").chmod(0o600)
    assert (target / "file").read_text() == "second"
    (tmp_path / "usual").touch()
    assert (target / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "model.previous" / "file").read_text() == "first"


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EACCES"])
def test_disk_errors_name_the_place(tmp_path: Path, code: str) -> None:
    import errno

    message = "the disk is full" if code == "ENOSPC" else "cannot be written"
    with pytest.raises(TrueupError, match=f"model: {message}"), writing(tmp_path / "model"):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))


# ---------------------------------------------------------------- runs


def test_done_means_same_inputs_and_intact(tmp_path: Path) -> None:
    base = train(tmp_path / "base")

    def done(**keys: Any) -> bool:
        return open_run(toy_recipe(tmp_path / "child", model_name_or_path=str(base), **keys))[0].done()

    assert not done()
    train(tmp_path / "child", model_name_or_path=str(base))
    assert done()
    assert done(logging_steps=99)  # shown, not trained
    assert not done(learning_rate=0.3)
    train(base, learning_rate=0.7)  # the parent's content changed
    assert not done()
    train(tmp_path / "child", model_name_or_path=str(base))
    assert done()
    (tmp_path / "child" / "tokenizer.json").write_text("{}")
    assert not done()


def test_a_moved_parent_is_still_the_same_parent(tmp_path: Path) -> None:
    base = train(tmp_path / "base")
    train(tmp_path / "child", model_name_or_path=str(base))
    moved = base.rename(tmp_path / "moved")
    assert open_run(toy_recipe(tmp_path / "child", model_name_or_path=str(moved)))[0].done()


def test_lineage_is_kept_without_the_parents(tmp_path: Path) -> None:
    base = train(tmp_path / "base")
    middle = train(tmp_path / "middle", model_name_or_path=str(base), learning_rate=0.2)
    child = train(tmp_path / "child", model_name_or_path=str(middle), learning_rate=0.3)
    base_identity = identity(base)
    shutil.rmtree(base)
    shutil.rmtree(middle)
    parents = open_directory(child).lineage["parents"]
    assert parents["model_name_or_path"]["parents"]["model_name_or_path"]["identity"] == base_identity


def test_the_record_hides_tokens(tmp_path: Path) -> None:
    train(tmp_path / "out", hub_token="hf_secret")
    for path in tmp_path.rglob("*.json"):
        assert "hf_secret" not in path.read_text()


def test_checkpoints_of_other_inputs_are_never_resumed(tmp_path: Path) -> None:
    run, _ = open_run(toy_recipe(tmp_path / "out"))
    run.prepare()
    (run.work_dir / "checkpoint-3").mkdir()
    run.prepare()
    assert (run.work_dir / "checkpoint-3").exists()
    other, _ = open_run(toy_recipe(tmp_path / "out", learning_rate=0.9))
    other.prepare()
    assert not (run.work_dir / "checkpoint-3").exists()


def test_a_foreign_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="was not written by trueup"):
        train(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_two_runs_never_share_a_work_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trueup.recipes.run.LOCK_WAIT", 0.05)
    run, _ = open_run(toy_recipe(tmp_path / "out"))
    run.work_dir.mkdir()
    with (
        FileLock(run.work_dir / ".lock", is_singleton=False),
        pytest.raises(TrueupError, match="another process is still running this recipe"),
        run.working(),
    ):
        pytest.fail("the lock was ignored")


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    """A 64 KiB file system: the run fails with one message, and what was there stays whole."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=False
    ).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        first = train(small / "out")
        before = identity(first)
        (small / "filler").write_bytes(b"x" * max(0, shutil.disk_usage(small).free - 4096))
        with pytest.raises(TrueupError, match="the disk is full"):
            train(small / "out", learning_rate=0.9, dataset_kwargs={"pad": "x" * 20000})
        assert identity(first) == before
    finally:
        subprocess.run(["umount", str(small)], check=True)
