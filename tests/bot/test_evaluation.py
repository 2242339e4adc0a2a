"""bot/evaluate.py and bot/settings.py: how cases are read and judged, how a store is described."""

from __future__ import annotations

from pathlib import Path

import pytest

from bot.errors import MerchantError
from bot.evaluate import Case, Verdict, judge, load_cases
from bot.settings import Settings, load_store_profile, settings_markdown

CASE = Case("c", "en", ("How long?",), (("30 days", "thirty days"), ("free",)), ("SPRING20",), "answer")


def test_every_fact_needs_one_of_its_wordings_whatever_case_width_and_spaces() -> None:
    assert judge(CASE, "Within ３０ DAYS, and it is Free.", "direct") == ((), ())
    missing, forbidden = judge(CASE, "thirty  days. Use spring20!", "direct")
    assert missing == (("free",),)
    assert forbidden == ("SPRING20",)


def test_a_forbidden_wording_costs_all_facts() -> None:
    verdict = Verdict(CASE, "30 days free SPRING20", "direct", (), ("SPRING20",), None, 1.0)
    assert verdict.facts_found == 0
    assert not verdict.passed


@pytest.mark.parametrize(
    ("expect", "outcome", "right"),
    [
        ("answer", "direct", True),
        ("answer", "no_answer", False),
        ("refuse", "refused", True),
        ("handoff", "direct", False),
    ],
)
def test_the_outcome_is_judged_too(expect: str, outcome: str, right: bool) -> None:
    case = Case("c", "en", ("q",), (), (), expect)
    assert Verdict(case, "", outcome, (), (), None, 1.0).outcome_right is right


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{oops", "line 1"),
        ('{"id": "a", "turns": ["x"]}\n{"id": "b"}', "line 2, turns: missing"),
        ('{"id": "a", "turns": [], "expect": "answer"}', "needs `turns`"),
        ('{"id": "a", "turns": ["x"], "expect": "maybe"}', "expect"),
        ("", "no cases"),
    ],
)
def test_a_wrong_cases_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(MerchantError, match=message):
        load_cases(file)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("name = ", "not valid TOML"),
        ("languages = ['zh']", "name"),
        ('name = "x"\nlanguages = ["fr"]', "languages"),
        ('name = "x"\ntimezone = "Mars/Base"', "timezone"),
    ],
)
def test_a_wrong_store_toml_is_named_with_its_field(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "store.toml").write_text(toml, encoding="utf-8")
    with pytest.raises(MerchantError, match=message):
        load_store_profile(tmp_path)


def test_a_store_needs_no_more_than_a_name(tmp_path: Path) -> None:
    (tmp_path / "store.toml").write_text(
        'name = "Tiny"\npersona = "Kind."\ncontact = "ask at the till"\n', encoding="utf-8"
    )
    profile = load_store_profile(tmp_path)
    assert profile.languages == ("zh", "en")
    assert profile.persona["zh"] == "Kind."
    assert profile.contact_line("en") == "ask at the till"
    assert "Tiny" in profile.greeting["en"]


def test_settings_come_from_the_command_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZHANGGUI_PORT", "8123")
    monkeypatch.setenv("ZHANGGUI_VLLM", '{"max_num_seqs": 4}')
    assert Settings().port == 8123
    assert Settings(port=9000).port == 9000
    assert Settings().vllm == {"max_num_seqs": 4}


def test_the_settings_page_is_generated_from_the_settings() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings_markdown(), "run `make docs`"
