"""`python -m retrieval …` within the test's own process: a fresh one pays for its imports (test_main.py has those)."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from retrieval.__main__ import main


@dataclass(frozen=True)
class Done:
    """What a command printed."""

    stdout: str
    stderr: str


def retrieval(*arguments: str | Path, status: int = 0) -> Done:
    """Run one command; it must end with `status`."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ended = main([str(argument) for argument in arguments])
        except SystemExit as exc:
            ended = int(exc.code or 0)
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]
    assert ended == status, said[1]
    return Done(*said)
