"""Real processes that are killed, asked to leave, or refused disk space, and what they leave behind.

Children are forked from one warm process, so a restart costs a moment and not the imports.
"""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from nursery import Nursery

from rlhf.durability import UNFINISHED, damage, newest_sound

STEPS = 24
KILLS = 20


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


@pytest.mark.slow
def test_twenty_kills_lose_nothing(nursery, through, tmp_path):
    chance = random.Random(7)
    inside_rollout = resumed_at = 0
    for kill in range(KILLS):
        child = train(nursery, tmp_path)
        # Somewhere in the first steps of this life, and a random while after one of their events.
        assert child.wait_for_events(chance.randint(0, 5)), child.log.read_text()[-3000:]
        time.sleep(chance.uniform(0, 0.03))
        child.signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, f"kill {kill} came too late"
        newest, skipped = newest_sound(tmp_path / "run")
        assert skipped == []
        if newest is not None:
            resumed_at = int(newest.name.partition("-")[2])
            inside_rollout += (newest / "rollout_0.safetensors").is_file()
    assert 0 < resumed_at < STEPS
    assert inside_rollout > 0
    last = train(nursery, tmp_path)
    assert last.wait() == 0, last.log.read_text()[-3000:]
    assert f"Resuming from {tmp_path}/run/checkpoint-{resumed_at}." in last.log.read_text()
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
