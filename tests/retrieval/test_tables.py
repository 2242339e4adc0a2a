"""The tables kept with a snapshot: a second start reads them, damaged and foreign ones are made anew."""

from __future__ import annotations

import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz.distance import OSA

from retrieval.embedder import VectorCache
from retrieval.errors import IndexDamaged
from retrieval.hybrid import HybridRetriever
from retrieval.index import build_index, load_index
from retrieval.lexical import Lexical
from retrieval.passages import Passage
from retrieval.retriever import LiveRetriever
from retrieval.spelling import Spelling
from retrieval.tables import ARRAYS
from tests.retrieval.conftest import NOW, HashingEmbedder
from tests.retrieval.test_index_damage import resign

QUERIES = ("another wording 7", "问题 3", "Answer", "nothing of this is there", "question 12?", "")


@pytest.fixture
def snapshot(faq: Callable[..., Passage], hashing: HashingEmbedder, tmp_path: Path) -> Path:
    passages = [
        faq(f"f{n}", f"question {n}", f"another wording {n}", f"问题 {n}", answer=f"Answer {n}.") for n in range(40)
    ]
    cache = VectorCache(None)
    build_index(passages, hashing, cache).save(tmp_path / "whole")
    cache.close()
    return tmp_path / "whole"


def test_what_is_read_finds_what_was_built(
    snapshot: Path, faq: Callable[..., Passage], hashing: HashingEmbedder
) -> None:
    loaded = HybridRetriever(load_index(snapshot, hashing), hashing)
    cache = VectorCache(None)
    built = HybridRetriever(build_index(loaded.index.passages, hashing, cache), hashing)
    cache.close()
    for query in QUERIES:
        assert loaded.search(query, 8, now=NOW) == built.search(query, 8, now=NOW)
    assert loaded.search("ANOTHER wording, 7!", 1, now=NOW)[0].confidence == 0.99  # letter for letter


def test_a_second_start_splits_no_text_into_words(
    store: Path, tmp_path: Path, hashing: HashingEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LiveRetriever(store, hashing, tmp_path / "cache")
    found = first.search("is delivery free", 3, now=NOW)
    first.close()

    def fail(*_: object) -> None:
        raise AssertionError("the words were made again")

    monkeypatch.setattr(Lexical, "__init__", fail)
    second = LiveRetriever(store, hashing, tmp_path / "cache")
    assert second.search("is delivery free", 3, now=NOW) == found
    second.close()


def test_tables_that_other_code_made_are_made_anew(
    store: Path, tmp_path: Path, hashing: HashingEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.tables.made_by", lambda: "an older version")
    LiveRetriever(store, hashing, tmp_path / "cache").close()
    (folder,) = (tmp_path / "cache" / "snapshots").iterdir()
    monkeypatch.undo()
    with pytest.raises(IndexDamaged, match="another version"):
        load_index(folder, hashing)
    LiveRetriever(store, hashing, tmp_path / "cache").close()
    load_index(folder, hashing)


@pytest.mark.parametrize("name", sorted(ARRAYS))
def test_arrays_that_lie_are_refused_or_harmless_even_with_a_right_checksum(
    snapshot: Path, hashing: HashingEmbedder, tmp_path: Path, name: str
) -> None:
    array = np.load(snapshot / name)
    lies = [array[:-1], array[::-1], np.concatenate([array, array]), array.astype(np.float64), array.reshape(1, -1)]
    for place in (0, len(array) // 2, -1):
        for value in (-1, 1 << 30, 255, float("nan")) if array.dtype.kind != "b" else ():
            lie = array.copy()
            with np.errstate(invalid="ignore"):
                lie[place] = np.array(value).astype(array.dtype)
            lies.append(lie)
    raw = (snapshot / name).read_bytes()
    contents = [raw.replace(b"(", b"(9999999999", 1), raw.replace(b"'<", b"'|O", 1), raw[:40], b"PK\x03\x04" + raw]
    folder = tmp_path / "hostile"
    for lie in [*lies, *contents]:
        shutil.copytree(snapshot, folder)
        if isinstance(lie, bytes):
            (folder / name).write_bytes(lie)
        else:
            np.save(folder / name, lie)
        resign(folder)
        try:
            retriever = HybridRetriever(load_index(folder, hashing), hashing)
        except IndexDamaged as exc:
            assert len(str(exc).splitlines()) == 1
        else:
            for query in QUERIES:
                assert len(retriever.search(query, 5, now=NOW)) <= 5
        shutil.rmtree(folder)


def test_a_glance_at_the_letters_loses_no_word_that_is_near() -> None:
    chance = random.Random(5)
    letters = string.ascii_lowercase[:6]
    words = {"".join(chance.choices(letters, k=chance.randint(4, 12))) for _ in range(4_000)}
    spelling = Spelling(words)
    for word in chance.sample(sorted(words), 300):
        at = chance.randrange(1, len(word))
        typed = chance.choice((word[:at] + word[at + 1 :], word[:at] + "b" + word[at:], word[:-2] + word[:-3:-1]))
        if len(typed) < Spelling.MIN_CHARS:
            continue
        most = 2 if len(typed) >= Spelling.TWO_FROM else 1
        near = [OSA.distance(typed, known) for known in words if known[0] == typed[0]]
        found = spelling.likely(typed)
        assert bool(found) == (min(near) <= most)
        assert all(OSA.distance(typed, known) == min(near) for known in found)
