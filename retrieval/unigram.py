"""
SentencePiece's unigram model: text -> ids of the pieces that are most probable together.

The library for this, `tokenizers`, needs 250 MB for the 250,002 pieces of multilingual-e5's vocabulary, four times the
model itself; here they are three numpy arrays of 6 MB. Knows no model file. The source is T. Kudo's "Subword
Regularization" (arXiv 1804.10959), section 3.2; tests hold it to `tokenizers`' results.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import RetrievalError

SPACE = "\u2581"  # what stands for a space, and before a text
_FACTOR = np.uint64(1099511628211)  # FNV's prime; any odd number with its bits spread does
_UNKNOWN_PENALTY = 10.0  # below the least probable piece, as SentencePiece has it


class Unigram:
    """The pieces and their log probabilities."""

    def __init__(
        self,
        pieces: bytes,
        ends: NDArray[np.uint32],
        scores: NDArray[np.float32],
        *,
        unknown: int,
        characters: Mapping[int, str],
    ) -> None:
        """
        Take `pieces`, UTF-8 without anything between them; piece n goes from byte ends[n] to ends[n + 1].

        `characters` says what a character is read as, by its code point; others are read as they are.

        Raises:
            RetrievalError: the pieces are not UTF-8, or two of them share a hash.
        """
        try:
            points = _points(pieces.decode())
        except UnicodeDecodeError as exc:
            raise RetrievalError(f"the vocabulary is not UTF-8: {exc}") from exc
        # Bytes that continue a character begin with the bits 10.
        raw = np.frombuffer(pieces, np.uint8)
        at = np.concatenate([[0], np.cumsum((raw & 0xC0) != 0x80)])[ends]  # ends in characters
        lengths = np.diff(at)
        hashes = np.zeros(len(lengths), np.uint64)
        for n in range(int(lengths.max())):
            longer = np.flatnonzero(lengths > n)
            hashes[longer] = hashes[longer] * _FACTOR + points[at[longer] + n]
        real = lengths > 0
        real[unknown] = False
        order = np.flatnonzero(real)[np.argsort(hashes[real], kind="stable")]
        self._hashes, self._ids, self._scores = hashes[order], order, scores[order].astype(np.float64)
        if len(np.unique(self._hashes)) != len(self._hashes):
            raise RetrievalError("two pieces of the vocabulary share a hash")
        self._longest = int(lengths.max())
        self._unknown = unknown
        self._unknown_score = float(scores.min()) - _UNKNOWN_PENALTY
        self._characters = dict(characters)

    def ids(self, text: str) -> list[int]:
        """Return the ids of the pieces of `text`, in order; a character that no piece holds is the unknown one."""
        return [piece for piece, _ in self._cut(self.plain(text))]

    def places(self, text: str) -> list[int]:
        """Return where in `text` each of its pieces begins, in characters; a space belongs to the piece after it."""
        origins = [n for n, character in enumerate(text) for _ in character.translate(self._characters)]
        read = text.translate(self._characters)
        # As `plain` does, the first of several spaces stays.
        origins = [at for n, at in enumerate(origins) if read[n] != " " or n == 0 or read[n - 1] != " "]
        return [origins[begin] if begin < len(origins) else len(text) for _, begin in self._cut(self.plain(text))]

    def _cut(self, plain: str) -> list[tuple[int, int]]:
        """Return of each piece of `plain` its id and where it begins there; the space put before it has no place."""
        plain = plain.replace(" ", SPACE)
        points = _points(plain if plain.startswith(SPACE) else SPACE + plain)
        n = len(points)
        # best[i]: the highest log probability of the first i characters; its last piece is came[i], from came_at[i] on.
        best = [0.0] + [-np.inf] * n
        came = [self._unknown] * (n + 1)
        came_at = list(range(-1, n))
        for i, found in enumerate(self._pieces_from(points)):
            so_far = best[i]
            for length, piece, score in found:
                if so_far + score > best[i + length]:
                    best[i + length], came[i + length], came_at[i + length] = so_far + score, piece, i
            if so_far + self._unknown_score > best[i + 1]:
                best[i + 1], came[i + 1], came_at[i + 1] = so_far + self._unknown_score, self._unknown, i
        shift = n - len(plain)
        cut: list[tuple[int, int]] = []
        at = n
        while at > 0:
            cut.append((came[at], max(0, came_at[at] - shift)))
            at = came_at[at]
        return cut[::-1]

    def plain(self, text: str) -> str:
        """Return `text` with its characters as they are read, and one space for several."""
        plain = text.translate(self._characters)
        while "  " in plain:
            plain = plain.replace("  ", " ")
        return plain.encode("utf-8", "replace").decode()

    def _pieces_from(self, points: NDArray[np.uint64]) -> list[list[tuple[int, int, float]]]:
        """Return for each character the pieces that begin with it: length in characters, id, log probability."""
        n = len(points)
        found: list[list[tuple[int, int, float]]] = [[] for _ in range(n)]
        hashes = np.zeros(n, np.uint64)
        for length in range(1, min(self._longest, n) + 1):
            n_starts = n - length + 1
            hashes = hashes[:n_starts] * _FACTOR + points[length - 1 :]
            places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
            for i in np.flatnonzero(self._hashes[places] == hashes).tolist():
                place = places[i]
                found[i].append((length, int(self._ids[place]), float(self._scores[place])))
        return found


def _points(text: str) -> NDArray[np.uint64]:
    # One added: a character of code 0 would leave a hash as it is.
    return np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint64) + np.uint64(1)
