"""Selection on top of training: what population scope adds to policies that PPO has already moved.

    python benchmarks/selection_on_top.py       # after `make study-risk`; half an hour on 2 cores with bfloat16

The mean arm of the study (runs/risk_study), one policy per seed at one KL to the base, answers 288 held-out prompts 16
times each; the best policies at 1 and 2 nats from it, under several measures, are read off these answers by the
quickstart's reward model and rated by its judge (recipes/compare_risk.py). An answer is extremely negative at or below
the study's threshold, the base's own 5 % quantile. What is complete under runs/benchmarks/selection_on_top is kept.
Writes benchmarks/results/selection_on_top.json, one entry per seed of the training.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from best_policies import JUDGE, POLICY, PROMPTS, REWARD_MODEL, run
from measuring import hardware, write_result

RUNS = Path("runs/benchmarks/selection_on_top")
STUDY = Path("runs/risk_study")
SAMPLES = 16
KLS = ("1", "2")
RISKS = ("cvar:0.1", "population:cvar:0.5", "population:0.5*mean+0.5*cvar:0.1", "population:0.5*mean+0.5*cvar:0.25")
KEPT = ("prompts", "n", "rating_threshold", "threshold", "tilts")


def main(seeds: list[int], kl: float) -> None:
    base = STUDY / "evaluation" / "base" / "report.json"
    policies = {seed: STUDY / "rescaled" / f"mean-{seed}" / f"kl-{kl:g}" for seed in seeds}
    for needed in (base, *policies.values()):
        if not needed.exists():
            raise SystemExit(f"error: {needed} does not exist; `make study-risk` makes what this needs (--kl {kl:g}).")
    threshold = json.loads(base.read_text())["threshold"]
    result = {
        "command": "python benchmarks/selection_on_top.py",
        "hardware": hardware(),
        "kl_of_the_policies": kl,
        "seeds": {str(seed): of_seed(seed, policy, threshold) for seed, policy in policies.items()},
    }
    print(write_result("selection_on_top", result))


def of_seed(seed: int, policy: Path, threshold: float) -> dict[str, Any]:
    """What compare_risk.py says of the completions of one trained policy."""
    name = f"mean-{seed}"
    folder = RUNS / f"{name}-{policy.name}"
    completions = folder / "completions" / f"{name}.jsonl"
    if not (folder / "report.json").is_file():
        settings = ("--config", "recipes/smollm2/study_evaluate.yaml", "--base", POLICY, "--reference", name)
        settings += ("--policies", f"{name}={policy}", "--max_prompts", str(PROMPTS), "--num_samples", str(SAMPLES))
        run("recipes/evaluate.py", *settings, "--threshold", repr(threshold), "--output_dir", str(folder))
    found = folder / "tilts" / "compare_risk.json"
    if not found.is_file():
        models = ("--reward_model", REWARD_MODEL, "--judge", JUDGE, "--batch_size", "64")
        flags = ("--kl", *KLS, "--risks", *RISKS, "--threshold", repr(threshold), "--output_dir", str(found.parent))
        run("recipes/compare_risk.py", "--completions", str(completions), *models, *flags)
    content = json.loads(found.read_text())
    return {name: content[name] for name in KEPT}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="Of the study's trainings.")
    parser.add_argument("--kl", type=float, default=2.0, help="KL of the policies, as of the study. Default: 2.")
    options = parser.parse_args()
    main(options.seeds, options.kl)
