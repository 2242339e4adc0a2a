"""
Who a visitor is, as the store's own backend signed it: a JWT in `hello.identity` -> Customer. The only PyJWT import.

The store's backend makes the token for a customer who is signed in to the shop, with the secret it shares with this
server (`ZHANGGUI_IDENTITY_SECRET`):

    header  {"alg": "HS256", "typ": "JWT"}
    claims  sub    the customer's id in the store, 1 to 200 characters; required
            exp    seconds since 1970, required; 5 to 60 minutes ahead is sensible
            aud    "zhanggui", required: a token made for something else opens nothing here
            name, email, iat, nbf   optional

HS256 is the only algorithm taken, whatever the token's header says. A token that is not in order is refused as a whole;
nothing of it is believed.
"""

from __future__ import annotations

from typing import Any

import jwt

from bot.errors import BadIdentity, MerchantError
from bot.messages import Customer

ALGORITHM = "HS256"
AUDIENCE = "zhanggui"
LEEWAY_S = 60  # clocks of two machines differ
MIN_SECRET_BYTES = 32  # RFC 7518, 3.2: a key of at least the hash's size
MAX_ID_CHARS = 200
MAX_NAME_CHARS = 200
MAX_EMAIL_CHARS = 254


class Identities:
    """Checks signed identities; without a secret it refuses all of them."""

    def __init__(self, secret: str | None) -> None:
        """
        Raises:
            MerchantError: the secret is too short to be one.
        """
        if secret is not None and len(secret.encode()) < MIN_SECRET_BYTES:
            raise MerchantError(
                f"ZHANGGUI_IDENTITY_SECRET: {len(secret.encode())} bytes; use at least {MIN_SECRET_BYTES}, for "
                "instance the output of: openssl rand -hex 32"
            )
        self._secret = secret

    def verify(self, token: str) -> Customer:
        """
        Return the customer that `token` names.

        Raises:
            BadIdentity: the signature does not hold, it has expired, it is for something else, or no secret is set.
        """
        if self._secret is None:
            raise BadIdentity("this server has no ZHANGGUI_IDENTITY_SECRET, so no identity can be checked")
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._secret,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                leeway=LEEWAY_S,
                options={"require": ["exp", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise BadIdentity("the identity has expired; ask the store's backend for a new one") from None
        except jwt.InvalidTokenError as exc:
            # The class says what is wrong (signature, audience, claim); the text could quote the token.
            raise BadIdentity(f"the identity is not accepted: {type(exc).__name__}") from None
        sub = claims["sub"]  # PyJWT has seen to it that this is a string
        if not 0 < len(sub) <= MAX_ID_CHARS or not sub.isprintable() or sub.isspace():
            raise BadIdentity(f"'sub' must have 1 to {MAX_ID_CHARS} printable characters")
        return Customer(sub, _text(claims, "name", MAX_NAME_CHARS), _text(claims, "email", MAX_EMAIL_CHARS))


def _text(claims: dict[str, Any], name: str, limit: int) -> str | None:
    value = claims.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > limit or not value.isprintable():
        raise BadIdentity(f"{name!r} must be text of at most {limit} printable characters")
    return value
