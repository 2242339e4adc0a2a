"""importing/: `python -m retrieval import` merges a merchant's files into a store, all or nothing."""

from __future__ import annotations

import csv
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from retrieval.__main__ import main
from retrieval.load import load_store
from retrieval.passages import Passage
from tests.retrieval.import_files import paragraph, sheet_xml, with_parts, word_table, write_docx, write_pdf, write_xlsx

ROOT = Path(__file__).resolve().parents[2]
Import = Callable[..., dict[str, Any]]


@pytest.fixture
def run(store: Path, capsys: pytest.CaptureFixture[str]) -> Import:
    """Run the command in this process and return its JSON document."""

    def command(*arguments: str | Path, status: int = 0) -> dict[str, Any]:
        assert main(["import", *map(str, arguments), "--store", str(store), "--json"]) == status
        out, err = capsys.readouterr()
        assert bool(err) == bool(status)
        assert err.count("\n") <= 1  # one line where anything is wrong
        found: dict[str, Any] = json.loads(out)
        return found

    return command


def rows(store: Path, name: str = "faqs.csv") -> dict[str, dict[str, str]]:
    with (store / name).open(encoding="utf-8-sig", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def new(store: Path, name: str = "faqs.csv") -> list[dict[str, str]]:
    old = {"f-ship-zh", "f-ship-en", "f-return-zh", "f-return-en", "f-invoice-zh", "f-xmas-en"}
    return [row for row in rows(store, name).values() if row["id"] not in old]


def snapshot(store: Path) -> dict[str, bytes]:
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def passages(store: Path) -> dict[str, Passage]:
    return {passage.id: passage for passage in load_store(store)}


def problems(report: dict[str, Any]) -> list[str]:
    return [f"{fault['file']}, row {fault['row']}, {fault['field']}: {fault['problem']}" for fault in report["faults"]]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "问题,答案", "标准问,回复", "用户问题,客服回答", "知识标题,内容", "* 问题（必填）,答案 (必填)", "提问,解答", "问,答",
        "标准问题,标准答案", "Question,Answer", "Q,A", "Query,Response", "FAQ,Reply", "prompt,completion", "question , ANSWER",
        "标题,正文",
    ],
)  # fmt: skip
def test_questions_and_answers_are_known_by_what_merchants_call_them(
    run: Import, store: Path, tmp_path: Path, header: str
) -> None:
    run(write(tmp_path / "a.csv", f"{header}\n可以开专票吗,可以，下单时填写税号。\n"))
    (row,) = new(store)
    assert (row["question"], row["answer"], row["lang"]) == ("可以开专票吗", "可以，下单时填写税号。", "zh")


def test_languages_of_rows_are_detected_one_by_one(run: Import, store: Path, tmp_path: Path) -> None:
    run(write(tmp_path / "a.csv", "q,a\nDo you ship to Spain?,Yes.\n能寄到西班牙吗,可以。\n"))
    assert [row["lang"] for row in new(store)] == ["en", "zh"]


def test_two_languages_side_by_side_become_translations_of_each_other(run: Import, store: Path, tmp_path: Path) -> None:
    run(
        write(
            tmp_path / "a.csv",
            "中文问题,英文问题,中文答案,英文答案\n能自提吗,Can I collect it?,可以。,Yes.\n能加急吗,,不能。,\n",
        )
    )
    first, second, third = new(store)
    assert first["id"].removesuffix("-zh") == second["id"].removesuffix("-en")
    assert (first["answer"], second["answer"], third["answer"]) == ("可以。", "Yes.", "不能。")


@pytest.mark.parametrize("cell", ["能自提吗|可以自己来拿么", "能自提吗；可以自己来拿么", "能自提吗;可以自己来拿么",
                                  "能自提吗、可以自己来拿么", '"能自提吗\n可以自己来拿么"', '"1. 能自提吗\n2. 可以自己来拿么"'])  # fmt: skip
def test_similar_questions_in_one_cell_are_taken_apart(run: Import, store: Path, tmp_path: Path, cell: str) -> None:
    run(write(tmp_path / "a.csv", f"问题,相似问,答案\n到店取货,{cell},可以。\n"))
    assert new(store)[0]["questions"] == "能自提吗|可以自己来拿么"


def test_a_comma_of_a_list_inside_a_question_does_not_part_it(run: Import, store: Path, tmp_path: Path) -> None:
    run(write(tmp_path / "a.csv", "问题,相似问,答案\n退货,茶、咖啡和水果能退吗,不能。\n"))
    assert new(store)[0]["questions"] == "茶、咖啡和水果能退吗"


def test_similar_questions_in_columns_and_a_second_question_column_are_wordings(
    run: Import, store: Path, tmp_path: Path
) -> None:
    run(write(tmp_path / "a.csv", "标准问,用户问题,相似问1,相似问2,答案\n到店取货,能自提吗,能来拿吗,,可以。\n"))
    (row,) = new(store)
    assert row["question"] == "到店取货"
    assert set(row["questions"].split("|")) == {"能自提吗", "能来拿吗"}


@pytest.mark.parametrize(
    "text",
    [
        "问题,答案\n到店取货,可以。\n能自提吗,可以。\n能来拿吗,可以。\n",  # the same answer
        "编号,问题,答案\nz1,到店取货,可以。\nz1,能自提吗,\nz1,能来拿吗,\n",  # the same id
        "分类,问题,答案\n配送,到店取货,可以。\n,能自提吗,\n,能来拿吗,\n",  # the rest of the row is empty
        "问题,答案\n到店取货,可以。\n能自提吗,\n能来拿吗,\n",  # throughout the sheet
    ],
)
def test_rows_that_are_only_another_wording_join_their_entry(
    run: Import, store: Path, tmp_path: Path, text: str
) -> None:
    run(write(tmp_path / "a.csv", text))
    (row,) = new(store)
    assert (row["question"], row["questions"], row["answer"]) == ("到店取货", "能自提吗|能来拿吗", "可以。")


def test_a_lone_empty_answer_is_a_fault_unless_it_is_said_to_be_a_wording(
    run: Import, store: Path, tmp_path: Path
) -> None:
    answered = "".join(f"这是第{n}个问题吗,回答{n}\n" for n in range(6))
    sheet = write(tmp_path / "a.csv", f"问句,回复\n{answered}能自提吗,\n")
    (problem,) = problems(run(sheet, status=2))
    assert problem.startswith("a.csv, row 8, 回复: is empty; fill it in or remove the row")
    run(sheet, "--empty-answer", "wording")
    assert new(store)[-1]["questions"] == "能自提吗"


def test_when_no_column_fits_it_says_which_there_are_and_map_helps(run: Import, store: Path, tmp_path: Path) -> None:
    sheet = write(tmp_path / "a.csv", "咨询,应对\n能自提吗,可以。\n")
    (problem,) = problems(run(sheet, status=2))
    assert "A '咨询', B '应对'" in problem
    assert "--map question=COLUMN" in problem
    run(sheet, "--map", "question=咨询", "--map", "answer=B")
    assert new(store)[0]["question"] == "能自提吗"


def test_a_sheet_without_a_header_is_read_by_letters(run: Import, store: Path, tmp_path: Path) -> None:
    sheet = write(tmp_path / "a.csv", "能自提吗,可以。\n能加急吗,不能。\n")
    run(sheet, "--no-header", "--map", "question=A", "--map", "answer=2")
    assert [row["question"] for row in new(store)] == ["能自提吗", "能加急吗"]


def test_two_columns_that_could_be_the_answer_are_a_question(run: Import, store: Path, tmp_path: Path) -> None:
    sheet = write(tmp_path / "a.csv", "问题,答案,回复\n能自提吗,可以,好的\n")
    assert "'答案' and '回复' could both be the answer" in problems(run(sheet, status=2))[0]
    run(sheet, "--map", "answer=回复")
    assert new(store)[0]["answer"] == "好的"


def test_in_a_terminal_it_asks_for_the_columns(store: Path, tmp_path: Path) -> None:
    sheet = write(tmp_path / "a.csv", "咨询,应对\n能自提吗,可以。\n")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "retrieval", "import", str(sheet), "--store", str(store)],
        cwd=ROOT, stdin=follower, stderr=follower, stdout=subprocess.PIPE,
    )  # fmt: skip
    os.close(follower)
    os.write(leader, b"x\n1\n2\n")
    out, _ = process.communicate(timeout=50)
    asked = os.read(leader, 10_000).decode(errors="replace")
    os.close(leader)
    assert process.returncode == 0
    assert "which column is the question?" in asked
    assert "which column is the answer?" in asked
    assert "1 added" in out.decode()
    assert new(store)[0]["answer"] == "可以。"


def test_a_mistyped_end_date_is_not_passed_over(run: Import, tmp_path: Path) -> None:
    sheet = write(tmp_path / "a.csv", "question,answer,valid_untill\nDo you open?,Yes.,2026-12-01\n")
    assert "unknown column; is it a date?" in problems(run(sheet, status=2))[0]


# --- what Excel does --------------------------------------------------------------------------------------------------


def test_a_workbook_is_read_as_it_looks(run: Import, store: Path, tmp_path: Path) -> None:
    faq = write_xlsx(
        tmp_path / "faq.xlsx",
        {
            "说明": [["请按格式填写"], ["每行一个问题"]],
            "问答": [
                [],
                ["客服知识库 2026"],
                ["ID", "问题", "答案", "生效日期", "失效日期"],
                [12.0, "一共有多少家店", 12.0, datetime(2026, 11, 30, 18, 0), date(2026, 12, 31)],
                ["d-1", "会员几折", (0.7, "0%"), 46356, None],
                ["d-2", "单价多少", 129.9, None, None],
                ["d-3", "有货吗", True, None, None],
            ],
        },
    )
    report = run(faq)
    found = {row["question"]: row for row in new(store)}
    assert found["一共有多少家店"]["answer"] == "12"
    assert found["一共有多少家店"]["id"] == "faq-12"
    assert found["一共有多少家店"]["valid_from"] == "2026-11-30T18:00:00"
    assert found["一共有多少家店"]["valid_until"] == "2026-12-31"
    assert found["会员几折"]["answer"] == "70%"
    assert found["会员几折"]["valid_from"] == "2026-11-30"
    assert found["单价多少"]["answer"] == "129.9"
    assert any("说明 was left out" in note for note in report["notes"])


def test_hidden_sheets_are_left_out_and_named(run: Import, store: Path, tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["Q", "A"])
    book.active.append(["Open on Sunday?", "Yes."])
    hidden = book.create_sheet("old")
    hidden.append(["Q", "A"])
    hidden.append(["Open in 2019?", "No."])
    hidden.sheet_state = "hidden"
    book.save(tmp_path / "a.xlsx")
    report = run(tmp_path / "a.xlsx")
    assert [row["question"] for row in new(store)] == ["Open on Sunday?"]
    assert "a.xlsx!old is hidden" in report["notes"][0]
    run(tmp_path / "a.xlsx", "--sheet", "old")
    assert "Open in 2019?" in {row["question"] for row in new(store)}
    assert (
        "no sheet 'new'; there are 'Sheet', 'old'" in problems(run(tmp_path / "a.xlsx", "--sheet", "new", status=2))[0]
    )


def test_a_merged_answer_counts_for_all_its_rows(run: Import, store: Path, tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for row in (
        ["问题", "答案"],
        ["到店取货", "可以。"],
        ["能自提吗", None],
        ["能来拿吗", None],
        ["能加急吗", "不能。"],
    ):
        book.active.append(row)
    book.active.merge_cells("B2:B4")
    book.save(tmp_path / "a.xlsx")
    run(tmp_path / "a.xlsx")
    assert [(row["question"], row["questions"]) for row in new(store)] == [
        ("到店取货", "能自提吗|能来拿吗"),
        ("能加急吗", ""),
    ]


def test_formulas_give_their_saved_value_or_a_fault(run: Import, store: Path, tmp_path: Path) -> None:
    head = '<row r="1"><c r="A1" t="inlineStr"><is><t>问题</t></is></c><c r="B1" t="inlineStr"><is><t>答案</t></is></c></row>'
    asked = '<c r="A{0}" t="inlineStr"><is><t>现价多少{0}</t></is></c>'
    sheet = write_xlsx(tmp_path / "a.xlsx", {"S": [["x"]]})
    cached = f'{head}<row r="2">{asked.format(2)}<c r="B2"><f>100*0.7</f><v>70</v></c></row>'
    with_parts(sheet, {"xl/worksheets/sheet1.xml": sheet_xml(cached)})
    run(sheet)
    assert new(store)[0]["answer"] == "70"
    bare = f'{cached}<row r="3">{asked.format(3)}<c r="B3"><f>NOW()</f></c></row>'
    wrong = f'{bare}<row r="4">{asked.format(4)}<c r="B4" t="e"><v>#N/A</v></c></row>'
    with_parts(sheet, {"xl/worksheets/sheet1.xml": sheet_xml(wrong)})
    assert problems(run(sheet, status=2)) == [
        "a.xlsx!S, row 3, 答案: holds a formula without its result; open the file in Excel and save it, then import again",
        "a.xlsx!S, row 4, 答案: holds the error #N/A; correct the formula or write the text",
    ]


def test_text_that_looks_like_a_formula_stays_text(run: Import, store: Path, tmp_path: Path) -> None:
    run(write(tmp_path / "a.csv", "q,a\nWhat is 1+1?,=1+1\nIs it cold?,'-5 degrees\nAny news?,'Tis the season\n"))
    assert [row["answer"] for row in new(store)] == ["=1+1", "-5 degrees", "'Tis the season"]


# --- encodings and separators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "cp950"]
)
def test_encodings_of_chinese_files_are_told_apart(run: Import, store: Path, tmp_path: Path, encoding: str) -> None:
    question, answer = ("能自提吗？", "可以，到门店取货，请带身份证。")
    if encoding == "cp950":
        question, answer = ("可以自取嗎？", "可以，到門市取貨，請帶身分證件。")
    run(write(tmp_path / "a.csv", f"問題,答案\n{question},{answer}\n" if encoding == "cp950" else
              f"问题,答案\n{question},{answer}\n", encoding))  # fmt: skip
    assert (new(store)[0]["question"], new(store)[0]["answer"]) == (question, answer)


def test_curly_quotes_of_western_excel_do_not_become_chinese(run: Import, store: Path, tmp_path: Path) -> None:
    run(write(tmp_path / "a.csv", "question,answer\nDon’t you ship to cafés?,We do – for €5.\n", "cp1252"))
    assert (new(store)[0]["question"], new(store)[0]["answer"]) == ("Don’t you ship to cafés?", "We do – for €5.")


def test_utf8_with_broken_characters_is_refused_with_its_row(run: Import, tmp_path: Path) -> None:
    text = "问题,答案\n" + "".join(f"第{n}个问题是什么呢,这是第{n}个回答\n" for n in range(40))
    broken = text.encode()[:400] + b"\xff" + text.encode()[400:]
    (tmp_path / "a.csv").write_bytes(broken)
    (problem,) = problems(run(tmp_path / "a.csv", status=2))
    assert "is UTF-8 with damaged characters" in problem


@pytest.mark.parametrize(("name", "text"), [
    ("a.tsv", "question\tanswer\nCan I, too?\tYes, you can\n"), ("a.csv", "question;answer\nCan I, too?;Yes, you can\n"),
    ("a.csv", "question\tanswer\nCan I, too?\tYes, you can\n"), ("a.csv", "sep=;\nquestion;answer\nCan I, too?;Yes, you can\n"),
])  # fmt: skip
def test_separators_are_found(run: Import, store: Path, tmp_path: Path, name: str, text: str) -> None:
    run(write(tmp_path / name, text))
    assert (new(store)[0]["question"], new(store)[0]["answer"]) == ("Can I, too?", "Yes, you can")


def test_full_width_commas_separate_where_there_are_no_others(run: Import, store: Path, tmp_path: Path) -> None:
    run(write(tmp_path / "a.csv", "问题，答案\n能自提吗，可以。\n"))
    assert new(store)[0]["answer"] == "可以。"


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [
    [{"question": "能自提吗", "answer": "可以。", "questions": ["能来拿吗"]}],
    {"data": [{"标准问": "能自提吗", "回复": "可以。", "相似问": ["能来拿吗"]}]},
    {"questions": [{"q": "能自提吗", "a": "可以。", "variants": "能来拿吗"}], "version": 3},
])  # fmt: skip
def test_json_lists_are_read_under_any_name(run: Import, store: Path, tmp_path: Path, document: Any) -> None:
    run(write(tmp_path / "a.json", json.dumps(document, ensure_ascii=False)))
    (row,) = new(store)
    assert (row["question"], row["answer"], row["questions"]) == ("能自提吗", "可以。", "能来拿吗")


def test_jsonl_of_the_contract_keeps_ids_and_pages_go_to_knowledge(run: Import, store: Path, tmp_path: Path) -> None:
    lines = [
        {"id": "bulk", "question": "Do you sell to companies?", "answer": "Yes.", "questions": ["B2B"], "lang": "en"},
        {"id": "story", "title": "Our workshop", "text": "Since 1998 in Hangzhou."},
    ]
    sheet = write(tmp_path / "k.jsonl", "\n".join(json.dumps(line) for line in lines))
    report = run(sheet)
    assert {told["file"]: told["added"] for told in report["files"]} == {"faqs.csv": 1, "knowledge/k.jsonl": 1}
    found = passages(store)
    assert (found["bulk"].questions, found["story"].kind) == (("Do you sell to companies?", "B2B"), "page")
    assert not run(sheet)["imported"]


def test_json_faults_name_the_entry(run: Import, tmp_path: Path) -> None:
    entries = [
        {"question": "a", "answer": "b"},
        {"question": "c", "answer": {"text": "d"}},
        {"question": "", "answer": "e"},
    ]
    report = run(write(tmp_path / "a.json", json.dumps(entries)), status=2)
    assert problems(report) == [
        "a.json, row 2, answer: is an object or a list of objects; write a text, or a list of texts",
        "a.json, row 3, question: is empty; fill it in or remove the row",
    ]


# --- documents --------------------------------------------------------------------------------------------------------


def test_a_word_document_becomes_a_policy_with_its_headings_and_tables(
    run: Import, store: Path, tmp_path: Path
) -> None:
    body = (
        paragraph("退货政策", "1")
        + paragraph("退款时间", "2")
        + paragraph("三个工作日内退款。")
        + paragraph("运费", "2")
        + word_table([["省份", "首重"], ["广东", "8元"], ["北京", "12元"]])
    )
    run(write_docx(tmp_path / "退货.docx", body, {"1": "heading 1", "2": "heading 2"}))
    found = passages(store)
    assert found["退货#退款时间"].title == "退货政策 > 退款时间"
    assert found["退货#退款时间"].text == "三个工作日内退款。"
    assert found["退货#运费"].text == "- 省份：广东；首重：8元\n- 省份：北京；首重：12元"
    assert found["退货#运费"].source == "policies/退货.md#运费"


PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>Help</title><style>p{}</style></head><body>
<header><a href="/">Shop</a></header><nav><ul><li>Home</li></ul></nav><main><h1>Help</h1><p>We are <b>here</b>.</p>
<h2>Delivery</h2><p>Three days.</p><p style="display: none">secret</p><script>track("x")</script>
<ul><li>by post</li><li><p>by courier</p></li></ul>
<table><tr><th>Region</th><th>Fee</th></tr><tr><td rowspan="2">East</td><td>8</td></tr><tr><td>9</td></tr></table>
<details><summary>Can I collect it?</summary>Yes, from Monday.</details></main><footer>Imprint</footer></body></html>"""


def test_a_page_becomes_a_policy_without_its_navigation(run: Import, store: Path, tmp_path: Path) -> None:
    run(write(tmp_path / "help.html", PAGE))
    found = {key: passage.text for key, passage in passages(store).items() if key.startswith("help#")}
    assert found == {
        "help#top": "We are here.",
        "help#delivery": "Three days.\n\n- by post\n- by courier\n\n- Region: East; Fee: 8\n- Region: East; Fee: 9",
        "help#can-i-collect-it": "Yes, from Monday.",
    }


PDF = [
    [
        (72, 800, 9, "Qinghe Home handbook"), (72, 740, 20, "退货政策"), (72, 700, 12, "签收后七天内可以无理由退货，商品须完好，包装齐全，"),
        (72, 686, 12, "不影响二次销售。"), (72, 640, 15, "Refunds"), (72, 616, 12, "We refund within three working days after the par-"),
        (72, 602, 12, "cel has reached our warehouse in Hangzhou."), (290, 30, 9, "1"),
    ],
    [(72, 800, 9, "Qinghe Home handbook"), (72, 740, 12, "Cards take longer."), (290, 30, 9, "2")],
]  # fmt: skip


def test_a_pdf_becomes_a_policy_of_paragraphs_without_heads_and_feet(run: Import, store: Path, tmp_path: Path) -> None:
    run(write_pdf(tmp_path / "returns.pdf", PDF))
    found = {key: passage for key, passage in passages(store).items() if key.startswith("returns#")}
    assert found["returns#page-1"].text == "签收后七天内可以无理由退货，商品须完好，包装齐全，不影响二次销售。"
    refunds = found["returns#refunds"]
    assert refunds.title == "退货政策 > Refunds"
    assert "within three working days after the parcel has reached our warehouse in Hangzhou." in refunds.text
    assert "Cards take longer." in refunds.text
    assert "handbook" not in "".join(passage.text for passage in found.values())


def test_a_pdf_without_headings_is_cut_at_its_pages(run: Import, store: Path, tmp_path: Path) -> None:
    run(write_pdf(tmp_path / "note.pdf", [[(72, 700, 12, "We open at nine.")], [(72, 700, 12, "We close at six.")]]))
    found = {key: passage.text for key, passage in passages(store).items() if key.startswith("note#")}
    assert found == {"note#page-1": "We open at nine.", "note#page-2": "We close at six."}


def test_a_scan_is_refused_with_the_remedy(run: Import, tmp_path: Path) -> None:
    (problem,) = problems(run(write_pdf(tmp_path / "scan.pdf", [[], []]), status=2))
    assert problem.startswith("scan.pdf, row None, None: has no text: scanned pages?")
    assert "ocrmypdf" in problem


def test_plain_text_and_markdown_become_policies(run: Import, store: Path, tmp_path: Path) -> None:
    text = "会员说明\n========\n\n一、积分\n\n每消费1元积1分。\n\n二、等级\n\n● 银卡\n● 金卡\n"
    table = "# Fees\n\n| Region | Fee |\n|---|---:|\n| East | 8 |\n"
    run(write(tmp_path / "member.txt", text, "gbk"), write(tmp_path / "fees.md", table))
    found = passages(store)
    assert found["member#一-积分"].text == "每消费1元积1分。"
    assert found["member#二-等级"].text == "- 银卡\n- 金卡"
    assert found["fees#top"].text == "- Region: East; Fee: 8"
    assert (store / "policies" / "fees.md").read_text("utf-8") == table


def test_a_policy_made_by_an_import_is_updated_unless_it_was_edited(run: Import, store: Path, tmp_path: Path) -> None:
    page = write(tmp_path / "help.html", PAGE)
    run(page)
    assert not run(page)["imported"]
    (told,) = run(write(page, PAGE.replace("Three days", "Two days")))["files"]
    assert (told["added"], told["changed"], told["unchanged"]) == (0, 1, 2)
    policy = store / "policies" / "help.md"
    policy.write_text(policy.read_text("utf-8") + "\nMine.\n", "utf-8")
    assert "was edited by hand" in problems(run(page, status=2))[0]
    other = write(tmp_path / "returns.en.html", PAGE)
    assert "was not made from it" in problems(run(other, status=2))[0]


def test_a_document_of_questions_becomes_faqs_when_asked(run: Import, store: Path, tmp_path: Path) -> None:
    body = "".join(
        map(paragraph, ["问：能自提吗？", "答：可以。", "请带身份证。", "Q: Do you gift-wrap?", "A: Yes, for free."])
    )
    document = write_docx(tmp_path / "faq.docx", body)
    run(document, "--as", "faqs")
    assert [(row["question"], row["answer"]) for row in new(store)] == [
        ("能自提吗？", "可以。\n请带身份证。"),
        ("Do you gift-wrap?", "Yes, for free."),
    ]


# --- products and promotions ------------------------------------------------------------------------------------------


def test_products_and_promotions_go_to_their_files(run: Import, store: Path, tmp_path: Path) -> None:
    goods = write_xlsx(
        tmp_path / "shop.xlsx",
        {
            "商品": [
                ["货号", "商品名称", "售价", "库存数量", "商品描述"],
                ["T-100", "龙井茶", "¥129.00", 12.0, "明前茶"],
            ],
            "活动": [
                ["活动名称", "活动内容", "优惠码", "开始时间", "结束时间"],
                ["茶周：满200减30", "满200减30", "TEA30", date(2026, 11, 16), date(2026, 11, 30)],
            ],
        },
    )
    report = run(goods)
    assert {told["file"]: told["added"] for told in report["files"]} == {"products.csv": 1, "promotions.csv": 1}
    tea = passages(store)["T-100"]
    assert tea.text == "龙井茶。价格：¥129。明前茶。现货库存 12 件。"
    promotion = next(passage for passage in passages(store).values() if passage.title == "茶周：满200减30")
    assert "2026年11月16日至11月30日（含）" in promotion.text
    assert not run(goods)["imported"]


# --- merging ----------------------------------------------------------------------------------------------------------


def test_the_same_import_twice_changes_nothing(run: Import, store: Path, tmp_path: Path) -> None:
    sheet = write(tmp_path / "a.csv", "问题,相似问,答案\n到店取货,能自提吗;能来拿吗,可以。\n")
    assert run(sheet)["files"][0]["added"] == 1
    before = snapshot(store)
    report = run(sheet)
    assert (report["imported"], report["files"][0]["unchanged"]) == (False, 1)
    assert snapshot(store) == before


def test_the_same_question_is_the_same_entry_and_its_wordings_are_added(
    run: Import, store: Path, tmp_path: Path
) -> None:
    report = run(write(tmp_path / "a.csv", "问题,相似问,答案\n怎么退货,想退了|能退吗,签收后15天内可以退货。\n"))
    (example,) = report["files"][0]["examples"]
    assert (example["change"], example["id"], sorted(example["fields"])) == (
        "changed",
        "f-return-zh",
        ["answer", "questions"],
    )
    row = rows(store)["f-return-zh"]
    assert (row["question"], row["questions"]) == ("怎么退货？", "东西不想要了怎么退|能退吗|想退了")
    assert row["tags"] == "returns"


def test_rows_update_by_id_and_an_empty_cell_leaves_what_is_there(run: Import, store: Path, tmp_path: Path) -> None:
    run(write(tmp_path / "a.csv", "id,question,answer,tags\nf-ship-en,What does shipping cost?,It is free.,\n"))
    row = rows(store)["f-ship-en"]
    assert (row["question"], row["answer"], row["tags"]) == ("What does shipping cost?", "It is free.", "shipping")


def test_the_merchants_own_columns_order_and_untouched_rows_keep_their_bytes(
    run: Import, store: Path, tmp_path: Path
) -> None:
    own = '备注;id;answer;question\r\nx;a-1;"Yes; daily";Open?\r\n\r\n  keep ;a-2;No;Closed?\r\n'
    write(store / "faqs.csv", own, "gb18030")
    run(write(tmp_path / "a.csv", "question,answer\n能自提吗,可以。\n"))
    text = (store / "faqs.csv").read_bytes().decode("gb18030")
    assert text.startswith('备注;id;answer;question;lang\r\nx;a-1;"Yes; daily";Open?\r\n\r\n  keep ;a-2;No;Closed?\r\n')
    assert text.endswith(";可以。;能自提吗;zh\r\n")
    assert len(passages(store)) > 2


def test_two_files_that_disagree_on_a_question_are_a_fault(run: Import, tmp_path: Path) -> None:
    one = write(tmp_path / "a.csv", "q,a\nOpen on Sunday?,Yes.\n")
    two = write(tmp_path / "b.csv", "q,a\nOpen on Sunday?,No.\n")
    assert problems(run(one, two, status=2)) == [
        "b.csv, row 2, q: stands in a.csv, row 2 too, and differs; keep one of them"
    ]


def test_an_id_of_another_file_of_the_store_is_a_fault(run: Import, store: Path, tmp_path: Path) -> None:
    before = snapshot(store)
    report = run(write(tmp_path / "a.csv", "id,question,answer\nQH1001-zh,有货吗,有\n"), status=2)
    assert "'QH1001-zh' is already used in" in problems(report)[0]
    assert snapshot(store) == before


# --- all or nothing ---------------------------------------------------------------------------------------------------


def test_every_wrong_row_of_every_file_is_named_and_nothing_is_imported(
    run: Import, store: Path, tmp_path: Path
) -> None:
    before = snapshot(store)
    sheet = write_xlsx(
        tmp_path / "faq.xlsx",
        {
            "FAQ": [
                ["编号", "问题", "答案", "开始日期"],
                ["a", "好吗", "好", None],
                ["b", None, "好", None],
                ["c", "有吗", "有", "明天"],
            ]
        },
    )
    good = write(tmp_path / "good.csv", "q,a\nOpen on Sunday?,Yes.\n")
    report = run(sheet, good, tmp_path / "none.csv", status=2)
    assert problems(report) == [
        "none.csv, row None, None: cannot be read (No such file or directory); check its name and permissions",
        "faq.xlsx!FAQ, row 3, 问题: is empty; fill it in or remove the row",
        "faq.xlsx!FAQ, row 4, 开始日期: '明天' is no date; write 2026-11-30 or 2026-11-30T18:00",
    ]
    assert report["files"][0]["refused"] == 2
    assert snapshot(store) == before


def test_dry_run_shows_what_would_change_and_writes_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(store)
    sheet = write(
        tmp_path / "a.csv",
        "问题,答案\n怎么退货？,十五天内可以。\n能自提吗,可以。\n怎么开发票？,签收24小时后自动开具电子发票。\n",
    )
    assert main(["import", str(sheet), "--store", str(store), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(
        "faqs.csv: 1 added, 1 changed, 1 unchanged\n  ~ f-return-zh  怎么退货？  [answer]  (a.csv:2)\n"
    )
    assert "Nothing was written" in out
    assert err == ""
    assert snapshot(store) == before


def test_the_list_of_faults_is_capped_and_says_how_many_more(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_ = "".join(f"a{n},,x\n" for n in range(80))
    sheet = write(tmp_path / "a.csv", f"id,question,answer\n{rows_}")
    assert main(["import", str(sheet), "--store", str(store)]) == 2
    out, err = capsys.readouterr()
    assert out.count("is empty; fill it in") == 50
    assert "and 30 more" in out
    assert err.startswith("nothing was imported: a.csv, row 2, question: is empty")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (("x.csv",), "--store"), (("x.csv", "--store", "/nowhere"), "/nowhere: no such folder"),
    (("x.csv", "--store", "{}", "--map", "colour=A"), "is not FIELD=COLUMN"), (("x.xls", "--store", "{}"), "save it as .xlsx"),
])  # fmt: skip
def test_bad_usage_is_one_line_and_status_2(
    store: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["import", *(argument.format(store) for argument in arguments)])
    except SystemExit as exc:
        status = int(str(exc.code))
    err = capsys.readouterr().err
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


# --- knowledge/ -------------------------------------------------------------------------------------------------------


def test_files_in_the_knowledge_folder_are_knowledge(store: Path, tmp_path: Path) -> None:
    folder = store / "knowledge"
    folder.mkdir()
    write_xlsx(folder / "客服.xlsx", {"Sheet1": [["问题", "答案"], ["能自提吗", "可以。"]]})
    write_pdf(folder / "returns.pdf", PDF)
    write_docx(folder / "care.docx", paragraph("Care", "h") + paragraph("Wash at 30 degrees."), {"h": "heading 1"})
    write(folder / "list.json", json.dumps([{"id": "j-1", "title": "About us", "text": "Since 1998."}]))
    write(folder / "~$客服.xlsx", "Excel's lock")
    found = {passage.id: passage for passage in load_store(store)}
    faq = next(passage for passage in found.values() if passage.title == "能自提吗")
    assert (faq.kind, faq.source, faq.approved) == ("faq", "knowledge/客服.xlsx!Sheet1:2", True)
    page = found["returns.pdf#refunds"]
    assert (page.kind, page.source, page.lang, page.approved) == ("page", "knowledge/returns.pdf#page-1", "en", False)
    assert found["returns.pdf#page-1"].lang == "zh"
    assert (found["care.docx#top"].text, found["j-1"].source) == ("Wash at 30 degrees.", "knowledge/list.json:1")


def test_import_as_knowledge_keeps_the_file_as_it_is(run: Import, store: Path, tmp_path: Path) -> None:
    pdf = write_pdf(tmp_path / "returns.pdf", PDF)
    run(pdf, "--as", "knowledge")
    assert (store / "knowledge" / "returns.pdf").read_bytes() == pdf.read_bytes()
    assert "returns.pdf#refunds" in passages(store)
