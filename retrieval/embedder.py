"""
What turns texts into unit vectors, and where vectors are kept so that no text is embedded twice.

Knows neither models (e5.py, minilm.py, embedders.py) nor passages nor scores. LangChain's `Embeddings` is adapted both
ways.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

from retrieval.errors import RetrievalError

Vectors = NDArray[np.float32]
Progress = Callable[[int, int], None]  # (n done, n total)

BATCH = 16  # small: a visitor's query waits for one batch of a rebuild, not for all of it


def unit(vectors: Vectors) -> Vectors:
    """Return `vectors` (…, dim), each brought to length 1; one of zeros stays as it is."""
    found: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return found


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


ReadQuestion = tuple[NDArray[np.float32], ...]  # of each encoder, (n_tokens, width)
ReadPassage = tuple[NDArray[np.int8], ...]  # the same in 8 bits; (0, width) where an encoder has no part


@runtime_checkable
class Reads(Protocol):
    """
    What an embedder may do beside: keep of a text what a reranker reads, in the same go as its vector.

    `read_queries` and `read_passages` return the vectors of `embed_queries` and `embed_passages`, and those; `logits`
    how surely each passage answers the question, (len(passages),), and `closer` the same, slower and better, of the few
    that look best. `closer` reads the last part of what is kept of a passage, and nothing else does. `gist` returns the
    part of a text, given with what was read of it, that is a question and not talk around it, "" where all is talk.
    """

    version: str  # changes whenever what is kept of the same text may be another
    width: int  # of a token's vector

    def read_queries(self, texts: Sequence[str]) -> tuple[Vectors, list[ReadQuestion]]: ...

    def read_passages(self, texts: Sequence[str]) -> tuple[Vectors, list[ReadPassage]]: ...

    def logits(self, question: ReadQuestion, passages: Sequence[ReadPassage]) -> NDArray[np.float32]: ...

    def closer(self, question: ReadQuestion, passages: Sequence[ReadPassage]) -> NDArray[np.float32]: ...

    def gist(self, text: str, question: ReadQuestion) -> str: ...


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
            db.execute("CREATE TABLE IF NOT EXISTS readings (key BLOB PRIMARY KEY, tokens BLOB NOT NULL)")
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
        embed = embedder.embed_queries if as_query else embedder.embed_passages
        for batch in _missing(keys, texts, known, progress):
            fresh = dict(zip(batch, embed(list(batch.values())), strict=True))
            self._write(fresh)
            known.update(fresh)
        if not keys:
            return np.zeros((0, embedder.dim), dtype=np.float32)
        return np.stack([known[key] for key in keys])

    def read(self, embedder: Reads, texts: Sequence[str], progress: Progress | None = None) -> list[ReadPassage]:
        """
        Return what a reranker reads of `texts` as passages, and keep their vectors on the way; blocks, maybe minutes.

        `progress` hears of every batch, cached texts counted as done.

        Raises:
            RetrievalError: the embedder failed; what it had finished before stays in the cache.
        """
        keys = [self._key(embedder, text, as_query=False) for text in texts]
        known = self._read_tokens(set(keys), embedder.width)
        for batch in _missing(keys, texts, known, progress):
            vectors, read = embedder.read_passages(list(batch.values()))
            fresh = dict(zip(batch, read, strict=True))
            self._write(dict(zip(batch, vectors, strict=True)), fresh)
            known.update(fresh)
        return [known[key] for key in keys]

    def close(self) -> None:
        """Close the file; the cache cannot be used any more."""
        with self._lock:
            self._db.close()

    @staticmethod
    def _key(embedder: Embedder | Reads, text: str, as_query: bool) -> bytes:
        return hashlib.sha256(f"{embedder.version}\0{'query' if as_query else 'passage'}\0{text}".encode()).digest()

    def _read(self, keys: set[bytes], dim: int) -> dict[bytes, NDArray[np.float32]]:
        rows = self._rows("SELECT key, vector FROM vectors", keys)
        return {key: np.frombuffer(blob, dtype="<f4") for key, blob in rows if len(blob) == 4 * dim}

    def _rows(self, select: str, keys: set[bytes]) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        wanted = sorted(keys)
        with self._lock:
            for start in range(0, len(wanted), 500):  # SQLite allows 999 parameters in old builds
                part = wanted[start : start + 500]
                found += self._db.execute(f"{select} WHERE key IN ({','.join('?' * len(part))})", part)
        return found

    def _read_tokens(self, keys: set[bytes], width: int) -> dict[bytes, ReadPassage]:
        found: dict[bytes, ReadPassage] = {}
        for key, blob in self._rows("SELECT key, tokens FROM readings", keys):
            # How many encoders, how many tokens of each, and the tokens.
            n_parts = int.from_bytes(blob[:4], "little")
            lengths = np.frombuffer(blob[4 : 4 + 4 * n_parts], dtype="<u4").tolist()
            if len(lengths) == n_parts and len(blob) == 4 + 4 * n_parts + sum(lengths) * width:
                tokens = np.frombuffer(blob, np.int8, offset=4 + 4 * n_parts).reshape(-1, width)
                found[key] = tuple(np.split(tokens, np.cumsum(lengths)[:-1]))
        return found

    def _write(
        self, fresh: dict[bytes, NDArray[np.float32]], read: Mapping[bytes, ReadPassage] = MappingProxyType({})
    ) -> None:
        rows = [(key, np.asarray(vector, dtype="<f4").tobytes()) for key, vector in fresh.items()]
        tokens = []
        for key, parts in read.items():
            lengths = np.array([len(parts), *map(len, parts)], dtype="<u4")
            tokens.append((key, lengths.tobytes() + b"".join(part.tobytes() for part in parts)))
        with self._lock, self._db:
            self._db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
            self._db.executemany("INSERT OR REPLACE INTO readings VALUES (?, ?)", tokens)


def _missing(
    keys: Sequence[bytes], texts: Sequence[str], known: Mapping[bytes, object], progress: Progress | None
) -> Iterator[dict[bytes, str]]:
    """Yield the texts that are not `known`, by key, in batches; `progress` hears of each when the next is asked for."""
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
    n_total, n_done = len(set(keys)), len(set(keys)) - len(missing)
    if progress:
        progress(n_done, n_total)
    # Like lengths together: nothing is padded, but a batch's threads then end at the same time.
    todo = sorted(missing.items(), key=lambda item: len(item[1]))
    for start in range(0, len(todo), BATCH):
        batch = dict(todo[start : start + BATCH])
        yield batch
        n_done += len(batch)
        if progress:
            progress(n_done, n_total)


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
        return unit(vectors)
