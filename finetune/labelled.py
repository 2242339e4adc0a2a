"""
Files of texts and their labels -> masked, split texts for a classifier. No torch, no model.

CSV, TSV, XLSX and JSONL, with the columns named or found under their usual names. Personal data is masked as in an
import. Texts that are equal are one; texts nearly alike are on one side of the split, so that nothing measured was learned.
Each label has its share on each side. A folder with files called train…, valid… (dev…) and test… keeps that split: what of
its training side is like a text of the others is dropped.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bot.errors import MerchantError
from finetune.cleaning import tidy
from finetune.config import RunConfig
from finetune.dialogues import Fault
from finetune.duplicates import NearIndex, Signature, signature, squeeze
from finetune.formats import read_objects, read_table
from finetune.importing import MAX_FAULTS, SPLITS, BadData
from finetune.pii import Masker, residual

SUFFIXES = (".csv", ".tsv", ".xlsx", ".jsonl", ".json")
MAX_LABELS = 1_000
MAX_LABEL_CHARS = 100
LEAST_LIKE = 0.8  # estimated Jaccard similarity from which two texts are on one side
_USUAL = {
    "text": "text sentence content message utterance query question review comment input body "
    "文本 内容 句子 评论 评价 问题 消息 留言",
    "label": "label intent category class sentiment target tag y 标签 类别 分类 意图 情感 情感倾向 类目",
}


@dataclass(frozen=True, slots=True)
class Text:
    """One text with its label, masked."""

    text: str
    label: str
    source: str  # "file:line"
    side: str = ""  # given by the file's name; else drawn


@dataclass(frozen=True)
class Texts:
    """What a classifier is trained and measured on."""

    splits: dict[str, list[Text]]
    labels: tuple[str, ...]  # sorted; a class is its place here
    counts: Counter[str]  # what was dropped and masked, and why
    sha256: str


def load_texts(config: RunConfig) -> Texts:
    """
    Return the texts of `config.data`, the same for the same files and configuration.

    Raises:
        BadData: rows that cannot be read, and not `skip_bad`.
        MerchantError: no such file, or nothing to tell apart.
    """
    files = _files(config.data)
    counts: Counter[str] = Counter()
    faults: list[Fault] = []
    raw: list[Text] = []
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        for item in _read(path, {str(what): name for what, name in config.columns.items()}):
            faults.append(item) if isinstance(item, Fault) else raw.append(item)
    if faults and not config.skip_bad:
        raise BadData(faults[:MAX_FAULTS], len(faults))
    counts["left out: cannot be read"] += len(faults)
    texts = _masked(raw, counts)
    kept = _without_equal(texts, counts)
    labels = _labels(kept, config)
    splits = _sides(kept, config, counts)
    for label in labels:
        if not any(t.label == label for t in splits["train"]):
            raise MerchantError(f"label {label!r} has no text to train on; add some, or take its texts out")
    return Texts(splits, labels, +counts, digest.hexdigest())


def _files(data: Path) -> list[Path]:
    if data.is_dir():
        found = sorted(p for p in data.iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise MerchantError(f"{str(data)!r} holds no file of texts and labels ({', '.join(SUFFIXES)})")
        return found
    if not data.is_file():
        raise MerchantError(f"--data {str(data)!r}: not found; give a file of texts and labels, or a folder of them")
    if data.suffix.lower() not in SUFFIXES:
        raise MerchantError(f"--data {str(data)!r}: none of {', '.join(SUFFIXES)}")
    return [data]


def _side(path: Path) -> str:
    name = path.stem.lower()
    known = {"train": "train", "valid": "valid", "dev": "valid", "eval": "valid", "test": "test"}
    return next((side for start, side in known.items() if name.startswith(start)), "")


# --- Reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, columns: Mapping[str, str]) -> Iterator[Text | Fault]:
    """Yield the texts of one file and its faults."""
    side = _side(path)
    for item in _objects(path, columns) if path.suffix.lower() in (".jsonl", ".json") else _rows(path, columns):
        if isinstance(item, Fault):
            yield item
            continue
        number, values = item
        source = f"{path}:{number}"
        for what in ("text", "label"):
            if not isinstance(values[what], str) or not values[what]:
                yield Fault(source, what, "empty or not a text", "fill it in or remove the row")
                break
        else:
            if len(values["label"]) > MAX_LABEL_CHARS:
                yield Fault(source, "label", f"over {MAX_LABEL_CHARS} characters long", "name the label's column")
            else:
                yield Text(values["text"], values["label"], source, side)


def _place(names: Sequence[str], what: str, columns: Mapping[str, str]) -> int | None:
    if what in columns:
        return names.index(columns[what]) if columns[what] in names else None
    usual = _USUAL[what].split()
    lower = [name.strip().lower().replace(" ", "_") for name in names]
    return next((lower.index(name) for name in usual if name in lower), None)


def _missing(source: str, what: str, names: Sequence[str], columns: Mapping[str, str]) -> Fault:
    problem = f"no column {columns[what]!r}" if what in columns else "no such column"
    return Fault(source, what, problem, f"name it: --columns {what}=NAME; there are {', '.join(names)[:160]}")


def _rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str]] | Fault]:
    names: list[str] = []
    places: dict[str, int] = {}
    for item in read_table(path):
        if isinstance(item, Fault):
            yield item
            continue
        number, cells = item
        if not names:
            names = [str(c or "").strip() for c in cells]
            for what in ("text", "label"):
                place = _place(names, what, columns)
                if place is None:
                    yield _missing(f"{path}:{number}", what, names, columns)
                    return
                places[what] = place
        elif any(str(c if c is not None else "").strip() for c in cells):
            yield number, {what: _cell(cells, place) for what, place in places.items()}


def _cell(cells: Sequence[object], place: int) -> str:
    value = cells[place] if place < len(cells) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a spreadsheet's 1.0
    return "" if value is None else str(value).strip()


def _objects(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[int, dict[str, str]] | Fault]:
    for item in read_objects(path):
        if isinstance(item, Fault):
            yield item
            continue
        number, found = item
        names = [str(key) for key in found]
        values = {}
        for what in ("text", "label"):
            place = _place(names, what, columns)
            value = found[names[place]] if place is not None else None
            values[what] = _cell([value], 0) if isinstance(value, (str, int, float)) else ""
            if place is None:
                yield _missing(f"{path}:{number}", what, names, columns)
                break
        else:
            yield number, values


# --- Masking, equal and alike ----------------------------------------------------------------------------------------


def _masked(raw: Sequence[Text], counts: Counter[str]) -> list[Text]:
    masker = Masker()
    found = []
    for t in raw:
        text = tidy(masker.mask([t.text])[0])
        if not squeeze(text):
            counts["left out: nothing to read"] += 1
        elif residual(text):
            counts["left out: could not be masked whole"] += 1
        else:
            found.append(Text(text, t.label, t.source, t.side))
    counts.update({f"masked: {kind}": n for kind, n in masker.counts.items()})
    return found


def _without_equal(texts: Sequence[Text], counts: Counter[str]) -> list[Text]:
    """Return each text once; those that came with several labels teach nothing and are left out."""
    by_key: dict[str, list[Text]] = defaultdict(list)
    for t in texts:
        by_key[squeeze(t.text)].append(t)
    kept = []
    for same in by_key.values():
        if len({t.label for t in same}) > 1:
            counts["left out: the same text under several labels"] += len(same)
            continue
        # Of a given split the text stays where it is measured: the other copy is the one that must go.
        kept.append(max(same, key=lambda t: (t.side == "test", t.side == "valid")))
        counts["left out: the same text again"] += len(same) - 1
    return kept


def _labels(texts: Sequence[Text], config: RunConfig) -> tuple[str, ...]:
    labels = tuple(sorted({t.label for t in texts}))
    if len(labels) < 2:
        raise MerchantError(f"{config.data}: {len(labels)} labels in {len(texts)} texts, and two are the least")
    if len(labels) > min(MAX_LABELS, len(texts) // 2):
        raise MerchantError(
            f"{config.data}: {len(labels)} labels in {len(texts)} texts: is that the label's column? --columns label=NAME"  # noqa: E501
        )
    return labels


def _alike(texts: Sequence[Text]) -> list[int]:
    """Return the cluster of each text: the first text it is like, over however many steps."""
    parents = list(range(len(texts)))

    def root(n: int) -> int:
        while parents[n] != n:
            parents[n] = parents[parents[n]]
            n = parents[n]
        return n

    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        index = NearIndex(db)
        for n, t in enumerate(texts):
            sig = signature(t.text)
            for other, _ in index.alike(sig, LEAST_LIKE):
                a, b = sorted((root(n), root(other)))
                parents[b] = a
            index.add(n, sig)
    return [root(n) for n in range(len(texts))]


# --- Sides -----------------------------------------------------------------------------------------------------------


def _sides(texts: Sequence[Text], config: RunConfig, counts: Counter[str]) -> dict[str, list[Text]]:
    """Return the sides that the files give; those they do not give are drawn from training."""
    given = {t.side for t in texts} - {""}
    splits = _given_sides(texts, counts) if given else {"train": list(texts), "valid": [], "test": []}
    shares = {side: 0.0 if side in given else getattr(config, side) for side in ("valid", "test")}
    drawn = _drawn_sides(splits["train"], config.model_copy(update=shares))
    return {side: drawn[side] if side == "train" or side not in given else splits[side] for side in SPLITS}


def _drawn_sides(texts: Sequence[Text], config: RunConfig) -> dict[str, list[Text]]:
    """Draw a side for each cluster, label by label, so that each label has its share on each side."""
    clusters: dict[int, list[Text]] = defaultdict(list)
    for t, cluster in zip(texts, _alike(texts), strict=True):
        clusters[cluster].append(t)
    by_label: dict[str, list[list[Text]]] = defaultdict(list)
    for together in clusters.values():
        # A cluster of several labels is drawn with its commonest.
        by_label[Counter(t.label for t in together).most_common(1)[0][0]].append(together)
    splits: dict[str, list[Text]] = {split: [] for split in SPLITS}
    for label in sorted(by_label):
        groups = by_label[label]
        random.Random(f"{config.seed}:{label}").shuffle(groups)
        groups.sort(key=len, reverse=True)  # large clusters first, to training: what is left divides finely
        n_texts = sum(map(len, groups))
        room = {"test": round(n_texts * config.test), "valid": round(n_texts * config.valid)}
        biggest, rest = groups[:1], groups[1:]
        splits["train"] += biggest[0]  # each label is learned, however rare
        for group in reversed(rest):
            side = next((s for s in ("test", "valid") if room[s] >= len(group)), "train")
            splits[side] += group
            room[side] = room.get(side, 0) - len(group)
    order = {t.source: n for n, t in enumerate(texts)}
    return {split: sorted(found, key=lambda t: order[t.source]) for split, found in splits.items()}


def _given_sides(texts: Sequence[Text], counts: Counter[str]) -> dict[str, list[Text]]:
    """Keep the sides of the files; what is like a text of a later side leaves the earlier one."""
    splits: dict[str, list[Text]] = {s: [t for t in texts if (t.side or "train") == s] for s in SPLITS}
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        index = NearIndex(db)
        n = 0
        for split in reversed(SPLITS):
            kept = []
            signatures: list[Signature] = [signature(t.text) for t in splits[split]]
            for t, sig in zip(splits[split], signatures, strict=True):
                if index.alike(sig, LEAST_LIKE, limit=8):
                    counts[f"left out of {split}: like a text of a later side"] += 1
                else:
                    kept.append(t)
            splits[split] = kept
            for sig in signatures:
                index.add(n, sig)
                n += 1
    return splits


# --- In a run --------------------------------------------------------------------------------------------------------


def write_texts(path: Path, texts: Sequence[Text]) -> None:
    """Write a side of the texts into a run, whole or not at all."""
    partial = path.with_suffix(".partial")
    lines = [json.dumps({"text": t.text, "label": t.label, "source": t.source}, ensure_ascii=False) for t in texts]
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def read_texts(path: Path) -> list[Text]:
    """Return what `write_texts` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Text(raw["text"], raw["label"], raw["source"]) for raw in map(json.loads, file)]
