"""Experiment trackers that cannot be reached do not end a run."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

FAILURES_IN_A_ROW = 3
SETUP = ("on_init_end", "on_train_begin")


def guard_trackers(callbacks: Sequence[TrainerCallback]) -> None:
    """Let the trackers among the callbacks (W&B, TensorBoard, MLflow, ... of transformers) fail with one warning.

    The numbers go on to the console and to trainer_state.json. A tracker that fails while it is set up is left alone
    for the rest of the run, one that fails later after three failures in a row. Other callbacks are the user's own
    code: their errors stay errors.
    """
    for callback in callbacks:
        if any(kind.__module__.startswith("transformers.integrations") for kind in type(callback).__mro__):
            TrackerGuard(callback)


class TrackerGuard:
    """Stands between a trainer and one tracker.

    The callback's methods are replaced on the object itself, which stays of its class: trainers look callbacks up by
    their class.
    """

    def __init__(self, callback: TrainerCallback):
        self.name = type(callback).__name__
        self.warned, self.failures = False, 0
        for event in dir(TrainerCallback):
            # An inherited event does nothing, and would count as a success.
            if event.startswith("on_") and getattr(type(callback), event) is not getattr(TrainerCallback, event):
                setattr(callback, event, self._guarded(event, getattr(callback, event)))

    def _guarded(self, event: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.failures >= FAILURES_IN_A_ROW:
                return None
            try:
                result = method(*args, **kwargs)
            except Exception as error:
                self.failures = FAILURES_IN_A_ROW if event in SETUP else self.failures + 1
                self._warn(event, error)
                return None
            self.failures = 0
            return result

        return guarded

    def _warn(self, event: str, error: Exception) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{self.name} failed in {event} ({type(error).__name__}: {error}). Training goes on; its numbers are "
                "in the log and in trainer_state.json.",
                stacklevel=3,
            )
