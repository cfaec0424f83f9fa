"""Training of a reward model, on individual ratings, on preference pairs or on both: its heads, or the whole model.

Every rating is a target of its own. A model trained on mean ratings would learn how the means of texts are spread, and
nothing about how far readers of one text disagree. Pairs say which of two answers is better, and nothing about spread:
trained on them alone, a model shifts its quantiles together.
"""

import copy
import functools
import math
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from reward.data import RatingCollator, tokenize_texts
from reward.features import map_texts
from reward.modeling import QRMForSequenceClassification
from reward.objectives import bradley_terry_loss, pinball_loss, quantile_huber_loss, spread_loss
from reward.secrets import WithoutSecrets


@dataclass(repr=False)
class QRMTrainingArguments(WithoutSecrets, TrainingArguments):
    """Settings of the optimisation, on top of those of `transformers.TrainingArguments`.

    Raises:
        ValueError: A setting lies outside its range.
    """

    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of heads and gate, which start from nothing. Unset: learning_rate."},
    )
    frozen_trunk: bool = field(
        default=False,
        metadata={"help": "Train heads and gate only, on features that are computed once and cached."},
    )
    quantile_loss: str = field(
        default="pinball", metadata={"help": "Loss on ratings: pinball, or huber with the kink rounded off."}
    )
    huber_kappa: float = field(
        default=1.0, metadata={"help": "Width of the quadratic zone of the huber loss, in rating units."}
    )
    spread_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of (standard deviation of the law - that of the text's raters)^2 beside the loss on "
            "ratings; use it with calibration_share, which sets the width right again."
        },
    )
    calibration_share: float = field(
        default=0.0,
        metadata={
            "help": "Keep this share of the training texts from the trunk, and fit the heads anew on them afterwards: "
            "on texts that it has learnt, a trunk looks surer than it is."
        },
    )
    preference_weight: float = field(
        default=1.0, metadata={"help": "Weight of the Bradley-Terry loss on pairs beside that on ratings, which is 1."}
    )
    preference_scale: float = field(
        default=1.0, metadata={"help": "Log-odds of winning per rating unit of lead, in the Bradley-Terry loss."}
    )
    num_frozen_layers: int | None = field(
        default=None, metadata={"help": "Leave the embeddings and so many first layers of the trunk as they are."}
    )
    ridge: float | None = field(
        default=None,
        metadata={"help": "Penalty of linear heads on a frozen trunk. Unset: chosen on a tenth of the texts."},
    )
    compare_non_crossing: bool = field(
        default=False,
        metadata={"help": "On a frozen trunk, try sorted heads and heads that cannot cross, and keep the better."},
    )
    feature_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for the features of a frozen trunk. Unset: not kept."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow trunks and tokenizers that ship their own Python code."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Train into an output_dir that is not empty."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of the trunk (AdamW)."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "Order of the texts; group_by_length puts equal lengths together and saves the padding."},
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Kept off: the collator needs ratings."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # The collator makes the labels from the column `ratings`; Trainer would look for them in the dataset.
        self.label_names = ["labels"]
        # Without a GPU there is nothing to pin for, and torch warns at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ValueError(f"head_learning_rate must be positive, got {self.head_learning_rate}.")
        if self.quantile_loss not in ("pinball", "huber"):
            raise ValueError(f"quantile_loss is pinball or huber, got {self.quantile_loss!r}.")
        for name in ("huber_kappa", "preference_weight", "preference_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if not (math.isfinite(self.spread_weight) and self.spread_weight >= 0):
            raise ValueError(f"spread_weight must be 0 or more, got {self.spread_weight}.")
        if not 0 <= self.calibration_share < 1:
            raise ValueError(f"calibration_share must be at least 0 and below 1, got {self.calibration_share}.")
        if self.num_frozen_layers is not None and self.num_frozen_layers < 0:
            raise ValueError(f"num_frozen_layers must be 0 or more, got {self.num_frozen_layers}.")


def tokenize_ratings(
    ratings: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, truncation_side: str = "left"
) -> tuple[Dataset, int]:
    """What the trainer reads, `input_ids`, `ratings` and `length` of each text, and how many texts were cut."""
    ids, cut = tokenize_texts(ratings["text"][:], tokenizer, max_length, truncation_side=truncation_side)
    columns = {"input_ids": ids, "ratings": ratings["ratings"][:], "length": [len(row) for row in ids]}
    return Dataset.from_dict(columns), cut


def constant_quantiles(ratings: Sequence[Sequence], levels: Sequence[float]) -> Tensor:
    """Quantiles of all ratings together: the best prediction that ignores the text.

    Each text has weight one, divided equally among its raters, as in the training loss.

    Args:
        ratings: N lists of numbers, or N times A lists, some of them empty.
        levels: K levels.

    Returns:
        (K,), or (A, K) with several attributes.
    """
    if any(isinstance(part, (list, tuple)) for part in ratings[0]):
        columns = [[part for part in column if len(part)] for column in zip(*ratings, strict=True)]
        return torch.stack([constant_quantiles(column, levels) for column in columns])
    values = torch.cat([torch.as_tensor(row, dtype=torch.float64) for row in ratings])
    weights = torch.cat([torch.full((len(row),), 1.0 / len(row), dtype=torch.float64) for row in ratings])
    order = values.argsort(stable=True)
    share = weights[order].cumsum(0) / weights.sum()
    # Smallest value whose share reaches the level. The slack keeps a level that is met exactly from moving on by one.
    places = torch.searchsorted(share, torch.as_tensor(levels, dtype=torch.float64) - 1e-9)
    return values[order][places.clamp_max(len(values) - 1)].float()


def freeze_layers(model: QRMForSequenceClassification, num_layers: int) -> None:
    """Leave the embeddings and the first layers of the trunk out of training.

    Raises:
        ValueError: The trunk has fewer layers, or its layers were not found.
    """
    layers = trunk_layers(model)
    if num_layers > len(layers):
        raise ValueError(f"num_frozen_layers is {num_layers}, but the trunk has {len(layers)} layers.")
    model.backbone.get_input_embeddings().requires_grad_(False)
    for name, module in model.backbone.named_children():
        if "embed" in name:
            module.requires_grad_(False)
    for layer in layers[:num_layers]:
        layer.requires_grad_(False)


def trunk_layers(model: QRMForSequenceClassification) -> nn.ModuleList:
    """The repeated layers of the trunk, first to last."""
    depth = model.config.backbone_config.get_text_config().num_hidden_layers
    for module in model.backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"no list of {depth} layers found in {type(model.backbone).__name__}.")


def add_lora(model: QRMForSequenceClassification, lora: LoraConfig) -> PeftModel:
    """Low-rank adapters on the trunk; heads and gate are trained in full.

    Args:
        model: The reward model; layers frozen by `freeze_layers` get no adapter.
        lora: Rank, scale, dropout. Its target modules are kept if given, otherwise every linear layer of the trunk.
    """
    lora = copy.copy(lora)
    if lora.target_modules is None or lora.target_modules == "all-linear":
        lora.target_modules = [
            f"backbone.{name}"
            for name, module in model.backbone.named_modules()
            if isinstance(module, nn.Linear) and module.weight.requires_grad
        ]
    lora.task_type = None
    lora.modules_to_save = [name for name in ("quantile_head", "attribute_gate") if _is_trained(getattr(model, name))]
    return get_peft_model(model, lora)


def _is_trained(module: nn.Module | None) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


class QRMTrainer(Trainer):
    """A `transformers.Trainer` that learns from ratings and pairs, with a learning rate of their own for the heads.

        loss = quantile loss on ratings + spread_weight · spread loss
               − preference_weight · log σ(preference_scale · (s⁺ − s⁻ − margin))

    s⁺ and s⁻ are the scores of the chosen and the rejected answer.
    Either part may be missing from a dataset; a batch comes from `RatingCollator` or `PairCollator`. Evaluation gives
    `eval_loss`, with ratings `eval_pinball` and `eval_skill`, and with pairs `eval_preference_accuracy`.

    Args:
        constant: Quantiles of the training ratings, (K,) or (A, K), against which `eval_skill` is measured.
    """

    def __init__(self, *args, constant: Tensor | None = None, **kwargs):
        kwargs.setdefault("compute_metrics", held_out_metrics)
        super().__init__(*args, **kwargs)
        self.constant = constant
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if self.args.quantile_loss == "huber":
            model.objective = functools.partial(quantile_huber_loss, kappa=self.args.huber_kappa)
        if self.args.spread_weight:
            model.objective = functools.partial(_with_spread, model.objective, self.args.spread_weight)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """One forward pass over rated texts and both sides of the pairs."""
        if "margins" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        margins = inputs["margins"]
        output = model(**{name: value for name, value in inputs.items() if name != "margins"})
        chosen, rejected = self.args.preference_scale * _sides(output.score, len(margins))
        pair_loss = bradley_terry_loss(chosen, rejected, self.args.preference_scale * margins).mean()
        loss = self.args.preference_weight * pair_loss
        loss = loss if output.loss is None else output.loss + loss
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, and per row of the dataset (B, 3): pinball loss, that of constant quantiles, and a win of the
        chosen answer; NaN where it does not apply."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        loss = loss.detach().mean()
        if prediction_loss_only:
            return loss, None, None
        rows = _held_out_rows(output, inputs, self._levels(), self.constant)
        return loss, rows, rows

    def _levels(self) -> Tensor:
        model = self.accelerator.unwrap_model(self.model)
        return (model.get_base_model() if isinstance(model, PeftModel) else model).levels

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or what `optim` names, over four groups: trunk and heads, each with and without weight decay."""
        model = self.model if model is None else model
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(model))
            head_rate = self.args.head_learning_rate or self.args.learning_rate
            groups = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    in_head = "quantile_head" in name or "attribute_gate" in name
                    groups.setdefault((in_head, name in decayed), []).append(parameter)
            cls, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = cls(
                [
                    {
                        "params": parameters,
                        "lr": head_rate if in_head else self.args.learning_rate,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                    }
                    for (in_head, decay), parameters in groups.items()
                ],
                **settings,
            )
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in transformers, but without its pickled copy of the settings; `calibration.json` names what matters."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """transformers reads optimiser, scheduler and random states as pickles of tensors and plain values only.

    Raises:
        ValueError: a pickle names something else. PyTorch's own message advises to run it.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named.group(1)})" if named else ""
        raise ValueError(
            f"The checkpoint {checkpoint} cannot be resumed from: a file of its optimiser, scheduler or random states "
            f"is damaged, or holds more than tensors and plain values{what}, which could run code when it is read. "
            "Resume from another checkpoint, or start anew."
        ) from None


def _with_spread(
    objective: Callable[..., Tensor], weight: float, quantiles: Tensor, targets: Tensor, levels: Tensor, **mask: Tensor
) -> Tensor:
    loss = objective(quantiles, targets, levels, **mask)
    return loss + weight * spread_loss(quantiles, targets, levels, **mask)


def _sides(scores: Tensor, num_pairs: int) -> Tensor:
    """(2, P) scores of chosen and rejected answers, which a batch of `PairCollator` ends with."""
    return scores[len(scores) - 2 * num_pairs :].unflatten(0, (2, num_pairs))


def _held_out_rows(output: Any, inputs: dict[str, Tensor], levels: Tensor, constant: Tensor | None) -> Tensor:
    """(B, 3) of `QRMTrainer.prediction_step`."""
    num_pairs = len(inputs["margins"]) if "margins" in inputs else 0
    labels = inputs.get("labels")
    num_rated = 0 if labels is None else len(output.score) - 2 * num_pairs
    rows = output.score.new_full((max(num_pairs, num_rated), 3), math.nan)
    if num_rated:
        predicted, labels = output.attribute_quantiles[:num_rated], labels[:num_rated]
        labels = labels if labels.dim() == 3 else labels.unsqueeze(1)
        given = ~labels.isnan()
        rated = given.any(dim=-1)
        for place, quantiles in enumerate((predicted, constant)):
            if quantiles is not None:
                loss = pinball_loss(quantiles.to(predicted).expand_as(predicted), labels, levels, target_mask=given)
                rows[:, place] = torch.where(rated, loss, 0.0).sum(-1) / rated.sum(-1)
    if num_pairs:
        chosen, rejected = _sides(output.score, num_pairs)
        rows[:, 2] = (1 + (chosen - rejected).sign()) / 2
    return rows


def held_out_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Means over all rows that `QRMTrainer.prediction_step` gave; what was not measured is left out."""
    rows = torch.as_tensor(prediction.predictions).double()
    pinball, constant, wins = (column.nanmean().item() for column in rows.T)
    metrics = {"pinball": pinball, "skill": 1 - pinball / constant if constant else math.nan}
    metrics["preference_accuracy"] = wins
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def save_reward_model(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Write a plain reward model: adapters are merged, so that `from_pretrained` needs no PEFT."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        parameters = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
        if parameters:
            import deepspeed

            # ZeRO-3 leaves each rank a slice of every weight, and adapters only merge into whole ones.
            with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
                _save_merged(model, folder)
        else:
            _save_merged(model, folder)
    else:
        trainer.save_model(folder)
    if PartialState().is_main_process:
        tokenizer.save_pretrained(folder)
    PartialState().wait_for_everyone()


def _save_merged(model: PeftModel, folder: str) -> None:
    if PartialState().is_main_process:
        model.merge_and_unload().save_pretrained(folder)


def predict_quantiles(
    model: nn.Module, input_ids: Sequence[Sequence[int]], collator: RatingCollator, *, batch_size: int, device: Any
) -> tuple[Tensor, float]:
    """(N, K) predicted quantiles of N tokenised texts, and how often the heads crossed them; on every rank.

    With several attributes (N, A, K), the law of each before the gate weighs them: that is what ratings say.
    """

    def quantiles_and_crossings(batch: dict[str, Tensor]) -> Tensor:
        output = model(**batch)
        laws = output.attribute_quantiles
        laws = laws[:, 0] if laws.shape[1] == 1 else laws
        return torch.cat([laws, output.crossing_rate.expand(*laws.shape[:-1], 1)], dim=-1)

    was_training = model.training
    model.eval()
    values = map_texts(
        quantiles_and_crossings, input_ids, collator, batch_size=batch_size, device=device, description="scoring"
    )
    model.train(was_training)
    return values[..., :-1], values[..., -1].mean().item()


def predict_scores(
    model: nn.Module, pairs: Dataset, collator: RatingCollator, *, batch_size: int, device: Any
) -> tuple[Tensor, Tensor]:
    """(P,) scores of the chosen and of the rejected answers of tokenised pairs, on every rank."""
    was_training = model.training
    model.eval()
    texts = [*pairs["chosen_ids"][:], *pairs["rejected_ids"][:]]
    scores = map_texts(
        lambda batch: model(**batch).score, texts, collator, batch_size=batch_size, device=device, description="pairs"
    )
    model.train(was_training)
    return scores[: len(pairs)], scores[len(pairs) :]
