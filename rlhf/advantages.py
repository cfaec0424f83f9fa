"""From one utility per completion to one reward, advantage and return per token."""

import math

import torch
from torch import Tensor

from rlhf.losses import LOG_RATIO_BOUND, kl_estimate
from rlhf.masking import last_token_index, select

KL_ERROR_BOUND = 0.2
KL_RESPONSE_BOUND = 4.0


def token_rewards(
    utility: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: str = "k1",
    *,
    log_ratio_bound: float | None = LOG_RATIO_BOUND,
) -> Tensor:
    """Reward of each token: its KL penalty, and on the last real token the utility of the whole completion.

        rₜ = −β klₜ + 1{t is the last real token} · u

    The last real token is the stop token of a finished completion and the last generated one of a truncated one.
    One slot later, on padding, the utility would reach the completion only through a value that nothing trains.

    Args:
        utility: (B,) from the risk measure, after any missing-EOS penalty.
        log_ratio: (B, T) log π − log ref of the sampled tokens.
        mask: (B, T), True = keep. A row without any token gets no reward and its utility is not read.
        kl_coef: β ≥ 0, reward units per nat.
        estimator: "k1", "k2" or "k3"; k1 is the one whose policy gradient is that of the KL (`kl_estimate`).
        log_ratio_bound: See `kl_estimate`.

    Returns:
        (B, T), zero outside the mask.

    Raises:
        ValueError: There is not one utility per row, or the estimator is unknown.

    Reference: Ziegler et al. 2019, sec. 2, arXiv:1909.08593.
    """
    if utility.shape != mask.shape[:1]:
        raise ValueError(
            f"one utility per completion: expected shape {tuple(mask.shape[:1])}, got {tuple(utility.shape)}"
        )
    penalty = kl_coef * kl_estimate(log_ratio, mask, estimator, log_ratio_bound=log_ratio_bound)
    positions = torch.arange(mask.shape[1], device=mask.device)
    is_last = positions == last_token_index(mask).unsqueeze(1)  # (B, T)
    return torch.where(is_last, utility.unsqueeze(1), 0.0) - penalty


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and value targets over the real tokens of finished episodes.

        δₜ = rₜ + γ Vₜ₊₁ − Vₜ
        Âₜ = δₜ + γλ Âₜ₊₁
        Rₜ = Âₜ + Vₜ

    t + 1 is the next *real* token: masked gaps are stepped over as if they were not there. After the last real token
    both Vₜ₊₁ and Âₜ₊₁ are 0, also for a truncated completion: its utility is paid in full, nothing follows.
    λ = 1 gives the reward-to-go minus the value, λ = 0 the one-step error.

    Args:
        rewards: (B, T).
        values: (B, T), Vₜ predicted before token t was chosen.
        mask: (B, T), True = keep; gaps are allowed.
        gamma: Discount γ in [0, 1].
        gae_lambda: λ in [0, 1].

    Returns:
        (B, T) advantages and (B, T) returns, at least float32, zero outside the mask and without gradient.

    Reference: Schulman et al. 2015, sec. 3, arXiv:1506.02438.
    """
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards, values, keep = select(rewards, mask).to(dtype), select(values, mask).to(dtype), mask.bool()
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        next_value = torch.where(keep[:, t], values[:, t], next_value)
        next_advantage = torch.where(keep[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(keep[:, t], advantage, 0.0)
    return advantages, advantages + values


def next_kl_coef(kl_coef: float, observed_kl: float, target: float, horizon: float, n: int) -> float:
    """KL coefficient for the next step: raised while the KL is above its target, lowered while below.

        e = clip(KL / target − 1, −0.2, 0.2)        β′ = β (1 + e min(n / horizon, 1))

    Args:
        kl_coef: β now.
        observed_kl: Mean KL of a *completion* (summed over its tokens) over the whole batch of all ranks, in nats.
            NaN leaves the coefficient as it is: one broken batch must not switch the penalty off for good.
        target: KL to hold, in the same units, > 0.
        horizon: Completions over which the coefficient changes by up to about a fifth; 10,000 in the paper's code.
        n: Completions since the last call, over all ranks.

    Returns:
        β′, within a fifth of β.

    Raises:
        ValueError: The target or the horizon is not positive.

    Reference: Ziegler et al. 2019, sec. 2.2, arXiv:1909.08593, with K_β = n / horizon as in its released code.
    Deviations: n / horizon is capped at 1. A batch of five horizons would otherwise turn β negative and pay for KL.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"the KL target and horizon must be positive, got target={target}, horizon={horizon}")
    if math.isnan(observed_kl):
        return kl_coef
    error = min(max(observed_kl / target - 1, -KL_ERROR_BOUND), KL_ERROR_BOUND)
    return kl_coef * (1 + error * min(n / horizon, 1.0))


def kl_response(observed_kl: float, target: float, gain: float) -> float:
    """Factor of the KL coefficient that answers the last rollout at once, beside the slow `next_kl_coef`.

        f = clip(KL / target, 1/4, 4)^gain

    The policy's KL follows the coefficient with a delay of several rollouts. A controller that only accumulates the
    error overshoots such a system or takes very small steps; an answer in proportion to the error damps it. On target
    the factor is 1, so where the KL comes to rest does not depend on it.

    Args:
        observed_kl: As in `next_kl_coef`; NaN answers 1.
        target: KL to hold, > 0.
        gain: 0 never answers; 1 doubles the penalty at twice the target.

    Returns:
        f, between 4^-gain and 4^gain.
    """
    if math.isnan(observed_kl):
        return 1.0
    return min(max(observed_kl / target, 1 / KL_RESPONSE_BOUND), KL_RESPONSE_BOUND) ** gain
