"""Memory that a process on a CPU can give back to the system between two phases, without changing a number.

Frozen models (reference, reward model) are read from safetensors files that stay mapped into the process: their pages
are copies of what is on disk. While the policy learns nobody reads them, yet they count as resident, a quarter of the
peak of a small model. Dropping them costs one page fault per 64 kB at the next rollout, filled from the system's page
cache (or from disk, where the system needed that cache for something else).
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SUFFIX = ".safetensors"
MAPS, PAGES = Path("/proc/self/maps"), Path("/proc/self/pagemap")
# Bits of an entry of pagemap, counted from 0.
OF_FILE, SWAPPED, PRESENT = 61, 62, 63


class Mapping(NamedTuple):
    """A stretch of this process's memory that shows a file."""

    start: int  # address
    size: int  # bytes


def release_idle_memory(in_use: torch.nn.Module) -> int:
    """Give back the pages of mapped safetensors files, and free memory that the allocator keeps.

    Exact: a mapping in which a single page was written to is left alone, because dropping that page would bring back
    what the file says (a trained weight would return to its start). Does nothing where the system is not Linux, or
    does not let a process see its own pages.

    Args:
        in_use: module whose files stay resident: it runs next, and would only read them again.

    Returns:
        Resident bytes of mapped files that were given back.
    """
    if not sys.platform.startswith("linux"):
        return 0
    addresses = [parameter.data_ptr() for parameter in in_use.parameters()]
    released = 0
    try:
        for mapping in safetensors_mappings(MAPS.read_text(errors="replace").splitlines()):
            if not any(mapping.start <= address < mapping.start + mapping.size for address in addresses):
                released += _drop(mapping)
    except OSError:
        pass  # a hardened or emulated kernel
    trim_heap()
    return released


def trim_heap() -> None:
    """Return free memory inside the heap to the system, where the C library can.

    Activations of a few megabytes come from the heap; between them lie blocks that live longer, so what a backward
    pass frees would stay resident beneath the gradients that it makes.
    """
    if sys.platform.startswith("linux") and hasattr(system := ctypes.CDLL(None), "malloc_trim"):  # glibc
        system.malloc_trim(ctypes.c_size_t(0))


def trim_during_backward(
    module: torch.nn.Module, every: int = 2**26, *, wanted: Callable[[], bool] = lambda: True
) -> None:
    """Trim the heap whenever the backward pass has made another `every` bytes of gradients.

    Adapters, whose gradients are small, are left alone: what they could give back is not worth the time.

    Args:
        module: what is trained.
        every: bytes.
        wanted: asked each time. A pass that adds to gradients of earlier ones makes no new ones: what its activations
            free is what the next micro-batch takes, and giving it back in between costs a page fault each.
    """
    made = 0
    for parameter in module.parameters():
        if parameter.requires_grad:
            before, made = made, made + parameter.nbytes
            if made // every > before // every:
                parameter.register_post_accumulate_grad_hook(lambda _: trim_heap() if wanted() else None)


def _drop(mapping: Mapping) -> int:
    entries = page_entries(mapping)
    resident = int(present(entries).sum()) * mmap.PAGESIZE
    if not resident or written(entries):
        return 0
    address, size = ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.size)
    # A refusal (a locked page, say) costs memory and nothing else.
    return resident if ctypes.CDLL(None).madvise(address, size, mmap.MADV_DONTNEED) == 0 else 0


def safetensors_mappings(lines: Iterable[str]) -> Iterator[Mapping]:
    """Private mappings of safetensors files, from the lines of `/proc/self/maps`."""
    for line in lines:
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0].endswith(SUFFIX) and permissions.endswith("p"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield Mapping(start, end - start)


def page_entries(mapping: Mapping) -> Tensor:
    """(pages,) int64 entries of `/proc/self/pagemap`.

    Raises:
        OSError: the system does not let this process see them.
    """
    size = mapping.size // mmap.PAGESIZE * 8
    with PAGES.open("rb", buffering=0) as pagemap:
        found = os.pread(pagemap.fileno(), size, mapping.start // mmap.PAGESIZE * 8)
    if len(found) != size:
        raise OSError(f"{PAGES} gave {len(found)} bytes of {size}")
    return torch.frombuffer(bytearray(found), dtype=torch.int64)


def present(entries: Tensor) -> Tensor:
    """(pages,) whether each is resident."""
    return _bit(entries, PRESENT)


def written(entries: Tensor) -> bool:
    """Whether some page is a private copy, resident or swapped out, no longer the page of the file."""
    return bool((_bit(entries, SWAPPED) | (_bit(entries, PRESENT) & ~_bit(entries, OF_FILE))).any())


def _bit(entries: Tensor, place: int) -> Tensor:
    return (entries >> place) & 1 == 1
