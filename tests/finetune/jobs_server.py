"""
A server with files and jobs that can be killed: `python -m tests.finetune.jobs_server HOME`; says its port, then serves.

`ScriptedAnswerer` instead of a model; files, queue, runner and the processes of jobs are those of serve.py.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from bot.fine_tuning_api import FineTuning
from bot.server import Server, create_app, listening_socket, uvicorn_config
from bot.settings import Settings
from serve import build_fine_tuning
from tests.fakes import ScriptedAnswerer
from tests.running import parts_of


def home_settings(home: Path, **given: Any) -> Settings:
    """Return the settings of a server whose everything lies in `home`."""
    return Settings(data=home / "data", cache=home / "cache", job_threads=1, **given)


def fine_tuning_of(home: Path, **given: Any) -> tuple[FineTuning, Callable[[], Awaitable[None]]]:
    """Return files and jobs in `home`, with what runs them; its store has contacts and no passages."""
    store = home / "store"
    store.mkdir(parents=True, exist_ok=True)
    (store / "store.toml").write_text('name = "Lamps"\n[contact]\nphone = "400 123 4567"\n', encoding="utf-8")
    return build_fine_tuning(home_settings(home, **given), store)


def main() -> None:
    home = Path(sys.argv[1])
    parts = parts_of(home / "conversations.sqlite3", ScriptedAnswerer(), fine_tuning=fine_tuning_of(home))
    with listening_socket("127.0.0.1", 0) as listening:
        listening.listen()
        print(listening.getsockname()[1], flush=True)
        Server(uvicorn_config(create_app(parts), "127.0.0.1", 0)).run(sockets=[listening])


if __name__ == "__main__":
    main()
