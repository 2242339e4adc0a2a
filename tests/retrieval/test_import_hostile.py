"""importing/: bombs, damaged files and crashes; a file is read or refused in one line, and the store is whole."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieval.__main__ import main
from retrieval.errors import BadStore
from retrieval.importing import command, files
from retrieval.load import content_hash, load_store
from retrieval.retriever import LiveRetriever
from tests.retrieval.import_files import paragraph, sheet_xml, with_parts, write_docx, write_pdf, write_xlsx

ROOT = Path(__file__).resolve().parents[2]
Refuse = Callable[..., str]
_STRINGS = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refuse(store: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Import a file that must be refused; return the line on stderr."""

    def check(file: Path, *arguments: str) -> str:
        before = snapshot(store)
        assert main(["import", str(file), "--store", str(store), *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert snapshot(store) == before
        return err

    return check


def workbook(path: Path) -> Path:
    return write_xlsx(path, {"FAQ": [["问题", "答案"], ["能自提吗", "可以。"], ["能加急吗", "不能。"]]})


def document(path: Path) -> Path:
    return write_docx(path, paragraph("退货") + paragraph("七天内可以退货。"))


def pdf(path: Path) -> Path:
    return write_pdf(path, [[(72, 740, 20, "Returns"), (72, 700, 12, "You can return it within seven days.")]])


# --- bombs ------------------------------------------------------------------------------------------------------------


def bomb(path: Path, n_bytes: int) -> Path:
    """Put `n_bytes` of one letter into a workbook, in one part."""
    workbook(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("xl/bomb.xml", "w") as part:
        for _ in range(n_bytes // 10**6):
            part.write(b"A" * 10**6)
    return path


def test_a_zip_bomb_of_200_mb_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    assert "unpacks to 191 MiB, more than 128" in refuse(bomb(tmp_path / "bomb.xlsx", 200 * 10**6))


def test_a_smaller_bomb_is_known_by_its_ratio(refuse: Refuse, tmp_path: Path) -> None:
    assert "times its size: a bomb" in refuse(bomb(tmp_path / "bomb.xlsx", 20 * 10**6))


def test_a_zip_that_lies_about_its_sizes_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    file = bomb(tmp_path / "bomb.xlsx", 20 * 10**6)
    raw = file.read_bytes().replace((20 * 10**6).to_bytes(4, "little"), (900).to_bytes(4, "little"))
    file.write_bytes(raw)
    assert "bomb.xlsx: is damaged, cut off or no XLSX file" in refuse(file)


def test_archives_in_archives_are_not_opened(refuse: Refuse, tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/workbook.xml", b"A" * 10**7)
    with zipfile.ZipFile(tmp_path / "nested.xlsx", "w") as outer:
        outer.writestr("inner.xlsx", inner.getvalue())
    assert "is no XLSX file (xl/workbook.xml is not in it)" in refuse(tmp_path / "nested.xlsx")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entity_expansion_is_refused_in_any_part(refuse: Refuse, tmp_path: Path, encoding: str) -> None:
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    text = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE s [<!ENTITY l0 "lol">{laughs}]><s>&l9;</s>'
    sheet = with_parts(workbook(tmp_path / "a.xlsx"), {"xl/worksheets/sheet1.xml": text.encode(encoding)})
    assert "declares a document type" in refuse(sheet)
    word = with_parts(document(tmp_path / "a.docx"), {"word/document.xml": text.encode(encoding)})
    assert "declares a document type" in refuse(word)


def test_one_long_string_in_every_row_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + n * 7919 % 20_000) for n in range(30_000))
    file = with_parts(
        workbook(tmp_path / "a.xlsx"),
        {
            "xl/sharedStrings.xml": f'<sst xmlns="{_STRINGS}"><si><t>{text}</t></si></sst>'.encode(),
            "xl/worksheets/sheet1.xml": sheet_xml(
                "".join(f'<row r="{n}"><c r="A{n}" t="s"><v>0</v></c></row>' for n in range(1, 3_000))
            ),
        },
    )
    types = zipfile.ZipFile(file).read("[Content_Types].xml")
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    if b"sharedStrings" not in types:
        types = types.replace(
            b"</Types>", f'<Override PartName="/xl/sharedStrings.xml" ContentType="{kind}"/></Types>'.encode()
        )
        with_parts(file, {"[Content_Types].xml": types})
    assert "million characters; split it" in refuse(file)


def test_a_row_a_billion_down_and_a_column_past_the_last_are_refused(refuse: Refuse, tmp_path: Path) -> None:
    far = '<row r="1000000000"><c r="A1000000000"><v>1</v></c></row>'
    file = with_parts(workbook(tmp_path / "a.xlsx"), {"xl/worksheets/sheet1.xml": sheet_xml(far)})
    assert "more rows than Excel has" in refuse(file)
    wide = '<row r="1"><c r="ZZZ1"><v>1</v></c></row>'
    file = with_parts(workbook(tmp_path / "b.xlsx"), {"xl/worksheets/sheet1.xml": sheet_xml(wide)})
    assert "row 1: 18,278 columns, more than 1,000" in refuse(file)


def test_csv_with_a_million_columns_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(f"c{n}" for n in range(10**6)), "utf-8")
    assert "columns, more than 1,000" in refuse(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("q,a\nOpen?,Yes\n" + '"x\ny",' * 10**5 + "\n", "utf-8")
    assert "b.csv, row 3: at least 20,002 columns" in refuse(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text('q,a\n"' + "never closed\n" * 10**5, "utf-8")
    assert "c.csv, row 2: a cell has more than 100,000 characters" in refuse(tmp_path / "c.csv")


def test_the_stores_own_csv_with_a_million_columns_is_a_fault(store: Path) -> None:
    (store / "faqs.csv").write_text("id,question,answer\na,b,c\n" + "," * 10**6, "utf-8")
    with pytest.raises(BadStore, match=r"faqs\.csv, row 3: at least 1,000,001 columns, more than 1,000"):
        load_store(store)


def test_deep_nesting_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<div>" * 10**5 + "x", "utf-8")
    assert "is nested too deeply" in refuse(tmp_path / "a.html")
    (tmp_path / "a.json").write_text("[" * 10**6, "utf-8")
    assert "line 1: nested more than 8 deep" in refuse(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text('{"a":' * 10**5, "utf-8")
    assert "a.jsonl, row 1: not JSON" in refuse(tmp_path / "a.jsonl")
    deep = f"{'<w:sdt><w:sdtContent>' * 20_000}{paragraph('x')}{'</w:sdtContent></w:sdt>' * 20_000}"
    assert "a.docx: " in refuse(write_docx(tmp_path / "a.docx", deep))


def test_json_that_would_be_a_gigabyte_of_objects_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"q": "x", "a": [' + "{},[]," * 1_300_000 + "0]}]", "utf-8")
    assert "more than 1,000,000 lists and objects" in refuse(tmp_path / "a.json")


def test_spans_of_a_table_are_bounded(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = '<td colspan="999999999" rowspan="99999">x</td>' * 5
    (tmp_path / "a.html").write_text(f"<h1>T</h1><table>{f'<tr>{cells}</tr>' * 50}</table>", "utf-8")
    assert main(["import", str(tmp_path / "a.html"), "--store", str(store)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_pdf_that_unpacks_without_end_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    drawn = zlib.compress(zlib.compress(b"BT /F1 12 Tf (aaaaaaaaaa) Tj ET " * 10**7, 1), 9)
    body = b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>\nendobj\n"
    body += b"2 0 obj\n<< /Type /Pages /Kids [3 0 R] /Count 1 >>\nendobj\n"
    body += b"3 0 obj\n<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R >>\nendobj\n"
    body += b"4 0 obj\n<< /Filter [/FlateDecode /FlateDecode] /Length %d >>\nstream\n" % len(drawn)
    (tmp_path / "a.pdf").write_bytes(body + drawn + b"\nendstream\nendobj\ntrailer << /Root 1 0 R >>\n%%EOF")
    assert "a.pdf: " in refuse(tmp_path / "a.pdf")


def test_a_pdf_whose_pages_lead_back_to_themselves_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    body = "%PDF-1.4\n1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>\nendobj\n"
    body += "2 0 obj\n<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 99999999 >>\nendobj\ntrailer << /Root 1 0 R >>\n%%EOF"
    (tmp_path / "a.pdf").write_text(body, "latin-1")
    assert "a.pdf: " in refuse(tmp_path / "a.pdf")


# --- wrong files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.xlsx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "is protected by a password or of an old Excel"),
    ("a.docx", b"PK\x03\x04" + bytes(99), "is damaged, cut off or no DOCX file"),
    ("a.pdf", b"hello", "is damaged, cut off or no PDF file"),
    ("a.csv", b"PK\x03\x04" + bytes(99), "is an Office file or a ZIP archive under a wrong name"),
    ("a.csv", b"q,a\n\x00\x01\x02\xff\xfe\x00", "holds a NUL byte"),
    ("a.csv", b"q,a\n\xff\xff\x81,\x8d\n", "is neither UTF-8 nor GB18030"),
    ("a.csv", "问题,答案\n好,好".encode("utf-16")[:-1], "begins as UTF-16 and is not"),
    ("a.csv", b"", "is empty"), ("a.csv", b"q,a\n", "has a header and no rows under it"), ("a.txt", b" \n", "is empty"),
    ("a.json", b"[]", "holds no entries"), ("a.json", b'{"a": 1', "not JSON"), ("a.html", b"<p></p>", "holds no text"),
    ("a.ppt", b"x", "save it as PDF"), ("a.md", b"", "is empty"),
])  # fmt: skip
def test_what_cannot_be_read_says_why_and_what_to_do(
    refuse: Refuse, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{name}" in refuse(tmp_path / name)
    assert message in refuse(tmp_path / name)


MAKERS: dict[str, Callable[[Path], Path]] = {"a.xlsx": workbook, "a.docx": document, "a.pdf": pdf}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_read_or_refused_and_the_store_is_whole(
    store: Path, tmp_path: Path, name: str, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(f"{name}{seed}")
    file = MAKERS[name](tmp_path / name)
    file.write_bytes(damaged(file.read_bytes(), chance))
    check_outcome(store, file, capsys)


@pytest.mark.parametrize("form", ["csv", "tsv", "json", "jsonl", "html", "md"])
def test_damaged_text_is_read_or_refused_and_the_store_is_whole(
    store: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(form)
    entries = [{"问题": f"第{n}个问题", "答案": f"回答{n}，“好”。", "相似问": ["甲", "乙"]} for n in range(9)]
    text = {
        "csv": "问题,答案\n" + "".join(f'"第{n}个问题","回答{n}，“好”"\n' for n in range(9)),
        "tsv": "问题\t答案\n" + "".join(f"第{n}个问题\t回答{n}\n" for n in range(9)),
        "json": json.dumps(entries, ensure_ascii=False),
        "jsonl": "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries),
        "html": "<h1>退货</h1><table><tr><th>a</th><td>b</td></tr></table><p>七天内可以退货。</p>",
        "md": "# 退货\n\n| a | b |\n|---|---|\n| c | d |\n\n## 运费\n八元。\n",
    }[form]
    for turn in range(4 if form in ("json", "html") else 25):
        file = tmp_path / f"{turn}.{form}"
        file.write_bytes(damaged(text.encode(chance.choice(["utf-8", "gb18030", "utf-16"])), chance))
        check_outcome(store, file, capsys)


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """Cut off, turn bits over, or fill a stretch with noise."""
    how = chance.randrange(3)
    if how == 0:
        return raw[: chance.randrange(1, len(raw))]
    changed = bytearray(raw)
    for _ in range(chance.choice([1, 3, 30])):
        changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    if how == 2:
        start = chance.randrange(len(raw))
        changed[start : start + 40] = chance.randbytes(40)
    return bytes(changed)


def check_outcome(store: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(store)
    status = main(["import", str(file), "--store", str(store)])
    err = capsys.readouterr().err
    assert (status, err.count("\n")) in ((0, 0), (2, 1)), err
    if status:
        assert snapshot(store) == before
    else:
        load_store(store)
    assert not (store / ".import").exists()


# --- the swap ---------------------------------------------------------------------------------------------------------


def two_files(folder: Path) -> list[str]:
    goods = write_xlsx(folder / "goods.xlsx", {
        "FAQ": [["问题", "答案"], ["龙井多少钱", "129元。"]], "商品": [["货号", "商品名称", "售价"], ["T-100", "龙井茶", 129]],
    })  # fmt: skip
    return [str(goods)]


@pytest.mark.parametrize("n_calls", [1, 2, 3])
def test_after_a_kill_in_the_middle_of_the_swap_the_state_is_old_or_new(
    store: Path, tmp_path: Path, n_calls: int
) -> None:
    """Renames: 1 puts the journal in place, 2 and 3 the files; SIGKILL comes instead of the n-th."""
    old = content_hash(load_store(store))
    arguments = [*two_files(tmp_path), "--store", str(store)]
    code = f"""
import argparse, os, signal, sys
from pathlib import Path
from retrieval.importing.command import add_parser
parser = argparse.ArgumentParser()
add_parser(parser.add_subparsers())
real, calls = Path.replace, []
def replace(self, target):
    calls.append(target)
    if len(calls) == {n_calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.replace = replace
options = parser.parse_args(["import", *sys.argv[1:]])
options.run(options)
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, timeout=50)
    assert done.returncode == -signal.SIGKILL, done.stderr
    seen = content_hash(load_store(store))
    assert (seen == old) == (n_calls == 1)
    assert (store / ".import").exists()
    # The next import completes what was cut off, or clears it away, and does its own.
    assert main(["import", *arguments]) == 0
    assert not (store / ".import").exists()
    after = content_hash(load_store(store))
    assert after != old
    assert n_calls == 1 or after == seen


def test_an_edit_by_hand_after_a_crash_counts(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "finish", lambda folder: None)
    assert main(["import", *two_files(tmp_path), "--store", str(store)]) == 0
    assert "129元。" in {passage.text for passage in load_store(store)}
    edited = (store / "faqs.csv").read_text("utf-8") + "mine,Mine?,Yes.,en,,,,\n"
    (store / "faqs.csv").write_text(edited, "utf-8")
    monkeypatch.undo()
    assert "mine" in {passage.id for passage in load_store(store)}
    with files.importing(store):
        pass
    assert (store / "faqs.csv").read_text("utf-8") == edited
    assert "T-100" in {passage.id for passage in load_store(store)}


def test_readers_see_the_old_or_the_new_state_while_files_are_swapped(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = content_hash(load_store(store))
    real = Path.replace

    def slow(self: Path, target: Path) -> Path:
        time.sleep(0.1)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    arguments = ["import", *two_files(tmp_path), "--store", str(store)]
    importing = threading.Thread(target=main, args=(arguments,))
    importing.start()
    seen = set()
    while importing.is_alive():
        seen.add(content_hash(load_store(store)))
    importing.join()
    new = content_hash(load_store(store))
    assert old in seen
    assert seen <= {old, new}


def test_an_edit_made_meanwhile_is_not_lost(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = command._check

    def check(*arguments: object) -> None:
        (store / "faqs.csv").write_text("id,question,answer\nmine,Mine?,Yes.\n", "utf-8")
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "_check", check)
    assert main(["import", *two_files(tmp_path), "--store", str(store)]) == 2
    assert (store / "faqs.csv").read_text("utf-8") == "id,question,answer\nmine,Mine?,Yes.\n"
    assert "T-100" not in (store / "products.csv").read_text("utf-8")
    assert not (store / ".import").exists()


def test_two_imports_at_once_do_not_mix(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files.importing(store):
        assert main(["import", *two_files(tmp_path), "--store", str(store)]) == 2
    assert "another import into this store is at work" in capsys.readouterr().err


def test_a_running_retriever_takes_an_import_up(store: Path, tmp_path: Path, hashing: object) -> None:
    retriever = LiveRetriever(store, hashing, tmp_path / "cache")  # type: ignore[arg-type]
    try:
        before = retriever.version
        retriever.start()
        (store / "knowledge").mkdir()
        pdf(store / "knowledge" / "returns.pdf")
        deadline = time.monotonic() + 30
        while retriever.version == before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert retriever.get("returns.pdf#page-1") is not None
        (store / "knowledge" / "broken.xlsx").write_bytes(b"PK\x03\x04")
        while not retriever.status().faults and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "knowledge/broken.xlsx: is damaged" in str(retriever.status().faults[0])
        assert retriever.get("returns.pdf#page-1") is not None
    finally:
        retriever.close()
