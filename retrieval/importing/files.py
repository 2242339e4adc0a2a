"""
Which files a store's knowledge is in, and how an import's files take their place all at once.

An import stages its files in `.import/new/` of the store folder, then writes `.import/journal.json`: that one rename is
the moment the import happened. From then on `knowledge_files` names the staged file wherever its target has not been
replaced yet, so a reader in the middle of the swap, or after a crash in it, sees the new state whole; before it, the
old one. `finish` completes a swap that was cut off, by moving what is still staged. Knows no formats' contents.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from retrieval.errors import BadStore, Fault
from retrieval.importing.reading import FORMATS

_FOLDER = ".import"
_JOURNAL = "journal.json"

Stamp = tuple[int, int]  # modification time in nanoseconds, size in bytes


def knowledge_files(store_dir: Path) -> dict[str, Path]:
    """Return name in the store folder -> where to read it, for every file that knowledge may come from, by name."""
    found = {
        path.relative_to(store_dir).as_posix(): path
        for folder, patterns in (
            ("", ("store.toml", "*.csv", "*.jsonl")),
            ("policies", ("*.md",)),
            ("knowledge", ("*",)),
        )
        for pattern in patterns
        for path in (store_dir / folder).glob(pattern)
        if folder != "knowledge" or _is_knowledge(path)
    }
    found.update(_pending(store_dir))
    return dict(sorted(found.items()))


def stamps(files: Mapping[str, Path]) -> dict[str, Stamp]:
    """Return time and size of each; a file that went meanwhile is left out. A swap in between changes nothing here."""
    found: dict[str, Stamp] = {}
    for name, path in files.items():
        stamp = stamp_of(path)
        if stamp is not None:
            found[name] = stamp
    return found


def _is_knowledge(path: Path) -> bool:
    # ~$faq.xlsx is Excel's lock beside an open file.
    return path.suffix.lower() in FORMATS and not path.name.startswith((".", "~$")) and path.is_file()


def stamp_of(path: Path) -> Stamp | None:
    """Return time and size of a file, None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _pending(store_dir: Path) -> dict[str, Path]:
    """Return name -> staged file of a swap under way or cut off, without those replaced already."""
    try:
        journal = json.loads((store_dir / _FOLDER / _JOURNAL).read_text("utf-8"))
        entries = {str(name): (str(entry["new"]), entry["was"]) for name, entry in journal["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    found: dict[str, Path] = {}
    for name, (new, was) in entries.items():
        staged = store_dir / _FOLDER / new
        # A target edited by hand since the crash is newer than what was staged: the merchant's edit counts.
        now = stamp_of(store_dir / name)
        if staged.is_file() and now == (tuple(was) if was else None):
            found[name] = staged
    return found


@contextmanager
def importing(store_dir: Path) -> Iterator[None]:
    """
    Hold the store's import lock, with any swap that was cut off completed first.

    Raises:
        BadStore: another import is at work.
    """
    handle = os.open(store_dir, os.O_RDONLY)  # the folder itself is the lock: there is no lock file to leave behind
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            problem = "another import into this store is at work; wait until it is done"
            raise BadStore([Fault(str(store_dir), None, None, problem)]) from exc
        finish(store_dir)
        try:
            yield
        finally:
            if not (store_dir / _FOLDER / _JOURNAL).exists():  # what was staged for nothing
                shutil.rmtree(store_dir / _FOLDER, ignore_errors=True)
    finally:
        os.close(handle)


def finish(store_dir: Path) -> None:
    """Complete a swap that was cut off; nothing happens where there is none. Call with the lock held."""
    for name, staged in _pending(store_dir).items():
        target = store_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(target)
        _sync(target.parent)
    (store_dir / _FOLDER / _JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(store_dir / _FOLDER, ignore_errors=True)


def stage(folder: Path, store_dir: Path, files: Mapping[str, bytes]) -> Path:
    """Write a copy of the store with `files` in place of its own to `folder`, as links; return it. Nothing is live."""
    view = folder / "view"
    shutil.rmtree(view, ignore_errors=True)
    for name, path in knowledge_files(store_dir).items():
        if name not in files:
            link = view / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    for name, content in files.items():
        target = view / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return view


def swap(store_dir: Path, files: Mapping[str, bytes], seen: Mapping[str, Stamp | None]) -> None:
    """
    Put `files` in the place of the store's, all of them or none; call with the lock held.

    `seen` is what the targets were when they were read: one that changed since would lose an edit.

    Raises:
        BadStore: a target changed since it was read; nothing was swapped.
        OSError: a full disk, a folder that cannot be written; nothing was swapped.
    """
    folder = store_dir / _FOLDER
    folder.mkdir(exist_ok=True)
    journal: dict[str, dict[str, object]] = {}
    for name, content in files.items():
        staged = folder / "new" / name
        staged.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        target = store_dir / name
        if target.exists():
            shutil.copymode(target, staged)
        journal[name] = {"new": f"new/{name}", "was": stamp_of(target)}
    for name in files:
        if stamp_of(store_dir / name) != seen.get(name):
            problem = "was changed while it was being imported; run the import again"
            raise BadStore([Fault(name, None, None, problem)])
    beside = folder / f"{_JOURNAL}.tmp"
    with beside.open("w", encoding="utf-8") as file:
        json.dump({"files": journal}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / _JOURNAL)  # from here on the import has happened
    _sync(folder)
    finish(store_dir)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
