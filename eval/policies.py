"""Policies as they are found on disk: whole models, PEFT adapters on a base, or objects in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from reward.loading import clear_errors, load_adapter, load_model, load_tokenizer
from rlhf.adapters import fuse_adapters
from rlhf.head_input import close_gaps, widen_few_rows


@dataclass
class LoadedPolicy:
    """A policy ready to generate, and the base that its KL is measured against.

    Attributes:
        model: The policy, in evaluation mode.
        tokenizer: Its tokenizer.
        base: A model of its own; the policy itself, when it has an adapter to switch off or *is* the base; None
            when no KL is wanted.
        source: Path or id, for the record.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel | PeftModel | None
    source: str

    @property
    def is_base(self) -> bool:
        """Whether policy and base are one and the same, so that the KL is exactly zero."""
        return self.base is self.model and not isinstance(self.model, PeftModel)

    @contextmanager
    def as_base(self) -> Iterator[torch.nn.Module]:
        """The base model, within this context."""
        if self.base is self.model and isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.model
        else:
            yield self.base


def load_policy(
    policy: str | Path | PreTrainedModel | PeftModel,
    base: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> LoadedPolicy:
    """Loads a policy, and its base if one is wanted, on this process's device.

    Args:
        policy: Folder or hub id of a causal language model, folder or id of a PEFT adapter, or a model.
        base: What KL is measured against. None for no KL, except that an adapter is measured against the model it
            sits on, which is at hand.
        tokenizer: None loads it from the policy's folder, or where that has none, from the base's.
        dtype: Of the weights; "auto" takes the checkpoint's.
        trust_remote_code: Allow models that ship their own Python code.

    Raises:
        ValueError: The path is a folder without a model, an adapter's base cannot be loaded, or policy and base have
            different vocabularies.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if isinstance(policy, str | Path):
        source = str(policy)
        model, trunk = _load_model(source, options)
    else:
        model, source, trunk = policy, policy.config.name_or_path or type(policy).__name__, None
    places = [str(place) for place in (source, trunk, base) if isinstance(place, str | Path)]
    if isinstance(base, str | Path):
        base = model if same_source(base, trunk) else load_model(AutoModelForCausalLM, base, **options)
    elif base is None and isinstance(model, PeftModel):
        base = model
    tokenizer = tokenizer or _load_tokenizer(places, trust_remote_code)
    if base is not None and _vocabulary(base) != _vocabulary(model):
        raise ValueError(
            f"policy {source} has {_vocabulary(model)} tokens and its base {_vocabulary(base)}: KL between different "
            "vocabularies has no meaning. Give the base that the policy was trained from, or none."
        )
    for part in (model, base):
        if part is not None:
            part.to(PartialState().device).eval()
            fuse_adapters(part)
    for head in {id(part): part.get_output_embeddings() for part in (model, base) if part is not None}.values():
        if head is not None:
            head.register_forward_pre_hook(lambda _, inputs: close_gaps(inputs))
            widen_few_rows(head)
    return LoadedPolicy(model, tokenizer, base, source)


def adapter_config(source: str | Path) -> PeftConfig | None:
    """The config of a PEFT adapter, or None where the path or id holds something else."""
    if Path(source).is_dir():
        if not (Path(source) / "adapter_config.json").exists():
            return None
        with clear_errors(f"the adapter {source}"):
            return PeftConfig.from_pretrained(str(source))
    try:
        return PeftConfig.from_pretrained(str(source))
    except ValueError:
        return None


def same_source(first: str | Path | None, second: str | Path | None) -> bool:
    """Whether two paths or ids name the same model."""
    if first is None or second is None:
        return False
    if Path(first).exists() and Path(second).exists():
        return Path(first).resolve() == Path(second).resolve()
    return str(first) == str(second)


def check_source(source: str | Path) -> None:
    """Refuses a folder that holds no model, before anything is loaded.

    Raises:
        ValueError: The folder has neither a model nor an adapter, or what looks like a folder does not exist.
    """
    path = Path(source)
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"{source} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    elif path.is_absolute() or len(path.parts) > 2 or str(source).startswith("."):
        # A hub id has at most one slash; anything longer was meant as a folder.
        raise ValueError(f"{source} does not exist; give a folder with a model, or a hub id")


def _load_model(source: str, options: dict[str, Any]) -> tuple[PreTrainedModel | PeftModel, str]:
    """The model, and the path or id of the weights that it is when any adapter is switched off."""
    check_source(source)
    adapter = adapter_config(source)
    if adapter is None:
        return load_model(AutoModelForCausalLM, source, **options), source
    trunk = str(adapter.base_model_name_or_path)
    try:
        model = load_model(AutoModelForCausalLM, trunk, **options)
    except OSError as error:
        # Any other model would load as well, and the adapter would do something else on it.
        raise ValueError(
            f"the adapter {source} sits on {trunk}, which cannot be loaded ({error}); put that model there, or "
            "correct base_model_name_or_path in its adapter_config.json"
        ) from error
    return load_adapter(model, source), trunk


def _load_tokenizer(places: list[str], trust_remote_code: bool) -> PreTrainedTokenizerBase:
    for place in places:
        try:
            return load_tokenizer(place, trust_remote_code=trust_remote_code)
        except (OSError, ValueError):
            continue
    raise ValueError(
        f"no tokenizer found in {' or '.join(dict.fromkeys(places))}; save it beside the policy or pass it"
    )


def _vocabulary(model: PreTrainedModel | PeftModel) -> int:
    return model.config.get_text_config().vocab_size
