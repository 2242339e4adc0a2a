"""What examples/ ships: complete, consistent, bilingual, and with something on sale on any day."""

from __future__ import annotations

import csv
import json
import re
import shutil
import unicodedata
import xml.etree.ElementTree as ET
from collections import Counter
from datetime import date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from bot.demo import date_promotions
from bot.evaluate import load_cases
from bot.settings import load_store_profile
from retrieval.evaluate import load_questions
from retrieval.load import load_store
from retrieval.passages import is_valid
from retrieval.words import squash

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo"
CASES = ROOT / "examples" / "cases.jsonl"
QUESTIONS = ROOT / "examples" / "questions.jsonl"


def rows(name: str) -> list[dict[str, str]]:
    with (DEMO / name).open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def dialogues() -> list[dict[str, object]]:
    files = sorted((DEMO / "dialogues").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def test_there_is_as_much_as_promised_in_both_languages() -> None:
    faqs = Counter(row["lang"] for row in rows("faqs.csv"))
    assert min(faqs["zh"], faqs["en"]) >= 60
    assert len(rows("promotions.rules.csv")) == 28
    assert Counter(row["lang"] for row in rows("products.csv")) == {"zh": 80, "en": 80}
    assert len(list((DEMO / "policies").glob("*.zh.md"))) == len(list((DEMO / "policies").glob("*.en.md"))) == 6
    assert len(rows("orders.csv")) == 30
    talks = dialogues()
    assert Counter(d["lang"] for d in talks) == {"zh": 150, "en": 150}
    assert Counter(c.lang for c in load_cases(CASES)) == {"zh": 60, "en": 60}
    assert load_store_profile(DEMO).languages == ("zh", "en")


@pytest.mark.parametrize("today", [date(2024, 2, 29), date(2026, 11, 22), date(2031, 12, 31)])
def test_on_any_day_some_promotions_are_over_some_on_and_some_to_come(today: date, tmp_path: Path) -> None:
    for name in ("store.toml", "promotions.rules.csv"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    assert date_promotions(tmp_path, today)
    assert not date_promotions(tmp_path, today), "a second time nothing changes"
    zone = ZoneInfo("Asia/Shanghai")
    noon = datetime(today.year, today.month, today.day, 12, tzinfo=zone)
    for lang in ("zh", "en"):
        every = [p for p in load_store(tmp_path) if p.kind == "promotion" and p.lang == lang]
        promotions = [p for p in every if p.repeats is None]
        weekend = next(p for p in every if p.id.startswith("promo-bath-weekend"))
        assert is_valid(weekend, noon) == (today.weekday() >= 5)
        member_day = next(p for p in every if p.id.startswith("promo-member-day"))
        assert is_valid(member_day, noon) == (today.day == 8)
        on = [p for p in promotions if is_valid(p, noon)]
        over = [p for p in promotions if p.valid_until is not None and p.valid_until <= noon]
        to_come = [p for p in promotions if p.valid_from is not None and p.valid_from > noon]
        assert (len(over), len(on), len(to_come)) == (4, 5, 3)
    first = next(p for p in load_store(tmp_path) if p.id.startswith("promo-full-cut"))
    assert first.valid_from == datetime(today.year, today.month, today.day, tzinfo=zone) - timedelta(days=3)


def test_dialogues_are_openai_messages_that_alternate() -> None:
    for talk in dialogues():
        messages = talk["messages"]
        assert isinstance(messages, list)
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(m["content"].strip() for m in messages)


def test_no_case_is_asked_in_the_words_of_a_faq_or_a_dialogue() -> None:
    known = set()
    for row in rows("faqs.csv"):
        known |= {plain(w) for w in [row["question"], *row["questions"].split("|")]}
    for talk in dialogues():
        known |= {plain(m["content"]) for m in talk["messages"] if m["role"] == "user"}  # type: ignore[attr-defined]
    for case in load_cases(CASES):
        assert plain(case.turns[-1]) not in known, case.id


@pytest.mark.parametrize("today", [date(2026, 11, 22), date(2031, 12, 31)])
def test_the_retrieval_questions_are_labelled_with_passages_that_answer_on_any_day(today: date, tmp_path: Path) -> None:
    questions = load_questions(QUESTIONS)
    langs = [json.loads(line)["lang"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    answered = Counter(zip(langs, [bool(q.relevant) for q in questions], strict=True))
    assert answered == {("zh", True): 120, ("en", True): 120, ("zh", False): 40, ("en", False): 40}
    shutil.copytree(DEMO, tmp_path, ignore=shutil.ignore_patterns("images", "dialogues"), dirs_exist_ok=True)
    date_promotions(tmp_path, today)
    noon = datetime(today.year, today.month, today.day, 12, tzinfo=ZoneInfo("Asia/Shanghai"))
    passages = {p.id: p for p in load_store(tmp_path)}
    for question in questions:
        assert question.relevant <= passages.keys(), question.text
        if question.relevant:
            assert any(is_valid(passages[i], noon) for i in question.relevant), f"{question.text}: no answer holds"
        pairs = Counter(i.rsplit("-", 1)[0] for i in question.relevant if i.endswith(("-zh", "-en")))
        assert set(pairs.values()) <= {2}, f"{question.text}: an answer without its translation"


def test_no_retrieval_question_is_a_wording_known_elsewhere_or_comes_twice() -> None:
    known = {squash(w) for row in rows("faqs.csv") for w in [row["question"], *row["questions"].split("|")]}
    known |= {squash(turn) for case in load_cases(CASES) for turn in case.turns}
    for talk in dialogues():
        known |= {squash(m["content"]) for m in talk["messages"] if m["role"] == "user"}  # type: ignore[attr-defined]
    texts = [q.text for q in load_questions(QUESTIONS)]
    assert [text for text in texts if squash(text) in known] == []
    assert [text for text, n in Counter(map(squash, texts)).items() if n > 1] == []


def test_orders_name_products_that_exist_and_add_up() -> None:
    prices = {row["id"].rsplit("-", 1)[0]: float(row["price"]) for row in rows("products.csv")}
    for order in rows("orders.csv"):
        goods = sum(
            prices[sku] * int(n) for sku, n in (item.strip().rsplit("x", 1) for item in order["items"].split(";"))
        )
        assert goods <= float(order["total"]) <= goods + 200, order["id"]


def test_pictures_are_small_plain_svg() -> None:
    for row in rows("products.csv"):
        picture = DEMO / row["image"]
        assert picture.stat().st_size < 4_000
        text = picture.read_text(encoding="utf-8")
        assert ET.fromstring(text).tag.endswith("svg")
        assert not re.search(r"<script|<foreignObject|\bon\w+=|href=|url\(", text, re.IGNORECASE)
