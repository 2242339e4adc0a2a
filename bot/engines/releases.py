"""
The engines that are live: a small set of releases, one of them the default, changed while visitors are answered.

Knows what is wanted (`bot.releases.Wanted`, looked at once a second) and how to get there: what is missing is started
beside what serves, tried with a prompt, and only then given to new turns, by one assignment. A turn leases its release
from its beginning to its end, so that no reply is made by two. What is no longer wanted is closed when its last turn
has ended. Whatever goes wrong leaves the old one serving, is said, and is not tried again before something else is
wanted.

Knows no vLLM: engines come from a maker (`bot.engines.fetched`), and `SupervisedEngine` brings each back when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Literal, Protocol

from bot.engine import BoundEngine, Chunk, EngineState, ReleaseStatus, Sampling
from bot.engines.supervisor import FIRST_PROMPT_TIMEOUT_S, MortalEngine, SupervisedEngine
from bot.errors import BotError, EngineDead, EngineFailed, EngineNotReady, MerchantError
from bot.fetch import Progress
from bot.messages import Message
from bot.releases import StoredRelease, Wanted

logger = logging.getLogger(__name__)

CANARY_TOKENS = 32


class HostEngine(MortalEngine, Protocol):
    """An engine that can load and forget adapters while it runs."""

    async def add_adapter(self, release: StoredRelease) -> None: ...

    async def remove_adapter(self, release: StoredRelease) -> None: ...


class Maker(Protocol):
    """Whoever makes engines; `bot.engines.fetched.EngineMaker` has the real one, and says what each call promises."""

    def is_hot(self, release: StoredRelease) -> bool: ...

    def host_of(self, release: StoredRelease) -> str: ...

    async def prepare(self, release: StoredRelease, progress: Progress | None = None) -> None: ...

    async def shortage(self, release: StoredRelease) -> str | None: ...

    def make(self, release: StoredRelease, adapters: Mapping[str, StoredRelease] | None) -> HostEngine: ...


class NoRoom(BotError):
    """There is not enough memory for one more engine; measured before it was started."""

    code = "no_room"


class _Host:
    """One engine under supervision, and the adapters it serves; None where it serves its own weights alone."""

    engine: HostEngine  # of the moment

    def __init__(
        self,
        key: str,
        release: StoredRelease,
        maker: Maker,
        try_out: Callable[[MortalEngine, str | None], Awaitable[None]],
        *,
        hot: bool,
    ) -> None:
        self.key = key
        self.adapters: dict[str, StoredRelease] | None = {} if hot else None
        if self.adapters is not None and release.adapter is not None:
            self.adapters[release.name] = release
        self.n_releases = 0  # that are served by it, draining ones too

        def make() -> HostEngine:
            self.engine = maker.make(release, self.adapters)
            return self.engine

        async def on_ready(engine: MortalEngine) -> None:
            for adapter in list(self.adapters) if self.adapters else [None]:
                await try_out(engine, adapter)

        self.supervised = SupervisedEngine(make, on_ready=on_ready, first_tries=1)


class LiveRelease:
    """A release that answers; what a turn holds. `name` and `adapter` are what its replies are stamped with."""

    def __init__(self, release: StoredRelease, host: _Host) -> None:
        self.release, self.host = release, host
        self.name, self.adapter = release.model, release.adapter
        self._loaded_as = release.adapter if host.adapters is not None else None
        self.n_turns = 0
        self.idle = asyncio.Event()  # set while no turn holds it
        self.idle.set()
        self.drain: asyncio.Task[None] | None = None
        self.warmed: tuple[HostEngine, Message] | None = None  # which engine, with which beginning of a prompt

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        return self.host.supervised.stream(messages, sampling, adapter=self._loaded_as)

    def state(self) -> EngineState:
        return self.host.supervised.state()

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return self.host.supervised.count_tokens(messages)

    @property
    def max_prompt_tokens(self) -> int:
        return self.host.supervised.max_prompt_tokens

    async def warm(self, messages: Sequence[Message]) -> None:
        """Fill the prefix cache with what every prompt begins with, where that was not done with this engine yet."""
        engine = self.host.engine
        if self.warmed != (engine, messages[0]):
            self.warmed = (engine, messages[0])
            await engine.warm(messages, adapter=self._loaded_as)

    @contextmanager
    def held(self) -> Iterator[LiveRelease]:
        self.n_turns += 1
        self.idle.clear()
        try:
            yield self
        finally:
            self.n_turns -= 1
            if not self.n_turns:
                self.idle.set()


class _NotLive:
    """What a turn holds while nothing is live: it names what will be, and generates nothing."""

    max_prompt_tokens = 0

    def __init__(self, release: StoredRelease | None, state: EngineState) -> None:
        self.name = release.model if release is not None else "none"
        self.adapter = release.adapter if release is not None else None
        self._state = state

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        phase, detail = self._state.phase, self._state.detail
        if phase == "stopped":
            raise EngineDead(detail or "the engine was stopped")
        raise EngineNotReady(f"{phase}: {detail}" if detail else phase)

    def state(self) -> EngineState:
        return self._state

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return sum(8 + (len(m.content.encode()) + 2) // 3 for m in messages)


class ReleasedEngines:
    """
    Several releases as one engine: what asks for none gets the default one.

    Args:
        wanted: what is to be live; asked in a thread, and must not raise.
        canaries: the prompts that a new engine has to answer before it serves. They should begin as every prompt does:
            what they leave in the prefix cache is the first visitor's.
        drain_s: the longest that turns may keep an engine which is no longer wanted.
    """

    def __init__(
        self,
        maker: Maker,
        wanted: Callable[[], Wanted],
        canaries: Callable[[], Sequence[Sequence[Message]]],
        *,
        check_interval_s: float = 1.0,
        drain_s: float = 300.0,
        first_wait_s: float = 1.0,
        longest_wait_s: float = 60.0,
    ) -> None:
        self._maker, self._wanted, self._canaries = maker, wanted, canaries
        self._check_interval_s, self._drain_s = check_interval_s, drain_s
        self._first_wait_s, self._longest_wait_s = first_wait_s, longest_wait_s
        self._seen: Wanted | None = None  # what is being worked towards
        self._hosts: dict[str, _Host] = {}
        self._live: dict[str, LiveRelease] = {}  # by name; those that drain too, until they close
        self._default: LiveRelease | None = None
        self._opening: StoredRelease | None = None
        self._detail = ""  # what it is waiting for
        self._failed: dict[str, str] = {}  # why, by release; until something else is wanted
        self._final: set[str] = set()  # of these, what no further try would mend
        self._last_failure = ""
        self._stopped = False  # nothing is live, and no further try would help
        self._closed = False
        self._closing: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._n_switches = self._n_failures = 0

    # What a turn asks for

    @contextmanager
    def lease(self, release: str | None = None) -> Iterator[BoundEngine]:
        """Return the live release of that name, else the default one; it is not closed before the block ends."""
        live = self._live.get(release) if release is not None else None
        if live is None or not live.state().ready:
            live = self._default
        if live is None:
            yield _NotLive(self._seen.default if self._seen is not None else None, self.state())
        else:
            with live.held():
                yield live

    def names(self) -> tuple[str, ...]:
        """Return the releases that answer now, the default first; those that only end their last turns are left out."""
        default = [self._default.release.name] if self._default is not None else []
        return (*default, *(name for name, live in self._live.items() if not live.drain and name not in default))

    # As an engine

    @property
    def name(self) -> str:
        with self.lease() as engine:
            return engine.name

    @property
    def adapter(self) -> str | None:
        with self.lease() as engine:
            return engine.adapter

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """Generate a reply by the default release, as `bot.engine.Engine` promises; held until it ends."""
        with self.lease() as engine:
            async with aclosing(engine.stream(messages, sampling)) as chunks:
                async for chunk in chunks:
                    yield chunk

    def count_tokens(self, messages: Sequence[Message]) -> int:
        with self.lease() as engine:
            return engine.count_tokens(messages)

    @property
    def max_prompt_tokens(self) -> int:
        with self.lease() as engine:
            return engine.max_prompt_tokens

    def state(self) -> EngineState:
        """Return the default release's state; while nothing is live, how far the first one is."""
        if self._closed:
            return EngineState(False, "stopped")
        if self._default is not None:
            return self._default.state()
        if self._stopped:
            return EngineState(False, "stopped", self._last_failure)
        if self._seen is None:
            return EngineState(False, "none" if self._task is None else "starting")
        phase = "restarting" if self._last_failure else "starting"
        return EngineState(False, phase, self._opening_detail() or self._last_failure)

    def status(self) -> ReleaseStatus:
        """Return which release answers, which one is to, and what stands between them."""
        wanted, serving = self._seen, self._default
        name = serving.release.name if serving is not None else None
        if wanted is None:
            return ReleaseStatus(name, None, "starting", follows=False, detail="")
        fault = wanted.fault or self._failed.get(wanted.default.name, "")
        failed_beside = [f"{r.name}: {self._failed[r.name]}" for r in wanted.beside if r.name in self._failed]
        state: Literal["starting", "serving", "switching", "failed"]
        if fault:
            state, detail = "failed", fault
        elif serving is None:
            state, detail = "starting", self._opening_detail()
        elif name != wanted.default.name:
            state, detail = "switching", self._opening_detail()
        else:
            state, detail = "serving", "; ".join(failed_beside)
        return ReleaseStatus(
            name, wanted.named, state, follows=wanted.follows, detail=_without_folders(detail), live=self.names()
        )

    def _opening_detail(self) -> str:
        return f"{self._opening.name}: {self._detail}" if self._opening is not None else ""

    def figures(self) -> dict[str, float]:
        """Return the default engine's figures (its counters begin anew with each), and those of the releases."""
        own = self._default.host.supervised.figures() if self._default is not None else {}
        return own | {
            "releases_live": float(len(self._live)),
            "release_switches": float(self._n_switches),
            "release_failures": float(self._n_failures),
            "release_failed": float(self.status().state == "failed"),
        }

    async def warm(self, messages: Sequence[Message]) -> None:
        """Fill the prefix caches of all that is live with what every prompt begins with, where they are not yet."""
        for live in list(self._live.values()):
            if live.drain is None and live.state().ready:
                with live.held():
                    await live.warm(messages)

    async def start(self) -> None:
        """Begin to follow what is wanted, and return at once; `state()` and `status()` tell how far it is."""
        assert self._task is None, "started once"
        self._task = asyncio.create_task(self._follow(), name="releases")

    async def close(self) -> None:
        """Close everything; turns under way end with EngineDead."""
        self._closed = True
        tasks = [task for task in (self._task, *(live.drain for live in self._live.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._closing)
        hosts, self._hosts = list(self._hosts.values()), {}
        self._live, self._default = {}, None
        await asyncio.gather(*(host.supervised.close() for host in hosts))

    # Following what is wanted

    async def _follow(self) -> None:
        wait_s = self._first_wait_s
        while True:
            if await self._changed():
                wait_s = self._first_wait_s
            assert self._seen is not None
            try:
                await self._reach(self._seen)
            except Exception:  # nobody awaits this task: it has to go on
                logger.exception("the releases could not be changed")
            if self._default is not None or self._stopped:
                await asyncio.sleep(self._check_interval_s)
            else:  # nothing serves: what failed is tried again, since networks and disks are mended
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, self._longest_wait_s)
                self._failed.clear()

    async def _changed(self) -> bool:
        """Look at what is wanted; return whether that is another than before."""
        wanted = await asyncio.to_thread(self._wanted)
        if wanted == self._seen:
            return False
        before = self._seen
        self._seen, self._stopped, self._last_failure = wanted, False, ""
        self._failed.clear()
        self._final.clear()
        if wanted.fault:
            logger.error("releases: %s; %s is wanted instead", wanted.fault, wanted.default.name)
            self._n_failures += 1
        elif before is not None:
            logger.info("releases: %s is wanted now", ", ".join(r.name for r in (wanted.default, *wanted.beside)))
        return True

    async def _reach(self, wanted: Wanted) -> None:
        """Make live what is wanted, as far as that works, and let go of the rest. Ends early where it changes again."""
        # 1) The default; where nothing serves, whatever does. What cannot even be read changes nothing.
        candidates = [wanted.default, *wanted.fallbacks]
        if self._default is None:  # one whose start began for what was wanted before
            found = (self._live[release.name] for release in candidates if release.name in self._live)
            if (live := next(found, None)) is not None:
                self._make_default(live)
        candidates = candidates if self._default is None else [] if wanted.fault else candidates[:1]
        for release in candidates:
            live = await self._have(release)
            if self._seen != wanted:
                return
            if live is not None:
                self._make_default(live)
                break
        else:
            if self._default is None:
                self._stopped = all(r.name in self._final for r in candidates)
                return
        # 2) What is beside it.
        for release in wanted.beside:
            await self._have(release)
            if self._seen != wanted:
                return
        # 3) What is neither is closed, once its last turn has ended.
        kept = {r.name for r in wanted.beside}
        for name, live in list(self._live.items()):
            if name not in kept and live is not self._default and live.drain is None:
                live.drain = asyncio.create_task(self._drain(live), name=f"drain {name}")

    def _make_default(self, live: LiveRelease) -> None:
        before = self._default
        if live is before:
            return
        self._default = live
        if before is not None:
            self._n_switches += 1
            logger.info("release %s answers from now on; %s ends its turns", live.release.name, before.release.name)
        else:
            logger.info("release %s answers", live.release.name)

    async def _have(self, release: StoredRelease) -> LiveRelease | None:
        """Return the release, live; None where it failed, now or before, or something else is wanted meanwhile."""
        if (live := self._live.get(release.name)) is not None:
            if live.drain is not None:  # it was on its way out
                live.drain.cancel()
                live.drain = None
            return live
        if release.name in self._failed:
            return None
        wanted = self._seen
        self._opening, self._detail = release, "waiting"
        task = asyncio.create_task(self._open(release), name=f"open {release.name}")
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=self._check_interval_s)
                if not task.done() and await self._changed() and not self._still_wanted(release):
                    logger.info("release %s is not wanted any more; its start is given up", release.name)
                    return None
            live = task.result()
        except asyncio.CancelledError:
            raise
        except Exception as exc:
            if not isinstance(exc, BotError | MerchantError):
                logger.exception("release %s: an unexpected error", release.name)
            self._failed[release.name] = self._last_failure = str(exc) or type(exc).__name__
            if isinstance(exc, MerchantError):
                self._final.add(release.name)
            self._n_failures += 1
            serving = self._default.release.name if self._default is not None else "nothing"
            logger.error("release %s does not serve: %s; %s goes on answering", release.name, exc, serving)
            return None
        finally:
            self._opening = None
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._live[release.name] = live
        return live if self._seen == wanted or self._still_wanted(release) else None

    def _still_wanted(self, release: StoredRelease) -> bool:
        wanted = self._seen
        assert wanted is not None
        fallbacks = wanted.fallbacks if self._default is None else ()
        return release.name in {r.name for r in (wanted.default, *wanted.beside, *fallbacks)}

    async def _open(self, release: StoredRelease) -> LiveRelease:
        """Return the release, tried and ready; raises where it cannot be, and leaves nothing behind then."""

        def progress(stage: str, done: int, total: int) -> None:
            self._detail = f"{stage} {100 * done // max(total, 1)}%"

        self._detail = "looking for its weights"
        await self._maker.prepare(release, progress)
        key = self._maker.host_of(release)
        if (host := self._hosts.get(key)) is not None:
            await self._add_to(host, release)
        else:
            if (why := await self._shortage(release)) is not None:
                raise NoRoom(why)
            host = _Host(key, release, self._maker, self._try_out, hot=self._maker.is_hot(release))
            self._detail = "starting its engine"
            await host.supervised.start()
            try:
                await host.supervised.wait_ready()
            except BaseException:
                await host.supervised.close()
                raise
            self._hosts[key] = host
        host.n_releases += 1
        return LiveRelease(release, host)

    async def _add_to(self, host: _Host, release: StoredRelease) -> None:
        """Load the release's adapter into a running engine, and try it."""
        self._detail = "loading its adapter"
        await host.supervised.wait_ready()
        if host.adapters is None or release.adapter is None:
            return  # a bare model, which its engine serves in any case
        try:
            async with asyncio.timeout(FIRST_PROMPT_TIMEOUT_S):
                await host.engine.add_adapter(release)
                await self._try_out(host.engine, release.adapter)
        except BaseException as exc:
            with contextlib.suppress(BotError):
                await host.engine.remove_adapter(release)
            if isinstance(exc, TimeoutError):
                raise EngineFailed(f"no reply to the first prompt in {FIRST_PROMPT_TIMEOUT_S:.0f} s") from None
            raise
        host.adapters[release.name] = release  # from here on, also in an engine that replaces this one

    async def _shortage(self, release: StoredRelease) -> str | None:
        """Return why there is no room for one more engine; nothing where none is running yet: then vLLM decides."""
        while self._hosts:
            if (why := await self._maker.shortage(release)) is None:
                return None
            draining = [live.drain for live in self._live.values() if live.drain is not None] + list(self._closing)
            if not draining:
                return why
            self._detail = "waiting for memory of a release that ends its turns"
            await asyncio.wait(draining, return_when=asyncio.FIRST_COMPLETED)
        return None

    async def _try_out(self, engine: MortalEngine, adapter: str | None) -> None:
        """Have the canary prompts answered; raises EngineFailed where a reply is none."""
        self._detail = "answering the canary prompts"
        for prompt in self._canaries():
            text = ""
            sampling = Sampling(max_tokens=CANARY_TOKENS)
            async with aclosing(engine.stream(prompt, sampling, adapter=adapter)) as chunks:
                async for chunk in chunks:
                    text += chunk.text
            if (why := _nonsense(text)) is not None:
                raise EngineFailed(f"the canary prompt was answered with {why}")

    async def _drain(self, live: LiveRelease) -> None:
        """Wait for the last turn, then close. Cancelled where the release is wanted again."""
        try:
            async with asyncio.timeout(self._drain_s):
                await live.idle.wait()
        except TimeoutError:
            logger.warning("release %s: %d turns after %.0f s are cut", live.release.name, live.n_turns, self._drain_s)
        # From here on it is gone for everybody, and cannot come back: closing is not to be interrupted.
        del self._live[live.release.name]
        closing = asyncio.create_task(self._close(live), name=f"close {live.release.name}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _close(self, live: LiveRelease) -> None:
        host = live.host
        host.n_releases -= 1
        try:
            if not host.n_releases:
                del self._hosts[host.key]
                await host.supervised.close()
            elif host.adapters is not None and live.adapter is not None:
                del host.adapters[live.release.name]
                await host.engine.remove_adapter(live.release)
        except Exception:
            logger.exception("release %s was not closed cleanly", live.release.name)
        else:
            logger.info("release %s is closed", live.release.name)


def _nonsense(text: str) -> str | None:
    """Return what is wrong with a reply, as anybody can see who knows no language; None where nothing is."""
    bare = text.strip().rstrip("\ufffd")  # cut off within a character
    if not bare:
        return "nothing"
    if "\ufffd" in bare:
        return "bytes that are no characters"
    if len(bare) >= 8 and len(set(bare)) == 1:
        return f"{bare[0]!r} over and over"
    return None


def _without_folders(text: str) -> str:
    """Return `text` with the last part of each absolute path alone: what /readyz says is for everybody."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":,;]+/)+(?=[^\s/'\":,;])", "", text)
