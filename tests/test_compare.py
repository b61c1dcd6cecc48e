"""The compare stage: what it writes, that it does no work twice, and that a cheat gets no verdict."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from compare_models import World, fingerprint, verdict, write_model

from trueup.eval import compare, compare_samples
from trueup.eval.compare_frontier import matched
from trueup.eval.compare_samples import read_rows
from trueup.eval.compare_tax import tax
from trueup.eval.kl import best_of_n_kl, kl_of_samples
from trueup.eval.loading import load_policy
from trueup.eval.sampler import SamplingSettings, sample
from trueup.recipes.errors import UsageError
from trueup.recipes.reader import read_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(compare, "write_report", lambda folder: None)


def arm_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(arm for arm in found["arms"] if arm["name"] == name)


def test_a_comparison_from_end_to_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms of two seeds, best-of-n, the proxy; then again with another arm, and twice the same page."""
    trace = [{"step": 0, "split": "validation", "kl": 0.0, "score": 1.0}]
    trace += [{"step": 5, "split": "validation", "kl": 4.0, "score": 3.0, "scorers/reward": 0.5}]
    arms = {
        "dpo": [world.dpo("dpo-0", 1), world.dpo("dpo-1", 2)],
        "ppo": [world.ppo("ppo-0", 3), world.ppo("ppo-1", 4)],
    }
    for path in (*arms["dpo"], *arms["ppo"]):
        (Path(path) / "frontier.jsonl").write_text("".join(json.dumps(point) + "\n" for point in trace))
    keys = {"best_of": [2], "reward_model_name_or_path": str(world.reward)}
    folder = world.compare(arms, **keys)
    found = verdict(folder)
    assert [arm["name"] for arm in found["arms"]] == ["baseline", "dpo", "ppo", "best-of-2"]
    assert len(found["pairs"]) == 6
    assert (found["seeds"], found["prompts"], found["unequal"], found["void"]) == (2, 12, [], {})
    assert "2 seeds:" in found["note"]
    _every_mean_stands_in_the_scores(folder, found)
    _the_kl_is_that_of_the_instrument(world, found, arms["dpo"][0])
    chosen, candidates = arm_of(found, "best-of-2"), sorted((folder / "samples").glob("candidate-*"))
    assert len(candidates) == 2
    assert chosen["kl"] == {"per_sequence": best_of_n_kl(2), "bound": True}
    assert len({row["candidate"] for row in read_rows(folder / chosen["samples"][0])}) == 2

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("sampled again")

    page, files = _without_times(folder), sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(compare_samples, "sample", refuse)
    world.compare(arms, **keys)  # complete and unchanged
    (folder / "trueup.json").write_text((folder / "trueup.json").read_text().replace('"inputs"', '"was"'))
    again = world.compare(arms, **keys)
    assert verdict(again) == found
    assert _without_times(again) == page
    assert sorted(path.name for path in again.iterdir()) == files
    fewer = world.compare({"dpo": arms["dpo"]}, **keys)
    assert len(verdict(fewer)["arms"]) == 3
    assert not list(folder.with_name("compare.work").glob("*.jsonl"))


def _without_times(folder: Path) -> str:
    return re.sub(r"took [\d.]+ s", "", (folder / "report.html").read_text())


def _every_mean_stands_in_the_scores(folder: Path, found: dict[str, Any]) -> None:
    with (folder / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    for arm in found["arms"]:
        mine = [line for line in lines if line["arm"] == arm["name"]]
        for name, mean in arm["means"].items():
            assert np.mean([float(line[name]) for line in mine]) == pytest.approx(mean["estimate"])


def _the_kl_is_that_of_the_instrument(world: World, found: dict[str, Any], path: str) -> None:
    policy, tokenizer = load_policy(path)
    prompts = [row["prompt"] for row in read_rows(world.folder / "out/compare/samples/prompts.jsonl")]
    samples = sample(policy, tokenizer, prompts, SamplingSettings(max_new_tokens=8))
    expected = kl_of_samples(policy, world.sft, samples)
    measured = arm_of(found, "dpo")["kl"]["by_seed"][0]
    assert measured["per_sequence"] == pytest.approx(expected.per_sequence, abs=1e-4)
    assert measured["stderr"] == pytest.approx(expected.stderr, abs=1e-4)


def test_the_page_escapes_what_models_and_prompts_say(world: World) -> None:
    page = (world.compare({"dpo": world.dpo()}) / "report.html").read_text()
    assert "asks <b>what?" not in page
    assert "asks &lt;b&gt;what?" in page
    assert not re.search(r'(src|href|srcset)="(?!data:)', page)  # self-contained


def test_on_the_lab_the_parts_of_gold_and_the_families_are_shown(world: World) -> None:
    folder = world.compare(
        {"same": str(world.sft)}, scorers=["gold", "length"], dataset_name="lab/prompts", max_prompts=15,
        text_dataset_name="lab/text", max_documents=2,
    )  # fmt: skip
    found = verdict(folder)
    (pair,) = found["pairs"]
    assert (pair["ties"], pair["winner"], pair["rate"]["low"]) == (1, None, 0.5)
    assert set(pair["parts"]) >= {"correct", "safe", "courteous"}
    arm = arm_of(found, "same")
    assert arm["kl"]["per_sequence"] == 0
    assert arm["differences"]["parts/safe"]["estimate"] == 0
    assert len(arm["correct_by_family"]) > 5
    assert {"parts.png", "families.png", "frontier.png"} <= {path.name for path in folder.iterdir()}
    measured = [found["tax"][name][0]["bits_per_byte"] for name in ("baseline", "same")]
    assert measured[0] == measured[1] > 8  # random weights are worse than no model at all


def test_lm_eval_results_in_the_directories_make_the_tax(world: World) -> None:
    arm = world.dpo()
    for path, accuracy in ((world.sft, 0.5), (Path(arm), 0.4)):
        (path / "eval").mkdir()
        results = {"piqa": {"alias": "piqa", "acc,none": accuracy, "acc_stderr,none": 0.03}}
        (path / "eval" / "lm.json").write_text(json.dumps({"results": results}))
    folder = world.compare({"dpo": arm})
    change = verdict(folder)["tax"]["dpo"][0]["change"]["piqa acc"]
    assert change == pytest.approx({"value": -0.1, "stderr": 0.03 * 2**0.5})
    assert "piqa acc" in (folder / "report.html").read_text()
    assert tax({"a": {"value": 1.0, "stderr": None}}, {"a": {"value": 0.5, "stderr": 0.1}}) == {
        "a": {"value": 0.5, "stderr": None}
    }


# ------------------------------------------------------------------------------------------------ cheats


@pytest.mark.usefixtures("no_page")
def test_another_start_is_refused_or_labelled(world: World) -> None:
    other = write_model(world.folder / "other", "sft", seed=9)
    arms = {"dpo": world.dpo(), "ppo": world.ppo(parents={"model_name_or_path": other})}
    with pytest.raises(UsageError, match=r"ppo\[0\].*began as .*\n.*--allow-unequal"):
        world.compare(arms)
    found = verdict(world.compare(arms, allow_unequal=True))
    assert len(found["unequal"]) == 1
    assert all(pair["text"].startswith("Unequal arms: ") for pair in found["pairs"])


@pytest.mark.usefixtures("no_page")
def test_other_pairs_and_other_prompts_are_refused(world: World) -> None:
    other = world.folder / "pairs2"
    other.mkdir()
    (other / "train.jsonl").write_text('{"prompt": "x", "chosen": "y", "rejected": "z"}\n')
    reward = write_model(world.folder / "reward2", "reward", kind="reward", parents={"dataset_name": other})
    with pytest.raises(UsageError, match="dpo and ppo learned from other pairs"):
        world.compare({
            "dpo": world.dpo(), "ppo": world.ppo(parents={"reward_model_name_or_path": reward})
        })  # fmt: skip
    elsewhere = [fingerprint(world.prompts, "validation") | {"split": "train"}]
    with pytest.raises(UsageError, match="dpo and ppo2 learned from other prompts"):
        world.compare({"dpo": str(world.folder / "dpo"), "ppo2": world.ppo("ppo2", data=elsewhere)})
    with pytest.raises(UsageError, match="dpo and best-of-n learned from other pairs"):
        world.compare({"dpo": str(world.folder / "dpo")}, reward_model_name_or_path=str(reward))


@pytest.mark.usefixtures("no_page")
def test_the_same_model_twice_is_no_second_seed_nor_is_another_recipe(world: World) -> None:
    first = world.dpo("dpo-0", 1, recipe={"beta": 0.1, "seed": 0})
    other = world.dpo("dpo-1", 2, recipe={"beta": 0.5, "seed": 1})
    with pytest.raises(UsageError, match="the same model, not two seeds"):
        world.compare({"dpo": [first, first]})
    with pytest.raises(UsageError, match=r"no seed of dpo\[0\]: they differ in beta"):
        world.compare({"dpo": [first, other]})


@pytest.mark.usefixtures("no_page")
def test_the_proxy_never_ranks(world: World) -> None:
    found = verdict(world.compare({"dpo": world.dpo(), "ppo": world.ppo()}, scorers=[str(world.reward)]))
    assert "trained on the very scorer" in found["void"]["ppo"]
    assert "not held out" in found["void"]["dpo"]
    assert all(pair["winner"] is None for pair in found["pairs"])
    text = next(pair["text"] for pair in found["pairs"] if {pair["a"], pair["b"]} == {"dpo", "ppo"})
    assert text.startswith("No verdict on ppo and dpo.")


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_score"}, "checkpoint was chosen"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "scorers/length"},
            "checkpoint was chosen",
        ),
        ({"on_alarm": "rollback"}, "a guard"),
    ],
)
def test_an_oracle_gets_no_verdict(world: World, recipe: dict[str, Any], told: str) -> None:
    steered = world.ppo(recipe={"scorers": ["length"], **recipe}, metrics={"alarms": 1.0})
    found = verdict(world.compare({"ppo": steered}))
    assert found["void"]["ppo"].startswith("oracle: ")
    assert told in found["void"]["ppo"]


@pytest.mark.usefixtures("no_page")
def test_a_guard_that_never_spoke_steered_nothing(world: World) -> None:
    recipe = {"scorers": ["length"], "on_alarm": "stop"}
    found = verdict(world.compare({"ppo": world.ppo(recipe=recipe, metrics={"alarms": 0.0})}))
    assert found["void"] == {}


@pytest.mark.usefixtures("no_page")
def test_test_prompts_used_for_choices_are_found_out(world: World) -> None:
    seen = [world.read[0], fingerprint(world.prompts, "test") | {"split": "validation"}]
    found = verdict(world.compare({"ppo": world.ppo(data=seen)}))
    assert found["void"] == {"ppo": "it used the test prompts for validation"}
    other = [world.read[0], world.read[1] | {"sha256": "another number of rows"}]
    recipe = {"dataset_name": str(world.prompts), "dataset_validation_split": "test"}
    found = verdict(world.compare({"ppo": world.ppo("ppo2", data=other, recipe=recipe)}))
    assert "dataset_validation_split: test" in found["void"]["ppo"]


@pytest.mark.usefixtures("no_page")
def test_a_foreign_model_is_compared_and_what_is_not_known_is_said(world: World) -> None:
    foreign = Path(world.dpo("foreign"))
    (foreign / "trueup.json").unlink()
    found = verdict(world.compare({"foreign": str(foreign), "dpo": world.dpo()}))
    assert any("no record of the model it began as" in line for line in found["unknown"])
    assert found["unequal"] == []


def test_a_recipe_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    keys = "stage: compare\noutput_dir: runs/x/y\nbaseline: a\nscorers: [gold]\ndataset_name: lab/prompts\n"
    for line, told in (
        ("arms: {a: [x, y, z], b: [x, y]}", "different numbers of seeds"),
        ("arms: {}", "names none"),
        ("arms: {best-of-4: x}", "choose another"),
        ("arms: {a: [x, 3]}", "takes a model directory"),
        ("arms: {a/b: x}", "a name is made of letters"),
        ("arms: {a: x}\nbest_of: [4]", "needs reward_model_name_or_path"),
        ("arms: {a: x}\nbest_of: [1]\nreward_model_name_or_path: r", "from 2 on"),
    ):
        path.write_text(keys + line)
        with pytest.raises(UsageError, match=told):
            read_recipe(path)


def test_arms_are_matched_where_all_had_moved_equally_far() -> None:
    def trace(arm: str, kls: list[float], scores: list[float]) -> dict[str, Any]:
        points = [
            {"step": step, "kl": kl, "score": score, "proxy": None}
            for step, (kl, score) in enumerate(zip(kls, scores, strict=True))
        ]
        return {"arm": arm, "seed": 0, "points": points, "best": points[-1], "hump": None}

    found = matched([trace("dpo", [0, 2], [0.0, 1.0]), trace("ppo", [0, 4, 6], [0.0, 1.0, 0.5])])
    assert found is not None
    assert (found["kl"], found["candidates"]) == (2, {"dpo": 2, "ppo": 3})
    assert found["scores"] == {"dpo": 1.0, "ppo": 0.5}
    assert matched([trace("dpo", [0, 2], [0, 1])]) is None
