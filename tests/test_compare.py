"""The compare stage: what it writes, that it does no work twice, and that a cheat gets no verdict."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import eval_models
import numpy as np
import pytest
from compare_models import World, fingerprint, verdict, write_model
from judge_endpoint import Endpoint, longer_is_better, serving

from trueup.app.votes import Vote, VoteStore
from trueup.base.tokenizer import train_tokenizer
from trueup.eval import compare, compare_samples
from trueup.eval.compare_frontier import matched
from trueup.eval.compare_samples import read_rows
from trueup.eval.kl import best_of_n_kl, kl_of_samples
from trueup.eval.loading import load_policy
from trueup.eval.results import tax
from trueup.eval.sampler import SamplingSettings, sample
from trueup.recipes.directory import identity
from trueup.recipes.errors import UsageError
from trueup.recipes.reader import read_recipe

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with serving() as found:
        yield found


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
    page = (folder / "report.html").read_text()
    assert "0.4000 ± 0.0300" in page
    assert "-0.1000</small>" in page  # 2.4 standard errors
    assert tax({"a": {"value": 1.0, "stderr": None}}, {"a": {"value": 0.5, "stderr": 0.1}}) == {
        "a": {"value": 0.5, "stderr": None}
    }


# ------------------------------------------------------------------------------------------------ who ranks


def test_a_judge_ranks_and_is_not_asked_twice(world: World, endpoint: Endpoint) -> None:
    """Every pair in both orders; killed in between or run again, no pair is paid for a second time."""
    endpoint.answer = longer_is_better
    keys = {
        "scorers": ["judge", "length"],
        "judge_kwargs": {"base_url": endpoint.url, "model": "tester"},
        "best_of": [2],
        "reward_model_name_or_path": str(world.reward),
    }
    folder = world.compare({"dpo": world.dpo()}, **keys)
    found = verdict(folder)
    assert found["scorers"] == ["judge:tester", "length"]
    assert found["judges"] == {"judge:tester": {"pairs": 36, "disagreed": 0, "malformed": 0}}
    assert len(endpoint.requests) == 2 * 3 * 12
    said = {arm["name"]: read_rows(folder / arm["samples"][0]) for arm in found["arms"]}
    for pair in found["pairs"]:
        both = zip(said[pair["a"]], said[pair["b"]], strict=True)
        longer = [np.sign(len(a["completion"]) - len(b["completion"])) for a, b in both]
        assert pair["rate"]["estimate"] == pytest.approx((1 + np.mean(longer)) / 2)
    dpo = next(pair for pair in found["pairs"] if (pair["a"], pair["b"]) == ("dpo", "baseline"))
    assert arm_of(found, "dpo")["means"]["scorers/judge:tester"]["estimate"] == dpo["rate"]["estimate"]
    (folder / "trueup.json").write_text((folder / "trueup.json").read_text().replace('"inputs"', '"was"'))
    assert verdict(world.compare({"dpo": world.dpo()}, **keys)) == found
    assert len(endpoint.requests) == 2 * 3 * 12


def test_people_rank_by_the_votes_on_these_models_and_prompts(world: World) -> None:
    """Votes on other models and prompts do not count; the sides of a vote do not matter."""
    arms = {"dpo": world.dpo(), "ppo": world.ppo()}
    names = {name: identity(Path(path)) for name, path in {**arms, "sft": str(world.sft)}.items()}
    asked = [json.loads(line)["prompt"] for line in (world.prompts / "test.jsonl").read_text().splitlines()]
    store = VoteStore(world.folder / "votes.sqlite")

    def vote(number: int, left: str, right: str, choice: Any, prompt: str) -> None:
        sides = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": side}] for side in "ab"
        ]
        left_id, right_id = names.get(left, "?"), names.get(right, "?")
        store.add(Vote(str(number), choice, left, left_id, sides[0], right, right_id, sides[1], {}))

    for number in range(6):
        vote(number, "ppo", "dpo", "left", asked[number])
    for number in range(6, 8):
        vote(number, "dpo", "ppo", "tie", asked[number])
    vote(8, "dpo", "ppo", "left", asked[0])  # a second opinion on the first prompt
    vote(9, "dpo", "ppo", "left", "a prompt of no test set")
    vote(10, "dpo", "another model", "left", asked[9])
    folder = world.compare(arms, scorers=[str(store.path), "length"])
    found = verdict(folder)
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"], pair["prompts"], pair["missing"]) == ("ppo", "dpo", 8, 4)
    assert pair["rate"]["estimate"] == pytest.approx((5 + 0.5 + 2 * 0.5) / 8)
    assert found["judges"] == {"votes": {"votes": 9, "recorded": 11}}
    assert arm_of(found, "dpo")["elo"] is None  # no vote joins it to the baseline
    assert "scorers/length" in arm_of(found, "dpo")["means"]
    vote(11, "dpo", "ppo", "left", asked[11])
    again = verdict(world.compare(arms, scorers=[str(store.path), "length"]))
    assert again["pairs"][0]["prompts"] == 9  # a new vote is new data


def test_any_hub_model_is_an_arm(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the Hub's cache, offline, and with tokens of its own: no KL, and all the rest."""
    hub, commit = world.folder / "hub" / "models--someone--tiny", "c" * 40
    snapshot = hub / "snapshots" / commit
    eval_models.policy("llama", max_position_embeddings=64, vocab_size=400).save_pretrained(snapshot)
    other = train_tokenizer(["other words " * 9, "and yet others"], vocab_size=290)
    other.save_pretrained(snapshot)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.parent))
    found = verdict(world.compare({"dpo": world.dpo(), "llama": "someone/tiny"}, max_prompts=5))
    llama = arm_of(found, "llama")
    assert llama["kl"] == {"per_sequence": None, "bound": False}
    assert llama["text"]["entropy"] > 0
    assert commit in llama["models"][0]["path"]
    assert arm_of(found, "dpo")["kl"]["per_sequence"] != 0
    assert any("llama" in line for line in found["unknown"])
    with pytest.raises(UsageError, match=r"arms\.dpo\[0\].*nor can it be had from the Hub"):
        world.compare({"dpo": "nobody/has-this"})


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
def test_pairs_drawn_from_the_test_prompts_are_found_out(world: World) -> None:
    record = json.loads((world.pairs / "trueup.json").read_text())
    record["data"].append(fingerprint(world.prompts, "test"))
    (world.pairs / "trueup.json").write_text(json.dumps(record))
    found = verdict(world.compare({"dpo": world.dpo(recipe={"dataset_train_split": "test"})}))
    assert "pairs drawn from the test prompts" in found["void"]["dpo"]


@pytest.mark.usefixtures("no_page")
def test_the_best_of_more_checkpoints_is_refused(world: World) -> None:
    """One rule and one number of candidates for all; the last validation repeats the best and is none."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_score", "scorers": ["heldout"]}
    few, many = world.dpo(recipe=best), world.ppo(recipe=best)
    points = [{"step": step, "split": "validation", "kl": 0.0, "score": 1.0} for step in (0, 5, 10, 15, 15)]
    (Path(few) / "frontier.jsonl").write_text("".join(json.dumps(one) + "\n" for one in points[:3]))
    (Path(many) / "frontier.jsonl").write_text("".join(json.dumps(one) + "\n" for one in points))
    with pytest.raises(UsageError, match=r"by eval_score of 2, and ppo\[0\] the best .* of 3"):
        world.compare({"dpo": few, "ppo": many})
    (Path(few) / "frontier.jsonl").write_text((Path(many) / "frontier.jsonl").read_text())
    found = verdict(world.compare({"dpo": few, "ppo": many}))
    assert arm_of(found, "ppo")["models"][0]["choice"] == "the best checkpoint by eval_score of 3"
    with pytest.raises(UsageError, match=r"and last.*the last checkpoint"):
        world.compare({"dpo": few, "last": world.ppo("last", seed=7, recipe={"scorers": ["heldout"]})})


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
        ("arms: {a: x}\njudge_kwargs: {model: m, base_url: u}", "is read with judge among scorers"),
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
