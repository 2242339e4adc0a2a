"""
Which texts are alike: MinHash signatures, and a search for them that stays on disk. No knowledge of dialogues.

64 hashes in 16 bands of 4: two texts whose 4-character shingles overlap by half meet in a band with probability 0.64, by
0.7 with 0.99 (https://www.cs.princeton.edu/courses/archive/spr05/cos598E/bib/broder97resemblance.pdf). numpy instead of a
library: datasketch keeps its index in memory or in Redis, and these are forty lines.
"""  # noqa: E501

from __future__ import annotations

import re
import sqlite3
import unicodedata
import zlib

import numpy as np
from numpy.typing import NDArray

N_HASHES = 64
N_BANDS = 16
_ROWS = N_HASHES // N_BANDS
_SHINGLE = 4
_rng = np.random.default_rng(20261122)
# Multiply-shift hashing, modulo 2**64 by overflow: odd factors, the upper half kept (Dietzfelbinger et al. 1997).
_A = _rng.integers(0, 1 << 63, N_HASHES, dtype=np.uint64)[:, None] * np.uint64(2) + np.uint64(1)
_C = _rng.integers(0, 1 << 63, N_HASHES, dtype=np.uint64)[:, None]

Signature = NDArray[np.uint32]  # (N_HASHES,)


def squeeze(text: str) -> str:
    """Return what of `text` counts for likeness: letters and digits, one width, lower case, placeholders unnumbered."""
    text = re.sub(r"\[([A-Z]+)_\d+\]", r"\1", text)
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).lower())


def signature(text: str) -> Signature:
    """Return the MinHash signature of a text; equal texts have equal ones."""
    plain = squeeze(text)
    shingles = {plain[i : i + _SHINGLE] for i in range(max(1, len(plain) - _SHINGLE + 1))}
    hashed = np.fromiter((zlib.crc32(s.encode()) for s in shingles), dtype=np.uint64, count=len(shingles))
    mixed = (_A * hashed[None, :] + _C) >> np.uint64(32)  # (N_HASHES, n_shingles)
    least: Signature = mixed.min(axis=1).astype(np.uint32)
    return least


def likeness(a: Signature, b: Signature) -> float:
    """Return the estimated Jaccard similarity in [0, 1] of the texts behind two signatures."""
    return float((a == b).mean())


class NearIndex:
    """Signatures in an SQLite database, found again by their bands. Texts are added in order, each once."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        db.execute("CREATE TABLE IF NOT EXISTS bands (band INTEGER, key BLOB, n INTEGER)")
        db.execute("CREATE INDEX IF NOT EXISTS bands_by_key ON bands (band, key)")
        db.execute("CREATE TABLE IF NOT EXISTS signatures (n INTEGER PRIMARY KEY, signature BLOB)")

    def add(self, n: int, sig: Signature) -> None:
        rows = [(b, sig[b * _ROWS : (b + 1) * _ROWS].tobytes(), n) for b in range(N_BANDS)]
        self._db.executemany("INSERT INTO bands VALUES (?, ?, ?)", rows)
        self._db.execute("INSERT OR REPLACE INTO signatures VALUES (?, ?)", (n, sig.tobytes()))

    def alike(self, sig: Signature, least: float, limit: int = 64) -> list[tuple[int, float]]:
        """Return (n, likeness) of earlier texts at least `least` alike, the likest first; looks at `limit` a band."""
        found: set[int] = set()
        for b in range(N_BANDS):
            key = sig[b * _ROWS : (b + 1) * _ROWS].tobytes()
            query = "SELECT n FROM bands WHERE band = ? AND key = ? LIMIT ?"
            found |= {n for (n,) in self._db.execute(query, (b, key, limit))}
        scored = []
        for n in sorted(found):
            (raw,) = self._db.execute("SELECT signature FROM signatures WHERE n = ?", (n,)).fetchone()
            score = likeness(sig, np.frombuffer(raw, dtype=np.uint32))
            if score >= least:
                scored.append((n, score))
        return sorted(scored, key=lambda s: (-s[1], s[0]))
