"""The value model, and the module that PPO trains: policy and value together, one forward for both.

Rows are prompt and completion in one piece, padded on the right. Attention is causal, so what stands behind a
token cannot change it: no mask, no position ids, and on a GPU the plain causal kernel. Logits exist at
the places that predict a completion's tokens only, and their distributions for a few of them at a time.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trueup.base import loss
from trueup.recipes.errors import UsageError

# Logits kept for the backward pass. All of a usual micro-batch: only beyond are they computed again there, so
# many at a time.
SLICE_LOGITS = {"cpu": 1 << 24}
GPU_SLICE_LOGITS = 1 << 28


class TokenOutputs(NamedTuple):
    """Of each completion token, (B, T) in fp32, 0 on padding; T is the longest completion's length."""

    log_probs: torch.Tensor
    entropy: torch.Tensor  # of the distribution it was drawn from; without gradient
    values: torch.Tensor | None  # estimated before it was drawn


class ValueModel(nn.Module):
    """A scalar for every position: a trunk of its own with a linear head, or a head on the policy's trunk."""

    def __init__(self, trunk: PreTrainedModel | None, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    @classmethod
    def from_reward_model(cls, model: PreTrainedModel) -> "ValueModel":
        """A copy of a reward model, without its calibration.

        Raises:
            UsageError: it has no `score` head.
        """
        if not isinstance(getattr(model, "score", None), nn.Module):
            raise UsageError(
                f"reward_funcs: {type(model).__name__} has no `score` head to start a value model from; "
                "wrap it in a function (prompts, completions, **columns) -> list[float]"
            )
        return cls(copy.deepcopy(model.base_model), copy.deepcopy(model.score)).float()

    @classmethod
    def from_policy(cls, policy: PreTrainedModel, share_trunk: bool = False) -> "ValueModel":
        """A copy of a language model's trunk, or the trunk itself, under a head that says 0 everywhere."""
        head = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(head.weight)
        return cls(None if share_trunk else copy.deepcopy(policy.base_model), head).float()

    def forward(
        self, input_ids: torch.Tensor, where: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Values (N,) where `where` (B, W) is True; `hidden` (N, hidden_size) the policy's states there."""
        if self.trunk is not None:
            hidden = self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state[where]
        assert hidden is not None
        with torch.autocast(input_ids.device.type, enabled=False):  # bf16 would round a value by 0.4 %
            values: torch.Tensor = self.head(hidden.float())[:, 0]
        return values


class ActorCritic(nn.Module):
    """What the optimizer, DDP and FSDP see: the policy, and the value model if there is one.

    Args:
        policy: a causal language model, or a PeftModel on one.
        temperature: divides the logits before every softmax.
    """

    def __init__(self, policy: Any, value: ValueModel | None, temperature: float) -> None:
        super().__init__()
        self.policy, self.value, self.temperature = policy, value, temperature
        self.logits_of = _logits_function(language_model(policy))
        if self.logits_of is None and value is not None and value.trunk is None:
            raise UsageError(f"share_trunk: not for {type(language_model(policy)).__name__}; set it to false")

    def forward(
        self, input_ids: torch.Tensor, completion_mask: torch.Tensor, with_values: bool = True
    ) -> TokenOutputs:
        """Log-probabilities, entropies and values of completions.

        Args:
            input_ids: (B, W), prompt and completion, padded on the right.
            completion_mask: (B, W), True on the completion's tokens.
        """
        targets = input_ids[completion_mask]
        before = completion_mask.roll(-1, dims=1)  # position t - 1 predicts token t
        hidden = None
        if self.logits_of is None:  # a head of another kind: the model's own, at every position
            logits = self.policy(input_ids=input_ids, use_cache=False).logits[before]
            log_probs, entropy = _log_probs(logits, targets, self.temperature)
        else:
            trunk = language_model(self.policy).base_model
            hidden = trunk(input_ids=input_ids, use_cache=False).last_hidden_state[before]
            log_probs, entropy = self._sliced(hidden, targets)
        values = None
        if with_values and self.value is not None:
            values = self.values(input_ids, completion_mask, hidden)
        return TokenOutputs(_by_row(log_probs, completion_mask), _by_row(entropy, completion_mask), values)

    def values(
        self, input_ids: torch.Tensor, completion_mask: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Values (B, T) alone; `hidden` (N, hidden_size) are the policy's states, for a shared trunk."""
        assert self.value is not None
        return _by_row(self.value(input_ids, completion_mask.roll(-1, dims=1), hidden), completion_mask)

    def _sliced(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies (N,) of tokens (N,) from hidden states (N, hidden_size)."""
        assert self.logits_of is not None
        logits_of = self.logits_of

        def part_of(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return _log_probs(logits_of(hidden), targets, self.temperature)

        vocabulary = language_model(self.policy).config.get_text_config().vocab_size
        rows = max(1, SLICE_LOGITS.get(hidden.device.type, GPU_SLICE_LOGITS) // vocabulary)
        if len(hidden) <= rows:
            return part_of(hidden, targets)
        parts = [
            checkpoint(
                part_of, hidden[start : start + rows], targets[start : start + rows], use_reentrant=False
            )
            for start in range(0, len(hidden), rows)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Called by Trainer where the recipe asks for it."""
        language_model(self.policy).activation_checkpointing_enable(**kwargs)
        if hasattr(self.policy, "enable_input_require_grads"):
            self.policy.enable_input_require_grads()  # or nothing below a frozen embedding is differentiated
        if self.value is not None and self.value.trunk is not None:
            self.value.trunk.activation_checkpointing_enable(**kwargs)


def language_model(policy: Any) -> PreTrainedModel:
    """The causal language model itself, its adapter in it."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def _by_row(flat: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Numbers (N,) of all completion tokens, row after row, as (B, T) with 0 behind each row's end."""
    mask = row_mask(completion_mask.sum(dim=1))
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def row_mask(lengths: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """(B, T), True on the first `lengths` (B,) places of each row; T is the largest of them, or `width`."""
    width = int(lengths.max()) if width is None else width
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def _log_probs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of tokens (N,) under logits (N, V), and the entropies without gradient, in fp32."""
    found: tuple[torch.Tensor, torch.Tensor] = _LogProbs.apply(logits, targets, temperature)
    return found


class _LogProbs(torch.autograd.Function):
    """A few rows at a time: in fp32 neither their distributions nor the gradient ever exist in full."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, entropy = logits.new_empty(2, len(logits), dtype=torch.float32)
        for rows in _slices(logits):
            distribution = _scaled(logits[rows], temperature).log_softmax(dim=-1)
            log_probs[rows] = distribution.gather(-1, targets[rows, None])[:, 0]
            entropy[rows] = -torch.linalg.vecdot(distribution.exp(), distribution)
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None]:
        """d log p / d logits = (one-hot - softmax) / temperature."""
        logits, targets = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _slices(logits):
            factor = slope[rows, None] / ctx.temperature
            part = _scaled(logits[rows], ctx.temperature).softmax(dim=-1).mul_(-factor)
            gradient[rows] = part.scatter_add_(-1, targets[rows, None], factor)
        return gradient, None, None


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits.float() / temperature if temperature != 1 else logits.float()


def _slices(logits: torch.Tensor) -> list[slice]:
    """Rows of logits (N, V) that are worked on together."""
    size = max(1, loss.SLICE_LOGITS.get(logits.device.type, loss.GPU_SLICE_LOGITS) // logits.shape[-1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


def _logits_function(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Hidden states (N, hidden_size) to logits (N, V) as the model itself does it; None where it does more.

    Found by trying: what this function says is compared with the model's own logits.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    # The scale of trueup and Cohere, of Granite, and Gemma's soft cap.
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden * scale if scale != 1 else hidden)
        return cap * torch.tanh(logits / cap) if cap else logits

    if type(head) is not nn.Linear:
        return None
    training = model.training
    model.eval()
    with torch.no_grad():
        probe = torch.arange(min(8, config.vocab_size), device=head.weight.device)[None]
        logits = model(input_ids=probe, use_cache=False).logits[0]
        ours = logits_of(model.base_model(input_ids=probe, use_cache=False).last_hidden_state[0])
    model.train(training)
    return logits_of if torch.allclose(ours.float(), logits.float(), atol=1e-3, rtol=1e-3) else None


def disable_dropout(module: nn.Module) -> None:
    """No dropout in training mode either: not as modules, nor as numbers that a forward hands on."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, number in vars(part).items():
            if "dropout" in name and isinstance(number, float):
                setattr(part, name, 0.0)
