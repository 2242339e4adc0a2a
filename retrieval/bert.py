"""
BERT encoders on a CPU: token ids -> mean vectors, run by ONNX Runtime.

The graph is written here, from weights that come in registry packages: matrices in blocks of 32 values with a scale
each, 4 or 8 bits a value (`MatMulNBits`; activations are rounded to 8 bits in the same blocks), everything else
float32. Small matrices are what makes a visitor's question fast: a processor spends its time reading them. Knows the
network (arXiv 1810.04805) and how texts are batched; knows neither files nor tokens' texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.encoders import Matrix
from retrieval.graph import Graph

BLOCK = 32  # values that share a scale
MAX_BATCH_TOKENS = 2048  # of one run, padding included: 12 MB of the widest activations


@dataclass(frozen=True, slots=True)
class Blocks:
    """
    A matrix (n_out, n_in) in blocks along n_in.

    `packed` is uint8 of shape (n_out, n_in / 32, 4 · bits), two values of 4 bits in a byte with the even one low; what
    is stored is the value plus 2^(bits - 1). `scales` is float32 of shape (n_out, n_in / 32).
    """

    packed: NDArray[np.uint8]
    scales: Matrix
    bits: int

    @classmethod
    def rounded(cls, weight: Matrix) -> Blocks:
        """Return `weight` (n_out, n_in) in 8 bits: within 1/254 of each block's largest value."""
        n_out, n_in = weight.shape
        blocks = weight.reshape(n_out, n_in // BLOCK, BLOCK)
        scales = np.maximum(np.abs(blocks).max(-1), 1e-12) / 127
        packed = (np.rint(blocks / scales[:, :, None]) + 128).astype(np.uint8)
        return cls(packed, scales.astype(np.float32), 8)


@dataclass(frozen=True, slots=True)
class Layer:
    """
    One layer: `maps` are its matrices and biases, `norms` its two pairs of gain and bias, each (dim,).

    The keys of `maps` are q, k, v, out (of the attention), inner and outer (of the feed-forward network); those of
    `norms` are attention and output.
    """

    maps: dict[str, tuple[Blocks, Matrix]]
    norms: dict[str, tuple[Matrix, Matrix]]


@dataclass(frozen=True, slots=True)
class Network:
    """A BERT: what a token begins as, and its layers. `words` gives rows of the word embedding, (n, dim), by id."""

    words: Callable[[NDArray[np.int64]], Matrix]
    places: Matrix  # (longest input, dim)
    kind: Matrix  # (dim,), the embedding of token type 0
    norm: tuple[Matrix, Matrix]
    layers: Sequence[Layer]
    n_heads: int
    eps: float


class Bert:
    """A network ready to run. Thread-safe: several threads may encode at once, each of them using `n_threads`."""

    def __init__(self, network: Network, n_threads: int = 1, middle: int | None = None) -> None:
        """
        Build the graph and let ONNX Runtime arrange it, about 0.3 s.

        `middle` is a number of layers after which the token vectors are handed out too.

        Raises:
            RetrievalError: ONNX Runtime refuses it.
        """
        # The layers live on in the session alone.
        self._words, self._places, self._kind = network.words, network.places, network.kind
        self.dim = len(network.kind)
        self._session = _graph(network, middle).session(n_threads)

    def encode(self, rows: Sequence[Sequence[int]], each: Callable[..., None] | None = None) -> Matrix:
        """
        Return the mean of each row's token vectors, (len(rows), dim), of any length; rows must not be empty.

        `each` is handed the token vectors themselves, (len(row), dim), behind the row's number, and behind them those
        of the middle, where there is one.
        """
        out = np.zeros((len(rows), self.dim), np.float32)
        # Batches of like length: padding is work for nothing.
        left = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while left:
            n = 1
            while n < len(left) and (n + 1) * len(rows[left[n]]) <= MAX_BATCH_TOKENS:
                n += 1
            batch, left = left[:n], left[n:]
            found, out[batch] = self._run([rows[i] for i in batch])
            if each is not None:
                for n, i in enumerate(batch):
                    each(i, *(hidden[n, : len(rows[i])] for hidden in found))
        return out

    def _run(self, rows: Sequence[Sequence[int]]) -> tuple[list[Matrix], Matrix]:
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), np.int64)  # (B, T)
        real = np.zeros((len(rows), longest), np.int32)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = row
            real[n, : len(row)] = 1
        words = self._words(ids.reshape(-1)).reshape(*ids.shape, self.dim)
        x = words + self._places[:longest] + self._kind
        found: list[Matrix] = self._session.run(None, {"x": x, "real": real})
        mean: Matrix = (found[0] * real[:, :, None]).sum(1) / real.sum(1, keepdims=True)
        return found, mean.astype(np.float32, copy=False)


def _graph(net: Network, middle: int | None) -> Graph:
    """Return the layers: x (B, T, dim) and real (B, T), 1 or 0 -> hidden (B, T, dim), and that of the `middle`."""
    graph, dim = Graph(), len(net.kind)
    graph.input("x", "float32", ["B", "T", dim])
    graph.input("real", "int32", ["B", "T"])

    def mapped(x: str, blocks: Blocks, bias: Matrix) -> str:
        n_out, n_blocks, _ = blocks.packed.shape
        return graph.node(
            "MatMulNBits", x, blocks.packed, blocks.scales.reshape(-1), "", "", bias,
            K=n_blocks * BLOCK, N=n_out, bits=blocks.bits, block_size=BLOCK, accuracy_level=4, ours=True,
        )  # fmt: skip

    def normed_sum(x: str, added: str, values: tuple[Matrix, Matrix]) -> str:
        return graph.node("SkipLayerNormalization", x, added, *values, epsilon=net.eps, ours=True)

    x = graph.node("LayerNormalization", "x", *net.norm, epsilon=net.eps)
    after = []
    for layer in net.layers:
        q, k, v = (mapped(x, *layer.maps[part]) for part in ("q", "k", "v"))
        seen = graph.node("MultiHeadAttention", q, k, v, "", "real", num_heads=net.n_heads, ours=True)
        x = normed_sum(x, mapped(seen, *layer.maps["out"]), layer.norms["attention"])
        inner = graph.node("Gelu", mapped(x, *layer.maps["inner"]), ours=True)
        x = normed_sum(x, mapped(inner, *layer.maps["outer"]), layer.norms["output"])
        after.append(x)
    for hidden in (x,) if middle is None else (x, after[middle - 1]):
        graph.output(hidden, ["B", "T", dim])
    return graph
