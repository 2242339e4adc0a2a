"""
What a store's own questions teach: examples (question -> passage) -> a score for every passage they name.

Kernel ridge regression over the frozen embedder: each example is a point made of its vector and its hashed words, the
kernel is exp(γ(cosine - 1)), and the answer for a new question is the one linear map of kernel values that fits all
examples with the least squares (Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, 2.3 and 5.4.2).
Solved exactly, so that the same examples always give the same scores, in seconds, with numpy alone; the scores each
example would get from all others come out of the same solution. Knows vectors and words; knows no files (tuning.py has
those) and does not decide whether a store is better off with it (tune.py does).
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.words import weight, words

# Measured on half of zh_tonghuashun's questions, asked the other half (docs/experiments.md): γ 1 to 2.5, words 0.1 to
# 0.2 and ridge 0.01 to 0.1 lie within one point of each other; the nearest example alone is seven points lower.
GAMMA = 1.0
WORDS = 0.15  # share of the words in the cosine; the rest is the vectors'
RIDGE = 0.02
N_BUCKETS = 512  # hashed words: 2048 are no better
N_EXAMPLES = 6_000  # more are thinned out evenly: solving is cubic, and a question reads them all (1 ms for 2,000)


@dataclass(frozen=True, slots=True)
class Example:
    """A question and the passage that answers it, by its `retrieval.load.twin_key`: translations share it."""

    text: str
    key: str


class Learned:
    """The fitted scores. Immutable; safe for any number of threads."""

    def __init__(self, examples: Sequence[Example], vectors: Sequence[NDArray[np.float32]]) -> None:
        """
        Fit. `vectors`, (dim,) each, are the examples' as the index places queries: centred, of length 1.

        Blocks: a second for 2,000 examples, some fifteen for `N_EXAMPLES`.
        """
        self.examples = tuple(examples)
        self.keys = tuple(sorted({example.key for example in examples}))
        number = {key: n for n, key in enumerate(self.keys)}
        counts = Counter(word for example in examples for word in set(words(example.text)))
        n = len(examples)
        self._idf = {word: float(np.log(1 + (n - count + 0.5) / (count + 0.5))) for word, count in counts.items()}
        self._idf_unknown = float(np.log(1 + (n + 0.5) / 0.5))
        self._points = np.stack([self._point(e.text, v) for e, v in zip(examples, vectors, strict=True)])
        wanted = np.zeros((n, len(self.keys)), dtype=np.float32)
        wanted[np.arange(n), [number[example.key] for example in examples]] = 1
        kernel = np.exp(GAMMA * (self._points @ self._points.T - 1), dtype=np.float32)
        kernel[np.diag_indices(n)] += RIDGE
        # One factorisation gives the weights and the diagonal of the inverse that `held_out` needs.
        solved = np.linalg.solve(kernel, np.concatenate([wanted, np.eye(n, dtype=np.float32)], axis=1))
        self._weights: NDArray[np.float32] = solved[:, : len(self.keys)]
        self._leverage = np.diag(solved[:, len(self.keys) :]).copy()
        self._wanted = wanted

    def scores(self, text: str, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the score of every key, shape (len(keys),): about 1 where the examples say so, about 0 elsewhere."""
        kernel = np.exp(GAMMA * (self._points @ self._point(text, vector) - 1), dtype=np.float32)
        found: NDArray[np.float32] = kernel @ self._weights
        return found

    def held_out(self) -> NDArray[np.float32]:
        """Return (n_examples, len(keys)): what each example would score had it not been among them."""
        found: NDArray[np.float32] = self._wanted - self._weights / self._leverage[:, None]
        return found

    def _point(self, text: str, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        hashed = np.zeros(N_BUCKETS, dtype=np.float32)
        for word, n_times in Counter(words(text)).items():
            digest = zlib.crc32(word.encode())
            gain = self._idf.get(word, self._idf_unknown) * weight(word) * (1 + np.log(n_times))
            hashed[(digest >> 1) % N_BUCKETS] += gain if digest & 1 else -gain
        length = float(np.linalg.norm(hashed))
        if length:
            hashed /= length
        point: NDArray[np.float32] = np.concatenate([np.sqrt(1 - WORDS) * vector, np.sqrt(WORDS) * hashed])
        return point.astype(np.float32)


def thin(examples: Sequence[Example], n_most: int = N_EXAMPLES) -> list[Example]:
    """Return at most `n_most` of `examples`, each once, every key keeping its share and at least its first."""
    unique = list(dict.fromkeys(examples))
    if len(unique) <= n_most:
        return unique
    by_key: dict[str, list[Example]] = {}
    for example in unique:
        by_key.setdefault(example.key, []).append(example)
    # Round by round, so that a key with few examples keeps them all before one with many gets its next.
    kept: set[Example] = set()
    depth = 0
    while len(kept) < n_most:
        for rows in by_key.values():
            if depth < len(rows) and len(kept) < n_most:
                kept.add(rows[depth])
        depth += 1
    return [example for example in unique if example in kept]
