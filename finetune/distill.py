"""
A larger model's work on imported dialogues -> a data folder that is trained on like any other.

Three kinds of work. `replies`: it answers the questions of the training side, as serving would ask (history, passages), and
its answers take the place of the people's. `pseudo`: it answers questions that nobody did, several times; what it does not
agree on with itself is left out. `back-translation`: first questions go to the other language and back, for other wordings.
Everything passes the filters below or is dropped, and every drop is counted. Validation and test stay as they were, so that
what was gained is measured on people's replies.

Knows a `Teacher`, not what runs it. A few questions are in hand at a time; answers are kept in an SQLite file as they come,
so that a killed command goes on where it was with the same result.
"""  # noqa: E501

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from bot.errors import MerchantError
from bot.guard.facts import facts_of, grounds_of, ungrounded
from bot.language import language_of, reply_language
from bot.messages import Language, Message, Turn
from bot.prompt import PROMPT_VERSION, PromptStore, passage_line, render_prompt
from finetune.cleaning import tidy
from finetune.data import load_data
from finetune.dialogues import Dialogue, Fault, Line, dump_dialogue
from finetune.duplicates import squeeze
from finetune.formats import Row, read_file
from finetune.grounding import REFUSALS, Search
from finetune.importing import MANIFEST, MAX_FAULTS, SPLITS, BadData
from finetune.pii import PLACEHOLDER, Masker, compact_values, residual

Work = Literal["replies", "pseudo", "back-translation"]
Tell = Callable[[str, int, int], None]
AT_ONCE = 8  # questions a teacher has in hand; vLLM batches them


class Teacher(Protocol):
    """Answers prompts. `name` goes into the lineage of everything made with it."""

    name: str

    async def answer(self, messages: Sequence[Message], *, seed: int | None) -> str:
        """Return the whole reply: greedy without a seed, else one drawn by it."""


@dataclass(frozen=True)
class Limits:
    """What an answer must keep to."""

    n_passages: int = 4
    min_chars: int = 2
    max_chars: int = 400
    n_votes: int = 3  # answers drawn beside the greedy one, where confidence is asked for
    min_confidence: float = 0.67  # share of them that say the same
    max_same: int = 3  # equal answers that are kept


async def distill(
    work: Work,
    data: Path,
    out: Path,
    teacher: Teacher,
    *,
    search: Search | None = None,
    store: PromptStore,
    unlabelled: Sequence[Path] = (),
    limits: Limits | None = None,
    ask_votes: bool = False,
    skip_bad: bool = False,
    seed: int = 0,
    tell: Tell = lambda stage, done, total: None,
) -> dict[str, Any]:
    """
    Write the data folder `out` and return its report: what was kept, and what was dropped and why.

    `ask_votes` asks for confidence of `replies` too; `pseudo` always does. `out` appears whole or not at all.

    Raises:
        BadData: unlabelled files with faults, and not `skip_bad`.
        MerchantError: `data` is no import, `out` is there, or it was begun with other arguments.
    """
    limits = limits or Limits()
    source = load_data(data)
    if source.rendered:
        raise MerchantError(f"{data}: holds rendered conversations; give the import that they were made of")
    partial = _begin(out)
    n_votes = limits.n_votes if ask_votes or work == "pseudo" else 0
    lineage: dict[str, Any] = {
        "work": work, "teacher": teacher.name, "of": source.sha256, "prompt_version": PROMPT_VERSION,
        "limits": asdict(limits), "votes": n_votes, "seed": seed,
        "unlabelled": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in unlabelled if p.is_file()},
    }  # fmt: skip
    if source.lineage is not None:
        lineage["before"] = source.lineage
    counts: Counter[str] = Counter()
    with closing(_Answers(partial, lineage)) as answers:
        keep = compact_values(json.loads((data / MANIFEST).read_text(encoding="utf-8")).get("keep", ()))
        pupil = _Pupil(teacher, answers, search, store, limits, n_votes, seed, counts, keep)
        if work == "pseudo":
            answered = {squeeze(q.text) for found in source.splits.values() for d in found for q in d.lines[::2]}
            asked = [d for d in _unlabelled(unlabelled, skip_bad, counts) if not _stands_in(answered, d, counts)]
            done, made = source.splits["train"], await _collect(pupil.pseudo(asked), len(asked), tell)
        elif work == "back-translation":
            done = source.splits["train"]
            made = await _collect(pupil.translated(done), len(done), tell)
        else:
            done = []
            made = await _collect(pupil.replies(source.splits["train"]), len(source.splits["train"]), tell)
    kept = [*done, *_fewer_of_each(made, limits.max_same, counts)]
    if not any(line.learn and line.role == "assistant" for d in kept for line in d.lines):
        raise MerchantError(f"no answer of {teacher.name} passed: {dict(counts)}")
    report = {**lineage, "n_made": len(kept) - len(done), "counts": dict(sorted((+counts).items()))}
    write_data(partial, {**source.splits, "train": kept}, data, report)
    (partial / "answers.sqlite3").unlink()
    partial.replace(out)
    return report


def _begin(out: Path) -> Path:
    """Return the folder to work in beside `out`, that of a killed command where there is one."""
    if out.exists():
        raise MerchantError(f"--out {str(out)!r} is there already: name a new folder")
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    return partial


async def _collect(made: AsyncIterator[Dialogue | None], total: int, tell: Tell) -> list[Dialogue]:
    found = []
    n = 0
    async for dialogue in made:
        n += 1
        tell("asked", n, total)
        if dialogue is not None:
            found.append(dialogue)
    return found


def write_data(folder: Path, splits: dict[str, list[Dialogue]], like: Path, lineage: dict[str, Any]) -> str:
    """Write a data folder with the manifest of `like`, its own checksums and `lineage`; return its sha256."""
    manifest = json.loads((like / MANIFEST).read_text(encoding="utf-8"))
    files = {}
    for split in SPLITS:
        lines = "".join(dump_dialogue(d) + "\n" for d in splits[split]).encode()
        (folder / f"{split}.jsonl").write_bytes(lines)
        files[f"{split}.jsonl"] = {"sha256": hashlib.sha256(lines).hexdigest(), "n_dialogues": len(splits[split])}
    sha256 = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    manifest |= {"files": files, "data_sha256": sha256, "lineage": lineage}
    (folder / "report.json").write_text(json.dumps(lineage, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return sha256


class _Answers:
    """What the teacher has said already, by what it was asked; on disk at once."""

    def __init__(self, folder: Path, lineage: dict[str, Any]) -> None:
        self._db = sqlite3.connect(folder / "answers.sqlite3", isolation_level=None)
        self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL)")
        began = self.get("lineage")
        if began is not None and json.loads(began) != json.loads(json.dumps(lineage)):
            raise MerchantError(f"{folder}: begun with other arguments; delete it, or name another --out")
        self.put("lineage", json.dumps(lineage))

    def get(self, key: str) -> str | None:
        row = self._db.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, text: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))

    def close(self) -> None:
        self._db.close()


# --- The work --------------------------------------------------------------------------------------------------------


class _Pupil:
    """Asks the teacher, and believes it where the filters do."""

    def __init__(
        self, teacher: Teacher, answers: _Answers, search: Search | None, store: PromptStore, limits: Limits,
        n_votes: int, seed: int, counts: Counter[str], keep: frozenset[str],
    ) -> None:  # fmt: skip
        self.teacher, self.answers, self.search, self.store = teacher, answers, search, store
        self.limits, self.n_votes, self.seed, self.counts, self.keep = limits, n_votes, seed, counts, keep

    async def replies(self, dialogues: Sequence[Dialogue]) -> AsyncIterator[Dialogue | None]:
        """The teacher's answer in the place of each reply that was to be learned; where none passes, nothing is."""
        async for dialogue in _in_turn(self._replied, dialogues):
            yield dialogue

    async def _replied(self, dialogue: Dialogue) -> Dialogue | None:
        lines = list(dialogue.lines)
        for n in range(1, len(lines), 2):
            if not lines[n].learn:
                continue
            turns = [Turn(lines[i].text, lines[i + 1].text) for i in range(0, n - 1, 2)]
            said = await self._answer(dialogue, turns, lines[n - 1].text, lines[n].text)
            # Replaced at once: the next question is asked, and trained on, with the same history.
            lines[n] = replace(lines[n], learn=False) if said is None else Line("assistant", said)
        if not any(line.learn and line.role == "assistant" for line in lines):
            self.counts["dialogue: no answer passed"] += 1
            return None
        last = max(n for n, line in enumerate(lines) if line.learn and line.role == "assistant")
        return replace(dialogue, lines=tuple(lines[: last + 1]))

    async def pseudo(self, asked: Sequence[Dialogue]) -> AsyncIterator[Dialogue | None]:
        """Questions that nobody answered, with the teacher's answer."""
        async for dialogue in _in_turn(self._pseudo, asked):
            yield dialogue

    async def _pseudo(self, dialogue: Dialogue) -> Dialogue | None:
        *before, question = dialogue.lines
        turns = [Turn(q.text, a.text) for q, a in zip(before[::2], before[1::2], strict=True)]
        said = await self._answer(dialogue, turns, question.text, None)
        if said is None:
            return None
        context = tuple(replace(line, learn=False) if line.role == "assistant" else line for line in before)
        return replace(dialogue, lines=(*context, question, Line("assistant", said)))

    async def translated(self, dialogues: Sequence[Dialogue]) -> AsyncIterator[Dialogue | None]:
        """Variants of dialogues whose first question went to the other language and back."""
        async for dialogue in _in_turn(self._translated, dialogues):
            yield dialogue

    async def _translated(self, dialogue: Dialogue) -> Dialogue | None:
        first = dialogue.lines[0]
        home = language_of(first.text)
        if home is None:
            self.counts["left out: language not told"] += 1
            return None
        away: Language = "en" if home == "zh" else "zh"
        abroad = await self._ask([Message("user", _TRANSLATE[away].format(first.text))])
        back = tidy(await self._ask([Message("user", _TRANSLATE[home].format(abroad))])) if abroad else ""
        problem = _bad_wording(first.text, back, home)
        if problem:
            self.counts[f"left out: {problem}"] += 1
            return None
        self.counts["kept"] += 1
        lines = (replace(first, text=back), *dialogue.lines[1:])
        return replace(dialogue, id=f"{dialogue.id}-back-translation", lines=lines)

    async def _answer(self, dialogue: Dialogue, turns: list[Turn], question: str, human: str | None) -> str | None:
        """Return the teacher's answer to a question, or None with the reason counted."""
        default: Language = "en" if dialogue.lang == "en" else "zh"
        language = reply_language(question, turns, None, default)
        said = [(t.question, t.reply) for t in turns]
        passages = (
            list(self.search(question, said, language, dialogue.at, self.limits.n_passages)) if self.search else []
        )
        prompt = render_prompt(self.store, turns, question, passages, language)
        reply = tidy(await self._ask(prompt))
        texts = [passage_line(p) for p in passages]
        if not texts and human is not None:
            texts = [human]  # without a store the people's reply is what is known
        texts += [text for turn in said for text in turn]
        problem = self._problem(reply, question, texts, language, human)
        if problem is None and self.n_votes and not await self._is_sure(prompt, reply):
            problem = "not sure of it"
        if problem is not None:
            self.counts[f"left out: {problem}"] += 1
            return None
        self.counts["kept"] += 1
        return reply

    def _problem(
        self, reply: str, question: str, known: Sequence[str], language: Language, human: str | None
    ) -> str | None:
        if not self.limits.min_chars <= len(reply) <= self.limits.max_chars:
            return "too short or too long"
        if PLACEHOLDER.search(reply) or residual(reply, self.keep):
            return "placeholders or personal data in it"
        if language_of(reply) not in (language, None):
            return "another language"
        if squeeze(reply) == squeeze(question):
            return "repeats the question"
        wrong = ungrounded(reply, grounds_of(known, question))
        if wrong:
            return f"states what no passage holds ({wrong[0].split()[0]})"
        if is_refusal(reply) and human is not None and not is_refusal(human) and _holds(human, known):
            return "refuses what the passages answer"
        return None

    async def _is_sure(self, prompt: Sequence[Message], reply: str) -> bool:
        """Whether enough answers drawn at random say the same: the same facts, or a refusal each."""
        meant = _meaning(reply)
        drawn = [tidy(await self._ask(prompt, seed=self.seed * 1000 + n + 1)) for n in range(self.n_votes)]
        return bool(sum(_meaning(d) == meant for d in drawn) >= self.limits.min_confidence * self.n_votes)

    async def _ask(self, messages: Sequence[Message], *, seed: int | None = None) -> str:
        plain = json.dumps([seed, *((m.role, m.content) for m in messages)], ensure_ascii=False)
        key = hashlib.sha256(plain.encode()).hexdigest()
        found = self.answers.get(key)
        if found is None:
            found = await self.teacher.answer(messages, seed=seed)
            self.answers.put(key, found)
        return found


async def _in_turn(work: Callable[[Dialogue], Any], dialogues: Sequence[Dialogue]) -> AsyncIterator[Dialogue | None]:
    """Work on a few dialogues at a time; yield the results in the order of `dialogues`."""
    waiting: list[asyncio.Task[Dialogue | None]] = []
    upcoming = iter(dialogues)
    try:
        while True:
            while len(waiting) < AT_ONCE and (dialogue := next(upcoming, None)) is not None:
                waiting.append(asyncio.ensure_future(work(dialogue)))
            if not waiting:
                return
            yield await waiting.pop(0)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


_TRANSLATE: dict[Language, str] = {
    "en": "Translate this message of a customer into everyday English. Keep numbers, codes and names in brackets as "
    "they are. Write only the translation.\n\n{}",
    "zh": "把下面这句顾客的话翻译成口语化的中文。数字、编号和方括号里的内容保持原样。只写译文。\n\n{}",
}

_REFUSES = re.compile(
    r"不知道|不清楚|没有(?:提到|写|说明|相关)|无法(?:回答|确定|提供)|资料里没有|转人工|人工客服|"
    r"\b(?:do(?:es)?n['’]t know|not sure|cannot (?:say|answer)|can['’]t (?:say|answer)|no information|"
    r"(?:do|does) ?n[o'’]t (?:say|mention)|human agent)\b",
    re.IGNORECASE,
)


def is_refusal(reply: str) -> bool:
    """Whether a reply says that it does not know, in one of the usual wordings of either language."""
    return bool(_REFUSES.search(reply)) or any(squeeze(reply) == squeeze(r) for rs in REFUSALS.values() for r in rs)


def _holds(reply: str, known: Sequence[str]) -> bool:
    """Whether what the people's reply states stands in what was known: then there was something to say."""
    facts = facts_of(reply)
    states = facts.numbers | facts.percents | facts.codes | facts.addresses
    return bool(states or facts.dates) and not ungrounded(reply, grounds_of(known))


def _meaning(reply: str) -> Any:
    """What two answers must share to be the same: that they refuse, or all their facts; without facts the words."""
    if is_refusal(reply):
        return "refusal"
    facts = facts_of(reply)
    stated = (facts.numbers, facts.percents, facts.dates, facts.codes, facts.addresses, facts.currencies)
    return stated if any(stated) else squeeze(reply)


def _bad_wording(before: str, after: str, language: Language) -> str | None:
    if language_of(after) != language:
        return "another language"
    if squeeze(before) == squeeze(after):
        return "the same words again"
    if facts_of(before) != facts_of(after) or sorted(PLACEHOLDER.findall(before)) != sorted(PLACEHOLDER.findall(after)):
        return "other figures or names than before"
    if not 0.4 <= len(after) / len(before) <= 2.5:
        return "too short or too long"
    return "personal data in it" if residual(after) else None


def _fewer_of_each(made: Sequence[Dialogue], most: int, counts: Counter[str]) -> list[Dialogue]:
    """Keep the first `most` of equal answers, one a dialogue; more would teach that one sentence answers everything."""
    n_of: Counter[str] = Counter()
    kept = []
    for dialogue in made:
        lines, said = [], set()
        for line in dialogue.lines:
            if line.role == "assistant" and line.learn and not dialogue.id.endswith("-back-translation"):
                key = squeeze(line.text)
                n_of[key] += 1
                if n_of[key] > most or key in said:
                    counts["left out: the same answer again"] += 1
                    line = replace(line, learn=False)
                said.add(key)
            lines.append(line)
        if any(line.learn and line.role == "assistant" for line in lines):
            kept.append(replace(dialogue, lines=tuple(lines)))
    return kept


def _stands_in(answered: set[str], dialogue: Dialogue, counts: Counter[str]) -> bool:
    """Whether people answered the question already, on any side: their reply is better, or it is measured on."""
    found = squeeze(dialogue.lines[-1].text) in answered
    counts["left out: answered in the data"] += found
    return found


def _unlabelled(paths: Sequence[Path], skip_bad: bool, counts: Counter[str]) -> Iterator[Dialogue]:
    """Yield dialogues that end with a question, masked; questions may also come alone, one dialogue each."""
    faults: list[Fault] = []
    seen: set[str] = set()
    for path in paths:
        for item in read_file(path):
            if isinstance(item, Fault):
                faults.append(item)
                continue
            if isinstance(item, Row):
                faults.append(Fault(item.source, "file", "a log of rows", "give dialogues as JSONL"))
                break
            lines: list[Line] = []
            for line in item.lines:
                if lines and lines[-1].role == line.role:
                    lines[-1] = replace(lines[-1], text=f"{lines[-1].text}\n{line.text}")
                elif lines or line.role == "user":
                    lines.append(line)
            if not lines or lines[-1].role != "user":
                counts["left out: answered already"] += 1
                continue
            texts = [tidy(t) for t in Masker().mask([line.text for line in lines])]
            key = squeeze("\n".join(texts))
            if any(residual(t) for t in texts) or not all(texts) or not key:
                counts["left out: could not be masked whole"] += 1
            elif key in seen:
                counts["left out: the same question again"] += 1
            else:
                seen.add(key)
                lines = [replace(line, text=text) for line, text in zip(lines, texts, strict=True)]
                name = hashlib.sha256(f"{item.source}|{item.id}".encode()).hexdigest()[:16]
                yield replace(item, id=f"{name}-pseudo", lines=tuple(lines), customer=None)
    if faults and not skip_bad:
        raise BadData(faults[:MAX_FAULTS], len(faults))
