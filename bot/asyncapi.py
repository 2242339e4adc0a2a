"""
The AsyncAPI document and the JSON Schemas of the visitors' WebSocket, made from the classes in bot/wire.py. No I/O.

`python -m bot schemas docs` writes them (`make docs`); the server has the document at /asyncapi.json; a test checks
that what is in docs/ is current.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from bot.wire import MAX_FRAME_BYTES, PROTOCOL, SUBPROTOCOL, ClientFrame, ServerFrame

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _name(model: type[BaseModel]) -> str:
    return model.__name__


def _schemas(models: tuple[type[BaseModel], ...], *, open_: bool, prefix: str) -> dict[str, Any]:
    """Return {class name: schema} of `models` and of what they refer to, at `prefix`."""
    _, document = models_json_schema([(m, "validation") for m in models], ref_template=f"{prefix}{{model}}")
    definitions: dict[str, Any] = document["$defs"]
    for definition in definitions.values():
        # Protocol 1 only grows: whoever reads a frame ignores fields they do not know.
        if open_:
            definition.pop("additionalProperties", None)
    return definitions


def client_schema() -> dict[str, Any]:
    """Return the JSON Schema of a frame from visitor to server."""
    return _union(get_args(ClientFrame), "A frame from visitor to server.")


def server_schema() -> dict[str, Any]:
    """Return the JSON Schema of a frame from server to visitor."""
    return _union(get_args(ServerFrame), "A frame from server to visitor.")


def _union(models: tuple[type[BaseModel], ...], title: str) -> dict[str, Any]:
    definitions = _schemas(models, open_=True, prefix="#/$defs/")
    refs = [{"$ref": f"#/$defs/{_name(model)}"} for model in models]
    return {"$schema": DIALECT, "title": title, "oneOf": refs, "$defs": definitions}


@cache
def asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document; do not change it."""
    client, server = get_args(ClientFrame), get_args(ServerFrame)
    schemas = _schemas((*client, *server), open_=True, prefix="#/components/schemas/")
    messages = {
        _name(model): {
            "name": _name(model),
            "title": f"{_type(model)}: {_summary(model)}".rstrip(": "),
            "contentType": "application/json",
            "payload": {"$ref": f"#/components/schemas/{_name(model)}"},
        }
        for model in (*client, *server)
    }

    def of_channel(models: tuple[type[BaseModel], ...]) -> list[dict[str, str]]:
        return [{"$ref": f"#/channels/visitor/messages/{_name(model)}"} for model in models]

    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Zhanggui, visitors' WebSocket",
            "version": str(PROTOCOL),
            "description": "Protocol 1 in the form of a document; docs/protocol.md says what the frames promise.",
        },
        "defaultContentType": "application/json",
        "servers": {
            "store": {
                "host": "{host}",
                "protocol": "wss",
                "variables": {"host": {"default": "127.0.0.1:8000", "description": "Where the server listens."}},
            }
        },
        "channels": {
            "visitor": {
                "address": "/ws",
                "description": (
                    f"Text frames, one JSON object each, at most {MAX_FRAME_BYTES} bytes from visitors; "
                    f"subprotocol {SUBPROTOCOL}."
                ),
                "bindings": {"ws": {"method": "GET"}},
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
            }
        },
        "operations": {
            "receiveFromVisitor": {
                "action": "receive",
                "channel": {"$ref": "#/channels/visitor"},
                "messages": of_channel(client),
            },
            "sendToVisitor": {
                "action": "send",
                "channel": {"$ref": "#/channels/visitor"},
                "messages": of_channel(server),
            },
        },
        "components": {"messages": messages, "schemas": schemas},
    }


def _type(model: type[BaseModel]) -> str:
    types: tuple[str, ...] = get_args(model.model_fields["type"].annotation)
    return types[0]


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0] if model.__doc__ else ""


def documents() -> dict[str, str]:
    """Return {path under docs/: text} of all that is generated from the frames."""
    made = {
        "asyncapi.json": asyncapi(),
        "schemas/client-frame.json": client_schema(),
        "schemas/server-frame.json": server_schema(),
    }
    return {path: json.dumps(document, ensure_ascii=False, indent=2) + "\n" for path, document in made.items()}
