"""How true the laws of a QRM are on held-out embedded ratings, step by step, and what a distribution is worth.

    make bench            # or: .venv/bin/python benchmarks/qrm_calibration.py

Trains with `recipes/train_qrm.py` on every embedded text but the evaluation split (19,971 texts; 3,537 held out) and
compares with all held-out individual ratings. Finished trainings are kept under runs/minilm, so a second call only
measures. The steps:

    frozen        linear heads on frozen MiniLM, mean pooling, by the convex solver of stage 1
    last_token    the same on the state of the last token
    two_layers    the same on the last and the third layer side by side
    one_epoch     heads and trunk, fine-tuned with the pinball loss, one epoch
    lora          the same with adapters of rank 16 in place of all weights
    huber         the same with the quantile Huber loss
    point         the same with one level, 0.5: a point estimate of the same trunk, data and budget
    plain         as one_epoch, 4 epochs
    anew          as one_epoch, 3 epochs, another seed, and the heads fitted anew on a tenth of the texts, which the
                  trunk has not seen
    spread        as anew, 4 epochs, the first seed, and the spread loss (recipes/minilm/qrm.yaml)
    reseeded      as spread, 3 epochs, a third seed
    end_to_end    a quarter of `plain`, a quarter of `anew` and half of `spread`, averaged at equal levels, as the
                  source `average:...` does; `equal` is the same with equal weights, `four` with `reseeded` besides

Residual quantiles of a point estimate come from held-out texts: one half of them serves the other. Residuals of
training texts would be too small and make the baseline look worse than it is.

Writes benchmarks/results/qrm_calibration.json: `skill` over constant quantiles, `spread_correlation`,
`coverage_error` per source (largest |coverage − level|), `margin_over_homoscedastic` (share of the pinball loss of the
strongest "point estimate + global residual quantiles"), all of `end_to_end`, with 95 % intervals over texts; and the
same numbers of every step under `steps`.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import hardware, versions, write_result
from transformers import AutoTokenizer

from eval.calibration import coverage_error, spread_correlation, spread_reliability
from eval.skill import homoscedastic_quantiles, margin_over
from reward.calibration import calibration_report
from reward.data import RatingCollator, load_ratings, pad_ratings
from reward.distribution import RewardDistribution
from reward.mixtures import quantile_average
from reward.modeling import QRMForSequenceClassification
from reward.training import constant_quantiles, predict_quantiles, tokenize_ratings

DATA = Path("runs/quickstart/data")
RUNS = Path("runs/minilm")
CONFIG = "recipes/minilm/qrm.yaml"
TRAIN_SPLIT = "reward+judge+rl_prompts"
FROZEN = ["--frozen_trunk", "true", "--feature_cache_dir", str(RUNS / "features")]
NEITHER = ["--spread_weight", "0", "--calibration_share", "0"]
ONE_EPOCH = [*NEITHER, "--num_train_epochs", "1"]
STEPS = {
    "frozen": [*FROZEN, *NEITHER],
    "last_token": [*FROZEN, *NEITHER, "--pooling", "last_token"],
    "two_layers": [*FROZEN, *NEITHER, "--head_layers", "-1", "3"],
    "one_epoch": ONE_EPOCH,
    "lora": [*ONE_EPOCH, "--use_peft", "true", "--lora_r", "16", "--lora_alpha", "32", "--learning_rate", "1e-3"],
    "huber": [*ONE_EPOCH, "--quantile_loss", "huber", "--huber_kappa", "0.5"],
    "point": [*ONE_EPOCH, "--quantile_levels", "0.5"],
    "plain": NEITHER,
    "anew": ["--spread_weight", "0", "--seed", "1", "--num_train_epochs", "3"],
    "spread": [],
    "reseeded": ["--seed", "2", "--num_train_epochs", "3"],
}
AVERAGES = {
    "equal": {"plain": 1 / 3, "anew": 1 / 3, "spread": 1 / 3},
    "four": {"plain": 0.25, "anew": 0.25, "spread": 0.25, "reseeded": 0.25},
    "end_to_end": {"plain": 0.25, "anew": 0.25, "spread": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*STEPS, *AVERAGES]
    parser.add_argument("--steps", nargs="+", choices=choices, default=choices, help="Default: all.")
    options = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is missing; `make quickstart` or `python recipes/prepare_data.py` makes it.")
    averages = {name: weights for name, weights in AVERAGES.items() if name in options.steps}
    members = {member for weights in averages.values() for member in weights}
    wanted = [step for step in STEPS if step in options.steps or step in members]
    for step in wanted:
        train(step)
    held_out = load_ratings(DATA / "ratings", split="evaluation")
    rated = load_ratings(DATA / "ratings", split=TRAIN_SPLIT)
    laws = {step: predicted(RUNS / step, held_out) for step in wanted}
    point = laws.pop("point", None)
    for name, weights in averages.items():
        laws[name] = quantile_average([laws[member] for member in weights], list(weights.values()))
    steps = {
        step: {
            **numbers(law, held_out, rated),
            "margins": margins(law, point if step == "one_epoch" else None, held_out),
        }
        for step, law in laws.items()
    }
    print(table(steps))
    if "end_to_end" not in steps:
        return
    best = steps["end_to_end"]
    strongest = min(best["margins"], key=lambda name: best["margins"][name]["estimate"])
    result = {name: best[name] for name in ("skill", "spread_correlation", "coverage_error")}
    result["margin_over_homoscedastic"] = {"baseline": strongest, **best["margins"][strongest]}
    result |= {"spread_reliability": spread_reliability(pad_ratings(held_out["ratings"][:])), "steps": steps}
    result |= {"command": f"python benchmarks/qrm_calibration.py --steps {' '.join(options.steps)}"}
    result |= {"texts": len(held_out), "trained_on": len(rated), "hardware": hardware()}
    result["versions"] = versions("torch", "transformers")
    print(write_result("qrm_calibration", result))


def train(step: str) -> None:
    """Run or continue the training of a step, unless it is complete."""
    folder = RUNS / step
    if (folder / "calibration.json").is_file():
        return
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    command += ["recipes/train_qrm.py", "--config", CONFIG, "--output_dir", str(folder), *STEPS[step]]
    if any(folder.glob("checkpoint-*")):
        command += ["--resume_from_checkpoint", "true"]
    elif folder.is_dir():
        command += ["--overwrite_output_dir", "true"]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def predicted(folder: Path, held_out) -> RewardDistribution:
    """The laws of a trained model for the held-out texts; one level for the point estimate."""
    model = QRMForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, _ = tokenize_ratings(held_out, tokenizer, 64, truncation_side="right")
    values, _ = predict_quantiles(
        model, tokens["input_ids"][:], RatingCollator(tokenizer), batch_size=64, device="cpu"
    )
    return RewardDistribution(levels=model.levels, values=values)


def numbers(law: RewardDistribution, held_out, rated) -> dict[str, Any]:
    """What `calibration_report` says, in the names of the result."""
    levels = [round(level, 6) for level in law.levels.tolist()]
    constant = constant_quantiles(rated["ratings"][:], levels)
    ratings = held_out["ratings"][:]
    report = calibration_report(law.values, ratings, held_out["source"][:], law.levels, constant)
    parts = {"all": report, **report["sources"]}
    spread = spread_correlation(law, pad_ratings(ratings))
    return {
        "skill": report["skill"],
        "skill_half_width": report["skill_half_width"],
        "spread_correlation": spread["estimate"],
        "spread_correlation_interval": [spread["low"], spread["high"]],
        "mean_correlation": report["mean_correlation"],
        "pinball": report["pinball"],
        "coverage_error": {name: coverage_error(part["coverage"])["error"] for name, part in parts.items()},
        "skill_per_source": {name: part["skill"] for name, part in report["sources"].items()},
    }


def margins(law: RewardDistribution, point: RewardDistribution | None, held_out) -> dict[str, Any]:
    """Margin over each point estimate with residual quantiles; the smallest belongs to the strongest baseline."""
    ratings = held_out["ratings"][:]
    levels = [round(level, 6) for level in law.levels.tolist()]
    estimates = {"own mean": law.mean(), "own median": law.quantile(0.5)}
    if point is not None:
        estimates["point model"] = point.values[:, 0]
    found = {}
    for name, estimate in estimates.items():
        baseline = torch.empty_like(law.values)
        for half in (0, 1):
            here, there = slice(half, None, 2), slice(1 - half, None, 2)
            baseline[here] = homoscedastic_quantiles(estimate[here], estimate[there], ratings[there], levels)
        found[name] = margin_over(baseline, law.values, ratings, law.levels)
    return found


def table(steps: dict[str, Any]) -> str:
    lines = [
        "| step | skill | r(mean) | r(std) | coverage error, worst source | margin over residual quantiles |",
        "|---|---|---|---|---|---|",
    ]
    for step, part in steps.items():
        low, high = part["spread_correlation_interval"]
        source, error = max(part["coverage_error"].items(), key=lambda item: item[1])
        name, margin = min(part["margins"].items(), key=lambda item: item[1]["estimate"])
        lines.append(
            f"| {step} | {part['skill']:.3f} ± {part['skill_half_width']:.3f} | {part['mean_correlation']:.3f} "
            f"| {part['spread_correlation']:.3f} [{low:.3f}, {high:.3f}] | {error:.3f} ({source}) "
            f"| {margin['estimate']:.2%} [{margin['low']:.2%}, {margin['high']:.2%}] ({name}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
