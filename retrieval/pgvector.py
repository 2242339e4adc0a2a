"""
PostgreSQL with pgvector as the vector server, through langchain-postgres (extra `pgvector`).

The only file that imports `langchain_postgres` and asyncpg's URLs. Knows tables and connections; knows no passages.
"""

from __future__ import annotations

from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from retrieval.errors import RetrievalError

EF_SEARCH = 400  # more than is asked for at once where nothing is filtered; pgvector's 40 would cap every answer
CONNECT_S, STATEMENT_S = 5, 30


class PgVector:
    """Opens a table a collection; see `retrieval.vectorstore.Connect`."""

    def __init__(self, url: str) -> None:
        """
        Take `postgresql://user:password@host:port/database`; nothing is opened yet.

        Raises:
            RetrievalError: the packages are missing, or the URL is another database's.
        """
        scheme, _, rest = url.partition("://")
        if scheme.partition("+")[0] not in ("postgresql", "postgres") or not rest:
            raise RetrievalError("the vector server's URL is not postgresql://user:password@host:port/database")
        try:
            from langchain_postgres import PGEngine
        except ImportError as exc:
            raise RetrievalError(f"pgvector needs its packages: pip install 'zhanggui[pgvector]' ({exc})") from exc
        self._make: Any = PGEngine.from_connection_string
        self._url = f"postgresql+asyncpg://{rest}"
        self._engine: Any = None

    def close(self) -> None:
        """End the connections; a later call opens new ones."""
        if self._engine is not None:
            self._engine._run_as_sync(self._engine.close())
            self._engine = None

    def __call__(self, name: str, embeddings: Embeddings, dim: int) -> VectorStore:
        """Return the table `name`, made where it is missing, with an index over its vectors."""
        from langchain_postgres import PGVectorStore
        from langchain_postgres.v2.indexes import HNSWIndex, HNSWQueryOptions
        from sqlalchemy.exc import ProgrammingError

        if self._engine is None:
            limits = {"timeout": CONNECT_S, "command_timeout": STATEMENT_S}
            self._engine = self._make(self._url, connect_args=limits, pool_pre_ping=True)
        try:
            self._engine.init_vectorstore_table(name, dim)
            is_new = True
        except ProgrammingError as exc:
            if "already exists" not in str(exc):
                raise
            is_new = False
        store: Any = PGVectorStore.create_sync(
            self._engine, embeddings, name, index_query_options=HNSWQueryOptions(ef_search=EF_SEARCH)
        )
        if is_new:
            store.apply_vector_index(HNSWIndex(name=f"{name}_hnsw"))
        opened: VectorStore = store
        return opened
