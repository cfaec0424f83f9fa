"""What a risk measure's utilities would do to a policy, before anything is trained: first-order gains and selection.

Utilities of a reward model and outcomes by a judge for n completions of each prompt in, estimates with intervals out.
No gradient is taken, so none of the noise of training is in these numbers; neither is its generalisation.
"""

import numpy as np

from eval.intervals import Estimate, check_level
from eval.study import crossed_draws, percentile_ends, relative_draws


def prompt_draws(prompts: int, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """(1 + resamples, prompts) how often each prompt counts; the first row counts all alike."""
    return crossed_draws(1, prompts, resamples, seed)[1]


def first_order_gain(
    utilities: np.ndarray, outcomes: np.ndarray, draws: np.ndarray, *, level: float = 0.95
) -> Estimate | None:
    """Slope of an outcome against √KL when a policy begins to follow a utility.

    The policy that gains most of E u at a given KL is the tilt π ∝ π₀ exp(η u), prompt by prompt with one η. For small
    η its KL is η² E Var(u | x) / 2 and an outcome v gains η E Cov(u, v | x), so that

        Δ E v ≈ g √KL,    g = √2 · E Cov(u, v | x) / √(E Var(u | x))

    with variances and covariances within prompts, divided by n − 1. Adding to u what depends on the prompt alone, or
    multiplying it, changes nothing. The utility u = v has the largest g, √2 times the standard deviation of v.

    Args:
        utilities: (P, n) of n completions to each of P prompts, n >= 2.
        outcomes: (P, n) what is counted: a judge's score, minus the probability of a very low rating.
        draws: See `prompt_draws`.
        level: Of the interval.

    Returns:
        Outcome per √nat; None where the utility is the same for all completions of each prompt.

    Raises:
        ValueError: Other shapes, a number that is not finite, one completion per prompt.
    """
    utilities, outcomes = checked_table(utilities, outcomes)
    if utilities.shape[1] < 2:
        raise ValueError("what varies within a prompt takes at least two completions of it")
    ours, theirs = (values - values.mean(1, keepdims=True) for values in (utilities, outcomes))
    degrees = utilities.shape[1] - 1
    covariance, variance = (ours * theirs).sum(1) / degrees, (ours * ours).sum(1) / degrees
    # E Cov and E Var are both over the drawn prompts, whose number cancels but for one root.
    mean_covariance, mean_variance = (draws @ values / draws.sum(1) for values in (covariance, variance))
    gains = np.sqrt(2) * mean_covariance / np.sqrt(np.where(mean_variance > 0, mean_variance, np.nan))
    return interval_of(gains, utilities.shape, level)


def selected_change(
    outcomes: np.ndarray, chosen: np.ndarray, reference: np.ndarray, draws: np.ndarray, *, level: float = 0.95
) -> Estimate | None:
    """Relative change of a mean outcome from one selection to another, on the same prompts.

        Σₓ w_x v[x, chosen_x] / Σₓ w_x v[x, reference_x] − 1

    Args:
        outcomes: (P, n).
        chosen: (P,) completion that one rule takes.
        reference: (P,) that of the other.
        draws: See `prompt_draws`.
        level: Of the interval.

    Returns:
        The change as a share; None where the reference's mean is not positive. Draws without a value count against
        both ends, which may be infinite.

    Raises:
        ValueError: Other shapes, or a number that is not finite.
    """
    outcomes, _ = checked_table(outcomes, outcomes)
    rows = np.arange(len(outcomes))
    ours, theirs = (draws @ outcomes[rows, picked] for picked in (chosen, reference))
    return interval_of(relative_draws(ours, theirs), outcomes.shape, level)


def interval_of(found: np.ndarray, shape: tuple[int, int], level: float) -> Estimate | None:
    """A value and its draws (1 + R,), the value first; None where it is NaN. Draws that are NaN open both ends."""
    check_level(level)
    if np.isnan(found[0]):
        return None
    low, high = percentile_ends(found[1:], level)
    return Estimate(float(found[0]), low, high, level, n=shape[0] * shape[1], prompts=shape[0], method="percentile")


def checked_table(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two tables (P, n) of finite numbers, as float64.

    Raises:
        ValueError: Other shapes, or a number that is not finite.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.ndim != 2 or first.shape != second.shape or 0 in first.shape:
        raise ValueError(f"n numbers for each of P prompts are wanted, got shapes {first.shape} and {second.shape}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a utility or an outcome is not finite; leave its prompt out")
    return first, second
