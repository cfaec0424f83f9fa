"""Fine-tune a language model with PPO whose reward is a risk measure of a quantile reward model.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/ppo.py \\
        --config recipes/smollm2/ppo.yaml --risk cvar:0.1

Every value of the YAML file can be overridden by a flag of the same name; `--help` lists them all. With
`--resume_from_checkpoint auto` the same command starts a run and continues it after any interruption (docs/faults.md).
"""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import ModelConfig, get_peft_config

from reward.source_specs import read_source_spec
from reward.tables import check_prompts, read_dataset
from rlhf.attributes import build_objectives
from rlhf.command_line import run
from rlhf.config import PPOConfig
from rlhf.population import DECAY
from rlhf.preflight import check_launch, check_output_dir
from rlhf.reward_function import RiskReward
from rlhf.trainer import PPOTrainer


@dataclass
class DataArguments:
    """Where the prompts come from."""

    dataset_name: str = field(
        default=None,
        metadata={"help": "Prompts: a folder of save_to_disk, a JSON, CSV or parquet file, or a hub id (required)."},
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split of the training prompts."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out prompts for evaluation during training (with --eval_strategy)."}
    )
    eval_dataset_split: str | None = field(default=None, metadata={"help": "Split of the held-out prompts."})
    max_eval_prompts: int | None = field(default=None, metadata={"help": "Use only so many held-out prompts."})


@dataclass
class RewardArguments:
    """What the policy is rewarded for."""

    reward_model: str = field(
        default=None,
        metadata={
            "help": "Quantile reward model: a folder of train_qrm.py or a hub id (required). Or another source of "
            "rating laws: ensemble:A,B, gaussian:A?spread=log_std, judgment:A?scores=1,2,3,4,5, scalar:A, or a "
            "weighted mixture:0.7*A+0.3*B or average:0.5*A+0.5*B of any of them."
        },
    )
    risk: str = field(
        default="mean",
        metadata={
            "help": "Risk measure of the predicted rating distribution: mean, quantile:A, cvar:A, mean_variance:L, "
            "mean_std:L, semideviation:L, entropic:E, expectile:T, below:T, wang:L, power:L, cpw:E, "
            "spectral:0.7@1,0.3@0.1, weighted sums such as 0.5*mean+0.5*cvar:0.1, or python:module:function. One per "
            "attribute: 'helpfulness=mean; harmlessness=0.5*cvar:0.05'."
        },
    )
    risk_scope: str = field(
        default="response",
        metadata={
            "help": "'response': the measure of each answer's own law of ratings; 'population': of the law "
            "over prompts, answers and readers, through its influence function."
        },
    )
    constraint: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Bounds on the population, kept by dual ascent: 'cvar:0.05 >= -1.0', 'below:-2 <= 0.01', several "
            "at once."
        },
    )
    constraint_step_size: float = field(
        default=0.1,
        metadata={"help": "Step of the log multipliers; a rollout changes one by at most its exponential."},
    )
    constraint_warmup: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Two shares of training between which the constraints come in; unset: in full from the start."
        },
    )
    risk_schedule: str | None = field(
        default=None, metadata={"help": "'linear' or 'cosine': reach --risk over training, from --risk_schedule_from."}
    )
    risk_schedule_from: str = field(default="mean", metadata={"help": "Risk measure at the start of the schedule."})
    risk_schedule_span: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "Shares of training between which the measure changes."},
    )
    population_decay: float = field(
        default=DECAY,
        metadata={
            "help": "Weight of the past in the law of ratings of the population, per rollout. Higher is smoother, and "
            "lags behind the policy."
        },
    )
    reward_batch_size: int = field(default=32, metadata={"help": "Texts per forward pass of the reward model."})
    reward_max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a text; longer ones lose their beginning. Unset: the context."}
    )
    reward_dtype: str = field(default="auto", metadata={"help": "Dtype of the reward model's weights."})
    rating_threshold: float | None = field(
        default=None, metadata={"help": "Log the predicted share of ratings at or below this value."}
    )


def load_prompts(name: str, split: str | None, limit: int | None = None) -> Dataset:
    """Rows with prompts, at most `limit` of them."""
    rows, column_split = read_dataset(name, split)
    if column_split is not None:
        rows = rows.filter(lambda row: row["split"] == column_split)
    check_prompts(rows, name)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def check_arguments(data: DataArguments, reward: RewardArguments, args: PPOConfig, model: ModelConfig) -> None:
    """Refuse what could not work before any model is loaded."""
    for name, value in (
        ("dataset_name", data.dataset_name),
        ("reward_model", reward.reward_model),
        ("model_name_or_path", model.model_name_or_path),
    ):
        if not value:
            raise ValueError(f"--{name} is required: set it in the YAML file or as a flag.")
    build_objectives(reward.risk, reward.risk_scope, **risk_settings(reward))
    read_source_spec(reward.reward_model)
    if reward.rating_threshold is not None and not math.isfinite(reward.rating_threshold):
        raise ValueError(f"rating_threshold must be a finite rating, got {reward.rating_threshold}")
    check_launch(args)
    check_output_dir(args)


def risk_settings(reward: RewardArguments) -> dict[str, Any]:
    """Keyword arguments of `RiskReward` about constraints, schedule and statistics."""
    if len(reward.risk_schedule_span) != 2:
        raise ValueError(f"risk_schedule_span takes two shares of training, got {reward.risk_schedule_span}")
    if reward.constraint_warmup and len(reward.constraint_warmup) != 2:
        raise ValueError(f"constraint_warmup takes two shares of training, got {reward.constraint_warmup}")
    return {
        "constraints": reward.constraint,
        "constraint_step_size": reward.constraint_step_size,
        "constraint_warmup": tuple(reward.constraint_warmup) or None,
        "schedule": reward.risk_schedule,
        "schedule_from": reward.risk_schedule_from,
        "schedule_span": tuple(reward.risk_schedule_span),
        "decay": reward.population_decay,
    }


def build_trainer(data: DataArguments, reward: RewardArguments, args: PPOConfig, model: ModelConfig) -> PPOTrainer:
    """Load everything and check that it fits together."""
    check_arguments(data, reward, args, model)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    eval_dataset = None
    if data.eval_dataset_name is not None and args.eval_strategy != "no":
        eval_dataset = load_prompts(data.eval_dataset_name, data.eval_dataset_split, data.max_eval_prompts)
    return PPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=RiskReward(
            reward.reward_model,
            risk=reward.risk,
            scope=reward.risk_scope,
            **risk_settings(reward),
            batch_size=reward.reward_batch_size,
            max_length=reward.reward_max_length,
            dtype=reward.reward_dtype,
            tail_threshold=reward.rating_threshold,
            trust_remote_code=args.trust_remote_code,
        ),
        args=args,
        train_dataset=load_prompts(data.dataset_name, data.dataset_split),
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model),
    )


def main(data: DataArguments, reward: RewardArguments, args: PPOConfig, model: ModelConfig) -> None:
    """Load, train, save."""
    try:
        trainer = build_trainer(data, reward, args, model)
        checkpoint = trainer.sound_checkpoint(args.resume_from_checkpoint)
    except (ValueError, OSError) as error:
        # Everything up to here is about the input, and its message says all; a traceback would bury it.
        raise SystemExit(f"error: {error}") from None
    # Whether the constraints hold is said in words, beside the numbers.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rlhf").setLevel(logging.INFO)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    trainer.create_model_card(model_name=f"PPO, risk {reward.risk}")
    # A rank that exits while another still talks to it aborts, and the launcher calls the finished run a failure.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


GROUPS = (DataArguments, RewardArguments, PPOConfig, ModelConfig)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
