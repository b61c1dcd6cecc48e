"""The sampled KL: right where it can be enumerated, 0 for equal models, the same in any batch."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_models import policy, tokenizer
from peft import LoraConfig, get_peft_model

from trueup.eval import kl
from trueup.eval.kl import best_of_n_kl, completion_log_probs, kl_of_samples, sampled_kl
from trueup.eval.sampler import Sample, SamplingSettings, sample
from trueup.recipes.errors import UsageError

PROMPTS = ["a", "Hello there", [{"role": "user", "content": "Why?"}], "x" * 40] * 3
SETTINGS = SamplingSettings(max_new_tokens=24)
EOS = 2


def exact_kl(first: torch.nn.Module, second: torch.nn.Module, prompt: list[int], length: int) -> float:
    """By summing over every sequence of up to `length` tokens that ends with eos or is cut."""
    vocabulary = range(first.config.vocab_size)
    total = 0.0
    for count in range(1, length + 1):
        for ids in itertools.product(vocabulary, repeat=count):
            if EOS in ids[:-1] or (count < length and ids[-1] != EOS):
                continue
            tokens = torch.tensor([[*prompt, *ids]])
            with torch.no_grad():
                ours, theirs = (
                    model(tokens)
                    .logits[0, len(prompt) - 1 : -1]
                    .double()
                    .log_softmax(-1)
                    .gather(-1, tokens.T[-count:])
                    for model in (first, second)
                )
            total += float(ours.sum().exp() * (ours - theirs).sum())
    return total


def test_the_estimate_meets_the_enumerated_kl() -> None:
    first, second = (policy("gpt", seed, vocab_size=5, initializer_range=0.4) for seed in (0, 1))
    expected = exact_kl(first, second, [3, 4], length=3)
    settings = SamplingSettings(max_new_tokens=3, batch_size=1000)
    found, samples = sampled_kl(first, second, tokenizer(), [[3, 4]] * 4000, settings)
    assert expected > 0.3
    assert abs(found.per_sequence - expected) < 3 * found.stderr
    assert found.stderr < expected / 10
    # k3's expectation is the KL per token as well, where the length is not random: at the first token.
    heads = [Sample(one.prompt_ids, one.ids[:1], "", False) for one in samples]
    first_token = exact_kl(first, second, [3, 4], length=1)
    assert kl_of_samples(first, second, heads).k3_per_token == pytest.approx(first_token, rel=0.1)


def test_equal_models_are_exactly_zero_apart() -> None:
    found, samples = sampled_kl(policy("gpt"), policy("gpt"), tokenizer(), PROMPTS, SETTINGS)
    assert (found.per_sequence, found.stderr, found.k3_per_token) == (0, 0, 0)
    assert (found.sequences, found.tokens) == (len(samples), sum(len(one.ids) for one in samples))


@pytest.mark.parametrize("family", ["gpt", "llama", "gpt2"])
def test_chunks_order_and_padding_change_no_log_prob(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy(family)
    samples = sample(model, tokenizer(), PROMPTS, SETTINGS)
    together = completion_log_probs(model, samples)
    monkeypatch.setitem(kl.CHUNK_ELEMENTS, "cpu", 1)
    for one, expected, alone in zip(
        samples, together, reversed(completion_log_probs(model, samples[::-1])), strict=True
    ):
        torch.testing.assert_close(alone, expected, atol=2e-4, rtol=0)
        tokens = torch.tensor([[*one.prompt_ids, *one.ids]])
        with torch.no_grad():
            plain = model(tokens).logits[0, len(one.prompt_ids) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(
            alone, plain.gather(-1, torch.tensor(one.ids)[:, None])[:, 0], atol=2e-4, rtol=0
        )


def test_logits_never_exceed_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy("gpt")
    samples = sample(model, tokenizer(), PROMPTS, SETTINGS)
    sizes: list[int] = []
    model.register_forward_hook(lambda module, args, output: sizes.append(output.logits.numel()))
    budget = 3 * 25 * len(tokenizer())
    monkeypatch.setitem(kl.CHUNK_ELEMENTS, "cpu", budget)
    completion_log_probs(model, samples)
    assert len(sizes) > 1
    assert max(sizes) <= budget


def test_the_reference_of_a_lora_policy_is_the_model_without_its_adapter(tmp_path: Path) -> None:
    base = policy("gpt")
    base.save_pretrained(tmp_path / "sft")
    tokenizer().save_pretrained(tmp_path / "sft")
    tuned = get_peft_model(policy("gpt"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    samples = sample(tuned, tokenizer(), PROMPTS, SETTINGS)
    switched_off, model, directory = (
        kl_of_samples(tuned, reference, samples) for reference in (None, base, tmp_path / "sft")
    )
    assert abs(switched_off.per_sequence) > 0.01
    assert switched_off.k3_per_token > 0
    assert model == directory
    assert switched_off.per_sequence == pytest.approx(model.per_sequence, abs=1e-3)


@pytest.mark.parametrize("impure", [{"temperature": 0.7}, {"top_k": 50}, {"top_p": 0.9}])
def test_a_kl_is_only_measured_on_the_policys_own_distribution(impure: dict[str, float]) -> None:
    settings = SamplingSettings(max_new_tokens=4, **impure)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="set temperature 1, top_k 0, top_p 1"):
        sampled_kl(policy("gpt"), None, tokenizer(), PROMPTS, settings)


def test_a_reference_that_cannot_be_is_refused() -> None:
    samples = [Sample([5], [6], "", False)]
    with pytest.raises(UsageError, match="no LoRA adapter to switch off"):
        kl_of_samples(policy("gpt"), None, samples)
    with pytest.raises(UsageError, match="there are none"):
        kl_of_samples(policy("gpt"), policy("gpt"), [])


@pytest.mark.parametrize("n", [1, 4, 16])
def test_the_bound_of_best_of_n_is_met_by_many_equally_likely_answers(n: int) -> None:
    answers = 100_000  # ranked; P(best of n is the i-th) = (i/N)^n - ((i-1)/N)^n
    edges = (np.arange(answers + 1) / answers) ** n
    best = np.diff(edges)
    exact = float((best * np.log(best * answers)).sum())
    assert best_of_n_kl(n) == pytest.approx(exact, abs=1e-3)
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
