"""TRL's fused head for a CPU: log-probabilities of the answers' tokens, and nothing over prompts or padding.

`model(..., labels=labels, fused_lm_head=True)` is how TRL's trainers ask for log-probabilities. Its own head
leaves out what has no label on a GPU alone; on a CPU it computes every position, in fp32. There this one
takes its place, with the same outputs, so all else is TRL's.
"""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import FusedCausalLMOutput

from trueup.base import GPTForCausalLM
from trueup.base.loss import IGNORED, SLICE_LOGITS


def add_lean_head(model: GPTForCausalLM) -> None:
    """Put it on a model that has TRL's; every other call goes on to what was there."""
    before = model.forward

    @functools.wraps(type(model).forward)  # generate() looks at the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("fused_lm_head", False):
            return before(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        kwargs["use_cache"] = False
        hidden = model.model(*args, **kwargs).last_hidden_state[:, :-1]
        mask = labels != IGNORED
        weight = model.get_output_embeddings().weight
        found = _sliced(hidden[mask] * model.config.logit_scale, weight, labels[mask])
        log_probs, entropy, mean_logits, is_top1 = (
            flat.new_zeros(mask.shape).masked_scatter(mask, flat) for flat in found
        )
        return FusedCausalLMOutput(
            log_probs=log_probs, entropy=entropy, mean_logits=mean_logits, is_top1=is_top1, label_mask=mask
        )

    model.forward = forward


def _sliced(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """`_measured` of (N, hidden_size), as many rows at a time as leave the logits in the processor's cache;
    the backward pass computes them again."""
    rows = max(1, SLICE_LOGITS["cpu"] // len(weight))
    parts = [
        checkpoint(_measured, part, weight, wanted, use_reentrant=False)
        for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return [torch.cat(figure) for figure in zip(*parts, strict=True)]


def _measured(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p (nats) of targets (N,), and without gradient the entropy, the mean logit and whether the target
    is the likeliest token."""
    logits = (hidden @ weight.T).float()
    distribution = logits.log_softmax(dim=-1)
    log_probs = distribution.gather(-1, targets[:, None])[:, 0]
    with torch.no_grad():
        entropy = -torch.linalg.vecdot(distribution.exp(), distribution)
        return log_probs, entropy, logits.mean(dim=-1), logits.argmax(dim=-1) == targets
