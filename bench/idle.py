"""
What an idle visitor costs, and what a thousand of them cost the one who asks: `python bench/idle.py [--visitors 2000]`.

Starts a real server (`serve.py --engine none`, the demo store) in a process of its own, asks questions on the empty
server, lets visitors say hello and stay silent, asks the same again. Prints one JSON document and writes it to
bench/results/idle.json. Memory is the server's resident set; the clients live in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_socket

from bot.client import connect

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "idle.json"
QUESTIONS = (
    *("How much is shipping?", "满多少包邮？", "How do I return an item?", "可以开发票吗？", "Do you ship to Canada?"),
)


def resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise RuntimeError("no VmRSS")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


async def ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        if await asyncio.to_thread(answers, f"{url}/readyz"):
            return
        await asyncio.sleep(0.3)
    raise TimeoutError("the server did not get ready")


async def first_deltas_ms(url: str, n: int) -> list[float]:
    """Return the times from `ask` to the first text of its reply."""
    times = []
    async with connect(url) as client:
        for turn in range(n):
            began = time.perf_counter()
            first = None
            async for frame in client.stream(QUESTIONS[turn % len(QUESTIONS)]):
                if first is None and frame["type"] == "delta":
                    first = time.perf_counter() - began
            if first is not None:
                times.append(first * 1000)
            await asyncio.sleep(0.02)
    return times


async def idle_visitor(url: str, places: asyncio.Semaphore) -> ClientConnection:
    async with places:
        socket = await open_socket(url, compression=None, proxy=None, ping_interval=None, max_queue=4)
        await socket.send('{"type":"hello","protocol":1}')
        await socket.recv()
        return socket


async def measure(port: int, n_visitors: int, n_questions: int, process: subprocess.Popen[bytes]) -> dict[str, object]:
    http, url = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}/ws"
    await ready(http, process)
    await first_deltas_ms(url, 20)  # warm
    empty = await first_deltas_ms(url, n_questions)
    await asyncio.sleep(2)
    base_kib = resident_kib(process.pid)
    places = asyncio.Semaphore(50)
    began = time.monotonic()
    visitors = await asyncio.gather(*(idle_visitor(url, places) for _ in range(n_visitors)))
    opened_s = time.monotonic() - began
    await asyncio.sleep(2)
    full_kib = resident_kib(process.pid)
    loaded = await first_deltas_ms(url, n_questions)
    still_open = sum(v.state.name == "OPEN" for v in visitors)
    for visitor in visitors:
        visitor.transport.abort()
    await asyncio.sleep(3)
    # Before and after, since a machine that others use is not the same from minute to minute.
    empty += await first_deltas_ms(url, n_questions)
    ttft_empty, ttft_loaded = statistics.median(empty), statistics.median(loaded)
    return {
        "visitors": n_visitors,
        "still_open": still_open,
        "opened_in_s": round(opened_s, 1),
        "base_mib": round(base_kib / 1024, 1),
        "kib_per_visitor": round((full_kib - base_kib) / n_visitors, 1),
        "ttft_ms_p50_empty": round(ttft_empty, 2),
        "ttft_ms_p50_empty_before_and_after": [
            round(statistics.median(half), 2) for half in (empty[: len(empty) // 2], empty[len(empty) // 2 :])
        ],
        "ttft_ms_p50_with_visitors": round(ttft_loaded, 2),
        "ttft_ratio": round(ttft_loaded / ttft_empty, 2),
        "load_average": os.getloadavg()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--visitors", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--port", type=int, default=18123)
    args = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "serve.py", "--engine", "none", "--port", str(args.port), "--data", data]
        environment = {**os.environ, "ZHANGGUI_LOG_LEVEL": "warning", "ZHANGGUI_ASKS_PER_MINUTE": "100000"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        try:
            result = asyncio.run(measure(args.port, args.visitors, args.questions, process))
        finally:
            process.terminate()
            process.wait(20)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
