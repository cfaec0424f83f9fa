"""Builds of DeepSpeed's operators that a killed run left unfinished.

DeepSpeed compiles its operators on first use, and PyTorch guards each build by a file `lock` that the builder deletes
when it is done. A builder that is killed (a preempted job, memory used up) cannot, and every later launch from this
home directory would wait for it without a word and without end.
"""

import logging
import os
import time
from pathlib import Path

from accelerate.utils import parse_flag_from_env
from torch.utils.cpp_extension import get_default_build_root

logger = logging.getLogger(__name__)

# Compiling one file takes a minute or two, and nothing in the folder changes meanwhile. A builder on another machine
# with the same home shows itself by such changes alone.
QUIET_SECONDS = 300.0


def check_builds(settings: object = None) -> None:
    """`clear_abandoned_builds` in a process that DeepSpeed will drive, by its launcher or by these settings.

    It has to come before the settings are built: transformers starts DeepSpeed's communication inside of them.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or getattr(settings, "deepspeed", None):
        clear_abandoned_builds()


def clear_abandoned_builds(quiet_seconds: float = QUIET_SECONDS, poll_seconds: float = 0.5) -> None:
    """Delete the locks of builders that are gone, before DeepSpeed looks for its operators.

    A lock is abandoned when no process of this machine works in its folder and nothing in there has changed for
    `quiet_seconds`; one that is neither abandoned nor seen at work is waited for. The first rank of each machine
    deletes and the others wait for it: two that delete could hit the lock of a build that has just begun anew.

    Args:
        quiet_seconds: how long a builder that cannot be seen is given.
        poll_seconds: between two looks.
    """
    deletes, told = int(os.environ.get("LOCAL_RANK", "0")) < 1, False
    while locks := [lock for lock in _locks() if not _someone_works_in(lock.parent)]:
        young = [lock for lock in locks if _quiet_for(lock.parent) < quiet_seconds]
        for lock in set(locks) - set(young) if deletes else ():
            lock.unlink(missing_ok=True)
            logger.warning(f"Deleted {lock}, which a killed build of a DeepSpeed operator had left behind.")
        if young and deletes and not told:
            told = True
            logger.warning(
                f"Waiting for the build that holds {young[0]}: at most {quiet_seconds:.0f} s if it shows no life. "
                "Delete that file if no other job compiles now."
            )
        if young or not deletes:
            time.sleep(poll_seconds)


def _locks() -> list[Path]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    # By default there is one more folder, of the versions of Python and CUDA.
    return sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])


def _someone_works_in(folder: Path) -> bool:
    """Whether a process of this machine, such as the compiler's `ninja`, has this working directory."""
    for process in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if process.samefile(folder):
                return True
        # It ended between two lines, or is another user's.
        except OSError:
            continue
    return False


def _quiet_for(folder: Path) -> float:
    """Seconds since anything in the folder changed; infinite if nothing is there any more."""
    changes = []
    for path in (folder, *folder.glob("*")):
        try:
            changes.append(path.stat().st_mtime)
        except FileNotFoundError:
            continue
    return time.time() - max(changes) if changes else float("inf")
