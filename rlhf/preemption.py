"""SIGTERM, the way in which a cluster asks for its machine back: finish the step, write a checkpoint, leave."""

import ctypes
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# From <linux/prctl.h>: the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1
# 128 + SIGTERM: what a shell reports for a program that the signal ended.
EXIT_STATUS = 128 + signal.SIGTERM


class Preempted(SystemExit):
    """Training stopped because of SIGTERM, with a complete checkpoint; the process exits with status 143."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Preemption(TrainerCallback):
    """Watches for SIGTERM while training runs, as a context, and stops all ranks after the same step.

    The signal may reach one rank or all, once or often: it only leaves a note. After each optimiser step the ranks
    add up their notes, so that none writes a checkpoint, or leaves, without the others. The death of the launcher
    counts as SIGTERM too: with one rank `accelerate launch` dies of it without a word to the process below, which
    would go on with nobody to stop it.

    Args:
        accelerator: of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.stopping = False
        self._signalled = False
        self._previous: object = None

    def __enter__(self) -> Self:
        # Only the main thread may set a handler; in another one SIGTERM keeps its meaning.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._take_note)
            _signal_at_death_of_launcher(signal.SIGTERM)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._previous is not None:
            _signal_at_death_of_launcher(0)
            # A launcher sends another one to a rank that leaves a moment later; a handler in Python would be gone by
            # then, and the rank would end by the signal.
            signal.signal(signal.SIGTERM, signal.SIG_IGN if isinstance(error, Preempted) else self._previous)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if not self._signalled:
            # Not `print`, which a handler may interrupt in its own middle.
            os.write(2, b"SIGTERM: finishing the step, then writing a checkpoint.\n")
        self._signalled = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Agree on whether to stop. After the last step there is nothing to stop but the final save."""
        if self._any_rank_signalled() and state.global_step < state.max_steps:
            self.stopping = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """An epoch that was cut short has not ended: what belongs to its end happens in the resumed run."""
        if self.stopping and state.epoch != int(state.epoch):
            control.should_log = control.should_evaluate = control.should_save = False

    def _any_rank_signalled(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self._signalled
        note = torch.tensor(float(self._signalled), device=self.accelerator.device)
        return self.accelerator.reduce(note, reduction="sum").item() > 0


def _signal_at_death_of_launcher(number: int) -> None:
    """Ask Linux for this signal, or none, when `accelerate launch` dies; a shell that ends is not meant."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
