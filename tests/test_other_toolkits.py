"""TRL's command, PEFT and lm-eval's take our directories as they are, where trueup cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness_models import quiz
from offline_models import PAIRS
from sft_models import ROWS, recipe_maker, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueup.eval.harness import EvalSettings, evaluate, figures
from trueup.eval.harness_tasks import load_tasks
from trueup.recipes.directory import read_json

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """A chat model as `trueup sft` with LoRA leaves it: merged, its adapter beside it."""
    desk = tmp_path_factory.mktemp("stage")
    return run(recipe_maker(desk, base)(use_peft=True, learning_rate=3e-2, max_steps=4))


def elsewhere(desk: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """A command of another package, in an environment whose `trueup` cannot be imported."""
    (desk / "site").mkdir(exist_ok=True)
    (desk / "site" / "trueup.py").write_text("raise ModuleNotFoundError('there is no trueup here')")
    environment = os.environ | {"PYTHONPATH": str(desk / "site"), "HF_HOME": str(desk / "cache")}
    done = subprocess.run(
        [str(word) for word in command], cwd=desk, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def trl(desk: Path, stage: str, model: Path, rows: list[dict[str, Any]], *flags: str) -> Path:
    (desk / "data").mkdir()
    (desk / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elsewhere(
        desk, BIN / "trl", stage, "--model_name_or_path", model, "--trust_remote_code", "true",
        "--dataset_name", desk / "data", "--output_dir", desk / "out", "--max_steps", "1",
        "--per_device_train_batch_size", "4", "--max_length", "64", "--use_cpu", "true", "--bf16", "false",
        "--report_to", "none", "--disable_tqdm", "true", *flags,
    )  # fmt: skip
    written = {path.name for path in (desk / "out").iterdir()}
    assert {"model.safetensors", "modeling_gpt.py", "configuration_gpt.py", "tokenizer.json"} <= written
    return desk / "out"


def test_trl_sft_goes_on_from_it(directory: Path, tmp_path: Path) -> None:
    out = trl(tmp_path, "sft", directory, ROWS[:8], "--assistant_only_loss", "true")
    assert read_json(out / "config.json")["architectures"] == ["GPTForCausalLM"]


@pytest.mark.slow
def test_trl_dpo_goes_on_from_it(directory: Path, tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in PAIRS[:8]]
    out = trl(tmp_path, "dpo", directory, rows)
    assert read_json(out / "config.json")["architectures"] == ["GPTForCausalLM"]


@pytest.mark.slow
def test_trl_reward_puts_a_head_on_it(directory: Path, tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in PAIRS[:8]]
    out = trl(tmp_path, "reward", directory, rows)
    config = read_json(out / "config.json")
    assert config["architectures"] == ["GPTForSequenceClassification"]
    assert config["auto_map"]["AutoModelForSequenceClassification"].endswith("GPTForSequenceClassification")


CHAT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
messages = [{"role": "user", "content": "what is 2 times 2?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
made = model.generate(**inputs, max_new_tokens=8, do_sample=False)
assert type(model).__module__.startswith("transformers_modules")
assert 1 <= made.shape[1] - inputs["input_ids"].shape[1] <= 8
for package in ("trueup", "trl", "peft", "datasets", "accelerate"):
    try:
        __import__(package)
    except ImportError:
        continue
    raise SystemExit(package + " is here")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_machine_with_torch_and_transformers_only_can_chat(directory: Path, tmp_path: Path) -> None:
    """A fresh virtual environment opens the directory by the code in it."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=300)
    python = tmp_path / "venv" / "bin" / "python"
    for packages in (["torch", "numpy"], ["transformers", "jinja2"]):  # torch first, see the Makefile
        pinned = ["-c", ROOT / "constraints.txt", *packages]
        subprocess.run([python, "-m", "pip", "install", "-q", *pinned], check=True, timeout=900)
    elsewhere(tmp_path, python, "-c", CHAT, directory)


PEFT = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

base, directory = sys.argv[1:]
trust = {"trust_remote_code": True}
probe = torch.arange(40)[None] + 30
merged = AutoModelForCausalLM.from_pretrained(directory, **trust).eval()
plain = AutoModelForCausalLM.from_pretrained(base, **trust).eval()
before = plain(probe).logits
adapted = PeftModel.from_pretrained(plain, directory + "/adapter").eval()
for model in (adapted, AutoPeftModelForCausalLM.from_pretrained(directory + "/adapter", **trust).eval()):
    assert type(model.get_base_model()).__module__.startswith("transformers_modules")
    torch.testing.assert_close(model(probe).logits, merged(probe).logits, atol=2e-5, rtol=0)
assert (before - merged(probe).logits).abs().max() > 0.01
"""


def test_plain_peft_opens_the_adapter(directory: Path, base: Path, tmp_path: Path) -> None:
    elsewhere(tmp_path, sys.executable, "-c", PEFT, base, directory)


@pytest.mark.slow
def test_lm_evals_own_command_gives_our_figures(directory: Path, tmp_path: Path) -> None:
    questions = [
        {"question": f"what is {i} times {i}?", "choices": [f"it is {i * i}", f"{i} indeed it is"], "gold": 0}
        for i in range(40)
    ]
    task = quiz(tmp_path, rows=questions)
    elsewhere(
        tmp_path, BIN / "lm_eval", "run", "--model", "hf", "--tasks", task, "--device", "cpu",
        "--model_args", f"pretrained={directory},trust_remote_code=True,dtype=float32,add_bos_token=True",
        "--output_path", tmp_path / "results",
    )  # fmt: skip
    [written] = (tmp_path / "results").rglob("results*.json")
    theirs = read_json(written)["results"]["quiz"]
    opened = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ours = {f.metric: f.value for f in figures(evaluate(*opened, load_tasks([str(task)])[0], EvalSettings()))}
    assert 0 < ours["acc"] < 1
    assert ours == {name: theirs[f"{name},none"] for name in ("acc", "acc_norm")}
