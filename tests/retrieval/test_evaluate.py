"""evaluate.py: the measures by hand, and public data where it is."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from retrieval.embedder import Embedder, VectorCache
from retrieval.errors import BadStore
from retrieval.evaluate import Outcome, Question, evaluate, load_questions, measures
from retrieval.passages import Passage
from tests.retrieval.conftest import DATA, HashingEmbedder


def outcome(rank: int | None, confidence: float, answerable: bool = True) -> Outcome:
    return Outcome(rank, answerable, confidence, 1.0)


def test_recall_and_mrr_count_answerable_questions_only() -> None:
    found = measures([outcome(1, 0.9), outcome(2, 0.8), outcome(4, 0.7), outcome(None, 0.6), outcome(None, 0.5, False)])
    assert (found["recall@1"], found["recall@3"], found["recall@10"]) == (0.25, 0.5, 0.75)
    assert found["mrr@10"] == round((1 + 0.5 + 0.25) / 4, 4)


def test_auc_counts_ties_half() -> None:
    found = measures([outcome(1, 0.9), outcome(1, 0.5), outcome(None, 0.5, False), outcome(None, 0.1, False)])
    assert found["no_answer_auc"] == (1 + 1 + 0.5 + 1) / 4


def test_coverage_is_the_most_that_can_be_answered_at_the_risk() -> None:
    right = [outcome(1, 0.9 - n / 1000) for n in range(150)]
    assert measures([*right, outcome(2, 0.5), outcome(2, 0.4)])["coverage@1%risk"] == round(151 / 152, 4)
    assert measures([outcome(2, 0.95), *right[:99]])["coverage@1%risk"] == 1.0
    assert measures([outcome(2, 0.95), *right[:50]])["coverage@1%risk"] == 0.0
    # All of one confidence are answered together or not at all.
    assert measures([outcome(1, 0.5), outcome(2, 0.5)])["coverage@1%risk"] == 0.0


def test_what_cannot_be_computed_is_null() -> None:
    found = measures([outcome(None, 0.5, False)])
    assert found["recall@1"] is None
    assert found["mrr@10"] is None
    assert found["no_answer_auc"] is None
    assert measures([outcome(1, 0.9)])["no_answer_auc"] is None


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "JSON"),
        ('{"text": ""}', "text"),
        ('{"text": "x"}', "relevant"),
        ('{"text": "x", "relevant": "a"}', "relevant"),
    ],
)
def test_a_faulty_question_line_is_named(tmp_path: Path, line: str, field: str) -> None:
    (tmp_path / "Q.jsonl").write_text('{"text": "fine", "relevant": []}\n' + line + "\n", "utf-8")
    with pytest.raises(BadStore, match=field) as caught:
        load_questions(tmp_path / "Q.jsonl")
    assert caught.value.faults[0].row == 2


def test_evaluate_has_the_field_names_of_the_contract(hashing: HashingEmbedder) -> None:
    passages = [
        Passage("a", "faq", "ship", "yes", "en", "K:1", ("ship",)),
        Passage("b", "page", "x", "pans", "en", "K:2"),
    ]
    cache = VectorCache(None)
    found = evaluate(passages, [Question("ship", frozenset("a")), Question("zzz", frozenset())], hashing, cache)
    cache.close()
    assert list(found) == [
        "n_passages", "n_questions", "recall@1", "recall@3", "recall@10", "mrr@10", "no_answer_auc", "coverage@1%risk",
        "ms_per_query_p50", "ms_per_query_p99", "build_s",
    ]  # fmt: skip
    assert (found["n_passages"], found["n_questions"], found["recall@1"], found["no_answer_auc"]) == (2, 2, 1.0, 1.0)


def test_real_shoppers_questions_reach_their_standard_question(model: Embedder) -> None:
    folder = DATA / "zh_tonghuashun_faq"
    if not folder.is_dir():
        pytest.skip(f"public data not here: {folder}")
    with (folder / "faq_standard.csv").open(encoding="utf-8") as file:
        standard = {row["faq_id"]: row["standard_question"] for row in csv.DictReader(file)}
    with (folder / "queries_dev.csv").open(encoding="utf-8") as file:
        rows = [(row["query"], row["faq_id"]) for row in csv.DictReader(file)]
    chance = random.Random(5)
    ids = sorted(standard)[:40]
    asked = chance.sample([row for row in rows if row[1] in ids], 25)
    passages = [Passage(one, "faq", standard[one], "", "zh", "K", (standard[one],)) for one in ids]
    cache = VectorCache(None)
    found = evaluate(passages, [Question(text, frozenset([one])) for text, one in asked], model, cache)
    cache.close()
    assert found["recall@3"] >= 0.8
