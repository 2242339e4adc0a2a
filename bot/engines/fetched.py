"""
Engines of releases on this machine: fetched or merged while the server already serves, then loaded by vLLM.

Knows the catalog, releases on disk and the vLLM engine; what an engine waits for is in its state, for /readyz and the
page. Which releases are to be live is `bot.engines.releases`' business.

Two ways to serve a release. Merged: its weights are a model folder of their own, in an engine of their own; so on CPU.
Hot: its LoRA is loaded by a running engine of its base, beside others; so where the profile has `max_loras` (CUDA).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bot.catalog import resolve_model
from bot.engine import Chunk, EngineState, Sampling
from bot.engines.vllm import Profile, VllmEngine, profile_for_this_machine, shortage
from bot.errors import EngineNotReady, MerchantError
from bot.fetch import ConsoleProgress, Progress
from bot.merging import check_fits, read_adapter, weight_shapes
from bot.messages import Message
from bot.releases import StoredRelease, rank_needed, resolve_release


class FetchedEngine:
    """
    A `VllmEngine` of one release, or of a base model with the LoRAs of several. One `start()`, then `close()`.

    `adapters` are loaded with it, and a request names one by its release. Read at the start, so that an engine that
    replaces a dead one has what that one had in the end; None where it serves its own weights alone.
    """

    adapter: str | None = None

    def __init__(
        self, release: StoredRelease, cache_dir: Path, profile: Profile, adapters: Mapping[str, StoredRelease] | None
    ) -> None:
        self.name = release.model
        self._release, self._cache_dir, self._profile = release, cache_dir, profile
        self._adapters = adapters
        self._engine: VllmEngine | None = None
        self._detail = "looking for the model"

    async def start(self) -> None:
        """
        Fetch or merge what is needed, and load it.

        Raises:
            MerchantError: no such model, or a folder that must not be opened.
            FetchFailed: no source had it.
            EngineFailed: vLLM could not start.
        """
        console = ConsoleProgress(self._release.name)

        def progress(stage: str, done: int, total: int) -> None:
            self._detail = f"{stage} {100 * done // max(total, 1)}%"
            console(stage, done, total)

        folder = await asyncio.to_thread(
            weights_of, self._release, self._cache_dir, progress, hot=self._adapters is not None
        )
        self._engine = VllmEngine(folder, self.name, self._profile)
        await self._engine.start()
        for release in list((self._adapters or {}).values()):
            await self.add_adapter(release)

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()

    def _loaded(self) -> VllmEngine:
        if self._engine is None:
            raise EngineNotReady(self._detail)
        return self._engine

    async def add_adapter(self, release: StoredRelease) -> None:
        """Load a release's LoRA for requests to come; raises EngineFailed where vLLM refuses it."""
        assert release.adapter_dir is not None, "only releases with a LoRA are loaded hot"
        await self._loaded().add_adapter(release.name, release.adapter_dir)

    async def remove_adapter(self, release: StoredRelease) -> None:
        """Forget a release's LoRA, which no request uses any more."""
        await self._loaded().remove_adapter(release.name)

    def stream(
        self, messages: Sequence[Message], sampling: Sampling, *, adapter: str | None = None
    ) -> AsyncGenerator[Chunk, None]:
        return self._loaded().stream(messages, sampling, adapter=adapter)

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

    async def warm(self, messages: Sequence[Message], *, adapter: str | None = None) -> None:
        """Fill the prefix cache with what every prompt begins with."""
        await self._loaded().warm(messages, adapter=adapter)

    def figures(self) -> dict[str, float]:
        return self._engine.figures() if self._engine is not None else {}


class EngineMaker:
    """Makes engines of releases, by this machine's profile and the merchant's changes to it."""

    def __init__(self, cache_dir: Path, overrides: Mapping[str, Any] | None = None) -> None:
        self._cache_dir = cache_dir
        # Checked here, so that a wrong setting ends the command and not the engine's third restart.
        self._profile = profile_for_this_machine().changed(dict(overrides or {}))

    def is_hot(self, release: StoredRelease) -> bool:
        """Whether the release is served as an adapter of a running engine; bare models are its engines."""
        if not self._profile.max_loras:
            return False
        if release.adapter is None:
            return True
        rank = rank_needed(release)
        return rank is not None and rank <= self._profile.max_lora_rank

    def host_of(self, release: StoredRelease) -> str:
        """Return what tells the engine that serves the release from others: its base where it is hot, else itself."""
        return f"base {release.base}" if self.is_hot(release) else f"release {release.name}"

    async def prepare(self, release: StoredRelease, progress: Progress | None = None) -> None:
        """
        Have what the release needs on this machine: minutes where its base has to be fetched, seconds to merge.

        Raises:
            MerchantError, FetchFailed: it cannot be had, or its LoRA is of another base.
        """
        await asyncio.to_thread(self._prepare, release, progress)

    def _prepare(self, release: StoredRelease, progress: Progress | None) -> None:
        hot = self.is_hot(release)
        folder = weights_of(release, self._cache_dir, progress, hot=hot)
        if hot and release.adapter_dir is not None:
            # vLLM leaves out what does not match, and serves the base in its name (0.32, a debug line).
            check_fits(read_adapter(release.adapter_dir), weight_shapes(folder), release.adapter_dir)

    async def shortage(self, release: StoredRelease) -> str | None:
        """Return why there is no room for one more engine with this release; None where there is. Measured now."""
        return await asyncio.to_thread(self._shortage, release)

    def _shortage(self, release: StoredRelease) -> str | None:
        return shortage(self._profile, weights_of(release, self._cache_dir, None, hot=self.is_hot(release)))

    def make(self, release: StoredRelease, adapters: Mapping[str, StoredRelease] | None) -> FetchedEngine:
        """Return an engine, not started: of the release's own weights, or of its base with `adapters`, if only none."""
        return FetchedEngine(release, self._cache_dir, self._profile, adapters)


def weights_of(release: StoredRelease, cache_dir: Path, progress: Progress | None, *, hot: bool) -> Path:
    """Return the folder an engine opens: the base's where the LoRA is loaded by itself, else the release's own."""
    try:
        if hot:
            return resolve_model(release.base, cache_dir, progress)
        return resolve_release(release, cache_dir, progress)
    except OSError as exc:  # a full disk, a folder that may not be written
        raise MerchantError(f"release {release.name!r}: {exc}") from exc
