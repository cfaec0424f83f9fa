"""What every reward model here answers with, and the arguments that a hub understands."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from reward.distribution import RewardDistribution

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


@dataclass
class QRMOutput(ModelOutput):
    """What a quantile reward model says about B texts, with K levels and A attributes; all numbers are float32.

    Args:
        loss: () mean pinball loss, or that of the model's objective, when labels were given.
        logits: (B, 1) the score again, where generic code looks for it.
        score: (B,) mean of the aggregate distribution.
        quantiles: (B, K) aggregate distribution, non-decreasing along K.
        attribute_quantiles: (B, A, K) distribution of each attribute, non-decreasing along K.
        attribute_weights: (B, A) coefficients: non-negative and with a sum of one unless a transform changes them.
        crossing_rate: () share of neighbouring attribute quantiles that the head gave in the wrong order.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    score: Tensor | None = None
    quantiles: Tensor | None = None
    attribute_quantiles: Tensor | None = None
    attribute_weights: Tensor | None = None
    crossing_rate: Tensor | None = None


class QuantileLaws:
    """What a model with `config.quantile_levels` says, as laws of ratings."""

    @property
    def levels(self) -> Tensor:
        """(K,) quantile levels, float32, on the CPU."""
        return torch.tensor(self.config.quantile_levels, dtype=torch.float32)

    def distribution(self, output: QRMOutput) -> RewardDistribution:
        """The aggregate law of each text. Its mean is `output.score`, or as close as the model's class says."""
        return RewardDistribution(levels=self.levels, values=output.quantiles)

    def attribute_distribution(self, output: QRMOutput) -> RewardDistribution:
        """The law of each attribute of each text, batch shape (B, A)."""
        return RewardDistribution(levels=self.levels, values=output.attribute_quantiles)
