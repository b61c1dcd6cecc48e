"""A GPT that is not ours walks the road of recipes/lab; every command imports its module by name."""

import os
import subprocess
import sys
from pathlib import Path

import own_gpt
import pytest
import torch

from trueup.base.tokenizer import default_generation_config, train_tokenizer
from trueup.recipes.directory import read_json
from trueup.recipes.lab import datasets

ROOT = Path(__file__).resolve().parent.parent


def write_untrained(path: Path) -> None:
    """The GPT with fresh weights, and a tokenizer of the lab's text."""
    texts = [row["text"] for row in datasets.rows("lab/text", "train", documents=500)]
    tokenizer = train_tokenizer(texts, vocab_size=1024, model_max_length=128)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    model = own_gpt.OwnForCausalLM(own_gpt.OwnConfig(vocab_size=len(tokenizer), **ids))
    model.generation_config = default_generation_config(tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def trueup(desk: Path, *words: str) -> None:
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "trueup.app", *words], cwd=desk, capture_output=True, text=True, timeout=600,
        env=os.environ | {"TRUEUP_IMPORT": "own_gpt", "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_lab_road(tmp_path: Path) -> None:
    write_untrained(tmp_path / "untrained")
    # Text is a data form of the SFT stage, too: what pretrains a class that is not ours.
    trueup(
        tmp_path, "sft", "--model_name_or_path", "untrained", "--output_dir", "runs/lab.smoke/base",
        "--dataset_name", "lab/text", "--dataset_options", "{documents: 500}", "--dataset_form", "text",
        "--packing", "true", "--max_length", "128", "--max_steps", "6", "--learning_rate", "3e-3",
        "--eval_strategy", "no",
    )  # fmt: skip
    # Enough for answers that end: pairs are not made of others.
    flags = {"sft": ["--learning_rate", "1e-2", "--num_train_epochs", "4"]}
    for stage in ("sft", "pairs", "reward", "dpo", "ppo", "compare"):
        recipe = str(ROOT / "recipes" / "lab" / f"{stage}.yaml")
        trueup(tmp_path, "run", recipe, "--budget", "smoke", *flags.get(stage, []))
    for stage in ("base", "sft", "dpo", "ppo"):
        config = read_json(tmp_path / "runs" / "lab.smoke" / stage / "config.json")
        assert config["architectures"] == ["OwnForCausalLM"]
    record = read_json(tmp_path / "runs" / "lab.smoke" / "dpo" / "trueup.json")
    assert record["parents"]["model_name_or_path"]["stage"] == "sft"
