"""
`python -m retrieval import FILES… --store DIR`: read, map, merge, check a staged copy of the store, then swap it in.

Knows the command line and what is printed; each step is elsewhere in this package. All or nothing: one wrong row in one
file, and no file of the store is touched.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrieval.errors import BadStore, Fault
from retrieval.importing.columns import ALL, NAMES, SheetKind
from retrieval.importing.files import importing, knowledge_files, stage, swap
from retrieval.importing.merge import (
    TARGETS,
    Merged,
    merge_copy,
    merge_pages,
    merge_policy,
    merge_sheet,
    question_pairs,
)
from retrieval.importing.reading import Source, read_file
from retrieval.importing.tables import Ask, Entry, Options, Table, source_entries
from retrieval.load import Clock, check_entries, load_clock, load_store

N_SHOWN = 50  # wrong rows printed; --json has N_LISTED
N_LISTED = 1_000
N_EXAMPLES = 5


def add_parser(commands: Any) -> None:
    """Add `import` to the subcommands of `python -m retrieval`."""
    parser = commands.add_parser(
        "import",
        help="take a merchant's files (CSV, XLSX, JSON, Markdown, HTML, PDF, DOCX …) into a store",
        description="Sheets are merged into faqs.csv, products.csv, promotions.csv; documents become policies/*.md.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="the store folder")
    parser.add_argument("--dry-run", action="store_true", help="show what would change and write nothing")
    parser.add_argument(
        "--as",
        dest="target",
        choices=(*ALL, "policies", "knowledge"),
        help="what the files are (default: by their columns); knowledge keeps each file as it is in knowledge/",
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        type=_pair,
        metavar="FIELD=COLUMN",
        help="a column by name, letter or number",
    )
    parser.add_argument("--sheet", default="", metavar="NAME", help="the one sheet of a workbook to take")
    parser.add_argument("--no-header", action="store_true", help="the first row is an entry; needs --map by letters")
    parser.add_argument(
        "--empty-answer",
        choices=("wording", "refuse"),
        default="",
        help="a row without an answer is another wording of the row above, or a fault (default: decided by the sheet)",
    )
    parser.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    parser.set_defaults(run=run)


def _pair(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    known = sorted({known for fields in NAMES.values() for known in fields})
    if not equals or not column.strip() or name.strip() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=COLUMN; fields are {', '.join(known)}")
    return name.strip(), column.strip()


@dataclass(slots=True)
class _Plan:
    """An import under way."""

    clock: Clock
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: dict[SheetKind, list[Entry]] = field(default_factory=dict)
    merged: list[Merged] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)  # by target: rows that are wrong

    def refuse(self, target: str, before: int) -> None:
        """Count the rows with faults since there were `before` of them, for `target`."""
        self.refused[target] += len({(fault.file, fault.row) for fault in self.faults[before:]})


def run(options: argparse.Namespace) -> int:
    """
    Do the import and print what changed; 0, or 2 where anything is wrong and nothing was written.

    Raises:
        BadStore: the folder is missing, or another import is at work.
        OSError: the store cannot be written; nothing of it was changed.
    """
    store: Path = options.store
    if not store.is_dir():
        raise BadStore([Fault(str(store), None, None, "no such folder; name the folder with store.toml in it")])
    with nullcontext() if options.dry_run else importing(store):
        plan = _plan(options, _terminal())
        contents = {merged.name: merged.content for merged in plan.merged if merged.content is not None}
        if not plan.faults:
            _check(store, contents, plan)
        if not plan.faults and not options.dry_run and contents:
            swap(store, contents, {merged.name: merged.seen for merged in plan.merged})
    report = _report(options, plan, bool(contents))
    if options.json:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # a C locale would fail on 优惠
        print(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        _print(report, plan)
    if plan.faults:
        print(f"nothing was imported: {BadStore(plan.faults)}", file=sys.stderr)
        return 2
    return 0


def _check(store: Path, contents: dict[str, bytes], plan: _Plan) -> None:
    """Load the store as it would be, from a staged copy; what is wrong goes to the plan's faults."""
    with tempfile.TemporaryDirectory(prefix="zhanggui-import-") as folder:
        try:
            load_store(stage(Path(folder), store, contents))
        except BadStore as exc:
            plan.faults.extend(exc.faults)


# --- reading and mapping ----------------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace, ask: Ask | None) -> _Plan:
    store: Path = options.store
    faults: list[Fault] = []
    plan = _Plan(load_clock(store, faults), faults)
    taken: dict[str, str] = {}
    for path in options.files:
        _take(path, options, plan, taken, ask)
    files = knowledge_files(store)
    for kind, entries in plan.entries.items():
        before = len(plan.faults)
        target = TARGETS[kind]
        check_entries(kind, entries, plan.clock, plan.faults)
        if len(plan.faults) == before:
            merged = merge_sheet(files.get(target, store / target), kind, entries, plan.clock.zone, plan.faults)
            if merged is not None:
                plan.merged.append(merged)
                plan.notes.extend(merged.notes)
        plan.refuse(target, before)
    return plan


def _take(path: Path, options: argparse.Namespace, plan: _Plan, taken: dict[str, str], ask: Ask | None) -> None:
    """Read one file and put what it holds where it goes."""
    name, target = path.name, options.target
    before = len(plan.faults)
    told: dict[str, Any] = {"file": str(path), "format": None, "sheets": [], "refused": 0}
    plan.sources.append(told)
    source = read_file(path, name, plan.faults)
    if source is not None:
        told["format"] = source.form
        plan.notes.extend(f"{name}: {note}" for note in source.notes)
        if target == "knowledge":
            _claim(f"knowledge/{name}", name, taken, plan)
            plan.merged.append(
                merge_copy(options.store / "knowledge" / name, f"knowledge/{name}", name, path.read_bytes())
            )
        elif source.markdown is not None:
            _take_document(source, options, plan, taken, told)
        elif target == "policies":
            plan.faults.append(
                Fault(name, None, None, "is a sheet, no policy; leave --as out, or save the text as a document")
            )
        else:
            _take_sheets(source, source.tables, options, plan, told, ask)
            if source.pages:
                _take_pages(source, options, plan, taken)
    told["refused"] = len({(fault.file, fault.row) for fault in plan.faults[before:]})


def _take_sheets(
    source: Source,
    tables: Sequence[Table],
    options: argparse.Namespace,
    plan: _Plan,
    told: dict[str, Any],
    ask: Ask | None,
) -> None:
    if not tables:
        return
    chosen = Options(
        kinds=(options.target,) if options.target in ALL else ALL,
        given=dict(options.map),
        has_header=not options.no_header,
        empty_answer=options.empty_answer,
    )
    sheet = options.sheet if source.form == "xlsx" else ""
    before = len(plan.faults)
    currency = _currency(options.store)
    found = source_entries(tables, chosen, plan.faults, plan.notes, sheet=sheet, currency=currency, ask=ask)
    for columns, entries in found:
        plan.entries.setdefault(columns.kind, []).extend(entries)
        told["sheets"].append(
            {
                "sheet": entries[0].file if entries else source.name,
                "kind": columns.kind,
                "columns": {
                    (f"{name} ({lang})" if lang else name): [columns.header[at] or at + 1 for at in positions]
                    for lang, by_field in columns.fields.items()
                    for name, positions in by_field.items()
                },
                "entries": len(entries),
            }
        )
    if found:
        plan.refuse(TARGETS[found[0][0].kind], before)


def _take_document(
    source: Source, options: argparse.Namespace, plan: _Plan, taken: dict[str, str], told: dict[str, Any]
) -> None:
    assert source.markdown is not None
    if options.target in ("products", "promotions"):
        problem = f"is a document, no sheet of {options.target}; save its table as XLSX or CSV"
        plan.faults.append(Fault(source.name, None, None, problem))
    elif options.target == "faqs":
        pairs = question_pairs(source.markdown)
        if not pairs:
            problem = "has no questions and answers (问：… 答：…, Q: … A: …, or headings that ask); leave --as out"
            plan.faults.append(Fault(source.name, None, None, problem))
            return
        rows = [(0, ["question", "answer"]), *((line, [question, answer]) for line, question, answer in pairs)]
        _take_sheets(source, [Table(source.name, rows, keyed=True)], options, plan, told, None)
    else:
        stem = Path(source.name).stem
        name = f"policies/{stem}.md"
        if _claim(name, source.name, taken, plan):
            path = knowledge_files(options.store).get(name, options.store / name)
            copied = source.form == "markdown"
            merged = merge_policy(path, name, source.name, source.markdown, plan.faults, copied=copied)
            if merged is not None:
                plan.merged.append(merged)


def _take_pages(source: Source, options: argparse.Namespace, plan: _Plan, taken: dict[str, str]) -> None:
    if options.target in ALL:
        row = source.pages[0][0]
        problem = f"has no question and answer, only a text; leave --as {options.target} out"
        plan.faults.append(Fault(source.name, row, None, problem))
        return
    name = f"knowledge/{Path(source.name).stem}.jsonl"
    if _claim(name, source.name, taken, plan):
        path = knowledge_files(options.store).get(name, options.store / name)
        merged = merge_pages(path, name, source.name, source.pages, plan.faults)
        if merged is not None:
            plan.merged.append(merged)


def _claim(target: str, name: str, taken: dict[str, str], plan: _Plan) -> bool:
    """Return whether `target` is free for this file; a fault where another one of this import has it."""
    if target in taken:
        problem = f"would become {target}, as {taken[target]} does; rename one of them"
        plan.faults.append(Fault(name, None, None, problem))
        return False
    taken[target] = name
    return True


def _currency(store: Path) -> str:
    """Return the currency of store.toml, "" where it says none: what is wrong with the file is told elsewhere."""
    try:
        settings = tomllib.loads((store / "store.toml").read_text("utf-8-sig"))
    except (OSError, ValueError):
        return ""
    inner = settings.get("store")
    found = settings.get("currency", inner.get("currency") if isinstance(inner, dict) else None)
    return found.upper() if isinstance(found, str) else ""


def _terminal() -> Ask | None:
    """Return a way to ask the person at the terminal, None where there is none."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None

    def ask(question: str, choices: Sequence[str]) -> int | None:
        for number, choice in enumerate(choices, start=1):
            print(f"  {number:3}  {choice}", file=sys.stderr)
        while True:
            print(f"{question} [1-{len(choices)}, empty to stop] ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline().strip()
            if not line:
                return None
            if line.isdecimal() and 1 <= int(line) <= len(choices):
                return int(line) - 1

    return ask


# --- telling ----------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace, plan: _Plan, changes: bool) -> dict[str, Any]:
    files: dict[str, dict[str, Any]] = {}
    for merged in plan.merged:
        counts = Counter(change.how for change in merged.changes)
        shown = [change for change in merged.changes if change.how != "unchanged"][:N_EXAMPLES]
        files[merged.name] = {
            "file": merged.name,
            "added": counts["added"],
            "changed": counts["changed"],
            "unchanged": counts["unchanged"],
            "refused": 0,
            "examples": [
                {
                    "change": change.how,
                    "id": change.id,
                    "title": change.title,
                    "source": change.source,
                    "fields": list(change.fields),
                }
                for change in shown
            ],
        }
    for name, n_refused in plan.refused.items():
        empty = {"file": name, "added": 0, "changed": 0, "unchanged": 0, "refused": 0, "examples": []}
        if n_refused:
            files.setdefault(name, empty)["refused"] = n_refused
    return {
        "store": str(options.store),
        "dry_run": options.dry_run,
        "imported": changes and not plan.faults and not options.dry_run,
        "files": list(files.values()),
        "sources": plan.sources,
        "notes": plan.notes,
        "n_faults": len(plan.faults),
        "faults": [
            {"file": fault.file, "row": fault.row, "field": fault.field, "problem": fault.problem}
            for fault in plan.faults[:N_LISTED]
        ],
    }


def _print(report: dict[str, Any], plan: _Plan) -> None:
    signs = {"added": "+", "changed": "~"}
    for told in report["files"]:
        counts = ", ".join(f"{told[how]} {how}" for how in ("added", "changed", "unchanged", "refused") if told[how])
        print(f"{told['file']}: {counts or 'nothing'}")
        for example in told["examples"]:
            fields = f"  [{', '.join(example['fields'])}]" if example["fields"] else ""
            title = " ".join(example["title"].split())[:60]
            print(f"  {signs[example['change']]} {example['id']}  {title}{fields}  ({example['source']})")
        n_more = told["added"] + told["changed"] - len(told["examples"])
        if n_more > 0:
            print(f"    and {n_more} more")
    for note in plan.notes[:N_SHOWN]:
        print(f"note: {note}")
    if plan.faults:
        print("wrong:")
        for fault in plan.faults[:N_SHOWN]:
            print(f"  {fault}")
        if len(plan.faults) > N_SHOWN:
            print(f"  and {len(plan.faults) - N_SHOWN} more (--json lists {N_LISTED:,})")
        print("Nothing was imported: correct these first.")
    elif report["dry_run"]:
        print("Nothing was written (--dry-run).")
    elif report["imported"]:
        print("Imported. A running server has it in some seconds.")
    else:
        print("Nothing to do: the store has all of it.")
