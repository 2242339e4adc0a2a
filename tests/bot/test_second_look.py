"""bot/second_look.py: one token of the model beside the search's confidence."""

from __future__ import annotations

import math

import pytest

from bot.messages import Message
from bot.second_look import chance_of_no, stands
from tests.fakes import ScriptedEngine

PROMPT = [Message("user", "Passages: …")]


@pytest.mark.parametrize(
    ("likely", "chance"),
    [
        ((("抱歉", math.log(0.75)), ("运", math.log(0.25))), 0.75),
        ((("I", math.log(0.5)), (" Sorry", math.log(0.2)), ("It", math.log(0.3))), 0.7),
        ((("So", math.log(0.5)), ("非", math.log(0.3)), ("In", math.log(0.2))), 0.0),  # so much else begins with these
        ((("不好", math.log(0.5)), ("不", math.log(0.3)), ("这个", math.log(0.2))), 0.5),
        ((("Unfortunately, no", 0.0),), 1.0),  # whole words, from servers with other tokens
    ],
)
async def test_the_chance_of_a_no_is_that_of_the_tokens_which_begin_one(
    likely: tuple[tuple[str, float], ...], chance: float
) -> None:
    engine = ScriptedEngine(likely=likely)
    assert await chance_of_no(engine, PROMPT) == pytest.approx(chance)
    assert engine.looks == [PROMPT]


async def test_an_engine_that_does_not_tell_decides_nothing() -> None:
    assert await chance_of_no(ScriptedEngine(), PROMPT) is None


def test_the_surer_the_search_is_the_surer_the_model_has_to_be_against_it() -> None:
    assert stands(0.55, 0.05)
    assert not stands(0.55, 0.6)
    assert stands(0.8, 0.6)
    assert not stands(0.8, 0.97)
    # However sure the model is, its word has a limit, and so has the search's.
    assert stands(0.999, 1.0) is stands(0.999, 0.9999)
    assert not stands(0.5, 0.5)
