"""Several sources of rating laws together: a mixture, which keeps their modes, or an average at equal levels."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, final

import torch

from reward.distribution import RewardDistribution
from reward.mixtures import DENSE_LEVELS, check_weights, dense_levels, mixture, quantile_average
from reward.sources import DistributionSource, average_telemetry


class CombinedSource(DistributionSource):
    """Several sources asked for the same text, their laws combined with weights.

    Args:
        sources: of any kind; their ratings must be on one scale.
        weights: of each; they sum to one.

    Raises:
        ValueError: no source, or weights that are no probabilities.
    """

    kind: str

    def __init__(self, sources: Sequence[DistributionSource], weights: Sequence[float]):
        self.sources = list(sources)
        if not self.sources:
            raise ValueError(f"{self.kind} needs at least one source")
        self.weights = torch.tensor(list(weights), dtype=torch.float64)
        check_weights(self.weights, len(self.sources))
        terms = zip(self.weights.tolist(), self.sources, strict=True)
        self.name = f"{self.kind} " + "+".join(f"{weight:g}*{source.name}" for weight, source in terms)
        self.telemetry = {}

    @abstractmethod
    def combine(self, laws: Sequence[RewardDistribution]) -> RewardDistribution:
        """The law that is made of those of the sources."""

    def prepare(self, accelerator: Any) -> None:
        for source in self.sources:
            source.prepare(accelerator)

    def distribution(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        laws = [source.distribution(prompts, completions) for source in self.sources]
        self.telemetry = average_telemetry(self.sources)
        return self.combine(laws)


@final
class MixtureSource(CombinedSource):
    """A weighted mixture of sources: with probability wᵢ the rating is one of source i.

        F(z) = Σ wᵢ Fᵢ(z)

    Modes stay apart, and the lower tail is that of the most pessimistic source with a share in it. The mean is exactly
    Σ wᵢ meanᵢ (see `mixture`). One source alone is that source.

    Args:
        sources: of any kind; their ratings must be on one scale.
        weights: probability of each; they sum to one.
        num_levels: levels of the law.

    Raises:
        ValueError: no source, or weights that are no probabilities.
    """

    kind = "mixture"

    def __init__(
        self, sources: Sequence[DistributionSource], weights: Sequence[float], *, num_levels: int = DENSE_LEVELS
    ):
        super().__init__(sources, weights)
        self.levels = dense_levels(num_levels).float() if len(self.sources) > 1 else self.sources[0].levels

    def combine(self, laws: Sequence[RewardDistribution]) -> RewardDistribution:
        return mixture(laws, self.weights, len(self.levels))


@final
class AverageSource(CombinedSource):
    """The weighted average of sources at equal levels.

        Q(t) = Σ wᵢ Qᵢ(t)

    For models that learnt the same from the same kind of data, such as one recipe with two seeds: their errors
    average out, in place and in spread. Where they disagree, a mixture would count the disagreement as spread among
    readers; the average does not. Contrast `MixtureSource` for sources that stand for different readers.

    Args:
        sources, weights: as for `MixtureSource`.

    Raises:
        ValueError: as for `MixtureSource`.

    Reference: Ratcliff 1979, doi:10.1037/0033-2909.86.3.446.
    """

    kind = "average"

    def __init__(self, sources: Sequence[DistributionSource], weights: Sequence[float]):
        super().__init__(sources, weights)
        self.levels = torch.cat([source.levels for source in self.sources]).unique()

    def combine(self, laws: Sequence[RewardDistribution]) -> RewardDistribution:
        return quantile_average(laws, self.weights)
