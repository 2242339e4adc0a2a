"""`python -m finetune distill`: a teacher over a real socket, whose answers are known beforehand. No model, no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.__main__ import main
from finetune.data import load_data
from finetune.distill import is_refusal
from finetune.importing import ImportConfig, import_dialogues
from tests.openai_server import openai_server

Model = Callable[[list[dict[str, str]]], str]


def imported(folder: Path, talks: list[list[str]]) -> Path:
    lines = [
        {"messages": [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(talk)]}
        for talk in talks
    ]
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8")
    import_dialogues(ImportConfig(files=(str(source),), valid=0.0, test=0.0), folder)
    return folder


def question_of(messages: list[dict[str, str]]) -> str:
    return re.split(r"简短回答：|in English: ", messages[-1]["content"])[-1]


@contextmanager
def teacher(model: Model, seen: list[Any] | None = None) -> Iterator[list[str]]:
    with openai_server("big", model, seen) as url:
        yield ["--teacher", f"big@{url}"]


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_teacher_s_answers_take_the_place_of_people_s_and_bad_ones_are_dropped_by_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {
        "how long does delivery take?": ("yes so delivery takes 3 days dear", "Delivery takes 3 days."),
        "what does the lamp cost?": ("hello it is 59 yuan dear", "The lamp costs 95 yuan."),
        "can I return a rug?": ("sure within 7 days you can", "可以，7天内退货。"),
        "is the shelf made of oak?": ("it is oak, 18 mm thick", "I don't know, shall I get a human agent?"),
        "do you wrap gifts?": ("sure dear we do wrap those", ""),
    }
    data = imported(tmp_path / "data", [[q, a] for q, (a, _) in answers.items()])
    out = tmp_path / "out"
    with teacher(lambda m: answers[question_of(m)][1]) as given:
        assert main(["distill", "--data", str(data), "--out", str(out), *given, "--json"]) == 0
    found = report(capsys)
    assert found["teacher"] == "big"
    assert found["n_made"] == 1
    assert found["counts"]["left out: states what no passage holds (number)"] == 1
    assert found["counts"]["left out: another language"] == 1
    assert found["counts"]["left out: refuses what the passages answer"] == 1
    assert found["counts"]["left out: too short or too long"] == 1
    made = load_data(out)
    (dialogue,) = made.splits["train"]
    assert [line.text for line in dialogue.lines] == ["how long does delivery take?", "Delivery takes 3 days."]
    assert made.lineage is not None
    assert made.lineage["teacher"] == "big"
    assert made.lineage["of"] == load_data(data).sha256


def test_later_questions_are_asked_with_the_answers_that_stand_before_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = imported(tmp_path / "data", [["do you ship abroad?", "well yes", "to Peru also?", "yes also to Peru"]])
    seen: list[Any] = []
    with teacher(lambda m: f"Sure, answer to: {question_of(m)}", seen) as given:
        assert main(["distill", "--data", str(data), "--out", str(tmp_path / "out"), *given, "--json"]) == 0
    (last,) = [m for m in seen if question_of(m) == "to Peru also?"]
    assert [m["content"] for m in last[1:-1]] == ["do you ship abroad?", "Sure, answer to: do you ship abroad?"]
    assert report(capsys)["counts"]["kept"] == 2


def test_what_was_said_before_in_a_dialogue_is_not_learned_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = imported(tmp_path / "data", [["do you ship abroad?", "well yes", "to Peru also?", "yes also to Peru"]])
    with teacher(lambda m: "Yes, we do ship abroad.") as given:
        assert main(["distill", "--data", str(data), "--out", str(tmp_path / "out"), *given, "--json"]) == 0
    assert report(capsys)["counts"]["left out: the same answer again"] == 1
    (dialogue,) = load_data(tmp_path / "out").splits["train"]
    assert [line.learn for line in dialogue.lines if line.role == "assistant"] == [True, False]


def test_a_killed_command_goes_on_without_asking_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("lamp", "rug", "pan", "quilt", "shelf", "table", "chair", "kettle", "mirror", "candle", "towel", "clock")
    data = imported(tmp_path / "data", [[f"is the {n} in stock?", f"yes the {n} is, dear"] for n in names])
    command = ["distill", "--data", str(data), "--out", str(tmp_path / "out"), "--json"]
    seen: list[Any] = []

    def breaks(messages: list[dict[str, str]]) -> str:
        if len(seen) > 6:
            raise RuntimeError("this connection breaks")
        return f"The one you ask of is here: {question_of(messages)[7:-10]}"

    with teacher(breaks, seen) as given:
        url = given[1]
        assert main([*command, *given]) == 1
        assert "failed" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    again: list[Any] = []
    with teacher(lambda m: f"The one you ask of is here: {question_of(m)[7:-10]}", again) as given:
        assert given[1] != url
        assert main([*command, *given]) == 0
    assert report(capsys)["n_made"] == len(names)
    assert len(again) <= len(names) - 6  # what had been said is not asked again


def test_unanswered_questions_are_labelled_only_where_the_teacher_agrees_with_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = imported(tmp_path / "data", [["are you open today?", "we are open, dear"]])
    unlabelled = tmp_path / "open.jsonl"
    questions = ["does the lamp come with a 12 W bulb?", "is the 40 cm pan heavy?", "are you open today?"]
    unlabelled.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": q}]}) + "\n" for q in questions), encoding="utf-8"
    )
    drawn = iter(["It weighs a lot.", "It is light.", "No idea at all.", "Feather-like.", "Heavy as lead."])

    def answer(messages: list[dict[str, str]]) -> str:
        asked = question_of(messages)
        return "Yes, with a 12 W bulb." if "bulb" in asked else next(drawn)

    command = ["distill", "--make", "pseudo", "--unlabelled", str(unlabelled), "--data", str(data)]
    with teacher(answer) as given:
        assert main([*command, "--out", str(tmp_path / "out"), *given, "--json"]) == 0
    found = report(capsys)
    assert found["n_made"] == 1
    assert found["counts"]["left out: not sure of it"] == 1
    train = load_data(tmp_path / "out").splits["train"]
    assert [d.lines[-1].text for d in train] == ["we are open, dear", "Yes, with a 12 W bulb."]


def test_back_translation_adds_other_wordings_with_the_same_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = imported(
        tmp_path / "data", [["台灯59元可以便宜点吗？", "亲，59元已是最低价"], ["地毯能退吗？", "可以退的亲"]]
    )
    sayings = {
        "台灯59元可以便宜点吗？": "Can the 59 yuan lamp be cheaper?",
        "Can the 59 yuan lamp be cheaper?": "59元的台灯能再优惠一些吗？",
        "地毯能退吗？": "Can the rug be returned within 7 days?",
        "Can the rug be returned within 7 days?": "地毯7天内可以退货吗？",
    }
    with teacher(lambda m: sayings[m[-1]["content"].rpartition("\n")[2]]) as given:
        command = ["distill", "--make", "back-translation", "--data", str(data), "--out", str(tmp_path / "out")]
        assert main([*command, *given, "--json"]) == 0
    found = report(capsys)
    assert found["n_made"] == 1
    assert found["counts"]["left out: other figures or names than before"] == 1
    train = load_data(tmp_path / "out").splits["train"]
    assert [d.lines[0].text for d in train][-1] == "59元的台灯能再优惠一些吗？"
    assert train[-1].lines[1].text == "亲，59元已是最低价"


def test_what_cannot_be_done_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = imported(tmp_path / "data", [["are you open today?", "we are open, dear"]])
    for wrong in (
        ["--make", "pseudo"],
        ["--unlabelled", str(data / "train.jsonl")],
        ["--data", str(tmp_path / "none")],
        ["--out", str(data)],
    ):
        given = [
            "distill",
            "--data",
            str(data),
            "--out",
            str(tmp_path / "out"),
            "--teacher",
            "big@http://127.0.0.1:9/v1",
        ]
        assert main([*given, *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("reply", "refuses"),
    [
        ("抱歉，这个我不知道。", True),
        ("Sorry, I don't know that.", True),
        ("7天内可以退。", False),
        ("It is 3 days.", False),
    ],
)
def test_a_refusal_is_told_in_both_languages(reply: str, refuses: bool) -> None:
    assert is_refusal(reply) is refuses
