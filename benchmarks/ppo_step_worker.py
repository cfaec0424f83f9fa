"""Some PPO steps of this toolkit, in a process of their own, measured phase by phase from outside.

    ppo_step_worker.py TASK.json RESULT.json

`benchmarks/ppo_step.py` writes the task and reads the result. The trainer is not changed: the methods that do the
phases are replaced, on this one trainer, by themselves under the stopwatch.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import versions
from peers.stopwatch import StepEnds, Stopwatch, peak_bytes
from peft import LoraConfig
from torch import Tensor

from rlhf import trainer as trainer_module
from rlhf.config import PPOConfig
from rlhf.critic import ActorCritic
from rlhf.reward_function import RiskReward
from rlhf.trainer import PPOTrainer

PACKAGES = ("trl", "transformers", "accelerate", "torch", "peft")


class TimedReward:
    """A `RiskReward` whose time apart from its model's is the phase "risk"."""

    def __init__(self, reward: RiskReward, stopwatch: Stopwatch):
        self.reward, self.stopwatch, self.__name__ = reward, stopwatch, reward.__name__
        for name in ("distribution", "attribute_distributions"):
            setattr(reward.source, name, stopwatch.timed("scoring", getattr(reward.source, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reward, name)

    def __call__(self, *args: Any, **columns: Any) -> list[float]:
        with self.stopwatch.phase("risk"):
            return self.reward(*args, **columns)


def measure_phases(trainer: PPOTrainer, stopwatch: Stopwatch, tokens: list[int]) -> None:
    """Put the trainer's phases under the stopwatch, and note how many tokens each rollout holds."""
    sample, collect, forward = trainer._sample, trainer._collect, ActorCritic.forward

    def counted_sample(*args: Any, **kwargs: Any) -> Any:
        with stopwatch.phase("generation"):
            sampled = sample(*args, **kwargs)
        tokens.append(int(sampled[2].sum()))
        return sampled

    def collect_then_update(*args: Any, **kwargs: Any) -> Any:
        with stopwatch.phase("rest"):
            rollout = collect(*args, **kwargs)
        # Until the step ends, only forwards, backwards and the optimiser are left.
        stopwatch.background("update")
        return rollout

    def scored_forward(module: ActorCritic, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("with_values", True):
            return forward(module, *args, **kwargs)
        with stopwatch.phase("reference"):
            return forward(module, *args, **kwargs)

    trainer._sample, trainer._collect, ActorCritic.forward = counted_sample, collect_then_update, scored_forward
    trainer._score = stopwatch.timed("scoring", trainer._score)
    trainer.passes.collect = stopwatch.timed("old_logprobs_and_values", trainer.passes.collect)


def cut_to(lengths: list[int]) -> Callable[..., Any]:
    """`rlhf.rollout.generate` whose completions end where they are told, as if a stop token had come there."""
    generate = trainer_module.generate

    def cut(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask, finished = generate(*args, **kwargs)
        wanted = torch.tensor(lengths, device=ids.device)
        if len(wanted) != len(ids) or int(wanted.max()) > ids.shape[1]:
            raise ValueError(f"{len(wanted)} lengths up to {max(lengths)} for {tuple(ids.shape)} generated tokens")
        return ids, mask & (torch.arange(ids.shape[1], device=ids.device) < wanted[:, None]), torch.ones_like(finished)

    return cut


def main(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(task["threads"])
    stopwatch, tokens = Stopwatch(task["device"], task["counted_step"]), []
    ends = StepEnds(stopwatch)
    if task.get("lengths"):
        trainer_module.generate = cut_to(task["lengths"])
    reward = RiskReward(task["reward"], **task["reward_settings"])
    trainer = PPOTrainer(
        model=task["policy"],
        reward_funcs=TimedReward(reward, stopwatch) if task.get("time_risk") else reward,
        args=PPOConfig(**task["settings"]),
        train_dataset=Dataset.from_dict({"prompt": task["prompts"]}),
        callbacks=[ends],
        peft_config=LoraConfig(task_type="CAUSAL_LM", **task["lora"]) if task.get("lora") else None,
    )
    measure_phases(trainer, stopwatch, tokens)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "steps": stopwatch.steps,
        "arithmetic": stopwatch.arithmetic,
        "tokens": tokens,
        "peak_bytes": peak_bytes(task["device"]),
        "setup_bytes": ends.setup_bytes,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "log": {"grad_norm": [entry["grad_norm"] for entry in logs]},
        "versions": versions(*PACKAGES),
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
