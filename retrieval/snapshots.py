"""
The snapshots of one store in a cache folder: which there are, which is newest, which one is pinned.

Knows folders, manifests and who writes at the same time; reads no passage and no vector. Several stores and several
processes may share one cache folder. Beside `snapshots/` each store has a record (`latest-….json`: its snapshots,
newest first) and, after a rollback, a pin (`pin-….json`), both JSON, both replaced whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval.errors import IndexDamaged, RetrievalError
from retrieval.index import Index, load_manifest

N_SNAPSHOTS = 3  # kept of each store: the newest and two to go back to, and one more where that is pinned
LEFTOVER_S = 3_600  # an unfinished folder older than this belongs to a build that was killed
MAX_RECORD_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version of a store's knowledge that can be gone back to."""

    version: str
    built_at: str  # ISO time, UTC; "" where damaged
    n_passages: int  # 0 where damaged
    embedder: str
    state: str  # "live", "kept" or "damaged"; "live" is what a server of this store answers from
    pinned: bool


class Snapshots:
    """What is on disk of one store's index. Thread-safe; processes wait for each other while one writes."""

    def __init__(self, cache_dir: Path, store_dir: Path) -> None:
        self.cache_dir = cache_dir
        self.folder = cache_dir / "snapshots"
        store = safe_name(str(store_dir.resolve()))
        self._record = cache_dir / f"latest-{store}.json"
        self._pin = cache_dir / f"pin-{store}.json"

    def place(self, version: str, embedder_version: str) -> Path:
        """Return where the snapshot of this knowledge by this embedder is, or would be."""
        return self.folder / f"{version}-{safe_name(embedder_version)}"

    def save(self, index: Index, folder: Path) -> None:
        """Write `index`; OSError where the disk is full, and nothing of it stays."""
        with self._locked():
            index.save(folder)
            self._remember(folder)

    def remember(self, folder: Path) -> None:
        """Note that `folder` is this store's newest, and drop what no store needs any more."""
        with self._locked():
            self._remember(folder)

    def folders(self) -> list[Path]:
        """Return where this store's snapshots are, newest first; each may be damaged."""
        return [self.folder / name for name in self._names()]

    def pinned(self) -> str | None:
        """Return the version that a rollback pinned; None where the newest is wanted. Does not block on the lock."""
        version = _read(self._pin).get("version")
        return version if isinstance(version, str) and version else None

    def listed(self) -> list[Snapshot]:
        """Return this store's snapshots, newest first."""
        names, pinned = self._names(), self.pinned()
        versions = [name.split("-", 1)[0] for name in names]
        live = versions.index(pinned) if pinned in versions else 0
        found = []
        for number, (name, version) in enumerate(zip(names, versions, strict=True)):
            try:
                manifest = load_manifest(self.folder / name)
                if manifest["knowledge"] != version:
                    raise IndexDamaged(f"{name} is another version")
            except IndexDamaged:
                found.append(Snapshot(version, "", 0, "", "damaged", version == pinned))
                continue
            state = "live" if number == live else "kept"
            found.append(
                Snapshot(
                    version,
                    manifest["built_at"],
                    manifest["n_passages"],
                    manifest["embedder"],
                    state,
                    version == pinned,
                )
            )
        return found

    def pin(self, wanted: str) -> str:
        """
        Make servers of this store answer from version `wanted`, or the one it begins; return that version.

        Raises:
            RetrievalError: there is no such snapshot, it is damaged, or it was built by another embedder than the
                newest; one line that says what there is.
        """
        listed = self.listed()
        matching = {one.version: one for one in listed if wanted and one.version.startswith(wanted)}
        if len(matching) != 1:
            kept = ", ".join(one.version for one in listed) or "none"
            raise RetrievalError(f"no one version {wanted!r} of this store; there are: {kept}")
        ((version, chosen),) = matching.items()
        folder = self.folder / next(name for name in self._names() if name.startswith(f"{version}-"))
        if chosen.state == "damaged" or not _is_whole(folder):
            raise RetrievalError(f"version {version} is damaged; what is served stays as it is")
        current = next((one.embedder for one in listed if one.state != "damaged"), chosen.embedder)
        if chosen.embedder != current:
            raise RetrievalError(
                f"version {version} was built by the embedder {chosen.embedder}; the store is searched with {current}"
            )
        with self._locked():
            _write(self._pin, {"version": version})
        return version

    def unpin(self) -> None:
        """Make servers of this store follow its files again."""
        with self._locked():
            self._pin.unlink(missing_ok=True)

    def of_version(self, version: str, embedder_version: str) -> Path | None:
        """Return the snapshot of a version of this store's own, None where there is none."""
        folder = self.place(version, embedder_version)
        return folder if folder.name in self._names() else None

    def _names(self) -> list[str]:
        record = _read(self._record)
        found = record.get("snapshots", [record.get("snapshot")])
        if not isinstance(found, list):
            return []
        # Only what may be a name in `snapshots/`: a record may come from another machine.
        return [name for name in found if isinstance(name, str) and name and Path(name).name == name and name[0] != "."]

    def _remember(self, folder: Path) -> None:
        names = [folder.name, *(name for name in self._names() if name != folder.name)]
        names = [name for name in names if (self.folder / name).is_dir() or name == folder.name]
        pinned = self.pinned()
        kept = [name for number, name in enumerate(names) if number < N_SNAPSHOTS or name.split("-", 1)[0] == pinned]
        _write(self._record, {"snapshots": kept})
        needed = set(kept)
        for record in self.cache_dir.glob("latest-*.json"):
            needed.update(name for name in _read(record).get("snapshots", []) if isinstance(name, str))
        for found in self.folder.iterdir() if self.folder.is_dir() else ():
            unfinished = found.name.startswith(".") and time.time() - found.stat().st_mtime > LEFTOVER_S
            if unfinished or (found.name[0] != "." and found.name not in needed):
                shutil.rmtree(found, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from writing here; they wait, for as long as one snapshot takes to write."""
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with (self.cache_dir / "snapshots.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def safe_name(name: str) -> str:
    """Return `name` fit for a file name, still telling."""
    kept = "".join(character if character.isalnum() or character in ".-" else "-" for character in name)
    return f"{kept[-40:].strip('-.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _is_whole(folder: Path) -> bool:
    """Return whether every file of a snapshot has the checksum that its manifest has."""
    try:
        for name, expected in load_manifest(folder)["sha256"].items():
            with (folder / Path(name).name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return False
    except (OSError, IndexDamaged):
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; an empty one where there is none, or something else."""
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            return {}
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(content) + "\n", "utf-8")
    beside.replace(path)
