"""
The embedded default: a multilingual model for both languages, and an English one beside it where the text is English.

multilingual-e5-small knows Chinese and puts both languages into one space, but ranks colloquial English
poorly; all-MiniLM-L6-v2 knows English only and ranks it well (docs/experiments.md). A text's vector is the two end
to end, [√(1-β)·e5, √β·MiniLM], the second part zero for Chinese: a product of two English vectors is the weighted mean
of both cosines, of two Chinese ones e5's cosine, and across languages √(1-β) of it. Both are tuned for stores'
questions (encoders.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from retrieval.e5 import E5
from retrieval.embedder import Embedder, Vectors
from retrieval.encoders import load_moves
from retrieval.minilm import MiniLM
from retrieval.words import detect_lang

ENGLISH_SHARE = 0.4  # β; 0.3 to 0.5 measured alike, 0 lost 12 points of recall@1 on colloquial English


class BilingualEmbedder:
    """Embeds with both models; see `retrieval.embedder.Embedder`. Vectors have unit length and 768 dimensions."""

    def __init__(self, n_threads: int = 2) -> None:
        """
        Load both, about 0.8 s.

        Raises:
            RetrievalError: one of them is not installed.
        """
        moves, tuning = load_moves()
        self._both, self._english = E5(n_threads, moves.get("e5")), MiniLM(n_threads, moves.get("minilm"))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="minilm")
        self.name = f"{self._both.name}+{self._english.name}"
        self.version = f"{self._both.version}+{self._english.name}@{ENGLISH_SHARE}-{tuning}"
        self.dim = self._both.dim + self._english.dim
        self.shared = float(np.sqrt(1 - ENGLISH_SHARE))

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return self._joined(self._both.embed_queries, texts)

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return self._joined(self._both.embed_passages, texts)

    def _joined(self, embed: Callable[[Sequence[str]], Vectors], texts: Sequence[str]) -> Vectors:
        english = [i for i, text in enumerate(texts) if detect_lang(text) == "en"]
        # Both at once: they spend their time outside the interpreter's lock, on a core each.
        second = self._thread.submit(self._english.embed, [texts[i] for i in english]) if english else None
        first = embed(texts)
        joined = np.zeros((len(texts), self.dim), np.float32)
        joined[:, : self._both.dim] = first
        if second is not None:
            joined[english, : self._both.dim] *= np.sqrt(1 - ENGLISH_SHARE, dtype=np.float32)
            joined[english, self._both.dim :] = second.result() * np.sqrt(ENGLISH_SHARE, dtype=np.float32)
        return joined


def default_embedder(n_threads: int = 2) -> Embedder:
    """
    Return what a store gets that chooses nothing.

    Raises:
        RetrievalError: a model's package is not installed.
    """
    return BilingualEmbedder(n_threads)
