"""Everything that could make a run fail later, looked at before the first weight is trained."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedType, PartialState
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import PPOConfig
from rlhf.durability import MANIFEST, UNFINISHED, checkpoints, wants_resume
from rlhf.rollout import tokenize_prompts


def check_launch(args: PPOConfig) -> None:
    """Refuse a launch whose device, ranks or sharding accelerate would change without a word.

    A launch for GPUs on a machine without one becomes a run on the CPU, hours slower; FSDP on CPU ranks becomes plain
    data parallelism, with the whole model on every rank. `check_mode` looks again once accelerate has decided.

    Raises:
        ValueError: started by a launcher, and this process is not what the launcher was asked for.
    """
    state = PartialState()
    asked = asked_launch(os.environ, args, state.num_processes)
    launched = "ACCELERATE_USE_CPU" in os.environ or asked.processes > 1
    asked_for_cpu = args.use_cpu or _is_set(os.environ, "ACCELERATE_USE_CPU")
    if launched and not asked_for_cpu and state.device.type == "cpu":
        raise ValueError(
            "The accelerate config asks for GPUs, but none is visible. Take accelerate_configs/cpu.yaml (or, for CPU "
            "ranks, ddp_cpu.yaml with --use_cpu true), or check CUDA_VISIBLE_DEVICES."
        )
    if asked.mode.startswith("FSDP") and state.distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO):
        raise ValueError(
            f"The launch asks for {asked.mode}, but accelerate shards with it on accelerators only: here every rank "
            "would hold everything. Take accelerate_configs/ddp_cpu.yaml, or zero2.yaml or zero3.yaml."
        )


def check_mode(args: PPOConfig, accelerator: Accelerator) -> None:
    """Refuse to train in another mode, or on fewer ranks, than was asked for.

    Raises:
        ValueError: with both modes in words.
    """
    asked, became = asked_launch(os.environ, args, accelerator.num_processes), actual_launch(accelerator)
    # A DeepSpeed or FSDP config of the user's own may hold any variant.
    same_mode = became.mode == asked.mode or (asked.mode in ("DeepSpeed", "FSDP") and asked.mode in became.mode)
    if not same_mode or became.processes != asked.processes:
        raise ValueError(
            f"The launch asked for {asked.mode} with {asked.processes} process(es), but accelerate made it "
            f"{became.mode} with {became.processes}. Look for a flag of `accelerate launch`, a variable ACCELERATE_* "
            "or a setting (use_cpu, deepspeed, fsdp) that overrides the accelerate config."
        )


class Launch(NamedTuple):
    """How ranks share the work: the mode in words, and the number of ranks."""

    mode: str
    processes: int


def asked_launch(environment: Mapping[str, str], args: PPOConfig, processes: int) -> Launch:
    """What was asked for: by `accelerate launch`, which tells it to its processes in variables, or by the settings.

    Args:
        environment: variables of this process.
        args: settings, whose `deepspeed` and `fsdp` win over the variables; those of an evaluation have neither.
        processes: number of ranks where no launcher has said one.
    """
    processes = int(environment.get("WORLD_SIZE", processes))
    config_file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if getattr(args, "deepspeed", None) or config_file.lower() != "none":
        return Launch("DeepSpeed", processes)
    if getattr(args, "fsdp", None):
        return Launch("FSDP", processes)
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        prefix = "ACCELERATE_DEEPSPEED_"
        devices = [environment.get(f"{prefix}OFFLOAD_{part}_DEVICE", "none") for part in ("OPTIMIZER", "PARAM")]
        return Launch(_zero_mode(environment.get(f"{prefix}ZERO_STAGE", "2"), *devices), processes)
    if _is_set(environment, "ACCELERATE_USE_FSDP"):
        return Launch(f"FSDP version {environment.get('FSDP_VERSION', '1')}", processes)
    if _is_set(environment, "ACCELERATE_USE_MEGATRON_LM"):
        return Launch("Megatron-LM", processes)
    return Launch("one process" if processes == 1 else "data parallelism", processes)


def actual_launch(accelerator: Accelerator) -> Launch:
    """What accelerate made of it."""
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    if kind == DistributedType.DEEPSPEED:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        devices = [zero.get(f"offload_{part}", {}).get("device", "none") for part in ("optimizer", "param")]
        return Launch(_zero_mode(zero.get("stage", 0), *devices), processes)
    if kind == DistributedType.FSDP:
        return Launch(f"FSDP version {accelerator.state.fsdp_plugin.fsdp_version}", processes)
    if kind == DistributedType.MEGATRON_LM:
        return Launch("Megatron-LM", processes)
    return Launch("one process" if processes == 1 else "data parallelism", processes)


def _zero_mode(stage: int | str, optimizer: str, parameters: str) -> str:
    return f"DeepSpeed ZeRO-{stage} (offload: optimizer {optimizer}, parameters {parameters})"


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")


def check_output_dir(args: PPOConfig) -> None:
    """Refuse to write into a folder that holds something, unless the run continues or replaces it.

    Whether a checkpoint is sound takes reading it, so that waits for `PPOTrainer.train`.

    Raises:
        ValueError: the folder is not empty, or nothing is there that could be continued.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    # Every rank looks before any rank may write.
    occupied = folder.is_dir() and any(folder.iterdir())
    present = checkpoints(folder) or checkpoints(folder / UNFINISHED)
    PartialState().wait_for_everyone()
    if wants_resume(resume):
        if str(resume).lower() == "true" and not present:
            raise ValueError(
                f"resume_from_checkpoint={resume}, but {folder} holds no checkpoint. Start without it, or set it to "
                "'auto': the newest sound checkpoint, or a new start where there is none."
            )
        if str(resume).lower() not in ("true", "auto") and not Path(resume, MANIFEST).is_file():
            raise ValueError(f"resume_from_checkpoint={resume} is no complete checkpoint ({MANIFEST} is missing).")
    elif occupied and not args.overwrite_output_dir:
        raise ValueError(
            f"output_dir {folder} is not empty. Continue its run with resume_from_checkpoint=true, "
            "replace it with overwrite_output_dir, or choose another folder."
        )


def check_batches(args: PPOConfig, num_prompts: int) -> None:
    """Refuse batch sizes that do not divide, or a dataset smaller than one rollout.

    Raises:
        ValueError: with the sizes and the settings to change.
    """
    total = args.rollout_size * PartialState().num_processes
    if total % args.num_generations:
        raise ValueError(
            f"A rollout of {total} completions does not divide into groups of num_generations={args.num_generations}; "
            "change per_device_train_batch_size, gradient_accumulation_steps or num_mini_batches."
        )
    needed = total // args.num_generations
    if 0 < num_prompts < needed:
        raise ValueError(
            f"One rollout needs {needed} prompts, but train_dataset has {num_prompts}; lower "
            "per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches, or add prompts."
        )


def prompt_budget(policy: PreTrainedModel, args: PPOConfig) -> int:
    """Longest prompt in tokens that leaves room for a completion.

    Raises:
        ValueError: `max_prompt_length` and `max_completion_length` together exceed the context.
    """
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    room = None if context is None else context - args.max_completion_length
    if room is not None and room < 1:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt in {context} tokens."
        )
    if args.max_prompt_length is None:
        return room if room is not None else 10**9
    if room is not None and args.max_prompt_length > room:
        raise ValueError(
            f"max_prompt_length={args.max_prompt_length} plus max_completion_length={args.max_completion_length} "
            f"exceeds the context of {context} tokens."
        )
    return args.max_prompt_length


def check_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: str,
    template_kwargs: dict | None = None,
    name: str = "train_dataset",
) -> Dataset:
    """Refuse a dataset that would fail in the middle of a run.

    Args:
        dataset: rows with a `prompt`, text or messages.
        tokenizer: the policy's.
        max_length: longest prompt in tokens.
        overlong: 'error', or 'drop' to leave longer prompts out.
        template_kwargs: passed to the chat template.
        name: what the messages call the dataset.

    Returns:
        The dataset, less the dropped rows.

    Raises:
        ValueError: no rows, no `prompt` column, an empty prompt, or a prompt above `max_length`.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: there is no prompt to complete.")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} has no column 'prompt' (it has {', '.join(dataset.column_names)}); "
            "rename yours with dataset.rename_column(...)."
        )
    keep, too_long = [], []
    for start in range(0, len(dataset), 1024):
        prompts = dataset[start : start + 1024]["prompt"]
        for row, prompt in enumerate(prompts, start):
            if not prompt or (isinstance(prompt, str) and not prompt.strip()):
                raise ValueError(f"{name}, row {row}: the prompt is empty. Remove such rows with dataset.filter(...).")
        for row, ids in enumerate(tokenize_prompts(prompts, tokenizer, template_kwargs), start):
            (keep if len(ids) <= max_length else too_long).append(row)
    if too_long and overlong == "error":
        raise ValueError(
            f"{name}: {len(too_long)} of {len(dataset)} prompts exceed {max_length} tokens (row {too_long[0]} first); "
            "shorten them, raise max_prompt_length, lower max_completion_length, or set overlong_prompts='drop'."
        )
    if not keep:
        raise ValueError(f"{name}: every prompt exceeds {max_length} tokens; none is left to train on.")
    return dataset.select(keep) if too_long else dataset


def check_datasets(
    train: Dataset,
    evaluation: Dataset | dict[str, Dataset] | None,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    args: PPOConfig,
) -> tuple[Dataset, Dataset | dict[str, Dataset] | None]:
    """Both datasets after `check_prompts`, with what the settings and the policy's context leave for a prompt."""
    limits = {
        "max_length": prompt_budget(policy, args),
        "overlong": args.overlong_prompts,
        "template_kwargs": args.chat_template_kwargs,
    }
    train = check_prompts(train, tokenizer, name="train_dataset", **limits)
    if args.prompt_weight_column is not None:
        prompt_weights(train, args.prompt_weight_column)
    if isinstance(evaluation, dict):
        evaluation = {name: check_prompts(part, tokenizer, name=name, **limits) for name, part in evaluation.items()}
    elif evaluation is not None:
        evaluation = check_prompts(evaluation, tokenizer, name="eval_dataset", **limits)
    return train, evaluation


def prompt_weights(dataset: Dataset, column: str) -> Tensor:
    """(N,) float64: the column of weights by which rollouts draw prompts.

    Raises:
        ValueError: the column is missing, or not of finite numbers from 0 on with one above 0.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"prompt_weight_column names {column!r}, but the training data has {', '.join(dataset.column_names)}."
        )
    values = list(dataset[column])
    bad = [
        i
        for i, v in enumerate(values)
        if isinstance(v, bool) or not isinstance(v, int | float) or not 0 <= v < math.inf
    ]
    if bad:
        raise ValueError(
            f"column {column!r}: a prompt's weight is a finite number, 0 or more; row {bad[0]} has {values[bad[0]]!r}."
        )
    if not any(values):
        raise ValueError(f"column {column!r} gives every prompt the weight 0: nothing could be drawn.")
    return torch.tensor(values, dtype=torch.float64)
