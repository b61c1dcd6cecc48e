"""Real models and data on a small Hub: verified, pushed, and used again by their Hub ids."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_models import write_model
from hub_server import HubServer, connect, hub
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import SFTConfig

from trueup.app import cli, push_check
from trueup.app.models_pool import find_entries
from trueup.app.push_files import Parcel, gathered
from trueup.app.runner import run_stage
from trueup.base.stage import load_model, load_tokenizer, trainer_config
from trueup.eval.scorers import RewardModelScorer, resolve_scorer
from trueup.recipes.directory import open_directory
from trueup.recipes.errors import TrueupError
from trueup.recipes.run import open_run

# What somebody has who never heard of trueup: Transformers, datasets, and the Hub's address.
STRANGER = """
import sys
sys.modules["trueup"] = None
import json
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

pairs = load_dataset("ada/pairs")
assert {split: len(rows) for split, rows in pairs.items()} == {"train": 3, "validation": 2}, pairs
tokenizer = AutoTokenizer.from_pretrained("ada/chat", trust_remote_code=True)  # it would ask, on stdin
model = AutoModelForCausalLM.from_pretrained("ada/chat", trust_remote_code=True)
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "what is 3 times 3?"}], add_generation_prompt=True, return_tensors="pt",
    return_dict=True,
)
said = model.generate(**ids, max_new_tokens=8, do_sample=False)
with torch.inference_mode():
    logits = model(ids["input_ids"]).logits
torch.save((ids["input_ids"], logits, said), sys.argv[1])
"""


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub() as running:
        yield running


@pytest.fixture(autouse=True)
def connected(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(server, tmp_path / "cache", monkeypatch)


def trueup(*words: str) -> None:
    """The command, which must succeed."""
    with pytest.raises(SystemExit) as done:
        cli.main([*words])
    assert not done.value.code, words


def test_a_chat_model_and_its_pairs_go_round(
    tmp_path: Path, recipe: Callable[..., Any], server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """SFT that pushes itself; a stranger opens it; the next stage, chat and inspect take its Hub id."""
    trained = run_stage(recipe(name="chat", push_to_hub=True)).output_dir
    told = capsys.readouterr().out
    assert (
        "opens with the code beside it: AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq" in told
    )
    assert "logits equal; tied weights tied; one end of turn: <|end|> (2)" in told
    assert len(server.repository("ada/chat").messages) == 1  # by us, once, and not by the trainer

    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for split, count in {"train": 3, "validation": 2}.items():
        row = {"prompt": "a", "chosen": "b", "rejected": "c"}
        (pairs / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n" * count)
    trueup("push", str(pairs), "--to", "ada/pairs", "--yes")
    assert "load_dataset reads train 3, validation 2" in capsys.readouterr().out

    ids, logits, said = stranger(server, tmp_path)
    here = AutoModelForCausalLM.from_pretrained(trained).eval()
    with torch.inference_mode():
        assert torch.equal(here(ids).logits, logits)
    assert torch.equal(here.generate(ids, max_new_tokens=8, do_sample=False), said)

    trueup("chat", "ada/chat", "--prompt", "what is 2 times 2?", "--max-tokens", "4", "--json")
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    trueup("inspect", "ada/chat")
    commit = server.repository("ada/chat").branches["main"]
    assert commit in capsys.readouterr().out.replace("\n", "")
    run, stage = open_run(recipe(name="again", model_name_or_path="ada/chat"))
    parent = run.parents["model_name_or_path"].lineage
    assert parent["path"] == f"ada/chat@{commit}"
    assert parent["identity"] == open_directory(trained).identity
    for ours, theirs in zip(load_model(stage).parameters(), here.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert load_tokenizer(stage).chat_template


def stranger(server: HubServer, folder: Path) -> Any:
    result = folder / "stranger.pt"
    settings = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "stranger")}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-I", "-c", STRANGER, str(result)]
    subprocess.run(command, env={**os.environ, **settings}, cwd=folder, stdin=subprocess.DEVNULL, check=True)
    return torch.load(result)


def test_a_reward_model_opens_as_a_classifier(tmp_path: Path, server: HubServer) -> None:
    reward = write_model(tmp_path / "reward", "reward", kind="reward")
    trueup("push", str(reward), "--to", "ada/reward", "--yes")
    model = AutoModelForSequenceClassification.from_pretrained("ada/reward").eval()
    ids = torch.tensor([[1, 30, 40, 2]])
    with torch.inference_mode():
        here = AutoModelForSequenceClassification.from_pretrained(reward).eval()(ids).logits
        assert torch.equal(model(ids).logits, here)

    by_id = resolve_scorer("ada/reward")
    assert by_id.name == "reward"
    assert by_id(["a"], ["b"]) == RewardModelScorer.open(reward)(["a"], ["b"])

    assert [entry.kind for entry in find_entries(["ada/reward"])] == ["reward"]


@pytest.mark.slow
def test_an_exported_form_needs_no_code(
    tmp_path: Path, base: Path, server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    trueup("export", str(base), "--to", "llama", "--output", str(tmp_path / "llama"))
    trueup("push", str(tmp_path / "llama"), "--to", "ada/llama", "--yes")
    assert "opens without remote code: AutoConfig, AutoModel, AutoModelForCausalLM" in capsys.readouterr().out
    files = server.repository("ada/llama").files()
    assert not [name for name in files if name.endswith(".py")]


@pytest.mark.slow
def test_what_does_not_open_elsewhere_stays_here(tmp_path: Path, base: Path, server: HubServer) -> None:
    """Code that leans on trueup works here, and nowhere else."""
    model = tmp_path / "leaning"
    model.mkdir()
    for path in base.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    code = model / "modeling_gpt.py"
    code.write_text(code.read_text() + "\nfrom trueup.base import GPTConfig as _\n")
    with gathered(model, "ada/leaning") as parcel, pytest.raises(TrueupError, match=r"not installed.*trueup"):
        push_check.verify(parcel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos": {"tokenizer": None}}, "has no eos token"),
        ({"eos": {"tokenizer": 2, "config": 2, "generation_config": None}}, r"generation_config\.json: eos"),
        ({"eos": {"tokenizer": 2, "config": 0, "generation_config": [2, 7]}}, r"^config\.json: eos"),
        ({"tied": False}, "tie_word_embeddings"),
        ({"missing": ["lm_head.weight"]}, r"lm_head\.weight would be newly initialised"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_model_is_named(change: dict[str, Any], message: str) -> None:
    eos = {"tokenizer": 2, "config": 2, "generation_config": [7, 2]}
    sound = {"missing": [], "wants_tied": True, "tied": True, "eos": eos, "eos_token": "<|end|>"}
    assert push_check._problems(sound, "causal-lm") == []
    (problem,) = push_check._problems(sound | change, "causal-lm")
    assert re.search(message, problem)


def test_weights_that_change_on_the_way_are_noticed(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.inference_mode():
        logits = model(push_check.push_probe.probe_ids(model.config)).logits
    parcel = Parcel(base, base, "model", (), "")
    for shift, found in ((0.0, 0), (1e-7, 0), (0.1, 1)):
        save_file({"logits": logits + shift}, tmp_path / "logits")
        assert len(push_check._differing(parcel, "causal-lm", tmp_path / "logits")) == found


def test_the_trainer_never_pushes(tmp_path: Path, recipe: Callable[..., Any]) -> None:
    made = recipe(name="out", push_to_hub=True, hub_model_id="ada/x")
    assert trainer_config(SFTConfig, made.values, tmp_path).push_to_hub is False


def test_rows_that_cannot_be_read_stay_here(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(SystemExit) as done:
        cli.main(["push", str(path), "--to", "ada/rows", "--yes"])
    assert done.value.code == 1
