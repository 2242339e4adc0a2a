"""
What is read of each passage beside a question, in memory and on disk: the token vectors of its body in 8 bits.

Knows arrays and numbers of passages; knows no model. About 128 bytes a token and encoder: 10 KB a passage, so only
stores of at most `MAX_PASSAGES` have them, mapped where they are large. What is read closer, the last part, is three
times as much again and kept in stores of at most `MAX_CLOSER`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.checked import load_array, save_array
from retrieval.embedder import Embedder, ReadPassage, Reads
from retrieval.errors import IndexDamaged
from retrieval.passages import Passage

MAX_PASSAGES = 20_000
MAX_CLOSER = 5_000  # 150 MB of them, twice that of long ones
LEAST_SHARE = 0.5  # of a store's passages that say more than their wordings; there is nothing to read in the others
TOKENS_FILE, FIRST_FILE = "read.npy", "read-first.npy"
FILES = (TOKENS_FILE, FIRST_FILE)


class Readings:
    """Of every passage one matrix an encoder, (n_tokens, width). Immutable; safe for any number of threads."""

    def __init__(self, tokens: NDArray[np.int8], first: NDArray[np.int64], n_encoders: int, width: int) -> None:
        """`tokens` are all rows of all passages one after the other; `first` where each part begins, and the end."""
        self._tokens, self._first = tokens, first
        self._n_encoders, self._width = n_encoders, width

    @classmethod
    def build(cls, read: Sequence[ReadPassage], width: int) -> Readings:
        """Put together what was read of every passage; of many, the last part is left out."""
        if len(read) > MAX_CLOSER:
            read = [(*parts[:-1], parts[-1][:0]) for parts in read]
        parts = [part.reshape(-1) for one in read for part in one]
        first = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.int8)
        return cls(tokens, first, len(read[0]) if read else 1, width)

    def of(self, number: int) -> ReadPassage:
        """Return what was read of passage `number`."""
        start = number * self._n_encoders
        ends = self._first[start : start + self._n_encoders + 1].tolist()
        return tuple(self._tokens[begin:end].reshape(-1, self._width) for begin, end in pairwise(ends))

    @property
    def are_closer(self) -> bool:
        """Whether the last part, which is read closer, is kept."""
        last = np.diff(self._first)[self._n_encoders - 1 :: self._n_encoders]
        return bool(last.any())

    def save(self, folder: Path) -> list[str]:
        """Write the files into `folder` and return their names. Blocks on disk; OSError where it is full."""
        save_array(folder / TOKENS_FILE, self._tokens)
        save_array(folder / FIRST_FILE, self._first)
        return list(FILES)

    @classmethod
    def load(cls, folder: Path, sums: Mapping[str, str], n_passages: int, width: int) -> Readings:
        """
        Read what `save` wrote; `sums` are the SHA-256 of the files by name. Blocks on disk.

        Raises:
            IndexDamaged: a file is missing, is not what was written, or does not fit.
        """
        tokens = load_array(folder / TOKENS_FILE, sums[TOKENS_FILE], np.int8)
        first = load_array(folder / FIRST_FILE, sums[FIRST_FILE], np.int64)
        n_parts, rest = divmod(len(first) - 1, max(n_passages, 1))
        sizes = np.diff(first)
        if rest or n_parts < 1 or first[0] or first[-1] != len(tokens) or (sizes < 0).any() or (sizes % width).any():
            raise IndexDamaged(f"{FIRST_FILE} does not fit the snapshot")
        return cls(tokens, first, n_parts, width)


def reader_of(embedder: Embedder, passages: Sequence[Passage]) -> Reads | None:
    """Return `embedder` where it reads and `passages` are worth reading and not too many; None otherwise."""
    if not isinstance(embedder, Reads) or not 0 < len(passages) <= MAX_PASSAGES:
        return None
    n_worth = sum(passage.text not in ("", passage.title, *passage.questions) for passage in passages)
    return embedder if n_worth >= LEAST_SHARE * len(passages) else None
