"""index.py: what is embedded as what, and snapshots that are whole or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval.embedder import VectorCache
from retrieval.errors import IndexDamaged
from retrieval.index import Index, build_index, load_index, units
from retrieval.passages import Passage
from tests.retrieval.conftest import HashingEmbedder


@pytest.fixture
def index(faq: Callable[..., Passage], hashing: HashingEmbedder) -> Index:
    cache = VectorCache(None)
    passages = [faq("a", "Do you ship?", "is there delivery"), faq("b", "怎么退货？", answer="七天内", lang="zh")]
    built = build_index(passages, hashing, cache)
    cache.close()
    return built


def test_every_wording_and_one_body_is_a_unit(index: Index) -> None:
    assert [(unit.owner, unit.text, unit.is_body) for unit in units(index.passages)] == [
        (0, "Do you ship?", False),
        (0, "is there delivery", False),
        (0, "Do you ship? is there delivery\nYes.", True),
        (1, "怎么退货？", False),
        (1, "怎么退货？\n七天内", True),
    ]


def test_nearest_keeps_to_what_is_allowed(index: Index, hashing: HashingEmbedder) -> None:
    vector = hashing.embed_queries(["Do you ship?"])[0]
    both, second, none = (np.array(allowed) for allowed in ([True, True], [False, True], [False, False]))
    assert index.nearest(vector, vector, "en", both, 1)[1].tolist() == [0]
    assert index.nearest(vector, vector, "en", second, 5)[1].tolist() == []  # of the other language
    cosines, numbers = index.nearest(vector, vector, "zh", second, 5)
    assert sorted(numbers.tolist()) == [3, 4]
    assert cosines[0] >= cosines[1]
    assert len(index.nearest(vector, vector, "zh", none, 5)[1]) == 0


def test_a_snapshot_gives_the_same_index(index: Index, hashing: HashingEmbedder, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "one"
    index.save(folder)
    index.save(folder)  # again over itself
    loaded = load_index(folder, hashing)
    assert loaded.passages == index.passages
    assert loaded.version == index.version
    vector = hashing.embed_queries(["退货"])[0]
    numbers = np.arange(5)
    assert np.array_equal(loaded.cosines(vector, numbers), index.cosines(vector, numbers))
    assert [path.name for path in folder.parent.iterdir()] == ["one"]  # nothing temporary stays
    assert not list(folder.glob("*.pkl"))


@pytest.mark.parametrize("name", ["manifest.json", "passages.jsonl", "vectors.faiss"])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_snapshot_is_refused(
    index: Index, hashing: HashingEmbedder, tmp_path: Path, name: str, damage: str
) -> None:
    folder = tmp_path / "one"
    index.save(folder)
    path = folder / name
    raw = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else raw.replace(raw[-20:], b"x" * 20))
    with pytest.raises(IndexDamaged):
        load_index(folder, hashing)


def test_a_snapshot_of_another_model_or_format_is_refused(
    index: Index, hashing: HashingEmbedder, tmp_path: Path
) -> None:
    index.save(tmp_path / "one")
    with pytest.raises(IndexDamaged, match="another version"):
        load_index(tmp_path / "one", HashingEmbedder("hashing-2"))
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text("utf-8"))
    (tmp_path / "one" / "manifest.json").write_text(json.dumps(manifest | {"format": 99}), "utf-8")
    with pytest.raises(IndexDamaged, match="another version"):
        load_index(tmp_path / "one", hashing)
