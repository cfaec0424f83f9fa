"""Warnings, with numbers, when a risk measure cannot matter as it is configured."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.masking import has_spread
from rlhf.measures import Mean, RiskMeasure
from rlhf.risk import WeightedSum

SAME_ORDER = 0.99
PATIENCE = 10
# Utilities of normal spread carry 2N/π of N answers. At half of that, about N/3, the gradient is as noisy as that of
# half the rollout; a tenth of the answers that stand out from all others give as much. One alone gives nearly 4,
# so that of ten answers or fewer nothing is said.
SMALLEST_SHARE = 1 / 3


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
        self,
        measure: RiskMeasure | None,
        scope: str,
        utility: Tensor,
        means: Tensor,
        lowest_level: float,
        *,
        settled: bool = True,
        constraints: Sequence[RiskMeasure] = (),
    ) -> tuple[dict[str, float], list[str]]:
        """Numbers for the log and the warnings that are due after one rollout of all ranks.

        Args:
            measure: that of this rollout; None where there are constraints alone.
            scope: "response" or "population".
            utility: (N,) of all answers, finite.
            means: (N,) mean ratings.
            lowest_level: of the laws as the source gives them.
            settled: the measure is the one that the run ends on. A schedule that starts at the mean ranks as the mean
                does, by intent, and the rollouts on the way say nothing about its end.
            constraints: the measures that are bounded.
        """
        numbers: dict[str, float] = {}
        warnings: list[str] = []
        if measure is not None:
            numbers, warnings = self._look_at_utility(measure, scope, utility, means, settled)
            if scope == "response" and smallest_alpha(measure) < lowest_level:
                warnings += self._below_levels(measure, "readers of an answer", lowest_level)
        for bounded in constraints:
            if smallest_alpha(bounded) < lowest_level:
                warnings += self._below_levels(bounded, "all ratings", lowest_level)
        return numbers, warnings

    def _look_at_utility(
        self, measure: RiskMeasure, scope: str, utility: Tensor, means: Tensor, settled: bool
    ) -> tuple[dict[str, float], list[str]]:
        size = effective_sample_size(utility)
        numbers, warnings = {"risk/effective_samples": size}, []
        correlation = rank_correlation(utility, means)
        if not math.isnan(correlation):
            numbers["risk/rank_correlation_with_mean"] = correlation
        same = settled and not isinstance(measure, Mean) and correlation > SAME_ORDER
        if self._lasts("same order", same):
            warnings.append(
                f"in {self.patience} rollouts in a row '{measure.spec}' ({scope} scope) ranked the answers as "
                f"their mean rating does (rank correlation {correlation:.4f}), so that --risk mean would do nearly "
                "the same: the answers differ by their place, not by their spread. recipes/compare_risk.py says which "
                "measure could matter for this policy and reward model; if none does, only a reward model that tells "
                "spreads apart helps."
            )
        # The rule of the whitening itself: what is left of equal utilities is rounding, and has no order.
        equal = not bool(has_spread(utility.mean(), utility.var(correction=0)))
        if self._lasts("no difference", equal and len(utility) > 1):
            warnings.append(
                f"in {self.patience} rollouts in a row all {len(utility)} answers had the same utility under "
                f"'{measure.spec}' ({scope} scope): whitening leaves nothing, only the KL penalty trains the policy."
            )
        if self._lasts("few samples", not equal and size < SMALLEST_SHARE * len(utility)):
            advice = "more completions per rollout make it less noisy"
            if not isinstance(measure, Mean):
                advice += "; so does a wider tail" if smallest_alpha(measure) < 1 else "; so does a milder measure"
                advice += ", or the measure in response scope" if scope == "population" else ""
            warnings.append(
                f"in {self.patience} rollouts in a row fewer than a third of the answers carried the gradient of "
                f"'{measure.spec}' ({scope} scope), in the last {size:.1f} of {len(utility)}: {advice}."
            )
        return numbers, warnings

    def _below_levels(self, measure: RiskMeasure, of_what: str, lowest_level: float) -> list[str]:
        """The warning about a tail that the reward model does not predict, once for each measure's alpha."""
        narrowest = smallest_alpha(measure)
        # A schedule comes by many alphas; the word about one of them is enough.
        name = "below levels" if of_what != "all ratings" else f"below levels {measure.spec}"
        if name in self._said:
            return []
        self._said.add(name)
        return [
            f"'{measure.spec}' looks at the worst {narrowest:g} of {of_what}, but the reward model's lowest "
            f"quantile is at {lowest_level:.3g}, and below it the law of an answer is taken as constant. Use an alpha "
            f"of at least {lowest_level:.3g}, or a reward model with lower levels."
        ]

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
