"""The best that any training could make of a risk measure at a given KL: completions of the base, weighed anew.

Completions of the base policy with their utilities by a reward model in, the weights of the policy that gains most
utility at that KL out. Nothing is trained, so neither the noise of gradients nor what a network cannot express is in
the numbers; what the reward model gets wrong is. `eval.signal` is about the first step of the same way.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from eval.intervals import Estimate
from eval.signal import checked_table, interval_of
from eval.study import relative_draws
from reward.distribution import RewardDistribution
from reward.mixtures import pooled_law, tail_levels
from rlhf.influence import expected_influence, statistics
from rlhf.measures import RiskMeasure


class Tilt(NamedTuple):
    """A policy over n completions of each of P prompts.

    Attributes:
        weights: (P, n), summing to one for each prompt.
        utilities: (P, n) that they follow.
    """

    weights: np.ndarray
    utilities: np.ndarray


def tilt_by(measure: RiskMeasure, scope: str, laws: RewardDistribution, kl: float) -> Tilt:
    """The best policy within a KL of the base for a measure in either scope: `tilt` or `population_tilt`.

    Args:
        measure: ρ.
        scope: "response" or "population".
        laws: By the reward model, batch shape (P, n).
        kl: κ, nats per completion.

    Raises:
        ValueError: See `tilt`; another scope.
    """
    if scope == "population":
        return population_tilt(measure, laws, kl)
    if scope != "response":
        raise ValueError(f"the scope of a risk measure is 'response' or 'population', got {scope!r}")
    utilities = measure(laws.to(torch.float64)).numpy()
    return Tilt(tilt(utilities, kl), utilities)


def tilt(utilities: np.ndarray, kl: float) -> np.ndarray:
    """Weights of the policy with the highest mean utility within a KL of the base, over the base's own completions.

        w(y | x) ∝ exp(η u(x, y)),    η such that E_x Σ_y w log(n w) = κ

    Drawing one of the n completions by w is a policy in its own right, and its KL to the base is at most κ: mixing
    over which n were drawn only brings it nearer (convexity of the KL). One η serves all prompts, as one KL
    coefficient does in training.

    Args:
        utilities: (P, n) of n completions to each of P prompts.
        kl: κ, nats per completion.

    Returns:
        (P, n) weights, summing to one for each prompt.

    Raises:
        ValueError: Other shapes, a number that is not finite, or a KL that n completions cannot show: they hold at
            most log n, less where the best are equally good.
    """
    utilities, _ = checked_table(utilities, utilities)
    if kl <= 0:
        raise ValueError(f"a tilt goes some way from the base: its KL must be above 0, got {kl}")
    n = utilities.shape[1]
    best = utilities.max(axis=1, keepdims=True)
    most = float(np.log(n / (utilities == best).sum(axis=1)).mean())
    if kl >= most:
        raise ValueError(
            f"{n} completions per prompt show policies up to a KL of {most:.2f} nats under this utility, and {kl:g} "
            "is asked for; generate more per prompt"
        )
    below = utilities - best
    below /= np.abs(below).max()

    def at(log_eta: float) -> tuple[np.ndarray, float]:
        weights = np.exp(np.exp(log_eta) * below)
        weights /= weights.sum(axis=1, keepdims=True)
        return weights, float(_kl(weights).mean())

    low, high = -60.0, 60.0  # of log η, for utilities that span 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] < kl else (low, middle)
    return at(high)[0]


def population_tilt(
    measure: RiskMeasure,
    laws: RewardDistribution,
    kl: float,
    *,
    steps: int = 200,
    tolerance: float = 1e-4,
    told: Callable[[str], None] = print,
) -> Tilt:
    """The same for a measure of all readings together: utilities are its expected influences at the law it leads to.

        w = tilt(u(·; F_w), κ),    F_w = (1/P) Σ_x Σ_y w(y | x) F_xy

    A fixed point, reached from the base by going half the way to the tilt again and again, as training goes from the
    base. For a measure that is convex in the law, such as a CVaR, it need not be the only one.

    Args:
        measure: As in `rlhf.influence.expected_influence`.
        laws: By the reward model, batch shape (P, n).
        kl: κ, nats per completion.
        steps: At most.
        tolerance: Total variation between two steps, averaged over prompts, at which it has arrived.
        told: Hears of a fixed point that was not reached.

    Raises:
        ValueError: See `tilt`.
    """
    laws = laws.to(torch.float64)
    prompts, n = laws.batch_shape
    flat = RewardDistribution(laws.levels, laws.values.flatten(0, 1))
    weights = np.full((prompts, n), 1 / n)
    for _ in range(steps):
        shares = torch.from_numpy(weights.ravel() / prompts)
        found = statistics(measure, pooled_law(flat, tail_levels(), shares))
        utilities = expected_influence(measure, laws, found).numpy()
        target = tilt(utilities, kl)
        moved = float(np.abs(target - weights).sum(axis=1).mean() / 2)
        if moved < tolerance:
            return Tilt(target, utilities)
        weights = (weights + target) / 2
    told(f"{measure.spec} at {kl:g} nats: no fixed point within {steps} steps, still {moved:.2g} away")
    return Tilt(target, utilities)


def tilted_change(
    outcomes: np.ndarray, ours: np.ndarray, theirs: np.ndarray, draws: np.ndarray, *, level: float = 0.95
) -> Estimate | None:
    """Relative change of a mean outcome from one weighting of the same completions to another.

        Σₓ c_x Σ_y w(y|x) v(x,y) / Σₓ c_x Σ_y w′(y|x) v(x,y) − 1

    Args:
        outcomes: (P, n) by a judge.
        ours, theirs: (P, n) weights w and w′ of `tilt`.
        draws: See `eval.signal.prompt_draws`.
        level: Of the interval, which takes the weights as given.

    Returns:
        The change as a share; None where theirs is not positive.

    Raises:
        ValueError: Other shapes, or a number that is not finite.
    """
    outcomes, _ = checked_table(outcomes, ours)
    checked_table(outcomes, theirs)
    changed, before = (draws @ (outcomes * weights).sum(axis=1) for weights in (ours, theirs))
    return interval_of(relative_draws(changed, before), outcomes.shape, level)


def _kl(weights: np.ndarray) -> np.ndarray:
    """(P,) Σ w log(n w)."""
    positive = np.where(weights > 0, weights, 1.0)
    return (weights * np.log(positive * weights.shape[1])).sum(axis=1)
