"""confidence.py and calibrate.py: the fit on made-up hits; the shipped coefficients are sane."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from retrieval.calibrate import Examples, fit, problems
from retrieval.confidence import NAMES, Features, load_calibration
from retrieval.errors import BadStore
from tests.retrieval.conftest import HashingEmbedder


def features(body: float, **rest: float) -> Features:
    given = dict.fromkeys(NAMES, 0.0) | {"body": body, "wording": body} | rest
    return Features(**given)


def test_the_fit_finds_the_feature_that_tells() -> None:
    chance = np.random.default_rng(3)
    rows = chance.uniform(0, 1, (500, len(NAMES)))
    rows[:, NAMES.index("exact")] = 0
    hits = [Features(*row) for row in rows.tolist()]
    fitted = fit([Examples.of(([hit], [hit.body > 0.5]) for hit in hits)])
    assert fitted.weights["body"] > 5
    assert fitted.confidence(features(0.9)) > 0.8 > 0.2 > fitted.confidence(features(0.1))


def test_what_looks_right_is_doubted_where_another_looks_right_too_as_far_as_the_examples_say() -> None:
    chance = np.random.default_rng(4)
    bodies = chance.uniform(0, 1, (2000, 2))
    bodies[:, 1] = np.minimum(bodies[:, 1], bodies[:, 0])
    asked = [[features(first), features(second)] for first, second in bodies.tolist()]
    # Where both look right one of them is, by chance; or both are.
    heads = (chance.random(2000) < 0.5).tolist()
    one = [
        [hits[0].body > 0.5 and (hits[1].body <= 0.5 or luck), False] for hits, luck in zip(asked, heads, strict=True)
    ]
    both = [[hit.body > 0.5 for hit in hits] for hits in asked]
    sure, unsure = fit([Examples.of(zip(asked, both, strict=True))]), fit([Examples.of(zip(asked, one, strict=True))])
    for fitted, kept in ((sure, 0.95), (unsure, 0.4)):
        alone, rivalled = (fitted.confidence(features(0.9), [features(body)]) for body in (0.1, 0.9))
        assert alone > 0.9
        assert kept - 0.15 < rivalled / alone < kept + 0.25
    assert sum(unsure.terms(features(0.9), [features(0.9)]).values()) == pytest.approx(
        math.log(1 / (1 / unsure.confidence(features(0.9), [features(0.9)]) - 1))
    )


def test_the_shipped_confidence_rises_with_likeness_margin_and_coverage() -> None:
    both = load_calibration()
    for shipped, unread in ((both.plain, {}), (both, {"read": -0.5, "read_lead": -0.3})):
        weak = shipped.confidence(features(0.1, **unread))
        strong = shipped.confidence(features(0.8, margin=0.3, coverage=0.9, standout=0.8, **dict.fromkeys(unread, 0.3)))
        assert weak < 0.15
        assert strong > 0.8
        assert shipped.confidence(features(0.1, exact=1.0)) > 0.95
        # What is read is most of the confidence: hopeless is what is read so.
        hopeless = dict.fromkeys(unread, -1.0)
        assert 0 <= shipped.confidence(features(-1, margin=-1, **hopeless)) < 0.01


def test_the_shipped_means_are_of_the_shipped_embedder_only() -> None:
    shipped = load_calibration()
    mean = shipped.mean(shipped.embedder, "query", "zh")
    assert mean is not None
    assert mean.shape == (768,)
    assert shipped.mean(HashingEmbedder().version, "query", "zh") is None


def test_without_data_it_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(BadStore, match="--data"):
        problems(tmp_path)
