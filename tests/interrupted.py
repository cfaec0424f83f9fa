"""A short PPO run with everything in it that a checkpoint must carry, for the tests that interrupt it.

Population risk with a constraint, adaptive KL, a falling learning rate, two epochs of two mini-batches, and a log
every third step, so that checkpoints lie inside rollouts and between logs.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from tiny import tiny_qrm, tiny_tokenizer, tiny_trainer
from transformers import TrainerCallback

from rlhf.leaving import end_of_rank
from rlhf.reward_function import RiskReward

SETTINGS = {
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "gradient_accumulation_steps": 1,
    "kl_target": 0.5,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "critic_learning_rate": 2e-3,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
}


class Report(TrainerCallback):
    """An event wherever the loop of the trainer passes by."""

    def __init__(self, report: Callable[[], object]):
        self._report = report

    def on_step_begin(self, *args, **kwargs):
        self._report()

    on_pre_optimizer_step = on_step_end = on_log = on_save = on_step_begin


def train(
    report: Callable[[], object],
    output: str,
    file_limit: list | None = None,
    final: bool = False,
    lora: bool = False,
    **settings: object,
) -> None:
    """Train to the end, or as far as the process lives, and write what came of it.

    Args:
        report: called at every event.
        output: folder of the run.
        file_limit: bytes, and the steps from and to which no file may grow larger.
        final: save the policy at the end, as the recipes do.
        lora: train an adapter.
        settings: of `PPOConfig`.
    """
    reward = RiskReward(
        tiny_qrm(), "cvar:0.3", scope="population", constraints=["below:0 <= 0.2"], tokenizer=tiny_tokenizer()
    )
    callbacks = [Report(report)] + ([] if file_limit is None else [SmallDisk(*file_limit)])
    resume = settings.pop("resume_from_checkpoint", "auto")
    settings = {**SETTINGS, "resume_from_checkpoint": resume, **settings}
    if lora:
        settings["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = tiny_trainer(Path(output, "run"), reward=reward, callbacks=callbacks, **settings)
    trainer.train(resume)
    if final:
        trainer.save_model()
    write_result(trainer, Path(output))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def write_result(trainer: object, folder: Path) -> None:
    """Weights, state and everything that was logged, but for what a clock says."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")
    record = {
        "log": [
            {name: value for name, value in entry.items() if not name.startswith(("time/", "train_", "total_"))}
            for entry in trainer.state.log_history
        ],
        "kl_coef": trainer.ppo_state.kl_coef,
        "rollouts": trainer.ppo_state.rollouts,
        "rewards": trainer.reward_functions.state_dict(),
        "learning_rate": trainer.lr_scheduler.get_last_lr(),
        "ranks": trainer.accelerator.num_processes,
        "zero_stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
    }
    (folder / "record.json").write_text(json.dumps(record))


class SmallDisk(TrainerCallback):
    """No file above a size between two steps: the kernel refuses the write, as on a full disk."""

    def __init__(self, size: int, first: int, last: int):
        self._size, self._first, self._last = size, first, last

    def on_step_begin(self, args, state, control, **kwargs):
        full = self._first <= state.global_step + 1 <= self._last
        unlimited = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._size if full else unlimited, unlimited))


if __name__ == "__main__":
    # Launched: each rank leaves its process id and its events in the folder. `by_rank` is for one rank alone.
    folder, rank, settings = Path(sys.argv[1]), os.environ.get("RANK", "0"), json.loads(sys.argv[2])
    settings |= settings.pop("by_rank", {}).get(rank, {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    with end_of_rank(), (folder / f"events_{rank}").open("ab", buffering=0) as events:
        train(lambda: events.write(b"."), str(folder), **settings)
