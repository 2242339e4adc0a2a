"""
What searching needs of a store's texts beside their vectors: words, languages, wordings by their letters, codes.

All of it follows from the texts, and takes a minute and more for 10^6 of them: so it is kept with the snapshot, as npy
and JSON. Knows texts and numbers of passages; knows no vectors, no scores and no clock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.checked import load_array, read_checked, save_array
from retrieval.errors import IndexDamaged
from retrieval.lexical import Lexical
from retrieval.words import squash

ARRAYS: Mapping[str, Any] = {
    "words-texts.npy": np.int32,
    "words-saturated.npy": np.float32,
    "words-first.npy": np.int64,
    "sides.npy": np.bool_,
    "wordings.npy": np.uint64,
    "wordings-of.npy": np.int32,
}
JSON_FILE = "tables.json"
FILES = (*ARRAYS, JSON_FILE)
# What decides on words and sides: tables made by other code are made anew, whoever forgot to count FORMAT up.
_MADE_BY = ("words.py", "lexical.py", "names.py", "index.py", "tables.py", "traditional.txt")


class Tables:
    """The tables of one index. Immutable; safe for any number of threads."""

    def __init__(
        self,
        lexical: Lexical,
        zh: NDArray[np.bool_],
        wordings: tuple[NDArray[np.uint64], NDArray[np.int32]],
        codes: Mapping[str, Sequence[int]],
        names: Sequence[str],
    ) -> None:
        """
        Put them together; see `build` and `load`, which do.

        `wordings` are the sorted keys of all wordings and the passage that each belongs to.
        """
        self.lexical = lexical
        self.zh = zh  # of each unit, (n_units,), whether it is on the Chinese side
        self._keys, self._of = wordings
        self.codes = codes  # article number or coupon code -> its passages
        self.names = tuple(names)

    @classmethod
    def build(
        cls,
        bodies: Iterable[str],
        zh: NDArray[np.bool_],
        wordings: Iterable[tuple[str, int]],
        codes: Mapping[str, Sequence[int]],
        names: Sequence[str],
    ) -> Tables:
        """Make the tables of `bodies`, one a passage, and `wordings`, each with its passage. About 0.1 ms a text."""
        pairs = [(key_of(wording), owner) for wording, owner in wordings]
        keys = np.array([key for key, _ in pairs], dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        return cls(
            Lexical(bodies), zh, (keys[order], np.array([n for _, n in pairs], dtype=np.int32)[order]), codes, names
        )

    def worded(self, query: str) -> list[int]:
        """Return the passages that may have `query` as a wording, by its letters and digits alone, rarely one more."""
        key = np.uint64(key_of(query))
        first, last = np.searchsorted(self._keys, key), np.searchsorted(self._keys, key, "right")
        found: list[int] = self._of[first:last].tolist()
        return found

    def save(self, folder: Path) -> list[str]:
        """Write the files into `folder` and return their names. Blocks on disk; OSError where it is full."""
        arrays = {
            **self.lexical.arrays(),
            "sides.npy": self.zh,
            "wordings.npy": self._keys,
            "wordings-of.npy": self._of,
        }
        for name, kind in ARRAYS.items():
            save_array(folder / name, arrays[name].astype(kind, copy=False))
        document = {
            "made_by": made_by(),
            "names": self.names,
            "codes": {code: list(owners) for code, owners in self.codes.items()},
            "vocabulary": list(self.lexical.vocabulary),
        }
        (folder / JSON_FILE).write_text(json.dumps(document, ensure_ascii=False) + "\n", "utf-8")
        return list(FILES)

    @classmethod
    def load(cls, folder: Path, sums: Mapping[str, str], n_passages: int, n_units: int) -> Tables:
        """
        Read what `save` wrote; `sums` are the SHA-256 of the files by name. Blocks on disk.

        Raises:
            IndexDamaged: a file is missing, is not what was written, or does not fit; or other code made it.
        """
        document = json.loads(bytes(read_checked(folder / JSON_FILE, sums[JSON_FILE])))
        if document["made_by"] != made_by():
            raise IndexDamaged(f"{folder.name} has the tables of another version")
        codes, names = document["codes"], document["names"]
        _check(isinstance(codes, dict) and all(_are_numbers(owners, n_passages) for owners in codes.values()), "codes")
        _check(isinstance(names, list) and all(isinstance(name, str) and name for name in names), "names")
        arrays = {name: load_array(folder / name, sums[name], kind) for name, kind in ARRAYS.items()}
        keys, of = arrays["wordings.npy"], arrays["wordings-of.npy"]
        _check(len(keys) == len(of) == n_units - n_passages, "wordings.npy")
        _check(not len(of) or (int(of.min()) >= 0 and int(of.max()) < n_passages), "wordings-of.npy")
        _check(bool((keys[:-1] <= keys[1:]).all()), "wordings.npy")
        _check(len(arrays["sides.npy"]) == n_units, "sides.npy")
        lexical = Lexical.of(n_passages, document["vocabulary"], arrays)
        # A byte that is neither 0 nor 1 would be neither true nor false.
        return cls(lexical, arrays["sides.npy"].view(np.uint8) == 1, (keys, of), codes, names)


def key_of(wording: str) -> int:
    """Return what wordings of the same letters and digits share: 64 bits, so that others share it hardly ever."""
    return int.from_bytes(hashlib.blake2b(squash(wording).encode("utf-8", "replace"), digest_size=8).digest(), "little")


def sides_of(texts: Iterable[str], n: int, side_of: Callable[[str], str]) -> NDArray[np.bool_]:
    """Return for each of `n` texts whether `side_of` it is the Chinese one, shape (n,)."""
    return np.fromiter((side_of(text) == "zh" for text in texts), dtype=np.bool_, count=n)


@lru_cache(maxsize=1)
def made_by() -> str:
    """Return a checksum of the code that makes the tables."""
    digest = hashlib.sha256()
    for name in _MADE_BY:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def _are_numbers(values: object, below: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < below for value in values)


def _check(good: bool, name: str) -> None:
    if not good:
        raise IndexDamaged(f"{name} does not fit the snapshot")
