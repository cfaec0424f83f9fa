"""Influence functions: against numerical derivatives of discrete laws, and what population scope sees that others do
not."""

import math

import numpy as np
import pytest
import reference_risk
import torch
from scipy import stats

from reward.distribution import RewardDistribution
from reward.mixtures import dense_levels
from rlhf.influence import INFLUENCES, check_population_scope, expected_influence, population_law, statistics
from rlhf.risk import MEASURES, RiskSpecError, WeightedSum, parse_risk
from rlhf.shortfall import mean_shortfall

OUTCOMES = [-3.5, -2.25, -1.0, 0.25, 0.5, 2.0, 3.75]
# Parameters other than the examples', and none at which a tail ends exactly between two outcomes.
DISCRETE = {
    "mean": [],
    "cvar": [0.13],
    "mean_variance": [0.4],
    "mean_std": [0.7],
    "semideviation": [0.8],
    "entropic": [0.6],
    "expectile": [0.15],
    "below": [-1.0],
    "wang": [0.6],
    "power": [1.7],
    "cpw": [0.65],
    "spectral": [(0.6, 1.0), (0.3, 0.31), (0.1, 0.07)],
}
SPECS = [measure.example for measure in MEASURES.values()] + ["0.5*mean+0.5*cvar:0.1", "mean-0.2*quantile:0.9"]


def spec_of(name):
    numbers = DISCRETE[name]
    text = ",".join("@".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in numbers)
    return f"{name}:{text}" if text else name


def staircase(probabilities, half_jump=1e-7):
    """Laws on OUTCOMES with probabilities (..., S); each jump of Q is bridged over a mass of 2e-7.

    All laws share the levels at which any of them jumps.
    """
    probabilities = np.atleast_2d(probabilities)
    ends = np.cumsum(probabilities, axis=-1)[:, :-1]
    levels = np.unique(np.concatenate([ends.ravel() - half_jump, ends.ravel() + half_jump]))
    assert np.diff(levels).min() > half_jump / 10  # no two jumps on one spot
    values = [np.asarray(OUTCOMES)[np.searchsorted(row, levels)] for row in ends]
    return RewardDistribution(torch.as_tensor(levels), torch.as_tensor(np.stack(values)))


def random_probabilities(seed, count=5):
    return np.random.default_rng(seed).dirichlet(np.full(len(OUTCOMES), 1.5), size=count) * 0.9 + 0.1 / len(OUTCOMES)


# Against derivatives


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_influence_is_the_gateaux_derivative(name, seed):
    answers = random_probabilities(seed)
    population = answers.mean(axis=0)
    measure = parse_risk(spec_of(name))

    def utility(probabilities):
        return reference_risk.discrete_utility(name, DISCRETE[name], OUTCOMES, probabilities)

    known = statistics(measure, staircase(population)[0])
    worth = expected_influence(measure, staircase(answers), known)
    derivatives = [reference_risk.gateaux_derivative(utility, population, answer) for answer in answers]
    expected = torch.tensor(derivatives, dtype=torch.float64) + utility(population)
    assert worth.dtype == torch.float64
    assert torch.allclose(worth, expected, atol=2e-5)
    # A sure rating shows the influence function itself, with nothing to average over.
    sure = RewardDistribution([0.5], torch.tensor(OUTCOMES, dtype=torch.float64).unsqueeze(-1))
    points = [reference_risk.gateaux_derivative(utility, population, row) for row in np.eye(len(OUTCOMES))]
    assert torch.allclose(
        expected_influence(measure, sure, known), torch.tensor(points).double() + utility(population), atol=2e-5
    )


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85])
def test_influence_on_a_quantile_is_the_derivative_where_the_density_is_flat(alpha):
    # Uniform on [-2, 3], and four answers elsewhere; the mixed cdf is inverted by bisection.
    population = RewardDistribution([0.001, 0.999], torch.tensor([-1.995, 2.995], dtype=torch.float64))
    answers = RewardDistribution([0.2, 0.7], torch.tensor([[-3, -1.5], [-1, 1], [0.4, 0.6], [1, 4]]).double())
    measure = parse_risk(f"quantile:{alpha}")
    worth = expected_influence(measure, answers, statistics(measure, population))

    def mixed(answer, step):
        low, high = torch.tensor(-3.0).double(), torch.tensor(5.0).double()
        for _ in range(80):
            middle = (low + high) / 2
            mass = (1 - step) * population.cdf(middle) + step * answer.cdf(middle)
            low, high = (middle, high) if mass < alpha else (low, middle)
        return low.item()

    step = 1e-6
    for index in range(4):
        slope = (mixed(answers[index], step) - mixed(answers[index], 0.0)) / step
        assert worth[index].item() == pytest.approx(population.quantile(alpha).item() + slope, abs=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_answers_are_worth_the_measure_of_their_population_on_average(spec):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(40, 9, generator=generator).double() + 1.5 * torch.randn(40, 1, generator=generator).double()
    laws = RewardDistribution(torch.arange(1, 10).double() / 10, values)
    measure, population = parse_risk(spec), population_law(laws)
    known = statistics(measure, population)
    worth = expected_influence(measure, laws, known)
    assert worth.shape == (40,)
    # Each value of the population is the mean of its cell, and the mass at a quantile is known to a cell or so.
    tolerance = 0.02 if "quantile" in spec else 6e-3
    assert worth.mean().item() == pytest.approx(measure(population).item(), abs=tolerance)
    if measure.monotone:
        better = RewardDistribution(laws.levels, laws.values + torch.rand(40, 9, generator=generator).double())
        assert bool((expected_influence(measure, better, known) >= worth - 1e-9).all())


def test_the_normal_law_has_known_influence_functions():
    levels = dense_levels(4000)
    population = RewardDistribution(levels, torch.as_tensor(stats.norm(1.0, 2.0).ppf(levels.numpy())))
    ratings = torch.tensor([-4.0, -0.5, 1.0, 3.0, 5.0]).double()
    sure = RewardDistribution([0.5], ratings.unsqueeze(-1))

    def influence(spec):
        measure = parse_risk(spec)
        return expected_influence(measure, sure, statistics(measure, population))

    standard = (ratings - 1) / 2
    nu = 1 + 2 * stats.norm.ppf(0.2)
    # The outermost 1/8000 on each side is flat: a few thousandths of the variance.
    assert torch.allclose(influence("cvar:0.2"), nu - (nu - ratings).clamp_min(0) / 0.2, atol=1e-3)
    assert torch.allclose(influence("mean_variance:0.3"), ratings - 0.3 * (ratings - 1) ** 2, atol=1e-3)
    assert torch.allclose(influence("mean_std:0.3"), ratings - 0.3 * (standard**2 + 1), atol=5e-3)
    entropic = 1 - 0.4 * 2**2 / 2  # E exp(-0.4 Z) of a normal law, as a certainty equivalent
    assert torch.allclose(
        influence("entropic:0.4"), entropic + (1 - (-0.4 * (ratings - entropic)).exp()) / 0.4, rtol=5e-3
    )
    density = stats.norm.pdf(stats.norm.ppf(0.2)) / 2
    # The density at a quantile is taken over a band of levels, hence 1 %.
    assert torch.allclose(influence("quantile:0.2"), nu + (0.2 - (ratings <= nu).double()) / density, rtol=1e-2)
    # Wang: w'(F(s)) = exp(-λ x - λ²/2) for the standard normal x, integrated from the rating to far above.
    shift = 0.5
    slope = torch.diff(influence("wang:0.5")) / torch.diff(ratings)
    expected = [
        math.exp(-(shift**2) / 2) * (math.exp(-shift * a) - math.exp(-shift * b)) / (shift * (b - a))
        for a, b in zip(standard[:-1].tolist(), standard[1:].tolist(), strict=True)
    ]
    assert slope.tolist() == pytest.approx(expected, rel=1e-2)


# Deep tails, as specs: what 400 equally spaced levels of the population are too coarse for.
DEEP = ["cvar:0.05", "cvar:0.01", "entropic:4", "wang:2", "cpw:0.4", "power:9", "spectral:0.7@1,0.3@0.01"]


@pytest.mark.parametrize("spec", [measure.example for measure in MEASURES.values()] + DEEP)
def test_levels_of_the_population_hardly_move_the_worth_of_an_answer(spec):
    generator = torch.Generator().manual_seed(0)
    levels = torch.arange(1, 20).double() / 20
    place = torch.randn(24, 1, generator=generator).double()
    width = 1 + 2 * torch.rand(24, 1, generator=generator).double()
    laws, measure = RewardDistribution(levels, place + width * torch.special.ndtri(levels)), parse_risk(spec)

    def worth(*levels):
        return expected_influence(measure, laws, statistics(measure, population_law(laws, *levels)))

    exact = worth(40_000)
    # The mass at or below the ν of a quantile changes by an atom's when ν moves by a hair.
    bound = 0.05 if spec.startswith("quantile") else 0.003
    assert (worth() - exact).abs().max() < bound * exact.std(correction=0)
    if spec in DEEP and spec != "power:9":
        assert (worth(400) - exact).abs().max() > bound * exact.std(correction=0)


@pytest.mark.parametrize("spec", ["wang:0.75", "power:2", "cpw:0.71"])
def test_distortions_are_worth_the_sum_over_shortfalls(spec):
    # The same integral by another way, Σ (Dⱼ − Dⱼ₊₁) (tⱼ νⱼ − E (νⱼ − Z)₊) + D_last E Z.
    laws = staircase(random_probabilities(3))
    sure = RewardDistribution([0.5], torch.tensor([[-9.0], [-1.0], [0.3], [8.0]]).double())
    measure, population = parse_risk(spec), population_law(laws)
    levels, values = population.levels, population.values
    weights = torch.cat([levels.new_zeros(1), measure.weight(levels), levels.new_ones(1)])
    slopes = weights.diff() / torch.cat([levels.new_zeros(1), levels, levels.new_ones(1)]).diff()
    for answers in (laws, sure):
        expected = ((levels * values - mean_shortfall(answers, values)) * -slopes.diff()).sum(-1)
        expected += slopes[-1] * answers.mean()
        worth = expected_influence(measure, answers, statistics(measure, population))
        torch.testing.assert_close(worth, expected, atol=1e-8, rtol=0)


# What population scope is for


def test_equal_own_tails_may_weigh_differently_in_the_population():
    # Both answers have cvar:0.25 = -2. The divisive one has one reader in four at -2, the flat one all four.
    levels = torch.tensor([0.2499, 0.2501]).double()
    divisive = torch.tensor([-2.0, 3.0]).double()
    flat = torch.tensor([-2.0, -2.0]).double()
    good = torch.tensor([1.0, 1.0]).double()
    laws = RewardDistribution(levels, torch.stack([divisive, flat, good, good]))
    measure = parse_risk("cvar:0.25")
    own = measure(laws)
    worth = expected_influence(measure, laws, statistics(measure, population_law(laws)))
    assert own[0].item() == pytest.approx(own[1].item(), abs=1e-3)
    # Below the 0.25 quantile of all ratings, -2, lie 5/16 of them: those of the flat answer in full.
    assert worth[2].item() >= worth[0].item() >= worth[1].item()
    known = statistics(parse_risk("cvar:0.5"), population_law(laws))
    half = expected_influence(parse_risk("cvar:0.5"), laws, known)
    # ν is 1: a quarter, then all of the ratings fall short by 3, at a price of 1/0.5.
    assert half.tolist() == pytest.approx([1 - 0.25 * 3 * 2, 1 - 3 * 2, 1.0, 1.0], abs=5e-3)


def test_an_answer_above_the_tail_is_worth_no_more_for_being_better():
    laws = RewardDistribution([0.5], torch.tensor([[-3.0], [0.0], [1.0], [4.0]]).double())
    measure = parse_risk("cvar:0.25")
    worth = expected_influence(measure, laws, {"cvar:0.25/nu": torch.tensor(-1.0).double()})
    assert worth.tolist() == [-1 - 2 / 0.25, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("spec", ["cvar:1", "spectral:1@1", "expectile:0.5", "power:0", "wang:0", "cpw:1"])
def test_the_whole_law_is_the_mean_beyond_the_population_too(spec):
    population = RewardDistribution([0.25, 0.75], torch.tensor([-1.0, 2.0]).double())
    better = RewardDistribution([0.1, 0.6], torch.tensor([[-7.0, 9.0], [3.0, 8.0]]).double())
    worth = expected_influence(parse_risk(spec), better, statistics(parse_risk(spec), population))
    assert torch.allclose(worth, better.mean(), atol=1e-9)


# Statistics


def test_population_is_the_equal_mixture_and_leaves_out_what_is_not_finite():
    values = torch.tensor([[-3.0, -1.0], [math.nan, 1.0], [1.0, 2.0], [0.0, math.inf]])
    population = population_law(RewardDistribution([0.25, 0.75], values))
    assert population.batch_shape == ()
    assert population.mean().item() == pytest.approx((-2.0 + 1.5) / 2, abs=1e-5)
    assert population.cdf(0.0).item() == pytest.approx(0.5, abs=1.5 / 400)


def test_statistics_are_named_after_spec_and_meaning():
    population = RewardDistribution([0.25, 0.75], torch.tensor([-1.0, 3.0]))
    known = statistics(parse_risk("0.5*mean_std:1+0.3*cvar:0.5+0.2*cvar:0.25"), population)
    assert list(known) == ["mean_std:1/mu", "mean_std:1/sigma", "cvar:0.5/nu", "cvar:0.25/nu"]
    assert known["cvar:0.5/nu"].item() == 1.0
    assert known["cvar:0.25/nu"].item() == -1.0
    assert statistics(parse_risk("mean"), population) == {}


def test_a_sum_is_worth_the_sum_of_its_terms():
    population = population_law(staircase(random_probabilities(4)))
    laws = staircase(random_probabilities(5))
    parts = ["wang:0.5", "cvar:0.1"]
    singles = [expected_influence(m, laws, statistics(m, population)) for m in map(parse_risk, parts)]
    measure = parse_risk("0.25*wang:0.5-2*cvar:0.1")
    worth = expected_influence(measure, laws, statistics(measure, population))
    assert torch.allclose(worth, 0.25 * singles[0] - 2 * singles[1], atol=1e-12)
    nested = WeightedSum([(3.0, measure), (1.0, parse_risk("mean"))])
    worth = expected_influence(nested, laws, statistics(nested, population))
    assert torch.allclose(worth, 0.75 * singles[0] - 6 * singles[1] + laws.mean(), atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_worth_keeps_the_dtype_and_marks_broken_laws(spec):
    values = torch.tensor([[-3.0, -1.0, 0.5], [math.nan, 1.0, 2.0], [1.0, 2.0, 2.0]])
    laws = RewardDistribution([0.2, 0.5, 0.9], values)
    measure = parse_risk(spec)
    worth = expected_influence(measure, laws, statistics(measure, population_law(laws)))
    assert worth.dtype == torch.float32
    assert worth.isnan().tolist() == [False, True, False]


def test_every_measure_has_an_influence_function_and_no_other_class():
    assert set(INFLUENCES) == set(MEASURES.values())
    assert {"quantile", *DISCRETE} == set(MEASURES)


def test_what_has_no_influence_function_is_refused():
    law = RewardDistribution([0.25, 0.75], torch.tensor([[-1.0, 3.0]]))
    for spec in ("python:math:fsum", "0.5*mean+0.5*python:math:fsum"):
        with pytest.raises(RiskSpecError, match=r"python:math:fsum has no known influence .* response scope only"):
            check_population_scope(parse_risk(spec))
        with pytest.raises(RiskSpecError, match="no known influence"):
            statistics(parse_risk(spec), law[0])
        with pytest.raises(RiskSpecError, match="no known influence"):
            expected_influence(parse_risk(spec), law, {})


def test_bad_populations_are_refused():
    broken = RewardDistribution([0.5], torch.tensor([[math.nan]]))
    with pytest.raises(ValueError, match="none of the 1 laws is finite"):
        population_law(broken)
    with pytest.raises(ValueError, match=r"batch shape \(N,\), got \(\)"):
        population_law(broken[0])
    with pytest.raises(ValueError, match="a population is one law"):
        statistics(parse_risk("mean"), broken)
    point = RewardDistribution([0.5], torch.tensor([[1.0]]))
    for spec in ("mean_std:1", "semideviation:1"):
        with pytest.raises(ValueError, match="all ratings of the population are equal"):
            expected_influence(parse_risk(spec), point, statistics(parse_risk(spec), point[0]))
