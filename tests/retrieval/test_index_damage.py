"""Three hundred damaged and hostile snapshots: each refused in one line, quickly, in little memory, and rebuilt."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval.embedder import VectorCache
from retrieval.errors import IndexDamaged
from retrieval.index import build_index, load_index
from retrieval.passages import Passage
from retrieval.retriever import LiveRetriever
from retrieval.tables import FILES
from retrieval.vectors import LISTED_UNITS, LocalVectors
from tests.retrieval.conftest import NOW, HashingEmbedder

N_MUTANTS = 300
NAMES = ("manifest.json", "passages.jsonl", "vectors.faiss", *FILES)


@pytest.fixture
def snapshot(faq: Callable[..., Passage], hashing: HashingEmbedder, tmp_path: Path) -> Path:
    passages = [faq(f"f{n}", f"question {n}", f"another wording {n}", answer=f"Answer {n}.") for n in range(40)]
    cache = VectorCache(None)
    build_index(passages, hashing, cache).save(tmp_path / "whole")
    cache.close()
    return tmp_path / "whole"


def mutate(folder: Path, chance: random.Random) -> str:
    """Damage one file of `folder` in one of many ways, and say how."""
    path = folder / chance.choice(NAMES)
    raw = bytearray(path.read_bytes())
    how = chance.choice(("bits", "cut", "longer", "zeros", "swapped", "gone", "folder", "link", "spliced"))
    if how == "bits":
        for _ in range(chance.choice((1, 1, 8, 64))):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        path.write_bytes(raw)
    elif how == "cut":
        path.write_bytes(raw[: chance.randrange(len(raw))])
    elif how == "longer":
        path.write_bytes(raw + chance.randbytes(chance.choice((1, 4096))))
    elif how == "zeros":
        start = chance.randrange(len(raw) - 16)
        raw[start : start + 16] = bytes(16) if raw[start : start + 16] != bytes(16) else b"\xff" * 16
        path.write_bytes(raw)
    elif how == "swapped":
        other = folder / NAMES[(NAMES.index(path.name) + 1) % len(NAMES)]
        path.write_bytes(other.read_bytes())
    elif how == "gone":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "link":
        path.unlink()
        path.symlink_to("/dev/zero")
    else:
        start = chance.randrange(len(raw))
        path.write_bytes(raw[:start] + raw[start + 1 :])
    return f"{how} {path.name}"


def resign(folder: Path) -> None:
    """Make the manifest's checksums right again, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["sha256"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["sha256"]}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def test_three_hundred_mutants_are_refused_in_one_line_and_little_memory(
    snapshot: Path, hashing: HashingEmbedder, tmp_path: Path
) -> None:
    chance = random.Random(3)
    load_index(snapshot, hashing)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(N_MUTANTS):
        folder = tmp_path / "mutant"
        shutil.copytree(snapshot, folder)
        how = mutate(folder, chance)
        before = (folder / "manifest.json").read_bytes() if (folder / "manifest.json").is_file() else b""
        try:
            load_index(folder, hashing)
        except IndexDamaged as exc:
            assert len(str(exc).splitlines()) == 1, how
            assert len(str(exc)) < 400, how
        else:
            # A flipped bit in a mean's last digit or a name of no meaning: all that was read is what was written.
            assert "manifest.json" in how, (number, how)
            json.loads(before)
        shutil.rmtree(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100 << 10


def test_a_vectors_file_that_declares_huge_sizes_is_refused_even_with_a_right_checksum(
    snapshot: Path, hashing: HashingEmbedder, tmp_path: Path
) -> None:
    raw = (snapshot / "vectors.faiss").read_bytes()
    for offset in range(0, 48, 4):
        for value in (0x7FFFFFFF, 0xFFFFFFFF, 0x10000, 0, 1 << 30):
            folder = tmp_path / "hostile"
            shutil.copytree(snapshot, folder)
            (folder / "vectors.faiss").write_bytes(raw[:offset] + struct.pack("<I", value) + raw[offset + 4 :])
            resign(folder)
            try:
                index = load_index(folder, hashing)
            except IndexDamaged as exc:
                assert len(str(exc).splitlines()) == 1
            else:  # fields that FAISS keeps for nobody, or a value that was there before
                assert index.vectors.cosines(np.ones(64, np.float32), np.arange(120)).shape == (120,)
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"format": 5, "embedder": ' + "[" * 50_000,
        '{"format": 5, "knowledge": 1' + "0" * 6_000 + "}",
        '{"format": 1e999}',
        "null",
        "[]",
        '"5"',
        '{"format": 5}',
        "\ufeff{}",
        "x" * (2 << 20),
    ],
)
def test_a_hostile_manifest_is_refused(snapshot: Path, hashing: HashingEmbedder, content: str) -> None:
    (snapshot / "manifest.json").write_text(content, "utf-8")
    with pytest.raises(IndexDamaged):
        load_index(snapshot, hashing)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sha256", {"../../../etc/passwd": "0" * 64}),
        ("sha256", {"/dev/zero": "0" * 64}),
        ("sha256", {}),
        ("sha256", {"vectors.faiss": None, "passages.jsonl": 5}),
        ("means", {"zh": [1e400] * 64, "en": [0.0] * 64}),
        ("means", {"zh": [0.0] * 63, "en": [0.0] * 64}),
        ("means", {"zh": [[[0.0]]], "en": "x"}),
        ("n_units", 10**18),
        ("n_passages", "40"),
        ("knowledge", "0" * 16),
    ],
)
def test_a_manifest_that_lies_is_refused(snapshot: Path, hashing: HashingEmbedder, field: str, value: object) -> None:
    manifest = json.loads((snapshot / "manifest.json").read_text("utf-8"))
    (snapshot / "manifest.json").write_text(json.dumps(manifest | {field: value}), "utf-8")
    with pytest.raises(IndexDamaged):
        load_index(snapshot, hashing)


def test_lists_that_lie_are_refused_even_with_a_right_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.vectors.FLAT_UNITS", 100)
    chance = np.random.default_rng(0)
    vectors = chance.standard_normal((2 * LISTED_UNITS + 200, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    zh = np.arange(len(vectors)) % 2 == 0
    names = LocalVectors.build(vectors, zh).save(tmp_path)
    assert names == ["vectors.faiss", "lists-zh.faiss", "lists-en.faiss"]
    sums = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
    LocalVectors.load(tmp_path, sums, zh, 16)
    raw = (tmp_path / "lists-zh.faiss").read_bytes()
    for offset in [*range(0, 400, 8), *(len(raw) - 8 * n for n in range(1, 40))]:
        broken = raw[:offset] + struct.pack("<Q", 0x7FFFFFFFFFFF) + raw[offset + 8 :]
        (tmp_path / "lists-zh.faiss").write_bytes(broken[: len(raw)])
        sums["lists-zh.faiss"] = hashlib.sha256((tmp_path / "lists-zh.faiss").read_bytes()).hexdigest()
        try:
            loaded = LocalVectors.load(tmp_path, sums, zh, 16)
        except IndexDamaged as exc:
            assert len(str(exc).splitlines()) == 1
        else:
            found = loaded.nearest(vectors[0], "zh", None, 50)[1]
            assert ((found >= 0) & (found < len(vectors))).all()


def test_a_damaged_snapshot_is_rebuilt_while_the_knowledge_that_is_live_goes_on(
    store: Path, tmp_path: Path, hashing: HashingEmbedder
) -> None:
    live = LiveRetriever(store, hashing, tmp_path / "cache")
    version, before = live.version, live.search("is delivery free", 3, now=NOW)
    (folder,) = (tmp_path / "cache" / "snapshots").iterdir()
    chance = random.Random(4)
    for _ in range(25):
        mutate(folder, chance)
        assert live.search("is delivery free", 3, now=NOW) == before  # nothing on disk is needed to search
        assert live.reload()
        assert live.version == version
        assert load_index(folder, hashing).version == version
    live.close()
