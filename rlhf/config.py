"""Every setting of the PPO trainer, checked where it is read."""

from dataclasses import dataclass, field
from typing import Any

import torch
from trl.trainer.base_config import _BaseConfig

from reward.secrets import WithoutSecrets
from rlhf.operator_builds import check_builds


def _setting(default: Any, text: str) -> Any:
    # argparse reads "%" as a format character, and a bare one breaks `--help`.
    return field(default=default, metadata={"help": text.replace("%", "%%")})


@dataclass(repr=False)
class PPOConfig(WithoutSecrets, _BaseConfig):
    """Settings of `PPOTrainer`, on top of those of `transformers.TrainingArguments`.

    The arithmetic of a rollout, which the constructor of the trainer checks:

        completions per rollout and process = per_device_train_batch_size
                                              * gradient_accumulation_steps * num_mini_batches
        optimiser steps per rollout         = num_ppo_epochs * num_mini_batches

    `max_steps` counts optimiser steps, as everywhere in transformers.

    Raises:
        ValueError: a setting lies outside its range; the message names the setting and the range.
    """

    # Model
    model_init_kwargs: dict | str | None = _setting(None, "Keyword arguments of `from_pretrained` for the policy.")
    trust_remote_code: bool = _setting(False, "Allow models and tokenizers that ship their own Python code.")
    disable_dropout: bool = _setting(True, "Switch dropout off in policy, reference and critic.")
    pad_token: str | None = _setting(
        None, "Padding token, for tokenizers that have none or whose padding token equals EOS."
    )
    ds3_gather_for_generation: bool = _setting(
        True, "Under ZeRO-3, gather the weights once for each rollout: faster, needs room for the whole policy."
    )

    # Rollout
    num_generations: int = _setting(1, "Completions per prompt.")
    prompt_weight_column: str | None = _setting(
        None,
        "Column of the training data with a weight for each prompt: rollouts draw prompts in proportion. What is "
        "maximised is then the average over prompts with these weights. Unset: every prompt once an epoch.",
    )
    max_prompt_length: int | None = _setting(
        None, "Longest prompt in tokens. Unset: what the context leaves beside max_completion_length."
    )
    overlong_prompts: str = _setting("error", "Prompts above max_prompt_length: 'error' or 'drop'.")
    max_completion_length: int = _setting(256, "Most tokens generated per completion.")
    temperature: float = _setting(1.0, "Sampling temperature; the training logits are divided by it too.")
    generation_kwargs: dict | str | None = _setting(
        None, "More arguments of `generate`. Anything that reshapes the sampling law makes PPO off-policy."
    )
    stop_tokens: list[str] | None = _setting(None, "Tokens that end a completion, beside the EOS tokens of the model.")
    chat_template_kwargs: dict | str | None = _setting(None, "Keyword arguments of the chat template.")

    # Reward
    reward_weights: list[float] | None = _setting(None, "One weight per reward function; unset: all 1.")
    missing_eos_penalty: float | None = _setting(
        None, "Score adjustment of a completion that ended without a stop token; see missing_eos_mode."
    )
    missing_eos_mode: str = _setting(
        "subtract", "'subtract' the penalty from the score, or 'replace' the score by minus the penalty."
    )
    reward_clip_range: list[float] | None = _setting(
        None, "Lower and upper clip of the score. Off by default: a clip hides the tail that risk measures look at."
    )
    normalize_scores: bool = _setting(
        False,
        "Shift and scale the scores of a rollout by their running mean and standard deviation, so that measures of "
        "any level and scale mean the same to the KL penalty and to the critic. Logs keep the scores as they are.",
    )
    score_baseline: str = _setting(
        "none",
        "'siblings': take the mean score of the other completions of the same prompt off each score, so that what the "
        "prompt alone decides is no noise in the gradient; needs num_generations of 2 or more. 'none': the critic "
        "alone is the baseline.",
    )
    nonfinite_rewards: str = _setting(
        "exclude", "A NaN or infinite reward: 'exclude' the completion and count it, or 'raise'."
    )
    reward_timeout: float | None = _setting(
        None, "Seconds that one call of a reward function may take; unset: no limit. RiskReward knows none."
    )
    reward_retries: int = _setting(
        0, "Repetitions of a call that raised, took too long or answered no numbers, after 1, 2, 4, ... seconds."
    )
    failed_rewards: str = _setting(
        "raise",
        "A reward function that failed for good: 'raise' on all ranks after a checkpoint, or 'exclude' the "
        "completions of the rank where it did.",
    )
    tail_threshold: float | None = _setting(
        None,
        "Scores at or below this are the tail in the logs. Unset: frozen at the 5 % quantile of the first rollout.",
    )

    # KL to the reference
    kl_coef: float = _setting(0.05, "Weight of the per-token KL penalty in the reward; the start value if adaptive.")
    kl_estimator: str = _setting("k1", "Per-token KL estimator in the reward: k1 (unbiased), k2 or k3.")
    kl_target: float | None = _setting(
        None, "Target of the KL per completion, in nats. Set: the coefficient adapts (Ziegler et al. 2019)."
    )
    kl_horizon: int = _setting(10_000, "Completions over which the adaptive coefficient reacts.")
    kl_gain: float = _setting(
        0.0,
        "Power of KL / kl_target by which the adaptive coefficient also answers each rollout at once, against "
        "overshoot in short runs; 0: not at all, as in the paper.",
    )

    # PPO
    num_ppo_epochs: int = _setting(4, "Passes over each rollout.")
    num_mini_batches: int = _setting(1, "Optimiser steps per pass.")
    gamma: float = _setting(1.0, "Discount per token.")
    gae_lambda: float = _setting(0.95, "Decay of generalised advantage estimation.")
    whiten_advantages: bool = _setting(True, "Centre and scale the advantages over all tokens of all processes.")
    whiten_rewards: bool = _setting(False, "Scale the token rewards, without centring, over all processes.")
    clip_range: float = _setting(0.2, "Clip of the probability ratio.")
    clip_range_high: float | None = _setting(None, "Upper clip of the ratio, if it differs from clip_range.")
    dual_clip: float | None = _setting(None, "Bound on the ratio of negative advantages (Ye et al. 2020); above 1.")
    entropy_coef: float = _setting(0.0, "Weight of the entropy bonus.")
    length_aware: bool = _setting(
        True,
        "Do no work on padding: decode completions that have ended no further, put those of similar length into one "
        "micro-batch and cut its padding. The law of the completions and the gradient are the same.",
    )
    max_skipped_updates: int | None = _setting(
        None,
        "Stop with a diagnosis after more than so many updates in a row without a finite loss and gradient; each is "
        "skipped. 0: at the first. Unset: the updates of one rollout, at least 3.",
    )

    # Critic
    critic: str = _setting(
        "shared", "'shared': a value head on the policy's trunk; 'separate': a trunk of its own (critic_model)."
    )
    critic_model: str | None = _setting(None, "Model of the separate critic; unset: the policy's.")
    critic_learning_rate: float | None = _setting(None, "Learning rate of the critic; unset: learning_rate.")
    critic_warmup_rollouts: int = _setting(0, "Rollouts in which only the critic learns.")
    vf_coef: float = _setting(0.1, "Weight of the value loss.")
    value_clip_range: float | None = _setting(0.2, "Clip of the change of a value, in reward units; unset: no clip.")

    # Logging
    log_completions: bool = _setting(False, "Write every logged rollout to output_dir/completions as JSONL.")
    overwrite_output_dir: bool = _setting(False, "Train into an output_dir that is not empty.")

    # Overrides of defaults
    learning_rate: float = _setting(1e-6, "Peak learning rate (AdamW).")
    adam_epsilon: float = _setting(1e-5, "Added to Adam's denominator; 1e-8 makes the first steps needlessly large.")
    logging_steps: float = _setting(1, "Log every so many optimiser steps.")
    gradient_checkpointing: bool | None = _setting(None, "Deprecated name of activation_checkpointing.")
    remove_unused_columns: bool | None = _setting(False, "Kept off: reward functions receive every column.")

    _VALID_DICT_FIELDS = [
        *_BaseConfig._VALID_DICT_FIELDS,
        "generation_kwargs",
        "chat_template_kwargs",
        "model_init_kwargs",
    ]

    def __post_init__(self) -> None:
        if self.bf16 is None:
            # bfloat16 autocast without hardware for it recasts the weights in every layer: slower than float32.
            self.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_available()
        check_builds(self)
        super().__post_init__()
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in ("num_generations", "max_completion_length", "num_ppo_epochs", "num_mini_batches", "kl_horizon"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(
            self.failed_rewards == "raise" or self.nonfinite_rewards == "exclude",
            "nonfinite_rewards",
            "'exclude' when failed_rewards is, because a failed function leaves NaN",
            self.nonfinite_rewards,
        )
        for name in ("reward_retries", "max_skipped_updates"):
            _require((getattr(self, name) or 0) >= 0, name, "0 or more", getattr(self, name))
        _require(
            self.reward_timeout is None or self.reward_timeout > 0, "reward_timeout", "above 0", self.reward_timeout
        )
        _require(self.temperature > 0, "temperature", "above 0 (greedy: generation_kwargs)", self.temperature)
        _require(0 < self.gamma <= 1, "gamma", "in (0, 1]", self.gamma)
        _require(0 <= self.gae_lambda <= 1, "gae_lambda", "in [0, 1]", self.gae_lambda)
        _require(self.clip_range > 0, "clip_range", "above 0", self.clip_range)
        _require(self.kl_coef >= 0, "kl_coef", "0 or more", self.kl_coef)
        ceiling = 1 + (self.clip_range if self.clip_range_high is None else self.clip_range_high)
        _require(self.dual_clip is None or self.dual_clip > ceiling, "dual_clip", f"above {ceiling:g}", self.dual_clip)
        _require(self.kl_target is None or self.kl_target > 0, "kl_target", "above 0", self.kl_target)
        _require(
            self.kl_target is None or self.kl_coef > 0, "kl_coef", "above 0 when kl_target adapts it", self.kl_coef
        )
        _require(0 <= self.kl_gain <= 4, "kl_gain", "in [0, 4]", self.kl_gain)
        _require(self.kl_gain == 0 or self.kl_target is not None, "kl_gain", "0 without kl_target", self.kl_gain)
        _require(self.critic_warmup_rollouts >= 0, "critic_warmup_rollouts", "0 or more", self.critic_warmup_rollouts)
        for name, choices in (
            ("kl_estimator", ("k1", "k2", "k3")),
            ("critic", ("shared", "separate")),
            ("score_baseline", ("none", "siblings")),
            ("missing_eos_mode", ("subtract", "replace")),
            ("nonfinite_rewards", ("exclude", "raise")),
            ("failed_rewards", ("exclude", "raise")),
            ("overlong_prompts", ("error", "drop")),
        ):
            _require(getattr(self, name) in choices, name, f"one of {', '.join(choices)}", getattr(self, name))
        _require(
            self.critic == "separate" or self.critic_model is None,
            "critic_model",
            "set only with critic='separate'",
            self.critic_model,
        )
        _require(
            self.score_baseline == "none" or self.num_generations > 1,
            "num_generations",
            "2 or more with score_baseline='siblings'",
            self.num_generations,
        )
        clip = self.reward_clip_range
        _require(
            clip is None or (len(clip) == 2 and clip[0] < clip[1]),
            "reward_clip_range",
            "two numbers, the lower first",
            clip,
        )

    @property
    def rollout_size(self) -> int:
        """Completions per rollout and process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def updates_per_rollout(self) -> int:
        """Optimiser steps per rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def skipped_updates_allowed(self) -> int:
        """Skipped updates in a row that do not end the run. One broken rollout spoils every update that uses it."""
        return max(3, self.updates_per_rollout) if self.max_skipped_updates is None else self.max_skipped_updates


def _require(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {wanted}, got {got!r}")
