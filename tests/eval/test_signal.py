"""First-order gains and selections: by hand, against the exact tilt of a policy, and what must not count."""

import numpy as np
import pytest

from eval.signal import first_order_gain, prompt_draws, selected_change

ONE = np.ones((2, 2))


def test_gain_by_hand():
    # Within prompts: u -1, 1 and -3, 3; v 2, -2 and -1, 1. E Cov = (-4 + 6) / 2, E Var = (2 + 18) / 2, n - 1 = 1.
    utilities = np.array([[4.0, 6.0], [-3.0, 3.0]])
    outcomes = np.array([[9.0, 5.0], [0.0, 2.0]])
    gain = first_order_gain(utilities, outcomes, ONE)
    assert gain.value == pytest.approx(np.sqrt(2) * 1 / np.sqrt(10))
    # The second prompt twice: E Cov = 6, E Var = 18. The first twice: -4 and 2.
    both = first_order_gain(utilities, outcomes, np.array([[1, 1], [0, 2], [2, 0]]))
    assert (both.low, both.high) == pytest.approx((-4.0, 2.0))


def test_gain_is_the_slope_of_the_exact_tilt():
    # All answers of an enumerable policy, equally likely: the tilt, its KL and its outcome without any sampling.
    rng = np.random.default_rng(3)
    utilities, outcomes = rng.normal(size=(5, 40)), rng.normal(size=(5, 40))
    outcomes += 0.5 * utilities * np.array([[2.0], [0.1], [1.0], [0.0], [-0.5]])
    slopes = []
    for eta in (1e-3, -1e-3):
        weights = np.exp(eta * utilities)
        weights /= weights.sum(1, keepdims=True)
        kl = (weights * np.log(weights * 40)).sum(1).mean()
        slopes.append(np.sign(eta) * ((weights * outcomes).sum(1).mean() - outcomes.mean()) / np.sqrt(kl))
    # n - 1 in place of n, in numerator and under the root.
    gain = first_order_gain(utilities, outcomes, prompt_draws(5, 10)).value
    assert gain * np.sqrt(39 / 40) == pytest.approx(np.mean(slopes), rel=1e-5)


def test_what_belongs_to_the_prompt_and_the_scale_do_not_count():
    rng = np.random.default_rng(0)
    utilities, outcomes, draws = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), prompt_draws(6, 50)
    other = 7 * utilities + 100 * rng.normal(size=(6, 1))
    gain = first_order_gain(utilities, outcomes, draws)
    assert first_order_gain(other, outcomes, draws).interval == pytest.approx(gain.interval)
    assert (gain.n, gain.prompts) == (24, 6)
    best = first_order_gain(outcomes, outcomes, draws).value
    assert best == pytest.approx(np.sqrt(2 * outcomes.var(axis=1, ddof=1).mean()))
    assert gain.value < best


def test_a_utility_that_says_nothing_has_no_gain():
    assert first_order_gain(np.array([[1.0, 1.0], [2.0, 2.0]]), np.eye(2), ONE) is None


def test_selected_change_by_hand():
    outcomes = np.array([[1.0, 3.0], [2.0, 5.0]])
    chosen, reference = np.array([1, 0]), np.array([0, 1])
    change = selected_change(outcomes, chosen, reference, np.array([[1, 1], [2, 0], [0, 2]]))
    assert change.value == pytest.approx((3 + 2) / (1 + 5) - 1)
    assert (change.low, change.high) == pytest.approx((2 / 5 - 1, 3 / 1 - 1))
    assert selected_change(np.array([[-1.0, 1.0]]), np.array([1]), np.array([0]), np.ones((2, 1))) is None
    # A draw of the first prompt alone has no value, and the interval no ends.
    open_ended = selected_change(
        np.array([[-1.0], [3.0]]), np.zeros(2, int), np.zeros(2, int), np.array([[1, 1], [2, 0]])
    )
    assert open_ended.interval == (-np.inf, np.inf)


@pytest.mark.parametrize(
    ("utilities", "outcomes", "message"),
    [
        (np.ones((2, 2)), np.ones((2, 3)), "shapes"),
        (np.ones(2), np.ones(2), "shapes"),
        (np.ones((2, 1)), np.ones((2, 1)), "at least two"),
        (np.full((2, 2), np.nan), np.ones((2, 2)), "not finite"),
    ],
)
def test_numbers_that_say_nothing_are_refused(utilities, outcomes, message):
    with pytest.raises(ValueError, match=message):
        first_order_gain(utilities, outcomes, ONE)
