"""Memory that a process on a CPU can give back to the system between two phases, without changing a number.

Frozen models (reference, reward model) are read from safetensors files that stay mapped into the process: their pages
are copies of what is on disk. While the policy learns nobody reads them, yet they count as resident, a quarter of the
peak of a small model. Dropping them costs one page fault per 64 kB at the next rollout, filled from the system's page
cache (or from disk, where the system needed that cache for something else).
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIX = ".safetensors"
MAPS = Path("/proc/self/smaps")


class Mapping(NamedTuple):
    """A stretch of this process's memory that shows a file."""

    start: int  # address
    size: int  # bytes
    path: str
    written: bool  # some page is a private copy, no longer what is in the file
    resident: int  # bytes


def release_idle_memory() -> int:
    """Give back clean pages of mapped safetensors files, and free memory that the allocator keeps.

    Exact: a mapping in which a single page was written to is left alone, because dropping that page would bring back
    what the file says (a trained weight would return to its start). Does nothing where the system is not Linux.

    Returns:
        Resident bytes of mapped files that were given back.
    """
    if not sys.platform.startswith("linux") or not MAPS.is_file():
        return 0
    system = ctypes.CDLL(None, use_errno=True)
    released = 0
    for mapping in clean_mappings(MAPS.read_text(errors="replace").splitlines()):
        address, size = ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.size)
        # A refusal (a locked page, say) costs memory and nothing else.
        if system.madvise(address, size, mmap.MADV_DONTNEED) == 0:
            released += mapping.resident
    if hasattr(system, "malloc_trim"):  # glibc
        system.malloc_trim(ctypes.c_size_t(0))
    return released


def clean_mappings(lines: Iterable[str]) -> Iterator[Mapping]:
    """Private mappings of safetensors files of which no page was written to, from the lines of an smaps file."""
    return (m for m in _mappings(lines) if m.path.endswith(SUFFIX) and not m.written)


def _mappings(lines: Iterable[str]) -> Iterator[Mapping]:
    header: list[str] | None = None
    sizes: dict[str, int] = {}
    for line in lines:
        first, _, rest = line.partition(" ")
        if first.endswith(":"):
            if rest.rstrip().endswith(" kB"):
                sizes[first[:-1]] = int(rest.split()[0]) * 1024
            continue
        if header is not None:
            yield _mapping(header, sizes)
        header, sizes = line.split(maxsplit=5), {}
    if header is not None:
        yield _mapping(header, sizes)


def _mapping(header: list[str], sizes: dict[str, int]) -> Mapping:
    start, end = (int(address, 16) for address in header[0].split("-"))
    # Pages of a private mapping that were written to are anonymous; those swapped out are no longer resident. A number
    # that this kernel does not give, or a mapping that is shared (`s`), is no proof of anything: taken for written.
    copied = sizes.get("Anonymous", 1) + sizes.get("Swap", 1)
    path = header[5] if len(header) == 6 else ""
    return Mapping(start, end - start, path, copied > 0 or "p" not in header[1], sizes.get("Rss", 0))
