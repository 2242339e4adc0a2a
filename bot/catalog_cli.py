"""`python -m bot models list|search|show|recommend|fetch`: the model catalog for people and, with --json, programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bot.catalog import (
    GIB,
    KINDS,
    Catalog,
    Entry,
    Recommendation,
    fetch,
    is_here,
    load_catalog,
    model_folder,
    this_machine,
    verify,
)
from bot.errors import BotError, MerchantError
from bot.fetch import MB, HubSource


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Mount `models …` under the command line of `python -m bot`; `run` takes the parsed arguments."""
    models = subparsers.add_parser("models", help="the model catalog: list, search, show, recommend, fetch")
    commands = models.add_subparsers(dest="models_command", required=True, metavar="COMMAND")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=about, description=about)
        parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        parser.add_argument("--cache", type=Path, metavar="DIR", help="cache folder (default: ZHANGGUI_CACHE)")
        return parser

    command("list", "all models")
    search = command("search", "models that hold every word of TEXT")
    search.add_argument("text", nargs="*", metavar="TEXT")
    search.add_argument("--lang", action="append", default=[], metavar="zh|en", help="must speak it; may be repeated")
    show = command("show", "everything about one model")
    show.add_argument("name", metavar="NAME")
    recommend = command("recommend", "which models fit this machine, with memory and expected speed")
    recommend.add_argument("--lang", action="append", default=[], metavar="zh|en", help="default: zh and en")
    get = command("fetch", "download, verify and convert one model; prints its folder")
    get.add_argument("name", metavar="NAME", nargs="?", help="default: the embedded default")
    get.add_argument("--source", action="append", default=[], choices=sorted(KINDS.values()), help="only this kind")
    get.add_argument("--verify", action="store_true", help="hash the weights again if the model is here already")


def run(args: argparse.Namespace) -> int:
    """Run one parsed `models` command; return 0, 1 (failed) or 2 (bad input). Errors are one line on stderr."""
    try:
        catalog = load_catalog()
        value, text = COMMANDS[args.models_command](catalog, args)
    except BotError as exc:
        bad_input = isinstance(exc, MerchantError)
        print(f"{'error' if bad_input else 'failed'}: {exc}", file=sys.stderr)
        return 2 if bad_input else 1
    except ModuleNotFoundError as exc:
        # The environment without a model (ENGINE=none) lists and shows, but cannot convert or reach a hub.
        print(f"error: the package {exc.name} is not installed; `make install` brings it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    print(json.dumps(value, ensure_ascii=False, indent=2) if args.json else text)
    return 0


Output = tuple[Any, str]  # (for --json, for people)


def _list(catalog: Catalog, args: argparse.Namespace) -> Output:
    return _entries(catalog, catalog.entries, args.cache)


def _search(catalog: Catalog, args: argparse.Namespace) -> Output:
    return _entries(catalog, catalog.search(" ".join(args.text), args.lang), args.cache)


def _entries(catalog: Catalog, entries: Sequence[Entry], cache: Path | None) -> Output:
    values = [_entry_json(catalog, entry, cache) for entry in entries]
    rows = [["MODEL", "PARAMETERS", "LANGUAGES", "CONTEXT", "LICENCE", "DISK", "MEMORY", "FROM", "HERE"]]
    for entry in entries:
        rows.append(
            [
                entry.name + (" *" if entry.name == catalog.default_name else ""),
                _parameters(entry),
                " ".join(entry.languages),
                f"{entry.context:,}",
                entry.licence,
                _gb(entry.disk_bytes),
                _gb(entry.memory_bytes),
                " ".join(KINDS[type(source)] for source in entry.sources),
                "yes" if is_here(entry, cache) else "-",
            ]
        )
    if not entries:
        return values, "no model matches"
    return values, _table(rows, right=(1, 3, 5, 6)) + "\n* default; memory is for serving without a GPU"


def _show(catalog: Catalog, args: argparse.Namespace) -> Output:
    entry = catalog.get(args.name)
    lines = [
        ("model", entry.name + (" (default)" if entry.name == catalog.default_name else "")),
        ("use", entry.use),
        ("family", entry.family),
        ("parameters", f"{entry.parameters:,}"),
        ("languages", " ".join(entry.languages)),
        ("context", f"{entry.context:,} tokens"),
        ("licence", entry.licence),
        ("chat template", entry.chat_template + (", thinks aloud unless told not to" if entry.thinking else "")),
        ("disk", f"{entry.disk_bytes / MB:,.0f} MB"),
        ("memory", f"{entry.memory_bytes / GIB:.1f} GiB, or {entry.gpu_memory_bytes / GIB:.1f} GiB of a GPU"),
    ]
    if entry.measured is not None:
        lines.append(("measured", f"{entry.measured:.0%} of grounded questions right, untuned"))
    for i, source in enumerate(entry.sources, 1):
        loose = isinstance(source, HubSource) and not source.pinned
        lines.append((f"source {i}", f"{source}{' (a branch, not a commit)' if loose else ''}"))
    here = "" if is_here(entry, args.cache) else " (not here)"
    lines.append(("folder", f"{model_folder(entry.name, args.cache)}{here}"))
    return _entry_json(catalog, entry, args.cache), "\n".join(f"{key:<14} {value}" for key, value in lines)


def _recommend(catalog: Catalog, args: argparse.Namespace) -> Output:
    machine = this_machine()
    found = catalog.recommend(machine, args.lang or ("zh", "en"))
    gpus = ", ".join(f"{gpu.name} ({gpu.memory_bytes / GIB:.0f} GiB)" for gpu in machine.gpus) or "no NVIDIA GPU"
    rows = [["MODEL", "PARAMETERS", "ON", "NEEDS", "TOKENS/S", "QUOTING", "VERDICT"]]
    for r in found:
        verdict = "does not fit" if not r.fits else "fits" if r.keeps_up else "fits, slower than a reader"
        if r is found[0] and r.fits:
            verdict += "; take this one"
        speeds = [_speed(r.tokens_per_s), _speed(r.tokens_per_s_quoting)] if r.fits else ["-", "-"]
        rows.append([r.entry.name, _parameters(r.entry), r.device, _gb(r.needs_bytes), *speeds, verdict])
    text = (
        f"{machine.n_cores} cores, {machine.memory_bytes / GIB:.0f} GiB of memory, {gpus}\n\n"
        + _table(rows, right=(1, 3, 4, 5))
        + "\n\nSpeeds are estimates for one visitor at a time: memory bandwidth (measured on two cores and scaled; of a"
        "\nGPU 60% of the data sheet) over the bytes of weights a step reads. QUOTING: with n-gram speculation, replies"
        "\nthat quote the store. Measure yours with `python -m bot bench`, and answers with `python -m bot eval`."
    )
    value = {
        "machine": {
            "n_cores": machine.n_cores,
            "memory_bytes": machine.memory_bytes,
            "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in machine.gpus],
        },
        "speeds_are": "estimates",
        "models": [_recommendation_json(r) for r in found],
    }
    return value, text


def _fetch(catalog: Catalog, args: argparse.Namespace) -> Output:
    entry = catalog.get(args.name or catalog.default_name)
    if args.verify and is_here(entry, args.cache) and not verify(entry, args.cache):
        folder = model_folder(entry.name, args.cache)
        raise MerchantError(f"the weights in {str(folder)!r} were changed: delete the folder and fetch again")
    folder = fetch(entry, args.cache, kinds=args.source)
    return {"name": entry.name, "folder": str(folder), "licence": entry.licence}, str(folder)


COMMANDS = {"list": _list, "search": _search, "show": _show, "recommend": _recommend, "fetch": _fetch}


def _entry_json(catalog: Catalog, entry: Entry, cache: Path | None) -> dict[str, Any]:
    here = is_here(entry, cache)
    folder = str(model_folder(entry.name, cache)) if here else None
    return {**entry.to_json(), "default": entry.name == catalog.default_name, "here": here, "folder": folder}


def _recommendation_json(r: Recommendation) -> dict[str, Any]:
    return {
        "name": r.entry.name,
        "device": r.device,
        "fits": r.fits,
        "keeps_up": r.keeps_up,
        "needs_bytes": r.needs_bytes,
        "tokens_per_s": round(r.tokens_per_s, 1),
        "tokens_per_s_quoting": round(r.tokens_per_s_quoting, 1),
    }


def _speed(tokens_per_s: float) -> str:
    return f"~{tokens_per_s:.0f}" if tokens_per_s >= 10 else f"~{tokens_per_s:.1f}"


def _parameters(entry: Entry) -> str:
    billions = entry.parameters / 1e9
    return f"{billions:.1f}B" if billions >= 1 else f"{entry.parameters / 1e6:.0f}M"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return the rows with aligned columns; those in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
