"""The main job on real input, from nothing: ratings -> reward model and judge -> PPO twice -> report.

    make quickstart        (or: python recipes/quickstart.py)

It starts the other recipes as a person would and keeps what is finished: a second call goes on where the first one
stopped. A stage is finished when it wrote its record into runs/quickstart/stages; a changed command runs it again.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.durability import checkpoints, newest_sound

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("runs/quickstart")
SECONDS = RUN / "stages" / "seconds.json"  # of the finished stages, for the report
RISKS = {"mean": RUN / "ppo-mean", "cvar:0.1": RUN / "ppo-cvar"}


@dataclass(frozen=True)
class Stage:
    """One command and the folder or file that it makes."""

    name: str
    title: str
    command: tuple[str, ...]
    output: Path
    launched: bool = True  # through accelerate
    needs: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The command to run, with what it takes to continue or replace an interrupted attempt."""
        start = [sys.executable]
        if self.launched:
            start += ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
        return [*start, *self.command, *self._remainder()]

    def _remainder(self) -> list[str]:
        if not self.launched or not self.output.is_dir() or not any(self.output.iterdir()):
            return []
        if self.command[0] == "recipes/ppo.py":
            checkpoint, _ = newest_sound(self.output)
        else:
            complete = [path for path in checkpoints(self.output) if (path / "trainer_state.json").is_file()]
            checkpoint = complete[0] if complete else None
        if checkpoint:
            return ["--resume_from_checkpoint", str(checkpoint)]
        return ["--overwrite_output_dir", "true"]


def stages() -> list[Stage]:
    """Every stage in order."""
    steps = [
        Stage(
            "data",
            "Build the rating data, the policy and the prompts",
            ("recipes/prepare_data.py", "--config", "recipes/smollm2/data.yaml"),
            RUN / "data",
            launched=False,
        ),
        Stage(
            "qrm",
            "Train the quantile reward model on every single rating",
            ("recipes/train_qrm.py", "--config", "recipes/smollm2/qrm.yaml"),
            RUN / "qrm",
            needs=("data",),
        ),
        Stage(
            "judge",
            "Train the independent judge on other texts, with another encoder",
            ("recipes/train_qrm.py", "--config", "recipes/smollm2/judge.yaml"),
            RUN / "judge",
            needs=("data",),
        ),
    ]
    for risk, folder in RISKS.items():
        command = (
            "recipes/ppo.py",
            "--config",
            "recipes/smollm2/ppo.yaml",
            "--risk",
            risk,
            "--output_dir",
            str(folder),
        )
        steps.append(Stage(folder.name, f"PPO with risk {risk}", command, folder, needs=("data", "qrm")))
    steps.append(
        Stage(
            "evaluate",
            "Generate on held-out prompts, judge, report",
            (
                "recipes/evaluate.py",
                "--config",
                "recipes/smollm2/evaluate.yaml",
                "--output_dir",
                str(RUN),
                "--stage_seconds",
                str(SECONDS),
            ),
            RUN / "report.json",
            needs=("data", "qrm", "judge", *(folder.name for folder in RISKS.values())),
        )
    )
    return steps


def record_path(stage: Stage) -> Path:
    """Where a finished stage leaves its record."""
    return RUN / "stages" / f"{stage.name}.json"


def fingerprint(stage: Stage, records: dict[str, dict]) -> dict:
    """What the result of a stage depends on: its command, its YAML file and the stages before it."""
    config = ROOT / stage.command[2]
    return {
        "command": list(stage.command),
        "config": config.read_text(),
        "needs": {name: records[name]["fingerprint"]["config"] for name in stage.needs},
    }


def finished(stage: Stage, wanted: dict) -> dict | None:
    """The record of a stage that need not run again."""
    path = record_path(stage)
    if not path.is_file() or not stage.output.exists():
        return None
    record = json.loads(path.read_text())
    return record if record["fingerprint"] == wanted else None


def run(stage: Stage, wanted: dict, number: int, total: int) -> dict:
    """Run one stage, its output shown as it comes."""
    arguments = stage.arguments()
    print(f"\n[{number}/{total}] {stage.title}\n      {shlex.join(arguments[1:])}\n", flush=True)
    started = time.monotonic()
    result = subprocess.run(arguments, env=environment(), check=False)
    if result.returncode != 0:
        raise SystemExit(
            f"\nStage '{stage.name}' failed (exit {result.returncode}); its own message stands above. "
            "Finished stages are kept: run the same command again to continue."
        )
    record = {"fingerprint": wanted, "seconds": round(time.monotonic() - started, 1)}
    write_json(record_path(stage), record)
    return record


def write_json(path: Path, content: dict) -> None:
    """Write whole or not at all: a torn record would pass for a finished stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2))
    partial.replace(path)


def environment() -> dict[str, str]:
    """Nothing is fetched from a hub, and nothing is reported anywhere."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
    }


def main(arguments: Sequence[str]) -> None:
    """Run what is not finished."""
    if arguments:
        raise SystemExit(__doc__)
    os.chdir(ROOT)
    started, plan, records = time.monotonic(), stages(), {}
    for number, stage in enumerate(plan, 1):
        wanted = fingerprint(stage, records)
        record = finished(stage, wanted)
        if record is None:
            write_json(SECONDS, {name: earlier["seconds"] for name, earlier in records.items()})
            record = run(stage, wanted, number, len(plan))
        else:
            print(f"[{number}/{len(plan)}] {stage.title}: kept, took {record['seconds']:.0f} s", flush=True)
        records[stage.name] = record
    total = sum(record["seconds"] for record in records.values())
    print(f"\nDone: {total / 60:.1f} minutes of work, {(time.monotonic() - started) / 60:.1f} of them now.")
    print(f"Report: {RUN / 'report.html'} (a page) and {RUN / 'report.json'} (numbers)")


if __name__ == "__main__":
    main(sys.argv[1:])
