"""The doctor passes GPTs that keep the contract, and names what is broken in those that do not."""

import copy
import json
from pathlib import Path
from typing import Any

import own_gpt
import pytest
import torch
from typer.testing import CliRunner

from trueup.app.cli import app, main
from trueup.app.doctor import SAMPLE_TEXT
from trueup.base import GPTConfig, GPTForCausalLM
from trueup.base.doctor import CHECKS, examine
from trueup.base.tokenizer import default_generation_config, train_tokenizer

TOKENIZER = train_tokenizer(SAMPLE_TEXT, vocab_size=300)
SPECIAL = {f"{kind}_token_id": getattr(TOKENIZER, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}


def built(model_class: type, config: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config)
    model.generation_config = default_generation_config(TOKENIZER)
    return model


def ours(model_class: type = GPTForCausalLM, **changes: Any) -> Any:
    shape = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    shape |= {"max_position_embeddings": 64, "initializer_range": 0.3, "residual_dropout": 0.1}
    return built(model_class, GPTConfig(**shape | SPECIAL | changes))


def own(model_class: type = own_gpt.OwnForCausalLM) -> Any:
    model = built(model_class, own_gpt.OwnConfig(vocab_size=len(TOKENIZER), **SPECIAL))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(10)  # as of a trained model: mistakes show in the logits
    return model


def problems(model: Any, tokenizer: Any = TOKENIZER) -> dict[str, str]:
    return {finding.name: finding.problem for finding in examine(model, tokenizer) if finding.problem}


@pytest.mark.parametrize(
    "model",
    [
        own,
        ours,
        lambda: ours(logit_scale=0.5, tie_word_embeddings=False),
        lambda: ours(norm="layernorm", position="learned", mlp="gelu", bias=True),
    ],
    ids=["own", "ours", "scaled", "classic"],
)
def test_a_sound_model_passes(model: Any) -> None:
    subject = model()
    before = copy.deepcopy(subject.state_dict())
    assert problems(subject) == {}
    assert all(torch.equal(weight, before[name]) for name, weight in subject.state_dict().items())


def broken(**forwarded: Any) -> Any:
    """Our GPT with a forward() that changes its arguments: name=function of the value."""

    class Broken(GPTForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                    use_cache=None, labels=None, **kwargs):  # fmt: skip
            given = {
                "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
                "past_key_values": past_key_values, "use_cache": use_cache, "labels": labels, **kwargs,
            }  # fmt: skip
            return super().forward(**{k: forwarded.get(k, lambda v: v)(v) for k, v in given.items()})

    return ours(Broken)


class NoExtras(GPTForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, labels=None):
        return super().forward(
            input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache, labels=labels
        )


class Unshifted(GPTForCausalLM):
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        shifted = None if labels is None else torch.roll(labels, 1, 1)
        return super().forward(*args, labels=shifted, **kwargs)


class Scaled(GPTForCausalLM):
    """A factor on the logits that only forward() knows of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


class Sharper(GPTForCausalLM):
    """Other logits where there is a cache."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.past_key_values is not None:
            out.logits = out.logits * 1.5
        return out


class LossyBuffer(GPTForCausalLM):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.register_buffer("factor", torch.tensor(2.0), persistent=False)
        self.factor.fill_(3.0)  # a state that is not saved

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.factor
        return out


class Functional(GPTForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = torch.nn.functional.dropout(out.logits, 0.2, self.training)
        return out


def untied_by_hand() -> Any:
    model = ours()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def no_checkpointing() -> Any:
    model = ours()
    type(model.model).supports_gradient_checkpointing = True
    model.supports_gradient_checkpointing = False
    return model


def looks_ahead() -> Any:
    model = ours(attn_implementation="eager")
    for layer in model.model.layers:
        layer.attention.forward = _without_mask(layer.attention.forward)
    return model


def _without_mask(forward: Any) -> Any:
    def unmasked(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        queries = hidden.shape[1]
        cache = kwargs.get("past_key_values")
        keys = queries + (cache.get_seq_length() if cache is not None else 0)
        return forward(
            hidden, *args, **kwargs | {"attention_mask": torch.ones(1, 1, queries, keys, dtype=torch.bool)}
        )

    return unmasked


def runs_on() -> Any:
    model = ours()
    model.generation_config.eos_token_id = 9
    return model


BROKEN: dict[str, tuple[Any, str, str]] = {
    "no position_ids": (lambda: ours(NoExtras), "interface", "takes no position_ids: add them"),
    "labels not shifted": (lambda: ours(Unshifted), "loss", "shift the labels inside forward"),
    "counts tokens itself": (
        lambda: broken(num_items_in_batch=lambda v: None), "loss", "num_items_in_batch does not divide"
    ),
    "looks ahead": (looks_ahead, "causality", "mask what comes later"),
    "blind to the mask": (lambda: broken(attention_mask=lambda v: None), "padding", "hide padding with"),
    "positions off by one": (
        lambda: broken(position_ids=lambda v: None if v is None else v * 2),
        "position ids",
        "count from 0 where they are not given",
    ),
    "no cache": (
        lambda: broken(use_cache=lambda v: False, past_key_values=lambda v: None),
        "cache",
        "make a DynamicCache",
    ),
    "another model with the cache": (lambda: ours(Sharper), "cache", "logits with the cache differ"),
    "documents mixed": (lambda: broken(position_ids=lambda v: None), "packing", "see each other"),
    "a tie that is none": (untied_by_hand, "tied weights", "are two matrices"),
    "a buffer that is not saved": (lambda: ours(LossyBuffer), "save and load", "loads as another one"),
    "no checkpointing": (no_checkpointing, "gradient checkpointing", "GradientCheckpointingLayer"),
    "dropout by function": (lambda: ours(Functional), "dropout", "hold each rate in an nn.Dropout"),
    "a scale that TRL skips": (lambda: ours(Scaled), "step-0 DPO loss", "belongs in config.logit_scale"),
    "generates otherwise": (lambda: ours(Sharper), "step-0 KL", "before the first step, and must be 0"),
    "never ends": (runs_on, "end of text", "generation_config.eos_token_id is 9"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "check", "advice"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named_with_the_remedy(model: Any, check: str, advice: str) -> None:
    assert advice in problems(model()).get(check, "(passed)")


def test_a_tokenizer_that_cannot_serve_is_named() -> None:
    other = train_tokenizer(SAMPLE_TEXT, vocab_size=300)
    for mark in ("{%- generation -%}", "{%- endgeneration -%}"):
        other.chat_template = other.chat_template.replace(mark, "")
    assert "does not mark what the assistant says" in problems(ours(), other)["chat template"]
    other.chat_template, other.pad_token = None, other.eos_token
    found = problems(ours(), other)
    assert "no chat template" in found["chat template"]
    assert "must differ" in found["end of text"]


def test_every_check_has_a_model_that_fails_it() -> None:
    assert {check for _, check, _ in BROKEN.values()} | {"chat template"} == set(CHECKS)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    done = CliRunner().invoke(app, ["doctor", "--model", "own_gpt:OwnForCausalLM", "--json"])
    assert json.loads(done.stdout)["ok"] is True
    for target, message, code in (
        ("own_gpt:Block", "is not a PreTrainedModel", 2),
        ("nowhere:GPT", "cannot be imported", 2),
        ("test_doctor:Scaled", "3 of 15 checks failed", 1),
    ):
        with pytest.raises(SystemExit, match=str(code)):
            main(["doctor", "--model", target])
        assert message in capsys.readouterr().err


def test_own_modules_are_imported_for_every_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trueup_test_module.py").write_text("print('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRUEUP_IMPORT", "trueup_test_module")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "imported" in capsys.readouterr().out
