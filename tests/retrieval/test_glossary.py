"""glossary.py: questions term by term in the other language, and what search makes of them in a one-language store."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval.embedder import Embedder, VectorCache
from retrieval.glossary import SHIPPED, Glossary
from retrieval.hybrid import HybridRetriever
from retrieval.index import build_index
from retrieval.load import load_store
from retrieval.passages import Passage
from retrieval.terms import Terms
from retrieval.words import fold, words
from tests.retrieval.conftest import NOW, HashingEmbedder, write_store

Build = Callable[..., HybridRetriever]


def gloss(query: str, glossary: Glossary = SHIPPED) -> str:
    found = glossary.gloss(query)
    return "" if found is None else found.apart


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("请问怎么退货啊？", "how return"),
        ("發票抬頭寫錯了怎麼辦", "invoice title write wrong what should i do"),  # traditional characters
        ("ＱＨ1001 有货吗", "qh1001 in stock"),
        ("coupon怎么用", "coupon how use"),
        ("打7折", "30% off"),
        ("满300减50能叠加吗", "spend 300 save 50 can combine"),
        ("How do I return an item?", "怎么 退货 东西"),
        ("My parcel hasn't arrived yet", "我 包裹 没收到 还没"),
        ("My parcels haven’t arrived", "我 包裹 没收到"),
        ("returning two lamps", "退货 二 灯"),  # forms of the terms
        ("is there 30% off today", "7 折 今天"),
        ("50 off 300", "满 300 减 50"),
        ("do you ship to Ruritania", "你 寄到 ruritania"),  # what is not known stays, it may be a name
    ],
)
def test_a_question_is_put_term_by_term_into_the_other_language(query: str, expected: str) -> None:
    said = gloss(query).split()
    assert [term for term in said if term in expected.split()] == expected.split()


@pytest.mark.parametrize("query", ["", "   ", "？！", "😀", "Zanzibar", "魑魅魍魉"])
def test_a_question_without_a_known_term_has_no_gloss(query: str) -> None:
    assert SHIPPED.gloss(query) is None


def test_the_longest_term_wins_and_few_terms_beat_many() -> None:
    glossary = Glossary([(["发票"], ["invoice"]), (["抬头"], ["title"]), (["发票抬头"], ["billing name"])])
    assert gloss("发票抬头", glossary) == "billing name"
    assert gloss("抬头和发票", glossary) == "title invoice"
    # Leaving a character out costs more than one term more.
    cut = Glossary([(["上门"], ["door"]), (["门店"], ["shop"]), (["马上"], ["at once"])])
    assert gloss("马上门店", cut) == "at once shop"


def test_other_readings_are_kept_for_the_words_and_left_out_terms_leave_nothing() -> None:
    glossary = Glossary([([""], ["the", "of"]), (["退货", "退回"], ["return", "send back"]), (["请问"], ["", "hi"])])
    found = glossary.gloss("请问退货")
    assert found is not None
    assert (found.text, found.lang) == ("return", "en")
    assert [(slot.shown, slot.meant, slot.others) for slot in found.slots] == [
        ("return", ("send back",), (("send", "back"),))
    ]
    assert gloss("the return of the", glossary) == "退货"


def test_a_stores_own_terms_in_both_languages_come_before_the_shipped_ones() -> None:
    own = SHIPPED.with_own([("暖阳灯", "sunbeam", "SB-1"), ("运费", "邮费"), ("被子", "cloud quilt")])
    assert "sunbeam" in gloss("暖阳灯多少钱", own)
    assert "暖阳灯" in gloss("how much is the Sunbeam", own)
    assert "cloud quilt" in gloss("被子怎么洗", own)
    assert "return" in gloss("怎么退货", own)
    assert SHIPPED.with_own([("运费", "邮费")]) is SHIPPED


def test_every_line_of_the_shipped_table_has_chinese_on_its_left_and_english_on_its_right() -> None:
    table = Path(__file__).parents[2] / "retrieval" / "glossary.txt"
    for place, line in enumerate(table.read_text("utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        assert line.count("=") == 1, f"line {place}: {line}"
        zh, en = ([term.strip() for term in side.split("|")] for side in line.split("="))
        assert any(zh) or any(en), f"line {place}"
        for term in zh:
            assert term.isascii() is (term in ("", "APP")), f"line {place}: {term}"
            assert fold(term) == term.lower(), f"line {place}: {term}"
        for term in en:
            assert term.isascii(), f"line {place}: {term}"


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, build: Build, model: Embedder) -> dict[str, HybridRetriever]:
    passages = load_store(write_store(tmp_path_factory.mktemp("halves") / "store"))
    return {lang: build([one for one in passages if one.lang == lang], model) for lang in ("zh", "en")}


@pytest.mark.parametrize(
    ("query", "half", "expected"),
    [
        ("邮费要付多少", "en", "f-ship-en"),
        ("东西不想要了能退吗", "en", "f-return-en"),
        ("被子能干洗吗", "en", "QH1001-en"),
        ("信用卡退款要几天到账", "en", "returns.en#bank-cards"),
        ("what does postage cost", "zh", "f-ship-zh"),
        ("I want to send it back", "zh", "f-return-zh"),
        ("where is my receipt for expenses", "zh", "f-invoice-zh"),
        ("how much is the duvet", "zh", "QH1001-zh"),
    ],
)
def test_a_store_of_one_language_is_searched_in_the_other(
    halves: dict[str, HybridRetriever], query: str, half: str, expected: str
) -> None:
    assert halves[half].search(query, 1, now=NOW)[0].passage.id == expected


def test_the_explanation_shows_the_gloss_and_the_words_it_shares(halves: dict[str, HybridRetriever]) -> None:
    found = halves["en"].explain("怎么退货", 1, now=NOW)
    assert found.gloss == "how return"
    assert "return" in [word for word, _ in found.hits[0].words]
    assert sum(found.hits[0].parts.values()) == pytest.approx(found.hits[0].hit.score, abs=1e-5)
    assert found.hits[0].features["other_lang"] == 1.0
    assert found.hits[0].features["coverage"] > 0


def faqs(faq: Callable[..., Passage], *langs: str) -> list[Passage]:
    texts = {"zh": ("怎么退货？", "七天内可以。"), "en": ("How do I return an item?", "Within seven days.")}
    return [faq(f"back-{lang}", texts[lang][0], answer=texts[lang][1], lang=lang) for lang in langs]


def test_only_where_a_translation_lacks_is_a_question_embedded_twice(
    build: Build, hashing: HashingEmbedder, faq: Callable[..., Passage]
) -> None:
    both, chinese = build(faqs(faq, "zh", "en"), hashing), build(faqs(faq, "zh"), hashing)
    hashing.embedded.clear()
    both.search("how can I return this", 1, now=NOW)
    both.search("这个怎么退", 1, now=NOW)
    chinese.search("这个怎么退", 1, now=NOW)
    assert hashing.embedded == ["how can I return this", "这个怎么退", "这个怎么退"]
    hashing.embedded.clear()
    hit = chinese.search("how can I return this", 1, now=NOW)[0]
    assert (hit.passage.id, len(hashing.embedded)) == ("back-zh", 2)
    assert fold(hashing.embedded[1]).startswith("怎么")


def test_a_document_in_both_languages_needs_no_gloss_however_it_is_cut(
    build: Build, hashing: HashingEmbedder, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store")
    for file in store.glob("*.csv"):
        file.unlink()
    (store / "policies" / "returns.zh.md").write_text("# 退货\n七天。\n\n## 条件\n没用过。\n", "utf-8")
    (store / "policies" / "returns.en.md").write_text("# Returns\nSeven days.\n", "utf-8")
    retriever = build(load_store(store), hashing)
    hashing.embedded.clear()
    retriever.search("can I return it", 1, now=NOW)
    assert len(hashing.embedded) == 1


def test_the_stores_own_terms_reach_its_other_language(hashing: HashingEmbedder, faq: Callable[..., Passage]) -> None:
    passages = [faq("a-zh", "暖阳灯怎么换灯泡？", answer="拧下来。", lang="zh"), *faqs(faq, "zh")]
    cache = VectorCache(None)
    index = build_index(passages, hashing, cache)
    cache.close()
    found = HybridRetriever(index, hashing, terms=Terms([("暖阳灯", "sunbeam")])).explain("sunbeam bulb", 1, now=NOW)
    assert found.hits[0].hit.passage.id == "a-zh"
    assert "暖阳灯" in found.gloss


@pytest.mark.parametrize(
    "query", ["退" * 2_000, "return " * 285, "的" * 2_000, "a1b2-" * 400, "'" * 2_000, "打满减折%" * 400]
)
def test_a_long_question_is_put_across_in_the_time_of_a_reply(query: str) -> None:
    began = time.process_time()
    SHIPPED.gloss(query)
    words(gloss(query))
    assert time.process_time() - began < 2  # quadratic steps take minutes
