"""Completions of a batch of prompts: drawn by inverting the distribution function, ended rows decoded no further."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from rlhf.masking import completion_mask_from_ids

# Processors that keep nothing of a row from one token to the next. Others may: a repetition penalty remembers how
# long each row's prompt is, and would apply it to another row once one has left.
ROW_WISE: tuple[type, ...] = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


def generate(
    policy: torch.nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: GenerationConfig,
    stop_token_ids: list[int],
    *,
    uniforms: Tensor | None = None,
    drop_ended: bool = True,
    synced_ranks: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One completion for each prompt, with the KV cache, until all have ended.

    A token depends on its row's prompt and random numbers, not on the other rows, but for rounding: products of other
    shapes round otherwise, and a draw next to the border between two tokens falls on the other side. With 49,152
    tokens and float32 that was seen for 3 and 4 of some 1,000 draws. The law of the completions is the same.

    Args:
        policy: causal language model, or a module whose `generate` is that of one.
        prompt_ids: (B, P) left-padded.
        prompt_mask: (B, P) true on real tokens.
        config: sampling settings, among them the same stop tokens; without `do_sample` the likeliest token is taken.
        stop_token_ids: tokens that end a completion.
        uniforms: (B, max_new_tokens) float64 numbers in [0, 1), one per token; None: from torch's own generator.
        drop_ended: take rows that have ended out of the batch; False decodes padding for them. Rows stay all the same
            where the cache or a logits processor (one not in `ROW_WISE`) cannot lose them.
        synced_ranks: keep stepping until every rank is done (sharded weights take part in each other's forwards).

    Returns:
        (B, T) ids, (B, T) mask through the first stop token, (B,) whether a stop token came.

    Raises:
        ValueError: logits that are NaN or infinite, a decoding that keeps more than one candidate for a row, or a
            policy that takes no KV cache.
    """
    if config.num_beams not in (None, 1) or config.num_return_sequences not in (None, 1):
        raise ValueError(
            f"num_beams={config.num_beams}, num_return_sequences={config.num_return_sequences}: a completion is one "
            "draw; leave both at 1 and ask for several completions by num_generations or num_samples"
        )
    if uniforms is None:
        shape = (len(prompt_ids), config.max_new_tokens)
        uniforms = torch.rand(shape, dtype=torch.float64, device=prompt_ids.device)
    with torch.no_grad():
        sequences = policy.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            generation_config=config,
            custom_generate=DecodingLoop(uniforms, drop_ended=drop_ended, synced_ranks=synced_ranks),
        )
    completion_ids = sequences[:, prompt_ids.shape[1] :]
    mask, finished = completion_mask_from_ids(completion_ids, stop_token_ids)
    longest = int(mask.sum(-1).max())
    return completion_ids[:, :longest], mask[:, :longest], finished


class DecodingLoop:
    """The loop that `generate` of transformers runs in place of its own, after it has prepared inputs and processors.

    Its own loop reads padding for every row until the last one has ended: where lengths are spread evenly up to T
    tokens, half of what it reads.

    Args:
        uniforms: (B, T) numbers in [0, 1).
        drop_ended: see `generate`.
        synced_ranks: see `generate`.
    """

    def __init__(self, uniforms: Tensor, *, drop_ended: bool = True, synced_ranks: bool = False):
        self.uniforms, self.drop_ended, self.synced_ranks = uniforms, drop_ended, synced_ranks

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **prepared: Any,
    ) -> Tensor:
        """(B, P) prompts -> (B, P + t) prompts and completions, filled up with the pad token."""
        parameters = inspect.signature(model.forward).parameters
        if "past_key_values" not in parameters:
            raise ValueError(
                f"{type(model).__name__} takes no past_key_values: completions need a model with a KV cache"
            )
        once = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        state = _Live(input_ids, prepared, with_positions="position_ids" in parameters)
        filled = torch.full_like(self.uniforms, generation_config.pad_token_id, dtype=input_ids.dtype)
        drops = self.drop_ended and all(isinstance(processor, ROW_WISE) for processor in logits_processor)
        step, done = 0, False
        while True:
            output = model(**state.inputs(), use_cache=True, **once)
            # Nothing is drawn on a rank that is done: it only takes part in the others' forwards.
            if not done:
                scores = logits_processor(state.ids, output.logits[:, -1].to(torch.float32, copy=True))
                if generation_config.do_sample:
                    tokens = draw(scores, self.uniforms[state.rows, step])
                else:
                    tokens = scores.argmax(-1)
                tokens = tokens.where(~state.ended, filled.new_tensor(generation_config.pad_token_id))
                filled[state.rows, step] = tokens
                state.append(tokens, output.past_key_values)
                state.ended |= stopping_criteria(state.ids, None)
                step += 1
                done = bool(state.ended.all())
            else:
                state.append(state.ids[:, -1], output.past_key_values)
            if not self._any_rank(not done, input_ids.device):
                return torch.cat([input_ids, filled[:, :step]], dim=1)
            if drops:
                state.drop_ended()

    def _any_rank(self, goes_on: bool, device: torch.device) -> bool:
        if not self.synced_ranks:
            return goes_on
        count = torch.tensor(int(goes_on), device=device)
        torch.distributed.all_reduce(count)
        return bool(count)


class _Live:
    """The rows that are still in the batch: what they are, how far they have come, and their cache.

    Args:
        ids: (B, P) prompts.
        prepared: what `generate` prepared: the mask (None where nothing is padded), positions, an empty cache.
        with_positions: whether the model takes positions.
    """

    def __init__(self, ids: Tensor, prepared: dict[str, Any], with_positions: bool):
        self.ids, self.mask, self.cache = ids, prepared.get("attention_mask"), prepared.get("past_key_values")
        mask = torch.ones_like(ids) if self.mask is None else self.mask
        # Left padding must not shift the positions.
        self.positions = (mask.cumsum(-1) - 1).clamp(min=0) if with_positions else None
        self.rows = torch.arange(len(ids), device=ids.device)
        self.ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.width = ids.shape[1]  # columns that the next forward reads

    def inputs(self) -> dict[str, Any]:
        """Of the next forward pass."""
        inputs = {"input_ids": self.ids[:, -self.width :], "attention_mask": self.mask, "past_key_values": self.cache}
        return inputs if self.positions is None else inputs | {"position_ids": self.positions}

    def append(self, tokens: Tensor, cache: Any) -> None:
        """One more column."""
        self.ids, self.cache, self.width = torch.cat([self.ids, tokens.unsqueeze(1)], 1), cache, 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        if self.positions is not None:
            self.positions = self.positions[:, -1:] + 1

    def drop_ended(self) -> None:
        """Take rows out that have ended, all but one of them where all have."""
        # A copy of the cache costs about what one more token does: not for a single row of a large batch.
        if 16 * int(self.ended.sum()) < len(self.ended) or not _selects_rows(self.cache):
            return
        keep = (~self.ended).nonzero().squeeze(1)
        keep = keep if len(keep) else keep.new_zeros(1)
        self.cache.batch_select_indices(keep)
        for name in ("ids", "mask", "positions", "rows", "ended"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[keep])


def _selects_rows(cache: Any) -> bool:
    """Whether every layer of a cache can drop rows; static ones cannot."""
    layers = getattr(cache, "layers", None)
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens under softmax(scores), each by its row's own number, by inverting the distribution function.

        token = min {v : Σ_{w <= v} p_w > u}

    Args:
        scores: (B, V) logits; −inf forbids a token.
        uniforms: (B,) numbers in [0, 1).

    Returns:
        (B,) token ids, never one of probability 0.

    Raises:
        ValueError: logits that are NaN or +inf, or a row in which all are −inf.
    """
    # float64: 10⁵ float32 additions would shift the borders between tokens by more than a rare token's mass.
    mass = scores.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    total = mass[:, -1]
    if not bool(total.isfinite().all()):
        raise ValueError("the policy's logits are NaN or infinite, so there is nothing to draw from")
    # u·total may round up to the total, above which there is no token.
    below = torch.minimum(uniforms.to(mass) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(mass, below.unsqueeze(-1), right=True).squeeze(-1)
