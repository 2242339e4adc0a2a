"""`publish` and `rollback` with --wait: what the command makes of what a server says on /readyz."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bot.errors import MerchantError
from finetune.__main__ import main
from finetune.waiting import NotServed, readyz_of, wait_until_served


def says(wanted: str | None, state: str, name: str | None = "one", detail: str = "", **more: Any) -> dict[str, Any]:
    status: dict[str, Any] = {
        "name": name,
        "wanted": wanted,
        "state": state,
        "detail": detail,
        "follows": True,
        "live": [],
    }
    return {"release": status | more}


class Readyz:
    """A server that says one thing after the other, the last one for ever."""

    def __init__(self) -> None:
        self.script: list[dict[str, Any]] = []
        self.asked: list[str] = []
        readyz = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                readyz.asked.append(self.path)
                body = readyz.script.pop(0) if len(readyz.script) > 1 else readyz.script[0]
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Readyz]:
    readyz = Readyz()
    thread = threading.Thread(target=readyz.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield readyz
    readyz.http.shutdown()
    thread.join()
    readyz.http.server_close()


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lineage = {"name": name, "published_at": name, "best_loss": 1.0}
        (tmp_path / name / "release.json").write_text(json.dumps(lineage))
    (tmp_path / "current.json").write_text(json.dumps({"release": "one", "previous": []}))
    return tmp_path


def rollback(releases: Path, url: str, *words: str) -> int:
    return main(["rollback", "--to", "two", "--releases", str(releases), "--wait", url, *words])


def test_it_ends_once_the_server_serves_the_release_and_says_how_far_it_was(
    server: Readyz, releases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [
        says("one", "serving"),
        says("two", "switching", detail="two: starting its engine"),
        says("two", "serving", name="two"),
    ]
    assert rollback(releases, server.url.replace("http", "ws") + "/ws", "--json") == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert (document["release"], document["served"]["name"], document["served"]["state"]) == ("two", "two", "serving")
    assert "switching: two: starting its engine" in printed.err
    assert server.asked == ["/readyz?soft=1"] * 3


def test_a_release_that_does_not_serve_ends_it_with_status_1_and_the_reason(
    server: Readyz, releases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [says("two", "switching"), says("two", "failed", detail="a second engine needs 9.0 GB")]
    assert rollback(releases, server.url, "--json") == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == f"failed: {server.url}: one is still served: a second engine needs 9.0 GB"
    assert json.loads(printed.out)["served"]["state"] == "failed"
    assert json.loads((releases / "current.json").read_text())["release"] == "two"  # published it is


def test_going_back_to_no_release_waits_for_the_shipped_one(
    server: Readyz, releases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [says("one", "serving"), says(None, "serving", name="shipped")]
    assert main(["rollback", "--releases", str(releases), "--wait", server.url]) == 0
    assert "none, so the shipped one (was one)" in capsys.readouterr().out


def test_a_server_that_follows_nothing_or_something_else_is_not_waited_for(server: Readyz) -> None:
    for body in ({"release": None}, says(None, "serving", follows=False)):
        server.script = [body]
        with pytest.raises(NotServed, match="follows no releases: start it with --engine vllm and without --model"):
            wait_until_served(server.url, "two")
    server.script = [says("one", "serving")]
    with pytest.raises(NotServed, match=r"follows one, not two: it has another folder of releases"):
        wait_until_served(server.url, "two", notice_s=0.1)
    server.script = [says("two", "switching", detail="two: starting its engine")]
    with pytest.raises(NotServed, match=r"not served after .* switching, two: starting its engine"):
        wait_until_served(server.url, "two", timeout_s=0.1)


def test_a_server_that_is_not_there_is_a_failure_and_no_address_changes_nothing(
    server: Readyz, releases: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotServed, match="the server cannot be asked"):
        wait_until_served("http://127.0.0.1:9", "two")
    server.script = [{"ready": True}]  # an older server
    with pytest.raises(NotServed, match="the server cannot be asked"):
        wait_until_served(server.url, "two")
    assert rollback(releases, "ftp://shop") == 2
    assert "is no address of a server" in capsys.readouterr().err
    assert json.loads((releases / "current.json").read_text())["release"] == "one"


@pytest.mark.parametrize(
    "url",
    ["shop.example:8000", "http://shop.example:8000/", "ws://shop.example:8000/ws", "http://shop.example:8000/readyz"],
)
def test_any_address_of_the_server_will_do(url: str) -> None:
    assert readyz_of(url) == "http://shop.example:8000/readyz?soft=1"
    with pytest.raises(MerchantError):
        readyz_of("http:///readyz")
