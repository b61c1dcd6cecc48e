"""Sizes: counted to the parameter and the FLOP, derived by the cited formulas, each key of a recipe wins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trueup.base import GPTConfig, GPTForCausalLM
from trueup.base.optimizers import build_optimizers, parameter_groups
from trueup.base.presets import SIZES, Derivation, derive, parameter_count
from trueup.recipes.reader import RecipeError, parse_flags, read_recipe
from trueup.recipes.schema import schema_of
from trueup.recipes.stages import stage_class

TOTALS = {"lab": 2e6, "12M": 12e6, "30M": 30e6, "124M": 124e6, "350M": 355e6, "1B": 1.03e9, "7B": 6.74e9}


def derivation(size: str, **changes: Any) -> Derivation:
    length = SIZES[size]["max_length"]
    shape = {key: value for key, value in SIZES[size].items() if key != "max_length"}
    config = GPTConfig(**shape | {"max_position_embeddings": length} | changes, attn_implementation="eager")
    return Derivation(config, length)


@pytest.mark.parametrize("size", SIZES)
def test_counts_are_those_of_the_model(size: str) -> None:
    found = derivation(size)
    with torch.device("meta"):
        model = GPTForCausalLM(found.config).train()
        ids = torch.zeros(1, found.length, dtype=torch.long)
    assert found.parameters == sum(weight.numel() for weight in model.parameters())
    assert found.parameters == pytest.approx(TOTALS[size], rel=0.02)
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    assert found.flops_per_token * found.length == counter.get_total_flops()


def test_7b_is_llama_7b() -> None:
    assert derivation("7B").parameters == 6_738_415_616  # https://arxiv.org/abs/2302.13971


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True},
        {"norm": "layernorm", "qk_norm": True, "bias": True, "num_key_value_heads": 2},
        {"tie_word_embeddings": False, "head_dim": 20, "qk_norm": True, "mlp": "gelu_exact"},
        {"bias": True, "num_key_value_heads": 3},
    ],
)
def test_every_option_is_counted(changes: dict[str, Any]) -> None:
    config = GPTConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=6, vocab_size=77, **changes)
    model = GPTForCausalLM(config)
    assert parameter_count(config) == sum(weight.numel() for weight in model.parameters())


def test_the_formulas() -> None:
    """By hand, from the papers' numbers."""
    found = derivation("124M")
    compute = found.flops_per_token * 20 * found.parameters
    assert found.compute == pytest.approx(compute)
    assert found.learning_rate == pytest.approx(0.3118 * compute**-0.125, rel=0.03)
    assert found.rows & (found.rows - 1) == 0
    assert 2**-0.5 <= found.rows * 1024 / (0.2920 * compute**0.3271) <= 2**0.5
    assert found.steps * found.rows * 1024 == pytest.approx(20 * found.parameters, rel=1e-3)
    assert found.memory(16) == 16 * found.parameters + 34 * 16 * 1024 * 768 * 12
    rates = [derivation(size).learning_rate for size in SIZES]
    assert rates == sorted(rates, reverse=True)


def test_memory_without_activations_is_what_adamw_holds() -> None:
    model = GPTForCausalLM(derivation("lab").config)
    model(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    (optimizer,) = build_optimizers(model, "adamw_torch_fused", 1e-3, 0.02, 0.1, (0.9, 0.95), 1e-8)
    optimizer.step()
    weights = list(model.parameters())
    held = sum(w.nbytes + w.grad.nbytes for w in weights)
    held += sum(optimizer.state[w][moment].nbytes for w in weights for moment in ("exp_avg", "exp_avg_sq"))
    assert held == derivation("lab").memory(0)


# ------------------------------------------------------------------------------------------------ recipes


@pytest.fixture
def resolved(write_recipe: Callable[..., Path]) -> Callable[..., Any]:
    def read(**keys: Any) -> Any:
        path = write_recipe("stage: pretrain\noutput_dir: runs/x\ndataset_name: lab/text\n")
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        return read_recipe(path, flags=parse_flags(words, schema_of(stage_class("pretrain"))))

    return read


def test_a_size_fills_the_recipe_and_says_why(resolved: Callable[..., Any]) -> None:
    recipe = resolved(size="30M")
    assert {key: recipe.values[key] for key in SIZES["30M"]} == SIZES["30M"]
    found = derivation("30M")
    assert recipe.values["learning_rate"] == found.learning_rate
    assert recipe.origin["learning_rate"] == "derived: 0.3118 C^-0.1250, arXiv 2401.02954"
    rows = recipe.values["per_device_train_batch_size"] * recipe.values["gradient_accumulation_steps"]
    assert rows == found.rows
    assert recipe.values["max_steps"] == found.steps
    assert resolved().origin["hidden_size"] == "default"


def test_each_key_can_be_overridden_and_the_rest_follows(resolved: Callable[..., Any]) -> None:
    recipe = resolved(size="30M", num_hidden_layers=16, learning_rate=1e-4, max_length=256)
    assert (recipe.values["num_hidden_layers"], recipe.values["learning_rate"]) == (16, 1e-4)
    assert recipe.origin["num_hidden_layers"] == "--num_hidden_layers"
    deeper = Derivation(derivation("30M", num_hidden_layers=16, max_position_embeddings=256).config, 256)
    assert recipe.values["max_steps"] == deeper.steps
    half = resolved(size="30M", per_device_train_batch_size=4)
    assert half.values["gradient_accumulation_steps"] == derivation("30M").rows // 4
    epochs = resolved(size="30M", num_train_epochs=2)
    assert (epochs.values["max_steps"], epochs.values["num_train_epochs"]) == (-1, 2)
    assert "vocab_size" not in derive("30M", {"tokenizer_name_or_path": "somewhere"})


def test_a_shape_that_does_not_fit_is_refused(resolved: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match=r"size does not fit: .*num_attention_heads=8 does not divide"):
        resolved(size="30M", hidden_size=500)
    with pytest.raises(RecipeError, match="size"):
        resolved(size="31M")


# ------------------------------------------------------------------------------------------------ muP


def moved(width: int, init: str) -> list[float]:
    """Size of the hidden states' and logits' change in 4 steps of AdamW, at one rate for all widths."""
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=64, hidden_size=width, num_hidden_layers=2, num_attention_heads=width // 16, head_dim=16,
        intermediate_size=2 * width, init=init, logit_scale=32 / width if init == "mup" else 1.0,
        initializer_range=0.1,
    )  # fmt: skip
    model = GPTForCausalLM(config)
    ids = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(1))
    before = model(ids, output_hidden_states=True)
    scale = config.logit_scale if init == "mup" else 1.0
    (optimizer,) = build_optimizers(
        model, "adamw_torch_fused", 1e-2, 0.02, 0.0, (0.9, 0.95), 1e-12, hidden_scale=scale
    )
    for _ in range(4):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    after = model(ids, output_hidden_states=True)
    pairs = [(before.logits, after.logits)]
    # Before the last norm, which would hide how far the stream moved.
    pairs += [(before.hidden_states[1], after.hidden_states[1])]
    return [float((b - a).detach().square().mean().sqrt()) for a, b in pairs]


def test_coordinate_check() -> None:
    """muP: what a step changes does not depend on the width (arXiv 2203.03466, appendix D.1)."""
    sizes = {init: [moved(width, init) for width in (32, 128, 512)] for init in ("mup", "gpt2")}
    for index in (0, 1):
        flat = [at_width[index] for at_width in sizes["mup"]]
        assert max(flat) / min(flat) < 1.8, flat
        growing = [at_width[index] for at_width in sizes["gpt2"]]
        assert growing[-1] / growing[0] > 2, growing


def test_mup_changes_rates_and_spread_of_the_blocks_matrices_alone() -> None:
    shape = {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = GPTForCausalLM(GPTConfig(**shape))
    model = GPTForCausalLM(GPTConfig(**shape, init="mup", logit_scale=0.25))
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            ratio = weight.std() / dict(plain.named_parameters())[name].std()
            assert ratio.item() == pytest.approx(1.0 if "embed" in name else 0.5, rel=0.05), name
    (optimizer,) = build_optimizers(
        model, "adamw_torch_fused", 1e-2, 0.02, 0.1, (0.9, 0.95), 1e-8, hidden_scale=0.25
    )
    hidden = {id(weight) for weight in parameter_groups(model)["hidden"]}
    for group in optimizer.param_groups:
        inside = {id(weight) for weight in group["params"]} <= hidden
        assert group["peak_lr"] == pytest.approx(2.5e-3 if inside else 1e-2)
        if inside:
            assert group["lr"] * group["weight_decay"] == pytest.approx(1e-3), "decay does not follow"
