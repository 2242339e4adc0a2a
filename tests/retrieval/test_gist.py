"""What of a message is searched for: its question, and not the talk around it."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import retrieval.readings
from retrieval.bilingual import BilingualEmbedder
from retrieval.calibrate import Problem, training_store
from retrieval.e5 import E5
from retrieval.embedder import VectorCache
from retrieval.encoders import load_moves
from retrieval.errors import RetrievalError
from retrieval.evaluate import Question, ask_all, measures
from retrieval.explain import Thresholds, dump_explanation, explanation_text
from retrieval.gist import SHIPPED, gist_of, load_gist
from retrieval.hybrid import MAX_QUERY_CHARS, HybridRetriever
from retrieval.index import build_index

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 11, 1, tzinfo=UTC)
ENCODERS = load_moves()[1]


def words_of(text: str) -> list[int]:
    """Return where each word of `text` begins; the first at 0."""
    return [0, *(n for n in range(1, len(text)) if text[n - 1] == " ")]


def gist(text: str, talk: str, weight: float = 4.0) -> str:
    """Return the gist of `text` where the words in `talk` are none of the question."""
    places = words_of(text)
    ends = [*places[1:], len(text)]
    said = [text[a:b].strip(" ,.?!") for a, b in zip(places, ends, strict=True)]
    return gist_of(text, places, np.array([-weight if word in talk.split() else 3.0 for word in said], np.float32))


@pytest.mark.parametrize(
    ("text", "talk", "expected"),
    [
        ("Hi, I'm Emily. Do you ship to Japan?", "Hi I'm Emily", "Do you ship to Japan?"),
        ("Do you ship to Japan? Thanks a lot!", "Thanks a lot", "Do you ship to Japan?"),
        ("Hello again, is it oven-proof, thanks, bye", "Hello again thanks bye", "is it oven-proof"),
        ("Is it oven-proof?", "nothing", "Is it oven-proof?"),
        ("Hi!! Is it oven-proof? 😊", "Hi 😊", "Is it oven-proof?"),
        # What stands between two parts of a question stays.
        ("Is it red? Sorry to ask. And is it heavy?", "Sorry to ask", "Is it red? Sorry to ask. And is it heavy?"),
        # Nothing of it is a question, and nothing but punctuation would go.
        ("Hi, I'm Emily", "Hi I'm Emily", ""),
        ("... is it red", "...", "... is it red"),
        ("", "", ""),
    ],
)
def test_a_stretch_of_the_text_is_kept(text: str, talk: str, expected: str) -> None:
    assert gist(text, talk) == expected


def test_weak_evidence_cuts_nothing_and_no_word_is_cut_in_two() -> None:
    assert gist("Hi, is it red?", "Hi", weight=1.0) == "Hi, is it red?"
    assert gist("Hi, is it red?", "Hi", weight=4.0) == "is it red?"
    assert gist("Hi is it red?", "Hi", weight=4.0) == "Hi is it red?"  # a cut at a mark is cheaper
    # Tokens are pieces of words: where one begins within a word all of it is kept.
    found = gist_of("reheating it", [0, 2, 6, 9], np.array([-9.0, 3.0, 3.0, 3.0], np.float32))
    assert found == "reheating it"
    # Chinese has no spaces: a cut between two characters takes more than one at a mark.
    places, logits = list(range(8)), np.array([-3, -3, 3, 3, 3, 3, 3, 3], np.float32)
    assert gist_of("你好多少钱包邮呢", places, logits) == "你好多少钱包邮呢"
    assert gist_of("你好，多少钱包邮", places, np.insert(logits, 2, -1.0)[:8]) == "多少钱包邮"


@pytest.mark.parametrize(
    "text", ["Hi, do you  ship  to Japan?", "你好我叫陈静，想问下ＱＨ １００１多少钱…", "ﬁne ①", "x", ""]
)
def test_places_are_where_the_pieces_of_a_text_begin(nano: E5, text: str) -> None:
    places = nano.places(text)
    assert len(places) == len(nano.read([text], as_query=True)[1][0])
    assert places == sorted(places)
    assert places[:1] == [0]
    assert all(0 <= place <= len(text) for place in places)
    if text.startswith("Hi"):
        pieces = [text[a:b].strip() for a, b in zip(places, [*places[1:], len(text)], strict=True)]
        assert pieces == ["Hi", ",", "do", "you", "ship", "to", "Japan", "?"]


def test_network_is_the_one_that_is_trained(nano: E5) -> None:
    script = runpy.run_path(str(ROOT / "examples" / "training" / "gist.py"))
    network = script["Network"](nano.dim).eval()
    tensors = {name.removeprefix("e5/"): torch.from_numpy(t).float() for name, t in load_file(SHIPPED).items()}
    network.load_state_dict(tensors)
    for middle in nano.read(["hi im Emily, do you ship to Japan?", "在线等，包邮吗", "x"], as_query=True)[2]:
        tokens = nano.own(middle)
        with torch.no_grad():
            expected = network(torch.from_numpy(tokens)[None], torch.ones(1, len(tokens)))[0].numpy()
        np.testing.assert_allclose(load_gist(ENCODERS).logits(tokens), expected, atol=2e-3)


def test_training_labels_what_stands_around_the_question(nano: E5) -> None:
    script = runpy.run_path(str(ROOT / "examples" / "training" / "gist.py"))
    message = script["Message"]("Hi, I'm Emily. ", "Do you ship to Japan?", " Thanks!", "en")
    (tokens,), (labels,) = script["labelled"]([message], nano)
    assert len(tokens) == len(labels)
    ends = [*nano.places(message.text)[1:], len(message.text)]
    kept = [message.text[a:b] for a, b, yes in zip(nano.places(message.text), ends, labels, strict=True) if yes]
    assert "".join(kept).strip() == "Do you ship to Japan?"


def test_messages_it_learned_from_are_whole_and_share_no_question_with_what_is_measured() -> None:
    rows = [json.loads(line) for line in (ROOT / "examples/training/around.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 2400
    assert sum(row["lang"] == "zh" for row in rows) == 1200
    assert all(row["core"].strip() for row in rows)
    assert len({row["pre"] + row["core"] + row["post"] for row in rows}) == len(rows)
    measured = {
        squeezed(text)
        for path in (*(ROOT / "examples").glob("*cases.jsonl"), ROOT / "examples" / "questions.jsonl")
        for line in path.read_text("utf-8").splitlines()
        for text in json.loads(line).get("turns", (json.loads(line).get("text", ""),))
    }
    assert not measured & {squeezed(row["core"]) for row in rows}
    learned = {squeezed(row[side]) for row in rows for side in ("pre", "post") if len(squeezed(row[side])) > 14}
    held = [json.loads(line) for line in (ROOT / "bench" / "talk.jsonl").read_text("utf-8").splitlines()]
    assert len(held) == 199
    assert not learned & {squeezed(row[side]) for row in held for side in ("pre", "post")}


def squeezed(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "gist.safetensors"
    with pytest.raises(RetrievalError, match="cannot be read"):
        load_gist(ENCODERS, path)
    tensors = load_file(SHIPPED)
    save_file(tensors, path, {"encoders": "others"})
    with pytest.raises(RetrievalError, match=r"other encoders; .*make default-gist"):
        load_gist(ENCODERS, path)
    for name in tensors:
        save_file({key: value for key, value in tensors.items() if key != name}, path, {"encoders": ENCODERS})
        with pytest.raises(RetrievalError, match="not what was written"):
            load_gist(ENCODERS, path)


class Hearing:
    """An embedder that hears every message whole, or what it is told to hear."""

    def __init__(self, model: BilingualEmbedder, hears: Callable[[str], str] = str) -> None:
        self._model, self._hears = model, hears

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def gist(self, text: str, question: object) -> str:
        return self._hears(text)


@pytest.fixture(scope="module")
def crafts() -> Problem:
    return training_store(ROOT / "examples" / "training" / "crafts")  # kept out of every training


@pytest.fixture(scope="module")
def shop(model: BilingualEmbedder, crafts: Problem) -> HybridRetriever:
    return HybridRetriever(build_index(crafts.passages, model, VectorCache(None)), model)


def hearing(shop: HybridRetriever, model: BilingualEmbedder, hears: Callable[[str], str] = str) -> HybridRetriever:
    embedder: Any = Hearing(model, hears)
    return HybridRetriever(shop.index, embedder)


def first(retriever: HybridRetriever, message: str) -> tuple[str, float]:
    (hit, *_) = retriever.search(message, 1, now=NOW)
    return hit.passage.id, hit.confidence


# Written for these tests; none of it is in what the network learned from.
AROUND = {
    "en": [
        ("Hello, Tom here. ", ""),
        ("", " thanks from rainy Leeds"),
        ("sorry if this was asked before but ", ""),
    ],
    "zh": [("你好我是王姐，", ""), ("", "，谢谢小哥哥辛苦啦"), ("我翻了半天没翻到想问问", "")],
}


def test_talk_around_a_question_costs_next_to_nothing(
    model: BilingualEmbedder, crafts: Problem, shop: HybridRetriever
) -> None:
    asked = [question for question in crafts.questions if question.relevant][::3]
    talked = []
    for n, question in enumerate(asked):
        before, after = AROUND["zh" if any(c >= "\u4e00" for c in question.text) else "en"][n % 3]
        talked.append(Question(before + question.text + after, question.relevant))
    alone, around, whole = (
        measures(ask_all(retriever, questions, now=NOW))["recall@1"] or 0.0
        for retriever, questions in ((shop, asked), (shop, talked), (hearing(shop, model), talked))
    )
    assert len(asked) > 50
    assert around >= alone - 0.03
    assert around > whole + 0.05


@pytest.mark.parametrize(
    ("before", "question", "after"),
    [
        ("Hi there, I'm Emily and I just found your lovely shop, ", "is Apple Pay among the ways to pay?", " cheers!"),
        ("你好呀，我是朋友介绍来的，", "换成顺丰要补多少差价", " 谢谢啦在线等"),
    ],
)
def test_a_question_is_found_as_surely_with_talk_around_it(
    model: BilingualEmbedder, shop: HybridRetriever, before: str, question: str, after: str
) -> None:
    message = before + question + after
    assert shop.gist(message, now=NOW) == question
    assert first(shop, message) == first(shop, question)
    assert first(shop, question)[1] > first(hearing(shop, model), message)[1] + 0.05
    found = shop.explain(message, now=NOW)
    assert (found.query, found.gist) == (message, question)
    assert f"searched for: {question}" in explanation_text(found, Thresholds())
    assert dump_explanation(found, Thresholds())["gist"] == question
    assert "searched for" not in explanation_text(shop.explain(question, now=NOW), Thresholds())


@pytest.mark.parametrize(
    "talk",
    ["Hello there, Tom here, first time on this site", "你好呀，我是王姐，朋友介绍来的", "many thanks, bye!"],
)
def test_talk_alone_asks_nothing_and_is_searched_whole(
    model: BilingualEmbedder, shop: HybridRetriever, talk: str
) -> None:
    assert shop.gist(talk, now=NOW) == ""
    assert shop.search(talk, 3, now=NOW) == hearing(shop, model).search(talk, 3, now=NOW)


def test_next_to_no_question_is_taken_for_talk(crafts: Problem, shop: HybridRetriever) -> None:
    heard = {question.text: shop.gist(question.text, now=NOW) for question in crafts.questions}
    assert "" not in heard.values()
    cut = [text for text, gist in heard.items() if squeezed(gist) != squeezed(text)]
    assert len(cut) <= 0.03 * len(heard), cut


def test_what_finds_more_whole_is_searched_whole(model: BilingualEmbedder, shop: HybridRetriever) -> None:
    message = "basket still not paid for, when does it get cancelled"
    wrong = hearing(shop, model, lambda text: text.split()[0])
    assert wrong.gist(message, now=NOW) == message
    assert first(wrong, message) == first(hearing(shop, model), message)


def test_a_code_and_a_known_wording_are_never_cut(model: BilingualEmbedder, shop: HybridRetriever) -> None:
    heard: list[str] = []

    def hears(text: str) -> str:
        heard.append(text)
        return "does it work"

    retriever = hearing(shop, model, hears)
    assert retriever.gist("does it work: HELLO20", now=NOW) == "does it work: HELLO20"
    assert heard == ["does it work: HELLO20"]
    wording = next(passage.questions[0] for passage in shop.index.passages if passage.questions)
    assert retriever.gist(wording, now=NOW) == wording
    assert len(heard) == 1  # it was not even asked
    assert retriever.gist("  ", now=NOW) == ""


def test_a_name_that_was_masked_is_never_cut(model: BilingualEmbedder, shop: HybridRetriever) -> None:
    retriever = hearing(shop, model, lambda text: "哪天到账")
    assert retriever.gist("[机构]卡哪天到账", now=NOW) == "[机构]卡哪天到账"
    retriever = hearing(shop, model, lambda text: "[机构]卡哪天到账")
    assert retriever.gist("你好，[机构]卡哪天到账", now=NOW) == "[机构]卡哪天到账"


def test_a_message_longer_than_what_is_read_stays_whole(model: BilingualEmbedder, shop: HybridRetriever) -> None:
    long = "你好呀，我是朋友介绍来的，" + "换成顺丰要补多少差价，" * 200
    assert shop.gist(long, now=NOW) == long[:MAX_QUERY_CHARS]
    assert first(shop, long)[0] == first(shop, "换成顺丰要补多少差价")[0]


def test_shouting_is_heard_as_speaking(model: BilingualEmbedder, shop: HybridRetriever) -> None:
    assert first(shop, "HOW MUCH DOES THE SHADE CARD COST") == first(shop, "how much does the shade card cost")
    # The part that is searched for is the message's own, in capitals.
    retriever = hearing(shop, model, lambda text: text.removeprefix("hello there my friend "))
    said = "HELLO THERE MY FRIEND HOW MUCH DOES THE SHADE CARD COST"
    assert retriever.gist(said, now=NOW) == "HOW MUCH DOES THE SHADE CARD COST"


def test_a_remembered_vector_is_enough_where_nothing_is_read(
    model: BilingualEmbedder, shop: HybridRetriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval.readings, "MAX_PASSAGES", 10)
    large = HybridRetriever(build_index(shop.index.passages, model, VectorCache(None)), model)
    message = "hello, Emily here! is Apple Pay among the ways to pay?"
    assert large.gist(message, now=NOW) == "is Apple Pay among the ways to pay?"
    again = HybridRetriever(large.index, model)
    again.remember([message], model.embed_queries([message]))
    monkeypatch.setattr(model, "hidden", None)  # whoever embeds now fails
    assert again.gist(message, now=NOW) == message
    assert again.search(message, 1, now=NOW)
