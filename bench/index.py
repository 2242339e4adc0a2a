"""
How the index grows: 10^3 to 10^6 passages, beside what a user would take instead.

    .venv/bin/python bench/index.py [--sizes 1000,10000,100000,1000000] [--work DIR]

Passages are made up, half Chinese, half English, one text each. A passage belongs to one of n/50 topics. Its vector is
the topic's centre plus 0.6 times noise, of length 1; centre and noise are normal with a standard deviation of i^-0.5 in
dimension i of 768, turned by one random rotation (the i^-0.5 is about how the spectrum of real sentence embeddings
falls). Its 12 words are mostly the topic's 40, the rest anybody's, both by Zipf's law. A query is made the same way,
six words long, with noise of its own.

Two processes a size, so that the memory of each is its own. `build` makes the vectors, times FAISS's IndexFlatL2 over
them (what LangChain's FAISS vector store builds where it is told nothing), finds the true nearest, builds what
retrieval/vectors.py builds, and measures recall@10 within each language against the true nearest. `serve` loads the
files as a server does and times whole searches (vectors, words, features, hits), first with the query's vector given,
then with the default embedder making one; BLAS has one thread, as in the server (minilm.py). Writes
bench/results/index.json and index-growth.svg beside it. All four sizes take about ten minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DIM = 768
N_QUERIES = 200
TOPIC_SIZE = 50
NOISE = 0.6
CHUNK = 20_000
Vectors = NDArray[np.float32]


def shape() -> tuple[Vectors, Vectors]:
    """Return the standard deviation of each dimension, (DIM,), and the rotation, (DIM, DIM)."""
    spread = (np.arange(1, DIM + 1) ** -0.5).astype(np.float32)
    turned = np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))[0].astype(np.float32)
    return spread, turned


def topics_of(n: int, seed: int, n_made: int) -> NDArray[np.int64]:
    """Return the topic of each of `n_made` passages or queries of a store of `n`."""
    return np.random.default_rng(seed).integers(max(n // TOPIC_SIZE, 1), size=n_made)


def vectors_of(n: int, seed: int, n_made: int) -> Vectors:
    """Return the vectors of the passages (seed 1) or of queries (another seed) of a store of `n`."""
    spread, turned = shape()
    centres = np.random.default_rng(5).standard_normal((max(n // TOPIC_SIZE, 1), DIM), dtype=np.float32) * spread
    topics, chance = topics_of(n, seed, n_made), np.random.default_rng(seed + 100)
    made = np.empty((n_made, DIM), dtype=np.float32)
    for start in range(0, n_made, CHUNK):
        part = slice(start, min(start + CHUNK, n_made))
        noise = chance.standard_normal((part.stop - part.start, DIM), dtype=np.float32)
        made[part] = (centres[topics[part]] + np.float32(NOISE) * spread * noise) @ turned
        made[part] /= np.linalg.norm(made[part], axis=1, keepdims=True)
    return made


def texts_of(n: int, seed: int, n_made: int, n_words: int) -> Iterator[str]:
    """Yield the texts of the passages (seed 1) or of queries; even ones are Chinese."""
    n_vocabulary = 30_000
    ranks = np.arange(1, n_vocabulary + 1)
    everybody = np.cumsum(1 / ranks) / np.sum(1 / ranks)
    own = np.cumsum(1 / ranks[:40]) / np.sum(1 / ranks[:40])
    topics, chance = topics_of(n, seed, n_made), np.random.default_rng(seed + 200)
    for start in range(0, n_made, CHUNK):
        stop = min(start + CHUNK, n_made)
        common = np.searchsorted(everybody, chance.random((stop - start, n_words)))
        telling = (
            topics[start:stop, None] * 7919 + np.searchsorted(own, chance.random((stop - start, n_words)))
        ) % n_vocabulary
        chosen = np.where(chance.random((stop - start, n_words)) < 0.6, telling, common)
        for number, row in enumerate(chosen.tolist(), start):
            if number % 2:
                yield " ".join(word(value) for value in row)
            else:
                yield "".join(chr(0x4E00 + value % 3500) + chr(0x4E00 + value * 31 % 3500) for value in row)


def word(value: int) -> str:
    """Return a made-up English word for each number."""
    letters = []
    for consonants in ("bdfgklmnprstvz", "bcdfgklmnprst", "dgklmnprst"):
        letters.append(consonants[value % len(consonants)] + "aeiou"[value // 7 % 5])
        value = value // len(consonants) + 3 * (value % 11)
    return "".join(letters)


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Return p50 and p99 of seconds, in milliseconds."""
    return {
        "p50_ms": round(1e3 * float(np.median(times)), 3),
        "p99_ms": round(1e3 * float(np.quantile(times, 0.99)), 3),
    }


def timed(ask: Callable[[int], object], n: int = N_QUERIES) -> dict[str, float]:
    """Time `ask` once for each query, after ten for warming up."""
    times, on_core = [], []
    for number in [*range(10), *range(n)]:
        began, before = time.perf_counter(), time.thread_time()
        ask(number)
        on_core.append(time.thread_time() - before)
        times.append(time.perf_counter() - began)
    # The time on a core is what the other figures come to on a machine that does nothing else.
    return quantiles(times[10:]) | {"core_p50_ms": round(1e3 * float(np.median(on_core[10:])), 3)}


def resident() -> dict[str, int]:
    """Return this process's memory in MiB: its own, and of mapped files what is in memory now."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[field].split()[0]) >> 10 for name, field in (("own", "RssAnon"), ("mapped", "RssFile"))}


def build(n: int, folder: Path) -> dict[str, Any]:
    """Build the vectors' files in `folder`, and measure them against exact search and IndexFlatL2."""
    import faiss

    from retrieval.vectors import LocalVectors

    found: dict[str, Any] = {"n": n}
    vectors, queries = vectors_of(n, 1, n), vectors_of(n, 2, N_QUERIES)
    zh = np.arange(n) % 2 == 0

    plain = faiss.IndexFlatL2(DIM)
    began = time.perf_counter()
    for start in range(0, n, CHUNK):
        plain.add(vectors[start : start + CHUNK])
    faiss.omp_set_num_threads(2)  # as it comes

    def plainly(i: int, plain: Any = plain) -> object:
        return plain.search(queries[i : i + 1], 10)

    found["flat_l2"] = {
        "build_s": round(time.perf_counter() - began, 2),
        "vectors_mib": n * DIM * 4 >> 20,
        **timed(plainly, N_QUERIES if n < 10**6 else 50),
    }
    del plain

    truth: dict[str, list[set[int]]] = {}
    for side, units in (("zh", np.flatnonzero(zh)), ("en", np.flatnonzero(~zh))):
        best = np.zeros((N_QUERIES, 0), np.float32)
        which = np.zeros((N_QUERIES, 0), np.int64)
        for start in range(0, len(units), CHUNK):
            part = units[start : start + CHUNK]
            best = np.concatenate([best, queries @ vectors[part].T], axis=1)
            which = np.concatenate([which, np.broadcast_to(part, (N_QUERIES, len(part)))], axis=1)
            kept = np.argpartition(-best, 10, axis=1)[:, :10]
            best, which = np.take_along_axis(best, kept, 1), np.take_along_axis(which, kept, 1)
        truth[side] = [set(row) for row in which.tolist()]

    began = time.perf_counter()
    ours = LocalVectors.build(vectors, zh)
    found["build_s"] = round(time.perf_counter() - began, 2)
    found["kind"] = ours.kind
    del vectors
    names = ours.save(folder)
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "sums.json").write_text(json.dumps(sums))
    found["files_mib"] = {name: round((folder / name).stat().st_size / 2**20, 1) for name in names}
    hits = sum(
        len(truth[side][i] & set(ours.nearest(queries[i], side, None, 160)[1][:10].tolist()))
        for side in truth
        for i in range(N_QUERIES)
    )
    found["recall@10"] = round(hits / sum(len(row) for rows in truth.values() for row in rows), 4)
    found["build_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return found


def serve(n: int, folder: Path) -> dict[str, Any]:
    """Load what `build` left in `folder` as a server does, and time searches."""
    from retrieval.bilingual import default_embedder
    from retrieval.glossary import SHIPPED as GLOSSARY
    from retrieval.hybrid import HybridRetriever
    from retrieval.index import Index, tables_of, units
    from retrieval.passages import Passage
    from retrieval.spelling import Reader
    from retrieval.tables import Tables
    from retrieval.terms import Terms
    from retrieval.vectors import LocalVectors
    from retrieval.words import detect_lang

    ThreadpoolController().limit(limits=1, user_api="blas")
    found: dict[str, Any] = {"base_mib": resident()}

    def passage(number: int, text: str) -> Passage:
        lang = "en" if number % 2 else "zh"
        return Passage(f"p{number}", "page", text[:12], text, lang, f"k.jsonl:{number + 1}")

    passages = [passage(number, text) for number, text in enumerate(texts_of(n, 1, n, 12))]
    found["passages_mib"] = resident()
    sums = json.loads((folder / "sums.json").read_text())
    began = time.perf_counter()
    vectors = LocalVectors.load(folder, sums, np.arange(n) % 2 == 0, DIM)
    found["load_vectors_s"] = round(time.perf_counter() - began, 2)
    found["and_vectors_mib"] = resident()
    began = time.perf_counter()
    means = {lang: np.zeros(DIM, dtype=np.float32) for lang in ("zh", "en")}
    held = units(passages)
    tables = tables_of(passages, held)
    found["words_s"] = round(time.perf_counter() - began, 2)
    names = tables.save(folder)
    sums |= {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    found["words_files_mib"] = round(sum((folder / name).stat().st_size for name in names) / 2**20, 1)
    del tables
    began = time.perf_counter()
    index = Index(passages, held, vectors, means, Given.version, "bench", Tables.load(folder, sums, n, n))
    found["load_words_s"] = round(time.perf_counter() - began, 2)
    began = time.perf_counter()
    retriever = HybridRetriever(index, Given())
    found["retriever_s"] = round(time.perf_counter() - began, 2)
    queries = list(texts_of(n, 2, N_QUERIES, 6))
    placed = vectors_of(n, 2, N_QUERIES)
    retriever.remember(queries, placed)
    glosses = [GLOSSARY.gloss(query) for query in queries]
    for gloss, vector in zip(glosses, placed, strict=True):  # what is asked in the other language means the same
        if gloss is not None:
            retriever.remember([gloss.text], vector[None])
    found["and_words_mib"] = resident()
    now = datetime(2026, 11, 22, tzinfo=UTC)
    everything = np.ones(n, dtype=np.bool_)
    found["search"] = timed(lambda i: retriever.search(queries[i], 5, now=now))
    found["vectors_only"] = timed(
        lambda i: [index.nearest(placed[i], placed[i], side, everything, 160) for side in ("zh", "en")]
    )
    found["words_only"] = timed(lambda i: index.lexical.query(queries[i]).best(everything, 64))
    found["served_mib"] = resident()
    reader = Reader(index.lexical.vocabulary, Terms())  # one that has met no query yet
    found["typos_only"] = timed(lambda i: reader.slots(queries[i]))
    embedder = default_embedder(2)

    def embedded(i: int) -> None:
        embedder.embed_queries([queries[i]])
        if (gloss := glosses[i]) is not None and gloss.lang != detect_lang(queries[i]):
            embedder.embed_queries([gloss.text])
        retriever.search(queries[i], 5, now=now)

    found["search_with_embedding"] = timed(embedded)
    topics, asked = topics_of(n, 1, n), topics_of(n, 2, N_QUERIES)
    right = [
        topics[int(hit.passage.id[1:])] == asked[i]
        for i in range(N_QUERIES)
        for hit in retriever.search(queries[i], 1, now=now, lang=detect_lang(queries[i]))
    ]
    found["top_hit_of_the_topic"] = round(sum(right) / N_QUERIES, 3)
    return found


class Given:
    """An embedder whose vectors are all given beforehand."""

    name = version = "given"
    dim = DIM
    shared = 1.0

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        raise AssertionError(f"not given: {texts}")

    embed_passages = embed_queries


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """Return an SVG of two log-log panels: time of a query and size in memory, over the number of passages."""
    series = {
        "query": [
            ("whole search, p50", "#0b6e4f", [row["serve"]["search"]["p50_ms"] for row in rows]),
            ("whole search, p99", "#7fb8a4", [row["serve"]["search"]["p99_ms"] for row in rows]),
            ("IndexFlatL2, p50", "#b23a48", [row["flat_l2"]["p50_ms"] for row in rows]),
        ],
        "memory": [
            ("process, own memory", "#0b6e4f", [row["serve"]["served_mib"]["own"] for row in rows]),
            ("files of the vectors", "#7fb8a4", [sum(row["files_mib"].values()) for row in rows]),
            ("IndexFlatL2, vectors alone", "#b23a48", [max(row["flat_l2"]["vectors_mib"], 1) for row in rows]),
        ],
    }
    sizes = [row["n"] for row in rows]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 330" font-family="sans-serif" font-size="12">',
        '<rect width="860" height="330" fill="white"/>',
    ]
    for panel, (name, unit) in enumerate((("query", "ms"), ("memory", "MiB"))):
        left, top, width, height = 60 + panel * 430, 40, 340, 220
        values = [value for _, _, line in series[name] for value in line]
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        span = max(math.log10(sizes[-1] / sizes[0]), 1e-9)

        def x(n: int, left: int = left, width: int = width, span: float = span) -> float:
            return left + width * math.log10(n / sizes[0]) / span

        def y(value: float, low: int = low, high: int = high, top: int = top, height: int = height) -> float:
            return top + height * (1 - (math.log10(value) - low) / (high - low))

        title = "Time of one query without embedding (ms)" if name == "query" else "Memory and files (MiB)"
        parts.append(f'<text x="{left}" y="22" font-size="14" font-weight="bold">{title}</text>')
        for power in range(low, high + 1):
            at = y(10.0**power)
            parts.append(f'<path d="M{left} {at:.1f}h{width}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
        for n in sizes:
            parts.append(f'<path d="M{x(n):.1f} {top}v{height}" stroke="#eee"/>')
            parts.append(f'<text x="{x(n):.1f}" y="{top + height + 18}" text-anchor="middle">{n:,}</text>')
        for number, (label, colour, line) in enumerate(series[name]):
            points = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in zip(sizes, line, strict=True))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for n, value in zip(sizes, line, strict=True):
                parts.append(f'<circle cx="{x(n):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>')
            parts.append(f'<text x="{left + 8}" y="{top + 14 + 15 * number}" fill="{colour}">{label} ({unit})</text>')
    parts.append(
        '<text x="430" y="318" text-anchor="middle">passages (768 dimensions, made up, clustered)</text></svg>'
    )
    return "\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1000,10000,100000,1000000", help="comma-separated")
    parser.add_argument("--work", type=Path, default=None, metavar="DIR", help="for the files, 2 GB at 10^6; not kept")
    parser.add_argument("--phase", choices=("build", "serve"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    if arguments.phase:
        arguments.work.mkdir(parents=True, exist_ok=True)
        measure = build if arguments.phase == "build" else serve
        print(json.dumps(measure(sizes[0], arguments.work)))
        return 0
    target = ROOT / "bench" / "results" / "index.json"
    known = json.loads(target.read_text())["rows"] if target.exists() else []
    rows = {row["n"]: row for row in known}
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            made: dict[str, Any] = {}
            for phase in ("build", "serve"):
                command = [sys.executable, __file__, "--sizes", str(size), "--work", f"{work}/files", "--phase", phase]
                done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
                made[phase] = json.loads(done.stdout)
        load = [round(value, 1) for value in os.getloadavg()]
        row = {**made["build"], "serve": made["serve"], "load_average": load}
        row["flat_l2_p50_over_ours"] = round(row["flat_l2"]["p50_ms"] / row["serve"]["vectors_only"]["p50_ms"], 2)
        rows[size] = row
        print(json.dumps(row), flush=True)
        ordered = [rows[n] for n in sorted(rows)]
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({"rows": ordered}, indent=1) + "\n", encoding="utf-8")
        (ROOT / "bench" / "results" / "index-growth.svg").write_text(plot(ordered), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
