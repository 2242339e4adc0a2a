"""`python -m finetune ablate`: changes of the data, each trained with and judged on the same held-out replies."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.__main__ import main
from finetune.data import load_data
from finetune.dialogues import Line
from finetune.distill import write_data
from tests.finetune.tiny import build_data, build_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_data(tmp_path_factory.mktemp("data") / "imported")


@pytest.fixture(scope="module")
def spoilt(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same import with replies that teach the wrong thing."""
    folder = tmp_path_factory.mktemp("spoilt") / "data"
    folder.mkdir()
    found = load_data(data)
    wrong = [
        replace(d, lines=tuple(Line("assistant", "QQQQ ZZZZ QQQQ") if n % 2 else q for n, q in enumerate(d.lines)))
        for d in found.splits["train"]
    ]
    write_data(folder, {**found.splits, "train": wrong}, data, {"work": "replies", "teacher": "fool"})
    return folder


def command(base: Path, data: Path, run: Path, *changes: str, **flags: Any) -> list[str]:
    given = {"max-tokens": 200, "row-tokens": 400, "batch-tokens": 800, "max-steps": 8, "eval-every": 8, "lr": "3e-3"}
    listed = [a for k, v in {**given, **flags}.items() for a in (f"--{k}", str(v))]
    where = ["--base", str(base), "--data", str(data), "--run", str(run)]
    tried = [a for c in changes for a in ("--change", c)]
    return ["ablate", *where, *tried, "--no-bf16", "--threads", "1", *listed, "--json"]


def test_a_change_that_spoils_the_data_is_left_out_and_the_report_says_what_each_brought(
    base: Path, data: Path, spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(command(base, data, run, f"fool={spoilt}", "typos")) == 0
    found = json.loads(capsys.readouterr().out)
    none, fool, typos = found["changes"]
    assert (none["kept"], fool["kept"]) == (True, False)
    assert fool["against_kept"]["perplexity"]["low"] > 0
    # What was left out is not in what is tried next.
    assert typos["n_dialogues"] > none["n_dialogues"] == len(load_data(data).splits["train"])
    assert "QQQQ" not in (run / "data" / "2-typos" / "train.jsonl").read_text(encoding="utf-8")
    assert found["kept"] == [r["change"] for r in (fool, typos) if r["kept"]]
    # The best run is one like any other, and names what its data was made by.
    head = json.loads((run / "runs" / "1-fool" / "run.json").read_text(encoding="utf-8"))
    assert (head["data_lineage"]["work"], head["data_lineage"]["teacher"]) == ("fool", "fool")
    assert (Path(found["run"]) / "result.json").is_file()
    page = (run / "ablate.html").read_text(encoding="utf-8")
    assert "left out" in page
    assert "fool" in page

    # The same command makes only what is missing, and says the same.
    kept = (run / "runs" / "0-none" / "result.json").stat().st_mtime_ns
    shutil.rmtree(run / "runs" / "2-typos")
    assert main(command(base, data, run, f"fool={spoilt}", "typos")) == 0
    again = json.loads(capsys.readouterr().out)
    assert [r["against_kept"] for r in again["changes"]] == [r["against_kept"] for r in found["changes"]]
    assert (run / "runs" / "0-none" / "result.json").stat().st_mtime_ns == kept

    # Another comparison does not go into the same folder.
    assert main(command(base, data, run, "noise")) == 2
    assert "another comparison" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused_before_training(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build_data(tmp_path / "other", n=40)
    for changes, words in (
        ((), "name at least one"),
        (("magic",), "'magic' is none of"),
        (("typos", "typos"), "twice"),
        ((f"other={other}",), "side is another one"),
    ):
        run = tmp_path / "run"
        assert main(command(base, data, run, *changes)) == 2
        err = capsys.readouterr().err
        assert words in err
        assert len(err.strip().splitlines()) == 1
        assert not run.exists()
