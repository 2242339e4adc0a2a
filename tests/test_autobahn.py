"""The Autobahn test suite's cases 1 to 7 and 10, run by kosoku against the product's own server settings."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from bot.server import listening_socket, uvicorn_config
from tests.running import LoopServer, until

KOSOKU = Path(sys.executable).with_name("kosoku")


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Send each message back, as the suite wants; the handshake, the framing and the limits are the server's."""
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        kind = "text" if message.get("text") is not None else "bytes"
        await send({"type": "websocket.send", kind: message[kind]})


async def test_autobahn_cases_1_to_7_and_10_pass(tmp_path: Path) -> None:
    with listening_socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        config = uvicorn_config(echo, "127.0.0.1", port, log_config=None, graceful_s=1)  # type: ignore[arg-type]
        config.lifespan = "off"
        server = LoopServer(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            await until(lambda: server.started)
            cases = [part for n in (1, 2, 3, 4, 5, 6, 7, 10) for part in ("-i", f"{n}.*")]
            process = await asyncio.create_subprocess_exec(
                *(str(KOSOKU), "-m", "fuzzingclient", *cases, "-p", "8", "-o", str(tmp_path), f"ws://127.0.0.1:{port}"),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            said, _ = await process.communicate()
        finally:
            server.should_exit = True
            await serving
    (report,) = json.loads((tmp_path / "index.json").read_text()).values()
    failed = {case: found for case, found in report.items() if not passed(found)}
    assert not failed, said.decode()[-2000:]
    assert len(report) == 247


def passed(found: dict[str, Any]) -> bool:
    """Return whether a case went as the RFC demands; informational ones have no right outcome."""
    return {found["behavior"], found["behaviorClose"]} <= {"OK", "INFORMATIONAL", "NON-STRICT"}
