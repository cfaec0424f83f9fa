"""Losses by hand, against slow loops, with missing ratings, and by what minimises them."""

import math

import pytest
import reference_risk
import torch

from reward.objectives import bradley_terry_loss, pinball_loss, quantile_huber_loss, spread_loss

# B=2 texts, A=3 attributes, K=5 levels, M=7 raters: no two axes of one length.
LEVELS = [0.05, 0.2, 0.5, 0.75, 0.9]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    quantiles = 2 * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    targets = 2 * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    given = torch.rand(2, 3, 7, generator=generator) < 0.6
    given[1, 2] = False
    return quantiles, torch.where(given, targets, math.nan), torch.tensor(LEVELS, dtype=torch.float64)


def test_pinball_by_hand():
    # Rating 1 lies 3 above the first quantile (0.1 * 3) and 1 below the second (0.3 * 1); rating 4 lies 6 and 2 above
    # (0.1 * 6, 0.7 * 2). Mean over two levels, then over two ratings.
    loss = pinball_loss(torch.tensor([-2.0, 2.0]), torch.tensor([1.0, 4.0]), torch.tensor([0.1, 0.7]))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(((0.3 + 0.3) / 2 + (0.6 + 1.4) / 2) / 2)


def test_quantile_huber_by_hand():
    # Width 2: an error of 3 costs 3 - 1, one of -1 costs 1/4, both times their side's weight.
    loss = quantile_huber_loss(torch.tensor([-2.0, 2.0]), torch.tensor([1.0]), torch.tensor([0.1, 0.7]), kappa=2.0)
    assert loss.item() == pytest.approx((0.1 * 2 + 0.3 * 0.25) / 2)


def test_losses_agree_with_slow_loops_under_missing_ratings(batch):
    quantiles, targets, levels = batch
    given = ~targets.isnan()
    pinball = pinball_loss(quantiles, targets, levels, given)
    huber = quantile_huber_loss(quantiles, targets, levels, given, kappa=0.7)
    assert pinball.shape == huber.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            row = quantiles[i, j].tolist(), targets[i, j].tolist(), LEVELS
            assert pinball[i, j].item() == pytest.approx(reference_risk.pinball(*row), abs=1e-12)
            assert huber[i, j].item() == pytest.approx(reference_risk.quantile_huber(*row, 0.7), abs=1e-12)


def test_missing_ratings_change_neither_loss_nor_gradient(batch):
    quantiles, targets, levels = batch
    given = ~targets.isnan()
    results = []
    for filler in (math.nan, math.inf, 1e9, 0.0):
        leaf = quantiles.clone().requires_grad_()
        loss = pinball_loss(leaf, torch.where(given, targets, filler), levels, given)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])
    assert bool(results[0][1].isfinite().all())
    assert results[0][0][1, 2].item() == 0.0  # the row without any rating
    assert bool((results[0][1][1, 2] == 0).all())


def test_the_level_belongs_to_the_prediction_not_to_the_rating():
    # With as many ratings as levels, a transposed loss still runs; it must give another number.
    generator = torch.Generator().manual_seed(1)
    quantiles, targets = torch.randn(5, generator=generator), torch.randn(5, generator=generator)
    levels = torch.tensor(LEVELS)
    right = pinball_loss(quantiles, targets, levels).item()
    assert right == pytest.approx(reference_risk.pinball(quantiles.tolist(), targets.tolist(), LEVELS), abs=1e-6)
    error = targets.unsqueeze(0) - quantiles.unsqueeze(1)
    transposed = ((levels - (error < 0).float()) * error).mean().item()
    assert abs(transposed - right) > 0.05


def test_the_pinball_loss_is_smallest_at_the_quantiles():
    # The loss is convex and each term sees one level, so a step that costs in either direction proves the minimum.
    generator = torch.Generator().manual_seed(2)
    ratings = torch.randn(4001, generator=generator, dtype=torch.float64).exp()  # skewed
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    best = ratings.quantile(levels)
    smallest = pinball_loss(best, ratings, levels)
    for level in range(len(LEVELS)):
        for step in (-0.02, 0.02):
            moved = best.clone()
            moved[level] += step
            assert pinball_loss(moved, ratings, levels) > smallest


def test_quantile_huber_tends_to_pinball(batch):
    quantiles, targets, levels = batch
    given = ~targets.isnan()
    pinball = pinball_loss(quantiles, targets, levels, given)
    near = quantile_huber_loss(quantiles, targets, levels, given, kappa=1e-9)
    far = quantile_huber_loss(quantiles, targets, levels, given, kappa=1.0)
    assert torch.allclose(near, pinball, atol=1e-8)
    assert not torch.allclose(far, pinball, atol=1e-3)


def test_gradients_agree_with_finite_differences(batch):
    quantiles, targets, levels = batch
    given = ~targets.isnan()
    quantiles.requires_grad_()
    assert torch.autograd.gradcheck(lambda q: pinball_loss(q, targets, levels, given), (quantiles,))
    assert torch.autograd.gradcheck(lambda q: quantile_huber_loss(q, targets, levels, given), (quantiles,))


def test_no_gradient_reaches_the_ratings():
    targets = torch.zeros(3, requires_grad=True)
    loss = pinball_loss(torch.tensor([1.0, 2.0], requires_grad=True), targets, torch.tensor([0.3, 0.6]))
    loss.backward()
    assert targets.grad is None


def test_bradley_terry_by_hand():
    loss = bradley_terry_loss(torch.tensor([2.0, -1.0, 0.0]), torch.tensor([0.0, 3.0, 0.0]), margin=0.5)
    expected = [math.log(1 + math.exp(-(difference - 0.5))) for difference in (2.0, -4.0, 0.0)]
    assert loss.tolist() == pytest.approx(expected)
    assert bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0])).item() == pytest.approx(1000.0)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        bradley_terry_loss(torch.zeros(4), torch.zeros(1))
    with pytest.raises(ValueError, match="do not fit 3 levels"):
        pinball_loss(torch.zeros(2, 5), torch.zeros(2, 7), torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="agree but for the last axis"):
        pinball_loss(torch.zeros(2, 5), torch.zeros(7), torch.tensor(LEVELS))
    with pytest.raises(ValueError, match="shape of targets"):
        pinball_loss(torch.zeros(2, 5), torch.zeros(2, 7), torch.tensor(LEVELS), torch.ones(7))
    with pytest.raises(ValueError, match="kappa"):
        quantile_huber_loss(torch.zeros(2, 5), torch.zeros(2, 7), torch.tensor(LEVELS), kappa=0.0)


def test_spread_by_hand():
    quantiles = torch.tensor([[-1.0, 3.0], [-1.0, 3.0], [-1.0, 3.0]], requires_grad=True)
    nan = float("nan")
    targets = torch.tensor([[0.0, 2.0, nan], [5.0, nan, nan], [nan, nan, nan]])
    loss = spread_loss(quantiles, targets, torch.tensor([0.25, 0.75]), ~targets.isnan())
    # Mean 1; a quarter of the mass at each end, the rest even between: variance 4/4 + 4/4 + 16/24. Raters: 0 and 2.
    assert loss.tolist() == pytest.approx([((2 + 2 / 3) ** 0.5 - 1.0) ** 2, 0.0, 0.0], abs=1e-6)
    loss.sum().backward()
    # A shift of both quantiles changes no spread, and texts with fewer than two ratings have no say.
    assert quantiles.grad[0, 0].item() == pytest.approx(-quantiles.grad[0, 1].item(), abs=1e-6)
    assert quantiles.grad[0, 1] > 0.1
    assert quantiles.grad[1:].abs().sum() == 0
