"""Two PPO steps of one rank, and the most memory that it held; `memory_model.py` starts it.

    memory_worker.py TASK.json RESULT_PREFIX

Writes RESULT_PREFIX_<rank>.json.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from measuring import versions
from peers.stopwatch import peak_bytes
from peft import LoraConfig

from rlhf.config import PPOConfig
from rlhf.trainer import PPOTrainer


def resident() -> int:
    """Bytes that this process holds now."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return next(int(line[1]) * 1024 for line in lines if line[0] == "VmRSS:")


def longer_is_better(completions: list[str], **_: object) -> list[float]:
    return [float(len(text)) for text in completions]


def main(task: dict) -> tuple[int, dict]:
    torch.set_num_threads(1)
    start = resident()
    lora = {"r": task["lora"], "target_modules": "all-linear", "lora_dropout": 0.0}
    trainer = PPOTrainer(
        model=task["policy"],
        reward_funcs=longer_is_better,
        args=PPOConfig(**task["settings"]),
        train_dataset=Dataset.from_dict({"prompt": task["prompts"]}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if task["lora"] else None,
    )
    loaded = peak_bytes("cpu")
    trainer.train()
    sizes = [getattr(w, "ds_numel", w.numel()) for w in trainer.model.parameters() if w.requires_grad]
    record = {
        "start_bytes": start,
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes("cpu"),
        "trained": sum(sizes),
        "length": max(entry.get("completion/length_mean", 0) for entry in trainer.state.log_history),
        "versions": versions("torch", "transformers", "accelerate", "deepspeed"),
    }
    return trainer.accelerator.process_index, record


if __name__ == "__main__":
    rank, found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(f"{sys.argv[2]}_{rank}.json").write_text(json.dumps(found))
