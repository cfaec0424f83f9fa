"""Laws made of other laws: mixtures, same-level sums, outcomes with probabilities, the normal law.

The quantile function of a mixture has its kinks at other levels for each text, while a `RewardDistribution` shares one
set of levels. So a law made here is brought to K dense levels, by the mean of its quantile function over each K-th:

    tₖ = (k − ½) / K,    qₖ = K ∫ Q(t) dt  over  [(k − 1)/K, k/K]

That keeps the mean exactly, for any K: the mean of a `RewardDistribution` on these levels is Σ qₖ / K. Elsewhere
`cell_means` says how far off it can be.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reward.distribution import RewardDistribution

# With 400 levels a lower-tail mean at 0.1 is within 1/160 of the range, at worst: a jump of that height at level 0.1.
DENSE_LEVELS = 400
# Steps of `tail_levels` as a share of the level, and the outermost level.
TAIL_STEP, TAIL_END = 0.01, 1e-5
# What float32 weights of a softmax over some dozens may be off by.
WEIGHT_TOLERANCE = 1e-5


def dense_levels(num_levels: int = DENSE_LEVELS) -> Tensor:
    """(K,) midpoints (k − ½)/K, the levels of every law made here; float64."""
    if num_levels < 1:
        raise ValueError(f"num_levels must be at least 1, got {num_levels}")
    return (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels


def tail_levels() -> Tensor:
    """Levels for a law whose far tails matter, float64: like `dense_levels` in the middle, in even ratios outside.

        tₖ₊₁ − tₖ = 1/400 in the middle,    tₖ₊₁/tₖ = 1.01 below a quarter and down to 1e-5,    1 − tₖ likewise

    So a level is known to 1 % of its mass wherever it lies. With 1/400 everywhere, level 0.01 is known to a quarter of
    its mass, and the worst rating of a hundred answers is averaged with others.
    """
    middle = dense_levels()
    middle = middle[(middle > 1 / (DENSE_LEVELS * TAIL_STEP)) & (middle < 1 - 1 / (DENSE_LEVELS * TAIL_STEP))]
    steps = math.ceil(math.log(middle[0].item() / TAIL_END) / math.log1p(TAIL_STEP))
    tail = middle[0] * (1 + TAIL_STEP) ** -torch.arange(steps, 0, -1, dtype=torch.float64)
    return torch.cat([tail, middle, 1 - tail.flip(0)])


def mixture(
    laws: Sequence[RewardDistribution], weights: Tensor | Sequence[float], num_levels: int = DENSE_LEVELS
) -> RewardDistribution:
    """The law of a rating that comes from law i with probability wᵢ.

        F(z) = Σ wᵢ Fᵢ(z),    Q(t) = inf {z : F(z) ≥ t}

    Whoever mixes keeps every mode: two camps of readers stay two. Contrast `quantile_average`, which adds ratings of
    equal rank and puts one mode between them; the means are the same. The mixed cdf is inverted exactly, in float64,
    and brought to dense levels by `cell_means`, whose bounds hold. One law alone is returned as it is.

    Args:
        laws: M laws of the same batch shape (...), each on levels of its own.
        weights: (M,), or (..., M) with weights of its own for each batch element; non-negative, sum one.
        num_levels: K.

    Returns:
        Batch shape (...); NaN where a law with a weight above zero, or a weight, is not finite.

    Raises:
        ValueError: no law, other batch shapes, negative weights, or weights that do not sum to one.
    """
    laws, shares = _checked(laws, weights)
    if len(laws) == 1:
        return laws[0]
    dtype, shape = laws[0].values.dtype, laws[0].batch_shape
    shares = (shares / shares.sum(dim=-1, keepdim=True)).reshape(-1, len(laws))
    rows = [law.values.double().reshape(-1, law.levels.shape[0]).contiguous() for law in laws]
    broken = torch.stack([~row.isfinite().all(dim=-1) for row in rows], dim=-1) & (shares != 0) | shares.isnan()
    rows = [torch.nan_to_num(row, nan=0.0, posinf=0.0, neginf=0.0) for row in rows]
    knots = torch.cat(rows, dim=-1).sort(dim=-1).values
    below, through = torch.zeros_like(knots), torch.zeros_like(knots)
    for row, law, share in zip(rows, laws, shares.unbind(-1), strict=True):
        levels = law.levels.double()
        below += share.unsqueeze(-1) * _cdf(levels, row, knots, count_atom=False)
        through += share.unsqueeze(-1) * _cdf(levels, row, knots, count_atom=True)
    # At each knot the cdf jumps from `below` to `through`; between knots it is linear.
    masses = torch.stack([below, through], dim=-1).flatten(-2).cummax(dim=-1).values.clamp(max=1.0)
    values = cell_means(masses, knots.repeat_interleave(2, dim=-1), num_levels)
    values = values.masked_fill(broken.any(dim=-1, keepdim=True), math.nan)
    return RewardDistribution(dense_levels(num_levels), values.reshape(*shape, num_levels).to(dtype))


def pooled_law(
    laws: RewardDistribution, levels: int | Tensor = DENSE_LEVELS, weights: Tensor | None = None
) -> RewardDistribution:
    """The mixture of many laws on the same levels, as `mixture` gives it, in one sort of all their values.

    A law of K levels is an atom at each end and K − 1 pieces of even mass between. The mixed density is a step
    function, whose steps are the pieces' ends; its running sum over the sorted values is the mixed cdf. That costs
    N K log(N K) for N laws, where `mixture`, whose laws may have levels of their own, needs each law's cdf at every
    value of every other.

    Args:
        laws: batch shape (N,), finite.
        levels: of the result, or the number of `dense_levels`. Each value is the mean of the quantile function between
            the midpoints to the neighbouring levels, so that the mean of the law is exact for any levels.
        weights: (N,) of each law; None: all alike.

    Returns:
        Batch shape (). A piece narrower than 1e-7 of the range of all values counts as an atom, because the density
        of a narrower one would cost the running sum its digits.

    Raises:
        ValueError: negative weights, or weights that do not sum to one.
    """
    values, own = laws.values.double(), laws.levels.double()
    shares = torch.cat([own.new_zeros(1), own, own.new_ones(1)]).diff()  # lower atom, pieces, upper atom
    if weights is None:
        shares = shares.expand(len(laws), -1) / len(laws)
    else:
        check_weights(weights, len(laws))
        shares = (weights / weights.sum()).to(shares).unsqueeze(-1) * shares
    width = values.diff(dim=-1)
    wide = width > 1e-7 * (values.max() - values.min())
    inner = shares[:, 1:-1]
    density = torch.where(wide, inner / torch.where(wide, width, 1.0), 0.0)
    atoms, steps = torch.zeros_like(values), torch.zeros_like(values)
    # One after the other: the only value of a law with one level holds both ends.
    atoms[:, 0] += shares[:, 0]
    atoms[:, -1] += shares[:, -1]
    atoms[:, :-1] += torch.where(wide, 0.0, inner)
    steps[:, :-1] += density
    steps[:, 1:] -= density
    knots, order = values.flatten().sort()
    atoms, slopes = atoms.flatten()[order], steps.flatten()[order].cumsum(0).clamp_min(0.0)
    rises = torch.cat([slopes.new_zeros(1), slopes[:-1] * knots.diff()])
    through = (rises + atoms).cumsum(0)
    masses = torch.stack([through - atoms, through], dim=-1).flatten().cummax(dim=0).values
    levels = (dense_levels(levels) if isinstance(levels, int) else levels).to(values.device)
    edges = torch.cat([levels.new_zeros(1), (levels[1:] + levels[:-1]) / 2, levels.new_ones(1)])
    result = cell_means(masses / masses[-1], knots.repeat_interleave(2), edges)
    return RewardDistribution(levels, result.to(laws.values.dtype))


def quantile_average(laws: Sequence[RewardDistribution], weights: Tensor | Sequence[float]) -> RewardDistribution:
    """Weighted sum of the values at equal levels: the law of a sum of comonotone ratings (Vincent's average).

        Q(t) = Σ wᵢ Qᵢ(t)

    What a QRM does with its attributes. Exact: the sum is linear between the levels of all laws taken together, which
    are the levels of the result. Modes do not survive: an average of a law at −2 and one at +2 sits at 0.

    Args:
        laws: M laws of the same batch shape (...), each on levels of its own.
        weights: as for `mixture`.

    Raises:
        ValueError: as for `mixture`.

    Reference: Ratcliff 1979, doi:10.1037/0033-2909.86.3.446.
    """
    laws, shares = _checked(laws, weights)
    levels = torch.cat([law.levels for law in laws]).unique()
    terms = [share.unsqueeze(-1) * law.quantile(levels) for law, share in zip(laws, shares.unbind(-1), strict=True)]
    return RewardDistribution(levels, torch.stack(terms).sum(dim=0).to(laws[0].values.dtype))


def discrete_law(outcomes: Tensor, probabilities: Tensor, num_levels: int = DENSE_LEVELS) -> RewardDistribution:
    """The law that takes the value oₛ with probability pₛ, on dense levels.

        Q(t) = inf {o : P(Z ≤ o) ≥ t}, a staircase, then `cell_means`

    All but at most S − 1 of the K values are outcomes. The mean is exact; masses `cdf(o)` are within 1.5/K.

    Args:
        outcomes: (S,), or (..., S), in any order.
        probabilities: (..., S), non-negative, sum one.

    Returns:
        Batch shape (...); NaN where an outcome or a probability is not finite.

    Raises:
        ValueError: shapes that do not fit, negative probabilities, or a sum other than one.
    """
    outcomes, probabilities = torch.broadcast_tensors(outcomes, probabilities)
    check_weights(probabilities, probabilities.shape[-1])
    dtype = outcomes.dtype if outcomes.dtype == torch.float64 else torch.float32
    broken = ~(outcomes.isfinite() & probabilities.isfinite()).all(dim=-1, keepdim=True)
    outcomes, probabilities = outcomes.masked_fill(broken, 0.0), probabilities.masked_fill(broken, 1.0)
    order = outcomes.argsort(dim=-1)
    steps = outcomes.double().gather(-1, order)
    upper = probabilities.double().gather(-1, order).cumsum(dim=-1)
    upper = upper / upper[..., -1:]
    lower = torch.cat([torch.zeros_like(upper[..., :1]), upper[..., :-1]], dim=-1)
    masses = torch.stack([lower, upper], dim=-1).flatten(-2)
    values = cell_means(masses, steps.repeat_interleave(2, dim=-1), num_levels).masked_fill(broken, math.nan)
    return RewardDistribution(dense_levels(num_levels), values.to(dtype))


def normal_law(mean: Tensor, std: Tensor, num_levels: int = DENSE_LEVELS) -> RewardDistribution:
    """The normal law, each value the mean of one K-th of its mass.

        qₖ = μ + σ K (φ(z₍ₖ₋₁₎) − φ(zₖ)),    zₖ = Φ⁻¹(k/K)

    The outermost values take in the whole infinite tails. With 400 levels the mean is exact, the standard deviation
    0.03 % low, and a lower-tail mean within 0.003 σ for masses from 0.01, within 0.0002 σ from 0.05.

    Args:
        mean, std: (...), std not negative.
    """
    edges = torch.special.ndtri(torch.arange(num_levels + 1, dtype=torch.float64) / num_levels)
    density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
    standard = (-density.diff() * num_levels).to(mean.device)
    values = mean.double().unsqueeze(-1) + std.double().unsqueeze(-1) * standard
    return RewardDistribution(dense_levels(num_levels), values.to(mean.dtype))


def cell_means(masses: Tensor, values: Tensor, cells: int | Tensor) -> Tensor:
    """Means of a quantile function over K shares of the mass, equal ones or others.

        qₖ = K ∫ Q(t) dt  over  [(k − 1)/K, k/K]

    As values of a `RewardDistribution` on the midpoints (k − ½)/K, those of equal shares say of the law, with h the
    rise of Q within 1.5/K of the level in question (at most the whole range):

        mean                exact
        lower_tail_mean(α)  off by at most h / (4 K α)
        quantile(α)         off by at most h: nothing where Q is flat or straight
        cdf(z)              off by at most 1.5 / K

    The variance is a little low, since what varies within a share is averaged.

    Args:
        masses: (..., L) from 0 to 1, never decreasing; a repeated one is a jump of Q.
        values: (..., L) Q at those masses, linear between them.
        cells: K, or the K + 1 edges of the shares, from 0 to 1.

    Returns:
        (..., K) float64, never decreasing.
    """
    masses, values = masses.double().contiguous(), values.double().contiguous()
    areas = (values[..., :-1] + values[..., 1:]) / 2 * masses.diff(dim=-1)
    integral = torch.cat([torch.zeros_like(areas[..., :1]), areas.cumsum(dim=-1)], dim=-1)
    if isinstance(cells, int):
        cells = torch.arange(cells + 1, dtype=torch.float64, device=masses.device) / cells
    width = cells.diff()
    edges = cells.expand(*masses.shape[:-1], -1).contiguous()
    piece, after = _at(masses, values, edges, behind_jump=True)
    _, before = _at(masses, values, edges, behind_jump=False)
    into = edges - masses.gather(-1, piece)
    reached = integral.gather(-1, piece) + into * (values.gather(-1, piece) + after) / 2
    means = reached.diff(dim=-1) / width
    # A mean lies between the ends of its cell. Where those are equal, rounding must not move it off the atom.
    means = torch.maximum(torch.minimum(means, before[..., 1:]), after[..., :-1])
    return means.cummax(dim=-1).values


def _at(masses: Tensor, values: Tensor, edges: Tensor, behind_jump: bool) -> tuple[Tensor, Tensor]:
    """Index of the piece of a quantile function that holds each mass, and the value there, both (..., E)."""
    piece = torch.searchsorted(masses, edges, right=behind_jump).sub(1).clamp(0, masses.shape[-1] - 2)
    start = masses.gather(-1, piece)
    width = masses.gather(-1, piece + 1) - start
    share = torch.where(width > 0, (edges - start) / torch.where(width > 0, width, 1.0), 1.0).clamp(0.0, 1.0)
    return piece, torch.lerp(values.gather(-1, piece), values.gather(-1, piece + 1), share)


def _cdf(levels: Tensor, values: Tensor, at: Tensor, count_atom: bool) -> Tensor:
    """P(Z ≤ z), or P(Z < z) without the atom at z, of laws (R, K) at (R, B) points."""
    passed = torch.searchsorted(values, at.contiguous(), right=count_atom)
    # Passed values have a level each; of the piece after them, the part up to z counts.
    before = (passed - 1).clamp_min(0)
    after = passed.clamp_max(levels.shape[0] - 1)
    low, high = values.gather(-1, before), values.gather(-1, after)
    width = high - low
    # One over a subnormal width overflows; a piece that narrow counts in full at its upper end.
    wide = width >= torch.finfo(width.dtype).tiny
    share = torch.where(wide, (at - low) / torch.where(wide, width, 1.0), 0.0)
    inside = levels[before] + (levels[after] - levels[before]) * share
    return torch.where(passed == 0, 0.0, torch.where(passed == levels.shape[0], 1.0, inside))


def _checked(
    laws: Sequence[RewardDistribution], weights: Tensor | Sequence[float]
) -> tuple[list[RewardDistribution], Tensor]:
    """The laws in one dtype, and weights (..., M) as float64."""
    laws = list(laws)
    if not laws:
        raise ValueError("there is no law to combine: give at least one")
    shapes = {tuple(law.batch_shape) for law in laws}
    if len(shapes) > 1:
        raise ValueError(f"laws of batch shapes {sorted(shapes)} cannot be combined: they must be of the same texts")
    weights = torch.as_tensor(weights, dtype=torch.float64, device=laws[0].values.device)
    check_weights(weights, len(laws))
    dtype = torch.float64 if any(law.values.dtype == torch.float64 for law in laws) else torch.float32
    return [law.to(dtype) for law in laws], weights.expand(*laws[0].batch_shape, len(laws))


def check_weights(weights: Tensor, count: int) -> None:
    """Refuses weights (..., M) that are no probabilities of M laws."""
    if weights.dim() == 0 or weights.shape[-1] != count:
        raise ValueError(f"weights of shape {tuple(weights.shape)} do not fit {count} laws: one weight for each")
    if bool((weights < 0).any()):
        raise ValueError(f"a weight is a probability and not negative, got {weights.min().item():g}")
    total = weights.double().sum(dim=-1)
    wrong = (total - 1).abs() > WEIGHT_TOLERANCE
    if bool(wrong.any()):
        raise ValueError(
            f"weights must sum to one, got {total[wrong].flatten()[0].item():g}; divide them by their sum"
        )
