"""Policies small enough to enumerate: prompts, answers and rating laws in tables, trained by the project's own losses.

Ratings take a few outcomes, so that the law of a rating under a policy is a vector of probabilities and every risk
measure of it can be written down from its definition.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reward.distribution import RewardDistribution
from reward.mixtures import mixture
from rlhf.advantages import gae, token_rewards
from rlhf.influence import expected_influence, statistics
from rlhf.losses import clipped_policy_loss, clipped_value_loss
from rlhf.masking import centre_and_scale, global_token_mean
from rlhf.measures import RiskMeasure

# Half the mass over which a jump of a quantile function is bridged.
HALF_JUMP = 1e-7


@dataclass(frozen=True)
class Bandit:
    """Prompts that come with probabilities, answers to each, and the law of the rating of each answer.

    Args:
        prompt_weights: (X,) sums to one.
        outcomes: (S,) ratings in rising order.
        probabilities: (X, Y, S) of each outcome.
        blur: each outcome is spread evenly over ± this much. A quantile needs that: of a discrete law it moves in
            jumps, or not at all.
    """

    prompt_weights: Tensor
    outcomes: Tensor
    probabilities: Tensor
    blur: float = 0.0

    @classmethod
    def of(cls, arms: list[list[dict[float, float]]], prompt_weights: list[float], blur: float = 0.0) -> "Bandit":
        """From {outcome: probability} for each answer to each prompt."""
        outcomes = sorted({outcome for answers in arms for arm in answers for outcome in arm})
        table = [[[arm.get(outcome, 0.0) for outcome in outcomes] for arm in answers] for answers in arms]
        numbers = [torch.tensor(number, dtype=torch.float64) for number in (prompt_weights, outcomes, table)]
        return cls(*numbers, blur)

    def laws(self) -> RewardDistribution:
        """Batch shape (X, Y)."""
        return staircase(self.outcomes, self.probabilities, self.blur)

    def joint(self, policy: Tensor) -> Tensor:
        """Probability of each prompt with each answer, (X, Y), under a policy (X, Y)."""
        return self.prompt_weights.unsqueeze(-1) * policy

    def mixed(self, policy: Tensor) -> Tensor:
        """Probability of each outcome under a policy, (S,): linear in the policy."""
        return torch.einsum("xy,xys->s", self.joint(policy), self.probabilities)

    def population(self, policy: Tensor) -> RewardDistribution:
        """The exact law of a rating under a policy; batch shape ()."""
        return staircase(self.outcomes, self.mixed(policy.detach()), self.blur)


def staircase(outcomes: Tensor, probabilities: Tensor, blur: float = 0.0) -> RewardDistribution:
    """Laws (...) of discrete ratings, probabilities (..., S), each jump of Q bridged over a mass of 2e-7.

    All laws share the levels at which any of them jumps. With a blur, Q rises by twice as much over each outcome.
    """
    rows = probabilities.reshape(-1, probabilities.shape[-1]).numpy()
    ends = np.concatenate([np.zeros((len(rows), 1)), rows.cumsum(axis=-1)], axis=-1)
    jumps = np.unique(ends.round(12))
    jumps = jumps[(jumps > 0) & (jumps < 1)]
    assert np.diff([0.0, *jumps, 1.0]).min() > 4 * HALF_JUMP, "two jumps on one spot"
    levels = np.sort(np.concatenate([jumps - HALF_JUMP, jumps + HALF_JUMP, [HALF_JUMP, 1 - HALF_JUMP]]))
    values = []
    for row, end in zip(rows, ends, strict=True):
        # Rounding must not make a level step over the end of the last outcome that has any mass.
        index = np.searchsorted(end[1:].round(12), levels).clip(max=np.flatnonzero(row).max())
        share = ((levels - end[index]) / np.maximum(row[index], HALF_JUMP)).clip(0.0, 1.0)
        values.append(outcomes.numpy()[index] + blur * (2 * share - 1))
    table = torch.as_tensor(np.stack(values)).reshape(*probabilities.shape[:-1], len(levels))
    return RewardDistribution(torch.as_tensor(levels), table)


def sampled_population(laws: RewardDistribution, counts: Tensor, num_levels: int = 400) -> RewardDistribution:
    """`population_law` of a batch in which law i occurs counts[i] times, without laying them out one by one."""
    present = counts.nonzero().flatten().tolist()
    return mixture([laws[index] for index in present], counts[present].double() / counts.sum(), num_levels)


def train(bandit: Bandit, measure: RiskMeasure, scope: str, seed: int) -> Tensor:
    """The policy (X, Y) that PPO ends on, from the uniform one.

    Args:
        scope: "response" for ρ of each answer's own law, "population" for its worth to ρ of the law of the batch.
    """

    def worth_of(laws: RewardDistribution, drawn: Tensor) -> Tensor:
        if scope == "response":
            return measure(laws)
        population = sampled_population(laws, drawn.bincount(minlength=len(laws)))
        return expected_influence(measure, laws, statistics(measure, population))

    return list(policies(bandit, worth_of, seed))[-1]


def policies(
    bandit: Bandit,
    worth_of: Callable[[RewardDistribution, Tensor], Tensor],
    seed: int,
    *,
    steps: int = 16,
    batch: int = 192,
    learning_rate: float = 3.0,
    epochs: int = 2,
    kl_coef: float = 0.0,
) -> Iterator[Tensor]:
    """The policy (X, Y) after each step of PPO: those of `PPOTrainer` on one token, in float64.

    Args:
        worth_of: from the laws of all X·Y pairs and the indices of those drawn (batch,) to the utility of each pair.
        kl_coef: price of the KL to the uniform policy, where training starts.
    """
    generator = torch.Generator().manual_seed(seed)
    laws = bandit.laws()
    num_prompts, num_answers = laws.batch_shape
    laws = RewardDistribution(laws.levels, laws.values.flatten(0, 1))
    logits = torch.zeros(num_prompts, num_answers, dtype=torch.float64, requires_grad=True)
    critic = torch.zeros(num_prompts, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(batch, 1, dtype=torch.bool)
    for _ in range(steps):
        prompts = torch.multinomial(bandit.prompt_weights, batch, replacement=True, generator=generator)
        old = logits.detach().log_softmax(-1)[prompts]
        answers = torch.multinomial(old.exp(), 1, generator=generator)
        drawn = prompts * num_answers + answers.squeeze(-1)
        old_logprobs, old_values = old.gather(-1, answers), critic.detach()[prompts].unsqueeze(-1)
        rewards = token_rewards(worth_of(laws, drawn)[drawn], old_logprobs + math.log(num_answers), mask, kl_coef)
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, gae_lambda=1.0)
        advantages = centre_and_scale(advantages, mask)
        for _ in range(epochs):
            logprobs = logits.log_softmax(-1)[prompts].gather(-1, answers)
            policy = clipped_policy_loss(logprobs, old_logprobs, advantages, 0.2, mask=mask).loss
            value = clipped_value_loss(critic[prompts].unsqueeze(-1), old_values, returns, None, mask=mask).loss
            loss = global_token_mean(policy + value, mask, global_count=batch, world_size=1)
            steep, error = torch.autograd.grad(loss, [logits, critic])
            # Plain steps: an optimiser of torch takes longer to import than all bandits to run.
            with torch.no_grad():
                logits -= learning_rate * steep
                critic -= error
        yield logits.detach().softmax(-1)


def lagrangian(dual, objective, laws, population, ramp=1.0):
    """(n,) what each answer adds to it, put together as `rlhf.objective.learn_together` does."""
    pull, size = dual.pull(laws, population, ramp)
    return (objective + pull) / dual.size_beside(objective, size)
