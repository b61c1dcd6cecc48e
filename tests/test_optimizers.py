"""Which parameters are decayed and by which optimizer, and the learning rate against closed forms."""

import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler
from transformers.optimization import get_wsd_schedule

from trueup.base.configuration_gpt import GPTConfig
from trueup.base.modeling_gpt import GPTForCausalLM
from trueup.base.optimizers import build_optimizers, parameter_groups, set_learning_rate
from trueup.base.schedule import learning_rate_factor, steps_of


def model(tied: bool) -> GPTForCausalLM:
    return GPTForCausalLM(
        GPTConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, bias=True,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_groups_hold_every_parameter_once_and_by_its_kind(tied: bool) -> None:
    gpt = model(tied)
    names = {id(parameter): name for name, parameter in gpt.named_parameters()}
    groups = {kind: {names[id(p)] for p in group} for kind, group in parameter_groups(gpt).items()}
    assert sum(map(len, groups.values())) == len(names)
    assert all(".layers." in name and name.endswith("_proj.weight") for name in groups["hidden"])
    assert len(groups["hidden"]) == 2 * 4
    assert groups["head"] == (set() if tied else {"lm_head.weight"})
    assert "model.embed_tokens.weight" in groups["plain"]
    assert {name for name in names.values() if "norm" in name or "bias" in name} <= groups["plain"]


def test_frozen_parameters_are_left_out() -> None:
    gpt = model(tied=True)
    gpt.model.layers[0].requires_grad_(False)
    assert len(parameter_groups(gpt)["hidden"]) == 4


def build(gpt: nn.Module, kind: str) -> list[torch.optim.Optimizer]:
    return build_optimizers(gpt, kind, 1e-3, 2e-2, 0.1, (0.9, 0.95), 1e-8)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    gpt = model(tied=False)
    adamw, muon = build(gpt, "muon")
    groups = parameter_groups(gpt)
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(p) for p in groups["hidden"]}
    decayed, plain = adamw.param_groups
    assert ([id(p) for p in decayed["params"]], decayed["weight_decay"]) == (
        [id(p) for p in groups["head"]],
        0.1,
    )
    assert plain["weight_decay"] == 0.0
    [alone] = build(gpt, "adamw_torch_fused")
    assert len(alone.param_groups[0]["params"]) == len(groups["hidden"]) + 1
    assert alone.defaults["fused"]


def test_each_group_keeps_its_own_peak_rate() -> None:
    adamw, muon = build(model(tied=True), "muon")
    set_learning_rate([adamw, muon], 0.5)
    set_learning_rate([adamw, muon], 0.25)
    assert {group["lr"] for group in adamw.param_groups} == {2.5e-4}
    assert muon.param_groups[0]["lr"] == 5e-3


@pytest.mark.parametrize("kind", ["adamw_torch_fused", "muon"])
def test_either_optimizer_lowers_the_loss(kind: str) -> None:
    torch.manual_seed(0)
    gpt = model(tied=True)
    optimizers = build(gpt, kind)
    tokens = torch.randint(0, 64, (4, 16))
    losses = []
    for _ in range(10):
        loss = gpt(tokens, labels=tokens).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def reference(scheduler: torch.optim.lr_scheduler.LambdaLR, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def test_cosine_is_transformers_after_the_warm_up() -> None:
    ours = [learning_rate_factor(step, 100, 10, "cosine") for step in range(100)]
    theirs = reference(get_scheduler("cosine", sgd(), num_warmup_steps=10, num_training_steps=100), 100)
    assert ours[10:] == pytest.approx(theirs[10:], abs=1e-12)
    assert ours[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])


def test_wsd_is_transformers_after_the_warm_up() -> None:
    options = {"num_decay_steps": 25, "min_lr_ratio": 0.1}
    ours = [learning_rate_factor(step, 100, 10, "warmup_stable_decay", options) for step in range(100)]
    theirs = get_wsd_schedule(
        sgd(), num_warmup_steps=10, num_decay_steps=25, num_training_steps=100, min_lr_ratio=0.1,
        decay_type="linear",
    )  # fmt: skip
    assert ours[10:] == pytest.approx(reference(theirs, 100)[10:], abs=1e-12)


def test_the_schedule_has_its_closed_form() -> None:
    for step, expected in [(0, 0.25), (3, 1.0), (4, 1.0), (54, 0.55), (103, 0.1)]:
        factor = learning_rate_factor(step, 104, 4, "cosine", {"min_lr_rate": 0.1})
        assert factor == pytest.approx(expected, abs=1e-3)
    assert learning_rate_factor(50, 100, 0, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert learning_rate_factor(79, 100, 2, "warmup_stable_decay") == 1.0
    assert learning_rate_factor(90, 100, 2, "warmup_stable_decay") == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("value", "total", "steps"), [(0.02, 900, 18), (0.02, 10, 1), (0, 900, 0), (50, 900, 50), (0.07, 100, 7)]
)
def test_a_value_below_one_is_a_share_of_the_steps(value: float, total: int, steps: int) -> None:
    assert steps_of(value, total) == steps
