"""A scripted conversation through a network that cuts, delays and duplicates: the log is the same after every run."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Literal

import pytest

from tests.faults import Fault, check, converse
from tests.running import running_server

STRIDE = 8  # every offset takes minutes: `python bench/faults.py`
AT_ONCE = 40


@pytest.mark.timeout(120)
async def test_whatever_the_network_does_and_wherever_every_message_is_there_once_and_in_order(tmp_path: Path) -> None:
    async with running_server(tmp_path / "log.db") as server:
        calm = await converse(server.storage, server.port, Fault("none", "up", 0))
        check(calm)
        n_up, n_down = calm.proxy.n_up, calm.proxy.n_down
        assert n_up > 300
        assert n_down > 1000
        begin = random.Random(4).randrange(STRIDE)
        faults = [Fault("cut", "up", n) for n in range(begin, n_up, STRIDE)]
        faults += [Fault("cut", "down", n) for n in range(begin, n_down, STRIDE)]
        faults += [Fault("delay", way, n) for way, most in ways(n_up, n_down) for n in range(begin, most, 8 * STRIDE)]
        faults += [Fault("duplicate", "up", n) for n in range(begin, n_up, 4 * STRIDE)]
        places = asyncio.Semaphore(AT_ONCE)

        async def one(fault: Fault) -> None:
            async with places:
                try:
                    check(await converse(server.storage, server.port, fault))
                except BaseException as exc:
                    exc.add_note(repr(fault))
                    raise

        async with asyncio.TaskGroup() as group:
            for fault in faults:
                group.create_task(one(fault))
        await server.idle()


def ways(n_up: int, n_down: int) -> tuple[tuple[Literal["up", "down"], int], ...]:
    return (("up", n_up), ("down", n_down))
