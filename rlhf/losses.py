"""Per-token PPO losses, KL estimators and the log-probabilities they are made of: unreduced maths.

Functions with a `mask` replace what lies outside it by a neutral constant before anything else, so NaN there reaches
neither a result nor a gradient. Reduction belongs to `rlhf.masking`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf.masking import Sum, has_spread, identity, masked_mean_and_var, select

# e¹⁰ ≈ 22,026: far outside any trust region, far inside float32. Beyond it a single token is a numerical accident.
LOG_RATIO_BOUND = 10.0


class PolicyLoss(NamedTuple):
    """Unreduced policy loss and what it was made of; all but `loss` are detached."""

    loss: Tensor  # (B, T)
    clipped: Tensor  # (B, T) bool: the clip, not the ratio, decided this token, which has no gradient
    ratio: Tensor  # (B, T) π/π_old
    log_ratio: Tensor  # (B, T) log π − log π_old, bounded


class ValueLoss(NamedTuple):
    """Unreduced value loss and where the clip decided it; `clipped` has no gradient."""

    loss: Tensor  # (B, T)
    clipped: Tensor  # (B, T) bool


def k1(log_ratio: Tensor) -> Tensor:
    """Unbiased estimate of KL(π‖ref) from one sample of π: log π − log ref. Negative for half the tokens."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Biased, never negative, low-variance estimate of KL(π‖ref): ½ (log π − log ref)²."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """Unbiased, never negative estimate of KL(π‖ref): ref/π − 1 + log π − log ref."""
    # expm1 keeps the digits that exp(−x) − 1 loses for the tiny ratios of early training.
    return torch.expm1(-log_ratio) + log_ratio


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def kl_estimate(
    log_ratio: Tensor, mask: Tensor, estimator: str = "k1", *, log_ratio_bound: float | None = LOG_RATIO_BOUND
) -> Tensor:
    """Per-token estimate of KL(π‖ref), from tokens that π sampled.

        x = log π − log ref        k1 = x        k2 = x²/2        k3 = e⁻ˣ − 1 + x

    For KL(π_old‖π) of an update, pass log π_old − log π. As a penalty in the reward, k1 gives the policy gradient of
    KL(π‖ref); k2 and k3 do not. As a term of the *loss* it is k2 that does: there the mean gradient of k1 is zero and
    that of k3 belongs to KL(ref‖π).

    Args:
        log_ratio: (B, T) log π − log ref of the sampled tokens.
        mask: (B, T), True = keep; zero is returned outside.
        estimator: "k1", "k2" or "k3".
        log_ratio_bound: |x| is clamped to it; None for no clamp. It keeps one broken token from outweighing a batch.

    Returns:
        (B, T) in nats.

    Raises:
        ValueError: The estimator is unknown.

    Reference: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[estimator](_bounded(select(log_ratio, mask), log_ratio_bound))


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    *,
    mask: Tensor,
    dual_clip: float | None = None,
    log_ratio_bound: float | None = LOG_RATIO_BOUND,
) -> PolicyLoss:
    """Pessimistic surrogate for the policy's improvement, negated to be minimised.

        r    = exp(log π − log π_old)
        loss = −min(r A, clip(r, 1 − ε, 1 + ε_high) A)
        A < 0 and dual clip c:   loss = min(loss, −c A)

    Args:
        logprobs: (B, T) under the policy being trained; the only argument that receives a gradient.
        old_logprobs: (B, T) under the policy that generated, from the same forward pass.
        advantages: (B, T).
        clip_range: ε > 0, how far the ratio may fall below 1.
        clip_range_high: ε_high, how far it may rise above 1; `clip_range` when None.
        mask: (B, T), True = keep; loss 0 and ratio 1 outside.
        dual_clip: c > 1, the ratio beyond which a negative advantage stops pushing; None for plain PPO. It bounds
            the loss of a token that the old policy found nearly impossible, which pessimism alone leaves unbounded.
        log_ratio_bound: |log π − log π_old| is clamped to it before `exp`; None for no clamp.

    Returns:
        `PolicyLoss`, everything (B, T).

    Raises:
        ValueError: A clip range is not positive, or `dual_clip` does not exceed 1.

    Reference: Schulman et al. 2017, eq. 7, arXiv:1707.06347; Ye et al. 2020, eq. 5, arXiv:1912.09729 (dual clip).
    """
    high = clip_range if clip_range_high is None else clip_range_high
    if clip_range <= 0 or high <= 0:
        raise ValueError(f"clip ranges must be positive, got clip_range={clip_range}, clip_range_high={high}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is a bound on the ratio above 1 (3 is usual), or None, got {dual_clip}")
    advantages = select(advantages.detach(), mask)
    log_ratio = _bounded(select(logprobs - old_logprobs.detach(), mask), log_ratio_bound)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip_range, 1 + high)
    loss = torch.maximum(unclipped, limited)
    clipped = limited > unclipped
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        beyond = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(beyond, ceiling, loss), clipped | beyond
    return PolicyLoss(loss, clipped, ratio.detach(), log_ratio.detach())


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip_range: float | None, *, mask: Tensor
) -> ValueLoss:
    """Half the squared error of the value, pessimistic about moves beyond the clip range.

        loss = ½ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²)

    ε is in reward units: a range that suits rewards of size 1 freezes the critic of rewards of size 50.

    Args:
        values: (B, T) from the critic being trained; the only argument that receives a gradient.
        old_values: (B, T) from the critic at generation.
        returns: (B, T) targets.
        value_clip_range: ε > 0 in reward units; None for the plain squared error.
        mask: (B, T), True = keep; zero outside.

    Returns:
        `ValueLoss`, everything (B, T).

    Raises:
        ValueError: The clip range is not positive.

    Reference: the form of the `baselines` code of Schulman et al. 2017, examined by Engstrom et al. 2020,
        arXiv:2005.12729; the paper itself clips the policy only.
    """
    if value_clip_range is not None and value_clip_range <= 0:
        raise ValueError(f"value_clip_range must be positive or None for no clipping, got {value_clip_range}")
    values, returns = select(values, mask), select(returns.detach(), mask)
    error = (values - returns).square()
    if value_clip_range is None:
        return ValueLoss(0.5 * error, torch.zeros_like(error, dtype=torch.bool))
    anchor = select(old_values.detach(), mask)
    near = torch.clamp(values, anchor - value_clip_range, anchor + value_clip_range)
    limited = (near - returns).square()
    return ValueLoss(0.5 * torch.maximum(error, limited), limited > error)


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each given token under the sampling distribution softmax(logits / temperature).

    In float32 whatever the dtype of the logits, row by row: without gradients the extra memory is one row's (T, V)
    instead of the batch's. A row's numbers do not depend on the rows beside it.

    Args:
        logits: (B, T, V), already shifted: position t predicts `ids[:, t]`.
        ids: (B, T).
        temperature: The one used to generate. Left out here, the ratio of the first epoch is not 1.

    Returns:
        (B, T) float32.
    """
    rows = zip(logits, ids, strict=True)
    return torch.stack([_at(_log_softmax(row, temperature), row_ids) for row, row_ids in rows])


def token_logprobs_and_entropy(
    logits: Tensor, ids: Tensor, temperature: float = 1.0, *, entropy_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and the entropy of the same distributions, (B, T) float32 each, in one pass over the rows.

    Args:
        logits, ids, temperature: As in `token_logprobs`.
        entropy_gradient: False for an entropy that is only logged. Beside the logits nothing of their size is then
            kept for the backward pass. The graph of an entropy that is trained holds three more (B, T, V) tables.
    """
    if not entropy_gradient:
        return _TokenLogprobs.apply(logits, ids, temperature)
    logprobs, entropies = [], []
    for row, row_ids in zip(logits, ids, strict=True):
        table = _log_softmax(row, temperature)
        logprobs.append(_at(table, row_ids))
        entropies.append(_entropy(table))
    return torch.stack(logprobs), torch.stack(entropies)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities with a gradient and entropies without one, from logits x at temperature τ.

        log p_i = x_i / τ − log Σ exp(x / τ)        ∂ log p_i / ∂ x = (e_i − p) / τ

    The backward pass makes p again from the logits and one normaliser per token, row by row, in place of the tables
    that autograd would keep and sum: log-softmax, its gradient and their copies.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs, entropies, normalisers = (
            torch.empty(ids.shape, dtype=torch.float32, device=logits.device) for _ in range(3)
        )
        for place, (row, row_ids) in enumerate(zip(logits, ids, strict=True)):
            table = _log_softmax(row, temperature)
            logprobs[place], entropies[place] = _at(table, row_ids), _entropy(table)
            # At the largest logit, because the token's own may be −inf.
            normalisers[place] = row.amax(-1).float() / temperature - table.amax(-1)
        ctx.save_for_backward(logits, ids, normalisers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _entropy_gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, normalisers = ctx.saved_tensors
        result = torch.empty_like(logits)
        for place, (row, row_ids) in enumerate(zip(logits, ids, strict=True)):
            scaled = (gradient[place] / ctx.temperature).unsqueeze(-1)
            table = row.float() if ctx.temperature == 1.0 else row.float() / ctx.temperature
            table = (table - normalisers[place].unsqueeze(-1)).exp_().mul_(-scaled)
            result[place] = table.scatter_add_(-1, row_ids.unsqueeze(-1), scaled)
        return result, None, None


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats.

        H = −Σ p log p

    Args:
        logits: (..., V); −inf marks a forbidden token and contributes nothing.

    Returns:
        (...) float32, between 0 and log V.
    """
    return _entropy(_log_softmax(logits, 1.0))


def apply_missing_eos(scores: Tensor, finished: Tensor, penalty: float, mode: str = "subtract") -> Tensor:
    """Scores with completions that ran into the length limit made worse.

        subtract:  score − penalty        replace:  −penalty

    Never a factor: halving a score of −4 would raise it.

    Args:
        scores: (B,) utilities.
        finished: (B,) bool, True where a stop token was generated.
        penalty: In reward units, not negative.
        mode: "subtract" keeps the order among truncated completions; "replace" gives all of them the same score,
            which only punishes when −penalty lies below the scores in use.

    Returns:
        (B,).

    Raises:
        ValueError: The penalty is negative or the mode unknown.

    Reference: Huang et al. 2024, arXiv:2403.17031 ("replace" with −1); TRL's PPO subtracts.
    """
    if penalty < 0:
        raise ValueError(f"the missing-EOS penalty is taken off a score, so it must not be negative, got {penalty}")
    if mode not in ("subtract", "replace"):
        raise ValueError(f"unknown missing-EOS mode {mode!r}; choose 'subtract' or 'replace'")
    punished = scores - penalty if mode == "subtract" else torch.full_like(scores, -penalty)
    return torch.where(finished.bool(), scores, punished)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, *, all_sum: Sum = identity) -> Tensor:
    """Share of the variance of the returns that the critic accounts for, over all ranks.

        1 − Var(R − V) / Var(R)

    1 is perfect, 0 is what a constant achieves, negative is worse than a constant.

    Args:
        values: (B, T) predictions made before the update.
        returns: (B, T) targets.
        mask: (B, T), True = keep.
        all_sum: Sum over ranks, called four times.

    Returns:
        (); NaN when the returns do not vary, where the question has no answer.
    """
    _, residual_variance = masked_mean_and_var(select(returns, mask) - select(values, mask), mask, all_sum=all_sum)
    mean, variance = masked_mean_and_var(returns, mask, all_sum=all_sum)
    return torch.where(has_spread(mean, variance), 1 - residual_variance / variance, math.nan)


def _bounded(log_ratio: Tensor, bound: float | None) -> Tensor:
    """Log-ratio clamped to ±bound, or as it is."""
    return log_ratio if bound is None else log_ratio.clamp(-bound, bound)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (..., V) of the sampling distribution in float32."""
    # One fused kernel: logsumexp needs no (T, V) result, but several passes and, on a CPU, ten times as long.
    return (logits.float() if temperature == 1.0 else logits.float() / temperature).log_softmax(dim=-1)


def _at(table: Tensor, ids: Tensor) -> Tensor:
    """(T, V) at (T) -> (T)."""
    return table.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _entropy(table: Tensor) -> Tensor:
    """(..., V) log-probabilities -> (...)."""
    # p log p of a forbidden token is 0 · −inf = NaN; at the lowest finite float it is 0, with gradient 0.
    return -(table.exp() * table.clamp(min=torch.finfo(table.dtype).min)).sum(dim=-1)
