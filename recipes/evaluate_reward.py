"""Evaluate a reward model: its predicted distributions against single ratings, its choices against preferences.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/evaluate_reward.py \\
        --config recipes/smollm2/evaluate_reward.yaml

Every value of the YAML file can be overridden by a flag of the same name; `--help` lists them all.

Give held-out ratings (--dataset_name), preference pairs (--preference_dataset_name), or both. With the split that the
model was trained on (--train_dataset_split), its distributions are also compared with its own point estimate plus one
residual law for all texts, and constant quantiles come from the training ratings.

`output_dir` gets
    reward_report.json   every number with its interval and sample size
    reward_report.html   the same with figures; one file, no script
and the terminal a table.
"""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset

from eval.intervals import check_level
from eval.laws import predicted_laws
from eval.preferences import PreferencePairs, preference_pairs
from eval.records import write_text
from eval.reward_page import write_reward_page
from eval.reward_report import (
    Intervals,
    RatedTexts,
    preference_report,
    rating_report,
    reward_table,
    without_nan,
)
from reward.data import load_ratings
from reward.loading import load_tokenizer
from reward.tables import read_dataset
from rlhf.command_line import run
from rlhf.preflight import check_launch
from rlhf.reward_function import RiskReward
from rlhf.risk import RiskMeasure, parse_risk


@dataclass
class ModelArguments:
    """What is evaluated."""

    reward_model: str = field(
        default=None,
        metadata={
            "help": "Reward model: a folder of train_qrm.py, a hub id, or what else RiskReward takes (required)."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Texts per forward pass."})
    max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a text; longer ones lose their beginning. Unset: the context."}
    )
    dtype: str = field(default="auto", metadata={"help": "Dtype of the weights; auto: the checkpoint's."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models that ship their own Python code."})


@dataclass
class RatingArguments:
    """Ratings that the model has not seen."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Rated texts: a folder of save_to_disk, a JSON, CSV or parquet file, or a hub id."},
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of the held-out ratings; several joined by +."}
    )
    train_dataset_name: str | None = field(
        default=None, metadata={"help": "Ratings that the model was trained on. Unset: dataset_name."}
    )
    train_dataset_split: str | None = field(
        default=None, metadata={"help": "Their split. Unset, together with train_dataset_name: no residual quantiles."}
    )
    max_train_texts: int | None = field(
        default=None, metadata={"help": "Take residuals from so many training texts, drawn with the seed. Unset: all."}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the rated text, or a list of messages."})
    ratings_column: str = field(default="ratings", metadata={"help": "Column with a list of numbers, or one number."})


@dataclass
class PreferenceArguments:
    """Pairs of which people preferred one."""

    preference_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Preference pairs as in RewardBench (prompt, chosen, rejected, subset) or TRL: a folder of "
            "save_to_disk, a JSON, CSV or parquet file, or a hub id."
        },
    )
    preference_dataset_split: str | None = field(default=None, metadata={"help": "Split of the pairs."})
    preference_chat: bool = field(
        default=False,
        metadata={
            "help": "Put prompts and answers that are plain text into the reward model's chat template, as "
            "RewardBench does."
        },
    )
    risks: list[str] = field(
        default_factory=lambda: ["mean", "cvar:0.1"],
        metadata={"help": "Risk measures to choose by: mean, quantile:A, cvar:A, mean_variance:L, entropic:E, sums."},
    )


@dataclass
class OutputArguments:
    """Where the results go, and how sure they are."""

    output_dir: str = field(default="runs/reward_evaluation", metadata={"help": "Folder of the results."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into a folder that is not empty."})
    title: str = field(default="What the reward model knows", metadata={"help": "Heading of reward_report.html."})
    confidence: float = field(default=0.95, metadata={"help": "Confidence level of every interval."})
    resamples: int = field(default=2000, metadata={"help": "Bootstrap draws."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap and of the training texts."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where a GPU is visible."})


@dataclass(frozen=True, eq=False)
class Material:
    """What there is to evaluate on; None for what was not asked for."""

    held_out: Dataset | None
    train: Dataset | None
    residuals: Dataset | None
    pairs: PreferencePairs | None


def main(model: ModelArguments, rating: RatingArguments, preference: PreferenceArguments, output: OutputArguments):
    """Check, load, predict, report."""
    state = PartialState(cpu=True) if output.use_cpu else PartialState()
    check_launch(output)
    measures = check_arguments(model, rating, preference, output)
    with state.main_process_first():
        material = load_material(model, rating, preference, output)
    # The measures are applied to the laws afterwards; every model, scalar ones included, can be read by its mean.
    reward = RiskReward(
        model.reward_model,
        "mean",
        batch_size=model.batch_size,
        max_length=model.max_length,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
    )
    intervals = Intervals(output.confidence, output.resamples, output.seed)
    report: dict[str, Any] = {
        "model": model.reward_model,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "level": output.confidence,
        "warnings": [],
        "ratings": None,
        "preferences": None,
    }
    report["settings"] = settings(model, rating, preference, output)
    if material.held_out is not None:
        report["ratings"] = evaluate_ratings(reward, material, model, intervals, report["warnings"])
    if material.pairs is not None:
        report["preferences"] = evaluate_pairs(reward, material.pairs, measures, model, intervals, report["warnings"])
    if state.is_main_process:
        write_results(without_nan(report), output)
    state.wait_for_everyone()
    state.destroy_process_group()


def check_arguments(
    model: ModelArguments, rating: RatingArguments, preference: PreferenceArguments, output: OutputArguments
) -> list[RiskMeasure]:
    """Refuse what could not work before anything is loaded; the measures of --risks."""
    if not model.reward_model:
        raise ValueError("--reward_model is required: set it in the YAML file or as a flag.")
    if rating.dataset_name is None and preference.preference_dataset_name is None:
        raise ValueError("give ratings (--dataset_name), preference pairs (--preference_dataset_name), or both.")
    train = (rating.train_dataset_name or rating.dataset_name, rating.train_dataset_split)
    if train != (rating.dataset_name, None) and train == (rating.dataset_name, rating.dataset_split):
        raise ValueError("train_dataset_split is also the held-out split; residuals there would flatter the baseline.")
    check_level(output.confidence)
    if output.resamples < 100 or model.batch_size < 1:
        raise ValueError("resamples must be at least 100, batch_size at least 1.")
    if rating.max_train_texts is not None and rating.max_train_texts < 2:
        raise ValueError(f"max_train_texts must be at least 2, got {rating.max_train_texts}.")
    measures = [parse_risk(spec) for spec in preference.risks]
    if not measures or len({measure.spec for measure in measures}) < len(measures):
        raise ValueError(f"risks names at least one measure, and each once; got {preference.risks}.")
    folder = Path(output.output_dir)
    occupied = folder.is_dir() and any(folder.iterdir())
    # Every rank looks before any rank may write.
    PartialState().wait_for_everyone()
    if occupied and not output.overwrite_output_dir:
        raise ValueError(
            f"output_dir {folder} is not empty. Replace its report with --overwrite_output_dir true, or choose "
            "another folder."
        )
    return measures


def load_material(
    model: ModelArguments, rating: RatingArguments, preference: PreferenceArguments, output: OutputArguments
) -> Material:
    """Every dataset that was asked for, checked."""
    held_out = train = residuals = pairs = None
    if rating.dataset_name is not None:
        held_out = read_ratings(rating.dataset_name, rating.dataset_split, model, rating)
        if len(held_out) < 2:
            raise ValueError("an interval needs at least two held-out texts.")
        if rating.train_dataset_name is not None or rating.train_dataset_split is not None:
            name = rating.train_dataset_name or rating.dataset_name
            train = read_ratings(name, rating.train_dataset_split, model, rating)
            shared = set(train["text"]) & set(held_out["text"])
            if shared:
                raise ValueError(
                    f"{len(shared)} texts are both trained on and held out, for example {min(shared)[:60]!r}."
                )
            residuals = train
            if rating.max_train_texts is not None and rating.max_train_texts < len(train):
                chosen = np.random.default_rng(output.seed).choice(len(train), rating.max_train_texts, replace=False)
                residuals = train.select(np.sort(chosen).tolist())
    if preference.preference_dataset_name is not None:
        name = preference.preference_dataset_name
        rows, column_split = read_dataset(name, preference.preference_dataset_split)
        if column_split is not None:
            if "split" not in rows.column_names or column_split not in rows["split"]:
                raise ValueError(f"{name} has no split {column_split!r}.")
            rows = rows.filter(lambda row: row["split"] == column_split)
        pairs = preference_pairs(rows, as_chat=preference.preference_chat)
    return Material(held_out, train, residuals, pairs)


def read_ratings(name: str, split: str | None, model: ModelArguments, rating: RatingArguments) -> Dataset:
    """Rated texts of one attribute; conversations under the reward model's template."""
    columns = {"text_column": rating.text_column, "ratings_column": rating.ratings_column}
    rows, _ = read_dataset(name, split)
    if rating.text_column in rows.column_names and len(rows) and not isinstance(rows[0][rating.text_column], str):
        columns["tokenizer"] = load_tokenizer(model.reward_model, trust_remote_code=model.trust_remote_code)
    ratings = load_ratings(name, split=split, **columns)
    if "attributes" in ratings.column_names:
        raise ValueError(
            f"{name} rates several attributes, {ratings[0]['attributes']}, and a reward model's law is that of one "
            "score; name a column with the ratings of one attribute with --ratings_column."
        )
    return ratings


def evaluate_ratings(
    reward: RiskReward, material: Material, model: ModelArguments, intervals: Intervals, warnings: list[str]
) -> dict[str, Any]:
    """The report on held-out ratings; warnings are added to the list."""
    held_out, told = rated_texts(reward, material.held_out, model, "held-out texts")
    warn_of_truncation(told, "held-out texts", warnings)
    train_ratings = residuals = None
    if material.train is not None:
        train_ratings = material.train["ratings"][:]
        residuals, _ = rated_texts(reward, material.residuals, model, "training texts")
    else:
        warnings.append(
            "No training split was given: the constant quantiles are those of the held-out ratings, which is harder "
            "to beat, and there is no comparison with residual quantiles."
        )
    if held_out.law.levels.numel() == 1:
        warnings.append("The model predicts one number per text: its law has no spread, and one level of coverage.")
    report = rating_report(
        held_out,
        intervals,
        train_ratings=train_ratings,
        residuals=residuals,
        crossing_rate=told.get("crossing_rate"),
    )
    return report | {"truncated_share": told.get("truncated_share")}


def rated_texts(
    reward: RiskReward, ratings: Dataset, model: ModelArguments, description: str
) -> tuple[RatedTexts, dict[str, float]]:
    """Ratings with the law of each text, and what the model says about its own work."""
    texts = ratings["text"][:]
    # A rated text is read as an answer to nothing, which gives the tokens that training saw.
    law, told = predicted_laws(
        reward, [""] * len(texts), texts, chunk_size=8 * model.batch_size, description=description
    )
    return RatedTexts(ratings["ratings"][:], ratings["source"][:], law), told


def evaluate_pairs(
    reward: RiskReward,
    pairs: PreferencePairs,
    measures: list[RiskMeasure],
    model: ModelArguments,
    intervals: Intervals,
    warnings: list[str],
) -> dict[str, Any]:
    """The report on preference pairs; one forward pass per answer serves every measure."""
    if pairs.equal:
        warnings.append(f"{pairs.equal} preference pairs consist of two equal answers and were left out.")
    law, told = predicted_laws(
        reward,
        pairs.prompts + pairs.prompts,
        pairs.chosen + pairs.rejected,
        chunk_size=8 * model.batch_size,
        description="preference answers",
    )
    warn_of_truncation(told, "preference answers", warnings)
    count = len(pairs)
    report = preference_report(pairs, law[:count], law[count:], measures, level=intervals.level)
    return report | {"truncated_share": told.get("truncated_share")}


def warn_of_truncation(told: dict[str, float], what: str, warnings: list[str]) -> None:
    """Says so if texts were longer than the model could read."""
    if told.get("truncated_share", 0.0) > 0:
        warnings.append(f"{told['truncated_share']:.2%} of the {what} lost their beginning to max_length.")


def settings(
    model: ModelArguments, rating: RatingArguments, preference: PreferenceArguments, output: OutputArguments
) -> dict[str, Any]:
    """What a reader needs to make the report again."""
    shown = {"dataset": rating.dataset_name, "split": rating.dataset_split}
    if rating.train_dataset_name or rating.train_dataset_split:
        shown["training_dataset"] = rating.train_dataset_name or rating.dataset_name
        shown |= {"training_split": rating.train_dataset_split, "training_texts": rating.max_train_texts or "all"}
    shown |= {
        "preference_dataset": preference.preference_dataset_name,
        "preference_split": preference.preference_dataset_split,
    }
    if preference.preference_dataset_name is not None:
        shown |= {"preference_chat": preference.preference_chat, "risks": ", ".join(preference.risks)}
    shown |= {"max_length": model.max_length, "dtype": model.dtype, "seed": output.seed, "resamples": output.resamples}
    return {name: value for name, value in shown.items() if value is not None}


def write_results(report: dict[str, Any], output: OutputArguments) -> None:
    """reward_report.html, the table, and reward_report.json last: its presence means that the run is complete."""
    folder = Path(output.output_dir)
    write_reward_page(folder / "reward_report.html", report, title=output.title)
    write_text(folder / "reward_report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    notes = "".join(f"\n- {warning}" for warning in report["warnings"])
    paths = "\n".join(str(folder / f"reward_report.{ending}") for ending in ("json", "html"))
    print(f"\n{reward_table(report)}\n{notes}\n\n{paths}", flush=True)


GROUPS = (ModelArguments, RatingArguments, PreferenceArguments, OutputArguments)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
