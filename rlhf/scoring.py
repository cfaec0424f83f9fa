"""Reward functions of any kind, called and turned into one finite score per completion."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config import PPOConfig
from rlhf.losses import apply_missing_eos
from rlhf.metrics import MetricAverages
from rlhf.reward_calls import RewardCall, RewardError, call_functions, failures_of_all_ranks
from rlhf.reward_function import RiskReward

RewardFunction = Callable[..., list[float | None]]
SCORE_DECAY = 0.9  # about ten rollouts


class RewardFunctions:
    """The reward functions of a run and their weighted sum.

    Args:
        functions: callables `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or
            async; one-label classifiers or their paths are wrapped as scalar rewards.
        weights: one per function; None: all 1.
        tokenizers: one per function or None, for those given as models.
        trust_remote_code: allow models that ship their own Python code.
        timeout: seconds that one call may take; None: no limit.
        retries: repetitions of a call that failed, after pauses that double.
        failed: 'raise' on every rank when a function has failed for good on one, or 'exclude' its completions.

    Raises:
        ValueError: counts of weights or tokenizers that do not match.
    """

    def __init__(
        self,
        functions: Any,
        weights: Sequence[float] | None = None,
        tokenizers: Any = None,
        trust_remote_code: bool = False,
        *,
        timeout: float | None = None,
        retries: int = 0,
        failed: str = "raise",
    ):
        self.timeout, self.retries, self.failed = timeout, retries, failed
        functions = functions if isinstance(functions, list | tuple) else [functions]
        tokenizers = tokenizers if isinstance(tokenizers, list | tuple) else [tokenizers] * len(functions)
        weights = list(weights) if weights is not None else [1.0] * len(functions)
        if not functions:
            raise ValueError("reward_funcs is empty: PPO needs at least one reward function.")
        for name, given in (("reward_weights", weights), ("reward_processing_classes", tokenizers)):
            if len(given) != len(functions):
                raise ValueError(f"{name} has {len(given)} entries for {len(functions)} reward functions.")
        self.functions: list[RewardFunction] = [
            RiskReward(f, tokenizer=t, trust_remote_code=trust_remote_code)
            if isinstance(f, str | PreTrainedModel)
            else f
            for f, t in zip(functions, tokenizers, strict=True)
        ]
        self.names = [getattr(f, "__name__", type(f).__name__) for f in self.functions]
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def prepare(self, accelerator: Any) -> None:
        """Let functions that hold a model place it for this launch."""
        for function in self.functions:
            if hasattr(function, "prepare"):
                function.prepare(accelerator)

    def state_dict(self) -> list[dict[str, Any]]:
        """Name of each function in order, and the state of those that have one (`state_dict`, plain numbers)."""
        states = [f.state_dict() if hasattr(f, "state_dict") else None for f in self.functions]
        return [{"name": name, "state": state} for name, state in zip(self.names, states, strict=True)]

    def load_state_dict(self, saved: list[dict[str, Any]]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: the state of other reward functions.
        """
        names = [entry["name"] for entry in saved]
        if names != self.names:
            raise ValueError(f"the checkpoint was trained on the rewards {names}, this run on {self.names}")
        for function, entry in zip(self.functions, saved, strict=True):
            if entry["state"] is not None:
                function.load_state_dict(entry["state"])

    def __call__(
        self, prompts: list, completions: list, completion_ids: list[list[int]], columns: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of all functions and the score of each. Every rank must call it.

        A function that answers None for a completion is left out of that completion's sum; where all do, the sum is
        NaN. A NaN or infinite score of any function stays in the sum, for the caller to exclude or to refuse. So does
        the NaN that stands for a function that failed.

        Returns:
            (N,) scores, and per function name (N,) its own scores.

        Raises:
            RewardError: a function failed on some rank, and `failed` is "raise".
        """
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        calls = [
            RewardCall(function, name, arguments, len(prompts), self.retries)
            for function, name in zip(self.functions, self.names, strict=True)
        ]
        # All of them, even after a failure: other ranks may be waiting for this one in the next.
        call_functions(calls, self.timeout)
        self._settle_failures(calls, columns.get("log_metric"))
        table, applies = torch.stack([c.scores.double() for c in calls]), torch.stack([c.applies for c in calls])
        weighted = torch.where(applies, self.weights.unsqueeze(1) * table, 0.0).sum(0)
        # A sum over no function would be 0, a reward that nobody gave.
        weighted = torch.where(applies.any(0), weighted, math.nan)
        return weighted.float(), dict(zip(self.names, table.float(), strict=True))

    def _settle_failures(self, calls: list[RewardCall], log_metric: Callable[..., None] | None) -> None:
        """Raise on every rank, or say what is left out."""
        own = [call.failure for call in calls if call.failure is not None]
        if log_metric is not None:
            log_metric("reward/failed_share", len(own) / len(calls), len(calls))
            if self.retries:
                log_metric("reward/attempts", sum(c.attempts for c in calls) / len(calls), len(calls))
        everywhere = failures_of_all_ranks(own)
        if everywhere and self.failed == "raise":
            cause = next((call.error for call in calls if call.error is not None), None)
            raise RewardError(
                f"{'; '.join(everywhere)}. For a service that falters set reward_timeout and reward_retries; "
                "failed_rewards='exclude' leaves such completions out."
            ) from cause
        for failure in own:
            warnings.warn(f"{failure}; its completions are left out of the update.", stacklevel=3)


def shape_scores(
    scores: Tensor, finished: Tensor, prompts: Sequence, args: PPOConfig, metrics: MetricAverages
) -> Tensor:
    """Scores as PPO uses them: failures set aside, missing ends penalised, then the clip, if there is one.

    Args:
        scores: (B,) from the reward functions.
        finished: (B,) completions that ended with a stop token.
        prompts: B prompts, for the message about failures.
        args: settings of the three steps.
        metrics: receives the shares of failed and of clipped scores.

    Returns:
        (B,) scores; NaN where the reward failed and the completion is to be left out.

    Raises:
        RewardError: a reward of some rank is NaN or infinite and `nonfinite_rewards` is "raise".
    """
    failed = ~scores.isfinite()
    metrics.add("reward/nonfinite_share", failed.float().mean(), len(scores))
    message = None
    if failed.any():
        first = prompts[int(failed.nonzero()[0])]
        message = f"{int(failed.sum())} of {len(scores)} rewards are NaN or infinite, the first for prompt {first!r}"
    # Ranks without such a reward stop too, instead of waiting for this one in the next reduction.
    if args.nonfinite_rewards == "raise" and (everywhere := failures_of_all_ranks([message] if message else [])):
        raise RewardError(f"{'; '.join(everywhere)}. Set nonfinite_rewards='exclude' to leave such completions out.")
    if message is not None:
        warnings.warn(f"{message}; these completions are left out of the update.", stacklevel=2)
        scores = scores.masked_fill(failed, math.nan)
    if args.missing_eos_penalty is not None:
        scores = apply_missing_eos(scores, finished, args.missing_eos_penalty, args.missing_eos_mode)
        scores = scores.masked_fill(failed, math.nan)
    if args.reward_clip_range is not None:
        low, high = args.reward_clip_range
        metrics.add("reward/clipped_share", ((scores < low) | (scores > high)).float().mean(), len(scores))
        if (scores < low).any():
            warnings.warn(
                f"reward_clip_range cut {int((scores < low).sum())} of {len(scores)} scores at {low:g}, the lowest of "
                f"{scores[scores.isfinite()].min():.3g}: the tail that a risk measure looks at is hidden. Lower the "
                "clip, or leave it out.",
                stacklevel=2,
            )
        scores = scores.clamp(low, high)
    return scores


def normalized_scores(
    scores: Tensor, moments: Sequence[float], all_sum: Callable[[Tensor], Tensor], decay: float = SCORE_DECAY
) -> tuple[Tensor, list[float]]:
    """Scores with their running mean taken off, in units of their running standard deviation.

        m₁ = Σ_k d^(K−k) mean_k(s) / Σ_k d^(K−k)        m₂ likewise of s²        s′ = (s − m₁) / √(m₂ − m₁²)

    over the rollouts k = 1 … K, this one included. The level of a score says nothing to a policy, but a critic that
    starts at 0 must learn it, through the trunk that it shares and under a common bound on the gradient's norm: with
    the CVaR of a population near −2.7 the first gradients, measured, were five times the bound. The scale decides what
    a KL coefficient means. Dividing by Σ d^(K−k) is the correction of the start.

    Args:
        scores: (B,) of this process; those that are not finite do not count and stay as they are.
        moments: Σ d^(K−k), and the weighted sums of the means of s and of s²; zeros before the first rollout.
        all_sum: sums a tensor over all processes.
        decay: d, in [0, 1).

    Returns:
        (B,) scores, and the new moments. Scores that have all been equal are only shifted.

    Reference: Ziegler et al. 2019, sec. 2.1, arXiv:1909.08593, who normalise once, under the policy at the start. A
    rollout of some ten completions says too little of a tail for that.
    """
    finite = scores[scores.isfinite()].double()
    count, total, squares = all_sum(torch.stack([torch.ones_like(finite).sum(), finite.sum(), (finite**2).sum()]))
    weight, first, second = moments
    if count > 0:
        weight = decay * weight + 1.0
        first, second = decay * first + float(total / count), decay * second + float(squares / count)
    if weight == 0:
        return scores, [weight, first, second]
    mean = first / weight
    variance = second / weight - mean**2
    # Below the rounding of the difference there is no spread.
    scale = math.sqrt(variance) if variance > 1e-9 * max(second / weight, 1e-30) else 1.0
    return ((scores.double() - mean) / scale).to(scores.dtype), [weight, first, second]


def above_siblings(scores: Tensor, prompts: Tensor) -> Tensor:
    """Each score less the mean of the other completions of its prompt, the leave-one-out baseline.

        s″ᵢ = sᵢ − 1/(n−1) Σ_{j≠i} sⱼ        over the n completions of one prompt

    The baseline does not depend on completion i, so the expected gradient is the same; what the prompt alone decides
    of a score, which no policy can change, no longer adds to its noise. In place of the prompt's part a share 1/(n−1)
    of the variance between its completions comes in, so it gains wherever prompts differ more than that.

    Args:
        scores: (N,) of all processes; those that are not finite are nobody's siblings and stay as they are.
        prompts: (N,) integers, equal for the completions of one prompt.

    Returns:
        (N,) in the dtype of `scores`. A completion whose siblings all failed is compared with all other completions,
        and stays as it is where there are none.

    Reference: Kool, van Hoof and Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al.
    2024, arXiv:2402.14740, for language models. Both use it in place of a critic; here the critic learns what is left.
    """
    finite = scores.isfinite()
    values = torch.where(finite, scores, 0.0).double()
    _, group = prompts.unique(return_inverse=True)
    others, total = _others(values, finite, group)
    every, total_of_every = _others(values, finite, torch.zeros_like(group))
    baseline = torch.where(others > 0, total / others.clamp(min=1), total_of_every / every.clamp(min=1))
    return (scores.double() - baseline).to(scores.dtype)


def _others(values: Tensor, counts: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) number and (N,) sum of the other values of each one's group that count."""
    sums = values.new_zeros(2, int(group.max()) + 1)
    sums = sums.index_add(1, group, torch.stack([counts.double(), values]))
    number, total = sums[:, group]
    return number - counts.double(), total - values
