"""What is saved before a fault ends a run."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.metrics import gather_objects
from rlhf.reward_calls import RewardError


@contextmanager
def state_rescued(trainer: Any) -> Iterator[None]:
    """Rewards are collected inside; if they end the run, a checkpoint of the last finished step is written first.

    Random states, those of the reward functions and the averages for the next log are put back to where that step
    left them, so the resumed run samples and logs what this one would have. Every rank fails together, because the
    reward functions agree on it.
    """
    randomness, rewards = _random_states(), trainer.reward_functions.state_dict()
    averages = trainer._train_metrics.state_dict()
    try:
        yield
    except RewardError:
        _restore(randomness)
        trainer.reward_functions.load_state_dict(rewards)
        trainer._train_metrics.load_state_dict(averages)
        if trainer.is_in_train:
            save_last_step(trainer)
        raise


def save_last_step(trainer: Any) -> None:
    """A checkpoint of the last finished optimiser step, unless there is one; every rank must call it."""
    step = trainer.state.global_step
    folder = Path(trainer.args.output_dir, f"checkpoint-{step}")
    # A rank that looks later would find what another has begun to write.
    written = any(gather_objects(folder.exists(), trainer.accelerator))
    if step == 0 or written:
        return
    try:
        trainer._save_checkpoint(trainer.model, trial=None)
    except OSError as error:
        warnings.warn(f"no checkpoint of step {step} could be written: {error}", stacklevel=2)


def _random_states() -> tuple:
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), device


def _restore(states: tuple) -> None:
    python, numpy, cpu, device = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if device is not None:
        torch.cuda.set_rng_state(device)
