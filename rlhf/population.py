"""The law of ratings that a policy gets, followed over the steps of training."""

from collections.abc import Mapping

import torch
from torch import Tensor

from reward.distribution import RewardDistribution

# A law from nine rollouts ago keeps a tail in sight that the policy has left: with 0.9, small exact problems whose
# optimum is known ended on other answers (tests/rlhf/test_risk_bandits.py).
DECAY = 0.5


class PopulationTracker:
    """Average over steps of the quantile function of the population, corrected for its start.

        Q̄ₙ(t) = Σₛ γⁿ⁻ˢ Qₛ(t) / Σₛ γⁿ⁻ˢ,    s = 1 … n

    One batch holds few answers of the lower tail; the average over steps holds more, and lags behind the policy by
    γ/(1 − γ) steps. Ratings of equal rank are averaged, so every quantile ν and every mean μ of the result is the
    average of those of the steps. Because the law is kept and not a few numbers of it, the measure may change on the
    way (a schedule), and constraints share it.

    Dividing by the weights summed so far makes the first law count in full. An average that starts from zero would
    say that ratings are near 0 until it has warmed up.

    Args:
        decay: γ in [0, 1). 0 forgets everything but the last step.

    Raises:
        ValueError: a decay out of range.
    """

    def __init__(self, decay: float = DECAY):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the population's law must lie in [0, 1), got {decay}")
        self.decay = decay
        self._levels: Tensor | None = None
        self._sum: Tensor | None = None
        self._weight = 0.0

    def update(self, population: RewardDistribution) -> None:
        """Add the law of one step, batch shape ().

        Raises:
            ValueError: several laws, a law that is not finite, or one on other levels than before.
        """
        if population.batch_shape:
            raise ValueError(f"a population is one law, got batch shape {tuple(population.batch_shape)}")
        if not bool(population.values.isfinite().all()):
            raise ValueError("a population's law must be finite")
        levels, values = population.levels.double().cpu(), population.values.detach().double().cpu()
        if self._sum is None:
            self._levels, self._sum = levels, torch.zeros_like(values)
        elif not torch.equal(levels, self._levels):
            raise ValueError(f"the population had {len(self._levels)} levels before and has {len(levels)} others now")
        self._sum = self.decay * self._sum + values
        self._weight = self.decay * self._weight + 1.0

    @property
    def law(self) -> RewardDistribution | None:
        """The averaged law, batch shape (), float64; None before the first update."""
        if self._sum is None:
            return None
        return RewardDistribution(self._levels, self._sum / self._weight)

    def bring_to(self, levels: Tensor) -> None:
        """Read the law so far at other levels, so that laws on those can follow; nothing where it has them already."""
        if self._sum is not None and not torch.equal(levels, self._levels):
            self._sum, self._levels = self.law.quantile(levels) * self._weight, levels

    def state_dict(self) -> dict[str, object]:
        """Everything that `load_state_dict` needs, as plain numbers."""
        empty = self._sum is None
        return {
            "decay": self.decay,
            "weight": self._weight,
            "levels": None if empty else self._levels.tolist(),
            "sum": None if empty else self._sum.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from what `state_dict` gave, bit by bit: JSON keeps a float64 whole.

        Raises:
            ValueError: levels without a law, or of another number.
        """
        levels, total = (
            None if state[name] is None else torch.tensor(state[name], dtype=torch.float64)
            for name in ("levels", "sum")
        )
        if (levels is None) != (total is None) or (levels is not None and levels.shape != total.shape):
            raise ValueError("the levels and the law of the population do not belong together")
        self.decay, self._weight = float(state["decay"]), float(state["weight"])
        self._levels, self._sum = levels, total
