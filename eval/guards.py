"""Guards: they read what a training run logs and speak up, in plain words, when something is going wrong.

A `Guard` is a state machine without torch: metrics go in, alarms come out, each with its likely cause and
the fix. An alarm is raised once, and again only after its condition has cleared. `guard_callback.py` ties
it to a Trainer.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Where each signal stands in the logs, by the names of TRL, of PPO and of our evaluation; any of them
# counts. Trainer puts `eval_` before what comes from an evaluation.
SIGNALS = {
    "margin": ("rewards/margins",),  # DPO: beta * (chosen's log-ratio - rejected's)
    "chosen": ("rewards/chosen",),  # DPO: beta * log-ratio to the reference
    "rejected": ("rewards/rejected",),
    "accuracy": ("eval_accuracy",),  # a reward model's, on held-out pairs
    "score": ("eval_score",),  # the scorer that is not trained on, on validation prompts
    "proxy": ("objective/scores", "reward"),  # what is trained on: PPO, GRPO and RLOO
    "length": ("completions/mean_length", "eval_completions/mean_length"),
    "repetition": ("repetition", "eval_repetition"),
    "eos_rate": ("eos_rate", "eval_eos_rate"),
    "clipped": ("completions/clipped_ratio", "eval_completions/clipped_ratio"),  # share that met no eos
    "kl": ("objective/kl", "kl", "eval_kl"),
    "explained_variance": ("val/explained_variance",),
    "ratio": ("val/ratio",),
    "approx_kl": ("policy/approxkl_avg",),
}


@dataclass(frozen=True)
class Alarm:
    """What is wrong, since when, why that usually is, and what to do."""

    name: str
    step: int
    message: str
    cause: str
    fix: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.message}. Likely cause: {self.cause}. Fix: {self.fix}."


@dataclass(frozen=True)
class Limits:
    """When a guard speaks.

    Args:
        warmup_steps: until then margins may be 0, a reward model at chance, a value model worthless; at least
            the run's own warm-up of the learning rate.
        eval_pairs: how many held-out pairs a reward model's accuracy is taken on; 0: not known, some 1,000
            assumed.
        margin: a DPO margin (absolute) below this is none.
        window: evaluations that a trend is read from.
        trend_p: how improbable by chance their slope, or that none goes the other way, must be.
        length_factor: growth over the first value that is running away.
        repetition: rise of the repeated share over its first value that is running away.
        eos_factor, eos_fall: an EOS rate below this share of its first value, and so much below it, has
            collapsed.
        kl: a mean KL below this (nats per sequence) is negative beyond chance.
        ratio: the mean probability ratio, or its inverse, that has exploded.
        approx_kl: the same for the approximate KL of one update (nats per token).
        patience: values in a row that must be wrong.
    """

    warmup_steps: int = 20
    eval_pairs: int = 0
    margin: float = 1e-3
    window: int = 5
    trend_p: float = 0.02
    length_factor: float = 2.0
    repetition: float = 0.2
    eos_factor: float = 0.5
    eos_fall: float = 0.1
    kl: float = -0.05
    ratio: float = 2.0
    approx_kl: float = 0.5
    patience: int = 3


Series = list[tuple[int, float]]  # (step, value), oldest first


class History:
    """The series of every logged metric, and the questions that rules ask of them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._logged: dict[str, Series] = defaultdict(list)

    def add(self, metrics: Mapping[str, Any], step: int) -> list[str]:
        """Take in numbers; returns the names of those that are not finite, which are kept out."""
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name, value in numbers.items():
            if math.isfinite(value):
                self._logged[name].append((step, value))
        return [name for name, value in numbers.items() if not math.isfinite(value)]

    def series(self, signal: str) -> list[Series]:
        """The logged series of a signal: one for each of its names that occurs."""
        return [self._logged[name] for name in SIGNALS[signal] if name in self._logged]

    def lasting(self, signal: str, wrong: Callable[[float], bool], after: int = -1) -> float | None:
        """The last value of a series of which the last `patience`, all later than step `after`, are wrong."""
        for series in self.series(signal):
            latest = [value for step, value in series[-self.limits.patience :] if step > after]
            if len(latest) == self.limits.patience and all(map(wrong, latest)):
                return latest[-1]
        return None

    def departed(self, signal: str, far: Callable[[float, float], bool]) -> tuple[float, float] | None:
        """(first, last) of a series whose last two values are both far from its first."""
        for series in self.series(signal):
            first = series[0][1]
            if len(series) > 2 and all(far(first, value) for _, value in series[-2:]):
                return first, series[-1][1]
        return None

    def trend_since(self, signal: str, step: int) -> int:
        """1 or -1 where the values since a step surely rise or fall, in a line or all along, else 0."""
        for series in self.series(signal):
            recent = [point for point in series if point[0] >= step]
            if len(recent) >= self.limits.window and (sign := _trend(recent, self.limits.trend_p)):
                return sign
        return 0

    def validation_falls_since(self) -> int | None:
        """Where the validation score falls: the step at which the window that shows it begins."""
        for series in self.series("score"):
            recent = series[-self.limits.window :]
            if len(recent) == self.limits.window and _trend(recent, self.limits.trend_p) < 0:
                return recent[0][0]
        return None


def _trend(points: Series, p: float) -> int:
    from scipy import stats

    steps, values = zip(*points, strict=True)
    if min(values) == max(values) or min(steps) == max(steps):
        return 0
    # A straight line misses a sudden fall to the ground. Five values never rise by chance once in 120 times.
    moves = {math.copysign(1, b - a) for a, b in pairwise(values) if a != b}
    if len(moves) == 1 and len(set(values)) > 2 and 1 / math.factorial(len(values)) < p:
        return int(moves.pop())
    line = stats.linregress(steps, values)
    return int(math.copysign(1, line.slope)) if line.pvalue / 2 < p else 0


# ------------------------------------------------------------------------------------------------------ rules


def _margins_at_zero(history: History) -> str | None:
    limits = history.limits
    margin = history.lasting("margin", lambda value: abs(value) < limits.margin, after=limits.warmup_steps)
    if margin is None:
        return None
    return f"the margin between chosen and rejected is still {margin:.1g}: the policy equals its reference"


def _both_fall(history: History) -> str | None:
    since = history.validation_falls_since()
    if since is None or any(history.trend_since(side, since) >= 0 for side in ("chosen", "rejected")):
        return None
    return f"since step {since} chosen and rejected both lose probability, and the validation score falls"


def _repetition_runs_away(history: History) -> str | None:
    found = history.departed("repetition", lambda first, last: last > first + history.limits.repetition)
    return found and f"the share of repeated phrases went from {found[0]:.0%} to {found[1]:.0%}"


def _length_runs_away(history: History) -> str | None:
    found = history.departed("length", lambda first, last: last > first * history.limits.length_factor)
    return found and f"the mean length of completions went from {found[0]:.0f} to {found[1]:.0f} tokens"


def _eos_collapses(history: History) -> str | None:
    limits = history.limits

    def collapsed(first: float, last: float) -> bool:
        return last < first * limits.eos_factor and last < first - limits.eos_fall

    found = history.departed("eos_rate", collapsed)
    if found is None:
        clipped = history.departed("clipped", lambda first, last: collapsed(1 - first, 1 - last))
        found = clipped and (1 - clipped[0], 1 - clipped[1])
    return (
        found
        and f"the share of completions that end by themselves fell from {found[0]:.0%} to {found[1]:.0%}"
    )


def _reward_model_at_chance(history: History) -> str | None:
    limits = history.limits
    latest = [series[-1][1] for series in history.series("accuracy") if series[-1][0] > limits.warmup_steps]
    ceiling = 0.5 + 1.96 * 0.5 / math.sqrt(limits.eval_pairs or 1000)
    if not latest or latest[0] > ceiling:
        return None
    return f"the reward model's accuracy on held-out pairs is {latest[0]:.1%}, no better than a coin"


def _kl_negative(history: History) -> str | None:
    kl = history.lasting("kl", lambda value: value < history.limits.kl)
    if kl is None:
        return None
    return (
        f"the KL from the reference has been negative for {history.limits.patience} rounds, now {kl:.3f} nats"
    )


def _value_model_worthless(history: History) -> str | None:
    after = history.limits.warmup_steps
    explained = history.lasting("explained_variance", lambda value: value < 0, after)
    if explained is None:
        return None
    return f"the value model explains {explained:.0%} of the returns' variance: worse than their mean"


def _update_explodes(history: History) -> str | None:
    ratios = [series[-1][1] for series in history.series("ratio")]
    steps = [series[-1][1] for series in history.series("approx_kl")]
    limits = history.limits
    if ratios and not 1 / limits.ratio <= ratios[0] <= limits.ratio:
        return (
            f"the mean probability ratio of new to old policy is {ratios[0]:.3g}, and should stay close to 1"
        )
    if steps and steps[0] > limits.approx_kl:
        return f"one round moved the policy by an approximate KL of {steps[0]:.3g} nats per token"
    return None


def _reward_hacked(history: History) -> str | None:
    since = history.validation_falls_since()
    if since is None or history.trend_since("proxy", since) <= 0:
        return None
    return f"since step {since} the reward that is trained on rises while the validation score falls"


@dataclass(frozen=True)
class Rule:
    """A condition with its explanation. `check` says what is wrong, with figures, or None."""

    name: str
    check: Callable[[History], str | None]
    cause: str
    fix: str


RULES = (
    Rule(
        "margins_at_zero",
        _margins_at_zero,
        "nothing is trained: learning rate near 0, frozen weights, adapter off, or chosen == rejected",
        "check learning_rate and the trained fraction printed at the start, and look at a few pairs",
    ),
    Rule(
        "both_log_probs_fall",
        _both_fall,
        "the loss widens the margin by pushing both answers down, and probability flows to text in neither",
        "lower learning_rate, raise beta, or add an SFT term: loss_type [sigmoid, sft]",
    ),
    Rule(
        "repetition_runs_away",
        _repetition_runs_away,
        "the policy has collapsed onto phrases that score well, or the learning rate is too high",
        "go back to an earlier checkpoint; lower learning_rate, raise beta or kl_coef",
    ),
    Rule(
        "length_runs_away",
        _length_runs_away,
        "the reward or the pairs favour length",
        "see the reward exam's correlation with length; raise beta or kl_coef, or balance the pairs",
    ),
    Rule(
        "eos_collapses",
        _eos_collapses,
        "ending is not rewarded, or truncated answers were trained on without their end",
        "raise missing_eos_penalty, lengthen the response limit, and check that training rows keep their eos",
    ),
    Rule(
        "reward_model_at_chance",
        _reward_model_at_chance,
        "labels are noise or swapped, answers are cut to what they share, or training was too short",
        "read some pairs; check max_length; raise learning_rate or epochs; do not optimise against it",
    ),
    Rule(
        "kl_negative",
        _kl_negative,
        "completions were not sampled from the policy as it is: top_k, top_p, penalty, other temperature, or "
        "an engine with weights of before",
        "sample with temperature 1, top_k 0, top_p 1, no penalties; use one temperature in all log-probs; "
        "give an engine the new weights each round",
    ),
    Rule(
        "value_model_worthless",
        _value_model_worthless,
        "its learning rate is too low or too high, or its start does not fit the reward's scale",
        "change its learning rate, normalise the reward, or train it longer before the policy",
    ),
    Rule(
        "update_explodes",
        _update_explodes,
        "too large a step on one batch of rollouts",
        "lower learning_rate or num_ppo_epochs, or set target_kl",
    ),
    Rule(
        "reward_hacked",
        _reward_hacked,
        "the policy has found what the reward model overrates",
        "keep the checkpoint from before; raise kl_coef, or train the reward model on samples of this policy",
    ),
)

_NOT_FINITE = (
    "a loss or gradient overflowed (fp16, a learning rate too high), or a row without any trained token",
    "use bf16 or fp32, lower learning_rate, check max_grad_norm; restart from the last checkpoint",
)


class Guard:
    """Watches one run.

    Args:
        limits: when to speak.
        ignore: names of alarms that are not wanted.
    """

    def __init__(self, limits: Limits | None = None, ignore: Iterable[str] = ()) -> None:
        self.history = History(limits or Limits())
        self.ignore = set(ignore)
        self._standing: set[str] = set()

    def observe(self, metrics: Mapping[str, Any], step: int) -> list[Alarm]:
        """Take in one line of the log; returns the alarms that begin with it."""
        broken = self.history.add(metrics, step)
        found = {
            "not_finite": Alarm("not_finite", step, f"{', '.join(broken)}: not a finite number", *_NOT_FINITE)
        }
        found = found if broken else {}
        for rule in RULES:
            if message := rule.check(self.history):
                found[rule.name] = Alarm(rule.name, step, message, rule.cause, rule.fix)
        begun = [alarm for name, alarm in found.items() if name not in self._standing | self.ignore]
        self._standing = set(found)
        return begun
