"""
A snapshot's files, read after their SHA-256 was found right: whole where they are small, mapped into memory where not.

Knows checksums, mappings and the npy format; does not know what the files are. Nothing of a file is interpreted before
its sum is right, and what is interpreted is bounded by its length. No pickle.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import IndexDamaged

MAPPED_BYTES = 64 << 20  # a larger file is mapped, not read
_AT_ONCE = 4 << 20
_npy: Any = np.lib.format  # its readers of headers have no types


def read_checked(path: Path, expected: str) -> bytes:
    """
    Return what is in `path`.

    Raises:
        IndexDamaged: its SHA-256 is not `expected`.
        OSError: it cannot be read.
    """
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != expected:
        raise IndexDamaged(f"{path.name} is not what was written")
    return raw


@contextmanager
def private_copy(path: Path, expected: str) -> Iterator[str]:
    """
    Yield the name of a copy that nobody else can name, to be mapped; it is gone afterwards, the mapping is not.

    A file cut short under a mapping kills the process that reads there, and what was summed is what is read.

    Raises:
        IndexDamaged: the SHA-256 of `path` is not `expected`.
        OSError: it cannot be read or copied.
    """
    with tempfile.NamedTemporaryFile(prefix=".mapped-", dir=path.parent.parent) as copy:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(_AT_ONCE):
                digest.update(piece)
                copy.write(piece)
        copy.flush()
        if digest.hexdigest() != expected:
            raise IndexDamaged(f"{path.name} is not what was written")
        yield copy.name


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write `array` (n,) as npy. Blocks on disk; OSError where it is full."""
    np.save(path, array, allow_pickle=False)


def load_array(path: Path, expected: str, kind: Any) -> NDArray[Any]:
    """
    Return the array (n,) of `kind` in an npy file, not to be written to.

    Raises:
        IndexDamaged: its SHA-256 is not `expected`, or it holds no such array.
        OSError: it cannot be read.
    """
    try:
        if path.stat().st_size > MAPPED_BYTES:
            with private_copy(path, expected) as name:
                # A plain array of it: numpy's memmap takes microseconds for every slice.
                array: NDArray[Any] = np.asarray(_npy.open_memmap(name, mode="r"))
        else:
            # Not by np.load, which makes room for as much as the header says before it looks how much there is.
            raw = io.BytesIO(read_checked(path, expected))
            if _npy.read_magic(raw) != (1, 0):
                raise IndexDamaged(f"{path.name} is no array of version 1.0")
            shape, _, found = _npy.read_array_header_1_0(raw)
            if found.hasobject or found.itemsize == 0:
                raise IndexDamaged(f"{path.name} holds no numbers")
            array = np.frombuffer(raw.getbuffer(), found, offset=raw.tell()).reshape(shape)
    except (ValueError, SyntaxError, TypeError, OverflowError) as exc:
        raise IndexDamaged(f"{path.name} cannot be read: {str(exc).splitlines()[0][:200]}") from exc
    if array.ndim != 1 or array.dtype != np.dtype(kind):
        raise IndexDamaged(f"{path.name} holds {array.ndim} dimensions of {array.dtype}, not one of {np.dtype(kind)}")
    return array
