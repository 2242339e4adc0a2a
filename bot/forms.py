"""
`read_form`: multipart/form-data as it arrives, its file piece by piece into a sink, its fields into a dict.

The only place that knows python-multipart. Starlette's own reader would write to the system's temporary folder, which
is memory on many machines, and without a limit. Nothing larger than a network read, or `FLUSH_BYTES`, is held here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from typing import Any, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from bot.errors import BadRequest

FLUSH_BYTES = 1 << 20
MAX_FIELD_BYTES = 64 * 1024  # of one field that is no file
MAX_PARTS = 32


class Sink(Protocol):
    """Where the file goes."""

    def write(self, data: bytes) -> None:
        """Append; may block, and may raise a ClientError that ends the reading."""
        ...


async def read_form(body: AsyncIterable[bytes], content_type: str, sink: Sink) -> tuple[dict[str, str], str | None]:
    """
    Return (fields, the file's name; None where no file came) once all of `body` is read.

    Raises:
        BadRequest: not multipart/form-data, cut off, two files, or too much beside the file.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise BadRequest("send the file as multipart/form-data, with the fields 'file' and 'purpose'", param="file")
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        async for piece in body:
            parser.write(piece)
            if len(parts.waiting) >= FLUSH_BYTES:
                await asyncio.to_thread(parts.flush, sink)
        parser.finalize()
    except FormParserError as exc:
        raise BadRequest(f"the form cannot be read: {exc}", param="file") from None
    if not parts.complete:
        raise BadRequest("the form is cut off: its last boundary is missing", param="file")
    await asyncio.to_thread(parts.flush, sink)
    return parts.fields, parts.filename


class _Parts:
    """What the parser has said so far."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.waiting = bytearray()  # of the file, not handed to the sink yet
        self.complete = False
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = bytearray(), bytearray()  # of the header under way
        self._field = ""
        self._text = bytearray()  # of the field under way
        self._in_file = False
        self._n_parts = 0

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def flush(self, sink: Sink) -> None:
        data, self.waiting = bytes(self.waiting), bytearray()
        if data:
            sink.write(data)

    def _begin(self) -> None:
        self._n_parts += 1
        if self._n_parts > MAX_PARTS:
            raise BadRequest(f"the form has more than {MAX_PARTS} parts")
        self._headers, self._name, self._value, self._text = {}, bytearray(), bytearray(), bytearray()

    def _header_end(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        self._in_file = b"filename" in options
        if not self._in_file:
            return
        if self._field != "file" or self.filename is not None:
            raise BadRequest("send one file, in the field 'file'", param="file")
        self.filename = options[b"filename"].decode("utf-8", "replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self.waiting += data[start:end]
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            raise BadRequest(f"the field {self._field[:40]!r} is too long", param=self._field[:40])

    def _end(self) -> None:
        if not self._in_file:
            self.fields[self._field] = self._text.decode("utf-8", "replace")

    def _finish(self) -> None:
        self.complete = True
