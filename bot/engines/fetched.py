"""
An engine whose model may not be here yet: fetches it while the server already serves, then loads it.

Knows the catalog and the vLLM engine; what it waits for is in its state, for /readyz and the page.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bot.catalog import load_catalog, resolve_model
from bot.engine import Chunk, EngineState, Sampling
from bot.engines.vllm import VllmEngine, profile_for_this_machine
from bot.errors import EngineNotReady
from bot.fetch import ConsoleProgress
from bot.messages import Message


class FetchedEngine:
    """A `VllmEngine` made from a catalog name or a folder. Same life: one `start()`, then `close()`."""

    adapter: str | None = None

    def __init__(self, model: str | None, cache_dir: Path, overrides: Mapping[str, Any] | None = None) -> None:
        self.model = model or load_catalog().default_name
        self.name = Path(self.model).name
        self._cache_dir = cache_dir
        # Checked here, so that a wrong setting ends the command and not the engine's third restart.
        self._profile = profile_for_this_machine().changed(dict(overrides or {}))
        self._engine: VllmEngine | None = None
        self._detail = "looking for the model"

    async def start(self) -> None:
        """
        Fetch the model where needed, and load it.

        Raises:
            MerchantError: no such model, or a folder that must not be opened.
            FetchFailed: no source had it.
            EngineFailed: vLLM could not start.
        """
        console = ConsoleProgress(self.name)

        def progress(stage: str, done: int, total: int) -> None:
            self._detail = f"{stage} {100 * done // max(total, 1)}%"
            console(stage, done, total)

        folder = await asyncio.to_thread(resolve_model, self.model, self._cache_dir, progress)
        self._engine = VllmEngine(folder, self.name, self._profile)
        await self._engine.start()

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()

    def _loaded(self) -> VllmEngine:
        if self._engine is None:
            raise EngineNotReady(self._detail)
        return self._engine

    def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        return self._loaded().stream(messages, sampling)

    def state(self) -> EngineState:
        return self._engine.state() if self._engine is not None else EngineState(False, "starting", self._detail)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        if self._engine is None:  # only for figures: nothing is generated yet
            return sum(len(m.content) for m in messages) // 3
        return self._engine.count_tokens(messages)

    @property
    def max_prompt_tokens(self) -> int:
        return self._loaded().max_prompt_tokens

    async def check_health(self) -> None:
        await self._loaded().check_health()

    async def warm(self, messages: Sequence[Message]) -> None:
        """Fill the prefix cache with what every prompt begins with."""
        await self._loaded().warm(messages)

    def figures(self) -> dict[str, float]:
        return self._engine.figures() if self._engine is not None else {}
