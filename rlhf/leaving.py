"""How a rank of several ends its process."""

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def end_of_rank() -> Iterator[None]:
    """Around the whole program of a rank: when it is done, its process ends without taking Python apart.

    Of two ranks that had done everything, destroyed their process group included, one was seen to abort on its way out
    (SIGABRT, "terminate called without an active exception", under ZeRO-2 on a busy machine), upon which the launcher
    calls the finished run a failure. What was registered for the exit runs as always, trackers among it; threads that
    are still there are not waited for. A program of one rank, and one that ends by an exception other than
    `SystemExit`, ends as usual.
    """
    status = 0
    try:
        yield
    except SystemExit as leaving:
        if not _several_ranks():
            raise
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    if _several_ranks() and threading.current_thread() is threading.main_thread():
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _several_ranks() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
