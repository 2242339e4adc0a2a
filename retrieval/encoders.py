"""
What the shipped encoders were tuned by: `encoders.safetensors`, made by examples/training/tune.py.

Per encoder ("e5", "minilm") what is added to its biases and layer norms. Knows the file alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from retrieval.errors import RetrievalError

SHIPPED = Path(__file__).with_name("encoders.safetensors")

Moves = dict[str, NDArray[np.float32]]  # tensor -> what is added to it


def load_moves(path: Path = SHIPPED) -> tuple[dict[str, Moves], str]:
    """
    Return the moves of each encoder by its name, and a short checksum of them for the name of its vectors.

    Raises:
        RetrievalError: the file is missing or not one of ours; the package is broken.
    """
    try:
        data = path.read_bytes()
        tensors = load(data)
    except (OSError, SafetensorError) as exc:
        raise RetrievalError(f"what the encoders were tuned by cannot be read: {exc}") from exc
    moves: dict[str, Moves] = {}
    for name, move in tensors.items():
        encoder, _, tensor = name.partition("/")
        moves.setdefault(encoder, {})[tensor] = move.astype(np.float32)
    return moves, hashlib.sha256(data).hexdigest()[:8]
