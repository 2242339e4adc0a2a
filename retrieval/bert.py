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
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, OperatorSetIdProto, TensorProto, helper

from retrieval.encoders import Matrix
from retrieval.errors import RetrievalError

BLOCK = 32  # values that share a scale
MAX_BATCH_TOKENS = 2048  # of one run, padding included: 12 MB of the widest activations
_OURS = "com.microsoft"  # the domain of ONNX Runtime's own operators


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

    def __init__(self, network: Network, n_threads: int = 1) -> None:
        """
        Build the graph and let ONNX Runtime arrange it, about 0.3 s.

        Raises:
            RetrievalError: ONNX Runtime refuses it.
        """
        # The layers live on in the session alone.
        self._words, self._places, self._kind = network.words, network.places, network.kind
        self.dim = len(network.kind)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        options.inter_op_num_threads = 1
        # A thread that spins takes a core from vLLM.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(_graph(network), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # its exceptions share no base but this one
            raise RetrievalError(f"ONNX Runtime refuses the encoder: {' '.join(str(exc).split())[:300]}") from exc

    def encode(self, rows: Sequence[Sequence[int]]) -> Matrix:
        """Return the mean of each row's token vectors, (len(rows), dim), of any length; rows must not be empty."""
        out = np.zeros((len(rows), self.dim), np.float32)
        # Batches of like length: padding is work for nothing.
        left = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while left:
            n = 1
            while n < len(left) and (n + 1) * len(rows[left[n]]) <= MAX_BATCH_TOKENS:
                n += 1
            batch, left = left[:n], left[n:]
            out[batch] = self._run([rows[i] for i in batch])
        return out

    def _run(self, rows: Sequence[Sequence[int]]) -> Matrix:
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), longest), np.int64)  # (B, T)
        real = np.zeros((len(rows), longest), np.int32)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = row
            real[n, : len(row)] = 1
        words = self._words(ids.reshape(-1)).reshape(*ids.shape, self.dim)
        x = words + self._places[:longest] + self._kind
        hidden: Matrix = self._session.run(None, {"x": x, "real": real})[0]
        mean: Matrix = (hidden * real[:, :, None]).sum(1) / real.sum(1, keepdims=True)
        return mean.astype(np.float32, copy=False)


def _graph(net: Network) -> bytes:
    """Return the layers as an ONNX model: x (B, T, dim) and real (B, T), 1 or 0 -> hidden (B, T, dim)."""
    # The versions that ONNX Runtime of the lock reads; its own operators have version 1.
    versions = [OperatorSetIdProto(domain="", version=18), OperatorSetIdProto(domain=_OURS, version=1)]
    model = ModelProto(ir_version=9, opset_import=versions)
    graph = model.graph  # filled in place: onnx.helper copies all weights three times

    def constant(name: str, value: NDArray[np.generic]) -> str:
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        graph.initializer.add(name=name, data_type=kind, dims=value.shape, raw_data=value.tobytes())
        return name

    def node(operator: str, inputs: list[str], output: str, *, ours: bool = True, **attributes: Any) -> str:
        domain = _OURS if ours else ""
        graph.node.append(helper.make_node(operator, inputs, [output], domain=domain, **attributes))
        return output

    def norm(name: str, inputs: list[str], values: tuple[Matrix, Matrix]) -> str:
        inputs = [*inputs, constant(f"{name}.gain", values[0]), constant(f"{name}.bias", values[1])]
        if len(inputs) == 3:
            return node("LayerNormalization", inputs, name, ours=False, epsilon=net.eps)
        return node("SkipLayerNormalization", inputs, name, epsilon=net.eps)  # of the sum of the first two

    def mapped(name: str, x: str, blocks: Blocks, bias: Matrix) -> str:
        n_out, n_blocks, _ = blocks.packed.shape
        inputs = [x, constant(f"{name}.w", blocks.packed), constant(f"{name}.s", blocks.scales.reshape(-1)), "", ""]
        inputs.append(constant(f"{name}.b", bias))
        return node(
            "MatMulNBits", inputs, name,
            K=n_blocks * BLOCK, N=n_out, bits=blocks.bits, block_size=BLOCK, accuracy_level=4,
        )  # fmt: skip

    x = norm("norm", ["x"], net.norm)
    for n, layer in enumerate(net.layers):
        q, k, v = (mapped(f"{n}.{part}", x, *layer.maps[part]) for part in ("q", "k", "v"))
        seen = node("MultiHeadAttention", [q, k, v, "", "real"], f"{n}.seen", num_heads=net.n_heads)
        x = norm(f"{n}.attention", [x, mapped(f"{n}.out", seen, *layer.maps["out"])], layer.norms["attention"])
        inner = node("Gelu", [mapped(f"{n}.inner", x, *layer.maps["inner"])], f"{n}.gelu")
        x = norm(f"{n}.output", [x, mapped(f"{n}.outer", inner, *layer.maps["outer"])], layer.norms["output"])
    dim = len(net.kind)
    graph.name = "encoder"
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", dim]))
    graph.input.append(helper.make_tensor_value_info("real", TensorProto.INT32, ["B", "T"]))
    graph.output.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, ["B", "T", dim]))
    written: bytes = model.SerializeToString()
    return written
