"""`bot.engines.supervisor`: deaths and restarts, with a made-up engine and with vLLM's real core."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from bot.engine import EngineState, Sampling
from bot.engines.supervisor import SupervisedEngine
from bot.engines.vllm import VllmEngine
from bot.errors import EngineDead, EngineFailed, EngineNotReady, MerchantError
from bot.messages import Message
from tests.engines.frail import Maker
from tests.engines.tiny_model import REPLY, needs_vllm, tiny_profile

ROOT = Path(__file__).resolve().parents[2]
HELLO = [Message("user", "hello")]


async def text_of(engine: SupervisedEngine, sampling: Sampling | None = None) -> str:
    async with aclosing(engine.stream(HELLO, sampling or Sampling(max_tokens=3))) as chunks:
        return "".join([chunk.text async for chunk in chunks])


async def until(condition: Callable[[], bool], within_s: float) -> float:
    """Return how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, "waited in vain"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


def quick(maker: Maker) -> SupervisedEngine:
    return SupervisedEngine(maker, check_interval_s=0.05, first_wait_s=0.05, longest_wait_s=0.2)


class TestWithAMadeUpEngine:
    async def test_start_returns_at_once_and_requests_are_refused_until_ready(self) -> None:
        engine = quick(Maker())
        assert engine.state().phase == "none"
        with pytest.raises(EngineNotReady):
            await text_of(engine)
        await engine.start()
        await asyncio.sleep(0)
        assert engine.state() == EngineState(False, "starting", "loading")
        with pytest.raises(EngineNotReady, match="starting: loading"):
            await text_of(engine)
        await engine.wait_ready()
        assert engine.state().ready
        assert await text_of(engine) == "alive alive alive "
        await engine.close()
        assert engine.state().phase == "stopped"
        with pytest.raises(EngineDead):
            await text_of(engine)

    async def test_a_dead_engine_is_closed_and_replaced(self) -> None:
        maker = Maker()
        engine = quick(maker)
        await engine.start()
        await engine.wait_ready()
        reply = asyncio.create_task(text_of(engine, Sampling(max_tokens=1000)))
        await asyncio.sleep(0.03)
        maker.made[0].dead.set()
        with pytest.raises(EngineDead):
            await reply
        await until(lambda: engine.state().phase == "restarting", 1)
        with pytest.raises(EngineNotReady, match="restarting"):
            await text_of(engine)
        await engine.wait_ready()
        assert await text_of(engine) == "alive alive alive "
        assert maker.made[0].closed
        assert len(maker.made) == 2
        assert engine.figures()["restarts"] == 1
        await engine.close()

    async def test_a_request_that_meets_a_dead_engine_makes_the_supervisor_look_at_once(self) -> None:
        maker = Maker()
        engine = SupervisedEngine(maker, check_interval_s=30, first_wait_s=0.05)
        await engine.start()
        await engine.wait_ready()
        maker.made[0].dead.set()
        with pytest.raises(EngineDead):
            await text_of(engine)
        assert await until(lambda: len(maker.made) == 2, 2) < 1
        await engine.close()

    async def test_an_engine_that_does_not_answer_its_health_check_is_replaced(self) -> None:
        maker = Maker()
        engine = quick(maker)
        await engine.start()
        await engine.wait_ready()
        maker.made[0].hangs = True
        await until(lambda: len(maker.made) == 2, 5)
        await engine.wait_ready()
        assert engine.state().ready
        await engine.close()

    async def test_a_failed_start_is_tried_again_after_growing_waits(self) -> None:
        maker = Maker(*[EngineFailed("no memory")] * 4)
        engine = quick(maker)
        began = time.monotonic()
        await engine.start()
        await engine.wait_ready()
        assert len(maker.made) == 5
        assert time.monotonic() - began > 0.75 * (0.05 + 0.1 + 0.2 + 0.2)
        assert all(made.closed for made in maker.made[:4])
        await engine.close()

    async def test_what_the_merchant_got_wrong_is_not_tried_again(self) -> None:
        maker = Maker(MerchantError("there is no model in /x"))
        engine = quick(maker)
        await engine.start()
        with pytest.raises(MerchantError, match="no model in /x"):
            await engine.wait_ready()
        assert engine.state() == EngineState(False, "stopped", "there is no model in /x")
        assert len(maker.made) == 1
        await engine.close()

    async def test_an_engine_is_ready_once_its_first_prompt_was_answered(self) -> None:
        seen: list[str] = []

        async def first_prompt(engine: object) -> None:
            seen.append(supervised.state().detail)
            if len(seen) == 1:
                raise EngineFailed("nothing but noise")

        maker = Maker()
        supervised = SupervisedEngine(maker, on_ready=first_prompt, check_interval_s=0.05, first_wait_s=0.05)
        await supervised.start()
        await supervised.wait_ready()
        assert seen == ["trying its first prompt", ""]  # of the second engine it is said that it restarts
        assert len(maker.made) == 2
        assert maker.made[0].closed
        assert await text_of(supervised) == "alive alive alive "
        await supervised.close()

    async def test_with_a_limit_of_first_tries_it_gives_up_and_says_why_but_restarts_what_once_worked(self) -> None:
        maker = Maker(EngineFailed("no memory"), EngineFailed("still none"))
        supervised = SupervisedEngine(maker, first_tries=2, check_interval_s=0.05, first_wait_s=0.01)
        await supervised.start()
        with pytest.raises(EngineFailed, match="still none"):
            await supervised.wait_ready()
        assert supervised.state() == EngineState(False, "stopped", "still none")
        await supervised.close()

        maker = Maker(None, EngineFailed("no memory"))
        supervised = SupervisedEngine(maker, first_tries=1, check_interval_s=0.05, first_wait_s=0.01)
        await supervised.start()
        await supervised.wait_ready()
        maker.made[0].dead.set()
        await until(lambda: len(maker.made) == 3, 5)
        await supervised.wait_ready()
        assert await text_of(supervised) == "alive alive alive "
        await supervised.close()

    async def test_closing_while_it_starts_or_waits_leaves_no_task(self) -> None:
        for maker, after_s in ((Maker(), 0.0), (Maker(EngineFailed("x")), 0.03)):
            before = asyncio.all_tasks()
            engine = quick(maker)
            await engine.start()
            await asyncio.sleep(after_s)
            await engine.close()
            assert maker.made[-1].closed
            assert asyncio.all_tasks() == before


def is_running(pid: int) -> bool:
    """Return whether a process is there and not just waiting to be reaped."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_vllm
class TestWithVllm:
    @pytest.mark.timeout(400)
    async def test_a_killed_core_is_noticed_within_five_seconds_and_replaced(
        self, engine: VllmEngine, tiny_model: Path
    ) -> None:
        del engine  # started before, so that its imports are not counted here
        supervised = SupervisedEngine(lambda: VllmEngine(tiny_model, "tiny", tiny_profile()), first_wait_s=0.1)
        await supervised.start()
        await supervised.wait_ready()
        first = supervised.engine
        assert isinstance(first, VllmEngine)
        (pid,) = first.processes()
        assert await text_of(supervised, Sampling()) == REPLY

        async def endless() -> None:
            async with aclosing(supervised.stream([Message("user", "endless")], Sampling(max_tokens=1900))) as chunks:
                async for _ in chunks:
                    pass

        under_way = [asyncio.create_task(endless()) for _ in range(3)]
        await until(lambda: first.unfinished() == 3, 10)
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        results = await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), 5)
        assert [type(result) for result in results] == [EngineDead] * 3
        await until(lambda: supervised.state().phase == "restarting", 5)
        assert time.monotonic() - began < 5
        with pytest.raises(EngineNotReady):
            await text_of(supervised)

        await supervised.wait_ready()
        assert await text_of(supervised, Sampling()) == REPLY
        second = supervised.engine
        assert isinstance(second, VllmEngine)
        (successor,) = second.processes()
        assert not is_running(pid)
        assert supervised.figures()["restarts"] == 1
        await supervised.close()
        assert not is_running(successor)

    @pytest.mark.timeout(400)
    async def test_the_core_follows_a_killed_server_into_death(self, tiny_model: Path, tmp_path: Path) -> None:
        script = tmp_path / "server.py"
        script.write_text(
            textwrap.dedent(
                """
                import asyncio, sys, time
                from pathlib import Path
                from bot.engines.vllm import VllmEngine  # as serve.py does: the child imports it again
                from tests.engines.tiny_model import tiny_profile

                async def main() -> None:
                    engine = VllmEngine(Path(sys.argv[1]), "tiny", tiny_profile())
                    await engine.start()
                    print(*engine.processes(), flush=True)
                    await asyncio.sleep(600)

                if __name__ == "__main__":
                    asyncio.run(main())
                """
            )
        )
        with (tmp_path / "log.txt").open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, str(script), str(tiny_model)],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert server.stdout is not None
        with server.stdout:
            line = await asyncio.to_thread(server.stdout.readline)
        assert line, (tmp_path / "log.txt").read_text()[-3000:]
        child = int(line)
        assert is_running(child)
        server.kill()
        server.wait()
        await until(lambda: not is_running(child), 5)
