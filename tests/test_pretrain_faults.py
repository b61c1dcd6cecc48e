"""Pretraining in processes of its own: killed without warning, stopped by a signal, shared by two of them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trueup.recipes.directory import identity

LAUNCHER = """
import sys
from trueup.recipes.errors import TrueupError
from trueup.recipes.reader import read_recipe
from trueup.recipes.run import open_run
run, stage = open_run(read_recipe(sys.argv[1]))
try:
    with run.working():
        stage.run(run)
except TrueupError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Writes a recipe over a small corpus; JSON is YAML."""
    rng = np.random.default_rng(0)
    words = ["the", "a", "cat", "dog", "sat", "ran", "flew", "on", "under", "old", "tree"]
    corpus, launcher = tmp_path / "corpus.txt", tmp_path / "launcher.py"
    corpus.write_text("\n\n".join(" ".join(rng.choice(words, 40)) + "." for _ in range(2_000)))
    launcher.write_text(LAUNCHER)

    def write(name: str, **changes: Any) -> list[str]:
        values = {
            "stage": "pretrain", "dataset_name": str(corpus), "output_dir": str(tmp_path / name),
            "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_length": 32, "max_steps": 400, "per_device_train_batch_size": 4, "save_steps": 5,
            "eval_steps": 100, "residual_dropout": 0.1, "sample_prompts": [], "use_cpu": True, "bf16": False,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(values | changes))
        return [str(launcher), str(path)]

    return write


def start(command: list[str], tmp_path: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(command: list[str], tmp_path: Path) -> str:
    process = start(command, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def wait_for(process: subprocess.Popen[str], condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.faults
def test_killed_at_ten_random_moments_it_ends_with_the_same_weights(recipe: Any, tmp_path: Path) -> None:
    whole = recipe("whole")
    finish(whole, tmp_path)
    command, work = recipe("killed"), tmp_path / "killed.work"
    draw = random.Random(0)
    kills = resumes = 0
    while kills < 10:
        process = start(command, tmp_path)
        if kills % 5 == 4:  # two of the ten fall before the first step
            time.sleep(draw.uniform(1, 5))
        else:
            before = newest(work)
            wait_for(process, lambda: newest(work) > before)  # noqa: B023
            time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        out, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
        resumes += "resuming from" in out
        kills += 1
    assert "resuming from" in finish(command, tmp_path)
    assert resumes >= 5
    assert identity(tmp_path / "killed") == identity(tmp_path / "whole")


def newest(work: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in work.glob("checkpoint-*")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_work_and_says_how_to_go_on(recipe: Any, tmp_path: Path, number: int) -> None:
    command, work = recipe("out", save_steps=1_000, logging_steps=1), tmp_path / "out.work"
    process = start(command, tmp_path)
    wait_for(process, lambda: (work / "log.jsonl").exists() and (work / "log.jsonl").stat().st_size > 0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "a checkpoint was written: run the same command again" in err
    assert f"resuming from {work}/checkpoint-{newest(work)}" in finish(command, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_what_one_with_twice_the_batch_does(
    recipe: Any, tmp_path: Path, accumulation: int
) -> None:
    same = {"max_steps": 20, "save_steps": 10, "residual_dropout": 0.0}
    finish(recipe("one", per_device_train_batch_size=8, **same), tmp_path)
    two = recipe(
        "two",
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        **same,
    )
    finish(["-m", "torch.distributed.run", "--nproc_per_node", "2", *two], tmp_path)
    records = [json.loads((tmp_path / name / "trueup.json").read_text()) for name in ("one", "two")]
    assert records[0]["tokens"] == records[1]["tokens"]
    one, other = (record["metrics"] for record in records)
    assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_is_saved_under_its_plain_names(recipe: Any, tmp_path: Path) -> None:
    finish(recipe("compiled", torch_compile=True, max_steps=10, residual_dropout=0.0), tmp_path)
    finish(recipe("plain", max_steps=10, residual_dropout=0.0), tmp_path)
    compiled, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("compiled", "plain"))
    assert compiled.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5)
