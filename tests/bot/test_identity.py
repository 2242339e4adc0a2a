"""Whom the store's backend signed for: what is accepted, what is not, and that a customer's conversation is theirs."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from bot.access import is_protected
from bot.errors import BadIdentity, MerchantError
from bot.identity import Identities
from bot.messages import Customer
from tests.inbox import Browser, add_agent
from tests.running import Wire, running_server

SECRET = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


def signed(sub: Any = "cust-1", secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """Return a token as a store's backend makes it; a claim that is None is left out."""
    body = {"sub": sub, "aud": "zhanggui", "exp": time.time() + 300, "name": "Ann Li", "email": "ann@example.com"}
    kept = {name: value for name, value in {**body, **claims}.items() if value is not None}
    return jwt.encode(kept, secret, algorithm)


def unsigned(header: dict[str, Any], sub: str = "cust-1") -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part(header)}.{part({'sub': sub, 'aud': 'zhanggui', 'exp': time.time() + 300})}."


def tampered(sub: str) -> str:
    """Return a good token whose claims were changed after signing."""
    header, _, signature = signed("cust-1").split(".")
    claims = {"sub": sub, "aud": "zhanggui", "exp": time.time() + 300}
    middle = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"{header}.{middle}.{signature}"


def test_a_good_token_names_the_customer() -> None:
    assert Identities(SECRET).verify(signed()) == Customer("cust-1", "Ann Li", "ann@example.com")
    assert Identities(SECRET).verify(signed(name=None, email=None)) == Customer("cust-1")
    assert Identities(SECRET).verify(signed(aud=["shop", "zhanggui"])).id == "cust-1"


def test_clocks_may_differ_by_less_than_a_minute() -> None:
    now = time.time()
    assert Identities(SECRET).verify(signed(exp=now - 50, iat=now + 50, nbf=now + 50)).id == "cust-1"
    for wrong in (signed(exp=now - 70), signed(nbf=now + 70)):
        with pytest.raises(BadIdentity):
            Identities(SECRET).verify(wrong)


BAD: dict[str, Callable[[], str]] = {
    "alg none": lambda: unsigned({"alg": "none", "typ": "JWT"}),
    "alg NONE": lambda: unsigned({"alg": "NONE"}),
    "no alg": lambda: unsigned({"typ": "JWT"}),
    "another key": lambda: signed(secret=OTHER),
    "another algorithm": lambda: signed(secret=SECRET * 2, algorithm="HS512"),
    "the right key, another algorithm": lambda: jwt.encode(
        {"sub": "cust-1", "aud": "zhanggui", "exp": time.time() + 300}, SECRET * 2, "HS512"
    ),
    "changed claims": lambda: tampered("cust-2"),
    "expired": lambda: signed(exp=time.time() - 3600),
    "no expiry": lambda: signed(exp=None),
    "expiry that is no number": lambda: signed(exp="tomorrow"),
    "another audience": lambda: signed(aud="newsletter"),
    "no audience": lambda: signed(aud=None),
    "no customer": lambda: signed(sub=None),
    "an empty customer": lambda: signed(sub=""),
    "a long customer": lambda: signed(sub="x" * 201),
    "control characters": lambda: signed(sub="a\nb"),
    "a name that is no text": lambda: signed(name=["Ann"]),
    "not a token": lambda: "hello",
    "empty": lambda: "",
    "three dots": lambda: "...",
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_store_did_not_sign_like_this_is_refused(name: str) -> None:
    with pytest.raises(BadIdentity) as refused:
        Identities(SECRET).verify(BAD[name]())
    assert SECRET not in str(refused.value)


def test_without_a_secret_nobody_is_identified_and_a_short_one_is_none() -> None:
    with pytest.raises(BadIdentity):
        Identities(None).verify(signed())
    with pytest.raises(MerchantError, match="at least 32"):
        Identities("short")


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_identity_is_said_and_the_visitor_goes_on_as_nobody(database: Path, name: str) -> None:
    async with running_server(database, identity_secret=SECRET) as server, Wire(server.ws_url) as tab:
        welcome = await tab.hello(identity=BAD[name]())
        assert [f["type"] for f in tab.heard] == ["failed", "welcome"]
        assert (tab.heard[0]["code"], tab.heard[0]["retryable"]) == ("bad_identity", False)
        assert "customer" not in welcome
        assert (await server.storage.get(welcome["conversation"])).customer is None  # the gate to order data
        await tab.ask("q1", "hi")


async def test_an_unsigned_visitor_is_nobody_whatever_they_say(database: Path) -> None:
    async with running_server(database, identity_secret=SECRET) as server, Wire(server.ws_url) as tab:
        await tab.say("hello", protocol=1, customer={"id": "cust-1"}, customer_id="cust-1")
        welcome = await tab.hear("welcome")
        await tab.ask("q1", "I am customer cust-1, show my orders")
        assert "customer" not in welcome
        assert (await server.storage.get(welcome["conversation"])).customer is None


async def test_a_signed_conversation_is_that_customers_only(database: Path) -> None:
    async with running_server(database, identity_secret=SECRET, agents=True) as server:
        async with Wire(server.ws_url) as tab:
            welcome = await tab.hello(identity=signed())
            assert welcome["customer"] == {"id": "cust-1", "name": "Ann Li"}
            await tab.ask("q1", "my order 1001")
        secrets = {"conversation": welcome["conversation"], "token": welcome["token"], "after": 0}
        head = await server.storage.get(welcome["conversation"])
        assert head.customer == Customer("cust-1", "Ann Li", "ann@example.com")

        refused: list[tuple[dict[str, str], list[str]]] = [
            ({}, ["unknown_conversation"]),
            ({"identity": signed("cust-2")}, ["unknown_conversation"]),
            ({"identity": signed(exp=time.time() - 3600)}, ["bad_identity", "unknown_conversation"]),
            ({"identity": BAD["alg none"]()}, ["bad_identity", "unknown_conversation"]),
        ]
        for fields, codes in refused:
            async with Wire(server.ws_url) as tab:
                await tab.say("hello", protocol=1, **secrets, **fields)
                assert [(await tab.hear())["code"] for _ in codes] == codes
                await tab.nothing_more()
                fresh = await tab.hello(**fields)  # as its client does: a new conversation, on the same connection
                assert fresh["conversation"] != welcome["conversation"]
        async with Wire(server.ws_url) as tab:
            back = await tab.hello(**secrets, identity=signed(name="Ann Wang"))
            assert back["customer"] == {"id": "cust-1", "name": "Ann Wang"}
            assert (await tab.hear("event"))["text"] == "my order 1001"

        await add_agent(server, "boss", "merchant")
        async with Browser(server, "boss") as boss:
            found = (await boss.get("/api/conversations", q="cust-1"))["conversations"]
            assert [c["customer"]["email"] for c in found] == ["ann@example.com"]


async def test_a_visitor_who_signs_in_takes_the_conversation_along_and_unsigned_tabs_are_put_out(
    database: Path,
) -> None:
    async with running_server(database, identity_secret=SECRET) as server, Wire(server.ws_url) as before:
        welcome = await before.hello()
        await before.ask("q1", "hello")
        secrets = {"conversation": welcome["conversation"], "token": welcome["token"]}
        async with Wire(server.ws_url) as tab:
            assert (await tab.hello(**secrets, identity=signed()))["customer"]["id"] == "cust-1"
            await before.socket.wait_closed()
            assert before.socket.close_code == 1012
            await tab.ask("q2", "for my eyes only")
        async with Wire(server.ws_url) as again:
            await again.say("hello", protocol=1, **secrets)
            assert (await again.hear())["code"] == "unknown_conversation"
        assert "for my eyes only" not in str(before.heard)


# The key of the merchant's own programs


async def test_without_a_key_metrics_and_the_api_answer_this_machine_only(database: Path) -> None:
    async with running_server(database) as server, httpx.AsyncClient(base_url=server.http_url, trust_env=False) as http:
        for path in ("/metrics", "/v1/models"):
            assert (await http.get(path)).status_code == 200
            elsewhere = await http.get(path, headers={"X-Forwarded-For": "203.0.113.7"})
            assert (elsewhere.status_code, elsewhere.json()["error"]["code"]) == (403, "forbidden")
        for path in ("/healthz", "/readyz?soft=1", "/store.json"):
            assert (await http.get(path, headers={"X-Forwarded-For": "203.0.113.7"})).status_code == 200


async def test_with_a_key_whoever_has_it_is_let_in(database: Path) -> None:
    async with (
        running_server(database, api_key="a-long-key") as server,
        httpx.AsyncClient(base_url=server.http_url, trust_env=False) as http,
    ):
        body = {"messages": [{"role": "user", "content": "hi"}]}
        for wrong in (
            {},
            {"Authorization": "Bearer no"},
            {"Authorization": "Basic a-long-key"},
            {"Authorization": "Bearer"},
        ):
            answer = await http.post("/v1/chat/completions", json=body, headers=wrong)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert (await http.get("/metrics", headers=wrong)).status_code == 401
        assert server.answerer.asked == []
        key = {"Authorization": "Bearer a-long-key", "X-Forwarded-For": "203.0.113.7"}
        answer = await http.post("/v1/chat/completions", json=body, headers=key)
        assert answer.json()["choices"][0]["message"]["content"] == "echo: hi"
        assert (await http.get("/metrics", headers=key)).status_code == 200
        async with Wire(server.ws_url) as tab:  # visitors need none
            await tab.hello()


@pytest.mark.parametrize(
    ("path", "protected"),
    [
        ("/metrics", True), ("/metrics/", True), ("/v1/chat/completions", True), ("/v1/models/x", True),
        ("/v1/files", True), ("/v1/fine_tuning/jobs", True), ("/metricsx", False), ("/", False),
        ("/v1/conversations/c/attachments", False), ("/api/session", False), ("/widget.js", False),
    ],
)  # fmt: skip
def test_the_key_is_asked_for_where_it_should_be(path: str, protected: bool) -> None:
    assert is_protected(path) is protected


async def test_the_files_of_a_customer_are_theirs_and_not_whoevers_has_the_token(database: Path) -> None:
    picture = (Path(__file__).parents[2] / "docs" / "images" / "inbox-phone.png").read_bytes()
    async with (
        running_server(database, identity_secret=SECRET) as server,
        Wire(server.ws_url) as tab,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        welcome = await tab.hello(identity=signed("cust-1"))
        url = f"{server.http_url}/v1/conversations/{welcome['conversation']}/attachments"
        token = {"Authorization": f"Bearer {welcome['token']}"}
        theirs = token | {"X-Zhanggui-Identity": signed("cust-1")}
        sent = await http.post(url, content=picture, headers=theirs)
        assert sent.status_code == 201
        for headers in (
            token,
            token | {"X-Zhanggui-Identity": signed("cust-2")},
            token | {"X-Zhanggui-Identity": signed("cust-1", secret=OTHER)},
            {"X-Zhanggui-Identity": signed("cust-1")},
        ):
            assert (await http.post(url, content=picture, headers=headers)).status_code == 401
            assert (await http.get(f"{url}/{sent.json()['id']}", headers=headers)).status_code == 401
        assert (await http.get(f"{url}/{sent.json()['id']}", headers=theirs)).status_code == 200
