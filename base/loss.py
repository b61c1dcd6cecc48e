"""Linear layer and cross-entropy in one, a slice of the positions at a time: the logits never exist in full.

For 8,192 tokens and a vocabulary of 50k the logits and their gradient would be 3.3 GB in fp32, more than the
model. Here the gradients are taken in the forward pass while a slice of logits is at hand, so nothing is
computed twice and the backward pass only scales them (as in Liger's kernel, https://arxiv.org/abs/2410.10989).
torch's own `F.linear_cross_entropy` does that on a GPU, but on a CPU it was 3 to 5 times slower than this.
"""

from typing import Any

import torch
import torch.nn.functional as F

IGNORED = -100  # a label that is not to be predicted

# Logits of one slice: on a CPU few enough to stay in its cache, on a GPU enough to fill it.
SLICE_LOGITS = {"cpu": 1 << 20}
GPU_SLICE_LOGITS = 1 << 26


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy, in nats, of `softmax(hidden @ weight.T)` against the labels.

    The products run in autocast's dtype where it is on; softmax and sums in fp32.

    Args:
        hidden: (N, hidden_size).
        weight: (vocab_size, hidden_size).
        labels: (N,), already shifted; -100 where nothing is to be predicted.

    Returns:
        A scalar in fp32. Divide it by the number of labels of all the batches that make one step.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, dtype, wanted)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
        wanted: bool,
    ) -> torch.Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        positions = max(1, SLICE_LOGITS.get(hidden.device.type, GPU_SLICE_LOGITS) // weight.shape[0])
        for start in range(0, len(hidden), positions):
            part = slice(start, start + positions)
            logits = (hidden[part] @ weight.T).float()
            loss += F.cross_entropy(logits, labels[part], ignore_index=IGNORED, reduction="sum")
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = _grad_logits(logits, labels[part]).to(dtype)
                grad_hidden[part] = grad_logits @ weight
                grad_weight += grad_logits.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Only scales what forward() found: the loss is a scalar, so its gradient is a factor."""
        gradients = [
            (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None


def _grad_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """d loss / d logits = softmax - one-hot, and zero where the label is ignored."""
    gradient = F.softmax(logits, dim=-1)
    gradient[torch.arange(len(labels), device=labels.device), labels.clamp(min=0)] -= 1
    return gradient.mul_((labels != IGNORED)[:, None])
