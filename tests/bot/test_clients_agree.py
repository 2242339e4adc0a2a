"""The scenarios of tests/clients.json against bot/client.py; tests/web/scenarios.test.mjs: against client.js."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from bot.client import Client, RequestFailed, connect

SCENARIOS = json.loads((Path(__file__).parents[1] / "clients.json").read_text(encoding="utf-8"))["scenarios"]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s["name"])
async def test_the_python_client_keeps_to_the_scenarios(scenario: dict[str, Any]) -> None:
    connections: asyncio.Queue[ServerConnection] = asyncio.Queue()

    async def handler(connection: ServerConnection) -> None:
        connections.put_nowait(connection)
        await connection.wait_closed()

    async with serve(handler, "127.0.0.1", 0) as server, asyncio.timeout(30):
        port = server.sockets[0].getsockname()[1]
        client = connect(f"ws://127.0.0.1:{port}/ws")
        entering = asyncio.create_task(client.__aenter__())
        connection = await connections.get()
        ids: dict[str, str] = {}
        questions: dict[str, asyncio.Task[dict[str, Any]]] = {}
        ended_at = 0.0
        try:
            for step in scenario["steps"]:
                if "expect" in step:
                    frame = json.loads(await connection.recv())
                    if step["expect"].get("id") in questions and step["expect"]["id"] not in ids:
                        ids[step["expect"]["id"]] = frame["id"]
                    wanted = filled(step["expect"], ids)
                    assert {name: frame.get(name) for name in wanted} == wanted
                elif "send" in step:
                    await connection.send(json.dumps(filled(step["send"], ids)))
                    if step["send"]["type"] == "welcome":
                        await entering
                elif "do" in step:
                    questions[step["as"]] = asyncio.create_task(client.ask(step["text"]))
                elif "cut" in step:
                    connection.transport.abort()
                elif "close" in step:
                    ended_at = time.monotonic()
                    await connection.close(step["close"])
                elif "back" in step:
                    connection = await connections.get()
                    assert time.monotonic() - ended_at >= step.get("not_before_ms", 0) / 1000
                else:
                    await until_is(client, step["is"])
            for name, text in scenario.get("replies", {}).items():
                assert (await questions[name])["text"] == text
            for name, code in scenario.get("failed", {}).items():
                with pytest.raises(RequestFailed) as failed:
                    await questions[name]
                assert failed.value.code == code
            while len(client.events) < len(scenario["seen"]):
                await asyncio.sleep(0.005)
            assert [e["seq"] for e in client.events] == scenario["seen"]
        finally:
            for question in questions.values():
                question.cancel()
            await asyncio.gather(*questions.values(), return_exceptions=True)
            await client.close()


async def until_is(client: Client, shown: dict[str, Any]) -> None:
    while {name: getattr(client, name) for name in shown} != shown:
        await asyncio.sleep(0.005)


def filled(value: Any, ids: dict[str, str]) -> Any:
    """Return `value` with the questions' real ids."""
    if isinstance(value, dict):
        return {name: filled(each, ids) for name, each in value.items()}
    if isinstance(value, list):
        return [filled(each, ids) for each in value]
    return ids.get(value, value) if isinstance(value, str) else value
