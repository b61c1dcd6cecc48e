"""How far a policy has moved from its reference: a sampled KL divergence, measured the same way for every
arm.

    KL(policy || reference) = E over x ~ policy of [log policy(x) - log reference(x)]

Sampled at temperature 1 from the policy on frozen prompts; the margins that DPO logs are taken on the text
of a data set instead, and are not a KL. What is estimated is the KL of completions of at most
`max_new_tokens` tokens.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trueup.eval.rendering import Text
from trueup.eval.sampler import Sample, SamplingSettings, evaluating, sample, token_log_probs
from trueup.recipes.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Logits that exist at a time: rows are forwarded together until they reach it, a single long row may pass it.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}


@dataclass(frozen=True)
class KLEstimate:
    """A sampled KL, in nats.

    Args:
        per_sequence: mean over sequences of the sum of log policy - log reference; may be negative by chance.
        stderr: its standard error over sequences; nan for fewer than two.
        k3_per_token: mean over tokens of r - 1 - log r with r = reference / policy: never negative, and of
            smaller variance (http://joschu.net/blog/kl-approx.html).
        sequences, tokens: what it was measured on.
    """

    per_sequence: float
    stderr: float
    k3_per_token: float
    sequences: int
    tokens: int

    @classmethod
    def of(cls, log_ratios: Sequence[torch.Tensor]) -> "KLEstimate":
        """From log policy - log reference of each sample's tokens."""
        sums = torch.stack([ratios.sum() for ratios in log_ratios])
        tokens = torch.cat(list(log_ratios))
        return cls(
            per_sequence=float(sums.mean()),
            stderr=float(sums.std() / math.sqrt(len(sums))) if len(sums) > 1 else math.nan,
            k3_per_token=float((torch.expm1(-tokens) + tokens).mean()),
            sequences=len(sums),
            tokens=len(tokens),
        )


def sampled_kl(
    policy: "PreTrainedModel",
    reference: "PreTrainedModel | Path | str | None",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Text | list[int]],
    settings: SamplingSettings,
    *,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[KLEstimate, list[Sample]]:
    """Sample from the policy and measure its KL from the reference; the samples are handed on for other use.

    Args:
        reference: a model, a model directory, or None: the policy with its LoRA adapter switched off.

    Raises:
        UsageError: `settings` do not sample from the policy itself, the policy has no adapter to switch
            off, or what `sample` and `kl_of_samples` raise.
    """
    if not settings.pure:
        raise UsageError(
            "temperature, top_k, top_p: a KL is measured on samples of the policy itself: "
            "set temperature 1, top_k 0, top_p 1"
        )
    samples = sample(policy, tokenizer, prompts, settings, autocast=autocast, progress=progress)
    return kl_of_samples(policy, reference, samples, autocast=autocast), samples


def kl_of_samples(
    policy: "PreTrainedModel",
    reference: "PreTrainedModel | Path | str | None",
    samples: Sequence[Sample],
    *,
    autocast: torch.dtype | None = None,
) -> KLEstimate:
    """The KL from samples that the policy itself made at temperature 1.

    Raises:
        UsageError: there are no samples, no such reference, or no adapter to switch off.
    """
    if not samples:
        raise UsageError("prompts: there are none to measure a KL on")
    return KLEstimate.of(log_ratios(policy, reference, samples, autocast=autocast))


def log_ratios(
    policy: "PreTrainedModel",
    reference: "PreTrainedModel | Path | str | None",
    samples: Sequence[Sample],
    *,
    autocast: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """log policy - log reference of each sample's tokens, (T_i,) fp64; arguments as `kl_of_samples`."""
    # Both by the same forward in the same batches, so that equal models give exactly 0.
    ours = completion_log_probs(policy, samples, autocast=autocast)
    with _reference(policy, reference) as model:
        theirs = completion_log_probs(model, samples, autocast=autocast)
    return [mine.double() - other.double() for mine, other in zip(ours, theirs, strict=True)]


def completion_log_probs(
    model: "PreTrainedModel", samples: Sequence[Sample], *, autocast: torch.dtype | None = None
) -> list[torch.Tensor]:
    """log p in nats of each completion's tokens given its prompt: one (T_i,) fp32 tensor per sample, on the
    CPU.

    Rows of about the same length share a forward. Logits exist for completions alone and for one chunk of
    rows.
    """
    device = next(model.parameters()).device
    budget = CHUNK_ELEMENTS.get(device.type, 1 << 23) // model.config.get_text_config().vocab_size
    order = sorted(range(len(samples)), key=lambda row: (len(samples[row].ids), len(samples[row].prompt_ids)))
    found: dict[int, torch.Tensor] = {}
    with evaluating(model, autocast):
        for rows in _chunks(order, lambda row: len(samples[row].ids) + 1, budget):
            for row, values in zip(rows, _forward(model, [samples[row] for row in rows]), strict=True):
                found[row] = values
    return [found[row] for row in range(len(samples))]


def best_of_n_kl(n: int) -> float:
    """The KL in nats of the best of n samples from the policy it samples: log n - (n - 1) / n.

    An upper bound, exact where no two samples are equal (https://arxiv.org/abs/2401.01879).
    """
    return math.log(n) - (n - 1) / n


def _chunks(order: list[int], length: Callable[[int], int], budget: int) -> Iterator[list[int]]:
    """Runs of `order`, which ascends in length, whose rows times longest length stay within the budget."""
    chunk: list[int] = []
    for row in order:
        if chunk and (len(chunk) + 1) * length(row) > budget:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _forward(model: "PreTrainedModel", samples: list[Sample]) -> list[torch.Tensor]:
    """Prompts padded on the left and completions on the right, so that all completions begin in one
    column."""
    device = next(model.parameters()).device
    before = max(len(one.prompt_ids) for one in samples)
    after = max(len(one.ids) for one in samples)
    ids = torch.zeros(len(samples), before + after, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(samples):
        place = slice(before - len(one.prompt_ids), before + len(one.ids))
        ids[row, place] = torch.tensor([*one.prompt_ids, *one.ids])
        mask[row, place] = 1
    ids, mask = ids.to(device), mask.to(device)
    outputs = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=after + 1,
    )
    # The logits of one position predict the token of the next.
    values = token_log_probs(outputs.logits[:, :-1], ids[:, before:]).cpu()
    return [values[row, : len(one.ids)] for row, one in enumerate(samples)]


@contextlib.contextmanager
def _reference(
    policy: "PreTrainedModel", reference: "PreTrainedModel | Path | str | None"
) -> Iterator["PreTrainedModel"]:
    if reference is None:
        if not hasattr(policy, "disable_adapter"):
            raise UsageError(
                "reference: the policy has no LoRA adapter to switch off; name a model directory"
            )
        with policy.disable_adapter():
            yield policy
    elif isinstance(reference, str | Path):
        from trueup.eval.loading import load_policy

        model, _ = load_policy(reference)
        yield model.to(policy.device)
    else:
        yield reference
