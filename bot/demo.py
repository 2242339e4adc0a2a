"""
The demo store's promotions: day offsets -> dates, so that some are on, some over and some to come on any day.

The folder `examples/demo` (in a wheel: `bot/demo_store`) holds promotions.rules.csv; promotions.csv is made
from it, in place where the folder can be written and else in a copy.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from datetime import date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

ZONE = ZoneInfo("Asia/Shanghai")  # the demo store's, see its store.toml
_COLUMNS = ("id", "title", "description", "code", "starts_at", "ends_at", "lang", "products", "conditions", "repeats")


def demo_store(copy_to: Path) -> Path:
    """Return the demo store's folder with promotions dated from today; copied to `copy_to` if it is read-only."""
    package = Path(__file__).resolve().parent
    folder = package.parent / "examples" / "demo"
    if not folder.is_dir():
        folder = package / "demo_store"
    if not os.access(folder, os.W_OK):
        shutil.copytree(folder, copy_to, dirs_exist_ok=True)
        folder = copy_to
    date_promotions(folder, datetime.now(ZONE).date())
    return folder


def date_promotions(folder: Path, today: date) -> bool:
    """
    Write `folder`/promotions.csv for `today` from promotions.rules.csv; return whether it changed.

    Starts are 00:00 of the first day, ends 00:00 after the last one, in the store's time zone. Written beside
    and renamed, so that a server that watches the folder never reads half a file.
    """
    with (folder / "promotions.rules.csv").open(encoding="utf-8", newline="") as file:
        rules = list(csv.DictReader(file))
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for rule in rules:
        start = today + timedelta(days=int(rule["start_offset_days"]))
        end = today + timedelta(days=int(rule["end_offset_days"]))
        writer.writerow({**rule, "starts_at": f"{start}T00:00:00", "ends_at": f"{end}T00:00:00"})
    target, text = folder / "promotions.csv", out.getvalue()
    if target.exists() and target.read_text(encoding="utf-8") == text:
        return False
    beside = target.with_name(f"promotions.csv.{os.getpid()}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(target)
    return True


if __name__ == "__main__":
    demo_store(Path("var/demo"))
