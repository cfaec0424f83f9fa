"""Who says the rating law of a completion: a quantile model, a scalar model, an ensemble, a Gaussian head.

`reward/judgment.py` adds a language model that is asked for a score, `reward/combinations.py` several together, and
`reward/source_specs.py` makes all of them from strings. Whatever the source, the law is a `RewardDistribution`, so
every risk measure applies to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from reward.distribution import RewardDistribution
from reward.loading import load_config
from reward.mixtures import (
    DENSE_LEVELS,
    check_weights,
    dense_levels,
    discrete_law,
    mixture,
    normal_law,
)
from reward.modeling import QRMForSequenceClassification
from reward.reading import open_reader
from reward.released import is_released
from reward.released_model import ReleasedRewardModel

QUANTILE_MODELS = (QRMForSequenceClassification, ReleasedRewardModel)

# The second output of a Gaussian head -> standard deviation.
SPREADS = {
    "log_std": torch.exp,
    "log_variance": lambda raw: (raw / 2).exp(),
    "softplus": F.softplus,
    "std": torch.abs,
}


class DistributionSource(ABC):
    """Something that says the rating law of a completion.

    Attributes:
        name: What it is, in a few words.
        levels: (K,) quantile levels of every law it gives, float32, on the CPU.
        telemetry: Numbers about the last call, logged under `reward/`: `crossing_rate`, the share of neighbouring
            quantiles in the wrong order before the repair, `truncated_share`, the share of texts that lost their
            beginning, and what else the source knows.
        attribute_names: A names where `attribute_distributions` tells them apart, none elsewhere.
    """

    name: str
    levels: Tensor
    telemetry: dict[str, float]
    attribute_names: tuple[str, ...] = ()

    @abstractmethod
    def distribution(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        """Rating laws of N completions, batch shape (N,), on the CPU.

        Args:
            prompts: N prompts, text or messages.
            completions: N completions in the same format.
        """

    def attribute_distributions(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        """Rating laws of each attribute of N completions, batch shape (N, A), on the CPU.

        Raises:
            ValueError: a source that knows no attributes.
        """
        raise ValueError(f"{self.name} does not tell attributes apart; that needs a quantile model with several")

    @abstractmethod
    def prepare(self, accelerator: Any) -> None:
        """Place the models for a launch."""


@final
class QuantileModelSource(DistributionSource):
    """A quantile reward model trained here, or a published QRM, ArmoRM or URM.

    With several attributes, w_a their weights from the gate,

        aggregation="quantile_average"   Q(t) = Σ w_a q_a(t), as the model was trained and the paper has it
        aggregation="mixture"            F(z) = Σ w_a F_a(z): one attribute is drawn, and its rating counts

    Both have the same mean. The first asks how good the answer is in all respects together, when readers who are
    strict in one are strict in all; the second keeps an attribute that is bad for sure visible as a mode of its own,
    so its lower tail lies deeper. Weights that sum to s, as published gates have them, mix laws of s times the rating.

    Args:
        model: the model, or path or hub id of one.
        aggregation: how attributes become one law.
        num_levels: levels of a mixture; a quantile average has the model's own.
        reading: `tokenizer`, `batch_size`, `max_length`, `dtype`, `trust_remote_code`, as for `open_reader`.

    Raises:
        ValueError: the model predicts no quantiles, or has nothing to mix.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        aggregation: str = "quantile_average",
        num_levels: int = DENSE_LEVELS,
        **reading: Any,
    ):
        if aggregation not in ("quantile_average", "mixture"):
            raise ValueError(f"aggregation is 'quantile_average' or 'mixture', got {aggregation!r}")
        config = model_config(model, **reading)
        if not predicts_quantiles(config):
            raise ValueError(
                f"{model_name(model)} is of type '{config.model_type}', which predicts one number; "
                "ScalarSource takes it as a law without spread"
            )
        self.reader, self.aggregation = open_reader(model, AutoModelForSequenceClassification, **reading), aggregation
        self.name, self.telemetry = model_name(model), {}
        if aggregation == "mixture" and len(self.reader.module.config.attribute_names) < 2:
            raise ValueError(f"{self.name} has one attribute: there is nothing to mix; leave aggregation out")
        self.levels = self.reader.module.levels
        self.attribute_names = tuple(self.reader.module.config.attribute_names)
        if aggregation == "mixture":
            self.levels = dense_levels(num_levels).float()

    def prepare(self, accelerator: Any) -> None:
        self.reader.prepare(accelerator)

    def distribution(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        mixed = self.aggregation == "mixture"
        rows = self._read(prompts, completions, self._mixed if mixed else lambda output: output.quantiles)
        return RewardDistribution(self.levels, _stacked(rows, self.levels))

    def attribute_distributions(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        rows = self._read(prompts, completions, lambda output: output.attribute_quantiles)
        levels = self.reader.module.levels
        return RewardDistribution(
            levels, torch.stack(rows) if rows else levels.new_empty(0, len(self.attribute_names), len(levels))
        )

    def _read(self, prompts: Sequence, completions: Sequence, take: Callable[[Any], Tensor]) -> list[Tensor]:
        ids = self.reader.token_ids(prompts, completions)
        crossings = 0.0

        def count_and_take(output: Any, mask: Tensor) -> Tensor:
            nonlocal crossings
            crossings += float(output.crossing_rate) * len(mask)
            return take(output)

        rows = self.reader.read(ids, count_and_take)
        self.telemetry = {
            "crossing_rate": crossings / max(len(ids), 1),
            "truncated_share": self.reader.truncated_share,
        }
        return rows

    def _mixed(self, output: Any) -> Tensor:
        weights = output.attribute_weights.double()
        if bool((weights < 0).any()):
            raise ValueError(
                f"{self.name} subtracts attributes, which no mixture can: use aggregation='quantile_average'"
            )
        total = weights.sum(dim=-1, keepdim=True)
        levels = self.reader.module.levels
        values = output.attribute_quantiles * total.unsqueeze(-1).to(output.attribute_quantiles)
        laws = [RewardDistribution(levels, attribute) for attribute in values.unbind(dim=1)]
        return mixture(laws, weights / total, len(self.levels)).values


@final
class ScalarSource(DistributionSource):
    """A model that predicts one number: a law without spread, all mass at the score.

    Every risk measure but those that price spread then gives the score. A quantile model counts by its mean.

    Args:
        model: one-label classifier, or path or hub id of one.
        reading: as for `QuantileModelSource`.

    Raises:
        ValueError: the model has several labels.
    """

    def __init__(self, model: str | PreTrainedModel, **reading: Any):
        config = model_config(model, **reading)
        if config.num_labels != 1 and not predicts_quantiles(config):
            raise ValueError(f"{model_name(model)} has {config.num_labels} labels; a scalar reward model has one.")
        self.reader = open_reader(model, AutoModelForSequenceClassification, **reading)
        self.name, self.levels, self.telemetry = model_name(model), torch.tensor([0.5]), {}

    def prepare(self, accelerator: Any) -> None:
        self.reader.prepare(accelerator)

    def distribution(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        rows = self.reader.read(self.reader.token_ids(prompts, completions), lambda output, _: output.logits[:, :1])
        self.telemetry = {"crossing_rate": 0.0, "truncated_share": self.reader.truncated_share}
        return RewardDistribution(self.levels, _stacked(rows, self.levels))


@final
class EnsembleSource(DistributionSource):
    """Several scalar reward models; the law is the spread of their opinions.

        s₍₁₎ ≤ … ≤ s₍M₎ at levels (i − ½)/M,    sₘ = scaleₘ · scoreₘ + offsetₘ

    This is what the models disagree about, not what readers do: it is wide where the models learnt from too little.
    The interpolated law has exactly the mean of the scores, and a little less than their variance,

        Var = (1/M) Σ (sᵢ − s̄)² − (1/6M) Σ (s₍ᵢ₊₁₎ − s₍ᵢ₎)²,

    because mass between neighbouring scores is spread out, not put on them. With M members a tail below 1/(2M) is the
    lowest score: five models say nothing about the worst hundredth.

    Args:
        members: one source per model.
        scale, offset: one number per member, since scores of different models are on different scales. Unset: 1 and 0.
        weights: probability of each member. The law is then the staircase with these steps, on dense levels.
        num_levels: levels of the weighted law.

    Raises:
        ValueError: no member, or numbers that do not fit.

    Reference: Coste et al. 2024, arXiv:2310.02743.
    """

    def __init__(
        self,
        members: Sequence[ScalarSource],
        *,
        scale: Sequence[float] | None = None,
        offset: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
        num_levels: int = DENSE_LEVELS,
    ):
        self.members = list(members)
        count = len(self.members)
        if not count:
            raise ValueError("an ensemble needs at least one member")
        self.scale = _one_per_member("scale", scale, count, 1.0)
        self.offset = _one_per_member("offset", offset, count, 0.0)
        if bool((self.scale == 0).any()):
            raise ValueError("a scale of 0 silences its member; leave the member out")
        self.weights = None
        if weights is not None:
            self.weights = _one_per_member("weights", weights, count, 1.0)
            check_weights(self.weights, count)
        self.name, self.telemetry = f"ensemble of {count}", {}
        self.levels = dense_levels(count if weights is None else num_levels).float()

    def prepare(self, accelerator: Any) -> None:
        for member in self.members:
            member.prepare(accelerator)

    def distribution(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        scores = torch.cat([member.distribution(prompts, completions).values for member in self.members], dim=-1)
        self.telemetry = average_telemetry(self.members)
        scores = scores * self.scale.float() + self.offset.float()
        if self.weights is None:
            # Sorted here, since the order of members is no order of quantiles that could have crossed.
            ordered = torch.where(scores.isnan().any(dim=-1, keepdim=True), torch.nan, scores.sort(dim=-1).values)
            return RewardDistribution(self.levels, ordered)
        return discrete_law(scores, self.weights.expand_as(scores), len(self.levels))


@final
class GaussianSource(DistributionSource):
    """A model that predicts mean and standard deviation; the law is normal.

        N(Σ w_a μ_a, (Σ |w_a| σ_a)²)    URM: attributes added at equal levels, an upper bound of their spread
        N(μ, σ²)                        a classifier with two labels

    A URM given to `QuantileModelSource` is the same law on levels 0.01 to 0.99 with flat tails; here the tails are
    whole (`normal_law`).

    Args:
        model: URM or two-label classifier, or path or hub id of one.
        spread: what the second output of a head is: "log_std", "log_variance", "std" or "softplus" (of the standard
            deviation). Required for a classifier, whose config cannot say; a URM has its own.
        num_levels: levels of the law.
        reading: as for `QuantileModelSource`.

    Raises:
        ValueError: a model of another form, or a spread that is missing or unknown.

    Reference: Lou et al. 2024, arXiv:2410.00847.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        spread: str | None = None,
        num_levels: int = DENSE_LEVELS,
        **reading: Any,
    ):
        config = model_config(model, **reading)
        self.name, self.telemetry, self.spread = model_name(model), {}, spread
        if spread is not None and spread not in SPREADS:
            raise ValueError(f"spread is one of {', '.join(SPREADS)}, got {spread!r}")
        gated = predicts_quantiles(config)
        if not gated and config.num_labels != 2:
            raise ValueError(f"{self.name} has {config.num_labels} labels; a Gaussian head has two, mean and spread")
        if not gated and spread is None:
            raise ValueError(f"say what the second output of {self.name} is: spread is one of {', '.join(SPREADS)}")
        self.reader = open_reader(model, AutoModelForSequenceClassification, **reading)
        self.gated = isinstance(self.reader.module, ReleasedRewardModel)
        if gated and not (self.gated and self.reader.module.config.kind == "gaussian"):
            raise ValueError(f"{self.name} predicts quantiles, not mean and spread; QuantileModelSource takes it")
        if gated and spread is not None:
            raise ValueError("a URM knows what its spread is; pass spread_parameter to load_released to say otherwise")
        self.levels = dense_levels(num_levels).float()

    def prepare(self, accelerator: Any) -> None:
        self.reader.prepare(accelerator)

    def distribution(self, prompts: Sequence, completions: Sequence) -> RewardDistribution:
        ids = self.reader.token_ids(prompts, completions)
        rows = self.reader.read(ids, lambda output, _: self._mean_and_std(output))
        self.telemetry = {"crossing_rate": 0.0, "truncated_share": self.reader.truncated_share}
        moments = torch.stack(rows) if rows else torch.empty(0, 2)
        return normal_law(moments[:, 0], moments[:, 1], len(self.levels))

    def _mean_and_std(self, output: Any) -> Tensor:
        """(B, 2)."""
        if not self.gated:
            mean, raw = output.logits.float().unbind(dim=-1)
            return torch.stack([mean, SPREADS[self.spread](raw)], dim=-1)
        # Quantiles of a normal law are μ + σ z: the outermost two give σ back.
        top = torch.special.ndtri(self.reader.module.levels[-1].double()).item()
        std = (output.quantiles[:, -1] - output.quantiles[:, 0]) / (2 * top)
        return torch.stack([output.score, std], dim=-1)


def predicts_quantiles(config: PreTrainedConfig) -> bool:
    """Whether a config is that of a model with a law of its own: a QRM, or a published reward model."""
    return is_released(config) or config.model_type in {model.config_class.model_type for model in QUANTILE_MODELS}


def model_config(model: str | PreTrainedModel, *, trust_remote_code: bool = False, **_: Any) -> PreTrainedConfig:
    """Config of a model or of what lies under a path; further arguments of `open_reader` do not matter to it."""
    if not isinstance(model, str):
        return model.config
    return load_config(model, trust_remote_code=trust_remote_code)


def model_name(model: str | PreTrainedModel) -> str:
    """The path or hub id of a model; its class where it came from neither."""
    return model if isinstance(model, str) else model.config.name_or_path or type(model).__name__


def _stacked(rows: list[Tensor], levels: Tensor) -> Tensor:
    return torch.stack(rows) if rows else torch.empty(0, len(levels))


def _one_per_member(name: str, values: Sequence[float] | None, count: int, default: float) -> Tensor:
    numbers = torch.tensor([default] * count if values is None else list(values), dtype=torch.float64)
    if len(numbers) != count:
        raise ValueError(f"{name} has {len(numbers)} entries for {count} members")
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {numbers.tolist()}")
    return numbers


def average_telemetry(sources: Sequence[DistributionSource]) -> dict[str, float]:
    """Mean of each number over the sources that know it."""
    names = dict.fromkeys(name for source in sources for name in source.telemetry)
    known = {name: [s.telemetry[name] for s in sources if name in s.telemetry] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in known.items()}
