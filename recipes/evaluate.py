"""Generate with several policies, judge the completions, and report means and tails with intervals.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/evaluate.py \\
        --config recipes/smollm2/evaluate.yaml

Every value of the YAML file can be overridden by a flag of the same name; `--help` lists them all.

`output_dir` gets
    completions/NAME.jsonl   one row per completion, with model, seed, decoding, log-probabilities and versions
    scores/NAME.jsonl        what the judge said about each
    report.json              every number with its interval and sample size
    report.html              the same with figures and the worst completions; one file, no script
and the terminal a table. Finished files are reused as long as nothing that they depend on has changed.
"""

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset

from eval.completions import check_judge, read_completions
from eval.generation import Decoding, as_prompt_dataset, generate_completions
from eval.intervals import check_alpha, check_level
from eval.judges import Judge, judge_completions, parse_judge
from eval.page import write_page
from eval.policies import check_source
from eval.records import read_seconds, write_text
from eval.report import Measurement, PolicyResult, build_report, terminal_table, write_report
from eval.tail import Threshold, absolute_threshold, frozen_threshold
from reward.tables import read_dataset
from rlhf.command_line import run
from rlhf.preflight import check_launch


@dataclass
class PolicyArguments:
    """What is evaluated."""

    policies: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Policies as NAME=PATH: a folder or hub id of a model, or of a PEFT adapter (required). "
            "The names appear in tables and plots."
        },
    )
    completions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Completions that are there already, as NAME=FILE, to be judged beside the policies: a file that "
            "best_of_n.py or this recipe wrote."
        },
    )
    reference: str | None = field(
        default=None, metadata={"help": "Name of the policy that the others are compared with. Unset: the first."}
    )
    base: str | None = field(
        default=None, metadata={"help": "Model that KL is measured against. Unset: the path of the reference."}
    )
    training_runs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Training logs to plot, as NAME=PATH: folders with a trainer_state.json. "
            "Unset: the policies' own folders, where they have one."
        },
    )
    calibration: str | None = field(
        default=None, metadata={"help": "calibration.json of the reward model, to plot its coverage."}
    )
    dtype: str = field(default="auto", metadata={"help": "Dtype of the policies' weights; auto: the checkpoint's."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models that ship their own Python code."})


@dataclass
class PromptArguments:
    """What the policies are asked."""

    dataset_name: str = field(
        default=None,
        metadata={
            "help": "Prompts: a folder of save_to_disk, a JSON, CSV or parquet file, or a hub id (required). Column "
            "prompt, text or messages; prompt_id if there is one."
        },
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split of the prompts."})
    max_prompts: int | None = field(default=None, metadata={"help": "Use only so many prompts, drawn with the seed."})
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens generated per completion."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 for all tokens. Below 1, KL is biased."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k likeliest tokens; 0 for all."})
    num_samples: int = field(default=1, metadata={"help": "Completions per prompt."})
    stop_tokens: list[str] = field(
        default_factory=list, metadata={"help": "Tokens that end a completion, beside the EOS tokens."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of prompts, completions and bootstrap."})
    batch_size: int = field(default=32, metadata={"help": "Prompts generated together on each process."})


@dataclass
class JudgeArguments:
    """How completions are judged and counted."""

    judge: str = field(
        default=None,
        metadata={
            "help": "qrm:PATH, source:SPEC (any reward model of ppo.py), classifier:PATH_OR_ID, "
            "classifier:PATH_OR_ID:LABEL, vader, or python:MODULE:FUNCTION (required). Not the reward model that the "
            "policies were trained on."
        },
    )
    judge_reads: str = field(
        default="prompt+completion", metadata={"help": "What the judge is shown: prompt+completion or completion."}
    )
    judge_batch_size: int = field(default=64, metadata={"help": "Texts per forward pass of the judge."})
    judge_max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a judged text; longer ones lose their beginning."}
    )
    threshold: float | None = field(
        default=None,
        metadata={"help": "Score at or below which a completion is extremely negative. Unset: reference_quantile."},
    )
    reference_quantile: float = field(
        default=0.05, metadata={"help": "Freeze the threshold at this lower quantile of the reference's own scores."}
    )
    rating_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Also report the predicted share of single ratings at or below this (judges qrm: and source:)."
        },
    )
    cvar_alpha: float = field(default=0.1, metadata={"help": "Lower-tail mass of the CVaR: 0.1 is the worst tenth."})
    confidence: float = field(default=0.95, metadata={"help": "Confidence level of every interval."})
    resamples: int = field(default=2000, metadata={"help": "Bootstrap draws."})


@dataclass
class OutputArguments:
    """Where the results go."""

    output_dir: str = field(default="runs/evaluation", metadata={"help": "Folder of all results."})
    title: str = field(default="How each policy answers", metadata={"help": "Heading of report.html."})
    worst_completions: int = field(default=10, metadata={"help": "Completions to print per policy in report.html."})
    stage_seconds: str | None = field(
        default=None, metadata={"help": 'JSON {"stage": seconds} of earlier stages, to add to the report.'}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where a GPU is visible."})


def main(policy: PolicyArguments, prompt: PromptArguments, judging: JudgeArguments, output: OutputArguments) -> None:
    """Check, generate, judge, report."""
    state = PartialState(cpu=True) if output.use_cpu else PartialState()
    check_launch(output)
    everything = named_paths("policies and --completions", [*policy.policies, *policy.completions])
    sources = dict(list(everything.items())[: len(policy.policies)])
    reference = policy.reference or next(iter(everything), "")
    decoding, judge = check_arguments(policy, prompt, judging, output, everything, sources, reference)
    ready = [(name, read_completions(path)) for name, path in everything.items() if name not in sources]
    for name, rows in ready:
        check_judge(rows, judge, name)
    with state.main_process_first():
        prompts = load_prompts(prompt) if sources else None
    folder = Path(output.output_dir)
    clock = Clock(folder / "seconds.json", output.stage_seconds, state.is_main_process)
    results = []
    for name, source in sources.items():
        path = folder / "completions" / f"{file_name(name)}.jsonl"
        with clock.stage(f"generate {name}", path):
            rows = generate_completions(
                source,
                prompts,
                name=name,
                base=policy.base or sources.get(reference),
                decoding=decoding,
                path=path,
                batch_size=prompt.batch_size,
                dtype=policy.dtype,
                trust_remote_code=policy.trust_remote_code,
            )
        results.append((name, rows))
    judged = []
    for name, rows in results + ready:
        path = folder / "scores" / f"{file_name(name)}.jsonl"
        with clock.stage(f"judge {name}", path):
            judgement = judge_completions(judge, rows, reads=judging.judge_reads, path=path, name=name)
        judged.append(PolicyResult(name, rows, judgement))
    if state.is_main_process:
        write_results(judged, judge, reference, everything, clock, policy, prompt, judging, output)
    state.wait_for_everyone()
    state.destroy_process_group()


def check_arguments(
    policy: PolicyArguments,
    prompt: PromptArguments,
    judging: JudgeArguments,
    output: OutputArguments,
    everything: dict[str, str],
    sources: dict[str, str],
    reference: str,
) -> tuple[Decoding, Judge]:
    """Refuse what could not work before any model is loaded."""
    needed = (("policies", everything), ("dataset_name", prompt.dataset_name or not sources), ("judge", judging.judge))
    for name, value in needed:
        if not value:
            raise ValueError(f"--{name} is required: set it in the YAML file or as a flag.")
    if reference not in everything:
        raise ValueError(f"reference {reference!r} is not among the policies {', '.join(everything)}.")
    for source in [*sources.values(), *([policy.base] if policy.base else [])]:
        check_source(source)
    if judging.judge_reads not in ("prompt+completion", "completion"):
        raise ValueError(f"judge_reads is prompt+completion or completion, got {judging.judge_reads!r}.")
    check_alpha(judging.cvar_alpha)
    check_level(judging.confidence)
    if judging.threshold is not None:
        absolute_threshold(judging.threshold)
    elif not 0 < judging.reference_quantile < 1:
        raise ValueError(f"reference_quantile lies in (0, 1), for example 0.05; got {judging.reference_quantile}.")
    if judging.rating_threshold is not None and not math.isfinite(judging.rating_threshold):
        raise ValueError(f"rating_threshold must be a finite rating, got {judging.rating_threshold}.")
    if judging.resamples < 100 or prompt.batch_size < 1 or judging.judge_batch_size < 1:
        raise ValueError("resamples must be at least 100, batch_size and judge_batch_size at least 1.")
    if prompt.max_prompts is not None and prompt.max_prompts < 2:
        raise ValueError(f"max_prompts must be at least 2, or no interval exists; got {prompt.max_prompts}.")
    for path in (policy.calibration, output.stage_seconds):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{path} does not exist.")
    training_histories(policy, sources)
    decoding = Decoding(
        max_new_tokens=prompt.max_new_tokens,
        temperature=prompt.temperature,
        top_p=prompt.top_p,
        top_k=prompt.top_k,
        num_samples=prompt.num_samples,
        seed=prompt.seed,
        stop_tokens=tuple(prompt.stop_tokens),
    )
    judge = parse_judge(judging.judge, batch_size=judging.judge_batch_size, max_length=judging.judge_max_length)
    return decoding, judge


def named_paths(option: str, entries: list[str]) -> dict[str, str]:
    """NAME=PATH entries as a dict; refuses malformed ones and names that occur twice or would share a file."""
    named: dict[str, str] = {}
    for entry in entries:
        name, separator, path = (part.strip() for part in entry.partition("="))
        if not (name and separator and path):
            raise ValueError(
                f"--{option} takes NAME=PATH, for example base=runs/quickstart/data/policy; got {entry!r}."
            )
        if file_name(name) in {file_name(other) for other in named}:
            raise ValueError(f"--{option}: two entries would both be called {file_name(name)!r}; choose other names.")
        named[name] = path
    return named


def file_name(name: str) -> str:
    """A policy's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name)


def load_prompts(prompt: PromptArguments) -> Dataset:
    """The evaluation prompts, or a seeded choice of them in their own order."""
    rows, column_split = read_dataset(prompt.dataset_name, prompt.dataset_split)
    if column_split is not None:
        rows = rows.filter(lambda row: row["split"] == column_split)
    rows = as_prompt_dataset(rows)
    if prompt.max_prompts is None or prompt.max_prompts >= len(rows):
        return rows
    chosen = np.random.default_rng(prompt.seed).choice(len(rows), prompt.max_prompts, replace=False)
    return rows.select(np.sort(chosen).tolist())


def training_histories(policy: PolicyArguments, sources: dict[str, str]) -> dict[str, list[dict]]:
    """`log_history` of each training run that left one."""
    runs = named_paths("training_runs", policy.training_runs)
    unknown = [name for name in runs if name not in sources]
    if unknown:
        raise ValueError(f"training_runs names {', '.join(unknown)}, which is none of the policies.")
    histories = {}
    for name, path in (runs or sources).items():
        found = trainer_state(Path(path))
        if found is not None:
            histories[name] = json.loads(found.read_text(encoding="utf-8"))["log_history"]
        elif runs:
            raise ValueError(f"training_runs: {path} holds no trainer_state.json.")
    return histories


def trainer_state(path: Path) -> Path | None:
    """The trainer_state.json of a run: the file itself, the folder's own, or that of its last checkpoint."""
    if path.is_file():
        return path
    if (path / "trainer_state.json").is_file():
        return path / "trainer_state.json"
    checkpoints = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name.split("-")[1]))
    return checkpoints[-1] if checkpoints else None


def write_results(
    results: list[PolicyResult],
    judge: Judge,
    reference: str,
    everything: dict[str, str],
    clock: "Clock",
    policy: PolicyArguments,
    prompt: PromptArguments,
    judging: JudgeArguments,
    output: OutputArguments,
) -> None:
    """report.json, report.html and the table."""
    started, folder = time.monotonic(), Path(output.output_dir)
    measurement = Measurement(
        threshold=score_threshold(results, judging, reference),
        cvar_alpha=judging.cvar_alpha,
        rating_threshold=judging.rating_threshold,
        level=judging.confidence,
        resamples=judging.resamples,
        seed=prompt.seed,
    )
    sources = dict(list(everything.items())[: len(policy.policies)])
    settings: dict[str, Any] = {
        "policies": ", ".join(f"{name} = {path}" for name, path in everything.items()),
        "base": policy.base or sources.get(reference),
        "prompts": prompt.dataset_name,
        "decoding": results[0].completions[0]["decoding"],
        "versions": results[0].completions[0]["versions"],
    }
    report = build_report(
        results, measurement, judge, reference=reference, reads=judging.judge_reads, settings=settings
    )
    clock.record("report", time.monotonic() - started)
    report["seconds"] = {stage: round(value, 1) for stage, value in clock.seconds.items()}
    calibration = json.loads(Path(policy.calibration).read_text(encoding="utf-8")) if policy.calibration else None
    write_report(folder / "report.json", report)
    write_page(
        folder / "report.html",
        report,
        results,
        histories=training_histories(policy, sources),
        calibration=calibration,
        worst=output.worst_completions,
        title=output.title,
    )
    print(f"\n{terminal_table(report)}\n\n{folder / 'report.json'}\n{folder / 'report.html'}", flush=True)


def score_threshold(results: list[PolicyResult], judging: JudgeArguments, reference: str) -> Threshold:
    """The absolute threshold, or the one that the reference's own scores fix."""
    if judging.threshold is not None:
        return absolute_threshold(judging.threshold)
    (scores,) = (result.scores for result in results if result.name == reference)
    return frozen_threshold(scores, judging.reference_quantile, reference=reference)


class Clock:
    """Seconds per stage, kept on disk: a stage whose file was reused keeps the time that making it took.

    Args:
        path: Where the seconds are kept.
        earlier: JSON with the seconds of stages before the evaluation, or None.
        writes: Whether this process writes the file.
    """

    def __init__(self, path: Path, earlier: str | None, writes: bool):
        self.path, self.writes = path, writes
        self.kept = read_seconds(path)
        self.seconds = read_seconds(earlier)

    @contextmanager
    def stage(self, name: str, result: Path) -> Iterator[None]:
        """Times the making of a file."""
        started, before = time.monotonic(), modified(result)
        yield
        unchanged = before is not None and modified(result) == before
        self.record(name, self.kept.get(name, 0.0) if unchanged else time.monotonic() - started)

    def record(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.kept[name] = seconds
        if self.writes:
            write_text(self.path, json.dumps(self.kept, indent=2) + "\n")


def modified(path: Path) -> int | None:
    """Time of the last change of a file, None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


GROUPS = (PolicyArguments, PromptArguments, JudgeArguments, OutputArguments)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
