"""`serve.py` as a merchant runs it, for browser tests: a process of its own, without an engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READY_S = 400.0  # the first start on a machine embeds the demo store; later ones take seconds
PASSWORD = "correct horse battery"


class RealServer:
    """`serve.py` in a process of its own, on one port over restarts."""

    def __init__(self, data: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.log = data / "server.log"
        self._data = data
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        command = [sys.executable, "serve.py", "--engine", "none", "--store", "examples/demo", "--host", "127.0.0.1"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                cwd=ROOT,
                env={**os.environ, "ZHANGGUI_DATA": str(self._data)},
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + READY_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the server did not become ready:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def down(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None

    def add_agent(self, login: str, name: str, role: str = "agent") -> None:
        """Make an account, as a merchant does."""
        command = [sys.executable, "-m", "bot", "agents", "add", login, "--name", name, "--role", role]
        subprocess.run(
            [*command, "--password-stdin", "--data", str(self._data)],
            cwd=ROOT,
            input=f"{PASSWORD}\n",
            text=True,
            check=True,
            capture_output=True,
            timeout=60,
        )

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}readyz", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False
