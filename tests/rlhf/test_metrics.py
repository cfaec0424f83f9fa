"""Averages that do not depend on how the work was cut, and the tail summary of a rollout."""

import math

import pytest
import torch
from accelerate import Accelerator

from rlhf.masking import identity
from rlhf.metrics import MetricAverages, add_critic_metrics, score_summary


def test_average_weighs_tokens_not_batches():
    metrics = MetricAverages()
    metrics.add("loss", 1.0, 2)
    metrics.add("loss", 4.0, 10)
    # (1·2 + 4·10) / 12; the mean of the two means would be 2.5.
    assert metrics.read(Accelerator(cpu=True)) == {"loss": pytest.approx(3.5)}


def test_weight_zero_says_nothing_even_with_nan():
    metrics = MetricAverages()
    metrics.add("loss", math.nan, 0)
    metrics.add("loss", 2.0, 1)
    assert metrics.read(Accelerator(cpu=True)) == {"loss": 2.0}


def test_reading_starts_a_new_period():
    metrics, accelerator = MetricAverages(), Accelerator(cpu=True)
    metrics.add("a", torch.tensor(1.0))
    metrics.read(accelerator)
    assert metrics.read(accelerator) == {}
    metrics.add("a", 3.0)
    assert metrics.read(accelerator) == {"a": 3.0}


def test_tail_summary_by_hand():
    # Sorted -4, -1, 0, 5 at the levels 1/8, 3/8, 5/8, 7/8; below 1/8 the quantile function is flat at -4.
    summary = score_summary(torch.tensor([0.0, -4.0, 5.0, -1.0, math.nan]), threshold=-1.0)
    assert summary["reward/score_mean"] == 0
    assert summary["reward/score_min"] == -4
    assert summary["reward/score_std"] == pytest.approx(math.sqrt(42 / 4))
    assert summary["reward/score_q05"] == -4
    assert summary["reward/score_cvar_0.1"] == -4
    assert summary["reward/below_threshold_rate"] == 0.5


def test_summary_of_nothing_is_empty():
    assert score_summary(torch.tensor([math.nan, math.inf]), threshold=0.0) == {}
    assert "reward/below_threshold_rate" not in score_summary(torch.tensor([1.0]), threshold=None)


def critic_metrics(values, quantiles, returns, samples):
    metrics = MetricAverages()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    hidden = torch.tensor([[0.0, 0.0, math.nan], [0.0, math.nan, math.nan]])
    tensors = [torch.tensor(x) + hidden for x in (values, returns, samples)]
    if quantiles is not None:
        quantiles = torch.tensor(quantiles) + hidden.unsqueeze(-1)
    add_critic_metrics(metrics, tensors[0], quantiles, *tensors[1:], mask, all_sum=identity)
    return metrics.read(Accelerator(cpu=True))


VALUES = [[1.0, 2.0, 0.0], [2.0, 0.0, 0.0]]
SAMPLES = [[5.0, -1.0, 0.0], [3.0, 0.0, 0.0]]
LAMBDA_RETURNS = [[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]]


def test_critic_metrics_by_hand():
    zero = [0.0] * 5
    quantiles = [[[0.0, 0.0, 0.0, 0.0, 5.0], [4.0, 1.0, 2.0, 3.0, 0.0], zero], [[2.0] * 5, zero, zero]]
    found = critic_metrics(VALUES, quantiles, SAMPLES, SAMPLES)
    # Levels 0.1, 0.3, ..., 0.9, so the two quantiles are the lowest and the highest value:
    #   token  10 %  90 %  return
    #   1      0     5     5       at or below the upper one
    #   2      0     4     -1      below both
    #   3      2     2     3       above both
    assert found["critic/coverage_0.1"] == pytest.approx(1 / 3)
    assert found["critic/coverage_0.9"] == pytest.approx(2 / 3)
    # 4 > 1 and 3 > 0 are two of four pairs of the second token.
    assert found["critic/crossing_rate"] == pytest.approx(2 / 4 / 3)
    # Atoms of 0.1 at both ends, pieces of 0.2 between. Token 1: mean 1, E z² = 0.2 · 25/3 + 0.1 · 25 = 25/6.
    # Token 2: mean 2, variance 0.2 (2 · 2.25 + 2 · 0.25 + 4/12) + 0.1 · 2 · 4 = 28/15. Token 3: an atom.
    assert found["critic/spread"] == pytest.approx((math.sqrt(19 / 6) + math.sqrt(28 / 15)) / 3)


def test_explained_variance_of_targets_and_of_samples():
    found = critic_metrics(VALUES, None, LAMBDA_RETURNS, SAMPLES)
    # Targets 1, 2, 4 less values: 0, 0, 2 with variance 8/9, against 14/9.
    assert found["critic/explained_variance"] == pytest.approx(1 - 8 / 14)
    # Samples 5, -1, 3 less values: 4, -3, 1 with variance 26/3 - 4/9, against 35/3 - 49/9.
    assert found["critic/explained_variance_sampled"] == pytest.approx(1 - (26 / 3 - 4 / 9) / (35 / 3 - 49 / 9))
    assert found["critic/return_mean"] == pytest.approx(7 / 3)
    assert found["critic/return_std"] == pytest.approx(math.sqrt(14) / 3)
    assert not any("coverage" in name or "spread" in name for name in found)
