"""
`ablate`: train with and without each change of the data, on the same seed, and keep what the held-out dialogues say helps.

A change is a kind of augmentation (finetune/augment.py) or another data folder of the same import, such as `distill` makes:
its dialogues take the place of those of the same id, and new ones are added. Changes are tried in the order given, each on
top of what was kept until then, and judged by a paired interval over the same held-out replies, which no change touches.

    DIR/runs/0-none, 1-typos …   each a run like any other; the best may be evaluated and published
    DIR/data/1-typos …           what it was trained on
    DIR/ablate.json, ablate.html what each change brought
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from bot.catalog import resolve_model
from bot.errors import MerchantError
from bot.prompt import PromptStore
from finetune.augment import KINDS, augmented
from finetune.config import RunConfig
from finetune.data import Data, load_data
from finetune.dialogues import Dialogue
from finetune.distill import write_data
from finetune.evaluate import Contestant, Measured, Prompt, finished, first_replies, labelled, measure
from finetune.grounding import NO_STORE, Search
from finetune.html import STYLE
from finetune.metrics import Interval, paired_difference, paired_perplexity, rouge_l, sentence_chrf
from finetune.modeling import HfTokenizer
from finetune.runs import write_report
from finetune.train import read_conversations, train, write_conversations

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the data: a kind of augmentation, or a folder."""

    name: str
    folder: Path | None = None


def parse_changes(items: Sequence[str]) -> list[Change]:
    """
    Return KIND or NAME=DIR items as changes.

    Raises:
        MerchantError: none, one twice, or one that is neither.
    """
    changes = []
    for item in (part for text in items for part in text.split(",") if part.strip()):
        name, equals, folder = item.strip().partition("=")
        if not equals and name not in KINDS:
            raise MerchantError(f"--change: {name!r} is none of {', '.join(KINDS)}; a data folder is NAME=DIR")
        if not name.replace("-", "").replace("_", "").isalnum() or name == "none":
            raise MerchantError(f"--change: {name!r} names no folder; use letters, digits and -")
        changes.append(Change(name, Path(folder) if equals else None))
    if not changes:
        raise MerchantError(f"--change: name at least one: {', '.join(KINDS)}, or NAME=DIR of a data folder")
    if len({c.name for c in changes}) < len(changes):
        raise MerchantError("--change: a name twice")
    return changes


def ablate(
    config: RunConfig,
    folder: Path,
    changes: Sequence[Change],
    *,
    by: str = "perplexity",
    search: Search | None = None,
    store: PromptStore | None = None,
    n_samples: int = 32,
    max_new_tokens: int = 96,
    report: Report = lambda event: None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """
    Make the runs, write ablate.json and ablate.html into `folder`, and return the former.

    `by` is "perplexity", "rouge_l" or "chrf"; replies are generated for the latter two. A killed call goes on.

    Raises:
        MerchantError: the data cannot be used, a change has other held-out dialogues, or `folder` holds another search.
    """
    base = load_data(config.data)
    if base.rendered:
        raise MerchantError(f"{config.data}: holds rendered conversations; give the import that they were made of")
    if not base.splits["test"]:
        raise MerchantError(f"{config.data}: nothing is held out; import with --test above 0")
    others = {c.name: _other(c, base) for c in changes if c.folder is not None}
    _claim(folder, config, base, changes, by)

    tokenizer = HfTokenizer(resolve_model(_base_name(config)))
    held_out_path = folder / "conversations-test.jsonl"
    if not held_out_path.exists():
        write_conversations(held_out_path, "test", base, config, tokenizer, search, store or NO_STORE, Counter())
    held_out = list(read_conversations(held_out_path))
    examples = labelled(held_out, tokenizer, config)
    if not examples:
        raise MerchantError(f"{config.data / 'test.jsonl'}: no reply to measure on")
    prompts = first_replies(held_out)[:n_samples] if by != "perplexity" else []

    def scored(name: str, data: Path) -> tuple[Path, Measured]:
        run = folder / "runs" / name
        tell(f"{name}: training")
        if not (run / "result.json").is_file():
            train(
                config.model_copy(update={"data": data}), run, search=search, store=store,
                resume=(run / "run.json").is_file(), report=report,
            )  # fmt: skip
        _, result = finished(run)
        whole = result["kind"] == "model"
        model = resolve_model(_base_name(config))
        contestant = Contestant(name, run / "result" if whole else model, None if whole else run / "result")
        tell(f"{name}: measuring {len(examples)} held-out examples")
        return run, measure(contestant, config, tokenizer, examples, prompts, max_new_tokens, ())

    run, best = scored("0-none", config.data)
    rows: list[dict[str, Any]] = [_row("none", run, config.data, len(base.splits["train"]), best, None, kept=True)]
    current, data, lineage = base.splits["train"], config.data, base.lineage
    for n, change in enumerate(changes, 1):
        name = f"{n}-{change.name}"
        changed = _changed(current, base, others.get(change.name), change, config.seed)
        target = folder / "data" / name
        other = others.get(change.name)
        story = {
            "work": change.name, "before": lineage,
            "teacher": (other.lineage or {}).get("teacher", "hand") if other is not None else "rules",
        }  # fmt: skip
        target.mkdir(parents=True, exist_ok=True)
        write_data(target, {**base.splits, "train": changed}, config.data, story)
        tried, measured = scored(name, target)
        gains = _gains(measured, best, prompts)
        helps = gains[by].high < 0 if by == "perplexity" else gains[by].low > 0
        rows.append(_row(change.name, tried, target, len(changed), measured, gains, kept=helps))
        tell(f"{name}: {'kept' if helps else 'left out'}: {_interval(gains[by])}")
        if helps:
            run, best, current, data, lineage = tried, measured, changed, target, story
    document = {
        "data_sha256": base.sha256, "base": _base_name(config), "config": json.loads(config.model_dump_json()),
        "by": by, "n_held_out": len(examples), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "changes": rows, "kept": [r["change"] for r in rows[1:] if r["kept"]], "run": str(run), "data": str(data),
    }  # fmt: skip
    write_report(folder / "ablate.json", document, render_html(document))
    return document


def _base_name(config: RunConfig) -> str:
    from bot.catalog import load_catalog

    return config.base or load_catalog().default_name


def _claim(folder: Path, config: RunConfig, base: Data, changes: Sequence[Change], by: str) -> None:
    """Make `folder` this comparison's, or refuse another one's."""
    asked = {
        "config": json.loads(config.model_dump_json()), "data": base.sha256, "by": by,
        "changes": [[c.name, str(c.folder or "")] for c in changes],
    }  # fmt: skip
    path = folder / "asked.json"
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != asked:
            raise MerchantError(f"--run {str(folder)!r} holds another comparison: name a new folder")
        return
    if folder.exists() and any(folder.iterdir()):
        raise MerchantError(f"--run {str(folder)!r} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asked, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _other(change: Change, base: Data) -> Data:
    """Open a change's folder; its held-out sides must be those of the data, or it may have learned what is measured."""
    assert change.folder is not None
    other = load_data(change.folder)
    for side in ("valid", "test"):
        if other.rendered or _key(other.splits[side]) != _key(base.splits[side]):
            raise MerchantError(
                f"--change {change.name}={change.folder}: its {side} side is another one; make it of the same import"
            )
    return other


def _key(dialogues: Sequence[Dialogue]) -> str:
    return hashlib.sha256("\n".join(d.text for d in dialogues).encode()).hexdigest()


def _changed(current: Sequence[Dialogue], base: Data, other: Data | None, change: Change, seed: int) -> list[Dialogue]:
    """Return the training side with a change on top."""
    if other is None:
        return [*current, *(v for d in base.splits["train"] for v in augmented(d, (change.name,), seed))]
    new = {d.id: d for d in other.splits["train"]}
    replaced = [new.pop(d.id, d) for d in current]
    return [*replaced, *new.values()]


def _gains(new: Measured, old: Measured, prompts: Sequence[Prompt]) -> dict[str, Interval]:
    gains = {"perplexity": paired_perplexity(new.losses, old.losses)}
    if prompts:
        for name, score in (("rouge_l", rouge_l), ("chrf", sentence_chrf)):
            pairs = [[score(r, p.reply) for r, p in zip(m.replies, prompts, strict=True)] for m in (new, old)]
            gains[name] = paired_difference(*pairs)
    return gains


def _row(
    change: str, run: Path, data: Path, n: int, measured: Measured, gains: dict[str, Interval] | None, *, kept: bool
) -> dict[str, Any]:
    shown = ("perplexity", "rouge_l", "chrf", "language_match", "ungrounded_figures", "length_ratio")
    return {
        "change": change, "kept": kept, "run": str(run), "data": str(data), "n_dialogues": n,
        "figures": {k: measured.figures.get(k) for k in shown if measured.figures.get(k) is not None},
        "against_kept": {k: asdict(i) for k, i in gains.items()} if gains else None,
    }  # fmt: skip


# --- For people ------------------------------------------------------------------------------------------------------


def render_table(document: dict[str, Any]) -> str:
    """Return the comparison as lines of text."""
    lines = [f"{document['n_held_out']} held-out examples, by {document['by']}"]
    for row in document["changes"]:
        gain = row["against_kept"] and _interval(Interval(**row["against_kept"][document["by"]]))
        verdict = "" if gain is None else f"  {gain}  {'kept' if row['kept'] else 'left out'}"
        lines.append(f"{row['change']:<20} perplexity {row['figures']['perplexity']:.4f}{verdict}")
    return "\n".join([*lines, f"best run: {document['run']}"])


def render_html(document: dict[str, Any]) -> str:
    """Return ablate.html: a row for each change, with its intervals against what was kept before it."""
    names = [
        k for k in ("perplexity", "rouge_l", "chrf") if any(k in (r["against_kept"] or {}) for r in document["changes"])
    ]
    head = "".join(f"<th>{n}</th><th>change of {n}</th>" for n in names or ["perplexity"])
    rows = []
    for row in document["changes"]:
        cells = ""
        for name in names or ["perplexity"]:
            gain = (row["against_kept"] or {}).get(name)
            value = row["figures"].get(name)
            cells += f"<td>{'' if value is None else value}</td><td>{_interval(Interval(**gain)) if gain else ''}</td>"
        verdict = "" if row["against_kept"] is None else "kept" if row["kept"] else "left out"
        rows.append(
            f"<tr><td>{escape(row['change'])}</td><td class={'pass' if row['kept'] else 'fail'}>{verdict}</td>"
            f"<td>{row['n_dialogues']}</td>{cells}<td><small>{escape(row['run'])}</small></td></tr>"
        )
    return "".join([
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Changes of the data</title><style>{STYLE}</style>",
        "<h1>What each change of the data brought</h1>",
        f"<p><small>{escape(document['base'])}, {escape(document['at'])}; {document['n_held_out']} held-out examples; "
        f"by {escape(document['by'])}, paired, 95% intervals, each against what was kept before it.</small></p>",
        f"<table><tr><th>change</th><th></th><th>dialogues</th>{head}<th>run</th></tr>{''.join(rows)}</table>",
    ])  # fmt: skip


def _interval(i: Interval) -> str:
    return f"{i.mean:+.4f} [{i.low:+.4f}, {i.high:+.4f}]"
