"""Train a quantile reward model on individual human ratings, on preference pairs, or on both.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_qrm.py --config recipes/smollm2/qrm.yaml

Every value of the YAML file can be overridden by a flag of the same name; `--help` lists them all.

Three ways, from cheap to strong: heads on a frozen trunk (--frozen_trunk true), low-rank adapters (--use_peft true),
and the whole model, or its upper layers (--num_frozen_layers). `output_dir` gets the model, its tokenizer,
`calibration.json` with the held-out numbers (written last: where it exists, the run is complete) and a model card.

Several rated attributes are several columns: --ratings_column helpfulness verbosity. How they are weighed is learned
from pairs: beside the ratings with --preference_dataset_name, or afterwards, on frozen attributes, by
`recipes/train_gate.py`. Until then every attribute weighs about the same.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, get_peft_config

from eval.calibration import preference_accuracy
from reward import loading as opening
from reward.calibration import attribute_report, calibration_table, model_card, preference_line
from reward.data import RatingCollator, attribute_names, load_ratings
from reward.features import trunk_features
from reward.frozen import compare_non_crossing, fit_frozen_heads
from reward.modeling import QRMForSequenceClassification
from reward.preferences import PairCollator, load_preferences, side_by_side, split_pairs, tokenize_preferences
from reward.reading import whole_weights
from reward.training import (
    QRMTrainer,
    QRMTrainingArguments,
    add_lora,
    constant_quantiles,
    freeze_layers,
    predict_quantiles,
    predict_scores,
    save_reward_model,
    tokenize_ratings,
)
from rlhf.command_line import run


@dataclass
class DataArguments:
    """Where ratings and preference pairs come from."""

    dataset_name: str = field(
        default=None,
        metadata={"help": "Ratings: a folder of save_to_disk, a JSON, CSV or parquet file, or a hub id."},
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split to train on. Unset: all rows."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out ratings for the calibration. Unset: dataset_name."}
    )
    eval_dataset_split: str | None = field(
        default=None, metadata={"help": "Split of the held-out ratings (required, unless eval_dataset_name is set)."}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the rated text, or a list of messages."})
    ratings_column: list[str] = field(
        default_factory=lambda: ["ratings"],
        metadata={"help": "Column with a list of numbers, or one number; several columns are several attributes."},
    )
    attribute_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the attributes. Unset: those of the columns."}
    )
    max_length: int = field(default=512, metadata={"help": "Most tokens of a text; longer ones are cut."})
    truncation_side: str = field(
        default="left", metadata={"help": "What a longer text loses: left keeps the answer, right the beginning."}
    )
    preference_dataset_name: str | None = field(
        default=None, metadata={"help": "Pairs in TRL's preference format, alone or beside the ratings."}
    )
    preference_dataset_split: str | None = field(default=None, metadata={"help": "Split of the pairs to train on."})
    eval_preference_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out pairs. Unset: preference_dataset_name."}
    )
    eval_preference_dataset_split: str | None = field(
        default=None, metadata={"help": "Split of the held-out pairs. Unset: a tenth of the prompts, by their hash."}
    )
    drop_equal_pairs: bool = field(
        default=False, metadata={"help": "Leave out pairs with equal sides instead of refusing them."}
    )


@dataclass
class HeadArguments:
    """What is put on the trunk, and how much of the trunk is used."""

    num_backbone_layers: int | None = field(
        default=None, metadata={"help": "Keep only so many first layers of the trunk, for a cheaper model."}
    )
    backbone_dropout: float | None = field(
        default=None, metadata={"help": "Set every dropout rate of the trunk to this. Unset: as in its config."}
    )
    pooling: str = field(default="last_token", metadata={"help": "last_token, or mean over the tokens of a text."})
    head_layers: list[int] | None = field(
        default=None, metadata={"help": "Hidden states that the heads read, side by side. Unset: the last."}
    )
    head_type: str = field(default="linear", metadata={"help": "linear, or mlp with one hidden layer."})
    head_hidden_size: int = field(default=256, metadata={"help": "Width of the hidden layer of an mlp head."})
    non_crossing: str = field(
        default="sort", metadata={"help": "sort repairs quantiles that cross; increments cannot produce any."}
    )
    quantile_levels: list[float] | None = field(
        default=None, metadata={"help": "Levels, increasing, inside (0, 1). Unset: 0.05 to 0.95 in steps of 0.05."}
    )


def main(data: DataArguments, head: HeadArguments, args: QRMTrainingArguments, model_config: ModelConfig) -> None:
    """Check, load, train, save, and compare with the held-out ratings and pairs."""
    started = time.monotonic()
    check_arguments(data, args, model_config)
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_config, args)
    ratings, pairs = load_ratings_parts(data, tokenizer), load_pairs_parts(data, tokenizer)
    names = data.attribute_names or (attribute_names(ratings["train"]) if ratings else ["rating"])
    model = build_model(head, names, args, model_config)
    constant = None
    if ratings:
        constant = constant_quantiles(ratings["train"]["ratings"][:], model.config.quantile_levels)
    model.reset_to_constant(torch.zeros(len(model.levels)) if constant is None else constant)
    if PartialState().is_main_process:
        Path(args.output_dir, "calibration.json").unlink(missing_ok=True)
    tokens = tokenized(ratings, pairs, tokenizer, data)
    if args.frozen_trunk:
        predictions = fit_heads(model, tokens["train"], tokens["held_out"], tokenizer, args)
        wins = {}
    else:
        predictions, wins = fit_model(model, tokens, constant, tokenizer, args, model_config)
    report = {"trunk": model_config.model_name_or_path, **wins}
    if pairs:
        report["preferences"] |= {"dataset": data.preference_dataset_name, "trained_on": len(pairs["train"])}
    if ratings:
        quantiles, crossing_rate = predictions
        held_out = ratings["held_out"]
        report |= attribute_report(
            quantiles, held_out["ratings"][:], held_out["source"][:], model.levels, constant, names, crossing_rate
        )
        report["trained_on"] = {
            "dataset": data.dataset_name,
            "split": data.dataset_split,
            "texts": len(ratings["train"]),
        }
    if PartialState().is_main_process:
        report["seconds"] = round(time.monotonic() - started, 1)
        write_results(report, Path(args.output_dir))


def check_arguments(data: DataArguments, args: QRMTrainingArguments, model_config: ModelConfig) -> None:
    """Refuse what could not work before anything is loaded."""
    if not model_config.model_name_or_path:
        raise ValueError("--model_name_or_path is required: set it in the YAML file or as a flag.")
    if not data.dataset_name and not data.preference_dataset_name:
        raise ValueError("--dataset_name is required, unless --preference_dataset_name is set.")
    held_out = data.eval_dataset_split not in (None, data.dataset_split)
    if data.dataset_name and data.eval_dataset_name is None and not held_out:
        raise ValueError("held-out ratings are required: set --eval_dataset_split, or --eval_dataset_name for a file.")
    if data.max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {data.max_length}.")
    if args.frozen_trunk and model_config.use_peft:
        raise ValueError("frozen_trunk and use_peft exclude each other: adapters change the trunk.")
    if args.frozen_trunk and args.quantile_loss != "pinball":
        raise ValueError("quantile_loss huber is for end-to-end training; a frozen trunk's heads minimise pinball.")
    if args.frozen_trunk and (args.spread_weight or args.calibration_share):
        raise ValueError("spread_weight and calibration_share are for end-to-end training, not for a frozen trunk.")
    if not data.dataset_name and (args.spread_weight or args.calibration_share):
        raise ValueError("spread_weight and calibration_share need ratings: set --dataset_name.")
    if data.preference_dataset_name and args.calibration_share:
        raise ValueError("calibration_share fits the heads to ratings alone, which would undo the preference pairs.")
    if args.frozen_trunk and data.preference_dataset_name:
        raise ValueError("frozen_trunk learns from ratings; recipes/train_gate.py then weighs attributes by pairs.")
    folder = Path(args.output_dir)
    occupied = folder.is_dir() and any(folder.iterdir())
    # Every rank looks before any rank may write.
    PartialState().wait_for_everyone()
    if occupied and not args.overwrite_output_dir and not args.resume_from_checkpoint:
        raise ValueError(
            f"output_dir {folder} is not empty. Continue its run with --resume_from_checkpoint true, "
            "replace it with --overwrite_output_dir true, or choose another folder."
        )


def load_tokenizer(model_config: ModelConfig, args: QRMTrainingArguments) -> PreTrainedTokenizerBase:
    """The trunk's tokenizer, padding on the right."""
    tokenizer = opening.load_tokenizer(
        model_config.model_name_or_path,
        revision=model_config.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    if tokenizer.pad_token is None:
        # Masks are explicit, so the pad token is never read; the choice only has to exist.
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_ratings_parts(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Ratings to train on and held-out ratings, without a text in common; empty without a rating dataset."""
    if not data.dataset_name:
        return {}
    columns = [data.ratings_column] if isinstance(data.ratings_column, str) else data.ratings_column
    reading = {
        "text_column": data.text_column,
        "ratings_column": columns[0] if len(columns) == 1 else columns,
        "attribute_names": data.attribute_names,
        "tokenizer": tokenizer,
    }
    with PartialState().main_process_first():
        train = load_ratings(data.dataset_name, split=data.dataset_split, **reading)
        held_out = load_ratings(data.eval_dataset_name or data.dataset_name, split=data.eval_dataset_split, **reading)
    shared = set(train["text"]) & set(held_out["text"])
    if shared:
        raise ValueError(f"{len(shared)} texts are both trained on and held out, for example {min(shared)[:60]!r}.")
    if attribute_names(train) != attribute_names(held_out):
        raise ValueError(
            f"held-out ratings have the attributes {attribute_names(held_out)}, not {attribute_names(train)}."
        )
    return {"train": train, "held_out": held_out}


def load_pairs_parts(data: DataArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Pairs to train on and held-out pairs, without a prompt in common; empty without a preference dataset."""
    if not data.preference_dataset_name:
        return {}
    reading = {"tokenizer": tokenizer, "drop_equal_pairs": data.drop_equal_pairs}
    with PartialState().main_process_first():
        pairs = load_preferences(data.preference_dataset_name, split=data.preference_dataset_split, **reading)
        if data.eval_preference_dataset_name is None and data.eval_preference_dataset_split is None:
            return split_pairs(pairs, {"train": 0.9, "held_out": 0.1})
        name = data.eval_preference_dataset_name or data.preference_dataset_name
        held_out = load_preferences(name, split=data.eval_preference_dataset_split, **reading)
    shared = set(zip(pairs["chosen"], pairs["rejected"], strict=True))
    shared &= set(zip(held_out["chosen"], held_out["rejected"], strict=True))
    if shared:
        raise ValueError(f"{len(shared)} pairs are both trained on and held out.")
    return {"train": pairs, "held_out": held_out}


def tokenized(
    ratings: dict[str, Dataset], pairs: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, data: DataArguments
) -> dict[str, Dataset]:
    """Tokens of both kinds for `train` and `held_out`, and of each kind as `ratings` and `pairs` to be held out."""
    tokens: dict[str, Dataset] = {}
    for part in ("train", "held_out"):
        kinds = {}
        if ratings:
            kinds["ratings"], cut = tokenize_ratings(
                ratings[part], tokenizer, data.max_length, truncation_side=data.truncation_side
            )
            say(f"{part}: {len(ratings[part])} texts, {cut} of them cut to {data.max_length} tokens.")
        if pairs:
            result = tokenize_preferences(
                pairs[part], tokenizer, data.max_length, drop_equal_pairs=data.drop_equal_pairs
            )
            kinds["pairs"] = result.rows
            dropped = f", {result.equal} equal ones dropped" if result.equal else ""
            say(f"{part}: {len(result.rows)} pairs, {result.truncated} of their texts cut{dropped}.")
        tokens[part] = side_by_side(*kinds.values()) if len(kinds) == 2 else next(iter(kinds.values()))
        tokens |= kinds
    return tokens


def say(line: str) -> None:
    """Print once per launch."""
    if PartialState().is_main_process:
        print(line, flush=True)


def build_model(
    head: HeadArguments, names: list[str], args: QRMTrainingArguments, model_config: ModelConfig
) -> QRMForSequenceClassification:
    """A reward model with fresh heads on a pretrained trunk."""
    hub = {"revision": model_config.model_revision, "trust_remote_code": args.trust_remote_code}
    config = opening.load_config(model_config.model_name_or_path, **hub)
    if head.backbone_dropout is not None:
        for name, value in list(vars(config).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(config, name, head.backbone_dropout)
    loading: dict[str, Any] = {"config": config, "dtype": model_config.dtype or "auto", **hub}
    if model_config.attn_implementation is not None:
        loading["attn_implementation"] = model_config.attn_implementation
    fields = {"pooling": head.pooling, "head_type": head.head_type, "head_hidden_size": head.head_hidden_size}
    fields |= {"attribute_names": names, "non_crossing": head.non_crossing}
    if head.head_layers is not None:
        fields["head_layers"] = head.head_layers
    if head.quantile_levels is not None:
        fields["quantile_levels"] = head.quantile_levels
    return QRMForSequenceClassification.from_backbone(
        model_config.model_name_or_path,
        num_backbone_layers=head.num_backbone_layers,
        backbone_kwargs=loading,
        **fields,
    )


def fit_heads(
    model: QRMForSequenceClassification,
    train: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: QRMTrainingArguments,
) -> tuple[torch.Tensor, float]:
    """Fit the heads on features of the frozen trunk; held-out quantiles (N, [A,] K) and their crossing rate."""
    model.to(args.device)
    collator, cache = RatingCollator(tokenizer), args.feature_cache_dir and Path(args.feature_cache_dir)
    loading = {"batch_size": args.per_device_eval_batch_size, "device": args.device, "cache_dir": cache}
    features = [trunk_features(model, part["input_ids"][:], collator, **loading) for part in (train, held_out)]

    def report(line: str) -> None:
        if PartialState().is_main_process:
            print(line, flush=True)

    options = {
        "ridge": args.ridge,
        "num_epochs": int(args.num_train_epochs),
        "batch_size": args.per_device_train_batch_size,
        "learning_rate": args.head_learning_rate or args.learning_rate,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
    }
    # Every rank fits the same heads from the same features and seed, so nothing has to be sent.
    if args.compare_non_crossing:
        losses = compare_non_crossing(model, features[0], train["ratings"][:], **options)
        constant = model.predict(features[0][:1].to(args.device)).attribute_quantiles[0].detach()
        model.config.non_crossing = min(losses, key=losses.get)
        model.reset_to_constant(constant)
        report(f"held-out pinball, sorted {losses['sort']:.4f}, by increments {losses['increments']:.4f}")
    fit_frozen_heads(model, features[0], train["ratings"][:], report=report, **options)
    if PartialState().is_main_process:
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
    with torch.no_grad():
        output = model.predict(features[1].to(args.device))
    laws = output.attribute_quantiles.cpu()
    return laws[:, 0] if laws.shape[1] == 1 else laws, output.crossing_rate.item()


def fit_model(
    model: QRMForSequenceClassification,
    tokens: dict[str, Dataset],
    constant: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase,
    args: QRMTrainingArguments,
    model_config: ModelConfig,
) -> tuple[tuple[torch.Tensor, float] | None, dict[str, Any]]:
    """Train trunk and heads together.

    Returns:
        Held-out quantiles (N, [A,] K) and their crossing rate, or None without ratings; and the preference accuracy.
    """
    if args.num_frozen_layers is not None:
        freeze_layers(model, args.num_frozen_layers)
    if model.attribute_gate is not None and "pairs" not in tokens:
        # Ratings say nothing about the gate, and under DDP a parameter without a gradient stops the second step.
        model.attribute_gate.requires_grad_(False)
    lora = get_peft_config(model_config)
    train, calibration = tokens["train"], None
    if args.calibration_share:
        parts = train.train_test_split(args.calibration_share, seed=args.seed)
        train, calibration = parts["train"], parts["test"]
        say(f"{len(train)} texts for the trunk, {len(calibration)} to fit the heads on afterwards.")
    trainer = QRMTrainer(
        model=model if lora is None else add_lora(model, lora),
        args=args,
        train_dataset=train,
        eval_dataset=tokens["held_out"],
        data_collator=PairCollator(tokenizer),
        processing_class=tokenizer,
        constant=constant,
    )
    resume = args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = get_last_checkpoint(args.output_dir) if resume.lower() == "true" else None
    trainer.train(resume_from_checkpoint=resume)
    scoring = {"batch_size": args.per_device_eval_batch_size, "device": args.device}
    predictions, report = None, {}
    save_reward_model(trainer, tokenizer, args.output_dir)
    reader = trainer.model_wrapped
    if calibration is not None:
        reader = fit_heads_anew(calibration, tokenizer, args)
    if "ratings" in tokens:
        predictions = predict_quantiles(
            reader, tokens["ratings"]["input_ids"][:], RatingCollator(tokenizer), **scoring
        )
    if "pairs" in tokens:
        scores = predict_scores(trainer.model_wrapped, tokens["pairs"], RatingCollator(tokenizer), **scoring)
        wins = preference_accuracy(*(side.numpy() for side in scores)).overall
        report["preferences"] = {"accuracy": wins.value, "low": wins.low, "high": wins.high, "pairs": wins.n}
    return predictions, report


def fit_heads_anew(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, args: QRMTrainingArguments
) -> QRMForSequenceClassification:
    """The model in the output folder, with heads fitted to texts that its trunk has not learnt; saved there again."""
    with whole_weights():
        model = opening.load_model(QRMForSequenceClassification, args.output_dir).to(args.device).eval()
    features = trunk_features(
        model,
        texts["input_ids"][:],
        RatingCollator(tokenizer),
        batch_size=args.per_device_eval_batch_size,
        device=args.device,
    )
    # As in `fit_heads`, every rank comes to the same heads by itself.
    options = {"ridge": args.ridge, "seed": args.seed, "report": say}
    if not isinstance(model.quantile_head, nn.Linear):
        options |= {"learning_rate": args.head_learning_rate or args.learning_rate}
    fit_frozen_heads(model, features, texts["ratings"][:], **options)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        model.save_pretrained(args.output_dir)
    return model


def write_results(report: dict[str, Any], folder: Path) -> None:
    """Model card first, `calibration.json` last: its presence means that the run is complete."""
    (folder / "README.md").write_text(model_card(report, folder.name))
    partial = folder / "calibration.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(folder / "calibration.json")
    lines = [preference_line(report["preferences"])] if "preferences" in report else []
    lines += [calibration_table(report)] if "trained_on" in report else []
    print("\n\n".join([*lines, f"{folder} is complete after {report['seconds']:.0f} s."]), flush=True)


GROUPS = (DataArguments, HeadArguments, QRMTrainingArguments, ModelConfig)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
