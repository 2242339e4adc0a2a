"""
Files that visitors and agents send: pictures and PDFs, checked by their bytes, kept in the data folder.

Knows the formats well enough to walk a file from its first byte to its last: what is copied is what the format needs
to show the picture, so that a place (EXIF, GPS), a comment, a second file hidden behind or inside the first, or the
name's own idea of the type do not survive. No decoder runs on strangers' bytes, and none is needed. PDFs are kept as
they are and only ever offered for download. Does not know HTTP, tokens or frames.

On disk: `FOLDER/CONVERSATION/ID.bin` and `ID.json`; the latter last, so that a file without it does not exist.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import struct
import tempfile
import time
import unicodedata
import zlib
from collections.abc import AsyncIterator, Collection
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from bot.errors import StorageUnavailable, TooLong, UnsupportedFile

MIB = 1024 * 1024
MAX_FILE_BYTES = 10 * MIB
MAX_PER_MESSAGE = 5
MAX_PER_CONVERSATION = 20
MAX_CONVERSATION_BYTES = 50 * MIB
MAX_PIXELS = 50_000_000
MAX_SIDE = 20_000
MAX_NAME_CHARS = 100

SUFFIXES = {
    "image/png": (".png",),
    "image/jpeg": (".jpg", ".jpeg"),
    "image/webp": (".webp",),
    "image/gif": (".gif",),
    "application/pdf": (".pdf",),
}

_CONVERSATION = re.compile(r"c_[A-Za-z0-9_-]{1,62}")
_ID = re.compile(r"a_[A-Za-z0-9_-]{24}")


@dataclass(frozen=True, slots=True)
class Attachment:
    """What an event says of a file; width and height in pixels, 0 for a PDF."""

    id: str
    kind: Literal["image", "pdf"]
    mime: str
    name: str  # for people, with the suffix of the type; never a path of ours
    size_bytes: int
    width: int = 0
    height: int = 0

    def data(self) -> dict[str, Any]:
        """Return it as the wire has it."""
        return {name: value for name, value in asdict(self).items() if value or name not in ("width", "height")}


class AttachmentStore:
    """All files of all conversations, in one folder. Methods may be called from many tasks of one event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._uploading: dict[str, int] = {}  # conversation -> uploads under way

    async def save(self, conversation: str, name: str, chunks: AsyncIterator[bytes]) -> Attachment:
        """
        Take in one file, as it comes; return what it is once it is on disk.

        Raises:
            TooLong: the file is over 10 MiB, or the conversation has 20 files or 50 MiB.
            UnsupportedFile: of another type than those allowed, damaged, or over 50 megapixels.
            StorageUnavailable: the disk is full or cannot be written.
        """
        if _CONVERSATION.fullmatch(conversation) is None:
            raise UnsupportedFile("no such conversation")
        n_uploading = self._uploading.get(conversation, 0)
        kept = await asyncio.to_thread(self._kept, conversation)
        if len(kept) + n_uploading >= MAX_PER_CONVERSATION:
            raise TooLong("attachments", len(kept) + n_uploading + 1, MAX_PER_CONVERSATION, "files")
        room_bytes = MAX_CONVERSATION_BYTES - sum(a.size_bytes for a in kept) - n_uploading * MAX_FILE_BYTES
        self._uploading[conversation] = n_uploading + 1
        part: Path | None = None
        try:
            part = await asyncio.to_thread(self._begin)
            with part.open("wb") as file:
                size_bytes = 0
                async for chunk in chunks:
                    size_bytes += len(chunk)
                    if size_bytes > MAX_FILE_BYTES:
                        raise TooLong("file", size_bytes, MAX_FILE_BYTES, "bytes")
                    if size_bytes > room_bytes:
                        raise TooLong("attachments", size_bytes, max(room_bytes, 0), "bytes left")
                    file.write(chunk)  # into the page cache; a thread for each chunk would cost more
            return await asyncio.to_thread(self._keep, conversation, name, part)
        except OSError as exc:
            raise StorageUnavailable from exc
        finally:
            if part is not None:
                part.unlink(missing_ok=True)
            self._uploading[conversation] -= 1
            if not self._uploading[conversation]:
                del self._uploading[conversation]

    async def find(self, conversation: str, ids: Collection[str]) -> list[Attachment]:
        """Return those of `ids` that are files of `conversation`, in the order of `ids`."""
        return await asyncio.to_thread(
            lambda: [a for a in (self._load(conversation, id_) for id_ in dict.fromkeys(ids)) if a is not None]
        )

    def path(self, conversation: str, id_: str) -> Path:
        """Return where the bytes of a file that `find` returned are."""
        return self._folder / conversation / f"{id_}.bin"

    async def conversations(self) -> list[str]:
        """Return the conversations that have files."""
        return await asyncio.to_thread(
            lambda: sorted(path.name for path in self._folder.glob("c_*") if _CONVERSATION.fullmatch(path.name))
        )

    async def delete(self, conversation: str) -> None:
        """Remove every file of `conversation`."""
        if _CONVERSATION.fullmatch(conversation):
            await asyncio.to_thread(shutil.rmtree, self._folder / conversation, ignore_errors=True)

    async def sweep(self, used: Collection[str], conversation: str, max_age_s: float = 24 * 3600.0) -> int:
        """Remove the files of `conversation` that are older and not in `used` (ids in events); return how many."""
        return await asyncio.to_thread(self._sweep, set(used), conversation, max_age_s)

    # On the disk, in a thread

    def _begin(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(prefix=".part-", dir=self._folder)
        os.close(handle)
        return Path(name)

    def _keep(self, conversation: str, name: str, part: Path) -> Attachment:
        clean, mime, width, height = clean_file(part.read_bytes())
        kind: Literal["image", "pdf"] = "pdf" if mime == "application/pdf" else "image"
        id_ = f"a_{secrets.token_urlsafe(18)}"
        attachment = Attachment(id_, kind, mime, clean_name(name, mime), len(clean), width, height)
        folder = self._folder / conversation
        folder.mkdir(mode=0o700, exist_ok=True)
        part.write_bytes(clean)
        part.replace(folder / f"{id_}.bin")
        described = folder / f".{id_}.json"
        described.write_text(json.dumps(attachment.data(), ensure_ascii=False), encoding="utf-8")
        described.replace(folder / f"{id_}.json")
        return attachment

    def _load(self, conversation: str, id_: str) -> Attachment | None:
        # Both are visitors' words: only what we could have made ourselves becomes part of a path.
        if _CONVERSATION.fullmatch(conversation) is None or _ID.fullmatch(id_) is None:
            return None
        try:
            return Attachment(**json.loads((self._folder / conversation / f"{id_}.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise StorageUnavailable from exc

    def _kept(self, conversation: str) -> list[Attachment]:
        names = (self._folder / conversation).glob("a_*.json")
        return [a for a in (self._load(conversation, name.stem) for name in names) if a is not None]

    def _sweep(self, used: set[str], conversation: str, max_age_s: float) -> int:
        n = 0
        for described in (self._folder / conversation).glob("a_*.json"):
            if described.stem not in used and time.time() - described.stat().st_mtime > max_age_s:
                described.unlink(missing_ok=True)
                described.with_suffix(".bin").unlink(missing_ok=True)
                n += 1
        return n


def clean_name(name: str, mime: str) -> str:
    """Return a name to show and to save under: no path, no control or bidi character, the suffix of the type."""
    name = PureWindowsPath(PurePosixPath(name).name).name
    name = "".join(
        c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c)[0] != "C" and c not in '"<>'
    )
    stem = name.strip(". ")
    suffix = next((s for s in SUFFIXES[mime] if stem.lower().endswith(s)), "")
    stem = stem[: len(stem) - len(suffix)].strip(". ")[:MAX_NAME_CHARS] or "file"
    return stem + (suffix or SUFFIXES[mime][0])


def clean_file(data: bytes) -> tuple[bytes, str, int, int]:
    """
    Return (bytes to keep, MIME type, width, height) of a file that is what its first bytes say.

    Raises:
        UnsupportedFile: it is not; the text says why.
    """
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            clean, width, height = _png(data)
            mime = "image/png"
        elif data.startswith(b"\xff\xd8\xff"):
            clean, width, height = _jpeg(data)
            mime = "image/jpeg"
        elif data[:6] in (b"GIF87a", b"GIF89a"):
            clean, width, height = _gif(data)
            mime = "image/gif"
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            clean, width, height = _webp(data)
            mime = "image/webp"
        elif re.match(rb"%PDF-[12]\.\d", data):
            if b"%%EOF" not in data[-1024:] or b"startxref" not in data[-2048:]:
                raise UnsupportedFile("the PDF has no end; it is cut or damaged")
            return data, "application/pdf", 0, 0
        else:
            raise UnsupportedFile("only PNG, JPEG, WebP, GIF and PDF files are taken")
    except (IndexError, struct.error):
        raise UnsupportedFile("the picture ends too early") from None
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise UnsupportedFile(f"a picture of {width} x {height} pixels is not taken; the limit is 50 megapixels")
    return clean, mime, width, height


# Kept: what the picture needs. Not text (tEXt, zTXt, iTXt), eXIf, tIME, nor what nobody knows.
_PNG_KEPT = {
    *(b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"pHYs"),
    *(b"acTL", b"fcTL", b"fdAT", b"cICP"),
}


def _png(data: bytes) -> tuple[bytes, int, int]:
    """W3C PNG, third edition: chunks of length, type, data, CRC-32; IHDR first, IEND last."""
    out, at, width, height, has_data = [data[:8]], 8, 0, 0, False
    while True:
        (length,) = struct.unpack_from(">I", data, at)
        type_ = data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data):
            raise UnsupportedFile("the PNG ends too early")
        (crc,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(data[at + 4 : end - 4]) != crc:
            raise UnsupportedFile("the PNG is damaged")
        if (type_ == b"IHDR") != (at == 8) or (type_ == b"IHDR" and length != 13):
            raise UnsupportedFile("the PNG has no header")
        if type_ == b"IHDR":
            width, height, depth, colour, compression, filter_, interlace = struct.unpack_from(">IIBBBBB", data, at + 8)
            if (
                depth not in (1, 2, 4, 8, 16)
                or colour not in (0, 2, 3, 4, 6)
                or compression
                or filter_
                or interlace > 1
            ):
                raise UnsupportedFile("the PNG's header is damaged")
        has_data = has_data or type_ == b"IDAT"
        if type_ in _PNG_KEPT:
            out.append(data[at:end])
        at = end
        if type_ == b"IEND":
            break
    if not has_data:
        raise UnsupportedFile("the PNG has no picture")
    return b"".join(out), width, height


_JPEG_DATA_ENDS = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def _jpeg(data: bytes) -> tuple[bytes, int, int]:
    """ITU T.81: segments of marker and length, entropy-coded data after SOS, EOI."""
    out, at, width, height, has_scan, orientation = [data[:2]], 2, 0, 0, False, 1
    while True:
        if data[at] != 0xFF:
            raise UnsupportedFile("the JPEG is damaged")
        while data[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker = data[at + 1]
        if marker == 0xD9:
            break
        (length,) = struct.unpack_from(">H", data, at + 2)
        end = at + 2 + length
        if length < 2 or end > len(data):
            raise UnsupportedFile("the JPEG ends too early")
        body = data[at + 4 : end]
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", body, 1)
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _orientation(body[6:])
        kept = (
            marker in _JPEG_FRAMES
            or marker in (0xC4, 0xCC, 0xDA, 0xDB, 0xDD)  # tables, scans, restart interval
            or (marker == 0xE0 and body.startswith(b"JFIF\0"))
            or (marker == 0xE2 and body.startswith(b"ICC_PROFILE\0"))
            or (marker == 0xEE and body.startswith(b"Adobe"))
        )
        if marker == 0xDA:
            has_scan = True
            following = _JPEG_DATA_ENDS.search(data, end)
            if following is None:
                raise UnsupportedFile("the JPEG ends too early")
            end = following.start()
        if kept:
            out.append(data[at:end])
        at = end
    if not has_scan:
        raise UnsupportedFile("the JPEG has no picture")
    if 2 <= orientation <= 8:  # a phone's picture lies on its side without it
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)
        out.insert(1, b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
    return b"".join(out) + b"\xff\xd9", width, height


def _orientation(tiff: bytes) -> int:
    """Return tag 0x0112 of the first directory of an EXIF block; 1 (upright) where there is none."""
    order = {b"MM": ">", b"II": "<"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (n,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * min(n, 100), 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == 0x0112 and kind == 3:
                return int(value)
    except struct.error:
        pass
    return 1


def _gif(data: bytes) -> tuple[bytes, int, int]:
    """GIF89a: screen, colour table, blocks; comments, plain text and unknown applications are left out."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    out, has_image = [data[:at]], False
    while (kind := data[at]) != 0x3B:
        begin = at
        if kind == 0x21:
            label = data[at + 1]
            kept = label == 0xF9 or (label == 0xFF and data[at + 3 : at + 14] in (b"NETSCAPE2.0", b"ANIMEXTS1.0"))
            at += 2
        elif kind == 0x2C:
            kept = has_image = True
            local = data[at + 9]
            at += 11 + (3 << (local & 7) + 1 if local & 0x80 else 0)
        else:
            raise UnsupportedFile("the GIF is damaged")
        while n := data[at]:  # sub-blocks
            at += n + 1
        at += 1
        if at > len(data):
            raise UnsupportedFile("the GIF ends too early")
        if kept:
            out.append(data[begin:at])
    if not has_image:
        raise UnsupportedFile("the GIF has no picture")
    return b"".join(out) + b";", width, height


def _webp(data: bytes) -> tuple[bytes, int, int]:
    """RFC 9649: a RIFF of chunks. EXIF and XMP are left out, and their flags cleared."""
    (size_bytes,) = struct.unpack_from("<I", data, 4)
    end = 8 + size_bytes
    if end > len(data) or size_bytes < 12:
        raise UnsupportedFile("the WebP ends too early")
    out: list[bytes] = []
    at, width, height, has_image = 12, 0, 0, False
    while at + 8 <= end:
        type_ = data[at : at + 4]
        (length,) = struct.unpack_from("<I", data, at + 4)
        body = data[at + 8 : at + 8 + length]
        if at + 8 + length > end:
            raise UnsupportedFile("the WebP ends too early")
        if type_ == b"VP8X" and not out:
            width, height = (1 + int.from_bytes(body[n : n + 3], "little") for n in (4, 7))
            body = bytes([body[0] & ~0x0C]) + body[1:10]
        elif type_ == b"VP8 ":
            if body[3:6] != b"\x9d\x01\x2a":
                raise UnsupportedFile("the WebP is damaged")
            shown = tuple(value & 0x3FFF for value in struct.unpack_from("<HH", body, 6))
            width, height = (width, height) if width else shown
        elif type_ == b"VP8L":
            if body[0] != 0x2F:
                raise UnsupportedFile("the WebP is damaged")
            (bits,) = struct.unpack_from("<I", body, 1)
            width, height = (width, height) if width else (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
        has_image = has_image or type_ in (b"VP8 ", b"VP8L", b"ANMF")
        if type_ in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"ICCP"):
            out.append(type_ + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2))
        at += 8 + length + length % 2
    if not has_image:
        raise UnsupportedFile("the WebP has no picture")
    clean = b"WEBP" + b"".join(out)
    return b"RIFF" + struct.pack("<I", len(clean)) + clean, width, height
