"""finetune/heap.py in a process of its own: what is freed is kept, and given back once too much is."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

GROWING = """
import ctypes
from finetune.heap import Heap, keep_freed_memory, resident

assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def take(mib):
    piece = libc.malloc(mib << 20)
    ctypes.memset(piece, 1, mib << 20)
    return piece


heap = Heap()
libc.free(take(64))
assert not heap.trim()  # what a step takes
usual = resident() >> 20
assert usual >= 64, "what is freed is not kept"
libc.free(take(64))
assert not heap.trim() and abs((resident() >> 20) - usual) < 8, "nor used again"
pieces = [(take(64), take(1))[0] for _ in range(8)]  # holes between pieces that stay: of no use to a larger one
for piece in pieces:
    libc.free(piece)
held = resident() >> 20
given_back = heap.trim()
print(usual, held, int(given_back), resident() >> 20)
libc.free(take(64))
assert not heap.trim() and resident() >> 20 >= 64, "what a step takes is given back each time"
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_a_step_takes_is_kept_and_what_lies_in_holes_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    usual, held, given_back, left = map(int, done.stdout.split())  # MiB
    assert held > usual + 400, "nothing to give back"
    assert given_back
    assert left < usual + 32
