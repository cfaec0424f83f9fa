"""A reward function that ends a run costs no finished step."""

import threading

import pytest
import torch
from tiny import count_good, tiny_prompts, tiny_trainer

from rlhf.reward_calls import RewardError


class Outage:
    """A reward with a memory, whose second rollout (or evaluation) meets a service that is down."""

    __name__ = "outage"

    def __init__(self, down):
        self.down, self.calls = down, 0

    def __call__(self, prompts, completions, is_evaluation, **columns):
        self.calls += not is_evaluation
        if self.down == ("evaluation" if is_evaluation else self.calls):
            raise ConnectionError("503")
        return [reward + 0.1 * self.calls for reward in count_good(prompts, completions)]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Hang(Outage):
    """The same service, but down it answers nothing at all until the test is over."""

    def __init__(self, down):
        super().__init__(down)
        self.over = threading.Event()

    def __call__(self, prompts, completions, is_evaluation, **columns):
        try:
            return super().__call__(prompts, completions, is_evaluation, **columns)
        except ConnectionError:
            assert self.over.wait(120)
            return [0.0] * len(prompts)


SETTINGS = {"num_ppo_epochs": 2, "max_steps": 4, "lr_scheduler_type": "linear", "save_strategy": "no"}


def test_the_resumed_run_equals_one_without_the_outage(tmp_path):
    whole = tiny_trainer(tmp_path / "whole", reward=Outage(None), **SETTINGS)
    whole.train()
    broken = tiny_trainer(tmp_path / "broken", reward=Outage(2), **SETTINGS)
    with pytest.raises(RewardError, match=r"'outage' failed at the first attempt \(ConnectionError: 503\)"):
        broken.train()
    resume = {"resume_from_checkpoint": str(tmp_path / "broken" / "checkpoint-2")}
    resumed = tiny_trainer(tmp_path / "broken", reward=Outage(None), **resume, **SETTINGS)
    resumed.train(**resume)
    assert resumed.reward_functions.functions[0].calls == 2
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_reward_that_hangs_ends_the_run_after_its_checkpoint(tmp_path):
    hang, settings = Hang(2), SETTINGS | {"reward_timeout": 1.0}
    whole = tiny_trainer(tmp_path / "whole", reward=Outage(None), **SETTINGS)
    whole.train()
    trainer = tiny_trainer(tmp_path / "hang", reward=hang, **settings)
    with pytest.raises(RewardError, match=r"'outage' failed .* \(TimeoutError: no answer within 1 s\)"):
        trainer.train()
    hang.over.set()
    resume = {"resume_from_checkpoint": str(tmp_path / "hang" / "checkpoint-2")}
    resumed = tiny_trainer(tmp_path / "hang", reward=Outage(None), **resume, **settings)
    resumed.train(**resume)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_an_evaluation_that_fails_leaves_a_checkpoint_and_a_first_rollout_none(tmp_path):
    settings = SETTINGS | {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    held_out = tiny_prompts(1)
    trainer = tiny_trainer(tmp_path / "eval", reward=Outage("evaluation"), eval_dataset=held_out, **settings)
    with pytest.raises(RewardError, match="503"):
        trainer.train()
    assert (tmp_path / "eval" / "checkpoint-1" / "ppo_state.json").is_file()
    trainer = tiny_trainer(tmp_path / "first", reward=Outage(1), **SETTINGS)
    with pytest.raises(RewardError, match="503"):
        trainer.train()
    assert not list((tmp_path / "first").glob("checkpoint-*"))
