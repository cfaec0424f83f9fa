"""Calls of reward functions that may raise, hang or answer with something else than rewards."""

import asyncio
import contextvars
import inspect
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from rlhf.metrics import gather_objects

FIRST_PAUSE = 1.0
"""Seconds before the first repetition; each further pause is twice as long, up to `LONGEST_PAUSE`."""
LONGEST_PAUSE = 60.0


class RewardError(RuntimeError):
    """Rewards that cannot be used; raised on every rank with the same message."""


class RewardCall:
    """One reward function, called for the completions of one process until it answers or is given up.

    Telemetry of an attempt counts once its answer is accepted: a function that was given up may still be running.

    Args:
        function: sync or async, in TRL's form.
        name: for messages.
        arguments: what it is called with, by keyword.
        expected: number of completions.
        retries: repetitions after a failure.

    Attributes:
        scores: (N,) float64; NaN where the function failed or does not apply.
        applies: (N,) False where the function answered None.
        attempts: calls so far.
        error: of the last attempt, if it failed.
    """

    def __init__(self, function: Callable, name: str, arguments: dict[str, Any], expected: int, retries: int):
        self.function, self.name, self.arguments, self.expected = function, name, arguments, expected
        # A repetition on one rank alone would wait for ranks that do not repeat.
        self.together = getattr(function, "every_rank_together", False)
        self.allowed = 1 if self.together else 1 + retries
        self.scores, self.applies = torch.full((expected,), math.nan), torch.ones(expected, dtype=torch.bool)
        self.attempts, self.error, self.answered, self.given_up = 0, None, False, False
        self._notes: list[tuple] = []

    @property
    def failure(self) -> str | None:
        """What went wrong, in one line; None if the function answered."""
        if self.error is None:
            return None
        times = "at the first attempt" if self.attempts == 1 else f"{self.attempts} times"
        return f"reward function '{self.name}' failed {times} ({type(self.error).__name__}: {self.error})"

    def start(self) -> Any:
        """Call the function once more; its rewards, or something to await."""
        self.attempts += 1
        self._notes = notes = []
        arguments = self.arguments
        if "log_metric" in arguments:
            arguments = arguments | {"log_metric": lambda *given, **named: notes.append((given, named))}
        return self.function(**arguments)

    def accept(self, result: Any) -> None:
        """Take the answer.

        Raises:
            ValueError: it is not one number or None for each completion.
            TypeError: the same.
        """
        scores, applies = read_rewards(self.name, result, self.expected)
        if self.given_up:
            return
        self.scores, self.applies, self.error, self.answered = scores, applies, None, True
        for given, named in self._notes:
            self.arguments["log_metric"](*given, **named)

    def pause(self) -> float | None:
        """Seconds until the next attempt, None after the last."""
        if self.attempts >= self.allowed:
            return None
        return min(FIRST_PAUSE * 2 ** (self.attempts - 1), LONGEST_PAUSE)

    def longest(self, timeout: float) -> float:
        """Seconds that all attempts and pauses may take together."""
        pauses = sum(min(FIRST_PAUSE * 2**i, LONGEST_PAUSE) for i in range(self.allowed - 1))
        return self.allowed * timeout + pauses


def call_functions(calls: Sequence[RewardCall], timeout: float | None) -> None:
    """Run all calls to their end; a failed one keeps its error, and the others still run.

    Without a time limit sync functions run here, on the caller's thread. With one, each runs in a thread of its own,
    which Python cannot end: a function that hangs is left behind, and keeps what it holds until the process ends.
    Async functions run beside each other and are cancelled. Functions that wait for other ranks know no limit.
    """
    awaitables = [(call, result) for call in calls if (result := _call(call, timeout)) is not None]
    if not awaitables:
        return

    async def settle_all() -> None:
        await asyncio.gather(*(_settle(call, result, timeout) for call, result in awaitables))

    # A coroutine that blocks its loop cannot be cancelled either; after this time it is left behind with the loop.
    limit = None if timeout is None else max(call.longest(timeout) for call, _ in awaitables) + timeout
    try:
        # A thread of its own, because notebooks already run an event loop in this one.
        _in_thread(lambda: asyncio.run(settle_all()), limit)
    except TimeoutError as error:
        for call, _ in awaitables:
            call.given_up = True
            if not call.answered:
                call.error = call.error or error


def _call(call: RewardCall, timeout: float | None) -> Any:
    """Attempts of a sync function; what is to be awaited of an async one."""
    function = call.function
    asynchronous = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    direct = timeout is None or call.together or asynchronous
    while True:
        try:
            result = call.start() if direct else _in_thread(call.start, timeout)
            if inspect.isawaitable(result):
                return result
            call.accept(result)
            return None
        except Exception as error:
            call.error = error
        pause = call.pause()
        if pause is None:
            return None
        time.sleep(pause)


async def _settle(call: RewardCall, result: Any, timeout: float | None) -> None:
    while True:
        try:
            call.accept(await asyncio.wait_for(result, None if call.together else timeout))
            return
        except TimeoutError as error:
            call.error = TimeoutError(str(error) or f"no answer within {timeout:g} s")
        except Exception as error:
            call.error = error
        while True:
            pause = call.pause()
            if pause is None:
                return
            await asyncio.sleep(pause)
            try:
                result = call.start()
                break
            except Exception as error:
                call.error = error


def _in_thread(work: Callable[[], Any], timeout: float | None) -> Any:
    """The result of `work`, which runs under this thread's gradient mode, device and context variables."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    context, with_gradient = contextvars.copy_context(), torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            with torch.set_grad_enabled(with_gradient):
                answers.put((context.run(work), None))
        except BaseException as error:
            answers.put((None, error))

    # Not of an executor: those are waited for when the interpreter ends, and this one may never end.
    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = answers.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout:g} s") from None
    if error is not None:
        raise error
    return result


def read_rewards(name: str, result: Any, expected: int) -> tuple[Tensor, Tensor]:
    """The answer of a reward function or a judge: (N,) float64 scores, NaN for None, and (N,) whether it gave one.

    Raises:
        ValueError: another number of rewards than of completions.
        TypeError: no sequence, or a reward that is no number. Text is none, even where it could be read as one.
    """
    advice = "it must return one number per completion, None where it does not apply"
    if result is None or isinstance(result, str | bytes | dict) or not hasattr(result, "__len__"):
        raise TypeError(f"{name} returned {type(result).__name__}; {advice}.")
    if len(result) != expected:
        raise ValueError(f"{name} returned {len(result)} numbers for {expected} completions; {advice}.")
    scores = []
    for position, reward in enumerate(result):
        if reward is not None and not hasattr(reward, "__float__") and not hasattr(reward, "__index__"):
            kind = f"{type(reward).__name__} {reward!r:.60}"
            raise TypeError(f"{name} returned {kind} for completion {position}; {advice}.")
        # None says "does not apply"; a NaN is a failure and must stay visible in the sum.
        scores.append(math.nan if reward is None else float(reward))
    applies = torch.tensor([reward is not None for reward in result], dtype=torch.bool)
    return torch.tensor(scores, dtype=torch.float64), applies


def failures_of_all_ranks(failures: list[str]) -> list[str]:
    """Every rank's failures, on every rank, with the rank they come from. Every rank must call it."""
    process = PartialState()
    ranks = gather_objects(failures, process)
    if process.num_processes == 1:
        return failures
    return [f"{failure} on rank {rank}" for rank, of_rank in enumerate(ranks) for failure in of_rank]
