"""
What the engine's child process does first: follow its parent into death, give way to it, mend vLLM.

vLLM imports this file in the process that runs the model, and nowhere else (`worker_extension_cls`), before the
weights are loaded. The import itself acts; `Extension` is only there to be named. Import it from nowhere: a module that
the main script imports is imported in the child as well, too early for it to know that it is one.

vLLM watches its child but not the other way round: after a SIGKILL of the server its engine core would wait on
its socket for ever and hold the model's memory (seen with 0.32, tests/engines/test_supervisor.py). With tensor
parallelism this file is imported by the workers, and the engine core, their parent, is not covered.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

from bot.engines.vllm import NICE_VARIABLE, mend_vllm

_PR_SET_PDEATHSIG = 1  # prctl(2); the "parent" is the thread that started us: the engine's thread, which outlives us


class Extension:
    """Mixed into vLLM's worker class. Empty."""


def _follow_parent(parent_pid: int | None) -> None:
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return  # not Linux
    if os.getppid() != parent_pid:  # it died while we were importing: the signal would never come
        os._exit(1)


def _give_way() -> None:
    """Raise our niceness, so that the event loop gets a core as soon as it wants one. Threads started later inherit."""
    if nice := int(os.environ.get(NICE_VARIABLE, "0")):
        os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))


if (_parent := multiprocessing.parent_process()) is not None:
    _follow_parent(_parent.pid)
    _give_way()
    mend_vllm()
