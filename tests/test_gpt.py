"""The GPT computes what it should, by every route: back ends, caches, packing, checkpoints, compilation."""

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from trueup.base import GPTConfig, GPTForCausalLM, GPTForSequenceClassification, modeling_gpt
from trueup.base.flops import flops_per_token

VOCAB = 97
CLASSIC = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True}


def tiny_config(**changes: Any) -> GPTConfig:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # logits of size 2 to 3, as of a trained model: errors show
        "eos_token_id": None,
    }
    return GPTConfig(**(shape | changes))


def tiny(model_class: type = GPTForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    return model_class(tiny_config(**changes)).eval()


def tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def model() -> GPTForCausalLM:
    return tiny()


# ------------------------------------------------------------------------------------------ architecture


def as_llama(model: GPTForCausalLM) -> LlamaForCausalLM:
    """A LlamaForCausalLM with the same weights: an independent implementation of the modern dialect."""
    ours = model.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rope_parameters",
        "tie_word_embeddings",
    )
    config = {name: copy.deepcopy(getattr(ours, name)) for name in same}
    llama = LlamaForCausalLM(LlamaConfig(**config, rms_norm_eps=ours.norm_eps)).eval()
    widths = [n * ours.head_dim for n in (ours.num_attention_heads, *[ours.num_key_value_heads] * 2)]
    state = {}
    for name, weight in model.state_dict().items():
        name = name.replace("input_norm", "input_layernorm").replace("post_norm", "post_attention_layernorm")
        name = name.replace("attention.", "self_attn.", 1) if ".attention." in name else name
        if "qkv_proj" in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), weight.split(widths), strict=True)
            state |= {name.replace("qkv_proj", part): tensor for part, tensor in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True)
            state |= {name.replace("gate_up_proj", part): tensor for part, tensor in parts}
        else:
            state[name] = weight
    llama.load_state_dict(state)
    return llama


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": 20},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
    ],
)
def test_the_modern_dialect_is_llama(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    ids = tokens()
    ours, theirs = model(ids, labels=ids), as_llama(model)(ids, labels=ids)
    assert largest(ours.logits, theirs.logits) <= 1e-5
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-6)


def test_state_dict_names_are_the_contract() -> None:
    layer = (
        "input_norm",
        "attention.qkv_proj",
        "attention.o_proj",
        "post_norm",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    )
    trunk = {"model.embed_tokens.weight", "model.norm.weight"}
    trunk |= {f"model.layers.{index}.{name}.weight" for index in range(2) for name in layer}
    assert set(tiny().state_dict()) == trunk | {"lm_head.weight"}
    assert set(tiny(GPTForSequenceClassification).state_dict()) == trunk | {"score.weight"}
    biased = set(tiny(bias=True).state_dict()) - trunk - {"lm_head.weight"}
    assert biased == {name.replace("weight", "bias") for name in trunk if "proj" in name}
    classic = {name.replace("gate_up_proj", "up_proj") for name in trunk}
    classic |= {name.replace("weight", "bias") for name in classic if "embed" not in name}
    classic |= {"model.embed_positions.weight", "lm_head.weight"}
    assert set(tiny(**CLASSIC).state_dict()) == classic


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batchnorm"}, "norm='batchnorm': must be one of rmsnorm, layernorm"),
        ({"position": "alibi"}, "position='alibi': must be one of rope, learned"),
        ({"mlp": "relu"}, "mlp='relu': must be one of swiglu, gelu, gelu_exact"),
        ({"init": "xavier"}, "init='xavier': must be one of gpt2, mup"),
        ({"logit_scale": 0.0}, "logit_scale=0.0 must be above 0"),
        (
            {"position": "learned", "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "mean nothing with position='learned'",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"reward_mean": 1.0}, "set both or neither"),
        ({"reward_mean": 1.0, "reward_std": 0.0}, "reward_std=0.0 must be above 0"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**changes)


def test_hidden_size_must_divide_into_heads() -> None:
    with pytest.raises(ValueError, match="num_attention_heads=5 does not divide hidden_size=64"):
        tiny_config(num_attention_heads=5, num_key_value_heads=None)


def test_initial_spread(tmp_path: Path) -> None:
    """T1: the smaller spread on the residual stream is there, although this is custom code."""
    width, layers = 128, 8
    shape = {"hidden_size": width, "num_hidden_layers": layers, "initializer_range": 0.02, "bias": True}
    model = tiny(**shape)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        elif "bias" in name:
            assert not weight.any()
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * layers) if residual else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
    score = tiny(GPTForSequenceClassification, hidden_size=width, num_labels=64).score.weight
    assert score.std().item() == pytest.approx(1 / math.sqrt(width + 1), rel=0.05)
    # A head added to a saved trunk begins with that spread, too.
    model.save_pretrained(tmp_path)
    loaded = GPTForSequenceClassification.from_pretrained(tmp_path, num_labels=64)
    assert loaded.score.weight.std().item() == pytest.approx(1 / math.sqrt(width + 1), rel=0.05)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries() -> None:
    model = tiny(qk_norm=True)
    before = model(tokens()).logits
    for layer in model.model.layers:
        layer.attention.qkv_proj.weight.data[: 4 * 16] *= 10
    assert largest(model(tokens()).logits, before) < 1e-4


@pytest.mark.parametrize("changes", [{"head_dim": 20}, CLASSIC])
def test_flops_are_what_the_counter_counts(changes: dict[str, Any]) -> None:
    config = tiny_config(attn_implementation="eager", **changes)
    with torch.device("meta"):
        model = GPTForCausalLM(config).train()
        ids = torch.zeros(3, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    assert flops_per_token(config, seq_len=24) * ids.numel() == counter.get_total_flops()


# --------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_attention_back_ends_agree(model: GPTForCausalLM, padded: bool, positions: bool) -> None:
    """Losses and gradients of SDPA, and of the default that chooses, against attention written by hand."""
    ids, mask = tokens(), torch.ones(2, 24, dtype=torch.long)
    labels = ids.clone()
    if padded:
        mask[0, :7] = 0
        labels[0, :8] = -100  # nor the first real token: it would be predicted from padding
    extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions else {}
    losses, gradients, logits = {}, {}, {}
    for name in ("eager", "sdpa_only", "sdpa"):
        other = copy.deepcopy(model)
        other.set_attn_implementation(name)
        out = other(ids, attention_mask=mask, labels=labels, **extra)
        out.loss.backward()
        losses[name], logits[name] = out.loss.item(), out.logits[mask == 1]
        gradients[name] = other.model.layers[0].attention.qkv_proj.weight.grad
    for name in ("sdpa_only", "sdpa"):
        assert losses[name] == pytest.approx(losses["eager"], abs=1e-6)
        assert largest(logits[name], logits["eager"]) <= 1e-5
        assert largest(gradients[name], gradients["eager"]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_form_of_mask_means_the_same(dtype: torch.dtype) -> None:
    """None, boolean and additive masks; the last also where it comes in fp32 and the scores are narrower."""
    scores = torch.randn(2, 4, 6, 6).to(dtype)
    visible = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 6, 6).masked_fill(~visible, torch.finfo(torch.float32).min)
    for mask in (None, visible, added, added.to(dtype)):
        weights = (scores + modeling_gpt.additive_mask(mask, scores)).softmax(-1)
        assert torch.equal(weights, scores.masked_fill(~visible, -torch.inf).softmax(-1))
    nothing = modeling_gpt.additive_mask(torch.full_like(added, torch.finfo(torch.float32).min), scores)
    assert torch.isfinite((scores * 1e3 + nothing).softmax(-1)).all()


@pytest.mark.slow
def test_flex_attention_agrees(model: GPTForCausalLM) -> None:
    flex = copy.deepcopy(model)
    flex.set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert largest(flex(tokens()).logits, model(tokens()).logits) <= 1e-5


@pytest.mark.parametrize(
    ("dtype", "keys", "implementation", "matmul"),
    [
        (torch.bfloat16, 24, None, True),
        (torch.bfloat16, 24, "sdpa_only", False),  # the switch
        (torch.float32, 24, None, False),
        (torch.bfloat16, 40, None, False),  # longer than the threshold set below
    ],
)
def test_plain_matmuls_are_chosen_by_device_dtype_and_length(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, keys: int, implementation: str | None, matmul: bool
) -> None:
    calls = []
    original = modeling_gpt.eager_attention
    monkeypatch.setattr(modeling_gpt, "MATMUL_MAX_KEYS", 32)
    monkeypatch.setattr(
        modeling_gpt, "eager_attention", lambda *args: calls.append(args[2].shape[2]) or original(*args)
    )
    model = tiny(attn_implementation=implementation).to(dtype)
    cache = model(tokens(length=keys)).past_key_values
    assert calls == [keys] * 2 * matmul
    calls.clear()
    model(tokens(length=1), past_key_values=cache)  # one new token: at any length
    assert bool(calls) == (dtype == torch.bfloat16 and implementation is None)


def test_bf16_matmul_is_as_near_to_fp32_as_sdpa(model: GPTForCausalLM) -> None:
    errors = {}
    for name in ("sdpa_only", "sdpa"):
        other = copy.deepcopy(model).to(torch.bfloat16)
        other.set_attn_implementation(name)
        errors[name] = (
            (other(tokens(8)).logits.float() - model(tokens(8)).logits).square().mean().sqrt().item()
        )
    assert errors["sdpa"] <= 1.1 * errors["sdpa_only"]


def test_autocast_runs_attention_in_bf16_without_a_warning() -> None:
    model = tiny(qk_norm=True)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        out = model(tokens())
    assert out.past_key_values.layers[0].keys.dtype == torch.bfloat16


def test_attentions_and_hidden_states_are_returned(model: GPTForCausalLM) -> None:
    eager = tiny(attn_implementation="eager")
    out = eager(tokens(), output_attentions=True, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], eager.model.embed_tokens(tokens()))
    assert [weights.shape for weights in out.attentions] == [(2, 4, 24, 24)] * 2
    weights = out.attentions[0]
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 24))
    assert not weights.triu(1).any(), "a query looked ahead"


# ------------------------------------------------------------------------------- caches, padding, packing


def test_packed_documents_do_not_see_each_other(model: GPTForCausalLM) -> None:
    """T2: also with the cache on, which is the configuration's default, in training and evaluation."""
    first, second = tokens(1, 9), tokens(1, 15) % 50
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    apart = torch.cat([model(first).logits, model(second).logits], dim=1)
    assert model.config.use_cache
    for implementation in ("sdpa", "eager"):
        packer = copy.deepcopy(model)
        packer.set_attn_implementation(implementation)
        for use_cache in (None, False, True):
            for mode in (packer.eval(), packer.train()):
                together = mode(packed, position_ids=positions, use_cache=use_cache).logits
                assert largest(together, apart) <= 1e-5


def test_keyword_arguments_of_packing_reach_the_attention(
    model: GPTForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    original = modeling_gpt.sdpa_attention_forward
    monkeypatch.setattr(
        modeling_gpt,
        "sdpa_attention_forward",
        lambda *args, **kwargs: seen.update(kwargs) or original(*args, **kwargs),
    )
    lengths = torch.tensor([0, 9, 24])
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    model(tokens(1), position_ids=positions, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=15)
    assert torch.equal(seen["position_ids"], positions)
    assert seen["cu_seq_lens_q"] is lengths
    assert seen["max_length_q"] == 15


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_padding_changes_nothing(implementation: str) -> None:
    model = tiny(attn_implementation=implementation)
    short = tokens(1, 10)
    padded = torch.cat([torch.zeros(1, 14, dtype=torch.long), short], dim=1)
    mask = (torch.arange(24) >= 14).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(short).logits
    for extra in ({}, {"position_ids": positions}):
        logits = model(padded, attention_mask=mask, **extra).logits
        assert torch.isfinite(logits).all()
        assert largest(logits[:, 14:], expected) <= 1e-5


def test_bf16_padding_rows_stay_finite() -> None:
    """Through the matmul path, forward and backward: a row of padding attends to nothing at all."""
    model = tiny().to(torch.bfloat16)
    mask = (torch.arange(24) >= 14).long().expand(2, -1)
    out = model(tokens(), attention_mask=mask, labels=tokens().masked_fill(mask == 0, -100))
    out.loss.backward()
    assert torch.isfinite(out.logits).all()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())


# -------------------------------------------------------------------------------------------- loss, heads


def test_loss_is_cross_entropy_and_counts_items_over_the_whole_batch(model: GPTForCausalLM) -> None:
    ids = tokens()
    labels = ids.masked_fill(torch.arange(24) < 5, -100)
    out = model(ids, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert out.loss.item() == pytest.approx(expected.item() / 38, rel=1e-6)
    assert model(ids, labels=labels, num_items_in_batch=100).loss.item() == pytest.approx(
        expected.item() / 100
    )


def test_logits_to_keep(model: GPTForCausalLM) -> None:
    every = model(tokens()).logits
    assert largest(model(tokens(), logits_to_keep=3).logits, every[:, -3:]) <= 1e-6
    index = torch.tensor([0, 7])
    assert largest(model(tokens(), logits_to_keep=index).logits, every[:, index]) <= 1e-6


def test_logit_scale_means_the_same_to_us_and_to_trl() -> None:
    plain, scaled = tiny(), tiny(logit_scale=0.25)
    ids = tokens()
    logits = scaled(ids).logits
    assert largest(logits, plain(ids).logits * 0.25) <= 1e-6
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    add_fused_lm_head(scaled)
    assert largest(scaled(ids, labels=ids, fused_lm_head=True).log_probs, expected) <= 1e-5


def test_a_reward_is_read_at_the_last_attended_token() -> None:
    model = tiny(GPTForSequenceClassification, num_labels=1, pad_token_id=0)
    text = tokens(1, 10)
    text[0, -1] = 0  # text may contain the pad token: only the mask tells
    padding, ones = torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 10, dtype=torch.long)
    expected = model(text).logits
    assert expected.shape == (1, 1)
    right = model(torch.cat([text, padding], 1), attention_mask=torch.cat([ones, padding], 1))
    left_mask = torch.cat([padding, ones], 1)
    left = model(
        torch.cat([padding, text], 1),
        attention_mask=left_mask,
        position_ids=(left_mask.cumsum(-1) - 1).clamp(min=0),
    )
    assert largest(right.logits, expected) <= 1e-5
    assert largest(left.logits, expected) <= 1e-5
    hidden = model.model(text).last_hidden_state
    assert largest(model.score(hidden)[:, -1], expected) <= 1e-6


def test_calibration_is_applied_and_kept(tmp_path: Path) -> None:
    model = tiny(GPTForSequenceClassification, num_labels=1)
    raw = model(tokens()).logits
    model.config.reward_mean, model.config.reward_std = 3.0, 0.5
    model.save_pretrained(tmp_path)
    loaded = GPTForSequenceClassification.from_pretrained(tmp_path)
    assert largest(loaded(tokens()).logits, (raw - 3.0) / 0.5) <= 1e-6


def test_classification_loss() -> None:
    model = tiny(GPTForSequenceClassification, num_labels=3)
    labels = torch.tensor([2, 0])
    out = model(tokens(), labels=labels)
    assert out.loss.item() == pytest.approx(F.cross_entropy(out.logits, labels).item())


# -------------------------------------------------------------------------------------------- in training


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = tiny(attention_dropout=0.1, residual_dropout=0.1, embedding_dropout=0.1).train()
    torch.manual_seed(5)
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("implementation", ["eager", "sdpa_only", "sdpa"])
@pytest.mark.parametrize("field", ["attention_dropout", "residual_dropout", "embedding_dropout"])
def test_trl_can_switch_every_dropout_off(field: str, implementation: str) -> None:
    """T8: attention dropout is functional, but obeys its module."""
    model = tiny(**{field: 0.5, "attn_implementation": implementation})
    quiet = model(tokens()).logits
    model.train()
    assert largest(model(tokens()).logits, quiet) > 0.1
    disable_dropout_in_model(model)
    assert largest(model(tokens()).logits, quiet) <= 1e-5


def test_bf16_matmul_drops_attention_weights_too() -> None:
    model = tiny(attention_dropout=0.5).to(torch.bfloat16)
    quiet = model(tokens()).logits
    assert largest(model.train()(tokens()).logits, quiet) > 0.1


def test_trainer_does_not_write_its_use_cache(tmp_path: Path) -> None:
    """T7: Trainer switches the cache off in the configuration it trains with, not in the one it saves."""
    model = tiny()
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model, args)
    assert model.config.use_cache is False
    trainer.save_model(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_full_graph_compilation(backend: str) -> None:
    model = tiny().train()
    expected, logits = gradients(model), model(tokens()).logits
    model.zero_grad()
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True, backend=backend)(tokens(), labels=tokens())
    out.loss.backward()
    assert largest(out.logits, logits) <= 1e-5
    for name, weight in model.named_parameters():
        assert largest(weight.grad, expected[name]) <= 1e-5, name


def test_compilation_keeps_the_causal_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without positions there is no packing to look for, and SDPA gets `is_causal` instead of a mask."""
    seen = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k) or original(*a, **k)
    )
    torch._dynamo.reset()
    torch.compile(tiny(), fullgraph=True, backend="eager")(tokens(), use_cache=False)
    assert [(call["attn_mask"], call["is_causal"]) for call in seen] == [(None, True)] * 2


# ------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_rotary_frequencies_survive_loading(tmp_path: Path) -> None:
    """T5: non-persistent buffers are rebuilt, and stay fp32 in a bf16 model."""
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    frequencies = loaded.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies, model.model.rotary_emb.inv_freq)
    assert list(dict(model.named_buffers())) == [
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    ]
    assert (loaded(tokens()).logits.float() - model(tokens()).logits).abs().mean() < 0.05


def test_resizing_keeps_the_tie() -> None:
    model = tiny()
    before = model(tokens()).logits
    model.resize_token_embeddings(VOCAB + 7)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(tokens()).logits.shape[-1] == model.config.vocab_size == VOCAB + 7
    assert largest(model(tokens()).logits[..., :VOCAB], before) <= 1e-6
