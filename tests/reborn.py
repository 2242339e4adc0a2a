"""
A server process that can be killed and born again within a tenth of a second: `python -m tests.reborn DATABASE`.

It has imported everything and holds the listening socket; for each line on its standard input it forks a child that
opens the storage and serves (`ScriptedAnswerer` instead of a model), and says the child's process id. What is killed is
thus a real server with real sockets and a real SQLite file; only the second of importing is not paid again each time.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

from bot.server import Server, create_app, listening_socket, uvicorn_config
from tests.fakes import ScriptedAnswerer
from tests.running import parts_of


def main() -> None:
    database = Path(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead need no burial
    with listening_socket("127.0.0.1", 0) as listening:
        listening.listen(2048)
        print(listening.getsockname()[1], flush=True)
        gc.freeze()
        for _ in sys.stdin:
            if (pid := os.fork()) == 0:
                app = create_app(parts_of(database, ScriptedAnswerer(delay_s=0.003)))
                Server(uvicorn_config(app, "127.0.0.1", 0)).run(sockets=[listening])
                os._exit(0)
            print(pid, flush=True)


if __name__ == "__main__":
    main()
