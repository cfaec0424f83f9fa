"""How a frozen model reads prompts and completions: its own tokenizer and template, in batches of similar length."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from reward.loading import load_config, load_model, load_tokenizer
from reward.released import is_released, load_released


class ModelReader:
    """A frozen model with the tokenizer it reads by.

    Args:
        model: put into evaluation mode, without gradients.
        tokenizer: the model's own; it is set to pad on the right and to truncate on the left.
        batch_size: texts per forward pass. They are sorted by length, so padding costs little.
        max_length: longest text in tokens; unset: the model's context. Longer texts lose their beginning, which
            keeps the answer.

    Attributes:
        truncated_share: share of the texts of the last call that lost their beginning.

    Raises:
        ValueError: the tokenizer cannot pad.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.tokenizer.padding_side, self.tokenizer.truncation_side = "right", "left"
        if self.tokenizer.pad_token_id is None:
            name = model.config.name_or_path
            raise ValueError(f"The tokenizer of the reward model {name} has no pad token; set tokenizer.pad_token.")
        self.max_length = max_length or context_length(model, tokenizer)
        self.truncated_share = 0.0

    @property
    def module(self) -> PreTrainedModel:
        """The model itself, where a launch has wrapped it."""
        return getattr(self.model, "module", self.model)

    def prepare(self, accelerator: Any) -> None:
        """Place the model for a launch: sharded under ZeRO-3, a copy on each device otherwise."""
        if accelerator.state.deepspeed_plugin is not None and accelerator.state.deepspeed_plugin.zero_stage == 3:
            from trl.models import prepare_deepspeed

            self.model = prepare_deepspeed(self.model, accelerator)
        else:
            self.model = self.model.to(accelerator.device)

    def token_ids(self, prompts: Sequence, completions: Sequence) -> list[list[int]]:
        """Prompt and completion as one text each, in tokens, with at most `max_length` of them."""
        check_counts(prompts, completions)
        if not len(prompts):
            return []
        templated = is_conversational(prompts)
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        if templated:
            texts = [self.tokenizer.apply_chat_template(messages, tokenize=False) for messages in texts]
        ids = self.tokenizer(texts, add_special_tokens=not templated, return_attention_mask=False)["input_ids"]
        self.truncated_share = sum(len(row) > self.max_length for row in ids) / max(len(ids), 1)
        return [row[-self.max_length :] for row in ids]

    @torch.no_grad()
    def read(self, ids: Sequence[list[int]], take: Callable[[Any, Tensor], Tensor], **inputs: Any) -> list[Tensor]:
        """What `take` makes of the model's output for each text, on the CPU, float32, in the order given.

        Args:
            ids: tokens of each text.
            take: from the output of a batch and its attention mask (B, T) to a tensor (B, ...).
            inputs: further arguments of the forward pass; a callable is given the attention mask.
        """
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        device = self._device()
        rows: list[Tensor] = [torch.empty(0)] * len(ids)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt").to(device)
            mask = batch["attention_mask"]
            further = {name: value(mask) if callable(value) else value for name, value in inputs.items()}
            output = self.model(input_ids=batch["input_ids"], attention_mask=mask, **further)
            for i, value in zip(chosen, take(output, mask).float().cpu(), strict=True):
                rows[i] = value
        return rows

    def _device(self) -> torch.device:
        parameter = next(self.model.parameters())
        wanted = PartialState().device
        # TRL's trainers know nothing of `prepare`; the first call moves the model for them.
        if parameter.device != wanted and not hasattr(parameter, "ds_id"):
            self.model = self.model.to(wanted)
        return wanted


def open_reader(
    model: str | PreTrainedModel,
    model_class: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> ModelReader:
    """A model, or what lies under a path or hub id, ready to read.

    Args:
        model: the model, or where it is; a published reward model is opened without its code.
        model_class: transformers' auto class that loads it.
        tokenizer: unset: loaded beside the model.
        batch_size, max_length: of the `ModelReader`.
        dtype: of the weights, "auto" takes the checkpoint's.
        trust_remote_code: allow models that ship their own Python code.
    """
    name = model if isinstance(model, str) else model.config.name_or_path
    if isinstance(model, str):
        config = load_config(model, trust_remote_code=trust_remote_code)
        with whole_weights():
            if is_released(config):
                model = load_released(name, dtype=dtype)
            else:
                model = load_model(model_class, name, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer or load_tokenizer(name, trust_remote_code=trust_remote_code)
    return ModelReader(model, tokenizer, batch_size=batch_size, max_length=max_length)


def is_conversational(prompts: Sequence) -> bool:
    """Whether prompts are message lists, which need a chat template, rather than text."""
    return len(prompts) > 0 and not isinstance(prompts[0], str)


def check_counts(prompts: Sequence, completions: Sequence) -> None:
    """Refuses prompts and completions that are not pairs."""
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions: one completion per prompt.")


@contextmanager
def whole_weights():
    """Load complete weights although ZeRO-3 is on: its sharded loading belongs to the model that is trained.

    A frozen model loaded as shards answers only through a DeepSpeed engine of its own, which it gets in `prepare`.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


def context_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens that a model and its tokenizer admit."""
    config = model.config
    text_config = getattr(config, "backbone_config", None) or config.get_text_config()
    limits = [getattr(text_config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min(int(limit) for limit in limits if limit)
