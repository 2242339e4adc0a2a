"""
What a store chooses of retrieval: its embedder and where its vectors lie.

Reads the table `[retrieval]` of store.toml, and no environment: who has one (bot/settings.py, retrieval/__main__.py)
hands its words in, and they win. Secrets and addresses with a password in them come from the environment alone, and so
does the name of a function to import: store.toml is data.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from retrieval.embedder import Embedder
from retrieval.embedders import open_embedder
from retrieval.errors import BadStore, Fault, RetrievalError
from retrieval.vectorstore import VectorServer, connect_by_name

TUNED = "tuned"  # in a store's folder, see tuning.py
KEYS = ("embedder", "embedder_url", "vectors")


@dataclass(frozen=True, slots=True)
class RetrievalSettings:
    """The choices, each in words; see `retrieval.embedders` for an embedder's."""

    embedder: str = "default"
    embedder_url: str | None = None  # base URL of an OpenAI-compatible server
    embedder_api_key: str | None = None
    vectors: str = "faiss"  # "faiss", "pgvector", or module:function that opens a LangChain VectorStore
    vectors_url: str | None = None
    tuned: Path | None = None  # the folder of the store's tuning, which may hold the embedder fine-tuned (finetuned.py)

    def open_embedder(self, n_threads: int = 2) -> Embedder:
        """
        Return the embedder, as the store has fine-tuned it where it has.

        Raises:
            RetrievalError: there is none such; with the remedy.
            BadStore: the fine-tuned one is damaged.
        """
        if self.tuned is not None and self.embedder.startswith("sentence-transformers:"):
            from retrieval.finetuned import Finetuned  # and all that tuning needs; nobody else pays for it

            finetuned = Finetuned(self.tuned).open(self.embedder)
            if finetuned is not None:
                return finetuned
        return open_embedder(self.embedder, n_threads, url=self.embedder_url, api_key=self.embedder_api_key)

    def open_vectors(self) -> VectorServer | None:
        """
        Return the vector server, not asked yet; None where FAISS does it all.

        Raises:
            RetrievalError: the choice, its package or its URL is wrong.
        """
        if self.vectors == "faiss":
            return None
        if self.vectors == "pgvector":
            if not self.vectors_url:
                raise RetrievalError(
                    "vectors = pgvector needs ZHANGGUI_VECTORS_URL, postgresql://user:password@host/db"
                )
            from retrieval.pgvector import PgVector

            return VectorServer(PgVector(self.vectors_url), "pgvector")
        if ":" in self.vectors:
            return VectorServer(connect_by_name(self.vectors), self.vectors)
        raise RetrievalError(f"vectors = {self.vectors!r}: not known; write faiss, pgvector or module:function")


def load_settings(store_dir: Path | None, **given: str | None) -> RetrievalSettings:
    """
    Return the choices: what is `given`, then `[retrieval]` of the store's store.toml, then the defaults.

    Raises:
        BadStore: that table has a field that is not known, or of the wrong kind.
    """
    chosen: dict[str, str | None] = dict(_table(store_dir)) if store_dir is not None else {}
    chosen |= {name: value for name, value in given.items() if value}
    tuned = store_dir / TUNED if store_dir is not None else None
    return RetrievalSettings(**chosen, tuned=tuned)  # type: ignore[arg-type]  # checked below and by the callers' names


def _table(store_dir: Path) -> dict[str, str]:
    try:
        with (store_dir / "store.toml").open("rb") as file:
            table = tomllib.load(file).get("retrieval", {})
    except (OSError, ValueError):
        return {}  # who loads the store says what is wrong with the file
    if not isinstance(table, dict):
        raise BadStore([Fault("store.toml", None, "retrieval", "not a table; write [retrieval] and its fields below")])
    faults = []
    for name, value in table.items():
        if name not in KEYS:
            known = ", ".join(KEYS)
            faults.append(Fault("store.toml", None, f"retrieval.{name}", f"not known here; there are {known}"))
        elif not isinstance(value, str):
            faults.append(Fault("store.toml", None, f"retrieval.{name}", "not a text; write it in quotes"))
        elif name == "vectors" and value not in ("faiss", "pgvector"):
            problem = "neither faiss nor pgvector; another store is named by ZHANGGUI_VECTORS=module:function"
            faults.append(Fault("store.toml", None, "retrieval.vectors", problem))
    if faults:
        raise BadStore(faults)
    return {name: str(value) for name, value in table.items()}
