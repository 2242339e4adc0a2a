"""
The built thing: every wording and every body as a vector and as words, in memory and on disk.

The only file that imports `faiss`. Knows which vector belongs to which passage; knows no clock, no fusion and no
confidence. A snapshot is a folder: `manifest.json` (format, embedder, knowledge version, checksums), `passages.jsonl`,
`vectors.faiss`. No pickle: a snapshot may come from another machine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.confidence import Calibration, load_calibration
from retrieval.embedder import Embedder, Progress, VectorCache, Vectors
from retrieval.errors import IndexDamaged
from retrieval.lexical import Lexical
from retrieval.load import content_hash, dump_passage, parse_passage
from retrieval.passages import Passage
from retrieval.words import codes, detect_lang, squash

# A flat search is a millisecond on one core; a second thread gains nothing and then spins on the embedder's core.
faiss.omp_set_num_threads(1)

FORMAT = 4
BODY_CHARS = 1_500  # what the model reads of a body in one window; more is only averaged in
# Every vector of e5 shares a direction, so that any two texts have a cosine of 0.75 and more. Taking the mean away
# makes 0 mean "unrelated". The store's own mean and the shipped one were equally good, half of each a hair better; a
# store's own is nothing for a store of three texts, so it counts like n / (n + CENTER_AFTER). Each language has its
# own: the difference of the two means is "is Chinese", which would keep translations apart.
CENTER_AFTER = 300
LANGS = ("zh", "en")


class Unit:
    """One thing a query may match: a wording of a passage, or its body."""

    __slots__ = ("is_body", "owner", "text")

    def __init__(self, owner: int, text: str, is_body: bool) -> None:
        self.owner = owner  # index into Index.passages
        self.text = text
        self.is_body = is_body


class Index:
    """Passages with their units, vectors and words. Immutable once built; safe for any number of threads."""

    def __init__(
        self,
        passages: Sequence[Passage],
        vectors: Vectors,
        means: Mapping[str, NDArray[np.float32]],
        embedder_version: str,
        version: str,
    ) -> None:
        """
        Put the index together from centred `vectors` (n_units, dim), one for each of `units(passages)`, in that order.

        `means`, by language, is what is taken from a query's vector, (dim,) each.
        """
        self.means = dict(means)
        self.passages = tuple(passages)
        self.version = version
        self.embedder_version = embedder_version
        self.units = units(self.passages)
        if len(vectors) != len(self.units):
            raise IndexDamaged(f"{len(vectors)} vectors for {len(self.units)} wordings and texts")
        self.sides = np.array([side_of(unit.text) == "zh" for unit in self.units], dtype=bool)  # which mean was taken
        self.owners = np.array([unit.owner for unit in self.units], dtype=np.int32)
        self.is_body = np.array([unit.is_body for unit in self.units], dtype=bool)
        self.first_unit = np.searchsorted(self.owners, np.arange(len(self.passages) + 1))  # its body is its last unit
        self.lexical = Lexical([body_of(passage) for passage in self.passages])
        self.by_id = {passage.id: number for number, passage in enumerate(self.passages)}
        self.by_squash: dict[str, list[int]] = {}  # a wording without spaces and signs -> its passages
        for unit in self.units:
            if not unit.is_body:
                self.by_squash.setdefault(squash(unit.text), []).append(unit.owner)
        self.by_code: dict[str, list[int]] = {}  # article number or coupon code -> its passages
        for number, passage in enumerate(self.passages):
            for code in passage_codes(passage):
                self.by_code.setdefault(code, []).append(number)
        self._faiss = faiss.IndexFlatIP(vectors.shape[1])
        if len(vectors):
            self._faiss.add(np.ascontiguousarray(vectors, dtype=np.float32))

    @property
    def dim(self) -> int:
        """The number of dimensions of a vector."""
        return int(self._faiss.d)

    def place(self, vector: NDArray[np.float32], query: str) -> NDArray[np.float32]:
        """Return the vector (dim,) of `query` centred as those in the index are, of length 1."""
        placed: NDArray[np.float32] = center(vector.reshape(1, -1), self.means[side_of(query)])[0]
        return placed

    def nearest(self, vector: NDArray[np.float32], allowed: NDArray[np.bool_], n: int) -> tuple[Any, Any]:
        """
        Return (cosines, unit numbers) of the `n` units nearest to `vector` (dim, placed) among the allowed, best first.

        `allowed` has shape (n_units,); fewer than `n` come back where fewer are allowed.
        """
        n = min(n, int(np.count_nonzero(allowed)))
        if n == 0:
            return np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
        parameters = None
        if not allowed.all():
            bitmap = np.packbits(allowed, bitorder="little")
            # A bitmap, not a list of ids: tested per vector, and it costs one bit each.
            selector = faiss.IDSelectorBitmap(bitmap)  # type: ignore[call-arg,arg-type]  # its stubs lack the wrapper
            parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        cosines, numbers = self._faiss.search(vector.reshape(1, -1), n, params=parameters)
        found = numbers[0] >= 0
        return cosines[0][found], numbers[0][found]

    def cosines(self, vector: NDArray[np.float32], numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the cosine of `vector` (dim, placed) and each of these units, shape (len(numbers),)."""
        if len(numbers) == 0:
            return np.zeros(0, dtype=np.float32)
        found: NDArray[np.float32] = self._faiss.reconstruct_batch(numbers) @ vector
        return found

    def save(self, folder: Path) -> None:
        """
        Write the snapshot `folder`; it appears whole or not at all, and replaces a damaged one. Blocks on disk.

        Raises:
            OSError: the disk is full or read-only; nothing of it stays.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            faiss.write_index(self._faiss, str(beside / "vectors.faiss"))
            with (beside / "passages.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                for passage in self.passages:
                    file.write(json.dumps(dump_passage(passage), ensure_ascii=False) + "\n")
            manifest = {
                "format": FORMAT,
                "embedder": self.embedder_version,
                "knowledge": self.version,
                "dim": self.dim,
                "means": {lang: [round(float(value), 7) for value in mean] for lang, mean in self.means.items()},
                "n_units": len(self.units),
                "sha256": {name: _sha256(beside / name) for name in ("passages.jsonl", "vectors.faiss")},
            }
            (beside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
            if folder.exists():
                shutil.rmtree(folder)  # a rename does not replace a folder that has something in it
            beside.replace(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def build_index(
    passages: Sequence[Passage],
    embedder: Embedder,
    cache: VectorCache,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> Index:
    """
    Embed what the cache does not have and return the index. Blocks: about 10 to 40 ms a new text and core.

    Raises:
        RetrievalError: the embedder failed.
    """
    found = units(passages)
    bodies = [number for number, unit in enumerate(found) if unit.is_body]
    wordings = [number for number, unit in enumerate(found) if not unit.is_body]
    vectors = np.zeros((len(found), embedder.dim), dtype=np.float32)

    def after(n_before: int) -> Progress | None:
        return (lambda n, _: progress(n_before + n, len(found))) if progress else None

    # A wording and a query are alike, so both go in as queries; a body answers one, so it goes in as a passage.
    vectors[wordings] = cache.embed(embedder, [found[n].text for n in wordings], as_query=True, progress=after(0))
    texts = [found[n].text[:BODY_CHARS] for n in bodies]
    vectors[bodies] = cache.embed(embedder, texts, as_query=False, progress=after(len(wordings)))
    calibration = calibration or load_calibration()
    sides = np.array([side_of(unit.text) for unit in found], dtype=object)
    is_body = np.array([unit.is_body for unit in found], dtype=bool)
    means: dict[str, NDArray[np.float32]] = {}
    for lang in LANGS:
        for role, chosen in (("passage", is_body & (sides == lang)), ("query", ~is_body & (sides == lang))):
            mean = _mean(vectors[chosen], calibration.mean(embedder.version, role, lang))
            vectors[chosen] = center(vectors[chosen], mean)
            means[lang] = mean  # of the wordings in the end: a query is one
    return Index(passages, vectors, means, embedder.version, content_hash(passages))


def side_of(text: str) -> str:
    """Return which of the two means belongs to `text`; what has no letters goes with English."""
    return detect_lang(text) or "en"


def center(vectors: Vectors, mean: NDArray[np.float32]) -> Vectors:
    """Return `vectors` (n, dim) without `mean` (dim,), each of length 1 again."""
    moved = vectors - mean
    centred: Vectors = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-6)
    return centred.astype(np.float32)


def _mean(vectors: Vectors, shipped: NDArray[np.float32] | None) -> NDArray[np.float32]:
    dim = vectors.shape[1]
    own = vectors.mean(axis=0) if len(vectors) else np.zeros(dim, dtype=np.float32)
    before = np.zeros(dim, dtype=np.float32) if shipped is None else shipped
    share = len(vectors) / (len(vectors) + CENTER_AFTER)
    mixed: NDArray[np.float32] = (share * own + (1 - share) * before).astype(np.float32)
    return mixed


def load_index(folder: Path, embedder: Embedder) -> Index:
    """
    Read a snapshot. Blocks on disk.

    Raises:
        IndexDamaged: a file is missing, changed or of another format or embedder; rebuild.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if manifest["format"] != FORMAT or manifest["embedder"] != embedder.version:
            raise IndexDamaged(f"{folder.name} was built by another version")
        for name, expected in manifest["sha256"].items():
            if _sha256(folder / name) != expected:
                raise IndexDamaged(f"{folder.name}/{name} is not what was written")
        with (folder / "passages.jsonl").open(encoding="utf-8") as file:
            passages = [parse_passage(json.loads(line)) for line in file]
        stored = faiss.read_index(str(folder / "vectors.faiss"))
        vectors = stored.reconstruct_n(0, stored.ntotal) if stored.ntotal else np.zeros((0, embedder.dim), np.float32)
        if vectors.shape[1] != embedder.dim or content_hash(passages) != manifest["knowledge"]:
            raise IndexDamaged(f"{folder.name} does not fit its manifest")
        means = {lang: np.array(manifest["means"][lang], dtype=np.float32) for lang in LANGS}
        if any(mean.shape != (embedder.dim,) for mean in means.values()):
            raise IndexDamaged(f"{folder.name} does not fit its manifest")
        return Index(passages, vectors, means, manifest["embedder"], manifest["knowledge"])
    except IndexDamaged:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as exc:
        # faiss raises RuntimeError for anything it cannot read; JSON's error is a ValueError.
        raise IndexDamaged(f"{folder.name} cannot be read: {exc}") from exc


def units(passages: Sequence[Passage]) -> list[Unit]:
    """Return what of each passage can be matched, in its order: every wording, then one body."""
    found: list[Unit] = []
    for number, passage in enumerate(passages):
        found.extend(Unit(number, wording, False) for wording in passage.questions)
        found.append(Unit(number, body_of(passage), True))
    return found


def body_of(passage: Passage) -> str:
    """
    Return a passage as one text: title, wordings, what is quoted.

    With the wordings in it: banking77 with four wordings a class 0.65 -> 0.69 recall@1, held-out wordings of the demo
    store 0.70 -> 0.72 (zh), against a body of question and answer only (docs/experiments.md).
    """
    said = [] if passage.text.startswith(passage.title) else [passage.title]
    said += [q for q in passage.questions if q not in passage.title and not passage.text.startswith(q)]
    return (" ".join(said) + "\n" + passage.text).strip() or passage.id


def passage_codes(passage: Passage) -> set[str]:
    """Return the article number and coupon code that name `passage`, folded."""
    named = f"{passage.meta.get('sku', '')} {passage.meta.get('code', '')}"
    return codes(named) | {entry.lower() for entry in named.split() if len(entry) >= 4}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
