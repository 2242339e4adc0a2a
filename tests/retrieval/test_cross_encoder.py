"""The cross-encoder: its network is the one that was trained, what goes on from it, and where it has no part."""

from __future__ import annotations

import runpy
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import retrieval.hybrid
import retrieval.readings
from retrieval.bilingual import BilingualEmbedder
from retrieval.calibrate import training_store
from retrieval.cross_encoder import MAX_PASSAGE_TOKENS, SHIPPED, load_cross_encoder
from retrieval.embedder import VectorCache
from retrieval.encoders import load_moves
from retrieval.errors import RetrievalError
from retrieval.evaluate import ask_all, measures
from retrieval.hybrid import HybridRetriever
from retrieval.index import build_index
from tests.retrieval.test_reranker import SHOP

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 11, 1, tzinfo=UTC)
ENCODERS = load_moves()[1]
TEXTS = [
    "We are open every day but Sunday.",
    "我们每天营业，周日休息。",
    "Sofas and wardrobes come by our own van within ten days. " * 14,
    "退",
    "",
]


def test_network_is_the_one_that_is_trained(model: BilingualEmbedder) -> None:
    script = runpy.run_path(str(ROOT / "examples" / "training" / "cross_encode.py"))
    shipped = {name.removeprefix("e5/"): torch.from_numpy(tensor) for name, tensor in load_file(SHIPPED).items()}
    network = script["Network"]().eval()
    network.load_state_dict({
        name: shipped[name] * shipped[scale][:, None]
        if (scale := f"{name.removesuffix('weight')}scale") in shipped else shipped[name]
        for name in network.state_dict()
    })  # fmt: skip
    again = network.tensors(shipped["mean"], shipped["step"] / script["STEPS"])
    assert again.keys() == load_file(SHIPPED).keys()
    for name, tensor in load_file(SHIPPED).items():
        np.testing.assert_allclose(again[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)
    questions = [hidden[2] for hidden in model.hidden(["when do you open?", "周日营业吗"], as_query=True)[1]]
    passages = [hidden[2][:MAX_PASSAGE_TOKENS] for hidden in model.hidden(TEXTS, as_query=False)[1]]
    padded, theirs_real = script["batch_loss"].__globals__["padded"]([torch.from_numpy(one) for one in passages])
    ours, _ = load_cross_encoder(ENCODERS)
    for question in questions:
        asked, real = torch.from_numpy(question)[None], torch.ones(1, len(question), dtype=torch.bool)
        which = torch.zeros(len(passages), dtype=torch.int64)
        with torch.no_grad():
            expected = network(asked, real, which, padded, theirs_real).numpy()
        found = [ours.logit(question, ours.passage(one)) for one in passages]
        # The values on the way are 8 bits here: within a tenth of what sets these passages apart.
        assert expected.max() - expected.min() > 3
        assert np.abs(found - expected).max() < 0.1 * (expected.max() - expected.min()), (found, expected)


def test_passages_are_read_alike_in_any_company(model: BilingualEmbedder) -> None:
    passages = model.read_passages(TEXTS)[1]
    assert len(passages[2][2]) * model.width == MAX_PASSAGE_TOKENS * 384
    for question in ("when do you open on sundays?", "周日营业吗", ""):
        (asked,) = model.read_queries([question])[1]
        together = model.closer(asked, passages)
        assert np.isfinite(together).all()
        assert together.tolist() == [float(model.closer(asked, [one])[0]) for one in passages]
        assert together.tolist() == model.closer(asked, passages[::-1]).tolist()[::-1]
    assert model.closer(asked, []).shape == (0,)


def test_what_says_nothing_can_be_read() -> None:
    network, _ = load_cross_encoder(ENCODERS)
    nothing = np.zeros((0, 384), np.float32)
    assert np.isfinite(network.logit(nothing, network.passage(nothing)))


@pytest.mark.parametrize("change", ["missing", "shape", "truncated", "absent"])
def test_damaged_weights_are_refused(tmp_path: Path, change: str) -> None:
    path, tensors = tmp_path / "cross_encoder.safetensors", load_file(SHIPPED)
    if change == "missing":
        del tensors["e5/layers.1.fi.weight"]
    if change == "shape":
        tensors["e5/inner.weight"] = tensors["e5/inner.weight"][:, :-1]
    if change != "absent":
        save_file(tensors, path, {"encoders": ENCODERS})
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RetrievalError, match="cross-encoder"):
        load_cross_encoder(ENCODERS, path)


def test_one_of_other_encoders_is_refused() -> None:
    with pytest.raises(RetrievalError, match="make default-reranker"):
        load_cross_encoder("0123abcd")


def test_a_store_that_had_no_part_in_the_training_is_answered_better(
    model: BilingualEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = training_store(ROOT / "examples" / "training" / "phones")
    index = build_index(problem.passages, model, VectorCache(None))
    texts = [question.text for question in problem.questions]
    vectors, read = model.read_queries(texts)
    found = {}
    for share in (retrieval.hybrid.CLOSER, 0.0):
        monkeypatch.setattr(retrieval.hybrid, "CLOSER", share)
        retriever = HybridRetriever(index, model)
        retriever.remember(texts, vectors, read)
        found[share > 0] = measures(ask_all(retriever, problem.questions, now=NOW))

    def gain(name: str) -> float:
        return (found[True][name] or 0) - (found[False][name] or 0)

    assert gain("recall@1") >= 0, found
    assert gain("mrr@10") > 0, found
    assert gain("no_answer_auc") > 0.02, found


def test_large_stores_are_not_read_closer(model: BilingualEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = VectorCache(None)
    small = build_index(SHOP, model, cache)
    monkeypatch.setattr(retrieval.readings, "MAX_CLOSER", len(SHOP) - 1)
    large = build_index(SHOP, model, cache)
    assert small.readings is not None
    assert small.readings.are_closer
    assert large.readings is not None
    assert not large.readings.are_closer
    found = {}
    for index in (small, large):
        retriever = HybridRetriever(index, model)
        assert retriever.reads
        (first, *_) = retriever.explain("can I send it back?", now=NOW).hits
        assert first.hit.passage.id == "return"
        found[index] = first.parts["read"]
    assert found[small] != found[large] != 0
