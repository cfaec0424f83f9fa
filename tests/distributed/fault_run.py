"""Faults on one of two ranks, one training run after the other; each rank writes down what became of it.

    fault_run.py OUTPUT_DIR [--by_layer] [--fsdp_on_cpu] FAULT ...

Started by the tests with `accelerate launch`.
"""

import hashlib
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from tiny import count_good, logged, tiny_trainer
from tiny_run import allow_fsdp_on_cpu
from transformers import TrainerCallback

from reward.distribution import RewardDistribution
from reward.sources import DistributionSource
from rlhf.leaving import end_of_rank
from rlhf.nonfinite import NonFiniteError
from rlhf.reward_calls import RewardError
from rlhf.reward_function import RiskReward

RANK = int(os.environ["RANK"])
TIMEOUT = 1.0
EMPTY = {"suppress_tokens": [i for i in range(18) if i != 1]}


class LawsByRank(DistributionSource):
    """Ratings near -3 for the answers of rank 0, near 3 for those of rank 1; they may fail on rank 1 later on."""

    name, attribute_names, telemetry = "laws by rank", (), {}
    levels = torch.tensor([0.1, 0.5, 0.9])

    def __init__(self, fails: bool):
        self.fails, self.calls = fails, 0

    def distribution(self, prompts, completions):
        self.calls += 1
        if self.fails and RANK == 1 and self.calls > 1:
            raise ConnectionError("503")
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


def slow(prompts, completions, **columns):
    """On rank 1 too late at the first attempt of the second rollout, and at every attempt of the third."""
    slow.calls += 1
    if RANK == 1 and slow.calls in (2, 4, 5):
        time.sleep(4 * TIMEOUT)
    return count_good(prompts, completions)


def too_large(prompts, completions, **columns):
    """A reward on rank 1 whose square is no float, in every rollout."""
    rewards = count_good(prompts, completions)
    return [1e30] * len(rewards) if RANK == 1 else rewards


def settings_of(fault: str) -> dict:
    """What a trainer with this fault is built with."""
    if fault == "empty":
        # Nothing but a stop token on rank 1, which is done while rank 0 still decodes.
        return {"reward": count_good, "generation_kwargs": EMPTY if RANK == 1 else {}}
    if fault in ("no_tail", "model"):
        # No rating of rank 1 lies in the tail.
        source = LawsByRank(fails=fault == "model")
        return {"reward": RiskReward(source, "cvar:0.3", scope="population", constraints=["below:0 <= 0.2"])}
    if fault == "gradient":
        return {"reward": count_good}
    if fault == "slow":
        slow.calls = 0
        return {"reward": slow, "reward_timeout": TIMEOUT, "reward_retries": 1}
    if fault in ("exclude", "raise"):
        failing.calls = 0
        return {"reward": failing, "failed_rewards": fault}
    return {"reward": too_large, "max_skipped_updates": 1}


def break_gradient(trainer) -> None:
    """NaN from one layer on backwards, on rank 1 in the second update; its loss is a number."""

    def broken(gradient):
        return gradient * math.nan if RANK == 1 and trainer.state.global_step == 1 else gradient

    def watch(module, inputs, output):
        if output.requires_grad:
            output.register_hook(broken)

    trainer.model.policy.model.layers[-1].mlp.register_forward_hook(watch)


def digest(tensors) -> str:
    """The same for the same tensors."""
    parts = [tensor.detach().float().cpu().contiguous().numpy().tobytes() for tensor in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def whole(trainer) -> str | None:
    """Digest of all weights; None on a rank to which sharded ones are not gathered."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return digest(tensor for _, tensor in sorted(weights.items())) if weights else None


def held(trainer) -> str:
    """Digest of what this rank holds of the weights."""
    local = (getattr(w, "ds_tensor", w) for w in trainer.model_wrapped.parameters())
    return digest(w.to_local() if hasattr(w, "to_local") else w for w in local)


class Start(TrainerCallback):
    """The weights before the first step; DeepSpeed has them once training begins."""

    def __init__(self, trainer):
        self.trainer, self.weights = trainer, None

    def on_train_begin(self, *args, **kwargs):
        self.weights = held(self.trainer)


def train(output: Path, fault: str, settings: dict) -> dict:
    """One run and what this rank saw of it."""
    trainer = tiny_trainer(
        output / fault,
        model=str(output.parent / "policy"),  # ZeRO-3 loads the reference from where the policy came
        **{"gradient_accumulation_steps": 1, "num_ppo_epochs": 1, "max_steps": 3} | settings | settings_of(fault),
    )
    if fault == "gradient":
        break_gradient(trainer)
    start = Start(trainer)
    trainer.add_callback(start)
    stopped = None
    try:
        trainer.train()
    except (RewardError, NonFiniteError) as error:
        stopped = str(error)
    names = (
        "update/skipped_share",
        "reward/failed_share",
        "reward/attempts",
        "completion/length_mean",
        "constraint/below:0/value",
    )
    return {
        "stopped": stopped,
        "step": trainer.state.global_step,
        "same": start.weights == held(trainer),
        "weights": whole(trainer),
        "finite": all(math.isfinite(value) for value in logged(trainer, "loss")),
        "kind": str(trainer.accelerator.distributed_type.value),
        "zero_stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
        **{name: logged(trainer, name) for name in names},
    }


def main(output: Path, given: list[str]) -> None:
    warnings.simplefilter("ignore")
    if "--fsdp_on_cpu" in given:
        allow_fsdp_on_cpu()
    settings = {"ds3_gather_for_generation": False} if "--by_layer" in given else {}
    seen = {fault: train(output, fault, settings) for fault in given if not fault.startswith("--")}
    state = PartialState()
    output.mkdir(parents=True, exist_ok=True)
    (output / f"rank_{state.process_index}.json").write_text(json.dumps(seen))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    with end_of_rank():
        main(Path(sys.argv[1]), sys.argv[2:])
