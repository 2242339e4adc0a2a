"""__main__.py: the two commands as checks from outside type them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def retrieval(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "retrieval", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=55)
    assert done.returncode == status, done.stderr
    return done


def test_search_prints_one_json_document(store: Path, tmp_path: Path) -> None:
    at = ("--at", "2026-11-22T12:00")
    done = retrieval("search", "--store", store, "包邮吗", "-k", "3", *at, "--json", "--cache", tmp_path / "cache")
    hits = json.loads(done.stdout)
    assert len(hits) == 3
    assert list(hits[0])[:9] == [
        "id", "score", "confidence", "kind", "title", "text", "source", "valid_from", "valid_until",
    ]  # fmt: skip
    assert (hits[0]["id"], hits[0]["source"], hits[0]["valid_until"]) == ("f-ship-zh", "faqs.csv:2", None)
    assert done.stderr == ""


def test_at_is_a_time_in_the_stores_zone(store: Path, tmp_path: Path) -> None:
    def ids(at: str) -> list[str]:
        search = ("search", "--store", store, "WARM25", "--at", at, "--json", "--cache", tmp_path / "cache")
        return [hit["id"] for hit in json.loads(retrieval(*search).stdout)]

    assert ids("2026-11-30T23:59:59")[0] == "p-warm-en"
    assert not {"p-warm-en", "p-warm-zh"} & set(ids("2026-12-01T00:00"))
    assert ids("2026-11-30T15:59:59+00:00")[0] == "p-warm-en"


def test_search_without_json_is_for_people(store: Path, tmp_path: Path) -> None:
    done = retrieval("search", "--store", store, "QH2002", "-k", "1", "--cache", tmp_path / "cache")
    assert "QH2002-en" in done.stdout
    assert "¥1299.50" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "python -m retrieval: "),
        (("search", "x"), "--store"),
        (("search", "--store", "/nowhere", "x", "--json"), "/nowhere: no such folder"),
        (("search", "--store", "/nowhere", "x", "-k", "0"), "must be 1 or more"),
        (("eval", "--knowledge", "/nowhere.jsonl", "--questions", "/nowhere.jsonl", "--json"), "cannot be read"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments: tuple[str, ...], message: str) -> None:
    done = retrieval(*arguments, status=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_bad_row_is_named_in_one_line(store: Path, tmp_path: Path) -> None:
    (store / "faqs.csv").write_text("id,question,answer\na,b,\n", "utf-8")
    done = retrieval("search", "--store", store, "x", "--json", "--cache", tmp_path, status=2)
    assert done.stderr == "faqs.csv, row 2, answer: is empty; fill it in or remove the row\n"
    bad_time = retrieval("search", "--store", tmp_path, "x", "--at", "soon", "--json", status=2)
    assert bad_time.stderr.startswith("--at: 'soon' is no ISO time")


def test_eval_prints_the_measures_of_the_contract(tmp_path: Path) -> None:
    knowledge = [
        {"id": "ship", "question": "How much is shipping?", "answer": "¥8", "questions": ["postage cost"]},
        {"id": "back", "question": "怎么退货？", "answer": "七天内"},
        {"id": "page", "text": "Our showroom is in Hangzhou."},
        {"id": "gone", "question": "Is there a sale?", "answer": "Yes", "valid_until": "2020-01-01"},
    ]
    questions = [
        {"text": "what does delivery cost", "relevant": ["ship"]},
        {"text": "我要退货", "relevant": ["back"]},
        {"text": "where is your showroom", "relevant": ["page"]},
        {"text": "do you rent out sofas?", "relevant": []},
    ]
    for name, entries in (("K.jsonl", knowledge), ("Q.jsonl", questions)):
        (tmp_path / name).write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in entries), "utf-8")
    files = ("--knowledge", tmp_path / "K.jsonl", "--questions", tmp_path / "Q.jsonl")
    found = json.loads(retrieval("eval", *files, "--json").stdout)
    assert (found["n_passages"], found["n_questions"]) == (4, 4)
    assert found["recall@1"] == found["mrr@10"] == found["no_answer_auc"] == 1.0
    assert found["ms_per_query_p50"] > 0
    assert found["build_s"] > 0
