"""A retriever over a few passages whose confidences a test sets itself; the validity predicate is the real one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType

from retrieval.errors import RetrievalError
from retrieval.passages import Hit, Passage, is_valid


class FakeRetriever:
    """Returns, for a query that contains a key of `answers`, the passages named there with their confidences."""

    version = "k1"
    thresholds: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        passages: Sequence[Passage],
        answers: Mapping[str, Sequence[tuple[str, float]]],
        *,
        broken: bool = False,
        gists: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.passages = {p.id: p for p in passages}
        self.answers = dict(answers)
        self.broken = broken
        self.gists = gists
        self.queries: list[str] = []

    def _hits(self, query: str) -> list[Hit]:
        self.queries.append(query)
        if self.broken:
            raise RetrievalError("broken on purpose")
        # The longest key wins, so that "bulky" can be told from "shipping bulky".
        for key in sorted(self.answers, key=len, reverse=True):
            if all(word in query.lower() for word in key.split("+")):
                return [Hit(self.passages[i], c, c) for i, c in self.answers[key]]
        return []

    def gist(self, message: str, *, now: datetime) -> str:
        return self.gists.get(message, message)

    def search(
        self, query: str, k: int = 5, *, now: datetime, lang: str | None = None, kinds: Collection[str] | None = None
    ) -> list[Hit]:
        return [h for h in self._hits(query) if is_valid(h.passage, now)][:k]

    def expired(self, query: str, k: int = 3, *, now: datetime) -> list[Hit]:
        return [h for h in self._hits(query) if not is_valid(h.passage, now)][:k]

    def current(self, kind: str, *, now: datetime, lang: str | None = None) -> list[Passage]:
        return [
            p
            for p in self.passages.values()
            if p.kind == kind and is_valid(p, now) and (lang is None or p.lang == lang)
        ]

    def get(self, passage_id: str) -> Passage | None:
        return self.passages.get(passage_id)
