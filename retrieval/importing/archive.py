"""
XLSX and DOCX are ZIP archives of XML: look through one before a library opens it. Knows no spreadsheets or documents.

Sizes are measured by unpacking, not believed: a header may lie. Everything is streamed; nothing is kept but what the
caller asks to see. XML with a document type is refused whole, since no office program writes one and every entity
expansion needs one.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from retrieval.importing.limits import MAX_PART_BYTES, MAX_PARTS, MAX_RATIO, MAX_UNPACKED_BYTES, MiB
from retrieval.importing.refused import Refused

_CHUNK = 2**16
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # .xls, .doc, and every encrypted file of Office
_DOCTYPE = tuple("<!DOCTYPE".encode(encoding) for encoding in ("ascii", "utf-16-le", "utf-16-be"))


def check_archive(path: Path, form: str, needed: str, look: Callable[[str, bytes], None] | None = None) -> int:
    """
    Return how many bytes of XML the archive holds, after all of it was unpacked once; `form` is "xlsx" or "docx".

    `look` is shown every chunk of every XML part, with the part's name.

    Raises:
        Refused: no such archive, encrypted, cut off, a bomb, or without the part `needed`.
    """
    with path.open("rb") as file:
        if file.read(8) == _OLE:
            kind = "Excel" if form == "xlsx" else "Word"
            raise Refused(f"is protected by a password or of an old {kind}; open it and save it as .{form} without one")
    try:
        with zipfile.ZipFile(path) as archive:
            return _check(archive, form, needed, look)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError, RuntimeError) as exc:
        again = f"save it again as .{form}"
        raise Refused(f"is damaged, cut off or no {form.upper()} file ({str(exc)[:60]}); {again}") from exc


def _check(archive: zipfile.ZipFile, form: str, needed: str, look: Callable[[str, bytes], None] | None) -> int:
    parts = archive.infolist()
    if len(parts) > MAX_PARTS:
        raise Refused(f"{len(parts):,} parts, more than {MAX_PARTS:,}: no document is made so; save it again")
    if needed not in archive.namelist():
        raise Refused(f"is no {form.upper()} file ({needed} is not in it); save it again as .{form}")
    if sum(part.file_size for part in parts) > MAX_UNPACKED_BYTES:
        size = sum(part.file_size for part in parts) / MiB
        raise Refused(f"unpacks to {size:.0f} MiB, more than {MAX_UNPACKED_BYTES // MiB}; split it into several files")
    n_xml = 0
    for part in parts:
        if part.flag_bits & 1:
            raise Refused("is protected by a password; save a copy without one")
        if part.file_size > MiB and part.file_size > MAX_RATIO * max(part.compress_size, 1):
            times = part.file_size / max(part.compress_size, 1)
            why = "a bomb, or far too many empty cells; copy what matters into a new file"
            raise Refused(f"{part.filename} unpacks to {times:.0f} times its size: {why}")
        if not part.filename.lower().endswith((".xml", ".rels", ".vml")):
            continue
        size, tail = 0, b""
        with archive.open(part) as stream:
            while chunk := stream.read(_CHUNK):
                size += len(chunk)
                if size > MAX_PART_BYTES[form]:
                    limit = MAX_PART_BYTES[form] // MiB
                    raise Refused(f"{part.filename} unpacks to more than {limit} MiB; split it into several files")
                if any(mark in tail + chunk for mark in _DOCTYPE):
                    raise Refused(f"{part.filename} declares a document type, as attacks do; save it again in Office")
                if look is not None:
                    look(part.filename, chunk)
                tail = chunk[-32:]
        n_xml += size
    return n_xml
