"""For all tests: how the run ends."""

from __future__ import annotations

import os
import sys

import pytest


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """
    End the process here, behind the summary.

    Once vLLM was imported, triton's bindings print sixty lines of "leaked" types when the interpreter is torn down
    (nanobind refleaks), and pytest's own summary would no longer be the last thing one reads.
    """
    if "vllm" in sys.modules:
        status = getattr(config, "zhanggui_status", 1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.zhanggui_status = int(exitstatus)  # type: ignore[attr-defined]
