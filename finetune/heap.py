"""
`keep_freed_memory`: lets glibc keep what a training step frees, for the next step to use. Knows the C library alone.

A step frees and asks for the same few gigabytes again and again, in pieces of megabytes. glibc gives such pieces back
to the kernel at once and gets them anew, each page by a fault that clears it: a quarter of a pass's processor time
with two layers of Qwen2.5-0.5B and a row of 1,024 tokens. Kept, they are used again. What is computed stays the same.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = (1 << 31) - 1  # bytes: the largest value of an int


def keep_freed_memory() -> bool:
    """Return whether the C library is one that was told to; another one is left as it is."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _NEVER)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, _NEVER))
