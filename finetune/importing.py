"""
`import_dialogues`: files of any kind in, a folder of masked, de-duplicated, split dialogues out. Whole or not at all.

Works through an SQLite file in `<out>.partial`, so that a log need not be in order or fit into memory, and a run that was
killed goes on where it was. Stages: read -> clean, mask, hash -> drop duplicates -> split -> write. The stage file holds
what the sources hold, unmasked: it is readable by its owner alone and deleted in the end.

The result: train.jsonl, valid.jsonl, test.jsonl (OpenAI `messages`), report.json, report.md, and manifest.json with the
checksums, which a training run demands.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from bot.errors import MerchantError
from finetune.augment import augmented
from finetune.cleaning import clean, language_of
from finetune.dialogues import Dialogue, Fault, Line, dump_dialogue, normalise, parse_at, parse_dialogue
from finetune.duplicates import NearIndex, Signature, likeness, signature, squeeze
from finetune.formats import Mapping_, Row, read_file
from finetune.pii import PII_VERSION, Masker, compact_values, residual
from finetune.report import render_report

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
MAX_FAULTS = 1_000  # listed; all are counted
COMMIT_EVERY = 500

Progress = Callable[[str, int, int], None]  # (stage, done, total; 0 where the total is not known)


@dataclass(frozen=True)
class ImportConfig:
    """What an import does; written into its report."""

    files: tuple[str, ...]
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    agents: tuple[str, ...] = ()
    customers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()  # values that are the store's own and stay: its telephone number, its e-mail
    exclude: tuple[str, ...] = ()  # questions that must not be trained on (evaluation cases)
    near: float = 0.9  # dialogues this alike are one
    near_split: float = 0.6  # dialogues this alike are on one side of the split
    macro: int = 0  # a reply in so many dialogues is a macro, learned `keep_macro` times; 0: 1% of them, at least 10
    keep_macro: int = 3
    lookups: str = "keep"
    validation: tuple[str, ...] = ()  # of `files`, those that are the validation side; the others are not then
    valid: float = 0.1
    test: float = 0.1
    min_chars: int = 2  # of the customer's words in a dialogue
    skip_bad: bool = False
    augment: tuple[str, ...] = ()  # "typos", "noise", "templates"; of the training side only
    seed: int = 0


class BadData(MerchantError):
    """The files hold faults; nothing was written. `report` lists them."""

    def __init__(self, faults: list[Fault], n_faults: int) -> None:
        super().__init__()
        self.faults, self.n_faults = faults, n_faults

    def __str__(self) -> str:
        more = f" (and {self.n_faults - 1} more faults)" if self.n_faults > 1 else ""
        return f"{self.faults[0]}{more}"

    def report(self) -> dict[str, Any]:
        return {"error": "bad data", "n_faults": self.n_faults, "faults": [asdict(f) for f in self.faults]}


def import_dialogues(
    config: ImportConfig, out: Path, progress: Progress = lambda stage, done, total: None
) -> dict[str, Any]:
    """
    Import `config.files` into the new folder `out` and return the report. Blocks for minutes on large files.

    Interrupted, the same call goes on. `out` appears complete, by a rename, or not at all.

    Raises:
        BadData: faults in the files, and not `skip_bad`. Nothing was written.
        MerchantError: `out` is there already, or nothing is left to train on.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MerchantError(f"--out {str(out)!r} is there already: name a new folder, or delete it")
    work = out.with_name(f"{out.name}.partial")
    stage = _Stage(work, config)
    try:
        with closing(stage.db):
            _read(stage, config, progress)
            n_faults = stage.count("faults")
            if n_faults and not config.skip_bad:
                faults = [
                    Fault(*row)
                    for row in stage.db.execute(
                        "SELECT source, field, problem, remedy FROM faults ORDER BY n LIMIT ?", (MAX_FAULTS,)
                    )
                ]
                raise BadData(faults, n_faults)
            _prepare(stage, config, progress)
            _deduplicate(stage, config, progress)
            _split(stage, config)
            report = _write(stage, config, work / "out", progress)
    except MerchantError:
        shutil.rmtree(work, ignore_errors=True)  # the files must be changed first, so there is nothing to go on from
        raise
    if out.exists():
        out.rmdir()
    (work / "out").rename(out)
    shutil.rmtree(work)
    return report


# --- The stage file --------------------------------------------------------------------------------------------------


class _Stage:
    """The SQLite file between the stages, and how far each has come."""

    def __init__(self, work: Path, config: ImportConfig) -> None:
        stamp = hashlib.sha256(
            json.dumps([asdict(config), PII_VERSION, FORMAT_VERSION, _stats(config)]).encode()
        ).hexdigest()
        if (work / "stamp").exists() and (work / "stamp").read_text(encoding="ascii") != stamp:
            logger.warning("the earlier, unfinished import had other settings or files: starting anew")
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True, mode=0o700)
        (work / "stamp").write_text(stamp, encoding="ascii")
        self.db = sqlite3.connect(work / "stage.sqlite3", isolation_level=None)
        self.db.executescript(
            """
            PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;
            CREATE TABLE IF NOT EXISTS done (stage TEXT PRIMARY KEY, n INTEGER);
            CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, n INTEGER);
            CREATE TABLE IF NOT EXISTS faults (n INTEGER PRIMARY KEY, source TEXT, field TEXT, problem TEXT, remedy TEXT);
            CREATE TABLE IF NOT EXISTS rows (n INTEGER PRIMARY KEY, file INTEGER, session TEXT, at TEXT, role TEXT, text TEXT,
                                             customer TEXT, source TEXT);
            CREATE INDEX IF NOT EXISTS rows_by_session ON rows (file, session, at, n);
            CREATE TABLE IF NOT EXISTS raw (n INTEGER PRIMARY KEY, dialogue TEXT, customer TEXT, source TEXT);
            CREATE TABLE IF NOT EXISTS clean (n INTEGER PRIMARY KEY, dialogue TEXT, customer TEXT, source TEXT, at TEXT,
                                              lang TEXT, hash BLOB, signature BLOB, cluster INTEGER, split TEXT);
            CREATE INDEX IF NOT EXISTS clean_by_hash ON clean (hash);
            CREATE TABLE IF NOT EXISTS replies (hash BLOB PRIMARY KEY, n INTEGER, text TEXT);
            """  # noqa: E501
        )

    def count(self, table: str) -> int:
        return int(self.db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608  (our own names)

    def done(self, stage: str) -> int:
        """Return how far `stage` has come; -1 when it has not begun."""
        row = self.db.execute("SELECT n FROM done WHERE stage = ?", (stage,)).fetchone()
        return -1 if row is None else int(row[0])

    def reached(self, stage: str, n: int) -> None:
        self.db.execute("INSERT OR REPLACE INTO done VALUES (?, ?)", (stage, n))

    def add_counts(self, counts: Counter[str]) -> None:
        for name, n in counts.items():
            self.db.execute(
                "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n", (name, n)
            )
        counts.clear()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")


def _stats(config: ImportConfig) -> list[Any]:
    """Size and time of each file: another import begins anew when a file has changed since."""
    stats: list[Any] = []
    for name in config.files:
        try:
            stat = Path(name).stat()
            stats.append([name, stat.st_size, stat.st_mtime_ns])
        except OSError:
            stats.append([name, None, None])
    return stats


def _read(stage: _Stage, config: ImportConfig, progress: Progress) -> None:
    """Stage 1: every dialogue, row and fault into the stage file, one transaction a file's stretch."""
    mapping = Mapping_(config.columns, frozenset(config.agents), frozenset(config.customers))
    for number, name in enumerate(config.files):
        key = f"read:{number}"
        seen = stage.done(key)
        if seen == -2:
            continue
        batch: list[Dialogue | Row | Fault] = []
        n = 0
        for n, item in enumerate(read_file(Path(name), config.format, mapping), 1):
            if n <= max(seen, 0):
                continue  # of a run that was interrupted: read again, not stored again
            batch.append(item)
            if len(batch) >= COMMIT_EVERY:
                _store(stage, batch, number, key, n)
                batch = []
                progress(f"reading {Path(name).name}", n, 0)
        _store(stage, batch, number, key, -2)  # this file is done
        progress(f"reading {Path(name).name}", n, n)
    if stage.done("grouped") < 0:
        _group(stage)


def _store(stage: _Stage, batch: list[Dialogue | Row | Fault], file: int, key: str, reached: int) -> None:
    with stage.transaction():
        for item in batch:
            if isinstance(item, Fault):
                stage.db.execute(
                    "INSERT INTO faults (source, field, problem, remedy) VALUES (?, ?, ?, ?)",
                    (item.source, item.field, item.problem, item.remedy),
                )
            elif isinstance(item, Row):
                at = item.at.isoformat() if item.at else None
                row = (file, item.session, at, item.role, item.text, item.customer, item.source)
                stage.db.execute(
                    "INSERT INTO rows (file, session, at, role, text, customer, source) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
            else:
                _insert_raw(stage, item)
        stage.reached(key, reached)


def _insert_raw(stage: _Stage, dialogue: Dialogue) -> None:
    values = (dump_dialogue(dialogue), dialogue.customer, dialogue.source)
    stage.db.execute("INSERT INTO raw (dialogue, customer, source) VALUES (?, ?, ?)", values)


def _group(stage: _Stage) -> None:
    """Rows -> dialogues, by session and time; rows without a time keep the file's order."""
    with stage.transaction():
        query = "SELECT file, session, at, role, text, customer, source FROM rows ORDER BY file, session, at, n"
        current: tuple[int, str] | None = None
        rows: list[tuple[Any, ...]] = []
        for row in stage.db.cursor().execute(query):
            if (row[0], row[1]) != current and rows:
                _insert_raw(stage, _of_rows(rows))
                rows = []
            current = (row[0], row[1])
            rows.append(row)
        if rows:
            _insert_raw(stage, _of_rows(rows))
        stage.reached("grouped", 0)


def _of_rows(rows: list[tuple[Any, ...]]) -> Dialogue:
    _, session, at, _, _, customer, source = rows[0]
    lines = tuple(Line(row[3], row[4]) for row in rows)
    return Dialogue(str(session), lines, str(source), customer, parse_at(at))


def _prepare(stage: _Stage, config: ImportConfig, progress: Progress) -> None:
    """Stage 2: clean, mask, hash. What has no question with a reply, or asks what must not be trained on, is dropped."""  # noqa: E501
    total = stage.count("raw")
    n_done = max(stage.done("prepared"), 0)
    keep = compact_values(config.keep)
    excluded = _Excluded(config.exclude)
    while True:
        raws = stage.db.execute(
            "SELECT n, dialogue, customer, source FROM raw WHERE n > ? ORDER BY n LIMIT ?", (n_done, COMMIT_EVERY)
        ).fetchall()
        if not raws:
            return
        counts: Counter[str] = Counter()
        masker = Masker(config.keep)
        with stage.transaction():
            for n, text, customer, source in raws:
                dialogue = _loaded(text, source)
                ready = _cleaned(dialogue, config, masker, excluded, counts)
                if ready is not None and any(residual(line.text, keep) for line in ready.lines):
                    counts["dialogue: could not be masked whole"] += 1
                    ready = None
                if ready is None:
                    continue
                values = (
                    n, dump_dialogue(ready), customer, source, ready.at.isoformat() if ready.at else None, ready.lang,
                    hashlib.sha256(squeeze(ready.text).encode()).digest(), signature(ready.text).tobytes(), n, None,
                )  # fmt: skip
                stage.db.execute("INSERT INTO clean VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            counts.update({f"masked: {kind}": k for kind, k in masker.counts.items()})
            stage.add_counts(counts)
            n_done = raws[-1][0]
            stage.reached("prepared", n_done)
        progress("cleaning and masking", n_done, total)


def _loaded(text: str, source: str) -> Dialogue:
    """Return a dialogue of the stage file, whose roles need not be in turn yet."""
    raw = json.loads(text)
    lines = tuple(Line(m["role"], m["content"], m.get("weight", 1) != 0, m.get("rating")) for m in raw["messages"])
    return Dialogue(raw["id"], lines, source, None, parse_at(raw["at"]), raw["lang"])


class _Excluded:
    """Questions that must not be learned: equal or nearly so."""

    def __init__(self, questions: Collection[str]) -> None:
        self._exact = {squeeze(q) for q in questions} - {""}
        self._near: list[Signature] = [signature(q) for q in questions if len(squeeze(q)) >= 8]

    def holds(self, question: str) -> bool:
        plain = squeeze(question)
        if plain in self._exact:
            return True
        if len(plain) < 8 or not self._near:
            return False
        sig = signature(question)
        return any(likeness(sig, other) >= 0.7 for other in self._near)


def _cleaned(
    dialogue: Dialogue, config: ImportConfig, masker: Masker, excluded: _Excluded, counts: Counter[str]
) -> Dialogue | None:
    ready = normalise(clean(dialogue, counts, lookups=config.lookups), counts)
    if ready is None:
        return None
    asked = [line.text for line in ready.lines if line.role == "user"]
    if any(excluded.holds(q) for q in asked):
        counts["dialogue: asks a question of the evaluation"] += 1
        return None
    if sum(len(squeeze(q)) for q in asked) < config.min_chars:
        counts["dialogue: the customer says nothing"] += 1
        return None
    if not any(line.learn for line in ready.lines if line.role == "assistant"):
        counts["dialogue: no reply worth learning"] += 1
        return None
    texts = masker.mask([line.text for line in ready.lines])
    lines = tuple(replace(line, text=text) for line, text in zip(ready.lines, texts, strict=True))
    ready = replace(ready, lines=lines, id=hashlib.sha256(f"{ready.source}|{ready.id}".encode()).hexdigest()[:16])
    return replace(ready, lang=ready.lang or language_of(ready))


def _deduplicate(stage: _Stage, config: ImportConfig, progress: Progress) -> None:
    """Stage 3: one of equal and nearly equal dialogues; clusters of what is alike; how often each reply is said."""
    if stage.done("deduplicated") >= 0:
        return
    total = stage.count("clean")
    with stage.transaction():  # all or nothing: an index half built would be built on
        counts: Counter[str] = Counter()
        index = NearIndex(stage.db)
        parents: dict[int, int] = {}

        def root(n: int) -> int:
            while parents.get(n, n) != n:
                parents[n] = parents.get(parents[n], parents[n])
                n = parents[n]
            return n

        customers: dict[str, int] = {}
        dropped: list[int] = []
        cursor = stage.db.cursor().execute("SELECT n, hash, signature, customer, dialogue FROM clean ORDER BY n")
        exact: set[bytes] = set()
        for done, (n, digest, raw, customer, text) in enumerate(cursor):
            if digest in exact:
                dropped.append(n)
                counts["dialogue: exact duplicate"] += 1
                continue
            exact.add(digest)
            sig = np.frombuffer(raw, dtype=np.uint32)
            alike = index.alike(sig, config.near_split)
            if alike and alike[0][1] >= config.near:
                dropped.append(n)
                counts["dialogue: near duplicate"] += 1
                continue
            index.add(n, sig)
            for other, _ in alike:
                parents[root(max(n, other))] = root(min(n, other))
            if customer:
                first = customers.setdefault(hashlib.sha256(customer.encode()).hexdigest(), n)
                parents[root(n)] = root(first)
            for line in json.loads(text)["messages"]:
                plain = squeeze(line["content"])
                if line["role"] == "assistant" and len(plain) >= 6:
                    key = hashlib.sha256(plain.encode()).digest()[:16]
                    stage.db.execute(
                        "INSERT INTO replies VALUES (?, 1, ?) ON CONFLICT (hash) DO UPDATE SET n = n + 1",
                        (key, line["content"][:200]),
                    )
            if done % COMMIT_EVERY == 0:
                progress("looking for duplicates", done, total)
        stage.db.executemany("DELETE FROM clean WHERE n = ?", [(n,) for n in dropped])
        clusters = [(root(n), n) for (n,) in stage.db.execute("SELECT n FROM clean").fetchall()]
        stage.db.executemany("UPDATE clean SET cluster = ? WHERE n = ?", clusters)
        stage.add_counts(counts)
        stage.reached("deduplicated", 0)


def _split(stage: _Stage, config: ImportConfig) -> None:
    """
    Stage 4: the latest dialogues are the test, those before them the validation, the rest the training.

    A cluster (one customer, or dialogues alike) belongs where its earliest dialogue is; what of it falls into a later
    side's time is dropped, so that no side knows a later one's customers, and training knows nothing of the future.
    Without times a cluster's side is drawn by its checksum.
    """
    if stage.done("split") >= 0:
        return
    with stage.transaction():
        counts: Counter[str] = Counter()
        rows = stage.db.execute("SELECT n, cluster, at FROM clean ORDER BY n").fetchall()
        timed = [row for row in rows if row[2]]
        if len(timed) * 2 > len(rows):
            times = sorted(_utc(at) for _, _, at in timed)
            cut = [
                times[min(int(len(times) * q), len(times) - 1)]
                for q in (1 - config.valid - config.test, 1 - config.test)
            ]
            sides = {n: _side(_utc(at), cut, config) if at else 0 for n, _, at in rows}
        else:
            bounds = (1 - config.valid - config.test, 1 - config.test)
            drawn = {
                c: int(hashlib.sha256(f"{config.seed}:{c}".encode()).hexdigest()[:8], 16) / 2**32 for _, c, _ in rows
            }
            sides = {n: sum(drawn[c] >= b for b in bounds) for n, c, _ in rows}
        sides.update(dict.fromkeys(_rows_of(stage, config.validation), 1))
        earliest: dict[int, int] = {}
        for n, cluster, _ in rows:
            earliest[cluster] = min(earliest.get(cluster, 2), sides[n])
        for n, cluster, _ in rows:
            if sides[n] != earliest[cluster]:
                counts["dialogue: its customer or its like is on an earlier side"] += 1
                stage.db.execute("DELETE FROM clean WHERE n = ?", (n,))
            else:
                stage.db.execute("UPDATE clean SET split = ? WHERE n = ?", (SPLITS[sides[n]], n))
        stage.add_counts(counts)
        stage.reached("split", 0)


def _rows_of(stage: _Stage, files: Collection[str]) -> Iterator[int]:
    """Yield the numbers of the dialogues that came from `files`."""
    for n, source in stage.db.execute("SELECT n, source FROM clean"):
        if source.rpartition(":")[0] in files or source in files:
            yield n


def _utc(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def _side(at: float, cut: list[float], config: ImportConfig) -> int:
    if config.test and at >= cut[1]:
        return 2
    return 1 if config.valid and at >= cut[0] else 0


def _write(stage: _Stage, config: ImportConfig, folder: Path, progress: Progress) -> dict[str, Any]:
    """Stage 5: the three files, the reports and, last, the manifest."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    n_all = stage.count("clean")
    if not stage.db.execute("SELECT 1 FROM clean WHERE split = 'train' LIMIT 1").fetchone():
        raise MerchantError("nothing is left to train on: every dialogue was dropped, or the files hold none")
    macro_at = config.macro or max(10, n_all // 100)
    macros = {h: 0 for (h,) in stage.db.execute("SELECT hash FROM replies WHERE n >= ?", (macro_at,))}
    counts: Counter[str] = Counter()
    facts = _Facts()
    files: dict[str, Any] = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        digest = hashlib.sha256()
        n_written = 0
        with path.open("w", encoding="utf-8", newline="\n") as file:
            # By time where there is one, so that a reader sees the months pass; training shuffles by its own seed.
            query = "SELECT n, dialogue, cluster, source FROM clean WHERE split = ? ORDER BY at, n"
            for done, (_, text, cluster, source) in enumerate(stage.db.execute(query, (split,))):
                dialogue = _without_macros(parse_dialogue(text, source), macros, config.keep_macro, counts)
                variants = [dialogue, *(augmented(dialogue, config.augment, config.seed) if split == "train" else ())]
                for variant in variants:
                    line = dump_dialogue(variant, group=cluster) + "\n"
                    file.write(line)
                    digest.update(line.encode())
                    n_written += 1
                counts["augmented dialogues"] += len(variants) - 1
                facts.add(split, dialogue)
                if done % COMMIT_EVERY == 0:
                    progress("writing", done, n_all)
            file.flush()
            os.fsync(file.fileno())
        files[path.name] = {"sha256": digest.hexdigest(), "n_dialogues": n_written}
    report = _report(stage, config, files, facts, counts, macro_at)
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(render_report(report), encoding="utf-8")
    manifest = {
        "format": FORMAT_VERSION,
        "masked": True,
        "pii_version": PII_VERSION,
        "keep": sorted(config.keep),
        "files": files,
        "data_sha256": hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return report


def _without_macros(dialogue: Dialogue, macros: dict[bytes, int], keep: int, counts: Counter[str]) -> Dialogue:
    lines = []
    for line in dialogue.lines:
        if line.role == "assistant" and line.learn:
            key = hashlib.sha256(squeeze(line.text).encode()).digest()[:16]
            if key in macros:
                macros[key] += 1
                if macros[key] > keep:
                    counts["reply not learned: macro"] += 1
                    line = replace(line, learn=False)
        lines.append(line)
    return replace(dialogue, lines=tuple(lines))


class _Facts:
    """Lengths and languages of what was kept, in counters: no list grows with the data."""

    def __init__(self) -> None:
        self.chars: dict[str, Counter[int]] = {"user": Counter(), "assistant": Counter()}
        self.turns: Counter[int] = Counter()
        self.langs: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self.times: dict[str, list[str]] = {}
        self.ratings: Counter[str] = Counter()

    def add(self, split: str, dialogue: Dialogue) -> None:
        self.turns[len(dialogue.lines) // 2] += 1
        self.langs[split][dialogue.lang or "unknown"] += 1
        for line in dialogue.lines:
            self.chars[line.role][len(line.text)] += 1
            if line.rating:
                self.ratings[line.rating] += 1
        if dialogue.at:
            at = dialogue.at.isoformat()
            first, last = self.times.get(split, (at, at))
            self.times[split] = [min(first, at), max(last, at)]


def _quantiles(counter: Counter[int]) -> dict[str, int]:
    total, found, seen = counter.total(), {}, 0
    wanted = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    for value in sorted(counter):
        seen += counter[value]
        for name, q in wanted.items():
            if name not in found and seen >= q * total:
                found[name] = value
    return found


def _report(
    stage: _Stage, config: ImportConfig, files: dict[str, Any], facts: _Facts, counts: Counter[str], macro_at: int
) -> dict[str, Any]:
    stage.add_counts(counts)
    named = dict(stage.db.execute("SELECT name, n FROM counts ORDER BY n DESC, name").fetchall())
    macros = stage.db.execute("SELECT n, text FROM replies WHERE n >= ? ORDER BY n DESC, text LIMIT 20", (macro_at,))
    faults = stage.db.execute("SELECT source, field, problem, remedy FROM faults ORDER BY n LIMIT ?", (MAX_FAULTS,))
    return {
        "config": asdict(config),
        "n_read": stage.count("raw"),
        "n_faults": stage.count("faults"),
        "faults": [asdict(Fault(*row)) for row in faults],
        "splits": {
            s: {
                "n_dialogues": files[f"{s}.jsonl"]["n_dialogues"],
                "languages": dict(facts.langs[s]),
                "from": facts.times.get(s, [None, None])[0],
                "to": facts.times.get(s, [None, None])[1],
            }
            for s in SPLITS
        },
        "lengths": {
            "turns": _quantiles(facts.turns),
            "user_chars": _quantiles(facts.chars["user"]),
            "assistant_chars": _quantiles(facts.chars["assistant"]),
        },
        "ratings": dict(facts.ratings),
        "dropped": {name: n for name, n in named.items() if name.startswith(("dialogue: ", "message: "))},
        "not_learned": {
            name.partition(": ")[2]: n for name, n in named.items() if name.startswith("reply not learned")
        },
        "masked": {name.removeprefix("masked: "): n for name, n in named.items() if name.startswith("masked: ")},
        "augmented": named.get("augmented dialogues", 0),
        "macros": [{"n": n, "text": text} for n, text in macros],
        "files": files,
    }
