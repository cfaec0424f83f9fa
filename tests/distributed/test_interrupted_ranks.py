"""Two ranks, killed or asked to leave, go on as if nothing had happened."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from distributed.launching import ROOT, cpu_config, free_port, launch, start
from safetensors.torch import load_file
from torch.utils.cpp_extension import get_default_build_root

from rlhf.durability import damage, files_of, newest_sound, step_of

SCRIPT = ROOT / "tests" / "interrupted.py"
SETTINGS = {"max_steps": 10, "per_device_train_batch_size": 2}
UPDATES = 4  # of one rollout: two epochs of two mini-batches
# How a run is interrupted, and how it trains.
WAYS = {
    "full_shared": (("kill", "terminate"), {}),
    "lora_separate": (("kill", "kill"), {"lora": True, "critic": "separate"}),
}
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def wait_for_events(process, folder: Path, number: int, ranks: int = 2) -> None:
    """Until every rank has passed so many events since this was called; a rank that has yet to start has none."""
    files = [folder / f"events_{rank}" for rank in range(ranks)]
    until, before = time.monotonic() + 300, [path.stat().st_size if path.is_file() else 0 for path in files]
    while not all(path.is_file() and path.stat().st_size >= n + number for path, n in zip(files, before, strict=True)):
        assert process.poll() is None, (folder / "log").read_text()[-6000:]
        assert time.monotonic() < until
        time.sleep(0.005)


def rank_files(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}_{rank}" for rank in (0, 1)]


def begin(config: Path, folder: Path, **settings: object):
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("w") as log:
        settings = json.dumps({**SETTINGS, **settings})
        return start(config, SCRIPT, folder, settings, port=free_port(), output=log)


def leave_a_build_unfinished(root: Path, monkeypatch) -> Path:
    """DeepSpeed's operators as they are built by now, in a folder of this test, with the lock of a builder killed."""
    built = Path(get_default_build_root())
    for folder in [path.parent for path in built.glob("*/deepspeed_shm_comm/build.ninja")]:
        shutil.copytree(folder, root / "deepspeed_shm_comm")
    lock = root / "deepspeed_shm_comm" / "lock"
    lock.touch()
    for path in (lock.parent, *lock.parent.iterdir()):
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(root))
    return lock


def kill(process, folder: Path) -> None:
    """As when a machine dies: the launcher first, or it would ask the second rank to leave in peace."""
    for pid in (process.pid, *(int(path.read_text()) for path in rank_files(folder, "pid"))):
        os.kill(pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def terminate(process, folder: Path) -> None:
    """One rank is asked to leave, and both do."""
    os.kill(int(rank_files(folder, "pid")[1].read_text()), signal.SIGTERM)
    assert process.wait(timeout=120) == 1  # the launcher's own status
    assert set(re.findall(r"exitcode *: (-?\d+)", (folder / "log").read_text())) == {"143"}


def check_newest(folder: Path) -> Path:
    """The checkpoint to resume from: whole, with a part of every rank, and the rollout if that is still in use."""
    checkpoint, skipped = newest_sound(folder / "run")
    assert skipped == []
    names = files_of(checkpoint)
    assert {f"rank_{rank}.safetensors" for rank in (0, 1)} <= set(names)
    assert sum("optim_states" in name for name in names) == 2
    rollouts = {name for name in names if name.startswith("rollout_")}
    assert rollouts == ({f"rollout_{rank}.safetensors" for rank in (0, 1)} if inside_a_rollout(checkpoint) else set())
    return checkpoint


def inside_a_rollout(checkpoint: Path) -> bool:
    return step_of(checkpoint) % UPDATES != 0


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_zero2_ranks_resume_bit_by_bit(tmp_path, monkeypatch, way):
    interruptions, settings = WAYS[way]
    settings = {**SETTINGS, "max_steps": 18, **settings}
    config, chance = cpu_config("zero2", tmp_path, 2), random.Random(way)
    through, folder = tmp_path / "through", tmp_path / "interrupted"
    launch(config, SCRIPT, through, json.dumps(settings))
    checkpoints = []
    # 4 or 5 events a step, 3 or 4 without a save: inside the second rollout, with a checkpoint inside it; then later.
    for interruption, events in zip(interruptions, (chance.randint(22, 29), chance.randint(4, 8)), strict=True):
        # Only SIGTERM's own checkpoint can then hold the step at which it came.
        saves = {"save_strategy": "no"} if interruption == "terminate" else {}
        process = begin(config, folder, **settings, **saves)
        wait_for_events(process, folder, events)
        # Also in the middle of a save.
        time.sleep(chance.uniform(0, 0.03))
        {"kill": kill, "terminate": terminate}[interruption](process, folder)
        if checkpoints:
            assert f"Resuming from {checkpoints[-1]}." in (folder / "log").read_text()
        checkpoints.append(check_newest(folder))
    steps = [step_of(checkpoint) for checkpoint in checkpoints]
    assert UPDATES < steps[0] <= steps[1] < settings["max_steps"]
    assert steps[0] < steps[1] or interruptions[1] == "kill"
    assert any(map(inside_a_rollout, checkpoints))
    lock = leave_a_build_unfinished(tmp_path / "extensions", monkeypatch)
    output = launch(config, SCRIPT, folder, json.dumps(settings))
    assert f"Deleted {lock}" in output
    assert f"Resuming from {checkpoints[-1]}." in output
    expected, record = (json.loads((path / "record.json").read_text()) for path in (through, folder))
    assert (record["ranks"], record["zero_stage"]) == (2, 2)
    assert record == expected
    weights, wanted = (load_file(path / "weights.safetensors") for path in (folder, through))
    assert weights.keys() == wanted.keys()
    assert any("lora_B" in name for name in wanted) == settings.get("lora", False)
    assert [name for name in wanted if not weights[name].equal(wanted[name])] == []


def test_a_full_disk_of_one_rank_costs_both_the_checkpoint_only(tmp_path):
    folder = tmp_path / "run"
    # Above 1000 bytes are this rank's part of the optimiser's state, its rollout and its random state.
    full = {"by_rank": {"1": {"file_limit": [1000, 3, 4]}}}
    settings = {**SETTINGS, "max_steps": 6, "save_total_limit": None, **full}
    output = launch(cpu_config("zero2", tmp_path, 2), SCRIPT, folder, json.dumps(settings))
    warned = [line for line in output.splitlines() if "could not be written" in line]
    for step, failures, line in zip((3, 4), (1, 2), warned, strict=True):
        assert f"The checkpoint of step {step} could not be written (" in line
        assert f"Failures in a row: {failures}; a crash would lose the work since {folder}/run/checkpoint-2." in line
    left = {path.name: damage(path) for path in (folder / "run").iterdir()}
    assert left == {f"checkpoint-{step}": None for step in (1, 2, 5, 6)}
    record = json.loads((folder / "record.json").read_text())
    assert (record["ranks"], record["zero_stage"]) == (2, 2)


def test_a_sigterm_to_one_rank_stops_both_with_one_checkpoint(tmp_path):
    folder = tmp_path / "run"
    process = begin(cpu_config("ddp_cpu", tmp_path, 2), folder, save_strategy="no", max_steps=1000)
    wait_for_events(process, folder, 15)
    second = int(rank_files(folder, "pid")[1].read_text())
    os.kill(second, signal.SIGTERM)
    time.sleep(0.05)
    assert process.wait(timeout=120) == 1  # the launcher's own status
    log = (folder / "log").read_text()
    statuses = re.findall(r"exitcode *: (-?\d+)", log)
    assert set(statuses) == {"143"}, log[-6000:]
    assert "Error" not in log.partition("accelerate/commands/launch.py")[0], log[-6000:]
    checkpoint, skipped = newest_sound(folder / "run")
    assert skipped == []
    assert damage(checkpoint) is None
    assert f"resume from {checkpoint}" in log
    assert [path.name for path in (folder / "run").iterdir()] == [checkpoint.name]
    assert {"rank_0.safetensors", "rank_1.safetensors"} <= set(files_of(checkpoint))


def test_a_sigterm_to_the_launcher_of_one_rank_reaches_it(tmp_path):
    folder = tmp_path / "run"
    process = begin(cpu_config("cpu", tmp_path, 1), folder, save_strategy="no", max_steps=1000)
    wait_for_events(process, folder, 15, ranks=1)
    process.terminate()
    # The launcher dies at once; its rank has a step to finish and a checkpoint to write.
    assert process.wait(timeout=60) == -signal.SIGTERM
    until, rank = time.monotonic() + 120, Path("/proc") / (folder / "pid_0").read_text()
    while rank.is_dir() and "Z" not in (rank / "stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < until, (folder / "log").read_text()[-6000:]
        time.sleep(0.05)
    checkpoint, skipped = newest_sound(folder / "run")
    assert skipped == []
    assert f"resume from {checkpoint}" in (folder / "log").read_text()
