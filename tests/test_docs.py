"""The programs in docs/protocol.md run, and print what they promise, against a real server."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.fakes import ScriptedAnswerer
from tests.running import running_server

ROOT = Path(__file__).resolve().parent.parent


def example(language: str, having: str) -> str:
    """Return the one program in `language` that has `having` in it."""
    text = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if having in code]
    return str(found)


async def output_of(*command: str, until: str | None = None) -> str:
    """Return what a program prints; with `until`, end it once it has printed that."""
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout is not None
    said = ""
    async with asyncio.timeout(30):
        while until is None or until not in said:
            line = await process.stdout.readline()
            if not line:
                break
            said += line.decode()
        if until is not None and process.returncode is None:
            process.kill()
        code = await process.wait()
    assert until is not None or code == 0, said
    return said


async def test_the_python_example_runs(tmp_path: Path) -> None:
    async with running_server(tmp_path / "log.db") as server:
        code = example("python", "from bot.client import").replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        said = await output_of(sys.executable, "-c", code)
    assert said.splitlines() == [
        "echo: How long do I have to return something? generated ['faqs.csv:2']",
        "echo: And from abroad?echo: Thanks!",
    ]


async def test_the_javascript_example_runs(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    async with running_server(tmp_path / "log.db", ScriptedAnswerer(delay_s=0.02)) as server:
        code = example("js", "new ChatClient")
        for there, here in (
            ("https://chat.example/client.js", str(ROOT / "bot" / "web" / "client.js")),
            ("wss://chat.example/ws", server.ws_url),
        ):
            assert there in code
            code = code.replace(there, here)
        program = tmp_path / "example.mjs"
        program.write_text(code, encoding="utf-8")
        # Node 20 has the browser's WebSocket behind this flag, later ones without it.
        said = await output_of(node, "--experimental-websocket", "--no-warnings", str(program), until=" generated\n")
    assert said.splitlines()[:2] == ["connecting", "online"]
    assert re.search(r"^\S+ 0 echo: $", said, re.MULTILINE), said
    assert "echo: Do you ship to Canada? generated" in said
