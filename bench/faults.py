"""
Every byte offset of the scripted conversation, cut, delayed and duplicated: `python bench/faults.py [--stride 1]`.

`make test` runs a part of them (tests/test_faults.py). Prints and writes how many runs there were and what they left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from typing import Literal

from tests.faults import Fault, check, converse
from tests.running import running_server

AT_ONCE = 40
RESULTS = Path(__file__).parent / "results" / "faults.json"


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=1)
    stride = parser.parse_args().stride
    began = time.monotonic()
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        async with running_server(Path(folder) / "log.db") as server:
            calm = await converse(server.storage, server.port, Fault("none", "up", 0))
            ways: list[tuple[Literal["up", "down"], int]] = [("up", calm.proxy.n_up), ("down", calm.proxy.n_down)]
            faults = [Fault("cut", way, n) for way, most in ways for n in range(0, most, stride)]
            faults += [Fault("delay", way, n) for way, most in ways for n in range(0, most, stride)]
            faults += [Fault("duplicate", "up", n) for n in range(0, ways[0][1], stride)]
            places = asyncio.Semaphore(AT_ONCE)

            async def one(fault: Fault) -> None:
                async with places:
                    try:
                        check(await converse(server.storage, server.port, fault))
                    except Exception as exc:
                        failed.append(f"{fault}: {exc!r}")

            await asyncio.gather(*(one(fault) for fault in faults))
    result = {
        "runs": len(faults),
        "bytes_up": ways[0][1],
        "bytes_down": ways[1][1],
        "failed": failed,
        "duration_s": round(time.monotonic() - began, 1),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
