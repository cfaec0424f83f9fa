"""Population scope: what one answer adds to a risk measure of all ratings that a policy gets.

The law of a rating over prompts, answers and readers is the mixture F of the laws of all answers. A measure ρ of F is
no mean over answers, but near F it changes like one: the answer with law G is worth

    u(G) = ρ(F) + d/dε ρ((1 − ε) F + ε G)  at ε = 0
         = ρ(F) + ∫ IF(z) dG(z)

with the influence function IF of ρ at F. Trained on u as on any reward, a policy climbs ρ(F). The constant makes the
mean of u over the answers that form F equal to ρ(F), in the units of the measure; `mean` gives every answer its mean
rating.

Everything that u needs to know of F are a few `statistics`, which a trainer can average over steps and save.

Reference: influence functions, Hampel 1974, doi:10.1080/01621459.1974.10482962.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from reward.distribution import RewardDistribution
from reward.mixtures import pooled_law, tail_levels
from rlhf.distortions import CPW, Power, Spectral, Wang
from rlhf.measures import (
    Below,
    CVaR,
    Entropic,
    Expectile,
    Mean,
    MeanStd,
    MeanVariance,
    Quantile,
    RiskMeasure,
    Semideviation,
)
from rlhf.risk import RiskSpecError, WeightedSum
from rlhf.shortfall import mean_shortfall, square_shortfall

Statistics = Mapping[str, Tensor]
# The density at a quantile is read off this far to both sides in level, since a mixture's own slope there is ragged.
QUANTILE_BAND = 0.02


def population_law(laws: RewardDistribution, levels: int | Tensor | None = None) -> RewardDistribution:
    """The law of a rating of an answer drawn from the batch: the mixture with equal weights.

        F(z) = (1/N) Σ Fᵢ(z)

    Args:
        laws: batch shape (N,). Laws that are not finite are left out.
        levels: of the result, or the number of equally spaced ones; None: `reward.mixtures.tail_levels`.

    Returns:
        Batch shape ().

    Raises:
        ValueError: another batch shape, or no finite law.
    """
    if len(laws.batch_shape) != 1:
        raise ValueError(f"a population is made of laws of batch shape (N,), got {tuple(laws.batch_shape)}")
    finite = laws.values.isfinite().all(dim=-1)
    if not bool(finite.any()):
        raise ValueError(f"none of the {len(laws)} laws is finite, so that there is no population to look at")
    laws = laws[finite]
    return laws[0] if len(laws) == 1 else pooled_law(laws, tail_levels() if levels is None else levels)


def check_population_scope(measure: RiskMeasure) -> None:
    """Refuse a measure whose influence function is not known.

    Raises:
        RiskSpecError: a user-defined function, alone or in a sum.
    """
    for _, term in _terms(measure):
        if type(term) not in INFLUENCES:
            raise RiskSpecError(
                f"{term.spec} has no known influence function, so it works in response scope only; measures that work "
                f"in both, by example: {', '.join(known.example for known in INFLUENCES)}, and their sums"
            )


def statistics(measure: RiskMeasure, population: RewardDistribution) -> dict[str, Tensor]:
    """What `expected_influence` needs to know of the population, by name.

    Args:
        measure: any but a user-defined function.
        population: batch shape (), as of `population_law`.

    Returns:
        Tensors of fixed shapes, each under `spec/name`, such as `cvar:0.1/nu`. All may be averaged over steps.

    Raises:
        RiskSpecError: no influence function is known.
        ValueError: a population of several laws.
    """
    check_population_scope(measure)
    if population.batch_shape:
        raise ValueError(f"a population is one law, got batch shape {tuple(population.batch_shape)}")
    found = {}
    for _, term in _terms(measure):
        for name, value in INFLUENCES[type(term)][0](term, population).items():
            found[f"{term.spec}/{name}"] = value
    return found


def expected_influence(measure: RiskMeasure, laws: RewardDistribution, statistics: Statistics) -> Tensor:
    """What each answer is worth to the measure of the population, u(G) = ρ(F) + ∫ IF dG; (...).

    Exact for the quantile function of each law and the statistics given. For `wang`, `power` and `cpw` the weight
    function is taken as straight between the levels of the population. docs/risk.md says how far the levels of
    `population_law` move u.

    Args:
        measure: any but a user-defined function.
        laws: the answers, batch shape (...).
        statistics: of the population, for this measure.

    Raises:
        RiskSpecError: no influence function is known.
        ValueError: a population that is a single point, where `mean_std` and `semideviation` have none.
    """
    check_population_scope(measure)
    worth = []
    for weight, term in _terms(measure):
        start = f"{term.spec}/"
        of_term = {name.removeprefix(start): value for name, value in statistics.items() if name.startswith(start)}
        worth.append(weight * INFLUENCES[type(term)][1](term, laws, of_term))
    return torch.stack(worth).sum(dim=0)


def _terms(measure: RiskMeasure) -> list[tuple[float, RiskMeasure]]:
    """Measures of a sum with their weights. A term may be a sum itself."""
    if not isinstance(measure, WeightedSum):
        return [(1.0, measure)]
    return [(weight * inner, part) for weight, term in measure.terms for inner, part in _terms(term)]


def _nothing(measure: RiskMeasure, population: RewardDistribution) -> dict[str, Tensor]:
    return {}


def _mean(measure: Mean, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = E Z."""
    return laws.mean()


def _below(measure: Below, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = −P(Z ≤ z): linear in the law, so that both scopes agree."""
    return measure(laws)


def _quantile_statistics(measure: Quantile, population: RewardDistribution) -> dict[str, Tensor]:
    low, high = max(measure.alpha - QUANTILE_BAND, 0.0), min(measure.alpha + QUANTILE_BAND, 1.0)
    slope = (population.quantile(high) - population.quantile(low)) / (high - low)
    return {"nu": population.quantile(measure.alpha), "slope": slope}


def _quantile(measure: Quantile, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = ν + (α − P(Z ≤ ν)) / f(ν), with 1/f the slope of the quantile function."""
    return known["nu"] + (measure.alpha - laws.cdf(known["nu"])) * known["slope"]


def _cvar_statistics(measure: CVaR, population: RewardDistribution) -> dict[str, Tensor]:
    return {"nu": population.quantile(measure.alpha)}


def _cvar(measure: CVaR, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = ν − E (ν − Z)₊ / α, the objective of Rockafellar and Uryasev: an error in ν matters to second order only."""
    if measure.alpha == 1:
        return laws.mean()  # the formula with ν beyond any rating that an answer may get
    return known["nu"] - mean_shortfall(laws, known["nu"].reshape(1)).squeeze(-1) / measure.alpha


def _spectral_statistics(measure: Spectral, population: RewardDistribution) -> dict[str, Tensor]:
    alphas = torch.tensor([alpha for _, alpha in measure.tails], dtype=population.levels.dtype)
    return {"nu": population.quantile(alphas.to(population.levels.device))}


def _spectral(measure: Spectral, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = Σ pᵢ (νᵢ − E (νᵢ − Z)₊ / αᵢ)."""
    masses, alphas = known["nu"].new_tensor(measure.tails).unbind(dim=-1)
    tails = known["nu"] - mean_shortfall(laws, known["nu"]) / alphas
    # As for a CVaR, the whole law is the mean, above the best rating of the population too.
    return (masses * torch.where(alphas == 1, laws.mean().unsqueeze(-1), tails)).sum(dim=-1)


def _distortion_statistics(measure: Wang | Power | CPW, population: RewardDistribution) -> dict[str, Tensor]:
    return {"levels": population.levels, "values": population.values}


def _distortion(measure: Wang | Power | CPW, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = ∫ IF dG with IF(z) = −∫ w′(F(s)) (1{z ≤ s} − F(s)) ds, w straight between levels tⱼ, slopes Dⱼ.

    So IF is straight between the values νⱼ of the population, and the mean of IF over a uniform piece of the answer's
    law is a difference of its antiderivative H, whatever the number of levels:

        E IF(Z) = Σ mᵢ (H(upperᵢ) − H(lowerᵢ)) / (upperᵢ − lowerᵢ)
    """
    levels, points = known["levels"].double(), known["values"].double()
    weights = torch.cat([levels.new_zeros(1), measure.weight(levels), levels.new_ones(1)])
    slopes = weights.diff() / torch.cat([levels.new_zeros(1), levels, levels.new_ones(1)]).diff()
    # IF and H at the points, from the first on; beyond the ends the slopes are the first and the last.
    rises = points.diff()
    heights = torch.cat([points.new_zeros(1), (slopes[1:-1] * rises).cumsum(0)])
    # The population's own mean of IF is to be ρ, the sum of its values by the weights of its pieces.
    edges = torch.cat([heights[:1], (heights[1:] + heights[:-1]) / 2, heights[-1:]])
    masses = torch.cat([levels.new_zeros(1), levels, levels.new_ones(1)]).diff()
    centres = torch.cat([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])
    heights = heights + (weights.diff() * centres).sum() - (masses * edges).sum()
    areas = torch.cat([points.new_zeros(1), ((heights[1:] + heights[:-1]) / 2 * rises).cumsum(0)])

    def at(ratings: Tensor) -> tuple[Tensor, Tensor]:
        passed = torch.searchsorted(points, ratings.contiguous(), right=True)
        start = passed.sub(1).clamp_min(0)
        beyond = ratings - points[start]
        rise = slopes[passed] * beyond
        return heights[start] + rise, areas[start] + (heights[start] + rise / 2) * beyond

    own, lower, upper = laws.to(torch.float64).segments()
    width = upper - lower
    # The difference of two areas loses its digits over a narrow piece, where IF hardly bends.
    wide = width > 1e-7 * (points[-1] - points[0]).clamp_min(torch.finfo(torch.float64).tiny)
    (low, below), (high, above) = at(lower), at(upper)
    means = torch.where(wide, (above - below) / torch.where(wide, width, 1.0), (low + high) / 2)
    return (own * means).sum(dim=-1).to(laws.values.dtype)


def _mean_statistics(measure: MeanVariance, population: RewardDistribution) -> dict[str, Tensor]:
    return {"mu": population.mean()}


def _mean_variance(measure: MeanVariance, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = E Z − λ E (Z − μ)²."""
    return laws.mean() - measure.variance_weight * _square_distance(laws, known["mu"])


def _mean_std_statistics(measure: MeanStd, population: RewardDistribution) -> dict[str, Tensor]:
    return {"mu": population.mean(), "sigma": population.std()}


def _mean_std(measure: MeanStd, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = E Z − λ (E (Z − μ)² / σ + σ) / 2."""
    sigma = _spread(known["sigma"], measure)
    return laws.mean() - measure.std_weight * (_square_distance(laws, known["mu"]) / sigma + sigma) / 2


def _semideviation_statistics(measure: Semideviation, population: RewardDistribution) -> dict[str, Tensor]:
    mean = population.mean()
    return {
        "mu": mean,
        "deviation": square_shortfall(population, mean).sqrt(),
        "shortfall": mean_shortfall(population, mean.reshape(1)).squeeze(-1),
    }


def _semideviation(measure: Semideviation, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = E Z − λ (E ((μ − Z)₊)² + 2 h (E Z − μ) + s²) / 2s, with deviation s and shortfall h = E (μ − Z)₊ of F.

    The middle term is what an answer does to the shortfall of all others by moving μ.
    """
    deviation = _spread(known["deviation"], measure)
    square = square_shortfall(laws, known["mu"].expand(laws.batch_shape))
    moved = 2 * known["shortfall"] * (laws.mean() - known["mu"])
    return laws.mean() - measure.deviation_weight * ((square + moved) / deviation + deviation) / 2


def _entropic_statistics(measure: Entropic, population: RewardDistribution) -> dict[str, Tensor]:
    return {"rho": measure(population)}


def _entropic(measure: Entropic, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = ρ + (1 − E exp(−η Z) / E_F exp(−η Z)) / η, the ratio written with certainty equivalents."""
    rate = min(max(measure.risk_aversion, 1e-18), 1e18)
    return known["rho"] - torch.expm1(-rate * (measure(laws) - known["rho"])) / rate


def _expectile_statistics(measure: Expectile, population: RewardDistribution) -> dict[str, Tensor]:
    expectile = measure(population)
    return {"rho": expectile, "below": population.cdf(expectile)}


def _expectile(measure: Expectile, laws: RewardDistribution, known: Statistics) -> Tensor:
    """u = e + (τ E (Z − e)₊ − (1 − τ) E (e − Z)₊) / (τ + (1 − 2τ) F(e))."""
    slope = measure.gain_weight + (1 - 2 * measure.gain_weight) * known["below"]
    return known["rho"] + measure.balance(laws, known["rho"].expand(laws.batch_shape)) / slope


def _square_distance(laws: RewardDistribution, point: Tensor) -> Tensor:
    """E (Z − z)²."""
    return laws.variance() + (laws.mean() - point).square()


def _spread(spread: Tensor, measure: RiskMeasure) -> Tensor:
    if bool(spread == 0):
        raise ValueError(f"all ratings of the population are equal: there {measure.spec} has no influence function")
    return spread


# What a measure needs to know of the population, and what an answer is then worth.
INFLUENCES: dict[type[RiskMeasure], tuple[Callable, Callable]] = {
    Mean: (_nothing, _mean),
    Quantile: (_quantile_statistics, _quantile),
    CVaR: (_cvar_statistics, _cvar),
    MeanVariance: (_mean_statistics, _mean_variance),
    MeanStd: (_mean_std_statistics, _mean_std),
    Semideviation: (_semideviation_statistics, _semideviation),
    Entropic: (_entropic_statistics, _entropic),
    Expectile: (_expectile_statistics, _expectile),
    Below: (_nothing, _below),
    Wang: (_distortion_statistics, _distortion),
    Power: (_distortion_statistics, _distortion),
    CPW: (_distortion_statistics, _distortion),
    Spectral: (_spectral_statistics, _spectral),
}
