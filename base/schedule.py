"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math
from typing import Any

SCHEDULES = ("cosine", "warmup_stable_decay")

# What `lr_scheduler_kwargs` may hold, under the names Transformers' own schedules use.
SCHEDULE_DEFAULTS: dict[str, dict[str, float]] = {
    "cosine": {"min_lr_rate": 0.0},
    "warmup_stable_decay": {"min_lr_ratio": 0.0, "num_decay_steps": 0.2},
}


def learning_rate_factor(
    step: int, total: int, warmup: int, kind: str, options: dict[str, Any] | None = None
) -> float:
    """What the peak learning rate is multiplied with at a step, in [0, 1].

    Linear from 1/warmup up to 1, so that no step is wasted on a rate of zero; then
    `cosine`: half a cosine down to `min_lr_rate` (https://arxiv.org/abs/1608.03983), or
    `warmup_stable_decay`: constant, and over the last `num_decay_steps` a line down to `min_lr_ratio`
    (https://arxiv.org/abs/2404.06395; the linear tail of https://arxiv.org/abs/2405.18392).

    Args:
        step: from 0 to total - 1.
        total, warmup: steps in all, and of the warm-up.
        options: see SCHEDULE_DEFAULTS.
    """
    options = SCHEDULE_DEFAULTS[kind] | (options or {})
    if step < warmup:
        return (step + 1) / warmup
    if kind == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return _between(options["min_lr_rate"], 0.5 * (1 + math.cos(math.pi * progress)))
    decay = max(1, steps_of(options["num_decay_steps"], total))
    return _between(options["min_lr_ratio"], min(1.0, (total - step) / decay))


def _between(lowest: float, share: float) -> float:
    return lowest + (1 - lowest) * share


def steps_of(value: float, total: int) -> int:
    """A number of steps, where a value below 1 is a share of all of them, rounded up: 0.02 of 900 is 18."""
    return math.ceil(round(value * total, 6)) if value < 1 else int(value)
