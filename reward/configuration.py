"""What a quantile reward model is made of: trunk, pooling, levels, attributes, heads, gate; checked where set."""

import copy
from dataclasses import field

import torch
from transformers import AutoConfig, PreTrainedConfig

from reward.distribution import check_levels


def _default_levels() -> list[float]:
    return [step / 20 for step in range(1, 20)]


class QRMConfig(PreTrainedConfig):
    """Shape of a quantile reward model.

    Args:
        backbone_config: Config of the trunk, any decoder or encoder that `AutoModel` knows.
        quantile_levels: K levels, strictly increasing, inside (0, 1).
        attribute_names: A names, one per rated attribute. With two or more, a gate weighs them for each text.
        pooling: `last_token`, the state of the last real token, or `mean` over real tokens.
        head_layers: Hidden states that are concatenated for the heads, as indices into the trunk's `hidden_states`;
            0 is the embedding, -1 the last layer after its norm.
        head_type: `linear`, or `mlp` with one hidden layer behind a layer norm.
        head_hidden_size: Width of the hidden layer of an `mlp` head.
        non_crossing: `sort` repairs quantiles in the wrong order; `increments` cannot produce any, because the head
            then gives the middle quantile and the gaps around it.
        gate_hidden_size: Width of the hidden layers of the gate.
        gate_num_hidden_layers: Number of hidden layers of the gate; 0 makes it linear.
        gate_temperature: Divides the gate's scores before the softmax.
        gate_marker: Token ids that a chat template puts between the last user turn and the answer. The gate reads the
            state of the first of them, in their last occurrence. None: it reads the pooled state.
        attribute_transform: A x A matrix T that turns the gate's weights g into coefficients c = T g, for example to
            take verbosity out of the others; entries may be negative. None: identity.

    Raises:
        ValueError: a value above is outside its range.
    """

    model_type = "qrm"
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = ["crossing_rate"]

    backbone_config: dict | PreTrainedConfig | None = None
    quantile_levels: list[float] = field(default_factory=_default_levels)
    attribute_names: list[str] = field(default_factory=lambda: ["rating"])
    pooling: str = "last_token"
    head_layers: list[int] = field(default_factory=lambda: [-1])
    head_type: str = "linear"
    head_hidden_size: int = 256
    non_crossing: str = "sort"
    gate_hidden_size: int = 256
    gate_num_hidden_layers: int = 1
    gate_temperature: float = 1.0
    gate_marker: list[int] | None = None
    attribute_transform: list[list[float]] | None = None

    def __post_init__(self, **kwargs):
        # A copy: the base class hands its attention setting down to sub-configs, and a live trunk reads its config.
        self.backbone_config = copy.deepcopy(self.backbone_config)
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(self.backbone_config.pop("model_type"), **self.backbone_config)
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        super().__post_init__(**kwargs)
        self.quantile_levels = [float(level) for level in self.quantile_levels]
        # A lone string is a likely slip, and would otherwise count as one attribute per letter.
        names = self.attribute_names
        self.attribute_names = names if isinstance(names, str) else list(names)
        self.head_layers = [-1] if self.head_layers is None else list(self.head_layers)
        self._check()

    def _check(self) -> None:
        check_levels(self.quantile_levels)
        names = self.attribute_names
        strings = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
        if not names or not strings or len(set(names)) < len(names):
            raise ValueError(f"attribute_names is a list of one or more different, non-empty names, got {names!r}")
        choices = {
            "pooling": ("last_token", "mean"),
            "head_type": ("linear", "mlp"),
            "non_crossing": ("sort", "increments"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (("head_hidden_size", 1), ("gate_hidden_size", 1), ("gate_num_hidden_layers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.gate_temperature > 0:
            raise ValueError(f"gate_temperature must be positive, got {self.gate_temperature}")
        if self.gate_marker is not None and not self.gate_marker:
            raise ValueError("gate_marker needs at least one token id; None lets the gate read the pooled state")
        if self.attribute_transform is not None:
            if {len(self.attribute_transform), *map(len, self.attribute_transform)} != {len(names)}:
                raise ValueError(f"attribute_transform must be {len(names)} x {len(names)}, one row per attribute")
            levels = torch.tensor(self.quantile_levels, dtype=torch.float64)
            # Where an attribute lowers the score, its quantile at 1 - t stands in for the one at t.
            if not torch.allclose(levels + levels.flip(0), torch.ones(1, dtype=levels.dtype), atol=1e-9):
                raise ValueError(f"attribute_transform needs levels symmetric about 0.5, got {self.quantile_levels}")
        if not self.head_layers:
            raise ValueError("head_layers needs at least one index; [-1] reads the last layer")
        if self.backbone_config is not None:
            if self.backbone_config.is_encoder_decoder:
                raise ValueError(
                    f"{self.backbone_config.model_type} is an encoder-decoder; a QRM reads one sequence: "
                    "use a decoder (Llama, Qwen, ...) or an encoder (BERT, ModernBERT, ...)"
                )
            states = self.backbone_config.get_text_config().num_hidden_layers + 1
            if not all(-states <= layer < states for layer in self.head_layers):
                raise ValueError(
                    f"head_layers index the {states} hidden states of the trunk "
                    f"({-states} to {states - 1}), got {self.head_layers}"
                )
