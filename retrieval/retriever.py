"""
The retriever a server holds: loads a store or a snapshot of it, keeps up with the files, searches what is live.

Knows folders, threads and the swap; knows no scores (hybrid.py). `HybridRetriever` is re-exported: where an index is
built once and for all, in evaluation for instance, it is all one needs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, Protocol

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict

from retrieval.embedder import Embedder, Progress, VectorCache
from retrieval.errors import BadStore, Fault, IndexDamaged
from retrieval.explain import Explanation
from retrieval.hybrid import HybridRetriever
from retrieval.importing.files import knowledge_files, stamps
from retrieval.index import Index, build_index, load_index
from retrieval.load import content_hash, load_store, load_terms, load_zone
from retrieval.passages import Hit, Passage
from retrieval.snapshots import Snapshots
from retrieval.terms import Terms
from retrieval.tuning import Tuning, Tunings, tuned_retriever
from retrieval.vectorstore import VectorServer

__all__ = ["HybridRetriever", "LiveRetriever", "Retriever", "Status", "ZhangguiRetriever"]

log = logging.getLogger("retrieval")

POLL_S = 1.0


class Retriever(Protocol):
    """What stop 4 of a message needs; `LiveRetriever` and `HybridRetriever` both are one."""

    @property
    def version(self) -> str: ...

    def gist(self, message: str, *, now: datetime) -> str: ...

    def search(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[Hit]: ...

    def expired(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[Hit]: ...

    def current(self, kind: str, *, now: datetime, lang: str | None = None) -> list[Passage]: ...

    def get(self, passage_id: str) -> Passage | None: ...


@dataclass(frozen=True, slots=True)
class Status:
    """What is live, and what is wrong with the files."""

    version: str  # of the knowledge being searched
    n_passages: int
    loaded_at: datetime  # aware, UTC: when this knowledge went live in this process
    faults: tuple[Fault, ...]  # of the newest files; while there are any, older knowledge is being served
    building: bool
    n_done: int = 0  # texts embedded of the build under way
    n_total: int = 0
    remaining_s: float | None = None  # estimate for the build under way; None where nothing is known yet
    pinned: str | None = None  # the version a rollback asked for, while it is served
    notes: tuple[str, ...] = ()  # what else is not as usual, a sentence each


class LiveRetriever:
    """
    The knowledge of one store folder, searched while it changes.

    Everything is thread-safe. Searches see one index from start to end: a rebuild happens beside it and is swapped in
    by one assignment. Call `close` to end the watcher.
    """

    def __init__(
        self,
        store_dir: Path,
        embedder: Embedder,
        cache_dir: Path,
        timezone: tzinfo | None = None,
        *,
        progress: Progress | None = None,
        vectors: VectorServer | None = None,
    ) -> None:
        """
        Load the snapshot of what is in `store_dir` now, or build it: blocks for a second, or minutes the first time.

        With faulty files and an older snapshot of the same folder, that snapshot is served and `status` has the faults.
        `timezone` is for those who have read store.toml already; by default it is read here. With `vectors` the nearest
        are looked for there, and here while it does not answer.

        Raises:
            BadStore: the files are faulty and nothing older is there to serve.
            RetrievalError: the embedder failed.
        """
        self.store_dir = Path(store_dir)
        self.embedder = embedder
        self.cache_dir = Path(cache_dir)
        self._zone = timezone
        self._progress = progress
        self._cache = VectorCache(self.cache_dir / "embeddings.sqlite")
        self._building = threading.Lock()  # one build at a time; `reload` and the watcher may both want one
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._n_done, self._n_total, self._began = 0, 0, 0.0
        self._faults: tuple[Fault, ...] = ()
        self._vectors = vectors
        self._snapshots = Snapshots(self.cache_dir, self.store_dir)
        self._pinned: str | None = None
        self._note = ""
        self._live: HybridRetriever | None = None
        self._tuned: Tuning | None = None
        self._seen = self._look()
        try:
            self.reload()
        except BaseException:
            self._cache.close()
            raise

    # --- searching: each delegates to one index, taken once -----------------------------------------------------------

    @property
    def version(self) -> str:
        """Content hash of the knowledge being searched, then "+" and the tuning where one is in use; on every reply."""
        return self._serving.version + (f"+{self._tuned.version}" if self._tuned else "")

    @property
    def thresholds(self) -> Mapping[str, float]:
        """The confidences for the risk the store chose, "direct" and "answer"; empty where it chose none."""
        return self._serving.thresholds

    @property
    def _serving(self) -> HybridRetriever:
        assert self._live is not None  # from the end of __init__ on
        return self._live

    @property
    def zone(self) -> tzinfo:
        """The store's time zone."""
        return self._zone or load_zone(self.store_dir)

    def gist(self, message: str, *, now: datetime) -> str:
        """See `HybridRetriever.gist`."""
        return self._serving.gist(message, now=now)

    def search(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[Hit]:
        """See `HybridRetriever.search`."""
        return self._serving.search(query, k, now=now, lang=lang, kinds=kinds)

    def expired(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[Hit]:
        """See `HybridRetriever.expired`."""
        return self._serving.expired(query, k, now=now, lang=lang, kinds=kinds)

    def explain(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> Explanation:
        """See `HybridRetriever.explain`."""
        return self._serving.explain(query, k, now=now, lang=lang, kinds=kinds)

    def current(self, kind: str, *, now: datetime, lang: str | None = None) -> list[Passage]:
        """See `HybridRetriever.current`."""
        return self._serving.current(kind, now=now, lang=lang)

    def get(self, passage_id: str) -> Passage | None:
        """See `HybridRetriever.get`."""
        return self._serving.get(passage_id)

    # --- keeping up ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the watcher: a changed file is live about two seconds after it was written, plus its embedding."""
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="retrieval-watcher", daemon=True)
            self._watcher.start()

    def close(self) -> None:
        """End the watcher and close the cache; a build under way is waited for. Searching still works."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        with self._building:
            self._cache.close()
        if self._vectors is not None:
            self._vectors.close()

    def status(self) -> Status:
        """Return what is live now; does not block."""
        live, building = self._serving, self._building.locked()
        remaining_s = None
        if building and self._n_done:
            remaining_s = (time.monotonic() - self._began) / self._n_done * (self._n_total - self._n_done)
        return Status(
            version=live.version,
            n_passages=len(live.index.passages),
            loaded_at=self._loaded_at,
            faults=self._faults,
            building=building,
            n_done=self._n_done if building else 0,
            n_total=self._n_total if building else 0,
            remaining_s=remaining_s,
            pinned=self._pinned,
            notes=tuple(note for note in (self._note, self._vectors.problem if self._vectors else "") if note),
        )

    def reload(self) -> bool:
        """
        Read the folder now and swap, whether or not anything changed on disk; blocks for the build.

        Returns whether the files are in order; if not, the old knowledge goes on and `status` has the faults.

        Raises:
            RetrievalError: the embedder failed; the old knowledge goes on.
        """
        faults: tuple[Fault, ...] = ()
        passages: list[Passage] | None = None
        try:
            passages = load_store(self.store_dir, zone=self._zone)
        except BadStore as exc:
            faults = exc.faults
        with self._building:
            index = self._choose(passages)
        if index is None:
            raise BadStore(faults)  # at the start only: later there is at least what is live
        terms, tuning = self._terms(), self._tuning()
        known = self._live is not None and index is self._live.index
        if not known or terms != self._serving.reader.terms or tuning != self._tuned:
            if self._vectors is not None and not known:
                self._vectors.attach(index, self.embedder, self._cache)
            self._live = tuned_retriever(index, self.embedder, self._cache, terms, tuning)
            self._tuned = tuning
            self._loaded_at = _now()
            log.info("knowledge %s is live: %d passages", self.version, len(index.passages))
        self._report(faults)  # last: who sees the faults gone finds the repaired knowledge
        return not faults

    def _watch(self) -> None:
        pending: object = None
        while not self._closing.wait(POLL_S):
            found = self._look()
            if found == self._seen:
                pending = None
                continue
            # A file is read when two looks agree: an editor or a copy may be half way through it.
            if found != pending:
                pending = found
                continue
            self._seen, pending = found, None
            try:
                self.reload()
            except Exception:  # the watcher must live: the next change may be the repair
                log.exception("the knowledge could not be rebuilt; the old one goes on")

    def _look(self) -> tuple[object, ...]:
        """Return what tells of a change: every file that knowledge may come from, and the version pinned."""
        tuned = Tunings.of_store(self.store_dir).folder / "current.json"
        return stamps(knowledge_files(self.store_dir)), self._snapshots.pinned(), stamps({"tuned": tuned})

    def _choose(self, passages: list[Passage] | None) -> Index | None:
        """Return what to serve: the pinned index, that of `passages`, or where they are faulty the newest there is."""
        live = None if self._live is None else self._live.index
        pinned = self._snapshots.pinned()
        if pinned is not None:
            found = live if live is not None and live.version == pinned else self._load_pinned(pinned)
            if found is not None:
                self._pinned, self._note = pinned, f"version {pinned} is pinned by a rollback; changed files wait"
                return found
            self._note = f"version {pinned} was pinned, but its snapshot is gone or damaged; the newest is served"
            log.warning("%s", self._note)
        else:
            self._note = ""
        was_pinned, self._pinned = self._pinned is not None, None
        if passages is None:
            return live if live is not None and not was_pinned else self._newest() or live
        return self._load_or_build(passages, live)

    def _load_pinned(self, version: str) -> Index | None:
        folder = self._snapshots.of_version(version, self.embedder.version)
        try:
            return None if folder is None else load_index(folder, self.embedder)
        except IndexDamaged as exc:
            log.warning("the pinned snapshot cannot be used: %s", exc)
            return None

    def _newest(self) -> Index | None:
        """Return the newest snapshot of this store that is whole."""
        for folder in self._snapshots.folders():
            try:
                return load_index(folder, self.embedder)
            except IndexDamaged as exc:
                log.warning("a snapshot cannot be used: %s", exc)
        return None

    def _load_or_build(self, passages: list[Passage], live: Index | None) -> Index:
        version = content_hash(passages)
        folder = self._snapshots.place(version, self.embedder.version)
        try:
            index = load_index(folder, self.embedder, passages, version)
            if live is not None and live.version == version:
                index = live  # the same knowledge; what is on disk was only looked at, for damage
            self._remember(folder)
            return index
        except IndexDamaged as exc:
            if folder.exists():
                log.warning("snapshot is rebuilt: %s", exc)
        if live is not None and live.version == version:
            index = live
        else:
            self._n_done, self._n_total, self._began = 0, 0, time.monotonic()
            index = build_index(passages, self.embedder, self._cache, self._tell)
        try:
            self._snapshots.save(index, folder)
            return index.mapped(folder)
        except (OSError, IndexDamaged) as exc:  # a full disk costs the next start some seconds, no answers
            log.warning("the snapshot could not be written: %s", exc)
            return index

    def _terms(self) -> Terms:
        """Return the store's own terms; the shipped ones alone while the file is faulty (`load_store` has told)."""
        try:
            return load_terms(self.store_dir)
        except BadStore:
            return Terms()

    def _tuning(self) -> Tuning | None:
        """Return the store's tuning; none while it is damaged or of another embedder, which is logged."""
        try:
            tuning = Tunings.of_store(self.store_dir).load()
        except BadStore as exc:
            log.warning("searched without the store's tuning: %s", exc)
            return None
        if tuning is not None and tuning.embedder != self.embedder.version:
            log.warning("searched without the store's tuning: it was made with another embedder; tune again")
            return None
        return tuning

    def _tell(self, n_done: int, n_total: int) -> None:
        self._n_done, self._n_total = n_done, n_total
        if self._progress is not None:
            self._progress(n_done, n_total)

    def _remember(self, folder: Path) -> None:
        try:
            self._snapshots.remember(folder)
        except OSError as exc:
            log.warning("the cache folder cannot be kept in order: %s", exc)

    def _report(self, faults: tuple[Fault, ...]) -> None:
        if faults != self._faults:
            for fault in faults:
                log.error("not loaded, the older knowledge is served: %s", fault)
        self._faults = faults


class ZhangguiRetriever(BaseRetriever):
    """The retriever as LangChain's `BaseRetriever`: documents carry id, kind, score and confidence as metadata."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    retriever: Any  # a Retriever; pydantic cannot check a protocol with a property
    k: int = 5
    lang: str | None = None
    kinds: tuple[str, ...] | None = None

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        hits = self.retriever.search(query, self.k, now=_now(), lang=self.lang, kinds=self.kinds)
        return [document_of(hit) for hit in hits]


def document_of(hit: Hit) -> Document:
    """Return a hit as LangChain's `Document`."""
    passage = hit.passage
    return Document(
        id=passage.id,
        page_content=passage.text,
        metadata={
            "id": passage.id,
            "kind": passage.kind,
            "title": passage.title,
            "lang": passage.lang,
            "source": passage.source,
            "score": hit.score,
            "confidence": hit.confidence,
            "valid_from": passage.valid_from.isoformat() if passage.valid_from else None,
            "valid_until": passage.valid_until.isoformat() if passage.valid_until else None,
        },
    )


def _now() -> datetime:
    return datetime.now(UTC)
