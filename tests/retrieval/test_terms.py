"""terms.py and numbers in words.py: other words for the same, typing errors, numbers, codes, all through search."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval.embedder import Embedder, VectorCache
from retrieval.errors import BadStore
from retrieval.hybrid import HybridRetriever
from retrieval.index import build_index
from retrieval.load import load_store, load_terms
from retrieval.passages import Passage
from retrieval.spelling import Reader, as_heard
from retrieval.terms import MAX_SLOTS, Terms
from retrieval.words import fold, named_codes, number_of, quantities, words
from tests.retrieval.conftest import NOW, HashingEmbedder
from tests.retrieval.in_process import retrieval

Build = Callable[..., HybridRetriever]


@pytest.mark.parametrize(
    ("spellings", "token"),
    [
        (("三折", "3折", "打三折", "70% off", "70 percent off"), "%70"),
        (("八五折", "85折", "8.5折", "15% off"), "%15"),
        (("半价", "五折", "half price", "half off", "50% off"), "%50"),
        (("满300减50", "满三百减五十", "满¥300立减¥50", "50 off 300", "¥50 off ¥300", "spend 300 save 50",
          "save ¥50 when you spend ¥300", "$50 off orders over $300"), "cut300-50"),
        (("包邮", "免运费", "free shipping", "is delivery free"), "freeship"),
        (("一百二十块", "120元", "¥120", "￥120", "120 yuan", "rmb 120"), "¥120"),
        (("2公斤", "两公斤", "4斤", "2kg", "2 kg", "2 kilograms", "2000克"), "g2000"),
        (("七天", "7天", "7个工作日", "seven days", "7 working days", "7-day"), "d7"),
        (("二十四厘米", "24cm", "24 cm", "240毫米"), "mm240"),
        (("两件", "2件", "2 pieces"), "x2"),
    ],
)  # fmt: skip
def test_all_spellings_of_a_number_are_one_word(spellings: tuple[str, ...], token: str) -> None:
    assert [token in words(spelling) for spelling in spellings] == [True] * len(spellings)


def test_what_is_no_number_is_left_alone() -> None:
    for text in ("怎么退货", "千万别", "万一坏了", "一件代发", "how do I pay", "十分满意"):
        assert quantities(fold(text)) == [], text
    assert [number_of(text) for text in ("一百二", "一百零二", "两万三", "一千二百五十", "1,299.5")] == [
        120, 102, 23_000, 1_250, 1299.5,
    ]  # fmt: skip


def test_codes_are_named_with_spaces_dashes_width_and_case() -> None:
    for written in ("zg 1002", "ZG-1002", "ｚｇ１００２", "Zg_1002", "货号ZG1002的"):
        assert "zg1002" in named_codes(written), written
    assert "save20" in named_codes("ｓａｖｅ２０ 还能用吗")
    assert "tea30" not in named_codes("is tea 30% off")
    assert "save" not in named_codes("how can I save")
    assert "save" in named_codes("优惠码 save")
    assert named_codes("a1" * 5_000)  # bounded: done at all


@pytest.fixture
def shop(build: Build, model: Embedder, faq: Callable[..., Passage]) -> HybridRetriever:
    promotion = {"lang": "zh", "source": "promotions.csv:2"}
    return build(
        [
            faq("ship-zh", "快递费多少", answer="每单¥8，满¥99不收。", lang="zh"),
            faq("coupon-zh", "优惠券怎么用？", answer="结算时选择。", lang="zh"),
            faq("account-zh", "账号怎么注销？", answer="在设置里。", lang="zh"),
            faq("back-zh", "怎么退货？", answer="7天内可退。", lang="zh"),
            faq("back-en", "How do I get a refund?", answer="Within seven days."),
            faq("courier-en", "Which courier do you use?", answer="SF Express."),
            faq("warranty-en", "How long is the warranty?", answer="Two years."),
            Passage("cut", "promotion", "满300减50", "全场满300减50。", **promotion),  # type: ignore[arg-type]
            Passage("fold", "promotion", "床品三折", "床品三折。", **promotion),  # type: ignore[arg-type]
            Passage("code", "promotion", "满赠", "送杯子。", meta={"code": "SAVE20"}, **promotion),  # type: ignore[arg-type]
            Passage("sku", "product", "铸铁锅", "24cm。", "zh", "products.csv:2", meta={"sku": "ZG-1002"}),
        ],
        model,
    )


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("運費多少", "ship-zh"),  # traditional, and another word for it
        ("折價券怎麼使用", "coupon-zh"),  # what Taiwan says
        ("优惠卷咋用", "coupon-zh"),
        ("帐号注销", "account-zh"),
        ("腿货", "back-zh"),  # of the same sound
        ("怎么腿货", "back-zh"),
        ("get my money back", "back-en"),
        ("refnud please", "back-en"),
        ("what carrier do you use", "courier-en"),
        ("garantee length", "warranty-en"),
        ("满三百减五十", "cut"),
        ("50 off 300", "cut"),
        ("70% off bedding", "fold"),
        ("床品3折", "fold"),
        ("ｓａｖｅ２０", "code"),
        ("save-20 还有效吗", "code"),
        ("zg 1002 多少钱", "sku"),
        ("ＺＧ１００２", "sku"),
    ],
)
def test_other_ways_to_write_it_find_the_same_entry(shop: HybridRetriever, query: str, expected: str) -> None:
    hit = shop.search(query, 1, now=NOW, lang="zh" if expected.endswith("zh") else None)[0]
    assert hit.passage.id == expected


def test_what_was_typed_by_its_sound_is_heard_where_nothing_else_is_said(shop: HybridRetriever) -> None:
    def heard(query: str) -> str | None:
        return as_heard(query, shop.reader.slots(query))

    assert heard("腿货") == "退货"
    assert heard("怎么腿货?") == "怎么退货?"
    assert heard("怎么退货?") is None
    assert heard("床单腿货") is None  # the rest says enough, and what sounds alike is often another word
    assert heard("refnud") is None


def test_traditional_passages_are_found_by_simplified_questions_and_the_other_way_round(
    build: Build, hashing: HashingEmbedder, faq: Callable[..., Passage]
) -> None:
    shop = build([faq("tw", "怎麼退貨？", lang="zh"), faq("cn", "发票怎么开？", lang="zh")], hashing)
    assert shop.search("怎么退货", 1, now=NOW)[0].passage.id == "tw"
    assert shop.search("發票怎麼開", 1, now=NOW)[0].passage.id == "cn"


def test_a_typing_error_is_one_only_where_the_store_lacks_the_word(
    build: Build, hashing: HashingEmbedder, faq: Callable[..., Passage]
) -> None:
    shop = build([faq("a", "Do you ship pears?"), faq("b", "Do you rent bears?"), faq("c", "怎么退货")], hashing)
    meant = {
        query: [slot.meant for slot in shop.reader.slots(query) if slot.why == "typo"]
        for query in ("pears", "peers", "退货", "腿货")
    }
    assert meant == {"pears": [], "peers": [], "退货": [], "腿货": [("退货",)]}  # four letters of a stem are too few


def test_a_reading_counts_no_more_than_the_word_itself(shop: HybridRetriever) -> None:
    lexical = shop.index.lexical
    slots = shop.reader.slots("refnud")
    as_meant, most_meant = lexical.score("refnud", slots)
    written, most = lexical.score("refund")
    assert 0 < as_meant.max() / most_meant < written.max() / most
    assert lexical.score("refnud")[0].max() == 0


@pytest.mark.parametrize(
    "query", ["显示示", "货货货 腿货货", "refnud refnud", "邮费邮费快递费", "a" * 900, "账号帐号" * 40]
)
def test_odd_queries_are_read_within_bounds(shop: HybridRetriever, query: str) -> None:
    assert len(shop.reader.slots(query)) <= MAX_SLOTS
    assert len(shop.search(query, 3, now=NOW)) == 3


# --- the store's own terms --------------------------------------------------------------------------------------------


def test_the_stores_own_terms_hold_in_both_directions_for_words_and_vectors(
    model: Embedder, faq: Callable[..., Passage]
) -> None:
    passages = [
        faq("card", "小禾卡怎么充值？", answer="在“我的”里充值。", lang="zh"),
        faq("prepaid", "储值卡能退吗？", answer="不能退。", lang="zh"),
        faq("crate", "Where is my Xiaohe crate made?", answer="In Hangzhou."),
        faq("other", "Where is my order?", answer="See your account."),
    ]
    cache = VectorCache(None)
    index = build_index(passages, model, cache)
    cache.close()
    terms = Terms([("小禾卡", "储值卡", "会员卡"), ("Xiaohe crate", "bamboo box")])
    plain, own = HybridRetriever(index, model), HybridRetriever(index, model, terms=terms)

    def coverage(shop: HybridRetriever, query: str, passage_id: str) -> float:
        return {p.id: features.coverage for p, features in shop.rank(query, now=NOW)}[passage_id]

    for query, passage_id in (
        ("储值卡怎么充值", "card"),
        ("小禾卡能退吗", "prepaid"),
        ("who makes the bamboo box", "crate"),
    ):
        assert own.search(query, 1, now=NOW)[0].passage.id == passage_id
        assert coverage(own, query, passage_id) > coverage(plain, query, passage_id) + 0.1
        body = {p.id: f.body for p, f in own.rank(query, now=NOW)}[passage_id]
        assert body > {p.id: f.body for p, f in plain.rank(query, now=NOW)}[passage_id]


def test_terms_csv_is_read_with_the_store_and_through_the_command(store: Path, tmp_path: Path) -> None:
    (store / "terms.csv").write_text("term,synonyms,lang\n运费,搬运钱|跑腿费,zh\n", "utf-8")
    assert load_terms(store).own == (("运费", "搬运钱", "跑腿费"),)
    search = ("search", "--store", store, "跑腿费", "-k", "1", "--explain", "--json", "--cache", tmp_path / "cache")
    found = json.loads(retrieval(*search).stdout)
    assert found["read_as"] == [{"written": "跑腿费", "meant": ["运费", "搬运钱"], "why": "term"}]
    assert found["hits"][0]["id"] == "f-ship-zh"


def test_every_fault_of_terms_csv_is_named_and_nothing_of_the_store_goes_live(store: Path) -> None:
    rows = [
        "term,synonyms",
        "卡,会员卡",
        "a term,",
        f"long,{'x' * 50}",
        "Same,same|ＳＡＭＥ",
        f"many,{'|'.join(f'word {n}' for n in range(30))}",
    ]
    (store / "terms.csv").write_text("\n".join(rows) + "\n", "utf-8")
    with pytest.raises(BadStore) as raised:
        load_store(store)
    said = [str(fault) for fault in raised.value.faults]
    assert [line.split(":")[0] for line in said] == [
        "terms.csv, row 2, term", "terms.csv, row 3, synonyms", "terms.csv, row 4, synonyms", "terms.csv, row 5, synonyms",
        "terms.csv, row 6, synonyms",
    ]  # fmt: skip
    assert said[0].endswith("is too short to be told from other words; write two characters or more")


def test_a_large_vocabulary_and_many_terms_are_read() -> None:
    vocabulary = {f"{a}{b}{c}word": None for a in "abcdefgh" for b in "klmnopqrst" for c in "uvwxyzabcdefghij"}
    reader = Reader(vocabulary | {"other": None}, Terms([(f"term {n}", f"other {n}") for n in range(2_000)]))
    found = reader.slots("akuwrod term 7 aluworld")
    assert [slot.why for slot in found] == ["term", "typo", "typo"]
