"""From dataset rows to completions and what policy, reference and critic said about their tokens."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational

from rlhf.passes import bounds


@dataclass
class Rollout:
    """One process's share of a rollout. P: longest prompt, T: longest completion, both of this process."""

    input_ids: Tensor  # (B, P + T) left-padded prompt, completion
    attention_mask: Tensor  # (B, P + T) true on real tokens
    completion_mask: Tensor  # (B, T) true through the first stop token
    finished: Tensor  # (B,) ended with a stop token
    old_logprobs: Tensor  # (B, T) under the policy that generated
    ref_logprobs: Tensor  # (B, T) under the reference
    values: Tensor  # (B, T) before each token
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)
    scores: Tensor  # (B,) NaN for a completion that is left out

    def rows(self, index: Tensor) -> "Rollout":
        """The rollout of some rows."""
        return Rollout(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def without_padding(self) -> "Rollout":
        """The same rows without the columns in which none of them has a token."""
        num_tokens, width = self.completion_mask.shape[1], self.input_ids.shape[1]
        first, longest = bounds(self.attention_mask, num_tokens)
        text, completion = slice(first, width - num_tokens + longest), slice(longest)
        by_row = {"finished": self.finished, "scores": self.scores}
        cut = {f.name: getattr(self, f.name)[:, completion] for f in fields(self) if f.name not in by_row}
        cut |= {name: getattr(self, name)[:, text] for name in ("input_ids", "attention_mask")}
        return Rollout(**by_row, **cut)

    def check(self, rows: int) -> None:
        """Refuse tensors that are no rollout of so many rows.

        Raises:
            ValueError: with the tensor's name.
        """
        width, num_tokens = self.input_ids.shape[-1], self.completion_mask.shape[-1]
        for name, tensor in ((f.name, getattr(self, f.name)) for f in fields(self)):
            text, by_row = name in ("input_ids", "attention_mask"), name in ("finished", "scores")
            shape = (rows,) if by_row else (rows, width if text else num_tokens)
            if name in ("attention_mask", "completion_mask", "finished"):
                fits = tensor.dtype == torch.bool
            else:
                fits = tensor.dtype == torch.int64 if name == "input_ids" else tensor.is_floating_point()
            if not fits or tensor.shape != shape or num_tokens > width:
                raise ValueError(f"{name} of the rollout is {tensor.dtype} of shape {tuple(tensor.shape)}")

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name, for a checkpoint taken while the rollout is in use."""
        return {f.name: getattr(self, f.name).cpu().contiguous() for f in fields(self)}


class RolloutSampler(Sampler[int]):
    """Order of the training prompts: each block of prompts repeated for as many micro-batches as use it.

    The order of epoch e depends on the seed and on e alone, so a run resumed in epoch e continues it; a sampler that
    draws from a generator created once would start again with the first epoch's order.

    With weights a block is a systematic sample: prompt i is expected in it block · wᵢ / Σw times, exactly, and more
    than once only where that exceeds 1. Blocks are drawn independently, so an epoch does not visit every prompt.

    Args:
        num_prompts: size of the dataset.
        block: prompts of one rollout over all processes; a last, smaller block is left out.
        num_generations: completions per prompt.
        repeats: micro-batches that train on one rollout.
        seed: of the shuffle; None keeps the order of the dataset.
        epoch: tells the current epoch.
        weights: (num_prompts,) shares of the rollouts, up to a factor; None visits every prompt once an epoch.
    """

    def __init__(
        self,
        num_prompts: int,
        *,
        block: int,
        num_generations: int,
        repeats: int,
        seed: int | None,
        epoch: Callable[[], int],
        weights: Tensor | None = None,
    ):
        self.weights = None if weights is None else weights.double()
        self.num_prompts, self.block = num_prompts, block
        self.num_generations, self.repeats = num_generations, repeats
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        for block in self._blocks():
            for _ in range(self.repeats):
                for index in block:
                    yield from [index] * self.num_generations

    def _blocks(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed or 0) + 1_000_003 * self.epoch())
        if self.weights is not None:
            expected = self.block * self.weights / self.weights.sum()
            for _ in range(self.num_prompts // self.block):
                # In a new order each time, because a systematic sample never holds two neighbours of small weight.
                order = torch.randperm(self.num_prompts, generator=generator)
                marks = torch.arange(self.block) + torch.rand((), dtype=torch.float64, generator=generator)
                places = torch.searchsorted(expected[order].cumsum(0), marks, right=True)
                yield order[places.clamp(max=self.num_prompts - 1)].tolist()
            return
        order = range(self.num_prompts)
        if self.seed is not None:
            order = torch.randperm(self.num_prompts, generator=generator).tolist()
        for start in range(0, self.num_prompts - self.block + 1, self.block):
            yield list(order[start : start + self.block])

    def __len__(self) -> int:
        return self.num_prompts // self.block * self.block * self.num_generations * self.repeats


def prompt_digest(prompt: Any) -> int:
    """The same number for the same prompt on every rank; Python's own hash differs between processes."""
    return int.from_bytes(hashlib.blake2b(repr(prompt).encode(), digest_size=7).digest(), "big")


def prompt_texts(prompts: list, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None) -> list[str]:
    """Prompts as the policy reads them: messages through the chat template, text as it is."""
    if not prompts or not is_conversational({"prompt": prompts[0]}):
        return list(prompts)
    return [apply_chat_template({"prompt": p}, tokenizer, **(template_kwargs or {}))["prompt"] for p in prompts]


def tokenize_prompts(
    prompts: list, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None
) -> list[list[int]]:
    """Token ids of each prompt. A chat template brings its own special tokens, plain text gets the tokenizer's."""
    if not prompts:
        return []
    templated = is_conversational({"prompt": prompts[0]})
    texts = prompt_texts(prompts, tokenizer, template_kwargs)
    return tokenizer(texts, add_special_tokens=not templated, return_attention_mask=False)["input_ids"]


def left_pad(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(B, P) ids padded on the left and their (B, P) mask, which is built from lengths, never from ids."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (width - len(s)) + list(s) for s in sequences])
    mask = torch.tensor([[False] * (width - len(s)) + [True] * len(s) for s in sequences])
    return ids, mask


def completions_of(
    completion_ids: Tensor, mask: Tensor, tokenizer: PreTrainedTokenizerBase, conversational: bool
) -> tuple[list[Any], list[list[int]]]:
    """Completions as reward functions expect them (text, or one assistant message) and their unpadded ids."""
    ids = [row[keep].tolist() for row, keep in zip(completion_ids, mask, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if conversational:
        return [[{"role": "assistant", "content": text}] for text in texts], ids
    return texts, ids


class CompletionFiles:
    """One JSON line per completion, for people to read; a later evaluation of the same step replaces the file.

    Training does not need them: a disk that is full costs the files, with one warning, and not the run.

    Args:
        folder: of the files.
        rank: which writes them.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank, self._warned = folder, rank, False

    def write(self, step: int, prompts: list, completions: list, scores: Tensor) -> None:
        """The completions after so many steps of this rank."""
        file = self.folder / f"step_{step:06d}_rank_{self.rank}.jsonl"
        rows = zip(prompts, completions, scores.tolist(), strict=True)
        lines = [json.dumps({"prompt": p, "completion": c, "score": s}, ensure_ascii=False) for p, c, s in rows]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            with contextlib.suppress(OSError):
                # What there is of it would end in half a line.
                file.unlink(missing_ok=True)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the completions of step {step} could not be written ({error}). Training goes on without them "
                    "and says no more about it.",
                    stacklevel=2,
                )
