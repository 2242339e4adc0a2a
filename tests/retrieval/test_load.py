"""load.py: files -> passages; every fault named by file, row, field and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from retrieval.errors import BadStore
from retrieval.importing import text
from retrieval.load import content_hash, dump_passage, load_knowledge, load_store, money, parse_passage, parse_time
from retrieval.passages import Passage, is_valid


def by_id(folder: Path) -> dict[str, Passage]:
    return {passage.id: passage for passage in load_store(folder)}


def faults_of(folder: Path) -> list[str]:
    with pytest.raises(BadStore) as caught:
        load_store(folder)
    return [str(fault) for fault in caught.value.faults]


def test_a_faq_is_an_approved_passage_found_by_every_wording(store: Path) -> None:
    faq = by_id(store)["f-ship-zh"]
    assert (faq.kind, faq.title, faq.text, faq.lang) == ("faq", "运费是多少？", "订单满¥99包邮，否则运费¥8。", "zh")
    assert faq.questions == ("运费是多少？", "包邮吗", "邮费怎么算")
    assert faq.approved
    assert faq.source == "faqs.csv:2"
    assert faq.meta["tags"] == ["shipping"]


def test_promotion_says_its_dates_and_code_in_its_own_language(store: Path) -> None:
    found = by_id(store)
    assert found["p-warm-zh"].text == (
        "床品75折。优惠码：WARM25。每单限用一次。活动时间：2026年11月16日至11月30日（含）。"
    )
    assert found["p-warm-en"].text == (
        "Bedding 25% off. Code: WARM25. One code per order. Runs from 16 November to 30 November 2026 (inclusive)."
    )
    assert found["p-lamp-en"].text.endswith("Runs from 20 December 10:00 to 27 December 2026 22:00.")
    assert not found["p-warm-en"].approved


def test_a_date_that_ends_something_counts_in_full_and_a_time_does_not(store: Path) -> None:
    found = by_id(store)
    midnight = datetime(2026, 12, 1, tzinfo=ZoneInfo("Asia/Shanghai"))
    assert found["p-warm-zh"].valid_until == found["p-warm-en"].valid_until == midnight
    assert is_valid(found["p-warm-en"], midnight - timedelta(seconds=1))
    assert not is_valid(found["p-warm-en"], midnight)
    assert found["f-xmas-en"].valid_from == datetime(2026, 11, 30, 16, tzinfo=UTC)
    assert not is_valid(found["f-xmas-en"], datetime(2026, 11, 30, 15, 59, 59, tzinfo=UTC))
    assert is_valid(found["f-xmas-en"], datetime(2026, 11, 30, 16, tzinfo=UTC))


def test_product_text_has_price_and_stock_in_words(store: Path) -> None:
    found = by_id(store)
    assert found["QH1001-zh"].text == "羽绒被 1.5米。价格：¥399。白鸭绒，可干洗。现货库存 42 件。"
    assert found["QH1001-en"].text == "Down quilt 150 cm. Price: ¥399. White duck down; dry-clean. In stock: 42."
    lamp = found["QH2002-en"]
    assert lamp.text == "Brass desk lamp. Price: ¥1299.50. LED. Sold out at the moment."
    assert lamp.meta["price"] == 1299.5
    assert (lamp.meta["stock"], lamp.meta["sku"], lamp.meta["currency"]) == (0, "QH2002", "CNY")
    assert found["QH1001-zh"].meta["sku"] == found["QH1001-en"].meta["sku"] == "QH1001"


def test_policy_is_cut_at_its_headings(store: Path) -> None:
    policy = [passage for passage in load_store(store) if passage.kind == "policy"]
    assert [(passage.title, passage.text) for passage in policy] == [
        ("Returns", "Our promise in short."),
        ("Returns > Conditions", "Unused and in the original packing."),
        ("Returns > Refunds", "The money arrives within 3 working days."),
        ("Returns > Refunds > Bank cards", "Cards take up to 7 working days."),
    ]
    assert policy[2].source == "policies/returns.en.md#refunds"
    assert policy[2].lang == "en"


def test_long_policy_section_is_cut_between_paragraphs(store: Path) -> None:
    paragraphs = [f"Paragraph {n}. " + "Words stay together. " * 20 for n in range(4)]
    (store / "policies" / "long.md").write_text("# Long\n\n## One\n" + "\n\n".join(paragraphs), "utf-8")
    parts = [passage for passage in load_store(store) if passage.id.startswith("long#")]
    assert [part.id for part in parts] == ["long#one", "long#one-2", "long#one-3", "long#one-4"]
    assert [part.text for part in parts] == [paragraph.strip() for paragraph in paragraphs]


def test_policy_language_is_its_suffix_else_what_it_is_written_in(store: Path) -> None:
    (store / "policies" / "privacy.md").write_text("# 隐私\n## 数据\n我们不出售数据。\n", "utf-8")
    (store / "policies" / "tax.zh.md").write_text("# VAT\n## EU\nIOSS\n", "utf-8")
    langs = {passage.id.split("#")[0]: passage.lang for passage in load_store(store) if passage.kind == "policy"}
    assert langs == {"returns.en": "en", "privacy": "zh", "tax.zh": "zh"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_excel_encodings_are_read(store: Path, encoding: str) -> None:
    text = (store / "faqs.csv").read_text("utf-8")
    (store / "faqs.csv").write_text(text, encoding)
    assert by_id(store)["f-ship-zh"].title == "运费是多少？"


def test_semicolon_file_is_read(store: Path) -> None:
    (store / "faqs.csv").write_text("id;question;answer\na;Do you ship?;Yes, daily\n", "utf-8")
    assert by_id(store)["a"].text == "Yes, daily"


def test_without_a_language_column_the_language_is_detected(store: Path) -> None:
    (store / "faqs.csv").write_text("id,question,answer\na,Do you ship?,Yes\nb,WARM25 怎么用,下单时输入\n", "utf-8")
    found = by_id(store)
    assert (found["a"].lang, found["b"].lang) == ("en", "zh")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("f1,,Yes,en,,,,", "faqs.csv, row 2, question: is empty; fill it in or remove the row"),
        ("f1,Why?,,en,,,,", "faqs.csv, row 2, answer: is empty; fill it in or remove the row"),
        (",Why?,Yes,en,,,,", "faqs.csv, row 2, id: is empty; fill it in or remove the row"),
        (
            "f1,Why?,Yes,en,,,31.12.2026,",
            "faqs.csv, row 2, valid_from: '31.12.2026' is no date; write 2026-11-30 or 2026-11-30T18:00",
        ),
        (
            "f1,Why?,Yes,en,,,2026-12-02,2026-12-01",
            "faqs.csv, row 2, valid_from: 2026-12-02 is not before valid_until 2026-12-01; swap or correct them",
        ),
        (
            "f1,Why?,Yes, and no,en,,,,",
            "faqs.csv, row 2: 9 cells under 8 columns; put cells with commas in double quotes",
        ),
        ('f1,"Why?,Yes,en', "faqs.csv, row 2: not CSV (unexpected end of data); check the double quotes"),
        ("f1,Why?,Y\0es,en,,,,", "faqs.csv, row 2: holds a NUL byte"),
    ],
)
def test_a_faulty_row_is_named_with_a_remedy(store: Path, row: str, expected: str) -> None:
    header = "id,question,answer,lang,questions,tags,valid_from,valid_until\n"
    # A row of too many cells has to be too long by text, not by a trailing comma.
    text = row.replace("Yes, and no,en,,,,", "Yes, and no,en,,,,x")
    (store / "faqs.csv").write_text(header + text + "\n", "utf-8")
    (fault,) = faults_of(store)
    assert fault.startswith(expected)


def test_every_fault_of_every_file_is_reported_at_once(store: Path) -> None:
    (store / "faqs.csv").write_text("id,question\na,b\n", "utf-8")
    (store / "products.csv").write_text("id,title,price,stock\nx,Pan,cheap,many\nx2,,5,1\n", "utf-8")
    (store / "store.toml").write_text('timezone = "Asia/Atlantis"\n', "utf-8")
    assert faults_of(store) == [
        "store.toml, timezone: 'Asia/Atlantis' is no time zone; write an IANA name such as Asia/Shanghai",
        "faqs.csv, row 1, answer: the column is missing; add a column named answer",
        "products.csv, row 2, price: 'cheap' is no price; write a number such as 129 or 129.90",
        "products.csv, row 2, stock: 'many' is no whole number; write 0, 12, or leave it empty",
        "products.csv, row 3, title: is empty; fill it in or remove the row",
    ]


def test_a_mistyped_column_is_a_fault_because_an_offer_would_never_end(store: Path) -> None:
    text = (store / "faqs.csv").read_text("utf-8").replace("valid_until", "valid_untill")
    (store / "faqs.csv").write_text(text, "utf-8")
    assert faults_of(store) == ["faqs.csv, row 1, valid_untill: unknown column; did you mean valid_until?"]


def test_duplicate_ids_are_found_across_files(store: Path) -> None:
    (store / "extra.jsonl").write_text('{"id": "f-ship-zh", "text": "again"}\n', "utf-8")
    assert faults_of(store) == [
        "extra.jsonl, row 1, id: 'f-ship-zh' is already used in faqs.csv:2; give each its own id"
    ]


def test_limits_are_faults(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = "id,question,answer\n"
    (store / "faqs.csv").write_text(header + f"a,b,{'x' * 100_001}\n", "utf-8")
    assert faults_of(store)[0].startswith("faqs.csv, row 2, answer: 100,001 characters, more than 100,000")
    (store / "faqs.csv").write_text(header + f"a,b,{'x' * 140_000}\n", "utf-8")
    assert "more than 100,000" in faults_of(store)[0]
    (store / "faqs.csv").write_text(",".join(f"c{n}" for n in range(1_001)) + "\n", "utf-8")
    assert faults_of(store)[0] == "faqs.csv, row 1: 1,001 columns, more than 1,000; remove those without knowledge"
    monkeypatch.setattr(text, "MAX_ROWS", 2)
    (store / "faqs.csv").write_text(header + "a,b,c\nd,e,f\ng,h,i\n", "utf-8")
    assert faults_of(store)[0] == "faqs.csv, row 4: more than 2 rows; split the file"
    monkeypatch.setattr(text, "MAX_FILE_BYTES", 10)
    assert "split the file" in faults_of(store)[0]


def test_bytes_that_are_no_text_are_a_fault(store: Path) -> None:
    (store / "faqs.csv").write_bytes(b"id,question,answer\na,\xff\xff,\xff\n")
    assert faults_of(store) == ["faqs.csv: is neither UTF-8 nor GB18030; save it again as CSV UTF-8"]


def test_an_empty_or_missing_folder_says_what_to_add(tmp_path: Path) -> None:
    assert "no knowledge: add faqs.csv" in faults_of(tmp_path)[0]
    assert "no such folder" in faults_of(tmp_path / "nowhere")[0]


def test_knowledge_file_takes_questions_or_bare_texts(tmp_path: Path) -> None:
    path = tmp_path / "K.jsonl"
    entries = [
        {"id": "a", "text": "Bare text."},
        {"id": 7, "question": "Why?", "answer": "Because.", "questions": ["how come"], "valid_until": "2026-11-30"},
    ]
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n", "utf-8")
    bare, asked = load_knowledge(path)
    assert (bare.kind, bare.text, bare.approved) == ("page", "Bare text.", False)
    assert (asked.id, asked.kind, asked.questions, asked.approved) == ("7", "faq", ("Why?", "how come"), True)
    assert asked.valid_until == datetime(2026, 12, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "K.jsonl, row 1: not JSON"),
        ("[]", "K.jsonl, row 1: not a JSON object"),
        ('{"text": "x"}', "K.jsonl, row 1, id: is missing"),
        ('{"id": "a"}', "K.jsonl, row 1, text: nothing to quote"),
        ('{"id": "a", "text": 5}', "K.jsonl, row 1, text: is not a text"),
        ('{"id": "a", "text": "x", "questions": "y"}', "K.jsonl, row 1, questions: is not a list of texts"),
        ('{"id": "a", "text": "x", "valid_from": "soon"}', "K.jsonl, row 1, valid_from: 'soon' is no date"),
    ],
)
def test_a_faulty_knowledge_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "K.jsonl"
    path.write_text(line + "\n", "utf-8")
    with pytest.raises(BadStore, match="row 1") as caught:
        load_knowledge(path)
    assert str(caught.value).startswith(expected)


def test_times_are_in_the_stores_zone_also_when_clocks_change() -> None:
    london = ZoneInfo("Europe/London")
    # Clocks went back on 25 October 2026 at 02:00: the day has 25 hours.
    begins = parse_time("2026-10-25", london, until=False)
    ends = parse_time("2026-10-25", london, until=True)
    assert ends - begins == timedelta(hours=25)
    assert parse_time("2026-10-25T00:30", london, until=False) == datetime(2026, 10, 24, 23, 30, tzinfo=UTC)
    # 01:30 happens twice; the repeated hour must not compare by wall clock.
    first = parse_time("2026-10-25T01:30", london, until=False)
    assert first < datetime(2026, 10, 25, 1, 30, tzinfo=london, fold=1).astimezone(UTC)
    assert first < parse_time("2026-10-25T01:10+00:00", london, until=False)


@pytest.mark.parametrize("text", ["2026-11-30", "2026/11/30", "2026.11.30", "2026年11月30日", "2026-11-30 00:00"])
def test_usual_ways_to_write_a_day_are_read(text: str) -> None:
    assert parse_time(text, timezone(timedelta(hours=8)), until=False) == datetime(2026, 11, 29, 16, tzinfo=UTC)


def test_money_is_written_without_idle_cents() -> None:
    assert [money(Decimal(a), c) for a, c in (("399", "CNY"), ("12.5", "USD"), ("100.00", "EUR"), ("5", "XYZ"))] == [
        "¥399",
        "$12.50",
        "€100",
        "5 XYZ",
    ]


def test_a_passage_survives_json_and_its_content_is_its_version(store: Path) -> None:
    passages = load_store(store)
    again = [parse_passage(json.loads(json.dumps(dump_passage(passage)))) for passage in passages]
    assert again == passages
    assert content_hash(again) == content_hash(passages)
    (store / "faqs.csv").write_text((store / "faqs.csv").read_text("utf-8").replace("¥99", "¥89"), "utf-8")
    assert content_hash(load_store(store)) != content_hash(passages)


def test_faults_are_told_five_at_a_time(store: Path, faq: Callable[..., Passage]) -> None:
    (store / "faqs.csv").write_text("id,question,answer\n" + ",x,y\n" * 8, "utf-8")
    with pytest.raises(BadStore) as caught:
        load_store(store)
    assert str(caught.value).endswith("; and 3 more")
