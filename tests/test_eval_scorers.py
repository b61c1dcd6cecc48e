"""Scorers: found by name, checked, and a reward model's score is its own whatever it is batched with."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_models import config, policy, reward_model, tokenizer
from transformers import LlamaForSequenceClassification
from trl.trainer.utils import get_callable_name

from trueup.eval.rendering import as_completions, encode_pair, encode_prompt
from trueup.eval.scorers import Calibration, FunctionScorer, RewardModelScorer, resolve_scorer
from trueup.recipes.directory import identity, write_json
from trueup.recipes.errors import TrueupError, UsageError

CHAT = [{"role": "user", "content": "Why?"}]
PROMPTS: list[Any] = ["Say a", CHAT, "b", CHAT, "x" * 30, "y"]
COMPLETIONS: list[Any] = [" word", [{"role": "assistant", "content": "Because."}], "", "So.", " z", "!" * 40]


def save(model: Any, path: Path, record: dict[str, Any] | None = None) -> Path:
    """A model directory, with a trueup.json if there is a record."""
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    if record is not None:
        write_json(path / "trueup.json", {"identity": identity(path), "stage": "reward"} | record)
    return path


# ------------------------------------------------------------------------------------------------- by name


def test_gold_is_the_labs_and_wants_its_columns() -> None:
    with pytest.raises(TrueupError, match=r"gold: column '.*' is missing"):
        resolve_scorer("gold")(["p"], ["a"], ended=[True])


def test_registered_and_imported_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_scorer("length")(
        ["p", CHAT], ["two words", [{"role": "assistant", "content": "one"}]]
    ) == [2, 1]
    (tmp_path / "my_rewards.py").write_text(
        "def exact(prompts, completions, answer, **columns):\n"
        "    return [None if a is None else float(c == a) for c, a in zip(completions, answer)]\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    scorer = resolve_scorer("my_rewards:exact")
    found = scorer(["p", "p", "p"], ["4", "5", "6"], answer=["4", "4", None], unused=[1, 2, 3])
    assert found[:2] == [1, 0]
    assert math.isnan(found[2])
    assert scorer.name == get_callable_name(scorer) == "my_rewards:exact"
    with pytest.raises(UsageError, match=r"recipe.yaml:3: my_rewards:number: is not a function"):
        resolve_scorer("my_rewards:number", place="recipe.yaml:3")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "no such scorer; give a reward model's directory"),
        ("runs/reward", "no such model directory"),
        ("no_such_module:f", "cannot be imported"),
        ("math:no_such_function", "cannot be imported"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_scorer(name)


@pytest.mark.parametrize("returned", [[1.0], 3.0, ["good", "bad"]])
def test_a_function_that_does_not_return_a_number_per_completion_is_told(returned: Any) -> None:
    with pytest.raises(UsageError, match=r"mine: (returned 1 scores for 2|must return a list of numbers)"):
        FunctionScorer(lambda **columns: returned, "mine")(["p", "p"], ["a", "b"])


# ----------------------------------------------------------------------------------------------- rendering


def test_pairs_are_the_tokens_of_the_template_and_end_with_eos() -> None:
    tok = tokenizer()
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = encode_pair(tok, prompt, completion)
        assert ids[0] == tok.bos_token_id
        assert ids[-1] == tok.eos_token_id
        assert ids[: len(encode_prompt(tok, prompt))] == encode_prompt(tok, prompt)
        assert encode_pair(tok, prompt, completion, ended=False) == ids[:-1]
    begun = [*CHAT, {"role": "assistant", "content": "Bec"}]
    assert encode_prompt(tok, begun) == encode_pair(tok, CHAT, "Bec", ended=False)
    assert as_completions(["p", CHAT], ["a", "b"]) == ["a", [{"role": "assistant", "content": "b"}]]


def test_an_eos_written_in_plain_text_is_not_doubled() -> None:
    tok = tokenizer()
    assert encode_pair(tok, "p", "a" + tok.eos_token) == encode_pair(tok, "p", "a")


# ------------------------------------------------------------------------------------------- reward models


@pytest.mark.parametrize("family", ["gpt", "llama", "gpt2"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_score_is_the_same_alone_batched_and_padded_on_either_side(
    family: str, padding_side: Any, batch_size: int
) -> None:
    model = reward_model(family)
    scorer = RewardModelScorer(model, tokenizer(), "rm", batch_size=batch_size, padding_side=padding_side)
    found = scorer(PROMPTS, COMPLETIONS)
    assert len(set(found)) == len(PROMPTS)
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, found, strict=True):
        ids = torch.tensor([encode_pair(tokenizer(), prompt, completion)])
        with torch.no_grad():
            assert score == pytest.approx(model(ids).logits.item(), abs=2e-4)


def test_a_cut_reply_is_scored_without_its_end() -> None:
    scorer = RewardModelScorer(reward_model(), tokenizer(), "rm")
    whole, cut = scorer(["p", "p"], ["a", "a"], ended=[True, False])
    assert whole == pytest.approx(scorer(["p"], ["a"])[0], abs=1e-4)
    assert cut == pytest.approx(scorer.score_tokens([encode_pair(tokenizer(), "p", "a")[:-1]])[0], abs=1e-4)
    assert abs(whole - cut) > 0.01


def test_a_tokenizer_without_pad_token_scores_one_by_one() -> None:
    model = reward_model("gpt2")
    model.config.pad_token_id = None
    bare = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<|end|>")
    assert bare.pad_token_id is None
    found = RewardModelScorer(model, bare, "rm")(["Say a", "b"], [" word", "cd"])
    expected = RewardModelScorer(reward_model("gpt2"), tokenizer(), "rm")(["Say a", "b"], [" word", "cd"])
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_row_longer_than_the_context_is_named() -> None:
    scorer = RewardModelScorer(reward_model(), tokenizer(), "rm")
    with pytest.raises(UsageError, match="rm: row 1 has 203 tokens, and the model's context is 128"):
        scorer(["p", "p"], ["a", "b" * 200])


def test_conversations_need_a_chat_template() -> None:
    bare = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<|end|>")
    with pytest.raises(UsageError, match="no chat template"):
        RewardModelScorer(reward_model(), bare, "rm")([CHAT], ["a"])


# --------------------------------------------------------------------------------------------- calibration


def test_our_own_calibration_is_read_through_the_model(tmp_path: Path) -> None:
    raw = RewardModelScorer(reward_model(), tokenizer(), "rm")(PROMPTS, COMPLETIONS)
    calibration = Calibration.of(raw)
    model = reward_model()
    model.config.reward_mean, model.config.reward_std = calibration.mean, calibration.std
    path = save(model, tmp_path / "rm", record={"metrics": {"reward_mean": 5.0, "reward_std": 5.0}})
    found = torch.tensor(resolve_scorer(str(path))(PROMPTS, COMPLETIONS))
    assert found.mean() == pytest.approx(0, abs=1e-4)
    assert found.std(correction=0) == pytest.approx(1, abs=1e-4)
    calibration.save(path / "calibration.json")
    with pytest.raises(UsageError, match="applies its own calibration"):
        resolve_scorer(str(path))


def test_a_foreign_model_is_calibrated_by_a_file_or_its_record_and_not_modified(
    tmp_path: Path,
) -> None:
    path = save(reward_model("llama"), tmp_path / "foreign")
    before = identity(path)
    raw = resolve_scorer(str(path))(PROMPTS, COMPLETIONS)
    write_json(path / "trueup.json", {"identity": before, "metrics": {"reward_mean": 1.0, "reward_std": 2.0}})
    assert resolve_scorer(str(path))(PROMPTS, COMPLETIONS) == pytest.approx(
        [(score - 1) / 2 for score in raw]
    )
    Calibration(mean=3.0, std=0.5).save(path / "calibration.json")
    assert resolve_scorer(str(path))(PROMPTS, COMPLETIONS) == pytest.approx(
        [(score - 3) / 0.5 for score in raw]
    )
    Calibration(mean=0.0, std=1.0).save(tmp_path / "elsewhere.json")
    elsewhere = resolve_scorer(str(path), calibration=tmp_path / "elsewhere.json")
    assert elsewhere(PROMPTS, COMPLETIONS) == pytest.approx(raw)
    assert identity(path) == before


def test_a_calibration_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(TrueupError, match="standard deviation 0"):
        Calibration.of([2.0, 2.0])
    path = save(reward_model("llama"), tmp_path / "foreign")
    (path / "calibration.json").write_text(json.dumps({"mean": 1.0}))
    with pytest.raises(TrueupError, match="must hold"):
        resolve_scorer(str(path))


# ------------------------------------------------------------------------------------------- untrained heads


def test_a_head_that_would_be_newly_initialised_is_refused(tmp_path: Path) -> None:
    path = save(policy("llama"), tmp_path / "sft")
    with pytest.raises(UsageError, match="is a language model, and this needs a reward model"):
        resolve_scorer(str(path), place="r.yaml:2")
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(written | {"architectures": ["LlamaForSequenceClassification"]})
    )
    with pytest.raises(TrueupError, match=r"its weights lack score.weight, which would be newly initialised"):
        resolve_scorer(str(path))


def test_our_own_reward_model_needs_a_record_of_its_training(tmp_path: Path) -> None:
    path = save(reward_model(), tmp_path / "rm")
    with pytest.raises(TrueupError, match=r"no trueup.json says that this reward model was trained"):
        resolve_scorer(str(path))


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path: Path) -> None:
    path = save(LlamaForSequenceClassification(config("llama", num_labels=3)), tmp_path / "classifier")
    with pytest.raises(TrueupError, match="gives 3 scores per text"):
        resolve_scorer(str(path))
