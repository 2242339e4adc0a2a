"""
How sure a hit is: a small logistic model over what is known at query time. Pure, but for reading `calibration.json`.

Knows the features and the coefficients; knows neither passages nor how scores come about. The coefficients are fitted
by `python -m retrieval calibrate` on public data (retrieval/calibrate.py) and shipped; a store fits nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

EXACT = 0.99
RIVAL = -2.0  # added to a rival's logit before it counts, where nothing was fitted
N_FIRST = 3  # the first hits, which are each other's rivals
SHIPPED = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True, slots=True)
class Features:
    """What tells a right hit from the best of the wrong ones; each about 0 to 1, or a z-score over 5."""

    body: float  # centred cosine of the passage as a whole, in [-1, 1]; 0 is unrelated
    wording: float  # centred cosine of its best wording
    standout: float  # z-score of its fused score among the candidates of this query, over 5
    margin: float  # fused score above the best other passage (no translation of this one), in [-1, 1]
    coverage: float  # weighted share of the query's words that the passage has, in [0, 1]
    exact: float  # 1 where the query is one of the passage's wordings, letter for letter
    code: float  # 1 where the query names the passage's article number or coupon code
    brevity: float  # 1 / (1 + number of words of the query): short queries say little
    other_lang: float  # 1 where the passage is in another language than the query
    learned: float = 0.0  # what the store's tuning says of it (learned.py), about 0 to 1; 0 without one
    learned_lead: float = 0.0  # the same, above the best other passage
    read: float = 0.0  # a tenth of the logit that it answers, read beside the query; 0 where nothing is read
    read_lead: float = 0.0  # the same, above the best other passage

    def values(self) -> tuple[float, ...]:
        """Return the features in the order of their names."""
        found: tuple[float, ...] = _values(self)
        return found


T = TypeVar("T")


def rivals(hits: Sequence[T], place: int) -> list[T]:
    """Return what the hit at `place` has to beat: the first hits but itself, at most N_FIRST - 1, best first."""
    return [hit for other, hit in enumerate(hits[:N_FIRST]) if other != place][: N_FIRST - 1]


NAMES = tuple(field.name for field in fields(Features))
_values = attrgetter(*NAMES)


class Calibration:
    """
    Logistic coefficients, one weight a feature and a bias; and what the embedder's vectors have in common.

    A hit's logit is what its features come to, less log(1 + the sum of exp(logit + `rival`) over its rivals): what
    looks right is likelier to be wrong where others look right too.
    """

    def __init__(
        self,
        weights: dict[str, float],
        bias: float,
        embedder: str = "",
        means: dict[str, list[float]] | None = None,
        plain: Calibration | None = None,
        rival: float = RIVAL,
    ) -> None:
        """`plain` takes its place where nothing is read: other embedders, large stores, questions without answers."""
        self.plain = plain or self
        self.rival = rival
        self.weights = weights
        self.bias = bias
        self.embedder = embedder  # the version whose vectors `means` are of
        self.means = means or {}
        self._ordered = tuple(weights.get(name, 0.0) for name in NAMES)

    def confidence(self, features: Features, others: Iterable[Features] = ()) -> float:
        """Return the probability in [0, 1] that the hit answers the query; `others` are its rivals'."""
        if features.exact:  # the store's own wording; not fitted, as no public set has its questions in the store
            return EXACT
        logit = self._alone(features) - self._taken(others)
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, logit))))

    def terms(self, features: Features, others: Iterable[Features] = ()) -> dict[str, float]:
        """Return what each feature adds to the logit, "bias" and "rivals"; of an exact wording nothing: no fit."""
        if features.exact:
            return {}
        pairs = zip(NAMES, self._ordered, features.values(), strict=True)
        own = {name: coefficient * value for name, coefficient, value in pairs}
        return {"bias": self.bias} | own | {"rivals": -self._taken(others)}

    def _alone(self, features: Features) -> float:
        """Return the logit without regard to rivals."""
        pairs = zip(self._ordered, features.values(), strict=True)
        return self.bias + sum(coefficient * value for coefficient, value in pairs)

    def _taken(self, others: Iterable[Features]) -> float:
        """Return what rivals take from a logit."""
        return math.log1p(sum(math.exp(min(30.0, self._alone(other) + self.rival)) for other in others))

    def mean(self, embedder: str, role: str, lang: str) -> NDArray[np.float32] | None:
        """Return the mean vector (dim,) of many "query" or "passage" texts in `lang`; None where it is not known."""
        values = self.means.get(f"{role}-{lang}") if embedder == self.embedder else None
        return None if values is None else np.array(values, dtype=np.float32)


def load_calibration(path: Path = SHIPPED) -> Calibration:
    """
    Return the coefficients in `path`.

    Raises:
        OSError, ValueError, KeyError: the file is missing or not one of ours; the package is broken.
    """
    entry = json.loads(path.read_text("utf-8"))

    def fitted(part: dict[str, Any], plain: Calibration | None) -> Calibration:
        weights = {name: float(part["weights"].get(name, 0.0)) for name in NAMES}
        means, rival = entry.get("means"), float(part.get("rival", RIVAL))
        return Calibration(weights, float(part["bias"]), entry.get("embedder", ""), means, plain, rival)

    return fitted(entry, fitted(entry["plain"], None) if "plain" in entry else None)
