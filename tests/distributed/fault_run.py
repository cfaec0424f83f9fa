"""Faults on one of two ranks, one training run after the other; each rank writes down what became of it.

    fault_run.py OUTPUT_DIR FAULT ...

Started by the tests with `accelerate launch`.
"""

import hashlib
import json
import math
import os
import sys
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from tiny import count_good, logged, tiny_trainer
from transformers import TrainerCallback

from reward.distribution import RewardDistribution
from reward.sources import DistributionSource
from rlhf.nonfinite import NonFiniteError
from rlhf.reward_calls import RewardError
from rlhf.reward_function import RiskReward

RANK = int(os.environ["RANK"])
EMPTY = {"suppress_tokens": [i for i in range(18) if i != 1]}


class LawsByRank(DistributionSource):
    """Ratings near -3 for the answers of rank 0, near 3 for those of rank 1."""

    name, attribute_names, telemetry = "laws by rank", (), {}
    levels = torch.tensor([0.1, 0.5, 0.9])

    def distribution(self, prompts, completions):
        centre = torch.tensor([-3.0, 3.0][RANK])
        lengths = torch.tensor([float(len(text)) for text in completions])
        values = centre + 0.01 * lengths.unsqueeze(1) + torch.tensor([-0.5, 0.0, 0.5])
        return RewardDistribution(self.levels, values)

    def prepare(self, accelerator):
        """There is no model to place."""


def failing(prompts, completions, **columns):
    """Fails on rank 1 from the second rollout on."""
    failing.calls += 1
    if RANK == 1 and failing.calls > 1:
        raise ConnectionError("503")
    return count_good(prompts, completions)


def too_large(prompts, completions, **columns):
    """A reward on rank 1 whose square is no float, in every rollout."""
    rewards = count_good(prompts, completions)
    return [1e30] * len(rewards) if RANK == 1 else rewards


def settings_of(fault: str) -> dict:
    """What a trainer with this fault is built with."""
    if fault == "empty":
        # One-token completions on rank 1, none of whose ratings lies in the tail either.
        measure = RiskReward(LawsByRank(), "cvar:0.3", scope="population", constraints=["below:0 <= 0.2"])
        return {"reward": measure, "generation_kwargs": EMPTY if RANK == 1 else {}}
    if fault in ("exclude", "raise"):
        failing.calls = 0
        return {"reward": failing, "failed_rewards": fault}
    return {"reward": too_large, "max_skipped_updates": 1}


def digest(trainer) -> str:
    """The same for the same weights."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    parts = [tensor.float().cpu().numpy().tobytes() for _, tensor in sorted((weights or {}).items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Start(TrainerCallback):
    """The weights before the first step; DeepSpeed has them once training begins."""

    def __init__(self, trainer):
        self.trainer, self.weights = trainer, None

    def on_train_begin(self, *args, **kwargs):
        self.weights = digest(self.trainer)


def train(output: Path, fault: str) -> dict:
    """One run and what this rank saw of it."""
    trainer = tiny_trainer(
        output / fault,
        model=str(output.parent / "policy"),  # ZeRO-3 loads the reference from where the policy came
        **{"gradient_accumulation_steps": 1, "num_ppo_epochs": 1, "max_steps": 3} | settings_of(fault),
    )
    start = Start(trainer)
    trainer.add_callback(start)
    stopped = None
    try:
        trainer.train()
    except (RewardError, NonFiniteError) as error:
        stopped = str(error)
    after = digest(trainer)
    names = ("update/skipped_share", "reward/failed_share", "completion/length_mean", "constraint/below:0/value")
    return {
        "stopped": stopped,
        "step": trainer.state.global_step,
        "same": start.weights == after,
        "weights": after,
        "finite": all(math.isfinite(value) for value in logged(trainer, "loss")),
        "kind": str(trainer.accelerator.distributed_type.value),
        "zero_stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
        **{name: logged(trainer, name) for name in names},
    }


def main(output: Path, faults: list[str]) -> None:
    warnings.simplefilter("ignore")
    seen = {fault: train(output, fault) for fault in faults}
    state = PartialState()
    output.mkdir(parents=True, exist_ok=True)
    (output / f"rank_{state.process_index}.json").write_text(json.dumps(seen))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
