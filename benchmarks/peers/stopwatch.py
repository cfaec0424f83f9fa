"""Seconds and arithmetic per phase of a training step: one instrument for every trainer that is compared.

Imports neither the toolkit nor a peer, because it runs in the environments of both.
"""

import functools
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

REST = "rest"


class Stopwatch:
    """Time between two ends of optimiser steps, divided over phases that never overlap.

    A phase inside another is taken out of the outer one, so the phases of a step add up to the step. Whatever happens
    outside every named phase counts for the background phase, which is "rest" until `background` names another.

    Args:
        device: "cpu" or "cuda"; a GPU is waited for at every border of a phase.
        counted_step: number of the step, from 0, whose arithmetic is counted. Counting slows it down, so its
            seconds are not for reporting.
    """

    def __init__(self, device: str, counted_step: int | None = None):
        self.device, self.counted_step = device, counted_step
        self.steps: list[dict[str, float]] = []
        self.arithmetic: dict[str, float] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._operations: dict[str, float] = defaultdict(float)
        self._counter: FlopCounterMode | None = None
        self._counted = 0.0
        self._open: list[str] = []
        self._background = REST
        self._last: float | None = None

    def start(self) -> None:
        """Begin the first step."""
        self._charge()
        self._seconds.clear()
        self._count_if_due()

    def end_step(self) -> None:
        """The step is complete; the next one begins."""
        self._charge()
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter, self.arithmetic = None, dict(self._operations)
        self.steps.append(dict(self._seconds))
        self._seconds.clear()
        self._background = REST
        self._count_if_due()

    def background(self, name: str) -> None:
        """From here to the end of the step, time outside all phases belongs to `name`."""
        if name != self._background:
            self._charge()
            self._background = name

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted for the phase."""

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return measured

    def _charge(self) -> None:
        """Book everything since the last border for the phase that was open."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        name = self._open[-1] if self._open else self._background
        if self._last is not None:
            self._seconds[name] += now - self._last
        self._last = now
        if self._counter is not None:
            total = float(self._counter.get_total_flops())
            self._operations[name] += total - self._counted
            self._counted = total

    def _count_if_due(self) -> None:
        if len(self.steps) == self.counted_step:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()


def peak_bytes(device: str) -> int:
    """Most memory that this process ever held: resident on a CPU, allocated by torch on a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():
        # ru_maxrss of a child starts at what its parent held when it forked; VmHWM belongs to this program alone.
        lines = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(lines[0][1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StepEnds(TrainerCallback):
    """Tells the stopwatch where a step ends."""

    def __init__(self, stopwatch: Stopwatch):
        self.stopwatch, self.setup_bytes = stopwatch, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.setup_bytes = peak_bytes(self.stopwatch.device)
        self.stopwatch.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.stopwatch.end_step()
