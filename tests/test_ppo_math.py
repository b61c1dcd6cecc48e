"""PPO's pure functions against slow loops, closed forms and numbers worked out by hand."""

import math

import pytest
import torch

from trueup.preference.ppo_math import (
    KLController,
    explained_variance,
    gae_advantages,
    kl_estimate,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)

LENGTHS = [5, 1, 3]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def _random(seed: int) -> torch.Tensor:
    """(3, 5), with garbage on the padding: nothing may look at it."""
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    return values.masked_fill(~MASK, 1e6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_agree_with_the_exact_kl(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.log_softmax(0.3 * torch.randn(8, generator=generator), 0)
    reference = torch.log_softmax(policy + 0.1 * torch.randn(8, generator=generator), 0)
    exact = (policy.exp() * (policy - reference)).sum()
    # The expectation, taken exactly: each token by its probability.
    expected = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()  # type: ignore[arg-type]
    tolerance = 0.1 if estimator == "k2" else 1e-3  # k2 is biased
    assert expected.item() == pytest.approx(exact.item(), rel=tolerance)


def test_kl_estimators_by_hand() -> None:
    ours, reference = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    assert kl_estimate(ours, reference, "k1").item() == pytest.approx(0.5)
    assert kl_estimate(ours, reference, "k2").item() == pytest.approx(0.125)
    assert kl_estimate(ours, reference, "k3").item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    assert kl_estimate(ours, reference - 1000, "k3").isfinite().all()
    assert kl_estimate(ours, reference + 1000, "k3").isfinite().all()


def test_the_score_lands_on_the_last_token() -> None:
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0]), torch.ones(3, 5), MASK, kl_coef=0.5)
    assert rewards.tolist() == [
        [-0.5, -0.5, -0.5, -0.5, 9.5],
        [19.5, 0, 0, 0, 0],
        [-0.5, -0.5, 29.5, 0, 0],
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_against_a_slow_loop(gamma: float, lam: float) -> None:
    rewards, values = _random(1), _random(2)
    advantages, returns = gae_advantages(rewards, values, MASK, gamma, lam)
    for row, length in enumerate(LENGTHS):
        v = [*values[row, :length].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-5)
    assert (advantages[~MASK] == 0).all()
    assert (returns[~MASK] == 0).all()


def test_gae_at_lambda_one_is_the_return_less_the_value() -> None:
    rewards, values = _random(3), _random(4)
    advantages, returns = gae_advantages(rewards, values, MASK, 1.0, 1.0)
    to_come = rewards.masked_fill(~MASK, 0).flip(1).cumsum(1).flip(1).masked_fill(~MASK, 0)
    torch.testing.assert_close(returns, to_come, atol=1e-5, rtol=0)
    expected = (to_come - values).masked_fill(~MASK, 0)
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)


def test_whitening_is_masked() -> None:
    white = whiten(_random(5), MASK)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[MASK].square().mean().item() == pytest.approx(1, abs=1e-5)
    assert (white[~MASK] == 0).all()
    unshifted = whiten(_random(5), MASK, shift_mean=False)
    assert unshifted[MASK].mean().item() == pytest.approx(_random(5)[MASK].mean().item(), abs=1e-6)
    assert (unshifted[~MASK] == 0).all()


def test_whitening_is_global_over_ranks() -> None:
    """Two ranks, each with half of the rows, and a `total` that adds the other rank's share."""
    values = _random(6)
    whole = whiten(values, MASK)
    mine, others = slice(0, 1), slice(1, 3)
    calls = iter(
        [
            torch.stack([values[others][MASK[others]].sum(), MASK[others].sum().float()]),
            (values[others][MASK[others]] - values[MASK].mean()).square().sum(),
        ]
    )
    half = whiten(values[mine], MASK[mine], total=lambda sums: sums + next(calls))
    torch.testing.assert_close(half, whole[mine])


def test_policy_loss_by_hand() -> None:
    old = torch.zeros(1, 4)
    ratio = torch.tensor([[1.0, 1.5, 0.5, 1.5]])
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = policy_loss(ratio.log(), old, advantages, mask, 0.2)
    # Clipped only where the ratio has gone too far the way the advantage wants it.
    torch.testing.assert_close(found.loss, torch.tensor([[-1.0, -1.2, -0.5, 1.5]]))
    torch.testing.assert_close(found.ratio, ratio)
    assert found.clipped.tolist() == [[0, 1, 0, 0]]


def test_policy_gradient_at_ratio_one_is_the_advantage_and_padding_has_none() -> None:
    log_probs = _random(7).requires_grad_()
    advantages = _random(8)
    found = policy_loss(log_probs, log_probs.detach(), advantages, MASK, 0.2)
    found.loss.sum().backward()
    assert log_probs.grad is not None
    torch.testing.assert_close(log_probs.grad[MASK], -advantages[MASK])
    assert (log_probs.grad[~MASK] == 0).all()
    assert (found.ratio[MASK] == 1).all()


def test_an_exploding_ratio_stays_finite() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    log_probs = torch.tensor([[500.0, -500.0]])
    found = policy_loss(log_probs, torch.zeros(1, 2), torch.tensor([[-1.0, -1.0]]), mask, 0.2)
    assert found.loss.isfinite().all()


def test_value_loss_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False]])
    old, returns = torch.zeros(1, 4), torch.full((1, 4), 1.0)
    values = torch.tensor([[0.1, 0.9, -0.9, 50.0]], requires_grad=True)
    found = value_loss(values, old, returns, mask, 0.2)
    # 0.9 counts as 0.2, so it gains nothing by having moved on; -0.9 is worse than -0.2, and counts as it is.
    torch.testing.assert_close(found.loss, 0.5 * torch.tensor([[0.81, 0.64, 3.61, 0.0]]))
    assert found.clipped.tolist() == [[0, 1, 0, 0]]
    found.loss.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0.0, -1.9, 0.0]]))


def test_explained_variance() -> None:
    returns = _random(9)
    assert explained_variance(returns, returns, MASK) == pytest.approx(1)
    assert explained_variance(torch.zeros(3, 5), returns, MASK) == pytest.approx(0, abs=1e-6)
    assert explained_variance(-returns, returns, MASK) == pytest.approx(-3, abs=1e-4)
    assert math.isnan(explained_variance(returns, torch.ones(3, 5), MASK))


def test_kl_controller() -> None:
    fixed = KLController(0.05)
    fixed.update(kl=100.0, episodes=64)
    assert fixed.coef == 0.05
    adaptive = KLController(0.1, target=6.0, horizon=1000)
    adaptive.update(kl=6.6, episodes=100)  # 10 % too high
    assert adaptive.coef == pytest.approx(0.1 * 1.01)
    adaptive.update(kl=1e9, episodes=100)  # counts as 20 %
    assert adaptive.coef == pytest.approx(0.1 * 1.01 * 1.02)
    adaptive.update(kl=0.0, episodes=100)
    assert adaptive.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.98)
