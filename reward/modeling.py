"""The quantile reward model: a language model's trunk, one quantile head per attribute, and a gate that weighs them.

Importing this module registers the model, so that `AutoModelForSequenceClassification.from_pretrained(folder)` loads
it without remote code.
"""

import copy
from os import PathLike

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from reward.configuration import QRMConfig
from reward.distribution import RewardDistribution
from reward.heads import attribute_gate, ordered_quantiles, outputs_of_ordered, quantile_head, sum_attributes
from reward.loading import load_config, load_model
from reward.objectives import pinball_loss
from reward.output import HUB_ARGUMENTS, QRMOutput, QuantileLaws
from reward.released import load_released
from reward.released_model import ReleasedRewardModel, gate_columns


class QRMForSequenceClassification(QuantileLaws, PreTrainedModel):
    """A reward model that answers with a distribution over ratings instead of one number.

        attribute quantiles   q_a = sort(head_a(h))
        aggregate quantiles   q   = Σ_a w_a q_a,    w = softmax(gate(g) / temperature)
        score                 s   = mean of the law with quantiles q

    h is the pooled state of the text, g the same unless `gate_positions` names another token. Summing equal levels
    treats the attributes as comonotone (all low together); as the weights are not negative, the result is monotone.

    Each row is moved to the left edge before the trunk sees it. So left and right padding, and any number of padding
    columns, give the same numbers, also in trunks that count positions from the first column. Heads compute in
    float32 and stay float32 when the model is loaded or moved to a half-precision dtype.

    Sorting repairs what is returned. The loss sees the unsorted quantiles, so that each output keeps its own level.

    Reference: Dorka 2024, arXiv:2409.10164.
    Deviations: quantiles are sorted; gate weights sum to one, where released checkpoints scale them by a factor; the
    score integrates the quantile function with its tails, where the paper averages the values.
    """

    config_class = QRMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # The loss is a mean over texts. Trainer would otherwise take `**kwargs` in `forward` as a promise to normalise
    # over accumulation steps, and scale the gradient by their number.
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ["quantile_head", "attribute_gate"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: QRMConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if config.backbone_config is None:
            raise ValueError(
                "QRMConfig.backbone_config is missing; use QRMForSequenceClassification.from_backbone(path_or_model)"
            )
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        if getattr(self.backbone, "pooler", None) is not None:
            # Nothing reads it, and under DDP a parameter without a gradient stops the second step.
            self.backbone.pooler = None
        if hasattr(self.backbone.config, "use_cache"):
            self.backbone.config.use_cache = False
        config.backbone_config = self.backbone.config
        num_attributes = len(config.attribute_names)
        width = config.backbone_config.get_text_config().hidden_size * len(config.head_layers)
        self.quantile_head = quantile_head(
            config.head_type, width, config.head_hidden_size, num_attributes * len(config.quantile_levels)
        )
        # What `labels` are compared by: a function with the arguments of `pinball_loss`.
        self.objective = pinball_loss
        self.attribute_gate = None
        if num_attributes > 1:
            self.attribute_gate = attribute_gate(
                width, config.gate_hidden_size, config.gate_num_hidden_layers, num_attributes
            )
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PathLike | PreTrainedModel,
        *,
        num_backbone_layers: int | None = None,
        backbone_kwargs: dict | None = None,
        **qrm_config_kwargs,
    ) -> "QRMForSequenceClassification":
        """A reward model with fresh heads on a pretrained trunk, in evaluation mode like any loaded model.

        Args:
            backbone: A hub id or folder, or a model. A model with its own head (causal, classification) gives its
                trunk, which from then on is part of the reward model: it is not copied.
            num_backbone_layers: Keep only the first layers of the trunk, for a cheaper model.
            backbone_kwargs: Passed to `reward.loading.load_model`, for example `dtype` or `revision`.
            qrm_config_kwargs: Fields of `QRMConfig`.

        Raises:
            ValueError: more layers asked for than there are, or a bad config field.
        """
        if isinstance(backbone, PreTrainedModel):
            if backbone_kwargs:
                raise ValueError("backbone_kwargs are for loading; the backbone given is already a model")
            trunk = backbone.base_model
            if num_backbone_layers is not None:
                trunk = _truncated(trunk, num_backbone_layers)
        else:
            backbone_kwargs = dict(backbone_kwargs or {})
            if num_backbone_layers is not None:
                hub = {name: backbone_kwargs[name] for name in HUB_ARGUMENTS if name in backbone_kwargs}
                config = backbone_kwargs.get("config") or load_config(backbone, **hub)
                backbone_kwargs["config"] = _truncated_config(config, num_backbone_layers)
            trunk = load_model(AutoModel, backbone, **backbone_kwargs)
        config = QRMConfig(
            backbone_config=trunk.config,
            attn_implementation=trunk.config._attn_implementation,
            dtype=trunk.dtype,
            **qrm_config_kwargs,
        )
        model = cls(config, backbone=trunk)
        for head in (model.quantile_head, model.attribute_gate):
            if head is not None:
                head.to(trunk.device)
        return model.eval()

    @classmethod
    def from_released(cls, checkpoint: str | PathLike, **kwargs) -> ReleasedRewardModel:
        """A published QRM, ArmoRM or URM checkpoint, read natively: `reward.released.load_released`.

        Its heads differ from ours (an affine mix of attributes, a gate scale, a Gaussian), so it has a class of its
        own with the same outputs and methods; saved, it opens with `AutoModelForSequenceClassification`.

        Args:
            checkpoint: A hub id or folder with config.json and safetensors.
            kwargs: As in `load_released`: `attribute_names`, `quantile_levels`, `gate_marker`, `dtype`, ...

        Raises:
            ValueError: the files do not fit a published layout; the message names the tensors.
        """
        return load_released(checkpoint, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        gate_positions: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **backbone_kwargs,
    ) -> QRMOutput:
        """Predict, and with labels also compare.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T) 1 on real tokens. Leave it out only when no row is padded: padding is never
                guessed from ids, because the pad token may be one that a text uses.
            token_type_ids, position_ids: (B, T) for trunks that use them; moved along with the tokens.
            inputs_embeds: (B, T, H) in place of ids.
            gate_positions: (B,) column of the token whose state the gate reads, for example the last of the prompt;
                None for the one that `gate_marker` finds, or without a marker for the pooled state.
            labels: (B, M) individual ratings, or (B, A, M) when A > 1; NaN where there are fewer.

        Raises:
            ValueError: a row without a real token, or shapes that do not fit.
        """
        features, gate_features = self.encode(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            gate_positions=gate_positions,
            **backbone_kwargs,
        )
        output = self.predict(features, gate_features, labels=labels)
        return output.to_tuple() if return_dict is False else output

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        gate_positions: Tensor | None = None,
        **backbone_kwargs,
    ) -> tuple[Tensor, Tensor]:
        """What the heads read: pooled states of each text, and the states for the gate.

        Returns:
            features (B, D) and gate features (B, D), D = hidden size times number of `head_layers`; the same tensor
            if the gate reads the pooled state. To train heads on a frozen trunk, store these and call `predict`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        if attention_mask is not None:
            if attention_mask.shape != tokens.shape[:2]:
                raise ValueError(
                    f"attention_mask {tuple(attention_mask.shape)} does not fit tokens {tuple(tokens.shape[:2])}"
                )
            mask = (attention_mask != 0).long()
        lengths = mask.sum(dim=-1)
        if not bool((lengths > 0).all()):
            rows = (lengths == 0).nonzero().flatten().tolist()
            raise ValueError(f"rows {rows} have no real token: an empty text has no rating")
        # Real tokens first, in order. Trunks then find each token at the position it would have alone.
        order = mask.argsort(dim=-1, descending=True, stable=True)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, **backbone_kwargs}
        inputs = {name: _reorder(value, order) for name, value in inputs.items() if value is not None}
        mask = mask.gather(-1, order)
        states = self._hidden_states(mask, inputs)
        features = torch.cat([self._pool(state, mask, lengths) for state in states], dim=-1)
        if gate_positions is None:
            if self.attribute_gate is None or self.config.gate_marker is None:
                return features, features
            if input_ids is None:
                raise ValueError("the gate's marker is found in input_ids: pass gate_positions with inputs_embeds")
            columns = gate_columns(inputs["input_ids"], lengths, self.config.gate_marker)
            return features, torch.cat([_take(state, columns) for state in states], dim=-1)
        if gate_positions.shape != lengths.shape:
            raise ValueError(f"gate_positions holds one column per row, got shape {tuple(gate_positions.shape)}")
        gate_positions = gate_positions.to(order)
        columns = (order == gate_positions.unsqueeze(-1)).long().argmax(dim=-1)
        if not bool(((gate_positions >= 0) & (gate_positions < mask.shape[1]) & (columns < lengths)).all()):
            raise ValueError(f"gate_positions {gate_positions.tolist()} must be columns of real tokens")
        return features, torch.cat([_take(state, columns) for state in states], dim=-1)

    def predict(
        self, features: Tensor, gate_features: Tensor | None = None, labels: Tensor | None = None
    ) -> QRMOutput:
        """The heads alone, on features from `encode`; arguments and result as in `forward`."""
        names, levels = self.config.attribute_names, self.levels
        raw = self.quantile_head(features).unflatten(-1, (len(names), len(levels)))  # (B, A, K)
        if self.config.non_crossing == "increments":
            raw = ordered_quantiles(raw)
        attributes = RewardDistribution(levels=levels, values=raw)
        if self.attribute_gate is None:
            weights = torch.ones_like(raw[..., 0])
            quantiles = attributes.values[:, 0]
        else:
            scores = self.attribute_gate(features if gate_features is None else gate_features)
            weights = (scores / self.config.gate_temperature).softmax(dim=-1)
            if self.config.attribute_transform is not None:
                weights = weights @ weights.new_tensor(self.config.attribute_transform).T
            quantiles = sum_attributes(weights, attributes.values)
        score = RewardDistribution(levels=levels, values=quantiles).mean()
        return QRMOutput(
            loss=None if labels is None else self._loss(raw, labels, levels),
            logits=score.unsqueeze(-1),
            score=score,
            quantiles=quantiles,
            attribute_quantiles=attributes.values,
            attribute_weights=weights,
            crossing_rate=attributes.crossing_rate,
        )

    @torch.no_grad()
    def reset_to_constant(self, quantiles: Tensor) -> None:
        """Give every text the same quantiles, (A, K) or (K,): a good start, since training then only has to improve
        on the ratings' overall law."""
        last = self.quantile_head[-1] if isinstance(self.quantile_head, nn.Sequential) else self.quantile_head
        shape = (len(self.config.attribute_names), len(self.config.quantile_levels))
        values = torch.as_tensor(quantiles).to(last.bias).expand(shape)
        if self.config.non_crossing == "increments":
            values = outputs_of_ordered(
                values, least_gap=float(values.amax() - values.amin()) / (10 * shape[1]) or 0.1
            )
        last.weight.zero_()
        last.bias.copy_(values.flatten())

    def to(self, *args, **kwargs) -> "QRMForSequenceClassification":
        """Move the model; a half-precision dtype applies to the trunk, the heads keep float32."""
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if dtype not in (torch.float16, torch.bfloat16):
            return super().to(*args, **kwargs)
        super().to(device=device, non_blocking=non_blocking, memory_format=memory_format)
        # Weights only: rotary frequencies are a buffer, and rounded to three digits they turn late positions wrongly.
        for parameter in self.backbone.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def _hidden_states(self, mask: Tensor, inputs: dict) -> list[Tensor]:
        last = self.config.backbone_config.get_text_config().num_hidden_layers
        layers = [layer if layer >= 0 else layer + last + 1 for layer in self.config.head_layers]
        if set(layers) != {last}:
            inputs["output_hidden_states"] = True
        outputs = self.backbone(attention_mask=mask, **inputs)
        return [outputs.last_hidden_state if layer == last else outputs.hidden_states[layer] for layer in layers]

    def _pool(self, states: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        if self.config.pooling == "last_token":
            return _take(states, lengths - 1)
        # Selected, not multiplied: what a trunk computes at a padded position may be NaN.
        real = torch.where(mask.bool().unsqueeze(-1), states.float(), 0.0)
        return real.sum(dim=1) / lengths.unsqueeze(-1)

    def _loss(self, raw: Tensor, labels: Tensor, levels: Tensor) -> Tensor:
        """Mean of the objective over (text, attribute) pairs with a rating; each rater of a pair counts equally."""
        if labels.dim() == 2 and raw.shape[1] == 1:
            labels = labels.unsqueeze(1)
        if labels.dim() != 3 or labels.shape[:2] != raw.shape[:2]:
            raise ValueError(
                f"labels {tuple(labels.shape)} do not fit {raw.shape[0]} texts with {raw.shape[1]} attributes: "
                "ratings are (B, M), or (B, A, M) with several attributes, padded with NaN"
            )
        given = ~labels.isnan()
        loss = self.objective(raw, labels, levels, target_mask=given)
        return loss.sum() / given.any(dim=-1).sum().clamp_min(1)


def _reorder(value, order: Tensor):
    """Per-token inputs (B, T, ...) in the given order of columns; anything else unchanged."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[:2] != order.shape:
        return value
    return value[torch.arange(len(order), device=order.device).unsqueeze(-1), order]


def _take(states: Tensor, columns: Tensor) -> Tensor:
    """(B, T, H) and (B,) -> (B, H)."""
    return states[torch.arange(len(columns), device=columns.device), columns]


def _truncated_config(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if not 1 <= num_layers <= text.num_hidden_layers:
        raise ValueError(f"num_backbone_layers must be 1 to {text.num_hidden_layers}, got {num_layers}")
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:num_layers]
    text.num_hidden_layers = num_layers
    return config


def _truncated(trunk: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    shorter = AutoModel.from_config(_truncated_config(trunk.config, num_layers), dtype=trunk.dtype).to(trunk.device)
    if getattr(trunk, "pooler", None) is None:
        shorter.pooler = None
    missing, _ = shorter.load_state_dict(trunk.state_dict(), strict=False)
    if missing:
        raise ValueError(f"{type(trunk).__name__} cannot be cut to {num_layers} layers: no weights for {missing[:3]}")
    return shorter


AutoConfig.register("qrm", QRMConfig)
AutoModelForSequenceClassification.register(QRMConfig, QRMForSequenceClassification)
