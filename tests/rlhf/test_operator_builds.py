"""A lock of a dead builder goes; one of a builder that may live stays."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import tiny_config

from rlhf.operator_builds import check_builds, clear_abandoned_builds

HOUR = 3600


@pytest.fixture(params=["operator", "py311_cpu/operator"])
def lock(request, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    folder = tmp_path / request.param
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    return folder / "lock"


def age(lock: Path, seconds: float) -> None:
    for path in (lock, lock.parent):
        os.utime(path, (time.time() - seconds,) * 2)


def test_an_old_lock_that_nobody_holds_is_deleted_and_named(lock, caplog):
    (lock.parent / "operator.so").touch()
    os.utime(lock.parent / "operator.so", (0, 0))
    age(lock, HOUR)
    clear_abandoned_builds()
    assert [path.name for path in lock.parent.iterdir()] == ["operator.so"]
    assert f"Deleted {lock}" in caplog.text


def test_a_lock_beside_a_file_that_just_changed_is_waited_for(lock, caplog):
    age(lock, HOUR)
    (lock.parent / "operator.o").touch()
    threading.Timer(0.3, lock.unlink).start()
    clear_abandoned_builds(poll_seconds=0.01)
    assert not lock.exists()
    assert caplog.text.count("Waiting for the build") == 1
    assert "Deleted" not in caplog.text


def test_a_lock_that_falls_quiet_while_waited_for_is_deleted(lock, caplog):
    age(lock, HOUR - 0.2)
    clear_abandoned_builds(quiet_seconds=HOUR, poll_seconds=0.01)
    assert not lock.exists()
    assert "Waiting" in caplog.text
    assert "Deleted" in caplog.text


def test_a_builder_at_work_keeps_its_lock_however_old(lock, caplog):
    age(lock, HOUR)
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], cwd=lock.parent, stdin=subprocess.PIPE)
    try:
        clear_abandoned_builds()
    finally:
        sleeper.communicate(b"\n")
    assert lock.exists()
    assert caplog.text == ""


def test_a_second_rank_leaves_the_deleting_to_the_first(lock, monkeypatch, caplog):
    age(lock, HOUR)
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = threading.Thread(target=clear_abandoned_builds, kwargs={"poll_seconds": 0.01})
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert lock.exists()
    lock.unlink()
    second.join(10)
    assert not second.is_alive()
    assert caplog.text == ""


def test_nothing_built_yet_is_nothing_to_do(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    clear_abandoned_builds()
    assert caplog.text == ""
    assert not (tmp_path / "none").exists()


def test_only_a_launch_of_deepspeed_looks_for_locks(lock, tmp_path, monkeypatch):
    age(lock, HOUR)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    check_builds()
    settings = tiny_config(tmp_path)
    assert lock.exists()
    settings.deepspeed = "zero2.json"
    check_builds(settings)
    assert not lock.exists()
    lock.touch()
    age(lock, HOUR)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_builds()
    assert not lock.exists()
