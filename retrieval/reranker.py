"""
Question and passage read together: the token vectors of both -> a logit that the passage answers the question.

An embedder makes one vector of a whole text; what sets "can I rent one?" apart from "can I buy one?" is lost in it.
Here every word of the question looks at every word of the passage, in a small network over the encoders' last layers
(late interaction, arXiv 2004.12832, with joint layers on top, arXiv 2010.10137). A passage's token vectors are made
with its vector when the index is built, and are kept in 8 bits, so that a question pays for the small network alone.
The weights are `reranker.safetensors`, made by examples/training/rerank.py. Knows arrays; knows neither models nor
passages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.encoders import Matrix, load_by_encoder
from retrieval.errors import RetrievalError
from retrieval.graph import FLOAT, Graph

SHIPPED = Path(__file__).with_name("reranker.safetensors")
MAX_QUERY_TOKENS = 40  # as in the training; what comes after has no part
MAX_PASSAGE_TOKENS = 128
N_HEADS = 4
EPS = 1e-5
SCALE = 10.0  # of the cosines' share in the logit

Tokens = NDArray[np.int8]  # of one passage by one encoder, (n_tokens, width)


class Reranker:
    """The network over one encoder's token vectors. Thread-safe: each call runs on the thread that makes it."""

    def __init__(self, weights: Mapping[str, NDArray[np.generic]]) -> None:
        """
        Put the network together from the tensors that examples/training/rerank.py writes.

        Raises:
            RetrievalError: one is missing or has another shape.
        """
        left = {name: np.asarray(tensor, dtype=np.float32) for name, tensor in weights.items()}
        try:
            self._question, self._passage = _map(left, "question"), _map(left, "passage")
            self.width = len(self._question[1])
            self._session = _graph(left, self.width).session(1)
            self.logits(np.zeros((1, self.width), np.float32), [np.zeros((1, self.width), np.int8)])
        except (KeyError, ValueError, IndexError, RetrievalError) as exc:
            raise RetrievalError(f"the reranker's weights are not what was written: {exc}") from exc

    def question(self, hidden: Matrix) -> Matrix:
        """Return what is kept of a question's token vectors (n, dim): (at most MAX_QUERY_TOKENS, width)."""
        kept: Matrix = hidden[:MAX_QUERY_TOKENS] @ self._question[0] + self._question[1]
        return kept

    def passage(self, hidden: Matrix) -> Tokens:
        """Return what is kept of a passage's token vectors (n, dim): (at most MAX_PASSAGE_TOKENS, width), 8 bits."""
        kept = hidden[:MAX_PASSAGE_TOKENS] @ self._passage[0] + self._passage[1]
        # No scale is kept: all that is done with a token vector later does not depend on its length.
        most = np.maximum(np.abs(kept).max(axis=1, keepdims=True), 1e-12)
        rounded: Tokens = np.rint(kept * (127 / most)).astype(np.int8)
        return rounded

    def logits(self, question: Matrix, passages: Sequence[Tokens]) -> Matrix:
        """
        Return for each of the passages (n,) the logit that it answers the question (n_tokens, width).

        Both as `question` and `passage` returned them. A text without tokens is one that says nothing.
        """
        if not passages:
            return np.zeros(0, np.float32)
        longest = max(1, *(len(tokens) for tokens in passages))
        theirs = np.zeros((len(passages), longest, self.width), np.int8)
        absent = np.full((len(passages), 1, longest), -1e9, np.float32)
        for row, tokens in enumerate(passages):
            theirs[row, : len(tokens)] = tokens
            absent[row, :, : max(1, len(tokens))] = 0.0
        ours = question if len(question) else np.zeros((1, self.width), np.float32)
        found: Matrix = self._session.run(None, {"question": ours, "passages": theirs, "absent": absent})[0][:, 0]
        return found


def _graph(left: Mapping[str, Matrix], width: int) -> Graph:
    """
    Return the network on one question and a batch of passages, with what is to be added to the scores of their tokens.

    The keys and values of attention are taken out of a passage by the question's side, which is the shorter, and not
    before: each head's `asks` brings the question's vectors to what it looks for among the passage's own, its `takes`
    what it found to what is added.
    """
    graph = Graph()
    graph.input("question", "float32", ["Q", width])
    graph.input("passages", "int8", ["N", "P", width])
    graph.input("absent", "float32", ["N", 1, "P"])
    node = graph.node

    def axes(*numbers: int) -> NDArray[np.int64]:
        return np.array(numbers, dtype=np.int64)

    def mapped(x: str, name: str) -> str:
        return node("Add", node("MatMul", x, left[f"{name}.weight"].T.copy()), left[f"{name}.bias"])

    def normed(x: str, name: str) -> str:
        return node("LayerNormalization", x, left[f"{name}.weight"], left[f"{name}.bias"], epsilon=EPS)

    theirs = node("Cast", "passages", to=FLOAT)
    across = node("Transpose", theirs, perm=[0, 2, 1])
    # 1) How well each word of the question is met by the nearest of the passage.
    squares = node("ReduceSumSquare", across, axes(1))  # (N, 1, P)
    lengths = node("Sqrt", node("Max", squares, np.array(EPS, np.float32)))
    near = node("Div", node("MatMul", node("LpNormalization", "question", axis=-1), across), lengths)
    near = node("ReduceMax", node("Add", near, "absent"), axes(2), keepdims=0)  # (N, Q)
    mean = node("ReduceMean", near, axes(1))
    apart = node("Sub", near, mean)
    variance = node("ReduceMean", node("Mul", apart, apart), axes(1))
    spread = node("Sqrt", node("Add", variance, np.array(1e-6, np.float32)))
    # 2) The words of the question, each with what it found in the passage.
    plain = node("LayerNormalization", theirs, np.ones(width, np.float32), epsilon=EPS)
    turned = node("Transpose", plain, perm=[0, 2, 1])
    gain, shift = left["passage_norm.weight"], left["passage_norm.bias"]  # moved to the question's side as well
    head = width // N_HEADS
    heads = [slice(n * head, (n + 1) * head) for n in range(N_HEADS)]
    x = normed(node("Unsqueeze", "question", axes(0)), "question_norm")  # the same for all, until they have looked
    n_blocks = 1 + max(int(name.split(".")[1]) for name in left if name.startswith("blocks."))
    for at in (f"blocks.{n}" for n in range(n_blocks)):
        query, key, value, out = (left[f"{at}.{part}.weight"] for part in ("query", "key", "value", "out"))
        # The key's bias and the shift add the same to every token of a passage, which a softmax does not see.
        scale = gain * np.float32(head**-0.5)
        asks = np.concatenate([query[part].T @ key[part] * scale for part in heads], axis=1)
        asks_bias = np.concatenate([left[f"{at}.query.bias"][part] @ key[part] * scale for part in heads])
        takes = np.concatenate([(value[part] * gain).T @ out[:, part].T for part in heads])
        takes_bias = left[f"{at}.out.bias"] + out @ (left[f"{at}.value.bias"] + value @ shift)
        looks = node("Add", node("MatMul", normed(x, f"{at}.question_norm"), asks), asks_bias)
        looks = node("Reshape", looks, axes(0, -1, width))  # one row for each word and head
        scores = node("Softmax", node("Add", node("MatMul", looks, turned), "absent"), axis=-1)  # (N, Q · heads, P)
        found = node("Reshape", node("MatMul", scores, plain), axes(0, -1, N_HEADS * width))
        found = node("MatMul", found, takes)
        x = node("Add", x, node("Add", found, takes_bias))
        inner = node("FastGelu", mapped(normed(x, f"{at}.inner_norm"), f"{at}.inner"), ours=True)
        x = node("Add", x, mapped(inner, f"{at}.outer"))
    x = normed(x, "norm")
    pooled = [node("ReduceMean", x, axes(1), keepdims=0), node("ReduceMax", x, axes(1), keepdims=0)]
    measured = [mean, node("ReduceMin", near, axes(1)), spread]
    inner = node("FastGelu", mapped(node("Concat", *pooled, *measured, axis=1), "inner"), ours=True)
    logit = node("Add", mapped(inner, "outer"), node("Mul", mean, left["share"].reshape(()) * np.float32(SCALE)))
    graph.output(logit, ["N", 1])
    return graph


def load_rerankers(encoders: str, path: Path = SHIPPED) -> tuple[dict[str, Reranker], str]:
    """
    Return the reranker of each encoder by its name, and a short checksum of them for the name of its tokens.

    `encoders` is the checksum of what the encoders were tuned by (encoders.py).

    Raises:
        RetrievalError: the file is missing or not one of ours, or was trained over other encoders.
    """
    by_encoder, checksum = load_by_encoder(path, "the reranker's weights", trained_over=encoders)
    return {name: Reranker(weights) for name, weights in by_encoder.items()}, checksum


def _map(tensors: Mapping[str, Matrix], name: str) -> tuple[Matrix, Matrix]:
    """Return a map's matrix, to be multiplied from the right, and its bias."""
    return tensors[f"{name}.weight"].T.copy(), tensors[f"{name}.bias"]
