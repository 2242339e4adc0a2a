"""The inbox over HTTP: signing in, what other sites cannot do, roles, canned replies, drafts that reach faqs.csv."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from bot.__main__ import main
from bot.agents.accounts import Accounts
from bot.agents.faq_file import FaqFile
from bot.agents.passwords import Passwords
from bot.agents.records import Records
from bot.errors import BadCredentials, RateLimited, StoreUnwritable
from bot.storage import Storage
from retrieval.load import load_store
from tests.inbox import PASSWORD, Browser, add_agent
from tests.running import Running, Wire, running_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


# Signing in


async def test_a_session_is_a_strict_cookie_that_ends_with_signing_out(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        async with httpx.AsyncClient(base_url=server.http_url, trust_env=False) as http:
            assert (await http.get("/api/session")).json()["error"]["code"] == "unauthorized"
            answer = await http.post("/api/session", json={"login": " LI ", "password": PASSWORD})
            cookie = answer.headers["set-cookie"].lower()
            assert cookie.startswith("zhanggui_session=")
            for flag in ("httponly", "samesite=strict", "path=/", "max-age=43200"):
                assert flag in cookie
            assert "secure" not in cookie  # plain http on this machine
            assert answer.headers["cache-control"] == "no-store"
            body = answer.json()
            assert (await http.get("/api/session")).json() == body
            assert (await http.delete("/api/session", headers={"X-CSRF-Token": body["csrf"]})).status_code == 204
            assert (await http.get("/api/session")).status_code == 401
        # Over TLS (as a proxy on this machine says) the cookie is bound to host and transport.
        async with httpx.AsyncClient(base_url=server.http_url, trust_env=False) as http:
            answer = await http.post(
                "/api/session",
                json={"login": "li", "password": PASSWORD},
                headers={"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.5"},
            )
            cookie = answer.headers["set-cookie"]
            assert cookie.startswith("__Host-zhanggui_session=")
            assert "Secure" in cookie


async def test_the_database_holds_neither_password_nor_session(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        async with Browser(server, "li") as browser:
            secret = next(iter(browser.http.cookies.values()))
    raw = b"".join(path.read_bytes() for path in database.parent.glob("log.db*"))
    assert b"$argon2id$" in raw
    assert PASSWORD.encode() not in raw
    assert secret.encode() not in raw


@pytest.mark.parametrize(
    ("login", "password"),
    [
        ("li", "wrong password"),
        ("nobody", PASSWORD),
        ("gone", PASSWORD),
        ("li", ""),
        ("li", "x" * 900),
        ("li' --", "x"),
    ],
)
async def test_a_wrong_login_a_wrong_password_and_a_disabled_account_are_told_apart_by_nobody(
    database: Path, login: str, password: str
) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        gone = await add_agent(server, "gone")
        assert server.parts.desk is not None
        await server.parts.desk.records.set_disabled(gone.id, True)
        async with httpx.AsyncClient(base_url=server.http_url, trust_env=False) as http:
            answer = await http.post("/api/session", json={"login": login, "password": password})
            assert (answer.status_code, answer.json()) == (
                401,
                {
                    "error": {
                        "code": "bad_credentials",
                        "message": "there is no such account, or its password is another",
                    }
                },
            )
            assert "set-cookie" not in answer.headers


async def test_an_unknown_login_takes_as_long_as_a_wrong_password(database: Path) -> None:
    storage = Storage(database)
    await storage.open()
    # Enough work for the hash to show beside everything else, not more.
    accounts = Accounts(Records(storage), passwords=Passwords(rounds=1, memory_kib=32 * 1024), failures_per_login=100)
    await accounts.add("li", "Li", "agent", PASSWORD)

    async def seconds(login: str) -> float:
        began = time.process_time()
        with pytest.raises(BadCredentials):
            await accounts.sign_in(login, "wrong password", "::1")
        return time.process_time() - began

    await seconds("nobody")  # makes the hash that nobody has
    known, unknown = [statistics.median([await seconds(login) for _ in range(3)]) for login in ("li", "nobody")]
    await storage.close()
    assert 0.5 < known / unknown < 2  # without the second hash it is a factor of hundreds


async def test_guessing_is_slowed_down_for_the_guesser_only(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        async with httpx.AsyncClient(base_url=server.http_url, trust_env=False) as http:
            for _ in range(10):
                assert (await http.post("/api/session", json={"login": "li", "password": "guess"})).status_code == 401
            for password in ("guess", PASSWORD):
                answer = await http.post("/api/session", json={"login": "li", "password": password})
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")
                assert int(answer.headers["retry-after"]) > 0
            elsewhere = {"X-Forwarded-For": "203.0.113.9"}
            answer = await http.post("/api/session", json={"login": "li", "password": PASSWORD}, headers=elsewhere)
            assert answer.status_code == 200


async def test_right_passwords_are_never_counted(database: Path) -> None:
    storage = Storage(database)
    await storage.open()
    accounts = Accounts(
        Records(storage), passwords=Passwords(rounds=1, memory_kib=64), failures_per_login=2, failures_per_address=2
    )
    await accounts.add("li", "Li", "agent", PASSWORD)
    for _ in range(5):
        await accounts.sign_in("li", PASSWORD, "::1")
    for _ in range(2):
        with pytest.raises(BadCredentials):
            await accounts.sign_in("li", "no", "::1")
    with pytest.raises(RateLimited):
        await accounts.sign_in("li", PASSWORD, "::1")
    await storage.close()


async def test_a_session_expires(database: Path) -> None:
    now = datetime(2026, 11, 22, tzinfo=UTC)
    storage = Storage(database)
    await storage.open()
    accounts = Accounts(
        Records(storage), passwords=Passwords(rounds=1, memory_kib=64), session_h=1.0, clock=lambda: now
    )
    await accounts.add("li", "Li", "agent", PASSWORD)
    token, session = await accounts.sign_in("li", PASSWORD, "::1")
    assert session.expires_at == now + timedelta(hours=1)
    assert await accounts.good([session.token_hash]) == {session.token_hash}
    now += timedelta(minutes=61)
    assert await accounts.good([session.token_hash]) == set()
    with pytest.raises(Exception, match="sign in"):
        await accounts.session(token)
    await storage.close()


async def test_a_new_password_ends_the_other_sessions(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        async with Browser(server, "li") as here, Browser(server, "li") as there:
            body = {"old": "not it", "new": "a longer password"}
            answer = await here.send("PUT", "/api/session/password", body, expect=401)
            assert answer["error"]["code"] == "bad_credentials"
            answer = await here.send("PUT", "/api/session/password", {"old": PASSWORD, "new": "short"}, expect=400)
            assert "10 characters" in answer["error"]["message"]
            await here.send("PUT", "/api/session/password", {**body, "old": PASSWORD}, expect=204)
            assert (await here.http.get("/api/session")).status_code == 200
            assert (await there.http.get("/api/session")).status_code == 401
        async with Browser(server, "li", "a longer password"):
            pass


# Other sites


async def test_a_change_needs_the_token_the_type_and_the_origin(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "boss", "merchant")
        async with Browser(server, "boss") as browser:
            body = {"shortcut": "hi", "zh": "您好", "en": "Hello"}
            good = {"X-CSRF-Token": browser.csrf}
            for headers, status, code in (
                ({}, 403, "csrf"),
                ({"X-CSRF-Token": "guess"}, 403, "csrf"),
                ({"X-CSRF-Token": "é"}, 403, "csrf"),
                ({**good, "Origin": "https://evil.example"}, 403, "origin"),
                ({**good, "Origin": f"{server.http_url}.evil.example"}, 403, "origin"),
            ):
                encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
                answer = await browser.http.post("/api/canned", json=body, headers=encoded)
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            answer = await browser.http.post(
                "/api/canned", content=json.dumps(body), headers={**good, "Content-Type": "text/plain"}
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (415, "bad_request")
            answer = await browser.http.post(
                "/api/session",
                json={"login": "boss", "password": PASSWORD},
                headers={"Origin": "https://evil.example"},
            )
            assert answer.status_code == 403
            assert (await browser.get("/api/canned"))["canned"] == []


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"login": 7, "password": "x"}', 400),
        (b'{"login": "\\ud800", "password": "x"}', 400),
        (b"\xff\xfe", 400),
        (b'{"login": "a"}', 400),
        (b" " * 70_000, 413),
    ],
)
async def test_a_body_that_is_none_is_refused_without_a_traceback(database: Path, raw: bytes, status: int) -> None:
    async with running_server(database, agents=True) as server, httpx.AsyncClient(trust_env=False) as http:
        url, headers = f"{server.http_url}/api/session", {"Content-Type": "application/json"}
        answer = await http.post(url, content=raw, headers=headers)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"code", "message"}


async def test_nothing_of_the_inbox_is_given_to_who_is_not_signed_in(database: Path) -> None:
    async with (
        running_server(database, agents=True) as server,
        httpx.AsyncClient(base_url=server.http_url, trust_env=False) as http,
    ):
        items = (await http.get("/openapi.json")).json()["paths"].items()
        paths = [(path, method) for path, item in items if path.startswith("/api/") for method in item]
        assert len(paths) >= 20
        for path, method in paths:
            if (path, method) != ("/api/session", "post"):
                answer = await http.request(method, path.replace("{id_}", "x"), json={})
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized"), (path, method)


async def test_agents_cannot_do_what_is_for_merchants(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "li")
        async with Browser(server, "li") as browser:
            for method, path in (
                ("POST", "/api/canned"),
                ("PUT", "/api/canned/x"),
                ("DELETE", "/api/canned/x"),
                ("PUT", "/api/drafts/x"),
                ("POST", "/api/drafts/x/approve"),
                ("POST", "/api/drafts/x/reject"),
            ):
                answer = await browser.send(method, path, expect=403)
                assert answer["error"]["code"] == "forbidden"


# Canned replies


async def test_canned_replies_are_kept_in_both_languages(database: Path) -> None:
    async with running_server(database, agents=True) as server:
        await add_agent(server, "boss", "merchant")
        await add_agent(server, "li")
        async with Browser(server, "boss") as boss, Browser(server, "li") as li:
            made = await boss.send("POST", "/api/canned", {"shortcut": "hi", "zh": "您好", "en": "Hello"}, 201)
            again = await boss.send("POST", "/api/canned", {"shortcut": "hi", "en": "Hey"}, 409)
            assert again["error"]["code"] == "conflict"
            for wrong in ({"shortcut": "h i", "en": "x"}, {"shortcut": "x"}, {"shortcut": "", "en": "x"}):
                assert (await boss.send("POST", "/api/canned", wrong, 400))["error"]["code"] == "bad_request"
            other = await boss.send("POST", "/api/canned", {"shortcut": "bye", "zh": "再见"}, 201)
            assert (await li.get("/api/canned"))["canned"] == [other, made]
            changed = await boss.send("PUT", f"/api/canned/{made['id']}", {"shortcut": "hello", "en": "Hello!"})
            assert (changed["id"], changed["shortcut"], changed["zh"]) == (made["id"], "hello", "")
            assert (await boss.send("PUT", f"/api/canned/{made['id']}", {"shortcut": "bye", "en": "x"}, 409))["error"]
            await boss.send("DELETE", f"/api/canned/{made['id']}", expect=204)
            await boss.send("DELETE", f"/api/canned/{made['id']}", expect=404)
            assert (await li.get("/api/canned"))["canned"] == [other]


# Drafts


def store_at(folder: Path, text: str = "id,question,answer,lang\nfaq-1,怎么发货？,次日发货。,zh\n") -> Path:
    folder.mkdir()
    (folder / "store.toml").write_text('name = "Demo"\n', encoding="utf-8")
    (folder / "faqs.csv").write_bytes(text.encode())
    return folder


async def answered_by_agent(server: Running, browser: Browser, question: str, answer: str) -> tuple[str, int, Wire]:
    """Return a conversation in which an agent answered, the number of that message, and the visitor's tab."""
    tab = await Wire(server.ws_url).__aenter__()
    conversation = (await tab.hello())["conversation"]
    await tab.say("handoff")
    await tab.hear("event", kind="state")
    async with browser.seat() as seat:
        await seat.do("accept", conversation)
        await tab.say("ask", id="q1", text=question)
        await tab.hear("ack")
        seq = (await seat.tell(conversation, "m1", answer))["seq"]
    await tab.hear("event", role="agent")
    return conversation, seq, tab


async def test_an_approved_draft_is_a_row_of_faqs_csv_and_a_rejected_one_is_not(database: Path, tmp_path: Path) -> None:
    store = store_at(tmp_path / "store")
    before = (store / "faqs.csv").read_bytes()
    async with running_server(database, agents=True, store_dir=store) as server:
        await add_agent(server, "li")
        await add_agent(server, "boss", "merchant")
        async with Browser(server, "li") as li, Browser(server, "boss") as boss, boss.seat() as seat:
            conversation, seq, tab = await answered_by_agent(server, li, "可以刻字吗？", "可以，刻字加收10元。")
            draft = await li.send("POST", "/api/drafts", {"conversation": conversation, "seq": seq}, 201)
            assert (draft["question"], draft["answer"], draft["lang"], draft["status"], draft["source"]) == (
                *("可以刻字吗？", "可以，刻字加收10元。", "zh", "pending", "agent"),
            )
            assert (await seat.hear("draft"))["draft"] == draft
            assert await li.send("POST", "/api/drafts", {"conversation": conversation, "seq": seq}, 200) == draft
            refused = await li.send("POST", "/api/drafts", {"conversation": conversation, "seq": 1}, 400)
            assert refused["error"]["code"] == "bad_request"
            edited = await boss.send(
                "PUT",
                f"/api/drafts/{draft['id']}",
                {"question": "能刻字吗？", "answer": "可以，加10元。", "lang": "zh"},
            )
            assert edited["question"] == "能刻字吗？"
            assert (store / "faqs.csv").read_bytes() == before  # nothing before it is approved
            approved = await boss.send("POST", f"/api/drafts/{draft['id']}/approve", {"answer": "=可以，加收10元。"})
            assert (approved["status"], approved["decided_by"]["name"]) == ("approved", "Boss")
            again = await boss.send("POST", f"/api/drafts/{draft['id']}/approve", expect=409)
            assert again["error"]["code"] == "not_allowed"
            await boss.send("POST", f"/api/drafts/{draft['id']}/reject", expect=409)

            (passage,) = [p for p in load_store(store) if p.id == approved["faq_id"]]
            assert (passage.title, passage.text, passage.lang) == ("能刻字吗？", "可以，加收10元。", "zh")  # no formula
            assert (store / "faqs.csv").read_bytes().startswith(before)
            assert sorted(p.name for p in store.iterdir()) == ["faqs.csv", "store.toml"]

            # A visitor's thumb up proposes one as well.
            other, liked, tab2 = await answered_by_agent(server, li, "Do you gift-wrap?", "Yes, for free.")
            await tab2.say("rate", seq=liked, value="up")
            proposed = (await seat.hear("draft", timeout_s=10))["draft"]
            while proposed["conversation"] != other:
                proposed = (await seat.hear("draft", timeout_s=10))["draft"]
            assert (proposed["question"], proposed["lang"], proposed["source"], proposed["created_by"]) == (
                *("Do you gift-wrap?", "en", "rating", None),
            )
            assert [d["id"] for d in (await boss.get("/api/drafts", status="pending"))["drafts"]] == [proposed["id"]]
            rejected = await boss.send("POST", f"/api/drafts/{proposed['id']}/reject")
            assert rejected["status"] == "rejected"
            assert len(load_store(store)) == 2
            for each in (tab, tab2):
                await each.socket.close()


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("utf-8", "id,question,answer,lang\nf,问,答,zh\n".encode()),
        ("bom", "id,question,answer\r\nf,问,答\r\n".encode("utf-8-sig")),
        ("gb18030 with semicolons", "ID;Question;Answer;lang\r\nf;问题;答案;zh".encode("gb18030")),
        ("utf-16", "question\tanswer\tid\tlang\nq\ta\tf\ten\n".encode("utf-16")),
        ("missing", b""),
    ],
)
async def test_a_row_is_added_in_the_files_own_form(tmp_path: Path, name: str, raw: bytes) -> None:
    store = store_at(tmp_path / "store")
    (store / "faqs.csv").write_bytes(raw) if raw else (store / "faqs.csv").unlink()
    answer = '满99元，包邮; "顺丰"\n次日达'
    for _ in range(2):  # a second time adds nothing
        await FaqFile(store).append("agent-1-zh", "包邮吗？", answer, "zh")
    assert (store / "faqs.csv").read_bytes().startswith(raw)
    passages = {p.id: p for p in load_store(store)}
    assert len(passages) == (2 if raw else 1)
    assert (passages["agent-1-zh"].title, passages["agent-1-zh"].text) == ("包邮吗？", answer)


async def test_a_folder_that_cannot_be_written_is_said_and_the_draft_stays_pending(
    database: Path, tmp_path: Path
) -> None:
    store = store_at(tmp_path / "store")
    async with running_server(database, agents=True, store_dir=store) as server:
        await add_agent(server, "boss", "merchant")
        async with Browser(server, "boss") as boss:
            conversation, seq, tab = await answered_by_agent(server, boss, "Can it be engraved?", "Yes.")
            draft = await boss.send("POST", "/api/drafts", {"conversation": conversation, "seq": seq}, 201)
            (store / "faqs.csv").unlink()
            (store / "faqs.csv").mkdir()
            answer = await boss.send("POST", f"/api/drafts/{draft['id']}/approve", expect=503)
            assert answer["error"]["code"] == "store_unwritable"
            assert "faqs.csv" in answer["error"]["message"]
            (store / "faqs.csv").rmdir()
            approved = await boss.send("POST", f"/api/drafts/{draft['id']}/approve")
            with (store / "faqs.csv").open(encoding="utf-8", newline="") as file:
                assert [row["id"] for row in csv.DictReader(file)] == [approved["faq_id"]]
            await tab.socket.close()


async def test_bytes_of_no_encoding_are_left_alone(tmp_path: Path) -> None:
    store = store_at(tmp_path / "store")
    (store / "faqs.csv").write_bytes(b"\xff\xff\xff\x80")
    with pytest.raises(StoreUnwritable):
        await FaqFile(store).append("agent-1-zh", "q", "a", "zh")
    assert (store / "faqs.csv").read_bytes() == b"\xff\xff\xff\x80"


# The command line


async def test_accounts_are_made_from_the_command_line_beside_a_running_server(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bot", "agents", *arguments, "--data", str(tmp_path)]
        return subprocess.run(
            command, input=f"{PASSWORD}\n", capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
        )

    async with running_server(tmp_path / "conversations.sqlite3", agents=True) as server:
        made = await asyncio.to_thread(run, "add", "boss", "--role", "merchant", "--name", "老板")
        assert (made.returncode, made.stderr) == (0, "")
        assert PASSWORD not in made.stdout
        async with Browser(server, "boss") as browser:
            assert (browser.agent["name"], browser.agent["role"]) == ("老板", "merchant")
            assert (await asyncio.to_thread(run, "disable", "boss")).returncode == 0
            assert (await browser.http.get("/api/session")).status_code == 401


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
    [
        (["add", "boss"], f"{PASSWORD}\n", "'boss' already"),
        (["add", "li"], "short\n", "10 characters"),
        (["add", "li"], "", "no password on stdin"),
        (["add", "L i"], f"{PASSWORD}\n", "a login has"),
        (["password", "nobody"], f"{PASSWORD}\n", "no account 'nobody'"),
        (["disable", "nobody"], "", "no account 'nobody'"),
    ],
)
def test_bad_input_on_the_command_line_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    stdin: str,
    words: str,
) -> None:
    def run(given: list[str], typed: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return main(["agents", *given, "--data", str(tmp_path)])

    assert run(["add", "boss", "--role", "merchant"], f"{PASSWORD}\n") == 0
    capsys.readouterr()
    assert run(arguments, stdin) == 2
    errors = capsys.readouterr().err
    assert (errors.count("\n"), words in errors) == (1, True)
    assert run(["list", "--json"], "") == 0
    assert [a["login"] for a in json.loads(capsys.readouterr().out)] == ["boss"]
