"""Reward functions that raise, hang or answer nonsense."""

import asyncio
import threading
import time

import numpy as np
import pytest
import torch

import rlhf.reward_calls
from rlhf.reward_calls import RewardError, read_rewards
from rlhf.scoring import RewardFunctions

PROMPTS, COMPLETIONS = ["p", "q", "r"], ["a", "bb", "ccc"]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(rlhf.reward_calls, "FIRST_PAUSE", 0.02)


def call(functions, log_metric=None, **settings):
    columns = {} if log_metric is None else {"log_metric": log_metric}
    return RewardFunctions(functions, **settings)(PROMPTS, COMPLETIONS, [[1], [2], [3]], columns)[0].tolist()


class Faltering:
    """Fails so many times, then answers."""

    __name__ = "faltering"

    def __init__(self, failures):
        self.failures, self.times = failures, []

    def __call__(self, prompts, **columns):
        self.times.append(time.monotonic())
        if len(self.times) <= self.failures:
            raise ConnectionError("no route")
        return [1.0, 2.0, 3.0]


class FalteringAsync(Faltering):
    async def __call__(self, prompts, **columns):
        await asyncio.sleep(0)
        return Faltering.__call__(self, prompts)


@pytest.mark.parametrize("kind", [Faltering, FalteringAsync])
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_call_is_repeated_so_often_after_pauses_that_double(kind, timeout):
    function = kind(2)
    assert call([function], retries=2, timeout=timeout) == [1.0, 2.0, 3.0]
    first, second = np.diff(function.times)
    assert first >= 0.02
    assert second >= 0.04
    message = r"'faltering' failed 2 times \(ConnectionError: no route\)\. .*reward_retries"
    with pytest.raises(RewardError, match=message) as raised:
        call([kind(2)], retries=1, timeout=timeout)
    assert isinstance(raised.value.__cause__, ConnectionError)
    with pytest.raises(RewardError, match="failed at the first attempt"):
        call([kind(1)], timeout=timeout)


def test_a_function_that_hangs_is_left_behind_and_the_others_count():
    release = threading.Event()

    def hanging(prompts, **columns):
        release.wait()
        return [9.0] * 3

    def fine(prompts, **columns):
        return [1.0, 2.0, 3.0]

    with pytest.raises(RewardError, match=r"'hanging' failed 2 times \(TimeoutError: no answer within 0.05 s\)"):
        call([hanging, fine], timeout=0.05, retries=1)
    with pytest.warns(UserWarning, match="'hanging' failed at the first attempt .* are left out"):
        scores = call([hanging, fine], timeout=0.05, failed="exclude")
    # The other function's score alone would be a reward that nobody meant.
    assert all(score != score for score in scores)
    release.set()


def test_an_async_function_that_hangs_is_cancelled_and_one_that_blocks_is_left_behind():
    cancelled, release = threading.Event(), threading.Event()

    async def hanging(prompts, **columns):
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def blocking(prompts, **columns):
        release.wait()

    with pytest.raises(RewardError, match=r"'hanging' .*TimeoutError: no answer within 0.05 s"):
        call([hanging], timeout=0.05)
    assert cancelled.is_set()
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"'blocking' .*TimeoutError"):
        call([blocking], timeout=0.05)
    assert time.monotonic() - started < 30
    release.set()


def test_without_a_limit_functions_stay_on_the_callers_thread_and_with_one_in_its_mode():
    seen = []

    def spy(prompts, **columns):
        seen.append((threading.current_thread() is threading.main_thread(), torch.is_grad_enabled()))
        return [0.0] * 3

    with torch.no_grad():
        call([spy])
        call([spy], timeout=30.0)
    call([spy], timeout=30.0)
    assert seen == [(True, False), (False, False), (False, True)]


def test_functions_that_wait_for_other_ranks_are_called_once_and_here():
    function = Faltering(1)
    function.every_rank_together = True
    with pytest.raises(RewardError, match="failed at the first attempt"):
        call([function], retries=5, timeout=0.01)
    assert len(function.times) == 1


def test_only_the_accepted_attempt_logs():
    class Noisy(Faltering):
        def __call__(self, prompts, log_metric, **columns):
            log_metric("mine", 7.0)
            return super().__call__(prompts)

    logged = []
    call([Noisy(2)], lambda name, value, weight=1.0: logged.append((name, value, weight)), retries=2)
    assert logged == [("mine", 7.0, 1.0), ("reward/failed_share", 0.0, 1), ("reward/attempts", 3.0, 1)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned NoneType; it must return one number per completion"),
        ("abc", "returned str"),
        ({"a": 1, "b": 2, "c": 3}, "returned dict"),
        (1.5, "returned float"),
        ([1.0, 2.0], "returned 2 numbers for 3 completions"),
        # float("0.5") would be accepted without a word.
        ([1.0, "0.5", 2.0], "returned str '0.5' for completion 1"),
        ([1.0, 2.0, [3.0]], "returned list .* for completion 2"),
        ([1.0, 2j, 3.0], "returned complex"),
    ],
)
def test_an_answer_that_is_no_reward_is_named(answer, message):
    def answering(prompts, **columns):
        return answer

    with pytest.raises(RewardError, match=f"'answering' failed .*{message}"):
        call([answering])


def test_numbers_of_every_kind_are_rewards():
    scores, applies = read_rewards("f", [True, np.float32(0.5), torch.tensor(-2.0), None, float("nan"), 3], 6)
    assert scores[[0, 1, 2, 5]].tolist() == [1.0, 0.5, -2.0, 3.0]
    assert scores[3:5].isnan().all()
    assert applies.tolist() == [True, True, True, False, True, True]
    assert read_rewards("f", torch.tensor([1.0, 2.0]), 2)[0].tolist() == [1.0, 2.0]
