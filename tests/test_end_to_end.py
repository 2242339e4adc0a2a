"""
The commands a person types, against `serve.py` in a process of its own: real files, index, SQLite, sockets, vLLM.

One server without an engine on a small store, one with the 135M model served by vLLM.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

FAQS = """id,question,answer,lang,questions,tags,valid_from,valid_until
fee-en,How much is delivery?,"Delivery costs ¥7, and it is free from ¥88.",en,shipping fee|delivery cost|what do you charge for postage,,,
fee-zh,运费多少？,运费¥7，满¥88包邮。,zh,邮费怎么算|多少钱包邮,,,
return-en,How long can I return a plant?,Plants can be returned within 10 days.,en,return period|can I send it back|how many days to return,,,
return-zh,植物几天内可以退？,植物10天内可以退货。,zh,退货期限|能退吗,,,
water-en,How often do I water a cactus?,Water a cactus every 14 days.,en,cactus watering|watering a cactus,,,
water-zh,仙人掌多久浇一次水？,仙人掌每14天浇一次水。,zh,仙人掌浇水|多长时间浇仙人掌,,,
"""
PROMOTIONS = """id,title,description,code,starts_at,ends_at,lang,products,conditions
old-en,Fern Week,Ferns 30% off.,FERN30,2020-01-01T00:00:00,2020-01-08T00:00:00,en,ferns,
now-en,Palm Days,Palms 20% off.,PALM20,2020-01-01T00:00:00,2120-01-01T00:00:00,en,palms,
now-zh,棕榈节,棕榈8折。,PALM20,2020-01-01T00:00:00,2120-01-01T00:00:00,zh,palms,
"""


def write_store(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store.toml").write_text(
        'name = "Leafy 绿叶"\nlanguages = ["en", "zh"]\ntimezone = "Asia/Shanghai"\ncurrency = "CNY"\n',
        encoding="utf-8",
    )
    (folder / "faqs.csv").write_text(FAQS, encoding="utf-8")
    (folder / "promotions.csv").write_text(PROMOTIONS, encoding="utf-8")
    return folder


class Served:
    """One `serve.py`, over restarts on one port and one data folder."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.arguments = folder, arguments
        self.store = write_store(folder / "store")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read().decode()

    def up(self, *, wait_s: float) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *[sys.executable, "serve.py", "--store", str(self.store), "--port", str(self.port)],
                    *["--data", str(self.folder / "data"), *self.arguments],
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        until(lambda: self.answers("/healthz"), 60, self)
        until(lambda: self.answers("/readyz"), wait_s, self)

    def answers(self, path: str) -> bool:
        try:
            return self.get(path)[0] == 200
        except OSError:
            return False

    def down(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def log(self) -> str:
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")


def until(true: Callable[[], bool], seconds: float, served: Served) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert served.process is not None
        assert served.process.poll() is None, served.log()[-3000:]
        assert time.monotonic() < end, served.log()[-3000:]
        time.sleep(0.1)


def run(*command: str, code: int = 0) -> Any:
    """Run one of our commands and return its one JSON document."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


@contextmanager
def serving(folder: Path, *arguments: str, wait_s: float) -> Iterator[Served]:
    served = Served(folder, *arguments)
    served.up(wait_s=wait_s)
    try:
        yield served
    finally:
        if served.process is not None and served.process.poll() is None:
            served.down()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("quick"), "--engine", "none", wait_s=60) as served:
        yield served


@pytest.mark.timeout(120)
class TestWithoutAnEngine:
    def test_neither_torch_nor_vllm_is_loaded(self, quick: Served) -> None:
        assert quick.process is not None
        maps = Path(f"/proc/{quick.process.pid}/maps").read_text(encoding="utf-8")
        assert "faiss" in maps
        assert not re.search(r"libtorch|/vllm/|/transformers/", maps)

    def test_questions_in_both_languages_are_answered_in_their_language(self, quick: Served) -> None:
        events = run("bot", "ask", "--url", quick.ws, "how much do you charge for delivery", "邮费要多少钱", "--json")
        assert ["¥88" in e["text"] for e in events] == [True, True]
        assert [e["outcome"] for e in events] == ["direct", "direct"]
        assert events[0]["citations"][0]["source"].startswith("faqs.csv")
        assert events[0]["release"]["model"] == "none"
        assert "运费" in events[1]["text"]

    def test_a_follow_up_and_an_unknown_thing(self, quick: Served) -> None:
        events = run("bot", "ask", "--url", quick.ws, "What is your favourite football team?", "--json")
        assert events[0]["outcome"] == "no_answer"

    def test_only_promotions_that_are_on_are_told(self, quick: Served) -> None:
        (event,) = run("bot", "ask", "--url", quick.ws, "What promotions are on today?", "--json")
        assert "PALM20" in event["text"]
        assert "FERN30" not in event["text"]

    def test_cases_and_load_runs_print_their_figures(self, quick: Served, tmp_path: Path) -> None:
        cases = tmp_path / "cases.jsonl"
        lines = [
            {
                "id": "a",
                "lang": "en",
                "turns": ["what is the shipping fee?"],
                "must_include": [["¥7"]],
                "expect": "answer",
            },
            {"id": "b", "lang": "zh", "turns": ["转人工"], "expect": "handoff"},
            {"id": "c", "lang": "en", "turns": ["who won the world cup"], "expect": "no_answer"},
            {"id": "d", "lang": "en", "turns": ["how often to water a cactus"], "must_include": [["never"]]},
        ]
        cases.write_text("\n".join(json.dumps(x, ensure_ascii=False) for x in lines), encoding="utf-8")
        result = run("bot", "eval", "--url", quick.ws, "--cases", str(cases), "--json")
        assert (result["n"], result["passed"]) == (4, 3)
        assert result["fact_accuracy"] == 0.5
        assert result["refusal_accuracy"] == 1.0
        assert [f["id"] for f in result["failures"]] == ["d"]
        assert result["e2e_ms_p50"] > 0

        questions = tmp_path / "q.txt"
        questions.write_text("shipping fee\n退货期限\n" * 4, encoding="utf-8")
        results = run(
            "bot", "bench", "--url", quick.ws, "--questions", str(questions), "--concurrency", "1,4", "--json"
        )
        assert [(r["completed"], r["failed"]) for r in results] == [(8, 0), (8, 0)]
        assert results[0]["median_ttft_ms"] > 0

    def test_bad_input_to_the_commands_is_one_line_and_status_2(self, quick: Served, tmp_path: Path) -> None:
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"id": "x"}\n', encoding="utf-8")
        error = run("bot", "eval", "--url", quick.ws, "--cases", str(bad), "--json", code=2)
        assert error.count("\n") == 1
        assert "line 1, turns" in error
        assert "Traceback" not in run("bot", "ask", "--url", "ws://127.0.0.1:9/ws", "hi", "--json", code=1)

    def test_a_changed_file_is_live_within_five_seconds_and_a_faulty_one_keeps_the_old(self, quick: Served) -> None:
        faqs = quick.store / "faqs.csv"

        def answer() -> str:
            return str(run("bot", "ask", "--url", quick.ws, "how much is delivery?", "--json")[0]["text"])

        version = json.loads(quick.get("/readyz")[1])["index"]["version"]
        faqs.write_text(FAQS.replace("¥7", "¥9"), encoding="utf-8")
        until(lambda: json.loads(quick.get("/readyz")[1])["index"]["version"] != version, 5, quick)
        assert "¥9" in answer()
        faqs.write_text(FAQS.replace("id,question", "nonsense"), encoding="utf-8")
        until(lambda: "fault" in quick.get("/readyz")[1], 5, quick)
        assert "¥9" in answer()
        faqs.write_text(FAQS, encoding="utf-8")
        until(lambda: "fault" not in quick.get("/readyz")[1], 5, quick)
        assert "¥7" in answer()
        assert "Traceback" not in quick.log()

    def test_the_other_doors_are_open(self, quick: Served) -> None:
        assert quick.get("/healthz")[0] == 200
        assert "zhanggui" in quick.get("/metrics")[1]
        assert "/v1/chat/completions" in quick.get("/openapi.json")[1]
        assert "<script" in quick.get("/")[1]
        assert "customElements" in quick.get("/widget.js")[1]

    def test_conversations_outlive_a_restart(self, quick: Served) -> None:
        run("bot", "ask", "--url", quick.ws, "shipping fee", "--json")
        assert quick.down() == 0
        quick.up(wait_s=30)
        assert run("bot", "ask", "--url", quick.ws, "shipping fee", "--json")[0]["outcome"] == "direct"


def test_a_wrong_store_ends_the_server_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "serve.py", "--store", str(tmp_path), "--engine", "none", "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "store.toml" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.timeout(600)
def test_vllm_answers_what_no_passage_answers_and_comes_back_after_its_death(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed (extra `cpu`)")
    # The direct path is off: every answer is generated by the 135M model from the passages.
    options = ("--engine", "vllm", "--model", "smollm2-135m-instruct", "--direct", "off")
    with serving(tmp_path, *options, wait_s=300) as served:
        (event,) = run("bot", "ask", "--url", served.ws, "How often do I water a cactus?", "--json")
        assert event["release"]["model"] == "smollm2-135m-instruct"
        assert event["outcome"] in ("generated", "no_answer")
        assert event["usage"]["output_tokens"] > 0

        # Eight at once, as visitors come.
        questions = tmp_path / "q.txt"
        questions.write_text("How much is delivery?\nHow often do I water a cactus?\n" * 4, encoding="utf-8")
        (result,) = run(
            "bot", "bench", "--url", served.ws, "--questions", str(questions), "--concurrency", "8", "--json"
        )
        assert (result["completed"], result["failed"]) == (8, 0)

        # The engine's process is killed: seen within 5 s, courtesies still answered, then it is back.
        assert served.process is not None
        cores = [pid for pid in children_of(served.process.pid) if "EngineCore" in name_of(pid)]
        assert cores
        os.kill(cores[0], signal.SIGKILL)
        until(lambda: served.get("/readyz")[0] == 503, 5, served)
        assert run("bot", "ask", "--url", served.ws, "hello", "--json")[0]["outcome"] == "direct"
        until(lambda: served.answers("/readyz"), 300, served)
        (event,) = run("bot", "ask", "--url", served.ws, "How often do I water a cactus?", "--json")
        assert event["usage"]["output_tokens"] > 0
        left = children_of(served.process.pid)
        assert served.down() == 0
        time.sleep(0.5)
        assert not [pid for pid in left if Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid)]
        # What vLLM's libraries tell each other is not for whoever watches the server.
        told = [line for line in served.log().splitlines() if re.search("nanobind|leaked|Warning|OMP|Loading", line)]
        assert told == []


def children_of(pid: int) -> list[int]:
    """Return the process ids of all descendants."""
    direct = [int(x) for f in Path(f"/proc/{pid}/task").glob("*/children") for x in f.read_text().split()]
    return direct + [grand for child in direct for grand in children_of(child)]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"
