"""
What an answerer yields before the finished `Reply`: where it is, and the new text.

No I/O; imported by whoever makes a reply (`bot.answer`) and whoever passes it on (`bot.conversations`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bot.messages import Release

PhaseName = Literal["searching", "thinking", "typing"]


@dataclass(frozen=True, slots=True)
class Phase:
    """The turn has reached this stop; visitors see it as a `status` frame."""

    name: PhaseName
    release: Release | None = None  # with the first phase: what answers this turn, also if it is cut before its Reply


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of the reply, never the text so far."""

    text: str
