"""The reranker: its network is the one that was trained, what it reads is kept, and where it has no part."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import retrieval.readings
from retrieval.bilingual import BilingualEmbedder
from retrieval.calibrate import training_store
from retrieval.confidence import load_calibration
from retrieval.embedder import ReadPassage, VectorCache
from retrieval.encoders import load_moves
from retrieval.errors import IndexDamaged, RetrievalError
from retrieval.evaluate import ask_all, measures
from retrieval.hybrid import HybridRetriever
from retrieval.index import Index, build_index, load_index
from retrieval.passages import Passage
from retrieval.reranker import MAX_PASSAGE_TOKENS, SHIPPED, Reranker, load_rerankers

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 11, 1, tzinfo=UTC)
ENCODERS = load_moves()[1]


def faq(name: str, question: str, answer: str, lang: str = "en") -> Passage:
    return Passage(name, "faq", question, answer, lang, "faqs.csv", questions=(question,), approved=True)


SHOP = [
    faq("hours", "When are you open?", "We answer from 9 in the morning to 6 in the evening, every day but Sunday."),
    faq("deliver", "How long does delivery take?", "Parcels arrive two to four days after we have sent them."),
    faq("bulky", "How long do sofas take to arrive?", "Sofas and wardrobes come by our own van within ten days."),
    faq("return", "Can I send something back?", "Yes, within 30 days, unused and in its box. We refund the price."),
    faq("pay", "How can I pay?", "By card, by invoice, or with PayPal. We take no cash."),
    faq("gift", "Do you wrap gifts?", "Yes, for three euros a piece, with a card that you write yourself."),
    faq("wash", "Can the covers be washed?", "The covers come off and may be washed at 40 degrees."),
    faq("hours-zh", "你们几点上班？", "每天早上九点到晚上六点，周日休息。", "zh"),
    faq("return-zh", "买了不喜欢可以退吗？", "三十天内未使用、包装完好可以退货，货款原路退回。", "zh"),
]


@pytest.fixture
def index(model: BilingualEmbedder, shop_cache: VectorCache) -> Index:
    return build_index(SHOP, model, shop_cache)


@pytest.fixture(scope="module")
def shop_cache() -> VectorCache:
    return VectorCache(None)


def lengths(*counts: int, dim: int = 384) -> list[np.ndarray[Any, Any]]:
    drawn = np.random.default_rng(3)
    return [drawn.normal(size=(count, dim)).astype(np.float32) for count in counts]


def test_network_is_the_one_that_is_trained() -> None:
    script = runpy.run_path(str(ROOT / "examples" / "training" / "rerank.py"))
    torch.manual_seed(1)
    mean, length = torch.randn(384) / 3, torch.tensor(1.7)
    network = script["Network"](mean, length).eval()
    with torch.no_grad():
        for tensor in network.parameters():
            tensor += torch.randn_like(tensor) * 0.05
    (question,), passages = lengths(9), lengths(20, 1, 128)
    ours = Reranker(network.tensors())
    plain = [((torch.from_numpy(one) - mean) / length).bfloat16() for one in (question, *passages)]
    questions, real = script["padded"](plain[:1])
    theirs_padded, theirs_real = script["padded"](plain[1:])
    which = torch.zeros(len(passages), dtype=torch.int64)
    with torch.no_grad():
        expected = network(questions.float(), real, which, theirs_padded.float(), theirs_real).numpy()
    found = ours.logits(ours.question(question), [ours.passage(one) for one in passages])
    # bfloat16 there, 16-bit weights and 8-bit tokens here.
    assert np.abs(expected).max() > 0.3
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_a_passage_is_read_alike_alone_and_beside_longer_ones() -> None:
    reranker = load_rerankers(ENCODERS)[0]["e5"]
    question = reranker.question(lengths(7)[0])
    passages = [reranker.passage(one) for one in lengths(3, 90, 30, 200)]
    assert len(passages[-1]) == MAX_PASSAGE_TOKENS
    together = reranker.logits(question, passages)
    alone = [float(reranker.logits(question, [one])[0]) for one in passages]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert len(set(alone)) == 4


def test_passages_are_read_alike_in_any_company(model: BilingualEmbedder) -> None:
    texts = ["We are open every day.", "我们每天营业。", "Sofas come by our own van, within ten days. " * 9, "", "退"]
    passages = model.read_passages(texts)[1]
    assert model.logits(model.read_queries(["open?"])[1][0], []).shape == (0,)
    for question in ("when do you open on sundays?", "周日营业吗", "", "?"):
        (asked,) = model.read_queries([question])[1]
        together = model.logits(asked, passages)
        alone = [float(model.logits(asked, [one])[0]) for one in passages]
        np.testing.assert_allclose(together, alone, atol=1e-4)
        np.testing.assert_allclose(model.logits(asked, passages[::-1]), together[::-1], atol=1e-4)


def test_texts_without_tokens_are_read_as_saying_nothing() -> None:
    reranker = load_rerankers(ENCODERS)[0]["e5"]
    nothing = reranker.passage(np.zeros((0, 384), np.float32))
    question = reranker.question(lengths(5)[0])
    assert np.isfinite(reranker.logits(question, [nothing])).all()
    assert np.isfinite(reranker.logits(question[:0], [nothing])).all()
    assert reranker.logits(question, []).shape == (0,)


@pytest.mark.parametrize("change", ["missing", "shape", "truncated", "absent"])
def test_damaged_weights_are_refused(tmp_path: Path, change: str) -> None:
    path, tensors = tmp_path / "reranker.safetensors", load_file(SHIPPED)
    if change == "missing":
        del tensors["e5/blocks.1.out.weight"]
    if change == "shape":
        tensors["e5/inner.weight"] = tensors["e5/inner.weight"].reshape(-1)
    if change != "absent":
        save_file(tensors, path, {"encoders": ENCODERS})
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RetrievalError, match="reranker"):
        load_rerankers(ENCODERS, path)


def test_a_reranker_of_other_encoders_is_refused() -> None:
    with pytest.raises(RetrievalError, match="make default-reranker"):
        load_rerankers("0123abcd")


def test_what_is_read_has_a_part_in_score_and_confidence(index: Index, model: BilingualEmbedder) -> None:
    retriever = HybridRetriever(index, model)
    assert retriever.reads
    found = retriever.explain("I don't like it, can I get my money back?", now=NOW)
    assert found.hits[0].hit.passage.id == "return"
    best = found.hits[0]
    assert best.hit.score == pytest.approx(sum(best.parts.values()), abs=1e-5)
    assert best.parts["read"] > found.hits[1].parts["read"]
    read = [hit.features["read"] for hit in found.hits]
    assert best.features["read_lead"] == pytest.approx(read[0] - max(read[1:]), abs=1e-6)
    assert best.features["read_lead"] > 0
    assert "read" in best.logit


def test_a_store_that_had_no_part_in_the_training_is_answered_better(
    model: BilingualEmbedder, shop_cache: VectorCache
) -> None:
    problem = training_store(ROOT / "examples" / "training" / "crafts")
    index = build_index(problem.passages, model, shop_cache)
    texts = [question.text for question in problem.questions]
    vectors, read = model.read_queries(texts)
    found = {}
    for reads in (True, False):
        retriever = HybridRetriever(index, model, reads=reads)
        retriever.remember(texts, vectors, read)
        found[reads] = measures(ask_all(retriever, problem.questions, now=NOW))

    def gain(name: str) -> float:
        return (found[True][name] or 0) - (found[False][name] or 0)

    assert gain("recall@1") > 0.02, found
    assert gain("no_answer_auc") > 0.08, found


def test_snapshot_keeps_what_was_read(index: Index, model: BilingualEmbedder, tmp_path: Path) -> None:
    index.save(tmp_path / "one")
    again = load_index(tmp_path / "one", model)
    assert index.readings is not None
    assert again.readings is not None
    for number in range(len(SHOP)):
        for before, after in zip(index.readings.of(number), again.readings.of(number), strict=True):
            np.testing.assert_array_equal(before, after)
    found = [HybridRetriever(one, model).search("gift wrap?", now=NOW) for one in (index, again)]
    assert [(hit.passage.id, hit.score) for hit in found[0]] == [(hit.passage.id, hit.score) for hit in found[1]]
    path = tmp_path / "one" / retrieval.readings.TOKENS_FILE
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IndexDamaged, match="not what was written"):
        load_index(tmp_path / "one", model)


def test_cache_keeps_what_was_read(model: BilingualEmbedder, tmp_path: Path) -> None:
    class Counting:
        version, width, n = model.version, model.width, 0

        def read_queries(self, texts: Sequence[str]) -> Any:
            raise NotImplementedError

        def logits(self, question: Any, passages: Any) -> Any:
            raise NotImplementedError

        def closer(self, question: Any, passages: Any) -> Any:
            raise NotImplementedError

        def gist(self, text: str, question: Any) -> str:
            raise NotImplementedError

        def read_passages(self, texts: Sequence[str]) -> tuple[Any, list[ReadPassage]]:
            self.n += len(texts)
            return model.read_passages(texts)

    reads, texts = Counting(), ["We are open every day.", "我们每天营业。", "Sofas come by van."]
    cache = VectorCache(tmp_path / "cache.sqlite")
    first = cache.read(reads, texts[:2])
    second = cache.read(reads, texts)
    cache.close()
    assert reads.n == 3
    for before, after in zip(first, second, strict=False):
        assert [part.tolist() for part in before] == [part.tolist() for part in after]
    assert [len(part) > 0 for part in second[1]] == [True, False, True]  # MiniLM reads no Chinese


def test_large_stores_and_bare_questions_are_not_read(
    model: BilingualEmbedder, shop_cache: VectorCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = [Passage(p.id, "faq", p.title, "", p.lang, p.source, questions=p.questions) for p in SHOP]
    unread = HybridRetriever(build_index(bare, model, shop_cache), model)
    monkeypatch.setattr(retrieval.readings, "MAX_PASSAGES", len(SHOP) - 1)
    large = HybridRetriever(build_index(SHOP, model, shop_cache), model)
    for retriever in (unread, large):
        assert not retriever.reads
        assert retriever.calibration.weights == load_calibration().plain.weights
        (first, *_) = retriever.explain("can I send it back?", now=NOW).hits
        assert first.hit.passage.id == "return"
        assert "read" not in first.parts
        assert first.features["read"] == 0


def test_two_calibrations_are_shipped() -> None:
    shipped = load_calibration()
    assert shipped.weights["read"] > 0
    assert shipped.plain.weights["read"] == 0
    assert shipped.plain.plain is shipped.plain
