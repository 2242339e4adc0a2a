"""
Any LangChain `VectorStore` in FAISS's place, for finding the nearest; the cosines of what it finds stay here.

Knows LangChain's interface and nothing of any server: pgvector.py opens one, and `connect_by_name` any other. What lies
there is addressed by content: embedder, role and text give a unit's id, so an edit sends only what changed, and several
versions and several servers share one collection a language. Vectors go there as the embedder gave them (what is
centred depends on the whole store) and filters are not used, since no two stores have the same: more is asked for and
sorted out here. While a server does not answer, this machine's own index does.
"""

from __future__ import annotations

import importlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from numpy.typing import NDArray

from retrieval.embedder import Embedder, VectorCache, Vectors
from retrieval.errors import RetrievalError
from retrieval.index import BODY_CHARS, Index, Unit

log = logging.getLogger("retrieval")

BATCH = 500  # units a request; their ids fit into one statement of any database
PAUSE_S = 30.0  # a server that did not answer is left alone for so long
UNIT = "unit"  # the metadata field with a unit's id: not every store gives ids back
_IDS = uuid.UUID("6f2c9c1e-55a4-4c8e-9d5e-2b0a3b6c7a10")


class Connect(Protocol):
    """Opens a collection, making it where it is not there yet."""

    def __call__(self, name: str, embeddings: Embeddings, dim: int) -> VectorStore: ...


class _Prepared(Embeddings):
    """LangChain's way of handing over vectors that are there already: an embedding that looks them up."""

    def __init__(self) -> None:
        self._ready: dict[str, deque[list[float]]] = {}

    def prepare(self, texts: Sequence[str], vectors: Vectors) -> None:
        self._ready = {}
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            self._ready.setdefault(text, deque()).append(vector)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self._ready[text].popleft() for text in texts]

    def embed_query(self, text: str) -> list[float]:
        raise RetrievalError("a collection of Zhanggui's is searched by vector only")


class VectorServer:
    """A LangChain vector store for each language. Searching is thread-safe; `attach` is called by one thread."""

    def __init__(self, connect: Connect, name: str) -> None:
        """Take what opens a collection, and `name` for messages; nothing is opened yet."""
        self._connect = connect
        self.name = name
        self.problem = ""  # what is wrong now, one sentence; empty while all is well
        self._asked_again_at = 0.0

    def attach(self, index: Index, embedder: Embedder, cache: VectorCache) -> None:
        """
        Send what the collections lack of `index` and let it look there; blocks, minutes the first time.

        Where that fails the index goes on by itself and `problem` says why; the next change tries again.
        """
        try:
            index.elsewhere = _Attached(self, index, embedder, cache)
            self.problem = ""
        except Exception as exc:  # whatever a foreign store raises, this machine's index answers
            self.failed(exc)

    def failed(self, exc: Exception) -> None:
        """Note a failure, and leave the server alone for a while."""
        self._asked_again_at = time.monotonic() + PAUSE_S
        reason = " ".join(str(exc).split())[:160] or type(exc).__name__
        self.problem = f"the vector server ({self.name}) does not answer, this machine searches alone: {reason}"
        log.warning("%s", self.problem)

    def close(self) -> None:
        """End the connections, where the store has any."""
        end = getattr(self._connect, "close", None)
        if end is not None:
            end()

    def may_be_asked(self) -> bool:
        """Return whether the last failure is long enough ago, if there was one."""
        return not self.problem or time.monotonic() >= self._asked_again_at

    def open(self, name: str, embeddings: Embeddings, dim: int) -> VectorStore:
        """Return the collection `name`."""
        return self._connect(name, embeddings, dim)


class _Attached:
    """One index's units in the collections; see `retrieval.index.Nearest`."""

    def __init__(self, server: VectorServer, index: Index, embedder: Embedder, cache: VectorCache) -> None:
        self._server = server
        ids = [_id_of(embedder, unit) for unit in index.units]
        self._units: dict[str, list[int]] = {}
        for number, unit_id in enumerate(ids):
            self._units.setdefault(unit_id, []).append(number)
        self._stores: dict[str, VectorStore] = {}
        for side in ("zh", "en"):
            numbers = index.vectors.units_of(side)
            wanted = {ids[number]: index.units[number] for number in numbers.tolist()}
            prepared = _Prepared()
            name = f"zhanggui_{uuid.uuid5(_IDS, embedder.version).hex[:12]}_{side}"
            store = self._stores[side] = server.open(name, prepared, index.dim)
            _send(store, prepared, _missing(store, wanted), embedder, cache)

    def nearest(self, vector: NDArray[np.float32], side: str, n: int) -> NDArray[np.int64] | None:
        if not self._server.may_be_asked():
            return None
        try:
            found = self._stores[side].similarity_search_by_vector(vector.tolist(), k=n)
        except Exception as exc:  # as above
            self._server.failed(exc)
            return None
        self._server.problem = ""
        # What other versions left there is not of this index and so has no number.
        numbers = [number for document in found for number in self._units.get(document.metadata.get(UNIT, ""), ())]
        return np.array(numbers, dtype=np.int64)


def _id_of(embedder: Embedder, unit: Unit) -> str:
    role = "passage" if unit.is_body else "query"
    return str(uuid.uuid5(_IDS, f"{embedder.version}\0{role}\0{_embedded(unit)}"))


def _embedded(unit: Unit) -> str:
    return unit.text[:BODY_CHARS] if unit.is_body else unit.text


def _missing(store: VectorStore, wanted: dict[str, Unit]) -> dict[str, Unit]:
    """Return what of `wanted` is not in the store; all of it where a store cannot tell."""
    ids = list(wanted)
    present: set[str] = set()
    try:
        for start in range(0, len(ids), BATCH):
            found = store.get_by_ids(ids[start : start + BATCH])
            present.update(document.metadata.get(UNIT, "") for document in found)
    except NotImplementedError:
        return wanted  # sending again what is there replaces it: ids are given
    return {unit_id: unit for unit_id, unit in wanted.items() if unit_id not in present}


def _send(
    store: VectorStore, prepared: _Prepared, missing: dict[str, Unit], embedder: Embedder, cache: VectorCache
) -> None:
    for as_query in (True, False):
        ids = [unit_id for unit_id, unit in missing.items() if unit.is_body is not as_query]
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            texts = [_embedded(missing[unit_id]) for unit_id in part]
            prepared.prepare(texts, cache.embed(embedder, texts, as_query=as_query))
            store.add_texts(texts, metadatas=[{UNIT: unit_id} for unit_id in part], ids=part)


def connect_by_name(path: str) -> Connect:
    """
    Return the function `module:name` that opens a LangChain `VectorStore`, called with (name, embeddings, dim).

    Raises:
        RetrievalError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        found: Callable[..., VectorStore] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise RetrievalError(f"vectors = {path!r}: no such function ({exc}); write module:function") from exc
    return found
