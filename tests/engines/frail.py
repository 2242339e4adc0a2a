"""A made-up engine that dies, hangs and fails when told, and a factory that remembers what it made. No test logic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from bot.engine import Chunk, EngineState, Sampling
from bot.errors import EngineDead
from bot.messages import Message


class FrailEngine:
    """Says "alive" word by word until it is killed; `start` fails as often as told."""

    name = "frail"
    adapter: str | None = None
    max_prompt_tokens = 100

    def __init__(self, start_error: Exception | None = None, words: str = "alive ") -> None:
        self.start_error = start_error
        self.words = words
        self.adapters: dict[str, str] = {}  # what is said with each that was added
        self.warmed: list[str | None] = []
        self.dead = asyncio.Event()
        self.hangs = self.closed = False
        self._state = EngineState(False, "none")

    async def start(self) -> None:
        self._state = EngineState(False, "starting", "loading")
        await asyncio.sleep(0.01)
        if self.start_error:
            raise self.start_error
        self._state = EngineState(True, "ready")

    async def check_health(self) -> None:
        if self.hangs:
            await asyncio.sleep(60)
        if self.dead.is_set():
            raise EngineDead("killed")

    async def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, adapter: str | None = None
    ) -> AsyncGenerator[Chunk, None]:
        words = self.words if adapter is None else self.adapters[adapter]
        for _ in range(sampling.max_tokens):
            yield Chunk(words, n_tokens=1)
            await asyncio.sleep(0.01)
            if self.dead.is_set():
                raise EngineDead("killed")
        yield Chunk("", "stop")

    async def warm(self, messages: Sequence[Message], *, adapter: str | None = None) -> None:
        self.warmed.append(adapter)

    async def close(self) -> None:
        self.dead.set()
        self.closed = True
        self._state = EngineState(False, "stopped")

    def state(self) -> EngineState:
        return self._state

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return len(messages)

    def figures(self) -> dict[str, float]:
        return {"running": 0.0}


class Maker:
    """A factory that remembers what it made."""

    def __init__(self, *start_errors: Exception | None) -> None:
        self.errors = list(start_errors)
        self.made: list[FrailEngine] = []

    def __call__(self) -> FrailEngine:
        self.made.append(FrailEngine(self.errors.pop(0) if self.errors else None))
        return self.made[-1]
