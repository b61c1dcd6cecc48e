"""The exam of a reward model: it tells a perfect, a careless and a length-loving one apart."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_models import reward_model, tokenizer

from trueup.eval.exam import FLATTERY, by_quantile, examine, reliability, score, summary
from trueup.eval.exam_plots import draw, save_exam
from trueup.eval.rendering import encode_pair
from trueup.eval.scorers import Calibration, RewardModelScorer
from trueup.recipes.errors import TrueupError
from trueup.recipes.lab import datasets
from trueup.recipes.lab.preferences import label_ceiling


class Told(RewardModelScorer):
    """A scorer whose scores are a function of the token ids, in the place of a model."""

    def __init__(
        self, tell: Callable[[Sequence[int]], float], calibration: Calibration | None = None
    ) -> None:
        model = reward_model(max_position_embeddings=1024)
        super().__init__(model, tokenizer(), "told", calibration=calibration)
        self.tell = tell

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> list[float]:
        raw = [self.tell(row) for row in rows]
        return (
            [(one - self.calibration.mean) / self.calibration.std for one in raw] if self.calibration else raw
        )


@pytest.fixture(scope="module")
def lab() -> list[dict[str, Any]]:
    return list(datasets.rows("lab/preferences", "test", rows=200))


@pytest.fixture(scope="module")
def golds(lab: list[dict[str, Any]]) -> dict[tuple[int, ...], float]:
    """Gold of every reply of the lab's pairs, by its tokens."""
    return {
        tuple(encode_pair(tokenizer(), row["prompt"], row[side])): row[f"gold_{side}"]
        for row in lab
        for side in ("chosen", "rejected")
    }


def test_who_knows_gold_reaches_the_ceiling(lab: Any, golds: Any) -> None:
    report = examine(Told(lambda ids: golds.get(tuple(ids), -1.0)), lab, probes=40)
    assert report["pairs"] == 200
    assert report["gold"]["spearman"] == pytest.approx(1)
    assert report["gold"]["agreement"]["estimate"] == 1
    assert set(report["gold"]["where_only_this_differs"]) >= {"correct", "courteous"}
    assert all(part["estimate"] == 1 for part in report["gold"]["where_only_this_differs"].values())
    gaps = [row["gold_chosen"] - row["gold_rejected"] for row in lab]
    known = report["labeller"]
    assert known["ceiling"] == pytest.approx(label_ceiling(gaps, temperature=0.15, flip=0.1))
    assert known["expected_accuracy"]["estimate"] == pytest.approx(known["ceiling"])
    assert known["share_of_ceiling"]["estimate"] == pytest.approx(1)
    assert known["share_of_ceiling"]["low"] < 1 < known["share_of_ceiling"]["high"]
    assert report["accuracy"]["estimate"] == np.mean([gap > 0 for gap in gaps])
    margins = report["by_labeller_margin"]
    assert sum(group["pairs"] for group in margins) == 200
    assert margins[0]["estimate"] < margins[-1]["estimate"], "the labeller errs where the two are close"
    # What was never seen scores -1: every change makes it worse, and the ones that must not matter fail.
    assert all(probe["fell"]["estimate"] == 1 for probe in report["must_matter"].values())
    assert not report["must_not_matter"]["trailing_space"]["passed"]
    assert report["must_not_matter"]["padding"]["passed"]


def test_the_expected_accuracy_is_the_mean_over_fresh_labels(lab: Any, golds: Any) -> None:
    """A predictor that is right in half of the cases; by hand: mean of p where it agrees, else 1 - p."""
    scorer = Told(lambda ids: golds.get(tuple(ids), 0.0) * (1 if len(ids) % 2 else -1))
    report, scored = examine(scorer, lab, probes=10), score(scorer, lab)
    by_hand = [
        row["p_label"] if chosen > rejected else 0.5 if chosen == rejected else 1 - row["p_label"]
        for row, chosen, rejected in zip(lab, scored.chosen, scored.rejected, strict=True)
    ]
    assert report["labeller"]["expected_accuracy"]["estimate"] == pytest.approx(np.mean(by_hand))
    assert report["labeller"]["share_of_ceiling"]["estimate"] < 0.7


def test_who_counts_tokens_is_found_out(lab: Any) -> None:
    report = examine(Told(len), lab, probes=40)
    length = report["length"]
    assert length["longer_scores_more"]["estimate"] == 1
    assert length["spearman_within_pairs"] == pytest.approx(1)
    assert length["longer_is_chosen"]["estimate"] < 0.8
    assert report["must_matter"]["last sentence repeated"]["fell"]["estimate"] == 0
    assert report["must_matter"]["flattery added"]["fell"]["estimate"] == 0
    assert report["must_matter"]["cut before its end"]["fell"]["estimate"] == 1
    assert report["must_matter"]["flattery added"]["mean_change"] > 0


def test_scores_that_depend_on_the_batch_or_the_padding_are_found_out() -> None:
    class Careless(Told):
        def score_tokens(self, rows: Sequence[Sequence[int]]) -> list[float]:
            shift = 0.1 * (self.batch_size == 1) + 0.2 * (self.padding_side == "left")
            return [one + shift * (place % 2) for place, one in enumerate(super().score_tokens(rows))]

    rows = [{"prompt": "a", "chosen": f" {i}!", "rejected": " " + "b" * i} for i in range(1, 20)]
    probes = examine(Careless(len), rows)["must_not_matter"]
    assert not probes["padding"]["passed"]
    assert not probes["batch_size"]["passed"]
    assert probes["padding"]["largest"] == pytest.approx(2 * probes["batch_size"]["largest"])


# ---------------------------------------------------------------- reliability and groups


def test_reliability_by_hand() -> None:
    # Three pairs at 60 %, two of them right; two at 90 %, both right.
    low, high = math.log(0.62 / 0.38), math.log(0.92 / 0.08)
    found = reliability(np.array([low, low, -low, high, high]))
    assert [one["pairs"] for one in found["bins"]] == [3, 2]
    assert [one["estimate"] for one in found["bins"]] == [pytest.approx(2 / 3), 1]
    assert [one["probability"] for one in found["bins"]] == [pytest.approx(0.62), pytest.approx(0.92)]
    assert found["ece"] == pytest.approx((3 * (2 / 3 - 0.62) + 2 * 0.08) / 5)


def test_who_is_as_sure_as_right_has_a_small_error_and_twice_as_sure_a_large_one() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, 20_000)
    difference = np.where(rng.random(20_000) < 1 / (1 + np.exp(-np.abs(odds))), np.abs(odds), -np.abs(odds))
    assert reliability(difference)["ece"] < 0.02
    assert reliability(3 * difference)["ece"] > 0.08
    assert reliability(np.zeros(10))["ece"] == 0


def test_calibrated_scores_are_as_reliable_as_raw_ones(lab: Any, golds: Any) -> None:
    """sigmoid takes raw differences: what the calibration divided by is put back."""
    reports = [
        examine(Told(lambda ids: 9 * golds.get(tuple(ids), 0.0), calibration), lab, probes=5)
        for calibration in (None, Calibration(3.0, 4.0))
    ]
    assert reports[1]["reliability"]["ece"] == pytest.approx(reports[0]["reliability"]["ece"])
    assert reports[1]["log_loss"] == pytest.approx(reports[0]["log_loss"])
    assert reports[1]["must_matter"]["flattery added"]["mean_change"] == pytest.approx(
        reports[0]["must_matter"]["flattery added"]["mean_change"]
    )
    own = RewardModelScorer(reward_model(reward_mean=1.0, reward_std=2.5), tokenizer(), "own")
    raw = RewardModelScorer(reward_model(), tokenizer(), "raw")
    rows = [{"prompt": "a", "chosen": f" {i}!", "rejected": " b" * i} for i in range(1, 9)]
    assert score(own, rows).difference == pytest.approx(score(raw, rows).difference, abs=1e-4)


def test_groups_by_margin_never_part_equal_margins() -> None:
    margin = np.array([0.0] * 30 + [1.0] * 10 + list(np.linspace(2, 3, 60)))
    groups = by_quantile(margin, np.arange(100) % 2)
    assert sum(group["pairs"] for group in groups) == 100
    assert all(one["to"] < other["from"] for one, other in pairwise(groups))
    assert (groups[0]["pairs"], groups[0]["to"]) == (30, 0)


# ---------------------------------------------------------------- a real classifier


def test_a_real_classifier_passes_what_must_not_matter(lab: Any) -> None:
    report = examine(
        RewardModelScorer(reward_model(max_position_embeddings=256), tokenizer(), "tiny"), lab, probes=8
    )
    assert report["too_long"] > 0
    assert report["pairs"] + report["too_long"] == 200
    assert report["must_not_matter"]["padding"]["passed"]
    assert report["must_not_matter"]["batch_size"]["passed"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_what_cannot_be_examined_is_an_error(lab: Any) -> None:
    with pytest.raises(TrueupError, match="gives every reply the same score"):
        examine(Told(lambda ids: 1.0), lab[:20])
    with pytest.raises(TrueupError, match="none of the 5 pairs fits its context of 16 tokens"):
        examine(RewardModelScorer(reward_model(max_position_embeddings=16), tokenizer(), "tiny"), lab[:5])


# ---------------------------------------------------------------- for people


def test_the_summary_and_the_page_say_it(lab: Any, golds: Any, tmp_path: Path) -> None:
    known = examine(Told(lambda ids: golds.get(tuple(ids), -1.0)), lab, probes=20)
    text = "\n".join(summary(known))
    for said in (
        "exam on 200 held-out pairs",
        "100% of what can be learnt",
        "agrees with gold: all 100%",
        "trailing",
    ):
        assert said in text
    pairs = [{"prompt": "a", "chosen": f" {i}", "rejected": f" {i}{FLATTERY}"} for i in range(20)]
    unknown = examine(Told(len), pairs, probes=5)
    assert (unknown["gold"], unknown["labeller"], unknown["by_labeller_margin"]) == (None, None, None)
    assert "gold" not in "\n".join(summary(unknown))
    saved = save_exam(known, tmp_path)
    assert json.loads(saved.read_text()) == known
    draw(unknown, tmp_path / "unknown.png")
    assert min(path.stat().st_size for path in (saved.with_suffix(".png"), tmp_path / "unknown.png")) > 30_000


def test_the_command_examines_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trueup.app.cli import main

    directory = tmp_path / "reward"
    reward_model("llama").save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    rows = [{"prompt": f"q{i}", "chosen": f" {i}!", "rejected": " b" * i} for i in range(1, 40)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    words = ["exam", str(directory), "--dataset_name", str(data), "--test_split_size", "0.5"]
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--json"])
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert report["pairs"] > 10
    assert report["data"]["split"] == "test"
    assert json.loads((directory / "eval" / "exam.json").read_text()) == report
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--datset_config", "x"])
    assert "unknown key datset_config; did you mean dataset_config?" in capsys.readouterr().err
