"""
Files of historical dialogues -> `Dialogue`s and `Fault`s, one after the other, whatever the size of the file.

Knows OpenAI `messages`, ShareGPT, Alpaca, the `zh_jddc` shape, logs in CSV, TSV and XLSX, and this server's own database.
Does not clean, mask or judge; a place that cannot be read becomes a Fault with its line, never an exception. Rows of a
log come as `Row`s, since those of one session need not stand together: whoever reads them groups them.
"""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from finetune.dialogues import Dialogue, Fault, Line, Speaker, parse_at

MAX_LINE_BYTES = 1 << 20  # a dialogue of a megabyte is no dialogue
FORMATS = ("auto", "openai", "sharegpt", "alpaca", "jddc", "csv", "xlsx", "server")


@dataclass(frozen=True, slots=True)
class Row:
    """One message of a log, still without its session's other messages."""

    source: str
    session: str
    role: Speaker
    text: str
    at: datetime | None
    customer: str | None


@dataclass(frozen=True)
class Mapping_:
    """How a log's columns and role names are to be read; what is empty is guessed from the usual names."""

    columns: Mapping[str, str] = field(default_factory=dict)  # session, time, role, text, customer -> column name
    agents: frozenset[str] = frozenset()  # values of the role column that mean the shop
    customers: frozenset[str] = frozenset()


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_USER = _words("user customer client visitor buyer human guest shopper 0 客户 顾客 用户 买家 访客 消费者")
_ASSISTANT = _words(
    "assistant agent bot staff seller waiter gpt support operator merchant chatgpt model 1 客服 商家 卖家 坐席 机器人 店铺 "
    "人工 人工客服 智能客服 店小二 服务商"
)
_OTHER = _words("system tool function developer function_call observation 系统 系统消息")
_COLUMNS = {
    "session": "session session_id sessionid conversation conversation_id chat_id dialog_id dialogue_id ticket ticket_id thread_id 会话 会话id "
    "会话编号 会话号 对话id 对话编号 咨询id 聊天id 服务单号",
    "time": "time timestamp created_at created date datetime sent_at send_time 时间 发送时间 消息时间 日期 创建时间 聊天时间",
    "role": "role sender sender_type sendertype from author author_type speaker waiter_send 角色 发送方 发送人类型 发送者 发送者类型 身份 发送人 消息来源",
    "text": "text content message body msg utterance 内容 消息内容 消息 文本 聊天内容 发送内容",
    "customer": "customer customer_id user user_id userid buyer buyer_id client_id visitor_id 客户 客户id 用户 用户id 买家 买家昵称 顾客 顾客id 访客id",
}


def speaker_of(role: str, mapping: Mapping_ | None = None) -> Speaker | bool | None:
    """Return who speaks; None for what is left out (system, tools); False where the role is unknown."""
    name = role.strip().lower()
    if mapping and role.strip() in mapping.agents:
        return "assistant"
    if mapping and role.strip() in mapping.customers:
        return "user"
    if name in _USER:
        return "user"
    if name in _ASSISTANT:
        return "assistant"
    return None if name in _OTHER else False


def read_file(path: Path, kind: str = "auto", mapping: Mapping_ | None = None) -> Iterator[Dialogue | Row | Fault]:
    """Yield what `path` holds; `kind` is one of FORMATS. A missing or unreadable file is one Fault."""
    mapping = mapping or Mapping_()
    try:
        suffix = path.suffix.lower()
        if not path.is_file():
            yield Fault(str(path), "file", "not found", "give the path of an existing file")
        elif kind == "server" or (kind == "auto" and _is_sqlite(path)):
            yield from _read_server(path)
        elif kind == "xlsx" or (kind == "auto" and suffix in (".xlsx", ".xlsm")):
            yield from _read_xlsx(path, mapping)
        elif kind == "csv" or (kind == "auto" and suffix in (".csv", ".tsv")):
            yield from _read_csv(path, mapping)
        else:
            yield from _read_json(path, "" if kind == "auto" else kind)
    except (OSError, sqlite3.Error) as exc:
        yield Fault(str(path), "file", f"cannot be read ({exc})", "check the file and its permissions")


# --- JSON ------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, kind: str) -> Iterator[Dialogue | Fault]:
    for item in read_objects(path):
        if isinstance(item, Fault):
            yield item
        else:
            number, found = item
            yield _parse_object(found, f"{path}:{number}", f"{path.stem}-{number}", kind)


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]] | Fault]:
    """Yield the objects of a JSONL file, or of one JSON array, as (line, object), and its faults."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        yield Fault(f"{path}:1", "encoding", "UTF-16", "save the file as UTF-8")
        return
    items = _array_items(path) if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") else _json_lines(path)
    for number, item in items:
        if isinstance(item, Fault):
            yield item
        elif not isinstance(item, dict):
            yield Fault(f"{path}:{number}", "line", "not a JSON object", "write one as {…} a line")
        else:
            yield number, item


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            source = f"{path}:{number}"
            if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                size = len(raw)
                while (more := file.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                    size += len(more)
                yield (
                    number,
                    Fault(
                        source,
                        "line",
                        f"over {size // MAX_LINE_BYTES} MiB long",
                        "the limit is 1 MiB a dialogue: split it",
                    ),
                )
                continue
            if not raw.strip():
                continue
            text = _decoded(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, source)
            if isinstance(text, Fault):
                yield number, text
                continue
            try:
                yield number, json.loads(text)
            except (ValueError, RecursionError) as exc:
                cut = not raw.endswith(b"\n") and not file.read(1)
                problem = "cut off in the middle" if cut else f"not JSON ({str(exc)[:60]})"
                yield number, Fault(source, "line", problem, "write one JSON object a line, complete")
                if cut:
                    return


def _decoded(raw: bytes, source: str) -> str | Fault:
    if b"\x00" in raw:
        return Fault(source, "line", "binary data", "give a text file (JSONL, CSV) or an .xlsx")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        return Fault(source, "encoding", f"not UTF-8 at byte {exc.start}", "save the whole file as UTF-8")


def _array_items(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the items of one JSON array with the line each begins on, holding one item in memory."""
    decoder = json.JSONDecoder()
    line, buffer, at = 1, "", 0
    with path.open("rb") as file:
        text_of = _utf8_pieces(file)
        opened = False
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n,[\ufeff":
                if buffer[at] == "[":
                    if opened:
                        break
                    opened = True
                line += buffer[at] == "\n"
                at += 1
            if at < len(buffer) and buffer[at] == "]":
                return
            buffer, at = buffer[at:], 0
            while True:
                try:
                    item, end = decoder.raw_decode(buffer)
                    break
                except (ValueError, RecursionError) as exc:
                    piece = next(text_of, None) if len(buffer) <= MAX_LINE_BYTES else None
                    if isinstance(piece, str):
                        buffer += piece
                        if not opened or not buffer.strip():
                            item = None
                            break
                        continue
                    if not buffer.strip():
                        yield line, Fault(f"{path}:{line}", "file", "cut off in the middle", "copy the file again")
                        return
                    problem = "cut off or not JSON" if piece is None else "not UTF-8"
                    yield (
                        line,
                        Fault(
                            f"{path}:{line}",
                            "item",
                            f"{problem} ({str(exc)[:40]})",
                            "write a JSON array of dialogues, or one a line",
                        ),
                    )
                    return
            if item is None and (not opened or not buffer.strip()):
                continue
            if end == len(buffer) and not isinstance(item, (dict, list, str)):
                buffer += next((p for p in text_of if isinstance(p, str)), "")  # a number may go on
            yield line, item
            line += buffer.count("\n", 0, end)
            at = end


def _utf8_pieces(file: Any) -> Iterator[str | bytes]:
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    while raw := file.read(1 << 16):
        try:
            yield decoder.decode(raw)
        except UnicodeDecodeError:
            yield raw
            return


def _parse_object(item: dict[str, Any], source: str, default_id: str, kind: str) -> Dialogue | Fault:
    id_ = str(item.get("id") or item.get("session") or item.get("conversation_id") or default_id)
    at = next((t for k in ("at", "time", "timestamp", "created_at", "date") if (t := parse_at(item.get(k)))), None)
    customer = next((str(item[k]) for k in ("customer", "customer_id", "user_id", "user") if item.get(k)), None)
    # 1) Which shape; a shape that was named must be there.
    shape = kind or next(
        (
            s
            for s, keys in (
                ("openai", ("messages",)),
                ("sharegpt", ("conversations",)),
                ("jddc", ("turns",)),
                ("alpaca", ("instruction", "output")),
                ("jddc", ("questions", "answers")),
            )
            if all(k in item for k in keys)
        ),
        "",
    )
    listed = {"openai": "messages", "sharegpt": "conversations", "jddc": "turns"}.get(shape)
    if shape == "jddc" and "turns" not in item and "questions" in item:
        return _parse_jddc_dev(item, source, id_)
    if shape == "alpaca":
        return _parse_alpaca(item, source, id_, at)
    if not listed:
        names = "messages, conversations, turns or instruction and output"
        return Fault(source, "line", f"none of {names}", "use a format of docs/finetune.md, or name it with --format")
    messages = item.get(listed)
    if not isinstance(messages, list) or not messages:
        return Fault(source, listed, "missing or empty", "list the messages, oldest first")
    # 2) Its messages.
    lines = []
    for n, message in enumerate(messages):
        where = f"{listed}[{n}]"
        if not isinstance(message, dict):
            return Fault(source, where, "not an object", 'write {"role": …, "content": …}')
        role = message.get("role", message.get("from"))
        who = speaker_of(str(role)) if role is not None else False
        if who is False:
            return Fault(source, f"{where}.role", f"unknown role {str(role)[:40]!r}", "use user, assistant or system")
        if who is None:
            continue
        content = message.get("content", message.get("value", message.get("text")))
        if isinstance(content, list):
            content = "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict) and "text" in p)
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str) or not content.strip():
            return Fault(source, f"{where}.content", "empty or not a text", "fill it in or remove the message")
        rating = message.get("rating")
        lines.append(
            Line(
                cast(Speaker, who),
                content,
                message.get("weight", 1) not in (0, 0.0),
                rating if rating in ("up", "down") else None,
            )
        )
    lang = item.get("lang")
    return Dialogue(id_, tuple(lines), source, customer, at, lang if lang in ("zh", "en") else "")


def _parse_alpaca(item: dict[str, Any], source: str, id_: str, at: datetime | None) -> Dialogue | Fault:
    for name in ("instruction", "output"):
        if not isinstance(item.get(name), str) or not item[name].strip():
            return Fault(source, name, "empty or not a text", "fill it in or remove the line")
    lines: list[Line] = []
    history = item.get("history") or []
    if not isinstance(history, list):
        return Fault(source, "history", "not a list", "write [[question, reply], …]")
    for n, pair in enumerate(history):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(t, str) and t for t in pair)):
            return Fault(source, f"history[{n}]", "not a question and a reply", "write [[question, reply], …]")
        lines += [Line("user", pair[0]), Line("assistant", pair[1])]
    question = "\n".join(t for t in (item["instruction"], item.get("input")) if isinstance(t, str) and t.strip())
    lines += [Line("user", question), Line("assistant", item["output"])]
    return Dialogue(id_, tuple(lines), source, None, at)


def _parse_jddc_dev(item: dict[str, Any], source: str, id_: str) -> Dialogue | Fault:
    """JDDC's `session, context, questions, answers`: the first of up to three human replies to each question."""
    questions, answers = item.get("questions"), item.get("answers")
    if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
        return Fault(source, "questions", "not as many as answers", "one list of answers for each question")
    lines = []
    for n, (question, replies) in enumerate(zip(questions, answers, strict=True)):
        reply = replies[0] if isinstance(replies, list) and replies else replies
        if not isinstance(question, str) or not isinstance(reply, str) or not question.strip() or not reply.strip():
            return Fault(source, f"questions[{n}]", "empty question or answer", "fill it in or remove it")
        lines += [Line("user", question), Line("assistant", reply.replace("!@@@!", "\n"))]
    return Dialogue(id_, tuple(lines), source)


# --- Logs ------------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> Iterator[tuple[int, list[Any]] | Fault]:
    """
    Yield the lines of a CSV, TSV or XLSX file as (number, cells), the header first, and its faults.

    UTF-8 or GB18030; the delimiter is told from the header. Without a readable header nothing but faults comes.
    """
    yield from _xlsx_table(path) if path.suffix.lower() in (".xlsx", ".xlsm") else _csv_table(path)


def _read_csv(path: Path, mapping: Mapping_) -> Iterator[Row | Fault]:
    yield from _rows(path, _csv_table(path), mapping)


def _csv_table(path: Path) -> Iterator[tuple[int, list[Any]] | Fault]:
    encoding = _encoding_of(path)
    if encoding is None:
        yield Fault(f"{path}:1", "encoding", "binary data, or neither UTF-8 nor GB18030", "export the log as UTF-8 CSV")
        return
    faults: list[Fault] = []

    def decoded() -> Iterator[str]:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                source = f"{path}:{number}"
                if len(raw) > MAX_LINE_BYTES:
                    while not raw.endswith(b"\n") and (raw := file.readline(MAX_LINE_BYTES)):
                        pass
                    faults.append(Fault(source, "line", "over 1 MiB long", "split it"))
                    yield "\n"
                    continue
                try:
                    if b"\x00" in raw and encoding != "utf-16":
                        raise UnicodeDecodeError(encoding, raw, raw.index(b"\x00"), raw.index(b"\x00") + 1, "NUL")
                    yield raw.decode("utf-8-sig" if number == 1 and encoding == "utf-8" else encoding)
                except UnicodeDecodeError as exc:
                    faults.append(
                        Fault(source, "encoding", f"not {encoding} at byte {exc.start}", "save the whole file as UTF-8")
                    )
                    yield "\n"

    lines = decoded()
    first = next(lines, "")
    delimiter = max("\t,;|", key=first.count) if path.suffix.lower() != ".tsv" else "\t"
    quoting: Any = csv.QUOTE_NONE if path.suffix.lower() == ".tsv" else csv.QUOTE_MINIMAL
    try:
        header = next(csv.reader([first], delimiter=delimiter), [])
    except csv.Error as exc:
        yield Fault(f"{path}:1", "header", str(exc), "write the column names in the first line")
        return
    yield 1, list(header)
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            yield from faults
            return
        except csv.Error as exc:
            faults.append(Fault(f"{path}:{reader.line_num + 1}", "line", str(exc), "mend the quotes of this line"))
            continue
        yield from faults
        faults.clear()
        yield reader.line_num + 1, list(row)


def _encoding_of(path: Path) -> str | None:
    """Return utf-8 or gb18030 by the first megabyte; None for anything else. UTF-16 is asked to be saved anew."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    if b"\x00" in head[:4096]:
        return None
    lines = head.split(b"\n")
    lines = lines if len(head) < 1 << 20 else lines[:-1]
    votes = {"utf-8": 0, "gb18030": 0}
    for line in lines:
        if line.isascii():
            continue
        for name in votes:
            try:
                line.decode(name)
            except UnicodeDecodeError:
                continue
            votes[name] += 1
            break  # what is valid UTF-8 is UTF-8
    if not any(votes.values()):
        return "utf-8" if head.isascii() else None
    return max(votes, key=lambda name: votes[name])


def _rows(path: Path, table: Iterator[tuple[int, list[Any]] | Fault], mapping: Mapping_) -> Iterator[Row | Fault]:
    first = next(table, (1, []))
    if isinstance(first, Fault):
        yield first
        return
    header = first[1]
    names = [str(h or "").strip() for h in header]
    places: dict[str, int] = {}
    for what, usual in _COLUMNS.items():
        wanted = mapping.columns.get(what)
        if wanted is not None and wanted not in names:
            yield Fault(f"{path}:1", what, f"no column {wanted!r}", f"there are {', '.join(names)[:200]}")
            return
        known = usual.split()
        place = names.index(wanted) if wanted else min(
            (n for n, name in enumerate(names) if name.lower().replace(" ", "_") in known),
            key=lambda n: known.index(names[n].lower().replace(" ", "_")),
            default=-1,
        )  # fmt: skip
        if place >= 0:
            places[what] = place
    for what in ("session", "role", "text"):
        if what not in places:
            yield Fault(
                f"{path}:1",
                what,
                "no such column",
                f"name it: --columns {what}=NAME; there are {', '.join(names)[:160]}",
            )
            return

    def cell(row: list[Any], what: str) -> Any:
        place = places.get(what, -1)
        return row[place] if 0 <= place < len(row) else None

    for found in table:
        if isinstance(found, Fault):
            yield found
            continue
        number, row = found
        if not any(str(c or "").strip() for c in row):
            continue
        source = f"{path}:{number}"
        session, role = (
            str(cell(row, "session") or "").strip(),
            str(cell(row, "role") if cell(row, "role") is not None else "").strip(),
        )
        if role.endswith(".0"):
            role = role[:-2]  # a spreadsheet's 1.0
        if not session:
            yield Fault(source, "session", "empty", "fill it in or remove the row")
            continue
        who = speaker_of(role, mapping)
        if who is False:
            yield Fault(source, "role", f"unknown role {role[:40]!r}", "name the shop's side: --agents VALUE,VALUE")
            continue
        text = str(cell(row, "text") if cell(row, "text") is not None else "").strip()
        if who is None or not text:
            continue
        time = cell(row, "time")
        at = parse_at(time)
        if at is None and str(time or "").strip():
            yield Fault(source, "time", f"{str(time)[:40]!r} is no time", "write it as 2026-11-01 10:00:00")
            continue
        customer = str(cell(row, "customer") or "").strip() or None
        yield Row(source, session, cast(Speaker, who), text, at, customer)


def _read_xlsx(path: Path, mapping: Mapping_) -> Iterator[Row | Fault]:
    yield from _rows(path, _xlsx_table(path), mapping)


def _xlsx_table(path: Path) -> Iterator[tuple[int, list[Any]] | Fault]:
    import zipfile

    import openpyxl
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (InvalidFileException, zipfile.BadZipFile, KeyError, ValueError, OSError) as exc:
        yield Fault(
            str(path), "file", f"not an .xlsx workbook ({str(exc)[:80]})", "save it as .xlsx without a password"
        )
        return
    with closing(book):
        sheet = book.worksheets[0]
        yield from ((n, list(row)) for n, row in enumerate(sheet.iter_rows(values_only=True), 1))


# --- This server's own conversations ---------------------------------------------------------------------------------


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\x00"


def _read_server(path: Path) -> Iterator[Dialogue | Fault]:
    """Conversations of bot/storage.py's event log, read-only, beside a running server; ratings on their replies."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "events" not in tables:
            yield Fault(str(path), "file", "no table `events`", "give the server's conversations.sqlite3")
            return
        query = "SELECT conversation_id, seq, at, kind, data FROM events ORDER BY conversation_id, seq"
        current: Any = None
        events: list[list[Any]] = []
        for conversation, *event in db.execute(query):
            if conversation != current and events:
                yield _of_events(path, str(current), events)
                events = []
            current = conversation
            events.append(event)
        if events:
            yield _of_events(path, str(current), events)


def _of_events(path: Path, conversation: str, events: list[list[Any]]) -> Dialogue | Fault:
    source = f"{path}:{conversation}"
    ratings: dict[int, str] = {}
    lines: list[Line] = []
    try:
        parsed = [(int(seq), at, kind, json.loads(data)) for seq, at, kind, data in events]
        for _, _, kind, data in parsed:
            if kind == "rating" and data.get("value") in ("up", "down"):
                ratings[int(data.get("rated", -1))] = data["value"]
        # A reply that was asked for again stands in its predecessor's place, as in bot/conversations.py.
        latest = {
            data["turn"]: (seq, data)
            for seq, _, kind, data in parsed
            if kind == "message" and data.get("role") == "bot" and data.get("turn")
        }
        for first, _, kind, given in parsed:
            seq, data = first, given
            if kind == "message" and given.get("role") == "bot" and given.get("turn"):
                if given["turn"] not in latest:
                    continue
                seq, data = latest.pop(given["turn"])
            who = {"visitor": "user", "bot": "assistant", "agent": "assistant"}.get(str(data.get("role")))
            text = data.get("text")
            if kind != "message" or who is None or not isinstance(text, str) or not text.strip():
                continue
            rating = ratings.get(seq)
            # What a visitor voted down, or what was cut off, is context and no example.
            learn = rating != "down" and data.get("finish") in (None, "stop")
            lines.append(Line(cast(Speaker, who), text, learn, cast(Any, rating)))
        at = parse_at(parsed[0][1])
    except (ValueError, TypeError, AttributeError, KeyError) as exc:
        return Fault(source, "events", f"not readable ({str(exc)[:60]})", "leave the conversation out")
    # The conversation is its visitor as far as the log knows: there is no account behind it.
    return Dialogue(conversation, tuple(lines), source, None, at)
