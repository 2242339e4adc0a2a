"""`python -m finetune search` on a tiny random model: real runs, pruned, resumed within a killed trial, seeded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.__main__ import main
from tests.finetune.tiny import build_data, build_model

ROOT = Path(__file__).parents[2]
SPACE = """
[lr]
low = 1e-5
high = 3e-2
log = true

[rank]
choices = [4, 8]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_data(tmp_path_factory.mktemp("data") / "imported", 30)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("space") / "space.toml"
    path.write_text(SPACE, encoding="utf-8")
    return path


def arguments(base: Path, data: Path, run: Path, space: Path | None, n: int, **flags: Any) -> list[str]:
    values = {"max-tokens": 150, "row-tokens": 300, "batch-tokens": 300, "max-steps": 4, "eval-every": 1, "epochs": 50,
              "threads": 1, "trials": n, **flags}  # fmt: skip
    listed = [a for k, v in values.items() for a in (f"--{k}", str(v))]
    named = ["--space", str(space)] if space else []
    return ["search", "--base", str(base), "--data", str(data), "--run", str(run), "--no-bf16", *named, *listed]


def trials(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "search.json").read_text(encoding="utf-8"))["trials"]
    return [{k: t[k] for k in ("number", "state", "value", "validations", "values")} for t in found]


@pytest.mark.timeout(180)
def test_a_search_prunes_finds_the_best_and_its_file_trains(
    base: Path, data: Path, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "search"
    assert main([*arguments(base, data, run, space, 8), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_trials"] == 8
    complete = [t for t in found["trials"] if t["state"] == "complete"]
    assert found["best"]["value"] == min(t["value"] for t in complete)
    assert found["n_pruned"] == len(found["trials"]) - len(complete)
    assert found["n_pruned"] >= 1
    for pruned in (t for t in found["trials"] if t["state"] == "pruned"):
        assert len(pruned["validations"]) < 4
    assert (run / "trials.png").read_bytes().startswith(b"\x89PNG")
    assert "| trial | perplexity |" in (run / "search.md").read_text(encoding="utf-8")
    # Every trial is a run; the best one's knobs are the file's.
    best = Path(found["best"]["run"])
    assert json.loads((best / "result.json").read_text())["best_perplexity"] == pytest.approx(
        found["best"]["value"], abs=1e-3
    )
    assert main(["train", "--config", str(run / "best.json"), "--run", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["best_loss"] == json.loads((best / "result.json").read_text())["best_loss"]


@pytest.mark.timeout(180)  # a second process imports torch
def test_a_killed_search_goes_on_in_the_trial_it_was_in_and_ends_as_one_that_was_not(
    base: Path, data: Path, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    flags = {"max-steps": 12, "eval-every": 2, "pruner": "none"}
    command = [sys.executable, "-m", "finetune", *arguments(base, data, cut, space, 3, **flags)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    events = cut / "trials" / "001" / "events.jsonl"
    deadline = time.monotonic() + 150
    while not events.exists() or events.read_text().count('"valid"') < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (cut / "search.json").exists()
    assert main(arguments(base, data, cut, space, 3, **flags)) == 0
    assert main(arguments(base, data, whole, space, 3, **flags)) == 0
    assert trials(cut) == trials(whole)
    assert [t["number"] for t in trials(cut)] == [0, 1, 2]
    # More trials are added to those there are; another space is another search.
    assert main(arguments(base, data, cut, space, 4, **flags)) == 0
    assert trials(cut)[:3] == trials(whole)
    assert main(arguments(base, data, cut, None, 4, **flags)) == 2
    assert "a search with another space" in capsys.readouterr().err


def test_a_classifiers_search_seeks_f1_and_ends_in_time(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(
        f"{'good' if n % 2 else 'bad'} thing {n * 7919 % 1000}{chr(97 + n % 26) * 5},{n % 2}\n" for n in range(60)
    )
    (tmp_path / "t.csv").write_text("text,label\n" + rows, encoding="utf-8")
    flags = {"task": "classify", "pruner": "hyperband", "method": "head", "time": "0s"}
    assert main([*arguments(base, tmp_path / "t.csv", tmp_path / "s", None, 5, **flags), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["objective"] == "f1_macro"
    assert found["n_trials"] == 1  # the time is over at once, and one trial is the least
    assert 0 <= found["best"]["value"] <= 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[colour]\nchoices = [1]\n", "colour: no knob that can be tried"),
        ("[lr]\nlow = 1\n", "lr: low and high are numbers"),
        ("[lr]\nlow = -1.0\nhigh = 1.0\n", "lr = -1.0: Input should be greater than 0"),
        ("[rank]\nlow = 1\nhigh = 9\nlog = true\nstep = 2\n", "log and step do not go together"),
        ("[rank]\nchoices = []\n", "choices is a list"),
        ("[rank\n", "space.toml"),
        ("", "no knob"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_in_one_line(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text, encoding="utf-8")
    assert main(arguments(base, data, tmp_path / "s", path, 2)) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()
