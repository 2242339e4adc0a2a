"""`search --explain`: every reason for a hit's place, and what was left out, through the command and the retriever."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from retrieval.confidence import NAMES
from retrieval.hybrid import HybridRetriever
from retrieval.passages import Passage
from tests.retrieval.conftest import NOW, HashingEmbedder
from tests.retrieval.in_process import retrieval

Build = Callable[..., HybridRetriever]


@pytest.fixture
def shop(build: Build, hashing: HashingEmbedder, faq: Callable[..., Passage]) -> HybridRetriever:
    day = timedelta(days=1)
    promotion = {"lang": "en", "source": "promotions.csv:2"}
    return build(
        [
            faq("ship-zh", "运费是多少？", "包邮吗", answer="满¥99包邮。", lang="zh"),
            faq("ship-en", "How much is shipping?", "postage cost", answer="¥8, free from ¥99."),
            faq("back-en", "How do I return an item?", "send it back", answer="Within 7 days."),
            Passage("over", "promotion", "Tea week", "Tea 30% off. TEA30", valid_until=NOW - day, **promotion),  # type: ignore[arg-type]
            Passage("soon", "promotion", "Tea month", "Tea 20% off.", valid_from=NOW + day, **promotion),  # type: ignore[arg-type]
            Passage("on", "promotion", "Tea day", "Tea 10% off.", **promotion),  # type: ignore[arg-type]
        ],
        hashing,
    )


@pytest.mark.parametrize(
    "query", ["postage cost", "包邮", "tea off", "retrun it", "how much", "QH1001", "What is shipping", "？"]
)
def test_the_parts_add_up_to_the_score_and_the_hits_are_those_of_search(shop: HybridRetriever, query: str) -> None:
    for lang in (None, "zh", "en"):
        found = shop.explain(query, 4, now=NOW, lang=lang)
        assert [why.hit for why in found.hits] == shop.search(query, 4, now=NOW, lang=lang)
        for why in found.hits:
            assert sum(why.parts.values()) == pytest.approx(why.hit.score, abs=1e-5)
            assert list(why.features) == list(NAMES)
            if why.logit:
                logit = sum(why.logit.values())
                assert 1 / (1 + 2.718281828**-logit) == pytest.approx(why.hit.confidence, abs=1e-3)


def test_what_is_not_on_is_named_with_why_and_when(shop: HybridRetriever) -> None:
    left_out = {one.passage.id: one for one in shop.explain("tea week 30% off", 2, now=NOW).left_out}
    assert (left_out["over"].why, left_out["over"].since) == ("ended", NOW - timedelta(days=1))
    assert (left_out["soon"].why, left_out["soon"].next_on) == ("not begun", NOW + timedelta(days=1))
    kinds = {one.passage.id: one.why for one in shop.explain("tea day", 3, now=NOW, kinds=("faq",)).left_out}
    assert kinds["on"] == "kind"
    folded = [one for one in shop.explain("postage cost", 3, now=NOW).left_out if one.why == "translation"]
    assert [(one.passage.id, one.instead) for one in folded] == [("ship-zh", "ship-en")]


def test_only_what_would_have_stood_among_the_hits_is_left_out(shop: HybridRetriever) -> None:
    found = shop.explain("how do I return an item?", 1, now=NOW)
    assert (found.hits[0].hit.passage.id, found.left_out) == ("back-en", ())
    offers = shop.explain("tea off", 1, now=NOW)
    assert offers.left_out
    assert all(one.score >= offers.hits[-1].hit.score for one in offers.left_out)


def test_how_the_question_was_read_and_which_words_nobody_wrote(shop: HybridRetriever) -> None:
    found = shop.explain("retrun a drone", 1, now=NOW)
    assert [(slot.shown, slot.meant, slot.why) for slot in found.read_as] == [("retrun", ("return",), "typo")]
    assert set(found.unknown) == {"retrun", "dron"}
    assert found.hits[0].words[0][0] == "retrun"


def test_the_command_explains_in_json_and_for_people(store: Path, tmp_path: Path) -> None:
    cache = ("--cache", tmp_path / "cache")
    search = ("search", "--store", store, "LIGHT30", "--at", "2026-11-22T12:00", "-k", "2", "--explain", *cache)
    found = json.loads(retrieval(*search, "--json").stdout)
    first = found["hits"][0]
    assert [len(found["hits"]), found["thresholds"]["direct"]] == [2, 0.5]
    assert found["verdict"] == first["explain"]["verdict"] in ("direct", "answer", "near", "no answer")
    assert sum(first["explain"]["parts"].values()) == pytest.approx(first["score"], abs=1e-5)
    assert set(first["explain"]) == {"parts", "score", "wording", "words", "features", "logit", "verdict"}
    assert (found["left_out"][0]["id"], found["left_out"][0]["why"]) == ("p-lamp-en", "not begun")
    assert found["left_out"][0]["next_on"] == "2026-12-20T10:00:00+08:00"
    page = retrieval(*search, "--direct", "0.7").stdout
    assert "Cut-off: quoted from 0.70, answered from 0.25" in page
    assert "p-lamp-en  Lamp festival: has not begun, on from 2026-12-20 10:00 (+0800)" in page
    assert "in the visitor's language" in page
    assert "must be from 0 to 1" in retrieval(*search, "--direct", "7", status=2).stderr


def test_an_empty_question_has_nothing_to_explain(shop: HybridRetriever) -> None:
    found = shop.explain("  ", 3, now=datetime(2026, 1, 1, tzinfo=UTC))
    assert (found.hits, found.left_out) == ((), ())
