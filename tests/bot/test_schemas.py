"""docs/asyncapi.json and docs/schemas/: current, valid, and true of real frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bot.asyncapi import asyncapi, client_schema, documents, server_schema
from bot.errors import BotError
from bot.wire import dump_failed, parse_frame
from tests.running import Wire, running_server

DOCS = Path(__file__).parents[2] / "docs"


def test_the_documents_in_docs_are_current() -> None:
    for path, text in documents().items():
        assert (DOCS / path).read_text(encoding="utf-8") == text, f"docs/{path} is old: make docs"


@pytest.mark.parametrize("schema", [client_schema(), server_schema()])
def test_the_schemas_are_schemas(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


def test_every_reference_in_the_document_leads_somewhere() -> None:
    document = asyncapi()
    found = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                found.append(value["$ref"])
            for each in value.values():
                walk(each)
        elif isinstance(value, list):
            for each in value:
                walk(each)

    walk(document)
    assert len(found) > 80
    for ref in found:
        target: Any = document
        for part in ref.removeprefix("#/").split("/"):
            target = target[part]
    for operation in document["operations"].values():
        assert operation["messages"]


CLIENT_FRAMES = [
    {"type": "hello", "protocol": 1, "conversation": "c_1", "token": "t", "after": 3, "locale": "zh-CN"},
    {"type": "ask", "id": "q1", "text": "hi"},
    {"type": "ask", "id": "q1", "text": "", "attachments": ["a_1"]},
    {"type": "stop", "turn": "q1"},
    {"type": "regenerate", "turn": "q1"},
    {"type": "rate", "seq": 2, "value": "down", "comment": "no"},
    {"type": "handoff"},
    {"type": "close", "score": 5},
    {"type": "typing", "on": True},
    {"type": "ping"},
]


@pytest.mark.parametrize("frame", CLIENT_FRAMES, ids=lambda f: str(f["type"]))
def test_what_the_server_takes_the_schema_takes(frame: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(client_schema())
    parse_frame(json.dumps(frame))
    validator.validate(frame)
    for name in frame.keys() - {
        "protocol",
        "conversation",
        "token",
        "after",
        "locale",
        "comment",
        "score",
        "attachments",
    }:
        without = {k: v for k, v in frame.items() if k != name}
        with pytest.raises(BotError):
            parse_frame(json.dumps(without))
        assert not validator.is_valid(without)


async def test_real_frames_are_valid_by_the_published_schema(tmp_path: Path) -> None:
    # Wire checks each frame against the classes; here the published file is held to the same frames.
    validator = jsonschema.Draft202012Validator(json.loads((DOCS / "schemas" / "server-frame.json").read_text("utf-8")))
    async with running_server(tmp_path / "log.db") as server, Wire(server.ws_url) as tab:
        await tab.hello(locale="en")
        await tab.ask("a1", "hi")
        await tab.say("rate", seq=2, value="up")
        await tab.say("handoff")
        await tab.say("nonsense")
        await tab.hear("failed")
        await tab.say("close", score=4)
        await tab.hear("event", state="closed")
        await tab.nothing_more()
        for frame in tab.heard:
            validator.validate(frame)
        assert {f["type"] for f in tab.heard} == {"welcome", "ack", "status", "delta", "event", "failed", "pong"}
    validator.validate(json.loads(dump_failed(BotError(), turn="q2", turns=["q1", "q2"])))
    validator.validate({"type": "reconnect", "after_ms": 1200, "reason": "restart"})
    assert not validator.is_valid({"type": "delta", "turn": "q1", "index": "0", "text": "x"})


def test_an_order_card_is_part_of_a_reply() -> None:
    card = {
        **{
            "kind": "order",
            "id": "1001",
            "status": "shipped",
            "carrier": "SF",
            "tracking": "SF123",
            "items": ["Lamp x 1"],
        },
        **{"total": "59.00", "currency": "CNY", "placed_at": "2026-11-01T10:00:00Z"},
    }
    schema = server_schema()
    validator = jsonschema.Draft202012Validator({"$ref": "#/$defs/OrderCard", "$defs": schema["$defs"]})
    validator.validate(card)
    assert not validator.is_valid({**card, "kind": "product"})
