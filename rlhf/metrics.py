"""Numbers for the log: summed over micro-batches and ranks first, divided once."""

import math
from collections import defaultdict

import torch
from accelerate import Accelerator
from torch import Tensor

from reward.distribution import RewardDistribution
from rlhf.losses import PolicyLoss, ValueLoss, explained_variance, kl_estimate
from rlhf.masking import Sum, masked_mean, masked_mean_and_var, masked_sum


class MetricAverages:
    """Weighted averages by name, exact over micro-batches of different size and over ranks.

    A mean of per-batch means weighs a token in a short batch more than one in a long batch; here sums and weights
    travel apart until they are read.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Add one mean with its weight (tokens, rows or 1). One that is not finite is left out."""
        value, weight = float(value), float(weight)
        # A NaN would take the other updates of the period with it, and JSON readers refuse it.
        if weight == 0 or not math.isfinite(value):
            return
        total = self._sums[name]
        total[0] += value * weight
        total[1] += weight

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Averages over all ranks; every rank must call it. Starts a new period."""
        local, self._sums = {k: tuple(v) for k, v in self._sums.items()}, defaultdict(lambda: [0.0, 0.0])
        merged: dict[str, list[float]] = {}
        # Ranks may know different names (a reward function logs what it likes), so names travel with the numbers.
        for rank in gather_objects(local, accelerator):
            for name, (total, weight) in rank.items():
                entry = merged.setdefault(name, [0.0, 0.0])
                entry[0] += total
                entry[1] += weight
        return {name: total / weight for name, (total, weight) in sorted(merged.items())}

    def state_dict(self) -> dict[str, list[float]]:
        """Sum and weight of each name in this period, on this rank."""
        return {name: list(pair) for name, pair in self._sums.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue from what `state_dict` gave."""
        sums = {name: [float(total), float(weight)] for name, (total, weight) in state.items()}
        self._sums = defaultdict(lambda: [0.0, 0.0], sums)


def gather_objects(item: object, accelerator: Accelerator) -> list:
    """One small Python object from each rank, on every rank."""
    if accelerator.num_processes == 1:
        return [item]
    gathered = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, item)
    return gathered


def score_summary(scores: Tensor, threshold: float | None, prefix: str = "reward") -> dict[str, float]:
    """Centre and lower tail of the scores of a rollout.

    Args:
        scores: (N,) scores of all ranks; NaN marks an excluded completion.
        threshold: scores at or below it count as the tail.
        prefix: of the metric names.

    Returns:
        Mean, standard deviation (of two scores or more), minimum, 5 % quantile (eleven), mean of the worst tenth
        (six), and the rate at or below the threshold; empty if no score is finite.
    """
    finite = scores[scores.isfinite()].float().cpu()
    count = finite.numel()
    if count == 0:
        return {}
    ordered = finite.sort().values
    law = RewardDistribution(levels=(torch.arange(count) + 0.5) / count, values=ordered)
    summary = {"score_mean": finite.mean().item(), "score_min": ordered[0].item()}
    if count > 1:
        summary["score_std"] = finite.std(correction=0).item()
    # The lowest score stands at the level 1/(2n). A tail that ends there or below is that score under another name.
    if 0.05 * count > 0.5:
        summary["score_q05"] = law.quantile(0.05).item()
    if 0.1 * count > 0.5:
        summary["score_cvar_0.1"] = law.lower_tail_mean(0.1).item()
    if threshold is not None:
        summary["below_threshold_rate"] = (finite <= threshold).float().mean().item()
    return {f"{prefix}/{name}": value for name, value in summary.items() if math.isfinite(value)}


def add_rollout_metrics(metrics: MetricAverages, log_ratio: Tensor, mask: Tensor, finished: Tensor) -> None:
    """Distance to the reference and lengths of one rank's rollout.

    Args:
        metrics: receives the numbers.
        log_ratio: (B, T) log π − log ref of the sampled tokens.
        mask: (B, T), True = keep.
        finished: (B,) completions that ended with a stop token.
    """
    kept = mask.any(1)
    metrics.add("kl/reference", masked_mean(masked_sum(log_ratio, mask, dim=1), kept), kept.sum())
    metrics.add("kl/reference_per_token", masked_mean(log_ratio, mask), mask.sum())
    metrics.add("kl/reference_k3_per_token", masked_mean(kl_estimate(log_ratio, mask, "k3"), mask), mask.sum())
    metrics.add("completion/length_mean", mask.sum(1).float().mean(), len(mask))
    metrics.add("completion/finished_share", finished.float().mean(), len(mask))


def add_critic_metrics(
    metrics: MetricAverages, values: Tensor, returns: Tensor, mask: Tensor, *, all_sum: Sum
) -> None:
    """What the critic knew about a rollout that it had not been trained on yet.

    Args:
        metrics: receives the numbers.
        values: (B, T) predicted before the update.
        returns: (B, T) targets of the critic.
        mask: (B, T), True = keep.
        all_sum: sum over ranks.
    """
    mean, variance = masked_mean_and_var(returns, mask, all_sum=all_sum)
    metrics.add("critic/return_mean", mean)
    metrics.add("critic/return_std", variance.sqrt())
    metrics.add("critic/explained_variance", explained_variance(values, returns, mask, all_sum=all_sum))


@torch.no_grad()
def add_update_metrics(
    metrics: MetricAverages, policy: PolicyLoss, value: ValueLoss, values: Tensor, entropy: Tensor, mask: Tensor
) -> None:
    """What one micro-batch of the update did, averaged over its tokens.

    Args:
        metrics: receives the numbers.
        policy: loss of the policy and its parts.
        value: loss of the critic.
        values: (B, T) new values.
        entropy: (B, T) of the next-token laws.
        mask: (B, T), True = keep.
    """
    for name, per_token in (
        ("policy/loss", policy.loss),
        ("policy/clip_fraction", policy.clipped.float()),
        # The old policy sampled, so its KL to the new one is k3 of the negated log-ratio.
        ("policy/approx_kl", kl_estimate(-policy.log_ratio, mask, "k3")),
        ("policy/ratio_mean", policy.ratio),
        ("policy/entropy", entropy),
        ("critic/loss", value.loss),
        ("critic/clip_fraction", value.clipped.float()),
        ("critic/value_mean", values),
    ):
        metrics.add(name, masked_mean(per_token, mask), mask.sum())
