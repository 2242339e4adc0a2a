"""
Releases on disk, as serving reads them: the pointer, a release's folder, the one that is shipped.

Knows files and the catalog; no engine and no training. `finetune/publish.py` writes what is read here:

    releases/current.json    {"release": name or null, "previous": [names, newest first]}: replaced whole, by a rename
    releases/<name>/         release.json, with model/ (merged weights), adapter/ (a LoRA), or both
    bot/default_release/     release.json and the LoRA itself, shipped: merged once, into the cache of models
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bot.catalog import STAMP, check_folder, load_catalog, locked, model_folder, read_json, resolve_model
from bot.errors import MerchantError
from bot.fetch import MB, Progress, silent
from bot.merging import WEIGHTS, merge_adapter, rank_of

logger = logging.getLogger(__name__)

POINTER = "current.json"
SHIPPED = Path(__file__).resolve().parent / "default_release"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Pointer:
    """Which release is the current one, and which were before it."""

    release: str | None
    previous: tuple[str, ...] = ()
    stamp: tuple[int, int] = (0, 0)  # another one after each write, also of the same words


@dataclass(frozen=True, slots=True)
class StoredRelease:
    """What an engine is made of. `model` and `adapter` are stamped on the replies."""

    model: str  # name of the base model
    adapter: str | None  # name of the release; None for a bare model
    base: str  # catalog name or folder of the base model
    base_sha256: str | None = None  # of its weights, where merging has to check them
    model_dir: Path | None = None  # merged weights
    adapter_dir: Path | None = None  # the LoRA
    adapter_sha256: str | None = None

    @property
    def name(self) -> str:
        return self.adapter or self.model


@dataclass(frozen=True, slots=True)
class Wanted:
    """
    What is to be live: what the pointer and an experiment say together.

    Compared to know whether anything changed: whatever makes a failed release worth another try belongs in here.
    """

    default: StoredRelease
    named: str | None = None  # what the pointer names; None: nothing is published, the shipped release is the default
    beside: tuple[StoredRelease, ...] = ()  # live as well, for turns that ask for them
    fallbacks: tuple[StoredRelease, ...] = ()  # where nothing is live yet and the default does not start; best first
    fault: str = ""  # why `default` is not what the pointer names
    follows: bool = True  # False: it is as it is, whatever is published
    stamp: tuple[int, int] = (0, 0)


def read_pointer(releases: Path) -> Pointer:
    """
    Return what the pointer in the folder `releases` says; an empty one where there is none.

    Raises:
        MerchantError: it cannot be read.
    """
    path = releases / POINTER
    try:
        with path.open(encoding="utf-8") as file:
            raw = json.load(file)
            status = path.stat()
        release, previous = raw["release"], [str(name) for name in raw["previous"]]
        if release is not None and not isinstance(release, str):
            raise TypeError("`release` is no name")
    except FileNotFoundError:
        return Pointer(None)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise MerchantError(f"{path}: not readable ({exc}); delete it, then `rollback --to NAME`") from None
    return Pointer(release, tuple(previous), (status.st_mtime_ns, status.st_ino))


def load_release(folder: Path) -> StoredRelease:
    """
    Return the release in `folder`: a published one, or a LoRA with its release.json as it is shipped.

    Reads no weights.

    Raises:
        MerchantError: no release, or one without anything to serve.
    """
    raw = read_json(folder / "release.json")
    name, base = raw.get("name"), raw.get("base")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MerchantError(f"{folder / 'release.json'}, name: {name!r} is no name; letters, digits, dots and dashes")
    if not isinstance(base, str) or not base:
        raise MerchantError(f"{folder / 'release.json'}, base: missing; the catalog name of the base model")
    shipped = (folder / WEIGHTS).is_file()
    model_dir = folder / "model" if (folder / "model").is_dir() else None
    adapter_dir = folder if shipped else folder / "adapter" if (folder / "adapter").is_dir() else None
    if model_dir is None and adapter_dir is None:
        raise MerchantError(f"{folder}: the release has neither model/ nor a LoRA: publish it again")
    return StoredRelease(
        model=_base_name(base),
        adapter=name,
        base=base,
        # A published release has its merged weights; only what is merged here must know that the base is the right one.
        base_sha256=raw.get("base_sha256") if shipped else None,
        model_dir=model_dir,
        adapter_dir=adapter_dir,
        adapter_sha256=raw.get("adapter_sha256") if shipped else None,
    )


def bare(model: str) -> StoredRelease:
    """Return a model without any release: a catalog name, or a folder of somebody's own."""
    return StoredRelease(model=Path(model).name, adapter=None, base=model)


def named(model: str) -> StoredRelease:
    """Return what `--model` says: a catalog name, a model folder, or a release's folder."""
    folder = Path(model).expanduser()
    if (folder / "release.json").is_file() and not (folder / "config.json").is_file():
        return load_release(folder)
    return bare(model)


def default_release() -> StoredRelease:
    """Return what is served where nothing was published: the shipped release; without one the catalog's default."""
    return load_release(SHIPPED) if (SHIPPED / "release.json").is_file() else bare(load_catalog().default_name)


def follow_pointer(releases: Path, default: StoredRelease | None = None) -> Callable[[], Wanted]:
    """
    Return a function that says what is wanted now; cheap enough to be asked every second.

    It raises nothing: what cannot be read is said in `Wanted.fault`, and the newest of what can is the default.
    `default` is for where nothing is published.
    """
    shipped = default or default_release()

    def wanted() -> Wanted:
        try:
            pointer = read_pointer(releases)
        except MerchantError as exc:
            return Wanted(shipped, fault=str(exc))
        if pointer.release is None:
            return Wanted(shipped, stamp=pointer.stamp)
        faults: list[str] = []
        found: list[StoredRelease] = []
        for name in (pointer.release, *pointer.previous):
            try:
                if not _NAME.fullmatch(name):
                    raise MerchantError(f"{releases / POINTER}: {name!r} is no name of a release")
                found.append(load_release(releases / name))
            except MerchantError as exc:
                faults.append(str(exc))
        found.append(shipped)
        fault = faults[0] if faults and found[0].adapter != pointer.release else ""
        return Wanted(found[0], pointer.release, fallbacks=tuple(found[1:4]), fault=fault, stamp=pointer.stamp)

    return wanted


def resolve_release(release: StoredRelease, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """
    Return a model folder with the release's weights: fetched or merged where that was not done yet, for minutes.

    Raises:
        MerchantError: a folder that cannot be opened, an adapter that does not fit, a disk that is too small.
        FetchFailed: no source of the base model worked.
    """
    if release.model_dir is not None:
        return check_folder(release.model_dir)
    if release.adapter_dir is None or release.adapter is None:
        return resolve_model(release.base, cache_dir, progress)
    return _merged(release, release.adapter_dir, release.adapter, cache_dir, progress or silent)


def _merged(release: StoredRelease, adapter: Path, name: str, cache_dir: Path | None, progress: Progress) -> Path:
    """Return the cache's folder of base and adapter together; made once, whole or not at all."""
    if any(entry.name == name for entry in load_catalog().entries):
        raise MerchantError(f"{adapter / 'release.json'}, name: {name!r} is a model of the catalog; choose another")
    sha256 = _sha256(adapter / WEIGHTS)
    if release.adapter_sha256 is not None and release.adapter_sha256 != sha256:
        raise MerchantError(f"{adapter / WEIGHTS}: its sha256 is not the one in release.json: get the release anew")
    config = _sha256(adapter / "adapter_config.json")
    identity = {"release": name, "base": release.base, "adapter_sha256": sha256, "config_sha256": config}
    folder = model_folder(name, cache_dir)
    if _is_merged(folder, identity):
        return check_folder(folder)
    base = resolve_model(release.base, cache_dir, progress)
    with locked(folder):
        if _is_merged(folder, identity):  # another process did it while we waited
            return check_folder(folder)
        needed = sum(path.stat().st_size for path in base.iterdir() if path.is_file())
        if (free := shutil.disk_usage(folder.parent).free) < needed:
            raise MerchantError(
                f"release {name!r} needs {needed / MB:,.0f} MB in {str(folder.parent)!r} and only {free / MB:,.0f} MB "
                "are free: free some, or set ZHANGGUI_CACHE to a larger disk"
            )
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            found, result = merge_adapter(
                base, adapter, partial, progress=lambda done, total: progress("merging", done, total)
            )
            if release.base_sha256 is not None and release.base_sha256 != found:
                raise MerchantError(f"{base}: not the weights that release {name!r} was trained on: fetch them anew")
            check_folder(partial)
            sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
            stamp = identity | {"base_sha256": found, "weights_sha256": result, "files": sizes}
            (partial / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier adapter of this name, or damaged
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder.resolve()


def _is_merged(folder: Path, identity: dict[str, str]) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        same = {key: stamp[key] for key in identity} == identity
        return same and all((folder / name).stat().st_size == size for name, size in stamp["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def rank_needed(release: StoredRelease) -> int | None:
    """Return the rank that a running engine must have room for to load the release's LoRA; None where it has none."""
    return rank_of(release.adapter_dir) if release.adapter_dir is not None else None


def _base_name(base: str) -> str:
    """Return the base's name; where a release was trained on, the name of what that one began with."""
    for _ in range(8):
        lineage = Path(base).parent / "release.json"
        if Path(base).name != "model" or not lineage.is_file():
            break
        base = str(read_json(lineage).get("base", base))
    return Path(base).name


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise MerchantError(f"{path}: not readable ({exc.strerror or exc})") from None
