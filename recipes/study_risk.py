"""Which risk measure makes extremely negative answers rarer, at one KL target and at what price in mean rating.

    make study-risk        (or, in pieces: python recipes/study_risk.py --arms mean cvar_population --seeds 1)

Every arm is PPO of the quickstart's policy on its reward model, with the same prompts and size, the mean of a
prompt's other completions as baseline, and the KL coefficient adapting to one target (recipes/smollm2/study.yaml);
arms of one seed start alike. No training ends exactly on its target, so each trained adapter is then brought to one
and the same KL by its strength (recipes/rescale_adapter.py, on training prompts), and that policy is evaluated. Arms:

    base                the policy before training
    mean                --risk mean: what the others are compared with
    cvar_response       --risk cvar:0.1, the worst tenth of the readers of each answer
    cvar_population     --risk cvar:0.1 --risk_scope population, the worst tenth of all readings
    mean_variance       --risk mean_variance:0.47 --risk_scope population. Over the 206,989 single human ratings of
                        split `reward` (mean 0.14, variance 3.35, cvar:0.1 -2.99) its penalty is that of
                        0.5*mean+0.5*cvar:0.1; twice that, the whole penalty of cvar:0.1, would fine every rating
                        half a point above the mean
    constraint          --risk mean --constraint "cvar:0.1 >= C". C is what the mean arm reached on its own, by the
                        reward model over the last quarter of its rollouts, plus 0.15: a bound that binds, yet near
    mixed               0.5*mean+0.5*cvar:0.1, population scope: what the best policies at one KL speak for
                        (benchmarks/best_policies.py)
    shallow             cvar:0.5, population scope: among the steepest falls of the tail in compare_risk.py; this and
                        all that follow but the selections only if asked for by --arms
    annealed            cvar:0.1, population scope, from alpha 1 (the mean) over the first 70 % of training
    tail_prompts        the mean, prompts drawn in proportion to the extremely negative mass of two answers of the base
                        (recipes/weigh_prompts.py), a quarter of them uniformly
    tail_prompts_mixed  0.5*mean+0.5*cvar:0.1, population scope, on the same prompts
    best_of_4_mean      the best of 4 answers of the base by the reward model's mean: no training, 4 times the cost of
    best_of_4_cvar      generation; the same by cvar:0.1 of each answer. Seeds 1, 2 and 3 have four answers each

The judge, another model trained on other texts, rates held-out prompts, the same for all arms and seeds. An answer is
extremely negative at or below the base's own 5 % quantile, frozen before any arm is looked at.

Pieces (a training, a rescaling, an evaluation, a selection) that are complete are kept, an interrupted training
continues at its last checkpoint, and seeds come in turn, so that an interrupted study is balanced. The result holds
every piece that is finished, whichever call made it; --kl 1 afterwards evaluates the same trainings at 1 nat (give it
a --result and a --figure of its own).

Writes benchmarks/results/risk_study.json (its keys: docs/study.md), docs/images/risk_study.png, with --document the
tables into docs/results.md, and prints them. Where the KL of two arms differs all the same, beyond their intervals,
it is said.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.completions import read_completions
from eval.judges import judge_completions, judgement_from_rows, parse_judge
from eval.records import fingerprint, read_jsonl, write_text
from eval.report import Measurement, PolicyResult
from eval.study import Run, summary
from eval.study_figures import save, study_figure
from eval.study_report import by_reward_model, flag_distances, last_values, markdown, study_row, told
from eval.tail import Threshold
from rlhf.durability import newest_sound

ROOT = Path(__file__).resolve().parents[1]
POPULATION = ("--risk_scope", "population")
TRAINED: dict[str, tuple[str, ...]] = {
    "mean": ("--risk", "mean"),
    "cvar_response": ("--risk", "cvar:0.1"),
    "cvar_population": ("--risk", "cvar:0.1", *POPULATION),
    "mean_variance": ("--risk", "mean_variance:0.47", *POPULATION),
    "constraint": ("--risk", "mean", "--constraint"),
    "mixed": ("--risk", "0.5*mean+0.5*cvar:0.1", *POPULATION),
    "shallow": ("--risk", "cvar:0.5", *POPULATION),
    "annealed": ("--risk", "cvar:0.1", *POPULATION, "--risk_schedule", "linear", "--risk_schedule_span", "0", "0.7"),
    "tail_prompts": ("--risk", "mean"),
    "tail_prompts_mixed": ("--risk", "0.5*mean+0.5*cvar:0.1", *POPULATION),
}
WEIGHED = ("tail_prompts", "tail_prompts_mixed")
N = 4
SELECTED = {f"best_of_{N}_mean": "mean", f"best_of_{N}_cvar": "cvar:0.1"}
ARMS = ("base", *TRAINED, *SELECTED)
ON_DEMAND = ("shallow", "annealed", *WEIGHED)
ALL_SEEDS = (1, 2, 3)
MARGIN = 0.15


@dataclass(frozen=True)
class Piece:
    """One command of the study and the file or folder that it makes.

    Attributes:
        name: Of its record.
        command: Script and flags.
        output: There when it is done.
        trains: Whether it can continue at a checkpoint in `output`.
        depends: Anything else that its result depends on.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    trains: bool = False
    depends: tuple[Any, ...] = ()

    @property
    def identity(self) -> str:
        return fingerprint([self.command, self.depends])


class Study:
    """The pieces of a study in one folder, and what they have become.

    Args:
        options: See `parse`.
    """

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder, self.at = options, options.output_dir, f"kl-{options.kl:g}"
        self.ppo, self.evaluation = (yaml.safe_load(path.read_text()) for path in (options.ppo, options.evaluation))
        self.policy, self.reward_model = self.ppo["model_name_or_path"], self.ppo["reward_model"]
        for path in (self.policy, self.reward_model, self.evaluation["judge"].partition(":")[2]):
            if not Path(path).exists():
                raise SystemExit(f"error: {path} does not exist; `make quickstart` makes what the study needs.")

    # Pieces ---------------------------------------------------------------------------------------------------------

    def training(self, arm: str, seed: int) -> Piece:
        flags, depends = TRAINED[arm], (self.ppo,)
        if arm == "constraint":
            flags = (*flags, f"cvar:0.1 >= {self.bound():g}")
        if arm in WEIGHED:
            weighing = self.weighing()
            flags = (*flags, "--dataset_name", str(weighing.output), "--prompt_weight_column", "prompt_weight")
            depends = (*depends, weighing.identity)
        steps = self.options.rollouts * self.ppo["num_ppo_epochs"] * self.ppo.get("num_mini_batches", 1)
        output = self.folder / "policies" / f"{arm}-{seed}"
        command = ("recipes/ppo.py", "--config", str(self.options.ppo), *flags, "--seed", str(seed))
        command += ("--max_steps", str(steps), "--kl_target", f"{self.options.kl_target:g}")
        command += ("--output_dir", str(output))
        return Piece(f"train-{arm}-{seed}", command, output, True, depends)

    def rescaling(self, arm: str, seed: int) -> Piece:
        """The trained adapter at the KL of the comparison."""
        training, name, kl = self.training(arm, seed), label(arm, seed), self.options.kl
        folder = self.folder / "rescaled" / name
        command = ("recipes/rescale_adapter.py", "--policy", str(training.output), "--kl", f"{kl:g}")
        command += ("--dataset_name", self.ppo["dataset_name"], "--output_dir", str(folder))
        command += ("--max_prompts", str(self.options.prompts))
        command += ("--max_new_tokens", str(self.evaluation["max_new_tokens"]))
        command += ("--dtype", self.evaluation.get("dtype", "auto"))
        command += ("--batch_size", str(self.evaluation["batch_size"]))
        return Piece(f"rescale-{name}-{self.at}", command, folder / self.at, depends=(training.identity,))

    def weighing(self) -> Piece:
        """The training prompts with weights by the tail of the base's answers."""
        output = self.folder / "tail_prompts"
        command = ("recipes/weigh_prompts.py", "--policy", self.policy, "--dataset_name", self.ppo["dataset_name"])
        command += ("--reward_model", self.reward_model, "--output_dir", str(output), "--num_samples", "2")
        command += ("--rating_threshold", f"{self.evaluation['rating_threshold']:g}")
        command += ("--max_new_tokens", str(self.ppo["max_completion_length"]))
        return Piece("weigh-prompts", command, output)

    def evaluation_of(self, arm: str, seed: int | None = None) -> Piece:
        """Generating and judging, or judging alone for a selection."""
        name, samples, depends = label(arm, seed), self.options.num_samples, (self.evaluation,)
        output = self.folder / "evaluation" / name / "report.json"
        flags = ("--base", self.policy)
        if arm == "base":
            samples = max(N * len(ALL_SEEDS), samples)
            flags += ("--policies", f"base={self.policy}")
        elif arm in SELECTED:
            selection = self.selection(arm, seed)
            flags += ("--completions", f"{name}={selection.output}")
            depends += (selection.identity,)
        else:
            policy = self.rescaling(arm, seed)
            flags += ("--policies", f"{name}={policy.output}")
            depends += (policy.identity,)
            output = output.parents[1] / self.at / name / "report.json"
        if arm != "base":
            flags += ("--threshold", repr(self.threshold().value))
        command = ("recipes/evaluate.py", "--config", str(self.options.evaluation), *flags, "--reference", name)
        command += ("--max_prompts", str(self.options.prompts), "--num_samples", str(samples))
        command += ("--output_dir", str(output.parent))
        piece = f"evaluate-{name}-{self.at}" if arm in TRAINED else f"evaluate-{name}"
        return Piece(piece, command, output, depends=depends)

    def selection(self, arm: str, seed: int) -> Piece:
        base, name = self.evaluation_of("base"), label(arm, seed)
        output = self.folder / f"{name}.jsonl"
        command = ("recipes/best_of_n.py", "--completions", str(base.output.parent / "completions" / "base.jsonl"))
        command += ("--reward_model", self.reward_model, "--risk", SELECTED[arm], "--n", str(N))
        command += ("--skip", str(N * ALL_SEEDS.index(seed)), "--output", str(output), "--name", name)
        return Piece(f"select-{name}", command, output, depends=(base.identity,))

    def pieces(self, arm: str, seed: int | None) -> list[Piece]:
        """What makes a run, in order. Commands may hold numbers that earlier pieces found."""
        if arm == "base":
            return [self.evaluation_of(arm)]
        if arm in SELECTED:
            return [self.selection(arm, seed), self.evaluation_of(arm, seed)]
        made = [self.training(arm, seed), self.rescaling(arm, seed)]
        if arm in WEIGHED:
            made = [self.weighing(), *made]
        return [*made, self.evaluation_of(arm, seed)]

    def threshold(self) -> Threshold:
        """The frozen quantile of the base, from its report."""
        report = json.loads(self.evaluation_of("base").output.read_text())
        quantile = self.evaluation["reference_quantile"]
        return Threshold(report["threshold"], report["threshold_source"], quantile, "base")

    def bound(self) -> float:
        """C of the constraint: as given, or found once and kept, so that it is the same for all seeds."""
        if self.options.constraint_bound is not None:
            return self.options.constraint_bound
        path = self.folder / "constraint.json"
        if not path.is_file():
            seeds = [seed for seed in self.seeds() if self.finished(self.training("mean", seed))]
            if not seeds:
                raise SystemExit("error: the constraint's bound is read off the mean arm: train it too (--arms mean).")
            reached = last_values(self.history("mean", seeds[0]), "population/rating_cvar_0.1")
            found = {"bound": round(reached + MARGIN, 2), "mean_reached": reached, "seed": seeds[0]}
            write_text(path, json.dumps(found, indent=2) + "\n")
        return float(json.loads(path.read_text())["bound"])

    # Records --------------------------------------------------------------------------------------------------------

    def record_path(self, piece: Piece) -> Path:
        return self.folder / "pieces" / f"{piece.name}.json"

    def record(self, piece: Piece) -> dict[str, Any] | None:
        path = self.record_path(piece)
        return json.loads(path.read_text()) if path.is_file() else None

    def finished(self, piece: Piece) -> bool:
        record = self.record(piece)
        done = record is not None and record["finished"] and record["identity"] == piece.identity
        return done and piece.output.exists()

    def run(self, piece: Piece) -> None:
        """Make a piece unless it is complete.

        Raises:
            SystemExit: It failed, or was made with other settings, hours of work perhaps that nobody wants deleted.
        """
        record = self.record(piece)
        if self.finished(piece):
            print(f"{piece.name}: kept, took {record['seconds']:.0f} s", flush=True)
            return
        if record is not None and record["identity"] != piece.identity:
            raise SystemExit(
                f"error: {self.record_path(piece)} is about other settings. Take another --output_dir, or delete that "
                f"file and {piece.output} to make {piece.name} again."
            )
        earlier = record["seconds"] if record else 0.0
        self._write(piece, finished=False, seconds=earlier)
        arguments = self.arguments(piece)
        print(f"\n{piece.name}\n      {shlex.join(arguments[1:])}\n", flush=True)
        started, status = time.monotonic(), None
        try:
            status = execute(arguments)
        finally:
            self._write(piece, finished=status == 0, seconds=round(earlier + time.monotonic() - started, 1))
        if status != 0:
            raise SystemExit(
                f"\n{piece.name} failed (exit {status}); its own message stands above. Finished pieces are kept: run "
                "the same command again to continue."
            )

    def arguments(self, piece: Piece) -> list[str]:
        """The command as a process, with what it takes to continue an interrupted attempt."""
        start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(self.options.accelerate)]
        rest: list[str] = []
        if piece.trains and piece.output.is_dir() and any(piece.output.iterdir()):
            checkpoint, _ = newest_sound(piece.output)
            rest = ["--resume_from_checkpoint", str(checkpoint)] if checkpoint else ["--overwrite_output_dir", "true"]
        return [*start, *piece.command, *rest]

    def _write(self, piece: Piece, *, finished: bool, seconds: float) -> None:
        record = {"identity": piece.identity, "finished": finished, "seconds": seconds, "command": piece.command}
        write_text(self.record_path(piece), json.dumps(record, indent=2) + "\n")

    # Result ---------------------------------------------------------------------------------------------------------

    def seeds(self) -> list[int]:
        return sorted({*ALL_SEEDS, *self.options.seeds})

    def history(self, arm: str, seed: int) -> list[dict]:
        path = self.training(arm, seed).output / "trainer_state.json"
        return json.loads(path.read_text())["log_history"]

    def done(self) -> list[tuple[str, int | None]]:
        """Every finished run, whichever call made it."""
        runs = [("base", None)]
        for arm in ARMS[1:]:
            if arm == "constraint" and not self._bound_is_known():
                continue
            runs += [(arm, seed) for seed in self.seeds() if has_seed(arm, seed)]
        return [run for run in runs if all(self.finished(piece) for piece in self.pieces(*run))]

    def _bound_is_known(self) -> bool:
        return self.options.constraint_bound is not None or (self.folder / "constraint.json").is_file()

    def result(self) -> dict[str, Any]:
        """Everything that `risk_study.json` holds."""
        settings, rows, runs, done = self.evaluation, [], [], self.done()
        measurement = Measurement(
            threshold=self.threshold(),
            cvar_alpha=settings["cvar_alpha"],
            rating_threshold=settings["rating_threshold"],
            level=settings["confidence"],
            resamples=settings["resamples"],
            seed=settings["seed"],
        )
        reward_model = parse_judge(f"source:{self.reward_model}", batch_size=settings["judge_batch_size"])
        for arm, seed in done:
            name = label(arm, seed)
            folder = self.evaluation_of(arm, seed).output.parent
            source = folder / "completions" / f"{name}.jsonl"
            if arm in SELECTED:
                source = self.selection(arm, seed).output
            completions = read_completions(source)
            result = PolicyResult(
                name, completions, judgement_from_rows(read_jsonl(folder / "scores" / f"{name}.jsonl"))
            )
            path = folder / "reward_model.jsonl"
            predicted = judge_completions(reward_model, completions, path=path, name=f"{name} by the reward model")
            trained = {}
            if arm in TRAINED:
                trained = {"history": self.history(arm, seed), "seconds": self.seconds(arm, seed)}
            rows.append(study_row(arm, seed, result, measurement, predicted=predicted, **trained))
            runs.append(Run.of(arm, seed, result, measurement.rating_threshold))
        return {
            "threshold": measurement.threshold.as_dict(),
            "rating_threshold": measurement.rating_threshold,
            "cvar_alpha": measurement.cvar_alpha,
            "level": measurement.level,
            "resamples": measurement.resamples,
            "kl": self.options.kl,
            "kl_target": self.options.kl_target,
            "rollouts": self.options.rollouts,
            "constraint_bound": self.bound() if self._bound_is_known() else None,
            "judge": settings["judge"],
            "reward_model": self.reward_model,
            "warnings": [*flag_distances(rows), *self._missing(done)],
            "rows": rows,
            **summary(runs, measurement),
        }

    def seconds(self, arm: str, seed: int) -> float:
        return self.record(self.training(arm, seed))["seconds"]

    def _missing(self, done: Sequence[tuple[str, int | None]]) -> list[str]:
        arms = self.options.arms
        wanted = [("base", None)] if "base" in arms else []
        wanted += [(arm, seed) for seed in self.options.seeds for arm in arms if has_seed(arm, seed)]
        missing = [label(*run) for run in dict.fromkeys(wanted) if run not in done]
        return [f"not finished: {', '.join(missing)}"] if missing else []

    def report(self) -> None:
        """Write the result of what is finished, draw it, print it."""
        result = self.result()
        write_text(self.options.result, json.dumps(result, indent=1, allow_nan=False) + "\n")
        save(study_figure(result["rows"], result["arms"]), self.options.figure)
        if self.options.document is not None:
            write_text(self.options.document, told(self.options.document.read_text(), tables(result)))
        print(f"\n{tables(result)}\n\n{self.options.result}\n{self.options.figure}", flush=True)


def tables(result: dict[str, Any]) -> str:
    """What the study found, to read."""
    return f"{markdown(result)}\n\nBy the reward model itself, which is no measurement:\n\n{by_reward_model(result)}"


def has_seed(arm: str, seed: int) -> bool:
    """Whether an arm has a run of this seed: the base has none, and a selection one for each share of its answers."""
    return arm in TRAINED or (arm in SELECTED and seed in ALL_SEEDS)


def label(arm: str, seed: int | None) -> str:
    """What files and tables of one run are called."""
    return arm if seed is None else f"{arm}-{seed}"


def execute(arguments: Sequence[str]) -> int:
    """Run a command, its output shown as it comes; nothing is fetched from a hub. Its exit status."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1"}
    return subprocess.run(arguments, env=os.environ | offline | quiet, check=False).returncode


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a call, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [arm for arm in ARMS if arm not in ON_DEMAND]
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=default, help="Default: all but " + " ".join(ON_DEMAND)
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(ALL_SEEDS), help="Of the trainings: 1 2 3.")
    parser.add_argument("--rollouts", type=int, default=20, help="Of each training. Default: 20.")
    parser.add_argument("--kl_target", type=float, default=4.0, help="Nats per completion, of training. Default: 4.")
    parser.add_argument("--kl", type=float, default=2.0, help="Nats at which arms are compared. Default: 2.")
    parser.add_argument("--prompts", type=int, default=288, help="Held-out prompts. Default: 288.")
    parser.add_argument("--num_samples", type=int, default=4, help="Completions of each. Default: 4.")
    parser.add_argument("--constraint_bound", type=float, help="C of the constraint. Default: read off the mean arm.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/risk_study"), help="Folder of the pieces.")
    parser.add_argument("--result", type=Path, default=Path("benchmarks/results/risk_study.json"), help="JSON.")
    parser.add_argument("--figure", type=Path, default=Path("docs/images/risk_study.png"), help="PNG.")
    parser.add_argument(
        "--document", type=Path, help="Markdown that gets the tables between its marks. Default: none."
    )
    parser.add_argument("--ppo", type=Path, default=Path("recipes/smollm2/study.yaml"), help="Settings of ppo.py.")
    parser.add_argument(
        "--evaluation", type=Path, default=Path("recipes/smollm2/study_evaluate.yaml"), help="Of evaluate.py."
    )
    parser.add_argument("--accelerate", type=Path, default=Path("accelerate_configs/cpu.yaml"), help="Of the launch.")
    options = parser.parse_args(arguments)
    if options.rollouts < 1 or options.prompts < 2 or options.num_samples < 1 or min(options.seeds) < 0:
        parser.error("--rollouts and --num_samples are at least 1, --prompts at least 2, seeds 0 or more")
    for name in ("kl", "kl_target"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name} must be above 0 nats, got {getattr(options, name)}")
    if options.document is not None:
        try:
            told(options.document.read_text(), "")
        except (OSError, ValueError) as error:
            parser.error(f"--document {options.document}: {error}")
    # The order of ARMS: the constraint needs the mean arm.
    options.arms = [arm for arm in ARMS if arm in options.arms]
    return options


def main(arguments: Sequence[str]) -> None:
    """Make what is missing, seed by seed, and report after each."""
    options = parse(arguments)
    os.chdir(ROOT)
    study = Study(options)
    study.run(study.evaluation_of("base"))
    for seed in options.seeds:
        for arm in options.arms:
            # Made one at a time: the command of an evaluation may depend on what the training left.
            for piece in study.pieces(arm, seed) if has_seed(arm, seed) else ():
                study.run(piece)
        study.report()


if __name__ == "__main__":
    main(sys.argv[1:])
