"""
Conversations -> (input_ids, labels), rows and steps. Knows tokens; no torch, no model, no retrieval.

Only what the assistant said is learned, found by prefix difference: the text up to a reply (with the generation prompt, as
serving renders it) is taken from the text with the reply; the rest is the reply. That is right for any chat template, with
or without `{% generation %}` marks. Each such piece is tokenised by itself, so the prompt's tokens are the ones serving
makes. Where a template writes past replies otherwise than new ones (Qwen3 drops their thoughts), a conversation becomes one
example a reply.

Labels are not shifted; what follows the end-of-turn mark in a template (a line break) is not learned, since serving stops
at the mark.
"""  # noqa: E501

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bot.messages import Message

IGNORE = -100


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer; finetune/modeling.py wraps transformers' one."""

    end_ids: frozenset[int]  # special tokens; a turn ends with one

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str: ...

    def encode(self, text: str) -> list[int]: ...


class ExampleTooLong(ValueError):
    """Even the last question with its reply does not fit; drop the example, never tokens."""

    def __init__(self, n_tokens: int, limit: int) -> None:
        super().__init__(n_tokens, limit)
        self.n_tokens, self.limit = n_tokens, limit

    def __str__(self) -> str:
        return f"{self.n_tokens} tokens, and {self.limit} fit"


class TemplateUnusable(ValueError):
    """The chat template renders a reply that does not begin with its own prompt, or does not end; said in the text."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training sequence: equally long lists; a label is a token id or IGNORE."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    # Lengths of a common beginning and of what follows it, each apart from the others; empty: one plain sequence.
    branches: tuple[int, ...] = ()

    @property
    def n_learned(self) -> int:
        return sum(label != IGNORE for label in self.labels[1:])  # nothing predicts the first


def label_conversation(
    messages: Sequence[Message], learn: Sequence[bool], tokenizer: ChatTokenizer, max_tokens: int
) -> list[Example]:
    """
    Return the example, or one a reply, of a conversation; `learn[i]` says whether message i is learned.

    The oldest turns, a question with its reply, are dropped until the rest fits; the system message stays.

    Raises:
        ExampleTooLong: not even the last turn fits.
        TemplateUnusable: see there.
    """
    wanted = [i for i, m in enumerate(messages) if m.role == "assistant" and learn[i]]
    if not wanted:
        return []
    last = wanted[-1] + 1
    whole = _segments(messages[:last], wanted, tokenizer)
    if whole is not None:
        example = _joined(whole, tokenizer)
        if len(example.input_ids) <= max_tokens:
            return [example]
        shorter = _without_oldest(messages[:last], learn)
        if shorter is None:
            raise ExampleTooLong(len(example.input_ids), max_tokens)
        return label_conversation(*shorter, tokenizer, max_tokens)
    # The template treats past replies differently: each reply in the conversation as it stood then.
    examples: list[Example] = []
    for i in wanted:
        only = [n == i for n in range(i + 1)]
        examples += _one_reply(list(messages[: i + 1]), only, tokenizer, max_tokens)
    return examples


def _one_reply(messages: list[Message], learn: list[bool], tokenizer: ChatTokenizer, max_tokens: int) -> list[Example]:
    segments = _segments(messages, [len(messages) - 1], tokenizer)
    if segments is None:
        raise TemplateUnusable("the chat template writes a reply that does not begin with its generation prompt")
    example = _joined(segments, tokenizer)
    if len(example.input_ids) <= max_tokens:
        return [example]
    shorter = _without_oldest(messages, learn)
    if shorter is None:
        raise ExampleTooLong(len(example.input_ids), max_tokens)
    return _one_reply(list(shorter[0]), list(shorter[1]), tokenizer, max_tokens)


def _segments(
    messages: Sequence[Message], wanted: Sequence[int], tokenizer: ChatTokenizer
) -> list[tuple[str, bool]] | None:
    """Return (text, learned) pieces that join to the rendered conversation, or None where prefixes do not hold."""
    whole = tokenizer.render(messages, generation_prompt=False)
    pieces: list[tuple[str, bool]] = []
    at = 0
    for i in wanted:
        before = tokenizer.render(messages[:i], generation_prompt=True)
        after = whole if i == len(messages) - 1 else tokenizer.render(messages[: i + 1], generation_prompt=False)
        if not (after.startswith(before) and whole.startswith(after) and len(before) >= at):
            return None
        pieces += [(whole[at : len(before)], False), (whole[len(before) : len(after)], True)]
        at = len(after)
    return [*pieces, (whole[at:], False)]


def _joined(pieces: Sequence[tuple[str, bool]], tokenizer: ChatTokenizer) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        piece = tokenizer.encode(text) if text else []
        ids += piece
        if not learned:
            labels += [IGNORE] * len(piece)
            continue
        end = next((n for n in range(len(piece) - 1, -1, -1) if piece[n] in tokenizer.end_ids), None)
        if end is None:
            raise TemplateUnusable("the chat template puts no end-of-turn token behind a reply: it would never end")
        labels += [*piece[: end + 1], *[IGNORE] * (len(piece) - end - 1)]
    # Behind the last learned token nothing is worth computing.
    last = max((n for n, label in enumerate(labels) if label != IGNORE), default=-1) + 1
    return Example(tuple(ids[:last]), tuple(labels[:last]))


def _without_oldest(messages: Sequence[Message], learn: Sequence[bool]) -> tuple[list[Message], list[bool]] | None:
    """Return the conversation without its oldest turn; None where only one is left."""
    questions = [i for i, m in enumerate(messages) if m.role == "user"]
    if len(questions) < 2:
        return None
    keep = [i for i, m in enumerate(messages) if m.role == "system" or i >= questions[1]]
    return [messages[i] for i in keep], [learn[i] for i in keep]


def share_prefixes(examples: Sequence[Example], max_tokens: int, least: int = 64) -> list[Example]:
    """
    Return `examples` with neighbours that begin alike joined, so that what they share is computed once.

    Several questions on the same passages cost little more than one that way. The result trains the same: each branch
    sees the beginning and itself (finetune/modeling.py), with the positions it has alone. Joined are neighbours whose
    first `least` tokens or more are equal and not learned, as long as the whole has at most `max_tokens`.
    """
    joined: list[Example] = []
    family: list[Example] = []
    shared = size = 0  # of the family: tokens in common, and of the whole
    for example in examples:
        if family:
            common = min(shared, _common(family[0], example))
            whole = common + sum(len(e.input_ids) - common for e in (*family, example))
            # Not with one that shares less than the family does (the shop's first words, say) and would cost it more.
            if common >= least and whole <= max_tokens and whole < size + len(example.input_ids):
                family.append(example)
                shared, size = common, whole
                continue
            joined.append(_family(family, shared))
        family, shared, size = [example], len(example.input_ids), len(example.input_ids)
    return [*joined, _family(family, shared)] if family else joined


def _common(one: Example, other: Example) -> int:
    """Return how many first tokens two examples share unlearned; each keeps one unlearned token of its own."""
    n = 0
    for a, b, label_a, label_b in zip(one.input_ids, other.input_ids, one.labels, other.labels, strict=False):
        if a != b or label_a != IGNORE or label_b != IGNORE:
            break
        n += 1
    # What predicts a branch's first token stands in the beginning, so that token must not be learned.
    while n and not all(n < len(e.labels) and e.labels[n] == IGNORE for e in (one, other)):
        n -= 1
    return n


def _family(members: Sequence[Example], shared: int) -> Example:
    if len(members) == 1:
        return members[0]
    ids = [*members[0].input_ids[:shared], *(i for e in members for i in e.input_ids[shared:])]
    labels = [*[IGNORE] * shared, *(label for e in members for label in e.labels[shared:])]
    return Example(tuple(ids), tuple(labels), (shared, *(len(e.input_ids) - shared for e in members)))


# --- Rows and steps --------------------------------------------------------------------------------------------------

Row = tuple[int, ...]  # numbers of the examples in one forward pass


def plan_epoch(
    lengths: Sequence[int], *, row_tokens: int, batch_tokens: int, packing: bool, seed: int, epoch: int,
    batch_examples: int | None = None,
) -> list[list[Row]]:  # fmt: skip
    """
    Return the optimizer steps of an epoch, each a list of rows. Every example once; the same for the same arguments.

    Packed rows are filled best fit first, longest example first within windows of the shuffled order, so that rows are
    full and steps still mixed. Padded rows hold examples of like length. A row has at most `row_tokens` tokens, padding
    counted; a step as many rows as stay within `batch_tokens`, and at least one. Or, with `batch_examples`, a step has
    so many examples, in as many rows as they need.
    """
    rng = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)

    def rows_of(numbers: Sequence[int]) -> list[list[int]]:
        longest_first = sorted(numbers, key=lambda n: (-lengths[n], n))
        return _packed(longest_first, lengths, row_tokens) if packing else _padded(longest_first, lengths, row_tokens)

    if batch_examples is not None:
        batches = [order[at : at + batch_examples] for at in range(0, len(order), batch_examples)]
        return [[tuple(row) for row in rows_of(batch)] for batch in batches]
    rows: list[list[int]] = []
    # A window holds about eight steps: larger ones pack hardly better, and bring all the long examples together.
    for window in _windows(order, lengths, 8 * batch_tokens):
        rows += rows_of(window)
    rng.shuffle(rows)

    def size(row: Sequence[int]) -> int:
        return sum(lengths[n] for n in row) if packing else len(row) * lengths[row[0]]

    steps: list[list[Row]] = []
    n_tokens = 0
    for row in rows:
        if not steps or n_tokens + size(row) > batch_tokens:
            steps.append([])
            n_tokens = 0
        steps[-1].append(tuple(row))
        n_tokens += size(row)
    return steps


def _windows(order: Sequence[int], lengths: Sequence[int], n_tokens: int) -> Iterator[list[int]]:
    window: list[int] = []
    total = 0
    for n in order:
        window.append(n)
        total += lengths[n]
        if total >= n_tokens:
            yield window
            window, total = [], 0
    if window:
        yield window


def _packed(window: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for n in window:
        fits = [r for r in range(len(rows)) if room[r] >= lengths[n]]
        if fits:
            best = min(fits, key=lambda r: room[r])
            rows[best].append(n)
            room[best] -= lengths[n]
        else:
            rows.append([n])
            room.append(row_tokens - lengths[n])
    return rows


def _padded(window: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for n in window:  # longest first, so a row's first example is its width
        if rows and (len(rows[-1]) + 1) * lengths[rows[-1][0]] <= row_tokens:
            rows[-1].append(n)
        else:
            rows.append([n])
    return rows


def mask_proof(examples: Sequence[Example], decode: Callable[[Sequence[int]], str], n: int = 5) -> str:
    """Return the first `n` examples as text with what is learned in ⟦brackets⟧, for people to look at."""
    shown = []
    for example in examples[:n]:
        pieces, run, learned = list[str](), list[int](), False
        for token, label in zip(example.input_ids, example.labels, strict=True):
            if (label != IGNORE) != learned:
                pieces.append(f"⟦{decode(run)}⟧" if learned else decode(run))
                run, learned = [], not learned
            run.append(token)
        pieces.append(f"⟦{decode(run)}⟧" if learned else decode(run))
        shown.append("".join(pieces))
    return "\n\n-----\n\n".join(shown) + "\n"
