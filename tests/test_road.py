"""The whole road at the smoke budget: killed anywhere it ends the same, and others can go on from there."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trueup.recipes.directory import identity

ROOT = Path(__file__).resolve().parent.parent
ROAD = [sys.executable, "-m", "trueup.app", "run", str(ROOT / "recipes" / "lab"), "--budget", "smoke"]
ENDS = tuple(
    f"runs/lab.smoke/{stage}" for stage in ("base", "sft", "pairs", "reward", "dpo", "ppo", "compare")
)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the road was walked without a stop."""
    desk = tmp_path_factory.mktemp("walked")
    subprocess.run(ROAD, cwd=desk, check=True, capture_output=True, timeout=900)
    return desk


def _walk_with_kills(desk: Path, chance: random.Random, kills: int, whole_group: bool) -> None:
    """Start the road, kill -9 it at a random moment, and again; then let it end."""
    for _ in range(kills):
        child = subprocess.Popen(
            ROAD, cwd=desk, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            child.wait(timeout=chance.uniform(3, 40))
        except subprocess.TimeoutExpired:
            (os.killpg if whole_group else os.kill)(child.pid, signal.SIGKILL)
            child.wait()
    subprocess.run(ROAD, cwd=desk, check=True, capture_output=True, timeout=900)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("whole_group", [True, False], ids=["all of it", "only the runner"])
def test_killed_anywhere_the_road_ends_the_same(walked: Path, tmp_path: Path, whole_group: bool) -> None:
    _walk_with_kills(tmp_path, random.Random(whole_group), kills=5, whole_group=whole_group)
    for end in ENDS:
        assert identity(tmp_path / end) == identity(walked / end)
    assert not list(tmp_path.rglob(".*.partial-*")) or whole_group


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_machine_with_torch_and_transformers_only_can_chat(walked: Path, tmp_path: Path) -> None:
    """A fresh virtual environment without trueup opens the directory by its own code."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
    python = tmp_path / "venv" / "bin" / "python"
    pins = ["-c", str(ROOT / "constraints.txt")]
    for packages in (["torch", "numpy"], ["transformers", "jinja2"]):  # torch first, see the Makefile
        subprocess.run([python, "-m", "pip", "install", "-q", *pins, *packages], check=True, timeout=900)
    code = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
messages = [{"role": "user", "content": "What is 2 plus 3?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
made = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(type(model).__module__.split(".")[0], made.shape[1] - inputs["input_ids"].shape[1])
try:
    import trueup
except ImportError:
    print("without trueup")
"""
    done = subprocess.run(
        [python, "-c", code, str(walked / ENDS[1])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    module, count = done.stdout.splitlines()[0].split()
    assert module == "transformers_modules"
    assert 1 <= int(count) <= 8
    assert "without trueup" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trl_s_own_command_goes_on_from_it(walked: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(16)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.time()
    subprocess.run(
        [
            Path(sys.executable).with_name("trl"), "sft", "--model_name_or_path", str(walked / ENDS[1]),
            "--trust_remote_code", "true", "--dataset_name", str(tmp_path / "data"),
            "--output_dir", str(tmp_path / "out"),
            "--use_cpu", "true", "--bf16", "false", "--max_steps", "2", "--assistant_only_loss", "true",
        ],
        cwd=tmp_path, check=True, timeout=600, capture_output=True,
    )  # fmt: skip
    written = tmp_path / "out" / "model.safetensors"
    assert written.stat().st_mtime >= started
    assert (tmp_path / "out" / "modeling_gpt.py").exists()
