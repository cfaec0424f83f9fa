"""Trackers that cannot be reached: one warning, and the run goes on with its numbers."""

import json

import pytest
from tiny import logged, tiny_trainer
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from rlhf.trackers import guard_trackers


class Unreachable(WandbCallback):
    """W&B's callback without its package, on a machine without a network."""

    def __init__(self):
        self.setups = 0

    def setup(self, *args, **kwargs):
        self.setups += 1
        raise ConnectionError("no route to host")

    def on_train_begin(self, *args, **kwargs):
        self.setup()


class Interrupted(TensorBoardCallback):
    """Writes until its disk is full."""

    def __init__(self):
        self.tb_writer, self.written = None, 0

    def on_train_begin(self, *args, **kwargs):
        """Nothing to open."""

    def on_log(self, args, state, control, **kwargs):
        self.written += 1
        if self.written >= 2:
            raise OSError(28, "No space left on device")

    def on_train_end(self, *args, **kwargs):
        raise AssertionError("asked again after three failures in a row")


def test_a_run_survives_its_trackers(tmp_path):
    unreachable, interrupted = Unreachable(), Interrupted()
    trainer = tiny_trainer(tmp_path, callbacks=[unreachable, interrupted], max_steps=6, num_ppo_epochs=3)
    with pytest.warns(UserWarning, match="Training goes on") as seen:
        trainer.train()
    messages = [str(warning.message) for warning in seen]
    assert len(messages) == 2
    assert messages[0].startswith("Unreachable failed in on_train_begin (ConnectionError: no route to host). Training")
    assert messages[1].startswith("Interrupted failed in on_log (OSError: [Errno 28] No space left on device)")
    assert unreachable.setups == 1
    assert interrupted.written == 4
    assert trainer.state.global_step == 6
    trainer.save_state()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "reward/score_mean" in entry]) == 2
    assert len(logged(trainer, "loss")) == 6
    # Trainers look callbacks up by class.
    assert trainer.pop_callback(Unreachable) is unreachable


def test_errors_of_other_callbacks_stay_errors_and_a_success_resets_the_count():
    class Own(TrainerCallback):
        def on_log(self, *args, **kwargs):
            raise KeyError("mine")

    class Faltering(WandbCallback):
        def __init__(self):
            self.calls = 0

        def on_log(self, *args, **kwargs):
            self.calls += 1
            if self.calls % 3:
                raise ConnectionError("no route")

    own, faltering = Own(), Faltering()
    guard_trackers([own, faltering])
    with pytest.raises(KeyError, match="mine"):
        own.on_log()
    with pytest.warns(UserWarning, match="Faltering failed in on_log"):
        faltering.on_log()
    for _ in range(11):
        faltering.on_log()
    assert faltering.calls == 12
