"""snapshots.py and its two commands: versions, rollback, several stores and processes in one cache folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrieval.__main__ import main
from retrieval.retriever import LiveRetriever
from retrieval.snapshots import N_SNAPSHOTS, Snapshots
from tests.retrieval.conftest import NOW, HashingEmbedder, write_store
from tests.retrieval.test_retriever import edit, wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def live(store: Path, tmp_path: Path, hashing: HashingEmbedder) -> Iterator[LiveRetriever]:
    retriever = LiveRetriever(store, hashing, tmp_path / "cache")
    yield retriever
    retriever.close()


def prices(retriever: LiveRetriever) -> str:
    return retriever.search("is delivery free", 1, now=NOW)[0].passage.text


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    found = capsys.readouterr()
    return status, found.out, found.err


def listed(capsys: pytest.CaptureFixture[str], store: Path, cache: Path) -> list[dict[str, object]]:
    _, out, _ = command(capsys, "versions", "--store", str(store), "--cache", str(cache), "--json")
    found: list[dict[str, object]] = json.loads(out)
    return found


def test_a_running_server_goes_back_to_an_older_version_and_forward_again(
    live: LiveRetriever, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live.start()
    old, cache = live.version, tmp_path / "cache"
    edit(store / "faqs.csv", "free from ¥99", "free from ¥59")
    wait_until(lambda: live.version != old)
    new = live.version
    assert [(one["version"], one["state"]) for one in listed(capsys, store, cache)] == [(new, "live"), (old, "kept")]

    where = ["--store", str(store), "--cache", str(cache)]
    assert command(capsys, "rollback", old[:6], *where)[0] == 0
    wait_until(lambda: live.version == old)
    assert prices(live) == "Shipping is ¥8, free from ¥99."
    status = live.status()
    assert status.pinned == old
    assert status.notes == (f"version {old} is pinned by a rollback; changed files wait",)
    assert [(one["version"], one["state"], one["pinned"]) for one in listed(capsys, store, cache)] == [
        (new, "kept", False),
        (old, "live", True),
    ]
    edit(store / "faqs.csv", "free from ¥59", "free from ¥49")  # waits
    time.sleep(2.5)
    assert live.version == old

    assert command(capsys, "rollback", "--latest", *where)[0] == 0
    wait_until(lambda: live.version not in (old, new))
    assert prices(live) == "Shipping is ¥8, free from ¥49."
    assert live.status().pinned is None
    assert live.status().notes == ()


def test_a_restart_keeps_the_pin_even_while_the_files_are_faulty(
    live: LiveRetriever, store: Path, tmp_path: Path, hashing: HashingEmbedder
) -> None:
    old = live.version
    edit(store / "faqs.csv", "free from ¥99", "free from ¥59")
    assert live.reload()
    Snapshots(tmp_path / "cache", store).pin(old)
    edit(store / "products.csv", "399", "cheap")
    again = LiveRetriever(store, hashing, tmp_path / "cache")
    assert again.version == old
    assert len(again.status().faults) == 2
    again.close()


def test_a_pinned_snapshot_that_is_damaged_is_said_and_the_newest_is_served(
    live: LiveRetriever, store: Path, tmp_path: Path, hashing: HashingEmbedder
) -> None:
    old = live.version
    edit(store / "faqs.csv", "free from ¥99", "free from ¥59")
    assert live.reload()
    snapshots = Snapshots(tmp_path / "cache", store)
    snapshots.pin(old)
    (snapshots.place(old, hashing.version) / "vectors.faiss").write_bytes(b"")
    again = LiveRetriever(store, hashing, tmp_path / "cache")
    assert again.version == live.version
    assert again.status().pinned is None
    assert "gone or damaged" in again.status().notes[0]
    again.close()


@pytest.mark.parametrize("wanted", ["ffff", "", "../.."])
def test_a_version_that_is_not_there_is_refused_in_one_line(
    live: LiveRetriever, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: str
) -> None:
    where = ["--store", str(store), "--cache", str(tmp_path / "cache")]
    status, _, err = command(capsys, "rollback", wanted, *where)
    assert status == 2
    assert live.version in err
    assert err.count("\n") == 1
    assert Snapshots(tmp_path / "cache", store).pinned() is None


def test_a_damaged_version_is_listed_as_such_and_not_pinned(
    live: LiveRetriever, store: Path, tmp_path: Path, hashing: HashingEmbedder, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    folder = Snapshots(cache, store).place(live.version, hashing.version)
    raw = (folder / "passages.jsonl").read_bytes()
    (folder / "passages.jsonl").write_bytes(raw[:-10])
    status, _, err = command(capsys, "rollback", live.version, "--store", str(store), "--cache", str(cache))
    assert (status, "damaged" in err) == (2, True)
    (folder / "manifest.json").write_text("{}", "utf-8")
    assert listed(capsys, store, cache)[0]["state"] == "damaged"


def test_each_store_keeps_its_own_last_versions_in_a_shared_cache(
    store: Path, tmp_path: Path, hashing: HashingEmbedder
) -> None:
    cache, other = tmp_path / "cache", write_store(tmp_path / "other")
    edit(other / "faqs.csv", "free from ¥99", "free from ¥1")
    theirs = LiveRetriever(other, hashing, cache)
    ours = LiveRetriever(store, hashing, cache)
    first = ours.version
    for n in range(N_SNAPSHOTS + 1):
        edit(store / "faqs.csv", f"free from ¥{99 + n}", f"free from ¥{100 + n}")
        assert ours.reload()
    assert [one.version for one in Snapshots(cache, other).listed()] == [theirs.version]
    kept = [one.version for one in Snapshots(cache, store).listed()]
    assert kept[0] == ours.version
    assert len(kept) == N_SNAPSHOTS
    assert first not in kept
    assert len(list((cache / "snapshots").iterdir())) == N_SNAPSHOTS + 1
    ours.close()
    theirs.close()


def test_a_hostile_record_names_nothing_outside_the_snapshots(live: LiveRetriever, store: Path, tmp_path: Path) -> None:
    (record,) = (tmp_path / "cache").glob("latest-*.json")
    outside = tmp_path / "precious"
    outside.mkdir()
    for content in (
        json.dumps({"snapshots": ["../../precious", "..", ".", "/etc", "", 5, None, "a/b"]}),
        '{"snapshots": ' + "[" * 30_000,
        '{"snapshots": {"a": 1}}',
        "[1]",
        "\x00",
    ):
        record.write_text(content, "utf-8")
        assert Snapshots(tmp_path / "cache", store).listed() == []
        assert live.reload()  # and puts it in order
        assert len(Snapshots(tmp_path / "cache", store).listed()) == 1
    assert outside.is_dir()


def test_two_processes_that_build_the_same_store_at_once_both_end_with_it(
    store: Path, tmp_path: Path, hashing: HashingEmbedder
) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom retrieval.retriever import LiveRetriever\n"
        "from tests.retrieval.conftest import HashingEmbedder\n"
        "for _ in range(4):\n"
        "    live = LiveRetriever(Path(sys.argv[1]), HashingEmbedder(), Path(sys.argv[2]))\n"
        "    print(live.version)\n"
        "    live.close()\n"
        "    (next((Path(sys.argv[2]) / 'snapshots').glob('[!.]*'), Path('x')) / 'manifest.json')"
        ".unlink(missing_ok=True)\n"
    )
    arguments = [sys.executable, "-c", program, str(store), str(tmp_path / "cache")]
    both = [
        subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=50) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len({line for out, _ in said for line in out.split()}) == 1
    again = LiveRetriever(store, hashing, tmp_path / "cache")
    assert Snapshots(tmp_path / "cache", store).listed()[0].state == "live"
    assert not [path for path in (tmp_path / "cache" / "snapshots").iterdir() if path.name.startswith(".")]
    again.close()


def test_no_file_of_the_package_can_read_a_pickle() -> None:
    readers = ("import pickle", "joblib", "allow_pickle=True", "torch.load")
    for path in (ROOT / "retrieval").rglob("*.py"):
        text = path.read_text("utf-8")
        assert not [word for word in readers if word in text], path
