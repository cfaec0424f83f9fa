"""What a PPO run must remember beside weights, optimiser, scheduler and random states."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
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
    score_moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # see scoring.normalized_scores
    position: int = 0  # micro-batches of the current rollout already used

    def check(self, micro_batches: int) -> None:
        """Refuse what no run can have written.

        Args:
            micro_batches: that use one rollout.

        Raises:
            ValueError: with the field.
        """
        for name in ("kl_coef", "kl_response", "tail_threshold"):
            value = getattr(self, name)
            if not (_is_number(value) or (name == "tail_threshold" and value is None)):
                raise ValueError(f"{name} is {value!r}, not a finite number")
        moments = self.score_moments
        if not (isinstance(moments, list) and len(moments) == 3 and all(map(_is_number, moments))):
            raise ValueError(f"score_moments is {moments!r:.80}, not three numbers")
        if self.kl_coef < 0 or self.kl_response < 0:
            raise ValueError(f"a KL coefficient below 0: {self.kl_coef} * {self.kl_response}")
        for name in ("rollouts", "position"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is {value!r}, not a number of rollouts or micro-batches")
        if self.position >= micro_batches:
            raise ValueError(f"position is {self.position}, but {micro_batches} micro-batches use a rollout")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


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
    directory: str | Path, rank: int, device: torch.device, args: PPOConfig
) -> tuple[PPOState, Rollout | None, list[dict]]:
    """Read what `save_state` wrote: the algorithm's state, the rollout in use, and that of the reward functions.

    Args:
        directory: of the checkpoint.
        rank: of this process.
        device: for the rollout.
        args: this run's settings.

    Raises:
        ValueError: values that no run can have written. Whose checkpoint it is, `check_resumable` has said before.
    """
    folder = Path(directory)
    content = json.loads((folder / STATE_FILE).read_text())
    state, rollout = PPOState(**content["state"]), None
    state.check(args.updates_per_rollout * args.gradient_accumulation_steps)
    if state.position > 0:
        tensors = load_file(folder / f"rollout_{rank}.safetensors")
        rollout = Rollout(**{name: tensor.to(device) for name, tensor in tensors.items()})
        rollout.check(args.rollout_size)
    return state, rollout, content["reward_functions"]


def check_resumable(directory: str | Path, settings: dict) -> None:
    """Refuse a checkpoint that this run could not continue.

    Raises:
        ValueError: no PPO checkpoint, or the settings that differ, by name.
    """
    path = Path(directory) / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint of PPOTrainer ({STATE_FILE} is missing).")
    try:
        saved = dict(json.loads(path.read_text())["layout"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold the state of a run ({type(error).__name__}: {error}).") from error
    if saved.get("critic_head", "scalar") != "scalar":
        raise ValueError(
            f"{directory} was trained with critic_head={saved['critic_head']!r}, which no longer exists; continue it "
            "with the version that wrote it, or start anew."
        )
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
        given = load_peft_weights(str(directory), device="cpu")
        wanted = set(get_peft_model_state_dict(module.policy))
        if set(given) != wanted:
            different = sorted(set(given) ^ wanted)
            raise ValueError(f"{directory} holds another adapter; differing tensors: {', '.join(different[:5])} ...")
        set_peft_model_state_dict(module.policy, given)
    else:
        files = sorted(Path(directory).glob("model*.safetensors"))
        if not files:
            raise ValueError(f"{directory} holds no policy weights (model*.safetensors).")
        weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
        missing, unknown = module.policy.load_state_dict(weights, strict=False)
        # A tied tensor is stored once.
        missing = set(missing) - set(module.policy.all_tied_weights_keys)
        if missing or unknown:
            raise ValueError(f"{directory} holds weights of another model, e.g. {sorted({*missing, *unknown})[0]}.")
        module.policy.tie_weights()
    module.load_critic(directory)
