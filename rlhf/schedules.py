"""Risk measures that change over training: from the mean to the tail, for example."""

import math

from rlhf.distortions import Spectral
from rlhf.measures import CVaR, Mean, RiskMeasure, RiskSpecError
from rlhf.risk import WeightedSum

SHAPES = ("linear", "cosine")


class RiskSchedule:
    """A measure for each moment of training, between a first and a last one.

        s = clip((progress − begin) / (end − begin), 0, 1),    linear: w = s,    cosine: w = (1 − cos π s) / 2

    Two measures of one kind meet in their numbers, p = (1 − w) p₀ + w p₁: from `cvar:1` to `cvar:0.1` the tail narrows
    steadily (`mean` counts as `cvar:1` beside a CVaR). Measures of different kinds are mixed, (1 − w) ρ₀ + w ρ₁.

    Early in training the whole distribution moves and every sample says something about the tail; a narrow tail from
    the start learns from the few samples that lie in it.

    Args:
        first: measure at the beginning.
        last: measure at the end.
        shape: "linear" or "cosine".
        begin, end: shares of training between which the measure changes, 0 ≤ begin < end ≤ 1.

    Raises:
        RiskSpecError: a shape or a span that does not exist.

    >>> from rlhf.risk import parse_risk
    >>> RiskSchedule(parse_risk("mean"), parse_risk("cvar:0.2")).at(0.25)
    <risk cvar:0.8>
    """

    def __init__(
        self, first: RiskMeasure, last: RiskMeasure, shape: str = "linear", begin: float = 0.0, end: float = 1.0
    ):
        if shape not in SHAPES:
            raise RiskSpecError(f"a risk schedule is one of {', '.join(SHAPES)}, got {shape!r}")
        check_span("a risk schedule", begin, end)
        self.first, self.last, self.shape, self.begin, self.end = first, last, shape, begin, end

    @property
    def spec(self) -> str:
        return f"{self.first.spec} -> {self.last.spec} ({self.shape}, {self.begin:g} to {self.end:g})"

    @property
    def mixes(self) -> bool:
        """Whether the two measures are added on the way, in place of meeting in their numbers."""
        return isinstance(self._between(0.5), WeightedSum)

    def weight(self, progress: float) -> float:
        """w at a share of training in [0, 1]: 0 is the first measure, 1 the last."""
        share = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return share if self.shape == "linear" else (1 - math.cos(math.pi * share)) / 2

    def at(self, progress: float) -> RiskMeasure:
        """The measure at a share of training in [0, 1]."""
        weight = self.weight(progress)
        if weight == 0:
            return self.first
        return self.last if weight == 1 else self._between(weight)

    def _between(self, weight: float) -> RiskMeasure:
        first, last = self.first, self.last
        if isinstance(first, Mean) and isinstance(last, CVaR):
            first = CVaR(1.0)
        if isinstance(first, CVaR) and isinstance(last, Mean):
            last = CVaR(1.0)
        if type(first) is type(last) and first.parameters and not isinstance(first, Spectral):
            ends = zip(_numbers(first), _numbers(last), strict=True)
            # Rounding to ten digits keeps 0.1 + 0.2 out of the metrics' names.
            return type(first)(*(round((1 - weight) * start + weight * stop, 10) for start, stop in ends))
        return WeightedSum([(1 - weight, first), (weight, last)])


def check_span(what: str, begin: float, end: float) -> None:
    """Refuse what is no span of training.

    Raises:
        RiskSpecError: other than 0 <= begin < end <= 1.
    """
    if not (math.isfinite(begin) and math.isfinite(end) and 0 <= begin < end <= 1):
        raise RiskSpecError(f"{what} needs 0 <= begin < end <= 1, got begin={begin}, end={end}")


def _numbers(measure: RiskMeasure) -> list[float]:
    return [float(number) for number in measure.spec.split(":", 1)[1].split(",")]
