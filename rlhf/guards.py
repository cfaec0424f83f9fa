"""Warnings, with numbers, when a risk measure cannot matter as it is configured."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf.measures import Mean, RiskMeasure
from rlhf.risk import WeightedSum

SAME_ORDER = 0.99
PATIENCE = 10
FEWEST_SAMPLES = 8.0  # what two outstanding answers of many give


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's correlation of two (N,) tensors, ties at their mean rank; NaN if either is constant."""
    ranks = [_mean_ranks(values) for values in (first, second)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = centred[0].norm() * centred[1].norm()
    return (centred[0] @ centred[1] / scale).item() if scale > 0 else math.nan


def effective_sample_size(utility: Tensor) -> float:
    """Answers of N that carry the gradient: (Σ |uᵢ − ū|)² / Σ (uᵢ − ū)².

    The score-function gradient weighs each answer by its centred utility, so that this is Kish's effective size of
    those weights: N when all count alike, about 4 when one answer stands out from N − 1 equal ones, 0 when all
    utilities are equal.

    Args:
        utility: (N,), finite.

    Reference: Kish 1965, "Survey Sampling", section 11.7, for the formula.
    """
    centred = (utility.double() - utility.double().mean()).abs()
    square = centred.square().sum()
    return (centred.sum().square() / square).item() if square > 0 else 0.0


class RiskGuards:
    """Watches a run and says once, with numbers, when the measure of risk is without effect.

    A warning about a habit of the run needs `patience` rollouts in a row: one batch may be an accident.

    Args:
        patience: rollouts in a row.
    """

    def __init__(self, patience: int = PATIENCE):
        self.patience = patience
        self._in_row: dict[str, int] = {}
        self._said: set[str] = set()

    def look(
        self, measure: RiskMeasure, scope: str, utility: Tensor, means: Tensor, lowest_level: float
    ) -> tuple[dict[str, float], list[str]]:
        """Numbers for the log and the warnings that are due after one rollout of all ranks.

        Args:
            measure: that of this rollout.
            scope: "response" or "population".
            utility: (N,) of all answers, finite.
            means: (N,) mean ratings.
            lowest_level: of the laws as the source gives them.
        """
        numbers: dict[str, float] = {}
        warnings: list[str] = []
        size = effective_sample_size(utility)
        numbers["risk/effective_samples"] = size
        correlation = rank_correlation(utility, means)
        if not math.isnan(correlation):
            numbers["risk/rank_correlation_with_mean"] = correlation
        if self._lasts("same order", not isinstance(measure, Mean) and correlation > SAME_ORDER):
            warnings.append(
                f"in {self.patience} rollouts in a row '{measure.spec}' ({scope} scope) ranked the answers as "
                f"their mean rating does (rank correlation {correlation:.4f}), so that --risk mean would do the same. "
                + (
                    "The predicted spread hardly varies between answers: try --risk_scope population."
                    if scope == "response"
                    else "The answers differ by their place, not by their tail: a reward model that tells spreads "
                    "apart, more completions, or a smaller alpha may help."
                )
            )
        if self._lasts("no difference", size == 0 and len(utility) > 1):
            warnings.append(
                f"in {self.patience} rollouts in a row all {len(utility)} answers had the same utility under "
                f"'{measure.spec}' ({scope} scope): whitening leaves nothing, only the KL penalty trains the policy."
            )
        elif self._lasts("few samples", 0 < size < min(FEWEST_SAMPLES, len(utility) / 4)):
            warnings.append(
                f"in {self.patience} rollouts in a row only {size:.1f} of {len(utility)} answers carried the gradient "
                f"of '{measure.spec}' ({scope} scope); use more completions per rollout, a larger alpha, a schedule "
                "from the mean (--risk_schedule), or a sum with the mean."
            )
        narrowest = smallest_alpha(measure)
        if scope == "response" and narrowest < lowest_level and "below levels" not in self._said:
            self._said.add("below levels")
            warnings.append(
                f"'{measure.spec}' looks at the worst {narrowest:g} of the readers, but the reward model's lowest "
                f"quantile is at {lowest_level:.3g}, and below it the law is taken as constant. Use an alpha of at "
                f"least {lowest_level:.3g}, or a reward model with lower levels."
            )
        return numbers, warnings

    def _lasts(self, name: str, holds: bool) -> bool:
        """Whether something held `patience` times in a row, said once."""
        self._in_row[name] = self._in_row.get(name, 0) + 1 if holds else 0
        if self._in_row[name] < self.patience or name in self._said:
            return False
        self._said.add(name)
        return True

    def state_dict(self) -> dict[str, object]:
        return {"in_row": dict(self._in_row), "said": sorted(self._said)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self._in_row, self._said = {str(name): int(n) for name, n in state["in_row"].items()}, set(state["said"])


def smallest_alpha(measure: RiskMeasure) -> float:
    """The narrowest tail that a measure looks at by itself; 1 if it names none."""
    if isinstance(measure, WeightedSum):
        return min(smallest_alpha(term) for _, term in measure.terms)
    tails = [alpha for _, alpha in getattr(measure, "tails", [])]
    return min([getattr(measure, "alpha", 1.0), *tails])


def _mean_ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
