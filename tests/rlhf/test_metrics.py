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
    # Twenty scores at the levels 1/40, 3/40, 5/40, ...; below 1/40 the quantile function is flat at -4.
    scores = torch.tensor([0.0, -4.0, 5.0, -2.0, math.nan] + 16 * [1.0])
    summary = score_summary(scores, threshold=-2.0)
    assert summary["reward/score_mean"] == pytest.approx(15 / 20)
    assert summary["reward/score_min"] == -4
    assert summary["reward/score_std"] == pytest.approx(math.sqrt((16 + 25 + 4 + 16) / 20 - 0.75**2))
    assert summary["reward/score_q05"] == pytest.approx(-3)
    # Flat for 1/40, from -4 to -2 in 2/40, from -2 to -1 in the last 1/40 of the worst 4/40.
    assert summary["reward/score_cvar_0.1"] == pytest.approx((-4 * 1 - 3 * 2 - 1.5 * 1) / 4)
    assert summary["reward/below_threshold_rate"] == pytest.approx(0.1)


def test_summary_of_nothing_is_empty():
    assert score_summary(torch.tensor([math.nan, math.inf]), threshold=0.0) == {}
    assert "reward/below_threshold_rate" not in score_summary(torch.tensor([1.0]), threshold=None)


@pytest.mark.parametrize(
    ("count", "absent"),
    [
        (1, {"std", "q05", "cvar_0.1"}),
        (2, {"q05", "cvar_0.1"}),
        (5, {"q05", "cvar_0.1"}),
        (6, {"q05"}),
        (8, {"q05"}),
        (10, {"q05"}),
        (11, set()),
    ],
)
def test_what_few_scores_cannot_support_is_left_out(count, absent):
    # NaN is no score, and does not help.
    summary = score_summary(torch.tensor([*range(count), math.nan, math.nan]), threshold=0.0)
    names = {name.removeprefix("reward/score_") for name in summary}
    assert names == {"mean", "std", "min", "q05", "cvar_0.1", "reward/below_threshold_rate"} - absent
    # What is there says more than the minimum does.
    assert all(summary[f"reward/score_{name}"] > 0 for name in {"q05", "cvar_0.1"} - absent)


def test_critic_metrics_by_hand():
    metrics, mask = MetricAverages(), torch.tensor([[True, True, False], [True, False, False]])
    values = torch.tensor([[1.0, 2.0, math.nan], [2.0, math.nan, math.nan]])
    returns = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.nan, math.nan]])
    add_critic_metrics(metrics, values, returns, mask, all_sum=identity)
    found = metrics.read(Accelerator(cpu=True))
    # Targets 1, 2, 4 less values: 0, 0, 2 with variance 8/9, against 14/9.
    assert found["critic/explained_variance"] == pytest.approx(1 - 8 / 14)
    assert found["critic/return_mean"] == pytest.approx(7 / 3)
    assert found["critic/return_std"] == pytest.approx(math.sqrt(14) / 3)
