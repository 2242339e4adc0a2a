"""embedder.py: the real model, the cache, LangChain both ways."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings

from retrieval.e5 import E5
from retrieval.embedder import LangChainEmbedder, VectorCache, ZhangguiEmbeddings
from retrieval.errors import RetrievalError
from tests.retrieval.conftest import HashingEmbedder


def test_vectors_have_length_one_and_both_languages_meet(nano: E5) -> None:
    vectors = nano.embed_queries(["怎么退货", "How do I return an item?", "今天天气怎么样"])
    assert vectors.shape == (3, nano.dim)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_nothing_to_embed_and_odd_texts_are_no_error(nano: E5) -> None:
    assert nano.embed_queries([]).shape == (0, nano.dim)
    odd = nano.embed_passages(["", "a\0b", "😀" * 50])
    assert np.isfinite(odd).all()


def test_loading_the_model_leaves_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    E5(n_threads=1)
    assert dict(os.environ) == before


def test_no_text_is_embedded_twice(tmp_path: Path, hashing: HashingEmbedder) -> None:
    path = tmp_path / "vectors.sqlite"
    cache = VectorCache(path)
    heard: list[tuple[int, int]] = []
    first = cache.embed(
        hashing, ["a", "b", "a"], as_query=True, progress=lambda done, total: heard.append((done, total))
    )
    assert hashing.embedded == ["a", "b"]
    assert heard == [(0, 2), (2, 2)]
    cache.close()
    cache = VectorCache(path)
    again = cache.embed(hashing, ["b", "a", "c"], as_query=True)
    assert hashing.embedded == ["a", "b", "c"]
    assert np.array_equal(again[1], first[0])
    cache.embed(hashing, ["a"], as_query=False)  # another role is another vector
    cache.embed(HashingEmbedder("hashing-2"), ["a"], as_query=True)  # another model too
    assert hashing.embedded == ["a", "b", "c", "a"]
    cache.close()


def test_a_failing_model_keeps_what_was_done(hashing: HashingEmbedder) -> None:
    cache = VectorCache(None)
    cache.embed(hashing, ["a"], as_query=True)
    hashing.fails = True
    with pytest.raises(RetrievalError, match="told to fail"):
        cache.embed(hashing, ["a", "b"], as_query=True)
    assert cache.embed(hashing, ["a"], as_query=True).shape == (1, 64)
    cache.close()


def test_a_damaged_cache_is_replaced(tmp_path: Path, hashing: HashingEmbedder) -> None:
    path = tmp_path / "vectors.sqlite"
    path.write_bytes(b"this is no database, and long enough to be looked at" * 100)
    cache = VectorCache(path)
    assert cache.embed(hashing, ["a"], as_query=True).shape == (1, 64)
    cache.close()


def test_langchain_sees_our_vectors(hashing: HashingEmbedder) -> None:
    embeddings = ZhangguiEmbeddings(hashing)
    assert isinstance(embeddings, Embeddings)
    assert len(embeddings.embed_query("a")) == 64
    assert np.allclose(embeddings.embed_documents(["a", "b"])[0], embeddings.embed_query("a"))


def test_a_langchain_model_is_an_embedder_and_its_errors_are_ours() -> None:
    class Foreign(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [[3.0, 4.0] for _ in texts]

        def embed_query(self, text: str) -> list[float]:
            if text == "boom":
                raise KeyError("no such model")
            return [3.0, 4.0]

    embedder = LangChainEmbedder(Foreign(), name="foreign", version="1")
    assert embedder.dim == 2
    assert np.allclose(embedder.embed_passages(["x"]), [[0.6, 0.8]])
    with pytest.raises(RetrievalError, match="foreign failed"):
        embedder.embed_queries(["boom"])


def test_retrieval_never_imports_torch_vllm_or_transformers() -> None:
    program = (
        "import sys, retrieval.retriever, retrieval.commands, retrieval.calibrate\n"
        "from retrieval.e5 import E5\n"
        "E5(1).embed_queries(['hello'])\n"
        "print([name for name in ('torch', 'vllm', 'transformers', 'bot', 'finetune') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=50)
    assert done.stdout.strip() == "[]", done.stderr
