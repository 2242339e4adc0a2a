"""Frames, without a socket: what is taken, what is refused and in which words, what goes out."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from bot import wire
from bot.errors import BadFrame, BotError, ClientError, EngineBusy, EngineFailed, RateLimited, TooLong
from bot.messages import Event
from bot.wire import dump_event, dump_failed, dump_frame, parse_frame


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"type":"ping"}', wire.Ping(type="ping")),
        ('{"type":"ask","id":"a1","text":"有货吗"}', wire.Ask(type="ask", id="a1", text="有货吗")),
        ('{"type":"ask","id":"a1","text":"hi","newer":{"x":1}}', wire.Ask(type="ask", id="a1", text="hi")),
        ('{"type":"hello","protocol":1,"after":0}', wire.Hello(type="hello", after=0)),
        ('{"type":"hello"}', wire.Hello(type="hello")),
        ('{"type":"rate","seq":2,"value":"down"}', wire.Rate(type="rate", seq=2, value="down")),
        ('{"type":"close","score":5}', wire.Close(type="close", score=5)),
        ('{"type":"typing","on":false}', wire.Typing(type="typing", on=False)),
    ],
)
def test_a_good_frame_is_parsed(text: str, expected: wire.ClientFrame) -> None:
    assert parse_frame(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "the frame is not valid JSON"),
        ('{"type":"ping","x":Infinity}', "the frame is not valid JSON"),
        ("[" * 8000, "the frame is not valid JSON"),
        ('"ask"', "the frame is not a JSON object"),
        ("{}", "'type' is missing"),
        ('{"type":"fly"}', "unknown type 'fly'"),
        ('{"type":["ask"]}', "unknown type"),
        ('{"type":"ask","id":"a1"}', "'text' is missing"),
        ('{"type":"ask","id":"","text":"hi"}', "'id' is empty"),
        ('{"type":"ask","id":"a1","text":"\\u3000"}', "'text' is empty"),
        ('{"type":"ask","id":"a1","text":"\\udc00"}', "lone surrogate"),
        ('{"type":"rate","seq":0,"value":"up"}', "'seq'"),
        ('{"type":"rate","seq":1,"value":"sideways"}', "'value'"),
        ('{"type":"typing","on":"yes"}', "'on'"),
    ],
)
def test_a_bad_frame_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(BadFrame) as refused:
        parse_frame(text)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (json.dumps({"type": "ask", "id": "a1", "text": "x" * 2001}), "'text' has 2001 characters; the limit is 2000"),
        (json.dumps({"type": "ask", "id": "a" * 65, "text": "x"}), "'id' has 65 characters; the limit is 64"),
        ('"' + "字" * 6000 + '"', "'frame' has 18002 bytes; the limit is 16384"),
    ],
)
def test_what_is_too_long_is_refused_with_its_length_and_limit(text: str, sentence: str) -> None:
    with pytest.raises(TooLong) as refused:
        parse_frame(text)
    assert str(refused.value) == sentence


def test_the_longest_question_fits_in_a_frame_in_any_script() -> None:
    for character in ("x", "字", "👍"):
        text = json.dumps({"type": "ask", "id": "a" * 64, "text": character * 2000}, ensure_ascii=False)
        assert isinstance(parse_frame(text), wire.Ask)


def test_an_event_goes_out_with_its_own_fields() -> None:
    event = Event(3, datetime(2026, 11, 11, 8, 30, 1, 5000, tzinfo=UTC), "rating", {"rated": 2, "value": "up"})
    assert json.loads(dump_event(event)) == {
        "type": "event",
        "seq": 3,
        "at": "2026-11-11T08:30:01.005Z",
        "kind": "rating",
        "rated": 2,
        "value": "up",
    }


def test_frames_are_short_readable_and_without_nulls() -> None:
    assert dump_frame("ack", id="a1", seq=1, duplicate=False, turn=None) == (
        '{"type":"ack","id":"a1","seq":1,"duplicate":false}'
    )
    assert "你好" in dump_frame("delta", text="你好")


def test_a_visitor_reads_their_own_fault_and_only_the_code_of_ours() -> None:
    theirs = json.loads(dump_failed(TooLong("text", 3000, 2000), id_="a1"))
    assert theirs == {
        "type": "failed",
        "id": "a1",
        "code": "too_long",
        "message": "'text' has 3000 characters; the limit is 2000",
        "retryable": False,
    }
    ours = json.loads(dump_failed(EngineFailed("CUDA error at /secret/path"), turn="a1"))
    assert (ours["code"], ours["turn"], ours["retryable"], ours["retry_after_s"]) == ("engine_failed", "a1", True, 1.0)
    assert "secret" not in ours["message"]
    bug = json.loads(dump_failed(KeyError("/secret/path")))
    assert (bug["code"], bug["retryable"]) == ("internal", False)
    assert "secret" not in bug["message"]
    assert json.loads(dump_failed(RateLimited(12.0)))["retry_after_s"] == 12.0
    assert json.loads(dump_failed(EngineBusy(3.0)))["code"] == "busy"


def test_every_error_of_ours_has_a_sentence_for_visitors() -> None:
    def below(kind: type[BotError]) -> list[type[BotError]]:
        return [kind, *(deeper for child in kind.__subclasses__() for deeper in below(child))]

    from bot import errors

    for kind in below(errors.ServerError):
        if kind.__module__ == errors.__name__ and kind is not errors.ServerError:
            assert kind.code in wire._PLAIN, kind
    assert issubclass(errors.Conflict, ClientError)
