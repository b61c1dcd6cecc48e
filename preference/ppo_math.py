"""PPO for language models as pure functions of tensors: no model, no state, no randomness.

Shapes are written with B rows and T tokens of completion. A mask (B, T) is True on the tokens the policy
sampled, its end-of-sequence token included, and False on the padding after them; what stands on padding is
ignored, and comes out as 0. Log-probabilities are in nats.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

KLEstimator = Literal["k1", "k2", "k3"]

# exp(20) is 5e8: further than any ratio that could still be meant, and finite in every dtype but fp16.
MAX_LOG_RATIO = 20.0


def kl_estimate(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, estimator: KLEstimator = "k1"
) -> torch.Tensor:
    """KL(policy || reference) at each token, from tokens that the policy sampled.

    With r = reference / policy (http://joschu.net/blog/kl-approx.html): k1 = -log r is unbiased, and may be
    negative by chance; k2 = (log r)^2 / 2 is biased and varies less; k3 = r - 1 - log r is unbiased and never
    negative.

    Args:
        log_probs, reference_log_probs: (B, T) of the sampled tokens.

    Returns:
        (B, T); its sum over T estimates the KL of whole completions.
    """
    log_ratio = (reference_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """-kl_coef * KL at each token, and the score of the completion at its last one.

    The last token is the end-of-sequence token where there is one, counted once (TRL up to 1.12 put the score
    one place further, on the padding).

    Args:
        scores: (B,).
        kl: (B, T) per token.

    Returns:
        (B, T), 0 on padding.
    """
    rewards = (-kl_coef * kl).masked_fill(~mask, 0.0)
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(rewards), device=rewards.device), last] += scores
    return rewards


def gae_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (https://arxiv.org/abs/1506.02438, equation 16).

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1}

    A completion ends with its last token, cut or not: there is no value after it.

    Args:
        rewards: (B, T), r_t follows the t-th token.
        values: (B, T), V_t was estimated before the t-th token was sampled.

    Returns:
        Advantages (B, T) and returns A_t + V_t (B, T), both 0 on padding.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage  # on padding all three are 0, and so stays the advantage
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values


def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    shift_mean: bool = True,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> torch.Tensor:
    """Values (B, T) brought to variance 1, and to mean 0 unless `shift_mean` is False; 0 on padding.

    Args:
        total: adds a tensor up over all ranks, so that all whiten by the statistics of the whole batch.
    """
    kept = values.masked_fill(~mask, 0.0)
    sums = total(torch.stack([kept.sum(), mask.sum().to(kept)]))
    mean, count = sums[0] / sums[1], sums[1]
    centred = (values - mean).masked_fill(~mask, 0.0)
    variance = total(centred.square().sum()) / count
    white = centred * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else (white + mean).masked_fill(~mask, 0.0)


class PolicyLoss(NamedTuple):
    """What `policy_loss` finds at each token, all (B, T) and 0 on padding."""

    loss: torch.Tensor
    ratio: torch.Tensor  # new / old probability
    clipped: torch.Tensor  # 1 where the clipped term decides, and the gradient is 0


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float,
) -> PolicyLoss:
    """PPO's clipped surrogate at each token (https://arxiv.org/abs/1707.06347, equation 7), negated.

    Args:
        log_probs: (B, T), with gradient.
        old_log_probs, advantages: (B, T), without.
    """
    log_ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = torch.maximum(plain, bounded).masked_fill(~mask, 0.0)
    return PolicyLoss(loss, ratio.detach() * mask, ((bounded > plain) & mask).to(loss.dtype))


class ValueLoss(NamedTuple):
    """What `value_loss` finds at each token, both (B, T) and 0 on padding."""

    loss: torch.Tensor
    clipped: torch.Tensor


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    cliprange_value: float,
) -> ValueLoss:
    """Half the squared error at each token, held to a change of `cliprange_value` since the rollout.

    https://arxiv.org/abs/2005.12729, section 3, 1.: the larger of the errors with and without clipping.

    Args:
        values: (B, T), with gradient.
        old_values, returns: (B, T), without.
    """
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    plain, bounded = (values - returns).square(), (near - returns).square()
    loss = 0.5 * torch.maximum(plain, bounded).masked_fill(~mask, 0.0)
    return ValueLoss(loss, ((bounded > plain) & mask).to(loss.dtype))


def explained_variance(
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> float:
    """1 - var(returns - values) / var(returns) over all tokens: 1 perfect, 0 no better than their mean.

    nan where the returns do not vary.
    """

    def variance(x: torch.Tensor) -> float:
        kept = x[mask]
        sums = total(torch.stack([kept.sum(), mask.sum().to(kept)]))
        return float(total((kept - sums[0] / sums[1]).square().sum()) / sums[1])

    spread = variance(returns)
    return 1 - variance(returns - values) / spread if spread > 1e-12 else float("nan")


class KLController:
    """The coefficient on the KL: fixed, or moved so that the KL comes to a target.

    coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon
    (https://arxiv.org/abs/1909.08593, section 2.2).

    Args:
        coef: where it starts.
        target: nats per completion; None keeps it fixed.
        horizon: episodes in which an error of 20 % moves it by about 20 %.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10_000) -> None:
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """Take in the mean KL per completion (nats) of a round of so many episodes."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon
