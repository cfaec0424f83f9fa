"""PPO for language models on the trainer base of TRL; `_collect` and `compute_loss` hold the algorithm."""

import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import is_conversational
from trl.models import unwrap_model_for_generation
from trl.trainer.base_trainer import _BaseTrainer

from rlhf import models
from rlhf.adapters import fuse_adapters
from rlhf.advantages import gae, kl_response, next_kl_coef, token_rewards
from rlhf.checkpoint import PPOState
from rlhf.config import PPOConfig
from rlhf.decoding import generate
from rlhf.host_memory import trim_during_backward, trim_heap
from rlhf.losses import clipped_policy_loss, clipped_value_loss
from rlhf.masking import centre_and_scale, global_token_mean, masked_mean, masked_sum, scale_only, token_count
from rlhf.metrics import MetricAverages, add_critic_metrics, add_rollout_metrics, add_update_metrics, score_summary
from rlhf.nonfinite import FiniteUpdates, UpdateGuard
from rlhf.passes import ForwardPasses
from rlhf.preflight import (
    check_batches,
    check_datasets,
    check_launch,
    check_mode,
    check_output_dir,
    prompt_weights,
)
from rlhf.rescue import state_rescued
from rlhf.resuming import DurableCheckpoints
from rlhf.rollout import (
    CompletionFiles,
    Rollout,
    RolloutSampler,
    completions_of,
    left_pad,
    prompt_digest,
    tokenize_prompts,
)
from rlhf.scoring import RewardFunctions, above_siblings, normalized_scores, shape_scores
from rlhf.trackers import guard_trackers


class PPOTrainer(DurableCheckpoints, FiniteUpdates, _BaseTrainer):
    """Proximal policy optimisation of a language model against reward functions.

    One rollout: prompts -> sampled completions -> score of each -> token rewards (score on the last token, KL penalty
    on every token) -> GAE with a critic -> `num_ppo_epochs * num_mini_batches` optimiser steps on the clipped losses.
    Whitening, loss normalisers and statistics count tokens over all processes, so neither the number of processes
    nor the micro-batch size changes the gradient.

    Args:
        model: policy, as folder, hub id or causal language model.
        reward_funcs: one or several of: `RiskReward`, a function with TRL's signature
            `f(prompts, completions, completion_ids, **columns) -> list[float | None]` (sync or async), a one-label
            classifier or its path.
        args: settings.
        train_dataset: rows with `prompt` (text or messages); other columns reach the reward functions.
        eval_dataset: held-out rows for evaluation during training.
        processing_class: tokenizer; unset: loaded beside the policy.
        reward_processing_classes: tokenizers of reward functions given as models.
        callbacks: as in transformers.
        optimizers: as in transformers.
        peft_config: adapter to train; the policy without it is then the reference.

    Raises:
        ValueError: settings, data, tokenizer or launch that could not work, before any weight is trained.

    Reference: Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593.
    """

    _tag_names = ["trl", "ppo", "risk-aware-rlhf"]
    _name = "PPO"
    # Losses are divided by global token counts, never by the number of accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any,
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        args = args or PPOConfig(output_dir="ppo")
        check_launch(args)
        check_output_dir(args)
        if not isinstance(train_dataset, Dataset):
            given = type(train_dataset).__name__
            raise ValueError(f"train_dataset must be a datasets.Dataset with a 'prompt' column, got {given}.")
        check_batches(args, len(train_dataset))
        tokenizer = models.load_tokenizer(model, processing_class, args)

        set_seed(args.seed)  # the adapter's random weights must be the same on every rank
        policy = models.load_policy(model, args)
        train_dataset, eval_dataset = check_datasets(train_dataset, eval_dataset, tokenizer, policy, args)
        check_batches(args, len(train_dataset))
        policy.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        policy.generation_config.pad_token_id = tokenizer.pad_token_id
        self.stop_token_ids = models.stop_token_ids(policy, tokenizer, args.stop_tokens)
        self.reward_functions = RewardFunctions(
            reward_funcs,
            args.reward_weights,
            reward_processing_classes,
            args.trust_remote_code,
            timeout=args.reward_timeout,
            retries=args.reward_retries,
            failed=args.failed_rewards,
        )
        actor_critic, reference = models.build_actor_critic(policy, model, args, peft_config)

        super().__init__(
            model=actor_critic,
            args=args,
            data_collator=list,  # rows stay Python dicts until they are tokenised as one rollout
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError("Several GPUs in one process are not supported; start with `accelerate launch`.")
        check_mode(args, self.accelerator)
        guard_trackers(self.callback_handler.callbacks)
        self.update_guard = UpdateGuard(args, self.accelerator, tokenizer)
        self.completion_files = CompletionFiles(Path(args.output_dir, "completions"), self.accelerator.process_index)
        if not (models.is_zero3(args) or self.is_fsdp_enabled):
            fuse_adapters(self.model)
        if self.accelerator.device.type == "cpu":
            trim_during_backward(self.model, wanted=lambda: self._makes_gradients)
        self.passes = ForwardPasses(self, models.prepare_reference(reference, self))
        self.reward_functions.prepare(self.accelerator)
        self.generation_config = models.generation_config(args, tokenizer, self.stop_token_ids)
        self.ppo_state = PPOState(kl_coef=args.kl_coef, tail_threshold=args.tail_threshold)
        self._rollout: Rollout | None = None
        self._global_tokens = torch.tensor(1.0)
        self._makes_gradients = True  # or adds to those of an earlier micro-batch
        self._train_metrics, self._eval_metrics = MetricAverages(), MetricAverages()
        self._eval_scores: list[Tensor] = []
        # Ranks must sample different completions; weights were made before with one seed for all.
        set_seed(args.seed, device_specific=True)

    # ---- One rollout ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _collect(self, rows: list[dict[str, Any]]) -> Rollout:
        """Rows of the dataset -> everything that the optimiser steps of this rollout need."""
        started = time.perf_counter()
        trim_heap()  # the gradients of the last update lie free in it
        self.model.eval()
        ids, mask, completion_mask, finished = self._sample(rows)
        generated = time.perf_counter()
        scores = self._score(rows, ids[:, -completion_mask.shape[1] :], completion_mask, finished, self._train_metrics)
        self.passes.release_idle()
        scored = time.perf_counter()
        # A rollout is counted when it is complete.
        policy, reference = self.passes.collect(ids, mask, completion_mask.shape[1], self.ppo_state.rollouts + 1)
        self.model.train()

        # An excluded completion keeps its row, so that every rank does the same number of passes, but no token.
        completion_mask = completion_mask & scores.isfinite().unsqueeze(1)
        log_ratio = policy.logprobs - reference.logprobs
        kl_coef, rated = self.ppo_state.kl_coef * self.ppo_state.kl_response, scores
        if self.args.normalize_scores:
            rated, self.ppo_state.score_moments = normalized_scores(
                scores, self.ppo_state.score_moments, self._all_sum
            )
        if self.args.score_baseline == "siblings":
            rated = self._above_siblings(rated, rows)
        rewards = token_rewards(rated, log_ratio, completion_mask, kl_coef, self.args.kl_estimator)
        if self.args.whiten_rewards:
            rewards = scale_only(rewards, completion_mask, all_sum=self._all_sum)
        advantages, returns = gae(rewards, policy.values, completion_mask, self.args.gamma, self.args.gae_lambda)
        add_critic_metrics(self._train_metrics, policy.values, returns, completion_mask, all_sum=self._all_sum)
        if self.args.whiten_advantages:
            advantages = centre_and_scale(advantages, completion_mask, all_sum=self._all_sum)
        self._log_rollout(scores, log_ratio, completion_mask, finished)
        seconds = (generated - started, scored - generated, time.perf_counter() - scored)
        for phase, duration in zip(("generation", "scoring", "token_scores"), seconds, strict=True):
            self._train_metrics.add(f"time/{phase}_seconds", duration)
        return Rollout(
            input_ids=ids,
            attention_mask=mask,
            completion_mask=completion_mask,
            finished=finished,
            old_logprobs=policy.logprobs,
            ref_logprobs=reference.logprobs,
            values=policy.values,
            advantages=advantages,
            returns=returns,
            scores=scores,
        )

    def _sample(self, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Completions of the rows' prompts: ids and mask (B, P + T), completion mask (B, T), finished (B,)."""
        tokens = tokenize_prompts(
            [row["prompt"] for row in rows], self.processing_class, self.args.chat_template_kwargs
        )
        prompt_ids, prompt_mask = (
            t.to(self.accelerator.device) for t in left_pad(tokens, self.processing_class.pad_token_id)
        )
        with unwrap_model_for_generation(
            self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
        ) as actor_critic:
            sharded = (models.is_zero3(self.args) and not self.args.ds3_gather_for_generation) or self.is_fsdp_enabled
            completion_ids, completion_mask, finished = generate(
                actor_critic,
                prompt_ids,
                prompt_mask,
                self.generation_config,
                self.stop_token_ids,
                drop_ended=self.args.length_aware,
                synced_ranks=sharded,
            )
        ids = torch.cat([prompt_ids, completion_ids], dim=1)
        return ids, torch.cat([prompt_mask, completion_mask], dim=1), completion_mask, finished

    def _score(
        self, rows: list[dict], completion_ids: Tensor, mask: Tensor, finished: Tensor, metrics: MetricAverages
    ) -> Tensor:
        """(B,) score of each completion, NaN where it has none."""
        prompts = [row["prompt"] for row in rows]
        conversational = is_conversational({"prompt": prompts[0]})
        completions, ids = completions_of(completion_ids, mask, self.processing_class, conversational)
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        columns |= {"trainer_state": self.state, "log_metric": metrics.add}
        columns["is_evaluation"] = metrics is self._eval_metrics
        scores, by_function = self.reward_functions(prompts, completions, ids, columns)
        if len(by_function) > 1:
            for name, values in by_function.items():
                applies = values[values.isfinite()]
                metrics.add(f"reward/{name}_mean", applies.sum() / max(len(applies), 1), len(applies))
        scores = shape_scores(scores.to(mask.device), finished, prompts, self.args, metrics)
        if self.args.log_completions:
            self.completion_files.write(self.state.global_step, prompts, completions, scores)
        return scores

    def _above_siblings(self, scores: Tensor, rows: list[dict]) -> Tensor:
        """(B,) scores less the mean of their prompt's other completions, on whichever ranks these are."""
        digests = torch.tensor([prompt_digest(row["prompt"]) for row in rows], device=scores.device)
        everywhere, prompts = self.accelerator.gather(scores), self.accelerator.gather(digests)
        start = self.accelerator.process_index * len(scores)
        return above_siblings(everywhere, prompts)[start : start + len(scores)]

    # ---- One micro-batch --------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> Rollout:
        """Trainer's hook before each micro-batch: collect when the last rollout is used up, then cut a slice."""
        args, state = self.args, self.ppo_state
        if state.position == 0:
            with state_rescued(self):
                self._rollout = self._collect(inputs)
            state.rollouts += 1
        step, micro = divmod(state.position, args.gradient_accumulation_steps)
        epoch, mini_batch = divmod(step, args.num_mini_batches)
        size = args.gradient_accumulation_steps * args.per_device_train_batch_size
        order = self._row_order(epoch)[mini_batch * size : (mini_batch + 1) * size]
        self._makes_gradients = micro == 0
        if self._makes_gradients:
            tokens = token_count(self._rollout.completion_mask[order], all_sum=self._all_sum)
            self.update_guard.begin(tokens)
            self._global_tokens = tokens.clamp(min=1)
        state.position += 1
        if state.position == args.updates_per_rollout * args.gradient_accumulation_steps:
            state.position = 0
        rows = order[self.passes.micro_batches(self._rollout.attention_mask[order])[micro]]
        part = self._rollout.rows(rows)
        return part.without_padding() if args.length_aware else part

    def _row_order(self, epoch: int) -> Tensor:
        """Rows of this process in the order in which one PPO epoch visits them."""
        if self.args.num_mini_batches == 1:
            return torch.arange(self.args.rollout_size)
        # A generator of its own: the order depends on nothing that a resumed run would have to restore.
        seed = hash((self.args.seed, self.ppo_state.rollouts, epoch, self.accelerator.process_index)) % 2**31
        return torch.randperm(self.args.rollout_size, generator=torch.Generator().manual_seed(seed))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Rollout,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Clipped policy loss plus weighted value loss of one micro-batch, normalised by the mini-batch's tokens."""
        args, mask = self.args, inputs.completion_mask
        rollout = self.ppo_state.rollouts
        scores = self.passes.for_update(inputs.input_ids, inputs.attention_mask, mask.shape[1], rollout)
        policy = clipped_policy_loss(
            scores.logprobs,
            inputs.old_logprobs,
            inputs.advantages,
            args.clip_range,
            args.clip_range_high,
            mask=mask,
            dual_clip=args.dual_clip,
        )
        value = clipped_value_loss(scores.values, inputs.values, inputs.returns, args.value_clip_range, mask=mask)
        # Weight 0 rather than no term: DDP expects a gradient, if only zero, from every parameter.
        policy_weight = 0.0 if rollout <= args.critic_warmup_rollouts else 1.0
        per_token = policy_weight * policy.loss + args.vf_coef * value.loss
        if args.entropy_coef:
            per_token = per_token - policy_weight * args.entropy_coef * scores.entropy
        add_update_metrics(self._train_metrics, policy, value, scores.values, scores.entropy, mask)
        loss = global_token_mean(
            per_token, mask, global_count=self._global_tokens, world_size=self.accelerator.num_processes
        )
        return self.update_guard.watch(inputs, scores.logprobs, scores.values, loss)

    # ---- Evaluation -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prediction_step(self, model: Any, inputs: list[dict], *_: Any, **__: Any) -> tuple[None, None, None]:
        """Complete and score held-out prompts; there is no loss."""
        ids, mask, completion_mask, finished = self._sample(inputs)
        num_tokens = completion_mask.shape[1]
        scores = self._score(inputs, ids[:, -num_tokens:], completion_mask, finished, self._eval_metrics)
        policy, reference = self.passes.without_graph(ids, mask, num_tokens)
        kl = masked_sum(policy.logprobs - reference.logprobs, completion_mask, dim=1)
        rows = torch.stack([scores, kl, completion_mask.sum(1).float(), finished.float()], dim=1)
        # Short last batches are filled up with copies of earlier rows, which this gather removes.
        self._eval_scores.append(self.accelerator.gather_for_metrics(rows).cpu())
        return None, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Scores of held-out prompts: centre, tail, KL to the reference."""
        self._eval_scores = []
        with state_rescued(self):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        scores, kl, lengths, finished = torch.cat(self._eval_scores).unbind(1)
        summary = score_summary(scores, self.ppo_state.tail_threshold)
        summary |= {
            "kl/reference": kl.mean().item(),
            "completion/length_mean": lengths.mean().item(),
            "completion/finished_share": finished.mean().item(),
            "num_completions": len(scores),
        }
        summary |= self._eval_metrics.read(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in summary.items()})
        return output

    # ---- Data, optimiser, wrapping ----------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Each item is this process's prompts of one rollout, repeated for every micro-batch that uses the rollout."""
        args, column = self.args, self.args.prompt_weight_column
        sampler = RolloutSampler(
            len(self.train_dataset),
            block=args.rollout_size * self.accelerator.num_processes // args.num_generations,
            num_generations=args.num_generations,
            repeats=args.updates_per_rollout * args.gradient_accumulation_steps,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            epoch=lambda: int((self.state.epoch or 0) + 1e-6),
            weights=None if column is None else prompt_weights(self.train_dataset, column),
        )
        loader = DataLoader(self.train_dataset, batch_size=args.rollout_size, sampler=sampler, collate_fn=list)
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers, with a learning rate of its own for the critic where one is set."""
        if self.optimizer is not None or self.args.critic_learning_rate is None:
            return super().create_optimizer(model)
        module = model or self.model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, module)
        critic = {id(p) for p in self.accelerator.unwrap_model(module).critic_parameters()}
        trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = optimizer_class(
            [
                {"params": [p for p in trained if id(p) not in critic]},
                {"params": [p for p in trained if id(p) in critic], "lr": self.args.critic_learning_rate},
            ],
            **options,
        )
        return self.optimizer

    def _all_sum(self, total: Tensor) -> Tensor:
        return self.accelerator.reduce(total, reduction="sum")

    # ---- Logging ----------------------------------------------------------------------------------------------

    def _log_rollout(self, scores: Tensor, log_ratio: Tensor, mask: Tensor, finished: Tensor) -> None:
        args, state, metrics = self.args, self.ppo_state, self._train_metrics
        gathered = self.accelerator.gather(scores)
        if state.tail_threshold is None and gathered.isfinite().any():
            state.tail_threshold = float(gathered[gathered.isfinite()].float().quantile(0.05))
        for name, value in score_summary(gathered, state.tail_threshold).items():
            metrics.add(name, value)
        add_rollout_metrics(metrics, log_ratio, mask, finished)
        metrics.add("kl/coef", state.kl_coef * state.kl_response)
        if args.kl_target is not None:
            kl = masked_mean(masked_sum(log_ratio, mask, dim=1), scores.isfinite(), all_sum=self._all_sum).item()
            state.kl_coef = next_kl_coef(state.kl_coef, kl, args.kl_target, args.kl_horizon, len(gathered))
            state.kl_response = kl_response(kl, args.kl_target, args.kl_gain)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last log."""
        if self.model.training:
            logs = {**logs, **self._train_metrics.read(self.accelerator)}
        super().log(logs, start_time)

    def _send_telemetry(self) -> None:
        """Nothing is reported to anybody."""
