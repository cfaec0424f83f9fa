"""What a PPO run must remember beside weights, optimiser, scheduler and random states."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.critic import ActorCritic
from rlhf.rollout import Rollout

STATE_FILE = "ppo_state.json"


@dataclass
class PPOState:
    """State of the algorithm between optimiser steps."""

    kl_coef: float
    tail_threshold: float | None
    kl_response: float = 1.0  # factor of kl_coef that answers the last rollout
    rollouts: int = 0  # rollouts collected
    position: int = 0  # micro-batches of the current rollout already used


def layout(args: PPOConfig, world_size: int, uses_peft: bool) -> dict[str, object]:
    """The settings that a checkpoint cannot be resumed without."""
    return {
        "world_size": world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_mini_batches": args.num_mini_batches,
        "num_ppo_epochs": args.num_ppo_epochs,
        "num_generations": args.num_generations,
        "critic": args.critic,
        "critic_head": args.critic_head,
        "peft": uses_peft,
    }


def save_state(
    directory: str | Path,
    state: PPOState,
    rollout: Rollout | None,
    settings: dict,
    rank: int,
    is_main: bool,
    rewards: list[dict],
) -> None:
    """Write the state, that of the reward functions, and this rank's rollout while it is still in use."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if is_main:
        content = {"state": asdict(state), "layout": settings, "reward_functions": rewards}
        (folder / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")
    if rollout is not None and state.position > 0:
        save_file(rollout.state_dict(), folder / f"rollout_{rank}.safetensors")


def load_state(
    directory: str | Path, settings: dict, rank: int, device: torch.device
) -> tuple[PPOState, Rollout | None, list[dict]]:
    """Read what `save_state` wrote: the algorithm's state, the rollout in use, and that of the reward functions.

    Raises:
        ValueError: no PPO checkpoint, or one of a run with another layout.
    """
    folder = Path(directory)
    check_resumable(folder, settings)
    content = json.loads((folder / STATE_FILE).read_text())
    state, rollout = PPOState(**content["state"]), None
    if state.position > 0:
        tensors = load_file(folder / f"rollout_{rank}.safetensors")
        rollout = Rollout(**{name: tensor.to(device) for name, tensor in tensors.items()})
    return state, rollout, content["reward_functions"]


def check_resumable(directory: str | Path, settings: dict) -> None:
    """Refuse a checkpoint that this run could not continue.

    Raises:
        ValueError: no PPO checkpoint, or the settings that differ, by name.
    """
    path = Path(directory) / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint of PPOTrainer ({STATE_FILE} is missing).")
    saved = json.loads(path.read_text())["layout"]
    different = [f"{k}: {saved.get(k)!r} saved, {v!r} now" for k, v in settings.items() if saved.get(k) != v]
    if different:
        raise ValueError(f"{directory} belongs to a run with other settings ({'; '.join(different)}).")


def save_weights(module: ActorCritic, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """The policy (or its adapter) in plain Hugging Face form, the critic in a folder beside it.

    Args:
        module: policy and critic.
        directory: folder of the policy.
        state_dict: full state of `module` where its own is sharded; None: its own.
    """
    state = module.state_dict() if state_dict is None else state_dict
    policy = {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
    module.policy.save_pretrained(directory, state_dict=policy)
    module.save_critic(directory, state)


def load_weights(module: ActorCritic, directory: str | Path) -> None:
    """Read what `save_weights` wrote.

    Raises:
        ValueError: policy or critic weights are missing or belong to another model.
    """
    if hasattr(module.policy, "peft_config"):
        set_peft_model_state_dict(module.policy, load_peft_weights(str(directory), device="cpu"))
    else:
        files = sorted(Path(directory).glob("model*.safetensors"))
        if not files:
            raise ValueError(f"{directory} holds no policy weights (model*.safetensors).")
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        unknown = module.policy.load_state_dict(weights, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{directory} holds weights of another model, e.g. {unknown[0]}.")
        module.policy.tie_weights()
    module.load_critic(directory)
