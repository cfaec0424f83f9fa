"""Train the gate of a reward model with several attributes on preference pairs; trunk and heads stay as they are.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_gate.py \\
        --model_name_or_path runs/my-qrm --preference_dataset_name my-pairs.jsonl --output_dir runs/my-gated-qrm

The model comes from `recipes/train_qrm.py` with several --ratings_column; the pairs have TRL's preference format. In
conversations the gate reads the token that closes the last user turn, otherwise the state that the heads read.
--debias_attribute verbosity takes length out of the other attributes first.

`output_dir` gets the whole model, its tokenizer, a model card, and `gate.json` with the held-out numbers (written
last: where it exists, the run is complete). Everything can stand in a YAML file given with --config.
"""

import json
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from eval.calibration import preference_accuracy
from reward import loading
from reward.calibration import gate_section, model_card
from reward.data import RatingCollator
from reward.gating import (
    GateReport,
    PairStates,
    debias_transform,
    fit_gate,
    gate_weights,
    gated_scores,
    pair_states,
    verbosity_penalties,
)
from reward.heads import attribute_gate
from reward.modeling import QRMForSequenceClassification
from reward.preferences import answer_marker, load_preferences, split_pairs, tokenize_preferences
from rlhf.command_line import run


@dataclass
class PairArguments:
    """Where the pairs come from."""

    preference_dataset_name: str = field(
        default=None,
        metadata={
            "help": "Pairs in TRL's preference format: a folder of save_to_disk, a JSON, CSV or parquet file, or a "
            "hub id (required)."
        },
    )
    preference_dataset_split: str | None = field(default=None, metadata={"help": "Split of the pairs to train on."})
    eval_preference_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out pairs. Unset: preference_dataset_name."}
    )
    eval_preference_dataset_split: str | None = field(
        default=None,
        metadata={"help": "Split of the held-out pairs. Unset: test_share of the prompts, by their hash."},
    )
    validation_share: float = field(default=0.1, metadata={"help": "Share of the prompts that choose the step."})
    test_share: float = field(default=0.1, metadata={"help": "Share of the prompts that are held out."})
    drop_equal_pairs: bool = field(
        default=False, metadata={"help": "Leave out pairs with equal sides instead of refusing them."}
    )
    max_length: int = field(default=512, metadata={"help": "Most tokens of a text; longer ones lose their beginning."})


@dataclass
class GateArguments:
    """What the gate is, and how it is trained."""

    model_name_or_path: str = field(
        default=None, metadata={"help": "Reward model with several attributes: a folder or hub id (required)."}
    )
    output_dir: str = field(default=None, metadata={"help": "Folder of the gated model (required)."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into a folder that is not empty."})
    gate_position: str = field(
        default="auto",
        metadata={
            "help": "What the gate reads: marker, the end of the last user turn under the chat template; pooled, what "
            "the heads read; auto, marker for conversations and pooled for text."
        },
    )
    gate_hidden_size: int | None = field(default=None, metadata={"help": "Width of its layers. Unset: the model's."})
    gate_num_hidden_layers: int | None = field(default=None, metadata={"help": "Unset: as in the model."})
    gate_temperature: float | None = field(default=None, metadata={"help": "Unset: as in the model."})
    gate_entropy_coef: float = field(
        default=0.0, metadata={"help": "Reward for spreading the mean weights over attributes, against a collapse."}
    )
    debias_attribute: str | None = field(
        default=None, metadata={"help": "Attribute, such as verbosity, that is taken out of the others first."}
    )
    debias_threshold: float = field(default=0.03, metadata={"help": "Largest rank correlation with it that may stay."})
    num_steps: int = field(default=500, metadata={"help": "Optimiser steps."})
    batch_size: int = field(default=512, metadata={"help": "Pairs per step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate (AdamW, cosine)."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW."})
    eval_steps: int = field(default=25, metadata={"help": "Steps between looks at the validation pairs."})
    scoring_batch_size: int = field(default=16, metadata={"help": "Texts per pass of the frozen model."})
    feature_cache_dir: str | None = field(default=None, metadata={"help": "Folder for its states. Unset: not kept."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the trunk; auto: the checkpoint's."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow trunks that ship their own Python code."})
    seed: int = field(default=0, metadata={"help": "Of the gate's first weights and of the order of the pairs."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where a GPU is visible."})


def main(data: PairArguments, gate: GateArguments) -> None:
    """Check, load, compute the states once, fit the gate, save, and count what it prefers on the held-out pairs."""
    started = time.monotonic()
    device = PartialState(cpu=gate.use_cpu).device
    check_arguments(data, gate)
    set_seed(gate.seed)
    model, tokenizer = load_model(gate)
    parts = load_parts(data, tokenizer)
    place_gate(model, gate, parts["train"], tokenizer)
    model.to(device)
    cache = gate.feature_cache_dir and Path(gate.feature_cache_dir)
    scoring = {"batch_size": gate.scoring_batch_size, "device": device, "cache_dir": cache}
    tokens = {name: tokenized(name, part, data, model, tokenizer) for name, part in parts.items()}
    states = {name: pair_states(model, rows, RatingCollator(tokenizer), **scoring) for name, rows in tokens.items()}
    names = model.config.attribute_names
    report: dict[str, Any] = {"trained_on": len(states["train"]), "dataset": data.preference_dataset_name}
    if gate.debias_attribute is not None:
        column = names.index(gate.debias_attribute)
        penalties = verbosity_penalties(states["train"].means.flatten(0, 1), column, threshold=gate.debias_threshold)
        model.config.attribute_transform = debias_transform(penalties, column)
        report["penalties"] = dict(zip(names, penalties.tolist(), strict=True))
    result = fit(model, states, gate)
    report |= {"scale": result.scale, "best_step": result.best_step, "validation": result.best}
    report |= held_out_numbers(model, states["test"].to(device))
    if PartialState().is_main_process:
        report["gate_marker"] = model.config.gate_marker
        report["history"] = result.history
        report["seconds"] = round(time.monotonic() - started, 1)
        write_results(model.cpu(), tokenizer, report, gate)
    PartialState().wait_for_everyone()


def check_arguments(data: PairArguments, gate: GateArguments) -> None:
    """Refuse what could not work before anything is loaded."""
    needed = {**asdict(data), **asdict(gate)}
    for name in ("model_name_or_path", "preference_dataset_name", "output_dir"):
        if not needed[name]:
            raise ValueError(f"--{name} is required: set it in the YAML file or as a flag.")
    for name in ("num_steps", "batch_size", "learning_rate", "eval_steps", "scoring_batch_size", "max_length"):
        if not needed[name] > 0:
            raise ValueError(f"{name} must be positive, got {needed[name]}.")
    if gate.gate_position not in ("auto", "marker", "pooled"):
        raise ValueError(f"gate_position is auto, marker or pooled, got {gate.gate_position!r}.")
    if not 0 < data.validation_share < 1 or not 0 < data.test_share < 1 - data.validation_share:
        raise ValueError("validation_share and test_share must be positive and leave pairs to train on.")
    folder = Path(gate.output_dir)
    occupied = folder.is_dir() and any(folder.iterdir())
    # Every rank looks before any rank may write.
    PartialState().wait_for_everyone()
    if occupied and not gate.overwrite_output_dir:
        raise ValueError(f"output_dir {folder} is not empty. Replace its files with --overwrite_output_dir true.")
    if folder.resolve() == Path(gate.model_name_or_path).resolve():
        raise ValueError("output_dir is the folder of the model itself; a gated model needs a folder of its own.")


def load_model(gate: GateArguments) -> tuple[QRMForSequenceClassification, PreTrainedTokenizerBase]:
    """The reward model with, where asked for, a gate of another shape; and its tokenizer."""
    hub = {"trust_remote_code": gate.trust_remote_code}
    config = loading.load_config(gate.model_name_or_path, **hub)
    if config.model_type != "qrm":
        raise ValueError(f"{gate.model_name_or_path} is of type {config.model_type!r}; a gate belongs to a QRM.")
    names = config.attribute_names
    if len(names) < 2:
        raise ValueError(f"{gate.model_name_or_path} rates one attribute, {names}, so there is nothing to weigh.")
    if gate.debias_attribute is not None and gate.debias_attribute not in names:
        raise ValueError(f"debias_attribute is one of {names}, got {gate.debias_attribute!r}.")
    model = loading.load_model(QRMForSequenceClassification, gate.model_name_or_path, dtype=gate.dtype, **hub)
    shape = ("gate_hidden_size", "gate_num_hidden_layers", "gate_temperature")
    wanted = {name: getattr(gate, name) for name in shape if getattr(gate, name) is not None}
    if wanted:
        # Through the config's own constructor, which checks the values.
        model.config = type(config)(**{**model.config.to_dict(), **wanted})
        width = model.quantile_head.in_features if hasattr(model.quantile_head, "in_features") else None
        width = width or model.quantile_head[1].in_features
        model.attribute_gate = attribute_gate(
            width, model.config.gate_hidden_size, model.config.gate_num_hidden_layers, len(names)
        )
    tokenizer = loading.load_tokenizer(gate.model_name_or_path, **hub)
    tokenizer.padding_side = "right"
    return model.eval().requires_grad_(False), tokenizer


def load_parts(data: PairArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Dataset]:
    """Pairs to `train` on, for `validation` and to `test` with, without a prompt in two of them."""
    reading = {"tokenizer": tokenizer, "drop_equal_pairs": data.drop_equal_pairs}
    with PartialState().main_process_first():
        pairs = load_preferences(data.preference_dataset_name, split=data.preference_dataset_split, **reading)
        apart = data.eval_preference_dataset_name is not None or data.eval_preference_dataset_split is not None
        test_share = 0.0 if apart else data.test_share
        shares = {"train": 1 - data.validation_share - test_share, "validation": data.validation_share}
        parts = split_pairs(pairs, shares if apart else {**shares, "test": test_share})
        if apart:
            name = data.eval_preference_dataset_name or data.preference_dataset_name
            parts["test"] = load_preferences(name, split=data.eval_preference_dataset_split, **reading)
            seen = set(zip(pairs["chosen"], pairs["rejected"], strict=True))
            shared = seen & set(zip(parts["test"]["chosen"], parts["test"]["rejected"], strict=True))
            if shared:
                raise ValueError(f"{len(shared)} pairs are both trained on and held out.")
    return parts


def place_gate(
    model: QRMForSequenceClassification, gate: GateArguments, pairs: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Set where the gate reads, in the model, so that it reads there ever after."""
    conversations = pairs["conversation"][0]
    if gate.gate_position == "marker" and not conversations:
        raise ValueError("gate_position marker needs conversations; these pairs are text without a chat template.")
    at_marker = conversations and gate.gate_position != "pooled"
    model.config.gate_marker = answer_marker(tokenizer) if at_marker else None


def tokenized(
    name: str,
    pairs: Dataset,
    data: PairArguments,
    model: QRMForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    """Tokens of the pairs, without those that lost the prompt which the gate has to read."""
    marker = model.config.gate_marker
    result = tokenize_preferences(
        pairs, tokenizer, data.max_length, marker=marker, drop_equal_pairs=data.drop_equal_pairs
    )
    rows, lost = result.rows, 0
    if marker is not None and result.without_prompt:
        lost = result.without_prompt
        ends = zip(rows["chosen_gate"][:], rows["rejected_gate"][:], strict=True)
        rows = rows.select([index for index, columns in enumerate(ends) if min(columns) >= 0])
        if not len(rows):
            raise ValueError(f"all {name} pairs lose their prompt when cut to {data.max_length} tokens.")
    say(
        f"{name}: {len(rows)} pairs; {result.truncated} texts cut to {data.max_length} tokens, {lost} pairs dropped "
        f"because their prompt was cut off, {result.equal} because their sides are equal."
    )
    return rows


def fit(model: QRMForSequenceClassification, states: dict[str, PairStates], gate: GateArguments) -> GateReport:
    """Fit the gate; every rank does so from the same states and seed, so nothing has to be sent."""

    def report(look: dict[str, Any]) -> None:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in look["weights"].items())
        say(
            f"step {look['step']}: loss {look['loss']:.4f}, accuracy {look['accuracy']:.3f}, mean weights {weights} "
            f"(entropy {look['entropy']:.2f})"
        )

    with warnings.catch_warnings():
        if not PartialState().is_main_process:
            warnings.simplefilter("ignore")
        return fit_gate(
            model,
            states["train"],
            states["validation"],
            num_steps=gate.num_steps,
            batch_size=gate.batch_size,
            learning_rate=gate.learning_rate,
            weight_decay=gate.weight_decay,
            entropy_coef=gate.gate_entropy_coef,
            look_every=gate.eval_steps,
            seed=gate.seed,
            report=report,
        )


@torch.no_grad()
def held_out_numbers(model: QRMForSequenceClassification, states: PairStates) -> dict[str, Any]:
    """Preference accuracy of the gate, of equal weights, and of each attribute alone, on the held-out pairs."""
    weights = gate_weights(model, states.gate_states)
    alone = torch.eye(weights.shape[-1], device=weights.device)
    rivals = {"equal weights": torch.full_like(alone[0], 1 / len(alone))}
    rivals |= dict(zip(model.config.attribute_names, alone, strict=True))

    def accuracy(scores: torch.Tensor) -> dict[str, float]:
        wins = preference_accuracy(*scores.cpu().numpy().T).overall
        return {"accuracy": wins.value, "low": wins.low, "high": wins.high, "pairs": wins.n}

    return {
        **accuracy(gated_scores(model, states.means, weights)),
        "without_gate": {name: accuracy((states.means * fixed).sum(-1)) for name, fixed in rivals.items()},
    }


def write_results(
    model: QRMForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    report: dict[str, Any],
    gate: GateArguments,
) -> None:
    """The model, then its card, and `gate.json` last: its presence means that the run is complete."""
    folder = Path(gate.output_dir)
    (folder / "gate.json").unlink(missing_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = Path(gate.model_name_or_path, "calibration.json")
    # Frozen attributes stay as calibrated as they were.
    whole = json.loads(source.read_text()) if source.is_file() else {"trunk": gate.model_name_or_path}
    whole |= {"preferences": report, "gated": gate.model_name_or_path}
    (folder / "README.md").write_text(model_card(whole, folder.name))
    partial = folder / "gate.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(folder / "gate.json")
    say(f"{gate_section(report)}\n\n{folder} is complete after {report['seconds']:.0f} s.")


def say(line: str) -> None:
    """Print once per launch."""
    if PartialState().is_main_process:
        print(line, flush=True)


GROUPS = (PairArguments, GateArguments)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
