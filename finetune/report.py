"""The report of an import as Markdown, for people. Knows the JSON it is made from, nothing else."""

from __future__ import annotations

from typing import Any


def render_report(report: dict[str, Any]) -> str:
    """Return report.md for a report.json."""
    kept = sum(s["n_dialogues"] for s in report["splits"].values())
    lines = ["# Import report", ""]
    lines += [f"{report['n_read']} dialogues read, {kept} kept, {report['n_faults']} faults.", ""]
    lines += ["| split | dialogues | languages | from | to |", "|---|---|---|---|---|"]
    for name, split in report["splits"].items():
        languages = ", ".join(f"{lang} {n}" for lang, n in sorted(split["languages"].items()))
        lines.append(f"| {name} | {split['n_dialogues']} | {languages} | {split['from'] or ''} | {split['to'] or ''} |")
    lines += ["", "| length | p10 | p50 | p90 | p99 | max |", "|---|---|---|---|---|---|"]
    for name, q in report["lengths"].items():
        lines.append(
            f"| {name.replace('_', ' ')} | "
            + " | ".join(str(q.get(k, "")) for k in ("p10", "p50", "p90", "p99", "max"))
            + " |"
        )
    for title, key in (
        ("Dropped, and why", "dropped"),
        ("Kept as context, not learned", "not_learned"),
        ("Masked", "masked"),
        ("Ratings", "ratings"),
    ):
        lines += ["", f"## {title}", ""]
        lines += [f"- {name}: {n}" for name, n in report[key].items()] or ["- nothing"]
    if report["augmented"]:
        lines += ["", f"Augmented dialogues added to the training side: {report['augmented']}."]
    lines += ["", "## Replies said most often (macros)", ""]
    lines += [f"- {m['n']} times: {m['text']}" for m in report["macros"]] or ["- none"]
    if report["faults"]:
        lines += ["", "## Faults", ""]
        lines += [f"- {f['source']}, {f['field']}: {f['problem']}; {f['remedy']}" for f in report["faults"]]
    return "\n".join(lines) + "\n"
