"""
A scripted chat server for the browser tests: the real pages of `bot/web`, a WebSocket that says what it is told.

What a question contains decides what happens (see `_SCRIPTS`). Conversations outlive connections and `restart`, as in
the real server. It runs in a thread of its own, so that a test can look at `frames` and pull the plug meanwhile.
Run it by hand to look at the page: `python tests/web/fake_server.py --port 8123`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "bot" / "web"
DEMO = ROOT / "examples" / "demo"

CSP = (  # that of bot/server.py: stricter than the widget needs
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}
RELEASE = {"model": "fake", "adapter": None, "prompt": "p1", "knowledge": "k1"}

HOSTILE = (
    '<script>window.pwned=1</script> <img src=x onerror="window.pwned=1"> '
    "[click](javascript:window.pwned=1) ![pic](http://evil.example/x.png) [bank](https://evil.example/login) "
    "<b>bold?</b> **real bold**"
)
RETURNS_ZH = (
    "可以的。签收后 **7 天内** 支持无理由退货，青禾 Plus 会员为 **30 天** [1]：\n\n"
    "1. 打开「我的订单」，选择要退的商品\n2. 打印退货标签，交给快递员\n3. 仓库收到后 3 个工作日内退款 [2]\n\n"
    "非质量问题需扣 ¥10 运费，会员每月一次免费。拆封的枕头和床垫因卫生原因不能退。"
)
RETURNS_EN = (
    "Yes. You can return anything within **7 days** of signing for it, or **30 days** as a Qinghe Plus member [1]:\n\n"
    "1. Open *My orders* and pick the item\n2. Print the label and hand the parcel to the courier\n"
    "3. We refund within 3 working days after it reaches the warehouse [2]\n\n"
    "Unless it is faulty, ¥10 return freight is deducted. See https://qinghe.example/returns for the details."
)
CITATIONS_ZH = [
    {
        "id": "r1",
        "title": "七天无理由退货",
        "source": "policies/returns.zh.md:3",
        "score": 0.93,
        "quote": "自签收之日起 7 天内，商品未使用、原包装及配件齐全，可无理由退货；青禾 Plus 会员为 30 天。",
    },
    {
        "id": "r2",
        "title": "退款时间",
        "source": "faqs.csv:41",
        "score": 0.81,
        "quote": "包裹到达仓库后 3 个工作日内退款，按原支付方式退回。",
    },
]
CITATIONS_EN = [
    {"id": "r1", "title": "Returns without a reason", "source": "policies/returns.en.md:3", "score": 0.93,
     "quote": "Everything can be returned within 7 days of signing; 30 days for Qinghe Plus members. Unused, "
     "in the original packing, accessories complete."},
    {"id": "r2", "title": "When the refund arrives", "source": "faqs.csv:42", "score": 0.81,
     "quote": "We refund within 3 working days after the parcel reaches the warehouse, the way you paid."},
]  # fmt: skip
CARDS = [
    {"kind": "product", "id": "QH1001", "title": "青禾 24cm 铸铁珐琅炖锅", "price": 399, "currency": "CNY",
     "url": "https://qinghe.example/p/QH1001", "image": "images/QH1001.svg", "stock": 42},
    {"kind": "product", "id": "QH1002", "title": "Qinghe 26 cm uncoated cast-iron skillet, pre-seasoned",
     "price": 169.5, "currency": "CNY", "url": "javascript:window.pwned=1", "image": "images/QH1002.svg", "stock": 3},
]  # fmt: skip


@dataclass
class Conversation:
    id: str
    token: str
    events: list[dict[str, Any]] = field(default_factory=list)
    acks: dict[str, int] = field(default_factory=dict)  # client id -> seq
    state: str = "bot"
    live: dict[str, tuple[int, str]] = field(default_factory=dict)  # turn -> (last index, text so far)
    stopped: set[str] = field(default_factory=set)
    sockets: set[ServerConnection] = field(default_factory=set)
    n_generated: int = 0

    def add(self, kind: str, **data: Any) -> dict[str, Any]:
        at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event = {"type": "event", "seq": len(self.events) + 1, "at": at, "kind": kind, **data}
        self.events.append(event)
        return event


class FakeServer:
    """`with FakeServer() as server:`; `server.url` is the page, `server.frames` all frames visitors sent."""

    def __init__(self, port: int = 0, *, store: dict[str, Any] | None = None) -> None:
        self.port = port
        self.store = demo_store() if store is None else store
        self.pages: dict[str, str] = {}  # path -> text, for pages of other shops
        self.frames: list[dict[str, Any]] = []
        self.conversations: dict[str, Conversation] = {}
        self.engine_phase = "ready"
        self.human: dict[str, Any] = {"open": True, "opens_at": None, "agents_online": True}  # of `welcome`
        self.delta_s = 0.02
        self.stepwise = False  # a reply waits for `step()` after each phase and each delta, whatever a page takes
        self._steps = asyncio.Semaphore(0)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        asyncio.run_coroutine_threadsafe(self._leave_nothing(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _leave_nothing(self) -> None:
        """End what waits for connections that a browser opened ahead of need and never used."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.02)  # closed transports say so in the next round

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def up(self) -> None:
        """Listen, on the same port as before."""

        async def start() -> None:
            self._server = await serve(
                self._socket,
                "127.0.0.1",
                self.port,
                process_request=self._http,
                subprotocols=["zhanggui.v1"],  # type: ignore[list-item]
                compression=None,
            )
            self.port = next(iter(self._server.sockets)).getsockname()[1]

        asyncio.run_coroutine_threadsafe(start(), self._loop).result(10)

    def down(self) -> None:
        """Stop as a killed process does: sockets cut, replies under way lost, stored events kept."""

        async def stop() -> None:
            for task in self._tasks:
                task.cancel()
            for conversation in self.conversations.values():
                conversation.live.clear()
                for socket in list(conversation.sockets):
                    socket.transport.abort()
                conversation.sockets.clear()
            if self._server is not None:
                self._server.close()
                await self._server.wait_closed()
                self._server = None

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)

    def sent(self, type_: str) -> list[dict[str, Any]]:
        return [frame for frame in self.frames if frame["type"] == type_]

    def wait_for(self, type_: str, n: int = 1, timeout_s: float = 10.0) -> list[dict[str, Any]]:
        """Return the frames of `type_` once there are `n`."""
        end = time.monotonic() + timeout_s
        while len(found := self.sent(type_)) < n:
            if time.monotonic() > end:
                raise AssertionError(f"{n} {type_!r} frames expected, got {found}")
            time.sleep(0.02)
        return found

    def tell(self, frame: dict[str, Any]) -> None:
        """Send a frame that is no event to every visitor."""

        async def send() -> None:
            for conversation in self.conversations.values():
                await self._tell(conversation, frame)

        asyncio.run_coroutine_threadsafe(send(), self._loop).result(10)

    def say(self, kind: str, **data: Any) -> None:
        """Add an event to every conversation, as an agent or the system does."""

        async def add() -> None:
            for conversation in self.conversations.values():
                if kind == "state":
                    conversation.state = data["state"]
                await self._tell(conversation, conversation.add(kind, **data))

        asyncio.run_coroutine_threadsafe(add(), self._loop).result(10)

    # ---------------------------------------------------------------- HTTP

    async def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        path = request.path.split("?")[0]
        if path == "/ws":
            return None
        if path in self.pages:
            return _reply(200, self.pages[path].encode(), TYPES[Path(path).suffix], policy=None)
        if path == "/store.json":
            return (
                _reply(HTTPStatus.OK, json.dumps(self.store).encode(), "application/json")
                if self.store
                else _reply(404)
            )
        if path == "/readyz":
            ready = self.engine_phase in ("ready", "none")
            said = {
                "ready": ready,
                "index": {"ready": True, "n_passages": 412},
                "engine": {
                    "ready": ready,
                    "phase": self.engine_phase,
                    "detail": "loading weights" if not ready else "",
                },
            }
            return _reply(200, json.dumps(said).encode(), "application/json")
        if path.startswith("/store/"):
            file = DEMO / path.removeprefix("/store/")
        else:
            file = WEB / ("index.html" if path == "/" else path.removeprefix("/"))
        if ".." in path or not file.is_file() or file.suffix not in TYPES:
            return _reply(404)
        return _reply(200, file.read_bytes(), TYPES[file.suffix])

    # ---------------------------------------------------------------- WebSocket

    async def _socket(self, socket: ServerConnection) -> None:
        conversation: Conversation | None = None
        try:
            async for text in socket:
                frame = json.loads(text)
                self.frames.append(frame)
                if frame["type"] == "hello":
                    conversation = await self._hello(socket, frame)
                elif frame["type"] == "ping":
                    await _send(socket, {"type": "pong"})
                elif conversation is not None:
                    await self._frame(socket, conversation, frame)
        except ConnectionClosed:
            pass
        finally:
            if conversation is not None:
                conversation.sockets.discard(socket)

    async def _hello(self, socket: ServerConnection, frame: dict[str, Any]) -> Conversation | None:
        known = self.conversations.get(frame.get("conversation", ""))
        if "conversation" in frame and (known is None or known.token != frame.get("token")):
            await _send(socket, {"type": "failed", "code": "unknown_conversation", "message": "no", "retryable": False})
            return None
        if known is None:
            number = len(self.conversations) + 1
            known = self.conversations[f"c{number}"] = Conversation(f"c{number}", f"secret{number}")
        language = "zh" if frame.get("locale", "").startswith("zh") else "en"
        store = self.store or {}
        await _send(socket, {
            "type": "welcome", "conversation": known.id, "token": known.token, "seq": len(known.events),
            "state": known.state, "store": {"name": store.get("names", {}).get(language, "Shop")},
            "greeting": store.get("greeting", {}).get(language, "Hello!"),
            "quick_replies": store.get("quick_replies", {}).get(language, []),
            "limits": {"text_chars": 2000, "frame_bytes": 16384, "id_chars": 64, "attachment_bytes": 2**20,
                       "attachments": 5, "attachment_types": ["image/png", "image/jpeg", "application/pdf"]},
            "human": self.human, "customer": None, "agent": None,
        })  # fmt: skip
        for event in known.events[frame.get("after", 0) :]:
            await _send(socket, event)
        for turn, (index, text) in known.live.items():
            await _send(socket, {"type": "partial", "turn": turn, "index": index, "text": text})
        known.sockets.add(socket)
        return known

    async def _frame(self, socket: ServerConnection, conversation: Conversation, frame: dict[str, Any]) -> None:
        match frame["type"]:
            case "ask":
                await self._ask(socket, conversation, frame)
            case "stop":
                conversation.stopped.add(frame["turn"])
            case "regenerate":
                question = next(e["text"] for e in reversed(conversation.events) if e.get("turn") == frame["turn"])
                self._start(self._answer(conversation, frame["turn"], question.replace("FAIL", "again")))
            case "rate":
                event = conversation.add("rating", rated=frame["seq"], value=frame["value"])
                await self._tell(conversation, event)
            case "handoff":
                conversation.state = "waiting"
                said = "已为您呼叫人工客服，请稍候。"
                await self._tell(conversation, conversation.add("message", role="system", text=said))
                await self._tell(conversation, conversation.add("state", state="waiting", reason="visitor"))
            case "leave_message":
                left = conversation.add(
                    "message", role="visitor", turn=frame["id"], text=frame["text"], email=frame["email"], left=True
                )
                await _send(socket, {"type": "ack", "id": frame["id"], "seq": left["seq"], "duplicate": False})
                await self._tell(conversation, left)
                said = "我们已收到您的留言。"
                await self._tell(conversation, conversation.add("message", role="system", text=said))
            case "close":
                conversation.state = "closed"
                await self._tell(conversation, conversation.add("state", state="closed"))

    async def _ask(self, socket: ServerConnection, conversation: Conversation, frame: dict[str, Any]) -> None:
        id_, text = frame["id"], frame["text"]
        if "BUSY" in text and sum(f.get("id") == id_ for f in self.frames) == 1:
            await _send(
                socket,
                {"type": "failed", "id": id_, "code": "busy", "message": "busy", "retryable": True, "retry_after_s": 1},
            )
            return
        duplicate = id_ in conversation.acks
        if not duplicate:
            sent = (
                {"attachments": [{"id": a, "kind": "image", "name": f"{a}.png", "size_bytes": 900} for a in files]}
                if (files := frame.get("attachments"))
                else {}
            )
            event = conversation.add("message", role="visitor", turn=id_, text=text, **sent)
            conversation.acks[id_] = event["seq"]
            if "NOACK" in text:  # stored, but the visitor never hears of it
                socket.transport.abort()
                return
            await self._tell(conversation, event)
        await _send(socket, {"type": "ack", "id": id_, "seq": conversation.acks[id_], "duplicate": duplicate})
        event = conversation.events[conversation.acks[id_] - 1]
        answered = any(e.get("role") == "bot" and e.get("turn") == event["turn"] for e in conversation.events)
        if conversation.state == "bot" and not answered and event["turn"] not in conversation.live:
            self._start(self._answer(conversation, event["turn"], text))

    def _start(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, conversation: Conversation, turn: str, question: str) -> None:
        conversation.n_generated += 1
        reply = script(question)
        conversation.live[turn] = (-1, "")
        for phase in ("searching", "thinking"):
            await self._tell(conversation, {"type": "status", "turn": turn, "phase": phase})
            await self._pause(reply.get("think_s", self.delta_s * 2))
        if "FAIL" in question:
            del conversation.live[turn]
            await self._tell(
                conversation,
                {"type": "failed", "turn": turn, "code": "engine_failed", "message": "x", "retryable": True},
            )
            return
        text = reply["text"]
        size = 3
        finish = "stop"
        for index, at in enumerate(range(0, len(text), size)):
            if turn in conversation.stopped:
                text, finish = text[:at], "abort"
                break
            conversation.live[turn] = (index, text[: at + size])
            await self._tell(
                conversation, {"type": "delta", "turn": turn, "index": index, "text": text[at : at + size]}
            )
            if "CUT" in question and index == 5:
                for socket in list(conversation.sockets):
                    socket.transport.abort()
                conversation.sockets.clear()
            await self._pause(reply.get("delta_s", self.delta_s))
        final = {k: v for k, v in reply.items() if k in ("citations", "cards", "quick_replies", "revised", "outcome")}
        if "final" in reply:
            text = reply["final"]
        conversation.live.pop(turn, None)
        event = conversation.add(
            "message",
            role="bot",
            turn=turn,
            text=text,
            finish=finish,
            release=RELEASE,
            **{"outcome": "generated", **final},
        )
        await self._tell(conversation, event)

    async def _pause(self, seconds: float) -> None:
        if self.stepwise:
            await self._steps.acquire()
        else:
            await asyncio.sleep(seconds)

    def step(self, n: int = 1) -> None:
        """Let a stepwise reply go on by `n` phases or deltas."""
        for _ in range(n):
            self._loop.call_soon_threadsafe(self._steps.release)

    async def _tell(self, conversation: Conversation, frame: dict[str, Any]) -> None:
        for socket in list(conversation.sockets):
            await _send(socket, frame)


_SCRIPTS: list[tuple[str, Callable[[], dict[str, Any]]]] = [
    ("SLOW", lambda: {"text": "slow words, " * 200, "delta_s": 0.03}),
    ("CUT", lambda: {"text": "This sentence survives a cut connection, whole and in order. " * 3}),
    ("THINK", lambda: {"text": "Done.", "think_s": 30}),
    ("LONG", lambda: {"text": "- a line of a long list\n" * 60, "delta_s": 0.001}),
    ("HOSTILE", lambda: {"text": HOSTILE}),
    ("REVISED", lambda: {"text": "It costs 99.", "final": "It costs ¥129.", "revised": True}),
    ("CARDS", lambda: {"text": "这两款炖锅和煎锅都适合电磁炉 [1]：", "cards": CARDS, "citations": CITATIONS_ZH[:1],
                       "quick_replies": ["可以用洗碗机吗？", "质保多久？"]}),
    ("退货", lambda: {"text": RETURNS_ZH, "citations": CITATIONS_ZH,
                      "quick_replies": ["退款多久到账？", "怎么换货？"]}),
    ("return", lambda: {"text": RETURNS_EN, "citations": CITATIONS_EN, "outcome": "direct",
                        "quick_replies": ["When do I get my refund?", "How do I exchange it?"]}),
]  # fmt: skip


def script(question: str) -> dict[str, Any]:
    for word, reply in _SCRIPTS:
        if word in question:
            return reply()
    return {"text": f"You said: {question}"}


def demo_store() -> dict[str, Any]:
    """The shape of GET /store.json, from the demo store's products where they are there."""
    import csv

    products: list[dict[str, Any]] = []
    path = DEMO / "products.csv"
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                products.append({**row, "sku": row["id"][:6], "price": float(row["price"]), "stock": int(row["stock"])})
    now = datetime.now(UTC)
    until = (now + timedelta(days=9)).isoformat()
    since = (now - timedelta(days=3)).isoformat()
    promotions = [
        ("full-cut", "满399减50", "全场满 ¥399 减 ¥50，满 ¥799 减 ¥120，自动生效。", "", "zh"),
        ("full-cut", "¥50 off ¥399", "Site-wide: ¥50 off ¥399, ¥120 off ¥799, applied by itself.", "", "en"),
        ("warm-home", "床品香氛 75 折", "床品与家居香氛 75 折。", "WARM25", "zh"),
        ("warm-home", "25% off bedding", "Bedding and home fragrance 25% off.", "WARM25", "en"),
        ("coffee", "买咖啡机送豆", "任意咖啡机加赠 250 克咖啡豆。", "", "zh"),
        ("coffee", "Free beans", "250 g of beans with any coffee machine.", "", "en"),
    ]
    return {
        "name": "青禾家居",
        "names": {"zh": "青禾家居", "en": "Qinghe Home"},
        "languages": ["zh", "en"],
        "currency": "CNY",
        "greeting": {
            "zh": "您好，我是青禾家居的 AI 助手。商品、优惠、物流、退换货都可以问我。",
            "en": "Hello, I am Qinghe Home's AI assistant. Ask me about products, offers, delivery or returns.",
        },
        "quick_replies": {
            "zh": ["可以退货吗？", "现在有什么优惠？", "多久能送到？"],
            "en": ["Can I return something?", "What offers are on now?", "How long is delivery?"],
        },
        "promotions": [
            {"id": f"promo-{i}-{lang}", "title": t, "description": d, "code": c, "lang": lang, "valid_from": since,
             "valid_until": until}
            for i, t, d, c, lang in promotions
        ],
        "products": products,
    }  # fmt: skip


def _reply(status: int, body: bytes = b"", type_: str = "text/plain", *, policy: str | None = CSP) -> Response:
    headers = Headers({
        "Content-Type": type_, "Content-Length": str(len(body)),
        "Access-Control-Allow-Origin": "*", "Connection": "close", "Cache-Control": "no-store",
    })  # fmt: skip
    if policy is not None:
        headers["Content-Security-Policy"] = policy
    return Response(status, HTTPStatus(status).phrase, headers, body)


async def _send(socket: ServerConnection, frame: dict[str, Any]) -> None:
    with contextlib.suppress(ConnectionClosed):
        await socket.send(json.dumps(frame, ensure_ascii=False))


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    with FakeServer(parser.parse_args().port) as running:
        print(running.url)
        threading.Event().wait()
