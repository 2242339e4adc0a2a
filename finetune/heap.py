"""
What a training step frees: kept for the next step, given back when too much is kept. Knows the C library alone.

A step frees and asks for the same few gigabytes again and again, in pieces of megabytes. glibc gives such pieces back
to the kernel at once and gets them anew, each page by a fault that clears it: a quarter of a pass's processor time
with two layers of Qwen2.5-0.5B and a row of 1,024 tokens. Kept, they are used again. But what does not fit into a hole
is taken anew, and no two rows' logits are of one size: with those kept too, 7 GiB became 23 in 110 steps of the default
release. So the largest pieces go back at once, and all that is free whenever the process has grown by a quarter
(docs/experiments.md). What is computed stays the same.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = (1 << 31) - 1  # bytes: the largest value of an int
_LARGE = 128 << 20  # bytes; what is larger is a row's logits
_GROWN = 1.25  # times what the process holds after a step


def keep_freed_memory() -> bool:
    """Return whether the C library is one that was told to; another one is left as it is."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))


class Heap:
    """Gives back what is free whenever the process has grown by a quarter beyond what one step leaves."""

    def __init__(self) -> None:
        self._bound, self._is_fresh = 0, True
        self._libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None

    def trim(self) -> bool:
        """Return whether something was given back; to be called between steps, when little is in use."""
        held = resident()
        if self._is_fresh:  # the first step after all was given back: what is held now is what a step takes
            self._bound, self._is_fresh = max(self._bound, int(_GROWN * held)), False
        elif self._libc is not None and held > self._bound:
            self._is_fresh = True
            return bool(self._libc.malloc_trim(0))
        return False


def resident() -> int:
    """Return the bytes of this process that are in memory; 0 where the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGESIZE")
