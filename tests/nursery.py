"""A warm process that forks children: real processes to kill, without ten seconds of imports for each.

    with Nursery(folder) as nursery:
        child = nursery.start("interrupted:train", {...})
        child.signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL

The warm process imports and computes nothing, so its children have no threads or locks to inherit.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[1]


@dataclass
class Child:
    """One forked process; its output is in `log`, its progress in `events`, one byte each."""

    pid: int
    nursery: "Nursery"
    log: Path
    events: Path

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Exit status, or minus the signal that ended it."""
        return self.nursery.ask({"wait": self.pid})["status"]

    def wait_for_events(self, number: int, limit: float = 120.0) -> bool:
        """Until the child has reported so many events; False if it ended before."""
        until = time.monotonic() + limit
        while self.events.stat().st_size < number:
            if self.nursery.ask({"ended": self.pid})["ended"]:
                return self.events.stat().st_size >= number
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.002)
        return True


class Nursery:
    """The warm process, seen from the test.

    Args:
        folder: for logs.
        modules: what it imports, once for all children.
    """

    def __init__(self, folder: Path, *modules: str):
        self.folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, function: str, arguments: dict, **environment: str) -> Child:
        """Run `module:function(report, **arguments)` in a new process; `report()` writes an event."""
        self._count += 1
        log, events = self.folder / f"{self._count}.log", self.folder / f"{self._count}.events"
        events.touch()
        order = {"function": function, "arguments": arguments, "environment": environment}
        return Child(self.ask({**order, "log": str(log), "events": str(events)})["pid"], self, log, events)

    def ask(self, order: dict) -> dict:
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    """Read orders until the test closes the pipe; then end what still runs."""
    ended: dict[int, int] = {}
    alive: set[int] = set()

    def reap(pid: int, options: int) -> bool:
        if pid not in ended:
            done, status = os.waitpid(pid, options)
            if done:
                ended[pid] = os.waitstatus_to_exitcode(status)
                alive.discard(pid)
        return pid in ended

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            reap(order["wait"], 0)
            answer = {"status": ended[order["wait"]]}
        elif "ended" in order:
            answer = {"ended": reap(order["ended"], os.WNOHANG)}
        else:
            pid = os.fork()
            if pid == 0:
                live(order)
            alive.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def live(order: dict) -> None:
    """The life of a child."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    events = os.open(order["events"], os.O_WRONLY | os.O_APPEND)
    status = 1
    try:
        module, name = order["function"].split(":")
        getattr(importlib.import_module(module), name)(lambda: os.write(events, b"."), **order["arguments"])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    serve()
