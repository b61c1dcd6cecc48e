"""What the app finds among the runs, and how it loads, shares and evicts."""

import threading
from pathlib import Path
from typing import Any

import pytest
from app_models import write_runs
from compare_models import write_model

from trueup.app import models_pool
from trueup.app.models_pool import ModelPool, find_entries
from trueup.recipes.errors import TrueupError, UsageError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


def test_a_folder_is_searched_for_models_and_reports(runs: Path) -> None:
    found = {one.name: one.kind for one in find_entries([str(runs)])}
    assert found == {
        "base": "chat",
        "compare": "report",
        "damaged": "chat",
        "dpo": "chat",
        "reward": "reward",
        "sft": "chat",
    }


def test_the_ladder_of_a_folder_is_a_report_too(tmp_path: Path) -> None:
    write_model(tmp_path / "lab" / "sft", "sft")
    (tmp_path / "lab" / "report.html").write_text("the ladder")
    found = {one.name: one.kind for one in find_entries([str(tmp_path)])}
    assert found == {"lab": "report", "sft": "chat"}


def test_what_is_named_twice_is_there_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    assert [one.name for one in find_entries(["sft", str(runs / "sft"), "./dpo"])] == ["sft", "dpo"]


def test_names_are_as_long_as_it_takes_to_tell_them_apart(tmp_path: Path) -> None:
    for name in ("one/sft", "two/sft", "two/dpo"):
        write_model(tmp_path / name, "sft")
    places = [str(tmp_path), "org/name", "other/name"]
    assert [one.name for one in find_entries(places)] == [
        "one/sft",
        "dpo",
        "two/sft",
        "org/name",
        "other/name",
    ]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "no such directory, nor is it a Hub id"),
        ("./no/where", "no such directory"),
        (".", "no model"),
    ],
)
def test_what_is_not_there_is_said(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        find_entries([place])


def test_models_load_once_when_used_and_are_shared(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = models_pool._load
    monkeypatch.setattr(
        models_pool, "_load", lambda entry, *rest: loads.append(entry.name) or load(entry, *rest)
    )
    pool = ModelPool(find_entries([str(runs)]), 1 << 30)
    assert not pool.loaded
    seen: list[Any] = []

    def use() -> None:
        with pool.using("sft") as loaded:
            seen.append(loaded.model)

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["sft"]
    assert len({id(model) for model in seen}) == 1
    assert pool.loaded["sft"].users == 0


def test_the_one_idle_for_longest_goes_and_what_is_used_stays(runs: Path) -> None:
    size = (runs / "sft" / "model.safetensors").stat().st_size
    pool = ModelPool(find_entries([str(runs)]), int(2.5 * size))
    for name in ("sft", "dpo", "sft"):
        with pool.using(name):
            pass
    with pool.using("sft"):
        with pool.using("base"):
            assert set(pool.loaded) == {"sft", "base"}
            with pytest.raises(TrueupError, match=r"dpo takes .* others are answering"), pool.using("dpo"):
                pass
        with pool.using("dpo"):
            assert set(pool.loaded) == {"sft", "dpo"}
    small = ModelPool(find_entries([str(runs)]), size // 2)
    with pytest.raises(TrueupError, match="--memory"), small.using("sft"):
        pass


def test_what_cannot_be_loaded_says_why_and_takes_no_room(runs: Path) -> None:
    pool = ModelPool(find_entries([str(runs)]), 1 << 30)
    for _ in range(2):
        with (
            pytest.raises(TrueupError, match=r"model\.safetensors: the file is cut short"),
            pool.using("damaged"),
        ):
            pass
    assert not pool.loaded
    with pytest.raises(UsageError, match=r"'\.\./sft' is none of the models here"), pool.using("../sft"):
        pass


def test_a_hub_id_that_cannot_be_had_says_why() -> None:
    pool = ModelPool(find_entries(["no-such-organisation/no-such-model"]), 1 << 30)
    name = "no-such-organisation/no-such-model"
    with pytest.raises(TrueupError, match="nor can it be had from the Hub"), pool.using(name):
        pass


def test_what_a_model_is_comes_from_its_record(runs: Path) -> None:
    pool = ModelPool(find_entries([str(runs)]), 1 << 30)
    with pool.using("sft") as sft, pool.using("dpo") as dpo, pool.using("base") as base:
        assert (sft.raw, base.raw) == (False, True)
        assert pool.by_identity(dpo.reference) == "sft"
        assert pool.by_identity(sft.reference) is None
    with pool.using("reward") as reward:
        assert reward.scorer is not None
