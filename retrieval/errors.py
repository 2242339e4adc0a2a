"""
What can go wrong between a store's files and a hit.

    RetrievalError            searching failed; an answer without sources is still possible
    └── IndexDamaged            a snapshot on disk does not match its manifest: rebuild it
    BadStore                  a merchant's file cannot be used; lists every wrong row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class RetrievalError(Exception):
    """Searching failed; the caller answers without passages and says so."""


class IndexDamaged(RetrievalError):
    """A snapshot on disk is not what its manifest says; nothing of it was used."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One wrong place in a merchant's file."""

    file: str  # relative to the store folder
    row: int | None  # as a spreadsheet counts: the header is row 1
    field: str | None
    problem: str  # what is wrong and what to do, one line

    def __str__(self) -> str:
        place = self.file + (f", row {self.row}" if self.row is not None else "")
        return f"{place}{f', {self.field}' if self.field else ''}: {self.problem}"


class BadStore(Exception):
    """The store's files cannot be loaded; nothing of them went live."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(*faults)
        self.faults = tuple(faults)

    def __str__(self) -> str:
        first = "; ".join(str(fault) for fault in self.faults[:5])
        return first + (f"; and {len(self.faults) - 5} more" if len(self.faults) > 5 else "")
