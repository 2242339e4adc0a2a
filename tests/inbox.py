"""An agent as tests need one: signed in over HTTP, seated on the socket."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any, Self

import httpx
from websockets.asyncio.client import connect as open_socket
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin, Subprotocol

from bot.agents.people import Agent, Role
from tests.running import Frame, Running, Wire

PASSWORD = "correct horse battery"


async def add_agent(server: Running, login: str, role: Role = "agent", name: str = "") -> Agent:
    """Make an account in the server's database."""
    assert server.parts.desk is not None
    return await server.parts.desk.accounts.add(login, name or login.capitalize(), role, PASSWORD)


class Browser:
    """An agent's browser: a cookie jar, the CSRF token of its session, and an Origin."""

    def __init__(self, server: Running, login: str, password: str = PASSWORD) -> None:
        self.server, self.login, self.password = server, login, password
        self.csrf = ""
        self.http = httpx.AsyncClient(base_url=server.http_url, trust_env=False, headers={"Origin": server.http_url})

    async def __aenter__(self) -> Self:
        answer = await self.http.post("/api/session", json={"login": self.login, "password": self.password})
        assert answer.status_code == 200, answer.text
        self.csrf = answer.json()["csrf"]
        self.agent: dict[str, Any] = answer.json()["agent"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def get(self, path: str, **params: Any) -> Any:
        answer = await self.http.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def send(self, method: str, path: str, body: Any = None, expect: int = 200) -> Any:
        """Make a change; return the JSON of the answer, or None of an empty one."""
        headers = {"X-CSRF-Token": self.csrf}
        answer = await self.http.request(method, path, json={} if body is None else body, headers=headers)
        assert answer.status_code == expect, (answer.status_code, answer.text)
        return answer.json() if answer.content else None

    def seat(self) -> Seat:
        """Return this browser's socket, not open yet."""
        cookie = "; ".join(f"{name}={value}" for name, value in self.http.cookies.items())
        return Seat(self.server, cookie)


class Seat(Wire):
    """An agent's socket: says hello by itself, keeps all it hears."""

    def __init__(self, server: Running, cookie: str, origin: str | None = None) -> None:
        super().__init__(f"ws://127.0.0.1:{server.port}/ws/agent", subprotocol="zhanggui.agent.v1")
        self.cookie = cookie
        self.origin = server.http_url if origin is None else origin or None
        self.welcome: Frame = {}

    async def __aenter__(self) -> Self:
        self.socket = await open_socket(
            self.url,
            origin=Origin(self.origin) if self.origin else None,
            subprotocols=[Subprotocol("zhanggui.agent.v1")],
            additional_headers={"Cookie": self.cookie} if self.cookie else {},
            compression=None,
            proxy=None,
            close_timeout=2.0,
        )
        with suppress(ConnectionClosed):  # refused: what it was told is read all the same
            await self.say("hello", protocol=1)
        self.welcome = await self.hear()
        return self

    async def hear(self, type_: str | None = None, timeout_s: float = 30.0, **fields: Any) -> Frame:
        async with asyncio.timeout(timeout_s):
            while True:
                frame: Frame = json.loads(await self.socket.recv())
                self.heard.append(frame)
                if type_ in (None, frame["type"]) and fields.items() <= frame.items():
                    return frame

    async def card(self, conversation: str, **fields: Any) -> Frame:
        """Return the next card of a conversation with these fields."""
        while True:
            card: Frame = (await self.hear("card"))["conversation"]
            if card["id"] == conversation and fields.items() <= card.items():
                return card

    async def do(self, type_: str, conversation: str, **fields: Any) -> Frame:
        """Act, and return `done` or `failed`."""
        id_ = f"{type_}-{len(self.heard)}"
        await self.say(type_, conversation=conversation, id=id_, **fields)
        while True:
            frame = await self.hear()
            if frame["type"] in ("done", "failed") and frame.get("id") == id_:
                return frame

    async def tell(self, conversation: str, id_: str, text: str) -> Frame:
        """Say something to the visitor; return the ack or the failure."""
        await self.say("say", conversation=conversation, id=id_, text=text)
        while True:
            frame = await self.hear()
            if frame["type"] in ("ack", "failed") and frame.get("id") == id_:
                return frame
