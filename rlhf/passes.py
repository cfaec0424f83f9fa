"""Forward passes of policy, critic and reference over a rollout: as few as possible, and without padding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.critic import CompletionScores
from rlhf.host_memory import release_idle_memory, trim_heap

Forward = Callable[[Tensor, Tensor, int], CompletionScores]


class ForwardPasses:
    """The passes of one trainer.

    Where one update trains on the whole rollout in one micro-batch, its first pass would repeat the one that gave the
    old log-probabilities: same weights, same rows. That one is then kept with its graph and serves both. With several
    micro-batches all their graphs would have to be held, which micro-batches are there to avoid, and active dropout
    makes the two passes differ; then each is run.

    Args:
        trainer: a `PPOTrainer`; its wrapped model, accelerator and settings are read when they are needed.
        reference: frozen policy, prepared for the launch; None: the policy without its adapter.
    """

    def __init__(self, trainer: Any, reference: torch.nn.Module | None):
        self.trainer, self.args, self.reference = trainer, trainer.args, reference
        self.keeps_graph = (
            self.args.gradient_accumulation_steps * self.args.num_mini_batches == 1 and self.args.disable_dropout
        )
        self._kept: CompletionScores | None = None

    def collect(
        self, ids: Tensor, mask: Tensor, num_tokens: int, rollout: int
    ) -> tuple[CompletionScores, CompletionScores]:
        """What policy with critic, and reference, say about the sampled tokens of a rollout that is to be trained on.

        Args:
            ids: (B, P + T).
            mask: (B, P + T).
            num_tokens: T.
            rollout: its number, counted from 1.
        """
        if not self.keeps_graph:
            scores = self.without_graph(ids, mask, num_tokens)
            self.release_idle()
            return scores
        reference = self._reference_scores(ids, mask, num_tokens)
        self.release_idle()
        # The policy comes last: wrappers that gather or reduce want a backward pass to follow its own forward pass.
        self.trainer.model_wrapped.train()
        with torch.enable_grad():
            self._kept = self._policy_scores(ids, mask, num_tokens, rollout)
        trim_heap()
        return self._kept.detach(), reference

    def without_graph(self, ids: Tensor, mask: Tensor, num_tokens: int) -> tuple[CompletionScores, CompletionScores]:
        """The same in micro-batches, for numbers alone."""
        batches, cut = self.micro_batches(mask), self.args.length_aware
        reference = score_rows(self._reference_scores, ids, mask, num_tokens, batches, cut=cut)
        return score_rows(self._policy_scores, ids, mask, num_tokens, batches, cut=cut), reference

    def for_update(self, ids: Tensor, mask: Tensor, num_tokens: int, rollout: int) -> CompletionScores:
        """What the loss of one micro-batch needs, with its graph."""
        kept, self._kept = self._kept, None
        return kept if kept is not None else self._policy_scores(ids, mask, num_tokens, rollout)

    def micro_batches(self, mask: Tensor) -> list[Tensor]:
        """Rows of each micro-batch of a mini-batch or of a rollout."""
        args = self.args
        return micro_batches(mask.sum(1), args.per_device_train_batch_size, args.length_aware)

    def _policy_scores(
        self, ids: Tensor, mask: Tensor, num_tokens: int, rollout: int | None = None
    ) -> CompletionScores:
        # Old log-probabilities come from the forward pass of the update, dtype and all: those kept from generation
        # differ by the rounding of its cache, and the first ratio would not be 1.
        options = {}
        if rollout is not None:
            options = {
                "with_entropy": True,
                "entropy_gradient": self.args.entropy_coef != 0,
                "detach_trunk": rollout <= self.args.critic_warmup_rollouts,
            }
        with self.trainer.compute_loss_context_manager():
            return self.trainer.model_wrapped(**self._inputs(ids, mask, num_tokens), **options)

    def _reference_scores(self, ids: Tensor, mask: Tensor, num_tokens: int) -> CompletionScores:
        inputs, model = self._inputs(ids, mask, num_tokens), self.trainer.model_wrapped
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            if self.reference is not None:
                return self.reference(**inputs, with_values=False)
            with self.trainer.accelerator.unwrap_model(model).reference():
                return model(**inputs, with_values=False)

    def release_idle(self) -> None:
        """After the last use of a frozen model in a rollout: what follows does not need its weights."""
        if self.trainer.accelerator.device.type == "cpu":
            release_idle_memory(in_use=self.trainer.model)

    def _inputs(self, ids: Tensor, mask: Tensor, num_tokens: int) -> dict[str, Any]:
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "num_completion_tokens": num_tokens,
            "temperature": self.args.temperature,
        }


def micro_batches(lengths: Tensor, size: int, by_length: bool = True) -> list[Tensor]:
    """Rows divided into micro-batches; every row is in one of them.

    Which rows share a micro-batch changes neither the loss nor the gradient of their mini-batch, because both are
    divided by its number of tokens, not by that of the micro-batch.

    Args:
        lengths: (B,) real tokens of each row.
        size: rows of a micro-batch.
        by_length: put rows of similar length together, the longest first, so that a batch that does not fit into
            memory fails at once; False keeps the order. A single micro-batch always keeps it.

    Returns:
        Row numbers, each (size,), the last perhaps fewer.
    """
    if len(lengths) <= size or not by_length:
        return list(torch.arange(len(lengths)).split(size))
    return list(lengths.cpu().argsort(descending=True, stable=True).split(size))


def bounds(attention_mask: Tensor, num_tokens: int) -> tuple[int, int]:
    """Columns that hold a real token: how many prompt columns come before them, and how many of the completion's do.

    Args:
        attention_mask: (B, P + T) true on real tokens: left-padded prompts, then completions.
        num_tokens: T.

    Returns:
        Columns of padding before the longest prompt, and tokens of the longest completion, at least 1.
    """
    # One transfer from the device, not one per bound.
    used = attention_mask.any(0).cpu()
    prompt, completion = used[:-num_tokens], used[-num_tokens:].nonzero()
    first = int(prompt.int().argmax()) if prompt.any() else 0
    return first, int(completion[-1]) + 1 if len(completion) else 1


def score_rows(
    forward: Forward, ids: Tensor, attention_mask: Tensor, num_tokens: int, batches: list[Tensor], *, cut: bool = True
) -> CompletionScores:
    """What `forward` says about every row, computed on micro-batches.

    Args:
        forward: (ids, attention mask, T) of a micro-batch -> its scores.
        ids: (B, P + T).
        attention_mask: (B, P + T).
        num_tokens: T.
        batches: from `micro_batches`.
        cut: each to its longest prompt and completion.

    Returns:
        Scores in the order of `ids`; 0 where a column was cut.
    """
    parts = []
    for rows in batches:
        first, longest = bounds(attention_mask[rows], num_tokens) if cut else (0, num_tokens)
        columns = slice(first, ids.shape[1] - num_tokens + longest)
        part = forward(ids[rows, columns], attention_mask[rows, columns], longest)
        parts.append([None if column is None else pad(column, (0, num_tokens - longest)) for column in part])
    order = torch.cat(batches).argsort()
    joined = (None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True))
    return CompletionScores(*(None if column is None else column[order] for column in joined))
