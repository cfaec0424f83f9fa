"""Slow versions of the PPO maths: plain Python floats and loops, written from the papers and not from the package.

They take nested lists and return nested lists. Nothing here is vectorised, shared or clever, so that a mistake in the
package is unlikely to be repeated.
"""

import math
import threading
from collections.abc import Callable

from torch import Tensor


def gae(rewards, values, mask, gamma, gae_lambda):
    """Â_t = Σ_l (γλ)^l δ_{t+l}, the sum itself rather than its recursion, over the real tokens of each row.

    Schulman et al. 2015, sec. 3. After the last real token the value is 0.
    """
    advantages = [[0.0] * len(row) for row in rewards]
    returns = [[0.0] * len(row) for row in rewards]
    for b in range(len(rewards)):
        real = [t for t in range(len(mask[b])) if mask[b][t]]
        r = [rewards[b][t] for t in real]
        v = [values[b][t] for t in real] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(real))]
        for i, t in enumerate(real):
            advantage = sum((gamma * gae_lambda) ** k * delta[i + k] for k in range(len(real) - i))
            advantages[b][t] = advantage
            returns[b][t] = advantage + v[i]
    return advantages, returns


def token_rewards(utility, log_ratio, mask, kl_coef, estimator):
    """r_t = −β kl_t, plus the score on the final token. Ziegler et al. 2019, sec. 2."""
    rewards = [[0.0] * len(row) for row in log_ratio]
    for b in range(len(log_ratio)):
        last = None
        for t in range(len(log_ratio[b])):
            if mask[b][t]:
                rewards[b][t] = -kl_coef * kl(log_ratio[b][t], estimator)
                last = t
        if last is not None:
            rewards[b][last] += utility[b]
    return rewards


def kl(log_ratio, estimator):
    """Schulman 2020 with r = ref/π, so that log r = −log_ratio: k1 = −log r, k2 = (log r)²/2, k3 = (r − 1) − log r."""
    log_r = -log_ratio
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": math.exp(log_r) - 1 - log_r}[estimator]


def policy_loss(logprob, old_logprob, advantage, low, high, dual_clip=None):
    """Minus L^CLIP of one token (Schulman et al. 2017, eq. 7), with the floor c·Â of Ye et al. 2020 for Â < 0."""
    ratio = math.exp(logprob - old_logprob)
    limited = min(max(ratio, 1 - low), 1 + high)
    objective = min(ratio * advantage, limited * advantage)
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def value_loss(value, old_value, target, clip):
    """½ max of the squared errors of the value and of the value kept within `clip` of the old one."""
    if clip is None:
        return (value - target) ** 2 / 2
    near = old_value + min(max(value - old_value, -clip), clip)
    return max((value - target) ** 2, (near - target) ** 2) / 2


def log_softmax(logits, temperature):
    """log p_v = l_v/τ − log Σ exp(l_w/τ)."""
    scaled = [logit / temperature for logit in logits]
    top = max(scaled)
    total = math.log(math.fsum(math.exp(s - top) for s in scaled)) + top
    return [s - total for s in scaled]


def entropy(logits, temperature=1.0):
    """−Σ p log p, forbidden tokens contributing nothing."""
    logs = log_softmax(logits, temperature)
    return -math.fsum(math.exp(log) * log for log in logs if log > -math.inf)


def completion_mask(ids, stops):
    """Walks each row and drops everything behind the first stop token."""
    masks, finished = [], []
    for row in ids:
        keep, done = [], False
        for token in row:
            keep.append(not done)
            done = done or token in stops
        masks.append(keep)
        finished.append(done)
    return masks, finished


def on_ranks(function: Callable, shards: list) -> list:
    """Runs `function(shard, all_sum)` once per shard as if each were a rank, and returns the results in order.

    `all_sum` blocks until every rank has called it. A rank that calls it less often than another breaks the barrier
    after a few seconds and the test fails, where a real job would hang.
    """
    barrier = threading.Barrier(len(shards), timeout=10)
    slots: list[Tensor | None] = [None] * len(shards)
    results, failures = [None] * len(shards), []

    def run(rank: int) -> None:
        def all_sum(part: Tensor) -> Tensor:
            slots[rank] = part
            barrier.wait()
            total = sum(slots[1:], slots[0])
            barrier.wait()
            return total

        try:
            results[rank] = function(shards[rank], all_sum)
        except Exception as error:
            barrier.abort()
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
