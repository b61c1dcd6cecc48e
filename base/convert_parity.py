"""Whether two models are one: their logits side by side, on random tokens."""

import copy
import dataclasses
import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trueup.recipes.errors import TrueupError

# Largest |ours - theirs| logit, as a share of the largest logit (at least of 1): another order of summation.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Parity:
    """How far two models' logits lie apart, in fp32, at the start of the context and at its end."""

    largest: float  # |difference| of a logit, in nats
    mean: float
    scale: float  # the largest |logit|
    same_choice: float  # share of positions with the same likeliest token
    positions: int
    context: int

    def line(self) -> str:
        """For people."""
        return (
            f"logits differ by {self.largest:.1e} at most, {self.mean:.1e} on average (largest logit "
            f"{self.scale:.3g}); same likeliest token at {self.same_choice:.2%} of {self.positions:,} "
            f"positions, up to position {self.context:,}"
        )

    def as_dict(self) -> dict[str, float]:
        """For machines."""
        return dataclasses.asdict(self)


@torch.no_grad()
def parity(ours: PreTrainedModel, theirs: PreTrainedModel, rows: int = 2, length: int = 128) -> Parity:
    """Compare two models on random tokens, at the first positions of the context and at the last ones."""
    config = ours.config
    length = min(length, config.max_position_embeddings)
    ids = torch.randint(config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    both = [_in_fp32(model).eval() for model in (ours, theirs)]
    differences, scale, same = [], 0.0, 0.0
    for start in (0, config.max_position_embeddings - length):
        positions = torch.arange(start, start + length).expand(rows, -1)
        first, second = (model(ids, position_ids=positions, use_cache=False).logits for model in both)
        differences.append((first - second).abs())
        scale = max(scale, float(first.abs().max()))
        same += float((first.argmax(-1) == second.argmax(-1)).float().mean()) / 2
    apart = torch.stack(differences)
    largest = float(apart.max()) if torch.isfinite(apart).all() else math.inf
    return Parity(largest, float(apart.mean()), scale, same, 2 * ids.numel(), config.max_position_embeddings)


def checked_parity(ours: PreTrainedModel, theirs: PreTrainedModel, tolerance: float = TOLERANCE) -> Parity:
    """The same, where the difference must be rounding and nothing more.

    Raises:
        TrueupError: the two compute different things.
    """
    found = parity(ours, theirs)
    allowed = tolerance * max(1.0, found.scale)
    if not found.largest <= allowed:
        raise TrueupError(
            f"the copy computes something else: {found.line()}; {allowed:.1e} is allowed. Please report it "
            "with the config.json"
        )
    return found


def _in_fp32(model: PreTrainedModel) -> PreTrainedModel:
    return model if model.dtype == torch.float32 else copy.deepcopy(model).float()
