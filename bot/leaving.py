"""
`leave`: the end of a process that has loaded vLLM, without what its libraries have to say at the very last.

They report of themselves what nanobind calls leaks, some thirty lines after "application shutdown complete", which
nobody who stops a server can tell from an error. No setting turns that off; an interpreter that is not taken apart
says nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End the process with `code`: as `sys.exit` does where vLLM was not loaded, else right after the exit handlers."""
    if "vllm" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
