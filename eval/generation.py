"""Completions of a policy with their provenance, and how far the policy has moved from its base."""

import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from eval.policies import LoadedPolicy, load_policy
from eval.records import BadRowsError, Row, complete_rows, fingerprint, source_identity
from reward.tables import check_prompts
from rlhf.decoding import generate
from rlhf.losses import k1, k3, token_logprobs
from rlhf.models import stop_token_ids
from rlhf.rollout import completions_of, left_pad, tokenize_prompts

PACKAGES = ("torch", "transformers", "peft", "trl")


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn.

    Attributes:
        max_new_tokens: Longest completion, EOS included.
        temperature: Divides the logits; 0 takes the most likely token. KL is measured at the same temperature.
        top_p: Draw from the smallest set of tokens with this much probability; 1 for all.
        top_k: Draw from the k most likely tokens; 0 for all.
        num_samples: Completions per prompt.
        seed: With prompt id and sample number it fixes every draw.
        stop_tokens: Tokens that end a completion, beside the EOS tokens of tokenizer and model.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1
    seed: int = 0
    stop_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1], 1 for no limit"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not valid:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("temperature 0 gives the same completion every time; use num_samples=1 or temperature=1")

    @property
    def logprob_temperature(self) -> float:
        """The temperature of the law whose log-probabilities are recorded; greedy decoding has none, so 1."""
        return self.temperature or 1.0


def generate_completions(
    policy: str | Path | PreTrainedModel | PeftModel,
    prompts: datasets.Dataset | Sequence[str | list[dict]],
    *,
    name: str = "policy",
    base: str | Path | PreTrainedModel | None = None,
    decoding: Decoding | None = None,
    path: str | Path | None = None,
    batch_size: int = 32,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> list[Row]:
    """Completions of each prompt, one row each, in the order of the prompts and then of the samples.

    A draw depends on the seed, the prompt's id and the sample's number, and on nothing else: not on the batch, on
    the other prompts or on the number of processes but for rounding, which moves the few draws that fall on a border
    between two tokens (see `rlhf.decoding.generate`). Two policies that share a seed share their random numbers.

    Row: prompt_id, sample, prompt, completion, completion_tokens, finished, logprob, base_logprob, kl_k1_sum,
    kl_k3_mean, model, source, seed, decoding, versions, fingerprint. Log-probabilities are sums over the
    completion's tokens in nats, under softmax(logits / temperature). kl_k1_sum is their difference, whose mean over
    completions estimates KL(policy‖base) without bias, unless top_k or top_p cut the law that was drawn from;
    kl_k3_mean is the low-variance estimate per token. All three that need a base are None without one.

    Args:
        policy, base, tokenizer, dtype, trust_remote_code: As in `load_policy`.
        prompts: Texts or message lists, or a dataset with a `prompt` column and, if it has one, `prompt_id`.
        name: What tables call the policy.
        decoding: How to draw; None for `Decoding()`.
        path: JSONL file. Finished rows with the same settings are reused, rows with other settings are not.
        batch_size: Prompts generated together on each process.

    Raises:
        ValueError: No prompts, an empty or overlong one, prompt ids that occur twice.
    """
    decoding = decoding or Decoding()
    dataset = as_prompt_dataset(prompts)
    identity = {
        "policy": source_identity(policy) if isinstance(policy, str | Path) else _model_identity(policy),
        "base": source_identity(base) if isinstance(base, str | Path | None) else _model_identity(base),
        "name": name,
        "decoding": asdict(decoding),
        "prompts": fingerprint([list(dataset["prompt_id"]), list(dataset["prompt"])]),
        "dtype": dtype,
    }
    jobs = [
        {"prompt_id": row["prompt_id"], "sample": sample, "prompt": row["prompt"]}
        for row in dataset
        for sample in range(decoding.num_samples)
    ]
    generator = _Generator(
        lambda: load_policy(policy, base, tokenizer=tokenizer, dtype=dtype, trust_remote_code=trust_remote_code),
        dataset,
        decoding,
        name,
    )
    return complete_rows(
        jobs,
        generator,
        path=path,
        fingerprint=fingerprint(identity),
        batch_size=batch_size,
        cost=lambda job: len(str(job["prompt"])),
        description=f"generate {name}",
    )


def as_prompt_dataset(prompts: datasets.Dataset | Sequence[str | list[dict]]) -> datasets.Dataset:
    """Prompts as a dataset whose `prompt_id` column holds strings; missing ids are the row numbers.

    Raises:
        ValueError: No rows or no `prompt` column.
    """
    if not isinstance(prompts, datasets.Dataset):
        if len(prompts) == 0:
            raise ValueError("no prompts were given; evaluation needs at least two")
        prompts = datasets.Dataset.from_dict({"prompt": list(prompts)})
    if len(prompts) == 0 or "prompt" not in prompts.column_names:
        raise ValueError(
            f"the prompts need rows and a 'prompt' column; got {len(prompts)} rows with columns "
            f"{', '.join(prompts.column_names) or 'none'}"
        )
    check_prompts(prompts, "the prompt data set")
    ids = prompts["prompt_id"] if "prompt_id" in prompts.column_names else range(len(prompts))
    return datasets.Dataset.from_dict({"prompt_id": [str(i) for i in ids], "prompt": list(prompts["prompt"])})


def row_uniforms(seed: int, prompt_id: str, sample: int, length: int) -> np.ndarray:
    """(length,) numbers in [0, 1) that belong to one completion."""
    return np.random.default_rng([seed, zlib.crc32(prompt_id.encode()), sample]).random(length)


def completion_logprobs(
    model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_length: int, temperature: float
) -> Tensor:
    """Log-probability of each completion token under softmax(logits / temperature), from one forward pass.

    Args:
        model: Causal language model, with or without an adapter.
        input_ids: (B, P + T) prompts padded on the left, completions on the right.
        attention_mask: (B, P + T) true on real tokens.
        completion_length: T.
        temperature: Above 0.

    Returns:
        (B, T) float32; meaningless behind the completion's mask.
    """
    trunk = model.get_base_model() if isinstance(model, PeftModel) else model
    accepted = inspect.signature(trunk.forward).parameters
    extra: dict[str, Any] = {}
    if "position_ids" in accepted:
        # Left padding must not shift the positions; models differ in whether they see to that themselves.
        extra["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = completion_length + 1
    logits = model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False, **extra).logits
    return token_logprobs(logits[:, -completion_length - 1 : -1], input_ids[:, -completion_length:], temperature)


class _Generator:
    """Maps a batch of jobs to rows; loads the policy with the first batch, so a finished file costs nothing."""

    def __init__(self, load: Callable[[], LoadedPolicy], dataset: datasets.Dataset, decoding: Decoding, name: str):
        self.load, self.dataset, self.decoding, self.name = load, dataset, decoding, name
        self.policy: LoadedPolicy | None = None

    def __call__(self, jobs: list[Row]) -> list[Row]:
        if self.policy is None:
            self._start()
        with torch.no_grad(), plain_generation_config(self.policy.model):
            return self._rows(jobs)

    def _start(self) -> None:
        self.policy = self.load()
        model, tokenizer = self.policy.model, self.policy.tokenizer
        _check_prompts(self.dataset, tokenizer, model, self.decoding.max_new_tokens)
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None or self.pad_id == tokenizer.eos_token_id:
            # Every mask here is built from lengths and stop tokens, so any id can fill; but the shared rule for stop
            # tokens takes the pad token out of them, and EOS must stay in.
            self.pad_id = tokenizer.eos_token_id
            tokenizer.pad_token = None
        self.stop_ids = stop_token_ids(model, tokenizer, list(self.decoding.stop_tokens))
        self.provenance = {
            "model": self.name,
            "source": self.policy.source,
            "seed": self.decoding.seed,
            "decoding": asdict(self.decoding),
            "versions": {package: version(package) for package in PACKAGES},
        }

    def _rows(self, jobs: list[Row]) -> list[Row]:
        decoding, tokenizer = self.decoding, self.policy.tokenizer
        prompts = [job["prompt"] for job in jobs]
        ids, mask = left_pad(tokenize_prompts(prompts, tokenizer), self.pad_id)
        device = next(self.policy.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        completion_ids, completion_mask, finished = self._draw(ids, mask, jobs)
        everything, real = torch.cat([ids, completion_ids], 1), torch.cat([mask, completion_mask], 1)
        length, temperature = completion_ids.shape[1], decoding.logprob_temperature
        logprobs = completion_logprobs(self.policy.model, everything, real, length, temperature)
        base_logprobs = None
        if self.policy.is_base:
            base_logprobs = logprobs
        elif self.policy.base is not None:
            with self.policy.as_base() as base:
                base_logprobs = completion_logprobs(base, everything, real, length, temperature)
        texts, _ = completions_of(completion_ids, completion_mask, tokenizer, conversational=False)
        rows = []
        for i, (job, text) in enumerate(zip(jobs, texts, strict=True)):
            keep = completion_mask[i]
            rows.append(
                {
                    **job,
                    "completion": text,
                    "completion_tokens": int(keep.sum()),
                    "finished": bool(finished[i]),
                    **_distances(logprobs[i][keep], None if base_logprobs is None else base_logprobs[i][keep]),
                    **self.provenance,
                }
            )
        return rows

    def _draw(self, ids: Tensor, mask: Tensor, jobs: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) completion ids, their (B, T) mask, and (B,) whether a stop token came."""
        decoding = self.decoding
        law = {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p}
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            use_cache=True,
            pad_token_id=self.pad_id,
            eos_token_id=self.stop_ids,
            disable_compile=True,
            **({"do_sample": True, **law} if decoding.temperature > 0 else {"do_sample": False}),
        )
        uniforms = [
            row_uniforms(decoding.seed, job["prompt_id"], job["sample"], decoding.max_new_tokens) for job in jobs
        ]
        uniforms = torch.from_numpy(np.stack(uniforms)).to(ids.device)
        return generate(self.policy.model, ids, mask, config, self.stop_ids, uniforms=uniforms)


@contextmanager
def plain_generation_config(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within this context the checkpoint's own generation defaults are gone.

    `generate` fills settings that are left open from them: a checkpoint with a repetition penalty would be evaluated
    with it, and the report would not say so.
    """
    trunk = model.get_base_model() if isinstance(model, PeftModel) else model
    kept = trunk.generation_config
    trunk.generation_config = GenerationConfig(bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id)
    try:
        yield
    finally:
        trunk.generation_config = kept


def _check_prompts(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module, max_new_tokens: int
) -> None:
    """Refuses prompts that would fail in the middle of a run."""
    for prompt_id, prompt in zip(dataset["prompt_id"], dataset["prompt"], strict=True):
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise BadRowsError(f"the prompt with id {prompt_id!r} is empty; remove it from the prompts")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    lengths = [len(ids) for ids in tokenize_prompts(list(dataset["prompt"]), tokenizer)]
    long = [i for i, length in enumerate(lengths) if length + max_new_tokens > context]
    if long:
        raise BadRowsError(
            f"{len(long)} of {len(lengths)} prompts leave no room for {max_new_tokens} new tokens in a context of "
            f"{context} (the first has id {dataset['prompt_id'][long[0]]!r} and {lengths[long[0]]} tokens); remove "
            "them or lower max_new_tokens"
        )


def _distances(logprobs: Tensor, base_logprobs: Tensor | None) -> Row:
    """Sums over one completion's tokens, (T,) each."""
    row: Row = {"logprob": _finite(logprobs.double().sum())}
    if base_logprobs is None:
        return row | {"base_logprob": None, "kl_k1_sum": None, "kl_k3_mean": None}
    log_ratio = (logprobs - base_logprobs).double()
    return row | {
        "base_logprob": _finite(base_logprobs.double().sum()),
        "kl_k1_sum": _finite(k1(log_ratio).sum()),
        "kl_k3_mean": _finite(k3(log_ratio).mean()),
    }


def _finite(value: Tensor) -> float | None:
    """JSON has no infinity: a token that the base forbids leaves None."""
    return float(value) if math.isfinite(value) else None


def _model_identity(model: torch.nn.Module) -> list:
    """A checksum of the weights of a model that has no path."""
    return [
        [n, float(p.detach().double().sum()), float(p.detach().double().norm())] for n, p in model.named_parameters()
    ]
