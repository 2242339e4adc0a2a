"""vectors.py and candidates.py: what is found by lists, masks and pruned postings against looking at everything."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from retrieval.candidates import N_DENSE, N_LEXICAL, find_candidates
from retrieval.embedder import VectorCache
from retrieval.index import build_index
from retrieval.lexical import Lexical
from retrieval.passages import Passage
from retrieval.vectors import LocalVectors
from tests.retrieval.conftest import HashingEmbedder


def clustered(n: int, dim: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    spread = np.arange(1, dim + 1) ** -0.5
    centres = chance.standard_normal((n // 50, dim)) * spread
    made = centres[chance.integers(n // 50, size=n + 100)] + 0.6 * spread * chance.standard_normal((n + 100, dim))
    made = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    return made[:n], made[n:]


@pytest.mark.parametrize("half_units", [100_000, 5_000])
def test_lists_find_what_looking_at_everything_finds(monkeypatch: pytest.MonkeyPatch, half_units: int) -> None:
    monkeypatch.setattr("retrieval.vectors.HALF_UNITS", half_units)
    vectors, queries = clustered(12_000)
    zh = np.arange(len(vectors)) % 3 == 0
    index = LocalVectors.build(vectors, zh)
    again = LocalVectors.build(vectors, zh)
    assert index.kind == "lists"
    chance = np.random.default_rng(1)
    for side in ("zh", "en"):
        units = index.units_of(side)
        for share in (None, 0.5, 0.1, 0.001):
            allowed = None if share is None else chance.random(len(units)) < share
            may = units if allowed is None else units[allowed]
            n_right = n_all = 0
            for query in queries:
                cosines, found = index.nearest(query, side, allowed, 160)
                assert np.isin(found, may).all()
                assert len(found) == min(160, len(may))
                assert (np.diff(cosines) <= 0).all()
                assert np.allclose(cosines, vectors[found] @ query, atol=1e-3)
                assert np.array_equal(again.nearest(query, side, allowed, 160)[1], found)
                best = may[np.argsort(-(vectors[may] @ query))[:10]]
                n_right, n_all = n_right + len(np.intersect1d(found[:10], best)), n_all + len(best)
            assert n_right / max(n_all, 1) >= 0.97


def test_the_candidates_are_those_of_looking_at_everything(
    faq: Callable[..., Passage], hashing: HashingEmbedder
) -> None:
    chance = np.random.default_rng(2)
    letters = "运费退货发票优惠订单尺码" * 2
    passages = []
    for n in range(600):
        zh = n % 2 == 0
        text = (
            "".join(chance.choice(list(letters), 6))
            if zh
            else " ".join(chance.choice(["ship", "pay", "tea", "pan"], 4))
        )
        # Each its own, or equals at the cut could be left out by one way and not by the other.
        own = "".join(chr(97 + value) for value in chance.integers(26, size=9))
        passages.append(faq(f"f{n}", f"{text} {own} {n % 7}", answer=own[::-1], lang="zh" if zh else "en"))
    cache = VectorCache(None)
    index = build_index(passages, hashing, cache)
    cache.close()
    for query in ("运费 3", "ship tea", "退货 ship", "7", "发票优惠", "???"):
        for allowed in (np.ones(600, dtype=bool), chance.random(600) < 0.4, np.arange(600) < 3):
            raw = hashing.embed_queries([query])[0]
            placed = index.place(raw, query)
            cosines = index.cosines(placed, np.arange(len(index.units)))
            near: set[int] = set()
            for side in (True, False):
                units = np.flatnonzero(allowed[index.owners] & (index.sides == side))
                near |= set(index.owners[units[np.argsort(-cosines[units], kind="stable")[:N_DENSE]]].tolist())
            lexical, most = index.lexical.score(query)
            by_words = np.argsort(np.where(allowed, lexical, 0), kind="stable")[::-1][:N_LEXICAL].tolist()
            expected = sorted(n for n in near | set(by_words) if allowed[n] and (n in near or lexical[n] > 0))
            found = find_candidates(index, query, raw, placed, allowed)
            assert found.owners.tolist() == expected
            share = np.minimum(lexical[expected] / most, 1) if most else np.zeros(len(expected))
            assert np.allclose(found.coverage, share, atol=1e-5)


def test_pruned_postings_find_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(3)
    vocabulary = [f"w{n}x" for n in range(400)]
    share = 1 / np.arange(1, 401)
    texts = [" ".join(row) for row in chance.choice(vocabulary, (5_000, 12), p=share / share.sum())]
    index = Lexical(texts)
    allowed = chance.random(5_000) < 0.8
    queries = [" ".join(row) for row in chance.choice(vocabulary, (60, 6), p=share / share.sum())]
    expected = [index.query(query).best(allowed, 64) for query in queries]
    monkeypatch.setattr("retrieval.lexical.DENSE_TEXTS", 0)
    monkeypatch.setattr("retrieval.lexical.LONG", 16)
    for query, right in zip(queries, expected, strict=True):
        scores = index.query(query).all()
        found = index.query(query).best(allowed, 64)
        assert allowed[found].all()
        assert np.allclose(np.sort(scores[found]), np.sort(scores[right]), atol=1e-4)
    monkeypatch.setattr("retrieval.lexical.BUDGET", 500)  # not all are looked at: what is found has true scores still
    for query in queries:
        found = index.query(query).best(allowed, 64)
        assert allowed[found].all()
        assert np.allclose(index.query(query).of(found), index.query(query).all()[found], atol=1e-5)
    assert not index.scratch().any()
