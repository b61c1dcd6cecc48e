"""What goes to the Hub, and how: a small server speaks its protocol, huggingface_hub is the client."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ToyRecipe, write_toy_model
from hub_server import HubServer, connect, hub

from trueup.app import cli, push_check
from trueup.app.push_check import Findings
from trueup.app.push_files import Parcel, gathered, without_paths
from trueup.app.push_hub import Destination, Pushed, push
from trueup.app.runner import run_recipes, run_stage
from trueup.base.hub_keys import HubArguments, hub_contradictions
from trueup.recipes.directory import RECORD, identity, open_directory, write_json
from trueup.recipes.errors import TrueupError, UsageError
from trueup.recipes.reader import read_recipe
from trueup.recipes.stages import STAGES

HOME = {".gitattributes"}  # what the Hub itself puts into a new repository


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub() as running:
        connect(running, tmp_path / "cache", monkeypatch)
        yield running


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy model opens nowhere; test_push_models.py verifies real ones."""
    monkeypatch.setattr(push_check, "verify", lambda parcel: Findings(["nothing"]))


def toy(path: Path, value: float = 0.0, **record: Any) -> Path:
    write_toy_model(path, value)
    write_json(path / RECORD, {"stage": "toy", "identity": identity(path), "parents": {}, **record})
    return path


def send(source: Path, to: str = "ada/toy", **where: Any) -> Pushed:
    with gathered(source, to) as parcel:
        return push(parcel, Destination(to, **where))


def command(*words: str) -> int:
    """The exit code of `trueup WORDS`."""
    try:
        cli.main([*words])
    except SystemExit as done:
        return int(done.code or 0)
    return 0


# ---------------------------------------------------------------------------------------- what goes


def test_only_what_is_meant_to_go_goes_up(tmp_path: Path, server: HubServer) -> None:
    model = toy(tmp_path / "toy")
    config = json.loads((model / "config.json").read_text())
    code = {"AutoConfig": "configuration_gpt.GPTConfig", "AutoModel": "modeling_gpt.GPTModel"}
    (model / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    (model / "modeling_gpt.py").write_text("from .beside import x\n")
    write_json(model / RECORD, {"stage": "toy", "identity": identity(model), "parents": {}})
    for name in ("configuration_gpt.py", "beside.py", "generation_config.json"):
        (model / name).write_text("{}" if name.endswith("json") else "")
    for name in ("adapter", "eval", "checkpoint-3", "eval/deep"):
        (model / name).mkdir()
    for name in ("adapter/adapter_config.json", "eval/lab.json", "calibration.json"):
        (model / name).write_text("{}")
    (model / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    stay = {
        ".env", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "log.jsonl",
        "notes.txt", "secret.json", "other.py", "eval/lab.jsonl", "eval/deep/x.json",
        "checkpoint-3/model.safetensors", "adapter/training_args.bin",
    }  # fmt: skip
    for name in stay:
        (model / name).write_text("hf_private")
    (model / "loss.png").write_bytes(b"a picture of the card")

    with gathered(model, "ada/toy") as parcel:
        assert set(parcel.left) == stay
        push(parcel, Destination("ada/toy"))
    there = server.repository("ada/toy")
    assert set(there.files()) - HOME == {
        "README.md", "config.json", "generation_config.json", "tokenizer.json",
        "model.safetensors", "calibration.json", "configuration_gpt.py", "modeling_gpt.py", "beside.py",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "eval/lab.json", "trueup.json",
        "loss.png",
    }  # fmt: skip
    assert len(there.messages) == 1
    assert not any(b"hf_private" in content for content in there.files().values())


def test_nothing_tells_of_this_machine(tmp_path: Path, server: HubServer) -> None:
    away = tmp_path / "alice"
    recipe = {"model_name_or_path": f"{away}/base", "hub_token": "hf_secret", "learning_rate": 0.1, "seed": 0}
    places = {"learning_rate": f"{Path.cwd()}/recipes/sft.yaml:3", "seed": "--seed"}
    model = toy(
        tmp_path / "toy",
        recipe=recipe,
        origin=places,
        data=[{"name": f"{tmp_path}/rows.jsonl", "split": "train", "sha256": "0"}],
    )
    (model / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(away), "eos_token": "x"}))
    write_json(model / RECORD, json.loads((model / RECORD).read_text()) | {"identity": identity(model)})
    (model / "adapter").mkdir()
    (model / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(away)}))
    send(model)

    files = server.repository("ada/toy").files()
    assert not any(str(tmp_path).encode() in content for content in files.values())
    record = json.loads(files["trueup.json"])
    assert record["recipe"] == {"model_name_or_path": "base", "learning_rate": 0.1, "seed": 0}
    assert record["origin"] == {"learning_rate": "recipes/sft.yaml:3", "seed": "--seed"}
    assert record["data"] == [{"name": "rows.jsonl", "split": "train", "sha256": "0"}]
    assert record["identity"] == identity(open_directory("ada/toy").path)  # it is still the same model


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/data/alice/runs/sft", "sft"),
        ("gold, /data/alice/reward", "gold, reward"),
        ("see https://huggingface.co/ada/toy/tree/main", "see https://huggingface.co/ada/toy/tree/main"),
        ("runs/lab/sft and 3/4, and/or </s> a/b/c", "runs/lab/sft and 3/4, and/or </s> a/b/c"),
        (f"{Path.home()}/my model/sft", "my model/sft"),
        (f"{Path.cwd()}/runs/sft", "runs/sft"),
    ],
)
def test_absolute_paths_are_cut(text: str, public: str) -> None:
    assert without_paths(text) == public


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "no such directory"),
        (lambda path: _file(path / "rows.csv"), "pushed as .jsonl"),
        (lambda path: _file(path / "verdict.json").parent, "is a comparison"),
        (lambda path: _file(path / "adapter_config.json").parent, "trueup merge"),
    ],
)
def test_what_cannot_be_pushed_says_why(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message), gathered(make(tmp_path / "it"), "ada/it"):
        pass


def _file(path: Path) -> Path:
    path.parent.mkdir()
    path.write_text("{}")
    return path


# ---------------------------------------------------------------------------------------- the command


@pytest.mark.usefixtures("unverified")
def test_without_yes_it_is_only_shown(
    tmp_path: Path, server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = toy(tmp_path / "toy")
    (model / "notes.txt").write_text("mine")
    assert command("push", str(model), "--to", "ada/toy", "--private") == 0
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown
    assert "ada/toy (model, private)" in shown
    assert "stays here: notes.txt" in shown
    assert "library_name: transformers" in shown
    assert not server.repositories
    assert command("push", str(model), "--to", "ada/toy", "--private", "--yes", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["url"].startswith(f"{server.url}/ada/toy/commit/")
    assert server.repository("ada/toy").private


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("token", ["hf_wrongwrongwrong", None])
def test_a_wrong_token_is_told_how_to_log_in_and_never_shown(
    tmp_path: Path, server: HubServer, token: str | None, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert command("push", str(toy(tmp_path / "toy")), "--to", "ada/toy", "--yes") == 1
    shown = "".join(capfd.readouterr())
    assert "hf auth login" in shown
    assert "hf_wrong" not in shown
    assert not server.repositories


@pytest.mark.parametrize("to", ["toy", "ada/toy@v1", "a/b/c"])
def test_a_repository_has_a_user_and_a_name(tmp_path: Path, to: str) -> None:
    assert command("push", str(toy(tmp_path / "toy")), "--to", to) == 2


def test_the_network_switched_off_is_said(
    tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TrueupError, match="HF_HUB_OFFLINE is set"):
        send(toy(tmp_path / "toy"))


# ---------------------------------------------------------------------------------------- whole or not


@pytest.mark.parametrize(
    ("step", "status"),
    [("create", 500), ("preupload", 400), ("lfs-batch", 400), ("lfs-upload", 403), ("commit", 500)],
)
def test_a_push_broken_off_publishes_nothing_and_can_be_repeated(
    tmp_path: Path, server: HubServer, step: str, status: int
) -> None:
    model = toy(tmp_path / "toy")
    server.fail[step] = status
    with pytest.raises(TrueupError, match="Nothing was published") as caught:
        send(model)
    assert "secret" not in str(caught.value)  # the signature of the upload's address
    there = server.repositories.get(("model", "ada/toy"))
    assert there is None or set(there.files()) == HOME
    server.fail.clear()
    send(model)
    files = server.repository("ada/toy").files()
    assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert len(server.uploads) == 1  # what had arrived was not sent again
    assert len(server.repository("ada/toy").messages) == 1


def test_a_new_push_takes_the_place_of_the_old(tmp_path: Path, server: HubServer) -> None:
    first = toy(tmp_path / "first", 1.0)
    (first / "model.safetensors").rename(first / "model-00001-of-00001.safetensors")
    (first / "eval").mkdir()
    (first / "eval" / "old.json").write_text("{}")
    send(first)
    there = server.repository("ada/toy")
    there.commit("main", there.files() | {"LICENSE": b"mine", "picture.png": b"mine"})

    second = toy(tmp_path / "second", 2.0)
    done = send(second)
    assert done.removed == ["eval/old.json", "model-00001-of-00001.safetensors"]
    assert {"LICENSE", "picture.png"} <= set(there.files())
    assert open_directory("ada/toy").identity == identity(second)
    send(second)
    assert len(there.messages) == 2  # nothing has changed: no empty commit


def test_a_change_in_between_is_not_overwritten(
    tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(toy(tmp_path / "one", 1.0))
    there = server.repository("ada/toy")
    upload = there.commit

    def and_somebody_else(*arguments: Any, **named: Any) -> Any:
        upload("main", there.files() | {"theirs": b"x"})
        return preupload(*arguments, **named)

    from huggingface_hub import HfApi

    preupload = HfApi.preupload_lfs_files
    monkeypatch.setattr(HfApi, "preupload_lfs_files", and_somebody_else)
    with pytest.raises(TrueupError, match="A commit has happened since"):
        send(toy(tmp_path / "two", 2.0))
    assert "theirs" in there.files()


def test_private_is_never_pushed_to_what_is_public(tmp_path: Path, server: HubServer) -> None:
    model = toy(tmp_path / "toy")
    send(model)
    before = server.repository("ada/toy").branches["main"]
    with pytest.raises(TrueupError, match="is public; make it private"):
        send(toy(tmp_path / "other", 5.0), private=True)
    assert server.repository("ada/toy").branches["main"] == before
    send(model, "lab/secret", private=True)
    assert server.repository("lab/secret").private
    send(toy(tmp_path / "third", 6.0), "lab/secret")  # what is private stays so
    assert server.repository("lab/secret").private


def test_a_branch_of_its_own(tmp_path: Path, server: HubServer) -> None:
    for value in (1.0, 2.0):
        send(toy(tmp_path / str(value), value), revision="trial")
    there = server.repository("ada/toy")
    assert set(there.files("main")) == HOME
    assert open_directory("ada/toy@trial").identity == identity(tmp_path / "2.0")


def test_another_name_than_ones_own_is_refused(tmp_path: Path, server: HubServer) -> None:
    with pytest.raises(TrueupError, match=r"may not write there.*Nothing was published"):
        send(toy(tmp_path / "toy"), "google/toy")


# ---------------------------------------------------------------------------------------- from a recipe


@dataclass
class PushedRecipe(HubArguments, ToyRecipe):
    """A toy stage that can be pushed."""

    hub_always_push: bool = False

    @classmethod
    def contradictions(cls, values: dict[str, Any]) -> list[tuple[str, str]]:
        return hub_contradictions(values)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unverified: None) -> Path:
    monkeypatch.setitem(STAGES, "pushed", ("test_push:PushedRecipe", "A toy."))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"stage: pushed\noutput_dir: {tmp_path}/out\npush_to_hub: true\n")
    return path


def run(recipe: Path, *lines: str) -> None:
    """`trueup run`, in this process, with further lines in the recipe."""
    recipe.write_text("".join(f"{line}\n" for line in (recipe.read_text().rstrip(), *lines)))
    run_stage(read_recipe(recipe))


def test_a_stage_pushes_once_when_it_is_complete(
    tmp_path: Path, server: HubServer, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = recipe.read_text()
    run(recipe, "hub_model_id: lab/mine", "hub_private_repo: true")
    there = server.repository("lab/mine")
    assert there.private
    assert open_directory("lab/mine").identity == open_directory(tmp_path / "out").identity
    before = server.uploads.copy(), there.messages.copy()
    server.fail["create"] = 500
    run(recipe)  # it is there: nobody is asked
    assert (server.uploads, there.messages) == before
    run_recipes([read_recipe(recipe)])
    assert "skipped" in capsys.readouterr().out
    server.fail.clear()
    recipe.write_text(plain)
    run(recipe)  # elsewhere: under one's own name, by that of output_dir
    assert server.repository("ada/out").messages


def test_a_push_that_fails_is_repeated_without_training(
    tmp_path: Path, server: HubServer, recipe: Path
) -> None:
    server.fail["commit"] = 500
    with pytest.raises(TrueupError, match="complete, and not pushed"):
        run(recipe)
    written = (tmp_path / "out" / RECORD).read_text()
    server.fail.clear()
    run(recipe)
    assert (tmp_path / "out" / RECORD).read_text() == written
    assert len(server.repository("ada/out").messages) == 1


def test_who_is_not_logged_in_learns_it_before_training(
    tmp_path: Path, server: HubServer, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrong")
    with pytest.raises(TrueupError, match=r"push_to_hub: your account: .*hf auth login") as caught:
        run(recipe)
    assert "hf_wrong" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hub_strategy: all_checkpoints", "hub_strategy must be end"),
        ("hub_always_push: true", "hub_always_push is about"),
        ("hub_token: hf_secretsecret", "hub_token does not belong in a recipe"),
    ],
)
def test_keys_that_ask_for_another_way_are_refused(recipe: Path, line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(recipe, line)
    assert "hf_secret" not in str(caught.value)


# ---------------------------------------------------------------------------------------- found again


def test_the_file_beside_is_found_by_a_record(tmp_path: Path, server: HubServer) -> None:
    from trueup.recipes.hub import file_beside

    model = toy(tmp_path / "toy")
    send(model)
    opened = open_directory("ada/toy")
    assert opened.name == f"ada/toy@{server.repository('ada/toy').branches['main']}"
    assert opened.lineage["path"] == opened.name
    beside = file_beside(opened.name, RECORD)
    assert beside is not None
    assert os.path.samefile(beside, opened.path / RECORD)
    assert file_beside("ada/none@main", RECORD) is None
    assert file_beside(str(model), RECORD) == model / RECORD


def test_pairs_beside_others_take_nobodys_place(tmp_path: Path, server: HubServer) -> None:
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
        with gathered(path, "ada/pairs") as parcel:
            assert isinstance(parcel, Parcel)
            push(parcel, Destination("ada/pairs"))
    assert {"a.jsonl", "b.jsonl"} <= set(server.repository("ada/pairs", "dataset").files())
