"""The training stores in examples/training keep to what its README says, and share nothing with what is measured."""

from __future__ import annotations

import csv
import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STORES = sorted(p.parent for p in (EXAMPLES / "training").glob("*/knowledge.jsonl"))
ANSWERED = {"ask", "indirect", "typo", "followup", "two"}
NOT_ANSWERED = {"unanswerable", "near_miss", "off_topic"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def squeezed(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def measured_questions() -> set[str]:
    cases = [q for path in EXAMPLES.glob("*cases.jsonl") for line in lines(path) for q in line["turns"]]
    return {squeezed(q) for q in [*cases, *(line["text"] for line in lines(EXAMPLES / "questions.jsonl"))]}


def test_every_store_is_in_one_batch() -> None:
    batches = tomllib.loads((EXAMPLES / "training" / "batches.toml").read_text("utf-8"))
    assert sorted(name for batch in batches.values() for name in batch) == [store.name for store in STORES]
    assert len(STORES) == 133


def test_forty_stores_have_pages_that_say_again_what_faqs_say_and_more() -> None:
    paged = 0
    for store in STORES:
        pages = {p["pair"] for p in lines(store / "knowledge.jsonl") if "-pg-" in p["pair"]}
        paged += bool(pages)
        asked = [set(q["relevant"]) for q in lines(store / "questions.jsonl")]
        for page in pages:
            assert sum(page in relevant for relevant in asked) >= 3, page
            assert any(relevant == {page} for relevant in asked), page  # what no FAQ says
        assert not pages or any(relevant & pages and relevant - pages for relevant in asked), store.name
    assert paged == 40


@pytest.mark.parametrize("store", STORES, ids=lambda p: p.name)
class TestStore:
    def test_every_passage_exists_in_both_languages(self, store: Path) -> None:
        passages = lines(store / "knowledge.jsonl")
        assert {p["kind"] for p in passages} == {"faq", "policy", "promotion", "product"}
        assert all(p["id"] == f"{p['pair']}-{p['lang']}" for p in passages)
        assert set(Counter(p["pair"] for p in passages).values()) == {2}
        assert len({p["id"] for p in passages}) == len(passages)
        for p in passages:
            assert (2 <= len(p["questions"]) <= 4) == (p["kind"] == "faq"), p["id"]
            assert any("\u4e00" <= c <= "\u9fff" for c in p["text"]) == (p["lang"] == "zh"), p["id"]

    def test_questions_name_passages_that_are_there(self, store: Path) -> None:
        passages, questions = lines(store / "knowledge.jsonl"), lines(store / "questions.jsonl")
        pairs = {p["pair"] for p in passages}
        wordings = {w for p in passages for w in (p["title"], *p["questions"])}
        assert len({q["text"] for q in questions}) == len(questions)
        for q in questions:
            assert q["kind"] in ANSWERED | NOT_ANSWERED, q
            assert bool(q["relevant"]) == (q["kind"] in ANSWERED), q
            assert set(q["relevant"]) | set(q.get("near", ())) <= pairs, q
            assert not set(q["relevant"]) & set(q.get("near", ())), q
            assert q["kind"] != "near_miss" or q["near"], q
            assert q["text"] not in wordings, q

    def test_follow_ups_name_passages_that_are_there(self, store: Path) -> None:
        if not (store / "followups.jsonl").exists():
            return
        pairs = {p["pair"] for p in lines(store / "knowledge.jsonl")}
        found = lines(store / "followups.jsonl")
        assert Counter(f["lang"] for f in found) == {"zh": 12, "en": 12}
        for f in found:
            assert f["kind"] in {"other", "detail", "case", "new"}, f
            assert len(f["answered"]) == len(f["turns"]) - 1 >= 1, f
            assert f["relevant"], f
            assert {*f["relevant"], *f["answered"]} <= pairs, f
        assert not measured_questions() & {squeezed(turn) for f in found for turn in f["turns"]}

    def test_no_question_is_one_that_is_measured(self, store: Path) -> None:
        assert not measured_questions() & {squeezed(q["text"]) for q in lines(store / "questions.jsonl")}

    def test_no_answer_is_the_demo_stores(self, store: Path) -> None:
        with (EXAMPLES / "demo" / "faqs.csv").open(encoding="utf-8", newline="") as file:
            answers = {squeezed(row["answer"]) for row in csv.DictReader(file)}
        assert not answers & {squeezed(p["text"]) for p in lines(store / "knowledge.jsonl")}
