"""What Transformers' common tests ask of every causal language model, asked of our three classes."""

import copy
import fnmatch
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from transformers import AutoConfig

from trueup.base import GPTConfig, GPTForCausalLM, GPTForSequenceClassification, GPTModel

CLASSIC = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True}
DIALECTS = {
    "modern": {},
    "classic": CLASSIC,
    "qk_norm, untied": {"qk_norm": True, "tie_word_embeddings": False},
}
CLASSES = [GPTModel, GPTForCausalLM, GPTForSequenceClassification]
VOCAB = 99
both = pytest.mark.parametrize("changes", DIALECTS.values(), ids=DIALECTS)
each_class = pytest.mark.parametrize("model_class", CLASSES)


def config(**changes: Any) -> GPTConfig:
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 37, "max_position_embeddings": 64, "initializer_range": 0.2}
    return GPTConfig(**shape | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes)


def tiny(model_class: type = GPTForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config(**changes)).eval()


def ids(rows: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def main_output(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**inputs)[0]


def test_configurations_keep_their_common_properties(tmp_path: Path) -> None:
    assert GPTConfig().vocab_size == 4096  # without arguments
    for name in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"):
        changed = config()
        setattr(changed, name, getattr(changed, name))
        assert isinstance(getattr(changed, name), int)
    labelled = config(num_labels=5)
    assert len(labelled.id2label) == len(labelled.label2id) == 5
    labelled.save_pretrained(tmp_path)
    both_ways = [opener.from_pretrained(tmp_path).to_dict() for opener in (GPTConfig, AutoConfig)]
    assert [{**found, "_name_or_path": ""} for found in both_ways] == [labelled.to_dict()] * 2
    assert GPTConfig(**labelled.to_dict()).to_dict() == labelled.to_dict()
    assert config(output_hidden_states=True).output_hidden_states is True


@each_class
@both
def test_signature_inputs_embeds_and_main_input(model_class: type, changes: Any) -> None:
    model = tiny(model_class, **changes)
    assert next(iter(inspect.signature(model.forward).parameters)) == model.main_input_name == "input_ids"
    embedded = model.get_input_embeddings()(ids())
    assert torch.equal(main_output(model, inputs_embeds=embedded), main_output(model, input_ids=ids()))
    with pytest.raises(ValueError, match="exactly one of"):
        model(input_ids=ids(), inputs_embeds=embedded)
    assert isinstance(model(ids(), return_dict=False) if model_class is not GPTModel else (1,), tuple)


@each_class
@both
def test_a_model_survives_disk_deepcopy_and_pickle(model_class: type, changes: Any, tmp_path: Path) -> None:
    model = tiny(model_class, **changes)
    expected = main_output(model, input_ids=ids())
    model.save_pretrained(tmp_path)
    copies = [model_class.from_pretrained(tmp_path).eval(), copy.deepcopy(model)]  # type: ignore[attr-defined]
    copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        assert torch.equal(main_output(other, input_ids=ids()), expected)
    mismatched = model_class.from_pretrained(tmp_path, vocab_size=10, ignore_mismatched_sizes=True)  # type: ignore[attr-defined]
    assert mismatched.get_input_embeddings().num_embeddings == 10


@each_class
@both
def test_a_device_map_cuts_between_blocks_and_weights_may_stay_on_disk(
    model_class: type, changes: Any, tmp_path: Path
) -> None:
    model = tiny(model_class, num_hidden_layers=4, **changes)
    model.save_pretrained(tmp_path / "model")
    room = sum(weight.nbytes for weight in model.parameters()) * 6 // 10
    places = infer_auto_device_map(
        model, {"cpu": room, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert set(places.values()) == {"cpu", "disk"}
    blocks = [name.partition("layers.")[2] for name in places if "layers." in name]
    assert blocks == ["0", "1", "2", "3"]  # none was cut
    split = model_class.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "off"
    )  # type: ignore[attr-defined]
    assert torch.equal(main_output(split.eval(), input_ids=ids()), main_output(model, input_ids=ids()))


@each_class
@both
def test_missing_weights_are_initialised_as_in_a_new_model(
    model_class: type, changes: Any, tmp_path: Path
) -> None:
    """From an empty checkpoint through the meta device: no weight is left as it lay in memory."""
    changes = changes | {"initializer_range": 0.02}
    tiny(model_class, **changes).save_pretrained(tmp_path, state_dict={"nothing": torch.zeros(1)})
    loaded, fresh = model_class.from_pretrained(tmp_path), tiny(model_class, **changes)  # type: ignore[attr-defined]
    for (name, weight), expected in zip(loaded.named_parameters(), fresh.parameters(), strict=True):
        assert weight.std().item() == pytest.approx(expected.std().item(), rel=0.2, abs=1e-6), name
        assert weight.mean().item() == pytest.approx(expected.mean().item(), abs=0.02), name


@each_class
@both
def test_hidden_states_attentions_and_their_gradients(model_class: type, changes: Any) -> None:
    model = tiny(model_class, attn_implementation="eager", **changes)
    out = model(ids(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in out.hidden_states] == [(3, 7, 32)] * 3
    assert [tuple(weights.shape) for weights in out.attentions] == [(3, 2, 7, 7)] * 2
    for kept in (out.hidden_states[0], out.attentions[0]):
        kept.retain_grad()
    out[0].flatten()[0].backward(retain_graph=True)
    assert out.hidden_states[0].grad is not None
    assert out.attentions[0].grad is not None
    assert model.config.output_attentions is False


@both
@pytest.mark.parametrize("size", [VOCAB + 10, VOCAB - 10])
def test_resizing(changes: Any, size: int, tmp_path: Path) -> None:
    model = tiny(**changes)
    with torch.no_grad():
        before = model(ids() % 80).logits
    model.resize_token_embeddings(size)
    kept = min(size, VOCAB)
    assert model.config.vocab_size == model.lm_head.out_features == size
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (size, 32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert torch.allclose(model(ids() % 80).logits[..., :kept], before[..., :kept], atol=1e-5)
    model.save_pretrained(tmp_path)
    assert GPTForCausalLM.from_pretrained(tmp_path).config.vocab_size == size
    model(ids() % 80, labels=ids() % 80).loss.backward()


@both
def test_generation_from_embeddings_and_continued_from_a_cache(changes: Any) -> None:
    model = tiny(**changes)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    whole = model.generate(ids(), **settings)
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids()), **settings)
    assert torch.equal(embedded, whole[:, 7:])
    first = model.generate(ids(), return_dict_in_generate=True, **settings | {"max_new_tokens": 3})
    again = model.generate(
        first.sequences, past_key_values=first.past_key_values, attention_mask=torch.ones(3, 10).long(),
        **settings | {"max_new_tokens": 3},
    )  # fmt: skip
    assert torch.equal(again, whole)
    wanted = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states"), True)
    out = model.generate(ids(), return_dict_in_generate=True, **wanted, **settings)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == 6
    beams = model.generate(ids(), num_beams=3, num_return_sequences=2, **settings)
    assert beams.shape == (6, 13)


@each_class
@both
def test_parallel_plans_name_what_is_there_and_nothing_else(model_class: type, changes: Any) -> None:
    model = tiny(model_class, **changes)
    names = [name for name, _ in model.named_modules()]
    for pattern in [*model.tp_plan, *model.pp_plan, *model.fsdp_plan]:
        assert any(fnmatch.fnmatch(name, f"*{pattern}") for name in names), pattern
    assert any("mlp" in pattern for pattern in model.tp_plan)
    assert any("layers" in pattern for pattern in model.fsdp_plan)
    for plan in (model.tp_plan, model.fsdp_plan):  # FSDP keeps it: backward begins where forward ends
        assert ("lm_head" in plan) == (model_class is GPTForCausalLM)
    assert "plan" not in str(model.config.to_dict())


def test_rotations_have_the_common_shape() -> None:
    """(rows, positions, channels): the suite cuts them along positions."""
    rotary = tiny(GPTModel).rotary_emb
    short, long = (rotary(torch.ones(1), torch.arange(size)[None])[0] for size in (10, 40))
    assert short.shape == (1, 10, 8)
    assert torch.equal(short, long[:, :10])


@pytest.mark.parametrize(
    ("labels", "targets", "kind"),
    [
        (1, torch.tensor([0.5, 1.0, 2.0]), "regression"),
        (3, torch.tensor([0, 2, 1]), "single_label_classification"),
        (3, torch.ones(3, 3), "multi_label_classification"),
    ],
)
def test_sequence_classification_of_every_kind(labels: int, targets: torch.Tensor, kind: str) -> None:
    model = tiny(GPTForSequenceClassification, num_labels=labels)
    out = model(ids(), labels=targets)
    assert out.logits.shape == (3, labels)
    assert torch.isfinite(out.loss)
    assert model.config.problem_type == kind
    out.loss.backward()
    assert model.score.weight.grad.any()


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_rope_scaling_changes_what_it_should(kind: str) -> None:
    """Beyond the context all do; within it dynamic scaling changes nothing."""
    scaled = {"rope_parameters": {"rope_type": kind, "factor": 10.0, "rope_theta": 1e4}}
    plain, other = tiny(GPTModel), tiny(GPTModel, **scaled)
    short, long = ids(1, 10), ids(1, 96)
    before = main_output(other, input_ids=short)
    same = torch.allclose(main_output(plain, input_ids=short), before, atol=1e-5)
    assert same == (kind == "dynamic")
    apart = main_output(plain, input_ids=long) - main_output(other, input_ids=long)
    assert apart.abs().max() > 1e-3
    after = main_output(other, input_ids=short)
    assert torch.allclose(after, before, atol=1e-6), "a long text changed what a short one gives"


@both
def test_a_few_rows_can_be_learned_by_heart(changes: Any) -> None:
    model = tiny(**changes | {"initializer_range": 0.02}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    made = model.eval().generate(ids()[:, :3], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(made, ids())


def test_batches_do_not_change_rows() -> None:
    model = tiny()
    together = model(ids()).logits
    alone = torch.cat([model(row[None]).logits for row in ids()])
    assert torch.allclose(together, alone, atol=1e-5)
