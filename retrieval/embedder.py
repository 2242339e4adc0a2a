"""
What turns texts into unit vectors, and where vectors are kept so that no text is embedded twice.

Knows neither models (e5.py, minilm.py, embedders.py) nor passages nor scores. LangChain's `Embeddings` is adapted both
ways.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from retrieval.errors import RetrievalError

Vectors = NDArray[np.float32]
Progress = Callable[[int, int], None]  # (n done, n total)

BATCH = 16  # small: a visitor's query waits for one batch of a rebuild, not for all of it


class Embedder(Protocol):
    """
    What the index needs of a model.

    Both methods return float32 of shape (len(texts), dim), each row of length 1, so that an inner product is a cosine.
    They block for as long as the model runs and may be called from several threads.

    Raises:
        RetrievalError: the model failed; nothing was embedded.
    """

    name: str
    version: str  # changes whenever the same text may get another vector
    dim: int
    shared: float  # cosine that a text and its perfect translation can reach: 1 where one model reads both

    def embed_queries(self, texts: Sequence[str]) -> Vectors: ...

    def embed_passages(self, texts: Sequence[str]) -> Vectors: ...


class VectorCache:
    """
    Vectors on disk, by what was embedded: SQLite, one row a text.

    The key is the hash of embedder version, role and text, so a changed file embeds only what changed in it, and
    another model never meets these vectors. Thread-safe.
    """

    def __init__(self, path: Path | None) -> None:
        """Open or create the file; None keeps the vectors in memory. A damaged file is replaced by an empty one."""
        self._lock = threading.Lock()
        try:
            self._db = self._open(path)
        except sqlite3.DatabaseError:
            if path is None:
                raise
            path.unlink(missing_ok=True)
            self._db = self._open(path)

    @staticmethod
    def _open(path: Path | None) -> sqlite3.Connection:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path or ":memory:", check_same_thread=False, timeout=10)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=OFF")  # a lost cache costs time, nothing else
            db.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID")
        except sqlite3.DatabaseError:
            db.close()
            raise
        return db

    def embed(
        self, embedder: Embedder, texts: Sequence[str], *, as_query: bool, progress: Progress | None = None
    ) -> Vectors:
        """
        Return the vectors of `texts`, shape (len(texts), dim), embedding what is not there yet; blocks, maybe minutes.

        `progress` hears of every batch, cached texts counted as done.

        Raises:
            RetrievalError: the embedder failed; what it had finished before stays in the cache.
        """
        keys = [self._key(embedder, text, as_query) for text in texts]
        known = self._read(set(keys), embedder.dim)
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        n_total, n_done = len(set(keys)), len(set(keys)) - len(missing)
        if progress:
            progress(n_done, n_total)
        # Like lengths together: nothing is padded, but a batch's threads then end at the same time.
        todo = sorted(missing.items(), key=lambda item: len(item[1]))
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            embed = embedder.embed_queries if as_query else embedder.embed_passages
            vectors = embed([text for _, text in batch])
            fresh = {key: vector for (key, _), vector in zip(batch, vectors, strict=True)}
            self._write(fresh)
            known.update(fresh)
            n_done += len(batch)
            if progress:
                progress(n_done, n_total)
        if not keys:
            return np.zeros((0, embedder.dim), dtype=np.float32)
        return np.stack([known[key] for key in keys])

    def close(self) -> None:
        """Close the file; the cache cannot be used any more."""
        with self._lock:
            self._db.close()

    @staticmethod
    def _key(embedder: Embedder, text: str, as_query: bool) -> bytes:
        return hashlib.sha256(f"{embedder.version}\0{'query' if as_query else 'passage'}\0{text}".encode()).digest()

    def _read(self, keys: set[bytes], dim: int) -> dict[bytes, NDArray[np.float32]]:
        found: dict[bytes, NDArray[np.float32]] = {}
        wanted = sorted(keys)
        with self._lock:
            for start in range(0, len(wanted), 500):  # SQLite allows 999 parameters in old builds
                part = wanted[start : start + 500]
                marks = ",".join("?" * len(part))
                select = f"SELECT key, vector FROM vectors WHERE key IN ({marks})"  # noqa: S608  # question marks only
                for key, blob in self._db.execute(select, part):
                    if len(blob) == 4 * dim:
                        found[key] = np.frombuffer(blob, dtype="<f4")
        return found

    def _write(self, fresh: dict[bytes, NDArray[np.float32]]) -> None:
        rows = [(key, np.asarray(vector, dtype="<f4").tobytes()) for key, vector in fresh.items()]
        with self._lock, self._db:
            self._db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)


class ZhangguiEmbeddings(Embeddings):
    """An `Embedder` as LangChain's `Embeddings`: the store's vectors for any LangChain program."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one vector a text, embedded as passages."""
        return [vector.tolist() for vector in self.embedder.embed_passages(texts)]

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of `text`, embedded as a question."""
        vector: list[float] = self.embedder.embed_queries([text])[0].tolist()
        return vector


class LangChainEmbedder:
    """LangChain's `Embeddings` (Hugging Face, OpenAI, …) as an `Embedder`; vectors are brought to length 1."""

    shared = 1.0

    def __init__(self, embeddings: Embeddings, *, name: str, version: str) -> None:
        """
        Ask the model for one vector, to learn its dimension; blocks.

        Raises:
            RetrievalError: the model failed.
        """
        self.embeddings = embeddings
        self.name = name
        self.version = version
        self.dim = int(self.embed_queries(["?"]).shape[1])

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector a text."""
        return self._unit(lambda: [self.embeddings.embed_query(text) for text in texts])

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector a text."""
        return self._unit(lambda: self.embeddings.embed_documents(list(texts)))

    def _unit(self, embed: Callable[[], list[list[float]]]) -> Vectors:
        try:
            vectors = np.asarray(embed(), dtype=np.float32)
        except Exception as exc:  # whatever a foreign model raises, the answer goes on without it
            raise RetrievalError(f"{self.name} failed: {exc}") from exc
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        unit: Vectors = vectors / np.maximum(lengths, 1e-12)
        return unit
