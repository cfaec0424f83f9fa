"""Real processes that are killed, asked to leave, or refused disk space, and what they leave behind.

Children are forked from one warm process, so a restart costs a moment and not the imports.
"""

import collections
import json
import math
import random
import signal
import time
from pathlib import Path

import pytest
from interrupted import SETTINGS
from nursery import Nursery

from rlhf.durability import UNFINISHED, damage, newest_sound

STEPS = 24
KILLS = 20
PHASES = (
    "rollout", "checkpoint", "loading", "update", "checkpoint",
    "rollout", "checkpoint", "resuming", "update", "checkpoint",
)  # fmt: skip


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with Nursery(tmp_path_factory.mktemp("nursery"), "interrupted") as warm:
        yield warm


@pytest.fixture(scope="module")
def through(nursery, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("through")
    child = train(nursery, folder)
    assert child.wait() == 0, child.log.read_text()[-3000:]
    return folder


def train(nursery, folder, **arguments):
    return nursery.start("interrupted:train", {"output": str(folder), "max_steps": STEPS, **arguments})


def assert_same_result(folder: Path, expected: Path) -> None:
    """Weights bit by bit; every logged number, KL coefficient, the population's law, multipliers, learning rate."""
    assert (folder / "weights.safetensors").read_bytes() == (expected / "weights.safetensors").read_bytes()
    assert json.loads((folder / "record.json").read_text()) == json.loads((expected / "record.json").read_text())


def wait_for_text(log: Path, text: str, limit: float = 120.0) -> None:
    until = time.monotonic() + limit
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < until, f"{text!r} is not in {log}"
        time.sleep(0.002)


def events_until(phase: str, step: int, resumed_at: int) -> int:
    """How many events a run that goes on after `resumed_at` has reported when this phase of a step begins."""
    logs = sum(s % SETTINGS["logging_steps"] == 0 for s in range(resumed_at + 1, step))
    # Each step begins, comes before the optimiser, ends and is saved.
    return 4 * (step - resumed_at - 1) + logs + (3 if phase == "checkpoint" else 1)


def step_to_kill_in(phase: str, resumed_at: int, chance: random.Random) -> int:
    """The next step that collects a rollout, one or two after it that do not, or any that writes a checkpoint."""
    per_rollout = SETTINGS["num_ppo_epochs"] * SETTINGS["num_mini_batches"]
    step = resumed_at + 1
    if phase == "rollout":
        step += -resumed_at % per_rollout
    elif phase == "update":
        # Past a new checkpoint for certain, so that the kills come forward.
        step += chance.randint(1, 2)
        step += step % per_rollout == 1
    else:
        step += chance.randint(0, 1)
    return min(step, STEPS - 1)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(nursery, through, tmp_path):
    """In every phase of a life: while it loads and resumes, collects a rollout, updates, writes a checkpoint."""
    chance, loading, run = random.Random(7), math.inf, tmp_path / "run"
    found, resumed_at = collections.Counter(), 0
    for kill in range(KILLS):
        phase, started, wanted = PHASES[kill % len(PHASES)], time.time(), 0
        child = train(nursery, tmp_path)
        if phase == "loading":
            # As long as the lives before needed; machines differ.
            time.sleep(loading * chance.uniform(0.2, 0.9))
        elif phase == "resuming":
            wait_for_text(child.log, "Resuming from" if resumed_at else "")
            time.sleep(chance.uniform(0, 0.1))
        else:
            assert child.wait_for_events(1), child.log.read_text()[-3000:]
            loading = min(loading, time.time() - started)
            wanted = events_until(phase, step_to_kill_in(phase, resumed_at, chance), resumed_at)
            assert child.wait_for_events(wanted), child.log.read_text()[-3000:]
            time.sleep(chance.uniform(0, 0.01))
        child.signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, f"kill {kill} came too late"
        found[phase] += child.events.stat().st_size == wanted
        found["unfinished"] += any(path.stat().st_mtime > started for path in run.glob(f"{UNFINISHED}/*"))
        newest, skipped = newest_sound(run)
        assert skipped == []
        if newest is not None:
            resumed_at = int(newest.name.partition("-")[2])
            found["rollout in use"] += (newest / "rollout_0.safetensors").is_file()
    assert STEPS // 2 < resumed_at < STEPS
    # Where a busy machine was late, the kill fell into the next phase.
    assert min(found[phase] for phase in PHASES) >= 1, found
    assert min(found["unfinished"], found["rollout in use"]) >= 3, found
    last = train(nursery, tmp_path)
    assert last.wait() == 0, last.log.read_text()[-3000:]
    assert f"Resuming from {run}/checkpoint-{resumed_at}." in last.log.read_text()
    assert_same_result(tmp_path, through)
    # Killed after the last checkpoint and before the final save: nothing is trained beyond the end.
    for name in ("weights.safetensors", "record.json"):
        (tmp_path / name).unlink()
    assert train(nursery, tmp_path).wait() == 0
    assert_same_result(tmp_path, through)


def test_a_sigterm_and_a_second_one_leave_a_checkpoint_to_go_on_from(nursery, through, tmp_path):
    child = train(nursery, tmp_path, save_strategy="no")
    assert child.wait_for_events(14)
    child.signal(signal.SIGTERM)
    time.sleep(0.01)
    child.signal(signal.SIGTERM)
    assert child.wait() == 143
    newest, skipped = newest_sound(tmp_path / "run")
    assert skipped == []
    assert f"resume from {newest}" in child.log.read_text()
    # Nothing else was saved on the way, so the signal did it.
    assert [path.name for path in (tmp_path / "run").iterdir()] == [newest.name]
    assert train(nursery, tmp_path).wait() == 0
    assert_same_result(tmp_path, through)


def test_a_full_disk_costs_a_checkpoint_and_no_training(nursery, through, tmp_path):
    """The optimiser's file does not fit for two steps; then there is room again."""
    child = train(nursery, tmp_path, file_limit=[100_000, 5, 6], save_total_limit=None)
    assert child.wait() == 0, child.log.read_text()[-3000:]
    log = child.log.read_text()
    assert "The checkpoint of step 5 could not be written" in log
    assert "Failures in a row: 2; a crash would lose the work since" in log
    steps = {int(path.name.partition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert steps == set(range(1, STEPS + 1)) - {5, 6}
    assert not (tmp_path / "run" / UNFINISHED).exists()
    assert damage(tmp_path / "run" / "checkpoint-4") is None
    assert_same_result(tmp_path, through)


def test_a_full_disk_at_the_final_save_is_one_clear_error(nursery, tmp_path):
    child = train(nursery, tmp_path, max_steps=4, file_limit=[100_000, 3, 99])
    assert child.wait() == 0
    assert "Failures in a row: 2" in child.log.read_text()
    child = nursery.start(
        "interrupted:train",
        {"output": str(tmp_path / "b"), "max_steps": 2, "file_limit": [10_000, 2, 99], "final": True},
    )
    assert child.wait() == 1
    log = child.log.read_text()
    assert "OSError: The policy could not be written to" in log
    assert "Make room and continue with resume_from_checkpoint=true" in log
    assert damage(tmp_path / "b" / "run" / "checkpoint-1") is None
