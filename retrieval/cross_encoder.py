"""
Question and passage read as one text: the upper layers of the encoder over both -> a logit that the passage answers.

A cross-encoder tells "can I rent one?" from "can I buy one?" best of all and is the slowest, since nothing of it can be
done beforehand. Here the lower layers read question and passage apart, as they do for the vectors, and what they made
of a passage is kept with the index (arXiv 2004.14255, 2005.00697); a question pays for the upper layers alone, on the
few passages that are left. The weights are `cross_encoder.safetensors`, made by examples/training/cross_encode.py, 8
bits a matrix. Knows arrays; knows neither models nor passages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.encoders import Matrix, load_by_encoder
from retrieval.errors import RetrievalError
from retrieval.graph import FLOAT, Graph

SHIPPED = Path(__file__).with_name("cross_encoder.safetensors")
FROM_LAYER = 8  # of the encoder's 12: those before read question and passage apart
MAX_QUERY_TOKENS = 48  # as in the training, the prefix and the ends among them; what comes after has no part
MAX_PASSAGE_TOKENS = 160  # a section of a policy has 80 to 190; one read costs as much as its tokens
N_HEADS = 12
EPS = 1e-12  # of multilingual-e5-small
MAX_WEIGHT = 63  # of 8 bits: without VNNI a processor adds two products in 16, which 127 · 255 twice would overflow

Tokens = NDArray[np.int8]  # of one passage, (n_tokens, 384)


class CrossEncoder:
    """The upper layers. Thread-safe: each call runs on the thread that makes it."""

    def __init__(self, tensors: Mapping[str, NDArray[np.generic]]) -> None:
        """
        Put the network together from the tensors that examples/training/cross_encode.py writes.

        Raises:
            RetrievalError: one is missing or has another shape.
        """
        try:
            self._mean = np.asarray(tensors["mean"], np.float32)
            self._step = np.asarray(tensors["step"], np.float32)
            self._session = _graph(tensors).session(1)
            nothing = np.zeros((1, len(self._mean)))
            self.logit(nothing.astype(np.float32), nothing.astype(np.int8))
        except (KeyError, ValueError, IndexError, RetrievalError) as exc:
            raise RetrievalError(f"the cross-encoder's weights are not what was written: {exc}") from exc

    def passage(self, hidden: Matrix) -> Tokens:
        """Return what is kept of a passage's token vectors after layer FROM_LAYER (n, dim): 8 bits a value."""
        steps = np.rint((hidden[:MAX_PASSAGE_TOKENS] - self._mean) / self._step)
        kept: Tokens = np.clip(steps, -127, 127).astype(np.int8)
        return kept

    def logit(self, question: Matrix, passage: Tokens) -> float:
        """
        Return the logit that the passage answers the question, (n_tokens, dim) each.

        The question's are its token vectors after layer FROM_LAYER, the passage's what `passage` made of them.
        """
        # A text without tokens is one that says nothing.
        ours = question[:MAX_QUERY_TOKENS] if len(question) else np.zeros((1, len(self._mean)), np.float32)
        theirs = passage if len(passage) else np.zeros((1, len(self._mean)), np.int8)
        n, n_theirs = len(ours), len(theirs)
        pooled = np.zeros((1, 3, n + n_theirs), np.float32)
        pooled[0, 0, 0], pooled[0, 1, :n], pooled[0, 2, n:] = 1, 1 / n, 1 / n_theirs
        inputs = {"question": ours, "passage": theirs, "pooled": pooled}
        return float(self._session.run(None, inputs)[0].item())


def _graph(tensors: Mapping[str, NDArray[np.generic]]) -> Graph:
    """Return question (Q, dim), passage (P, dim) and the pooling (1, 3, Q + P): first, and both means -> (1, 1)."""
    graph = Graph()
    node = graph.node

    def floats(name: str) -> Matrix:
        return np.asarray(tensors[name], np.float32)

    def mapped(x: str, name: str) -> str:
        # The values that go in are rounded to 8 bits on the way, with one scale for all of a text's.
        weight, scale = np.asarray(tensors[f"{name}.weight"], np.int8), floats(f"{name}.scale")
        zeros = np.zeros(len(scale), np.int8)
        return node("DynamicQuantizeMatMul", x, weight.T.copy(), scale, zeros, floats(f"{name}.bias"), ours=True)

    def normed_sum(x: str, added: str, name: str) -> str:
        gain, shift = floats(f"{name}.weight"), floats(f"{name}.bias")
        return node("SkipLayerNormalization", x, added, gain, shift, epsilon=EPS, ours=True)

    dim = len(floats("mean"))
    graph.input("question", "float32", ["Q", dim])
    graph.input("passage", "int8", ["P", dim])
    graph.input("pooled", "float32", [1, 3, "T"])
    kind = floats("kind")
    ours = node("Add", "question", kind[0])
    theirs = node("Add", node("Mul", node("Cast", "passage", to=FLOAT), floats("step")), floats("mean") + kind[1])
    x = node("Unsqueeze", node("Concat", ours, theirs, axis=0), np.array([0], np.int64))
    n_layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    for at in (f"layers.{n}" for n in range(n_layers)):
        query, key, value = (mapped(x, f"{at}.{part}") for part in ("q", "k", "v"))
        seen = node("MultiHeadAttention", query, key, value, num_heads=N_HEADS, ours=True)
        x = normed_sum(x, mapped(seen, f"{at}.ao"), f"{at}.aln")
        x = normed_sum(x, mapped(node("Gelu", mapped(x, f"{at}.fi"), ours=True), f"{at}.fo"), f"{at}.oln")
    means = node("MatMul", "pooled", x)  # (1, 3, dim)
    of_question, of_passage = (node("Gather", means, np.array(n, np.int64), axis=1) for n in (1, 2))
    flat = node("Reshape", means, np.array([1, 3 * dim], np.int64))
    joined = node("Concat", flat, node("Mul", of_question, of_passage), axis=1)
    joined = node("LayerNormalization", joined, floats("norm.weight"), floats("norm.bias"), epsilon=1e-5)
    inner = node("Gelu", mapped(joined, "inner"), ours=True)
    logit = node("Add", node("MatMul", inner, floats("outer.weight").T.copy()), floats("outer.bias"))
    graph.output(logit, [1, 1])
    return graph


def rounded(weight: Matrix) -> tuple[NDArray[np.int8], Matrix]:
    """Return a matrix (n_out, n_in) in 8 bits and the scale of each row (n_out,)."""
    scale = np.maximum(np.abs(weight).max(axis=1), 1e-12) / MAX_WEIGHT
    return np.rint(weight / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def load_cross_encoder(encoders: str, path: Path = SHIPPED) -> tuple[CrossEncoder, str]:
    """
    Return the shipped network and a short checksum of it for the name of what is kept of passages.

    `encoders` is the checksum of what the encoders were tuned by (encoders.py).

    Raises:
        RetrievalError: the file is missing or not one of ours, or was trained over other encoders.
    """
    by_encoder, checksum = load_by_encoder(path, "the cross-encoder's weights", trained_over=encoders)
    return CrossEncoder(by_encoder.get("e5", {})), checksum
