"""A converted model computes the same function, in both directions, or is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_gpts import GPTModel, NanoGPT, randomised
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from trueup.app.cli import app, main
from trueup.base import GPTConfig, GPTForCausalLM
from trueup.base.convert import FORMS, export_model, form_of, import_model, import_state_dict
from trueup.base.convert_parity import parity
from trueup.base.tokenizer import default_generation_config, train_tokenizer
from trueup.recipes.errors import TrueupError, UsageError

VOCAB, CONTEXT = 61, 96
CLASSIC = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True}
QK = {"qk_norm": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, every head its keys, biases": ("llama", {"num_key_value_heads": 4, "bias": True}),
    "llama, untied, one key head, wide heads": (
        "llama",
        {"tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": 20},
    ),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e2}},
    ),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama, muP": ("llama", {"init": "mup", "logit_scale": 0.25}),
    "qwen3": ("qwen3", QK),
    "qwen3, untied, wide heads, yarn": (
        "qwen3",
        QK | {"tie_word_embeddings": False, "head_dim": 24, "rope_parameters": YARN, "norm_eps": 1e-3},
    ),
    "gpt2": ("gpt2", CLASSIC | {"num_key_value_heads": 4}),
    "gpt2, grouped keys, untied": ("gpt2", CLASSIC | {"tie_word_embeddings": False}),
    "gpt2, exact gelu, scaled logits": (
        "gpt2",
        CLASSIC | {"mlp": "gelu_exact", "num_key_value_heads": 4, "logit_scale": 0.5, "norm_eps": 1e-3},
    ),
    "gpt2, no biases": ("gpt2", CLASSIC | {"bias": False, "num_key_value_heads": 4}),
}


def tiny(**changes: Any) -> GPTForCausalLM:
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": CONTEXT}
    torch.manual_seed(0)
    return randomised(GPTForCausalLM(GPTConfig(**shape | changes)))


@pytest.mark.parametrize(("form", "changes"), CASES.values(), ids=CASES)
def test_parity_both_ways(form: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(**changes)
    exported = export_model(model, form)
    assert type(exported) is FORMS[form].model_class
    there = parity(model, exported)
    assert there.scale > 1, "nothing to compare"
    assert there.largest <= 1e-5, there.line()
    # Through a directory, as another program would open it; then home.
    exported.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened) is type(exported)
    back = parity(opened, import_model(opened))
    assert back.largest <= 1e-5, back.line()
    assert back.same_choice == 1


def test_a_round_trip_keeps_every_bit_and_field() -> None:
    for changes in ({}, QK, CLASSIC | {"num_key_value_heads": 4}):
        model = tiny(**changes, attention_dropout=0.1)
        again = import_model(export_model(model, form_of(model.config) or ""))
        for name, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), name
        differing = {k for k, v in model.config.to_dict().items() if again.config.to_dict()[k] != v}
        assert differing <= {"architectures", "transformers_version"}


def test_parity_sees_a_difference() -> None:
    model, other = tiny(), export_model(tiny(), "llama")
    other.model.layers[1].self_attn.k_proj.weight.data[0, 0] += 0.5
    assert parity(model, other).largest > 1e-3
    other.lm_head.weight.data[0] = torch.nan
    assert parity(model, other).largest == float("inf")


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("llama", QK, "--to llama: cannot express qk_norm: True; use --to qwen3"),
        ("qwen3", {}, "cannot express qk_norm: False; use --to llama"),
        ("gpt2", {}, "cannot express norm: rmsnorm, position: rope, mlp: swiglu; use --to llama"),
        ("llama", CLASSIC, "use --to gpt2"),
        ("gpt2", CLASSIC | {"head_dim": 8}, "head_dim: 8 .*nor does any other form"),
        ("llama", {"mlp": "gelu"}, "cannot express mlp: gelu, nor does any other form"),
    ],
)
def test_what_a_form_cannot_express_is_refused(form: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_model(tiny(**changes), form)


def test_options_ours_has_not_are_refused() -> None:
    model = export_model(tiny(), "llama")
    model.config.hidden_act = "gelu"
    with pytest.raises(UsageError, match="hidden_act: gelu is nothing trueup's GPT computes; it takes silu"):
        import_model(model)
    model.config.model_type = "mamba"
    with pytest.raises(UsageError, match="mamba cannot be imported; llama, qwen3, gpt2 can"):
        import_model(model)


# ------------------------------------------------------------------------------------------- state dicts


def foreign(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    shape = (VOCAB, CONTEXT, 64, 2, 4)
    if kind.startswith("nanoGPT"):
        model = randomised(NanoGPT(*shape, bias="no biases" not in kind))
    else:
        model = randomised(GPTModel(*shape, qkv_bias="qkv biases" in kind))
    prefix = "_orig_mod." if "compiled" in kind else ""
    return model, {prefix + name: tensor for name, tensor in model.state_dict().items()}


KINDS = ["nanoGPT", "nanoGPT, no biases", "nanoGPT, compiled", "LLMs-from-scratch",
         "LLMs-from-scratch, qkv biases"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_of_books_and_courses(kind: str) -> None:
    theirs, state = foreign(kind)
    model = import_state_dict(state, num_attention_heads=4)
    ids = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids)
        assert expected.std() > 0.5
        assert (model(ids).logits - expected).abs().max() <= 1e-5
    assert model.config.tie_word_embeddings == kind.startswith("nanoGPT")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.h.1.mlp.c_proj.weight": None}, "lack transformer.h.1.mlp.c_proj.weight"),
        ({"transformer.h.0.attn.rotary": torch.ones(1)}, "hold transformer.h.0.attn.rotary, which"),
        ({"transformer.wpe.weight": None}, "lack transformer.wpe.weight"),
        ({"transformer.h.1.mlp.c_fc.weight": torch.ones(8, 64)}, r"c_fc.weight is \(8, 64\)"),
        ({"transformer.wte.weight": None}, "neither nanoGPT's"),
    ],
)
def test_a_damaged_state_dict_is_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {name: value for name, value in (foreign("nanoGPT")[1] | change).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        import_state_dict(state, num_attention_heads=4)


def test_heads_must_fit() -> None:
    with pytest.raises(UsageError, match="num_attention_heads: 5 does not divide the width 64"):
        import_state_dict(foreign("nanoGPT")[1], num_attention_heads=5)


# ------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a model with a tokenizer of its own."""
    directory = tmp_path_factory.mktemp("models") / "model"
    tokenizer = train_tokenizer(["the cat sat on the mat, 12 times. " * 9], vocab_size=320)
    model = tiny(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.generation_config = default_generation_config(tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_export_and_import_by_hand(saved: Path, tmp_path: Path) -> None:
    done = command("export", saved, "--to", "llama", "--output", tmp_path / "llama")
    assert "logits differ by" in done.stdout
    assert "up to position 96" in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(saved).chat_template
    assert not list((tmp_path / "llama").glob("*.py"))
    done = command("import", tmp_path / "llama", "--output", tmp_path / "back", "--json")
    assert json.loads(done.stdout)["parity"]["largest"] <= 1e-5
    for name in ("config.json", "model.safetensors", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (saved / name).read_bytes(), name


def test_a_gguf_file_may_go_to_a_new_folder(saved: Path, tmp_path: Path) -> None:
    done = command("export", saved, "--to", "gguf", "--output", tmp_path / "new" / "model.gguf")
    assert "logits differ by" in done.stdout
    assert (tmp_path / "new" / "model.gguf").stat().st_size > 10_000


def test_import_of_a_nanogpt_checkpoint(saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = randomised(NanoGPT(len(AutoTokenizer.from_pretrained(saved)), CONTEXT, 64, 2, 4, bias=False))
    arguments = {"n_head": 4, "n_layer": 2, "bias": False}
    torch.save({"model": theirs.state_dict(), "model_args": arguments, "iter_num": 7}, tmp_path / "ckpt.pt")
    command("import", tmp_path / "ckpt.pt", "--tokenizer", saved, "--output", tmp_path / "nano")
    ids = torch.arange(20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "nano")
    with torch.no_grad():
        assert (loaded(ids).logits - theirs(ids)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/nothing.pt"], "no such file or directory"),
        (["{tmp}/text.pt"], "not a state dict"),
        (["{tmp}/list.pt"], "holds a list; save model.state_dict"),
        (["{tmp}"], "config.json is missing"),
        (["{saved}"], "a trueup_gpt cannot be imported; llama, qwen3, gpt2 can"),
        (["{tmp}/nano.pt", "--num-attention-heads", "4"], "--tokenizer: the source brings none"),
        (["{tmp}/nano.pt", "--tokenizer", "{saved}"], "tokens and the model 61 embeddings"),
    ],
)
def test_import_says_what_is_wrong(
    words: list[str], message: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.pt").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(foreign("nanoGPT")[1], tmp_path / "nano.pt")
    filled = [word.format(tmp=tmp_path, saved=saved) for word in words]
    with pytest.raises(SystemExit, match="2"):
        main(["import", *filled, "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_copy_that_computes_something_else_is_not_left_behind(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export_model
    monkeypatch.setattr(
        "trueup.base.convert.export_model", lambda model, form: _with_larger_weights(right(model, form))
    )
    with pytest.raises(TrueupError, match="the copy computes something else"):
        command("export", saved, "--to", "llama", "--output", tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


def _with_larger_weights(model: Any) -> Any:
    model.model.norm.weight.data *= 1.01
    return model
