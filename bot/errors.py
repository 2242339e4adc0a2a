"""
The errors a visitor or a merchant can cause or meet, and their wire codes.

    BotError
    ├── ClientError            theirs: the frame says what was wrong; the connection stays
    │   ├── BadFrame             bad_frame
    │   ├── TooLong              too_long
    │   ├── UnknownConversation  unknown_conversation   (bad or missing secret, too)
    │   ├── Conflict             conflict               (same client id, other text)
    │   ├── ReplyInProgress      reply_in_progress
    │   ├── RateLimited          rate_limited           (retryable after `retry_after_s`)
    │   ├── BadIdentity          bad_identity           (the store's signature does not hold; unsigned from here)
    │   ├── NotAllowed           not_allowed            (this state does not allow it)
    │   ├── Taken                taken                  (another agent has the conversation)
    │   ├── NotYours             not_yours              (only its owner may)
    │   ├── NotFound             not_found              (no such thing in the inbox)
    │   ├── BadRequest           its own code           (files and fine-tuning jobs, in OpenAI's shape)
    │   ├── Unauthorized         unauthorized           (no session; BadCredentials: bad_credentials)
    │   └── Forbidden            forbidden              (another role may)
    ├── ServerError            ours: a code and a plain sentence, never a traceback or a path
    │   ├── EngineBusy           busy                   (retryable after `retry_after_s`)
    │   ├── EngineNotReady       engine_not_ready       (still loading or restarting)
    │   ├── EngineFailed         engine_failed          (this reply is lost, the next may work)
    │   ├── EngineDead           engine_dead            (no reply will work until the restart)
    │   ├── StorageUnavailable   storage_unavailable    (nothing was stored, nothing acknowledged)
    │   ├── StoreUnwritable      store_unwritable       (a file of the store folder; the merchant is told)
    │   ├── Restarting           restarting             (nothing was stored; come back in a moment)
    │   └── ReplyInterrupted     interrupted            (stored; a restart cut the reply, long ago)
    └── MerchantError          a file or setting of the store or the installation: exit status 2

An error stores its facts and makes its sentence in `__str__`. Nothing here knows the web framework.
"""

from __future__ import annotations


class BotError(Exception):
    """Base of all errors of `bot`."""

    code = "internal"
    retryable = False
    retry_after_s: float | None = None


class ClientError(BotError):
    """The visitor's (or their client's) fault; the message may be shown to them."""


class BadFrame(ClientError):
    code = "bad_frame"


class TooLong(ClientError):
    code = "too_long"

    def __init__(self, field: str, length: int, limit: int, unit: str = "characters") -> None:
        super().__init__(field, length, limit)
        self.field, self.length, self.limit, self.unit = field, length, limit, unit

    def __str__(self) -> str:
        return f"{self.field!r} has {self.length} {self.unit}; the limit is {self.limit}"


class UnknownConversation(ClientError):
    code = "unknown_conversation"

    def __str__(self) -> str:
        return "there is no such conversation, or its token does not match"


class Conflict(ClientError):
    code = "conflict"

    def __init__(self, client_id: str) -> None:
        super().__init__(client_id)
        self.client_id = client_id

    def __str__(self) -> str:
        return f"id {self.client_id!r} was already used for another text"


class ReplyInProgress(ClientError):
    code = "reply_in_progress"
    retryable = True
    retry_after_s = 2.0

    def __str__(self) -> str:
        return "too many questions are waiting for a reply in this conversation"


class UnsupportedFile(ClientError):
    """An attachment that is not of an allowed type, or damaged; its text says why."""

    code = "unsupported_file"


class RateLimited(ClientError):
    code = "rate_limited"
    retryable = True

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"too many messages; try again in {self.retry_after_s:.0f} s"


class BadIdentity(ClientError):
    code = "bad_identity"


class NotAllowed(ClientError):
    code = "not_allowed"

    def __init__(self, state: str, action: str) -> None:
        super().__init__(state, action)
        self.state, self.action = state, action

    def __str__(self) -> str:
        return f"{self.action!r} is not possible in state {self.state!r}"


class Taken(ClientError):
    """Another agent was faster. `owner_id` is theirs."""

    code = "taken"

    def __init__(self, owner_id: str) -> None:
        super().__init__(owner_id)
        self.owner_id = owner_id

    def __str__(self) -> str:
        return "another agent has this conversation"


class NotYours(ClientError):
    code = "not_yours"

    def __str__(self) -> str:
        return "only the agent who has this conversation may do that"


class NotFound(ClientError):
    code = "not_found"


class BadRequest(ClientError):
    """
    What a client of files and fine-tuning jobs asks for cannot be done; shown in OpenAI's error shape.

    `param` is the field at fault; `status` the one of HTTP.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status
        self.code = code or "invalid_value"


class Unauthorized(ClientError):
    code = "unauthorized"

    def __str__(self) -> str:
        return "sign in first"


class BadCredentials(ClientError):
    code = "bad_credentials"

    def __str__(self) -> str:
        return "there is no such account, or its password is another"


class Forbidden(ClientError):
    code = "forbidden"

    def __str__(self) -> str:
        return "your role does not allow that"


class ServerError(BotError):
    """Our fault; visitors get the code and a plain sentence, the log gets the rest."""


class EngineBusy(ServerError):
    code = "busy"
    retryable = True

    def __init__(self, retry_after_s: float = 5.0) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"all places are taken; try again in {self.retry_after_s:.0f} s"


class EngineNotReady(ServerError):
    code = "engine_not_ready"
    retryable = True
    retry_after_s = 15.0


class EngineFailed(ServerError):
    """Recoverable: this reply is lost, the next one may work."""

    code = "engine_failed"
    retryable = True
    retry_after_s = 1.0


class EngineDead(ServerError):
    """Unrecoverable until the engine was restarted; the supervisor in `bot/engine.py` does that."""

    code = "engine_dead"
    retryable = True
    retry_after_s = 60.0


class StorageUnavailable(ServerError):
    code = "storage_unavailable"
    retryable = True
    retry_after_s = 5.0


class Restarting(ServerError):
    """The server stops; the next one takes questions again."""

    code = "restarting"
    retryable = True
    retry_after_s = 3.0


class ReplyInterrupted(ServerError):
    """The question is stored, its reply was cut by a restart, and nobody makes it now: it can be asked for again."""

    code = "interrupted"
    retryable = True


class StoreUnwritable(ServerError):
    """A file of the store folder cannot be written; the text says which and why, for the merchant."""

    code = "store_unwritable"


class MerchantError(BotError):
    """Something the merchant wrote or configured cannot be used; the sentence names file, place and remedy."""

    code = "bad_input"
