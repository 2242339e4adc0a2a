"""Real servers in a thread with an event loop of its own, for commands that are run from a test and ask them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from bot.answer import Answerer
from bot.engines.openai import OpenAIEngine
from tests.fakes import ScriptedAnswerer
from tests.running import running_server


@contextmanager
def servers_in_a_thread(made: Mapping[str, tuple[Path, Answerer]]) -> Iterator[dict[str, str]]:
    """Serve each (database, answerer) until the block ends, its engine started; yield the ws:// addresses by name."""
    loop = asyncio.new_event_loop()
    ready, over = threading.Event(), asyncio.Event()
    urls: dict[str, str] = {}
    broken: list[BaseException] = []

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            for name, (database, answerer) in made.items():
                engine = cast(OpenAIEngine, answerer.engine)
                options: dict[str, Any] = {"engine": engine}
                running = await stack.enter_async_context(
                    running_server(database, cast(ScriptedAnswerer, answerer), **options)
                )
                stack.callback(answerer.close)
                urls[name] = running.ws_url
            ready.set()
            await over.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        except BaseException as exc:
            broken.append(exc)
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(60)
    try:
        if broken:
            raise broken[0]
        yield urls
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
