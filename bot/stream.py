"""
What an answerer yields before the finished `Reply`: where it is, and the new text.

No I/O; imported by whoever makes a reply (`bot.answer`) and whoever passes it on (`bot.conversations`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PhaseName = Literal["searching", "thinking", "typing"]


@dataclass(frozen=True, slots=True)
class Phase:
    """The turn has reached this stop; visitors see it as a `status` frame."""

    name: PhaseName


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of the reply, never the text so far."""

    text: str
