"""
What visitors notice of a release being published: `python bench/publish.py [--visitors 8] [--seconds 60]`.

Starts `serve.py` with the default model, every answer generated, and visitors who ask the cases' questions without
pause, each in a conversation of its own. After `--seconds` a second release is made the current one, and once it serves
they go on for as long again; then the pointer goes back, the same way. The second release has the default's own weights
under another name, so that what it costs is the swap alone. Prints replies, failures, latency before, during and after,
and memory of the server with its engines; writes bench/results/publish.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.chat import server  # noqa: E402
from bot.client import connect  # noqa: E402
from bot.evaluate import load_cases  # noqa: E402
from bot.releases import default_release, resolve_release  # noqa: E402
from bot.settings import default_cache_dir  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "publish.json"
RELEASE = "bench-copy"


class Visits:
    """What was asked, when, and by which release it was answered."""

    def __init__(self) -> None:
        self.replies: list[tuple[float, float, str | None]] = []  # (asked at, took, release), in seconds
        self.failures: list[str] = []

    async def visit(self, url: str, questions: list[str]) -> None:
        for question in questions:
            try:
                async with connect(url) as chat:
                    began = time.monotonic()
                    event = await chat.ask(question)
                    self.replies.append((began, time.monotonic() - began, event["release"]["adapter"]))
            except Exception as exc:
                self.failures.append(repr(exc))

    def between(self, begin: float, end: float) -> dict[str, Any]:
        took = sorted(t for at, t, _ in self.replies if begin <= at < end)
        if not took:
            return {"replies": 0}
        return {
            "replies": len(took),
            "seconds": round(end - begin, 1),
            "p50_s": round(statistics.median(took), 2),
            "p99_s": round(took[min(len(took) - 1, int(0.99 * len(took)))], 2),
            "max_s": round(took[-1], 2),
        }


def memory_bytes(pid: int) -> int:
    """Return the memory of a process and all below it; shared pages are counted once (PSS)."""
    total = 0
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total = 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            total += sum(memory_bytes(int(child)) for child in task.read_text().split())
    return total


async def measure(url: str, releases: Path, pid: int, n_visitors: int, seconds: float) -> dict[str, Any]:
    cases = [case.turns[-1] for case in load_cases(ROOT / "examples" / "cases.jsonl")]
    visits = Visits()
    peak = {"now": 0, "peak": 0}

    async def watch() -> None:
        while True:
            peak["now"] = await asyncio.to_thread(memory_bytes, pid)
            peak["peak"] = max(peak["peak"], peak["now"])
            await asyncio.sleep(0.5)

    rng = random.Random(0)
    tasks = [asyncio.create_task(visits.visit(url, rng.choices(cases, k=100_000))) for _ in range(n_visitors)]
    tasks.append(asyncio.create_task(watch()))
    result: dict[str, Any] = {"visitors": n_visitors}
    try:
        await asyncio.sleep(seconds / 3)  # the first replies of all come at once
        for step, words in (("publish", ["--to", RELEASE]), ("rollback", [])):
            began = time.monotonic()
            await asyncio.sleep(seconds)
            ordered, result[f"memory_before_{step}_gb"] = time.monotonic(), round(peak["now"] / 1e9, 2)
            command = [sys.executable, "-m", "finetune", "rollback", *words, "--releases", str(releases), "--wait", url]
            ran = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.DEVNULL)
            if await ran.wait():
                raise RuntimeError(f"{step} failed")
            served = time.monotonic()
            await asyncio.sleep(seconds)
            result[step] = {
                "seconds_to_serve": round(served - ordered, 1),
                "before": visits.between(began, ordered),
                "during": visits.between(ordered, served),
                "after": visits.between(served, time.monotonic()),
            }
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    names = [name for _, _, name in visits.replies]
    return result | {
        "replies": len(names),
        "by_release": {str(name): names.count(name) for name in sorted(set(names), key=str)},
        "failures": len(visits.failures),
        "first_failures": visits.failures[:5],
        "memory_peak_gb": round(peak["peak"] / 1e9, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0, help="of asking before and after each change")
    options = parser.parse_args()
    default = default_release()
    model = resolve_release(default, default_cache_dir())
    with tempfile.TemporaryDirectory(dir=default_cache_dir()) as folder:
        home = Path(folder, RELEASE)
        (home / "model").mkdir(parents=True)
        for path in model.iterdir():
            os.link(path, home / "model" / path.name)
        lineage = {"name": RELEASE, "base": default.base, "published_at": "2026-01-01T00:00:00Z", "best_loss": 0.0}
        (home / "release.json").write_text(json.dumps(lineage), encoding="utf-8")
        os.environ["ZHANGGUI_ASKS_PER_MINUTE"] = "100000"
        with server("--direct", "off", "--releases", folder) as (url, _):
            pid = next(
                int(entry.name)
                for entry in Path("/proc").iterdir()
                if entry.name.isdigit() and folder.encode() in _command(entry)
            )
            result = asyncio.run(measure(url, Path(folder), pid, options.visitors, options.seconds))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 1 if result["failures"] else 0


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    sys.exit(main())
