"""Two PPO steps of one rank, and the most memory that it held; `memory_model.py` starts it.

    memory_worker.py TASK.json RESULT_PREFIX

Writes RESULT_PREFIX_<rank>.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from measuring import versions
from peers.stopwatch import peak_bytes
from peft import LoraConfig
from transformers import TrainerCallback

from rlhf.config import PPOConfig
from rlhf.leaving import end_of_rank
from rlhf.trainer import PPOTrainer


def resident() -> int:
    """Bytes that this process holds now."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return next(int(line[1]) * 1024 for line in lines if line[0] == "VmRSS:")


class Prepared(TrainerCallback):
    """The most that was held until model and optimiser lay as the launch wants them: split, cast, moved."""

    def __init__(self):
        self.peak = 0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.peak = peak_bytes("cpu")


def allow_fsdp_on_cpu() -> None:
    """Let accelerate shard CPU ranks with FSDP, as tests/distributed/tiny_run.py does.

    Torch can; accelerate asks for the kind "several GPUs", and falls back to plain data parallelism otherwise.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def longer_is_better(completions: list[str], **_: object) -> list[float]:
    return [float(len(text)) for text in completions]


def main(task: dict) -> tuple[int, dict]:
    torch.set_num_threads(1)
    if task["fsdp_on_cpu"]:
        allow_fsdp_on_cpu()
    start, prepared = resident(), Prepared()
    lora = {"r": task["lora"], "target_modules": "all-linear", "lora_dropout": 0.0}
    trainer = PPOTrainer(
        model=task["policy"],
        reward_funcs=longer_is_better,
        args=PPOConfig(**task["settings"]),
        train_dataset=Dataset.from_dict({"prompt": task["prompts"]}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if task["lora"] else None,
        callbacks=[prepared],
    )
    loaded = peak_bytes("cpu")
    trainer.train()
    sizes = [getattr(w, "ds_numel", w.numel()) for w in trainer.model.parameters() if w.requires_grad]
    record = {
        "start_bytes": start,
        "loading_bytes": loaded,
        "preparing_bytes": prepared.peak,
        "peak_bytes": peak_bytes("cpu"),
        "trained": sum(sizes),
        "length": max(entry.get("completion/length_mean", 0) for entry in trainer.state.log_history),
        "versions": versions("torch", "transformers", "accelerate", "deepspeed"),
    }
    return trainer.accelerator.process_index, record


if __name__ == "__main__":
    with end_of_rank():
        rank, found = main(json.loads(Path(sys.argv[1]).read_text()))
        Path(f"{sys.argv[2]}_{rank}.json").write_text(json.dumps(found))
