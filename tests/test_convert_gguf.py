"""A GGUF file holds the model, and llama.cpp computes the same from it; the latter where it is installed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from foreign_gpts import randomised

from trueup.base import GPTConfig, GPTForCausalLM
from trueup.base.convert_gguf import TOLERANCES, read_gguf, write_gguf
from trueup.base.convert_parity import parity
from trueup.base.tokenizer import default_generation_config, train_tokenizer
from trueup.recipes.errors import UsageError

TEXT = "the cat sat on the mat, 12 times; naïve façade. It's 3.14!\n\n  Then  it slept.\n"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
CLASSIC = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases, untied, scaled logits": {"bias": True, "tie_word_embeddings": False, "logit_scale": 0.5},
    "llama, linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "llama, yarn": {"rope_parameters": YARN},
    "llama, llama3": {"rope_parameters": LLAMA3},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "gpt2": CLASSIC,
    "gpt2, no biases, untied": CLASSIC | {"bias": False, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([TEXT * 9], vocab_size=330)


def build(tokenizer: Any, **changes: Any) -> GPTForCausalLM:
    shape = {"vocab_size": len(tokenizer) + 2, "hidden_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    model = randomised(GPTForCausalLM(GPTConfig(**shape | special | changes)))
    model.generation_config = default_generation_config(tokenizer)
    return model


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("outtype", ["f32", "f16", "q8_0"])
def test_the_file_holds_the_model(changes: Any, outtype: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = build(tokenizer, **changes)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", outtype)
    found = parity(model, read_gguf(tmp_path / "model.gguf", model.config))
    assert found.largest <= TOLERANCES[outtype] * found.scale, found.line()
    if outtype != "f32":
        assert found.largest > 1e-5, "nothing was rounded"


def test_types_names_and_tokens(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(build(tokenizer, **CLASSIC, intermediate_size=80), tokenizer, path, "q8_0")
    reader = gguf.GGUFReader(path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_qkv.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_down.weight"] == "F16", "80 is not a multiple of 32"
    assert kinds["position_embd.weight"] == kinds["blk.0.attn_norm.bias"] == "F32"
    assert "output.weight" not in kinds, "it is the embedding"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2"
    assert fields["gpt2.attention.head_count_kv"] == 4, "keys are copied to each head"
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.tokens"][-2:] == [f"<|unused_{len(tokenizer) + i}|>" for i in range(2)]
    assert "generation %" not in fields["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp": "gelu"}, "no architecture for this mixture"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "linear and plain"),
        ({"rope_parameters": LLAMA3, "qk_norm": True}, "cannot be written for llama.cpp's qwen3"),
        ({"rope_parameters": YARN | {"beta_fast": 16.0}}, "linear and plain yarn can"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    changes: Any, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        write_gguf(build(tokenizer, **changes), tokenizer, tmp_path / "model.gguf")


def test_a_foreign_pretokenizer_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    other = train_tokenizer([TEXT * 9], vocab_size=330)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UsageError, match="not among those known"):
        write_gguf(build(other), other, tmp_path / "model.gguf")


# ------------------------------------------------------------------------------------------- llama.cpp

# In a process of its own: its server's threads do not survive a fork, and must not hold ours up at exit.
LLAMA_CPP = """
import json, os, sys
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = sys.argv[1], 256, 1
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = parameters.n_threads_http = 1
parameters.warmup, parameters.cache_ram_mib, parameters.verbosity = False, 0, 0
server = xllamacpp.Server(parameters)
request = json.loads(sys.argv[2])
answer = (server.handle_chat_completions if "messages" in request else server.handle_completions)(request)
print("\\nANSWER" + json.dumps(answer), flush=True)
os._exit(0)
"""


def llama_cpp(path: Path, **request: Any) -> dict[str, Any]:
    pytest.importorskip("xllamacpp", reason="llama.cpp's binding is not installed: pip install xllamacpp")
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP, str(path), json.dumps({"temperature": 0} | request)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "ANSWER" in done.stdout, done.stderr
    return json.loads(done.stdout.split("ANSWER")[1])


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_llama_cpp_computes_the_same(changes: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Greedy tokens of a long prompt, and the log-probability of each."""
    model = build(tokenizer, **changes)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "f32")
    ids = tokenizer(TEXT * 4, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 80
    # Halves of characters and special tokens are not shown one by one by llama.cpp: neither writes them.
    banned = [i for i in range(model.config.vocab_size) if not tokenizer.decode([i]).isascii()]
    banned += [*tokenizer.all_special_ids, len(tokenizer), len(tokenizer) + 1]
    answer = llama_cpp(
        tmp_path / "model.gguf", prompt=ids[0].tolist(), n_predict=12, n_probs=1,
        logit_bias=[[i, False] for i in banned],
    )  # fmt: skip
    theirs = answer["choices"][0]["logprobs"]["content"]
    ours = model.generate(
        ids, max_new_tokens=12, do_sample=False, suppress_tokens=banned, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert [token["id"] for token in theirs] == ours.sequences[0, ids.shape[1] :].tolist()
    for step, (token, logits) in enumerate(zip(theirs, ours.logits, strict=True)):
        expected = float(logits.log_softmax(-1)[0, token["id"]])
        # llama.cpp keeps keys and values in f16, and looks GPT-2's GELU up in a table of f16
        assert math.isclose(token["logprob"], expected, abs_tol=2e-2), step


def test_llama_cpp_cuts_text_into_the_same_tokens_and_renders_the_same_conversation(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = build(tokenizer)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "f16")
    for text in (TEXT, "<|user|> 100 1000 don't DON'T\t\tx", "日本語 é 🎈", " lead"):
        answer = llama_cpp(tmp_path / "model.gguf", prompt=text, n_predict=1)
        assert answer["usage"]["prompt_tokens"] == len(tokenizer(text)["input_ids"]), text
    messages = [{"role": "user", "content": "the cat  <|end|> sat?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    made = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    answer = llama_cpp(tmp_path / "model.gguf", messages=messages, max_tokens=8)
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(made, skip_special_tokens=True)
