"""
What the shipped encoders were tuned by: `encoders.safetensors`, made by examples/training/tune.py.

Per encoder ("e5", "minilm") what is added to its tensors: to biases and layer norms as it is, to a matrix as the
product of two thin ones, `NAME.up` (n_out, rank) and `NAME.down` (rank, n_in). Knows the file alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load

from retrieval.errors import RetrievalError

SHIPPED = Path(__file__).with_name("encoders.safetensors")

Matrix = NDArray[np.float32]


class Moves:
    """What is added to one encoder's tensors, by their names; each may be taken once, so that none is forgotten."""

    def __init__(self, tensors: Mapping[str, Matrix] | None = None) -> None:
        self._left = dict(tensors or {})

    def has(self, name: str) -> bool:
        """Return whether the tensor `name` is moved."""
        return name in self._left or f"{name}.up" in self._left

    def moved(self, name: str, values: Matrix) -> Matrix:
        """
        Return `values`, the tensor `name`, with what is added to it.

        Raises:
            RetrievalError: what is to be added has another shape.
        """
        if f"{name}.up" in self._left:
            up, down = self._left.pop(f"{name}.up"), self._left.pop(f"{name}.down", np.zeros((0, 0), np.float32))
            fits = up.ndim == down.ndim == 2 and (up.shape[0], down.shape[1], up.shape[1]) == (*values.shape, len(down))
            if not fits:
                raise RetrievalError(f"the move of {name} is no product of shape {values.shape}")
            return values + up @ down
        move = self._left.pop(name, None)
        if move is None:
            return values
        if move.shape != values.shape:
            raise RetrievalError(f"the move of {name} has shape {move.shape}, not {values.shape}")
        return values + move

    def check_all_taken(self) -> None:
        """
        Look whether every move has found its tensor.

        Raises:
            RetrievalError: there is one for a tensor that the encoder does not have.
        """
        if self._left:
            raise RetrievalError(f"a move is for {min(self._left)}, which the encoder does not have")


def load_moves(path: Path = SHIPPED) -> tuple[dict[str, Moves], str]:
    """
    Return the moves of each encoder by its name, and a short checksum of them for the name of its vectors.

    Raises:
        RetrievalError: the file is missing or not one of ours; the package is broken.
    """
    by_encoder, checksum = load_by_encoder(path, "what the encoders were tuned by")
    return {name: Moves(moves) for name, moves in by_encoder.items()}, checksum


def load_by_encoder(
    path: Path, what: str, *, trained_over: str | None = None, made_by: str = "make default-reranker"
) -> tuple[dict[str, dict[str, Matrix]], str]:
    """
    Return the tensors named ENCODER/NAME in a shipped file by encoder and name, and its short checksum.

    `what` the file holds is said in errors; `trained_over` is what its "encoders" must say, this file's checksum, and
    `made_by` the command that trains it.

    Raises:
        RetrievalError: the file is missing or is none of tensors, or was trained over other encoders.
    """
    try:
        data = path.read_bytes()
        tensors = load(data)
        over = None
        if trained_over is not None:
            with safe_open(path, "numpy") as file:
                over = (file.metadata() or {}).get("encoders")
    except (OSError, SafetensorError) as exc:
        raise RetrievalError(f"{what} cannot be read: {exc}") from exc
    if over != trained_over:
        raise RetrievalError(f"{what} were trained over other encoders; train them anew: {made_by}")
    by_encoder: dict[str, dict[str, Matrix]] = {}
    for name, tensor in tensors.items():
        encoder, _, rest = name.partition("/")
        by_encoder.setdefault(encoder, {})[rest] = tensor.astype(np.float32)
    return by_encoder, hashlib.sha256(data).hexdigest()[:8]
