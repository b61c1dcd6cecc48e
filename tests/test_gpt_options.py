"""All options of GPTConfig work together: properties of random configurations, drawn by hypothesis."""

import tempfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from trueup.base import GPTConfig, GPTForCausalLM

VOCAB, CONTEXT, LENGTH = 53, 48, 20
ROPE: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12},
    {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
]  # fmt: skip


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments of a small GPTConfig, any option with any other."""
    groups = draw(st.sampled_from([1, 2, 3]))
    position = draw(st.sampled_from(["rope", "learned"]))
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": draw(st.sampled_from([24, 36])),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(st.integers(1, 2)),
        "head_dim": draw(st.sampled_from([4, 8, 10] if position == "rope" else [3, 8])),
        "intermediate_size": draw(st.sampled_from([None, 40])),
        "max_position_embeddings": CONTEXT,
        "position": position,
        "rope_parameters": draw(st.sampled_from(ROPE)) if position == "rope" else None,
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "mlp": draw(st.sampled_from(["swiglu", "gelu", "gelu_exact"])),
        "init": draw(st.sampled_from(["gpt2", "mup"])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25])),
        "initializer_range": 0.2,
        "attn_implementation": draw(st.sampled_from([None, "eager", "sdpa_only"])),
    }
    for switch in ("bias", "qk_norm", "tie_word_embeddings"):
        shape[switch] = draw(st.booleans())
    for name in ("attention_dropout", "residual_dropout", "embedding_dropout"):
        shape[name] = draw(st.sampled_from([0.0, 0.2]))
    return shape


def build(shape: dict[str, Any]) -> GPTForCausalLM:
    """Random weights everywhere: fresh norms and biases are ones and zeros, which hide mistakes."""
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(**shape)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
    return model


def tokens(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_every_mixture_of_options_is_one_model_by_every_route(shape: dict[str, Any]) -> None:
    model = build(shape)
    ids = tokens()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        assert whole.std() > 0.05, "nothing to compare"
        _cached(model, ids, whole)
        _padded(model, ids, whole)
        _packed(model, ids, whole)
        _saved(model, ids, whole)
    _checkpointed(model, ids)


def _cached(model: GPTForCausalLM, ids: torch.Tensor, whole: torch.Tensor) -> None:
    out = model(ids[:, :9], use_cache=True)
    steps = [out.logits]
    for step in range(9, LENGTH, 3):  # several tokens at a time, too
        out = model(ids[:, step : step + 3], past_key_values=out.past_key_values)
        steps.append(out.logits)
    assert largest(torch.cat(steps, 1), whole) <= 2e-5


def _padded(model: GPTForCausalLM, ids: torch.Tensor, whole: torch.Tensor) -> None:
    """On the left and on the right, and the cache goes on from a padded prompt."""
    padding, ones = torch.zeros(2, 7, dtype=torch.long), torch.ones_like(ids)
    left, left_mask = torch.cat([padding, ids], 1), torch.cat([padding, ones], 1)
    assert largest(model(left, attention_mask=left_mask).logits[:, 7:], whole) <= 2e-5
    right = model(torch.cat([ids, padding], 1), attention_mask=torch.cat([ones, padding], 1)).logits
    assert largest(right[:, :LENGTH], whole) <= 2e-5
    prompt = model(left[:, :-2], attention_mask=left_mask[:, :-2], use_cache=True)
    end = model(left[:, -2:], attention_mask=left_mask, past_key_values=prompt.past_key_values)
    assert largest(end.logits, whole[:, -2:]) <= 2e-5


def _packed(model: GPTForCausalLM, ids: torch.Tensor, whole: torch.Tensor) -> None:
    positions = torch.arange(LENGTH).repeat(2)[None]
    together = model(ids.view(1, -1), position_ids=positions).logits
    assert largest(together.view_as(whole), whole) <= 2e-5


def _saved(model: GPTForCausalLM, ids: torch.Tensor, whole: torch.Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=model.config._attn_implementation
        )
    assert torch.equal(loaded(ids, use_cache=False).logits, whole)


def _checkpointed(model: GPTForCausalLM, ids: torch.Tensor) -> None:
    """Gradients with and without, every dropout on."""

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    model.train()
    expected = gradients()
    model.activation_checkpointing_enable()
    assert max(largest(a, b) for a, b in zip(gradients(), expected, strict=True)) <= 1e-6
    assert all(gradient.any() for gradient in expected), "a weight that learns nothing"


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True},
        {"qk_norm": True, "norm": "layernorm", "bias": True, "rope_parameters": ROPE[4]},
        {"qk_norm": True, "mlp": "gelu_exact", "position": "learned", "init": "mup", "logit_scale": 0.5},
    ],
)
def test_a_sample_compiles_in_one_graph(changes: dict[str, Any]) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build(shape | {"max_position_embeddings": CONTEXT, "initializer_range": 0.2} | changes)
    mask = torch.ones_like(tokens())
    mask[0, :5] = 0
    expected = model(tokens(), attention_mask=mask).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert largest(compiled(tokens(), attention_mask=mask).logits, expected) <= 1e-5


def test_learned_positions_count_attended_tokens_and_end_with_the_context() -> None:
    model = build({"vocab_size": VOCAB, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1,
                   "position": "learned", "max_position_embeddings": CONTEXT})  # fmt: skip
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    ids = tokens(2, 5)
    by_mask = model(ids, attention_mask=mask).logits
    assert torch.equal(by_mask, model(ids, attention_mask=mask, position_ids=positions).logits)
    with pytest.raises(ValueError, match=r"49 tokens .* 48 learned positions"):
        model(tokens(1, CONTEXT + 1))
