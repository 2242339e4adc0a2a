"""
What a store's retriever has learned, on disk: examples, weight, calibration, thresholds, in versions to go back to.

A store keeps its tunings in `tuned/`: one folder a version with `tuning.json` and `examples.jsonl`, and `current.json`
that names the one in use. JSON only: the numbers that depend on the knowledge are solved anew when an index goes live
(learned.py), so that a FAQ added after the tuning is compared on equal terms. Knows files; fits nothing (tune.py) and
ranks nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrieval.confidence import NAMES, Calibration, load_calibration
from retrieval.embedder import Embedder, VectorCache
from retrieval.errors import BadStore, Fault
from retrieval.hybrid import HybridRetriever
from retrieval.index import Index
from retrieval.learned import Example, Learned, thin
from retrieval.load import twin_key
from retrieval.terms import Terms

FORMAT = 1
FOLDER = "tuned"
MAX_BYTES = 64 * 2**20
MAX_EXAMPLES = 100_000


@dataclass(frozen=True, slots=True)
class Tuning:
    """One version of what was learned."""

    embedder: str  # version of the embedder it was measured with; with another it is not used
    examples: tuple[Example, ...] = ()
    weight: float = 0.0  # what a learned score of 1 adds to a passage's; 0 where only the confidence was fitted
    weights: dict[str, float] = field(default_factory=dict)  # of the confidence, by feature
    bias: float = 0.0
    thresholds: dict[str, float] = field(default_factory=dict)  # "direct" and "answer", where a risk was asked for
    report: dict[str, Any] = field(default_factory=dict)  # how it was measured, as printed
    created_at: str = ""  # ISO, UTC

    @property
    def version(self) -> str:
        """Content hash, 12 hexadecimal digits: equal lessons, equal version."""
        content = [self.embedder, self.weight, sorted(self.weights.items()), self.bias, sorted(self.thresholds.items())]
        content += [[example.text, example.key] for example in self.examples]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:12]

    def calibration(self, shipped: Calibration) -> Calibration:
        """Return the confidence fitted on this store, with the shipped means; `shipped` where none was fitted."""
        if not self.weights:
            return shipped
        # It was fitted to whichever of the two is used; what rivals count for is that one's.
        plain = Calibration(self.weights, self.bias, shipped.embedder, shipped.means, rival=shipped.plain.rival)
        return Calibration(self.weights, self.bias, shipped.embedder, shipped.means, plain, shipped.rival)

    def fit(self, index: Index, embedder: Embedder, cache: VectorCache) -> Learned | None:
        """
        Return the learned scores for what `index` holds; None where nothing was learned. Blocks for seconds.

        Raises:
            RetrievalError: the embedder failed.
        """
        if not self.examples or not self.weight:
            return None
        return fit_learned(self.examples, index, embedder, cache)


def fit_learned(examples: Sequence[Example], index: Index, embedder: Embedder, cache: VectorCache) -> Learned:
    """
    Return the scores that `examples` and the index's own wordings teach; examples of passages it lacks are left out.

    Blocks: what the cache lacks is embedded.
    """
    known = {twin_key(passage) for passage in index.passages}
    taught = [example for example in examples if example.key in known]
    chosen = thin([*taught, *own_wordings(index)])
    vectors = cache.embed(embedder, [example.text for example in chosen], as_query=True)
    placed = [index.place(vector, example.text) for vector, example in zip(vectors, chosen, strict=True)]
    return Learned(chosen, placed)


def own_wordings(index: Index) -> list[Example]:
    """Return every wording of every passage as an example of it."""
    return [Example(wording, twin_key(passage)) for passage in index.passages for wording in passage.questions]


def tuned_retriever(
    index: Index, embedder: Embedder, cache: VectorCache, terms: Terms, tuning: Tuning | None
) -> HybridRetriever:
    """
    Return a retriever that searches `index` as `tuning` has it; blocks for seconds where examples are learned from.

    Raises:
        RetrievalError: the embedder failed.
    """
    shipped = load_calibration()
    if tuning is None:
        return HybridRetriever(index, embedder, shipped, terms)
    learned = tuning.fit(index, embedder, cache)
    retriever = HybridRetriever(
        index, embedder, tuning.calibration(shipped), terms, learned=learned, learned_weight=tuning.weight
    )
    retriever.thresholds = tuning.thresholds
    return retriever


def point_to(folder: Path, version: str | None, versions: Sequence[str]) -> None:
    """
    Make `version` the one that `folder` has in use, by a rename of `current.json`; None: none of its `versions`.

    Raises:
        BadStore: there is no such version.
    """
    if version is not None and version not in versions:
        raise BadStore([Fault(str(folder), None, version, "no such version; see tune --list")])
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".current.{os.getpid()}.tmp"
    beside.write_text(json.dumps({"version": version}) + "\n", "utf-8")
    beside.replace(folder / "current.json")


class Tunings:
    """The versions in one folder, a store's `tuned/` or one that was named."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_store(cls, store_dir: Path) -> Tunings:
        return cls(store_dir / FOLDER)

    def save(self, tuning: Tuning) -> str:
        """
        Write a version, make it the current one and return its name. It appears whole or not at all.

        Raises:
            OSError: the folder cannot be written; the current version stays.
        """
        version = tuning.version
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / version
        if not target.is_dir():
            beside = Path(tempfile.mkdtemp(prefix=".tuning-", dir=self.folder))
            try:
                with (beside / "examples.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                    for example in tuning.examples:
                        file.write(json.dumps({"text": example.text, "key": example.key}, ensure_ascii=False) + "\n")
                document = {
                    "format": FORMAT,
                    "embedder": tuning.embedder,
                    "weight": tuning.weight,
                    "weights": tuning.weights,
                    "bias": tuning.bias,
                    "thresholds": tuning.thresholds,
                    "report": tuning.report,
                    "created_at": tuning.created_at or datetime.now(UTC).isoformat(timespec="seconds"),
                }
                (beside / "tuning.json").write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", "utf-8")
                beside.chmod(0o755)
                beside.replace(target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        self.use(version)
        return version

    def use(self, version: str | None) -> None:
        """
        Make `version` the current one, or none of them.

        Raises:
            BadStore: there is no such version.
        """
        point_to(self.folder, version, self.versions())

    def versions(self) -> list[str]:
        """Return the versions there are, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if (path / "tuning.json").is_file() and path.name[:1] != "."]
        return [path.name for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))]

    def current(self) -> str | None:
        """
        Return the version in use; None where there is none.

        Raises:
            BadStore: `current.json` is damaged.
        """
        path = self.folder / "current.json"
        if not path.is_file():
            return None
        entry = _read_json(path)
        version = entry.get("version")
        if version is not None and (not isinstance(version, str) or Path(version).name != version):
            raise BadStore([Fault(str(path), None, "version", "names no version; see tune --list and tune --use")])
        return version

    def load(self, version: str | None = None) -> Tuning | None:
        """
        Return `version`, by default the one in use; None where none is.

        Raises:
            BadStore: its files are missing or damaged.
        """
        version = version or self.current()
        if version is None:
            return None
        folder = self.folder / version
        entry = _read_json(folder / "tuning.json")
        try:
            if entry["format"] != FORMAT:
                raise ValueError(f"format {entry['format']!r}")
            weights = {str(name): float(value) for name, value in entry["weights"].items()}
            if set(weights) - set(NAMES):
                raise ValueError("unknown features")
            return Tuning(
                embedder=str(entry["embedder"]),
                examples=_read_examples(folder / "examples.jsonl"),
                weight=float(entry["weight"]),
                weights=weights,
                bias=float(entry["bias"]),
                thresholds={str(name): float(value) for name, value in entry["thresholds"].items()},
                report=dict(entry["report"]),
                created_at=str(entry["created_at"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            problem = f"cannot be read ({exc}); use another version (tune --use) or tune again"
            raise BadStore([Fault(str(folder / "tuning.json"), None, None, problem)]) from exc


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        entry = json.loads(path.read_text("utf-8"))
        if not isinstance(entry, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as exc:
        problem = f"cannot be read ({exc}); use another version (tune --use) or tune again"
        raise BadStore([Fault(str(path), None, None, problem)]) from exc
    return entry


def _read_examples(path: Path) -> tuple[Example, ...]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("examples.jsonl is too large")
        found: list[Example] = []
        with path.open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                if not isinstance(entry["text"], str) or not isinstance(entry["key"], str):
                    raise TypeError("an example is no text")
                found.append(Example(entry["text"], entry["key"]))
                if len(found) > MAX_EXAMPLES:
                    raise ValueError("too many examples")
    except (OSError, RecursionError) as exc:
        raise ValueError(f"examples.jsonl: {exc}") from exc
    return tuple(found)
