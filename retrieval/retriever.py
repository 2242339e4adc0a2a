"""
The retriever a server holds: loads a store or a snapshot of it, keeps up with the files, searches what is live.

Knows folders, threads and the swap; knows no scores (hybrid.py). `HybridRetriever` is re-exported: where an index is
built once and for all, in evaluation for instance, it is all one needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Collection
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
from retrieval.hybrid import HybridRetriever
from retrieval.index import Index, build_index, load_index
from retrieval.load import content_hash, load_store, load_zone
from retrieval.passages import Hit, Passage

__all__ = ["HybridRetriever", "LiveRetriever", "Retriever", "Status", "ZhangguiRetriever"]

log = logging.getLogger("retrieval")

POLL_S = 1.0
N_SNAPSHOTS = 3  # kept on disk: the live one and two to go back to


class Retriever(Protocol):
    """What stop 4 of a message needs; `LiveRetriever` and `HybridRetriever` both are one."""

    @property
    def version(self) -> str: ...

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
    ) -> None:
        """
        Load the snapshot of what is in `store_dir` now, or build it: blocks for a second, or minutes the first time.

        With faulty files and an older snapshot of the same folder, that snapshot is served and `status` has the faults.
        `timezone` is for those who have read store.toml already; by default it is read here.

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
        self._seen = self._look()
        try:
            self._live = HybridRetriever(self._load_or_build(), embedder)
        except BadStore as exc:
            older = self._latest()
            if older is None:
                self._cache.close()
                raise
            self._report(exc.faults)
            self._live = HybridRetriever(older, embedder)
        self._loaded_at = _now()

    # --- searching: each delegates to one index, taken once -----------------------------------------------------------

    @property
    def version(self) -> str:
        """Content hash of the knowledge being searched; stamped on every reply."""
        return self._live.version

    @property
    def zone(self) -> tzinfo:
        """The store's time zone."""
        return self._zone or load_zone(self.store_dir)

    def search(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[Hit]:
        """See `HybridRetriever.search`."""
        return self._live.search(query, k, now=now, lang=lang, kinds=kinds)

    def expired(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[Hit]:
        """See `HybridRetriever.expired`."""
        return self._live.expired(query, k, now=now, lang=lang, kinds=kinds)

    def current(self, kind: str, *, now: datetime, lang: str | None = None) -> list[Passage]:
        """See `HybridRetriever.current`."""
        return self._live.current(kind, now=now, lang=lang)

    def get(self, passage_id: str) -> Passage | None:
        """See `HybridRetriever.get`."""
        return self._live.get(passage_id)

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

    def status(self) -> Status:
        """Return what is live now; does not block."""
        live, building = self._live, self._building.locked()
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
        )

    def reload(self) -> bool:
        """
        Read the folder now and swap, whether or not anything changed on disk; blocks for the build.

        Returns whether the files are in order; if not, the old knowledge goes on and `status` has the faults.

        Raises:
            RetrievalError: the embedder failed; the old knowledge goes on.
        """
        try:
            index = self._load_or_build()
        except BadStore as exc:
            self._report(exc.faults)
            return False
        if index.version != self._live.version:
            self._live = HybridRetriever(index, self.embedder)
            self._loaded_at = _now()
            log.info("knowledge %s is live: %d passages", index.version, len(index.passages))
        self._faults = ()
        return True

    def _watch(self) -> None:
        pending: dict[str, tuple[int, int]] | None = None
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

    def _look(self) -> dict[str, tuple[int, int]]:
        """Return mtime and size of every file that knowledge may come from."""
        found: dict[str, tuple[int, int]] = {}
        folders = (("", ("*.csv", "*.jsonl", "store.toml")), ("policies", ("*.md",)), ("knowledge", ("*.jsonl",)))
        for folder, patterns in folders:
            for pattern in patterns:
                for path in (self.store_dir / folder).glob(pattern):
                    try:
                        stat = path.stat()
                    except OSError:
                        continue  # gone since it was listed
                    found[f"{folder}/{path.name}"] = (stat.st_mtime_ns, stat.st_size)
        return found

    def _load_or_build(self) -> Index:
        with self._building:
            passages = load_store(self.store_dir, zone=self._zone)
            version = content_hash(passages)
            folder = self._snapshots / f"{version}-{_safe(self.embedder.version)}"
            try:
                index = load_index(folder, self.embedder)
            except IndexDamaged as exc:
                if folder.exists():
                    log.warning("snapshot is rebuilt: %s", exc)
                self._n_done, self._n_total, self._began = 0, 0, time.monotonic()
                index = build_index(passages, self.embedder, self._cache, self._tell)
                self._save(index, folder)
            self._remember(folder)
            return index

    def _tell(self, n_done: int, n_total: int) -> None:
        self._n_done, self._n_total = n_done, n_total
        if self._progress is not None:
            self._progress(n_done, n_total)

    @property
    def _snapshots(self) -> Path:
        return self.cache_dir / "snapshots"

    @property
    def _pointer(self) -> Path:
        return self.cache_dir / f"latest-{_safe(str(self.store_dir.resolve()))}.json"

    def _save(self, index: Index, folder: Path) -> None:
        try:
            index.save(folder)
        except OSError as exc:  # a full disk costs the next start some seconds, not this store its answers
            log.warning("the snapshot could not be written: %s", exc)

    def _remember(self, folder: Path) -> None:
        """Note which snapshot this folder's knowledge is, and drop old ones."""
        try:
            beside = self._pointer.with_suffix(f".{os.getpid()}.tmp")
            beside.write_text(json.dumps({"snapshot": folder.name}), "utf-8")
            beside.replace(self._pointer)
            kept = sorted(self._snapshots.glob("[!.]*"), key=lambda path: path.stat().st_mtime, reverse=True)
            for old in [path for path in kept if path != folder][N_SNAPSHOTS - 1 :]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as exc:
            log.warning("the cache folder cannot be kept in order: %s", exc)

    def _latest(self) -> Index | None:
        try:
            name = json.loads(self._pointer.read_text("utf-8"))["snapshot"]
            return load_index(self._snapshots / Path(name).name, self.embedder)
        except (OSError, ValueError, KeyError, TypeError, IndexDamaged):
            return None

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


def _safe(name: str) -> str:
    """Return `name` fit for a file name, still telling."""
    kept = "".join(character if character.isalnum() or character in ".-" else "-" for character in name)
    return f"{kept[-40:].strip('-.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _now() -> datetime:
    return datetime.now(UTC)
