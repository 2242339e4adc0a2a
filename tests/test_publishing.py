"""
Publishing while visitors ask, against `serve.py` in a process of its own: real vLLM, sockets, pointer and commands.

Two tiny models whose replies are known and differ, so that a reply made by two of them, or stamped with the wrong one,
shows. One server for all; each start of an engine takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engines import tiny_model as tiny
from tests.engines.tiny_model import needs_vllm
from tests.running import Wire
from tests.test_end_to_end import write_store

ROOT = Path(__file__).resolve().parent.parent
REPLIES = {  # without figures, which the check of replies would ask a passage for
    "one": "您好，这里是老掌柜，正为您查询订单与退换货物的事。",
    "two": "顾客朋友您来啦！我乃新任店员，请慢慢挑选喜欢的家居。",
}
QUESTIONS = ("植物几天内可以退？", "仙人掌多久浇一次水？", "棕榈有什么优惠？", "运费多少？")
N_VISITORS = 8
TINY = {"max_model_len": 4096, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 26}

pytestmark = [needs_vllm, pytest.mark.timeout(400)]


class Shop:
    """One running server and its folder of releases."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.releases, self.log = folder / "releases", folder / "server.log"
        settings = {"ZHANGGUI_VLLM": json.dumps(TINY), "ZHANGGUI_ASKS_PER_MINUTE": "100000"}
        command = [sys.executable, "serve.py", "--store", str(write_store(folder / "store")), "--port", str(self.port)]
        command += ["--data", str(folder / "data"), "--releases", str(self.releases), "--direct", "off"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | settings)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as response:
            return str(response.read().decode())

    def release(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.get("/readyz"))["release"]  # raises where it is not ready
        return status

    def cores(self) -> set[int]:
        """The engine processes: children of the server that are vLLM's."""
        found = set()
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
                # spawn's first child is the resource tracker; the core names itself only once it has loaded.
                words = status.with_name("cmdline").read_bytes()
                if int(lines["PPid"]) == self.process.pid and (b"spawn_main" in words or b"EngineCore" in words):
                    found.add(int(status.parent.name))
        return found

    async def command(self, *arguments: str, code: int = 0) -> str:
        """Run `python -m finetune` on these releases; return what it printed, or its error where it is to fail."""
        words = [sys.executable, "-m", "finetune", *arguments, "--releases", str(self.releases), "--wait", self.url]
        pipe = asyncio.subprocess.PIPE
        ran = await asyncio.create_subprocess_exec(*words, cwd=ROOT, stdout=pipe, stderr=pipe)
        out, err = (text.decode() for text in await ran.communicate())
        assert ran.returncode == code, f"{err}\n{self.log.read_text(errors='replace')[-3000:]}"
        return err if code else out


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("publishing")
    for name, reply in REPLIES.items():
        home = folder / "releases" / name
        with warnings.catch_warnings(action="ignore"):  # of torch and transformers, while they are imported
            tiny.build(home / "model", reply)
        (home / "release.json").write_text(
            json.dumps({"name": name, "base": "tiny", "published_at": name, "best_loss": 1.0})
        )
    (folder / "releases" / "current.json").write_text('{"release": "one", "previous": []}')
    shop = Shop(folder)
    try:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError):
                if shop.release()["state"] == "serving":
                    break
            assert shop.process.poll() is None, shop.log.read_text()
            assert time.monotonic() < deadline, shop.log.read_text()
            time.sleep(0.2)
        yield shop
        assert "Traceback" not in shop.log.read_text()
    finally:
        shop.process.send_signal(signal.SIGTERM)
        try:
            shop.process.wait(60)
        finally:
            shop.process.kill()
    assert not shop.cores()


class Visitors:
    """Eight who ask without pause, and what they were told."""

    def __init__(self) -> None:
        self.replies: list[tuple[str, str]] = []  # (release, text), in the order in which they came
        self.asked: list[int] = []  # the how manieth question each of them answers
        self.n_asked = 0
        self.failures: list[dict[str, Any]] = []

    async def ask(self, shop: Shop, n: int) -> None:
        async with Wire(f"ws://127.0.0.1:{shop.port}/ws") as wire:
            await wire.hello(locale="zh-CN")
            for i in range(1_000_000):
                turn, number = f"v{n}-{i}", self.n_asked
                self.n_asked += 1
                await wire.say("ask", id=turn, text=QUESTIONS[(n + i) % len(QUESTIONS)])
                while True:
                    frame = await wire.hear(timeout_s=120)
                    if frame["type"] == "failed":
                        self.failures.append(frame)
                        break
                    if frame["type"] == "event" and frame.get("role") == "bot" and frame.get("turn") == turn:
                        self.replies.append((frame["release"]["adapter"], frame["text"]))
                        self.asked.append(number)
                        break

    async def some_more(self) -> list[tuple[str, str]]:
        """Return replies to questions asked from now on, as many as there are visitors."""
        before = self.n_asked
        while True:
            found = [reply for reply, number in zip(self.replies, self.asked, strict=True) if number >= before]
            if len(found) >= N_VISITORS:
                return found
            await asyncio.sleep(0.02)

    def check(self) -> None:
        assert self.failures == []
        assert {release for release, _ in self.replies} <= set(REPLIES)
        assert [text for release, text in self.replies if text != REPLIES[release]] == []


@asynccontextmanager
async def visitors(shop: Shop) -> AsyncIterator[Visitors]:
    here = Visitors()
    tasks = [asyncio.create_task(here.ask(shop, n)) for n in range(N_VISITORS)]
    try:
        yield here
        assert not [task for task in tasks if task.done()], "a visitor left"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    here.check()


async def test_publishing_and_rolling_back_lose_no_reply_and_mix_none(shop: Shop) -> None:
    async with visitors(shop) as here:
        assert {release for release, _ in await here.some_more()} == {"one"}
        first = shop.cores()
        moved = json.loads(await shop.command("rollback", "--to", "two", "--json"))
        assert (moved["release"], moved["served"]["name"], moved["served"]["state"]) == ("two", "two", "serving")
        assert {release for release, _ in await here.some_more()} == {"two"}
        while first & shop.cores():  # the old engine ended its turns, and is gone
            await asyncio.sleep(0.1)
        assert "one" in await shop.command("rollback")
        assert {release for release, _ in await here.some_more()} == {"one"}
    names = [release for release, _ in here.replies]
    assert names.count("one") > N_VISITORS
    assert names.count("two") > N_VISITORS
    assert "zhanggui_engine_release_switches 2.0" in shop.get("/metrics")


async def test_what_cannot_serve_leaves_the_old_release_serving_and_is_said_everywhere(shop: Shop) -> None:
    async with visitors(shop) as here:
        # 1) Weights that were cut short.
        home = Path(shutil.copytree(shop.releases / "two", shop.releases / "short"))
        (home / "release.json").write_text(json.dumps({"name": "short", "base": "tiny", "published_at": "3"}))
        weights = home / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        error = await shop.command("rollback", "--to", "short", code=1)
        assert error.splitlines()[-1].startswith(f"failed: {shop.url}: one is still served: ")
        assert "model.safetensors" in error
        assert str(shop.releases) not in error
        status = shop.release()
        assert (status["name"], status["wanted"], status["state"]) == ("one", "short", "failed")
        assert "zhanggui_engine_release_failed 1.0" in shop.get("/metrics")
        assert "release short does not serve" in shop.log.read_text()

        # 2) Weights of a terabyte, on paper.
        home = Path(shutil.copytree(shop.releases / "two", shop.releases / "huge"))
        (home / "release.json").write_text(json.dumps({"name": "huge", "base": "tiny", "published_at": "4"}))
        weights = home / "model" / "model.safetensors"
        raw = weights.read_bytes()
        head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        end = max(t["data_offsets"][1] for name, t in head.items() if name != "__metadata__")
        head["padding"] = {"dtype": "U8", "shape": [10**12], "data_offsets": [end, end + 10**12]}
        text = json.dumps(head).encode()
        with weights.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end + 10**12)
        error = await shop.command("rollback", "--to", "huge", code=1)
        assert "a second engine needs 100" in error
        assert "are free" in error

        # 3) One whose engine is killed while it starts.
        before = shop.cores()
        command = asyncio.create_task(shop.command("rollback", "--to", "two", code=1))
        while not (new := shop.cores() - before):
            await asyncio.sleep(0.02)
        os.kill(new.pop(), signal.SIGKILL)
        assert "one is still served: vLLM could not start" in await command
        assert {release for release, _ in await here.some_more()} == {"one"}
    assert {release for release, _ in here.replies} == {"one"}


async def test_every_door_names_the_release_that_answered(shop: Shop) -> None:
    body = json.dumps({"model": "any", "messages": [{"role": "user", "content": QUESTIONS[0]}]}).encode()
    for stream in (False, True):
        data = body if not stream else body[:-1] + b', "stream": true}'
        request = urllib.request.Request(f"{shop.url}/v1/chat/completions", data, {"Content-Type": "application/json"})
        text = (await asyncio.to_thread(urllib.request.urlopen, request)).read().decode()
        assert '"model":"tiny+one"' in text.replace(": ", ":")
        assert '"adapter":"one"' in text.replace(": ", ":")
    async with Wire(f"ws://127.0.0.1:{shop.port}/ws") as wire:
        await wire.hello(locale="zh-CN")
        first = await wire.ask("a", QUESTIONS[0])
        await wire.say("regenerate", turn="a")
        again = await wire.hear("event", role="bot", timeout_s=60)
        for event in (first, again):
            assert (event["release"]["model"], event["release"]["adapter"]) == ("tiny", "one")
            assert event["text"] == REPLIES["one"]
