"""Laws made of laws: by hand, against bisection and walks over outcomes, and the bounds of dense levels."""

import math

import pytest
import reference_mixtures as reference
import reference_risk
import torch
from scipy import stats

from reward.distribution import RewardDistribution
from reward.mixtures import (
    DENSE_LEVELS,
    cell_means,
    dense_levels,
    discrete_law,
    mixture,
    normal_law,
    pooled_law,
    quantile_average,
    tail_levels,
)

ALPHAS = [0.01, 0.05, 0.1, 0.37, 0.8, 1.0]


def make(levels, values):
    return RewardDistribution(torch.tensor(levels, dtype=torch.float64), torch.tensor(values, dtype=torch.float64))


def three_laws():
    """Two texts, three laws on levels of different number; with ties, atoms and a point mass."""
    return [
        make([0.2, 0.5, 0.9], [[-2.0, -2.0, 1.0], [0.0, 1.0, 4.0]]),
        make([0.5], [[2.0], [1.0]]),
        make([0.1, 0.3, 0.6, 0.7, 0.95], [[-3.0, -1.0, 0.0, 0.0, 5.0], [-0.5, 1.0, 1.0, 1.25, 1.5]]),
    ]


def as_pairs(laws, row):
    return [(law.levels.tolist(), law.values[row].tolist()) for law in laws]


WEIGHTS = [0.5, 0.2, 0.3]


# --- Mixtures -------------------------------------------------------------------------------------------------------


def test_mixture_by_hand():
    # -2 with probability 3/4, +2 with probability 1/4: half the mass of the third of four cells lies on each.
    points = [make([0.5], [-2.0]), make([0.5], [2.0])]
    assert mixture(points, [0.75, 0.25], num_levels=4).values.tolist() == [-2.0, -2.0, -2.0, 2.0]
    assert mixture(points, [0.625, 0.375], num_levels=4).values.tolist() == [-2.0, -2.0, 0.0, 2.0]
    # Uniform pieces: Q of the first is -1 to 0.25, then straight to 1 at 0.75; of the second the same, 10 higher.
    # Mixed half and half: level t below a half is level 2t of the first.
    straight = make([0.25, 0.75], [-1.0, 1.0])
    higher = make([0.25, 0.75], [9.0, 11.0])
    mixed = mixture([straight, higher], [0.5, 0.5], num_levels=8)
    assert mixed.levels.tolist() == [0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375]
    assert mixed.values.tolist() == pytest.approx([-1, -0.5, 0.5, 1, 9, 9.5, 10.5, 11])


def test_mixture_equals_the_slow_inverse_of_the_mixed_cdf():
    laws, count = three_laws(), 37
    mixed = mixture(laws, WEIGHTS, num_levels=count)
    for row in range(2):
        for cell in range(count):
            ends = (max(cell / count, 1e-12), (cell + 1) / count)
            expected = reference.mixture_cell_mean(as_pairs(laws, row), WEIGHTS, *ends)
            assert mixed.values[row, cell].item() == pytest.approx(expected, abs=1e-9)


def test_mixture_has_the_mean_of_the_means_for_any_number_of_levels():
    laws = three_laws()
    expected = sum(w * law.mean() for law, w in zip(laws, WEIGHTS, strict=True))
    for count in (1, 7, DENSE_LEVELS):
        assert mixture(laws, WEIGHTS, count).mean().tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_masses_of_a_mixture_are_within_the_stated_bound():
    laws = three_laws()
    mixed = mixture(laws, WEIGHTS)
    for threshold in (-2.5, -2.0, -0.3, 0.0, 0.9, 1.0, 2.0, 3.3, 5.0):
        expected = sum(w * law.cdf(threshold) for law, w in zip(laws, WEIGHTS, strict=True))
        assert mixed.cdf(threshold).tolist() == pytest.approx(expected.tolist(), abs=1.5 / DENSE_LEVELS)


def test_each_text_may_have_weights_of_its_own():
    laws = three_laws()
    weights = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.9, 0.0]])
    together = mixture(laws, weights, 30)
    for row in range(2):
        alone = mixture([law[row] for law in laws], weights[row], 30)
        assert together.values[row].tolist() == pytest.approx(alone.values.tolist(), abs=1e-12)
    assert together.batch_shape == (2,)
    assert (mixture(laws, [0.5, 0.2, 0.3], 30).values[1] - together.values[1]).abs().max() > 0.1


def test_a_mixture_of_one_law_is_that_law():
    law = three_laws()[2]
    assert mixture([law], [1.0]).values.equal(law.values)
    assert mixture([law], [1.0]).levels.equal(law.levels)
    # Twice the same law is the same law too, up to the dense levels.
    twice = mixture([law, law], [0.25, 0.75])
    assert twice.mean().tolist() == pytest.approx(law.mean().tolist(), abs=1e-12)
    assert twice.quantile(0.45).tolist() == pytest.approx(law.quantile(0.45).tolist(), abs=1e-9)


def test_a_mixture_keeps_modes_that_a_quantile_average_loses():
    low, high = (
        normal_law(torch.tensor(m, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)) for m in (-2.0, 2.0)
    )
    mixed, averaged = mixture([low, high], [0.5, 0.5]), quantile_average([low, high], [0.5, 0.5])
    assert mixed.mean().item() == pytest.approx(averaged.mean().item(), abs=1e-12)
    middle = [(law.cdf(1.0) - law.cdf(-1.0)).item() for law in (mixed, averaged)]
    # Between -1 and 1: two standard deviations from each mode of the mixture, from the only mode of the average.
    assert middle == pytest.approx([2 * stats.norm.sf(2) / 2, 2 * stats.norm.cdf(2) - 1], abs=2e-3)
    assert mixed.lower_tail_mean(0.1).item() < averaged.lower_tail_mean(0.1).item() - 1


def test_a_law_that_failed_fails_its_mixture_alone():
    laws = three_laws()
    values = laws[0].values.clone()
    values[1, 2] = math.nan
    broken = RewardDistribution(laws[0].levels, values)
    mixed = mixture([broken, *laws[1:]], WEIGHTS, 20)
    assert mixed.values[0].tolist() == mixture(laws, WEIGHTS, 20).values[0].tolist()
    assert mixed.values[1].isnan().all()
    weights = torch.tensor([[0.5, 0.2, 0.3], [0.0, 0.4, 0.6]])
    assert mixture([broken, *laws[1:]], weights, 20).values[1].isfinite().all()


def test_order_batch_and_dtype_do_not_matter():
    laws = three_laws()
    mixed = mixture(laws, WEIGHTS, 50)
    torch.testing.assert_close(mixture(laws[::-1], WEIGHTS[::-1], 50).values, mixed.values, atol=1e-12, rtol=0)
    alone = torch.stack([mixture([law[row] for law in laws], WEIGHTS, 50).values for row in range(2)])
    assert alone.equal(mixed.values)
    single = mixture([law.to(torch.float32) for law in laws], WEIGHTS, 50)
    assert single.values.dtype == torch.float32
    torch.testing.assert_close(single.values.double(), mixed.values, atol=1e-5, rtol=0)
    assert single.crossing_rate == 0
    assert mixture([law[:0] for law in laws], WEIGHTS, 50).values.shape == (0, 50)


# --- Same-level sums ------------------------------------------------------------------------------------------------


def test_quantile_average_by_hand():
    # At 0.2, 0.5, 0.9 the first has -2, 4, 6; the second is 1 up to 0.5 and 3 from 0.9.
    average = quantile_average([make([0.2, 0.5, 0.9], [-2.0, 4.0, 6.0]), make([0.5, 0.9], [1.0, 3.0])], [0.25, 0.75])
    assert average.levels.tolist() == [0.2, 0.5, 0.9]
    assert average.values.tolist() == pytest.approx([-0.5 + 0.75, 1 + 0.75, 1.5 + 2.25])


def test_quantile_average_equals_the_sum_at_every_level():
    laws = three_laws()
    average = quantile_average(laws, WEIGHTS)
    assert average.levels.tolist() == [0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 0.95]
    for row in range(2):
        for level in (0.03, 0.1, 0.17, 0.42, 0.5, 0.88, 0.99):
            expected = reference.quantile_average(as_pairs(laws, row), WEIGHTS, level)
            assert average.quantile(level)[row].item() == pytest.approx(expected, abs=1e-12)
    expected = sum(w * law.lower_tail_mean(0.2) for law, w in zip(laws, WEIGHTS, strict=True))
    assert average.lower_tail_mean(0.2).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


# --- Outcomes with probabilities, and the normal law ----------------------------------------------------------------

OUTCOMES, CHANCES = [3.0, -1.0, 0.5, 7.0], [0.3, 0.07, 0.45, 0.18]


def test_discrete_law_by_hand():
    # Staircase: -1 up to 0.25, 2 up to 0.375, 5 from there. Fourths hold -1; half 2 and half 5; 5; 5.
    law = discrete_law(torch.tensor([5.0, -1.0, 2.0]), torch.tensor([0.625, 0.25, 0.125]), num_levels=4)
    assert law.values.tolist() == [-1.0, 3.5, 5.0, 5.0]
    assert law.mean().item() == pytest.approx(5 * 0.625 - 0.25 + 2 * 0.125)


def test_discrete_law_is_within_its_bounds():
    law = discrete_law(torch.tensor(OUTCOMES, dtype=torch.float64), torch.tensor(CHANCES, dtype=torch.float64))
    spread, mean = max(OUTCOMES) - min(OUTCOMES), reference.discrete_mean(OUTCOMES, CHANCES)
    assert law.mean().item() == pytest.approx(mean, abs=1e-12)
    for alpha in ALPHAS:
        expected = reference.discrete_lower_tail_mean(OUTCOMES, CHANCES, alpha)
        assert law.lower_tail_mean(alpha).item() == pytest.approx(expected, abs=spread / (4 * DENSE_LEVELS * alpha))
    for level in (0.02, 0.06, 0.08, 0.5, 0.53, 0.8, 0.83, 0.99):
        expected = reference.discrete_quantile(OUTCOMES, CHANCES, level)
        assert law.quantile(level).item() == pytest.approx(expected, abs=1e-12)
    for outcome, mass in zip([-1.0, 0.5, 3.0, 7.0], [0.07, 0.52, 0.82, 1.0], strict=True):
        assert law.cdf(outcome).item() == pytest.approx(mass, abs=1.5 / DENSE_LEVELS)
    assert (law.values[..., None] != torch.tensor(OUTCOMES)).all(-1).sum() <= 3
    variance = sum(p * (o - mean) ** 2 for o, p in zip(OUTCOMES, CHANCES, strict=True))
    assert law.variance().item() == pytest.approx(
        variance, abs=3e-2
    )  # 1/K of the squared range, a mixed cell per jump


def test_outcomes_may_differ_by_text_and_certainty_is_a_point():
    law = discrete_law(torch.tensor([[1.0, 2.0], [5.0, -5.0]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]]), 8)
    assert law.values.tolist() == [[1.0] * 2 + [2.0] * 6, [5.0] * 8]
    failed = discrete_law(torch.tensor([1.0, 2.0]), torch.tensor([[0.5, 0.5], [math.nan, math.nan]]), 8)
    assert failed.values.isnan().all(-1).tolist() == [False, True]


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.01, 3e-3), (0.05, 2e-4), (0.1, 1e-4), (0.5, 1e-5)])
def test_normal_law_has_the_tails_of_the_normal_law(alpha, tolerance):
    mean, std = torch.tensor([-0.7, 3.0], dtype=torch.float64), torch.tensor([1.5, 0.2], dtype=torch.float64)
    law = normal_law(mean, std)
    assert law.mean().tolist() == pytest.approx(mean.tolist(), abs=1e-12)
    assert law.std().tolist() == pytest.approx(std.tolist(), rel=4e-4)
    standard = -stats.norm.pdf(stats.norm.ppf(alpha)) / alpha
    assert law.lower_tail_mean(alpha).tolist() == pytest.approx((mean + std * standard).tolist(), abs=1.5 * tolerance)
    # Levels 0.01 to 0.99 with flat tails, as a control: these are visibly short of the tail.
    plain = RewardDistribution(
        torch.arange(1, 100).double() / 100, stats.norm.ppf(torch.arange(1, 100).double() / 100)
    )
    assert abs(plain.lower_tail_mean(alpha).item() - standard) > 3 * tolerance


# --- Means over equal shares ----------------------------------------------------------------------------------------


def test_cell_means_by_hand():
    # Q: 0 to 0.5, then a jump to 4, straight to 8 at mass 1. Thirds: 0; from 1/2 to 2/3 straight from 4 to 16/3; the
    # rest from 16/3 to 8.
    means = cell_means(torch.tensor([0.0, 0.5, 0.5, 1.0]), torch.tensor([0.0, 0.0, 4.0, 8.0]), 3)
    assert means.tolist() == pytest.approx([0.0, (4 + 16 / 3) / 2 / 2, (16 / 3 + 8) / 2])


@pytest.mark.parametrize("jump", [0.0625, 0.1, 0.125, 0.1875, 0.5, 0.97])
@pytest.mark.parametrize("count", [4, 8])
def test_a_jump_costs_a_lower_tail_mean_at_most_a_quarter_of_a_cell(jump, count):
    law = discrete_law(
        torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([jump, 1 - jump], dtype=torch.float64), count
    )
    errors = []
    for alpha in [step / 160 for step in range(1, 161)]:
        truth = max(alpha - jump, 0.0)
        errors.append(abs(alpha * law.lower_tail_mean(alpha).item() - truth))
    assert max(errors) <= 1 / (4 * count) + 1e-12
    assert errors[-1] < 1e-12
    # The bound is tight: a jump in the middle of a cell reaches it.
    if jump == 0.0625 and count == 8:
        assert max(errors) == pytest.approx(1 / 32, abs=1e-3)


def test_dense_levels_are_midpoints():
    assert dense_levels(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    with pytest.raises(ValueError, match="num_levels must be at least 1, got 0"):
        dense_levels(0)


def test_cell_means_of_uneven_shares_by_hand():
    # Q: 0 to 0.5, then straight from 4 to 8. Shares of 0.25, 0.5 and 0.25.
    edges = torch.tensor([0.0, 0.25, 0.75, 1.0], dtype=torch.float64)
    means = cell_means(torch.tensor([0.0, 0.5, 0.5, 1.0]), torch.tensor([0.0, 0.0, 4.0, 8.0]), edges)
    assert means.tolist() == pytest.approx([0.0, (0 + 5) / 2, 7.0])


def test_levels_of_the_tails_are_as_near_to_each_other_as_they_say():
    levels = tail_levels()
    assert levels[0].item() == pytest.approx(1e-5, rel=0.01)
    assert levels.diff().max().item() <= 1 / 400 + 1e-12
    below = levels[levels < 0.25]
    assert (below[1:] / below[:-1]).tolist() == pytest.approx([1.01] * (len(below) - 1))
    torch.testing.assert_close(levels, 1 - levels.flip(0), atol=1e-12, rtol=0)
    assert len(levels) < 2500


def test_pooling_keeps_the_mean_and_the_worst_of_many_on_the_levels_of_the_tails():
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(50, 5, generator=generator, dtype=torch.float64).sort(dim=-1).values
    values[7] = torch.tensor([-90.0, -1.0, 0.0, 1.0, 2.0])
    laws = RewardDistribution(torch.tensor([0.05, 0.2, 0.25, 0.6, 0.9]).double(), values)
    pooled = pooled_law(laws, tail_levels())
    assert pooled.mean().item() == pytest.approx(laws.mean().mean().item(), abs=1e-10)
    # One in a thousand ratings is at -90: 400 equal shares mix it with others.
    assert pooled.quantile(0.0009).item() == -90.0
    assert pooled_law(laws).quantile(0.0009).item() > -80


# --- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", [mixture, quantile_average])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.2, 0.2], "weights must sum to one, got 0.9"),
        ([0.7, -0.2, 0.5], "not negative, got -0.2"),
        ([0.5, 0.5], r"weights of shape \(2,\) do not fit 3 laws"),
        ([[0.5, 0.2, 0.3], [0.5, 0.2, 0.4]], "sum to one, got 1.1"),
    ],
)
def test_weights_that_are_no_probabilities_are_refused(combine, weights, message):
    with pytest.raises(ValueError, match=message):
        combine(three_laws(), torch.tensor(weights))


@pytest.mark.parametrize("combine", [mixture, quantile_average])
def test_laws_of_different_texts_are_refused(combine):
    with pytest.raises(ValueError, match="no law to combine"):
        combine([], [])
    laws = three_laws()
    with pytest.raises(ValueError, match=r"batch shapes \[\(1,\), \(2,\)\]"):
        combine([laws[0][:1], *laws[1:]], WEIGHTS)


def test_probabilities_of_outcomes_must_sum_to_one():
    with pytest.raises(ValueError, match=r"sum to one, got 0\.75"):
        discrete_law(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]))


def test_the_slow_references_know_known_laws():
    two = [([0.5], [-2.0]), ([0.5], [2.0])]
    assert reference.mixture_quantile(two, [0.3, 0.7], 0.29) == pytest.approx(-2.0)
    assert reference.mixture_quantile(two, [0.3, 0.7], 0.31) == pytest.approx(2.0)
    assert reference.mixture_cell_mean(two, [0.3, 0.7], 0.2, 0.4) == pytest.approx(0.0)
    for threshold in (-2.0, -1.0, 0.5, 2.0, 4.0):
        law = ([0.2, 0.5, 0.9], [-2.0, -2.0, 4.0])
        assert reference.cdf(*law, threshold) == pytest.approx(reference_risk.cdf(*law, threshold))
    assert reference.discrete_lower_tail_mean([1.0, 5.0], [0.25, 0.75], 0.5) == 3.0


@pytest.mark.parametrize("kind", ["spread out", "ties", "narrow", "points"])
def test_pooling_equals_the_mixture_of_one_law_at_a_time(kind):
    generator = torch.Generator().manual_seed(4)
    levels = torch.tensor([0.3]) if kind == "points" else torch.tensor([0.05, 0.2, 0.25, 0.6, 0.9])
    values = 3 * torch.randn(17, len(levels), generator=generator, dtype=torch.float64).sort(dim=-1).values
    if kind == "ties":
        values = values.round()
    if kind == "narrow":
        values = values[:, :1] + 1e-9 * values
    laws = RewardDistribution(levels.double(), values)
    pooled = pooled_law(laws, 50)
    one_by_one = mixture([laws[i] for i in range(17)], [1 / 17] * 17, 50)
    # Pieces of a billionth of the range are taken as atoms, whose place is off by no more than their width.
    torch.testing.assert_close(pooled.values, one_by_one.values, atol=1e-7 if kind == "narrow" else 1e-11, rtol=0)
    assert pooled.mean().item() == pytest.approx(laws.mean().mean().item(), abs=1e-8)


def test_weighted_laws_are_pooled_as_they_are_mixed():
    generator = torch.Generator().manual_seed(8)
    levels = torch.tensor([0.05, 0.3, 0.55, 0.9])
    laws = RewardDistribution(levels.double(), torch.randn(6, 4, generator=generator).double().sort(dim=-1).values)
    weights = torch.tensor([0.5, 0.0, 0.02, 0.2, 0.18, 0.1], dtype=torch.float64)
    pooled, mixed = pooled_law(laws, 50, weights), mixture([laws[i] for i in range(6)], weights, 50)
    torch.testing.assert_close(pooled.values, mixed.values, atol=1e-11, rtol=0)
    alike = pooled_law(laws, 50, torch.full((6,), 1 / 6))
    torch.testing.assert_close(alike.values, pooled_law(laws, 50).values, atol=1e-7, rtol=0)
    with pytest.raises(ValueError, match="sum to one"):
        pooled_law(laws, 50, 2 * weights)
    with pytest.raises(ValueError, match="one weight for each"):
        pooled_law(laws, 50, weights[:3])
