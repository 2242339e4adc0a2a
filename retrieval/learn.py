"""
Resolved dialogues -> wordings for a store's FAQs, proposed for review; and what the review accepted, into faqs.csv.

Knows dialogues (OpenAI messages, one a line), the review sheet and the bytes of faqs.csv; how alike two texts are is
the retriever's word. Nothing goes live by itself: a pair is proposed where the agent's reply gives this FAQ's answer and no
other's, and the visitor's question is near it too; then a person says yes or no. Numbers, addresses and names of
visitors stay out: a wording is shown to nobody, but it is kept for ever.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from retrieval.errors import BadStore, Fault
from retrieval.hybrid import HybridRetriever
from retrieval.importing.files import knowledge_files
from retrieval.importing.reading import json_lines
from retrieval.importing.text import NotText, find_encoding, read_csv, read_text
from retrieval.passages import Passage
from retrieval.restated import figures, overlap
from retrieval.words import detect_lang, squash, weight, words

REVIEW = "wordings.review.csv"
COLUMNS = ("question", "faq_id", "faq_question", "score", "why", "dialogue", "decision")
YES = frozenset(("yes", "y", "1", "true", "ok", "是", "对", "采纳", "接受", "通过", "√", "✓"))
NO = frozenset(("no", "n", "0", "false", "否", "不", "不是", "拒绝", "×", "✗", "x"))
MAX_CHARS = {"zh": 30, "en": 90}  # longer ones tell a story; a wording is a question
MIN_WORDS = 2  # content words: "and for mine?" means something only where it was said
REPLY_CHARS = 400  # what an agent says first is the answer
N_NEAR = 3  # the FAQ has to be among as many for the question by itself
LATER_CONFIDENCE = 0.45  # of a question that something was said before: it has to be clear by itself
MARGIN = 0.04  # of the reply's best FAQ before its second, in score
SCORE = 0.5  # from here on a pair is proposed

_PERSONAL = re.compile(
    r"\d{5,}|\d[\d -]{6,}\d|[\w.+-]+@[\w-]+|https?:|www\.|@\w|\b(?:wechat|whatsapp|weixin|vx|qq)\b|微信号|加我|"
    r"我叫|我姓|我是[\u4e00-\u9fff]{2,3}(?:先生|女士|小姐)|\bmy name is\b|\bi am mr|\bthis is (?:mr|ms|mrs)\b|"
    r"[\u4e00-\u9fff]{2,}(?:路|街|弄|巷|小区|大厦)\d|\d+(?:号楼|栋|单元|室)|\b\d+ \w+ (?:street|road|avenue|lane)\b|"
    r"\[\w+\]|订单号?[:： ]*\w*\d|运单号?[:： ]*\w*\d|单号[:： ]*\w*\d",
    re.IGNORECASE,
)
# Said on top of something before it: by itself it asks nothing.
_LEANING = re.compile(
    r"^(?:and|so|but|then|ok(?:ay)?|oh|ah|what about|how about|or|also|thanks?|thank you|great|fine|no|yes|yeah|nope|sure|hmm?|"
    r"well)\b|\b(?:that one|this one|the other one|as well|instead|it's|mine|these|those|that|it|they|them)\b|"
    r"^(?:那|那么|所以|然后|还有|好|嗯|哦|喔|行|可以|不|是的|对|谢|要是|如果|万一|哈|唉|额|呃|但|可是|不过|这样|这个|它|也)|(?:这个|那个|它们?|这些|那些)|呢[?？]?$",
    re.IGNORECASE,
)
_ASKING = re.compile(
    r"[?？]|吗|么|怎|咋|啥|什么|几|多少|哪|能不能|可不可以|是不是|有没有|能否|想问|请问|\b(?:how|what|when|where|which|who|why)\b|"
    r"(?:^|[,.!;] ?|\band )(?:can|could|do|does|is|are|will|would|may|should)\b|不[?？]?$|没[?？]?$",
    re.IGNORECASE,
)
_COURTESY = re.compile(
    r"^(?:(?:在吗|在不在|在么|您好|你好|亲|hi|hello|hey|good (?:morning|afternoon|evening)|excuse me|请问一?下?|想问一?下?|问一?下|麻烦问一?下?)"
    r"[\s,，!！.。~～:：、…]*)+",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A visitor's question and what the agent replied."""

    question: str
    reply: str
    dialogue: str
    first: bool  # nothing was said before it


@dataclass(frozen=True, slots=True)
class Proposal:
    """A wording for a FAQ, with why."""

    question: str
    faq_id: str
    faq_question: str
    score: float  # in [0, 1]: how sure; for sorting, no probability
    why: str
    dialogue: str


# --- reading dialogues ------------------------------------------------------------------------------------------------


def load_turns(paths: Iterable[Path]) -> list[Turn]:
    """
    Return every question with its reply, in order. Blocks on disk.

    Raises:
        BadStore: a line is no dialogue; with every fault.
    """
    faults: list[Fault] = []
    turns: list[Turn] = []
    for path in paths:
        name = path.name
        text = read_text(path, name, faults)
        for number, entry in json_lines((text or "").split("\n"), name, faults):
            messages = entry.get("messages") if isinstance(entry, dict) else None
            if not isinstance(messages, list) or not all(
                isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
            ):
                problem = 'is no dialogue; write {"messages": [{"role": "user", "content": "…"}, …]}'
                faults.append(Fault(name, number, "messages", problem))
                continue
            turns += _turns(messages, str(entry.get("id") or f"{name}:{number}"))
    if faults:
        raise BadStore(faults)
    return turns


def _turns(messages: Sequence[dict[str, Any]], dialogue: str) -> list[Turn]:
    found: list[Turn] = []
    asked, first = "", True
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str):
            continue
        if message["role"] == "user":
            asked = f"{asked}\n{content}".strip()
        elif message["role"] == "assistant" and asked:
            found.append(Turn(asked, content, dialogue, first))
            asked, first = "", False
    return found


def wording_of(turn: Turn) -> str | None:
    """Return the question of a turn as a wording, without greetings; None where it cannot be one."""
    text = " ".join(turn.question.split())
    text = _COURTESY.sub("", text).strip(" ,，。.、~～|｜")
    lang = detect_lang(text)
    if not lang or len(text) > MAX_CHARS[lang] or _PERSONAL.search(text) or "|" in text or "｜" in text:
        return None
    if len(re.findall(r"[?？]", text)) > 1 or not _ASKING.search(text) or (_LEANING.search(text) and not turn.first):
        return None
    content = [word for word in words(text) if weight(word) == 1.0]
    return text if len(content) >= MIN_WORDS else None


def texts_of(turns: Sequence[Turn]) -> list[str]:
    """Return every text that `propose` searches for, each once: to be embedded together."""
    found: dict[str, None] = {}
    for turn in turns:
        question = wording_of(turn)
        if question is not None:
            found[question] = found[_reply(turn)] = None
    return list(found)


def _reply(turn: Turn) -> str:
    return turn.reply.strip()[:REPLY_CHARS]


# --- proposing --------------------------------------------------------------------------------------------------------


def propose(
    turns: Sequence[Turn], retriever: HybridRetriever, now: datetime, known: Iterable[tuple[str, str]] = ()
) -> list[Proposal]:
    """
    Return wordings for the FAQs of faqs.csv, the surest first; each question once, none of `known` (question, FAQ).

    Blocks: two searches a turn, so some 30 ms each.

    Raises:
        RetrievalError: the embedder failed.
    """
    decided = {(squash(question), faq_id) for question, faq_id in known}
    wordings = {squash(wording) for passage in retriever.index.passages for wording in passage.questions}
    found: dict[str, Proposal] = {}
    for turn in turns:
        question = wording_of(turn)
        if question is None or squash(question) in wordings:
            continue
        proposal = _pair(question, turn, retriever, now)
        if proposal is None or (squash(question), proposal.faq_id) in decided:
            continue
        key = squash(question)
        if key not in found or proposal.score > found[key].score:
            found[key] = proposal
    return sorted(found.values(), key=lambda proposal: (-proposal.score, proposal.question))


def _pair(question: str, turn: Turn, retriever: HybridRetriever, now: datetime) -> Proposal | None:
    """Return the FAQ whose answer the reply gives and that the question asks for; None where either is in doubt."""
    lang = detect_lang(question)
    given = retriever.search(_reply(turn), 2, now=now, lang=lang, kinds=("faq",))
    asked = retriever.search(question, N_NEAR, now=now, lang=lang, kinds=("faq",))
    if not given or not asked:
        return None
    best = given[0]
    faq = best.passage
    place = next((n for n, hit in enumerate(asked) if hit.passage.id == faq.id), None)
    if place is None or faq.lang != lang or not faq.source.startswith("faqs.csv:"):
        return None
    if not turn.first and (place or asked[0].confidence < LATER_CONFIDENCE):
        return None
    margin = best.score - given[1].score if len(given) > 1 else 1.0
    stated, said = figures(faq.text), figures(turn.reply)
    if margin < MARGIN or (stated and said and not stated & said):
        return None  # another FAQ's answer, or this one's with other figures
    shared = len(stated & said) / len(stated | said) if stated | said else 0.0
    share = overlap(faq.text, turn.reply)
    score = (
        0.35 * min(1.0, share / 0.6)
        + 0.2 * shared
        + 0.2 * min(1.0, margin / 0.3)
        + 0.15 * (1.0, 0.5, 0.2)[place]
        + 0.1 * min(1.0, asked[place].confidence / 0.5)
    )
    if score < SCORE:
        return None
    why = (
        f"the reply has {share:.0%} of the answer's words"
        + (f" and its figures {', '.join(sorted(stated & said))}" if stated & said else "")
        + f"; it fits this FAQ by {margin:.2f} better than the next; the question alone finds it in place {place + 1}"
        + f" (confidence {asked[place].confidence:.2f})"
    )
    return Proposal(question, faq.id, faq.title, round(score, 3), why, turn.dialogue)


# --- the review sheet -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decision:
    """A row of the review sheet."""

    row: int
    values: dict[str, str]
    accepted: bool | None  # None: not decided yet


def read_review(store_dir: Path) -> list[Decision]:
    """
    Return the rows of the review sheet; none where there is no sheet.

    Raises:
        BadStore: a column is missing, or a decision is neither yes nor no; with every fault.
    """
    path = store_dir / REVIEW
    found: list[Decision] = []
    faults: list[Fault] = []
    header: list[str] = []
    for record in read_csv(path, REVIEW, faults) if path.is_file() else ():
        cells = [cell.strip() for cell in record.cells]
        if not header:
            header = [cell.lower() for cell in cells]
            missing = [name for name in ("question", "faq_id", "decision") if name not in header]
            faults += [Fault(REVIEW, 1, name, f"the column is missing; add a column named {name}") for name in missing]
            if missing:
                break
            continue
        values = dict.fromkeys(COLUMNS, "") | dict(zip(header, cells, strict=False))
        if not any(cells):
            continue
        said = values["decision"].casefold()
        accepted = True if said in YES else False if said in NO else None
        if said and accepted is None:
            faults.append(Fault(REVIEW, record.row, "decision", f"{said[:20]!r} is no decision; write yes or no"))
        found.append(Decision(record.row, {name: values[name] for name in COLUMNS}, accepted))
    if faults:
        raise BadStore(faults)
    return found


def write_review(store_dir: Path, proposals: Sequence[Proposal], decided: Sequence[Decision]) -> None:
    """Write the review sheet: what is to be decided, surest first, then what was; it appears whole or not at all."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in proposals:
        writer.writerow(
            {
                "question": _safe_cell(one.question),
                "faq_id": one.faq_id,
                "faq_question": one.faq_question,
                "score": one.score,
                "why": one.why,
                "dialogue": one.dialogue,
                "decision": "",
            }
        )
    writer.writerows(decision.values for decision in decided)
    # With a byte order mark: without one Excel takes it for the system's encoding.
    _write(store_dir / REVIEW, codecs.BOM_UTF8 + out.getvalue().encode())


def _safe_cell(text: str) -> str:
    """Return `text` so that a spreadsheet takes it for text: a visitor may have written a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


# --- applying ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Applied:
    """What a review did."""

    accepted: list[tuple[str, str]]  # (wording, FAQ id) added to faqs.csv
    rejected: int  # remembered, not proposed again
    undecided: int


def apply_review(store_dir: Path, passages: Sequence[Passage]) -> Applied:
    """
    Add the accepted wordings to faqs.csv, keep the rejected ones in the sheet, and leave the undecided ones there.

    All or nothing; of faqs.csv nothing changes but the `questions` cells concerned.

    Raises:
        BadStore: a row of the sheet cannot be applied; with every fault.
        OSError: the files cannot be written; faqs.csv is as it was or whole.
    """
    decisions = read_review(store_dir)
    faqs = {p.id: p for p in passages if p.kind == "faq" and p.source.startswith("faqs.csv:")}
    owner = {squash(wording): p.id for p in passages if p.kind == "faq" for wording in p.questions}
    faults: list[Fault] = []
    added: dict[str, list[str]] = {}
    for decision in decisions:
        if not decision.accepted:
            continue
        question, faq_id = decision.values["question"].removeprefix("'").strip(), decision.values["faq_id"]
        problem = field = ""
        if faq_id not in faqs:
            field, problem = "faq_id", f"{faq_id[:40]!r} is no FAQ of faqs.csv; correct it or write no"
        elif not squash(question):
            field, problem = "question", "is empty; fill it in or write no"
        elif "|" in question or "｜" in question or "\n" in question:
            field, problem = "question", "has a | or a line break, which stands between wordings; take it out"
        elif _PERSONAL.search(question):
            field, problem = "question", "looks like a visitor's number, address or name; take it out or write no"
        elif owner.get(squash(question), faq_id) != faq_id:
            field, problem = "question", f"is a wording of {owner[squash(question)]} already; write no, or change it"
        if problem:
            faults.append(Fault(REVIEW, decision.row, field, problem))
        elif squash(question) not in owner:
            added.setdefault(faq_id, []).append(question)
            owner[squash(question)] = faq_id
    if faults:
        raise BadStore(faults)
    if added:
        add_wordings(knowledge_files(store_dir)["faqs.csv"], added)
    write_review(store_dir, (), [decision for decision in decisions if not decision.accepted])
    return Applied(
        [(wording, faq_id) for faq_id, wordings in added.items() for wording in wordings],
        sum(decision.accepted is False for decision in decisions),
        sum(decision.accepted is None for decision in decisions),
    )


def add_wordings(path: Path, added: dict[str, list[str]]) -> None:
    """
    Add wordings to the `questions` cells of these FAQs; every other byte of the file stays.

    Raises:
        BadStore: the file cannot be read, or not be written back in its encoding.
        OSError: it cannot be written; it is as it was.
    """
    raw = path.read_bytes()
    try:
        encoding = find_encoding(raw)
    except NotText as exc:
        raise BadStore([Fault(path.name, exc.row, None, str(exc))]) from exc
    text = raw.decode(encoding)
    records = _spans(text)
    header = [_value(text[a:b]).strip().lower() for a, b in records[0]]
    separator = _separator(text, records[0])
    place_of_id = header.index("id")
    edits: list[tuple[int, int, str]] = []  # from, to, what stands there then
    if "questions" in header:
        place = header.index("questions")
    else:
        place = len(header)
        end = records[0][-1][1]
        edits.append((end, end, f"{separator}questions"))
    for cells in records[1:]:
        faq_id = _value(text[slice(*cells[place_of_id])]).strip() if len(cells) > place_of_id else ""
        if faq_id not in added:
            continue
        if place < len(cells):
            start, end = cells[place]
            before = _value(text[start:end]).rstrip()
            edits.append((start, end, _quoted("|".join([*filter(None, [before]), *added[faq_id]]), separator)))
        else:
            end = cells[-1][1]
            edits.append((end, end, separator * (place - len(cells) + 1) + _quoted("|".join(added[faq_id]), separator)))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    try:
        encoded = text.encode(encoding)
    except UnicodeEncodeError as exc:
        problem = f"is {encoding}, which has no {text[exc.start]!r}; save it as CSV UTF-8 and apply again"
        raise BadStore([Fault(path.name, None, None, problem)]) from exc
    if encoding == "utf-16":  # Python writes its own order, with a mark: keep the file's
        order = "utf-16-le" if raw[:2] == codecs.BOM_UTF16_LE else "utf-16-be"
        encoded = raw[:2] + text.encode(order)
    _write(path, encoded)


def _spans(text: str) -> list[list[tuple[int, int]]]:
    """Return where each cell of each row of a CSV text stands, quotes included, separators and line ends not."""
    first_line = text.split("\n", 1)[0]
    separator = max(",;\t", key=first_line.count) if first_line.count(",") == 0 else ","
    rows: list[list[tuple[int, int]]] = [[]]
    start, quoted = 0, False
    for position, character in enumerate(text):
        if character == '"':
            # A quote opens at the start of a cell only; a doubled one closes and opens again.
            quoted = not quoted if quoted or not text[start:position].strip('"') else quoted
        elif not quoted and character == separator:
            rows[-1].append((start, position))
            start = position + 1
        elif not quoted and character in "\r\n":
            if character == "\n" and position and text[position - 1] == "\r":
                start = position + 1
                continue
            rows[-1].append((start, position))
            rows.append([])
            start = position + 1
    rows[-1].append((start, len(text)))
    return rows


def _separator(text: str, header: Sequence[tuple[int, int]]) -> str:
    return text[header[0][1]] if len(header) > 1 else ","


def _value(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _quoted(value: str, separator: str) -> str:
    needs = any(character in value for character in (separator, '"', "\n", "\r"))
    return '"' + value.replace('"', '""') + '"' if needs else value


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, with the rights it had."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
