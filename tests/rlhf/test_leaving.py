"""How a rank ends: whatever its interpreter would stumble over on the way out, its status is that of its work."""

import os
import signal
import subprocess
import sys

import pytest

# Taken apart, this interpreter aborts, as a thread of a library that is still there may have it do.
PROGRAM = """
import atexit, os, sys
from rlhf.leaving import end_of_rank

class Aborts:
    def __del__(self):
        os.abort()

left = Aborts()
atexit.register(print, "said goodbye")
with end_of_rank():
    print("worked", end=" ")
    {end}
"""


def run(end: str, ranks: int) -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", PROGRAM.format(end=end)]
    environment = os.environ | {"WORLD_SIZE": str(ranks)}
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('error: no such folder')", 1, "error: no such folder\n"),
    ],
)
def test_a_rank_of_several_ends_with_the_status_of_its_work(end, status, said):
    done = run(end, 2)
    assert (done.returncode, done.stdout, done.stderr) == (status, "worked said goodbye\n", said)


@pytest.mark.parametrize(("end", "ranks"), [("pass", 1), ("sys.exit(3)", 1), ("raise ValueError('a bug')", 2)])
def test_everything_else_ends_as_usual(end, ranks):
    done = run(end, ranks)
    assert done.returncode == -signal.SIGABRT
    assert done.stdout == "worked said goodbye\n"
    assert ("ValueError: a bug" in done.stderr) == ("ValueError" in end)
