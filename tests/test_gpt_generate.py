"""Generation: every mode of `generate` gives the tokens that naive, uncached greedy decoding gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, StaticCache

from trueup.base import GPTConfig, GPTForCausalLM
from trueup.base.tokenizer import default_generation_config, train_tokenizer

VOCAB, PAD, NEW = 97, 0, 12


def tiny(**changes: Any) -> GPTForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
    model = GPTForCausalLM(GPTConfig(**(shape | changes))).eval()
    model.generation_config.pad_token_id = PAD
    return model


@pytest.fixture(scope="module")
def model() -> GPTForCausalLM:
    return tiny()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return tokens(1, 9)


@torch.no_grad()
def naive_greedy(model: GPTForCausalLM, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    for _ in range(new):
        newest = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, newest], dim=1)
    return ids


def generate(model: GPTForCausalLM, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(ids, **({"max_new_tokens": NEW, "do_sample": False} | kwargs))


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("static", [False, True])
def test_cached_logits_equal_uncached(implementation: str, static: bool) -> None:
    model = tiny(attn_implementation=implementation)
    ids = tokens(2, 24)
    whole = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=32) if static else None
    out = model(ids[:, :16], past_key_values=cache, use_cache=True)
    assert largest(out.logits, whole[:, :16]) <= 1e-5
    for step in range(16, 24):
        out = model(ids[:, step : step + 1], past_key_values=out.past_key_values)
        assert largest(out.logits[:, 0], whole[:, step]) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_bf16_cached_logits_equal_uncached(static: bool) -> None:
    """The matmul path, whose decode, static prefill and whole rows are three different masks."""
    model = tiny().to(torch.bfloat16)
    ids = tokens(2, 24)
    whole = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=32) if static else None
    out = model(ids[:, :23], past_key_values=cache, use_cache=True)
    assert largest(out.logits, whole[:, :23]) <= 0.05 * whole.std()
    out = model(ids[:, 23:], past_key_values=out.past_key_values)
    assert largest(out.logits[:, 0], whole[:, 23]) <= 0.15 * whole.std()


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 1, "repetition_penalty": 1.0},
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 1e-6},
    ],
)
def test_every_greedy_mode_gives_the_same_tokens(
    model: GPTForCausalLM, prompt: torch.Tensor, mode: dict[str, Any]
) -> None:
    assert torch.equal(generate(model, prompt, **mode), naive_greedy(model, prompt))


def test_assisted_generation_gives_the_same_tokens(model: GPTForCausalLM, prompt: torch.Tensor) -> None:
    assistant = tiny(num_hidden_layers=1)
    assert torch.equal(generate(model, prompt, assistant_model=assistant), naive_greedy(model, prompt))


@pytest.mark.parametrize("mode", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(
    model: GPTForCausalLM, mode: dict[str, Any]
) -> None:
    prompts = [tokens(1, 9), tokens(1, 4), tokens(1, 6)]
    rows = [torch.nn.functional.pad(ids, (9 - ids.shape[1], 0), value=PAD) for ids in prompts]
    mask = torch.cat([(row != PAD).long() for row in rows])
    together = generate(model, torch.cat(rows), attention_mask=mask, **mode)[:, 9:]
    alone = torch.cat([naive_greedy(model, ids)[:, ids.shape[1] :] for ids in prompts])
    assert torch.equal(together, alone)


def test_sampling_follows_its_seed_and_temperature(model: GPTForCausalLM, prompt: torch.Tensor) -> None:
    def sample(seed: int, temperature: float) -> torch.Tensor:
        torch.manual_seed(seed)
        return generate(model, prompt, do_sample=True, temperature=temperature, num_return_sequences=4)

    assert torch.equal(sample(1, 1.0), sample(1, 1.0))
    assert not torch.equal(sample(1, 1.0), sample(2, 1.0))
    assert torch.equal(sample(1, 1e-4)[:1], naive_greedy(model, prompt))


def test_beam_search_finds_a_likelier_text_than_greedy(model: GPTForCausalLM, prompt: torch.Tensor) -> None:
    def log_likelihood(ids: torch.Tensor) -> float:
        return -model(ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < 9, -100)).loss.item()

    beam = generate(model, prompt, num_beams=6)
    assert beam.shape == (1, 9 + NEW)
    assert log_likelihood(beam) > log_likelihood(naive_greedy(model, prompt))


def test_generation_ends_at_eos(model: GPTForCausalLM, prompt: torch.Tensor) -> None:
    expected = naive_greedy(model, prompt)
    new = expected[0, 9:].tolist()
    eos = new[-1]
    length = 9 + new.index(eos) + 1
    assert torch.equal(generate(model, prompt, eos_token_id=eos), expected[:, :length])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the cat sat on the mat " * 9], vocab_size=300)


def test_stop_strings(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(vocab_size=len(tokenizer))
    model.generation_config = default_generation_config(tokenizer)
    prompt = tokenizer("the cat", return_tensors="pt")["input_ids"]
    expected = naive_greedy(model, prompt)[0]
    new = [tokenizer.decode([i]) for i in expected[prompt.shape[1] :]]
    stop = [text for text in new if text.isalnum()][-1]
    out = generate(model, prompt, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(out[0], expected[: prompt.shape[1] + new.index(stop) + 1])


def test_the_generation_config_travels_with_the_model(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny(vocab_size=len(tokenizer))
    model.generation_config = default_generation_config(tokenizer)
    model.save_pretrained(tmp_path)
    loaded = GPTForCausalLM.from_pretrained(tmp_path).generation_config
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


@pytest.mark.slow
def test_compiled_static_generation_gives_the_same_tokens(
    model: GPTForCausalLM, prompt: torch.Tensor
) -> None:
    compiled = tiny()
    compiled.forward = torch.compile(compiled.forward, fullgraph=True)
    out = generate(compiled, prompt, cache_implementation="static", disable_compile=True)
    assert torch.equal(out, naive_greedy(model, prompt))
