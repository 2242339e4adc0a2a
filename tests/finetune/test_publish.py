"""`eval`, `publish`, `rollback` through the command: nothing goes live that did not win, and nothing is overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bot.catalog import check_folder
from finetune.__main__ import main
from finetune.gate import Gate, judge
from finetune.metrics import bleu, paired_difference, paired_perplexity, rouge_l, same_language
from tests.finetune.test_train import arguments
from tests.finetune.tiny import build_data, build_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two evaluated runs: one that learned, one that learned nothing."""
    home = tmp_path_factory.mktemp("made")
    base, data = build_model(home / "base"), build_data(home / "data")
    for name, lr, steps in (("good", "1e-2", 40), ("worse", "1e-2", 15)):
        flags = {"lr": lr, "max-steps": steps, "patience": 0, "eval-every": steps}
        assert main(arguments(base, data, home / name, **flags)) == 0
    assert main(["eval", "--run", str(home / "good"), "--releases", str(home / "none"), *QUICK]) == 0
    return {"home": home, "good": home / "good", "worse": home / "worse"}


QUICK = ("--samples", "4", "--max-new-tokens", "8", "--gate", str(Path(__file__).with_name("gate.toml")))


def own(made: dict[str, Path], tmp_path: Path, name: str) -> Path:
    """A copy of a run that a test may change."""
    return Path(shutil.copytree(made[name], tmp_path / name))


def test_an_evaluation_compares_pairs_and_writes_a_page(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads((made["good"] / "eval.json").read_text(encoding="utf-8"))
    change = found["against"]["base"]["perplexity_change"]
    assert change["low"] <= change["mean"] <= change["high"] < 0
    assert found["candidate"]["perplexity"] < found["others"]["base"]["perplexity"]
    assert found["gate"]["passed"] is True
    assert found["n_held_out"] >= 4
    page = (made["good"] / "eval.html").read_text(encoding="utf-8")
    assert "gate passed" in page
    assert "<svg" in page
    assert "<script" not in page
    assert all(set(s) == {"question", "human", "candidate", "base"} for s in found["samples"])


def test_publishing_makes_a_release_a_server_can_load_with_its_lineage(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = own(made, tmp_path, "good")
    releases = tmp_path / "releases"
    assert main(["publish", "--run", str(run), "--releases", str(releases), "--json"]) == 0
    lineage = json.loads(capsys.readouterr().out)
    folder = releases / lineage["name"]
    assert check_folder(folder / "model")
    assert json.loads((releases / "current.json").read_text()) == {"release": lineage["name"], "previous": []}
    for key in ("data_sha256", "result_sha256", "model_sha256", "config", "environment", "metrics", "gate", "base"):
        assert lineage[key]
    assert lineage["max_lora_rank"] == 16
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert lineage["data_sha256"] in card
    assert "perplexity" in card
    assert not list(releases.glob(".*.partial"))

    # The merged weights compute what base and adapter did; in bfloat16, as they are served.
    ids = torch.arange(30)[None]
    base = AutoModelForCausalLM.from_pretrained(made["home"] / "base")
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, str(folder / "adapter"))(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(adapted, merged, rtol=0.05, atol=0.05)


def test_a_release_is_never_written_twice(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, releases = own(made, tmp_path, "good"), tmp_path / "releases"
    assert main(["publish", "--run", str(run), "--releases", str(releases)]) == 0
    before = {p: p.stat().st_mtime_ns for p in releases.rglob("*") if p.is_file() and p.name != ".lock"}
    assert main(["publish", "--run", str(run), "--releases", str(releases)]) == 2
    assert "is published already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in releases.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_staged_release_is_there_and_not_the_current_one(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, releases = own(made, tmp_path, "good"), tmp_path / "releases"
    command = ["publish", "--run", str(run), "--releases", str(releases)]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))["sha256"]
    replay = {"result_sha256": result, "current": None, "verdict": {"passed": False, "reasons": ["it says less"]}}
    (run / "replay.json").write_text(json.dumps(replay))
    assert main([*command, "--stage"]) == 2
    assert "the replay was not passed: it says less" in capsys.readouterr().err
    (run / "replay.json").write_text(json.dumps(replay | {"verdict": {"passed": True, "reasons": []}}))

    releases.mkdir(exist_ok=True)
    (releases / "experiment.json").write_text("{}")
    assert main(command) == 2  # it would change what the experiment compares with
    assert "an experiment is running" in capsys.readouterr().err
    assert main([*command, "--stage", "--json"]) == 0
    name = json.loads(capsys.readouterr().out)["name"]
    assert not (releases / "current.json").exists()
    assert (releases / name / "replay.json").exists()
    assert main(["rollback", "--to", name, "--releases", str(releases)]) == 0
    assert json.loads((releases / "current.json").read_text()) == {"release": name, "previous": []}


def test_what_was_not_evaluated_or_did_not_win_is_not_published(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    releases = tmp_path / "releases"
    fresh = own(made, tmp_path, "worse")
    assert main(["publish", "--run", str(fresh), "--releases", str(releases)]) == 2
    assert "not evaluated" in capsys.readouterr().err

    # The better one is current; the worse one is measured against it, and loses.
    assert main(["publish", "--run", str(own(made, tmp_path, "good")), "--releases", str(releases)]) == 0
    assert main(["eval", "--run", str(fresh), "--releases", str(releases), *QUICK]) == 0
    found = json.loads((fresh / "eval.json").read_text(encoding="utf-8"))
    assert found["gate"]["passed"] is False
    assert set(found["against"]) == {"base", "current"}
    capsys.readouterr()
    assert main(["publish", "--run", str(fresh), "--releases", str(releases)]) == 2
    err = capsys.readouterr().err
    assert "the gate was not passed: perplexity against current" in err
    assert err.count("\n") == 1
    assert len([p for p in releases.iterdir() if p.is_dir()]) == 1


def test_a_result_or_an_evaluation_of_another_time_is_not_published(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, releases = own(made, tmp_path, "good"), tmp_path / "releases"
    config = run / "result" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 32.0', '"lora_alpha": 64.0'))
    assert main(["publish", "--run", str(run), "--releases", str(releases)]) == 2
    assert "changed since the run ended" in capsys.readouterr().err

    releases.mkdir(exist_ok=True)
    (releases / "other").mkdir()
    (releases / "other" / "release.json").write_text(
        json.dumps({"name": "other", "published_at": "2026", "best_loss": 1.0})
    )
    (releases / "current.json").write_text(json.dumps({"release": "other", "previous": []}))
    shutil.rmtree(run)
    run = own(made, tmp_path, "good")
    assert main(["publish", "--run", str(run), "--releases", str(releases)]) == 2
    assert "run eval again" in capsys.readouterr().err


def test_rollback_goes_back_and_forth_and_deletes_nothing(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    releases = tmp_path / "releases"
    assert main(["rollback", "--releases", str(releases)]) == 2
    assert "no release is published" in capsys.readouterr().err
    for name in ("first", "second"):
        (releases / name).mkdir(parents=True)
        (releases / name / "release.json").write_text(
            json.dumps({"name": name, "published_at": name, "best_loss": 1.0})
        )
    (releases / "current.json").write_text(json.dumps({"release": "second", "previous": ["first"]}))

    def go(*arguments: str) -> Any:
        assert main(["rollback", "--releases", str(releases), "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    assert go() == {"release": "first", "was": "second"}
    assert go("--to", "second") == {"release": "second", "was": "first"}
    assert go() == {"release": "first", "was": "second"}
    assert go() == {"release": None, "was": "first"}
    assert main(["rollback", "--to", "third", "--releases", str(releases)]) == 2
    assert "there are second, first" in capsys.readouterr().err
    assert main(["releases", "--releases", str(releases), "--json"]) == 0
    assert [r["name"] for r in json.loads(capsys.readouterr().out)] == ["second", "first"]


def test_a_gate_that_measured_nothing_does_not_open() -> None:
    assert judge({"n_held_out": 50, "candidate": {}, "against": {}}, Gate())["passed"] is False
    better = {"mean": -0.4, "low": -0.5, "high": -0.3}
    assert (
        judge({"n_held_out": 50, "candidate": {}, "against": {"base": {"perplexity_change": better}}}, Gate())["passed"]
        is True
    )
    assert (
        judge({"n_held_out": 3, "candidate": {}, "against": {"base": {"perplexity_change": better}}}, Gate())["passed"]
        is False
    )
    unsure = {"mean": -0.1, "low": -0.3, "high": 0.1}
    assert (
        judge({"n_held_out": 50, "candidate": {}, "against": {"base": {"perplexity_change": unsure}}}, Gate())["passed"]
        is False
    )
    worse = {
        "n_held_out": 50,
        "candidate": {},
        "against": {"base": {"perplexity_change": better}},
        "cases": {"shop": {"against": {}, "contestants": {"candidate": {"refusal_accuracy": 0.8}}}},
    }
    assert "refusal_accuracy 0.800" in judge(worse, Gate(min_refusal_accuracy=0.9))["reasons"][0]


def test_figures_of_replies_read_chinese_as_characters() -> None:
    assert rouge_l("满99包邮", "满99包邮") == 1.0
    assert rouge_l("满九十九包邮哦", "满99包邮") == pytest.approx(2 * 3 / (7 + 4))
    assert rouge_l("free over 99", "free from 99") == pytest.approx(2 * 2 / 6)
    assert bleu(["满九十九元就可以包邮的"], ["满九十九元就可以包邮的"], "zh") == pytest.approx(100)
    assert same_language("您好", "怎么退货")
    assert not same_language("Hello there", "怎么退货")
    assert same_language("QH1034", "怎么退货")


def test_intervals_are_of_pairs() -> None:
    old = [float(n) for n in range(50)]
    better = paired_difference([x + 0.5 for x in old], old)
    assert better.low == better.mean == better.high == pytest.approx(0.5)  # however much the items differ
    losses = [(10.0 * n, 10) for n in range(1, 20)]
    lower = paired_perplexity([(x - 5.0, n) for x, n in losses], losses)
    assert lower.mean == pytest.approx(2.718281828**-0.5 - 1, rel=1e-6)
