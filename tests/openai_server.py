"""A small OpenAI-compatible server over a real socket whose "model" is a function of the prompt: what it says is known beforehand."""  # noqa: E501

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Model = Callable[[list[dict[str, str]]], str]


@contextmanager
def openai_server(name: str, model: Model, seen: list[list[dict[str, str]]] | None = None) -> Iterator[str]:
    """Serve `model` as `name` until the block ends; yield the base URL. Prompts are appended to `seen`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(json.dumps({"object": "list", "data": [{"id": name, "object": "model"}]}), "application/json")

        def do_POST(self) -> None:
            messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
            if seen is not None:
                seen.append(messages)
            chunks: list[dict[str, Any]] = [
                {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
                for piece in re.findall(r"\S+\s*|\s+", model(messages))
            ]
            chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            lines = [f"data: {json.dumps(c)}\n\n" for c in chunks]
            self._send("".join([*lines, "data: [DONE]\n\n"]), "text/event-stream")

        def _send(self, text: str, kind: str) -> None:
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def passages_of(messages: list[dict[str, str]]) -> list[str]:
    """Return the numbered passages of a prompt's last message."""
    return re.findall(r"^\[\d+\] (.*)$", messages[-1]["content"], re.M)


def question_of(messages: list[dict[str, str]]) -> str:
    """Return the visitor's words at a prompt's end."""
    return re.split(r"用中文简短回答：|answer briefly in English: ", messages[-1]["content"])[-1]


def quoting(messages: list[dict[str, str]]) -> str:
    """A model that copies the passage most like the question, and says that it does not know where none is."""
    question = question_of(messages)
    asked = set(re.findall(r"[a-z]{3,}|[\u4e00-\u9fff]", question.lower())) - set("的了吗是多少几怎么")

    def shared(passage: str) -> int:
        return len(asked & set(re.findall(r"[a-z]{3,}|[\u4e00-\u9fff]", passage.lower())))

    best = max(passages_of(messages), key=shared, default="")
    if not shared(best):
        return "抱歉，这个我不知道。" if re.search(r"[\u4e00-\u9fff]", question) else "Sorry, I don't know."
    return best.split(": ", 1)[-1]


def waffling(messages: list[dict[str, str]]) -> str:
    """A model that is polite and says nothing."""
    chinese = re.search(r"[\u4e00-\u9fff]", question_of(messages))
    return "感谢您的咨询，我们会尽力帮助您。" if chinese else "Thank you for asking, we are happy to help."
