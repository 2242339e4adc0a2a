"""
The experiment of the moment: which releases it wants live, and which of them answers a conversation.

Follows `experiment.json` beside the releases' pointer, as servers follow the pointer itself. Knows that file and the
releases; the hash and the arithmetic are `bot.experiments`'. Nothing is remembered: every process that reads the same
file sends the same conversation to the same release, also after a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bot.errors import MerchantError
from bot.experiments import FILE, Experiment, parse_experiment, unit_of
from bot.releases import StoredRelease, Wanted, load_release
from bot.storage import Conversation

logger = logging.getLogger(__name__)


class LiveExperiment:
    """
    An experiment as a server follows it. `wanted` is called about once a second, `assign` for each reply.

    It ends by itself where the current release is no longer the one it compares with (somebody rolled back): then every
    conversation is the current release's again, until `ab stop` or the pointer's way back.
    """

    def __init__(self, releases: Path, pointer: Callable[[], Wanted]) -> None:
        """
        Args:
            releases: the folder of releases.
            pointer: what is wanted without an experiment.
        """
        self._releases, self._pointer = releases, pointer
        self._experiment: Experiment | None = None
        self._read: tuple[tuple[int, int] | None, Experiment | None] = (None, None)
        self.fault = ""  # why an experiment that there is sends nobody to its candidate; for logs and /readyz

    def wanted(self) -> Wanted:
        """Return what is to be live: the pointer's release, and an experiment's candidate beside it. Raises nothing."""
        wanted, fault = self._pointer(), ""
        experiment: Experiment | None = None
        candidate: StoredRelease | None = None
        try:
            experiment = self._load()
            if experiment is not None:
                if experiment.control != wanted.default.adapter:
                    current = wanted.default.adapter or "none"
                    raise MerchantError(
                        f"it compares with {experiment.control or 'none'}, and the current one is {current}"
                    )
                candidate = load_release(self._releases / experiment.candidate)
        except (MerchantError, ValueError, OSError) as exc:
            fault = f"the experiment is not followed: {exc}"
        if fault != self.fault:
            logger.log(logging.ERROR if fault else logging.INFO, "%s", fault or "the experiment is followed again")
        self.fault = fault
        self._experiment = experiment if candidate is not None else None
        return wanted if candidate is None else replace(wanted, beside=(*wanted.beside, candidate))

    def _load(self) -> Experiment | None:
        path = self._releases / FILE
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        stamp = (status.st_mtime_ns, status.st_ino)
        if self._read[0] != stamp:
            self._read = (stamp, parse_experiment(path.read_text(encoding="utf-8")))
            logger.info("experiment %s", self._read[1].name if self._read[1] else "")
        return self._read[1]

    def assign(self, conversation: Conversation) -> str | None:
        """
        Return the release that answers `conversation`; None is the current one.

        Conversations that began before the experiment stay with the current release: half of one says nothing.
        """
        experiment = self._experiment
        if experiment is None or (conversation.created_at or experiment.started_at) < experiment.started_at:
            return None
        unit = unit_of(conversation.id, conversation.customer.id if conversation.customer else None)
        return experiment.candidate if experiment.arm(unit) == "candidate" else None
