"""`trueup bench ppo`: contestants start alike, take turns, and are judged by the right figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from trueup.app import bench_ppo, bench_ppo_learning
from trueup.app.bench_ppo import Contestant, Shape
from trueup.recipes.errors import TrueupError

TINY = Shape(width=16, layers=1, vocab=300, mean_length=6)


def test_completions_end_after_about_as_many_tokens_as_asked(tmp_path: Path) -> None:
    models = bench_ppo.write_models(tmp_path, TINY)
    policy = AutoModelForCausalLM.from_pretrained(models["policy"])
    with torch.no_grad():
        chances = policy(torch.randint(30, 270, (8, 40))).logits.softmax(-1)[..., policy.config.eos_token_id]
    assert 1 / chances.mean().item() == pytest.approx(6, rel=0.2)


def test_verdicts_compare_like_with_like() -> None:
    seconds = {
        "trueup fp32": 2.0,
        "trl fp32": 4.0,
        "trueup bf16": 1.0,
        "trl bf16": 3.0,
        "trueup, shared trunk": 0.5,
    }
    memory = {name: 2**20 * number for number, name in enumerate(seconds, start=1)}
    phases = {name: dict.fromkeys(bench_ppo.PHASES, 0.1) if "trl" not in name else {} for name in seconds}
    result, table = bench_ppo._verdict(seconds, memory, phases, "cpu", {})
    assert result.ratio == 3
    assert result.dtype == "bf16"
    assert result.ours == bench_ppo.ROWS
    ratios = {name: found["speed"] for name, found in result.settings["ratios"].items()}
    assert list(ratios.values()) == [2, 3, 8]
    assert table.row_count == 8
    half = {name: number for name, number in seconds.items() if "bf16" not in name}
    assert bench_ppo._verdict(half, memory, phases, "cpu", {})[0].ratio == 2


def test_ours_takes_turns_and_is_timed(tmp_path: Path) -> None:
    models = bench_ppo.write_models(tmp_path, TINY)
    one = Contestant("ours", "trueup")
    shared = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "total_episodes": 12,
        "response_length": 6, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    spec: dict[str, Any] = {**models, "settings": one.settings(shared), "paced": True, "seeds": []}
    with bench_ppo.started(one, spec, tmp_path / "unused", tmp_path) as process:
        before = process.answer()["memory"]
        turns = [process.turn() for _ in range(2)]
    assert all(0 < turn["seconds"] < 30 for turn in turns)
    for turn in turns:
        assert tuple(turn["phases"]) == bench_ppo.PHASES
        assert all(seconds > 0 for seconds in turn["phases"].values())
        assert sum(turn["phases"].values()) == pytest.approx(turn["seconds"])
    assert turns[-1]["memory"] >= turns[0]["memory"] >= before > 0
    spec["settings"]["kl_coeff"] = 0.1
    with (
        bench_ppo.started(one, spec, tmp_path / "unused", tmp_path) as process,
        pytest.raises(TrueupError, match=r"ours ended: (.|\n)*kl_coeff"),
    ):
        process.answer()
        process.turn()


def test_curves_are_read_from_either_log() -> None:
    """TRL's `objective/scores` has what a missing eos costs taken off, ours has not."""
    line = {"objective/kl": 2.0, "objective/rlhf_reward": 0.9, "objective/non_score_reward": -0.1}
    curve = bench_ppo_learning.Curve.of([line | {"objective/scores": 7.0}, {"train_loss": 1.0}])
    assert curve.score == [1.0]
    assert curve.kl == [2.0]
    assert curve.objective == [0.9]


def test_the_picture_and_the_verdict_of_learning(tmp_path: Path) -> None:
    def runs(end: float) -> list[bench_ppo_learning.Curve]:
        return [
            bench_ppo_learning.Curve(
                [end * t for t in range(8)], [0.1] * 8, [end * t + noise for t in range(8)]
            )
            for noise in (-0.1, 0.1)
        ]

    curves = {"trueup": runs(1.0), "trueup, shared trunk": runs(0.5), "trl 1.12": runs(1.0)}
    bench_ppo_learning.draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    figures, _ = bench_ppo_learning._verdict(curves, seeds=2)
    assert figures["no_worse"] == {"trueup": True, "trueup, shared trunk": False}
    assert json.loads(json.dumps(figures))["final"]["trueup"]["objective"] == pytest.approx(5)


def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ppo, "TRL", str(tmp_path / "no-such-wheel.whl"))
    with pytest.raises(TrueupError, match="could not be installed"):
        bench_ppo.peer_python(tmp_path / "environment")
    assert not (tmp_path / "environment" / "borrows-from").exists()


def test_an_environment_finds_its_own_packages_before_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess[str]([], 0)
    monkeypatch.setattr(bench_ppo.subprocess, "run", lambda command, **_: done)
    python = bench_ppo.peer_python(tmp_path / "environment")
    site = next((tmp_path / "environment").rglob("site-packages"))
    (site / "trl.py").write_text("name = 'the old one'")
    monkeypatch.undo()
    code = "import trl, packaging; print(trl.name, packaging.__file__)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.startswith("the old one")
    assert sys.prefix in found.stdout
