"""
The seam to whatever generates text: one protocol, three small types.

Implementations live in `bot/engines/`, one file per foreign library. Nothing here imports any of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeGuard

from bot.messages import Finish, Message


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to pick tokens. Greedy by default; top-k only, since top-p sorts the vocabulary twice a step on CPU."""

    max_tokens: int = 160
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 20  # used only where temperature > 0
    stop: tuple[str, ...] = ()
    priority: int = 0  # lower is earlier; 0 for a waiting visitor, 10 for background work
    seed: int | None = None
    n_likely: int = 0  # of the first token also so many of the likeliest, at most 20; see `Chunk.likely`


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text from the engine, never the text so far. Only the last chunk has a `finish`."""

    text: str
    finish: Finish | None = None
    n_tokens: int = 0  # tokens in this chunk
    n_prompt_tokens: int = 0  # on the last chunk
    n_cached_tokens: int = 0  # on the last chunk: prompt tokens served from the prefix cache
    # What its first token might have been, each with its log-probability; empty where nobody asked or nobody can tell.
    likely: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EngineState:
    """What /readyz, the page and the metrics say about an engine."""

    ready: bool
    phase: str  # "none", "starting", "ready", "restarting", "stopped": for people
    detail: str = ""  # one short line, for instance "loading weights"


@dataclass(frozen=True, slots=True)
class ReleaseStatus:
    """What /readyz says of releases: which one answers, which one is to, and what stands between them."""

    name: str | None  # answers turns that ask for no other; None while nothing does
    wanted: str | None  # what the pointer names; None: nothing is published, or it is not followed
    state: Literal["starting", "serving", "switching", "failed"]
    follows: bool  # whether the pointer is followed at all
    detail: str = ""  # one short line: how far it is, or why it failed
    live: tuple[str, ...] = ()  # all that answer, the default first


class BoundEngine(Protocol):
    """What a turn needs of an engine: one release, the same from the turn's beginning to its end."""

    @property
    def name(self) -> str:
        """Catalog or folder name of the (base) model, for the release."""
        ...

    @property
    def adapter(self) -> str | None:
        """Name of the published release that is served, None for a bare model."""
        ...

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """
        Generate a reply to `messages`, chunk by chunk; only the last has a `finish`.

        Closing or cancelling the generator aborts the request and frees its place in the batch.
        Wrap it in `contextlib.aclosing`: a generator left half read is only closed when the garbage
        collector finds it.

        Raises:
            EngineBusy: overloaded; says when to try again. Nothing was queued.
            EngineNotReady: still starting, or restarting.
            EngineFailed: this reply is lost, the next may work.
            EngineDead: no reply will work until the restart.
        """
        ...

    def state(self) -> EngineState:
        """Return the state now; never blocks."""
        ...

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Return how many prompt tokens `messages` render to (an estimate where there is no tokenizer here)."""
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """The most prompt tokens that still leave room for a reply."""
        ...


class Engine(BoundEngine, Protocol):
    """Generates replies. One instance serves all conversations of a process."""

    async def start(self) -> None:
        """Load whatever is needed, and return once ready. Never called twice at once."""
        ...

    async def close(self) -> None:
        """Free everything. Requests under way end with EngineDead."""
        ...

    def figures(self) -> dict[str, float]:
        """Return gauges and counters for /metrics: running, waiting, kv_cache_usage, generated_tokens, …"""
        ...


class Engines(Engine, Protocol):
    """Several releases that are served at the same time, of which a turn holds one (`bot.engines.releases`)."""

    def lease(self, release: str | None = None) -> AbstractContextManager[BoundEngine]:
        """Return the live release of that name, else the default one; it is not closed before the block ends."""
        ...

    def status(self) -> ReleaseStatus:
        """Return which release answers, which one is to, and what stands between them."""
        ...

    async def warm(self, messages: Sequence[Message]) -> None:
        """Fill the prefix caches of all that is live with what every prompt begins with, where they are not yet."""
        ...


def has_releases(engine: Engine | None) -> TypeGuard[Engines]:
    return hasattr(engine, "lease")


@contextmanager
def leased(engine: Engine | None, release: str | None = None) -> Iterator[BoundEngine | None]:
    """Hold what a turn is answered by, from its start to its end; an engine that serves one release is that itself."""
    if has_releases(engine):
        with engine.lease(release) as bound:
            yield bound
    else:
        yield engine
