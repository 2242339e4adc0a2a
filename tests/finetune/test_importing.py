"""`python -m finetune import`, through the command: every format in, whole or nothing out."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from finetune.__main__ import main
from finetune.duplicates import likeness, signature
from tests.finetune.planted import held_out, planted

ROOT = Path(__file__).parents[2]
GOODS = ("lamp", "quilt", "kettle", "shelf", "towel", "knife", "rug", "mirror", "basket", "pan")
PLACES = ("Wuhan", "Lhasa", "Paris", "Suzhou", "Harbin", "Xining", "Dublin", "Wuxi", "Kashgar", "Turin")


def messages(n: int) -> list[dict[str, str]]:
    """A dialogue unlike the others."""
    rng = random.Random(n)
    words = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(24))
    goods, place = rng.choice(GOODS), rng.choice(PLACES)
    return [
        {"role": "user", "content": f"Does the {goods} {words[:12]} ship to {place}, and when?"},
        {"role": "assistant", "content": f"The {goods} {words[12:]} ships to {place} within {rng.randint(2, 9)} days."},
    ]


def write_lines(path: Path, items: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return path


def run(*arguments: Any) -> int:
    return main(["import", *map(str, arguments)])


def read(out: Path, *splits: str) -> list[dict[str, Any]]:
    names = splits or ("train", "valid", "test")
    return [json.loads(line) for s in names for line in (out / f"{s}.jsonl").read_text(encoding="utf-8").splitlines()]


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


# --- Formats ---------------------------------------------------------------------------------------------------------

ALL_TRAIN = ("--valid", 0, "--test", 0)
ASKED, SAID = "How long does the walnut shelf take to Lhasa?", "The walnut shelf takes five to eight days to Lhasa."


@pytest.mark.parametrize(
    "item",
    [
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, {"role": "assistant", "content": SAID}]},
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]},
        {"instruction": ASKED, "input": "", "output": SAID},
        {"id": "x", "turns": [{"role": "customer", "text": ASKED}, {"role": "agent", "text": SAID}]},
        {"session": "x", "context": [], "questions": [ASKED], "answers": [[SAID, "Another."]]},
    ],
    ids=["openai", "openai-parts", "sharegpt", "alpaca", "jddc", "jddc-dev"],
)  # fmt: skip
@pytest.mark.parametrize("shape", ["lines", "array"])
def test_a_json_format_is_told_from_its_keys(tmp_path: Path, item: dict[str, Any], shape: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(item) + "\n" if shape == "lines" else json.dumps([item], indent=2), encoding="utf-8")
    assert run(path, "--out", tmp_path / "out", *ALL_TRAIN) == 0
    (dialogue,) = read(tmp_path / "out")
    assert dialogue["messages"] == [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]


ROWS = [
    ("s1", "2026-10-01 10:00:00", "买家", "书架到拉萨要几天"),
    ("s2", "2026-10-01 10:00:30", "买家", "毛巾能机洗吗"),
    ("s1", "2026-10-01 10:02:00", "客服", "拉萨要五到八天。"),
    ("s1", "2026-10-01 10:01:00", "买家", "急用"),
    ("s2", "2026-10-01 10:03:00", "客服", "可以，40℃以下。"),
]


def _csv(path: Path, header: str, encoding: str = "utf-8-sig") -> Path:
    path.write_text("\n".join([header, *(",".join(row) for row in ROWS)]) + "\n", encoding=encoding)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("header", ["会话ID,时间,角色,内容", "session_id,time,role,content"])
def test_a_log_is_grouped_by_session_and_ordered_by_time(tmp_path: Path, header: str, encoding: str) -> None:
    assert run(_csv(tmp_path / "log.csv", header, encoding), "--out", tmp_path / "out", *ALL_TRAIN) == 0
    first, second = read(tmp_path / "out")
    assert first["messages"][0]["content"] == "书架到拉萨要几天\n急用"
    assert first["messages"][1]["content"] == "拉萨要五到八天。"
    assert second["messages"][0]["content"] == "毛巾能机洗吗"


def test_columns_of_any_name_are_mapped(tmp_path: Path) -> None:
    path = _csv(tmp_path / "log.csv", "Nr,Wann,Wer,Was")
    columns = "session=Nr,time=Wann,role=Wer,text=Was"
    assert run(path, "--columns", columns, "--out", tmp_path / "out", *ALL_TRAIN) == 0
    assert len(read(tmp_path / "out")) == 2


def test_an_unknown_column_says_which_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(_csv(tmp_path / "log.csv", "Nr,Wann,Wer,Was"), "--out", tmp_path / "out") == 2
    assert "--columns session=NAME; there are Nr, Wann, Wer, Was" in capsys.readouterr().err


def test_a_workbook_reads_like_a_log(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.append(["会话编号", "发送时间", "发送方", "消息内容"])
    for row in ROWS:
        book.active.append(list(row))
    book.save(tmp_path / "log.xlsx")
    assert run(tmp_path / "log.xlsx", "--out", tmp_path / "out", *ALL_TRAIN) == 0
    assert {d["messages"][1]["content"] for d in read(tmp_path / "out")} == {"拉萨要五到八天。", "可以，40℃以下。"}


def test_the_jddc_log_with_agents_as_1_reads_too(tmp_path: Path) -> None:
    lines = [
        "session\tuser\twaiter_send\tis_transfer\tis_repeat\tsku\tcontent",
        "a\tu1\t0\t0\t0\t\t发什么快递呀",
        'a\tu1\t1\t0\t0\t\t默认"中通快递',
    ]
    (tmp_path / "chat.tsv").write_text("\n".join(lines), encoding="utf-8")
    assert run(tmp_path / "chat.tsv", "--out", tmp_path / "out", *ALL_TRAIN) == 0
    assert read(tmp_path / "out")[0]["messages"][1]["content"] == '默认"中通快递'


async def test_the_servers_own_conversations_come_with_their_ratings(tmp_path: Path) -> None:
    from bot.storage import Storage

    storage = Storage(tmp_path / "conversations.sqlite3")
    await storage.open()
    try:
        for value, question in (("up", "毛巾能机洗吗，多少度合适"), ("down", "书架到拉萨要几天能收到")):
            conversation, _ = await storage.create_conversation("zh-CN")
            await storage.append_ask(conversation, "a1", question)
            reply = await storage.append(
                conversation,
                "message",
                {"role": "bot", "turn": "a1", "text": f"关于{question}：可以的。", "finish": "stop"},
            )
            await storage.append(conversation, "rating", {"rated": reply.seq, "value": value})
        # Beside the running server, whose file is open and whose newest events are still in its write-ahead log.
        assert run(tmp_path / "conversations.sqlite3", "--out", tmp_path / "out", *ALL_TRAIN) == 0
    finally:
        await storage.close()
    (kept,) = read(tmp_path / "out")
    assert kept["messages"][1]["rating"] == "up"
    assert report_of(tmp_path / "out")["dropped"]["dialogue: no reply worth learning"] == 1


# --- Cleaning --------------------------------------------------------------------------------------------------------


def test_notices_halves_and_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    long = " ".join(f"word{n}" for n in range(60))
    items = [
        {"messages": messages(1)},
        {"messages": messages(1)},
        {"messages": [{"role": "user", "content": f"Is it true? {long}"}, {"role": "assistant", "content": "Yes, all of it."}]},
        {"messages": [{"role": "user", "content": f"Is it true! {long}."}, {"role": "assistant", "content": "Yes, all of it"}]},
        {"messages": [{"role": "user", "content": "hello? anybody?"}]},
        {"messages": [{"role": "user", "content": "Chat started"}, {"role": "user", "content": "[图片]"}, *messages(2)]},
        {"messages": [{"role": "assistant", "content": "Welcome!"}, *messages(3), {"role": "user", "content": "thanks"}]},
    ]  # fmt: skip
    assert run(write_lines(tmp_path / "d.jsonl", items), "--out", tmp_path / "out", *ALL_TRAIN) == 0
    dropped = report_of(tmp_path / "out")["dropped"]
    assert dropped["dialogue: exact duplicate"] == 2  # the fourth differs in punctuation alone
    assert dropped["dialogue: half (no question with a reply)"] == 1
    assert dropped["message: system notice or nothing to read"] == 2
    assert dropped["message: agent before any question"] == 1
    assert len(read(tmp_path / "out")) == 4
    assert all([m["role"] for m in d["messages"]] == ["user", "assistant"] for d in read(tmp_path / "out"))


def test_near_duplicates_are_one(tmp_path: Path) -> None:
    body = " ".join(messages(n)[0]["content"] for n in range(12))
    items = [
        {"messages": [{"role": "user", "content": body + end}, {"role": "assistant", "content": "We do that gladly."}]}
        for end in ("", " please", " thx")
    ]
    assert run(write_lines(tmp_path / "d.jsonl", items), "--out", tmp_path / "out", *ALL_TRAIN) == 0
    assert report_of(tmp_path / "out")["dropped"] == {"dialogue: near duplicate": 2}


def test_macros_are_context_after_three_times(tmp_path: Path) -> None:
    macro = [
        {"role": "user", "content": "ok thanks"},
        {"role": "assistant", "content": "Thank you for shopping with us, good bye!"},
    ]
    items = [{"messages": [*messages(n), *macro]} for n in range(20)]
    assert run(write_lines(tmp_path / "d.jsonl", items), "--out", tmp_path / "out", *ALL_TRAIN) == 0
    weights = [d["messages"][3].get("weight", 1) for d in read(tmp_path / "out")]
    assert weights.count(1) == 3
    assert weights.count(0) == 17
    assert report_of(tmp_path / "out")["macros"][0]["n"] == 20


def test_look_ups_are_learned_unless_told_otherwise(tmp_path: Path) -> None:
    item = {
        "messages": [
            *messages(1),
            {"role": "user", "content": "and mine?"},
            {"role": "assistant", "content": "I've checked, it left today."},
        ]
    }
    path = write_lines(tmp_path / "d.jsonl", [item])
    assert run(path, "--out", tmp_path / "a", *ALL_TRAIN) == 0
    assert run(path, "--out", tmp_path / "b", "--lookups", "context", *ALL_TRAIN) == 0
    assert "weight" not in read(tmp_path / "a")[0]["messages"][3]
    assert read(tmp_path / "b")[0]["messages"][3]["weight"] == 0


def test_questions_of_the_evaluation_are_left_out(tmp_path: Path) -> None:
    case = {"id": "c", "lang": "en", "turns": [messages(1)[0]["content"].upper()]}
    path = write_lines(tmp_path / "d.jsonl", [{"messages": messages(n)} for n in range(3)])
    cases = write_lines(tmp_path / "cases.jsonl", [case])
    assert run(path, "--exclude", cases, "--out", tmp_path / "out", *ALL_TRAIN) == 0
    assert len(read(tmp_path / "out")) == 2


def test_nothing_personal_reaches_the_folder(tmp_path: Path) -> None:
    plants = [p for p in planted(11, 150) + held_out(12, 150) if len(p.value) >= 6 and len(p.texts) == 1]
    items = [
        {"messages": [{"role": "user", "content": f"{p.texts[-1]}\n{messages(n)[0]['content']}"}, messages(n)[1]]}
        for n, p in enumerate(plants)
    ]
    assert run(write_lines(tmp_path / "d.jsonl", items), "--out", tmp_path / "out") == 0
    written = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "out").iterdir())
    # Dropped dialogues may show in the counts, never in the text.
    assert [p.value for p in plants if p.value in written] == []
    assert not (tmp_path / "out.partial").exists()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["masked"] is True


# --- Splits ----------------------------------------------------------------------------------------------------------


def test_sides_share_no_customer_no_likeness_and_no_time(tmp_path: Path) -> None:
    rng = random.Random(4)
    items = []
    for n in range(300):
        talk = messages(n)
        if n % 7 == 0:  # two thirds of an earlier one
            talk[0]["content"] = messages(n // 2)[0]["content"] + " " + messages(n // 2)[1]["content"] + f" {n}"
        day = f"2026-{rng.randint(1, 10):02}-{rng.randint(1, 28):02}T10:00:00+08:00"
        items.append({"messages": talk, "at": day, "customer": f"c{rng.randint(0, 120)}", "id": f"{n}"})
    assert run(write_lines(tmp_path / "d.jsonl", items), "--out", tmp_path / "out") == 0
    sides = {s: read(tmp_path / "out", s) for s in ("train", "valid", "test")}
    assert all(sides.values())
    groups = {s: {d["group"] for d in ds} for s, ds in sides.items()}
    assert not groups["train"] & groups["valid"]
    assert not (groups["train"] | groups["valid"]) & groups["test"]
    assert max(d["at"] for d in sides["train"]) <= min(d["at"] for d in sides["valid"])
    assert max(d["at"] for d in sides["valid"]) <= min(d["at"] for d in sides["test"])
    customer = {i["messages"][1]["content"]: i["customer"] for i in items}  # type: ignore[index]
    who = {s: {customer[d["messages"][1]["content"]] for d in ds} for s, ds in sides.items()}
    assert not who["train"] & who["valid"]
    assert not (who["train"] | who["valid"]) & who["test"]
    texts = {s: [signature("\n".join(m["content"] for m in d["messages"])) for d in ds] for s, ds in sides.items()}
    assert max(likeness(a, b) for a in texts["train"] for b in texts["test"]) < 0.7


def test_the_same_import_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"messages": messages(n)} for n in range(60)])
    for name in ("a", "b"):
        assert run(path, "--out", tmp_path / name, "--augment", "typos,noise,templates") == 0
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_augmentation_changes_questions_of_the_training_side_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"messages": messages(n)} for n in range(60)])
    assert run(path, "--out", tmp_path / "a") == 0
    assert run(path, "--out", tmp_path / "b", "--augment", "typos,noise,templates") == 0
    plain, more = read(tmp_path / "a", "train"), read(tmp_path / "b", "train")
    assert len(more) > 2 * len(plain)
    replies = {d["messages"][1]["content"] for d in plain}
    assert all(d["messages"][1]["content"] in replies for d in more)
    assert read(tmp_path / "a", "valid", "test") == read(tmp_path / "b", "valid", "test")


# --- Bad data --------------------------------------------------------------------------------------------------------

GOOD = json.dumps({"messages": messages(1)}).encode()


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (GOOD + b"\n" + GOOD[:-20], 2, "cut off in the middle"),
        (b'{"messages": [{"role": "boss", "content": "x"}]}\n', 1, "unknown role 'boss'"),
        (b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}\n', 1, "messages[1].content: empty"),
        (GOOD + b"\n" + b'{"messages": [{"role": "user", "content": "' + b"x" * 10_000_000 + b'"}]}\n' + GOOD + b"\n", 2, "MiB long"),
        (GOOD + b"\n\x00\x01\x02\xff\xfe binary\n", 2, "binary data"),
        (GOOD + b"\n" + '{"messages": "你好"}'.encode("gbk") + b"\n", 2, "not UTF-8"),
        (b'["not", "a", "dialogue"]\n', 1, "not a JSON object"),
        (b'{"question": "?", "answer": "!"}\n', 1, "none of messages"),
        (b'[{"messages": [', 1, "cut off"),
        (b"[" * 100_000, 1, "JSON"),
        (b"", 0, "nothing is left to train on"),
        ("\ufeff".encode("utf-16-le") + GOOD.decode().encode("utf-16-le"), 1, "UTF-16"),
    ],
    ids=["truncated", "role", "empty", "long", "binary", "encodings", "array", "unknown", "cut-array", "nested", "nothing", "utf16"],
)  # fmt: skip
def test_bad_data_is_reported_by_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, line: int, says: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert run(path, "--out", tmp_path / "out", "--json") == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    if line:
        assert f"bad.jsonl:{line}" in err
        assert json.loads(out)["n_faults"] >= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"session,role,text\ns1,boss,hello\n", 2, "unknown role 'boss'"),
        (b"session,role,text\n,user,hello\n", 2, "session: empty"),
        (b"session,time,role,text\ns1,soon,user,hello\n", 2, "is no time"),
        ("session,role,text\ns1,user,你好\n".encode() + "s1,agent,您好\n".encode("gbk"), 3, "not utf-8"),
        (b"\x89PNG\x00\x00\x01", 1, "binary"),
        (b"a,b\n1,2\n", 1, "no such column"),
        (b'session,role,text\ns1,user,"' + b"x" * 2_000_000 + b'"\n', 2, "1 MiB"),
    ],
    ids=["role", "session", "time", "encodings", "binary", "columns", "long"],
)
def test_bad_logs_are_reported_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, line: int, says: str
) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    assert run(tmp_path / "bad.csv", "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert says in err
    assert f"bad.csv:{line}" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_broken_workbook_and_a_missing_file_are_faults_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.xlsx").write_bytes(b"PK\x03\x04 no workbook")
    assert run(tmp_path / "bad.xlsx", tmp_path / "none.jsonl", "--out", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert "not an .xlsx workbook" in err
    assert "1 more fault" in err
    assert "none.jsonl, file: not found" in out


def test_with_skip_bad_the_rest_is_imported_and_the_faults_are_in_the_report(tmp_path: Path) -> None:
    lines = [json.dumps({"messages": messages(n)}) for n in range(5)]
    (tmp_path / "d.jsonl").write_text("\n".join([*lines[:2], "{broken", *lines[2:]]), encoding="utf-8")
    assert run(tmp_path / "d.jsonl", "--out", tmp_path / "out", "--skip-bad", *ALL_TRAIN) == 0
    report = report_of(tmp_path / "out")
    assert len(read(tmp_path / "out")) == 5
    assert report["n_faults"] == 1
    assert report["faults"][0]["source"].endswith("d.jsonl:3")


def test_an_existing_folder_is_never_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run(write_lines(tmp_path / "d.jsonl", [{"messages": messages(1)}]), "--out", tmp_path / "out") == 2
    assert "is there already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


# --- Killed and large ------------------------------------------------------------------------------------------------


def test_a_killed_import_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"messages": messages(n) + messages(n + 10_000)} for n in range(650)])
    command = [sys.executable, "-m", "finetune", "import", str(path), "--out", str(tmp_path / "a")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    stage = tmp_path / "a.partial" / "stage.sqlite3"
    deadline = time.monotonic() + 40
    n_before = 0
    while n_before < 500:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
        try:
            with sqlite3.connect(f"{stage.as_uri()}?mode=ro", uri=True) as db:
                row = db.execute("SELECT n FROM done WHERE stage = 'prepared'").fetchone()
            n_before = row[0] if row else 0
        except sqlite3.Error:
            pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a").exists()
    assert n_before < 650
    assert run(path, "--out", tmp_path / "a") == 0
    assert run(path, "--out", tmp_path / "b") == 0
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "report.json", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
