"""The one error of the readers: this file is not read, and the line says why and what to do. No I/O."""

from __future__ import annotations


class Refused(Exception):
    """A file cannot or must not be read; the message is for the merchant."""


TOO_LARGE = "needs too much memory to read: it is built to, or damaged; save a smaller copy and use that"
TOO_SLOW = "takes too long to read: it is built to, or damaged; save a smaller copy and use that"
