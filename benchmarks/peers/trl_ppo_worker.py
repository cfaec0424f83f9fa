"""Some PPO steps of TRL 1.12.0, in an environment of its own, measured phase by phase from outside.

    trl_ppo_worker.py TASK.json RESULT.json

`benchmarks/ppo_step.py` writes the task and reads the result. TRL is not edited: the functions of its module that do
the phases are replaced by themselves under a stopwatch. Its log-probabilities of the old policy come from the scores
that generation kept, so producing them counts as generation and picking them as "old_logprobs_and_values".
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from stopwatch import StepEnds, Stopwatch, peak_bytes
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)
from trl.experimental import ppo
from trl.experimental.ppo import ppo_trainer

PACKAGES = ("trl", "transformers", "accelerate", "torch")


class Phases:
    """TRL's functions under the stopwatch; `tokens` holds what was generated in each step."""

    def __init__(self, stopwatch: Stopwatch, reward_model: torch.nn.Module):
        self.stopwatch, self.reward_model = stopwatch, reward_model
        self.tokens: list[int] = []
        self._last_forward = ""
        self._originals = {
            name: getattr(ppo_trainer, name)
            for name in ("batch_generation", "forward", "selective_log_softmax", "get_reward")
        }
        for name in self._originals:
            setattr(ppo_trainer, name, getattr(self, name))

    def batch_generation(self, model: Any, queries: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with self.stopwatch.phase("generation"):
            sequences, logits = self._originals["batch_generation"](model, queries, *args, **kwargs)
        self.tokens.append(len(queries) * (sequences.shape[1] - queries.shape[1]))
        self._last_forward = "generation"
        return sequences, logits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self.stopwatch.background("update")
            return self._originals["forward"](*args, **kwargs)
        self._last_forward = "reference"
        with self.stopwatch.phase("reference"):
            return self._originals["forward"](*args, **kwargs)

    def selective_log_softmax(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return self._originals["selective_log_softmax"](*args, **kwargs)
        # Called twice for each batch of the rollout: on the scores of generation, then on those of the reference.
        name = "reference" if self._last_forward == "reference" else "old_logprobs_and_values"
        self._last_forward = ""
        with self.stopwatch.phase(name):
            return self._originals["selective_log_softmax"](*args, **kwargs)

    def get_reward(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = "scoring" if model is self.reward_model else "old_logprobs_and_values"
        with self.stopwatch.phase(name):
            return self._originals["get_reward"](model, *args, **kwargs)


def main(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(task["threads"])
    set_seed(task["settings"]["seed"])
    tokenizer = AutoTokenizer.from_pretrained(task["policy"], padding_side="left", pad_token=task["pad_token"])
    dtype = getattr(torch, task["dtype"])
    policy = AutoModelForCausalLM.from_pretrained(task["policy"], dtype=dtype)
    classifiers = [
        AutoModelForSequenceClassification.from_pretrained(task["reward"], num_labels=1, dtype=dtype) for _ in range(2)
    ]
    value_model, reward_model = classifiers
    stopwatch = Stopwatch(task["device"], task["counted_step"])
    phases, ends = Phases(stopwatch, reward_model), StepEnds(stopwatch)
    trainer = ppo.PPOTrainer(
        args=ppo.PPOConfig(**task["settings"]),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,  # a copy of the policy
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(task["prompts"])["input_ids"]}),
        callbacks=[ends],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    return {
        "steps": stopwatch.steps,
        "arithmetic": stopwatch.arithmetic,
        "tokens": phases.tokens,
        "peak_bytes": peak_bytes(task["device"]),
        "setup_bytes": ends.setup_bytes,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "log": {"value_loss": [entry["loss/value_avg"] for entry in logs]},
        "versions": {package: version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
