"""
Which part of a message is its question: the talk around it ("hi, I'm Emily", "在线等") is not searched for.

A visitor says who they are, how they came here and that it is urgent. No passage says any of that, so each such word
takes from a vector, from the share of words found and from how sure a hit looks (docs/experiments.md). A small network
reads each token's vector, as the encoder made it halfway anyway, and says how surely it is part of the question with
all its circumstances; kept is the stretch of text where the sum of that is highest. The weights are `gist.safetensors`,
made by examples/training/gist.py. Knows arrays and one text; knows neither models nor passages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.encoders import Matrix, load_by_encoder
from retrieval.errors import RetrievalError

SHIPPED = Path(__file__).with_name("gist.safetensors")
KEEP = 1.0  # added to each token's logit: losing a word of the question costs more than keeping one of the talk
SURE = 3.0  # that what is cut is talk: minus the mean logit of its tokens
CUT_AT_MARK, CUT_AT_SPACE, CUT_WITHIN = 2.0, 4.0, 5.0  # what a cut has to win; within: between two characters
EPS = 1e-5
_AROUND = " \t\r\n,，.。!！~～、:：;；-—…"  # what a cut leaves hanging; a question mark stays


class Gist:
    """The network. Thread-safe."""

    def __init__(self, tensors: Mapping[str, NDArray[np.generic]]) -> None:
        """
        Take the tensors that examples/training/gist.py writes.

        Raises:
            RetrievalError: one is missing or has another shape.
        """
        try:
            values = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
            self._norm = values["norm.weight"], values["norm.bias"]
            self._inner = values["inner.weight"].T.copy(), values["inner.bias"]
            n_layers = 1 + max(int(name.split(".")[1]) for name in values if name.startswith("beside."))
            beside = [(values[f"beside.{n}.weight"], values[f"beside.{n}.bias"]) for n in range(n_layers)]
            # (n_out, n_in, size) -> (size · n_in, n_out), one product for all of a text's tokens.
            self._beside = [(w.shape[2], w.transpose(2, 1, 0).reshape(-1, len(w)), bias) for w, bias in beside]
            self._outer = values["outer.weight"][0], values["outer.bias"]
            self.logits(np.zeros((1, len(self._norm[0])), np.float32))
        except (KeyError, ValueError, IndexError) as exc:
            raise RetrievalError(f"the weights that find a question are not what was written: {exc}") from exc

    def logits(self, tokens: Matrix) -> Matrix:
        """Return how surely each of a text's tokens, vectors after layer FROM_LAYER (n, dim), is of the question."""
        centred = tokens - tokens.mean(axis=1, keepdims=True)
        normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPS)
        x = _gelu((normed * self._norm[0] + self._norm[1]) @ self._inner[0] + self._inner[1])
        for size, weight, bias in self._beside:  # each token and those beside it
            padded = np.zeros((len(x) + size - 1, x.shape[1]), np.float32)
            padded[size // 2 : size // 2 + len(x)] = x
            seen = np.concatenate([padded[n : n + len(x)] for n in range(size)], axis=1)
            x = x + _gelu(seen @ weight + bias)
        found: Matrix = x @ self._outer[0] + self._outer[1]
        return found


def gist_of(text: str, places: Sequence[int], logits: Matrix) -> str:
    """
    Return the part of `text` that is its question; all of it where nothing but punctuation is around that.

    It is "" where all of it is surely talk.

    Args:
        places: where each token begins, in characters.
        logits: of these tokens.
    """
    if not len(places):
        return text
    logits = np.asarray(logits, np.float64)
    if logits.mean() < -SURE and logits.max() < 0:
        return "" if any(map(str.isalnum, text)) else text
    costs = [0.0, *(_cost(text, at) for at in places[1:]), 0.0]
    first, last = _best_run((logits + KEEP).tolist(), costs)
    if logits[first:last].sum() <= -KEEP * (last - first):  # nothing of it is a question
        return text
    if first and logits[:first].mean() > -SURE:
        first = 0
    if last < len(logits) and logits[last:].mean() > -SURE:
        last = len(logits)
    begin, end = places[first], (*places, len(text))[last]
    while _splits_word(text, begin):
        begin -= 1
    while _splits_word(text, end):
        end += 1
    core = text[begin:end].strip(_AROUND)
    left = f"{text[:begin]}{text[end:]}".strip(f"{_AROUND}?？")
    return core if left and any(map(str.isalnum, core)) else text


def _best_run(values: Sequence[float], costs: Sequence[float]) -> tuple[int, int]:
    """Return the slice of `values` with the highest sum after the `costs` (len(values) + 1,) of its two ends."""
    best, found, total = -math.inf, (0, len(values)), 0.0
    lead, start = -math.inf, 0  # the best beginning up to here: minus what is left out before it and what it costs
    for n, cost in enumerate(costs):
        if total - cost + lead > best:
            best, found = total - cost + lead, (start, n)
        if -total - cost > lead:
            lead, start = -total - cost, n
        if n < len(values):
            total += values[n]
    return found


def _cost(text: str, at: int) -> float:
    """Return what a cut of `text` at a place within it costs; the less it stands out there, the more."""
    if text[at - 1].isalnum() and text[at].isalnum():
        return CUT_WITHIN
    before, after = text[:at].rstrip()[-1:], text[at:].lstrip()[:1]
    return CUT_AT_SPACE if before.isalnum() and after.isalnum() else CUT_AT_MARK


def _splits_word(text: str, at: int) -> bool:
    """Return whether a word in Latin letters or a number goes on across the place `at`."""
    return 0 < at < len(text) and all(c.isascii() and (c.isalnum() or c == "'") for c in text[at - 1 : at + 1])


def _gelu(x: Matrix) -> Matrix:
    # The approximation by tanh; what it differs by is a thousandth.
    found: Matrix = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return found


def load_gist(encoders: str, path: Path = SHIPPED) -> Gist:
    """
    Return the shipped network.

    `encoders` is the checksum of what the encoders were tuned by (encoders.py).

    Raises:
        RetrievalError: the file is missing or not one of ours, or was trained over other encoders.
    """
    what = "the weights that find a question"
    by_encoder, _ = load_by_encoder(path, what, trained_over=encoders, made_by="make default-gist")
    return Gist(by_encoder.get("e5", {}))
