"""What a reward model minimises, unreduced over the batch: quantile regression on ratings, Bradley-Terry on pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reward.distribution import RewardDistribution


def pinball_loss(quantiles: Tensor, targets: Tensor, levels: Tensor, target_mask: Tensor | None = None) -> Tensor:
    """Mean distance of predicted quantiles from ratings, each side weighted by its level.

        uₖⱼ  = targetⱼ − qₖ
        ρₖⱼ  = (tₖ − 1{uₖⱼ < 0}) · uₖⱼ
        loss = meanⱼ meanₖ ρₖⱼ

    Minimal, in expectation over ratings, where each qₖ is the tₖ-quantile of their law. Twice its value tends to the
    CRPS as the levels fill (0, 1) evenly. Targets are constants: no gradient reaches them.

    Args:
        quantiles: (..., K) predictions, one per level. Need not be sorted.
        targets: (..., M) ratings.
        levels: (K,) levels.
        target_mask: (..., M) true where a rating exists; None when all do. A rating behind the mask may be NaN.

    Returns:
        (...) loss per element, 0 for an element without any rating.

    Reference: Koenker & Bassett 1978, doi:10.2307/1913643.
    """
    error, levels = _errors(quantiles, targets, levels, target_mask)
    return _mean_over_ratings((levels - (error < 0).to(error.dtype)) * error, target_mask)


def quantile_huber_loss(
    quantiles: Tensor, targets: Tensor, levels: Tensor, target_mask: Tensor | None = None, *, kappa: float = 1.0
) -> Tensor:
    """Pinball loss with its kink rounded off over a width `kappa`.

        H(u) = u²/2 for |u| ≤ κ,  κ (|u| − κ/2) beyond
        loss = meanⱼ meanₖ |tₖ − 1{uₖⱼ < 0}| · H(uₖⱼ) / κ

    Args:
        quantiles, targets, levels, target_mask: As in `pinball_loss`.
        kappa: Width of the quadratic zone, in reward units.

    Returns:
        (...) loss per element, 0 for an element without any rating.

    Raises:
        ValueError: kappa is not positive; the loss for κ → 0 is `pinball_loss`.

    Reference: Dabney et al. 2018, arXiv:1710.10044.
    Deviations: a mean over levels, where the paper sums; divided by κ, so that the slope outside the quadratic zone
    does not depend on κ. The minimiser is biased towards the mean by an amount of order κ.
    """
    if not kappa > 0:
        raise ValueError(f"kappa must be positive, got {kappa}; use pinball_loss for the limit of zero")
    error, levels = _errors(quantiles, targets, levels, target_mask)
    weight = (levels - (error < 0).to(error.dtype)).abs()
    distance = error.abs()
    huber = torch.where(distance <= kappa, error.square() / (2 * kappa), distance - kappa / 2)
    return _mean_over_ratings(weight * huber, target_mask)


def spread_loss(quantiles: Tensor, targets: Tensor, levels: Tensor, target_mask: Tensor | None = None) -> Tensor:
    """Squared distance of the law's standard deviation from that of a text's own raters.

        loss = (sd(q) − s)²,    s² = meanⱼ (targetⱼ − mean target)²

    A law fitted by the pinball loss is as wide as its readers disagree plus as the model is unsure about their mean,
    and for a model that reads poorly the second part hides the first. This term teaches the trunk which texts divide
    their readers. It narrows the law, so that the heads want fitting anew afterwards, by pinball loss alone.

    Args:
        quantiles, targets, levels, target_mask: As in `pinball_loss`.

    Returns:
        (...) loss per element, 0 for an element with fewer than two ratings, which says nothing about spread.
    """
    mask = torch.ones_like(targets, dtype=torch.bool) if target_mask is None else target_mask.bool()
    targets = torch.where(mask, targets.detach().to(quantiles.dtype), 0.0)
    count = mask.sum(dim=-1, keepdim=True)
    mean = targets.sum(dim=-1, keepdim=True) / count.clamp_min(1)
    square = torch.where(mask, (targets - mean).square(), 0.0).sum(dim=-1) / count.squeeze(-1).clamp_min(1)
    distance = (RewardDistribution(levels.to(quantiles), quantiles).std() - square.sqrt()).square()
    return torch.where(count.squeeze(-1) > 1, distance, 0.0)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Negative log-likelihood that the chosen answer wins, −log σ(chosen − rejected − margin).

    Args:
        chosen: (...) scores of preferred answers.
        rejected: (...) scores of the others; the same shape, so that a pair cannot be broadcast by accident.
        margin: By how much the chosen score should lead.

    Returns:
        (...) loss per pair.

    Raises:
        ValueError: the two shapes differ.

    Reference: Bradley & Terry 1952, doi:10.2307/2334029.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"chosen {tuple(chosen.shape)} and rejected {tuple(rejected.shape)} must have one shape")
    return -F.logsigmoid(chosen - rejected - margin)


def _errors(quantiles: Tensor, targets: Tensor, levels: Tensor, target_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """targets − quantiles as (..., K, M), and the levels as (K, 1)."""
    if quantiles.shape[-1] != levels.shape[-1]:
        raise ValueError(f"{quantiles.shape[-1]} quantiles do not fit {levels.shape[-1]} levels")
    if quantiles.shape[:-1] != targets.shape[:-1]:
        raise ValueError(
            f"quantiles {tuple(quantiles.shape)} and targets {tuple(targets.shape)} must agree but for the last axis"
        )
    targets = targets.detach().to(quantiles.dtype)
    if target_mask is not None:
        if target_mask.shape != targets.shape:
            raise ValueError(f"target_mask {tuple(target_mask.shape)} must have the shape of targets")
        # Selected before the arithmetic: a NaN that is only multiplied by zero stays a NaN in the gradient.
        targets = torch.where(target_mask.bool(), targets, 0.0)
    # The levels belong to the axis of the predictions. On the axis of the ratings they still broadcast whenever
    # K == M; the model then trains, and learns the wrong distribution.
    return targets.unsqueeze(-2) - quantiles.unsqueeze(-1), levels.to(quantiles).unsqueeze(-1)


def _mean_over_ratings(loss: Tensor, target_mask: Tensor | None) -> Tensor:
    """(..., K, M) -> (...): mean over levels, then over the ratings that exist."""
    per_rating = loss.mean(dim=-2)
    if target_mask is None:
        return per_rating.mean(dim=-1)
    mask = target_mask.bool()
    return torch.where(mask, per_rating, 0.0).sum(dim=-1) / mask.sum(dim=-1).clamp_min(1)
