"""Files from visitors: what is taken, what is left of it, who gets it, and what is never served or written."""

from __future__ import annotations

import struct
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from bot import attachments
from bot.answer import Answerer
from bot.attachments import AttachmentStore, clean_file, clean_name
from bot.errors import TooLong, UnsupportedFile
from bot.messages import Event, Reply
from bot.uploads import sweep_unused
from tests.fake_retriever import FakeRetriever
from tests.fakes import store_profile
from tests.running import Running, Wire, running_server

EVIL = b"<script>alert(1)</script>"


def chunk(type_: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + type_ + body + struct.pack(">I", zlib.crc32(type_ + body))


def png(width: int = 3, height: int = 2, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + b"\x7f" * 3 for _ in range(2)))
    chunks = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg(*extra: bytes, width: int = 3, height: int = 2) -> bytes:
    frame = segment(0xC0, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00")
    scan = segment(0xDA, b"\x01\x01\x00\x00\x3f\x00") + b"\x12\xff\x00\x34\xff\xd0\x56"
    return b"\xff\xd8" + segment(0xE0, b"JFIF\0" + bytes(9)) + b"".join(extra) + frame + scan + b"\xff\xd9"


def exif(orientation: int) -> bytes:
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4) + b"GPS 31.2N 121.5E")


def block(body: bytes) -> bytes:
    return bytes([len(body)]) + body + b"\0"


def gif(extra: bytes = b"") -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", 3, 2, 0x80, 0, 0) + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, 3, 2, 0) + b"\x02\x02\x44\x01\x00"
    return screen + extra + image + b";"


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(t + struct.pack("<I", len(b)) + b + b"\0" * (len(b) % 2) for t, b in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


VP8L = (b"VP8L", b"\x2f" + struct.pack("<I", 2 | 1 << 14) + b"\0\0\0")
VP8X = (b"VP8X", bytes([0x0C, 0, 0, 0]) + (2).to_bytes(3, "little") + (1).to_bytes(3, "little"))
PDF = b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\nstartxref\n9\n%%EOF\n"


@pytest.mark.parametrize(
    ("data", "mime"),
    [
        (png(), "image/png"),
        (jpeg(), "image/jpeg"),
        (gif(), "image/gif"),
        (riff(VP8L), "image/webp"),
        (riff(VP8X, VP8L), "image/webp"),
    ],
)
def test_pictures_are_known_by_their_bytes_and_nothing_is_kept_behind_them(data: bytes, mime: str) -> None:
    clean, found, width, height = clean_file(data + EVIL)
    assert (found, width, height) == (mime, 3, 2)
    assert EVIL not in clean
    assert clean_file(clean) == (clean, mime, 3, 2)


@pytest.mark.parametrize(
    "data",
    [
        png(3, 2, chunk(b"tEXt", EVIL), chunk(b"eXIf", b"GPS 31.2N"), chunk(b"iTXt", EVIL), chunk(b"zzZz", EVIL)),
        jpeg(
            exif(1), segment(0xFE, EVIL), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + EVIL), segment(0xED, EVIL)
        ),
        gif(
            b"\x21\xfe"
            + bytes([len(EVIL)])
            + EVIL
            + b"\0"
            + b"\x21\xff\x0bXMP DataXMP"
            + bytes([len(EVIL)])
            + EVIL
            + b"\0"
        ),
        riff(VP8X, VP8L, (b"EXIF", b"GPS 31.2N"), (b"XMP ", EVIL), (b"EVIL", EVIL)),
    ],
)
def test_places_comments_and_hidden_files_are_removed(data: bytes) -> None:
    assert EVIL in data
    clean, *_ = clean_file(data)
    assert EVIL not in clean
    assert b"GPS" not in clean


def test_a_picture_taken_sideways_stays_upright() -> None:
    clean, *_ = clean_file(jpeg(exif(6)))
    assert struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) in clean
    assert b"Exif" not in clean_file(jpeg(exif(1)))[0]


REFUSED = {
    "empty": b"",
    "text": b"hello",
    "html": b"<!doctype html>" + EVIL,
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>',
    "zip": b"PK\x03\x04" + bytes(100),
    "exe": b"MZ" + bytes(100),
    "html that begins like a gif": b"GIF89a/*" + EVIL,
    "png of 100,000 x 100,000": png(100_000, 100_000),
    "png of 0 x 2": png(0, 2),
    "png without a picture": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 8, 0, 0, 0, 0]))
    + chunk(b"IEND", b""),
    "png whose header is later": b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b"") + png()[8:],
    "png with a bad checksum": png()[:-20] + b"\0" + png()[-19:],
    "png with a colour type that is none": png().replace(
        struct.pack(">IIBB", 3, 2, 8, 0), struct.pack(">IIBB", 3, 2, 8, 5)
    ),
    "png of a length beyond its end": b"\x89PNG\r\n\x1a\n\x7f\xff\xff\xffIHDR" + bytes(20),
    "jpeg of 65,535 x 65,535": jpeg(width=65_535, height=65_535),
    "jpeg without a picture": b"\xff\xd8" + segment(0xE0, b"JFIF\0") + b"\xff\xd9",
    "webp of 16,384 x 16,384": riff((b"VP8X", bytes(4) + b"\xff\x3f\0\xff\x3f\0"), VP8L),
    "webp without a picture": riff((b"EXIF", EVIL)),
    "webp of another size than it says": riff(VP8L)[:-4],
    "pdf without an end": PDF[:-12],
    "pdf behind something else": EVIL + PDF,
    "wave": b"RIFF\x10\0\0\0WAVEfmt " + bytes(8),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_whole_picture_or_pdf_is_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedFile):
        clean_file(data)


@pytest.mark.parametrize("whole", [png(), jpeg(), gif(), riff(VP8X, VP8L)], ids=["png", "jpeg", "gif", "webp"])
def test_a_picture_cut_anywhere_is_refused(whole: bytes) -> None:
    for n in range(len(whole)):
        with pytest.raises(UnsupportedFile):
            clean_file(whole[:n])


@pytest.mark.parametrize(
    ("name", "mime", "shown"),
    [
        ("lamp.PNG", "image/png", "lamp.png"),
        ("../../etc/passwd", "image/png", "passwd.png"),
        ("C:\\temp\\evil.html", "image/jpeg", "evil.html.jpg"),
        ("台灯 破损.jpeg", "image/jpeg", "台灯 破损.jpeg"),
        ("gpj.\u202eexe.png", "image/png", "gpj.exe.png"),
        ("a\r\nSet-Cookie: x\0.pdf", "application/pdf", "aSet-Cookie: x.pdf"),
        ("", "image/gif", "file.gif"),
        ("...", "image/gif", "file.gif"),
        ("x" * 300 + ".png", "image/png", "x" * 100 + ".png"),
    ],
)
def test_a_name_is_for_people_and_has_the_suffix_of_the_type(name: str, mime: str, shown: str) -> None:
    assert clean_name(name, mime) == shown


async def bytes_of(*chunks: bytes) -> AsyncIterator[bytes]:
    for each in chunks:
        yield each


async def test_a_conversation_has_room_for_so_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AttachmentStore(tmp_path / "files")
    monkeypatch.setattr(attachments, "MAX_PER_CONVERSATION", 2)
    kept = [await store.save("c_1", "a.png", bytes_of(png())) for _ in range(2)]
    with pytest.raises(TooLong, match="'attachments' has 3 files; the limit is 2"):
        await store.save("c_1", "a.png", bytes_of(png()))
    await store.save("c_2", "a.png", bytes_of(png()))  # another's room
    monkeypatch.setattr(attachments, "MAX_PER_CONVERSATION", 20)
    monkeypatch.setattr(attachments, "MAX_CONVERSATION_BYTES", sum(a.size_bytes for a in kept) + 10)
    with pytest.raises(TooLong, match="bytes left"):
        await store.save("c_1", "a.png", bytes_of(png()))
    monkeypatch.setattr(attachments, "MAX_FILE_BYTES", 50)
    with pytest.raises(TooLong, match="'file'"):
        await store.save("c_3", "a.png", bytes_of(png()[:40], png()[40:]))
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == ["c_1", "c_2"]  # nothing half-written stays
    assert await store.sweep([kept[0].id], "c_1", max_age_s=-1) == 1
    assert [a.id for a in await store.find("c_1", [a.id for a in kept])] == [kept[0].id]
    await store.delete("c_1")
    assert not (tmp_path / "files" / "c_1").exists()


@pytest.mark.parametrize("conversation", ["..", "c_/../../x", "c_", "", "c_1/..", "/etc", "c_\0"])
async def test_no_word_of_a_visitor_becomes_a_path(conversation: str, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    store = AttachmentStore(tmp_path / "files")
    with pytest.raises(UnsupportedFile):
        await store.save(conversation, "x.png", bytes_of(png()))
    assert await store.find(conversation, ["../secret", "secret"]) == []
    assert await store.find("c_1", ["../../secret", "a_" + "../" * 8]) == []
    await store.delete(conversation)
    assert (tmp_path / "secret.json").exists()


# Through the door


def address(server: Running, conversation: str, id_: str = "") -> str:
    path = f"{server.http_url}/v1/conversations/{conversation}/attachments"
    return f"{path}/{id_}" if id_ else path


async def test_a_visitor_sends_a_picture_and_both_sides_can_see_it(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "log.db") as server,
        Wire(server.ws_url) as tab,
        Wire(server.ws_url) as other,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        welcome = await tab.hello()
        assert welcome["limits"]["attachment_types"][0] == "image/png"
        stranger = await other.hello()
        url, token = address(server, welcome["conversation"]), {"Authorization": f"Bearer {welcome['token']}"}
        response = await http.post(f"{url}?name=lamp.html", content=jpeg(exif(6)), headers=token)
        assert response.status_code == 201
        file = response.json()
        assert {k: file[k] for k in ("kind", "mime", "name", "width", "height")} == {
            **{"kind": "image", "mime": "image/jpeg", "name": "lamp.html.jpg", "width": 3, "height": 2}
        }

        await tab.say("ask", id="a1", text="", attachments=[file["id"]])
        event = await tab.hear("event", role="visitor")
        assert (event["text"], event["attachments"]) == ("", [file])
        await tab.hear("event", role="bot")
        await tab.say("ask", id="a1", text="", attachments=[file["id"]])
        assert (await tab.hear("ack"))["duplicate"]
        await tab.say("ask", id="a1", text="", attachments=[])
        assert (await tab.hear("failed", id="a1"))["code"] == "bad_frame"
        await tab.say("ask", id="a1", text="other", attachments=[file["id"]])
        assert (await tab.hear("failed", id="a1"))["code"] == "conflict"
        await other.say("ask", id="b1", text="mine?", attachments=[file["id"]])  # a file is of one conversation
        assert "no file of this conversation" in (await other.hear("failed", id="b1"))["message"]
        await tab.say("ask", id="a2", text="x", attachments=["a"] * 6)
        assert (await tab.hear("failed", id="a2"))["code"] == "too_long"

        shown = await http.get(address(server, welcome["conversation"], file["id"]), headers=token)
        assert (shown.status_code, shown.headers["content-type"]) == (200, "image/jpeg")
        assert shown.headers["x-content-type-options"] == "nosniff"
        assert shown.headers["content-security-policy"] == "default-src 'none'; sandbox"
        assert shown.headers["content-disposition"].startswith("inline; filename*=UTF-8''lamp.html.jpg")
        assert b"GPS" not in shown.content
        theirs = {"Authorization": f"Bearer {stranger['token']}"}
        for headers in ({}, theirs, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {welcome['token']}"}):
            denied = await http.get(address(server, welcome["conversation"], file["id"]), headers=headers)
            assert (denied.status_code, denied.json()["error"]["code"]) == (401, "unknown_conversation")
        missing = await http.get(address(server, stranger["conversation"], file["id"]), headers=theirs)
        assert missing.status_code == 404


async def test_files_that_were_never_sent_or_have_no_conversation_are_swept(tmp_path: Path) -> None:
    async with running_server(tmp_path / "log.db") as server, Wire(server.ws_url) as tab:
        welcome, store = await tab.hello(), server.parts.attachments
        assert store is not None
        conversation = welcome["conversation"]
        sent, unsent = [await store.save(conversation, "a.png", bytes_of(png())) for _ in range(2)]
        await store.save("c_gone", "a.png", bytes_of(png()))
        await tab.say("ask", id="a1", text="look", attachments=[sent.id])
        await tab.hear("event", role="bot")

        async def events_of(id_: str) -> Sequence[Event]:
            await server.storage.get(id_)
            return await server.storage.events(id_)

        assert await sweep_unused(store, events_of) == 0  # too young
        assert await sweep_unused(store, events_of, max_age_s=-1.0) == 1
        assert await store.find(conversation, [sent.id, unsent.id]) == [sent]
        assert await store.conversations() == [conversation]


async def test_what_is_refused_says_why(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "log.db") as server,
        Wire(server.ws_url) as tab,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        welcome = await tab.hello()
        url, token = address(server, welcome["conversation"]), {"Authorization": f"Bearer {welcome['token']}"}

        async def post(content: Any, **headers: str) -> tuple[int, str]:
            response = await http.post(url, content=content, headers={**token, **headers})
            return response.status_code, response.json()["error"]["code"]

        assert await post(REFUSED["svg"], **{"Content-Type": "image/png"}) == (415, "unsupported_file")
        assert await post(b"\xff\xd8\xff" + bytes(11 * 1024 * 1024)) == (413, "too_long")
        assert await post(bytes_of(*[bytes(1024 * 1024)] * 11)) == (413, "too_long")  # without a length to go by
        assert await post(png(), Authorization="Bearer no") == (401, "unknown_conversation")
        assert await post(png(), Origin="https://evil.example") == (403, "origin")
        pdf = (await http.post(f"{url}?name=invoice.pdf", content=PDF, headers=token)).json()
        shown = await http.get(address(server, welcome["conversation"], pdf["id"]), headers=token)
        assert shown.headers["content-disposition"].startswith("attachment;")
        asked = await http.options(url, headers={"Origin": server.http_url})
        assert asked.headers["access-control-allow-origin"] == server.http_url
        assert "Authorization" in asked.headers["access-control-allow-headers"]


@pytest.mark.parametrize(("locale", "words"), [("zh-CN", "人工客服"), ("en", "human")])
async def test_the_bot_says_that_it_cannot_see_files_and_offers_a_human(locale: str, words: str) -> None:
    answerer = Answerer(retriever=FakeRetriever([], {}), engine=None, profile=store_profile())
    replies = [step async for step in answerer.answer((), "", locale=locale) if isinstance(step, Reply)]
    answerer.close()
    assert [r.outcome for r in replies] == ["no_answer"]
    assert words in replies[0].text
    assert replies[0].quick_replies


async def test_a_server_without_a_place_for_files_offers_none(tmp_path: Path) -> None:
    async with running_server(tmp_path / "log.db", attachments=False) as server, Wire(server.ws_url) as tab:
        assert "attachments" not in (await tab.hello())["limits"]
