"""
An engine that comes back: starts it in the background, looks after its health, and replaces it when it dies.

Knows engines only by their protocol plus `check_health`; what dying looks like is theirs to say. Requests under way
when an engine dies end with EngineDead, which is the engine's doing; those that come before its successor is ready get
EngineNotReady.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Protocol

from bot.engine import Chunk, Engine, EngineState, Sampling
from bot.errors import EngineDead, EngineFailed, EngineNotReady, MerchantError
from bot.messages import Message

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 2.0  # a health check that takes longer counts as failed
FIRST_PROMPT_TIMEOUT_S = 180.0  # beside an engine that answers everybody, on two cores


class MortalEngine(Engine, Protocol):
    """An engine that can say that it is dead, and that may serve adapters beside its model."""

    async def check_health(self) -> None:
        """Return where replies work; raise EngineDead where none will. Must be quick."""
        ...

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, adapter: str | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Generate a reply, as `bot.engine.Engine` promises; with an adapter that was added, where one is named."""
        ...

    async def warm(self, messages: Sequence[Message], *, adapter: str | None = None) -> None:
        """Fill the prefix cache with what every prompt begins with."""
        ...


class SupervisedEngine:
    """
    The engines a factory makes, one after the other, as one.

    `on_ready` is awaited with each new engine before it counts as ready: to try a prompt, and warm its cache with it.
    Where it raises, the engine has not started. `first_tries`: so many starts may fail before the first that works;
    None is no limit. After that it is started anew for ever.
    """

    adapter: str | None = None

    def __init__(
        self,
        factory: Callable[[], MortalEngine],
        *,
        on_ready: Callable[[MortalEngine], Awaitable[None]] | None = None,
        first_tries: int | None = None,
        check_interval_s: float = 1.0,
        first_wait_s: float = 1.0,
        longest_wait_s: float = 60.0,
    ) -> None:
        self._factory = factory
        self._on_ready, self._tries_left = on_ready, first_tries
        self._check_interval_s = check_interval_s
        self._first_wait_s, self._longest_wait_s = first_wait_s, longest_wait_s
        self._engine = factory()
        self._task: asyncio.Task[None] | None = None
        self._look_now = asyncio.Event()  # somebody met EngineDead: do not wait for the next check
        self._ready = asyncio.Event()
        self._outage: EngineState | None = EngineState(False, "none")  # None while the engine speaks for itself
        self._n_restarts = 0
        self._failure: Exception | None = None  # why the supervisor gave up

    @property
    def name(self) -> str:
        return self._engine.name

    @property
    def engine(self) -> MortalEngine:
        """The engine of the moment; another one after a restart."""
        return self._engine

    async def start(self) -> None:
        """Begin to start the engine, and return at once; see `wait_ready`."""
        assert self._task is None, "started once"
        self._outage = None
        self._task = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ready(self) -> None:
        """
        Return once replies work; for as long as that takes, restarts included.

        Raises:
            MerchantError: it never will, for instance because the folder holds no model.
            Exception: of the last start, where `first_tries` have failed.
        """
        assert self._task is not None, "call start() first"
        ready = asyncio.ensure_future(self._ready.wait())
        try:
            await asyncio.wait((ready, self._task), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if not self._ready.is_set():
            raise self._failure or EngineDead("the engine was closed")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._ready.clear()
        await self._engine.close()
        self._outage = EngineState(False, "stopped", str(self._failure or ""))

    async def _supervise(self) -> None:
        wait_s = self._first_wait_s
        while True:
            # 1) Start it. What the merchant got wrong stays wrong: no second try.
            try:
                if self._n_restarts:
                    self._engine = self._factory()
                    self._outage = None
                await self._engine.start()
                await self._try_out()
            except MerchantError as exc:
                self._give_up(exc)
                return
            except Exception as exc:
                if self._tries_left is not None:
                    self._tries_left -= 1
                    if self._tries_left == 0:
                        self._give_up(exc)
                        return
                logger.exception("the engine did not start")
            else:
                # 2) Watch it until it dies.
                began = time.monotonic()
                self._tries_left = None
                self._ready.set()
                reason = await self._until_dead()
                self._ready.clear()
                lived_s = time.monotonic() - began
                logger.error("the engine died after %.0f s: %s", lived_s, reason)
                if lived_s > self._longest_wait_s:
                    wait_s = self._first_wait_s
            # 3) Bury it, wait, make another.
            self._n_restarts += 1
            self._outage = EngineState(False, "restarting", f"after {self._n_restarts} failures")
            with contextlib.suppress(Exception):
                await self._engine.close()
            await asyncio.sleep(wait_s * random.uniform(0.75, 1.25))
            wait_s = min(2 * wait_s, self._longest_wait_s)

    def _give_up(self, error: Exception) -> None:
        logger.error("the engine cannot start: %s", error)
        self._failure = error
        self._outage = EngineState(False, "stopped", str(error))

    async def _try_out(self) -> None:
        if self._on_ready is None:
            return
        try:
            async with asyncio.timeout(FIRST_PROMPT_TIMEOUT_S):
                await self._on_ready(self._engine)
        except TimeoutError:
            raise EngineFailed(f"no reply to the first prompt in {FIRST_PROMPT_TIMEOUT_S:.0f} s") from None

    async def _until_dead(self) -> str:
        """Return why, once a check has failed."""
        # Not asyncio.wait_for: in Python 3.11 it swallows a cancellation that meets a finished check; close() hung.
        while True:
            try:
                async with asyncio.timeout(CHECK_TIMEOUT_S):
                    await self._engine.check_health()
            except TimeoutError:
                return f"no answer to a health check in {CHECK_TIMEOUT_S:.0f} s"
            except Exception as exc:
                return str(exc) or type(exc).__name__
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._check_interval_s):
                    await self._look_now.wait()
            self._look_now.clear()

    async def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, adapter: str | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Generate a reply, as `bot.engine.Engine` promises; all of it by the engine of the moment."""
        if self._outage is not None:
            raise self._not_ready(self._outage)
        if not self._ready.is_set():
            raise self._not_ready(self._engine.state())
        try:
            async with contextlib.aclosing(self._engine.stream(messages, sampling, adapter=adapter)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except EngineDead:
            self._look_now.set()
            raise

    @staticmethod
    def _not_ready(state: EngineState) -> Exception:
        if state.phase == "stopped":
            return EngineDead(state.detail or "the engine was stopped")
        return EngineNotReady(f"{state.phase}: {state.detail}" if state.detail else state.phase)

    def state(self) -> EngineState:
        if self._outage is not None:
            return self._outage
        state = self._engine.state()
        if self._n_restarts and not self._ready.is_set() and state.phase != "stopped":
            return EngineState(False, "restarting", state.detail)
        if state.ready and not self._ready.is_set():
            return EngineState(False, "starting", "trying its first prompt")
        return state

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return self._engine.count_tokens(messages)

    @property
    def max_prompt_tokens(self) -> int:
        return self._engine.max_prompt_tokens

    def figures(self) -> dict[str, float]:
        """Return the engine's figures and `restarts`. The engine's counters begin anew with each engine."""
        return self._engine.figures() | {"restarts": float(self._n_restarts)}
