"""
Networks written as ONNX graphs and run by ONNX Runtime on the CPU. Knows operators and sessions; knows no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, OperatorSetIdProto, TensorProto, helper

from retrieval.errors import RetrievalError

_OURS = "com.microsoft"  # the domain of ONNX Runtime's own operators
FLOAT = int(TensorProto.FLOAT)  # what `Cast` is told
_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int8": TensorProto.INT8}


class Graph:
    """A graph being written: every call adds to it; a node is known by the name that is returned."""

    def __init__(self) -> None:
        # The versions that ONNX Runtime of the lock reads; its own operators have version 1.
        versions = [OperatorSetIdProto(domain="", version=18), OperatorSetIdProto(domain=_OURS, version=1)]
        self._model = ModelProto(ir_version=9, opset_import=versions)
        self._graph = self._model.graph  # filled in place: onnx.helper copies all weights three times
        self._graph.name = "network"
        self._n = 0

    def _named(self) -> str:
        self._n += 1
        return f"_{self._n}"

    def input(self, name: str, kind: str, shape: Sequence[str | int]) -> None:
        """Declare an input of `kind` "float32", "int32" or "int8"; a text in its shape is a size that varies."""
        self._graph.input.append(helper.make_tensor_value_info(name, _TYPES[kind], shape))

    def output(self, name: str, shape: Sequence[str | int]) -> None:
        """Say that `name`, float32, is what a run returns next."""
        self._graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def _constant(self, value: NDArray[np.generic]) -> str:
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        name = self._named()
        self._graph.initializer.add(name=name, data_type=kind, dims=value.shape, raw_data=value.tobytes())
        return name

    def node(self, operator: str, *inputs: str | NDArray[np.generic], ours: bool = False, **attributes: Any) -> str:
        """Add an operator of ONNX, or with `ours` of ONNX Runtime, on names and constants."""
        names = [one if isinstance(one, str) else self._constant(one) for one in inputs]
        name = self._named()
        made = helper.make_node(operator, names, [name], domain=_OURS if ours else "", **attributes)
        self._graph.node.append(made)
        return name

    def session(self, n_threads: int) -> onnxruntime.InferenceSession:
        """
        Return it ready to run.

        Raises:
            RetrievalError: ONNX Runtime refuses it.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        options.inter_op_num_threads = 1
        # A thread that spins takes a core from vLLM.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(
                self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as exc:  # its exceptions share no base but this one
            raise RetrievalError(f"ONNX Runtime refuses the network: {' '.join(str(exc).split())[:300]}") from exc
