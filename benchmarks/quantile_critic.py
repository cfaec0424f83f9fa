"""A critic that predicts the law of the return against one that predicts its mean, on the PPO of the quickstart.

    .venv/bin/python benchmarks/quantile_critic.py --rollouts 40 --seeds 1 2 3

Trains with `recipes/ppo.py --config recipes/smollm2/ppo.yaml`, once for each arm and seed: `scalar` is the critic of
the quickstart, `quantile` differs in `--critic_head quantile` alone. Needs runs/quickstart/data and its qrm.
Arms of one seed start from the same weights, prompts and random state, so their first rollouts are equal; that is
checked. A finished run leaves runs/quantile_critic/<arm>-seed<N>.json and is not repeated by a second call; an
interrupted one starts again.

Everything is read off each rollout before the critic is trained on it. `explained_variance` is that of sums of rewards
(`critic/explained_variance_sampled`), for both heads: the scalar head's own targets are λ-returns, which contain its
values. The arms therefore differ in target as well as in head. `coverage` is the share of tokens whose return lies at
or below the predicted quantile; tokens of one completion share most of their return, so a rollout says as much as its
number of completions.

Writes benchmarks/results/quantile_critic.json: per arm and seed the series by rollout, their means over the second
half of the rollouts, seconds per optimiser step, and the difference quantile − scalar with a 95 % t interval over
seeds. Any other flag goes to recipes/ppo.py; the result then stays in the output folder, because it is another task.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from measuring import hardware, versions, write_result
from scipy import stats

CONFIG = Path("recipes/smollm2/ppo.yaml")
ARMS = {"scalar": ["--critic_head", "scalar"], "quantile": ["--critic_head", "quantile"]}
SERIES = {
    "explained_variance": "critic/explained_variance_sampled",
    "explained_variance_of_targets": "critic/explained_variance",
    "score_mean": "reward/score_mean",
    "kl": "kl/reference",
    "return_std": "critic/return_std",
    "coverage_0.1": "critic/coverage_0.1",
    "coverage_0.9": "critic/coverage_0.9",
    "spread": "critic/spread",
    "crossing_rate": "critic/crossing_rate",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=40, help="Rollouts of each run. Default: 40.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="Default: 1 2 3.")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="Default: both.")
    parser.add_argument("--output", type=Path, default=Path("runs/quantile_critic"), help="Folder of the runs.")
    options, others = parser.parse_known_args()
    if options.rollouts < 2:
        raise SystemExit("--rollouts must be at least 2: the means are over the second half.")
    for needed in (Path("runs/quickstart/data"), Path("runs/quickstart/qrm")):
        if not needed.is_dir():
            raise SystemExit(f"{needed} is missing; `make quickstart` makes it.")
    runs = {
        arm: {seed: finished_run(arm, seed, options.rollouts, options.output, others) for seed in options.seeds}
        for arm in options.arms
    }
    result = summary(runs, options.rollouts)
    result["command"] = "python benchmarks/quantile_critic.py " + " ".join(sys.argv[1:])
    result |= {"hardware": hardware(), "versions": versions("torch", "transformers", "trl")}
    print(table(result))
    if others:
        path = options.output / "quantile_critic.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(path)
    else:
        print(write_result("quantile_critic", result))


def finished_run(arm: str, seed: int, rollouts: int, output: Path, others: list[str]) -> dict[str, Any]:
    """The record of one training, which is run unless the same command has left one."""
    folder, record = output / f"{arm}-seed{seed}", output / f"{arm}-seed{seed}.json"
    settings = yaml.safe_load(CONFIG.read_text())
    steps = rollouts * settings["num_ppo_epochs"] * settings["num_mini_batches"]
    command = ["recipes/ppo.py", "--config", str(CONFIG), "--output_dir", str(folder), "--seed", str(seed)]
    command += ["--max_steps", str(steps), "--save_strategy", "no", *ARMS[arm], *others]
    # The YAML file is part of the command: with other settings in it the record belongs to another run.
    wanted = {"command": command, "config": settings}
    if record.is_file():
        known = json.loads(record.read_text())
        if known["run"] == wanted:
            return known
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    print(" ".join(command), flush=True)
    subprocess.run([*launcher, *command, "--overwrite_output_dir", "true"], check=True)
    found = {"run": wanted, **measured(folder / "trainer_state.json", rollouts, steps)}
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=2) + "\n")
    partial.replace(record)
    return found


def measured(state: Path, rollouts: int, steps: int) -> dict[str, Any]:
    """Series by rollout, their means over the second half, and the time of a step."""
    history = json.loads(state.read_text())["log_history"]
    logged = [entry for entry in history if "critic/return_std" in entry]
    if len(logged) != rollouts:
        raise SystemExit(f"{state} logs {len(logged)} rollouts instead of {rollouts}; logging_steps must be 1.")
    series = {
        name: [entry[key] for entry in logged] for name, key in SERIES.items() if all(key in entry for entry in logged)
    }
    seconds = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry) / steps
    late = {name: statistics.fmean(values[rollouts // 2 :]) for name, values in series.items()}
    return {"seconds_per_step": seconds, "second_half": late, "by_rollout": series}


def summary(runs: dict[str, dict[int, dict[str, Any]]], rollouts: int) -> dict[str, Any]:
    """Every run, means over seeds, and the paired difference of the arms."""
    arms = {
        arm: {
            "second_half": over_seeds([run["second_half"] for run in by_seed.values()]),
            "seconds_per_step": statistics.median(run["seconds_per_step"] for run in by_seed.values()),
            "seeds": {seed: {k: v for k, v in run.items() if k != "run"} for seed, run in by_seed.items()},
        }
        for arm, by_seed in runs.items()
    }
    result: dict[str, Any] = {"rollouts": rollouts, "arms": arms}
    if set(runs) == set(ARMS):
        for seed, scalar in runs["scalar"].items():
            first = [run["by_rollout"]["score_mean"][0] for run in (scalar, runs["quantile"][seed])]
            if not math.isclose(*first, rel_tol=1e-4, abs_tol=1e-5):
                raise SystemExit(f"The first rollouts of seed {seed} differ ({first}): the arms are not paired.")
        result["quantile_minus_scalar"] = over_seeds(
            [
                {name: runs["quantile"][seed]["second_half"][name] - late for name, late in run["second_half"].items()}
                for seed, run in runs["scalar"].items()
            ]
        )
    return result


def over_seeds(numbers: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean of each number with its t interval over seeds; no interval for a single seed."""
    found = {}
    for name in numbers[0]:
        values = [number[name] for number in numbers]
        mean, low, high = statistics.fmean(values), None, None
        if len(values) > 1:
            half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
            low, high = mean - half, mean + half
        found[name] = {"mean": mean, "low": low, "high": high, "seeds": len(values)}
    return found


def table(result: dict[str, Any]) -> str:
    """The means over the second half of the rollouts, an arm a line."""
    columns = ("explained_variance", "score_mean", "kl", "coverage_0.1", "coverage_0.9", "spread", "return_std")
    lines = [f"| critic | {' | '.join(columns)} | s per step |", "|---" * (len(columns) + 2) + "|"]
    rows = {arm: (numbers["second_half"], numbers["seconds_per_step"]) for arm, numbers in result["arms"].items()}
    if "quantile_minus_scalar" in result:
        rows["quantile − scalar"] = (result["quantile_minus_scalar"], None)
    for name, (numbers, seconds) in rows.items():
        cells = [cell(numbers[column]) if column in numbers else "–" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {'–' if seconds is None else f'{seconds:.1f}'} |")
    return "\n".join(lines)


def cell(number: dict[str, float | None]) -> str:
    interval = "" if number["low"] is None else f" [{number['low']:.3f}, {number['high']:.3f}]"
    return f"{number['mean']:.3f}{interval}"


if __name__ == "__main__":
    main()
