"""Loading of policy, reference, critic trunk and tokenizer."""

import copy
from typing import Any

import torch
from accelerate.utils import fsdp2_prepare_model
from peft import PeftConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.models import prepare_deepspeed, prepare_fsdp

from reward import loading
from rlhf.config import PPOConfig
from rlhf.critic import ActorCritic

# Of `model_init_kwargs`: where files come from, for the tokenizer as for the weights.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")


def load_policy(model: str | PreTrainedModel, args: PPOConfig) -> PreTrainedModel:
    """The policy, loaded from a folder or hub id, or as given.

    Weights are float32 unless `model_init_kwargs` sets a dtype: Adam updates of size 1e-6 vanish in bfloat16.
    """
    if not isinstance(model, str):
        return model
    return loading.load_model(AutoModelForCausalLM, model, **_init_kwargs(args))


def load_reference(policy: PreTrainedModel, source: str | PreTrainedModel, args: PPOConfig) -> PreTrainedModel:
    """A frozen copy of the policy as it starts.

    Raises:
        ValueError: the policy is sharded by ZeRO-3 and was given as an object, so that no whole copy exists.
    """
    if isinstance(source, str):
        reference = load_policy(source, args)
    elif any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        raise ValueError("Under ZeRO-3 pass the policy as a path or hub id: its reference is loaded from there.")
    else:
        reference = copy.deepcopy(policy)
    return reference.eval().requires_grad_(False)


def load_critic_trunk(policy_source: str | PreTrainedModel, args: PPOConfig) -> PreTrainedModel:
    """The trunk of a separate critic, from `critic_model` or from where the policy came.

    Raises:
        ValueError: the policy was given as an object and no `critic_model` names a source.
    """
    source = args.critic_model or (policy_source if isinstance(policy_source, str) else None)
    if source is None:
        trunk = getattr(policy_source, policy_source.base_model_prefix, None)
        if trunk is None:
            raise ValueError("critic='separate' needs critic_model, because the policy was passed as an object.")
        return copy.deepcopy(trunk)
    options = _init_kwargs(args)
    if args.critic_model is not None:
        # A revision is a commit of the policy's repository, which the critic's knows nothing of.
        options.pop("revision", None)
    return loading.load_model(AutoModel, source, **options)


def load_tokenizer(
    source: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: PPOConfig
) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, padding on the left, with a pad token that is not EOS.

    Raises:
        ValueError: no pad token, or the pad token equals EOS.
    """
    if tokenizer is None:
        name = source if isinstance(source, str) else source.config.name_or_path
        given = args.model_init_kwargs or {}
        hub = {key: given[key] for key in HUB_ARGUMENTS if key in given}
        tokenizer = loading.load_tokenizer(name, trust_remote_code=args.trust_remote_code, **hub)
    if args.pad_token is not None:
        # Not by id: a pad token that is the unknown token too, as SmolLM2 has it, is in the vocabulary all the same.
        if args.pad_token not in tokenizer.get_vocab():
            raise ValueError(f"pad_token {args.pad_token!r} is not in the tokenizer's vocabulary.")
        tokenizer.pad_token = args.pad_token
    remedy = (
        "Choose a token that the model never has to produce, for example pad_token='<|endoftext|>' "
        f"(this tokenizer's special tokens: {', '.join(sorted(set(tokenizer.all_special_tokens)))})."
    )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"The tokenizer has no pad token. {remedy}")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"The pad token equals the EOS token ({tokenizer.eos_token!r}): nobody can tell an ended "
            f"completion from padding by its ids. {remedy}"
        )
    tokenizer.padding_side = "left"
    return tokenizer


def stop_token_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: list[str] | None) -> list:
    """Every token that ends a completion: the tokenizer's EOS, the model's, and the run's own.

    One list serves generation, truncation and the missing-EOS check, so the three cannot disagree.

    Raises:
        ValueError: a stop token is no single token of the vocabulary, or is the pad token.
    """
    eos = policy.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(eos if isinstance(eos, list | tuple) else [eos])]
    for token in stop_tokens or []:
        found = tokenizer.convert_tokens_to_ids(token)
        if found is None or found == tokenizer.unk_token_id:
            raise ValueError(f"stop token {token!r} is not a single token of the vocabulary.")
        ids.append(found)
    ids = sorted({i for i in ids if i is not None} - {tokenizer.pad_token_id})
    if not ids:
        raise ValueError("The policy has no EOS token and stop_tokens is empty: no completion could ever end.")
    return ids


def generation_config(
    args: PPOConfig, tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> GenerationConfig:
    """Plain sampling at the training temperature, unless `generation_kwargs` say otherwise."""
    settings = {
        "max_new_tokens": args.max_completion_length,
        "do_sample": True,
        "temperature": args.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stop_token_ids,
        "disable_compile": True,
    }
    return GenerationConfig(**settings | (args.generation_kwargs or {}))


def without_dropout(*modules: nn.Module | None) -> None:
    """Switch every dropout off: old and new log-probabilities must come from the same function."""
    for module in modules:
        for part in [] if module is None else module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0


def _init_kwargs(args: PPOConfig) -> dict[str, Any]:
    kwargs = dict(args.model_init_kwargs or {})
    kwargs.setdefault("dtype", torch.float32)
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return kwargs


def build_actor_critic(
    policy: PreTrainedModel, source: str | PreTrainedModel, args: PPOConfig, peft_config: PeftConfig | None
) -> tuple[ActorCritic, PreTrainedModel | None]:
    """Policy and critic as one module, and the reference where it needs weights of its own.

    Args:
        policy: loaded policy.
        source: where it came from, for its copies.
        args: settings.
        peft_config: adapter to train. The reference is then the policy without it, and a separate critic gets an
            adapter of the same shape instead of being trained whole.
    """
    reference = None if peft_config is not None else load_reference(policy, source, args)
    trunk = load_critic_trunk(source, args) if args.critic == "separate" else None
    if peft_config is not None:
        # ZeRO-3 gathers parameters of one dtype together; PEFT's float32 adapters beside a bfloat16 base break that.
        keep_dtype = {"autocast_adapter_dtype": not is_zero3(args)}
        # Copies, because PEFT writes module names into the config that it is given.
        if trunk is not None:
            adapter = copy.deepcopy(peft_config)
            adapter.task_type = TaskType.FEATURE_EXTRACTION  # a trunk has no language-model head
            trunk = get_peft_model(trunk, adapter, **keep_dtype)
        policy = get_peft_model(policy, copy.deepcopy(peft_config), **keep_dtype)
        if args.activation_checkpointing:
            policy.enable_input_require_grads()
    actor_critic = ActorCritic(policy, trunk)
    if args.disable_dropout:
        without_dropout(actor_critic, reference)
    return actor_critic, reference


def is_zero3(args: PPOConfig) -> bool:
    """Whether DeepSpeed splits the parameters themselves over the processes."""
    plugin = args.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def prepare_reference(reference: PreTrainedModel | None, trainer: Any) -> nn.Module | None:
    """The frozen reference placed as the launch of this trainer wants it: sharded where the policy is."""
    if reference is None:
        return None
    frozen, accelerator = ActorCritic(reference).requires_grad_(False), trainer.accelerator
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(frozen, accelerator)
    if trainer.is_fsdp_enabled:
        if accelerator.is_fsdp2:
            # TRL's `prepare_fsdp` would gather all layers at once.
            return fsdp2_prepare_model(accelerator, frozen).eval()
        return prepare_fsdp(frozen, accelerator)
    return accelerator.prepare_model(frozen, evaluation_mode=True)
