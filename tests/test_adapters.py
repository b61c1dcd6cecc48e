"""LoRA: the merged model is the adapted one, and what could not be merged rightly is refused beforehand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sft_models import run, write_base
from transformers import AutoModelForCausalLM
from typer import Typer
from typer.testing import CliRunner

from trueup.app.merge import merge as merge_command
from trueup.base import adapters
from trueup.base.adapters import merge_directory
from trueup.recipes.directory import identity, read_json
from trueup.recipes.errors import TrueupError, UsageError

PROBE = {"input_ids": torch.arange(40)[None] + 30}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**PROBE).logits


def adapted(base: Path, directory: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(directory / "adapter"))


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_r": 4, "lora_alpha": 8},
    "dora, bf16": {"use_dora": True, "bf16": True},
    "some modules, packed": {"lora_target_modules": ["o_proj", "down_proj"], "packing": True},
    "one module": {"lora_target_modules": ["o_proj"]},
    "a pattern": {"lora_target_modules": [r".*layers\.1\..*_proj"]},
    "embedding and head whole": {"lora_modules_to_save": ["embed_tokens"]},
    "checkpointed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("keys", KINDS.values(), ids=KINDS)
def test_the_directory_is_the_adapted_model_merged(recipe: Any, base: Path, keys: dict[str, Any]) -> None:
    directory = run(recipe(use_peft=True, learning_rate=3e-2, **keys))
    merged, separate = AutoModelForCausalLM.from_pretrained(directory), adapted(base, directory)
    torch.testing.assert_close(logits(merged), logits(separate), atol=2e-5, rtol=0)
    change = logits(merged) - logits(AutoModelForCausalLM.from_pretrained(base))
    assert change.abs().max() > 0.05
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert read_json(directory / "config.json")["tie_word_embeddings"] is True
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_a_stopped_adapter_run_goes_on_to_the_same_bits(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from trueup.sft.trainer import SFTTrainer

    whole = run(recipe(name="whole", use_peft=True))
    step, usual = [0], SFTTrainer.training_step

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        step[0] += 1
        if step[0] == 4:
            raise RuntimeError("killed")
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", failing)
    with pytest.raises(RuntimeError, match="killed"):
        run(recipe(name="broken", use_peft=True))
    assert identity(run(recipe(name="broken", use_peft=True))) == identity(whole)
    assert step[0] == 4 + 4  # from checkpoint-2


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["qkv_proj", "lm_head"],
            r"lm_head is the output layer and is tied.*lora_modules_to_save: \[lm_head\]",
        ),
        (["embed_tokens"], r"model.embed_tokens is tied to the output layer.*lora_modules_to_save"),
        (["q_proj"], r"q_proj names no module of the model; it has .*qkv_proj.*all-linear"),
    ],
)
def test_targets_that_cannot_be_merged_are_refused(recipe: Any, targets: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"lora_target_modules: {message}"):
        run(recipe(use_peft=True, lora_target_modules=targets))


def test_an_adapter_on_an_untied_head_is_refused_too(recipe: Any, tmp_path: Path) -> None:
    untied = write_base(tmp_path / "untied", tie_word_embeddings=False)
    keys = {"use_peft": True, "model_name_or_path": str(untied)}
    with pytest.raises(UsageError, match=r"lm_head is the output layer: an adapter on it would not train"):
        run(recipe(**keys, lora_target_modules=["lm_head"]))
    directory = run(recipe(**keys, lora_target_modules=["embed_tokens", "qkv_proj"]))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(directory)),
        logits(adapted(untied, directory)),
        atol=2e-5,
        rtol=0,
    )


def test_a_merge_that_changes_the_model_is_an_error(base: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base)
    broken = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(TrueupError, match="merging the adapter changed the model: logits differ by"):
        adapters.merge(broken, PROBE)


def test_quantised_loading_says_what_it_needs(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = recipe(use_peft=True, load_in_4bit=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="load_in_4bit: needs bitsandbytes: pip install"):
        adapters.quantization(quantised.build())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UsageError, match="load_in_4bit: needs a GPU"):
        adapters.quantization(quantised.build())


# ---------------------------------------------------------------- trueup merge


def merge(*words: Any) -> Any:
    app = Typer()
    app.command()(merge_command)
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def foreign(base: Path, tmp_path: Path) -> Path:
    """An adapter as PEFT alone writes it: without tokenizer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(target_modules=["qkv_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merge_makes_a_model_directory_of_a_foreign_adapter(
    foreign: Path, base: Path, tmp_path: Path
) -> None:
    result = merge(foreign, "--to", tmp_path / "merged")
    assert result.exit_code == 0, result.exception
    assert str(base) in result.output  # the base that the adapter names
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted(base, tmp_path)), atol=2e-5, rtol=0)
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert isinstance(merge(foreign, "--to", tmp_path / "merged").exception, UsageError)  # never overwritten


def test_merge_says_what_is_wrong_with_an_adapter(foreign: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not an adapter: adapter_config.json is missing"):
        merge_directory(base, None)
    wider = write_base(tmp_path / "wider", intermediate_size=64, num_key_value_heads=1)
    with pytest.raises(UsageError, match=r"does not open on .*wider.*--base"):
        merge_directory(foreign, str(wider))
    with pytest.raises(UsageError, match=r"does not open on nowhere.*--base"):
        merge_directory(foreign, "nowhere")
