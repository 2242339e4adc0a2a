"""retriever.py: files that change under a running server; LangChain."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from langchain_core.retrievers import BaseRetriever

from retrieval.embedder import Embedder
from retrieval.errors import BadStore
from retrieval.load import load_store
from retrieval.retriever import HybridRetriever, LiveRetriever, ZhangguiRetriever
from tests.retrieval.conftest import NOW, HashingEmbedder

Open = Callable[..., LiveRetriever]


@pytest.fixture
def live(store: Path, tmp_path: Path) -> Iterator[Open]:
    opened: list[LiveRetriever] = []

    def make(embedder: Embedder, start: bool = True) -> LiveRetriever:
        opened.append(LiveRetriever(store, embedder, tmp_path / "cache"))
        if start:
            opened[-1].start()
        return opened[-1]

    yield make
    for retriever in opened:
        retriever.close()


def wait_until(happened: Callable[[], bool], at_most_s: float = 5.0) -> None:
    """Wait for what is promised within five seconds; the promise is what is tested."""
    until = time.monotonic() + at_most_s
    while not happened():
        assert time.monotonic() < until, f"not within {at_most_s} s"
        time.sleep(0.05)


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")


def test_a_changed_file_is_live_within_five_seconds_and_embeds_only_what_changed(
    live: Open, hashing: HashingEmbedder, store: Path
) -> None:
    retriever = live(hashing)
    before, n_embedded = retriever.version, len(hashing.embedded)
    edit(store / "faqs.csv", "free from ¥99", "free from ¥59")
    wait_until(lambda: retriever.version != before)
    assert len(hashing.embedded[n_embedded:]) == 1
    assert retriever.search("is delivery free", 1, now=NOW)[0].passage.text == "Shipping is ¥8, free from ¥59."
    assert retriever.status().faults == ()


def test_a_new_and_a_removed_file_are_noticed(live: Open, hashing: HashingEmbedder, store: Path) -> None:
    retriever = live(hashing)
    (store / "policies" / "privacy.en.md").write_text("# Privacy\n## Data\nWe sell nothing.\n", "utf-8")
    wait_until(lambda: retriever.get("privacy.en#data") is not None)
    (store / "promotions.csv").unlink()
    wait_until(lambda: retriever.get("p-warm-zh") is None)


def test_a_bad_file_keeps_the_old_knowledge_and_is_reported_until_repaired(
    live: Open, hashing: HashingEmbedder, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = live(hashing)
    before = retriever.version
    with caplog.at_level(logging.ERROR, "retrieval"):
        edit(store / "promotions.csv", "2026-12-01T00:00", "soon")
        wait_until(lambda: retriever.status().faults != ())
    (fault,) = retriever.status().faults
    assert (fault.file, fault.row, fault.field) == ("promotions.csv", 2, "ends_at")
    assert len(caplog.records) == 1
    assert retriever.version == before
    assert retriever.search("WARM25", 1, now=NOW)
    edit(store / "promotions.csv", "soon", "2026-12-02T00:00")
    wait_until(lambda: retriever.status().faults == ())
    assert retriever.version != before


def test_a_failing_embedder_keeps_the_old_knowledge(
    live: Open, hashing: HashingEmbedder, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retriever = live(hashing)
    before = retriever.version
    hashing.fails = True
    edit(store / "faqs.csv", "free from ¥99", "free from ¥59")
    wait_until(lambda: any("could not be rebuilt" in record.message for record in caplog.records))
    assert retriever.version == before
    hashing.fails = False
    assert retriever.reload()
    assert retriever.version != before


def test_a_restart_reads_the_snapshot_and_a_damaged_one_is_rebuilt(
    live: Open, hashing: HashingEmbedder, tmp_path: Path
) -> None:
    version = live(hashing, start=False).version
    n_embedded = len(hashing.embedded)
    assert live(hashing, start=False).version == version
    (snapshot,) = (tmp_path / "cache" / "snapshots").iterdir()
    (snapshot / "vectors.faiss").write_bytes(b"damaged")
    again = live(hashing, start=False)
    assert again.version == version
    assert again.search("WARM25", 1, now=NOW)
    assert len(hashing.embedded) == n_embedded + 1  # the query; the vectors came from the cache
    assert (snapshot / "vectors.faiss").stat().st_size > 100


def test_starting_on_a_bad_file_serves_the_last_good_knowledge(
    live: Open, hashing: HashingEmbedder, store: Path
) -> None:
    version = live(hashing, start=False).version
    edit(store / "products.csv", "399", "cheap")
    retriever = live(hashing, start=False)
    assert retriever.version == version
    assert len(retriever.status().faults) == 2


def test_a_bad_store_with_nothing_older_is_refused(live: Open, hashing: HashingEmbedder, store: Path) -> None:
    edit(store / "products.csv", "399", "cheap")
    with pytest.raises(BadStore, match=r"products\.csv, row 2, price"):
        live(hashing)


def test_the_status_says_what_is_live_and_how_far_a_build_is(
    store: Path, tmp_path: Path, hashing: HashingEmbedder
) -> None:
    heard: list[tuple[int, int]] = []
    retriever = LiveRetriever(
        store, hashing, tmp_path / "cache", progress=lambda done, total: heard.append((done, total))
    )
    status = retriever.status()
    assert status.version == retriever.version
    assert status.n_passages == len(load_store(store))
    assert status.loaded_at.tzinfo is not None
    assert not status.building
    n_total = heard[-1][1]
    assert heard[-1] == (n_total, n_total)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    retriever.close()


def test_searches_go_on_while_the_knowledge_is_swapped(live: Open, hashing: HashingEmbedder, store: Path) -> None:
    retriever = live(hashing, start=False)
    wrong: list[object] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                (hit,) = retriever.search("postage cost", 1, now=NOW)
                if hit.passage.id != "f-ship-en":
                    wrong.append(hit)
            except Exception as exc:
                wrong.append(exc)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for price in range(10, 15):
        edit(store / "faqs.csv", "否则运费¥8", f"否则运费¥{price}8")
        assert retriever.reload()
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_old_snapshots_are_dropped(live: Open, hashing: HashingEmbedder, store: Path, tmp_path: Path) -> None:
    retriever = live(hashing, start=False)
    for n in range(5):
        edit(store / "faqs.csv", "otherwise" if n else "电子发票", f"电子发票{n}" if not n else "otherwise")
        (store / "note.jsonl").write_text(f'{{"id": "note", "text": "number {n}"}}\n', "utf-8")
        retriever.reload()
    assert len(list((tmp_path / "cache" / "snapshots").iterdir())) == 3


def test_langchain_gets_documents_with_their_metadata(store: Path, live: Open, model: Embedder) -> None:
    retriever = ZhangguiRetriever(retriever=live(model, start=False), k=2, kinds=("faq",))
    assert isinstance(retriever, BaseRetriever)
    first, second = retriever.invoke("我想把东西退掉")
    assert first.page_content == "签收后7天内可以无理由退货。"
    assert first.metadata["id"] == "f-return-zh"
    assert first.metadata["confidence"] >= second.metadata["confidence"]
    assert first.metadata["source"] == "faqs.csv:4"


def test_the_retriever_module_offers_both_retrievers() -> None:
    assert HybridRetriever.__module__ == "retrieval.hybrid"
