"""words.py: folding, words, codes, language."""

from __future__ import annotations

import pytest

from retrieval.words import codes, detect_lang, fold, squash, stem, weight, words


def test_width_case_and_traditional_characters_fold_together() -> None:
    assert fold("ＷＡＲＭ２５　優惠碼") == "warm25 优惠码"
    assert squash("怎麼退貨？") == squash("怎么退货")
    assert squash("How do I return?") == squash("how  do i RETURN")


def test_chinese_gives_characters_and_pairs_and_codes_stay_whole() -> None:
    assert words("退货QH1001-zh") == ["退", "货", "退货", "qh1001-zh", "qh1001zh", "qh1001", "zh"]


@pytest.mark.parametrize(
    ("forms", "root"),
    [
        (("return", "returns", "returned", "returning"), "return"),
        (("ship", "ships", "shipped", "shipping"), "ship"),
        (("exchange", "exchanges", "exchanged", "exchanging"), "exchang"),
        (("delivery", "deliveries"), "delivery"),
        (("glass", "glasses"), "glass"),
    ],
)
def test_english_endings_are_taken_off(forms: tuple[str, ...], root: str) -> None:
    assert {stem(form) for form in forms} == {root}


def test_codes_are_article_order_and_coupon_numbers() -> None:
    assert codes("优惠码WARM25，订单 20261116-0032，QH1001 买3件 24cm") == {"warm25", "20261116-0032", "qh1001", "24cm"}
    assert codes("how do I pay in 2 parts") == set()


def test_filler_counts_less_than_content() -> None:
    assert weight("的") == weight("please") < weight("货") < weight("退货") == weight("return")


@pytest.mark.parametrize(
    ("text", "lang"),
    [("包邮吗", "zh"), ("WARM25 怎么用", "zh"), ("is it free", "en"), ("what is 青禾 Plus for", "en"), ("12 €", "")],
)
def test_language_is_detected(text: str, lang: str) -> None:
    assert detect_lang(text) == lang
