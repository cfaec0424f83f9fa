"""The best policies at a given KL: by hand, against a solver of its own, and by exact problems with known answers."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from eval.signal import prompt_draws
from eval.tilt import population_tilt, tilt, tilted_change
from reward.distribution import RewardDistribution
from rlhf.risk import parse_risk


def kl_of(weights):
    return np.mean([sum(w * np.log(w * len(row)) for w in row if w > 0) for row in weights])


def points(values):
    """Laws that are single ratings, (P, n)."""
    return RewardDistribution(torch.tensor([0.5]).double(), torch.tensor(values).double().unsqueeze(-1))


def test_tilt_of_two_answers_by_hand():
    # Weights 3/4 and 1/4 mean exp(eta (u1 - u2)) = 3, a KL of 3/4 ln 3/2 + 1/4 ln 1/2.
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(tilt(np.array([[5.0, 2.0]]), kl), [[0.75, 0.25]], rtol=1e-9)
    # A second prompt whose answers are alike takes no part of the KL: the first may have all of it.
    both = tilt(np.array([[5.0, 2.0], [7.0, 7.0]]), kl / 2)
    np.testing.assert_allclose(both, [[0.75, 0.25], [0.5, 0.5]], rtol=1e-9)


def test_no_other_weights_at_that_kl_have_more_utility():
    rng = np.random.default_rng(0)
    utilities, kl = rng.normal(size=(3, 4)) * np.array([[1.0], [0.2], [3.0]]), 0.4

    def weights_of(logits):
        weights = np.exp(logits.reshape(3, 4) - logits.reshape(3, 4).max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    found = minimize(
        lambda logits: -(weights_of(logits) * utilities).sum(),
        rng.normal(size=12) * 0.1,
        constraints={"type": "ineq", "fun": lambda logits: kl - kl_of(weights_of(logits))},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    ours = tilt(utilities, kl)
    assert kl_of(ours) == pytest.approx(kl, abs=1e-9)
    assert (ours * utilities).sum() == pytest.approx(-found.fun, rel=1e-5)
    np.testing.assert_allclose(ours, weights_of(found.x), atol=1e-3)


def test_level_and_scale_of_a_utility_do_not_matter():
    utilities = np.random.default_rng(1).normal(size=(5, 8))
    for other in (1e6 * utilities, 1e-6 * utilities, utilities + 1e3 * np.arange(5)[:, None]):
        np.testing.assert_allclose(tilt(other, 0.7), tilt(utilities, 0.7), atol=1e-6)


@pytest.mark.parametrize("kl", [1e-4, 1.0, 2.0])
def test_the_kl_is_the_one_asked_for(kl):
    utilities = np.random.default_rng(2).normal(size=(20, 16))
    assert kl_of(tilt(utilities, kl)) == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize(
    ("utilities", "kl", "message"),
    [
        (np.eye(2), np.log(2), "up to a KL of 0.69"),
        (np.array([[1.0, 1.0, 0.0]]), 0.5, "up to a KL of 0.41"),  # ln(3/2): the two best cannot be told apart
        (np.ones((2, 2)), 0.1, "up to a KL of 0.00"),
        (np.eye(2), 0.0, "above 0"),
        (np.array([[np.nan, 1.0]]), 0.1, "not finite"),
    ],
)
def test_what_the_completions_cannot_show_is_refused(utilities, kl, message):
    with pytest.raises(ValueError, match=message):
        tilt(utilities, kl)


def test_population_scope_is_the_tilt_of_a_linear_measure():
    rng = np.random.default_rng(3)
    values = np.sort(rng.normal(size=(6, 5, 4)), axis=-1)
    laws = RewardDistribution(torch.tensor([0.1, 0.4, 0.6, 0.9]).double(), torch.from_numpy(values))
    for spec in ("mean", "below:-0.5", "mean+3*below:-0.5"):
        measure = parse_risk(spec)
        np.testing.assert_allclose(
            population_tilt(measure, laws, 0.6).weights, tilt(measure(laws).numpy(), 0.6), atol=1e-4
        )


def test_the_population_decides_where_the_kl_is_spent():
    """Two prompts, one whose answers are all fine: the mean raises both alike, the tail's measure only the other."""
    laws = points([[3.0, 5.0], [-4.0, -2.0]])
    by_mean = population_tilt(parse_risk("mean"), laws, 0.2).weights
    np.testing.assert_allclose(by_mean[0], by_mean[1])
    by_tail = population_tilt(parse_risk("cvar:0.25"), laws, 0.2).weights
    np.testing.assert_allclose(by_tail[0], [0.5, 0.5], atol=1e-3)
    assert by_tail[1, 1] > by_mean[1, 1] > 0.5
    assert kl_of(by_tail) == pytest.approx(0.2, rel=1e-6)


def test_the_population_tilt_maximises_its_measure():
    """A concave measure, so that the fixed point is the maximum: against a solver that knows no influence function."""
    rng = np.random.default_rng(4)
    ratings, kl, fine = rng.normal(size=(2, 4)) * 2, 0.3, 0.4

    def value(weights):
        mean = (weights * ratings).sum(1).mean()
        return mean - fine * (weights * (ratings - mean) ** 2).sum(1).mean()

    def weights_of(logits):
        weights = np.exp(logits.reshape(2, 4))
        return weights / weights.sum(1, keepdims=True)

    best = max(
        -minimize(
            lambda logits: -value(weights_of(logits)),
            rng.normal(size=8) * 0.3,
            constraints={"type": "ineq", "fun": lambda logits: kl - kl_of(weights_of(logits))},
            options={"maxiter": 500, "ftol": 1e-12},
        ).fun
        for _ in range(5)
    )
    ours = population_tilt(parse_risk(f"mean_variance:{fine}"), points(ratings.tolist()), kl, tolerance=1e-7).weights
    assert value(ours) == pytest.approx(best, abs=2e-4)
    # The tilt by the mean does worse: the measure is not decoration.
    assert value(tilt(ratings, kl)) < best - 0.05


def test_a_fixed_point_that_is_not_reached_is_told():
    said = []
    laws = points([[3.0, 5.0], [-4.0, -2.0]])
    population_tilt(parse_risk("cvar:0.25"), laws, 0.2, steps=1, told=said.append)
    assert "no fixed point within 1 steps" in said[0]


def test_change_by_hand():
    outcomes = np.array([[1.0, 3.0], [2.0, 6.0]])
    ours, theirs = np.array([[0.25, 0.75], [1.0, 0.0]]), np.array([[0.5, 0.5], [0.5, 0.5]])
    change = tilted_change(outcomes, ours, theirs, np.array([[1, 1], [2, 0], [0, 2]]))
    assert change.value == pytest.approx((2.5 + 2) / (2 + 4) - 1)
    assert (change.low, change.high) == pytest.approx((2 / 4 - 1, 2.5 / 2 - 1))
    assert (change.n, change.prompts) == (4, 2)
    assert tilted_change(-outcomes, ours, theirs, prompt_draws(2, 10)) is None
    with pytest.raises(ValueError, match="shapes"):
        tilted_change(outcomes, ours[:1], theirs, prompt_draws(2, 10))
