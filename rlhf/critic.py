"""Policy and critic as one module, so that one wrapper (DDP, DeepSpeed, FSDP) and one optimiser hold both."""

import inspect
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from reward.heads import Float32Linear
from rlhf.head_input import close_gaps, widen_few_rows
from rlhf.losses import token_logprobs, token_logprobs_and_entropy

CRITIC_DIR = "critic"


class CompletionScores(NamedTuple):
    """What one forward pass says about the tokens of a completion; each (B, T) or None."""

    logprobs: Tensor
    values: Tensor | None
    entropy: Tensor | None

    def detach(self) -> "CompletionScores":
        """The same numbers without their graph."""
        return CompletionScores(*(None if column is None else column.detach() for column in self))


class ValueHead(nn.Module):
    """One linear map from a hidden state to the expected return, zero at the start.

    Zero weights make the first values exactly 0 on every rank and under every ZeRO stage, where a random
    initialisation would have to be gathered to be the same everywhere.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        # DeepSpeed may have cast the head to bfloat16, and autocast would round a float32 head all the same.
        self.linear = Float32Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) hidden states -> (...) values in float32."""
        return self.linear(hidden).squeeze(-1).float()


class ActorCritic(nn.Module):
    """A causal language model and its critic behind one `forward`.

    The value of token t is read from the state that predicts token t, i.e. before the token is known. With a shared
    trunk the value head reads the input of the language-model head; a separate critic runs its own trunk.

    Args:
        policy: causal language model, plain or wrapped by PEFT.
        critic_trunk: model without a head for a separate critic; None shares the policy's trunk.
    """

    supports_gradient_checkpointing = True

    def __init__(self, policy: nn.Module, critic_trunk: nn.Module | None = None):
        super().__init__()
        self.policy = policy
        self.critic_trunk = critic_trunk
        trunk_config = (critic_trunk or policy).config.get_text_config()
        self.value_head = ValueHead(trunk_config.hidden_size)
        self._shared_state: Tensor | None = None
        head = self._head_module()
        head.register_forward_pre_hook(self._take_head_input)
        widen_few_rows(head)

    def _head_module(self) -> nn.Module:
        head = self.policy.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(self.policy).__name__} has no language-model head: use a causal language model.")
        return head

    def _take_head_input(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        state, *rest = close_gaps(inputs)
        if self.critic_trunk is None:
            # Post-norm, already cut to the positions asked for, and no extra memory; `output_hidden_states` would
            # keep every layer's states alive.
            self._shared_state = state
        return (state, *rest)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_completion_tokens: int,
        temperature: float = 1.0,
        with_values: bool = True,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
        detach_trunk: bool = False,
    ) -> CompletionScores:
        """Log-probabilities, values and entropies of the last `num_completion_tokens` tokens.

        Args:
            input_ids: (B, P + T) left-padded prompts followed by completions.
            attention_mask: (B, P + T) true on real tokens.
            num_completion_tokens: T.
            temperature: divides the logits, as it did when the tokens were sampled.
            with_values: also run the critic.
            with_entropy: also compute the entropy of every next-token law.
            entropy_gradient: keep the graph of the entropy, two more (B, T, V) tables.
            detach_trunk: keep the value loss out of a shared trunk (critic warm-up).
        """
        # The state at position j predicts token j + 1; the last state predicts nothing that was sampled.
        width = input_ids.shape[1]
        keep = torch.arange(width - num_completion_tokens - 1, width - 1, device=input_ids.device)
        logits = self.policy(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **_position_ids(self.policy, attention_mask),
            logits_to_keep=keep,
        ).logits
        completion_ids = input_ids[:, -num_completion_tokens:]
        if with_entropy:
            logprobs, entropy = token_logprobs_and_entropy(
                logits, completion_ids, temperature, entropy_gradient=entropy_gradient
            )
        else:
            logprobs, entropy = token_logprobs(logits, completion_ids, temperature), None
        shared_state, self._shared_state = self._shared_state, None
        values = None
        if with_values:
            state = (
                shared_state if self.critic_trunk is None else self._critic_state(input_ids, attention_mask)[:, keep]
            )
            values = self.value_head(state.detach() if detach_trunk else state)
        return CompletionScores(logprobs, values, entropy)

    def _critic_state(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.critic_trunk(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            **_position_ids(self.critic_trunk, attention_mask),
        ).last_hidden_state

    def generate(self, **inputs: object) -> Tensor:
        """Token ids from the policy; FSDP gathers weights around methods of the module that it wraps alone."""
        return self.policy.generate(**inputs)

    @contextmanager
    def reference(self):
        """Within this context a PEFT policy answers as its base model does."""
        with self.policy.disable_adapter() if hasattr(self.policy, "disable_adapter") else nullcontext():
            yield self

    def critic_parameters(self) -> list[nn.Parameter]:
        """Parameters that only the critic uses."""
        modules = [self.value_head] if self.critic_trunk is None else [self.value_head, self.critic_trunk]
        return [parameter for module in modules for parameter in module.parameters()]

    def save_critic(self, directory: str | Path, state_dict: dict[str, Tensor]) -> None:
        """Write the critic beside the policy as safetensors.

        Args:
            directory: the policy's folder; the critic goes to its subfolder `critic`.
            state_dict: full state of this module, gathered by the caller.
        """
        folder = Path(directory) / CRITIC_DIR
        folder.mkdir(parents=True, exist_ok=True)
        own = {k: v.contiguous().cpu() for k, v in state_dict.items() if not k.startswith("policy.")}
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        kind = {"critic": self._kind}
        if self.critic_trunk is not None:
            kind["trunk"] = _plain_config(self.critic_trunk)
        (folder / "config.json").write_text(json.dumps(kind, indent=2, sort_keys=True) + "\n")

    def load_critic(self, directory: str | Path) -> None:
        """Read what `save_critic` wrote.

        Raises:
            ValueError: the file belongs to another kind or size of critic.
        """
        path = Path(directory) / CRITIC_DIR / "model.safetensors"
        if not path.is_file():
            raise ValueError(f"{directory} holds no critic ({path.name} in '{CRITIC_DIR}/' is missing).")
        saved = json.loads(path.with_name("config.json").read_text()).get("critic")
        if saved != self._kind:
            raise ValueError(f"{path} belongs to another critic (critic: {saved!r} saved, {self._kind!r} here).")
        state = load_file(path)
        expected = {k for k in self.state_dict() if not k.startswith("policy.")}
        if set(state) != expected:
            different = sorted(set(state) ^ expected)[:5]
            raise ValueError(f"{path} belongs to another critic; differing tensors: {', '.join(different)} ...")
        self.load_state_dict(state, strict=False)

    @property
    def _kind(self) -> str:
        """Whose trunk the value head reads; a saved critic must agree in it."""
        return "shared" if self.critic_trunk is None else "separate"

    # What transformers.Trainer and TRL ask of the module that they hold.

    @property
    def config(self):
        return self.policy.config

    @property
    def _no_split_modules(self) -> list[str]:
        # The layers that FSDP shards one by one; without them it would gather the whole model for each forward.
        return sorted({name for trunk in self._trunks() for name in trunk._no_split_modules or ()})

    @property
    def dtype(self) -> torch.dtype:
        return self.policy.dtype

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.policy.is_activation_checkpointing

    # TRL's generation context still asks by the older names.
    is_gradient_checkpointing = is_activation_checkpointing

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **options) -> None:
        for trunk in self._trunks():
            trunk.activation_checkpointing_enable(
                activation_checkpointing_kwargs=activation_checkpointing_kwargs, **options
            )

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        for trunk in self._trunks():
            trunk.activation_checkpointing_disable()

    def _trunks(self) -> list[nn.Module]:
        return [self.policy] if self.critic_trunk is None else [self.policy, self.critic_trunk]


def _position_ids(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Positions that count real tokens only, for models that take positions at all."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0)}


def _plain_config(model: nn.Module) -> dict:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.config.to_dict() if isinstance(base, PreTrainedModel) else {}
