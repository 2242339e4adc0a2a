"""
What reading hostile and large files costs: seconds and memory of `python -m retrieval import`, its child included.

    .venv/bin/python bench/imports.py [--only NAME …]

Each case is one command on a fresh store. Memory is the most that the command and its child process held together
(resident, sampled every 5 ms), less what the same command holds for a sheet of one row (`base`).
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import openpyxl

ROOT = Path(__file__).resolve().parents[1]
_STRINGS = (
    b'<Override PartName="/xl/sharedStrings.xml" '
    b'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"/>'
)


def small(path: Path) -> Path:
    file = path / "small.csv"
    file.write_text("问题,答案\n怎么退货？,七天内可以退。\n", "utf-8")
    return file


def workbook(path: Path, name: str, parts: dict[str, Callable[[], Iterator[bytes]]]) -> Path:
    """A real workbook of one row with parts put in or replaced."""
    book = openpyxl.Workbook()
    book.active.append(["问题", "答案"])
    book.active.append(["怎么退货？", "七天内可以退。"])
    book.save(made := io.BytesIO())
    file = path / name
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            content = old.read(part)
            if part == "[Content_Types].xml" and "xl/sharedStrings.xml" in parts and b"sharedStrings" not in content:
                content = content.replace(b"</Types>", _STRINGS + b"</Types>")
            if part not in parts:
                new.writestr(part, content)
        for part, chunks in parts.items():
            with new.open(part, "w", force_zip64=True) as stream:
                for chunk in chunks():
                    stream.write(chunk)
    return file


def zip_bomb(path: Path) -> Path:
    """200 MB of one shared string, 200 KB packed."""

    def strings() -> Iterator[bytes]:
        yield b'<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><si><t>'
        for _ in range(200):
            yield b"A" * 10**6
        yield b"</t></si></sst>"

    return workbook(path, "bomb.xlsx", {"xl/sharedStrings.xml": strings})


def zip_bomb_lying(path: Path) -> Path:
    """The same, with sizes in its headers that say 1,000 bytes."""
    file = zip_bomb(path)
    raw = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        real = archive.getinfo("xl/sharedStrings.xml").file_size.to_bytes(4, "little")
    start = 0
    while (at := raw.find(real, start)) >= 0:
        raw[at : at + 4] = (1_000).to_bytes(4, "little")
        start = at + 4
    file.write_bytes(raw)
    return file


def many_cells(path: Path) -> Path:
    """55 MB of cells under every limit of sizes."""

    def sheet() -> Iterator[bytes]:
        yield b'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
        for row in range(1, 22_001):
            yield (
                f'<row r="{row}">'.encode()
                + b"".join(
                    f'<c t="inlineStr"><is><t>{row * 7919 % 10**6 * column}</t></is></c>'.encode()
                    for column in range(1, 40)
                )
                + b"</row>"
            )
        yield b"</sheetData></worksheet>"

    return workbook(path, "wide.xlsx", {"xl/worksheets/sheet1.xml": sheet})


def one_string_a_million_times(path: Path) -> Path:
    """A shared string of 30,000 characters in 100,000 cells: 3 GB as text."""

    def strings() -> Iterator[bytes]:
        yield b'<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><si><t>' + b"B" * 30_000
        yield b"</t></si></sst>"

    def sheet() -> Iterator[bytes]:
        yield b'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
        for row in range(1, 100_001):
            yield f'<row r="{row}"><c r="A{row}" t="s"><v>0</v></c></row>'.encode()
        yield b"</sheetData></worksheet>"

    return workbook(path, "copies.xlsx", {"xl/sharedStrings.xml": strings, "xl/worksheets/sheet1.xml": sheet})


def billion_laughs(path: Path) -> Path:
    entities = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    text = f'<?xml version="1.0"?><!DOCTYPE sst [<!ENTITY l0 "lol">{entities}]><sst><si><t>&l9;</t></si></sst>'
    return workbook(path, "laughs.xlsx", {"xl/sharedStrings.xml": lambda: iter([text.encode()])})


def million_columns(path: Path) -> Path:
    file = path / "columns.csv"
    file.write_text(",".join(f"column{n}" for n in range(10**6)) + "\n" + "x," * 10**6 + "\n", "utf-8")
    return file


def million_columns_late(path: Path) -> Path:
    """A good sheet whose last row has a million cells, each with a line break in quotes."""
    file = path / "late.csv"
    rows = "".join(f"question {n},answer {n}\n" for n in range(5_000))
    file.write_text("question,answer\n" + rows + '"a\nb",' * 10**6 + "\n", "utf-8")
    return file


def cut_off(path: Path) -> Path:
    file = large_xlsx(path, 20_000)
    file.write_bytes(file.read_bytes()[:-100])
    return file


def deep_html(path: Path) -> Path:
    file = path / "deep.html"
    file.write_text("<div>" * 10**6 + "x", "utf-8")
    return file


def deep_json(path: Path) -> Path:
    file = path / "deep.json"
    file.write_text("[" * 10**6, "utf-8")
    return file


def many_objects(path: Path) -> Path:
    """15 MiB of JSON that would be a gigabyte of objects."""
    file = path / "objects.json"
    file.write_text('[{"question": "q", "answer": [' + "{},[]," * 2_600_000 + "0]}]", "utf-8")
    return file


def large_csv(path: Path) -> Path:
    """50 MB, 250,000 entries."""
    file = path / "large.csv"
    with file.open("w", encoding="utf-8") as out:
        out.write("问题,答案\n")
        for n in range(250_000):
            out.write(
                f"第{n}号商品的运费是多少，几天能到？,第{n}号商品从{n % 89}号仓发货，运费{n % 30}元，"
                + "一般三天内送到。" * 5
                + "\n"
            )
    return file


def large_xlsx(path: Path, n_rows: int = 100_000) -> Path:
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("FAQ")
    sheet.append(["编号", "问题", "相似问", "答案", "价格"])
    for n in range(n_rows):
        sheet.append([f"A{n}", f"第{n}号商品的运费是多少？", f"{n}号邮费", f"运费{n % 30}元，一般三天内送到。", n / 7])
    file = path / "large.xlsx"
    book.save(file)
    return file


CASES: dict[str, Callable[[Path], Path]] = {
    "base: a sheet of one row": small,
    "zip bomb, 200 MB": zip_bomb,
    "zip bomb, 200 MB, lying about it": zip_bomb_lying,
    "XLSX, 55 MB of cells, no question": many_cells,
    "one string in 100,000 cells": one_string_a_million_times,
    "billion laughs": billion_laughs,
    "CSV, 10^6 columns": million_columns,
    "CSV, 10^6 columns in the last row": million_columns_late,
    "XLSX cut off": cut_off,
    "HTML, 10^6 deep": deep_html,
    "JSON, 10^6 deep": deep_json,
    "JSON, 5 million objects": many_objects,
    "CSV, 50 MB": large_csv,
    "XLSX, 10^5 rows": large_xlsx,
}


def resident(pid: int) -> int:
    """Return the resident bytes of a process and its children."""
    total = 0
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += resident(int(child))
    except (OSError, ValueError, IndexError):
        pass
    return total


def measure(file: Path, store: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "retrieval", "import", str(file), "--store", str(store), "--dry-run"]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.005)
        wall_s = time.monotonic() - began
        err.seek(0)
        said = err.read().strip()
        out.seek(0)
        first = out.read().split("\n")[0]
    return {"status": process.returncode, "wall_s": round(wall_s, 2), "peak_mb": peak / 1e6, "said": said or first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(CASES), metavar="NAME")
    options = parser.parse_args()
    base = 0.0
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        store.mkdir()
        (store / "store.toml").write_text('name = "Bench"\n', "utf-8")
        for name in dict.fromkeys([next(iter(CASES)), *options.only]):
            here = Path(folder) / str(len(results))
            here.mkdir()
            file = CASES[name](here)
            found = measure(file, store)
            base = base or float(str(found["peak_mb"]))
            found["over_base_mb"] = round(float(str(found["peak_mb"])) - base)
            found["file_mb"] = round(file.stat().st_size / 1e6, 1)
            found["peak_mb"] = round(float(str(found["peak_mb"])))
            results[name] = found
            file.unlink()
            costs = f"{found['wall_s']:6} s  +{found['over_base_mb']:4} MB"
            print(f"{name:36} status {found['status']}  {costs}  {found['said']}"[:230], file=sys.stderr)
    print(json.dumps(results, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
