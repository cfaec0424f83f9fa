"""Short PPO runs that write what they did; started by the tests with `accelerate launch` on one or two ranks.

    tiny_run.py OUTPUT_DIR [setting=value ...]        one run
    tiny_run.py OUTPUT_DIR --several FILE.json        {name: settings, ...}, one after another in OUTPUT_DIR/name

Decoding is greedy, so the completions depend on the prompts alone and are the same however the ranks divide them.
"""

import gc
import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import DistributedType, PartialState
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import logged, tiny_llama, tiny_prompts, tiny_qrm, tiny_tokenizer, tiny_trainer

import rlhf.trainer
from rlhf.leaving import end_of_rank
from rlhf.preflight import actual_launch, check_mode
from rlhf.reward_function import RiskReward
from rlhf.trainer import PPOTrainer

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def several(output: Path, runs: dict[str, dict]) -> None:
    """One run after another in the same process group: starting the ranks takes longer than a run."""
    for name, settings in runs.items():
        run(output / name, output.parent / "policy", settings)
        gc.collect()


def run(output: Path, source: Path, settings: dict) -> None:
    """Train, and write the log and the final weights to `output`."""
    lora = settings.pop("lora", False)
    peft = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if lora else None
    if settings.pop("population", False):
        settings["reward"] = RiskReward(
            tiny_qrm(), "cvar:0.3", scope="population", constraints=["below:0 <= 0.2"], tokenizer=tiny_tokenizer()
        )
    if settings.pop("siblings_by_length", False):
        # Greedy completions of one prompt are all the same, and their scores too; those of different prompts are not.
        rlhf.trainer.prompt_digest = lambda prompt: len(prompt.split())
    model = str(source) if source.is_dir() else tiny_llama(initializer_range=0.3)
    held_out = settings.pop("held_out", None)
    if held_out is not None:
        settings["eval_dataset"] = tiny_prompts().select(range(held_out))
    trainer = tiny_trainer(
        output / "run",
        model=model,
        peft_config=peft,
        **{"generation_kwargs": GREEDY, "num_ppo_epochs": 1, "max_steps": 3, "learning_rate": 1e-3, **settings},
    )
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None:
        # ZeRO-3 keeps tensors of fewer than 1e5 numbers whole, which all of these are.
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    trainer.train()
    trainer.save_model(str(output / "policy"))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        weights = {name.removeprefix("module."): tensor.float().contiguous() for name, tensor in weights.items()}
        save_file(weights, output / "weights.safetensors")
        names = {name for entry in trainer.state.log_history for name in entry}
        record = {name: logged(trainer, name) for name in sorted(names)} | {
            "launch": actual_launch(trainer.accelerator),
            "weights_share": held_weights(trainer.model_wrapped),
            "optimizer_share": held_moments(trainer),
            "refused": refused_environments(trainer),
        }
        (output / "record.json").write_text(json.dumps(record))
    trainer.accelerator.wait_for_everyone()


def held_weights(model: torch.nn.Module) -> float:
    """Share of the weights that lies on this rank between two forwards."""
    # In place of a weight that it has split ZeRO-3 leaves an empty tensor; the part is `ds_tensor`.
    held = [local(w) or w.ds_tensor.numel() for w in model.parameters()]
    return sum(held) / sum(getattr(w, "ds_numel", w.numel()) for w in model.parameters())


def held_moments(trainer: PPOTrainer) -> float:
    """Share of Adam's first moments that lies on this rank."""
    optimizer = getattr(trainer.model_wrapped, "optimizer", None) or trainer.optimizer
    moments = sum(local(state["exp_avg"]) for state in optimizer.optimizer.state.values())
    return moments / sum(getattr(w, "ds_numel", w.numel()) for w in trainer.model.parameters() if w.requires_grad)


def local(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


def refused_environments(trainer: PPOTrainer) -> list[str]:
    """Wishes of a launcher for which `check_mode` refuses to train as this run does."""
    wishes = {
        "as launched": {},
        "FSDP": {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "false", "FSDP_VERSION": "2"},
        "FSDP version 1": {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "false", "FSDP_VERSION": "1"},
        "no sharding": {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"},
        "three ranks": {"WORLD_SIZE": "3"},
    }
    for stage in (1, 2, 3):
        wishes[f"ZeRO-{stage}"] = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    wishes["ZeRO-3 with offload"] = wishes["ZeRO-3"] | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    refused = []
    for name, wish in wishes.items():
        with patch.dict(os.environ, wish):
            try:
                check_mode(trainer.args, trainer.accelerator)
            except ValueError:
                refused.append(name)
    return refused


def allow_fsdp_on_cpu() -> None:
    """Let accelerate shard CPU ranks with FSDP, which torch can do: the kind "several GPUs" is what it asks for."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    with end_of_rank():
        folder, given = Path(sys.argv[1]), sys.argv[2:]
        if "--fsdp_on_cpu" in given:
            given.remove("--fsdp_on_cpu")
            allow_fsdp_on_cpu()
        if given[:1] == ["--several"]:
            several(folder, json.loads(Path(given[1]).read_text()))
        else:
            pairs = dict(pair.split("=", 1) for pair in given)
            run(folder, folder.parent / "policy", {name: json.loads(value) for name, value in pairs.items()})
        PartialState().destroy_process_group()
