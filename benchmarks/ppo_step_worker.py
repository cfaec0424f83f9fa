"""Some PPO steps of this toolkit, in a process of their own, measured phase by phase from outside.

    ppo_step_worker.py TASK.json RESULT.json

`benchmarks/ppo_step.py` writes the task and reads the result. The trainer is not changed: the methods that do the
phases are replaced, on this one trainer, by themselves under the stopwatch.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import versions
from peers.stopwatch import StepEnds, Stopwatch, peak_bytes
from peft import LoraConfig
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from rlhf import decoding
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


class EndsAt(LogitsProcessor):
    """Lets each prompt's completion end where it is told: the stop token is certain there, and nowhere before.

    Rows leave the batch while it is decoded, so they are known by their prompt, not by their place.

    Args:
        lengths: of the first batch's rows in order; every batch has as many rows.
        stop_token_id: the token.
    """

    def __init__(self, lengths: list[int], stop_token_id: int):
        self.lengths, self.stop_token_id = lengths, stop_token_id
        self.wanted: dict[tuple[int, ...], int] = {}
        self.prompt_length = 0

    def begin(self, prompt_ids: Tensor) -> None:
        """A batch of prompts (B, P) is about to be completed."""
        self.prompt_length = prompt_ids.shape[1]
        self.wanted = dict(zip(map(tuple, prompt_ids.tolist()), self.lengths, strict=True))
        if len(self.wanted) != len(self.lengths):
            raise ValueError("a batch has the same prompt twice: its rows cannot be told apart")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        prompts = map(tuple, input_ids[:, : self.prompt_length].tolist())
        drawn = input_ids.shape[1] - self.prompt_length
        last = torch.tensor([self.wanted[prompt] == drawn + 1 for prompt in prompts], device=scores.device)
        scores[:, self.stop_token_id] = -torch.inf
        scores[last] = -torch.inf
        scores[last, self.stop_token_id] = 0.0
        return scores


def end_at(lengths: list[int], stop_token_id: int) -> None:
    """From here on completions of a rollout have these lengths.

    The first rollout, which is not timed, keeps its rows to the end. Other rows in a batch move a few draws of 1,000
    by rounding, and the first gradients of two runs are compared on the same completions.
    """
    generate, ends = ActorCritic.generate, EndsAt(lengths, stop_token_id)
    decoding.ROW_WISE += (EndsAt,)

    def with_ends(module: ActorCritic, **inputs: Any) -> Tensor:
        if not ends.wanted:
            inputs["custom_generate"].drop_ended = False
        ends.begin(inputs["input_ids"])
        return generate(module, logits_processor=LogitsProcessorList([ends]), **inputs)

    ActorCritic.generate = with_ends


def main(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(task["threads"])
    stopwatch, tokens = Stopwatch(task["device"], task["counted_step"]), []
    ends = StepEnds(stopwatch)
    reward = RiskReward(task["reward"], **task["reward_settings"])
    trainer = PPOTrainer(
        model=task["policy"],
        reward_funcs=TimedReward(reward, stopwatch) if task.get("time_risk") else reward,
        args=PPOConfig(**task["settings"]),
        train_dataset=Dataset.from_dict({"prompt": task["prompts"]}),
        callbacks=[ends],
        peft_config=LoraConfig(task_type="CAUSAL_LM", **task["lora"]) if task.get("lora") else None,
    )
    if task.get("lengths"):
        end_at(task["lengths"], trainer.stop_token_ids[0])
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
