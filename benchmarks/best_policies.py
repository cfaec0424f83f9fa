"""How far risk measures could get: the best policies at one KL, on three sets of prompts and completions.

    python benchmarks/best_policies.py          # after `make quickstart`; half an hour on 2 cores with bfloat16

Each seed takes 288 held-out prompts of its own and 32 completions of each by the quickstart's base policy; its reward
model makes the utilities, its judge the outcomes (recipes/compare_risk.py). The best of 4 is of the first four
completions. What is complete under runs/benchmarks/best_policies is kept. Writes
benchmarks/results/best_policies.json, one entry per seed, and docs/images/best_policies.png, the mean over seeds.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import hardware, write_result

from eval.study_figures import save, tilt_figure

RUNS = Path("runs/benchmarks/best_policies")
FIGURE = Path("docs/images/best_policies.png")
POLICY, REWARD_MODEL, JUDGE = "runs/quickstart/data/policy", "runs/quickstart/qrm", "qrm:runs/quickstart/judge"
SEEDS, PROMPTS, SAMPLES, SELECTED = (0, 1, 2), 288, 32, 4
KLS = ("0.5", "1", "1.5", "2")
POPULATION = (
    "cvar:0.25",
    "cvar:0.5",
    "0.5*mean+0.5*cvar:0.1",
    "0.5*mean+0.5*cvar:0.25",
    "expectile:0.1",
    "entropic:1",
)
RISKS = ("cvar:0.1", "cvar:0.5", *(f"population:{spec}" for spec in POPULATION), "mean+5*below:-2")
FEW_RISKS = ("cvar:0.1", "population:cvar:0.5", "population:0.5*mean+0.5*cvar:0.1")
DRAWN = ("mean", "cvar:0.1", "population:cvar:0.5", "population:0.5*mean+0.5*cvar:0.1", "population:entropic:1")


def main() -> None:
    for needed in (POLICY, REWARD_MODEL, JUDGE.partition(":")[2]):
        if not Path(needed).exists():
            raise SystemExit(f"error: {needed} does not exist; `make quickstart` makes what this needs.")
    seeds = {str(seed): of_seed(seed) for seed in SEEDS}
    result = {
        "command": "python benchmarks/best_policies.py",
        "hardware": hardware(),
        "seeds": seeds,
    }
    save(tilt_figure(averaged([entry["tilts"] for entry in seeds.values()])), FIGURE)
    print(f"{write_result('best_policies', result)}\n{FIGURE}")


def of_seed(seed: int) -> dict[str, Any]:
    """What compare_risk.py says of one seed's completions: of all of them at each KL, and of the best of four."""
    completions = RUNS / f"base-{seed}" / "completions" / "base.jsonl"
    if not completions.is_file():
        generate(seed)
    found = compare(seed, completions, "tilts", ("--kl", *KLS, "--risks", *RISKS))
    few = compare(seed, completions, "best_of_4", ("--n", str(SELECTED), "--risks", *FEW_RISKS))
    names = ("prompts", "n", "rating_threshold", "reference_quantile", "threshold", "tilts")
    return {name: found[name] for name in names} | {
        "best_of_4": few["measures"],
        "best_of_4_by_the_judges_laws": few["measures_by_the_judges_laws"],
    }


def generate(seed: int) -> None:
    settings = ("--config", "recipes/smollm2/study_evaluate.yaml", "--base", POLICY, "--reference", "base")
    settings += ("--policies", f"base={POLICY}", "--max_prompts", str(PROMPTS), "--num_samples", str(SAMPLES))
    run("recipes/evaluate.py", *settings, "--seed", str(seed), "--output_dir", str(RUNS / f"base-{seed}"))


def compare(seed: int, completions: Path, name: str, flags: tuple[str, ...]) -> dict[str, Any]:
    folder = RUNS / f"{name}-{seed}"
    if not (folder / "compare_risk.json").is_file():
        models = ("--reward_model", REWARD_MODEL, "--judge", JUDGE, "--batch_size", "64")
        run("recipes/compare_risk.py", "--completions", str(completions), *models, *flags, "--output_dir", str(folder))
    return json.loads((folder / "compare_risk.json").read_text())


def averaged(seeds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of the measures that are drawn, each outcome the mean over seeds; one that a seed refused is left out."""
    rows = []
    for of_one in zip(*seeds, strict=True):
        if of_one[0]["measure"] in DRAWN and all("outcomes" in row for row in of_one):
            outcomes = {key: sum(row["outcomes"][key] for row in of_one) / len(of_one) for key in ("mean", "rate")}
            rows.append({key: of_one[0][key] for key in ("laws", "kl", "measure")} | {"outcomes": outcomes})
    return rows


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True)


if __name__ == "__main__":
    main()
