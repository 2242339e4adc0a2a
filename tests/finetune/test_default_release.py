"""The default release's recipe and folder: made twice alike, no question of the cases, small enough to ship."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bot.evaluate import squeeze
from bot.phrases import NO_ANSWER_SAID
from finetune.data import load_data
from finetune.grounding import REFUSALS

ROOT = Path(__file__).resolve().parent.parent.parent
RELEASE = ROOT / "bot" / "default_release"
CASES = sorted((ROOT / "examples").rglob("*cases.jsonl"))


def make(out: Path, *arguments: str) -> list[dict[str, object]]:
    """Run the recipe without the demo store, which needs an embedder; return its conversations."""
    command = [sys.executable, str(ROOT / "examples" / "recipe" / "make.py"), "--out", str(out), "--fictional"]
    subprocess.run([*command, *arguments], check=True, capture_output=True, timeout=50)
    return [json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    out = tmp_path_factory.mktemp("recipe") / "data"
    return out, make(out)


def question_of(conversation: dict[str, object]) -> str:
    messages = conversation["messages"]
    assert isinstance(messages, list)
    return str(messages[-2][1])


def test_the_recipe_writes_the_same_bytes_twice(made: tuple[Path, list[dict[str, object]]], tmp_path: Path) -> None:
    make(tmp_path / "again")
    assert (made[0] / "train.jsonl").read_bytes() == (tmp_path / "again" / "train.jsonl").read_bytes()


def test_another_seed_writes_other_figures(made: tuple[Path, list[dict[str, object]]], tmp_path: Path) -> None:
    assert make(tmp_path / "other", "--seed", "1") != made[1]


def test_training_takes_the_folder_and_notices_a_changed_file(
    made: tuple[Path, list[dict[str, object]]], tmp_path: Path
) -> None:
    assert load_data(made[0]).rendered
    for path in made[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write("{}\n")
    with pytest.raises(Exception, match="changed since"):
        load_data(tmp_path)


def test_no_question_of_the_cases_is_trained_on(made: tuple[Path, list[dict[str, object]]]) -> None:
    lines = [line for path in CASES for line in path.read_text(encoding="utf-8").splitlines()]
    asked = {squeeze(turn) for line in lines for turn in json.loads(line)["turns"]}
    assert len(asked) > 150
    trained = {squeeze(question_of(c)).rpartition("回答:")[2] for c in made[1]}
    trained |= {squeeze(question_of(c)).rpartition("english:")[2] for c in made[1]}
    # And those that need the embedder to be made: their questions stand in files.
    for name in ("unanswerable.toml", "facts.toml", "promotions.toml"):
        text = squeeze((ROOT / "examples" / "recipe" / name).read_text(encoding="utf-8"))
        assert not [q for q in asked if len(q) > 6 and f'"{q}"' in text], name
    for path in (ROOT / "examples" / "demo" / "dialogues").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            trained |= {squeeze(m["content"]) for m in json.loads(line)["messages"] if m["role"] == "user"}
    for path in (ROOT / "examples" / "training").glob("*/questions.jsonl"):
        trained |= {squeeze(json.loads(line)["text"]) for line in path.read_text(encoding="utf-8").splitlines()}
    assert not asked & trained


def test_each_language_has_half_and_a_reply_is_never_empty(made: tuple[Path, list[dict[str, object]]]) -> None:
    chinese = sum("请根据以上资料" in question_of(c) for c in made[1])
    assert 0.4 < chinese / len(made[1]) < 0.6
    assert all(str(c["messages"][-1][1]).strip() for c in made[1])  # type: ignore[index]
    assert not [c for c in made[1] if "{" in json.dumps(c["messages"], ensure_ascii=False)]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_refusal_that_is_trained_is_recognised_when_it_is_said(language: str) -> None:
    assert all(NO_ANSWER_SAID.search(text) for text in REFUSALS[language])  # type: ignore[index]


def test_what_is_shipped_is_small_and_is_what_its_release_says() -> None:
    adapter = RELEASE / "adapter_model.safetensors"
    release = json.loads((RELEASE / "release.json").read_text(encoding="utf-8"))
    assert adapter.stat().st_size <= 12_000_000
    assert hashlib.sha256(adapter.read_bytes()).hexdigest() == release["adapter_sha256"]
    assert json.loads((RELEASE / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "LORA"
    assert (RELEASE / "README.md").read_text(encoding="utf-8").strip()
