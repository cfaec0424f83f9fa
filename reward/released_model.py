"""The class that published reward models are opened as: a trunk, a linear head, and a gate that reads the prompt.

Importing this module registers it, so that `AutoModelForSequenceClassification.from_pretrained(folder)` opens a model
that was saved after loading. `reward/released.py` does the loading.
"""

import copy
from dataclasses import field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from reward.distribution import RewardDistribution, check_levels
from reward.heads import Float32Linear, sum_attributes
from reward.output import QRMOutput, QuantileLaws


class ReleasedConfig(PreTrainedConfig):
    """Shape of a published reward model.

    Args:
        backbone_config: Config of the trunk.
        kind: `quantile` (K numbers per attribute), `point` (one) or `gaussian` (mean and spread).
        quantile_levels: K levels in (0, 1), symmetric about one half; 0.5 alone for a point.
        attribute_names: A names.
        gate_hidden_sizes: Widths of the hidden layers of the gate.
        gate_activation: `softmax` over attributes, or `none`.
        gate_temperature: Divides the gate's scores before the softmax.
        gate_position: Token that the gate reads: `marker`, the first of the last `gate_marker`, or `last_token`.
        gate_marker: Token ids between the last user turn and the answer.
        spread_parameter: What the second number of a Gaussian is: `log_std`, `log_variance` or `std`.

    Raises:
        ValueError: a value above is outside its range.
    """

    model_type = "qrm_released"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["crossing_rate"]

    backbone_config: dict | PreTrainedConfig | None = None
    kind: str = "quantile"
    quantile_levels: list[float] = field(default_factory=lambda: [step / 20 for step in range(1, 20)])
    attribute_names: list[str] = field(default_factory=lambda: ["rating"])
    gate_hidden_sizes: list[int] = field(default_factory=list)
    gate_activation: str = "softmax"
    gate_temperature: float = 1.0
    gate_position: str = "marker"
    gate_marker: list[int] | None = None
    spread_parameter: str = "log_std"

    def __post_init__(self, **kwargs):
        # A copy: the base class hands its attention setting down to sub-configs, and a live trunk reads its config.
        self.backbone_config = copy.deepcopy(self.backbone_config)
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(self.backbone_config.pop("model_type"), **self.backbone_config)
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        choices = {
            "kind": ("quantile", "point", "gaussian"),
            "gate_activation": ("softmax", "none"),
            "gate_position": ("marker", "last_token"),
            "spread_parameter": ("log_std", "log_variance", "std"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        levels = check_levels(torch.tensor(self.quantile_levels, dtype=torch.float64))
        # Where an attribute lowers the score, its quantile at 1 − t stands in for the one at t.
        if not torch.allclose(levels + levels.flip(0), torch.ones(1, dtype=levels.dtype), atol=1e-9):
            raise ValueError(f"quantile_levels must be symmetric about 0.5, got {self.quantile_levels}")
        if self.kind == "point" and self.quantile_levels != [0.5]:
            raise ValueError(f"a point model has the one level 0.5, got {self.quantile_levels}")
        if not self.gate_temperature > 0:
            raise ValueError(f"gate_temperature must be positive, got {self.gate_temperature}")
        if self.gate_position == "marker" and not self.gate_marker and self.backbone_config is not None:
            raise ValueError(
                f"no template marker is known for trunks of type {self.backbone_config.model_type}: pass "
                "gate_marker=[...], the token ids that stand between the last user turn and the answer"
            )


class ReleasedRewardModel(QuantileLaws, PreTrainedModel):
    """A published reward model: the law of each attribute, weighed by a gate that reads the prompt.

        gate          g = logit_scale · softmax(mlp(state at the end of the last user turn) / temperature)
        coefficients  c = T g,    T the attribute transform, identity where none is published
        quantiles     q(t) = Σ_{c_a ≥ 0} c_a q_a(t) + Σ_{c_a < 0} c_a q_a(1 − t)
        score         s = mean over levels of q(t), the number that the published code calls score

    q_a are the quantiles of attribute a at the last real token, sorted. A transform that takes verbosity out makes
    coefficients negative. The upper quantiles of such an attribute are the bad ones, so they go into the lower
    quantiles of the sum; the sum is then monotone, and the score is untouched, since levels are symmetric.

    The score weighs all K levels equally, as published. The mean of `distribution(output)` integrates the quantile
    function with its flat tails. For levels k/(K+1) the two differ by a known amount:

        E Z − s = ((q(t₁) + q(t_K))/2 − s) / (K + 1),

    zero for symmetric laws, for points and for Gaussians. Levels stay those that the model was trained for.

    Last token and gate token are found from `attention_mask`, never from pad ids, so that padding on either side, and
    a pad token that equals the end of a turn, change nothing. Heads compute in float32 whatever the trunk's dtype.
    """

    config_class = ReleasedConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["quantile_head", "attribute_gate", "attribute_mixing"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ReleasedConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if config.backbone_config is None:
            raise ValueError("ReleasedConfig.backbone_config is missing; use load_released(path_or_id)")
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        self.backbone.config.use_cache = False
        config.backbone_config = self.backbone.config
        num_attributes = len(config.attribute_names)
        num_values = 2 if config.kind == "gaussian" else len(config.quantile_levels)
        width = config.backbone_config.get_text_config().hidden_size
        self.quantile_head = Float32Linear(width, num_attributes * num_values)
        layers: list[nn.Module] = []
        for size in config.gate_hidden_sizes:
            layers += [Float32Linear(width, size), nn.ReLU()]
            width = size
        self.attribute_gate = nn.Sequential(*layers, Float32Linear(width, num_attributes))
        # In a module of their own, behind the trunk: the dtype of a model is said to be that of its first parameter.
        mixing = {"logit_scale": torch.ones(1), "transform": torch.eye(num_attributes)}
        self.attribute_mixing = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=False) for name, value in mixing.items()}
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        gate_positions: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> QRMOutput:
        """Predict the law of each text.

        Args:
            input_ids: (B, T) conversations in the chat template, ending with the answer.
            attention_mask: (B, T) 1 on real tokens; leave it out only when no row is padded.
            gate_positions: (B,) column of the token that the gate reads, where it is not to be searched.

        Returns:
            As for a QRM, but for `score`, whose relation to the law the class describes, and `attribute_weights`, the
            coefficients c: they may be negative, and sum to `logit_scale` without a transform.

        Raises:
            ValueError: a row without a real token, or one in which the gate has no place to read.
        """
        output = self.predict(*self.encode(input_ids, attention_mask, gate_positions))
        return output.to_tuple() if return_dict is False else output

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, gate_positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """States of the last real tokens and of the gate tokens, both (B, H), for `predict`."""
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} does not fit input_ids {tuple(input_ids.shape)}"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).to(input_ids)
        lengths = mask.sum(dim=-1)
        if not bool((lengths > 0).all()):
            raise ValueError(f"rows {_rows(lengths == 0)} have no real token: an empty text has no rating")
        # Real tokens first, in order. The trunk then finds each token at the position it would have alone.
        order = mask.argsort(dim=-1, descending=True, stable=True)
        ids, mask = input_ids.gather(-1, order), mask.gather(-1, order)
        if gate_positions is not None:
            columns = (order == gate_positions.to(order).unsqueeze(-1)).long().argmax(dim=-1)
            inside = (gate_positions >= 0) & (gate_positions < ids.shape[1])
            if not bool((inside.to(columns.device) & (columns < lengths)).all()):
                raise ValueError(f"gate_positions {gate_positions.tolist()} must be columns of real tokens")
        elif self.config.gate_position == "marker":
            columns = gate_columns(ids, lengths, self.config.gate_marker)
        else:
            columns = lengths - 1
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        rows = torch.arange(len(ids), device=states.device)
        return states[rows, (lengths - 1).to(states.device)], states[rows, columns.to(states.device)]

    def predict(self, features: Tensor, gate_features: Tensor) -> QRMOutput:
        """The heads alone, on states from `encode`."""
        names, device = self.config.attribute_names, self.quantile_head.weight.device
        raw = self.quantile_head(features.to(device)).unflatten(-1, (len(names), -1))
        law = RewardDistribution(levels=self.levels, values=self._quantiles(raw))
        with torch.autocast(device.type, enabled=False):
            weights = self.gate(gate_features) @ self.attribute_mixing["transform"].to(raw.dtype).T
        quantiles = sum_attributes(weights, law.values)
        score = quantiles.mean(dim=-1)
        return QRMOutput(
            logits=score.unsqueeze(-1),
            score=score,
            quantiles=quantiles,
            attribute_quantiles=law.values,
            attribute_weights=weights,
            crossing_rate=law.crossing_rate,
        )

    def gate(self, gate_features: Tensor) -> Tensor:
        """(B, H) states -> (B, A) output of the gate, before the attribute transform."""
        scores = self.attribute_gate(gate_features.to(self.quantile_head.weight.device))
        if self.config.gate_activation == "softmax":
            scores = (scores / self.config.gate_temperature).softmax(dim=-1)
        return scores * self.attribute_mixing["logit_scale"].to(scores.dtype)

    def _quantiles(self, raw: Tensor) -> Tensor:
        """(B, A, numbers of the head) -> (B, A, K)."""
        if self.config.kind != "gaussian":
            return raw
        mean, spread = raw[..., :1], raw[..., 1:]
        if self.config.spread_parameter != "std":
            spread = (spread if self.config.spread_parameter == "log_std" else spread / 2).exp()
        levels = torch.tensor(self.config.quantile_levels, dtype=torch.float64)
        return mean + spread.abs() * torch.special.ndtri(levels).to(raw)

    def to(self, *args, **kwargs) -> "ReleasedRewardModel":
        """Move the model; a half-precision dtype applies to the trunk, the heads keep float32."""
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (torch.float16, torch.bfloat16):
            return super().to(*args, **kwargs)
        super().to(device=device, non_blocking=non_blocking, memory_format=memory_format)
        # Weights only: rotary frequencies are a buffer, and rounded to three digits they turn late positions wrongly.
        for parameter in self.backbone.parameters():
            parameter.data = parameter.data.to(dtype)
        return self


def gate_columns(input_ids: Tensor, lengths: Tensor, marker: list[int]) -> Tensor:
    """(B,) column of the first token of the last marker in each row.

    Args:
        input_ids: (B, T) with the real tokens first.
        lengths: (B,) number of real tokens; what follows them is not searched.
        marker: Token ids that stand between the last user turn and the answer.

    Raises:
        ValueError: a row has no marker, or has its last one behind a complete answer.
    """
    size = len(marker)
    pattern = torch.tensor(marker, device=input_ids.device)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    # Windows that run over the right edge are filled up, and excluded with those that run into padding.
    found = (F.pad(input_ids, (0, size - 1)).unfold(1, size, 1) == pattern).all(dim=-1)
    found &= columns + size <= lengths.unsqueeze(-1)
    last = torch.where(found, columns, -1).amax(dim=-1)
    if bool((last < 0).any()):
        raise ValueError(
            f"rows {_rows(last < 0)} do not contain the template's marker {marker}, at which the gate reads the "
            "prompt: format with tokenizer.apply_chat_template(prompt + answer) without add_generation_prompt, and "
            "truncate on the left to a length that keeps the end of the last user turn"
        )
    # Found twice and the second time at the very end: a header that waits for an answer after the answer.
    open_ended = (last + size == lengths) & (found.sum(dim=-1) > 1)
    if bool(open_ended.any()):
        raise ValueError(
            f"rows {_rows(open_ended)} end in an empty answer, which would move the gate behind the answer that is to "
            "be scored: apply the chat template without add_generation_prompt"
        )
    return last


def _rows(chosen: Tensor) -> list[int]:
    return chosen.nonzero().flatten().tolist()


AutoConfig.register("qrm_released", ReleasedConfig)
AutoModelForSequenceClassification.register(ReleasedConfig, ReleasedRewardModel)
