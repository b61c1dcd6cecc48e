"""The sampler: a row is its own, greedy is generate's greedy, and finished rows cost nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from eval_models import policy, tokenizer
from transformers import TopKLogitsWarper, TopPLogitsWarper

from trueup.eval.kl import completion_log_probs
from trueup.eval.sampler import SamplingSettings, choose, sample, slots_after, uniforms
from trueup.recipes.errors import UsageError

FAMILIES = ["gpt", "llama", "gpt2"]
SETTINGS = SamplingSettings(max_new_tokens=40, seed=3)
PROMPTS = ["a", "Hello there, world", [{"role": "user", "content": "Why?"}], "x" * 31, "y" * 60, "b", "bc"]


def stopping(family: str, seed: int = 0) -> tuple[object, object]:
    """A model that soon ends: its generation config takes ten tokens for an end."""
    model = policy(family, seed)
    model.generation_config.eos_token_id = list(range(2, 12))
    return model, tokenizer()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_neighbours_batch_size_or_padding(family: str) -> None:
    model, tok = stopping(family)
    prompts = PROMPTS * 3
    together = sample(model, tok, prompts, replace(SETTINGS, batch_size=64))
    assert {one.ended for one in together} == {True, False}
    assert len({one.text for one in together}) > len(PROMPTS)  # equal prompts with other keys differ
    for size in (1, 5):
        assert sample(model, tok, prompts, replace(SETTINGS, batch_size=size)) == together
    picked = [20, 3, 11]
    alone = sample(model, tok, [prompts[row] for row in picked], SETTINGS, keys=picked)
    assert alone == [together[row] for row in picked]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_generates_greedy_token_for_token(family: str) -> None:
    model, tok = stopping(family, seed=1)
    found = sample(model, tok, PROMPTS, SamplingSettings(max_new_tokens=50, temperature=0))
    for one in found:
        prompt = torch.tensor([one.prompt_ids])
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=50, do_sample=False, pad_token_id=0
        )
        assert one.ids == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_a_plain_forward(family: str) -> None:
    model, tok = stopping(family)
    settings = replace(
        SETTINGS, temperature=0.7, top_k=40
    )  # the log-probabilities stay those at temperature 1
    found = sample(model, tok, PROMPTS, settings, log_probs=True)
    for one, expected in zip(found, completion_log_probs(model, found), strict=True):
        torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=2e-4, rtol=0)


def test_k_completions_of_a_prompt_need_k_keys() -> None:
    model, tok = stopping("gpt")
    found = sample(model, tok, ["a"] * 8, SETTINGS, keys=range(100, 108))
    assert len({one.text for one in found}) == 8
    with pytest.raises(UsageError, match="the same key twice"):
        sample(model, tok, ["a", "b", "a"], SETTINGS, keys=[0, 0, 0])


def test_fewer_new_tokens_give_a_prefix() -> None:
    model, tok = stopping("gpt")
    long = sample(model, tok, PROMPTS, SETTINGS)
    short = sample(model, tok, PROMPTS, replace(SETTINGS, max_new_tokens=5))
    assert [one.ids for one in short] == [one.ids[:5] for one in long]
    assert [one.ended for one in short] == [one.ended and len(one.ids) <= 5 for one in long]


def test_text_leaves_out_the_end_and_ids_keep_it() -> None:
    model, tok = stopping("gpt")
    for one in sample(model, tok, PROMPTS, SETTINGS):
        assert one.text == tok.decode(one.ids, skip_special_tokens=True)
        assert [token in range(2, 12) for token in one.ids] == [False] * (len(one.ids) - 1) + [one.ended]


def test_finished_rows_are_not_computed() -> None:
    model, tok = stopping("gpt")
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = sample(model, tok, PROMPTS * 3, SETTINGS)
    assert sum(rows) == sum(len(one.ids) for one in found)


def test_the_end_of_the_context_ends_a_row_and_only_that_row() -> None:
    model, tok = policy("gpt"), tokenizer()
    prompts = [[5] * 120, [5] * 3]
    long, short = sample(model, tok, prompts, SamplingSettings(max_new_tokens=20, temperature=0))
    assert (len(long.ids), len(short.ids)) == (8, 20)
    with pytest.raises(UsageError, match=r"prompts\[1\]: 128 tokens, and the model's context is 128"):
        sample(model, tok, [[5], [5] * 128], SETTINGS)
    with pytest.raises(UsageError, match=r"prompts\[0\]: 0 tokens"):
        sample(model, tok, [[]], SETTINGS)


def test_dropout_is_off_and_the_training_flag_is_put_back() -> None:
    model = policy("gpt", residual_dropout=0.5).train()
    first, second = (sample(model, tokenizer(), PROMPTS, SETTINGS) for _ in range(2))
    assert first == second
    assert model.training


def test_bf16_autocast_samples_from_nearly_the_same_distribution() -> None:
    model, tok = policy("gpt", initializer_range=0.1), tokenizer()
    full = sample(model, tok, ["a"] * 200, SamplingSettings(max_new_tokens=1))
    half = sample(model, tok, ["a"] * 200, SamplingSettings(max_new_tokens=1), autocast=torch.bfloat16)
    assert np.mean([one.ids == other.ids for one, other in zip(full, half, strict=True)]) > 0.9


def test_samples_follow_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf]])
    noise = torch.from_numpy(uniforms(seed=0, key=0, count=20_000))
    counts = torch.bincount(choose(logits.expand(20_000, -1), noise, SETTINGS), minlength=4) / 20_000
    torch.testing.assert_close(counts, logits.softmax(-1)[0], atol=0.012, rtol=0)
    assert counts[3] == 0


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
def test_the_ends_of_the_noise_choose_tokens_that_are_possible(edge: float) -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 7], logits[0, 31] = 0.0, 1.0
    chosen = choose(logits, torch.tensor([edge], dtype=torch.float64), SETTINGS)
    assert chosen.tolist() == [7 if edge == 0 else 31]


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.3), (0, 0.9), (7, 0.5)])
def test_top_k_and_top_p_leave_the_tokens_that_transformers_leaves(top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 40) * 2
    scores = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    noise = torch.linspace(0, 1, 5001, dtype=torch.float64)[:-1]
    chosen = choose(logits.expand(5000, -1), noise, SamplingSettings(top_k=top_k, top_p=top_p))
    assert set(chosen.tolist()) == set(scores.isfinite().nonzero()[:, 1].tolist())


def test_random_numbers_belong_to_seed_and_key() -> None:
    streams = [uniforms(seed, key, 8) for seed in (0, 1) for key in (0, 1)]
    assert len({tuple(stream) for stream in streams}) == 4
    np.testing.assert_array_equal(uniforms(1, 1, 20)[:8], streams[3])


@pytest.mark.parametrize("done", ["1000", "0001", "1111", "0000", "10110100"])
def test_live_rows_fill_the_slots_of_the_done(done: str) -> None:
    flags = torch.tensor([char == "1" for char in done])
    kept = slots_after(flags)
    assert sorted(kept.tolist()) == (~flags).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [2**63 + 1, 2**64 - 1, -5])
def test_large_and_negative_seeds_and_keys_have_luck_of_their_own(seed: int) -> None:
    rows = {uniforms(seed, key, 4).tobytes() for key in (0, 1, 2**63, 2**63 + 1, -1, -2)}
    assert len(rows) == 6
    assert uniforms(seed, 0, 4).tobytes() != uniforms(seed + 1, 0, 4).tobytes()
