"""
Signing in: login and password -> a session, a session's secret -> who it is.

Sessions are kept in the database, so that they end everywhere at once and outlive a restart; the browser has a secret
in a cookie, the database its hash. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta

from bot.agents.passwords import MAX_CHARS, Passwords, fault_of
from bot.agents.people import Agent, Role, Session
from bot.agents.records import Records, hash_token
from bot.errors import BadCredentials, BadFrame, Unauthorized
from bot.limits import RateLimit

_LOGIN = re.compile(r"[a-z0-9][a-z0-9._@+-]{0,63}")
WINDOW_S = 300.0
MAX_NAME_CHARS = 80


class Accounts:
    """Accounts of one store's agents."""

    def __init__(
        self,
        records: Records,
        *,
        passwords: Passwords | None = None,
        session_h: float = 12.0,
        failures_per_login: int = 10,
        failures_per_address: int = 50,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """
        Args:
            failures_per_login: wrong passwords within five minutes, from one address, before an account is not even
                looked up.
            failures_per_address: wrong passwords within five minutes, of all accounts.
        """
        self.records = records
        self.session_h = session_h
        self._passwords = passwords or Passwords()
        self._clock = clock
        self._of_login = RateLimit(failures_per_login, WINDOW_S)
        self._of_address = RateLimit(failures_per_address, WINDOW_S)

    async def add(self, login: str, name: str, role: Role, password: str) -> Agent:
        """
        Make an account.

        Raises:
            BadFrame: login, name or password cannot be used. Conflict: the login is taken.
        """
        login, name = login.strip().lower(), name.strip()
        if not _LOGIN.fullmatch(login):
            raise BadFrame("a login has 1 to 64 of the characters a-z 0-9 . _ @ + - and begins with a letter or digit")
        if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
            raise BadFrame(f"a name has 1 to {MAX_NAME_CHARS} printable characters")
        return await self.records.add_agent(login, name, role, await self._hashed(password))

    async def set_password(self, agent: Agent, password: str, *, keep: Session | None = None) -> None:
        """Set another password and end the agent's sessions, but `keep`; raises BadFrame."""
        hashed = await self._hashed(password)
        await self.records.set_password(agent.id, hashed, keep_session=keep.token_hash if keep else None)

    async def sign_in(self, login: str, password: str, address: str) -> tuple[str, Session]:
        """
        Return the secret of a new session, and the session.

        Raises:
            BadCredentials: no such account, disabled, or another password; which is not said, nor shown by the time.
            RateLimited: too many wrong ones from here.
        """
        login = login.strip().lower()
        key = f"{address} {login[:64]}"
        # Counted before the check and forgotten after a right one: guesses in parallel do not slip through.
        self._of_address.hit(address)
        self._of_login.hit(key)
        found = await self.records.find_agent(login)
        stored = found[1] if found is not None else None
        if not await self._passwords.verify(stored, password[: MAX_CHARS + 1]) or found is None:
            raise BadCredentials
        self._of_login.forget(key)
        self._of_address.forget(address)
        agent, hashed = found
        if self._passwords.outdated(hashed):
            await self.records.rehash(agent.id, await self._passwords.hash(password))
        expires_at = self._clock() + timedelta(hours=self.session_h)
        token = await self.records.add_session(agent.id, expires_at)
        return token, Session(hash_token(token), agent, expires_at)

    async def change_password(self, session: Session, old: str, new: str) -> None:
        """Set another password; raises BadCredentials where `old` is not the present one, BadFrame."""
        found = await self.records.find_agent(session.agent.login)
        if found is None or not await self._passwords.verify(found[1], old[: MAX_CHARS + 1]):
            raise BadCredentials
        await self.set_password(session.agent, new, keep=session)

    async def session(self, token: str | None) -> Session:
        """Return the session of a secret; raises Unauthorized."""
        if not token or len(token) > 200:
            raise Unauthorized
        key = hash_token(token)
        found = (await self.records.sessions([key], self._clock())).get(key)
        if found is None:
            raise Unauthorized
        return found

    async def good(self, token_hashes: Collection[str]) -> set[str]:
        """Return those of the sessions that have not ended."""
        return set(await self.records.sessions(list(token_hashes), self._clock())) if token_hashes else set()

    async def sign_out(self, session: Session) -> None:
        await self.records.end_session(session.token_hash)

    async def _hashed(self, password: str) -> str:
        if (fault := fault_of(password)) is not None:
            raise BadFrame(fault)
        return await self._passwords.hash(password)


def csrf_of(session: Session) -> str:
    """
    Return what a page has to send with every change. A page of another origin cannot know it.

    Made from the hash of the session's secret, which never leaves this server: nothing more to store.
    """
    return hashlib.sha256(f"csrf {session.token_hash}".encode()).hexdigest()[:43]
