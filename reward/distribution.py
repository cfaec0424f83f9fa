"""A predicted law of ratings: quantile levels, their values, and the exact integrals of the function between them.

Every number here belongs to one quantile function: linear between neighbouring levels, constant below the first and
above the last. `RewardDistribution.segments` is the only place that says so; all integrals follow from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class RewardDistribution:
    """The law of a rating, one per batch element, given by its quantiles.

        Q(t) = qₖ + (qₖ₊₁ − qₖ) (t − tₖ) / (tₖ₊₁ − tₖ)    for tₖ ≤ t ≤ tₖ₊₁
        Q(t) = q₁ for t < t₁,    Q(t) = q_K for t > t_K

    So the law is a mixture of uniform pieces, with an atom of mass t₁ at q₁, one of mass 1 − t_K at q_K, and one
    wherever neighbouring values are equal. The tails outside the given levels are not extrapolated: a level below t₁
    answers q₁.

    Values that cross are repaired by sorting (rearrangement), which never increases the pinball loss; `crossing_rate`
    says how often that was needed. A row with a NaN is NaN in every number, so that a caller can find and exclude it.
    Half-precision values are promoted to float32, because sums of masses in bfloat16 are wrong in the third digit.

    Args:
        levels: (K,) levels tₖ, strictly increasing, inside (0, 1).
        values: (..., K) quantiles qₖ of each law, in reward units, higher is better.

    Raises:
        ValueError: levels not increasing or outside (0, 1), or as many values as there are levels are not given.

    Reference: rearrangement, Chernozhukov et al. 2010, arXiv:0704.3649.

    >>> law = RewardDistribution(levels=torch.tensor([0.25, 0.75]), values=torch.tensor([[-1.0, 3.0]]))
    >>> law.mean(), law.lower_tail_mean(0.5), law.cdf(1.0)
    (tensor([1.]), tensor([-0.5000]), tensor([0.5000]))
    """

    levels: Tensor
    values: Tensor
    crossings: Tensor = field(init=False)

    def __post_init__(self):
        values = torch.as_tensor(self.values)
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()
        # Checked in the dtype that is used: levels that differ in float64 may coincide in float32.
        levels = check_levels(torch.as_tensor(self.levels).to(values.dtype)).to(values.device)
        if values.dim() == 0 or values.shape[-1] != levels.shape[0]:
            raise ValueError(
                f"values of shape {tuple(values.shape)} do not fit {levels.shape[0]} levels: "
                "the last axis of `values` holds one quantile per level"
            )
        crossed = values[..., 1:] < values[..., :-1]
        # `sort` moves a NaN to the top, where a lower quantile would no longer see it.
        # Stable: among equal values each keeps its own level, and with it its own share of the gradient.
        broken = values.isnan().any(dim=-1, keepdim=True)
        ordered = torch.where(broken, math.nan, values.sort(dim=-1, stable=True).values)
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "values", ordered)
        object.__setattr__(self, "crossings", crossed.sum(dim=-1))

    @property
    def batch_shape(self) -> torch.Size:
        return self.values.shape[:-1]

    @property
    def crossing_rate(self) -> Tensor:
        """Share of neighbouring pairs whose values crossed before the repair; () tensor, 0 when there is no pair."""
        pairs = self.crossings.numel() * (self.levels.shape[0] - 1)
        return self.crossings.sum().to(self.values.dtype) / max(pairs, 1)

    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The uniform pieces that make up the law, from the lower tail to the upper one.

        Returns:
            masses (K+1,), lower ends (..., K+1), upper ends (..., K+1). A piece with equal ends is an atom. The first
            and the last piece are the flat tails: this is the one place to change how the law goes on there.
        """
        edges = torch.cat([self.levels.new_zeros(1), self.levels, self.levels.new_ones(1)])
        lower = torch.cat([self.values[..., :1], self.values], dim=-1)
        upper = torch.cat([self.values, self.values[..., -1:]], dim=-1)
        return edges.diff(), lower, upper

    def mean(self) -> Tensor:
        """Expected rating, E Z = ∫₀¹ Q(t) dt; (...)."""
        return self.lower_tail_mean(1.0)

    def variance(self) -> Tensor:
        """Variance of the rating, Σ mᵢ [(cᵢ − μ)² + wᵢ²/12] over pieces with centre cᵢ and width wᵢ; (...)."""
        masses, lower, upper = self.segments()
        centred = (lower + upper) / 2 - self.mean().unsqueeze(-1)
        return (masses * (centred.square() + (upper - lower).square() / 12)).sum(dim=-1)

    def std(self) -> Tensor:
        """Standard deviation of the rating; (...). Its gradient at a point mass is taken as zero."""
        variance = self.variance()
        constant = variance == 0
        # The derivative of the root at zero is infinite, and infinity times the zero of `where` is NaN.
        return torch.where(constant, 0.0, torch.where(constant, 1.0, variance).sqrt())

    def quantile(self, alpha: float | Tensor) -> Tensor:
        """The value below which a share `alpha` of the mass lies, Q(alpha).

        Args:
            alpha: A level in [0, 1], or (M,) levels.

        Returns:
            (...) for a number, (..., M) for a tensor of levels.
        """
        at = torch.as_tensor(alpha, dtype=self.levels.dtype, device=self.levels.device)
        if not isinstance(alpha, Tensor) and not 0.0 <= alpha <= 1.0:
            raise ValueError(f"a quantile level lies in [0, 1], got {alpha}")
        masses, lower, upper = self.segments()
        piece = torch.searchsorted(self.levels, at.reshape(-1))
        start = torch.cat([self.levels.new_zeros(1), self.levels])[piece]
        share = ((at.reshape(-1) - start) / masses[piece]).clamp(0.0, 1.0)
        value = torch.lerp(lower[..., piece], upper[..., piece], share)
        return value.reshape((*self.batch_shape, *at.shape))

    def cdf(self, threshold: float | Tensor) -> Tensor:
        """Probability of a rating at or below `threshold`, P(Z ≤ z); an atom at z counts in full.

        Args:
            threshold: z, a number or a tensor that broadcasts against the batch shape (...). For M thresholds per
                law, write `distribution[..., None].cdf(thresholds)` with thresholds (..., M).
        """
        masses, lower, upper = self.segments()
        at = torch.as_tensor(threshold, dtype=self.values.dtype, device=self.values.device).unsqueeze(-1)
        width = upper - lower
        # One over a subnormal width overflows, so a piece that narrow counts as an atom at its upper end.
        inside = (at > lower) & (at < upper) & (width >= torch.finfo(width.dtype).tiny)
        share = torch.where(
            inside, (at - lower) / torch.where(inside, width, 1.0), (at >= upper).to(self.values.dtype)
        )
        probability = (masses * share).sum(dim=-1)
        return torch.where(self.values[..., 0].isnan(), math.nan, probability)

    def lower_tail_mean(self, alpha: float) -> Tensor:
        """Mean of the worst `alpha` share of the mass, (1/α) ∫₀^α Q(t) dt; (...).

        Args:
            alpha: Lower-tail mass in (0, 1]; 1 gives the mean.
        """
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"alpha is a lower-tail mass in (0, 1], got {alpha}")
        masses, lower, upper = self.segments()
        alpha = max(alpha, torch.finfo(masses.dtype).tiny)
        start = torch.cat([self.levels.new_zeros(1), self.levels])
        # Of each piece only the part below alpha counts; the piece that alpha cuts is entered from its lower end.
        taken = torch.minimum((alpha - start).clamp_min(0.0), masses)
        return (taken / alpha * torch.lerp(lower, upper, taken / masses / 2)).sum(dim=-1)

    def log_mean_exp(self, rate: float) -> Tensor:
        """Cumulant generating function log E exp(rate · Z); (...).

            piece [l, u]:  log (e^{ru} − e^{rl}) / (r (u − l))  =  r (l + u)/2 + log sinh(h)/h,    h = |r| (u − l)/2

        Computed about the mean. While |rate| times the range is below 1 the sum runs over exp − 1, so that the result
        divided by a tiny rate is still the mean; above, as a log-sum-exp, so that no rate overflows.
        """
        masses, lower, upper = self.segments()
        if not math.isfinite(rate):
            raise ValueError(f"rate must be finite, got {rate}")
        mean = self.mean()
        centre = rate * ((lower + upper) / 2 - mean.unsqueeze(-1))
        half_width = abs(rate) * (upper - lower) / 2
        spread = abs(rate) * (self.values[..., -1] - self.values[..., 0])
        # The mean of equal values may round to another number, and the rate makes the difference as large as it likes.
        bound = spread.detach().unsqueeze(-1)
        centre = centre.clamp(-bound, bound)
        gentle = spread < 1.0
        # Both branches are evaluated everywhere: the one not chosen gets zeros, so that it cannot overflow.
        small = torch.where(gentle.unsqueeze(-1), centre + _log_sinhc(half_width), 0.0)
        from_exp_minus_one = (masses * small.expm1()).sum(dim=-1).log1p()
        from_log_sum_exp = (masses.log() + centre + _log_sinhc(half_width)).logsumexp(dim=-1)
        return rate * mean + torch.where(gentle, from_exp_minus_one, from_log_sum_exp)

    def to(self, *args, **kwargs) -> "RewardDistribution":
        """The same laws on another device or in another dtype (float32 or float64)."""
        return self._with_values(self.values.to(*args, **kwargs), self.crossings)

    def detach(self) -> "RewardDistribution":
        return self._with_values(self.values.detach(), self.crossings)

    def __getitem__(self, index) -> "RewardDistribution":
        """Laws of a part of the batch; the index addresses the batch axes only."""
        index = index if isinstance(index, tuple) else (index,)
        if not any(part is Ellipsis for part in index):
            index = (*index, Ellipsis)
        return self._with_values(self.values[(*index, slice(None))], self.crossings[index])

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("a single law has no length")
        return self.batch_shape[0]

    def __repr__(self) -> str:
        first, last = self.levels[0].item(), self.levels[-1].item()
        return (
            f"RewardDistribution(batch_shape={tuple(self.batch_shape)}, "
            f"levels={self.levels.shape[0]} in [{first:g}, {last:g}], dtype={self.values.dtype})"
        )

    def _with_values(self, values: Tensor, crossings: Tensor) -> "RewardDistribution":
        other = RewardDistribution(self.levels, values)
        object.__setattr__(other, "crossings", crossings.to(other.values.device))
        return other


def check_levels(levels: Tensor | Sequence[float]) -> Tensor:
    """Quantile levels as a (K,) tensor, or an error that says what is wrong with them.

    Raises:
        ValueError: not one axis, empty, not finite, not strictly increasing or outside (0, 1).
    """
    tensor = torch.as_tensor(levels)
    if not tensor.is_floating_point():
        tensor = tensor.float()
    advice = "; pass for example torch.arange(1, 20) / 20 for 0.05, 0.10, ..., 0.95"
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise ValueError(f"quantile levels form one non-empty axis (K,), got shape {tuple(tensor.shape)}{advice}")
    if not bool(((tensor > 0) & (tensor < 1)).all()):
        raise ValueError(f"quantile levels lie strictly inside (0, 1), got {tensor.tolist()}{advice}")
    if not bool((tensor.diff() > 0).all()):
        raise ValueError(f"quantile levels must strictly increase, got {tensor.tolist()}{advice}")
    return tensor


def _log_sinhc(half_width: Tensor) -> Tensor:
    """log(sinh(h) / h) for h ≥ 0, with a gradient that keeps its digits as h → 0."""
    small = half_width < 0.1
    # The direct form subtracts two numbers near log 2h; its derivative loses all digits as h → 0.
    square = torch.where(small, half_width, 0.0).square()
    series = square / 6 * (1 - square / 30 * (1 - square * 4 / 63 * (1 - square * 3 / 40 * (1 - square * 8 / 99))))
    large = torch.where(small, 1.0, half_width)
    direct = large + torch.log(-torch.expm1(-2 * large)) - torch.log(2 * large)
    return torch.where(small, series, direct)
