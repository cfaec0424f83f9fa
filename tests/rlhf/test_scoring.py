"""Reward functions of every kind, and what happens to scores that cannot be used."""

import asyncio
import itertools
import math

import pytest
import torch
from tiny import tiny_config

from rlhf.metrics import MetricAverages
from rlhf.reward_calls import RewardError
from rlhf.scoring import RewardFunctions, above_siblings, normalized_scores, shape_scores

PROMPTS, COMPLETIONS = ["p", "q", "r"], ["a", "bb", "ccc"]


def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def only_first(prompts, completions, **columns):
    return [10.0, None, None]


async def later(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [1.0, 2.0, 3.0]


def call(functions, **kwargs):
    return RewardFunctions(functions, **kwargs)(PROMPTS, COMPLETIONS, [[1], [2], [3]], {})


def test_scores_are_the_weighted_sum_of_the_functions_that_apply():
    scores, by_function = call([length, only_first], weights=[2.0, 0.5])
    assert scores.tolist() == [2.0 * 1 + 0.5 * 10, 4.0, 6.0]
    assert by_function["length"].tolist() == [1.0, 2.0, 3.0]
    assert by_function["only_first"].isnan().tolist() == [False, True, True]


def test_none_from_every_function_is_no_score_but_nan_is_a_failure():
    scores, _ = call([only_first])
    assert scores[0] == 10
    assert scores[1:].isnan().all()

    def failing(prompts, completions, **columns):
        return [math.nan, 1.0, math.inf]

    scores, _ = call([length, failing])
    # The NaN must not be mistaken for "does not apply", which would leave the other function's score.
    assert scores[0].isnan()
    assert scores.tolist()[1:] == [3.0, math.inf]


def test_async_functions_run_beside_sync_ones_even_inside_an_event_loop():
    assert call([length, later])[0].tolist() == [2.0, 4.0, 6.0]

    async def notebook():
        return call([later])[0].tolist()

    assert asyncio.run(notebook()) == [1.0, 2.0, 3.0]


def test_functions_receive_ids_and_columns():
    def spy(prompts, completions, completion_ids, tag, **columns):
        assert (completion_ids, tag) == ([[1], [2], [3]], ["x", "y", "z"])
        return [0.0] * 3

    RewardFunctions(spy)(PROMPTS, COMPLETIONS, [[1], [2], [3]], {"tag": ["x", "y", "z"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"functions": []}, "reward_funcs is empty"),
        ({"functions": [length], "weights": [1.0, 1.0]}, "reward_weights has 2 entries for 1 reward functions"),
        ({"functions": [length], "tokenizers": [None, None]}, "reward_processing_classes has 2 entries"),
    ],
)
def test_wrong_counts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardFunctions(**arguments)


def test_function_with_the_wrong_number_of_rewards_is_named():
    def short(prompts, completions, **columns):
        return [1.0]

    with pytest.raises(RewardError, match=r"'short' failed .* short returned 1 numbers for 3 completions"):
        call([short])


def shaped(tmp_path, scores, finished, **settings):
    metrics = MetricAverages()
    args = tiny_config(tmp_path, **settings)
    shaped = shape_scores(torch.tensor(scores), torch.tensor(finished), list("pqr")[: len(scores)], args, metrics)
    return shaped.tolist(), dict(metrics._sums)


def test_missing_end_is_subtracted_or_replaced_never_multiplied(tmp_path):
    scores, finished = [2.0, -3.0, 1.0], [True, False, False]
    assert shaped(tmp_path, scores, finished)[0] == scores
    assert shaped(tmp_path, scores, finished, missing_eos_penalty=1.5)[0] == [2.0, -4.5, -0.5]
    assert shaped(tmp_path, scores, finished, missing_eos_penalty=1.0, missing_eos_mode="replace")[0] == [2, -1, -1]


def test_failed_reward_stays_failed_when_the_end_is_missing(tmp_path):
    settings = {"missing_eos_penalty": 1.0, "missing_eos_mode": "replace"}
    with pytest.warns(UserWarning, match="1 of 2 rewards"):
        scores, _ = shaped(tmp_path, [math.nan, 1.0], [False, False], **settings)
    assert math.isnan(scores[0])
    assert scores[1] == -1


def test_clip_is_counted(tmp_path):
    with pytest.warns(UserWarning, match="cut 1 of 3 scores at -1, the lowest of -5: the tail .* is hidden"):
        scores, sums = shaped(tmp_path, [-5.0, 0.5, 9.0], [True] * 3, reward_clip_range=[-1.0, 10.0])
    assert scores == [-1.0, 0.5, 9.0]
    total, weight = sums["reward/clipped_share"]
    assert total / weight == pytest.approx(1 / 3)


def test_clip_above_the_tail_warns_of_nothing(tmp_path):
    scores, _ = shaped(tmp_path, [-5.0, 0.5, 9.0], [True] * 3, reward_clip_range=[-10.0, 1.0])
    assert scores == [-5.0, 0.5, 1.0]


def test_nonfinite_rewards_name_their_prompt(tmp_path):
    with pytest.raises(RewardError, match="1 of 3 rewards are NaN or infinite, the first for prompt 'q'"):
        shaped(tmp_path, [0.0, -math.inf, 1.0], [True] * 3, nonfinite_rewards="raise")


def test_normalized_scores_by_hand():
    def alone(total):
        return total

    # Mean 1, mean square 5: variance 4. The failed one neither counts nor changes.
    scores, moments = normalized_scores(torch.tensor([-1.0, 3.0, math.nan]), [0.0, 0.0, 0.0], alone, decay=0.5)
    assert scores[:2].tolist() == [-1.0, 1.0]
    assert scores[2].isnan()
    assert moments == [1.0, 1.0, 5.0]
    # Weights 0.5 and 1: mean (0.5 * 1 + 4) / 1.5 = 3, mean square (0.5 * 5 + 20) / 1.5 = 15, variance 6.
    scores, moments = normalized_scores(torch.tensor([2.0, 6.0]), moments, alone, decay=0.5)
    assert moments == [1.5, 4.5, 22.5]
    assert scores.tolist() == pytest.approx([-1 / math.sqrt(6), 3 / math.sqrt(6)])
    # Nothing but failures: nothing is learnt.
    failed, same = normalized_scores(torch.tensor([math.nan]), moments, alone, decay=0.5)
    assert same == moments
    assert failed.isnan().all()


def test_equal_scores_are_only_shifted():
    scores, moments = normalized_scores(torch.tensor([0.1, 0.1]), [0.0] * 3, lambda total: total)
    assert scores.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    scores, _ = normalized_scores(torch.tensor([0.1, 0.1]), moments, lambda total: total)
    assert scores.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    scores, _ = normalized_scores(torch.tensor([math.nan]), [0.0] * 3, lambda total: total)
    assert scores.isnan().all()


def test_scores_above_siblings_by_hand():
    scores = torch.tensor([1.0, 10.0, 2.0, math.nan, 4.0, 7.0])
    prompts = torch.tensor([5, 9, 5, 9, 5, 2])
    # Prompt 5: 1 - (2 + 4)/2, 2 - (1 + 4)/2, 4 - (1 + 2)/2. The sibling of 10 failed, 7 never had one: all others.
    expected = [-2.0, 10 - 14 / 4, -0.5, math.nan, 2.5, 7 - 17 / 4]
    assert above_siblings(scores, prompts).tolist() == pytest.approx(expected, nan_ok=True)
    single = above_siblings(torch.tensor([3.0, math.nan]), torch.tensor([1, 2]))
    assert single[0] == 3.0
    assert single[1].isnan()


def test_siblings_keep_the_expected_gradient_and_take_the_prompts_part_of_its_noise():
    """Every outcome of two prompts with two completions each, of a softmax policy over three answers, in float64."""
    logits = torch.tensor([0.3, -0.9, 0.5], dtype=torch.float64)
    scores = torch.tensor([[5.0, 5.5, 4.0], [-5.0, -4.0, -5.5]], dtype=torch.float64)  # prompts differ, answers little
    pi = logits.softmax(0)
    exact = (pi * (scores - (scores @ pi).unsqueeze(1))).sum(0) / 2  # of the mean score over both prompts

    def moments(baseline):
        mean, square = torch.zeros(3, dtype=torch.float64), 0.0
        for drawn in itertools.product(range(3), repeat=4):
            probability = pi[list(drawn)].prod()
            found = scores[[0, 0, 1, 1], list(drawn)]
            if baseline:
                found = above_siblings(found, torch.tensor([0, 0, 1, 1]))
            gradient = (found.unsqueeze(1) * (torch.eye(3, dtype=torch.float64)[list(drawn)] - pi)).mean(0)
            mean, square = mean + probability * gradient, square + probability * gradient.square().sum()
        return mean, square - mean.square().sum()

    plain, with_siblings = moments(False), moments(True)
    torch.testing.assert_close(plain[0], exact)
    torch.testing.assert_close(with_siblings[0], exact)
    assert with_siblings[1] < 0.1 * plain[1]
