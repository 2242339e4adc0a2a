"""
Passwords of agents: Argon2id, off the event loop. The only file that knows argon2.

A hash takes 64 MiB and some tens of milliseconds on purpose, so that guesses are dear; only two are made at a time, so
that a flood of sign-ins does not take the server's memory.
"""

from __future__ import annotations

import asyncio
import unicodedata

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

MIN_CHARS = 10
MAX_CHARS = 200

_AT_ONCE = 2


class Passwords:
    """Hashes and checks."""

    def __init__(self, *, rounds: int = 3, memory_kib: int = 64 * 1024) -> None:
        """The defaults are the second recommended option of RFC 9106, section 4."""
        self._hasher = PasswordHasher(time_cost=rounds, memory_cost=memory_kib)
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._nobody: str | None = None

    async def hash(self, password: str) -> str:
        """Return what to store."""
        async with self._places:
            return await asyncio.to_thread(self._hasher.hash, _normal(password))

    async def verify(self, stored: str | None, password: str) -> bool:
        """
        Return whether `password` is the one that was hashed to `stored`.

        With None (there is no such account) a hash is checked all the same: the time taken does not tell.
        """
        if self._nobody is None:
            self._nobody = await self.hash("nobody has this one")
        async with self._places:
            matches = await asyncio.to_thread(self._matches, stored or self._nobody, password)
        return matches and stored is not None

    def outdated(self, stored: str) -> bool:
        """Return whether `stored` was made with other parameters than today's; then hash the password anew."""
        return self._hasher.check_needs_rehash(stored)

    def _matches(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, _normal(password))
        except (VerificationError, InvalidHashError):
            return False


def fault_of(password: str) -> str | None:
    """Return what is wrong with a new password, or None. Length only: rules on characters make worse passwords."""
    if len(password) < MIN_CHARS:
        return f"a password needs at least {MIN_CHARS} characters"
    if len(password) > MAX_CHARS:
        return f"a password has at most {MAX_CHARS} characters"
    return None


def _normal(password: str) -> str:
    # The same characters typed on another keyboard may be other code points (NIST SP 800-63B 5.1.1.2).
    return unicodedata.normalize("NFKC", password)
