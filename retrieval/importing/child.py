"""
The process that reads one foreign file: sets its own limits, loads one library, prints what it read as JSON lines.

Started by `reading.py`, never imported by it. A hostile file can take this process down and nothing else: memory and
processor time are limited by the kernel before the first byte is parsed, and the exit is silent. Knows the readers'
names; every one is `read(path) -> Iterator[dict]` and may raise `Refused`.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

from retrieval.importing.limits import CHILD_CPU_S, CHILD_CPU_S_PER_MIB, CHILD_MEMORY_BYTES, CHILD_MEMORY_PER_BYTE, MiB
from retrieval.importing.refused import TOO_LARGE, Refused

READERS = {"xlsx": "xlsx", "docx": "docx", "pdf": "pdf", "html": "webpage", "json": "jsonfile"}


def main(form: str, path: str) -> int:
    """Read `path` with the reader of `form` and print its records; 0 whether it was read or refused."""
    reader: Any = importlib.import_module(f"retrieval.importing.{READERS[form]}")
    # A bomb is small: 200 MB of it are 200 KB packed. What is large packed may take its time to be looked through.
    packed_s = Path(path).stat().st_size / MiB * CHILD_CPU_S_PER_MIB
    limit(CHILD_MEMORY_BYTES, CHILD_CPU_S + packed_s)
    write = sys.stdout.write
    try:
        for record in reader.read(Path(path)):
            if "allow" in record:  # the named limits were kept: what is left to read may cost by its size
                size: int = record["allow"]
                limit(
                    CHILD_MEMORY_BYTES + int(size * CHILD_MEMORY_PER_BYTE),
                    CHILD_CPU_S + packed_s + size / MiB * CHILD_CPU_S_PER_MIB,
                )
            write(json.dumps(record) + "\n")
        write('{"done": true}\n')
    except Refused as exc:
        write(json.dumps({"refused": str(exc)}) + "\n")
    except MemoryError:
        write(json.dumps({"refused": TOO_LARGE}) + "\n")
    except RecursionError:
        write(json.dumps({"refused": "is nested too deeply; save it again in the program it comes from"}) + "\n")
    except Exception as exc:  # whatever a parser trips over in a damaged file, the merchant needs one line
        problem = (
            f"is damaged or no {form.upper()} file ({type(exc).__name__}); save it again in the program it comes from"
        )
        write(json.dumps({"refused": problem}) + "\n")
    sys.stdout.flush()
    return 0


def limit(memory_bytes: int, cpu_s: float) -> None:
    """
    Let this process grow by `memory_bytes` and work for `cpu_s` in all.

    Only the soft limits are set, so that they can be widened. SIGXCPU keeps its default, the end of the process: a
    handler in Python would wait for a C loop to return that never does.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    base = getattr(limit, "base", used)
    limit.base = base  # type: ignore[attr-defined]
    resource.setrlimit(resource.RLIMIT_AS, (base + memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CPU, (max(1, round(cpu_s)), resource.getrlimit(resource.RLIMIT_CPU)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
