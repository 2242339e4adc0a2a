"""`python -m retrieval learn`: wordings proposed from dialogues, reviewed by a person, added to faqs.csv."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from retrieval.errors import BadStore
from retrieval.learn import REVIEW, Turn, add_wordings, read_review, wording_of
from tests.retrieval.in_process import retrieval

FAQS = (
    "id,question,answer,lang,questions,tags\r\n"
    'ship-zh,运费是多少？,"内地普通订单运费¥8，满¥99包邮。",zh,包邮吗|邮费怎么算,"a, ""b"""\r\n'
    "time-zh,下单后多久发货？,16:00前付款的订单当天发货，16:00之后的订单次日发货。,zh,,\r\n"
    "back-en,How do I return an item?,Request the return in My orders within 7 days of delivery.,en,send it back,\r\n"
    "card-en,How long is a gift card valid?,A gift card is valid for 3 years.,en\r\n"
)
DIALOGUES = [
    ["亲，买两个杯子运费咋算", "内地订单运费¥8，满¥99就包邮哦。", "78", "那还是要付¥8运费的。"],
    ["现在拍今天能发吗", "能的，16:00前付款的订单当天发货，16点之后的次日发。", "谢谢", "不客气"],
    ["hi, until when can I use the gift card my aunt gave me?", "A gift card is valid for 3 years."],
    ["can I send it back if my number is 13912345678?", "Request the return in My orders within 7 days of delivery."],
    ["do you sell sofas?", "Sorry, we do not sell sofas."],
    ["包邮吗", "内地普通订单运费¥8，满¥99包邮。"],
]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    (folder / "dialogues").mkdir(parents=True)
    (folder / "faqs.csv").write_bytes(FAQS.encode())
    lines = []
    for number, talk in enumerate(DIALOGUES):
        roles = ("user", "assistant") * len(talk)
        messages = [{"role": role, "content": text} for role, text in zip(roles, talk, strict=False)]
        lines.append(json.dumps({"id": f"d{number}", "messages": messages}, ensure_ascii=False))
    (folder / "dialogues" / "one.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def review(shop: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((shop / REVIEW).read_text("utf-8-sig"))))


def decide(shop: Path, decisions: dict[str, str]) -> None:
    rows = review(shop)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(row | {"decision": decisions.get(row["faq_id"], row["decision"])} for row in rows)
    (shop / REVIEW).write_text(out.getvalue(), "utf-8")


def test_wordings_are_proposed_reviewed_added_and_not_proposed_again(shop: Path, tmp_path: Path) -> None:
    learn = ("learn", "--store", shop, "--cache", tmp_path / "cache", "--json")
    proposed = json.loads(retrieval(*learn).stdout)
    assert {(one["question"], one["faq_id"]) for one in proposed} == {
        ("买两个杯子运费咋算", "ship-zh"),
        ("现在拍今天能发吗", "time-zh"),
        ("until when can I use the gift card my aunt gave me?", "card-en"),
    }
    assert [one["score"] for one in proposed] == sorted((one["score"] for one in proposed), reverse=True)
    assert (shop / "faqs.csv").read_bytes() == FAQS.encode(), "nothing goes live by itself"
    rows = review(shop)
    assert [row["decision"] for row in rows] == ["", "", ""]
    assert {row["dialogue"] for row in rows} == {"d0", "d1", "d2"}
    assert all("answer's words" in row["why"] for row in rows)

    decide(shop, {"ship-zh": "no", "time-zh": "是", "card-en": "YES"})
    applied = json.loads(retrieval(*learn, "--apply").stdout)
    assert (len(applied["accepted"]), applied["rejected"], applied["undecided"]) == (2, 1, 0)
    expected = FAQS.replace("次日发货。,zh,,", "次日发货。,zh,现在拍今天能发吗,")
    expected = expected.replace(
        "3 years.,en\r\n", "3 years.,en,until when can I use the gift card my aunt gave me?\r\n"
    )
    assert (shop / "faqs.csv").read_bytes() == expected.encode(), "every other byte stays"
    assert [(row["faq_id"], row["decision"]) for row in review(shop)] == [("ship-zh", "no")]

    assert json.loads(retrieval(*learn).stdout) == []
    search = ("search", "--store", shop, "现在拍今天能发吗", "-k", "1", "--json", "--cache", tmp_path / "cache")
    (hit,) = json.loads(retrieval(*search).stdout)
    assert (hit["id"], hit["confidence"] > 0.95) == ("time-zh", True)


def test_a_row_that_cannot_be_applied_stops_all_of_them(shop: Path) -> None:
    rows = (
        "新问法怎么问,nobody,yes",
        "send it back,ship-zh,yes",
        "我的电话13912345678能改吗,ship-zh,yes",
        "a|b,ship-zh,yes",
        "好好的问法怎么样,time-zh,yes",
    )
    text = "\n".join(["question,faq_id,decision", *rows]) + "\n"
    (shop / REVIEW).write_text(text, "utf-8")
    done = retrieval("learn", "--store", shop, "--apply", status=2)
    assert done.stderr.count("\n") == 1
    for said in (
        f"{REVIEW}, row 2, faq_id: 'nobody' is no FAQ of faqs.csv",
        "row 3, question: is a wording of back-en already",
        "row 4, question: looks like a visitor's number",
        "row 5, question: has a | or a line break",
    ):
        assert said in done.stderr
    assert (shop / "faqs.csv").read_bytes() == FAQS.encode()
    assert (shop / REVIEW).read_text("utf-8") == text


def test_a_decision_that_is_neither_yes_nor_no_is_named(shop: Path) -> None:
    (shop / REVIEW).write_text("question,faq_id,decision\n问法,ship-zh,perhaps\n", "utf-8")
    with pytest.raises(BadStore, match="row 2, decision: 'perhaps' is no decision; write yes or no"):
        read_review(shop)


def test_a_line_that_is_no_dialogue_is_named(shop: Path) -> None:
    (shop / "dialogues" / "two.jsonl").write_text('{"messages": "hi"}\n', "utf-8")
    done = retrieval("learn", "--store", shop, status=2)
    assert done.stderr.startswith("two.jsonl, row 1, messages: is no dialogue")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_the_file_keeps_its_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "faqs.csv"
    text = 'id;question;answer\r\na;"运费;是多少？";满九十九元包邮，其余收八元运费\r\nb;怎么退货？;七天内都可以退货\r\n'
    path.write_bytes(text.encode(encoding))
    add_wordings(path, {"a": ['要"运费"吗;吗', "邮费"]})
    expected = text.replace("answer\r\n", "answer;questions\r\n")
    expected = expected.replace("八元运费\r\n", '八元运费;"要""运费""吗;吗|邮费"\r\n')
    assert path.read_bytes() == expected.encode(encoding)


@pytest.mark.parametrize(
    ("said", "wording"),
    [
        ("您好，请问运费怎么算呀？", "运费怎么算呀？"),
        ("hello! how much is shipping", "how much is shipping"),
        ("我的邮箱a@b.example怎么改", None),
        ("订单20261116003到哪了", None),
        ("谢谢，那就这样", None),
        ("我住幸福路88号能送吗", None),
        ("this is a long story " * 10 + "ok?", None),
        ("好吗", None),
    ],
)
def test_only_questions_without_anything_personal_become_wordings(said: str, wording: str | None) -> None:
    assert wording_of(Turn(said, "reply", "d", first=True)) == wording
