"""
Vectors in memory and on disk: the nearest of one language, and the exact cosine of any unit. FAISS native files only.

The only file that imports `faiss`. Knows numbers of units, and which of the two languages each is of; knows no texts,
no passages and no clock. Up to `FLAT_UNITS` everything is compared with everything, in float32. Beyond that each
language has inverted lists of one bit a dimension (IVF, RaBitQ with a random rotation), which name twice as many units
as asked for; their true cosines say which are kept. Those come from float32, beyond `HALF_UNITS` from float16, mapped
into memory where the file is large: of it only what is touched is resident. Measured beside it at 5·10^5 vectors of 768
dimensions (docs/experiments.md): 8-bit and 4-bit scalar lists found no more and took two to three times as long; HNSW
on 8 bits is faster at 10^4 but takes ten times as long to build and cannot be asked for few of many.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from retrieval.checked import MAPPED_BYTES, private_copy, read_checked
from retrieval.errors import IndexDamaged

faiss: Any = _faiss  # its stubs lack half of what its Python wrapper adds

FLAT_UNITS = 8_192  # a comparison with all of them: 1.5 ms at 768 dimensions on one core
HALF_UNITS = 100_000  # of more units float16 is kept: half the disk, and 1 us instead of 0.25 for each cosine
LISTED_UNITS = 2_048  # a side with fewer has no lists in a larger index either
EXACT_UNITS = 2_048  # of fewer allowed units the cosines are computed one by one, by whatever index
REFINED = 2  # times as many units as asked for get their true cosines
PROBED = 14  # one list in so many is looked through (recall@10 at 10^6: 16 0.954, 12 0.966, 8 0.980) …
MIN_PROBED = 64  # … and at least these
POINTS_A_LIST = 40  # the lists' centres are learnt from so many vectors each
SEED = 7  # equal vectors, equal lists
QUERY_BITS = 4  # 8: recall of the nearest 160 at 10^6 .832 for .825, of the nearest 10 the same, for a fifth more time
ADDED_AT_ONCE = 20_000
EXACT_FILE = "vectors.faiss"
LIST_FILES = {"zh": "lists-zh.faiss", "en": "lists-en.faiss"}

_reading = threading.Lock()  # the limits of FAISS's reader are the process's
_thread = threading.local()


def _keep_to_one_core() -> None:
    """Give this thread one core in FAISS: a second gains nothing on one query, and then spins on the embedder's."""
    if not getattr(_thread, "kept", False):
        faiss.omp_set_num_threads(1)  # of the calling thread only, as OpenMP counts
        _thread.kept = True


class LocalVectors:
    """The vectors of one index, on this machine. Immutable; safe for any number of threads."""

    def __init__(self, exact: Any, zh: NDArray[np.bool_], lists: Mapping[str, Any]) -> None:
        """
        `exact` is a FAISS index of all units, in their order; `zh` says for each (n_units,) which side it is on.

        `lists` has the inverted lists of the sides that have some, with the numbers of the units within the side.
        """
        self._exact = exact
        n, width = exact.ntotal, exact.code_size
        # The rows themselves: FAISS's own way to one vector costs more than the product with it.
        self._rows = faiss.rev_swig_ptr(exact.codes.data(), n * width).reshape(n, width) if n else np.zeros((0, width))
        self._half = isinstance(exact, faiss.IndexScalarQuantizer)
        self._lists = dict(lists)
        self._sides = {"zh": np.flatnonzero(zh), "en": np.flatnonzero(~zh)}
        self._turned: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None  # the last query, and it rotated
        self._one_rotation = _are_equal([_rotation(one) for one in self._lists.values()])
        self._flat: dict[str, Any] = {}
        for side, units in self._sides.items():
            if side not in self._lists:
                self._flat[side] = faiss.IndexFlatIP(exact.d)
                if len(units):
                    self._flat[side].add(self._vectors(units))

    @classmethod
    def build(cls, vectors: NDArray[np.float32], zh: NDArray[np.bool_], n_threads: int = 2) -> LocalVectors:
        """Return the index of `vectors` (n_units, dim), each of length 1; blocks, about 0.2 ms a vector at 10^6."""
        n, dim = vectors.shape
        if n <= HALF_UNITS:
            exact = faiss.IndexFlatIP(dim)
        else:
            exact = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        for start in range(0, n, ADDED_AT_ONCE):
            exact.add(np.ascontiguousarray(vectors[start : start + ADDED_AT_ONCE], dtype=np.float32))
        faiss.omp_set_num_threads(n_threads)
        try:
            sides = {"zh": np.flatnonzero(zh), "en": np.flatnonzero(~zh)}
            lists = {side: _lists(vectors, units) for side, units in sides.items() if _is_listed(n, len(units))}
        finally:
            faiss.omp_set_num_threads(1)
        return cls(exact, zh, lists)

    @property
    def dim(self) -> int:
        """The number of dimensions of a vector."""
        return int(self._exact.d)

    @property
    def kind(self) -> str:
        """What the vectors are searched with: "flat" or "lists"."""
        return "lists" if self._lists else "flat"

    def __len__(self) -> int:
        return int(self._exact.ntotal)

    def units_of(self, side: str) -> NDArray[np.int64]:
        """Return the numbers of the units of `side`, "zh" or "en", ascending."""
        return self._sides[side]

    def cosines(self, vector: NDArray[np.float32], units: NDArray[np.int64]) -> NDArray[np.float32]:
        """
        Return the cosine of `vector` (dim,) and each of these units, shape (len(units),).

        Raises:
            ValueError: the vector is of another length; FAISS would read past its end.
        """
        if vector.shape != (self.dim,):
            raise ValueError(f"a vector of shape {vector.shape} in an index of {self.dim} dimensions")
        if len(units) == 0:
            return np.zeros(0, dtype=np.float32)
        if self._half:
            decoded: NDArray[np.float32] = self._vectors(units) @ vector
            return decoded
        # In place: gathering the rows first takes longer than the products.
        units, vector = np.ascontiguousarray(units, dtype=np.int64), np.ascontiguousarray(vector, dtype=np.float32)
        found = np.empty(len(units), dtype=np.float32)
        self._exact.compute_distance_subset(
            1, faiss.swig_ptr(vector), len(units), faiss.swig_ptr(found), faiss.swig_ptr(units)
        )
        return found

    def _vectors(self, units: NDArray[np.int64]) -> NDArray[np.float32]:
        rows = self._rows[units]
        vectors: NDArray[np.float32] = self._exact.sa_decode(rows) if self._half else rows.view(np.float32)
        return vectors

    def nearest(
        self, vector: NDArray[np.float32], side: str, allowed: NDArray[np.bool_] | None, n: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """
        Return (cosines, unit numbers) of the `n` units of `side` nearest to `vector` (dim,), best first.

        `allowed` has a place for each of `units_of(side)`, None for all; fewer than `n` come back where fewer are.
        """
        _keep_to_one_core()
        units = self._sides[side]
        n_allowed = len(units) if allowed is None else int(np.count_nonzero(allowed))
        n = min(n, n_allowed)
        if n == 0:
            return np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64)
        # A bitmap, not a list of numbers: tested per vector, and it costs one bit each.
        bitmap = None if allowed is None else np.packbits(allowed, bitorder="little")
        selector = None if bitmap is None else faiss.IDSelectorBitmap(bitmap)
        if side in self._flat:
            chosen = None if selector is None else faiss.SearchParameters(sel=selector)
            cosines, places = self._flat[side].search(vector.reshape(1, -1), n, params=chosen)
            found = places[0] >= 0
            return cosines[0][found], units[places[0][found]]
        if n_allowed <= max(EXACT_UNITS, REFINED * n):
            near = units if allowed is None else units[allowed]
        else:
            near = units[self._listed(vector, side, selector, n, n_allowed / len(units))]
        cosines = self.cosines(vector, near)
        best = np.argsort(-cosines, kind="stable")[:n]
        return cosines[best], near[best]

    def _listed(self, vector: NDArray[np.float32], side: str, selector: Any, n: int, share: float) -> Any:
        rotated = self._lists[side]
        lists = faiss.downcast_index(rotated.index)
        parameters = faiss.IVFRaBitQSearchParameters()
        # Where only some units are allowed, as many more lists are looked through.
        parameters.nprobe = min(lists.nlist, int(max(MIN_PROBED, lists.nlist // PROBED) / share) + 1)
        parameters.qb = QUERY_BITS
        if selector is not None:
            parameters.sel = selector
        turned = self._rotated(vector, rotated)
        places = lists.search(turned, REFINED * n, params=parameters)[1][0]
        return np.sort(places[(places >= 0) & (places < len(self._sides[side]))])

    def _rotated(self, vector: NDArray[np.float32], lists: Any) -> NDArray[np.float32]:
        """Return `vector` (dim,) as `lists` have it, (1, dim); both sides are asked for the same one."""
        last = self._turned
        if last is not None and last[0] is vector and self._one_rotation:
            return last[1]
        turned: NDArray[np.float32] = lists.chain.at(0).apply(vector.reshape(1, -1))
        self._turned = (vector, turned)
        return turned

    def save(self, folder: Path) -> list[str]:
        """Write the files into `folder` and return their names. Blocks on disk; OSError where it is full."""
        files = {EXACT_FILE: self._exact} | {LIST_FILES[side]: lists for side, lists in self._lists.items()}
        for name, index in files.items():
            try:
                faiss.write_index(index, str(folder / name))
            except RuntimeError as exc:
                raise OSError(f"{name} cannot be written: {exc}") from exc
        return list(files)

    @classmethod
    def load(cls, folder: Path, sums: Mapping[str, str], zh: NDArray[np.bool_], dim: int) -> LocalVectors:
        """
        Read what `save` wrote; `sums` are the SHA-256 of the files by name. Blocks on disk.

        Nothing of a file is interpreted before its sum is right, and what is interpreted is bounded by its length.

        Raises:
            IndexDamaged: a file is missing, is not what was written, or does not fit `zh` (n_units,) and `dim`.
        """
        n = len(zh)
        exact = _read(folder / EXACT_FILE, sums[EXACT_FILE])
        half = n > HALF_UNITS
        kind = faiss.IndexScalarQuantizer if half else faiss.IndexFlatIP
        if type(exact) is not kind or (
            (exact.d, exact.ntotal, exact.metric_type, exact.code_size)
            != (dim, n, faiss.METRIC_INNER_PRODUCT, dim * (2 if half else 4))
            or exact.codes.size() != n * exact.code_size
        ):
            raise IndexDamaged(f"{EXACT_FILE} is no {kind.__name__} of {n} vectors of {dim} dimensions")
        if half and exact.sq.qtype != faiss.ScalarQuantizer.QT_fp16:
            raise IndexDamaged(f"{EXACT_FILE} is not in float16")
        lists: dict[str, Any] = {}
        for side, n_side in (("zh", int(zh.sum())), ("en", n - int(zh.sum()))):
            name = LIST_FILES[side]
            if _is_listed(n, n_side):
                lists[side] = _read(folder / name, sums[name])
                _check_lists(lists[side], name, n_side, dim)
        return cls(exact, zh, lists)


def _is_listed(n: int, n_side: int) -> bool:
    return n > FLAT_UNITS and n_side > LISTED_UNITS


def _lists(vectors: NDArray[np.float32], units: NDArray[np.int64]) -> Any:
    """Return inverted lists of the `units` of `vectors`, numbered from 0."""
    n, dim = len(units), vectors.shape[1]
    n_lists = 1 << round(np.log2(4 * np.sqrt(n)) - 0.25)
    clustering = faiss.Clustering(dim, n_lists)
    clustering.seed, clustering.niter, clustering.spherical = SEED, 6, True
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, POINTS_A_LIST
    centres = faiss.IndexFlatIP(dim)
    sample = np.sort(np.random.default_rng(SEED).permutation(n)[: n_lists * POINTS_A_LIST])
    clustering.train(vectors[units[sample]], centres)
    # Rotated, a vector's length is spread over all dimensions, as one bit each wants it: Chinese texts have nothing in
    # the second half of the default embedder's (recall of the nearest 160 0.94 -> 0.97).
    rotation = faiss.RandomRotationMatrix(dim, dim)
    rotation.init(SEED)
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(rotation.apply(centres.reconstruct_n(0, n_lists)))
    lists = faiss.IndexIVFRaBitQ(quantizer, dim, n_lists, faiss.METRIC_INNER_PRODUCT)
    lists.train(rotation.apply(vectors[units[:1]]))
    for start in range(0, n, ADDED_AT_ONCE):
        lists.add(rotation.apply(vectors[units[start : start + ADDED_AT_ONCE]]))
    whole = faiss.IndexPreTransform(rotation, lists)
    for part in (quantizer, lists, rotation):
        part.this.disown()
    lists.own_fields = whole.own_fields = True
    return whole


def _rotation(lists: Any) -> NDArray[np.float32]:
    rotation = faiss.downcast_VectorTransform(lists.chain.at(0))
    found: NDArray[np.float32] = faiss.vector_to_array(rotation.A)
    return found


def _are_equal(arrays: Sequence[NDArray[np.float32]]) -> bool:
    return all(np.array_equal(array, arrays[0]) for array in arrays[1:])


def _check_lists(whole: Any, name: str, n: int, dim: int) -> None:
    """Raise IndexDamaged unless `whole` is what `_lists` returns for `n` vectors; searching it is then safe."""
    good = isinstance(whole, faiss.IndexPreTransform) and whole.chain.size() == 1 and whole.d == dim
    lists: Any = faiss.downcast_index(whole.index) if good else None
    rotation: Any = faiss.downcast_VectorTransform(whole.chain.at(0)) if good else None
    good = good and isinstance(lists, faiss.IndexIVFRaBitQ) and isinstance(rotation, faiss.LinearTransform)
    good = good and (rotation.d_in, rotation.d_out, rotation.A.size()) == (dim, dim, dim * dim)
    good = good and (lists.d, lists.ntotal, lists.metric_type) == (dim, n, faiss.METRIC_INNER_PRODUCT)
    good = good and lists.rabitq.d == dim and lists.code_size == lists.rabitq.code_size == lists.invlists.code_size
    good = good and lists.code_size >= (dim + 7) // 8 and lists.nlist == lists.invlists.nlist
    centres: Any = faiss.downcast_index(lists.quantizer) if good else None
    good = good and isinstance(centres, faiss.IndexFlat) and (centres.d, centres.ntotal) == (dim, lists.nlist)
    good = good and centres.codes.size() == lists.nlist * dim * 4
    if not good or lists.invlists.compute_ntotal() != n:
        raise IndexDamaged(f"{name} are no lists of {n} vectors of {dim} dimensions")


def _read(path: Path, expected: str) -> Any:
    """Return the FAISS index in `path`, after its SHA-256 was found to be `expected`."""
    size = path.stat().st_size
    try:
        if size <= MAPPED_BYTES:
            raw = np.frombuffer(read_checked(path, expected), dtype=np.uint8)
            with _reading:
                _limit(size)
                return faiss.deserialize_index(raw)
        with private_copy(path, expected) as name, _reading:
            _limit(size)
            return faiss.read_index(name, faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as exc:  # what faiss raises for anything it cannot read
        raise IndexDamaged(f"{path.name} cannot be read: {str(exc).splitlines()[0][:200]}") from exc


def _limit(size: int) -> None:
    """Bound what FAISS's reader believes: no vector and no loop is longer than the file."""
    faiss.set_deserialization_vector_byte_limit(size + 64)
    faiss.set_deserialization_loop_limit(size + 64)
